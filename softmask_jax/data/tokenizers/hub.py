"""Small files from the Hugging Face hub, such as tokenizers: never code."""
import re
from collections.abc import Sequence
from pathlib import Path

from softmask_jax.data.tokenizers.files import HUB_FILES
from softmask_jax.io.files import one_line

PREFIX = "hf://"
NAME = re.compile(r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def download(flag: str, patterns: Sequence[str], remedy: str, cache_folder: Path | None = None) -> Path:
    """Folder with a repository's files that match `patterns`. flag: such as `--src=hf://owner/name@revision`.
    Raises ValueError for another flag or a missing library, OSError, ending in `remedy`, for a failed download."""
    match = NAME.fullmatch(flag.partition("=")[2])
    if match is None:
        raise ValueError(f"{flag} is no name on the hub; write {PREFIX}owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{flag} needs huggingface_hub; pip install 'softmask_jax[hub]'") from None
    options = {"revision": match["revision"], "allow_patterns": list(patterns)}
    cache = None if cache_folder is None else str(cache_folder / "hub")
    try:
        return Path(snapshot_download(match["name"], cache_dir=cache, **options))
    except Exception as error:  # its own, those of its network library, and the system's
        reason = f"cannot be downloaded ({one_line(error)})"
        raise OSError(f"{flag} {reason}; check the name and the network, {remedy}") from error


def download_tokenizer(url: str, cache_folder: Path | None = None) -> Path:
    """`download` of the tokenizer's files."""
    remedy = f"or copy its {HUB_FILES[0]} here and give its path"
    return download(f"data.tokenizer={url}", HUB_FILES, remedy, cache_folder)
