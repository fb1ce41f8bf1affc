"""A pool of processes for the parts of a preparation."""
import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from softmask_jax.config.progress import Progress
from softmask_jax.data.shards.writer import Job


def run(function: Callable, job: Job, tasks: Sequence, workers: int, shown: Progress) -> Iterator[tuple]:
    """(task, function(job, task, progress)) of each task, in any order; `progress(documents, tokens)` is shown.
    A single worker is this process; several are spawned and die with it. Raises RuntimeError for a killed worker."""
    tokens = 0

    def progress(documents: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        shown.update(documents, lambda: f"{tokens / shown.elapsed / 1e6:.2f}M tokens/s" if tokens else "")

    if workers == 1 or len(tasks) < 2:
        yield from ((task, function(job, task, progress)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    counters, before = (context.Value("q"), context.Value("q")), (0, 0)
    arguments = function, job, os.getpid(), counters
    pool = concurrent.futures.ProcessPoolExecutor(min(workers, len(tasks)), context, _start, arguments)
    left, pending = iter(tasks), set()
    try:
        while True:
            pending |= {pool.submit(_work, task) for task in itertools.islice(left, 2 * workers - len(pending))}
            if not pending:
                break
            done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
            now = tuple(counter.value for counter in counters)
            progress(now[0] - before[0], now[1] - before[1])
            before = now
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        remedy = "run the same command again, it goes on where it was; --workers=N with a smaller N needs less memory."
        raise RuntimeError(f"A worker was killed, perhaps for want of memory: {remedy}") from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


# Function, job and counters of a worker process.
_worker: dict = {}


def _start(function: Callable, job: Job, parent: int, counters: tuple) -> None:
    """Set up a worker process, which ignores Ctrl-C and dies with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one worker a core
    _worker.update(function=function, job=job, counters=counters)


def _work(task) -> tuple:
    def progress(*counts: int) -> None:
        for counter, count in zip(_worker["counters"], counts, strict=True):
            with counter.get_lock():
                counter.value += count

    return task, _worker["function"](_worker["job"], task, progress)
