"""Several slices: what the TPU compiler makes of a sum over all of them, and what the report says of it."""
import dataclasses
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from softmask_jax import config as schema
from softmask_jax.compile import __main__, hlo, programs, report, traffic
from softmask_jax.compile.topology import Topology
from softmask_jax.distributed import sharding
from tests.compile.test_compile import SMALL
from tests.compile.test_compile import printed as printed  # the fixture
from tests.compile.test_compile_report import made

SLICES, WIDTH = 4, 512
RECORDED = {"0.0.42": "hlo/slices_0_0_42.txt.gz", "0.0.50": "hlo/slices_0_0_50.txt.gz"}
GRADIENT = WIDTH // 2 * WIDTH * 4  # of a chip, cut over fsdp


def gradient_over_slices() -> str:
    """The program of a gradient [512 512] on four slices of four v5e chips, data 2 and fsdp 2, summed as a train step's."""
    mesh = sharding.make_mesh(2, 2, devices=Topology("v5e:2x2", SLICES).devices())
    weight, rows = NamedSharding(mesh, P("fsdp")), sharding.batch_sharding(mesh)

    def own(w, x):
        return jax.lax.psum(jax.grad(lambda w: jnp.tanh(x @ w).sum())(w), sharding.DATA_AXES)

    def gradient(w, x):
        over = jax.shard_map(own, mesh=mesh, in_specs=(P(), P(sharding.DATA_AXES)), out_specs=P(),
                             axis_names=set(sharding.DATA_AXES), check_vma=False)
        return jax.lax.with_sharding_constraint(over(w, x), weight)

    w = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32, sharding=weight)
    x = jax.ShapeDtypeStruct((64, WIDTH), jnp.float32, sharding=rows)
    return jax.jit(gradient).lower(w, x).compile().as_text()


def check_gradient(text: str):
    """Each chip's part is summed and cut within its slice, half of it crosses, and the sum is gathered within the slice."""
    module = hlo.parse(text)
    order = [i.opcode for i in module.computations[module.entry].instructions.values() if i.opcode in
             ("reduce-scatter", "send", "recv-done", "all-gather") and (i.opcode != "all-gather" or "{{0,2}" in i.attributes)]
    assert order == ["reduce-scatter", "send", "recv-done", "all-gather"]
    moved, share = traffic.measure(module), (SLICES - 1) / SLICES
    assert moved.dcn == 2 * share * GRADIENT / 2
    # Reduced over fsdp from the whole array, then over data.
    assert moved.payload["reduce-scatter"] == 2 * GRADIENT + GRADIENT


@pytest.mark.parametrize("libtpu", RECORDED)
def test_the_tpu_compiler_sums_within_a_slice_and_sends_a_chips_part_across(libtpu):
    check_gradient(gzip.decompress((Path(__file__).parent.parent / "golden" / RECORDED[libtpu]).read_bytes()).decode())


@pytest.mark.full
def test_the_installed_tpu_compiler_sums_within_a_slice_and_sends_a_chips_part_across():
    check_gradient(gradient_over_slices())


@pytest.mark.full
def test_a_train_step_on_two_slices_sends_one_gradient_a_step_cut_over_the_chips(printed):
    words = [*SMALL[:1], "--vocab_size=4000", "--config.model.hidden_size=256", "--config.train.global_batch_size=32"]
    figures = json.loads(printed(*words, "--topology=v5e:2x2", "--slices=2", "--config.train.micro_batches=2", "--json=-"))
    assert figures["mesh"]["dcn_data"] == 2 and figures["mesh"]["data"] == 4 and figures["fits"]
    assert figures["kept"]["params"] / 4 <= figures["dcn"] <= 1.1 * figures["kept"]["params"] / 4


TRANSFER = """HloModule by_hand

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%p, %token), is_host_transfer=true, frontend_attributes={ATTRIBUTES}
  %sent = token[] send-done(%send), is_host_transfer=true
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%token), is_host_transfer=true
  %done = (f32[8,128]{1,0}, token[]) recv-done(%recv), is_host_transfer=true
  ROOT %result = f32[8,128]{1,0} get-tuple-element(%done), index=0
}
"""


@pytest.mark.parametrize("kind, target, times", [
    ("ALL_REDUCE", '"{1,2}x{0:3}"', 1), ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', 1.5), ("ALL_GATHER", '"{1,2,3,4}x{0:3}"', 3),
    ("REDUCE_SCATTER", '"{1,2,3,4}x{0:3}"', 0.75), ("ALL_TO_ALL", "{{100000,200000},{100001,200001}}", 0.5),
    ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", 1),
])  # fmt: skip
def test_what_is_sent_between_slices_is_counted_by_kind_and_read_and_written_once(kind, target, times):
    attributes = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
    moved = traffic.measure(hlo.parse(TRANSFER.replace("ATTRIBUTES", attributes)))
    size = 8 * 128 * 4
    assert (moved.dcn, moved.sent) == (times * size, 0) and 2 * size <= moved.hbm < 2 * size + 16


def test_the_report_tells_the_networks_apart_and_where_its_figure_is_from():
    mesh = {"dcn_data": 2, "data": 4, "fsdp": 1, "tensor": 1}
    one, two = made(), made(mesh=mesh, dcn=2 * 3.125e9)
    text = report.text(two)
    assert report.roofline(two).dcn_s == pytest.approx(2) and report.roofline(two).bound == "network between slices"
    assert "2 x v5e:2x2 (8 chips)" in text and "to other slices       6.250 GB" in text and "3.12 GB/s a chip (Google's" in text
    assert "slices" not in report.text(one) and report.roofline(one).dcn_s == 0
    unknown = dataclasses.replace(two, topology="v4:2x2x1")
    assert report.roofline(unknown).dcn_s == 0 and "Google publishes no figure" in report.text(unknown)


@pytest.mark.parametrize("words", [["--sweep"], ["--topology=v5e:2x2", "--tune"]])
def test_several_slices_are_of_one_program(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        __main__.main([*SMALL, *words, "--slices=2"])
    assert "--slices is of a program on one --topology" in capsys.readouterr().err


def test_no_slices_are_refused():
    with pytest.raises(ValueError, match="--slices=0 is no number of slices; it must be 1 or more"):
        Topology("v5e:2x2", 0)


@pytest.mark.full
def test_a_mesh_of_another_number_of_slices_is_refused():
    config = schema.load("configs/stdlib.py:smoke", ["mesh.dcn_data=4"])
    with pytest.raises(ValueError, match=r"dcn_data=4 does not fit 8 device\(s\) in 2 slice\(s\) of 4, 4: slices must"):
        programs.training(config, Topology("v5e:2x2", 2).devices(), vocab_size=258)
