"""What operations take for granted, as checks that the run carries out."""

from __future__ import annotations

from streamconv.ops import Expression, Node, leaves
from streamconv.plans.plan import Check, Targets


def proofs(targets: Targets) -> list[Check]:
    """What the operations in targets' expressions need proven, each once."""
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
