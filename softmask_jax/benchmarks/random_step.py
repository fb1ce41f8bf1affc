"""A compiled train step of a DiT on one device with random weights and tokens."""
import argparse
import dataclasses
from typing import NamedTuple, Self

import jax
import numpy as np

from softmask_jax import config
from softmask_jax.config.jax_settings import root_key
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser
from softmask_jax.training import optimizer, train_state, train_step


class Shape(NamedTuple):
    """Width, blocks and vocabulary of a DiT; in a flag 256x6x50258."""

    hidden_size: int
    num_blocks: int
    vocab_size: int

    @classmethod
    def parse(cls, text: str) -> Self:
        try:
            shape = cls(*map(int, text.split("x")))
        except (TypeError, ValueError):
            raise argparse.ArgumentTypeError(f"{text} is not width x blocks x vocabulary, as 256x6x50258") from None
        if min(shape) < 1 or shape.vocab_size < 8:
            raise argparse.ArgumentTypeError(f"{text} must have positive sizes and a vocabulary of at least 8")
        return shape


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the batch, in rows and positions, and of an attention head."""

    batch: int = 4
    seq_len: int = 256
    head_width: int = 64
    compute_dtype: str = "float32"


def settings_of(sizes: Sizes, shape: Shape, remat: str = "none") -> config.Config:
    """The config of a benchmark. ValueError if the heads do not fit."""
    if shape.hidden_size % sizes.head_width:
        raise ValueError(f"The width {shape.hidden_size} must be a multiple of --head_width={sizes.head_width}.")
    return config.from_dict(dict(
        model=dict(hidden_size=shape.hidden_size, num_blocks=shape.num_blocks, dropout=0.0, remat=remat,
                   num_heads=shape.hidden_size // sizes.head_width, compute_dtype=sizes.compute_dtype),
        soft_mask=dict(init_scale=0.5), train=dict(global_batch_size=sizes.batch), data=dict(seq_len=sizes.seq_len),
    ))  # fmt: skip


class RandomStep:
    """One train step, compiled for calls with the same kind of `coins` (see `TrainStep.train_step`).

    Attributes:
      state: of training; a call replaces it.
      batch: random tokens [B L] and their rows.
      key: root of all noise.
      train: the `TrainStep`.
      temporary_bytes: memory of the compiled program beside arguments and results.
    """

    def __init__(self, settings: config.Config, vocab_size: int, *coins: jax.Array):
        mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
        sizes = dict(vocab_size=vocab_size, mask_token_id=vocab_size - 1)
        model = denoiser.build(settings.model, settings.soft_mask, mesh=mesh, **sizes)
        tx = optimizer.make(settings.optimizer, settings.updates)
        rows, length = settings.train.global_batch_size, settings.data.seq_len
        tokens = np.random.default_rng(0).integers(0, vocab_size - 1, (rows, length), np.int32)
        self.batch = sharding.global_batch({"tokens": tokens, "rows": np.arange(rows, dtype=np.int32)}, mesh)
        self.state, self.key = train_state.initialise(model, tx, mesh, seed=0), root_key(0)
        self.train = train_step.make(settings, model, tx)
        step = jax.jit(self.train.train_step, donate_argnums=0)
        self._step = step.lower(self.state, self.batch, self.key, *coins).compile()
        self.temporary_bytes = self._step.memory_analysis().temp_size_in_bytes

    def __call__(self, *coins: jax.Array) -> tuple[train_state.TrainState, train_step.Metrics]:
        self.state, metrics = self._step(self.state, self.batch, self.key, *coins)
        return self.state, metrics
