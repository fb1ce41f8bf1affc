"""Sudoku of 4 x 4 with few clues: answers can be checked, and their tokens depend on each other.

With few clues many grids fit. A model that is asked for all cells at once can at best draw each from its marginal,
which rarely makes a grid; one that commits a few cells at a time, or remembers what it was about to write, can."""
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import softmask_jax
from softmask_jax.config.jax_settings import root_key
from softmask_jax.convert import tiny
from softmask_jax.data.chat.buckets import ROW_MULTIPLE
from softmask_jax.diffusion.noise import row_keys
from softmask_jax.io.files import write_atomically
from softmask_jax.reproduce.study import Sizes, about_base
from softmask_jax.samplers import Options

SIDE, BOX = 4, 2
CELLS = SIDE * SIDE
EMPTY = "."
SEED = 50_000  # of the puzzles
BATCH = 50  # puzzles at a time


def grids() -> list[str]:
    """All 288 solved grids, 16 digits each, row by row."""
    rows, whole = list(itertools.permutations("1234")), []
    for first, second in itertools.product(rows, repeat=2):
        if not _fits((first, second)):
            continue
        whole += [grid for grid in itertools.product([first], [second], rows, rows) if _fits(grid)]
    return ["".join(itertools.chain(*grid)) for grid in whole]


def _fits(rows: Sequence[Sequence[str]]) -> bool:
    """Whether no column, and no box of two whole rows, of the first rows of a grid holds a digit twice."""
    columns = [[row[i] for row in rows] for i in range(SIDE)]
    boxes = [
        [*rows[top][left : left + BOX], *rows[top + 1][left : left + BOX]]
        for top in range(0, len(rows) - 1, BOX) for left in range(0, SIDE, BOX)
    ]  # fmt: skip
    return all(len(set(group)) == len(group) for group in (*columns, *boxes))


def draw(seed: int, count: int, clues: tuple[int, int]) -> list[tuple[str, str]]:
    """`count` different puzzles and a solution of each; clues: the fewest and the most of a puzzle."""
    random, solved, puzzles = np.random.default_rng(seed), grids(), {}
    while len(puzzles) < count:
        answer = solved[random.integers(len(solved))]
        kept = set(random.permutation(CELLS)[: random.integers(clues[0], clues[1] + 1)].tolist())
        puzzles.setdefault("".join(digit if i in kept else EMPTY for i, digit in enumerate(answer)), answer)
    return list(puzzles.items())


def is_right(puzzle: str, answer: str) -> bool:
    """Whether an answer is a solved grid with the puzzle's clues; any solution counts."""
    if len(answer) != CELLS or not all(clue in (EMPTY, digit) for clue, digit in zip(puzzle, answer)):
        return False
    rows = [answer[i : i + SIDE] for i in range(0, CELLS, SIDE)]
    return all(set(row) == set("1234") for row in rows) and _fits(rows)


def question(puzzle: str) -> list[dict]:
    """The chat that asks for a solution."""
    return [{"role": "system", "content": ""}, {"role": "user", "content": puzzle}]


def write_chats(path: Path, puzzles: Sequence[tuple[str, str]]) -> None:
    """A JSON-lines file of puzzles and their solutions as conversations."""
    chats = (question(puzzle) + [{"role": "assistant", "content": answer}] for puzzle, answer in puzzles)
    write_atomically(path, "".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def prepare(folder: Path, sizes: Sizes) -> dict:
    """Write the random Dream and the training puzzles into `folder`; returns the puzzles of the test."""
    chosen = draw(SEED, sizes.tests + sizes.puzzles, sizes.clues)
    tiny.make(folder, conversations=1, sizes=about_base(sizes.puzzle_width, sizes.puzzle_layers))
    write_chats(folder / "puzzles.jsonl", chosen[sizes.tests :])
    return {"puzzles": [puzzle for puzzle, _ in chosen[: sizes.tests]]}


def answered(folder: Path, puzzles: Sequence[str], feedback: bool, steps: int) -> dict:
    """A model's answers, the likeliest tokens, the surest cells first: {"answers", "right": [N], "calls": [N]}.
    feedback: else plain masks."""
    model, answers, calls = softmask_jax.load(folder), [], []
    options = Options(steps=steps, temperature=0.0, suppress_mask=True, soft_mask=None if feedback else "none")
    for start in range(0, len(puzzles), BATCH):
        tokens, cells = _asked(model, [*puzzles[start : start + BATCH], *puzzles][:BATCH])
        keys = row_keys(root_key(SEED), np.arange(len(tokens)))  # without temperature nothing is drawn
        out = model.fill(tokens, keys=keys, options=options)
        answers += [model.tokenizer.decode(row) for row in np.asarray(out.tokens)[:, cells]]
        calls += np.asarray(out.row_calls).tolist()
    answers, calls = answers[: len(puzzles)], calls[: len(puzzles)]
    return {"answers": answers, "right": [*map(is_right, puzzles, answers)], "calls": calls}


def _asked(model, puzzles: Sequence[str]) -> tuple[np.ndarray, slice]:
    """Tokens [N L] of chats whose answers are masks, with end and pads as in training, and where the answers are."""
    answer = [{"role": "assistant", "content": EMPTY * CELLS}]
    chats = model.template.encode_chats(model.tokenizer, [question(puzzle) + answer for puzzle in puzzles])
    prompt, response = (np.stack(part) for part in zip(*chats, strict=True))
    length = prompt.shape[1] + response.shape[1]
    pads = np.full((len(puzzles), -length % ROW_MULTIPLE), model.pad_token_id)
    cells = slice(prompt.shape[1], prompt.shape[1] + CELLS)
    tokens = np.concatenate([prompt, response, pads], 1)
    tokens[:, cells] = model.mask_token_id
    return tokens, cells
