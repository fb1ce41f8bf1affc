"""A checkpoint of any format as one `Model`, and its key table."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.convert import adapters, mdlm
from softmask_jax.convert.key_tables import below, match
from softmask_jax.convert.safe_files import OTHER_BYTES, inside
from softmask_jax.convert.tensors import Tensors, floats, in_memory, joined, without
from softmask_jax.diffusion import soft_masking
from softmask_jax.models import families
from softmask_jax.models.keys import Entry, Keys, Products, SOFT_MASK

FORMAT, VERSION = "softmask_jax model", 1
SCALARS = tuple(entry.key for entry in SOFT_MASK)
# Files copied unchanged with a model; never code.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "softmask_tokenizer.json",
)  # fmt: skip

# BOS, EOS and mask of MDLM's vocabularies: GPT-2's, bert-base-uncased's, text8's. Elsewhere the mask is the last id.
KNOWN_IDS = {50_258: (50_256, 50_256, 50_257), 30_522: (101, 102, 103), 35: (2, 3, 4)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A checkpoint of any format.

    about: config.json of our folder without format, version and kind: Hugging Face's "hf_config"; "config" (dit), our
      own; "soft_mask" (others), variant, k and schedule, or None; "base_dtype", "int8" for a base's such kernels;
      "base_kind" (adapter), the family of its base, by default dream."""

    kind: str  # of `models.families`, or "adapter"
    tensors: Tensors  # by PyTorch's keys, with raw soft-masking scalars if there are any ("dit" always has them)
    num_blocks: int
    about: dict
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)  # small files copied unchanged, by name
    placed: Mapping[str, str] | None = None  # the safetensors file of each key
    notes: tuple[str, ...] = ()  # for the user

    @property
    def manifest(self) -> dict:
        """config.json of our folder, without format and version."""
        return {"kind": self.kind, **self.about}

    @property
    def soft_mask(self) -> dict | None:
        """Soft-masking's settings; None for a model without."""
        if "soft_mask" in self.about:
            return self.about["soft_mask"]
        settings = self.about["config"]["soft_mask"]
        return None if settings["variant"] == "none" else settings

    def table(self) -> dict[str, tuple[Entry, int]]:
        """Entry and block number of every key. Raises ValueError naming every key that does not fit."""
        scalars = any(key in self.tensors.specs for key in SCALARS)
        keys, table = keys_of(self.kind), entries(self.kind, self.about, scalars)
        return match(table, self.tensors.specs, self.num_blocks, keys.name, keys.sizes(self.about))

    def written(self, to: str) -> Tensors:
        """The tensors of our folder (orbax), or of PyTorch's weights file (hf)."""
        if to == "orbax" or (self.kind == "dit" and self.soft_mask):
            return self.tensors
        return without(self.tensors, SCALARS)

    def raw_scalars(self) -> dict[str, np.ndarray]:
        """Our names and values of the soft-masking scalars."""
        stored = [entry for entry in SOFT_MASK if entry.key in self.tensors.specs]
        return {entry.path: next(iter(self.tensors.pieces(entry.key))).reshape(()) for entry in stored}


def adapted_kind(about: Mapping) -> str:
    """Family of the base of an adapter."""
    return about.get("base_kind", "dream")


def products_of(kind: str) -> Products:
    """The products of a family's layers. ValueError for a family without."""
    if (products := keys_of(kind).products) is None:
        raise ValueError(f"A model of kind {kind} takes no adapter.")
    return products


def read_adapter(about: Mapping) -> adapters.Adapter:
    """The adapter of its `Model.about`. ValueError as `adapters.read_config`."""
    return adapters.read_config(about["hf_config"], products_of(adapted_kind(about)))


def _adapter_table(about: Mapping) -> tuple[Entry, ...]:
    adapter = read_adapter(about)
    return products_of(adapted_kind(about)).adapter(adapter.targets, adapter.use_dora)


ADAPTER = Keys("an adapter", (), _adapter_table, lambda about: {"R": read_adapter(about).rank})


def keys_of(kind: str) -> Keys:
    """Key table of a kind of converted model: an adapter, or a family with one. Raises ValueError for another kind."""
    keys = ADAPTER if kind == "adapter" else families.of(kind).keys
    if keys is None:
        raise ValueError(f"A model of kind {kind} has no key table: it cannot be converted.")
    return keys


def entries(kind: str, about: Mapping, scalars: bool) -> tuple[Entry, ...]:
    """Key table of a params folder: backbone or adapter, and soft-masking scalars if it has them."""
    tree = "adapter" if kind == "adapter" else "backbone"
    return below(tree, keys_of(kind).table(about)) + (below("soft_mask", SOFT_MASK) if scalars else ())


def with_scalars(tensors: Tensors, raw: Mapping[str, np.ndarray]) -> Tensors:
    """The tensors and soft-masking scalars, `raw` by our names."""
    keys = {entry.path: entry.key for entry in SOFT_MASK}
    return joined(tensors, in_memory({keys[name]: np.asarray(value, np.float32) for name, value in raw.items()}))


def dit_about(model: Mapping, soft_mask: Mapping, vocab_size: int, head_width: int | None, *, seq_len: int = 1024,
              **others) -> dict:
    """`Model.about` of an MDLM. Raises the config's ValueError for impossible sizes, and for another head_width."""
    num_heads, width = model["num_heads"], model["hidden_size"]
    if head_width is not None and num_heads * head_width != width:
        raise ValueError(f"The config has {num_heads} heads for a width of {width}, the weights heads of {head_width}.")
    model = {"compute_dtype": "float32"} | dict(model)
    config = config_schema.from_dict({"model": model, "soft_mask": dict(soft_mask), "data": {"seq_len": seq_len}})
    bos, eos, mask = KNOWN_IDS.get(vocab_size, (None, None, vocab_size - 1))
    ids = {"vocab_size": vocab_size, "bos_id": bos, "eos_id": eos, "mask_token_id": mask}
    return {"config": config.to_dict(), **ids, "hf_config": None, **others}


def dit_tensors(tensors: Tensors) -> tuple[Tensors, bool, int | None]:
    """MDLM's tensors in float32 with scalars but no rotary buffer; whether it had scalars; the width of a head."""
    buffer, wide = mdlm.INVERSE_FREQUENCIES, without(floats(tensors), (mdlm.INVERSE_FREQUENCIES,))
    shape = tensors.specs[buffer].shape if buffer in tensors.specs else ()
    soft = any(key in wide.specs for key in SCALARS)
    head_width = 2 * shape[0] if len(shape) == 1 else None
    return (wide if soft else with_scalars(wide, soft_masking.init_scalars())), soft, head_width


def carried(folder: Path) -> dict[str, Path]:
    """The `CARRIED` files of a folder by name. Raises ValueError for a link that leads elsewhere."""
    return {name: inside(folder, name, OTHER_BYTES) for name in CARRIED if (folder / name).exists() or (folder / name).is_symlink()}


def weights_dtype(model: Model) -> str:
    """Name of the dtype of a model's first tensor, scalars left aside."""
    return next(spec.dtype.name for key, spec in model.tensors.specs.items() if key not in SCALARS)


def in_dtype(model: Model, dtype: str) -> Model:
    """The model with its weights in `dtype`, rounded if need be; soft-masking's scalars stay float32. ValueError for
    int8 kernels, whose scales are float32."""
    if model.about.get("base_dtype") == "int8":
        raise ValueError("--dtype is for float weights; convert the source that the int8 kernels were made from.")
    hf_config = model.about["hf_config"] and model.about["hf_config"] | {
        name: dtype for name in ("torch_dtype", "dtype") if name in model.about["hf_config"]
    }
    weights = floats(without(model.tensors, SCALARS), dtype)
    tensors = with_scalars(weights, model.raw_scalars())
    return dataclasses.replace(model, tensors=tensors, about=model.about | {"hf_config": hf_config})


def merge(base: Model, adapter: Model) -> Model:
    """The base with the adapter merged in and its soft-masking. Raises ValueError when they do not fit."""
    if adapter.kind != "adapter" or base.kind == "adapter" or keys_of(base.kind).products is None:
        kinds = f"these are {adapter.kind}, {base.kind}"
        raise ValueError(f"--merge needs an adapter as --src and a Dream model or a LLaDA as --base; {kinds}.")
    if (kind := adapted_kind(adapter.about)) != base.kind:
        raise ValueError(f"The adapter is for a model of kind {kind}, --base is {base.kind}; give its own base.")
    if base.about.get("base_dtype") == "int8":
        remedy = "give the model that it was converted from (--int8 quantises the result again)"
        raise ValueError(f"--base is int8, too coarse to merge into: {remedy}.")
    if base.num_blocks != adapter.num_blocks:
        depths = f"{adapter.num_blocks} layers, the base {base.num_blocks}"
        raise ValueError(f"The adapter has {depths}; give the base it was trained on.")
    adapter.table()
    products = products_of(base.kind)
    tensors = adapters.merged(base.written("hf"), adapter.written("hf"), read_adapter(adapter.about), products)
    tensors = with_scalars(tensors, adapter.raw_scalars()) if adapter.soft_mask else tensors
    return dataclasses.replace(base, tensors=tensors, about=base.about | {"soft_mask": adapter.soft_mask})
