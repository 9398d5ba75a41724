"""GLM from Hugging Face to MindFormers and back, in all layouts, against the official converter's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from mindformers_contract import ReferenceContract, Tensors
from recipe_contract import contents
from reference_models import chatglm

import streamconv
from streamconv.errors import PlanError


def rearranged(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """`rearrange_w` and `rearrange_b`."""
    heads = tensor.reshape(len(tensor) // dim, dim, *tensor.shape[1:])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).reshape(tensor.shape)


def split_qkv(tensor: torch.Tensor, config: Any) -> list[torch.Tensor]:
    rows = config.kv_channels * config.num_attention_heads
    groups = config.multi_query_group_num if config.multi_query_attention else config.num_attention_heads
    return list(torch.split(tensor, [rows, groups * config.kv_channels, groups * config.kv_channels]))


class TestGlm(ReferenceContract):
    recipe = "mindformers-glm-n"
    module = chatglm
    configs: ClassVar = (
        chatglm.Config(),
        chatglm.Config(multi_query_attention=False),
        chatglm.Config(add_bias_linear=True),
        chatglm.Config(add_qkv_bias=False),
    )
    rearranges, splits = False, False

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for name, tensor in state.items():
            if "query_key_value" in name and (self.rearranges or self.splits):
                parts = split_qkv(tensor, config)
                if self.rearranges:
                    parts[:2] = [rearranged(part, config.kv_channels) for part in parts[:2]]
                if self.splits:
                    made |= {
                        name.replace("query_key_value", f"w{letter}"): part
                        for letter, part in zip("qkv", parts, strict=True)
                    }
                else:
                    made[name] = torch.cat(parts)
            elif "dense_h_to_4h" in name and self.splits:
                made[name.replace("dense_h_to_4h", "dense_left")] = tensor[: config.ffn_hidden_size]
                made[name.replace("dense_h_to_4h", "dense_right")] = tensor[config.ffn_hidden_size :]
            else:
                made[name.replace("word_embeddings.weight", "embedding_weight")] = tensor
        return made


class TestGlmSplit(TestGlm):
    recipe = "mindformers-glm-n-split"
    splits = True


class _Named:
    """The recipe is not found by what the checkpoint is, only by its name."""

    def test_it_finds_itself(self, source: Path, tmp_path: Path) -> None:
        plan = streamconv.plan(source, to_arch="hf")
        plain = self.recipe.removesuffix("-rearranged")
        assert any(note.startswith(f"recipe {plain}:") for note in plan.notes)
        assert any(f"{'-rearranged'}" in note for note in plan.notes)


class TestGlmRearranged(_Named, TestGlm):
    recipe = "mindformers-glm-n-rearranged"
    rearranges = True


class TestGlmSplitRearranged(_Named, TestGlm):
    recipe = "mindformers-glm-n-split-rearranged"
    rearranges = splits = True


def test_the_embedding_comes_back(tmp_path: Path) -> None:
    """MindFormers' own way back looks for `embedding_table`, which its way there never wrote."""
    chatglm.write(tmp_path / "hf", chatglm.Config(), form="safetensors")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers", engine="inline")
    assert "transformer.embedding.embedding_weight" in contents(tmp_path / "mf")
    streamconv.convert(tmp_path / "mf", tmp_path / "back", to_arch="hf", engine="inline")
    assert contents(tmp_path / "back") == contents(tmp_path / "hf")


@pytest.mark.parametrize("layout", ["", "-split", "-rearranged", "-split-rearranged"])
def test_every_layout_can_be_asked_for(layout: str, tmp_path: Path) -> None:
    chatglm.write(tmp_path / "hf", chatglm.Config(), form="safetensors")
    plan = streamconv.plan(tmp_path / "hf", to_arch=f"mindformers{layout}")
    assert any(note.startswith(f"recipe mindformers-glm-n{layout},") for note in plan.notes)


def test_a_wrong_config_is_an_error(tmp_path: Path) -> None:
    chatglm.write(tmp_path / "hf", chatglm.Config(), form="safetensors")
    streamconv.convert(tmp_path / "hf", tmp_path / "mf", to_arch="mindformers-split", engine="inline")
    chatglm.write(tmp_path / "other", chatglm.Config(multi_query_group_num=1), form="safetensors")
    with pytest.raises(PlanError, match=r"self_attention\.wk"):
        streamconv.plan(tmp_path / "mf", to_arch="hf", config=tmp_path / "other/config.json")
