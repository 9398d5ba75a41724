"""What to say of tensors that no rule of a recipe wants: what they look like, and what handles them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from streamconv.errors import Problem
from streamconv.ops import Expression
from streamconv.options.spelling import dropping, quoted
from streamconv.plans.patterns import shape_of
from streamconv.plans.roles import Role, having
from streamconv.plans.wrappers import FACTORS
from streamconv.readers import averages

_MOST_GROUPS = 40


class _Look(NamedTuple):
    """How to recognise names of one kind, what they are, and what a user does about it."""

    pattern: str | Callable[[str], object]
    what: str
    hint: str

    def finds(self, name: str) -> object:
        """Something that is true if a name is of this kind."""
        return re.search(self.pattern, name) if isinstance(self.pattern, str) else self.pattern(name)


_DROP = "leave them out with {drop}"

_LOOKS = (
    _Look(
        rf"\.({FACTORS})\b|\.matrix_[AB]\.|\.lora_(down|up)\.",
        "LoRA weights, not merged into the model",
        "merge them: keep the adapter apart and give it with --lora; or " + _DROP,
    ),
    _Look(
        r"\.((mindpet|tk)_delta_)?lora_[abAB]$",
        "a LoRA of MindFormers, not merged into the model",
        "take it out with a recipe that ends in -lora, merge it with --lora, and here: " + _DROP,
    ),
    _Look(
        r"\.(base_layer|original)\.",
        "the base weights of a model whose LoRA is not merged",
        "rename them with --rename {base}, and merge the adapter with --lora",
    ),
    _Look(r"\.modules_to_save\.|\.original_module\.", "a PEFT model's replaced modules", _DROP),
    _Look(averages.prefix, "an averaged (EMA) copy of the model", _DROP),
    _Look(
        r"(^|\.)(optimizer|optim|exp_avg|exp_avg_sq|param_groups|fp32_groups|momentum_buffer)(\.|_state|$)",
        "optimizer state, which is not part of the model",
        _DROP,
    ),
    _Look(
        r"(^|\.)(text_encoder|conditioner|cond_stage_model|text_model)\.|\.(SelfAttention|DenseReluDense)\.",
        "a text encoder that was saved with the model",
        _DROP,
    ),
    _Look(r"(^|\.)(first_stage_model|vae)\.", "an autoencoder that was saved with the model", _DROP),
    _Look(r"(^|\.)(visual|vision|vision_tower|vision_model|image_newline)\.", "a vision part", _DROP),
    _Look(r"(^|\.)prefix_encoder\.", "P-tuning weights, which the target cannot hold", _DROP),
    _Look(
        r"(weight_scale|weight_scale_inv|weight_scale_2|input_scale|qweight|qzeros|g_idx|absmax|quant_map|quant_state"
        r"|SCB|_blocks|_scales)(\.|$)",
        "quantised weights",
        "make them plain first, with --recipe dequantise",
    ),
    _Look(lambda name: having(Role.BUFFER, [name]), "a buffer that models compute", _DROP),
    _Look(r"^(module|_orig_mod)\.", "names of a wrapped model", "take it off: --rename {wrapper}"),
    _Look(r"(^|\.)(v_head|score|classifier|reward_head|value_head)\.", "a head for another task", _DROP),
)


def unmatched(names: Sequence[str], tensors: Mapping[str, Expression], rules: Iterable[str]) -> list[Problem]:
    """A problem for each kind of name that no rule wants; `rules` are the patterns that there are."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[shape_of(name)].append(name)
    known = list(dict.fromkeys(rules))
    problems = [_problem(shape, group, tensors, known) for shape, group in groups.items()]
    if (rest := len(problems) - _MOST_GROUPS) > 0:
        problems[_MOST_GROUPS:] = [Problem(f"and {rest} more kinds of names", hint="is it the right recipe?")]
    return problems


def _problem(
    shape: str, group: Sequence[str], tensors: Mapping[str, Expression], rules: Sequence[str]
) -> Problem:
    first = group[0]
    spec = tensors[first].spec
    number = f" ({len(group)} like it)" if len(group) > 1 else ""
    what = f"no rule matches it, {spec.dtype} {list(spec.shape)}{number}"
    look = next((look for look in _LOOKS if look.finds(first)), None)
    glob = shape.replace("{}", "*")
    if look is not None:
        base = re.sub(r"\.(base_layer|original)\.", ".", glob)
        hint = look.hint.format(
            drop=dropping(glob), base=quoted(f"{glob}={base}"), wrapper=quoted(first.split(".")[0] + ".*=*")
        )
        return Problem(f"{what}; it looks like {look.what}", tensor=first, hint=hint)
    near = get_close_matches(first, rules, n=1, cutoff=0.5)
    advice = f"leave it out with {dropping(glob)}, or all of them with --allow-unmatched"
    hint = f"the nearest rule is for '{near[0]}'; rename it with --rename, or {advice}" if near else advice
    return Problem(what, tensor=first, hint=hint)
