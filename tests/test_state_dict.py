"""Finding the state dict in a checkpoint, and naming what is in it."""

from __future__ import annotations

import argparse
import json
import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.dtypes import BY_NAME
from streamconv.errors import CheckpointError, located
from streamconv.options.records import Trait
from streamconv.readers import torch_legacy, torch_zip
from streamconv.readers.pickle import Global, Record
from streamconv.readers.state_dict import flatten
from streamconv.readers.torch_rebuild import Unsupported
from streamconv.storage.location import locate
from streamconv.tensor import Extent, Stored, TensorSpec


def tensor(offset: int = 0, shape: tuple[int, ...] = (2,)) -> Stored:
    spec = TensorSpec("", BY_NAME["F32"], shape)
    return Stored(spec, (Extent("/f", offset, spec.nbytes),))


A, B, C, D = (tensor(offset) for offset in (0, 8, 16, 24))
NUMBER = tensor(32, ())


def offsets(state) -> dict[str, int]:
    """What each name stands for; the test's tensors differ by their offsets."""
    for name, value in state.tensors.items():
        assert value.spec.name == name
    return {name: value.extents[0].offset for name, value in state.tensors.items()}


def module(parameters=(), buffers=(), modules=(), hidden=()) -> Record:
    state = {
        "training": False,
        "_parameters": dict(parameters),
        "_buffers": dict(buffers),
        "_modules": dict(modules),
        "_non_persistent_buffers_set": set(hidden),
    }
    return Record(Global("project", "Net"), (), state)


# ----------------------------------------------------------------------------------- which mapping

FOUND = {
    "flat": ({"a": A, "b": B}, "", {"a": 0, "b": 8}),
    "flat with other values": ({"a": A, "version": 1}, "", {"a": 0}),
    "flat with a mapping": ({"a": A, "b": {"c": B}}, "", {"a": 0, "b.c": 8}),
    "flat with a list": ({"a": A, "b": [B, {"c": C}]}, "", {"a": 0, "b.0": 8, "b.1.c": 16}),
    "loose tensors beside a model key": ({"a": A, "model": {"b": B}}, "model", {"b": 8}),
    "loose tensors beside clear names": ({"a": A, "mine": {"b.w": B}}, "mine", {"b.w": 8}),
    "loose numbers and means": (
        {"losses": A, "mean": NUMBER, "class_weights": B, "history": [C], "state_dict": {"a.w": D}},
        "state_dict",
        {"a.w": 24},
    ),
    "an app's state": (
        {"app": {"model": {"a.w": A}, "optim": {"state": {"a.w": {"exp_avg": B}}, "param_groups": []}}},
        "app.model",
        {"a.w": 0},
    ),
    "beside an optimizer of no known key": (
        {"mine": {"a.w": A}, "adam": {"state": {0: {"exp_avg": B}}, "param_groups": []}},
        "mine",
        {"a.w": 0},
    ),
    "beside state of several optimizers": (
        {"a.w": A, "chained_0.optimizer.state.exp_avg.a.w": B, "rng_state": C},
        "",
        {"a.w": 0},
    ),
    "a model and its average": ({"model": {"a": A}, "ema": {"a": B}}, "model", {"a": 0}),
    "timm's average": ({"state_dict": {"a": A}, "state_dict_ema": {"a": B}}, "state_dict", {"a": 0}),
    "only averaged weights": ({"params_ema": {"a": B}, "step": 3}, "params_ema", {"a": 8}),
    "torch's average": ({"n_averaged": NUMBER, "module.a": A}, "", {"a": 0}),
    "torch's average beside a model": (
        {"model": {"a": A}, "copy": {"n_averaged": NUMBER, "module.a": B}},
        "model",
        {"a": 0},
    ),
    "only numbers": ({"scale": NUMBER}, "", {"scale": 32}),
    "one mapping": ({"anything": {"a": A}, "epoch": 3}, "anything", {"a": 0}),
    "two levels": ({"module": {"model": {"a": A}}}, "module.model", {"a": 0}),
    "keys with dots": ({"x.y": {"a.b": A}}, "x.y", {"a.b": 0}),
    "beside an optimizer": ({"net": {"a": A}, "optimizer": {"state": {0: {"exp_avg": B}}}}, "net", {"a": 0}),
    "beside a random state": ({"weights": {"a": A}, "torch_rng_state": B}, "weights", {"a": 0}),
    "beside a number": ({"weights": {"a": A}, "step": NUMBER}, "weights", {"a": 0}),
    "beside many": (
        {
            "sd": {"a": A},
            "optimizer_states": [B],
            "lr_schedulers": [B],
            "callbacks": {"x": C},
            "opt": {"x": D},
        },
        "sd",
        {"a": 0},
    ),
    "beside another model": ({"discriminator": {"x": B}, "model": {"a": A}}, "model", {"a": 0}),
    "parts of one model": (
        {"model": {"encoder": {"a": A}, "decoder": {"b": B}}, "optimizer": {"m": C}},
        "model",
        {"encoder.a": 0, "decoder.b": 8},
    ),
    "parts of one model, deeper": (
        {"state_dict": {"top": {"encoder": {"a": A}, "decoder": {"b": B}}}},
        "state_dict.top",
        {"encoder.a": 0, "decoder.b": 8},
    ),
    "parts of one model, some of whose names have dots": (
        {
            "model": {
                "lm": {"embedding": {"tokens": {"weight": A}}, "encoder": {"0.w": B}, "decoder": {"0.w": C}}
            }
        },
        "model.lm",
        {"embedding.tokens.weight": 0, "encoder.0.w": 8, "decoder.0.w": 16},
    ),
    "layers of one model": (
        {"params": {"Dense_0": {"kernel": A}, "Dense_1": {"kernel": B}}},
        "params",
        {"Dense_0.kernel": 0, "Dense_1.kernel": 8},
    ),
    "loose means with dots beside a model key": (
        {"stats.mean": A, "model": {"a.w": B}},
        "model",
        {"a.w": 8},
    ),
    "first of a pair": (({"a": A}, 7), "0", {"a": 0}),
    "a list of tensors": ([A, B], "", {"0": 0, "1": 8}),
    "in an object": (Record(Global("p", "State"), (), {"model": {"a": A}, "step": 1}), "model", {"a": 0}),
    "an object with items": (Record(Global("p", "Dict"), (), {"_metadata": {}}, {"a": A}), "", {"a": 0}),
    "an object made of tensors": (Record(Global("p", "Pair"), (A, B)), "", {"0": 0, "1": 8}),
    "a module": (module({"w": A}, {"m": B}, {"l": module({"v": C})}), "", {"w": 0, "m": 8, "l.v": 16}),
    "a module below a key": ({"ema": module({}, {}, {"l": module({"v": C})})}, "ema", {"l.v": 16}),
    "the same mapping twice": ({"model": (shared := {"a": A}), "net": shared}, "model", {"a": 0}),
}


@pytest.mark.parametrize(("content", "root", "names"), FOUND.values(), ids=FOUND)
def test_the_root_is_found(content, root, names):
    state = flatten(content, None)
    assert state.root == root
    assert offsets(state) == names
    assert list(state.tensors) == list(names)


@pytest.mark.parametrize(
    ("content", "root", "names"),
    [
        ({"model": {"a": A}, "ema": {"a": B}}, "ema", {"a": 8}),
        ({"model": {"a": A}, "ema": {"a": B}}, "", {"model.a": 0, "ema.a": 8}),
        ({"a": A, "optimizer": {"m": B}}, "", {"a": 0, "optimizer.m": 8}),
        ({"optimizer": {"state": {0: {"exp_avg": A}}}}, "optimizer.state.0", {"exp_avg": 0}),
        ({"x.y": {"z": {"a": A}}, "x": {"y": {"b": B}}}, "x.y.z", {"a": 0}),
        ({"x": {"": 1}, "x.y": {"a": A}}, "x.y", {"a": 0}),
        ([{"a": A}, {"a": B}], "1", {"a": 8}),
        ({"m": module({"w": A}, {}, {"l": module({"v": B})})}, "m.l", {"v": 8}),
    ],
)
def test_a_given_root(content, root, names):
    state = flatten(content, root)
    assert state.root == root and offsets(state) == names


def test_a_bare_tensor():
    assert offsets(flatten(A, None)) == {"tensor": 0}


def test_the_choice_is_noted():
    state = flatten({"discriminator": {"x": B}, "model": {"a": A}, "optimizer": {"m": C}}, None)
    assert state.notes == (
        "took what is at 'model' for the model, and left out the tensors at discriminator, optimizer",
    )
    assert flatten({"model": {"a": A}, "ema": {"a": B}}, "ema").notes == ()


def test_training_state_beside_a_flat_state_dict_is_left_out_with_a_note():
    state = flatten({"a": A, "optimizer": {"m": B}, "lr_scheduler": {"base": [0.1]}}, None)
    assert offsets(state) == {"a": 0}
    assert state.notes == ("took what is at the top for the model, and left out the tensors at optimizer",)
    assert state.metadata == {"lr_scheduler": {"base": [0.1]}}


@pytest.mark.parametrize("outer", ["", "net."])
def test_the_same_modules_under_two_prefixes_are_noted(outer):
    names = [f"{outer}{one}.{name}" for one in ("student", "teacher") for name in ("a.weight", "b.bias")]
    state = flatten({"state_dict": dict(zip(names, (A, B, C, D), strict=True))}, None)
    assert list(state.tensors) == names
    (note,) = state.notes
    assert f"below {outer}student., {outer}teacher.: all are taken; --only '{outer}student.*'" in note
    assert flatten({name.replace("student", "layer_0"): A for name in names}, None).notes == ()


def test_a_module_is_noted():
    assert "pickled project.Net" in flatten(module({"w": A}), None).notes[0]


def test_hidden_buffers_are_left_out():
    state = flatten(module({"w": A, "bias": None}, {"cache": B, "mean": C}, {}, {"cache"}), None)
    assert offsets(state) == {"w": 0, "mean": 16}


def test_keys_become_text():
    keys = {
        1: A, b"b\xff": A, ("t", 2): A, None: A, True + 0.5: A, Global("m", "n"): A,
        Record(Global("m", "Colour"), (3,)): A,
    }  # fmt: skip
    state = flatten({"x": A, "k": keys}, None)
    assert list(state.tensors) == [
        "x", "k.1", r"k.b\xff", "k.t.2", "k.None", "k.1.5", "k.m.n", "k.Colour(3)",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------- the metadata


def test_metadata_is_plain_json():
    content = {
        "model": {"a": A, "extra": {"x": 1}},
        "optimizer": {"m": B},
        "args": Record(Global("argparse", "Namespace"), (), {"lr": 0.5, "dtype": Global("torch", "float16")}),
        "kind": Record(Global("m", "Colour"), (3,)),
        "dict": Record(Global("m", "D"), (), {"hidden": 1}, {"x": 1}),
        "list": Record(Global("m", "L"), (), None, [1]),
        "slots": Record(Global("m", "S"), (), (None, {"x": 1})),
        "empty": Record(Global("m", "E")),
        "many": [(1, 2), {3}, frozenset(), None, True, "é", 1.5],
        "bytes": b"\xff",
        "huge": 1 << 200,
        "complex": 1 + 2j,
        "broken": "\ud800",
        "keys": {1: 2, (1, "a"): 3},
    }
    state = flatten(content, None)
    assert state.metadata == {
        "args": {"lr": 0.5, "dtype": "torch.float16"},
        "kind": {"class": "m.Colour", "args": [3]},
        "dict": {"x": 1},
        "list": [1],
        "slots": {"x": 1},
        "empty": {"class": "m.E"},
        "many": [[1, 2], [3], [], None, True, "é", 1.5],
        "bytes": "1 bytes",
        "huge": "a huge integer",
        "complex": "(1+2j)",
        "broken": r"\ud800",
        "keys": {"1": 2, "1.a": 3},
        "model.extra": {"x": 1},
    }
    json.dumps(state.metadata).encode()


def test_metadata_on_the_way_to_a_deep_root():
    content = {"epoch": 1, "module": {"step": 2, "model": {"a": A, "version": 3}}, "optimizer": {"m": B}}
    assert flatten(content, None).metadata == {"epoch": 1, "module.step": 2, "module.model.version": 3}


def test_metadata_bombs_are_cut_short():
    laughs: object = "x" * 1000
    for _ in range(40):
        laughs = [laughs, laughs]
    cycle: dict[str, object] = {}
    cycle["self"] = cycle
    long_text = "y" * (1 << 20)
    state = flatten({"a": A, "cycle": cycle, "text": long_text, "laughs": laughs}, None)
    assert len(state.metadata["text"]) < 1 << 17
    assert len(json.dumps(state.metadata)) < 1 << 28


# -------------------------------------------------------------------------------------------- errors


def laughing(depth: int) -> dict[str, object]:
    part: dict[str, object] = {"t": A}
    for _ in range(depth):
        part = {"x": part, "y": part}
    return part


def cyclic() -> dict[str, object]:
    part: dict[str, object] = {"a": A}
    part["again"] = {"deeper": [part]}
    return part


def long_keys() -> dict[str, object]:
    part: dict[str, object] = {"t": A}
    for _ in range(100):
        part = {"k" * 60_000: part}
    return part


def module_in_itself() -> Record:
    part = module({"w": A})
    part.state["_modules"]["self"] = part
    return part


REFUSED = {
    "no tensor": ({"a": 1}, None, "it holds no tensor: it is a dict"),
    "an object without": (Record(Global("m", "C")), None, "it holds no tensor: it is an object of m.C"),
    "a number": (7, None, "it holds no tensor: it is 7"),
    "student and teacher": ({"student": {"a.w": A}, "teacher": {"a.w": B}}, None, "KEY: student, teacher"),
    "generator and discriminator": (
        {"generator": {"a": A}, "discriminator": {"a": B}},
        None,
        "KEY: generator, discriminator",
    ),
    "rivals of one model key": (
        {"model": {"student": {"a": A}, "teacher": {"a": B}}},
        None,
        "KEY: model.student, model.teacher",
    ),
    "encoder and decoder": ({"encoder": {"a": A}, "decoder": {"a": B}}, None, "KEY: encoder, decoder"),
    "a list of models": ({"model": [{"a.w": A}, {"a.w": B}]}, None, "KEY: model.0, model.1"),
    "two model keys": ({"model": {"a": A}, "net": {"a": B}}, None, "KEY: model, net"),
    "clear names at the top and below": (
        {"a.weight": A, "model": {"b.w": B}},
        None,
        "KEY: (the top), model)",
    ),
    "whole models under one key, whatever they are called": (
        {"net": {"net_G": {"a.w": A, "b.w": B}, "net_D": {"c.w": C}}},
        None,
        "KEY: net.net_G, net.net_D; all of them together: --root net)",
    ),
    "a whole model beside one of one layer": (
        {"state_dict": {"policy": {"a.w": A}, "value": {"weight": B}, "optimizer": {"m": C}}},
        None,
        "KEY: state_dict.policy, state_dict.value)",
    ),
    "models with keys of their own": (
        {"model": {"gen": {"sd": {"a.w": A}}, "disc": {"sd": {"b.w": B}}}},
        None,
        "KEY: model.gen.sd, model.disc.sd; all",
    ),
    "models with the same names": (
        {"params": {"online": {"kernel": A}, "target": {"kernel": B}}},
        None,
        "KEY: params.online, params.target; all",
    ),
    "two, and an average": (
        {"g": {"a": A}, "d": {"a": B}, "g_ema": {"a": C}},
        None,
        "KEY: g, d; averaged weights, with --ema: g_ema",
    ),
    "random state": (
        {"python": (3, 4), "cpu": Stored(TensorSpec("", BY_NAME["U8"], (5056,)), (Extent("/f", 0, 5056),))},
        None,
        "only random state",
    ),
    "a scheduler": (
        {"base_lrs": [0.1], "last_epoch": 3, "_step_count": 4},
        None,
        "the state of a learning-rate",
    ),
    "optimizer and counter": ({"step": NUMBER, "optimizer": {"m": A}}, None, "only optimizer state"),
    "two unknown": ({"x": {"a": A}, "y": {"a": B}}, None, "more than one place may be the model"),
    "two in a list": ([{"a": A}, {"a": B}], None, "--root KEY: 0, 1"),
    "optimizer alone": ({"optimizer": {"state": {"m": A}}}, None, "--root KEY, with one of: optimizer)"),
    "no such root": (
        {"model": {"a": A}},
        "modle",
        "no mapping with tensors at 'modle' (tensors are at: model)",
    ),
    "root beyond": ({"model": {"a": A}}, "model.x", "no mapping with tensors at 'model.x'"),
    "root that is a tensor": ({"model": {"a": A}}, "model.a", "no mapping with tensors at 'model.a'"),
    "root without tensors": ({"a": A, "args": {"x": 1}}, "args", "(tensors are at: (the top))"),
    "same name twice": ({"a.b": A, "a": {"b": B}}, None, "tensor 'a.b': two tensors have this name"),
    "number and text": ({1: A, "1": B}, None, "tensor '1': two tensors have this name"),
    "empty name": ({"": A, "x": B}, None, "its name is empty"),
    "broken name": ({"\ud800": A}, None, r"tensor '\ud800': its name is not valid Unicode"),
    "shared beyond measure": (laughing(40), "", "the same parts occur in it far too many times"),
    "a cycle": (cyclic(), None, "'again.deeper.0' contains itself"),
    "a module in itself": (module_in_itself(), None, "'self' contains itself"),
    "endless names": (long_keys(), "", "names of 60000 characters"),
    "nothing but unsupported": ({"b": Unsupported("it is sparse")}, None, "tensor 'b': it is sparse"),
    "a bare unsupported one": (Unsupported("it is sparse"), None, "tensor 'tensor': it is sparse"),
    "a shard": (
        {"w": Record(Global("torch.distributed.tensor", "DTensor"), (), {"_local_tensor": A})},
        None,
        "tensor 'w': it is one rank's part of a DTensor",
    ),
    "an unknown rebuild function": (
        {"w": Record(Global("torch._utils", "_rebuild_tensor_v9"), (A,))},
        None,
        "tensor 'w': it is made by torch._utils._rebuild_tensor_v9",
    ),
    "a tensor of long ago": (
        {"w": Record(Global("torch", "FloatTensor"))},
        None,
        "made by torch.FloatTensor",
    ),
}


@pytest.mark.parametrize(("content", "root", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(content, root, message):
    with pytest.raises(CheckpointError) as caught, located("f.pt"):
        flatten(content, root)
    assert message in str(caught.value)
    assert str(caught.value).startswith("f.pt: ")


def test_all_unreadable_tensors_are_reported_at_once():
    bad = {f"t{i}": Unsupported(f"reason {i}") for i in range(5)}
    assert flatten({"model": {"a": A, **bad}}, None).unreadable == {f"t{i}": f"reason {i}" for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        flatten({"model": bad}, None)
    assert [(problem.tensor, problem.message) for problem in caught.value.problems] == [
        (f"t{i}", f"reason {i}") for i in range(5)
    ]


def test_one_state_shared_by_many_objects_is_bounded(monkeypatch):
    monkeypatch.setattr("streamconv.readers.tree._MAX_VALUES", 1000)
    state = {str(i): i for i in range(100)}
    content = {"a": A, "objects": [Record(Global("m", "C"), (), state) for _ in range(20)]}
    with pytest.raises(CheckpointError, match="more than 1000 values"):
        flatten(content, None)


def test_long_lists_of_places_are_cut():
    with pytest.raises(CheckpointError, match="and 80 more"):
        flatten({f"part{i}": {"a": A} for i in range(100)}, None)


# ------------------------------------------------------------------------------- properties, and torch

trees = st.recursive(
    st.just("tensor") | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=4)
    ),
    max_leaves=20,
)


@settings(deadline=None)
@given(trees)
def test_every_tensor_is_named_by_its_path(tree):
    expected: dict[str, int] = {}

    def build(part, path):
        if part == "tensor":
            expected[".".join(path)] = len(expected) * 8
            return tensor(expected[".".join(path)])
        if isinstance(part, dict):
            return {key: build(value, (*path, key)) for key, value in part.items()}
        if isinstance(part, list):
            return [build(value, (*path, str(index))) for index, value in enumerate(part)]
        return part

    content = build(tree, ())
    if isinstance(content, Stored):
        expected = {"tensor": 0}
    if expected:
        assert offsets(flatten(content, "")) == expected
    else:
        with pytest.raises(CheckpointError, match="holds no tensor"):
            flatten(content, "")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3, bias=False), torch.nn.BatchNorm1d(3)])
        self.tied = self.layers[0]
        self.register_buffer("cache", torch.zeros(2), persistent=False)
        self.register_buffer("table", torch.arange(4))
        self.register_parameter("nothing", None)
        self.extras = torch.nn.ParameterDict({"x": torch.ones(1)})


@pytest.mark.parametrize(("load", "zipped"), [(torch_zip.load, True), (torch_legacy.load, False)])
@pytest.mark.filterwarnings("ignore")
def test_modules_are_named_as_torch_names_them(tmp_path, load, zipped):
    path = str(tmp_path / "net.pt")
    net = Net()
    torch.save({"model": net, "epoch": 3}, path, _use_new_zipfile_serialization=zipped)
    state = flatten(load(locate(path)).content, None)
    assert state.root == "model" and state.metadata == {"epoch": 3}
    assert {name: value.spec.shape for name, value in state.tensors.items()} == {
        name: tuple(value.shape) for name, value in net.state_dict().items()
    }
    assert list(state.tensors) == list(net.state_dict())


def test_a_training_checkpoint(tmp_path):
    path = str(tmp_path / "checkpoint.pt")
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(2)).sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 1,
            "step": torch.tensor(5),
            "model_state_dict": net.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)),
            "rng_state": torch.get_rng_state(),
            "loss": math.inf,
            "history": numpy.arange(3),
        },
        path,
    )
    state = flatten(torch_zip.load(locate(path)).content, None)
    assert state.root == "model_state_dict" and list(state.tensors) == ["weight", "bias"]
    assert state.metadata["args"] == {"lr": 0.1, "betas": [0.9, 0.95]}
    assert state.metadata["epoch"] == 1 and state.metadata["loss"] == math.inf


AVERAGED = {
    "beside a model": ({"model": {"a": A}, "ema": {"a": B}}, "ema", {"a": 8}),
    "timm's": ({"state_dict": {"a": A}, "state_dict_ema": {"a": B}}, "state_dict_ema", {"a": 8}),
    "one level down": ({"model": {"a": A}, "ema": {"module": {"a": B}, "decay": 0.9}}, "ema.module", {"a": 8}),
    "torch's": (
        {"model": {"a": A}, "copy": {"n_averaged": NUMBER, "module.a": B}}, "copy", {"a": 8},
    ),
    "of a callback": (
        {"state_dict": {"a": A}, "callbacks": {"SWA": {"average_model_state": {"n_averaged": NUMBER, "module.a": B}}}},
        "callbacks.SWA.average_model_state",
        {"a": 8},
    ),
    "beside two models": ({"g": {"a": A}, "d": {"a": B}, "g_ema": {"a": C}}, "g_ema", {"a": 16}),
    "beside names at the top": ({"a.w": A, "ema": {"a.w": B}}, "ema", {"a.w": 8}),
    "alone": ({"params_ema": {"a": B}}, "params_ema", {"a": 8}),
}  # fmt: skip


@pytest.mark.parametrize(("content", "root", "names"), AVERAGED.values(), ids=AVERAGED)
def test_averaged_weights_are_taken_where_they_are_wanted(content, root, names):
    state = flatten(content, None, ema=True)
    assert state.root == root and offsets(state) == names
    assert Trait.AVERAGED in state.reported
