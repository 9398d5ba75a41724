"""A recipe: how the tensors, the config and the files of one architecture become those of another.

Rules are data, in the words of `plans.patterns` and `plans.formula`, and read both ways:

    Rule("h.{i}.ln_1.weight", "layers.{i}.norm1.weight")
    Rule(
        "h.{i}.attn.qkv.weight",
        "layers.{i}.{q,k,v}.weight",
        "q, k, v = split(x, 0, [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim])",
    )

A single pattern is called `x` in the program, alternatives by themselves (`q`), and patterns in a mapping by their keys.

A field that stands on one side only collects: `experts.{e}.w1.weight` on the left of a rule whose right has no
`{e}` is a list of all experts' tensors, from 0 on without a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from streamconv.dtypes import DType
from streamconv.errors import CheckpointError, UsageError, about, listed
from streamconv.ops import Exactness
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.findings import Findings
from streamconv.plans.functions import EXACTNESS, FUNCTIONS
from streamconv.plans.patterns import Pattern, alternatives, pairs
from streamconv.plans.plan import Targets
from streamconv.readers import small
from streamconv.storage.location import Location
from streamconv.tensor import Shape
from streamconv.writers.layout import Wrapping

Names = str | Mapping[str, str] | None


@dataclass(frozen=True)
class Rule:
    """Source tensors and the target tensors that they become.

    Attributes:
        source, target: a name pattern, perhaps with alternatives, or several by the name that `program` gives each;
            None: nothing on that side.
        program: lines of `plans.formula` over these names, the architecture's sizes and the rule's fields.
            A target's name that it does not assign is the source of the same name.
        equals: for a rule without targets, what the source must be, else the conversion fails; for one
            without sources, what the target is. The opposite direction then makes it, or checks it.
        tolerance: by how much, relative to itself, what is checked may differ from `equals`.
        when: a formula; the rule holds where it is true. Without fields it is asked once.
        optional: whether the rule may find some of its tensors missing, and then does not apply.
        reason: why a source has no target.
    """

    source: Names
    target: Names
    program: str = ""
    equals: str = ""
    when: str = ""
    optional: bool = False
    reason: str = ""
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        for side in ("source", "target"):
            object.__setattr__(self, side, _spelled_out(getattr(self, side)))

    @cached_property
    def sources(self) -> Mapping[str, Pattern]:
        """Source patterns by their name in the program."""
        return _patterns(self.source)

    @cached_property
    def targets(self) -> Mapping[str, Pattern]:
        """Target patterns by their name in the program."""
        return _patterns(self.target)

    @cached_property
    def shared(self) -> frozenset[str]:
        """The fields that distinguish the uses of the rule."""
        sides = [side for side in (self.sources, self.targets) if side]
        each = [frozenset().union(*(pattern.fields for pattern in side.values())) for side in sides]
        return frozenset.intersection(*each) if each else frozenset()

    def collected(self, pattern: Pattern) -> str | None:
        """The field of one of its patterns that the other side lacks, or None.

        Raises:
            UsageError: there are several.
        """
        fields = sorted(pattern.fields - self.shared)
        if len(fields) > 1:
            raise UsageError(f"'{pattern.text}' collects {' and '.join(fields)}; a rule collects one field")
        return fields[0] if fields else None

    def check(self, sizes: Collection[str]) -> None:
        """See that its formulas use these sizes, its fields and what there is in its program alone.

        Raises:
            UsageError: one uses another name, or the program gives no tensor for a target, or what no one takes.
        """
        known = {*sizes, *(name for name in self.shared if not name.startswith("*"))}
        for side in (self.sources, self.targets):
            for pattern in side.values():
                self.collected(pattern)
                for size in pattern.sizes:
                    formula.check(size, sizes)
        if self.when:
            formula.check(self.when, known)
        if self.equals:
            formula.check(self.equals, {*known, "dtype"}, FUNCTIONS)
        made = formula.check_program(self.program, {*known, *self.sources}, FUNCTIONS)
        lost = sorted(self.targets.keys() - made) if self.sources else []
        if lost:
            raise UsageError(f"the program gives no '{lost[0]}'", hint=f"write a line '{lost[0]} = ...'")
        idle = formula.idle(self.program, self.targets) if self.sources else []
        if idle:
            raise UsageError(
                f"the program assigns '{idle[0]}', which is no target, and no line below uses it",
                hint=f"the rule's targets are {listed(sorted(self.targets)) or 'none'}",
            )

    @property
    def exactness(self) -> Exactness:
        """What the rule does to values, at the worst, read forward."""
        called = formula.calls_in(self.program) if self.program else ()
        return max((EXACTNESS.get(name, Exactness.BIT_EXACT) for name in called), default=Exactness.BIT_EXACT)

    def __str__(self) -> str:
        sides = (
            " + ".join(pattern.text for pattern in side.values()) or "(none)"
            for side in (self.sources, self.targets)
        )
        return " -> ".join(sides)


def drop(
    source: str, reason: str, equals: str = "", when: str = "", optional: bool = False, tolerance: float = 0.0
) -> Rule:
    """A rule for a source tensor that leads nowhere."""
    return Rule(source, None, equals=equals, when=when, optional=optional, reason=reason, tolerance=tolerance)


LEAVES = ("weight", "bias")
"""What the tensors of a layer are called."""


def rename(names: Mapping[str, str], leaves: Sequence[str] = ("",), when: str = "") -> tuple[Rule, ...]:
    """Rules that only rename, each for every ending in `leaves`; alternatives become one another in their order."""
    each = pairs(names).items()
    return tuple(Rule(source + leaf, target + leaf, when=when) for leaf in leaves for source, target in each)


def same(*names: str) -> tuple[Rule, ...]:
    """Rules for tensors that keep their names."""
    return rename({name: name for name in names})


def linear(
    source: str, target: str, program: str = "", when: str = "", leaves: Sequence[str] = LEAVES
) -> tuple[Rule, ...]:
    """Rules for the weight and the bias of a linear layer, both under the same program."""
    return tuple(Rule(f"{source}.{leaf}", f"{target}.{leaf}", program, when=when) for leaf in leaves)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a recipe cannot convert a model, and what to do instead, where a formula over its config is true."""

    when: str
    reason: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Remark:
    """What the plan notes where a formula over the source's config is true."""

    when: str
    text: str


@dataclass(frozen=True)
class Surroundings:
    """What a recipe sees of a checkpoint besides tensors.

    Attributes:
        directory: of the component; `names` are relative to it.
        names: its side files.
        source_config, target_config: both configs in full.
        sizes: the sizes of the recipe's source architecture.
    """

    directory: Location
    names: tuple[str, ...]
    source_config: Config
    target_config: Config
    sizes: Mapping[str, Any]

    def read(self, name: str, limit: int = small.TOKENIZER) -> bytes | None:
        """A side file's content, or None where there is no such file.

        Raises:
            CheckpointError: it is larger than any file of its kind.
        """
        if name not in self.names:
            return None
        return (self.directory / name).read(limit)

    def settings(self, name: str) -> dict[str, Any]:
        """The object in a side file of JSON; empty where there is no such file.

        Raises:
            CheckpointError: it is not JSON, or no object.
        """
        if name not in self.names:
            return {}
        file = self.directory / name
        found = small.read_json(file)
        if not isinstance(found, dict):
            raise CheckpointError("it is not a JSON object", file=str(file), hint="download it again")
        return found


@dataclass(frozen=True)
class Files:
    """What a recipe does about side files: those it makes, and those that are not to be copied.

    Attributes:
        texts: path -> content; relative to the component, or to the output where it begins with a `/`.
        left_out: path -> reason.
        notes: one line each.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


MakeFiles = Callable[[Surroundings], Files]
"""Decides about side files. Raises UsageError for a file that cannot be read as what it claims."""


def keep_files(around: Surroundings) -> Files:
    """All files are copied, except code that the target architecture does not need."""
    code = {name: "code of the source architecture" for name in around.names if name.endswith(".py")}
    return Files(left_out=code)


ConfigMap = Callable[[Config], dict[str, Any]]


@dataclass(frozen=True)
class Making:
    """What a recipe sees whose targets are made by a function.

    Attributes:
        config: the source's, or None.
        metadata: what its files hold besides tensors.
        dtype: what is asked for a target, by its name; None where nothing is.
        read: a side file's content by its name; None where there is none.
        ignore: patterns of names that stay as they are.
    """

    config: Config | None
    metadata: Mapping[str, Any]
    dtype: Callable[[str], DType | None]
    read: Callable[[str], bytes | None]
    ignore: tuple[Pattern, ...] = ()


MakeTargets = Callable[[Targets, Making, Findings], tuple[Targets, dict[str, Any] | None]]
"""Makes targets where rules by names cannot say it, and their config where there is one. Raises PlanError or UsageError."""


@dataclass(frozen=True)
class Recipe:
    """A conversion between two architectures (see the module's text).

    Attributes:
        name: `SOURCE-TARGET`, as `--recipe` takes it.
        title: one line for `streamconv recipes`.
        source, target: the architectures; None for a naming without a table, whose rules alone decide.
        rules: the first that matches a name applies.
        config: the target's config from the source's; None: it stays as it is.
        config_back: the source's config from the target's; None: where `config` is None as well, it stays as it is;
            otherwise running backwards takes it from `--like`.
        sizes, counts: as in `Architecture`, where `source` is None.
        refuses, refuses_back: what it cannot do, asked of the config it starts from.
        remarks: what users should know, asked of the source's config.
        files, files_back: what becomes of side files.
        one_way: why there is no way back, where there is none.
        config_of: what the shapes of a checkpoint's tensors, by name, say of its config: all of it where there is no
            other, and what is missing from one that names no model. Empty where it does not know the names.
        wrap, wrap_back: what a torch file of the target (of the source) holds around the tensors, from its config.
        stem: what the output's weight file is called, where it is not a model of a directory; it lies at the top.
        alone: whether nothing but what the recipe makes is written; other components stay behind.
        keeps_lora: whether it is about a LoRA that lies unmerged in the source, which is merged otherwise. Its config
            then has `lora_rank` and `lora_scale`. It is found by its target only.
        parts: recipes for the other components of such a checkpoint, which are converted along.
        aliases: what it was called before.
        makes: what makes the targets instead of rules.
        ignores: whether it takes names that stay as they are.
        found_by_any: name patterns of which one matches in a checkpoint of the source naming.
        found_by: name patterns that all match in a checkpoint of the source naming, where no config says so. Of
            several recipes, the one that names the most is found.
        named_only: whether sources of it are converted only where the recipe is named, because nothing in them
            distinguishes it from another one.
    """

    name: str
    title: str
    source: Architecture | None = None
    target: Architecture | None = None
    rules: tuple[Rule, ...] = ()
    config: ConfigMap | None = None
    config_back: ConfigMap | None = None
    sizes: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    refuses: tuple[Refusal, ...] = ()
    refuses_back: tuple[Refusal, ...] = ()
    remarks: tuple[Remark, ...] = ()
    files: MakeFiles = keep_files
    files_back: MakeFiles = keep_files
    one_way: str = ""
    config_of: Callable[[Mapping[str, Shape]], Config] | None = None
    wrap: Callable[[Config], Wrapping] | None = None
    wrap_back: Callable[[Config], Wrapping] | None = None
    stem: str = ""
    alone: bool = False
    keeps_lora: bool = False
    parts: tuple[Recipe, ...] = ()
    aliases: tuple[str, ...] = ()
    makes: MakeTargets | None = None
    ignores: bool = False
    found_by_any: tuple[str, ...] = ()
    found_by: tuple[str, ...] = ()
    named_only: bool = False

    def check(self) -> None:
        """See that its formulas use only names that there are: one that is not would be None, and a condition false.

        The keys of configs are not known beforehand, and not checked.

        Raises:
            UsageError: one uses another.
        """
        for side in (self.source, self.target):
            if side is not None:
                side.check()
        sizes = self.sizes if self.source is None else self.source.sizes
        for name, count in self.counts.items():
            with about(f"the count of {{{name}}}"):
                formula.check(count, sizes)
        for rule in self.rules:
            with about(f"rule '{rule}'"):
                rule.check(sizes)
        refusals = [*self.refuses, *self.refuses_back]
        for asked in (*(each.when for each in refusals), *(each.when for each in self.remarks)):
            formula.check(asked, formula.names_in(asked))
        for part in self.parts:
            part.check()

    @property
    def exactness(self) -> Exactness:
        """That of its worst rule."""
        if self.makes is not None:
            return Exactness.LOSSY if self.ignores else Exactness.ROUNDING
        return max((rule.exactness for rule in self.rules), default=Exactness.BIT_EXACT)


def _spelled_out(names: Names) -> Names:
    if not isinstance(names, str):
        return names
    each = alternatives(names)
    return names if len(each) == 1 else {"_".join(chosen): text for chosen, text in each.items()}


def texts(names: Names) -> Mapping[str, str]:
    """The text of each pattern of one side of a rule, by its name in the program."""
    return {} if names is None else {"x": names} if isinstance(names, str) else names


def _patterns(names: Names) -> Mapping[str, Pattern]:
    return {key: Pattern(text) for key, text in texts(names).items()}
