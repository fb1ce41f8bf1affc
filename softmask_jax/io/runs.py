"""Runs in the folder `runs/`: the default one of a config, and the only one that there is."""
import os
import shlex

from softmask_jax.config import located
from softmask_jax.config.command_line import say
from softmask_jax.io.paths import to_path

FOLDER = "runs"
LISTED = 10


def default_folder(config: str) -> str:
    """`runs/<config>[-<variant>]` of `--config=<config>.py[:<variant>]`, printed. FileNotFoundError without the file.
    ValueError: config and variant cannot name a folder."""
    path, variant = located(config)
    name = "-".join(filter(None, (os.path.basename(path).removesuffix(".py"), variant)))
    if "/" in name or not name.isprintable() or not name.strip("."):
        raise ValueError(f"--config={config!a} cannot name a folder in {FOLDER}/; give --workdir=FOLDER.")
    folder = os.path.join(FOLDER, name)
    say(f"The run is in {folder} (--workdir=FOLDER chooses another).")
    return folder


def only_run(form: str) -> str:
    """The one run in `runs/`, printed. FileNotFoundError, ValueError: there is none, or several.
    form: how a user names one, such as "--checkpoint={}"."""
    names = sorted(os.listdir(FOLDER)) if os.path.isdir(FOLDER) else []
    runs = [path for name in names if is_run(path := os.path.join(FOLDER, name))]
    if not runs:
        raise FileNotFoundError(f"There is no run in {os.path.abspath(FOLDER)}: give {form.format('FOLDER')}.")
    if len(runs) > 1:
        shown = ", ".join(shlex.quote(path) if path.isprintable() else ascii(path) for path in runs[:LISTED])
        more = f" and {len(runs) - LISTED} more" if len(runs) > LISTED else ""
        raise ValueError(f"There are {len(runs)} runs ({shown}{more}): choose one with {form.format('FOLDER')}.")
    say(f"Taking {runs[0]}, the only run in {FOLDER}/.")
    return runs[0]


def is_run(path: str | os.PathLike) -> bool:
    """Whether a folder is a run of this package; Lightning's also have `checkpoints`, but no config.json."""
    path = to_path(path)
    return (path / "checkpoints").is_dir() and (path / "config.json").is_file()
