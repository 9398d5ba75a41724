"""What recipes of MindFormers have in common. Each is read MindFormers -> Hugging Face, and backwards the other way.

Source: mindspore-lab/mindformers: mindformers/core/callback/callback.py (what training saves besides weights).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from streamconv.families.mindformers.tables import OUTSIDE, Family, Names
from streamconv.plans.patterns import Pattern
from streamconv.plans.recipe import Files, Recipe, Rule, Surroundings, drop
from streamconv.plans.table import renamed
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

_FREQUENCIES = "model.layers.{i}.self_attn.rotary_emb.inv_freq"
_A_BUFFER = "a buffer that models compute"

FREQUENCIES = Rule(None, _FREQUENCIES, optional=True, reason=_A_BUFFER)
"""What files of old versions have besides, and MindFormers does not."""


def kept_frequencies(when: str) -> Rule:
    """The same for models whose files do have them, which is where `when` holds."""
    # One step of BF16.
    return Rule(
        None,
        _FREQUENCIES,
        equals="frequencies(10000, head_dim, dtype)",
        when=when,
        optional=True,
        reason=_A_BUFFER,
        tolerance=1e-2,
    )


FOUND_LLAMA = ("model.tok_embeddings.embedding_weight", "model.layers.{i}.attention.wq.weight")
"""What tells a net that is like Llama's."""

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def renames(family: Family, but: Collection[str] = ()) -> tuple[Rule, ...]:
    """A rule for each tensor that MindFormers only calls differently.

    Args:
        family: its names.
        but: what other rules are about, as Hugging Face names it.
    """
    pairs = ((renamed(name, family.names), name) for name in family.target.lines.names if name not in but)
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


def united(ours: str, parts: str, theirs: str, groups: str = "1", when: str = "") -> Rule:
    """A rule for a fused projection of Hugging Face that MindFormers has in parts.

    Args:
        ours: the parts' names, `{}` where each differs.
        parts: what stands there, a letter a part, in the order of their rows.
        theirs: the fused projection.
        groups: formula of the number of groups, each of which has rows of all parts.
        when: as in `Rule`.
    """
    return Rule(
        {f"w{part}": ours.replace("{}", part) for part in parts},
        theirs,
        f"x = weave([{', '.join(f'w{part}' for part in parts)}], {groups})",
        when=when,
    )


def prediction(pairs: Mapping[str, tuple[str, str]], names: Names) -> tuple[Rule, ...]:
    """Rules for the parts of DeepSeek-V3's layer that predicts a further token that no other layer has.

    They come before others for embedding and output layer, which the published layer repeats.

    Args:
        pairs: MindFormers' and Hugging Face's name of each, by any key.
        names: of embedding and output layer.
    """
    ours = {key: name for key, (name, _) in pairs.items()}
    theirs = {key: name for key, (_, name) in pairs.items()}
    layer = "model.layers.{k+[layers]}."
    return (
        Rule(
            {**ours, "embedding": names[_EMBEDDING], "head": names[_HEAD]},
            {
                **theirs,
                "embedding": _EMBEDDING,
                "head": _HEAD,
                "again": layer + "embed_tokens.weight",
                "head_again": layer + "shared_head.head.weight",
            },
            """
            embedding, again = copies(embedding)
            head, head_again = copies(head)
            """,
            optional=True,
        ),
        Rule(ours, theirs),
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
    key: str,
    title: str,
    family: Family,
    rules: tuple[Rule, ...],
    found_by: tuple[str, ...],
    **changes: Any,
) -> Recipe:
    """A recipe of MindFormers.

    Args:
        key: what MindFormers calls the family, with its layout where there are several.
        title: as people write it.
        family: both tables.
        rules: all but those for what training leaves in a checkpoint.
        found_by: see `Recipe`.
        changes: what else it has, by attribute.
    """
    return Recipe(
        name=f"mindformers-{key}",
        title=f"{title}: MindFormers -> Hugging Face",
        source=family.net,
        target=family.target,
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
        return made if set(sizes) & set(made) else {}

    return measure
