"""The benchmark of a run's folder in a bucket beside one on the disk."""
import json
import os
import subprocess
import sys

import pytest

from tests.helpers.xla_flags import ONE_DEVICE


@pytest.mark.full
def test_runs_and_saves_are_measured_in_both_and_requests_are_counted(tmp_path):
    words = ["--config=configs/stdlib.py:smoke", f"--config.data.cache_dir={tmp_path}", f"--json={tmp_path / 'x.json'}",
             "--rounds=1", "--megabytes=2", "--config.train.steps=4", "--config.train.log_every=2"]  # fmt: skip
    # In a process of its own: TensorStore reads once where its store is.
    command = [sys.executable, "-m", "softmask_jax.benchmarks.bucket", *words]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ONE_DEVICE})
    figures = json.loads((tmp_path / "x.json").read_text("utf-8"))
    (disk,), (there,) = figures["saves"]["disk"], figures["saves"]["bucket"]
    assert disk["requests"] == disk["bytes"] == 0 and there["requests"] > 10 and there["bytes"] > 1000
    assert figures["runs"]["bucket"][0]["steps_per_second"] > 0
    assert "| bucket" in output.stdout
