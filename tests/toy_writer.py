"""A format from outside the package: a line of names, then the bytes of each; ranks take turns at the tensors."""

from __future__ import annotations

from streamconv.errors import Problem
from streamconv.writers.layout import BARE, FileLayout, Literal, Placement
from streamconv.writers.ranks import Part


def check(spec):
    return Problem("toys are made of F32", tensor=spec.name) if spec.dtype.name != "F32" else None


def layout(tensors, about=BARE):
    head = f"{about.name}: {' '.join(target.spec.name for target in tensors)}\n".encode()
    places, at = [], len(head)
    for target in tensors:
        places.append(Placement(target.spec.name, at, target.spec.nbytes))
        at += target.spec.nbytes
    return FileLayout(at, tuple(places), (Literal(0, head),))


def ranks(whole):
    names = list(whole.tensors)
    return [
        Part({name: whole.tensors[name] for name in names[rank :: whole.ranks]}, f"{rank}/toy")
        for rank in range(whole.ranks)
    ]
