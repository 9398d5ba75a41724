"""What a language model computes before and after a conversion, from the same tokens, by the classes of transformers.

The model is made without its weights. Each module that has some reads them when it is called, and drops them after, so that
memory holds those of one module at a time, in F32, whatever the size of the model. No code of a checkpoint is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

from streamconv.errors import Problem, StreamconvError, UsageError
from streamconv.plans import roles
from streamconv.readers.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from streamconv.ops import Expression

    Read = Callable[[Expression], torch.Tensor]

# By bits of the coarser dtype of two sides: the relative difference that rounding alone may make.
_TOLERANCES = {64: 1e-4, 32: 1e-3, 16: 5e-2, 8: 0.3}
_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Layer:
    """How far two sides are apart after a layer, relative to the norm of the first: 0 where they are equal."""

    name: str
    difference: float


@dataclass(frozen=True, slots=True)
class Activations:
    """What two sides compute from the same tokens.

    Attributes:
        layers: the embedding, every layer, and the logits, in order.
        same_choice: the part of the tokens after which both find the same next one most likely.
        tolerance: the difference of logits that rounding to the dtypes of both explains.
    """

    layers: tuple[Layer, ...]
    same_choice: float
    tolerance: float

    @property
    def close(self) -> bool:
        """Whether rounding explains how far the logits are apart."""
        return self.layers[-1].difference <= self.tolerance


def require_runnable(side: Checkpoint) -> None:
    """Refuse by its config, before a tensor is read, what `compare_activations` cannot run.

    Raises:
        UsageError: torch or transformers is missing, or does not know the model.
    """
    _require_libraries()
    with _of_transformers(side):
        _config(side)


def _require_libraries() -> None:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UsageError(
            f"{error.name} is not installed, and --logits needs it", hint="pip install 'streamconv[torch]'"
        ) from error
    del torch, transformers


def compare_activations(left: Checkpoint, right: Checkpoint, read: Read) -> Activations:
    """Run two checkpoints of one language model on the same tokens, one after the other.

    Raises:
        UsageError: see `require_runnable`; or the two have other layers, or a model has not the tensors of its class.
    """
    _require_libraries()
    import torch

    models = [_model(side, read) for side in (left, right)]
    words = min(model.config.get_text_config().vocab_size for model in models)
    tokens = torch.randint(words, (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    states = []
    for side, model in zip((left, right), models, strict=True):
        with torch.no_grad(), _of_transformers(side):
            found = model(tokens, output_hidden_states=True, use_cache=False)
        states.append([*found.hidden_states, found.logits[..., :words]])
    shapes = [[tuple(state.shape) for state in side] for side in states]
    if shapes[0] != shapes[1]:
        raise UsageError(
            "the two have other layers than each other, so that their activations cannot be compared",
            file=str(right.path),
            hint="--logits is for a conversion of all layers; leave it out",
        )
    names = ["embedding", *(f"layer {number}" for number in range(len(states[0]) - 2)), "logits"]
    choices = [side[-1].argmax(-1) for side in states]
    bits = min(_bits(side) for side in (left, right))
    return Activations(
        tuple(Layer(name, _apart(a, b)) for name, a, b in zip(names, *states, strict=True)),
        float((choices[0] == choices[1]).float().mean()),
        _TOLERANCES.get(bits, max(_TOLERANCES.values())),
    )


def _bits(side: Checkpoint) -> int:
    """Bits of the coarsest floating-point dtype."""
    return min(
        (each.spec.dtype.bits for each in side.values() if each.spec.dtype.kind == "float"), default=32
    )


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    distance = (a - b).norm() / a.norm().clamp_min(1e-30)
    return float(distance) if bool(distance.isfinite()) else float("inf")


def _model(side: Checkpoint, read: Read) -> Any:
    """The model of a checkpoint, which reads its weights as it needs them."""
    import torch
    from transformers import AutoModelForCausalLM

    classes: Any = AutoModelForCausalLM
    with _of_transformers(side), _without_weights():
        config = _config(side)
        model = classes.from_config(config, dtype=torch.float32)
    model.eval()
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    held = {
        parameter: next((name for name in tied if name in side), None) for parameter, tied in names.items()
    }
    missing = [
        Problem("it is not in the checkpoint", tensor=tied[0]) for it, tied in names.items() if not held[it]
    ]
    missing += [
        Problem(f"{list(side[name].spec.shape)}, expected {list(it.shape)}", tensor=name)
        for it, name in held.items()
        if name and side[name].spec.shape != tuple(it.shape)
    ]
    if missing:
        raise UsageError(
            "it has not the tensors that transformers' class of its model has",
            file=str(side.path),
            hint="--logits runs what transformers loads without changing a tensor; convert experts with --to-arch packed",
            problems=missing,
        )
    for name, buffer in model.named_buffers():
        if name in side:
            buffer.copy_(read(side[name]).to(buffer.dtype))
    for module in model.modules():
        own = {
            name: (parameter, side[held[parameter] or ""])
            for name, parameter in module.named_parameters(recurse=False)
        }
        if own:
            _stream(module, own, read)
    return model


def _stream(
    module: torch.nn.Module, own: dict[str, tuple[torch.nn.Parameter, Expression]], read: Read
) -> None:
    """Have a module read its weights when it is called, and drop them after."""
    import torch

    def fetch(*_: object) -> None:
        for name, (_empty, tensor) in own.items():
            module._parameters[name] = torch.nn.Parameter(read(tensor).float(), requires_grad=False)

    def drop(*_: object) -> None:
        for name, (empty, _tensor) in own.items():
            module._parameters[name] = empty

    module.register_forward_pre_hook(fetch)
    module.register_forward_hook(drop)


def _config(side: Checkpoint) -> Any:
    """The config of a checkpoint for transformers. Raises UsageError where that has no class for it of its own."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    component, *others = side.models
    config = dict(component.config or {})
    kind = config.pop("model_type", None)
    known = kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    if others or not known or config.get("quantization_config"):
        raise UsageError(
            f"transformers has no language model for it ({'several models' if others else kind or 'no config'})",
            file=str(side.path),
            hint="--logits is for unquantised language models whose class is in transformers; leave it out",
        )
    for key in ("auto_map", "dtype", "torch_dtype"):
        config.pop(key, None)
    made: Any = CONFIG_MAPPING[kind]
    whole = made(**config)
    # After the keys of the config: one may name a kernel, which transformers would fetch and run.
    whole._attn_implementation = whole._experts_implementation = "eager"
    layers = max(roles.layers(whole.get_text_config().to_dict()), default=0)
    if layers > len(side):  # making them would take for ever
        raise UsageError(
            f"its config has {layers:,} layers, and it has {len(side):,} tensors", file=str(side.path)
        )
    return whole


@contextmanager
def _of_transformers(side: Checkpoint) -> Iterator[None]:
    """Say of what transformers raises, on a config that says anything, whose model it is about."""
    try:
        yield
    except StreamconvError:
        raise
    except Exception as error:  # of its own, of NumPy's, of torch's
        raise UsageError(
            f"transformers cannot run it: {error}",
            file=str(side.path),
            hint="correct its config, or leave --logits out",
        ) from error


@contextmanager
def _without_weights() -> Iterator[None]:
    """Let parameters that are made have no bytes. Buffers keep theirs: they are computed, and in no checkpoint."""
    from torch.nn import Parameter
    from torch.nn.modules import module

    own = get_ident()

    def bare(_module: torch.nn.Module, _name: str, parameter: Parameter) -> Any:
        if parameter.is_meta or get_ident() != own:  # a tied one stays the same; other threads make theirs
            return None
        return Parameter(parameter.to("meta"), requires_grad=False)

    handle = module.register_module_parameter_registration_hook(bare)
    try:
        yield
    finally:
        handle.remove()
