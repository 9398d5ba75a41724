"""How a failure of a storage is told: which file, what was being done to it, what to do next."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from streamconv.errors import ConversionError

_AGAIN = "run the same command again to resume"
_HINTS = {
    errno.ENOSPC: f"the disk is full; free some space and {_AGAIN}",
    errno.EDQUOT: f"the disk quota is used up; free some space and {_AGAIN}",
    errno.EIO: f"the disk or network reports a fault; {_AGAIN}",
    errno.ENOENT: "the file was there when the plan was made",
}


@contextmanager
def failing(place: object, action: str) -> Iterator[None]:
    """Turn an OSError into a ConversionError that names the file."""
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"cannot {action}: {error.strerror or error}",
            file=str(place),
            hint=_HINTS.get(error.errno or 0),
        ) from error
