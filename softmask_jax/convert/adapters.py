"""PEFT's LoRA and DoRA adapters: their configs, the soft-masking scalars beside them, and merging into the base."""
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from softmask_jax import soft_masking
from softmask_jax.convert import dream
from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.tensors import Tensors, whole

VARIANTS = {"mixinputs_with_topk": "topk", "mixinputs_with_temp": "full", "none": "none"}
KEY = re.compile(
    r"(?:base_model\.model\.)?(model\.layers\.\d{1,4}\.(?:self_attn|mlp)\.\w+?_proj)"
    r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
# What would change the numbers and is not built here, with the value that leaves it off.
UNSUPPORTED = {
    "bias": "none", "fan_in_fan_out": False, "lora_bias": False, "rank_pattern": {}, "alpha_pattern": {},
    "layer_replication": None, "layers_to_transform": None, "modules_to_save": [], "trainable_token_indices": None,
    "target_parameters": None,
}  # fmt: skip


class Adapter(NamedTuple):
    """What an adapter's config says: W' = W + scaling B A, and with DoRA each row of it rescaled to its magnitude.

    targets: our names of the layers, in the order of `dream.LINEAR`.
    """

    rank: int
    alpha: float
    use_dora: bool
    use_rslora: bool
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def read_config(config: Mapping) -> Adapter:
    """PEFT's adapter_config.json. Raises ValueError, one line, for what is no LoRA or DoRA that is built here."""
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"adapter_config.json: peft_type is {config.get('peft_type')!r:.40}; LORA (with or without DoRA) is built."
        )
    for name, off in UNSUPPORTED.items():
        if config.get(name) not in (off, None):
            raise ValueError(
                f"adapter_config.json: {name} is {config[name]!r:.60}, which is not built; train without it."
            )
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 0 < rank < 10**5 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(
            f"adapter_config.json: r {rank!r:.40} and lora_alpha {alpha!r:.40} must be numbers, r above 0."
        )
    if not isinstance(targets, list) or not targets or not all(t in dream.TARGETS for t in targets):
        known = ", ".join(dream.TARGETS)
        raise ValueError(
            f"adapter_config.json: target_modules is {targets!r:.100}; a list of some of {known} is built."
        )
    ours = {dream.TARGETS[target] for target in targets}
    ordered = tuple(name for name in dream.LINEAR if name in ours)
    return Adapter(rank, alpha, bool(config.get("use_dora")), bool(config.get("use_rslora")), ordered)


def write_config(adapter: Adapter, base: str) -> dict:
    """An adapter_config.json that PEFT loads, for an adapter that was trained here."""
    theirs = {ours: name for name, ours in dream.TARGETS.items()}
    return {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": adapter.rank, "target_modules": [theirs[name] for name in adapter.targets],
        "task_type": "CAUSAL_LM", "use_dora": adapter.use_dora, "use_rslora": adapter.use_rslora,
    }  # fmt: skip


def canonical_keys(found: Mapping[str, object]) -> dict[str, str]:
    """PEFT's saved key for each key found, whose infixes `.default` and `.weight` may differ; unknown ones as they are.

    Raises ValueError when two keys mean the same tensor.
    """
    names: dict[str, str] = {}
    for key in found:
        new = key
        if parts := KEY.fullmatch(key):
            suffix = "" if parts[2] == "lora_magnitude_vector" else ".weight"
            new = f"base_model.model.{parts[1]}.{parts[2]}{suffix}"
        if new in names:
            raise ValueError(f"The adapter holds {names[new]} and {key}, which are the same tensor; keep one.")
        names[new] = key
    return names


def read_transparency(found: Mapping) -> tuple[dict, dict[str, np.ndarray]]:
    """transparency_config.json, effective values -> ({"variant", "k", "schedule"}, the raw scalars float32).

    Raises ValueError, one line, for an unknown variant or values out of range.
    """
    try:
        variant = VARIANTS[found["transparency_alg"]]
        schedule = found.get("transparency_scheduling") or "none"
        k = found.get("mixinputs_k", 1)
        values = [float(found[f"transparency_{name}"]) for name in ("scale", "centre", "steepness")]
        temperature = found.get("mixture_temp")
        if type(k) is not int or k < 1 or schedule not in soft_masking.SCHEDULES:
            raise ValueError(f"mixinputs_k {k!r:.20} or transparency_scheduling {schedule!r:.20} is unknown")
        raw = soft_masking.raw_from_effective(*values, 1.0 if temperature is None else float(temperature))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"transparency_config.json does not describe soft-masking ({error!s:.150}).") from None
    # The reference uses these values without its 1e-6: that is what `effective` gives back.
    return {"variant": variant, "k": k, "schedule": schedule}, {name: np.asarray(v) for name, v in raw.items()}


def write_transparency(soft_mask: Mapping, raw: Mapping[str, np.ndarray]) -> dict:
    """The inverse: effective values, rounded to bfloat16 as the reference rounds them."""
    values = soft_masking.effective({name: jnp.asarray(value) for name, value in raw.items()})
    scale, centre, steepness, temperature = (float(jnp.asarray(v, jnp.bfloat16)) for v in values)
    return {
        "transparency_alg": next(name for name, ours in VARIANTS.items() if ours == soft_mask["variant"]),
        # 0 is stored as a raw value of -80.
        "transparency_scale": scale if scale > 1e-30 else 0.0,
        "transparency_steepness": steepness,
        "transparency_centre": centre,
        "mixture_temp": temperature,
        "mixinputs_k": soft_mask["k"],
        "transparency_scheduling": soft_mask["schedule"],
    }


class Merged:
    """A base with an adapter merged in: float32 arithmetic, rounded to the base's dtype.

    base and tensors: under Dream's and PEFT's keys. W' = W + s B A; with DoRA m / ||W'||, by row, times that.
    """

    def __init__(self, base: Tensors, tensors: Tensors, adapter: Adapter):
        self.base, self.tensors, self.adapter = base, tensors, adapter
        self.specs: Mapping[str, Spec] = base.specs
        names = [dream.LINEAR[target][0] for target in adapter.targets]
        self.adapted = re.compile(rf"model\.layers\.\d+\.(?:{'|'.join(map(re.escape, names))})\.weight")
        for key in filter(self.adapted.fullmatch, base.specs):
            prefix = self._prefix(key)
            wide, high = (
                tensors.specs[f"{prefix}.lora_A.weight"].shape[1],
                tensors.specs[f"{prefix}.lora_B.weight"].shape[0],
            )
            if base.specs[key].shape != (high, wide):
                raise ValueError(
                    f"The adapter changes {key} of shape {(high, wide)}, the base's is {base.specs[key].shape}."
                )

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        if not self.adapted.fullmatch(key):
            yield from self.base.pieces(key)
            return
        prefix, at = self._prefix(key), 0
        a, b = (whole(self.tensors, f"{prefix}.{name}.weight").astype(np.float32) for name in ("lora_A", "lora_B"))
        magnitude = whole(self.tensors, f"{prefix}.lora_magnitude_vector") if self.adapter.use_dora else None
        for piece in self.base.pieces(key):
            rows = slice(at, at + len(piece))
            merged = piece.astype(np.float32) + np.float32(self.adapter.scaling) * (b[rows] @ a)
            if magnitude is not None:
                norm = np.linalg.norm(merged, axis=1)
                merged = (magnitude[rows].astype(np.float32) / norm)[:, None] * merged
            yield merged.astype(piece.dtype)
            at += len(piece)

    @staticmethod
    def _prefix(key: str) -> str:
        return f"base_model.model.{key.removesuffix('.weight')}"
