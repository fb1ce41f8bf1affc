"""Reading converted models: tokenizer and parameters."""
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from softmask_jax import config as config_schema
from softmask_jax.convert.model import FORMAT
from softmask_jax.convert.safe_files import read_json
from softmask_jax.convert.sources import ADAPTER_CONFIG, open_model, read_ours
from softmask_jax.data import Tokenizer, open_tokenizer
from softmask_jax.data.tokenizers.base import hash_of
from softmask_jax.data.tokenizers.files import holds_tokenizer
from softmask_jax.diffusion import soft_masking
from softmask_jax.io import tree_files


class Ids(Tokenizer):
    """Tokenizer of a model converted without one: `decode` writes ids as numbers. Unknown BOS and EOS are -1."""

    kind = "ids"

    def __init__(self, vocab_size: int, mask_token_id: int, bos_id: int | None = None, eos_id: int | None = None):
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.bos_id, self.eos_id = (-1 if id_ is None else id_ for id_ in (bos_id, eos_id))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        raise ValueError("This model was converted without a tokenizer; convert again with --tokenizer=NAME_OR_FOLDER.")

    def _decode_run(self, run: np.ndarray, follows_mask: bool) -> str:
        return "".join(f" {id_} " for id_ in run.tolist())

    def fingerprint(self) -> str:
        return hash_of("ids", self.vocab_size, self.mask_token_id, self.bos_id, self.eos_id)


def is_converted(path: Path) -> bool:
    """Whether a folder's config.json is that of a converted model. ValueError if it is no JSON."""
    return (path / "config.json").is_file() and read_json(path, "config.json").get("format") == FORMAT


def about(path: Path) -> dict:
    """config.json of a run or converted model; of PEFT's adapter what ours would have there."""
    if (path / ADAPTER_CONFIG).is_file():
        return open_model(path).manifest
    return read_json(path, "config.json")


def read_tokenizer(path: Path) -> Tokenizer:
    """Tokenizer of a converted MDLM. ValueError for another kind of model or tokenizer."""
    about = read_ours(path)
    if "config" not in about:
        raise ValueError(f"{path} is a converted {about['kind']} model; load takes a run or a converted MDLM.")
    size, mask, folder = about["vocab_size"], about["mask_token_id"], path / "tokenizer"
    if not holds_tokenizer(folder):
        return Ids(size, mask, about["bos_id"], about["eos_id"])
    tokenizer = open_tokenizer(folder)
    if (tokenizer.vocab_size, tokenizer.mask_token_id) != (size, mask):
        sizes = f"{tokenizer.vocab_size} tokens, its mask is {tokenizer.mask_token_id}; the model has {size} and {mask}"
        raise ValueError(f"{folder} has {sizes}. Convert again with the model's own --tokenizer.")
    return tokenizer


def read_params(path: Path, abstract: dict) -> dict:
    """Trees of a converted model, like `abstract`. ValueError for another model's, RuntimeError for damaged ones."""
    try:
        return tree_files.read_trees(path, ("params",), {"params": abstract})["params"]
    except tree_files.Damaged as damage:
        raise RuntimeError(f"The model {path} is damaged: {damage}. Convert it again.") from damage


def read_base_params(path: Path, trees: dict) -> tuple[dict, dict | None]:
    """`read_params` of a base, {"backbone"}, or of an adapter, {"adapter"}; its raw soft-masking scalars or None."""
    scalars = {"soft_mask": jax.eval_shape(soft_masking.init_scalars)} if read_ours(path)["soft_mask"] else {}
    params = read_params(path, trees | scalars)
    return {name: params[name] for name in trees}, params.get("soft_mask")


def check_base_dtype(path: Path, about: Mapping, expected: str) -> None:
    """ValueError unless the converted base in `path` is what config.model.base_dtype expects."""
    if (actual := about.get("base_dtype", "float")) != expected:
        command = f"python -m softmask_jax.convert with{'out' * (expected == 'float')} --int8"
        remedy = f"give --config.model.base_dtype={actual}, or another --config.model.base ({command} makes one)"
        raise ValueError(f"{path} is {actual}, config.model.base_dtype {expected}: {remedy}.")


def start(path: Path, tokenizer: Tokenizer, abstract: dict) -> dict:
    """Initial "backbone", and learned "soft_mask" if any, of a run that continues a converted MDLM.
    Raises as `read_params`, and ValueError for another tokenizer (by sizes, if the model has none)."""
    own, config = read_tokenizer(path), config_schema.of_run(read_ours(path)["config"])
    ours, theirs = ((one.vocab_size, one.mask_token_id) for one in (own, tokenizer))
    same = ours == theirs if isinstance(own, Ids) else own.fingerprint() == tokenizer.fingerprint()
    if not same:
        sizes = f"{ours[0]} tokens, mask {ours[1]}; config.data.tokenizer has {theirs[0]} and {theirs[1]}"
        raise ValueError(f"config.init.checkpoint: the weights in {path} are for another tokenizer ({sizes}).")
    params = read_params(path, abstract)
    return params if config.soft_mask.variant != "none" else {"backbone": params["backbone"]}
