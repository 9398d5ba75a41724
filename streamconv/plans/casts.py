"""What a cast may touch, and with that the dtype of every target.

A dtype for all is for floating-point numbers: not for the codes and scales of quantised weights, and not to round
what the model's own library keeps in F32. An override names what it is for, and is followed, but for codes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from streamconv.dtypes import DType, by_name
from streamconv.errors import Problem, count, listed
from streamconv.plans import registry
from streamconv.plans.architecture import Config
from streamconv.plans.codes import quantised
from streamconv.plans.edits import Edits, match
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.patterns import Pattern, shape_of
from streamconv.tensor import TensorSpec


@dataclass(frozen=True, slots=True)
class Casting:
    """What a cast is of one component.

    Attributes:
        dtypes: of each target.
        casts: whether any target gets another dtype than it has.
        left: codes and scales that are not cast, in words, and the recipe for that; empty where there are none.
    """

    dtypes: Mapping[str, DType]
    casts: bool = False
    left: tuple[str, str] | None = None


def without_effect(castings: Iterable[Casting], dtype: DType | None) -> list[Problem]:
    """The problem of a dtype for all that no tensor gets, because all that it would be for is quantised."""
    every = list(castings)
    left = next((casting.left for casting in every if casting.left), None)
    if left is None or any(casting.casts for casting in every):
        return []
    what, advice = left
    message = f"--dtype {dtype} casts no tensor: what has another dtype is the codes and scales of quantised weights, {what}"
    return [Problem(message, hint=f"{advice}; or leave --dtype out")]


def casting_of(
    specs: Mapping[str, TensorSpec], where: str, config: Config | None, edits: Edits, used: set[Pattern],
    findings: Findings,
) -> Casting:  # fmt: skip
    """The dtype of each target of the component in directory `where`, whose config is `config`.

    Every override that matched something is added to `used`.
    """
    found = {name: spec.dtype for name, spec in specs.items()}
    if edits.dtype is None and not edits.dtype_overrides:
        return Casting(found)
    named = {name: dtype for name in specs if (dtype := override(name, where, edits, used)) is not None}
    codes = quantised(specs, config)
    kept = registry.kept(config or {}, edits.dtype) if edits.dtype else None
    left: list[str] = []
    wide: list[str] = []
    for name, own in found.items():
        if name in named:
            found[name] = named[name]
        elif edits.dtype in (None, own):
            continue
        elif name in codes:
            left.append(name)
        elif own.kind != "float" or own.packed:
            continue
        elif kept is not None and kept(name):
            found[name] = min(own, by_name("F32"), key=lambda dtype: dtype.bits)
            wide.append(name)
        else:
            found[name] = edits.dtype
    wrong = [name for name, dtype in named.items() if codes.get(name) and dtype != specs[name].dtype]
    advice = _advice(specs) if wrong or left else ""
    findings.problems += grouped(
        Problem(
            f"it is {specs[name].dtype} codes of a quantised weight, which are not numbers to cast",
            tensor=f"{where}/{name}" if where else name,
            hint=f"leave it out of the --dtype pattern; {advice}",
        )
        for name in wrong
    )
    what = f"{count(len(left), 'tensor')}: {_kinds(left)}"
    casts = any(dtype != specs[name].dtype for name, dtype in found.items())
    if left and casts:
        # First: most of the model is not what was asked for.
        findings.notes.insert(
            0, f"of quantised weights, codes and scales stay as they are under --dtype, {what}; {advice}"
        )
    if wide:
        findings.notes.append(
            f"the library that loads the model keeps some in F32, which do not become {edits.dtype}, "
            f"{count(len(wide), 'tensor')}: {_kinds(wide)}; --dtype 'PATTERN={edits.dtype}' casts them"
        )
    return Casting(found, casts, (what, advice) if left else None)


def override(name: str, where: str, edits: Edits, used: set[Pattern]) -> DType | None:
    """What the last override that matches a name says."""
    matching = [
        dtype for pattern, dtype in edits.dtype_overrides if match(pattern, where, name, used) is not None
    ]
    return matching[-1] if matching else None


def _advice(names: Collection[str]) -> str:
    recipes = registry.dequantising(names)
    return f"--recipe {recipes[0]} makes them plain" if recipes else "no recipe here dequantises them"


def _kinds(names: Sequence[str]) -> str:
    """Names that differ in their indices alone as one, as a pattern."""
    return listed(dict.fromkeys(shape_of(name).replace("{}", "*") for name in names))
