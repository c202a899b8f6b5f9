"""Damage to files: bytes anywhere, and what keeps a format's shape but not its meaning.

All of it is drawn from one `random.Random`, so a case is made again from its seed and the files that it starts from.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

LARGEST = 1 << 20
"""No file of a case grows beyond this."""

INTEGERS = (
    *(0, 1, 2, 3, 7, 127, 128, 255, 256, 1000, 32767, 65535, 65536, 2**24, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1),
    *(-1, -2, -8, -128, -(2**15), -(2**31), -(2**63)),
)
TOKENS = (
    *(b"\0", b"\n", b"\r\n", b"\r", b"\t", b'"', b"'", b",", b"|", b"\\", b"#0\t", b"://", b"../"),
    *(b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x80\xa8"),
    *(b"{", b"}", b"[", b"]", b"[[[[", b"null", b"NaN", b"-Infinity", b"1e999", b'"\\ud800"'),
    *(b"&a ", b"*a", b"!!python/object/apply:os.abort []", b"!!binary x", b"!!timestamp ", b"<<: "),
    *(b"2001-99-99", b"0x", b"1_0", b"12:30:45", b"? ", b": ", b"- ", b"%YAML 9.9\n---\n", b"--- "),
    *(b"!!set ", b"!!omap ", b"!!int x", b"!!float x", b"~", b"@", b"`", b"{{ 7*7 }}", b"<script>"),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, -(2**64), 10**30, 1e308, 1e-320, 0.5),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "x", "0", "-1", "nan", "\0", "\ud800"),
    *(
        "\u2028",
        "a\nb",
        "../../x",
        "/dev/zero",
        "/",
        ".",
        "file:///x",
        "http://x/y.jpg",
        "http://[x",
    ),
    *("x" * 5000, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "x"], [0] * 300),
)


class Pairs(list[tuple[str, Any]]):
    """A JSON object as its keys and values, which may have a key twice."""


def damaged(rng: random.Random, name: str, data: bytes, others: Sequence[bytes]) -> bytes:
    """A file after one to four changes.

    Args:
        rng: what they are drawn from.
        name: of the file; its suffix says of which format it is.
        data: its content.
        others: contents that a part may be taken from.
    """
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        change = _CHANGES.get(_suffix(name))
        if change is None or rng.random() < 0.4:
            data = _bytes(rng, data, others)
        else:
            try:
                data = change(rng, data)
            except Exception:  # what was changed before may have no shape any more
                data = _bytes(rng, data, others)
        data = data[:LARGEST]
    return data


def _suffix(name: str) -> str:
    base = name.rpartition("/")[2]
    return ".zip" if base == "common.pt" else "." + base.rpartition(".")[2]


# ---- bytes


def _bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    if not data:
        return rng.choice(TOKENS)
    content, size = bytearray(data), len(data)
    # The beginning of a file says most about the rest.
    place = min(int(rng.random() ** rng.choice((1, 1, 3)) * size), size - 1)
    end = min(size, place + rng.choice((1, 2, 4, 8, 16, 64, 1000)))
    kind = rng.randrange(10)
    if kind == 0:
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        content[place] = rng.randrange(256)
    elif kind == 2:
        del content[place:]
    elif kind == 3:
        del content[place:end]
    elif kind == 4:
        content[place:place] = content[place:end] * rng.choice((1, 1, 2, 20))
    elif kind == 5:
        content[place:place] = rng.choice(TOKENS)
    elif kind == 6:
        number, width = rng.choice(INTEGERS), rng.choice((1, 2, 4, 8))
        order = rng.choice(("little", "big"))
        content[place : place + width] = (number % (1 << 8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
    elif kind == 7:
        other = rng.choice(others) if others else data
        start = rng.randrange(len(other) + 1)
        content[place:end] = other[start : start + rng.choice((1, 8, 64, 1000))]
    elif kind == 8:
        # Whatever number stands in text there.
        while place < size and not chr(content[place]).isdigit():
            place += 1
        content[place : place + 1] = str(rng.choice(INTEGERS)).encode()
    else:
        content[place:end] = bytes(rng.randrange(256) for _ in range(end - place))
    return bytes(content)


# ---- JSON


def _parsed(text: str) -> Any:
    return json.loads(text, object_pairs_hook=Pairs)


def _written(value: Any) -> str:
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(k)}: {_written(v)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, bytes):  # written as it is
        return value.decode()
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, int]]:
    """Every value below one, by its container and its number in there."""
    found: list[tuple[Any, int]] = []
    todo = [value]
    while todo:
        container = todo.pop()
        for number, item in enumerate(container):
            inner = item[1] if isinstance(container, Pairs) else item
            found.append((container, number))
            if isinstance(inner, list):
                todo.append(inner)
    return found


def _odd(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        depth = rng.choice((10, 500, 20_000))
        return rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth + b"0" + b"}" * depth))
    if rng.random() < 0.05:
        return b"9" * rng.choice((30, 400, 5000))
    value = rng.choice(ODD_VALUES)
    return Pairs(value.items()) if isinstance(value, dict) else value


def _change_tree(rng: random.Random, value: Any) -> Any:
    places = _places(value) if isinstance(value, list) else []
    if not places or rng.random() < 0.03:
        return rng.choice((_odd(rng), [value], Pairs([("x", value)])))
    container, number = rng.choice(places)
    is_object = isinstance(container, Pairs)
    key, old = container[number] if is_object else ("", container[number])
    kind = rng.randrange(9)
    if kind == 0:
        del container[number]
    elif kind == 1:
        container.append(container[number])
    elif kind == 2 and is_object:
        container.append((key, _odd(rng)))  # twice the same key
    elif kind == 3 and is_object:
        container[number] = (rng.choice(("", "x", key.upper(), "\ud800", key + "\n")), old)
    elif kind == 4:
        other, place = rng.choice(places)
        new = other[place][1] if isinstance(other, Pairs) else other[place]
        if not isinstance(new, list) or len(_places(new)) < 50:
            container[number] = (key, _parsed(_written(new))) if is_object else new
    elif kind == 5:
        container[:] = container[:number]
    else:
        new = _odd(rng)
        if kind == 6:
            new = rng.choice(([old], str(old)[:200], Pairs([("a", old)]), [old, old]))
        container[number] = (key, new) if is_object else new
    return value


def _json(rng: random.Random, data: bytes) -> bytes:
    return _written(_change_tree(rng, _parsed(data.decode()))).encode()


def _json_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    kind = rng.randrange(6)
    if kind == 0:
        lines.insert(number, rng.choice(lines))
    elif kind == 1:
        lines[number] = rng.choice(TOKENS)
    else:
        lines[number] = _json(rng, lines[number])
    return b"\n".join(lines)


def _yaml(rng: random.Random, data: bytes) -> bytes:
    import yaml

    if b"&a" in data:
        raise ValueError("has aliases, which would be written out")
    if rng.random() < 0.1:
        # Every name stands for nine of the one before.
        levels = rng.choice((3, 9, 30))
        rows = ["a0: &a0 [x, x, x]"]
        rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
        return data + b"\n" + "\n".join(rows).encode() + f"\nmoe: *a{levels - 1}\n".encode()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    tree = _parsed(json.dumps(yaml.load(data, loader), default=str))
    return _written(_change_tree(rng, tree)).encode()


# ---- tables


def _delimited(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    number = rng.randrange(len(lines))
    separator = next((one for one in (b"\t", b"|", b",") if one in lines[0]), b"\t")
    cells = lines[number].split(separator)
    place = rng.randrange(len(cells))
    odd = str(rng.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
    kind = rng.randrange(8)
    if kind == 0:
        del cells[place]
    elif kind == 1:
        cells.insert(place, odd)
    elif kind == 2:
        cells[place] = b'"' + cells[place]
    elif kind == 3:
        cells[place] = b'"' + cells[place] + b"\n" + odd + b'"'
    elif kind == 4:
        rng.shuffle(cells)
    elif kind == 5:
        cells[place] = rng.choice(TOKENS)
    else:
        cells[place] = odd
    lines[number] = separator.join(cells)
    return b"\n".join(lines)


def _odd_columns(rng: random.Random, count: int) -> Any:
    import pyarrow as pa

    values, kind = [rng.choice(ODD_VALUES[:14]) for _ in range(count)], rng.randrange(12)
    numbers = [rng.choice((0, 1, -1, 5, 2**31 - 1)) for _ in range(count)]
    if kind == 0:
        return pa.array([None] * count)
    if kind == 1:
        return pa.array(numbers, pa.int32())
    if kind == 2:
        return pa.array([float(v or 0) for v in values])
    if kind == 3:
        return pa.array([[str(v)] * rng.randrange(3) for v in values])
    if kind == 4:
        return pa.array([{"bytes": b"x", "path": None} for _ in values])
    if kind == 5:
        return pa.array([rng.randbytes(5) for _ in values], pa.binary())
    if kind == 6:
        return pa.array(numbers, pa.int64()).cast(pa.timestamp("us"))
    if kind == 7:
        return pa.array([str(v) for v in values]).dictionary_encode()
    if kind == 8:
        # Says that it is UTF-8, and is not.
        raw = pa.array([rng.randbytes(4) for _ in values], pa.binary())
        return pa.Array.from_buffers(pa.string(), count, raw.buffers())
    if kind == 9:
        return pa.array([None if v is None else str(v) for v in values], pa.large_string())
    if kind == 10:
        return pa.array([{"raw": [str(v)]} for v in values])
    return pa.array([bool(v) for v in values])


def _table(rng: random.Random, data: bytes) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = pa.BufferReader(data)
    if data[:4] == b"PAR1":
        table = pq.ParquetFile(source).read(use_threads=False)
    elif data[:6] == b"ARROW1":
        table = pa.ipc.open_file(source).read_all()
    else:
        table = pa.ipc.open_stream(source).read_all()
    table.validate(full=True)  # what is damaged already would end this process
    place = rng.randrange(table.num_columns)
    name, kind = table.schema.names[place], rng.randrange(8)
    if kind == 0:
        table = table.remove_column(place)
    elif kind == 1:
        table = table.rename_columns(
            [rng.choice((n, "", "text", "image", "caption", "split")) for n in table.schema.names]
        )
    elif kind == 2:
        table = table.slice(0, 0)
    elif kind == 3:
        table = table.replace_schema_metadata({"huggingface": rng.choice(TOKENS)})
    elif kind == 4:
        table = table.append_column(name, _odd_columns(rng, table.num_rows))
    else:
        table = table.set_column(place, name, _odd_columns(rng, table.num_rows))
    sink = io.BytesIO()
    where = rng.randrange(3)
    if where == 0:
        pq.write_table(table, sink, row_group_size=rng.choice((1, 2, 100)))
    elif where == 1:
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


# ---- archives


def _tar(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.08:
        return rng.choice((gzip.compress, bz2.compress, lzma.compress))(data)
    members: list[tuple[tarfile.TarInfo, bytes]] = []
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            members.append((member, b"" if file is None else file.read()))
    number = rng.randrange(len(members))
    info, content = members[number]
    lie, kind = 0, rng.randrange(6)
    if kind == 0:
        lie = rng.choice((1, -1, 512, 10**6, 2**33, 2**62))
    elif kind == 1:
        members.insert(rng.randrange(len(members)), (info, content))
    elif kind == 2:
        rng.shuffle(members)
    else:
        change = _odd_header if kind < 5 else _odd_content
        members[number] = info, change(rng, info, content, data)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=rng.choice((0, 1, 2))) as archive:
        for place, (one, inside) in enumerate(members):
            one.size = len(inside)
            if lie and place == number:
                one.size = max(0, one.size + lie)
                sink.write(one.tobuf(format=rng.choice((1, 2))) + inside)
                archive.offset = sink.tell()
            else:
                archive.addfile(one, io.BytesIO(inside))
    return sink.getvalue()


def _odd_header(rng: random.Random, info: tarfile.TarInfo, content: bytes, tar: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        info.type = rng.choice([bytes([c]) for c in b"1234567SLKxgZ"])
        info.linkname = rng.choice((info.name, "x", "../x", "/etc/hostname", ""))
    elif kind == 1:
        info.name = rng.choice(
            ("", "/", "../x.jpg", "/x.jpg", "a/../../x.png", ".", "x" * 300 + ".jpg", "\udcff.jpg")
        )
    elif kind == 2:
        names = ("size", "path", "linkpath", "mtime", "GNU.sparse.map", "GNU.sparse.size")
        info.pax_headers = {rng.choice(names): rng.choice(("-1", "x", "9" * 30, "1,2,3", "0,0"))}
    elif kind == 3:
        info.name = info.name.rpartition(".")[0] + rng.choice((".json", ".txt", ".png", ".tar", ""))
    else:
        info.mtime, info.mode = rng.choice((-1, 2**40)), rng.choice((0, 0o7777))
    return content


def _odd_content(rng: random.Random, info: tarfile.TarInfo, content: bytes, tar: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        info.name = "inner.tar"
        return tar
    if kind == 1:
        info.name = "inner.tar.gz"
        return gzip.compress(tar, 1)
    return _json(rng, content) if info.name.endswith(".json") else _bytes(rng, content, ())


def _zip(rng: random.Random, data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    number = rng.randrange(len(members))
    if rng.random() < 0.7:  # what is in there is said by the pickle
        number = next(
            (n for n, (i, _) in enumerate(members) if i.filename.endswith(".pkl")), number
        )
    info, content = members[number]
    kind = rng.randrange(6)
    if kind == 0:
        del members[number]
    elif kind == 1:
        members.append((info, content))
    elif kind == 2:
        info.filename = rng.choice(("x", "../x", info.filename + "x", info.filename.upper()))
    else:
        for _ in range(rng.choice((1, 2, 5))):
            content = _bytes(rng, content, ())
        members[number] = info, content
    sink = io.BytesIO()
    warnings.filterwarnings("ignore", "Duplicate name", UserWarning)
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(sink, "w", method) as archive:
        for one, inside in members:
            one.compress_type = method
            archive.writestr(one, inside)
    return sink.getvalue()


def _safetensors(rng: random.Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    header = _json(rng, data[8 : 8 + size])
    told = len(header) if rng.random() < 0.8 else rng.choice(INTEGERS) % 2**64
    return struct.pack("<Q", told) + header + data[8 + size :]


# ---- pictures


def _png(rng: random.Random, data: bytes) -> bytes:
    """Changes a chunk and writes the checksum that goes with it."""
    place, chunks = 8, []
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    number = rng.randrange(len(chunks))
    kind, content = chunks[number]
    if rng.random() < 0.3:
        kind = rng.choice((b"IHDR", b"PLTE", b"tRNS", b"iTXt", b"zTXt", b"eXIf", b"acTL", b"fdAT"))
    chunks.insert(number + rng.randrange(2), (kind, _bytes(rng, content, ())))
    if rng.random() < 0.7:
        del chunks[min(number + 1, len(chunks) - 1)]
    return data[:8] + b"".join(
        struct.pack(">I", len(inside))
        + name
        + inside
        + struct.pack(">I", zlib.crc32(name + inside))
        for name, inside in chunks
    )


def _compressed(rng: random.Random, data: bytes) -> bytes:
    """Changes what was compressed; or compresses zeros, which are many times as long."""
    if rng.random() < 0.02:
        return _zeros(rng.choice((1 << 20, 40 << 20)))
    return gzip.compress(_json_lines(rng, gzip.decompress(data)), 1)


@functools.cache
def _zeros(size: int) -> bytes:
    return gzip.compress(bytes(size), 1)


_CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    **{".json": _json, ".jsonl": _json_lines, ".yaml": _yaml, ".gz": _compressed},
    **{".tsv": _delimited, ".csv": _delimited, ".token": _delimited, ".parquet": _table},
    **{".arrow": _table, ".tar": _tar, ".pt": _zip, ".pth": _zip, ".zip": _zip, ".png": _png},
    ".safetensors": _safetensors,
}
