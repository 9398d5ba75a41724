"""Plans: what edits mean, what is wrong all at once, and that a plan is data."""

from __future__ import annotations

import json
import os
from pathlib import Path

import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from watched import Call, Calls, watching

import streamconv
from streamconv.errors import PlanError, UsageError
from streamconv.plans import fingerprint, from_json, parse_edits, read_edits, to_json
from streamconv.plans.patterns import Pattern
from streamconv.storage.location import locate

STATE = {
    "layers.0.w": torch.randn(4, 6),
    "layers.1.w": torch.randn(4, 6),
    "layers.0.norm": torch.randn(6),
    "layers.1.norm": torch.randn(6),
    "ids": torch.arange(5),
    "mask": torch.ones(3, dtype=torch.bool),
    "phase": torch.ones(2, dtype=torch.complex64),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_file(STATE, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path / "model.safetensors"


def dtypes_of(source: Path, *dtype: str) -> dict[str, str]:
    plan = streamconv.plan(source, dtype=list(dtype))
    return {tensor.spec.name: tensor.spec.dtype.name for tensor in plan.tensors}


# ------------------------------------------------------------------------------------ patterns


@given(
    parts=st.lists(
        st.one_of(st.sampled_from(["{i}", "{j}", "*"]), st.text("ab.-_é(+", max_size=3)),
        min_size=1,
        max_size=6,
    ).filter(any),
    values=st.dictionaries(st.sampled_from("ij"), st.integers(0, 999).map(str), min_size=2),
    texts=st.lists(st.text("xy.", max_size=3), min_size=6, max_size=6),
)
def test_a_pattern_matches_what_it_fills(parts: list[str], values: dict[str, str], texts: list[str]) -> None:
    pattern = Pattern("".join(parts))
    name = pattern.fill({**values, **{f"*{i}": text for i, text in enumerate(texts)}})
    found = pattern.match(name)
    assert found is not None
    assert pattern.fill(found) == name


def test_fields_are_indices_and_the_same_field_is_the_same_index() -> None:
    pattern = Pattern("a.{i}.b.{i}")
    assert pattern.match("a.12.b.12") == {"i": "12"}
    assert pattern.match("a.1.b.12") is None
    assert pattern.match("a.x.b.x") is None
    assert Pattern("a.{i}").match("b.a.1") is None


def test_an_index_can_be_worked_out_from_a_field() -> None:
    assert Pattern("up.{3-i}.b.{i+1}").match("up.1.b.3") == {"i": "2"}
    assert Pattern("up.{3-i}.b.{i+1}").fill({"i": "2"}) == "up.1.b.3"
    assert Pattern("up.{3-i}").match("up.4") is None
    assert Pattern("x.{2*i+1}").match("x.4") is None


@pytest.mark.parametrize("text", ["", "{", "a.{}", "a.{i", "{i*i}", "{i+j}", "{0}", "}{"])
def test_what_is_no_pattern(text: str) -> None:
    with pytest.raises(UsageError, match="not a name pattern"):
        Pattern(text)


# --------------------------------------------------------------------------------------- edits


def test_a_dtype_is_for_floats_and_the_last_override_wins(source: Path) -> None:
    found = dtypes_of(source, "BF16", "*norm=F32", "layers.1.*=F16")
    assert found == {
        "layers.0.w": "BF16", "layers.1.w": "F16", "layers.0.norm": "F32", "layers.1.norm": "F16",
        "ids": "I64", "mask": "BOOL", "phase": "C64",
    }  # fmt: skip


def test_renames_only_and_drop(source: Path) -> None:
    plan = streamconv.plan(
        source,
        rename=["layers.{i}.w=h.{i}.weight", "layers.*=rest.*"],
        drop=["ids"],
        only=["layers.*", "ids"],
    )
    assert {tensor.spec.name for tensor in plan.tensors} == {
        "h.0.weight", "h.1.weight", "rest.0.norm", "rest.1.norm",
    }  # fmt: skip
    reasons = {dropped.name: dropped.reason for dropped in plan.dropped}
    assert reasons["ids"] == "matches --drop 'ids'"
    assert reasons["mask"] == "matches no --only"


def test_all_problems_are_told_at_once(source: Path) -> None:
    with pytest.raises(PlanError) as caught:
        streamconv.plan(
            source,
            rename=["layers.0.w=same", "layers.1.w=same", "layer.{i}.nrm=x.{i}"],
            drop=["absent.*"],
            dtype=["phase=F32", "nothing=F16"],
        )
    message = str(caught.value)
    assert "tensor 'same': comes from both 'layers.0.w' and 'layers.1.w'" in message
    assert (
        "--rename 'layer.{i}.nrm' matches no tensor (the nearest name is 'layers.0.norm'"
        in message.replace("layers.1.norm", "layers.0.norm")
    )
    assert "--drop 'absent.*' matches no tensor" in message
    assert "--dtype 'nothing' matches no tensor" in message
    assert "tensor 'phase'" in message


def test_nothing_left_is_a_problem(source: Path) -> None:
    with pytest.raises(PlanError, match="no tensor is left"):
        streamconv.plan(source, drop=["*"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rename": ["a"]}, "has no target"),
        ({"rename": ["a.{i}=b"]}, "i is on one side only"),
        ({"dtype": ["BF16", "F16"]}, "names BF16, F16"),
        ({"dtype": ["F99"]}, "unknown dtype 'F99'"),
        ({"dtype": ["*=x"]}, "unknown dtype 'x'"),
        ({"tied": "maybe"}, "keep or drop"),
    ],
)
def test_what_cannot_be_read(arguments: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_edits(**arguments)


def test_a_recipe_file_says_the_same_and_options_come_on_top(source: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        'drop = ["mask"]\ndtype = "F16"\ntied = "drop"\n'
        '[rename]\n"layers.{i}.w" = "h.{i}.w"\n[dtypes]\n"*norm" = "F32"\n'
    )
    assert read_edits(locate(tmp_path / "recipe.toml")) == parse_edits(
        ["layers.{i}.w=h.{i}.w"], ["mask"], [], ["F16", "*norm=F32"], "drop"
    )
    plan = streamconv.plan(source, recipe=tmp_path / "recipe.toml", dtype="BF16", drop=["ids"])
    found = {tensor.spec.name: tensor.spec.dtype.name for tensor in plan.tensors}
    assert found["h.0.w"] == "BF16" and found["layers.0.norm"] == "F32"
    assert not {"ids", "mask"} & set(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "unknown key 'x'"),
        ("drop = 'a'", "'drop' must be a list"),
        ("drop = [1]", "must be a list of text"),
        ("rename = ['a']", "'rename' must be a table"),
        ("dtype = 'F99'", "unknown dtype"),
        ("tied = 'no'", "keep or drop"),
        ("= 1", "cannot read the recipe"),
        ("[rename]\n'a.{i}' = 'b'", "on one side only"),
    ],
)
def test_recipe_files_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_edits(locate(tmp_path / "recipe.toml"))
    assert str(tmp_path / "recipe.toml") in str(caught.value)


def test_patterns_reach_into_components(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for component in ("unet", "vae"):
        (tmp_path / component).mkdir()
        save_file({"a.w": torch.ones(2), "b.w": torch.ones(2)}, tmp_path / component / "model.safetensors")
    plan = streamconv.plan(
        tmp_path, drop=["vae/a.w"], rename=["unet/a.w=unet/x", "b.w=y"], dtype="unet/*=F16"
    )
    found = {
        f"{plan.outputs[tensor.file].path}:{tensor.spec.name}": tensor.spec.dtype.name
        for tensor in plan.tensors
    }
    assert found == {
        "unet/model.safetensors:x": "F16", "unet/model.safetensors:y": "F16", "vae/model.safetensors:y": "F32",
    }  # fmt: skip


# ---------------------------------------------------------------------------------- plans as data


def test_a_plan_reads_back_equal(source: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.randn(4, 5).T, "b": torch.randn(3), "c": torch.arange(3)}, tmp_path / "m.pt")
    for path in (source, tmp_path / "m.pt"):
        for to in ("safetensors", "torch"):
            plan = streamconv.plan(path, to=to, dtype="BF16", max_shard=60)
            text = orjson.dumps(to_json(plan))
            again = from_json(orjson.loads(text))
            assert again == plan
            assert fingerprint(again) == fingerprint(plan)


def test_the_fingerprint_is_that_of_the_output(source: Path, tmp_path: Path) -> None:
    first = fingerprint(streamconv.plan(source))
    assert fingerprint(streamconv.plan(source)) == first
    (tmp_path / "elsewhere").mkdir()
    moved = source.rename(tmp_path / "elsewhere" / "model.safetensors")
    assert fingerprint(streamconv.plan(moved)) == first
    others = [
        fingerprint(streamconv.plan(moved, **arguments))
        for arguments in (
            {"dtype": "F16"}, {"max_shard": "100"}, {"to": "torch"}, {"drop": ["ids"]}, {"rename": ["ids=idx"]},
        )
    ]  # fmt: skip
    assert len({first, *others}) == 6


def test_a_plan_of_another_version_is_refused(source: Path) -> None:
    document = to_json(streamconv.plan(source))
    with pytest.raises(UsageError, match="version 99"):
        from_json({**document, "version": 99})


@pytest.mark.parametrize("name", ["files", "tensors", "outputs", "checks"])
def test_a_damaged_plan_is_refused(source: Path, name: str) -> None:
    document = to_json(streamconv.plan(source))
    for damaged in ({name: [[{}]]}, {name: None}, {name: [{"path": 1, "from": {}}]}):
        with pytest.raises(UsageError, match="the plan is damaged"):
            from_json({**document, **damaged})
    with pytest.raises(UsageError, match=f"damaged: '{name}'"):
        from_json({key: value for key, value in document.items() if key != name})


def test_nothing_is_read_but_headers_and_nothing_is_written(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file({**STATE, "large": torch.ones(1 << 12)}, source, {"format": "pt"})
    before = sorted(tmp_path.rglob("*"))
    whole = source.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    with source.open("r+b") as file:
        file.truncate(header)
        file.truncate(len(whole))
    calls = Calls()
    with watching(calls):
        streamconv.plan(source, tmp_path / "out", dtype="BF16")
    reads = [
        call for call in calls.of("read", "read_into", "read_runs", "mapped") if call.place == str(source)
    ]
    # A format is found by the first bytes of a file.
    assert header < 1024 and reads
    assert all(call.method == "read" and sum(call.arguments) <= 1024 for call in reads)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "adapter_model.safetensors"])
def test_a_file_that_is_written_to_while_it_is_read_is_refused(tmp_path: Path, name: str) -> None:
    """Else the plan were made of one file, and hold for another."""
    (tmp_path / "source").mkdir()
    save_file(
        {**STATE, "a.weight": torch.ones(2, 2)}, tmp_path / "source" / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "source" / "config.json").write_text("{}")
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.a.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2}'
    )
    lora = [str(tmp_path / "adapter")]
    written = []

    def writing(call: Call) -> None:
        if call.method in ("read", "mapped") and call.place.endswith(f"/{name}") and not written:
            written.append(call)
            os.utime(call.place, ns=(1, 1))

    with watching(writing), pytest.raises(PlanError, match="written to while its header was read"):
        streamconv.plan(tmp_path / "source", tmp_path / "out", lora=lora)
    assert written
    assert streamconv.plan(tmp_path / "source", tmp_path / "out", lora=lora).outputs


def test_a_target_format_that_cannot_hold_a_tensor_says_so_for_all(tmp_path: Path) -> None:
    torch.save({name: torch.ones(2, dtype=torch.complex128) for name in ("a", "b")}, tmp_path / "m.pt")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "m.pt")
    assert "tensor 'a'" in str(caught.value) and "tensor 'b'" in str(caught.value)
    assert streamconv.plan(tmp_path / "m.pt", to="torch").outputs


def test_formats_that_are_not_there(source: Path) -> None:
    with pytest.raises(UsageError, match="safetensors, torch"):
        streamconv.plan(source, to="gguf")


def test_what_is_found_in_a_component_of_like_is_reported(tmp_path: Path) -> None:
    original = tmp_path / "original"
    for name in ("transformer", "vae"):
        (original / name).mkdir(parents=True)
    (original / "model_index.json").write_text(json.dumps({"_class_name": "Pipe", "vae": ["diffusers", "V"]}))
    save_file({"a": torch.ones(3)}, original / "transformer" / "diffusion_pytorch_model.safetensors")
    tied = torch.ones(4)
    torch.save({"module.x": tied, "module.y": tied}, original / "vae" / "diffusion_pytorch_model.bin")
    save_file({"a": torch.zeros(3)}, tmp_path / "tuned.safetensors")
    plan = streamconv.plan(tmp_path / "tuned.safetensors", like=original)
    assert [tensor.spec.name for tensor in plan.tensors] == ["a", "x", "y"]
    notes = "\n".join(plan.notes)
    assert "'module.' of a wrapped model is taken off" in notes
    assert "'vae/y' and 'x' share their bytes" in notes
