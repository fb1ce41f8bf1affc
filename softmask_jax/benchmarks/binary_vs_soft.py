"""What soft-masking gains: two finished runs on the same text, scored on the same masks, beside what they cost:

    python -m softmask_jax.benchmarks.binary_vs_soft --binary=runs/a --soft=runs/b [--draws 4] [--json out.json]

Every window of the validation split is masked several times; the NELBO of a window is the mean over its draws, and the
95 % intervals are over windows, paired where two estimates are compared. Training is counted in forward passes, as the
paper's method has it: 3 for a plain step, 3 + p_sm for a soft-masked one.
"""
import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

import softmask_jax
from softmask_jax import checkpoint_io, data, sharding
from softmask_jax.api import LanguageModel
from softmask_jax.benchmarks.report import check_writable, table
from softmask_jax.evaluation.perplexity import Nats, Perplexity
from softmask_jax.files import write_json

LEAST_TOKENS = 100_000
EQUAL_WITHIN = 0.02


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A finished run: its folder, its model, and the fingerprint of the text it was trained on."""

    path: Path
    model: LanguageModel
    fingerprint: str

    @property
    def forwards_per_step(self) -> float:
        soft = self.model.config.soft_mask
        return 3.0 + (soft.p_sm if soft.variant != "none" else 0.0)

    @property
    def flops(self) -> float:
        """Matrix-product FLOPs of the whole training."""
        config = self.model.config
        tokens = self.model.step * config.train.global_batch_size * config.data.seq_len
        return tokens * self.forwards_per_step * self.model.denoiser.flops_per_token(config.data.seq_len)

    @functools.cached_property
    def perplexity(self) -> Perplexity:
        return Perplexity(self.model.denoiser, self.model.spec, sharding.make_mesh(data=1, devices=jax.devices()[:1]))


def load_run(path: str | Path) -> Run:
    """The newest whole checkpoint of a run's folder, with its EMA. FileNotFoundError if there is none."""
    path = Path(path)
    model = softmask_jax.load(path)
    checkpoint = path / "checkpoints" / str(model.step)
    stored = checkpoint_io.read_json(checkpoint, checkpoint_io.verify(checkpoint, ["data"]))
    return Run(path, model, stored["cursor"]["data"])


def check_comparable(binary: Run, soft: Run) -> data.Data:
    """The text both were trained on, whose validation split scores them.

    Raises:
      ValueError: other text, split, tokenizer, window length or noise; or the text on this machine is no longer theirs.
    """
    ours, theirs = binary.model, soft.model
    if ours.tokenizer.fingerprint() != theirs.tokenizer.fingerprint():
        raise ValueError(f"{binary.path} and {soft.path} have different tokenizers: nats per token do not compare.")
    if binary.fingerprint != soft.fingerprint:
        raise ValueError(
            f"{binary.path} and {soft.path} were trained on different text, split or window length (fingerprints "
            f"{binary.fingerprint[:12]} and {soft.fingerprint[:12]}): train both from the same config.data."
        )
    if ours.config.objective != theirs.config.objective:
        raise ValueError(f"{binary.path} and {soft.path} have different config.objective: their masks would differ.")
    built = data.build(ours.config.data)
    if built.info["fingerprint"] != binary.fingerprint:
        raise ValueError(
            f"The text that config.data of {binary.path} describes has changed since the run (fingerprint "
            f"{built.info['fingerprint'][:12]} instead of {binary.fingerprint[:12]}): bring the files back."
        )
    return built


def score(run: Run, windows: data.Windows, *, draws: int, batch_size: int, seed: int) -> dict[str, Nats]:
    """NELBO of every window, averaged over `draws` masks: {"one_pass", "two_pass"}, the second not for a binary model.

    The masks depend on the window's number, the draw and the seed alone.
    """
    total, params = {}, jax.device_put(run.model.params, sharding.replicated(run.perplexity.mesh))
    for draw in range(draws):
        batches = data.validation_batches(windows, global_batch_size=batch_size)
        for name, nats in run.perplexity(params, batches, len(windows), seed + draw).items():
            total[name] = total.get(name, 0.0) + nats.windows
    return {name: Nats(found / draws, windows.seq_len) for name, found in total.items()}


def compare(binary: Run, soft: Run, *, draws: int = 4, batch_size: int = 16, seed: int = 40_000) -> dict:
    """Score two runs on the same masks, with as many draws as 100,000 tokens need, at least `draws`.

    Returns:
      JSON values: "runs" {"binary", "soft"}, each "path", "step", "planned_steps", "flops", "forwards_per_step" and
      "nelbo" {"one_pass", "two_pass"} as (mean, low, high) in nats per token; "differences" the same way by what is
      subtracted from what, paired (negative: the first is better); "flops_ratio"; "equal_flops" within 2 %;
      "validation" {"windows", "draws", "tokens"}.

    Raises:
      ValueError: see `check_comparable`.
    """
    windows = check_comparable(binary, soft).validation
    draws = max(draws, math.ceil(LEAST_TOKENS / (len(windows) * windows.seq_len)))
    runs, scores = {"binary": binary, "soft": soft}, {}
    for name, run in runs.items():
        scores[name] = score(run, windows, draws=draws, batch_size=batch_size, seed=seed)
    plain, masked = scores["binary"], scores["soft"]
    differences = {"soft, one pass - binary": (masked["one_pass"], plain["one_pass"])}
    if "two_pass" in masked:
        differences["soft, two passes - binary"] = (masked["two_pass"], plain["one_pass"])
        differences["soft, two passes - soft, one pass"] = (masked["two_pass"], masked["one_pass"])
    ratio = soft.flops / binary.flops
    return {
        "runs": {name: _describe(run, scores[name]) for name, run in runs.items()},
        "differences": {name: _estimate(*pair) for name, pair in differences.items()},
        "flops_ratio": ratio,
        "equal_flops": abs(ratio - 1.0) <= EQUAL_WITHIN,
        "validation": {"windows": len(windows), "draws": draws, "tokens": len(windows) * draws * windows.seq_len},
    }


def _describe(run: Run, scores: dict[str, Nats]) -> dict:
    return {
        "path": str(run.path),
        "step": run.model.step,
        "planned_steps": run.model.config.updates,
        "flops": run.flops,
        "forwards_per_step": run.forwards_per_step,
        "nelbo": {name: _estimate(nats) for name, nats in scores.items()},
    }


def _estimate(nats: Nats, other: Nats | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of the NELBO, or of its difference to another on the same masks; nats per token."""
    return nats.mean - (0.0 if other is None else other.mean), *nats.interval(other)


def markdown(found: dict) -> str:
    """What `compare` returns, for a README."""
    rows = []
    for name, run in found["runs"].items():
        nelbo = {key: "{:.4f} [{:.4f}, {:.4f}]".format(*value) for key, value in run["nelbo"].items()}
        steps = f"{run['step']:,}" + (f" of {run['planned_steps']:,}" if run["step"] < run["planned_steps"] else "")
        cost = f"{run['flops']:.3e}"
        rows.append((f"{name} ({run['path']})", steps, f"{run['forwards_per_step']:.2f}", cost, nelbo["one_pass"],
                     nelbo.get("two_pass", "as one pass")))  # fmt: skip
    differences = [
        (name, "{:+.4f} [{:+.4f}, {:+.4f}]".format(*value), "no" if value[1] <= 0 <= value[2] else "yes")
        for name, value in found["differences"].items()
    ]
    used, ratio, runs = found["validation"], found["flops_ratio"], found["runs"]
    if found["equal_flops"]:
        verdict = f"Training FLOPs are equal within 2 % (soft / binary = {ratio:.4f})."
    else:
        steps = round(runs["soft"]["step"] / ratio)
        verdict = (
            f"Training FLOPs are NOT equal within 2 % (soft / binary = {ratio:.4f}): at {steps:,} steps the soft run "
            "would have cost what the binary one did."
        )
    return "\n".join([
        f"NELBO in nats per token with 95 % intervals, on {used['windows']:,} validation windows x {used['draws']} "
        f"draws ({used['tokens']:,} tokens), the same masks for all.",
        "",
        table(("run", "steps", "forwards a step", "training FLOPs", "one pass", "two passes"), rows),
        "",
        table(("paired difference (negative: the first is better)", "nats per token", "interval excludes 0"), differences),
        "",
        verdict,
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.benchmarks.binary_vs_soft", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--binary", required=True, help="folder of a run with soft_mask.variant=none")
    parser.add_argument("--soft", required=True, help="folder of a soft-masked run")
    parser.add_argument("--draws", type=int, default=4, help="masks a window; more where 100,000 tokens need them")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=40_000)
    parser.add_argument("--json", default="", help="write the figures here too")
    flags = parser.parse_args(argv)
    if flags.draws < 1 or flags.batch_size < 1:
        parser.error("--draws and --batch_size must be positive")
    try:
        check_writable(flags.json)
        binary, soft = load_run(flags.binary), load_run(flags.soft)
        for run, wanted in ((binary, True), (soft, False)):
            if (run.model.config.soft_mask.variant == "none") != wanted:
                kind = "binary (soft_mask.variant=none)" if wanted else "soft-masked"
                raise ValueError(f"{run.path} is not {kind}; are --binary and --soft swapped?")
        found = compare(binary, soft, draws=flags.draws, batch_size=flags.batch_size, seed=flags.seed)
        print(markdown(found))
        if flags.json:
            write_json(flags.json, found)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
