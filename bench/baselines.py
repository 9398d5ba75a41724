"""The usual ways to convert a checkpoint, as scripts: `python -m bench.baselines NAME SRC DST ...`.

Each is what its library's documentation shows for the job, with the options that save the most memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def transformers(source: str, destination: str, dtype: str, shard: str) -> None:
    """`from_pretrained`, `save_pretrained`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(destination, max_shard_size=shard)


def dequantised(source: str, destination: str) -> None:
    """`from_pretrained` with its own dequantising, `save_pretrained`."""
    import torch
    import transformers

    kind = {"compressed-tensors": "CompressedTensorsConfig", "fp8": "FineGrainedFP8Config"}
    says = transformers.AutoConfig.from_pretrained(source).quantization_config["quant_method"]
    settings = getattr(transformers, kind[says])(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.bfloat16, quantization_config=settings
    )
    model.save_pretrained(destination)


def decompressed(source: str, destination: str) -> None:
    """compressed-tensors' own decompression of each layer, a file at a time."""
    import json

    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    Path(destination).mkdir()
    says = json.loads(Path(source, "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(says).config_groups.values()
    codec = BaseCompressor.get_value_from_registry(says["format"])
    for path in sorted(Path(source).glob("*.safetensors")):
        state = load_file(path)
        layers = {name.removesuffix(".weight_packed") for name in state if name.endswith(".weight_packed")}
        made = {name: each for name, each in state.items() if name.rpartition(".")[0] not in layers}
        for layer in layers:
            parts = {
                key: state[f"{layer}.{key}"] for key in ("weight_packed", "weight_scale", "weight_shape")
            }
            made[f"{layer}.weight"] = codec.decompress(parts, scheme)["weight"]
        save_file(made, str(Path(destination) / path.name), metadata={"format": "pt"})


def torch_load(source: str, destination: str, dtype: str) -> None:
    """`torch.load` with memory maps, and safetensors' `save_file`, a file at a time."""
    import torch
    from safetensors.torch import save_file

    Path(destination).mkdir()
    for path in sorted(Path(source).glob("*.bin")):
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        tensors = {name: tensor.to(getattr(torch, dtype)).contiguous() for name, tensor in state.items()}
        save_file(tensors, str(Path(destination) / f"{path.stem}.safetensors"), metadata={"format": "pt"})


def sat(source: str, destination: str) -> None:
    """What the published script does, without a GPU: all ranks loaded, joined, renamed, saved."""
    import torch

    from streamconv.families.cogvlm import RULES
    from streamconv.families.splits import SAT
    from streamconv.readers.splits import WHOLE

    files = sorted(Path(source, "1").glob("mp_rank_*.pt"))
    ranks = [torch.load(path, map_location="cpu", weights_only=True)["module"] for path in files]
    made = {}
    for name in list(ranks[0]):
        parts = [rank.pop(name) for rank in ranks]
        sharding = SAT.sharding(name) or WHOLE
        if sharding.shares:
            kinds = [part.chunk(len(sharding.shares)) for part in parts]
            whole = torch.cat([part for kind in zip(*kinds, strict=True) for part in kind])
        elif sharding.axis is None or len(parts[0]) == 1:
            whole = parts[0]
        else:
            whole = torch.cat(parts, sharding.axis)
        for rule in RULES:
            (pattern,), (target,) = rule.sources.values(), rule.targets.values()
            values = pattern.match(name)
            if values is not None:
                made[target.fill(values)] = whole
                break
    Path(destination).mkdir()
    torch.save(made, Path(destination) / "pytorch_model.bin")


def to_mindspore(source: str, destination: str) -> None:
    """Load safetensors with torch and save them with MindSpore, under the same names."""
    import mindspore
    from safetensors.torch import load_file

    parameters = []
    for path in sorted(Path(source).glob("*.safetensors")):
        for name, tensor in load_file(str(path)).items():
            half = mindspore.Tensor(tensor.float().numpy()).astype(mindspore.bfloat16)
            parameters.append({"name": name, "data": half})
    Path(destination).mkdir()
    mindspore.save_checkpoint(parameters, str(Path(destination) / "model.ckpt"))


def from_mindspore(source: str, destination: str) -> None:
    """Load with MindSpore, as MindFormers does, and save with torch."""
    import mindspore
    import torch

    loaded = mindspore.load_checkpoint(source)
    state = {name: torch.from_numpy(value.float().asnumpy()).bfloat16() for name, value in loaded.items()}
    Path(destination).mkdir()
    torch.save(state, Path(destination) / "pytorch_model.bin")


def as_bin(source: str, destination: str) -> None:
    """A safetensors checkpoint as `.bin` files, the source of `torch_load`. Not measured."""
    import torch
    from safetensors.torch import load_file

    Path(destination).mkdir()
    for path in sorted(Path(source).glob("*.safetensors")):
        torch.save(load_file(path), Path(destination) / f"pytorch_{path.stem}.bin")


def transposed_bin(destination: str, count: str, rows: str, columns: str) -> None:
    """A `.bin` file of matrices that are transposed views. Not measured."""
    import torch

    Path(destination).mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index in range(int(count)):
        matrix = torch.rand(int(columns), int(rows), generator=generator, dtype=torch.float32)
        state[f"layers.{index}.weight"] = matrix.to(torch.bfloat16).t()
    torch.save(state, Path(destination) / "pytorch_model.bin")


def peft_merge(source: str, adapter: str, destination: str) -> None:
    """`merge_and_unload`, `save_pretrained`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(destination, max_shard_size="2GB")


SCRIPTS: dict[str, Callable[..., None]] = {
    "transformers": transformers,
    "dequantised": dequantised,
    "decompressed": decompressed,
    "torch-load": torch_load,
    "peft_merge": peft_merge,
    "sat": sat,
    "to-mindspore": to_mindspore,
    "from-mindspore": from_mindspore,
    "as-bin": as_bin,
    "transposed-bin": transposed_bin,
}

if __name__ == "__main__":
    SCRIPTS[sys.argv[1]](*sys.argv[2:])
