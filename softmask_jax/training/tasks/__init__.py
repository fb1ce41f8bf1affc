"""What a run trains: running text or conversations."""
from softmask_jax.training.tasks.conversations import Conversations
from softmask_jax.training.tasks.running_text import RunningText
from softmask_jax.training.tasks.task import Task


def make(config, mesh) -> Task:
    """The task of a config. ValueError or OSError when its data or sizes do not fit."""
    return (Conversations if config.data.source == "chat" else RunningText)(config, mesh)
