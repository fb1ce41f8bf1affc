"""`softmask-jax demo`: the model in the package, and the page on which both kinds of masks play."""
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from softmask_jax import config
from softmask_jax.config import flatten
from softmask_jax.generate import demo
from softmask_jax.reproduce import study

MOST_BYTES = 3_000_000
PROGRAM = '''"""Read the settings of a program."""
import os


class Settings:
    """Names and values of a file, one in a line."""

    def __init__(self, path=None, encoding="utf-8"):
        self.path = path
        self.values = {}
        self.encoding = encoding

    def read(self):
        """Read the file. Raise ValueError if a line has no value."""
        if not os.path.exists(self.path):
            return None
        with open(self.path, encoding=self.encoding) as file:
            for line in file:
                name, sep, value = line.partition("=")
                if not sep:
                    raise ValueError("no value in %r" % line)
                self.values[name.strip()] = value.strip()
        return self.values
'''


@pytest.fixture(scope="module")
def model():
    return demo.load()


def test_the_model_is_small_and_that_of_its_config():
    assert sum(file.stat().st_size for file in demo.MODEL.iterdir()) <= MOST_BYTES
    settings, about = config.load("demo"), json.loads((demo.MODEL / "config.json").read_text("utf-8"))
    network = settings.model
    assert (about["hidden_dim"], about["n_blocks"], about["n_heads"], about["cond_dim"]) == (
        network.hidden_size, network.num_blocks, network.num_heads, network.cond_dim)  # fmt: skip
    assert (about["vocab_size"], about["model_length"]) == (settings.data.bpe_vocab_size, settings.data.seq_len)
    assert (about["mixinputs_k"], about["torch_dtype"]) == (settings.soft_mask.k, "bfloat16")


def test_its_config_is_that_of_the_studys_first_soft_masked_run(tmp_path):
    runs = {run.name: run.config for run in study.runs(study.SIZES["default"], tmp_path)}
    for name, ours in (("text-base", "demo:base"), ("text-soft-1", "demo")):
        theirs, ours = flatten(runs[name].to_dict()), flatten(config.load(ours).to_dict())
        different = {key for key in theirs if theirs[key] != ours[key] and not key.startswith("sample.")}
        assert different <= {"data.cache_dir", "init.checkpoint", "train.updates"}


def test_it_has_learned_python_and_to_read_soft_masks(model):
    ids = model.tokenizer.encode(PROGRAM)
    rows = np.asarray(ids)[:128][None]
    assert rows.shape == (1, 128)
    one_pass, two_pass = (float(model.nelbo(rows, jax.random.key(0), two_pass=soft, draws=64)[0]) for soft in (False, True))
    assert two_pass < one_pass - 0.02 and one_pass < 4


def test_the_page_plays_both_texts_and_the_terminal_shows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--prompt=class Parser:", "--steps=4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\nclass Parser:") >= 2 and "--- plain masks, 4 steps\n" in printed.out
    page = Path("demo.html").read_text("utf-8")
    (names,) = (json.loads(part) for part in [page.split('"names":')[1].split("]")[0] + "]"])
    assert names == ["plain masks", "soft masks"] and printed.err == "Page  demo.html\n"


def test_a_prompt_that_fills_the_row_is_one_line(capsys):
    assert demo.main(["--prompt=" + "x = 1\n" * 100]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: --prompt: ") and error.count("\n") == 1
