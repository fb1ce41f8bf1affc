"""Scores of texts: those of the reference, whatever the batch, the padding, the mesh, and however often it was stopped."""
import json
import math

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from softmask_jax.evaluate.generative import scorer as scorers
from softmask_jax.evaluate.generative.scorer import Scorer, open_files
from softmask_jax.evaluate.generative.scores import Scores, counts, score
from softmask_jax.evaluate.task import Estimate, Stopped
from tests.helpers import scored, tiny_gpt2
from tests.helpers.validated import StopAfter, mesh

NAMES = ("nll", "counted", "tokens", "features")
OPTIONS = {"max_length": 24, "batch_size": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return scored.folder(tmp_path_factory.mktemp("scorer") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder):
    return Scorer(str(folder), mesh(1))


@pytest.fixture(scope="module")
def reference():
    return scored.recorded()


@pytest.fixture(scope="module")
def found(scorer, reference, tmp_path_factory):
    return score(scorer, scored.texts(reference), tmp_path_factory.mktemp("scores"), **OPTIONS)


def stop_after(times: int):
    stop = StopAfter(times)

    def check():
        if stop.noted:
            raise Stopped

    return check


def assert_close(ours: Scores, theirs: Scores) -> None:
    for name in NAMES:
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["tiny", "half_sharded"])
def test_every_tokens_surprise_and_the_last_state_are_the_references(tmp_path, name):
    reference = scored.recorded(name)
    nll, features = Scorer(str(scored.folder(tmp_path / name, name)), mesh(1))(reference["tokens"], reference["lengths"])
    for row, length in enumerate(reference["lengths"]):
        np.testing.assert_allclose(nll[row, : length - 1], reference["nll"][row, : length - 1], rtol=0, atol=2e-5)
        np.testing.assert_allclose(features[row], reference["hidden"][row, length - 1], rtol=0, atol=2e-5)


def test_texts_have_the_references_sums_counts_and_features(found, reference):
    rows = np.arange(4)
    np.testing.assert_array_equal(found.counted, reference["counted"].sum(1))
    np.testing.assert_allclose(found.nll, (reference["nll"] * reference["counted"]).sum(1, dtype=np.float64), rtol=2e-6)
    np.testing.assert_allclose(found.features, reference["hidden"][rows, reference["lengths"] - 1], rtol=0, atol=2e-5)
    np.testing.assert_array_equal(found.tokens, reference["lengths"])


def test_generative_perplexity_is_that_of_all_tokens_that_count(found, reference):
    expected = math.exp(reference["nll"][reference["counted"]].astype(np.float64).mean())
    assert found.perplexity().value == pytest.approx(expected, rel=1e-6)
    assert found.perplexity().low < expected < found.perplexity().high


@pytest.mark.parametrize("ids, expected", [
    ([1, 2, 3], [1, 1]),
    ([1, 9, 2, 9, 3, 9], [1, 1, 0, 1, 0]),  # the first EOS counts, the others do not, what is behind them does
    ([9, 1, 9, 2, 9], [1, 0, 1, 0]),  # the first EOS stands where nothing predicts it
    ([9, 9], [0]),
    ([9], []), ([1], []), ([], []),
])  # fmt: skip
def test_which_tokens_count(ids, expected):
    np.testing.assert_array_equal(counts(np.array(ids, np.int32), 9), np.array(expected, bool))


@pytest.mark.parametrize("batch_size, devices", [(1, 1), (4, 1), (3, 4), (2, 2)])
def test_neither_the_batch_nor_the_mesh_changes_a_text(folder, found, reference, tmp_path, batch_size, devices):
    other = Scorer(str(folder), mesh(devices))
    again = score(other, scored.texts(reference), tmp_path, max_length=24, batch_size=batch_size)
    assert_close(again, found)


def test_neither_padding_nor_company_changes_a_text(scorer, reference):
    nll, features = scorer(reference["tokens"], reference["lengths"])
    for row, length in enumerate(reference["lengths"]):
        if length > 1:
            alone = scorer(reference["tokens"][row : row + 1, :length], reference["lengths"][row : row + 1])
            np.testing.assert_allclose(alone[0][0], nll[row, : length - 1], rtol=0, atol=1e-5)
            np.testing.assert_allclose(alone[1][0], features[row], rtol=0, atol=1e-5)


def test_texts_are_cut_at_the_greatest_length(scorer, found, reference, tmp_path):
    cut = score(scorer, scored.texts(reference), tmp_path, max_length=10, batch_size=2)
    np.testing.assert_array_equal(cut.tokens, np.minimum(reference["lengths"], 10))
    counted = reference["counted"][:, :9]
    np.testing.assert_allclose(cut.nll, (reference["nll"][:, :9] * counted).sum(1), rtol=2e-6)
    assert np.abs(cut.features[0] - found.features[0]).max() > 0.1


def test_a_stopped_scoring_goes_on_with_the_same_numbers(scorer, reference, tmp_path):
    calls, stopped, again = [], 0, None
    options = OPTIONS | {"batch_size": 1}
    while again is None:
        try:
            # One batch, then a signal.
            again = score(
                Counting(scorer, calls), scored.texts(reference), tmp_path / "stopped", check_stop=stop_after(1), **options
            )  # fmt: skip
        except Stopped:
            stopped += 1
    assert (stopped, len(calls)) == (3, 4)
    whole = score(scorer, scored.texts(reference), tmp_path / "whole", **options)
    for name in (*NAMES, "key"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))


class Counting:
    """A scorer that counts its calls."""

    def __init__(self, scorer, calls):
        self._scorer, self._calls = scorer, calls

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def __call__(self, *given):
        self._calls.append(1)
        return self._scorer(*given)


def test_what_is_scored_is_kept_and_what_is_damaged_is_scored_again(scorer, found, reference, tmp_path):
    calls = []
    counting = Counting(scorer, calls)
    for expected in (2, 0):
        calls.clear()
        assert_close(score(counting, scored.texts(reference), tmp_path, **OPTIONS), found)
        assert len(calls) == expected
    first = sorted(tmp_path.glob("*/*.npz"))[0]
    first.write_bytes(first.read_bytes()[:100])
    calls.clear()
    assert_close(score(counting, scored.texts(reference), tmp_path, **OPTIONS), found)
    assert len(calls) == 1


def test_other_texts_are_not_taken_for_those_that_were_scored(scorer, reference, tmp_path):
    texts = scored.texts(reference)
    before = score(scorer, texts, tmp_path, **OPTIONS)
    after = score(scorer, ["t1 t2", *texts[1:]], tmp_path, **OPTIONS)
    assert after.nll[0] != before.nll[0]
    np.testing.assert_array_equal(after.nll[1:], before.nll[1:])


def test_an_empty_text_has_no_feature_and_no_token(scorer, reference, found, tmp_path):
    some = score(scorer, ["", *scored.texts(reference)], tmp_path, **OPTIONS)
    np.testing.assert_array_equal(some.written, [False, True, True, True, True])
    np.testing.assert_allclose(some.nll[1:], found.nll, rtol=1e-6)
    assert some.nll[0] == 0 and not some.features[0].any()
    with pytest.raises(ValueError, match="nothing to score"):
        score(scorer, ["", "t1"], tmp_path, **OPTIONS).perplexity()


def test_numbers_that_are_not_finite_are_an_error(scorer, reference, tmp_path):
    class Broken(Counting):
        def __call__(self, *given):
            nll, features = super().__call__(*given)
            return nll, features * np.nan

    with pytest.raises(ValueError, match="NaN or infinite"):
        score(Broken(scorer, []), scored.texts(reference), tmp_path, **OPTIONS)


def test_the_interval_of_a_ratio_covers_it_at_its_rate():
    random, covered = np.random.default_rng(0), 0
    for _ in range(400):
        lengths = random.integers(5, 60, 80)
        sums = lengths * 3.0 + random.normal(0, 5, 80) * np.sqrt(lengths)
        found = Estimate.of_ratio(sums, lengths)
        covered += found.low <= 3.0 <= found.high
    assert 0.92 < covered / 400 < 0.98
    assert Estimate.of_ratio([6.0], [2]) == Estimate(3.0, count=1)


def test_retokenized_texts_are_those_of_a_tokenizer_that_knows_the_end(tmp_path):
    made = Scorer(str(tiny_gpt2.write(tmp_path / "gpt2")), mesh(1))
    library = Tokenizer(models.BPE.from_file(*(str(tmp_path / "gpt2" / name) for name in ("vocab.json", "merges.txt"))))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.enable_truncation(12)
    end = "<|endoftext|>"
    texts = [f"{end}the mask token{end} the end{end}", "the mask", f"{end}{end}", "", f" {end} the\n{end}é \ufffd"]
    texts.append("token " * 9)
    expected = [encoding.ids for encoding in library.encode_batch(texts)]
    assert [ids.tolist() for ids in made.retokenized(texts, 12)] == expected
    assert max(map(len, expected)) == 12


def test_a_scorer_that_is_not_there_says_what_to_download(tmp_path):
    cases = {"": "needs a scorer", str(tmp_path / "none"): "there is no folder", str(tmp_path): "config.json"}
    for spec, said in cases.items():
        with pytest.raises((ValueError, OSError)) as error:
            open_files(spec)
        for part in (said, "download openai-community/gpt2-large", "config.generative.scorer"):
            assert part in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "vocab.json"])
def test_a_scorer_that_lacks_files_says_what_to_download(tmp_path, missing):
    (tiny_gpt2.write(tmp_path / "gpt2") / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"{missing}.*download openai-community/gpt2-large"):
        open_files(str(tmp_path / "gpt2"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    folder = tiny_gpt2.write(tmp_path / "gpt2")
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"<|endoftext|>": len(vocabulary)}))
    with pytest.raises(ValueError, match="give files of one model"):
        open_files(str(folder))


def test_a_scorer_on_the_hub_is_downloaded_and_its_errors_name_the_setting(tmp_path, monkeypatch):
    folder = tiny_gpt2.write(tmp_path / "gpt2")
    monkeypatch.setattr(scorers.hub, "download", lambda spec: {"hf://a/b": folder}[spec])
    assert open_files("hf://a/b")[0].config.hidden_size == 16

    def refuse(spec):
        raise OSError(f"--src={spec} cannot be downloaded (no network); check the name.")

    monkeypatch.setattr(scorers.hub, "download", refuse)
    with pytest.raises(OSError, match="^config.generative.scorer=hf://a/b cannot be downloaded"):
        open_files("hf://a/b")


def test_bfloat16_scores_stay_near_float32(folder, found, reference, tmp_path):
    half = score(Scorer(str(folder), mesh(1), "bfloat16"), scored.texts(reference), tmp_path, **OPTIONS)
    assert half.perplexity().value == pytest.approx(found.perplexity().value, rel=0.05)
    assert half.perplexity().value != found.perplexity().value
