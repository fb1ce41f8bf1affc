"""Scores of many texts, stored by batch: -log p, numbers of tokens, features.

Perplexity is exp(sum of -log p / counted tokens) over all texts, as in MDLM (`kuleshov-group/mdlm`,
`compute_generative_perplexity`) and Duo (`s-sahoo/duo`, `record_generative_perplexity`), which the soft-masking
reference uses. After a text's first token, all but EOS count, and the first EOS unless the text begins with one. In the
references the first EOS of the padding counts for a text without EOS; here padding never does."""
import dataclasses
import hashlib
import io
import logging
import math
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from softmask_jax.data.shards.cache import content_key
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.generative.scorer import Scorer
from softmask_jax.evaluate.task import Estimate
from softmask_jax.generate.batches import Batch, Shape, plan
from softmask_jax.io.answers import Hosts
from softmask_jax.io.files import explained, write_atomically

log = logging.getLogger("softmask_jax")
FORMAT = 1
POLL = 0.5  # seconds
# Lengths are rounded up to it, for fewer compiled programs.
MULTIPLE = 128


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of T texts."""

    nll: np.ndarray  # [T] float64, nats, summed over the counted tokens
    counted: np.ndarray  # [T]
    tokens: np.ndarray  # [T], by the scorer's tokenizer
    features: np.ndarray  # [T D] float32, zeros for a text without tokens
    key: str  # hash of texts, scorer and settings

    @property
    def written(self) -> np.ndarray:
        """[T] bool: texts with a token."""
        return self.tokens > 0

    def perplexity(self) -> Estimate:
        """exp of nats per counted token; ValueError if no token counts."""
        if not self.counted.any():
            raise ValueError("Generative perplexity: no text has two tokens, so there is nothing to score.")
        return Estimate.of_ratio(self.nll, self.counted).mapped(math.exp, unit="", better="lower")


def counts(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """[n] ids -> [n - 1] bool: whether each token behind the first counts; see the module."""
    ends = tokens == eos_id
    return (~ends | (np.cumsum(ends) == 1))[1:]


def score(scorer: Scorer, texts: Sequence[str], folder: Path, *, max_length: int, batch_size: int,
          check_stop: Callable[[], None] = lambda: None, elsewhere: str = "give another --out",
          hosts: Hosts = Hosts()) -> Scores:
    """Scores of texts, stored in `folder` under a hash of texts, scorer and settings; each is independent of other
    texts and padding. check_stop is called between batches. hosts: they share the texts, and the folder. ValueError for
    numbers that are not finite; OSError, with the remedy `elsewhere`, if the folder cannot be written."""
    rows = scorer.retokenized(texts, max_length)
    shards = sharding.batch_shards(scorer.mesh)
    size = math.ceil(batch_size / shards) * shards
    digest = hashlib.sha256(b"".join(len(ids).to_bytes(8, "little") + ids.tobytes() for ids in rows))
    key = content_key(
        scores_format=FORMAT, scorer=scorer.fingerprint, texts=digest.hexdigest(), max_length=max_length, rows=size
    )
    folder = folder / f"scores-{key}"
    written = [row for row, ids in enumerate(rows) if len(ids)]
    shapes = [Shape(min(math.ceil(len(rows[row]) / MULTIPLE) * MULTIPLE, max_length), 0, True) for row in written]
    scores = {
        "nll": np.zeros(len(rows)), "counted": np.zeros(len(rows), np.int64),
        "features": np.zeros((len(rows), scorer.config.hidden_size), np.float32),
    }  # fmt: skip
    batches = plan(shapes, samples=1, batch_size=size)
    own = set(hosts.share(range(len(batches))))
    # This host's batches first, then those that the others have scored meanwhile.
    for number, batch in sorted(enumerate(batches), key=lambda pair: pair[0] not in own):
        members = np.array([written[index] for index, _ in batch.keys])
        path = folder / f"{number:05}.npz"
        while (part := _stored(path, members)) is None and number not in own:
            check_stop()
            time.sleep(POLL)
        if part is None:
            check_stop()
            part = _scored(scorer, batch, [rows[row] for row in members])
            content = io.BytesIO()
            np.savez(content, rows=members, **part)
            with explained(folder, elsewhere):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, [content.getvalue()], elsewhere=elsewhere)
            log.info("%s of %s batches of texts scored", f"{number + 1:,}", f"{len(batches):,}")
        for name, values in scores.items():
            values[members] = part[name]
    return Scores(tokens=np.array([len(ids) for ids in rows]), key=key, **scores)


def _stored(path: Path, members: np.ndarray) -> dict | None:
    """A batch's scores, None if they are absent or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            batch = {name: file[name] for name in ("rows", "nll", "counted", "features")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s); these texts are scored again", path, error)
        return None
    return batch if np.array_equal(batch["rows"], members) else None


def _scored(scorer: Scorer, batch: Batch, texts: Sequence[np.ndarray]) -> dict:
    eos_id = scorer.tokenizer.eos_id
    tokens = np.full((batch.size, batch.shape.length), eos_id, np.int32)
    lengths = np.ones(batch.size, np.int32)
    for i, ids in enumerate(texts):
        lengths[i], tokens[i, : len(ids)] = len(ids), ids
    nll, features = scorer(tokens, lengths)
    counted = [counts(ids, eos_id) for ids in texts]
    sums = np.array([nll[i, : len(mask)][mask].sum(dtype=np.float64) for i, mask in enumerate(counted)])
    features = features[: len(texts)]
    if not (np.isfinite(sums).all() and np.isfinite(features).all()):
        raise ValueError("The scorer's numbers are NaN or infinite; set config.generative.compute_dtype=float32, or get "
                         "its weights anew.")
    return {"nll": sums, "counted": np.array([mask.sum() for mask in counted]), "features": features}
