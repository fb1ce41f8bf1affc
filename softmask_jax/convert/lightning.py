"""MDLM's and soft-masked MDLM's Lightning checkpoints: raw or averaged weights, and what their configs say."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmask_jax.convert import adapters, mdlm
from softmask_jax.convert.key_tables import Spec, count_blocks
from softmask_jax.convert.model import dit_about
from softmask_jax.convert.pickles import Stub
from softmask_jax.convert.tensors import Tensors
from softmask_jax.convert.torch_zip import Tensor, TorchZip, ZipTensors

DEEPEST = 20


def read(path: Path, weights: str | None) -> tuple[Tensors, dict]:
    """The tensors of a checkpoint under their keys, and {"weights", "step", "hyper_parameters"} as plain values.

    The average holds the backbone's parameters in the order of the `state_dict`, without names, buffers and
    soft-masking scalars (which are taken raw). Raises ValueError, one line.
    """
    file = TorchZip(path)
    content = file.content if isinstance(file.content, dict) else {}
    state = content.get("state_dict")
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} has no state_dict; give a checkpoint that Lightning wrote.")
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor) or not isinstance(key, str)]:
        raise ValueError(f"{path}: {odd[0]!r:.100} in its state_dict is no tensor that can be read.")
    ema = content.get("ema")
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if weights == "ema" and not shadow:
        raise ValueError(f"{path} holds no averaged weights; give --weights=raw.")
    chosen = "ema" if shadow and weights != "raw" else "raw"
    if chosen == "ema":
        state = state | _named(path, state, shadow)
    step = content.get("global_step")
    found = {
        "weights": chosen, "step": step if type(step) is int else 0,
        "hyper_parameters": _plain(content.get("hyper_parameters")),
    }  # fmt: skip
    return ZipTensors(file, state), found


def describe(found: Mapping, specs: Mapping[str, Spec], head_width: int | None, soft: bool) -> dict:
    """`Model.about`, from the config in the checkpoint, or from shapes where that is silent. Raises ValueError."""
    config = found["hyper_parameters"]
    config = config.get("config") if isinstance(config, dict) else None

    def of(section: str, name: str, kinds: tuple[type, ...], default):
        part = config if isinstance(config, dict) else {}
        for step in section.split("."):
            part = part.get(step) if isinstance(part, dict) else None
        value = part.get(name) if isinstance(part, dict) else None
        return value if type(value) in kinds else default

    for section, name, kinds, builds in (
        ("algo", "parameterization", (str,), "subs"), ("algo", "backbone", (str,), "dit"),
        ("algo", "time_conditioning", (bool,), False), ("model", "tie_word_embeddings", (bool,), False),
    ):  # fmt: skip
        if (value := of(section, name, kinds, builds)) != builds:
            raise ValueError(
                f"The checkpoint's config says {section}.{name} = {value!r:.40}; only {builds!r} is built here."
            )
    table = specs.get("backbone.vocab_embed.embedding", Spec(None, ()))
    hidden = specs.get("backbone.blocks.0.mlp.0.weight", Spec(None, ()))
    cond = specs.get("backbone.sigma_map.mlp.0.weight", Spec(None, ()))
    if len(table.shape) != 2 or len(hidden.shape) != 2 or len(cond.shape) != 2 or hidden.shape[0] % table.shape[1]:
        raise ValueError(
            "The checkpoint holds no MDLM: backbone.vocab_embed.embedding, blocks.0.mlp.0.weight or "
            "sigma_map.mlp.0.weight is missing or misshapen."
        )
    vocab_size, width = table.shape
    heads = of("model", "n_heads", (int,), width // head_width if head_width else None)
    if heads is None:
        raise ValueError("The checkpoint does not say how many heads it has (no rotary buffer, no config).")
    blocks = of("model", "n_blocks", (int,), count_blocks(mdlm.BACKBONE, specs))
    model = {
        "hidden_size": width, "num_blocks": blocks, "num_heads": heads, "cond_dim": cond.shape[0],
        "mlp_ratio": hidden.shape[0] // width, "dropout": of("model", "dropout", (int, float), 0.1),
    }  # fmt: skip
    head = "algo.tran_head"
    variant = adapters.VARIANTS.get(of(head, "transparency_alg", (str,), "mixinputs_with_topk"), "topk")
    soft_mask = {
        "variant": variant if soft else "none", "k": of(head, "mixinputs_k", (int,), 3),
        "p_sm": of("optim", "sm_prob", (int, float), 0.8),
    }  # fmt: skip
    return dit_about(
        model, soft_mask, vocab_size, seq_len=of("model", "length", (int,), 1024), weights=found["weights"],
        step=found["step"],
    )  # fmt: skip


def _named(path: Path, state: Mapping[str, Tensor], shadow: Any) -> dict[str, Tensor]:
    names = [key for key in state if key.startswith("backbone.") and key != mdlm.INVERSE_FREQUENCIES]
    fits = isinstance(shadow, list) and len(shadow) == len(names) and all(isinstance(s, Tensor) for s in shadow)
    if not fits or any(state[name].spec.shape != s.spec.shape for name, s in zip(names, shadow)):
        raise ValueError(f"{path}: its averaged weights do not fit its state_dict; give --weights=raw.")
    return dict(zip(names, shadow))


def _plain(value: Any, depth: int = 0) -> Any:
    """OmegaConf's nodes as the values that they hold; None for other classes."""
    if depth > DEEPEST:
        return None
    if isinstance(value, Stub):
        state = value.state if isinstance(value.state, dict) else {}
        return _plain(state["_content"] if "_content" in state else state.get("_val"), depth + 1)
    if isinstance(value, dict):
        return {key: _plain(entry, depth + 1) for key, entry in list(value.items())[:1000]}
    return value if isinstance(value, (str, int, float, bool)) else None
