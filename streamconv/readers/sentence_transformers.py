"""A model of sentence-transformers: modules one after another, of which those with weights are models of their own.

    DIR/modules.json                     the modules in their order: [{"path": "", ...}, {"path": "2_Dense", ...}]
    DIR/config.json, model.safetensors   mostly the first one, a model of transformers
    DIR/2_Dense/model.safetensors        what follows it
    DIR/0_Router/document_0_Dense/...    modules within a module
    DIR/query_0_Transformer/...          those of a router that is the first module

Source: huggingface/sentence-transformers: sentence_transformers/base/model.py (`_load_modules`).
"""

from __future__ import annotations

from collections.abc import Iterator

from streamconv.errors import CheckpointError
from streamconv.options.records import ReadingOptions
from streamconv.readers import huggingface, small
from streamconv.readers.checkpoint import Checkpoint
from streamconv.readers.format import Format
from streamconv.readers.paths import stays_inside
from streamconv.readers.side_files import COPIES
from streamconv.storage.location import Location

INDEX = "modules.json"
"""The file that lists the modules."""

ROUTER = "router_config.json"
"""The file of a module that chooses among others: which of them are on which route."""


def find(path: Location, _: ReadingOptions) -> Location | None:
    """The directory, where it has a list of modules."""
    index = path / INDEX
    modules = small.read_json(index) if index.is_file() else None
    is_one = isinstance(modules, list) and all(isinstance(each, dict) and "path" in each for each in modules)
    return path if is_one else None


def read(found: Location, reading: ReadingOptions) -> Checkpoint:
    """Every module with weights, in the order of the list.

    Raises:
        CheckpointError: what is wrong with all of them; or the list leads out of the directory.
    """
    names = [module["path"] for module in small.read_json(found / INDEX)]
    strange = [name for name in names if name != "" and not (isinstance(name, str) and stays_inside(name))]
    if strange:
        raise CheckpointError(
            f"it has a module at {str(strange[0])[:200]!r}, which is not in the directory",
            file=str(found / INDEX),
            hint="do not trust this checkpoint",
        )
    directories = {name: path for each in names for name, path in _within(found, each)}
    return huggingface.several(found, directories, reading, FORMAT.name)


def _within(path: Location, name: str) -> Iterator[tuple[str, Location]]:
    """A module's directory, and those in it."""
    directory = path / name if name else path
    if not directory.is_directory():
        return
    yield name, directory
    if not name and not (directory / ROUTER).is_file():
        return  # what else lies at the top is no module, or has its own place in the list
    for entry in directory.entries():
        if entry.is_directory() and entry.name not in COPIES and not entry.name.startswith("."):
            yield f"{name}/{entry.name}" if name else entry.name, entry


FORMAT = Format(
    "sentence-transformers model", "a directory with `modules.json`; all modules in one run", find, read
)
