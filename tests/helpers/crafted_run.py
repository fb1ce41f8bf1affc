"""A run's folder as a training leaves it, without any training: for what reads folders."""
import json
import math
from pathlib import Path

from softmask_jax import config
from softmask_jax.io import goodput
from softmask_jax.io.files import plain, write_json

SPLIT = {"windows_in_split": 32}
OWNED = "document.title='owned'"
HOSTILE = f'</script></pre><img src=x onerror="{OWNED}"><script>{OWNED}</script>\x00\ud800'


def scores(nelbo: float, gain: float | None) -> dict:
    """What a row of validation holds; `gain` of the second pass in nats, None for a binary run."""
    found = {}
    for name, nats in (("one_pass", nelbo), ("two_pass", None if gain is None else nelbo - gain)):
        if nats is not None:
            found |= {f"{name}/nelbo": nats, f"{name}/perplexity": math.exp(nats), f"{name}/nelbo_low": nats - 0.1,
                      f"{name}/nelbo_high": nats + 0.1}  # fmt: skip
    return found if gain is None else found | {"gain/nelbo": gain, "gain/low": gain - 0.01, "gain/high": gain + 0.01}


def train_row(step: int, soft: bool) -> dict:
    row = {
        "step": step, "kind": "train", "loss": 2 + 5 / (1 + step / 30) + 0.2 * math.sin(step), "grad_norm": 1.5,
        "cross_entropy": 3.0, "two_pass_share": 0.8 if soft else 0.0,
        "cross_entropy_by_t/0.0-0.1": 2.0, "cross_entropy_by_t/0.9-1.0": 3.5, "learning_rate": 2e-3,
        "tokens_per_second": 1000.0 + step, "model_flops_per_second": (1000.0 + step) * (3.8 if soft else 3.0) * 7.0,
        "model_flops_share": 0.25,
    }  # fmt: skip
    if not soft:
        return row
    return row | {
        "lambda_mean": 0.1 + step / 1000, "top_k_hit_rate": 0.4, "lambda_histogram": [0.5, 0.3, 0.2] + [0.0] * 7,
        "sm_learning_rate": 1e-2, "soft_mask/scale": 0.5, "soft_mask/centre": -2.5, "soft_mask/steepness": 2.0,
        "soft_mask/temperature": 1.0,
    }  # fmt: skip


def write(path: Path, *, steps=100, soft=True, finished=True, texts=(HOSTILE,), **changed) -> Path:
    """A folder with config, versions and metrics, a row every 10 steps and validation every 50; `changed` is
    `section__key=value`."""
    values: dict = {"train": {"steps": steps, "global_batch_size": 8}, "data": {"seq_len": 16}}
    for name, value in {"soft_mask__variant": "topk" if soft else "none", **changed}.items():
        section, key = name.split("__")
        values.setdefault(section, {})[key] = value
    path.mkdir(parents=True)
    write_json(path / "config.json", config.from_dict(values).to_dict())
    write_json(path / "versions.json", {"python": "3.11.7", "git_commit": None, "device": "1 x cpu (cpu)"})
    rows, gain = [], 0.05 if soft else None
    for step in range(10, steps + 1, 10):
        rows.append(train_row(step, soft))
        if step % 50 == 0:
            rows.append({"step": step, "kind": "validation", **scores(2.5 + 10 / step, gain), "windows": 8, **SPLIT})
            rows.append({"step": step, "kind": "samples", "texts": list(texts)})
    if finished:
        final = scores(2.5, gain) | {"windows": 16, **SPLIT}
        rows.append({"step": steps, "kind": "final", **final})
        info = {"train_tokens": 123_456, "source": "stdlib"}
        write_json(path / "summary.json", {"finished": True, "step": steps, "validation": final, "samples": list(texts),
                                           "data": info})  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(json.dumps(plain(row)) + "\n" for row in rows))
    return path


def write_account(path: Path, **seconds: float) -> goodput.Account:
    """The account of the wall time of a run that was started three times."""
    account = goodput.Account(since=0.0, seen=sum(seconds.values()), starts=3)
    account.seconds |= seconds
    write_json(path / goodput.FILE, vars(account))
    return account
