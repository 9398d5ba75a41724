"""An adapter in the form of another program: names, and where its scale stands.

peft has it in a config, diffusers takes it as 1 here (it is multiplied into the second factor), kohya's programs and ComfyUI
have an alpha beside the factors. Names with `_` for every `.` are looked up in the base of --like.
(Sources as in `adapter`; kohya-ss/sd-scripts: networks/lora.py; Comfy-Org/ComfyUI: comfy/lora.py.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from streamconv.errors import PlanError, Problem, UsageError, count
from streamconv.ops import Affine, Expression, Fill, apply, renamed
from streamconv.plans.adapters.adapter import KIND, PREFIX, Adapter, is_part, of_peft, unwrapped
from streamconv.plans.adapters.beginnings import refuse_beginning
from streamconv.plans.adapters.files import config_of, described
from streamconv.plans.adapters.kinds import kind_of, times_one
from streamconv.plans.adapters.merging import scale_of
from streamconv.plans.adapters.places import TEXT_ENCODER, resolver
from streamconv.plans.findings import Findings, grouped
from streamconv.plans.plan import Targets
from streamconv.plans.sources import Sources
from streamconv.readers.checkpoint import Checkpoint, Component
from streamconv.shard import ADAPTER_STEMS


@dataclass(frozen=True, slots=True)
class Form:
    """How a program has an adapter.

    Attributes:
        title: whose form it is.
        stem: of its file.
        name: the name of a module of a component (empty: not said), before that of its parts.
        down: the first factor's name.
        up: the second's.
        alpha: whether an alpha lies beside the factors.
        magnitudes: whether DoRA has the same meaning there.
    """

    title: str
    stem: str
    name: Callable[[str, str], str]
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    alpha: bool = False
    magnitudes: bool = True


def _kohya(part: str, module: str) -> str:
    text = TEXT_ENCODER.fullmatch(part)
    prefix = f"lora_te{text['number'] or 1}_" if text else "lora_unet_"
    return prefix + module.replace(".", "_")


def _diffusers(part: str, module: str) -> str:
    return f"{part or 'transformer'}.{module}"


FORMS: Mapping[str, Form] = {
    "peft": Form("peft", ADAPTER_STEMS[0], lambda _, module: PREFIX + module),
    "diffusers-lora": Form("diffusers", ADAPTER_STEMS[1], _diffusers),
    "kohya": Form("kohya's programs", "lora", _kohya, "lora_down.weight", "lora_up.weight", alpha=True, magnitudes=False),
    "comfyui": Form(
        "ComfyUI", "lora", lambda _, module: f"diffusion_model.{module}", "lora_down.weight", "lora_up.weight",
        alpha=True, magnitudes=False,
    ),
}  # fmt: skip
"""By what `--to-arch` calls them."""


def is_adapter(component: Component) -> bool:
    """Whether all tensors of a component are parts of an adapter, but for what one saves as a whole."""
    names = [unwrapped(name) for name in component.tensors]
    return any(map(is_part, names)) and not any(".base_layer." in name for name in names)


def converted(
    component: Component, checkpoint: Checkpoint, target: str, base: Checkpoint | None, scale: float | None,
    findings: Findings,
) -> tuple[Component, Targets]:  # fmt: skip
    """An adapter in another form, and its tensors there with the names of those that they come from.

    Raises:
        UsageError: it is of a kind that the form has not, or names cannot be told.
        PlanError: what does not fit; all of it at once.
    """
    form, place = FORMS[target], str(checkpoint.path)
    config = (
        component.config
        if component.stem == ADAPTER_STEMS[0] and component.config
        else config_of(checkpoint.path, checkpoint)
    )
    if (
        config.get(KIND, "LORA") != "LORA"
        or config.get("target_parameters")
        or config.get("trainable_token_indices")
    ):
        raise UsageError(f"the adapter is not a plain LoRA, which is all that is written for {form.title}", file=place,
                         hint="merge it with --lora")  # fmt: skip
    adapter = Adapter(
        {unwrapped(name): tensor for name, tensor in component.tensors.items()}, config, place, scale
    )
    if target != "peft":
        refuse_beginning(adapter)
    if adapter.replacing and target != "peft":
        name = next(iter(adapter.replacing))
        raise UsageError(f"the adapter replaces whole tensors, which it cannot for {form.title}", file=place, tensor=name,
                         hint="merge it with --lora")  # fmt: skip
    find = resolver(base)
    one_model = any(map(of_peft, adapter.tensors))
    made: dict[str, Expression] = {}
    ranks: dict[str, tuple[int, float]] = {}
    problems: list[Problem] = []
    for module, parts in adapter.modules.items():
        try:
            # Peft's adapters are for one model, in which a part may have such a name too.
            part, own = ("", module) if one_model else find(module)
            ranks[own] = _written(
                made, form, form.name(part, own), own, parts, adapter.sorted_as({}, {}, part)
            )
        except PlanError as error:
            problems += error.problems
    if problems:
        raise PlanError(
            f"the adapter cannot be written for {form.title}", file=place, problems=grouped(problems)
        )
    made.update({PREFIX + name: tensor for name, tensor in adapter.replacing.items()})
    findings.notes.append(f"an adapter of {count(len(ranks), 'layer')} is written as {form.title} has it")
    settings = described(adapter, ranks) if target == "peft" else None
    reached = Sources(component.tensors, component.prefix).reached
    targets = {name: (reached(tensor), renamed(tensor, name)) for name, tensor in made.items()}
    result = replace(
        component,
        directory="",
        stem=form.stem,
        variant=None,
        tensors=made,
        config=settings,
        one_file=target != "peft",
    )
    return result, targets


def _written(
    made: dict[str, Expression],
    form: Form,
    name: str,
    module: str,
    parts: Mapping[str, Expression],
    adapter: Adapter,
) -> tuple[int, float]:
    """Put a layer's tensors into `made`; its rank and alpha."""
    kind = kind_of(parts)
    allowed = ("LoRA", "DoRA") if form.magnitudes else ("LoRA",)
    if (
        kind is None
        or kind.name not in allowed
        or "lora_mid" in parts
        or (parts.keys() & {"lora_B.bias", "diff_b"} and form.alpha)
    ):
        raise PlanError(
            f"it is {kind.name if kind else 'of a kind that is not known'}, and only {' and '.join(allowed)} are written for "
            f"{form.title}", tensor=module, hint="merge it with --lora",
        )  # fmt: skip
    down = parts["lora_A"]
    rank = down.spec.shape[0]
    alone = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    if "alpha" in parts and adapter.scale is None:
        alpha, factor = parts["alpha"], None
    else:
        scale = scale_of(module, rank, adapter=adapter)
        alpha, factor = apply(Fill("F32", (), scale * rank))[0], scale
    if form.alpha:
        made[f"{name}.alpha"] = alpha
    elif factor is None:
        for part in alone.keys() & {"lora_B", "lora_B.bias"}:
            alone[part] = apply(Affine(1 / rank, 0.0), times_one(alone[part], alpha))[0]
    elif factor != 1 and form.stem != ADAPTER_STEMS[0]:
        for part in alone.keys() & {"lora_B", "lora_B.bias"}:
            alone[part] = apply(Affine(factor, 0.0), alone[part])[0]
    made[f"{name}.{form.down}"], made[f"{name}.{form.up}"] = down, alone["lora_B"]
    for part in ("lora_magnitude_vector", "lora_B.bias"):
        if part in alone:
            made[f"{name}.{part}"] = alone[part]
    return rank, float(rank) if factor is None else factor * rank
