"""A pool of processes for the parts of a preparation, with a progress bar."""
import concurrent.futures
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from softmask_jax.data.shards.writer import Job


def run(function: Callable, job: Job, tasks: Sequence, workers: int, bar: tqdm) -> Iterator[tuple]:
    """(task, function(job, task, progress)) of each task, in any order; `progress(documents, tokens)` moves the bar.
    A single worker is this process; several are spawned and die with it. Raises RuntimeError for a killed worker."""
    tokens = 0

    def progress(documents: int, new_tokens: int) -> None:
        nonlocal tokens
        tokens += new_tokens
        bar.update(documents)
        if tokens and (seconds := bar.format_dict["elapsed"]):
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f}M tokens/s", refresh=False)

    if workers == 1 or len(tasks) < 2:
        yield from ((task, function(job, task, progress)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    counters, shown = (context.Value("q"), context.Value("q")), (0, 0)
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
            progress(now[0] - shown[0], now[1] - shown[1])
            shown = now
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        remedy = "run the same command again, it goes on where it was; --workers=N with a smaller N needs less memory."
        raise RuntimeError(f"A worker was killed, perhaps for want of memory: {remedy}") from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def progress_bar(title: str, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=title, unit=unit, unit_scale=True, dynamic_ncols=True)


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
