"""Compile the real program for any TPU slice, on a machine without one, and report the compiler's plan:

    python -m softmask_jax.compile --config=configs/mdlm_owt.py --topology=v5e:4x4 [--config.mesh.fsdp=16 ...]
    python -m softmask_jax.compile --config=configs/llada8b.py --topology=v5e:4x4
    python -m softmask_jax.compile --config=configs/dream7b.py --topology=v6e:2x2 --generate=entropy --rows=8,32
    python -m softmask_jax.compile --config=configs/mdlm_owt.py --topology=v5e:4x4 --slices=2
    python -m softmask_jax.compile --config=configs/mdlm_owt.py --sweep --kinds=v5e,v6e --chips=1,4,16 --batches=128,512
    python -m softmask_jax.compile --config=configs/dream7b.py --topology=v5e:4x4 --tune --out=dream_v5e_4x4.py
    python -m softmask_jax.compile --scaling --out=launch/SCALING.md

Compiled programs are kept in the cache folder ($SOFTMASK_JAX_CACHE). Where the chips do not divide the batch's rows,
every chip gets one row. Needs libtpu: pip install 'softmask_jax[aot]'."""
import argparse
import dataclasses
import json
import os
import sys

from softmask_jax import config as schema
from softmask_jax.config.command_line import command, command_parser, say, split_overrides
from softmask_jax.io.files import check_writable, write_atomically, write_json


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def command_line() -> argparse.ArgumentParser:
    parser = command_parser("compile", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--config", default="", help="a name such as stdlib or dream7b:int8, or a file")
    add("--topology", default="", help="a TPU slice, such as v5e:4x4, v6e:1x1, v5p:2x2x1")
    add("--slices", type=int, default=1, help="of --topology, over which config.mesh.dcn_data goes")
    add("--vocab_size", type=int, default=0, help="tokens of a dit, the mask included (GPT-2's)")
    add("--length", type=int, default=0, help="tokens of a row; 0 is the config's")
    add("--generate", nargs="?", const="", metavar="ALG", help="a sampler instead of the training step")
    add("--rows", type=numbers, default=[0], help="texts generated together; 0 is the config's; several: a table")
    add("--prompt_length", type=int, default=0, help="with --block_length: where the first block begins")
    add("--steps", type=int, default=None, help="of the sampler")
    add("--block_length", type=int, default=None, help="decode in blocks with a key/value cache")
    add("--cache_kind", default=None, help="of blocks: none | prefix | dual")
    add("--sweep", action="store_true", help="tabulate slices and batch sizes, and name the smallest that fits")
    add("--tune", action="store_true", help="search mesh, remat, micro-batches, base dtype: the fastest as overrides")
    add("--kinds", default="v5e,v6e", help="of --sweep and --scaling")
    add("--chips", type=numbers, help="of --sweep (1,4,16) and --scaling (1,4,16,64,256)")
    add("--batches", type=numbers, help="global batch sizes of --sweep and --tune; the config's by default")
    add("--scaling", action="store_true", help="write both models' table from 1 to 256 chips")
    add("--out", default="", help="file to replace: of --scaling (standard output), of --tune a config file")
    add("--json", default="", help="write all figures here too; replaces the file, - is standard output alone")
    add("--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/config/sections.py")
    return parser


@command()
def main(argv: list[str]) -> int:
    """Exit status: 0 fits, 1 failed, 2 usage error, 3 does not fit."""
    # Nothing runs here: leave the accelerator alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    words, overrides = split_overrides(argv)
    parser = command_line()
    flags = parser.parse_args(words)
    if not flags.scaling and not flags.config:
        parser.error("--config is required, or --scaling")
    if not flags.scaling and bool(flags.topology) == flags.sweep:
        parser.error("one of --topology and --sweep is required")
    if flags.tune and (flags.sweep or flags.generate is not None):
        parser.error("--tune is of a training step on one --topology")
    if flags.slices != 1 and (flags.tune or not flags.topology):
        parser.error("--slices is of a program on one --topology")
    check_writable("" if flags.json == "-" else flags.json)
    check_writable(flags.out, "--out")
    if flags.scaling:
        return _scaling(flags)
    config = schema.load(flags.config, overrides)
    if len(flags.rows) > 1 and flags.generate is None:
        parser.error("several --rows need --generate")
    if flags.tune:
        text, figures, fits = _tune(flags, config, overrides)
    else:
        how = _sweep if flags.sweep else _rows if len(flags.rows) > 1 else _one
        text, figures, fits = how(flags, config)
    print(json.dumps(figures, indent=1) if flags.json == "-" else text)
    if flags.json not in ("", "-"):
        write_json(flags.json, figures)
    return 0 if fits else 3


def _one(flags, config) -> tuple:
    """(text, figures, whether it fits) for one slice."""
    from softmask_jax.compile import report

    result = _read(flags, config, (flags.rows or [0])[0])
    text = f"Compiled in {result.seconds:.0f} s: {result.description}.\n{report.text(result)}"
    return text, report.as_json(result), result.fits


def _rows(flags, config) -> tuple:
    """(table, figures, whether any fits) of a sampler, by the number of texts generated together."""
    from softmask_jax.compile import report

    results = []
    for rows in flags.rows:
        results.append(_read(flags, config, rows))
        say(f"{rows} rows: compiled in {results[-1].seconds:.0f} s")
    return report.by_rows(results), [report.as_json(result) for result in results], any(r.fits for r in results)


def _read(flags, config, rows: int):
    """The `Reading` of a program on one slice; rows: of a sampler."""
    from softmask_jax.compile import programs, reading
    from softmask_jax.compile.topology import Topology
    from softmask_jax.samplers.options import Options

    topology, sizes = Topology(flags.topology, flags.slices), {"vocab_size": flags.vocab_size, "length": flags.length}
    if flags.generate is None:
        program = programs.training(config, topology.devices(), **sizes)
    else:
        blocks = {"block_length": flags.block_length, "cache": flags.cache_kind}
        options = Options(alg=flags.generate, steps=flags.steps, **blocks)
        program = programs.generation(config, topology.devices(), options, rows=rows, prompt_length=flags.prompt_length,
                                      **sizes)
    return reading.read(program, topology, config.model)


def _sweep(flags, config) -> tuple:
    from softmask_jax.compile import report, sweep

    points = sweep.sweep(
        config, flags.kinds.split(","), flags.chips or [1, 4, 16], flags.batches or [config.train.global_batch_size],
        length=flags.length, vocab_size=flags.vocab_size, say=say,
    )  # fmt: skip
    figures = [report.as_json(point) for point in points]
    return f"{sweep.table(points)}\n{sweep.smallest(points)}", figures, any(point.fits for point in points)


def _tune(flags, config, overrides: list[str]) -> tuple:
    from softmask_jax.compile import choices, report, tune, tuned
    from softmask_jax.compile.topology import Topology

    topology = Topology(flags.topology)
    tuner = tune.Tuner(config, length=flags.length, vocab_size=flags.vocab_size, say=say)
    for batch in flags.batches or choices.batches(config, topology):
        tuner.tune(topology, batch)
    best = tuner.best(topology, config.model.base_dtype)
    fits = best.score[0] == 1
    if flags.out and fits:
        write_atomically(flags.out, tuned.config_file(flags.config, flags.out, overrides, topology, config, best))
    figures = [
        {"choice": dataclasses.asdict(tried.choice), "problem": tried.problem,
         "reading": tried.reading and report.as_json(tried.reading)}
        for tried in tuner.ranking(topology)
    ]  # fmt: skip
    return tuned.text(tuner, topology, config, flags.config), figures, fits


def _scaling(flags) -> int:
    from softmask_jax.compile import scaling

    text = scaling.document(flags.kinds.split(","), flags.chips or [1, 4, 16, 64, 256], say=say)
    if flags.out:
        write_atomically(flags.out, text, elsewhere="give another --out")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
