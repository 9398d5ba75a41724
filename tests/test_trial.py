"""A trial: a few layers, which the owning library loads strictly and runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from test_loading import loaded

import streamconv
from streamconv.cli import main
from streamconv.errors import PlanError, UsageError

TINY = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXTURE = {**TINY, "moe_intermediate_size": 8, "num_experts_per_tok": 2}
LATENT = {
    **MIXTURE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 8,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
ENCODER_DECODER = {
    "vocab_size": 40, "d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

# A config; how many layers of it; and which of the source's layers these are, by the prefix of their names.
MODELS: dict[str, tuple[Any, int, dict[str, list[int]]]] = {
    "Llama": (hf.LlamaConfig(**TINY, num_hidden_layers=5), 2, {"model.layers.": [0, 1]}),
    "GPT-2": (
        hf.GPT2Config(vocab_size=40, n_embd=16, n_head=2, n_layer=4, n_positions=16),
        1,
        {"transformer.h.": [0]},
    ),
    "DeepSeek-V3, its first layers dense": (
        hf.DeepseekV3Config(**LATENT, num_hidden_layers=6, first_k_dense_replace=3), 2, {"model.layers.": [0, 3]},
    ),
    "Qwen2-MoE, some layers dense by number": (
        hf.Qwen2MoeConfig(**MIXTURE, num_experts=4, shared_expert_intermediate_size=8, num_hidden_layers=5,
                          decoder_sparse_step=1, mlp_only_layers=[2]),
        2, {"model.layers.": [0, 2]},
    ),
    "Qwen2-MoE, every second layer": (
        hf.Qwen2MoeConfig(**MIXTURE, num_experts=4, shared_expert_intermediate_size=8, num_hidden_layers=6,
                          decoder_sparse_step=2),
        2, {"model.layers.": [0, 1]},
    ),
    "Gemma 3, the kinds of layers in a list": (
        hf.Gemma3TextConfig(**TINY, head_dim=8, num_hidden_layers=7, sliding_window=4), 2, {"model.layers.": [0, 5]},
    ),
    "Qwen3-Next, two kinds of attention": (
        hf.Qwen3NextConfig(**MIXTURE, head_dim=8, num_experts=4, shared_expert_intermediate_size=8, num_hidden_layers=8,
                           linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                           linear_value_head_dim=8),
        2, {"model.layers.": [0, 3]},
    ),
    "Jamba, by periods": (
        hf.JambaConfig(**TINY, num_hidden_layers=6, attn_layer_period=3, attn_layer_offset=2, expert_layer_period=2,
                       expert_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False),
        3, {"model.layers.": [0, 1, 2]},
    ),
    "T5": (
        hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_decoder_layers=3, num_heads=2),
        2, {"encoder.block.": [0, 1], "decoder.block.": [0, 1]},
    ),
    "Whisper": (
        hf.WhisperConfig(**ENCODER_DECODER, encoder_layers=4, decoder_layers=3, num_mel_bins=8, max_source_positions=8,
                         max_target_positions=16),
        1, {"model.encoder.layers.": [0], "model.decoder.layers.": [0]},
    ),
    "BERT": (
        hf.BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4),
        1, {"encoder.layer.": [0]},
    ),
    "GPT-Neo, kinds of attention in a repeated list": (
        hf.GPTNeoConfig(vocab_size=40, hidden_size=16, num_layers=4, num_heads=2, max_position_embeddings=16,
                        attention_types=[[["global", "local"], 2]]),
        3, {"transformer.h.": [0, 1, 2]},
    ),
    "RecurrentGemma, whose kinds come in a cycle": (
        hf.RecurrentGemmaConfig(**TINY, num_hidden_layers=6), 3, {"model.layers.": [0, 1, 2]},
    ),
    "Nemotron-H, whose layers only a list counts": (
        hf.NemotronHConfig(**TINY, head_dim=8, layers_block_type=["mamba", "mlp", "attention", "mlp"], mamba_num_heads=4,
                           mamba_head_dim=8, n_groups=1, ssm_state_size=4),
        3, {"backbone.layers.": [0, 1, 2]},
    ),
    "DINOv2, which names the layer that it gives": (
        hf.Dinov2Config(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=8, patch_size=4), 2,
        {"encoder.layer.": [0, 1]},
    ),
    "LLaVA, whose tower stays whole": (
        hf.LlavaConfig(text_config=hf.LlamaConfig(**TINY, num_hidden_layers=4), image_token_index=39,
                       vision_config=hf.CLIPVisionConfig(**EYES, num_hidden_layers=4)),
        2, {"language_model.model.layers.": [0, 1], "vision_tower.vision_model.encoder.layers.": [0, 1, 2, 3]},
    ),
}  # fmt: skip
CLASSES = {
    "T5": hf.T5ForConditionalGeneration,
    "Whisper": hf.WhisperForConditionalGeneration,
    "BERT": hf.BertModel,
}
CLASSES["DINOv2, which names the layer that it gives"] = hf.Dinov2Model
CLASSES["LLaVA, whose tower stays whole"] = hf.LlavaForConditionalGeneration


def saved(name: str, tmp_path: Path) -> tuple[Any, Path]:
    config = MODELS[name][0]
    torch.manual_seed(0)
    kind = CLASSES.get(name)
    model = (kind(config) if kind else hf.AutoModelForCausalLM.from_config(config)).eval()
    model.save_pretrained(tmp_path / "whole")
    return model, tmp_path / "whole"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: each
        for file in sorted(directory.glob("*.safetensors"))
        for name, each in load_file(file).items()
    }


def assert_layers(whole: Path, out: Path, stacks: dict[str, list[int]]) -> None:
    """Each tensor is that of the layer in the source, and all else is as it was."""
    before, after = tensors(whole), tensors(out)
    wanted = {}
    for name, each in before.items():
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        layers = stacks.get(found[1]) if found else None
        if found is None or layers is None:
            wanted[name] = each
        elif int(found[2]) in layers:
            wanted[f"{found[1]}{layers.index(int(found[2]))}{found[3]}"] = each
    assert wanted.keys() == after.keys()
    for name, each in wanted.items():
        assert torch.equal(each, after[name]), name


def forward(model: Any) -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        if isinstance(model, hf.WhisperForConditionalGeneration):
            model(input_features=torch.zeros(1, 8, 16), decoder_input_ids=ids)
        elif isinstance(model, hf.Dinov2Model):
            model(pixel_values=torch.zeros(1, 3, 8, 8))
        elif isinstance(model, hf.T5ForConditionalGeneration):
            model(input_ids=ids, decoder_input_ids=ids)
        else:
            model(input_ids=ids)


@pytest.mark.parametrize("name", MODELS)
def test_a_few_layers_load_strictly_and_run(name: str, tmp_path: Path) -> None:
    _, count, stacks = MODELS[name]
    model, whole = saved(name, tmp_path)
    out = tmp_path / "out"
    streamconv.convert(whole, out, try_layers=count)
    assert_layers(whole, out, stacks)
    forward(loaded(out, type(model)))


def diffusion(name: str) -> Any:
    torch.manual_seed(0)
    if name == "Flux":
        return diffusers.FluxTransformer2DModel(
            in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
    if name == "SD3":
        return diffusers.SD3Transformer2DModel(
            sample_size=4, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, pos_embed_max_size=4,
            dual_attention_layers=(0, 1),
        )  # fmt: skip
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=4, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=4,
    )  # fmt: skip


def assert_loads(kind: Any, directory: Path) -> Any:
    model, report = kind.from_pretrained(directory, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(report.values()), report
    return model


@pytest.mark.parametrize(("name", "stacks"), [
    ("Flux", {"transformer_blocks.": [0, 1], "single_transformer_blocks.": [0, 1]}),
    ("SD3", {"transformer_blocks.": [0, 3]}),  # the last is built without what the others have for the text
    ("CogVideoX", {"transformer_blocks.": [0, 1]}),
])  # fmt: skip
def test_diffusion_models_load_strictly(name: str, stacks: dict[str, list[int]], tmp_path: Path) -> None:
    model = diffusion(name)
    model.save_pretrained(tmp_path / "whole")
    streamconv.convert(tmp_path / "whole", tmp_path / "out", try_layers=2)
    assert_layers(tmp_path / "whole", tmp_path / "out", stacks)
    made = assert_loads(type(model), tmp_path / "out")
    if name == "CogVideoX":
        video, text = torch.zeros(1, 2, 4, 4, 4), torch.zeros(1, 4, 16)
        made(hidden_states=video, encoder_hidden_states=text, timestep=torch.tensor([1]))
    elif name == "SD3":
        made(hidden_states=torch.zeros(1, 4, 4, 4), encoder_hidden_states=torch.zeros(1, 4, 16),
             pooled_projections=torch.zeros(1, 16), timestep=torch.tensor([1]))  # fmt: skip


def llama(path: Path, layers: int = 5, **changes: Any) -> Path:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**TINY, num_hidden_layers=layers, **changes)).save_pretrained(path)
    return path


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


@pytest.mark.parametrize(("text", "taken"), [("0-1", [0, 1]), ("2-3", [2, 3]), ("0,4", [0, 4]), ("3", [3])])
def test_the_layers_that_are_named_are_taken_and_numbered_from_0(
    text: str, taken: list[int], tmp_path: Path
) -> None:
    whole = llama(tmp_path / "whole")
    streamconv.convert(whole, tmp_path / "out", layers=text)
    assert_layers(whole, tmp_path / "out", {"model.layers.": taken})
    loaded(tmp_path / "out")
    record = json.loads((tmp_path / "out/.streamconv/conversion.json").read_text())
    assert record["arguments"]["layers"] == text


def test_a_trial_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    llama(tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "trial", try_layers=1)
    said = "the source is a trial of a few layers, not the whole model (TRIAL.txt)"
    assert said in streamconv.plan(tmp_path / "trial").notes
    assert said not in streamconv.plan(tmp_path / "source").notes
    streamconv.convert(tmp_path / "trial", tmp_path / "again", dtype="BF16")
    assert said in streamconv.plan(tmp_path / "again").notes


def test_what_is_told_of_layers_by_number_goes_with_them(tmp_path: Path) -> None:
    config = hf.DeepseekV3Config(**LATENT, num_hidden_layers=6, first_k_dense_replace=3)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "whole")
    streamconv.convert(tmp_path / "whole", tmp_path / "out", layers="2-4")
    loaded(tmp_path / "out")
    assert config_of(tmp_path / "out")["first_k_dense_replace"] == 1


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    config = hf.DeepseekV3Config(
        **LATENT, num_hidden_layers=3, first_k_dense_replace=1, num_nextn_predict_layers=1
    )
    whole = tmp_path / "whole"
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(whole)
    state = tensors(whole)
    more = {
        name.replace("layers.2.", "layers.3."): each.clone()
        for name, each in state.items()
        if "layers.2." in name
    }
    save_file(
        state | more | {"model.layers.3.eh_proj.weight": torch.zeros(16, 32)},
        whole / "model.safetensors",
        metadata={"format": "pt"},
    )
    streamconv.convert(whole, tmp_path / "out", try_layers=2)
    made = config_of(tmp_path / "out")
    assert (made["num_hidden_layers"], made["num_nextn_predict_layers"]) == (2, 0)
    loaded(tmp_path / "out")


def test_layers_that_would_have_places_of_another_kind_are_refused(tmp_path: Path) -> None:
    _, whole = saved("Qwen2-MoE, every second layer", tmp_path)
    with pytest.raises(UsageError, match="come every 2"):
        streamconv.plan(whole, layers="0,2")
    streamconv.convert(whole, tmp_path / "out", layers="2-3")
    loaded(tmp_path / "out")


def test_a_recipe_converts_a_trial_as_it_converts_the_whole(tmp_path: Path) -> None:
    config = hf.DeepseekV3Config(**LATENT, num_hidden_layers=4, first_k_dense_replace=1)
    model = hf.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "apart")
    streamconv.convert(tmp_path / "apart", tmp_path / "out", recipe="deepseek-v3-packed", try_layers=2)
    made, again = tensors(tmp_path / "out"), tmp_path / "again"
    assert "model.layers.1.mlp.experts.gate_up_proj" in made
    streamconv.convert(tmp_path / "out", again, recipe="deepseek-v3-packed", reverse=True)
    loaded(again)
    whole = llama(tmp_path / "llama")
    streamconv.convert(whole, tmp_path / "mindformers", to_arch="mindformers", try_layers=2)
    streamconv.convert(tmp_path / "mindformers", tmp_path / "back", recipe="mindformers-llama")
    assert_layers(whole, tmp_path / "back", {"model.layers.": [0, 1]})


@pytest.mark.parametrize(("kind", "recipe"), [
    ("Llama", "meta-llama"), ("GPT-2", "gpt2-per-head"), ("Llama", "mindformers-llama-interleaved"), ("Llama", "torchtitan-llama"),
])  # fmt: skip
def test_a_trial_of_what_a_recipe_made_is_what_it_makes_of_a_trial(
    kind: str, recipe: str, tmp_path: Path
) -> None:
    _, whole = saved(kind, tmp_path)
    chosen: dict[str, Any] = {"recipe": recipe, "reverse": recipe != "gpt2-per-head"}
    streamconv.convert(whole, tmp_path / "made", **chosen)
    streamconv.convert(
        tmp_path / "made", tmp_path / "out", recipe=recipe, reverse=not chosen["reverse"], layers="1-2"
    )
    assert_layers(whole, tmp_path / "out", {stack: [1, 2] for stack in MODELS[kind][2]})
    loaded(tmp_path / "out")


def test_only_drop_and_rename_speak_of_the_source(tmp_path: Path) -> None:
    whole = llama(tmp_path / "whole")
    # Each pattern matches something in the whole; the one of --drop nothing in the trial.
    chosen = {"drop": ["model.layers.2.*"], "only": ["model.*.mlp.*"]}
    streamconv.convert(whole, tmp_path / "out", layers="3-4", **chosen)
    made = tensors(tmp_path / "out")
    assert {name.split(".mlp.")[0] for name in made} == {"model.layers.0", "model.layers.1"}
    dropped = streamconv.plan(whole, layers="3-4", drop=["model.layers.4.*"])
    assert {each.spec.name.split(".")[2] for each in dropped.tensors if "layers" in each.spec.name} == {"0"}
    assert any("layers.4." in each.name for each in dropped.dropped)
    renamed = streamconv.plan(whole, layers="3-4", rename=["model.layers.{i}.*=h.{i}.*"])
    assert {each.spec.name.split(".")[1] for each in renamed.tensors if each.spec.name[:2] == "h."} == {
        "0",
        "1",
    }
    assert all("layers.0." not in source for each in renamed.tensors for source in each.sources)
    with pytest.raises(PlanError, match="matches no tensor"):
        streamconv.plan(whole, try_layers=1, drop=["model.layers.9.*"])


def test_the_trial_is_marked_and_verified_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, out = llama(tmp_path / "whole"), tmp_path / "out"
    assert main([str(whole), str(out), "--try", "2"]) == 0
    shown = capsys.readouterr()
    assert "layers 0-1 of 5" in shown.out + shown.err
    assert "trial    --try 2" in shown.out
    assert "layers 0-1 of 5" in (out / "TRIAL.txt").read_text()
    for words in ([str(whole), str(out)], [str(whole), str(out), "--try", "2"], [str(out), "--headers"]):
        assert main(["verify", *words]) == 0, words
        assert "trial" in capsys.readouterr().out, words
    # What is made of a trial is one.
    assert main([str(out), str(tmp_path / "again"), "--dtype", "BF16"]) == 0
    assert (tmp_path / "again/TRIAL.txt").is_file()
    # The whole is another plan.
    assert main([str(whole), str(out)]) != 0
    capsys.readouterr()
    assert main(["verify", str(whole), str(out), "--dtype", "BF16"]) == 1


def test_only_its_own_bytes_are_read(tmp_path: Path) -> None:
    whole = llama(tmp_path / "whole")
    plan = streamconv.plan(whole, try_layers=1)
    assert plan.bytes_to_write < sum(each.nbytes for each in tensors(whole).values())
    read = {source for each in plan.tensors for source in each.sources}
    assert not any("layers.1." in name for name in read)


@pytest.mark.parametrize(("options", "message"), [
    ({"try_layers": 5}, "--try has no effect on a model of 5 layers"),
    ({"try_layers": 0}, "--try 0"),
    ({"layers": "7-9"}, "there are 5 layers, 0 to 4"),
    ({"layers": "x"}, "--layers x"),
    ({"layers": "3-1"}, "--layers 3-1"),
    ({"layers": "0", "try_layers": 2}, "--try has no effect with --layers"),
])  # fmt: skip
def test_what_makes_no_trial_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        streamconv.plan(llama(tmp_path / "whole"), **options)


def test_what_has_no_layers_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(
        UsageError, match="--try has no effect here: there are no layers to be seen"
    ) as caught:
        streamconv.plan(tmp_path / "plain.safetensors", try_layers=1)
    assert "--only" in str(caught.value.headline.hint)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
                                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=2)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UsageError, match="no layers that the config counts"):
        streamconv.plan(tmp_path / "vae", try_layers=1)
    stages = hf.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
    )
    hf.SwinModel(stages).save_pretrained(tmp_path / "swin")
    with pytest.raises(UsageError, match="no layers that the config counts"):
        streamconv.plan(tmp_path / "swin", try_layers=1)


def test_without_a_config_the_largest_stack_is_that_of_layers(tmp_path: Path) -> None:
    whole = llama(tmp_path / "whole")
    (whole / "config.json").rename(tmp_path / "config.json")
    plan = streamconv.plan(whole, try_layers=2)
    assert len([each for each in plan.tensors if "input_layernorm" in each.spec.name]) == 2
    streamconv.convert(whole, tmp_path / "out", try_layers=2, config=tmp_path / "config.json")
    loaded(tmp_path / "out")


def test_the_model_that_it_is_like_is_cut_alike(tmp_path: Path) -> None:
    whole = llama(tmp_path / "whole")
    bare = tmp_path / "bare.pt"
    torch.save({"model": {f"module.{name}": each for name, each in tensors(whole).items()}}, bare)
    streamconv.convert(bare, tmp_path / "out", try_layers=2, like=whole)
    assert_layers(whole, tmp_path / "out", {"model.layers.": [0, 1]})
    loaded(tmp_path / "out")


def test_an_adapter_is_merged_into_the_layers_that_there_are(tmp_path: Path) -> None:
    import peft

    whole = llama(tmp_path / "whole")
    model = hf.AutoModelForCausalLM.from_pretrained(whole)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    streamconv.convert(whole, tmp_path / "merged", lora=tmp_path / "adapter")
    streamconv.convert(whole, tmp_path / "out", lora=tmp_path / "adapter", layers="1,3")
    assert_layers(tmp_path / "merged", tmp_path / "out", {"model.layers.": [1, 3]})


def test_a_pipeline_is_cut_in_each_of_its_models(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    diffusion("CogVideoX").save_pretrained(pipe / "transformer")
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2)
    hf.T5EncoderModel(config).save_pretrained(pipe / "text_encoder")
    index = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
             "text_encoder": ["transformers", "T5EncoderModel"]}  # fmt: skip
    (pipe / "model_index.json").write_text(json.dumps(index))
    streamconv.convert(pipe, tmp_path / "out", try_layers=1)
    assert_loads(diffusers.CogVideoXTransformer3DModel, tmp_path / "out/transformer")
    loaded(tmp_path / "out/text_encoder", hf.T5EncoderModel)
    # A fine-tune of one model is completed with the others, which are cut too.
    alone = tmp_path / "tuned.safetensors"
    save_file(tensors(pipe / "transformer"), alone)
    streamconv.convert(alone, tmp_path / "completed", try_layers=1, like=pipe)
    assert_loads(diffusers.CogVideoXTransformer3DModel, tmp_path / "completed/transformer")
    loaded(tmp_path / "completed/text_encoder", hf.T5EncoderModel)


@pytest.mark.parametrize(("options", "left"), [
    ({"drop": ["model.layers.3.*"]}, "0-2"), ({"only": ["model.layers.1.*", "lm_head.weight"]}, "1"),
    ({"rename": ["model.layers.4.*=more.*"]}, "0-3"),
])  # fmt: skip
def test_layers_that_edits_leave_out_under_the_same_config_are_said(
    options: dict[str, Any], left: str, tmp_path: Path
) -> None:
    plan = streamconv.plan(llama(tmp_path / "whole", layers=5 if "rename" in options else 4), **options)
    if left == "1":
        assert any("model.layers.* 1 are written" in note and "--layers 1 " in note for note in plan.notes)
    else:
        assert any(f"model.layers.* {left} are written" in note for note in plan.notes), plan.notes
    whole = streamconv.plan(tmp_path / "whole", drop=["model.layers.*.mlp.*"])
    assert not any("are written" in note for note in whole.notes)
