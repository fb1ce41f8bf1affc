"""Settings of soft-masking; without JAX, for command lines."""
import dataclasses

VARIANTS = ("topk", "full", "slerp", "hidden", "none")
SCHEDULES = ("none", "linear", "stepwise")


@dataclasses.dataclass(frozen=True)
class SoftMask:
    """How predictions are fed back at masked positions; the default is not at all."""

    variant: str = "none"  # of the mixture, see `soft_masking.blend`; `none` is plain masked diffusion
    k: int = 1  # tokens that are fed back
    schedule: str = "none"  # of a factor on lambda while decoding, see `soft_masking.schedule_factor`

    def __post_init__(self):
        for name, names in (("variant", VARIANTS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(names)}.")
        if self.k < 1:
            raise ValueError(f"soft-masking feeds back at least 1 token, k cannot be {self.k}.")

    @classmethod
    def from_config(cls, section) -> "SoftMask":
        """From the section `soft_mask` of a config."""
        return cls(section.variant, section.k)

    @property
    def on(self) -> bool:
        return self.variant != "none"

    @property
    def reads(self) -> int:
        """How many of the largest logits come with the feedback; `full` makes its own from the hidden states."""
        return self.k if self.variant in ("topk", "slerp", "hidden") else 0

    @property
    def reads_hidden(self) -> bool:
        """Whether the feedback needs the hidden states, too."""
        return self.variant in ("full", "hidden")
