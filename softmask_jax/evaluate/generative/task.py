"""The task "generative": quality of texts that a model writes from masks alone.

Generative perplexity by a causal model (GPT-2-large in the paper), entropy of a text's own tokens in nats, which shows
the repetition that perplexity rewards, and MAUVE against human texts. As in the soft-masking reference
(`language/main.py`, `sample_eval`, on top of `s-sahoo/duo`) texts are decoded with their `<|endoftext|>` and retokenized
by the scorer, at most 1,024 tokens each. One difference: the reference's `transformers` removed spaces before punctuation
when it decoded; here texts stay unchanged.
"""
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from softmask_jax.data.shards.cache import ENVIRONMENT_VARIABLE, cache_folder
from softmask_jax.evaluate.generative import mauve_score, references, samples, scores
from softmask_jax.evaluate.generative.samples import Samples
from softmask_jax.evaluate.generative.scorer import Scorer, open_files
from softmask_jax.evaluate.generative.scores import Scores
from softmask_jax.evaluate.models import checkpoints
from softmask_jax.evaluate.perplexity.conversations import is_dream
from softmask_jax.evaluate.perplexity.text_sets import Text
from softmask_jax.evaluate.pieces import complete, pieces
from softmask_jax.evaluate.settings import Settings, budgets, check_least
from softmask_jax.evaluate.task import Estimate, Result, Work
from softmask_jax.io.answers import count as counted

# What the paper's numbers are of.
PAPER_COUNT, PAPER_LENGTH = 5_000, 1_024
GPT2_LARGE = (1_280, 36)
# MAUVE by clusterings from so many seeds, the settings' own first.
SEEDS = 3
NO_INTERVAL = (
    "MAUVE has no interval: texts that are drawn again, as for a bootstrap, look further from the references than they are. "
    "What it is by other clusterings stands in results.json (details.mauve.by_seed)."
)


@dataclasses.dataclass(frozen=True)
class Generative:
    """See `task.Task`."""

    name = "generative"
    sections = ("samples", "sampler", "generative")
    sweeps = True

    def check(self, settings: Settings, *, allow_code: bool, allow_unsafe_code: bool) -> None:
        given = settings.generative
        for one in checkpoints(settings.models):
            if is_dream(one.path):
                raise ValueError(
                    f"generative: {one.path} is a Dream, which was trained to answer and cannot write from masks alone; "
                    "evaluate an MDLM, or leave the task out."
                )
        check_least(settings, "samples", count=1, batch_size=1, length=0)
        check_least(settings, "generative", batch_size=1, mauve_buckets=0)
        if not given.mauve_scaling > 0:
            raise ValueError(f"config.generative.mauve_scaling is {given.mauve_scaling}; it must be above 0.")
        for budget in budgets(settings.run.budgets):
            samples.budgeted(settings.sampler, settings.samples.length or PAPER_LENGTH, budget)
        if given.references != references.NONE:
            mauve_score.check_installed()
        if given.mauve_buckets > 2 * settings.samples.count:
            raise ValueError(
                f"config.generative.mauve_buckets is {given.mauve_buckets}, more than twice config.samples.count."
            )
        references.source_of(given)
        checkpoint, _ = open_files(given.scorer, given.compute_dtype)
        if not 2 <= given.max_length <= checkpoint.config.max_positions:
            raise ValueError(
                f"config.generative.max_length is {given.max_length}; the scorer takes 2 to "
                f"{checkpoint.config.max_positions} tokens."
            )

    def run(self, work: Work) -> Result:
        """Write, score, compare; each goes on where it was stopped.

        Scores of references lie in the cache of tokens, where all models and budgets share them.

        Raises:
          ValueError: a model that cannot write, references that are not here, numbers that are not finite. Stopped.
        """
        samples.check_model(work.model)
        given = work.settings.generative
        # Opened first: hours of sampling should not end in a missing file.
        text = references.open_text(work)
        written = samples.write(work)
        work.check_stop()
        scorer = Scorer(given.scorer, work.mesh, given.compute_dtype)
        found = _scored(work, scorer, written.texts, work.folder)
        estimates = {
            "generative_perplexity": found.perplexity(), "entropy": Estimate.of_mean(written.entropies, unit="nats")
        }  # fmt: skip
        details, notes = _details(found, scorer), list(_notes(written, found, scorer))
        if text is not None:
            estimates["mauve"], more, said = _against_people(work, scorer, written, found, text)
            details, notes = details | more, notes + said
        estimates["tokens_per_call"] = Estimate.of_ratio(written.filled, written.calls, better="higher")
        # The median: batches that were compiled for are left out, once there are more than two.
        cost = {"calls": float(written.calls.mean()), "seconds": float(np.median(written.seconds))}
        return Result(estimates, cost, details, tuple(notes))

    def compare(self, baseline: Work, other: Work) -> dict[str, Estimate]:
        """Nothing: texts of two models have no common rows to pair."""
        return {}


def _details(found: Scores, scorer: Scorer) -> dict:
    return {
        "scored_tokens_per_text": float(found.counted.mean()),
        "scorer": {
            "hidden_size": scorer.config.hidden_size, "num_layers": scorer.config.num_layers,
            "vocab_size": scorer.config.vocab_size, "fingerprint": scorer.fingerprint,
        },
    }  # fmt: skip


def _scored(work: Work, scorer: Scorer, texts: list[str], folder: Path, **more) -> Scores:
    given = work.settings.generative
    return scores.score(
        scorer, texts, folder, max_length=given.max_length, batch_size=given.batch_size, check_stop=work.check_stop, **more
    )


def _against_people(work: Work, scorer: Scorer, written: Samples, found: Scores, text: Text):
    """MAUVE, details and notes of as many windows of a text as there are samples."""
    model, (count, length) = work.model, written.tokens.shape
    texts, tokens = references.decoded(text, model.tokenizer, count=count, length=length, seed=work.settings.run.seed)
    elsewhere = f"point config.data.cache_dir or {ENVIRONMENT_VARIABLE} at a folder that can be written"
    people = _scored(work, scorer, texts, cache_folder(model.config.data.cache_dir), elsewhere=elsewhere)
    mauve, details = _mauve(work, found, people)
    notes = [NO_INTERVAL, *text.notes]
    if len(texts) < count:
        notes.insert(0, f"MAUVE is against {len(texts):,} references, all there are, fewer than the {count:,} samples.")
    about = {
        "count": len(texts), "entropy": float(samples.entropies(tokens).mean()),
        "generative_perplexity": people.perplexity().value,
    }  # fmt: skip
    return mauve, {"mauve": details, "references": about}, notes


def _mauve(work: Work, ours: Scores, people: Scores) -> tuple[Estimate, Mapping]:
    """MAUVE and what is beside it: of clusterings that begin elsewhere, how far its value hangs on them.

    See NO_INTERVAL: drawn again, texts share clusters with themselves, and each draw takes a clustering of its own.
    """
    given, mine, theirs = work.settings.generative, ours.features[ours.written], people.features[people.written]
    options = {"scaling": given.mauve_scaling, "buckets": given.mauve_buckets}
    decisive = options | {"seed": given.mauve_seed, "samples": ours.key, "references": people.key}
    def clustered(piece):
        index = int(piece.index[0])
        seed = given.mauve_seed + index
        return [{"index": index, "seed": seed, **dataclasses.asdict(mauve_score.mauve(theirs, mine, seed=seed, **options))}]

    with work.records("mauve", decisive, SEEDS) as file:
        complete(work, file, pieces(np.arange(SEEDS), 1, 1), clustered)
        rows = [file.rows[index, 0] for index in range(SEEDS)]
    details = {name: rows[0][name] for name in ("star", "frontier_integral", "buckets")}
    details["by_seed"] = {str(row["seed"]): row["value"] for row in rows}
    return Estimate(rows[0]["value"], count=len(mine), better="higher"), details


def _notes(written: Samples, found: Scores, scorer: Scorer) -> Iterator[str]:
    count, length = written.tokens.shape
    if (count, length) != (PAPER_COUNT, PAPER_LENGTH):
        yield (
            f"{count:,} samples of {length:,} tokens; the paper's numbers are of {PAPER_COUNT:,} of {PAPER_LENGTH:,} and "
            "cannot be compared with these."
        )
    if (scorer.config.hidden_size, scorer.config.num_layers) != GPT2_LARGE:
        yield (
            f"The scorer has {counted(scorer.config.num_layers, 'layer')} of width {scorer.config.hidden_size}; the paper's "
            "is GPT-2-large, 36 of 1,280."
        )
    if empty := int((~found.written).sum()):
        yield f"{empty:,} samples are empty texts: they count for entropy alone."
