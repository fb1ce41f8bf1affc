"""A tiny random Dream or LLaDA and conversations for it: every step of fine-tuning, in seconds, on any machine.

    python -m softmask_jax.convert.tiny --family=dream --out=runs/tiny_dream
    python -m softmask_jax.main --config=configs/dream7b.py:smoke --fetch
    python -m softmask_jax.convert --src=runs/dream7b-smoke --to=hf --dst=adapters/dream7b-smoke

    python -m softmask_jax.convert.tiny --family=llada --out=runs/tiny_llada
    python -m softmask_jax.main --config=configs/llada8b.py:smoke --fetch

`hf/` has the format of the published models: config.json, model.safetensors and a tokenizer of bytes. Existing files
stay; other files under these names are refused.
"""
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from softmask_jax.config.command_line import command, command_parser
from softmask_jax.data.chat.template import CHATML, LLADA
from softmask_jax.io.files import explained, write_atomically, write_json

ELSEWHERE = "give another --out"


class Recipe(NamedTuple):
    """A family's files."""

    config: dict  # config.json without ids
    tokens: tuple[str, ...]  # special ones
    named: dict[str, str]  # those of tokenizer_config.json
    mask: str
    template: str


RECIPES = {
    "dream": Recipe(
        {
            "architectures": ["DreamModel"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
            "max_position_embeddings": 2048, "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        },
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"),
        {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}, "<|mask|>", CHATML,
    ),
    "llada": Recipe(
        {
            "activation_type": "silu", "architectures": ["LLaDAModelLM"], "block_type": "llama", "d_model": 64,
            "embedding_size": 384, "include_bias": False, "include_qkv_bias": False, "layer_norm_type": "rms",
            "max_sequence_length": 2048, "mlp_hidden_size": 128, "model_type": "llada", "n_heads": 4, "n_kv_heads": 4,
            "n_layers": 2, "rms_norm_eps": 1e-5, "rope": True, "rope_theta": 5e5, "weight_tying": False,
        },
        ("<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}, "<|mdm_mask|>", LLADA,
    ),
}  # fmt: skip
DTYPE = "bfloat16"  # of the weights, where config.json names none
STD = 0.05


def make(out: Path, *, family: str = "dream", conversations: int = 160, sizes: Mapping = {}) -> None:
    """Write `out`/hf and `out`/chats.jsonl unless they exist. sizes: entries of config.json, on top of the recipe's."""
    # Imports JAX.
    from softmask_jax.convert.outputs import whole_folder

    random, chats = np.random.default_rng(0), out / "chats.jsonl"
    with explained(out, ELSEWHERE), whole_folder(out / "hf", 0, ELSEWHERE) as folder:
        _write_model(folder, random, family, sizes)
        text = "".join(json.dumps(chat) + "\n" for chat in _chats(random, conversations))
        if chats.exists() and chats.read_bytes() != text.encode():
            raise FileExistsError(f"{chats} is another file than this command writes; remove it, or {ELSEWHERE}.")
    if not chats.exists():
        write_atomically(chats, text, elsewhere=ELSEWHERE)


def _write_model(folder: Path, random: np.random.Generator, family: str, sizes: Mapping) -> None:
    import jax.numpy as jnp

    from softmask_jax.convert.key_tables import keys
    from softmask_jax.convert.safetensors_files import write
    from softmask_jax.convert.tensors import in_memory
    from softmask_jax.models import families

    recipe = RECIPES[family]
    ids = _write_tokenizer(folder, recipe)
    bos, eos = (ids[recipe.named[name]] for name in ("bos_token", "eos_token"))
    config = recipe.config | dict(sizes) | {
        "vocab_size": len(ids), "mask_token_id": ids[recipe.mask], "bos_token_id": bos, "eos_token_id": eos,
        "pad_token_id": eos,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    about, of = {"hf_config": config}, families.of(family)
    letters, layers = of.keys.sizes(about), of.published.network(config).num_layers
    tensors, dtype = {}, jnp.dtype(config.get("torch_dtype", DTYPE))
    for entry in of.keys.table(about):
        shape = [letters[letter] for letter in entry.shape]
        for _, key in keys(entry, layers):
            value = np.ones(shape) if entry.path.endswith("scale") else random.normal(0.0, STD, shape)
            tensors[key] = value.astype(dtype)
    write(folder, in_memory(tensors))


def _write_tokenizer(folder: Path, recipe: Recipe) -> dict[str, int]:
    """A tokenizer of bytes and the family's special tokens; returns ids by token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: id_ for id_, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in recipe.tokens])
    write_atomically(folder / "tokenizer.json", tokenizer.to_str())
    write_json(folder / "tokenizer_config.json", recipe.named | {"chat_template": recipe.template})
    return tokenizer.get_vocab(with_added_tokens=True)


def _chats(random: np.random.Generator, count: int):
    """Sums of two small numbers, asked and answered."""
    for a, b in random.integers(1, 100, (count, 2)).tolist():
        question, answer = f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(name: str, text: str, argv: list[str], family: str = "") -> None:
    """The command `name` with the help `text`, for one family or, "", with the flag --family."""
    parser = command_parser(name, text)
    parser.add_argument("--out", required=True, help="the folder to write into; existing files stay")
    if not family:
        parser.add_argument("--family", default="dream", choices=tuple(RECIPES), help="kind of the model (dream)")
    flags = parser.parse_args(argv)
    out = Path(os.path.expanduser(flags.out))
    existed = (out / "hf").exists() and (out / "chats.jsonl").exists()
    make(out, family=family or flags.family)
    print(f"{flags.out}/hf and {flags.out}/chats.jsonl {'exist already, unchanged' if existed else 'are written'}.")


@command()
def main(argv: list[str]) -> None:
    run("convert.tiny", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
