"""MDLM's and soft-masked MDLM's Lightning checkpoints: raw or averaged weights, and what their configs say."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmask_jax.convert import mdlm
from softmask_jax.convert.key_tables import Spec, count_blocks
from softmask_jax.convert.model import dit_about
from softmask_jax.convert.pickles import Stub
from softmask_jax.convert.tensors import Tensors
from softmask_jax.convert.torch_zip import Tensor, TorchZip, ZipTensors
from softmask_jax.convert.wrappers import without_wrappers
from softmask_jax.diffusion import transparency
from softmask_jax.models.nn.config_fields import check_values

DEEPEST = 20
# What configs of MDLM, Duo, ReMDM and soft-masked MDLM say of the method, on top or under `algo`: what is built here.
# SEDD, D3PM, Duo and others have the very same tensors.
METHOD = {
    "diffusion": ("absorbing_state",), "parameterization": ("subs",), "backbone": ("dit", "hf_dit"),
    "time_conditioning": (False,), "subs_masking": (False,), "causal_attention": (False,), "causal": (False,),
}  # fmt: skip
ALGO = {"name": ("mdlm", "mdlm_sm")}
MODEL = {"type": ("ddit",), "tie_word_embeddings": (False,), "causal": (False,)}
LOG_LINEAR = (None, "loglinear", "log-linear")


def read(path: Path, weights: str | None) -> tuple[Tensors, dict]:
    """The tensors of a checkpoint under their keys, and {"weights", "step", "config", "notes"} as plain values.

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
    names, note = without_wrappers(state, mdlm.OWN_KEYS, str(path))
    state = {new: state[old] for new, old in names.items()}
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
        "config": _config(content), "notes": [note] if note else [],
    }  # fmt: skip
    return ZipTensors(file, state), found


def describe(path: Path, found: Mapping, specs: Mapping[str, Spec], head_width: int | None, soft: bool) -> dict:
    """`Model.about`, from the config in the checkpoint, or from shapes where that is silent.

    Adds to `found["notes"]` where the config is missing. Raises ValueError.
    """
    config = found["config"]
    _check_method(path, config, found["notes"])
    if not config.keys() & {*METHOD, "algo"}:
        found["notes"].append(f"{path} does not say what it was trained as; it is taken for an MDLM.")

    def of(section: str, name: str, kinds: tuple[type, ...], default):
        part = config
        for step in section.split("."):
            part = part.get(step) if isinstance(part, dict) else None
        value = part.get(name) if isinstance(part, dict) else None
        if value is not None and type(value) not in kinds:
            kind = kinds[-1].__name__
            raise ValueError(f"{path}: its config has {section}.{name} = {value!r:.40}, which is no {kind}.")
        return default if value is None else value

    table = specs.get("backbone.vocab_embed.embedding", Spec(None, ()))
    hidden = specs.get("backbone.blocks.0.mlp.0.weight", Spec(None, ()))
    cond = specs.get("backbone.sigma_map.mlp.0.weight", Spec(None, ()))
    if len(table.shape) != 2 or len(hidden.shape) != 2 or len(cond.shape) != 2 or hidden.shape[0] % table.shape[1]:
        raise ValueError(
            f"{path} holds no MDLM: backbone.vocab_embed.embedding, blocks.0.mlp.0.weight or "
            "sigma_map.mlp.0.weight is missing or misshapen."
        )
    vocab_size, width = table.shape
    heads = of("model", "n_heads", (int,), width // head_width if head_width else None)
    if heads is None:
        raise ValueError(f"{path} does not say how many heads it has (no rotary buffer, no config).")
    blocks = of("model", "n_blocks", (int,), count_blocks(mdlm.BACKBONE, specs))
    model = {
        "hidden_size": width, "num_blocks": blocks, "num_heads": heads, "cond_dim": cond.shape[0],
        "mlp_ratio": hidden.shape[0] // width, "dropout": of("model", "dropout", (int, float), 0.1),
    }  # fmt: skip
    head = "algo.tran_head"
    variant = transparency.variant(of(head, "transparency_alg", (str,), "mixinputs_with_topk"))
    soft_mask = {
        "variant": variant if soft else "none",
        "k": transparency.feedback_tokens(of(head, "mixinputs_k", (int,), 3)),
        "p_sm": of("optim", "sm_prob", (int, float), 0.8),
    }  # fmt: skip
    return dit_about(
        model, soft_mask, vocab_size, seq_len=of("model", "length", (int,), 1024), weights=found["weights"],
        step=found["step"],
    )  # fmt: skip


def _config(content: Mapping) -> dict:
    """The training config, whether it is a hyper-parameter, all of them together, or beside them."""
    parameters = _plain(content.get("hyper_parameters"))
    parameters = parameters if isinstance(parameters, dict) else {}
    for found in (parameters.get("config"), _plain(content.get("config"))):
        if isinstance(found, dict) and found:
            return parameters | found
    return parameters


def _check_method(path: Path, config: Mapping, notes: list[str]) -> None:
    """ValueError for a network trained as something else than MDLM, which the weights do not show."""
    algo = config.get("algo")
    algo = {"name": algo} if isinstance(algo, str) else algo if isinstance(algo, dict) else {}
    model = config.get("model") if isinstance(config.get("model"), dict) else {}
    check_values(config, f"{path}: its config", METHOD)
    check_values(algo, f"{path}: its config.algo", METHOD | ALGO)
    check_values(model, f"{path}: its config.model", MODEL)
    noise = config.get("noise")
    kind = noise.get("type") if isinstance(noise, dict) else noise
    if kind not in LOG_LINEAR:
        notes.append(f"{path} was trained with the noise {kind!r:.40}; here it is used with the log-linear one.")


def _named(path: Path, state: Mapping[str, Tensor], shadow: Any) -> dict[str, Tensor]:
    names = [key for key in state if key.startswith("backbone.") and key != mdlm.INVERSE_FREQUENCIES]
    fits = isinstance(shadow, list) and len(shadow) == len(names) and all(isinstance(s, Tensor) for s in shadow)
    if not fits or any(state[name].spec.shape != s.spec.shape for name, s in zip(names, shadow)):
        raise ValueError(f"{path}: its averaged weights do not fit its state_dict; give --weights=raw.")
    return dict(zip(names, shadow))


def _plain(value: Any, depth: int = 0, done: dict[int, Any] | None = None) -> Any:
    """OmegaConf's nodes as the values that they hold, other objects as their attributes. Each is read once."""
    done = {} if done is None else done
    if depth > DEEPEST or id(value) in done:
        return done.get(id(value))
    if isinstance(value, Stub):
        state = value.items | (value.state if isinstance(value.state, dict) else {})
        content = next((state[name] for name in ("_content", "_val") if name in state), state)
    else:
        content = value
    if isinstance(content, (dict, list)):
        done[id(value)] = None
        entries = list(content.items())[:1000] if isinstance(content, dict) else []
        done[id(value)] = {key: _plain(entry, depth + 1, done) for key, entry in entries}
        return done[id(value)]
    return content if isinstance(content, (str, int, float, bool)) else None
