"""`--like`: another checkpoint gives what the output lacks, and is what it is compared with."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from streamconv.errors import Problem, UsageError, count, listed
from streamconv.ops import Expression, renamed
from streamconv.options.fields import filled
from streamconv.options.records import PlanOptions
from streamconv.plans.architecture import Config
from streamconv.plans.codes import quantised
from streamconv.plans.companions import companions
from streamconv.plans.edits import Edits, select
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.loading import is_needed, is_vocabulary
from streamconv.plans.placement import is_unfit, place
from streamconv.plans.plan import Output
from streamconv.plans.transform import Transformed, end_of, transform
from streamconv.plans.wanted import Wanted
from streamconv.plans.wrappers import LEFT, LEFTOVERS, unwrap
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.tensor import Shape

_ALLOW = "--allow-mismatch writes it all the same"


def adopted(checkpoint: Checkpoint, wanted: Wanted) -> Checkpoint:
    """A model by itself in the place that it has in the pipeline of `--like`; any other checkpoint as it is.

    A fine-tuning program saves the one component that it trains. Its names and shapes show which one that is, and where
    a recipe changes these, what that leads to.

    Raises:
        UsageError: it may be any of several.
    """
    like = wanted.like
    if like is None:
        return checkpoint
    models = [component for component in like.models if component.directory]
    if len(checkpoint.models) != 1 or checkpoint.models[0].directory or not models:
        return checkpoint
    (own,) = checkpoint.models
    others = tuple(component for component in checkpoint.components if component is not own)
    # Its config is that of the component.
    beside = tuple(name for name in checkpoint.side_files if name != "config.json")
    if wanted.recipe is not None or wanted.to_arch is not None:
        end = end_of(checkpoint, own, wanted)
        ends = [model for model in like.models if end and model.config and end.is_of(model.config)]
        if len(ends) != 1 or not ends[0].directory:
            return checkpoint
        placed = replace(own, directory=ends[0].directory)
        notes = (*checkpoint.notes, f"the model becomes {placed.directory}/ of {like.path}, by its config")
        return replace(checkpoint, components=(placed, *others), side_files=beside, notes=notes)
    aside = Findings()  # it is all found again when the component is transformed
    tensors = unwrap(select(own, Edits(), set(), aside), (), aside)
    shapes = {name: tensor.spec.shape for name, (_, tensor) in tensors.items()}
    fits = [_fit(shapes, model) for model in models]
    (shared, _) = best = max(fits)
    if not shared:
        return checkpoint
    (place, *others_like_it) = (model for model, fit in zip(models, fits, strict=True) if fit == best)
    if others_like_it:
        places = [model.directory for model in (place, *others_like_it)]
        raise UsageError(
            f"by its names and shapes the model may be any of {listed(places)} of {like.path}",
            file=str(checkpoint.path),
            hint=f"say which, and put the output there: {' or '.join(f'--like {like.path / each}' for each in places)}",
        )
    placed = replace(
        own,
        directory=place.directory,
        stem=place.stem,
        variant=place.variant,
        config=own.config or place.config,
    )
    note = f"the model is {place.directory}/ of {like.path}, by its names"
    notes = (*checkpoint.notes, note)
    return replace(checkpoint, components=(placed, *others), side_files=beside, notes=notes)


def _fit(shapes: Mapping[str, Shape], model: Component) -> tuple[int, int]:
    """How many tensors have the names of a model's, and how many of them its shapes."""
    shared = shapes.keys() & model.tensors.keys()
    return len(shared), sum(shapes[name] == model.tensors[name].spec.shape for name in shared)


def placed(checkpoint: Checkpoint, wanted: Wanted) -> Wanted:
    """With the model by itself that `--like` names in the place that it has in a pipeline; else as it is.

    It is the one component whose recipe leads to what its config is of, or, without a recipe, that has most of its
    tensors.
    """
    like = wanted.like
    models = checkpoint.models
    if like is None or len(like.models) != 1 or not all(model.directory for model in models):
        return wanted
    (own,) = like.models
    if own.directory:
        return wanted
    unwrapped = replace(own, tensors=_unwrapped(own))
    scores: dict[str, int] = {}
    likes: dict[str, Checkpoint] = {}
    for model in models:
        there = replace(own, directory=model.directory)
        # Its side files are around one model, and not around a pipeline.
        likes[model.directory] = replace(like, components=(there,), side_files=())
        made = end_of(checkpoint, model, replace(wanted, like=likes[model.directory]))
        if made is not None:
            scores[model.directory] = int(own.config is not None and made.is_of(own.config))
        elif own.tensors:
            aside = Findings()
            names = unwrap(select(model, Edits(), set(), aside), (), aside)
            _, scores[model.directory] = _fit(
                {name: each.spec.shape for name, (_, each) in names.items()}, unwrapped
            )
    most = max(scores.values(), default=0)
    best = [directory for directory, score in scores.items() if score == most]
    return replace(wanted, like=likes[best[0]]) if most and len(best) == 1 else wanted


def complete(
    like: Checkpoint, made: Collection[str], wanted: Wanted, output: Output, findings: Findings
) -> None:
    """Add the components of a pipeline that the output lacks, as they are; it has those in the directories `made`."""
    plain = Wanted(filled(PlanOptions, PlanOptions(to=wanted.options["to"])), wanted.max_shard)
    for component in like.components:
        if component.directory and component.directory not in made:
            same = transform(like, component, plain, set(), findings)
            if same is not None and is_unfit(same, plain):
                to = plain.options["to"]
                findings.notes.append(
                    f"{component.directory}/ of {like.path} is not taken along: --to {to} is for models in its own naming"
                )
            elif same is not None:
                findings.notes.append(f"{component.directory}/ is taken from {like.path}")
                place(same, plain, output, findings)
                # One that is cut has a config of its own.
                if component.prefix + "config.json" not in like.side_files:
                    companions(like, component, same, output, findings)


def compare(
    like: Checkpoint, models: Mapping[str, Transformed], wanted: Wanted, weights: int, findings: Findings
) -> None:
    """Hold the planned models against another checkpoint: names, shapes, number of weight files.

    What would not be loaded in its place is a problem, unless that is allowed; the rest is noted.

    Args:
        like: the other checkpoint.
        models: what is made, by directory.
        wanted: what else was asked for.
        weights: how many weight files the output has.
        findings: what is found is added.
    """
    if not len(like):
        findings.notes.append(
            f"config and the like are those of {like.path}, which has no weights to compare with"
        )
        return
    notes: list[str] = []
    problems: list[Problem] = []
    theirs = {component.directory: _unwrapped(component) for component in like.models}
    for directory, made in models.items():
        ours = {name: tensor for name, (_, tensor) in made.targets.items()}
        if directory in theirs:
            own_problems, own_notes = _compared(ours, theirs[directory], str(like.path), made, wanted)
            problems += own_problems
            notes += own_notes
        elif not directory or not (theirs.keys() & models.keys()):
            names = listed(sorted(filter(None, theirs)))
            message = (
                f"the model is none of those in {like.path}: {names}"
                if names
                else f"{like.path} is one model, and not known to be one of {listed(models)}"
            )
            problem = Problem(message, hint="is it the right one?")
            problems += [problem] if problem not in problems else []
    if problems and not wanted.options["allow_mismatch"]:
        findings.problems += (
            replace(problem, hint="; ".join(filter(None, (problem.hint, _ALLOW)))) for problem in problems
        )
    else:
        notes += map(str, problems)
    theirs_count = sum(not file.endswith(".json") for file in like.files)
    if weights != theirs_count:
        notes.append(f"the output has {count(weights, 'weight file')}, {like.path} has {theirs_count:,}")
    findings.notes += notes or [f"names, shapes and number of files are those of {like.path}"]


def _unwrapped(component: Component) -> Mapping[str, Expression]:
    """A model's tensors by its own names."""
    aside = Findings()
    return {
        name: tensor
        for name, (_, tensor) in unwrap(select(component, Edits(), set(), aside), (), aside).items()
    }


def _compared(
    ours: Mapping[str, Expression],
    theirs: Mapping[str, Expression],
    path: str,
    made: Transformed,
    wanted: Wanted,
) -> tuple[list[Problem], list[str]]:
    """What keeps one model from being loaded in the place of another, and what else differs."""
    prefix = made.component.prefix
    shared = ours.keys() & theirs.keys()
    absent, extra = theirs.keys() - ours.keys(), ours.keys() - theirs.keys()
    if not shared:
        first = next(iter(ours))
        return [Problem(f"none of its tensors is in {path}, which has '{next(iter(theirs))}' and others",
                        tensor=prefix + first, hint="is it the right model, in the same naming?")], []  # fmt: skip
    sized = wanted.vocabulary is not None
    problems = [
        Problem(f"it is {list(ours[name].spec.shape)}; in {path} it is {list(theirs[name].spec.shape)}",
                tensor=prefix + name)
        for name in shared
        if ours[name].spec.shape != theirs[name].spec.shape and not (sized and is_vocabulary(name))
    ]  # fmt: skip
    unknown = made.left_out is None and (wanted.edits.drop or wanted.edits.only)
    taken = theirs.keys() if unknown else made.left_out or ()
    needed = [name for name in _alone(theirs, ours, made.config) if name not in taken]
    problems += [Problem(f"is missing; {path} has it", tensor=prefix + name) for name in needed]
    unread = _alone(ours, theirs, made.config)
    problems += [
        Problem(
            f"{path} does not have it, and no one will read it",
            tensor=prefix + name,
            hint=LEFT if LEFTOVERS.search(name) else None,
        )
        for name in unread
    ]
    groups = {
        f"in {path} and not in the output": absent.difference(needed),
        f"in the output and not in {path}": extra.difference(unread),
    }
    notes = [
        f"{what}: {count(len(names), 'tensor')}, such as {', '.join(prefix + name for name in sorted(names)[:3])}"
        for what, names in groups.items()
        if names
    ]
    return grouped(sorted(problems, key=lambda problem: problem.tensor or "")), notes


def _alone(
    tensors: Mapping[str, Expression], others: Mapping[str, Expression], config: Config | None
) -> list[str]:
    """The tensors of one model that the other has under no name, and cannot be loaded without; codes are among them."""
    absent = tensors.keys() - others.keys()
    coded = quantised({name: tensor.spec for name, tensor in tensors.items()}, config) if absent else {}
    given = {renamed(tensors[name], "") for name in tensors.keys() & others.keys()} if absent else set()
    return [
        name
        for name in absent
        if (coded.get(name) or is_needed(tensors[name], config)) and renamed(tensors[name], "") not in given
    ]
