"""Predicted seconds of a step: a roofline at fixed shares of the makers' public figures."""
import dataclasses

from softmask_jax.compile.reading import Reading

# Shares of the public figures. Large bfloat16 products reach about 70 % of the peak, streams about 80 % of the memory's
# bandwidth. A ring along one axis of the mesh uses the links of one dimension of the network, and 90 % of those.
COMPUTE, HBM, LINKS = 0.7, 0.8, 0.9
ASSUMED = (
    f"products at {COMPUTE:.0%} of the bfloat16 peak, HBM at {HBM:.0%} of its bandwidth, collectives as rings over one "
    f"dimension of the network at {LINKS:.0%} of its links; elementwise work free; between all three overlapping "
    "perfectly (first figure) and not at all (second)"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one run on one chip for products, memory and network."""

    compute: float
    hbm: float
    ici: float
    reading: Reading

    @property
    def best(self) -> float:
        """Seconds, where products, memory and network overlap perfectly."""
        return max(self.compute, self.hbm, self.ici)

    @property
    def worst(self) -> float:
        """Seconds, one after the other."""
        return self.compute + self.hbm + self.ici

    @property
    def bound(self) -> str:
        times = {"compute": self.compute, "memory": self.hbm, "network": self.ici}
        return max(times, key=times.get)

    def tokens(self, seconds: float) -> float:
        """Tokens a second of the whole slice."""
        return self.reading.tokens / seconds

    def utilisation(self, seconds: float) -> float:
        """Of the peak, by operations that no way of computing the step can leave out (MFU)."""
        return self.reading.model_flops / seconds / self.reading.slice.chip.flops


def roofline(reading: Reading) -> Roofline:
    chip = reading.slice.chip
    return Roofline(
        compute=reading.flops / (chip.flops * COMPUTE), hbm=reading.hbm / (chip.hbm * HBM),
        ici=reading.sent / (chip.ici / chip.torus * LINKS), reading=reading,
    )  # fmt: skip
