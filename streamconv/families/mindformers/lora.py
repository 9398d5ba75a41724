"""LoRA adapters: MindFormers to peft and back.

Both have factors `[rank, in]` and `[out, rank]` of the same modules, under the names that a family's tensors have. What
MindFormers saves does not say alpha, by which the product is scaled: it is in the settings of the training (`lora_alpha`
under `pet_config`), which `--config FILE` names.

Source: mindspore-lab/mindpet: mindpet/delta/lora.py; mindspore-lab/mindformers: mindformers/pet/{pet_config.py,
tuners/lora_adapter.py}, mindformers/tools/transform_ckpt_lora.py, research/qwen2_5/convert_weight.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamconv.errors import UsageError
from streamconv.families.mindformers.glm import MF_GLM
from streamconv.families.mindformers.llama import MF_INTERNLM2, MF_LLAMA, MF_QWEN
from streamconv.families.mindformers.net import Net
from streamconv.plans.architecture import Config
from streamconv.plans.formula import elements
from streamconv.plans.patterns import Pattern
from streamconv.plans.recipe import Recipe, Refusal, Rule, drop
from streamconv.plans.table import renamed
from streamconv.tensor import Shape

SPELLINGS = (
    ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    ("mindpet_delta_lora_A", "mindpet_delta_lora_B"),
    ("tk_delta_lora_a", "tk_delta_lora_b"),
    ("tk_delta_lora_A", "tk_delta_lora_B"),
    ("lora_a", "lora_b"),
    ("lora_A.weight", "lora_B.weight"),
)
"""What MindFormers calls the two factors, the present name first: mindpet's, that of its first releases, and those of
nets that do without it."""

PEFT = ("lora_A.weight", "lora_B.weight")
PREFIX = "base_model.model."
"""What peft puts before the names of the model that an adapter is for."""

_OUTSIDE = ("embed", "lm_head", "output_layer", "output.weight", "wte")


def modules(net: Net) -> dict[str, str]:
    """The linear layers that a family has in both namings: Hugging Face's name -> MindFormers'."""
    matrices = (line.name.text for line in net.target.lines if len(elements(line.dimensions)) == 2)
    named = {
        name: renamed(name, net.names)
        for name in matrices
        if name.endswith(".weight") and not any(part in name for part in _OUTSIDE)
    }
    return {
        theirs.removesuffix(".weight"): ours.removesuffix(".weight")
        for theirs, ours in named.items()
        if ours is not None
    }


def lora_rules(net: Net) -> tuple[Rule, ...]:
    """Rules for the factors of every module of a family, MindFormers -> peft."""
    made: list[Rule] = []
    for theirs, ours in modules(net).items():
        target = _pair(PREFIX + theirs, PEFT)
        made += (Rule(_pair(ours, spelling), target) for spelling in SPELLINGS)
        # As MindFormers' own way back writes them.
        made.append(Rule(_pair(ours, SPELLINGS[0]), _pair(theirs, PEFT)))
    return tuple(made)


def _pair(module: str, names: tuple[str, str]) -> dict[str, str]:
    return {key: f"{module}.{name}" for key, name in zip("ab", names, strict=True)}


# ------------------------------------------------------------------------------------- configs


def _measured(net: Net) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
    """What names and shapes say of an adapter in either naming: its rank, and which modules it changes."""
    kinds: list[tuple[Pattern, str, str]] = []
    for theirs, ours in modules(net).items():
        names = [f"{ours}.{spelling}" for spelling, _ in SPELLINGS]
        names += (f"{prefix}{theirs}.{PEFT[0]}" for prefix in (PREFIX, ""))
        kinds += ((Pattern(name), theirs.rpartition(".")[2], ours.rpartition(".")[2]) for name in names)

    def measure(shapes: Mapping[str, Shape]) -> dict[str, Any]:
        ranks: set[int] = set()
        changed: dict[str, str] = {}
        for name, shape in shapes.items():
            found = next((kind for kind in kinds if kind[0].match(name) is not None), None)
            if found is not None and len(shape) == 2:
                ranks.add(shape[0])
                changed[found[1]] = found[2]
        if len(ranks) > 1:
            raise UsageError(f"its factors have ranks {', '.join(map(str, sorted(ranks)))}; expected one")
        if not ranks:
            return {}
        return {"rank": ranks.pop(), "modules": sorted(changed), "net_modules": sorted(changed.values())}

    return measure


def _rank(config: Config, *keys: str) -> int:
    """The rank of the factors, with which a rank in the config must agree."""
    rank: int = config["rank"]
    stated = next((config[key] for key in keys if key in config), rank)
    if stated != rank:
        raise ValueError(f"it says that the rank is {stated}; the factors have {rank}")
    return rank


def _to_peft(config: Config) -> dict[str, Any]:
    settings = {**config, **(config.get("pet_config") or {})}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.get("base_model_name_or_path"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": settings["lora_alpha"],
        "lora_dropout": settings.get("lora_dropout", 0.0),
        "r": _rank(settings, "lora_rank", "r"),
        "target_modules": config["modules"],
    }


def _from_peft(config: Config) -> dict[str, Any]:
    made = {
        "pet_type": "lora",
        "lora_rank": _rank(config, "r"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": "|".join(f".*{name}" for name in config["net_modules"]),
    }
    return made | ({"lora_alpha": config["lora_alpha"]} if "lora_alpha" in config else {})


_PLAIN_ONLY = (
    Refusal("use_rslora", "it scales by the root of its rank, and MindFormers by the rank"),
    Refusal("use_dora", "it has magnitudes, for which MindFormers has no place"),
    Refusal(
        "rank_pattern or alpha_pattern",
        "its modules differ in rank or alpha, and MindFormers has one of each",
    ),
)


def _recipe(key: str, title: str, net: Net) -> Recipe:
    return Recipe(
        name=f"mindformers-{key}-lora",
        title=f"a LoRA of {title}: MindFormers -> peft",
        rules=(*lora_rules(net), drop("*", "no part of the LoRA", optional=True)),
        config=_to_peft,
        config_back=_from_peft,
        config_of=_measured(net),
        refuses_back=_PLAIN_ONLY,
        stem="adapter_model",
        alone=True,
        named_only=True,
    )


RECIPES: tuple[Recipe, ...] = (
    _recipe("llama", "Llama, Qwen2, Yi, DeepSeek or InternLM", MF_LLAMA),
    _recipe("qwen", "Qwen (first generation)", MF_QWEN),
    _recipe("internlm2", "InternLM2", MF_INTERNLM2),
    _recipe("glm-n", "GLM2, GLM3 or GLM-4", MF_GLM),
)
