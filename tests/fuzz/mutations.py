"""Files changed: values of what they say, and bytes. Every choice is drawn from a `random.Random`."""

from __future__ import annotations

import copy
import csv
import functools
import io
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

__all__ = [
    "Mutation",
    "csv_text",
    "json_bytes",
    "json_lines",
    "json_text",
    "mutated",
    "parquet",
    "spoiled",
    "tensors",
    "yaml_text",
]

Mutation = Callable[[bytes, Random], bytes]

SCALARS: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, -0.5, 0.5, 1e-320, 1e308, float("inf"), float("nan")),
    *("", "x", "1", "null", "../../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J", "<script>", "=1+1", "x" * 300),
]


def value_of(draw: Random) -> Any:
    """A scalar, or a little list or mapping of scalars."""
    kind = draw.randrange(6)
    if kind == 0:
        return [draw.choice(SCALARS) for _ in range(draw.randrange(4))]
    if kind == 1:
        return {draw.choice(["a", "r", ".."]): draw.choice(SCALARS) for _ in range(draw.randrange(3))}
    return draw.choice(SCALARS)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where values stand in a nested one, itself first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in places(v, (*path, k)))]


def mutated(original: Any, draw: Random) -> Any:
    """JSON with one or two of its values replaced, taken out, exchanged for others of its own, or doubled."""
    value = copy.deepcopy(original)
    for _ in range(draw.randint(1, 2)):
        there = places(value)
        path = draw.choice(there)
        if not path:
            value = value_of(draw) if draw.randrange(10) == 0 else value
            continue
        holder = inside(value, path[:-1])
        kind = draw.randrange(8)
        if kind < 2:
            del holder[path[-1]]
        elif kind == 2:
            holder[path[-1]] = copy.deepcopy(inside(value, draw.choice(there)))
        elif kind == 3 and isinstance(holder, list):
            holder.extend(copy.deepcopy(holder[: 1 + len(holder) // 2]))
        else:
            holder[path[-1]] = value_of(draw)
    return value


def inside(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def spoiled(content: bytes, draw: Random) -> bytes:
    """Bytes changed, cut off or doubled."""
    out = bytearray(content)
    kind = draw.randrange(4)
    if kind == 0 or not out:
        return bytes(out[: draw.randrange(len(out))]) if out else b"\0"
    if kind == 1:
        start = draw.randrange(len(out))
        return bytes(out[:start] + out[start // 2 :])
    for _ in range(draw.randint(1, 8)):
        # Headers stand in front and footers at the end.
        where = draw.choice(
            [draw.randrange(min(64, len(out))), draw.randrange(len(out)), -draw.randint(1, min(64, len(out)))]
        )
        out[where] = draw.randrange(256)
    return bytes(out)


def _or_spoiled(change: Mutation) -> Mutation:
    """What cannot be taken apart any more, because it was spoilt before, is spoilt again."""

    @functools.wraps(change)
    def changed(content: bytes, draw: Random) -> bytes:
        try:
            return change(content, draw)
        except (ArithmeticError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError, struct.error):
            return spoiled(content, draw)
        except (AttributeError, csv.Error, yaml.YAMLError, pa.ArrowException):
            return spoiled(content, draw)

    return changed


@_or_spoiled
def json_text(content: bytes, draw: Random) -> bytes:
    """A JSON file with other values, now and then with other bytes."""
    if draw.randrange(8) == 0:
        return spoiled(content, draw)
    return json_bytes(mutated(json.loads(content), draw))


def json_bytes(value: Any) -> bytes:
    """Also of half surrogates, which JSON can escape and UTF-8 cannot hold."""
    return json.dumps(value).encode()


@_or_spoiled
def json_lines(content: bytes, draw: Random) -> bytes:
    """JSONL of which one line has other values, is doubled, or is spoilt."""
    lines = content.splitlines()
    kind, at = draw.randrange(8), draw.randrange(len(lines))
    if kind == 0:
        return spoiled(content, draw)
    if kind == 1:
        lines.insert(draw.randrange(len(lines)), lines[at])
    elif kind == 2:
        lines[at] = draw.choice([b"", b" ", b"null", b"[" * 5000, b"9" * 5000, b'{"a":' * 5000, b"\xff", b"{}"])
    else:
        lines[at] = json_bytes(mutated(json.loads(lines[at]), draw))
    return b"\n".join(lines)


@_or_spoiled
def yaml_text(content: bytes, draw: Random) -> bytes:
    """A YAML file with other values, as JSON or YAML, or with other bytes."""
    if draw.randrange(4) == 0:
        return spoiled(content, draw)
    value = mutated(yaml.safe_load(content), draw)
    if draw.randrange(2):
        return json_bytes(value)
    return yaml.safe_dump(value, allow_unicode=True).encode(errors="surrogatepass")


@_or_spoiled
def csv_text(content: bytes, draw: Random) -> bytes:
    """A CSV file with other values, lengths of rows, delimiters or encoding, or with other bytes."""
    kind = draw.randrange(8)
    if kind == 0:
        return spoiled(content, draw)
    rows = list(csv.reader(io.StringIO(content.decode())))
    if kind == 1:
        return content.decode().encode(draw.choice(["utf-16", "utf-16-le", "utf-8-sig", "utf-32"]))
    if kind == 2:
        at = draw.randrange(len(content))
        return content[:at] + draw.choice([b'"', b'""', b"\n", b"\r", b",", b";", b"\t", b"\0", b"\xff"]) + content[at:]
    text = io.StringIO(newline="")
    dialect = {"delimiter": draw.choice(",;\t"), "lineterminator": draw.choice(["\n", "\r\n", "\r"])}
    csv.writer(text, **dialect).writerows(v if isinstance(v, list) else [v] for v in mutated(rows, draw))
    return text.getvalue().encode(errors="surrogatepass")


@_or_spoiled
def tensors(content: bytes, draw: Random) -> bytes:
    """safetensors with another header, or other bytes."""
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kind = draw.randrange(4)
    if kind == 0:
        return spoiled(content, draw)
    if kind == 1:  # numbers alone
        data = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(data) // 4) * 4
            data[at : at + 4] = struct.pack("<f", draw.choice([0.0, 1e38, float("nan"), float("inf"), 1e-45]))
        data = bytes(data)
    else:
        names = list(header)
        name = draw.choice(names)
        if draw.randrange(3) == 0:
            header[draw.choice(["x", "a" * 5000, f"{name}.x", name.upper(), ""])] = header.pop(name)
        else:
            header = mutated(header, draw)
    text = json_bytes(header)
    return struct.pack("<Q", len(text) + draw.choice([0, 0, 0, 1, -1])) + text + data


@_or_spoiled
def parquet(content: bytes, draw: Random) -> bytes:
    """A table with other metadata, columns or values, or other bytes."""
    if draw.randrange(2):
        return spoiled(content, draw)
    table = pq.read_table(pa.BufferReader(content))
    kind = draw.randrange(4)
    if kind == 0 and table.schema.metadata:
        known = {k: v for k, v in table.schema.metadata.items() if k != b"ARROW:schema"}
        key = draw.choice(list(known) or [b"x"])
        try:
            new = json_bytes(mutated(json.loads(known.get(key, b"null")), draw))
        except ValueError:
            new = b"x"
        table = table.replace_schema_metadata({**known, key: new})
    elif kind == 1:
        table = table.drop_columns([draw.choice(table.column_names)])
    elif kind == 2:
        at = draw.randrange(table.num_columns)
        other = draw.choice([pa.int64(), pa.string(), pa.float64()])
        values = [draw.choice([None, 0, 1, -1, 10**15])] * table.num_rows
        column = pa.array([None if v is None else str(v) if other == pa.string() else v for v in values], other)
        table = table.set_column(at, table.column_names[at], column)
    else:
        start = draw.randrange(table.num_rows + 1)
        table = pa.concat_tables([table.slice(start), table.slice(0, draw.randrange(table.num_rows + 1))])
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()
