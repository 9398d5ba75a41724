"""What comes out is loaded by the library that owns it: its config says what is written, under names that it opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import one_file_models
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.cli import main
from streamconv.errors import PlanError, StreamconvError
from streamconv.families.layers import LAYERS
from streamconv.plans.misfit import _of_another, contradictions


def tiny(**changes: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **changes)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32).eval()


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def loaded(directory: Path, kind: Any = transformers.AutoModelForCausalLM) -> Any:
    """A model whose file has every one of its tensors, and no other."""
    model, report = kind.from_pretrained(directory, output_loading_info=True, local_files_only=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


def assert_holds(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for name, tensor in state.items():
        assert own[name].dtype == tensor.dtype, name
        assert torch.equal(own[name], tensor), name


def noted(source: Path, text: str, **options: Any) -> bool:
    return any(text in note for note in streamconv.plan(source, **options).notes)


# ------------------------------------------------------------------------------------------ dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_master_weights_in_f32_are_not_loaded_in_16_bits(key: str, tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    model.config.save_pretrained(tmp_path / "run")
    config = config_of(tmp_path / "run")
    config.pop("dtype", None)
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, key: "bfloat16"}))
    torch.save({"model": model.state_dict(), "step": 3}, tmp_path / "run" / "pytorch_model.bin")
    streamconv.convert(tmp_path / "run", tmp_path / "out")
    assert config_of(tmp_path / "out")[key] == "float32"
    assert_holds(loaded(tmp_path / "out"), model.state_dict())


def test_the_dtype_is_that_of_most_elements_and_said_for_each_part(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**sizes, vocab_size=40),
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4),
        image_token_index=39,
    )
    model = transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    edited(tmp_path / "source" / "config.json", dtype="bfloat16")
    streamconv.convert(tmp_path / "source", tmp_path / "out", dtype="F16")
    said = config_of(tmp_path / "out")
    parts = [said, said["text_config"], said["vision_config"]]
    assert {part["dtype"] for part in parts if "dtype" in part} == {"float16"}
    again = loaded(tmp_path / "out", transformers.AutoModelForImageTextToText)
    assert_holds(again, {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()})


def test_a_config_that_is_true_is_copied_as_it_is(tmp_path: Path) -> None:
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    config = tmp_path / "source" / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"torch.bfloat16"') + "   \n")
    plan = streamconv.plan(tmp_path / "source", dtype=["*norm*=F32"])
    assert "config.json" in {file.path for file in plan.side_files}
    assert not any("dtype becomes" in note for note in plan.notes)


def test_the_config_of_like_says_what_is_written_too(tmp_path: Path) -> None:
    model = tiny(dtype=torch.float32)
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path / "like")
    save_file(model.state_dict(), tmp_path / "tuned.safetensors", {"format": "pt"})
    streamconv.convert(tmp_path / "tuned.safetensors", tmp_path / "out", like=tmp_path / "like")
    assert_holds(loaded(tmp_path / "out"), model.state_dict())


# ------------------------------------------------------------------------------------------ ties


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "source")
    edited(tmp_path / "source" / "config.json", tie_word_embeddings=True)
    streamconv.convert(tmp_path / "source", tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert_holds(loaded(tmp_path / "out"), model.state_dict())
    assert noted(tmp_path / "source", "tie_word_embeddings becomes false")


def test_the_head_of_another_part_is_not_that_of_the_model(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    assert "lm_head.weight" not in state
    save_file(
        state | {"audio.output_layer.weight": torch.rand(9, 4)}, tmp_path / "source" / "model.safetensors"
    )
    assert not noted(tmp_path / "source", "tie_word_embeddings becomes")


def test_a_head_that_is_left_out_is_tied(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path / "source")
    edited(tmp_path / "source" / "config.json", tie_word_embeddings=False)
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    streamconv.convert(tmp_path / "source", tmp_path / "out", tied="drop")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert_holds(loaded(tmp_path / "out"), model.state_dict())
    streamconv.convert(tmp_path / "source", tmp_path / "kept")
    assert config_of(tmp_path / "kept")["tie_word_embeddings"] is False
    assert_holds(loaded(tmp_path / "kept"), model.state_dict())


def test_a_config_that_says_nothing_of_ties_says_that_a_head_is_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    gpt2 = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    model = transformers.GPT2LMHeadModel(gpt2)
    model.save_pretrained(tmp_path / "source")
    config = config_of(tmp_path / "source")
    config.pop("tie_word_embeddings", None)
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    state = {**model.state_dict(), "lm_head.weight": torch.rand(40, 16)}
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    streamconv.convert(tmp_path / "source", tmp_path / "out")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert_holds(loaded(tmp_path / "out"), state)


def test_a_head_that_is_not_there_is_said(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    said = "there is no head among the tensors"
    assert not noted(tmp_path / "source", said)
    edited(tmp_path / "source" / "config.json", tie_word_embeddings=False)
    assert noted(tmp_path / "source", said)


def test_the_ties_of_an_encoder_with_a_decoder_stay(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)).eval()
    model.save_pretrained(tmp_path / "source")
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        tmp_path / "source" / "model.safetensors",
        {"format": "pt"},
    )
    streamconv.convert(tmp_path / "source", tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "source")


# ------------------------------------------------------------------------------------------ what is missing


def test_weights_without_a_config_say_so(tmp_path: Path) -> None:
    model = tiny()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "x.ckpt")
    assert noted(tmp_path / "x.ckpt", "there is no config.json")
    model.save_pretrained(tmp_path / "model")
    for options in ({"like": tmp_path / "model"}, {"config": tmp_path / "model" / "config.json"}):
        assert not noted(tmp_path / "x.ckpt", "there is no config.json", **options)
        out = tmp_path / next(iter(options))
        streamconv.convert(tmp_path / "x.ckpt", out, **options)  # type: ignore[arg-type]  # paths, under either name
        assert_holds(loaded(out), model.state_dict())
    assert not noted(tmp_path / "model", "there is no config.json")
    assert not noted(tmp_path / "x.ckpt", "there is no config.json", to="mindspore", rename=["*=*"])


def test_names_of_training_are_said(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], r=2))
    frozen = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    torch.save(frozen, tmp_path / "x.bin")
    for options in ({}, {"destination": tmp_path / "out.safetensors"}, {"side_files": False}):
        assert noted(tmp_path / "x.bin", "no library reads what training puts into names", **options)


def test_what_is_not_written_beside_one_file_is_said(tmp_path: Path) -> None:
    model, one = tiny(), {"destination": tmp_path / "out.safetensors"}
    model.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "x.pt")
    assert noted(tmp_path / "x.pt", "there is no config.json", **one)
    for options in ({"like": tmp_path / "model"}, {"config": tmp_path / "model" / "config.json"}):
        for around in (one, {"side_files": False}):
            assert noted(
                tmp_path / "x.pt", "config, tokenizer and the like are not written", **options, **around
            )


@pytest.mark.parametrize("word", ["_orig_mod", "_checkpoint_wrapped_module", "_forward_module"])
def test_wrappers_that_cannot_be_taken_off_are_said(tmp_path: Path, word: str) -> None:
    save_file({name: torch.ones(2) for name in ("a.b", f"a.{word}.b")}, tmp_path / "x.safetensors")
    assert noted(tmp_path / "x.safetensors", "no library reads")


def test_wrappers_of_layers_are_taken_off(tmp_path: Path) -> None:
    """FSDP of torch_xla."""
    model = tiny()
    model.config.save_pretrained(tmp_path / "run")
    state = {
        name.replace(".self_attn.", "._orig_module.self_attn."): tensor
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")
    streamconv.convert(tmp_path / "run", tmp_path / "out")
    assert_holds(loaded(tmp_path / "out"), model.state_dict())


# ------------------------------------------------------------------------------------------ pipelines


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion, of a few thousand parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    path = tmp_path_factory.mktemp("pipeline") / "sd"
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes, vocab_size=40))
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(
            text_config=sizes | {"vocab_size": 40}, vision_config=sizes | {"image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet, scheduler=DDIMScheduler(), safety_checker=checker,
        feature_extractor=transformers.CLIPImageProcessor(size=8, crop_size=8),
    ).save_pretrained(path)  # fmt: skip
    return path


def test_a_pipeline_without_an_optional_component_loads(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    streamconv.convert(pipeline, tmp_path / "out", drop=["safety_checker/*"])
    assert not (tmp_path / "out" / "safety_checker").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True, tokenizer=None)
    assert again.safety_checker is None
    for name in ("unet", "vae", "text_encoder"):
        ours = getattr(again, name).state_dict()
        (weights,) = (pipeline / name).glob("*.safetensors")
        assert all(torch.equal(ours[key], tensor) for key, tensor in load_file(weights).items())


def test_one_component_of_a_pipeline_loads_and_says_what_is_not_there(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    streamconv.convert(pipeline, tmp_path / "out", only=["unet/*"])
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert [index[name] for name in ("vae", "text_encoder", "safety_checker")] == [[None, None]] * 3
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "out", subfolder="unet", local_files_only=True)
    whole = DiffusionPipeline.from_pretrained(pipeline, local_files_only=True, tokenizer=None)
    assert_holds(unet, whole.unet.state_dict())
    given = {"vae": whole.vae, "text_encoder": whole.text_encoder, "tokenizer": None}
    again = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True, **given)
    assert_holds(again.unet, whole.unet.state_dict())
    assert noted(pipeline, "says that there is no safety_checker, text_encoder, vae", only=["unet/*"])


def test_a_component_keeps_the_name_that_its_library_opens(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    state = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    state = {name: tensor + 1 for name, tensor in state.items()}
    save_file(state, tmp_path / "tuned.safetensors", {"format": "pt"})
    torch.save(state, tmp_path / "tuned.pt")
    for source in ("tuned.safetensors", "tuned.pt"):
        for number, options in enumerate(
            [{"like": pipeline / "unet"}, {"config": pipeline / "unet" / "config.json"}]
        ):
            out = tmp_path / f"{source.replace('.', '-')}-{number}"
            streamconv.convert(tmp_path / source, out, **options)  # type: ignore[arg-type]  # paths
            assert_holds(UNet2DConditionModel.from_pretrained(out, local_files_only=True), state)
    # And what has the name of another library beside it, too.
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (tmp_path / "model" / "config.json").write_bytes((pipeline / "unet" / "config.json").read_bytes())
    streamconv.convert(tmp_path / "model", tmp_path / "renamed", max_shard="20KB")
    assert_holds(UNet2DConditionModel.from_pretrained(tmp_path / "renamed", local_files_only=True), state)


def test_a_component_takes_its_place_in_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    (tmp_path / "unet").mkdir()
    state = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    state = {name: tensor + 1 for name, tensor in state.items()}
    save_file(state, tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", {"format": "pt"})
    (tmp_path / "unet" / "config.json").write_bytes((pipeline / "unet" / "config.json").read_bytes())
    streamconv.convert(tmp_path / "unet", tmp_path / "out", like=pipeline)
    assert not (tmp_path / "out" / "config.json").exists()
    again = DiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True, tokenizer=None)
    assert_holds(again.unet, state)


def wan(directory: Path, ffn_dim: int = 24) -> Path:
    """A transformer of Wan; 2.2 has two, one for the first steps and one for the others."""
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4}
    model = WanTransformer3DModel(**sizes, text_dim=8, freq_dim=8, ffn_dim=ffn_dim, num_layers=1)
    model.save_pretrained(directory)
    return directory


def test_a_component_that_may_be_one_of_two_is_refused(tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    pipeline, tuned = tmp_path / "pipe", wan(tmp_path / "tuned") / "diffusion_pytorch_model.safetensors"
    wan(pipeline / "transformer"), wan(pipeline / "transformer_2")
    kind = ["diffusers", "WanTransformer3DModel"]
    index = {"_class_name": "WanPipeline", "transformer": kind, "transformer_2": kind}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    for source in (tuned, tuned.parent):
        with pytest.raises(StreamconvError, match="may be any of transformer, transformer_2 of") as caught:
            streamconv.plan(source, like=pipeline)
        assert f"--like {pipeline / 'transformer_2'}" in str(caught.value)
    streamconv.convert(tuned, pipeline / "transformer_2", like=pipeline / "transformer_2", overwrite=True)
    assert_holds(WanTransformer3DModel.from_pretrained(pipeline / "transformer_2"), load_file(tuned))
    # Shapes tell them apart, whichever is the first.
    for number, other in enumerate(("transformer", "transformer_2")):
        place = ("transformer_2", "transformer")[number]
        wan(pipeline / other, ffn_dim=20), wan(pipeline / place)
        streamconv.convert(tuned, tmp_path / f"out{number}", like=pipeline)
        made = WanTransformer3DModel.from_pretrained(tmp_path / f"out{number}" / place)
        assert_holds(made, load_file(tuned))


def test_an_index_that_names_what_the_source_lacks_says_so(pipeline: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pipeline, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "vae")
    assert noted(tmp_path / "part", "model_index.json names vae, which SRC does not have")
    assert not noted(tmp_path / "part", "model_index.json names", like=pipeline)


# ------------------------------------------------------------------------------------------ --like and --config


def refused(source: Path, *texts: str, **options: Any) -> None:
    """The plan is refused with these words, and with --allow-mismatch they are noted."""
    with pytest.raises(PlanError) as caught:
        streamconv.plan(source, **options)
    message = str(caught.value)
    assert all(text in message for text in texts), message
    assert "--allow-mismatch" in message
    notes = "\n".join(streamconv.plan(source, **options, allow_mismatch=True).notes)
    assert all(text in notes for text in texts), notes


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """What a training program saves: weights alone."""
    save_file(tiny().state_dict(), tmp_path / "tuned.safetensors", {"format": "pt"})
    return tmp_path / "tuned.safetensors"


SMALL = transformers.LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": 32}, "it is [40, 16]; in"),
        ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight': is missing"),
        ({"num_hidden_layers": 1}, "does not have it, and no one will read it"),
        ({"attention_bias": True}, "'model.layers.0.self_attn.k_proj.bias': is missing"),
    ],
)
def test_a_model_of_another_shape_is_not_like_it(
    changes: dict[str, Any], text: str, tuned: Path, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(**{**SMALL.to_dict(), **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "like")
    refused(tuned, text, like=tmp_path / "like")


def test_another_model_is_not_like_it(tuned: Path, pipeline: Path, tmp_path: Path) -> None:
    gpt2 = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=8)
    transformers.GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    refused(tuned, "none of its tensors is in", like=tmp_path / "gpt2")
    refused(tuned, "the model is none of those in", like=pipeline)


def test_leftovers_of_training_are_not_like_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny().save_pretrained(tmp_path / "base")
    model = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"], r=2)).base_model.model
    frozen = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    save_file(frozen, tmp_path / "tuned.safetensors", {"format": "pt"})
    refused(tmp_path / "tuned.safetensors", "base_layer", "and no one will read it", like=tmp_path / "base")


def test_ties_and_buffers_may_differ_from_it(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    state = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save(state, tmp_path / "tuned.bin")
    plan = streamconv.plan(tmp_path / "tuned.bin", like=tmp_path / "base")
    assert any("in the output and not in" in note and ": 2 tensors" in note for note in plan.notes)
    model.config.save_pretrained(tmp_path / "whole")
    torch.save(state, tmp_path / "whole" / "pytorch_model.bin")
    streamconv.plan(tmp_path / "base", like=tmp_path / "whole")


KINDS = {
    "gpt2": transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2),
    "qwen2": transformers.Qwen2Config(**{
        key: value for key, value in SMALL.to_dict().items() if key not in ("model_type", "architectures")
    }),
    "wider": transformers.LlamaConfig(**{**SMALL.to_dict(), "hidden_size": 32}),
    "higher": transformers.LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 3}),
    # No table knows these.
    "bert": transformers.BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2),
    "olmo": transformers.OlmoConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2),
    "stablelm": transformers.StableLmConfig(vocab_size=40, hidden_size=16, num_hidden_layers=4),
}  # fmt: skip


@pytest.mark.parametrize("option", ["config", "like"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_config_of_another_model_is_refused(kind: str, option: str, tuned: Path, tmp_path: Path) -> None:
    KINDS[kind].save_pretrained(tmp_path / "other")
    refused(tuned, **{option: tmp_path / "other"})
    SMALL.save_pretrained(tmp_path / "own")
    streamconv.plan(tuned, **{option: tmp_path / "own"})  # type: ignore[arg-type]  # either takes a path


@pytest.mark.parametrize("option", ["config", "like"])
def test_only_what_is_left_out_may_be_missing(option: str, tuned: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 3})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "like")
    SMALL.save_pretrained(tmp_path / "like") if option == "config" else None
    like = {option: tmp_path / "like"}
    if option == "config":
        streamconv.plan(tuned, drop=["*.k_proj.*"], **like)
        streamconv.plan(tuned, only=["model.layers.*"], rename=["*=module.*"], **like)
        config.save_pretrained(tmp_path / "like")
    refused(tuned, "model.layers.2.", drop=["*.k_proj.*"], **like)
    refused(tuned, "model.layers.2.", only=["model.layers.*"], **like)
    sizes = {"num_hidden_layers": 1, "intermediate_size": 32}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL.to_dict(), **sizes}))
    other.save_pretrained(tmp_path / "other")
    refused(tuned, "it is [24, 16]", drop=["model.layers.1.*"], **{option: tmp_path / "other"})


def test_a_config_that_no_table_knows_is_said(tuned: Path, tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2}
    transformers.GraniteConfig(**sizes, intermediate_size=24).save_pretrained(tmp_path / "granite")
    assert noted(tuned, "no table here has the names of a model of 'granite'", config=tmp_path / "granite")
    transformers.GraniteConfig(**sizes, intermediate_size=28).save_pretrained(tmp_path / "wider")
    refused(tuned, "no tensor has a side of 28", config=tmp_path / "wider")


@pytest.mark.parametrize("option", ["config", "like"])
def test_a_config_of_a_model_whose_layers_have_other_names_is_refused(
    option: str, tuned: Path, tmp_path: Path
) -> None:
    """Layers, widths and vocabulary are those of the weights; transformers would load nothing."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "word_embed_proj_dim": 16}
    config = transformers.OPTConfig(**sizes, ffn_dim=24, num_attention_heads=2, max_position_embeddings=8)
    config.save_pretrained(tmp_path / "opt")
    refused(tuned, "no tensor is called as the layers of a model of 'opt' are", **{option: tmp_path / "opt"})
    torch.save(transformers.OPTForCausalLM(config).state_dict(), tmp_path / "own.bin")
    streamconv.plan(tmp_path / "own.bin", **{option: tmp_path / "opt"})  # type: ignore[arg-type]  # a path


@pytest.mark.parametrize("kind", ["Olmo", "Cohere", "Olmo2"])
def test_a_config_of_a_model_that_lacks_a_norm_is_refused(kind: str, tuned: Path, tmp_path: Path) -> None:
    """Every other name is that of a Llama's layers; the library would leave these out, and compute something else."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24}
    getattr(transformers, f"{kind}Config")(**sizes).save_pretrained(tmp_path / "other")
    refused(tuned, "have no such tensor (layers.#.", config=tmp_path / "other")


@pytest.mark.parametrize("model_type", LAYERS)
def test_layers_are_called_as_their_library_calls_them(model_type: str) -> None:
    """What models of one type have in their names, and no Llama has."""
    more: dict[str, dict[str, Any]] = {
        "gpt_neo": {"attention_types": [[["global"], 1]]},
        **{name: {"num_key_value_heads": 2, "head_dim": 8} for name in ("nemotron", "hunyuan_v1_dense")},
    }
    config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=1, **more.get(model_type, {}))
    with torch.device("meta"):
        models = [transformers.AutoModel.from_config(config), transformers.LlamaModel(SMALL)]
    assert [bool(_of_another(config.to_dict(), model.state_dict())) for model in models] == [False, True]


def test_a_model_without_its_head_is_of_its_config(tmp_path: Path) -> None:
    transformers.LlamaModel(SMALL).save_pretrained(tmp_path / "base")
    save_file(
        load_file(tmp_path / "base" / "model.safetensors"), tmp_path / "base.safetensors", {"format": "pt"}
    )
    streamconv.convert(
        tmp_path / "base.safetensors", tmp_path / "out", config=tmp_path / "base" / "config.json"
    )
    assert_holds(loaded(tmp_path / "out", transformers.AutoModel), transformers.LlamaModel.from_pretrained(
        tmp_path / "base").state_dict())  # fmt: skip


def test_a_config_of_no_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    refused(tuned, "it has no model_type", config=tmp_path / "adapter_config.json")


def test_like_decides_among_recipes(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "ms", to="mindspore", recipe="auto")
    (weights,) = (tmp_path / "ms").glob("*.ckpt")
    (tmp_path / "alone").mkdir()
    source = weights.rename(tmp_path / "alone" / "x.ckpt")
    with pytest.raises(StreamconvError, match="several recipes"):
        streamconv.plan(source, to_arch="hf")
    streamconv.convert(source, tmp_path / "back", to_arch="hf", like=tmp_path / "hf")
    assert_holds(loaded(tmp_path / "back"), model.state_dict())


# ------------------------------------------------------------------------------------------ what it can become


def test_names_of_another_program_are_said_and_what_they_can_become(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny().save_pretrained(tmp_path / "hf")
    streamconv.convert(tmp_path / "hf", tmp_path / "ms", to="mindspore", recipe="auto")
    (source,) = (tmp_path / "ms").glob("*.ckpt")
    # A config of transformers lies beside it, and transformers would load none of it.
    assert noted(source, "the names are those of a Llama of MindFormers, which libraries do not load")
    assert not noted(source, "the names are", to_arch="llama")
    assert not noted(tmp_path / "hf", "the names are")
    for words in (["inspect", str(source)], ["convert", str(source), str(tmp_path / "out")]):
        assert main(words) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        assert last.startswith("it can become ") and "llama" in last and last.endswith("(--to-arch NAME)")
    assert main(["inspect", "--json", str(source)]) == 0
    assert "llama" in json.loads(capsys.readouterr().out)["can_become"]
    save_file({"a": torch.ones(2)}, tmp_path / "unknown.safetensors")
    assert main(["inspect", str(tmp_path / "unknown.safetensors")]) == 0
    assert "it can become" not in capsys.readouterr().out


def said_of(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out.strip().splitlines()[-1]


def gptq(directory: Path) -> None:
    state = load_file(directory / "model.safetensors")
    for name in [each for each in state if each.endswith("_proj.weight")]:
        del state[name]
        state |= {name[:-6] + part: torch.ones(2, 2, dtype=torch.int32) for part in ("qweight", "qzeros")}
    save_file(state, directory / "model.safetensors", {"format": "pt"})
    edited(directory / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def test_codes_that_are_missing_are_not_like_it(tmp_path: Path) -> None:
    """A layer of GPTQ is not whole without its `qweight`, whole numbers as they are."""
    for name in ("like", "tuned"):
        tiny().save_pretrained(tmp_path / name)
        gptq(tmp_path / name)
    file = tmp_path / "tuned" / "model.safetensors"
    streamconv.plan(file, like=tmp_path / "like")
    state = load_file(file)
    gone = next(name for name in state if name.endswith(".qweight"))
    save_file({name: tensor for name, tensor in state.items() if name != gone}, file, {"format": "pt"})
    refused(file, f"{gone}': is missing", like=tmp_path / "like")
    refused(tmp_path / "tuned", f"{gone}': is missing", like=tmp_path / "like")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mixtral", "headless", "gptq"])
def test_all_that_it_can_become_works(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamconv.plans import ends

    sizes = {
        key: value for key, value in SMALL.to_dict().items() if key not in ("model_type", "architectures")
    }
    if kind == "mixtral":
        config = transformers.MixtralConfig(**{**sizes, "num_local_experts": 2})
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    elif kind == "qwen2":
        transformers.Qwen2ForCausalLM(KINDS["qwen2"]).save_pretrained(tmp_path / "model")
    else:
        (transformers.LlamaModel(SMALL) if kind == "headless" else tiny()).save_pretrained(tmp_path / "model")
    if kind == "gptq":
        gptq(tmp_path / "model")
    contents = streamconv.open(tmp_path / "model").contents
    found = ends.ends(contents)
    untried = {name for each in contents.models for name in ends.registry.becomes(each)}
    for name in untried - set(found.names):
        with pytest.raises(StreamconvError):
            streamconv.plan(tmp_path / "model", to_arch=name)
    for name in found.names:
        streamconv.plan(tmp_path / "model", to_arch=name)
    assert bool(found.names) == (kind not in ("headless", "gptq"))
    assert ("it can become" in said_of(tmp_path / "model", capsys)) == bool(found.names)
    monkeypatch.setattr(ends, "_MOST", 0)
    assert "a plan says whether they take it" in said_of(tmp_path / "model", capsys)
    # What is said is of the source as it is.
    assert main(["convert", str(tmp_path / "model"), str(tmp_path / "out"), "--drop", "*norm*"]) == 0
    assert "--to-arch" not in capsys.readouterr().out.strip().splitlines()[-1]


def test_what_it_could_become_with_a_config_is_said(tuned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = said_of(tuned, capsys)
    assert last.startswith("with its config (--config FILE), there are recipes to ") and "meta" in last


# ------------------------------------------------------------------------------------------ sentence-transformers


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT, pooling, and two layers, of which one lies in a module of modules."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    path = tmp_path_factory.mktemp("sentences")
    words = path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxy"]))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(path / "bert")
    transformers.BertTokenizer(str(words)).save_pretrained(path / "bert")
    apart = Router.for_query_document([Dense(16, 8)], [Dense(16, 8)])
    modules = [Transformer(str(path / "bert")), Pooling(16), Dense(16, 16), apart]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "model"))
    return path / "model"


@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_modules_of_sentence_transformers_keep_their_weights(
    to: str, dtype: str, sentences: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    streamconv.convert(sentences, tmp_path / "out", to=to, dtype=dtype)
    found, expected = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "out", sentences))
    wanted = expected.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert any("query" in name for name in wanted) and any(name.startswith("2.") for name in wanted)
    rounded = {
        name: tensor.to(torch.bfloat16) if dtype == "BF16" else tensor for name, tensor in wanted.items()
    }
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor.float(), rounded[name].float()), name
    if dtype == "F32":
        texts = ["a b c", "x y"]
        assert torch.equal(*(each.encode_query(texts, convert_to_tensor=True) for each in (found, expected)))


@pytest.mark.parametrize("more", [False, True])
def test_a_router_in_front_keeps_all_its_modules(more: bool, sentences: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    def route() -> list[Any]:
        own = [] if more else [Pooling(16), Dense(16, 8)]
        return [Transformer(str(sentences.parent / "bert")), *own]

    torch.manual_seed(0)
    modules = [Router.for_query_document(route(), route()), *([Pooling(16), Dense(16, 8)] if more else [])]
    model = SentenceTransformer(modules=modules, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save(str(tmp_path / "model"))
    streamconv.convert(tmp_path / "model", tmp_path / "out", engine="inline")
    found, wanted = SentenceTransformer(str(tmp_path / "out"), device="cpu").state_dict(), model.state_dict()
    assert found.keys() == wanted.keys() and any("query" in name for name in wanted)
    assert [name for name, tensor in wanted.items() if not torch.equal(found[name], tensor)] == []


def test_a_module_that_is_left_out_is_not_listed(sentences: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    streamconv.convert(sentences, tmp_path / "out", drop=["2_Dense/*"])
    found, expected = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "out", sentences))
    assert len(found) == len(expected) - 1
    assert all(
        torch.equal(tensor, expected[0].state_dict()[name]) for name, tensor in found[0].state_dict().items()
    )


def test_a_router_leads_to_no_module_that_is_left_out(sentences: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    (left,) = (path.parent.name for path in (sentences / "3_Router").glob("document*/model.safetensors"))
    streamconv.convert(sentences, tmp_path / "out", drop=[f"3_Router/{left}/*"])
    table = json.loads((tmp_path / "out/3_Router/router_config.json").read_text())
    assert left not in table["types"] and list(table["structure"]) == ["query"]
    found, expected = (SentenceTransformer(str(path), device="cpu") for path in (tmp_path / "out", sentences))
    assert torch.equal(*(each.encode_query(["a b"], convert_to_tensor=True) for each in (found, expected)))


def test_a_list_of_modules_that_leads_elsewhere_is_not_followed(sentences: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(sentences, tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": "../other"}]))
    with pytest.raises(StreamconvError, match="not in the directory"):
        streamconv.open(tmp_path / "model")
    (tmp_path / "model" / "modules.json").write_text("{}")
    assert len(streamconv.open(tmp_path / "model").contents.components) == 1


# ------------------------------------------------------------------------------------------ variants


@pytest.mark.parametrize(
    ("dtype", "variant"), [(None, "fp16"), ("F16", "fp16"), ("F32", None), ("BF16", None)]
)
def test_a_variant_that_says_another_dtype_is_taken_off(
    dtype: str | None, variant: str | None, tmp_path: Path
) -> None:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(4, 8), down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, layers_per_block=1, norm_num_groups=2, add_attention=False,
    ).to(torch.float16)  # fmt: skip
    pipeline = diffusers.DDPMPipeline(model, diffusers.DDPMScheduler())
    pipeline.save_pretrained(tmp_path / "pipe", variant="fp16")
    plan = streamconv.convert(
        tmp_path / "pipe", tmp_path / "out", engine="inline", dtype=[dtype] if dtype else []
    ).plan
    assert any("the variant fp16 is taken off" in note for note in plan.notes) == (variant is None)
    found = diffusers.DDPMPipeline.from_pretrained(tmp_path / "out", variant=variant).unet.state_dict()
    written = torch.bfloat16 if dtype == "BF16" else torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name].float(), tensor.to(written).float())


# ------------------------------------------------------------------------------------------ models in one file

ONE_FILE = {
    "v1": ("model.diffusion_model.output_blocks.11.0.skip_connection.weight", "Stable Diffusion 1"),
    "v2": (
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "Stable Diffusion 2",
    ),
    "xl_base": (
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",
        "Stable Diffusion XL",
    ),
    "sd35_large": ("model.diffusion_model.joint_blocks.37.x_block.mlp.fc1.weight", "Stable Diffusion 3"),
    "flux-schnell": ("model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale", "Flux"),
    "wan-t2v-1.3B": ("model.diffusion_model.head.modulation", "a diffusion model"),
}
PARTS = {"v1": "cond_stage_model.transformer.x", "v2": "cond_stage_model.model.x"}


@pytest.mark.parametrize("kind", ONE_FILE)
@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_a_diffusion_model_in_one_file_stays_one(kind: str, suffix: str, tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type, load_single_file_checkpoint

    name, what = ONE_FILE[kind]
    torch.manual_seed(0)
    state = {
        name: torch.rand(2, 1024), PARTS.get(kind, "first_stage_model.x"): torch.rand(3),
        "model.diffusion_model.patch_embedding.weight": torch.rand(1536, 16),
    }  # fmt: skip
    source = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 1}, source)
    else:
        save_file(state, source)
    found = infer_diffusers_model_type(state)
    assert found == kind
    assert noted(source, f"by its names it is {what} in one file")
    assert not noted(source, "there is no config.json")
    streamconv.convert(source, tmp_path / "out")
    made = load_single_file_checkpoint(str(tmp_path / "out" / "model.safetensors"))
    assert infer_diffusers_model_type(made) == found
    assert made.keys() == state.keys()
    assert all(torch.equal(made[each], tensor) for each, tensor in state.items())
    with pytest.raises(PlanError, match="--max-shard has no effect on a model that is loaded from one file"):
        streamconv.plan(source, max_shard=64)


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_stable_diffusion_1_in_one_file_is_loaded_from_it(
    pipeline: Path, suffix: str, dtype: str | None, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    parts = {
        "unet": UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet"),
        "vae": AutoencoderKL.from_pretrained(pipeline, subfolder="vae"),
    }
    text = transformers.CLIPTextModel.from_pretrained(pipeline, subfolder="text_encoder")
    state = one_file_models.unet(parts["unet"].state_dict(), layers=1) | one_file_models.vae(
        parts["vae"].state_dict()
    )
    state |= {f"cond_stage_model.transformer.{name}": each for name, each in text.state_dict().items()}
    source = tmp_path / f"model.{suffix}"
    if suffix == "ckpt":
        torch.save({"state_dict": state, "global_step": 1}, source)
    else:
        save_file(state, source)
    assert noted(source, "by its names it is Stable Diffusion 1 in one file")
    streamconv.convert(source, tmp_path / "out", **({} if dtype is None else {"dtype": dtype}))
    as_one_file(tmp_path / "out" / "model.safetensors", pipeline, parts, dtype)
    streamconv.convert(source, tmp_path / "one.safetensors", **({} if dtype is None else {"dtype": dtype}))
    as_one_file(tmp_path / "one.safetensors", pipeline, parts, dtype)


def test_stable_diffusion_3_in_one_file_is_loaded_from_it(tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "theirs" / "transformer")
    save_file(one_file_models.stable_diffusion_3(model.state_dict()), tmp_path / "sd3.safetensors")
    assert noted(tmp_path / "sd3.safetensors", "by its names it is Stable Diffusion 3 in one file")
    streamconv.convert(tmp_path / "sd3.safetensors", tmp_path / "out")
    as_one_file(tmp_path / "out" / "model.safetensors", tmp_path / "theirs", {"transformer": model}, None)


def as_one_file(file: Path, configs: Path, parts: Mapping[str, Any], dtype: str | None) -> None:
    """diffusers makes the parts of the file, with every tensor as it was."""
    kept = torch.bfloat16 if dtype else torch.float32
    for name, part in parts.items():
        found = type(part).from_single_file(str(file), config=str(configs), subfolder=name, torch_dtype=kept)
        wanted = part.state_dict()
        assert found.state_dict().keys() == wanted.keys()
        for key, tensor in found.state_dict().items():
            assert torch.equal(tensor, wanted[key].to(kept)), key


TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def llama(directory: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL.to_dict(), **changes})
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("option", ["config", "like"])
def test_a_config_of_other_heads_than_the_sources_own_is_refused(option: str, tmp_path: Path) -> None:
    """Tensors have the shapes of both."""
    own, other = llama(tmp_path / "own", **TWO_HEADS), llama(tmp_path / "other", **FOUR_HEADS)
    said = "num_attention_heads is 2 by the source's own config, and 4 by that of"
    refused(own, said, "num_key_value_heads is 1", **{option: other})
    streamconv.plan(own, **{option: llama(tmp_path / "same", **TWO_HEADS)})  # type: ignore[arg-type]


def test_rows_are_not_reordered_for_other_heads_than_the_config_says(tmp_path: Path) -> None:
    own, other = llama(tmp_path / "own", **TWO_HEADS), llama(tmp_path / "other", **FOUR_HEADS)
    streamconv.convert(own, tmp_path / "meta", to_arch="meta", to="torch")
    refused(tmp_path / "meta", "num_attention_heads is 2 by", "and 4 by", to_arch="llama", like=other)
    streamconv.convert(tmp_path / "meta", tmp_path / "back", to_arch="llama", like=own)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, transformers.LlamaForCausalLM.from_pretrained(own)(ids).logits)
    streamconv.convert(other, tmp_path / "four", to_arch="meta", to="torch")
    refused(own, "n_heads is 2 by the source's own config, and 4", to_arch="meta", like=tmp_path / "four")


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (transformers.OPTConfig, "num_attention_heads"),
        (transformers.GPT2Config, "n_head"),
        (transformers.T5Config, "num_heads"),
        (transformers.BartConfig, "encoder_attention_heads"),
        (transformers.MixtralConfig, "num_experts_per_tok"),
    ],
)
def test_what_no_tensor_shows_is_held_against_the_sources_config(kind: Any, key: str, tmp_path: Path) -> None:
    """Of models with a table here and without."""
    for name, number in (("own", 2), ("other", 4)):
        kind(vocab_size=40, **{key: number}).save_pretrained(tmp_path / name)
    problems, _ = contradictions(config_of(tmp_path / "own"), config_of(tmp_path / "other"), "x")
    assert f"{key} is 2 by the source's own config, and 4 by that of x" in "\n".join(map(str, problems))


def test_what_changes_values_is_said(tmp_path: Path) -> None:
    own, other = llama(tmp_path / "own"), llama(tmp_path / "other", rms_norm_eps=1e-5)
    assert noted(own, "rms_norm_eps is 1e-06 by the source's own config, and 1e-05 by that of", like=other)


def test_positions_that_one_config_says_apart_and_another_gathered_are_compared() -> None:
    own = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    told = {
        "model_type": "llama",
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0},
    }
    problems, notes = contradictions(own, told, "OTHER")
    assert not problems
    assert any(note.startswith("rope_theta is 10000.0") for note in notes)
    assert any(note.startswith("rope_factor is 2.0") for note in notes), notes
    assert not any("rope_type" in note for note in notes)


def test_a_model_of_diffusers_in_several_bin_files_says_how_it_is_loaded(tmp_path: Path) -> None:
    import diffusers

    torch.manual_seed(0)
    model = diffusers.UNet2DModel(block_out_channels=(8, 8), norm_num_groups=2, attention_head_dim=2,
                                  down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    options = {"to": "torch", "max_shard": "20KB"}
    assert noted(tmp_path / "model", "use_safetensors=False", **options)
    assert not noted(tmp_path / "model", "use_safetensors", to="torch")
    streamconv.convert(tmp_path / "model", tmp_path / "out", **options)
    with pytest.raises(OSError):
        diffusers.UNet2DModel.from_pretrained(tmp_path / "out", use_safetensors=True)
    again = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", use_safetensors=False)
    assert_holds(again, model.state_dict())
