"""What a row of prompts asks for, and what a row that asks for nothing sensible is told."""
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest

from softmask_jax.data import ByteTokenizer, prompts
from softmask_jax.report.patterns import Encoder, token_id

MASK = ByteTokenizer.mask_token_id


def bytes_of(text):
    return list(text.encode())


@pytest.fixture
def model():
    return SimpleNamespace(
        tokenizer=ByteTokenizer(), template=None, mask_token_id=MASK, denoiser=SimpleNamespace(vocab_size=258), max_length=32
    )


@pytest.fixture
def encode(model):
    return lambda value, **options: Encoder(model, **{"limit": 32} | options)(prompts.named("row", value))


def write(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return str(path)


def test_lines_are_texts_or_objects_and_blank_ones_are_passed_over(tmp_path):
    lines = ['\ufeff"one"', "", '{"prompt": "two", "id": "b", "max_new_tokens": 3}', '{"parts": ["a", 4]}\r']
    rows = prompts.read(write(tmp_path, *lines))
    assert [row.value for row in rows] == ["one", "two", ["a", 4]]
    assert [row.kind for row in rows] == ["prompt", "prompt", "parts"]
    assert (rows[1].id, rows[1].max_new_tokens) == ("b", 3)
    assert [row.name.rpartition(":")[2] for row in rows] == ["1", "3", "4"]


def test_chats_are_read_in_every_form_that_training_reads(tmp_path):
    forms = [
        {"messages": [{"role": "user", "content": "a"}], "id": None},
        {"messages": None, "conversations": [{"from": "Human", "value": "a", "weight": None}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"conversation": {"role": ["user"], "content": ["a"]}, "prompt": None, "max_new_tokens": None},
        [{"role": "user", "content": "a"}],
    ]
    wanted = [{"role": "user", "content": "a"}]
    rows = prompts.read(write(tmp_path, *map(json.dumps, forms)))
    assert [(row.kind, row.value) for row in rows] == [("messages", wanted)] * len(forms)
    row = prompts.named("row", forms[0] | {"system": "s"})
    assert row.value == [{"role": "system", "content": "s"}, *wanted]


def test_a_file_may_be_one_array_on_one_line_or_many_and_its_bad_rows_are_named(tmp_path):
    values = ["one", {"prompt": "two", "id": "b"}, [{"role": "user", "content": "three"}]]
    for indent in (None, 2):
        rows = prompts.read(write(tmp_path, "\ufeff" + json.dumps(values, indent=indent), name="rows.json"))
        assert [row.value for row in rows] == ["one", "two", values[2]]
        assert [row.name.rpartition(":")[2] for row in rows] == ["row 0", "row 1", "row 2"]
    rows = prompts.read(write(tmp_path, json.dumps(values[2], indent=2), name="rows.json"))
    assert [row.value for row in rows] == [values[2]]
    with pytest.raises(ValueError, match="rows.json:row 1: the prompt is empty"):
        prompts.read(write(tmp_path, json.dumps(["one", ""]), name="rows.json"))
    with pytest.raises(ValueError, match="rows.json: row 1 of its JSON cannot be read .* line 3"):
        prompts.read(write(tmp_path, "[", '"one",', "two]", name="rows.json"))


def test_lines_of_a_text_file_are_prompts_as_they_stand(tmp_path):
    rows = prompts.read(write(tmp_path, "What is {this}?", '"quoted"\r', name="rows.txt"))
    assert [row.value for row in rows] == ["What is {this}?", '"quoted"']


def test_rows_come_from_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'"a"\n{"prompt": "b"}')))
    assert [row.value for row in prompts.read("-")] == ["a", "b"]


def test_the_fingerprint_is_of_what_rows_say_not_of_where_they_are(tmp_path):
    one = prompts.read(write(tmp_path, '"a"', '{"prompt": "b", "forced": {"0": "c"}}'))
    other = prompts.read(write(tmp_path, "", '{"prompt": "a"}', '{"forced": {"0": "c"}, "prompt": "b"}', name="o.jsonl"))
    assert prompts.fingerprint(one) == prompts.fingerprint(other)
    assert prompts.fingerprint(one) != prompts.fingerprint(one[::-1])


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "a"', "not readable as JSON"),
    ("plain words", "name the file \\*.txt if its lines are prompts"),
    ('{"prompt": NaN}', "NaN is not JSON"),
    (b'"\xff"', "not readable as JSON"),
    ('"\\ud800"', "surrogates not allowed"),
    ("[1, 2]", "a row is text or an object, not a list"),
    ("7", "not the number 7"),
    ('{"promt": "a"}', "no key 'promt' is known; the nearest is 'prompt'"),
    ("{}", "has one of prompt, messages, parts, tokens; this has none"),
    ('{"prompt": "a", "tokens": [1]}', "this has prompt and tokens"),
    ('""', "the prompt is empty"),
    ('{"prompt": ["a"]}', "prompt must be text, not a list"),
    ('{"prompt": "a", "id": true}', "id must be text or an integer"),
    ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens must be a positive integer, not 0"),
    ('{"prompt": "a", "max_new_tokens": "3"}', "not '3'"),
    ('{"parts": ["a", 2], "max_new_tokens": 3}', "belongs to a prompt or messages"),
    ('{"parts": []}', "a list of texts and numbers of masks"),
    ('{"parts": ["a", 0]}', "part 2 must be text or a positive number of masks, not 0"),
    ('{"parts": ["a", true]}', "not True"),
    ('{"parts": ["a", "b"]}', "nothing is masked: put a number of masks among the parts"),
    ('{"tokens": [1, 2.5]}', "a list of ids, integers all"),
    ('{"messages": []}', "the row has in 'messages' an empty list instead of a list of messages"),
    ('{"messages": [{"role": "user"}]}', "has a message .number 1. whose content is null, not text"),
    ('{"messages": [{"content": "a"}]}', "has a message .number 1. without a role"),
    ('{"messages": [{"role": "tool", "content": "a"}]}', "the role 'tool'; known are user, human, assistant"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "of the role .'user'."),
    ('{"messages": [{"role": "user", "content": 3}]}', "whose content is int, not text"),
    ('{"messages": [{"role": "user", "content": ""}]}', "the last message is empty"),
    ('{"messages": null}', "this has none of them"),
    ('{"prompt": "a", "conversations": [{"from": "human", "value": "b"}]}', "this has prompt and messages"),
    ('{"prompt": "a", "system": "b"}', "system belongs to messages"),
    ('{"prompt": "a", "forced": ["b"]}', "forced must be an object"),
    ('{"prompt": "a", "forced": {"-1": "b"}}', "the position '-1'"),
    ('{"prompt": "a", "forced": {"1": ""}}', "text or an id at position 1"),
])
def test_a_line_that_is_no_row_is_named_in_one_line(tmp_path, line, said):
    path = write(tmp_path, '"fine"', "", line)
    with pytest.raises(ValueError, match=said) as error:
        prompts.read(path)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_further_bad_lines_are_counted(tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:2: the prompt is empty.*\(2 more rows cannot be used either.\)"):
        prompts.read(write(tmp_path, '"fine"', '""', "{}", "["))


def test_a_file_without_rows_and_a_missing_one_are_errors(tmp_path):
    with pytest.raises(ValueError, match="holds no row"):
        prompts.read(write(tmp_path, "", " "))
    with pytest.raises(OSError, match="^--prompts=.*nothing.jsonl cannot be read .No such file"):
        prompts.read(str(tmp_path / "nothing.jsonl"))


def test_a_prompt_is_continued_by_as_many_masks_as_it_says_or_up_to_the_limit(encode):
    for value, options, count in [
        ("ab", {}, 30), ("ab", {"max_new_tokens": 5}, 5), ({"prompt": "ab", "max_new_tokens": 7}, {"max_new_tokens": 5}, 7),
    ]:  # fmt: skip
        pattern = encode(value, **options)
        assert pattern.tokens.tolist() == bytes_of("ab") + [MASK] * count and pattern.answer == 2


def test_texts_begin_with_bos_where_training_did(encode):
    assert encode("ab", max_new_tokens=1, bos=True).tokens.tolist() == [256, *bytes_of("ab"), MASK]
    assert encode({"parts": ["a", 1, "b"]}, bos=True).tokens.tolist() == [256, *bytes_of("a"), MASK, *bytes_of("b")]
    assert encode({"tokens": [1, MASK]}, bos=True).tokens.tolist() == [1, MASK]


def test_parts_and_tokens_say_themselves_where_masks_are(encode):
    pattern = encode({"parts": ["a", 2, "", "bc", 1, "d"]})
    assert pattern.tokens.tolist() == [*bytes_of("a"), MASK, MASK, *bytes_of("bc"), MASK, *bytes_of("d")]
    assert pattern.answer == 0
    assert encode({"tokens": [MASK, 5, MASK, 6]}).tokens.tolist() == [MASK, 5, MASK, 6]


def test_forced_tokens_stand_at_their_position_among_the_masks(encode):
    pattern = encode({"prompt": "ab", "max_new_tokens": 5, "forced": {"1": "xy", "4": 7}})
    assert pattern.tokens.tolist() == [*bytes_of("ab"), MASK, *bytes_of("xy"), MASK, 7] and pattern.answer == 2
    pattern = encode({"prompt": "ab", "max_new_tokens": 2, "forced": {"0": "x"}})
    assert pattern.tokens.tolist() == [*bytes_of("abx"), MASK] and pattern.answer == 2
    pattern = encode({"parts": [1, "a", 2], "forced": {"0": "x", "2": "y"}})
    assert pattern.tokens.tolist() == [*bytes_of("xa"), MASK, *bytes_of("y")]


class Template:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, messages):
        return self.tokenizer.encode("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>")


def test_chats_and_with_the_flag_prompts_go_through_the_models_template(model, encode):
    model.template = model.encode_chat = Template(model.tokenizer)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    more = {"limit": 99, "max_new_tokens": 1}
    decoded = lambda *given, **options: model.tokenizer.decode(encode(*given, **more, **options).tokens[:-1])  # noqa: E731
    assert decoded({"messages": messages}) == "<user>a<assistant>b<user>c<assistant>"
    assert decoded("hi", chat=True) == "<user>hi<assistant>"
    assert decoded("hi", chat=True, system="be brief") == "<system>be brief<user>hi<assistant>"
    assert decoded("hi", chat=False) == "hi"


@pytest.mark.parametrize("value, options, said", [
    ("a" * 32, {}, "the prompt's 32 tokens are too long for the 32 positions"),
    ("a" * 20, {"max_new_tokens": 13}, "the prompt's 20 tokens and 13 new ones are too long"),
    ({"parts": ["a", 32]}, {}, "its 33 tokens are more than the 32"),
    ({"tokens": [1, 2]}, {}, "nothing is masked: no token is the mask .257."),
    ({"tokens": [258, MASK]}, {}, "258 is no token's id; ids are 0..257"),
    ({"tokens": [-1, MASK]}, {}, "-1 is no token's id"),
    ({"prompt": "a", "max_new_tokens": 2, "forced": {"0": "bc"}}, {}, "every token of the answer is forced"),
    ({"prompt": "a", "max_new_tokens": 2, "forced": {"1": "bc"}}, {}, "forced reaches to position 2 of an answer of 2"),
    ({"prompt": "a", "max_new_tokens": 4, "forced": {"0": "bc", "1": 3}}, {}, "two tokens for position 1"),
    ({"prompt": "a", "max_new_tokens": 4, "forced": {"0": 999}}, {}, "999 is no token's id"),
    ({"messages": [{"role": "user", "content": "a"}]}, {}, "this model has no chat template"),
    ("a", {"chat": True}, "this model has no chat template"),
])
def test_a_row_that_the_model_cannot_take_is_named_in_one_line(encode, value, options, said):
    with pytest.raises(ValueError, match=f"^row: .*{said}") as error:
        encode(value, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_a_tokenizer_takes_tokens(model, encode):
    model.tokenizer = None
    assert encode({"tokens": [1, MASK]}).tokens.tolist() == [1, MASK]
    with pytest.raises(ValueError, match="this model has no tokenizer, so give tokens"):
        encode("a")


def test_a_token_is_named_by_its_id_its_text_or_as_a_special_one():
    tokenizer = ByteTokenizer()
    assert [token_id(text, tokenizer, 258) for text in ("7", "a", "text:7")] == [7, ord("a"), ord("7")]
    special = SimpleNamespace(special_tokens={"<|end|>": 9}, encode=lambda text: np.arange(len(text)))
    assert token_id("<|end|>", special, 258) == 9
    with pytest.raises(ValueError, match="'ab' is 2 tokens .*, not one"):
        token_id("ab", tokenizer, 258)
    for text in ("258", "-1"):
        with pytest.raises(ValueError, match=f"{text} is no token's id"):
            token_id(text, tokenizer, 258)
    with pytest.raises(ValueError, match="no tokenizer; give the token's id"):
        token_id("a", None, 258)


def test_a_row_stays_what_its_json_says(tmp_path):
    row, = prompts.read(write(tmp_path, json.dumps({"messages": [{"role": "user", "content": "ä\n"}], "id": 0})))
    assert row.value == [{"role": "user", "content": "ä\n"}] and row.id == 0 and not row.is_pattern
