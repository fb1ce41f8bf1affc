"""Fine-tuning on conversations: weighted cross-entropy of responses, an adapter on a frozen base or all of it."""
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.config import Config
from softmask_jax.config.jax_settings import root_key
from softmask_jax.convert import converted
from softmask_jax.data.chat.buckets import Buckets, bucket_batches, bucket_validation_batches
from softmask_jax.data.chat.sft import build_sft
from softmask_jax.data.pipeline import Batches
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.dream_loss import example_coins
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.io.files import write_atomically
from softmask_jax.samplers.dream_generate import diffusion_generate
from softmask_jax.training.intervals import bracketed
from softmask_jax.training.perplexity import Nats, collect
from softmask_jax.training.tasks.task import Task
from softmask_jax.training.tracking import ends

SAMPLE_LENGTH = 128
# Prompts are padded to it, for few compiled samplers.
PROMPT_MULTIPLE = 128
GET_BASE = "python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst={} makes one"


class Conversations(Task):
    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        super().__init__(config, mesh)
        self.base = Path(os.path.expanduser(config.model.base))
        about = read_base(self.base, config.model.kind)
        converted.check_base_dtype(self.base, about, config.model.base_dtype)
        name = config.data.tokenizer
        self.sft = build_sft(config.data, tokenizer=str(self.base / "tokenizer") if name == "base" else name)
        self.tokenizer = self.sft.tokenizer
        self.denoiser = self.family.build(config.model, config.soft_mask, about, mesh=mesh)
        if self.denoiser.frozen:  # the backward pass of a frozen base costs one forward pass, not two
            self.forwards_per_step = 2.0
        check_tokenizer(self.tokenizer, self.denoiser, self.base)
        sizes = bucket_sizes(config.data.buckets)
        splits = self.sft.train, self.sft.validation
        self.train, self.validation = (Buckets(split, self.sft.pad_id, config.train.seed, sizes) for split in splits)
        self.row_length = round(float(self.train.bucket_of.mean()))
        # A continued run needs the same base, too.
        self.info = self.sft.info | {"fingerprint": fingerprint(self.sft, sizes, self.base)}
        self.losses = jax.jit(self._losses, out_shardings=sharding.replicated(mesh))

    def save_tokenizer(self, folder: Path) -> None:
        super().save_tokenizer(folder)
        for name, text in self.sft.template.files().items():
            write_atomically(folder / name, text)

    def load_base(self, shapes: dict) -> dict:
        return converted.read_dream(self.base, {"backbone": shapes})[0]["backbone"]

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
        return row

    def _validation(self, params) -> dict[str, Nats]:
        size = self.config.eval.batch_size
        batches = bucket_validation_batches(self.validation, global_batch_size=size, **self.host)
        losses = collect(self.losses(params, sharding.global_batch(batch, self.mesh)) for batch in batches)
        return {name: Nats(values, 1) for name, values in losses.items()}

    def rank(self, row: dict[str, float]) -> dict[str, float]:
        return {"validation/loss": row["loss"]}

    def describe(self, row: dict[str, float]) -> str:
        return f"validation loss {row['loss']:.4f}{bracketed(row.get('loss_low'), row.get('loss_high'))}"

    def sample(self, state, step: int) -> list[str]:
        """Answers to the first prompts of the validation split, the likeliest token at every position."""
        config = self.config.sample
        examples = (self.sft.validation[i] for i in range(min(config.count, len(self.sft.validation))))
        if not (prompts := [ids[:length] for ids, length in examples]):
            return []
        length = config.length or SAMPLE_LENGTH
        out = diffusion_generate(
            self.denoiser, state.eval_params(), prompts, max_new_tokens=length, steps=min(config.steps, length),
            pad_token_id=self.sft.pad_id, soft_mask=SoftMask.from_config(self.config.soft_mask),
            alg=self.family.default_alg, temperature=0.0, pad_multiple=PROMPT_MULTIPLE,
        )  # fmt: skip
        decode, answers = self.tokenizer.decode, np.asarray(out.tokens)[:, -length:]
        return [decode(prompt) + decode(answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def describe_data(self) -> str:
        counts = f"{len(self.train):,} training and {len(self.validation):,} validation conversations"
        return f"{counts} in rows of {self.train.bucket_of.min()} to {self.train.bucket_of.max()} tokens"


def read_base(folder: Path, kind: str) -> dict:
    """config.json of a converted model of a family. FileNotFoundError or ValueError if there is none."""
    if not (folder / "config.json").is_file() or not converted.is_converted(folder):
        raise FileNotFoundError(f"config.model.base: no converted model in {folder}; {GET_BASE.format(folder)}.")
    about = converted.read_ours(folder)
    if about["kind"] != kind:
        raise ValueError(f"config.model.base: {folder} holds a converted {about['kind']}; {GET_BASE.format('DIR')}.")
    return about


def check_tokenizer(tokenizer, denoiser, base: Path) -> None:
    """ValueError for a tokenizer whose ids are not the model's."""
    if tokenizer.vocab_size > denoiser.vocab_size or tokenizer.mask_token_id != denoiser.mask_token_id:
        ours = f"{tokenizer.vocab_size} tokens and the mask {tokenizer.mask_token_id}"
        theirs = f"the model in {base} {denoiser.vocab_size} and {denoiser.mask_token_id}"
        raise ValueError(f"config.data.tokenizer has {ours}, {theirs}; give --config.data.tokenizer=base.")


def fingerprint(sft, sizes: tuple[int, ...], base: Path) -> str:
    """Hash of the conversations, the lengths of their rows and the base: a run may change none of them."""
    content = f"{sft.info['fingerprint']} {sizes} ".encode() + (base / "manifest.json").read_bytes()
    return hashlib.sha256(content).hexdigest()


def bucket_sizes(text: str) -> tuple[int, ...]:
    """Row lengths of config.data.buckets, such as "512,1024,2048". ValueError for other text."""
    try:
        return tuple(int(size) for size in text.split(",") if size.strip())
    except ValueError:
        raise ValueError(f"config.data.buckets='{text}' must be lengths such as 512,1024,2048, or empty.") from None
