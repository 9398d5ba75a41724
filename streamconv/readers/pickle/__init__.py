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

`values` are what comes out. `machine` is the state between two opcodes, `opcodes` what each of them does to it,
`meanings` what a call means, and `bounds` what may be hashed and how deep containers nest.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from streamconv.errors import CheckpointError, located
from streamconv.readers.pickle.bounds import MAX_NESTING, PickleError
from streamconv.readers.pickle.machine import Calls, Machine
from streamconv.readers.pickle.opcodes import DISPATCH
from streamconv.readers.pickle.values import Global, Record, describe, elements, under

if TYPE_CHECKING:
    import mmap

__all__ = [
    "MAX_NESTING",
    "MAX_PICKLE",
    "Calls",
    "Global",
    "Record",
    "decode",
    "decode_prefix",
    "describe",
    "elements",
    "under",
]

MAX_PICKLE = 1 << 29
"""Bytes of one pickle that readers take on: some two million tensors."""
_STOP = ord(".")
_DAMAGED = "the file is damaged, or it is not what its name says"
_CUT_OFF = ("the pickle ends in the middle", "the file is cut off: copy it again")


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
    machine = Machine(data, start, calls, persistent_load)
    message: str
    hint: str | None
    at = start
    dispatch = DISPATCH
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
    except PickleError as fault:
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
