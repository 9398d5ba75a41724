"""Readers: files and directories in, a `Checkpoint` out. Only headers are read."""

from streamconv.readers.format import Format
from streamconv.readers.huggingface import read_config_file
from streamconv.readers.opening import FORMATS, open_checkpoint, open_model

__all__ = ["FORMATS", "Format", "open_checkpoint", "open_model", "read_config_file"]
