"""Quantised weights made plain, by every scheme, against the libraries that own it.

Where an owner has no code for a CPU (GPTQ's packers, AutoAWQ, torchao's files, modelopt, ComfyUI, the kernels of models that
pack by themselves), its arithmetic is written out here with torch or NumPy, from its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy
import pytest
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from recipe_contract import load
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.errors import ConversionError, PlanError
from streamconv.ops import Fill, apply
from streamconv.plans.layer import FLOATS, Layer
from streamconv.plans.schemes import SCHEMES, Scheme
from streamconv.plans.told import Told

Tensors = dict[str, torch.Tensor]
Q = "model.layers.0.self_attn.q_proj"
NORM = "model.layers.0.input_layernorm.weight"
TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
targets = pytest.mark.parametrize("target", sorted(TORCH))


def directory(
    path: Path,
    tensors: Tensors,
    quantization: Any = None,
    metadata: dict[str, str] | None = None,
    **config: Any,
) -> Path:
    """A checkpoint whose parts lie in two files, each of a layer's in another than the one before."""
    path.mkdir()
    tensors = {NORM: torch.ones(8, dtype=torch.bfloat16), **tensors}
    shards: list[Tensors] = [{}, {}]
    for index, (name, tensor) in enumerate(tensors.items()):
        shards[index % 2][name] = tensor.contiguous()
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file(shard, path / file, {"format": "pt", **(metadata or {})})
        index |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    says = {"quantization_config": quantization} if quantization else {}
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "dtype": "bfloat16", **config, **says})
    )
    return path


def everything(path: Path) -> Tensors:
    return {name: each for file in path.glob("*.safetensors") for name, each in load_file(file).items()}


def plain(source: Path, target: str | None = None, **options: Any) -> Tensors:
    """What a checkpoint becomes: all of it; nothing of the codes is left, in tensors or in the config."""
    out = source.parent / f"{source.name}-{target}"
    dtype = {} if target is None else {"dtype": target}
    streamconv.convert(
        source, out, recipe="dequantise", engine="inline", memory_budget="16MiB", **dtype, **options
    )
    config = json.loads((out / "config.json").read_text())
    assert "quantization" not in json.dumps(config)
    made = everything(out)
    assert NORM in made
    return {name: each for name, each in made.items() if name != NORM}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(torch.nan_to_num(left.float(), nan=1e30), torch.nan_to_num(right.float(), nan=1e30))
    )


def weight(
    rows: int = 96, columns: int = 256, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> torch.Tensor:
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05
    made[3] = 0
    return made.to(dtype)


def rounded(exact: torch.Tensor, target: str) -> torch.Tensor:
    """Once, from F32."""
    assert exact.dtype == torch.float32
    return exact.to(TORCH[target])


# ------------------------------------------------------------------------------- compressed-tensors


def compressed(
    form: str, args: dict[str, Any], values: torch.Tensor, name: str = Q
) -> tuple[Tensors, dict[str, Any], torch.Tensor]:
    """A layer as the owner compresses it, the config for it, and what the owner decompresses it to."""
    arguments = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    rows, columns = values.shape
    group = args.get("group_size") or columns
    bits, symmetric = args["num_bits"], args.get("symmetric", True)
    wide = values.float()
    state = {"weight": values}
    if args["strategy"] == "block":
        high, broad = args["block_structure"]
        padded = torch.nn.functional.pad(wide, (0, -columns % broad, 0, -rows % high))
        peaks = padded.reshape(padded.shape[0] // high, high, -1, broad).abs().amax((1, 3))
    elif args["strategy"] == "tensor":
        peaks = wide.abs().amax().reshape(1)
    else:
        peaks = wide.reshape(rows, -1, group).abs().amax(2)
    if form == "nvfp4-pack-quantized":
        state["weight_global_scale"] = torch.tensor([2688.0]) / wide.abs().max()
        state["weight_scale"] = (state["weight_global_scale"] * peaks / 6).clamp(2**-6, 448)
        state["weight_scale"] = state["weight_scale"].to(torch.float8_e4m3fn).float()
    elif form == "mxfp4-pack-quantized":
        state["weight_scale"] = 2.0 ** torch.floor(torch.log2(peaks.clamp(min=1e-6) / 6))
    else:
        top = 448 if args["type"] == "float" else (2**bits - 1) / 2
        state["weight_scale"] = (peaks.clamp(min=1e-6) / top).to(values.dtype)
    if not symmetric:
        half = 2 ** (bits - 1)
        points = torch.randint(
            -half, half, state["weight_scale"].shape, generator=torch.Generator().manual_seed(1)
        )
        state["weight_zero_point"] = points.to(torch.int8)
    codec = BaseCompressor.get_value_from_registry(form)
    held = codec.compress(state, scheme)
    theirs = codec.decompress(dict(held), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors", "format": form, "version": "0.20.0", "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "format": form}},
    }  # fmt: skip
    return {f"{name}.{part}": each for part, each in held.items()}, config, theirs


INT = {"type": "int", "strategy": "group", "symmetric": True}
FP8 = {"type": "float", "num_bits": 8, "symmetric": True}
COMPRESSED = {
    "INT4 by 32, as Kimi-K2's experts": ("pack-quantized", {**INT, "num_bits": 4, "group_size": 32}),
    "INT4 by 128, asymmetric": ("pack-quantized", {**INT, "num_bits": 4, "group_size": 128, "symmetric": False}),
    "INT8 by 64": ("pack-quantized", {**INT, "num_bits": 8, "group_size": 64}),
    "INT3 by 32, dense": ("pack-quantized", {**INT, "num_bits": 3, "group_size": 32}),
    "INT5 by 32, asymmetric": ("pack-quantized", {**INT, "num_bits": 5, "group_size": 32, "symmetric": False}),
    "INT4 by row": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel"}),
    "INT4 by row, asymmetric": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel", "symmetric": False}),
    "INT8 by row": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"}),
    "INT8 by row, asymmetric": ("int-quantized", {**INT, "num_bits": 8, "strategy": "channel", "symmetric": False}),
    "INT8 by tensor": ("int-quantized", {**INT, "num_bits": 8, "strategy": "tensor"}),
    "INT8 by 64, naive": ("naive-quantized", {**INT, "num_bits": 8, "group_size": 64}),
    "FP8 by tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "FP8 by row": ("float-quantized", {**FP8, "strategy": "channel"}),
    "FP8 by block": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [64, 96]}),
    "NVFP4": ("nvfp4-pack-quantized", {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True}),
    "MXFP4": ("mxfp4-pack-quantized", {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8"}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMPRESSED))
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_compressed_tensors_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    """In the dtype of the scales, which is the one that was quantised; the floats of four bits in BF16."""
    form, args = COMPRESSED[name]
    parts, config, theirs = compressed(form, args, weight(dtype=TORCH[dtype]))
    made = plain(directory(tmp_path / "source", parts, config), "BF16" if "FP4" in name else dtype)
    assert same(made[f"{Q}.weight"], theirs.to(TORCH["BF16" if "FP4" in name else dtype]))


@pytest.mark.parametrize("name", ["INT4 by row", "INT4 by row, asymmetric", "INT8 by row", "FP8 by row"])
def test_odd_shapes_are_as_the_owner_has_them(name: str, tmp_path: Path) -> None:
    form, args = COMPRESSED[name]
    parts, config, theirs = compressed(form, args, weight(13, 37))
    made = plain(directory(tmp_path / "source", parts, config))
    assert same(made[f"{Q}.weight"], theirs)


def test_words_that_are_filled_are_told_from_dense_ones(tmp_path: Path) -> None:
    """Until 0.17, ten codes of three bits were in a word; where widths are alike, the version says."""
    codes = torch.randint(0, 8, (6, 96), generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 3).to(torch.bfloat16)
    exact = (codes - 4).float() * scale.float().repeat_interleave(32, 1)
    padded = torch.nn.functional.pad(codes, (0, 4)).reshape(6, 10, 10).to(torch.int64)
    words = (padded << (3 * torch.arange(10))).sum(2)
    parts = {f"{Q}.weight_packed": words.to(torch.int32), f"{Q}.weight_scale": scale}
    parts[f"{Q}.weight_shape"] = torch.tensor([6, 96])
    args = {**INT, "num_bits": 3, "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "version": "0.12.2",
        "config_groups": {"g": {"targets": ["Linear"], "weights": args}},
    }
    made = plain(directory(tmp_path / "source", parts, config))
    assert same(made[f"{Q}.weight"], exact.to(torch.bfloat16))


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_the_order_of_activations(symmetric: bool, tmp_path: Path) -> None:
    """`actorder` of compressed-tensors to 0.18: a group for each column, not in order."""
    args = {**INT, "num_bits": 4, "group_size": 32, "symmetric": symmetric}
    values = weight()
    parts, config, _ = compressed("pack-quantized", args, values)
    group = torch.randperm(256, generator=torch.Generator().manual_seed(2)).to(torch.int32) // 32
    parts[f"{Q}.weight_g_idx"] = group
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    one = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    held = {name.removeprefix(f"{Q}."): each for name, each in parts.items() if "g_idx" not in name}
    ones = codec.decompress({**held, "weight_scale": torch.ones_like(held["weight_scale"])}, one)["weight"]
    zero = torch.zeros(96, 8)
    if not symmetric:
        zero = -codec.decompress(
            {
                **held,
                "weight_packed": torch.full_like(held["weight_packed"], -0x77777778),
                "weight_scale": torch.ones_like(held["weight_scale"]),
            },
            one,
        )["weight"].float()[:, ::32]
    codes = ones.float() + zero.repeat_interleave(32, 1)
    exact = (codes - zero[:, group]) * held["weight_scale"].float()[:, group]
    made = plain(directory(tmp_path / "source", parts, config))
    assert same(made[f"{Q}.weight"], exact.to(torch.bfloat16))


def test_several_schemes_and_layers_that_stayed_as_they_were(tmp_path: Path) -> None:
    """Each layer by its own group of the config; what `ignore` names is copied, and what contradicts it is said."""
    experts = [f"model.layers.1.mlp.experts.{number}.up_proj" for number in range(2)]
    tensors: Tensors = {}
    wanted: Tensors = {}
    int4 = {**INT, "num_bits": 4, "group_size": 32}
    int8 = {**INT, "num_bits": 8, "group_size": 64}
    fp8 = {**FP8, "strategy": "channel"}
    for name, form, args in (
        (experts[0], "pack-quantized", int4),
        (experts[1], "pack-quantized", int8),
        (Q, "float-quantized", fp8),
    ):
        parts, _, theirs = compressed(form, args, weight(seed=len(name)), name)
        tensors |= parts
        wanted[f"{name}.weight"] = theirs
    tensors["lm_head.weight"] = wanted["lm_head.weight"] = weight(seed=9)
    tensors["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    config = {
        "quant_method": "compressed-tensors", "format": "mixed-precision", "ignore": ["lm_head", "re:.*q_proj"],
        "config_groups": {
            "a": {"targets": ["re:.*experts.0.*"], "weights": int4}, "b": {"targets": ["Linear"], "weights": int8},
            "c": {"targets": ["re:.*self_attn.*"], "weights": fp8},
        },
    }  # fmt: skip
    source = directory(tmp_path / "source", tensors, config)
    made = plain(source)
    assert made.keys() == wanted.keys()
    assert all(same(made[name], wanted[name]) for name in wanted)
    notes = streamconv.plan(source, recipe="dequantise").notes
    assert any("layers were not quantised which are" in note and "1 layer, such as" in note for note in notes)
    dropped = {each.name: each.reason for each in streamconv.plan(source, recipe="dequantise").dropped}
    assert dropped == {"model.layers.0.self_attn.k_scale": "a scale of activations or of the KV cache"}


@pytest.mark.parametrize("name", ["INT4 by 32, as Kimi-K2's experts", "FP8 by block"])
def test_transformers_computes_the_same_with_what_is_made(name: str, tmp_path: Path) -> None:
    form, args = COMPRESSED[name]
    if "block_structure" in args:
        args = {**args, "block_structure": [128, 128]}
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, dtype="bfloat16", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tensors: Tensors = {}
    for key, tensor in model.state_dict().items():
        if key.endswith("_proj.weight"):
            parts, says, theirs = compressed(form, args, tensor, key.removesuffix(".weight"))
            tensors |= parts
            model.get_parameter(key).data = theirs
        else:
            tensors[key] = tensor
    says |= {"quantization_status": "compressed", "ignore": ["lm_head"]}
    source = directory(
        tmp_path / "source",
        tensors,
        says,
        **{k: v for k, v in config.to_dict().items() if k not in ("model_type", "dtype")},
    )
    streamconv.convert(
        source, tmp_path / "out", recipe="auto", engine="inline", drop=[NORM] if NORM not in tensors else []
    )
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = load(tmp_path / "out"), load(tmp_path / "theirs")
    ids = torch.arange(24)[None] % 96
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)


# ---------------------------------------------------------------------------------------------- FP8


def float8(rows: int = 200, columns: int = 300, seed: int = 0) -> torch.Tensor:
    return (weight(rows, columns, torch.float32, seed) * 100).to(torch.float8_e4m3fn)


def spread(scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, int]) -> torch.Tensor:
    tall = scale.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return tall[: shape[0], : shape[1]]


POWERS = torch.tensor([[120, 127, 130], [119, 126, 131]], dtype=torch.uint8)
SCALES = {
    "blocks, F32": ("weight_scale_inv", torch.rand(2, 3) + 0.1, (128, 128)),
    "blocks, BF16": ("weight_scale_inv", (torch.rand(2, 3) + 0.1).bfloat16(), (128, 128)),
    "blocks, bytes of powers": ("weight_scale_inv", POWERS, (128, 128)),
    "blocks, powers": ("weight_scale_inv", POWERS.view(torch.float8_e8m0fnu), (128, 128)),
    "blocks, `scale`": ("scale", POWERS.view(torch.float8_e8m0fnu), (128, 128)),
    "one number": ("weight_scale_inv", torch.tensor(0.37), (200, 300)),
    "one number, [1]": ("weight_scale_inv", torch.tensor([0.37]).bfloat16(), (200, 300)),
    "modelopt, tensor": ("weight_scale", torch.tensor(0.37), (200, 300)),
    "modelopt, row": ("weight_scale", torch.rand(200) + 0.1, (1, 300)),
    "modelopt, blocks": ("weight_scale", torch.rand(2, 1, 3, 1) + 0.1, (128, 128)),
    "FBGEMM, row": ("weight_scale", torch.rand(200, 1) + 0.1, (1, 300)),
    "Mistral": ("qscale_weight", torch.tensor(0.37), (200, 300)),
    "ComfyUI": ("scale_weight", torch.tensor(0.37), (200, 300)),
    "groups of 100": ("weight_scale", torch.rand(200, 3) + 0.1, (1, 100)),
}


@pytest.mark.parametrize("target", ["BF16", "F32"])
@pytest.mark.parametrize("name", sorted(SCALES))
def test_float8_times_its_scale(name: str, target: str, tmp_path: Path) -> None:
    part, scale, block = SCALES[name]
    values = float8()
    wide = 2.0 ** (scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    grid = (
        wide.reshape(-1, 1)
        if part == "weight_scale" and scale.ndim == 1
        else wide.reshape(2, 3)
        if scale.ndim == 4
        else wide
    )
    factor = grid.reshape(1, 1) if grid.numel() == 1 else grid
    exact = values.float() * spread(factor, block, (200, 300))
    tensors = {f"{Q}.weight": values, f"{Q}.{part}": scale, f"{Q}.input_scale": torch.tensor(1.0)}
    if name == "ComfyUI":
        tensors |= {
            "scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
            f"{Q}.scale_input": torch.tensor(1.0),
        }
    made = plain(
        directory(tmp_path / "source", tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
        target,
    )
    assert made.keys() == {f"{Q}.weight"}
    assert same(made[f"{Q}.weight"], rounded(exact, target))


def test_blocks_are_counted_from_the_first_element_whatever_divides(tmp_path: Path) -> None:
    """[200, 300] with 2 x 3 scales are blocks of 128, short at the edges: not of 100 x 100."""
    values, scale = float8(), torch.rand(2, 3) + 0.1
    tensors = {f"{Q}.weight": values, f"{Q}.weight_scale_inv": scale}
    made = plain(directory(tmp_path / "source", tensors), "F32")
    assert same(made[f"{Q}.weight"], values.float() * spread(scale, (128, 128), (200, 300)))


def test_packed_experts_have_scales_under_a_longer_name(tmp_path: Path) -> None:
    values = torch.stack([float8(seed=seed) for seed in range(3)])
    scale = torch.rand(3, 2, 3) + 0.1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    made = plain(directory(tmp_path / "source", {name: values, f"{name}_scale_inv": scale}), "F32")
    wanted = torch.stack(
        [each.float() * spread(s, (128, 128), (200, 300)) for each, s in zip(values, scale, strict=True)]
    )
    assert same(made[name], wanted)


def test_experts_that_were_transposed_have_a_scale_for_each_column(tmp_path: Path) -> None:
    """As FBGEMM has them: [experts, in, out] by [experts, 1, out]."""
    values = torch.stack([float8(64, 96, seed=seed) for seed in range(3)])
    scale = torch.rand(3, 1, 96) + 0.1
    name = "model.layers.0.mlp.experts.gate_up_proj"
    made = plain(directory(tmp_path / "source", {name: values, f"{name}_scale": scale}), "F32")
    assert same(made[name], values.float() * scale)


def test_experts_of_four_bits_that_are_called_integers(tmp_path: Path) -> None:
    packed = torch.randint(-128, 128, (6, 64), dtype=torch.int8)
    scale = torch.randint(110, 130, (6, 4), dtype=torch.uint8)
    floats = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    both = torch.stack([packed & 15, (packed >> 4) & 15], 2).reshape(6, 128).long()
    exact = floats[both] * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1)
    tensors = {f"{Q}.weight": packed, f"{Q}.scale": scale.view(torch.float8_e8m0fnu)}
    made = plain(directory(tmp_path / "source", tensors, {"quant_method": "fp8", "expert_dtype": "fp4"}))
    assert same(made[f"{Q}.weight"], exact.bfloat16())


# ------------------------------------------------------------------------------------------ modelopt


def test_modelopt_multiplies_scales_of_scales(tmp_path: Path) -> None:
    packed = torch.randint(0, 256, (6, 64), dtype=torch.uint8)
    scale, second = (torch.rand(6, 8) * 100).to(torch.float8_e4m3fn), torch.tensor(0.0123)
    floats = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    both = torch.stack([packed & 15, packed >> 4], 2).reshape(6, 128).long()
    exact = floats[both] * (scale.float() * second).repeat_interleave(16, 1)
    tensors = {
        f"{Q}.weight": packed,
        f"{Q}.weight_scale": scale,
        f"{Q}.weight_scale_2": second,
        f"{Q}.k_scale": second,
    }
    source = directory(tmp_path / "source", tensors)
    said = {"quantization": {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}}
    (source / "hf_quant_config.json").write_text(json.dumps(said))
    made = plain(source)
    assert same(made[f"{Q}.weight"], exact.bfloat16())
    assert not (tmp_path / "source-None" / "hf_quant_config.json").exists()


def test_modelopt_has_two_rows_in_a_byte(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (6, 256), dtype=torch.int8)
    scale = torch.rand(6, 2)
    packed = ((codes[0::2] & 15) | (codes[1::2] << 4)).view(torch.uint8)
    tensors = {f"{Q}.weight": packed, f"{Q}.weight_scale": scale}
    says = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}
    made = plain(directory(tmp_path / "source", tensors, says), "F32")
    assert same(made[f"{Q}.weight"], codes.float() * scale.repeat_interleave(128, 1))
    tensors[f"{Q}.pre_quant_scale"] = torch.rand(256)
    with pytest.raises(PlanError, match=r"not read here: .*pre_quant_scale"):
        streamconv.plan(directory(tmp_path / "other", tensors, says), recipe="dequantise")


# ----------------------------------------------------------------------------------------- GPTQ, AWQ


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [n, m] as a stream of bits along the first axis, by whole numbers of Python."""
    columns = []
    for column in codes.T.tolist():
        number = sum(code << (bits * at) for at, code in enumerate(column))
        raw = number.to_bytes(-(-len(column) * bits // 32) * 4, "little")
        columns.append(numpy.frombuffer(raw, numpy.int32))
    return torch.from_numpy(numpy.stack(columns, 1).copy())


def gptq(bits: int, *, symmetric: bool, first_version: bool, ordered: bool) -> tuple[Tensors, torch.Tensor]:
    """A layer as GPTQ packs it (AutoGPTQ: nn_modules/qlinear), and q less z times s in F32."""
    columns, rows, size = 128, 64, 32
    maker = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (columns, rows), generator=maker)
    points = torch.randint(1, 1 << bits, (columns // size, rows), generator=maker)
    if symmetric:
        points[:] = 1 << (bits - 1)
    scale = torch.rand(columns // size, rows, generator=maker).to(torch.float16)
    group = torch.arange(columns) // size
    if ordered:
        group = group[torch.randperm(columns, generator=maker)]
    parts = {
        f"{Q}.qweight": stream(codes, bits), f"{Q}.scales": scale,
        f"{Q}.qzeros": stream((points - int(first_version)).T, bits).T.contiguous(), f"{Q}.g_idx": group.to(torch.int32),
        f"{Q}.bias": torch.rand(rows).half(),
    }  # fmt: skip
    return parts, ((codes - points[group]).float() * scale.float()[group]).T


@pytest.mark.parametrize(("bits", "target"), [(2, "F32"), (3, "F32"), (4, "BF16"), (4, "F16"), (8, "F32")])
@pytest.mark.parametrize(
    ("symmetric", "first_version", "ordered"),
    [(True, True, True), (False, True, False), (False, False, True)],
)
def test_gptq(
    bits: int, symmetric: bool, first_version: bool, ordered: bool, target: str, tmp_path: Path
) -> None:
    parts, exact = gptq(bits, symmetric=symmetric, first_version=first_version, ordered=ordered)
    form = "gptq" if first_version else "gptq_v2"
    says = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": 32,
        "sym": symmetric,
        "checkpoint_format": form,
    }
    made = plain(directory(tmp_path / "source", parts, says), target)
    assert same(made[f"{Q}.weight"], rounded(exact, target))
    assert made[f"{Q}.bias"].dtype == TORCH[target]
    if not ordered:  # without the index, groups are in order
        del parts[f"{Q}.g_idx"]
        made = plain(directory(tmp_path / "other", parts, says), target)
        assert same(made[f"{Q}.weight"], rounded(exact, target))


@pytest.mark.parametrize("stored_less_one", [True, False])
@pytest.mark.parametrize("said", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_say_themselves_how_they_are_stored(
    stored_less_one: bool, said: str, tmp_path: Path
) -> None:
    parts, exact = gptq(4, symmetric=True, first_version=stored_less_one, ordered=False)
    says = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "checkpoint_format": said}
    source = directory(tmp_path / "source", parts, says)
    assert same(plain(source, "F32")[f"{Q}.weight"], exact)
    noted = any(
        "whatever the config says" in note for note in streamconv.plan(source, recipe="dequantise").notes
    )
    assert noted == (stored_less_one != (said == "gptq"))
    # One that is not like the first is found by the run.
    parts[f"{Q}.qzeros"][-1, -1] ^= 3
    with pytest.raises(ConversionError, match="zero points should be stored as"):
        plain(directory(tmp_path / "odd", parts, says), "F32")


def test_older_files_have_the_form_of_gptq_under_another_key(tmp_path: Path) -> None:
    parts, exact = gptq(4, symmetric=False, first_version=False, ordered=True)
    says = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "format": "gptq_v2"}
    assert same(plain(directory(tmp_path / "source", parts, says), "F32")[f"{Q}.weight"], exact)


@pytest.mark.parametrize("form", ["gptq_p", "marlin", "bitblas"])
def test_other_orders_of_bits_under_the_names_of_gptq_are_refused(form: str, tmp_path: Path) -> None:
    parts, _ = gptq(3, symmetric=False, first_version=False, ordered=True)
    says = {"quant_method": "gptq", "bits": 3, "group_size": 32, "sym": False, "checkpoint_format": form}
    with pytest.raises(PlanError, match=f"checkpoint_format is {form}"):
        streamconv.plan(directory(tmp_path / "source", parts, says), recipe="dequantise")


def test_awq_gemm(tmp_path: Path) -> None:
    """By the arithmetic of AutoAWQ (awq/utils/packing_utils.py, `dequantize_gemm`)."""
    columns, rows, size = 128, 64, 64
    codes, points = torch.randint(0, 16, (columns, rows)), torch.randint(0, 16, (columns // size, rows))
    scale = torch.rand(columns // size, rows).to(torch.float16)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(values: torch.Tensor) -> torch.Tensor:
        eights = values.reshape(len(values), -1, 8)[:, :, order].long()
        words = (eights << (4 * torch.arange(8))).sum(2)
        return (words - ((words >> 31) << 32)).to(torch.int32)

    parts = {f"{Q}.qweight": packed(codes), f"{Q}.qzeros": packed(points), f"{Q}.scales": scale}
    says = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    theirs = (codes - points.repeat_interleave(size, 0)) * scale.repeat_interleave(size, 0)
    assert same(plain(directory(tmp_path / "source", parts, says), "F16")[f"{Q}.weight"], theirs.T)
    gemv = {
        f"{Q}.qweight": stream(codes, 4).T, f"{Q}.qzeros": stream(torch.nn.functional.pad(points, (0, 0, 0, 14)), 4).T,
        f"{Q}.scales": torch.nn.functional.pad(scale, (0, 0, 0, 14)).T,
    }  # fmt: skip
    made = plain(directory(tmp_path / "gemv", gemv, {**says, "version": "gemv"}), "F16")
    assert same(made[f"{Q}.weight"], theirs.T)
    with pytest.raises(PlanError, match="its version is marlin; gemm and gemv are read"):
        plain(directory(tmp_path / "marlin", parts, {**says, "version": "marlin"}), "F16")


# ------------------------------------------------------------------------------------- bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (48, 64)), ("F16", (7, 33)), ("F32", (7, 33))])
def test_bitsandbytes_of_four_bits(
    kind: str, nested: bool, dtype: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    packed, state = bnb.quantize_4bit(
        weight(*shape, TORCH[dtype]), blocksize=64, compress_statistics=nested, quant_type=kind
    )
    parts = {f"{Q}.weight": packed} | {
        f"{Q}.weight.{name}": each for name, each in state.as_dict(packed=True).items()
    }
    says = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    made = plain(directory(tmp_path / "source", parts, says), dtype)
    assert same(made[f"{Q}.weight"], bnb.dequantize_4bit(packed, state))
    if dtype == "BF16" and not packed.numel() % 2:  # bytes that are called floats
        parts[f"{Q}.weight"] = packed.reshape(-1).view(torch.bfloat16).reshape(-1, 1)
        assert same(
            plain(directory(tmp_path / "floats", parts, says))[f"{Q}.weight"],
            bnb.dequantize_4bit(packed, state),
        )


def test_bitsandbytes_of_eight_bits(tmp_path: Path) -> None:
    codes, scale, _ = bnb.int8_vectorwise_quant(weight(48, 64, torch.float16))
    parts = {
        f"{Q}.weight": codes,
        f"{Q}.SCB": scale,
        f"{Q}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    source = directory(tmp_path / "source", parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    assert same(plain(source, "F32")[f"{Q}.weight"], bnb.int8_vectorwise_dequant(codes, scale))
    parts[f"{Q}.weight_format"] += 1
    with pytest.raises(PlanError, match="weight_format"):
        streamconv.plan(directory(tmp_path / "other", parts), recipe="dequantise")


# -------------------------------------------------------------------------- rows of integers, torchao


@targets
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_integers_as_models_pack_them_themselves(bits: int, target: str, tmp_path: Path) -> None:
    """The kernel's shifts (THUDM/chatglm2-6b-int4: quantization.py): the high four bits are the first column."""
    held, scale = torch.randint(-128, 128, (30, 20), dtype=torch.int8), torch.rand(30).half()
    codes = torch.stack([held >> 4, (held << 4) >> 4], 2).reshape(30, 40) if bits == 4 else held
    name = "transformer.encoder.layers.0.self_attention.dense"
    source = directory(
        tmp_path / "source",
        {f"{name}.weight": held, f"{name}.weight_scale": scale},
        model_type="chatglm",
        quantization_bit=bits,
    )
    made = plain(source, target)
    assert same(made[f"{name}.weight"], rounded(codes.float() * scale.float()[:, None], target))


@pytest.mark.parametrize(
    ("kind", "codes", "scale", "zero"),
    [
        ("Int8Tensor", torch.int8, torch.rand(30, 1), None),
        ("Float8Tensor", torch.float8_e4m3fn, torch.rand(30, 1), None),
        ("IntxUnpackedToInt8Tensor", torch.int8, torch.rand(30, 2).bfloat16(), torch.randint(-8, 8, (30, 2)).to(torch.int8)),
    ],
)  # fmt: skip
def test_torchao_as_safetensors(
    kind: str, codes: torch.dtype, scale: torch.Tensor, zero: Any, tmp_path: Path
) -> None:
    held = (torch.randn(30, 64) * 5).to(codes)
    parts = {f"{Q}._weight_qdata": held, f"{Q}._weight_scale": scale} | (
        {} if zero is None else {f"{Q}._weight_zero_point": zero}
    )
    entry = json.dumps(
        {"_type": kind, "_data": {"block_size": [1, 64]}, "_tensor_data_names": ["qdata", "scale"]}
    )
    source = directory(tmp_path / "source", parts, {"quant_method": "torchao"}, {f"{Q}.weight": entry})
    points = 0 if zero is None else zero.float().repeat_interleave(32, 1)
    exact = (held.float() - points) * scale.float().repeat_interleave(64 // scale.shape[1], 1)
    assert same(plain(source)[f"{Q}.weight"], exact.bfloat16())
    other = directory(
        tmp_path / "other",
        parts,
        {"quant_method": "torchao"},
        {f"{Q}.weight": entry.replace(kind, "MXTensor")},
    )
    with pytest.raises(PlanError, match="MXTensor is not read here"):
        streamconv.plan(other, recipe="dequantise")


def test_what_metadata_says_of_a_layout_is_heard(tmp_path: Path) -> None:
    """ComfyUI's NVFP4 has the tensors of modelopt's, and scales in another order."""
    parts = {f"{Q}.weight": float8(), f"{Q}.weight_scale": torch.tensor(0.5)}
    for form, convrot in (("nvfp4", False), ("float8_e4m3fn", True)):
        says = {"format_version": "1.0", "layers": {Q: {"format": form, "convrot": convrot}}}
        source = directory(tmp_path / form, parts, None, {"_quantization_metadata": json.dumps(says)})
        with pytest.raises(PlanError, match=f"says {form} of it"):
            streamconv.plan(source, recipe="dequantise")
    says = {"format_version": "1.0", "layers": {Q: {"format": "float8_e4m3fn"}}}
    source = directory(tmp_path / "plain", parts, None, {"_quantization_metadata": json.dumps(says)})
    assert same(plain(source)[f"{Q}.weight"], (float8().float() * 0.5).bfloat16())


# -------------------------------------------------------------------------------------- what is refused

_X = torch.zeros(8, 4, dtype=torch.int32)
REFUSED: dict[str, tuple[Mapping[str, torch.Tensor], Any, str]] = {
    "HQQ": ({"W_q": _X.to(torch.uint8), "scale": torch.ones(8), "zero": torch.ones(8)}, {"quant_method": "hqq"}, "not read here: .*W_q"),
    "quanto": ({"weight._data": _X.to(torch.int8), "weight._scale": torch.ones(8, 1)}, None, "not read here"),
    "FP-Quant": ({"qweight": _X.to(torch.uint8), "scales": _X.to(torch.uint8), "forward_hadamard_matrix": torch.ones(2)}, None, "not read here"),
    "SVDQuant": (
        {"weight": _X.to(torch.uint8), "weight_scale": torch.ones(8, 1).to(torch.float8_e4m3fn), "weight_scale_2": torch.ones(()),
         "svdquant_lora_a": torch.ones(2)}, {"quant_method": "modelopt"}, "not read here",
    ),
    "a scale that is missing": ({"weight": float8(8, 8)}, {"quant_method": "fp8"}, "its scales are not there"),
    "a weight that is missing": ({"weight_scale_inv": torch.ones(1, 1), "weight": torch.ones(4, 4)}, {"quant_method": "fp8"}, "no tensor is quantised"),
    "scales for other rows": ({"weight": float8(8, 8), "weight_scale": torch.ones(1, 8)}, {"quant_method": "modelopt"}, r"scales are \[1, 8\]"),
    "scales of no shape that fits": ({"weight": float8(9, 9), "weight_scale": torch.ones(2, 2)}, {"quant_method": "fp8"}, r"\[1, 1\] expected"),
    "2:4": ({"weight_packed": _X, "weight_scale": torch.ones(8, 1)}, {"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24: half"),
    "rotated": (
        {"weight_packed": _X, "weight_scale": torch.ones(8, 1)},
        {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}}, "weights are rotated",
    ),
    "bits that do not fit": (
        {"weight_packed": _X, "weight_scale": torch.ones(8, 1)},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 128}}}},
        "which is none of the",
    ),
    "nothing": ({"weight": torch.ones(2, 2)}, None, "no tensor is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_understood_is_refused(name: str, tmp_path: Path) -> None:
    parts, says, message = REFUSED[name]
    source = directory(tmp_path / "source", {f"{Q}.{part}": each for part, each in parts.items()}, says)
    with pytest.raises(PlanError, match=message):
        streamconv.plan(source, recipe="dequantise")


def test_a_file_of_settings_that_is_damaged_is_named(tmp_path: Path) -> None:
    source = directory(tmp_path / "source", {f"{Q}.weight": float8(), f"{Q}.weight_scale": torch.ones(2, 3)})
    (source / "hf_quant_config.json").write_text("{")
    with pytest.raises(PlanError, match=r"hf_quant_config\.json: it is not JSON"):
        streamconv.plan(source, recipe="dequantise")


def test_a_weight_that_the_config_ignores_and_has_no_scale_is_a_cast(tmp_path: Path) -> None:
    tensors = {
        f"{Q}.weight": float8(),
        f"{Q}.weight_scale_inv": torch.ones(2, 3),
        "lm_head.weight": float8(seed=2),
    }
    says = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    made = plain(directory(tmp_path / "source", tensors, says))
    assert same(made["lm_head.weight"], tensors["lm_head.weight"].to(torch.bfloat16))


def test_a_dtype_for_some_is_made_without_another_between(tmp_path: Path) -> None:
    tensors = {f"{Q}.weight": float8(), f"{Q}.weight_scale_inv": torch.rand(2, 3)}
    source = directory(tmp_path / "source", tensors)
    streamconv.convert(
        source, tmp_path / "out", recipe="dequantise", dtype=["BF16", "*.q_proj.weight=F32"], engine="inline"
    )
    exact = tensors[f"{Q}.weight"].float() * spread(tensors[f"{Q}.weight_scale_inv"], (128, 128), (200, 300))
    assert same(everything(tmp_path / "out")[f"{Q}.weight"], exact)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_parts_with_any_number_of_axes_are_planned_or_refused(scheme: Scheme) -> None:
    said = {
        "bits": 4,
        "quantization_bit": 4,
        "group_size": 2,
        "config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 2}}},
    }
    dtypes = {**scheme.parts, **scheme.more}
    for odd in dtypes:
        for axes in range(5):
            parts = {
                part: apply(Fill((known or ("U8",))[0], (2,) * (axes if part == odd else 2), 1))[0]
                for part, known in dtypes.items()
            }
            told = Told({"quant_method": (scheme.methods or ("",))[0], **said})
            with suppress(PlanError):
                spec = scheme.make(Layer(Q, parts, told, "BF16", {}, [])).spec
                assert spec.dtype.name in FLOATS
