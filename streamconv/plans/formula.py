"""The small language that recipes are written in: formulas over sizes, and programs over tensors.

Its grammar is Python's, cut down to what can be read at a glance: numbers, text, lists, arithmetic,
comparisons, `a if c else b`, `and`/`or`/`not`, indexing, and calls of the functions that are given. A
program is a few assignments of that. Nothing else parses, so a recipe from a file runs no code.

A name that is not known is None, as a key that a config lacks: `head_dim or hidden_size // heads`. Where it is known
beforehand which names there are, `check` refuses others.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from streamconv.errors import UsageError, listed

Functions = Mapping[str, Callable[..., Any]]

# Powers beyond this are not sizes of any model, and may take forever to work out.
_MAX_EXPONENT = 64


def _power(base: Any, exponent: Any) -> Any:
    if abs(exponent) > _MAX_EXPONENT or abs(base) > 1 << 63:
        raise UsageError(f"{base} to the power of {exponent} is not a size of a model")
    return base**exponent


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_WORD = re.compile(r"[A-Za-z_]\w*")
# What every formula may call.
_PLAIN: Functions = {"bool": bool, "int": int, "len": len, "max": max, "min": min}

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def evaluate(text: str, names: Mapping[str, Any], functions: Functions | None = None) -> Any:
    """The value of a formula.

    Raises:
        UsageError: it is not in the language, or what it asks for cannot be worked out.
    """
    return _value(_formula(text), names, {**_PLAIN, **functions} if functions else _PLAIN)


def run(program: str, names: Mapping[str, Any], functions: Functions) -> dict[str, Any]:
    """What all names stand for after a program: lines of `a = formula` or `a, b = formula`.

    Raises:
        UsageError: as for `evaluate`, or a formula does not give as many values as there are names.
    """
    scope = dict(names)
    known = {**_PLAIN, **functions}
    for targets, node in _program(program):
        value = _value(node, scope, known)
        if len(targets) == 1:
            scope[targets[0]] = value
            continue
        if not isinstance(value, list | tuple) or len(value) != len(targets):
            given = len(value) if isinstance(value, list | tuple) else 1
            raise UsageError(f"'{ast.unparse(node)}' gives {given} values for {', '.join(targets)}")
        scope.update(zip(targets, value, strict=True))
    return scope


def check(text: str, names: Collection[str], functions: Functions | None = None) -> None:
    """See that a formula uses these names and functions alone: at run time, a name that is not known is None.

    Raises:
        UsageError: it uses another, or is not in the language.
    """
    _check(_formula(text), names, {**_PLAIN, **(functions or {})})


def check_program(program: str, names: Collection[str], functions: Functions) -> set[str]:
    """The same of a program, whose lines know what those before them gave; the names that are known after it.

    Raises:
        UsageError: as for `check`.
    """
    known, callable_ = set(names), {**_PLAIN, **functions}
    for targets, node in _program(program):
        _check(node, known, callable_)
        known.update(targets)
    return known


def idle(program: str, wanted: Collection[str]) -> list[str]:
    """The names that a program assigns and neither uses in a line below nor gives as one of those that are wanted."""
    used, found = set(wanted), list[str]()
    for targets, node in reversed(_program(program)):
        found += (name for name in targets if name not in used)
        used = used.difference(targets) | _mentioned(node)
    return found[::-1]


def _check(node: ast.expr, names: Collection[str], functions: Functions) -> None:
    called = {part.func.id for part in ast.walk(node)
              if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}  # fmt: skip
    for what, used, known in (("name", _mentioned(node), names), ("function", called, functions)):
        for name in sorted(used - set(known)):
            near = get_close_matches(name, known, n=1)
            hint = (
                f"did you mean '{near[0]}'?" if near else f"there are {listed(sorted(known), 12) or 'none'}"
            )
            raise UsageError(f"'{ast.unparse(node)}': there is no {what} '{name}'", hint=hint)


def names_in(text: str) -> frozenset[str]:
    """Every name that a formula mentions, except the functions it calls."""
    return _mentioned(_formula(text))


def calls_in(program: str) -> frozenset[str]:
    """The functions that a program calls."""
    parts = (part for _, tree in _program(program) for part in ast.walk(tree))
    return frozenset(
        part.func.id for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
    )


def elements(text: str) -> list[str]:
    """The formulas in a list, each by itself; none where it is not a list."""
    tree = _formula(text)
    return [ast.unparse(element) for element in tree.elts] if isinstance(tree, ast.List) else []


def substituted(text: str, formulas: Mapping[str, str]) -> str:
    """A formula with others in the place of names."""
    return _substituted(text, tuple(formulas.items()))


# Recipes make all their tables as they are imported, and many lines of them have the same formulas.
@lru_cache(maxsize=4096)
def _substituted(text: str, formulas: tuple[tuple[str, str], ...]) -> str:
    # Most mention none of the names, not even as words, and need no parsing.
    names = {name for name, _ in formulas}
    if names.isdisjoint(_WORD.findall(text)) or names.isdisjoint(names_in(text)):
        return text
    # The kept tree must stay as it is, and parsing again is far quicker than copying it.
    return ast.unparse(_Substitution(formulas).visit(_formula.__wrapped__(text)))


def conjunction(*conditions: str) -> str:
    """A formula that is true where all of these are; empty ones, and those that say True, are left out."""
    said = [condition for condition in conditions if condition not in ("", "True")]
    if len(said) < 2:
        return "".join(said)
    parts: list[ast.expr] = []
    for tree in map(_formula, said):
        parts += tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    return ast.unparse(ast.BoolOp(ast.And(), parts))


class _Substitution(ast.NodeTransformer):
    def __init__(self, formulas: tuple[tuple[str, str], ...]) -> None:
        self.trees = {name: _formula(text) for name, text in formulas}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.trees.get(node.id, node)


@lru_cache(maxsize=4096)
def _formula(text: str) -> ast.expr:
    with _parsing(text, "a formula"):
        return ast.parse(text.strip(), mode="eval").body


@lru_cache(maxsize=4096)
def _program(text: str) -> tuple[tuple[tuple[str, ...], ast.expr], ...]:
    with _parsing(text, "a program of a recipe"):
        tree = ast.parse("\n".join(line.strip() for line in text.strip().splitlines()))
    return tuple(_assignment(statement) for statement in tree.body)


@contextmanager
def _parsing(text: str, what: str) -> Iterator[None]:
    try:
        yield
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"'{text}' is not {what}: {error}") from None


def _assignment(statement: ast.stmt) -> tuple[tuple[str, ...], ast.expr]:
    match statement:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            return (name,), value
        case ast.Assign(targets=[ast.Tuple(elts=names)], value=value) if all(
            isinstance(name, ast.Name) for name in names
        ):
            return tuple(name.id for name in names if isinstance(name, ast.Name)), value
    raise UsageError(f"'{ast.unparse(statement)}': a program of a recipe consists of `name = formula`")


def _value(node: ast.expr, names: Mapping[str, Any], functions: Functions) -> Any:
    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=constant):
                return constant
            case ast.Name(id=name):
                return names.get(name)
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return [value(element) for element in elements]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](_number(value(left)), _number(value(right)))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not value(operand)
            case ast.BoolOp(op=op, values=parts):
                for part in parts:
                    result = value(part)
                    if bool(result) == isinstance(op, ast.Or):
                        break
                return result
            case ast.Compare(left=left, ops=ops, comparators=others):
                sides = [value(side) for side in (left, *others)]
                return all(
                    _COMPARISONS[type(op)](sides[at], sides[at + 1])
                    for at, op in enumerate(ops)
                    if type(op) in _COMPARISONS or _refuse(node)
                )
            case ast.IfExp(test=test, body=body, orelse=other):
                return value(body) if value(test) else value(other)
            case ast.Subscript(value=holder, slice=index):
                return _item(value(holder), value(index))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords) if name in functions:
                named = {keyword.arg: value(keyword.value) for keyword in keywords if keyword.arg}
                return functions[name](*map(value, arguments), **named)
        return _refuse(node)

    try:
        return value(node)
    except (TypeError, ZeroDivisionError, OverflowError, ValueError, AttributeError) as error:
        missing = sorted(name for name in _mentioned(node) if names.get(name) is None)
        why = f"there is no {', '.join(missing)}" if missing else str(error)
        raise UsageError(f"'{ast.unparse(node)}' cannot be worked out: {why}") from error


def _mentioned(node: ast.expr) -> frozenset[str]:
    called = {part.func for part in ast.walk(node) if isinstance(part, ast.Call)}
    return frozenset(part.id for part in ast.walk(node) if isinstance(part, ast.Name) and part not in called)


def _refuse(node: ast.expr) -> bool:
    raise UsageError(f"'{ast.unparse(node)}' is not in the language of recipes")


def _number(value: Any) -> Any:
    # Text times a number is text in Python, and as long as a hostile config likes.
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r:.40} is not a number")
    return value


def _item(holder: Any, index: Any) -> Any:
    """An item, or None as for an unknown name."""
    if isinstance(holder, Mapping):
        return holder.get(index)
    return holder[index] if holder is not None and -len(holder) <= index < len(holder) else None
