"""What is the model in a checkpoint: written by the libraries that own the formats, in every container.

Reports behind these tests are listed in `tests/public_reports.md`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed.checkpoint as dcp
from comparing import same
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

import streamconv
from streamconv import api
from streamconv.errors import CheckpointError, PlanError, StreamconvError, UsageError

State = dict[str, Any]


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def trained(seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    net(net.embed(torch.arange(7))).sum().backward()
    optimizer.step()
    return net, optimizer


def as_zip(state: State, path: Path) -> Path:
    torch.save(state, path / "run.pt")
    return path / "run.pt"


def as_legacy(state: State, path: Path) -> Path:
    torch.save(state, path / "run.pt", _use_new_zipfile_serialization=False)
    return path / "run.pt"


def as_dcp(state: State, path: Path) -> Path:
    dcp.save(state, checkpoint_id=path / "run", no_dist=True)
    return path / "run"


CONTAINERS = {"zip": as_zip, "legacy": as_legacy, "DCP": as_dcp}
Container = Callable[[State, Path], Path]


@pytest.fixture(params=CONTAINERS.values(), ids=CONTAINERS.keys())
def written(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[State], Path]:
    (tmp_path / "in").mkdir()
    return lambda state: request.param(state, tmp_path / "in")


def converted(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    streamconv.convert(source, out, **options)
    return load_file(out / "model.safetensors")


def assert_loads(found: dict[str, torch.Tensor], net: torch.nn.Module) -> None:
    other = Net()
    other.load_state_dict(found, strict=True)
    wanted = net.state_dict()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []


# ------------------------------------------------------------------------------- outer keys

LOOSE: dict[str, State] = {
    "losses": {"losses": torch.rand(3)},
    "class weights": {"class_weights": torch.rand(5), "epoch": 3},
    "means": {"mean": torch.rand(3), "std": torch.rand(3)},
    "a counter": {"step": torch.tensor(7)},
    "lists": {"history": [torch.rand(2), torch.rand(2)]},
}


@pytest.mark.parametrize("beside", LOOSE.values(), ids=LOOSE)
@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_whatever_lies_beside_the_model(written, key: str, beside: State) -> None:
    net, optimizer = trained()
    source = written({**beside, key: net.state_dict(), "optimizer": optimizer.state_dict()})
    assert_loads(converted(source), net)
    (note,) = (note for note in streamconv.plan(source).notes if "left out" in note)
    names = [name for name, value in beside.items() if not isinstance(value, int)]
    assert all(name in note for name in (*names, "optimizer"))


@pytest.mark.parametrize("beside", ["losses", "loss", "class_weights", "metrics"])
def test_a_model_of_one_layer_under_any_key(written, beside: str) -> None:
    layer = torch.nn.Linear(2, 2)
    found = converted(written({"my_net": layer.state_dict(), beside: torch.rand(4)}))
    torch.nn.Linear(2, 2).load_state_dict(found, strict=True)


@pytest.mark.parametrize("outer", ["app", "state", "checkpoint"])
@pytest.mark.parametrize("keys", [("model", "optim"), ("state_dict", "optimizer_state_dict")])
def test_an_app_state_is_its_model(written, outer: str, keys: tuple[str, str]) -> None:
    net, optimizer = trained()
    model, optim = get_model_state_dict(net), get_optimizer_state_dict(net, optimizer)
    source = written({outer: dict(zip(keys, (model, optim), strict=True)), "step": torch.tensor(3)})
    assert_loads(converted(source), net)


def test_an_app_state_as_the_tutorial_saves_it(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.stateful import Stateful

    class AppState(Stateful):
        def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
            self.model, self.optimizer = model, optimizer

        def state_dict(self) -> State:
            model, optimizer = get_state_dict(self.model, self.optimizer)
            return {"model": model, "optim": optimizer}

        def load_state_dict(self, state_dict: State) -> None:
            raise NotImplementedError

    net, optimizer = trained()
    dcp.save({"app": AppState(net, optimizer)}, checkpoint_id=tmp_path / "run", no_dist=True)
    assert_loads(converted(tmp_path / "run", optimizer=True), net)
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        found = load_file(tmp_path / "out" / "optimizer" / moment / "model.safetensors")
        wanted = {
            name: optimizer.state[parameter][moment]
            for name, parameter in net.named_parameters()
            if moment in optimizer.state[parameter]
        }
        assert found.keys() == wanted.keys()
        assert all(same(found[name], wanted[name]) for name in wanted)


def flattened(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """As torchtitan asks torch for it: a name for every tensor and every setting."""
    return get_optimizer_state_dict(
        net, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )


def named(net: torch.nn.Module, _: torch.optim.Optimizer) -> State:
    """As the optimizer of torch.distributed.optim that knows names has it."""
    from torch.distributed.optim import _NamedOptimizer

    optimizer = _NamedOptimizer(net.named_parameters(), torch.optim.AdamW, lr=0.1)
    optimizer.step()
    return optimizer.state_dict()


def plain(_: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    return optimizer.state_dict()


def by_name(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    return get_optimizer_state_dict(net, optimizer)


def chained(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """The keys of Megatron-Core, which is not installed: megatron/core/optimizer/optimizer.py, `ChainedOptimizer`."""
    states = {id(parameter): state for parameter, state in optimizer.state.items()}
    return {
        f"chained_{index}.optimizer.state.{key}.{name}": value
        for index in range(2)
        for name, parameter in net.named_parameters()
        for key, value in states.get(id(parameter), {}).items()
    }


OPTIMIZERS = {"torch": plain, "torch, by name": by_name, "torchtitan": flattened, "names": named}


@pytest.mark.parametrize("saved", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("key", ["optimizer", "distributed_optimizer_0"])
def test_optimizer_state_is_never_weights(written, saved: Callable[..., State], key: str) -> None:
    net, optimizer = trained()
    random = {"rng_state": torch.get_rng_state(), "rng_state/shard_0": torch.get_rng_state()}
    assert_loads(converted(written({**net.state_dict(), key: saved(net, optimizer), **random})), net)


@pytest.mark.parametrize("saved", [chained, flattened])
def test_optimizer_state_among_the_weights_is_not_of_them(written, saved: Callable[..., State]) -> None:
    net, optimizer = trained()
    state = saved(net, optimizer)
    assert any(isinstance(value, torch.Tensor) for value in state.values())
    assert_loads(converted(written({**net.state_dict(), **state})), net)


@pytest.mark.parametrize("prefix", ["adam.state.", "state.", ""])
def test_optimizer_state_in_a_flat_state_dict_is_left_out_with_its_steps(written, prefix: str) -> None:
    net, optimizer = trained()
    names = dict(zip(net.parameters(), (name for name, _ in net.named_parameters()), strict=True))
    flat = {
        f"{prefix}{names[parameter]}.{word}": tensor
        for parameter, state in optimizer.state.items()
        for word, tensor in state.items()
    }
    assert any(name.endswith(".step") for name in flat)
    assert_loads(converted(written({**net.state_dict(), **flat})), net)


def test_optimizers_of_several_parts(written) -> None:
    net, optimizer = trained()
    state = {"model": net.state_dict(), "optimizers": [optimizer.state_dict(), optimizer.state_dict()]}
    assert_loads(converted(written(state)), net)


@pytest.mark.parametrize(
    "names",
    [
        ("student", "teacher"),
        ("generator", "discriminator"),
        ("encoder", "decoder"),
        ("unet", "text_encoder"),
    ],
)
def test_of_several_models_none_is_picked(written, names: tuple[str, str]) -> None:
    first, second = trained(1)[0], trained(2)[0]
    state = dict(zip(names, (first.state_dict(), second.state_dict()), strict=True))
    source = written({**state, "optimizer": torch.optim.SGD(first.parameters()).state_dict(), "epoch": 3})
    with pytest.raises(CheckpointError, match="more than one place may be the model") as caught:
        streamconv.open(source)
    assert all(name in str(caught.value) for name in names)
    assert_loads(converted(source, root=names[1]), second)


@pytest.mark.parametrize("key", ["nothing", "optimizer.state.nothing"])
def test_a_root_that_is_not_there_is_refused(written, key: str) -> None:
    net, optimizer = trained()
    source = written({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    with pytest.raises(CheckpointError, match="no mapping with tensors at"):
        streamconv.open(source, root=key)


# --------------------------------------------------------------------------- averaged weights


@pytest.mark.parametrize(
    "key", ["state_dict_ema", "model_ema", "ema", "ema_model", "ema_state_dict", "swa_model"]
)
def test_averaged_weights_beside_the_others(written, key: str) -> None:
    net, averaged = trained(1)[0], trained(2)[0]
    source = written({"model": net.state_dict(), key: averaged.state_dict()})
    assert_loads(converted(source), net)
    assert any(key in note and "--ema" in note for note in streamconv.plan(source).notes)
    assert_loads(converted(source, ema=True), averaged)
    assert_loads(converted(source, root=key), averaged)


@pytest.mark.parametrize("key", ["model_ema", "copy"])
def test_torchs_averaged_model(written, key: str) -> None:
    net, other = trained(1)[0], trained(2)[0]
    averaged = AveragedModel(other)
    source = written({"model": net.state_dict(), key: averaged.state_dict()})
    assert_loads(converted(source), net)
    assert_loads(converted(source, ema=True), averaged.module)


def test_torchs_averaged_model_alone(written) -> None:
    averaged = AveragedModel(trained()[0])
    source = written(averaged.state_dict())
    assert_loads(converted(source), averaged.module)
    assert_loads(converted(source, ema=True), averaged.module)


@pytest.mark.parametrize("way", ["zip", "legacy"])
def test_averaged_weights_of_other_libraries(tmp_path: Path, way: str) -> None:
    from diffusers.training_utils import EMAModel

    net, _ = stepped("order")
    other = Plain()
    ema = EMAModel(other.parameters())
    source = CONTAINERS[way]({"model": net.state_dict(), "ema": ema.state_dict()}, tmp_path)
    found = converted(source, ema=True)
    assert found.keys() == other.state_dict().keys()
    assert all(same(found[name], each) for name, each in other.state_dict().items())
    assert all(same(each, net.state_dict()[name]) for name, each in converted(source).items())
    theirs = {"initted": torch.tensor(True), "step": torch.tensor(3)}  # lucidrains/ema-pytorch
    for prefix, module in {"online_model": net, "ema_model": other}.items():
        theirs |= {f"{prefix}.{name}": each for name, each in module.state_dict().items()}
    source = CONTAINERS[way]({"model": net.state_dict(), "ema": theirs}, tmp_path)
    found = converted(source, ema=True)
    assert found.keys() == other.state_dict().keys()
    assert all(same(found[name], each) for name, each in other.state_dict().items())


@pytest.mark.parametrize("key", ["averaged", "ema", "swa_model"])
@pytest.mark.parametrize(
    "counts", [{"n_averaged": torch.tensor(3)}, {"decay": torch.ones(1)}, {"n_averaged": 3}]
)
def test_averaged_weights_with_a_count_beside_them(written, key: str, counts: dict[str, Any]) -> None:
    """The count is no model, whether it is a number or a tensor."""
    net = trained()[0]
    source = written({key: net.state_dict(), **counts})
    assert_loads(converted(source), net)
    assert_loads(converted(source, ema=True), net)
    inside = written({"run": {**counts, key: net.state_dict()}, "step": torch.tensor(1)})
    assert_loads(converted(inside), net)


def test_averaged_weights_that_are_not_there(written) -> None:
    net, optimizer = trained()
    source = written({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    with pytest.raises(UsageError, match="--ema has no effect"):
        streamconv.convert(source, source.parent / "out", ema=True)


@pytest.mark.parametrize("prefixes", [("", ""), ("module.", ""), ("", "module."), ("module.", "module.")])
def test_averaged_parameters_are_completed_with_the_models_buffers(
    written, prefixes: tuple[str, str]
) -> None:
    net, other = trained(1)[0], trained(2)[0]
    shadow = {prefixes[1] + name: parameter.detach() for name, parameter in other.named_parameters()}
    state = {prefixes[0] + name: tensor for name, tensor in net.state_dict().items()}
    source = written({"model": state, "ema": {"shadow": shadow, "decay": 0.9}})
    other.load_state_dict(dict(net.named_buffers()), strict=False)
    assert_loads(converted(source, ema=True), other)
    assert any("without an average" in note for note in streamconv.plan(source, ema=True).notes)


def test_averaged_weights_and_a_root_that_are_both_asked_for(written) -> None:
    net, averaged = trained(1)[0], trained(2)[0]
    source = written({"model": net.state_dict(), "ema": averaged.state_dict()})
    with pytest.raises(UsageError, match="--ema has no effect"):
        streamconv.convert(source, source.parent / "out", root="model", ema=True)
    assert_loads(converted(source, root="ema", ema=True), averaged)
    inside = {f"model.{name}": tensor for name, tensor in net.state_dict().items()}
    inside |= {f"ema.{name}": tensor for name, tensor in averaged.state_dict().items()}
    found = converted(written({"state_dict": inside, "epoch": 3}), root="state_dict", ema=True)
    assert_loads({name.removeprefix("model."): tensor for name, tensor in found.items()}, averaged)


@pytest.mark.parametrize("way", ["timm", "torch", "latent diffusion"])
@pytest.mark.parametrize("outer", ["state_dict", ""])
def test_averaged_copies_in_one_state_dict(written, way: str, outer: str) -> None:
    net, other = trained(1)[0], trained(2)[0]
    whole = torch.nn.Module()
    whole.model = net
    if way == "timm":
        whole.model_ema = other
    elif way == "torch":
        whole.ema_model = AveragedModel(other)
    else:
        whole.model_ema = torch.nn.Module()
        for name, parameter in other.named_parameters():
            whole.model_ema.register_buffer(name.replace(".", ""), parameter.detach())
        whole.model_ema.register_buffer("decay", torch.tensor(0.9))
        whole.model_ema.register_buffer("num_updates", torch.tensor(3))
    state = whole.state_dict()
    source = written({outer: state, "epoch": 3} if outer else state)
    assert converted(source).keys() == state.keys()
    assert any("--ema" in note for note in streamconv.plan(source).notes)
    found = converted(source, ema=True)
    buffers = dict(net.named_buffers()) if way == "latent diffusion" else {}
    wanted = {f"model.{name}": buffers.get(name, each) for name, each in other.state_dict().items()}
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not same(found[name], wanted[name])] == []


def test_averaged_copies_in_a_file_of_safetensors(tmp_path: Path) -> None:
    state = {"model.a.weight": torch.zeros(2), "ema.a.weight": torch.ones(2), "model.b": torch.ones(3)}
    save_file(state, tmp_path / "model.safetensors")
    found = converted(tmp_path / "model.safetensors", ema=True)
    assert found.keys() == {"model.a.weight", "model.b"} and found["model.a.weight"].sum() == 2


def test_lightnings_averaged_weights(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import EMAWeightAveraging

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 4)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.net(batch[0]).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5), pl.callbacks.ModelCheckpoint(tmp_path, "run", every_n_train_steps=3)],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 4))))
    run = tmp_path / "run.ckpt"
    saved = torch.load(run, weights_only=False)
    assert not same(saved["state_dict"]["net.weight"], saved["current_model_state"]["net.weight"])
    for key, options in {"state_dict": {}, "current_model_state": {"root": "current_model_state"}}.items():
        found = converted(run, **options)
        assert found.keys() == saved[key].keys() and all(
            same(found[name], saved[key][name]) for name in found
        )
    found = converted(run, ema=True)
    assert all(same(found[name], saved["state_dict"][name]) for name in found)
    Module.load_from_checkpoint(run)
    assert any("averaged" in note for note in streamconv.plan(run).notes)


# ------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "prefix",
    ["_forward_module.", "module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module._orig_mod."],
)
def test_wrappers_are_taken_off(written, prefix: str) -> None:
    net, _ = trained()
    assert_loads(
        converted(written({"state_dict": {prefix + k: v for k, v in net.state_dict().items()}})), net
    )


@pytest.mark.parametrize("own", [torch.nn.Module.state_dict, get_model_state_dict])
def test_a_layer_that_is_compiled_within_a_checkpoint_wrapper(written, own: Callable[..., State]) -> None:
    net, _ = trained()
    wanted = {name: each.clone() for name, each in net.state_dict().items()}
    net.layers[0] = checkpoint_wrapper(torch.compile(net.layers[0]))
    state = own(net)
    assert "layers.0._orig_mod.weight" in state  # which torch itself does not load back without the wrapper
    found = converted(written({"model": state}))
    other = Net()
    other.load_state_dict(found, strict=True)
    assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------- unreadable tensors

UNREADABLE: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.empty(2, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "a subclass": lambda: Tagged(torch.ones(2)),
    "uninitialised": lambda: torch.nn.LazyLinear(3).weight,
    "an uninitialised buffer": lambda: torch.nn.LazyBatchNorm1d().running_mean,
}


class Tagged(torch.Tensor):
    """Its elements may mean anything."""


UNREADABLE |= {
    f"an array of {kind}": lambda array=array: array
    for kind, array in {
        "words": numpy.array(["a", "b"]),
        "objects": numpy.array([None, 1.0], dtype=object),
        "dates": numpy.array(["2020-01-01"], dtype="M8[D]"),
        "long doubles": numpy.arange(3, dtype=numpy.longdouble),
        "records": numpy.zeros(2, dtype=[("x", "f4")]),
        "numbers under a mask": numpy.ma.array([1.0, 2.0], mask=[False, True]),
    }.items()
}


def as_deepspeed(state: State, path: Path) -> Path:
    return engine_saved(path / "run", {**engine_state(Net()), "module": state["model"]})


def as_ranks(state: State, path: Path) -> Path:
    (path / "run").mkdir()
    for rank in range(2):
        torch.save(state["model"], path / "run" / f"model_world_size_2_rank_{rank}.pt")
    return path / "run"


HOLDERS: dict[str, Container] = {**CONTAINERS, "DeepSpeed": as_deepspeed, "ranks": as_ranks}
HELD = [
    (kind, way)
    for kind in UNREADABLE
    for way in HOLDERS
    if way != "DCP" or kind in ("quantised", "a subclass")  # torch itself refuses to save the others so
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "way"), HELD)
def test_a_tensor_that_cannot_be_read_blocks_only_itself(tmp_path: Path, kind: str, way: str) -> None:
    net, _ = trained()
    (tmp_path / "in").mkdir()
    source = HOLDERS[way]({"model": {**net.state_dict(), "odd.one": UNREADABLE[kind]()}}, tmp_path / "in")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(source)
    (problem,) = caught.value.problems
    assert problem.tensor == "odd.one" and problem.hint and "--drop 'odd.one'" in problem.hint
    assert "odd.one" in streamconv.open(source).contents.unreadable
    assert_loads(converted(source, drop=["odd.one"]), net)
    only = converted(source, only=["embed.*"])
    assert list(only) == ["embed.weight"]


@pytest.mark.parametrize("name", ["x{i}.w", "x'y", "-x", "a b", "x[0]", "é\u202e", "x*"])
def test_the_option_that_is_proposed_works_whatever_the_name(tmp_path: Path, name: str) -> None:
    import shlex

    torch.save({"a.w": torch.ones(2), name: torch.empty(2, device="meta")}, tmp_path / "run.pt")
    with pytest.raises(PlanError) as caught:
        streamconv.plan(tmp_path / "run.pt")
    words = shlex.split(str(caught.value.problems[0].hint).split(", or take")[0])
    drop = words[-1].removeprefix("--drop=")
    assert converted(tmp_path / "run.pt", drop=[drop]).keys() == {"a.w"}


@pytest.mark.filterwarnings("ignore")
def test_what_compares_or_merges_needs_every_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.eye(3).to_sparse()}, tmp_path / "run.pt")
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StreamconvError, match="'b': it is sparse"):
        api.compare(tmp_path / "run.pt", tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------ flat parameters

FLAT = {
    "_fsdp_wrapped_module._flat_param": torch.zeros(7),
    "_fsdp_wrapped_module.layer.flat_param": torch.zeros(3),
}


@pytest.mark.parametrize("state", [FLAT, {"model": FLAT}], ids=["bare", "below a key"])
def test_flat_parameters_are_called_by_their_name(written, state: State) -> None:
    with pytest.raises(CheckpointError, match="flat parameter of FSDP1") as caught:
        streamconv.open(written(state))
    assert {problem.tensor for problem in caught.value.problems} == FLAT.keys()


def test_flat_parameters_in_files_of_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(FLAT, tmp_path / f"pytorch_model_rank{rank}.bin")
    with pytest.raises(CheckpointError, match="flat parameter of FSDP1"):
        streamconv.open(tmp_path)


# ------------------------------------------------------------------------- files of training programs


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What accelerate saves of a run of one model."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net, _ = trained()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(4, 4)))
    parts = accelerator.prepare(net, optimizer, scheduler, loader)
    parts[0](torch.rand(7, 4)).sum().backward()
    parts[1].step()
    out = tmp_path_factory.mktemp("accelerate") / "run"
    accelerator.save_state(str(out), safe_serialization=False)
    return out


def test_a_run_of_accelerate_is_its_model(accelerated: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(accelerated, tmp_path / "run"))
    assert {"pytorch_model.bin", "optimizer.bin", "scheduler.bin", "random_states_0.pkl"} <= {
        path.name for path in run.iterdir()
    }
    net = Net()
    net.load_state_dict(torch.load(run / "pytorch_model.bin"))
    assert_loads(converted(run), net)
    (run / "pytorch_model.bin").rename(run / "pytorch_model_fsdp.bin")
    found = converted(run)
    assert_loads(found, net)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_file()] == ["model.safetensors"]


OWN_FILES = {
    "optimizer.bin": "only optimizer state",
    "scheduler.bin": "the state of a learning-rate scheduler",
    "random_states_0.pkl": "only random state",
}


@pytest.mark.parametrize("name", OWN_FILES)
def test_files_of_a_run_are_refused_by_what_they_are(accelerated: Path, tmp_path: Path, name: str) -> None:
    for place in (accelerated / name, Path(shutil.copy(accelerated / name, tmp_path / "x.pt"))):
        with pytest.raises(CheckpointError, match=OWN_FILES[name]):
            streamconv.open(place)
    (tmp_path / "x.pt").unlink()
    shutil.copy(accelerated / name, tmp_path)
    with pytest.raises(CheckpointError, match="no weights are in this directory"):
        streamconv.open(tmp_path)


@pytest.mark.parametrize(
    "name", ["rng_state.pth", "rng_state_0.pth", "scaler.pt", "training_args.bin", "optimizer.pt"]
)
def test_files_of_transformers_trainer(tmp_path: Path, name: str) -> None:
    from transformers import TrainingArguments

    net, optimizer = trained()
    random = {"python": (3, (1, 2), None), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    contents = {
        "rng": random,
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "training": TrainingArguments(str(tmp_path / "x"), use_cpu=True),
        "optimizer": optimizer.state_dict(),
    }
    what = {
        "rng": "random state",
        "scaler": "gradient scaler",
        "training": "TrainingArguments",
        "optimizer": "optimizer",
    }
    kind = next(each for each in contents if name.startswith(each))
    torch.save(contents[kind], tmp_path / name)
    with pytest.raises(CheckpointError, match=what[kind]):
        streamconv.open(tmp_path / name)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert streamconv.open(tmp_path).keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    "name", ["optimizer_rank0.pt", "optimizer-00000-of-00004.pt", "opt.pt", "adam.pt", "Optimizer.PT"]
)
def test_an_optimizer_beside_a_model_is_none_whatever_its_file_is_called(tmp_path: Path, name: str) -> None:
    net, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / name)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert_loads(converted(tmp_path), net)
    with pytest.raises(StreamconvError, match=r"only optimizer state|one shard of several"):
        streamconv.open(tmp_path / name)


OPTIMIZERS = {
    "torch": {"state.0.exp_avg": torch.ones(3), "state.0.step": torch.tensor(1.0)},
    "named": {"optimizer.state.a.weight.exp_avg": torch.ones(3), "optimizer.state.a.weight.step": torch.tensor(1.0)},
    "mlx": {"a.weight.m": torch.ones(3), "a.weight.v": torch.ones(3), "learning_rate": torch.tensor(0.1)},
}  # fmt: skip


@pytest.mark.parametrize("way", OPTIMIZERS)
def test_optimizer_state_in_safetensors_is_never_the_model(tmp_path: Path, way: str) -> None:
    net, _ = trained()
    save_file(OPTIMIZERS[way], tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="only optimizer state"):
        streamconv.open(tmp_path / "optimizer.safetensors")
    with pytest.raises(CheckpointError, match="no weights are in this directory"):
        streamconv.open(tmp_path)
    torch.save(net.state_dict(), tmp_path / "mine.pt")
    assert_loads(converted(tmp_path), net)
    if way != "mlx":
        save_file(OPTIMIZERS[way] | net.state_dict(), tmp_path / "both.safetensors")
        assert_loads(converted(tmp_path / "both.safetensors"), net)
        assert converted(tmp_path / "both.safetensors", root="").keys() > net.state_dict().keys()


def test_a_file_of_safetensors_is_looked_at_as_a_state_dict_is(tmp_path: Path) -> None:
    averaged = AveragedModel(trained()[0])
    save_file(averaged.state_dict(), tmp_path / "model.safetensors")
    assert_loads(converted(tmp_path / "model.safetensors"), averaged.module)
    save_file(FLAT, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="flat parameter of FSDP1"):
        streamconv.open(tmp_path / "model.safetensors")


def megatron(path: Path, ranks: list[str], **args: int) -> Path:
    from argparse import Namespace

    for number, rank in enumerate(ranks):
        (path / rank).mkdir(parents=True)
        state = {"embedding": {"word_embeddings": {"weight": torch.full((4, 2), number)}}}
        state["encoder"] = {"layers.0.weight": torch.ones(2)}
        saved = {"args": Namespace(**args), "model": {"language_model": state}, "iteration": 1}
        torch.save(saved, path / rank / "model_optim_rng.pt")
    return path


@pytest.mark.parametrize(
    "ranks", [["mp_rank_00", "mp_rank_01"], ["mp_rank_00_000", "mp_rank_00_001"], ["mp_rank_01"]]
)
def test_one_rank_of_megatron_is_refused(tmp_path: Path, ranks: list[str]) -> None:
    run = megatron(tmp_path / "iter_0000001", ranks)
    for path in (run / ranks[-1], run / ranks[-1] / "model_optim_rng.pt", run / ranks[0]):
        with pytest.raises(UsageError, match="one rank of a model that Megatron has split"):
            streamconv.open(path)
    with pytest.raises(CheckpointError, match=r"Megatron has split; .*convert\.py") as caught:
        streamconv.open(run)
    assert "give one of them" not in str(caught.value)


def test_a_run_of_megatron_on_one_rank_is_read(tmp_path: Path) -> None:
    run = megatron(tmp_path / "iter_0000001", ["mp_rank_00"], tensor_model_parallel_size=1)
    for path in (run / "mp_rank_00", run / "mp_rank_00" / "model_optim_rng.pt"):
        assert len(converted(path)) == 2
        shutil.rmtree(path.parent / "out")
    with pytest.raises(CheckpointError, match="give one of them: mp_rank_00"):
        streamconv.open(run)
    run = megatron(tmp_path / "other", ["mp_rank_00"], tensor_model_parallel_size=2)
    shutil.copy(run / "mp_rank_00" / "model_optim_rng.pt", tmp_path / "x.pt")
    for path in (tmp_path / "x.pt", run / "mp_rank_00"):
        with pytest.raises(UsageError, match="by its own args"):
            streamconv.open(path)


def test_shards_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save_file({f"a{number}": torch.ones(2)}, tmp_path / f"model-0000{number}-of-00003.safetensors")
    save_file({"a1": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="several weight files") as caught:
        streamconv.open(tmp_path)
    assert all(f"model-00001-of-0000{count}" in str(caught.value) for count in (2, 3))


@pytest.mark.parametrize("safe", [True, False])
def test_two_models_of_one_run_are_both_named(tmp_path: Path, safe: bool) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(trained(1)[0], trained(2)[0])
    accelerator.save_state(str(tmp_path / "run"), safe_serialization=safe)
    names = (
        ("model.safetensors", "model_1.safetensors") if safe else ("pytorch_model.bin", "pytorch_model_1.bin")
    )
    with pytest.raises(CheckpointError, match="several weight files") as caught:
        streamconv.open(tmp_path / "run")
    assert all(name in str(caught.value) for name in names)
    assert streamconv.open(tmp_path / "run" / names[1]).keys() == trained()[0].state_dict().keys()


def test_a_training_directory_of_diffusers_is_answered_with_its_models(
    accelerated: Path, tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL
    from diffusers.training_utils import EMAModel

    run = tmp_path / "checkpoint-5"
    small = dict.fromkeys(("in_channels", "out_channels", "latent_channels"), 3)
    model = AutoencoderKL(**small, block_out_channels=(4,), norm_num_groups=2)
    model.save_pretrained(run / "unet")
    EMAModel(model.parameters(), model_cls=AutoencoderKL, model_config=model.config).save_pretrained(
        run / "unet_ema"
    )
    for name in OWN_FILES:
        shutil.copy(accelerated / name, run)
    with pytest.raises(CheckpointError, match="give one of them: unet_ema, unet"):
        streamconv.open(run)
    assert streamconv.open(run / "unet_ema").keys() == model.state_dict().keys()


def test_checkpoints_one_level_down_are_named_whatever_their_format(tmp_path: Path) -> None:
    net, _ = trained()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    save_file(net.state_dict(), tmp_path / "a" / "anything.safetensors")
    torch.save({"model": net.state_dict()}, tmp_path / "b" / "epoch3.ckpt")
    (tmp_path / "c" / "global_step3").mkdir()
    torch.save({"module": net.state_dict()}, tmp_path / "c" / "global_step3" / "mp_rank_00_model_states.pt")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "events.txt").write_text("")
    with pytest.raises(CheckpointError, match="one level down, give one of them: c, b, a"):
        streamconv.open(tmp_path)


# ------------------------------------------------------- elements that are said in another way


def test_what_torch_notes_and_does_not_do_is_done(tmp_path: Path) -> None:
    values = torch.randn(3, 5, dtype=torch.complex64)
    state = {
        "conjugated": values.conj(),
        "transposed": values.conj().t(),
        "imaginary": values.clone().conj().imag,
        "negated": torch._neg_view(torch.randn(4)),
        "double": torch.randn(3, dtype=torch.complex128).conj(),
        "both": torch._neg_view(values.conj()),
    }
    assert all(each.is_conj() or each.is_neg() for each in state.values())
    torch.save({"model": state}, tmp_path / "run.pt")
    streamconv.convert(tmp_path / "run.pt", tmp_path / "out", to="torch")
    found = torch.load(tmp_path / "out" / "pytorch_model.bin")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert same(found[name], tensor.resolve_conj().resolve_neg()), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_numpy_are_tensors(tmp_path: Path, protocol: int) -> None:
    arrays: dict[str, Any] = {
        "f32": numpy.arange(6, dtype="f4").reshape(2, 3),
        "columns": numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
        "swapped": numpy.arange(4, dtype=">i2"),
        "bool": numpy.array([True, False]),
        "number": numpy.array(3.5),
        "empty": numpy.zeros((0, 3), "f4"),
        "view": numpy.arange(12, dtype="i8").reshape(3, 4)[::2, 1:],
    }
    state = {"model": {"w": torch.ones(2), **arrays}, "history": numpy.ones(3)}
    torch.save(state, tmp_path / "run.pt", pickle_protocol=protocol)
    found = converted(tmp_path / "run.pt")
    assert found.keys() == {"w", *arrays}
    for name, array in arrays.items():
        wanted = torch.from_numpy(
            numpy.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))).reshape(array.shape)
        )
        assert same(found[name], wanted), name
    torch.save({"model": arrays}, tmp_path / "run.pt", pickle_protocol=protocol)
    assert converted(tmp_path / "run.pt", dtype="F16")["f32"].dtype == torch.float16


def test_an_array_too_large_for_a_plan_blocks_only_itself(tmp_path: Path) -> None:
    torch.save({"model": {"a.w": torch.ones(2), "b.w": numpy.ones(1 << 20)}}, tmp_path / "run.pt")
    with pytest.raises(PlanError, match=r"'b\.w': it is a NumPy array of 8388608 bytes"):
        streamconv.plan(tmp_path / "run.pt")
    assert converted(tmp_path / "run.pt", drop=["b.w"]).keys() == {"a.w"}


# ------------------------------------------------------------------ runs of several processes


@pytest.mark.parametrize("world", [1, 3])
def test_plain_tensors_in_files_of_ranks(tmp_path: Path, world: int) -> None:
    net, _ = trained()
    (tmp_path / "run").mkdir()
    for rank in range(world):
        torch.save(net.state_dict(), tmp_path / "run" / f"model_world_size_{world}_rank_{rank}.pt")
    assert_loads(converted(tmp_path / "run"), net)


@pytest.mark.parametrize("other", range(3))
def test_ranks_with_other_plain_tensors_are_no_copies(tmp_path: Path, other: int) -> None:
    (tmp_path / "run").mkdir()
    for rank in range(3):
        torch.save(
            {"a.weight": torch.full((2,), float(rank == other))},
            tmp_path / "run" / f"model_world_size_3_rank_{rank}.pt",
        )
    with pytest.raises(StreamconvError, match=r"a\.weight"):
        converted(tmp_path / "run")
    torch.save({"a.weight": torch.zeros(3)}, tmp_path / "run" / f"model_world_size_3_rank_{other}.pt")
    with pytest.raises(CheckpointError, match=r"a\.weight"):
        streamconv.open(tmp_path / "run")


def engine_state(net: torch.nn.Module, prefix: str = "", **more: Any) -> State:
    """What DeepSpeed's engine saves without ZeRO."""
    optimizer = torch.optim.AdamW(net.parameters()).state_dict()
    module = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    shared = {
        "ds_version": "0.19.8",
        "ds_config": {},
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": 3,
    }
    return {
        "module": module,
        "optimizer": optimizer,
        "lr_scheduler": None,
        "buffer_names": [],
        **shared,
        **more,
    }


def engine_saved(path: Path, state: State, tag: str = "global_step3") -> Path:
    (path / tag).mkdir(parents=True)
    (path / "latest").write_text(tag)
    torch.save(state, path / tag / "mp_rank_00_model_states.pt")
    return path


def test_a_run_under_zero_0(tmp_path: Path) -> None:
    net, _ = trained()
    run = engine_saved(tmp_path / "run", engine_state(net))
    assert_loads(converted(run), net)
    assert_loads(converted(run / "global_step3" / "mp_rank_00_model_states.pt"), net)


def test_averaged_weights_that_an_engine_saved_beside_its_own(tmp_path: Path) -> None:
    net, averaged = trained(1)[0], trained(2)[0]
    run = engine_saved(tmp_path / "run", engine_state(net, ema=averaged.state_dict(), losses=torch.rand(3)))
    assert_loads(converted(run), net)
    assert any("ema" in note and "--ema" in note for note in streamconv.plan(run).notes)
    assert_loads(converted(run, ema=True), averaged)
    assert_loads(converted(run, root="ema"), averaged)
    for options in ({"weights": "model"}, {"optimizer": True}, {"weights": "master"}):
        with pytest.raises(StreamconvError, match=f"--{next(iter(options))}"):
            streamconv.convert(run, tmp_path / "out", ema=True, overwrite=True, **options)
    with pytest.raises(UsageError, match="--ema has no effect"):
        streamconv.convert(run, tmp_path / "out", ema=True, root="module", overwrite=True)


def test_lightnings_deepspeed_runs_keep_every_tensor(tmp_path: Path) -> None:
    net, _ = trained()
    run = engine_saved(tmp_path / "epoch=3.ckpt", engine_state(net, "_forward_module."), "checkpoint")
    assert_loads(converted(run), net)


# ------------------------------------------------------------------------- optimizer state


class Plain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(7, 4)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 5), torch.nn.Linear(5, 4)])


def stepped(named: str) -> tuple[Plain, torch.optim.Optimizer]:
    torch.manual_seed(3)
    net = Plain()
    matrices = [(n, p) for n, p in net.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in net.named_parameters() if p.ndim < 2]
    groups: Any = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    if named == "groups":
        groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    optimizer = torch.optim.AdamW(net.parameters() if named == "order" else groups)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("named", ["order", "groups", "names", "FQNs"])
@pytest.mark.parametrize("key", ["optimizer", "optimizer_states"])
@pytest.mark.parametrize("way", ["zip", "legacy"])
def test_optimizer_state_of_a_torch_file_by_parameter(tmp_path: Path, named: str, key: str, way: str) -> None:
    net, optimizer = stepped("order" if named == "FQNs" else named)
    state = get_optimizer_state_dict(net, optimizer) if named == "FQNs" else optimizer.state_dict()
    saved = {"model": net.state_dict(), key: [state] if key.endswith("s") else state}
    run = CONTAINERS[way](saved, tmp_path)
    plain = converted(run)
    found = converted(run, optimizer=True)
    assert found.keys() == plain.keys() and not (tmp_path / "out" / "exp_avg").exists()
    for moment in ("exp_avg", "exp_avg_sq", "step"):
        states = load_file(tmp_path / "out" / "optimizer" / moment / "model.safetensors")
        wanted = {name: optimizer.state[p][moment] for name, p in net.named_parameters()}
        assert states.keys() == wanted.keys() and all(same(states[name], wanted[name]) for name in wanted)
    assert '"lr": 0.001' in (tmp_path / "out" / "optimizer" / "optimizer.json").read_text()
    notes = streamconv.plan(run, optimizer=True).notes
    assert not any("left out" in note for note in notes)
    assert any("left out" in note and key in note for note in streamconv.plan(run).notes)
    assert any("has no names" in note for note in notes) == (named in ("order", "groups"))


@pytest.mark.parametrize("safe", [True, False])
def test_optimizer_state_beside_a_model(tmp_path: Path, safe: bool) -> None:
    from accelerate import Accelerator

    net, optimizer = stepped("groups")
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(net, optimizer)
    accelerator.save_state(str(tmp_path / "run"), safe_serialization=safe)
    streamconv.convert(tmp_path / "run", tmp_path / "out", optimizer=True)
    found = load_file(tmp_path / "out" / "optimizer" / "exp_avg" / "model.safetensors")
    wanted = {name: optimizer.state[p]["exp_avg"] for name, p in net.named_parameters()}
    assert found.keys() == wanted.keys() and all(same(found[name], wanted[name]) for name in wanted)


def test_steps_that_are_numbers_are_kept_where_they_differ_too(tmp_path: Path) -> None:
    net, optimizer = stepped("names")
    state = optimizer.state_dict()
    # In the order of the groups: matrices first.
    names = [name for name, _ in sorted(net.named_parameters(), key=lambda named: named[1].ndim < 2)]
    for step, own in enumerate(state["state"].values()):
        own["step"] = step
    torch.save({"model": net.state_dict(), "optimizer": state}, tmp_path / "run.pt")
    converted(tmp_path / "run.pt", optimizer=True)
    told = json.loads((tmp_path / "out" / "optimizer" / "optimizer.json").read_text())
    assert told["step"] == {name: step for step, name in enumerate(names)}


def test_optimizer_state_without_names_in_a_dcp_is_refused(tmp_path: Path) -> None:
    net, optimizer = stepped("order")
    source = as_dcp({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path)
    with pytest.raises(CheckpointError, match="no optimizer state by the names"):
        streamconv.open(source, optimizer=True)


def test_optimizer_state_that_belongs_to_no_one_is_refused(tmp_path: Path) -> None:
    net, optimizer = trained()  # running means have the shape of weights
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="has no names, and their shapes do not say"):
        streamconv.open(tmp_path / "run.pt", optimizer=True)
    torch.save({"model": net.state_dict()}, tmp_path / "run.pt")
    with pytest.raises(UsageError, match="--optimizer has no effect"):
        streamconv.convert(tmp_path / "run.pt", tmp_path / "out", optimizer=True)


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_weights_alone_without_names_are_refused(ema: bool, tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    net, _ = stepped("names")
    for saved in (EMAModel(net.parameters()).state_dict(), {"ema": [torch.rand(2, 3)]}):
        torch.save(saved, tmp_path / "ema.pt")
        with pytest.raises(CheckpointError, match="no model is beside them"):
            streamconv.open(tmp_path / "ema.pt", ema=ema)


def test_a_loose_tensor_beside_averaged_weights_is_not_the_model(tmp_path: Path) -> None:
    state = {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)}
    torch.save({"averaged": state, "weight": torch.zeros(3)}, tmp_path / "run.pt")
    plan = streamconv.plan(tmp_path / "run.pt")
    assert {each.spec.name for each in plan.tensors} == state.keys()
    assert any("left out the tensors at weight" in note for note in plan.notes)


def test_rivals_without_dots_in_their_names_are_refused(tmp_path: Path) -> None:
    def layer(size: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.zeros(size, size), "bias": torch.zeros(size)}

    torch.save({"model": {"G": layer(2), "D": layer(3)}}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="more than one place") as caught:
        streamconv.open(tmp_path / "run.pt")
    assert "model.G" in str(caught.value) and "model.D" in str(caught.value)
    assert set(streamconv.open(tmp_path / "run.pt", root="model.G")) == {"weight", "bias"}
    assert len(streamconv.open(tmp_path / "run.pt", root="model")) == 4


@pytest.mark.parametrize("kind", ["Adafactor", "8-bit"])
def test_optimizer_state_of_other_shapes_is_written_too(kind: str, tmp_path: Path) -> None:
    from transformers import Adafactor

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 3))
    optimizer: Any = Adafactor(model.named_parameters(), lr=1e-3, relative_step=False)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    if kind == "8-bit":  # as bitsandbytes has it
        state["state"] = {
            key: {
                "state1": torch.zeros_like(each, dtype=torch.uint8),
                "qmap1": torch.zeros(256),
                "absmax1": torch.ones(1),
            }
            for key, each in enumerate(model.parameters())
        }
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "run.pt")
    plan = streamconv.plan(tmp_path / "run.pt", optimizer=True)
    odd = {"exp_avg_sq_row", "exp_avg_sq_col"} if kind == "Adafactor" else {"qmap1", "absmax1"}
    assert any("of other shapes" in note and all(each in note for each in odd) for note in plan.notes), (
        plan.notes
    )
    streamconv.convert(plan, tmp_path / "out")
    for name in odd:
        written = load_file(tmp_path / "out/optimizer" / name / "model.safetensors")
        assert torch.equal(written["0.weight"], state["state"][0][name])
