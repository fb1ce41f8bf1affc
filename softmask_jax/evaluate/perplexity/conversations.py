"""Validation of a Dream that was fine-tuned on conversations: the recipe's loss of every held-out response.

A row is an example under one draw of t and masks, with one pass and with two on the same. By default the t of all
examples and draws are stratified jointly between t_min and t_max (`mask_draws`). `compat` is the recipe's own
validation and gives what training reports: t evenly spaced over the examples, the seed of config.eval, and a coin for
each example that decides between its passes ("mixed").
"""
import dataclasses
import functools
import hashlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.convert import converted
from softmask_jax.convert.safe_files import read_json
from softmask_jax.data.chat.buckets import Buckets
from softmask_jax.data.chat.sft import build_sft
from softmask_jax.diffusion import dream_loss, noise, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity.mask_draws import Scorer, padded_to, stratified
from softmask_jax.evaluate.perplexity.records import Columns, recorded, settings_of
from softmask_jax.evaluate.perplexity.text_sets import OWN, trained_on
from softmask_jax.evaluate.pieces import pieces
from softmask_jax.evaluate.settings import Perplexity
from softmask_jax.evaluate.task import Work


def is_dream(path: Path) -> bool:
    """Whether a folder for `softmask_jax.load` holds a Dream, an adapter, or a run of one."""
    about = read_json(path, "config.json")
    return about.get("kind") in ("dream", "adapter") or about.get("model", {}).get("kind") == "dream"


@dataclasses.dataclass(frozen=True, eq=False)
class Conversations:
    """A run's validation examples: its config, the examples padded in buckets, and a hash of them."""

    config: config_schema.Config
    buckets: Buckets
    fingerprint: str


def conversations(work: Work) -> Conversations:
    """Rebuilt from the run's config.

    Raises:
      ValueError: no run, or its conversations are not here or have changed since.
    """
    path = work.path
    if converted.is_converted(path):
        raise ValueError(
            f"perplexity: {path} is a converted Dream, which brings no validation split along; leave this task away, or "
            "give the folder of the run that fine-tuned it."
        )
    config = config_schema.from_dict(read_json(path, "config.json"))
    base = Path(os.path.expanduser(work.settings.models.base or config.model.base))
    named, sizes = config.data.tokenizer, tuple(int(size) for size in config.data.buckets.split(",") if size.strip())
    try:
        sft = build_sft(config.data, tokenizer=str(base / "tokenizer") if named == "base" else named)
        manifest = (base / "manifest.json").read_bytes()
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(
            f"The conversations that {path} was trained on cannot be read here ({error}). Bring them back."
        ) from error
    was = trained_on(path, work.model.step)
    # The run's fingerprint covers its base, too.
    now = hashlib.sha256(f"{sft.info['fingerprint']} {sizes} ".encode() + manifest).hexdigest()
    if was != now:
        raise ValueError(
            f"The conversations or the base that config.json of {path} describes have changed since the run (fingerprint "
            f"{now[:12]} instead of {was[:12]}). Bring them back."
        )
    buckets = Buckets(sft.validation, sft.pad_id, config.train.seed, sizes)
    return Conversations(config, buckets, sft.info["fingerprint"])


def loss_of(config: config_schema.Config, soft_mask) -> dream_loss.DreamLoss:
    """The run's loss with the soft-masking that the model has now; every example with a t of its own."""
    trained = dream_loss.DreamLoss.from_config(config)
    return dataclasses.replace(trained, soft_mask=SoftMask(soft_mask.variant, soft_mask.k), t_per="row")


def measured(work: Work) -> Columns:
    """Columns of the run's validation, from its record, which is completed first. ValueError: see `conversations`."""
    given, model = work.settings.perplexity, work.model
    if given.texts or not given.own:
        raise ValueError(
            f"perplexity: {work.path} was fine-tuned on conversations and is measured on those alone; leave "
            "config.perplexity.texts and own away, or evaluate it by itself."
        )
    split = conversations(work)
    objective, total = loss_of(split.config, model.soft_mask), len(split.buckets)
    count = min(given.max_windows, total) if given.max_windows else total
    numbers = np.arange(count) * total // count
    draws, seed, strata = given.draws, work.settings.run.seed, None
    if given.compat:
        draws, seed = 1, split.config.eval.seed
    else:
        strata = stratified(count, draws, seed)
    settings = {
        "metric": "loss", "text": split.fingerprint, "pads": split.config.train.seed, "tokens": 1, "windows": count,
        "draws": draws, "seed": seed, "compat": given.compat, "p_sm": split.config.soft_mask.p_sm if given.compat else 0.0,
        "step": model.step, **settings_of(objective),
    }  # fmt: skip
    program = _program(model.denoiser, objective, work.mesh, total)
    rows = padded_to(min(given.batch_size, count), work.mesh)
    score = Scorer(work, lambda index, piece: split.buckets.gather(index, piece.size), program, numbers, strata, rows, seed,
                   (np.float32(split.config.soft_mask.p_sm),))  # fmt: skip
    bucket_of = split.buckets.bucket_of[numbers]
    batches = (
        piece for size in np.unique(bucket_of).tolist()
        for piece in pieces(numbers[bucket_of == size], draws, given.batch_size, size)
    )  # fmt: skip
    return recorded(work, OWN, settings, batches, score)


@functools.lru_cache(maxsize=4)
def _program(denoiser, objective: dream_loss.DreamLoss, mesh: jax.sharding.Mesh, total: int):
    """(params, batch, draw, key, p_sm) -> columns [B]."""

    def score(params, batch, draw, key, p_sm):
        compat = "place" not in batch
        if compat:
            t = objective.validation_t(batch["index"], total)
        else:
            keys = dream_loss.example_keys(key, noise.Stream.T, batch["index"], draw)
            u = noise.stratified_t(keys, batch["place"], batch["count"], 0.0)
            t = objective.t_min + (objective.t_max - objective.t_min) * u
        noisy = objective.draw(batch, key, mask_token_id=denoiser.mask_token_id, t=t, epoch=draw)
        scores = two_pass.row_scores(denoiser, objective.soft_mask, params, noisy)
        made = {"t": noisy.t, "masked": scores.masked} | scores.loss
        made |= {f"{name}_cross_entropy": sums for name, sums in scores.cross_entropy.items()}
        if compat and "two_pass" in made:
            coins = dream_loss.example_coins(key, batch["index"], p_sm)
            made["mixed"] = jnp.where(coins, made["two_pass"], made["one_pass"])
        return made

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


def note(settings: Perplexity) -> str:
    """Explanation of the numbers for a reader."""
    if settings.compat:
        return "The recipe's own validation: t evenly spaced over the examples, a coin decides between one pass and two."
    return (
        f"The recipe's loss of responses over {settings.draws} draws of t and masks an example, the same for every model; 95 % "
        "intervals are over examples."
    )
