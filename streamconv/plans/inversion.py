"""Expressions read backwards: from what they give to what they were made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from streamconv.errors import PlanError
from streamconv.ops import Expression, Node, apply, renamed
from streamconv.tensor import Stored


def invert(
    roots: Sequence[Expression], given: Sequence[Expression], leaves: Sequence[Stored]
) -> tuple[Mapping[str, Expression], Sequence[tuple[Expression, Expression]]]:
    """Solve `roots == given` for the leaves, whose names differ from each other.

    Of what the roots are made of, only dtypes and shapes count. Returns each leaf's expression over what was given,
    by the leaf's name, and the pairs that must be equal for that to be right.

    Raises:
        PlanError: an operation has no inverse, or a leaf reaches no root; it names the operation.
    """
    applications: dict[int, Node] = {}  # operands before what uses them
    results: dict[int, dict[int, Expression]] = defaultdict(dict)
    found: dict[str, Expression] = {}
    checks: list[tuple[Expression, Expression]] = []

    def visit(expression: Expression) -> None:
        if isinstance(expression, Node) and _key(expression) not in applications:
            for operand in expression.operands:
                visit(operand)
            applications[_key(expression)] = expression

    def learn(expression: Expression, value: Expression) -> None:
        if value.spec.shape != expression.spec.shape:
            raise PlanError(
                f"it is {list(value.spec.shape)}; expected {list(expression.spec.shape)}",
                tensor=value.spec.name,
            )
        if isinstance(expression, Node):
            earlier = results[_key(expression)].setdefault(expression.result, value)
        else:
            earlier = found.setdefault(expression.spec.name, value)
        if earlier is not value:
            checks.append((earlier, value))

    for root, value in zip(roots, given, strict=True):
        visit(root)
        learn(root, value)
    # From the last operation to the first: whatever uses a result is undone, and the result found, before its
    # own operation is reached.
    for key, node in reversed(applications.items()):
        specs = [operand.spec for operand in node.operands]
        inverse, known = node.op.inverse(specs), results[key]
        missing = len(known) < len(node.op.spec(specs))
        if inverse is None or missing:
            raise PlanError(
                f"{node.op.name} cannot be undone",
                hint="part of its result is gone" if missing else "this direction loses what the other needs",
            )
        values = [known[index] for index in sorted(known)]
        if not node.operands:  # what was made without operands leaves only its checks
            checks += inverse.checks(values)
        for operand, value in zip(node.operands, apply(inverse, *values), strict=True):
            learn(operand, value)
    lost = [leaf.spec.name for leaf in leaves if leaf.spec.name not in found]
    if lost:
        raise PlanError("nothing of it is left to make it from", tensor=lost[0])
    return {name: renamed(value, name) for name, value in found.items()}, checks


def _key(node: Node) -> int:
    """The same for all results of one application, which share their operands."""
    return id(node.operands) if node.operands else id(node)
