"""One conversion, by the flags of `python -m softmask_jax.convert`."""
import argparse

from softmask_jax.config.progress import Progress
from softmask_jax.convert import outputs
from softmask_jax.convert.hub import CONFIGS, download
from softmask_jax.convert.int8 import quantise
from softmask_jax.convert.model import Model, in_dtype, keys_of, merge
from softmask_jax.convert.sources import check_configs, open_model
from softmask_jax.convert.tensors import num_bytes
from softmask_jax.data import open_tokenizer
from softmask_jax.data.tokenizers.hub import PREFIX
from softmask_jax.io.files import check_folder
from softmask_jax.io.paths import to_path
from softmask_jax.io.runs import is_run


def convert(flags: argparse.Namespace) -> str:
    """Convert as the flags say; return the message to print. Raises ValueError, OSError or RuntimeError."""
    model, ours = _opened(flags.src, flags.weights)
    if flags.merge:
        base, ours = _opened(flags.base)
        model = merge(base, model)
    if flags.dtype:
        model = in_dtype(model, flags.dtype)
    model.table()
    to = flags.to or ("hf" if ours and not flags.int8 else "orbax")
    model = quantise(model) if flags.int8 else model
    if to == "hf" and model.about.get("base_dtype") == "int8":
        raise ValueError("int8 kernels cannot be exported (--to=orbax); convert the source that they were made from.")
    hf_config = model.about["hf_config"] or {}
    tokenizer = open_tokenizer(flags.tokenizer) if flags.tokenizer else None
    vocab_size = keys_of(model.kind).sizes(model.about).get("V")
    if tokenizer is not None and vocab_size and tokenizer.vocab_size > vocab_size:
        raise ValueError(f"--tokenizer={flags.tokenizer} has {tokenizer.vocab_size} tokens, the model {vocab_size}.")
    dst = to_path(flags.dst).absolute()
    if to == "orbax":
        check_folder(dst, "--dst=")
    exists = outputs.is_taken(dst)
    if exists and not flags.verify:
        raise ValueError(f"--dst: {dst} exists; give another folder, remove it, or compare it with --verify.")
    total = num_bytes(model.tensors)
    size = f"{total / 1e9:.2f} GB"
    title = "Verifying" if exists else "Converting"
    with Progress(total * (1 + flags.verify), title, "bytes", scaled=True, brief=True) as shown:
        if exists:
            outputs.verify(dst, model, to, progress=shown.update)
            return f"{dst} is what {flags.src} converts to ({size} compared)."
        with outputs.whole_folder(dst, outputs.space_needed(model)) as partial:
            hashes = outputs.write(partial, model, to, source=flags.src, tokenizer=tokenizer, progress=shown.update)
            if flags.verify:
                outputs.verify(partial, model, to, expected=hashes, progress=shown.update)
    message = f"{dst}: {len(hashes)} tensors, {size}{', verified' * flags.verify}."
    if to == "hf" and any("--" not in str(name) for name in hf_config.get("auto_map", {}).values()):
        message += " Copy the *.py files of the original repository beside it; config.json names them."
    return message


def _opened(src: str, weights: str | None = None) -> tuple[Model, bool]:
    """A model, and whether its format is this package's."""
    path = to_path(src) if not src.startswith(PREFIX) else None
    if src.startswith(PREFIX):
        check_configs(download(src, CONFIGS))
        path = download(src)
    model = open_model(path, weights)
    for note in model.notes:
        print(f"Note: {note}")
    return model, (path / "params").is_dir() or is_run(path)
