"""Text to token ids and back: raw bytes, and byte-level BPE trained on the corpus.

Both are lossless on valid Unicode and lay out their ids the same way: ordinary tokens, then one token that is both BOS
and EOS (as in GPT-2), then the mask as the last id. `vocab_size` counts all of them. A saved tokenizer is a folder with
`softmask_tokenizer.json` (kind, ids, fingerprint) and, for BPE, Hugging Face's `tokenizer.json`, which holds no mask.
"""
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from softmask_jax.files import write_atomically

DESCRIPTION = "softmask_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
MASK_TEXT = "▁"


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer."""

    bos_id: int
    eos_id: int
    mask_token_id: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """int32 [n]; never a BOS, EOS or mask, whatever the text says."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in order."""

    def decode(self, ids: Iterable[int], *, mask: str = MASK_TEXT, eos: str = END_OF_TEXT) -> str:
        """Text of ids [n], masks and ends written as given; what is not valid UTF-8 becomes U+FFFD."""

    def fingerprint(self) -> str:
        """A hash of everything that decides ids."""

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer into `folder`, made if missing, for `load_tokenizer`."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of the UTF-8 text, 256 is BOS and EOS, 257 the mask."""

    bos_id = eos_id = 256
    mask_token_id = 257
    vocab_size = 258

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int], *, mask: str = MASK_TEXT, eos: str = END_OF_TEXT) -> str:
        def decode_run(run: np.ndarray) -> str:
            return run.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

        return _decode_runs(ids, self, decode_run, mask, eos)

    def fingerprint(self) -> str:
        return _hash("bytes", self.bos_id, self.eos_id, self.mask_token_id)

    def save(self, folder: str | Path) -> None:
        _write_description(Path(folder), "bytes", self)


class BPETokenizer:
    """Byte-level BPE as a Hugging Face `tokenizer.json` (given as text), with the mask appended as the last id.

    Raises ValueError when the JSON is no tokenizer or lacks `<|endoftext|>`.
    """

    def __init__(self, tokenizer_json: str):
        # Imported here: a folder of byte-level data needs no BPE library.
        from tokenizers import Tokenizer as HuggingFaceTokenizer

        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
        eos_id = self._tokenizer.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise ValueError(f"the tokenizer.json has no {END_OF_TEXT} token")
        # A document that spells out the end token must not end: its characters are encoded like any others.
        self._tokenizer.encode_special_tokens = True
        self._json = tokenizer_json
        self.bos_id = self.eos_id = eos_id
        self.mask_token_id = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.vocab_size = self.mask_token_id + 1

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, mask: str = MASK_TEXT, eos: str = END_OF_TEXT) -> str:
        def decode_run(run: np.ndarray) -> str:
            return self._tokenizer.decode(run.tolist(), skip_special_tokens=False)

        return _decode_runs(ids, self, decode_run, mask, eos)

    def fingerprint(self) -> str:
        return _hash("bpe", self._json)

    def save(self, folder: str | Path) -> None:
        # The description comes last: with its fingerprint it vouches for the other file.
        _write(Path(folder) / "tokenizer.json", self._json)
        _write_description(Path(folder), "bpe", self)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE with at most `vocab_size` ids, end token and mask included; fewer when the texts are few.

    The same texts give the same tokenizer. Raises ValueError when `vocab_size` leaves no room for the 256 bytes.
    """
    if vocab_size < 258:
        raise ValueError(f"data.bpe_vocab_size={vocab_size} is too small: 256 bytes, an end token, a mask make 258")
    from tokenizers import AddedToken, Tokenizer as HuggingFaceTokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return BPETokenizer(tokenizer.to_str())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer saved in `folder`. Raises FileNotFoundError without one, ValueError when it is damaged."""
    description = Path(folder) / DESCRIPTION
    if not description.is_file():
        raise FileNotFoundError(f"{folder}: no saved tokenizer here ({DESCRIPTION} is missing)")
    try:
        saved = json.loads(description.read_text("utf-8"))
        if saved["kind"] not in ("bytes", "bpe"):
            raise ValueError(f"unknown kind {saved['kind']!r}")
        if saved["kind"] == "bytes":
            tokenizer = ByteTokenizer()
        else:
            tokenizer = BPETokenizer((Path(folder) / "tokenizer.json").read_bytes().decode("utf-8"))
        if saved != _describe(saved["kind"], tokenizer):
            raise ValueError("its files do not belong together")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: the saved tokenizer is damaged ({error})") from error
    return tokenizer


def _describe(kind: str, tokenizer: Tokenizer) -> dict:
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "mask_token_id", "vocab_size")}
    return {"kind": kind, **ids, "fingerprint": tokenizer.fingerprint()}


def _write_description(folder: Path, kind: str, tokenizer: Tokenizer) -> None:
    _write(folder / DESCRIPTION, json.dumps(_describe(kind, tokenizer), indent=1))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _hash(*parts) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _decode_runs(
    ids: Iterable[int], tokenizer: Tokenizer, decode_run: Callable[[np.ndarray], str], mask: str, eos: str
) -> str:
    """Decodes stretches of ordinary ids as a whole (characters span ids) and writes special ids in between."""
    ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
    if len(ids) and not (0 <= ids.min() and ids.max() < tokenizer.vocab_size):
        raise ValueError(f"ids must lie in 0..{tokenizer.vocab_size - 1}, got {ids.min()}..{ids.max()}")
    special = {tokenizer.mask_token_id: mask, tokenizer.eos_id: eos}
    pieces, start = [], 0
    for position in np.flatnonzero(np.isin(ids, list(special))):
        pieces += [decode_run(ids[start:position]), special[int(ids[position])]]
        start = position + 1
    return "".join([*pieces, decode_run(ids[start:])])
