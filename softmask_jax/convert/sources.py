"""Opening models to convert: folders of Hugging Face and PEFT, Lightning checkpoints, our models and runs."""
import re
from pathlib import Path

from softmask_jax.convert import adapters, lightning
from softmask_jax.convert.key_tables import count_blocks
from softmask_jax.convert.model import (
    FORMAT, VERSION, Model, carried, dit_about, dit_tensors, entries, keys_of, products_of, with_scalars,
)
from softmask_jax.convert.orbax_files import OurTensors, stored_specs
from softmask_jax.convert.runs import open_run
from softmask_jax.convert.safe_files import inside, read_json
from softmask_jax.convert.safetensors_files import SINGLE, SafetensorsFolder
from softmask_jax.convert.tensors import Tensors, floats, renamed
from softmask_jax.convert.wrappers import own_keys, without_wrappers
from softmask_jax.diffusion import transparency
from softmask_jax.io.runs import is_run
from softmask_jax.models import families
from softmask_jax.models.keys import dit
from softmask_jax.models.nn import dream_config
from softmask_jax.models.nn.config_fields import TRANSFORMERS, check_unknown, check_values, is_off

# Keys of a converted model's config.json.
ENTRIES = (
    "base_dtype", "base_kind", "bos_id", "config", "eos_id", "format", "hf_config", "kind", "mask_token_id", "placed",
    "soft_mask", "step", "version", "vocab_size", "weights",
)  # fmt: skip
# Where Lightning and Hydra leave checkpoints.
CHECKPOINTS = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "lightning_logs/*/checkpoints/*.ckpt")
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", adapters.FILE
TRANSPARENCY = "transparency_config.json"
MDLM_SIZES = {"hidden_dim": "hidden_size", "cond_dim": "cond_dim", "n_blocks": "num_blocks", "n_heads": "num_heads"}
MDLM_KNOWN = {
    *MDLM_SIZES, *lightning.METHOD, *TRANSFORMERS, "dropout", "mixinputs_k", "model_length", "transparency_alg",
    "vocab_size",
}  # fmt: skip
SOURCES = "give a folder of Hugging Face or PEFT (safetensors), a Lightning .ckpt, a converted model or a run's folder"


def open_model(path: Path, weights: str | None = None) -> Model:
    """The model at `path`, its tensors unread and unchecked (`Model.table` checks them).
    weights: raw | ema; None is ema where there are both. FileNotFoundError or ValueError, one line with a remedy."""
    if not path.exists():
        raise FileNotFoundError(f"--src: {path} does not exist; {SOURCES}, or hf://owner/name.")
    if path.suffix == ".safetensors" and path.is_file():
        path = path.parent
    if path.is_file():
        return lightning.open_checkpoint(inside(path.parent, path.name), weights)
    if is_run(path):
        return open_run(path, weights)
    adapter = (path / ADAPTER_CONFIG).exists()
    if not adapter and (path / "config.json").exists() and read_json(path, "config.json").get("format") == FORMAT:
        return _ours(path, weights)
    if adapter or (path / "config.json").exists():
        if weights == "ema":
            raise ValueError("--weights=ema: this source holds one set of weights; leave --weights away.")
        kind = check_configs(path)
        return {"adapter": _adapter, "mdlm": _mdlm}[kind](path) if kind in ("adapter", "mdlm") else _base(path, kind)
    files = [file for pattern in CHECKPOINTS for file in sorted(path.glob(pattern)) if file.is_file()]
    # A link such as last.ckpt does not count.
    if len({file.resolve() for file in files}) == 1:
        file = min(files, key=Path.is_symlink)
        return lightning.open_checkpoint(inside(file.parent, file.name), weights)
    if files:
        names = [str(file.relative_to(path)) for file in files]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        raise ValueError(f"--src: {path} holds several checkpoints ({', '.join(names[:10])}{more}); give one of them.")
    raise ValueError(f"--src: {path} holds nothing that can be converted; {SOURCES}.")


def check_configs(path: Path) -> str:
    """Kind of a Hugging Face folder, by its configs: a family with a base, mdlm or adapter. ValueError for others."""
    if (path / ADAPTER_CONFIG).exists():
        return "adapter"
    config, file = read_json(path, "config.json"), str(path / "config.json")
    kind = str(config.get("model_type")).lower()
    bases = {family.published.model_type: name for name, family in families.FAMILIES.items() if family.published}
    if kind in bases:
        published = families.of(bases[kind]).published
        published.network(config)
        dream_config.special_ids(config)
        check_unknown(config, file, published.known)
        return bases[kind]
    if kind == "mdlm":
        if absent := [name for name in (*MDLM_SIZES, "vocab_size") if type(config.get(name)) is not int]:
            raise ValueError(f"{file}: {', '.join(absent)} must be given as a number.")
        check_values(config, file, lightning.METHOD)
        check_unknown(config, file, MDLM_KNOWN)
        return kind
    raise ValueError(f"{file}: model_type is {kind!r:.60}; {', '.join(bases)} and mdlm can be converted.")


def read_ours(path: Path) -> dict:
    """config.json of a converted model. Raises ValueError, FileNotFoundError."""
    config = read_json(path, "config.json")
    is_ours, version = config.get("format") == FORMAT, config.get("version")
    newer = [f"version {version}"] if type(version) is int and version > VERSION else []
    newer += [name for name in config if name not in ENTRIES and not is_off(config[name])]
    if is_ours and newer:
        remedy = "update the package, or convert its source again."
        raise ValueError(f"{path} was converted by a newer version of softmask_jax ({', '.join(newer):.100}); {remedy}")
    if not is_ours or version != VERSION or config.get("kind") not in (*families.FAMILIES, "adapter"):
        raise ValueError(f"{path} is no converted model of this version; convert its source again.")
    check_values(config, str(path / "config.json"), {"base_dtype": ("float", "int8")})
    return config


def _mdlm(path: Path) -> Model:
    config = read_json(path, "config.json")
    folder, placed, notes = _unwrapped(path, own_keys(*dit.KEYS.roots))
    wide, soft, head_width = dit_tensors(folder)
    model = {ours: config[theirs] for theirs, ours in MDLM_SIZES.items()} | {"dropout": config.get("dropout", 0.1)}
    variant = transparency.variant(config.get("transparency_alg") or "mixinputs_with_topk") if soft else "none"
    soft_mask = {"variant": variant, "k": transparency.feedback_tokens(config.get("mixinputs_k") or 3)}
    seq_len = config.get("model_length", 1024)
    about = dit_about(model, soft_mask, config["vocab_size"], head_width, seq_len=seq_len, hf_config=config)
    return Model("dit", wide, model["num_blocks"], about, carried(path), placed, notes)


def _base(path: Path, kind: str) -> Model:
    config, family = read_json(path, "config.json"), families.of(kind)
    tensors, placed, notes = _unwrapped(path, own_keys(*family.keys.roots))
    tensors, soft_mask = _soft_masked(tensors, path)
    about, layers = {"hf_config": config, "soft_mask": soft_mask}, family.published.network(config).num_layers
    return Model(kind, tensors, layers, about, carried(path), placed, notes)


def _adapter(path: Path) -> Model:
    if not (path / ADAPTER_FILE).exists() and (path / "adapter_model.bin").exists():
        raise ValueError(f"{path}: adapter_model.bin is a pickle; save the adapter as {ADAPTER_FILE} (PEFT's default).")
    takers = [name for name, family in families.FAMILIES.items() if family.keys and family.keys.products]
    roots = (root for name in takers for root in keys_of(name).roots)
    folder, _, notes = _unwrapped(path, own_keys(*roots), ADAPTER_FILE)
    tensors = floats(renamed(folder, adapters.canonical_keys(folder.specs)))
    block = {name: f"base_model.model.{products_of(name).block.split('{i}')[0]}" for name in takers}
    kinds = (name for name in takers if any(key.startswith(block[name]) for key in tensors.specs))
    kind, config = next(kinds, takers[0]), read_json(path, ADAPTER_CONFIG)
    products = products_of(kind)
    adapters.check_namesakes(config, tensors.specs, products)
    config = adapters.with_listed_targets(config, tensors.specs, products)
    adapter, config = adapters.read_config(config, products), adapters.without_namesakes(config, products)
    blocks = count_blocks(products.adapter(adapter.targets, adapter.use_dora), tensors.specs)
    tensors, soft_mask = _soft_masked(tensors, path)
    about = {"hf_config": config, "soft_mask": soft_mask, "base_kind": kind}
    return Model("adapter", tensors, blocks, about, carried(path), notes=notes)


def _unwrapped(path: Path, network: re.Pattern, file: str = SINGLE) -> tuple[Tensors, dict, tuple[str, ...]]:
    """The folder's tensors under the network's own keys, the file of each, and a note of what was removed."""
    folder = SafetensorsFolder(path, file)
    names, note = without_wrappers(folder.specs, network, str(path))
    return renamed(folder, names), {new: folder.files[old] for new, old in names.items()}, (note,) if note else ()


def _soft_masked(tensors: Tensors, path: Path) -> tuple[Tensors, dict | None]:
    """The tensors with the scalars of transparency_config.json, and its settings, if it has soft-masking."""
    if not (path / TRANSPARENCY).exists():
        return tensors, None
    try:
        soft_mask, raw = transparency.read(read_json(path, TRANSPARENCY))
    except ValueError as error:
        raise ValueError(f"{path / TRANSPARENCY}: {error}") from None
    return (tensors, None) if raw is None else (with_scalars(tensors, raw), soft_mask)


def _ours(path: Path, weights: str | None) -> Model:
    about = read_ours(path)
    kind, placed = about["kind"], about.pop("placed", None)
    about = {name: value for name, value in about.items() if name not in ("format", "version", "kind")}
    if weights not in (None, about.get("weights")):
        raise ValueError(f"--weights={weights}: {path} holds one set of weights; leave --weights away.")
    vocab_size = keys_of(kind).sizes(about).get("V", 0)  # a ValueError for a network that is not built
    scalars = any(name.startswith("soft_mask/") for name in stored_specs(path / "params"))
    tensors = OurTensors(path / "params", entries(kind, about, scalars), vocab_size)
    return Model(kind, tensors, tensors.num_blocks, about, carried(path / "tokenizer"), placed)
