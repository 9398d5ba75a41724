"""A recipe applied to a checkpoint's tensors, either way: which target each source leads to, and how.

1. Names are matched with the rules' patterns; the first rule that matches a name gets it.
2. Each use of a rule runs its program over the tensors (forward), or over stand-ins for what is to be
   found, whose expressions are then inverted (backwards).
3. Names that no rule wants, and what the tables of both architectures miss, are problems.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from streamconv import dtypes
from streamconv.errors import PlanError, Problem, StreamconvError
from streamconv.ops import Expression, renamed
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture
from streamconv.plans.diagnosis import unmatched
from streamconv.plans.direction import Direction
from streamconv.plans.findings import Findings
from streamconv.plans.functions import FUNCTIONS
from streamconv.plans.inversion import invert
from streamconv.plans.patterns import Pattern, shape_of
from streamconv.plans.plan import Check, Dropped, Targets
from streamconv.plans.recipe import Rule
from streamconv.plans.table import Declared, Sizes
from streamconv.tensor import Extent, Stored, TensorSpec

Value = Expression | list[Expression]


@dataclass(frozen=True, slots=True)
class _Use:
    """A rule with its fields bound: names by their key in the program; collected ones in order."""

    rule: Rule
    fields: Mapping[str, str]
    names: Mapping[str, str | list[str]]

    @property
    def flat(self) -> tuple[str, ...]:
        """Every name."""
        return tuple(
            each for name in self.names.values() for each in ([name] if isinstance(name, str) else name)
        )


@dataclass(frozen=True, slots=True)
class _Mapping:
    """One application of a recipe: what it starts from, and what has been made so far."""

    direction: Direction
    tensors: Mapping[str, Expression]
    origins: Mapping[str, tuple[str, ...]]
    findings: Findings
    made: dict[str, tuple[tuple[str, ...], Expression]] = field(default_factory=dict)

    def add(self, name: str, names: Iterable[str], value: Expression) -> None:
        """A target that comes from tensors of these names."""
        sources = tuple(origin for each in names for origin in self.origins[each])
        if name in self.made:
            before = self.made[name][0]
            raise PlanError(f"comes from both {_quoted(before)} and {_quoted(sources)}", tensor=name)
        self.made[name] = (sources, renamed(value, name))


def map_tensors(
    tensors: Targets, direction: Direction, findings: Findings, *, allow_unmatched: bool
) -> Targets:
    """Apply a recipe to tensors by name.

    Args:
        tensors: by the names that the recipe starts from.
        direction: the recipe, its direction, and the configs.
        findings: what is dropped, what has to be proven, and all that is wrong.
        allow_unmatched: drop what no rule wants.

    Raises:
        UsageError: a config lacks something that its architecture's table takes.
    """
    before = len(findings.problems)
    declared, wanted = direction.begin_tensors, direction.end_tensors
    mapping = _Mapping(
        direction,
        {name: tensor for name, (_, tensor) in tensors.items()},
        {name: sources for name, (sources, _) in tensors.items()},
        findings,
    )
    findings.problems += _wrong_shapes(mapping.tensors, declared, direction.begin)
    consumed: set[str] = set()
    unknown: list[str] = []
    for use in _uses(mapping, consumed):
        consumed.update(use.flat)
        if declared and direction.results(use.rule):
            unknown += (
                name
                for name in use.flat
                if name not in declared and not (direction.begin and direction.begin.has_beyond(name))
            )
        try:
            _apply(use, mapping)
        except StreamconvError as error:
            findings.problems += (_of_rule(problem, use.rule) for problem in error.problems)
    with findings.collecting():
        _make(mapping, _common_dtype(mapping.tensors))
    findings.problems += _grouped(unknown, f"a {_title(direction.begin)} of this config has no such tensor")
    missing = [name for name, each in declared.items() if not each.optional and name not in tensors]
    findings.problems += _grouped(missing, f"missing from the source, a {_title(direction.begin)} has it")
    if len(findings.problems) == before:
        findings.problems += _amiss(mapping.made, wanted, direction.end)
    leftover = [name for name in tensors if name not in consumed]
    if allow_unmatched:
        reason = "no rule matches it (--allow-unmatched)"
        findings.dropped += (Dropped(origin, reason) for name in leftover for origin in mapping.origins[name])
    else:
        rules = direction.recipe.rules
        patterns = (pattern.text for rule in rules for pattern in direction.patterns(rule).values())
        findings.problems += unmatched(leftover, mapping.tensors, patterns)
    return mapping.made


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
            names, problem = _complete(rule, direction.patterns(rule), left, fields)
            if problem is None:
                yield _Use(rule, fields, names)
            elif not rule.optional:
                mapping.findings.problems.append(problem)
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
) -> tuple[dict[str, str | list[str]], Problem | None]:  # fmt: skip
    """The names of one use, collected ones as lists, or what is wrong with them."""
    names: dict[str, str | list[str]] = {}
    for key, pattern in patterns.items():
        own = found.get(key, {})
        collected = pattern.fields - rule.shared
        if not collected:
            if not own:
                needed = pattern.fill(fields)
                return {}, Problem(f"is missing; {_others(found)} needs it", tensor=needed)
            names[key] = next(iter(own.values()))
            continue
        order = sorted(own, key=lambda rest: tuple(map(int, rest)))
        expected = [(str(index),) for index in range(len(order))]
        if len(collected) > 1 or not order or order != expected:
            gap = next((index for index, rest in enumerate(order) if rest != (str(index),)), len(order))
            each = next(iter(collected))
            return {}, Problem(
                f"the tensors of '{pattern.text}' have no number {gap} for {{{each}}}, of {len(order)}"
            )
        names[key] = [own[rest] for rest in order]
    return names, None


def _others(found: Mapping[str, Mapping[tuple[str, ...], str]]) -> str:
    return next((f"'{name}'" for names in found.values() for name in names.values()), "a rule")


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
    given: dict[str, Value] = {
        key: mapping.tensors[name] if isinstance(name, str) else [mapping.tensors[each] for each in name]
        for key, name in use.names.items()
    }
    if direction.reverse:
        made = _backward(use, given, scope, mapping)
    else:
        made = formula.run(rule.program, {**scope, **given}, FUNCTIONS)
    for key, pattern in results.items():
        if made.get(key) is None:
            raise PlanError(f"the rule's program gives no '{key}'")
        for name, value in _named(pattern, use, made[key]):
            mapping.add(name, use.flat, value)


def _backward(
    use: _Use, given: Mapping[str, Value], scope: Mapping[str, Any], mapping: _Mapping
) -> dict[str, Value]:
    """The source side of a rule from its target side."""
    rule, direction = use.rule, mapping.direction
    wanted = direction.end_tensors
    first = next(iter(given.values()))
    like = (first[0] if isinstance(first, list) else first).spec
    lists = any(isinstance(value, list) for value in given.values())
    if not rule.program and rule.sources.keys() == rule.targets.keys() and not lists:
        return dict(given)
    leaves: dict[str, Value] = {}
    for key, pattern in direction.results(rule).items():
        collected = pattern.fields - rule.shared
        if not collected:
            leaves[key] = _stand_in(pattern.fill(use.fields), wanted, like)
            continue
        (each,) = collected
        leaves[key] = [_stand_in(name, wanted, like) for name in _numbered(pattern, use.fields, each, wanted)]
    made = formula.run(rule.program, {**scope, **leaves}, FUNCTIONS)
    pairs = [
        pair for key in rule.targets for pair in zip(_list(made.get(key)), _list(given[key]), strict=False)
    ]
    for key in rule.targets:
        if len(_list(made.get(key))) != len(_list(given[key])):
            raise PlanError(
                f"{len(_list(given[key]))} tensors for '{key}'; expected {len(_list(made.get(key)))}"
            )
    inverted = invert([root for root, _ in pairs], [value for _, value in pairs], _stored(leaves.values()))
    meaning = f"{_quoted(use.flat)} should be what the recipe makes"
    mapping.findings.checks += (Check(meaning, left, right) for left, right in inverted.checks)
    return {
        key: [inverted.leaves[each.spec.name] for each in value]
        if isinstance(value, list)
        else inverted.leaves[value.spec.name]
        for key, value in leaves.items()
    }


def _numbered(
    pattern: Pattern, fields: Mapping[str, str], collected: str, wanted: Mapping[str, Declared]
) -> Iterator[str]:
    """The names that a table has for a field that is collected, from 0 on."""
    for index in itertools.count():
        name = pattern.fill({**fields, collected: str(index)})
        if name not in wanted:
            return
        yield name


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


def _stored(values: Iterable[Value]) -> list[Stored]:
    return [each for value in values for each in _list(value) if isinstance(each, Stored)]


def _list(value: Value | None) -> list[Expression]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _named(pattern: Pattern, use: _Use, value: Value) -> Iterator[tuple[str, Expression]]:
    """A result's tensors with their names."""
    collected = pattern.fields - use.rule.shared
    if isinstance(value, list) != bool(collected):
        wanted = "a list" if collected else "one tensor"
        raise PlanError(
            f"the rule's program gives {type(value).__name__} for '{pattern.text}'; expected {wanted}"
        )
    if not isinstance(value, list):
        yield pattern.fill(use.fields), value
        return
    (each,) = collected
    for index, part in enumerate(value):
        yield pattern.fill({**use.fields, each: str(index)}), part


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
        counts = {**direction.recipe.counts}
        for architecture in (direction.recipe.target, direction.recipe.source):
            counts |= architecture.counts if architecture else {}
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


def _wrong_shapes(
    tensors: Mapping[str, Expression], declared: Mapping[str, Declared], architecture: Architecture | None
) -> list[Problem]:
    wrong: dict[str, list[tuple[str, Problem]]] = defaultdict(list)
    for name, each in declared.items():
        if name in tensors and tensors[name].spec.shape != each.shape:
            found = list(tensors[name].spec.shape)
            message = f"it is {found}; a {_title(architecture)} of this config has {list(each.shape)}"
            wrong[shape_of(name) + message].append(
                (
                    name,
                    Problem(message, tensor=name, hint="is it this model's config? --config names another"),
                )
            )
    return [_first_of(group) for group in wrong.values()]


def _first_of(group: Sequence[tuple[str, Problem]]) -> Problem:
    name, problem = group[0]
    more = f" (and {len(group) - 1} more like it)" if len(group) > 1 else ""
    return Problem(problem.message + more, tensor=name, hint=problem.hint)


def _amiss(
    targets: Targets, wanted: Mapping[str, Declared], architecture: Architecture | None
) -> list[Problem]:
    """What differs between the targets and what the target's config implies."""
    if not wanted:
        return []
    title = _title(architecture)
    missing = [name for name, each in wanted.items() if not each.optional and name not in targets]
    odd = [
        name
        for name in targets
        if name not in wanted and not (architecture and architecture.has_beyond(name))
    ]
    problems = _grouped(missing, f"no rule makes it, and a {title} needs it")
    problems += _grouped(odd, f"a rule makes it, and a {title} of this config has no such tensor")
    shapes = {name: expression for name, (_, expression) in targets.items()}
    return problems + _wrong_shapes(shapes, wanted, architecture)


def _grouped(names: Sequence[str], message: str) -> list[Problem]:
    """A problem for each kind of name, with the first as an example."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[shape_of(name)].append(name)
    return [_first_of([(name, Problem(message, tensor=name)) for name in kind]) for kind in kinds.values()]


def _title(architecture: Architecture | None) -> str:
    return architecture.title if architecture else "model"


def _of_rule(problem: Problem, rule: Rule) -> Problem:
    return Problem(f"{problem.message} (rule '{rule}')", problem.file, problem.tensor, problem.hint)


def _common_dtype(tensors: Mapping[str, Expression]) -> str:
    """The dtype of most floating-point elements: what a new tensor of the model should have."""
    count: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.spec.dtype.kind == "float" and tensor.spec.dtype.bits >= 16:
            count[tensor.spec.dtype.name] += tensor.spec.numel
    return count.most_common(1)[0][0] if count else "F32"
