"""Chat templates: messages to text by the tokenizer's Jinja template, and that text to ids.

Contents of messages are untrusted: `<|im_end|>` is one id where the template writes it, ordinary text where a message
spells it: a shield, a character that no content has, breaks it up until the rendering is cut at special tokens.
Rendered as by `transformers` (4.57 and 5.24: `utils/chat_template_utils.py`), but on the day `DATE`."""
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from softmask_jax.data.chat.conversations import NoConversation
from softmask_jax.data.shards.cache import logger
from softmask_jax.data.sources.listing import fingerprint, required
from softmask_jax.data.tokenizers.base import Tokenizer
from softmask_jax.data.tokenizers.files import TEMPLATE_FILE
from softmask_jax.data.tokenizers.hub import PREFIX, download_tokenizer
from softmask_jax.data.tokenizers.specials import CONFIG_FILE, read_json, read_text, template_tokens
from softmask_jax.io.files import one_line
from softmask_jax.io.paths import to_path

Messages = Sequence[Mapping[str, str]]

# ChatML with the default system prompt of Qwen 2.5's base models.
CHATML = """\
{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""
# That of LLaDA: Llama 3's, the generation prompt always at the end.
LLADA = """\
{%- for message in messages %}
    {{- bos_token if loop.first else "" }}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
"""
# What ends a turn in ChatML, and in Llama 3's and LLaDA's templates.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
# As in Llama 3's templates.
DATE, DATE_FUNCTION = datetime.datetime(2024, 7, 26), "strftime_now"
# Noncharacters of Unicode.
SHIELDS = tuple(map(chr, range(0xFDD0, 0xFDF0)))


class TemplateError(NoConversation):
    """Messages that the template cannot render."""


class ChatTemplate:
    """A Jinja template and the tokens that it may name (see `template_tokens`). Raises ImportError or ValueError."""

    def __init__(self, text: str = CHATML, tokens: Mapping[str, str | list[str]] | None = None):
        self.text, self.tokens = text, dict(tokens or {})
        self._render = _compile(text)

    def render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """The conversation as text. Raises TemplateError for messages that the template refuses."""
        # Undefined variables would pass the templates' test `tools is not none`.
        values = self.tokens | {"messages": messages, "tools": None, "documents": None}
        try:
            return self._render(values, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template can fail as any program can
            raise TemplateError("template", f"is refused by the chat template ({one_line(error)})") from error

    def split(self, messages: Messages) -> tuple[str, str]:
        """The rendering as prompt, with generation prompt, and response, the last message. Raises TemplateError."""
        prompt, text = self.render(messages[:-1], add_generation_prompt=True), self.render(messages)
        if not text.startswith(prompt):
            raise TemplateError("prefix", "has a rendering that does not begin with that of its prompt")
        response = text.removeprefix(prompt)
        return prompt, response.removesuffix(self._always) if prompt.endswith(self._always) else response

    @functools.cached_property
    def _always(self) -> str:
        """What a template such as LLaDA's appends as generation prompt even unasked; "" for others."""
        try:
            return self.render([])
        except TemplateError:
            return ""

    def encode_prompt(self, tokenizer: Tokenizer, messages: Messages) -> np.ndarray:
        """Ids int32 [n] of messages and generation prompt. Raises TemplateError."""
        shielded, shield = shield_contents(messages, tokenizer.special_tokens)
        return encode_renderings(tokenizer, [(self.render(shielded, add_generation_prompt=True), shield)])[0]

    def encode_chats(
        self, tokenizer: Tokenizer, chats: Iterable[Messages]
    ) -> list[tuple[np.ndarray, np.ndarray] | TemplateError]:
        """Ids int32 of prompt and response, encoded apart as when the model writes it, or the error, of each chat."""
        errors, texts = [], []
        for messages in chats:
            try:
                shielded, shield = shield_contents(messages, tokenizer.special_tokens)
                texts += [(text, shield) for text in self.split(shielded)]
                errors.append(None)
            except TemplateError as error:
                errors.append(error)
        parts = iter(encode_renderings(tokenizer, texts))
        return [(next(parts), next(parts)) if error is None else error for error in errors]

    def fingerprint(self) -> str:
        return fingerprint(self.text, sorted(self.tokens.items()), *[DATE.isoformat()] * (DATE_FUNCTION in self.text))

    def files(self) -> dict[str, str]:
        """Texts of files, by name, from which `load_template` makes the same template."""
        named = {name: token for name, token in self.tokens.items() if name.endswith(("_token", "_tokens"))}
        others = {name: token for name, token in self.tokens.items() if name not in named}
        extra = {"extra_special_tokens": others} if others else {}
        return {CONFIG_FILE: json.dumps({"chat_template": self.text} | named | extra, indent=1)}


def shield_contents(messages: Messages, special_tokens: Iterable[str]) -> tuple[list[dict[str, str]], str]:
    """Messages with special tokens broken up by a shield after the first character, and the shield ("": none)."""
    pattern = _special_pattern(tuple(special_tokens))
    contents = [message["content"] for message in messages]
    if not any(map(pattern.search, contents)):
        return [dict(message) for message in messages], ""
    shield = next((shield for shield in SHIELDS if not any(shield in content for content in contents)), None)
    if shield is None:
        raise TemplateError("content", "spells special tokens beside every noncharacter of Unicode")
    broken = [pattern.sub(lambda match: match[0][0] + shield + match[0][1:], content) for content in contents]
    return [{**message, "content": content} for message, content in zip(messages, broken, strict=True)], shield


def encode_renderings(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]]) -> list[np.ndarray]:
    """Ids int32 [n] of renderings, each with its shield: special tokens become their ids, the rest is text."""
    pattern = _special_pattern(tuple(tokenizer.special_tokens))
    runs, plans = [], []
    for text, shield in texts:
        plan = []
        # The pattern is a group: odd pieces are matches.
        for number, piece in enumerate(pattern.split(text)):
            if number % 2:
                plan.append(np.array([tokenizer.special_tokens[piece]], np.int32))
            elif piece:
                plan.append(len(runs))
                runs.append(piece.replace(shield, "") if shield else piece)
        plans.append(plan)
    empty, encoded = np.zeros(0, np.int32), tokenizer.encode_batch(runs)
    return [np.concatenate([empty, *(encoded[x] if isinstance(x, int) else x for x in plan)]) for plan in plans]


@functools.lru_cache(maxsize=16)
def _special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern:
    # Longer ones first: one may begin another. Without any, nothing matches.
    ordered = sorted(filter(None, special_tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, ordered)) or '(?!)'})")


def _compile(text: str) -> Callable[..., str]:
    modules = ("jinja2", "jinja2.ext", "jinja2.sandbox")
    jinja2, extensions, sandbox = (required(module, "chat", "a chat template") for module in modules)

    class Generation(extensions.Extension):
        # `{% generation %}` marks the assistant's text; its body is a scope of its own.
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller):
            return caller()

    def refuse(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # Spaces and loops as in `transformers`.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, DATE_FUNCTION: DATE.strftime}
    try:
        return environment.from_string(text).render
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is no Jinja template (line {error.lineno}: {error.message})") from error


def load_template(
    name: str | Path, cache_folder: str | Path | None = None, tokenizer: str | Path | None = None
) -> ChatTemplate:
    """The chat template in a *.jinja file, or of a tokenizer named as for `open_tokenizer`; `CHATML` if it has none.
    tokenizer: owner of the tokens that the template may name. Raises ValueError, OSError or ImportError."""
    path = _local(name, cache_folder)
    is_template = path.is_file() and path.suffix not in (".json", ".tiktoken")
    if not path.exists():
        if path.suffix == ".jinja" or tokenizer is not None and str(name) != str(tokenizer):
            raise FileNotFoundError(f"{path}: no such chat template; give a *.jinja file")
        return ChatTemplate()  # a name such as `bytes`
    folder = path if path.is_dir() else path.parent
    source, text = (path, read_text(path)) if is_template else _default_template(folder)
    owner = folder if tokenizer is None else _local(tokenizer, cache_folder)
    tokens = template_tokens(owner if owner.is_dir() else owner.parent) if owner.exists() else {}
    try:
        template = ChatTemplate(text, tokens or template_tokens(folder))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if DATE_FUNCTION in text:
        logger.info("the chat template writes the date: it gets %s on every day", DATE.date())
    return template


def _local(name: str | Path, cache_folder: str | Path | None) -> Path:
    if str(name).startswith(PREFIX):
        return download_tokenizer(str(name), None if cache_folder is None else Path(cache_folder))
    return to_path(name)


def _default_template(folder: Path) -> tuple[Path, str]:
    """File and text of the template of a tokenizer's folder; its own file comes before the config."""
    if (source := folder / TEMPLATE_FILE).is_file():
        return source, read_text(source)
    source = folder / CONFIG_FILE
    template = read_json(source, optional=True).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default", template)
    template = template or CHATML
    if not isinstance(template, str):
        reason = "chat_template is neither text nor a list with one named default"
        raise ValueError(f"{source}: {reason}; give a *.jinja file as data.chat_template")
    return source, template
