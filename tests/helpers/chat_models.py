"""Tiny models with a chat template, converted and loaded."""
import softmask_jax
from softmask_jax.convert import tiny
from softmask_jax.convert.__main__ import main as convert


def chat_model(folder, family: str, **sizes) -> softmask_jax.Model:
    """A model of a family, with these entries in its config.json."""
    tiny.make(folder, family=family, conversations=2, sizes=sizes)
    assert convert([f"--src={folder / 'hf'}", f"--dst={folder / 'model'}"]) == 0
    return softmask_jax.load(folder / "model")
