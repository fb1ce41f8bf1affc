"""Hugging Face's GPT-2 (safetensors) read into our tree. D: width, V: vocabulary, F: MLP width, P: positions."""
import functools
import hashlib
import json
import logging
import operator
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert.key_tables import match
from softmask_jax.convert.safe_files import read_json
from softmask_jax.convert.safetensors_files import INDEX, SINGLE, SafetensorsFolder
from softmask_jax.convert.tensors import Hashed, in_threads, renamed
from softmask_jax.convert.wrappers import old_keys, own_keys, without_wrappers
from softmask_jax.models.keys import Entry, linear
from softmask_jax.models.nn.gpt2 import GPT2Config, shapes

log = logging.getLogger("softmask_jax")

PREFIX, HEAD = "transformer.", "lm_head.weight"
OWN_KEYS = own_keys(r"(?:transformer\.)?(?:wte|wpe|h|ln_f)", "lm_head")
# Of older files: the causal mask and its minus infinity.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
BLOCK = "h.{i}."


def _norm(path: str, key: str) -> tuple[Entry, ...]:
    names = {"scale": "weight", "bias": "bias"}
    return tuple(Entry(f"{path}/{ours}", f"{key}.{theirs}", "none", ("D",)) for ours, theirs in names.items())


# GPT-2's kernels are [in, out], as ours are.
BACKBONE = (
    Entry("embed/table", "wte.weight", "vocabulary", ("V", "D")),
    Entry("positions/table", "wpe.weight", "none", ("P", "D")),
    *_norm("layers/attn_norm", f"{BLOCK}ln_1"),
    *_norm("layers/mlp_norm", f"{BLOCK}ln_2"),
    *linear("layers/qkv", f"{BLOCK}attn.c_attn", ("D", "3D"), "none"),
    *linear("layers/attn_out", f"{BLOCK}attn.c_proj", ("D", "D"), "none"),
    *linear("layers/mlp_in", f"{BLOCK}mlp.c_fc", ("D", "F"), "none"),
    *linear("layers/mlp_out", f"{BLOCK}mlp.c_proj", ("F", "D"), "none"),
    *_norm("final_norm", "ln_f"),
)
UNTIED = Entry("head/weight", HEAD, "vocabulary", ("V", "D"))


class Checkpoint:
    """Weights in a folder and their config. FileNotFoundError without either, ValueError for another model."""

    def __init__(self, folder: Path, compute_dtype: str = "float32"):
        self.folder = folder
        try:
            self.config = config = GPT2Config.from_hf(read_json(folder, "config.json"), compute_dtype=compute_dtype)
        except ValueError as error:
            raise ValueError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
        if not ((folder / SINGLE).exists() or (folder / INDEX).exists()):
            raise FileNotFoundError(f"{folder} has no {SINGLE}, nor several and their {INDEX}.")
        files = SafetensorsFolder(folder)
        names, note = without_wrappers(files.specs, OWN_KEYS, str(folder))
        if note:
            log.warning(note)
        pairs = ((new.removeprefix(PREFIX), old) for new, old in names.items())
        self._files = renamed(files, old_keys(pairs, str(folder)))
        specs = {key: spec for key, spec in self._files.specs.items() if not BUFFERS.fullmatch(key)}
        self._copied_head = config.tied and specs.pop(HEAD, None) is not None
        sizes = {"V": config.vocab_size, "D": config.hidden_size, "F": config.mlp_width, "P": config.max_positions}
        table = BACKBONE if config.tied else (*BACKBONE, UNTIED)
        self._table = match(table, specs, config.num_layers, f"a GPT-2 ({folder})", sizes)

    def read(self) -> tuple[dict, str]:
        """Tree of `models.nn.gpt2.shapes`; hash of config and weights. ValueError for a tied head that differs."""
        if self._copied_head:
            self._check_copied_head()
        tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.dtype(leaf.dtype)), shapes(self.config))
        hashed = Hashed(self._files)

        def fill(key: str) -> None:
            entry, number = self._table[key]
            target = functools.reduce(operator.getitem, entry.path.split("/"), tree)
            target, start = target[number] if entry.stacked else target, 0
            for piece in hashed.pieces(key):
                target[start : start + len(piece)] = piece
                start += len(piece)

        in_threads(fill, self._table)
        content = [vars(self.config) | {"compute_dtype": ""}, hashed.sha256]
        return tree, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check_copied_head(self) -> None:
        specs = self._files.specs
        pairs = zip(self._files.pieces(HEAD), self._files.pieces("wte.weight"), strict=True)
        if specs[HEAD] != specs["wte.weight"] or any(head.tobytes() != table.tobytes() for head, table in pairs):
            remedy = "set tie_word_embeddings to false there, or give the model's own files"
            raise ValueError(f"{self.folder}: {HEAD} is not wte.weight, though config.json ties them; {remedy}.")
