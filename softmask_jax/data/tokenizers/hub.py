"""Tokenizers from the Hugging Face hub: the small files that hold them, never code, never weights."""
import re
from pathlib import Path

from softmask_jax.data.tokenizers.files import HUB_FILES

PREFIX = "hf://"
NAME = re.compile(r"hf://(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")


def download_tokenizer(spec: str, cache_folder: Path | None = None) -> Path:
    """The folder with the tokenizer files of `hf://owner/name` or `hf://owner/name@revision`.

    `cache_folder`: where downloads are kept; None is the hub library's own cache. Raises ValueError for what
    is no name or without the library, OSError when files can neither be downloaded nor found in the cache.
    """
    match = NAME.fullmatch(spec)
    if match is None:
        raise ValueError(f"data.tokenizer={spec!r} is no name on the hub; write {PREFIX}owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"data.tokenizer={spec} needs huggingface_hub; pip install 'softmask_jax[hub]'") from None
    try:
        folder = snapshot_download(
            match["name"],
            revision=match["revision"],
            allow_patterns=list(HUB_FILES),
            cache_dir=None if cache_folder is None else str(cache_folder / "hub"),
        )
    except Exception as error:  # it raises its own, those of its network library, and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"data.tokenizer={spec} cannot be downloaded ({reason}); check the name and the network, or copy its "
            f"{HUB_FILES[0]} here and give its path"
        ) from error
    return Path(folder)
