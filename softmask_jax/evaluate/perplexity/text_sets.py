"""Texts for perplexity: a run's own validation split, rebuilt from its config, and other texts.

Other texts become windows as training text does (`data.windows`): every document followed by an EOS, a BOS in front of a
window and an EOS behind it, by the model's own tokenizer. All of their documents count, repeated ones too.
"""
import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from softmask_jax import data
from softmask_jax.convert import converted
from softmask_jax.data.shards.cache import cache_folder
from softmask_jax.data.sources import Source, make_source
from softmask_jax.data.sources.corpus import BAD, Corpus, DROPPED, GOOD, VALIDATION, scan
from softmask_jax.evaluate.settings import listed
from softmask_jax.io import tree_files

OWN = "validation"
# Names that estimates use.
TAKEN = (OWN, "one_pass", "two_pass", "gain")
OPTIONS = ("text_key", "separator", "detokenizer")
EXAMPLE = "`ptb=jsonl:ptb.jsonl; books=files:books/*.txt`"
GIVE_TEXTS = "give other texts instead: --config.perplexity.texts='name=files:texts/*.txt' --config.perplexity.own=False"
WINDOWS_AT_ONCE = 1024


class NoText(ValueError):
    """A model without a validation text of its own."""


@dataclasses.dataclass(frozen=True)
class Text:
    """Windows [W L] of one text; notes: sentences that explain numbers on it."""

    name: str
    windows: data.Windows | data.Mixture
    notes: tuple[str, ...] = ()

    def chosen(self, most: int) -> np.ndarray:
        """int64 [W], the numbers of all windows, or of `most` evenly spaced ones (0: all)."""
        total = len(self.windows)
        count = min(most, total) if most else total
        return np.arange(count) * total // count

    def fingerprint(self, chosen: np.ndarray) -> str:
        """A hash of the tokens of the `chosen` windows [W]."""
        digest = hashlib.sha256(f"{len(chosen)} {self.windows.seq_len}".encode())
        for start in range(0, len(chosen), WINDOWS_AT_ONCE):
            digest.update(self.windows.gather(chosen[start : start + WINDOWS_AT_ONCE]).tobytes())
        return digest.hexdigest()


def described(texts: str) -> dict[str, tuple[str, str, dict[str, str]]]:
    """Kind, paths and options by name of `perplexity.texts`: `name=source:paths`, joined by `;`, each with optional
    `|text_key=`, `|separator=` or `|detokenizer=` as in config.data. ValueError for another form, or a name twice."""
    found = {}
    for entry in listed(texts):
        where, *options = (part.strip() for part in entry.split("|"))
        match = re.fullmatch(r"(\w[\w.-]*)\s*=\s*(\w+)\s*:\s*(.*)", where)
        options = dict(option.split("=", 1) if "=" in option else (option, "") for option in options)
        if not match or options.keys() - set(OPTIONS):
            raise ValueError(
                f"config.perplexity.texts: '{entry}' is not of the form {EXAMPLE}, behind a `|` {', '.join(OPTIONS)}."
            )
        name, kind, paths = match.groups()
        if name in TAKEN or name in found:
            why = "there twice" if name in found else "taken"
            raise ValueError(f"config.perplexity.texts: the name '{name}' is {why}; give the text another.")
        found[name] = kind, paths, options
    return found


def sources(texts: str) -> dict[str, Source]:
    """The sources that `described` lists. ValueError for one that does not exist, or whose files are not here."""
    found = {}
    for name, (kind, paths, options) in described(texts).items():
        try:
            found[name] = make_source(kind, paths, **options)
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"config.perplexity.texts: {name}: {error}") from error
    return found


def trained_on(path: Path, step: int) -> str:
    """Fingerprint of a run's training data, from its checkpoint. ValueError for a damaged one."""
    checkpoint = path / "checkpoints" / str(step)
    try:
        return tree_files.read_json(checkpoint, tree_files.verify(checkpoint, ["data"]))["cursor"]["data"]
    except tree_files.Damaged as damage:
        raise ValueError(f"{checkpoint} is damaged ({damage}): give another --config.models.step.") from damage


def own_text(path: Path, model) -> Text:
    """The validation split of the run in `path`, whose checkpoint at `model.step` knows what it was trained on.

    Raises:
      NoText: a converted model. ValueError: the text is not here, or has changed since the run.
    """
    if converted.is_converted(path):
        raise NoText(f"{path} is a converted model and brings no validation text along; {GIVE_TEXTS}.")
    was = trained_on(path, model.step)
    try:
        built = data.build(model.config.data)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"The text that {path} was trained on cannot be read here ({error}). Bring it back, or {GIVE_TEXTS}."
        ) from error
    now = built.info["fingerprint"]
    if now != was:
        raise ValueError(
            f"The text that config.data of {path} describes has changed since the run (fingerprint {now[:12]} instead of "
            f"{was[:12]}). Bring the files back, or {GIVE_TEXTS}."
        )
    return Text(OWN, built.validation)


def other_text(name: str, source: Source, model) -> Text:
    """Every document of a source as windows of the model's training length.

    Raises:
      ValueError: no document with text, too few tokens for a window, or a model without a tokenizer. OSError: the cache
      of tokens cannot be written.
    """
    corpus = _whole(name, source)
    tokenizer = model.tokenizer
    stream = corpus.stream(VALIDATION, tokenizer, cache_folder(model.config.data.cache_dir))
    windows = data.Windows(stream, model.max_length, tokenizer.bos_id, tokenizer.eos_id, name)
    left_out = ", ".join(f"{count} {what}" for count, what in ((corpus.blank, "blank"), (corpus.bad_rows, "bad")) if count)
    why = f", for example {corpus.bad[0]}" if corpus.bad else ""
    return Text(name, windows, (f"Of {name} these documents are left out: {left_out}{why}.",) if left_out else ())


def _whole(name: str, source: Source) -> Corpus:
    """All documents with text as one split."""
    scans = [scan(source.read(part)) for part in range(source.num_parts())]
    items = np.concatenate([found.items for found in scans])
    bad = tuple(line for found in scans for line in found.bad)[:1]
    if not (items["kind"] == GOOD).any():
        raise ValueError(
            f"config.perplexity.texts: {name} holds no document with text ({len(items)} read, "
            f"{(items['kind'] == BAD).sum()} bad{''.join(f', for example {line}' for line in bad)})."
        )
    return Corpus(source, items, np.where(items["kind"] == GOOD, VALIDATION, DROPPED).astype(np.int8), bad, 0)


def texts_of(path: Path, model, *, own: bool, others: dict[str, Source]) -> Iterable[Text]:
    """The own split, unless `own` is False, and the others, one at a time.

    A model that has no own split is measured on the others alone, with a note. Raises: see `own_text`, `other_text`.
    """
    note = ()
    if own:
        try:
            yield own_text(path, model)
        except NoText:
            if not others:
                raise
            note = (f"{path} is a converted model: there is no validation split of its own.",)
    for name, source in others.items():
        text = other_text(name, source, model)
        yield dataclasses.replace(text, notes=note + text.notes)
        note = ()
