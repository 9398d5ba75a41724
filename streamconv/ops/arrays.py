"""NumPy and `ml_dtypes`, imported on first use: the command line, and a plan that computes nothing, need neither."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


class _OnUse:
    """A module that is imported when the first of its attributes is asked for."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self._module), name)
        setattr(self, name, found)  # next time it is as near as in the module itself
        return found


ml_dtypes: Any = _OnUse("ml_dtypes")  # comes without types

if TYPE_CHECKING:
    import numpy as numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]
else:
    numpy, Array = _OnUse("numpy"), Any
