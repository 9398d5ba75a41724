"""A short run of the fault harness, and what it found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file
from watched import Failing, watching

from streamconv.cli import main


@pytest.mark.slow
def test_conversions_under_faults_lose_nothing() -> None:
    """`python -m tests.faults --minutes M --seed S` is the long form."""
    command = [sys.executable, "-m", "tests.faults", "--cases", "12", "--seed", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    found = subprocess.run(
        command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert ": 0 violations" in found.stdout


@pytest.mark.parametrize("method", ["entries", "state", "open", "read", "is_link", "canonical"])
def test_an_error_of_the_storage_names_the_place(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A disk that fails says nothing of files."""
    (tmp_path / "source").mkdir()
    save_file({"x": numpy.zeros(9)}, tmp_path / "source" / "model.safetensors")
    with watching(Failing(method, OSError(5, "Input/output error"), place=str(tmp_path))):
        code = main([str(tmp_path / "source"), str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert code in (1, 2)
    assert "Input/output error" in said
    assert str(tmp_path) in said.partition("error: ")[2]
