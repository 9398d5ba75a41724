"""The inert pickle machine against Python's own pickler, and against pickles that nobody should write."""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import pathlib
import pickle as python_pickle
import pickletools
import struct
import sys
import tracemalloc
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamconv.errors import CheckpointError
from streamconv.readers.pickle import MAX_NESTING, Global, Record, decode, decode_prefix, describe

PROTOCOLS = range(6)

atoms = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 300), 1 << 300)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False)
)
keys = (
    st.none()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text()
    | st.binary()
    | st.tuples(st.integers(0, 9), st.text())
)
plain_values = st.recursive(
    atoms | st.frozensets(keys) | st.sets(keys) | st.binary().map(bytearray),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, inner).map(collections.OrderedDict)
    ),
    max_leaves=30,
)


@settings(deadline=None)
@given(plain_values, st.sampled_from(PROTOCOLS), st.booleans())
def test_plain_values_come_out_as_python_reads_them(value, protocol, optimized):
    data = python_pickle.dumps(value, protocol)
    if optimized:
        data = pickletools.optimize(data)
    decoded = decode(data, file="f")
    assert decoded == value
    assert python_pickle.loads(data) == decoded


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_and_cyclic_values_stay_shared(protocol):
    shared = [1]
    value: list[object] = [shared, shared]
    value.append(value)
    decoded = decode(python_pickle.dumps(value, protocol), file="f")
    assert decoded[0] is decoded[1] and decoded[2] is decoded


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_collections_become_plain(protocol):
    value = {
        "counter": collections.Counter("aab"),
        "default": collections.defaultdict(list, {"x": [1]}),
        "many": list(range(5000)),
        "long text": "é" * 70000,
    }
    decoded = decode(python_pickle.dumps(value, protocol), file="f")
    assert decoded == {**value, "default": {"x": [1]}}
    assert type(decoded["counter"]) is dict and type(decoded["default"]) is dict


class Colour(enum.Enum):
    RED = 3


class Words(dict):
    pass


class Numbers(list):
    pass


@dataclass(frozen=True, slots=True)
class Slotted:
    x: int


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize("protocol", range(2, 6))
def test_unknown_classes_become_records(protocol):
    words = Words(a=1)
    words.note = "n"
    value = [
        argparse.Namespace(lr=0.5, layers=[1, 2]), Colour.RED, words, Numbers([1, 2]), Slotted(4), Point(1, 2),
        pathlib.PurePosixPath("a/b"),
    ]  # fmt: skip
    namespace, red, words, numbers, slotted, point, path = decode(
        python_pickle.dumps(value, protocol), file="f"
    )
    assert namespace.cls == Global("argparse", "Namespace")
    assert namespace.fields == {"lr": 0.5, "layers": [1, 2]}
    assert red.cls.name == "Colour" and red.args == (3,)
    assert words.items == {"a": 1} and words.fields == {"note": "n"}
    assert numbers.items == [1, 2]
    assert slotted.cls.name == "Slotted" and (slotted.fields == {"x": 4} or slotted.state == [4])
    assert point.args == (1, 2)
    assert path.cls.module == "pathlib" and path.args == ("a", "b")


def test_classes_of_protocols_0_and_1():
    for protocol in (0, 1):
        record = decode(python_pickle.dumps(argparse.Namespace(a=1), protocol), file="f")
        assert record.cls == Global("argparse", "Namespace") and record.fields == {"a": 1}


def test_pickles_of_python_2():
    # What `pickle.dumps({'a': set([1]), u'b': (1L, 2.5, True)})` gave there, protocols 0 and 2.
    protocol_0 = (
        b"(dp0\nS'a'\np1\nc__builtin__\nset\np2\n((lp3\nI1\natp4\nRp5\nsVb\np6\n(L1L\nF2.5\nI01\ntp7\ns."
    )
    protocol_2 = (
        b"\x80\x02}q\x01(U\x01aq\x02c__builtin__\nset\nq\x03]q\x04K\x01a\x85q\x05Rq\x06X\x01\x00\x00\x00b"
    )
    protocol_2 += b"q\x07\x8a\x01\x01G@\x04\x00\x00\x00\x00\x00\x00\x88\x87q\x08u."
    for data in (protocol_0, protocol_2):
        assert decode(data, file="f") == {"a": {1}, "b": (1, 2.5, True)}


def test_old_style_instances():
    assert decode(b"(iargparse\nNamespace\n.", file="f").cls == Global("argparse", "Namespace")
    record = decode(b"(cargparse\nNamespace\nK\x01o}X\x01\x00\x00\x00aK\x02sb.", file="f")
    assert record.args == (1,) and record.fields == {"a": 2}


def test_the_known_calls_are_the_readers_own():
    data = b"ctorch._utils\nrebuild\n(K\x01K\x02tRcother\nrebuild\n)R\x86."
    made, unknown = decode(data, file="f", calls={("torch._utils", "rebuild"): lambda a, b: a + b})
    assert made == 3
    assert isinstance(unknown, Record) and unknown.cls == Global("other", "rebuild")


def test_persistent_ids_go_to_the_reader():
    data = b"(X\x01\x00\x00\x00aK\x01tQPname\n\x86."
    assert decode(data, file="f", persistent_load=lambda identifier: [identifier]) == ([("a", 1)], ["name"])


def test_objects_of_the_reader_may_be_keys():
    made = decode(
        b"}cm\nf\n)RK\x01s.", file="f", calls={("m", "f"): lambda: test_objects_of_the_reader_may_be_keys}
    )
    ((key, value),) = made.items()
    assert isinstance(key, Record) and key.args == (test_objects_of_the_reader_may_be_keys,) and value == 1


def test_a_prefix_ends_after_its_stop():
    first, second = python_pickle.dumps([1], 2), python_pickle.dumps("x", 4)
    value, end = decode_prefix(b"??" + first + second, 2, file="f")
    assert value == [1] and end == 2 + len(first)
    assert decode_prefix(first + second, len(first), file="f") == ("x", len(first + second))


def test_nothing_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    for protocol in PROTOCOLS:
        record = decode(python_pickle.dumps(Attack(), protocol), file="f")
        assert record.cls.name == "system" and record.args == (f"touch {tmp_path / 'ran'}",)
    assert not (tmp_path / "ran").exists()


def test_no_module_is_imported(tmp_path, monkeypatch):
    """A module that lies beside the checkpoint would run where importing it is part of reading."""
    (tmp_path / "lies_beside.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    named = {0: b"clies_beside\nThing\n)R.", 4: b"\x80\x04\x8c\x0blies_beside\x8c\x05Thing\x93)R."}
    for data in named.values():
        assert decode(data, file="f").cls.name == "Thing"
    assert "lies_beside" not in sys.modules and not (tmp_path / "ran").exists()
    python_pickle.loads(named[4])
    assert (tmp_path / "ran").exists()  # what it would have done
    del sys.modules["lies_beside"]


def lists(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1) + b"."


def test_the_deepest_nesting():
    assert decode(lists(MAX_NESTING), file="f")
    assert decode(b")" + b"\x85" * (MAX_NESTING - 1) + b".", file="f")


def test_a_shared_part_deep_down_counts_where_it_is_deepest():
    # A chain of 200 is met first at the top, then again below 100 other lists.
    chain = b"]" * 200 + b"a" * 199
    data = b"]" + chain + b"q\x00" + b"a" + b"]" * 100 + b"h\x00a" + b"a" * 99 + b"a" + b"."
    with pytest.raises(CheckpointError, match="nested more than"):
        decode(data, file="f")


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def text(value: str) -> bytes:
    return b"X" + u32(len(value.encode())) + value.encode()


def laughs(depth: int) -> bytes:
    """A tuple of two of the same tuple of two ... : 2**depth leaves in a few bytes."""
    return b")" + b"2\x86" * depth


HOSTILE = {
    "empty": (b"", "byte 0 of the pickle: the pickle ends in the middle"),
    "no stop": (b"]", "byte 1 of the pickle: the pickle ends in the middle"),
    "only stop": (b".", "holds no value"),
    "two values": (b"NN.", "values left over"),
    "open mark": (b"(N.", "values left over"),
    "no mark": (b"Nt.", "byte 1 of the pickle: an operation finds no mark"),
    "pop past all": (b"0.", "finds no mark"),
    "underflow": (b"\x86N.", "byte 0 of the pickle: an operation finds too few values"),
    "underflow under a mark": (b"N(\x85N.", "byte 2 of the pickle: an operation finds too few values"),
    "memoize nothing": (b"\x94.", "finds too few values"),
    "unknown opcode": (b"\xff.", "byte 0 of the pickle: this is not a pickle operation"),
    "protocol 6": (b"\x80\x06N.", "protocol 6 is not known"),
    "bytes after stop": (b"N.N", "1 bytes follow the end"),
    "int cut off": (b"J\x01\x02", "ends in the middle"),
    "float cut off": (b"G\x01", "ends in the middle"),
    "length cut off": (b"X\x01", "ends in the middle"),
    "protocol cut off": (b"\x80", "ends in the middle"),
    "text beyond the end": (b"X\xff\xff\xff\xffab.", "4294967295 bytes are announced and 3 are left"),
    "text of exabytes": (b"\x8d" + b"\xff" * 8 + b"a.", "bytes are announced and 2 are left"),
    "bytes of exabytes": (b"\x8e" + b"\xff" * 7 + b"\x7fa.", "bytes are announced and 2 are left"),
    "bytearray of exabytes": (b"\x96" + b"\xff" * 7 + b"\x7fa.", "bytes are announced and 2 are left"),
    "negative string": (b"T\xff\xff\xff\xffab.", "are announced"),
    "frame beyond the end": (b"\x95\x00\x00\x00\x01\x00\x00\x00\x00N.", "a frame of 16777216 bytes"),
    "bad utf-8": (b"X\x01\x00\x00\x00\xff.", "not valid utf-8"),
    "integer of 2 GB": (b"\x8b\xff\xff\xff\x7fa.", "an integer of 2147483647 bytes"),
    "integer of -1 bytes": (b"\x8b\xff\xff\xff\xffa.", "an integer of -1 bytes"),
    "integer of 2000 bytes": (b"\x8b\xd0\x07\x00\x00" + b"a" * 2000 + b".", "an integer of 2000 bytes"),
    "endless digits": (b"I" + b"9" * 5000 + b"\n.", "a number is not a number"),
    "no digits": (b"Lx\n.", "a number is not a number"),
    "no float": (b"Fx\n.", "a number is not a number"),
    "no quotes": (b"Sx\n.", "not in quotes"),
    "broken escape": (b"S'\\x'\n.", "broken escape"),
    "broken unicode escape": (b"V\\u12\n.", "not valid"),
    "line without end": (b"cmodule", "a line has no end"),
    "line too long": (b"c" + b"m" * 70000 + b"\nname\n.", "a line is longer than 65536 bytes"),
    "extension": (b"\x82\x01.", "copyreg.add_extension"),
    "extension 2": (b"\x83\x01\x00.", "copyreg.add_extension"),
    "extension 4": (b"\x84\x01\x00\x00\x00.", "copyreg.add_extension"),
    "out-of-band buffer": (b"\x97.", "buffers outside of it"),
    "read-only buffer": (b"N\x98.", "buffers outside of it"),
    "no memo": (b"h\x00.", "memo entry 0 is used and was never made"),
    "memo out of the blue": (b"Nr\xff\xff\xff\xff.", "memo entry 4294967295 is out of all proportion"),
    "memo hole": (b"NNNNq\x03h\x01.", "memo entry 1 is used and was never made"),
    "negative memo": (b"Np-1\n.", "memo entry -1 is out of all proportion"),
    "negative get": (b"Nq\x00g-1\n.", "memo entry -1 is used"),
    "list as key": (b"}]Ns.", "a list is used as a dict key"),
    "dict in a tuple as key": (b"}}\x85Ns.", "a dict is used as a dict key"),
    "list in a set": (b"\x8f(]\x90.", "a list is used as a dict key or set element"),
    "list in a frozenset": (b"(]\x91.", "a list is used as a dict key or set element"),
    "key without value": (b"}(Nu.", "without a value"),
    "key set in a list": (b"]NNs.", "a key is set in a list"),
    "element appended to a dict": (b"}Na.", "an element is appended to a dict"),
    "element added to a list": (b"](N\x90.", "an element is added to a list"),
    "record as list and dict": (b"cm\nC\n)RNaNNs.", "a key is set in a list"),
    "call of a text": (text("os.system") + b")R.", "'os.system' is called"),
    "arguments that are none": (b"cm\nC\nNR.", "a call has None for its arguments"),
    "class named by numbers": (b"K\x01K\x02\x93.", "1 and 2 are to name a class"),
    "state of a list": (b"]}b.", "a list is given a state"),
    "state twice": (b"cm\nC\n)R}b}b.", "the state of m.C is set twice"),
    "persistent id": (b"NQ.", "refers to an object outside"),
    "bytearray of a number": (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytes are made of something else"),
    "bytes in zip": (b"c_codecs\nencode\n" + text("a") + text("zip") + b"\x86R.", "in a way that no pickler does"),
    "not latin-1": (b"c_codecs\nencode\n" + text("\u20ac") + text("latin1") + b"\x86R.", "does not fit latin1"),
    "dict of numbers": (b"ccollections\nOrderedDict\n](K\x01e\x85R.", "where a pair belongs"),
    "set of a number": (b"c__builtin__\nset\nK\x01\x85R.", "a set is made of 1"),
    "complex of texts": (b"c__builtin__\ncomplex\n" + text("1") + b"\x85R.", "not two numbers"),
    "newobj_ex without keywords": (b"cm\nC\n)N\x92.", "something that is not arguments"),
    "__newobj__ of nothing": (b"ccopyreg\n__newobj__\n)R.", "without a class"),
    "deep lists": (lists(100_000), "nested more than 256 deep"),
    "deep tuples": (b")" + b"\x85" * 1_000_000 + b".", "nested more than 256 deep"),
    "deep records": (b"cm\nC\nq\x00)R" + b"q\x010h\x00h\x01\x85R" * 200 + b".", "nested more than 256 deep"),
    "deep marks": (b"(" * 1_000_000, "marks are open"),
    "deep key": (b"})" + b"\x85" * 100_000 + b"Ns.", "more than 256 parts"),
    "laughing key": (b"}" + laughs(60) + b"Ns.", "more than 256 parts"),
    "laughing set": (b"\x8f(" + laughs(60) + b"\x90.", "more than 256 parts"),
    "endless key": (b"}" + text("k" * 100_000) + b"Ns.", "has 100000 characters"),
    "colliding key": (b"}\x8a\x10" + b"\x7f" * 16 + b"Ns.", "a huge integer"),
    "sets of sets": (b"(" + b"\x8f" * 100_000 + b"l.", "far more memory than its size explains"),
    "concatenations": (
        b"ccopyreg\n__newobj__\nq\x00(cm\nC\n" + b"N" * 10_000 + b"tq\x01(" + b"h\x00h\x01R" * 10_000 + b"l.",
        "far more memory than its size explains",
    ),
    "conversions": (
        b"c__builtin__\nlist\nq\x00(" + b"N" * 10_000 + b"l\x85q\x01(" + b"h\x00h\x01R" * 10_000 + b"l.",
        "far more memory than its size explains",
    ),
    "encodings": (
        b"c_codecs\nencode\nq\x00" + text("a" * 10_000) + text("latin1") + b"\x86q\x01(" + b"h\x00h\x01R" * 10_000 + b"l.",
        "far more memory than its size explains",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_pickles_end_in_one_error(data, message):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            decode(data, file="evil.pt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(caught.value).startswith("evil.pt: ")
    assert peak < (8 << 20) + 200 * len(data)


def test_a_call_that_does_not_fit():
    calls = {("m", "f"): lambda a: a}
    for data, message in (
        (b"cm\nf\n)R.", "does not take"),
        (b"cm\nf\n(" + b"N" * 40 + b"tR.", "with 40 arguments"),
    ):
        with pytest.raises(CheckpointError, match=message):
            decode(data, file="f", calls=calls)


def test_bombs_of_shared_parts_decode_at_once():
    assert decode(laughs(60) + b".", file="f")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_end_in_a_value_or_the_error(data):
    with contextlib.suppress(CheckpointError):
        decode(data, file="f", persistent_load=lambda identifier: identifier)


@settings(deadline=None)
@given(plain_values, st.sampled_from(PROTOCOLS), st.data())
def test_damaged_pickles_end_in_a_value_or_the_error(value, protocol, draw):
    data = bytearray(python_pickle.dumps([value, argparse.Namespace(v=value)], protocol))
    for _ in range(draw.draw(st.integers(1, 4))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        decode(bytes(data), file="f")


@settings(deadline=None)
@given(plain_values, st.sampled_from(PROTOCOLS), st.data())
def test_every_truncation_is_an_error(value, protocol, draw):
    data = python_pickle.dumps(value, protocol)
    length = draw.draw(st.integers(0, len(data) - 1))
    with pytest.raises(CheckpointError):
        decode(data[:length], file="f")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a", "'a'"),
        ("\ud800\n", r"'\ud800\n'"),
        ("a" * 300, "'" + "a" * 200 + "...'"),
        (1 << 64, "a huge integer"),
        ([1] * 1000, "a list"),
        (Global("torch", "float32"), "torch.float32"),
    ],
)
def test_values_in_messages_are_short_and_printable(value, words):
    assert describe(value) == words
