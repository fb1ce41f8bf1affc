"""The config of a run: its schema, reading, overriding and checking.

A file in `configs/` returns an `ml_collections.ConfigDict` of what differs from the defaults: the paper's 169M recipe
(arXiv 2510.17206, appendix; MDLM, arXiv 2406.07524)."""
import ast
import dataclasses
import difflib
import importlib.machinery
import inspect
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from softmask_jax.config import keys, rules
from softmask_jax.config.sections import (
    Checkpoint, Data, Eval, Init, Mesh, Model, Objective, Optimizer, Sample, SoftMask, Texts, Train,
)


FOLDER = "configs"
# The longest warm-up where `train.epochs` decides, as a share of the updates; that of the paper's fine-tuning.
WARMUP_SHARE = 0.03


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
        """`train.updates` of a run that has begun; else what the budget buys for `train.steps`, from the layers'
        products alone."""
        return self.train.updates or self.bought(layer_passes(self.model))

    @property
    def counted(self) -> bool:
        """Whether `updates` is that of the run: `train.epochs` are counted in its data first."""
        return bool(self.train.updates or not self.train.epochs)

    @property
    def schedule(self) -> Optimizer:
        """The optimiser, its warm-up with `train.epochs` at most WARMUP_SHARE of the updates."""
        if not self.train.epochs:
            return self.optimizer
        longest = round(WARMUP_SHARE * self.updates)
        return dataclasses.replace(self.optimizer, warmup_steps=min(self.optimizer.warmup_steps, longest))

    @property
    def longest_row(self) -> int:
        """In tokens; rows of conversations may be shorter."""
        return self.data.max_tokens if self.data.source == "chat" else self.data.seq_len

    def bought(self, plain: float) -> int:
        """Updates that the budget buys: iso_compute_paper halves them (paper, section 4); iso_flops keeps the FLOPs, an
        update costing `plain` forward passes, and p_sm more with soft-masking."""
        shares = {"iso_update": 1.0, "iso_compute_paper": 0.5, "iso_flops": plain / (plain + self.soft_mask.p_sm)}
        steps = self.train.steps
        return steps if self.soft_mask.variant == "none" else max(1, round(shares[self.train.budget] * steps))

    def with_updates(self, updates: int) -> "Config":
        return dataclasses.replace(self, train=dataclasses.replace(self.train, updates=updates))

    def with_steps(self, steps: int) -> "Config":
        """`train.steps` of `train.epochs`; what the budget buys for them is open again."""
        return dataclasses.replace(self, train=dataclasses.replace(self.train, steps=steps, updates=0))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def layer_passes(model: Model) -> int:
    """Forward passes that a plain update costs: forward, backward (2, or 1 on a frozen base), and `remat` "full"."""
    return 2 + (model.adapter == "none") + (model.remat == "full")


def of_run(values: Mapping) -> Config:
    """A run's config.json, with the number of its updates (without train.updates: iso_flops at 3 forward passes each);
    ValueError as `from_dict`."""
    config = from_dict(values)
    return config.with_updates(config.train.updates or config.bought(3.0))


def begun(config: Config, stored: Mapping | None) -> Config:
    """`config` with the updates of its run, whose config.json is `stored`, while steps or epochs, and budget, are the
    same."""
    if stored is None or config.train.updates:
        return config
    old = of_run(stored)
    if config.train.epochs and config.train.epochs == old.train.epochs:
        config = config.with_steps(old.train.steps)
    now, then = (
        (c.train.steps, c.train.epochs, c.train.budget, c.soft_mask.variant, c.soft_mask.p_sm) for c in (config, old)
    )
    return config.with_updates(old.updates) if now == then else config


def from_dict(values: Mapping) -> Config:
    """Complete and validate a (partial) nested mapping. ValueError, one line: unknown name, wrong type or value."""
    config = complete(values, Config)
    rules.check(config)
    return config


def complete(values: Mapping, schema: type):
    """A (partial) nested mapping as `schema`, a dataclass of dataclasses; ValueError as `from_dict`."""
    sections = {section.name: section.default for section in dataclasses.fields(schema)}
    for name, entries in dict(values).items():
        if name not in sections:
            raise ValueError(f"config: there is no section '{name}'{_nearest(name, sections)}.")
        if not isinstance(entries, (Mapping, ConfigDict)):
            raise ValueError(f"config.{name} must be a section with keys, not {entries!r}.")
        sections[name] = _section(name, dict(entries), sections[name])
    return schema(**sections)


def _section(section: str, entries: dict, defaults):
    fields, changes = {field.name: field for field in dataclasses.fields(defaults)}, {}
    for key, value in entries.items():
        if key not in fields:
            raise ValueError(f"config.{section} has no key '{key}'{_nearest(key, fields)}.")
        changes[key] = _typed(f"{section}.{key}", value, fields[key].type)
        keys.check(f"{section}.{key}", changes[key], fields[key].metadata.get("values"))
    return dataclasses.replace(defaults, **changes)


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read `FILE[:variant]` or `NAME[:variant]` (see `located`), which defines `get_config()` or `get_config(variant)`;
    apply overrides, strings `section.key=value` with Python literals or plain text; complete and validate.
    FileNotFoundError, ValueError."""
    return from_dict(read(path, overrides, Config))


def read(path: str, overrides: Sequence[str], schema: type) -> dict:
    """A config file with its overrides as nested dicts, not checked yet; see `load`."""
    path, variant = located(path)
    values = _run(path, variant)
    override(values, overrides, path, schema)
    return values


def located(path: str) -> tuple[str, str]:
    """(file, variant) of `FILE[:variant]` or `NAME[:variant]`, "" for none: a file, or a name in `folders`.
    FileNotFoundError, naming what there is."""
    path, variant = os.path.expanduser(path), ""
    if not _file(path) and ":" in path:
        path, _, variant = path.rpartition(":")
    if file := _file(path):
        return file, variant
    folder = os.path.dirname(path)
    if folder and os.path.isdir(folder):
        known = sorted(str(file) for file in Path(folder).glob("*.py"))
        raise FileNotFoundError(f"No config file at '{path}'. Config files there: {', '.join(known) or 'none'}.")
    raise FileNotFoundError(f"There is no config '{path}'. Configs: {', '.join(names()) or 'none'}; or give a file.")


def _file(path: str) -> str:
    """The config file that `path` names, "" if none does. An installed package's configs stand for a missing folder."""
    if os.path.isfile(path):
        return path
    folder, name = os.path.split(path)
    if folder and (os.path.isdir(folder) or os.path.basename(folder) != FOLDER):
        return ""
    files = (os.path.join(folder, f"{name.removesuffix('.py')}.py") for folder in folders())
    return next(filter(os.path.isfile, files), "")


def folders() -> list[str]:
    """Folders of configs that have a name: `configs` here, and the package's (beside it in a checkout)."""
    package = Path(__file__).parent.parent
    here = [FOLDER] if os.path.isdir(FOLDER) else []
    return here + [str(folder) for folder in (package / FOLDER, package.parent / FOLDER) if folder.is_dir()][:1]


def names() -> list[str]:
    """Names of all configs in `folders`."""
    return sorted({file.stem for folder in folders() for file in Path(folder).glob("*.py")})


def override(values: dict, overrides: Iterable[str], path: str, schema: type) -> None:
    """Write `section.key=value` into the nested `values` of the file `path`. ValueError for another form."""
    defaults = flatten(dataclasses.asdict(schema()))
    for word in overrides:
        name, equals, text = word.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            raise ValueError(f"'--config.{word}' is not of the form --config.section.key=value.")
        if not isinstance(values.setdefault(section, {}), dict):
            raise ValueError(f"config.{section} in '{path}' is not a section.")
        value = _literal(text)
        # Text may look like a number.
        is_text = isinstance(defaults.get(name), str) and not isinstance(value, str)
        values[section][key] = text if is_text else value


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _run(path: str, variant: str) -> dict:
    """Nested dicts that the file's `get_config` returns."""
    loader = importlib.machinery.SourceFileLoader("softmask_jax_config", path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    try:
        loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is no config file: {error}.") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"'{path}' has no function get_config().")
    parameters = inspect.signature(get_config).parameters.values()
    if variant and not parameters:
        raise ValueError(f"'{path}' has no variants, so ':{variant}' means nothing; leave it away.")
    if not variant and any(p.default is p.empty for p in parameters):
        raise ValueError(f"'{path}' needs a variant: --config={path}:NAME; see the file's docstring.")
    values = get_config(*([variant] if variant else []))
    if not isinstance(values, ConfigDict):
        kind = type(values).__name__
        raise ValueError(f"get_config() of '{path}' must return an ml_collections.ConfigDict, not {kind}.")
    return values.to_dict()


def flatten(config: Mapping, prefix: str = "") -> dict:
    """`{"section.key": value}` of a nested mapping."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _typed(name: str, value, kind):
    """`value` as `kind`; an int may stand for a float, and a whole float for an int."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if float in kinds and type(value) is int:
        value = float(value)
    elif int in kinds and float not in kinds and isinstance(value, float) and value.is_integer():
        value = int(value)
    allowed = tuple(typing.get_origin(one) or one for one in kinds)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(one.__name__ for one in allowed)
        raise ValueError(f"config.{name} must be {names}, but {value!r} is {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config.{name} must be a finite number, not {value}.")
    return value


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is '{close[0]}'" if close else f" (known: {', '.join(known)})"
