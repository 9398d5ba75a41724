"""A recipe applied to a checkpoint's tensors, either way: which target each source leads to, and how.

1. Names are matched with the rules' patterns; the first rule that matches a name gets it.
2. Each use of a rule runs its program over the tensors (forward), or over stand-ins for what is to be
   found, whose expressions are then inverted (backwards).
3. Names that no rule wants, and what the tables of both architectures miss, are problems.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamconv import dtypes
from streamconv.errors import PlanError, Problem, StreamconvError, a
from streamconv.ops import Expression, renamed
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture
from streamconv.plans.diagnosis import unmatched
from streamconv.plans.direction import Direction
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.functions import FUNCTIONS
from streamconv.plans.inversion import invert
from streamconv.plans.loading import common_dtype
from streamconv.plans.patterns import Pattern, shape_of
from streamconv.plans.plan import Check, Dropped, Targets
from streamconv.plans.recipe import Rule
from streamconv.plans.sources import Sources
from streamconv.plans.table import Declared, Sizes
from streamconv.tensor import Extent, Stored, TensorSpec

Value = Expression | list[Expression]


@dataclass(frozen=True, slots=True)
class _Use:
    """A rule with its fields bound: names by their key in the program, several for a pattern that collects."""

    rule: Rule
    fields: Mapping[str, str]
    names: Mapping[str, Sequence[str]]

    @property
    def flat(self) -> tuple[str, ...]:
        """Every name."""
        return tuple(itertools.chain.from_iterable(self.names.values()))


@dataclass(frozen=True, slots=True)
class _Mapping:
    """One application of a recipe: what it starts from, and what has been made so far."""

    direction: Direction
    tensors: Mapping[str, Expression]
    origins: Mapping[str, tuple[str, ...]]
    findings: Findings
    made: dict[str, tuple[tuple[str, ...], Expression]] = field(default_factory=dict)

    def add(self, name: str, names: Iterable[str], value: Expression) -> None:
        """A target that is made of the tensors of these names."""
        sources = tuple(origin for each in names for origin in self.origins[each])
        if name in self.made:
            before = self.made[name][0]
            raise PlanError(f"comes from both {_quoted(before)} and {_quoted(sources)}", tensor=name)
        self.made[name] = (sources, renamed(value, name))


def map_tensors(
    tensors: Targets, direction: Direction, findings: Findings, *, allow_unmatched: bool, chosen: bool
) -> Targets:
    """Apply a recipe to tensors, by the names that it starts from.

    `chosen`: whether the recipe and its direction were asked for by name, and not found.
    What no rule wants is dropped where that is allowed, and else a problem.

    Raises:
        UsageError: a config lacks something that its architecture's table takes.
    """
    before = len(findings.problems)
    declared, wanted = direction.begin_tensors, direction.end_tensors  # refused before any rule is used
    mapping = _Mapping(
        direction,
        {name: tensor for name, (_, tensor) in tensors.items()},
        {name: sources for name, (sources, _) in tensors.items()},
        findings,
    )
    consumed, converted = _apply_rules(mapping)
    with findings.collecting():
        _make(mapping, _dtype(mapping.tensors))
    # What is wrong with the source comes first: it explains what the rules then find.
    findings.problems[before:before] = differences(
        mapping.tensors,
        converted,
        declared,
        direction.begin,
        odd="{title} of this config has no such tensor",
        missing="missing from the source, {title} has it",
    )
    if len(findings.problems) == before:
        targets = {name: expression for name, (_, expression) in mapping.made.items()}
        findings.problems += differences(
            targets,
            targets,
            wanted,
            direction.end,
            odd="a rule makes it, and {title} of this config has no such tensor",
            missing="no rule makes it, and {title} needs it",
        )
    leftover = [name for name in tensors if name not in consumed]
    if leftover and (turned := _other_way(leftover, direction, chosen=chosen)):
        findings.problems[before:] = [turned]
        return {}
    if allow_unmatched:
        reason = "no rule matches it (--allow-unmatched)"
        findings.dropped += (Dropped(origin, reason) for name in leftover for origin in mapping.origins[name])
    else:
        rules = direction.recipe.rules
        patterns = (pattern.text for rule in rules for pattern in direction.patterns(rule).values())
        findings.problems += unmatched(leftover, mapping.tensors, patterns)
    return mapping.made


def _apply_rules(mapping: _Mapping) -> tuple[set[str], list[str]]:
    """Apply every rule wherever it matches; gives the names that rules took, and those of them that lead to a target."""
    direction, problems = mapping.direction, mapping.findings.problems
    consumed: set[str] = set()
    converted: list[str] = []
    for use in _uses(mapping, consumed):
        consumed.update(use.flat)
        if direction.results(use.rule):
            converted += use.flat
        try:
            _apply(use, mapping)
        except StreamconvError as error:
            problems += (
                replace(problem, message=f"{problem.message} (rule '{use.rule}')")
                for problem in error.problems
            )
    return consumed, converted


def _other_way(leftover: Sequence[str], direction: Direction, *, chosen: bool) -> Problem | None:
    """The problem of tensors that the recipe leads to; None where they are something else."""
    ends = [
        end for rule in direction.recipe.rules for end in direction.results(rule).values() if not end.stars
    ]
    if not all(any(end.match(name) is not None for end in ends) for name in leftover):
        return None
    recipe = direction.recipe
    what = direction.end.title if direction.end else "it"
    if recipe.one_way and not direction.reverse:
        hint = f"it has no way back: {recipe.one_way}"
    elif chosen:
        hint = "leave --reverse out" if direction.reverse else "read it the other way: --reverse"
    else:
        back = "" if direction.reverse else f"; the other way is --recipe {recipe.name} --reverse"
        hint = f"they are what was asked for already: leave --to-arch or --recipe auto out{back}"
    return Problem(f"by their names, the tensors are what recipe {recipe.name} makes: {what}", hint=hint)


# ------------------------------------------------------------------------------------ matching


def _uses(mapping: _Mapping, consumed: set[str]) -> Iterator[_Use]:
    """Every use of every rule; the caller adds to `consumed` what it takes up."""
    direction = mapping.direction
    by_rule = _matches(mapping.tensors, direction)
    for number, rule in enumerate(direction.recipe.rules):
        for values, found in by_rule.get(number, {}).items():
            fields = dict(values)
            left = {
                key: {index: name for index, name in names.items() if name not in consumed}
                for key, names in found.items()
            }
            if not any(left.values()) or not _holds(rule, fields, direction.sizes):
                continue
            try:
                yield _Use(rule, fields, _complete(rule, direction.patterns(rule), left, fields))
            except PlanError as error:
                if not rule.optional:
                    mapping.findings.problems += error.problems
                    consumed.update(name for each in left.values() for name in each.values())


_Found = dict[str, dict[tuple[str, ...], str]]


def _matches(
    tensors: Mapping[str, Expression], direction: Direction
) -> dict[int, dict[tuple[tuple[str, str], ...], _Found]]:
    """For each rule, by the values of its shared fields: which name each of its patterns matches."""
    by_shape: dict[str, list[tuple[int, str, Pattern]]] = defaultdict(list)
    anywhere: list[tuple[int, str, Pattern]] = []
    for number, rule in enumerate(direction.recipe.rules):
        for key, pattern in direction.patterns(rule).items():
            (anywhere if pattern.stars else by_shape[pattern.shape]).append((number, key, pattern))
    found: dict[int, dict[tuple[tuple[str, str], ...], _Found]] = defaultdict(dict)
    for name in tensors:
        for number, key, pattern in (*by_shape.get(shape_of(name), ()), *anywhere):
            values = pattern.match(name)
            if values is None:
                continue
            shared = direction.recipe.rules[number].shared
            use = tuple(sorted(item for item in values.items() if item[0] in shared))
            rest = tuple(values[each] for each in sorted(values) if each not in shared)
            found[number].setdefault(use, defaultdict(dict))[key][rest] = name
    for number, uses in found.items():
        # What a pattern without the rule's fields matches belongs to each of its uses.
        if direction.recipe.rules[number].shared and (common := uses.pop((), None)):
            for each in uses.values():
                each.update(common)
    return found


def _complete(
    rule: Rule, patterns: Mapping[str, Pattern], found: Mapping[str, Mapping[tuple[str, ...], str]],
    fields: Mapping[str, str],
) -> dict[str, list[str]]:  # fmt: skip
    """The names of one use.

    Raises:
        PlanError: one is missing.
    """
    names: dict[str, list[str]] = {}
    for key, pattern in patterns.items():
        own = found.get(key, {})
        collected = rule.collected(pattern)
        if collected is None and not own:
            other = next(name for each in found.values() for name in each.values())
            raise PlanError(f"is missing; '{other}' needs it", tensor=pattern.fill(fields))
        order = sorted(own, key=lambda rest: tuple(map(int, rest))) if collected else list(own)
        gap = next((index for index, rest in enumerate(order) if rest != (str(index),)), len(order))
        if collected and (gap < len(order) or not order):
            raise PlanError(
                f"the tensors of '{pattern.text}' have no number {gap} for {{{collected}}}, of {len(order)}"
            )
        names[key] = [own[rest] for rest in order]
    return names


def _holds(rule: Rule, fields: Mapping[str, str], sizes: Sizes) -> bool:
    return not rule.when or bool(formula.evaluate(rule.when, {**sizes, **_numbers(fields)}))


def _numbers(fields: Mapping[str, str]) -> dict[str, Any]:
    return {name: int(text) if text.isdecimal() else text for name, text in fields.items()}


# ------------------------------------------------------------------------------------ applying


def _apply(use: _Use, mapping: _Mapping) -> None:
    rule, direction = use.rule, mapping.direction
    scope = {**direction.sizes, **_numbers(use.fields)}
    results = direction.results(rule)
    if not results:
        _drop(use, scope, mapping)
        return
    given = {key: [mapping.tensors[name] for name in names] for key, names in use.names.items()}
    if direction.reverse:
        made = _backward(use, given, scope, mapping)
    else:
        values = {key: _value(given[key], rule, pattern) for key, pattern in direction.patterns(rule).items()}
        made = formula.run(rule.program, {**scope, **values}, FUNCTIONS)
    sources = Sources({name: mapping.tensors[name] for name in use.flat})
    for key, pattern in results.items():
        if made.get(key) is None:
            raise PlanError(f"the rule's program gives no '{key}'")
        for name, value in _named(pattern, use, made[key]):
            mapping.add(name, sources.reached(value), value)


def _value(tensors: Sequence[Expression], rule: Rule, pattern: Pattern) -> Value:
    """What a program sees of a pattern's tensors: a list where it collects."""
    return list(tensors) if rule.collected(pattern) else tensors[0]


def _backward(
    use: _Use, given: Mapping[str, Sequence[Expression]], scope: Mapping[str, Any], mapping: _Mapping
) -> Mapping[str, Value]:
    """The source side of a rule from its target side."""
    rule, results = use.rule, mapping.direction.results(use.rule)
    collects = any(map(rule.collected, (*rule.sources.values(), *rule.targets.values())))
    if not rule.program and rule.sources.keys() == rule.targets.keys() and not collects:
        return {key: tensor for key, (tensor,) in given.items()}
    like = next(iter(given.values()))[0].spec
    wanted = mapping.direction.end_tensors
    leaves = {
        key: [_stand_in(name, wanted, like) for name in _wanted_names(pattern, use, wanted)]
        for key, pattern in results.items()
    }
    values = {key: _value(leaves[key], rule, pattern) for key, pattern in results.items()}
    program = formula.run(rule.program, {**scope, **values}, FUNCTIONS)
    roots: list[Expression] = []
    for key in rule.targets:
        made = program.get(key)
        own = made if isinstance(made, list) else [] if made is None else [made]
        if len(own) != len(given[key]):
            raise PlanError(f"{len(given[key])} tensors for '{key}'; expected {len(own)}")
        roots += own
    right = [tensor for key in rule.targets for tensor in given[key]]
    found, checks = invert(roots, right, list(itertools.chain.from_iterable(leaves.values())))
    meaning = f"{_quoted(use.flat)} should be what the recipe makes"
    mapping.findings.checks += (Check(meaning, left, right) for left, right in checks)
    return {
        key: _value([found[each.spec.name] for each in leaves[key]], rule, pattern)
        for key, pattern in results.items()
    }


def _wanted_names(pattern: Pattern, use: _Use, wanted: Mapping[str, Declared]) -> Iterator[str]:
    """A pattern's names: one, or where it collects, those that a table has, from 0 on."""
    collected = use.rule.collected(pattern)
    if collected is None:
        yield pattern.fill(use.fields)
        return
    names = (pattern.fill({**use.fields, collected: str(index)}) for index in itertools.count())
    yield from itertools.takewhile(wanted.__contains__, names)


def _stand_in(name: str, wanted: Mapping[str, Declared], like: TensorSpec) -> Stored:
    """A tensor that is to be found, as far as it is known: no bytes."""
    if name not in wanted:
        raise PlanError(
            "its shape is needed to read the rule backwards, and no table declares it", tensor=name
        )
    declared = wanted[name]
    dtype = dtypes.by_name(declared.dtype) if declared.dtype else like.dtype
    spec = TensorSpec(name, dtype, declared.shape)
    return Stored(spec, (Extent("", 0, spec.nbytes),) if spec.nbytes else ())


def _named(pattern: Pattern, use: _Use, value: Value) -> Iterator[tuple[str, Expression]]:
    """A result's tensors with their names."""
    collected = use.rule.collected(pattern)
    if isinstance(value, list) != bool(collected):
        wanted = "a list" if collected else "one tensor"
        raise PlanError(
            f"the rule's program gives {type(value).__name__} for '{pattern.text}'; expected {wanted}"
        )
    for index, part in enumerate(value if isinstance(value, list) else [value]):
        yield pattern.fill({**use.fields, collected: str(index)} if collected else use.fields), part


def _drop(use: _Use, scope: Mapping[str, Any], mapping: _Mapping) -> None:
    rule = use.rule
    for name in use.flat:
        reason = rule.reason or f"the recipe makes it again from {rule.equals}"
        if rule.equals:
            tensor = mapping.tensors[name]
            made = formula.evaluate(rule.equals, {**scope, "dtype": tensor.spec.dtype.name}, FUNCTIONS)
            if made.spec.shape != tensor.spec.shape:
                raise PlanError(
                    f"it is {list(tensor.spec.shape)}; {rule.equals} is {list(made.spec.shape)}", tensor=name
                )
            meaning = f"'{name}' is dropped, for it should be {rule.equals}"
            mapping.findings.checks.append(Check(meaning, tensor, made, rule.tolerance))
        mapping.findings.dropped += (Dropped(origin, reason) for origin in mapping.origins[name])


def _make(mapping: _Mapping, dtype: str) -> None:
    """What rules without anything to start from make."""
    direction = mapping.direction
    for rule in direction.recipe.rules:
        results = direction.results(rule)
        if direction.patterns(rule) or not results or not rule.equals:
            continue
        fields = sorted(rule.shared)
        ends = (direction.recipe, direction.recipe.target, direction.recipe.source)
        counts = {name: count for end in ends if end for name, count in end.counts.items()}
        ranges = (range(int(formula.evaluate(counts.get(each, "None"), direction.sizes))) for each in fields)
        for indices in itertools.product(*ranges):
            bound = {each: str(index) for each, index in zip(fields, indices, strict=True)}
            if not _holds(rule, bound, direction.sizes):
                continue
            scope = {**direction.sizes, **_numbers(bound), "dtype": dtype}
            value = formula.evaluate(rule.equals, scope, FUNCTIONS)
            for pattern in results.values():
                mapping.add(pattern.fill(bound), (), value)


def _quoted(names: Sequence[str]) -> str:
    return f"'{names[0]}'" if names else "a rule without sources"


# ------------------------------------------------------------------------------------ checking


def differences(
    tensors: Mapping[str, Expression], names: Iterable[str], declared: Mapping[str, Declared],
    architecture: Architecture | None, *, odd: str, missing: str,
) -> list[Problem]:  # fmt: skip
    """What differs between tensors and what a config implies of them; nothing where nothing is declared.

    Args:
        tensors: by name.
        names: those of them that must be declared.
        declared: what there should be.
        architecture: whose config it is.
        odd: what to say of a tensor too many; `{title}` is the architecture, with its article.
        missing: what to say of a tensor too few.
    """
    if not declared or architecture is None:
        return []
    title, hint = a(architecture.title), "is it this model's config? --config names another"
    problems = [
        Problem(missing.format(title=title), tensor=name)
        for name, each in declared.items()
        if name not in tensors and not each.optional
    ]
    problems += (
        Problem(odd.format(title=title), tensor=name)
        for name in names
        if name not in declared and not architecture.has_beyond(name)
    )
    for name, each in declared.items():
        if name in tensors and (shape := tensors[name].spec.shape) != each.shape:
            message = f"it is {list(shape)}; {title} of this config has {list(each.shape)}"
            problems.append(Problem(message, tensor=name, hint=hint))
    return grouped(problems)


def _dtype(tensors: Mapping[str, Expression]) -> str:
    """What a new tensor of the model should have."""
    found = common_dtype(tensors.values())
    return found.name if found else "F32"
