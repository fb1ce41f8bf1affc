"""Metrics of a run: rows, their writers (metrics.jsonl, TensorBoard, W&B), progress, speed."""
import contextlib
import math
import os
import time
import timeit
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from softmask_jax.config import Config
from softmask_jax.config.progress import Progress
from softmask_jax.diffusion.soft_masking import effective
from softmask_jax.io import uploads
from softmask_jax.io.files import explained
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training import optimizer
from softmask_jax.training.wandb_rows import FAILED, WandbRows

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by a substring of `device_kind`.
PEAK_FLOPS = {
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    # Per core: these chips are two JAX devices each.
    "TPU v3": 61.5e12,
    "TPU v2": 22.5e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "T4": 65e12,
}


def peak_flops(device) -> float:
    """FLOP/s of one device: the data sheet's, or where the device is not listed the best of five matrix products."""
    for kind, peak in PEAK_FLOPS.items():
        if kind.lower() in device.device_kind.lower():
            return peak
    cpu = device.platform == "cpu"
    size, dtype = (1024, jnp.float32) if cpu else (8192, jnp.bfloat16)
    x = jax.device_put(jnp.ones((size, size), dtype), device)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = min(timeit.repeat(lambda: product(x, x).block_until_ready(), number=1))
    return 2 * size**3 / seconds / (len(jax.local_devices()) if cpu else 1)


def summarise(pending: list) -> dict[str, float | list]:
    """One row of metrics from the `Metrics` of several steps on the host; without empty bins of t."""
    m = jax.tree.map(lambda *x: np.stack(x).astype(np.float64), *pending)
    sums, counts, fed_back = m.xent_sum.sum(0), m.xent_count.sum(0), m.fed_back.sum()
    row = {
        "loss": m.loss.mean(),
        "grad_norm": m.grad_norm.mean(),
        "cross_entropy": sums.sum() / max(counts.sum(), 1),
        "two_pass_share": m.two_pass.mean(),
    }
    for i in np.flatnonzero(counts):
        row[f"cross_entropy_by_t/{i / len(counts):.1f}-{(i + 1) / len(counts):.1f}"] = sums[i] / counts[i]
    if fed_back > 0:
        row |= {"lambda_mean": m.lambda_sum.sum() / fed_back, "top_k_hit_rate": m.top_k_hits.sum() / fed_back}
        row["lambda_histogram"] = m.lambda_hist.sum(0) / fed_back
    return {name: value.tolist() for name, value in row.items()}


def scalars(config: Config, updates: jax.Array, raw: dict) -> dict[str, jax.Array]:
    """Learning rates of the last of so many updates, and a soft-masked run's effective scalars; to be jitted."""
    peaks, values = {"learning_rate": config.optimizer.learning_rate}, {}
    if config.soft_mask.variant != "none":
        peaks["sm_learning_rate"] = config.optimizer.sm_learning_rate
        values = {f"soft_mask/{name}": value for name, value in effective(raw)._asdict().items()}
    for name, peak in peaks.items():
        values[name] = optimizer.learning_rate(peak, config.schedule, config.updates)(updates - 1)
    return values


def scores(estimates: dict) -> dict[str, float]:
    """One row of metrics from the result of `Perplexity`: nats per token, perplexity, 95 % intervals."""
    row = {}
    for name, nats in estimates.items():
        row |= {f"{name}/nelbo": nats.mean, f"{name}/perplexity": nats.perplexity}
        row |= ends(f"{name}/nelbo_", nats.interval())
    if "two_pass" in estimates:
        one, two = estimates["one_pass"], estimates["two_pass"]
        row |= {"gain/nelbo": one.mean - two.mean} | ends("gain/", one.interval(two))
    return row


def ends(name: str, interval: tuple) -> dict[str, float]:
    """Entries of a row for an interval; none for that of a single window."""
    return {} if interval[0] is None else {f"{name}low": interval[0], f"{name}high": interval[1]}


class Openness:
    """Logs when mean lambda crosses 0.01; warns every 1,000 steps below."""

    CLOSED, REMIND_AFTER = 0.01, 1000

    def __init__(self):
        self.closed, self.warned = None, 0

    def line(self, step: int, mean: float, scale: float) -> str | None:
        """The line for a row with this mean lambda, if any; `scale` is the effective omega_s."""
        before, self.closed = self.closed, mean < self.CLOSED
        if not self.closed:
            opened = before is not False
            return f"Step {step}: the mean lambda is {mean:.3f}: soft-masking is open." if opened else None
        if before and step - self.warned < self.REMIND_AFTER:
            return None
        self.warned = step
        why = "it opens as the predictions become less uncertain"
        if scale < self.CLOSED:
            why = f"soft_mask.scale is {scale:.1e} and moves slowly; config.soft_mask.init_scale starts it higher"
        state = "has closed" if before is False else "is still closed"
        effect = f"soft-masking {state}, two passes do what one would ({why})"
        return f"Warning: the mean lambda is {mean:.1e} at step {step}: {effect}."


class Clock:
    """Training speed; restarted after compilation, validation, sampling and saving."""

    def restart(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        """Speed since the last restart."""
        return (step - self.step) / max(time.perf_counter() - self.since, 1e-9)


def state_in_words(pending: list, step: int, clock: Clock, tokens: int, is_first: bool) -> str:
    """Loss and speed by the newest `Metrics` that the device has computed; "" if it has none of these yet.
    tokens: of a step. is_first: the step has been waited for, with its compilation."""
    if is_first:
        return in_words(pending[-1].loss)
    return in_words(pending[-3].loss, clock.steps_per_second(step - 2) * tokens) if len(pending) > 2 else ""


def in_words(loss: float, speed: float = 0.0) -> str:
    return f"loss {float(loss):.3f}" + (f", {speed:,.0f} tokens/s" if speed > 0 else "")


class Tracker:
    """Writes rows to metrics.jsonl, TensorBoard and, if config.train.wandb, W&B; shows progress. Process 0 only.

    start: step that a resumed run continues from; TensorBoard drops later entries. OSError for an unwritable folder;
    ValueError or RuntimeError if W&B cannot be started (see `WandbRows`)."""

    def __init__(self, folder: RunFolder, config: Config, *, start: int):
        self.first = jax.process_index() == 0
        self.folder, self.writers, self.exit_code = folder, [], FAILED
        self.shown = Progress(config.updates, "Step", initial=start, disable=not self.first)
        self.state = None  # () -> loss and speed in words
        if self.first:
            self.writers.append(Board(folder.path / "tensorboard", start))
            if config.train.wandb:
                self.writers.append(WandbRows(folder, config.train.wandb, config.to_dict(), start, self.say))

    def row(self, step: int, kind: str, values: dict) -> None:
        """One line of metrics.jsonl; a scalar, histogram or text of TensorBoard and W&B for each value."""
        if self.first:
            self.folder.append({"step": step, "kind": kind, **values})
        for writer in self.writers:
            writer.write(step, kind, values)

    def progress(self, step: int) -> None:
        """Show that the run is at a step, with what `state` says where it is shown."""
        self.shown.update(step - self.shown.n, self.state)

    def say(self, line: str) -> None:
        """Print a line."""
        if self.first:
            self.shown.say(line)

    def close(self) -> None:
        """End all files, and the W&B run with `exit_code`."""
        self.shown.close()
        for writer in self.writers:
            writer.close(self.exit_code)


class Board:
    """A TensorBoard event file, flushed after every row: the writer thread of tensorboardX's `SummaryWriter` dies on a
    full disk, and the program would hang."""

    def __init__(self, folder: Path, start: int):
        self.folder, self._mirror, self._files = folder, uploads.mirror(folder), 0
        with explained(folder):
            self._mirror.folder.mkdir(parents=True, exist_ok=True)
            self._file = self._next_file()
            # Tells TensorBoard to drop an interrupted run's entries from this step on.
            forget = Event(wall_time=time.time(), step=start + 1, session_log=SessionLog(status=SessionLog.START))
            self._file.write_event(forget)

    def write(self, step: int, kind: str, values: dict) -> None:
        """Numbers as scalars, shares as histograms over [0, 1], texts. OSError: disk full or folder not writable."""
        with explained(self.folder):
            for name, value in values.items():
                for entry in self._summaries(f"{kind}/{name}", value):
                    self._file.write_event(Event(wall_time=time.time(), step=step, summary=entry))
            self._file.flush()
            if max(self._mirror.folder.iterdir()).stat().st_size > self._mirror.piece_bytes:
                self._file.close()
                self._file = self._next_file()

    def close(self, exit_code: int) -> None:
        with contextlib.suppress(OSError):  # every row has been flushed, or has raised
            self._file.close()
        self._mirror.close()

    def _next_file(self) -> EventsWriter:
        # TensorBoard reads files in the order of their names.
        self._files += 1
        suffix = f".{os.getpid()}" + f".{self._files:05d}" * (self._mirror.piece_bytes < math.inf)
        return EventsWriter(str(self._mirror.folder / "events"), filename_suffix=suffix)

    @staticmethod
    def _summaries(name: str, value):
        if isinstance(value, (int, float)):
            yield summary.scalar(name, value)
        elif name.endswith("histogram"):
            edges = np.linspace(0.0, 1.0, len(value) + 1)
            shares, middles = np.asarray(value), (edges[1:] + edges[:-1]) / 2
            sums = {"sum": float((shares * middles).sum()), "sum_squares": float((shares * middles**2).sum())}
            buckets = {"bucket_limits": edges[1:].tolist(), "bucket_counts": shares.tolist()}
            yield summary.histogram_raw(name, min=0.0, max=1.0, num=1.0, **sums, **buckets)
        else:
            for i, text in enumerate(value):
                yield summary.text(f"{name}/{i}", text)
