"""Human reference texts for MAUVE: windows of a validation split in a seeded order, decoded.

As in the soft-masking reference (`load_human_references`) they are whole windows with BOS and EOS, as many and as long as
the samples. Its order is PyTorch's; ours is NumPy's.
"""
import numpy as np

from softmask_jax.data.sources import Source
from softmask_jax.evaluate.perplexity.text_sets import GIVE_TEXTS, NoText, Text, other_text, own_text, sources
from softmask_jax.evaluate.settings import Generative, listed
from softmask_jax.evaluate.task import Work

SETTING = "config.generative.references"
NONE = "none"
GIVE = f"name a text in its place, {SETTING}='files:texts/*.txt', or leave MAUVE out with {SETTING}={NONE}"


def source_of(given: Generative) -> Source | None:
    """The source of config.generative.references; None for the run's own split or no references. ValueError for
    another form than `source:paths`, or missing files."""
    if given.references in ("", NONE):
        return None
    if len(listed(given.references)) != 1 or "=" in given.references.split(":")[0]:
        raise ValueError(f"{SETTING} is '{given.references}'; name one text, such as 'files:texts/*.txt'.")
    try:
        return sources(f"references={given.references}")["references"]
    except ValueError as error:
        raise ValueError(_ours(error)) from error


def open_text(work: Work) -> Text | None:
    """The windows of references; None for config.generative.references=none.

    ValueError: a converted model has no text of its own; the run's own is missing or has changed. OSError: the cache of
    tokens cannot be written.
    """
    given = work.settings.generative
    if given.references == NONE:
        return None
    source = source_of(given)
    try:
        return own_text(work.path, work.model) if source is None else other_text("references", source, work.model)
    except NoText:
        raise ValueError(f"{work.path} is a converted model and brings no validation text along: {GIVE}.") from None
    except ValueError as error:
        raise ValueError(_ours(error)) from error


def decoded(text: Text, tokenizer, *, count: int, length: int, seed: int) -> tuple[list[str], np.ndarray]:
    """`count` windows, or all if they are fewer, each cut to `length` tokens: as texts and as ids [n length]."""
    order = np.random.default_rng(seed).permutation(len(text.windows))[:count]
    tokens = text.windows.gather(order)[:, :length]
    return [tokenizer.decode(row) for row in tokens], tokens


def _ours(error: ValueError) -> str:
    message = str(error).replace(GIVE_TEXTS, GIVE)
    return message.replace("config.perplexity.texts: references", SETTING).replace("config.perplexity.texts", SETTING)
