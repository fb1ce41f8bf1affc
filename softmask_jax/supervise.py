"""Train under a supervisor, on every host the same command:

    python -m softmask_jax.supervise --config=configs/mdlm_owt.py --workdir=/shared/runs/owt

It takes what `softmask_jax.main` takes and runs it as a process that it watches. When a host's process dies or stalls,
the supervisors of all hosts say so in one line, end theirs, meet, and start again from the last checkpoint.
Exit status 0 (done, or stopped and saved), 2 and 130 are never restarted. SIGTERM and Ctrl-C are passed on: all hosts save.
"""
import argparse
import signal
import sys
import time

from softmask_jax import main
from softmask_jax.config.command_line import command, say
from softmask_jax.distributed import hosts, peers
from softmask_jax.distributed.child_process import Watched, in_words
from softmask_jax.distributed.peers import ENDS, OVER, Peer, Peers, RUNNING, WAITING

NEVER = {2: "its command line was refused", 130: "its process was interrupted"}
LONGEST_PAUSE = 300.0
# How sure it is that the cause lies on a host whose process ended so: one that JAX ends, or whose exchange with another
# fails, has perhaps only lost that other one; nothing but its own host kills or stops a process.
ABORTED, FAILED, STALLED, KILLED = 1, 2, 3, 4


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The supervisor's own flags; the words that are main's."""
    parser = argparse.ArgumentParser(
        prog="python -m softmask_jax.supervise", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of python -m softmask_jax.main; see its --help. The run in --workdir goes on "
        "where it stopped.",
    )  # fmt: skip
    seconds = dict(type=float, metavar="SECONDS")
    parser.add_argument("--restarts", type=int, default=3, help="in a row that come no step further (3)")
    parser.add_argument("--back_off", default=5.0, help="before the first of them, then doubled (5)", **seconds)
    parser.add_argument("--stall", default=900.0, help="that a step may take (900)", **seconds)
    parser.add_argument(
        "--stall_else", default=3600.0, **seconds,
        help="that all else may take: start and compilation, validation, samples, saving (3600)",
    )  # fmt: skip
    parser.add_argument("--silence", default=60.0, help="without a sign of a host's supervisor (60)", **seconds)
    parser.add_argument("--wait", default=900.0, help="for hosts to come, or to come back (900)", **seconds)
    flags, rest = parser.parse_known_args(argv)
    return flags, [word for word in rest if word != "--"]


class Supervisor:
    """Of one host. The rule that keeps hosts together: an attempt begins when every host has ended the one before."""

    def __init__(self, child: Watched, peers: Peers, flags: argparse.Namespace):
        self.child, self.peers, self.flags = child, peers, flags
        self.poll = min(1.0, flags.silence / 20) * max(1.0, len(peers.others) / 16)
        self.signals, self.passed = 0, 0
        self.met, self.ran, self.furthest, self.fruitless = False, False, -1, 0

    def run(self) -> int:
        """Until the run is done, stopped or given up; the exit status."""
        while True:
            code = self._meet()
            if code is None:
                self.child.start()
                code = self._watch()
            if code is not None:
                return code

    def note(self, *_) -> None:
        """A signal to stop, handed on; a second one ends the process at once."""
        self.signals += 1
        # Not at the next look: a scheduler sends it to the process too, which must not have one of them when it has
        # saved and leaves.
        if self.signals == 1 and self.child.terminate():
            self.passed = 1

    def _meet(self) -> int | None:
        """Wait until all hosts are at the same attempt and theirs has ended; an exit status where that is the end."""
        self.peers.say(state=WAITING, step=-1)
        since, begin, told = time.monotonic(), None, set()
        while True:
            self._tick()
            if self.signals:
                return self._over("was stopped", 128 + signal.SIGTERM)
            if (code := self._heed()) is not None:
                return code
            if (newest := self._newest()) > self.peers.mine.attempt:
                self.peers.say(attempt=newest)
                begin = None
            missing = [peer for peer in self.peers.others if not self._is_here(peer)]
            if missing:
                begin = None
                self._tell_of([peer for peer in missing if peer.process not in told], told)
                if time.monotonic() - since > self.flags.wait:
                    names = ", ".join(peer.name for peer in missing)
                    hint = "" if self.met else ": does the same command run there, in a --workdir that all hosts share?"
                    return self._over(f"waited {self.flags.wait:g} s in vain for host {names}{hint}", 1)
            elif begin is None:
                self.met = True
                if self.ran and (code := self._judge()) is not None:
                    return code
                begin = time.monotonic() + self._pause()
                self.ran = False
            elif time.monotonic() >= begin:
                return None

    def _is_here(self, peer: Peer) -> bool:
        sign = peer.sign
        here = peer.alive and peer.quiet() < self.flags.silence
        return here and sign.attempt == self.peers.mine.attempt and sign.state != OVER

    def _tell_of(self, missing: list[Peer], told: set[int]) -> None:
        for peer in missing:
            if peer.quiet() > self.flags.silence:
                told.add(peer.process)
                lost = f"Lost host {peer.name}: no sign of its supervisor for {peer.quiet():.0f} s"
                self._print(
                    f"{lost if self.ran else f'Host {peer.name} has not come yet'}; waiting {self.flags.wait:g} s for it "
                    "at most."
                )

    def _judge(self) -> int | None:
        """After an attempt: say why it ended, and whether there is another one."""
        reached, most = self.child.step, self.flags.restarts
        self.fruitless = 1 if reached > self.furthest else self.fruitless + 1
        self.furthest = max(self.furthest, reached)
        cause = self._cause()
        if self.fruitless > most:
            last = f"no further than step {self.furthest}" if self.furthest >= 0 else "not to a first step"
            return self._over(f"gave up: {most} restarts in a row came {last}. {cause}".strip(), 1)
        when = f"in {self._pause():g} s, from the last checkpoint"
        self._print(f"{cause} Restart {self.fruitless} of {most} {when}.".strip())
        return None

    def _pause(self) -> float:
        return min(self.flags.back_off * 2 ** (self.fruitless - 1), LONGEST_PAUSE) if self.fruitless else 0.0

    def _cause(self) -> str:
        """'Lost host 1 (node7): its process was killed by SIGKILL after step 7.'; "" where that has been said."""
        signs = [self.peers.mine, *(peer.sign for peer in self.peers.others if peer.sign)]
        signs = [sign for sign in signs if sign.why and sign.attempt == self.peers.mine.attempt]
        heaviest = max((sign.weight for sign in signs), default=0)
        found = sorted((sign for sign in signs if sign.weight == heaviest), key=lambda sign: sign.process)
        said = "; ".join(f"host {sign.process} ({sign.host}): {sign.why}" for sign in found)
        anew = ", ".join(peer.name for peer in self.peers.others if peer.anew)
        return f"Lost {said}." if said else f"Lost host {anew}: its supervisor started anew." if anew else ""

    def _watch(self) -> int | None:
        """While the process runs; an exit status where its end is the end of the run here."""
        self.ran = True
        for peer in self.peers.others:
            peer.anew = False
        self.peers.say(state=RUNNING, why="", weight=0)
        while True:
            self._tick()
            if self.signals > self.passed:
                (self.child.kill if self.passed else self.child.terminate)()
                self.passed = self.signals
            code = self.child.ended()
            why = self.child.stalled() if code is None else ""
            if code == 0:
                return self._finish()
            if self.signals and (why or code is not None):
                ended = in_words(code) if code is not None else why
                return self._over(f"was stopped, and its process {ended}", 1 if code is None or code > 0 else 128 - code)
            if code in NEVER:
                return self._over(f"ended: {NEVER[code]}", code)
            if code is not None:
                weight = {-signal.SIGABRT: ABORTED}.get(code, KILLED if code < 0 else FAILED)
                return self._leave(f"its process {in_words(code)} {self.child.where()}", weight)
            if why:
                return self._leave(f"its process {why}", KILLED if self.child.stopped() else STALLED)
            if (code := self._heed()) is not None:
                return code
            if self._newest() > self.peers.mine.attempt:
                # Others see it first, as their processes wait for this one; but it is the one that does not go on.
                stopped = self.child.stopped()
                why = f"its process was stopped {self.child.where()}" if stopped else ""
                return self._leave(why, KILLED * stopped, self._newest())
            if any(peer.quiet() > self.flags.silence for peer in self.peers.others):
                return self._leave("", 0)

    def _leave(self, why: str, weight: int, attempt: int | None = None) -> None:
        """End this attempt. Only then the others learn of it: whoever sees the new number knows that ours is dead."""
        self.child.kill()
        attempt = self.peers.mine.attempt + 1 if attempt is None else attempt
        self.peers.say(state=WAITING, attempt=attempt, why=why, weight=weight)

    def _finish(self) -> int | None:
        """Done here. The others may need this host once more, where one of them died just before its end."""
        self.child.kill()  # what it has started, if anything
        self.peers.say(state=peers.DONE)
        while any(peer.quiet() < self.flags.silence and peer.sign.state not in ENDS for peer in self.peers.others):
            self._tick()
            if self._newest() > self.peers.mine.attempt:
                return None
            if self.signals > self.passed:
                break
        return 0

    def _heed(self) -> int | None:
        """The exit status of a host that is over: without it the others cannot go on."""
        mine = self.peers.mine
        for peer in self.peers.others:
            if peer.alive and peer.sign.processes != mine.processes:
                return self._over(
                    f"was told of {mine.processes} processes, host {peer.name} of {peer.sign.processes}", 2
                )
            if peer.alive and peer.sign.state == OVER:
                return self._over(f"ends, as host {peer.name} {peer.sign.why}", peer.sign.code)
        return None

    def _over(self, why: str, code: int) -> int:
        self.child.kill()
        self.peers.say(state=OVER, why=why, code=code)
        self._print(f"Host {self.peers.mine.process} {why}{'' if why[-1] in '.?' else '.'}")
        return code

    def _newest(self) -> int:
        return max((peer.sign.attempt for peer in self.peers.others if peer.alive), default=-1)

    def _tick(self) -> None:
        time.sleep(self.poll)
        self.peers.look()
        self.peers.say(step=self.child.step if self.ran else -1)

    @staticmethod
    def _print(line: str) -> None:
        # A progress bar, whose line has no end, may stand there.
        say(f"\nSupervisor: {line}")


@command(result=False)
def supervise(argv: list[str]) -> int:
    """The exit status of the last attempt: as main's; 1 where it was given up; 143 where it was stopped unsaved."""
    flags, rest = parse(argv)
    given, _ = main.parse(rest)  # a wrong command line ends here
    place = hosts.from_flags(given)
    signs = Peers(given.workdir, place.process, place.processes, every=min(5.0, flags.silence / 10))
    command = [sys.executable, "-m", "softmask_jax.main", *rest]
    child = Watched(command, stall=flags.stall, stall_else=flags.stall_else)
    supervisor = Supervisor(child, signs, flags)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's
            signal.signal(number, supervisor.note)
    try:
        return supervisor.run()
    finally:
        child.close()


if __name__ == "__main__":
    sys.exit(supervise())
