"""Scorer of texts: GPT-2, or another causal model of its family, from a Hugging Face folder.

One pass gives -log p of each token given those before it, for generative perplexity, and the last token's state after
the final norm, MAUVE's feature (`mauve-text` 0.4 takes `hidden_states[-1]` there)."""
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert import hub
from softmask_jax.convert.gpt2 import Checkpoint
from softmask_jax.data.tokenizers import END_OF_TEXT, Tokenizer, open_tokenizer
from softmask_jax.diffusion.vocab.head import Head, VocabSharding, cross_entropy
from softmask_jax.distributed import sharding
from softmask_jax.io.paths import to_path
from softmask_jax.models.nn import gpt2

SETTING = "config.generative.scorer"
DOWNLOAD = ("download openai-community/gpt2-large (config.json, model.safetensors, and tokenizer.json or vocab.json + "
            f"merges.txt) into a folder and name it in {SETTING}, or give {SETTING}=hf://openai-community/gpt2-large")


def _folder(spec: str) -> Path:
    if not spec:
        raise ValueError(f"Generative perplexity needs a scorer: {DOWNLOAD}.")
    if spec.startswith(hub.PREFIX):
        try:
            return hub.download(spec)
        except (ValueError, OSError) as error:
            raise type(error)(str(error).replace("--src", SETTING)) from error
    folder = to_path(spec)
    if not folder.is_dir():
        raise FileNotFoundError(f"{SETTING}: there is no folder '{spec}'; {DOWNLOAD}.")
    return folder


def open_files(spec: str, compute_dtype: str = "float32") -> tuple[Checkpoint, Tokenizer]:
    """Checkpoint (weights unread) and tokenizer of config.generative.scorer, a folder or hf://owner/name. ValueError or
    OSError for missing or unsuitable files."""
    folder = _folder(spec)
    try:
        checkpoint, tokenizer = Checkpoint(folder, compute_dtype), open_tokenizer(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{SETTING}: {str(error).rstrip('.')}; {DOWNLOAD}.") from error
    except ValueError as error:
        raise ValueError(f"{SETTING}: {error}") from error
    # A mask added to the vocabulary occurs in no text.
    largest = tokenizer.vocab_size - 1 - (tokenizer.mask_token_id == tokenizer.vocab_size - 1)
    if max(largest, tokenizer.eos_id) >= checkpoint.config.vocab_size:
        raise ValueError(f"{SETTING}: the tokenizer in {folder} has ids up to {largest}, the network only "
                         f"{checkpoint.config.vocab_size} of them; give files of one model.")
    return checkpoint, tokenizer


class Scorer:
    """GPT-2 on a mesh, rows cut over it. fingerprint: a hash of weights, config, tokenizer and compute dtype."""

    def __init__(self, spec: str, mesh: jax.sharding.Mesh, compute_dtype: str = "float32"):
        checkpoint, self.tokenizer = open_files(spec, compute_dtype)
        params, weights = checkpoint.read()
        self.config, self.mesh = checkpoint.config, mesh
        self.fingerprint = f"{weights}-{self.tokenizer.fingerprint()}-{compute_dtype}"
        # Replicated: the largest GPT-2 has 6 GB in float32.
        self._params = jax.device_put(params, sharding.replicated(mesh))
        self._run = compiled(self.config, mesh)

    def retokenized(self, texts: Sequence[str], max_length: int) -> list[np.ndarray]:
        """First `max_length` tokens of each text, int32 [n]; an EOS for `<|endoftext|>`, as in the reference."""
        parts = [text.split(END_OF_TEXT) for text in texts]
        ids = iter(self.tokenizer.encode_batch([part for pieces in parts for part in pieces]))
        end, rows = np.array([self.tokenizer.eos_id], np.int32), []
        for pieces in parts:
            joined = [array for _ in pieces for array in (end, next(ids))][1:]
            rows.append(np.concatenate(joined).astype(np.int32)[:max_length])
        return rows

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Right-padded tokens [B L], lengths [B] -> (-log p of each next token [B L - 1], nats; state of the last token
        [B D]), float32. Values behind a row's length are arbitrary."""
        layout = sharding.batch_sharding(self.mesh)
        batch = (jax.device_put(np.asarray(x, np.int32), layout) for x in (tokens, lengths))
        nll, features = self._run(self._params, *batch)
        return np.asarray(nll), np.asarray(features)


@functools.lru_cache(maxsize=4)
def compiled(config: gpt2.GPT2Config, mesh: jax.sharding.Mesh):
    """(params, tokens [B L], lengths [B]) -> `Scorer.__call__`'s result; programs outlive a scorer's weights."""
    over = mesh.size > 1

    def score(params: dict, tokens: jax.Array, lengths: jax.Array):
        hidden = gpt2.hidden(config, params, tokens, sharding.rows_over(mesh) if over else lambda x: x)
        head = Head(gpt2.head(params), None, config.vocab_size, -1, False, VocabSharding(mesh) if over else None)
        nll = cross_entropy(hidden[:, :-1], head, tokens[:, 1:], train_head=False)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], 1)[:, 0]
        return nll, last.astype(jnp.float32)

    # Replicated: every host reads all results.
    return jax.jit(score, out_shardings=sharding.replicated(mesh))
