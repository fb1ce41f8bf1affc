"""Runs with a mishap: numbers that are not finite, a folder in use, a full disk; and what is said meanwhile."""
import os
import resource

import jax
import numpy as np
import pytest

from softmask_jax import main
from softmask_jax.distributed import sharding
from softmask_jax.io.run_folder import RunFolder
from softmask_jax.training import loop
from tests.helpers import tiny_run
from tests.helpers.tiny_run import arrays, rows
from tests.helpers.tiny_run import home as home  # the fixture


def test_a_non_finite_loss_stops_the_run_and_is_never_saved(home, monkeypatch):
    home.run("exploding", stop_at=2, train__log_every=50)
    restore = loop.Trainer._restore_or_initialise

    def enormous(trainer):
        state, start = restore(trainer)
        return state._replace(params=jax.tree.map(lambda x: x * 1e30, state.params)), start

    monkeypatch.setattr(loop.Trainer, "_restore_or_initialise", enormous)
    with pytest.raises(loop.NonFinite, match=r"not finite at step 3\. The last good checkpoint is step 2 in"):
        home.run("exploding", train__log_every=50)
    run = home.folder / "exploding"
    assert os.listdir(run / "checkpoints") == ["2"]
    assert all(np.isfinite(value).all() for value in arrays(run, 2).values())
    assert [(row["step"], row["kind"]) for row in rows(run)] == [(2, "train")]


@pytest.mark.full
def test_a_learning_rate_far_too_large_is_found_out(home):
    with pytest.raises(loop.NonFinite, match=r"not finite at step \d+\. The last good checkpoint is step 2 in"):
        home.run("reckless", optimizer__learning_rate=1e30, checkpoint__every=2)


def test_a_non_finite_moment_is_never_saved(home, monkeypatch):
    save = loop.Trainer._save

    def rotten(trainer, step, state, *rest):
        moments = jax.tree.map(lambda x: x * np.nan if x.dtype == np.float32 else x, state.opt_state)
        save(trainer, step, state._replace(opt_state=moments), *rest)

    monkeypatch.setattr(loop.Trainer, "_save", rotten)
    with pytest.raises(loop.NonFinite, match="a moment is not finite at step 4. There is no checkpoint yet"):
        home.run("rotten")
    assert not (home.folder / "rotten" / "checkpoints").exists()


def test_a_second_run_in_the_same_folder_is_refused(home):
    with RunFolder(home.folder / "held"), pytest.raises(RuntimeError, match="in use by process .* another --workdir"):
        home.run("held")


@pytest.mark.full
def test_closed_soft_masking_is_warned_of_once_and_only_while_closed(home, capsys):
    home.run("closed", stop_at=6, soft_mask__init_scale=0.0)
    said = capsys.readouterr().out
    assert said.count("Warning: the mean lambda is") == 1 and "init_scale starts it higher" in said
    home.run("open", stop_at=2)
    said = capsys.readouterr().out
    assert "Warning" not in said and said.count("soft-masking is open") == 1


def test_a_full_disk_ends_the_run_with_one_line(home, tmp_path, capsys):
    """A limit on the size of files stands for the disk."""
    settings = tiny_run.settings(home.folder, train__log_every=1)
    path = tiny_run.write_config(tmp_path / "tiny.py", settings)
    command = ["--config", str(path), "--workdir", str(tmp_path / "run")]
    mesh, limits = sharding.make_mesh(1, devices=jax.devices()[:1]), resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.sharding, "make_mesh", lambda **_: mesh)
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
        try:
            status = main.main(command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        errors = capsys.readouterr().err
        assert status == 1 and errors.count("Error:") == 1 and "Traceback" not in errors
        assert "File too large" in errors.splitlines()[-1] and "ree space" in errors.splitlines()[-1]
        assert main.main(command) == 0
