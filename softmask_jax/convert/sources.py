"""Opens what can be converted: Hugging Face's folders, PEFT's, Lightning's checkpoints, our models and our runs."""
from pathlib import Path

from softmask_jax.convert import adapters, dream, lightning
from softmask_jax.convert.key_tables import count_blocks
from softmask_jax.convert.model import (
    FORMAT,
    KINDS,
    VERSION,
    Model,
    carried,
    check_heads,
    dit_about,
    dit_tensors,
    entries,
    with_scalars,
)
from softmask_jax.convert.orbax_files import OurTensors, stored_specs
from softmask_jax.convert.runs import checked, open_run
from softmask_jax.convert.safe_files import inside, read_json
from softmask_jax.convert.safetensors_files import SafetensorsFolder
from softmask_jax.convert.tensors import Float32, Renamed, Tensors

ADAPTER_FILE, ADAPTER_CONFIG, TRANSPARENCY = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "transparency_config.json",
)
WANTED = (
    "give a Hugging Face folder (config.json with safetensors), a PEFT adapter, a Lightning .ckpt, a converted model "
    "or a run's folder"
)


def open_model(path: Path, weights: str | None = None) -> Model:
    """Whatever lies at `path`, its tensors still unread and unchecked (`Model.table` checks them).

    Args:
      weights: raw | ema, where there are both; None is ema if there is one.

    Raises:
      FileNotFoundError, ValueError: nothing that can be converted; one line that says what to do.
    """
    if not path.exists():
        raise FileNotFoundError(f"--src: {path} does not exist; {WANTED}, or hf://owner/name.")
    if path.is_file():
        if path.suffix == ".safetensors":
            return open_model(path.parent, weights)
        return _lightning(inside(path.parent, path.name), weights)
    if (path / "checkpoints").is_dir():
        return open_run(path, weights)
    if (path / ADAPTER_CONFIG).exists():
        return _only(_adapter(path), weights)
    if (path / "config.json").exists():
        config = read_json(path, "config.json")
        if config.get("format") == FORMAT:
            return _ours(path, config, weights)
        known = {"dream": _dream, "mdlm": _mdlm}
        if (kind := str(config.get("model_type")).lower()) not in known:
            raise ValueError(f"{path / 'config.json'}: model_type is {kind!r:.60}; Dream and mdlm can be converted.")
        return _only(known[kind](path, config), weights)
    checkpoints = sorted(path.glob("*.ckpt"))
    if len(checkpoints) == 1:
        return _lightning(inside(path, checkpoints[0].name), weights)
    raise ValueError(f"--src: {path} holds nothing that can be converted; {WANTED}.")


def read_ours(path: Path) -> dict:
    """config.json of a converted model. Raises ValueError, FileNotFoundError."""
    config = read_json(path, "config.json")
    if config.get("format") != FORMAT or config.get("version") != VERSION or config.get("kind") not in KINDS:
        raise ValueError(f"{path} is no converted model of this version; convert its source again.")
    return config


def _only(model: Model, weights: str | None) -> Model:
    if weights == "ema":
        raise ValueError("--weights=ema: this source holds one set of weights; leave --weights away.")
    return model


def _lightning(path: Path, weights: str | None) -> Model:
    tensors, found = lightning.read(path, weights)
    wide, soft, head_width = dit_tensors(tensors)
    about = lightning.describe(found, wide.specs, head_width, soft)
    check_heads(about["config"]["model"]["num_heads"], about["config"]["model"]["hidden_size"], head_width)
    return Model("dit", wide, about["config"]["model"]["num_blocks"], about)


def _mdlm(path: Path, config: dict) -> Model:
    folder = SafetensorsFolder(path)
    wide, soft, head_width = dit_tensors(folder)
    names = {"hidden_dim": "hidden_size", "cond_dim": "cond_dim", "n_blocks": "num_blocks", "n_heads": "num_heads"}
    if absent := [name for name in (*names, "vocab_size") if type(config.get(name)) is not int]:
        raise ValueError(f"{path / 'config.json'}: {', '.join(absent)} must be given as a number.")
    if config.get("time_conditioning"):
        raise ValueError(f"{path / 'config.json'}: time_conditioning is on; the MDLM that is built here has none.")
    model = {ours: config[theirs] for theirs, ours in names.items()} | {"dropout": config.get("dropout", 0.1)}
    variant = adapters.VARIANTS.get(config.get("transparency_alg"), "topk") if soft else "none"
    about = dit_about(
        model, {"variant": variant, "k": config.get("mixinputs_k", 3)}, config["vocab_size"],
        seq_len=config.get("model_length", 1024), hf_config=config,
    )  # fmt: skip
    check_heads(model["num_heads"], model["hidden_size"], head_width)
    return Model("dit", wide, model["num_blocks"], about, carried(path), folder.files)


def _dream(path: Path, config: dict) -> Model:
    dream.sizes(config)
    folder, soft_mask, tensors = SafetensorsFolder(path), None, None
    tensors = folder
    if (path / TRANSPARENCY).exists():
        soft_mask, raw = adapters.read_transparency(read_json(path, TRANSPARENCY))
        tensors = with_scalars(folder, raw)
    about = {"hf_config": config, "soft_mask": soft_mask}
    return Model("dream", tensors, config["num_hidden_layers"], about, carried(path), folder.files)


def _adapter(path: Path) -> Model:
    config = read_json(path, ADAPTER_CONFIG)
    adapter = adapters.read_config(config)
    if not (path / ADAPTER_FILE).exists() and (path / "adapter_model.bin").exists():
        raise ValueError(f"{path}: adapter_model.bin is a pickle; save the adapter as {ADAPTER_FILE} (PEFT's default).")
    folder, soft_mask = SafetensorsFolder(path, ADAPTER_FILE), None
    tensors: Tensors = Float32(Renamed(folder, adapters.canonical_keys(folder.specs)))
    blocks = count_blocks(dream.adapter_table(adapter.targets, adapter.use_dora), tensors.specs)
    if (path / TRANSPARENCY).exists():
        soft_mask, raw = adapters.read_transparency(read_json(path, TRANSPARENCY))
        tensors = with_scalars(tensors, raw)
    return Model("adapter", tensors, blocks, {"hf_config": config, "soft_mask": soft_mask}, carried(path))


def _ours(path: Path, config: dict, weights: str | None) -> Model:
    config = read_ours(path)
    about = {name: value for name, value in config.items() if name not in ("format", "version", "kind")}
    if weights is not None and weights != about.get("weights"):
        raise ValueError(f"--weights={weights}: {path} holds one set of weights; leave --weights away.")
    if config["kind"] == "dream":
        dream.sizes(about["hf_config"])
    stored = stored_specs(path / "params")
    scalars = any(name.startswith("soft_mask/") for name in stored)
    vocab_size = about["hf_config"]["vocab_size"] if config["kind"] == "dream" else about.get("vocab_size", 0)
    tensors = checked(OurTensors(path / "params", entries(config["kind"], about, scalars), vocab_size))
    placed = about.pop("placed", None)
    return Model(config["kind"], tensors, tensors.num_blocks, about, carried(path / "tokenizer"), placed)
