"""What the shape of a right answer costs: canonical solutions, as models write them, through extraction and tests.

    python -m softmask_jax.benchmarks.answer_shapes [--task=mbpp --problems=FILE] [--limit=0] [--json=X.json]  # [eval]

The table has for each shape how many of the data set's own solutions pass, by default and with config.code.compat, the
reference's rules. Every solution is right, so whatever is below all of them is lost to its shape. Minutes on 2 cores.
"""
import dataclasses
import functools
import os
import re
import string
import sys
import textwrap
from collections.abc import Mapping

from softmask_jax.benchmarks.timing import benchmark_parser, publish
from softmask_jax.config.command_line import command
from softmask_jax.evaluate.code import extraction, problems as problem_files, prompts, sandbox
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.evaluate.code.running import Limits, Program
from softmask_jax.generate.batches import cut
from softmask_jax.report.markdown import table


@dataclasses.dataclass(frozen=True)
class Solution:
    """A data set's own solution."""

    name: str  # of the function
    whole: str  # program with the function
    body: str  # continuation of the prompt; for MBPP `whole`


def solution(task: str, problem: Problem) -> Solution:
    whole = problem.solution.replace("\r\n", "\n").rstrip()
    if family(task) == HUMANEVAL:
        return Solution(problem.entry_point, whole, whole.removeprefix(problem.prompt))
    name = next(name for name in re.findall(r"\w+", problem.tests) if re.search(rf"(?m)^def {name}\b", whole))
    return Solution(name, whole, whole)


def fenced(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}\n"


def calling(before: str = "", call: str = "helper(*args)", head: str = "def $name(*args):", after: str = "") -> str:
    """A block with the solution as `helper`, and a function that calls it."""
    return fenced("\n\n".join(filter(None, (before, "$helper", f"{head}\n    return {call}", after))))


SURE, WHY = "Sure, here's the function:\n\n", "\nIt's right: every case (even the empty one) is covered.\n"
BLOCK, HEAD = fenced("$whole"), "def $name(*args):\n    "
# Answers by name; after HumanEval's prompt they start inside a code block. Fields: see `write`.
TEMPLATES = {
    "goes on": "$body\n```",
    "goes on, unclosed": "$body",
    "goes on, prose after the block": "$body\n```\n" + WHY,
    "goes on, prose without a fence": "$body\n\n" + WHY,
    "goes on, closed on the last line": "$body```",
    "goes on, an example call after": "$body\n\nprint($name())\n```",
    "goes on, CRLF": "$body\n```\n",
    "whole function, closed": "$whole\n```",
    "whole function, unclosed": "$whole",
    "own block, python": BLOCK,
    "own block, py": SURE + fenced("$whole", "py"),
    "own block, Python": SURE + fenced("$whole", "Python"),
    "own block, python3": SURE + fenced("$whole", "python3"),
    "own block, no language": SURE + fenced("$whole", ""),
    "own block at once, no language": fenced("$whole", ""),
    "own block, a space before the language": SURE + fenced("$whole", " python"),
    "own block, with attributes": SURE + fenced("$whole", "{.python .numberLines}"),
    "own block, tildes": SURE + fenced("$whole", "python", "~~~"),
    "own block, tildes, no language": SURE + fenced("$whole", "", "~~~"),
    "own block, four backticks": SURE + fenced("$whole", fence="````"),
    "own block within one of Markdown": fenced(SURE + BLOCK, "markdown", "````"),
    "own block, CRLF": SURE + BLOCK + WHY,
    "own block, indented": "1. So:\n\n   ```python\n$indented\n   ```\n" + WHY,
    "own block, unclosed": SURE + "```python\n$whole",
    "own block, code beside its fence": "```$whole\n```",
    "own block, closed on the last line": SURE + "```python\n$whole```\n" + WHY,
    "its output in a block": BLOCK + "It prints:\n" + fenced("$name = 4", ""),
    "body alone in its own block": SURE + fenced("$body_alone"),
    "usage first, then the function": "Use:\n" + fenced("print($name())") + "Code:\n" + BLOCK,
    "tests in a block of their own": BLOCK + "Tests:\n" + fenced("assert $name() == 0"),
    "helper and function in two blocks": fenced("$helper") + "Now:\n" + fenced(HEAD + "return helper(*args)"),
    "helper in a later block": fenced(HEAD + "return helper(*args)") + fenced("$helper"),
    "a skeleton first": fenced(HEAD + "...") + "Then:\n" + BLOCK,
    "a wrong draft first": fenced(HEAD + "return None") + "Better:\n" + BLOCK,
    "fence in a docstring": calling(head=f'{HEAD}"""As in\n\n```python\n$name(1)\n```\n    """'),
    "fence in a string": calling('MARK = "```"', "MARK and helper(*args)"),
    "fence in a comment": calling("# As ``` it says."),
    "constant by annotation": calling("START: int = 0", "helper(*args[START:])"),
    "constants by tuple": calling("START, STEP = 0, 1", "helper(*args[START::STEP])"),
    "constant by +=": calling("START = -1\nSTART += 1", "helper(*args[START:])"),
    "constants in a chain": calling("START = FIRST = 0", "helper(*args[FIRST:])"),
    "table by its keys": calling('AT = {}\nAT["start"] = 0', 'helper(*args[AT["start"]:])'),
    "table by a loop": calling("AT = []\nfor n in range(3):\n    AT.append(n)", "helper(*args[AT[0]:])"),
    "table by a call": calling(
        "AT = []\ndef fill():\n    for n in range(3):\n        AT.append(n)\nfill()", "helper(*args[AT[0]:])"),
    "constant in if and else": calling(
        "import sys\nif sys.maxsize > 9:\n    START = 0\nelse:\n    START = 9", "helper(*args[START:])"),
    "recursion limit": calling(
        "import sys\nsys.setrecursionlimit(5000)", "sys.getrecursionlimit() == 5000 and helper(*args)"),
    "lambda": fenced("$helper\n\n$name = lambda *args: helper(*args)"),
    "another name for it": fenced("$helper\n\n$name: object = helper"),
    "decorator over several lines": calling(
        "import functools", "0", f"@functools.lru_cache(\n    maxsize=int('0'),\n)\n{HEAD.rstrip()}", "$name = helper"),
    "decorator": calling(
        "import functools\ndef same(f):\n    @functools.wraps(f)\n    def g(*args):\n        return f(*args)\n"
        "    return g", head="@same\ndef $name(*args):"),
    "helper without return": calling(
        "def put(out, x):\n    out.append(x)", "out[-1]", HEAD + "out = []\n    put(out, helper(*args))"),
    "method of a helper class": calling(
        "class Solver:\n    def run(self, *args):\n        return helper(*args)", "Solver().run(*args)"),
    "asynchronous helper": calling(
        "import asyncio\nasync def later(*args):\n    return helper(*args)", "asyncio.run(later(*args))"),
    "type alias": calling("from typing import Any\nAnything = Any", head="def $name(*args: Anything) -> Anything:"),
    "from __future__": calling("from __future__ import annotations", head="def $name(*args: Unknown) -> Unknown:"),
    "imports tried": calling(
        "try:\n    from absent import start\nexcept ImportError:\n    start = 0", "helper(*args[start:])"),
    "imports after the function": calling(call="math.inf and helper(*args)", after="import math"),
    "imports within the function": calling(call="math.inf and helper(*args)", head=HEAD + "import math"),
    "an import that is not needed": fenced("import pytest_absent\n\n$whole"),
    "tabs": calling(),
    "more than 100 lines": calling("\n".join(f"N{n} = {n}" for n in range(120)), "helper(*args[N0:])"),
    "a comment at the margin": calling(head=HEAD + "pass\n# So:"),
    "main block": fenced("$whole\n\nif __name__ == '__main__':\n    print($name(int(input())))"),
    "main function that reads": fenced("$whole\n\ndef main():\n    print($name(int(input())))\n\nmain()"),
    "input and an example after": fenced("$whole\n\nn = int(input())\nresult = $name(n)\nprint(result)"),
    "a wrong assertion after": fenced("$whole\n\nassert $name is None"),
    "unittest after": fenced("$whole\n\nimport unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                             "        $name()\nunittest.main()"),
    "headings": f"\n## Solution\n\n{BLOCK}\n# Notes\n{WHY}",
    "prose before and after, no fence": SURE + "$whole\n" + WHY,
}  # fmt: skip
CRLF = functools.partial(re.sub, "\n", "\r\n")
# Changes to the whole text of an answer.
CHANGES = {
    "goes on, CRLF": CRLF,
    "own block, CRLF": CRLF,
    "tabs": functools.partial(re.sub, "(?m)^ +", lambda spaces: "\t" * len(spaces[0])),
}


def write(shape: str, solution: Solution) -> str:
    """An answer of this shape."""
    text = string.Template(TEMPLATES[shape]).substitute(
        dataclasses.asdict(solution), indented=textwrap.indent(solution.whole, "   "),
        body_alone=solution.body.strip("\n"), helper=re.sub(rf"\b{solution.name}\b", "helper", solution.whole),
    )  # fmt: skip
    return CHANGES[shape](text) if shape in CHANGES else text


SHAPES = {shape: functools.partial(write, shape) for shape in TEMPLATES}


def programs(task: str, problems: list[Problem], compat: bool) -> dict[str, list[Program]]:
    """Shape -> programs extracted from each problem's solution, its answer cut like a model's."""
    stops = prompts.stops(task, True, compat)

    def program(shape: str, problem: Problem) -> Program:
        answer = cut(SHAPES[shape](solution(task, problem)), stops)
        return Program(extraction.program(task, problem, answer, True, compat), problem.tests)

    return {shape: [program(shape, problem) for problem in problems] for shape in SHAPES}


def measure(task: str, problems: list[Problem]) -> dict[str, Mapping[str, int]]:
    """Shape -> number of solutions that pass by "default" and with "compat"; each program runs once, sandboxed."""
    made = {way: programs(task, problems, way == "compat") for way in ("default", "compat")}
    different = list({program: None for shapes in made.values() for row in shapes.values() for program in row})
    verdicts = sandbox.run(different, Limits(), workers=len(os.sched_getaffinity(0)))
    passed = {different[index] for index, verdict in verdicts if verdict.passed}
    return {shape: {way: sum(program in passed for program in made[way][shape]) for way in made} for shape in SHAPES}


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("answer_shapes", __doc__)
    parser.add_argument("--task", default=HUMANEVAL, choices=tuple(problem_files.HUB), help="whose solutions")
    parser.add_argument("--problems", default="", help="as config.code.problems")
    parser.add_argument("--limit", type=int, default=0, help="the first so many problems; 0 is all")
    flags = parser.parse_args(argv)
    loaded = problem_files.load(flags.task, flags.problems, limit=flags.limit)
    solved = [problem for problem in loaded if problem.solution]
    if not solved:
        raise ValueError(f"None of the {len(loaded):,} problems has a solution of its own.")
    shapes = measure(flags.task, solved)
    rows = [(shape, *map(str, counts.values())) for shape, counts in shapes.items()]
    text = table(("shape of the answer", f"pass, of {len(solved)}", "with compat"), rows)
    publish(text, {"task": flags.task, "problems": len(solved), "shapes": shapes}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
