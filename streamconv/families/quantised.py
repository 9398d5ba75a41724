"""Quantised weights made plain, and BF16 to block-scaled FP8: for every architecture that is stored so.

Rules here go by the endings of names, not by an architecture's table.

Facts: deepseek-ai/DeepSeek-V3 (inference/fp8_cast_bf16.py: weight times `weight_scale_inv` of its block, blocks
at the edges are short), huggingface/transformers 5.23.0 (integrations/finegrained_fp8.py, integrations/mxfp4.py,
models/gpt_oss: dequantised experts are transposed), openai/gpt-oss (gpt_oss/torch/weights.py).
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from streamconv.plans.architecture import Config
from streamconv.plans.dequantise import FOUND_BY, dequantised, without_settings
from streamconv.plans.quantise import FORMS, quantised
from streamconv.plans.recipe import Recipe, Refusal, Rule

_BLOCK = [128, 128]

# Linear layers, which are what is quantised: not norms, embeddings, heads, routers.
_LINEAR = ("*_proj.weight", "*_proj_with_mqa.weight")

# Weights that are computed with as one (vllm-project/llm-compressor 0.14: entrypoints/model_free).
_FUSED = tuple(
    re.compile(text)
    for text in (
        r"(?P<where>.*(attn|attention|self_attn)\.)(q|k|v)_proj\.weight",
        r"(?P<where>.*(mlp|feed_forward|experts\.\d+)\.)(gate|up)_proj\.weight",
        r"(?P<where>.*\.)(w1|w3)\.weight",
        r"(?P<where>.*\.)(wq_a|wkv_a_with_mqa)\.weight",
    )
)


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


DEQUANTISE = Recipe(
    name="dequantise",
    title="quantised weights of any scheme that is known -> BF16, F16 or F32, any architecture",
    aliases=("fp8-bf16", "mxfp4-bf16", "dequantize"),
    makes=dequantised,
    files=without_settings,
    one_way="what quantising rounded is lost",
    found_by_any=FOUND_BY,
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
    one_way="quantising rounds; `dequantise` undoes it",
)
QUANTISE = tuple(
    Recipe(
        name=form.name,
        title=f"BF16, F16, F32 -> {form.title} in its linear layers, as compressed-tensors, any architecture",
        aliases=(form.name.replace("quantise", "quantize"),),
        makes=partial(quantised, form=form, fused=_FUSED),
        ignores=True,
        one_way="quantising rounds; `dequantise` undoes it",
    )
    for form in FORMS
)

RECIPES = (DEQUANTISE, BF16_FP8, *QUANTISE)
