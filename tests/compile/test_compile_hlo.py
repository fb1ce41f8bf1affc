"""Reading optimised programs: a text written by hand, whose figures can be counted with a pencil, and CPU programs."""
import gzip
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from softmask_jax.compile import hlo, reading, topology, traffic
from softmask_jax.distributed import sharding

# A loop from 2 to below 8 in steps of 2 over a stack of weights, one of them read a turn, in another tiling; a kernel
# whose attributes run over lines; a collective that starts in one fusion and goes on in another; scratch memory; a
# condition.
TEXT = """HloModule by_hand, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%retiled (p8: f32[4,8,16]) -> f32[4,8,16] {
  %p8 = f32[4,8,16]{2,1,0:T(32,128)} parameter(0)
  ROOT %copied = f32[4,8,16]{2,1,0:T(8,128)} copy(%p8)
}

%one_layer (p0: f32[4,8,16], p1: s32[]) -> f32[1,8,16] {
  %p0 = f32[4,8,16]{2,1,0:T(32,128)} parameter(0)
  %tiled = f32[4,8,16]{2,1,0:T(8,128)} fusion(%p0), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%retiled
  %p1 = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8,16]{2,1,0} dynamic-slice(%tiled, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

%written (p2: f32[4,8,16], p3: f32[1,8,16], p4: s32[]) -> f32[4,8,16] {
  %p2 = f32[4,8,16]{2,1,0} parameter(0)
  %p3 = f32[1,8,16]{2,1,0} parameter(1)
  %p4 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %update = f32[4,8,16]{2,1,0} dynamic-update-slice(%p2, %p3, %p4, %nought, %nought)
}

%starts (p5: bf16[8,16]) -> (bf16[8,16], bf16[32,16]) {
  %p5 = bf16[8,16]{1,0} parameter(0)
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%p5), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.1 = (bf16[8,16]{1,0}, bf16[32,16]{1,0:S(1)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%goes_on (p6: bf16[8,16], p7: bf16[32,16]) -> bf16[32,16] {
  %p6 = bf16[8,16]{1,0} parameter(0)
  %p7 = bf16[32,16]{1,0:S(1)} parameter(1)
  %all-gather.2 = bf16[32,16]{1,0} all-gather(%p6), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %custom-call.2 = bf16[32,16]{1,0:S(1)} custom-call(%all-gather.2, %p7), custom_call_target="AsyncCollectiveStep"
}

%body (state: (s32[], f32[4,8,16], f32[4,8,16])) -> (s32[], f32[4,8,16], f32[4,8,16]) {
  %state = (s32[], f32[4,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %weights = f32[4,8,16]{2,1,0} get-tuple-element(%state), index=1
  %kept = f32[4,8,16]{2,1,0} get-tuple-element(%state), index=2
  %layer = f32[1,8,16]{2,1,0} fusion(%weights, %counter), kind=kLoop, calls=%one_layer
  %reduced = f32[1,8,16]{2,1,0} all-reduce(%layer), channel_id=1, replica_groups=mesh['x'=4,'y'=2] {'x'}, to_apply=%add
  %saved = f32[4,8,16]{2,1,0} fusion(%kept, %reduced, %counter), kind=kLoop, calls=%written
  %one = s32[] constant(1)
  %next = s32[] add(%counter, %one)
  %after = s32[] add(%next, %one)
  ROOT %result = (s32[], f32[4,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) tuple(%after, %weights, %saved)
}

%condition (state.1: (s32[], f32[4,8,16], f32[4,8,16])) -> pred[] {
  %limit = s32[]{:T(128)} constant(8)
  %state.1 = (s32[], f32[4,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%counter.1, %limit), direction=LT
}

%cheap (c0: f32[2]) -> f32[2] {
  ROOT %c0 = f32[2]{0} parameter(0)
}, execution_thread="sparsecore"

%dear (d0: f32[2]) -> f32[2] {
  %d0 = f32[2]{0} parameter(0)
  ROOT %doubled = f32[2]{0} add(%d0, %d0), metadata={op_name="jit(f)/dear"}
}

ENTRY %main (x: f32[4,8,16], y: bf16[8,16], z: f32[2], flag: s32[]) -> f32[2] {
  %x = f32[4,8,16]{2,1,0} parameter(0)
  %y = bf16[8,16]{1,0} parameter(1)
  %z = f32[2]{0} parameter(2)
  %flag = s32[] parameter(3)
  %two = s32[] constant(2)
  %begin = (s32[], f32[4,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) tuple(%two, %x, /*index=2*/%x)
  %loop = (s32[], f32[4,8,16]{2,1,0}, f32[4,8,16]{2,1,0}) while(%begin), condition=%condition, body=%body
  %kernel = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} custom-call(%y), custom_call_target="tpu_custom_call", backend_config={"a": {
}}, metadata={op_name="jit(f)/kernel"}
  %started = (bf16[8,16]{1,0}, bf16[32,16]{1,0:S(1)}) fusion(%y), kind=kCustom, calls=%starts
  %on = bf16[32,16]{1,0:S(1)} fusion(%y, %kernel), kind=kCustom, calls=%goes_on
  %sent = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%y), channel_id=2, source_target_pairs={{0,1},{1,0}}
  %arrived = bf16[8,16]{1,0} collective-permute-done(%sent)
  ROOT %chosen = f32[2]{0} conditional(%flag, %z, %z), branch_computations={%cheap, %dear}
}
"""
LAYER, STACK, TOKENS = 8 * 16 * 4, 4 * 8 * 16 * 4, 8 * 16 * 2


def test_a_loop_turns_as_often_as_its_counter_says():
    module = hlo.parse(TEXT)
    entry = module.computations[module.entry]
    assert module.trips(entry.instructions["%loop"], entry) == 3  # 2, 4, 6


def test_a_fused_scatter_moves_its_updates_and_not_the_table_in_which_they_land():
    text = """HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%scattered (p0: f32[1000,16], p1: s32[4], p2: f32[4,16]) -> f32[1000,16] {
  %p0 = f32[1000,16]{1,0} parameter(0)
  %p1 = s32[4]{0} parameter(1)
  %p2 = f32[4,16]{1,0} parameter(2)
  ROOT %scatter = f32[1000,16]{1,0} scatter(%p0, %p1, %p2), update_window_dims={1}, inserted_window_dims={0}, to_apply=%add
}

ENTRY %main (table: f32[1000,16], ids: s32[4], updates: f32[4,16]) -> f32[1000,16] {
  %table = f32[1000,16]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  %updates = f32[4,16]{1,0} parameter(2)
  ROOT %out = f32[1000,16]{1,0} fusion(%table, %ids, %updates), kind=kCustom, calls=%scattered
}
"""
    assert traffic.measure(hlo.parse(text)).hbm == 4 * 4 + 2 * 4 * 16 * 4


def test_a_loop_that_prints_its_length_is_believed():
    loop = 'body=%body'
    module = hlo.parse(TEXT.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"11"}}'))
    entry = module.computations[module.entry]
    assert module.trips(entry.instructions["%loop"], entry) == 11


def test_a_loop_with_another_condition_is_of_unknown_length_and_counted_as_asked():
    module = hlo.parse(TEXT.replace("direction=LT", "direction=NE"))
    once, tenfold = traffic.measure(module), traffic.measure(module, lambda loop, known, depth: 10 if known is None else known)
    assert tenfold.payload["all-reduce"] == 10 * once.payload["all-reduce"] == 10 * LAYER


def test_collectives_are_counted_once_by_kind_and_multiplied_by_their_loops():
    found = traffic.measure(hlo.parse(TEXT))
    assert found.count == {"all-reduce": 3, "all-gather": 1, "collective-permute": 1}
    assert found.payload == {"all-reduce": 3 * LAYER, "all-gather": 4 * TOKENS, "collective-permute": TOKENS}
    # Rings of 4: of a sum every chip sends 2 (4 - 1) / 4 of the array, of a gathered one 3 / 4.
    assert found.wire == {"all-reduce": 3 * LAYER * 1.5, "all-gather": 3 * TOKENS, "collective-permute": TOKENS}


def test_bytes_are_those_that_are_touched_a_slice_not_the_stack():
    found = traffic.measure(hlo.parse(TEXT))
    # A layer is read and written, summed over chips, and written to its place; the counter is some scalars.
    turn = 2 * LAYER + 2 * LAYER + 2 * LAYER
    # The kernel writes to scratch memory, the gathering that starts reads its part from HBM.
    kernel, started, permuted, doubled = TOKENS, TOKENS, 2 * TOKENS, 3 * 8
    assert found.hbm == pytest.approx(3 * turn + kernel + started + permuted + doubled, abs=3 * 40)
    assert found.hbm < 3 * 2 * STACK  # which the stacks alone would be, read and written whole


@pytest.mark.parametrize("groups, members", [
    ("replica_groups={{0,1,2},{3,4,5}}", 3), ("replica_groups=[2,8]<=[4,4]T(1,0)", 8), ("replica_groups={}", 0),
    ("replica_groups=mesh['a'=4,'b'=2,'c'=1] {'a','b'}", 8), ("replica_groups=mesh['a'=1,'b'=16] {'b'}", 16),
    ("replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}", 4),
])
def test_the_size_of_a_group_is_read_in_every_notation(groups, members):
    assert traffic.group_size(f"channel_id=1, {groups}, to_apply=%add") == members


def test_a_group_of_one_chip_sends_nothing():
    found = traffic.measure(hlo.parse(TEXT.replace("mesh['x'=4,'y'=2] {'x'}", "{{0},{1}}")))
    assert "all-reduce" not in found.count


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_f { }")


def test_the_length_of_a_scan_is_found_in_a_cpu_program():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(f).lower(jnp.ones((8, 64)), jnp.ones((13, 64, 64))).compile().as_text()
    for printed in (text, text.replace("known_trip_count", "unknown_trip_count")):
        module = hlo.parse(printed)
        loops = [(i, c) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"]
        assert [module.trips(i, c) for i, c in loops] == [13]
        # Every weight is read once, whatever else is.
        assert 13 * 64 * 64 * 4 < traffic.measure(module).hbm < 4 * 13 * 64 * 64 * 4


def dense(vocab: int, rows: int = 4, length: int = 128):
    """(module, what `whole_logits` wants to know) of a loss that holds all logits."""
    def loss(hidden, weight):
        return jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, weight)).max(-1).sum()

    given = jax.ShapeDtypeStruct((rows, length, 16), jnp.float32), jax.ShapeDtypeStruct((vocab, 16), jnp.float32)
    module = hlo.parse(jax.jit(jax.grad(loss, (0, 1))).lower(*given).compile().as_text())
    mesh = types.SimpleNamespace(shape={"dcn_data": 1, "data": 1, "fsdp": 1, "tensor": 1})
    return module, types.SimpleNamespace(mesh=mesh, rows=rows, micro=1, length=length, vocab_sizes=(vocab - 5, vocab), width=16)


def test_logits_of_every_position_are_named_with_their_size_and_place():
    module, program = dense(32_768)
    lines = reading.whole_logits(module, program)
    assert lines and all("32768" in line and "MiB: " in line for line in lines)
    assert any("jit(loss)" in line for line in lines)


def test_logits_of_fewer_positions_or_of_a_small_vocabulary_are_no_reason_to_warn():
    module, program = dense(32_768)
    program.rows = 8  # as if a chunk of half the positions
    assert not reading.whole_logits(module, program)
    assert not reading.whole_logits(*dense(1024))


@pytest.mark.parametrize("length", [8, 16])
def test_a_table_of_embeddings_is_no_array_of_logits(length):
    module, program = dense(32_768)
    program.rows, program.length, program.width = 1, length, 16  # as many numbers a token as positions, or more
    assert not [line for line in reading.whole_logits(module, program) if "[32768,16]" in line]


LAYERS, ROWS, WIDTH = 6, 64, 256
RECORDED = {"0.0.42": "hlo/libtpu_0_0_42.txt.gz", "0.0.50": "hlo/libtpu_0_0_50.txt.gz"}


def gradient_of_scanned_layers() -> str:
    """The text of a program for four v5e chips, data 2 and fsdp 2: six layers tanh(x @ w), scanned, and their gradients."""
    mesh = sharding.make_mesh(2, 2, devices=topology.Topology("v5e:2x2").devices())
    rows = NamedSharding(mesh, P("data"))

    def loss(w, x):
        def layer(x, w):
            return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, rows)), None

        return jnp.mean(jax.lax.scan(layer, x, w)[0].astype(jnp.float32) ** 2)

    w = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "fsdp")))
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.bfloat16, sharding=rows)
    return jax.jit(jax.grad(loss)).lower(w, x).compile().as_text()


def check_scanned_layers(text: str):
    """Every layer reduces its activations [32 256] and its gradient [128 256] and gathers activations once, in bfloat16."""
    module = hlo.parse(text)
    loops = [(i, c) for c in module.computations.values() for i in c.instructions.values() if i.opcode == "while"]
    assert [module.trips(loop, inside) for loop, inside in loops] == [LAYERS, LAYERS]
    activations, gradient = ROWS // 2 * WIDTH * 2, WIDTH // 2 * WIDTH * 2
    measured = traffic.measure(module)
    assert measured.payload == {"all-reduce": LAYERS * (activations + gradient), "all-gather": LAYERS * activations}
    assert measured.count == {"all-reduce": 2 * LAYERS, "all-gather": LAYERS}


@pytest.mark.parametrize("libtpu", RECORDED)
def test_the_text_of_either_tpu_compiler_is_read_alike(libtpu):
    """jax 0.10.2 has libtpu 0.0.42, jax 0.12.0 has 0.0.50."""
    check_scanned_layers(gzip.decompress((Path(__file__).parent.parent / "golden" / RECORDED[libtpu]).read_bytes()).decode())


@pytest.mark.full
def test_the_text_of_the_installed_tpu_compiler_is_read_alike():
    check_scanned_layers(gradient_of_scanned_layers())
