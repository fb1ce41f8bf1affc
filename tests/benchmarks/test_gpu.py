"""The GPU's benchmark at toy sizes on a CPU: it runs to its end and says what it could not run."""
import json
import subprocess

import pytest

from softmask_jax.benchmarks import gpu, gpu_parts
from tests.launch.world import ROOT


@pytest.mark.full
def test_every_part_runs_to_its_end_at_toy_size(tmp_path, capsys):
    page, figures = tmp_path / "page.md", tmp_path / "out.json"
    assert gpu.main(["--toy", "--rounds=2", "--device=cpu", f"--out={page}", f"--json={figures}"]) == 0
    text, parts = page.read_text("utf-8"), json.loads(figures.read_text("utf-8"))["parts"]
    assert text in capsys.readouterr().out and all(f"## {name}" in text for name in gpu.PARTS)
    verdicts = {row["name"]: row["ok"] for row in parts["correctness"]["rows"]}
    assert [ok for name, ok in verdicts.items() if "cuDNN" not in name] == [True] * 4
    assert text.count("not run: needs a CUDA GPU") == 4 and "Skipped: " in text and "9,407" in text
    for name in ("mdlm", "dream"):
        (row,) = parts[name]["rows"]
        assert row["one_pass"]["tokens_per_second"] > 0 and row["two_pass"]["mfu"] > 0 and row["ratio"] > 0
    assert [row["model"] for row in parts["decoding"]["rows"]] == ["MDLM", "Dream"]


def test_a_part_that_fails_or_is_too_far_off_fails_the_whole():
    row = gpu_parts._judged("loss", 0.02)
    assert row["ok"] is False and gpu_parts._judged("same likeliest token", 0.95)["ok"]
    assert gpu.failed({"correctness": {"rows": [row]}}) and gpu.failed({"mdlm": {"error": "no memory"}})
    assert not gpu.failed({"torch": {"skipped": "not installed"}, "correctness": {"rows": [row | {"ok": None}]}})


def test_a_step_without_memory_is_tried_with_rematerialisation_then_with_half_of_the_layers(monkeypatch):
    tried = []

    def step(remat, share, *_):
        tried.append((remat, share))
        raise gpu_parts.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(gpu_parts, "_step", step)
    with pytest.raises(gpu_parts.jax.errors.JaxRuntimeError):
        gpu_parts._step_that_fits(lambda remat, share: (remat, share), "dots", 1, 8, 1)
    assert tried == [("dots", 1), ("full", 1), ("full", 2)]


def test_the_script_installs_without_a_network_and_passes_flags_on(tmp_path):
    project, wheels = tmp_path / "project", tmp_path / "wheels"
    (project / ".venv-gpu" / "bin").mkdir(parents=True)
    (project / "launch").mkdir()
    wheels.mkdir()
    (project / "launch" / "gpu_bench.sh").write_bytes((ROOT / "launch" / "gpu_bench.sh").read_bytes())
    made = 'echo "venv $* from ${PIP_FIND_LINKS:-PyPI}, no index: ${PIP_NO_INDEX:-0}"'
    stubs = f"make_venv() {{ {made}; }}\naccelerator() {{ echo cuda12; }}\n"
    (project / "launch" / "venv.sh").write_text(stubs)
    python = project / ".venv-gpu" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "python $*"\n')
    python.chmod(0o755)
    words = ["bash", str(project / "launch" / "gpu_bench.sh"), "--toy", "--torch", f"--wheels={wheels}", "--rounds=3"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    venv, torch, run = done.stdout.splitlines()
    assert venv == f"venv .venv-gpu cuda12 from {wheels}, no index: 1" and torch.endswith("pip-version-check torch")
    assert run == "python -m softmask_jax.benchmarks.gpu --out=gpu_bench.md --toy --rounds=3"
    refused = subprocess.run([*words[:2], "--wheels=/nowhere"], capture_output=True, text=True)
    assert refused.returncode == 2 and "/nowhere is not a folder" in refused.stderr
