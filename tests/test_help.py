"""Help of every command, and what a newcomer's likeliest mistakes are answered."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import command_module
ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "softmask_jax"
# Not commands of the user: they are what a sandboxed process runs.
INTERNAL = {"softmask_jax.evaluate.code.enter"}
# Names that commands had, for one release.
MOVED = {
    "softmask_jax.compare": "softmask_jax.evaluate.compare",
    "softmask_jax.evaluation.lm_eval": "softmask_jax.evaluate.lm_eval",
    "softmask_jax.plan": "softmask_jax.compile.plan",
    "softmask_jax.tiny_dream": "softmask_jax.convert.tiny_dream",
}
COMMANDS = sorted(
    {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in PACKAGE.rglob("*.py")
        # A command that has moved shows the help of its new name.
        if 'if __name__ == "__main__"' in (text := path.read_text()) and not text.startswith('"""Moved to ')
    } - INTERNAL
)  # fmt: skip


def help_of(command: str, capsys) -> str:
    module = command_module(command)
    with pytest.raises(SystemExit) as exit:
        (module.supervise if command.endswith(".supervise") else module.main)(["--help"])
    assert not exit.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_a_text_for_every_flag(command, capsys):
    said = help_of(command, capsys)
    # The usage lines hold the name too, but for "usage:".
    name = MOVED.get(command, command)
    assert re.search(rf"^    python -m {re.escape(name)} ", said, re.M), "no example"
    # What lm-evaluation-harness says of itself comes last.
    for flag, text in flags("usage:".join(said.split("usage:")[:2])):
        assert text, f"{command} says nothing of {flag}"


def test_help_loads_no_jax():
    code = """if True:
        import contextlib, importlib.util, io, runpy, sys
        from softmask_jax.__main__ import COMMANDS
        for module, _ in COMMANDS.values():
            sys.argv = [module, "--help"]
            try:
                with contextlib.redirect_stdout(io.StringIO()) as page:
                    runpy.run_module(f"softmask_jax.{module}", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                absent = module == "evaluate.lm_eval" and not importlib.util.find_spec("lm_eval")
                assert absent or not end.code and f"python -m softmask_jax.{module} " in page.getvalue(), module
            assert "jax" not in sys.modules, module
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert not done.returncode, done.stderr


def flags(said: str) -> list[tuple[str, str]]:
    """(flag, its help) of argparse's page."""
    page = said[said.index("options:") if "options:" in said else 0 :]
    found = []
    for part in re.split(r"^  (?=-)", page, flags=re.M)[1:]:
        lines = part.split("\n\n")[0].splitlines()
        # Flag and help stand on one line two spaces apart, or below each other.
        first, _, text = re.sub(r"\s{2,}", "\t", lines[0]).partition("\t")
        found.append((first, (text + " ".join(lines[1:])).strip()))
    return found


# What is typed, and what has to stand in the one line of answer.
MISTAKES = {
    "a config that is not there": ("main --config=configs/dream.py --workdir={tmp}/run", "Config files there: configs/"),
    "a key that is misspelt": (
        "main --config=configs/stdlib.py --workdir={tmp}/run --config.train.step=5", "the nearest is 'steps'"),
    "a variant that there is not": ("main --config=configs/stdlib.py:tiny --workdir={tmp}/run", "smoke"),
    "text that is not there": (
        "main --config=configs/stdlib.py --workdir={tmp}/run --config.data.source=files --config.data.paths={tmp}/*.txt",
        "{tmp}/*.txt"),
    "a mesh for more chips than there are": (
        "main --config=configs/stdlib.py:smoke --workdir={tmp}/run --config.mesh.data=3", "does not fit 1 device"),
    "Dream before it was converted": ("main --config=configs/dream7b.py --workdir={tmp}/run", "softmask_jax.convert"),
    "generating from a folder that is no run": ("generate --checkpoint={tmp} --prompt=a", "--workdir of a training run"),
    "a sampler that is misspelt": ("generate --checkpoint={tmp} --prompt=a --alg=remdm", "remdm_cap"),
    "evaluating a task that there is not": ("evaluate --checkpoint={tmp} --tasks=ppl --out={tmp}/out", "perplexity"),
    "converting a folder without weights": ("convert --src={tmp} --dst={tmp}/model", "{tmp}"),
    "a workdir that cannot be written": (
        "main --config=configs/stdlib.py:smoke --workdir=/proc/run", "Give a --workdir that can be written"),
    "a slice of TPUs that there is not": ("compile --config=configs/stdlib.py --topology=v5e-16", "v5e:4x4"),
    "a report of nothing": ("report {tmp}/nowhere", "{tmp}/nowhere"),
}


# One device, as a user's process has; here there are eight.
AS_A_PROCESS = {"a mesh for more chips than there are", "Dream before it was converted"}


def answer(words: list[str], as_a_process: bool, capsys) -> tuple[str, int]:
    """What a command says on standard error, and its exit status."""
    if as_a_process:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        command = [sys.executable, "-m", f"softmask_jax.{words[0]}", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=300)
        return done.stderr, done.returncode
    try:
        status = command_module(f"softmask_jax.{words[0]}").main(words[1:])
    except SystemExit as end:
        status = end.code
    return capsys.readouterr().err, status


@pytest.mark.full
@pytest.mark.parametrize("name", MISTAKES)
def test_a_newcomers_mistake_is_answered_in_one_line_that_helps(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which `compile` sets
    line, wanted = (text.format(tmp=tmp_path) for text in MISTAKES[name])
    said, status = answer(line.split(" "), name in AS_A_PROCESS, capsys)
    lines = [line for line in said.splitlines() if not line.startswith("usage:")]
    assert status in (1, 2) and "Traceback" not in said
    errors = [line for line in lines if "rror" in line]
    assert len(errors) == 1 and wanted in errors[0], said
