"""Renderings of `transformers`: what versions 4.57.6 and 5.24.0 made of templates in the shapes of known models'.

Recorded on 2024-07-26 by the clock, with `PreTrainedTokenizerFast.apply_chat_template(chat, tokenize=False)`, without
and with `add_generation_prompt`; None is an error.
"""
import datetime
import json
import logging

import pytest

from softmask_jax.data.chat.template import ChatTemplate, TemplateError, load_template
from tests.helpers.chats import chat

TOKENS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "sep_token": "<sep>",
    "cls_token": "<cls>", "mask_token": "<mask>",
}  # fmt: skip
ONE, TWO = chat(" Hi <b>é</b>\n", "\nHello! "), chat("1", "2", "3", "4", system="Be kind. ")
UNEVEN = [*chat("1"), *chat("2")]

# Qwen 2.5: a block of tools, and calls of tools that no message here has.
CHATML_WITH_TOOLS = """\
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools' }}
    {%- for tool in tools %}
        {{- "\\n" + tool | tojson }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != "assistant" or not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
# Llama 3: the date, and tools and documents that may be defined but none.
HEADERS_WITH_DATE = """\
{{- bos_token }}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Tools: " + tools|tojson(indent=4) + "\\n" }}
{%- endif %}
{%- if documents is not none %}
    {{- "Documents\\n" }}
{%- endif %}
{{- "Today: " + date_string + "\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not 'tool_calls' in message %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content']|trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
# Mistral: turns that must alternate, the system message with the last of the user's.
ALTERNATING = """\
{%- set ns = namespace(index=0) %}
{%- if messages[0].role == "system" %}
    {%- set system_message = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{%- set asked = messages | selectattr("role", "equalto", "user") | list %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if message == asked[-1] and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message.content + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message.content + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message.content|trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# Gemma: the model is no assistant, and line ends are written as they are.
TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# SmolLM 3: what the assistant wrote is marked, in a scope of its own.
MARKED = """\
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {% generation %}
        {%- set answer = message.content.lstrip("\\n") -%}
        {{ "<|im_start|>assistant\\n" + answer + "<|im_end|>\\n" }}
        {% endgeneration %}
    {%- else -%}
        {{ "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
    {%- endif -%}
    {{- "?" if answer is defined -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\\n" }}
{%- endif -%}
"""
# LLaDA: the generation prompt stands there in any case.
ALWAYS_PROMPTED = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
SPACES = """\
{% for m in messages %}
  {% if loop.index0 == 1 %}
    {% continue %}
  {% endif %}
  {% if m.role == "assistant" %}
    {% break %}
  {% endif %}
    {{ m.content }}
{% endfor %}

{# nothing #}
{{ messages[0] | tojson }}{{ {"b": 1, "a": "<é>"} | tojson(sort_keys=true, separators=(",", ":")) }}
"""
NAMES = (
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}{{ mask_token }}"
    "{{ other_token }}{% if tools is defined and documents is defined %}!{% endif %}"
)

# Template, chat, its rendering, and what the generation prompt adds to that.
RECORDED = [
    (CHATML_WITH_TOOLS, ONE, (
        "<|im_start|>user\n Hi <b>é</b>\n<|im_end|>\n<|im_start|>assistant\n\nHello! <|im_end|>\n"
    ), "<|im_start|>assistant\n"),
    (CHATML_WITH_TOOLS, TWO, (
        "<|im_start|>system\nBe kind. <|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
        "2<|im_end|>\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    ), "<|im_start|>assistant\n"),
    (HEADERS_WITH_DATE, ONE, (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi <b>é</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    ), "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    (HEADERS_WITH_DATE, TWO, (
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\nBe kind.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "2<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n3<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>"
    ), "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    (ALTERNATING, ONE, "<s>[INST]  Hi <b>é</b>\n[/INST] Hello!</s>", ""),
    (ALTERNATING, TWO, "<s>[INST] 1[/INST] 2</s>[INST] Be kind. \n\n3[/INST] 4</s>", ""),
    (ALTERNATING, UNEVEN, None, None),
    (TURNS, ONE, (
        "<s><start_of_turn>user\nHi <b>é</b><end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    ), "<start_of_turn>model\n"),
    (TURNS, TWO, None, None),
    (MARKED, ONE, (
        "<|im_start|>user\n Hi <b>é</b>\n<|im_end|>\n<|im_start|>assistant\nHello! <|im_end|>\n\n"
    ), "<|im_start|>assistant\n"),
    (MARKED, TWO, (
        "<|im_start|>system\nBe kind. <|im_end|>\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n"
        "2<|im_end|>\n\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n\n"
    ), "<|im_start|>assistant\n"),
    (ALWAYS_PROMPTED, ONE, (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi <b>é</b><|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ), ""),
    (SPACES, ONE, '     Hi <b>é</b>\n\n\n{"role": "user", "content": " Hi <b>é</b>\\n"}{"a":"<é>","b":1}', ""),
    (SPACES, UNEVEN, '    1\n\n{"role": "user", "content": "1"}{"a":"<é>","b":1}', ""),
    (NAMES, ONE, "<s></s><unk><pad><sep><cls><mask>!", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "messages", "rendering", "prompt"), RECORDED)
def test_templates_are_rendered_as_transformers_renders_them(text, messages, rendering, prompt):
    template = ChatTemplate(text, TOKENS)
    if rendering is None:
        with pytest.raises(TemplateError, match="refused by the chat template"):
            template.render(messages)
        return
    assert template.render(messages) == rendering
    assert template.render(messages, add_generation_prompt=True) == rendering + prompt


def test_the_response_of_marked_text_is_all_behind_the_generation_prompt():
    prompt, response = ChatTemplate(MARKED).split(TWO)
    assert response == "4<|im_end|>\n\n" and prompt.endswith("3<|im_end|>\n<|im_start|>assistant\n")


def test_the_date_is_part_of_the_fingerprint_and_the_same_on_every_day(monkeypatch):
    first = ChatTemplate(HEADERS_WITH_DATE)
    assert "Today: 26 Jul 2024\n" in first.render(ONE)
    fingerprints = first.fingerprint(), ChatTemplate(TURNS).fingerprint()
    monkeypatch.setattr("softmask_jax.data.chat.template.DATE", datetime.datetime(2025, 1, 1))
    assert ChatTemplate(HEADERS_WITH_DATE).fingerprint() != fingerprints[0]
    assert ChatTemplate(TURNS).fingerprint() == fingerprints[1]
    assert "Today: 01 Jan 2025\n" in ChatTemplate(HEADERS_WITH_DATE).render(ONE)


def test_all_tokens_that_the_files_name_are_passed_and_written_back(tmp_path, caplog):
    names = [*TOKENS, "image_token", "begin_image", "from_map_token"]
    text = "{{ strftime_now('%d') }}" + "".join(f"{{{{ {name} }}}}," for name in names)
    text += "{% for token in additional_special_tokens %}{{ token }}{% endfor %}"
    config = TOKENS | {
        "chat_template": text, "eos_token": {"__type": "AddedToken", "content": "</s>"}, "add_bos_token": True,
        "image_token": "<image>", "extra_special_tokens": {"begin_image": {"content": "<boi>"}},
        "additional_special_tokens": ["<x>", {"content": "<y>"}],
    }  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"from_map_token": "<m>", "pad_token": "<other>"}))
    with caplog.at_level(logging.INFO, "softmask_jax.data"):
        template = load_template(tmp_path)
    rendering = "26<s>,</s>,<unk>,<pad>,<sep>,<cls>,<mask>,<image>,<boi>,<m>,<x><y>"
    assert template.render(ONE) == rendering
    assert "the chat template writes the date: it gets 2024-07-26 on every day" in caplog.text
    again = tmp_path / "again"
    again.mkdir()
    for name, content in template.files().items():
        (again / name).write_text(content)
    assert load_template(again).render(ONE) == rendering
    assert load_template(again).fingerprint() == template.fingerprint()


def test_a_template_of_ones_own_names_the_tokens_of_the_tokenizer(tmp_path):
    for name, token in (("model", "<s>"), ("other", "<other>")):
        (tmp_path / name).mkdir()
        config = {"bos_token": token, "chat_template": {"default": f"{name} {{{{ bos_token }}}}", "tool_use": ""}}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "other" / "mine.jinja").write_text("mine {{ bos_token }}")
    (tmp_path / "mine.txt").write_text("text {{ bos_token }}")
    rendered = lambda spec: load_template(spec, None, tmp_path / "model").render(ONE)  # noqa: E731
    assert rendered(tmp_path / "other" / "mine.jinja") == "mine <s>" and rendered(tmp_path / "mine.txt") == "text <s>"
    assert rendered(tmp_path / "other") == "other <s>" and rendered(tmp_path / "model") == "model <s>"
    assert load_template(tmp_path / "other" / "mine.jinja").render(ONE) == "mine <other>"
    assert load_template(tmp_path / "other" / "mine.jinja", None, "bytes").render(ONE) == "mine <other>"
    with pytest.raises(FileNotFoundError, match="typo: no such chat template; give a .*jinja file"):
        rendered(tmp_path / "typo")
    assert load_template("bytes", None, "bytes").render(ONE).startswith("<|im_start|>system")
    (tmp_path / "mine.txt").write_text("{% if %}")
    with pytest.raises(ValueError, match="mine.txt: the chat template is no Jinja template"):
        rendered(tmp_path / "mine.txt")
