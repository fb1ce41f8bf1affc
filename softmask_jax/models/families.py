"""Model families by `config.model.kind`, each a network in `nn/`, a builder, a table in `keys/` and an entry here."""
import dataclasses
from collections.abc import Callable, Mapping

from softmask_jax.config import Config, Model, SoftMask
from softmask_jax.config.kinds import KINDS, Kind
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.objective import Objective
from softmask_jax.models import denoiser, dream_denoiser
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.models.keys import Keys, dit, dream


@dataclasses.dataclass(frozen=True)
class Family:
    """What training, samplers, conversion and evaluation need to know of a family of models."""

    kind: Kind  # source of its sizes and data
    # (config.Model, config.SoftMask, about, *, mesh=None). about: config.json of the converted model in
    # `config.model.base`, or {"vocab_size", "mask_token_id"} for a network with sizes of its own.
    build: Callable[..., Denoiser]
    objective: Callable[[Config], Objective]
    keys: Keys | None = None  # None: no conversion from PyTorch
    padding: str = "right"  # side on which rows of a batch are padded, "left" or "right"
    default_alg: str = "mdlm"  # sampler
    fixed_length: bool = True  # rows are windows of the training length starting with BOS; else continued prompts
    shifted: bool = False  # logits of the PyTorch model at i predict token i + 1


def _dit(model: Model, soft_mask: SoftMask, about: Mapping, *, mesh=None) -> Denoiser:
    sizes = {name: about[name] for name in ("vocab_size", "mask_token_id")}
    return denoiser.build(model, soft_mask, **sizes, mesh=mesh)


def _dream(model: Model, soft_mask: SoftMask, about: Mapping, *, mesh=None) -> Denoiser:
    return dream_denoiser.build(model, soft_mask, about["hf_config"], mesh=mesh)


FAMILIES = {
    "dit": Family(KINDS["dit"], _dit, Nelbo.from_config, dit.KEYS),
    "dream": Family(
        KINDS["dream"], _dream, DreamLoss.from_config, dream.KEYS,
        padding="left", default_alg="entropy", fixed_length=False, shifted=True,
    ),
}  # fmt: skip


OURS = frozenset(FAMILIES)


def register(name: str, family: Family) -> None:
    """Add a choice of `config.model.kind`, for instance from a config file. ValueError for a built-in name."""
    if name in OURS:
        raise ValueError(f"{name} is a family of this package; choose another name.")
    KINDS[name], FAMILIES[name] = family.kind, family


def of(kind: str) -> Family:
    """The family of a kind. ValueError if there is none."""
    if kind not in FAMILIES:
        raise ValueError(f"There is no family {kind}; choose one of {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
