"""Fast paths do what the plain ones do: kernel copies, scattered reads, fused tables, small arenas."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from watched import Calls, watching

from streamconv import dtypes
from streamconv.errors import ConversionError
from streamconv.execution import execute, gather
from streamconv.execution.difference import Difference, first_difference
from streamconv.execution.execute import CheckItem, Receipt, Settings, Worker, WorkItem
from streamconv.execution.node import node
from streamconv.ops import (
    Cast,
    Concat,
    Expression,
    Pad,
    PermuteAxes,
    Reshape,
    Split,
    Stack,
    Take,
    Unstack,
    apply,
    fill,
    renamed,
)
from streamconv.storage.files import spans
from streamconv.tensor import Extent, Stored, TensorSpec

SHAPE = (48, 10, 16)
VALUES = numpy.random.default_rng(0).standard_normal(SHAPE).astype("f4")


def stored(directory: Path, pieces: int = 1) -> Stored:
    """VALUES in so many extents, over two files, out of order and with gaps."""
    raw = VALUES.tobytes()
    step = -(-len(raw) // pieces // 4) * 4
    extents = []
    for number, start in enumerate(range(0, len(raw), step)):
        path = directory / f"source{number % 2}"
        with path.open("ab") as file:
            file.write(b"gap" * (number + 1))
            extents.append(Extent(str(path), file.tell(), len(raw[start : start + step])))
            file.write(raw[start : start + step])
    return Stored(TensorSpec("x", dtypes.by_name("F32"), SHAPE), tuple(extents))


def written(expression: Expression, directory: Path, settings: Settings, part: int = 1 << 30) -> bytes:
    target = directory / "target"
    target.write_bytes(b"\xaa" * (expression.spec.nbytes + 7))
    worker = Worker(settings)
    try:
        for start in range(0, expression.spec.nbytes, part):
            stop = min(start + part, expression.spec.nbytes)
            (receipt,) = worker.run([WorkItem(0, "x", expression, start, stop, str(target), 5)])
            if receipt.digest is not None:
                part_bytes = target.read_bytes()[5 + start : 5 + stop]
                assert receipt.digest == xxhash.xxh3_128(part_bytes).hexdigest()
    finally:
        worker.close()
    data = target.read_bytes()
    assert data[:5] == b"\xaa" * 5 and data[-2:] == b"\xaa" * 2
    return data[5:-2]


def one(result: tuple[Expression, ...], index: int = 0) -> Expression:
    return result[index]


CHAINS: dict[str, tuple[Callable[[Expression], Expression], Callable[[numpy.ndarray], numpy.ndarray]]] = {
    "itself": (lambda x: x, lambda a: a),
    "rows": (lambda x: one(apply(Split(0, (13, 35)), x), 1), lambda a: a[13:]),
    "columns": (lambda x: one(apply(Split(2, (5, 11)), x), 1), lambda a: a[:, :, 5:]),
    "middle": (lambda x: one(apply(Split(1, (3, 7)), x), 0), lambda a: a[:, :3]),
    "transposed": (lambda x: one(apply(PermuteAxes((2, 1, 0)), x)), lambda a: a.transpose(2, 1, 0)),
    "swapped": (lambda x: one(apply(PermuteAxes((1, 0, 2)), x)), lambda a: a.transpose(1, 0, 2)),
    "taken": (
        lambda x: one(apply(Take(0, ((40, 1, 8), (0, 5, 8))), x)),
        lambda a: a[[*range(40, 48), *range(0, 40, 5)]],
    ),
    "padded": (
        lambda x: one(apply(Pad(1, 12, 1.5), x)),
        lambda a: numpy.pad(a, ((0, 0), (0, 2), (0, 0)), constant_values=1.5),
    ),
    "joined": (lambda x: one(apply(Concat(1), x, x)), lambda a: numpy.concatenate([a, a], 1)),
    "stacked": (lambda x: one(apply(Stack(1), x, x)), lambda a: numpy.stack([a, a], 1)),
    "unstacked": (lambda x: one(apply(Unstack(1, 10), x), 4), lambda a: a[:, 4]),
    "interleaved": (
        lambda x: one(
            apply(
                Reshape(SHAPE), one(apply(PermuteAxes((0, 2, 1, 3)), one(apply(Reshape((48, 5, 2, 16)), x))))
            )
        ),
        lambda a: a.reshape(48, 5, 2, 16).transpose(0, 2, 1, 3).reshape(SHAPE),
    ),
    "cast": (lambda x: one(apply(Cast("F16"), x)), lambda a: a.astype("f2")),
    "cast and transposed": (
        lambda x: one(apply(PermuteAxes((2, 0, 1)), one(apply(Cast("F16"), x)))),
        lambda a: a.astype("f2").transpose(2, 0, 1),
    ),
    "transposed and cast": (
        lambda x: one(apply(Cast("F64"), one(apply(PermuteAxes((2, 0, 1)), x)))),
        lambda a: a.transpose(2, 0, 1).astype("f8"),
    ),
    "filled": (lambda x: renamed(fill(x.spec, 3), "x"), lambda a: numpy.full_like(a, 3)),
}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("pieces", [1, 7], ids=["one extent", "seven extents"])
@pytest.mark.parametrize("arena", [1 << 10, 1 << 13, 1 << 20], ids=["1 KiB", "8 KiB", "1 MiB"])
def test_chains_in_any_arena(tmp_path: Path, chain: str, pieces: int, arena: int) -> None:
    build, formula = CHAINS[chain]
    expression = build(stored(tmp_path, pieces))
    expected = numpy.ascontiguousarray(formula(VALUES)).tobytes()
    # Thousands of tiny parts once: they take time, and an arena of any size holds them.
    for part in (1 << 30, 4096, 48) if arena == 1 << 13 else (1 << 30, 4096):
        assert written(expression, tmp_path, Settings(arena), part) == expected


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(
    ("kernel", "short", "gap"), [(1, 1, 0), (1, 1 << 20, 0), (1 << 30, 1 << 20, 1 << 20), (4, 8, 64)]
)
def test_every_way_to_move_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chain: str, kernel: int, short: int, gap: int
) -> None:
    monkeypatch.setattr(execute, "_KERNEL_RUN", kernel)
    monkeypatch.setattr(gather, "LONG_RUN", short)
    monkeypatch.setattr(gather, "_NARROW_GAP", gap)
    build, formula = CHAINS[chain]
    expected = numpy.ascontiguousarray(formula(VALUES)).tobytes()
    assert written(build(stored(tmp_path, 3)), tmp_path, Settings(1 << 16)) == expected


def test_a_copy_with_checksum_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    assert written(stored(tmp_path, 3), tmp_path, Settings(1 << 12, checksum=True)) == VALUES.tobytes()


def test_packed_tensors_are_carried_through(tmp_path: Path) -> None:
    spec = TensorSpec("x", dtypes.by_name("F4"), (300, 320))
    content = bytes(range(240)) * 200
    (tmp_path / "source").write_bytes(content)
    packed = Stored(spec, (Extent(str(tmp_path / "source"), 0, len(content)),))
    assert written(packed, tmp_path, Settings(1 << 10), 64) == content
    again = numpy.empty(len(content), numpy.uint8)
    Worker(Settings(1 << 10)).read(packed, 0, again)
    assert again.tobytes() == content


def test_what_two_must_share_is_proven(tmp_path: Path) -> None:
    source = stored(tmp_path)
    again = one(apply(Reshape(SHAPE), one(apply(Reshape((-1,)), source))))
    near = fill(source.spec, 0)
    (half,) = apply(Cast("F16"), source)
    (plus,) = apply(Cast("F32"), half)
    worker = Worker(Settings(1 << 16))
    nbytes = source.spec.nbytes

    def checked(left: Expression, right: Expression, start: int = 0, tolerance: float = 0.0) -> Receipt:
        (receipt,) = worker.run([CheckItem(7, "a copy", left, right, start, nbytes, tolerance)])
        assert (receipt.index, receipt.nbytes) == (7, 0)
        return receipt

    assert checked(source, again).difference is None
    assert checked(source, again, 4096).difference is None
    first = checked(source, near).difference
    assert first is not None and (first.element, first.found) == (0, "0.0")
    later = checked(source, near, 4096).difference
    assert later is not None and later.element == 1024
    assert checked(source, plus, tolerance=1e-3).difference is None
    assert checked(source, plus, tolerance=1e-6).difference is not None
    worker.close()


@pytest.mark.parametrize("dtype", ["F32", "C64"])
def test_a_difference_is_the_first_beyond_what_may_differ(dtype: str) -> None:
    known = dtypes.by_name(dtype)
    expected = numpy.ones(200_000, known.numpy)
    found = expected.copy()
    expected[3] = found[3] = numpy.nan  # the same bits
    found[0] = 1.0000001
    sides = expected.view(numpy.uint8), found.view(numpy.uint8)
    assert first_difference(known, 0, *sides, 1e-3) is None
    exact = first_difference(known, 0, *sides)
    assert exact is not None and exact.element == 0
    for element in (150_000, 5):
        found[element] = 9
        beyond = first_difference(known, 1 << 20, *sides, 1e-3)
        assert beyond == Difference(
            (1 << 20) // known.itemsize + element, str(expected[5]), str(found[element])
        )


def test_a_block_that_is_halved_counts_its_losses_once(tmp_path: Path) -> None:
    """The first of the two is cast before the block turns out too large for the second."""
    values = [numpy.full(100, 1e6, "f4"), numpy.full(50_000, 1e6, "f4")]
    parts = []
    for number, part in enumerate(values):
        path = tmp_path / f"part{number}"
        path.write_bytes(part.tobytes())
        spec = TensorSpec("x", dtypes.by_name("F32"), part.shape)
        parts += apply(Cast("F16"), Stored(spec, (Extent(str(path), 0, part.nbytes),)))
    both = one(apply(Concat(0), *parts))
    (tmp_path / "target").write_bytes(bytes(both.spec.nbytes))
    for arena in (1 << 12, 1 << 16, 1 << 22):
        worker = Worker(Settings(arena))
        item = WorkItem(0, "x", both, 0, both.spec.nbytes, str(tmp_path / "target"), 0)
        (receipt,) = worker.run([item])
        worker.close()
        assert (receipt.overflowed, receipt.flushed) == (50_100, 0)


@pytest.mark.parametrize("dtype", ["F32", "F16"], ids=["copied", "cast"])
def test_what_cannot_be_read_is_named_by_tensor_file_and_byte(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "source"
    path.write_bytes(VALUES.tobytes()[:-4])
    whole = Stored(TensorSpec("x", dtypes.by_name("F32"), SHAPE), (Extent(str(path), 0, VALUES.nbytes),))
    expression = whole if dtype == "F32" else one(apply(Cast(dtype), whole))
    with pytest.raises(ConversionError) as failed:
        written(expression, tmp_path, Settings(1 << 20))
    problem = failed.value.headline
    assert (problem.tensor, problem.file) == ("x", str(path))
    assert str(VALUES.nbytes - 4) in problem.message.replace(",", "")


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cast_takes_no_memory_of_its_tensors_size(tmp_path: Path, transposed: bool) -> None:
    spec = TensorSpec("w", dtypes.by_name("F32"), (1 << 12, 1 << 10))
    for name in ("source", "target"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(spec.nbytes)
    tensor: Expression = Stored(spec, (Extent(str(tmp_path / "source"), 0, spec.nbytes),))
    if transposed:
        tensor = one(apply(PermuteAxes((1, 0)), tensor))
    cast = one(apply(Cast("BF16"), tensor))
    arena, calls = 1 << 20, Calls()
    tracemalloc.start()
    try:
        with watching(calls):
            worker = Worker(Settings(arena))
            worker.run([WorkItem(0, "w", cast, 0, cast.spec.nbytes, str(tmp_path / "target"), 0)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        worker.close()
    assert peak < arena + (3 << 20)
    assert max(call.arguments[0] for call in calls.of("read_into", "read_runs", "write")) < arena


def test_a_check_takes_no_memory_of_its_tensors_size(tmp_path: Path) -> None:
    spec = TensorSpec("w", dtypes.by_name("F8_E4M3"), (8 << 20,))
    for name, value in (("left", 0x38), ("right", 0x39)):
        (tmp_path / name).write_bytes(bytes([value]) * spec.nbytes)
    sides = [Stored(spec, (Extent(str(tmp_path / name), 0, spec.nbytes),)) for name in ("left", "right")]
    tracemalloc.start()
    try:
        worker = Worker(Settings(1 << 20))
        (receipt,) = worker.run([CheckItem(0, "a copy", *sides, 0, spec.nbytes, 0.5)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        worker.close()
    assert receipt.difference is None
    assert peak < (1 << 20) + 2 * execute._PROVEN + (16 << 20)


def test_a_worker_syncs_before_it_vouches_where_it_is_told_to(tmp_path: Path) -> None:
    source = stored(tmp_path)
    (half,) = apply(Cast("F16"), source)
    (tmp_path / "target").write_bytes(bytes(source.spec.nbytes + half.spec.nbytes))
    items = [
        WorkItem(0, "x", source, 0, source.spec.nbytes, str(tmp_path / "target"), 0),
        WorkItem(1, "y", half, 0, half.spec.nbytes, str(tmp_path / "target"), source.spec.nbytes),
    ]
    for sync in (False, True):
        calls = Calls()
        with watching(calls):
            worker = Worker(Settings(1 << 16, checksum=True, sync=sync))
            receipts = worker.run(items)
            worker.close()
        assert all(receipt.durable is sync and receipt.digest for receipt in receipts)
        done = [call.method for call in calls.of("copy_from", "write", "sync")]
        assert done[-1] == "sync" if sync else "sync" not in done
        assert all(receipt.holds_on(node()) for receipt in receipts)
        assert all(receipt.holds_on("another node") is sync for receipt in receipts)
        assert all(receipt.holds_on(None) is sync for receipt in receipts)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    axes=st.permutations([0, 1, 2]),
    cut=st.integers(1, 9),
    arena=st.integers(300, 5000),
    part=st.integers(1, 500),
)
def test_random_chains(
    tmp_path_factory: pytest.TempPathFactory, axes: list[int], cut: int, arena: int, part: int
) -> None:
    directory = tmp_path_factory.mktemp("chain")
    split = one(apply(Split(1, (cut, 10 - cut)), stored(directory, 3)), 0)
    expression = one(apply(PermuteAxes(tuple(axes)), split))
    expected = numpy.ascontiguousarray(VALUES[:, :cut].transpose(axes)).tobytes()
    assert written(expression, directory, Settings(arena * 8), part * 64) == expected


@given(st.lists(st.integers(0, 5), max_size=5), st.data())
def test_a_span_of_extents_is_a_slice_of_their_bytes(lengths: list[int], data: st.DataObject) -> None:
    extents = [Extent(str(index), 10 * index, length) for index, length in enumerate(lengths)]
    held = [(extent.file, extent.offset + at) for extent in extents for at in range(extent.length)]
    start = data.draw(st.integers(0, len(held)))
    length = data.draw(st.integers(0, len(held) - start))
    found = [
        (file, offset + at) for file, offset, count in spans(extents, start, length) for at in range(count)
    ]
    assert found == held[start : start + length]
