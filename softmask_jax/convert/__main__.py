"""Convert weights between PyTorch's tools and this package:

    python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream
    python -m softmask_jax.convert --src=hf://Dream-org/Dream-v0-Instruct-7B --dst=models/dream_int8 --int8
    python -m softmask_jax.convert --src=mdlm.ckpt --dst=models/mdlm --weights=ema --verify
    python -m softmask_jax.convert --src=runs/owt --dst=exported --to=hf
    python -m softmask_jax.convert --src=adapter --base=models/dream --merge --dst=merged --to=hf

--src: Dream's and MDLM's Hugging Face folders, PEFT adapters on Dream, MDLM's Lightning checkpoints, converted models,
and runs of this package. --dst appears when it is complete; after a kill the same command starts again.
"""
import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from softmask_jax.config.command_line import command, command_parser
from softmask_jax.convert import outputs
from softmask_jax.convert.hub import CONFIGS, download
from softmask_jax.convert.int8 import quantise
from softmask_jax.convert.model import Model, merge
from softmask_jax.convert.sources import check_configs, is_run, open_model
from softmask_jax.convert.tensors import num_bytes
from softmask_jax.data import open_tokenizer
from softmask_jax.data.tokenizers.hub import PREFIX
from softmask_jax.io.files import check_folder


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser("convert", __doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--src", required=True, help="a folder, a file, or hf://owner/name")
    add("--dst", required=True, help="the folder to write; refused unless it is new or empty")
    add("--to", choices=("orbax", "hf"), help="by default the other side: our folder, or PyTorch's")
    add("--weights", choices=("raw", "ema"), help="where the source holds both; ema by default")
    add("--base", default="", help="with --merge: the model that the adapter was trained on")
    add("--merge", action="store_true", help="write the base with the adapter merged in")
    add("--int8", action="store_true", help="a Dream's kernels as int8, a frozen base for an adapter")
    add("--tokenizer", default="", help="to put into our folder, as config.data.tokenizer names it")
    add("--verify", action="store_true", help="read the result and compare; with a --dst that exists, only that")
    flags = parser.parse_args(argv)
    if flags.merge != bool(flags.base):
        parser.error("--merge and --base belong together")
    return flags


def convert(flags: argparse.Namespace) -> str:
    """Convert as the flags say; return the message to print. Raises ValueError, OSError or RuntimeError."""
    model, ours = _opened(flags.src, flags.weights)
    if flags.merge:
        base, ours = _opened(flags.base)
        model = merge(base, model)
    model.table()
    to = flags.to or ("hf" if ours and not flags.int8 else "orbax")
    model = quantise(model) if flags.int8 else model
    if to == "hf" and model.about.get("base_dtype") == "int8":
        raise ValueError("int8 kernels cannot be exported (--to=orbax); convert the source that they were made from.")
    hf_config = model.about["hf_config"] or {}
    tokenizer = open_tokenizer(flags.tokenizer) if flags.tokenizer else None
    vocab_size = model.about.get("vocab_size") or hf_config.get("vocab_size")
    if tokenizer is not None and vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"--tokenizer={flags.tokenizer} has {tokenizer.vocab_size} tokens, the model {vocab_size}.")
    dst = Path(os.path.expanduser(flags.dst)).absolute()
    if to == "orbax":
        check_folder(dst, "--dst=")
    exists = any(dst.iterdir()) if dst.is_dir() else dst.exists()
    if exists and not flags.verify:
        raise ValueError(f"--dst: {dst} exists; give another folder, remove it, or compare it with --verify.")
    total = num_bytes(model.tensors)
    size = f"{total / 1e9:.2f} GB"
    with tqdm(total=total * (1 + flags.verify), unit="B", unit_scale=True, desc="Verifying" if exists else "Converting",
              disable=None) as bar:  # fmt: skip
        if exists:
            outputs.verify(dst, model, to, progress=bar.update)
            return f"{dst} is what {flags.src} converts to ({size} compared)."
        with outputs.whole_folder(dst, outputs.space_needed(model)) as partial:
            hashes = outputs.write(partial, model, to, source=flags.src, tokenizer=tokenizer, progress=bar.update)
            if flags.verify:
                bar.set_description("Verifying")
                outputs.verify(partial, model, to, expected=hashes, progress=bar.update)
    message = f"{dst}: {len(hashes)} tensors, {size}{', verified' * flags.verify}."
    if to == "hf" and any("--" not in str(name) for name in hf_config.get("auto_map", {}).values()):
        message += " Copy the *.py files of the original repository beside it; config.json names them."
    return message


def _opened(src: str, weights: str | None = None) -> tuple[Model, bool]:
    """A model, and whether its format is this package's."""
    path = Path(os.path.expanduser(src))
    if src.startswith(PREFIX):
        check_configs(download(src, CONFIGS))
        path = download(src)
    model = open_model(path, weights)
    for note in model.notes:
        print(f"Note: {note}")
    return model, (path / "params").is_dir() or is_run(path)


@command(interrupted="Interrupted; nothing was left. The same command starts again.")
def main(argv: list[str]) -> None:
    print(convert(parse(argv)))


if __name__ == "__main__":
    sys.exit(main())
