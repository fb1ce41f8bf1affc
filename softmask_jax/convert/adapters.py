"""PEFT's LoRA and DoRA adapters: their configs, and merging into the base."""
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from softmask_jax.convert.tensors import Tensors, View, whole
from softmask_jax.convert.wrappers import old_keys
from softmask_jax.models.keys import Products
from softmask_jax.models.nn.config_fields import check_unknown, check_values, is_off

KEY = re.compile(
    r"(?:base_model\.model\.)?(model\.(?:layers|transformer\.blocks)\.(\d{1,4})\.(?:(?:self_attn|mlp)\.)?(\w+))"
    r"\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)
FILE = "adapter_config.json"
BUILT = {"bias": ("none",), "use_dora": (False, True), "use_rslora": (False, True)}
# Fields of PEFT's LoraConfig (0.21) that are read or harmless; any other one that is set is refused.
KNOWN = (
    *BUILT, "exclude_modules", "init_lora_weights", "lora_alpha", "peft_type", "r", "target_modules",
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode",
    "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
)  # fmt: skip
# Initialisations that leave the base unchanged; PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ change it.
INITIAL = (None, True, False, "gaussian", "eva", "orthogonal", "mica")


class Adapter(NamedTuple):
    """W' = W + scaling B A, with DoRA each row rescaled to its magnitude. targets: our names, in the table's order."""

    rank: int
    alpha: float
    use_dora: bool
    use_rslora: bool
    targets: tuple[str, ...]

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def read_config(config: Mapping, products: Products) -> Adapter:
    """PEFT's adapter_config.json. Raises ValueError, one line, for anything but LoRA and DoRA as built here."""
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{FILE}: peft_type is {config.get('peft_type')!r:.40}; LORA (with or without DoRA) is built.")
    check_unknown(config, FILE, KNOWN)
    check_values(config, FILE, BUILT)
    initial = config.get("init_lora_weights")
    if (initial.lower() if isinstance(initial, str) else initial) not in INITIAL:
        remedy = "save it for the base as it was (save_pretrained with path_initial_model_for_weight_conversion)"
        raise ValueError(f"{FILE}: init_lora_weights is {initial!r:.40}, which changes the base, too; {remedy}.")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if type(rank) is not int or not 0 < rank < 10**5 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"{FILE}: r {rank!r:.40} and lora_alpha {alpha!r:.40} must be numbers, r above 0.")
    if not _are_names(targets, products):
        built = ", ".join(products.targets)
        raise ValueError(f"{FILE}: target_modules is {targets!r:.100}; a list of {built} is built.")
    ours = {products.targets[target] for target in targets}
    ordered = tuple(name for name in products.linear if name in ours)
    return Adapter(rank, alpha, bool(config.get("use_dora")), bool(config.get("use_rslora")), ordered)


def with_listed_targets(config: Mapping, keys: Iterable[str], products: Products) -> dict:
    """The config with `target_modules` as a list of names, instead of a pattern or with `exclude_modules`.
    A foreign pattern is never run: the names come from the file's (canonical) keys. ValueError if layers differ."""
    targets, excludes = config.get("target_modules"), not is_off(config.get("exclude_modules"))
    if targets == "all-linear" and not excludes:
        return {**config, "target_modules": list(products.targets)}
    paths = isinstance(targets, list) and _are_names([str(target).split(".")[-1] for target in targets], products)
    if not (isinstance(targets, str) or paths) or (_are_names(targets, products) and not excludes):
        return dict(config)
    layers: dict[int, set[str]] = {}
    for parts in filter(None, map(KEY.fullmatch, keys)):
        layers.setdefault(int(parts[2]), set()).add(parts[3])
    adapted = set().union(*layers.values())
    for number in range(max(layers, default=-1) + 1):
        if lacking := adapted - layers.get(number, set()):
            message = f"target_modules and exclude_modules leave {', '.join(sorted(lacking))} of layer {number} away"
            raise ValueError(f"{FILE}: {message}; only the same modules in every layer are built.")
    return {**config, "target_modules": [name for name in products.targets if name in adapted] or targets}


def write_config(adapter: Adapter, base: str, products: Products) -> dict:
    """PEFT's adapter_config.json of an adapter that was trained here."""
    theirs = {ours: name for name, ours in products.targets.items()}
    return without_namesakes({
        "base_model_name_or_path": base, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "modules_to_save": None,
        "peft_type": "LORA", "r": adapter.rank, "target_modules": [theirs[name] for name in adapter.targets],
        "task_type": "CAUSAL_LM", "use_dora": adapter.use_dora, "use_rslora": adapter.use_rslora,
    }, products)  # fmt: skip


def without_namesakes(config: Mapping, products: Products) -> dict:
    """The config with `exclude_modules`, where its targets name other modules, too: PEFT looks at the end of a path."""
    targets = {products.targets.get(name) for name in config["target_modules"]}
    modules = [module for ours, module in products.namesakes.items() if ours in targets]
    return dict(config) if not modules or config.get("exclude_modules") else {**config, "exclude_modules": modules}


def canonical_keys(keys: Iterable[str]) -> dict[str, str]:
    """`old_keys` by PEFT's saved ones, without `.default`, with `.weight`; unknown keys stay as they are."""

    def saved(key: str) -> str:
        if (parts := KEY.fullmatch(key)) is None:
            return key
        suffix = "" if parts[4] == "lora_magnitude_vector" else ".weight"
        return f"base_model.model.{parts[1]}.{parts[4]}{suffix}"

    return old_keys(((saved(key), key) for key in keys), "The adapter")


def check_namesakes(config: Mapping, keys: Iterable[str], products: Products) -> None:
    """ValueError for an adapter on a module that only has the last name of a product, as LLaDA's head has."""
    for key in keys:
        for module in products.namesakes.values():
            if key.removeprefix("base_model.model.").startswith(f"{module}."):
                remedy = f"only products of the layers are built: train it with exclude_modules={[module]}"
                targets = config.get("target_modules")
                raise ValueError(f"{FILE}: target_modules is {targets!r:.100}, which adapts {module}; {remedy}.")


def _are_names(targets, products: Products) -> bool:
    return isinstance(targets, list) and bool(targets) and all(str(target) in products.targets for target in targets)


def merged(base: Tensors, tensors: Tensors, adapter: Adapter, products: Products) -> Tensors:
    """A base with PEFT's adapter, computed in float32: W' = W + s B A; DoRA: m W' / ||W'||."""
    adapted = products.kernel(adapter.targets)
    for match in filter(None, map(adapted.fullmatch, base.specs)):
        a, b = (tensors.specs[f"base_model.model.{match[1]}.{name}.weight"].shape for name in ("lora_A", "lora_B"))
        if base.specs[match[0]].shape != (shape := (b[0], a[1])):
            theirs = base.specs[match[0]].shape
            raise ValueError(f"The adapter changes {match[0]} of shape {shape}, the base's is {theirs}.")

    def pieces(key: str) -> Iterator[np.ndarray]:
        if (match := adapted.fullmatch(key)) is None:
            yield from base.pieces(key)
            return
        prefix, row = f"base_model.model.{match[1]}", 0
        a, b = (whole(tensors, f"{prefix}.{name}.weight").astype(np.float32) for name in ("lora_A", "lora_B"))
        magnitude = whole(tensors, f"{prefix}.lora_magnitude_vector") if adapter.use_dora else None
        for piece in base.pieces(key):
            rows = slice(row, row + len(piece))
            wide = piece.astype(np.float32) + np.float32(adapter.scaling) * (b[rows] @ a)
            if magnitude is not None:
                wide = (magnitude[rows].astype(np.float32) / np.linalg.norm(wide, axis=1))[:, None] * wide
            yield wide.astype(piece.dtype)
            row += len(piece)

    return View(base.specs, pieces)
