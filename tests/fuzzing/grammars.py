"""Mutators: valid bytes of a format -> bytes that are wrong in a place or two, and otherwise whole."""

from __future__ import annotations

import contextlib
import io
import json
import pickletools
import re
import struct
import tomllib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from streamconv.running.state import sealed

COUNTS = (
    0, 1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 255, 256, 1 << 15, (1 << 16) - 1, 1 << 16, 400_000_000, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, 1 << 53, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -1, -2, -(1 << 31), -(1 << 63),
)  # fmt: skip
TEXTS = (
    "", ".", "..", "/", "../x", "../outside.txt", "/etc/passwd", "a/../../b", "a//b", "x" * 255, "x" * 300, "é" * 130, "\0",
    "\ud800", "\u202e", "weight", "model", "module", "F32", "BF16", "F8_E4M3", "float16", "True", "-1", "0", "1e400", "{i}",
    "%s%n", "~", "file:///etc/passwd", "s3://x/y", "\n", "\x1b[31m", "1" * 5000,
)  # fmt: skip
ODD: tuple[Any, ...] = (
    None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), [], {}, [[]], [0], [-1], [None], {"": None}, [1 << 62] * 3,
    [2] * 80,
)  # fmt: skip


def mutated(chooser: Random, data: bytes) -> bytes:
    """Bytes of a file, changed: mostly by the grammar that they are of, now and then as bytes."""
    if not data:
        return chooser.choice((b"\0", b"{}", b"x" * 64))
    if chooser.random() < 0.1:
        return scrambled(chooser, data)
    try:
        return grammar_of(data)(chooser, data)
    except Exception:  # a mutant of a mutant may be of no grammar
        return scrambled(chooser, data)


def grammar_of(data: bytes) -> Callable[[Random, bytes], bytes]:
    """The mutator for what bytes are, by how they begin."""
    head = data[:64].lstrip()
    if data[:2] == b"PK":
        return zipped
    if len(data) > 10 and int.from_bytes(data[:8], "little") <= len(data) and data[8:].lstrip()[:1] == b"{":
        return safetensors
    if data[:1] == b"\x80" and data[1:2] in b"\x02\x03\x04\x05":
        return pickles
    if head[:1] in (b"{", b"["):
        return toml if _is_toml(data) else json_text
    if re.match(rb"[0-9a-f]{8} [\[{]", data):
        return journal
    if _is_toml(data):
        return toml
    if b"\0" not in data[:512] and data[:512].isascii():
        return text
    return protobuf


# ------------------------------------------------------------------------------------------ bytes and numbers


def scrambled(chooser: Random, data: bytes) -> bytes:
    """A few bytes changed, cut out, doubled, or cut off."""
    changed = bytearray(data or b"\0")
    for _ in range(chooser.choice((1, 1, 2, 4))):
        at = chooser.randrange(len(changed) or 1)
        match chooser.randrange(6):
            case 0:
                changed[at : at + 1] = bytes([chooser.randrange(256)])
            case 1:
                changed[at : at + 1] = bytes([(changed[at] if changed else 0) ^ 1 << chooser.randrange(8)])
            case 2:
                size = chooser.choice((1, 2, 4, 8))
                changed[at : at + size] = (chooser.choice(COUNTS) & (1 << 8 * size) - 1).to_bytes(
                    size, "little"
                )
            case 3:
                del changed[at : at + chooser.randint(1, 16)]
            case 4:
                changed[at:at] = changed[at : at + chooser.randint(1, 64)]
            case _:
                if chooser.random() < 0.3:
                    del changed[at:]
    return bytes(changed)


def number(chooser: Random, value: int) -> int:
    """Another number, most often one that is near."""
    near = (
        value + 1,
        value - 1,
        value * 2,
        -value,
        value // 2,
        value + 8,
        value ^ 1 << chooser.randrange(34),
    )
    return chooser.choice(near if chooser.random() < 0.6 else COUNTS)


def words(chooser: Random, value: str) -> str:
    """Another text: of the same kind, or nothing like it."""
    parts = re.findall(r"\w+|\W", value)
    if not parts or chooser.random() < 0.3:
        return chooser.choice(TEXTS)
    at = chooser.randrange(len(parts))
    match chooser.randrange(5):
        case 0:
            parts[at] = (
                str(number(chooser, int(parts[at]))) if parts[at].isdecimal() and len(parts[at]) < 19 else "0"
            )
        case 1:
            del parts[at]
        case 2:
            parts.insert(at, chooser.choice(parts))
        case 3:
            other = chooser.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        case _:
            parts[at] = chooser.choice((*TEXTS, *"()[]{},.*=+-/%"))
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------- documents


def document(chooser: Random, value: Any) -> Any:
    """A structure of dicts, lists and plain values, changed in a place or a few. Changes it in place where it can."""
    for _ in range(chooser.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return chooser.choice(ODD)
        holder, key = chooser.choice(places)
        old = holder[key]
        match chooser.randrange(9):
            case 0:
                del holder[key]
            case 1:
                holder[key] = chooser.choice(ODD)
            case 2:
                other, there = chooser.choice(places)
                try:
                    text = json.dumps(other[there])
                    holder[key] = (
                        json.loads(text) if len(text) < 1 << 16 else None
                    )  # a copy: cycles are no JSON
                except (KeyError, IndexError, TypeError, ValueError):
                    holder[key] = None
            case 3 if isinstance(holder, dict):
                holder[words(chooser, key)] = holder.pop(key) if chooser.random() < 0.5 else old
            case 3:
                holder.insert(key, old)
            case 4 if isinstance(old, list) and old:
                holder[key] = old * (chooser.choice((2, 3, 40, 1000)) if len(places) < 200 else 1)
            case 4:
                holder[key] = [old]
            case 5:
                nested: Any = old
                for _ in range(chooser.choice((1, 2, 30, 300))):
                    nested = [nested] if chooser.random() < 0.5 else {"x": nested}
                holder[key] = nested
            case _:
                holder[key] = _leaf(chooser, old)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        holder = stack.pop()
        items = (
            holder.items()
            if isinstance(holder, dict)
            else enumerate(holder)
            if isinstance(holder, list)
            else ()
        )
        for key, inner in items:
            yield holder, key
            stack.append(inner)


def _leaf(chooser: Random, old: Any) -> Any:
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return number(chooser, old)
    if isinstance(old, float):
        return chooser.choice(
            (-old, 0.0, old * 2, 1e308, float("nan"), int(old) if old == old and abs(old) < 1e18 else 0)
        )
    if isinstance(old, str):
        return words(chooser, old)
    return chooser.choice((*ODD, *TEXTS, *COUNTS))


def json_text(chooser: Random, data: bytes) -> bytes:
    """A JSON document; one of ours, which has a digest of itself, has the right one, mostly."""
    parsed = json.loads(data)
    is_ours = isinstance(parsed, dict) and sealed(parsed) == parsed
    parsed = document(chooser, parsed)
    if is_ours and isinstance(parsed, dict) and chooser.random() < 0.9:
        with contextlib.suppress(TypeError):  # numbers that cannot be written have no digest
            parsed = sealed(parsed)
    made = json.dumps(parsed, ensure_ascii=chooser.random() < 0.5)
    if chooser.random() < 0.05:
        made = made.replace(",", ', "x": 1, "x": 2,', 1)
    return made.encode(errors="surrogatepass")


def journal(chooser: Random, data: bytes) -> bytes:
    """Lines of a checksum and JSON; the checksums hold, mostly."""
    lines = data.split(b"\n")
    for _ in range(chooser.randint(1, 3)):
        at = chooser.randrange(len(lines))
        match chooser.randrange(5):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, chooser.choice(lines))
            case _ if lines[at]:
                body = json.dumps(document(chooser, json.loads(lines[at][9:]))).encode(errors="surrogatepass")
                lines[at] = b"%08x %s" % (zlib.crc32(body), body)
        lines = lines or [b""]
    return b"\n".join(lines)


def text(chooser: Random, data: bytes) -> bytes:
    """Lines of words."""
    lines = data.decode(errors="surrogateescape").split("\n")
    for _ in range(chooser.randint(1, 3)):
        at = chooser.randrange(len(lines))
        match chooser.randrange(5):
            case 0 if len(lines) > 1:
                del lines[at]
            case 1:
                lines.insert(at, chooser.choice(lines))
            case _:
                lines[at] = words(chooser, lines[at])
    return "\n".join(lines).encode(errors="surrogatepass")


def _is_toml(data: bytes) -> bool:
    try:
        return bool(tomllib.loads(data.decode()))
    except (ValueError, RecursionError):
        return False


def toml(chooser: Random, data: bytes) -> bytes:
    """A TOML file: its document, written again, or its lines."""
    if chooser.random() < 0.3:
        return text(chooser, data)
    return _toml_of(document(chooser, tomllib.loads(data.decode()))).encode(errors="surrogatepass")


def _toml_of(value: Any, *, inside: bool = False) -> str:
    if isinstance(value, dict):
        rows = [f"{json.dumps(str(key))} = {_toml_of(inner, inside=True)}" for key, inner in value.items()]
        return "{" + ", ".join(rows) + "}" if inside else "\n".join(rows) + "\n"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_of(inner, inside=True) for inner in value) + "]"
    if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
        return "nan" if value != value else "inf"
    return '"nothing"' if value is None else json.dumps(value)


# -------------------------------------------------------------------------------------------------- safetensors


def safetensors(chooser: Random, data: bytes) -> bytes:
    """A file of safetensors: its header changed, and its length put right; or the length, or the data."""
    length = int.from_bytes(data[:8], "little")
    header, body = data[8 : 8 + length], data[8 + length :]
    kind = chooser.random()
    if kind < 0.75:
        parsed = json.loads(header)
        if chooser.random() < 0.3 and isinstance(parsed, dict):
            parsed, body = _moved(chooser, parsed, body)
        else:
            parsed = document(chooser, parsed)
        header = json.dumps(parsed).encode()
        header += b" " * (-len(header) % 8 if chooser.random() < 0.7 else 0)
    elif kind < 0.85:
        body = scrambled(chooser, body)
    elif kind < 0.95:
        header = json_text(chooser, header)
    else:
        length = number(chooser, length) & (1 << 64) - 1
        return length.to_bytes(8, "little") + data[8:]
    return len(header).to_bytes(8, "little") + header + body


def _moved(chooser: Random, header: dict[str, Any], body: bytes) -> tuple[dict[str, Any], bytes]:
    """A tensor of another dtype and shape, with all that lies after it moved: the file is whole again."""
    names = [name for name, entry in header.items() if isinstance(entry, dict) and "data_offsets" in entry]
    if not names:
        return header, body
    name = chooser.choice(names)
    begin, end = header[name]["data_offsets"]
    dtype, size = chooser.choice(
        (("F32", 4), ("BF16", 2), ("U8", 1), ("F64", 8), ("BOOL", 1), ("C64", 8), ("I64", 8))
    )
    shape = [chooser.choice((0, 1, 2, 3, 5)) for _ in range(chooser.randrange(5))]
    count = size
    for each in shape:
        count *= each
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + count]}
    for other in names:
        if other != name and header[other]["data_offsets"][0] >= end:
            header[other]["data_offsets"] = [
                each + count - (end - begin) for each in header[other]["data_offsets"]
            ]
    return header, body[:begin] + bytes(count) + body[end:]


# ------------------------------------------------------------------------------------------------- zip archives


@dataclass(slots=True)
class _Member:
    name: bytes
    data: bytes
    method: int = 0
    fields: dict[str, int] = field(default_factory=dict)


# Fields of the records, with what follows their signature (PKWARE, APPNOTE.TXT 4.3).
_LOCAL = "version:H flags:H method:H time:H date:H crc:I packed:I size:I name:H extra:H"
_CENTRAL = (
    "by:H version:H flags:H method:H time:H date:H crc:I packed:I size:I name:H extra:H comment:H disk:H internal:H "
    "external:I offset:I"
)
_END = "disk:H first:H here:H count:H size:I offset:I comment:H"
_END_64 = "length:Q by:H version:H disk:I first:I here:Q count:Q size:Q offset:Q"
_LOCATOR = "disk:I offset:Q disks:I"


def _packed(chooser: Random, signature: bytes, fields: str, values: dict[str, int], wrong: float) -> bytes:
    rows = [part.split(":") for part in fields.split()]
    values = dict(values)
    if chooser.random() < wrong:
        key = chooser.choice(rows)[0]
        values[key] = number(chooser, values.get(key, 0))
    sizes = {"H": 16, "I": 32, "Q": 64}
    numbers = [values.get(name, 0) & (1 << sizes[form]) - 1 for name, form in rows]
    return signature + struct.pack("<" + "".join(form for _, form in rows), *numbers)


def zipped(chooser: Random, data: bytes) -> bytes:
    """An archive: a member changed by its own grammar, members renamed, doubled or gone, or a field of a record."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [
            _Member(info.filename.encode(), archive.read(info), info.compress_type)
            for info in archive.infolist()
        ]
    kind = chooser.random()
    at = chooser.randrange(len(members))
    if kind < 0.6:
        pickled = [each for each in members if each.name.endswith(b".pkl")]
        chosen = chooser.choice(pickled) if pickled and chooser.random() < 0.85 else members[at]
        chosen.data = mutated(chooser, chosen.data)
    elif kind < 0.65:
        del members[at]
    elif kind < 0.7:
        members.insert(at, chooser.choice(members))
    elif kind < 0.75:
        members[at].name = words(chooser, members[at].name.decode(errors="replace")).encode(errors="replace")[
            :60000
        ]
    elif kind < 0.8:
        chooser.shuffle(members)
    return _archive(chooser, members, wrong=0.9 if kind > 0.8 else 0.0)


def _archive(chooser: Random, members: list[_Member], wrong: float) -> bytes:
    """The archive of these members, with one of its records wrong, or none."""
    made, central = bytearray(), bytearray()
    records = 2 * len(members) + 1
    chosen = chooser.randrange(records) if wrong and chooser.random() < 0.8 else records - 1
    big = chooser.random() < 0.15
    for at, member in enumerate(members):
        odd = [wrong if chosen == 2 * at + side else 0.0 for side in (0, 1)]
        start = len(made)
        data = zlib.compress(member.data)[2:-4] if member.method == 8 else member.data
        values = {
            "method": member.method, "crc": zlib.crc32(member.data), "packed": len(data), "size": len(member.data),
            "name": len(member.name), "offset": start,
        }  # fmt: skip
        pad = -(start + 30 + len(member.name)) % 64
        extra = b"FB" + struct.pack("<H", pad - 4) + b"Z" * (pad - 4) if pad >= 4 else b""
        made += (
            _packed(chooser, b"PK\3\4", _LOCAL, values | {"extra": len(extra)}, odd[0])
            + member.name
            + extra
            + data
        )
        more = struct.pack("<HHQQQ", 1, 24, len(member.data), len(data), start) if big else b""
        if big:
            values |= {"size": -1, "packed": -1, "offset": -1, "extra": len(more)}
            if odd[1]:
                more = scrambled(chooser, more)
        central += _packed(chooser, b"PK\1\2", _CENTRAL, values, odd[1]) + member.name + more
    start = len(made)
    wrong = wrong if chosen == records - 1 else 0.0
    end = {"here": len(members), "count": len(members), "size": len(central), "offset": start}
    made += central
    if big:
        end_64 = len(made)
        made += _packed(chooser, b"PK\6\6", _END_64, end | {"length": 44}, wrong)
        made += _packed(chooser, b"PK\6\7", _LOCATOR, {"offset": end_64, "disks": 1}, wrong)
        end |= {"here": -1, "count": -1, "size": -1, "offset": -1}
    return bytes(made + _packed(chooser, b"PK\5\6", _END, end, wrong))


# ------------------------------------------------------------------------------------------------------ pickles


_GLOBALS = (
    b"collections OrderedDict", b"torch FloatStorage", b"torch BFloat16Storage", b"torch._utils _rebuild_tensor_v2",
    b"torch._utils _rebuild_parameter", b"torch._utils _rebuild_qtensor", b"torch Size", b"torch.serialization _get_layout",
    b"torch float32", b"torch._tensor _rebuild_from_type_v2", b"builtins set", b"builtins getattr", b"os system", b"builtins eval",
    b"numpy dtype", b"numpy.core.multiarray _reconstruct", b"numpy ndarray", b"_codecs encode", b"argparse Namespace",
    b"torch.distributed.checkpoint.metadata Metadata", b"torch.nn.parameter Parameter", b"copyreg _reconstructor",
    b"torch._utils _rebuild_sparse_tensor", b"torch._utils _rebuild_meta_tensor_no_storage", b"builtins bytearray",
)  # fmt: skip
_INTEGERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG"}
_STRINGS = {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"}
_VALUES = (
    b"N",
    b"\x88",
    b"\x89",
    b"]",
    b"}",
    b")",
    b"\x8f",
    b"G\x7f\xf0\0\0\0\0\0\0",
    b"K\1",
    b"(t",
    b"(l",
    b"(d",
    b"\x8c\1x",
    b"C\1x",
)
"""Operations that push one value."""


def _pushes_one(opcode: Any) -> bool:
    return not opcode.stack_before and len(opcode.stack_after) == 1 and opcode.name != "MARK"


def pickles(chooser: Random, data: bytes) -> bytes:
    """One pickle of those at the start of a file, operation by operation; what follows them stays."""
    parts, at = [], 0
    while data[at : at + 1] == b"\x80" and len(parts) < 8:
        stream = io.BytesIO(data[at:])
        try:
            for _ in pickletools.genops(stream):
                pass
        except ValueError:
            break
        parts.append(data[at : at + stream.tell()])
        at += stream.tell()
    if not parts:
        raise ValueError("no pickle")
    chosen = (
        chooser.randrange(len(parts))
        if chooser.random() < 0.3
        else max(range(len(parts)), key=lambda i: len(parts[i]))
    )
    parts[chosen] = pickled(chooser, parts[chosen])
    return b"".join(parts) + data[at:]


def pickled(chooser: Random, data: bytes) -> bytes:
    """A pickle with an operation or a few changed, so that the stack holds, mostly."""
    found = [(opcode, argument, position or 0) for opcode, argument, position in pickletools.genops(data)]
    ends = [*(position for _, _, position in found[1:]), len(data)]
    rows = [
        (opcode, argument, data[position:end])
        for (opcode, argument, position), end in zip(found, ends, strict=True)
        if opcode.name != "FRAME"  # whose length would be wrong
    ]
    memos = [argument for opcode, argument, _ in rows if opcode.name in ("BINPUT", "LONG_BINPUT")]
    memos += range(sum(opcode.name == "MEMOIZE" for opcode, _, _ in rows))
    texts = [argument for opcode, argument, _ in rows if opcode.name in _STRINGS]
    for _ in range(chooser.choice((1, 1, 2, 3))):
        at = chooser.randrange(1, len(rows))
        wanted = chooser.choice(("number", "text", "global", "any", "any"))
        fitting = [
            index
            for index, (opcode, _, _) in enumerate(rows)
            if opcode is not None
            and (
                (wanted == "number" and opcode.name in _INTEGERS)
                or (wanted == "text" and opcode.name in _STRINGS)
                or (wanted == "global" and opcode.name in ("GLOBAL", "STACK_GLOBAL"))
            )
        ]
        at = chooser.choice(fitting) if fitting else at
        rows[at] = (None, None, _operation(chooser, *rows[at], memos, texts))
    return b"".join(code for _, _, code in rows)


def _operation(
    chooser: Random, opcode: Any, argument: Any, code: bytes, memos: list[int], texts: list[str]
) -> bytes:
    if opcode is None or opcode.name in ("STOP", "PROTO"):
        return code
    if opcode.name in _INTEGERS and chooser.random() < 0.8:
        return _integer(number(chooser, argument))
    if opcode.name in _STRINGS and chooser.random() < 0.8:
        made = (chooser.choice(texts) if chooser.random() < 0.4 else words(chooser, argument)).encode(
            errors="surrogatepass"
        )
        return b"X" + struct.pack("<I", len(made)) + made
    if opcode.name == "GLOBAL":
        return b"c" + chooser.choice(_GLOBALS).replace(b" ", b"\n") + b"\n"
    if opcode.name == "STACK_GLOBAL":
        return b"00c" + chooser.choice(_GLOBALS).replace(b" ", b"\n") + b"\n"
    if opcode.name in ("BINGET", "LONG_BINGET") or (memos and _pushes_one(opcode) and chooser.random() < 0.4):
        return b"j" + struct.pack("<I", chooser.choice(memos) if memos else 0)
    kind = chooser.randrange(5)
    if _pushes_one(opcode) or kind == 0:
        instead = chooser.choice(_VALUES) if _pushes_one(opcode) else code
        if chooser.random() < 0.3:  # deeper, one way or another
            instead += chooser.choice(
                (b"\x85", b"]q\xff0\x85", b"\x86" if kind else b"\x85")
            ) * chooser.choice((1, 2, 600))
        return instead
    if kind == 1:
        return code + chooser.choice(_VALUES) + b"0"
    if kind == 2:
        return code + b"0" + chooser.choice(_VALUES)
    if kind == 3:
        return code + code
    same = [
        other.code.encode("latin-1")
        for other in pickletools.opcodes
        if other.arg is None
        and len(other.stack_before) == len(opcode.stack_before)
        and len(other.stack_after) == len(opcode.stack_after)
    ]
    return chooser.choice(same) if same and opcode.arg is None else b""


def _integer(value: int) -> bytes:
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    made = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(made)]) + made


# ------------------------------------------------------------------------------------------------ protocol buffers


def protobuf(chooser: Random, data: bytes) -> bytes:
    """A message of protocol buffers: a field changed, at any depth, with all lengths right."""
    message = _message(data, 0)
    if not message:
        raise ValueError("no message")
    for _ in range(chooser.choice((1, 1, 2, 3))):
        fields = list(_all_fields(message))
        holder, at = chooser.choice(fields)
        row = holder[at]
        match chooser.randrange(8):
            case 0:
                del holder[at]
            case 1:
                holder.insert(at, list(row))
            case 2:
                row[0] = max(number(chooser, row[0]) & 0xFFFF, 1)
            case 3:
                other, there = chooser.choice(fields)
                holder[at] = list(other[there]) if there < len(other) and other is not holder else row
            case _:
                _changed(chooser, row)
        if not message:
            return b""
    return _written(message, 0)


def _changed(chooser: Random, row: list[Any]) -> None:
    kind, value = row[1], row[2]
    if kind == 0:
        row[2] = number(chooser, value) & (1 << 64) - 1
    elif isinstance(value, bytes) and kind == 2 and chooser.random() < 0.7:
        try:
            row[2] = words(chooser, value.decode()).encode(errors="surrogatepass")
        except UnicodeDecodeError:
            row[2] = scrambled(chooser, value)
    elif kind == 2:
        row[2] = chooser.choice((b"", b"\0", b"\xff" * 11, b"\x80" * 9, bytes(100)))
    else:
        row[2] = chooser.choice((b"\0" * 8, b"\xff" * 8, b"\0\0\x80\x7f" * 2, b"\0\0\xc0\x7f" * 2))[
            : len(value)
        ]


def _all_fields(message: list[Any]) -> Iterator[tuple[list[Any], int]]:
    for at, row in enumerate(message):
        yield message, at
        if isinstance(row[2], list):
            yield from _all_fields(row[2])


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(10):
        value |= (data[at + shift] & 0x7F) << 7 * shift
        if data[at + shift] < 0x80:
            return value, at + shift + 1
    raise ValueError("no number")


def _message(data: bytes, depth: int) -> list[Any] | None:
    """Fields [number, wire type, number or bytes or fields]; None where it is no message."""
    rows: list[Any] = []
    at = 0
    try:
        while at < len(data):
            key, at = _varint(data, at)
            kind = key & 7
            if key >> 3 == 0 or kind not in (0, 1, 2, 5):
                return None
            if kind == 0:
                value, at = _varint(data, at)
                rows.append([key >> 3, kind, value])
                continue
            length, at = _varint(data, at) if kind == 2 else ({1: 8, 5: 4}[kind], at)
            if at + length > len(data):
                return None
            content = data[at : at + length]
            inner = _message(content, depth + 1) if kind == 2 and length > 1 and depth < 6 else None
            rows.append([key >> 3, kind, inner or content])
            at += length
    except (IndexError, ValueError):
        return None
    return rows


def _written(message: list[Any], depth: int) -> bytes:
    made = bytearray()
    for tag, kind, value in message:
        made += _encoded(tag << 3 | kind)
        if kind == 0:
            made += _encoded(value)
            continue
        content = _written(value, depth + 1) if isinstance(value, list) else value
        made += (_encoded(len(content)) if kind == 2 else b"") + content
    return bytes(made)


def _encoded(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*made, value])
