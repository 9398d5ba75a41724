"""An inert pickle machine: it decodes the data in a pickle and runs none of the code.

Plain containers and values come out as themselves. Every other class or function is a `Global`, which is
a name and nothing more; whatever the pickle makes by calling one is a `Record` of the call. Nothing is
ever imported or called by a name from the file: what a reader wants to have rebuilt (tensors), it passes
in as a table of its own functions.

Bounds, for a pickle of n bytes up to the failing one:

- memory: about 64 bytes for each byte of n, plus what the reader's own functions make. Operations that
  could copy more than the pickle holds (sets, conversions, concatenations) draw on that budget.
- time: a constant for each byte of n. Dict keys and set elements are checked before they are hashed, as
  hashing a tuple of shared tuples takes exponential time.
- depth: containers nest at most `MAX_NESTING` deep. Cycles are possible, as in any pickle.

Opcodes: python/cpython: Lib/pickletools.py, Lib/pickle.py. What Python 2 wrote is read too.
"""

from __future__ import annotations

import codecs
import gc
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, TypeVar

from streamconv.errors import CheckpointError, located

if TYPE_CHECKING:
    import mmap

MAX_PICKLE = 1 << 29
"""Bytes of one pickle that readers take on: some two million tensors."""

MAX_NESTING = 256
"""Containers within containers. Python's own pickler ends at its recursion limit, 1000 by default."""

_MAX_MARKS = 4096  # open marks; a container, its items and its constructor's arguments each need one
_MAX_INTEGER = 1024  # bytes; longer ones take quadratic time to print
_MAX_LINE = 1 << 16  # bytes of a module, class or number in a text opcode
_MAX_KEY_LENGTH = 1 << 16
_MAX_KEY_PARTS = 256
_LONGEST_QUOTE = 200  # characters of the file that a message quotes
_MAX_ARGUMENTS = 32  # of a known function
_BYTES_PER_BYTE = 64
_FREE_BYTES = 1 << 20
_STOP = ord(".")

_CUT_OFF = ("the pickle ends in the middle", "the file is cut off: copy it again")
_DAMAGED = "the file is damaged, or it is not what its name says"
_HOSTILE = "no training program writes such a file; do not trust it"
_EXTENSION = "it uses a code of the process that wrote it (copyreg.add_extension), which is not in the file"
_OUT_OF_BAND = "its data is in buffers outside of it (pickle protocol 5), which are not in the file"

# Names of Python 2 that every pickle of protocol 2 and below uses (python/cpython: Lib/_compat_pickle.py).
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_T = TypeVar("_T")

Calls = Mapping[tuple[str, str], Callable[..., object]]
"""(module, name) -> the function of ours that stands for it."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class, function or constant that a pickle names. Only the name."""

    module: str
    name: str

    def __str__(self) -> str:
        return describe(f"{self.module}.{self.name}", quote="")


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """An object of a class that this program does not know: how it was made, as data.

    Attributes:
        cls: what the pickle called or instantiated.
        args: what with.
        state: what was put into the object afterwards: mostly its `__dict__`.
        items: elements that were appended to it (a list) or set in it (a dict), or None.
    """

    cls: Global
    args: tuple[object, ...] = ()
    state: object = None
    items: dict[object, object] | list[object] | None = None

    def __repr__(self) -> str:
        return f"Record({self.cls})"

    @property
    def fields(self) -> dict[object, object]:
        """The object's attributes as its pickled state gives them: from `__dict__` and from slots."""
        state = self.state
        if type(state) is dict:
            return state
        if type(state) is tuple and len(state) == 2:
            parts = [part for part in state if part is not None]
            if parts and all(type(part) is dict for part in parts):
                return {key: value for part in parts for key, value in part.items()}
        return {}


def under(value: object, *keys: str) -> Any:
    """What lies under keys of nested dicts and attributes of records from a file; None where there is nothing."""
    for key in keys:
        fields = value.fields if isinstance(value, Record) else value
        value = fields.get(key) if isinstance(fields, dict) else None
    return value


def elements(value: object, *keys: str) -> Sequence[Any]:
    """The elements of the list or tuple that lies under keys, see `under`; none where nothing of the kind is there."""
    found = under(value, *keys)
    return found if isinstance(found, (list, tuple)) else ()


def decode(
    data: bytes | mmap.mmap,
    *,
    file: str,
    calls: Calls = MappingProxyType({}),
    persistent_load: Callable[[object], object] | None = None,
) -> object:
    """The object in a pickle that is all of `data`.

    Args:
        data: the pickle.
        file: named in errors.
        calls: the only functions that are called, for the globals of their keys; they raise
            `CheckpointError`, which need not name the file. Without an entry a call gives a `Record`.
        persistent_load: what the pickle means by a persistent id.

    Raises:
        CheckpointError: no whole pickle, one that breaks a bound of this module, or bytes after it.
    """
    value, end = decode_prefix(data, file=file, calls=calls, persistent_load=persistent_load)
    if end != len(data):
        raise CheckpointError(
            f"{len(data) - end} bytes follow the end of the pickle at byte {end}",
            file=file,
            hint="the file is damaged, or it is not one pickle",
        )
    return value


def decode_prefix(
    data: bytes | mmap.mmap,
    start: int = 0,
    *,
    file: str,
    calls: Calls = MappingProxyType({}),
    persistent_load: Callable[[object], object] | None = None,
) -> tuple[object, int]:
    """The object in the pickle that begins at byte `start`, and the position after its end.

    Arguments and errors are those of `decode`; what follows the pickle is left alone.
    """
    machine = _Machine(data, start, calls, persistent_load)
    message: str
    hint: str | None
    at = start
    dispatch = _DISPATCH
    try:
        with located(file), _collector_paused():
            while True:
                at = machine.position
                code = data[at]
                machine.position = at + 1
                if code == _STOP:
                    break
                value = dispatch[code](machine)
                if value is not None:
                    machine.stack.append(value)
            return machine.result(), machine.position
    except _PickleError as fault:
        message, hint = fault.message, fault.hint
    except struct.error:
        message, hint = _CUT_OFF
    except IndexError:
        at_end = machine.position >= len(data)
        message, hint = _CUT_OFF if at_end else ("an operation finds too few values", None)
    except UnicodeDecodeError as error:
        message, hint = f"text is not valid {error.encoding}", None
    raise CheckpointError(f"byte {at - start} of the pickle: {message}", file=file, hint=hint or _DAMAGED)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Keep Python's cycle collector from walking all that has been decoded, again and again.

    Nothing is garbage yet, and the walks take a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def describe(value: object, quote: str = "'") -> str:
    """A value from a file in a few printable words, for messages. Never walks into containers."""
    if isinstance(value, str):
        text = value if len(value) <= _LONGEST_QUOTE else value[:_LONGEST_QUOTE] + "..."
        printable = text if text.isprintable() else text.encode("unicode-escape").decode()
        return f"{quote}{printable}{quote}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge integer"
    if isinstance(value, (int, float, NoneType, Global, Record)):
        return str(value)
    return f"a {type(value).__name__}"


_NOTHING = object()
"""What an entry of the memo is before it is made."""

_RESULT_OF = Global("", "result of")
_OBJECT_KEY = Global("", "object as key")
_CONTAINERS = frozenset({dict, list, tuple, set, frozenset, Record})
_STATELESS = frozenset(
    {list, tuple, set, frozenset, bytearray, str, bytes, int, float, bool, complex, NoneType, Global}
)


class _PickleError(Exception):
    """What is wrong with the pickle, for the loop to say where."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint


class _Machine:
    """The state between two opcodes. Each opcode is a function below that takes the machine.

    A mark puts the values below it aside, so that no operation can reach under a mark by accident.
    """

    __slots__ = (
        "calls", "data", "globals", "memo", "outer", "persistent_load", "position", "spent", "stack", "start",
    )  # fmt: skip

    def __init__(
        self,
        data: bytes | mmap.mmap,
        start: int,
        calls: Calls,
        persistent_load: Callable[[object], object] | None,
    ) -> None:
        self.data = data
        self.start = start
        self.position = start
        self.calls = calls
        self.persistent_load = persistent_load
        self.stack: list[object] = []
        self.outer: list[list[object]] = []
        self.memo: list[object] = []
        self.globals: dict[tuple[str, str], Global] = {}
        self.spent = 0

    def take(self, length: int) -> bytes:
        """The next `length` bytes."""
        start = self.position
        end = start + length
        if end > len(self.data):
            raise _PickleError(
                f"{length} bytes are announced and {len(self.data) - start} are left",
                "the file is cut off or damaged: copy it again",
            )
        self.position = end
        return self.data[start:end]

    def line(self, limit: int = _MAX_LINE) -> bytes:
        """The bytes up to a line end, which is passed over."""
        start = self.position
        end = self.data.find(b"\n", start, start + limit)
        if end < 0:
            raise _PickleError(
                f"a line is longer than {limit} bytes"
                if start + limit < len(self.data)
                else "a line has no end"
            )
        self.position = end + 1
        return self.data[start:end]

    def pop(self, count: int) -> list[object]:
        """The last `count` values, which are taken away."""
        stack = self.stack
        if len(stack) < count:
            raise IndexError
        values = stack[-count:]
        del stack[-count:]
        return values

    def above_mark(self) -> list[object]:
        """The values since the last mark, which is taken away with them."""
        if not self.outer:
            raise _PickleError("an operation finds no mark")
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def spend(self, allocated: int) -> None:
        """Draw on the budget for memory that the pickle's length does not bound by itself."""
        self.spent += allocated
        if self.spent > _FREE_BYTES + _BYTES_PER_BYTE * (self.position - self.start):
            raise _PickleError("the pickle would take far more memory than its size explains", _HOSTILE)

    def remember(self, index: int) -> None:
        """Put the top of the stack into the memo."""
        memo = self.memo
        if index == len(memo):
            memo.append(self.stack[-1])
            return
        if 0 <= index < len(memo):
            memo[index] = self.stack[-1]
            return
        # Picklers number what they memoise, so an index never exceeds the bytes written so far.
        if not 0 <= index <= self.position - self.start:
            raise _PickleError(f"memo entry {index} is out of all proportion", _HOSTILE)
        memo.extend([_NOTHING] * (index - len(memo)))
        memo.append(self.stack[-1])

    def recall(self, index: int) -> None:
        """Push an entry of the memo."""
        value = self.memo[index] if 0 <= index < len(self.memo) else _NOTHING
        if value is _NOTHING:
            raise _PickleError(f"memo entry {index} is used and was never made")
        self.stack.append(value)

    def named(self, module: str, name: str) -> Global:
        """The one `Global` of that name."""
        module = _PYTHON_2_MODULES.get(module, module)
        return self.globals.setdefault((module, name), Global(module, name))

    def call(self, function: object, args: object) -> object:
        """What a call in the pickle gives: our function's result, a plain value, or a record."""
        if type(args) is not tuple:
            raise _PickleError(f"a call has {describe(args)} for its arguments")
        if type(function) is not Global:
            if type(function) is Record:
                return Record(_RESULT_OF, (function, args))
            raise _PickleError(f"{describe(function)} is called, which is neither a class nor a function")
        key = (function.module, function.name)
        known = self.calls.get(key)
        if known is not None:
            if len(args) > _MAX_ARGUMENTS:
                raise _PickleError(f"{function} is called with {len(args)} arguments")
            try:
                return known(*args)
            except TypeError as error:
                raise _PickleError(f"{function} is called with arguments that it does not take") from error
        plain = _PLAIN.get(key)
        if plain is not None:
            return plain(self, args)
        return Record(function, args)

    def result(self) -> object:
        """The value that STOP leaves."""
        if self.outer or len(self.stack) != 1:
            raise _PickleError(
                "the pickle ends with values left over" if self.stack else "the pickle holds no value"
            )
        (value,) = self.stack
        _check_nesting(value)
        return value


def _hashable(value: object) -> object:
    """`value` as a dict key or set element: itself, or a record by identity for what cannot be compared.

    Raises:
        _PickleError: hashing or comparing it would fail or could take long.
    """
    parts = [value]
    seen = characters = 0
    while parts:
        part = parts.pop()
        seen += 1
        if isinstance(part, (tuple, frozenset)):
            if seen + len(parts) + len(part) > _MAX_KEY_PARTS:
                raise _PickleError(
                    f"a dict key or set element has more than {_MAX_KEY_PARTS} parts", _HOSTILE
                )
            parts.extend(part)
        elif isinstance(part, (str, bytes)):
            characters += len(part)
            if characters > _MAX_KEY_LENGTH:
                raise _PickleError(f"a dict key or set element has {characters} characters", _HOSTILE)
        elif isinstance(part, int):
            # Python hashes integers modulo 2**61 - 1: longer ones can be made to collide at will.
            if not -(1 << 64) < part < 1 << 64:
                raise _PickleError("a dict key or set element is a huge integer", _HOSTILE)
        elif isinstance(part, (list, dict, set, bytearray)):
            raise _PickleError(f"{describe(part)} is used as a dict key or set element")
        elif not isinstance(part, (float, complex, NoneType, Global, Record)):
            if part is value:
                return Record(_OBJECT_KEY, (value,))
            raise _PickleError(f"{describe(part)} is used within a dict key or set element")
    return value


def _set_checked(target: dict[object, object], key: object, value: object) -> None:
    """`target[key] = value`, after a look at the key."""
    if type(key) is not str or len(key) > _MAX_KEY_LENGTH:
        key = _hashable(key)
    target[key] = value


def _children(value: object) -> Iterator[object]:
    """The values directly inside a container of this module's making; nothing for any other value."""
    if isinstance(value, dict):
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from value
    elif isinstance(value, Record):
        yield value.args
        yield value.state
        yield value.items


def _check_nesting(root: object) -> None:
    """Refuse a value that a recursive walk could not follow. A cycle is followed once around."""
    if type(root) not in _CONTAINERS:
        return
    heights: dict[int, int] = {id(root): 0}
    path = [(root, _children(root))]
    tallest = [0]  # for each container of the path: the height of its tallest child so far
    while path:
        container, rest = path[-1]
        for child in rest:
            if type(child) not in _CONTAINERS:
                continue
            known = heights.get(id(child))
            if known is None:
                heights[id(child)] = 0
                path.append((child, _children(child)))
                tallest.append(0)
                break
            tallest[-1] = max(tallest[-1], known)
        else:
            path.pop()
            height = tallest.pop() + 1
            heights[id(container)] = height
            if tallest:
                tallest[-1] = max(tallest[-1], height)
        # On the path down there is no height yet, but the path itself is as high.
        if len(path) + (tallest[-1] if tallest else 0) > MAX_NESTING:
            raise _PickleError(f"containers are nested more than {MAX_NESTING} deep", _HOSTILE)


# ---------------------------------------------------------------------- calls that give plain values


def _only(args: tuple[object, ...], what: str) -> object:
    """The one argument of a constructor, None without any."""
    if len(args) > 1:
        raise _PickleError(f"{what} is made of {len(args)} arguments")
    return args[0] if args else None


def _plain_dict(machine: _Machine, args: tuple[object, ...]) -> object:
    """OrderedDict, dict, Counter: of nothing, of a mapping, or of pairs (Python 2)."""
    source = _only(args, "a dict")
    if source is None:
        return {}
    if isinstance(source, dict):
        return source
    if not isinstance(source, (list, tuple)):
        raise _PickleError(f"a dict is made of {describe(source)}")
    machine.spend(100 * len(source))
    result: dict[object, object] = {}
    for pair in source:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise _PickleError(f"a dict is made of {describe(pair)} where a pair belongs")
        _set_checked(result, pair[0], pair[1])
    return result


def _elements(machine: _Machine, args: tuple[object, ...], kind: type[object]) -> list[object]:
    """The elements that a list, tuple or set is made of."""
    source = _only(args, f"a {kind.__name__}")
    if source is None:
        return []
    if not isinstance(source, (list, tuple, set, frozenset)):
        raise _PickleError(f"a {kind.__name__} is made of {describe(source)}")
    machine.spend(200 + 100 * len(source))
    return list(source)


def _plain_tuple(machine: _Machine, args: tuple[object, ...]) -> object:
    if len(args) == 1 and type(args[0]) is tuple:
        return args[0]
    return tuple(_elements(machine, args, tuple))


def _plain_complex(_: _Machine, args: tuple[object, ...]) -> object:
    numbers = [
        float(arg) for arg in args if isinstance(arg, float) or (type(arg) is int and abs(arg) < 1 << 64)
    ]
    if len(numbers) != len(args) or len(args) > 2:
        raise _PickleError("a complex number is made of something that is not two numbers")
    return complex(*numbers)


def _encode(machine: _Machine, args: tuple[object, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: how protocol 2 and below write bytes."""
    text, encoding = (*args, "utf-8")[:2] if args else (None, None)
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii") or len(args) > 2:
        raise _PickleError("bytes are encoded in a way that no pickler does")
    machine.spend(len(text))
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        raise _PickleError(f"text that stands for bytes does not fit {encoding}") from None


def _plain_bytes(machine: _Machine, args: tuple[object, ...]) -> bytes:
    if not args:
        return b""
    if type(args[0]) is str:
        return _encode(machine, args)
    source = _only(args, "bytes")
    if type(source) is bytes:
        return source
    if isinstance(source, (list, tuple)):
        machine.spend(len(source))
        if all(type(value) is int and 0 <= value < 256 for value in source):
            return bytes(source)
    raise _PickleError("bytes are made of something else than bytes")


def _plain_bytearray(machine: _Machine, args: tuple[object, ...]) -> object:
    value = _plain_bytes(machine, args)
    machine.spend(len(value))
    return bytearray(value)


def _reconstructor(_: _Machine, args: tuple[object, ...]) -> object:
    """`copyreg._reconstructor(cls, base, value of base)`: how protocols 0 and 1 make an object."""
    if len(args) != 3 or not isinstance(args[0], Global):
        raise _PickleError("copyreg._reconstructor is called in a way that no pickler does")
    cls, base, value = args[0], args[1], args[2]
    return Record(cls, () if base == Global("builtins", "object") else (value,))


def _new_object(machine: _Machine, args: tuple[object, ...]) -> object:
    """`copyreg.__newobj__(cls, *args)`: NEWOBJ spelled for old protocols."""
    if not args:
        raise _PickleError("copyreg.__newobj__ is called without a class")
    machine.spend(8 * len(args))
    return machine.call(args[0], args[1:])


def _new_object_with_keywords(machine: _Machine, args: tuple[object, ...]) -> object:
    """`copyreg.__newobj_ex__(cls, args, keywords)`: NEWOBJ_EX spelled for old protocols."""
    if len(args) != 3:
        raise _PickleError("copyreg.__newobj_ex__ is called without a class")
    return _with_keywords(machine, *args)


def _with_keywords(machine: _Machine, cls: object, args: object, keywords: object) -> object:
    """A call with keyword arguments: they follow the others as one dict."""
    if type(keywords) is not dict or type(args) is not tuple:
        raise _PickleError("an object is made with something that is not arguments")
    if keywords:
        machine.spend(8 * len(args))
        args = (*args, keywords)
    return machine.call(cls, args)


_PLAIN: dict[tuple[str, str], Callable[[_Machine, tuple[object, ...]], object]] = {
    ("builtins", "bytearray"): _plain_bytearray,
    ("builtins", "bytes"): _plain_bytes,
    ("builtins", "complex"): _plain_complex,
    ("builtins", "dict"): _plain_dict,
    ("builtins", "frozenset"): lambda machine, args: frozenset(
        map(_hashable, _elements(machine, args, frozenset))
    ),
    ("builtins", "list"): lambda machine, args: _elements(machine, args, list),
    ("builtins", "set"): lambda machine, args: set(map(_hashable, _elements(machine, args, set))),
    ("builtins", "tuple"): _plain_tuple,
    ("collections", "Counter"): _plain_dict,
    ("collections", "OrderedDict"): _plain_dict,
    ("collections", "defaultdict"): lambda machine, args: _plain_dict(machine, args[1:]),
    ("copyreg", "__newobj__"): _new_object,
    ("copyreg", "__newobj_ex__"): _new_object_with_keywords,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("torch", "Size"): _plain_tuple,
    ("_codecs", "encode"): _encode,
}


# ------------------------------------------------------------------------------------- opcodes
#
# One function an opcode. It gives the value to push, or None where it has changed the stack itself.


def _fixed(layout: str) -> Callable[[_Machine], Any]:
    """What reads a number of a fixed width."""
    form = struct.Struct(layout)

    def number(machine: _Machine) -> Any:
        value = form.unpack_from(machine.data, machine.position)[0]
        machine.position += form.size
        return value

    return number


def _u1(machine: _Machine) -> int:
    value = machine.data[machine.position]
    machine.position += 1
    return value


_u2, _u4, _u8, _i4, _f8 = map(_fixed, ("<H", "<I", "<Q", "<i", ">d"))


def _sized(size: Callable[[_Machine], int], make: Callable[[bytes], object]) -> Callable[[_Machine], object]:
    """The opcode that pushes what `make` gives for a length and that many bytes."""
    return lambda machine: make(machine.take(size(machine)))


def _text(data: bytes) -> str:
    return str(data, "utf-8", "surrogatepass")


def _text_or_bytes(data: bytes) -> str | bytes:
    """A Python 2 string, which held either."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _long(size: Callable[[_Machine], int]) -> Callable[[_Machine], object]:
    def long(machine: _Machine) -> int:
        length = size(machine)
        if not 0 <= length <= _MAX_INTEGER:
            raise _PickleError(f"an integer of {length} bytes", _HOSTILE)
        return int.from_bytes(machine.take(length), "little", signed=True)

    return long


def _decimal(machine: _Machine) -> int:
    line = machine.line().removesuffix(b"L")
    try:
        return int(line) if len(line) <= _MAX_INTEGER else int(b"")
    except ValueError:
        raise _PickleError("a number is not a number") from None


def _int(machine: _Machine) -> object:
    truth = {b"00\n": False, b"01\n": True}.get(machine.data[machine.position : machine.position + 3])
    number = _decimal(machine)
    return number if truth is None else truth


def _float(machine: _Machine) -> float:
    try:
        return float(machine.line())
    except ValueError:
        raise _PickleError("a number is not a number") from None


def _string(machine: _Machine) -> str | bytes:
    line = machine.line(len(machine.data))
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise _PickleError("a string is not in quotes")
    try:
        value, _ = codecs.escape_decode(line[1:-1])
    except ValueError:
        raise _PickleError("a string has a broken escape") from None
    return _text_or_bytes(value)


def _refuse(message: str) -> Callable[[_Machine], None]:
    def refuse(_: _Machine) -> None:
        raise _PickleError(message)

    return refuse


def _protocol(machine: _Machine) -> None:
    version = _u1(machine)
    if version > 5:
        raise _PickleError(f"pickle protocol {version} is not known: 5 is the newest")


def _frame(machine: _Machine) -> None:
    length = _u8(machine)
    if length > len(machine.data) - machine.position:
        raise _PickleError(
            f"a frame of {length} bytes reaches past the end", "the file is cut off: copy it again"
        )


def _put(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.remember(index(machine))


def _get(index: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    return lambda machine: machine.recall(index(machine))


def _mark(machine: _Machine) -> None:
    if len(machine.outer) >= _MAX_MARKS:
        raise _PickleError(f"more than {_MAX_MARKS} marks are open: containers are nested too deep", _HOSTILE)
    machine.outer.append(machine.stack)
    machine.stack = []


def _pop(machine: _Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.above_mark()


def _pop_mark(machine: _Machine) -> None:
    machine.above_mark()


def _empty_set(machine: _Machine) -> object:
    machine.spend(200)
    return set()


def _frozenset(machine: _Machine) -> object:
    machine.spend(200)
    return frozenset(map(_hashable, machine.above_mark()))


def _dict(machine: _Machine) -> None:
    items = machine.above_mark()
    machine.stack.append({})
    _set_all(machine, items)


def _target(machine: _Machine, kind: type[_T], what: str) -> _T:
    """The container at the top that elements go into; an object of an unknown class collects them."""
    target = machine.stack[-1]
    if type(target) is Record:
        if target.items is None:
            target.items = [] if kind is list else {}
        target = target.items
    if type(target) is not kind:
        raise _PickleError(f"{what} {describe(target)}")
    return target


def _extend(machine: _Machine, items: list[object]) -> None:
    _target(machine, list, "an element is appended to").extend(items)


def _set_all(machine: _Machine, items: list[object]) -> None:
    target = _target(machine, dict, "a key is set in")
    if len(items) % 2:
        raise _PickleError("a key is set without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        _set_checked(target, key, value)


def _add_items(machine: _Machine) -> None:
    items = machine.above_mark()
    target = machine.stack[-1]
    if type(target) is not set:
        raise _PickleError(f"an element is added to {describe(target)}")
    target.update(map(_hashable, items))


def _persistent(machine: _Machine, identifier: object) -> None:
    if machine.persistent_load is None:
        raise _PickleError(
            "it refers to an object outside of itself", "this kind of file has no such objects"
        )
    machine.stack.append(machine.persistent_load(identifier))


def _global(machine: _Machine) -> Global:
    module = _text(machine.line())
    return machine.named(module, _text(machine.line()))


def _stack_global(machine: _Machine) -> Global:
    module, name = machine.pop(2)
    if type(module) is not str or type(name) is not str:
        raise _PickleError(f"{describe(module)} and {describe(name)} are to name a class")
    return machine.named(module, name)


def _call(machine: _Machine, function: object, args: object) -> None:
    machine.stack.append(machine.call(function, args))


def _obj(machine: _Machine) -> None:
    items = machine.above_mark()
    _call(machine, items[0], tuple(items[1:]))


def _build(machine: _Machine) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is Record:
        if target.state is not None:
            raise _PickleError(f"the state of {target.cls} is set twice")
        target.state = state
    elif type(target) in _STATELESS:
        raise _PickleError(f"{describe(target)} is given a state")
    # Attributes of a dict (as in `OrderedDict._metadata`) or of a tensor hold nothing that we read.


_DISPATCH: list[Callable[[_Machine], object]] = [_refuse("this is not a pickle operation")] * 256
for _code, _operation in {
    # numbers, text and constants
    b"F": _float, b"G": _f8, b"I": _int, b"J": _i4, b"K": _u1, b"L": _decimal, b"M": _u2,
    b"S": _string, b"T": _sized(_u4, _text_or_bytes), b"U": _sized(_u1, _text_or_bytes),
    b"V": lambda machine: str(machine.line(len(machine.data)), "raw-unicode-escape"), b"X": _sized(_u4, _text),
    b"\x8a": _long(_u1), b"\x8b": _long(_i4),
    b"B": _sized(_u4, bytes), b"C": _sized(_u1, bytes), b"\x8e": _sized(_u8, bytes),
    b"\x8c": _sized(_u1, _text), b"\x8d": _sized(_u8, _text), b"\x96": _sized(_u8, bytearray),
    b"N": lambda machine: machine.stack.append(None), b"\x88": lambda _: True, b"\x89": lambda _: False,
    # containers
    b")": lambda _: (), b"]": lambda _: [], b"}": lambda _: {}, b"\x8f": _empty_set,
    b"t": lambda machine: tuple(machine.above_mark()), b"l": _Machine.above_mark, b"d": _dict, b"\x91": _frozenset,
    b"\x85": lambda machine: tuple(machine.pop(1)), b"\x86": lambda machine: tuple(machine.pop(2)),
    b"\x87": lambda machine: tuple(machine.pop(3)),
    b"a": lambda machine: _extend(machine, machine.pop(1)),
    b"e": lambda machine: _extend(machine, machine.above_mark()),
    b"s": lambda machine: _set_all(machine, machine.pop(2)),
    b"u": lambda machine: _set_all(machine, machine.above_mark()), b"\x90": _add_items,
    # the stack and the memo
    b"(": _mark, b"0": _pop, b"1": _pop_mark, b"2": lambda machine: machine.stack.append(machine.stack[-1]),
    b"p": _put(_decimal), b"q": _put(_u1), b"r": _put(_u4),
    b"\x94": lambda machine: machine.memo.append(machine.stack[-1]),
    b"g": _get(_decimal), b"h": _get(_u1), b"j": _get(_u4),
    # classes and calls
    b"c": _global, b"\x93": _stack_global,
    b"R": lambda machine: _call(machine, *machine.pop(2)), b"\x81": lambda machine: _call(machine, *machine.pop(2)),
    b"i": lambda machine: _call(machine, _global(machine), tuple(machine.above_mark())), b"o": _obj,
    b"\x92": lambda machine: machine.stack.append(_with_keywords(machine, *machine.pop(3))), b"b": _build,
    b"P": lambda machine: _persistent(machine, _text(machine.line())),
    b"Q": lambda machine: _persistent(machine, machine.stack.pop()),
    # the file
    b"\x80": _protocol, b"\x95": _frame,
    **dict.fromkeys((b"\x82", b"\x83", b"\x84"), _refuse(_EXTENSION)),
    **dict.fromkeys((b"\x97", b"\x98"), _refuse(_OUT_OF_BAND)),
}.items():  # fmt: skip
    _DISPATCH[_code[0]] = _operation
