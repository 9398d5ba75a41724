"""What a destination is to hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from streamconv.plans.plan import OutputFile, PlannedTensor, TextFile


@dataclass(slots=True)
class Output:
    """What the destination is to hold, as far as it is decided.

    Attributes:
        tensors: in the order of their files and offsets.
        files: weight files.
        texts: small files that are made.
        left_out: paths of side files that are not to be copied.
    """

    tensors: list[PlannedTensor] = field(default_factory=list)
    files: list[OutputFile] = field(default_factory=list)
    texts: list[TextFile] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
