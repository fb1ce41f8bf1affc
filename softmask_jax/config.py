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
import types
import typing
from pathlib import Path

from ml_collections import ConfigDict

from softmask_jax import command_line, config_rules


@dataclasses.dataclass(frozen=True)
class Model:
    kind: str = "dit"
    hidden_size: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    cond_dim: int = 128
    mlp_ratio: int = 4
    dropout: float = 0.1
    rope_base: float = 1e4
    compute_dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """`variant`: topk | full | slerp | none. `p_sm`: probability of the two-pass step in training."""

    variant: str = "topk"
    k: int = 3
    p_sm: float = 0.8
    init_scale: float = 0.0
    init_centre: float = -0.75
    init_steepness: float = 6.66
    init_temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Objective:
    noise_eps: float = 1e-3
    t_eps: float = 1e-3
    stratified: bool = True


@dataclasses.dataclass(frozen=True)
class Data:
    """What is read, and how it becomes windows of tokens.

    `source` and `paths`: stdlib | files, jsonl, parquet (globs, comma-separated) | tfds, hf (`name:split`) | shards
    (folders that `softmask_jax.data.prepare` made) | mixture (`0.7 jsonl:web/*.jsonl; 0.3 stdlib`).
    `text_key`: the field that holds the text, in jsonl, parquet, tfds and hf. `separator` cuts each file into
    documents. `detokenizer`: "" | lm1b, undoes the spacing of a tokenized corpus.
    `tokenizer`: bytes | bpe (trained on the text) | text8 | shards (the one they were made with) | a file or folder of
    a tokenizer | hf://NAME.
    `validation_rule`: hash (`validation_fraction` of the documents, by content) | last (`validation_documents`) |
    paths (all of `validation_paths`, of the same kind as `paths`). `max_documents`: 0 is all. `cache_dir`: "" is the
    user's cache folder.
    """

    source: str = "stdlib"
    paths: str = ""
    text_key: str = "text"
    separator: str = ""
    detokenizer: str = ""
    tokenizer: str = "bytes"
    bpe_vocab_size: int = 4096
    seq_len: int = 1024
    validation_rule: str = "hash"
    validation_fraction: float = 0.05
    validation_documents: int = 0
    validation_paths: str = ""
    max_documents: int = 0
    cache_dir: str = ""
    prefetch: int = 2


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """`schedule`: constant | cosine, after a linear warm-up of `warmup_steps` whose first update is null."""

    learning_rate: float = 3e-4
    sm_learning_rate: float = 1e-2
    schedule: str = "constant"
    warmup_steps: int = 2500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    ema_decay: float = 0.9999


@dataclasses.dataclass(frozen=True)
class Train:
    """`micro_batches`: gradient accumulation, the coin of soft-masking is thrown once for each.

    `budget`: what `steps` updates of a binary run are worth to a soft-masked one: as many (iso_update), half as many
    (iso_compute_paper), or what the same FLOPs pay for (iso_flops); see `Config.updates`. `wandb`: a Weights & Biases
    project, "" is none.
    """

    steps: int = 1_000_000
    budget: str = "iso_update"
    global_batch_size: int = 512
    micro_batches: int = 1
    seed: int = 1
    log_every: int = 50
    compilation_cache: str = ""
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis; one axis may be -1 (all that are left)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every: int = 5000
    keep: int = 3
    keep_best: int = 1


@dataclasses.dataclass(frozen=True)
class Eval:
    """`every` 0: only at the end. `max_windows` 0: the whole validation split at the end of the run."""

    every: int = 5000
    batch_size: int = 64
    windows: int = 512
    max_windows: int = 0
    seed: int = 20_000


@dataclasses.dataclass(frozen=True)
class Sample:
    """`every` 0: only at the end. `length` 0: the training length."""

    every: int = 5000
    count: int = 4
    steps: int = 128
    length: int = 0
    nucleus_p: float = 0.9
    seed: int = 30_000


@dataclasses.dataclass(frozen=True)
class Init:
    """`checkpoint`: a run's folder to start from; `weights`: raw | ema (the better start)."""

    checkpoint: str = ""
    weights: str = "ema"


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
        """How many updates the run makes: `train.steps` of a binary run, and of a soft-masked one what its budget buys.

        The paper (section 4) counts an SM update as two and halves the steps; by FLOPs a plain update costs 3 forward
        passes, a soft-masked one 3 + p_sm.
        """
        share = {
            "iso_update": 1.0,
            "iso_compute_paper": 0.5,
            "iso_flops": 3.0 / (3.0 + self.soft_mask.p_sm),
        }[self.train.budget]
        return self.train.steps if self.soft_mask.variant == "none" else max(1, round(share * self.train.steps))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


def from_dict(values: typing.Mapping) -> Config:
    """Complete and validate a (partial) nested mapping.

    Raises:
      ValueError: an unknown section or key (the nearest known one is named), a wrong type or an impossible value.
    """
    sections = {}
    known = {f.name: f.type for f in dataclasses.fields(Config)}
    for section, entries in dict(values).items():
        if section not in known:
            raise ValueError(f"config: there is no section '{section}'{_nearest(section, known)}.")
        if not isinstance(entries, (typing.Mapping, ConfigDict)):
            raise ValueError(f"config.{section} must be a section with keys, not {entries!r}.")
        fields = {f.name: f.type for f in dataclasses.fields(known[section])}
        for key, value in dict(entries).items():
            if key not in fields:
                raise ValueError(f"config.{section} has no key '{key}'{_nearest(key, fields)}.")
        sections[section] = known[section](
            **{key: _typed(f"{section}.{key}", value, fields[key]) for key, value in dict(entries).items()}
        )
    config = Config(**sections)
    config_rules.check(flatten(config.to_dict()))
    return config


def load(spec: str, overrides: typing.Sequence[str] = ()) -> Config:
    """Read `configs/name.py` or `configs/name.py:variant`, apply overrides, complete and validate.

    Args:
      spec: path of a Python file with `get_config()` or, for variants, `get_config(variant)`.
      overrides: strings `section.key=value`; values are Python literals, or plain text.

    Raises:
      FileNotFoundError, ValueError: with what to do.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        here = ", ".join(sorted(str(p) for p in Path(path).parent.glob("*.py"))) or "none in that folder"
        raise FileNotFoundError(f"No config file at '{path}'. Config files there: {here}.")
    values = _run(path, variant)
    command_line.apply(values, overrides, path)
    return from_dict(values)


def _run(path: str, variant: str) -> dict:
    """What the file's `get_config` returns, as nested dicts."""
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
        raise ValueError(f"get_config() of '{path}' must return an ml_collections.ConfigDict, not {type(values).__name__}.")
    return values.to_dict()


def flatten(config: typing.Mapping, prefix: str = "") -> dict[str, typing.Any]:
    """`{"section.key": value}` of a nested mapping."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _typed(name: str, value, kind):
    """`value` as `kind`; an int where a float is wanted is fine, anything else of another type is not."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    allowed = kind.__args__ if isinstance(kind, types.UnionType) else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        wanted = " or ".join(k.__name__ for k in allowed)
        raise ValueError(f"config.{name} must be {wanted}, but {value!r} is {type(value).__name__}.")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config.{name} must be a finite number, not {value}.")
    return value


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; the nearest is '{close[0]}'" if close else f" (known: {', '.join(known)})"
