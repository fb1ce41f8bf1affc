"""Prompts for programs: wording and stops of the evaluations that Dream's papers report.

With a chat template the question is a user's message and the answer has begun already, with the opening of a block of
code (the tasks humaneval_instruct and mbpp_instruct of Dream's lm-evaluation-harness); without one the model continues
HumanEval's function, or MBPP's text after its mark (the tasks humaneval and mbpp), no examples before it.
"""
import dataclasses

import numpy as np

from softmask_jax.data import prompts
from softmask_jax.data.chat.template import encode_renderings, shield_contents
from softmask_jax.data.tokenizers.base import END_OF_TEXT
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.report.patterns import Pattern

FENCE = "```"
OPENING = f"Here is the completed function:\n{FENCE}python\n"
# The reference's.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|im_end|>")


def can_chat(model) -> bool:
    return model.template is not None


def row(task: str, problem: Problem, chat: bool) -> prompts.Row:
    """The question: messages, the last of which begins the answer, or a prompt."""
    if chat:
        user, begun = _chat(task, problem)
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": begun}]
        return prompts.Row(problem.id, "messages", messages, problem.id)
    text = problem.prompt if family(task) == HUMANEVAL else f"{_asked(problem)}\n[BEGIN]\n"
    return prompts.Row(problem.id, "prompt", text, problem.id)


def stops(task: str, chat: bool, compat: bool = False) -> tuple[str, ...]:
    """Texts at which an answer is cut; by default `extraction.program` finds the program instead.

    compat: the reference's stops, which lose code behind a function, or before it.
    """
    if family(task) == HUMANEVAL:
        return HUMANEVAL_STOPS if compat else ()
    return ("[DONE]",) if not chat else (FENCE,) if compat else ()


def ends(model, compat: bool) -> tuple[int, ...] | None:
    """Ids at which an answer is cut; None for the model's own. compat: end of text alone, not the end of a chat's turn."""
    tokenizer = model.tokenizer
    return (tokenizer.special_tokens.get(END_OF_TEXT, tokenizer.eos_id),) if compat else None


def _chat(task: str, problem: Problem) -> tuple[str, str]:
    if family(task) == HUMANEVAL:
        # The block that it opens is not closed.
        asked = "Write a solution to the following problem and make sure that it passes the tests:\n"
        return f"{asked}{FENCE}{problem.prompt}", f"{OPENING}{problem.prompt}\n"
    return _asked(problem), OPENING


def _asked(problem: Problem) -> str:
    tests = "\n".join(problem.shown)
    return (
        f"You are an expert Python programmer, and here is your task: {problem.prompt} Your code should pass these "
        f"tests:\n\n{tests}"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Asker:
    """Rows to patterns for one model; prompts that are too long lose their beginning.

    new_tokens: of an answer; less, but at least half, where the model's length is short. prompt_tokens: of a prompt at most.
    """

    model: object
    new_tokens: int
    prompt_tokens: int

    def __call__(self, row: prompts.Row) -> Pattern:
        """Raises ValueError for a prompt that has no tokens, or the mask's own among them."""
        ids = self._ids(row)[-self.prompt_tokens :]
        room, mask = self.model.max_length, self.model.mask_token_id
        if not len(ids) or (ids == mask).any():
            raise ValueError(f"{row.name}: the prompt has {'the mask among its tokens' if len(ids) else 'no token'}.")
        count = min(self.new_tokens, max(room - len(ids), room // 2))
        ids = ids[-(room - count) :]
        return Pattern(np.concatenate([ids, np.full(count, mask)]).astype(np.int32), len(ids))

    def _ids(self, row: prompts.Row) -> np.ndarray:
        tokenizer = self.model.tokenizer
        if row.kind == "messages":
            shielded, shield = shield_contents(row.value, tokenizer.special_tokens)
            *before, begun = shielded
            text = self.model.template.render(before, add_generation_prompt=True) + begun["content"]
            return encode_renderings(tokenizer, [(text, shield)])[0]
        ids = np.asarray(tokenizer.encode(row.value), np.int32)
        # Texts of models that write windows of fixed length begin with it.
        return np.concatenate([[tokenizer.bos_id], ids]) if self.model.padding == "right" else ids
