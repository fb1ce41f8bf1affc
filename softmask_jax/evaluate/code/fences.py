"""Fenced blocks of code in Markdown; a fence within a program's strings or comments is text."""
import re
from collections.abc import Iterator

# An unterminated string does not count.
STRING_OR_COMMENT = "|".join((
    r"#[^\n]*", *(rf"{quotes}(?:\\.|[^\\])*?{quotes}" for quotes in ('"""', "'''")),
    *(rf"{quote}(?:\\.|[^{quote}\\\n])*{quote}" for quote in ('"', "'")),
))  # fmt: skip
IN_CODE = re.compile(rf"{STRING_OR_COMMENT}|(?P<fence>`{{3,}}|^[ \t]*~{{3,}})", re.DOTALL | re.MULTILINE)
# The rest of its line is the language, or the first line of the program.
OPENING = re.compile(r"(?P<fence>`{3,}|^[ \t]*~{3,})[ \t]*(?P<rest>[^`\n]*)(?:\n|\Z|(?=`))", re.MULTILINE)
LANGUAGE = re.compile(r"[\w{.:+#=-]\S*[ \t]*")
# A language beside code on the same line.
BESIDE = re.compile(r"(?:(?!async\b)\w+[ \t]+)?(?=@|(?:async|class|def|from|import)\s)")


def blocks(text: str, opened: bool) -> list[str]:
    """Contents of the fenced blocks of `text`, in order; the last may be unclosed. opened: `text` begins in a block."""
    contents, fence, begin, position = [], "```" if opened else "", 0, 0
    while match := next(_fences(text, position, fence), None):
        if not fence:
            fence = match["fence"].strip()
            code = BESIDE.match(text, match.start("rest"))
            begin = position = code.end() if code else match.end()
            continue
        contents.append(text[begin : match.start()])
        fence = ""
        again = OPENING.match(text, match.start())
        reopened = again is not None and bool(BESIDE.match(again["rest"]) or LANGUAGE.fullmatch(again["rest"]))
        position = match.start() if reopened else match.end()
    return contents + ([text[begin:]] if fence else [])


def _fences(text: str, position: int, fence: str) -> Iterator[re.Match]:
    """Matches of what closes `fence`; of what opens a block if that is ""."""
    if not fence:
        return OPENING.finditer(text, position)
    return (match for match in IN_CODE.finditer(text, position) if (match["fence"] or "").strip().startswith(fence))
