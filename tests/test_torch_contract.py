"""Both torch formats keep the contract of readers; files come from `torch.save`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from reader_contract import ReaderContract, State


class TestZip(ReaderContract):
    def write(self, state: State, directory: Path) -> Path:
        torch.save(state, directory / "pytorch_model.bin")
        return directory / "pytorch_model.bin"


class TestLegacy(ReaderContract):
    def write(self, state: State, directory: Path) -> Path:
        torch.save(state, directory / "model.pt", _use_new_zipfile_serialization=False)
        return directory / "model.pt"


class TestShardedBins(ReaderContract):
    def write(self, state: State, directory: Path) -> Path:
        weight_map = {}
        for number, name in enumerate(list(state)[:2], 1):
            names = [name] if number == 1 else list(state)[1:]
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({each: state[each] for each in names}, directory / file)
            weight_map |= dict.fromkeys(names, file)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return directory
