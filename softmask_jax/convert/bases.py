"""The converted base of a run (`config.model.base`): whether it is there, the command that makes it, making it."""
import shlex
from pathlib import Path

from softmask_jax.config import Model
from softmask_jax.config.kinds import KINDS
from softmask_jax.convert.outputs import is_taken
from softmask_jax.io.paths import to_path


def folder_of(model: Model) -> Path:
    """The folder of `config.model.base`."""
    return to_path(model.base)


def exists(model: Model) -> bool:
    """Whether the base's folder holds a config.json; conversion writes the folder in one step."""
    return (folder_of(model) / "config.json").is_file()


def command(model: Model, dst: str = "") -> list[str]:
    """Arguments of `softmask_jax.convert` that make the base, in `dst` if not in `model.base`."""
    words = [f"--src={model.base_source or 'hf://OWNER/NAME'}", f"--dst={dst or model.base}"]
    return words + ["--int8"] * (model.base_dtype == "int8")


def command_line(model: Model, dst: str = "") -> str:
    """`command` as a shell takes it."""
    return shlex.join(["python", "-m", "softmask_jax.convert", *command(model, dst)])


def missing(model: Model) -> str:
    """Message for a base that is not there, or whose folder holds something else."""
    if is_taken(folder_of(model)):
        makes = f"{command_line(model, 'FOLDER')} makes one, for --config.model.base=FOLDER"
        return f"config.model.base: {folder_of(model)} holds something else than a converted model; {makes}."
    return f"config.model.base: no converted model in {folder_of(model)}; {command_line(model)} makes one."


def ensure(model: Model, *, fetch: bool, processes: int) -> None:
    """Check that the base, if the model takes one, is there; with `fetch`, make it: download, convert.
    FileNotFoundError: it is not there. ValueError, OSError, RuntimeError: it cannot be made."""
    if not KINDS[model.kind].from_base or exists(model):
        return
    if is_taken(folder_of(model)):
        raise FileNotFoundError(missing(model))
    if not fetch:
        raise FileNotFoundError(f"{missing(model)} With --fetch this command does so itself.")
    if not model.base_source:
        raise ValueError(f"--fetch: config.model.base_source must name what {model.base} is converted from.")
    if processes > 1:
        raise ValueError(f"--fetch is for a single process. Run this on one host first: {command_line(model)}")
    # Imports JAX.
    from softmask_jax.convert.__main__ import parse
    from softmask_jax.convert.conversion import convert

    print(f"No converted model in {folder_of(model)}; fetching it: {command_line(model)}", flush=True)
    print(convert(parse(command(model))), flush=True)
