"""Readable text of single tokens, including partial UTF-8, control characters and special tokens."""
import functools
import json
import re
import unicodedata

from softmask_jax.data import ByteTokenizer, Tokenizer
from softmask_jax.data.tokenizers.ranks import ALPHABET

ORDINARY, SPECIAL, BYTES = range(3)
SHOWN = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t"}
# Unicode categories: control, format (direction marks), surrogate, private, unassigned, separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
BYTE_OF = {letter: byte for byte, letter in enumerate(ALPHABET)}


class Pieces:
    """`pieces(id) -> (text, kind)`: ORDINARY text, the name of a SPECIAL token, or BYTES in hexadecimal.
    Symbols of line ends and tabs are followed by the character itself; an id without text is `#id`."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = {id_: name for name, id_ in tokenizer.special_tokens.items()}
        self._special = {*self._names, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_token_id}

    def __call__(self, token: int) -> tuple[str, int]:
        if not 0 <= token < self._tokenizer.vocab_size:
            return f"#{token}", SPECIAL
        # After a mask, as word-piece decoders drop the space before a text's first word.
        text = self._tokenizer.decode([self._tokenizer.mask_token_id, token], mask="")
        if token in self._special:
            return visible(self._names.get(token, text)), SPECIAL
        if "\ufffd" in text and (raw := self._bytes(token)) is not None:
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                return raw.hex(" ").upper(), BYTES
        return (visible(text), ORDINARY) if text else (f"#{token}", SPECIAL)

    def _bytes(self, token: int) -> bytes | None:
        """Bytes of a token in byte-level BPE, byte fallback (`<0xE2>`) or plain bytes; None if unknown."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return bytes([token])
        spelling = self._spellings.get(token, "")
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelling):
            return bytes.fromhex(byte[1])
        return bytes(BYTE_OF[letter] for letter in spelling) if spelling and set(spelling) <= set(BYTE_OF) else None

    @functools.cached_property
    def _spellings(self) -> dict[int, str]:
        """Spellings of tokens in the tokenizer's file."""
        content = json.loads(self._tokenizer.files().get("tokenizer.json", "{}"))
        vocabulary = content.get("model", {}).get("vocab", {})
        return {id_: spelling for spelling, id_ in vocabulary.items()} if isinstance(vocabulary, dict) else {}


def visible(text: str) -> str:
    """The text with invisible and control characters spelled out."""
    shown = "".join(
        SHOWN.get(letter) or (f"\u27e8U+{ord(letter):04X}\u27e9" if unicodedata.category(letter) in UNSEEN else letter)
        for letter in text
    )
    return "\u25cc" + shown if shown and unicodedata.combining(shown[0]) else shown
