"""The state of the machine between two opcodes: stacks, marks, memo, and the budget of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from streamconv.readers.pickle.bounds import HOSTILE, PickleError, check_nesting
from streamconv.readers.pickle.values import Global

if TYPE_CHECKING:
    import mmap

Calls = Mapping[tuple[str, str], Callable[..., object]]
"""(module, name) -> the function of ours that stands for it."""

_MAX_LINE = 1 << 16  # bytes of a module, class or number in a text opcode
_BYTES_PER_BYTE = 64
_FREE_BYTES = 1 << 20

# Names of Python 2 that every pickle of protocol 2 and below uses (python/cpython: Lib/_compat_pickle.py).
_PYTHON_2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

_NOTHING = object()
"""What an entry of the memo is before it is made."""


class Machine:
    """The state between two opcodes. Each opcode is a function of `opcodes` that takes the machine.

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
            raise PickleError(
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
            raise PickleError(
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
            raise PickleError("an operation finds no mark")
        items = self.stack
        self.stack = self.outer.pop()
        return items

    def spend(self, allocated: int) -> None:
        """Draw on the budget for memory that the pickle's length does not bound by itself."""
        self.spent += allocated
        if self.spent > _FREE_BYTES + _BYTES_PER_BYTE * (self.position - self.start):
            raise PickleError("the pickle would take far more memory than its size explains", HOSTILE)

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
            raise PickleError(f"memo entry {index} is out of all proportion", HOSTILE)
        memo.extend([_NOTHING] * (index - len(memo)))
        memo.append(self.stack[-1])

    def recall(self, index: int) -> None:
        """Push an entry of the memo."""
        value = self.memo[index] if 0 <= index < len(self.memo) else _NOTHING
        if value is _NOTHING:
            raise PickleError(f"memo entry {index} is used and was never made")
        self.stack.append(value)

    def named(self, module: str, name: str) -> Global:
        """The one `Global` of that name."""
        module = _PYTHON_2_MODULES.get(module, module)
        return self.globals.setdefault((module, name), Global(module, name))

    def result(self) -> object:
        """The value that STOP leaves."""
        if self.outer or len(self.stack) != 1:
            raise PickleError(
                "the pickle ends with values left over" if self.stack else "the pickle holds no value"
            )
        (value,) = self.stack
        check_nesting(value)
        return value
