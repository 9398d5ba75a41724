"""The recipe without a family: names kept, with small edits from the command line or a TOML file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from streamconv.dtypes import DType, parse
from streamconv.errors import PlanError, Problem, UsageError
from streamconv.ops import Expression, Node, in_dtype, renamed
from streamconv.options.spelling import dropping, either, quoted
from streamconv.plans.findings import Findings
from streamconv.plans.patterns import Pattern, shape_of
from streamconv.plans.plan import Dropped, Targets
from streamconv.plans.recipe_file import Keys, check_keys, reading
from streamconv.readers.checkpoint import Component
from streamconv.storage.location import Location
from streamconv.tensor import Stored

_KEYS: Keys = {
    "rename": (dict,), "drop": (list,), "only": (list,), "dtype": (str,), "dtypes": (dict,), "tied": (str,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rename:
    """Names that match `source` become what `target` says; both have the same fields."""

    source: Pattern
    target: Pattern

    def __post_init__(self) -> None:
        if self.source.fields != self.target.fields:
            odd = ", ".join(sorted(self.source.fields ^ self.target.fields))
            raise UsageError(
                f"rename '{self.source.text}={self.target.text}': {odd} is on one side only",
                hint="both sides need the same fields",
            )


@dataclass(frozen=True, slots=True)
class Edits:
    """What is done to an otherwise identical conversion.

    Attributes:
        renames: the first that matches a name applies.
        drop: matching tensors lead to no target.
        only: where there are any, all other tensors are dropped.
        dtype: for floating-point tensors that no override matches; None keeps theirs.
        dtype_overrides: the last that matches a name decides; names are the target's.
        tied: `keep` writes all names that share their bytes, `drop` only the first.

    Raises:
        UsageError: `tied` is neither.
    """

    renames: tuple[Rename, ...] = ()
    drop: tuple[Pattern, ...] = ()
    only: tuple[Pattern, ...] = ()
    dtype: DType | None = None
    dtype_overrides: tuple[tuple[Pattern, DType], ...] = ()
    tied: str = "keep"

    def __post_init__(self) -> None:
        if self.tied not in ("keep", "drop"):
            raise UsageError(f"tied '{self.tied}'", hint="keep or drop")

    def over(self, other: Edits) -> Edits:
        """These edits on top of `other`: a command line on top of a file."""
        return Edits(
            self.renames + other.renames,
            self.drop + other.drop,
            self.only + other.only,
            self.dtype or other.dtype,
            other.dtype_overrides + self.dtype_overrides,
            self.tied if self.tied != "keep" else other.tied,
        )


def parse_edits(
    rename: Sequence[str] = (),
    drop: Sequence[str] = (),
    only: Sequence[str] = (),
    dtype: Sequence[str] = (),
    tied: str = "keep",
) -> Edits:
    """Edits from the words of the command line.

    Renames are `SOURCE=TARGET` patterns; what to drop and to keep are patterns of source names; dtypes are names of
    dtypes, and `PATTERN=DTYPE` overrides; `tied` is `keep` or `drop`.

    Raises:
        UsageError: one of them cannot be read.
    """
    pairs = [text.partition("=") for text in rename]
    for text, (_, equals, target) in zip(rename, pairs, strict=True):
        if not equals or not target:
            raise UsageError(f"--rename '{text}' has no target", hint="write --rename 'OLD=NEW'")
    plain = [parse(text).name for text in dtype if "=" not in text]
    if len(plain) > 1:
        raise UsageError(
            f"--dtype names {', '.join(plain)}", hint="one dtype; exceptions are 'PATTERN=DTYPE'"
        )
    return _edits(
        [(source, target) for source, _, target in pairs],
        drop,
        only,
        next(iter(plain), None),
        [(name, value) for name, _, value in (text.rpartition("=") for text in dtype if "=" in text)],
        tied,
    )


def read_edits(path: Location) -> Edits:
    """Edits from a TOML file with the keys `rename` (a table), `drop`, `only`, `dtype`, `dtypes`
    (a table of overrides) and `tied`.

    Raises:
        UsageError: the file is not there, not TOML, or has other keys or values.
    """
    with reading(path) as table:
        check_keys(table, _KEYS, "the file")
        words: dict[str, Any] = {
            key: value.items() if isinstance(value, dict) else value for key, value in table.items()
        }
        return _edits(**words)


def _edits(
    rename: Iterable[tuple[str, str]] = (), drop: Iterable[str] = (), only: Iterable[str] = (),
    dtype: str | None = None, dtypes: Iterable[tuple[str, str]] = (), tied: str = "keep",
) -> Edits:  # fmt: skip
    return Edits(
        tuple(Rename(Pattern(source), Pattern(target)) for source, target in rename),
        tuple(map(Pattern, drop)),
        tuple(map(Pattern, only)),
        parse(dtype) if dtype else None,
        tuple((Pattern(name), parse(value)) for name, value in dtypes),
        tied,
    )


def select(component: Component, edits: Edits, used: set[Pattern], findings: Findings) -> Targets:
    """Choose and rename a component's tensors. Patterns match its names; one that begins with the
    component's directory and a `/` matches in that component only. Renames begin with what `numbered` makes of names.

    A tensor that cannot be read is a problem, unless it is left out. Every pattern that matched something is added to
    `used` (see `unused`).
    """
    selected: dict[str, tuple[tuple[str, ...], Expression]] = {}
    where = component.directory
    prefix = component.prefix
    for name, why in component.unreadable.items():
        if reason := _drop_reason(where, name, edits, used):
            findings.dropped.append(Dropped(prefix + name, reason))
        else:
            hint = (
                None if "--drop" in why else f"leave it out with {dropping(name)}, or take others with --only"
            )
            findings.problems.append(Problem(why, tensor=prefix + name, hint=hint))
    findings.problems += (
        Problem(why, tensor=prefix + name)
        for name, why in component.lacking.items()
        if not _drop_reason(where, name, edits, used)
    )
    for name, tensor in component.tensors.items():
        reason = _drop_reason(where, name, edits, used)
        if reason:
            findings.dropped.append(Dropped(prefix + name, reason))
            continue
        target = _renamed(where, component.numbered.get(name, name), edits.renames, used)
        if target in selected:
            (first,), _ = selected[target]
            findings.problems.append(
                Problem(
                    f"comes from both '{first}' and '{prefix}{name}'",
                    tensor=prefix + target,
                    hint="change a --rename, or --drop one of them",
                )
            )
            continue
        selected[target] = ((prefix + name,), tensor)
    return selected


def finish(
    targets: Targets, where: str, edits: Edits, dtypes: Mapping[str, DType], findings: Findings
) -> tuple[Targets, Mapping[str, str]]:
    """Cast the targets of the component in directory `where` to their `dtypes`, and find those that share all their bytes.

    Returns the targets; and target name -> the earlier target name whose bytes it shares, kept or dropped.
    """
    made: dict[str, tuple[tuple[str, ...], Expression]] = {}
    first_of: dict[object, str] = {}
    shared: dict[str, str] = {}
    prefix = f"{where}/" if where else ""
    for target, (sources, tensor) in targets.items():
        try:
            expression = renamed(in_dtype(tensor, dtypes[target].name), target)
        except PlanError as error:
            findings.problems += error.problems
            continue
        identity = _identity(tensor)
        first = first_of.setdefault((identity, expression.spec.dtype), target) if identity else target
        if first != target:
            shared[target] = first
            if edits.tied == "drop":
                reason = f"shares all its bytes with '{first}' (--tied drop)"
                findings.dropped += (Dropped(source, reason) for source in sources)
                continue
            note = f"'{prefix}{target}' and '{first}' share their bytes; both are kept (--tied drop)"
            findings.notes.append(note)
        made[target] = (sources, expression)
    return made, shared


def unused(edits: Edits, used: Collection[Pattern], names: Collection[str]) -> list[Problem]:
    """A problem for each pattern that matched nothing: most likely a typing mistake."""
    options: list[tuple[str, Iterable[Pattern]]] = [
        ("--rename", [rename.source for rename in edits.renames]),
        ("--drop", edits.drop),
        ("--only", edits.only),
        ("--dtype", [pattern for pattern, _ in edits.dtype_overrides]),
    ]
    # One name of each kind of layer is enough to compare with, and keeps the search short.
    examples = list({shape_of(name): name for name in names}.values())
    problems = []
    for option, pattern in ((option, each) for option, patterns in options for each in patterns):
        if pattern not in used:
            near = get_close_matches(pattern.text, examples, n=1, cutoff=0.0)
            hint = f"the nearest name is '{near[0]}'" if near else None
            inside = sorted({name.partition("/")[0] for name in names if _names_all_of(pattern.text, name)})
            if inside:
                hint = f"a component is taken by its directory: {option} {quoted(inside[0] + '/*')}"
            elif any(pattern.match(name) is not None for name in names):
                others = [each for each, texts in (("--only", edits.only), ("--drop", edits.drop)) if texts]
                hint = (
                    f"{either(others)} leaves out what it matches"
                    if option not in others
                    else "within a component, names begin after its directory and the slash"
                )
            problems.append(Problem(f"{option} '{pattern.text}' matches no tensor", hint=hint))
    return problems


def _names_all_of(text: str, name: str) -> bool:
    """Whether a pattern without a slash is meant for all of the component that a name is in."""
    directory, slash, _ = name.partition("/")
    return bool(slash) and "/" not in text and text.strip("*.") == directory


def match(pattern: Pattern, where: str, name: str, used: set[Pattern]) -> dict[str, str] | None:
    """What a pattern of the edits matches in a name of the component in directory `where`; it is then added to `used`."""
    qualified = where and pattern.text.startswith(f"{where}/")
    values = pattern.match(f"{where}/{name}" if qualified else name)
    if values is not None:
        used.add(pattern)
    return values


def _drop_reason(where: str, name: str, edits: Edits, used: set[Pattern]) -> str | None:
    for pattern in edits.drop:
        if match(pattern, where, name, used) is not None:
            return f"matches --drop '{pattern.text}'"
    if not edits.only:
        return None
    kept = [pattern for pattern in edits.only if match(pattern, where, name, used) is not None]
    return None if kept else "matches no --only"


def _renamed(where: str, name: str, renames: Iterable[Rename], used: set[Pattern]) -> str:
    for rename in renames:
        values = match(rename.source, where, name, used)
        if values is not None:
            target = rename.target.fill(values)
            return target.removeprefix(f"{where}/") if where else target
    return name


def _identity(tensor: Expression) -> object | None:
    """What two names have in common exactly where they are one tensor; None for what stands alone.

    That is an empty one, and one that is made of nothing: equal zeros are not tied.
    """
    if not tensor.spec.numel or (isinstance(tensor, Node) and not tensor.operands):
        return None
    if isinstance(tensor, Stored):
        return tensor.spec.dtype, tensor.spec.shape, tensor.extents
    return replace(tensor, spec=replace(tensor.spec, name=""))
