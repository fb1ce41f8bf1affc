"""Programs out of answers: the block of code, its longest readable part, and what the function needs of it."""
import pytest

from softmask_jax.evaluate.code.extraction import cleaned, program
from softmask_jax.evaluate.code.problems import Problem

PROBLEM = Problem("Test/0", 'import math\n\ndef area(r):\n    """Of a circle."""\n', "check(area)", "area")


def test_an_answer_in_a_chat_is_the_body_or_a_whole_block():
    body = "    return math.pi * r * r\n```\nThis is right because ..."
    whole = "Sure:\n```python\nimport math\n\ndef area(r):\n    return math.pi * r ** 2\n```\nand so on"
    assert "math.pi * r * r" in program("humaneval", PROBLEM, body, chat=True)
    found = program("humaneval", PROBLEM, whole, chat=True)
    assert "math.pi * r ** 2" in found and "Sure" not in found


def test_prose_behind_the_code_is_left_out():
    text = "    return math.pi * r * r\n\nThis function, as you see, is right.\nIt's done."
    found = program("humaneval", PROBLEM, text, chat=True)
    scope: dict = {}
    exec(found, scope)
    assert scope["area"](1) == pytest.approx(3.14159, abs=1e-4)


def test_only_what_is_needed_is_kept():
    text = (
        "from os import path\nSIZE = 3\nOTHER = 4\ndef helper(x):\n    return x * SIZE\ndef unused():\n    return 1\n"
        "def silent():\n    pass\nclass Box:\n    pass\nprint(area(1))\ndef area(r):\n    return helper(r) + len([Box])\n"
    )
    found = cleaned(text, {"area"})
    assert all(word in found for word in ("from os import path", "SIZE = 3", "def helper", "class Box", "def area"))
    assert not any(word in found for word in ("OTHER", "unused", "silent", "print"))


def test_of_two_definitions_the_later_one_counts():
    assert cleaned("def f():\n    return 1\ndef f():\n    return 2\n", {"f"}) == "def f():\n    return 2"


def test_the_longest_part_that_is_a_program_is_taken_and_the_first_of_equals():
    assert cleaned("x = = 1\nf = 1\ny = 2\n) (\nf = 3\n", {"f", "y"}) == "f = 1\ny = 2"
    assert cleaned("f = 1\n)\nf = 2\n", {"f"}) == "f = 1"


def test_what_the_tests_call_is_kept_but_not_as_the_reference_has_it():
    problem = Problem("Test/1", "", "assert decode(encode('a')) == 'a'", "decode")
    text = "def encode(s):\n    return s\ndef decode(s):\n    return s\n"
    assert "encode" in program("humaneval", problem, text, chat=True)
    assert "encode" not in program("humaneval", problem, text, chat=True, compat=True)


@pytest.mark.parametrize("text", ["", "\0", "(" * 5_000, "x = '", "-" * 50_000 + "1", "\ud800", "[" * 90 + "]" * 90])
def test_no_answer_is_too_odd(text):
    for chat in (True, False):
        assert isinstance(program("humaneval", PROBLEM, text, chat), str)


def test_what_holds_no_program_and_all_of_compat_but_humanevals_chats_is_tried_as_it_is():
    assert program("humaneval", PROBLEM, "Sorry (", chat=False) == PROBLEM.prompt + "Sorry ("
    assert program("mbpp", PROBLEM, "Sorry (", chat=True) == "Sorry ("
    text = "    return 1\n\nprint(area(1))\n"
    assert program("humaneval", PROBLEM, text, chat=False, compat=True) == PROBLEM.prompt + text
    assert program("mbpp", PROBLEM, text, chat=True, compat=True) == text


def test_what_a_program_does_besides_is_left_out_by_default():
    text = "import os\nSIZE = 3\ndef other():\n    return area(SIZE)\ndef area(r):\n    return r\nprint(other())\n"
    assert program("mbpp", PROBLEM, text, chat=True) == "def area(r):\n    return r\n"


def test_of_blocks_that_define_a_helper_each_the_functions_own_counts():
    one = "```python\ndef size(r):\n    return 1\ndef area(r):\n    return size(r)\n```\n"
    two = one.replace("1", "2")
    scope: dict = {}
    exec(program("mbpp", PROBLEM, one + two + "```python\ndef size(r):\n    return 3\n```", chat=True), scope)
    assert scope["area"](0) == 2


@pytest.mark.parametrize("before", [
    "SIZE, *REST = 2, 3", "if (SIZE := 2): pass", "with open('/dev/null'): SIZE = 2", "SIZE = 1\nSIZE *= 2",
    "globals()['SIZE'] = 2", "SIZE = 2\nassert SIZE == 3", "import decimal\ndecimal.getcontext().prec = 4\nSIZE = 2",
    "class Box: pass\nsetattr(Box, 'size', 2)\nSIZE = Box.size", "class Box: pass\nBox.size = 2\nSIZE = Box.size",
    "SIZES = dict()\nSIZES.update(a=2)\nSIZE = SIZES['a']", "from enum import Enum\nclass Box(Enum):\n  A = 2\nSIZE = Box.A.value",
    "SIZES = []\nwhile len(SIZES) < 2:\n  SIZES.append(1)\nSIZE = len(SIZES)", "import math; SIZE = 2",
])  # fmt: skip
def test_what_a_function_needs_is_kept_however_it_is_made(before):
    scope: dict = {}
    exec(program("mbpp", PROBLEM, f"{before}\ndef area(r):\n    return SIZE * r\nprint(input())", chat=True), scope)
    assert scope["area"](3) == 6


@pytest.mark.parametrize("text", [
    "```def area(r): return 2 * r```", "So: ```python def area(r): return 2 * r``` It's `area`.", "\ufeffdef area(r): return 2 * r",
    "Use ```area```:\n```\npython\ndef area(r):\n    return 2 * r\n```", "[PYTHON]\ndef area(\n    r,\n):\n    return 2 * r\n[/PYTHON]",
    "```python\ndef area(r):\n    return 2 * r\n```\nFor 2:\n```\narea = 4\n```\narea = 2 * r",
])  # fmt: skip
def test_a_function_is_read_beside_its_fence_and_within_marks(text):
    scope: dict = {}
    exec(program("mbpp", PROBLEM, text, chat=True), scope)
    assert scope["area"](3) == 6


@pytest.mark.parametrize("line", ["```python\n", "(\n", "@a\n", "x = [\n", "'" * 3 + "\n", "try:\n x\n", "x += 1\n", "y.z()\n"])
def test_what_is_repeated_without_end_is_read_all_the_same(line):
    text = line * 501 + "def area(r):\n    return 1"
    assert isinstance(program("humaneval", PROBLEM, text, chat=True), str)
