"""A machine with programs that only pretend: what a launch script asks of them, and what they answer."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAMS = ("gcloud", "xpk", "kubectl", "docker", "ssh", "scp", "rsync", "sbatch", "srun", "squeue", "scancel", "scontrol")
# Nothing else of the caller's environment reaches a script: it reads PYTHON, PYTHONPATH, HF_TOKEN, SLURM_* and more.
INHERITED = ("LANG", "LC_ALL", "TMPDIR", "USER", "LOGNAME", "JAX_PLATFORMS", "XLA_FLAGS")
PATIENCE = 120


class World:
    """Stubs in `folder`/bin, the only programs of these names that scripts find.

    Args:
      without: programs that are not installed.
    """

    def __init__(self, folder: Path, without: tuple[str, ...] = ()):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.rules = []
        for program in PROGRAMS:
            if program not in without:
                self.add(program)

    def add(self, program: str) -> None:
        path = self.bin / program
        path.write_text(f"#!{sys.executable} -IS\n" + (ROOT / "tests" / "launch" / "stub.py").read_text())
        path.chmod(0o755)

    def answer(self, program: str, when: str, *answers: dict) -> None:
        """To calls of a program whose words `when` is found in: these answers, one after the other."""
        self.rules.append({"program": program, "when": when, "answers": list(answers) or [{}]})

    def environment(self, **more: str) -> dict[str, str]:
        (self.bin / "rules.json").write_text(json.dumps(self.rules))
        kept = {key: os.environ[key] for key in INHERITED if key in os.environ}
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        path = f"{self.bin}:/usr/local/bin:/usr/bin:/bin"
        return kept | {"PATH": path, "HOME": str(home)} | more

    def start(self, script: str | Path, *words: str, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        """A script of launch/ by its name, or by a path as `cwd` sees it."""
        path = script if isinstance(script, Path) else ROOT / "launch" / script
        return subprocess.Popen(
            ["bash", str(path), *words], cwd=cwd, env=self.environment(**environment), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, script: str | Path, *words: str, **more) -> subprocess.CompletedProcess:
        """To its end: exit status, what it printed."""
        process = self.start(script, *words, **more)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def calls(self, program: str = "", having: str = "") -> list[dict]:
        """Those so far, of one program and with words that a regular expression is found in."""
        path = self.bin / "calls.jsonl"
        every = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [
            call for call in every
            if program in ("", call["program"]) and re.search(having, " ".join(call["words"]))
        ]  # fmt: skip

    def everything(self) -> str:
        """All words of all calls."""
        return "\n".join(" ".join([call["program"], *call["words"]]) for call in self.calls())


def value(call: dict, flag: str) -> str:
    """Of --flag=value in a call."""
    return next(word.partition("=")[2] for word in call["words"] if word.startswith(f"{flag}="))
