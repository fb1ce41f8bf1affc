"""Every figure of the study, from the results of its jobs, as JSON values.

An estimate is {"value", "low", "high", "count", ...} with a 95 % interval: "over_seeds" by Student's t over the seeds'
values (of three, wide), elsewhere over windows, samples or puzzles (which says nothing of another training seed)."""
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from softmask_jax.evaluate.code.pass_at_k import wilson
from softmask_jax.evaluate.task import Estimate
from softmask_jax.reproduce.jobs import Results
from softmask_jax.reproduce.study import BASE, BINARY, PUZZLE, Recipe, Run, Sizes, TEXT
from softmask_jax.reproduce.puzzles import EMPTY
from softmask_jax.reproduce.verdicts import verdicts
from softmask_jax.reproduce.work import Decoding, decodings

# What is measured of samples, and of answers: (name, of one result its values [N], better).
SAMPLES = (("nats", "lower"), ("parses", "higher"), ("entropy", ""))
ANSWERS = (("right", "higher"),)


def report(sizes: Sizes, runs: Sequence[Run], results: Results) -> dict:
    """All figures: "training" (a row a run), "nelbo" (a row a recipe), "samples" and "answers" (rows of recipe,
    feedback and steps), their "..._differences" to binary, "verdicts" (sentences), and what the study was."""
    trained = {run.name: results[f"train-{run.name}"] for run in runs}
    scores = results["scores"]
    nelbo = _nelbo(runs, results)
    samples = _decoded(runs, sizes, results, TEXT, SAMPLES, lambda one: scores[one.name])
    answers = _decoded(runs, sizes, results, PUZZLE, ANSWERS, lambda one: results[one.name])
    clues = np.array([sum(cell != EMPTY for cell in puzzle) for puzzle in results["puzzles"]["puzzles"]])
    for row, same in answers:
        row["by_clues"] = _by_clues(clues, [results[one.name]["right"] for one in same])
    differences = {
        "sample_differences": _differences(runs, sizes, TEXT, SAMPLES, lambda one: scores[one.name]),
        "answer_differences": _differences(runs, sizes, PUZZLE, ANSWERS, lambda one: results[one.name]),
    }
    real = {name: _plain(Estimate.of_mean(scores["validation"][name])) for name, _ in SAMPLES}
    versions = [one["versions"] for one in trained.values()]
    figures = {
        "seeds": sizes.seeds, "sizes": dataclasses.asdict(sizes),
        "versions": [one for i, one in enumerate(versions) if one not in versions[:i]],
        "training": [
            {"run": run.name, "seed": run.seed, "updates": trained[run.name]["updates"], "flops": run.flops,
             **trained[run.name]["last"]} for run in runs
        ],
        "nelbo": nelbo, "samples": [row for row, _ in samples], "real_text": real,
        "answers": [row for row, _ in answers], **differences,
    }  # fmt: skip
    return figures | {"verdicts": verdicts(figures)}


def by_recipe(runs: Sequence[Run], part: str) -> dict[str, list[Run]]:
    """The runs of a part by recipe, seeds ascending."""
    grouped = {}
    for run in runs:
        if run.part == part:
            grouped.setdefault(run.recipe.name, []).append(run)
    return grouped


def _nelbo(runs: Sequence[Run], results: Results) -> list[dict]:
    grouped, rows = by_recipe(runs, TEXT), []
    windows = {run.name: results[f"nelbo-{run.name}"] for one in grouped.values() for run in one}

    def best(run: Run) -> np.ndarray:
        return np.array(windows[run.name].get("two_pass", windows[run.name]["one_pass"]))

    binary = {run.seed: run for run in grouped[BINARY]}
    for own in grouped.values():
        differences = [best(run) - best(binary[run.seed]) for run in own]
        row = _row(own[0].recipe) | {
            "seeds": len(own), "updates": own[0].config.updates, "flops_ratio": own[0].flops / grouped[BINARY][0].flops,
            "value": _plain(Estimate.of_mean(np.mean([best(run) for run in own], 0), unit="nats per token")),
            "difference": _both(differences, "lower"),
        }  # fmt: skip
        if own[0].soft:
            gains = [np.subtract(windows[run.name]["two_pass"], windows[run.name]["one_pass"]) for run in own]
            row["second_pass"] = _both(gains, "lower")
        rows.append(row)
    return rows


def _decoded(
    runs: Sequence[Run], sizes: Sizes, results: Results, part: str, numbers: Sequence, values: Callable
) -> list[tuple[dict, tuple[Decoding, ...]]]:
    """A row for each recipe, way of decoding and number of steps, all seeds' decodings pooled, and these."""
    rows = []
    for own in by_recipe(runs, part).values():
        for same in zip(*(decodings(run, sizes) for run in own), strict=True):
            row = _row(own[0].recipe) | {
                "feedback": same[0].feedback, "steps": same[0].steps, "seeds": len(same),
                "calls": float(np.mean([results[one.name]["calls"] for one in same])),
            }  # fmt: skip
            for name, better in numbers:
                pooled = np.concatenate([values(one)[name] for one in same])
                estimate = share(pooled) if name == "right" else Estimate.of_mean(pooled, better=better)
                row[name] = _plain(estimate) | {"by_seed": [float(np.mean(values(one)[name])) for one in same]}
            rows.append((row, same))
    return rows


def share(right: np.ndarray) -> Estimate:
    """The share of what is right [N], with Wilson's interval."""
    low, high = wilson(float(right.mean()), len(right))
    return Estimate(float(right.mean()), low, high, len(right), better="higher")


def _by_clues(clues: np.ndarray, right: Sequence[Sequence[bool]]) -> list[dict]:
    """Shares of puzzles solved by the number of clues, in three parts; right: of each seed [N]."""
    edges = np.linspace(clues.min(), clues.max() + 1, 4).round().astype(int)
    parts = [(clues >= low) & (clues < high) for low, high in zip(edges, edges[1:])]
    return [
        {"clues": [int(clues[part].min()), int(clues[part].max())],
         "right": _plain(share(np.concatenate([np.asarray(one)[part] for one in right])))}
        for part in parts if part.any()
    ]  # fmt: skip


def _differences(runs: Sequence[Run], sizes: Sizes, part: str, numbers: Sequence, values: Callable) -> list[dict]:
    """Differences to the binary run of the same seed, FLOPs and steps; with "steps" None, how much larger they are at
    the fewest steps than at all of them."""
    grouped, rows = by_recipe(runs, part), []
    binary = {(run.seed, one.steps): one for run in grouped[BINARY] for one in decodings(run, sizes)}
    for recipe, own in grouped.items():
        if recipe in (BINARY, BASE.name):
            continue
        for feedback in (True, False):
            ways = [[one for one in decodings(run, sizes) if one.feedback == feedback] for run in own]
            for name, better in numbers:
                by_steps = {
                    same[0].steps: [
                        float(np.mean(values(one)[name]) - np.mean(values(binary[run.seed, one.steps])[name]))
                        for run, one in zip(own, same, strict=True)
                    ] for same in zip(*ways, strict=True)
                }  # fmt: skip
                if not by_steps:
                    continue
                few, all_steps = min(by_steps), max(by_steps)
                by_steps[None] = np.subtract(by_steps[few], by_steps[all_steps]).tolist()
                rows += [
                    _row(own[0].recipe) | {"feedback": feedback, "steps": steps, "number": name,
                                           "over_seeds": _plain(Estimate.of_mean(by_seed, better=better)),
                                           "by_seed": by_seed}
                    for steps, by_seed in by_steps.items()
                ]  # fmt: skip
    return rows


def _both(differences: Sequence[np.ndarray], better: str) -> dict:
    """Paired differences [W] of each seed, as estimates over seeds and over windows."""
    return {
        "over_seeds": _plain(Estimate.of_mean([one.mean() for one in differences], better=better)),
        "over_windows": _plain(Estimate.of_mean(np.mean(differences, 0), better=better)),
        "by_seed": [float(one.mean()) for one in differences],
    }


def _row(recipe: Recipe) -> dict:
    return {"recipe": recipe.name, "title": recipe.title}


def _plain(estimate: Estimate) -> dict:
    return dataclasses.asdict(estimate)
