"""Will it fit, before a TPU is rented? Compiles the real training step for any TPU topology, on a machine without one:

    python -m softmask_jax.compile --config=configs/mdlm_owt.py --topology=v5e:4x4 [--config.mesh.fsdp=16 ...]

Prints what a chip holds, as the TPU compiler plans it. Where a slice has more chips than the config's micro-batch has
rows, every chip gets one. Needs libtpu: pip install 'softmask_jax[aot]'.
"""
import argparse
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Of one chip: GiB of memory, and how the accelerator type of N chips is called (v4 and v5p count cores, two a chip).
CHIPS = {
    "v4": (32, "v4-{cores}"),
    "v5e": (16, "v5litepod-{chips}"),
    "v5p": (95, "v5p-{cores}"),
    "v6e": (32, "v6e-{chips}"),
}
VOCAB_SIZE = 50_258  # GPT-2's with the mask
DREAM_7B = {
    "vocab_size": 152_064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18_944, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "mask_token_id": 151_666, "tie_word_embeddings": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice, such as `v5e:4x4`. Raises ValueError for a name that is none."""

    name: str

    def __post_init__(self):
        if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+(x\d+)?", self.name) or not self.chips:
            kinds = ", ".join(CHIPS)
            raise ValueError(f"--topology={self.name} is no TPU slice; write one of {kinds} and its shape: v5e:4x4")

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def chips(self) -> int:
        return math.prod(int(size) for size in self.name.split(":")[1].split("x"))

    @property
    def memory(self) -> int:
        """Bytes of one chip."""
        return CHIPS[self.kind][0] * 2**30

    def devices(self) -> Sequence:
        """Devices to compile for; none of them is there. Raises RuntimeError without libtpu."""
        # libtpu reads these when it is loaded: without them it looks for a real machine.
        environment = {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_ACCELERATOR_TYPE": CHIPS[self.kind][1].format(chips=self.chips, cores=2 * self.chips),
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_MIN_LOG_LEVEL": "3",
            "TPU_STDERR_LOG_LEVEL": "3",
        }
        for name, value in environment.items():
            os.environ.setdefault(name, value)
        from jax.experimental import topologies

        # A single chip is not a whole host of its kind.
        shape = {"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {}
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=self.name, **shape).devices
        except Exception as error:  # whatever the compiler's library says of itself
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(
                f"The TPU compiler does not take {self.name} ({reason:.200}); it needs libtpu: "
                "pip install 'softmask_jax[aot]'"
            ) from error


def training_step(config, devices, *, vocab_size: int = VOCAB_SIZE, length: int = 0):
    """The training step that a config describes as a compiled program for these devices, and its state as shapes.

    Args:
      vocab_size: of a dit; a dream model's is in its base's config.json, or Dream-7B's where there is no base.
      length: tokens of a row; 0 is the config's, for conversations the longest.

    Returns:
      (program, state, what was compiled): a `jax.stages.Compiled`, a TrainState of ShapeDtypeStructs with shardings,
      and a line of text.
    """
    import jax
    import jax.numpy as jnp

    from softmask_jax import denoiser, dream_denoiser, dream_step, optimizer, sharding, train_state, train_step

    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    rows, micro, shards = config.train.global_batch_size, config.train.micro_batches, sharding.batch_shards(mesh)
    if (rows // micro) % shards:  # too few rows for so many chips
        rows, micro = shards, 1
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, global_batch_size=rows, micro_batches=micro)
        )
    tx, layout = optimizer.make(config.optimizer, config.updates), sharding.batch_sharding(mesh)
    if config.model.kind == "dream":
        length = length or config.data.max_tokens
        model = dream_denoiser.build(config.model, config.soft_mask, sizes_of_base(config.model.base), mesh=mesh)
        step = dream_step.make(config, model, tx)
        shapes = dict.fromkeys(("tokens", "segment_ids"), (rows, length))
        shapes |= dict.fromkeys(("rows", "index", "prompt_lengths", "real_lengths", "lengths"), (rows,))
    else:
        length = length or config.data.seq_len
        model = denoiser.build(
            config.model, config.soft_mask, vocab_size=vocab_size, mask_token_id=vocab_size - 1, mesh=mesh
        )
        step = train_step.make(config, model, tx)
        shapes = {"tokens": (rows, length), "rows": (rows,)}
    state = train_state.abstract(model, tx, mesh)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=layout) for name, shape in shapes.items()}
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=sharding.replicated(mesh))
    program = jax.jit(step.train_step, donate_argnums=0).lower(state, batch, key).compile()
    sizes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    said = f"{model.num_params:,} parameters, {rows} rows of {length} tokens in {micro} micro-batches, mesh {sizes}"
    return program, state, said


def sizes_of_base(base: str) -> dict:
    """Hugging Face's config.json of a converted model; Dream-7B's sizes if there is none in `base`."""
    from softmask_jax.tasks.dream import read_base

    folder = Path(base).expanduser()
    return read_base(folder)["hf_config"] if (folder / "config.json").is_file() else DREAM_7B


def bytes_per_chip(tree) -> int:
    """Of shapes with shardings, without what a chip pads."""
    import jax

    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


def memory(program, state) -> dict[str, int]:
    """Bytes a chip: "base" (frozen), "params", "ema", "optimizer" as they are laid out; "arguments", "temporary",
    "output" (what the state does not hold already), "program" and their sum "peak" as the compiler plans them."""
    planned = program.memory_analysis()
    found = {
        "base": bytes_per_chip(state.frozen), "params": bytes_per_chip(state.params), "ema": bytes_per_chip(state.ema),
        "optimizer": bytes_per_chip(state.opt_state), "arguments": planned.argument_size_in_bytes,
        "temporary": planned.temp_size_in_bytes,
        "output": planned.output_size_in_bytes - planned.alias_size_in_bytes,
        "program": planned.generated_code_size_in_bytes,
    }  # fmt: skip
    return found | {"peak": sum(found[name] for name in ("arguments", "temporary", "output", "program"))}


def report(found: dict[str, int], topology: Topology) -> str:
    gib = {name: f"{size / 2**30:8.3f}" for name, size in found.items()}
    base = f"frozen base {gib['base'].strip()}, " if found.get("base") else ""
    verdict = "fits" if found["peak"] <= topology.memory else "does NOT fit"
    return "\n".join([
        f"Memory of a chip of {topology.name} ({topology.chips} chips), GiB",
        f"  arguments        {gib['arguments']}   ({base}parameters {gib['params'].strip()}, EMA {gib['ema'].strip()}, "
        f"optimiser {gib['optimizer'].strip()}, batch)",
        f"  temporary        {gib['temporary']}",
        f"  output           {gib['output']}   (beside what is updated in place)",
        f"  program          {gib['program']}",
        f"  together         {gib['peak']}   of {topology.memory / 2**30:.0f}: {verdict}",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 it fits, 1 failed, 2 the command line is wrong, 3 it does not fit."""
    # The chips are not there, and what is there is not wanted.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from softmask_jax import config as schema
    from softmask_jax.command_line import split_overrides

    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.compile", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--config", required=True, help="a file in configs/, or file:variant")
    parser.add_argument("--topology", required=True, help="a TPU slice, such as v5e:4x4, v6e:1x1, v5p:2x2x1")
    parser.add_argument("--vocab_size", type=int, default=VOCAB_SIZE, help="tokens of a dit, the mask included")
    parser.add_argument("--length", type=int, default=0, help="tokens of a row; 0 is the config's")
    parser.add_argument(
        "--config.SECTION.KEY", metavar="VALUE", dest="_",
        help="override a key; all are in softmask_jax/config_sections.py",
    )
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(words)
    try:
        topology = Topology(flags.topology)
        config = schema.load(flags.config, overrides)
        started = time.perf_counter()
        program, state, said = training_step(
            config, topology.devices(), vocab_size=flags.vocab_size, length=flags.length
        )
        print(f"Compiled in {time.perf_counter() - started:.0f} s: {said}.")
        found = memory(program, state)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"Error: {(str(error).strip().splitlines() or [type(error).__name__])[0]}", file=sys.stderr)
        return 1
    print(report(found, topology))
    return 0 if found["peak"] <= topology.memory else 3


if __name__ == "__main__":
    sys.exit(main())
