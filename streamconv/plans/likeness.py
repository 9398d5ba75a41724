"""`--like`: another checkpoint gives what the output lacks, and is what it is compared with."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from streamconv.plans.edits import Edits
from streamconv.plans.placement import Placed, place
from streamconv.plans.plan import OutputFile, PlannedTensor
from streamconv.plans.transform import Transformed, transform
from streamconv.plans.wanted import Wanted
from streamconv.plans.wrappers import unwrap
from streamconv.readers.checkpoint import Checkpoint


@dataclass(slots=True)
class Completed:
    """Components that are taken along, and what to say of them."""

    placed: list[Placed] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def adopted(checkpoint: Checkpoint, like: Checkpoint) -> Checkpoint:
    """A model by itself in the place that it has in a pipeline; any other checkpoint as it is.

    A fine-tuning program saves the one component that it trains. Its names tell which that is.
    """
    models = [component for component in like.models if component.directory]
    if len(checkpoint.models) != 1 or checkpoint.models[0].directory or not models:
        return checkpoint
    (own,) = checkpoint.models
    names = set(unwrap(own.tensors, ()).names.values())
    place = max(models, key=lambda model: len(names & model.tensors.keys()))
    if not names & place.tensors.keys():
        return checkpoint
    placed = replace(own, directory=place.directory, stem=place.stem, config=own.config or place.config)
    others = tuple(component for component in checkpoint.components if component is not own)
    note = f"the model is {place.directory}/ of {like.path}, by its names"
    return replace(checkpoint, components=(placed, *others), notes=(*checkpoint.notes, note))


def complete(like: Checkpoint, made: Collection[str], wanted: Wanted, files: int) -> Completed:
    """The components of a pipeline that the output does not have, as they are.

    Args:
        like: where they are taken from.
        made: directories of the components that the output has.
        wanted: format and size of files.
        files: how many the plan has already.
    """
    result = Completed()
    plain = Wanted(to=wanted.to, max_shard=wanted.max_shard, edits=Edits())
    for component in like.components:
        if not component.directory or component.directory in made:
            continue
        same: Transformed = transform(like, component, plain, set())
        placed = place(component, same, plain, files + sum(len(each.files) for each in result.placed))
        result.placed.append(placed)
        result.notes.append(f"{component.directory}/ is taken from {like.path}")
    return result


def compare(
    like: Checkpoint, tensors: Sequence[PlannedTensor], files: Sequence[OutputFile], apart: Collection[str]
) -> list[str]:
    """What differs between the planned output and another checkpoint: names, shapes, number of weight files.

    Args:
        like: the other checkpoint.
        tensors: of the output.
        files: of the output.
        apart: paths of output files that hold no model.
    """
    theirs = {name: expression.spec for name, expression in like.items()}
    if not theirs:
        return [f"config and the like are those of {like.path}, which has no weights to compare with"]
    ours = {}
    for tensor in tensors:
        if files[tensor.file].path in apart:
            continue
        directory = files[tensor.file].path.rpartition("/")[0]
        ours[f"{directory}/{tensor.spec.name}" if directory else tensor.spec.name] = tensor.spec
    notes = [
        f"{len(names)} tensors {what}, such as {', '.join(names[:3])}"
        for names, what in (
            (sorted(theirs.keys() - ours.keys()), f"of {like.path} are not in the output"),
            (sorted(ours.keys() - theirs.keys()), f"of the output are not in {like.path}"),
            (
                sorted(
                    name for name in ours.keys() & theirs.keys() if ours[name].shape != theirs[name].shape
                ),
                f"have other shapes than in {like.path}",
            ),
        )
        if names
    ]
    weights = len([file for file in like.files if not file.endswith(".json")])
    if len(files) - len(apart) != weights:
        notes.append(f"the output has {len(files) - len(apart)} weight files, {like.path} has {weights}")
    return notes or [f"names, shapes and number of files are those of {like.path}"]
