"""What a model is asked: word for word, last tokens first, whatever its length."""
from types import SimpleNamespace

import numpy as np
import pytest

from softmask_jax.data import ByteTokenizer
from softmask_jax.data.chat.template import ChatTemplate
from softmask_jax.evaluate.code import prompts
from softmask_jax.evaluate.code.problems import Problem
from softmask_jax.generate.batches import Generator
from softmask_jax.report.patterns import Pattern
from tests.helpers import chats
from tests.helpers.fake_model import MASK

HEAD = Problem("HumanEval/0", 'def f(x):\n    """Do."""\n', "", "f")
TEXT = Problem("11", "Write f.", "", shown=("assert f(1)", "assert f(2)", "assert f(3)"))


def model(max_length=2_048, padding="left"):
    return SimpleNamespace(
        tokenizer=ByteTokenizer(), template=ChatTemplate(), mask_token_id=MASK, max_length=max_length, padding=padding
    )


def asked(task, problem, chat, padding="left"):
    pattern = prompts.pattern(model(padding=padding), prompts.row(task, problem, chat), new_tokens=8, prompt_tokens=1_024)
    assert (pattern.tokens[pattern.answer :] == MASK).all() and len(pattern.tokens) == pattern.answer + 8
    return pattern.tokens[: pattern.answer]


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"


def test_humaneval_in_a_chat_has_the_answer_begun_with_the_functions_head():
    assert ByteTokenizer().decode(asked("humaneval", HEAD, chat=True)) == (
        SYSTEM + "Write a solution to the following problem and make sure that it passes the tests:\n```"
        'def f(x):\n    """Do."""\n<|im_end|>\n<|im_start|>assistant\nHere is the completed function:\n```python\n'
        'def f(x):\n    """Do."""\n\n'
    )


def test_mbpp_in_a_chat_shows_three_assertions_and_opens_a_block():
    assert ByteTokenizer().decode(asked("mbpp_plus", TEXT, chat=True)) == (
        SYSTEM + "You are an expert Python programmer, and here is your task: Write f. Your code should pass these tests:"
        "\n\nassert f(1)\nassert f(2)\nassert f(3)<|im_end|>\n<|im_start|>assistant\nHere is the completed function:\n"
        "```python\n"
    )


def test_without_a_chat_the_text_itself_is_continued():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(asked("humaneval", HEAD, chat=False)) == HEAD.prompt
    window = asked("humaneval", HEAD, chat=False, padding="right")
    assert window[0] == tokenizer.bos_id and tokenizer.decode(window[1:]) == HEAD.prompt
    assert tokenizer.decode(asked("mbpp", TEXT, chat=False)).endswith("assert f(3)\n[BEGIN]\n")


def test_answers_are_cut_at_the_references_stops_with_compat_alone():
    for chat in (True, False):
        assert prompts.stops("humaneval_plus", chat) == ()
        assert prompts.stops("humaneval_plus", chat, compat=True) == (
            "\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|im_end|>"
        )  # fmt: skip
    assert prompts.stops("mbpp", True) == () and prompts.stops("mbpp", True, compat=True) == ("```",)
    assert prompts.stops("mbpp", False) == prompts.stops("mbpp", False, compat=True) == ("[DONE]",)


@pytest.mark.parametrize("task, compat, text", [
    ("mbpp", False, "x = 1\n"), ("mbpp", True, "x = 1\n<|im_end|>y = 2\n"), ("humaneval", True, "x = 1\n"),
])  # fmt: skip
def test_of_mbpp_with_compat_only_the_end_of_text_ends_an_answer_not_that_of_a_turn(tmp_path, task, compat, text):
    tokenizer = chats.tokenizer(tmp_path)
    end, turn = (tokenizer.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>"))
    asked = SimpleNamespace(tokenizer=tokenizer, end_token_ids=(end, turn), mask_token_id=tokenizer.mask_token_id)
    one, two = tokenizer.encode("x = 1\n"), tokenizer.encode("y = 2\n")
    written = np.concatenate([one, [turn], two, [end], one])
    pattern = Pattern(np.concatenate([two, np.full(len(written), asked.mask_token_id)]), len(two))
    generator = Generator(asked, None, 0, prompts.stops(task, True, compat), prompts.ends(asked, compat))
    assert generator.answer(pattern, np.concatenate([two, written]))["text"] == text


@pytest.mark.parametrize(
    "max_length, new_tokens, prompt_tokens, length, answer",
    [(2_048, 768, 1_024, 1_792, 1_024), (2_048, 768, 100, 868, 100), (128, 768, 1_024, 128, 64),
     (1_024, 768, 1_024, 1_024, 512)],
)
def test_long_prompts_lose_their_beginning_and_short_models_keep_half_for_the_answer(
    max_length, new_tokens, prompt_tokens, length, answer
):
    problem = Problem("a", "".join(map(chr, np.random.default_rng(0).integers(97, 123, 5_000))), "")
    pattern = prompts.pattern(
        model(max_length), prompts.row("humaneval", problem, False), new_tokens=new_tokens, prompt_tokens=prompt_tokens
    )
    assert (len(pattern.tokens), pattern.answer) == (length, answer)
    assert ByteTokenizer().decode(pattern.tokens[:answer]) == problem.prompt[-answer:]


def test_a_short_prompt_leaves_its_room_to_the_answer():
    pattern = prompts.pattern(model(128), prompts.row("humaneval", HEAD, False), new_tokens=768, prompt_tokens=1_024)
    assert len(pattern.tokens) == 128 and pattern.answer == len(HEAD.prompt)
