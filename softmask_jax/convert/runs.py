"""Opening the newest checkpoint of a run of this package: an MDLM, a fine-tuned base, or an adapter on one."""
from collections.abc import Mapping
from pathlib import Path

from softmask_jax import config as config_schema
from softmask_jax.convert import adapters
from softmask_jax.convert.key_tables import below
from softmask_jax.convert.model import FORMAT, Model, SCALARS, carried, keys_of, products_of
from softmask_jax.convert.orbax_files import OurTensors, stored_specs
from softmask_jax.convert.safe_files import read_json
from softmask_jax.convert.tensors import floats, joined, renamed, without
from softmask_jax.data import load_tokenizer
from softmask_jax.data.tokenizers.hub import NAME
from softmask_jax.io import tree_files
from softmask_jax.io.step_folders import step_folders
from softmask_jax.io.stored_arrays import literal
from softmask_jax.io.paths import to_path
from softmask_jax.models import families
from softmask_jax.models.keys import Products, SOFT_MASK


def open_run(path: Path, weights: str | None) -> Model:
    """The run in a folder, in float32; a base without an adapter in its `model.param_dtype`. weights: raw | ema; None
    is ema if there is one. FileNotFoundError without a checkpoint, ValueError for damage or a wrong config."""
    config = config_schema.from_dict(read_json(path, "config.json")).to_dict()
    model, soft = config["model"], config["soft_mask"]
    if soft["variant"] == "hidden":
        raise ValueError(f"{path} was trained with the soft-masking variant hidden, which has no converted form; use "
                         "the run's folder itself.")
    folder, step = _newest(path)
    if weights == "ema" and not (folder / "ema").exists():
        raise ValueError(f"--weights=ema: the run in {path} keeps no average; leave --weights away.")
    weights = weights or ("ema" if (folder / "ema").exists() else "raw")
    soft_mask = None if soft["variant"] == "none" else {"variant": soft["variant"], "k": soft["k"], "schedule": "none"}
    about = {"weights": weights, "step": step}
    kind, vocab_size, dtype = model["kind"], 0, "float32"
    if not families.of(kind).kind.from_base:
        tokenizer = load_tokenizer(path / "tokenizer")
        ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "mask_token_id", "vocab_size")}
        about, vocab_size = {"config": config, **ids, "hf_config": None} | about, tokenizer.vocab_size
    elif model["adapter"] != "none":
        products = products_of(kind)
        adapter = _adapter(model, folder / "params", products)
        hf_config = adapters.write_config(adapter, _origin(model["base"]), products)
        about = {"hf_config": hf_config, "soft_mask": soft_mask, "base_kind": kind} | about
        kind = "adapter"
    else:
        dtype, hf_config = model["param_dtype"], _hf_config(model["base"], kind, model["param_dtype"])
        about = {"hf_config": hf_config, "soft_mask": soft_mask} | about
        vocab_size = keys_of(kind).sizes(about)["V"]
    table = keys_of(kind).table(about)
    if kind == "adapter":
        table = below("adapter", table)
    params = OurTensors(folder / "params", below("backbone", table) + below("soft_mask", SOFT_MASK), vocab_size)
    backbone = OurTensors(folder / "ema", table, vocab_size) if weights == "ema" else without(params, SCALARS)
    tensors = floats(backbone, dtype)
    if soft_mask or "config" in about:
        tensors = joined(tensors, renamed(params, dict(zip(SCALARS, SCALARS))))
    return Model(kind, tensors, params.num_blocks, about, carried(path / "tokenizer"))


def _newest(path: Path) -> tuple[Path, int]:
    checkpoints = path / "checkpoints"
    step = max(step_folders(literal(checkpoints)).all(), default=None)
    if step is None:
        raise FileNotFoundError(f"{checkpoints} holds no checkpoint yet.")
    folder = checkpoints / str(step)
    try:
        tree_files.verify(folder, ("params", "ema"))
    except tree_files.Damaged as damage:
        message = f"The checkpoint {folder} is damaged: {damage}. Move it away to convert the one before."
        raise ValueError(message) from None
    return folder, step


def _adapter(model: Mapping, params: Path, products: Products) -> adapters.Adapter:
    """The adapter on the layers whose factors are stored."""
    names = {path.split("/")[-2] for path in stored_specs(params) if path.startswith("backbone/adapter/layers/")}
    targets = tuple(name for name in products.linear if name in names)
    if not targets:
        raise ValueError(f"{params} holds no adapter, though the run's config names one; has model.adapter changed?")
    return adapters.Adapter(model["adapter_rank"], model["adapter_alpha"], model["adapter"] == "dora", False, targets)


def _hf_config(base: str, kind: str, dtype: str) -> dict:
    """The base's config.json for weights in `dtype`."""
    about = read_json(to_path(base), "config.json")
    if about.get("format") != FORMAT or about.get("kind") != kind:
        raise ValueError(f"config.model.base: {base} is no converted model of kind {kind}; convert it again.")
    config = about["hf_config"]
    # "dtype" since transformers 5.
    return config | {name: dtype for name in ("torch_dtype", "dtype") if name in config}


def _origin(base: str) -> str:
    """The base's source, as PEFT names it; its folder if its manifest is gone."""
    try:
        source = str(read_json(to_path(base), "manifest.json").get("source", base))
    except (OSError, ValueError):
        return base
    return match["name"] if (match := NAME.fullmatch(source)) else source
