"""Texts as people write them, from corpora that ship with spaces around every token."""
import re
from collections.abc import Callable

# The order matters: each rule sees what those before it made. Words and marks are those of Python's `\w`.
_LM1B_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(https?) : / / ", r"\1://"),
        (r" '(\w+)", r"'\1"),
        (r" (\w+) \. ", r" \1. "),
        (r" (\w+) \.$", r" \1."),
        (r" \? ", "? "),
        (r" \?$", "?"),
        (r" ! ", "! "),
        (r" !$", "!"),
        (r" , ", ", "),
        (r" : ", ": "),
        (r" ; ", "; "),
        (r" / ", "/"),
        (r'" ([^"]+) "', r'"\1"'),
        (r"' ([^']+) '", r"'\1'"),
        (r"\( ([^()]+) \)", r"(\1)"),
        (r"\[ ([^\[\]]+) \]", r"[\1]"),
        (r"\$ ", "$"),
        (r"£ ", "£"),
    )
)


def lm1b(text: str) -> str:
    """The spacing of LM1B's sentences undone: `It 's " fine " , he said .` is `It's "fine", he said.`"""
    for pattern, replacement in _LM1B_RULES:
        text = pattern.sub(replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b}


def find_detokenizer(name: str) -> Callable[[str], str]:
    """The function text -> text called `name`. Raises ValueError for one that does not exist."""
    if name not in DETOKENIZERS:
        raise ValueError(f"data.detokenizer={name!r} is unknown; choose '' or one of {', '.join(DETOKENIZERS)}")
    return DETOKENIZERS[name]
