"""MDLM's and soft-masked MDLM's Lightning checkpoints: raw or averaged weights, and their configs."""
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softmask_jax.convert import mdlm
from softmask_jax.convert.key_tables import Spec, count_blocks
from softmask_jax.convert.model import Model, dit_about, dit_tensors
from softmask_jax.convert.pickles import Stub
from softmask_jax.convert.tensors import Tensors
from softmask_jax.convert.torch_zip import Tensor, TorchZip
from softmask_jax.convert.wrappers import own_keys, without_wrappers
from softmask_jax.diffusion import transparency
from softmask_jax.models.keys import dit
from softmask_jax.models.nn.config_fields import check_values

DEEPEST = 20
# Settings, on top of a config or under `algo`, of what is built here: SEDD, D3PM and Duo have the very same tensors.
METHOD = {
    "diffusion": ("absorbing_state",), "parameterization": ("subs",), "backbone": ("dit", "hf_dit"),
    "time_conditioning": (False,), "subs_masking": (False,), "causal_attention": (False,), "causal": (False,),
}  # fmt: skip
ALGO = {"name": ("mdlm", "mdlm_sm")}
MODEL = {"type": ("ddit",), "tie_word_embeddings": (False,), "causal": (False,)}
LOG_LINEAR = (None, "loglinear", "log-linear")


def open_checkpoint(path: Path, weights: str | None) -> Model:
    """An MDLM. weights: as of `read`. Raises ValueError, one line."""
    tensors, facts = read(path, weights)
    wide, soft, head_width = dit_tensors(tensors)
    about = _describe(path, facts, wide.specs, head_width, soft)
    return Model("dit", wide, about["config"]["model"]["num_blocks"], about, notes=tuple(facts["notes"]))


def read(path: Path, weights: str | None) -> tuple[Tensors, dict]:
    """Tensors of a checkpoint by key, and {"weights", "step", "config", "notes"} as plain values. ValueError, one line.
    The average holds the backbone's parameters in the order of the `state_dict`; soft-masking scalars are raw."""
    file = TorchZip(path)
    content = _dict(file.content)
    state = _dict(content.get("state_dict"))
    if not state:
        raise ValueError(f"{path} has no state_dict; give a checkpoint that Lightning wrote.")
    if odd := [key for key, value in state.items() if not isinstance(value, Tensor) or not isinstance(key, str)]:
        raise ValueError(f"{path}: {odd[0]!r:.100} in its state_dict is no tensor that can be read.")
    names, note = without_wrappers(state, own_keys(*dit.KEYS.roots), str(path))
    state = {new: state[old] for new, old in names.items()}
    shadow, step = _dict(content.get("ema")).get("shadow_params"), content.get("global_step")
    if weights == "ema" and not shadow:
        raise ValueError(f"{path} holds no averaged weights; give --weights=raw.")
    weights = "ema" if shadow and weights != "raw" else "raw"
    if weights == "ema":
        state |= _named(path, state, shadow)
    step, notes = step if type(step) is int else 0, [note] if note else []
    return file.tensors(state), {"weights": weights, "step": step, "config": _config(content), "notes": notes}


def _describe(path: Path, facts: Mapping, specs: Mapping[str, Spec], head_width: int | None, soft: bool) -> dict:
    """`Model.about`, from the checkpoint's config, else from shapes. facts: of `read`; notes are added."""
    config = facts["config"]
    _check_method(path, config, facts["notes"])
    if not config.keys() & {*METHOD, "algo"}:
        facts["notes"].append(f"{path} does not say what it was trained as; it is taken for an MDLM.")

    def setting(key: str, kinds: tuple[type, ...], default):
        value = functools.reduce(lambda part, name: _dict(part).get(name), key.split("."), config)
        if value is not None and type(value) not in kinds:
            raise ValueError(f"{path}: its config has {key} = {value!r:.40}, which is no {kinds[-1].__name__}.")
        return default if value is None else value

    matrices = ("vocab_embed.embedding", "blocks.0.mlp.0.weight", "sigma_map.mlp.0.weight")
    table, hidden, cond = (specs.get(f"backbone.{name}", Spec(None, ())).shape for name in matrices)
    if {len(table), len(hidden), len(cond)} != {2} or hidden[0] % table[1]:
        one_of = f"backbone.{matrices[0]}, {matrices[1]} or {matrices[2]}"
        raise ValueError(f"{path} holds no MDLM: {one_of} is missing or misshapen.")
    vocab_size, width = table
    heads = setting("model.n_heads", (int,), width // head_width if head_width else None)
    if heads is None:
        raise ValueError(f"{path} does not say how many heads it has (no rotary buffer, no config).")
    model = {
        "hidden_size": width, "num_blocks": setting("model.n_blocks", (int,), count_blocks(dit.BACKBONE, specs)),
        "num_heads": heads, "cond_dim": cond[0], "mlp_ratio": hidden[0] // width,
        "dropout": setting("model.dropout", (int, float), 0.1),
    }  # fmt: skip
    variant = transparency.variant(setting("algo.tran_head.transparency_alg", (str,), "mixinputs_with_topk"))
    soft_mask = {
        "variant": variant if soft else "none",
        "k": transparency.feedback_tokens(setting("algo.tran_head.mixinputs_k", (int,), 3)),
        "p_sm": setting("optim.sm_prob", (int, float), 0.8),
    }
    training = {"seq_len": setting("model.length", (int,), 1024), "weights": facts["weights"], "step": facts["step"]}
    return dit_about(model, soft_mask, vocab_size, head_width, **training)


def _dict(value: Any) -> dict:
    """The value if it is a dict, else an empty one."""
    return value if isinstance(value, dict) else {}


def _config(content: Mapping) -> dict:
    """The training config: a hyper-parameter, all of them, or an entry beside them."""
    parameters = _dict(_plain(content.get("hyper_parameters")))
    return parameters | (_dict(parameters.get("config")) or _dict(_plain(content.get("config"))))


def _check_method(path: Path, config: Mapping, notes: list[str]) -> None:
    """ValueError for a network that was not trained as an MDLM; weights do not show that."""
    algo, noise = config.get("algo"), config.get("noise")
    check_values(config, f"{path}: its config", METHOD)
    check_values({"name": algo} if isinstance(algo, str) else _dict(algo), f"{path}: its config.algo", METHOD | ALGO)
    check_values(_dict(config.get("model")), f"{path}: its config.model", MODEL)
    kind = noise.get("type") if isinstance(noise, dict) else noise
    if kind not in LOG_LINEAR:
        notes.append(f"{path} was trained with the noise {kind!r:.40}; here it is used with the log-linear one.")


def _named(path: Path, state: Mapping[str, Tensor], shadow: Any) -> dict[str, Tensor]:
    """The average's tensors by key."""
    names = [key for key in state if key.startswith("backbone.") and key != mdlm.INVERSE_FREQUENCIES]
    fits = isinstance(shadow, list) and len(shadow) == len(names) and all(isinstance(s, Tensor) for s in shadow)
    if not fits or any(state[name].spec.shape != s.spec.shape for name, s in zip(names, shadow)):
        raise ValueError(f"{path}: its averaged weights do not fit its state_dict; give --weights=raw.")
    return dict(zip(names, shadow))


def _plain(value: Any, depth: int = 0, done: dict[int, Any] | None = None) -> Any:
    """OmegaConf's nodes as their values, other objects as their attributes; each is read once."""
    done = {} if done is None else done
    if depth > DEEPEST or id(value) in done:
        return done.get(id(value))
    content = value
    if isinstance(value, Stub):
        state = value.items | _dict(value.state)
        content = next((state[name] for name in ("_content", "_val") if name in state), state)
    if isinstance(content, (dict, list)):
        done[id(value)] = None
        done[id(value)] = {key: _plain(entry, depth + 1, done) for key, entry in list(_dict(content).items())[:1000]}
        return done[id(value)]
    return content if isinstance(content, (str, int, float, bool)) else None
