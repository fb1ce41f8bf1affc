"""Gradients are summed over devices once a step, however often a parameter is read and into however many micro-batches
a batch is cut; over slices, too."""
import dataclasses
import math
import re

import jax
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.compile import hlo, programs, traffic

MODEL = {"hidden_size": 32, "num_blocks": 2, "num_heads": 2, "cond_dim": 16, "dropout": 0.1}


def traced(micro_batches: int, mesh: dict, variant: str = "topk") -> programs.Program:
    c = config.from_dict({
        "model": MODEL, "soft_mask": {"variant": variant, "k": 3}, "data": {"seq_len": 16},
        "train": {"global_batch_size": 32, "micro_batches": micro_batches}, "mesh": mesh,
    })  # fmt: skip
    return programs.training(c, jax.devices()[:8], vocab_size=1000)


def payload(program: programs.Program, kept=lambda module: module) -> dict[str, float]:
    """Bytes of the compiled program's collectives, or of those that are `kept`, by kind."""
    module = kept(hlo.parse(program.traced.lower().compile().as_text()))
    # Loops over masked positions exchange nothing: a thousand times a collective in them would be seen.
    return traffic.measure(module, lambda loop, known, depth: 1000 if known is None else known).payload


@pytest.mark.full
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_devices_exchange_one_gradient_a_step(micro_batches):
    program = traced(micro_batches, {})
    gradient = programs.bytes_per_chip(program.parts["params"])
    assert gradient <= sum(payload(program).values()) <= 1.1 * gradient


def numbers(text: str | None) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text or "")]


def groups(attributes: str) -> list[list[int]]:
    """Devices of a collective: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), or mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}."""
    attributes = attributes[attributes.index("replica_groups=") :]
    if listed := re.match(r"replica_groups=\{(\{.*?\})\}", attributes):
        return [numbers(group) for group in listed[1].split("},{")]
    ids = re.search(r"(?:<=|device_ids=\()\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    dims, order = map(numbers, ids.groups()) if ids else ([8], [])
    ids = np.arange(8).reshape(dims).transpose(order or range(len(dims)))
    if shape := re.match(r"replica_groups=\[([\d,]+)\]", attributes):
        return ids.reshape(numbers(shape[1])).tolist()
    axes, over = re.match(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", attributes).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
    over = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", over)]
    ids = np.moveaxis(ids.reshape([*map(int, sizes.values())]), over, range(-len(over), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(over) :])).tolist()


def crossing(module: hlo.Module, slice_size: int = 4) -> hlo.Module:
    """Without the collectives whose groups stay within a slice."""
    def kept(i: hlo.Instruction) -> hlo.Instruction:
        if i.opcode.removesuffix("-start") not in traffic.KINDS:
            return i
        crosses = any(len({device // slice_size for device in group}) > 1 for group in groups(i.attributes))
        return i if crosses else dataclasses.replace(i, opcode="opt-barrier")

    return dataclasses.replace(module, computations={
        name: dataclasses.replace(c, instructions={own: kept(i) for own, i in c.instructions.items()})
        for name, c in module.computations.items()
    })  # fmt: skip


@pytest.mark.parametrize("variant", ["none", pytest.param("topk", marks=pytest.mark.full)])
def test_slices_exchange_a_devices_part_of_one_gradient_a_step_and_nothing_else(variant):
    program = traced(2, {"dcn_data": 2, "data": 2, "fsdp": 2}, variant)
    sent, gradient = payload(program, crossing), programs.bytes_per_chip(program.parts["params"])
    assert set(sent) == {"all-reduce"} and gradient <= sent["all-reduce"] <= 1.1 * gradient
    assert sum(payload(program).values()) > 2 * gradient


@pytest.mark.parametrize("attributes, wanted", [
    ("replica_groups={{0,2},{1,3}}, to_apply=%a", [[0, 2], [1, 3]]),
    ("replica_groups=[4,2]<=[8], to_apply=%a", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%a", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'b'}, x", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
])  # fmt: skip
def test_every_way_in_which_xla_writes_groups_is_read(attributes, wanted):
    assert groups(attributes) == wanted
