"""Which machine this is, and which boot of it: processes on one node share a page cache until the next boot."""

from __future__ import annotations

from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def node() -> str | None:
    """The boot ID of this machine, or None where the system has none."""
    try:
        return _BOOT_ID.read_text().strip() or None
    except OSError:
        return None
