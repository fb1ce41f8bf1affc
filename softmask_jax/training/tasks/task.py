"""What the train loop asks of a task."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax

from softmask_jax.config import Config, Model
from softmask_jax.convert import bases, converted
from softmask_jax.distributed import sharding
from softmask_jax.models import families


class Task:
    """Everything that depends on the data and the objective. ValueError or OSError when data or sizes do not fit.

    Attributes:
      denoiser, tokenizer: see `denoiser.Denoiser`, `data.Tokenizer`.
      base, about: folder of the converted model that is fine-tuned, and its config.json; None for a new model.
      info: JSON-able facts of the data, with its "fingerprint".
      row_length: mean tokens of a row.
      steps_per_epoch: updates of one pass over the training set, maybe not a whole number.
      forwards_per_step: cost of a single-pass step, in forward passes.

    Every task defines:
      describe_data() -> str: sizes of the splits, and of an epoch.
      batches(start_step): context manager of an iterator over this host's share of the training batches.
      validate(state, *, final) -> dict[str, float]: a row of scores, and how much of the split they are taken on.
      rank(row) -> dict[str, float]: the score that ranks checkpoints; lower is better.
      describe(row) -> str: a row of scores in words.
      sample(state, step) -> dict[str, list[str]]: a row with "texts".
      denoised(state, soft_mask, steps) -> (Generated with its trace, attention mask [B L] or None): a validation text
        completed; of the first row.

    samples_start: whether to sample before the first step, too."""

    forwards_per_step, samples_start = 3.0, False

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self.config, self.mesh, self.family = config, mesh, families.of(config.model.kind)
        self.host = {"host_index": jax.process_index(), "host_count": jax.process_count()}
        sizes = ("global_batch_size", "seed", "micro_batches")
        self.batching = {name: getattr(config.train, name) for name in sizes} | self.host
        sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
        self.base = self.about = None
        if self.family.kind.from_base:
            self.base, self.about = bases.folder_of(config.model), read_base(config.model)
            converted.check_base_dtype(self.base, self.about, config.model.base_dtype)

    def build(self, about: Mapping) -> None:
        """Make the denoiser, and give the tokenizer its mask; ValueError unless the tokenizer is that of the base."""
        self.denoiser = self.family.build(self.config.model, self.config.soft_mask, about, mesh=self.mesh)
        if self.denoiser.frozen:  # the backward pass of a frozen base costs one forward pass, not two
            self.forwards_per_step = 2.0
        if self.base is not None:
            self.tokenizer = self.tokenizer.with_mask(self.denoiser.mask_token_id)
            check_tokenizer(self.tokenizer, self.denoiser, self.base)
        if self.denoiser.used_vocab is not None:
            used = min(self.denoiser.used_vocab, self.tokenizer.vocab_size)
            self.denoiser = dataclasses.replace(self.denoiser, used_vocab=used)

    def save_tokenizer(self, folder: Path) -> None:
        """Write all files that turn texts into ids and back."""
        self.tokenizer.save(folder)

    def load_base(self, shapes: dict) -> dict:
        """The base that is fine-tuned, or its frozen part, laid out as `shapes`; {} for a new model."""
        if self.base is None:
            return {}
        return converted.read_base_params(self.base, {"backbone": shapes})[0]["backbone"]


def tokenizer_name(name: str, base: Path | None) -> str:
    """`config.data.tokenizer`, with the base's folder for "base"."""
    return str(base / "tokenizer") if name == "base" and base is not None else name


def read_base(model: Model) -> dict:
    """config.json of the base, a converted model of the same family. FileNotFoundError or ValueError without one."""
    folder = bases.folder_of(model)
    if not converted.is_converted(folder):
        raise FileNotFoundError(bases.missing(model))
    about = converted.read_ours(folder)
    if about["kind"] != model.kind:
        makes = f"{bases.command_line(model, 'FOLDER')} makes another"
        raise ValueError(f"config.model.base: {folder} holds a converted {about['kind']}; {makes}.")
    return about


def check_tokenizer(tokenizer, denoiser, base: Path) -> None:
    """ValueError for a tokenizer whose ids are not the model's."""
    if tokenizer.vocab_size > denoiser.vocab_size or tokenizer.mask_token_id != denoiser.mask_token_id:
        ours = f"{tokenizer.vocab_size} tokens and the mask {tokenizer.mask_token_id}"
        theirs = f"the model in {base} {denoiser.vocab_size} and {denoiser.mask_token_id}"
        raise ValueError(f"config.data.tokenizer has {ours}, {theirs}; give --config.data.tokenizer=base.")
