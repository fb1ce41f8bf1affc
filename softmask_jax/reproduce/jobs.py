"""Jobs of a study, each with a result on the disk: a killed study goes on where it was and repeats nothing finished."""
import dataclasses
import datetime
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from softmask_jax.config.command_line import say
from softmask_jax.io.files import write_json


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of work that returns JSON values."""

    name: str  # of its file
    title: str
    cost: float  # relative to the other jobs'
    run: Callable[[], dict]


class Results:
    """Results of jobs by name, a file of JSON each in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def __getitem__(self, name: str) -> dict:
        """What the job returned. ValueError for a damaged file."""
        return self._read(name)["result"]

    def seconds(self, name: str) -> float:
        return self._read(name)["seconds"]

    def _read(self, name: str) -> dict:
        path = self.path(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, and it is made again.") from None

    def store(self, name: str, result: dict, seconds: float) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.path(name), {"seconds": round(seconds, 1), "result": result})


def complete(jobs: Sequence[Job], results: Results) -> None:
    """Run the jobs that have no result yet, with a line on each, and an estimate of the time left."""
    waiting = [job for job in jobs if job.name not in results]
    for number, job in enumerate(waiting, len(jobs) - len(waiting) + 1):
        say(f"[{number}/{len(jobs)}] {job.title}{_left(jobs, results)}")
        began = time.monotonic()
        results.store(job.name, job.run(), time.monotonic() - began)
        jax.clear_caches()  # dozens of compiled models would fill the memory


def _left(jobs: Sequence[Job], results: Results) -> str:
    """An estimate of the time left in words, from what finished jobs took; "" before the first."""
    done = [job for job in jobs if job.name in results]
    if not (cost := sum(job.cost for job in done)):
        return ""
    rate = sum(results.seconds(job.name) for job in done) / cost
    left = rate * sum(job.cost for job in jobs if job.name not in results)
    return f"; about {datetime.timedelta(seconds=round(left / 60) * 60)!s:.7} h left".replace(":00 h", " h")
