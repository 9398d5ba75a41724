"""What recipes of MindFormers have in common. Each is read MindFormers -> Hugging Face, and backwards the other way.

Source: mindspore-lab/mindformers: mindformers/core/callback/callback.py (what training saves besides weights).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from streamconv.plans.architecture import Architecture
from streamconv.plans.architectures.mindformers import OUTSIDE, Names, relabelled
from streamconv.plans.patterns import Pattern
from streamconv.plans.recipe import Files, Recipe, Rule, Surroundings, drop
from streamconv.tensor import Shape

LEAVES = ("weight", "bias")

_COUNTERS = ("epoch_num", "step_num", "global_step", "global_batch_size", "loss_scale")
_TRAINING = (
    *(drop(name, "a counter of the training run", optional=True) for name in _COUNTERS),
    *(
        drop(f"{slot}.*", "optimizer state, which is no part of the model", optional=True)
        for slot in ("adam_m", "adam_v", "accu_grads")
    ),
)

FREQUENCIES = Rule(
    None,
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",
    optional=True,
    reason="a buffer that models compute",
)
"""What files of old versions have besides, and MindFormers does not."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def renames(architecture: Architecture, names: Names, but: Collection[str] = ()) -> tuple[Rule, ...]:
    """A rule for each line of a Hugging Face table that MindFormers only calls differently.

    Args:
        architecture: that of Hugging Face.
        names: as for `architectures.mindformers.net`.
        but: names that other rules are about.
    """
    theirs = dict.fromkeys(line.name.text for line in architecture.lines)
    pairs = ((relabelled(name, names), name) for name in theirs if name not in but)
    return tuple(Rule(ours, name) for ours, name in pairs if ours is not None)


def tied(embedding: str = _EMBEDDING, head: str = _HEAD, names: Names = OUTSIDE) -> tuple[Rule, ...]:
    """Rules for embedding and output layer: a net has both, also where Hugging Face keeps one for the two.

    They come before others that rename the two, and hold where `tied`; the names are those of Hugging Face.
    """
    ours, their_head = names[embedding], names[head]
    return (
        Rule(
            {"x": ours, "head": their_head},
            embedding,
            "x = same(x, head)",
            when="tied",
            optional=True,
        ),
        Rule(None, head, when="tied", optional=True, reason="tied to the embedding"),
        Rule(their_head, head, when="not tied"),
    )


def _all_files(_: Surroundings) -> Files:
    """All files come along, code too: both sides have the same config."""
    return Files()


def _files_back(_: Surroundings) -> Files:
    return Files(
        notes=(
            "config.json stays that of Hugging Face, which the way back needs; MindFormers has its own settings in YAML",
        )
    )


def recipe(
    family: str,
    title: str,
    net: Architecture,
    target: Architecture,
    rules: tuple[Rule, ...],
    found_by: tuple[str, ...],
    **changes: Any,
) -> Recipe:
    """A recipe of MindFormers.

    Args:
        family: what MindFormers calls it.
        title: as people write it, with what else there is to know.
        net: MindFormers' table.
        target: that of Hugging Face.
        rules: all but those for what training leaves in a checkpoint.
        found_by: see `Recipe`.
        changes: what else it has, by attribute.
    """
    return Recipe(
        name=f"mindformers-{family}",
        title=f"{title}: MindFormers -> Hugging Face",
        source=net,
        target=target,
        rules=(*rules, *_TRAINING),
        found_by=found_by,
        **({"files": _all_files, "files_back": _files_back} | changes),
    )


def measured(
    model_type: str, class_name: str, sizes: Mapping[str, tuple[str, int]], counts: Mapping[str, str]
) -> Callable[[Mapping[str, Shape]], dict[str, Any]]:
    """A `Recipe.config_of`.

    Args:
        model_type: of the config.
        class_name: what its `architectures` holds.
        sizes: key -> the tensor and the axis that show it.
        counts: key -> a pattern with one field; one more than the highest index is the value.
    """

    def measure(shapes: Mapping[str, Shape]) -> dict[str, Any]:
        made: dict[str, Any] = {"model_type": model_type, "architectures": [class_name]}
        for key, (name, axis) in sizes.items():
            shape = shapes.get(name, ())
            if axis < len(shape):
                made[key] = shape[axis]
        for key, text in counts.items():
            pattern = Pattern(text)
            (field,) = pattern.fields
            indices = [int(found[field]) for name in shapes if (found := pattern.match(name)) is not None]
            if indices:
                made[key] = max(indices) + 1
        return made

    return measure
