"""Processes that share out the parts of a preparation, and the bar that shows how far they are."""
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
    """(task, function(job, task, progress)) of each task, in any order; few tasks are handed out ahead.

    One worker is this process; several are spawned, and die with it. `progress(documents, tokens)` moves the bar.

    Raises:
      RuntimeError: a worker was killed. And what the function raises.
    """
    tell = _teller(bar)
    if workers == 1 or len(tasks) < 2:
        yield from ((task, function(job, task, tell)) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    counters, told = (context.Value("q"), context.Value("q")), (0, 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(tasks)), context, _start, (function, job, os.getpid(), counters)
    )
    left, pending = iter(tasks), set()
    try:
        while True:
            pending |= {pool.submit(_work, task) for task in itertools.islice(left, 2 * workers - len(pending))}
            if not pending:
                break
            done, pending = concurrent.futures.wait(pending, 0.5, concurrent.futures.FIRST_COMPLETED)
            now = tuple(counter.value for counter in counters)
            tell(now[0] - told[0], now[1] - told[1])
            told = now
            yield from (future.result() for future in done)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker was killed, perhaps for want of memory: run the same command again, it goes on where it was; "
            "--workers=N with a smaller N needs less memory."
        ) from error
    finally:
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)


def progress_bar(what: str, total: int, unit: str) -> tqdm:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=True, dynamic_ncols=True)


def _teller(bar: tqdm) -> Callable[[int, int], None]:
    """How documents and tokens become progress."""
    tokens = 0

    def tell(documents: int, more: int) -> None:
        nonlocal tokens
        tokens += more
        bar.update(documents)
        if tokens and (seconds := bar.format_dict["elapsed"]):
            bar.set_postfix_str(f"{tokens / seconds / 1e6:.2f}M tokens/s", refresh=False)

    return tell


# What a worker process was started with.
_worker: dict = {}


def _start(function: Callable, job: Job, parent: int, counters: tuple) -> None:
    """Makes this process a worker: it leaves Ctrl-C to its parent and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a worker for every core
    _worker.update(function=function, job=job, counters=counters)


def _work(task) -> tuple:
    def progress(*counts: int) -> None:
        for counter, count in zip(_worker["counters"], counts, strict=True):
            with counter.get_lock():
                counter.value += count

    return task, _worker["function"](_worker["job"], task, progress)
