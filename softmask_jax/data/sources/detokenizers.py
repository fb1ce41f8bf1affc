"""Natural spacing for corpora with spaces around every token."""
import re
from collections.abc import Callable

# Pattern and replacement, applied in this order.
_LM1B_RULES = (
    (r"(https?) : / / ", r"\1://"), (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (r" ! ", "! "), (r" !$", "!"), (r" , ", ", "), (r" : ", ": "), (r" ; ", "; "),
    (r" / ", "/"), (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"), (r"\$ ", "$"), (r"£ ", "£"),
)  # fmt: skip


def lm1b(text: str) -> str:
    """LM1B's sentences without their spaces: `It 's " fine " , he said .` is `It's "fine", he said.`"""
    for pattern, replacement in _LM1B_RULES:
        text = re.sub(pattern, replacement, text)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"lm1b": lm1b}


def find_detokenizer(name: str) -> Callable[[str], str]:
    """The function text -> text called `name`. Raises ValueError for an unknown name."""
    if name not in DETOKENIZERS:
        raise ValueError(f"data.detokenizer={name!r} is unknown; choose '' or one of {', '.join(DETOKENIZERS)}")
    return DETOKENIZERS[name]
