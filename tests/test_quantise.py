"""Models quantised without data: the bytes of llm-compressor, in files that transformers loads."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from recipe_contract import load
from safetensors.torch import load_file, save_file
from test_dequantise import everything, same

import streamconv
from streamconv.errors import PlanError
from streamconv.plans.quantise import FORMS

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LAYER = "model.layers.0."
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)

# Of what `llmcompressor.entrypoints.model_free.model_free_ptq` of llm-compressor 0.14.0.1 with compressed-tensors 0.20.0 and
# torch 2.13 on a CPU made of `weights` with its presets FP8_BLOCK, FP8_DYNAMIC, W8A8, W4A16, NVFP4A16 and MXFP4A16.
VECTORS = {
    ("quantise-fp8-block", "BF16"): "9e68b9d1dbdd2e47",
    ("quantise-fp8", "BF16"): "5301107a76e9c7d3",
    ("quantise-int8", "BF16"): "b445ba2d8c82224c",
    ("quantise-int4", "BF16"): "f053c281ff50a801",
    ("quantise-nvfp4", "BF16"): "bc13d9b7b75c820a",
    ("quantise-mxfp4", "BF16"): "2e31cf8b1e39ae35",
    ("quantise-fp8-block", "F16"): "0b1c6b5742b506d5",
    ("quantise-fp8", "F16"): "8bf734698f2dce3d",
    ("quantise-int8", "F16"): "c02e30227c25e604",
    ("quantise-int4", "F16"): "b97a112cc8aad707",
    ("quantise-nvfp4", "F16"): "9a295d6e0eeece3c",
    ("quantise-mxfp4", "F16"): "32cec11249cd21a5",
    ("quantise-fp8-block", "F32"): "d78fafcf9edaa041",
    ("quantise-fp8", "F32"): "e74425cf68226163",
    ("quantise-int8", "F32"): "514018d93da06179",
    ("quantise-int4", "F32"): "9d2ed5994c6a5af2",
    ("quantise-nvfp4", "F32"): "3b6ae3718785130d",
    ("quantise-mxfp4", "F32"): "600951d4e6ed5f19",
}


def weights(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Rows and groups of zeros, zeros with a sign, tiny values, and rows with few large ones."""
    random = numpy.random.default_rng(7)
    shapes = {
        "self_attn.q_proj": (200, 256), "self_attn.k_proj": (72, 256), "self_attn.v_proj": (72, 256), "self_attn.o_proj": (256, 256),
        "mlp.gate_proj": (300, 256), "mlp.up_proj": (300, 256), "mlp.down_proj": (256, 384),
    }  # fmt: skip
    made = {}
    for number, (name, shape) in enumerate(shapes.items(), 1):
        values = random.standard_normal(shape).astype("f4") * numpy.float32(0.02 * number)
        values[3], values[5, :128], values[7, 3] = 0, 0, -0.0
        values[9] *= numpy.float32(1e-5)
        values[10] *= numpy.float32(1e-7)
        values[11, ::7] *= numpy.float32(50)
        made[f"{LAYER}{name}.weight"] = torch.from_numpy(values).to(dtype)
    made[f"{LAYER}input_layernorm.weight"] = torch.ones(256, dtype=dtype)
    made["lm_head.weight"] = torch.from_numpy(random.standard_normal((64, 256)).astype("f4")).to(dtype)
    return made


def stored(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return path


def digest(tensors: dict[str, torch.Tensor]) -> str:
    made = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return made.hexdigest()[:16]


@pytest.mark.parametrize("dtype", sorted(TORCH))
@every_form
def test_the_bytes_are_those_of_the_owner_and_it_reads_them(form: object, dtype: str, tmp_path: Path) -> None:
    source = stored(tmp_path / "source", weights(TORCH[dtype]))
    name = form.name  # type: ignore[attr-defined]
    streamconv.convert(source, tmp_path / "out", recipe=name, memory_budget="16MiB", engine="inline")
    made = everything(tmp_path / "out")
    assert digest(made) == VECTORS[name, dtype]
    # And back, as the owner's code reads them.
    streamconv.convert(
        tmp_path / "out",
        tmp_path / "back",
        recipe="dequantise",
        dtype="BF16" if "fp4" in name else dtype,
        engine="inline",
    )
    back = everything(tmp_path / "back")
    says = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert says["ignore"] == ["lm_head"]
    args = QuantizationArgs(**says["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=says["format"])
    codec = BaseCompressor.get_value_from_registry(says["format"])
    module = f"{LAYER}mlp.down_proj"
    parts = {
        key.removeprefix(f"{module}."): each for key, each in made.items() if key.startswith(f"{module}.")
    }
    theirs = codec.decompress(parts, scheme)["weight"]
    assert same(back[f"{module}.weight"], theirs)


@every_form
def test_transformers_loads_it_and_computes_as_with_what_it_was_rounded_to(
    form: object, tmp_path: Path
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=384, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    name = form.name  # type: ignore[attr-defined]
    streamconv.convert(tmp_path / "source", tmp_path / "quantised", recipe=name, engine="inline")
    streamconv.convert(tmp_path / "quantised", tmp_path / "plain", recipe="dequantise", engine="inline")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantised", dtype=torch.bfloat16,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    ).eval()  # fmt: skip
    ours = load(tmp_path / "plain")
    for key, tensor in ours.state_dict().items():
        assert same(theirs.state_dict()[key], tensor), key
    ids = torch.arange(24)[None] % 96
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


TIED = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("LlamaForCausalLM", transformers.LlamaConfig(**TIED, tie_word_embeddings=True)),
        ("Gemma2ForCausalLM", transformers.Gemma2Config(**TIED, num_key_value_heads=2, head_dim=32)),
        ("BertForMaskedLM", transformers.BertConfig(**TIED)),
        ("RobertaForMaskedLM", transformers.RobertaConfig(**TIED)),
        ("OPTForCausalLM", transformers.OPTConfig(**TIED, word_embed_proj_dim=128)),
        ("T5ForConditionalGeneration", transformers.T5Config(d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, vocab_size=96)),
    ],
)  # fmt: skip
def test_heads_that_no_file_has_and_rows_that_are_looked_up_stay_plain(
    kind: str, config: Any, tmp_path: Path
) -> None:
    """What transformers asks the file for is in it, and no scale of what it does not take for a layer."""
    torch.manual_seed(0)
    made = getattr(transformers, kind)(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path / "source")
    streamconv.convert(tmp_path / "source", tmp_path / "quantised", recipe="quantise-int4", engine="inline")
    streamconv.convert(tmp_path / "quantised", tmp_path / "plain", recipe="dequantise", engine="inline")
    theirs, found = type(made).from_pretrained(
        tmp_path / "quantised", dtype=torch.bfloat16, output_loading_info=True,
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True),
    )  # fmt: skip
    assert not any(found.values())
    ours = type(made).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    for key, tensor in ours.state_dict().items():
        assert same(theirs.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["quantise-int8", "quantise-nvfp4"])
def test_how_far_codes_are_from_weights_is_on_record(name: str, tmp_path: Path) -> None:
    """Relative errors of elements that are not zero, the same in any blocks, and after a resume."""
    tensors = weights(torch.bfloat16)
    source = stored(tmp_path / "source", tensors)
    done = streamconv.convert(source, tmp_path / "one", recipe=name, engine="inline")
    streamconv.convert(
        source, tmp_path / "two", recipe=name, memory_budget="12MiB", workers=2, engine="local"
    )
    streamconv.convert(tmp_path / "one", tmp_path / "back", recipe="dequantise", dtype="F32", engine="inline")
    one, two = (
        json.loads((tmp_path / each / ".streamconv" / "conversion.json").read_text())["rounding"]
        for each in ("one", "two")
    )
    assert one == two and len(one) == 7
    assert [each.name for each in done.rounding] == [each["tensor"] for each in one]
    back = everything(tmp_path / "back")
    for said in one:
        plain = said["tensor"].removesuffix("_packed")
        values = tensors[plain].float()
        errors = ((back[plain] - values) / values)[values != 0].abs()
        assert abs(said["largest"] - errors.max().item()) < 1e-5
        assert abs(said["mean"] - errors.mean().item()) < 1e-5


def test_what_is_no_linear_layer_or_is_ignored_stays(tmp_path: Path) -> None:
    tensors = {
        **{name: each for name, each in weights(torch.bfloat16).items() if "o_proj" not in name},
        "model.embed_tokens.weight": torch.ones(64, 256, dtype=torch.bfloat16),
        f"{LAYER}mlp.gate.weight": torch.ones(8, 256, dtype=torch.bfloat16),
        f"{LAYER}mlp.experts.gate_up_proj": torch.ones(2, 256, 64, dtype=torch.bfloat16),
        "vision_tower.blocks.0.fc1.weight": torch.ones(64, 256, dtype=torch.bfloat16),
    }
    source = stored(tmp_path / "source", tensors)
    streamconv.convert(
        source, tmp_path / "out", recipe="quantise-fp8", ignore=["*.down_proj.weight"], engine="inline"
    )
    made = everything(tmp_path / "out")
    changed = {name for name in tensors if name not in made or not same(made[name], tensors[name])}
    assert changed == {
        f"{LAYER}{part}.weight"
        for part in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        )
    }
    says = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert sorted(says["ignore"]) == [
        "lm_head", "model.embed_tokens", f"{LAYER}mlp.down_proj", f"{LAYER}mlp.gate", "vision_tower.blocks.0.fc1",
    ]  # fmt: skip
    notes = streamconv.plan(source, recipe="quantise-fp8").notes
    assert any("experts in one tensor stay as they are, 1 tensor" in note for note in notes)


def test_layers_that_are_computed_as_one_share_the_scale_of_scales(tmp_path: Path) -> None:
    source = stored(tmp_path / "source", weights(torch.bfloat16))
    streamconv.convert(source, tmp_path / "out", recipe="quantise-nvfp4", engine="inline")
    made = load_file(next((tmp_path / "out").glob("*.safetensors")))
    scale = {name.split(".")[-2]: each.item() for name, each in made.items() if name.endswith("global_scale")}
    assert scale["q_proj"] == scale["k_proj"] == scale["v_proj"]
    assert scale["gate_proj"] == scale["up_proj"]
    assert len(set(scale.values())) == 4


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    source = stored(tmp_path / "source", {"a.weight": torch.ones(4, 100), "b.weight": torch.ones(4, 128)})
    with pytest.raises(
        PlanError, match=r"'a\.weight': its 100 columns are not divided by groups of 128 .*--ignore"
    ):
        streamconv.plan(source, recipe="quantise-int4")
    assert streamconv.plan(source, recipe="quantise-int4", ignore=["a.*"])
    with pytest.raises(PlanError, match="100 columns are not divided"):  # engines round activations by group
        streamconv.plan(source, recipe="quantise-fp8-block")
    turned = {"h.0.attn.c_attn.weight": torch.ones(128, 384), "h.0.mlp.c_proj.weight": torch.ones(512, 128)}
    with pytest.raises(PlanError, match=r"its matrices lie \[in, out\]"):
        streamconv.plan(stored(tmp_path / "d", turned), recipe="quantise-int4")
    with pytest.raises(PlanError, match="--ignore 'c' matches no tensor"):
        streamconv.plan(source, recipe="quantise-fp8", ignore=["c"])
    with pytest.raises(PlanError, match="--ignore has no effect with --recipe dequantise"):
        streamconv.plan(source, recipe="dequantise", ignore=["a"])
    with pytest.raises(PlanError, match="quantised already"):
        streamconv.plan(
            stored(
                tmp_path / "b", {"a.weight": torch.ones(4, 128)}, quantization_config={"quant_method": "fp8"}
            ),
            recipe="quantise-fp8",
        )
    with pytest.raises(PlanError, match="no linear layer"):
        streamconv.plan(stored(tmp_path / "c", {"norm.weight": torch.ones(4)}), recipe="quantise-fp8")
