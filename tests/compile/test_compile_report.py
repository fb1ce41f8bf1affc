"""What the compile report says: verdicts and advice, rooflines, warnings, and the arithmetic of wider data axes."""
import dataclasses
import json
import re

import pytest

from softmask_jax import config as schema
from softmask_jax.compile import report, scaling, sweep
from softmask_jax.compile.reading import Reading
from softmask_jax.compile.report import COMPUTE, HBM, LINKS, roofline

GIB = 2**30
# A chip that spends a second on products, half a second on its memory and a quarter on the network.
MADE_UP = Reading(
    topology="v5e:2x2", kind="train", description="made up", mesh={"dcn_data": 1, "data": 4, "fsdp": 1, "tensor": 1}, rows=48, length=1024,
    micro=3, tokens=48 * 1024, kept={"params": GIB, "ema": GIB, "optimizer": 2 * GIB, "batch": 1000},
    memory={"arguments": 4 * GIB, "temporary": 6 * GIB, "output": 0, "program": GIB}, needed=0, free=0,
    flops=197e12 * COMPUTE, model_flops=197e12 * COMPUTE / 2, hbm=819e9 * HBM / 2, payload={"all-reduce": 1.0},
    wire={"all-reduce": 200e9 / 2 * LINKS / 4}, count={"all-reduce": 1.0},
)  # fmt: skip


def made(**changes) -> Reading:
    return dataclasses.replace(MADE_UP, **changes)


def test_what_fits_is_said_with_its_margin():
    assert report.verdict(MADE_UP) == "fits, 5.00 GiB to spare (31%)"
    tight = made(memory=MADE_UP.memory | {"temporary": 10.5 * GIB})
    assert tight.fits and "that is little" in report.verdict(tight)


def test_a_sampler_is_tabulated_by_rows_and_one_that_does_not_fit_has_no_speed():
    few = made(kind="generate", description="BlockSampler, more", rows=8, tokens=4096, calls=100)
    many = dataclasses.replace(few, rows=64, tokens=64 * 512, needed=20 * GIB, memory={}, hbm=0.0, flops=0.0)
    header, _, first, second = report.by_rows([few, many]).split("\n\n")[1].splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    # Its 1.75 s without overlap, 1 s with; half a second of HBM.
    assert cells == ["8", "11.0", "3.3", "compute", "10 to 17.5", "2,341 to 4,096"]
    assert "does not fit" in second and "tokens/s" in header


def test_what_the_compiler_refuses_does_not_fit_and_three_things_are_named():
    said = report.verdict(made(needed=20 * GIB, free=15.75 * GIB, memory={}))
    assert said.startswith("does NOT fit, 4.25 GiB too much. Try 1. a smaller micro-batch (--config.train.micro_batches=6)")
    assert "; 2. more computed again (--config.model.remat=full); 3. more fsdp" in said and said.count(". ") >= 3


def test_what_is_compiled_but_larger_than_a_chip_does_not_fit():
    assert report.verdict(made(memory=MADE_UP.memory | {"temporary": 14 * GIB})).startswith("does NOT fit, 3.00 GiB")


def test_where_the_state_is_most_of_it_cutting_it_comes_first():
    large = made(kept={"base": 15 * GIB, "batch": 1000}, needed=18 * GIB, free=16 * GIB, memory={})
    assert report.advice(large)[0] == "more fsdp (--config.mesh.data=-1 --config.mesh.fsdp=2)"
    cut = dataclasses.replace(large, mesh={"dcn_data": 1, "data": 1, "fsdp": 4, "tensor": 1}, rows=4, micro=1)
    assert report.advice(cut)[0] == "a larger slice, cut over fsdp (16 chips, --config.mesh.fsdp=-1)"
    assert report.advice(cut)[1].startswith("shorter rows")


def test_a_roofline_is_bound_by_the_slowest_and_lies_between_overlap_and_none():
    times = roofline(MADE_UP)
    assert (times.compute_s, times.hbm_s, times.ici_s) == pytest.approx((1, 0.5, 0.25))
    assert (times.best_s, times.worst_s, times.bound) == (pytest.approx(1), pytest.approx(1.75), "compute")
    assert times.utilisation[0] == pytest.approx(COMPUTE / 2)
    assert times.tokens_per_s[1] == pytest.approx(48 * 1024 / 1.75)
    assert roofline(made(hbm=819e9 * HBM * 2)).bound == "memory"


def test_the_report_names_every_part_and_its_assumptions():
    text = report.text(MADE_UP)
    for part in ("params 1.000", "optimizer 2.000", "temporary           6.000", "together           11.000   of 16: fits",
                 "TFLOP", "FLOP a byte", "all-reduce", "bound by compute", "tokens a second", "utilisation", "assumed:",
                 "never run", "No array of size B L V."):
        assert part in text, part


def test_a_report_of_what_does_not_fit_ends_without_a_prediction():
    text = report.text(made(needed=20 * GIB, free=16 * GIB, memory={}, hbm=0.0, wire={}))
    assert "does NOT fit" in text and "Predicted" not in text and "B L V" not in text


def test_all_logits_are_warned_of_by_name():
    text = report.text(made(logits=("f32[8,1024,50304], 1572.0 MiB: jit(f)/bld,vd->blv",)))
    assert "WARNING: 1 arrays of size B L V" in text and "jit(f)/bld,vd->blv" in text


def test_the_figures_can_be_read_by_programs():
    found = json.loads(json.dumps(report.as_json(MADE_UP)))
    assert found["fits"] and found["peak"] == 11 * GIB and found["roofline"]["bound"] == "compute"
    assert "roofline" not in report.as_json(made(needed=20 * GIB, free=16 * GIB, memory={}))


def test_a_wider_data_axis_changes_only_what_is_sent():
    unit = sweep.Unit("v5e", 1, 1, 4, True)
    wide, single = sweep.spread(MADE_UP, unit, 64), sweep.spread(MADE_UP, unit, 1)
    assert (wide.peak, wide.flops, wide.hbm) == (MADE_UP.peak, MADE_UP.flops, MADE_UP.hbm)
    assert (wide.rows, wide.tokens, wide.topology, wide.mesh["data"]) == (768, 768 * 1024, "v5e:8x8", 64)
    assert wide.sent == pytest.approx(MADE_UP.sent * (63 / 64) / (3 / 4)) and single.sent == 0 and single.rows == 12


def test_groups_that_cut_the_state_reduce_their_gradients_between_each_other():
    unit = sweep.Unit("v5e", 4, 1, 4, True)
    spread = sweep.spread(made(mesh={"dcn_data": 1, "data": 1, "fsdp": 4, "tensor": 1}), unit, 16)
    extra = 2 * 3 / 4 * MADE_UP.kept["params"]  # once a step
    assert spread.sent == pytest.approx(MADE_UP.sent + extra) and spread.mesh["data"] == 4


def test_the_config_says_how_state_is_cut_and_more_is_tried_where_it_does_not_fit():
    config = schema.load("configs/mdlm_owt.py", [])
    assert sweep.cuts(config.mesh, 16) == [1, 2, 4, 8, 16] and sweep.cuts(config.mesh, 1) == [1]
    assert sweep.cuts(dataclasses.replace(config.mesh, fsdp=-1), 64) == [16]


def test_the_smallest_machine_is_the_one_with_the_fewest_chips_then_the_least_memory():
    large = made(topology="v6e:2x2")
    points = [made(topology="v5e:4x4", mesh={"dcn_data": 1, "data": 16, "fsdp": 1, "tensor": 1}), large, MADE_UP,
              made(topology="v5e:1x1", mesh={"dcn_data": 1, "data": 1, "fsdp": 1, "tensor": 1}, needed=20 * GIB, free=16 * GIB)]
    assert sweep.smallest(points).startswith("The smallest that fits: v5e:2x2 with 48 rows")
    assert sweep.smallest(points[-1:]).startswith("Nothing fits. does NOT fit, 4.00 GiB")
    lines = sweep.table(points).splitlines()
    assert len(lines) == 2 + 4 and len({line.count("|") for line in lines}) == 1 and "| no |" in lines[-1]
    assert not re.search(r"v5e:1x1", scaling.sent_table(points)) and "v5e:1x1: does NOT fit" in scaling.remarks(points)
