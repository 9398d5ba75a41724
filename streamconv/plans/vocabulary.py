"""More or fewer rows in the embedding and the head: for kernels that want round numbers, or for new tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamconv.errors import UsageError
from streamconv.ops import Concat, Expression, MeanRows, Pad, Truncate, apply, renamed
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.findings import Findings
from streamconv.plans.plan import Targets

_SIZE = "vocab"
"""What tables call the number of rows."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is wanted of the number of rows; at most one of the two.

    Attributes:
        multiple: rounded up to a multiple of this.
        size: exactly this.
        fill: new rows are the mean of the old ones, or zero.
    """

    multiple: int | None = None
    size: int | None = None
    fill: str = "mean"

    def __post_init__(self) -> None:
        if self.multiple is not None and self.size is not None:
            raise UsageError("--pad-vocab and --resize-vocab together", hint="give one of them")
        for option, number in (("--pad-vocab", self.multiple), ("--resize-vocab", self.size)):
            if number is not None and number < 1:
                raise UsageError(f"{option} {number}", hint="a number of rows, at least 1")
        if self.fill not in ("mean", "zero"):
            raise UsageError(f"--vocab-fill {self.fill}", hint="mean or zero")

    def of(self, rows: int) -> int:
        """The number of rows that is wanted in place of `rows`."""
        if self.size is not None:
            return self.size
        return rows if self.multiple is None else -(-rows // self.multiple) * self.multiple


def resize(
    targets: Targets,
    config: Config,
    architecture: Architecture,
    wanted: Vocabulary,
    used: int | None,
    findings: Findings,
) -> tuple[Targets, Config]:
    """Targets and config with the wanted number of rows in every tensor that has the vocabulary as a dimension.

    `used` is the number of rows that the tokenizer can ask for, or None where that is not known.

    Raises:
        UsageError: the architecture has no vocabulary, or rows in use would be cut off.
        PlanError: a tensor cannot be resized.
    """
    sizes = architecture.sizes_of(config)
    rows = sizes.get(_SIZE)
    if architecture.vocabulary is None or not isinstance(rows, int):
        raise UsageError(f"nothing is known of a vocabulary of {architecture.title}")
    to = wanted.of(rows)
    if used is not None and to < used:
        raise UsageError(
            f"a vocabulary of {to} rows is too small: the tokenizer has ids up to {used - 1}",
            hint=f"at least {used}; or take tokens out of the tokenizer first",
        )
    if to == rows:
        findings.notes.append("the vocabulary has as many rows as are wanted")
        return targets, config
    axes = _axes(architecture, sizes)
    made = {
        name: (sources, renamed(_resized(expression, axes[name], to, wanted.fill), name))
        if name in axes
        else (sources, expression)
        for name, (sources, expression) in targets.items()
    }
    new = f"new rows are {'the mean of the others' if wanted.fill == 'mean' else 'zero'}"
    how = new if to > rows else "cut"
    known = f"; the tokenizer has ids up to {used - 1}" if used is not None else "; no tokenizer was checked"
    findings.notes.append(f"the vocabulary goes from {rows} to {to} rows, {how}{known}")
    return made, {**config, architecture.vocabulary: to}


def used_ids(tokenizer: str | None) -> int | None:
    """How many ids a `tokenizer.json` can give, or None where that is not known.

    Raises:
        UsageError: it cannot be read.
    """
    if tokenizer is None:
        return None
    try:
        document = json.loads(tokenizer)
        vocabulary = document["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        added = (token["id"] for token in document.get("added_tokens") or ())
        return 1 + max(*(int(index) for index in ids), *(int(index) for index in added), -1, -1)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"the vocabulary in tokenizer.json cannot be read: {error}") from error


def _axes(architecture: Architecture, sizes: Mapping[str, Any]) -> dict[str, int]:
    """Which axis of which tensor is the vocabulary."""
    found: dict[str, int] = {}
    for line in architecture.lines:
        dimensions = formula.elements(line.dimensions)
        if _SIZE in dimensions:
            axis = dimensions.index(_SIZE)
            found |= dict.fromkeys((name for name, _ in line.declared(sizes, architecture.counts)), axis)
    return found


def _resized(expression: Expression, axis: int, to: int, fill: str) -> Expression:
    rows = expression.spec.shape[axis]
    if to < rows:
        return apply(Truncate(axis, to), expression)[0]
    if axis != 0:
        raise UsageError(
            f"its vocabulary is axis {axis}; only rows can be added", tensor=expression.spec.name
        )
    if fill != "mean":
        return apply(Pad(0, to), expression)[0]
    return apply(Concat(0), expression, *apply(MeanRows(to - rows), expression))[0]
