"""A pickle as plain data, without `pickle`: nothing is imported or called, even `os.system` becomes a `Stub`."""
import pickletools
from collections.abc import Callable
from typing import Any

from softmask_jax.io.tree_files import one_line

MOST_BYTES = 64 * 2**20
MOST_OPCODES = 20_000_000


class Stub:
    """A class or function that a pickle imports, or with `args` the result of its call."""

    def __init__(self, name: str, args: tuple | None = None):
        self.name, self.args = name, args
        self.state: Any = None
        self.items: dict = {}

    def __repr__(self) -> str:
        return f"<{self.name}>"


class PersistentId(tuple):
    """Reference to something outside the pickle; in PyTorch's files a storage."""


class BadPickle(ValueError):
    """A damaged or malicious pickle."""


def read(content: bytes, call: Callable[[str, tuple], Any] = Stub) -> Any:
    """The object of a pickle, its calls made by `call(name, arguments)`. BadPickle if damaged, malicious or large."""
    if len(content) > MOST_BYTES:
        raise BadPickle(f"a pickle of {len(content):,} bytes")
    machine = _Machine(call)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST_OPCODES:
                raise BadPickle("too many opcodes")
            if opcode.name not in _ACTIONS:
                raise BadPickle(f"the opcode {opcode.name}, which no checkpoint needs")
            _ACTIONS[opcode.name](machine, argument)
        return machine.pop()
    except BadPickle:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, UnicodeError) as error:
        raise BadPickle(f"a damaged pickle: {one_line(error):.100}") from None


_MARK = object()


class _Machine:
    """The stack machine of `pickle`'s opcodes, as far as data goes."""

    def __init__(self, call: Callable[[str, tuple], Any]):
        self.stack: list = []
        self.memo: dict[int, Any] = {}
        self.push, self.result = self.stack.append, call

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise BadPickle("a damaged pickle: a mark where a value belongs")
        return value

    def last(self, count: int) -> list:
        """Pop `count` values, oldest first."""
        return [self.pop() for _ in range(count)][::-1]

    def to_mark(self) -> list:
        """Pop the values after the last mark, and the mark."""
        mark = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if mark is None:
            raise BadPickle("a damaged pickle: no mark")
        values = self.stack[mark + 1 :]
        del self.stack[mark:]
        return values

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def extend(self, values: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)
        elif not isinstance(self.stack[-1], Stub):
            raise BadPickle("a damaged pickle: elements for what is no list")

    def set_items(self, values: list) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], Stub) else self.stack[-1]
        if not isinstance(target, dict):
            raise BadPickle("a damaged pickle: items for what is no dict")
        target |= _items(values)

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Stub) or not isinstance(arguments, tuple):
            raise BadPickle("a damaged pickle: a call of what is no function")
        self.push({} if function.name == "collections.OrderedDict" else self.result(function.name, arguments))

    def call_with(self, function: Any, *arguments: Any) -> None:
        self.call(function, arguments)

    def set_state(self, state: Any) -> None:
        if isinstance(self.stack[-1], Stub):
            self.stack[-1].state = state


def _items(values: list) -> dict:
    """A dict from keys and values in turn."""
    # Other keys are not needed, and hashing a deeply nested one overflows the interpreter's stack.
    pairs = zip(values[::2], values[1::2], strict=True)
    return {key: value for key, value in pairs if key is None or isinstance(key, (str, int, float, bytes))}


_SCALARS = (
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING",
    "SHORT_BINSTRING", "STRING",
)  # fmt: skip
# Actions by opcode, on the machine and the opcode's argument. Elements of sets are not needed.
_ACTIONS = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_SCALARS, lambda m, value: m.push(value)),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_SET": lambda m, _: m.push(set()),
    "TUPLE1": lambda m, _: m.push(tuple(m.last(1))),
    "TUPLE2": lambda m, _: m.push(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.last(3))),
    "TUPLE": lambda m, _: m.push(tuple(m.to_mark())),
    "LIST": lambda m, _: m.push(m.to_mark()),
    "DICT": lambda m, _: m.push(_items(m.to_mark())),
    "FROZENSET": lambda m, _: m.push(frozenset(m.to_mark()[:0])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET", "GET"), lambda m, index: m.push(m.memo[index])),
    "MARK": lambda m, _: m.push(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    **dict.fromkeys(("ADDITEMS", "POP_MARK"), lambda m, _: m.to_mark()),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.to_mark()),
    "SETITEM": lambda m, _: m.set_items(m.last(2)),
    "SETITEMS": lambda m, _: m.set_items(m.to_mark()),
    "GLOBAL": lambda m, name: m.push(Stub(name.replace(" ", "."))),
    "STACK_GLOBAL": lambda m, _: m.push(Stub(".".join(f"{part:.200}" for part in m.last(2)))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(*m.last(2))),
    "NEWOBJ_EX": lambda m, _: m.call(*m.last(3)[:2]),
    "OBJ": lambda m, _: m.call_with(*m.to_mark()),
    "INST": lambda m, name: m.call_with(Stub(name.replace(" ", ".")), *m.to_mark()),
    "BUILD": lambda m, _: m.set_state(m.pop()),
    "BINPERSID": lambda m, _: m.push(PersistentId(m.pop())),
}
