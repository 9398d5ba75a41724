"""What a destination holds, and whether a run resumes it, finds it finished, or starts afresh."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from streamconv.errors import CheckpointError, DestinationError, Problem, shortened
from streamconv.execution.execute import Item, Receipt
from streamconv.plans import Plan, fingerprint, from_json, to_json
from streamconv.plans.plan import changed
from streamconv.running import clearing, contents, deleted, freeing, journal, record, state
from streamconv.running.destination import (
    JOURNAL,
    PLAN,
    RECORD,
    Destination,
    check_fits,
    check_space,
    left_to_write,
)
from streamconv.storage import writing

# Characters of a value that a message shows.
_SHOWN = 200


def prepare(
    plan: Plan,
    destination: Destination,
    items: Sequence[Item],
    *,
    overwrite: bool,
    restart: bool,
    checksum: bool = False,
    delete_source: bool = False,
) -> dict[int, Receipt] | None:
    """Make the destination ready for a run of `plan`, which has these items, or find what an earlier run left.

    With `overwrite`, a finished conversion or a model is replaced; with `restart`, an unfinished run is discarded; with
    `checksum`, work without a checksum counts as not done; with `delete_source`, what was not hashed on its way does.

    Returns:
        Receipts of work that need not be done again, by item index; None where the same conversion
        is there, complete.

    Raises:
        DestinationError: the destination holds something else; says what, and which option deals with it.
        PlanError: there is not enough room.
    """
    gone = deleted.freed(destination)

    def needed(done: Mapping[int, Receipt]) -> int:
        if delete_source:
            return freeing.peak(plan, destination, items, done, gone)
        return left_to_write(plan, destination)

    try:
        conversion = record.read(destination)
        earlier = None if conversion is not None else _unfinished(destination)
        done = {} if earlier is None or restart else _receipts(destination, items)
    except DestinationError:
        deleted.require_no_only_copy(destination, gone)
        if not (restart or overwrite):
            raise
        # What the run wrote is not known, and no name that is in there is believed.
        clearing.scrap(destination)
        conversion, earlier, done, overwrite = None, None, {}, True
    if conversion is not None:
        # A run removes an older record before it begins: what is left is of one that ended in its last steps.
        clearing.forget_run(destination)
    if conversion is not None and destination.file and not destination.place.exists():
        overwrite = True  # of a file that was removed since, only the record is left
    if earlier is not None:
        if not restart:
            _check_same(earlier, plan, destination, gone)
            if checksum:
                done = {at: receipt for at, receipt in done.items() if receipt.digest or not receipt.nbytes}
            if delete_source:
                done = {at: receipt for at, receipt in done.items() if not receipt.copied}
            if delete_source and not deleted.is_marked(plan, destination):
                # What it says of bytes may be a stranger's, and the source would be deleted for it.
                deleted.require_no_only_copy(destination, gone)
                writing.remove_durably([destination.own / JOURNAL])
                done = {}
            check_space(destination, needed(done))
            return done
        deleted.require_no_only_copy(destination, gone)
        clearing.discard(earlier, plan, destination)
    elif conversion is not None and not overwrite:
        problems = _unfinished_business(conversion, plan, destination, checksum=checksum)
        if not problems:
            if delete_source and (left := freeing.remaining(plan)):
                raise DestinationError(
                    "nothing was deleted: the conversion was complete before, and what it was made of is still there",
                    file=str(destination),
                    hint="leave --delete-source out; or verify it, and remove the source yourself",
                    problems=shortened([Problem("is there", file=path) for path in left], 5),
                )
            writing.sync(destination.own)  # the run that wrote the record may have failed at just that
            return None
        raise DestinationError(
            "the destination holds another finished conversion",
            file=str(destination),
            hint="--overwrite replaces it; or choose another destination",
            problems=problems,
        )
    # What a finished conversion was made of may be deleted, as long as it is not what is to be read now.
    mine = {file.path for file in plan.files}
    deleted.require_no_only_copy(destination, gone if conversion is None else gone & mine)
    restarted = earlier is not None
    clearing.clear(plan, conversion, destination, needed({}), overwrite=overwrite, restarted=restarted)
    # A journal without its plan records other work: that of a run that ended between removing the two.
    writing.remove_durably([destination.own / JOURNAL])
    state.write(destination.own / PLAN, to_json(plan))
    return {}


def stored(destination: Destination) -> Plan | None:
    """The plan of a run that has deleted files of its source, so that no other can be made; None where none has.

    Raises:
        DestinationError: it is damaged.
    """
    gone = deleted.freed(destination)
    if not gone:
        return None
    try:
        return _unfinished(destination)
    except DestinationError:
        if not (destination.own / RECORD).exists():
            deleted.require_no_only_copy(destination, gone)
        return None


def _unfinished(destination: Destination) -> Plan | None:
    """The plan of a run that did not end, or None where there is none. Raises DestinationError where it is damaged."""

    def made(document: Any) -> Plan:
        plan = from_json(document)
        check_fits(plan, destination)
        return plan

    return state.read(destination.own / PLAN, made)


def _receipts(destination: Destination, items: Sequence[Item]) -> dict[int, Receipt]:
    """What a run that did not end has done."""
    place = destination.own / JOURNAL
    try:
        return journal.read(place, items)
    except CheckpointError as error:
        raise DestinationError(
            error.headline.message, file=place.place, hint="--restart starts over"
        ) from error


def _unfinished_business(
    conversion: Mapping[str, Any], plan: Plan, destination: Destination, *, checksum: bool
) -> list[Problem]:
    """Why a finished conversion is not the one that is wanted; empty where it is."""
    if conversion["fingerprint"] != fingerprint(plan):
        return [Problem("it was made by another plan")]
    problems = []
    if conversion["sources"] != record.states(plan):
        problems.append(Problem("the source was written to since"))
    files = contents.read(conversion, destination.own / RECORD)
    if {file.path: file.size for file in files} != _sizes(plan):
        problems.append(Problem("its record lists other files than the plan writes"))
    names = {file.path: {tensor.spec.name for tensor in file.tensors} for file in files if file.tensors}
    wanted: dict[str, set[str]] = {}
    for tensor in plan.tensors:
        wanted.setdefault(plan.outputs[tensor.file].path, set()).add(tensor.spec.name)
    if names != wanted:
        problems.append(Problem("its record lists other tensors than the plan writes"))
    for file in files:
        place = destination / file.path
        if not place.is_file() or place.state().size != file.size:
            problems.append(Problem("is missing, or has another size than it was given", file=str(place)))
    if checksum and not all(
        tensor.parts or not tensor.spec.nbytes for file in files for tensor in file.tensors
    ):
        problems.append(Problem("it has no checksums of what the kernel copied"))
    if checksum and plan.checksums and "source_checksums" not in conversion:
        problems.append(Problem("its source was not compared with the checksums that are in it"))
    return problems


def _sizes(plan: Plan) -> dict[str, int]:
    """Bytes of every file that a plan writes."""
    return {
        **{output.path: output.layout.size for output in plan.outputs},
        **{side.path: side.size for side in plan.side_files},
        **{text.path: len(text.content.encode()) for text in plan.texts},
    }


def _check_same(old: Plan, new: Plan, destination: Destination, gone: Collection[str]) -> None:
    differences = _differences(old, new)
    if differences:
        deleted.require_no_only_copy(destination, gone)
        # No command makes the plan of a source that was written to since.
        resume = (
            "" if changed((*old.files, *old.side_files)) else "repeat the earlier command to resume it, or "
        )
        raise DestinationError(
            "the destination holds an unfinished conversion, and it is not this one",
            file=str(destination),
            hint=f"{resume}discard it with --restart",
            problems=differences,
        )


def _differences(old: Plan, new: Plan) -> list[Problem]:
    """What changed between two plans, one line per change, the first few of each kind."""
    problems: list[Problem] = []
    before = {file.path: file for file in old.files}
    after = {file.path: file for file in new.files}
    for path in sorted(before.keys() | after.keys()):
        a, b = before.get(path), after.get(path)
        if a is None or b is None:
            problems.append(
                Problem("is not part of the source any more" if b is None else "is new", file=path)
            )
        elif a != b:
            what = f"{a.size:,} -> {b.size:,} bytes" if a.size != b.size else "its modification time"
            problems.append(Problem(f"the source file changed: {what}", file=path))
    if fingerprint(old) != fingerprint(new):
        for key in sorted(old.arguments.keys() | new.arguments.keys()):
            a_value, b_value = old.arguments.get(key), new.arguments.get(key)
            if a_value != b_value:
                problems.append(Problem(f"option {key}: {_shown(a_value)} -> {_shown(b_value)}"))
        if not problems:
            problems.append(Problem("the planned output differs, though source and options are the same"))
    return problems


def _shown(value: Any) -> str:
    return "not given" if value in (None, [], (), "") else str(value)[:_SHOWN]
