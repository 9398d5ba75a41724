"""The destination directory: what may stand in it, what a run keeps there, and how it ends.

DST/.streamconv/plan.json        while a run is unfinished: the plan
DST/.streamconv/journal          what of it is done
DST/.streamconv/lock             held by the run that is writing
DST/NAME.partial                 a file that is not whole yet
DST/.streamconv/conversion.json  after the end: versions, arguments, fingerprint, checksums
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from streamconv import journal, shard, storage
from streamconv.errors import DestinationError, PlanError, Problem
from streamconv.execute import Receipt
from streamconv.plans import Plan, from_json, to_json

PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class State:
    """What a destination already holds of a plan.

    Attributes:
        finished: the same conversion stands there complete; nothing is to be done.
        done: receipts of work that need not be done again, by item index.
    """

    finished: bool
    done: dict[int, Receipt]


def streamconv_directory(destination: Path) -> Path:
    """Where a run keeps its own files."""
    return destination / ".streamconv"


def partial_path(destination: Path, name: str) -> Path:
    """Where an output file grows."""
    return destination / (name + PARTIAL)


def check_apart(source: Path, destination: Path) -> None:
    """Refuse a destination that is the source, lies in it, or contains it.

    Raises:
        DestinationError: one of these.
    """
    a, b = source.resolve(), destination.resolve()
    directory = a if a.is_dir() else a.parent
    if a == b or b.is_relative_to(a) or (a.is_dir() and a.is_relative_to(b)) or directory == b:
        raise DestinationError(
            f"the destination and the source ({source}) lie in each other",
            file=str(destination),
            hint="the source is never written to; choose a directory of its own",
        )
    if destination.exists() and not destination.is_dir():
        raise DestinationError("the destination is a file", file=str(destination), hint="name a directory")


def space_problem(plan: Plan, destination: Path) -> Problem | None:
    """What to say where the disk has too little room for what is left to write, or None."""
    needed, free = plan.bytes_to_write, free_space(destination)
    written = sum(
        _allocated(partial_path(destination, output.path)) + _allocated(destination / output.path)
        for output in plan.outputs
    )
    if needed - written <= free:
        return None
    return Problem(
        f"{needed - written:,} bytes are needed on the disk, {free:,} are free",
        file=str(destination),
        hint="free some space, or choose another destination",
    )


def free_space(destination: Path) -> int:
    """Free bytes on the disk that a destination is on, which need not exist yet."""
    existing = next(path for path in (destination, *destination.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextmanager
def locked(destination: Path) -> Iterator[None]:
    """Hold the destination against other runs.

    Raises:
        DestinationError: another run holds it.
    """
    path = streamconv_directory(destination) / "lock"
    with storage.failing(path, "create"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise DestinationError(
                f"another run is writing here ({handle.read().strip() or 'unknown process'})",
                file=str(destination),
                hint="wait for it to end, or stop it",
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def prepare(plan: Plan, destination: Path, *, overwrite: bool, restart: bool) -> State:
    """Make the destination ready for a run of `plan`, or find what an earlier one left.

    Raises:
        DestinationError: something else stands there; says what, and which option deals with it.
        PlanError: there is too little room.
    """
    own = streamconv_directory(destination)
    conversion = _read(own / "conversion.json")
    unfinished = _read(own / "plan.json")
    if unfinished is not None and conversion is not None:
        # A run removes an older record before it begins: this one ended between its last two steps.
        _forget_run(own)
        unfinished = None
    if unfinished is not None:
        if restart:
            _discard(from_json(unfinished), destination)
            unfinished = None
        else:
            _check_same(from_json(unfinished), plan, destination)
    elif conversion is not None and not overwrite:
        if conversion.get("fingerprint") == plan.fingerprint:
            return State(finished=True, done={})
        raise DestinationError(
            "another finished conversion stands here",
            file=str(destination),
            hint="--overwrite replaces it; or choose another destination",
        )
    if unfinished is None:
        _clear(plan, conversion, destination, overwrite=overwrite)
    problem = space_problem(plan, destination)
    if problem:
        raise PlanError("there is too little room", problems=[problem])
    if unfinished is None:
        storage.write_whole(own / "plan.json", orjson.dumps(to_json(plan)))
        return State(finished=False, done={})
    return State(finished=False, done=journal.read(own / "journal"))


def finish(destination: Path, conversion: dict[str, Any]) -> None:
    """Leave the record of the conversion, and nothing else of the run."""
    own = streamconv_directory(destination)
    text = orjson.dumps(conversion, option=orjson.OPT_INDENT_2) + b"\n"
    storage.write_whole(own / "conversion.json", text)
    _forget_run(own)


def _forget_run(own: Path) -> None:
    # The plan first: a plan without its journal would look like a run that has done nothing.
    for name in ("plan.json", "journal"):
        (own / name).unlink(missing_ok=True)


def read_conversion(destination: Path) -> dict[str, Any] | None:
    """The record of a finished conversion, or None where there is none."""
    return _read(streamconv_directory(destination) / "conversion.json")


def differences(old: Plan, new: Plan) -> list[Problem]:
    """What changed between two plans, a line each, the first few of each kind."""
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
    if old.fingerprint != new.fingerprint:
        for key in sorted(old.arguments.keys() | new.arguments.keys()):
            a_value, b_value = old.arguments.get(key), new.arguments.get(key)
            if a_value != b_value:
                problems.append(Problem(f"option {key}: {_shown(a_value)} -> {_shown(b_value)}"))
        if not problems:
            problems.append(Problem("the planned output is another, though source and options are the same"))
    return problems


def _check_same(old: Plan, new: Plan, destination: Path) -> None:
    changed = differences(old, new)
    if changed:
        raise DestinationError(
            "an unfinished conversion stands here, and this is not the same one",
            file=str(destination),
            hint="repeat the earlier command to go on with it, or throw it away with --restart",
            problems=changed,
        )


def _clear(plan: Plan, conversion: dict[str, Any] | None, destination: Path, *, overwrite: bool) -> None:
    """See that nothing stands in the way; with `overwrite`, remove what earlier weights left."""
    foreign = sorted(_foreign(destination))
    if foreign and not overwrite:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise DestinationError(
            f"the destination is not empty: {shown}",
            file=str(destination),
            hint="--overwrite replaces a model that stands there; or choose another destination",
        )
    written = set((conversion or {}).get("files", {}))
    for name in foreign:
        # Weights that another conversion left would be loaded beside, or instead of, the new ones.
        if name in written or shard.parse_weight_name(Path(name).name) is not None or name.endswith(PARTIAL):
            inside = (destination / name).resolve()
            if inside.is_relative_to(destination.resolve()) or (destination / name).is_symlink():
                (destination / name).unlink(missing_ok=True)
    (streamconv_directory(destination) / "conversion.json").unlink(missing_ok=True)
    del plan


def _discard(plan: Plan, destination: Path) -> None:
    """Remove what an unfinished run of `plan` wrote."""
    names: Iterable[str] = (
        *(output.path for output in plan.outputs),
        *(text.path for text in plan.texts),
        *(side.path for side in plan.side_files),
    )
    for name in names:
        for path in (destination / name, partial_path(destination, name)):
            path.unlink(missing_ok=True)
    _forget_run(streamconv_directory(destination))


def _foreign(destination: Path) -> Iterator[str]:
    for directory, directories, files in os.walk(destination):
        if Path(directory) == destination and ".streamconv" in directories:
            directories.remove(".streamconv")
        for name in files:
            yield (Path(directory) / name).relative_to(destination).as_posix()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        document = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise DestinationError(
            f"cannot be read: {error}", file=str(path), hint="it is damaged; remove it, or use --restart"
        ) from error
    return document if isinstance(document, dict) else None


def _allocated(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def _shown(value: Any) -> str:
    return "not given" if value in (None, [], (), "") else str(value)
