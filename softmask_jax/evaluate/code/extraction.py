"""From an answer to the program that is tried; with compat as Dream's lm-evaluation-harness makes it."""
import ast
import textwrap
import warnings
from collections.abc import Collection, Sequence

from softmask_jax.evaluate.code import fences
from softmask_jax.evaluate.code.pieces import BUILT_IN, Piece, UNREADABLE, needed, pieces
from softmask_jax.evaluate.code.problems import HUMANEVAL, Problem, family
from softmask_jax.evaluate.code.prompts import FENCE

# Of an answer, the prompt included, this much is looked at.
LINES = 100
INDENT = "    "


def program(task: str, problem: Problem, text: str, chat: bool, compat: bool = False) -> str:
    """The source text to try for an answer's `text`, which begins in an open block of code or function's body.

    Of all that the answer says it is the function that is asked for, with what that and its tests need: of several
    blocks of code the last one that has it (of a continued prompt the first one, as a model then goes on to something
    else), helpers from the others, of HumanEval the prompt before it. What is no program stays as it is.

    compat: as the reference has it. MBPP: the text. HumanEval: the prompt and the text; in a chat the first block of
    code with what the function needs, but not what its tests need, which loses HumanEval/50.
    """
    whole = problem.prompt + ("\n" if chat else "") + text if family(task) == HUMANEVAL else text
    if compat and family(task) == HUMANEVAL and chat:
        block = text.split(f"{FENCE}python\n", 1)[-1].split(FENCE)[0]
        return cleaned(f"{problem.prompt}\n{block}", {problem.entry_point})
    if compat:
        return whole
    head = problem.prompt if family(task) == HUMANEVAL else ""
    return _asked_for(problem, head, text.replace("\r\n", "\n").replace("\r", "\n").lstrip("\ufeff"), chat) or whole


def _asked_for(problem: Problem, head: str, text: str, chat: bool) -> str:
    """Source text of what a problem asks for; "" if `text` has nothing of it."""
    wanted = _free(problem.tests) | {problem.entry_point} - {""}
    entries = {problem.entry_point} if head else wanted - BUILT_IN or wanted
    parts, most = (), 0
    for blocks in (fences.blocks(text, True), fences.blocks(text, False), [text]):
        read = [pieces(textwrap.dedent(block)) for block in blocks]
        if head and blocks and not chat and (body := _body(head, blocks[0], entries)):
            read[0] = body
        scores = [_score(block, entries) for block in read]
        if max(scores, default=0) > most:
            most = max(scores)
            main = len(scores) - 1 - scores[::-1].index(most) if chat else scores.index(most)
            parts = (pieces(head), *read[main + 1 :], *read[:main], read[main])
        elif head and not most:
            main, body = next(((n, body) for n, block in enumerate(blocks) if (body := _body(head, block, entries))), (0, []))
            most = 2 * bool(body)
            parts = (*read[main + 1 :], *read[:main], body)
    if not most:
        return ""
    if not chat:
        parts = (*parts[:-1], _first_of(parts[-1], entries))
    return "\n".join(piece.source for piece in needed(parts, wanted, entries)) + "\n"


def _score(block: Sequence[Piece], names: Collection[str]) -> int:
    """How many of the names a block has; a definition is more than a name that is bound, as in what an example prints."""
    return sum(
        max((1 + piece.defines(name) for piece in block if piece.implements(name)), default=0) for name in names
    )  # fmt: skip


def _body(head: str, block: str, names: Collection[str]) -> list[Piece]:
    """The pieces of `head` with a block that goes on with it, wherever the block's margin is; [] if it is no body."""
    indented = textwrap.indent(textwrap.dedent(block).strip("\n"), INDENT)
    for body in (block, INDENT + block.lstrip(), indented):
        read = pieces(f"{head.rstrip()}\n{body}")
        if _score([piece for piece in read if piece.returns], names):
            return read
    return []


def _first_of(block: Sequence[Piece], names: Collection[str]) -> list[Piece]:
    """A block without what defines one of `names` again."""
    kept, defined = [], set()
    for piece in block:
        again = {name for name in names if piece.defines(name) and piece.implements(name)}
        if not again & defined:
            kept.append(piece)
        defined |= again
    return kept


def _free(source: str) -> set[str]:
    """Names that a program uses and does not bind."""
    read = pieces(source)
    return set().union(*(piece.uses for piece in read)) - set().union(*(piece.binds for piece in read))


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
