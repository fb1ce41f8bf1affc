"""PEFT's LoRA and DoRA adapters: their configs, and merging into the base."""
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.tensors import Tensors, whole
from softmask_jax.models.keys import dream
from softmask_jax.models.nn.config_fields import check_unknown, check_values, is_off

KEY = re.compile(
    r"(?:base_model\.model\.)?(model\.layers\.\d{1,4}\.(?:self_attn|mlp)\.\w+?_proj)"
    r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
FILE = "adapter_config.json"
# Fields of PEFT's LoraConfig (0.21); any other one that is set is refused.
READ = ("exclude_modules", "init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules")
BUILT = {"bias": ("none",), "use_dora": (False, True), "use_rslora": (False, True)}
# Of training, of the initial A and B (`init_lora_weights` tells if the base changed), and of what is off.
HARMLESS = (
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Initialisations that leave the base unchanged; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Adapter(NamedTuple):
    """An adapter: W' = W + scaling B A, with DoRA each row rescaled to its magnitude.

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
    """PEFT's adapter_config.json. Raises ValueError, one line, for anything but LoRA and DoRA as built here."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{FILE}: peft_type is {config.get('peft_type')!r:.40}; LORA (with or without DoRA) is built.")
    check_unknown(config, FILE, {*READ, *BUILT, *HARMLESS})
    check_values(config, FILE, BUILT)
    initial = config.get("init_lora_weights")
    if (initial.lower() if isinstance(initial, str) else initial) not in INITIAL:
        raise ValueError(
            f"{FILE}: init_lora_weights is {initial!r:.40}, which changes the base, too; save the adapter again for "
            "the base as it was (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 0 < rank < 10**5 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{FILE}: r {rank!r:.40} and lora_alpha {alpha!r:.40} must be numbers, r above 0.")
    if not _are_names(targets):
        known = ", ".join(dream.TARGETS)
        raise ValueError(f"{FILE}: target_modules is {targets!r:.100}; a list of some of {known} is built.")
    ours = {dream.TARGETS[target] for target in targets}
    ordered = tuple(name for name in dream.LINEAR if name in ours)
    return Adapter(rank, alpha, bool(config.get("use_dora")), bool(config.get("use_rslora")), ordered)


def with_listed_targets(config: Mapping, keys: Iterable[str]) -> dict:
    """The config with `target_modules` as a list of names, instead of a pattern or with `exclude_modules`.

    The names come from the file's (canonical) keys: a foreign pattern is never run. Raises ValueError unless they are
    the same in every layer.
    """
    targets, excludes = config.get("target_modules"), not is_off(config.get("exclude_modules"))
    if targets == "all-linear" and not excludes:
        return {**config, "target_modules": list(dream.TARGETS)}
    paths = isinstance(targets, list) and _are_names([str(target).split(".")[-1] for target in targets])
    if not (isinstance(targets, str) or paths) or (_are_names(targets) and not excludes):
        return dict(config)
    layers: dict[int, set[str]] = {}
    for parts in filter(None, map(KEY.fullmatch, keys)):
        _, _, number, _, name = parts[1].split(".")
        layers.setdefault(int(number), set()).add(name)
    adapted = set().union(*layers.values())
    for number in range(max(layers, default=-1) + 1):
        if lacking := adapted - layers.get(number, set()):
            raise ValueError(
                f"{FILE}: target_modules and exclude_modules leave {', '.join(sorted(lacking))} of layer {number} "
                "away; only an adapter with the same modules in every layer is built."
            )
    return {**config, "target_modules": [name for name in dream.TARGETS if name in adapted] or targets}


def write_config(adapter: Adapter, base: str) -> dict:
    """PEFT's adapter_config.json of an adapter that was trained here."""
    theirs = {ours: name for name, ours in dream.TARGETS.items()}
    return {
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": adapter.rank, "target_modules": [theirs[name] for name in adapter.targets],
        "task_type": "CAUSAL_LM", "use_dora": adapter.use_dora, "use_rslora": adapter.use_rslora,
    }  # fmt: skip


def canonical_keys(keys: Iterable[str]) -> dict[str, str]:
    """The keys by PEFT's saved ones, without `.default`, with `.weight`; unknown keys stay as they are.

    Raises ValueError when two keys mean the same tensor.
    """
    names: dict[str, str] = {}
    for key in keys:
        new = key
        if parts := KEY.fullmatch(key):
            suffix = "" if parts[2] == "lora_magnitude_vector" else ".weight"
            new = f"base_model.model.{parts[1]}.{parts[2]}{suffix}"
        if new in names:
            raise ValueError(f"The adapter holds {names[new]} and {key}, which are the same tensor; keep one.")
        names[new] = key
    return names


def _are_names(targets) -> bool:
    return isinstance(targets, list) and bool(targets) and all(str(target) in dream.TARGETS for target in targets)


class Merged:
    """A base with an adapter merged in, in float32, rounded to the base's dtype: W' = W + s B A; DoRA: m W' / ||W'||.

    base, tensors: under Dream's and PEFT's keys.
    """

    def __init__(self, base: Tensors, tensors: Tensors, adapter: Adapter):
        self.base, self.tensors, self.adapter = base, tensors, adapter
        self.specs: Mapping[str, Spec] = base.specs
        names = [dream.LINEAR[target][0] for target in adapter.targets]
        self.adapted = re.compile(rf"model\.layers\.\d+\.(?:{'|'.join(map(re.escape, names))})\.weight")
        for key in filter(self.adapted.fullmatch, base.specs):
            prefix = self._prefix(key)
            a, b = (tensors.specs[f"{prefix}.{name}.weight"].shape for name in ("lora_A", "lora_B"))
            if base.specs[key].shape != (shape := (b[0], a[1])):
                raise ValueError(f"The adapter changes {key} of shape {shape}, the base's is {base.specs[key].shape}.")

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        if not self.adapted.fullmatch(key):
            yield from self.base.pieces(key)
            return
        prefix, row = self._prefix(key), 0
        a, b = (whole(self.tensors, f"{prefix}.{name}.weight").astype(np.float32) for name in ("lora_A", "lora_B"))
        magnitude = whole(self.tensors, f"{prefix}.lora_magnitude_vector") if self.adapter.use_dora else None
        for piece in self.base.pieces(key):
            rows = slice(row, row + len(piece))
            merged = piece.astype(np.float32) + np.float32(self.adapter.scaling) * (b[rows] @ a)
            if magnitude is not None:
                norm = np.linalg.norm(merged, axis=1)
                merged = (magnitude[rows].astype(np.float32) / norm)[:, None] * merged
            yield merged.astype(piece.dtype)
            row += len(piece)

    @staticmethod
    def _prefix(key: str) -> str:
        return f"base_model.model.{key.removesuffix('.weight')}"
