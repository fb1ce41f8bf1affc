"""Prompts and stop texts of the code evaluations in Dream's papers (its lm-evaluation-harness).

Chat: a user's question, and an answer that opens a code block (humaneval_instruct, mbpp_instruct). Else zero-shot: the
model continues HumanEval's function, or MBPP's text after a mark (humaneval, mbpp)."""
import numpy as np

from softmask_jax.data import prompts
from softmask_jax.data.chat.template import encode_renderings, shield_contents
from softmask_jax.data.tokenizers.base import END_OF_TEXT
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.report.patterns import Pattern

FENCE = "```"
OPENING = f"Here is the completed function:\n{FENCE}python\n"
# The reference's, used with compat.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "<|im_end|>")


def row(task: str, problem: Problem, chat: bool) -> prompts.Row:
    """The question: messages, the last of which begins the answer, or a prompt."""
    asked, begun = _wording(task, problem, chat)
    if not chat:
        return prompts.Row(problem.id, "prompt", asked, problem.id)
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": begun}]
    return prompts.Row(problem.id, "messages", messages, problem.id)


def _wording(task: str, problem: Problem, chat: bool) -> tuple[str, str]:
    """Question, and beginning of its answer in a chat."""
    if family(task) != HUMANEVAL:
        asked = f"You are an expert Python programmer, and here is your task: {problem.prompt} Your code should pass "
        asked += "these tests:\n\n" + "\n".join(problem.shown)
        return (asked, OPENING) if chat else (f"{asked}\n[BEGIN]\n", "")
    if not chat:
        return problem.prompt, ""
    # The reference leaves this block open.
    asked = "Write a solution to the following problem and make sure that it passes the tests:\n"
    return f"{asked}{FENCE}{problem.prompt}", f"{OPENING}{problem.prompt}\n"


def stops(task: str, chat: bool, compat: bool = False) -> tuple[str, ...]:
    """Texts at which an answer is cut. compat: the reference's, which may cut code that `extraction` needs."""
    if family(task) == HUMANEVAL:
        return HUMANEVAL_STOPS if compat else ()
    return ("[DONE]",) if not chat else (FENCE,) if compat else ()


def ends(model, compat: bool) -> tuple[int, ...] | None:
    """Ids at which an answer is cut; None for the model's own. compat: end of text alone, not of a chat's turn."""
    tokenizer = model.tokenizer
    return (tokenizer.special_tokens.get(END_OF_TEXT, tokenizer.eos_id),) if compat else None


def pattern(model, row: prompts.Row, *, new_tokens: int, prompt_tokens: int) -> Pattern:
    """The last `prompt_tokens` of a row's prompt, then `new_tokens` masks; where the model's length is short fewer, but
    at least half of it. ValueError for a prompt that is empty or contains the mask."""
    ids = _ids(model, row)[-prompt_tokens:]
    room, mask = model.max_length, model.mask_token_id
    if not len(ids) or (ids == mask).any():
        raise ValueError(f"{row.name}: the prompt has {'the mask among its tokens' if len(ids) else 'no token'}.")
    count = min(new_tokens, max(room - len(ids), room // 2))
    ids = ids[-(room - count) :]
    return Pattern(np.concatenate([ids, np.full(count, mask)]).astype(np.int32), len(ids))


def _ids(model, row: prompts.Row) -> np.ndarray:
    tokenizer = model.tokenizer
    if row.kind == "messages":
        (*before, begun), shield = shield_contents(row.value, tokenizer.special_tokens)
        text = model.template.render(before, add_generation_prompt=True) + begun["content"]
        return encode_renderings(tokenizer, [(text, shield)])[0]
    ids = np.asarray(tokenizer.encode(row.value), np.int32)
    # Models of fixed length were trained on windows with BOS.
    return np.concatenate([[tokenizer.bos_id], ids]) if model.padding == "right" else ids
