"""Folding tables of tensors: short, and never saying anything that is not so."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamconv.cli.tables import Folded, Row, fold, ranges, render
from streamconv.cli.text import printable

BRACES = re.compile(r"\{([0-9.,]+)\}")


def spelled_out(name: str) -> list[str]:
    """Every name that a folded name stands for, in order."""
    parts = BRACES.split(name)
    sides = [numbers(part) for part in parts[1::2]]
    return [
        "".join(itertools.chain(*zip(parts[::2], (*map(str, indices), ""), strict=True)))
        for indices in itertools.product(*sides)
    ]


def numbers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("..")
        found += range(int(first), int(last or first) + 1)
    return found


def names(lines: list[Folded]) -> list[tuple[str, ...]]:
    return [line.names for line in lines]


def test_layers_are_one_line() -> None:
    rows = [Row((f"model.layers.{i}.self_attn.q_proj.weight",), ("BF16",)) for i in range(80)]
    (line,) = fold(rows)
    assert line.names == ("model.layers.{0..79}.self_attn.q_proj.weight",)
    assert line.members == tuple(range(80))


def test_experts_in_layers_are_one_line() -> None:
    rows = [Row((f"layers.{i}.experts.{j}.w1",)) for i in range(3, 61) for j in range(256)]
    assert names(fold(rows)) == [("layers.{3..60}.experts.{0..255}.w1",)]


def test_a_ragged_grid_says_only_what_is_there() -> None:
    rows = [Row((f"layers.{i}.experts.{j}.w1",)) for i in range(4) for j in range(2 if i == 1 else 4)]
    assert names(fold(rows)) == [("layers.{0,2,3}.experts.{0..3}.w1",), ("layers.1.experts.{0,1}.w1",)]


def test_other_values_are_other_lines_in_the_order_of_their_first_rows() -> None:
    rows = [Row((f"h.{i}.w",), ("F32" if i in (0, 5) else "BF16",)) for i in range(6)]
    assert [(line.names, line.values) for line in fold(rows)] == [
        (("h.{0,5}.w",), ("F32",)),
        (("h.{1..4}.w",), ("BF16",)),
    ]


def test_digits_inside_a_word_are_no_index() -> None:
    rows = [Row((f"experts.0.w{i}",)) for i in (1, 2, 3)]
    assert names(fold(rows)) == [("experts.0.w1",), ("experts.0.w2",), ("experts.0.w3",)]


def test_digits_that_are_no_plain_number_are_kept() -> None:
    rows = [Row(("a.00.w",)), Row(("a.0.w",)), Row((f"a.{'9' * 5000}.w",)), Row(("a.٣.w",))]
    assert names(fold(rows)) == names(fold(rows, full=True))


def test_sources_follow_their_targets() -> None:
    rows = [
        Row((f"layers.{i}.ff.{j}.w", f"blocks.{i + 1}.7.mlp.{j}.weight")) for i in range(4) for j in range(3)
    ]
    assert names(fold(rows)) == [("layers.{0..3}.ff.{0..2}.w", "blocks.{1..4}.7.mlp.{0..2}.weight")]


def test_several_sources_of_one_target() -> None:
    rows = [Row((f"h.{i}.qkv", f"h.{i}.q + h.{i}.k + h.{i}.v")) for i in range(5)]
    assert names(fold(rows)) == [("h.{0..4}.qkv", "h.{0..4}.q + h.{0..4}.k + h.{0..4}.v")]


def test_a_permutation_of_layers_is_not_folded() -> None:
    rows = [Row((f"a.{i}.w", f"b.{j}.w")) for i, j in enumerate((2, 0, 1))]
    assert names(fold(rows)) == names(fold(rows, full=True))


def test_swapped_indices_fold_with_their_own_ranges() -> None:
    rows = [Row((f"a.{i}.b.{j}", f"c.{j}.d.{i}")) for i in range(2) for j in range(3)]
    assert names(fold(rows)) == [("a.{0,1}.b.{0..2}", "c.{0..2}.d.{0,1}")]


def test_a_name_of_many_indices_stays_as_it_is() -> None:
    deep = ".".join(["1"] * 20_000)
    assert names(fold([Row((deep,))])) == [(deep,)]


def test_a_diagonal_of_many_names_is_folded_in_a_moment() -> None:
    rows = [Row((f"x.{i}.{i}",)) for i in range(20_000)]
    assert len(fold(rows)) == 20_000


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "layers"]), st.integers(0, 4), st.integers(0, 3), st.sampled_from("uv")
        ),
        unique=True,
    )
)
def test_folding_loses_and_invents_nothing(parts: list[tuple[str, int, int, str]]) -> None:
    rows = [Row((f"{stem}.{i}.mid.{j}.w", f"{stem}/{j + 2}/{i}"), (value,)) for stem, i, j, value in parts]
    lines = fold(rows)
    assert sorted(member for line in lines for member in line.members) == list(range(len(rows)))
    for line in lines:
        members = [rows[member] for member in line.members]
        assert sorted(spelled_out(line.names[0])) == sorted(row.names[0] for row in members)
        assert set(spelled_out(line.names[1])) == {row.names[1] for row in members}
        assert {row.values for row in members} == {line.values}


@given(st.sets(st.integers(0, 40), min_size=2))
def test_ranges_say_exactly_their_indices(indices: set[int]) -> None:
    assert numbers(ranges(indices).strip("{}")) == sorted(indices)


def test_a_single_index_has_no_braces() -> None:
    assert ranges([7]) == "7"


def test_tables_align_and_escape() -> None:
    lines = render(("name", "n"), [("a\x1b[31m", "1"), ("bb", "1,000")], right=["n"])
    assert lines == [
        "name" + " " * 11 + "n",
        "a\\x1b[31m      1",
        "bb         1,000",
    ]


@pytest.mark.parametrize(
    "text", ["\x1b]0;owned\x07", "a\nb", "\x9b31m", "\u202eevil", "\ud800", "\u2028", "tab\t"]
)
def test_nothing_that_a_terminal_acts_on_gets_through(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(text) != text


def test_ordinary_text_is_left_alone() -> None:
    assert printable("模型.layers.0 é \\x") == "模型.layers.0 é \\x"
