"""Generation and evaluation on several processes of localhost: the rows and numbers of a single one."""
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from softmask_jax.distributed import team
from softmask_jax.distributed.hosts import Member
from tests.evaluate.test_evaluate import numbers, results, words
from tests.helpers import tiny_gpt2
from tests.helpers.host_processes import PATIENCE, begin, child, finish, free_port, lost
from tests.helpers.tiny_run import home as home  # the fixture


def test_hosts_meet_and_those_that_go_on_are_told_who_has_ended_and_why(tmp_path):
    address, told = f"localhost:{free_port()}", {}

    def host(process):
        member = Member("addresses", address, 2, process, join_seconds=20.0, heartbeat_seconds=20.0)
        try:
            with team.joined(member, {"seed": 0}, tmp_path / "shared") as others:
                assert (others.process, others.processes) == (process, 2)
                if process:
                    raise ValueError("The weights are damaged.")
                while True:
                    others.check()
                    time.sleep(0.05)
        except (ValueError, RuntimeError) as error:
            told[process] = str(error)

    threads = [threading.Thread(target=host, args=(process,)) for process in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told[1] == "The weights are damaged."
    assert told[0].startswith("Host 1 (") and "has ended (The weights are damaged.). What was done is kept" in told[0]


@pytest.fixture(scope="module")
def folder(home):  # noqa: F811
    home.run("soft")
    home.run("binary", soft_mask__variant="none")
    tiny_gpt2.write(home.folder / "gpt2")
    rows = "".join(json.dumps("def f(" + "x" * (i % 3)) + "\n" for i in range(40))
    (home.folder / "prompts.jsonl").write_text(rows, "utf-8")
    return home.folder


def generate(folder: Path, out: str, processes: int, *more: str, module="generate"):
    command = [] if module == "generate" else ["generate"]  # the word after `supervise`, or a script's
    given = [f"--checkpoint={folder / 'soft'}", f"--prompts={folder / 'prompts.jsonl'}", f"--out={folder / out}"]
    return begin(module, processes, *command, *given, "--steps=8", "--batch_size=4", "--heartbeat_seconds=5", *more)


def answers(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def summary(path: Path) -> dict:
    whole = json.loads(path.with_name(f"{path.name}.summary.json").read_text("utf-8"))
    return {name: value for name, value in whole.items() if name not in ("seconds", "tokens_per_second")}


@pytest.mark.full
def test_two_and_three_hosts_answer_as_one_does(folder):
    for processes in (1, 2, 3):
        printed = finish(generate(folder, f"of-{processes}.jsonl", processes))
        assert sum("40 answers" in text for text in printed) == 1
    for processes in (2, 3):
        path = folder / f"of-{processes}.jsonl"
        assert answers(path) == answers(folder / "of-1.jsonl") and summary(path) == summary(folder / "of-1.jsonl")
        beside = sorted(other.name for other in folder.glob(f"{path.name}*"))
        assert beside == [path.name, f"{path.name}.settings.json", f"{path.name}.summary.json"]


@pytest.mark.full
@pytest.mark.parametrize("killed, number, code, why", [
    (0, signal.SIGKILL, -9, "was silent for 5 s"), (1, signal.SIGKILL, -9, "was silent for 5 s"),
    (1, signal.SIGTERM, 130, "ended (it was stopped)"),
])  # fmt: skip
def test_a_killed_host_is_named_and_other_numbers_of_hosts_go_on(folder, killed, number, code, why):
    finish(generate(folder, "whole.jsonl", 1, "--batch_size=1"))
    path = folder / f"killed-{killed}{code}.jsonl"
    processes = generate(folder, path.name, 2, "--batch_size=1")
    piece = path.with_name(f"{path.name}.hosts") / "1.jsonl" if killed else path
    until_rows(piece, 3, processes)
    processes[killed].send_signal(number)
    printed = finish(processes, [code if host == killed else 1 for host in range(2)])
    assert f"Error: Host {killed} (" in printed[1 - killed] and why in printed[1 - killed]
    made = set()
    for own in (path, path.with_name(f"{path.name}.hosts") / "1.jsonl"):
        made |= {line for line in own.read_text("utf-8").split("\n") if line.endswith("}")}
    assert 3 <= len(made) < 40
    finish(generate(folder, path.name, 3 if killed else 1, "--batch_size=1"))
    assert answers(path) == answers(folder / "whole.jsonl")
    # Rows that were there are kept, with their times.
    assert made <= set(path.read_text("utf-8").split("\n"))


@pytest.mark.full
def test_supervised_hosts_go_on_by_themselves_after_one_is_killed(folder):
    finish(generate(folder, "unsupervised.jsonl", 1, "--batch_size=1"))
    path, patience = folder / "supervised.jsonl", ["--back_off=0.1", "--silence=20"]
    supervisors = generate(folder, path.name, 2, "--batch_size=1", *patience, module="supervise")
    until_rows(path.with_name(f"{path.name}.hosts") / "1.jsonl", 3, supervisors)
    os.kill(child(supervisors[1]), signal.SIGKILL)
    for printed in finish(supervisors):
        (line,) = lost(printed)
        assert "its process was killed by SIGKILL after row" in line and "in 0.1 s, from the last row." in line
    assert answers(path) == answers(folder / "unsupervised.jsonl")
    assert not list(folder.glob("supervised.jsonl.supervisors")) + list(folder.glob("supervised.jsonl.hosts"))


@pytest.mark.full
def test_an_evaluation_goes_on_after_one_of_its_hosts_was_killed(folder):
    def start(out, hosts, *supervised):
        tasks = words(folder, "--config.code.batch_size=1", out=out, checkpoints=("soft",), tasks="perplexity; humaneval")
        return begin("supervise" if supervised else "evaluate", hosts, *supervised, *tasks, "--heartbeat_seconds=5")

    finish(start("evaluated-whole", 1))
    processes = start("evaluated-killed", 2)
    until_rows(folder / "evaluated-killed" / "soft" / "perplexity" / "result.json", 1, processes)
    processes[1].kill()
    printed = finish(processes, [1, -9])
    assert "Error: Host 1 (" in printed[0] and "was silent for 5 s" in printed[0]
    assert not (folder / "evaluated-killed" / "results.json").exists()
    finish(start("evaluated-killed", 2, "evaluate"))
    assert numbers(results(folder, "evaluated-killed")) == numbers(results(folder, "evaluated-whole"))
    assert not list((folder / "evaluated-killed").glob(".[hs]*"))  # messages of hosts and supervisors


def until_rows(path: Path, count: int, processes) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)


def evaluate(folder: Path, out: str, processes: int):
    tasks = words(folder, "--budgets=1; 1/2", "--allow_code", out=out)
    return begin("evaluate", processes, *tasks, "--heartbeat_seconds=20", flags=True)


@pytest.mark.full
def test_two_hosts_measure_what_one_does(folder):
    for processes in (1, 2):
        finish(evaluate(folder, f"evaluated-{processes}", processes))
    assert numbers(results(folder, "evaluated-2")) == numbers(results(folder, "evaluated-1"))
    assert not list((folder / "evaluated-2").rglob("*.hosts"))


POD = """import sys
from softmask_jax.distributed import team
from softmask_jax.generate import __main__ as generate
from softmask_jax.evaluate import __main__ as evaluate

team.clusters.has_tpu = lambda: True
if __name__ == "__main__":
    sys.exit({"generate": generate, "evaluate": evaluate}[sys.argv.pop(1)].main())
"""


@pytest.mark.full
def test_hosts_of_a_pod_which_jax_must_know_do_the_same(folder, tmp_path):
    """A TPU's library starts on all hosts of a pod together, so JAX is told of them all."""
    script = tmp_path / "pod.py"
    script.write_text(POD, "utf-8")
    finish(generate(folder, "alone.jsonl", 1))
    finish(generate(folder, "pod.jsonl", 2, module=script))
    assert answers(folder / "pod.jsonl") == answers(folder / "alone.jsonl")
    alone, pod = (words(folder, out=f"{name}-perplexity", tasks="perplexity") for name in ("alone", "pod"))
    finish(begin("evaluate", 1, *alone))
    finish(begin(script, 2, "evaluate", *pod))
    assert numbers(results(folder, "pod-perplexity")) == numbers(results(folder, "alone-perplexity"))
