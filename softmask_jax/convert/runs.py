"""Opens a run of this package, its newest checkpoint: an MDLM, a Dream, or an adapter on one."""
import os
from collections.abc import Mapping
from pathlib import Path

from softmask_jax import config as config_schema
from softmask_jax.convert import adapters, dream, mdlm
from softmask_jax.convert.key_tables import Entry, below
from softmask_jax.convert.model import FORMAT, Model, SCALARS, carried
from softmask_jax.convert.orbax_files import OurTensors, stored_specs
from softmask_jax.convert.safe_files import read_json
from softmask_jax.convert.tensors import Floats, Joined, Renamed, Tensors
from softmask_jax.data import load_tokenizer
from softmask_jax.data.tokenizers.hub import NAME
from softmask_jax.io import tree_files


def open_run(path: Path, weights: str | None) -> Model:
    """The run in a folder. What trained was float32; a Dream without an adapter gets its config's `model.param_dtype`.

    Args:
      weights: raw | ema; None is ema, unless the run has none.

    Raises:
      FileNotFoundError: no checkpoint yet. ValueError: a damaged one, or one that its config does not describe.
    """
    config = config_schema.from_dict(read_json(path, "config.json")).to_dict()
    folder, step = _newest(path)
    if weights == "ema" and not (folder / "ema").exists():
        raise ValueError(f"--weights=ema: the run in {path} keeps no average; leave --weights away.")
    weights = weights or ("ema" if (folder / "ema").exists() else "raw")
    more = {"weights": weights, "step": step}
    soft = config["soft_mask"]
    soft_mask = None if soft["variant"] == "none" else {"variant": soft["variant"], "k": soft["k"], "schedule": "none"}
    kind, vocab_size, table, dtype = config["model"]["kind"], 0, mdlm.BACKBONE, "float32"
    if kind == "dit":
        tokenizer = load_tokenizer(path / "tokenizer")
        vocab_size = tokenizer.vocab_size
        ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "mask_token_id", "vocab_size")}
        about = {"config": config, **ids, "hf_config": None}
    elif config["model"]["adapter"] != "none":
        kind, found = "adapter", _adapter(config["model"], folder / "params")
        table = below("adapter", dream.adapter_table(found.targets, found.use_dora))
        about = {"hf_config": adapters.write_config(found, _origin(config["model"]["base"])), "soft_mask": soft_mask}
    else:
        table = dream.BACKBONE
        dtype = config["model"]["param_dtype"]
        about = {"hf_config": _hf_config(config["model"]["base"], dtype), "soft_mask": soft_mask}
        vocab_size = about["hf_config"]["vocab_size"]
    tensors = _tensors(folder, table, weights, vocab_size, dtype)
    if kind != "dit" and soft_mask is None:
        kept = [key for key in tensors.specs if key not in SCALARS]
        tensors = Renamed(tensors, dict(zip(kept, kept)))
    blocks = max(
        len(shape) and shape[0] for name, (_, shape) in stored_specs(folder / "params").items() if _stacked(name, table)
    )
    return Model(kind, tensors, blocks, about | more, carried(path / "tokenizer"))


def checked(tensors: OurTensors) -> OurTensors:
    """The same. Raises ValueError naming every array that is missing, unexpected or misshapen."""
    problems = tensors.problems + [f"unexpected: {path}" for path in tensors.others]
    if problems:
        raise ValueError(f"The parameters in {tensors.folder} are of another model:\n  " + "\n  ".join(problems))
    return tensors


def _newest(path: Path) -> tuple[Path, int]:
    steps = [int(folder.name) for folder in (path / "checkpoints").iterdir() if folder.name.isdecimal()]
    if not steps:
        raise FileNotFoundError(f"{path / 'checkpoints'} holds no checkpoint yet.")
    folder = path / "checkpoints" / str(max(steps))
    try:
        tree_files.verify(folder, ("params", "ema"))
    except tree_files.Damaged as damage:
        raise ValueError(
            f"The checkpoint {folder} is damaged: {damage}. Move it away to convert the one before."
        ) from None
    return folder, max(steps)


def _tensors(folder: Path, table: tuple[Entry, ...], weights: str, vocab_size: int, dtype: str) -> Tensors:
    """The backbone's raw or averaged tensors in `dtype` with the raw soft-masking scalars."""
    entries = below("backbone", table) + below("soft_mask", mdlm.SOFT_MASK)
    params = checked(OurTensors(folder / "params", entries, vocab_size))
    backbone: Tensors = Renamed(params, {key: key for key in params.specs if key not in SCALARS})
    if weights == "ema":
        backbone = checked(OurTensors(folder / "ema", table, vocab_size))
    return Joined(Floats(backbone, dtype), Renamed(params, dict(zip(SCALARS, SCALARS))))


def _stacked(name: str, table: tuple[Entry, ...]) -> bool:
    return any(entry.stacked and name == f"backbone/{entry.path}" for entry in table)


def _adapter(model: Mapping, params: Path) -> adapters.Adapter:
    """The layers that have one are those that were stored."""
    names = {path.split("/")[-2] for path in stored_specs(params) if path.startswith("backbone/adapter/layers/")}
    targets = tuple(name for name in dream.LINEAR if name in names)
    if not targets:
        raise ValueError(
            f"{params} holds no adapter, though the run's config names one; was its model.adapter changed?"
        )
    return adapters.Adapter(model["adapter_rank"], model["adapter_alpha"], model["adapter"] == "dora", False, targets)


def _hf_config(base: str, dtype: str) -> dict:
    """The base's config.json for weights in `dtype`."""
    found = read_json(Path(os.path.expanduser(base)), "config.json")
    if found.get("format") != FORMAT or found.get("kind") != "dream":
        raise ValueError(f"config.model.base: {base} is no converted Dream model; convert it again.")
    kept = found["hf_config"]
    # transformers 5 calls it "dtype".
    return kept | {name: dtype for name in ("torch_dtype", "dtype") if name in kept}


def _origin(base: str) -> str:
    """What the base was converted from, as PEFT names it; the folder itself, if that is gone."""
    try:
        source = str(read_json(Path(os.path.expanduser(base)), "manifest.json").get("source", base))
    except (OSError, ValueError):
        return base
    return match["name"] if (match := NAME.fullmatch(source)) else source
