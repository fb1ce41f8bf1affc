"""The same texts in every kind of file that a source reads, and a look at one-line errors."""
import gzip
import json
from pathlib import Path

import pytest

from softmask_jax.data.sources import Source, make_source

TEXTS = ["one", "two\nlines\r\n", "é € 𝄞", "", " ", 'quotes " and \\', "x" * 5000, *map(str, range(40))]
SEPARATOR = "<|end|>"


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 500
    return message


def json_rows(texts: list[str], ascii_only: bool = False) -> bytes:
    rows = [json.dumps({"id": number, "text": text}, ensure_ascii=ascii_only) for number, text in enumerate(texts)]
    return "".join(row + "\n" for row in rows).encode()


def build_tfds(folder: Path, texts: list, file_format: str = "array_record", name: str = "tiny_texts"):
    """A data set of two splits in `folder`, written by TFDS in the order of `texts`."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager):
            return {"train": self._generate_examples(texts), "test": self._generate_examples(texts[:3])}

        def _generate_examples(self, chosen):
            for number, text in enumerate(chosen):
                yield number, {"text": text, "label": str(number)}

    Builder.name = name
    builder = Builder(data_dir=folder, file_format=file_format)
    builder.download_and_prepare()
    return builder


def save_texts(folder: Path, texts: list[str]) -> dict[str, Source]:
    """Writes `texts` in every form; the sources that read them back."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    rows = json_rows(texts)
    (folder / "plain.txt").write_bytes(SEPARATOR.join(texts).encode())
    (folder / "rows.jsonl").write_bytes(rows)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(rows))
    (folder / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(rows))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "rows.parquet", row_group_size=7)
    built = build_tfds(folder / "tfds", texts)
    return {
        "files": make_source("files", f"{folder}/plain.txt", separator=SEPARATOR),
        "jsonl": make_source("jsonl", f"{folder}/rows.jsonl"),
        "jsonl.gz": make_source("jsonl", f"{folder}/rows.jsonl.gz"),
        "jsonl.zst": make_source("jsonl", f"{folder}/rows.jsonl.zst"),
        "parquet": make_source("parquet", f"{folder}/rows.parquet"),
        "tfds": make_source("tfds", f"{built.data_path}:train"),
    }
