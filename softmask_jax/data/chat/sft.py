"""Supervised fine-tuning data by index: conversations as prompts and responses in token ids.

Cached as one stream of ids for both splits, a table of examples for each and, written last, statistics of the rows."""
import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from softmask_jax.config import Data
from softmask_jax.data.chat.messages import Rejected
from softmask_jax.data.chat.rows import SPLITS, check_config, choose_rows, open_sources, read_examples
from softmask_jax.data.chat.template import ChatTemplate, load_template
from softmask_jax.data.shards.cache import cache_folder, content_key, logger, open_stream, write_cached, write_stream
from softmask_jax.data.sources.corpus import token_dtype
from softmask_jax.data.tokenizers import END_OF_TEXT, Tokenizer, open_tokenizer

EXAMPLES_OF_BAD_ROWS = 3
# Keys of `config.Data` in the cache's key, beside the contents of paths, tokenizer and template.
CONTENT = (
    "messages_key", "validation_fraction", "max_train", "max_validation", "max_tokens", "min_response", "shuffle_seed",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Examples:
    """One split: `examples[i]` is (ids int32 [n], prompt length). table [N 3]: start, length, prompt length."""

    tokens: np.ndarray
    table: np.ndarray
    name: str = "train"

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        start, length, prompt_length = self.table[index].tolist()
        return self.tokens[start : start + length].astype(np.int32), prompt_length

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N] tokens of prompt and response."""
        return self.table[:, 1]


@dataclasses.dataclass(frozen=True)
class Sft:
    """Examples ready for training. `info` is JSON-able: counts by reason, and `fingerprint` of all that a run sees."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train: Examples
    validation: Examples
    info: dict

    @property
    def pad_id(self) -> int:
        """Dream's pad, its end of text: `<|endoftext|>`, 151,643 in Qwen's vocabulary."""
        return self.tokenizer.special_tokens.get(END_OF_TEXT, self.tokenizer.eos_id)


def build_sft(config: Data = Data(), **overrides) -> Sft:
    """The conversations of `config` with `overrides`. Raises ValueError, ImportError or OSError with a remedy."""
    config = dataclasses.replace(config, **overrides)
    check_config(config)
    folder = cache_folder(config.cache_dir)
    tokenizer_cache = folder if config.cache_dir else None
    tokenizer = open_tokenizer(config.tokenizer, tokenizer_cache)
    template = load_template(config.chat_template or config.tokenizer, tokenizer_cache, config.tokenizer)
    sources = open_sources(config.paths, config.messages_key)
    identities = [[rows.identity() if rows else "" for rows in pair] for pair in sources]
    prints = {"tokenizer": tokenizer.fingerprint(), "template": template.fingerprint()}
    settings = {name: getattr(config, name) for name in CONTENT}
    key = "chat-" + content_key(chat_format=3, sources=identities, **prints, **settings)
    if (cached := _open(folder, key)) is None:
        logger.info("tokenizing the conversations of data.paths=%s", config.paths)
        _write(folder, key, sources, config, tokenizer, template)
        if (cached := _open(folder, key)) is None:
            raise OSError(f"{folder}: the token cache cannot be read back right after writing it; check the disk")
    tokens, tables, info = cached
    for split in SPLITS:
        if rejected := collections.Counter(info[split]["rejected"]):
            rows = f"{rejected.total()} of {info[split]['rows']} {split} rows"
            kinds = ", ".join(f"{count} {kind}" for kind, count in rejected.most_common())
            logger.warning("%s are left out (%s), for example %s", rows, kinds, info[split]["bad"][0])
    train, validation = (Examples(tokens, table, split) for split, table in zip(SPLITS, tables, strict=True))
    return Sft(tokenizer, template, train, validation, info)


def _write(folder: Path, key: str, sources, config: Data, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    chosen = choose_rows(sources, config)
    # By (source, row number): start in the stream, length, length of the prompt.
    spans: dict[tuple[int, int], tuple[int, int, int]] = {}
    rejected, bad = {split: collections.Counter() for split in SPLITS}, {split: [] for split in SPLITS}
    digest = hashlib.sha256()

    def stream() -> Iterator[np.ndarray]:
        start = 0
        for source, rows in enumerate(rows for pair in sources for rows in pair):
            by_split = [chosen[split][chosen[split][:, 0] == source, 1] for split in SPLITS]
            numbers, for_validation = np.sort(np.concatenate(by_split)), set(by_split[1].tolist())
            if not len(numbers):
                continue
            results = read_examples(rows, numbers, config, tokenizer, template)
            for number, result in zip(numbers.tolist(), results, strict=True):
                if isinstance(result, Rejected):
                    split = SPLITS[number in for_validation]
                    rejected[split][result.kind] += 1
                    if len(bad[split]) < EXAMPLES_OF_BAD_ROWS:
                        bad[split].append(f"{result.name} {result.reason}")
                    continue
                ids = np.concatenate(result)
                spans[source, number] = (start, len(ids), len(result[0]))
                start += len(ids)
                digest.update(ids.tobytes())
                yield ids

    write_stream(folder, key, stream(), token_dtype(tokenizer))
    info = {}
    for split, rows in chosen.items():
        table = np.array([spans[row] for row in map(tuple, rows.tolist()) if row in spans], np.int64)
        if not len(table):
            remedy = f", for example {bad[split][0]}" if bad[split] else "; add conversations"
            raise ValueError(f"data.paths: no {split} example is left of {len(rows)} rows{remedy}")
        digest.update(table.tobytes())
        write_stream(folder, f"{key}-{split}", [table.ravel()], np.dtype(np.int64))
        info[split] = {
            "rows": len(rows), "examples": len(table), "prompt_tokens": int(table[:, 2].sum()),
            "response_tokens": int((table[:, 1] - table[:, 2]).sum()), "rejected": dict(rejected[split]),
            "bad": bad[split],
        }  # fmt: skip
    prints = {"tokenizer_fingerprint": tokenizer.fingerprint(), "template_fingerprint": template.fingerprint()}
    info |= {"fingerprint": digest.hexdigest(), **prints, "vocab_size": tokenizer.vocab_size}
    write_cached(folder / f"{key}-info.json", [json.dumps(info, indent=1).encode()])


def _open(folder: Path, key: str):
    """Tokens, tables [N 3] and info of the cache; None when a part is missing or damaged."""
    path = folder / f"{key}-info.json"
    if not path.is_file():
        return None
    tokens, *tables = (open_stream(folder, name) for name in (key, *(f"{key}-{split}" for split in SPLITS)))
    try:
        info = json.loads(path.read_text("utf-8"))
        if tokens is None or any(table is None for table in tables):
            raise ValueError("a part of it is missing")
        tables = [table.reshape(-1, 3) for table in tables]
        if [info[split]["examples"] for split in SPLITS] != [len(table) for table in tables]:
            raise ValueError("its parts do not belong together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the cache of conversations %s is damaged (%s); building it again", path, error)
        return None
    return tokens, tables, info
