"""Names that wrappers put into a `state_dict`'s keys, such as torch.compile's `_orig_mod.`: removed and reported."""
import re
from collections.abc import Iterable

# Prefixes of a wrapped module's names, at any depth: torch.compile, DDP, Lightning, FSDP, activation checkpoints.
INSIDE = ("_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# Attributes of training scripts that hold the whole network or its average.
OUTSIDE = ("model", "net", "network", "backbone", "ema", "ema_model", "averaged_model")


def own_keys(*names: str) -> re.Pattern:
    """Pattern of the beginning of a network's own keys, for `without_wrappers`."""
    return re.compile(rf"(?<![^.])(?:{'|'.join(names)})\.")


def old_keys(pairs: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    """Old key by new key, from pairs (new, old). Raises ValueError when two keys become the same. where: the file."""
    names: dict[str, str] = {}
    for new, old in pairs:
        if new in names:
            raise ValueError(f"{where} has {new} twice, as {names[new]} and {old}, the same tensor; keep one.")
        names[new] = old
    return names


def without_wrappers(keys: Iterable[str], network: re.Pattern, where: str) -> tuple[dict[str, str], str]:
    """`old_keys` by the network's own keys (unknown keys are kept), and a note of what was removed or "".
    network: of `own_keys`. ValueError also for a wrapper on some of a module's keys only."""
    # torch's AveragedModel stores a counter beside the network.
    unwrapped = {key: _unwrapped(key, network) for key in keys if key != "n_averaged"}
    names = old_keys(((new, key) for key, (new, _) in unwrapped.items()), where)
    kinds: dict[str, dict[str, str]] = {}
    for key, (_, wrappers) in unwrapped.items():
        for module, wrapper in wrappers.items():
            kinds.setdefault(module, {}).setdefault(wrapper, key)
    for examples in kinds.values():
        if len(examples) > 1:
            one, other = list(examples.values())[:2]
            raise ValueError(f"{where} has a wrapper on some keys only, as on one of {one} and {other}; save it anew.")
    removed = sorted({wrapper for examples in kinds.values() for wrapper in examples if wrapper})
    return names, f"{where}: {', '.join(map(repr, removed))} removed from its keys." if removed else ""


def _unwrapped(key: str, network: re.Pattern) -> tuple[str, dict[str, str]]:
    """The key without wrappers, and the wrapper of each module in it; "" is the whole network."""
    own, wrapper, wrappers = [], "", {}
    for part in key.split("."):
        if part in INSIDE:
            wrapper += f"{part}."
            continue
        wrappers[".".join(own)], wrapper = wrapper, ""
        own.append(part)
    new = ".".join(own)
    match = network.search(new)
    outer = new[: match.start()] if match else ""
    if match is None or not set(outer.split(".")) <= {*OUTSIDE, ""}:
        return key, {}
    return new[len(outer) :], wrappers | {"": wrappers[""] + outer}
