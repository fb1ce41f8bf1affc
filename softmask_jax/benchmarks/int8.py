"""What int8 kernels cost in accuracy: a small Dream trained here, its weights as float and as int8, side by side:

    python -m softmask_jax.benchmarks.int8 --folder=/tmp/int8 [--steps=600] [--adapter_steps=150] [--json out.json]

A Dream of 4 layers learns sums of two numbers from nothing, all of it in float32. Then its kernels become int8, and
both are compared on held-out conversations, same masks. At last an adapter (DoRA, two passes) learns differences on
either base. Minutes on 2 CPU cores; a folder that has the trained models already is used again.
"""
import json
import os
import sys
from collections.abc import Mapping, Sequence
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
from softmask_jax.diffusion.dream_loss import DreamLoss, example_coins
from softmask_jax.distributed import sharding
from softmask_jax.io.files import check_writable, write_atomically
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
    """Of a run on `base` that learns the conversations `chats`."""
    adapted = model.get("adapter", "none") != "none"
    return config_schema.from_dict({
        "model": {"kind": "dream", "base": str(folder / base), "compute_dtype": "float32", **model},
        "soft_mask": {"variant": "topk" if adapted else "none", "k": 1, "p_sm": 0.5},
        "data": {"source": "chat", "tokenizer": "base", "paths": f"jsonl:{folder / chats}", "buckets": "128",
                 "validation_fraction": 0.1, "cache_dir": str(folder / "cache")},
        "optimizer": {"learning_rate": 2e-3, "schedule": "cosine", "warmup_steps": max(1, steps // 20), "ema_decay": 0.0},
        "train": {"steps": steps, "global_batch_size": 16, "micro_batches": 1, "log_every": 50},
        "checkpoint": {"every": steps, "keep_best": 0},
        "eval": {"every": 0, "batch_size": 16},
        "sample": {"every": 0, "count": 0},
    })  # fmt: skip


def conversations(path: Path, sign: int) -> None:
    """Sums or differences of two numbers, in rows short enough for 128 tokens."""
    def chats():
        for a, b in np.random.default_rng(sign + 1).integers(1, 100, (CONVERSATIONS, 2)).tolist():
            asked, roles = f"{a} {'+' if sign > 0 else '-'} {b}", ("system", "user", "assistant")
            said = ".", f"{asked}?", f"{asked} = {a + sign * b}."
            yield {"messages": [{"role": role, "content": text} for role, text in zip(roles, said)]}

    write_atomically(path, "".join(json.dumps(chat) + "\n" for chat in chats()))


def grow(folder: Path, steps: int) -> None:
    """Makes `folder`/float and `folder`/int8, the trained model and its quantised twin. RuntimeError if one fails."""
    def converted_to(name: str, *arguments: str) -> None:
        if not (folder / name).exists() and convert([f"--dst={folder / name}", *arguments]):
            raise RuntimeError(f"Conversion to {folder / name} failed.")

    tiny_dream.make(folder, sizes=SIZES)
    conversations(folder / "sums.jsonl", 1)
    conversations(folder / "differences.jsonl", -1)
    converted_to("start", f"--src={folder / 'hf'}")
    loop.train(config(folder, "start", "sums.jsonl", steps), str(folder / "grown"))
    converted_to("float", f"--src={folder / 'grown'}", "--to=orbax")
    converted_to("int8", f"--src={folder / 'float'}", "--int8")


def adapt(folder: Path, base: str, steps: int) -> Path:
    """The run of an adapter on a base."""
    settings = config(folder, base, "differences.jsonl", steps, base_dtype=base, adapter="dora")
    loop.train(settings, str(folder / f"adapted_{base}"))
    return folder / f"adapted_{base}"


def held_out(folder: Path, chats: str) -> list[dict]:
    """Batches of the validation conversations, each one once."""
    task = tasks.make(config(folder, "float", chats, 1, adapter="dora"), sharding.make_mesh(devices=jax.devices()[:1]))
    return list(bucket_validation_batches(task.validation, global_batch_size=16))


def losses(denoiser, params: Mapping, batches: Sequence[dict], p_sm: float = 0.0) -> Nats:
    """The recipe's validation loss of every conversation."""
    spec = DreamLoss.from_config(config_schema.Config(soft_mask=SoftMask(k=1)))
    count = sum(int(batch["valid"].sum()) for batch in batches)

    @jax.jit
    def rows(params, batch):
        key = root_key(KEY)
        noisy = spec.validation_batch(batch, key, count, mask_token_id=denoiser.mask_token_id)
        losses = two_pass.row_scores(denoiser, spec.soft_mask, params, noisy).loss
        return jnp.where(example_coins(key, batch["index"], p_sm), losses["two_pass"], losses["one_pass"])

    return Nats(np.concatenate([np.asarray(rows(params, batch), np.float64)[batch["valid"]] for batch in batches]), 1)


def masked_logits(denoiser, params: Mapping, batches: Sequence[dict]) -> np.ndarray:
    """[n V] float32, at the masked positions of the first batches; one pass."""
    objective = DreamLoss()

    @jax.jit
    def run(params, batch):
        noisy = objective.draw(batch, root_key(KEY), mask_token_id=denoiser.mask_token_id)
        backbone = params["backbone"]
        hidden, _ = denoiser.trunk(backbone, denoiser.embed(backbone, noisy.xt), segment_ids=noisy.segment_ids)
        head = denoiser.head(backbone)
        z = jnp.matmul(hidden.astype(jnp.float32), head.weight.T.astype(jnp.float32), precision="highest")
        return z[..., : head.vocab_size], noisy.masked

    found = [run(params, batch) for batch in batches[:8]]
    return np.concatenate([np.asarray(z)[np.asarray(masked)] for z, masked in found])


@settled()
def measure(folder: Path, steps: int, adapter_steps: int) -> dict:
    """{"bases": a row for each of WAYS, "adapted": a row for each base}; changes are against float, in float32."""
    grow(folder, steps)
    batches, rows, first = held_out(folder, "sums.jsonl"), [], None
    for base, products in WAYS:
        hf_config = converted.read_ours(folder / base)["hf_config"]
        own = Model(kind="dream", base=str(folder / base), compute_dtype=products, base_dtype=base)
        denoiser, params = dream_denoiser.build(own, SoftMask(k=1), hf_config), softmask_jax.load(folder / base).params
        found = losses(denoiser, params, batches), masked_logits(denoiser, params, batches)
        first = first or found
        rows.append(compared(found[0], first[0]) | {
            "base": base, "products": products, "logits": float(np.abs(found[1] - first[1]).max() / np.abs(first[1]).max()),
            "logits_rms": float(np.sqrt(np.square(found[1] - first[1]).mean() / np.square(first[1]).mean())),
            "agree": float((found[1].argmax(-1) == first[1].argmax(-1)).mean()),
        })  # fmt: skip
    batches, adapted, first = held_out(folder, "differences.jsonl"), [], None
    for base in ("float", "int8"):
        model = softmask_jax.load(adapt(folder, base, adapter_steps))
        before = softmask_jax.load(folder / base)
        found = losses(model.denoiser, model.params, batches, 0.5)
        first = first or found
        start = losses(before.denoiser, before.params, batches).mean
        adapted.append(compared(found, first) | {"base": base, "before": start})
    return {"bases": rows, "adapted": adapted}


def compared(scores: Nats, other: Nats) -> dict:
    """Mean loss in nats, and its paired difference to another model's with a 95 % interval."""
    low, high = scores.interval(other)
    return {"loss": scores.mean, "change": scores.mean - other.mean, "low": low, "high": high}


def markdown(found: dict) -> str:
    def change(row: Mapping) -> str:
        return f"{row['change']:+.5f}{bracketed(row['low'], row['high'], '+.5f')}"

    bases = [
        (r["base"], r["products"], f"{r['loss']:.5f}", change(r), f"{r['logits']:.2%}", f"{r['logits_rms']:.2%}",
         f"{r['agree']:.2%}") for r in found["bases"]
    ]  # fmt: skip
    adapted = [(r["base"], f"{r['before']:.5f}", f"{r['loss']:.5f}", change(r)) for r in found["adapted"]]
    header = "kernels", "products", "validation loss, nats", "change [95 %]", "logits, largest", "logits, rms", "same likeliest token"
    return "\n\n".join([
        table(header, bases), "An adapter on either, differences instead of sums:",
        table(("kernels", "before", "validation loss, nats", "change [95 %]"), adapted),
    ])  # fmt: skip


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("int8", __doc__)
    parser.add_argument("--folder", required=True, help="for the models and runs; goes on with those that it has")
    parser.add_argument("--steps", type=int, default=600, help="of training the model")
    parser.add_argument("--adapter_steps", type=int, default=150, help="of training an adapter on either base")
    flags = parser.parse_args(argv)
    check_writable(flags.json)
    found = measure(Path(os.path.expanduser(flags.folder)).absolute(), flags.steps, flags.adapter_steps)
    publish(markdown(found), found, flags.json)


if __name__ == "__main__":
    sys.exit(main())
