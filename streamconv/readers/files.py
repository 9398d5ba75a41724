"""One weight file: recognised by its first bytes, and opened by the reader of its format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from streamconv.errors import CheckpointError, located
from streamconv.options.records import ReadingOptions
from streamconv.readers import moments, safetensors, state_dict, torch_legacy, torch_zip
from streamconv.readers.checkpoint import WeightFile
from streamconv.readers.mindspore import ckpt
from streamconv.readers.moments import Moments
from streamconv.readers.torch_rebuild import TorchFile
from streamconv.readers.window import Window
from streamconv.shard import CKPT, SAFETENSORS, TORCH
from streamconv.storage.location import Location

_SNIFFED = 1024
_ZIP = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True, slots=True)
class FileFormat:
    """How weight files of one format are recognised and read.

    Attributes:
        name: what `WeightFile.format` says.
        forms: what is read of it, in words.
        suffixes: of its files, where no library prescribes the name; only a hint.
        recognises: whether first bytes are those of this format.
        read: opens one.
    """

    name: str
    forms: str
    suffixes: tuple[str, ...]
    recognises: Callable[[bytes], bool]
    read: Callable[[Location, ReadingOptions], WeightFile]


def open_file(file: Location, reading: ReadingOptions | None = None) -> WeightFile:
    """Open a weight file of any format that is known.

    Args:
        file: where it is.
        reading: which of a torch file's state dicts to take; by default it is looked for.

    Raises:
        CheckpointError: it is damaged, or its format is not read; the message names the format where it is known.
    """
    head = _head(file)
    for form in FORMATS:
        if form.recognises(head):
            with located(file.place):
                found = form.read(file, reading or ReadingOptions())
            return replace(found, notes=tuple(f"{file.name}: {note}" for note in found.notes))
    for recognises, message, hint in _STRANGERS:
        if recognises(head):
            raise CheckpointError(message, file=file.place, hint=hint)
    raise CheckpointError(
        "this is not a weight file of a known format",
        file=file.place,
        hint="files of safetensors, torch.save and MindSpore are read, whatever they are called; of what is saved as a "
        "directory (DCP, DeepSpeed, SAT, shards with an index), give the directory",
    )


def load_torch(file: Location) -> TorchFile:
    """The object in a file of torch.save, of either kind. Raises CheckpointError where it is none."""
    load = torch_zip.load if _head(file).startswith(_ZIP) else torch_legacy.load
    return load(file)


def is_weights(file: Location) -> bool:
    """Whether a file's first bytes are those of a format that is read."""
    head = _head(file)
    return any(form.recognises(head) for form in FORMATS)


def _head(file: Location) -> bytes:
    with Window(file) as window:
        return window.read(0, min(_SNIFFED, window.length))


def _torch(
    name: str, load: Callable[[Location], TorchFile]
) -> Callable[[Location, ReadingOptions], WeightFile]:
    def read(file: Location, reading: ReadingOptions) -> WeightFile:
        found = load(file)
        optimizer = bool(reading.get("optimizer"))
        state = state_dict.flatten(
            found.content, reading.get("root"), ema=reading.get("ema", False), optimizer=optimizer
        )
        known = Moments()
        if optimizer and state.optimizers:
            known = moments.read(found.content, state.optimizers, state.tensors)
        return WeightFile(
            file.place,
            name,
            state.tensors,
            state.metadata,
            (*found.notes, *state.notes, *known.notes),
            unreadable=state.unreadable,
            reported=state.reported,
            moments=known.states,
            settings=known.settings,
        )

    return read


def _safetensors(file: Location, reading: ReadingOptions) -> WeightFile:
    """A file of tensors by name: what is not the model's is left out of it as it is of a torch file."""
    found = safetensors.read(file)
    if state_dict.is_plain(found.tensors):
        return found
    state = state_dict.flatten(dict(found.tensors), reading.get("root"), ema=reading.get("ema", False))
    return replace(
        found,
        tensors=state.tensors,
        notes=(*found.notes, *state.notes),
        unreadable=state.unreadable,
        reported=state.reported,
    )


def _begins(*magics: bytes) -> Callable[[bytes], bool]:
    return lambda head: head.startswith(magics)


def _is_safetensors(head: bytes) -> bool:
    """A plausible length, then an object. The library takes white space before the brace."""
    length = int.from_bytes(head[:8], "little")
    return len(head) >= 8 and 2 <= length <= 1 << 48 and head[8:].lstrip(b" \t\r\n").startswith(b"{")


def _is_legacy(head: bytes) -> bool:
    """Pickles of all protocols from 2 on, and old tar files: the reader finds out which are torch's."""
    return head.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) or head[257:262] == b"ustar"


_TORCH_ZIP, _TORCH_LEGACY = "torch zip", "torch legacy"
_TORCH = (TORCH, ".pt", ".pth", CKPT)

FORMATS: list[FileFormat] = [
    FileFormat(
        _TORCH_ZIP,
        "`.bin`, `.pt`, `.pth`, `.ckpt` of PyTorch 1.6 and later, alone or sharded with an index",
        _TORCH,
        _begins(*_ZIP),
        _torch(_TORCH_ZIP, torch_zip.load),
    ),
    FileFormat(
        safetensors.NAME,
        "a file, or a directory with or without an index",
        (SAFETENSORS,),
        _is_safetensors,
        _safetensors,
    ),
    FileFormat(
        _TORCH_LEGACY,
        "the same of earlier versions",
        _TORCH,
        _is_legacy,
        _torch(_TORCH_LEGACY, torch_legacy.load),
    ),
    FileFormat(
        ckpt.NAME,
        "`.ckpt`, and MindSpore's safetensors with any of their indexes",
        (CKPT,),
        ckpt.recognises,
        lambda file, _: ckpt.read(file),
    ),
]
"""What is read; the first that recognises a file's first bytes takes it."""


def suffixes() -> frozenset[str]:
    """The suffixes of weight files of all formats."""
    return frozenset(suffix for form in FORMATS for suffix in form.suffixes)


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
