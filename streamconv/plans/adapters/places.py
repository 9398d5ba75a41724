"""Which module of which model an adapter's modules are, whatever they are called.

Programs put a word before the names (`transformer.`, `diffusion_model.`, `unet.`, the directory of the component), or write
`_` for every `.` (kohya's: `lora_unet_`, `lora_te1_`), so that what they mean is looked up among the base's own names, and
never guessed from the text. (kohya-ss/sd-scripts: networks/lora.py; Comfy-Org/ComfyUI: comfy/lora.py.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from streamconv.errors import PlanError, Problem
from streamconv.ops import Expression
from streamconv.plans.adapters.adapter import NESTED, Adapter
from streamconv.plans.findings import grouped
from streamconv.readers.checkpoint import Checkpoint, Component

_FLAT = re.compile(
    r"(lora_(?P<kind>unet|te\d?|transformer|prior_unet|prior_te)_|lycoris_)_?(?P<module>[^.]+)"
)
_TEXT = re.compile(r"te(?P<number>\d?)|prior_te")
_SAID = re.compile(r"(diffusion_model|(?P<part>transformer|unet|text_encoder(_\d)?))\.")
TEXT_ENCODER = re.compile(r"text_encoder(_(?P<number>\d))?")
"""The directories of a pipeline's text encoders, of which the first has no number."""
_INNER = ("diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "model.")
"""What files of one model may have before all their names, and adapters for it before theirs."""


@dataclass(frozen=True, slots=True)
class _Names:
    """A component's modules: as they are, and by what they are called with `_`."""

    component: Component
    whole: frozenset[str]
    flat: Mapping[str, str]

    def find(self, module: str) -> str | None:
        """The module of the component that an adapter's is; None where it has none."""
        nested = NESTED * module.count(NESTED)
        own = module.replace(NESTED, "")
        if found := _FLAT.fullmatch(own):
            return self.flat.get(found["module"]) if self._is_for(found["kind"]) else None
        if own in self.whole:
            return own + nested
        first, _, rest = own.partition(".")
        if self.component.directory and first == self.component.directory:
            return rest + nested if rest in self.whole else None
        if TEXT_ENCODER.fullmatch(first) and self.component.directory:
            return None
        for inner in _INNER:
            short = own.removeprefix(inner)
            for prefix in ("", *_INNER):
                if prefix + short in self.whole:
                    return prefix + short + nested
        return None

    def _is_for(self, kind: str | None) -> bool:
        """Whether a kind of kohya's names is for this component, as far as its directory says."""
        directory = TEXT_ENCODER.fullmatch(self.component.directory)
        text = _TEXT.fullmatch(kind or "")
        if not self.component.directory or kind is None:
            return True
        if (directory is None) != (text is None):
            return False
        if directory is None or text is None:
            return True
        return int(directory["number"] or 1) == int(text["number"] or 1)


def assigned(models: Sequence[Component], adapters: Sequence[Adapter]) -> dict[str, tuple[Adapter, ...]]:
    """For each model, by its directory, what adapters have for it, by its own names, in order.

    Of one model, adapters are given whole: what they have for no module of it is told when they are merged.

    Raises:
        PlanError: modules of an adapter are none of any model, or of two.
    """
    known = [_names(component) for component in models]
    made: dict[str, list[Adapter]] = {component.directory: [] for component in models}
    for adapter in adapters:
        if len(models) == 1:
            made[models[0].directory].append(
                _called(adapter, {each: known[0].find(each) or each for each in _modules(adapter)})
            )
            continue
        places: dict[str, dict[str, str]] = {component.directory: {} for component in models}
        problems = []
        for module in _modules(adapter):
            found = [
                (each.component.directory, name) for each in known if (name := each.find(module)) is not None
            ]
            if len(found) == 1:
                places[found[0][0]][module] = found[0][1]
            else:
                problems.append(_unplaced(module, [directory for directory, _ in found], known))
        if problems:
            raise PlanError("the adapter does not fit", file=adapter.path, problems=grouped(problems))
        for directory, names in places.items():
            if names:
                made[directory].append(_called(adapter, names, directory))
    return {directory: tuple(each) for directory, each in made.items()}


def fits(adapter: Adapter, names: Iterable[str]) -> bool:
    """Whether any module of an adapter is one of a model with tensors of these names."""
    known = _named(Component("", "", {}), names)
    return any(known.find(module) for module in _modules(adapter))


def resolver(base: Checkpoint | None) -> Callable[[str], tuple[str, str]]:
    """What finds the component that an adapter's module is of, where that is said, and its name there.

    It raises a PlanError where a name with `_` for every dot is not in the base.
    """
    known = [] if base is None else [_names(component) for component in base.models]

    def find(module: str) -> tuple[str, str]:
        flat = _FLAT.fullmatch(module)
        if flat is None:
            said = _SAID.match(module)
            return (said["part"] or "", module[said.end() :]) if said else ("", module)
        found = ((each.component.directory, name) for each in known if (name := each.find(module)))
        place, name = next(found, (None, ""))
        if place is None:
            raise PlanError(
                "the model of --like has no such module"
                if base is not None
                else "its name has _ for every dot, which are not told from others",
                tensor=module,
                hint="give the base that it is for with --like" if base is None else None,
            )
        return place or _directory(flat["kind"]), name

    return find


def _directory(kind: str | None) -> str:
    """The directory of what kohya's names are for; empty where they do not say."""
    text = _TEXT.fullmatch(kind or "")
    if text is None:
        return "transformer" if kind == "transformer" else ""
    return "text_encoder" if text["number"] in (None, "", "1") else f"text_encoder_{text['number']}"


def _names(component: Component) -> _Names:
    return _named(component, component.tensors)


def _named(component: Component, names: Iterable[str]) -> _Names:
    parents = frozenset(name.rpartition(".")[0] for name in names)
    # Bare parameters are adapted below the module that has them, which may have no weight of its own.
    flat = {short.replace(".", "_"): name for name in parents for short in _shortened(name)}
    return _Names(component, parents, flat)


def _shortened(name: str) -> Iterator[str]:
    yield name
    for inner in _INNER:
        if name.startswith(inner):
            yield name.removeprefix(inner)


def _modules(adapter: Adapter) -> list[str]:
    return [*adapter.modules, *(name.rpartition(".")[0] for name in adapter.replacing)]


def _called(adapter: Adapter, names: Mapping[str, str], directory: str = "") -> Adapter:
    """What an adapter has for some modules, under other names; with the settings for them."""
    modules: dict[str, Mapping[str, Expression]] = {
        names[module]: parts for module, parts in adapter.modules.items() if module in names
    }
    replacing = {}
    for name, tensor in adapter.replacing.items():
        module, dot, leaf = name.rpartition(".")
        if module in names:
            replacing[names[module] + dot + leaf] = tensor
    return adapter.sorted_as(modules, replacing, directory)


def _unplaced(module: str, found: Sequence[str], known: Sequence[_Names]) -> Problem:
    if found:
        return Problem(
            f"the adapter changes it, and there is one in each of {', '.join(found)}",
            tensor=module,
            hint="give the directory of one of them as SRC",
        )
    everything = [name for each in known for name in each.whole]
    near = get_close_matches(module, everything, n=1, cutoff=0.0)
    hint = f"the nearest is '{near[0]}'; is it the base that the adapter was trained on?" if near else None
    return Problem("the adapter changes it, and no component has such a module", tensor=module, hint=hint)
