"""What `--dtype` may touch: not what is quantised, and not what the model's own library keeps in F32."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import streamconv
from streamconv import dtypes
from streamconv.errors import PlanError
from streamconv.families import kept_in_fp32

State = dict[str, torch.Tensor]

# ------------------------------------------------------------------------------ what stays in F32


def declaring(package: Any, files: str, base: type, attributes: tuple[str, ...]) -> Iterator[Any]:
    """The classes of a library's models that declare one of these attributes."""
    root = Path(package.__file__).parent
    for file in sorted((root / "models").rglob(files)):
        if attributes[0] not in file.read_text():
            continue
        name = ".".join((package.__name__, *file.relative_to(root).with_suffix("").parts))
        for each in vars(importlib.import_module(name)).values():
            own = inspect.isclass(each) and issubclass(each, base) and each.__module__ == name
            if own and any(getattr(each, attribute, None) for attribute in attributes):
                yield each


def kept(config: Mapping[str, Any], dtype: str) -> set[str]:
    return set(kept_in_fp32.kept(config, dtypes.by_name(dtype)))


@pytest.mark.slow
def test_the_table_has_every_model_type_of_transformers_that_declares_some() -> None:
    strict, other = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
    found = 0
    for model in declaring(transformers, "modeling_*.py", transformers.PreTrainedModel, (other, strict)):
        config = {"model_type": model.config_class.model_type}
        always, for_f16 = (
            {pattern.replace("(?<!linear_)", "") for pattern in kept(config, dtype)}
            for dtype in ("BF16", "F16")
        )
        assert set(getattr(model, strict) or ()) <= always, model
        assert set(getattr(model, other) or ()) | always <= for_f16, model
        assert not kept(config, "F32")
        found += 1
    assert found > 200


@pytest.mark.slow
def test_the_table_has_every_class_of_diffusers_that_declares_some() -> None:
    found = 0
    for model in declaring(diffusers, "*.py", diffusers.ModelMixin, ("_keep_in_fp32_modules",)):
        parts = {rf"(^|\.){part}(\.|$)" for part in model._keep_in_fp32_modules}
        assert (
            parts
            == kept({"_class_name": model.__name__}, "BF16")
            == kept({"_class_name": model.__name__}, "F16")
        )
        found += 1
    assert found > 20


def deepseek() -> torch.nn.Module:
    config = transformers.DeepseekV3Config(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, first_k_dense_replace=1,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def t5() -> torch.nn.Module:
    config = transformers.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2, vocab_size=32)
    return transformers.T5ForConditionalGeneration(config)


def blip2() -> torch.nn.Module:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 8, "patch_size": 4},
        qformer_config={**small, "encoder_hidden_size": 16, "vocab_size": 32},
        text_config={"model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2,
                     "vocab_size": 64},
        num_query_tokens=2, image_token_index=63,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config)


def gpt_oss() -> torch.nn.Module:
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, vocab_size=32, layer_types=["full_attention"],
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config)


def deberta() -> torch.nn.Module:
    """Which makes two biases in F32, whatever it is loaded in."""
    config = transformers.DebertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
    )
    return transformers.DebertaModel(config)


def wan() -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=16,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [deepseek, t5, blip2, gpt_oss, deberta, wan])
def test_a_cast_model_is_loaded_as_the_original_is_in_that_dtype(
    make: Callable[[], Any], stored: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    model.to(stored).save_pretrained(tmp_path / "source")
    # transformers may save what it keeps in F32 wider than the rest; this is a model that was trained in one dtype.
    for file in (tmp_path / "source").glob("*.safetensors"):
        save_file({name: each.to(stored) for name, each in load_file(file).items()}, file, {"format": "pt"})
    streamconv.convert(tmp_path / "source", tmp_path / "out", dtype=dtype, engine="inline")
    wanted_dtype = getattr(torch, dtypes.by_name(dtype).torch_name or "")
    key = "torch_dtype" if make is wan else "dtype"
    wanted, loaded = (
        type(model).from_pretrained(tmp_path / name, **{key: wanted_dtype}).state_dict()
        for name in ("source", "out")
    )
    assert {name: each.dtype for name, each in loaded.items()} == {
        name: each.dtype for name, each in wanted.items()
    }
    assert all(torch.equal(loaded[name], each) for name, each in wanted.items())
    before, after = (next((tmp_path / name).glob("*.safetensors")) for name in ("source", "out"))
    widths = {each.dtype for each in load_file(after).values()}
    assert widths <= {wanted_dtype, stored}
    assert after.stat().st_size <= before.stat().st_size


@pytest.mark.slow
def test_the_table_knows_what_files_call_what_is_kept() -> None:
    """For a model of each type: the names that transformers saves, against what it does when it loads them."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        build_glob_alternation,
        rename_source_key,
        revert_weight_conversion,
    )

    largest = {model.config_class.model_type: model
               for model in declaring(transformers, "modeling_*.py", transformers.PreTrainedModel, ("float32", "config_class"))
               if "PreTrained" not in model.__name__}  # fmt: skip
    made, checked, wrong = 0, set(), set()
    unmade: dict[str, str] = {}
    for kind, model_class in largest.items():
        if kind in _SLOW:
            continue
        model = made_on_meta(model_class)
        if isinstance(model, str):
            unmade[kind] = model
            continue
        config = model.config
        mapping, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        names = {}
        for name in revert_weight_conversion(model, state) if mapping else state:
            own = rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
            own = own if own in state else name
            if own in state and state[own].is_floating_point():
                names[name] = own
        made += 1
        for dtype in (torch.bfloat16, torch.float16):
            plan = list(model._get_dtype_plan(dtype))
            planned_for = build_glob_alternation(plan)[0].search if plan else bool_of_nothing
            said = list(kept_in_fp32.kept(config.to_dict(), dtypes.BY_TORCH_NAME[str(dtype)[6:]]))
            found = re.compile("|".join(said)).search if said else bool_of_nothing
            wide = {
                name for name, own in names.items() if state[own].dtype == torch.float32 or planned_for(own)
            }
            wrong |= {
                (kind, re.sub(r"\d+", "#", name)) for name in wide ^ {each for each in names if found(each)}
            }
            checked |= {kind} if wide else set()
    assert not wrong
    assert not {kind: why for kind, why in unmade.items() if kind not in _UNMADE}
    assert made > 500
    assert len(checked) > 70


def made_on_meta(model_class: Any) -> Any:
    """A model in BF16 with few layers, or as its class makes it where it takes no fewer, or why there is none."""
    why = ""
    for few in (True, False):
        torch.set_default_dtype(torch.bfloat16)
        try:
            config = model_class.config_class()
            if few:
                shrink(config)
            with torch.device("meta"):
                return model_class(config)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        finally:
            torch.set_default_dtype(torch.float32)
    return why


def bool_of_nothing(_: str) -> bool:
    return False


# Whose classes make no config that makes a model, or need packages that are not installed.
_UNMADE = {
    "chameleon", "cohere_compass", "cohere_compass_text", "conditional_detr", "dab-detr", "dbrx", "deepseek_ocr2",
    "deepseek_ocr2_text", "deformable_detr", "diffusion_gemma", "diffusion_gemma_text", "dots1", "edgetam",
    "edgetam_vision_model", "emu3", "esm", "gemma3n", "granite4_vision", "hunyuan_v1_dense", "hunyuan_v1_moe",
    "hunyuan_vl", "hunyuan_vl_text", "informer", "layoutlmv2", "lfm2_moe", "ministral", "moonshine_streaming", "moshi",
    "nemotron", "omdet-turbo", "pe_audio_video", "pe_audio_video_encoder", "pe_video", "pe_video_encoder", "perceiver",
    "qwen3_omni_moe", "qwen3_omni_moe_talker_text", "qwen4_exp", "qwen4_exp_text", "sapiens2", "t5gemma2_decoder",
    "t5gemma2_encoder", "t5gemma2_text", "table-transformer", "timm_wrapper",
}  # fmt: skip
# Large with the configs that their classes make.
_SLOW = {"nemo_speechlm", "esmfold2"}


def shrink(config: Any) -> None:
    """Few layers, in a config and in those of its parts, as far as it takes them."""
    for key in ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, min(4, getattr(config, key)))
    for value in vars(config).values():
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)


# ---------------------------------------------------------------------------------- what is quantised

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8": torch.float8_e4m3fn,
           "E8": torch.float8_e8m0fnu, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
           "I64": torch.int64}  # fmt: skip
_NF4 = {"weight": "U8", "weight.absmax": "F32", "weight.quant_map": "F32"}
_GPTQ = {"qweight": "I32", "qzeros": "I32", "scales": "F16", "g_idx": "I32"}

# By scheme: the tensors of one layer as the owner of the format lays them out, and what its config says.
LAYOUTS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "compressed-tensors pack": (
        {"weight_packed": "I32", "weight_scale": "F32", "weight_zero_point": "I32", "weight_shape": "I64",
         "weight_g_idx": "I32"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ),
    "compressed-tensors int": ({"weight": "I8", "weight_scale": "F32"}, {"quant_method": "compressed-tensors"}),
    "compressed-tensors float": (
        {"weight": "F8", "weight_scale": "F32", "input_scale": "F32"}, {"quant_method": "compressed-tensors"}
    ),
    "compressed-tensors nvfp4": (
        {"weight_packed": "U8", "weight_scale": "F8", "weight_global_scale": "F32", "input_global_scale": "F32"},
        {"quant_method": "compressed-tensors"},
    ),
    "compressed-tensors mxfp4": ({"weight_packed": "U8", "weight_scale": "U8"}, {"quant_method": "compressed-tensors"}),
    "fp8 blocks": ({"weight": "F8", "weight_scale_inv": "F32"}, {"quant_method": "fp8"}),
    "fp8 blocks, ue8m0": ({"weight": "F8", "weight_scale_inv": "E8"}, {"quant_method": "fp8"}),
    "fp8, Mistral": ({"weight": "F8", "weight_scale_inv": "F32", "activation_scale": "F32"}, {"quant_method": "fp8"}),
    "fp8, Mistral's own": ({"weight": "F8", "qscale_weight": "F32", "qscale_act": "F32"}, {}),
    "fp8, DeepSeek-V4": ({"weight": "F8", "scale": "E8"}, {"quant_method": "fp8"}),
    "fp4 experts, DeepSeek-V4": ({"weight": "I8", "scale": "E8"}, {"quant_method": "fp8"}),
    "fp8 without scales": ({"weight": "F8"}, {"quant_method": "fp8"}),
    "fbgemm": ({"weight": "F8", "weight_scale": "F32", "input_scale_ub": "F32"}, {"quant_method": "fbgemm_fp8"}),
    "ComfyUI": ({"weight": "F8", "scale_weight": "F32", "scale_input": "F32"}, {}),
    "ComfyUI, newer": ({"weight": "F8", "weight_scale": "F32", "comfy_quant": "U8", "pre_quant_scale": "F32"}, {}),
    "gptq": (_GPTQ, {"quant_method": "gptq"}),
    "gptq, auto-round": (_GPTQ, {"quant_method": "auto-round"}),
    "awq": ({"qweight": "I32", "qzeros": "I32", "scales": "F16"}, {"quant_method": "awq"}),
    "modelopt fp8": (
        {"weight": "F8", "weight_scale": "F32", "input_scale": "F32", "k_scale": "F32"}, {"quant_method": "modelopt"}
    ),
    "modelopt nvfp4": (
        {"weight": "U8", "weight_scale": "F8", "weight_scale_2": "F32", "input_scale": "F32"}, {}
    ),
    "modelopt svd": (
        {"weight": "U8", "weight_scale": "F8", "weight_scale_2": "F32", "svdquant_lora_a": "BF16",
         "pre_quant_scale": "F32"},
        {},
    ),
    "bitsandbytes nf4": ({**_NF4, "weight.quant_state.bitsandbytes__nf4": "U8"}, {"quant_method": "bitsandbytes"}),
    "bitsandbytes nested": (
        {**_NF4, "weight.absmax": "U8", "weight.nested_absmax": "F32", "weight.nested_quant_map": "F32",
         "weight.quant_state.bitsandbytes__fp4": "U8"},
        {},
    ),
    "bitsandbytes in floats": ({**_NF4, "weight": "F32", "weight.quant_state.bitsandbytes__nf4": "U8"}, {}),
    "bitsandbytes int8": ({"weight": "I8", "SCB": "F32", "weight_format": "U8"}, {"quant_method": "bitsandbytes"}),
    "hqq": ({"W_q": "U8", "scale": "F16", "zero": "F16", "nbits": "I64", "packing": "U8", "shape": "I64"}, {}),
    "hqq in floats": ({"W_q": "F16", "scale": "F16", "zero": "F16", "packing": "U8"}, {}),
    "quanto": ({"weight._data": "I8", "weight._scale": "F32", "input_scale": "F32", "output_scale": "F32"}, {}),
    "quanto int4": ({"weight._data._data": "U8", "weight._scale": "F32", "weight._shift": "F32"}, {}),
    "torchao": ({"_weight_qdata": "I8", "_weight_scale": "F32", "_weight_zero_point": "I8"}, {}),
    "torchao fp8": ({"_weight_qdata": "F8", "_weight_scale": "F32", "_weight_act_pre_scale": "F32"}, {}),
    "ChatGLM": ({"weight": "I8", "weight_scale": "F16"}, {}),
    "eetq": ({"weight": "I8", "weight_scales": "F16"}, {"quant_method": "eetq"}),
    "fp_quant": (
        {"qweight": "U8", "scales": "U8", "weight_global_scale": "F32", "forward_hadamard_matrix": "F32"},
        {"quant_method": "fp_quant"},
    ),
    "aqlm": ({"codes": "I8", "codebooks": "F16", "scales": "F16"}, {"quant_method": "aqlm"}),
    "higgs": ({"weight": "I16", "scales": "F16", "tables": "F16"}, {"quant_method": "higgs"}),
    "exl2": ({"q_weight": "I32", "q_scale": "I32", "q_scale_max": "F16", "q_groups": "I16"}, {"quant_method": "exl2"}),
    "vptq": ({"indices": "I32", "centroids.weight": "F16", "weight_scale": "F16", "weight_bias": "F16"}, {}),
    "bitnet": ({"weight": "U8", "weight_scale": "F32"}, {"quant_method": "bitnet"}),
    "SmoothQuant": ({"weight": "I8", "dequant_scale": "F32", "smooth_scales": "F32", "input_scale": "F32"}, {}),
}  # fmt: skip
# Of packed experts, which are bare parameters.
EXPERTS = {
    "mxfp4": {
        "gate_up_proj_blocks": "U8",
        "gate_up_proj_scales": "U8",
        "down_proj_blocks": "U8",
        "down_proj_scales": "F32",
    },
    "fp8": {
        "gate_up_proj": "F8",
        "gate_up_proj_scale_inv": "F32",
        "down_proj": "F8",
        "down_proj_scale_inv": "F32",
    },
    "fbgemm": {
        "gate_up_proj": "F8",
        "gate_up_proj_scale": "F32",
        "down_proj": "F8",
        "down_proj_scale": "F32",
    },
}
LAYER, MOE = "model.layers.3.self_attn.q_proj", "model.layers.3.mlp.experts"
PLAIN = {
    "model.embed_tokens.weight": "F32", "model.layers.3.input_layernorm.weight": "F32", f"{LAYER}.bias": "F32",
    "model.layers.3.self_attn.logit_scale": "F32", f"{MOE}.gate_up_proj_bias": "F32",
    "model.layers.3.self_attn.o_proj.weight": "F32", "model.layers.3.scale_shift_table": "F32",
}  # fmt: skip


def stored(directory: Path, spelled: Mapping[str, str], config: Mapping[str, Any] | None = None) -> Path:
    directory.mkdir()
    tensors = {name: torch.full((1, 1), 3).to(_DTYPES[dtype]) for name, dtype in spelled.items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "dtype": "float32", **(config or {})})
    )
    return directory


def planned(source: Path, **options: Any) -> dict[str, str]:
    return {tensor.spec.name: tensor.spec.dtype.name for tensor in streamconv.plan(source, **options).tensors}


@pytest.mark.parametrize("scheme", [*LAYOUTS, *(f"experts {name}" for name in EXPERTS)])
def test_codes_and_scales_stay_and_all_else_is_cast(scheme: str, tmp_path: Path) -> None:
    if scheme in LAYOUTS:
        layer, says = LAYOUTS[scheme]
        layer = {f"{LAYER}.{name}": dtype for name, dtype in layer.items()}
    else:
        layer, says = {f"{MOE}.{name}": dtype for name, dtype in EXPERTS[scheme[8:]].items()}, {}
    source = stored(tmp_path / "source", {**PLAIN, **layer}, {"quantization_config": says} if says else {})
    plan = streamconv.plan(source, dtype="BF16")
    cast = {each.spec.name: each.spec.dtype.name for each in plan.tensors}
    own = planned(source)
    assert cast == {name: "BF16" if name in PLAIN else dtype for name, dtype in own.items()}
    assert "codes and scales" in plan.notes[0]
    streamconv.convert(source, tmp_path / "cast", dtype="BF16", engine="inline")
    with pytest.raises(PlanError, match="--dtype BF16 casts no tensor"):
        streamconv.plan(tmp_path / "cast", dtype="BF16")


def test_an_fp8_model_is_loaded_as_before(tmp_path: Path) -> None:
    """By the code of transformers that dequantises such weights when it loads them, on a CPU."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "plain")
    streamconv.convert(tmp_path / "plain", tmp_path / "fp8", recipe="bf16-fp8", engine="inline")
    streamconv.convert(tmp_path / "fp8", tmp_path / "cast", dtype="BF16", engine="inline")
    sizes = planned(tmp_path / "cast")
    assert set(sizes.values()) == {"BF16", "F8_E4M3", "F32"}
    assert {dtype for name, dtype in sizes.items() if "norm" in name or "embed" in name} == {"BF16"}
    settings = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    wanted, loaded = (
        transformers.LlamaForCausalLM.from_pretrained(
            tmp_path / name, dtype=torch.bfloat16, quantization_config=settings
        ).state_dict()
        for name in ("fp8", "cast")
    )
    assert all(torch.equal(loaded[name], each) for name, each in wanted.items())
    assert wanted["model.layers.0.self_attn.q_proj.weight"].abs().max() < 1  # not codes


def test_mxfp4_experts_are_loaded_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gpt_oss().to(torch.float32)
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = state.pop(name).shape
        state[f"{name}_blocks"] = torch.randint(0, 256, (experts, out, into // 32, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(118, 124, (experts, out, into // 32), dtype=torch.uint8)
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    says = model.config.to_dict() | {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "float32"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(says, default=str))
    loaded = assert_loaded_alike(
        tmp_path, transformers.Mxfp4Config(dequantize=True), transformers.GptOssForCausalLM
    )
    assert {each.dtype for name, each in loaded.items() if "proj" in name} == {torch.bfloat16}


def test_ternary_weights_are_loaded_as_before(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    state = dict(model.state_dict())
    for name in [name for name in state if "_proj.weight" in name]:
        out, into = state[name].shape
        state[name] = torch.randint(0, 3, (out // 4, into), dtype=torch.uint8) * 0b01010101
        state[f"{name}_scale"] = torch.rand(1)
    (tmp_path / "source").mkdir()
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    says = model.config.to_dict() | {"quantization_config": {"quant_method": "bitnet"}, "dtype": "float32"}
    (tmp_path / "source" / "config.json").write_text(json.dumps(says, default=str))
    loaded = assert_loaded_alike(tmp_path, None, transformers.LlamaForCausalLM)
    assert {each.dtype for name, each in loaded.items() if "_proj.weight" in name} >= {torch.uint8}


def assert_loaded_alike(directory: Path, settings: Any, kind: Any) -> State:
    """By transformers on a CPU, what is in `source` and what `--dtype BF16` makes of it."""
    streamconv.convert(directory / "source", directory / "cast", dtype="BF16", engine="inline")
    more = {} if settings is None else {"quantization_config": settings}
    wanted, loaded = (
        kind.from_pretrained(directory / name, dtype=torch.bfloat16, **more).state_dict()
        for name in ("source", "cast")
    )
    assert wanted.keys() == loaded.keys()
    assert [name for name, each in wanted.items() if not torch.equal(loaded[name], each)] == []
    return dict(loaded)


def test_the_config_of_another_model_says_what_stays(tmp_path: Path) -> None:
    router = {"model.layers.1.mlp.gate.weight": "F32", "lm_head.weight": "F32"}
    like = stored(tmp_path / "like", router, {"model_type": "glm4_moe"})
    source = tmp_path / "model.ckpt"
    torch.save({"state_dict": {name: torch.full((1, 1), 3.0) for name in router}}, source)
    assert set(planned(source, dtype="BF16").values()) == {"BF16"}
    assert planned(source, dtype="BF16", like=like)["model.layers.1.mlp.gate.weight"] == "F32"
    assert (
        planned(source, dtype="BF16", config=like / "config.json")["model.layers.1.mlp.gate.weight"] == "F32"
    )


def test_only_what_is_quantised_stays(tmp_path: Path) -> None:
    """Names like those of scales are nothing by themselves."""
    names = [f"{LAYER}.weight_scale", "model.k_scale", "scale", f"{LAYER}.weight", "vision.blocks.3.norm.weight",
             "attn.logit_scale", "attn.zero", "net.blocks.weight"]  # fmt: skip
    source = stored(
        tmp_path / "source", {**dict.fromkeys(names, "F32"), "attn.relative_position_index": "I64"}
    )
    assert set(planned(source, dtype="BF16").values()) == {"BF16", "I64"}
    # FP8 without scales and without a word in the config: numbers, as ComfyUI's files have them.
    plain = stored(tmp_path / "plain", {f"{LAYER}.weight": "F8", "norm.weight": "F8"})
    assert set(planned(plain, dtype="BF16").values()) == {"BF16"}


def test_the_note_names_the_recipe_that_dequantises(tmp_path: Path) -> None:
    norm = {"model.norm.weight": "F32"}
    layer = {f"{LAYER}.weight": "F8", f"{LAYER}.weight_scale_inv": "F32"}
    bare = stored(tmp_path / "bare", layer, {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(PlanError, match=r"--dtype F16 casts no tensor.*--recipe dequantise makes them plain"):
        streamconv.plan(bare, dtype="F16")
    assert planned(bare, dtype="F16", recipe="dequantise") == {f"{LAYER}.weight": "F16"}
    layer |= norm
    fp8 = stored(tmp_path / "fp8", layer, {"quantization_config": {"quant_method": "fp8"}})
    assert any(
        "--recipe dequantise makes them plain" in note for note in streamconv.plan(fp8, dtype="F16").notes
    )
    with pytest.raises(PlanError, match=r"it is --recipe dequantise"):
        streamconv.plan(fp8, to_arch="bf16")
    with pytest.raises(PlanError, match=r"from here, there are (?!.*, ,).*--recipe dequantise"):
        streamconv.plan(fp8, to_arch="nowhere")
    assert planned(fp8, dtype="F16", recipe="dequantise") == {
        f"{LAYER}.weight": "F16",
        "model.norm.weight": "F16",
    }
    blocks = norm | {f"{MOE}.down_proj_blocks": "U8", f"{MOE}.down_proj_scales": "F32"}
    said = streamconv.plan(stored(tmp_path / "mxfp4", blocks), dtype="BF16").notes
    assert any("--recipe dequantise makes them plain" in note for note in said)
    hqq = stored(
        tmp_path / "hqq", norm | {f"{LAYER}.W_q": "U8", f"{LAYER}.scale": "F16", f"{LAYER}.zero": "F16"}
    )
    assert any("no recipe here dequantises" in note for note in streamconv.plan(hqq, dtype="BF16").notes)
    # What a recipe has just quantised stays so too.
    plain = stored(tmp_path / "plain", {f"{LAYER}.weight": "F32", "model.norm.weight": "F32"})
    assert planned(plain, dtype="BF16", recipe="bf16-fp8") == {
        f"{LAYER}.weight": "F8_E4M3", f"{LAYER}.weight_scale_inv": "F32", "model.norm.weight": "BF16",
    }  # fmt: skip


def test_what_is_named_is_cast_but_for_codes(tmp_path: Path) -> None:
    layer = {f"{LAYER}.weight": "F8", f"{LAYER}.weight_scale_inv": "BF16", "model.norm.weight": "F32"}
    source = stored(tmp_path / "source", layer, {"quantization_config": {"quant_method": "fp8"}})
    made = planned(source, dtype=["BF16", "*_scale_inv=F32", "model.norm.*=F16"])
    assert made == {
        f"{LAYER}.weight": "F8_E4M3", f"{LAYER}.weight_scale_inv": "F32", "model.norm.weight": "F16",
    }  # fmt: skip
    with pytest.raises(PlanError, match=r"F8_E4M3 codes of a quantised weight.*dequantise"):
        streamconv.plan(source, dtype="model.layers.*=BF16")
    router = {
        "model.layers.1.mlp.gate.weight": "F32",
        "model.layers.1.mlp.gate.e_score_correction_bias": "F32",
    }
    source = stored(tmp_path / "router", router, {"model_type": "deepseek_v3"})
    assert set(planned(source, dtype="BF16").values()) == {"F32"}
    assert set(planned(source, dtype=["BF16", "*.mlp.gate.weight=BF16"]).values()) == {"BF16", "F32"}
    wider = {name: torch.full((1, 1), 3.0, dtype=torch.float64) for name in router}
    save_file(wider, source / "model.safetensors", {"format": "pt"})
    assert set(planned(source, dtype="BF16").values()) == {"F32"}  # as wide as is kept, and no wider
    notes = streamconv.plan(source, dtype="BF16").notes
    assert any(
        "do not become BF16" in note
        and "'PATTERN=BF16' casts them" in note
        and "model.layers.*.mlp.gate.weight" in note
        for note in notes
    )
