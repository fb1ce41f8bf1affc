"""Programs to compile: a config's training step, or a sampler over its model, on a mesh; all arrays are abstract."""
import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.convert import bases
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import families
from softmask_jax.samplers import BlockSampler, dream_draw
from softmask_jax.samplers.options import Options
from softmask_jax.training import optimizer, train_state, train_step
from softmask_jax.training.tasks.task import read_base

VOCAB_SIZE = 50_258
DREAM_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18_944, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "mask_token_id": 151_666, "tie_word_embeddings": False,
}  # fmt: skip

LLADA_8B = {
    "vocab_size": 126_464, "embedding_size": 126_464, "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32,
    "mlp_hidden_size": 12_288, "rope_theta": 5e5, "rms_norm_eps": 1e-5, "mask_token_id": 126_336, "rope": True,
    "weight_tying": False, "activation_type": "silu", "block_type": "llama", "layer_norm_type": "rms",
}  # fmt: skip
PUBLISHED = {"dream": DREAM_7B, "llada": LLADA_8B}  # of a base that is not there, by kind


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program, not yet compiled."""

    kind: str  # train | generate
    traced: object  # jax.stages.Traced
    parts: dict  # trees of shapes with shardings, by name
    denoiser: object
    mesh: object
    rows: int  # of a global batch, or generated together
    length: int
    micro: int  # number of micro-batches
    description: str  # one line
    vocab_sizes: tuple[int, int]  # true, padded
    width: int  # of the vocabulary tables
    two_passes: bool = False
    new_tokens: int = 0  # samplers: per row
    calls: int = 0  # samplers: maximal number of network calls
    blocks: int = 0  # `BlockSampler`
    slice_length: int = 0  # positions of a row in the calls inside a block, if a cache keeps the others
    dense_block: Callable[[int], int] | None = None  # samplers that are dense in V: how many of so many positions


def build(config, mesh, *, vocab_size: int = 0, sizes: dict | None = None):
    """The denoiser of a config on a mesh. vocab_size: of a DiT; 0 is GPT-2's with the mask.
    sizes: Hugging Face's config.json of a base; None is that of `model.base`, else of Dream-7B or LLaDA-8B."""
    family, model = families.of(config.model.kind), config.model
    about = {"vocab_size": vocab_size or VOCAB_SIZE, "mask_token_id": (vocab_size or VOCAB_SIZE) - 1}
    if family.kind.from_base:
        if sizes is None:
            sizes = read_base(model)["hf_config"] if bases.exists(model) else PUBLISHED[model.kind]
        about = {"hf_config": sizes}
    return family.build(model, config.soft_mask, about, mesh=mesh)


@settled()
def training(config, devices, *, vocab_size: int = 0, length: int = 0, sizes: dict | None = None) -> Program:
    """The traced training step. length: tokens per row; 0 is the config's (for conversations the longest).
    vocab_size, sizes: see `build`."""
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rows, micro, shards = config.train.global_batch_size, config.train.micro_batches, sharding.batch_shards(mesh)
    if rows % shards:
        rows = shards  # one per shard
    micro = max(m for m in range(1, micro + 1) if rows % (m * shards) == 0)
    train = dataclasses.replace(config.train, global_batch_size=rows, micro_batches=micro)
    config, length = dataclasses.replace(config, train=train), length or config.longest_row
    tx = optimizer.make(config.schedule, config.updates)
    model = build(config, mesh, vocab_size=vocab_size, sizes=sizes)
    shapes = {"tokens": (rows, length), "rows": (rows,)}
    if config.data.source == "chat":
        shapes["segment_ids"] = (rows, length)
        shapes |= dict.fromkeys(("epoch", "index", "prompt_lengths", "real_lengths", "lengths"), (rows,))
    state, layout = train_state.abstract(model, tx, mesh), sharding.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for name, shape in shapes.items()}
    step = jax.jit(train_step.make(config, model, tx).train_step, donate_argnums=0)
    traced = step.trace(state, batch, _keys((), sharding.replicated(mesh)))
    parts = {"base": state.frozen, "params": state.params, "ema": state.ema, "optimizer": state.opt_state,
             "batch": batch}
    return Program(
        "train", traced, parts, model, mesh, rows, length, micro,
        f"{model.num_params:,} parameters, {rows} rows of {length} tokens in {micro} micro-batches, {_axes(mesh)}",
        *vocabulary(model), two_passes=config.soft_mask.variant != "none" and config.soft_mask.p_sm > 0,
    )  # fmt: skip


@settled()
def generation(config, devices, options: Options = Options(), *, rows: int = 0, length: int = 0,
               prompt_length: int = 0, vocab_size: int = 0, sizes: dict | None = None) -> Program:
    """A traced sampler over the config's model.

    options: of the sampler; `alg` "" is the model's own, `steps` None the config's. rows: generated together; 0 is
    `config.sample.count`, rounded up to the mesh's shards. length: of a row; 0 is the config's. prompt_length: where
    blocks begin."""
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    shards, over_rows = sharding.batch_shards(mesh), sharding.batch_sharding(mesh)
    rows = -(-(rows or config.sample.count) // shards) * shards
    family = families.of(config.model.kind)
    length = length or config.sample.length or config.longest_row
    new_tokens = length - prompt_length
    model = build(config, mesh, vocab_size=vocab_size, sizes=sizes)
    if options.steps is None:
        steps = config.sample.steps if family.fixed_length else min(config.sample.steps, new_tokens)
        options = dataclasses.replace(options, steps=steps)
    sampler = options.sampler(model, SoftMask.from_config(config.soft_mask), (), new_tokens=new_tokens,
                              prompt_length=prompt_length, alg=family.default_alg)
    shapes = jax.eval_shape(model.init, root_key(0))
    layout = sharding.param_shardings(mesh, model.axes, shapes)
    params = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=over_rows)
    # A lambda, as jit would take a sampler's field `trace` for its own method.
    traced = jax.jit(lambda *arguments: sampler(*arguments)).trace(params, _keys((rows,), over_rows), tokens)
    name, calls, by_blocks = type(sampler).__name__, sampler.most_calls(length), isinstance(sampler, BlockSampler)
    (_, padded), width = vocabulary(model)
    return Program(
        "generate", traced, {"params": params, "batch": tokens}, model, mesh, rows, length, 1,
        f"{name}, {model.num_params:,} parameters, {rows} rows of {length} tokens, at most {calls} network calls, "
        f"{_axes(mesh)}",
        *vocabulary(model), new_tokens=new_tokens, calls=calls,
        blocks=sampler.blocks(length) if by_blocks else 0,
        slice_length=min(sampler.block_length, new_tokens) if by_blocks and sampler.cache == "dual" else 0,
        dense_block=partial(dream_draw.block_size, width=width, vocabulary=padded) if name != "MDLMSampler" else None,
    )  # fmt: skip


def vocabulary(model) -> tuple[tuple[int, int], int]:
    """((tokens, rows), width) of the vocabulary table."""
    table = jax.eval_shape(lambda key: model.embedding(model.init(key)["backbone"]), root_key(0))
    return (model.vocab_size, table.shape[0]), table.shape[1]


def bytes_per_chip(tree) -> int:
    """Bytes of shapes with shardings, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _keys(shape: tuple[int, ...], layout):
    return jax.ShapeDtypeStruct(shape, jax.eval_shape(lambda: root_key(0)).dtype, sharding=layout)


def _axes(mesh) -> str:
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if (axis, size) != ("dcn_data", 1))
