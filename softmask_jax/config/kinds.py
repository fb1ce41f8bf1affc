"""Kinds of models that a config may name, and what its rules need to know of each."""
from typing import NamedTuple


class Kind(NamedTuple):
    """from_base: sizes and weights come from a converted model, `model.base`. chat: trained on conversations, else on
    running text."""

    from_base: bool = False
    chat: bool = False


# By model.kind; `models.families.register` adds others.
KINDS = {"dit": Kind(), "dream": Kind(from_base=True, chat=True)}
