"""A LoRA merged into every layer of a Llama, side by side with copying the base, and with peft's own merge."""

from __future__ import annotations

import json
from pathlib import Path

from bench import races
from bench.measure import Contender, race, remove
from bench.options import Options, streamconv
from bench.report import Section, megabytes
from bench.samples import llama_of, random_block, write_llama, write_safetensors
from streamconv.tensor import Shape

_RANK = 16
_SHARD = 2_000_000_000
_PREFIX = "base_model.model."


def adapters(options: Options) -> list[Section]:
    """Rank 16 on every linear layer, against `cp -r` of the base, and `merge_and_unload` with `save_pretrained`."""
    source, adapter, out = (options.directory / f"lora-{name}" for name in ("base", "adapter", "out"))
    size = write_llama(source, options.size, "BF16", _SHARD)
    layers = _write_adapter(adapter, options.size)
    contenders = [
        Contender(races.OURS, streamconv(source, out, "--lora", str(adapter), "--quiet"), source, out),
        Contender("cp -r", ["cp", "-r", str(source), str(out)], source, out),
    ]
    if not options.bare:
        contenders.append(Contender("peft", races.script("peft_merge", source, adapter, out), source, out))
    measured = tuple(
        race(contenders, options.runs, cache, options.rest, options.say) for cache in options.caches
    )
    for place in (source, adapter, out):
        remove(place)
    return [
        races.section(
            "LoRA into a Llama",
            f"Rank {_RANK} into {layers} matrices of a BF16 Llama, {megabytes(size)}, which are all but embedding, head and norms. "
            "`cp -r` copies the base. peft: `from_pretrained`, `merge_and_unload`, `save_pretrained`.",
            contenders, measured, reference="cp -r", goal=1.5, options=options,
        )
    ]  # fmt: skip


def _write_adapter(directory: Path, size: int) -> int:
    """An adapter of random factors, as peft saves one; the number of layers that it changes."""
    directory.mkdir(parents=True)
    model = llama_of(size, "BF16")
    layers = [(name, shape) for name, shape in model.tensors() if name.endswith("_proj.weight")]
    factors: list[tuple[str, Shape]] = []
    for name, (rows, columns) in layers:
        module = _PREFIX + name.removesuffix(".weight")
        factors += [(f"{module}.lora_A.weight", (_RANK, columns)), (f"{module}.lora_B.weight", (rows, _RANK))]
    write_safetensors(directory / "adapter_model.safetensors", factors, "F32", random_block("F32"))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _RANK,
        "target_modules": "all-linear",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return len(layers)
