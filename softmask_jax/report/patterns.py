"""Requests to rows of tokens, with masks where text is to be generated."""
import dataclasses
from collections.abc import Sequence

import numpy as np

from softmask_jax.data.prompts import MASKS, Row, is_integer
from softmask_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """One row without padding."""

    tokens: np.ndarray  # [n] int32, masks where text is to be generated
    answer: int  # index of the answer's first token; 0 for a ready pattern


def checked_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Ids as [n] int32. ValueError for one outside the vocabulary."""
    unknown = [id_ for id_ in ids if not 0 <= id_ < vocab_size]
    if unknown:
        raise ValueError(f"{unknown[0]} is no token's id; ids are 0..{vocab_size - 1}.")
    return np.array(ids, np.int32)


def token_id(text: str, tokenizer: Tokenizer | None, vocab_size: int) -> int:
    """The token named by `text`: an id, a special token or a text of one token ("text:..." is always text).
    ValueError for several tokens, or an id outside the vocabulary."""
    if text.lstrip("-").isdigit() and text.isascii():
        return int(checked_ids([int(text)], vocab_size)[0])
    text = text.removeprefix("text:")
    if tokenizer is None:
        raise ValueError(f"{text!r} is no id, and this model has no tokenizer; give the token's id.")
    if text in tokenizer.special_tokens:
        return tokenizer.special_tokens[text]
    ids = tokenizer.encode(text).tolist()
    if len(ids) != 1:
        raise ValueError(f"{text!r:.60} is {len(ids)} tokens ({ids[:8]}), not one; give one of them, by its id.")
    return ids[0]


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """`encoder(row) -> Pattern`. ValueError, with the name of the row, if it is too long or has no mask."""

    model: object  # provides tokenizer, mask and chat template
    limit: int  # maximal row length
    max_new_tokens: int | None = None  # default of prompts; None: up to the limit
    chat: bool = False  # render prompts as user messages, after `system` if set
    system: str = ""
    bos: bool = False  # begin texts with BOS

    def __call__(self, row: Row) -> Pattern:
        try:
            return self._encode(row)
        except ValueError as error:
            raise ValueError(f"{row.name}: {error}") from None

    def _encode(self, row: Row) -> Pattern:
        mask = self.model.mask_token_id
        if row.kind == MASKS:
            tokens = np.full(self.limit, mask, np.int32)
        elif row.is_pattern:
            tokens = self._ids(row.value) if row.kind == "tokens" else self._parts(row.value)
            if len(tokens) > self.limit:
                raise ValueError(f"its {len(tokens):,} tokens are more than the {self.limit:,} that a row may have.")
        else:
            tokens = self._continued(row)
        masked = np.flatnonzero(tokens == mask)
        if not len(masked):
            raise ValueError(f"nothing is masked: no token is the mask ({mask}), so there is nothing to fill.")
        tokens = self._with_forced(tokens, masked, row.forced)
        if mask not in tokens:
            raise ValueError("every token of the answer is forced, so there is nothing to fill.")
        return Pattern(tokens, 0 if row.is_pattern else int(masked[0]))

    def _continued(self, row: Row) -> np.ndarray:
        prompt = self._prompt(row)
        count = row.max_new_tokens or self.max_new_tokens or self.limit - len(prompt)
        if count < 1 or len(prompt) + count > self.limit:
            more = f" and {count:,} new ones" if count > 0 else ""
            raise ValueError(f"the prompt's {len(prompt):,} tokens{more} are too long for the {self.limit:,} positions "
                             "that a row may have: shorten it, or ask for fewer with max_new_tokens.")
        return np.concatenate([prompt, np.full(count, self.model.mask_token_id, np.int32)])

    def _prompt(self, row: Row) -> np.ndarray:
        if row.kind == "prompt" and not self.chat:
            return self._text(row.value, first=True)
        messages = row.value
        if row.kind == "prompt":
            messages = [{"role": "system", "content": self.system}] * bool(self.system)
            messages.append({"role": "user", "content": row.value})
        if self.model.template is None:
            raise ValueError("this model has no chat template; give a prompt, without --chat.")
        return self._without_mask(self.model.encode_chat(messages))

    def _parts(self, parts: Sequence[str | int]) -> np.ndarray:
        return np.concatenate([
            np.full(part, self.model.mask_token_id, np.int32) if is_integer(part) else self._text(part, first=not i)
            for i, part in enumerate(parts) if part != ""
        ])  # fmt: skip

    def _text(self, text: str, first: bool) -> np.ndarray:
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise ValueError("this model has no tokenizer, so give tokens; or convert it again with its files.")
        ids = tokenizer.encode(text)
        if not len(ids):
            raise ValueError(f"the text {text!r:.40} has no token in this tokenizer.")
        return np.concatenate([np.array([tokenizer.bos_id] * (first and self.bos), np.int32), self._without_mask(ids)])

    def _without_mask(self, ids: np.ndarray) -> np.ndarray:
        if self.model.mask_token_id in ids:
            raise ValueError("the text holds the mask's own token; give parts, with a number of masks.")
        return np.asarray(ids, np.int32)

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        return checked_ids(ids, self.model.denoiser.vocab_size)

    def _with_forced(self, tokens: np.ndarray, answer: np.ndarray, forced) -> np.ndarray:
        """The tokens with `forced` ones at offsets in the `answer` (indices of its positions)."""
        tokens, taken = tokens.copy(), set()
        for offset, token in forced:
            ids = self._without_mask(self._ids([token]) if is_integer(token) else self._text(token, first=False))
            offsets = range(offset, offset + len(ids))
            if offsets.stop > len(answer):
                raise ValueError(f"forced reaches to position {offsets.stop - 1} of an answer of {len(answer)} tokens.")
            if taken & set(offsets):
                raise ValueError(f"forced has two tokens for position {min(taken & set(offsets))}.")
            taken |= set(offsets)
            tokens[answer[offsets]] = ids
        return tokens
