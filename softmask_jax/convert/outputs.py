"""Writing a model atomically as our folder or as files of the PyTorch tools, and comparing it with its source."""
import contextlib
import filecmp
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from softmask_jax.convert import mdlm, orbax_files, safetensors_files
from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.model import FORMAT, VERSION, Model, in_dtype, weights_dtype
from softmask_jax.convert.safe_files import OTHER_BYTES, inside
from softmask_jax.convert.sources import ADAPTER_CONFIG, ADAPTER_FILE, TRANSPARENCY, open_model
from softmask_jax.convert.tensors import Hashed, Progress, hashes, in_memory, joined, num_bytes
from softmask_jax.data import Tokenizer
from softmask_jax.diffusion import transparency
from softmask_jax.io import tree_files
from softmask_jax.io.files import explained, locked, sync_folder, write_atomically, write_json
from softmask_jax.io.paths import BucketPath

ELSEWHERE = "give another --dst"
LAST = ("config.json", ADAPTER_CONFIG)
MDLM_CLASSES = "kuleshov-group/mdlm-owt"


@contextlib.contextmanager
def whole_folder(dst: Path, needed: int, elsewhere: str = ELSEWHERE) -> Iterator[Path]:
    """A folder to write into, which becomes `dst` when the block ends without an error. OSError without space for
    `needed` bytes, RuntimeError while another process writes it, FileExistsError for a `dst` with other files."""
    if isinstance(dst, BucketPath):
        with _copied_whole(dst, elsewhere) as partial:
            yield partial
        return
    dst = Path(os.path.realpath(dst))
    if dst.is_mount():
        raise OSError(f"{dst} is a mount point, which no folder can replace; give a folder in it.")
    workshop = dst.parent / f".{dst.name}.partial"
    partial = workshop / "folder"
    with explained(dst, elsewhere):
        workshop.mkdir(parents=True, exist_ok=True)
        with locked(workshop, elsewhere):
            try:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                if (free := shutil.disk_usage(partial).free) < needed:
                    sizes = f"{needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB"
                    raise OSError(f"{dst} needs {sizes}. Free space, or {elsewhere}.")
                yield partial
                for folder, _, _ in os.walk(partial):
                    sync_folder(Path(folder))
                if dst.is_dir() and any(dst.iterdir()):
                    _check_same(partial, dst, elsewhere)
                else:
                    os.rename(partial, dst)
                    sync_folder(dst.parent)
            finally:
                shutil.rmtree(workshop, ignore_errors=True)


def is_taken(dst: Path) -> bool:
    """Whether there is something that `whole_folder` must not replace."""
    if isinstance(dst, BucketPath):
        # What a kill of `_copied_whole` left has no config, and its originals.
        return any((dst / name).exists() for name in LAST) or dst.exists() and not _partial(dst).exists()
    return any(dst.iterdir()) if dst.is_dir() else dst.exists()


def _partial(dst: BucketPath) -> BucketPath:
    return dst.parent / f".{dst.name}.partial" / "folder"


@contextlib.contextmanager
def _copied_whole(dst: BucketPath, elsewhere: str) -> Iterator[Path]:
    """`whole_folder` in a bucket, which has no rename: objects are copied within it, the model's config at last."""
    partial = _partial(dst)
    with locked(partial.parent, elsewhere):
        partial.rmtree(missing_ok=True)
        try:
            yield partial
            partial.copy_objects(dst, last=LAST)
        except Exception:
            if not dst.exists():
                partial.rmtree(missing_ok=True)
            raise
        partial.rmtree(missing_ok=True)
    partial.parent.rmtree(missing_ok=True)


def _check_same(folder: Path, dst: Path, elsewhere: str) -> None:
    """FileExistsError unless two folders hold the same files."""
    names = {path.relative_to(root) for root in (folder, dst) for path in root.rglob("*") if not path.is_dir()}
    for name in sorted(names):
        pair = folder / name, dst / name
        if not (all(path.is_file() for path in pair) and filecmp.cmp(*pair, shallow=False)):
            raise FileExistsError(f"{dst} holds another {name} than this command writes; remove it, or {elsewhere}.")


def write(folder: Path, model: Model, to: str, *, source: str, tokenizer: Tokenizer | None,
          progress: Progress) -> dict[str, str]:
    """Write `model` into an empty folder, to: orbax | hf. Returns SHA-256 of every tensor read, by PyTorch's key.
    Raises ValueError as `Model.table`, and for what the format cannot hold; OSError when the disk is full."""
    table, hashed = model.table(), Hashed(model.written(to), progress)
    if to == "orbax":
        _write_ours(folder, model, table, hashed, source, tokenizer)
        return hashed.sha256
    for name, content in small_files(model).items():
        write_atomically(folder / name, [content])
    tensors, name, files = hashed, ADAPTER_FILE if model.kind == "adapter" else safetensors_files.SINGLE, None
    if model.kind == "dit":
        sizes = model.about["config"]["model"]
        buffer = mdlm.inverse_frequencies(sizes["hidden_size"] // sizes["num_heads"])
        tensors = joined(hashed, in_memory({mdlm.INVERSE_FREQUENCIES: buffer}))
    elif model.placed and model.kind != "adapter":
        files = {key: file for key, file in model.placed.items() if key in hashed.specs}
    safetensors_files.write(folder, tensors, name=name, files=files)
    return hashed.sha256


def verify(folder: Path, model: Model, to: str, *, expected: Mapping[str, str] | None = None,
           progress: Progress = lambda _: None) -> None:
    """Raise ValueError where a folder differs from `model`. expected: hashes of `write`; None reads `model` again."""
    if expected is None:
        expected = hashes(model.written(to), progress)
    if to == "orbax":
        try:
            # Parameters are compared below, by tensor.
            if not tree_files.verify(folder, [path.name for path in folder.iterdir() if path.name != "params"]):
                raise ValueError(f"{folder} has no {tree_files.CHECKSUMS}; convert again.")
        except tree_files.Damaged as damage:
            raise ValueError(f"{folder} is damaged: {damage}. Convert again.") from None
    else:
        for name, content in small_files(model).items():
            if inside(folder, name, OTHER_BYTES).read_bytes() != content:
                raise ValueError(f"{folder / name} differs from this source's. Convert again, into another --dst.")
    written = open_model(folder)
    ours, theirs = (one.about.get("base_dtype", "float") for one in (written, model))
    if ours != theirs:
        flag = f"with{'out' * (ours == 'float')} --int8"
        raise ValueError(f"{folder} holds {ours} kernels, the source {theirs} ones; compare {flag}.")
    if model.kind == "dit" and to == "hf":  # MDLM's files are read in float32, whatever they hold
        written = in_dtype(written, weights_dtype(model))
    actual = hashes(written.written(to), progress)
    differing = sorted(key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key))
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ValueError(f"{folder} differs from its source in {', '.join(differing[:5])}{more}. Convert again.")


def small_files(model: Model) -> dict[str, bytes]:
    """Files of the PyTorch tools beside the weights, by name. Raises ValueError for what they cannot hold."""
    files = {name: path.read_bytes() for name, path in model.files.items() if name != "softmask_tokenizer.json"}
    configs = {ADAPTER_CONFIG if model.kind == "adapter" else "config.json": model.about["hf_config"]}
    if model.kind == "dit":
        configs = {"config.json": _mdlm_config(model)}
    elif "config" in model.about:
        raise ValueError(f"No class of Hugging Face takes a model of kind {model.kind}: give --to=orbax.")
    elif model.soft_mask:
        configs[TRANSPARENCY] = transparency.write(model.soft_mask, model.raw_scalars())
    # As Hugging Face writes them.
    texts = {name: json.dumps(config, indent=2, ensure_ascii=False) + "\n" for name, config in configs.items()}
    return files | {name: text.encode() for name, text in texts.items()}


def _mdlm_config(model: Model) -> dict:
    """Config for MDLM's Hugging Face class, whose MLP always has four times the width."""
    sizes, soft = model.about["config"]["model"], model.soft_mask
    if sizes["mlp_ratio"] != 4 or sizes["rope_base"] != mdlm.ROPE_BASE:
        raise ValueError("MDLM's Hugging Face class has mlp_ratio 4 and rope_base 1e4; this model does not fit it.")
    config = model.about["hf_config"] or {
        "architectures": ["MDLM"],
        "auto_map": {
            "AutoConfig": f"{MDLM_CLASSES}--configuration_mdlm.MDLMConfig",
            "AutoModelForMaskedLM": f"{MDLM_CLASSES}--modeling_mdlm.MDLM",
        },
        "cond_dim": sizes["cond_dim"], "dropout": sizes["dropout"], "hidden_dim": sizes["hidden_size"],
        "model_length": model.about["config"]["data"]["seq_len"], "model_type": "mdlm",
        "n_blocks": sizes["num_blocks"], "n_heads": sizes["num_heads"], "time_conditioning": False,
        "torch_dtype": weights_dtype(model), "vocab_size": model.about["vocab_size"],
    }  # fmt: skip
    if soft:
        config = config | {"transparency_alg": transparency.published(soft["variant"]), "mixinputs_k": soft["k"]}
    return config


def _write_ours(folder: Path, model: Model, table, hashed: Hashed, source: str, tokenizer: Tokenizer | None) -> None:
    written = orbax_files.write(folder / "params", hashed, table, model.num_blocks)
    (folder / "tokenizer").mkdir()
    about = model.about | ({} if model.placed is None else {"placed": dict(model.placed)})
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        about |= {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "mask_token_id")}
    else:
        for name, path in model.files.items():
            write_atomically(folder / "tokenizer" / name, [path.read_bytes()])
    write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, "kind": model.kind, **about})
    arrays = _described(orbax_files.stored_specs(folder / "params"))
    stored = {tuple(path.split("/")): jax.ShapeDtypeStruct(**spec) for path, spec in arrays.items()}
    tree_files.read_back(folder, {"params": tree_files.nested(stored)})
    tensors = {key: spec | {"sha256": hashed.sha256[key]} for key, spec in _described(hashed.specs).items()}
    write_json(folder / "manifest.json", {"version": VERSION, "source": source, "tensors": tensors, "arrays": arrays})
    tree_files.write_checksums(folder, known={f"params/{name}": sum_ for name, sum_ in written.items()})


def _described(specs: Mapping[str, Spec]) -> dict[str, dict]:
    return {name: {"dtype": spec.dtype.name, "shape": spec.shape} for name, spec in specs.items()}


def space_needed(model: Model) -> int:
    """Bytes that `write` takes at most."""
    return int(num_bytes(model.tensors) * 1.01) + sum(path.stat().st_size for path in model.files.values()) + 2**20
