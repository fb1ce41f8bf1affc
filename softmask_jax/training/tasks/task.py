"""What the train loop asks of a task."""
from pathlib import Path

import jax

from softmask_jax.config import Config
from softmask_jax.distributed import sharding
from softmask_jax.models import families


class Task:
    """Everything that depends on the data and the objective. ValueError or OSError when data or sizes do not fit.

    Attributes:
      denoiser, tokenizer: see `denoiser.Denoiser`, `data.Tokenizer`.
      info: JSON-able facts of the data, with its "fingerprint".
      row_length: mean tokens of a row.
      forwards_per_step: cost of a single-pass step, in forward passes.

    Every task defines:
      describe_data() -> str: sizes of the splits.
      batches(start_step): context manager of an iterator over this host's share of the training batches.
      validate(state, *, final) -> dict[str, float]: a row of scores; of the whole validation split if final.
      rank(row) -> dict[str, float]: the score that ranks checkpoints; lower is better.
      describe(row) -> str: a row of scores in words.
      sample(state, step) -> list[str]: texts."""

    forwards_per_step = 3.0

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self.config, self.mesh, self.family = config, mesh, families.of(config.model.kind)
        self.host = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        sizes = ("global_batch_size", "seed", "micro_batches")
        self.batching = {name: getattr(config.train, name) for name in sizes} | self.host
        sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)

    def save_tokenizer(self, folder: Path) -> None:
        """Write all files that turn texts into ids and back."""
        self.tokenizer.save(folder)

    def load_base(self, shapes: dict) -> dict:
        """The base that is fine-tuned, or its frozen part, laid out as `shapes`; {} for a new model."""
        return {}
