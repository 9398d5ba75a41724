"""CogVLM2, Qwen-VL and Swin to MindFormers and back, against the official converters' rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mindformers_contract import ShapesContract, Tensors, assert_same, bare, tensors_of
from recipe_contract import contents
from safetensors.torch import save_file

import streamconv

HIDDEN, FFN, VOCAB, LAYERS, DIM, HEADS, GROUPS = 32, 48, 64, 2, 8, 4, 2
SEEN, SEEN_FFN, SEEN_LAYERS, PATCH, POSITIONS = 24, 40, 2, 4, 5
Shapes = dict[str, tuple[int, ...]]

COGVLM2 = {
    "architectures": ["CogVLMForCausalLM"], "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_multi_query_heads": GROUPS,
    "vision_config": {
        "num_hidden_layers": SEEN_LAYERS, "hidden_size": SEEN, "intermediate_size": SEEN_FFN, "in_channels": 3,
        "patch_size": PATCH, "num_positions": POSITIONS,
    },
}  # fmt: skip


def cogvlm2_shapes(*, image: bool) -> Shapes:
    rows = (HEADS + 2 * GROUPS) * DIM
    made: Shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN),
        "model.vision.boi": (1, 1, HIDDEN), "model.vision.eoi": (1, 1, HIDDEN),
        "model.vision.conv.weight": (SEEN, SEEN, 2, 2), "model.vision.conv.bias": (SEEN,),
        "model.vision.linear_proj.linear_proj.weight": (HIDDEN, SEEN),
        "model.vision.linear_proj.norm1.weight": (HIDDEN,), "model.vision.linear_proj.norm1.bias": (HIDDEN,),
        "model.vision.linear_proj.dense_h_to_4h.weight": (FFN, HIDDEN),
        "model.vision.linear_proj.gate_proj.weight": (FFN, HIDDEN),
        "model.vision.linear_proj.dense_4h_to_h.weight": (HIDDEN, FFN),
        "model.vision.patch_embedding.proj.weight": (SEEN, 3, PATCH, PATCH),
        "model.vision.patch_embedding.proj.bias": (SEEN,),
        "model.vision.patch_embedding.cls_embedding": (1, SEEN),
        "model.vision.patch_embedding.position_embedding.weight": (POSITIONS, SEEN),
    }  # fmt: skip
    for layer in range(LAYERS):
        block = f"model.layers.{layer}."
        made |= {
            block + "input_layernorm.weight": (HIDDEN,),
            block + "post_attention_layernorm.weight": (HIDDEN,),
            block + "self_attn.rotary_emb.inv_freq": (DIM // 2,),
        }
        for expert in ("language", "vision") if image else ("language",):
            made |= {
                block + f"self_attn.{expert}_expert_query_key_value.weight": (rows, HIDDEN),
                block + f"self_attn.{expert}_expert_dense.weight": (HIDDEN, HEADS * DIM),
                block + f"mlp.{expert}_mlp.gate_proj.weight": (FFN, HIDDEN),
                block + f"mlp.{expert}_mlp.up_proj.weight": (FFN, HIDDEN),
                block + f"mlp.{expert}_mlp.down_proj.weight": (HIDDEN, FFN),
            }
        if image:
            made[block + "self_attn.vision_expert_query_key_value.bias"] = (rows,)
    for layer in range(SEEN_LAYERS):
        block = f"model.vision.transformer.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made |= {f"{block}{norm}.weight": (SEEN,), f"{block}{norm}.bias": (SEEN,)}
        for name, out, into in (
            ("attention.query_key_value", 3 * SEEN, SEEN),
            ("attention.dense", SEEN, SEEN),
            ("mlp.fc1", SEEN_FFN, SEEN),
            ("mlp.fc2", SEEN, SEEN_FFN),
        ):
            made |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
    return made


def seeing(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    """`name_replace_visual` and `name_replace_adapter`."""
    if key.endswith("cls_embedding"):
        return "vision_encoder.cls_token", value.unsqueeze(0)
    if key.endswith("position_embedding.weight"):
        return "vision_encoder.pos_embed", value.unsqueeze(0)
    if key.startswith("model.vision.patch_embedding.proj"):
        return key.replace("model.vision.patch_embedding", "vision_encoder.patch_embed"), value
    if key.startswith("model.vision.transformer"):
        for old, new in (
            ("model.vision.transformer.layers", "vision_encoder.blocks"),
            ("attention.dense", "attn.proj"),
            ("attention.query_key_value", "attn.qkv"),
            ("post_attention_layernorm.weight", "norm2.gamma"),
            ("post_attention_layernorm.bias", "norm2.beta"),
            ("input_layernorm.weight", "norm1.gamma"),
            ("input_layernorm.bias", "norm1.beta"),
        ):
            key = key.replace(old, new)
        return key, value
    if key.startswith("model.vision"):
        key = key.replace("model.vision", "mlp_adapter")
        return key.replace("norm1.weight", "norm1.gamma").replace("norm1.bias", "norm1.beta"), value
    return None


class _Cogvlm2(ShapesContract):
    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        super().make_hf(number, directory, dtype)
        state = tensors_of(directory)
        first = state["model.layers.0.self_attn.rotary_emb.inv_freq"]
        state |= {name: first.clone() for name in state if name.endswith("inv_freq")}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


class TestCogvlm2Video(_Cogvlm2):
    recipe = "mindformers-cogvlm2-video"
    configs: ClassVar = ({**COGVLM2, "architectures": ["CogVLMVideoForCausalLM"]},)
    prefix = "llm_model."

    def shapes(self, config: dict[str, Any]) -> Shapes:
        return cogvlm2_shapes(image=False)

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made: Tensors = {}
        for key, value in state.items():
            seen = seeing(key, value)
            if seen is not None:
                made[seen[0]] = seen[1]
            elif key.endswith("inv_freq"):
                made.setdefault(self.prefix + "model.freqs_mgr.freqs", value)
            elif key.endswith("language_expert_query_key_value.weight"):
                sizes = [HEADS * DIM, GROUPS * DIM, GROUPS * DIM]
                for part, rows in zip("qkv", value.split(sizes), strict=True):
                    name = key.replace("self_attn.language_expert_query_key_value", f"attention.w{part}")
                    made[self.prefix + name] = rows
            else:
                for old, new in (
                    ("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight"),
                    ("input_layernorm", "attention_norm"),
                    ("self_attn.language_expert_dense", "attention.wo"),
                    ("mlp.language_mlp.gate_proj", "feed_forward.w1"),
                    ("mlp.language_mlp.up_proj", "feed_forward.w3"),
                    ("mlp.language_mlp.down_proj", "feed_forward.w2"),
                    ("post_attention_layernorm", "ffn_norm"),
                    ("model.norm.weight", "model.norm_out.weight"),
                ):
                    key = key.replace(old, new)
                made[self.prefix + key] = value
        return made


class TestCogvlm2VideoLora(TestCogvlm2Video):
    recipe = "mindformers-cogvlm2-video-lora"
    prefix = "llm_model.pet_model.lora_model."


class TestCogvlm2Image(_Cogvlm2):
    recipe = "mindformers-cogvlm2-image"
    configs: ClassVar = (COGVLM2,)

    def shapes(self, config: dict[str, Any]) -> Shapes:
        return cogvlm2_shapes(image=True)

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made: Tensors = {}
        for key, value in state.items():
            seen = seeing(key, value)
            if seen is not None:
                made[seen[0]] = seen[1]
            elif key.endswith("inv_freq"):
                made.setdefault("llm_model.model.freqs_mgr.freqs", value)
            else:
                key = key.replace("model.embed_tokens.weight", "model.tok_embeddings.embedding_weight")
                key = key.replace("model.norm.weight", "model.norm_out.weight")
                for expert in ("language", "vision"):
                    for theirs, ours in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
                        key = key.replace(f"mlp.{expert}_mlp.{theirs}_proj", f"mlp.{expert}_mlp.{ours}")
                made["llm_model." + key] = value
        return made


OUT, QWEN_SEEN, QWEN_SEEN_HEADS = 16, 24, 3
QWENVL = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "vocab_size": VOCAB, "hidden_size": HIDDEN,
    "intermediate_size": 2 * FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "kv_channels": DIM,
    "visual": {
        "width": QWEN_SEEN, "layers": 2, "heads": QWEN_SEEN_HEADS, "mlp_ratio": 4.9231, "output_dim": OUT, "patch_size": PATCH,
        "image_size": 448,
    },
}  # fmt: skip


class TestQwenVl(ShapesContract):
    recipe = "mindformers-qwenvl"
    configs: ClassVar = (QWENVL,)
    concat = False

    def shapes(self, config: dict[str, Any]) -> Shapes:
        made: Shapes = {
            "transformer.wte.weight": (VOCAB, HIDDEN), "transformer.ln_f.weight": (HIDDEN,),
            "lm_head.weight": (VOCAB, HIDDEN),
        }  # fmt: skip
        for layer in range(LAYERS):
            block = f"transformer.h.{layer}."
            made |= {
                block + "ln_1.weight": (HIDDEN,), block + "ln_2.weight": (HIDDEN,),
                block + "attn.c_attn.weight": (3 * HIDDEN, HIDDEN), block + "attn.c_attn.bias": (3 * HIDDEN,),
                block + "attn.c_proj.weight": (HIDDEN, HIDDEN), block + "mlp.w1.weight": (FFN, HIDDEN),
                block + "mlp.w2.weight": (FFN, HIDDEN), block + "mlp.c_proj.weight": (HIDDEN, FFN),
            }  # fmt: skip
        ffn = int(QWEN_SEEN * 4.9231)
        visual: Shapes = {
            "positional_embedding": (256, QWEN_SEEN), "proj": (OUT, OUT), "conv1.weight": (QWEN_SEEN, 3, PATCH, PATCH),
            "attn_pool.pos_embed": (256, OUT), "attn_pool.query": (256, OUT),
            "attn_pool.kv_proj.weight": (OUT, QWEN_SEEN), "attn_pool.attn.in_proj_weight": (3 * OUT, OUT),
            "attn_pool.attn.in_proj_bias": (3 * OUT,), "attn_pool.attn.out_proj.weight": (OUT, OUT),
            "attn_pool.attn.out_proj.bias": (OUT,),
        }  # fmt: skip
        norms = {"ln_pre": QWEN_SEEN, "ln_post": OUT, "attn_pool.ln_q": OUT, "attn_pool.ln_kv": OUT}
        for layer in range(2):
            block = f"transformer.resblocks.{layer}."
            norms |= {block + "ln_1": QWEN_SEEN, block + "ln_2": QWEN_SEEN}
            for name, out, into in (
                ("attn.in_proj", 3 * QWEN_SEEN, QWEN_SEEN),
                ("attn.out_proj", QWEN_SEEN, QWEN_SEEN),
                ("mlp.c_fc", ffn, QWEN_SEEN),
                ("mlp.c_proj", QWEN_SEEN, ffn),
            ):
                visual |= {f"{block}{name}.weight": (out, into), f"{block}{name}.bias": (out,)}
        visual |= {f"{name}.{leaf}": (size,) for name, size in norms.items() for leaf in ("weight", "bias")}
        return made | {f"transformer.visual.{name}": shape for name, shape in visual.items()}

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made: Tensors = {}
        for name, value in state.items():
            if "visual" in name:
                made |= self.seen("vision_encoder." + name.replace("transformer.visual.", ""), value)
                continue
            for old, new in (
                (".h.", ".layers."),
                (".wte.weight", ".wte.embedding_weight"),
                ("attn.c_proj.", "attention.wo."),
                ("ln_1.", "attention_norm."),
                ("ln_2.", "ffn_norm."),
                ("mlp.w1.", "feed_forward.w1."),
                ("mlp.w2.", "feed_forward.w3."),
                ("mlp.c_proj.", "feed_forward.w2."),
            ):
                name = name.replace(old, new)
            name = "llm_model." + name
            if "attn.c_attn" not in name:
                made[name] = value
            elif self.concat:
                made[name.replace("attn.c_attn", "attention.w")] = value
            else:
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    made[name.replace("attn.c_attn", f"attention.w{part}")] = rows
        return made

    @staticmethod
    def seen(name: str, value: torch.Tensor) -> Tensors:
        if "ln" in name:
            return {name.replace("weight", "gamma").replace("bias", "beta"): value}
        if "attn_pool" in name and "in_proj_" in name:
            return {
                name.replace("in_proj_", f"dense{number}."): part
                for number, part in enumerate(value.chunk(3), 1)
            }
        if "in_proj" in name:
            pieces = value.chunk(3 * QWEN_SEEN_HEADS)
            return {
                name.replace("in_proj", f"dense{part + 1}"): torch.cat(pieces[part::3]) for part in range(3)
            }
        if "out_proj" in name:
            return {name.replace("out_proj", "projection"): value.T if "weight" in name else value}
        return {name: value}


class TestQwenVlConcat(TestQwenVl):
    recipe = "mindformers-qwenvl-concat"
    concat = True


WIDTH, DEPTHS, SWIN_HEADS, WINDOW, IMAGE = 8, (2, 1), (2, 4), 3, 24
SWIN = {
    "model_type": "swin-microsoft", "embed_dim": WIDTH, "depths": list(DEPTHS), "num_heads": list(SWIN_HEADS),
    "window_size": WINDOW, "patch_size": PATCH, "in_chans": 3, "img_size": IMAGE, "num_classes": 10,
}  # fmt: skip


class TestSwin(ShapesContract):
    recipe = "mindformers-swin"
    configs: ClassVar = (SWIN,)
    prefix, head = "", True

    def shapes(self, config: dict[str, Any]) -> Shapes:
        made: Shapes = {
            "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,),
            "patch_embed.norm.weight": (WIDTH,), "patch_embed.norm.bias": (WIDTH,),
            "norm.weight": (2 * WIDTH,), "norm.bias": (2 * WIDTH,),
            "layers.0.downsample.reduction.weight": (2 * WIDTH, 4 * WIDTH),
            "layers.0.downsample.norm.weight": (4 * WIDTH,), "layers.0.downsample.norm.bias": (4 * WIDTH,),
            "layers.0.blocks.1.attn_mask": ((IMAGE // PATCH // WINDOW) ** 2, WINDOW**2, WINDOW**2),
        }  # fmt: skip
        for stage, depth in enumerate(DEPTHS):
            wide = WIDTH * 2**stage
            for block in range(depth):
                name = f"layers.{stage}.blocks.{block}."
                made |= {
                    name + "norm1.weight": (wide,), name + "norm1.bias": (wide,), name + "norm2.weight": (wide,),
                    name + "norm2.bias": (wide,),
                    name + "attn.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, SWIN_HEADS[stage]),
                    name + "attn.relative_position_index": (WINDOW**2, WINDOW**2),
                    name + "attn.qkv.weight": (3 * wide, wide), name + "attn.qkv.bias": (3 * wide,),
                    name + "attn.proj.weight": (wide, wide), name + "attn.proj.bias": (wide,),
                    name + "mlp.fc1.weight": (4 * wide, wide), name + "mlp.fc1.bias": (4 * wide,),
                    name + "mlp.fc2.weight": (wide, 4 * wide), name + "mlp.fc2.bias": (wide,),
                }  # fmt: skip
        made = {self.prefix + name: shape for name, shape in made.items()}
        return made | self.rest()

    def rest(self) -> Shapes:
        return {"head.weight": (10, 2 * WIDTH), "head.bias": (10,)}

    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        super().make_hf(number, directory, dtype)
        state = tensors_of(directory)
        state |= {name: torch.arange(81).reshape(9, 9) for name in state if name.endswith("position_index")}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})

    def official(self, state: Tensors, config: dict[str, Any]) -> Tensors:
        made: Tensors = {}
        for key, value in state.items():
            if "head" in key:
                made[key] = value
                continue
            key = key.replace("decoder.0", "decoder")
            if "patch_embed." in key:
                key = key.replace("proj", "projection")
            key = key.replace("relative_position", "relative_position_bias.relative_position", 1)
            if "norm" in key:
                key = key.replace(".weight", ".gamma").replace(".bias", ".beta")
            for old, new in ((".fc1", ".mapping"), (".fc2", ".projection")):
                if old in key:
                    key = key.replace(old, new)
                    value = value.T if "weight" in key else value
            if not key.startswith(("encoder.", "decoder")):
                key = "encoder." + key
            if ".qkv" in key:
                for part, rows in zip("qkv", value.chunk(3), strict=True):
                    made[key.replace(".qkv", f".{part}")] = rows
            else:
                made[key] = value
        return made

    def test_shapes_say_all_of_it_both_ways(self, source: Path, tmp_path: Path) -> None:
        """Microsoft's files hold the tensors under `model`, and no config lies beside them."""
        state = tensors_of(tmp_path / "hf")
        torch.save({"model": state}, tmp_path / "swin.pth")
        streamconv.convert(
            tmp_path / "swin.pth", tmp_path / "made", recipe=self.recipe, reverse=True, engine="inline"
        )
        assert contents(tmp_path / "made") == contents(source)
        streamconv.convert(bare(source), tmp_path / "back", to_arch="hf", to="torch", engine="inline")
        loaded = torch.load(tmp_path / "back/swin.pth", weights_only=True)
        assert_same(loaded["model"], state)


class TestSwinPretrained(TestSwin):
    recipe = "mindformers-swin-pretrained"
    configs: ClassVar = ({**SWIN, "num_classes": 0, "encoder_stride": 8},)
    prefix = "encoder."

    def rest(self) -> Shapes:
        return {
            "encoder.mask_token": (1, 1, WIDTH),
            "decoder.0.weight": (192, 2 * WIDTH, 1, 1),
            "decoder.0.bias": (192,),
        }


def test_a_frequency_that_differs_between_layers_is_not_dropped_silently(tmp_path: Path) -> None:
    TestCogvlm2Video().make_hf(0, tmp_path / "hf", torch.float32)
    state = tensors_of(tmp_path / "hf")
    state["model.layers.1.self_attn.rotary_emb.inv_freq"] += 1
    save_file(state, tmp_path / "hf/model.safetensors")
    with pytest.raises(Exception, match="must be equal"):
        streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
