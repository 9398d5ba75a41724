"""A recipe from a TOML file, in the words of `plans.recipe`; no Python of it is run.

    name = "mine-llama"
    title = "My model -> Llama"

    [sizes]                                   # formulas over the source's config
    heads = "n_head"

    [config]                                  # formulas: key of the target's config -> over the source's
    model_type = "'llama'"
    num_attention_heads = "n_head"

    [[rule]]
    source = "h.{i}.attn.qkv.weight"          # or a table: name in the program -> pattern
    target = "model.layers.{i}.{q,k,v}_proj.weight"
    program = "q, k, v = chunk(x, 0, 3)"

Where only names differ, `[rename]` has a line a rule, source and target, and the recipe needs a `name` besides.

`[source]` and `[target]` may declare architectures: `name`, `title`, `model_types`, `classes`, `[source.sizes]`,
`[source.counts]` and `tensors`, the text of `plans.table`; with them shapes are checked, and rules with
programs read backwards. `[config_back]` is the config for that direction.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from streamconv.errors import UsageError, about, listed
from streamconv.plans import formula
from streamconv.plans.architecture import Architecture, Config
from streamconv.plans.recipe import ConfigMap, Recipe, Remark, Rule
from streamconv.plans.table import table
from streamconv.readers.small import read_toml
from streamconv.storage.location import Location, locate

Keys = Mapping[str, tuple[type, ...]]
"""What the values of a table's keys can be. What a list or a table holds is text, unless it is looked at further."""

_DEEPER = {"rule", "source", "target"}
_KEYS: Keys = {
    "name": (str,), "title": (str,), "sizes": (dict,), "counts": (dict,), "config": (dict,), "config_back": (dict,),
    "source": (dict,), "target": (dict,), "rule": (list,), "rename": (dict,), "found_by": (list,), "one_way": (str,),
}  # fmt: skip
_ARCHITECTURE_KEYS: Keys = {
    "name": (str,), "title": (str,), "model_types": (list,), "classes": (list,), "sizes": (dict,), "counts": (dict,),
    "tensors": (str,),
}  # fmt: skip
_RULE_KEYS: Keys = {
    **{field.name: (str,) for field in fields(Rule)}, "source": (str, dict), "target": (str, dict), "optional": (bool,),
    "tolerance": (float,),
}  # fmt: skip

# Says of a value that there may be none.
_NOTHING = re.compile(r"\bNone\b")

_KINDS: Mapping[type, str] = {
    dict: "a table of text", list: "a list of text", str: "text", bool: "true or false", float: "a number",
}  # fmt: skip


def holds_edits(name: str | Path) -> bool:
    """Whether this is the name of a TOML file of edits, and not of a recipe.

    Raises:
        UsageError: it is the name of a TOML file that cannot be read.
    """
    path = locate(name)
    return path.suffix == ".toml" and not {"rule", "name"} & read_toml(path, "recipe").keys()


def read_recipe(path: Location) -> Recipe:
    """The recipe in a TOML file (see the module's text).

    Raises:
        UsageError: it cannot be read, or is not a recipe; the message says which part.
    """
    with reading(path) as document:
        check_keys(document, _KEYS, "the recipe", _DEEPER)
        named: dict[str, Any] = {"name": path.stem, "title": path.stem, **_frozen(document)}
        rules = [_rule(row, f"rule {number}") for number, row in enumerate(named.pop("rule", ()), 1)]
        for source, target in named.pop("rename", {}).items():
            rules.append(Rule(source, target))
        for rule in rules:
            _ = rule.sources, rule.targets  # a fault in a pattern is this file's
        named |= {side: _architecture(named.get(side), side) for side in ("source", "target")}
        asked = [*_asked(named)]
        for key, side in (("config", "source"), ("config_back", "target")):
            named[key] = _config(named.get(key), key, named[side], named.get("sizes", {}))
        made = Recipe(**named, rules=tuple(rules), remarks=tuple(asked))
        made.check()
        return made


def _frozen(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table's lists as the tuples that records hold."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}


@contextmanager
def reading(path: Location) -> Iterator[dict[str, Any]]:
    """The table in a TOML file, for as long as it is read: errors name the file."""
    try:
        yield read_toml(path, "recipe")
    except UsageError as error:
        if error.headline.file:
            raise
        raise UsageError(error.headline.message, file=str(path), hint=error.headline.hint) from error


def check_keys(row: Any, expected: Keys, what: str, deeper: Collection[str] = ()) -> None:
    """Refuse a table with other keys or kinds of values than `expected`; what `deeper` ones hold is looked at elsewhere."""
    if not isinstance(row, dict):
        raise UsageError(f"{what} is not a table")
    for key, value in row.items():
        if key not in expected:
            raise UsageError(f"{what} has an unknown key '{key}'", hint=f"known: {', '.join(expected)}")
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if type(value) not in expected[key] or (
            key not in deeper and not all(isinstance(each, str) for each in inside)
        ):
            kinds = " or ".join(_KINDS[kind] for kind in expected[key])
            raise UsageError(
                f"{what}: '{key}' must be {kinds if key not in deeper else kinds.split(' of ')[0]}"
            )


def _rule(row: Any, what: str) -> Rule:
    check_keys(row, _RULE_KEYS, what)
    values = {"source": None, "target": None, **row}
    if values["source"] is None and values["target"] is None:
        raise UsageError(f"{what} has neither source nor target")
    return Rule(**values)


def _architecture(row: Mapping[str, Any] | None, side: str) -> Architecture | None:
    if row is None:
        return None
    check_keys(row, _ARCHITECTURE_KEYS, f"[{side}]")
    given = {"name": side, "sizes": {}, "counts": {}, "tensors": "", **_frozen(row)}
    return Architecture(lines=table(given.pop("tensors")), **{"title": given["name"], **given})


def _config(
    formulas: Mapping[str, str] | None, section: str, side: Architecture | None, sizes: Mapping[str, str]
) -> ConfigMap | None:
    """What makes a config by formulas over another one's keys and the sizes of its architecture.

    Raises:
        UsageError: one is not in the language.
    """
    if formulas is None:
        return None
    for key, text in formulas.items():
        with about(f"[{section}] {key}"):
            formula.check(text, formula.names_in(text))

    def make(config: Config) -> dict[str, Any]:
        known = dict(config)
        for name, text in (side.sizes if side is not None else sizes).items():
            known[name] = formula.evaluate(text, known)
        values = {key: formula.evaluate(text, known) for key, text in formulas.items()}
        lost = [key for key, value in values.items() if value is None and not _may_lack(formulas[key])]
        if lost:
            absent = sorted(name for name in formula.names_in(formulas[lost[0]]) if known.get(name) is None)
            raise UsageError(
                f"the config has no {listed(absent)}, which [{section}] {lost[0]} is made of",
                hint=f"text is written \"'{absent[0]}'\", and what may be missing `{absent[0]} or None`",
            )
        return {key: value for key, value in values.items() if value is not None}

    return make


def _may_lack(text: str) -> bool:
    """Whether a formula says that there may be no value."""
    return _NOTHING.search(text) is not None


def _asked(named: Mapping[str, Any]) -> Iterator[Remark]:
    """A remark for each key that a config may lack though formulas with an alternative ask for it: it may be misspelt."""
    side = named["source"]
    sizes = side.sizes if side is not None else named.get("sizes", {})
    for what, formulas in (("the size ", sizes), ("[config] ", named.get("config") or {})):
        for key, text in formulas.items():
            for name in sorted(formula.names_in(text) - sizes.keys()):
                if name != text.strip():
                    said = f"the config has no '{name}', which {what}{key} asks for: '{text}'"
                    yield Remark(f"{name} == None", said)
