"""Tokenizers of Hugging Face's library: special tokens in texts are text, long texts are encoded in pieces."""
import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np
import tokenizers

from softmask_jax.data.tokenizers.base import END_OF_TEXT, Tokenizer, hash_of, utf8

# Length of the pieces of long texts, and of all texts in a call of the library, which takes some 100 bytes a character.
PIECE_CHARACTERS, CALL_CHARACTERS = 2**20, 2**23

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# Patterns that always begin a match at `CUT`, as GPT-2's in ByteLevel does.
CUTTABLE_PATTERNS = (QWEN_PATTERN, QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"))
# A lone space or newline between characters that NFC never joins; U+180E was white space in older versions of Unicode.
CUT = re.compile(r"(?<=[^\s\u180e])(?: (?=[0-9A-Za-z])|\n(?=\w))")


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` (text) without truncation, padding and dropout; BOS, EOS and mask. Raises ValueError."""

    kind = "huggingface"

    def __init__(self, tokenizer_json: str, bos_id: int, eos_id: int, mask_token_id: int):
        self._json = tokenizer_json
        self.bos_id, self.eos_id, self.mask_token_id = bos_id, eos_id, mask_token_id
        largest = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1)
        self.vocab_size = max(bos_id, eos_id, mask_token_id, largest) + 1

    @functools.cached_property
    def _library(self):
        # Built when needed: unpickling in a process that never encodes costs nothing.
        return open_library(self._json)

    @functools.cached_property
    def _content(self) -> dict:
        content = json.loads(self._json)
        content["model"] = {name: content["model"].get(name) for name in ("unk_token", "unk_id")}
        return content

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Ids of the file's special tokens by their text; `encode` yields none of them."""
        special = [token["content"] for token in self._content.get("added_tokens") or () if token.get("special")]
        return {token: self._library.token_to_id(token) for token in special}

    def with_mask(self, id_: int) -> "HuggingFaceTokenizer":
        """See `Tokenizer.with_mask`; the mask must be a special token, or none, for no text to contain it."""
        named = self._library.id_to_token(self.mask_token_id) is not None
        fits = id_ in self.special_tokens.values() or self._library.id_to_token(id_) is None
        if named or not fits or id_ in (self.bos_id, self.eos_id):
            return self
        return HuggingFaceTokenizer(self._json, self.bos_id, self.eos_id, id_)

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        model = self._content["model"]
        return self._library.token_to_id(model["unk_token"]) if model["unk_token"] else model["unk_id"]

    @functools.cached_property
    def _forbidden(self) -> np.ndarray:
        """bool [vocab_size]: ids that no text may become; not the unknown token, unless it is also BOS, EOS or mask."""
        ids = set(self.special_tokens.values()) - {self._unknown_id}
        forbidden = np.zeros(self.vocab_size, bool)
        forbidden[[*ids, self.bos_id, self.eos_id, self.mask_token_id]] = True
        return forbidden

    @functools.cached_property
    def _is_cuttable(self) -> bool:
        return is_cuttable(self._content)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hash_of(self.kind, self.bos_id, self.eos_id, self.mask_token_id, self._json)

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("_json", "bos_id", "eos_id", "mask_token_id", "vocab_size")}

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        parts_of = [[] for _ in texts]
        pieces = [(index, piece) for index, text in enumerate(texts) for piece in self._pieces(text)]
        ends = itertools.accumulate(len(piece) for _, piece in pieces)
        for _, call in itertools.groupby(zip(pieces, ends, strict=True), lambda pair: pair[1] // CALL_CHARACTERS):
            indices, members = zip(*(piece for piece, _ in call), strict=True)
            for index, ids in zip(indices, self._encode_pieces(list(members)), strict=True):
                parts_of[index].append(ids)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in parts_of]

    def _pieces(self, text: str) -> Iterator[str]:
        """Cut a long text without changing its ids."""
        start = 0
        while self._is_cuttable and len(text) - start > PIECE_CHARACTERS:
            cut = CUT.search(text, start + PIECE_CHARACTERS)
            if cut is None:
                break
            end = cut.start() if cut.group() == " " else cut.end()
            yield text[start:end]
            start = end
        yield text[start:] if start else text

    def _encode_pieces(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                utf8(text)
            raise
        all_ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
        del encodings  # large
        pairs = zip(texts, all_ids, strict=True)
        return [self._encode_literally(text) if self._forbidden[ids].any() else ids for text, ids in pairs]

    def _encode_literally(self, text: str) -> np.ndarray:
        """Ids of a text whose words the model takes for special tokens: these are cut after their first character.
        Special ids of one character become unknown, or vanish without an unknown token."""
        encoding = self._library.encode(text, add_special_tokens=False)
        cuts = {0, len(text)}
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._forbidden[id_]:
                cuts.add(end - len(text[start:end].lstrip()) + 1)
        pieces = [text[start:end] for start, end in itertools.pairwise(sorted(cuts))]
        encodings = self._library.encode_batch_fast(pieces, add_special_tokens=False)
        ids = np.concatenate([np.array(encoding.ids, np.int32) for encoding in encodings])
        if self._unknown_id is None or self._forbidden[self._unknown_id]:
            return ids[~self._forbidden[ids]]
        return np.where(self._forbidden[ids], np.int32(self._unknown_id), ids)

    def _decode(self, ids: list[int]) -> str:
        return self._library.decode(ids, skip_special_tokens=False)

    @functools.cached_property
    def _lead(self) -> tuple[list[int], str]:
        ids = self.encode("a").tolist()
        return ids, self._decode(ids)

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        ids = run.tolist()
        if ids and follows_mask:
            # Decoders of word pieces drop the space before the first word, but a mask is a word too.
            lead_ids, lead = self._lead
            if (text := self._decode(lead_ids + ids)).startswith(lead):
                return text.removeprefix(lead)
        return self._decode(ids)

    def fingerprint(self) -> str:
        return self._fingerprint

    def files(self) -> dict[str, str]:
        return {"tokenizer.json": self._json}


class BPETokenizer(HuggingFaceTokenizer):
    """Byte-level BPE of `train_bpe`: `<|endoftext|>` is BOS and EOS, the mask is the last id. Raises ValueError."""

    kind = "bpe"

    def __init__(self, tokenizer_json: str):
        self._json = tokenizer_json
        eos_id = self._library.token_to_id(END_OF_TEXT)
        if eos_id is None:
            raise ValueError(f"the tokenizer.json has no {END_OF_TEXT} token")
        super().__init__(tokenizer_json, eos_id, eos_id, self._library.get_vocab_size(with_added_tokens=True))

    @functools.cached_property
    def _fingerprint(self) -> str:
        return hash_of("bpe", self._json)


def open_library(tokenizer_json: str):
    """The library's tokenizer. Raises ValueError, one line, when the JSON is none."""
    try:
        library = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"not a Hugging Face tokenizer.json: {error}") from error
    # An end token spelled in a document is ordinary text.
    library.encode_special_tokens = True
    library.no_truncation()
    library.no_padding()
    if getattr(library.model, "dropout", None):
        library.model.dropout = None
    return library


def is_cuttable(content: dict) -> bool:
    """Whether cuts at `CUT` keep a text's ids: a known pattern, then bytes, and nothing that looks back."""
    # After a visible character, the patterns start a match at a space, and start or end one at a newline.
    split = content.get("pre_tokenizer") or {}
    steps = split.get("pretokenizers", [split])
    if [step.get("type") for step in steps] not in (["ByteLevel"], ["Split", "ByteLevel"]):
        return False
    if steps[-1].get("add_prefix_space", True) or steps[-1].get("use_regex", True) != (len(steps) == 1):
        return False
    if len(steps) == 2:
        pattern = steps[0].get("pattern", {}).get("Regex")
        if pattern not in CUTTABLE_PATTERNS or steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
            return False
    ordinary = [token for token in content.get("added_tokens") or () if not token.get("special")]
    if any(token.get("lstrip") or token.get("rstrip") or re.search(r"\s", token["content"]) for token in ordinary):
        return False
    return content.get("normalizer") is None or content["normalizer"].get("type") == "NFC"
