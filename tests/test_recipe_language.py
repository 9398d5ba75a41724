"""The language of recipes: formulas, tables, rules read both ways, and what is said where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import streamconv
from streamconv import dtypes
from streamconv.cli import main
from streamconv.errors import PlanError, UsageError
from streamconv.ops import apply
from streamconv.ops.structural import Concat, Fill, PermuteAxes, Reshape, Split, Truncate
from streamconv.plans import Recipe, formula, registry
from streamconv.plans.architecture import Architecture
from streamconv.plans.findings import Findings
from streamconv.plans.functions import FUNCTIONS
from streamconv.plans.inversion import invert
from streamconv.plans.patterns import named
from streamconv.plans.recipe import Refusal, Remark, Rule, drop
from streamconv.plans.recipe_file import read_recipe
from streamconv.plans.table import Table, table
from streamconv.plans.wrappers import unwrap
from streamconv.storage.location import locate
from streamconv.tensor import Extent, Stored, TensorSpec

# ------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("heads * head_dim + 2", 14),
        ("-heads // 2", -2),
        ("2 ** 3 % 5 - 1 / 4", 2.75),
        ("absent or heads", 4),
        ("absent and heads", None),
        ("heads if flag else head_dim", 3),
        ("not flag and heads > head_dim >= 3", True),
        ("heads in [1, 4]", True),
        ("'a' not in ['b']", True),
        ("nested['inner'][1]", 8),
        ("nested['absent']", None),
        ("absent['any']", None),
        ("nested['inner'][9]", None),
        ("max(heads, head_dim, min(9, 8))", 8),
        ("len(nested['inner'])", 2),
    ],
)
def test_a_formula(text: str, value: Any) -> None:
    names = {"heads": 4, "head_dim": 3, "flag": False, "nested": {"inner": [7, 8]}}
    assert formula.evaluate(text, names) == value


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "open('/etc/passwd')",
        "heads.real",
        "(lambda: 1)()",
        "[x for x in [1]]",
        "9 ** 9 ** 9",
        "heads.__class__",
        "f'{heads}'",
        "heads := 2",
        "*heads",
        "",
        "heads +",
        "heads is heads",
        "absent + 1",
        "1 // 0",
        "print(1)",
        "'9' * 10 ** 9",
        "[1] * 10 ** 9",
    ],
)
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(UsageError):
        formula.evaluate(text, {"heads": 4})


def test_a_program_names_what_it_makes() -> None:
    made = formula.run("a, b = [1, heads]\nc = [a, b]", {"heads": 2}, {})
    assert (made["a"], made["b"], made["c"]) == (1, 2, [1, 2])
    with pytest.raises(UsageError, match="gives 2 values for a, b, c"):
        formula.run("a, b, c = [1, 2]", {}, {})
    for program in ("import os", "a.b = 1", "a += 1", "for i in [1]: a = i", "del a", "a"):
        with pytest.raises(UsageError):
            formula.run(program, {}, {})


# -------------------------------------------------------------------------------------- tables


def test_a_line_declares_tensors() -> None:
    (line,) = table("l.{i}.w [heads * head_dim, i] BF16 if biased and i > 0")
    sizes = {"heads": 2, "head_dim": 3, "layers": 3, "biased": True}
    found = dict(line.declared(sizes, {"i": "layers"}))
    assert {name: each.shape for name, each in found.items()} == {"l.1.w": (6, 1), "l.2.w": (6, 2)}
    assert found["l.1.w"].dtype == "BF16"
    assert dict(line.declared({**sizes, "biased": False}, {"i": "layers"})) == {}
    (line,) = table("?x [2]")
    assert dict(line.declared({}, {}))["x"].optional


@pytest.mark.parametrize("text", ["x", "x 2", "x [2", "[2]", "x [2] when y", "x{ [2]", "{a,b} [1] [2] [3]"])
def test_what_declares_no_tensor(text: str) -> None:
    with pytest.raises(UsageError):
        table(text)


LINES = table("""
    # A comment, and a blank line.

    a.{i}.w [rows, few] if biased or i > 0
    ?a.{i}.b [rows] BF16
    end [2 * rows]
""")


def texts(made: Table) -> list[str]:
    return [str(line) for line in made]


def test_alternatives_are_a_line_each() -> None:
    lines = table("?h.{i}.{k,v}.{weight,bias} [2 * n, n] [2 * n] F32 if deep\nln_{1,2}.weight [n]")
    assert [str(line) for line in lines] == [
        "?h.{i}.k.weight [2 * n, n] F32 if deep",
        "?h.{i}.k.bias [2 * n] F32 if deep",
        "?h.{i}.v.weight [2 * n, n] F32 if deep",
        "?h.{i}.v.bias [2 * n] F32 if deep",
        "ln_1.weight [n]",
        "ln_2.weight [n]",
    ]


def test_a_shape_may_have_a_condition_of_its_own() -> None:
    lines = table("{k,v}.{weight,bias} [n, n if deep else 1] [n if biased] if few\nx [a if b else c]")
    assert texts(lines) == [
        "k.weight [n, n if deep else 1] if few",
        "k.bias [n] if biased and few",
        "v.weight [n, n if deep else 1] if few",
        "v.bias [n] if biased and few",
        "x [a if b else c]",
    ]


def test_names_are_a_line_each() -> None:
    text = "norm{1,2}.{weight,bias} -> {a,b}.{gamma,beta}\n\n  head."
    assert named(text, "x.", "y.") == {
        "x.norm1.weight": "y.a.gamma",
        "x.norm1.bias": "y.a.beta",
        "x.norm2.weight": "y.b.gamma",
        "x.norm2.bias": "y.b.beta",
        "x.head.": "y.head.",
    }
    with pytest.raises(ValueError, match="zip"):
        named("{q,k}. -> {q,k,v}.")


def test_alternatives_of_a_rule_have_their_names_in_its_program() -> None:
    rule = Rule("h.{i}.qkv.weight", "h.{i}.{q,k,v}_proj.weight", "q, k, v = chunk(x, 0, 3)")
    assert rule.target == {part: f"h.{{i}}.{part}_proj.weight" for part in "qkv"}
    assert rule.source == "h.{i}.qkv.weight"


def test_a_table_is_written_as_it_was_read() -> None:
    assert texts(LINES) == [
        "a.{i}.w [rows, few] if biased or i > 0",
        "?a.{i}.b [rows] BF16",
        "end [2 * rows]",
    ]
    assert LINES.names == ("a.{i}.w", "a.{i}.b", "end")
    assert table("\n".join(texts(LINES))) == LINES


def test_tables_are_changed_line_by_line() -> None:
    conditions = [line.when for line in LINES.where("sparse")]
    assert conditions == ["(biased or i > 0) and sparse", "sparse", "sparse"]
    assert [line.when for line in LINES.where("True")] == ["biased or i > 0", "", ""]
    assert texts(LINES.given(rows="n + 1", biased="False")) == [
        "a.{i}.w [n + 1, few] if False or i > 0",
        "?a.{i}.b [n + 1] BF16",
        "end [2 * (n + 1)]",
    ]
    assert LINES.under("m.").names == ("m.a.{i}.w", "m.a.{i}.b", "m.end")
    assert LINES.without(".b", "end").names == ("a.{i}.w",)
    assert all(line.optional for line in LINES.optional())
    assert (LINES + table("x [1]")).names == (*LINES.names, "x")


def test_a_condition_that_is_given_as_true_is_none() -> None:
    (line,) = table("x [1] if biased").given(biased="True")
    assert line.when == ""


def test_names_with_a_dot_stand_for_all_that_begin_with_them() -> None:
    names = {"a.": "b.", "a.{i}.": "c.{i}.", "end": "last"}
    assert LINES.renamed(names).names == ("c.{i}.w", "c.{i}.b", "last")
    assert LINES.renamed({"end": "last"}).names == ("last",)
    assert LINES.renamed({"en": "x", "a": "y"}).names == ()


def test_a_config_without_sizes_is_refused_all_at_once() -> None:
    architecture = Architecture(
        "a", "A", {"n": "num", "m": "mum", "both": "n * m"}, table("x [n]"), {}, ("a",)
    )
    with pytest.raises(UsageError) as caught:
        architecture.sizes_of({})
    assert "num" in str(caught.value)
    assert "mum" in str(caught.value)


# ------------------------------------------------------------------------------------ inversion


def stored(name: str, *shape: int) -> Stored:
    spec = TensorSpec(name, dtypes.by_name("F32"), shape)
    return Stored(spec, (Extent(f"/{name}", 0, spec.nbytes),) if spec.nbytes else ())


_ONE_TENSOR = {
    "split": "a, b = split(x, 0, [2, 22])",
    "chunk": "a, b, c = chunk(x, 0, 3)",
    "transpose": "a = transpose(x)",
    "interleave": "a = interleave(x)",
    "deinterleave": "a = deinterleave(x, 1)",
    "heads": "a, b, c = split_heads(x, 2, [2, 1, 1], 3)",
    "halves": "a = rotary_halves(x, 2)",
    "spread": "a = spread_half_rotary(x, 3)",
    "spread halves": "a = spread_half_rotary(x, 3, False)",
    "take": "a = take(x, 0, [[12, 1, 12], [0, 1, 12]])",
    "pad": "a = pad(x, 1, 7)",
    "unstack": "a, b = unstack(reshape(x, [2, 12, 6]))",
    "stack": "p, q = chunk(x, 0, 2)\na = stack([p, q], 1)",
    "several": "p, q = chunk(transpose(x), 0, 2)\na = concat([q, p], 0)\nb = filled([2], 1, 'F32')",
}


@pytest.mark.parametrize("program", _ONE_TENSOR.values(), ids=_ONE_TENSOR)
def test_a_program_backwards_and_forward_is_what_was_given(program: str, tmp_path: Path) -> None:
    """On real bytes: forward by the plan, back by the plan."""
    values = np.arange(24 * 6, dtype=np.float32).reshape(24, 6)
    source = write(tmp_path / "source", {"x": values}, {})
    leaf = streamconv.open(source).contents["x"]
    made = formula.run(program, {"x": leaf}, FUNCTIONS)
    targets = [name for name in ("a", "b", "c") if name in made]
    lines = "".join(f"{name} {list(made[name].spec.shape)}\n" for name in targets)
    recipe = Recipe(
        name="one",
        title="one",
        source=Architecture("s", "S", {}, table("x [24, 6]")),
        target=Architecture("t", "T", {}, table(lines)),
        rules=(Rule({"x": "x"}, {name: name for name in targets}, program),),
    )
    streamconv.convert(source, tmp_path / "there", recipe=recipe, engine="inline")
    streamconv.convert(tmp_path / "there", tmp_path / "back", recipe=recipe, reverse=True, engine="inline")
    np.testing.assert_array_equal(load_file(tmp_path / "back" / "model.safetensors")["x"], values)


def test_the_functions_agree_with_numpy(tmp_path: Path) -> None:
    x = np.arange(24 * 6, dtype=np.float32).reshape(24, 6)
    save_file({"x": x}, tmp_path / "model.safetensors")
    leaf = streamconv.open(tmp_path / "model.safetensors").contents["x"]

    def made(text: str) -> Any:
        from streamconv.api import LazyTensor

        value = formula.evaluate(text, {"x": leaf}, FUNCTIONS)
        each = value if isinstance(value, list) else [value]
        arrays = [LazyTensor(part).numpy() for part in each]
        return arrays if isinstance(value, list) else arrays[0]

    np.testing.assert_array_equal(made("transpose(x)"), x.T)
    np.testing.assert_array_equal(made("interleave(x)"), x.reshape(2, 12, 6).swapaxes(0, 1).reshape(24, 6))
    np.testing.assert_array_equal(made("deinterleave(x)"), np.concatenate([x[::2], x[1::2]]))
    q, k, v = made("split_heads(x, 2, [2, 1, 1], 3)")
    grouped = x.reshape(2, 4, 3, 6)
    np.testing.assert_array_equal(q, grouped[:, :2].reshape(12, 6))
    np.testing.assert_array_equal(k, grouped[:, 2].reshape(6, 6))
    np.testing.assert_array_equal(v, grouped[:, 3].reshape(6, 6))
    halves = x.reshape(2, 6, 2, 6).swapaxes(1, 2).reshape(24, 6)
    np.testing.assert_array_equal(made("rotary_halves(x, 2)"), halves)
    head = 8  # three heads of eight channels: 0..3 rotate in pairs, 4..7 stand still
    order = [h * head + c for h in range(3) for c in (0, 2, 4, 5, 1, 3, 6, 7)]
    np.testing.assert_array_equal(made("spread_half_rotary(x, 3)"), x[order])
    order = [h * head + c for h in range(3) for c in (0, 1, 4, 5, 2, 3, 6, 7)]
    np.testing.assert_array_equal(made("spread_half_rotary(x, 3, False)"), x[order])


def test_what_cannot_be_undone_is_named() -> None:
    x = stored("x", 4, 2)
    (cut,) = apply(Truncate(0, 3), x)
    with pytest.raises(PlanError, match="truncate cannot be undone"):
        invert([cut], [stored("y", 3, 2)], [x])
    first, _ = apply(Split(0, (1, 3)), x)
    with pytest.raises(PlanError, match="split cannot be undone"):
        invert([first], [stored("y", 1, 2)], [x])
    with pytest.raises(PlanError, match="nothing of it is left"):
        invert([], [], [x])


def test_what_is_used_twice_must_be_equal_on_the_way_back() -> None:
    x = stored("x", 4)
    (a,) = apply(Reshape((2, 2)), x)
    (b,) = apply(PermuteAxes((1, 0)), a)
    leaves, checks = invert([a, b], [stored("a", 2, 2), stored("b", 2, 2)], [x])
    assert leaves["x"].spec.shape == (4,)
    assert len(checks) == 1


def test_what_was_made_is_proven_on_the_way_back() -> None:
    x = stored("x", 2)
    (zeros,) = apply(Fill("F32", (3,), 0))
    (both,) = apply(Concat(0), x, zeros)
    _, checks = invert([both], [stored("y", 5)], [x])
    assert len(checks) == 1


# ---------------------------------------------------------------------------------------- rules

SOURCE = Architecture(
    name="mine",
    title="Mine",
    model_types=("mine",),
    classes=("MineModel",),
    sizes={"hidden": "n", "layers": "depth", "experts": "moe"},
    counts={"i": "layers", "e": "experts"},
    lines=table("""
        emb [hidden, 2]
        ?pos [hidden]
        blk.{i}.norm [hidden]
        blk.{i}.qkv [3 * hidden, hidden]
        blk.{i}.experts.{e}.w [2, hidden]
    """),
)
TARGET = Architecture(
    name="theirs",
    title="Theirs",
    model_types=("theirs",),
    classes=("TheirModel",),
    sizes={"hidden": "hidden", "layers": "layers", "experts": "experts"},
    counts={"i": "layers"},
    lines=table("""
        model.embed [hidden, 2]
        model.{i}.norm [hidden]
        model.{i}.zero [hidden]
        model.{i}.q [hidden, hidden]
        model.{i}.k [hidden, hidden]
        model.{i}.v [hidden, hidden]
        model.{i}.w [experts, 2, hidden]
    """),
)
RECIPE = Recipe(
    name="mine-theirs",
    title="Mine -> Theirs",
    source=SOURCE,
    target=TARGET,
    rules=(
        Rule("emb", "model.embed"),
        drop("pos", "computed", equals="filled([hidden], 1, dtype)", optional=True),
        Rule("blk.{i}.norm", "model.{1-i}.norm"),
        Rule(None, "model.{i}.zero", equals="filled([hidden], 0, dtype)"),
        Rule(
            {"qkv": "blk.{i}.qkv"},
            {part: f"model.{{1-i}}.{part}" for part in "qkv"},
            "q, k, v = chunk(qkv, 0, 3)",
        ),
        Rule({"w": "blk.{i}.experts.{e}.w"}, {"w": "model.{1-i}.w"}, "w = stack(w)"),
    ),
    config=lambda c: {"model_type": "theirs", "hidden": c["n"], "layers": c["depth"], "experts": c["moe"]},
    config_back=lambda c: {"model_type": "mine", "n": c["hidden"], "depth": c["layers"], "moe": c["experts"]},
    refuses=(Refusal("odd", "it is odd", "make it even"),),
    remarks=(Remark("n > 3", "it is large"),),
)
CONFIG = {"model_type": "mine", "n": 4, "depth": 2, "moe": 3}


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    made = {"emb": random.random((4, 2)), "pos": np.ones(4)}
    for i in range(2):
        made[f"blk.{i}.norm"] = random.random(4)
        made[f"blk.{i}.qkv"] = random.random((12, 4))
        for e in range(3):
            made[f"blk.{i}.experts.{e}.w"] = random.random((2, 4))
    return {name: array.astype(np.float32) for name, array in made.items()}


def write(directory: Path, arrays: Mapping[str, np.ndarray[Any, Any]], config: Any = CONFIG) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(dict(arrays), directory / "model.safetensors")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source", tensors())


def problems(source: Path, **arguments: Any) -> str:
    with pytest.raises((PlanError, UsageError)) as caught:
        streamconv.plan(source, recipe=arguments.pop("recipe", RECIPE), **arguments)
    return str(caught.value)


def test_rules_forward_and_back(source: Path, tmp_path: Path) -> None:
    given = tensors()
    streamconv.convert(source, tmp_path / "there", recipe=RECIPE, engine="inline")
    made = load_file(tmp_path / "there" / "model.safetensors")
    np.testing.assert_array_equal(made["model.0.k"], given["blk.1.qkv"][4:8])
    np.testing.assert_array_equal(
        made["model.1.w"], np.stack([given[f"blk.0.experts.{e}.w"] for e in range(3)])
    )
    np.testing.assert_array_equal(made["model.0.zero"], np.zeros(4, np.float32))
    assert json.loads((tmp_path / "there" / "config.json").read_text())["hidden"] == 4

    streamconv.convert(tmp_path / "there", tmp_path / "back", recipe=RECIPE, reverse=True, engine="inline")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(back[name], array)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG


def test_what_is_dropped_or_made_is_proven(source: Path, tmp_path: Path) -> None:
    from streamconv.errors import ConversionError

    write(source, {**tensors(), "pos": np.zeros(4, np.float32)})
    with pytest.raises(ConversionError, match="'pos' is dropped, for it should be filled"):
        streamconv.convert(source, tmp_path / "out", recipe=RECIPE, engine="inline")

    write(source, tensors())
    streamconv.convert(source, tmp_path / "there", recipe=RECIPE, engine="inline")
    made = load_file(tmp_path / "there" / "model.safetensors")
    made["model.1.zero"] = made["model.1.zero"] + 1
    save_file(made, tmp_path / "there" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model\.1\.zero"):
        streamconv.convert(
            tmp_path / "there", tmp_path / "back", recipe=RECIPE, reverse=True, engine="inline"
        )


def test_a_plan_says_what_it_does(source: Path) -> None:
    plan = streamconv.plan(source, recipe=RECIPE)
    assert "recipe mine-theirs: Mine -> Theirs" in plan.notes
    assert "it is large" in plan.notes
    assert [dropped.name for dropped in plan.dropped] == ["pos"]
    (packed,) = [tensor for tensor in plan.tensors if tensor.spec.name == "model.0.w"]
    assert packed.sources == tuple(f"blk.1.experts.{e}.w" for e in range(3))


def test_a_target_names_the_tensors_that_it_is_made_of_and_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule with several results: each has its own sources, either way; a plan folds them."""
    recipe = Recipe(
        name="fused",
        title="Fused",
        source=Architecture(
            "parted", "Parted", {}, table("{i}.{e}.{up,gate,down} [2, 2]"), {"i": "2", "e": "3"}
        ),
        target=Architecture(
            "fused", "Fused", {}, table("{i}.gate_up [3, 4, 2]\n{i}.down [3, 2, 2]"), {"i": "2"}
        ),
        rules=(
            Rule(
                {name: f"{{i}}.{{e}}.{name}" for name in ("gate", "up", "down")},
                {name: f"{{i}}.{name}" for name in ("gate_up", "down")},
                "gate_up = concat([stack(gate), stack(up)], 1)\ndown = stack(down)",
            ),
        ),
    )
    parted = {f"{i}.{e}.{name}": np.zeros((2, 2), np.float32)
              for i in range(2) for e in range(3) for name in ("gate", "up", "down")}  # fmt: skip
    plan = streamconv.plan(write(tmp_path / "parted", parted, {}), recipe=recipe)
    sources = {tensor.spec.name: tensor.sources for tensor in plan.tensors}
    assert sources["1.down"] == tuple(f"1.{e}.down" for e in range(3))
    assert sources["0.gate_up"] == tuple(f"0.{e}.{name}" for name in ("gate", "up") for e in range(3))
    streamconv.convert(plan, tmp_path / "fused", engine="inline")
    record = json.loads((tmp_path / "fused" / ".streamconv" / "conversion.json").read_text())
    assert {
        name: tuple(row["from"]) for name, row in record["tensors"]["model.safetensors"].items()
    } == sources
    back = streamconv.plan(tmp_path / "fused", recipe=recipe, reverse=True)
    sources = {tensor.spec.name: tensor.sources for tensor in back.tensors}
    assert sources["1.2.down"] == ("1.down",)
    assert sources["0.1.up"] == sources["0.1.gate"] == ("0.gate_up",)
    file = tmp_path / "fused.toml"
    file.write_text("""
name = "fused"
[[rule]]
source = {gate = "{i}.{e}.gate", up = "{i}.{e}.up", down = "{i}.{e}.down"}
target = {both = "{i}.gate_up", down = "{i}.down"}
program = "both = concat([stack(gate), stack(up)], 1)\\ndown = stack(down)"
""")
    assert main(["plan", str(tmp_path / "parted"), "--recipe", str(file)]) == 0
    said = capsys.readouterr().out
    assert "{0,1}.{0..2}.gate (3) + {0,1}.{0..2}.up (3)  {0,1}.gate_up" in said
    assert "{0,1}.{0..2}.down (3)" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("blk.1.norm"), "'blk.1.norm': missing from the source, a Mine has it"),
        (lambda t: t.pop("blk.1.experts.1.w"), "have no number 1 for {e}"),
        (lambda t: t.pop("blk.1.experts.2.w"), "'blk.1.experts.2.w': missing from the source"),
        (lambda t: t.update(emb=t["emb"][:3]), "it is [3, 2]; a Mine of this config has [4, 2]"),
        (lambda t: t.update({"blk.2.norm": t["blk.0.norm"]}), "blk.2.norm"),
        (lambda t: t.update({"blk.0.nrm": t["blk.0.norm"]}), "the nearest rule is for 'blk.{i}.norm'"),
        (
            lambda t: t.update({"blk.0.qkv.lora_A.weight": t["emb"]}),
            "LoRA weights, not merged into the model (merge them: keep the adapter apart",
        ),
        (lambda t: t.update({"fp32_groups.0": t["emb"]}), "optimizer state"),
        (lambda t: t.update({"text_encoder.w": t["emb"]}), "a text encoder that was saved with the model"),
        (lambda t: t.update({"a.base_layer.weight": t["emb"]}), "the base weights of a model whose LoRA"),
        (lambda t: t.update({"emb_scale.weight_scale": t["emb"]}), "quantised weights"),
    ],
)
def test_what_does_not_fit_is_named_with_what_to_do(source: Path, change: Any, said: str) -> None:
    changed = tensors()
    change(changed)
    write(source, changed)
    assert said in problems(source)


def test_equal_problems_are_one(source: Path) -> None:
    changed = tensors()
    changed |= {f"blk.{i}.extra": np.zeros(1, np.float32) for i in range(20)}
    write(source, changed)
    said = problems(source)
    assert said.count("extra") == 2  # the name and its --drop; the nineteen others are a count
    assert "(20 like it)" in said
    assert "--drop 'blk.*.extra'" in said
    streamconv.plan(source, recipe=RECIPE, drop=["blk.*.extra"])
    plan = streamconv.plan(source, recipe=RECIPE, allow_unmatched=True)
    assert sum("--allow-unmatched" in dropped.reason for dropped in plan.dropped) == 20


def test_without_a_config_it_says_where_to_give_one(source: Path, tmp_path: Path) -> None:
    config = (source / "config.json").rename(tmp_path / "mine.json")
    assert "--config" in problems(source)
    plan = streamconv.plan(source, recipe=RECIPE, config=config)
    assert any(text.path == "config.json" for text in plan.texts)


def test_a_refusal_says_why(source: Path) -> None:
    write(source, tensors(), {**CONFIG, "odd": True})
    assert "it is odd (make it even)" in problems(source)


def test_a_recipe_without_a_way_back_says_so(source: Path, tmp_path: Path) -> None:
    import dataclasses

    one_way = dataclasses.replace(RECIPE, one_way="the sign is lost")
    assert "no way back: the sign is lost" in problems(source, recipe=one_way, reverse=True)


def test_a_rule_that_makes_the_wrong_shape_is_found_by_the_table(source: Path) -> None:
    import dataclasses

    rules = tuple(rule for rule in RECIPE.rules if "emb" not in str(rule))
    wrong = dataclasses.replace(RECIPE, rules=(Rule("emb", "model.embed", "x = transpose(x)"), *rules))
    assert "a Theirs of this config has [4, 2]" in problems(source, recipe=wrong)
    less = dataclasses.replace(RECIPE, rules=(*rules, drop("emb", "no reason")))
    assert "no rule makes it, and a Theirs needs it" in problems(source, recipe=less)
    twice = dataclasses.replace(
        RECIPE, rules=(*RECIPE.rules, Rule(None, "model.embed", equals="filled([4, 2], 0, dtype)"))
    )
    assert "comes from both 'emb' and a rule without sources" in problems(source, recipe=twice)


def test_the_way_back_takes_a_config_along(source: Path, tmp_path: Path) -> None:
    import dataclasses

    streamconv.convert(source, tmp_path / "there", recipe=RECIPE, engine="inline")
    lost = dataclasses.replace(RECIPE, config_back=None)
    assert "--like" in problems(tmp_path / "there", recipe=lost, reverse=True)
    streamconv.plan(tmp_path / "there", recipe=lost, reverse=True, like=source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 10**9}, "by the config, layers is 1,000,000,000, and there are"),
        ({"depth": 60_000, "moe": 60_000}, "more than 2097152 tensors"),
        ({"depth": "2"}, "not a count of {i}"),
        ({"n": "4"}, "is not a shape"),
        ({"n": -4}, "is not a shape"),
        ({"n": 1.5}, "is not a shape"),
        ({"n": [4]}, "is no"),
        ({"n": None}, "the config has no n"),
    ],
)
def test_a_config_that_lies_is_refused_at_once(source: Path, changes: dict[str, Any], said: str) -> None:
    write(source, tensors(), {**CONFIG, **changes})
    assert said in problems(source)


def test_a_config_that_a_recipe_trips_over_is_one_clear_error(source: Path) -> None:
    import dataclasses

    trips = dataclasses.replace(RECIPE, config=lambda config: {"n": config["absent"]})
    assert "the config is not that of Mine: it has no 'absent'" in problems(source, recipe=trips)


# ------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "module.model.", "base_model.model.", "module._orig_mod."]
)
def test_a_wrapper_is_seen_through(tmp_path: Path, prefix: str) -> None:
    source = write(tmp_path / "source", {prefix + name: array for name, array in tensors().items()})
    plan = streamconv.plan(source, recipe=RECIPE)
    assert any("of a wrapped mod" in note for note in plan.notes)
    (embedding,) = [tensor for tensor in plan.tensors if tensor.spec.name == "model.embed"]
    assert embedding.sources == (prefix + "emb",)


def test_averaged_copies_are_left_out(tmp_path: Path) -> None:
    both = {prefix + name: array for name, array in tensors().items() for prefix in ("model.", "model_ema.")}
    plan = streamconv.plan(write(tmp_path / "source", both), recipe=RECIPE)
    assert sum("averaged copy" in dropped.reason for dropped in plan.dropped) == len(tensors())
    averaged = streamconv.plan(
        tmp_path / "source", recipe=RECIPE, only=["model_ema.*"], rename=["model_ema.*=*"]
    )
    assert len(averaged.tensors) == len(plan.tensors)


@pytest.mark.parametrize("dots", ["", "."], ids=["LitEma", "as they are"])
def test_averaged_copies_are_left_out_whatever_they_are_called_and_said_once(
    tmp_path: Path, dots: str
) -> None:
    copies = {f"model_ema.{name.replace('.', dots)}": array for name, array in tensors().items()}
    plan = streamconv.plan(write(tmp_path / "source", copies | tensors()), recipe=RECIPE)
    assert {each.name for each in plan.dropped if "averaged copy" in each.reason} == copies.keys()
    assert sum("averaged" in note for note in plan.notes) == 1


@given(st.dictionaries(st.text("ab.", min_size=1, max_size=6), st.none(), max_size=8), st.booleans())
def test_unwrapping_never_makes_two_names_one(names: dict[str, None], wrapped: bool) -> None:
    given_names = [("module." if wrapped else "") + name for name in names] + list(names)
    tensors = {
        name: ((name,), Stored(TensorSpec(name, dtypes.by_name("F32"), (0,)), ())) for name in given_names
    }
    findings = Findings()
    found = unwrap(tensors, set(names), findings)
    assert len(found) + len(findings.dropped) == len(tensors)


def test_without_a_recipe_only_what_is_no_name_goes(tmp_path: Path) -> None:
    arrays = {f"module.{name}": array for name, array in tensors().items()}
    plan = streamconv.plan(write(tmp_path / "source", arrays))
    assert {tensor.spec.name for tensor in plan.tensors} == set(tensors())
    arrays = {f"model.{name}": array for name, array in tensors().items()}
    plan = streamconv.plan(write(tmp_path / "source", arrays))
    assert {tensor.spec.name for tensor in plan.tensors} == set(arrays)


# ----------------------------------------------------------------------------------- finding it


def test_recipes_have_names_of_their_own() -> None:
    known = registry.all_recipes()
    assert len(known) > 50
    assert all(recipe.name == name for name, recipe in known.items())
    assert all(name == name.lower() and ("-" in name or known[name].makes) for name in known)
    # What recipes were called before leads to them still, and is the name of no other.
    before = {alias: recipe for recipe in known.values() for alias in recipe.aliases}
    assert {"fp8-bf16", "mxfp4-bf16"} <= before.keys() and not before.keys() & known.keys()
    assert all(registry.named(alias) is recipe for alias, recipe in before.items())


def test_what_there_is_no_recipe_for(source: Path, tmp_path: Path) -> None:
    assert "there is no recipe for a checkpoint with model_type 'mine'" in problems(source, recipe="auto")
    with pytest.raises(UsageError, match="did you mean 'chatglm-llama'"):
        streamconv.plan(source, recipe="chatglm-lama")
    write(tmp_path / "glm", {"a": np.zeros(1)}, {"model_type": "chatglm"})
    with pytest.raises(PlanError, match="chatglm-llama, chatglm-glm"):
        streamconv.plan(tmp_path / "glm", recipe="auto")
    with pytest.raises(PlanError, match=r"there are recipes to glm, llama, .*qwen2"):
        streamconv.plan(tmp_path / "glm", to_arch="bert")
    with pytest.raises(UsageError, match="--reverse needs a recipe by name"):
        streamconv.plan(source, reverse=True)


# ------------------------------------------------------------------------------------ from files

_TOML = """
name = "mine-theirs"
title = "Mine -> Theirs"

[config]
model_type = "'theirs'"
hidden = "n"
layers = "depth"

[config_back]
model_type = "'mine'"
n = "hidden"
depth = "layers"

[source]
sizes = { hidden = "n", layers = "depth" }
counts = { i = "layers" }
tensors = '''
    emb [hidden, 2]
    blk.{i}.qkv [3 * hidden, hidden]
'''

[[rule]]
source = "emb"
target = "model.embed"

[[rule]]
source = "blk.{i}.qkv"
target = { q = "model.{i}.q", k = "model.{i}.k", v = "model.{i}.v" }
program = "q, k, v = chunk(x, 0, 3)"
"""


def test_a_recipe_from_toml_reads_both_ways(tmp_path: Path) -> None:
    given_tensors = {name: array for name, array in tensors().items() if name == "emb" or "qkv" in name}
    source = write(tmp_path / "source", given_tensors)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(_TOML)
    streamconv.convert(source, tmp_path / "there", recipe=recipe, engine="inline")
    streamconv.convert(tmp_path / "there", tmp_path / "back", recipe=recipe, reverse=True, engine="inline")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == given_tensors.keys()
    assert all(np.array_equal(back[name], array) for name, array in given_tensors.items())
    assert streamconv.verify(source, tmp_path / "there", recipe=recipe).problems == ()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('hidden = "nn"', "the config has no nn, which [config] hidden is made of"),
        ('model_type = "theirs"', "text is written \"'theirs'\""),
        ('heads = "n // heads"', "there is no heads"),
        ('hidden = "nn or n"', None),
        ('hidden = "n if nn else 3"', None),
        ('heads = "nn or None"', None),
    ],
)
def test_a_config_that_lacks_what_is_asked_of_it(tmp_path: Path, line: str, said: str | None) -> None:
    source = write(tmp_path / "source", {"emb": np.zeros((4, 2), np.float32)})
    key = line.split()[0]
    kept = (each for each in _TOML.split("[config_back]")[0].splitlines() if not each.startswith(f"{key} ="))
    recipe = tmp_path / "mine.toml"
    recipe.write_text("\n".join([*kept, line, "[[rule]]", 'source = "emb"', 'target = "model.embed"']))
    if said is None:
        assert any(
            "the config has no 'nn', which [config]" in each
            for each in streamconv.plan(source, recipe=recipe).notes
        )
    else:
        assert said in problems(source, recipe=recipe)


def test_a_config_is_made_of_sizes_too(tmp_path: Path) -> None:
    given_tensors = {name: array for name, array in tensors().items() if name == "emb" or "qkv" in name}
    source = write(tmp_path / "source", given_tensors)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(_TOML.replace('layers = "depth"', 'layers = "layers"', 1))
    streamconv.convert(source, tmp_path / "there", recipe=recipe, engine="inline")
    assert json.loads((tmp_path / "there" / "config.json").read_text())["layers"] == CONFIG["depth"]


def test_a_recipe_that_only_renames_needs_no_table(tmp_path: Path) -> None:
    source = write(tmp_path / "source", tensors(), None)
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        '[[rule]]\nsource = "blk.{i}.*"\ntarget = "layers.{i+1}.*"\n[[rule]]\nsource="*"\ntarget="*"\n'
    )
    streamconv.convert(source, tmp_path / "there", recipe=recipe, engine="inline")
    assert "layers.2.norm" in load_file(tmp_path / "there" / "model.safetensors")
    streamconv.convert(tmp_path / "there", tmp_path / "back", recipe=recipe, reverse=True, engine="inline")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors().keys()


def test_a_recipe_from_python(tmp_path: Path, source: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from streamconv.plans.recipe import Recipe, Rule\n"
        "RECIPE = Recipe('mine', 'Mine', None, None, (Rule('*', 'new.*'),))\n"
    )
    plan = streamconv.plan(source, recipe=recipe)
    assert all(tensor.spec.name.startswith("new.") for tensor in plan.tensors)
    recipe.write_text("x = 1")
    with pytest.raises(UsageError, match="it defines no RECIPE"):
        streamconv.plan(source, recipe=recipe)


_SIZED = """
[sizes]
layers = "n_layer"
[[rule]]
source = '{{i}}.a'
target = '{{i}}.b'
{}
[[rule]]
source = '*'
target = '*'
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[rule]]\nprogram = 'x = 1'", "rule 1 has neither source nor target"),
        ("[[rule]]\nsource = 'a'\ntarget = 'b'\nwhat = 1", "rule 1 has an unknown key 'what'"),
        ("[[rule]]\nsource = 1", "rule 1: 'source' must be text or a table of text"),
        ("[[rule]]\nsource = {a = ['b']}", "rule 1: 'source' must be text or a table of text"),
        ("rename = 'a'\nname = 'n'", "'rename' must be a table of text"),
        ("[config]\nn = 0.5", "'config' must be a table of text"),
        ("[source]\ntensors = 'a [2]'\nsizes = {n = ['x']}", "'sizes' must be a table of text"),
        ("[target]\ntensors = 'a.{i} [2]'\ncounts = {i = 2}", "'counts' must be a table of text"),
        ("name = 'n'\nfound_by = [[1]]", "'found_by' must be a list of text"),
        ("name = " + "[" * 300_000 + "]" * 300_000, "cannot read the recipe"),
        ("[[rule]]\nsource = 'a{'\ntarget='b'", "is not a name pattern"),
        ("[[rule]]\nsource = 'a'\ntarget='b'\n[source]\ntensors = 'a'", "declares no tensor"),
        ("rule = 3", "'rule' must be a list"),
        ("rule = [3]", "rule 1 is not a table"),
        ("nonsense", "cannot read the recipe"),
        (_SIZED.format("when = 'layer > 1'"), "there is no name 'layer' (did you mean 'layers'?)"),
        (_SIZED.format("when = 'j > 1'"), "rule '{i}.a -> {i}.b': 'j > 1': there is no name 'j'"),
        (_SIZED.format("program = 'x = cast(x, d_type)'"), "there is no name 'd_type'"),
        (_SIZED.format("program = 'x = cats(x, layers)'"), "no function 'cats' (did you mean 'cast'?)"),
        (_SIZED.format("program = 'y = x'").replace("{i}.b'", "{i}.{b,c}'"), "the program gives no 'b'"),
        (_SIZED.format("program = 'y = chunk(x, 0, 2)'"), "the program assigns 'y', which is no target"),
        (_SIZED.format('program = """x = cast(x, \'F32\')\\nx = 1"""'), "the program assigns 'x'"),
        (_SIZED.format("program = 'x = x.real'").replace("x.real", "reel"), "there is no name 'reel'"),
        (_SIZED.format("").replace("{i}.b'", "{i+[layer]}.b'"), "there is no name 'layer' (did you mean"),
        (_SIZED.format("equals = 'filled([layer], 0, dtype)'").replace("target = '{i}.b'", ""), "'layer'"),
        ("[source]\ntensors = 'a.{i} [heads, 2]'\nsizes = {head = 'n'}", "did you mean 'head'?"),
        ("[source]\ntensors = 'a.{i} [2] if i > lays'\nsizes = {layers = 'n'}", "'lays'"),
        ("[target]\ntensors = 'a.{i} [2]'\nsizes = {layers = 'n'}\ncounts = {i = 'layer'}", "'layers'?"),
        ("[source]\nsizes = {layers = 'maxi(n, 2)'}", "no function 'maxi' (did you mean 'max'?)"),
        ("[source]\ntensors = 'a [2] F33'", "'a [2] F33' of source: there is no dtype 'F33'"),
        ("[config]\nn = 'maxi(n, 2)'", "[config] n: 'maxi(n, 2)': there is no function 'maxi'"),
        ("[config_back]\nn = 'n +'", "[config_back] n: 'n +' is not a formula"),
    ],
)
def test_a_bad_recipe_file_says_where(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        read_recipe(locate(tmp_path / "mine.toml"))
    assert said in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_names_that_there_are_not_are_refused_in_every_recipe(tmp_path: Path, source: Path) -> None:
    """One that were None would make a condition false, and leave the tensor to the next rule."""
    for recipe in registry.all_recipes().values():
        recipe.check()
    wrong = replace(
        RECIPE, name="wrong", rules=(Rule("blk.{i}.norm", "a.{i}", when="layer > i"), *RECIPE.rules)
    )
    with pytest.raises(UsageError, match=r"there is no name 'layer' \(did you mean 'layers'\?\)"):
        registry.register(wrong)
    assert "wrong" not in registry.all_recipes()
    with pytest.raises(UsageError, match="rule 'blk"):
        streamconv.plan(source, recipe=wrong)
    with pytest.raises(UsageError, match="there is no name 'layer'"):
        streamconv.plan(source, recipe=replace(RECIPE, parts=(wrong,)))
    file = tmp_path / "mine.py"
    file.write_text(
        "from streamconv.plans.recipe import Recipe, Rule\n"
        "RECIPE = Recipe('mine', 'Mine', None, None, (Rule('*', 'new.*', when='is_new'),))\n"
    )
    with pytest.raises(UsageError, match=r"mine\.py: rule .* there is no name 'is_new'"):
        streamconv.plan(source, recipe=file)


def test_a_size_that_the_config_does_not_give_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(_SIZED.format("when = 'layers > 1'"))
    model = write(tmp_path / "model", {"0.a": np.zeros(1, np.float32)}, {"n_layers": 2})
    with pytest.raises(PlanError, match="the config has no n_layer, which is the layers of recipe mine"):
        streamconv.plan(model, recipe=file)
