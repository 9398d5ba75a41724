"""Which files of a checkpoint's directory go along with its weights, and which stay, and why."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from streamconv.readers import files, run_files
from streamconv.readers.checkpoint import Ignored
from streamconv.shard import parse_weight_name
from streamconv.storage.location import Location

# Larger files are data, not configuration; tokenizers end at some tens of MB.
_MAX_SIZE = 512 << 20
_MAX_DEPTH = 4

_FOREIGN_WEIGHTS = (".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack",
                  ".ot", ".tflite", ".mlmodel", ".npz", ".data")  # fmt: skip
COPIES = frozenset({"original", "consolidated", "metal", "onnx", "openvino", "coreml"})
# DeepSpeed puts its own programs into every checkpoint.
_TOOLS = frozenset({"zero_to_fp32.py", "zero_to_torch.py"})

_BESIDE_A_FILE = frozenset(
    {
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "generation_config.json",
        "merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
        "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "vocab.json", "vocab.txt",
    }
)  # fmt: skip
"""What Hugging Face's libraries look for beside weights. Only these go along with a single file: its
directory may hold anything."""


def of_directory(
    directory: Location, weights: Collection[str]
) -> tuple[tuple[str, ...], tuple[Ignored, ...]]:
    """What to copy, and what to leave, relative to `directory`; `weights` are the absolute paths in use."""
    copied: list[str] = []
    ignored: list[Ignored] = []
    for path in _walk(directory, 0):
        if path.place in weights:
            continue
        name = path.relative_to(directory)
        if not _is_text(path.name):
            ignored.append(Ignored(ascii(name)[1:-1], "its name is not valid text"))
            continue
        reason = _reason(path, name)
        if reason is None:
            copied.append(name)
        else:
            ignored.append(Ignored(name, reason))
    return tuple(copied), tuple(ignored)


def beside_training(directory: Location) -> tuple[str, ...]:
    """What to copy of a training run's directory: what a model needs, and none of the run's own state."""
    code = (path.name for path in directory.glob("*.py") if path.name not in _TOOLS and path.is_file())
    return tuple(sorted((*beside_file(directory / "model"), *code)))


def beside_file(path: Location) -> tuple[str, ...]:
    """What to copy along with a single weight file: well-known names beside it."""
    return tuple(sorted(name for name in _BESIDE_A_FILE if (path.parent / name).is_file()))


def _is_text(name: str) -> bool:
    """Whether a file name is Unicode; other bytes reach Python as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _walk(directory: Location, depth: int) -> Iterator[Location]:
    for path in directory.entries():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        # Below the top, a link to a directory may lead anywhere, and round in circles.
        is_directory = path.is_directory() and (depth == 0 or not path.is_link())
        if is_directory and depth < _MAX_DEPTH:
            yield from _walk(path, depth + 1)
        elif not is_directory:
            yield path


def _reason(path: Location, name: str) -> str | None:
    """Why a file is not copied, or None where it is."""
    if not path.is_file():
        return "a link to nothing" if path.is_link() else "no regular file"
    parts = name.split("/")
    if what := run_files.what_it_is(path.name):
        return what
    copy = next((part for part in parts[:-1] if part in COPIES), None)
    if copy:
        return f"in {copy}/, where repositories keep other copies of the weights"
    parsed = parse_weight_name(path.name)
    if parsed is not None and parsed.kind == "index":
        return "the index of weights; the output gets its own"
    if path.suffix in _FOREIGN_WEIGHTS or path.suffix in files.suffixes():
        return "other weights"
    size = path.state().size
    if size > _MAX_SIZE:
        return f"{size} bytes, too much for a side file"
    if size > 1 << 20 and files.is_weights(path):
        return "other weights"
    return None
