"""First sentences of pages: numbers with intervals, on what they were taken, and no claim that the interval does not bear."""
import pytest

from softmask_jax.io import run_log
from softmask_jax.report import verdict
from softmask_jax.report.scored import taken_on
from tests.helpers import crafted_run


@pytest.mark.parametrize("nats, said", [
    ((-0.0131, -0.0169, -0.0091), "1.3 % lower perplexity on the same masks [0.9, 1.7]"),
    ((0.02, 0.01, 0.03), "2.0 % higher perplexity on the same masks [1.0, 3.0]"),
    ((-0.001, -0.004, 0.002), "no measurable difference in perplexity on the same masks: -0.1 % [-0.4, +0.2]"),
    ((-0.0131, None, None), "1.3 % lower perplexity on the same masks (no interval)"),
    ((0.0, 0.0, 0.0), "no measurable difference in perplexity on the same masks: +0.0 % [+0.0, +0.0]"),
    ((-0.0002, -0.0003, -0.0001), "0.02 % lower perplexity on the same masks [0.01, 0.03]"),
    ((1e9, 1e8, 1e10), "inf % higher perplexity on the same masks [inf, inf]"),
])  # fmt: skip
def test_a_difference_of_nats_is_a_sentence_that_its_interval_bears(nats, said):
    assert verdict.relative(nats) == said


def sentences(path, row: dict) -> tuple[str, str]:
    return verdict.of_run(run_log.read(path), row)


def test_a_run_opens_with_the_gain_or_with_its_perplexity_or_with_its_loss(tmp_path):
    soft, binary = crafted_run.write(tmp_path / "soft"), crafted_run.write(tmp_path / "binary", soft=False)
    on = {"windows": 96, "windows_in_split": 2607}
    large, small = sentences(soft, crafted_run.scores(2.5, 0.05) | on)
    assert large == "With soft-masking 4.9 % lower perplexity on the same masks [3.9, 5.8]."
    assert small == ("Perplexity 11.59 with soft masks, 12.18 with plain ones. Taken on 96 of 2,607 windows, each masked once. "
                     "In brackets: 95 % intervals over windows.")  # fmt: skip
    large, _ = sentences(binary, crafted_run.scores(2.5, None) | on)
    assert large == "Perplexity per token 12.18 [11.02, 13.46] with plain masks."
    losses = {"loss": 1.5, "loss_low": 1.25, "loss_high": 1.75, "conversations": 30, "conversations_in_split": 30}
    large, small = sentences(soft, losses)
    assert large == "Validation loss 1.5000 [1.2500, 1.7500]." and small.startswith("Taken on all 30 conversations")
    large, _ = sentences(soft, losses | {"gain/loss": -0.02, "gain/loss_low": -0.03, "gain/loss_high": -0.01})
    assert large == "With soft-masking 0.0200 nats higher validation loss on the same masks [0.0100, 0.0300]."


def test_without_a_score_there_is_no_verdict(tmp_path):
    assert sentences(crafted_run.write(tmp_path / "run"), {}) == ("", "")


def test_a_row_of_an_older_version_does_not_say_what_it_was_taken_on():
    assert taken_on({"one_pass/nelbo": 2.0}) == ""
