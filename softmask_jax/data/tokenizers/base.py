"""Base class of tokenizers: decoding around special ids, comparing, saving."""
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from softmask_jax.io.files import write_atomically
from softmask_jax.io.paths import to_path

DESCRIPTION = "softmask_tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
MASK_TEXT = "▁"


class Tokenizer:
    """Base class, compared by fingerprint. Subclasses add `kind`, ids and the abstract methods."""

    kind: str
    bos_id: int
    eos_id: int
    mask_token_id: int
    vocab_size: int  # with BOS, EOS and mask
    # Ids of special tokens by their text, for trusted text (chat templates).
    special_tokens: Mapping[str, int] = MappingProxyType({})

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """int32 [n] of each text, never a BOS, EOS or mask. ValueError for half a surrogate pair."""
        raise NotImplementedError

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        """Text of ids [n] without BOS, EOS and mask."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """A hash of everything that decides ids."""
        raise NotImplementedError

    def with_mask(self, id_: int) -> "Tokenizer":
        """The tokenizer with a model's mask, where its own files name none; else itself."""
        return self

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int], *, mask: str = MASK_TEXT, eos: str = END_OF_TEXT) -> str:
        """Text of ids [n], masks written as `mask`, BOS and EOS as `eos`, invalid UTF-8 as U+FFFD."""
        ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64).reshape(-1)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        special = {self.bos_id: eos, self.eos_id: eos, self.mask_token_id: mask}
        pieces, start, follows_mask = [], 0, False
        # Runs of ordinary ids are decoded together: characters span ids.
        for position in np.flatnonzero(np.isin(ids, list(special))):
            pieces += [self._decode_run(ids[start:position], follows_mask), special[int(ids[position])]]
            start, follows_mask = position + 1, ids[position] == self.mask_token_id
        return "".join([*pieces, self._decode_run(ids[start:], follows_mask)])

    def files(self) -> dict[str, str]:
        """Texts of the files, by name, beside the description."""
        return {}

    def describe(self) -> dict:
        """Content of the description file."""
        ids = {name: getattr(self, name) for name in ("bos_id", "eos_id", "mask_token_id", "vocab_size")}
        return {"kind": self.kind, **ids, "fingerprint": self.fingerprint()}

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into `folder`, made if missing, for `load_tokenizer`; the description comes last."""
        folder = to_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (self.files() | {DESCRIPTION: json.dumps(self.describe(), indent=1)}).items():
            write_atomically(folder / name, text)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.fingerprint() == self.fingerprint()

    def __hash__(self) -> int:
        return hash(self.fingerprint())


def hash_of(*parts) -> str:
    """SHA-256 of the parts as lines of text."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def utf8(text: str) -> bytes:
    """The text's bytes. Raises ValueError for half a surrogate pair, which has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        character = f"character {error.start} of a text is U+{ord(text[error.start]):04X}"
        raise ValueError(f"{character}, half a surrogate pair; decode the file with errors='replace'") from None
