"""Which of some tensors an expression is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from streamconv.ops import Expression, Node
from streamconv.tensor import Stored


class Sources:
    """Tensors by name, to be found again in what is made of them.

    Args:
        tensors: must live as long as this does.
        prefix: goes before every name.
    """

    def __init__(self, tensors: Mapping[str, Expression], prefix: str = "") -> None:
        self._names: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, tensor in tensors.items():
            self._names[_key(tensor)].append(prefix + name)

    def reached(self, expression: Expression) -> tuple[str, ...]:
        """The names of the tensors that an expression reads, in the order in which it reads them."""
        found: dict[str, None] = {}

        def visit(part: Expression) -> None:
            if (names := self._names.get(_key(part))) is not None:
                found.update(dict.fromkeys(names))
            elif isinstance(part, Node):
                for operand in part.operands:
                    visit(operand)

        visit(expression)
        return tuple(found)


def _key(expression: Expression) -> tuple[int, int]:
    """The same for a tensor under whichever name: what it is made of is one object."""
    if isinstance(expression, Stored):
        return id(expression.extents), 0
    return id(expression.operands), expression.result
