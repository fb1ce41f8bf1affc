"""Every source of text by its name: `make_source`. See `documents.Source`."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from softmask_jax.data.sources.detokenizers import find_detokenizer
from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.sources.hubs import hugging_face, tfds
from softmask_jax.data.sources.listing import fingerprint
from softmask_jax.data.sources.records import json_lines, parquet
from softmask_jax.data.sources.text_files import FileSource, local_files, stdlib

__all__ = ["BadRow", "Document", "FileSource", "Source", "make_source"]

# Functions of paths and text_key.
OF_ROWS = {"jsonl": json_lines, "parquet": parquet, "tfds": tfds, "hf": hugging_face}
KINDS = ("stdlib", "files", *OF_ROWS)


@dataclass(frozen=True)
class Detokenized(Source):
    """`source` with a detokenizer, by its name, applied to each text."""

    source: Source
    detokenizer: str

    @property
    def name(self) -> str:
        return self.source.name

    def identity(self) -> str:
        return fingerprint(self.source.identity(), self.detokenizer)

    def num_parts(self) -> int:
        return self.source.num_parts()

    def read(self, part: int) -> Iterator[Document | BadRow]:
        detokenize = find_detokenizer(self.detokenizer)
        for item in self.source.read(part):
            yield item if type(item) is BadRow else Document(item.name, detokenize(item.text))


def make_source(
    kind: str, paths: str | Iterable[str] = "", *, separator: str = "", text_key: str = "text", detokenizer: str = ""
) -> Source:
    """The source named `kind`. `separator` is for files, `text_key` for rows, `detokenizer` ("": none) for every kind.

    Raises ValueError, ImportError or OSError, one line, for a missing package, file, column or network.
    """
    if kind not in KINDS:
        raise ValueError(f"data.source={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if detokenizer:
        find_detokenizer(detokenizer)
    if kind == "stdlib" and paths:
        raise ValueError("data.source=stdlib reads no data.paths; name what they are, such as data.source=files")
    if kind == "stdlib":
        source = stdlib()
    elif kind == "files":
        source = local_files(paths, separator)
    else:
        source = OF_ROWS[kind](paths, text_key)
    return Detokenized(source, detokenizer) if detokenizer else source
