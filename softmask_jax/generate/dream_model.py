"""A Dream model for notebooks and scripts: converted, fine-tuned here, or a base with a converted adapter."""
import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.config.jax_settings import settled
from softmask_jax.convert import adapters, converted
from softmask_jax.convert.orbax_files import stored_specs
from softmask_jax.convert.safe_files import read_json
from softmask_jax.data import Tokenizer, open_tokenizer
from softmask_jax.data.chat.conversations import NoConversation, read_messages
from softmask_jax.data.chat.template import ChatTemplate, TemplateError, load_template
from softmask_jax.data.tokenizers.files import holds_tokenizer
from softmask_jax.diffusion import soft_masking
from softmask_jax.distributed import sharding
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.models import denoiser as denoisers, dream_denoiser
from softmask_jax.models.denoiser import Denoiser
from softmask_jax.models.nn import dream
from softmask_jax.models.nn.dream_config import special_ids
from softmask_jax.samplers import Draws, Generated, SoftMask, fill
from softmask_jax.samplers.dream_generate import diffusion_generate
from softmask_jax.training.train_state import whole

# Prompts of many lengths share few compiled samplers.
PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True, eq=False)
class DreamModel:
    """Parameters {"backbone", "soft_mask"} with what is needed to use them; methods are compiled on first use.

    soft_mask: what the model was trained with, used by `generate` unless it is told otherwise. tokenizer, template:
    None where none came along. end_token_ids: what ends a text. max_length: the most positions that a row can have.
    row_shards: into how many pieces a mesh cuts a batch's rows.
    """

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    denoiser: Denoiser
    params: dict
    soft_mask: SoftMask
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    max_length: int
    step: int
    row_shards: int = 1

    # Rows of a batch are padded before their text.
    padding = "left"
    default_alg = "entropy"

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    fill = fill

    @settled()
    def logits(self, tokens, attention_mask=None, *, shifted: bool = False) -> jax.Array:
        """tokens [B L] -> logits [B L V] float32, for a few sequences: the one place where B x L x V is formed.

        attention_mask: [B L], nonzero where a token is real. shifted: False is what the PyTorch model returns, the
        prediction for i at i - 1; True moves it to i, as objectives and samplers see it.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        mask = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32)
        if tokens.ndim != 2 or (mask is not None and mask.shape != tokens.shape):
            given = None if mask is None else mask.shape
            raise ValueError(f"tokens must be [B L] and attention_mask alike, not {tokens.shape} and {given}.")
        return (self._logits if shifted else self._unshifted)(self.params, tokens, mask)

    def generate(
        self, prompts, *, key: jax.Array | None = None, max_new_tokens: int = 256, steps: int | None = None,
        soft_mask: SoftMask | Mapping | None = None, draws: Draws | None = None, **options,
    ) -> Generated:  # fmt: skip
        """Answer prompts by Dream's `diffusion_generate`; see `samplers.dream_generate`.

        Args:
          prompts: token ids of any lengths, or chats: lists of {"role", "content"}, rendered by the model's template.
          key: for whatever is drawn; None if nothing is.
          steps: `max_new_tokens` by default.
          soft_mask: settings, or a mapping with the keys of `transparency_config.json`; None is the model's own.
          options: attention_mask, and fields of `DreamSampler`, whose defaults are the reference's: alg "origin", top_k 50.

        Returns:
          Generated: tokens [B P + max_new_tokens], history [steps B L], calls.
        """
        if len(prompts) and isinstance(prompts[0], (list, tuple)) and prompts[0] and isinstance(prompts[0][0], Mapping):
            prompts = [self.encode_chat(chat) for chat in prompts]
        if "attention_mask" not in options:
            options |= {"pad_multiple": PROMPT_MULTIPLE}
        return diffusion_generate(
            self.denoiser, self.params, prompts, key, max_new_tokens=max_new_tokens, max_length=self.max_length,
            steps=max_new_tokens if steps is None else steps, pad_token_id=self.pad_token_id, draws=draws,
            soft_mask=self.soft_mask if soft_mask is None else soft_mask, **options,
        )  # fmt: skip

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
        """The prompt [P] of a chat (see `data.conversations`), generation prompt included.

        Raises ValueError for a model without a tokenizer and for messages that are none.
        """
        self._needs_tokenizer()
        try:
            return self.template.encode_prompt(self.tokenizer, read_messages(messages))
        except (NoConversation, TemplateError) as error:
            raise ValueError(f"The chat {error}.") from error

    def decode(self, tokens, *, new_tokens: int | None = None) -> list[str]:
        """[B L] ids -> B strings, without padding; masks stay visible.

        new_tokens: decode the answers alone, the last positions of each row, up to the first token that ends a text.

        Raises ValueError for a model without a tokenizer.
        """
        self._needs_tokenizer()
        found = []
        for row in np.asarray(tokens):
            row, stops = (row, self.pad_token_id) if new_tokens is None else (row[-new_tokens:], self.end_token_ids)
            if new_tokens is None:
                row = row[np.argmax(row != self.pad_token_id) :]
            ends = np.flatnonzero(np.isin(row, stops))
            found.append(self.tokenizer.decode(row[: ends[0]] if len(ends) else row))
        return found

    def _needs_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise ValueError("This model has no tokenizer; convert it again with its tokenizer files beside it.")

    def _project(self, params, hidden) -> jax.Array:
        head = self.denoiser.head(params["backbone"])
        z = jnp.matmul(hidden, head.weight.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
        return z[..., : head.vocab_size]

    def _hidden(self, params, tokens, mask):
        layout = {}
        if mask is not None:
            positions, segments = dream.padded_inputs(mask)
            layout = {"positions": positions, "segment_ids": segments}
        return self.denoiser.trunk(params["backbone"], self.denoiser.embed(params["backbone"], tokens), **layout)[0]

    @functools.cached_property
    def _logits(self):
        return jax.jit(lambda params, tokens, mask: self._project(params, self._hidden(params, tokens, mask)))

    @functools.cached_property
    def _unshifted(self):
        def run(params, tokens, mask):
            # One pad behind each row takes the place that the shift would push out.
            more = jnp.pad(tokens, ((0, 0), (0, 1)), constant_values=self.pad_token_id)
            real = jnp.ones_like(tokens) if mask is None else mask
            hidden = self._hidden(params, more, jnp.pad(real, ((0, 0), (0, 1))))
            return self._project(params, hidden[:, 1:])

        return jax.jit(run)


def load(path: Path, *, base: str = "", weights: str = "ema", step: int | None = None, mesh=None) -> DreamModel:
    """A Dream from a converted folder, a converted adapter with its `base`, or a fine-tuning run.

    Raises:
      FileNotFoundError, ValueError: nothing of the kind, or an adapter without its base; one line that says what to do.
    """
    if not converted.is_converted(path):
        return _of_run(path, base, weights, step, mesh)
    about = converted.read_ours(path)
    if about["kind"] == "dream":
        return _of_base(path, about, config_schema.Model(kind="dream", base=str(path), param_dtype=_dtype(path)), mesh)
    if not base:
        raise ValueError(f"{path} is an adapter; give the converted model that it was trained on: load(path, base=...).")
    adapter = adapters.read_config(about["hf_config"])
    model = config_schema.Model(
        kind="dream", base=base, param_dtype=_dtype(Path(base)), adapter="dora" if adapter.use_dora else "lora",
        adapter_rank=adapter.rank, adapter_alpha=float(adapter.scaling * adapter.rank),
        adapter_targets=f"^({'|'.join(adapter.targets)})$",
    )  # fmt: skip
    return _of_base(Path(base), converted.read_ours(Path(base)), model, mesh, path, about)


def _dtype(base: Path) -> str:
    """Of a converted Dream's parameters."""
    return stored_specs(base / "params")["backbone/final_norm/scale"].dtype.name


def _of_base(base: Path, about: dict, model, mesh, adapter: Path | None = None, more: dict | None = None) -> DreamModel:
    described = more or about
    denoiser = dream_denoiser.build(_as_it_is(model, about), config_schema.SoftMask(), about["hf_config"], mesh=mesh)
    shapes = denoisers.abstract(denoiser, mesh)["backbone"]
    own = shapes.pop("adapter", None)
    found, scalars = converted.read_dream(base, {"backbone": shapes})
    backbone = found["backbone"]
    if adapter is not None:
        found, scalars = converted.read_dream(adapter, {"adapter": own})
        backbone = backbone | found
    settings = SoftMask()
    if soft := described.get("soft_mask"):
        settings = SoftMask(soft["variant"], soft["k"], soft["schedule"])
    params = {"backbone": backbone, "soft_mask": scalars or soft_masking.init_scalars()}
    step = described.get("step") or 0
    return _assembled(base / "tokenizer", denoiser, params, settings, about["hf_config"], step, mesh)


def _of_run(path: Path, base: str, weights: str, step: int | None, mesh) -> DreamModel:
    config = config_schema.of_run(read_json(path, "config.json"))
    folder = Path(os.path.expanduser(base or config.model.base))
    about = converted.read_ours(folder)
    denoiser = dream_denoiser.build(_as_it_is(config.model, about), config.soft_mask, about["hf_config"], mesh=mesh)
    shapes = denoisers.abstract(denoiser, mesh)
    frozen = {name: shapes["backbone"][name] for name in denoiser.frozen}
    trained = {name: entry for name, entry in shapes["backbone"].items() if name not in denoiser.frozen}
    wanted = {"params": {"backbone": trained, "soft_mask": shapes["soft_mask"]}}
    wanted |= {"ema": trained} if weights == "ema" else {}
    with Checkpoints(path / "checkpoints") as checkpoints:
        # What was trained without an adapter is float32 there, and is used in config.model.param_dtype.
        step, trees = checkpoints.restore_params(step, items=tuple(wanted), abstract=wanted, narrow=True)
    params = trees["params"]
    if weights == "ema":
        params = {"backbone": trees["ema"], "soft_mask": params["soft_mask"]}
    params = whole(params, converted.read_dream(folder, {"backbone": frozen})[0]["backbone"] if frozen else {})
    soft = config.soft_mask
    settings = SoftMask() if soft.variant == "none" else SoftMask.from_config(soft)
    return _assembled(path / "tokenizer", denoiser, params, settings, about["hf_config"], step, mesh)


def _as_it_is(model, about: Mapping):
    """A float32 base is used in float32, bfloat16 is what it is; its kernels may be int8, whatever a run trained on."""
    return dataclasses.replace(model, compute_dtype=model.param_dtype, base_dtype=converted.base_dtype(about))


def _assembled(tokens: Path, denoiser, params, settings, hf_config: Mapping, step: int, mesh) -> DreamModel:
    tokenizer = template = None
    if holds_tokenizer(tokens):
        tokenizer, template = open_tokenizer(tokens), load_template(tokens)
    _, ends, pad = special_ids(hf_config)
    if pad is None:
        raise ValueError("config.json has neither pad_token_id nor eos_token_id; one of them must be set.")
    # A chat's answers end with the template's token, and the rest is padding.
    turn = None if tokenizer is None else tokenizer.special_tokens.get("<|im_end|>")
    ends = tuple(dict.fromkeys(token for token in (*ends, pad, turn) if token is not None))
    length = int(hf_config.get("max_position_embeddings") or 2048)
    shards = sharding.row_shards(mesh)
    return DreamModel(tokenizer, template, denoiser, params, settings, pad, ends, length, step, shards)
