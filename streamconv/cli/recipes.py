"""`streamconv recipes`: which conversions between architectures there are, and the rules of one.

With `--json`, one document on stdout; without a name `{"recipes": [...]}`, each

    name, title, source, target     the architectures, null for a naming without a table
    exactness                       bit-exact, value-exact, rounding or lossy: of its worst rule
    reverse                         whether it reads backwards
    one_way                         why not

and with a name the same with `rules`: [{source, target, program, equals, when, optional, reason, exactness}].
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from streamconv.cli import options
from streamconv.cli.tables import render
from streamconv.cli.text import picked, present

if TYPE_CHECKING:
    from streamconv.plans import Recipe
    from streamconv.plans.recipe import Names, Rule


def run(arguments: Namespace) -> int:
    """Print them."""
    from streamconv import families, plans

    families.register()
    if arguments.name is None:
        known = list(plans.all_recipes().values())
        present(arguments, lambda: {"recipes": [_document(each) for each in known]}, lambda: _list(known))
        return 0
    recipe = plans.named(arguments.name)
    rules = [_rule_document(rule) for rule in recipe.rules]
    present(arguments, lambda: {**_document(recipe), "rules": rules}, lambda: _lines(recipe))
    return 0


def _list(recipes: list[Recipe]) -> list[str]:
    cells = [
        (recipe.name, recipe.title, recipe.exactness.label, "no" if recipe.one_way else "yes")
        for recipe in recipes
    ]
    return render(("recipe", "what it converts", "values", "--reverse"), cells)


def _lines(recipe: Recipe) -> list[str]:
    lines = [f"{recipe.name}: {recipe.title}"]
    lines.append(f"no way back: {recipe.one_way}" if recipe.one_way else "reads both ways (--reverse)")
    lines.append(f"values: {recipe.exactness.label}")
    lines += (f"refused{_where(refusal.when)}: {refusal.reason}" for refusal in recipe.refuses)
    lines += (f"note{_where(remark.when)}: {remark.text}" for remark in recipe.remarks)
    if recipe.makes is not None:
        lines.append(
            "by the tensors of each layer, not by names: docs/quantised.md has what is read and written"
        )
    cells: list[tuple[str, ...]] = []
    for rule in recipe.rules:
        sources, targets, how = _side(rule.source), _side(rule.target), _how(rule)
        cells += itertools.zip_longest(sources, targets, how, fillvalue="")
    return [*lines, *(["", *render(("source", "target", "how"), cells)] if cells else [])]


def _where(formula: str) -> str:
    """When something is so; nothing where it always is."""
    return "" if formula == "True" else f" where {formula}"


def _side(names: Names) -> list[str]:
    if names is None:
        return ["(none)"]
    return [names] if isinstance(names, str) else [f"{key}: {text}" for key, text in names.items()]


def _how(rule: Rule) -> list[str]:
    lines = [line.strip() for line in rule.program.strip().splitlines()]
    lines += [f"= {rule.equals}"] if rule.equals else []
    lines += [f"if {rule.when}"] if rule.when else []
    lines += [rule.exactness.label] if rule.exactness else []
    lines += ["where it is there"] if rule.optional else []
    return lines + ([rule.reason] if rule.reason else [])


def _document(recipe: Recipe) -> dict[str, Any]:
    return {
        **picked(recipe, "name title"),
        "source": recipe.source and recipe.source.name,
        "target": recipe.target and recipe.target.name,
        "exactness": recipe.exactness.label,
        "reverse": not recipe.one_way,
        "one_way": recipe.one_way,
    }


def _rule_document(rule: Rule) -> dict[str, Any]:
    about = picked(rule, "source target program equals when optional reason")
    return {**about, "exactness": rule.exactness.label}


COMMAND = options.Command(
    "what can become what; the rules of one recipe",
    "List the recipes between architectures, or print the rules of one of them as a table.",
    options.RESULT,
    run,
    {"name": ("[NAME|FILE]", "a recipe to print (default: list all)")},
)
