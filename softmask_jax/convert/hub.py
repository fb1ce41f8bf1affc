"""Models from the Hugging Face hub: weights as safetensors, configs and tokenizers, never code and never pickles."""
from collections.abc import Sequence
from pathlib import Path

from softmask_jax.convert.model import CARRIED
from softmask_jax.data.tokenizers.hub import NAME, PREFIX

CONFIGS = ("config.json", "adapter_config.json", "transparency_config.json")
EVERYTHING = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, *CARRIED)


def download(spec: str, patterns: Sequence[str] = EVERYTHING) -> Path:
    """The folder with the files of `hf://owner/name` or `hf://owner/name@revision`, in the hub library's cache.

    Raises ValueError for what is no name or without the library, OSError when they can neither be downloaded nor found.
    """
    match = NAME.fullmatch(spec)
    if match is None:
        raise ValueError(f"--src={spec} is no name on the hub; write {PREFIX}owner/name.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"--src={spec} needs huggingface_hub; pip install 'softmask_jax[hub]'.") from None
    try:
        return Path(snapshot_download(match["name"], revision=match["revision"], allow_patterns=list(patterns)))
    except Exception as error:  # it raises its own, those of its network library, and the system's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(
            f"--src={spec} cannot be downloaded ({reason:.200}); check the name, the network and, for private models, "
            "HF_TOKEN, or copy its *.safetensors and *.json here and give the folder."
        ) from error
