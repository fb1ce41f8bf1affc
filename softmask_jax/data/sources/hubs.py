"""Text in data sets that TFDS or Hugging Face's `datasets` keep on disk, read by row."""
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from softmask_jax.data.sources.documents import BadRow, Document, Source
from softmask_jax.data.sources.listing import fingerprint, listed, required
from softmask_jax.data.sources.records import checked, no_column, no_text_column, text_or_bad
from softmask_jax.io.files import one_line, split_paths

PART_ROWS = 10_000
# Rows are fetched by the batch: one at a time is ten times slower.
BATCH_ROWS = 500
# Split at the last colon outside of brackets: `wiki40b/en:1.3.0:train[:10%]`.
NAME_AND_SPLIT = re.compile(r"(.+):((?:[^:/\[\]]|\[[^\]]*\])+)")


class _Rows(Source):
    """Base of the sources here: `length` rows of `title`, read through `open`."""

    def num_parts(self) -> int:
        return -(-self.length // PART_ROWS)

    def identity(self) -> str:
        return fingerprint(self, PART_ROWS)

    def read(self, part: int) -> Iterator[Document | BadRow]:
        return checked(self._rows(part * PART_ROWS), self.title, self.num_parts() == 1)

    def _rows(self, first: int) -> Iterator[Document | BadRow]:
        texts = _opened(self)
        end = min(first + PART_ROWS, self.length)
        for start in range(first, end, BATCH_ROWS):
            for row, value in enumerate(texts(range(start, min(start + BATCH_ROWS, end))), start):
                yield text_or_bad(f"{self.title}#{row}", value, self.text_key)


# A process reads many parts of a source in turn; opening takes longer than reading.
@lru_cache(maxsize=4)
def _opened(source: _Rows):
    """A function from a range of rows to their texts. Raises ValueError when the number of rows has changed."""
    rows, texts = source.open()
    if len(rows) != source.length:
        raise ValueError(f"{source.title}: has {len(rows)} rows, {source.length} when it was listed; start again")
    return texts


def _check(title: str, length: int, text_key: str, columns: Iterable[str], first) -> None:
    if not length:
        raise ValueError(f"{title}: holds no row; choose another split")
    if text_key not in (columns := list(columns)):
        raise ValueError(no_column(title, text_key, columns))
    if not isinstance(value := first(), str | bytes | None):
        raise ValueError(no_text_column(title, text_key, f"{type(value).__name__}, not text"))


def _name_and_split(paths: str | Iterable[str], kind: str, example: str, alone=lambda title: False) -> tuple[str, ...]:
    """Title, name and split ("" for a title that is complete `alone`) of `NAME:SPLIT`. Raises ValueError."""
    paths = [paths] if isinstance(paths, str) else list(paths)
    if len(paths) != 1 or len(split_paths(paths[0], ",")) != 1:
        form = f"one NAME:SPLIT in data.paths, such as {example}"
        raise ValueError(f"data.source={kind} needs {form}; for several use data.source=mixture")
    title = paths[0].strip()
    if alone(title):
        return title, title, ""
    if not (match := NAME_AND_SPLIT.fullmatch(title)):
        raise ValueError(f"data.paths: {title!r} names no split; write NAME:SPLIT, such as {example}")
    return title, match[1], match[2]


@dataclass(frozen=True)
class Tfds(_Rows):
    """A split of a data set built by TFDS in `folder`, in a format readable by row; no TensorFlow."""

    title: str
    folder: str
    split: str
    length: int
    stamp: str
    text_key: str = "text"
    name: str = "tfds"

    def open(self) -> tuple[Sequence, object]:
        import tensorflow_datasets

        rows = tensorflow_datasets.builder_from_directory(self.folder).as_data_source(self.split)
        return rows, lambda numbers: [row[self.text_key] for row in rows.__getitems__(list(numbers))]


def tfds(paths: str | Iterable[str], text_key: str = "text") -> Tfds:
    """`NAME:SPLIT`; NAME is built in $TFDS_DATA_DIR (`lm1b`, `wiki40b/en:1.3.0`) or is the folder of a version.
    Downloads nothing. ImportError, FileNotFoundError with the command that builds the data set, or ValueError."""
    tensorflow_datasets = required("tensorflow_datasets", "tfds", "data.source=tfds")
    title, name, split = _name_and_split(paths, "tfds", "lm1b:train")
    root = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    build = f"tfds.builder('{name}', file_format='array_record').download_and_prepare()"
    command = f'python -c "import tensorflow_datasets as tfds; {build}"'
    try:
        if "://" in name or Path(os.path.expanduser(name)).is_dir():
            root = os.path.expanduser(name)
            builder = tensorflow_datasets.builder_from_directory(root)
        else:
            builder = tensorflow_datasets.builder(name, data_dir=root)
        if not (builder.data_path / "dataset_info.json").exists():
            raise FileNotFoundError("only its recipe is known")
    except Exception as error:  # TFDS raises errors of many kinds, even assertions
        state = f"is not built in {root} ({one_line(error)})"
        raise FileNotFoundError(f"data.paths: {name!r} {state}; build it with: {command}") from error
    try:
        rows = builder.as_data_source(split) if builder.info.splits[split].num_examples else ()
    except NotImplementedError as error:
        stored = f"is stored as {builder.info.file_format.name.lower()}, which has no rows by number"
        remedy = f"build it in another $TFDS_DATA_DIR with: {command}"
        raise ValueError(f"data.paths: {name!r} {stored}; {remedy}") from error
    except Exception as error:
        raise ValueError(f"data.paths: {title!r}: {one_line(error)}") from error
    _check(title, len(rows), text_key, builder.info.features or (), lambda: rows[0][text_key])
    stamp = fingerprint(builder.info.full_name, [(s.name, s.num_examples) for s in builder.info.splits.values()])
    return Tfds(title, str(builder.data_path), split, len(rows), stamp, text_key)


@dataclass(frozen=True)
class HuggingFace(_Rows):
    """A split of a data set of the Hub, or one that `save_to_disk` wrote to a folder; Arrow files mapped from disk."""

    title: str
    location: str
    split: str
    length: int
    stamp: str
    text_key: str = "text"
    name: str = "hf"

    def open(self) -> tuple[Sequence, object]:
        rows = _load(self.title, self.location, self.split).select_columns([self.text_key])
        return rows, lambda numbers: rows[numbers.start : numbers.stop][self.text_key]


def _is_saved(location: str) -> bool:
    return any((Path(os.path.expanduser(location)) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load(title: str, location: str, split: str):
    from datasets import load_dataset, load_from_disk

    saved = _is_saved(location)
    try:
        if not saved:
            owner, name, config = re.fullmatch(r"([^/]+/)?([^/]+)/?(.*)", location).groups()
            return load_dataset((owner or "") + name, config or None, split=split)
        rows = load_from_disk(os.path.expanduser(location))
    except Exception as error:  # of the network, the Hub, its client or Arrow
        kind = OSError if isinstance(error, OSError) else ValueError
        hint = "" if saved else "; check the name, the network and, for private data, HF_TOKEN"
        raise kind(f"data.paths: {title!r} cannot be loaded ({one_line(error)}){hint}") from error
    if not isinstance(rows, dict):
        if split:
            raise ValueError(f"data.paths: {location!r} holds one split; leave ':{split}' away")
        return rows
    if split not in rows:
        raise ValueError(f"data.paths: write {location}:SPLIT with one of its splits: {', '.join(rows)}")
    return rows[split]


def open_hugging_face(paths: str | Iterable[str]) -> tuple[str, str, str, Sequence]:
    """Title, location, split ("": the only one) and rows of `OWNER/NAME[/CONFIG]:SPLIT`, or of a folder.
    Never runs a data set's code. Raises ImportError, OSError, or ValueError for unknown names."""
    if not hasattr(required("datasets", "hf", "data.source=hf"), "load_dataset"):
        raise ImportError("a folder called datasets hides the package; run from another folder")
    title, location, split = _name_and_split(paths, "hf", "Skylion007/openwebtext:train", alone=_is_saved)
    return title, location, split, _load(title, location, split)


def hugging_face_stamp(location: str, rows) -> str:
    """A stamp that changes with the rows of `open_hugging_face`."""
    if _is_saved(location):
        files = sorted(path for path in Path(os.path.expanduser(location)).rglob("*") if path.is_file())
        return fingerprint([listed(path.as_posix(), path) for path in files])
    return fingerprint(str(rows.info.version), rows.info.download_checksums)


def hugging_face(paths: str | Iterable[str], text_key: str = "text") -> HuggingFace:
    """A split, such as `train` or `train[:1%]`, as `open_hugging_face` names it; downloaded once."""
    title, location, split, rows = open_hugging_face(paths)
    _check(title, len(rows), text_key, rows.column_names, lambda: rows.select_columns([text_key])[:1][text_key][0])
    return HuggingFace(title, location, split, len(rows), hugging_face_stamp(location, rows), text_key)
