"""From an answer to the program that is tried; with compat as Dream's lm-evaluation-harness extracts it."""
import ast
import contextlib
import re
import textwrap
import warnings
from collections.abc import Collection, Sequence
from itertools import accumulate

from softmask_jax.evaluate.code import fences
from softmask_jax.evaluate.code.statements import BUILT_IN, Statement, UNREADABLE, needed, statements
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.evaluate.code.prompts import FENCE

# Lines of an answer, with its prompt, that compat reads.
LINES = 100
INDENT = "    "


def program(task: str, problem: Problem, text: str, chat: bool, compat: bool = False) -> str:
    """Source text to try for an answer's `text`, which begins in an open code block or function body.

    It has the function under test and all that it and its tests need, from the last code block with it (the first, for
    a continued prompt), the other blocks and HumanEval's prompt; the whole text if no block has it. compat: the
    reference's extraction. MBPP: the text. HumanEval: prompt and text; in a chat the first code block with what the
    function needs, but not what its tests need, which loses HumanEval/50."""
    continued = family(task) == HUMANEVAL
    head = problem.prompt if continued else ""
    whole = head + "\n" * (continued and chat) + text
    if compat and continued and chat:
        block = text.split(f"{FENCE}python\n", 1)[-1].split(FENCE)[0]
        return cleaned(f"{head}\n{block}", {problem.entry_point})
    if compat:
        return whole
    return _requested(problem, head, re.sub("\r\n?", "\n", text).lstrip("\ufeff"), chat) or whole


def _requested(problem: Problem, head: str, text: str, chat: bool) -> str:
    """The program for a problem in `text`; "" if nothing in it implements the function under test."""
    tests = statements(problem.tests)
    unbound = set().union(*(part.uses for part in tests)) - set().union(*(part.binds for part in tests))
    wanted = unbound | {problem.entry_point} - {""}
    entries = {problem.entry_point} if head else wanted - BUILT_IN or wanted
    chosen, most = (), 0
    for blocks in (fences.blocks(text, True), fences.blocks(text, False), [text]):
        read = [statements(textwrap.dedent(block)) for block in blocks]
        if head and blocks and not chat and (body := _body(head, blocks[0], entries)):
            read[0] = body
        scores = [_score(block, entries) for block in read]
        if max(scores, default=0) > most:
            most = max(scores)
            main = len(scores) - 1 - scores[::-1].index(most) if chat else scores.index(most)
            chosen = (statements(head), *read[main + 1 :], *read[:main], read[main])
        elif head and not most:
            bodies = ((n, _body(head, block, entries)) for n, block in enumerate(blocks))
            main, body = next(((n, body) for n, body in bodies if body), (0, []))
            most = 2 * bool(body)
            chosen = (*read[main + 1 :], *read[:main], body)
    if not most:
        return ""
    if not chat:
        chosen = (*chosen[:-1], _without_repeats(chosen[-1], entries))
    return "\n".join(part.source for part in needed(chosen, wanted, entries)) + "\n"


def _score(block: Sequence[Statement], names: Collection[str]) -> int:
    """Number of the names that a block implements; a definition counts twice, as an example may bind the name, too."""
    return sum(max((1 + part.defines(name) for part in block if part.implements(name)), default=0) for name in names)


def _body(head: str, block: str, names: Collection[str]) -> list[Statement]:
    """Statements of `head` continued by a block, at any margin; [] if the block is no body."""
    for body in (block, INDENT + block.lstrip(), textwrap.indent(textwrap.dedent(block).strip("\n"), INDENT)):
        read = statements(f"{head.rstrip()}\n{body}")
        if _score([part for part in read if part.returns], names):
            return read
    return []


def _without_repeats(block: Sequence[Statement], names: Collection[str]) -> list[Statement]:
    """A block without later definitions of the same `names`."""
    kept, defined = [], set()
    for part in block:
        own = {name for name in names if part.defines(name) and part.implements(name)}
        if not own & defined:
            kept.append(part)
        defined |= own
    return kept


def cleaned(text: str, wanted: Collection[str]) -> str:
    """Imports and the definitions (classes, functions that return, assignments to a name; the last one counts) that
    `wanted` need, of the run of lines that parses and has the most non-blank lines, the first of equals."""
    # Invalid escape sequences warn.
    with warnings.catch_warnings(action="ignore"):
        tree = _longest(re.sub("\r\n?", "\n", text.replace("\t", "    ")).strip() + "\n")
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    definitions = {name: node for node in tree.body if (name := _defined(node))}
    names, waiting = set(), list(wanted)
    while waiting:
        if (name := waiting.pop()) not in names:
            names.add(name)
            waiting += _names(definitions[name]) if name in definitions else ()
    kept = imports + [node for name, node in definitions.items() if name in names]
    try:
        return "\n".join(map(ast.unparse, kept))
    except RecursionError:
        return ""


def _longest(text: str) -> ast.Module:
    lines = text.splitlines()[:LINES]
    counts = list(accumulate((bool(line.strip()) for line in lines), initial=0))
    most, tree = 0, ast.Module([], [])
    for start in range(len(lines)):
        for stop in range(len(lines), start, -1):
            count = counts[stop] - counts[start]
            if count <= most:
                break
            with contextlib.suppress(*UNREADABLE):
                tree, most = ast.parse("\n".join(lines[start:stop])), count
    return tree


def _defined(node: ast.stmt) -> str:
    """Name that a statement defines; "" if it does not count."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    returns = isinstance(node, ast.FunctionDef) and any(isinstance(part, ast.Return) for part in ast.walk(node))
    return node.name if returns or isinstance(node, ast.ClassDef) else ""


def _names(node: ast.AST) -> set[str]:
    """Names in a definition; of `a.b` only b, as in the reference."""
    names, waiting = set(), [node]
    while waiting:
        for part in ast.iter_child_nodes(waiting.pop()):
            if isinstance(part, ast.Name):
                names.add(part.id)
            elif isinstance(part, ast.Attribute):
                names.add(part.attr)
            else:
                waiting.append(part)
    return names
