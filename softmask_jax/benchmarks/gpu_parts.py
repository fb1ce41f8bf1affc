"""Parts of `benchmarks.gpu`, each measured in a process of its own: figures as JSON values, and their tables."""
import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config
from softmask_jax.benchmarks import generate
from softmask_jax.benchmarks.timing import alternate, quartiles, spread_text
from softmask_jax.config.jax_settings import root_key
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.diffusion.vocab import head as vocab_head
from softmask_jax.distributed import sharding
from softmask_jax.models import denoiser, dream_denoiser
from softmask_jax.models.nn import layers
from softmask_jax.report.markdown import table
from softmask_jax.training import optimizer, train_state, train_step
from softmask_jax.training.tracking import peak_flops
from softmask_jax.training.update_flops import model_flops


@dataclasses.dataclass(frozen=True)
class Sizes:
    """check_*: of the small DiT whose numbers are compared; mdlm_*: of the 169M model and its batch; dream_*: of
    Dream-7B. A step that does not fit is tried again with full rematerialisation, then with half of the layers."""

    check_width: int = 256
    check_blocks: int = 4
    check_rows: int = 8
    check_length: int = 512
    vocabulary: int = 50_258
    head_width: int = 64
    mdlm_width: int = 768
    mdlm_blocks: int = 12
    mdlm_rows: int = 32
    mdlm_length: int = 1024
    dream_width: int = 3584
    dream_layers: int = 28
    dream_heads: int = 28
    dream_kv_heads: int = 4
    dream_mlp: int = 18_944
    dream_vocabulary: int = 152_064
    dream_rows: int = 2
    dream_length: int = 4096


TOY = Sizes(
    check_width=32, check_blocks=1, check_rows=2, check_length=32, vocabulary=300, head_width=8, mdlm_width=32,
    mdlm_blocks=1, mdlm_rows=2, mdlm_length=32, dream_width=32, dream_layers=1, dream_heads=4, dream_kv_heads=2,
    dream_mlp=64, dream_vocabulary=300, dream_rows=2, dream_length=32,
)  # fmt: skip
# Largest relative difference (2-norm) of bfloat16, whose numbers have 8 bits, from float32; of "same" the least share.
LIMITS = {"loss": 0.01, "gradient": 0.1, "entropy": 0.05, "same likeliest token": 0.9, "attention": 0.02,
          "its gradient": 0.02}  # fmt: skip


def correctness(sizes: Sizes, rounds: int) -> dict:
    """{"rows": name, "difference", "limit", "ok" (None where it could not be run)}."""
    (loss, gradient, swept), (exact_loss, exact_gradient, exact_swept) = (
        _numbers(sizes, dtype) for dtype in ("bfloat16", "float32")
    )
    same = (swept.token_ids[..., 0] == exact_swept.token_ids[..., 0]).mean()
    values = {
        "loss": distance(loss, exact_loss), "gradient": distance(gradient, exact_gradient),
        "entropy": distance(swept.neg_entropy, exact_swept.neg_entropy), "same likeliest token": float(same),
    }  # fmt: skip
    rows = [_judged(name, value) for name, value in values.items()]
    return {"rows": rows + [_judged(*row) for row in _attention(sizes)]}


def _judged(name: str, value: float | None) -> dict:
    limit = LIMITS[name.partition(",")[0]]
    good = None if value is None else value >= limit if name.startswith("same") else value <= limit
    return {"name": name, "difference": value, "limit": limit, "ok": None if good is None else bool(good)}


def _numbers(sizes: Sizes, dtype: str) -> tuple:
    """(loss, gradient, sweep of pass 1) of a DiT with open soft-masking, the same weights in either dtype."""
    settings, soft_mask = _dit(sizes.check_width, sizes.check_blocks, sizes, dtype, dropout=0.0), SoftMask("topk", 3)
    sizes_of = dict(vocab_size=sizes.vocabulary, mask_token_id=sizes.vocabulary - 1)
    model = denoiser.build(settings.model, settings.soft_mask, **sizes_of)
    batch, random = _batch(sizes.check_rows, sizes.check_length, sizes.vocabulary), np.random.default_rng(1)

    def weight(path, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        # Not those of `init`: a new network's head and gates are zeros, which hide all differences.
        axis = {"kernel": -2, "weight": -1, "table": -1}.get(name := path[-1].key)
        std = 0.02 if axis is None else shape.shape[axis] ** -0.5
        return np.float32(name == "scale") + np.float32(std) * random.standard_normal(shape.shape, np.float32)

    shapes = jax.eval_shape(model.init, root_key(0))["backbone"]
    params = {"backbone": jax.tree_util.tree_map_with_path(weight, shapes),
              "soft_mask": denoiser.initial_soft_mask(settings.soft_mask, sizes.check_width)()}

    @jax.jit
    def run(params, batch):
        noisy = Nelbo(soft_mask).corrupt(batch, root_key(2), 0, mask_token_id=model.mask_token_id)

        def loss(params):
            feedback = two_pass.feedback_if(jnp.bool_(True), model, soft_mask, params, noisy)
            nll = two_pass.token_nll(model, soft_mask, params, noisy, feedback)
            return (noisy.weights * nll).sum(-1).mean()

        backbone = params["backbone"]
        hidden, _ = model.trunk(backbone, model.embed(backbone, noisy.xt))
        return *jax.value_and_grad(loss)(params), vocab_head.sweep(hidden, model.head(backbone), k=3)

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return jax.device_get(run(params, batch))


def _attention(sizes: Sizes) -> list[tuple[str, float | None]]:
    """cuDNN's attention and its gradient beside XLA's, in bfloat16; None without a GPU."""
    kinds, what = ("rows", "packed rows"), ("attention", "its gradient")
    names = [f"{name}, cuDNN beside XLA, {kind}" for kind in kinds for name in what]
    if jax.default_backend() != "gpu":
        return [(name, None) for name in names]
    shape, differences = (sizes.check_rows, sizes.check_length, 4, sizes.head_width), []
    q, k, v, weight = jax.random.normal(root_key(3), (4, *shape), jnp.bfloat16)
    packed = jnp.broadcast_to(jnp.arange(shape[1]) // (shape[1] // 3), shape[:2])
    for segments in (None, packed):
        def run(q, k, v, *, implementation: str):
            out = layers.attend(q, k, v, segments, implementation=implementation)
            return (out * weight).sum(dtype=jnp.float32), out

        graded = {
            name: jax.jit(jax.grad(partial(run, implementation=name), (0, 1, 2), has_aux=True))(q, k, v)
            for name in ("cudnn", "xla")
        }
        (gradient, out), (other_gradient, other_out) = graded["cudnn"], graded["xla"]
        differences += [distance(out, other_out), distance(gradient, other_gradient)]
    return list(zip(names, differences, strict=True))


def distance(tree, reference) -> float:
    """2-norm of the difference over that of the reference, over all leaves; 1e9 if one is not finite."""
    trees = (jax.tree.leaves(tree), jax.tree.leaves(reference))
    one, other = (np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves]) for leaves in trees)
    value = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    return value if np.isfinite(value) else 1e9


def _dit(width: int, blocks: int, sizes: Sizes, dtype: str, **model) -> config.Config:
    sizes_of = dict(hidden_size=width, num_blocks=blocks, num_heads=width // sizes.head_width, compute_dtype=dtype)
    return config.from_dict({"model": {**sizes_of, **model}, "soft_mask": {"init_scale": 0.5}})


def _batch(rows: int, length: int, vocabulary: int) -> dict:
    """Random conversations, half prompt; running text reads only tokens and rows."""
    number, full = np.arange(rows, dtype=np.int32), np.full(rows, length, np.int32)
    tokens = np.random.default_rng(0).integers(0, vocabulary - 1, (rows, length), np.int32)
    return {"tokens": tokens, "rows": number, "index": number, "epoch": 0 * number, "prompt_lengths": full // 2,
            "lengths": full, "real_lengths": full, "segment_ids": np.zeros_like(tokens)}  # fmt: skip


def mdlm(sizes: Sizes, rounds: int) -> dict:
    """{"rows"}: `_step` of the 169M model."""

    def build(remat: str, share: int) -> tuple:
        settings = _dit(sizes.mdlm_width, max(1, sizes.mdlm_blocks // share), sizes, "bfloat16", remat=remat)
        sizes_of = dict(vocab_size=sizes.vocabulary, mask_token_id=sizes.vocabulary - 1)
        return settings, partial(denoiser.build, settings.model, settings.soft_mask, **sizes_of)

    return {"rows": [_step_that_fits(build, "none", sizes.mdlm_rows, sizes.mdlm_length, rounds)]}


def dream(sizes: Sizes, rounds: int) -> dict:
    """{"rows"}: `_step` of DoRA on a frozen base."""

    def build(remat: str, share: int) -> tuple:
        hf_config = {
            "vocab_size": sizes.dream_vocabulary, "hidden_size": sizes.dream_width, "rope_theta": 1e6,
            "num_hidden_layers": max(1, sizes.dream_layers // share), "num_attention_heads": sizes.dream_heads,
            "num_key_value_heads": sizes.dream_kv_heads, "intermediate_size": sizes.dream_mlp, "rms_norm_eps": 1e-6,
            "mask_token_id": sizes.dream_vocabulary - 1,
        }  # fmt: skip
        settings = config.from_dict({
            "model": dict(kind="dream", base="random", param_dtype="bfloat16", compute_dtype="bfloat16", remat=remat,
                          adapter="dora", adapter_rank=16, adapter_alpha=16.0, adapter_targets="^(q|k|v|o)$"),
            "soft_mask": dict(k=1, p_sm=0.5, init_scale=0.5), "optimizer": dict(ema_decay=0.0),
            "data": dict(source="chat", paths="jsonl:random", tokenizer="base"),
        })  # fmt: skip
        return settings, partial(dream_denoiser.build, settings.model, settings.soft_mask, hf_config)

    return {"rows": [_step_that_fits(build, "dots", sizes.dream_rows, sizes.dream_length, rounds)]}


def _step_that_fits(build: Callable, remat: str, rows: int, length: int, rounds: int) -> dict:
    """`_step` of build(remat, 1), else of build("full", 1), else of build("full", 2)."""
    for policy in (remat, "full"):
        try:
            return _step(*build(policy, 1), rows, length, rounds)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    return _step(*build("full", 2), rows, length, rounds)


def _step(settings: config.Config, model_on: Callable, rows: int, length: int, rounds: int) -> dict:
    """One compiled step whose rows have one pass, or two, in turn, on one device: "parameters", "remat", "rows",
    "length", "ratio", "peak_bytes" (None where the device does not say), and for "one_pass" and "two_pass" quartiles of
    "seconds", "tokens_per_second", "mfu"."""
    train = dataclasses.replace(settings.train, global_batch_size=rows)
    settings, device = dataclasses.replace(settings, train=train), jax.devices()[0]
    mesh = sharding.make_mesh(data=1, fsdp=1, devices=[device])
    model, tx = model_on(mesh=mesh), optimizer.make(settings.optimizer, settings.updates)
    batch = sharding.global_batch(_batch(rows, length, model.vocab_size), mesh)
    state, key = train_state.initialise(model, tx, mesh, seed=0), root_key(0)
    step = jax.jit(train_step.make(settings, model, tx).train_step, donate_argnums=0)
    coins = {"one_pass": jnp.zeros(rows, bool), "two_pass": jnp.ones(rows, bool)}
    step = step.lower(state, batch, key, coins["one_pass"]).compile()

    def call(coin):
        nonlocal state
        state, metrics = step(state, batch, key, coin)
        return metrics

    seconds = alternate({name: partial(call, coin) for name, coin in coins.items()}, rounds)
    if not bool(call(coins["two_pass"]).finite):
        raise FloatingPointError("The loss or its gradient is not finite after these steps.")
    row = {"parameters": model.num_params, "remat": settings.model.remat, "rows": rows, "length": length,
           "ratio": float(np.median(seconds["two_pass"] / seconds["one_pass"])),
           "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use")}  # fmt: skip
    for name, values in seconds.items():
        flops = model_flops(model, settings.model, rows * length, length, two_passes=name == "two_pass")
        median = float(np.median(values))
        row[name] = {"seconds": quartiles(values), "tokens_per_second": rows * length / median,
                     "mfu": flops / median / peak_flops(device)}  # fmt: skip
    return row


def decoding(sizes: Sizes, rounds: int) -> dict:
    """{"rows"}: `generate.soft_masking_cost` of both models in bfloat16, one row of half the training length."""
    length = sizes.mdlm_length // 2
    names = {field.name for field in dataclasses.fields(generate.Sizes)}
    same = {name: value for name, value in dataclasses.asdict(sizes).items() if name in names}
    chosen = generate.Sizes(
        **same, mdlm_heads=sizes.mdlm_width // sizes.head_width, mdlm_vocabulary=sizes.vocabulary, length=length,
        prompt=length // 4, compute_dtype="bfloat16",
    )  # fmt: skip
    return {"rows": generate.soft_masking_cost(chosen, min(32, length // 4), rounds)}


def _correctness_table(figures: dict) -> list[str]:
    verdicts = {True: "ok", False: "TOO FAR OFF", None: "not run: needs a CUDA GPU"}
    rows = [
        (row["name"], "" if row["difference"] is None else f"{row['difference']:.2g}", f"{row['limit']:g}",
         verdicts[row["ok"]]) for row in figures["rows"]
    ]  # fmt: skip
    return ["bfloat16 beside float32, relative differences:", table(("what", "difference", "limit", "verdict"), rows)]


def _step_table(figures: dict) -> list[str]:
    lines = []
    for row in figures["rows"]:
        peak = "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f} GiB"
        lines += [
            f"{row['parameters']:,} parameters, {row['rows']} rows of {row['length']:,} tokens, bfloat16, remat "
            f"{row['remat']}; peak of memory {peak}; two passes take {row['ratio']:.3f} times one.",
            table(("step", "seconds", "tokens/s", "MFU"), [
                (name.replace("_", " "), spread_text(row[name]["seconds"]), f"{row[name]['tokens_per_second']:,.0f}",
                 f"{row[name]['mfu']:.1%}") for name in ("one_pass", "two_pass")
            ]),
        ]  # fmt: skip
    return lines


def _decoding_table(figures: dict) -> list[str]:
    rows = [
        (f"{row['model']}, {row['parameters'] / 1e6:.0f}M", str(row["k"]), spread_text(row["plain"]),
         spread_text(row["soft"]), f"{row['ratio'] - 1:+.1%}") for row in figures["rows"]
    ]  # fmt: skip
    return [table(("model", "k", "plain, s/step", "soft-masked, s/step", "soft-masking costs"), rows)]


TABLES = {"correctness": _correctness_table, "mdlm": _step_table, "dream": _step_table, "decoding": _decoding_table}
