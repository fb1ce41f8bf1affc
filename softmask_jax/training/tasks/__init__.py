"""What a run trains: the train loop asks its task for batches, a step, scores and samples."""
from pathlib import Path
from typing import Any, ContextManager, Iterator, Protocol

from softmask_jax.training.tasks.conversations import Conversations
from softmask_jax.training.tasks.running_text import RunningText

__all__ = ["Conversations", "RunningText", "Task", "make"]


class Task(Protocol):
    """Everything that depends on the model and its objective.

    denoiser, tokenizer: see `denoiser.Denoiser`, `data.Tokenizer`. info: what is known of the data, JSON-able, with its
    "fingerprint". row_length: tokens of a row, on average. make_step(tx): the pure train step,
    `.train_step(state, batch, root_key) -> (state, Metrics)`.
    """

    denoiser: Any
    tokenizer: Any
    info: dict
    row_length: int

    def save_tokenizer(self, folder: Path) -> None:
        """Everything that turns texts into ids and back, for whoever loads the run."""

    def make_step(self, tx) -> Any: ...

    def load_base(self, shapes: dict) -> dict:
        """The base that is fine-tuned, or what stays frozen of it, laid out as `shapes` say; {} for a new model."""

    def batches(self, start_step: int) -> ContextManager[Iterator[dict]]:
        """This host's share of the training batches from `start_step` on."""

    @property
    def forwards_per_step(self) -> float:
        """What a step of a single pass costs, in forward passes."""

    def validate(self, state, *, final: bool) -> dict[str, float]:
        """A row of scores, of the whole validation split at the end of a run."""

    def rank(self, row: dict[str, float]) -> dict[str, float]:
        """The score, to be small, that ranks a checkpoint."""

    def describe(self, row: dict[str, float]) -> str:
        """A row of scores in words."""

    def sample(self, state, step: int) -> list[str]:
        """Texts."""

    def describe_data(self) -> str: ...


def make(config, mesh) -> Task:
    """The task that a config describes. Raises ValueError or OSError when its data or sizes do not fit."""
    return (Conversations if config.data.source == "chat" else RunningText)(config, mesh)
