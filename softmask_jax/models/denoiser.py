"""`Denoiser`, the interface through which objectives and samplers see a network, and the builder of the DiT."""
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softmask_jax.config import Model, SoftMask
from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion import soft_masking
from softmask_jax.diffusion.vocab.head import Head, VocabSharding
from softmask_jax.distributed import sharding
from softmask_jax.models.nn import dit
from softmask_jax.models.nn.network_config import NetworkConfig
from softmask_jax.models.nn.splash import Layout


def _same(x):
    return x


@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser:
    """A network as functions of its parameters; compared by identity. `backbone` is `params["backbone"]`."""

    embedding: Callable  # (backbone) -> [Vpad D], the table whose rows soft-masking mixes
    embed: Callable  # (backbone, tokens [B L]) -> [B L D]
    # (backbone, x [B L D], *, sigma=None, positions=None, segment_ids=None, cache=None, dropout_keys=None)
    #   -> (hidden [B L D], cache); see `nn.cache`. With shifted predictions, hidden[:, i] is the state of i - 1.
    trunk: Callable
    head: Callable  # (backbone) -> vocab.head.Head
    init: Callable  # (key, base=None) -> {"backbone", "soft_mask"}; base: the frozen entries, random by default
    axes: dict  # logical axes of the tree of `init`
    vocab_size: int
    mask_token_id: int
    num_params: int
    flops_per_token: Callable[[int], float]  # (L) -> FLOPs of the matrix products of a forward pass
    attention_share: float = 1 / 8  # of q, k, v and o in a layer's products, which `remat` "mlp" repeats
    frozen: tuple[str, ...] = ()  # entries of the backbone that are not trained
    dropout: bool = False  # whether `trunk` uses dropout_keys
    mesh: Mesh | None = None  # of the sharding constraints, which allow a surrounding `jax.shard_map` over `data`
    used_vocab: int | None = None  # ids from here on have a row but no token; None: every row is a token's
    prepared: Callable = _same  # (backbone) -> the backbone for many calls of `trunk` without training


def build(model: Model, soft_mask: SoftMask, *, vocab_size: int, mask_token_id: int, mesh=None) -> Denoiser:
    """The DiT of a config; vocab_size counts the mask, mesh is None on one device. ValueError for impossible sizes."""
    if soft_mask.k >= vocab_size:
        raise ValueError(f"config.soft_mask.k is {soft_mask.k}, but there are just {vocab_size - 1} tokens beside the mask.")
    fields = {f.name for f in dataclasses.fields(Model)} & {f.name for f in dataclasses.fields(dit.DiTConfig)}
    spec = dit.DiTConfig(vocab_size=vocab_size, **{name: getattr(model, name) for name in fields})
    scalars, layout = initial_soft_mask(soft_mask, model.hidden_size), layouts(mesh)

    def init(key: jax.Array, base: None = None) -> dict:
        return {"backbone": dit.init(spec, key), "soft_mask": scalars()}

    return assemble(
        dit, spec, layout, scalars, trunk=dit.trunk(spec, layout.rows_over, layout.attention), init=init,
        axes=dit.logical_axes(spec), mask_token_id=mask_token_id, suppress_mask=True, num_params=dit.num_params(spec),
        dropout=spec.dropout > 0,
    )  # fmt: skip


def assemble(
    network, spec: NetworkConfig, layout: "Layouts", scalars: Callable[[], dict], *, axes: dict, mask_token_id: int,
    suppress_mask: bool, **fields,
) -> Denoiser:
    """Denoiser from a network module such as `nn.dit`, with its tables laid out on a mesh.

    scalars: returns the initial `params["soft_mask"]`. axes: logical axes of the backbone. suppress_mask: never predict
    the mask. fields: the remaining ones of `Denoiser`.
    """

    def embedding(backbone: dict) -> jax.Array:
        return layout.whole_rows(network.embedding(backbone))

    def embed(backbone: dict, tokens: jax.Array) -> jax.Array:
        return layout.rows_over(network.embed({"embed": {"table": embedding(backbone)}}, tokens))

    def head(backbone: dict) -> Head:
        if "head" not in backbone:  # tied
            table, bias = network.embedding(backbone), None
        else:
            table, bias = backbone["head"]["weight"], backbone["head"].get("bias")
        weight = layout.whole_rows(table)
        return Head(weight, bias, spec.vocab_size, mask_token_id, suppress_mask, layout.vocabulary_here())

    return Denoiser(
        embedding=embedding, embed=embed, head=head, vocab_size=spec.vocab_size, mask_token_id=mask_token_id,
        mesh=layout.mesh,
        axes={
            "backbone": axes, "soft_mask": jax.tree.map(lambda x: ("embed", None)[: x.ndim], jax.eval_shape(scalars))
        },
        flops_per_token=functools.partial(network.flops_per_token, spec), **fields,
    )  # fmt: skip


def abstract(denoiser: Denoiser, mesh=None) -> dict:
    """The tree of `denoiser.init` as shapes and dtypes; on a mesh with shardings."""
    shapes = jax.eval_shape(denoiser.init, root_key(0))
    if mesh is None:
        return shapes
    layouts = sharding.param_shardings(mesh, denoiser.axes, shapes)
    return jax.tree.map(lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes, layouts)


def initial_soft_mask(soft_mask: SoftMask, width: int) -> Callable[[], dict]:
    """A function that returns the initial `params["soft_mask"]` of a config: raw scalars, and for the variant `hidden`
    a projection of zeros [width width]."""
    names = ("scale", "centre", "steepness", "temperature")
    start = {name: getattr(soft_mask, f"init_{name}") for name in names}

    def init() -> dict:
        scalars = soft_masking.init_scalars(**start)
        if soft_mask.variant == "hidden":
            scalars[soft_masking.PROJECTION] = jnp.zeros((width, width))
        return scalars

    return init


class Layouts(NamedTuple):
    """Sharding constraints on a mesh; no-ops on one device."""

    vocabulary: VocabSharding | None
    rows_over: Callable  # of activations [B L D]
    whole_rows: Callable  # of tables [Vpad D]
    attention: Layout | None = None
    mesh: Mesh | None = None

    def vocabulary_here(self) -> VocabSharding | None:
        """`vocabulary` for the calling code, which may be within a `jax.shard_map`."""
        if self.vocabulary is None:
            return None
        mesh, rows = sharding.seen_from_here(self.vocabulary.mesh, *self.vocabulary.batch_axes)
        return dataclasses.replace(self.vocabulary, mesh=mesh, batch_axes=rows)


def layouts(mesh) -> Layouts:
    """Layouts on a mesh, or on one device for None."""
    if mesh is None:
        return Layouts(None, _same, _same)
    # Tables are gathered over fsdp before use, as every other weight.
    vocabulary = VocabSharding(mesh, sequence_axis="sequence") if mesh.size > 1 else None
    attention = Layout(mesh, sharding.BATCH_AXES, "tensor", "sequence")
    tables = sharding.vocab_over(mesh, "tensor")
    return Layouts(vocabulary, sharding.rows_over(mesh), tables, attention, mesh)
