"""The destination directory: what may stand in it, what a run keeps there, and how it ends.

DST/.streamconv/plan.json        while a run is unfinished: the plan
DST/.streamconv/journal          what of it is done
DST/.streamconv/lock             held by the run that is writing
DST/NAME.partial                 a file that is not whole yet
DST/.streamconv/conversion.json  after the end: versions, arguments, fingerprint, checksums
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from streamconv import shard
from streamconv.errors import DestinationError, PlanError, Problem, listed
from streamconv.execution.execute import Receipt
from streamconv.plans import Plan, fingerprint, from_json, to_json
from streamconv.running import journal
from streamconv.storage import files as storage

PARTIAL = ".partial"

# Seconds that a run waits for the workers of one that was killed, which end with the batch in hand.
_LOCK_PATIENCE = 5.0


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
    if b.is_relative_to(a) or a.is_relative_to(b) or directory == b:
        raise DestinationError(
            f"the destination and the source ({source}) lie in each other",
            file=str(destination),
            hint="the source is never written to; choose a directory of its own",
        )
    if destination.exists() and not destination.is_dir():
        raise DestinationError("the destination is a file", file=str(destination), hint="name a directory")


def check_sources_apart(plan: Plan, destination: Path) -> None:
    """Refuse a destination through which the source itself would be written to, by whatever links.

    Raises:
        DestinationError: a file of the source lies in the destination, or a directory of the destination
            that is to be written in is a link.
    """
    inside = destination.resolve()
    for path in (*(file.path for file in plan.files), *(side.source for side in plan.side_files)):
        if Path(path).resolve().is_relative_to(inside):
            raise DestinationError(
                f"a file of the source lies in it ({path})",
                file=str(destination),
                hint="the source is never written to; choose a directory of its own",
            )
    for name in output_names(plan):
        for parent in Path(name).parents:
            if (destination / parent).is_symlink() and parent != Path():
                raise DestinationError(
                    "a directory that is to be written in is a link",
                    file=str(destination / parent),
                    hint="remove the link, or choose another destination",
                )


def output_names(plan: Plan) -> tuple[str, ...]:
    """Every file that a plan makes, relative to the destination."""
    return (
        *(output.path for output in plan.outputs),
        *(text.path for text in plan.texts),
        *(side.path for side in plan.side_files),
    )


def states(plan: Plan) -> list[list[Any]]:
    """Size and time of every file that a plan reads, for the record."""
    return [
        *([file.path, file.size, file.mtime_ns] for file in plan.files),
        *([side.source, side.size, side.mtime_ns] for side in plan.side_files),
    ]


def space_problem(plan: Plan, destination: Path, freed: int = 0) -> Problem | None:
    """What to say where the disk has too little room for what is left to write, or None.

    `freed` bytes of other files will be gone by then.
    """
    needed, free = plan.bytes_to_write, free_space(destination) + freed
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
    """Hold the destination against other runs, and against workers that a killed run left behind.

    The lock is the open file's, which workers inherit: it is free when the last of them is gone.

    Raises:
        DestinationError: another run holds it.
    """
    own = streamconv_directory(destination)
    with storage.failing(own, "create"):
        own.mkdir(parents=True, exist_ok=True)
    handle = _lock(own / "lock", destination)
    with handle:
        os.set_inheritable(handle.fileno(), True)
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            (own / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                own.rmdir()  # a run that was refused leaves nothing behind


def _lock(path: Path, destination: Path) -> IO[str]:
    """The lock file, locked. Waits a moment, in which orphaned workers come to their end."""
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        with storage.failing(path, "create"):
            handle = path.open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the file between our opening and locking it.
            if path.exists() and os.fstat(handle.fileno()).st_ino == path.stat().st_ino:
                return handle
            handle.close()
        except BlockingIOError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown process"
            handle.close()
            if time.monotonic() > deadline:
                raise DestinationError(
                    f"another run is writing here ({holder})",
                    file=str(destination),
                    hint="wait for it to end, or stop it",
                ) from error
            time.sleep(0.1)
        except OSError as error:
            handle.close()
            raise DestinationError(
                f"the file system cannot lock files: {error.strerror}",
                file=str(path),
                hint="choose a destination on another disk",
            ) from error


def prepare(
    plan: Plan, destination: Path, *, overwrite: bool, restart: bool, checksum: bool = False
) -> State:
    """Make the destination ready for a run of `plan`, or find what an earlier one left.

    Args:
        plan: what is to be run.
        destination: where.
        overwrite: replace a finished conversion, or a model that stands there.
        restart: throw an unfinished run away.
        checksum: work without a checksum counts as not done.

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
        if not restart:
            _check_same(from_json(unfinished), plan, destination)
            _check_space(plan, destination)
            done = journal.read(own / "journal")
            if checksum:
                done = {index: receipt for index, receipt in done.items() if receipt.digest is not None}
            return State(finished=False, done=done)
        _discard(from_json(unfinished), destination)
    elif conversion is not None and not overwrite:
        problems = _unfinished_business(conversion, plan, destination, checksum=checksum)
        if not problems:
            return State(finished=True, done={})
        raise DestinationError(
            "another finished conversion stands here",
            file=str(destination),
            hint="--overwrite replaces it; or choose another destination",
            problems=problems,
        )
    _clear(plan, conversion, destination, overwrite=overwrite)
    # A journal without its plan tells of other work: a run that ended between removing the two.
    (own / "journal").unlink(missing_ok=True)
    storage.sync_file(own)
    storage.write_whole(own / "plan.json", orjson.dumps(to_json(plan)))
    return State(finished=False, done={})


def _unfinished_business(
    conversion: dict[str, Any], plan: Plan, destination: Path, *, checksum: bool
) -> list[Problem]:
    """Why a finished conversion is not the one that is wanted; empty where it is."""
    if conversion.get("fingerprint") != fingerprint(plan):
        return [Problem("it was made by another plan")]
    problems = []
    if conversion.get("sources") != states(plan):
        problems.append(Problem("the source was written to since"))
    for name, size in conversion.get("files", {}).items():
        path = destination / name
        if not path.is_file() or path.stat().st_size != size:
            problems.append(Problem("is missing, or has another size than it was given", file=str(path)))
    tensors = (tensor for file in conversion.get("tensors", {}).values() for tensor in file.values())
    if checksum and not all("xxh3_128" in tensor or 0 in tensor["shape"] for tensor in tensors):
        problems.append(Problem("it has no checksums of what the kernel copied"))
    return problems


def _check_space(plan: Plan, destination: Path, freed: int = 0) -> None:
    problem = space_problem(plan, destination, freed)
    if problem:
        raise PlanError("there is too little room", problems=[problem])


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
    if fingerprint(old) != fingerprint(new):
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
    """See that nothing stands in the way; with `overwrite`, remove the model that does.

    Removed is what an earlier conversion wrote, and weights in the directories that the plan writes in:
    they would be loaded beside, or instead of, the new ones. All else stays.
    """
    foreign = sorted(_foreign(destination))
    if foreign and not overwrite:
        raise DestinationError(
            f"the destination is not empty: {listed(foreign)}",
            file=str(destination),
            hint="--overwrite replaces a model that stands there; or choose another destination",
        )
    names = output_names(plan)
    directories = {str(Path(name).parent) for name in names}
    written = {*(conversion or {}).get("files", {}), *names, *(name + PARTIAL for name in names)}
    gone = [
        destination / name
        for name in foreign
        if name in written
        or (str(Path(name).parent) in directories and shard.parse_weight_name(Path(name).name) is not None)
    ]
    in_the_way = [path for path in gone if path.is_dir() and not path.is_symlink()]
    if in_the_way:
        raise DestinationError(
            "a directory stands where a file is to be written", file=str(in_the_way[0]), hint="remove it"
        )
    _check_space(plan, destination, freed=sum(map(_allocated, gone)))
    # The record goes first: without its files it would vouch for what is not there.
    own = streamconv_directory(destination)
    if conversion is not None:
        (own / "conversion.json").unlink(missing_ok=True)
        storage.sync_file(own)
    for path in gone:
        path.unlink(missing_ok=True)


def _discard(plan: Plan, destination: Path) -> None:
    """Remove what an unfinished run of `plan` wrote."""
    for name in output_names(plan):
        for path in (destination / name, partial_path(destination, name)):
            path.unlink(missing_ok=True)
    _forget_run(streamconv_directory(destination))


def _foreign(destination: Path) -> Iterator[str]:
    for directory, directories, files in os.walk(destination):
        if Path(directory) == destination and ".streamconv" in directories:
            directories.remove(".streamconv")
        links = [name for name in directories if (Path(directory) / name).is_symlink()]
        for name in (*files, *links):
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
