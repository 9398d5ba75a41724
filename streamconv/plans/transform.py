"""What becomes of one component's tensors, from what the source calls them to what the target holds.

1. `lora`: with the LoRA that lies in them, and the one that is given, merged.
2. `select`: which take part, and under which names.
3. `map_tensors`: what a recipe makes of them, as expressions; without a recipe, themselves.
4. `resize`: with how many rows for the vocabulary.
5. `finish`: in which dtypes, and which of them are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from streamconv.dtypes import DType
from streamconv.errors import Problem, UsageError
from streamconv.options.fields import fields
from streamconv.options.records import PlanOptions, Trait
from streamconv.plans import formula, registry
from streamconv.plans.adapters import runs
from streamconv.plans.adapters.adapter import Adapter
from streamconv.plans.adapters.forms import FORMS, converted, is_adapter
from streamconv.plans.adapters.merging import merge
from streamconv.plans.adapters.places import assigned, fits
from streamconv.plans.adapters.unmerged import settle
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.casts import Casting, casting_of, override
from streamconv.plans.direction import direct
from streamconv.plans.edits import Edits, finish, select
from streamconv.plans.findings import Findings
from streamconv.plans.loading import common_dtype, file_stem, file_variant
from streamconv.plans.mapping import map_tensors
from streamconv.plans.misfit import contradictions, misfits, untold
from streamconv.plans.patterns import Pattern
from streamconv.plans.plan import Dropped, Targets
from streamconv.plans.recipe import Files, Making, Recipe, Surroundings
from streamconv.plans.sources import Sources, proofs
from streamconv.plans.vocabulary import resize, used_ids
from streamconv.plans.wanted import Wanted
from streamconv.plans.wrappers import unwrap
from streamconv.readers import small
from streamconv.readers.checkpoint import Checkpoint, Component, holds_factors
from streamconv.shard import ADAPTER_CONFIG, ADAPTER_STEMS
from streamconv.writers.formats import FORMATS
from streamconv.writers.layout import Wrapping


@dataclass(frozen=True, slots=True)
class Transformed:
    """What a component becomes.

    Attributes:
        component: what is transformed, with the directory and the stem that the output gets.
        targets: by the target's names.
        config: the target's config; None where there is none.
        files: what becomes of side files, relative to the component.
        wrapping: what a torch file of it holds around the tensors; None: nothing.
        recipe: what made it; None: it stays what it is.
        shared: target name -> the earlier target name whose bytes it shares, kept or dropped.
        left_out: what --drop and --only left out, by the names that it would have had; None where a recipe gives names,
            and it is not known.
        casting: what becomes of dtypes.
    """

    component: Component
    targets: Targets
    config: Config | None = None
    files: Files = field(default_factory=Files)
    wrapping: Wrapping | None = None
    recipe: Recipe | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] | None = None
    casting: Casting = field(default_factory=lambda: Casting({}))


def transform(
    checkpoint: Checkpoint, component: Component, wanted: Wanted, used: set[Pattern], findings: Findings
) -> Transformed | None:
    """Everything that is done to a component's tensors; None where something is wrong.

    Every pattern of the edits that matched something is added to `used`.
    """
    before = len(findings.problems)
    made = None
    with findings.collecting():
        made = _transformed(checkpoint, component, wanted, used, findings)
    return made if len(findings.problems) == before else None


def _transformed(
    checkpoint: Checkpoint, component: Component, wanted: Wanted, used: set[Pattern], findings: Findings
) -> Transformed | None:
    if component.kind == "optimizer":
        wanted = replace(wanted, recipe=None, to_arch=None, config=None, like=None, lora=(), vocabulary=None,
                         edits=replace(wanted.edits, dtype=None))  # fmt: skip
    stored = None
    as_wide = wanted.edits.dtype is not None and wanted.edits.dtype.bits >= 32
    if Trait.LORA in checkpoint.traits and component.kind == "model":
        scales = fields(PlanOptions)["lora_scale"].each(wanted.options["lora_scale"])
        if wanted.lora and scales:
            raise UsageError(
                "--lora-scale may mean the LoRA in the source or the one of --lora",
                hint="merge the source's own in a first run, and the adapter in a second",
            )
        keep = wanted.options["keep_lora"] or registry.keeps_lora(wanted.recipe, wanted.to_arch)
        stored, scale = Sources(component.tensors, component.prefix), next(iter(scales), None)
        component = (
            runs.settled(component, checkpoint.path, scale, findings, keep=keep, as_wide=as_wide)
            if holds_factors(component)
            else settle(component, scale, findings, keep=keep)
        )
    if (
        component.kind == "model"
        and wanted.to_arch is not None
        and wanted.to_arch in FORMS
        and is_adapter(component)
    ):
        scale = next(iter(fields(PlanOptions)["lora_scale"].each(wanted.options["lora_scale"])), None)
        own, made_of = converted(component, checkpoint, wanted.to_arch, wanted.base, scale, findings)
        specs = {name: tensor.spec for name, (_, tensor) in made_of.items()}
        casting = casting_of(specs, own.directory, None, wanted.edits, used, findings)
        made_of, shared = finish(made_of, own.directory, wanted.edits, casting.dtypes, findings)
        is_left = own.config is None and ADAPTER_CONFIG in _side_names(checkpoint, component)
        files = Files(left_out={ADAPTER_CONFIG: "it is for peft"} if is_left else {})
        return Transformed(own, made_of, own.config, files, shared=shared, casting=casting)
    if wanted.config is not None and len(checkpoint.models) == 1:
        _hold(component.config, wanted.config, str(wanted.options["config"]), wanted, findings)
        component = replace(component, config=wanted.config)
    wanted = _made_plain(component, wanted, findings)
    first, last = _in_order(component, wanted)
    for adapter in first:
        component = merge(component, adapter, findings, as_wide=as_wide)
    selected = select(component, wanted.edits, used, findings)
    if stored is not None:
        selected = {name: (stored.reached(tensor), tensor) for name, (_, tensor) in selected.items()}
    if not selected:
        return Transformed(component, {})
    whole = component
    component = replace(component, tensors={name: tensor for name, (_, tensor) in selected.items()})
    before = len(findings.problems)
    made = _applied(checkpoint, component, whole, selected, wanted, findings)
    if len(findings.problems) > before:
        return None
    made = _named(made)
    for adapter in last:
        made = _merged(made, adapter, findings, as_wide=as_wide)
    if wanted.vocabulary is not None:
        made = _resized(checkpoint, component, made, wanted, findings)
    specs = {name: tensor.spec for name, (_, tensor) in made.targets.items()}
    config = made.config or _like(wanted.like, component)
    casting = casting_of(specs, component.directory, config, wanted.edits, used, findings)
    targets, shared = finish(made.targets, component.directory, wanted.edits, casting.dtypes, findings)
    findings.checks += proofs(targets)
    if casting.casts:
        made = _revised(made, targets, findings)
    return replace(made, targets=targets, shared=shared, casting=casting)


def _made_plain(component: Component, wanted: Wanted, findings: Findings) -> Wanted:
    """What is wanted, with a recipe for a quantised base that an adapter is to be merged into."""
    names = registry.dequantising(component.tensors) if wanted.lora and wanted.recipe is None else []
    if not names or wanted.to_arch is not None:
        return wanted
    findings.notes.append(
        f"the base is quantised: it is made plain first, by recipe {names[0]}, and stays so"
    )
    return replace(wanted, recipe=registry.named(names[0]))


def _in_order(component: Component, wanted: Wanted) -> tuple[tuple[Adapter, ...], tuple[Adapter, ...]]:
    """The adapters that are merged before a recipe, and after it: into weights made plain, or under the names it gives."""
    if not wanted.lora or (wanted.recipe is None and wanted.to_arch is None):
        return wanted.lora, ()
    if registry.dequantising(component.tensors):
        return (), wanted.lora
    before = [fits(adapter, component.tensors) for adapter in wanted.lora]
    turn = before.index(False) if False in before else len(before)
    return wanted.lora[:turn], wanted.lora[turn:]


def _merged(made: Transformed, adapter: Adapter, findings: Findings, *, as_wide: bool) -> Transformed:
    """With an adapter merged into what a recipe has made."""
    tensors = {name: tensor for name, (_, tensor) in made.targets.items()}
    component = replace(made.component, directory="", tensors=tensors, config=made.config)
    (own,) = assigned([component], [adapter])[""]
    merged = merge(component, own, findings, as_wide=as_wide)
    targets = {
        name: (made.targets[name][0] if name in made.targets else (), tensor)
        for name, tensor in merged.tensors.items()
    }
    return replace(made, targets=targets, config=merged.config)


def _named(made: Transformed) -> Transformed:
    """With the stem that the library of its config looks for."""
    return replace(made, component=replace(made.component, stem=file_stem(made.component, made.config)))


def _revised(made: Transformed, targets: Targets, findings: Findings) -> Transformed:
    """With the variant that its new dtype leaves in the names of files."""
    own = made.component
    variant = file_variant(own, common_dtype(tensor for _, tensor in targets.values()))
    note = f"the variant {own.variant} is taken off the names of files: it says another dtype than is written"
    if variant != own.variant and note not in findings.notes:
        findings.notes.append(note)
    return replace(made, component=replace(own, variant=variant))


def _applied(
    checkpoint: Checkpoint, component: Component, whole: Component, selected: Targets, wanted: Wanted,
    findings: Findings,
) -> Transformed:  # fmt: skip
    """What the wanted recipe makes of a component's tensors; without one, themselves, out of their wrappers.

    `whole`: the component before some tensors were selected.
    """
    chosen = _recipe(checkpoint, component, wanted)
    if chosen is not None:
        return _converted(checkpoint, component, selected, chosen, wanted, findings)
    others = (_recipe(checkpoint, each, wanted) for each in checkpoint.models)
    alone = next((recipe for recipe, _ in filter(None, others) if recipe.alone), None)
    if alone is not None:
        reason = f"no part of what {alone.name} makes"
        findings.dropped += (Dropped(name, reason) for sources, _ in selected.values() for name in sources)
        return Transformed(component, {})
    tensors = unwrap(selected, (), findings)
    gone = _names(whole, wanted.edits) - tensors.keys()
    like = None if wanted.like is None or len(wanted.like) else _like(wanted.like, component)
    told = wanted.config if len(checkpoint.models) == 1 else None
    own = {name: tensor for name, (_, tensor) in tensors.items()}
    for config in filter(None, () if component.stem in ADAPTER_STEMS else (told, like)):
        problems = misfits(config, own, gone)
        if not problems and (note := untold(config)):
            findings.notes.append(note)
        _refuse(problems, wanted, findings)
    if wanted.like is not None and wanted.config is None:
        _hold(component.config, _like(wanted.like, component), str(wanted.like.path), wanted, findings)
    said = component.config or _like(wanted.like, component)
    wrapping = _own_wrapping(checkpoint, component, said, wanted)
    return Transformed(component, tensors, said, wrapping=wrapping, left_out=gone)


def _own_wrapping(
    checkpoint: Checkpoint, component: Component, config: Config | None, wanted: Wanted
) -> Wrapping | None:
    """What is around a model that stays in the naming of the format that is written, as around what recipes lead to it."""
    form = FORMATS[wanted.options["to"]]
    if form.wrapping != "needed" or checkpoint.format != form.own:
        return None
    if wrap := registry.wrapping_of(config or {}):
        return wrap({**(config or {}), "model_parallel_size": wanted.options["tp"]})
    return None if component.directory else form.around(config, wanted.options["tp"])


def _hold(own: Config | None, told: Config | None, whose: str, wanted: Wanted, findings: Findings) -> None:
    """Hold the config that the user names against the source's own, in the same naming, where there are both."""
    if own is not None and told is not None:
        problems, notes = contradictions(own, told, whose)
        _refuse(problems, wanted, findings)
        findings.notes += notes


def _refuse(problems: list[Problem], wanted: Wanted, findings: Findings) -> None:
    """Add problems, as notes where a mismatch is allowed."""
    if wanted.options["allow_mismatch"]:
        findings.notes += map(str, problems)
    else:
        findings.problems += problems


def _names(component: Component, edits: Edits) -> frozenset[str]:
    """What a component's tensors would be called if edits left none out; nothing where they do not."""
    if not (edits.drop or edits.only):
        return frozenset()
    aside = Findings()
    everything = replace(edits, drop=(), only=())
    names = frozenset(unwrap(select(component, everything, set(), aside), (), aside))
    return names | component.unreadable.keys()


def _converted(
    checkpoint: Checkpoint, component: Component, tensors: Targets, chosen: tuple[Recipe, bool], wanted: Wanted,
    findings: Findings,
) -> Transformed:  # fmt: skip
    """What a recipe makes of a component: tensors, config, and the files around them."""
    recipe, reverse = chosen
    before = len(findings.problems)
    findings.notes.append(f"recipe {recipe.name}{', backwards' if reverse else ''}: {recipe.title}")
    like = _like(wanted.like, component)
    tensors = _own(component, tensors, findings)
    direction = direct(recipe, tensors, component.config, like, findings, reverse=reverse)
    if wanted.like is not None and wanted.config is None and component.config and like and direction.configs:
        _hold(*direction.configs, str(wanted.like.path), wanted, findings)
    tensors = unwrap(tensors, direction.begin_tensors.keys(), findings)
    said = direction.to_config
    if wanted.options["ignore"] and not recipe.ignores:
        raise UsageError(
            f"--ignore has no effect with --recipe {recipe.name}",
            hint="it is for recipes that quantise; leave it out",
        )
    if recipe.makes is not None:
        targets, said = recipe.makes(tensors, _making(checkpoint, component, wanted), findings)
    else:
        targets = map_tensors(
            tensors,
            direction,
            findings,
            allow_unmatched=wanted.options["allow_unmatched"],
            chosen=isinstance(wanted.recipe, Recipe),
        )
    config = direction.from_config or {}
    if not reverse:
        findings.notes += (each.text for each in recipe.remarks if formula.evaluate(each.when, config))
    own = replace(component, directory="", stem=recipe.stem) if recipe.stem else component
    made = Transformed(own, targets, said, recipe=recipe)
    if direction.to_config is None or len(findings.problems) > before:
        return made
    surroundings = Surroundings(
        checkpoint.directory / component.directory,
        _side_names(checkpoint, component),
        config,
        direction.to_config,
        direction.sizes,
    )
    files = (recipe.files_back if reverse else recipe.files)(surroundings)
    findings.notes += files.notes
    wrap = recipe.wrap_back if reverse else recipe.wrap
    wrapping = wrap({**direction.to_config, "model_parallel_size": wanted.options["tp"]}) if wrap else None
    return replace(made, files=files, wrapping=wrapping)


def _making(checkpoint: Checkpoint, component: Component, wanted: Wanted) -> Making:
    """What a recipe sees that makes its targets by a function."""
    names, where = _side_names(checkpoint, component), checkpoint.directory / component.directory

    def dtype(name: str) -> DType | None:
        return override(name, component.directory, wanted.edits, set()) or wanted.edits.dtype

    def read(name: str) -> bytes | None:
        return (where / name).read(small.SETTINGS) if name in names else None

    return Making(
        component.config, checkpoint.metadata, dtype, read, tuple(map(Pattern, wanted.options["ignore"]))
    )


def _own(component: Component, tensors: Targets, findings: Findings) -> Targets:
    """A model's tensors without the averaged copies of others among them."""
    of = {component.prefix + copy: component.prefix + weight for copy, weight in component.copies.items()}
    origins = {origin for origins, _ in tensors.values() for origin in origins} if of else set()
    gone = {origin: weight for origin, weight in of.items() if {origin, weight} <= origins}
    findings.dropped += (
        Dropped(origin, f"an averaged copy of '{weight}'") for origin, weight in gone.items()
    )
    return {name: each for name, each in tensors.items() if gone.keys().isdisjoint(each[0])}


def _resized(
    checkpoint: Checkpoint, component: Component, made: Transformed, wanted: Wanted, findings: Findings
) -> Transformed:
    """The targets with another number of rows, which the config then says too."""
    architecture = registry.architecture_of(made.config, made.targets) if made.config else None
    if architecture is None or made.config is None or wanted.vocabulary is None:
        raise UsageError(
            "the architecture is not known, and so not which tensors have a row for each token",
            hint="`streamconv recipes` lists those that are known",
        )
    tokenizer = made.files.texts.get("tokenizer.json")
    if tokenizer is None and "tokenizer.json" in _side_names(checkpoint, component):
        tokenizer = (checkpoint.directory / component.directory / "tokenizer.json").read_text(small.TOKENIZER)
    targets, config = resize(
        made.targets, made.config, architecture, wanted.vocabulary, used_ids(tokenizer), findings
    )
    return replace(made, targets=targets, config=config)


def _recipe(checkpoint: Checkpoint, component: Component, wanted: Wanted) -> tuple[Recipe, bool] | None:
    """The recipe for a component, and whether it is read backwards; None where it stays what it is."""
    if isinstance(wanted.recipe, Recipe):
        if len(checkpoint.models) == 1 and not wanted.recipe.parts:
            return wanted.recipe, wanted.options["reverse"]
        fits = registry.is_target if wanted.options["reverse"] else registry.is_source
        candidates = (wanted.recipe, *wanted.recipe.parts)
        found = next((recipe for recipe in candidates if fits(recipe, component)), None)
        if found is None and len(checkpoint.models) == 1:
            found = wanted.recipe
        return (found, wanted.options["reverse"]) if found else None
    if wanted.recipe is None and wanted.to_arch is None:
        return None
    try:
        return registry.found(component, wanted.to_arch, _like(wanted.like, component))
    except UsageError:
        if len(checkpoint.models) == 1:
            raise
        return None


def end_of(checkpoint: Checkpoint, component: Component, wanted: Wanted) -> Architecture | None:
    """What the wanted recipe makes of a component; None where that is not known, or it stays what it is."""
    with suppress(UsageError):
        if chosen := _recipe(checkpoint, component, wanted):
            recipe, reverse = chosen
            return recipe.source if reverse else recipe.target
    return None


def _like(like: Checkpoint | None, component: Component) -> Config | None:
    """The config of the same component in another checkpoint."""
    if like is None:
        return None
    return next((each.config for each in like.components if each.directory == component.directory), None)


def _side_names(checkpoint: Checkpoint, component: Component) -> tuple[str, ...]:
    """The side files of a component, relative to it."""
    names = checkpoint.side_files
    return tuple(name.removeprefix(component.prefix) for name in names if name.startswith(component.prefix))
