"""A tiny random Dream and conversations for it: every step of fine-tuning, in seconds, on any machine.

    python -m softmask_jax.convert.tiny_dream --out=runs/tiny_dream
    python -m softmask_jax.convert --src=runs/tiny_dream/hf --dst=runs/tiny_dream/model
    python -m softmask_jax.main --config=configs/dream7b.py:smoke --workdir=runs/dream_smoke
    python -m softmask_jax.convert --src=runs/dream_smoke --to=hf --dst=runs/dream_smoke_adapter

`hf/` has the format of the published models: config.json, model.safetensors and a tokenizer of bytes. Existing files
stay; other files under these names are refused.
"""
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from softmask_jax.config.command_line import command, command_parser
from softmask_jax.convert.key_tables import keys
from softmask_jax.convert.outputs import whole_folder
from softmask_jax.convert.safetensors_files import write
from softmask_jax.convert.tensors import in_memory
from softmask_jax.data.chat.template import CHATML
from softmask_jax.io.files import explained, write_atomically, write_json
from softmask_jax.models.keys import dream

ELSEWHERE = "give another --out"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
CONFIG = {
    "architectures": ["DreamModel"], "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 128,
    "max_position_embeddings": 2048, "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
STD = 0.05


def make(out: Path, *, conversations: int = 160, sizes: Mapping = CONFIG) -> None:
    """Write `out`/hf and `out`/chats.jsonl unless they exist. sizes: entries of config.json, on top of CONFIG's."""
    random, chats = np.random.default_rng(0), out / "chats.jsonl"
    with explained(out, ELSEWHERE), whole_folder(out / "hf", 0, ELSEWHERE) as folder:
        _write_model(folder, random, CONFIG | dict(sizes))
        text = "".join(json.dumps(chat) + "\n" for chat in _chats(random, conversations))
        if chats.exists() and chats.read_bytes() != text.encode():
            raise FileExistsError(f"{chats} is another file than this command writes; remove it, or {ELSEWHERE}.")
    if not chats.exists():
        write_atomically(chats, text, elsewhere=ELSEWHERE)


def _write_model(folder: Path, random: np.random.Generator, config: Mapping) -> None:
    ids = _write_tokenizer(folder)
    config = config | {
        "vocab_size": len(ids), "mask_token_id": ids["<|mask|>"], "bos_token_id": ids["<|beginoftext|>"],
        "eos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"],
    }  # fmt: skip
    write_json(folder / "config.json", config)
    sizes, tensors, dtype = dream.sizes(config), {}, jnp.dtype(config["torch_dtype"])
    for entry in dream.BACKBONE:
        shape = [sizes[letter] for letter in entry.shape]
        for _, key in keys(entry, config["num_hidden_layers"]):
            value = np.ones(shape) if entry.path.endswith("scale") else random.normal(0.0, STD, shape)
            tensors[key] = value.astype(dtype)
    write(folder, in_memory(tensors))


def _write_tokenizer(folder: Path) -> dict[str, int]:
    """A tokenizer of bytes and Qwen's special tokens; returns ids by token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: id_ for id_, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    write_atomically(folder / "tokenizer.json", tokenizer.to_str())
    named = {"bos_token": "<|beginoftext|>", "eos_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    write_json(folder / "tokenizer_config.json", named | {"chat_template": CHATML})
    return tokenizer.get_vocab(with_added_tokens=True)


def _chats(random: np.random.Generator, count: int):
    """Sums of two small numbers, asked and answered."""
    for a, b in random.integers(1, 100, (count, 2)).tolist():
        question, answer = f"What is {a} + {b}?", f"{a} + {b} = {a + b}."
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@command()
def main(argv: list[str]) -> None:
    parser = command_parser("convert.tiny_dream", __doc__)
    parser.add_argument("--out", required=True, help="the folder to write into; existing files stay")
    flags = parser.parse_args(argv)
    out = Path(os.path.expanduser(flags.out))
    existed = (out / "hf").exists() and (out / "chats.jsonl").exists()
    make(out)
    print(f"{flags.out}/hf and {flags.out}/chats.jsonl {'exist already, unchanged' if existed else 'are written'}.")


if __name__ == "__main__":
    sys.exit(main())
