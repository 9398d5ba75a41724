"""What a call in a pickle means: a function of the reader's, a plain value, or else a record of the call."""

from __future__ import annotations

from collections.abc import Callable

from streamconv.readers.pickle.bounds import PickleError, hashable, set_checked
from streamconv.readers.pickle.machine import Machine
from streamconv.readers.pickle.values import Global, Record, describe

_MAX_ARGUMENTS = 32  # of a known function
_RESULT_OF = Global("", "result of")


def call(machine: Machine, function: object, args: object) -> object:
    """What a call in the pickle gives: our function's result, a plain value, or a record."""
    if type(args) is not tuple:
        raise PickleError(f"a call has {describe(args)} for its arguments")
    if type(function) is not Global:
        if type(function) is Record:
            return Record(_RESULT_OF, (function, args))
        raise PickleError(f"{describe(function)} is called, which is neither a class nor a function")
    key = (function.module, function.name)
    known = machine.calls.get(key)
    if known is not None:
        if len(args) > _MAX_ARGUMENTS:
            raise PickleError(f"{function} is called with {len(args)} arguments")
        try:
            return known(*args)
        except TypeError as error:
            raise PickleError(f"{function} is called with arguments that it does not take") from error
    plain = _PLAIN.get(key)
    if plain is not None:
        return plain(machine, args)
    return Record(function, args)


def call_with_keywords(machine: Machine, cls: object, args: object, keywords: object) -> object:
    """A call with keyword arguments: they follow the others as one dict."""
    if type(keywords) is not dict or type(args) is not tuple:
        raise PickleError("an object is made with something that is not arguments")
    if keywords:
        machine.spend(8 * len(args))
        args = (*args, keywords)
    return call(machine, cls, args)


def _only(args: tuple[object, ...], what: str) -> object:
    """The one argument of a constructor, None without any."""
    if len(args) > 1:
        raise PickleError(f"{what} is made of {len(args)} arguments")
    return args[0] if args else None


def _plain_dict(machine: Machine, args: tuple[object, ...]) -> object:
    """OrderedDict, dict, Counter: of nothing, of a mapping, or of pairs (Python 2)."""
    source = _only(args, "a dict")
    if source is None:
        return {}
    if isinstance(source, dict):
        return source
    if not isinstance(source, (list, tuple)):
        raise PickleError(f"a dict is made of {describe(source)}")
    machine.spend(100 * len(source))
    result: dict[object, object] = {}
    for pair in source:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise PickleError(f"a dict is made of {describe(pair)} where a pair belongs")
        set_checked(result, pair[0], pair[1])
    return result


def _elements(machine: Machine, args: tuple[object, ...], kind: type[object]) -> list[object]:
    """The elements that a list, tuple or set is made of."""
    source = _only(args, f"a {kind.__name__}")
    if source is None:
        return []
    if not isinstance(source, (list, tuple, set, frozenset)):
        raise PickleError(f"a {kind.__name__} is made of {describe(source)}")
    machine.spend(200 + 100 * len(source))
    return list(source)


def _plain_tuple(machine: Machine, args: tuple[object, ...]) -> object:
    if len(args) == 1 and type(args[0]) is tuple:
        return args[0]
    return tuple(_elements(machine, args, tuple))


def _plain_complex(_: Machine, args: tuple[object, ...]) -> object:
    numbers = [
        float(arg) for arg in args if isinstance(arg, float) or (type(arg) is int and abs(arg) < 1 << 64)
    ]
    if len(numbers) != len(args) or len(args) > 2:
        raise PickleError("a complex number is made of something that is not two numbers")
    return complex(*numbers)


def _encode(machine: Machine, args: tuple[object, ...]) -> bytes:
    """`_codecs.encode(text, 'latin1')`: how protocol 2 and below write bytes."""
    text, encoding = (*args, "utf-8")[:2] if args else (None, None)
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii") or len(args) > 2:
        raise PickleError("bytes are encoded in a way that no pickler does")
    machine.spend(len(text))
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        raise PickleError(f"text that stands for bytes does not fit {encoding}") from None


def _plain_bytes(machine: Machine, args: tuple[object, ...]) -> bytes:
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
    raise PickleError("bytes are made of something else than bytes")


def _plain_bytearray(machine: Machine, args: tuple[object, ...]) -> object:
    value = _plain_bytes(machine, args)
    machine.spend(len(value))
    return bytearray(value)


def _reconstructor(_: Machine, args: tuple[object, ...]) -> object:
    """`copyreg._reconstructor(cls, base, value of base)`: how protocols 0 and 1 make an object."""
    if len(args) != 3 or not isinstance(args[0], Global):
        raise PickleError("copyreg._reconstructor is called in a way that no pickler does")
    cls, base, value = args[0], args[1], args[2]
    return Record(cls, () if base == Global("builtins", "object") else (value,))


def _new_object(machine: Machine, args: tuple[object, ...]) -> object:
    """`copyreg.__newobj__(cls, *args)`: NEWOBJ spelled for old protocols."""
    if not args:
        raise PickleError("copyreg.__newobj__ is called without a class")
    machine.spend(8 * len(args))
    return call(machine, args[0], args[1:])


def _new_object_with_keywords(machine: Machine, args: tuple[object, ...]) -> object:
    """`copyreg.__newobj_ex__(cls, args, keywords)`: NEWOBJ_EX spelled for old protocols."""
    if len(args) != 3:
        raise PickleError("copyreg.__newobj_ex__ is called without a class")
    return call_with_keywords(machine, *args)


_PLAIN: dict[tuple[str, str], Callable[[Machine, tuple[object, ...]], object]] = {
    ("builtins", "bytearray"): _plain_bytearray,
    ("builtins", "bytes"): _plain_bytes,
    ("builtins", "complex"): _plain_complex,
    ("builtins", "dict"): _plain_dict,
    ("builtins", "frozenset"): lambda machine, args: frozenset(
        map(hashable, _elements(machine, args, frozenset))
    ),
    ("builtins", "list"): lambda machine, args: _elements(machine, args, list),
    ("builtins", "set"): lambda machine, args: set(map(hashable, _elements(machine, args, set))),
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
