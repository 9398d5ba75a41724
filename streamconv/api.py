"""The Python face: open, plan, convert, verify. The command line is a thin layer over these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Unpack, overload

import numpy as np  # a method here is called numpy

from streamconv import families, readers, shard
from streamconv.engines import ENGINES, named
from streamconv.errors import CheckpointError, DestinationError, UsageError, listed
from streamconv.execution import memory
from streamconv.execution.execute import Settings, Worker
from streamconv.ops import Expression
from streamconv.ops.arrays import Array
from streamconv.options.effect import require_effect
from streamconv.options.fields import fields, filled, from_record, part, recorded, spelled
from streamconv.options.records import (
    DEFAULT_MEMORY,
    CheckOptions,
    ConvertOptions,
    DeletingOptions,
    PathLike,
    PlanningOptions,
    PlanOptions,
    ReadingOptions,
    ResourceOptions,
    RunningOptions,
    Size,
    VerifyOptions,
)
from streamconv.plans import Plan, all_recipes, compile_plan, format_of, resolved
from streamconv.readers.checkpoint import Checkpoint
from streamconv.running import record
from streamconv.running.activations import Activations
from streamconv.running.activations import compare_activations as compare_both
from streamconv.running.activations import require_runnable as runnable
from streamconv.running.apart import check_apart
from streamconv.running.comparison import Comparison
from streamconv.running.comparison import compare as compare_checkpoints
from streamconv.running.deleted import is_marked, require_whole, written_to
from streamconv.running.destination import (
    RECORD,
    Destination,
    check_space,
    destination_at,
    left_to_write,
    unfinished,
    written_at,
)
from streamconv.running.freeing import peak, require_deletable
from streamconv.running.progress import ProgressCallback
from streamconv.running.run import Conversion, run
from streamconv.running.standing import stored
from streamconv.running.verification import Verification, verify_plan, verify_record
from streamconv.storage.location import locate, sought
from streamconv.tensor import TensorSpec
from streamconv.writers.formats import FORMATS

if TYPE_CHECKING:
    import torch

families.register()

# The Python API's slices are for looking at a tensor, one block at a time.
_ARENA = 32 << 20


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of an open checkpoint: known by its header, read when asked for."""

    expression: Expression

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        return self.expression.spec

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return self.spec.shape

    def numpy(self) -> Array:
        """All of it as a new array (`ml_dtypes` types where NumPy has none of its own).

        Raises:
            UsageError: the dtype packs several elements in a byte.
        """
        return self._rows(0, self.shape)

    def torch(self) -> torch.Tensor:
        """All of it as a new torch tensor; needs torch (`pip install streamconv[torch]`)."""
        return _as_torch(self.numpy(), self.spec)

    def __getitem__(self, rows: slice) -> Array:
        """Rows [a:b] as a new array, reading only what they need."""
        if not isinstance(rows, slice) or not self.shape:
            raise UsageError("only row slices [a:b] can be taken", tensor=self.spec.name)
        start, stop, step = rows.indices(self.shape[0])
        stop = max(start, stop)
        if step != 1:
            raise UsageError(
                f"rows in steps of {step}", tensor=self.spec.name, hint="slice what you got instead"
            )
        return self._rows(start, (stop - start, *self.shape[1:]))

    def _rows(self, start: int, shape: tuple[int, ...]) -> Array:
        spec = self.spec
        if spec.dtype.packed:
            raise UsageError(f"{spec.dtype} packs several elements in a byte; NumPy cannot", tensor=spec.name)
        result: Array = np.empty(shape, spec.dtype.numpy)
        row = spec.nbytes // max(self.shape[0], 1) if self.shape else spec.nbytes
        with closing(Worker(Settings(arena=_ARENA))) as worker:
            worker.read(self.expression, start * row, result.reshape(-1).view(np.uint8))
        return result


def _unspecified() -> ReadingOptions:
    return filled(ReadingOptions, ReadingOptions())


@dataclass(frozen=True, slots=True)
class OpenCheckpoint(Mapping[str, LazyTensor]):
    """A checkpoint: its tensors by name, in the source's order, none of them read.

    Attributes:
        contents: what the reader found: format, components, configs, side files, notes.
        options: what it was opened with.
    """

    contents: Checkpoint
    options: ReadingOptions = field(default_factory=_unspecified)

    def __getitem__(self, name: str) -> LazyTensor:
        return LazyTensor(self.contents[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.contents)

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def format(self) -> str:
        """What the reader recognised."""
        return self.contents.format


def open(path: PathLike, **options: Unpack[ReadingOptions]) -> OpenCheckpoint:  # noqa: A001 - streamconv.open
    """Open a checkpoint by its content.

    Args:
        path: a file or a directory.
        options: see `ReadingOptions`.

    Raises:
        UsageError: an option has no effect on what is there.
        CheckpointError: it is damaged, or not a checkpoint.
    """
    opened = _opened(path, filled(ReadingOptions, options))
    require_effect(ReadingOptions, opened.options, source=opened.contents)
    return opened


def _opened(path: PathLike, reading: ReadingOptions) -> OpenCheckpoint:
    place = sought(path)
    if problem := unfinished(place):
        raise CheckpointError(problem.message, file=problem.file, hint=problem.hint)
    try:
        return OpenCheckpoint(readers.open_checkpoint(place, reading), reading)
    except (CheckpointError, UsageError) as error:
        where = written_to(place) if place.local() else None
        if where is not None:
            so = f"what a run with --delete-source deleted here, it wrote to {listed([where])}"
            hint = f"{error.headline.hint}; {so}" if error.headline.hint else so
            told = replace(error.headline, hint=hint)
            error.problems = (told,) if error.problems == (error.headline,) else error.problems
            error.headline = told
        raise


def plan(
    source: PathLike | OpenCheckpoint, destination: PathLike | None = None, **options: Unpack[PlanningOptions]
) -> Plan:
    """Compile and check the plan of a conversion, from headers alone.

    Args:
        source: a file or a directory, or one that is open.
        destination: where given, its disk must have room.
        options: see `PlanOptions` and `DeletingOptions`.

    Raises:
        CheckpointError: the source cannot be read.
        UsageError: an option cannot be read, or has no effect.
        PlanError: all that is wrong with the plan.
        DestinationError: the source was deleted in part, and not for this plan.
    """
    return compiled(source, destination, **options)[1]


def compiled(
    source: PathLike | OpenCheckpoint, destination: PathLike | None = None, **options: Unpack[PlanningOptions]
) -> tuple[Checkpoint | None, Plan]:
    """What is in the source, and its plan; see `plan`. Of a source that was deleted in part, the plan is all there is."""
    filled(PlanningOptions, options)
    planning, deleting = part(PlanOptions, options), filled(DeletingOptions, part(DeletingOptions, options))
    require_effect(DeletingOptions, deleting)
    goal = None if destination is None else destination_at(destination)
    if goal and (known := _stored(source, goal, planning)):
        return None, known
    checkpoint, made = _compiled(source, goal, planning, new=True)
    if deleting["delete_source"]:
        require_deletable(made, (), allow_loss=deleting["allow_loss"])
    if goal:
        require_whole(made, goal, ())
        room = peak(made, goal) if deleting["delete_source"] else left_to_write(made, goal)
        check_space(goal, room)
    return checkpoint, made


def _compiled(
    source: PathLike | OpenCheckpoint, goal: Destination | None, options: PlanOptions, *, new: bool = False
) -> tuple[Checkpoint, Plan]:
    """What is in the source, and its plan, for a destination that is `new`, or holds it already."""
    if isinstance(source, OpenCheckpoint):
        options = {**options, **_as_opened(source, options)}
    file = goal.file if goal else None
    if file:
        options = {**options, "to": format_of(file, options)}
    chosen = filled(PlanOptions, options)
    wanted = resolved(chosen, file)
    opened = source if isinstance(source, OpenCheckpoint) else _opened(source, part(ReadingOptions, chosen))
    checkpoint = opened.contents
    require_effect(PlanOptions, chosen, "to", FORMATS, checkpoint)
    if goal and new:
        check_apart(checkpoint.path, goal)
    return checkpoint, compile_plan(checkpoint, wanted)


def budget(**options: Unpack[ResourceOptions]) -> memory.Budget:
    """The memory and the workers that options ask for.

    Raises:
        UsageError: they cannot be read, have no effect, or are too small.
    """
    chosen = filled(ResourceOptions, options)
    total, workers, engine = chosen["memory_budget"], chosen["workers"], chosen["engine"]
    if engine is not None and "workers" not in named(engine).options:
        require_effect(ResourceOptions, chosen, "engine", ENGINES)
        workers = 1
    return memory.budget(total if isinstance(total, int) else shard.parse_size(total), workers)


def convert(
    source: PathLike | Plan,
    destination: PathLike,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[ConvertOptions],
) -> Conversion:
    """Convert a checkpoint, or run a plan. Resumes an interrupted run.

    Args:
        source: a file, a directory, or a plan.
        destination: a directory of its own.
        progress: called as work is done.
        options: see `ConvertOptions`; those of a plan only where `source` is not one.

    Raises:
        CheckpointError, UsageError, PlanError: see `plan`.
        DestinationError: the destination holds something else.
        ConversionError: the run failed; what it finished is kept.
    """
    chosen = filled(ConvertOptions, options)
    require_effect(DeletingOptions, part(DeletingOptions, chosen))
    resources = budget(**part(ResourceOptions, options))
    goal = destination_at(destination)
    todo = _planned(source, goal, part(PlanOptions, options))
    running = part(RunningOptions, chosen)
    engine = chosen["engine"]
    return run(todo, goal, budget=resources, engine=engine, progress=progress, **running)


@overload
def verify(
    destination: PathLike, /, *, progress: ProgressCallback | None = None, **options: Unpack[CheckOptions]
) -> Verification: ...
@overload
def verify(
    source: PathLike | Plan,
    destination: PathLike,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[VerifyOptions],
) -> Verification: ...
def verify(
    source: PathLike | Plan,
    destination: PathLike | None = None,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[VerifyOptions],
) -> Verification:
    """Compare a destination with its plan, byte by byte, or, where it is given alone, with its own record.

    The plan is made again from the source: with the options of a plan where any are given, otherwise with
    those that the destination's `conversion.json` records, otherwise with the defaults. A record may be a stranger's:
    what it chose is in `Verification.recorded`, and a recipe in a file is to be given. It has digests of what the
    conversion computed, and of all with `checksum`; tensors without one are in `unchecked`.

    Args:
        source: a file, a directory, or a plan; or the destination, where nothing else is given.
        destination: what is verified.
        progress: called as work is done.
        options: see `VerifyOptions`, and `CheckOptions` where there is no source.

    Raises:
        CheckpointError, UsageError, PlanError: see `plan`.
        DestinationError: the record is damaged.
    """
    chosen = filled(VerifyOptions, options)
    resources = budget(**part(ResourceOptions, options))
    given = part(PlanOptions, options)
    if destination is None and isinstance(source, Plan):
        raise UsageError("a plan is given, and no destination", hint="name the destination")
    held = str(source) if destination is None else destination
    goal = written_at(held)
    if not (goal.place.is_file() if goal.file else goal.place.is_directory()):
        standing = unfinished(goal)
        fault = standing.message if standing else f"there is no such {'file' if goal.file else 'directory'}"
        raise UsageError(fault, file=str(held), hint=standing.hint if standing else None)
    engine, headers = chosen["engine"], chosen["headers"]
    if destination is None:
        if given:
            flags = listed(fields(PlanOptions)[name].flag for name in given)
            raise UsageError(
                f"{flags} cannot be used without the source", hint="name the source before the destination"
            )
        alone = verify_record(goal, resources, progress, engine, headers=headers)
        return replace(alone, recorded=_chosen_by(goal))
    if given or isinstance(source, Plan):
        todo = _planned(source, goal, given)
        return verify_plan(todo, goal, resources, progress, engine, headers=headers)
    on_record = _on_record(goal)
    todo = _planned_again(source, goal, on_record)
    found = verify_plan(todo, goal, resources, progress, engine, headers=headers)
    return replace(found, recorded=spelled(PlanOptions, on_record))


def compare(
    left: PathLike, right: PathLike, *, memory_budget: Size = DEFAULT_MEMORY, values: bool = True
) -> Comparison:
    """Compare two checkpoints: names, dtypes, shapes and, with `values`, elements."""
    both = readers.open_checkpoint(left), readers.open_checkpoint(right)
    return compare_checkpoints(*both, budget(memory_budget=memory_budget, workers=1), values=values)


def require_runnable(source: PathLike, **options: Unpack[ReadingOptions]) -> None:
    """Refuse by its config what `compare_activations` cannot run, before bytes are compared.

    Raises:
        CheckpointError, UsageError: see `compare_activations`.
    """
    runnable(open(source, **options).contents)


def compare_activations(
    source: PathLike, destination: PathLike, **options: Unpack[ReadingOptions]
) -> Activations:
    """Run a language model before and after its conversion on the same tokens, layer by layer.

    Memory holds the weights of one module at a time; needs torch and transformers (`pip install streamconv[torch]`).

    Args:
        source: a file or a directory.
        destination: what came out.
        options: how the source is read, see `ReadingOptions`.

    Raises:
        CheckpointError: one of them cannot be read.
        UsageError: torch or transformers is missing, or has no class for one of them.
    """
    sides = open(source, **options).contents, open(destination).contents
    return compare_both(*sides, lambda expression: LazyTensor(expression).torch())


def _as_opened(source: OpenCheckpoint, given: PlanOptions) -> ReadingOptions:
    """What a checkpoint was opened with, which a plan cannot change.

    Raises:
        UsageError: it is asked to.
    """
    was = dict(source.options)
    odd = [name for name, value in part(ReadingOptions, given).items() if was.get(name) != value]
    if odd:
        raise UsageError(
            f"the checkpoint is open already, without {', '.join(odd)}", hint="give that to open"
        )
    return source.options


def _planned(source: PathLike | Plan, goal: Destination, options: PlanOptions) -> Plan:
    """The plan of a source, or one that was made before, to which nothing can be added."""
    if not isinstance(source, Plan):
        return _stored(source, goal, options) or _compiled(source, goal, options)[1]
    if options:
        raise UsageError(f"a plan is given, and {', '.join(options)} besides", hint="make another plan")
    return source


def _stored(source: PathLike | OpenCheckpoint, goal: Destination, options: PlanOptions) -> Plan | None:
    """The plan that a destination keeps of a source that was deleted in part, and so cannot be planned any more.

    Raises:
        DestinationError: it was made with other options, or the source does not know of it.
    """
    kept = stored(goal)
    if kept is None:
        return None
    there, here = (
        locate(kept.source),
        locate(source.contents.path.place) if isinstance(source, OpenCheckpoint) else sought(source),
    )
    if not (there.is_relative_to(here) or here.is_relative_to(there)):
        return None
    if not is_marked(kept, goal):
        if unfinished(goal) is None:
            return None
        raise DestinationError(
            "it says that files of the source were deleted for it, and the source has no mark of that",
            file=str(goal),
            hint="if it was moved, move it back, as it is the only copy; if it is somebody else's, choose another destination",
        )
    given = {**options, "to": format_of(goal.file, options)} if goal.file else options
    wanted = recorded(PlanOptions, resolved(filled(PlanOptions, given), goal.file).options)
    began = from_record(PlanOptions, dict(kept.arguments))
    was = recorded(PlanOptions, filled(PlanOptions, began))  # an earlier version may not have known them all
    known = fields(PlanOptions)
    others = [known[name].flag for name, value in wanted.items() if was[name] != value]
    if others:
        raise DestinationError(
            f"the source was deleted in part as it was converted here with other options ({listed(others)})",
            file=str(goal),
            hint="this is the only copy; give the options of the command that began it: "
            + (" ".join(spelled(PlanOptions, began)) or "none"),
        )
    return kept


def _on_record(destination: Destination) -> PlanOptions:
    """The options that a destination records, which may come from a stranger: they may name no recipe but a known one.

    Raises:
        UsageError: they are not options, or name a file, which might be a program.
    """
    options = record.arguments(destination)
    recipe = options.get("recipe")
    if recipe in (None, "auto", *all_recipes()):
        return options
    raise UsageError(
        f"the destination records a recipe that is not a part of this program: {recipe}",
        file=str(destination.own / RECORD),
        hint="a record cannot have it run; give it yourself where you trust it, with the other options on record: "
        + " ".join(spelled(PlanOptions, options)),
    )


def _chosen_by(destination: Destination) -> tuple[str, ...]:
    """What a destination records of its options, to be shown; nothing where this program does not know them all."""
    try:
        options = record.arguments(destination)
    except UsageError:
        return ()
    return spelled(PlanOptions, options)


def _planned_again(source: PathLike, destination: Destination, options: PlanOptions) -> Plan:
    """The plan of a source with the options that a destination records."""
    try:
        return _compiled(source, destination, options)[1]
    except UsageError as error:
        raise UsageError(
            f"the options that the destination records cannot be used here: {error.headline.message}",
            file=error.headline.file,
            hint="name the source of that conversion, or give the options to verify it with",
            problems=() if error.problems == (error.headline,) else error.problems,
        ) from error


def _as_torch(array: Array, spec: TensorSpec) -> torch.Tensor:
    try:
        import torch
    except ImportError as error:
        raise UsageError("torch is not installed", hint="pip install streamconv[torch]") from error
    if spec.dtype.torch_name is None:
        raise UsageError(f"torch has no dtype for {spec.dtype}", tensor=spec.name)
    # torch cannot take ml_dtypes' arrays; the bytes are the same under an integer of that width.
    raw = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return raw.view(getattr(torch, spec.dtype.torch_name)).reshape(spec.shape)
