"""The filter of system calls, followed line by line as the kernel does, for machines that the tests do not run on, too."""
import errno
import struct

import pytest

from softmask_jax.evaluate.code import system_calls
from softmask_jax.evaluate.code.system_calls import ALLOW, ERROR, KILL, MACHINES

THREAD, FORK = 0x3D0F00, 17


def answer(machine: str, number: int, argument: int = 0, identity: int | None = None) -> int:
    """What the filter returns for a call."""
    lines = list(struct.iter_unpack("HBBI", system_calls.assembled(machine)))
    data = struct.pack("iIQQQQQQQ", number, MACHINES[machine][0] if identity is None else identity, 0, argument, *[0] * 5)
    place = value = 0
    while True:
        code, yes, no, operand = lines[place]
        place += 1
        if code == system_calls.RETURN:
            return operand
        if code == system_calls.LOAD:
            (value,) = struct.unpack_from("I", data, operand)
            continue
        met = {
            system_calls.JUMP_EQUAL: value == operand, system_calls.JUMP_AT_LEAST: value >= operand,
            system_calls.JUMP_BITS: bool(value & operand),
        }[code]  # fmt: skip
        place += yes if met else no


@pytest.mark.parametrize("machine", MACHINES)
def test_processes_and_networks_are_refused_and_threads_are_not(machine):
    numbers, refused = MACHINES[machine][1], ERROR | errno.EPERM
    special = {"clone", "clone3", "socket", "socketpair"}
    assert all(answer(machine, number) == refused for name, number in numbers.items() if name not in special)
    assert answer(machine, numbers["clone"], FORK) == refused and answer(machine, numbers["clone"], THREAD) == ALLOW
    assert answer(machine, numbers["clone3"]) == ERROR | errno.ENOSYS
    for name in ("socket", "socketpair"):
        assert answer(machine, numbers[name], 1) == ALLOW
        assert all(answer(machine, numbers[name], family) == refused for family in (2, 10, 16, 17, 40))
    # read and write, of each table.
    assert all(answer(machine, number) == ALLOW for number in {"x86_64": (0, 1), "aarch64": (63, 64)}[machine])


def test_calls_by_another_machines_numbers_end_the_program():
    assert answer("x86_64", 2, identity=0x40000003) == KILL
    assert answer("x86_64", 0x40000000 + 57) == ERROR | errno.EPERM


def test_a_machine_whose_calls_are_not_known_is_an_error():
    with pytest.raises(ValueError, match="riscv64 are not known, only those of x86_64 and aarch64"):
        system_calls.assembled("riscv64")
