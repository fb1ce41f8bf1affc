"""Axes of charts: values to pixels, round ticks, short numbers."""
import dataclasses
import math
import re

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end]; log: logarithmic, all values positive."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, values):
        values, low, high = np.asarray(values, np.float64), self.low, self.high
        if self.log:
            values, low, high = np.log10(values), math.log10(low), math.log10(high)
        return self.start + (values - low) / (high - low) * (self.end - self.start)


def number(value: float) -> str:
    """Four significant digits with thousands separators: 12,345.6 is "12,346"."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and not 1e-4 <= size < 1e9:
        return f"{value:.3e}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(size)))}f}" if 0 < size < 1000 else f"{value:,.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values, spaced by 1, 2 or 5 times a power of ten."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive values; if few, also twos and fives, or round values."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        values = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(values) >= 4:
            return values[:: -(-len(values) // 8)]
    return ticks(low, high, 4)


def tick_name(value: float, step: float, largest: float = 0.0) -> str:
    """Shortest name exact to a fraction of `step`, in the unit of the `largest` value: 20k, 1.5M, 2e13, 5e-4."""
    size = max(abs(value), largest)
    if value and (size >= 1e9 or size < 1e-3 or size / 20 < step < 1e-3):
        digits = max(2, math.ceil(math.log10(size / step)))
        return re.sub(r"\.?0*e\+?(-?)0*", r"e\1", f"{value:.{digits}e}")
    if not value:
        return "0"
    for least, factor, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= least:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def widened(low: float, high: float) -> tuple[float, float]:
    """Both values, or a margin around them if they are too close for a float."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    size = max(abs(low) * 0.05, 1e-3 if abs(low) < 1e-3 else 0.0)
    return low - size, high + size


def with_margin(low: float, high: float, below: bool = True) -> tuple[float, float]:
    low, high = widened(low, high)
    margin = 0.05 * (high - low)
    return low - margin * below, high + margin
