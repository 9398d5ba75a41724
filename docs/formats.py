"""Write the README's table of formats from the code: `python docs/formats.py`."""

from __future__ import annotations

import re
from pathlib import Path

from streamconv.readers import FORMATS
from streamconv.writers import WRITERS

README = Path(__file__).parent.parent / "README.md"
_MARKS = re.compile(r"(<!-- formats -->\n).*(<!-- /formats -->)", re.DOTALL)


def table() -> str:
    """What is read, and what each can be written as."""
    targets = [f"`--to {name}`" + (" (default)" if name == "safetensors" else "") for name in WRITERS]
    lines = ["| from | as | to |", "|---|---|---|"]
    lines += [f"| {name} | {forms} | {', '.join(targets)} |" for name, forms in FORMATS.items()]
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A README with the table as it is now."""
    return _MARKS.sub(lambda match: match[1] + table() + match[2], text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
