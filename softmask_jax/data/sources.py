"""Every source of text by its name: `make_source`.

A source is anything that `documents.Source` describes. Sources read lazily and keep nothing, so that a corpus may be
larger than memory; they can be pickled, so that several processes may read the parts of one.
"""
from collections.abc import Iterable

from softmask_jax.data.documents import BadRow, Document, Source
from softmask_jax.data.text_files import FileSource, local_files, stdlib

__all__ = ["BadRow", "Document", "FileSource", "Source", "make_source"]


def make_source(
    kind: str,
    paths: str | Iterable[str] = "",
    *,
    separator: str = "",
    text_key: str = "text",
    detokenizer: str = "",
) -> Source:
    """The source named `kind`: stdlib or files. Raises ValueError for any other."""
    if kind == "stdlib":
        return stdlib()
    if kind == "files":
        return local_files(paths, separator)
    raise ValueError(f"data.source={kind!r} is unknown; choose stdlib or files")
