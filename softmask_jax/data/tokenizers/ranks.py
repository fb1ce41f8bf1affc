"""Byte-level vocabularies as ranks of byte strings, and their merges."""
import base64
import binascii
from collections.abc import Mapping
from pathlib import Path

from softmask_jax.data.tokenizers.specials import QWEN_RANKS, read_text

# Letters of byte-level BPE: visible characters of Latin-1 for themselves, other bytes from U+0100 on.
VISIBLE_BYTES = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
LETTERS = {byte: letter for letter, byte in enumerate(sorted({*range(256)} - {*VISIBLE_BYTES}), 0x100)}


def letters(token: bytes) -> str:
    """The token in byte-level BPE's letters, one for each byte."""
    return token.decode("latin-1").translate(LETTERS)


ALPHABET = letters(bytes(range(256)))


def read_ranks(path: Path) -> tuple[dict[str, int], list[str]]:
    """Vocabulary and merges of Qwen's ranks: lines `base64 rank`, the rank being the id. Raises ValueError."""
    ranks = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, binascii.Error):
                raise ValueError(f"{path}: line {number} is not `base64 rank`; get the file anew") from None
    if len(ranks) != QWEN_RANKS:
        known = f"only Qwen's {QWEN_RANKS} are known (how others split text is not in the file)"
        raise ValueError(f"{path}: {len(ranks)} ranks, but {known}; get the whole file or give a tokenizer.json")
    try:
        merges = [f"{letters(left)} {letters(right)}" for left, right in merges_of(ranks)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}; get the file anew") from None
    return {letters(token): rank for token, rank in ranks.items()}, merges


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of several bytes is merged from, by rank. Raises ValueError for inconsistent ranks."""
    tokens = sorted(ranks, key=ranks.__getitem__)
    if [ranks[token] for token in tokens] != list(range(len(ranks))):
        raise ValueError(f"the ranks are not 0..{len(ranks) - 1}, each once")
    merges = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            left = pairs.index(lowest)
            parts[left : left + 2] = [parts[left] + parts[left + 1]]
        if len(parts) == 1:
            continue
        if len(parts) > 2 or any(ranks.get(part, rank) >= rank for part in parts):
            raise ValueError(f"the token of rank {rank} cannot be merged from two of lower rank")
        merges.append(tuple(parts))
    return merges
