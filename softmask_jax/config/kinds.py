"""Kinds of models, and their properties that the rules of a config need."""
from typing import NamedTuple


class Kind(NamedTuple):
    """from_base: sizes and weights are those of `model.base`. chat: trained on conversations, else on running text."""

    from_base: bool = False
    chat: bool = False


# By model.kind; `models.families.register` adds others.
KINDS = {"dit": Kind(), "dream": Kind(from_base=True, chat=True)}
