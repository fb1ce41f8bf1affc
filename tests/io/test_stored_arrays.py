"""Names of folders that mean something elsewhere, and saves that cannot be read back."""
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from softmask_jax import main, supervise
from softmask_jax.convert.__main__ import main as convert
from softmask_jax.data.prepare import main as prepare
from softmask_jax.evaluate import __main__ as evaluate, compare
from softmask_jax.generate import __main__ as generate
from softmask_jax.io import stored_arrays, tree_files
from softmask_jax.io.checkpoint import Checkpoints
from softmask_jax.io.files import check_folder
from tests.helpers.checkpoint_states import ABSTRACT, STATES, assert_same, trees
from tests.helpers.tiny_run import settings, write_config, write_texts

NAMES = (
    "proj [v2]/a%20b#c?d*", "[ab]", "**/x", "!{a,b}::~c", "~", "-x=1;@|&$HOME", "new\nline\t", "é漢 ", "file:", "%zz",
    "x.orbax-checkpoint-tmp", "5", "ocdbt.process_0",
)  # fmt: skip
REFUSED = {
    "back\\slash": "backslash", "logs:/run": "'gs:/'", "x.__lock/run": "__lock", os.fsdecode(b"\xff"): "not UTF-8",
    "/gs/bucket/run": "gs://",
}  # fmt: skip


def save(folder, step=1, **options) -> None:
    with Checkpoints(folder, **options) as checkpoints:
        checkpoints.save(step, STATES[step], {"step": step})


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_comes_back_from_a_folder_of_any_name(tmp_path, name):
    # The first folder matches patterns such as [ab] and **; nothing of it may get into the other.
    save(tmp_path / "a", 2)
    save(tmp_path / name / "checkpoints")
    step, restored, cursor = Checkpoints(tmp_path / name / "checkpoints").restore_latest(ABSTRACT)
    assert (step, cursor) == (1, {"step": 1})
    assert_same(restored, trees(STATES[1]))
    manifest = tmp_path / name / "checkpoints/1/params/array_metadatas"
    assert len(list(manifest.iterdir())) == 1


@pytest.mark.parametrize("name, why", REFUSED.items(), ids=ascii)
def test_a_name_that_would_be_another_folder_is_refused_at_once(tmp_path, capsys, name, why):
    folder = str(tmp_path / name)
    for attempt in (check_folder, Checkpoints, lambda path: tree_files.read_trees(path, ("params",))):
        with pytest.raises(ValueError, match="rename the folder") as caught:
            attempt(folder)
        assert why in str(caught.value)
    for command in (main.parse, supervise.supervise):
        with pytest.raises(SystemExit):
            command(["--config=none.py", f"--workdir={folder}"])
        assert why in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_link_and_dots_lead_where_the_system_says(tmp_path):
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far/away")
    save(tmp_path / "link/../run")
    assert Checkpoints(tmp_path / "far/run").all_steps() == [1] and not (tmp_path / "run").exists()


# A save is read back

# The first is large enough for a file of its own; small ones lie in the database.
NOISE = np.random.default_rng(0).standard_normal(8000).astype(np.float32)
STATE = {"params": {"w": NOISE, "b": NOISE[:3]}, "ema": {"b": NOISE[:3]}}


def without_merge(patch):
    patch.setattr(stored_arrays._Literal, "glob", lambda path, pattern: [])


def without_a_chunk(patch):
    def check(folder):
        store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": "b/"}
        del tensorstore.KvStore.open(store).result()["0"]
        original(folder)

    original = tree_files.check_values
    patch.setattr(tree_files, "check_values", check)


def cut_short(patch):
    def check(folder):
        large = [path for path in (folder / "ocdbt.process_0/d").iterdir() if path.stat().length > 20_000]
        for path in large:
            os.truncate(path, 20_000)
        original(folder)

    original = tree_files.check_values
    patch.setattr(tree_files, "check_values", check)


def of_another_shape(patch):
    stored = tree_files._stored
    halved = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float16)  # noqa: E731
    patch.setattr(tree_files, "_stored", lambda folder: {path: halved(x) for path, x in stored(folder).items()})


def without_data(patch):
    patch.setattr(tree_files, "read_json", lambda folder, verified: {"cursor": {}, "metrics": {}})


@pytest.mark.parametrize("damage", [without_merge, without_a_chunk, cut_short, of_another_shape, without_data])
def test_a_save_that_cannot_be_read_back_is_none_and_the_one_before_stays(tmp_path, damage):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, STATE, {})
        checkpoints.wait()
        with pytest.MonkeyPatch.context() as patch:
            damage(patch)
            checkpoints.save(2, STATE, {"step": 2})
            with pytest.raises(RuntimeError, match="step 2.*cannot be read back.*last good checkpoint is step 1") as caught:
                checkpoints.wait()
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == ["1"]
        assert_same(checkpoints.restore_params()[1], STATE)
        checkpoints.save(2, STATE, {})
    assert Checkpoints(tmp_path).all_steps() == [2]


# The commands


@pytest.mark.full
def test_every_command_works_in_a_folder_of_any_name(tmp_path, monkeypatch, capsys):
    home = tmp_path / NAMES[0]
    write_texts(home / "texts")
    # What these names would mean as patterns and URLs.
    write_texts(tmp_path / "proj v/a b", seed=1)
    values = settings(home, model__mlp_ratio=4)
    config = write_config(home / "config:1.py", values)
    monkeypatch.chdir(home)
    _every_command(home, config, capsys)


def _every_command(home, config, capsys):
    run = ["--config=config:1.py", "--workdir=runs/a[b]"]
    assert main.main([*run, "--config.train.steps=4"]) == 0
    assert main.main([*run, "--config.train.steps=8"]) == 0
    assert "Continuing from step 4." in capsys.readouterr().out
    # By absolute paths, and from a copy.
    shutil.copytree(home / "runs/a[b]", home / "runs/c;d=e#none")
    assert generate.main([f"--checkpoint={home}/runs/a[b]", "--unconditional=1", "--steps=2", "--out=o[1]?.txt"]) == 0
    assert (home / "o[1]?.txt").exists()
    scored = ["--tasks=perplexity", "--config.perplexity.max_windows=4", "--config.perplexity.draws=1"]
    assert evaluate.main(["--checkpoint=runs/a[b]", "--checkpoint=runs/c;d=e#none", "--out=e[*]", *scored]) == 0
    assert compare.main(["runs/a[b]", f"{home}/runs/c;d=e#none", "--draws=1", "--out=p[1].html"]) == 0
    assert convert(["--src=runs/a[b]", "--dst=m%20n#?", "--to=orbax", "--verify"]) == 0
    (home / "m n").mkdir()
    for source in ("m%20n#?", f"{home}/m%20n#?"):
        assert convert([f"--src={source}", "--dst=hf[1]", "--to=hf", "--verify"]) == 0
    assert generate.main(["--checkpoint=m%20n#?", "--unconditional=1", "--steps=2"]) == 0
    texts = ["--source=files", f"--paths={home}/texts/*.txt", "--tokenizer=bytes", "--workers=1", "--out=s,1[2]::"]
    rule = ["--validation_rule=last", "--validation_documents=2", "--cache_dir=cache"]
    assert prepare([*texts, *rule]) == 0 and prepare([*texts, *rule, "--verify"]) == 0
    shards = ["--config.data.source=shards", f"--config.data.paths={home}/s,1[2]::", "--config.data.tokenizer=shards"]
    more = ["--config.init.checkpoint=m%20n#?", "--config.train.steps=2", "--config.data.validation_rule=hash"]
    assert main.main([f"--config={config}", f"--workdir={home}/runs/f?", *shards, *more]) == 0
    assert np.isfinite(json.loads((home / "runs/f?/summary.json").read_text())["validation"]["one_pass/nelbo"])
