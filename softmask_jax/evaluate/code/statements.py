"""A program's statements at the top level, and those of them that some names need."""
import ast
import builtins
import dataclasses
import re
import symtable
import warnings
from collections.abc import Collection, Iterator, Sequence

from softmask_jax.evaluate.code.fences import STRING_OR_COMMENT

# What Python's parser raises for text that is no program, or too much for it.
UNREADABLE = (SyntaxError, ValueError, MemoryError, RecursionError)
# A statement begins at the margin, not behind a decorator or a backslash, nor with what continues another.
START = re.compile(
    r"(?<!\\\n)^(?:@[^\n(]*(?:\((?:[^()]|\([^()]*\))*\))?.*\n\s*)*"
    r"(?![ \t\n#]|(?:else|finally)[ \t]*:|(?:elif|except)\b.*:)(?=.)", re.MULTILINE,
)  # fmt: skip
OPEN, CLOSED = "([{", ")]}"
TOKENS = re.compile(rf"{STRING_OR_COMMENT}|[()\[\]{{}}]", re.DOTALL)
# A program with these may call anything that it defines.
BY_NAME = frozenset({"eval", "exec", "globals"})
BUILT_IN = frozenset(dir(builtins))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclasses.dataclass(frozen=True, eq=False)
class Statement:
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
        """Whether it defines a function or class `name`."""
        return any(
            isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == name
            or isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda) and name in self.binds
            for node in self.body
        )  # fmt: skip

    @property
    def returns(self) -> bool:
        nodes = (node for part in self.body for node in ast.walk(part))
        return any(isinstance(node, (ast.Return, ast.Yield, ast.YieldFrom)) for node in nodes)

    @property
    def imports(self) -> bool:
        return isinstance(self.body[0], (ast.Import, ast.ImportFrom))

    @property
    def is_future(self) -> bool:
        return self.imports and getattr(self.body[0], "module", "") == "__future__"

    @property
    def is_general(self) -> bool:
        """Whether any name may need it, as what it binds is not known."""
        return self.is_future or "globals" in self.binds or self.imports and self.body[0].names[0].name == "*"

    @property
    def calls(self) -> list[ast.Call]:
        """Calls for their effect alone, not within functions."""
        return [
            node.value for statement in self.body for node in _executed(statement)
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        ]  # fmt: skip


def statements(text: str) -> list[Statement]:
    """Readable statements of `text`; an unreadable line at the margin is left out with the indented lines below it."""
    starts = [match.start() for match in START.finditer(text)] + [len(text)]
    read, first = [], 0
    # Invalid escape sequences warn.
    with warnings.catch_warnings(action="ignore"):
        while first < len(starts) - 1:
            stop = _end(text, starts, first)
            try:
                read += _read(text[starts[first] : starts[stop]].rstrip("\n"))
            except UNREADABLE:
                stop = first + 1
            first = stop
    return read


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


def _read(source: str) -> list[Statement]:
    """The statement of a source; [] if it does nothing where it is imported."""
    body = ast.parse(source).body
    if not body or isinstance(body[0], ast.If) and "__name__" in map(_root, ast.walk(body[0].test)):
        return []
    table = symtable.symtable(source, "answer", "exec")
    symbols = table.get_symbols()
    executed = [node for statement in body for node in _executed(statement)]
    binds = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    changed = (node for node in executed if isinstance(node, (ast.Attribute, ast.Subscript)))
    binds |= {_root(node) for node in changed if not isinstance(node.ctx, ast.Load)}
    # A loop that fills a table needs no other loop with its variable.
    targets = [node.target for node in executed if isinstance(node, ast.For)]
    own = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    uses = {symbol.get_name() for symbol in symbols if symbol.is_referenced()} - own
    return [Statement(source, tuple(body), frozenset(binds), frozenset(uses.union(_globals(table))))]


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """Names of the module that the functions and classes of a table use."""
    for child in table.get_children():
        yield from (symbol.get_name() for symbol in child.get_symbols() if symbol.is_global())
        yield from _globals(child)


def _executed(statement: ast.stmt) -> Iterator[ast.AST]:
    """Nodes of a statement outside of functions."""
    waiting = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def _root(node: ast.AST | None) -> str:
    """The name that `a.b[c].d()` begins with."""
    while node is not None and not isinstance(node, ast.Name):
        node = getattr(node, "value", None) or getattr(node, "func", None)
    return node.id if node else ""


def _is_stub(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a body is no more than a docstring, `pass`, `...` or `raise NotImplementedError`."""
    return all(
        isinstance(node, ast.Pass) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        or isinstance(node, ast.Raise) and _root(node.exc) == "NotImplementedError"
        for node in function.body
    )  # fmt: skip


def needed(blocks: Sequence[Sequence[Statement]], wanted: Collection[str], entries: Collection[str]) -> list[Statement]:
    """Statements that `wanted` names need, of blocks in running order; the last block that binds a name counts. No
    examples, tests or input; nor callers of the functions under test, `entries`, unless they bind a needed name."""
    providers = {name: block for block in blocks for part in block for name in part.binds}
    ordered = [(part, block) for block in blocks for part in block]
    defined = {name for part, _ in ordered for name in part.binds if part.defines(name)}

    def kept(names: Collection[str]) -> list[Statement]:
        return [
            part for part, block in ordered
            if part.is_general or any(providers[name] is block for name in part.binds.intersection(names))
        ]  # fmt: skip

    def closed(names: Collection[str]) -> set[str]:
        names, before = set(names), set()
        while names != before:
            before = set(names)
            names = names.union(*(part.uses for part in kept(names)), defined if names & BY_NAME else ())
        return names

    last = max((n for n, (part, _) in enumerate(ordered) if any(map(part.implements, entries))), default=0)
    names, effects, before = closed(wanted), [], None
    while before != names:
        before, needs = set(names), kept(names)
        known = {"sys", "setattr"}.union(*(part.binds for part in needs if part.imports))
        variables = set().union(*(part.binds for part in needs if not part.imports)) - defined
        effects = []
        for n, (part, _) in enumerate(ordered):
            roots = {_root(call.func) for call in part.calls} - (BUILT_IN - {"setattr"})
            if not roots or (reached := closed(part.uses)).intersection(entries):
                continue
            if reached & variables or n < last and roots & known:
                effects.append(part)
        names = closed(names.union(*(part.uses for part in effects)))
    chosen = {*map(id, kept(names)), *map(id, effects)}
    return sorted((part for part, _ in ordered if id(part) in chosen), key=lambda part: not part.is_future)
