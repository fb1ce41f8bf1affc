"""Programs to compile: a config's training step, or a sampler over its model, on a mesh of devices.

Nothing is allocated: parameters, batches and keys are shapes with shardings, laid out by `sharding.py` as in a run.
"""
import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp

from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.models import families
from softmask_jax.samplers.options import Options
from softmask_jax.training import optimizer, train_state, train_step

VOCAB_SIZE = 50_258  # GPT-2's with the mask
DREAM_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18_944, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "mask_token_id": 151_666, "tie_word_embeddings": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Program:
    """A traced program, before it is compiled.

    Attributes:
      kind: train | generate. traced: a `jax.stages.Traced`. parts: contents of a chip, name -> tree of shapes with shardings.
      rows: of a global batch, or generated together. micro: micro-batches. said: a line that describes the program.
      vocab_sizes: size of the vocabulary, true and padded. width: D of its tables.
      new_tokens, calls, blocks: of a sampler: new tokens of a row, most network calls, blocks of a `BlockSampler`.
    """

    kind: str
    traced: object
    parts: dict
    denoiser: object
    mesh: object
    rows: int
    length: int
    micro: int
    said: str
    vocab_sizes: tuple[int, int]
    width: int
    two_passes: bool = False
    new_tokens: int = 0
    calls: int = 0
    blocks: int = 0


def sizes_of_base(base: str, kind: str) -> dict:
    """Hugging Face's config.json of a converted model; Dream-7B's sizes where `base` has none."""
    from softmask_jax.training.tasks.conversations import read_base

    folder = Path(os.path.expanduser(base))
    return read_base(folder, kind)["hf_config"] if (folder / "config.json").is_file() else DREAM_7B


def build(config, mesh, *, vocab_size: int = VOCAB_SIZE, sizes: dict | None = None):
    """The denoiser of a config on a mesh. vocab_size: of a dit. sizes: of a dream model, else its base's."""
    family, about = families.of(config.model.kind), {"vocab_size": vocab_size, "mask_token_id": vocab_size - 1}
    if family.kind.from_base:
        about = {"hf_config": sizes or sizes_of_base(config.model.base, config.model.kind)}
    return family.build(config.model, config.soft_mask, about, mesh=mesh)


def batch_of(config, shards: int) -> tuple[int, int]:
    """(rows of a global batch, micro-batches) on so many shards.

    The config's rows, in the most micro-batches (up to the config's) that the shards divide; one row a shard where there
    are fewer rows than shards, or they do not divide.
    """
    rows, micro = config.train.global_batch_size, config.train.micro_batches
    if rows % shards:
        return shards, 1
    return rows, max(m for m in range(1, micro + 1) if rows % (m * shards) == 0)


@settled()
def training(config, devices, *, vocab_size: int = VOCAB_SIZE, length: int = 0, sizes: dict | None = None) -> Program:
    """The training step, traced for these devices. vocab_size, sizes: see `build`. length: tokens of a row; 0 is the
    config's, for conversations the longest."""
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rows, micro = batch_of(config, sharding.batch_shards(mesh))
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, global_batch_size=rows, micro_batches=micro)
    )
    tx, layout = optimizer.make(config.optimizer, config.updates), sharding.batch_sharding(mesh)
    model = build(config, mesh, vocab_size=vocab_size, sizes=sizes)
    length, step = length or config.longest_row, train_step.make(config, model, tx)
    if config.data.source == "chat":
        shapes = dict.fromkeys(("tokens", "segment_ids"), (rows, length))
        shapes |= dict.fromkeys(("rows", "epoch", "index", "prompt_lengths", "real_lengths", "lengths"), (rows,))
    else:
        shapes = {"tokens": (rows, length), "rows": (rows,)}
    state = train_state.abstract(model, tx, mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for name, shape in shapes.items()}
    traced = jax.jit(step.train_step, donate_argnums=0).trace(state, batch, _keys((), sharding.replicated(mesh)))
    parts = {"base": state.frozen, "params": state.params, "ema": state.ema, "optimizer": state.opt_state,
             "batch": batch}
    said = f"{model.num_params:,} parameters, {rows} rows of {length} tokens in {micro} micro-batches, {_said(mesh)}"
    soft = config.soft_mask.variant != "none" and config.soft_mask.p_sm > 0
    return Program("train", traced, parts, model, mesh, rows, length, micro, said, *vocabulary(model), two_passes=soft)


@settled()
def generation(config, devices, options: Options = Options(), *, rows: int = 0, length: int = 0,
               prompt_length: int = 0, vocab_size: int = VOCAB_SIZE, sizes: dict | None = None) -> Program:
    """A sampler over the config's model, traced for these devices.

    Args:
      options: which sampler; its `alg` "" is the model's own, its `steps` None the config's, where it has any.
      rows: generated together; 0 is `config.sample.count`, rounded up to what the mesh can share. length: of a row, 0 is
        the config's; prompt_length: where blocks begin.
    """
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    shards = sharding.batch_shards(mesh)
    rows = -(-(rows or config.sample.count) // shards) * shards
    family = families.of(config.model.kind)
    length = length or config.sample.length or config.longest_row
    model = build(config, mesh, vocab_size=vocab_size, sizes=sizes)
    soft = SoftMask.from_config(config.soft_mask)
    if options.steps is None:
        most = config.sample.steps if family.fixed_length else length - prompt_length
        options = dataclasses.replace(options, steps=min(config.sample.steps, most))
    sampler = options.sampler(model, soft, (), new_tokens=length - prompt_length, prompt_length=prompt_length,
                              alg=family.default_alg)
    shapes = jax.eval_shape(model.init, root_key(0))
    layout = sharding.param_shardings(mesh, model.axes, shapes)
    params = jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, layout)
    over_rows = sharding.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=over_rows)
    # A sampler's own `trace` is an option, which jit would take over for its method.
    traced = jax.jit(lambda *given: sampler(*given)).trace(params, _keys((rows,), over_rows), tokens)
    name = type(sampler).__name__
    calls = sampler.most_calls(length)
    said = (f"{name}, {model.num_params:,} parameters, {rows} rows of {length} tokens, at most {calls} network calls, "
            f"{_said(mesh)}")
    return Program("generate", traced, {"params": params, "batch": tokens}, model, mesh, rows, length, 1, said,
                   *vocabulary(model), new_tokens=length - prompt_length, calls=calls,
                   blocks=sampler.blocks(length) if name == "BlockSampler" else 0)


def vocabulary(model) -> tuple[tuple[int, int], int]:
    """Tokens and rows of the table that holds them; its width."""
    table = jax.eval_shape(lambda key: model.embedding(model.init(key)["backbone"]), root_key(0))
    return (model.vocab_size, table.shape[0]), table.shape[1]


def bytes_per_chip(tree) -> int:
    """Of shapes with shardings, without what a chip pads."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def _keys(shape: tuple[int, ...], layout):
    key = jax.eval_shape(lambda: root_key(0))
    return jax.ShapeDtypeStruct(shape, key.dtype, sharding=layout)


def _said(mesh) -> str:
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
