"""Kinds of models, and their properties that the rules of a config need."""
from typing import NamedTuple


class Kind(NamedTuple):
    """A family of models."""

    from_base: bool = False  # sizes and weights are those of `model.base`
    chat: bool = False  # trained on conversations, else on running text


# By model.kind; `models.families.register` adds others.
KINDS = {"dit": Kind(), "dream": Kind(from_base=True, chat=True)}
