"""`--like`: another checkpoint gives what the output lacks, and is what it is compared with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from streamconv.options import PlanOptions, filled
from streamconv.plans.edits import Edits, select
from streamconv.plans.findings import Findings
from streamconv.plans.placement import place
from streamconv.plans.plan import Output
from streamconv.plans.transform import transform
from streamconv.plans.wanted import Wanted
from streamconv.plans.wrappers import unwrap
from streamconv.readers.checkpoint import Checkpoint


def adopted(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """A model by itself in the place that it has in a pipeline; any other checkpoint as it is.

    A fine-tuning program saves the one component that it trains. Its names show which one that is.
    """
    models = [component for component in like.models if component.directory]
    if len(checkpoint.models) != 1 or checkpoint.models[0].directory or not models:
        return checkpoint
    (own,) = checkpoint.models
    aside = Findings()  # it is all found again when the component is transformed
    names = unwrap(select(own, Edits(), set(), aside), (), aside).keys()
    place = max(models, key=lambda model: len(names & model.tensors.keys()))
    if not names & place.tensors.keys():
        return checkpoint
    placed = replace(own, directory=place.directory, stem=place.stem, config=own.config or place.config)
    others = tuple(component for component in checkpoint.components if component is not own)
    note = f"the model is {place.directory}/ of {like.path}, by its names"
    return replace(checkpoint, components=(placed, *others), notes=(*checkpoint.notes, note))


def complete(
    like: Checkpoint, made: Collection[str], wanted: Wanted, output: Output, findings: Findings
) -> None:
    """Add the components of a pipeline that the output lacks, as they are; it has those in the directories `made`."""
    plain = Wanted(filled(PlanOptions, PlanOptions(to=wanted.options["to"])), wanted.max_shard)
    for component in like.components:
        if component.directory and component.directory not in made:
            findings.notes.append(f"{component.directory}/ is taken from {like.path}")
            same = transform(like, component, plain, set(), findings)
            if same is not None:
                place(same, plain, output, findings)


def compare(like: Checkpoint, output: Output, apart: Collection[str]) -> list[str]:
    """What differs between the planned output and another checkpoint: names, shapes, number of weight files.

    The output's files `apart`, by path, hold no model.
    """
    theirs = {name: expression.spec for name, expression in like.items()}
    if not theirs:
        return [f"config and the like are those of {like.path}, which has no weights to compare with"]
    ours = {}
    for tensor in output.tensors:
        path = output.files[tensor.file].path
        if path in apart:
            continue
        directory = path.rpartition("/")[0]
        ours[f"{directory}/{tensor.spec.name}" if directory else tensor.spec.name] = tensor.spec
    shared = ours.keys() & theirs.keys()
    groups = {
        f"of {like.path} are not in the output": theirs.keys() - ours.keys(),
        f"of the output are not in {like.path}": ours.keys() - theirs.keys(),
        f"have other shapes than in {like.path}": {
            name for name in shared if ours[name].shape != theirs[name].shape
        },
    }
    notes = [
        f"{len(names)} tensors {what}, such as {', '.join(sorted(names)[:3])}"
        for what, names in groups.items()
        if names
    ]
    weights = sum(not file.endswith(".json") for file in like.files)
    if (count := len(output.files) - len(apart)) != weights:
        notes.append(f"the output has {count} weight files, {like.path} has {weights}")
    return notes or [f"names, shapes and number of files are those of {like.path}"]
