"""Train under a supervisor, on every host the same command; or generate, or evaluate:

    python -m softmask_jax.supervise --config=configs/mdlm_owt.py --workdir=/shared/runs/owt
    python -m softmask_jax.supervise generate --checkpoint=runs/owt --prompts=prompts.jsonl --out=/shared/answers.jsonl

It takes the flags of `softmask_jax.main` (`generate`, `evaluate`) and runs it as a watched process. When a host's process
dies or stalls, the supervisors of all hosts say so in one line, end theirs, meet, and start again from the last checkpoint.
Exit status 0 (done, or stopped and saved), 2 and 130 are never restarted. At SIGTERM and Ctrl-C all hosts save."""
import argparse
import contextlib
import signal
import sys
import time

from softmask_jax import main
from softmask_jax.config.command_line import command, command_parser, say
from softmask_jax.distributed import hosts, peers
from softmask_jax.distributed.child_process import Watched, in_words
from softmask_jax.distributed.peers import ENDS, OVER, Peer, Peers, RUNNING, WAITING
from softmask_jax.io.paths import remove_tree, to_path

NEVER = {2: "its command line was refused", 130: "its process was interrupted"}
LONGEST_PAUSE = 300.0
# Commands whose hosts share rows, and where their supervisors' messages are, behind --out.
SHARED = {"generate": ".supervisors", "evaluate": "/.supervisors"}
# Certainty that the cause lies on this host: an aborted or failed process may only have lost another host.
ABORTED, FAILED, STALLED, KILLED = 1, 2, 3, 4


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the supervisor's own flags, arguments of main)."""
    parser = command_parser(
        "supervise", __doc__, allow_abbrev=False,
        epilog="All other flags are those of python -m softmask_jax.main; see its --help. The run in --workdir, by "
        "default runs/<config>[-<variant>], goes on where it stopped. After the word `generate` or `evaluate` they are "
        "those of that command, with --out.",
    )  # fmt: skip
    parser.add_argument("--restarts", type=int, default=3, help="in a row that come no step further (3)")
    for name, default, meaning in (
        ("back_off", 5.0, "before the first of them, then doubled (5)"),
        ("stall", 900.0, "that a step may take (900)"),
        ("stall_else", 3600.0, "that all else may take: start, --fetch and compilation, validation, samples, saving (3600)"),
        ("silence", 60.0, "without a sign of a host's supervisor (60)"),
        ("wait", 900.0, "for hosts to come, or to come back (900)"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="SECONDS", default=default, help=meaning)
    flags, rest = parser.parse_known_args(argv)
    return flags, [word for word in rest if word != "--"]


def parse_shared(argv: list[str]) -> argparse.Namespace:
    """Flags of `generate` and `evaluate` that a supervisor needs; the command itself refuses wrong ones."""
    parser = command_parser("supervise", __doc__, allow_abbrev=False)
    parser.add_argument("--out", required=True)
    hosts.add_flags(parser)
    flags, _ = parser.parse_known_args(argv)
    return flags


class Supervisor:
    """Supervisor of one host. Hosts stay together as an attempt begins only after all have ended the one before."""

    def __init__(self, child: Watched, peers: Peers, flags: argparse.Namespace):
        self.child, self.peers, self.flags = child, peers, flags
        self.poll = min(1.0, flags.silence / 20) * max(1.0, len(peers.others) / 16)
        self.signals, self.passed = 0, 0
        self.met, self.ran, self.furthest, self.fruitless = False, False, -1, 0

    def run(self) -> int:
        """Run until done, stopped or given up; return the exit status."""
        while (code := self._meet()) is None:
            self.child.start()
            if (code := self._watch()) is not None:
                break
        return code

    def note(self, *_) -> None:
        """Signal handler: forward the first signal, exit at once on the second."""
        self.signals += 1
        # At once: the scheduler also signals the process, and ours must not arrive after it has saved.
        if self.signals == 1 and self.child.terminate():
            self.passed = 1

    def _meet(self) -> int | None:
        """Wait until all hosts are at the same new attempt; returns an exit status if the run ends here."""
        self.peers.say(state=WAITING, step=-1)
        since, begin, told = time.monotonic(), None, set()
        while True:
            self._tick()
            if self.signals:
                return self._over("was stopped", 128 + signal.SIGTERM)
            if (code := self._heed()) is not None:
                return code
            if (newest := self.peers.newest()) > self.peers.mine.attempt:
                self.peers.say(attempt=newest)
                begin = None
            missing = [peer for peer in self.peers.others if not self._is_here(peer)]
            if missing:
                begin = None
                self._report_silent(missing, told)
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
        here = peer.alive and peer.quiet() < self.flags.silence
        return here and peer.sign.attempt == self.peers.mine.attempt and peer.sign.state != OVER

    def _report_silent(self, missing: list[Peer], told: set[int]) -> None:
        for peer in missing:
            if peer.process not in told and peer.quiet() > self.flags.silence:
                told.add(peer.process)
                lost = f"Lost host {peer.name}: no sign of its supervisor for {peer.quiet():.0f} s"
                state = lost if self.ran else f"Host {peer.name} has not come yet"
                self._print(f"{state}; waiting {self.flags.wait:g} s for it at most.")

    def _judge(self) -> int | None:
        """After an attempt: report why it ended; returns an exit status unless there is another one."""
        reached, most = self.child.step, self.flags.restarts
        self.fruitless = 1 if reached > self.furthest else self.fruitless + 1
        self.furthest = max(self.furthest, reached)
        cause = self._cause()
        if self.fruitless > most:
            unit = self.child.unit
            last = f"no further than {unit} {self.furthest}" if self.furthest >= 0 else f"not to a first {unit}"
            return self._over(f"gave up: {most} restarts in a row came {last}. {cause}".strip(), 1)
        pause, last = f"{self._pause():g} s", "checkpoint" if self.child.unit == "step" else self.child.unit
        self._print(f"{cause} Restart {self.fruitless} of {most} in {pause}, from the last {last}.".strip())
        return None

    def _pause(self) -> float:
        return min(self.flags.back_off * 2 ** (self.fruitless - 1), LONGEST_PAUSE) if self.fruitless else 0.0

    def _cause(self) -> str:
        """'Lost host 1 (node7): its process was killed by SIGKILL after step 7.'; "" if already reported."""
        signs = [self.peers.mine, *(peer.sign for peer in self.peers.others if peer.sign)]
        signs = [sign for sign in signs if sign.why and sign.attempt == self.peers.mine.attempt]
        heaviest = max((sign.weight for sign in signs), default=0)
        signs = sorted((sign for sign in signs if sign.weight == heaviest), key=lambda sign: sign.process)
        if signs:
            return f"Lost {'; '.join(f'host {sign.process} ({sign.host}): {sign.why}' for sign in signs)}."
        anew = ", ".join(peer.name for peer in self.peers.others if peer.anew)
        return f"Lost host {anew}: its supervisor started anew." if anew else ""

    def _watch(self) -> int | None:
        """Watch the process; returns an exit status if the run ends here."""
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
                ended, status = (why, 1) if code is None else (in_words(code), 1 if code > 0 else 128 - code)
                return self._over(f"was stopped, and its process {ended}", status)
            if code in NEVER:
                return self._over(f"ended: {NEVER[code]}", code)
            if code is not None:
                weight = ABORTED if code == -signal.SIGABRT else KILLED if code < 0 else FAILED
                return self._leave(f"its process {in_words(code)} {self.child.where()}", weight)
            if why:
                return self._leave(f"its process {why}", KILLED if self.child.stopped() else STALLED)
            if (code := self._heed()) is not None:
                return code
            if (newest := self.peers.newest()) > self.peers.mine.attempt:
                # Others notice first, as their processes wait for this one, but the cause is here.
                if self.child.stopped():
                    return self._leave(f"its process was stopped {self.child.where()}", KILLED, newest)
                return self._leave("", 0, newest)
            if any(peer.quiet() > self.flags.silence for peer in self.peers.others):
                return self._leave("", 0)

    def _leave(self, why: str, weight: int, attempt: int | None = None) -> None:
        """Kill the child, then publish the next attempt; peers rely on this order."""
        self.child.kill()
        attempt = self.peers.mine.attempt + 1 if attempt is None else attempt
        self.peers.say(state=WAITING, attempt=attempt, why=why, weight=weight)

    def _finish(self) -> int | None:
        """Done here, but stay: others need this host again if one of them dies just before its end."""
        self.child.kill()  # its children, if any
        self.peers.say(state=peers.DONE)
        while any(peer.quiet() < self.flags.silence and peer.sign.state not in ENDS for peer in self.peers.others):
            self._tick()
            if self.peers.newest() > self.peers.mine.attempt:
                return None
            if self.signals > self.passed:
                break
        return 0

    def _heed(self) -> int | None:
        """Exit status of a host that is over, as the others cannot continue without it."""
        mine = self.peers.mine
        for peer in self.peers.others:
            if peer.alive and (theirs := peer.sign.processes) != mine.processes:
                return self._over(f"was told of {mine.processes} processes, host {peer.name} of {theirs}", 2)
            if peer.alive and peer.sign.state == OVER:
                return self._over(f"ends, as host {peer.name} {peer.sign.why}", peer.sign.code)
        return None

    def _over(self, why: str, code: int) -> int:
        self.child.kill()
        self.peers.say(state=OVER, why=why, code=code)
        self._print(f"Host {self.peers.mine.process} {why}{'' if why[-1] in '.?' else '.'}")
        return code

    def _tick(self) -> None:
        time.sleep(self.poll)
        self.peers.look()
        self.peers.say(step=self.child.step if self.ran else -1)

    @staticmethod
    def _print(line: str) -> None:
        # Leading newline: an unfinished progress bar may be there.
        say(f"\nSupervisor: {line}")


@command(result=False)
def supervise(argv: list[str]) -> int:
    """Exit status of the last attempt: as main's; 1 if given up; 143 if stopped unsaved."""
    flags, rest = parse(argv)
    if rest[:1] and rest[0] in SHARED:
        name, rest, unit = rest[0], rest[1:], "row"
        options = parse_shared(rest)
        folder = f"{options.out}{SHARED[name]}"
    else:
        name, unit = "main", "step"
        options, _ = main.parse(rest)  # exits on usage errors
        folder, rest = options.workdir, [*rest, f"--workdir={options.workdir}"]
    member = hosts.from_flags(options)
    signs = Peers(folder, member.process, member.processes, every=min(5.0, flags.silence / 10))
    command = [sys.executable, "-m", f"softmask_jax.{name}", *rest]
    child = Watched(command, stall=flags.stall, stall_else=flags.stall_else, unit=unit)
    supervisor = Supervisor(child, signs, flags)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # ignored by nohup
            signal.signal(number, supervisor.note)
    try:
        code = supervisor.run()
        if name in SHARED and code == 0 and signs.shared and member.process == 0:
            time.sleep(4 * supervisor.poll)  # until the others know that this host is done
            with contextlib.suppress(OSError):
                remove_tree(to_path(folder))
        return code
    finally:
        child.close()


if __name__ == "__main__":
    sys.exit(supervise())
