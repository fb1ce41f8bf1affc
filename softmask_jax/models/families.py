"""The families of models, by `config.model.kind`: all that training, samplers, conversion and evaluation ask of one.

A new family is a network in `nn/`, a builder, a key table in `keys/` and an entry here.
"""
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
    """One family of models.

    Attributes:
      kind: where its sizes and data come from.
      build: `(config.Model, config.SoftMask, about, *, mesh=None) -> Denoiser`. about: config.json of the converted
        model in `config.model.base`; of a network with sizes of its own, "vocab_size" and "mask_token_id".
      objective: `(Config) -> Objective`, what is trained.
      keys: PyTorch's names of its parameters; None if it cannot be converted.
      padding: side on which rows of a batch are padded, "left" or "right".
      default_alg: sampler where no `alg` is set.
      fixed_length: rows are windows of the training length that begin with BOS; else prompts are continued.
      shifted: logits of the PyTorch model at i predict token i + 1.
    """

    kind: Kind
    build: Callable[..., Denoiser]
    objective: Callable[[Config], Objective]
    keys: Keys | None = None
    padding: str = "right"
    default_alg: str = "mdlm"
    fixed_length: bool = True
    shifted: bool = False


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
    """Make `config.model.kind=name` a choice, for instance from the file of a config. Raises ValueError for a name of ours."""
    if name in OURS:
        raise ValueError(f"{name} is a family of this package; choose another name.")
    KINDS[name], FAMILIES[name] = family.kind, family


def of(kind: str) -> Family:
    """The family of a kind. Raises ValueError."""
    if kind not in FAMILIES:
        raise ValueError(f"There is no family {kind}; choose one of {', '.join(FAMILIES)}.")
    return FAMILIES[kind]
