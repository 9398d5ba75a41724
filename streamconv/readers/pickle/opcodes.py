"""What each opcode does to the machine: one function an opcode.

It gives the value to push, or None where it has changed the stack itself.
Opcodes: python/cpython: Lib/pickletools.py, Lib/pickle.py. What Python 2 wrote is read too.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from types import NoneType
from typing import Any, TypeVar

from streamconv.readers.pickle.bounds import HOSTILE, PickleError, hashable, set_checked
from streamconv.readers.pickle.machine import Machine
from streamconv.readers.pickle.meanings import call, call_with_keywords
from streamconv.readers.pickle.values import Global, Record, describe

_T = TypeVar("_T")
_MAX_MARKS = 4096  # open marks; a container, its items and its constructor's arguments each need one
_MAX_INTEGER = 1024  # bytes; longer ones take quadratic time to print
_STATELESS = frozenset(
    {list, tuple, set, frozenset, bytearray, str, bytes, int, float, bool, complex, NoneType, Global}
)
_EXTENSION = "it uses a code of the process that wrote it (copyreg.add_extension), which is not in the file"
_OUT_OF_BAND = "its data is in buffers outside of it (pickle protocol 5), which are not in the file"


def _fixed(layout: str) -> Callable[[Machine], Any]:
    """What reads a number of a fixed width."""
    form = struct.Struct(layout)

    def number(machine: Machine) -> Any:
        value = form.unpack_from(machine.data, machine.position)[0]
        machine.position += form.size
        return value

    return number


def _u1(machine: Machine) -> int:
    value = machine.data[machine.position]
    machine.position += 1
    return value


_u2, _u4, _u8, _i4, _f8 = map(_fixed, ("<H", "<I", "<Q", "<i", ">d"))


def _sized(size: Callable[[Machine], int], make: Callable[[bytes], object]) -> Callable[[Machine], object]:
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


def _long(size: Callable[[Machine], int]) -> Callable[[Machine], object]:
    def long(machine: Machine) -> int:
        length = size(machine)
        if not 0 <= length <= _MAX_INTEGER:
            raise PickleError(f"an integer of {length} bytes", HOSTILE)
        return int.from_bytes(machine.take(length), "little", signed=True)

    return long


def _decimal(machine: Machine) -> int:
    line = machine.line().removesuffix(b"L")
    try:
        return int(line) if len(line) <= _MAX_INTEGER else int(b"")
    except ValueError:
        raise PickleError("a number is not a number") from None


def _int(machine: Machine) -> object:
    truth = {b"00\n": False, b"01\n": True}.get(machine.data[machine.position : machine.position + 3])
    number = _decimal(machine)
    return number if truth is None else truth


def _float(machine: Machine) -> float:
    try:
        return float(machine.line())
    except ValueError:
        raise PickleError("a number is not a number") from None


def _string(machine: Machine) -> str | bytes:
    line = machine.line(len(machine.data))
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
        raise PickleError("a string is not in quotes")
    try:
        value, _ = codecs.escape_decode(line[1:-1])
    except ValueError:
        raise PickleError("a string has a broken escape") from None
    return _text_or_bytes(value)


def _refuse(message: str) -> Callable[[Machine], None]:
    def refuse(_: Machine) -> None:
        raise PickleError(message)

    return refuse


def _protocol(machine: Machine) -> None:
    version = _u1(machine)
    if version > 5:
        raise PickleError(f"pickle protocol {version} is not known: 5 is the newest")


def _frame(machine: Machine) -> None:
    length = _u8(machine)
    if length > len(machine.data) - machine.position:
        raise PickleError(
            f"a frame of {length} bytes reaches past the end", "the file is cut off: copy it again"
        )


def _put(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    return lambda machine: machine.remember(index(machine))


def _get(index: Callable[[Machine], int]) -> Callable[[Machine], None]:
    return lambda machine: machine.recall(index(machine))


def _mark(machine: Machine) -> None:
    if len(machine.outer) >= _MAX_MARKS:
        raise PickleError(f"more than {_MAX_MARKS} marks are open: containers are nested too deep", HOSTILE)
    machine.outer.append(machine.stack)
    machine.stack = []


def _pop(machine: Machine) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.above_mark()


def _pop_mark(machine: Machine) -> None:
    machine.above_mark()


def _empty_set(machine: Machine) -> object:
    machine.spend(200)
    return set()


def _frozenset(machine: Machine) -> object:
    machine.spend(200)
    return frozenset(map(hashable, machine.above_mark()))


def _dict(machine: Machine) -> None:
    items = machine.above_mark()
    machine.stack.append({})
    _set_all(machine, items)


def _target(machine: Machine, kind: type[_T], what: str) -> _T:
    """The container at the top that elements go into; an object of an unknown class collects them."""
    target = machine.stack[-1]
    if type(target) is Record:
        if target.items is None:
            target.items = [] if kind is list else {}
        target = target.items
    if type(target) is not kind:
        raise PickleError(f"{what} {describe(target)}")
    return target


def _extend(machine: Machine, items: list[object]) -> None:
    _target(machine, list, "an element is appended to").extend(items)


def _set_all(machine: Machine, items: list[object]) -> None:
    target = _target(machine, dict, "a key is set in")
    if len(items) % 2:
        raise PickleError("a key is set without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        set_checked(target, key, value)


def _add_items(machine: Machine) -> None:
    items = machine.above_mark()
    target = machine.stack[-1]
    if type(target) is not set:
        raise PickleError(f"an element is added to {describe(target)}")
    target.update(map(hashable, items))


def _persistent(machine: Machine, identifier: object) -> None:
    if machine.persistent_load is None:
        raise PickleError("it refers to an object outside of itself", "this kind of file has no such objects")
    machine.stack.append(machine.persistent_load(identifier))


def _global(machine: Machine) -> Global:
    module = _text(machine.line())
    return machine.named(module, _text(machine.line()))


def _stack_global(machine: Machine) -> Global:
    module, name = machine.pop(2)
    if type(module) is not str or type(name) is not str:
        raise PickleError(f"{describe(module)} and {describe(name)} are to name a class")
    return machine.named(module, name)


def _call(machine: Machine, function: object, args: object) -> None:
    machine.stack.append(call(machine, function, args))


def _obj(machine: Machine) -> None:
    items = machine.above_mark()
    _call(machine, items[0], tuple(items[1:]))


def _build(machine: Machine) -> None:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is Record:
        if target.state is not None:
            raise PickleError(f"the state of {target.cls} is set twice")
        target.state = state
    elif type(target) in _STATELESS:
        raise PickleError(f"{describe(target)} is given a state")


DISPATCH: list[Callable[[Machine], object]] = [_refuse("this is not a pickle operation")] * 256
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
    b"t": lambda machine: tuple(machine.above_mark()), b"l": Machine.above_mark, b"d": _dict, b"\x91": _frozenset,
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
    b"\x92": lambda machine: machine.stack.append(call_with_keywords(machine, *machine.pop(3))), b"b": _build,
    b"P": lambda machine: _persistent(machine, _text(machine.line())),
    b"Q": lambda machine: _persistent(machine, machine.stack.pop()),
    # the file
    b"\x80": _protocol, b"\x95": _frame,
    **dict.fromkeys((b"\x82", b"\x83", b"\x84"), _refuse(_EXTENSION)),
    **dict.fromkeys((b"\x97", b"\x98"), _refuse(_OUT_OF_BAND)),
}.items():  # fmt: skip
    DISPATCH[_code[0]] = _operation
