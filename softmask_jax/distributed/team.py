"""Hosts that share rows of work which are independent of each other, as generation and evaluation do.

They need no collectives: each computes on its own devices and writes files of its own. They meet once, like the hosts of
a training run (`rendezvous`), and then tell each other by small files that they are alive (`peers`)."""
import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator, Mapping

from softmask_jax.distributed import clusters, hosts, peers
from softmask_jax.distributed.heartbeat import Heartbeat
from softmask_jax.distributed.hosts import Member
from softmask_jax.io.answers import Hosts
from softmask_jax.io.paths import in_bucket, remove_tree

# Messages within the silence after which a host counts as lost.
MESSAGES = 10
GO_ON = "What was done is kept: the same command, on as many hosts as you like, goes on from there."


@contextlib.contextmanager
def joined(member: Member, config: Mapping, folder: str | os.PathLike) -> Iterator[Hosts]:
    """This process among the others, which all came with an equal nested `config` and see the same `folder`; they get
    to know whether the block ended well. RuntimeError of one line, here and by `Hosts.check`: a host is missing,
    differs, was silent for `member.heartbeat_seconds`, or has failed."""
    beats, rows = Heartbeat(), 0

    def progress(count: int) -> None:
        nonlocal rows
        rows += count
        beats.beat(rows, "working")

    if member.processes == 1:
        yield Hosts(check=functools.partial(progress, 0), progress=progress)
        return
    every = max(min(member.heartbeat_seconds / MESSAGES, 5.0), 0.1)
    # Before they meet: a message is then newer than this process's first look.
    exchange = peers.Peers(folder, member.process, member.processes, every=every)
    ended, lock, why = threading.Event(), threading.Lock(), "it was killed"

    def speak() -> None:
        while not ended.wait(every):
            with lock:
                exchange.say()
                exchange.look()

    def check() -> None:
        progress(0)
        with lock:
            exchange.look()
        for peer in exchange.others:
            if problem := _problem(peer, member.heartbeat_seconds):
                raise RuntimeError(f"Host {peer.name} {problem}. {GO_ON}")

    speaker = threading.Thread(target=speak, name="signs of life", daemon=True)
    try:
        speaker.start()
        # JAX is to know of the others only where a device needs it: a TPU's library starts on all hosts of a pod.
        meet = hosts.start if clusters.has_tpu() or member.local_device_ids is not None else hosts.meet
        meet(member, config, folder)
        yield Hosts(member.process, member.processes, check, progress)
        why = ""
    except BaseException as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise
    finally:
        ended.set()
        speaker.join()
        exchange.say(state=peers.OVER if why else peers.DONE, why=why)
        if why:
            hosts.leave_soon(1)
    if member.process == 0:
        _remove_messages(exchange, 3 * every)


def _remove_messages(exchange: peers.Peers, seconds: float) -> None:
    """Remove the messages if all others end soon; nobody reads them any more."""
    deadline = time.monotonic() + seconds
    while not all(peer.alive and peer.sign.state == peers.DONE for peer in exchange.others):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
        exchange.look()
    with contextlib.suppress(OSError):
        remove_tree(exchange.folder)
        if not in_bucket(exchange.folder):
            exchange.folder.parent.rmdir()


def _problem(peer: peers.Peer, seconds: float) -> str:
    """What is wrong with a host; "" for nothing."""
    if peer.anew:
        return "was started again"
    if peer.alive and peer.sign.state == peers.OVER:
        return f"has ended ({peer.sign.why})"
    return f"was silent for {seconds:g} s" if peer.quiet() > seconds else ""
