"""Every source of text by its name: `make_source`. See `documents.Source`."""
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.sources.hubs import hugging_face, tfds
from softmask_jax.data.sources.listing import fingerprint, list_files
from softmask_jax.data.sources.records import json_lines, parquet
from softmask_jax.data.sources.text_files import FileSource, stdlib

__all__ = ["BadRow", "Document", "FileSource", "Source", "make_source"]

# Functions of paths and text_key.
OF_ROWS = {"jsonl": json_lines, "parquet": parquet, "tfds": tfds, "hf": hugging_face}
KINDS = ("stdlib", "files", *OF_ROWS)

# LM1B's spaces around every token: pattern and replacement, applied in this order.
_LM1B = (
    (r"(https?) : / / ", r"\1://"), (r" '(\w+)", r"'\1"), (r" (\w+) \. ", r" \1. "), (r" (\w+) \.$", r" \1."),
    (r" \? ", "? "), (r" \?$", "?"), (r" ! ", "! "), (r" !$", "!"), (r" , ", ", "), (r" : ", ": "), (r" ; ", "; "),
    (r" / ", "/"), (r'" ([^"]+) "', r'"\1"'), (r"' ([^']+) '", r"'\1'"), (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"), (r"\$ ", "$"), (r"£ ", "£"),
)  # fmt: skip
DETOKENIZERS = {"lm1b": _LM1B}


def detokenize(text: str, name: str) -> str:
    """Natural spacing: `It 's " fine " , he said .` is `It's "fine", he said.` Raises ValueError for unknown names."""
    if name not in DETOKENIZERS:
        raise ValueError(f"data.detokenizer={name!r} is unknown; choose '' or one of {', '.join(DETOKENIZERS)}")
    for pattern, replacement in DETOKENIZERS[name]:
        text = re.sub(pattern, replacement, text)
    return text


@dataclass(frozen=True)
class Detokenized(Source):
    """`source` with a detokenizer, by its name, applied to each text."""

    source: Source
    detokenizer: str
    name: str

    def identity(self) -> str:
        return fingerprint(self.source.identity(), self.detokenizer)

    def num_parts(self) -> int:
        return self.source.num_parts()

    def read(self, part: int) -> Iterator[Document | BadRow]:
        for item in self.source.read(part):
            yield item if type(item) is BadRow else Document(item.name, detokenize(item.text, self.detokenizer))


def make_source(
    kind: str, paths: str | Iterable[str] = "", *, separator: str = "", text_key: str = "text", detokenizer: str = ""
) -> Source:
    """The source `kind`; `separator` of files, `text_key` of rows. Raises ValueError, ImportError or OSError."""
    if kind not in KINDS:
        raise ValueError(f"data.source={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if detokenizer:
        detokenize("", detokenizer)
    if kind == "stdlib":
        if paths:
            raise ValueError("data.source=stdlib reads no data.paths; name what they are, such as data.source=files")
        source = stdlib()
    elif kind == "files":
        source = FileSource("files", list_files(paths, "files"), separator)
    else:
        source = OF_ROWS[kind](paths, text_key)
    return Detokenized(source, detokenizer, source.name) if detokenizer else source
