"""Examples: the recipe's splits, cuts and filters, reasons counted, whole from the cache or made again."""
import json
import logging

import numpy as np
import pytest

from softmask_jax.config import Data
from softmask_jax.data.chat import sft
from softmask_jax.data.chat.messages import open_rows
from softmask_jax.data.chat.rows import choose_rows
from softmask_jax.data.chat.sft import build_sft
from tests.helpers.chats import CALL, END, PAD, chat, write_chats, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return str(write_tokenizer(tmp_path_factory.mktemp("qwen")))


@pytest.fixture
def build(tokenizer_folder, tmp_path):
    def run(*sources, **options):
        given = {"tokenizer": tokenizer_folder, "validation_fraction": 0.1, "cache_dir": str(tmp_path / "cache")} | options
        return build_sft(paths=";".join(sources), **given)

    return run


def numbered(path, count, first=0):
    return write_chats(path, [chat(f"question {n}", f"answer {n}") for n in range(first, first + count)])


def answers(examples, data):
    """The number in each answer, in order."""
    found = []
    for ids, prompt in (examples[i] for i in range(len(examples))):
        text = data.tokenizer.decode(ids[prompt:][ids[prompt:] < 256])
        found.append(int(text.split()[1]))
    return found


def test_an_example_is_the_rendering_cut_behind_the_generation_prompt(build, tmp_path):
    data = build(numbered(tmp_path / "a.jsonl", 20))
    ids, prompt = data.train[3]
    assert ids.dtype == np.int32 and len(ids) == data.train.lengths[3]
    tail = data.tokenizer.encode("assistant\n").tolist()
    assert ids[:prompt].tolist()[-len(tail) :] == tail
    assert ids[prompt:].tolist()[-2:] == [END, *data.tokenizer.encode("\n").tolist()]
    assert data.pad_id == PAD


def test_a_source_is_split_by_permutation_and_each_split_shuffled(build, tmp_path):
    data = build(numbered(tmp_path / "a.jsonl", 25))
    order = np.random.default_rng(1231).permutation(25)
    validation, train = order[:3], order[3:]  # 10 %, rounded up
    assert answers(data.validation, data) == validation[np.random.default_rng(1231).permutation(3)].tolist()
    assert answers(data.train, data) == train[np.random.default_rng(1231).permutation(22)].tolist()


def test_a_source_may_bring_its_own_validation_rows_and_sources_are_split_before_they_are_joined(build, tmp_path):
    first = numbered(tmp_path / "a.jsonl", 20)
    second = f"{numbered(tmp_path / 'b.jsonl', 30, 100)} | {numbered(tmp_path / 'c.jsonl', 5, 200)}"
    data = build(first, second)
    train, validation = answers(data.train, data), answers(data.validation, data)
    assert sorted(n for n in train + validation if n < 100) == list(range(20))
    assert sorted(n for n in train if n >= 100) == list(range(100, 130))
    assert sorted(n for n in validation if n >= 100) == list(range(200, 205)) and len(validation) == 7
    assert train[:20] != sorted(train[:20])


def test_the_cut_comes_before_the_filters(build, tmp_path):
    chats = [chat("q", "x" if n % 2 else f"answer {n}") for n in range(100)]
    paths = write_chats(tmp_path / "a.jsonl", chats)
    data = build(paths, max_train=40, max_validation=6)
    assert (data.info["train"]["rows"], data.info["validation"]["rows"]) == (40, 6)
    rows = choose_rows([(open_rows(paths), None)], Data(validation_fraction=0.1, max_train=40, max_validation=6))
    kept = [number for _, number in rows["train"].tolist() if number % 2 == 0]
    assert answers(data.train, data) == kept
    assert data.info["train"]["rejected"] == {"short response": 40 - len(kept)}


def test_rows_are_filtered_and_each_reason_is_counted(build, tmp_path, caplog):
    bad = [
        chat("q", "ab"), chat("q", "x" * 300), chat("q", "<tool_call> here"), chat("<tool_call>", "answer"),
        chat("q", "a", "q"), [{"role": "tool", "content": "4"}, *chat("q", "answer 1")],
    ]  # fmt: skip
    paths = write_chats(tmp_path / "a.jsonl", [chat("q", f"answer {n}") for n in range(20)] + bad)
    (tmp_path / "a.jsonl").open("a").write("{broken\n")
    with caplog.at_level(logging.WARNING):
        own = f"{paths} | {numbered(tmp_path / 'b.jsonl', 2)}"
        data = build(own, max_tokens=250)
    assert data.info["train"]["rejected"] == {
        "short response": 1, "too long": 1, "tool call": 2, "no response": 1, "role": 1, "unreadable": 1,
    }
    assert data.info["train"]["rows"] == 27 and sorted(answers(data.train, data)) == list(range(20))
    assert "7 of 27 train rows are left out (2 tool call, " in caplog.text
    assert not any(CALL in data.train[i][0] for i in range(20))
    assert data.info["train"]["examples"] == 20 and data.info["train"]["response_tokens"] == 10 * 10 + 10 * 11


def test_the_limits_are_inclusive(build, tmp_path):
    own = f"{write_chats(tmp_path / 'a.jsonl', [chat('q', 'abc'), chat('q', 'abcd')])} | {numbered(tmp_path / 'b', 1)}"
    data = build(own, min_response=5)
    assert data.info["train"]["rejected"] == {} and data.info["train"]["examples"] == 2
    assert build(own, min_response=6).info["train"]["rejected"] == {"short response": 1}
    longest = int(data.train.lengths.max())
    assert build(own, max_tokens=max(longest, int(data.validation.lengths.max()))).info["train"]["examples"] == 2


def test_a_file_without_one_good_row_is_an_error(build, tmp_path):
    good = numbered(tmp_path / "a.jsonl", 30)
    write_chats(tmp_path / "b.jsonl", [[{"role": "tool", "content": "x"}]] * 30)
    with pytest.raises(ValueError, match=r"b.jsonl: none of 30 rows is a conversation; .*b.jsonl:1 has a message"):
        build(f"{good},{tmp_path}/b.jsonl")


def test_an_error_about_every_row_names_the_setting_that_is_at_fault(build, tmp_path):
    paths = numbered(tmp_path / "a.jsonl", 30)
    (tmp_path / "mine.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(ValueError, match=r"a.jsonl:1 is refused by the chat template .no.; check data.chat_template$"):
        build(paths, chat_template=str(tmp_path / "mine.jinja"))
    with pytest.raises(ValueError, match=r"a.jsonl:1 has no key 'chats'; .*; check data.messages_key$"):
        build(paths, messages_key="chats")


def test_a_template_of_ones_own_names_the_tokens_of_the_tokenizer(build, tmp_path):
    folder = write_tokenizer(tmp_path / "tokens", eos_token="<|endoftext|>", pad_token="<|im_end|>")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.jinja").write_text(
        "{{ eos_token }}{{ pad_token }}{{ strftime_now('%Y') }}{% if tools is not none %}tools{% endif %}"
        "{% for m in messages %}{{ m.content }}{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    paths = numbered(tmp_path / "a.jsonl", 30)
    data = build(paths, tokenizer=str(folder), chat_template=str(tmp_path / "elsewhere" / "mine.jinja"))
    ids, prompt = data.train[0]
    encode = lambda text: data.tokenizer.encode(text).tolist()  # noqa: E731
    assert ids[:6].tolist() == [PAD, END, *encode("2024")] and ids[[prompt - 1, -1]].tolist() == [PAD, PAD]
    assert data.tokenizer.decode(ids[prompt:-1]).startswith("answer ")


def test_a_split_without_an_example_is_an_error_that_says_why(build, tmp_path):
    with pytest.raises(ValueError, match="no train example is left of 27 rows, for example .* answers in 3 tokens"):
        build(write_chats(tmp_path / "a.jsonl", [chat("q", "x")] * 30))


def test_the_cache_is_read_again_and_another_setting_is_another_cache(build, tmp_path, monkeypatch):
    paths = numbered(tmp_path / "a.jsonl", 20)
    first = build(paths)
    with monkeypatch.context() as patch:
        patch.setattr(sft, "_write", None)
        again = build(paths)
        for options in ({"max_tokens": 100}, {"shuffle_seed": 2}, {"min_response": 6}):
            with pytest.raises(TypeError):
                build(paths, **options)
    assert again.info == first.info and answers(again.train, again) == answers(first.train, first)
    assert build(paths, shuffle_seed=2).info["fingerprint"] != first.info["fingerprint"]


@pytest.mark.parametrize("part", ["tokens", "table", "info", "missing"])
def test_a_damaged_cache_is_made_again(build, tmp_path, part, caplog):
    paths = numbered(tmp_path / "a.jsonl", 20)
    first = build(paths)
    expected = answers(first.train, first)
    folder = tmp_path / "cache"
    info = next(folder.glob("*-info.json"))
    key = info.name.removesuffix("-info.json")
    if part == "info":
        info.write_text(json.dumps({"train": {}}))
    elif part == "missing":
        (folder / f"{key}-validation.json").unlink()
    else:
        damaged = folder / (f"{key}.bin" if part == "tokens" else f"{key}-train.bin")
        damaged.write_bytes(damaged.read_bytes()[:-8] + b"\xff" * 8)
    caplog.clear()
    again = build(paths)
    assert "building it again" in caplog.text
    assert again.info == first.info and answers(again.train, again) == expected


@pytest.mark.parametrize(("options", "message"), [
    ({"validation_fraction": 1.0}, "data.validation_fraction=1.0 must lie"), ({"max_train": -1}, "data.max_train=-1"),
    ({"min_response": 0}, "data.min_response=0"), ({"max_tokens": 4}, "below data.max_tokens=4"),
])  # fmt: skip
def test_impossible_settings_are_errors(build, options, message):
    with pytest.raises(ValueError, match=message):
        build("jsonl:a.jsonl", **options)
    with pytest.raises(ValueError, match="data.paths names no conversations"):
        build("")
