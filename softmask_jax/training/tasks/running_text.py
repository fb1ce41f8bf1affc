"""Masked diffusion of running text: a family's loss, the perplexity of the NELBO, the ancestral sampler."""
import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from softmask_jax import data
from softmask_jax.config import Config, Data
from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.noise import Stream, row_keys, stream_key
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.report.scored import taken_on
from softmask_jax.samplers import Generated, MDLMSampler
from softmask_jax.training.perplexity import Perplexity
from softmask_jax.training.tasks.task import Task, tokenizer_name
from softmask_jax.training.tracking import scores


class RunningText(Task):
    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        super().__init__(config, mesh)
        self.data = build_texts(config.data, self.base)
        self.tokenizer, self.info, self.row_length = self.data.tokenizer, self.data.info, config.data.seq_len
        self.steps_per_epoch = len(self.data.train) / config.train.global_batch_size
        self.build(self.about or {name: getattr(self.tokenizer, name) for name in ("vocab_size", "mask_token_id")})
        objective, sample = Nelbo.from_config(config), config.sample
        self.perplexity = Perplexity(self.denoiser, objective, mesh)
        sampler = MDLMSampler(self.denoiser, objective.soft_mask, sample.steps, nucleus_p=sample.nucleus_p)
        self.sampler = jax.jit(sampler, out_shardings=sharding.replicated(mesh))

    def batches(self, start_step: int) -> data.Batches:
        prefetch = self.config.data.prefetch
        return data.batches(self.data.train, start_step=start_step, prefetch=prefetch, balanced=True, **self.batching)

    def validate(self, state, *, final: bool) -> dict[str, float]:
        config, windows = self.config.eval, self.data.validation
        size, most = config.batch_size, config.max_windows if final else config.windows
        batches = data.validation_batches(windows, global_batch_size=size, max_windows=most, **self.host)
        estimates = self.perplexity(state.eval_params(), batches, len(windows), config.seed)
        return scores(estimates) | {"windows": len(estimates["one_pass"].windows), "windows_in_split": len(windows)}

    def rank(self, row: dict[str, float]) -> dict[str, float]:
        return {"validation/nelbo": row.get("two_pass/nelbo", row["one_pass/nelbo"])}

    def describe(self, row: dict[str, float]) -> str:
        parts = [f"one pass {row['one_pass/perplexity']:.2f}"]
        if "two_pass/perplexity" in row:
            parts.append(f"two passes with soft-masking {row['two_pass/perplexity']:.2f}")
        return f"validation perplexity on {taken_on(row)}: {', '.join(parts)}"

    def sample(self, state, step: int) -> dict[str, list[str]]:
        config, shards = self.config.sample, sharding.batch_shards(self.mesh)
        rows = -(-config.count // shards) * shards  # the same number on each device; extra rows are dropped
        keys = row_keys(stream_key(root_key(config.seed), Stream.SAMPLE, step), np.arange(rows))
        masks = np.full((rows, config.length or self.config.data.seq_len), self.denoiser.mask_token_id, np.int32)
        tokens = np.asarray(self.sampler(state.eval_params(), keys, masks).tokens)[: config.count]
        return {"texts": [self.tokenizer.decode(row) for row in tokens]}

    def denoised(self, state, soft_mask: SoftMask, steps: int) -> tuple[Generated, None]:
        """The first validation window, all but its first quarter masked."""
        rows, length = sharding.batch_shards(self.mesh), self.config.sample.length or self.config.data.seq_len
        tokens = np.repeat(self.data.validation.gather(np.arange(1))[:, :length], rows, 0).astype(np.int32)
        tokens[:, tokens.shape[1] // 4 :] = self.denoiser.mask_token_id
        keys = row_keys(stream_key(root_key(self.config.sample.seed), Stream.SAMPLE, 0), np.arange(rows))
        nucleus = self.config.sample.nucleus_p
        sampler = MDLMSampler(self.denoiser, soft_mask, steps, nucleus_p=nucleus, trace=True)
        run = jax.jit(sampler, out_shardings=sharding.replicated(self.mesh))
        return run(state.eval_params(), keys, tokens), None

    def describe_data(self) -> str:
        counts = f"{len(self.data.train):,} training and {len(self.data.validation):,} validation"
        return f"{counts} windows of {self.config.data.seq_len} tokens, {self.steps_per_epoch:,.1f} steps an epoch"


def build_texts(config: Data, base: Path | None) -> data.Data:
    """`data.build` of a run, whose fingerprint holds the base's, too: a run may change neither."""
    built = data.build(config, tokenizer=tokenizer_name(config.tokenizer, base))
    if base is None:
        return built
    content = built.info["fingerprint"].encode() + (base / "manifest.json").read_bytes()
    return dataclasses.replace(built, info=built.info | {"fingerprint": hashlib.sha256(content).hexdigest()})
