"""Quantised weights to BF16, and BF16 to block-scaled FP8: for every architecture that is stored so.

Rules here go by the endings of names, not by an architecture's table.

Facts: deepseek-ai/DeepSeek-V3 (inference/fp8_cast_bf16.py: weight times `weight_scale_inv` of its block, blocks
at the edges are short), huggingface/transformers 5.23.0 (integrations/finegrained_fp8.py, integrations/mxfp4.py,
models/gpt_oss: dequantised experts are transposed), openai/gpt-oss (gpt_oss/torch/weights.py).
"""

from __future__ import annotations

from typing import Any

from streamconv.plans.architecture import Config
from streamconv.plans.recipe import Recipe, Refusal, Rule

_BLOCK = [128, 128]

# Linear layers, which are what is quantised: not norms, embeddings, heads, routers.
_LINEAR = ("*_proj.weight", "*_proj_with_mqa.weight")


def _plain(config: Config) -> dict[str, Any]:
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    return _stored_as(made, "bfloat16")


def _stored_as(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with the dtype that it states, under whichever key, replaced."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, dtype)


def _block_scaled(config: Config) -> dict[str, Any]:
    return _stored_as(dict(config), "bfloat16") | {
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": _BLOCK,
        }
    }


def _other_than(method: str, title: str) -> Refusal:
    stated = "quantization_config and quantization_config['quant_method']"
    return Refusal(
        f"{stated} and {stated} != '{method}'",
        f"its config says that it is quantised in another way than {title}",
        "`streamconv recipes` lists what can be dequantised",
    )


FP8_BF16 = Recipe(
    name="fp8-bf16",
    title="block-scaled FP8 (DeepSeek-V3, Qwen3 FP8) -> BF16, any architecture",
    sizes={"block": "(quantization_config and quantization_config['weight_block_size']) or [128, 128]"},
    rules=(
        Rule(
            # Also packed experts, which are bare parameters without `.weight`.
            {"w": "*", "scale": "*_scale_inv"},
            {"w": "*"},
            "w = dequant_blocks(w, scale, block)",
            optional=True,
        ),
        Rule("*", "*"),
    ),
    config=_plain,
    refuses=(_other_than("fp8", "block-scaled FP8"),),
    one_way="what FP8 rounded is lost; `bf16-fp8` quantises",
    found_by=("*_scale_inv",),
)
BF16_FP8 = Recipe(
    name="bf16-fp8",
    title="BF16, F16, F32 -> block-scaled FP8 (128 x 128) in its linear layers, any architecture",
    sizes={"block": "[128, 128]"},
    rules=(
        *(
            Rule(
                pattern,
                {"w": pattern, "scale": pattern + "_scale_inv"},
                "w, scale = quant_blocks(x, block)",
            )
            for pattern in _LINEAR
        ),
        Rule("*", "*"),
    ),
    config=_block_scaled,
    refuses=(Refusal("quantization_config", "it is quantised already", "dequantise it first"),),
    one_way="quantising rounds; `fp8-bf16` dequantises",
)
MXFP4_BF16 = Recipe(
    name="mxfp4-bf16",
    title="MXFP4 (gpt-oss) -> BF16, exact",
    rules=(
        Rule(
            {"blocks": "*_blocks", "scales": "*_scales"},
            "*",
            "x = transpose(dequant_mxfp4(blocks, scales))",
            optional=True,
        ),
        Rule("*", "*"),
    ),
    config=_plain,
    refuses=(_other_than("mxfp4", "MXFP4"),),
    one_way="nothing quantises to MXFP4 here",
    found_by=("*_blocks", "*_scales"),
)

RECIPES = (FP8_BF16, BF16_FP8, MXFP4_BF16)
