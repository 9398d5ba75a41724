"""Write the README's tables of formats and of recipes from the code: `python docs/formats.py`."""

from __future__ import annotations

import re
from pathlib import Path

from streamconv.plans import all_recipes
from streamconv.readers import FORMATS
from streamconv.writers import WRITERS

README = Path(__file__).parent.parent / "README.md"
_MARKS = re.compile(r"(<!-- (formats|recipes) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def formats() -> str:
    """What is read, and what each can be written as."""
    targets = [f"`--to {name}`" + (" (default)" if name == "safetensors" else "") for name in WRITERS]
    lines = ["| from | as | to |", "|---|---|---|"]
    lines += [f"| {name} | {forms} | {', '.join(targets)} |" for name, forms in FORMATS.items()]
    return "\n".join(lines) + "\n"


def architectures() -> str:
    """Every recipe."""
    lines = ["| recipe | what it converts | values | back |", "|---|---|---|---|"]
    lines += [
        f"| `{recipe.name}` | {recipe.title} | {recipe.exactness.label} | {'no' if recipe.one_way else 'yes'} |"
        for recipe in all_recipes().values()
    ]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A README with the tables as they are now."""
    tables = {"formats": formats(), "recipes": architectures()}
    return _MARKS.sub(lambda match: match[1] + tables[match[2]] + match[3], text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
