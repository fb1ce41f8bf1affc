"""The task "generative" as a whole: its numbers are those of the rows that were written, however they came to be."""
import dataclasses
import functools
import json
import math
from fractions import Fraction

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from softmask_jax import data
from softmask_jax.convert.gpt2 import Checkpoint
from softmask_jax.convert.model import FORMAT
from softmask_jax.evaluate.generative.task import Generative
from softmask_jax.evaluate.task import Stopped
from softmask_jax.models.nn import gpt2
from softmask_jax.samplers import Options
from tests.helpers import generated, tiny_gpt2
from tests.helpers.generated import SEED, settings, work

pytest.importorskip("mauve")
END = 256 + len(tiny_gpt2.MERGES)


@pytest.fixture(scope="module")
def folder():
    return generated.home()[0]


@pytest.fixture(scope="module")
def models(folder):
    return generated.home()[1]


def measured(folder, model, name, *, of="soft", **given):
    return Generative().run(work(folder / name, folder / of, model, folder / "scorer", **given))


@pytest.fixture(scope="module")
def soft(folder, models):
    return measured(folder, models["soft"], "whole")


@pytest.fixture(scope="module")
def rows(folder, soft):
    return [json.loads(line) for line in (folder / "whole" / "samples.jsonl").read_text().splitlines()]


def surprise(folder, texts):
    """Nats of each token that counts, of all texts, and each text's last state: from all logits in float64, text by
    text, the tokens by a tokenizer that knows the end of text."""
    checkpoint = Checkpoint(folder / "scorer")
    params, network = checkpoint.read()[0], jax.jit(functools.partial(gpt2.hidden, checkpoint.config))
    vocabulary = json.loads((folder / "scorer" / "vocab.json").read_text())
    library = Tokenizer.from_str(json.dumps({
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": None, "truncation": None, "padding": None,
        "added_tokens": [{"id": END, "content": "<|endoftext|>", "special": True, "normalized": False, "lstrip": False,
                          "rstrip": False, "single_word": False}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": list(tiny_gpt2.MERGES)},
    }))  # fmt: skip
    nats, states = [], []
    for text in texts:
        ids = np.array(library.encode(text).ids[:32])
        padded = np.full((1, 32), END, np.int32)
        padded[0, : len(ids)] = ids
        hidden = np.asarray(network(params, padded), np.float64)[0, : len(ids)]
        logits = hidden @ np.asarray(gpt2.head(params), np.float64)[: END + 1].T
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        before = 0
        for place, id_ in enumerate(ids):
            if place and (id_ != END or not before):
                nats.append(-log_p[place - 1, id_])
            before += id_ == END
        states.append(hidden[-1])
    return np.array(nats), np.array(states, np.float32)


def test_numbers_are_those_of_the_rows(folder, models, soft, rows):
    nats, states = surprise(folder, [row["text"] for row in rows])
    assert soft.estimates["generative_perplexity"].value == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    entropies = [
        -sum(n / 16 * math.log(n / 16) for n in np.unique(row["tokens"], return_counts=True)[1]) for row in rows
    ]
    assert soft.estimates["entropy"].value == pytest.approx(np.mean(entropies))
    calls, filled = (sum(row[name] for row in rows) for name in ("calls", "filled"))
    assert soft.estimates["tokens_per_call"].value == pytest.approx(filled / calls)
    assert soft.cost["calls"] == calls / 12 and soft.cost["seconds"] > 0
    assert list(soft.estimates) == ["generative_perplexity", "entropy", "mauve", "tokens_per_call"]
    assert soft.details["scored_tokens_per_text"] == pytest.approx(len(nats) / 12)
    assert {estimate.count for estimate in soft.estimates.values()} == {12}


def test_mauve_is_the_librarys_of_windows_in_a_seeded_order(folder, models, soft, rows):
    from mauve import compute_mauve

    split = data.build(models["soft"].config.data).validation
    order = np.random.default_rng(SEED).permutation(len(split))[:12]
    texts = [models["soft"].tokenizer.decode(window) for window in split.gather(order)]
    assert all(text.startswith("<|endoftext|>") and text.endswith("<|endoftext|>") for text in texts)
    nats, people = surprise(folder, texts)
    states = surprise(folder, [row["text"] for row in rows])[1]
    direct = compute_mauve(p_features=people, q_features=states, seed=25, mauve_scaling_factor=5).mauve
    found = soft.estimates["mauve"]
    assert found.value == pytest.approx(direct, rel=1e-6) and found.low is None
    assert soft.details["mauve"]["by_seed"]["25"] == found.value and len(soft.details["mauve"]["by_seed"]) == 3
    assert soft.details["references"]["generative_perplexity"] == pytest.approx(math.exp(nats.mean()), rel=1e-5)
    assert soft.details["references"]["count"] == 12


def test_stopped_anywhere_the_same_command_ends_with_the_same_numbers(folder, models, soft):
    stopped = 0
    while True:
        try:
            found = measured(folder, models["soft"], "stopped", stop_after=2)
            break
        except Stopped:
            stopped += 1
            assert stopped < 20
    assert stopped >= 2
    assert found.estimates == soft.estimates and found.details == soft.details and found.notes == soft.notes


def test_a_finished_work_is_measured_again_without_writing_or_scoring(folder, models, soft):
    before = {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*") if path.is_file()}
    again = measured(folder, models["soft"], "whole")
    assert (again.estimates, again.cost) == (soft.estimates, soft.cost)
    assert {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*") if path.is_file()} == before


def test_references_are_scored_once_for_all_models_and_budgets(folder, models, soft):
    cache = folder / "tokens"
    before = {path: path.stat().st_mtime_ns for path in cache.glob("scores-*/*")}
    assert before
    other = measured(folder, models["binary"], "binary-half", of="binary", budget=Fraction(1, 2))
    assert {path: path.stat().st_mtime_ns for path in cache.glob("scores-*/*")} == before
    assert other.details["references"] == soft.details["references"]
    assert other.estimates["generative_perplexity"] != soft.estimates["generative_perplexity"]
    assert other.cost["calls"] < soft.cost["calls"]


def test_scores_on_a_mesh_are_those_on_one_device(folder, models, soft):
    found = measured(folder, models["soft"], "mesh", devices=4)
    for name in ("generative_perplexity", "mauve"):
        assert found.estimates[name].value == pytest.approx(soft.estimates[name].value, rel=1e-5)
    assert found.estimates["entropy"] == soft.estimates["entropy"]


def test_other_texts_may_stand_for_references(folder, models, soft):
    found = measured(folder, models["soft"], "others", references=f"files:{folder}/texts/*.txt")
    assert found.details["references"] != soft.details["references"]
    assert found.estimates["generative_perplexity"] == soft.estimates["generative_perplexity"]


def test_fewer_references_than_samples_are_told(folder, models):
    (folder / "short").mkdir()
    (folder / "short" / "one.txt").write_text("mask the token " * 8)
    found = measured(folder, models["soft"], "few", references=f"files:{folder}/short/*.txt")
    assert found.details["references"]["count"] == 8
    assert any("against 8 references" in note for note in found.notes)


def test_without_references_there_is_no_mauve_and_all_else(folder, models, soft):
    found = measured(folder, models["soft"], "none", references="none")
    assert list(found.estimates) == ["generative_perplexity", "entropy", "tokens_per_call"]
    assert all(found.estimates[name] == soft.estimates[name] for name in found.estimates)


def test_a_converted_model_needs_references_named(folder, models, tmp_path):
    (folder / "converted").mkdir()
    (folder / "converted" / "config.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(ValueError, match="no validation text.*config.generative.references="):
        measured(folder, models["soft"], "converted-work", of="converted")
    assert not (folder / "converted-work" / "samples.jsonl").exists()


def test_readers_are_told_that_numbers_are_not_the_papers(soft):
    assert any("12 samples of 16 tokens" in note for note in soft.notes)
    assert any("1 layer of width 16" in note and "GPT-2-large" in note for note in soft.notes)


def test_a_number_without_an_interval_says_why(soft):
    without = [name for name, one in soft.estimates.items() if one.low is None]
    assert without == ["mauve"] and any("MAUVE has no interval" in note for note in soft.notes)


def test_nothing_is_paired(folder, models):
    two = [work(folder / "whole", folder / "soft", models["soft"], folder / "scorer") for _ in range(2)]
    assert Generative().compare(*two) == {}


def check(made):
    Generative().check(made, allow_code=False, allow_unsafe_code=False)


def test_good_settings_pass_before_a_model_is_loaded(folder):
    check(settings(folder / "soft", folder / "scorer", budgets="1; 1/2"))
    check(settings(folder / "soft", folder / "scorer", references=f"files:{folder}/texts/*.txt"))


@pytest.mark.parametrize("change, said", [
    ({"samples": {"count": 0}}, "config.samples.count is 0"),
    ({"samples": {"batch_size": -1}}, "config.samples.batch_size is -1"),
    ({"samples": {"length": -2}}, "config.samples.length is -2"),
    ({"batch_size": 0}, "config.generative.batch_size is 0"),
    ({"max_length": 65}, "takes 2 to 64 tokens"),
    ({"max_length": 1}, "takes 2 to 64 tokens"),
    ({"compute_dtype": "float16"}, "Unknown compute_dtype 'float16'"),
    ({"mauve_scaling": 0.0}, "mauve_scaling is 0.0"),
    ({"mauve_buckets": -1}, "mauve_buckets is -1"),
    ({"mauve_buckets": 25}, "more than twice config.samples.count"),
    ({"references": "texts/*.txt"}, "config.generative.references"),
    ({"references": "files:nowhere/*.txt"}, "config.generative.references.*nowhere"),
    ({"references": "files:a.txt; files:b.txt"}, "name one text"),
    ({"references": "a=files:a.txt"}, "name one text"),
    ({"sampler": Options(alg="confidence_threshold"), "budgets": "1; 1/2"}, "leave config.run.budgets at 1"),
])  # fmt: skip
def test_bad_settings_are_one_line_before_a_model_is_loaded(folder, change, said):
    with pytest.raises(ValueError, match=said) as error:
        check(settings(folder / "soft", folder / "scorer", **change))
    assert "\n" not in str(error.value)


def test_a_dream_is_refused_before_a_model_is_loaded(folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model": {"kind": "dream"}, "data": {"source": "chat"}}))
    with pytest.raises(ValueError, match="is a model of conversations, .* leave the task out"):
        check(settings(tmp_path, folder / "scorer"))


def test_a_missing_scorer_says_what_to_download(folder):
    for scorer, kind in (("", ValueError), (folder / "nowhere", FileNotFoundError)):
        made = settings(folder / "soft", folder)
        with pytest.raises(kind, match="download openai-community/gpt2-large"):
            check(dataclasses.replace(made, generative=dataclasses.replace(made.generative, scorer=str(scorer))))
