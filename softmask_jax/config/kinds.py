"""Kinds of models, and their properties that the rules of a config need."""
from typing import NamedTuple


class Kind(NamedTuple):
    """A family of models."""

    from_base: bool = False  # sizes and weights are those of `model.base`
    chat: bool = False  # can be trained on conversations
    text: bool = True  # can be trained on running text
    source: str = "hf://OWNER/NAME"  # an example of what its base is converted from


# By model.kind; `models.families.register` adds others.
KINDS = {
    "dit": Kind(),
    "dream": Kind(from_base=True, chat=True, text=False, source="hf://Dream-org/Dream-v0-Instruct-7B"),
    "llada": Kind(from_base=True, chat=True, source="hf://GSAI-ML/LLaDA-8B-Instruct"),
}
