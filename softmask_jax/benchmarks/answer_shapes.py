"""What the shape of a right answer costs: canonical solutions, written as models write them, through extraction and tests.

    python -m softmask_jax.benchmarks.answer_shapes [--task=mbpp --problems=FILE] [--limit=0] [--json out.json]   # [eval]

The table has for each shape how many of the data set's own solutions pass, by default and with config.code.compat, the
reference's rules. Every solution is right, so whatever is below all of them is lost to its shape. Minutes on 2 cores.
"""
import dataclasses
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping

from softmask_jax.benchmarks.timing import benchmark_parser, publish
from softmask_jax.config.command_line import command
from softmask_jax.evaluate.code import extraction, problems as problem_files, prompts, sandbox
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.evaluate.code.running import Limits, Program
from softmask_jax.generate.batches import cut
from softmask_jax.io.files import check_writable
from softmask_jax.report.markdown import table


@dataclasses.dataclass(frozen=True)
class Solution:
    """name: of the function. whole: a program that has it. body: what goes on after the prompt; of MBPP the whole."""

    name: str
    whole: str
    body: str

    def renamed(self, name: str) -> str:
        """The program with another name for its function."""
        return re.sub(rf"\b{self.name}\b", name, self.whole)

    def calling(self, before: str = "", after: str = "", call: str = "helper(*given)", head: str = "") -> str:
        """The function as one that calls the solution, which is named `helper` here."""
        head = head or f"def {self.name}(*given):"
        parts = (before, self.renamed("helper"), f"{head}\n    return {call}", after)
        return "\n\n".join(part for part in parts if part)


def solution(task: str, problem: Problem) -> Solution:
    """Of a problem that has one."""
    whole = problem.solution.replace("\r\n", "\n").rstrip()
    if family(task) == HUMANEVAL:
        return Solution(problem.entry_point, whole, whole.removeprefix(problem.prompt))
    name = next(name for name in re.findall(r"\w+", problem.tests) if re.search(rf"(?m)^def {name}\b", whole))
    return Solution(name, whole, whole)


def fenced(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}\n"


def _docstring(s: Solution) -> str:
    return s.calling(head=f'def {s.name}(*given):\n    """As in\n\n```python\n{s.name}(1)\n```\n    """')


SURE, WHY = "Sure, here's the function:\n\n", "\nIt's right: every case (even the empty one) is covered.\n"
# By name: the text of an answer, which begins in an open block of code, behind HumanEval's prompt.
SHAPES: dict[str, Callable[[Solution], str]] = {
    "goes on": lambda s: s.body + "\n```",
    "goes on, unclosed": lambda s: s.body,
    "goes on, prose after the block": lambda s: s.body + "\n```\n" + WHY,
    "goes on, prose without a fence": lambda s: s.body + "\n\n" + WHY,
    "goes on, closed on the last line": lambda s: s.body + "```",
    "goes on, an example call after": lambda s: f"{s.body}\n\nprint({s.name}())\n```",
    "goes on, CRLF": lambda s: f"{s.body}\n```\n".replace("\n", "\r\n"),
    "whole function, closed": lambda s: s.whole + "\n```",
    "whole function, unclosed": lambda s: s.whole,
    "own block, python": lambda s: fenced(s.whole),
    "own block, py": lambda s: SURE + fenced(s.whole, "py"),
    "own block, Python": lambda s: SURE + fenced(s.whole, "Python"),
    "own block, python3": lambda s: SURE + fenced(s.whole, "python3"),
    "own block, no language": lambda s: SURE + fenced(s.whole, ""),
    "own block at once, no language": lambda s: fenced(s.whole, ""),
    "own block, a space before the language": lambda s: SURE + fenced(s.whole, " python"),
    "own block, with attributes": lambda s: SURE + fenced(s.whole, "{.python .numberLines}"),
    "own block, tildes": lambda s: SURE + fenced(s.whole, "python", "~~~"),
    "own block, tildes, no language": lambda s: SURE + fenced(s.whole, "", "~~~"),
    "own block, four backticks": lambda s: SURE + fenced(s.whole, fence="````"),
    "own block within one of Markdown": lambda s: fenced(SURE + fenced(s.whole), "markdown", "````"),
    "own block, CRLF": lambda s: (SURE + fenced(s.whole) + WHY).replace("\n", "\r\n"),
    "own block, indented": lambda s: "1. So:\n\n" + textwrap.indent(fenced(s.whole), "   ") + WHY,
    "own block, unclosed": lambda s: f"{SURE}```python\n{s.whole}",
    "own block, code beside its fence": lambda s: f"```{s.whole}\n```",
    "own block, closed on the last line": lambda s: f"{SURE}```python\n{s.whole}```\n{WHY}",
    "its output in a block": lambda s: f"{fenced(s.whole)}It prints:\n{fenced(f'{s.name} = 4', '')}",
    "body alone in its own block": lambda s: SURE + fenced(s.body.strip("\n")),
    "usage first, then the function": lambda s: f"Use:\n{fenced(f'print({s.name}())')}Code:\n{fenced(s.whole)}",
    "tests in a block of their own": lambda s: fenced(s.whole) + "Tests:\n" + fenced(f"assert {s.name}() == 0"),
    "helper and function in two blocks": lambda s: f"{fenced(s.renamed('helper'))}Now:\n"
                                                   + fenced(f"def {s.name}(*given):\n    return helper(*given)"),
    "helper in a later block": lambda s: fenced(f"def {s.name}(*given):\n    return helper(*given)")
                                         + fenced(s.renamed("helper")),
    "a skeleton first": lambda s: f"{fenced(f'def {s.name}(*given):' + chr(10) + '    ...')}Then:\n{fenced(s.whole)}",
    "a wrong draft first": lambda s: f"{fenced(f'def {s.name}(*given):' + chr(10) + '    return None')}Better:\n"
                                     + fenced(s.whole),
    "fence in a docstring": lambda s: fenced(_docstring(s)),
    "fence in a string": lambda s: fenced(s.calling('MARK = "```"', call="MARK and helper(*given)")),
    "fence in a comment": lambda s: fenced(s.calling("# As ``` it says.")),
    "constant by annotation": lambda s: fenced(s.calling("START: int = 0", call="helper(*given[START:])")),
    "constants by tuple": lambda s: fenced(s.calling("START, STEP = 0, 1", call="helper(*given[START::STEP])")),
    "constant by +=": lambda s: fenced(s.calling("START = -1\nSTART += 1", call="helper(*given[START:])")),
    "constants in a chain": lambda s: fenced(s.calling("START = FIRST = 0", call="helper(*given[FIRST:])")),
    "table by its keys": lambda s: fenced(s.calling('AT = {}\nAT["start"] = 0', call='helper(*given[AT["start"]:])')),
    "table by a loop": lambda s: fenced(s.calling("AT = []\nfor n in range(3):\n    AT.append(n)",
                                                  call="helper(*given[AT[0]:])")),
    "table by a call": lambda s: fenced(s.calling(
        "AT = []\ndef fill():\n    for n in range(3):\n        AT.append(n)\nfill()", call="helper(*given[AT[0]:])")),
    "constant in if and else": lambda s: fenced(s.calling("import sys\nif sys.maxsize > 9:\n    START = 0\nelse:\n    START = 9",
                                                          call="helper(*given[START:])")),
    "recursion limit": lambda s: fenced(s.calling("import sys\nsys.setrecursionlimit(5000)",
                                                  call="sys.getrecursionlimit() == 5000 and helper(*given)")),
    "lambda": lambda s: fenced(f"{s.renamed('helper')}\n\n{s.name} = lambda *given: helper(*given)"),
    "another name for it": lambda s: fenced(f"{s.renamed('helper')}\n\n{s.name}: object = helper"),
    "decorator over several lines": lambda s: fenced(s.calling(
        "import functools", head=f"@functools.lru_cache(\n    maxsize=int('0'),\n)\ndef {s.name}(*given):", call="0")
        + f"\n\n{s.name} = helper"),
    "decorator": lambda s: fenced(s.calling("import functools\ndef same(f):\n    @functools.wraps(f)\n    def g(*given):\n"
                                            "        return f(*given)\n    return g", head=f"@same\ndef {s.name}(*given):")),
    "helper without return": lambda s: fenced(s.calling("def put(out, x):\n    out.append(x)",
        call="out[-1]", head=f"def {s.name}(*given):\n    out = []\n    put(out, helper(*given))")),
    "method of a helper class": lambda s: fenced(s.calling("class Solver:\n    def run(self, *given):\n"
                                                           "        return helper(*given)", call="Solver().run(*given)")),
    "asynchronous helper": lambda s: fenced(s.calling("import asyncio\nasync def later(*given):\n    return helper(*given)",
                                                      call="asyncio.run(later(*given))")),
    "type alias": lambda s: fenced(s.calling("from typing import Any\nAnything = Any",
                                             head=f"def {s.name}(*given: Anything) -> Anything:")),
    "from __future__": lambda s: fenced("from __future__ import annotations\n\n"
                                        + s.calling(head=f"def {s.name}(*given: Unknown) -> Unknown:")),
    "imports tried": lambda s: fenced(s.calling("try:\n    from absent import start\nexcept ImportError:\n    start = 0",
                                                call="helper(*given[start:])")),
    "imports after the function": lambda s: fenced(s.calling("", "import math", call="math.inf and helper(*given)")),
    "imports within the function": lambda s: fenced(s.calling(
        call="math.inf and helper(*given)", head=f"def {s.name}(*given):\n    import math")),
    "an import that is not needed": lambda s: fenced(f"import pytest_absent\n\n{s.whole}"),
    "tabs": lambda s: fenced(re.sub("(?m)^ +", lambda m: "\t" * len(m[0]), s.calling())),
    "more than 100 lines": lambda s: fenced(s.calling("\n".join(f"N{n} = {n}" for n in range(120)),
                                                      call="helper(*given[N0:])")),
    "a comment at the margin": lambda s: fenced(s.calling(head=f"def {s.name}(*given):\n    pass\n# So:")),
    "main block": lambda s: fenced(f"{s.whole}\n\nif __name__ == '__main__':\n    print({s.name}(int(input())))"),
    "main function that reads": lambda s: fenced(f"{s.whole}\n\ndef main():\n    print({s.name}(int(input())))\n\nmain()"),
    "input and an example after": lambda s: fenced(f"{s.whole}\n\nn = int(input())\nresult = {s.name}(n)\nprint(result)"),
    "a wrong assertion after": lambda s: fenced(f"{s.whole}\n\nassert {s.name} is None"),
    "unittest after": lambda s: fenced(f"{s.whole}\n\nimport unittest\nclass T(unittest.TestCase):\n    def test(self):\n"
                                       f"        {s.name}()\nunittest.main()"),
    "headings": lambda s: f"\n## Solution\n\n{fenced(s.whole)}\n# Notes\n{WHY}",
    "prose before and after, no fence": lambda s: SURE + s.whole + "\n" + WHY,
}  # fmt: skip


def programs(task: str, chosen: list[Problem], compat: bool) -> dict[str, list[Program]]:
    """By shape, what is tried of each problem's own solution, its answer cut as a model's would be."""
    stops = prompts.stops(task, True, compat)
    return {
        shape: [
            Program(extraction.program(task, problem, cut(write(solution(task, problem)), stops), True, compat), problem.tests)
            for problem in chosen
        ]
        for shape, write in SHAPES.items()
    }  # fmt: skip


def measure(task: str, chosen: list[Problem]) -> dict[str, Mapping[str, int]]:
    """By shape, how many solutions pass by "default" and with "compat". Each program runs once, in the sandbox."""
    made = {way: programs(task, chosen, way == "compat") for way in ("default", "compat")}
    different = list(dict.fromkeys(one for of_shape in made.values() for some in of_shape.values() for one in some))
    passed = set()
    for place, verdict in sandbox.run(different, Limits(), workers=len(os.sched_getaffinity(0))):
        passed |= {different[place]} if verdict.passed else set()
    return {shape: {way: sum(one in passed for one in made[way][shape]) for way in made} for shape in SHAPES}


@command()
def main(argv: list[str]) -> None:
    parser = benchmark_parser("answer_shapes", __doc__)
    parser.add_argument("--task", default=HUMANEVAL, choices=tuple(problem_files.HUB), help="whose solutions")
    parser.add_argument("--problems", default="", help="as config.code.problems")
    parser.add_argument("--limit", type=int, default=0, help="the first so many problems; 0 is all")
    flags = parser.parse_args(argv)
    check_writable(flags.json)
    loaded = problem_files.load(flags.task, flags.problems, limit=flags.limit)
    chosen = [problem for problem in loaded if problem.solution]
    if not chosen:
        raise ValueError(f"None of the {len(loaded):,} problems has a solution of its own.")
    shapes = measure(flags.task, chosen)
    rows = [(shape, *(str(counts[way]) for way in ("default", "compat"))) for shape, counts in shapes.items()]
    text = table(("shape of the answer", f"pass, of {len(chosen)}", "with compat"), rows)
    publish(text, {"task": flags.task, "problems": len(chosen), "shapes": shapes}, flags.json)


if __name__ == "__main__":
    sys.exit(main())
