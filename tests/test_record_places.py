"""What `conversion.json` says of places: enough to verify by, and nothing of the machine's directories."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from watched import Calls, watching

import streamconv
from streamconv.cli import main
from streamconv.errors import StreamconvError, UsageError
from streamconv.running.state import sealed


def model(place: Path, **config: Any) -> Path:
    place.mkdir(parents=True)
    torch.manual_seed(0)
    save_file({"a": torch.randn(4, 4)}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    return place


def on_record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / ".streamconv" / "conversion.json").read_text())
    return found


@pytest.fixture
def places(tmp_path: Path) -> Mapping[str, Path]:
    secret = tmp_path / "home-of-someone"
    return {
        "near": model(secret / "work" / "near"), "source": model(secret / "source"),
        "far": model(tmp_path / "another-disk" / "with" / "far"), "out": secret / "work" / "deep" / "out",
    }  # fmt: skip


@pytest.mark.parametrize("like", ["near", "far"])
@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_a_record_says_nothing_of_the_machine(
    places: Mapping[str, Path], tmp_path: Path, like: str, name: str
) -> None:
    out = places["out"].parent / name
    streamconv.convert(places["source"], out, like=places[like], config=places[like] / "config.json")
    own = out.parent / ".streamconv" / name if out.is_file() else out / ".streamconv"
    text = (own / "conversion.json").read_text()
    for path in (own / "conversion.json", *(() if out.is_file() else out.glob("*.json"))):
        for part in (str(tmp_path), "home-of-someone", "another-disk", os.path.expanduser("~") + "/"):
            assert part not in path.read_text()
    assert json.loads(text)["source"] == "source"


def test_what_is_near_is_found_wherever_both_are_moved(
    places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(places["source"].parent)
    streamconv.convert("source", "work/deep/out", like="work/near")
    assert on_record(places["out"])["arguments"]["like"] == "./../../near"
    monkeypatch.chdir("/")
    assert streamconv.verify(places["source"], places["out"]).whole
    shutil.move(tmp_path / "home-of-someone", tmp_path / "moved")
    found = streamconv.verify(tmp_path / "moved" / "source", tmp_path / "moved" / "work" / "deep" / "out")
    assert found.whole and f"--like {tmp_path}/moved/work/near" in " ".join(found.recorded)


def test_what_is_far_is_to_be_given_again(
    places: Mapping[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    streamconv.convert(places["source"], places["out"], like=places["far"])
    assert on_record(places["out"])["arguments"]["like"] == "/.../far"
    with pytest.raises(UsageError, match="give the options to verify it with"):
        streamconv.verify(places["source"], places["out"])
    assert streamconv.verify(places["source"], places["out"], like=places["far"]).whole
    assert main(["verify", str(places["source"]), str(places["out"]), "--like", str(places["far"])]) == 0
    assert main(["verify", str(places["source"]), str(places["out"])]) == 2
    assert "/.../far" in capsys.readouterr().err


def test_finished_is_known_and_so_is_a_change(places: Mapping[str, Path]) -> None:
    for time, like in enumerate(("near", "far")):
        words = [
            str(places["source"]),
            str(places["out"]),
            "--quiet",
            "--like",
            str(places[like]),
            "--overwrite",
        ]
        assert main(words) == 0
        done = streamconv.convert(places["source"], places["out"], like=places[like])
        assert done.finished_before
        os.utime(places["source"] / "model.safetensors", (time, time))
        with pytest.raises(streamconv.errors.DestinationError, match="replaces it"):
            streamconv.convert(places["source"], places["out"], like=places[like])


@pytest.mark.parametrize("option", ["like", "config", "strategy", "lora"])
@pytest.mark.parametrize(
    "place",
    [
        "/{}",
        "./../../../{}",
        "././.././../../{}",
        "file:///{}",
        "http://127.0.0.1:9/{}",
        "s3://bucket/{}",
        "hf://owner/{}",
    ],
)
def test_a_record_has_nothing_opened_that_is_far(
    option: str, place: str, places: Mapping[str, Path], tmp_path: Path
) -> None:
    streamconv.convert(places["source"], places["out"])
    secret = tmp_path / "secret"
    above = "../" * 20 if place.startswith(".") else ""
    document = on_record(places["out"])
    said = place.format(above + str(secret).lstrip("/"))
    document["arguments"][option] = [said] if option == "lora" else said
    (places["out"] / ".streamconv" / "conversion.json").write_text(json.dumps(sealed(document)))
    calls = Calls()
    with watching(calls), pytest.raises(StreamconvError):
        streamconv.verify(places["source"], places["out"])
    assert str(secret) not in str(calls.made) and "://" not in str(calls.made)


@pytest.mark.parametrize("option", ["like", "config", "strategy", "source_strategy", "lora", "recipe"])
@pytest.mark.parametrize("name", ["secret", "secret.toml", "secret.json"])
def test_a_record_has_nothing_opened_that_lies_where_the_command_is_given(
    option: str, name: str, places: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamconv.convert(places["source"], places["out"])
    document = on_record(places["out"])
    document["arguments"][option] = [name] if option == "lora" else name
    (places["out"] / ".streamconv" / "conversion.json").write_text(json.dumps(sealed(document)))
    (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    calls = Calls()
    with watching(calls), pytest.raises(StreamconvError):
        streamconv.verify(places["source"], places["out"])
    assert str(tmp_path / name) not in str(calls.made)
