"""Is a destination what its plan says; byte by byte, and by the libraries that own the formats."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streamconv import shard
from streamconv.engines import ENGINES
from streamconv.errors import ConversionError, Problem
from streamconv.execution import patches
from streamconv.execution.execute import Settings
from streamconv.execution.memory import Budget, PeakMeter, crowds_page_cache
from streamconv.plans import Plan
from streamconv.plans.plan import OutputFile
from streamconv.running.run import WORTH_PROCESSES, Progress, ProgressCallback, batches, work_items
from streamconv.storage import files as storage
from streamconv.writers.layout import FileLayout


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify_plan` found.

    Attributes:
        destination: the directory.
        tensors: how many were compared.
        bytes_compared: of tensor data, in the destination.
        seconds: it took.
        problems: all that is wrong; empty where the destination is what the plan says.
    """

    destination: Path
    tensors: int
    bytes_compared: int
    seconds: float
    problems: tuple[Problem, ...]


def verify_plan(
    plan: Plan, destination: Path, budget: Budget, progress: ProgressCallback | None = None
) -> Verification:
    """Compare every byte of a destination with what the plan says it is. Changes nothing.

    A file that is missing, has another size or another header is one problem, and its tensors are not
    compared; of a tensor that differs, the first differing element is told.
    """
    began = time.monotonic()
    problems: list[Problem] = []
    sound: set[str] = set()
    names: list[list[str]] = [[] for _ in plan.outputs]
    for tensor in plan.tensors:
        names[tensor.file].append(tensor.spec.name)
    for output, held in zip(plan.outputs, names, strict=True):
        found = list(_file_problems(output, held, destination))
        problems += found
        if not found:
            path = str(destination / output.path)
            sound.add(path)
            problems += _checksum_problems(output.layout, path)
    problems += _other_problems(plan, destination)

    items = [
        item
        for item in work_items(plan, [str(destination / output.path) for output in plan.outputs])
        if item.path in sound
    ]
    by_index = {item.index: item for item in items}
    total = sum(item.stop - item.start for item in items)
    done = 0
    reported: set[tuple[str, str]] = set()
    meter = PeakMeter()
    settings = Settings(budget.arena, forget=crowds_page_cache(2 * total), task="compare")
    work = list(batches(items))
    workers = min(budget.workers, max(len(work), 1))
    engine = ENGINES["local" if workers > 1 and total >= WORTH_PROCESSES else "inline"]
    with engine(work, settings, workers) as results:
        for receipts in results:
            for receipt in receipts:
                item = by_index[receipt.index]
                done += receipt.nbytes
                if receipt.difference and (item.path, item.name) not in reported:
                    reported.add((item.path, item.name))
                    problems.append(
                        Problem(
                            f"element {receipt.difference.element} is {receipt.difference.found}, "
                            f"expected {receipt.difference.expected}",
                            file=item.path,
                            tensor=item.name,
                        )
                    )
            peak = meter.sample()
            if progress:
                name = Path(item.path).name
                progress(Progress(done, total, 0, name, time.monotonic() - began, peak))
    return Verification(
        destination, len({item.name for item in items}), done, time.monotonic() - began, tuple(problems)
    )


def _file_problems(output: OutputFile, names: list[str], destination: Path) -> Iterator[Problem]:
    """What is wrong with one weight file that holds these tensors, apart from their bytes."""
    path = destination / output.path
    if not path.is_file():
        yield Problem("the file is missing", file=str(path))
        return
    if path.stat().st_size != output.layout.size:
        yield Problem(f"{path.stat().st_size} bytes, expected {output.layout.size}", file=str(path))
        return
    files = storage.Files()
    try:
        patched = {at for patch in output.layout.patches for at in range(patch.offset, patch.offset + 4)}
        for literal in output.layout.literals:
            found = bytearray(len(literal.data))
            storage.read_into(files, str(path), memoryview(found), literal.offset)
            if found != literal.data and any(
                a != b and literal.offset + at not in patched
                for at, (a, b) in enumerate(zip(found, literal.data, strict=True))
            ):
                yield Problem(
                    f"other header bytes than planned from byte {literal.offset} on", file=str(path)
                )
    except ConversionError as error:
        yield from error.problems
    finally:
        files.close()
    second = _SECOND_OPINIONS.get(path.suffix)
    if second:
        yield from second(path, sorted(names))


def _checksum_problems(layout: FileLayout, path: str) -> list[Problem]:
    """Where the checksums within a file are not those of its bytes."""
    files = storage.Files()
    try:
        wrong = []
        for offset, data in patches.computed(layout, path, files):
            found = bytearray(len(data))
            storage.read_into(files, path, memoryview(found), offset)
            if found != data:
                wrong.append(Problem(f"the checksum at byte {offset} is wrong", file=path))
        return wrong
    finally:
        files.close()


def _safetensors_opinion(path: Path, names: list[str]) -> Iterator[Problem]:
    """What the safetensors library says of a file's header."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as handle:
            found = sorted(handle.keys())
    except (safetensors.SafetensorError, OSError) as error:
        yield Problem(f"the safetensors library refuses it: {error}", file=str(path))
        return
    if found != names:
        yield Problem("the safetensors library reads other tensor names from it than planned", file=str(path))


_SECOND_OPINIONS: dict[str, Callable[[Path, list[str]], Iterator[Problem]]] = {
    ".safetensors": _safetensors_opinion
}


def _other_problems(plan: Plan, destination: Path) -> Iterator[Problem]:
    """Files besides the weights: indexes and side files that differ, weights that do not belong."""
    for text in plan.texts:
        path = destination / text.path
        if not path.is_file() or path.read_bytes() != text.content.encode():
            yield Problem("missing, or not what was planned", file=str(path))
    for side in plan.side_files:
        path = destination / side.path
        if not path.is_file() or not _equal(Path(side.source), path):
            yield Problem(f"missing, or not equal to {side.source}", file=str(path))
    planned = {output.path for output in plan.outputs} | {text.path for text in plan.texts}
    directories = {str(Path(name).parent) for name in planned}
    for directory in sorted(directories):
        folder = destination / directory
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.relative_to(destination).as_posix()
            if name not in planned and shard.parse_weight_name(path.name) is not None:
                yield Problem(
                    "weights that are not part of the conversion",
                    file=str(path),
                    hint="a loader may take them for part of the model; remove them",
                )


def _equal(left: Path, right: Path) -> bool:
    if left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as a, right.open("rb") as b:
        return all(x == b.read(1 << 20) for x in iter(lambda: a.read(1 << 20), b""))
