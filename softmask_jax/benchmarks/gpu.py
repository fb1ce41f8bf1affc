"""One table for a GPU: is bfloat16 right, and how fast are training and decoding? Ten minutes on one H100 or H200.

    bash launch/gpu_bench.sh [--out=gpu_bench.md] [--json=out.json]
    python -m softmask_jax.benchmarks.gpu --toy

Random weights and tokens, no download. Each part is a process of its own: its peak of memory is its own, and one that
fails leaves the others. `correctness`: loss, gradient, sweep and attention in bfloat16 beside float32; `mdlm`: the
train step of the 169M model; `dream`: DoRA on a frozen base of Dream-7B's shape; `decoding` with and without
soft-masking; `torch`: a plain PyTorch step beside ours. Exit status 1 if a part fails or a number is too far off. It
has not met a GPU yet."""
import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from softmask_jax.benchmarks import gpu_parts
from softmask_jax.benchmarks.gpu_parts import TOY, Sizes
from softmask_jax.benchmarks.timing import benchmark_parser, machine, positive, prepare, publish, writable
from softmask_jax.config import option_flags
from softmask_jax.config.command_line import command, say
from softmask_jax.config.jax_settings import settled
from softmask_jax.io.files import write_atomically
from softmask_jax.io.run_folder import versions
from softmask_jax.report.markdown import table

PARTS = ("correctness", "mdlm", "dream", "decoding", "torch")
# Plain LoRA of Qwen2.5-7B at length 4,096 on one H100, NVIDIA NeMo's published figure; two passes are 3/2 of its work.
ANCHOR, LORA_RATIO = 14_110, 3 / 2


def run_part(name: str, flags: argparse.Namespace, folder: Path) -> dict:
    """The figures of a part measured in a process of its own, or {"error": its last line}; with its "seconds"."""
    out, start = folder / f"{name}.json", time.perf_counter()
    device = [f"--device={flags.device}"] if flags.device else []
    if name == "torch":
        if reason := no_torch(flags):
            return {"skipped": reason}
        words = ["softmask_jax.benchmarks.two_pass", "--against=torch", *device]
        # The two share the device; JAX would take three quarters of its memory.
        extra = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    else:
        sizes = [f"--{key}={value}" for key, value in option_flags.present(flags, Sizes).items()]
        common = [f"--rounds={flags.rounds}", *device, *sizes, *["--toy"] * flags.toy]
        words, extra = ["softmask_jax.benchmarks.gpu", f"--part={name}", *common], {}
    try:
        done = subprocess.run(
            [sys.executable, "-m", *words, f"--json={out}"], env=os.environ | extra, capture_output=True, text=True,
            encoding="utf-8", errors="replace", timeout=60 * flags.minutes,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {flags.minutes} minutes; --minutes gives more"}
    if done.returncode or not out.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:300]}
    figures = json.loads(out.read_text("utf-8"))
    shown = {"text": done.stdout.strip()} if name == "torch" else {}
    return figures | shown | {"seconds": time.perf_counter() - start}


def no_torch(flags: argparse.Namespace) -> str:
    """Why there is no PyTorch step, "" if there can be one."""
    if flags.toy:
        return "its sizes are not toy ones"
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed (pip install torch)"
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    if flags.device != "cpu" and subprocess.run([sys.executable, "-c", code], capture_output=True).returncode:
        return "the installed PyTorch finds no CUDA GPU"
    return ""


def failed(parts: dict) -> bool:
    """Whether a part failed, or a number is too far from its reference."""
    rows = parts.get("correctness", {}).get("rows", ())
    return any("error" in figures for figures in parts.values()) or any(row["ok"] is False for row in rows)


def markdown(figures: dict) -> str:
    """All parts as one page in Markdown."""
    parts, packages = figures["parts"], ", ".join(f"{name} {v}" for name, v in figures["versions"].items() if v)
    lines = ["# Measured on one device", f"Device: {figures['device']}. Driver: {figures['driver']}. {packages}."]
    if figures["toy"]:
        lines.append("Toy sizes (--toy): these figures say that everything runs, not how fast.")
    for name, part in parts.items():
        lines.append(f"## {name}")
        if "error" in part or "skipped" in part:
            lines.append(f"Failed: {part['error']}" if "error" in part else f"Skipped: {part['skipped']}.")
        else:
            lines += gpu_parts.TABLES[name](part) if name in gpu_parts.TABLES else [part["text"]]
    if "rows" in parts.get("dream", {}):
        lines.append(
            f"For comparison: {ANCHOR:,} tokens/s for plain LoRA of Qwen2.5-7B at length 4,096 on one H100 (NVIDIA "
            f"NeMo), so about {ANCHOR / LORA_RATIO:,.0f} for two passes."
        )
    seconds = [(name, f"{part['seconds']:.0f}") for name, part in parts.items() if "seconds" in part]
    return "\n\n".join([*lines, "## Time", table(("part", "seconds, with start and compilation"), seconds)])


def driver() -> str:
    """NVIDIA's driver, or that there is none."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, encoding="utf-8").stdout.strip() or "none"
    except OSError:
        return "none"


def chosen(text: str) -> list[str]:
    """Flag type of --parts."""
    names = [name for name in text.split(",") if name]
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is not among {', '.join(PARTS)}")
    return names


@command()
def main(argv: list[str]) -> int:
    parser = benchmark_parser("gpu", __doc__, Sizes)
    parser.add_argument("--out", type=writable, default="", help="write the page here too; replaces the file")
    parser.add_argument("--toy", action="store_true", help="tiny sizes: everything runs once, on any machine")
    parser.add_argument("--parts", type=chosen, default=",".join(PARTS), help="some of the parts, with commas")
    parser.add_argument("--rounds", type=positive, default=8, help="timed calls of each program")
    parser.add_argument("--minutes", type=positive, default=5, help="limit of a part")
    parser.add_argument("--part", choices=PARTS[:-1], help="one part in this process; its figures go to --json")
    flags = parser.parse_args(argv)
    sizes = dataclasses.replace(TOY if flags.toy else Sizes(), **option_flags.present(flags, Sizes))
    if flags.part:
        prepare(flags, Sizes)
        with settled():
            figures = getattr(gpu_parts, flags.part)(sizes, flags.rounds) | machine()
        publish("\n\n".join(gpu_parts.TABLES[flags.part](figures)), figures, flags.json)
        return 0
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in flags.parts:
            say(f"{name} ...")
            parts[name] = run_part(name, flags, Path(folder))
    device = next((part["device"] for part in parts.values() if "device" in part), "unknown")
    figures = {"device": device, "driver": driver(), "versions": versions(), "toy": flags.toy, "parts": parts}
    text = markdown(figures)
    publish(text, figures, flags.json)
    if flags.out:
        write_atomically(flags.out, text + "\n")
    return int(failed(parts))


if __name__ == "__main__":
    sys.exit(main())
