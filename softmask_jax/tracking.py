"""What a run writes down: metrics.jsonl, TensorBoard event files, a progress bar; and how fast the device could be."""
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from softmask_jax.run_folder import RunFolder

# Dense bfloat16 FLOP/s of one device, from the vendors' data sheets, by a substring of `device_kind`.
PEAK_FLOPS = {
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "TPU v3": 123e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L4": 121e12,
    "T4": 65e12,
}


def peak_flops(device) -> float:
    """FLOP/s of one device: the data sheet's, or where the device is not listed the best of five matrix products."""
    for kind, peak in PEAK_FLOPS.items():
        if kind.lower() in device.device_kind.lower():
            return peak
    size = 1024
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.dot)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) * (1 / len(jax.local_devices()) if device.platform == "cpu" else 1)


def summarise(pending: list) -> dict[str, float | list]:
    """One row of metrics from the `train_step.Metrics` of several steps."""
    m = jax.tree.map(lambda *x: np.stack([np.asarray(v, np.float64) for v in x]), *pending)
    xent = m.xent_sum.sum(0) / np.maximum(m.xent_count.sum(0), 1)
    row = {
        "loss": m.loss.mean(),
        "grad_norm": m.grad_norm.mean(),
        "cross_entropy": m.xent_sum.sum() / max(m.xent_count.sum(), 1),
        "two_pass_share": m.two_pass.mean(),
    }
    bins = len(xent)
    row |= {f"cross_entropy_by_t/{i / bins:.1f}-{(i + 1) / bins:.1f}": x for i, x in enumerate(xent)}
    if m.fed_back.sum() > 0:
        row |= {
            "lambda_mean": m.lambda_sum.sum() / m.fed_back.sum(),
            "top_k_hit_rate": m.top_k_hits.sum() / m.fed_back.sum(),
            "lambda_histogram": (m.lambda_hist.sum(0) / m.fed_back.sum()).tolist(),
        }
    return {name: value if isinstance(value, list) else float(value) for name, value in row.items()}


class Clock:
    """Speed of training alone: restarted after compilation, validation, sampling and saving."""

    def restart(self, step: int) -> None:
        self.step, self.since = step, time.perf_counter()

    def steps_per_second(self, step: int) -> float:
        """Since the last restart; 0 where there was no step."""
        return (step - self.step) / max(time.perf_counter() - self.since, 1e-9)


class Tracker:
    """Writes rows to metrics.jsonl and TensorBoard on the first process; shows a progress bar.

    Args:
      start: the step a resumed run continues from; event files drop what was written after it.
    """

    def __init__(self, folder: RunFolder, *, steps: int, start: int):
        self.first = jax.process_index() == 0
        self.folder = folder
        self.warned = False
        self.bar = tqdm(
            total=steps, initial=start, unit="step", disable=not self.first, dynamic_ncols=True, smoothing=0.05
        )
        if self.first:
            self.board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=start + 1 if start else None)

    def row(self, step: int, kind: str, values: dict) -> None:
        """One line of metrics.jsonl, and a scalar (or histogram) of TensorBoard for each value."""
        if not self.first:
            return
        self.folder.append({"step": step, "kind": kind, **values})
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(f"{kind}/{name}", value, step)
            elif name.endswith("histogram"):
                edges = np.linspace(0.0, 1.0, len(value) + 1)
                counts = np.asarray(value)
                self.board.add_histogram_raw(
                    f"{kind}/{name}", min=0.0, max=1.0, num=1.0, sum=float((counts * edges[1:]).sum()),
                    sum_squares=float((counts * edges[1:] ** 2).sum()), bucket_limits=edges[1:].tolist(),
                    bucket_counts=counts.tolist(), global_step=step,
                )  # fmt: skip

    def text(self, step: int, name: str, text: str) -> None:
        if self.first:
            self.board.add_text(name, text, step)

    def progress(self, step: int, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        if loss is not None and math.isfinite(loss):
            self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s", refresh=False)
        self.bar.update(step - self.bar.n)

    def warn_once(self, line: str) -> None:
        if not self.warned:
            self.say("Warning: " + line)
        self.warned = True

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if self.first:
            self.bar.write(line)

    def end_progress(self) -> None:
        self.bar.close()

    def close(self) -> None:
        self.end_progress()
        if self.first:
            self.board.close()
