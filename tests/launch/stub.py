"""What stands for gcloud, xpk, sbatch, ssh and the like in tests: copied under their names into a folder that is alone
on the PATH before the system's. It writes down how it was called and answers by `rules.json` beside it.

A rule: {"program", "when": a regular expression that is searched in the words, "answers": [{"out", "err", "code",
"sleep", "local": run the remote command here, in the home that has the host's name}]}. The first rule that fits is
taken; its n-th call gets the n-th answer, later calls the last one. Without a rule a program says nothing and ends well.
"""
import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    program, words = Path(sys.argv[0]).name, sys.argv[1:]
    piped = not os.isatty(0) and program == "ssh"
    stdin = sys.stdin.buffer.read() if piped else b""
    files = {}
    for word in words:  # what is about to be copied, as it is now
        name = word.split("=", 1)[-1]
        if os.path.isfile(name) and os.path.getsize(name) < 10_000:
            files[name] = {"mode": oct(os.stat(name).st_mode & 0o777), "text": Path(name).read_text(errors="replace")}
    with open(HERE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = choose(program, " ".join(words))
        call = {"program": program, "words": words, "stdin": stdin[:10_000].decode(errors="replace"), "files": files}
        with open(HERE / "calls.jsonl", "a") as calls:
            calls.write(json.dumps(call) + "\n")
    time.sleep(answer.get("sleep", 0))
    sys.stdout.write(answer.get("out", ""))
    sys.stderr.write(answer.get("err", ""))
    sys.stdout.flush()
    if answer.get("local"):
        host, command = words[-2].rpartition("@")[2], words[-1]
        home = HERE.parent / host
        home.mkdir(exist_ok=True)
        return subprocess.run(
            ["sh", "-c", command], input=stdin, cwd=home, env=os.environ | {"HOME": str(home)}
        ).returncode
    return answer.get("code", 0)


def choose(program: str, words: str) -> dict:
    rules = json.loads((HERE / "rules.json").read_text())
    for number, rule in enumerate(rules):
        if rule["program"] == program and re.search(rule.get("when", ""), words):
            counter = HERE / f"count-{number}"
            count = int(counter.read_text()) if counter.exists() else 0
            counter.write_text(str(count + 1))
            return rule["answers"][min(count, len(rule["answers"]) - 1)]
    return {}


if __name__ == "__main__":
    sys.exit(main())
