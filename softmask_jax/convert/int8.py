"""Int8 kernels for a frozen base: its linear layers, quantised as by `models.nn.layers` while they are read."""
import collections
import dataclasses
import re
from collections.abc import Iterator

import numpy as np

from softmask_jax.convert.key_tables import Spec
from softmask_jax.convert.model import Model, keys_of
from softmask_jax.convert.tensors import Tensors


def quantise(model: Model) -> Model:
    """The model with int8 kernels, itself if it has them. Raises ValueError for one that cannot be a base."""
    products = keys_of(model.kind).products
    if products is None:
        raise ValueError(f"--int8 is for a Dream model or a LLaDA, whose frozen base it becomes; this is {model.kind}.")
    if model.about.get("base_dtype") == "int8":
        return model
    tensors = Quantised(model.tensors, products.kernel())
    return dataclasses.replace(model, tensors=tensors, about=model.about | {"base_dtype": "int8"})


def quantised(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows [out, in] -> int8 [out, in], float32 scales [out]: 1 for rows of zeros, not finite for rows that are not."""
    wide = rows.astype(np.float32)
    largest = np.abs(wide).max(1)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32(127))
    with np.errstate(invalid="ignore"):
        wide /= scale[:, None]
        return np.rint(wide, out=wide).astype(np.int8), scale


class Quantised:
    """Tensors, those of `kernels` as int8 with scales "...weight_scale". ValueError for a kernel not finite."""

    def __init__(self, tensors: Tensors, kernels: re.Pattern):
        self.tensors, self.kernels, self.specs = tensors, kernels, {}
        self._scales: dict[str, np.ndarray] = {}
        for key, spec in tensors.specs.items():
            kernel = kernels.fullmatch(key) and len(spec.shape) == 2
            self.specs[key] = Spec(np.dtype(np.int8), spec.shape) if kernel else spec
            if kernel:
                self.specs[f"{key}_scale"] = Spec(np.dtype(np.float32), spec.shape[:1])

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        kernel = key.removesuffix("_scale")
        if not self.kernels.fullmatch(kernel):
            yield from self.tensors.pieces(key)
        elif key == kernel:
            yield from self._kernel(key)
        else:
            # Reading the kernel leaves its scales.
            if kernel not in self._scales:
                collections.deque(self._kernel(kernel), maxlen=0)
            yield self._scales[kernel]

    def _kernel(self, key: str) -> Iterator[np.ndarray]:
        scales = []
        for piece in self.tensors.pieces(key):
            values, scale = quantised(piece)
            if not np.isfinite(scale).all():
                raise ValueError(f"{key} holds numbers that are not finite, which int8 cannot; download it again.")
            scales.append(scale)
            yield values
        self._scales[key] = np.concatenate(scales)
