"""Every source of text by its name: `make_source`.

A source is anything that `documents.Source` describes. Sources read lazily and keep nothing, so that a corpus may be
larger than memory; they can be pickled, so that several processes may read the parts of one.
"""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from softmask_jax.data.shards.records import json_lines, parquet
from softmask_jax.data.sources.detokenizers import find_detokenizer
from softmask_jax.data.sources.documents import AllParts, BadRow, Document, Source
from softmask_jax.data.sources.hubs import hugging_face, tfds
from softmask_jax.data.sources.listing import fingerprint
from softmask_jax.data.sources.text_files import FileSource, local_files, stdlib

__all__ = ["BadRow", "Document", "FileSource", "Source", "make_source"]

# What each kind is made of: paths, separator, text_key.
KINDS = {
    "stdlib": lambda paths, separator, text_key: _without_paths(paths),
    "files": lambda paths, separator, text_key: local_files(paths, separator),
    "jsonl": lambda paths, separator, text_key: json_lines(paths, text_key),
    "parquet": lambda paths, separator, text_key: parquet(paths, text_key),
    "tfds": lambda paths, separator, text_key: tfds(paths, text_key),
    "hf": lambda paths, separator, text_key: hugging_face(paths, text_key),
}


def _without_paths(paths: str | Iterable[str]) -> FileSource:
    if paths:
        raise ValueError("data.source=stdlib reads no data.paths; name what they are, such as data.source=files")
    return stdlib()


@dataclass(frozen=True)
class Detokenized(AllParts):
    """`source` with the detokenizer of that name applied to each text."""

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
    kind: str,
    paths: str | Iterable[str] = "",
    *,
    separator: str = "",
    text_key: str = "text",
    detokenizer: str = "",
) -> Source:
    """The source named `kind`. `separator` is for files, `text_key` for rows, `detokenizer` ("": none) for every kind.

    Raises ValueError, ImportError or OSError, each one line that says what is missing: a package, a file, a column,
    the network.
    """
    if kind not in KINDS:
        raise ValueError(f"data.source={kind!r} is unknown; choose one of {', '.join(KINDS)}")
    if detokenizer:
        find_detokenizer(detokenizer)
    source = KINDS[kind](paths, separator, text_key)
    return Detokenized(source, detokenizer) if detokenizer else source
