"""Results of a search: a table, overrides to paste, and a config file that makes them."""
import dataclasses
import os
import textwrap
from pathlib import Path

from softmask_jax.compile import report
from softmask_jax.compile.choices import SIZES, Choice
from softmask_jax.compile.report import GIB, roofline
from softmask_jax.compile.topology import Topology
from softmask_jax.compile.tune import Tried, Tuner
from softmask_jax.config import flatten

SHOWN = 12  # rows of the table

CONFIG = '''"""{base} with the fastest settings of `python -m softmask_jax.compile --tune` for {topology}.

{about}
"""
from pathlib import Path

from ml_collections import ConfigDict

from softmask_jax.config import Config, read

BASE = Path(__file__).parent / "{path}"
OVERRIDES = {overrides}


def get_config() -> ConfigDict:
    return ConfigDict(read(str(BASE), OVERRIDES, Config))
'''


def changes(config, choice: Choice) -> dict:
    """Keys of a config that a choice changes, with their values."""
    sizes = {f"mesh.{name}": size for name, size in zip(SIZES, choice.sizes)}
    wanted = {
        "mesh.data": -1, **sizes, "model.remat": choice.remat, "model.base_dtype": choice.base_dtype,
        "train.global_batch_size": choice.batch, "train.micro_batches": choice.micro,
    }  # fmt: skip
    own = flatten(dataclasses.asdict(config))
    return {name: value for name, value in wanted.items() if own[name] != value}


def flags(changed: dict) -> str:
    """Flags of a command."""
    return " ".join(f"--config.{name}={value}" for name, value in changed.items())


def table(ranking: list[Tried]) -> str:
    """Markdown, best first."""
    lines = ["| data x fsdp x sequence x tensor | remat | base | rows of an update | of a micro-batch | GiB a chip | "
             "step, s | tokens/s | utilisation |", "|---" * 9 + "|"]
    return "\n".join([*lines, *(_row(tried) for tried in ranking[:SHOWN] if tried.reading is not None)])


def _row(tried: Tried) -> str:
    choice, reading = tried.choice, tried.reading
    mesh = f"{reading.mesh['data']} x {choice.fsdp} x {choice.sequence} x {choice.tensor}"
    row = (f"| {mesh} | {choice.remat} | {choice.base_dtype} | {choice.batch} | {choice.rows} | "
           f"{reading.peak / GIB:.1f} | ")
    if not reading.fits:
        return row + "does not fit | | |"
    times = roofline(reading)
    (fast, slow), (high, low) = times.tokens_per_s, times.utilisation
    return row + (f"{times.best_s:.3g} to {times.worst_s:.3g} | {slow:,.0f} to {fast:,.0f} | {low:.0%} to {high:.0%} |")


def text(tuner: Tuner, topology: Topology, config, base: str) -> str:
    """The table and flags to paste; an int8 base, which gives other results, is named apart. base: --config."""
    ranking = tuner.ranking(topology)
    best = tuner.best(topology, config.model.base_dtype)
    parts = [table(ranking), _summary(f"The best for {topology.name}", best, changes(config, best.choice), base)]
    others = {tried.choice.base_dtype for tried in ranking} - {config.model.base_dtype}
    for dtype in sorted(others):
        if (other := tuner.best(topology, dtype)).score > best.score:
            note = f"Faster on an {dtype} base, which needs a converted model of its own (config.model.base)"
            parts.append(_summary(note, other, changes(config, other.choice), base))
    if best.choice.batch != config.train.global_batch_size:
        parts.append(f"An update is then {best.choice.batch} rows instead of {config.train.global_batch_size}, which "
                     "needs another learning rate.")
    return "\n\n".join(parts)


def _summary(title: str, tried: Tried, changed: dict, base: str) -> str:
    if tried.reading is None or not tried.reading.fits:
        return f"{title}: nothing fits."
    return (f"{title}, on paper: {_about(tried)}\n\n    --config={base} {flags(changed)}".rstrip())


def _about(tried: Tried) -> str:
    times = roofline(tried.reading)
    return ("{1:,.0f} to {0:,.0f} tokens/s, ".format(*times.tokens_per_s)
            + "{1:.1%} to {0:.1%} of the peak".format(*times.utilisation)
            + f", {tried.reading.peak / GIB:.1f} of {tried.reading.slice.memory / GIB:.0f} GiB.")


def config_file(base: str, out: str, words: list[str], topology: Topology, config, best: Tried) -> str:
    """Text of a config file at `out`: `base` (a file or file:variant), the overrides `words`, and the best's."""
    path, variant = os.path.expanduser(base), ""
    if not Path(path).is_file() and ":" in path:
        path, _, variant = path.rpartition(":")
    relative = os.path.relpath(Path(path).resolve(), Path(out).resolve().parent) + (variant and f":{variant}")
    changed = [f"{name}={value}" for name, value in changes(config, best.choice).items()]
    about = textwrap.fill(f"On paper: {_about(best)} Assumed: {report.ASSUMED}.", 116)
    lines = "".join(f"    {word!r},\n" for word in [*words, *changed])
    return CONFIG.format(base=base, topology=topology.name, about=about, path=Path(relative).as_posix(),
                         overrides=f"[\n{lines}]")
