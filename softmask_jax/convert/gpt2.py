"""Reads Hugging Face's GPT-2 checkpoints: safetensors, one file or several with an index, straight into our tree.

Letters: D width, V vocabulary, F MLP width, P positions.
"""
import hashlib
import json
import logging
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from softmask_jax.convert.key_tables import Entry, match
from softmask_jax.convert.safe_files import read_json
from softmask_jax.convert.safetensors_files import INDEX, SINGLE, SafetensorsFolder
from softmask_jax.convert.tensors import Hashed, Renamed, Tensors, in_threads
from softmask_jax.convert.wrappers import own_keys, without_wrappers
from softmask_jax.models.nn.gpt2 import GPT2Config, shapes

log = logging.getLogger("softmask_jax")

PREFIX, HEAD = "transformer.", "lm_head.weight"
OWN_KEYS = own_keys(r"(?:transformer\.)?(?:wte|wpe|h|ln_f)", "lm_head")
# The causal mask and what stands for minus infinity, which older files hold.
BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
BLOCK = "h.{i}."
# Our name of each layer, PyTorch's, and its shape [in, out]: GPT-2's kernels lie as ours do.
LINEAR = {
    "qkv": ("attn.c_attn", ("D", "3D")),
    "attn_out": ("attn.c_proj", ("D", "D")),
    "mlp_in": ("mlp.c_fc", ("D", "F")),
    "mlp_out": ("mlp.c_proj", ("F", "D")),
}


def _norm(ours: str, theirs: str) -> tuple[Entry, ...]:
    return (
        Entry(f"{ours}/scale", f"{theirs}.weight", "none", ("D",)), Entry(f"{ours}/bias", f"{theirs}.bias", "none", ("D",)),
    )  # fmt: skip


BACKBONE = (
    Entry("embed/table", "wte.weight", "vocabulary", ("V", "D")),
    Entry("positions/table", "wpe.weight", "none", ("P", "D")),
    *_norm("layers/attn_norm", f"{BLOCK}ln_1"),
    *_norm("layers/mlp_norm", f"{BLOCK}ln_2"),
    *(Entry(f"layers/{o}/kernel", f"{BLOCK}{t}.weight", "none", s) for o, (t, s) in LINEAR.items()),
    *(Entry(f"layers/{o}/bias", f"{BLOCK}{t}.bias", "none", s[1:]) for o, (t, s) in LINEAR.items()),
    *_norm("final_norm", "ln_f"),
)
UNTIED = Entry("head/weight", HEAD, "vocabulary", ("V", "D"))


class Checkpoint:
    """The weights in a folder, named as `GPT2Model` does, and their config.

    Raises:
      FileNotFoundError: no config.json, no safetensors. ValueError: no GPT-2; every key that is missing, unexpected, twice
      there (with and without `transformer.`), misshapen or of no floating-point type is named.
    """

    def __init__(self, folder: Path, compute_dtype: str = "float32"):
        self.folder = folder
        try:
            about = read_json(folder, "config.json")
            self.config = GPT2Config.from_hf(about, compute_dtype=compute_dtype)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}" if str(folder) not in str(error) else str(error)) from None
        if not ((folder / SINGLE).exists() or (folder / INDEX).exists()):
            raise FileNotFoundError(f"{folder} has no {SINGLE}, nor several and their {INDEX}.")
        files = SafetensorsFolder(folder)
        names, note = without_wrappers(files.specs, OWN_KEYS, str(folder))
        if note:
            log.warning(note)
        self._files = _without_prefix(Renamed(files, names), folder)
        found = {key: spec for key, spec in self._files.specs.items() if not BUFFERS.fullmatch(key)}
        self._copied_head = self.config.tied and HEAD in found
        if self._copied_head:
            del found[HEAD]
        config = self.config
        sizes = {"V": config.vocab_size, "D": config.hidden_size, "F": config.mlp_width, "P": config.max_positions}
        table = BACKBONE if config.tied else (*BACKBONE, UNTIED)
        self._table = match(table, found, config.num_layers, f"a GPT-2 ({folder})", sizes)

    def read(self) -> tuple[dict, str]:
        """The tree of `models.gpt2.shapes`, as numpy arrays, and a hash of config and weights.

        The hash is the same however the weights are named and cut into files. ValueError for a head that should be the
        embedding and is another matrix.
        """
        self._check_head()
        tree = jax.tree.map(lambda leaf: np.zeros(leaf.shape, jnp.dtype(leaf.dtype)), shapes(self.config))
        hashed = Hashed(self._files)

        def fill(key: str) -> None:
            entry, number = self._table[key]
            target = tree
            for name in entry.path.split("/"):
                target = target[name]
            target, start = target[number] if entry.stacked else target, 0
            for piece in hashed.pieces(key):
                target[start : start + len(piece)] = piece
                start += len(piece)

        in_threads(fill, self._table)
        content = [vars(self.config) | {"compute_dtype": ""}, hashed.sha256]
        return tree, hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _check_head(self) -> None:
        if not self._copied_head:
            return
        specs = self._files.specs
        pairs = zip(self._files.pieces(HEAD), self._files.pieces("wte.weight"), strict=True)
        if specs[HEAD] != specs["wte.weight"] or any(own.tobytes() != table.tobytes() for own, table in pairs):
            raise ValueError(
                f"{self.folder}: {HEAD} is not wte.weight, though config.json ties them; set tie_word_embeddings to false "
                "there, or give the model's own files."
            )


def _without_prefix(files: Tensors, folder: Path) -> Tensors:
    names: dict[str, str] = {}
    for key in files.specs:
        if (short := key.removeprefix(PREFIX)) in names:
            raise ValueError(f"{folder} has {short} twice, with and without '{PREFIX}'; download it again.")
        names[short] = key
    return Renamed(files, names)
