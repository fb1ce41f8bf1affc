"""Models from the Hugging Face hub: weights as safetensors, configs and tokenizers, never code and never pickles."""
from collections.abc import Sequence
from pathlib import Path

from softmask_jax.convert.model import CARRIED
from softmask_jax.data.tokenizers import hub
from softmask_jax.data.tokenizers.hub import PREFIX as PREFIX

CONFIGS = ("config.json", "adapter_config.json", "transparency_config.json")
EVERYTHING = ("*.safetensors", "*.safetensors.index.json", *CONFIGS, *CARRIED)
REMEDY = "for private models HF_TOKEN, or copy its *.safetensors and *.json here and give the folder."


def download(url: str, patterns: Sequence[str] = EVERYTHING) -> Path:
    """`hub.download` of `hf://owner/name` or `hf://owner/name@revision`."""
    return hub.download(f"--src={url}", patterns, REMEDY)
