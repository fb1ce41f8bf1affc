"""`transparency_config.json`: soft-masking's settings and effective scalars, as the PyTorch reference publishes them
beside an adapter (arXiv 2510.17206)."""
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from softmask_jax.diffusion import soft_masking

# Our variants by the reference's names.
VARIANTS = {"mixinputs_with_topk": "topk", "mixinputs_with_temp": "full", "none": "none"}
SCALARS = {"transparency_scale": "scale", "transparency_centre": "centre", "transparency_steepness": "steepness"}
KEYS = ("transparency_alg", *SCALARS, "mixinputs_k", "mixture_temp", "transparency_scheduling")


def read(config: Mapping) -> tuple[dict, dict[str, jax.Array] | None]:
    """The file's entries -> ({"variant", "k", "schedule"}, raw scalars float32; None without soft-masking). A missing
    `transparency_alg` is `none`. ValueError for unknown keys or names, missing scalars and values out of range."""
    if unknown := sorted(set(config) - set(KEYS)):
        raise ValueError(f"Unknown soft-masking settings {', '.join(unknown)}; there are {', '.join(KEYS)}.")
    chosen = variant(config.get("transparency_alg") or "none")
    if chosen == "none":
        return {"variant": "none", "k": 1, "schedule": "none"}, None
    needed = [*SCALARS, *(["mixinputs_k"] if chosen == "topk" else [])]
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"The soft-masking settings lack {', '.join(missing)}.")
    schedule = config.get("transparency_scheduling") or "none"
    if schedule not in soft_masking.SCHEDULES:
        raise ValueError(f"transparency_scheduling is {schedule!r:.40}; choose one of "
                         f"{', '.join(soft_masking.SCHEDULES)}.")
    values = {name: _number(config, key) for key, name in SCALARS.items()}
    if config.get("mixture_temp") is not None:
        values["temperature"] = _number(config, "mixture_temp")
    k = 1 if config.get("mixinputs_k") is None else feedback_tokens(config["mixinputs_k"])
    return {"variant": chosen, "k": k, "schedule": schedule}, soft_masking.raw_from_effective(**values)


def write(soft_mask: Mapping, raw: Mapping) -> dict:
    """The inverse: effective values, rounded to bfloat16 as the reference rounds them. ValueError as `published`."""
    values = soft_masking.effective({name: jnp.asarray(value) for name, value in raw.items()})
    scale, centre, steepness, temperature = (float(jnp.asarray(v, jnp.bfloat16)) for v in values)
    return {
        "transparency_alg": published(soft_mask["variant"]),
        # 0 is stored as a raw value of -80.
        "transparency_scale": scale if scale > 1e-30 else 0.0,
        "transparency_steepness": steepness,
        "transparency_centre": centre,
        "mixture_temp": temperature,
        "mixinputs_k": soft_mask["k"],
        "transparency_scheduling": soft_mask["schedule"],
    }


def variant(name) -> str:
    """Our variant of a `transparency_alg`; ValueError for an unknown one."""
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(f"transparency_alg is {name!r:.40}; choose one of {', '.join(VARIANTS)}.")
    return VARIANTS[name]


def published(variant: str) -> str:
    """The reference's name of a variant; ValueError for one that it lacks."""
    if names := [name for name, ours in VARIANTS.items() if ours == variant]:
        return names[0]
    raise ValueError(f"The PyTorch reference has no soft-masking variant {variant!r}; this model stays here.")


def feedback_tokens(k) -> int:
    """A `mixinputs_k`; ValueError for what is no number of tokens."""
    if type(k) is not int or k < 1:
        raise ValueError(f"mixinputs_k is {k!r:.40}; soft-masking feeds back at least 1 token.")
    return k


def _number(config: Mapping, key: str) -> float:
    value = config[key]
    if isinstance(value, (str, bool, list, dict)):
        raise ValueError(f"{key} is {value!r:.40}, which is no number.")
    return float(value)
