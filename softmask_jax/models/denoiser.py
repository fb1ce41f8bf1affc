"""Where a model meets objectives and samplers: three plain functions over the backbone's parameters.

Everything above `models/` and below `train.py` sees a network only through `Denoiser`.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax

from softmask_jax.config import Model, SoftMask
from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.vocab.head import Head, VocabSharding
from softmask_jax.distributed import sharding
from softmask_jax.models.nn import dit
from softmask_jax.models.nn.network_config import NetworkConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network as functions, equal only to itself; `backbone` is the subtree `params["backbone"]`.

    embedding(backbone) -> [Vpad D]: the table that soft-masking mixes rows of.
    embed(backbone, tokens [B L]) -> [B L D].
    trunk(backbone, x [B L D], *, sigma=None, positions=None, segment_ids=None, cache=None, dropout_keys=None)
      -> (hidden [B L D], cache). cache: None; True keeps keys and values; a `models.cache.Window` takes a slice of the
      sequence and sees the rest in what was kept. Where predictions are shifted by one, so are these hidden states, and
      `hidden[:, i]` of the whole sequence is what `Window.before` wants of position i - 1.
    head(backbone) -> vocab_head.Head.
    init(key, base=None) -> params, the whole tree {"backbone", "soft_mask"}; axes: logical axes of the same tree.
      frozen: entries of the backbone that are not trained; `base` holds them, random ones are made without.
    dropout: whether `trunk` has any, with dropout_keys.
    flops_per_token(L): matrix-product FLOPs of one forward pass.
    """

    embedding: Callable
    embed: Callable
    trunk: Callable
    head: Callable
    init: Callable
    axes: dict
    vocab_size: int
    mask_token_id: int
    num_params: int
    flops_per_token: Callable[[int], float]
    frozen: tuple[str, ...] = ()
    dropout: bool = False


def build(model: Model, soft_mask: SoftMask, *, vocab_size: int, mask_token_id: int, mesh=None) -> Denoiser:
    """The DiT that a config describes.

    Args:
      vocab_size: tokens including the mask.
      mesh: where activations and the vocabulary lie; None for a single device.

    Raises:
      ValueError: sizes that cannot be built.
    """
    if soft_mask.k >= vocab_size:
        raise ValueError(f"config.soft_mask.k is {soft_mask.k}, but there are just {vocab_size - 1} tokens beside the mask.")
    fields = {f.name for f in dataclasses.fields(Model)} & {f.name for f in dataclasses.fields(dit.DiTConfig)}
    spec = dit.DiTConfig(vocab_size=vocab_size, **{name: getattr(model, name) for name in fields})
    scalars, layout = initial_scalars(soft_mask), layouts(mesh)

    def init(key: jax.Array, base: None = None) -> dict:
        return {"backbone": dit.init(spec, key), "soft_mask": scalars()}

    return assemble(
        dit, spec, layout, trunk=dit.trunk(spec, layout.rows_over), init=init, axes=dit.logical_axes(spec),
        mask_token_id=mask_token_id, suppress_mask=True, num_params=dit.num_params(spec), dropout=spec.dropout > 0,
    )  # fmt: skip


def assemble(
    network, spec: NetworkConfig, layout: "Layouts", *, axes: dict, mask_token_id: int, suppress_mask: bool, **fields
) -> Denoiser:
    """A network module's functions, with its tables laid out on a mesh.

    Args:
      network: such as `nn.dit`, with `embed`, `embedding` and `flops_per_token`.
      axes: logical axes of the backbone. suppress_mask: whether the mask is never predicted.
      fields: `init`, `trunk`, `num_params` and others of `Denoiser`.
    """

    def embedding(backbone: dict) -> jax.Array:
        return layout.whole_rows(network.embedding(backbone))

    def embed(backbone: dict, tokens: jax.Array) -> jax.Array:
        return layout.rows_over(network.embed({"embed": {"table": embedding(backbone)}}, tokens))

    def head(backbone: dict) -> Head:
        weight, bias = layout.whole_rows(backbone["head"]["weight"]), backbone["head"].get("bias")
        return Head(weight, bias, spec.vocab_size, mask_token_id, suppress_mask, layout.vocabulary)

    return Denoiser(
        embedding=embedding, embed=embed, head=head, vocab_size=spec.vocab_size, mask_token_id=mask_token_id,
        axes={"backbone": axes, "soft_mask": jax.tree.map(lambda _: (), soft_masking.init_scalars())},
        flops_per_token=functools.partial(network.flops_per_token, spec), **fields,
    )  # fmt: skip


def abstract(denoiser: Denoiser, mesh=None) -> dict:
    """The tree of `denoiser.init` as shapes and dtypes and, on a mesh, where each parameter lies there."""
    shapes = jax.eval_shape(denoiser.init, root_key(0))
    if mesh is None:
        return shapes
    layouts = sharding.param_shardings(mesh, denoiser.axes, shapes)
    return jax.tree.map(lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes, layouts)


def initial_scalars(soft_mask: SoftMask) -> Callable[[], dict]:
    """What makes the raw soft-masking scalars that a config starts with."""
    return functools.partial(
        soft_masking.init_scalars,
        scale=soft_mask.init_scale,
        centre=soft_mask.init_centre,
        steepness=soft_mask.init_steepness,
        temperature=soft_mask.init_temperature,
    )


class Layouts(NamedTuple):
    """Layouts on a mesh. vocabulary: where its rows lie, None on one device; rows_over, whole_rows: constraints of
    activations [B L D] and of tables [Vpad D]."""

    vocabulary: VocabSharding | None
    rows_over: Callable
    whole_rows: Callable


def layouts(mesh) -> Layouts:
    """Of a mesh, or None for a single device."""
    if mesh is None:
        return Layouts(None, _same, _same)
    # A table is gathered over fsdp before rows are taken from it, as every other weight is before its product.
    vocabulary = VocabSharding(mesh, sequence_axis="sequence") if mesh.size > 1 else None
    return Layouts(vocabulary, sharding.rows_over(mesh), sharding.vocab_over(mesh, "tensor"))


def _same(x):
    return x
