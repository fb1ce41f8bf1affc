"""Mixtures: each corpus as often as its weight says, the same on any number of hosts, in the same place of no batch."""
from collections import Counter

import numpy as np
import pytest

from softmask_jax.config import Texts
from softmask_jax.data import Mixture, Windows, batches, build, validation_batches


def numbered(count: int, first: int) -> Windows:
    """Windows of one id, each its own number."""
    return Windows(np.arange(first, first + count, dtype=np.uint16), 3, 9998, 9999, "train")


@pytest.fixture(scope="module")
def mixture():
    return Mixture([numbered(30, 0), numbered(1000, 100), numbered(7, 5000)], [3.0, 6.0, 1.0])


def take(windows, steps, **options):
    with batches(windows, **{"global_batch_size": 20, "seed": 4} | options) as iterator:
        return [next(iterator) for _ in range(steps)]


def corpus_of(ids):
    return np.searchsorted([100, 5000], ids, side="right")


def test_a_mixture_numbers_its_windows_one_corpus_behind_the_other(mixture):
    assert len(mixture) == 1037 and mixture.num_tokens == 1037
    ids = mixture.gather(np.array([1036, 0, 30, 29, 1029, 1030]))[:, 1]
    assert ids.tolist() == [5006, 0, 100, 29, 1099, 5000] and mixture.gather([31])[0, 1] == 101
    validated = np.concatenate([batch["tokens"][batch["valid"], 1] for batch in validation_batches(mixture, global_batch_size=50)])
    assert len(set(validated.tolist())) == 1037


def test_every_batch_has_its_share_of_each_corpus_and_small_ones_are_repeated_evenly(mixture):
    taken = take(mixture, 60)
    for batch in taken:
        assert Counter(corpus_of(batch["tokens"][:, 1]).tolist()) == {0: 6, 1: 12, 2: 2}
    counts = Counter(id for batch in taken for id in batch["tokens"][:, 1].tolist())
    assert {counts[id] for id in range(30)} == {12}  # 360 draws of 30 windows: twelve epochs
    assert {counts[5000 + id] for id in range(7)} <= {17, 18}
    assert {count for id, count in counts.items() if 100 <= id < 5000} == {1}  # 720 draws of 1,000


def test_no_corpus_has_its_fixed_rows(mixture):
    places = [set() for _ in range(20)]
    for batch in take(mixture, 60):
        for row, corpus in zip(batch["rows"], corpus_of(batch["tokens"][:, 1]), strict=True):
            places[row].add(int(corpus))
    assert all({0, 1} <= place for place in places) and sum(2 in place for place in places) > 15


@pytest.mark.parametrize("hosts", [2, 4])
def test_any_number_of_hosts_reads_the_same_mixture_and_a_resume_continues_it(mixture, hosts):
    alone = take(mixture, 12)
    shares = [take(mixture, 8, start_step=4, host_index=host, host_count=hosts) for host in range(hosts)]
    for step in range(8):
        tokens = np.concatenate([share[step]["tokens"] for share in shares])
        rows = np.concatenate([share[step]["rows"] for share in shares])
        np.testing.assert_array_equal(tokens[np.argsort(rows)], alone[4 + step]["tokens"])


def test_weights_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, not 1.0, 0.0"):
        Mixture([numbered(9, 0), numbered(9, 20)], [1.0, 0.0])


@pytest.fixture
def config(tmp_path):
    for name, letter in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number:02}.txt").write_text(f"{number} " + letter * (number + 20))
    paths = f"3 files:{tmp_path}/a/*.txt; 1 files:{tmp_path}/b/*.txt"
    return Texts(
        source="mixture", paths=paths, seq_len=16, validation_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def test_a_config_describes_a_mixture(config, tmp_path):
    built = build(config)
    alone = [build(config, source="files", paths=f"{tmp_path}/{name}/*.txt") for name in "ab"]
    for split in ("train", "validation"):
        together = [getattr(part, split) for part in alone]
        mixed = getattr(built, split)
        expected = np.concatenate([part.gather(np.arange(len(part))) for part in together])
        np.testing.assert_array_equal(mixed.gather(np.arange(len(mixed))), expected)
        assert built.info[f"{split}_documents"] == sum(part.info[f"{split}_documents"] for part in alone)
    assert built.train.weights == (0.75, 0.25)


def test_other_weights_are_another_fingerprint(config):
    assert build(config).info["fingerprint"] != build(config, paths=config.paths.replace("3 f", "2 f")).info["fingerprint"]


def test_a_bpe_of_a_mixture_learns_from_all_of_it(config):
    tokenizer = build(config, tokenizer="bpe", bpe_vocab_size=270).tokenizer
    assert len(tokenizer.encode("xxxx")) < 4 and len(tokenizer.encode("yyyy")) < 4


@pytest.mark.parametrize("paths, said", [
    ("stdlib", "not of the form"), ("x stdlib", "not of the form"), ("-1 stdlib", "positive weight"),
    ("nan stdlib", "not of the form"), ("1 mixture:1 stdlib", "not of the form"), (" ; ", "needs data.paths"),
    ("1 web:a", "'web' is unknown"),
])
def test_a_mixture_that_cannot_be_is_one_line(config, paths, said):
    with pytest.raises(ValueError, match=said) as error:
        build(config, paths=paths)
    assert "\n" not in str(error.value)
