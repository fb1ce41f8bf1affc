"""Tokenizers: raw bytes, text8's letters, byte-level BPE trained on the corpus, and those of other projects.

Saved as a folder: `softmask_tokenizer.json` (kind, ids, fingerprint) and, for Hugging Face's library, `tokenizer.json`.
"""
import json
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer as LibraryTokenizer, decoders, models, pre_tokenizers, trainers

from softmask_jax.data.tokenizers.base import DESCRIPTION, END_OF_TEXT, MASK_TEXT, Tokenizer, hash_of, utf8
from softmask_jax.data.tokenizers.files import JSON_FILE, read_tokenizer
from softmask_jax.data.tokenizers.hf_library import BPETokenizer, HuggingFaceTokenizer
from softmask_jax.data.tokenizers.hub import PREFIX, download_tokenizer
from softmask_jax.io.paths import to_path

__all__ = [
    "BPETokenizer", "ByteTokenizer", "DESCRIPTION", "END_OF_TEXT", "HuggingFaceTokenizer", "MASK_TEXT",
    "Text8Tokenizer", "Tokenizer", "load_tokenizer", "open_tokenizer", "train_bpe",
]

TEXT8_SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[EOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
TEXT8_TOKENS = (*TEXT8_SPECIAL, *string.ascii_lowercase, " ")
TEXT8_PIECE = 2**20


class ByteTokenizer(Tokenizer):
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is BOS and EOS, 257 the mask."""

    kind = "bytes"
    bos_id = eos_id = 256
    mask_token_id = 257
    vocab_size = 258

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        return run.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        return hash_of("bytes", self.bos_id, self.eos_id, self.mask_token_id)


class Text8Tokenizer(Tokenizer):
    """MDLM's 35 ids for text8: eight special tokens, letters a to z, space; other characters are unknown."""

    kind = "text8"
    bos_id, eos_id, mask_token_id = (TEXT8_TOKENS.index(token) for token in ("[BOS]", "[EOS]", "[MASK]"))
    vocab_size = len(TEXT8_TOKENS)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        # Ids of bytes; continuation bytes of UTF-8 have none.
        table = np.full(256, TEXT8_TOKENS.index("[UNK]"), np.uint8)
        table[0x80:0xC0] = nothing = 255
        first = len(TEXT8_SPECIAL)
        table[[ord(letter) for letter in TEXT8_TOKENS[first:]]] = range(first, self.vocab_size)
        pieces = [np.zeros(0, np.uint8)]
        for start in range(0, len(text), TEXT8_PIECE):
            ids = table[np.frombuffer(utf8(text[start : start + TEXT8_PIECE].lower()), np.uint8)]
            pieces.append(ids[ids != nothing])
        return np.concatenate(pieces, dtype=np.int32)

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        return "".join([TEXT8_TOKENS[id_] for id_ in run.tolist()])

    def fingerprint(self) -> str:
        return hash_of("text8", *TEXT8_TOKENS)


SIMPLE = {"bytes": ByteTokenizer, "text8": Text8Tokenizer}


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Deterministic byte-level BPE of at most `vocab_size` ids, end and mask included. ValueError for less than 258."""
    if vocab_size < 258:
        raise ValueError(f"data.bpe_vocab_size={vocab_size} is too small: 256 bytes, an end token, a mask make 258")
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"min_frequency": 2, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size - 2, **options))
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return BPETokenizer(tokenizer.to_str())


def open_tokenizer(name: str | Path, cache_folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names, except bpe. Raises ValueError or OSError, one line with a remedy.

    name: bytes | text8 | hf://owner/name | a tokenizer.json or *.tiktoken file, or a folder with one | a folder of
      `save`, or with vocab.json and merges.txt. cache_folder: for downloads; None is the hub library's own."""
    if name in SIMPLE:
        return SIMPLE[name]()
    if str(name).startswith(PREFIX):
        folder = download_tokenizer(str(name), None if cache_folder is None else Path(cache_folder))
        try:
            return read_tokenizer(folder)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"data.tokenizer={name}: {error}") from error
    path = to_path(name)
    if not path.exists():
        kinds = f"choose bytes, bpe or text8, {PREFIX}owner/name, or a file or folder that exists"
        if len(path.parts) > 1 or path.suffix:
            raise FileNotFoundError(f"data.tokenizer={str(name)!r} does not exist; {kinds}")
        raise ValueError(f"data.tokenizer={str(name)!r} is unknown; {kinds}")
    folder = path.parent if path.name == JSON_FILE else path
    return load_tokenizer(folder) if (folder / DESCRIPTION).is_file() else read_tokenizer(path)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises FileNotFoundError without one, ValueError when it is damaged."""
    folder = to_path(folder)
    description = folder / DESCRIPTION
    if not description.is_file():
        raise FileNotFoundError(f"{folder}: no saved tokenizer here ({DESCRIPTION} is missing)")
    try:
        saved = json.loads(description.read_text("utf-8"))
        kind, json_file = saved["kind"], folder / JSON_FILE
        if kind in SIMPLE:
            tokenizer: Tokenizer = SIMPLE[kind]()
        elif kind == "bpe":
            tokenizer = BPETokenizer(json_file.read_bytes().decode())
        elif kind == "huggingface":
            ids = (int(saved[name]) for name in ("bos_id", "eos_id", "mask_token_id"))
            tokenizer = HuggingFaceTokenizer(json_file.read_bytes().decode(), *ids)
        else:
            raise ValueError(f"unknown kind {kind!r}")
        if saved != tokenizer.describe():
            raise ValueError("its files do not belong together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the saved tokenizer is damaged ({error})") from error
    return tokenizer
