"""A checkpoint of any format as one thing: its kind, its tensors under PyTorch's keys, and what its configs say."""
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.convert import adapters, dream, mdlm
from softmask_jax.convert.key_tables import Entry, below, match
from softmask_jax.convert.safe_files import OTHER_BYTES, inside, read_bytes
from softmask_jax.convert.tensors import Floats, InMemory, Joined, Renamed, Tensors, whole
from softmask_jax.diffusion import soft_masking

FORMAT, VERSION = "softmask_jax model", 1
KINDS = ("dit", "dream", "adapter")
SCALARS = tuple(entry.key for entry in mdlm.SOFT_MASK)
# Carried along with a model; code is not among them, weights are read apart.
CARRIED = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja",
    "softmask_tokenizer.json",
)  # fmt: skip

# BOS, EOS and mask of vocabularies that MDLM was trained with: GPT-2's, bert-base-uncased's, text8's. Elsewhere the
# mask is the last id, added to a tokenizer that had none.
KNOWN_IDS = {50_258: (50_256, 50_256, 50_257), 30_522: (101, 102, 103), 35: (2, 3, 4)}


@dataclasses.dataclass(frozen=True)
class Model:
    """What is converted.

    kind: "dit" (MDLM), "dream" or "adapter" (PEFT's, for Dream).
    tensors: under PyTorch's keys; with the soft-masking scalars, raw, where there are any (a "dit" always has them).
    about: config.json of our folder, beside its format, version and kind. "hf_config" is Hugging Face's config;
      "config" (dit) our own; "soft_mask" (the others) the variant, k and schedule, or None; "base_dtype" (dream) is
      "int8" where the kernels are.
    files: small files that go along unchanged, by name.
    placed: the safetensors file of each key, if the weights came from such.
    notes: what to tell the user, a line each.
    """

    kind: str
    tensors: Tensors
    num_blocks: int
    about: dict
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    placed: Mapping[str, str] | None = None
    notes: tuple[str, ...] = ()

    @property
    def soft_mask(self) -> dict | None:
        """What is known of soft-masking; None for a model without."""
        found = self.about["config"]["soft_mask"] if self.kind == "dit" else self.about["soft_mask"]
        return None if found is None or (self.kind == "dit" and found["variant"] == "none") else found

    @property
    def adapter(self) -> adapters.Adapter:
        return adapters.read_config(self.about["hf_config"])

    def table(self) -> dict[str, tuple[Entry, int]]:
        """Entry and block number of every key. Raises ValueError naming every key that does not fit."""
        scalars = any(key in self.tensors.specs for key in SCALARS)
        return match(
            entries(self.kind, self.about, scalars), self.tensors.specs, self.num_blocks, NAMES[self.kind],
            sizes(self.kind, self.about),
        )  # fmt: skip

    def without_scalars(self) -> Tensors:
        """The tensors that belong into PyTorch's weights file."""
        kept = [key for key in self.tensors.specs if key not in SCALARS]
        return self.tensors if self.kind == "dit" and self.soft_mask else Renamed(self.tensors, dict(zip(kept, kept)))

    def raw_scalars(self) -> dict[str, np.ndarray]:
        """Our names and values of the soft-masking scalars."""
        return {
            entry.path: next(iter(self.tensors.pieces(entry.key))).reshape(())
            for entry in mdlm.SOFT_MASK if entry.key in self.tensors.specs
        }  # fmt: skip


NAMES = {"dit": "an MDLM", "dream": "a Dream model", "adapter": "an adapter"}


def entries(kind: str, about: Mapping, scalars: bool) -> tuple[Entry, ...]:
    """The table of a model's params folder."""
    if kind == "adapter":
        adapter = adapters.read_config(about["hf_config"])
        found = below("adapter", dream.adapter_table(adapter.targets, adapter.use_dora))
    else:
        ours = dream.BACKBONE_INT8 if about.get("base_dtype") == "int8" else dream.BACKBONE
        found = below("backbone", mdlm.BACKBONE if kind == "dit" else ours)
    return found + (below("soft_mask", mdlm.SOFT_MASK) if scalars else ())


def sizes(kind: str, about: Mapping) -> dict[str, int]:
    """What the configs say of the letters in the tables."""
    if kind == "dream":
        return dream.sizes(about["hf_config"])
    if kind == "adapter":
        return {"R": adapters.read_config(about["hf_config"]).rank}
    model = about["config"]["model"]
    width = model["hidden_size"]
    return {"V": about["vocab_size"], "D": width, "C": model["cond_dim"], "F": model["mlp_ratio"] * width}


def with_scalars(tensors: Tensors, raw: Mapping[str, np.ndarray]) -> Tensors:
    """Tensors joined by the soft-masking scalars of our names."""
    keys = {entry.path: entry.key for entry in mdlm.SOFT_MASK}
    return Joined(tensors, InMemory({keys[name]: np.asarray(value, np.float32) for name, value in raw.items()}))


def dit_about(model: Mapping, soft_mask: Mapping, vocab_size: int, *, seq_len: int = 1024, ids=None, **more) -> dict:
    """`Model.about` of an MDLM. Raises ValueError, with config's words, for sizes that cannot be."""
    sections = {
        "model": {"compute_dtype": "float32"} | dict(model),
        "soft_mask": dict(soft_mask),
        "data": {"seq_len": seq_len},
    }
    bos, eos, mask = ids or KNOWN_IDS.get(vocab_size, (None, None, vocab_size - 1))
    return {
        "config": config_schema.from_dict(sections).to_dict(), "vocab_size": vocab_size, "bos_id": bos, "eos_id": eos,
        "mask_token_id": mask, "hf_config": None, **more,
    }  # fmt: skip


def dit_tensors(tensors: Tensors) -> tuple[Tensors, bool, int | None]:
    """MDLM's tensors as float32, without the rotary buffer and with scalars; whether it had some; width of a head."""
    wide, head_width = Floats(tensors), None
    if mdlm.INVERSE_FREQUENCIES in wide.specs:
        if len(wide.specs[mdlm.INVERSE_FREQUENCIES].shape) == 1:
            head_width = 2 * len(whole(wide, mdlm.INVERSE_FREQUENCIES))
        kept = [key for key in wide.specs if key != mdlm.INVERSE_FREQUENCIES]
        wide = Renamed(wide, dict(zip(kept, kept)))
    soft = any(entry.key in wide.specs for entry in mdlm.SOFT_MASK)
    return (wide if soft else with_scalars(wide, soft_masking.init_scalars())), soft, head_width


def check_heads(num_heads: int, width: int, head_width: int | None) -> None:
    if head_width is not None and num_heads * head_width != width:
        raise ValueError(
            f"The config says {num_heads} heads for a width of {width}, the weights have heads of {head_width}."
        )


def carried(*folders: Path) -> dict[str, Path]:
    """The small files of a folder that go along. Raises ValueError for a link that leads elsewhere."""
    found = {}
    for folder in folders:
        for name in CARRIED:
            if (folder / name).is_symlink() or (folder / name).exists():
                path = inside(folder, name)
                if path.stat().st_size > OTHER_BYTES:
                    read_bytes(path, OTHER_BYTES)
                found.setdefault(name, path)
    return found


def to_json(value: Mapping) -> bytes:
    """As Hugging Face writes its configs."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def merge(base: Model, adapter: Model) -> Model:
    """The base with the adapter merged in; soft-masking is the adapter's. Raises ValueError when they do not fit."""
    if base.kind != "dream" or adapter.kind != "adapter":
        raise ValueError(
            f"--merge needs an adapter as --src and a Dream model as --base; these are {adapter.kind}, {base.kind}."
        )
    if base.about.get("base_dtype") == "int8":
        raise ValueError(
            "--base is int8, too coarse to merge into: give the model that it was converted from (--int8 quantises the "
            "result again)."
        )
    if base.num_blocks != adapter.num_blocks:
        raise ValueError(
            f"The adapter has {adapter.num_blocks} layers, the base {base.num_blocks}; give the base it was trained on."
        )
    adapter.table()
    merged = adapters.Merged(base.without_scalars(), adapter.without_scalars(), adapter.adapter)
    tensors = with_scalars(merged, adapter.raw_scalars()) if adapter.soft_mask else merged
    about = base.about | {"soft_mask": adapter.soft_mask}
    return dataclasses.replace(base, tensors=tensors, about=about)
