"""Single tokens as text that can be read: bytes that are no character alone, controls and special tokens among them."""
import functools
import json
import re
import unicodedata

from softmask_jax.data import ByteTokenizer, Tokenizer
from softmask_jax.data.tokenizers.ranks import ALPHABET

ORDINARY, SPECIAL, BYTES = range(3)
SHOWN = {"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u21e5\t"}
# Controls, formatting such as the marks that turn writing round, halves of surrogate pairs, what has no glyph.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
BYTE_OF = {letter: byte for byte, letter in enumerate(ALPHABET)}


class Pieces:
    """`pieces(id) -> (text, kind)`: ORDINARY text, the name of a SPECIAL token, or BYTES in hexadecimal.

    A line's end is followed by a line break, a tab by a tab; an id that stands for no text is `#id`.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._names = {id_: name for name, id_ in tokenizer.special_tokens.items()}
        self._special = {*self._names, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_token_id}

    def __call__(self, token: int) -> tuple[str, int]:
        if not 0 <= token < self._tokenizer.vocab_size:
            return f"#{token}", SPECIAL
        # Behind a mask, because decoders of word pieces drop the space before a text's first word.
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
        """The token's bytes, where its tokenizer tells: byte-level BPE, bytes as a last resort (`<0xE2>`), plain bytes."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return bytes([token])
        spelt = self._spelt.get(token, "")
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", spelt):
            return bytes.fromhex(byte[1])
        return bytes(BYTE_OF[letter] for letter in spelt) if spelt and set(spelt) <= set(BYTE_OF) else None

    @functools.cached_property
    def _spelt(self) -> dict[int, str]:
        """How the tokenizer's file spells its tokens."""
        content = json.loads(self._tokenizer.files().get("tokenizer.json", "{}"))
        vocabulary = content.get("model", {}).get("vocab", {})
        return {id_: spelt for spelt, id_ in vocabulary.items()} if isinstance(vocabulary, dict) else {}


def visible(text: str) -> str:
    """The text with everything in it that could not be seen, or would disturb its surroundings, written out."""
    found = "".join(
        SHOWN.get(letter) or (f"\u27e8U+{ord(letter):04X}\u27e9" if unicodedata.category(letter) in UNSEEN else letter)
        for letter in text
    )
    return "\u25cc" + found if found and unicodedata.combining(found[0]) else found
