"""Shape and execution common to all networks."""
import dataclasses
import math
import typing

from softmask_jax.models.nn.scan import REMAT, check_remat

VOCABULARY_MULTIPLE = 128  # shards over any usual number of devices
DTYPES = ("float32", "bfloat16")
FLASH = ("cudnn", "splash")


class Sizes:
    """Sizes that follow from others."""

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkConfig(Sizes):
    """Sizes and execution; ValueError for impossible values. Subclasses define `depth`, the number of layers."""

    implementations: typing.ClassVar[tuple[str, ...]] = ("auto", "xla")  # choices of `attention`
    policies: typing.ClassVar[tuple[str, ...]] = tuple(name for name in REMAT if name != "mlp")  # of `remat`

    vocab_size: int
    hidden_size: int
    num_heads: int
    rope_base: float
    compute_dtype: str = "float32"  # or "bfloat16"
    remat: str = "none"  # a name of `scan.REMAT`
    attention: str = "auto"
    unroll: bool = False  # a Python loop over the layers instead of a scan, for tests

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type is int and getattr(self, field.name) < 1:
                raise ValueError(f"{self._name}.{field.name} must be at least 1, got {getattr(self, field.name)}.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be divisible by 2 * num_heads = {2 * self.num_heads}: every head "
                "needs the same even width, its rotary embedding pairs channels."
            )
        if self.rope_base <= 1.0:
            raise ValueError(f"{self._name}.rope_base must be above 1, got {self.rope_base}.")
        self._check_choice("compute_dtype", DTYPES)
        self._check_choice("attention", self.implementations)
        if self.attention in FLASH and self.compute_dtype != "bfloat16":
            raise ValueError(
                f"attention={self.attention!r} computes in bfloat16 only; set compute_dtype='bfloat16' or attention='auto'."
            )
        check_remat(self.remat, self.policies)

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"Unknown {name} {getattr(self, name)!r}; choose one of {', '.join(choices)}.")
