"""A net of MindFormers: what it is beside the Hugging Face model of the same weights, as one record.

A net is described by the Hugging Face config of the same model, for its own is a YAML file that lies elsewhere. So its
table is that of the Hugging Face architecture under other names, with lines of its own where shapes differ. Each recipe is read MindFormers -> Hugging Face, and backwards the other way.

Source: mindspore-lab/mindformers r1.3.0 to r1.8.0: mindformers/models/*/convert_weight.py, convert_reversed.py and the
same under research/; mindformers/core/callback/callback.py (what training saves besides weights).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from streamconv.plans.architecture import Architecture
from streamconv.plans.recipe import Files, Recipe, Refusal, Rule, Surroundings, drop, texts
from streamconv.plans.table import Table, renamed

Names = dict[str, str]
"""Names of Hugging Face -> names of MindFormers, as `Table.renamed` takes them."""

_COUNTERS = ("epoch_num", "step_num", "global_step", "global_batch_size", "loss_scale")
_TRAINING = (
    *(drop(name, "a counter of the training run", optional=True) for name in _COUNTERS),
    *(
        drop(f"{slot}.*", "optimizer state, which is no part of the model", optional=True)
        for slot in ("adam_m", "adam_v", "accu_grads")
    ),
)


_NOTHING = Table()


def _all_files(_: Surroundings) -> Files:
    """All files are copied, code too: both sides have the same config."""
    return Files()


def _files_back(_: Surroundings) -> Files:
    return Files(
        notes=(
            "config.json stays that of Hugging Face, which the way back needs; MindFormers has its own settings in YAML",
        )
    )


@dataclass(frozen=True, kw_only=True)
class Net:
    """A net in one of its layouts.

    Attributes:
        key: what MindFormers calls the family, with its layout where there are several.
        title: as people write it.
        target: as Hugging Face has it.
        names: of tensors that only change their name; the net does not have those that they do not give.
        own: the table of what has another shape in the net, or exists there alone.
        lines: the whole table, where these two are not what it consists of.
        before: rules that come before those of names.
        rules: those that come behind.
        found_by: as in `Recipe`.
        layout: what distinguishes the net from others of the same target.
        called: the net's title, where it is not the family's.
        to: whose form the target is.
        sizes: as in `Architecture`, where the net's differ.
        refuses: what neither direction can do.
        more: what else the recipe has, by attribute.
    """

    key: str
    title: str
    target: Architecture
    names: Names
    found_by: tuple[str, ...]
    own: Table = _NOTHING
    lines: Table | None = None
    before: tuple[Rule, ...] = ()
    rules: tuple[Rule, ...] = ()
    layout: str = ""
    called: str = ""
    to: str = "Hugging Face"
    sizes: Mapping[str, str] | None = None
    refuses: tuple[Refusal, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def architecture(self) -> Architecture:
        """The net's own."""
        return replace(
            self.target,
            name=f"mindformers-{self.layout}" if self.layout else "mindformers",
            title=self.called or f"{self.title} of MindFormers",
            sizes=self.target.sizes if self.sizes is None else self.sizes,
            lines=self.target.lines.renamed(self.names) + self.own if self.lines is None else self.lines,
        )

    @cached_property
    def renames(self) -> tuple[Rule, ...]:
        """A rule for each tensor that only changes its name, except those that another rule always makes."""
        made = {
            text
            for rule in (*self.before, *self.rules)
            if not rule.optional
            for text in texts(rule.target).values()
        }
        pairs = ((renamed(name, self.names), name) for name in self.target.lines.names if name not in made)
        return tuple(Rule(ours, name) for ours, name in pairs if ours is not None)

    @property
    def recipe(self) -> Recipe:
        """From MindFormers to Hugging Face."""
        return Recipe(
            name=f"mindformers-{self.key}",
            title=f"{self.title}: MindFormers -> {self.to}",
            source=self.architecture,
            target=self.target,
            rules=(*self.before, *self.renames, *self.rules, *_TRAINING),
            found_by=self.found_by,
            refuses=self.refuses,
            refuses_back=self.refuses,
            **{"files": _all_files, "files_back": _files_back, **self.more},
        )
