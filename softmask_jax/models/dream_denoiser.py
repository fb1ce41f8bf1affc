"""Builder of denoisers on a base, Dream's and LLaDA's: a predictable mask, optionally an adapter on a frozen base."""
from collections.abc import Callable, Mapping

import jax

from softmask_jax.config.jax_settings import root_key
from softmask_jax.config.sections import Model, SoftMask
from softmask_jax.diffusion.vocab.head import VocabSharding
from softmask_jax.distributed import sharding
from softmask_jax.models.denoiser import Denoiser, assemble, initial_soft_mask, layouts
from softmask_jax.models.nn import dora, dream
from softmask_jax.models.nn.cache import window_of
from softmask_jax.models.nn.dora import AdapterConfig
from softmask_jax.models.nn.dream_config import DreamConfig, special_ids

BASE = ("embed", "layers", "final_norm", "head")


def dream_config(
    model: Model, hf_config: Mapping, network: Callable[..., DreamConfig] = DreamConfig.from_hf
) -> DreamConfig:
    """Sizes from Hugging Face's config.json, the rest from our config. ValueError for another network."""
    names = ("param_dtype", "compute_dtype", "base_dtype", "remat", "attention")
    return network(dict(hf_config), **{name: getattr(model, name) for name in names})


def adapter_config(model: Model) -> AdapterConfig | None:
    """The adapter of a config, or None."""
    if model.adapter == "none":
        return None
    return AdapterConfig(
        model.adapter, model.adapter_rank, model.adapter_alpha, model.adapter_dropout, model.adapter_targets
    )


def build(
    model: Model, soft_mask: SoftMask, hf_config: Mapping, *, mesh=None,
    network: Callable[..., DreamConfig] = DreamConfig.from_hf, shifted: bool = True, moved: bool = True,
) -> Denoiser:  # fmt: skip
    """The denoiser of a converted Dream or LLaDA; with an adapter, only `backbone["adapter"]` is trained.

    hf_config: Hugging Face's config.json, kept in the converted folder, which `network` reads. mesh: None on one
    device. shifted: the logits for position i are at i - 1. moved: positions count from a row's first token, as the
    caller's `positions` say; if not, they are those of the row, whatever its padding.
    ValueError for impossible sizes, or a config.json without a mask token."""
    spec, adapter = dream_config(model, hf_config, network), adapter_config(model)
    mask, _, _ = special_ids(hf_config)
    if soft_mask.k > spec.vocab_size:
        raise ValueError(f"config.soft_mask.k is {soft_mask.k}, but there are just {spec.vocab_size} tokens.")
    scalars, layout = initial_soft_mask(soft_mask, spec.hidden_size), layouts(mesh)
    axes = dream.logical_axes(spec)
    if mesh is not None and mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] == 1:
        # Shard the vocabulary over fsdp: a gathered table takes 1 GiB per chip, and there would be four.
        vocabulary = VocabSharding(mesh, sharding.DATA_AXES, "fsdp", "sequence")
        layout = layout._replace(vocabulary=vocabulary, whole_rows=sharding.vocab_over(mesh, "fsdp"))
        axes["embed"] = {"table": ("vocab_rows", "table_width")}
        if not spec.tied:
            axes["head"] = {"weight": ("vocab_rows", "table_width")}
    options = {}
    if mesh is not None and mesh.shape["fsdp"] > 1 and adapter is not None and spec.remat not in ("none", "attention"):
        # Without rematerialisation, every layer's whole kernels would be kept for the backward pass.
        options["gather"] = sharding.layer_gather(mesh, axes["layers"])
    run = dream.trunk(spec, layout.rows_over, adapter, layout.attention, **options)

    def init(key: jax.Array, base: dict | None = None) -> dict:
        base_key, adapter_key = jax.random.split(key)
        backbone = base or dream.init(spec, base_key)
        if adapter is not None:
            backbone = {**backbone, "adapter": dora.init(backbone, adapter, adapter_key)}
        return {"backbone": backbone, "soft_mask": scalars()}

    def trunk(backbone: dict, x: jax.Array, **options):
        hidden, cache = run(backbone, x, **options if moved else options | {"positions": None})
        if shifted:
            hidden = dream.shift(hidden, window_of(options.get("cache")), options.get("segment_ids"))
        return hidden, cache

    def prepared(backbone: dict) -> dict:
        return backbone if adapter is None else dora.prepared(backbone, adapter)

    trained = jax.eval_shape(init, root_key(0))["backbone"].get("adapter", {})
    return assemble(
        dream, spec, layout, scalars, trunk=trunk, init=init, prepared=prepared, mask_token_id=mask,
        suppress_mask=False, axes=axes if adapter is None else {**axes, "adapter": dora.logical_axes(axes, adapter)},
        attention_share=dream.attention_share(spec),
        num_params=dream.num_params(spec) + sum(leaf.size for leaf in jax.tree.leaves(trained)),
        # Dream's reference may draw rows without a token.
        used_vocab=None if shifted else hf_config["vocab_size"],
        frozen=() if adapter is None else tuple(name for name in BASE if name in axes),
        dropout=adapter is not None and adapter.dropout > 0,
    )  # fmt: skip
