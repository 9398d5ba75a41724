"""One weight file: recognised by its first bytes, and opened by the reader of its format."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamconv.errors import CheckpointError
from streamconv.ops import Expression
from streamconv.readers import safetensors, state_dict, torch_legacy, torch_zip
from streamconv.readers.mindspore import ckpt
from streamconv.readers.torch_rebuild import TorchFile

_SNIFFED = 1024


@dataclass(frozen=True, slots=True)
class WeightFile:
    """What one file holds.

    Attributes:
        format: `safetensors`, `torch zip`, `torch legacy` or `MindSpore`.
        tensors: by name, in the file's order.
        metadata: what it holds besides tensors.
        notes: what was decided and a user should know.
    """

    path: str
    format: str
    tensors: Mapping[str, Expression]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_file(path: str, root: str | None = None) -> WeightFile:
    """Open a weight file of any format that is known.

    Args:
        path: an absolute path.
        root: where the state dict lies in a torch file; None to look for it.

    Raises:
        CheckpointError: it is damaged, or of no format that is read; says which it is, where that is clear.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(_SNIFFED)
        for recognises, reader in _READERS:
            if recognises(head):
                return reader(path, root)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", file=path) from error
    for recognises, message, hint in _STRANGERS:
        if recognises(head):
            raise CheckpointError(message, file=path, hint=hint)
    raise CheckpointError(
        "this is no weight file that is known",
        file=path,
        hint="safetensors files and files of torch.save are read, whatever they are called",
    )


def is_weights(path: str) -> bool:
    """Whether a file's first bytes are those of a format that is read."""
    with Path(path).open("rb") as file:
        head = file.read(_SNIFFED)
    return any(recognises(head) for recognises, _ in _READERS)


def _safetensors(path: str, root: str | None) -> WeightFile:
    del root
    found = safetensors.read(path)
    notes: tuple[str, ...] = ()
    if found.metadata.get("remove_redundancy") == "True":
        name = os.path.basename(path)  # noqa: PTH119 - of a string that is one
        notes = (
            f"{name}: one rank of MindSpore, without what other ranks hold too; give the directory with all",
        )
    return WeightFile(path, "safetensors", found.tensors, dict(found.metadata), notes)


def _mindspore(path: str, root: str | None) -> WeightFile:
    del root
    found = ckpt.read(path)
    name = os.path.basename(path)  # noqa: PTH119 - of a string that is one
    notes = tuple(f"{name}: {note}" for note in found.notes)
    return WeightFile(path, "MindSpore", found.tensors, found.metadata, notes)


def _torch(load: Callable[[str], TorchFile]) -> Callable[[str, str | None], WeightFile]:
    def read(path: str, root: str | None) -> WeightFile:
        found = load(path)
        state = state_dict.flatten(found.content, root, path)
        name = os.path.basename(path)  # noqa: PTH119 - of a string that is one
        notes = tuple(f"{name}: {note}" for note in (*found.notes, *state.notes))
        return WeightFile(path, found.format, state.tensors, state.metadata, notes)

    return read


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_safetensors(head: bytes) -> bool:
    """A plausible length, then an object. The library takes white space before the brace."""
    length = int.from_bytes(head[:8], "little")
    return len(head) >= 8 and 2 <= length <= 1 << 48 and head[8:].lstrip(b" \t\r\n").startswith(b"{")


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[str, str | None], WeightFile]], ...] = (
    (_begins(b"PK\x03\x04", b"PK\x05\x06"), _torch(torch_zip.load)),
    (_is_safetensors, _safetensors),
    # Pickles of all protocols from 2 on, and old tar files: the reader tells which are torch's.
    (_begins(b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _torch(torch_legacy.load)),
    (lambda head: head[257:262] == b"ustar", _torch(torch_legacy.load)),
    (ckpt.recognises, _mindspore),
)
"""First bytes -> reader; the first that matches."""

_AGAIN = "download the file itself"
_STRANGERS: tuple[tuple[Callable[[bytes], bool], str, str], ...] = (
    (lambda head: not head, "the file is empty", _AGAIN),
    (
        _begins(b"version https://git-lfs.github.com/spec"),
        "this is a Git LFS pointer, not the weights",
        "run `git lfs pull` in the repository",
    ),
    (
        lambda head: head.lstrip()[:1] == b"<" and b"html" in head.lower(),
        "this is a web page, most likely an error message that was saved in place of the file",
        _AGAIN,
    ),
    (_begins(b"GGUF"), "this is a GGUF file, which is not read", "convert the model it was made from"),
    (_begins(b"\x89HDF\r\n\x1a\n"), "this is an HDF5 file, which is not read", "save the weights with torch"),
    (_begins(b"\x1f\x8b"), "this is a gzip file", "unpack it first"),
    (_begins(b"\x93NUMPY"), "this is a NumPy array", "save the weights as safetensors"),
)
"""First bytes of what is not read -> what it is, and what to do."""
