"""What every recipe of MindFormers must do, besides `RecipeContract`.

A test class says how a Hugging Face model is made (`hf_model`) and what MindFormers calls and shapes its tensors,
in torch and independently of the recipe (`official`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
import transformers as hf
from comparing import assert_alike, terms_of
from recipe_contract import RecipeContract, contents, load
from safetensors.torch import load_file, save_file

import streamconv
from streamconv.plans.recipe import Recipe

Tensors = dict[str, torch.Tensor]


def randomize(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Values that tell every tensor and row from any other."""
    torch.manual_seed(0)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.8 if parameter.ndim == 1 else 0))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = torch.randn_like(buffer, dtype=torch.float32)
    return model


def saved(config: Any, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of the real class of a config, on disk."""
    model = randomize(hf.AutoModelForCausalLM.from_config(config), dtype)
    model.save_pretrained(directory)
    return model


def tensors_of(directory: Path) -> Tensors:
    """Everything in a directory's safetensors files."""
    found: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bare(directory: Path) -> Path:
    """The weights of a directory alone, without the config beside them."""
    place = directory.parent / f"{directory.name}-bare"
    place.mkdir()
    return Path(shutil.copy(directory / "model.safetensors", place))


def assert_same(found: Tensors, expected: Tensors) -> None:
    """The same names, shapes, dtypes and values."""
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


class MindFormersContract(RecipeContract):
    """See the module's text."""

    configs: ClassVar[tuple[Any, ...]]
    """Of transformers; the first is that of the whole contract."""
    auto_class: ClassVar[Any] = hf.AutoModelForCausalLM
    not_written: ClassVar[frozenset[str]] = frozenset()
    """Tensors of the Hugging Face model that do not come back."""

    def test_every_rule_says_why(self, chosen: Recipe) -> None:
        for rule in chosen.rules:
            assert rule.reason or (rule.sources and rule.targets), str(rule)

    def official(self, state: Tensors, config: Any) -> Tensors:
        """What MindFormers' converter makes of a Hugging Face checkpoint's tensors."""
        raise NotImplementedError

    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        """A Hugging Face directory of one of `configs`."""
        saved(self.configs[number], directory, dtype)

    def model(self, directory: Path) -> Any:
        """The real class, loaded strictly."""
        return load(directory, self.auto_class)

    def outputs(self, model: Any) -> torch.Tensor:
        """What a model computes of the same input each time."""
        return model(torch.arange(20)[None] + 3).logits

    def assert_same_model(self, found: Path, expected: Path) -> None:
        """That the real class computes the same from both directories, in F32."""
        models = [self.model(each).float() for each in (found, expected)]
        with torch.no_grad():
            assert_alike(*(self.outputs(each) for each in models), terms_of(models[1]))

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return self.mindformers(0, tmp_path, torch.float32)

    def mindformers(self, number: int, tmp_path: Path, dtype: torch.dtype) -> Path:
        """A Hugging Face model under MindFormers' names."""
        self.make_hf(number, tmp_path / "hf", dtype)
        streamconv.convert(
            tmp_path / "hf", tmp_path / "mf", recipe=self.recipe, reverse=True, engine="inline"
        )
        return tmp_path / "mf"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_it_is_what_the_official_converter_makes_and_back_the_same_model(
        self, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        for number, config in enumerate(self.configs):
            place = tmp_path / str(number)
            source = self.mindformers(number, place, dtype)
            assert_same(tensors_of(source), self.official(tensors_of(place / "hf"), config))
            streamconv.convert(source, place / "back", recipe=self.recipe, engine="inline")
            wanted = {
                name: value for name, value in contents(place / "hf").items() if name not in self.not_written
            }
            assert contents(place / "back") == wanted
            assert (place / "back/config.json").read_text() == (place / "hf/config.json").read_text()
            # To the byte it is the same in every dtype; once shows that the class computes the same from it.
            if dtype == torch.float32:
                self.assert_same_model(place / "back", place / "hf")


class ReferenceContract(MindFormersContract):
    """For a family that transformers has no class for: `configs` are those of a module of `reference_models`."""

    module: ClassVar[ModuleType]

    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        self.module.write(directory, self.configs[number], dtype=dtype, form="safetensors")

    def model(self, directory: Path) -> Any:
        return self.module.load(directory)

    def outputs(self, model: Any) -> torch.Tensor:
        return model(torch.arange(20)[None] + 3)


class ShapesContract(MindFormersContract):
    """For a family without a class at hand: `configs` are contents of config.json, `shapes` says what it has."""

    def shapes(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Every tensor of a Hugging Face model."""
        raise NotImplementedError

    def make_hf(self, number: int, directory: Path, dtype: torch.dtype) -> None:
        torch.manual_seed(number)
        directory.mkdir(parents=True)
        config = self.configs[number]
        state = {name: torch.randn(shape).to(dtype) for name, shape in self.shapes(config).items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def assert_same_model(self, found: Path, expected: Path) -> None:
        """There is no class to ask; names, shapes and bytes are compared."""
