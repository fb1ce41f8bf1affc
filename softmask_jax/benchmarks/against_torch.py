"""Our train step and plain PyTorch steps of the same shape, in turn, each in a process of its own.

All start from the same random parameters; their first losses with the same noise must agree, with one pass and with
two, before anything is timed. All use every core that this process may."""
import contextlib
import dataclasses
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from softmask_jax import config
from softmask_jax.benchmarks.in_turn import Worker, answer, peak_resident_bytes
from softmask_jax.benchmarks.random_step import RandomStep, Shape, Sizes, settings_of
from softmask_jax.benchmarks.timing import mebibytes, ratio, ratio_text, spread, spread_text
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.convert.key_tables import below, keys
from softmask_jax.models.keys import SOFT_MASK, dit
from softmask_jax.report.markdown import table

OURS = "ours"
TORCH = {"subs": "PyTorch, SUBS", "cross_entropy": "PyTorch, cross-entropy"}  # losses of `torch_step`
PASSES = {"one_pass": 1, "two_pass": 2}
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of first losses, nats
RANDOM = 0.1  # standard deviation added to every weight: the head and the gates start at zero


def config_of(sizes: Sizes, shape: Shape) -> config.Config:
    """The config of the compared step, its lambda well away from 0 where predictions are almost uniform."""
    settings = settings_of(sizes, shape)
    centre = dict(init_centre=0.9 * -math.log(shape.vocab_size), init_steepness=1.0)
    return dataclasses.replace(settings, soft_mask=dataclasses.replace(settings.soft_mask, **centre))


def settings_for_torch(settings: config.Config, shape: Shape, device: str, start: str) -> dict:
    """What `torch_step.Trainer` reads, but "loss". start: of `write_start`."""
    sections = dataclasses.asdict(settings.model) | dataclasses.asdict(settings.optimizer)
    return sections | {"vocab_size": shape.vocab_size, "seq_len": settings.data.seq_len, "k": settings.soft_mask.k,
                       "device": device, "start": start}


@partial(jax.jit, donate_argnums=0)
def perturbed(tree: dict) -> dict:
    """Every array plus normal noise."""
    leaves, structure = jax.tree.flatten(tree)
    each = jax.random.split(root_key(1), len(leaves))
    noisy = [x + RANDOM * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(each, leaves, strict=True)]
    return jax.tree.unflatten(structure, noisy)


def random_step(sizes: Sizes, shape: Shape) -> RandomStep:
    """Our step with `perturbed` weights."""
    step = RandomStep(config_of(sizes, shape), shape.vocab_size, jnp.zeros(sizes.batch, bool))
    backbone = perturbed(step.state.params["backbone"])
    ema = jax.tree.map(jnp.copy, backbone)
    step.state = step.state._replace(params=step.state.params | {"backbone": backbone}, ema=ema)
    return step


def first_losses(step: RandomStep, *passes: int) -> list[float]:
    """Losses of the first updates with these numbers of passes, from the same parameters: warm-up starts at rate 0, so
    the first update changes nothing."""
    return [float(step(coins(step, number))[1].loss) for number in passes]


def coins(step: RandomStep, passes: int) -> jax.Array:
    return jnp.full(len(step.batch["rows"]), passes == 2)


def write_start(path: str, step: RandomStep, shape: Shape) -> None:
    """The parameters under PyTorch's names, tokens [B L], and x_t and weights [B L] of the first two steps."""
    tensors = {"tokens": np.asarray(step.batch["tokens"])}
    for number in range(2):
        noisy = step.train.objective.corrupt(step.batch, step.key, number, mask_token_id=shape.vocab_size - 1)
        tensors |= {f"xt.{number}": np.asarray(noisy.xt), f"weights.{number}": np.asarray(noisy.weights)}
    for entry in below("backbone", dit.BACKBONE) + below("soft_mask", SOFT_MASK):
        array = step.state.params
        for name in entry.path.split("/"):
            array = array[name]
        for i, key in keys(entry, shape.num_blocks):
            tensor = np.asarray(array[i] if entry.stacked else array)
            tensor = tensor.T if entry.change == "transpose" else tensor
            tensor = tensor[: shape.vocab_size] if entry.change == "vocabulary" else tensor
            tensors[key] = np.ascontiguousarray(tensor).reshape(tensor.shape)
    save_file(tensors, path)


@settled()
def serve(settings: str) -> None:
    """Answer "losses", "step" and "peak" for our step; settings: JSON. Writes the start for PyTorch first."""
    settings = json.loads(settings)
    if settings["device"]:
        jax.config.update("jax_platforms", settings["device"])
    sizes, shape = Sizes(**settings["sizes"]), Shape(*settings["shape"])
    step = random_step(sizes, shape)
    write_start(settings["start"], step, shape)

    def timed(passes: int) -> float:
        start = time.perf_counter()
        _, metrics = jax.block_until_ready(step(coins(step, passes)))
        if not metrics.finite:
            raise FloatingPointError("our loss or gradient is not finite")
        return time.perf_counter() - start

    def peak() -> int:
        device = jax.devices()[0]
        return peak_resident_bytes() if device.platform == "cpu" else device.memory_stats()["peak_bytes_in_use"]

    answer({"losses": partial(first_losses, step), "step": timed, "peak": peak})


def check_installed() -> None:
    """ImportError without PyTorch."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError("--against=torch needs PyTorch: pip install 'softmask_jax[bench]'")


def compare(sizes: Sizes, shape: Shape, device: str, steps: int) -> dict:
    """One shape on "cpu" or "gpu". ValueError if the first losses differ.

    "shape", "torch" (its version); "steps": by program, `OURS` and those of `TORCH`, "losses" (the first, by kind of
    step), "peak_bytes", "two_pass_ratio" (`ratio`), and by kind of step "seconds" (`spread`), "tokens_per_second" and
    "speed", the `ratio` of its seconds to ours."""
    device = {"gpu": "cuda"}.get(device, device)
    with tempfile.TemporaryDirectory(prefix="softmask_jax_") as folder, contextlib.ExitStack() as stack:
        start = str(Path(folder) / "start.safetensors")
        ours = {"sizes": dataclasses.asdict(sizes), "shape": shape, "device": device, "start": start}
        workers = {OURS: stack.enter_context(Worker("softmask_jax.benchmarks.against_torch", ours))}
        losses = {OURS: workers[OURS].ask("losses", *PASSES.values())}  # the start is written now
        theirs = settings_for_torch(config_of(sizes, shape), shape, device, start)
        for name in TORCH:
            worker = Worker("softmask_jax.benchmarks.torch_step", theirs | {"loss": name})
            workers[name] = stack.enter_context(worker)
            losses[name] = worker.ask("losses", *PASSES.values())
        check_losses(losses, sizes.compute_dtype)
        seconds = take_turns(workers, steps)
        peaks = {name: worker.ask("peak") for name, worker in workers.items()}
        version = worker.ask("version")
    programs = {
        name: {"losses": dict(zip(PASSES, losses[name])), "peak_bytes": peaks[name],
               "two_pass_ratio": ratio(seconds[name, "two_pass"], seconds[name, "one_pass"]),
               **{passes: of_kind(seconds[name, passes], seconds[OURS, passes], sizes) for passes in PASSES}}
        for name in workers
    }  # fmt: skip
    return {"shape": shape._asdict(), "torch": version, "steps": programs}


def of_kind(seconds: np.ndarray, ours: np.ndarray, sizes: Sizes) -> dict:
    """Figures of a program's steps of one kind, from its seconds and ours."""
    speed = sizes.batch * sizes.seq_len / float(np.median(seconds))
    return {"seconds": spread(seconds), "tokens_per_second": speed, "speed": ratio(seconds, ours)}


def take_turns(workers: Mapping[str, Worker], steps: int) -> dict[tuple[str, str], np.ndarray]:
    """Seconds [steps] by (program, kind of step), step by step in turn after one untimed step of each."""
    rounds = [
        {(name, passes): worker.ask("step", number) for passes, number in PASSES.items()
         for name, worker in workers.items()}
        for _ in range(1 + steps)
    ]  # fmt: skip
    return {name: np.array([seconds[name] for seconds in rounds[1:]]) for name in rounds[0]}


def check_losses(losses: Mapping[str, Sequence[float]], compute_dtype: str) -> None:
    """ValueError if a program's first losses, by kind of step, differ from ours by more than rounding."""
    for name in TORCH:
        for passes, ours, theirs in zip(PASSES, losses[OURS], losses[name], strict=True):
            if not abs(ours - theirs) <= TOLERANCE[compute_dtype]:
                raise ValueError(f"The first {passes} loss is {ours:.6f} here and {theirs:.6f} in {TORCH[name]}: it is "
                                 "not the same step, so its speed says nothing.")


def markdown(rows: Sequence[Mapping]) -> list[str]:
    """Figures of `compare` as two tables."""
    times, others = [], []
    for row in rows:
        shape = Shape(**row["shape"])
        for name, step in row["steps"].items():
            head = str(shape.hidden_size), str(shape.num_blocks), f"{shape.vocab_size:,}", TORCH.get(name, name)
            cells = [(spread_text(step[passes]["seconds"]), f"{step[passes]['tokens_per_second']:,.0f}",
                      "" if name == OURS else ratio_text(step[passes]["speed"])) for passes in PASSES]
            times.append((*head, *cells[0], *cells[1]))
            others.append((*head, mebibytes(step["peak_bytes"]), ratio_text(step["two_pass_ratio"]),
                           *(f"{step['losses'][passes]:.5f}" for passes in PASSES)))
    head = "D", "blocks", "V", "step"
    return [
        table((*head, "one pass, s", "tokens/s", "ours times as fast", "two passes, s", "tokens/s",
               "ours times as fast"), times),
        table((*head, "peak memory, MiB", "two passes / one pass", "first loss, one pass", "two passes"), others),
    ]  # fmt: skip
