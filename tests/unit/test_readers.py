"""Raw readers on tiny corpora in their official layouts."""

import bz2
import gzip
import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers import files as lines_reader
from megatron_vlmoe.prepare.readers import text as text_reader
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.pair_formats import read_pairs
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.records import CaptionedImage, ImageFile, PassedOver, Reject
from megatron_vlmoe.prepare.readers.tables import column_names, read_columns
from megatron_vlmoe.prepare.readers.text import TextInput, read_text


def texts(*paths: Path, **options: Any) -> list[tuple[str, int, bytes] | Reject]:
    found: list[tuple[str, int, bytes] | Reject] = []
    for block in read_text(TextInput(tuple(map(str, paths)), **options)):
        if isinstance(block, Reject):
            found.append(block)
        else:
            name = os.path.basename(block.source)
            found += [(name, n, p) for n, p in zip(block.numbers, block.payloads, strict=True)]
    return found


def test_lines_are_numbered_and_blank_ones_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\n  \r\ntwo\r\nthree")
    assert texts(path) == [("a.txt", 1, b"one"), ("a.txt", 4, b"two"), ("a.txt", 5, b"three")]


def test_blank_lines_separate_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\none\ntwo\n\n\nthree\n")
    found = texts(path, documents="blank-line")
    assert found == [("a.txt", 2, b"one\ntwo"), ("a.txt", 6, b"three")]


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress)])
def test_compressed_text_and_its_damage(tmp_path: Path, suffix: str, compress: Any) -> None:
    whole, cut = tmp_path / f"a.txt{suffix}", tmp_path / f"b.txt{suffix}"
    data = compress(b"\n".join(b"%d" % (i * 7919) for i in range(100_000)))
    whole.write_bytes(data)
    cut.write_bytes(data[: len(data) // 2])
    assert texts(whole)[1] == (whole.name, 2, b"7919")
    assert len(texts(whole)) == 100_000
    damaged = texts(cut)[-1]
    assert isinstance(damaged, Reject) and "unreadable" in damaged.reason


def test_endless_line_is_rejected_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (lines_reader, text_reader):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(lines_reader, "_SKIP_BYTES", 64)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" + b"x" * 5000 + b"\nthree\n" + b"y" * 999 + b"\n")
    first, second, third, fourth = texts(path)
    assert (first, third) == (("a.txt", 1, b"one"), ("a.txt", 3, b"three"))
    assert isinstance(second, Reject) and second.record == "line 2"
    assert fourth == ("a.txt", 4, b"y" * 999)
    joined = texts(path, documents="blank-line")
    assert [type(item) for item in joined] == [Reject, Reject]  # the line, then the document


def test_format_by_suffix_and_parquet_column(tmp_path: Path) -> None:
    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text('{"text": "x"}\n')
    column = pyarrow.array(["één", None, "two"])
    pyarrow.parquet.write_table(pyarrow.table({"text": column, "n": [1, 2, 3]}), table)
    assert texts(lines, table) == [
        ("a.jsonl", 1, b'{"text": "x"}'),
        ("b.parquet", 0, "één".encode()),
        ("b.parquet", 1, b""),
        ("b.parquet", 2, b"two"),
    ]
    with pytest.raises(DataError, match=r"b\.parquet: no column 'body'; it has text, n"):
        texts(table, text_key="body")
    with pytest.raises(DataError, match=r"b\.parquet: column 'n' holds int64"):
        texts(table, text_key="n")
    with pytest.raises(DataError, match=r"a\.jsonl: not a readable parquet"):
        texts(lines, format="parquet")
    with pytest.raises(DataError, match=r"c\.txt: not found"):
        texts(tmp_path / "c.txt")


def write_table(path: Path, kind: str, table: pyarrow.Table) -> Path:
    """Writes a table as one of the kinds that are read, in batches of two rows."""
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
        return path
    opened = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(path), "wb") as sink, opened(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_tables_are_known_by_their_first_bytes(tmp_path: Path, kind: str) -> None:
    table = pyarrow.table({"n": [1, 2, 3, 4, 5], "text": ["één", None, "two", "3", "4"]})
    path = write_table(tmp_path / "data-00000-of-00001", kind, table)
    expected = ["één".encode(), b"", b"two", b"3", b"4"]
    assert texts(path) == [(path.name, row, text) for row, text in enumerate(expected)]
    assert column_names(str(path)) == ["n", "text"]
    batches = list(read_columns(str(path), {"n": "any", "text": "any"}, 1))
    assert [first for first, _ in batches] == [0, 1, 2, 3, 4]
    assert batches[1][1] == {"n": [2], "text": [None]}
    with pytest.raises(DataError, match=r"00001: no column 'body'; it has n, text"):
        texts(path, text_key="body")
    with pytest.raises(DataError, match=r"00001: column 'n' holds int64"):
        texts(path, text_key="n")
    # Without its end a parquet or IPC file is none; a stream is read up to there.
    path.write_bytes(path.read_bytes()[:-60])
    if kind == "stream":
        *good, bad = texts(path)
        assert good == [(path.name, row, text) for row, text in enumerate(expected[:4])]
        assert isinstance(bad, Reject) and bad.record == "row 4" and "unreadable" in bad.reason
    else:
        with pytest.raises(DataError, match=rf"00001: not a readable .*{kind}"):
            texts(path)


def make_tar(path: Path, members: Mapping[str, bytes], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def images(*paths: Path) -> list[tuple[str, bytes] | Reject]:
    return [
        (item.record, item.read()) if isinstance(item, ImageFile) else item
        for item in read_images(tuple(map(str, paths)))
        if not isinstance(item, PassedOver)
    ]


def test_folders_tars_and_files_in_sorted_order(tmp_path: Path) -> None:
    root = tmp_path / "in"
    for name in ("n02/b.JPEG", "n02/a.JPEG", "n01/x.png", "n01/notes.txt", "n01/._x.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    make_tar(root / "n03.tar", {"t2.jpg": b"2", "t1.jpg": b"11", "t1.json": b"{}"})
    packed = make_tar(tmp_path / "z.tar.gz", {"d/c.webp": b"webp"}, "w:gz")
    (root / "n02" / "loop").symlink_to(root)
    (root / "n04").symlink_to(root / "n01")
    assert images(root, packed, root / "n01" / "x.png") == [
        ("n01/x.png", b"n01/x.png"),
        ("n02/a.JPEG", b"n02/a.JPEG"),
        ("n02/b.JPEG", b"n02/b.JPEG"),
        ("t2.jpg", b"2"),
        ("t1.jpg", b"11"),
        ("n04/x.png", b"n01/x.png"),
        ("d/c.webp", b"webp"),
        ("", b"n01/x.png"),
    ]
    with pytest.raises(DataError, match="neither"):
        images(root / "n01" / "notes.txt")
    with pytest.raises(DataError, match="missing: not found"):
        images(tmp_path / "missing")


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("damage", ["header", "cut", "not a tar"])
def test_damaged_tar_is_one_reject_after_its_good_members(
    tmp_path: Path, suffix: str, damage: str
) -> None:
    members = {f"{i}.jpg": bytes([i]) * 700 for i in range(3)}
    data = bytearray(make_tar(tmp_path / "a.tar", members).read_bytes())
    if damage == "header":
        data[1536 + 100 : 1536 + 140] = b"\xff" * 40
    elif damage == "cut":
        del data[1536 + 200 :]
    else:
        data[:] = b"no tar at all" * 100
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else bytes(data))
    *good, bad = images(path)
    assert good == ([] if damage == "not a tar" else [("0.jpg", bytes(700))])
    assert isinstance(bad, Reject) and "damaged tar" in bad.reason


Pair = tuple[str, list[object]]


def pairs(**options: Any) -> tuple[list[Pair], list[Reject]]:
    """(bytes of the image as text, captions) of each record, and the rejects."""
    good: list[Pair] = []
    bad: list[Reject] = []
    for item in read_pairs(PairInput(**options)):
        if isinstance(item, CaptionedImage):
            good.append((item.image.read().decode(), list(item.captions)))
        elif isinstance(item, Reject):
            bad.append(item)
    return good, bad


def put(path: Path, content: object = None) -> str:
    """Writes JSON, or for an image its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name if content is None else json.dumps(content))
    return str(path)


def test_coco_captions(tmp_path: Path) -> None:
    names = ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg"]
    for name in names:
        put(tmp_path / "train2014" / name)
    notes = [
        {"image_id": 25, "id": 1, "caption": "c"},
        {"image_id": 9, "id": 2, "caption": "a"},
        {"image_id": 9, "id": 3, "caption": "b"},
        {"image_id": 7, "id": 4, "caption": "lost"},
    ]
    files = [{"id": 9, "file_name": names[0]}, {"id": 25, "file_name": names[1]}]
    content = {"images": files, "annotations": notes}
    path = put(tmp_path / "annotations" / "captions_train2014.json", content)
    good, bad = pairs(format="coco", annotations=(path,), images=str(tmp_path))
    assert good == [(names[0], ["a", "b"]), (names[1], ["c"])]
    assert [(r.record, r.reason) for r in bad] == [("annotation 3", "no image with id 7")]
    put(tmp_path / "train2017" / "000000000009.jpg")
    content["images"] = [{"id": 9, "file_name": "000000000009.jpg"}]
    path = put(tmp_path / "captions_train2017.json", content)
    good, _ = pairs(format="coco", annotations=(path,), images=str(tmp_path))
    assert good == [("000000000009.jpg", ["a", "b"])]


def test_karpathy_splits(tmp_path: Path) -> None:
    def entry(name: str, split: str, *raw: str, **more: str) -> dict[str, Any]:
        sentences = [{"raw": r, "tokens": r.split()} for r in raw]
        return {"filename": name, "split": split, "sentences": sentences, **more}

    put(tmp_path / "train2014" / "a.jpg")
    put(tmp_path / "val2014" / "b.jpg")
    put(tmp_path / "val2014" / "c.jpg")
    coco = [
        entry("a.jpg", "train", "one", "two", filepath="train2014"),
        entry("c.jpg", "test", "four", filepath="val2014"),
        entry("b.jpg", "restval", "three", filepath="val2014"),
    ]
    path = put(tmp_path / "dataset_coco.json", {"images": coco})
    options = {"format": "karpathy", "annotations": (path,), "images": str(tmp_path)}
    assert pairs(**options)[0] == [("a.jpg", ["one", "two"]), ("b.jpg", ["three"])]
    assert pairs(**options, splits=("test",))[0] == [("c.jpg", ["four"])]
    with pytest.raises(DataError, match=r"no image of split val; it has restval, test, train"):
        pairs(**options, splits=("val",))
    put(tmp_path / "f" / "d.jpg")
    path = put(tmp_path / "dataset_flickr30k.json", {"images": [entry("d.jpg", "train", "x")]})
    options = {"format": "karpathy", "annotations": (path,), "images": str(tmp_path / "f")}
    assert pairs(**options)[0] == [("d.jpg", ["x"])]


def test_visual_genome_regions(tmp_path: Path) -> None:
    put(tmp_path / "VG_100K" / "1.jpg")
    put(tmp_path / "VG_100K_2" / "12.jpg")
    put(tmp_path / "VG_100K" / "13.jpg")
    put(tmp_path / "VG_100K_2" / "13.jpg")
    content = [
        {"id": i, "regions": [{"image_id": i, "phrase": p, "x": 1} for p in phrases]}
        for i, phrases in ((12, ["a", "b"]), (1, ["c"]), (99, ["d"]), (13, ["e"]))
    ]
    path = put(tmp_path / "region_descriptions.json", content)
    good, bad = pairs(format="visual-genome", annotations=(path,), images=str(tmp_path))
    assert good == [("12.jpg", ["a", "b"]), ("1.jpg", ["c"])]
    assert [r.record for r in bad] == ["image 99", "image 13"]
    assert "no such image file" in bad[0].reason and "several" in bad[1].reason


@pytest.mark.parametrize("layout", ["sbu", "cc3m"])
def test_path_captions(tmp_path: Path, layout: str) -> None:
    put(tmp_path / "images_train" / "00" / "a.jpg")
    put(tmp_path / "images_train" / "01" / "b.jpg")
    content = [["images_train/00/a.jpg", "x"], ["where/01/b.jpg", "y"], ["b.jpg", "y"]]
    content += [["c.jpg", "z"], ["d"]]
    path = put(tmp_path / "annot.json", content)
    good, bad = pairs(format=layout, annotations=(path,), images=str(tmp_path))
    assert good == [("a.jpg", ["x"]), ("b.jpg", ["y"])]
    assert [(r.record, r.reason) for r in bad] == [
        (
            "entry 1 (where/01/b.jpg)",
            f"no such image file: where/01/b.jpg (no folder below {tmp_path} is its folder)",
        ),
        ("entry 3 (c.jpg)", f"no such image file: c.jpg (nowhere below {tmp_path})"),
        ("entry 4", "not [path, caption]"),
    ]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_webdataset(tmp_path: Path, mode: str) -> None:
    members = {
        "000.jpg": b"i0",
        "000.txt": "zéro".encode(),
        "000.json": b'{"caption": "not this"}',
        "001.json": b'{"caption": ["a", "b"], "key": 1}',
        "001.png": b"i1",
        "002.txt": b"no image",
        "003.txt": b"\xff",
        "003.jpg": b"i3",
        "x/004.a.jpg": b"i4",
        "x/004.txt": b"four",
    }
    path = make_tar(tmp_path / f"a.tar{mode[1:].replace(':', '.')}", members, mode)
    good, bad = pairs(format="webdataset", annotations=(str(path),))
    assert good == [("i0", ["zéro"]), ("i1", ["a", "b"]), ("i4", ["four"])]
    assert [(r.record, r.reason) for r in bad] == [
        ("002", "0 images in the sample, not 1"),
        ("003", "003.txt: invalid UTF-8 at byte 0"),
    ]
    assert pairs(format="webdataset", annotations=(), images=str(tmp_path)) == (good, bad)


def test_jsonl_pairs(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    path = tmp_path / "pairs.jsonl"
    rows = [b'{"image": "a.jpg", "caption": "x"}', b"", b'{"image_path": "a.jpg", "captions": [1]}']
    path.write_bytes(b"\n".join([*rows, b'{"image": ', b'{"caption": "\xff"}', b'{"text": "t"}']))
    good, bad = pairs(format="jsonl", annotations=(str(path),), images=str(tmp_path))
    assert good == [("a.jpg", ["x", 1])]  # rows of one image that follow each other
    assert [r.record for r in bad] == ["line 4", "line 5", "line 6"]
    assert [r.reason.split(":")[0] for r in bad] == [
        "invalid JSON",
        "invalid UTF-8 at byte 13",
        "no key image or image_path or file_name or filename or filepath or image_name or jpg or "
        "jpeg or png or webp",
    ]


def test_parquet_pairs(tmp_path: Path) -> None:
    put(tmp_path / "a.jpg")
    rows = {
        "image": [{"bytes": b"raw", "path": "x"}, {"bytes": None, "path": "a.jpg"}, None],
        "text": [["one", "two"], ["three"], ["four"]],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    options = {"format": "parquet", "images": str(tmp_path)}
    good, bad = pairs(annotations=(str(tmp_path / "a.parquet"),), **options)
    assert good == [("raw", ["one", "two"]), ("a.jpg", ["three"])]
    assert [r.record for r in bad] == ["row 2"]
    binary = pyarrow.array([b"ok", b"\xff\xfe"], pyarrow.binary())
    invalid = pyarrow.Array.from_buffers(pyarrow.string(), 2, binary.buffers())
    table = pyarrow.table({"photo": [b"i1", b"i2"], "caption": invalid})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    annotations = (str(tmp_path / "b.parquet"),)
    good, _ = pairs(annotations=annotations, image_key="photo", **options)
    assert good == [("i1", ["ok"]), ("i2", [b"\xff"])]
    with pytest.raises(DataError, match=r"b\.parquet: no column for the image"):
        pairs(annotations=annotations, **options)


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        (pyarrow.date32(), 2**30),
        (pyarrow.timestamp("ns"), 2**40 + 1),
        (pyarrow.timestamp("ms", "No/Where"), 5),
    ],
)
def test_dates_that_python_has_not_are_their_numbers(
    tmp_path: Path, kind: Any, number: int
) -> None:
    column = pyarrow.array([number, None], kind)
    pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
    ((_, values),) = read_columns(str(tmp_path / "a.parquet"), {"a": "any"}, 8)
    assert [type(value) for value in values["a"]] == [int, type(None)]


def test_annotation_files_that_are_not_theirs(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    options = {"annotations": (str(path),), "images": str(tmp_path)}
    path.write_text('[\n{"a": 1},\n{"b" 2}\n]')
    with pytest.raises(DataError, match=r"x\.json:3: invalid JSON"):
        pairs(format="sbu", **options)
    path.write_text('{"images": 3}')
    with pytest.raises(DataError, match=r'x\.json: "images" is missing or not a list'):
        pairs(format="coco", **options)
    with pytest.raises(DataError, match=r"x\.json: not a JSON list"):
        pairs(format="visual-genome", **options)
    path.write_bytes(b'["\xff"]')
    with pytest.raises(DataError, match=r"x\.json: invalid UTF-8 at byte 2"):
        pairs(format="cc3m", **options)
    with pytest.raises(DataError, match=r"nowhere: not a folder"):
        pairs(format="coco", annotations=(str(path),), images=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="needs --images"):
        pairs(format="karpathy", annotations=(str(path),))
