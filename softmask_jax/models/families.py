"""Model families by `config.model.kind`, each a network in `nn/`, a builder, a table in `keys/` and an entry here."""
import dataclasses
from collections.abc import Callable, Mapping

from softmask_jax.config import Config, Model, SoftMask
from softmask_jax.config.kinds import KINDS, Kind
from softmask_jax.diffusion.dream_loss import DreamLoss
from softmask_jax.diffusion.llada_loss import LLaDALoss, LLaDATextLoss
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.objective import Objective
from softmask_jax.models import denoiser, dream_denoiser
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.models.keys import Keys, dit, dream, llada
from softmask_jax.models.nn import dream_config, llada_config
from softmask_jax.models.nn.dream_config import DreamConfig


@dataclasses.dataclass(frozen=True)
class Published:
    """Models of a family in Hugging Face's format, as their config.json describes them."""

    model_type: str  # in lower case
    network: Callable[..., DreamConfig]  # (config.json, **overrides); ValueError for another network
    known: frozenset[str]  # entries of config.json that are read or harmless
    max_length: str  # the entry with the most positions of a row


@dataclasses.dataclass(frozen=True)
class Family:
    """What training, samplers, conversion and evaluation need to know of a family of models."""

    kind: Kind  # source of its sizes and data
    # (config.Model, config.SoftMask, about, *, mesh=None). about: config.json of the converted model in
    # `config.model.base`, or {"vocab_size", "mask_token_id"} for a network with sizes of its own.
    build: Callable[..., Denoiser]
    objective: Callable[[Config], Objective]
    keys: Keys | None = None  # None: no conversion from PyTorch
    published: Published | None = None  # None: no models in Hugging Face's format that can be a base
    padding: str = "right"  # side on which rows of a batch are padded, "left" or "right"
    default_alg: str = "mdlm"  # sampler
    fixed_length: bool = True  # rows are windows of the training length starting with BOS; else continued prompts
    shifted: bool = False  # logits of the PyTorch model at i predict token i + 1


def _dit(model: Model, soft_mask: SoftMask, about: Mapping, *, mesh=None) -> Denoiser:
    sizes = {name: about[name] for name in ("vocab_size", "mask_token_id")}
    return denoiser.build(model, soft_mask, **sizes, mesh=mesh)


DREAM = Published("dream", DreamConfig.from_hf, dream_config.KNOWN, "max_position_embeddings")
LLADA = Published("llada", llada_config.from_hf, llada_config.KNOWN, "max_sequence_length")


def _on_base(published: Published, **traits: bool) -> Callable[..., Denoiser]:
    def build(model: Model, soft_mask: SoftMask, about: Mapping, *, mesh=None) -> Denoiser:
        hf_config = about["hf_config"]
        return dream_denoiser.build(model, soft_mask, hf_config, mesh=mesh, network=published.network, **traits)

    return build


def _objective(loss: str) -> Callable[[Config], Objective]:
    """The objective that a config names, by default `loss`."""
    chats, texts = {"dream": DreamLoss, "llada": LLaDALoss}, {"nelbo": Nelbo, "llada": LLaDATextLoss}

    def make(config: Config) -> Objective:
        name = config.objective.loss or loss
        losses = chats if config.data.source == "chat" or name not in texts else texts
        return losses[name].from_config(config)

    return make


FAMILIES = {
    "dit": Family(KINDS["dit"], _dit, _objective("nelbo"), dit.KEYS),
    "dream": Family(
        KINDS["dream"], _on_base(DREAM), _objective("dream"), dream.KEYS, DREAM,
        padding="left", default_alg="entropy", fixed_length=False, shifted=True,
    ),
    "llada": Family(
        KINDS["llada"], _on_base(LLADA, shifted=False, moved=False), _objective("llada"), llada.KEYS, LLADA,
        padding="left", default_alg="low_confidence", fixed_length=False,
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
