"""The jobs of the study: training runs, scores of the trained models, samples and answers in few steps."""
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from softmask_jax.data import Windows
from softmask_jax.evaluate import comparison
from softmask_jax.io import run_log
from softmask_jax.io.run_folder import versions
from softmask_jax.reproduce import puzzles, texts
from softmask_jax.reproduce.jobs import Job, Results
from softmask_jax.reproduce.study import PUZZLE, Run, SOFT, Sizes, TEXT, base, runs
from softmask_jax.training import loop

PUZZLE_TOKENS = 80  # of a puzzle, its chat template and its answer, about
# Numbers of a run's last rows that explain its result.
KEPT = ("lambda_mean", "top_k_hit_rate", "soft_mask/scale", "soft_mask/centre", "soft_mask/steepness")


class Decoding(NamedTuple):
    """Samples or answers of a model: the name of the result, and how they are made."""

    name: str
    feedback: bool
    steps: int


def decodings(run: Run, sizes: Sizes) -> list[Decoding]:
    """All decodings of a run's model, of the recipe `soft` also without feedback; [] for one that is only scored."""
    if not (run.recipe.puzzles if run.part == PUZZLE else run.recipe.sampled):
        return []
    most = puzzles.CELLS if run.part == PUZZLE else sizes.length
    return [
        Decoding(f"{run.name}-{'feedback' if way else 'plain'}-{most // part}", way, most // part)
        for way in ((True, False) if run.recipe.name == SOFT else (run.soft,)) for part in sizes.shortened
    ]  # fmt: skip


def jobs(sizes: Sizes, out: Path, results: Results) -> list[Job]:
    """All jobs of a study in order. results: where jobs read what earlier ones made."""
    chosen, folders = runs(sizes, out), out / "runs"
    made = []
    for run in chosen:
        if run.name == base(PUZZLE):
            made.append(Job("puzzles", "puzzles and a random Dream", 0.0,
                            partial(puzzles.prepare, out / "dream", sizes)))
        made += [
            Job(f"train-{run.name}", f"{run.name}: {run.config.updates:,} updates", run.flops,
                partial(trained, run, folders / run.name)),
            *_scores(run, folders, sizes, results),
        ]  # fmt: skip
    rows = [one.name for run in chosen if run.part == TEXT for one in decodings(run, sizes)]
    config = chosen[0].config
    made.append(Job("scores", "scores of the samples", 0.0,
                    lambda: texts.scored(config, {name: results[name]["tokens"] for name in rows})))
    return made


def _scores(run: Run, folders: Path, sizes: Sizes, results: Results) -> list[Job]:
    """The jobs that measure a trained model."""
    folder, made = folders / run.name, []
    if run.part == TEXT:
        windows = partial(_windows, folders / base(TEXT))
        made.append(Job(f"nelbo-{run.name}", f"{run.name}: NELBO", 0.0, lambda: texts.nelbo(folder, windows(), sizes)))
    for one in decodings(run, sizes):
        if run.part == TEXT:
            tokens = sizes.samples * sizes.length
            work = partial(texts.sampled, folder, one.feedback, one.steps, sizes.samples)
        else:
            tokens = sizes.tests * PUZZLE_TOKENS
            work = partial(_answered, folder, one.feedback, one.steps, results)
        title = f"{run.name}: {one.steps} steps{', feedback on' if one.feedback else ''}"
        made.append(Job(one.name, title, run.token_flops * tokens * one.steps, work))
    return made


def _answered(folder: Path, feedback: bool, steps: int, results: Results) -> dict:
    return puzzles.answered(folder, results["puzzles"]["puzzles"], feedback, steps)


def _windows(base: Path) -> Windows:
    return comparison.check_comparable([comparison.load_run(base)])


def trained(run: Run, folder: Path) -> dict:
    """Train a run, or continue it; returns its cost and the state of soft-masking. KeyboardInterrupt after a signal."""
    summary = loop.train(run.config, str(folder), fetch=True)
    if not summary["finished"]:
        raise KeyboardInterrupt
    log = run_log.read(folder, summary)
    last = {name: value for row in log.last.values() for name, value in row.items() if name in KEPT}
    return {
        "updates": summary["step"], "flops": run.flops, "validation": summary["validation"], "last": last,
        "config": run.config.to_dict(), "versions": versions() | {"cores": os.cpu_count()},
    }  # fmt: skip
