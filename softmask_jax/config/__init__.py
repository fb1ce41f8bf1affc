"""The one schema that every config is validated against.

A file in `configs/` returns an `ml_collections.ConfigDict` that names only what differs from the defaults below;
`load` completes it, applies `--config.section.key=value` overrides and checks names, types and values. The defaults
are the paper's 169M recipe (arXiv 2510.17206, appendix; MDLM, arXiv 2406.07524).
"""
import dataclasses
import difflib
import importlib.machinery
import inspect
import math
import os
import types
import typing
from pathlib import Path

from ml_collections import ConfigDict

from softmask_jax.config import command_line, keys, rules
from softmask_jax.config.sections import (
    Checkpoint, Data, Eval, Init, Mesh, Model, Objective, Optimizer, Sample, SoftMask, Texts, Train,
)


@dataclasses.dataclass(frozen=True)
class Config:
    model: Model = Model()
    soft_mask: SoftMask = SoftMask()
    objective: Objective = Objective()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    sample: Sample = Sample()
    init: Init = Init()

    @property
    def updates(self) -> int:
        """Updates of the run: `train.updates` of one that has begun, else what the budget buys by the layers' products
        alone (`update_flops.budgeted` knows the network)."""
        return self.train.updates or self.bought(layer_passes(self.model))

    @property
    def longest_row(self) -> int:
        """Tokens; rows of conversations may be shorter."""
        return self.data.max_tokens if self.data.source == "chat" else self.data.seq_len

    def bought(self, plain: float) -> int:
        """Updates that the budget buys: `train.steps` for a binary run, as many or fewer for a soft-masked one.

        The paper (section 4) counts an SM update as two and halves the steps. By FLOPs one costs p_sm forward passes
        more than a plain update, which costs `plain`.
        """
        shares = {"iso_update": 1.0, "iso_compute_paper": 0.5, "iso_flops": plain / (plain + self.soft_mask.p_sm)}
        steps = self.train.steps
        return steps if self.soft_mask.variant == "none" else max(1, round(shares[self.train.budget] * steps))

    def with_updates(self, updates: int) -> "Config":
        return dataclasses.replace(self, train=dataclasses.replace(self.train, updates=updates))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def layer_passes(model: Model) -> int:
    """Cost of a plain update in forward passes: one, a backward pass of two (one on a frozen base), and one more where
    `remat` "full" runs the layers again."""
    return 2 + (model.adapter == "none") + (model.remat == "full")


def of_run(values: typing.Mapping) -> Config:
    """A run's config.json, with the number of its updates; ValueError as `from_dict`.

    Where train.updates is missing, iso_flops counted 3 forward passes an update.
    """
    config = from_dict(values)
    return config.with_updates(config.train.updates or config.bought(3.0))


def begun(config: Config, stored: typing.Mapping | None) -> Config:
    """`config` with the updates of its run, whose config.json is `stored`, while steps and budget are the same."""
    if stored is None or config.train.updates:
        return config
    old = of_run(stored)
    same = all(
        getattr(getattr(config, section), name) == getattr(getattr(old, section), name)
        for section, name in (("train", "steps"), ("train", "budget"), ("soft_mask", "variant"), ("soft_mask", "p_sm"))
    )
    return config.with_updates(old.updates) if same else config


def from_dict(values: typing.Mapping) -> Config:
    """Complete and validate a (partial) nested mapping.

    Raises:
      ValueError: an unknown section or key (the nearest known one is named), a wrong type or an impossible value.
    """
    config = complete(values, Config)
    rules.check(config)
    return config


def complete(values: typing.Mapping, schema: type):
    """A (partial) nested mapping as `schema`, a dataclass of dataclasses. Raises ValueError for a name, type or value of
    a single key as `from_dict`."""
    sections = {}
    defaults = {section.name: section.default for section in dataclasses.fields(schema)}
    for section, entries in dict(values).items():
        if section not in defaults:
            raise ValueError(f"config: there is no section '{section}'{_nearest(section, defaults)}.")
        if not isinstance(entries, (typing.Mapping, ConfigDict)):
            raise ValueError(f"config.{section} must be a section with keys, not {entries!r}.")
        fields, changes = {field.name: field for field in dataclasses.fields(defaults[section])}, {}
        for key, value in dict(entries).items():
            if key not in fields:
                raise ValueError(f"config.{section} has no key '{key}'{_nearest(key, fields)}.")
            changes[key] = _typed(f"{section}.{key}", value, fields[key].type)
            keys.check(f"{section}.{key}", changes[key], fields[key].metadata.get("values"))
        sections[section] = dataclasses.replace(defaults[section], **changes)
    return schema(**sections)


def load(path: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Read `configs/name.py` or `configs/name.py:variant`, apply overrides, complete and validate.

    Args:
      path: a Python file with `get_config()` or, for variants, `get_config(variant)`.
      overrides: strings `section.key=value`; values are Python literals, or plain text.

    Raises:
      FileNotFoundError, ValueError: with what to do.
    """
    return from_dict(read(path, overrides, Config))


def read(path: str, overrides: typing.Sequence[str], schema: type) -> dict:
    """A config file with its overrides as nested dicts, not checked yet; see `load`."""
    path, variant = os.path.expanduser(path), ""
    if not Path(path).is_file() and ":" in path:
        path, _, variant = path.rpartition(":")
    if not Path(path).is_file():
        here = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.py"))) or "none in that folder"
        raise FileNotFoundError(f"No config file at '{path}'. Config files there: {here}.")
    values = _run(path, variant)
    override(values, overrides, path, schema)
    return values


def override(values: dict, overrides: typing.Sequence[str], path: str, schema: type) -> None:
    """Write overrides `section.key=value` into the nested `values` of the file `path`."""
    texts = {name for name, value in flatten(dataclasses.asdict(schema())).items() if isinstance(value, str)}
    command_line.apply(values, overrides, path, texts)


def _run(path: str, variant: str) -> dict:
    """Nested dicts that the file's `get_config` returns."""
    loader = importlib.machinery.SourceFileLoader("softmask_jax_config", path)
    module = types.ModuleType(loader.name)
    try:
        loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no config file: {error}.") from error
    if not callable(getattr(module, "get_config", None)):
        raise ValueError(f"'{path}' has no function get_config().")
    parameters = inspect.signature(module.get_config).parameters.values()
    if variant and not parameters:
        raise ValueError(f"'{path}' has no variants, so ':{variant}' means nothing; leave it away.")
    if not variant and any(p.default is p.empty for p in parameters):
        raise ValueError(f"'{path}' needs a variant: --config={path}:NAME; see the file's docstring.")
    values = module.get_config(variant) if variant else module.get_config()
    if not isinstance(values, ConfigDict):
        kind = type(values).__name__
        raise ValueError(f"get_config() of '{path}' must return an ml_collections.ConfigDict, not {kind}.")
    return values.to_dict()


def flatten(config: typing.Mapping, prefix: str = "") -> dict[str, typing.Any]:
    """`{"section.key": value}` of a nested mapping."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _typed(name: str, value, kind):
    """`value` as `kind`; an int may stand for a float, and a whole float for an int."""
    kinds = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if int in kinds and isinstance(value, float) and value.is_integer() and float not in kinds:
        value = int(value)
    allowed = tuple(typing.get_origin(one) or one for one in kinds)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(one.__name__ for one in allowed)
        raise ValueError(f"config.{name} must be {names}, but {value!r} is {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config.{name} must be a finite number, not {value}.")
    return value


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is '{close[0]}'" if close else f" (known: {', '.join(known)})"
