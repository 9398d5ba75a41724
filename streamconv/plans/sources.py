"""What expressions are made of: which tensors, and what operations take for granted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from streamconv.ops import Expression, Node, leaves
from streamconv.plans.plan import Check, Targets
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


def proofs(targets: Targets) -> list[Check]:
    """What the operations in targets' expressions need the run to check, each once."""
    found: list[Check] = []
    seen: set[int] = set()

    def visit(target: str, expression: Expression) -> None:
        # Results of one operation share its operands.
        if not isinstance(expression, Node) or not expression.operands or id(expression.operands) in seen:
            return
        seen.add(id(expression.operands))
        for left, right in expression.op.checks(expression.operands):
            names = " and ".join(f"'{side.spec.name}'" for side in (left, right) if leaves(side))
            found.append(Check(f"{names} must be equal to make '{target}'", left, right))
        for operand in expression.operands:
            visit(target, operand)

    for target, (_, expression) in targets.items():
        visit(target, expression)
    return found


def _key(expression: Expression) -> tuple[int, int]:
    """The same for a tensor under whichever name: what it is made of is one object."""
    if isinstance(expression, Stored):
        return id(expression.extents), 0
    return id(expression.operands), expression.result
