"""A pickle as plain data: no class is imported, no function called, no `pickle` used.

`read` interprets the opcodes. Imports become `Stub`s with a name, their calls `Stub`s with arguments, even `os.system`;
containers and scalars are rebuilt.
"""
import pickletools
from typing import Any

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


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_SCALARS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING",
    "SHORT_BINSTRING", "STRING",
}  # fmt: skip
_NOTHING = {"PROTO", "FRAME", "STOP"}


def read(content: bytes) -> Any:
    """The object that a pickle describes. Raises BadPickle when it is damaged, too large, or uses what none needs."""
    if len(content) > MOST_BYTES:
        raise BadPickle(f"a pickle of {len(content):,} bytes")
    machine = _Machine()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > MOST_OPCODES:
                raise BadPickle("too many opcodes")
            machine.do(opcode.name, argument)
        return machine.pop()
    except BadPickle:
        raise
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, UnicodeError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise BadPickle(f"a damaged pickle: {reason:.100}") from None


class _Machine:
    """The stack machine of `pickle`'s opcodes, as far as data goes."""

    def __init__(self):
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise BadPickle("a damaged pickle: a mark where a value belongs")
        return value

    def to_mark(self) -> list:
        mark = next((i for i in reversed(range(len(self.stack))) if self.stack[i] is _MARK), None)
        if mark is None:
            raise BadPickle("a damaged pickle: no mark")
        values = self.stack[mark + 1 :]
        del self.stack[mark:]
        return values

    def do(self, name: str, argument: Any) -> None:
        push = self.stack.append
        if name in _NOTHING:
            return
        if name in _SCALARS:
            push(argument)
        elif name in _CONSTANTS:
            push(_CONSTANTS[name])
        elif name in _EMPTY:
            push(_EMPTY[name]())
        elif name in _TUPLES:
            push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            push(self.memo[argument])
        elif name == "MARK":
            push(_MARK)
        elif name in ("TUPLE", "LIST"):
            push((tuple if name == "TUPLE" else list)(self.to_mark()))
        elif name == "DICT":
            values = self.to_mark()
            push({})
            self.set_items(values)
        elif name in ("APPEND", "APPENDS"):
            values = [self.pop()] if name == "APPEND" else self.to_mark()
            if isinstance(self.stack[-1], list):
                self.stack[-1].extend(values)
            elif not isinstance(self.stack[-1], Stub):
                raise BadPickle("a damaged pickle: elements for what is no list")
        elif name in ("ADDITEMS", "POP_MARK"):
            self.to_mark()  # elements of sets are not needed
        elif name == "FROZENSET":
            self.to_mark()
            push(frozenset())
        elif name == "SETITEM":
            value, key = self.pop(), self.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.to_mark())
        elif name == "POP":
            self.stack.pop()
        elif name == "DUP":
            push(self.stack[-1])
        elif name == "GLOBAL":
            push(Stub(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = self.pop(), self.pop()
            push(Stub(f"{module:.200}.{attribute:.200}"))
        elif name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX"):
            if name == "NEWOBJ_EX":
                self.pop()
            arguments, function = self.pop(), self.pop()
            push(_call(function, arguments))
        elif name in ("OBJ", "INST"):
            values = self.to_mark()
            function = Stub(argument.replace(" ", ".")) if name == "INST" else values.pop(0)
            push(_call(function, tuple(values)))
        elif name == "BUILD":
            state = self.pop()
            if isinstance(self.stack[-1], Stub):
                self.stack[-1].state = state
        elif name == "BINPERSID":
            push(PersistentId(self.pop()))
        else:
            raise BadPickle(f"the opcode {name}, which no checkpoint needs")

    def set_items(self, values: list) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], Stub) else self.stack[-1]
        if not isinstance(target, dict):
            raise BadPickle("a damaged pickle: items for what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Other keys are not needed, and hashing a deeply nested one overflows the interpreter's stack.
            if key is None or isinstance(key, (str, int, float, bytes)):
                target[key] = value


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Stub) or not isinstance(arguments, tuple):
        raise BadPickle("a damaged pickle: a call of what is no function")
    if function.name == "collections.OrderedDict":
        return {}
    return Stub(function.name, arguments)
