"""Fine-tuning on conversations: weighted cross-entropy of responses, an adapter on a frozen base or all of it."""
import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config import Config
from softmask_jax.config.jax_settings import root_key
from softmask_jax.data.chat.buckets import Buckets, bucket_batches, bucket_validation_batches, steps_per_epoch
from softmask_jax.data.chat.sft import build_sft
from softmask_jax.data.chat.template import TURN_ENDS
from softmask_jax.data.pipeline import Batches
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.response_loss import example_coins
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.io.files import write_atomically
from softmask_jax.report.scored import taken_on
from softmask_jax.samplers import Generated
from softmask_jax.samplers.dream_generate import diffusion_generate
from softmask_jax.training.intervals import bracketed
from softmask_jax.training.perplexity import Nats, collect
from softmask_jax.training.tasks.task import Task, tokenizer_name
from softmask_jax.training.tracking import ends

SAMPLE_LENGTH = 128
CLOSED = -80.0  # raw scale of soft-masking that leaves plain masks
# Prompts are padded to it, for few compiled samplers.
PROMPT_MULTIPLE = 128


class Conversations(Task):
    samples_start = True

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        super().__init__(config, mesh)
        self.sft = build_sft(config.data, tokenizer=tokenizer_name(config.data.tokenizer, self.base))
        self.tokenizer = self.sft.tokenizer
        self.build(self.about)
        sizes, whole = bucket_sizes(config.data.buckets), config.data.pads == "row"
        self.train, self.validation = (
            Buckets(split, self.sft.pad_id, config.train.seed, sizes, whole_rows=whole)
            for split in (self.sft.train, self.sft.validation)
        )  # fmt: skip
        self.row_length = round(float(self.train.bucket_of.mean()))
        self.steps_per_epoch = steps_per_epoch(self.train, config.train.global_batch_size)
        # A continued run needs the same base, too.
        self.info = self.sft.info | {"fingerprint": fingerprint(self.sft, sizes, self.base, whole)}
        self.losses = jax.jit(self._losses, out_shardings=sharding.replicated(mesh))

    def save_tokenizer(self, folder: Path) -> None:
        super().save_tokenizer(folder)
        for name, text in self.sft.template.files().items():
            write_atomically(folder / name, text)

    def batches(self, start_step: int) -> Batches:
        return bucket_batches(self.train, start_step=start_step, **self.batching)

    def _losses(self, params, batch):
        """({name: losses [B]}, valid [B]) of validation examples; "" is the recipe's, whose coins choose the passes."""
        objective, key = self.family.objective(self.config), root_key(self.config.eval.seed)
        noisy = objective.validation_batch(batch, key, len(self.validation), mask_token_id=self.denoiser.mask_token_id)
        losses = two_pass.row_scores(self.denoiser, objective.soft_mask, params, noisy).loss
        coins = example_coins(key, batch["index"], self.config.soft_mask.p_sm)
        recipe = jnp.where(coins, losses.get("two_pass", losses["one_pass"]), losses["one_pass"])
        return {"": recipe} | losses, batch["valid"]

    def validate(self, state, *, final: bool) -> dict[str, float]:
        """The recipe's loss; if final, also one pass and two for all examples."""
        losses = self._validation(state.eval_params())
        shown = losses if final and "two_pass" in losses else ("",)
        row = {}
        for name in shown:
            loss = f"{name}/loss" if name else "loss"
            row |= {loss: losses[name].mean} | ends(f"{loss}_", losses[name].interval())
        if "two_pass" in shown:
            one, two = losses["one_pass"], losses["two_pass"]
            row |= {"gain/loss": one.mean - two.mean} | ends("gain/loss_", one.interval(two))
        return row | {"conversations": len(losses[""].windows), "conversations_in_split": len(self.validation)}

    def _validation(self, params) -> dict[str, Nats]:
        size = self.config.eval.batch_size
        batches = bucket_validation_batches(self.validation, global_batch_size=size, **self.host)
        losses = collect(self.losses(params, sharding.global_batch(batch, self.mesh)) for batch in batches)
        return {name: Nats(values, 1) for name, values in losses.items()}

    def rank(self, row: dict[str, float]) -> dict[str, float]:
        return {"validation/loss": row["loss"]}

    def describe(self, row: dict[str, float]) -> str:
        return f"validation loss on {taken_on(row)}: {row['loss']:.4f}{bracketed(row.get('loss_low'), row.get('loss_high'))}"

    def sample(self, state, step: int) -> dict[str, list[str]]:
        """Answers to the first prompts of the validation split, the likeliest token at every position, beside the
        reference answers. At step 0 the base answers with plain masks."""
        config, params = self.config.sample, state.eval_params()
        examples = [self.sft.validation[i] for i in range(min(config.count, len(self.sft.validation)))]
        if not examples:
            return {"texts": []}
        if step == 0 and not self.config.init.checkpoint:
            closed = {"raw_scale": jnp.full_like(params["soft_mask"]["raw_scale"], CLOSED)}
            params = params | {"soft_mask": params["soft_mask"] | closed}
        prompts = [ids[:count] for ids, count in examples]
        out = self._answered(params, prompts, SoftMask.from_config(self.config.soft_mask), config.steps)
        decode, answers = self.tokenizer.decode, np.asarray(out.tokens)[:, -self.length :]
        return {
            "texts": [decode(prompt) + decode(answer) for prompt, answer in zip(prompts, answers, strict=True)],
            "prompts": list(map(decode, prompts)),
            "answers": [decode(self._text(answer)) for answer in answers],
            "references": [decode(self._text(ids[count:])) for ids, count in examples],
        }

    def denoised(self, state, soft_mask: SoftMask, steps: int) -> tuple[Generated, np.ndarray]:
        """The answer to the first validation prompt."""
        ids, count = self.sft.validation[0]
        out = self._answered(state.eval_params(), [ids[:count]], soft_mask, steps, trace=True)
        total = out.tokens.shape[1]
        return out, (np.arange(total) >= total - self.length - count)[None].astype(np.int32)

    def _answered(self, params, prompts, soft_mask: SoftMask, steps: int, **options) -> Generated:
        return diffusion_generate(
            self.denoiser, params, prompts, max_new_tokens=self.length, steps=min(steps, self.length),
            pad_token_id=self.sft.pad_id, soft_mask=soft_mask, alg=self.family.default_alg, temperature=0.0,
            pad_multiple=PROMPT_MULTIPLE, **options,
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens of a sample's answer."""
        return self.config.sample.length or SAMPLE_LENGTH

    def _text(self, answer: np.ndarray) -> np.ndarray:
        """An answer's ids [n] up to the first that ends it."""
        special = self.tokenizer.special_tokens
        stops = [self.sft.pad_id, self.tokenizer.eos_id, *(special[name] for name in TURN_ENDS if name in special)]
        ends = np.flatnonzero(np.isin(answer, stops))
        return answer[: ends[0]] if len(ends) else answer

    def describe_data(self) -> str:
        counts = f"{len(self.train):,} training and {len(self.validation):,} validation conversations"
        lengths = f"{self.train.bucket_of.min()} to {self.train.bucket_of.max()} tokens"
        return f"{counts} in rows of {lengths}, {self.steps_per_epoch:,} steps an epoch"


def fingerprint(sft, sizes: tuple[int, ...], base: Path, whole_rows: bool) -> str:
    """Hash of the conversations, the lengths of their rows and the base: a run may change none of them."""
    content = f"{sft.info['fingerprint']} {sizes} {'whole rows ' * whole_rows}".encode()
    return hashlib.sha256(content + (base / "manifest.json").read_bytes()).hexdigest()


def bucket_sizes(text: str) -> tuple[int, ...]:
    """Row lengths of config.data.buckets, such as "512,1024,2048". ValueError for other text."""
    try:
        return tuple(int(size) for size in text.split(",") if size.strip())
    except ValueError:
        raise ValueError(f"config.data.buckets='{text}' must be lengths such as 512,1024,2048, or empty.") from None
