"""What int8 kernels cost in accuracy: a small Dream trained here, its weights as float and as int8, side by side:

    python -m softmask_jax.benchmarks.int8 --folder=/tmp/int8 [--steps=600] [--adapter_steps=150] [--json out.json]

A Dream of 4 layers learns sums of two numbers from nothing, all of it in float32. Then its kernels become int8, and
both are compared on held-out conversations, same masks. At last an adapter (DoRA, two passes) learns differences on
either base. Minutes on 2 CPU cores; a folder that has the trained models already is used again."""
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import softmask_jax
from softmask_jax import config as config_schema
from softmask_jax.benchmarks.timing import benchmark_parser, publish
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.config.sections import Model, SoftMask
from softmask_jax.convert import converted, tiny_dream
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.data.chat.buckets import bucket_validation_batches
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.response_loss import example_coins
from softmask_jax.distributed import sharding
from softmask_jax.io.files import write_atomically
from softmask_jax.models import dream_denoiser
from softmask_jax.report.markdown import table
from softmask_jax.training import loop, tasks
from softmask_jax.training.intervals import bracketed
from softmask_jax.training.perplexity import Nats

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "torch_dtype": "float32"}
CONVERSATIONS = 4000
WAYS = tuple((base, products) for base in ("float", "int8") for products in ("float32", "bfloat16"))
KEY = 7


def config(folder: Path, base: str, chats: str, steps: int, **model) -> config_schema.Config:
    """Config of a run on `base` with the conversations `chats`."""
    adapted, warmup = "adapter" in model, max(1, steps // 20)
    return config_schema.from_dict({
        "model": {"kind": "dream", "base": str(folder / base), "compute_dtype": "float32", **model},
        "soft_mask": {"variant": "topk" if adapted else "none", "k": 1, "p_sm": 0.5},
        "data": {"source": "chat", "tokenizer": "base", "paths": f"jsonl:{folder / chats}", "buckets": "128",
                 "validation_fraction": 0.1, "cache_dir": str(folder / "cache")},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": warmup, "ema_decay": 0.0},
        "train": {"steps": steps, "global_batch_size": 16, "micro_batches": 1, "log_every": 50},
        "checkpoint": {"every": steps, "keep_best": 0},
        "eval": {"every": 0, "batch_size": 16},
        "sample": {"every": 0, "count": 0},
    })  # fmt: skip


def conversations(sign: int) -> Iterator[str]:
    """Sums (or differences) of two numbers as JSON lines that fit in 128 tokens."""
    for a, b in np.random.default_rng(sign + 1).integers(1, 100, (CONVERSATIONS, 2)).tolist():
        question = f"{a} {'+' if sign > 0 else '-'} {b}"
        turns = {"system": ".", "user": f"{question}?", "assistant": f"{question} = {a + sign * b}."}
        yield json.dumps({"messages": [{"role": role, "content": text} for role, text in turns.items()]}) + "\n"


def grow(folder: Path, steps: int) -> None:
    """Train `folder`/float and quantise it to `folder`/int8. RuntimeError if one fails."""

    def converted_to(name: str, source: str, *arguments: str) -> None:
        if not (folder / name).exists() and convert([f"--dst={folder / name}", f"--src={folder / source}", *arguments]):
            raise RuntimeError(f"Conversion to {folder / name} failed.")

    tiny_dream.make(folder, sizes=SIZES)
    for name, sign in (("sums", 1), ("differences", -1)):
        write_atomically(folder / f"{name}.jsonl", "".join(conversations(sign)))
    converted_to("start", "hf")
    loop.train(config(folder, "start", "sums.jsonl", steps), str(folder / "grown"))
    converted_to("float", "grown", "--to=orbax")
    converted_to("int8", "float", "--int8")


def held_out(folder: Path, chats: str) -> list[dict]:
    """Batches of the validation conversations, one epoch."""
    task = tasks.make(config(folder, "float", chats, 1, adapter="dora"), sharding.make_mesh(devices=jax.devices()[:1]))
    return list(bucket_validation_batches(task.validation, global_batch_size=16))


def losses(denoiser, params: Mapping, batches: Sequence[dict], p_sm: float = 0.0) -> Nats:
    """The recipe's validation loss per conversation."""
    objective = DreamLoss.from_config(config_schema.Config(soft_mask=SoftMask(k=1)))
    count = sum(int(batch["valid"].sum()) for batch in batches)

    @jax.jit
    def rows(params, batch):
        key = root_key(KEY)
        noisy = objective.validation_batch(batch, key, count, mask_token_id=denoiser.mask_token_id)
        losses = two_pass.row_scores(denoiser, objective.soft_mask, params, noisy).loss
        return jnp.where(example_coins(key, batch["index"], p_sm), losses["two_pass"], losses["one_pass"])

    return Nats(np.concatenate([np.asarray(rows(params, batch), np.float64)[batch["valid"]] for batch in batches]), 1)


def masked_logits(denoiser, params: Mapping, batches: Sequence[dict]) -> np.ndarray:
    """Logits [n V] float32 at masked positions of the first batches, single-pass."""
    objective = DreamLoss()

    @jax.jit
    def run(params, batch):
        noisy = objective.draw(batch, root_key(KEY), mask_token_id=denoiser.mask_token_id)
        backbone = params["backbone"]
        hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, noisy.xt), segment_ids=noisy.segment_ids)
        head = denoiser.head(backbone)
        z = jnp.matmul(hidden.astype(jnp.float32), head.weight.T.astype(jnp.float32), precision="highest")
        return z[..., : head.vocab_size], noisy.masked

    return np.concatenate([np.asarray(z)[np.asarray(masked)] for z, masked in (run(params, b) for b in batches[:8])])


@settled()
def measure(folder: Path, steps: int, adapter_steps: int) -> dict:
    """{"bases": a row per way in WAYS, "adapted": a row per base}; differences are to float, in float32."""
    grow(folder, steps)
    batches, bases, exact = held_out(folder, "sums.jsonl"), [], None
    for base, products in WAYS:
        hf_config = converted.read_ours(folder / base)["hf_config"]
        own = Model(kind="dream", base=str(folder / base), compute_dtype=products, base_dtype=base)
        denoiser, params = dream_denoiser.build(own, SoftMask(k=1), hf_config), softmask_jax.load(folder / base).params
        scores, z = losses(denoiser, params, batches), masked_logits(denoiser, params, batches)
        exact = exact or (scores, z)
        exact_scores, exact_z = exact
        bases.append(compared(scores, exact_scores) | {
            "base": base, "products": products, "logits": float(np.abs(z - exact_z).max() / np.abs(exact_z).max()),
            "logits_rms": float(np.sqrt(np.square(z - exact_z).mean() / np.square(exact_z).mean())),
            "agree": float((z.argmax(-1) == exact_z.argmax(-1)).mean()),
        })  # fmt: skip
    batches, adapted, exact = held_out(folder, "differences.jsonl"), [], None
    for base in ("float", "int8"):
        settings = config(folder, base, "differences.jsonl", adapter_steps, base_dtype=base, adapter="dora")
        loop.train(settings, str(folder / f"adapted_{base}"))
        after, before = (softmask_jax.load(folder / name) for name in (f"adapted_{base}", base))
        scores = losses(after.denoiser, after.params, batches, 0.5)
        exact = exact or scores
        start = losses(before.denoiser, before.params, batches).mean
        adapted.append(compared(scores, exact) | {"base": base, "before": start})
    return {"bases": bases, "adapted": adapted}


def compared(scores: Nats, other: Nats) -> dict:
    """Mean loss in nats, and paired difference to another model's with a 95 % interval."""
    low, high = scores.interval(other)
    return {"loss": scores.mean, "change": scores.mean - other.mean, "low": low, "high": high}


def markdown(figures: dict) -> str:
    def losses(row: Mapping) -> tuple[str, str]:
        return f"{row['loss']:.5f}", f"{row['change']:+.5f}{bracketed(row['low'], row['high'], '+.5f')}"

    bases = [
        (row["base"], row["products"], *losses(row), *(f"{row[key]:.2%}" for key in ("logits", "logits_rms", "agree")))
        for row in figures["bases"]
    ]
    adapted = [(row["base"], f"{row['before']:.5f}", *losses(row)) for row in figures["adapted"]]
    columns = "validation loss, nats", "change [95 %]"
    return "\n\n".join([
        table(("kernels", "products", *columns, "logits, largest", "logits, rms", "same likeliest token"), bases),
        "An adapter on either, differences instead of sums:",
        table(("kernels", "before", *columns), adapted),
    ])  # fmt: skip


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("int8", __doc__)
    parser.add_argument("--folder", required=True, help="for the models and runs; goes on with those that it has")
    parser.add_argument("--steps", type=int, default=600, help="of training the model")
    parser.add_argument("--adapter_steps", type=int, default=150, help="of training an adapter on either base")
    flags = parser.parse_args(argv)
    figures = measure(Path(os.path.expanduser(flags.folder)).absolute(), flags.steps, flags.adapter_steps)
    publish(markdown(figures), figures, flags.json)


if __name__ == "__main__":
    sys.exit(main())
