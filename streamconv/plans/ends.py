"""What `--to-arch` can make of a checkpoint: of the ends to which there are recipes, those whose plan checks."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from streamconv.errors import StreamconvError
from streamconv.options.fields import filled
from streamconv.options.records import PlanOptions
from streamconv.options.spelling import either
from streamconv.plans import registry
from streamconv.plans.compile import compile_plan
from streamconv.plans.wanted import resolved
from streamconv.readers.checkpoint import Checkpoint

_MOST = 20_000  # tensors in all plans that are tried, which takes some seconds


@dataclass(frozen=True, slots=True)
class Ends:
    """Names that `--to-arch` may take for a checkpoint.

    Attributes:
        names: in alphabetical order.
        tried: whether a plan has shown it; else the checkpoint is too large for that.
        by_config: names for which the checkpoint lacks its config.
    """

    names: tuple[str, ...] = ()
    tried: bool = True
    by_config: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """The same in words; nothing where there are none."""
        if self.by_config:
            return [
                f"with its config (--config FILE), there are recipes to {either(self.by_config)} (--to-arch NAME)"
            ]
        if not self.names:
            return []
        if self.tried:
            return [f"it can become {either(self.names)} (--to-arch NAME)"]
        return [
            f"there are recipes to {either(self.names)} (--to-arch NAME); a plan says whether they take it"
        ]


def ends(checkpoint: Checkpoint) -> Ends:
    """What can be made of a checkpoint, as it is."""
    names = _each(registry.becomes(component) for component in checkpoint.models)
    if len(names) * len(checkpoint) > _MOST:
        return Ends(names, tried=False)
    if found := tuple(name for name in names if _checks(checkpoint, name)):
        return Ends(found)
    bare = [component for component in checkpoint.models if component.config is None]
    return Ends(by_config=_each(registry.becomes_by_name(component) for component in bare))


def _each(names: Iterable[Iterable[str]]) -> tuple[str, ...]:
    return tuple(sorted({name for some in names for name in some}))


def _checks(checkpoint: Checkpoint, to_arch: str) -> bool:
    """Whether there is a plan."""
    with suppress(StreamconvError):
        compile_plan(
            checkpoint, resolved(filled(PlanOptions, PlanOptions(to_arch=to_arch, side_files=False)))
        )
        return True
    return False
