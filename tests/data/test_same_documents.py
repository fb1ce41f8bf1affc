"""One set of documents, however it is stored: the same windows, batches and fingerprint."""
import numpy as np
import pytest

from softmask_jax.config import Texts
from softmask_jax.data import batches, build
from softmask_jax.data.prepare import prepare
from tests.helpers.source_files import SEPARATOR, save_texts

KINDS = ("files", "jsonl", "parquet", "tfds", "shards")


def texts(count: int) -> list[str]:
    random = np.random.default_rng(5)
    words = "mask λ token\nstep soft «hard» 面 blend".split(" ")
    return [f"{number} {' '.join(random.choice(words, random.integers(3, 60)))}" for number in range(count)]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The config of each kind."""
    folder, documents = tmp_path_factory.mktemp("stored"), texts(300)
    common = dict(
        tokenizer="bytes", seq_len=32, validation_rule="last", validation_documents=25, cache_dir=str(folder / "cache")
    )
    save_texts(folder, documents)
    places = {
        "files": "plain.txt", "jsonl": "rows.jsonl", "parquet": "rows.parquet", "tfds": "tfds/tiny_texts/1.0.0:train"
    }  # fmt: skip
    found = {
        kind: Texts(source=kind, paths=f"{folder}/{place}", separator=SEPARATOR, **common)
        for kind, place in places.items()
    }
    prepare(found["jsonl"], str(folder / "prepared"), workers=1)
    found["shards"] = Texts(
        source="shards", paths=str(folder / "prepared"), **common | {"tokenizer": "shards"}
    )
    return {kind: build(config) for kind, config in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_store_of_the_same_documents_gives_the_same_corpus(stored, kind):
    expected, found = stored["files"], stored[kind]
    assert found.info["fingerprint"] == expected.info["fingerprint"]
    assert found.info["train_documents"] == 275 and found.info["validation_documents"] == 25
    for split in ("train", "validation"):
        one, two = getattr(expected, split), getattr(found, split)
        np.testing.assert_array_equal(one.gather(np.arange(len(one))), two.gather(np.arange(len(two))))


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_readers_of_any_store_sees_the_same_examples_in_each_step(stored, kind, readers):
    def global_batches(windows, hosts, steps=5):
        found = []
        shares = [
            batches(windows, global_batch_size=8, seed=3, start_step=2, host_index=host, host_count=hosts)
            for host in range(hosts)
        ]
        for _ in range(steps):
            parts = [next(share) for share in shares]
            rows = np.concatenate([part["rows"] for part in parts])
            found.append(np.concatenate([part["tokens"] for part in parts])[np.argsort(rows)])
        for share in shares:
            share.close()
        return np.stack(found)

    np.testing.assert_array_equal(
        global_batches(stored[kind].train, readers), global_batches(stored["files"].train, 1)
    )
