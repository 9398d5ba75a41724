"""A destination that is not what its plan says is told: which file, which tensor, which element."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streamconv
from streamconv.api import compare
from streamconv.cli import main
from streamconv.errors import UsageError

STATE = {"a": torch.arange(20.0).reshape(4, 5), "b": torch.arange(6, dtype=torch.int64)}


@pytest.fixture(params=["safetensors", "torch"])
def converted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "source").mkdir()
    save_file(STATE, tmp_path / "source" / "model.safetensors")
    (tmp_path / "source" / "config.json").write_text("{}")
    streamconv.convert(tmp_path / "source", tmp_path / "out", to=request.param, max_shard="60")
    return tmp_path / "source", tmp_path / "out"


def messages(source: Path, out: Path) -> str:
    return "\n".join(map(str, streamconv.verify(source, out).problems))


def test_what_is_right_is_right(converted: tuple[Path, Path]) -> None:
    source, out = converted
    found = streamconv.verify(source, out)
    assert not found.problems
    assert (found.tensors, found.bytes_compared) == (2, 128)


def flip_data(path: Path) -> None:
    # The third element of `a`, 2.0, wherever the format has it.
    data = bytearray(path.read_bytes())
    at = data.find(torch.arange(5.0).numpy().tobytes()) + 8
    data[at : at + 4] = torch.tensor([7.5]).numpy().tobytes()
    path.write_bytes(data)


def first_shard(out: Path) -> Path:
    return next(path for path in sorted(out.iterdir()) if "00001-of" in path.name)


def test_a_changed_element_is_named(converted: tuple[Path, Path]) -> None:
    source, out = converted
    flip_data(first_shard(out))
    found = messages(source, out)
    assert "tensor 'a': element 2 is 7.5, expected 2.0" in found
    assert str(first_shard(out)) in found


def change_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    at = data.find(b"\x80\x02") if data[:2] == b"PK" else 9
    data[at + 1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: first_shard(out).unlink(), "the file is missing"),
        (lambda out: first_shard(out).write_bytes(b"x"), "1 bytes, expected"),
        (lambda out: change_header(first_shard(out)), "header bytes"),
        (lambda out: (out / "config.json").write_text("[]"), "not equal to"),
        (lambda out: (out / "config.json").unlink(), "missing"),
        (lambda out: next(out.glob("*.index.json")).write_text("{}"), "not what was planned"),
        (lambda out: (out / "model.safetensors").write_bytes(b"old"), "not part of the conversion"),
    ],
)
def test_damage_is_named(
    converted: tuple[Path, Path], damage: Callable[[Path], object], message: str
) -> None:
    source, out = converted
    damage(out)
    assert message in messages(source, out)


def test_comparisons(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors")
    torch.save(STATE, tmp_path / "b.pt")
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.pt").equal
    other = {
        "a": STATE["a"] + torch.tensor([0, 0, 0, 0.5, 0]),
        "b": STATE["b"].reshape(2, 3),
        "c": torch.ones(1),
    }
    torch.save(other, tmp_path / "c.pt")
    rows = {row.name: row for row in compare(tmp_path / "a.safetensors", tmp_path / "c.pt").rows}
    assert (rows["a"].differing, rows["a"].max_abs) == (4, 0.5)
    assert rows["a"].max_rel == pytest.approx(0.5 / 3.5)
    assert "shapes differ" in rows["b"].note
    assert rows["c"].left is None and "right" in rows["c"].note


def test_zeros_of_two_signs_and_infinities(tmp_path: Path) -> None:
    save_file({"x": torch.tensor([0.0, torch.inf, torch.nan])}, tmp_path / "a.safetensors")
    save_file({"x": torch.tensor([-0.0, torch.inf, torch.nan])}, tmp_path / "b.safetensors")
    (row,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").rows
    assert (row.equal, row.differing) == (False, 0)
    assert "sign of a zero" in row.note
    save_file({"x": torch.tensor([0.0, 1.0, torch.nan])}, tmp_path / "b.safetensors")
    (row,) = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").rows
    assert row.max_abs == float("inf")


# ------------------------------------------------------------------------- what a record may choose

RUNS = """
from pathlib import Path
Path({mark!r}).touch()
from streamconv.plans.recipe import Recipe, rename
RECIPE = Recipe(name="evil", title="evil", source=None, target=None, rules=rename({{"a": "c", "b": "d"}}))
"""


def claim(out: Path, **arguments: object) -> None:
    """Have a record say that other options made the conversion."""
    record = out / ".streamconv" / "conversion.json"
    document = json.loads(record.read_text())
    document["arguments"] |= arguments
    record.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "name", ["evil.py", "evil.toml", "/away/evil.py", "./evil.py", "file:evil.py", "evil"]
)
def test_a_record_has_no_recipe_run(
    converted: tuple[Path, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = converted
    monkeypatch.chdir(out)
    (out / "evil.py").write_text(RUNS.format(mark=str(tmp_path / "ran")))
    (out / "evil.toml").write_text('[rename]\n"a" = "c"\n')
    claim(out, recipe=name.replace("/away", str(out)).replace("file:", f"file:{out}/"))
    with pytest.raises(UsageError, match="give it yourself") as caught:
        streamconv.verify(source, out)
    assert "conversion.json" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_recipe_on_record_is_run_where_it_is_given(
    converted: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The remedy that the message names works as it stands."""
    source = converted[0]
    recipe = tmp_path / "my recipe.py"
    recipe.write_text(RUNS.format(mark=str(tmp_path / "ran")))
    out = tmp_path / "made"
    assert main([str(source), str(out), "--recipe", str(recipe), "--dtype", "c=BF16", "--quiet"]) == 0
    (tmp_path / "ran").unlink()
    assert main(["verify", str(source), str(out)]) == 2
    said = capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    remedy = said[said.index("--dtype") :].strip().removesuffix(")")
    assert main(["verify", str(source), str(out), *shlex.split(remedy)]) == 0
    assert (tmp_path / "ran").exists()


def test_what_a_record_chose_is_said_with_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    save_file(STATE, tmp_path / "source" / "model.safetensors")
    source, out = str(tmp_path / "source"), tmp_path / "out"
    assert main([source, str(out), "--only", "a", "--dtype", "BF16", "--no-side-files", "--quiet"]) == 0
    chose = "--dtype BF16 --only a --no-side-files"
    assert main(["verify", source, str(out)]) == 0
    assert chose in capsys.readouterr().out
    assert main(["verify", source, str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recorded"] == ["--dtype BF16", "--only a", "--no-side-files"]
    flip = bytearray((out / "model.safetensors").read_bytes())
    flip[-1] ^= 1
    (out / "model.safetensors").write_bytes(flip)
    assert main(["verify", source, str(out)]) == 1
    assert chose in capsys.readouterr().err
    # The same by command line: nobody else chose.
    assert main(["verify", source, str(out), "--only", "b"]) == 1
    assert "on record" not in capsys.readouterr().err
