"""Masked diffusion of running text: the NELBO, its perplexity, the ancestral sampler."""
import jax
import numpy as np

from softmask_jax import data
from softmask_jax.config import Config
from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion.noise import Stream, row_keys, stream_key
from softmask_jax.distributed import sharding
from softmask_jax.samplers import MDLMSampler
from softmask_jax.training.perplexity import Perplexity
from softmask_jax.training.tasks.task import Task
from softmask_jax.training.tracking import scores


class RunningText(Task):
    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        super().__init__(config, mesh)
        self.data = data.build(config.data)
        self.tokenizer, self.info, self.row_length = self.data.tokenizer, self.data.info, config.data.seq_len
        sizes = {name: getattr(self.tokenizer, name) for name in ("vocab_size", "mask_token_id")}
        self.denoiser = self.family.build(config.model, config.soft_mask, sizes, mesh=mesh)
        objective, sample = self.family.objective(config), config.sample
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
        return scores(self.perplexity(state.eval_params(), batches, len(windows), config.seed))

    def rank(self, row: dict[str, float]) -> dict[str, float]:
        return {"validation/nelbo": row.get("two_pass/nelbo", row["one_pass/nelbo"])}

    def describe(self, row: dict[str, float]) -> str:
        parts = [f"one pass {row['one_pass/perplexity']:.2f}"]
        if "two_pass/perplexity" in row:
            parts.append(f"two passes with soft-masking {row['two_pass/perplexity']:.2f}")
        return f"validation perplexity: {', '.join(parts)}"

    def sample(self, state, step: int) -> list[str]:
        config, shards = self.config.sample, sharding.batch_shards(self.mesh)
        rows = -(-config.count // shards) * shards  # the same number on each device; extra rows are dropped
        keys = row_keys(stream_key(root_key(config.seed), Stream.SAMPLE, step), np.arange(rows))
        masks = np.full((rows, config.length or self.config.data.seq_len), self.denoiser.mask_token_id, np.int32)
        tokens = np.asarray(self.sampler(state.eval_params(), keys, masks).tokens)[: config.count]
        return [self.tokenizer.decode(row) for row in tokens]

    def describe_data(self) -> str:
        counts = f"{len(self.data.train):,} training and {len(self.data.validation):,} validation"
        return f"{counts} windows of {self.config.data.seq_len} tokens"
