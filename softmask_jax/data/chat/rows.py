"""Rows of sources to examples, as for the soft-masked Dream-7B (arXiv 2510.17206).

Each source is split, the splits are joined, shuffled and cut to a number of rows, and only then filtered. Permutations
are those of the reference's data library: the same files and seed give the same examples."""
import collections
import math
from collections.abc import Iterator, Sequence

import numpy as np

from softmask_jax.config import Data
from softmask_jax.data.chat.messages import Conversation, Rejected, Rows, conversation, open_rows
from softmask_jax.data.chat.template import ChatTemplate, TemplateError
from softmask_jax.data.sources.records import HOPELESS_ROWS
from softmask_jax.data.tokenizers import Tokenizer
from softmask_jax.data.tokenizers.specials import QWEN_IDS, QWEN_TOOL_CALLS
from softmask_jax.io.files import split_paths

SPLITS = ("train", "validation")
TOOL_CALL_IDS = tuple(QWEN_IDS[token] for token in QWEN_TOOL_CALLS)
# Kinds of rejected rows that are conversations, and settings to check for others.
FILTERS = ("too long", "short response", "tool call")
SETTINGS = {"template": "chat_template", "prefix": "chat_template", "messages": "messages_key"}
CHUNK_ROWS = 1024


def check_config(config: Data) -> None:
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1")
    for name in ("max_train", "max_validation"):
        if getattr(config, name) < 0:
            raise ValueError(f"data.{name}={getattr(config, name)} must not be negative (0 means all)")
    if config.min_response < 1 or config.max_tokens <= config.min_response:
        bounds = f"at least 1 and below data.max_tokens={config.max_tokens}"
        raise ValueError(f"data.min_response={config.min_response} must be {bounds}")


def open_sources(paths: str, key: str = "") -> list[tuple[Rows, Rows | None]]:
    """The rows of each source in `config.Data.paths` and of its validation source, if it has one; see `open_rows`."""
    entries = split_paths(paths, ";")
    if not entries:
        raise ValueError("data.paths names no conversations; write such as chats.jsonl")
    pairs = (entry.partition("|") for entry in entries)
    return [(open_rows(rows, key), open_rows(own, key) if bar else None) for rows, bar, own in pairs]


def choose_rows(sources: Sequence[tuple[Rows, Rows | None]], config: Data) -> dict[str, np.ndarray]:
    """int64 [n 2] source and row of each split; source 2 s is `sources[s][0]`, 2 s + 1 its validation source."""

    def shuffled(count: int) -> np.ndarray:
        return np.random.default_rng(config.shuffle_seed).permutation(count)

    def pairs(source: int, numbers: np.ndarray) -> np.ndarray:
        return np.stack([np.full_like(numbers, source), numbers], axis=1)

    parts = {split: [] for split in SPLITS}
    for number, (rows, own) in enumerate(sources):
        if own is not None:
            parts["train"].append(pairs(2 * number, np.arange(len(rows))))
            parts["validation"].append(pairs(2 * number + 1, np.arange(len(own))))
            continue
        first, order = math.ceil(config.validation_fraction * len(rows)), shuffled(len(rows))
        parts["validation"].append(pairs(2 * number, order[:first]))
        parts["train"].append(pairs(2 * number, order[first:]))
    chosen = {}
    for split, limit in zip(SPLITS, (config.max_train, config.max_validation), strict=True):
        rows = np.concatenate(parts[split])
        # The reference shuffles when it joins sources, and once more.
        for _ in range(2 if len(sources) > 1 else 1):
            rows = rows[shuffled(len(rows))]
        chosen[split] = rows[:limit] if limit else rows
    return chosen


def read_examples(
    rows: Rows, numbers: np.ndarray, config: Data, tokenizer: Tokenizer, template: ChatTemplate
) -> Iterator[tuple[np.ndarray, np.ndarray] | Rejected]:
    """Prompt and response ids, or a `Rejected`, of rows `numbers` [n], ascending. ValueError for a file without any."""
    ends = np.cumsum([count for _, count in rows.files])
    good, bad, first = set(), collections.Counter(), {}
    reader = rows.read(numbers)
    for start in range(0, len(numbers), CHUNK_ROWS):
        chunk = numbers[start : start + CHUNK_ROWS]
        read = [conversation(name, row, config.messages_key) for _, (name, row) in zip(chunk, reader, strict=False)]
        if len(read) < len(chunk):
            raise ValueError(f"{rows.files[0][0]}: rows went away while they were being read; start again")
        chats = iter(template.encode_chats(tokenizer, [row.messages for row in read if isinstance(row, Conversation)]))
        for file, row in zip(np.searchsorted(ends, chunk, side="right").tolist(), read, strict=True):
            result = row if isinstance(row, Rejected) else _filtered(row.name, next(chats), config)
            if isinstance(result, Rejected) and result.kind not in FILTERS:
                bad[file] += 1
                first.setdefault(file, result)
            else:
                good.add(file)
            yield result
    for file, (name, count) in enumerate(rows.files):
        if file not in good and bad[file] >= min(count, HOPELESS_ROWS):
            row = first[file]
            remedy = f"; check data.{SETTINGS[row.kind]}" if row.kind in SETTINGS else ""
            raise ValueError(f"{name}: none of {bad[file]} rows is a conversation; {row.name} {row.reason}{remedy}")


def _filtered(name: str, chat, config: Data) -> tuple[np.ndarray, np.ndarray] | Rejected:
    if isinstance(chat, TemplateError):
        return Rejected(name, chat.kind, str(chat))
    ids, response = np.concatenate(chat), chat[1]
    if len(ids) > config.max_tokens:
        return Rejected(name, "too long", f"has {len(ids)} tokens, more than {config.max_tokens}")
    if len(response) < config.min_response:
        return Rejected(name, "short response", f"answers in {len(response)} tokens, less than {config.min_response}")
    if np.isin(ids, TOOL_CALL_IDS).any():
        return Rejected(name, "tool call", "calls a tool")
    return chat
