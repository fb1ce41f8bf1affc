"""Operations counted in traced programs, against closed forms: 2 and 28 layers, remat, micro-batches, kernels."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest

from softmask_jax import config as schema
from softmask_jax.compile import flops, programs, reading
from softmask_jax.diffusion.vocab.positions import block_size
from softmask_jax.distributed import sharding
from softmask_jax.models.nn import scan, splash
from softmask_jax.training import update_flops

OWT, DREAM, LLADA = (f"configs/{name}.py" for name in ("mdlm_owt", "dream7b", "llada8b"))


def passes(model, share: float, *, two_passes: bool, scored: float = 1.0) -> update_flops.Passes:
    """Of a step whose attention keeps its weights: everything that its program runs.

    A backward pass is two products for each forward one, or one where a frozen base wants no gradient of its own;
    attention's is always two. The head's logits are computed again, chunk by chunk; `remat` repeats attention or all.
    """
    attention_again = model.remat in ("full", "mlp", "dots", "attention")
    layers, head = schema.layer_passes(model) + (model.remat == "mlp") * share, 3 if model.adapter != "none" else 4
    return update_flops.Passes(two_passes + layers, two_passes + 3 + attention_again, scored * (two_passes + head))


def counted(path: str, overrides=(), **options):
    """(FLOPs in the program, in the closed form) of a training step on one device; nothing is compiled or allocated."""
    config = schema.load(path, list(overrides))
    program = programs.training(config, jax.devices()[:1], **options)
    loops, total = reading.Loops(program, program.micro), reading.positions(program)
    counts = flops.count(flops.live(program.traced.jaxpr), loops.of_jaxpr)
    scored = loops.sweep * block_size(total) / total
    assert 0.5 < scored <= 1
    runs = passes(config.model, program.denoiser.attention_share, two_passes=program.two_passes, scored=scored)
    return counts, update_flops.closed_form(program.denoiser, program.rows * program.length, program.length, runs)


@pytest.mark.parametrize("layers", [2, 28])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_dits_two_pass_step_is_within_5_percent_of_the_closed_form(layers, remat):
    batch = ["train.global_batch_size=6", "train.micro_batches=3"]
    in_program, closed = counted(OWT, [f"model.num_blocks={layers}", f"model.remat={remat}", *batch])
    assert in_program == pytest.approx(closed, rel=0.05)


def test_lladas_step_without_a_base_there_is_that_of_the_published_model_within_5_percent_of_the_closed_form():
    in_program, closed = counted(LLADA, ["mesh.fsdp=1"], sizes=programs.LLADA_8B | {"n_layers": 2})
    assert in_program == pytest.approx(closed, rel=0.05)
    model = programs.build(schema.load(LLADA), sharding.make_mesh(data=1, devices=jax.devices()[:1]))
    adapter = 4 * 32 * (16 * (4096 + 4096) + 4096)
    assert model.num_params == 8_015_581_184 + adapter and model.mask_token_id == 126_336


@pytest.mark.parametrize("layers", [2, 28])
def test_dreams_two_pass_step_on_a_frozen_base_is_within_5_percent_of_the_closed_form(layers):
    in_program, closed = counted(DREAM, ["mesh.fsdp=1"], sizes=programs.DREAM_7B | {"num_hidden_layers": layers})
    assert in_program == pytest.approx(closed, rel=0.05)


def test_a_plain_step_makes_one_pass_less():
    batch = ["train.global_batch_size=2"]
    (both, _), (plain, closed) = counted(OWT, batch), counted(OWT, [*batch, "soft_mask.variant=none"])
    assert plain < 0.8 * both and plain == pytest.approx(closed, rel=0.05)


def test_micro_batches_change_nothing_but_the_grouping():
    for micro in (1, 3):
        in_program, closed = counted(OWT + ":smoke", ["train.global_batch_size=24", f"train.micro_batches={micro}"])
        assert in_program == pytest.approx(closed, rel=0.05)


def test_a_loop_is_multiplied_by_its_length_and_the_costlier_branch_counted():
    x = jnp.ones((4, 8))

    def f(x, w, flag):
        x = jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0]
        return jax.lax.cond(flag, lambda x: x, lambda x: x @ w, x)

    assert flops.count(jax.make_jaxpr(f)(x, jnp.ones((8, 8)), True)) == 6 * 2 * 4 * 8 * 8


def test_a_loop_of_unknown_length_turns_as_often_as_is_assumed():
    def f(x, w):
        def inner(x):
            with jax.named_scope("inner"):
                return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x)

        return jax.lax.while_loop(lambda x: x[0, 0] < 5, lambda x: inner(x) @ w, x)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((8, 8)))
    product = 2 * 4 * 8 * 8
    assert flops.count(jaxpr) == 2 * product
    assert flops.count(jaxpr, lambda scope, depth: {("", 0): 10, ("inner", 1): 3}[scope, depth]) == 10 * (3 + 1) * product


def test_the_attention_kernel_counts_its_products_two_ahead_and_five_back():
    rows, length, heads, width = 2, 256, 4, 128
    q = jnp.ones((rows, length, heads, width), jnp.bfloat16)
    kv = jnp.ones((rows, length, 2, width), jnp.bfloat16)
    product = 2 * rows * heads * length * length * width

    def attend(q, k, v):
        return splash.attend(q, k, v, interpret=True)

    assert flops.count(jax.make_jaxpr(attend)(q, kv, kv)) == 2 * product
    gradient = jax.grad(lambda *given: attend(*given).astype(jnp.float32).sum(), (0, 1, 2))
    assert flops.count(jax.make_jaxpr(gradient)(q, kv, kv)) == pytest.approx((2 + 5) * product, rel=0.001)

    # A kernel whose results are kept is traced again, but XLA drops it.
    again = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(scan.KEPT))
    gradient = jax.grad(lambda *given: again(*given).astype(jnp.float32).sum(), (0, 1, 2))
    assert flops.count(jax.make_jaxpr(gradient)(q, kv, kv)) == pytest.approx((2 + 5) * product, rel=0.001)


def test_what_nobody_could_leave_out_is_less_than_what_is_computed():
    config = schema.load(DREAM, ["mesh.fsdp=1"])
    denoiser = programs.training(config, jax.devices()[:1], length=128).denoiser
    own = update_flops.model_flops(denoiser, config.model, 128, 128, two_passes=True)
    plain = dataclasses.replace(config.model, adapter="none", remat="none")
    again = update_flops.closed_form(denoiser, 128, 128, passes(config.model, denoiser.attention_share, two_passes=True))
    assert own < again and own < update_flops.model_flops(denoiser, plain, 128, 128, two_passes=True)
