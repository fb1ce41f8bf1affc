"""The text part: NELBO of every validation window, samples in few steps, and their scores."""
import ast
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import softmask_jax
from softmask_jax import data
from softmask_jax.config import Config
from softmask_jax.evaluate import comparison
from softmask_jax.evaluate.generative.samples import entropies
from softmask_jax.generate.batches import row_key
from softmask_jax.reproduce.ngram import NGrams
from softmask_jax.reproduce.study import Sizes
from softmask_jax.samplers import Options

SEED = 40_000  # of masks and of samples: the same for every model
TEMPERATURE = 0.8  # the sort of nucleus sampling would take most of the time on a CPU
BATCH = 32
# A line that opens a block is a statement only with one.
OPENS = re.compile(r":\s*(#.*)?$")


def nelbo(folder: Path, windows: data.Windows, sizes: Sizes) -> dict:
    """{"one_pass": [W], "two_pass": [W] if soft-masked}: NELBO of each window, nats per token."""
    scores = comparison.score(comparison.load_run(folder), windows, draws=sizes.draws, batch_size=BATCH, seed=SEED)
    return {name: (nats.windows / nats.tokens_per_window).tolist() for name, nats in scores.items()}


def sampled(folder: Path, feedback: bool, steps: int, count: int) -> dict:
    """Samples written from masks alone: {"tokens": [N L], "calls": [N] network calls}. feedback: else plain masks."""
    model = softmask_jax.load(folder)
    options = Options(steps=steps, temperature=TEMPERATURE, soft_mask=None if feedback else "none")
    size, rows = min(BATCH, count), []
    masks = np.full((size, model.max_length), model.mask_token_id, np.int32)
    for start in range(0, count, size):
        keys = jnp.stack([row_key(SEED, (number, 0)) for number in range(start, start + size)])
        rows.append(jax.device_get(model.fill(masks, keys=keys, options=options)))
    tokens, calls = (np.concatenate([getattr(out, name) for out in rows])[:count] for name in ("tokens", "row_calls"))
    return {"tokens": tokens.tolist(), "calls": calls.tolist()}


def scored(config: Config, tokens_of: Mapping[str, Sequence]) -> dict:
    """Scores of samples by name, and of as many real windows ("validation"): for each sample its n-gram `nats` per
    token, the share of its lines that `parses` counts, and the `entropy` of its tokens, nats."""
    text = data.build(config.data)
    ngrams = NGrams(text.train.gather(np.arange(len(text.train))), text.tokenizer.vocab_size)
    count = min(len(text.validation), max((len(rows) for rows in tokens_of.values()), default=1) * 4)
    real = text.validation.gather(np.arange(count) * len(text.validation) // count)
    scores = {}
    for name, rows in (dict(tokens_of) | {"validation": real}).items():
        rows = np.asarray(rows)
        scores[name] = {
            # The first token, BOS in the training text, is no surprise; nor is the last one, EOS.
            "nats": ngrams(rows)[:, :-1].mean(1).tolist(), "entropy": entropies(rows).tolist(),
            "parses": [parses(text.tokenizer.decode(row)) for row in rows],
        }  # fmt: skip
    return scores


def parses(text: str) -> float:
    """Share of a text's lines that lie in its longest run of lines which Python's parser takes as a module.

    Samples are cut out of files, so that their first and last lines rarely make sense alone; the run is dedented, and a
    block whose body is cut off counts."""
    lines = [line for line in text.split("\n") if line.strip()]
    for length in range(len(lines), 0, -1):
        if any(_is_python(lines[start : start + length]) for start in range(len(lines) - length + 1)):
            return length / len(lines)
    return 0.0


def _is_python(lines: Sequence[str]) -> bool:
    if OPENS.search(lines[-1]):
        indent = len(lines[-1]) - len(lines[-1].lstrip())
        lines = [*lines, " " * (indent + 1) + "pass"]
    try:
        with warnings.catch_warnings(action="ignore"):
            ast.parse(textwrap.dedent("\n".join(lines)))
        return True
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
