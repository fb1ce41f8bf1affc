"""The evaluation tasks by name."""
from softmask_jax.data.sources.records import nearest
from softmask_jax.evaluate.code.problems import HUB
from softmask_jax.evaluate.code.task import CodeTask
from softmask_jax.evaluate.generative.task import Generative
from softmask_jax.evaluate.perplexity.task import Validation
from softmask_jax.evaluate.task import Task
from softmask_jax.io.files import split_paths

TASKS: dict[str, Task] = {task.name: task for task in (Validation(), Generative(), *map(CodeTask, HUB))}


def chosen(names: str) -> list[Task]:
    """Tasks of "perplexity; generative" (or with commas). ValueError for none, or an unknown one."""
    unique = list(dict.fromkeys(split_paths(names.replace(",", ";"), ";")))
    if not unique:
        raise ValueError(f"There is nothing to measure: give --tasks with some of {', '.join(TASKS)}.")
    for name in unique:
        if name not in TASKS:
            raise ValueError(f"There is no task '{name}'; {nearest(name, TASKS)}.")
    return [TASKS[name] for name in unique]
