"""What soft-masking, caches and the compiled loop do to the speed of generation, on this machine:

    python -m softmask_jax.benchmarks.generate [--rounds 5] [--device cpu] [--json out.json]

Three tables from one run, programs timed in turn, random weights: seconds of a step of the whole sampler without and
with soft-masking (+12 % in the paper), for MDLM (169M parameters, k = 3) and a narrower Dream (k = 1); decoding in
blocks without a cache, with the prefix cached and with all but the block cached; the compiled loop beside the same step
called from Python."""
import dataclasses
import sys
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config
from softmask_jax.benchmarks.timing import (
    alternate, benchmark_parser, machine, positive, prepare, publish, quartiles, spread_text,
)  # fmt: skip
from softmask_jax.config import Model
from softmask_jax.config.command_line import command
from softmask_jax.config.jax_settings import root_key, settled
from softmask_jax.diffusion import soft_masking, two_pass
from softmask_jax.models import denoiser, dream_denoiser
from softmask_jax.report.markdown import table
from softmask_jax.samplers import BlockSampler, DreamSampler, MDLMSampler, SoftMask, commit, dream_draw
from softmask_jax.samplers.filling import run


@dataclasses.dataclass(frozen=True)
class Sizes:
    """mdlm_*: of the DiT; dream_*: of the Dream, whose first `prompt` positions are fixed. length: positions of a row.
    The Dream of the loop's table has a width of `small` and two layers."""

    mdlm_width: int = 768
    mdlm_blocks: int = 12
    mdlm_heads: int = 12
    mdlm_vocabulary: int = 50_258
    dream_width: int = 896
    dream_layers: int = 12
    dream_heads: int = 14
    dream_kv_heads: int = 2
    dream_mlp: int = 4864
    dream_vocabulary: int = 152_064
    length: int = 256
    prompt: int = 64
    block_length: int = 32
    small: int = 64
    compute_dtype: str = "float32"


def mdlm(sizes: Sizes) -> tuple[denoiser.Denoiser, dict]:
    """A DiT with random parameters and open soft-masking, so that no work is skipped."""
    model = Model(hidden_size=sizes.mdlm_width, num_blocks=sizes.mdlm_blocks, num_heads=sizes.mdlm_heads, remat="none",
                  compute_dtype=sizes.compute_dtype)
    built = denoiser.build(model, config.SoftMask(init_scale=0.5), vocab_size=sizes.mdlm_vocabulary,
                           mask_token_id=sizes.mdlm_vocabulary - 1)
    return built, jax.jit(built.init)(root_key(0))


def dream(sizes: Sizes) -> tuple[denoiser.Denoiser, dict]:
    """A Dream with random parameters."""
    hf_config = {
        "vocab_size": sizes.dream_vocabulary, "hidden_size": sizes.dream_width, "num_hidden_layers": sizes.dream_layers,
        "num_attention_heads": sizes.dream_heads, "num_key_value_heads": sizes.dream_kv_heads, "rope_theta": 1e6,
        "intermediate_size": sizes.dream_mlp, "rms_norm_eps": 1e-6, "mask_token_id": sizes.dream_vocabulary - 1,
    }  # fmt: skip
    model = Model(kind="dream", remat="none", param_dtype=sizes.compute_dtype, compute_dtype=sizes.compute_dtype)
    built = dream_denoiser.build(model, config.SoftMask(k=1, init_scale=0.5), hf_config)
    return built, jax.jit(built.init)(root_key(0))


def prompted(length: int, model: denoiser.Denoiser, prompt: int) -> jax.Array:
    """One row [1 L]: `prompt` random tokens, then masks."""
    tokens = np.full((1, length), model.mask_token_id, np.int32)
    tokens[0, :prompt] = np.random.default_rng(0).integers(0, 1000, prompt) % (model.vocab_size - 1)
    return jnp.asarray(tokens)


def soft_masking_cost(sizes: Sizes, steps: int, rounds: int) -> list[dict]:
    """Seconds per step of both samplers without and with soft-masking, one row per model.
    "plain", "soft": quartiles; "ratio", "ratio_quartiles": over neighbouring calls."""
    mdlm_sampler = partial(MDLMSampler, steps=steps, reuse="never")
    dream_sampler = partial(DreamSampler, steps=steps, alg="entropy", temperature=0.1, top_p=0.9, top_k=None,
                            suppress_mask=True, history=False)  # fmt: skip
    rows = []
    for name, build, sampler, prompt, k in (
        ("MDLM", mdlm, mdlm_sampler, 0, 3), ("Dream", dream, dream_sampler, sizes.prompt, 1)
    ):  # fmt: skip
        model, params = build(sizes)
        tokens, keys = prompted(sizes.length, model, prompt), jax.random.split(root_key(1), 1)
        calls = {
            kind: partial(run, sampler(model, soft_mask), params, keys, tokens, None)
            for kind, soft_mask in (("plain", SoftMask()), ("soft", SoftMask("topk", k)))
        }
        counts = {kind: int(call().calls) for kind, call in calls.items()}
        seconds = {kind: values / counts[kind] for kind, values in alternate(calls, rounds).items()}
        ratios = seconds["soft"] / seconds["plain"]
        rows.append({
            "model": name, "parameters": model.num_params, "vocab_size": model.vocab_size, "k": k, "calls": counts,
            **{kind: quartiles(values) for kind, values in seconds.items()},
            "ratio": float(np.median(ratios)), "ratio_quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(),
        })  # fmt: skip
    return rows


def cache_gain(sizes: Sizes, tokens_per_step: int, rounds: int) -> list[dict]:
    """Blockwise decoding of a Dream's answer with every kind of cache and soft-masking, one row per cache.
    "calls"; "positions" computed; "seconds" per token (quartiles); "speed" relative to no cache."""
    model, params = dream(sizes)
    tokens, keys = prompted(sizes.length, model, sizes.prompt), jax.random.split(root_key(1), 1)
    sampler = partial(
        BlockSampler, model, SoftMask("topk", 1), prompt_length=sizes.prompt, block_length=sizes.block_length,
        alg="maskgit_plus", tokens_per_step=tokens_per_step, suppress_mask=True, history=False,
    )  # fmt: skip
    calls = {
        cache: partial(run, sampler(cache=cache), params, keys, tokens, None) for cache in ("none", "prefix", "dual")
    }
    results = {cache: call() for cache, call in calls.items()}
    filled = {cache: int(result.filled[0]) for cache, result in results.items()}
    seconds = {cache: values / filled[cache] for cache, values in alternate(calls, rounds).items()}
    return [
        {"cache": cache, "calls": int(result.calls), "positions": float(result.positions[0]), "filled": filled[cache],
         "seconds": quartiles(seconds[cache]), "speed": float(np.median(seconds["none"]) / np.median(seconds[cache]))}
        for cache, result in results.items()
    ]  # fmt: skip


def host_loop(sampler: DreamSampler, params: dict) -> Callable[[np.ndarray], np.ndarray]:
    """The sampler's loop in Python: network and vocabulary of a step are one compiled call, the rest is NumPy."""
    model, mask, soft_mask = sampler.denoiser, sampler.denoiser.mask_token_id, sampler.soft_mask

    @jax.jit
    def predict(params, tokens, feedback, scale):
        x = two_pass.soft_embed(model, soft_mask, params, tokens, feedback, scale)
        hidden = model.trunk(params["backbone"], x)[0]
        return dream_draw.predict(hidden, model.head(params["backbone"]), tokens == mask, sampler.filters,
                                  k=soft_mask.reads, suppress_mask=sampler.suppress_mask)  # fmt: skip

    def loop(tokens: np.ndarray) -> np.ndarray:
        tokens = np.array(tokens)
        feedback, scale = two_pass.empty_feedback(model, soft_mask, params, tokens), 0.0
        for share in commit.unmask_shares(sampler.steps, sampler.eps):
            masked = tokens == mask
            if not masked.any():
                break
            predicted = predict(params, tokens, feedback, scale)
            feedback, scale = soft_masking.Feedback(*predicted[2:5]), 1.0
            confidence, drawn = np.asarray(predicted.confidence), np.asarray(predicted.drawn)
            for row, count in enumerate((masked.sum(-1).astype(np.float32) * share).astype(int)):
                surest = np.argsort(np.where(masked[row], -confidence[row], np.inf), kind="stable")[:count]
                tokens[row, surest] = drawn[row, surest]
        return tokens

    return loop


def loop_gain(sizes: Sizes, steps: int, rounds: int) -> dict:
    """Seconds per step of a small Dream's sampler, "compiled" and from Python ("host"), and their "ratio"."""
    model, params = dream(dataclasses.replace(
        sizes, dream_width=sizes.small, dream_layers=2, dream_heads=4, dream_kv_heads=2, dream_mlp=2 * sizes.small,
        dream_vocabulary=1024,
    ))  # fmt: skip
    sampler = DreamSampler(model, SoftMask("topk", 1), steps, alg="entropy", suppress_mask=True, history=False)
    tokens = prompted(min(sizes.length, 64), model, 8)
    host, compiled = host_loop(sampler, params), partial(run, sampler, params, None, tokens, None)
    result = compiled()
    assert (host(tokens) == np.asarray(result.tokens)).all(), "the two loops disagree"
    seconds = alternate({"compiled": compiled, "host": partial(host, tokens)}, rounds)
    seconds = {kind: values / int(result.calls) for kind, values in seconds.items()}
    return {"calls": int(result.calls), **{kind: quartiles(values) for kind, values in seconds.items()},
            "ratio": float(np.median(seconds["host"]) / np.median(seconds["compiled"]))}  # fmt: skip


@settled()
def measure(sizes: Sizes, steps: int, tokens_per_step: int, rounds: int) -> dict:
    """Figures as JSON values."""
    return machine() | {
        "sizes": dataclasses.asdict(sizes),
        "rounds": rounds,
        "soft_masking": soft_masking_cost(sizes, steps, rounds),
        "caches": cache_gain(sizes, tokens_per_step, max(2, rounds // 2)),
        "loop": loop_gain(sizes, 32, 4 * rounds),
    }


def markdown(figures: dict) -> str:
    """Figures of `measure` as three tables for a README."""
    sizes, loop = Sizes(**figures["sizes"]), figures["loop"]
    soft = [
        (f"{row['model']}, {row['parameters'] / 1e6:.0f}M", f"{row['vocab_size']:,}", str(row["k"]),
         spread_text(row["plain"]), spread_text(row["soft"]),
         "{:+.1%} ({:+.1%} to {:+.1%})".format(*(ratio - 1 for ratio in (row["ratio"], *row["ratio_quartiles"]))))
        for row in figures["soft_masking"]
    ]  # fmt: skip
    caches = [
        (row["cache"], f"{row['calls']:,}", f"{row['positions']:,.0f}", spread_text(row["seconds"]),
         f"{row['speed']:.2f}")
        for row in figures["caches"]
    ]  # fmt: skip
    loops = [("compiled", spread_text(loop["compiled"])), ("in Python, its step compiled", spread_text(loop["host"]))]
    return "\n\n".join([
        f"Device: {figures['device']}; jax {figures['jax']}; {sizes.compute_dtype}, one row of {sizes.length} "
        "positions. Medians, quartiles in brackets.",
        table(("model", "V", "k", "plain, s/step", "soft-masked, s/step", "soft-masking costs"), soft),
        f"Decoding {sizes.length - sizes.prompt} tokens of the Dream in blocks of {sizes.block_length}, soft-masked:",
        table(("cache", "calls", "positions", "s/token", "times as fast"), caches),
        table(("loop of a small Dream", "s/step"), loops),
    ])  # fmt: skip


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("generate", __doc__, Sizes)
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls of each program")
    parser.add_argument("--steps", type=positive, default=6, help="of the samplers with and without soft-masking")
    parser.add_argument("--tokens_per_step", type=positive, default=8, help="of decoding in blocks")
    flags = parser.parse_args(argv)
    figures = measure(prepare(flags, Sizes), flags.steps, flags.tokens_per_step, flags.rounds)
    publish(markdown(figures), figures, flags.json)


if __name__ == "__main__":
    sys.exit(main())
