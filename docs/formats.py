"""Write the tables of formats, recipes, functions, quantised weights and adapters from the code: `python docs/formats.py`."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from streamconv import families
from streamconv.plans import all_recipes
from streamconv.plans.adapters.kinds import KINDS
from streamconv.plans.adapters.merging import NEVER, TYPES, UNSUPPORTED
from streamconv.plans.functions import FUNCTIONS
from streamconv.plans.quantise import FORMS as FORMS_WRITTEN
from streamconv.plans.schemes import kinds as schemes_read
from streamconv.readers import FORMATS
from streamconv.readers.files import FORMATS as FILES
from streamconv.writers.formats import FORMATS as TARGETS

families.register()

README = Path(__file__).parent.parent / "README.md"
RECIPES = Path(__file__).parent / "recipes.md"
QUANTISED = Path(__file__).parent / "quantised.md"
ADAPTERS = Path(__file__).parent / "adapters.md"
_MARKS = re.compile(
    r"(<!-- (formats|recipes|functions|schemes|forms|adapters|refused) -->\n).*?(<!-- /\2 -->)", re.DOTALL
)


def formats() -> str:
    """What is read, and what all of it can be written as."""
    targets = [f"`--to {name}`" + (" (default)" if name == "safetensors" else "") for name in TARGETS]
    lines = ["| from | as |", "|---|---|"]
    forms: dict[str, list[str]] = {}
    for each in (*FILES, *FORMATS):
        forms.setdefault(each.name, []).append(each.forms)
    lines += [f"| {name} | {'; '.join(said)} |" for name, said in forms.items()]
    lines += ["", f"Each of them can be written as any of: {', '.join(targets)}."]
    return "\n".join(lines) + "\n"


def architectures() -> str:
    """Every recipe."""
    lines = ["| recipe | what it converts | values | back |", "|---|---|---|---|"]
    lines += [
        f"| `{recipe.name}` | {recipe.title} | {recipe.exactness.label} | {'no' if recipe.one_way else 'yes'} |"
        for recipe in all_recipes().values()
    ]
    return "\n".join(lines) + "\n"


def functions() -> str:
    """What a program may call: how, and the first line of what it says of itself."""
    lines = ["| call | result |", "|---|---|"]
    for name, function in sorted(FUNCTIONS.items()):
        parameters = inspect.signature(function).parameters.values()
        shown = ", ".join(
            ("*" if each.kind is each.VAR_POSITIONAL else "")
            + each.name
            + ("" if each.default is each.empty else f"={each.default!r}")
            for each in parameters
        )
        said = (inspect.getdoc(function) or "").partition("\n")[0]
        lines.append(f"| `{name}({shown})` | {said} |")
    return "\n".join(lines) + "\n"


def schemes() -> str:
    """Every scheme of quantised weights that is read."""
    lines = ["| scheme | tensors | value | beside its owner |", "|---|---|---|---|"]
    lines += [f"| {name} | {tensors} | {value} | {exact} |" for name, tensors, value, exact in schemes_read()]
    return "\n".join(lines) + "\n"


def forms() -> str:
    """Every way to quantise."""
    lines = [
        "| recipe | makes | format of compressed-tensors | activations, by the engine |",
        "|---|---|---|---|",
    ]
    for form in FORMS_WRITTEN:
        said = form.activations or {}
        bits = f"{said['type']}, {said['num_bits']} bits, by {said['strategy']}" if said else "as they are"
        lines.append(f"| `{form.name}` | {form.title} | {form.format} | {bits} |")
    return "\n".join(lines) + "\n"


def adapters() -> str:
    """Every kind of adapter that is merged."""
    lines = ["| kind | tensors of a layer | the merged weight |", "|---|---|---|"]
    kinds: dict[str, tuple[list[str], str]] = {}
    for kind in KINDS:
        parts = ", ".join(f"`{part}`" for part in sorted(kind.parts))
        more = "".join(f", (`{part}`)" for part in sorted(kind.optional))
        kinds.setdefault(kind.name, ([], kind.formula))[0].append(parts + more)
    lines += [
        f"| {name} | {'; or '.join(parts)} | {formula.replace('|', chr(92) + '|')} |"
        for name, (parts, formula) in kinds.items()
    ]
    return "\n".join(lines) + "\n"


def refused() -> str:
    """What is not merged, and why."""
    lines = [
        f"Types of peft that are merged: {', '.join(sorted(TYPES))}. All others are refused by name.",
        "",
    ]
    lines += ["| of peft | refused, because |", "|---|---|"]
    lines += [f"| `peft_type` {name} | {why}: no weight can hold it |" for name, why in NEVER.items()]
    lines += [f"| `{name}` | {why} |" for name, why in UNSUPPORTED.items()]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A document with the tables as they are now."""
    tables = {
        "formats": formats(),
        "recipes": architectures(),
        "functions": functions(),
        "schemes": schemes(),
        "forms": forms(),
        "adapters": adapters(),
        "refused": refused(),
    }
    return _MARKS.sub(lambda match: match[1] + tables[match[2]] + match[3], text)


if __name__ == "__main__":
    for document in (README, RECIPES, QUANTISED, ADAPTERS):
        document.write_text(written(document.read_text(encoding="utf-8")), encoding="utf-8")
