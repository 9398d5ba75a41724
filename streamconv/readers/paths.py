"""Paths that a checkpoint names. It is not trusted: none may lead out of its directory."""

from __future__ import annotations

from pathlib import PurePosixPath


def stays_inside(name: str) -> bool:
    """Whether a relative path is plain text that stays in the directory it is relative to."""
    path = PurePosixPath(name)
    plain = bool(name) and not path.is_absolute() and ".." not in path.parts
    return plain and "\\" not in name and name.isprintable()
