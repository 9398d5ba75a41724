"""Which machine this is, since when: processes of one node share one page cache, until it boots again."""

from __future__ import annotations

from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def node() -> str | None:
    """The boot of this machine, or None where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip() or None
    except OSError:
        return None
