"""`softmask_jax.load(path)`: a trained model for notebooks and scripts."""
import dataclasses
import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.config.jax_settings import settled
from softmask_jax.convert import converted
from softmask_jax.convert.safe_files import read_json
from softmask_jax.data import Tokenizer, load_tokenizer
from softmask_jax.diffusion import two_pass
from softmask_jax.diffusion.nelbo import Nelbo
from softmask_jax.diffusion.noise import Stream, row_keys, stream_key
from softmask_jax.distributed import sharding
from softmask_jax.generate import dream_model
from softmask_jax.generate.dream_model import DreamModel
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.models import denoiser as denoisers
from softmask_jax.samplers import Generated, MDLMSampler, Options, SoftMask, fill, recorded_gumbel
from softmask_jax.samplers.options import run


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """Parameters {"backbone", "soft_mask"} with what is needed to use them; methods are compiled on first use.

    row_shards: into how many pieces a mesh cuts a batch's rows.
    """

    config: config_schema.Config
    tokenizer: Tokenizer
    denoiser: denoisers.Denoiser
    params: dict
    step: int
    row_shards: int = 1

    # Rows of a batch are padded behind their text.
    padding = "right"
    default_alg = "mdlm"

    @property
    def mask_token_id(self) -> int:
        return self.denoiser.mask_token_id

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """What ends a text."""
        return (self.tokenizer.eos_id,)

    @property
    def max_length(self) -> int:
        """The most positions that a row can have: as many as in training."""
        return self.config.data.seq_len

    @property
    def soft_mask(self) -> SoftMask:
        """As it was trained."""
        return SoftMask.from_config(self.config.soft_mask)

    @property
    def objective(self) -> Nelbo:
        """As it was trained."""
        return Nelbo.from_config(self.config)

    @settled()
    def logits(self, tokens, attention_mask=None) -> jax.Array:
        """Plain forward pass: tokens [B L] -> logits [B L V] float32, the mask's column included.

        attention_mask: [B L], nonzero where a token is real; padding is not attended to. The one place where
        B x L x V is formed: meant for looking at a few sequences.
        """
        tokens = self._checked(tokens)
        segments = None if attention_mask is None else jnp.asarray(attention_mask, jnp.int32).clip(0, 1)
        if segments is not None and segments.shape != tokens.shape:
            raise ValueError(f"attention_mask must have the shape of tokens {tokens.shape}, not {segments.shape}.")
        return self._logits(self.params, tokens, segments)

    @settled()
    def nelbo(self, tokens, key: jax.Array, *, two_pass: bool = True, draws: int = 1) -> jax.Array:
        """Upper bound on -log p per token: tokens [B L] -> [B] float32, nats.

        two_pass: with soft-masking's feedback (a binary model has one pass in any case). draws: masks averaged over for
        each row, their t stratified; an unbiased estimate for every row.
        """
        return self._nelbo(self.params, self._checked(tokens), key, two_pass, draws)

    @settled()
    def generate(
        self, tokens=None, *, key: jax.Array, count: int = 1, length: int | None = None, steps: int | None = None,
        draws: np.ndarray | None = None, trace: bool = False, **options,
    ) -> Generated:  # fmt: skip
        """Fill masks, by MDLM's sampler with soft-masking unless `alg` names another.

        Args:
          tokens: [B L] ids with `mask_token_id` where text is wanted; or None for `count` rows of `length` (the training
            length) masks.
          steps: see `samplers.Options`; of mdlm and remdm, 128 by default, network calls at most beside a last arg-max pass.
          draws: [steps B L V] recorded uniforms, to replay MDLM's random choices of a reference; otherwise `key` decides.
          trace: keep every step, for `viewer`.
          options: fields of `samplers.Options`: alg, nucleus_p, eta, soft_mask, forbidden, ...

        Returns:
          Generated: tokens [B L] and what they cost; `decode` turns them into text.
        """
        if tokens is None:
            tokens = np.full((count, self.max_length if length is None else length), self.denoiser.mask_token_id, np.int32)
        tokens, options = self._checked(tokens), Options(steps=steps, **options)
        keys = row_keys(stream_key(key, Stream.SAMPLE, 0), jnp.arange(len(tokens)))
        if draws is None:
            return self.fill(tokens, keys=keys, options=options, trace=trace)
        sampler = options.sampler(self.denoiser, self.soft_mask, self.end_token_ids, new_tokens=tokens.shape[1],
                                  alg=self.default_alg, trace=trace)
        if not isinstance(sampler, MDLMSampler):
            raise ValueError(f"Recorded draws are for mdlm and remdm, not {options.alg}.")
        return run(sampler, self.params, keys, tokens, None, jnp.asarray(recorded_gumbel(draws), jnp.float32))

    fill = fill

    def decode(self, tokens) -> list[str]:
        """[B L] ids -> B strings; masks stay visible."""
        return [self.tokenizer.decode(row) for row in np.asarray(tokens)]

    def _checked(self, tokens) -> jax.Array:
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers [B L], not {tokens.dtype} {tokens.shape}.")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.denoiser.vocab_size:
            raise ValueError(f"tokens must lie in 0..{self.denoiser.vocab_size - 1}; found {tokens.min()}..{tokens.max()}.")
        return jnp.asarray(tokens, jnp.int32)

    @functools.cached_property
    def _logits(self):
        def logits(params, tokens, segment_ids):
            backbone = params["backbone"]
            head = self.denoiser.head(backbone)
            x = self.denoiser.embed(backbone, tokens)
            hidden, _ = self.denoiser.trunk(backbone, x, segment_ids=segment_ids)
            z = jnp.matmul(hidden, head.weight.T.astype(hidden.dtype), preferred_element_type=jnp.float32)
            return (z if head.bias is None else z + head.bias)[..., : head.vocab_size]

        return jax.jit(logits)

    @functools.cached_property
    def _nelbo(self):
        def nelbo(params, tokens, key, soft, draws):
            rows, soft_mask = len(tokens), self.objective.soft_mask if soft else SoftMask()

            def draw(total, i):
                noisy = self.objective.draw(
                    tokens, jnp.arange(rows) * draws + i, draws, key, 0, mask_token_id=self.denoiser.mask_token_id
                )
                loss = two_pass.row_scores(self.denoiser, soft_mask, params, noisy).loss
                return total + loss["two_pass" if soft_mask.on else "one_pass"] / draws, None

            return jax.lax.scan(draw, jnp.zeros(rows), jnp.arange(draws))[0]

        return jax.jit(nelbo, static_argnums=(3, 4))


@settled()
def load(
    path: str | os.PathLike, *, weights: str = "ema", step: int | None = None, base: str = "",
    mesh: jax.sharding.Mesh | None = None,
) -> LanguageModel | DreamModel:
    """A model from a run's folder, or from one that `softmask_jax.convert` wrote.

    Args:
      base: of a converted adapter, the converted model that it was trained on; of a run, where its base is now.
      weights: "ema" (what is evaluated) or "raw"; a converted model has one set of weights, chosen when it was made.
      step: which checkpoint; the newest whole one by default.
      mesh: lay parameters and rows out on it, see `sharding.make_mesh`; one device by default.

    Raises:
      FileNotFoundError: no run, or no such checkpoint. ValueError: unknown `weights`, or a checkpoint of another model.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is '{weights}'; choose ema or raw.")
    path = Path(os.path.expanduser(path))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"No run in '{path}' (it has no config.json); give the --workdir of a training run.")
    about = read_json(path, "config.json")
    if about.get("kind") in ("dream", "adapter") or about.get("model", {}).get("kind") == "dream":
        return dream_model.load(path, base=base, weights=weights, step=step, mesh=mesh)
    if converted.is_converted(path):
        config, tokenizer, step = converted.read(path)
        denoiser = _denoiser(config, tokenizer, mesh)
        params = converted.read_params(path, denoisers.abstract(denoiser, mesh))
        return LanguageModel(config, tokenizer, denoiser, params, step, sharding.row_shards(mesh))
    with RunFolder(path, lock=False) as folder:
        config = config_schema.of_run(folder.read_config())
    tokenizer = load_tokenizer(path / "tokenizer")
    denoiser = _denoiser(config, tokenizer, mesh)
    shapes = denoisers.abstract(denoiser, mesh)
    wanted = {"params": shapes} | ({"ema": shapes["backbone"]} if weights == "ema" else {})
    with Checkpoints(path / "checkpoints") as checkpoints:
        step, trees = checkpoints.restore_params(step, items=tuple(wanted), abstract=wanted)
    params = trees["params"]
    if weights == "ema":
        params = {"backbone": trees["ema"], "soft_mask": params["soft_mask"]}
    return LanguageModel(config, tokenizer, denoiser, params, step, sharding.row_shards(mesh))


def _denoiser(config: config_schema.Config, tokenizer: Tokenizer, mesh) -> denoisers.Denoiser:
    return denoisers.build(
        config.model, config.soft_mask, vocab_size=tokenizer.vocab_size, mask_token_id=tokenizer.mask_token_id, mesh=mesh
    )
