"""What every recipe must do. A test class of a recipe inherits it and says how a source is made.

class TestYi(RecipeContract):
    recipe = "yi-llama"

    @pytest.fixture(params=["F32", "BF16"])
    def source(self, request, tmp_path): ...   # a directory with config.json and weights
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import orjson
import pytest
import torch
import transformers

import streamconv
from streamconv.errors import PlanError, StreamconvError
from streamconv.plans import from_json, named, to_json
from streamconv.plans.recipe import Recipe


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a checkpoint: dtype, shape, bytes."""
    opened = streamconv.open(directory)
    return {
        name: (opened[name].spec.dtype.name, opened[name].spec.shape, opened[name].numpy().tobytes())
        for name in opened
    }


def shapes_of(
    config: Path, auto_class: Any = transformers.AutoModelForCausalLM
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the real class of a config, without memory for it."""
    with torch.device("meta"):
        model = auto_class.from_config(transformers.AutoConfig.from_pretrained(config))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def load(directory: Path, auto_class: Any = transformers.AutoModelForCausalLM) -> Any:
    """The real class with a directory's weights, with no key missing, unexpected or of another shape."""
    model, info = auto_class.from_pretrained(directory, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


class RecipeContract:
    """See the module's text."""

    recipe: ClassVar[str]
    """Its name."""
    back_needs: ClassVar[str | None] = None
    """`config` where the way back takes the source's config along (`like`), else None."""
    not_restored: ClassVar[frozenset[str]] = frozenset()
    """Source tensors that the way back does not bring (dropped buffers)."""

    @pytest.fixture
    def chosen(self) -> Recipe:
        return named(self.recipe)

    @pytest.fixture
    def target(self, source: Path, tmp_path: Path) -> Path:
        """The source, converted."""
        streamconv.convert(source, tmp_path / "target", recipe=self.recipe, engine="inline")
        return tmp_path / "target"

    def test_every_rule_says_why(self, chosen: Recipe) -> None:
        for rule in chosen.rules:
            assert rule.targets or rule.reason or rule.equals, str(rule)
            assert rule.sources or rule.equals, str(rule)

    def test_the_plan_says_how_exact_it_is_and_is_data(self, source: Path) -> None:
        plan = streamconv.plan(source, recipe=self.recipe)
        assert from_json(orjson.loads(orjson.dumps(to_json(plan)))) == plan
        assert {tensor.exactness.label for tensor in plan.tensors}

    def test_it_finds_itself(self, source: Path, chosen: Recipe) -> None:
        if chosen.target is None:
            pytest.fail(
                "override this test: a recipe without a target architecture is not found by --to-arch"
            )
        plan = streamconv.plan(source, to_arch=chosen.target.name)
        assert any(note.startswith(f"recipe {self.recipe}:") for note in plan.notes)

    def test_blocks_workers_and_shards_do_not_change_a_byte(
        self, source: Path, target: Path, tmp_path: Path
    ) -> None:
        streamconv.convert(
            source,
            tmp_path / "small",
            recipe=self.recipe,
            memory_budget="32MiB",
            workers=2,
            max_shard="100KB",
        )
        assert contents(tmp_path / "small") == contents(target)

    def test_forward_and_back_is_the_source(
        self, source: Path, target: Path, tmp_path: Path, chosen: Recipe
    ) -> None:
        if chosen.one_way:
            with pytest.raises(StreamconvError, match="no way back"):
                streamconv.plan(target, recipe=self.recipe, reverse=True)
            return
        like = {"like": source} if self.back_needs == "config" else {}
        streamconv.convert(
            target, tmp_path / "back", recipe=self.recipe, reverse=True, engine="inline", **like
        )
        before, after = contents(source), contents(tmp_path / "back")
        assert {name: after.get(name) for name in before if name not in self.not_restored} == after

    def test_a_missing_tensor_is_named(self, source: Path, chosen: Recipe) -> None:
        names = sorted(streamconv.open(source))
        lost = next(name for name in names if "norm" in name.lower() or "ln" in name.lower())
        with pytest.raises(PlanError) as caught:
            streamconv.plan(source, recipe=self.recipe, drop=[lost])
        assert lost in str(caught.value)

    def test_a_foreign_tensor_is_named(self, source: Path) -> None:
        lost = next(iter(streamconv.open(source)))
        with pytest.raises(PlanError) as caught:
            streamconv.plan(source, recipe=self.recipe, rename=[f"{lost}=something.else"])
        assert "something.else" in str(caught.value)
