"""Supervisors of several hosts in threads, each with a toy process."""
import argparse
import sys
import threading
from pathlib import Path


from softmask_jax.distributed.child_process import Watched
from softmask_jax.distributed.peers import Peers
from softmask_jax.supervise import Supervisor

ROOT = Path(__file__).parent.parent.parent
FLAGS = dict(restarts=2, back_off=0.05, stall=0.6, stall_else=20.0, silence=2.0, wait=20.0)

# Each start takes the next of the plans: "6" counts to 6 and ends well; "3:kill 9", "3:exit 1" count to 3 and end so;
# "3:hang" waits for ever, as a process does whose peer is gone; "3:sleep" too, but says that it validates; ":exit 2" at once.
TOY = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[3])
from softmask_jax.distributed.heartbeat import Heartbeat
count, plans = sys.argv[1], sys.argv[2].split(",")
open(count, "a").write("x")
steps, _, end = plans[min(os.path.getsize(count), len(plans)) - 1].partition(":")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
heart = Heartbeat()
for step in range(1, int(steps or 0) + 1):
    heart.beat(step)
    time.sleep(0.03)
what, _, number = end.partition(" ")
if what == "kill":
    os.kill(os.getpid(), int(number))
if what == "exit":
    sys.exit(int(number))
if what == "sleep":
    heart.beat(step, "validation")
while what:
    time.sleep(0.1)
"""


class Hosts:
    """Supervisors in threads; `starts` counts how often each toy was started, `said` is what they print."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.said, self.codes, self.threads, self.supervisors = folder, [], {}, [], {}
        monkeypatch.setattr(Supervisor, "_print", lambda supervisor, line: self.said.append((supervisor, line)))

    def start(self, process, processes, plans, **flags):
        def run():
            command = [sys.executable, "-c", TOY, str(self.folder / f"count-{process}"), plans, str(ROOT)]
            options = argparse.Namespace(**FLAGS | flags)
            child = Watched(command, stall=options.stall, stall_else=options.stall_else)
            signs = Peers(self.folder, process, processes, every=options.silence / 10)
            self.supervisors[process] = supervisor = Supervisor(child, signs, options)
            try:
                self.codes[process] = supervisor.run()
            finally:
                child.close()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def run(self, *plans, **flags):
        """The exit statuses."""
        for process, entry in enumerate(plans):
            self.start(process, len(plans), entry, **flags)
        return self.finish()

    def finish(self):
        for thread in self.threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self.threads), self.lines()
        print(*self.lines(), sep="\n")
        return [self.codes[i] for i in sorted(self.codes)]

    def lines(self, process=None):
        return [line for supervisor, line in self.said if process in (None, supervisor.peers.mine.process)]

    def starts(self, process):
        path = self.folder / f"count-{process}"
        return path.stat().st_size if path.exists() else 0
