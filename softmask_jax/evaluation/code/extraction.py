"""From an answer to the program that is tried, as Dream's lm-evaluation-harness makes it."""
import ast
import warnings
from collections.abc import Collection

from softmask_jax.evaluation.code.problems import HUMANEVAL, Problem, family
from softmask_jax.evaluation.code.prompts import FENCE

# Of an answer, the prompt included, this much is looked at.
LINES = 100
# What Python's parser says of text that is no program, or more than it can take.
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)


def program(task: str, problem: Problem, text: str, chat: bool, compat: bool = False) -> str:
    """The source text to try for an answer's `text`.

    Of HumanEval the prompt goes before it. In a chat it is what stands in the block of code, of which imports and what
    the function and its tests need are kept. compat: what the function needs alone, as the reference, which so loses
    HumanEval/50: its tests call a helper of its prompt.
    """
    if family(task) != HUMANEVAL:
        return text
    if not chat:
        return problem.prompt + text
    block = text.split(f"{FENCE}python\n", 1)[-1].split(FENCE)[0]
    needed = {problem.entry_point} | (set() if compat else _names(ast.parse(problem.tests)))
    return cleaned(f"{problem.prompt}\n{block}", needed)


def cleaned(text: str, wanted: Collection[str]) -> str:
    """Imports, and the definitions that those `wanted` need, of the longest run of lines that is a program.

    Definitions are classes, functions that return something and assignments to a name, at the top level; of two with
    one name the later one counts. Longest is what has most lines that are not blank, the first of equals.
    """
    with warnings.catch_warnings():
        # Escapes that Python does not know.
        warnings.simplefilter("ignore")
        tree = _longest(text.replace("\t", "    ").replace("\r\n", "\n").replace("\r", "\n").strip() + "\n")
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    definitions: dict[str, ast.stmt] = {}
    for node in tree.body:
        if name := _defined(node):
            definitions[name] = node
    needed, waiting = set(), list(wanted)
    while waiting:
        if (name := waiting.pop()) not in needed:
            needed.add(name)
            waiting += _names(definitions[name]) if name in definitions else ()
    kept = imports + [node for name, node in definitions.items() if name in needed]
    try:
        return "\n".join(map(ast.unparse, kept))
    except RecursionError:
        return ""


def _longest(text: str) -> ast.Module:
    lines = text.splitlines()[:LINES]
    counts = [0]
    for line in lines:
        counts.append(counts[-1] + bool(line.strip()))
    most, found = 0, ast.Module([], [])
    for start in range(len(lines)):
        for stop in range(len(lines), start, -1):
            count = counts[stop] - counts[start]
            if count <= most:
                break
            try:
                found, most = ast.parse("\n".join(lines[start:stop])), count
            except UNREADABLE:
                continue
            break
    return found


def _defined(node: ast.stmt) -> str:
    """The name that a statement defines, "" for one that does not count."""
    if isinstance(node, ast.ClassDef):
        return node.name
    if isinstance(node, ast.FunctionDef):
        return node.name if any(isinstance(part, ast.Return) for part in ast.walk(node)) else ""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return ""


def _names(node: ast.AST) -> set[str]:
    """Names that a definition may mean; of `a.b` it is b alone, as the reference has it."""
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
