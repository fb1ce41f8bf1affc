"""The blocks of code of an answer, as Markdown fences them; a fence within a program's strings or comments is its text."""
import re

# An unterminated string is none.
STRING_OR_COMMENT = "|".join((
    r"#[^\n]*", *(rf"{quotes}(?:\\.|[^\\])*?{quotes}" for quotes in ('"""', "'''")),
    *(rf"{quote}(?:\\.|[^{quote}\\\n])*{quote}" for quote in ('"', "'")),
))  # fmt: skip
IN_CODE = re.compile(rf"{STRING_OR_COMMENT}|(?P<fence>`{{3,}}|^[ \t]*~{{3,}})", re.DOTALL | re.MULTILINE)
# The rest of its line is the language, or the first line of the program.
OPENING = re.compile(r"(?P<fence>`{3,}|^[ \t]*~{3,})[ \t]*(?P<rest>[^`\n]*)(?:\n|\Z|(?=`))", re.MULTILINE)
LANGUAGE = re.compile(r"[\w{.:+#=-]\S*[ \t]*")
# Up to the code.
BESIDE = re.compile(r"(?:(?!async\b)\w+[ \t]+)?(?=@|(?:async|class|def|from|import)\s)")


def blocks(text: str, opened: bool) -> list[str]:
    """The contents of the fenced blocks of `text`, in order; the last one may be unclosed.

    opened: the text begins within a block. A fence with a language begins a block wherever it is.
    """
    found, fence, begin, position = [], "```" if opened else "", 0, 0
    while True:
        match = next(_fences(text, position, fence), None)
        if match is None:
            return found + ([text[begin:]] if fence else [])
        if fence:
            found.append(text[begin : match.start()])
            fence = ""
            again = OPENING.match(text, match.start())
            reopened = again is not None and bool(BESIDE.match(again["rest"]) or LANGUAGE.fullmatch(again["rest"]))
            position = match.start() if reopened else match.end()
        else:
            fence = match["fence"].strip()
            code = BESIDE.match(text, match.start("rest"))
            begin = position = code.end() if code else match.end()


def _fences(text: str, position: int, fence: str):
    """Matches of what closes `fence`, or, where that is "", of what opens a block."""
    if not fence:
        return OPENING.finditer(text, position)
    found = (match for match in IN_CODE.finditer(text, position) if match["fence"])
    return (match for match in found if match["fence"].strip().startswith(fence))
