"""The version of this program, apart so that every layer may know it."""

from __future__ import annotations

__version__ = "0.1.0"
