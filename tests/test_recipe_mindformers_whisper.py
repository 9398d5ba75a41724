"""Whisper to MindFormers and back, against the official converter's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers as hf
from mindformers_contract import MindFormersContract, Tensors, randomize

WHISPER = {
    "vocab_size": 64, "num_mel_bins": 20, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_source_positions": 12, "max_target_positions": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "begin_suppress_tokens": None,
}  # fmt: skip


class TestWhisper(MindFormersContract):
    recipe = "mindformers-whisper"
    auto_class = hf.WhisperForConditionalGeneration
    configs: ClassVar = (
        hf.WhisperConfig(**WHISPER, encoder_layers=2, decoder_layers=1),
        hf.WhisperConfig(**WHISPER, encoder_layers=1, decoder_layers=3),
    )

    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        randomize(self.auto_class(self.configs[number]), dtype).save_pretrained(directory)

    def outputs(self, model: Any) -> torch.Tensor:
        sound = torch.randn(1, 20, 24, generator=torch.Generator().manual_seed(1))
        return model(input_features=sound, decoder_input_ids=torch.arange(9)[None]).logits

    def official(self, state: Tensors, config: Any) -> Tensors:
        made: Tensors = {}
        for key, tensor in state.items():
            if "embed_tokens.weight" in key or "embed_positions.weight" in key:
                key = key.replace("weight", "embedding_weight")
            if "layer_norm" in key:
                key = key.replace("weight", "gamma").replace("bias", "beta")
            if "conv1.weight" in key or "conv2.weight" in key:
                tensor = tensor.unsqueeze(2)
            made[key] = tensor
        return made
