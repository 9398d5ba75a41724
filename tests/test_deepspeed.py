"""DeepSpeed's own checkpoints, made by DeepSpeed on this machine, against the live tensors of the same runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from comparing import same
from safetensors.torch import load_file, safe_open

import streamconv
from streamconv.errors import CheckpointError, PlanError, UsageError
from tests.training_runs.launch import launched
from tests.training_runs.models import COGVIDEOX

pytestmark = pytest.mark.slow

PLAIN = (
    "stage1",
    "stage1-bf16-frozen-tied",
    "stage1-bf16-optimizer",
    "stage1-elastic",
    "stage2-bf16-two-groups",
    "stage2-fp32-untied",
    "stage2-aligned-round-robin",
    "stage3-bf16",
    "stage3-sub-groups",
    "stage3-fp32-untied",
)
WITH_MODULE = tuple(name for name in PLAIN if not name.startswith("stage3"))
WORLDS = (2, 3)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str):
    """OUT of each world size, made at most once however many processes test."""
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    return lambda world: launched(
        shared / f"deepspeed_{world}", "tests.training_runs.deepspeed_worker", world
    )


@pytest.fixture
def copied(runs, tmp_path: Path):
    """A run's checkpoint, to do harm to."""

    def copy(case: str, world: int = 2) -> Path:
        return Path(shutil.copytree(runs(world) / case / "checkpoint", tmp_path / "checkpoint"))

    return copy


def converted(source: Path, out: Path, **options) -> dict[str, torch.Tensor]:
    streamconv.convert(source, out, **options)
    return load_file(out / "model.safetensors")


def wanted_weights(live: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The F32 weights, and the model's own tensors where the optimizer has none."""
    own = {name.removeprefix("model/"): each for name, each in live.items() if name.startswith("model/")}
    return own | {
        name.removeprefix("weights/"): each for name, each in live.items() if name.startswith("weights/")
    }


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", PLAIN)
def test_weights_and_moments_are_the_live_ones(runs, tmp_path: Path, case: str, world: int) -> None:
    run = runs(world) / case
    live = load_file(run / "expected.safetensors")
    found = converted(run / "checkpoint", tmp_path / "out", optimizer=True)
    wanted = wanted_weights(live)
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)
    for moment in ("exp_avg", "exp_avg_sq"):
        states = load_file(tmp_path / "out" / "optimizer" / moment / "model.safetensors")
        assert states
        assert all(same(states[name], live[f"{moment}/{name}"]) for name in states)
        trained = {name.removeprefix(f"{moment}/") for name in live if name.startswith(f"{moment}/")}
        assert trained - set(states) <= {"head.weight"}  # the tied name has no state of its own


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", WITH_MODULE)
def test_the_models_own_weights_are_the_live_ones(runs, tmp_path: Path, case: str, world: int) -> None:
    run = runs(world) / case
    live = load_file(run / "expected.safetensors")
    found = converted(run / "checkpoint", tmp_path / "out", weights="model")
    wanted = {name.removeprefix("model/"): each for name, each in live.items() if name.startswith("model/")}
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "case", ["stage1-bf16-frozen-tied", "stage2-aligned-round-robin", "stage3-sub-groups"]
)
def test_bf16_in_one_pass_is_what_the_model_itself_holds(runs, tmp_path: Path, case: str) -> None:
    run = runs(2) / case
    live = load_file(run / "expected.safetensors")
    found = converted(run / "checkpoint", tmp_path / "out", dtype=["BF16", "ema_scale=F32"])
    assert all(
        same(found[name.removeprefix("model/")], live[name]) for name in live if name.startswith("model/")
    )


@pytest.mark.parametrize("case", ["stage0", "stage0-bf16"])
def test_stage_0_is_the_models_own_weights(runs, tmp_path: Path, case: str) -> None:
    run = runs(2) / case
    live = load_file(run / "expected.safetensors")
    found = converted(run / "checkpoint", tmp_path / "out")
    assert found.keys() == {name.removeprefix("model/") for name in live}
    assert all(same(found[name.removeprefix("model/")], live[name]) for name in live)


def test_the_f32_weights_of_stage_0_are_taken_where_shapes_tell_their_names(runs, tmp_path: Path) -> None:
    run = runs(2) / "stage0-bf16-frozen-none"
    live = load_file(run / "expected.safetensors")
    found = converted(run / "checkpoint", tmp_path / "out", weights="master")
    assert found["embed.weight"].dtype == torch.float32
    assert found.keys() == {name.removeprefix("model/") for name in live}
    assert all(same(found[name].to(live[f"model/{name}"].dtype), live[f"model/{name}"]) for name in found)


def test_the_f32_weights_of_stage_0_are_not_guessed(runs) -> None:
    with pytest.raises(CheckpointError, match=r"do not say which of the 8 parameters.*--weights model"):
        streamconv.open(runs(2) / "stage0-bf16" / "checkpoint", weights="master")


@pytest.mark.parametrize("weights", ["master", "model"])
def test_experts_get_their_global_numbers(runs, tmp_path: Path, weights: str) -> None:
    run = runs(2) / "moe"
    live = load_file(run / "expected_0.safetensors") | load_file(run / "expected_1.safetensors")
    prefix = "weights/" if weights == "master" else "model/"
    wanted = {name.removeprefix(prefix): each for name, each in live.items() if name.startswith(prefix)}
    found = converted(run / "checkpoint", tmp_path / "out", weights=weights)
    assert sum("deepspeed_experts.3." in name for name in wanted) == 8
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("weights", ["master", "model"])
def test_a_pipelines_stages_are_put_together(runs, tmp_path: Path, weights: str) -> None:
    run = runs(2) / "pipeline"
    live = load_file(run / "expected_0.safetensors") | load_file(run / "expected_1.safetensors")
    prefix = "weights/" if weights == "master" else "model/"
    wanted = {name.removeprefix(prefix): each for name, each in live.items() if name.startswith(prefix)}
    found = converted(run / "checkpoint", tmp_path / "out", weights=weights)
    assert found.keys() == wanted.keys()
    assert all(same(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", ["stage2-bf16-two-groups", "stage3-sub-groups"])
def test_a_universal_checkpoint_is_the_same_model(runs, tmp_path: Path, case: str, world: int) -> None:
    run = runs(world) / case
    live = load_file(run / "expected.safetensors")
    wanted = wanted_weights(live)
    found = converted(run / "universal", tmp_path / "out", optimizer=True)
    assert found.keys() == wanted.keys()
    assert all(same(found[name].to(wanted[name].dtype), wanted[name]) for name in wanted)
    assert all(same(found[name], wanted[name]) for name in wanted if f"weights/{name}" in live)
    states = load_file(tmp_path / "out" / "optimizer" / "exp_avg" / "model.safetensors")
    assert len(states) >= 6
    assert all(same(states[name], live[f"exp_avg/{name}"]) for name in states)


# ---------------------------------------------------------------- what trainers save, for their libraries


def test_a_trainers_checkpoint_loads_in_transformers(runs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = runs(2) / "llama"
    streamconv.convert(run / "checkpoint-2", tmp_path / "out", dtype="BF16")
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live = load_file(run / "expected.safetensors")
    state = model.state_dict()
    assert state.keys() == live.keys()
    assert all(same(state[name], live[name]) for name in live)
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert not list((tmp_path / "out").glob("zero_to_*"))


def test_a_few_layers_of_a_trainers_checkpoint_load_in_transformers(runs, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    run = runs(2) / "llama"
    streamconv.convert(run / "checkpoint-2", tmp_path / "out", dtype="F32", layers="1")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    live, state = load_file(run / "expected.safetensors"), model.state_dict()
    mine = {name: name.replace("layers.0.", "layers.1.") for name in state}
    assert all(torch.equal(state[name].bfloat16(), live[other].bfloat16()) for name, other in mine.items())


def test_a_fine_tuned_transformer_becomes_the_pipeline_it_came_from(runs, tmp_path: Path) -> None:
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDDIMScheduler,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    original = CogVideoXPipeline(
        tokenizer=None,
        text_encoder=T5EncoderModel(
            T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=11)
        ),
        vae=AutoencoderKLCogVideoX(
            block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
        ),
        transformer=CogVideoXTransformer3DModel(**COGVIDEOX),
        scheduler=CogVideoXDDIMScheduler(),
    )
    original.save_pretrained(tmp_path / "original")
    run = runs(2) / "cogvideox"
    done = streamconv.convert(
        run / "checkpoint-2", tmp_path / "out", like=tmp_path / "original", dtype="BF16", weights="master"
    )
    assert any("names, shapes and number of files are those of" in note for note in done.plan.notes)
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "out", tokenizer=None, dtype=torch.bfloat16)
    state, live = pipeline.transformer.state_dict(), load_file(run / "expected.safetensors")
    assert state.keys() == live.keys()
    assert all(same(state[name], live[name]) for name in live)
    autoencoder = original.vae.state_dict()
    assert all(
        same(each, autoencoder[name].to(each.dtype)) for name, each in pipeline.vae.state_dict().items()
    )


def test_a_fine_tune_that_is_not_of_the_pipeline_is_refused(runs, tmp_path: Path) -> None:
    from diffusers import CogVideoXTransformer3DModel

    other = CogVideoXTransformer3DModel(**COGVIDEOX | {"num_layers": 3})
    other.save_pretrained(tmp_path / "original" / "transformer")
    (tmp_path / "original" / "model_index.json").write_text(
        '{"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}'
    )
    source = runs(2) / "cogvideox" / "checkpoint-2"
    with pytest.raises(PlanError, match=r"transformer/transformer_blocks\.2\..*: is missing; "):
        streamconv.plan(source, like=tmp_path / "original")
    plan = streamconv.plan(source, like=tmp_path / "original", allow_mismatch=True)
    assert any("transformer/transformer_blocks.2." in note for note in plan.notes)


# ------------------------------------------------------------------------ what is there, and what is not


@pytest.mark.parametrize(
    "inside", ["", "checkpoint", "checkpoint/global_step2"], ids=["trainer's", "with latest", "tag"]
)
def test_any_level_of_the_directory_can_be_given(runs, tmp_path: Path, inside: str) -> None:
    run = runs(2) / "stage2-fp32-untied"
    if not inside:
        root = Path(shutil.copytree(run / "checkpoint", tmp_path / "moved"))
        (root / "latest").unlink()
    else:
        root = run / inside
    assert len(streamconv.open(root)) == 11


def test_the_tag_that_latest_names_is_taken(copied) -> None:
    checkpoint = copied("stage2-fp32-untied")
    shutil.copytree(checkpoint / "global_step2", checkpoint / "global_step1")
    opened = streamconv.open(checkpoint)
    assert any("'global_step2' is taken, not global_step1" in note for note in opened.contents.notes)
    (checkpoint / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"global_step7.*not there.*global_step1, global_step2"):
        streamconv.open(checkpoint)
    (checkpoint / "latest").unlink()
    with pytest.raises(CheckpointError, match="several saves"):
        streamconv.open(checkpoint)


def test_the_directory_above_names_the_checkpoints(runs, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").symlink_to(runs(2) / "llama" / "checkpoint-2")
    with pytest.raises(CheckpointError, match=r"one level down, give one of them: checkpoint-2"):
        streamconv.open(tmp_path)


def test_weights_beside_the_save_are_pointed_at(copied) -> None:
    checkpoint = copied("stage2-fp32-untied")
    (checkpoint / "model.safetensors").write_bytes(b"")
    opened = streamconv.open(checkpoint)
    assert any(
        note.startswith("model.safetensors beside the save: not read") for note in opened.contents.notes
    )


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("stage3-bf16", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("stage3-bf16", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"),
        ("moe", "layer_0_expert_1_mp_rank_00_model_states.pt"),
        ("pipeline", "layer_01-model_states.pt"),
    ],
)
def test_one_file_of_many_is_not_taken_for_the_model(runs, case: str, name: str) -> None:
    (path,) = (runs(2) / case / "checkpoint").glob(f"*/{name}")
    with pytest.raises(UsageError, match=r"of a DeepSpeed checkpoint.*give the directory"):
        streamconv.open(path)


@pytest.mark.parametrize("text", ["../outside", "/etc", ""])
def test_latest_leads_nowhere_else(copied, text: str) -> None:
    checkpoint = copied("stage2-fp32-untied")
    (checkpoint / "latest").write_text(text)
    assert streamconv.open(checkpoint).contents.path.place == str(checkpoint)


@pytest.mark.parametrize("case", ["stage2-bf16-two-groups", "stage3-bf16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_missing_partitions_are_named(copied, tmp_path: Path, case: str, rank: int) -> None:
    checkpoint = copied(case, 3)
    (missing,) = checkpoint.glob(f"*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    missing.unlink()
    with pytest.raises(CheckpointError, match=missing.name):
        streamconv.convert(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_models_own_weights_need_no_partitions(copied) -> None:
    checkpoint = copied("stage2-bf16-two-groups")
    for path in checkpoint.glob("*/*optim_states.pt"):
        path.unlink()
    opened = streamconv.open(checkpoint)
    assert len(opened) == 11
    assert any("model's own" in note for note in opened.contents.notes)
    with pytest.raises(CheckpointError, match="no F32 weights"):
        streamconv.open(checkpoint, weights="master")
    with pytest.raises(
        UsageError, match=r"--weights has no effect on this source \(DeepSpeed\).*optimizer's weights"
    ):
        streamconv.open(checkpoint, weights="model")


def test_stage_3_has_no_weights_of_the_models_own(runs) -> None:
    with pytest.raises(CheckpointError, match=r"empty, as stage 3 saves them.*--weights master"):
        streamconv.open(runs(2) / "stage3-bf16" / "checkpoint", weights="model")


def test_frozen_parameters_of_stage_3_need_all_ranks(copied) -> None:
    checkpoint = copied("stage3-bf16", 3)
    next(checkpoint.glob("*/zero_pp_rank_1_mp_rank_00_model_states.pt")).unlink()
    with pytest.raises(CheckpointError, match="of 3 ranks, 2 have their model states"):
        streamconv.open(checkpoint)


def test_files_of_two_saves_are_told_apart(copied, runs) -> None:
    checkpoint = copied("stage2-bf16-two-groups")
    other = next((runs(3) / "stage2-bf16-two-groups" / "checkpoint").glob("*/*rank_1_mp*optim*"))
    shutil.copy(other, next(checkpoint.glob("*/*rank_1_mp*optim*")))
    with pytest.raises(CheckpointError) as caught:
        streamconv.open(checkpoint)
    assert "split among (3, 3)" in str(caught.value)


def test_two_files_for_one_rank_are_refused(copied) -> None:
    checkpoint = copied("stage2-bf16-two-groups")
    own = next(checkpoint.glob("*/bf16_zero_pp_rank_1_mp*optim*"))
    shutil.copy(own, own.with_name(own.name.removeprefix("bf16_")))
    with pytest.raises(CheckpointError, match="two saves"):
        streamconv.open(checkpoint)


@pytest.mark.parametrize("case", ["stage2-bf16-two-groups", "stage3-bf16"])
def test_shapes_that_do_not_fill_the_partitions_are_refused(copied, case: str) -> None:
    checkpoint = copied(case)
    for path in checkpoint.glob("*/*model_states.pt"):
        document = torch.load(path, weights_only=False)
        first = document["param_shapes"][0]
        name = next(iter(first))
        first[name] = torch.Size([first[name][0] + 5, *first[name][1:]])
        torch.save(document, path)
    with pytest.raises(CheckpointError, match=r"elements|by the shapes they are"):
        streamconv.open(checkpoint)


def test_a_partition_that_is_cut_off_is_refused(copied) -> None:
    checkpoint = copied("stage3-bf16")
    path = next(checkpoint.glob("*/*rank_1_mp*optim*"))
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="zip archive is damaged"):
        streamconv.open(checkpoint)


# ------------------------------------------------- where DeepSpeed's own zero_to_fp32 fails; ours does not


def zero_to_fp32(checkpoint: Path, out: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    convert_zero_checkpoint_to_fp32_state_dict(str(checkpoint), str(out), safe_serialization=True)


def test_frozen_parameters_of_stage_1_are_not_lost(runs, tmp_path: Path) -> None:
    run = runs(2) / "stage1"
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(run / "checkpoint"))
    assert "adapter.weight" not in theirs
    found = converted(run / "checkpoint", tmp_path / "out")
    assert same(found["adapter.weight"], load_file(run / "expected.safetensors")["model/adapter.weight"])


def test_tied_weights_go_to_safetensors(runs, tmp_path: Path) -> None:
    checkpoint = runs(2) / "stage1-bf16-frozen-tied" / "checkpoint"
    with pytest.raises(RuntimeError, match="share memory"):
        zero_to_fp32(checkpoint, tmp_path / "theirs")
    streamconv.convert(checkpoint, tmp_path / "out", tied="drop")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert {"embed.weight", "head.weight"} & set(file.keys()) in ({"embed.weight"}, {"head.weight"})


@pytest.mark.parametrize("case", ["stage1-bf16-optimizer", "moe", "pipeline", "stage0"])
def test_what_zero_to_fp32_cannot_read_is_read(runs, tmp_path: Path, case: str) -> None:
    checkpoint = runs(2) / case / "checkpoint"
    with pytest.raises((ValueError, AttributeError, TypeError)):
        zero_to_fp32(checkpoint, tmp_path / "theirs")
    assert converted(checkpoint, tmp_path / "out")


@pytest.mark.parametrize("case", ["stage2-fp32-untied", "stage3-fp32-untied"])
def test_where_zero_to_fp32_is_right_both_agree(runs, tmp_path: Path, case: str) -> None:
    checkpoint = runs(3) / case / "checkpoint"
    zero_to_fp32(checkpoint, tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    ours = converted(checkpoint, tmp_path / "out")
    assert ours.keys() == theirs.keys()
    assert all(same(ours[name], theirs[name]) for name in theirs)
