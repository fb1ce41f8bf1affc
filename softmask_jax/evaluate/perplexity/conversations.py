"""Validation of a model that was fine-tuned on conversations: the recipe's loss of every held-out response.

A row is an example under one draw of t and masks, with one pass and with two. By default t is stratified jointly over
examples and draws in [t_min, t_max] (`mask_draws`). `compat` is the recipe's validation and gives training's numbers: t
evenly spaced over the examples, the seed of config.eval, and a coin for each example between its passes ("mixed")."""
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.config.kinds import KINDS
from softmask_jax.convert import converted
from softmask_jax.convert.model import adapted_kind
from softmask_jax.convert.safe_files import read_json
from softmask_jax.data.chat.buckets import Buckets
from softmask_jax.data.chat.sft import build_sft
from softmask_jax.diffusion import noise, response_loss, two_pass
from softmask_jax.diffusion.soft_masking import SoftMask
from softmask_jax.distributed import sharding
from softmask_jax.evaluate.perplexity.mask_draws import stratified
from softmask_jax.evaluate.perplexity.records import Columns, recorded, settings_of
from softmask_jax.evaluate.perplexity.text_sets import OWN, evenly_spaced, rebuilt
from softmask_jax.evaluate.task import Work, pieces
from softmask_jax.io.paths import to_path
from softmask_jax.io.runs import is_run
from softmask_jax.models import families
from softmask_jax.training.tasks.conversations import bucket_sizes, fingerprint
from softmask_jax.training.tasks.task import tokenizer_name


def is_chat(path: Path) -> bool:
    """Whether a folder for `softmask_jax.load` holds a model of conversations alone, an adapter on one, or a run."""
    about = converted.about(path)
    if "data" in about:
        return about["data"]["source"] == "chat"
    kind = adapted_kind(about) if about.get("kind") == "adapter" else about.get("kind")
    return kind in KINDS and KINDS[kind].chat and not KINDS[kind].text


def conversations(work: Work) -> tuple[config_schema.Config, Buckets, str]:
    """A run's config, its padded validation examples, and a hash of them. ValueError if they are not here."""
    path = work.path
    if not is_run(path):
        raise ValueError(f"perplexity: {path} is a converted model or an adapter, which brings no validation split "
                         "along: leave this task away, or give the folder of the run that fine-tuned it.")
    config = config_schema.from_dict(read_json(path, "config.json"))
    base = to_path(work.settings.models.base or config.model.base)
    tokenizer = tokenizer_name(config.data.tokenizer, base)
    sizes, whole = bucket_sizes(config.data.buckets), config.data.pads == "row"
    sft = rebuilt(
        path, work.model.step, lambda: build_sft(config.data, tokenizer=tokenizer),
        lambda sft: fingerprint(sft, sizes, base, whole), "The conversations or the base have changed", "bring them back",
    )  # fmt: skip
    return config, Buckets(sft.validation, sft.pad_id, config.train.seed, sizes, whole_rows=whole), sft.info["fingerprint"]


def measured(work: Work) -> Columns:
    """Columns of the run's validation, missing rows measured first. ValueError: see `conversations`."""
    settings, model = work.settings.perplexity, work.model
    if settings.texts or not settings.own:
        raise ValueError(f"perplexity: {work.path} was fine-tuned on conversations and is measured on those alone; "
                         "leave config.perplexity.texts and own away, or evaluate it by itself.")
    config, buckets, fingerprint = conversations(work)
    # The run's loss, with the model's soft-masking (maybe turned off) and a t for each example.
    soft_mask, p_sm = SoftMask(model.soft_mask.variant, model.soft_mask.k), config.soft_mask.p_sm
    objective = dataclasses.replace(families.of(config.model.kind).objective(config).by_row(), soft_mask=soft_mask)
    numbers = evenly_spaced(len(buckets), settings.max_windows)
    draws, seed, strata = 1, config.eval.seed, None
    if not settings.compat:
        draws, seed = settings.draws, work.settings.run.seed
        strata = stratified(len(numbers), draws, seed)
    decisive = {
        "metric": "loss", "text": fingerprint, "pads": config.train.seed, "tokens": 1, "windows": len(numbers),
        "draws": draws, "seed": seed, "compat": settings.compat, "p_sm": p_sm if settings.compat else 0.0,
        "step": model.step, **settings_of(objective),
    }  # fmt: skip
    bucket_of = buckets.bucket_of[numbers]
    batches = (
        piece for size in np.unique(bucket_of).tolist()
        for piece in pieces(numbers[bucket_of == size], draws, settings.batch_size, size)
    )  # fmt: skip
    return recorded(
        work, OWN, decisive, batches, numbers=numbers, strata=strata,
        gather=lambda index, piece: buckets.gather(index, piece.size),
        program=_program(model.denoiser, objective, work.mesh, len(buckets)), extra=(np.float32(p_sm),),
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _program(denoiser, objective: response_loss.ResponseLoss, mesh: jax.sharding.Mesh, total: int):
    """(params, batch, draw, key, p_sm) -> columns [B]."""

    def score(params, batch, draw, key, p_sm):
        compat = "stratum" not in batch
        if compat:
            t = objective.validation_t(batch["index"], total)
        else:
            keys = response_loss.example_keys(key, noise.Stream.T, batch["index"], draw)
            u = noise.stratified_t(keys, batch["stratum"], batch["count"], 0.0)
            t = objective.t_min + (objective.t_max - objective.t_min) * u
        noisy = objective.draw(batch, key, mask_token_id=denoiser.mask_token_id, t=t, epoch=draw)
        scores = two_pass.row_scores(denoiser, objective.soft_mask, params, noisy)
        columns = {"t": noisy.t, "masked": scores.masked} | scores.loss
        columns |= {f"{name}_cross_entropy": sums for name, sums in scores.cross_entropy.items()}
        if compat and "two_pass" in columns:
            coins = response_loss.example_coins(key, batch["index"], p_sm)
            columns["mixed"] = jnp.where(coins, columns["two_pass"], columns["one_pass"])
        return columns

    return jax.jit(score, out_shardings=sharding.replicated(mesh))
