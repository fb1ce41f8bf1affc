"""Texts for perplexity: a run's own validation split, rebuilt from its config, and other texts.

Other texts become windows as training text does (`data.windows`), by the model's tokenizer: an EOS after each document,
BOS and EOS around each window. All documents count, repeated ones too."""
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from softmask_jax import data
from softmask_jax.data.shards.cache import cache_folder
from softmask_jax.data.sources import Source, make_source
from softmask_jax.data.sources.corpus import BAD, Corpus, DROPPED, GOOD, VALIDATION, scan
from softmask_jax.io import tree_files
from softmask_jax.io.files import split_paths
from softmask_jax.io.paths import to_path
from softmask_jax.io.runs import is_run
from softmask_jax.training.tasks.running_text import build_texts

OWN = "validation"
# Names that estimates use.
TAKEN = (OWN, "one_pass", "two_pass", "gain")
OPTIONS = ("text_key", "separator", "detokenizer")
EXAMPLE = "`ptb=jsonl:ptb.jsonl; books=files:books/*.txt`"
SETTING = "config.perplexity.texts"
GIVE_TEXTS = "give other texts instead: --config.perplexity.texts='name=files:texts/*.txt' --config.perplexity.own=False"
AT_A_TIME = 1024  # windows


@dataclasses.dataclass(frozen=True)
class Text:
    """A text cut into windows."""

    name: str
    windows: data.Windows | data.Mixture  # [W L]
    notes: tuple[str, ...] = ()  # sentences that explain numbers on it

    def fingerprint(self, chosen: np.ndarray) -> str:
        """Hash of the tokens of the `chosen` windows [W]."""
        digest = hashlib.sha256(f"{len(chosen)} {self.windows.seq_len}".encode())
        for start in range(0, len(chosen), AT_A_TIME):
            digest.update(self.windows.gather(chosen[start : start + AT_A_TIME]).tobytes())
        return digest.hexdigest()


def evenly_spaced(total: int, most: int) -> np.ndarray:
    """`most` evenly spaced numbers below `total`, int64 [n]; 0 is all."""
    count = min(most, total) if most else total
    return np.arange(count) * total // count


def described(texts: str) -> dict[str, tuple[str, str, dict[str, str]]]:
    """(kind, paths, options) by name from `perplexity.texts`, `name=source:paths|option=...` joined by `;`, options as
    in config.data. ValueError for another form, or a name twice."""
    by_name = {}
    for entry in split_paths(texts, ";"):
        source, *parts = (part.strip() for part in entry.split("|"))
        match = re.fullmatch(r"(\w[\w.-]*)\s*=\s*(\w+)\s*:\s*(.*)", source)
        options = {key: value for key, _, value in (part.partition("=") for part in parts)}
        if not match or options.keys() - set(OPTIONS):
            raise ValueError(f"{SETTING}: '{entry}' is not of the form {EXAMPLE}, behind a `|` {', '.join(OPTIONS)}.")
        name, kind, paths = match.groups()
        if name in TAKEN or name in by_name:
            why = "there twice" if name in by_name else "taken"
            raise ValueError(f"{SETTING}: the name '{name}' is {why}; give the text another.")
        by_name[name] = kind, paths, options
    return by_name


def open_source(setting: str, kind: str, paths: str, options: dict[str, str]) -> Source:
    """ValueError, with the `setting`, for a source that does not exist, or whose files are not here."""
    try:
        return make_source(kind, paths, **options)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"{setting}: {error}") from error


def sources(texts: str) -> dict[str, Source]:
    """The sources that `described` lists, opened."""
    return {name: open_source(f"{SETTING}: {name}", *source) for name, source in described(texts).items()}


def trained_on(path: Path, step: int) -> str:
    """Fingerprint of a run's training data, from its checkpoint. ValueError for a damaged one."""
    checkpoint = path / "checkpoints" / str(step)
    try:
        return tree_files.read_json(checkpoint, tree_files.verify(checkpoint, ["data"]))["cursor"]["data"]
    except tree_files.Damaged as damage:
        raise ValueError(f"{checkpoint} is damaged ({damage}): give another --config.models.step.") from damage


def rebuilt(path: Path, step: int, build: Callable, fingerprint: Callable[..., str], changed: str, remedy: str):
    """A run's training data by `build`. ValueError, worded by `changed` and `remedy`, if they cannot be read here, or
    their `fingerprint` is not the run's."""
    was = trained_on(path, step)
    try:
        built = build()
        now = fingerprint(built)
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(f"The training data of {path} cannot be read here ({error}): {remedy}.") from error
    if now != was:
        raise ValueError(f"{changed} since the run in {path} ({now[:12]} instead of {was[:12]}): {remedy}.")
    return built


def own_text(path: Path, model, remedy: str = GIVE_TEXTS) -> Text:
    """The validation split of the run in `path`. ValueError for a converted model, or if the text is not here."""
    if not is_run(path):
        raise ValueError(f"{path} is a converted model or an adapter and brings no validation text along: {remedy}.")
    base = to_path(model.config.model.base) if model.family.kind.from_base else None
    built = rebuilt(
        path, model.step, lambda: build_texts(model.config.data, base), lambda built: built.info["fingerprint"],
        "The text of config.data has changed", remedy,
    )  # fmt: skip
    return Text(OWN, built.validation)


def other_text(name: str, source: Source, model) -> Text:
    """All documents of a source as windows of the model's training length. ValueError for too little text or no
    tokenizer; OSError if the cache of tokens cannot be written."""
    scans = [scan(source.read(part)) for part in range(source.num_parts())]
    items = np.concatenate([part.items for part in scans])
    bad = tuple(line for part in scans for line in part.bad)[:1]
    good, example = items["kind"] == GOOD, f", for example {bad[0]}" if bad else ""
    if not good.any():
        count = (items["kind"] == BAD).sum()
        raise ValueError(f"{name} holds no document with text ({len(items)} read, {count} bad{example}).")
    corpus = Corpus(source, items, np.where(good, VALIDATION, DROPPED).astype(np.int8), bad, 0)
    tokenizer = model.tokenizer
    stream = corpus.stream(VALIDATION, tokenizer, cache_folder(model.config.data.cache_dir))
    windows = data.Windows(stream, model.max_length, tokenizer.bos_id, tokenizer.eos_id, name)
    left_out = ", ".join(f"{count} {what}" for count, what in ((corpus.blank, "blank"), (corpus.bad_rows, "bad")) if count)
    return Text(name, windows, (f"Of {name} these documents are left out: {left_out}{example}.",) if left_out else ())


def texts_of(path: Path, model, *, own: bool, others: dict[str, Source]) -> Iterable[Text]:
    """The own split, if `own`, then the others; a converted model has no own split, which a note says."""
    note = ()
    if own and others and not is_run(path):
        note = (f"{path} is a converted model or an adapter: there is no validation split of its own.",)
    elif own:
        yield own_text(path, model)
    for name, source in others.items():
        text = other_text(name, source, model)
        yield dataclasses.replace(text, notes=note + text.notes)
        note = ()
