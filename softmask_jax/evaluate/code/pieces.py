"""A program's statements at the top level, and those of them that some names need."""
import ast
import builtins
import dataclasses
import re
import symtable
import warnings
from collections.abc import Collection, Iterator, Sequence

from softmask_jax.evaluate.code.fences import STRING_OR_COMMENT

# What Python's parser raises for text that is not a program, or more than it can take.
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
# Where a statement begins: at the margin, not behind a decorator or a backslash, nor with what goes on with another.
STATEMENT = re.compile(
    r"(?<!\\\n)^(?:@[^\n(]*(?:\((?:[^()]|\([^()]*\))*\))?.*\n\s*)*"
    r"(?![ \t\n#]|(?:else|finally)[ \t]*:|(?:elif|except)\b.*:)(?=.)", re.MULTILINE,
)  # fmt: skip
OPEN, CLOSED = "([{", ")]}"
TOKENS = re.compile(rf"{STRING_OR_COMMENT}|[()\[\]{{}}]", re.DOTALL)
# With these in use a program may call whatever it defines.
BY_NAME = frozenset({"eval", "exec", "globals"})
BUILT_IN = frozenset(dir(builtins))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """Statements that begin at one line: their source, the names that they bind or change, and those that they use."""

    source: str
    body: tuple[ast.stmt, ...]
    binds: frozenset[str]
    uses: frozenset[str]

    def implements(self, name: str) -> bool:
        """Whether `name` is bound, and not to a function without a body."""
        return name in self.binds and not any(
            isinstance(node, FUNCTIONS) and node.name == name and _is_stub(node) for node in self.body
        )

    def defines(self, name: str) -> bool:
        """Whether `name` is a function or class of this very piece."""
        return any(
            isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name
            or isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and name in self.binds for node in self.body
        )  # fmt: skip

    @property
    def returns(self) -> bool:
        return any(isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) for part in self.body for node in ast.walk(part))

    @property
    def is_future(self) -> bool:
        return isinstance(self.body[0], ast.ImportFrom) and self.body[0].module == "__future__"

    @property
    def is_general(self) -> bool:
        """Whether it is needed whatever names are: what it binds is not known."""
        return self.is_future or "globals" in self.binds or self.imports and self.body[0].names[0].name == "*"

    @property
    def imports(self) -> bool:
        return isinstance(self.body[0], (ast.Import, ast.ImportFrom))

    @property
    def calls(self) -> list[ast.Call]:
        """Calls for their effect alone, not within functions."""
        return [
            node.value for statement in self.body for node in _executed(statement)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]  # fmt: skip


def pieces(text: str) -> list[Piece]:
    """The statements of `text` that Python can read; lines at the margin that it cannot are left out with what is
    indented below them."""
    starts = [match.start() for match in STATEMENT.finditer(text)] + [len(text)]
    found, first = [], 0
    with warnings.catch_warnings():
        # Escapes that Python does not know.
        warnings.simplefilter("ignore")
        while first < len(starts) - 1:
            stop = _end(text, starts, first)
            try:
                found += _read(text[starts[first] : starts[stop]].rstrip("\n"))
            except UNREADABLE:
                stop = first + 1
            first = stop
    return found


def _end(text: str, starts: Sequence[int], first: int) -> int:
    """The first of `starts` after `first` at which no bracket and no string is open."""
    depth, stop = 0, first + 1
    for match in TOKENS.finditer(text, starts[first]):
        if depth <= 0 and starts[stop] <= match.start():
            return stop
        while stop < len(starts) - 1 and starts[stop] < match.end():
            stop += 1
        depth += (match[0] in OPEN) - (match[0] in CLOSED)
    return stop if depth <= 0 else first + 1


def _read(source: str) -> list[Piece]:
    """The piece that a source is, if it does anything where it is imported."""
    body = ast.parse(source).body
    if not body or isinstance(body[0], ast.If) and "__name__" in map(_root, ast.walk(body[0].test)):
        return []
    table = symtable.symtable(source, "answer", "exec")
    symbols = table.get_symbols()
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    executed = [node for statement in body for node in _executed(statement)]
    for node in executed:
        if isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            binds.add(_root(node))
    # A loop that fills a table needs no other loop with its variable.
    own = {name.id for node in executed if isinstance(node, ast.For) for name in ast.walk(node.target)
           if isinstance(name, ast.Name)}  # fmt: skip
    uses = {symbol.get_name() for symbol in symbols if symbol.is_referenced()} - own
    return [Piece(source, tuple(body), frozenset(binds), frozenset(uses.union(_globals(table))))]


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Names of the module that the functions and classes of a table use."""
    for child in table.get_children():
        yield from (symbol.get_name() for symbol in child.get_symbols() if symbol.is_global())
        yield from _globals(child)


def _executed(statement: ast.stmt) -> Iterator[ast.AST]:
    """A statement's nodes, but for what is within functions."""
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _root(node: ast.AST) -> str:
    """The name that `a.b[c].d()` begins with."""
    while not isinstance(node, ast.Name):
        node = getattr(node, "value", None) or getattr(node, "func", None)
        if node is None:
            return ""
    return node.id


def _is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a body is no more than a docstring, `pass`, `...` or `raise NotImplementedError`."""
    return all(
        isinstance(node, ast.Pass) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        or isinstance(node, ast.Raise) and node.exc is not None and _root(node.exc) == "NotImplementedError"
        for node in function.body
    )  # fmt: skip


def needed(blocks: Sequence[Sequence[Piece]], wanted: Collection[str], entries: Collection[str]) -> list[Piece]:
    """The pieces that `wanted` names need, of blocks in the order in which they run: a name is what the last one that
    binds it makes of it.

    These are imports, definitions and assignments of needed names, calls that change what those are, and what all of
    these use; not examples, tests or input. entries: the functions that are asked for. What calls them is no part of
    them, unless it binds a needed name.
    """
    providers = {name: block for block in blocks for piece in block for name in piece.binds}
    ordered = [(piece, block) for block in blocks for piece in block]
    defined = {name for piece, _ in ordered for name in piece.binds if piece.defines(name)}

    def kept(names: Collection[str]) -> list[Piece]:
        return [
            piece for piece, block in ordered
            if piece.is_general or any(providers[name] is block for name in piece.binds.intersection(names))
        ]  # fmt: skip

    def closed(names: Collection[str]) -> set[str]:
        names, before = set(names), set()
        while names != before:
            before = set(names)
            names = names.union(*(piece.uses for piece in kept(names)), defined if names & BY_NAME else ())
        return names

    last = max((n for n, (piece, _) in enumerate(ordered) if any(map(piece.implements, entries))), default=0)
    names, effects, before = closed(wanted), [], None
    while before != names:
        before, found = set(names), kept(names)
        known = {"sys", "setattr"}.union(*(piece.binds for piece in found if piece.imports))
        variables = set().union(*(piece.binds for piece in found if not piece.imports)) - defined
        effects = []
        for n, (piece, _) in enumerate(ordered):
            roots = {_root(call.func) for call in piece.calls} - (BUILT_IN - {"setattr"})
            if roots and not (reached := closed(piece.uses)).intersection(entries):
                if reached & variables or n < last and roots & known:
                    effects.append(piece)
        names = closed(names.union(*(piece.uses for piece in effects)))
    chosen = {*map(id, kept(names)), *map(id, effects)}
    found = [piece for piece, _ in ordered if id(piece) in chosen]
    return sorted(found, key=lambda piece: not piece.is_future)
