"""Will it fit, and how fast would it be, before a TPU is rented? Compiles the real program for any TPU slice, on a machine
without one, and reads what the compiler planned:

    python -m softmask_jax.compile --config=configs/mdlm_owt.py --topology=v5e:4x4 [--config.mesh.fsdp=16 ...]
    python -m softmask_jax.compile --config=configs/dream7b.py --topology=v6e:2x2 --generate=entropy --rows=8
    python -m softmask_jax.compile --config=configs/mdlm_owt.py --sweep --kinds=v5e,v6e --chips=1,4,16 --batches=128,512
    python -m softmask_jax.compile --scaling --out=launch/SCALING.md

What was compiled once is kept in the cache folder ($SOFTMASK_JAX_CACHE). Where a slice has more chips than the batch has
rows, or does not divide them, every chip gets one row. Needs libtpu: pip install 'softmask_jax[aot]'.
"""
import argparse
import json
import os
import sys

from softmask_jax.config.command_line import command, say, split_overrides
from softmask_jax.io.files import check_writable, write_atomically, write_json


def flags() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.compile", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", default="", help="a file in configs/, or file:variant")
    add("--topology", default="", help="a TPU slice, such as v5e:4x4, v6e:1x1, v5p:2x2x1")
    add("--vocab_size", type=int, default=0, help="tokens of a dit, the mask included (GPT-2's)")
    add("--length", type=int, default=0, help="tokens of a row; 0 is the config's")
    add("--generate", nargs="?", const="", metavar="ALG", help="a sampler instead of the training step")
    add("--rows", type=int, default=0, help="texts generated together; 0 is the config's")
    add("--prompt_length", type=int, default=0, help="with --block_length: where the first block begins")
    add("--steps", type=int, default=None, help="of the sampler")
    add("--block_length", type=int, default=None, help="decode in blocks with a key/value cache")
    add("--cache_kind", default=None, help="of blocks: none | prefix | dual")
    add("--sweep", action="store_true", help="tabulate slices and batch sizes, and name the smallest that fits")
    add("--kinds", default="v5e,v6e", help="of --sweep and --scaling")
    add("--chips", default="", help="of --sweep (1,4,16) and --scaling (1,4,16,64,256)")
    add("--batches", default="", help="global batch sizes of --sweep; the config's by default")
    add("--scaling", action="store_true", help="write both models' table from 1 to 256 chips")
    add("--out", default="", help="of --scaling: the file, which is replaced (standard output)")
    add("--json", default="", help="write all figures here too; replaces the file, - is standard output alone")
    add("--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/config/sections.py")
    return parser


@command()
def main(argv: list[str]) -> int:
    """Exit status: 0 it fits, 1 failed, 2 the command line is wrong, 3 it does not fit."""
    # The chips are not there, and what is there is not wanted.
    os.environ["JAX_PLATFORMS"] = "cpu"
    words, overrides = split_overrides(argv)
    parser = flags()
    given = parser.parse_args(words)
    if not given.scaling and not given.config:
        parser.error("--config is required, or --scaling")
    if not given.scaling and bool(given.topology) == given.sweep:
        parser.error("one of --topology and --sweep is required")
    check_writable("" if given.json == "-" else given.json)
    check_writable(given.out, "--out")
    if given.scaling:
        return _scaling(given)
    return _sweep(given, overrides) if given.sweep else _one(given, overrides)


def _one(given, overrides) -> int:
    from softmask_jax import config as schema
    from softmask_jax.compile import programs, reading, report
    from softmask_jax.compile.topology import Topology
    from softmask_jax.samplers.options import Options

    topology = Topology(given.topology)
    config = schema.load(given.config, overrides)
    sizes = {"vocab_size": given.vocab_size or programs.VOCAB_SIZE, "length": given.length}
    if given.generate is None:
        program = programs.training(config, topology.devices(), **sizes)
    else:
        options = Options(alg=given.generate, steps=given.steps, block_length=given.block_length, cache=given.cache_kind)
        program = programs.generation(config, topology.devices(), options, rows=given.rows,
                                      prompt_length=given.prompt_length, **sizes)
    found = reading.read(program, topology, config.model)
    if given.json != "-":
        print(f"Compiled in {found.seconds:.0f} s: {found.said}.")
        print(report.text(found))
    _write_json(given.json, report.as_json(found))
    return 0 if found.fits else 3


def _sweep(given, overrides) -> int:
    from softmask_jax import config as schema
    from softmask_jax.compile import programs, report, sweep

    config = schema.load(given.config, overrides)
    chips, batches = _numbers(given.chips) or [1, 4, 16], _numbers(given.batches) or [config.train.global_batch_size]
    found = sweep.sweep(config, given.kinds.split(","), chips, batches, length=given.length,
                        vocab_size=given.vocab_size or programs.VOCAB_SIZE, say=say)
    if given.json != "-":
        print(sweep.table(found))
        print(sweep.smallest(found))
    _write_json(given.json, [report.as_json(point) for point in found])
    return 0 if any(point.fits for point in found) else 3


def _scaling(given) -> int:
    from softmask_jax.compile import scaling

    text = scaling.document(given.kinds.split(","), _numbers(given.chips) or [1, 4, 16, 64, 256], say=say)
    if given.out:
        write_atomically(given.out, text, elsewhere="give another --out")
    else:
        print(text, end="")
    return 0


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _write_json(path: str, found) -> None:
    if path == "-":
        print(json.dumps(found, indent=1))
    elif path:
        write_json(path, found)


if __name__ == "__main__":
    sys.exit(main())
