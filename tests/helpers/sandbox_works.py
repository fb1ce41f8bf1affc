"""A unit of an evaluation's work over a model that writes what it is told; files of problems."""
import contextlib
import json

import jax

from softmask_jax.distributed import sharding
from softmask_jax.distributed.preemption import StopSignal
from softmask_jax.evaluate.settings import Code, Settings
from softmask_jax.evaluate.task import Work
from softmask_jax.samplers import Options
from tests.helpers.fake_model import END, FakeModel

HUMANEVAL_ROW = {
    "task_id": "Test/0", "prompt": 'def double(x):\n    """Twice x."""\n', "entry_point": "double",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('ab') == 'abab'\n",
}
MBPP_ROW = {
    "task_id": 11, "text": "Write a function to double a number.", "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(1) == 2", "assert double(2) == 4", "assert double(0) == zero"],
    "test_setup_code": "zero = 0", "challenge_test_list": [],
}
PLUS_ROW = {
    "task_id": 2, "prompt": "Write a function to double a number.", "code": "import math\ndef double(x):\n    return 2 * x",
    "source_file": "x", "test_imports": ["import math"], "test_list": MBPP_ROW["test_list"][:2],
    "test": "import numpy as np\nfor x in range(20):\n    assert np.all(double(np.full(3, x)) == 2 * x)\nassert math.pi\n",
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Writer(FakeModel):
    """Writes the next of `texts` for each row that it is given, by the row's key in the order of first sight."""

    template = None

    def __init__(self, texts, padding="right", max_length=4_096):
        super().__init__(padding)
        self.texts, self.max_length, self.calls = list(texts), max_length, 0

    def write_one(self, count):
        text = self.texts[self.calls % len(self.texts)].encode()[:count]
        self.calls += 1
        return list(text) + [END] * (count - len(text))

    def fill(self, *given, **more):
        self.write = self.write_one
        return super().fill(*given, **more)


def refuse():
    raise AssertionError("the model is not to be loaded")


@contextlib.contextmanager
def work(folder, model=None, *, allow_code=True, allow_unsafe_code=False, **code):
    """Of one model in one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {"timeout": 5.0, "memory": 512} | code
    with StopSignal() as stop:
        yield Work(
            Settings(code=Code(**given), code_sampler=Options(alg="entropy")), "model", folder, folder,
            refuse if model is None else lambda: model, sharding.make_mesh(1, devices=jax.devices()[:1]), stop,
            allow_code=allow_code, allow_unsafe_code=allow_unsafe_code,
        )  # fmt: skip
