"""What must hold after a run, whatever happened to it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

Tree = dict[str, tuple[str, str, int]]
"""Of each file: what it is, a digest or where it leads, its modification time."""

# Calls within which a signal is answered: that in hand, and one of another thread.
_SOON = 4

_NOTE = ".streamconv-delet"
"""What a note begins with, in a source that is being or was deleted."""

_OWN = ".streamconv"


class Violation(Exception):
    """A promise is broken; the text says which."""


def tree(root: Path) -> Tree:
    """What is below a directory."""
    found: Tree = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()), 0)
        elif path.is_file():
            found[name] = ("file", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        else:
            found[name] = ("other", "", 0)
    return found


def contents(root: Path) -> dict[str, str]:
    """The digest of each file below a directory."""
    return {name: digest for name, (kind, digest, _) in tree(root).items() if kind == "file"}


def source_is(expected: Tree, source: Path, *, deletes: bool = False) -> None:
    """Nobody but us wrote to the source; files may be gone where it was to be deleted."""
    found = tree(source)
    if deletes:
        found = {name: is_there for name, is_there in found.items() if not Path(name).name.startswith(_NOTE)}
        expected = {name: was for name, was in expected.items() if name in found}
    if found != expected:
        changed = sorted(
            name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
        )
        raise Violation(f"the source changed: {changed}")


def nothing_half_is_named(out: Path, reference: dict[str, str]) -> None:
    """A file under a final name is whole; an index or a record is there only with all that it tells of."""
    found = contents(out)
    for name, digest in found.items():
        path = Path(name)
        if path.name.endswith(".partial") or (_OWN in path.parts and path.name != "conversion.json"):
            continue
        if name not in reference:
            raise Violation(f"{name} is no file of the conversion")
        if digest != reference[name]:
            raise Violation(f"{name} has its name, and is not what it should be")
    for name in found.keys() & reference.keys():
        if name.endswith("conversion.json") or name == "model_index.json":
            needed = {each for each in reference if _OWN not in Path(each).parts}
        elif name.endswith(".index.json"):
            needed = {
                each for each in reference if Path(each).parent == Path(name).parent and _is_weights(each)
            }
        else:
            continue
        missing = sorted(needed - found.keys())
        if missing:
            raise Violation(f"{name} is there, and {missing} are not")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".ckpt", ".pt"))


def is_the_reference(out: Path, reference: dict[str, str]) -> None:
    """The destination is what an undisturbed run makes, the record included; nothing is left over."""
    found = contents(out)
    if found != reference:
        names = sorted(
            name for name in found.keys() | reference.keys() if found.get(name) != reference.get(name)
        )
        raise Violation(f"it ended well, and differs from an undisturbed run: {names}")


def message_is_ours(text: str, code: int, says: str, places: tuple[str, ...]) -> None:
    """One message in our words, without a traceback, that names a file or the tensor."""
    for sign in ("Traceback", "internal error", "Exception ignored", "Warning"):
        if sign in text:
            raise Violation(f"the message has {sign!r}")
    lines = [line for line in text.splitlines() if line.startswith("streamconv: ")]
    if code in (0, -9):
        if lines:
            raise Violation(f"exit code {code}, and a message")
        return
    if len(lines) != 1:
        raise Violation(f"exit code {code} and {len(lines)} messages")
    said = " ".join(text[text.index(lines[0]) :].split())
    if not any(each in said for each in says.split("|")):
        raise Violation(f"the message does not say {says!r}")
    if code != 130 and "worker process" not in said and not any(place in said for place in places):
        raise Violation("the message names no file")


def was_about_to_end(log: Path) -> None:
    """A run that was signalled and ended well all the same had its record written by then."""
    entries = [json.loads(line) for line in log.read_bytes().splitlines()]
    at = max((at for at, entry in enumerate(entries) if entry["event"] == "signalled"), default=len(entries))
    after = [entry for entry in entries[at:] if entry["by"] == "main"]
    for number, entry in enumerate(after):
        if entry["event"] == "replace" and entry["to"].endswith("conversion.json") and number > _SOON:
            raise Violation(f"it was signalled, and went on for {number} calls to its end")


def running(pids: list[int]) -> list[int]:
    """Which of some processes still run."""
    return [pid for pid in pids if _state(pid) not in ("", "Z")]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal."""
    return _state(pid) == "T"


def is_root() -> bool:
    """Whether file systems can be mounted, as far as that is known before it is tried."""
    return os.geteuid() == 0
