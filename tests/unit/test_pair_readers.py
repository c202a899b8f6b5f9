"""Lists of captioned images as people hold them: which picture a caption gets, splits, layouts, counts."""

import json
import os
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from data_files import encoded, picture, rejects_of, tool

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.prepare.readers.images import ImageFinder, NoImageError
from megatron_vlmoe.prepare.readers.pair_formats import read_pairs
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.records import CaptionedImage, LeftOut, Reject

Pair = tuple[str, list[object]]


def files(folder: Path, *names: str) -> None:
    """Files that hold their own path below the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def written(path: Path, content: object) -> str:
    """Writes text as it is and anything else as JSON."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def read(format: str, annotations: str, **options: Any) -> tuple[list[Pair], list[tuple[str, str]]]:
    """(content of the image, captions) of each image; (record, reason) of each reject."""
    good: list[Pair] = []
    bad: list[tuple[str, str]] = []
    for item in read_pairs(PairInput(format, (annotations,), **options)):
        if isinstance(item, CaptionedImage):
            good.append((item.image.read().decode(), list(item.captions)))
        elif isinstance(item, Reject):
            assert item.source == annotations
            bad.append((item.record, item.reason))
    return good, bad


# Below the folder lie 0001/17.jpg and 0002/17.jpg of images_train, and 0000/1.jpg twice.
LOOKED_UP = [
    ("images_train/0001/17.jpg", "images_train/0001/17.jpg"),
    ("./images_train//0001/../0001/17.jpg", "images_train/0001/17.jpg"),
    ("images_train\\0001\\17.jpg", "images_train/0001/17.jpg"),
    ("C:\\old\\images_train\\0001\\17.jpg", "images_train/0001/17.jpg"),
    ("/old/disk/images_train/0001/17.jpg", "images_train/0001/17.jpg"),
    ("../images_train/0001/17.jpg", "images_train/0001/17.jpg"),
    ("file:///old/images_train/0001/17.jpg", "images_train/0001/17.jpg"),
    ("0001/17.jpg", "images_train/0001/17.jpg"),
    ("3.jpg", "images_val/0000/3.jpg"),
    ("images_train/0000/17.jpg", "no such image file"),
    ("old/images_train/0000/17.jpg", "no such image file"),
    ("0003/17.jpg", "no such image file"),
    ("images_test/0001/17.jpg", "no such image file"),
    ("images_train/0001/17.JPG", "no such image file"),
    ("0000/1.jpg", "several image files"),
    ("17.jpg", "several image files"),
    ("4.jpg", "no such image file"),
    ("images_train/0001", "no such image file"),
    ("https://host/0001/17.jpg", "is a URL"),
    ("", "is empty"),
]


@pytest.mark.parametrize(("listed", "expected"), LOOKED_UP)
def test_the_longest_path_suffix_decides(tmp_path: Path, listed: str, expected: str) -> None:
    names = ["images_train/0001/17.jpg", "images_train/0002/17.jpg", "images_val/0000/3.jpg"]
    files(tmp_path, *names, "images_train/0000/1.jpg", "images_val/0000/1.jpg")
    finder = ImageFinder(str(tmp_path))
    if expected.startswith("images"):
        assert Path(finder.find(listed)).read_text() == expected
    else:
        with pytest.raises(NoImageError, match=expected):
            finder.find(listed)


@pytest.mark.parametrize("order", [1, -1])
def test_folders_of_the_list_are_never_taken_for_one_another(tmp_path: Path, order: int) -> None:
    files(tmp_path, "images_train/0000/17.jpg")
    path = str(tmp_path / "images_train" / "0000" / "17.jpg")
    finder = ImageFinder(str(tmp_path / "images_train"))
    # Ways to name one folder; none says of it what another denies.
    for listed in (
        "images_train/0000/17.jpg",
        "0000/17.jpg",
        "/old/images_train/0000/17.jpg",
        path,
    ):
        assert finder.find(listed) == path
    finder = ImageFinder(str(tmp_path / "images_train"))
    first, second = ["images_train/0000/17.jpg", "images_val/0000/17.jpg"][::order]
    assert finder.find(first) == path
    with pytest.raises(
        DataError, match="0000: images_.*/0000 and images_.*/0000 of the list may both"
    ):
        finder.find(second)


def list_of(layout: str, folder: Path, rows: list[tuple[str, str]]) -> str:
    """A list of paths and captions in one of the layouts that name images by paths."""
    path = folder / "list"
    objects = [{"image": image, "caption": caption} for image, caption in rows]
    if layout in ("parquet", "arrow"):
        columns = {name: [row[name] for row in objects] for name in ("image", "caption")}
        return write_table(path, layout, columns)
    contents: Mapping[str, object] = {
        "sbu": [list(row) for row in rows],
        "albef": objects,
        "jsonl": "".join(json.dumps(row) + "\n" for row in objects),
        "csv": "filepath\ttitle\n" + "".join(f"{image}\t{caption}\n" for image, caption in rows),
        "flickr30k": "".join(f"{image}#0\t{caption}\n" for image, caption in rows),
        "karpathy": {
            "images": [
                {
                    "filename": Path(image).name,
                    "filepath": str(Path(image).parent),
                    "split": "train",
                }
                | {"sentences": [{"raw": caption}]}
                for image, caption in rows
            ]
        },
        "coco": {
            "images": [{"id": i, "file_name": image} for i, (image, _) in enumerate(rows)],
            "annotations": [
                {"image_id": i, "caption": caption} for i, (_, caption) in enumerate(rows)
            ],
        },
    }
    return written(path, contents[layout])


def write_table(path: Path, kind: str, columns: Mapping[str, object]) -> str:
    table = pyarrow.table(columns)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink:
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return str(path)


LAYOUTS = ["sbu", "albef", "jsonl", "csv", "flickr30k", "karpathy", "coco", "parquet", "arrow"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_picture_is_a_reject_in_every_layout(tmp_path: Path, layout: str) -> None:
    files(tmp_path, "images_train/0001/17.jpg")
    rows = [("images_train/0000/17.jpg", "a cat"), ("/old/images_train/0001/17.jpg", "a drop")]
    good, bad = read("auto", list_of(layout, tmp_path, rows), images=str(tmp_path))
    assert good == [("images_train/0001/17.jpg", ["a drop"])]
    ((record, reason),) = bad
    assert reason.startswith("no such image file: images_train/0000/17.jpg")
    assert "0000/17.jpg" in record or record.split()[0] in ("line", "row", "entry")


@pytest.mark.parametrize("layout", [*LAYOUTS, "visual-genome", "webdataset", "files"])
def test_splits_are_taken_or_refused(tmp_path: Path, layout: str) -> None:
    files(tmp_path, "a.jpg")
    path = list_of(layout, tmp_path, [("a.jpg", "x")]) if layout in LAYOUTS else str(tmp_path)
    message = "--split means nothing|no column 'split'|no image of split test"
    with pytest.raises(DataError, match=message):
        read(layout, path, images=str(tmp_path), splits=("test",))


def divided(layout: str, folder: Path) -> str:
    """Five rows: train, test, val, one without a split, and train again."""
    splits = ["train", "test", "val", None, "train"]
    rows = [{"image": "a.jpg", "caption": f"c{i}", "split": s} for i, s in enumerate(splits)]
    path = folder / "list"
    if layout in ("parquet", "arrow"):
        return write_table(path, layout, {key: [row[key] for row in rows] for key in rows[0]})
    if layout == "albef":
        return written(path, rows)
    if layout == "jsonl":
        return written(path, "".join(json.dumps(row) + "\n" for row in rows))
    lines = [",".join(str(value or "") for value in row.values()) for row in rows]
    return written(path, "\n".join(["image,caption,split", *lines]))


@pytest.mark.parametrize("layout", ["albef", "jsonl", "csv", "parquet", "arrow"])
def test_rows_of_other_splits_are_left_out(tmp_path: Path, layout: str) -> None:
    files(tmp_path, "a.jpg")
    path = divided(layout, tmp_path)
    options: dict[str, Any] = {"images": str(tmp_path)}
    # Unasked, train and restval, and what names no split; never test.
    assert read(layout, path, **options) == ([("a.jpg", ["c0", "c3", "c4"])], [])
    items = list(read_pairs(PairInput(layout, (path,), **options)))
    left_out = Counter(item.reason for item in items if isinstance(item, LeftOut))
    assert left_out == {"split test": 1, "split val": 1}
    good, bad = read(layout, path, splits=("test", "val"), **options)
    assert good == [("a.jpg", ["c1", "c2"])]
    assert [reason for _, reason in bad] == ["names no split (key split)"]
    with pytest.raises(DataError, match=r"list: no image of split dev; it has test, train, val"):
        read(layout, path, splits=("dev",), **options)
    with pytest.raises(DataError, match="split"):
        read(layout, path, splits=("train",), split_key="part", **options)


def test_a_table_of_another_split_alone_is_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg")
    rows = '{"image": "a.jpg", "caption": "x", "split": "test"}\n'
    with pytest.raises(DataError, match="no image of split train, restval; it has test: choose"):
        read("jsonl", written(tmp_path / "list", rows), images=str(tmp_path))


def test_ids_that_come_twice_are_named(tmp_path: Path) -> None:
    files(tmp_path, "a/1.jpg", "b/1.jpg", "c.jpg", "VG_100K/5.jpg", "VG_100K/6.jpg")
    images = [
        {"id": 1, "file_name": "a/1.jpg"},
        {"id": 1, "file_name": "b/1.jpg"},
        {"id": "2", "file_name": "c.jpg"},
        {"file_name": "c.jpg"},
    ]
    notes = [{"image_id": 1, "caption": "x"}, {"image_id": 2, "caption": "y"}, {"caption": "z"}]
    path = written(tmp_path / "coco", {"images": images, "annotations": notes})
    reason = (
        "id 1 comes 2 times, so its captions may be of any: image 0 (a/1.jpg), image 1 (b/1.jpg)"
    )
    assert read("auto", path, images=str(tmp_path)) == (
        [("c.jpg", ["y"])],
        [
            ("annotation 2", "no image_id or no caption"),
            ("image 0", reason),
            ("image 1", reason),
            ("image 3", "c.jpg has no id"),
        ],
    )
    regions = [
        {"id": 5, "regions": [{"image_id": 5, "phrase": "x"}]},
        {"id": 6, "regions": [{"image_id": 6, "phrase": "y"}, {"image_id": 7, "phrase": "z"}]},
        {"id": 5, "regions": [{"image_id": 5, "phrase": "w"}]},
    ]
    path = written(tmp_path / "vg", regions)
    assert read("auto", path, images=str(tmp_path)) == (
        [("VG_100K/6.jpg", ["y"])],
        [
            ("image 5", "this image id comes 2 times (here in entry 0)"),
            ("image 6, region 1", "a region of image 7"),
            ("image 5", "this image id comes 2 times (here in entry 2)"),
        ],
    )
    entries = [
        {"filename": "c.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "x"}]},
        {"filename": "c.jpg", "imgid": 1, "split": "train", "sentences": [{"raw": "y"}]},
        {
            "filename": "a/1.jpg",
            "imgid": 2,
            "split": "train",
            "sentences": [{"raw": "z", "imgid": 2}, {"raw": "w", "imgid": 3}],
        },
    ]
    path = written(tmp_path / "karpathy", {"images": entries})
    assert read("auto", path, images=str(tmp_path)) == (
        [("a/1.jpg", ["z"])],
        [
            ("image 1 (c.jpg)", "the same file as image 0 (split test)"),
            ("image 2 (a/1.jpg), caption 1", "of image 3, in the entry of 2 (imgid)"),
        ],
    )


def test_albef_lists(tmp_path: Path) -> None:
    files(tmp_path, "val2014/1.jpg", "val2014/2.jpg")
    rows = [
        {"caption": "a", "image": "val2014/1.jpg", "image_id": "coco_1"},
        {"caption": "b", "image": "val2014/1.jpg", "image_id": "coco_1"},
        {"image": "/export/coco/val2014/2.jpg", "caption": ["c", "d"]},
        {"image": "val2014/2.jpg", "question": "what", "answer": ["e"]},
        "x",
    ]
    good, bad = read("auto", written(tmp_path / "list", rows), images=str(tmp_path))
    assert good == [("val2014/1.jpg", ["a", "b"]), ("val2014/2.jpg", ["c", "d"])]
    assert [record for record, _ in bad] == ["entry 3", "entry 4"]
    assert bad[0][1].startswith("no key caption or ") and bad[0][1].endswith(
        "image, question, answer"
    )
    urls = [{"url": "http://h/1.jpg", "caption": "a"}]
    with pytest.raises(DataError, match=r"list: entry 0 lists URLs: download the images first"):
        read("albef", written(tmp_path / "list", urls), images=str(tmp_path))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("filepath\ttitle\na.jpg\tone, two\n", {}),
        ('filepath,title\na.jpg,"one, two"\n', {}),
        ('"filepath","title"\n"a.jpg","one, two"\n', {}),
        ("photo;words\na.jpg;one, two\n", {"image_key": "photo", "caption_key": "words"}),
        ("image|caption;s\na.jpg|one, two\n", {"separator": "|", "caption_key": "caption;s"}),
        ("\ufeffimage_name| comment_number| comment\na.jpg| 0| one, two\n", {}),
    ],
)
def test_csv_and_its_separators(tmp_path: Path, text: str, options: dict[str, Any]) -> None:
    files(tmp_path, "a.jpg")
    path = written(tmp_path / "list", text)
    good, bad = read("auto", path, images=str(tmp_path), **options)
    assert not bad
    assert [(image, [str(c).strip() for c in captions]) for image, captions in good] == [
        ("a.jpg", ["one, two"])
    ]


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg")
    path = tmp_path / "list"
    text = 'filepath\ttitle\na.jpg\tone\na.jpg\ntwo\tx\ty\n\na.jpg\t"l1\tx\nl2\ty"\na.jpg\t"open\na.jpg\tz\n'
    path.write_bytes(text.encode() + b'"\na.jpg\t\xff\n')
    good, bad = read("csv", str(path), images=str(tmp_path))
    assert good == [("a.jpg", ["one", "l1\tx\nl2\ty", "\udcff"])]  # the last is no caption, as \xff
    assert bad == [
        ("line 3", "1 columns, not the 2 of the first line"),
        ("line 4", "3 columns, not the 2 of the first line"),
        ("line 8 to 10", "a quotation mark that is not closed takes in what follows"),
    ]
    with pytest.raises(DataError, match=r"list: no column for the image or the caption among a, b"):
        read("csv", written(path, "a\tb\n"), images=str(tmp_path))


def test_flickr30k_lists(tmp_path: Path) -> None:
    files(tmp_path, "1.jpg", "2.jpg")
    path = written(tmp_path / "list", '1.jpg#0\t"a" dog\n1.jpg#1\ta # b\nno tab\n2.jpg#0\tc\n')
    assert read("auto", path, images=str(tmp_path)) == (
        [("1.jpg", ['"a" dog', "a # b"]), ("2.jpg", ["c"])],
        [("line 3", "not NAME#NUMBER, tab, caption")],
    )
    # A line of the copies' results.csv lacks a separator.
    path = written(
        tmp_path / "list", "image_name| comment_number| comment\n1.jpg| 0| a\n2.jpg| 4   b\n"
    )
    assert read("flickr30k", path, images=str(tmp_path)) == (
        [("1.jpg", [" a"])],
        [("line 3", "2 columns, not the 3 of the first line")],
    )


URLS = [
    "http://a.org/x/1.jpg?s=2",
    "http://b.org/2%20b.jpg",
    "http://c.org/i.jpg",
    "http://d.org/i.jpg",
]


@pytest.mark.parametrize("layout", ["sbu object", "sbu list", "cc3m", "cc12m"])
def test_lists_of_urls_find_what_was_downloaded(tmp_path: Path, layout: str) -> None:
    captions = ["one", "two", "three", "four"]
    contents = {
        "sbu object": {"image_urls": URLS, "captions": captions},
        "sbu list": [list(pair) for pair in zip(URLS, captions, strict=True)],
        "cc3m": "".join(f"{c}\t{u}\n" for u, c in zip(URLS, captions, strict=True)),
        "cc12m": "".join(f"{u}\t{c}\n" for u, c in zip(URLS, captions, strict=True)),
    }
    path = written(tmp_path / "list", contents[layout])
    images = tmp_path / "images"
    numbered = f"training/3_{zlib.crc32(URLS[3].encode())}"
    files(images, "0/1.jpg", "0/2 b.jpg", "0/i.jpg", numbered, "training/0_123")
    good, bad = read("auto", path, images=str(images))
    assert good == [("0/1.jpg", ["one"]), ("0/2 b.jpg", ["two"]), (numbered, ["four"])]
    ((record, reason),) = bad
    assert record.startswith(("entry 2", "line 3"))
    assert reason == f"{images}/0/i.jpg may be of several URLs, of which {URLS[2]} is one"
    with pytest.raises(DataError, match=r"list lists URLs: download the images first"):
        read("auto", path)
    with pytest.raises(DataError, match=r"list lists URLs: .*none"):
        (tmp_path / "none").mkdir()
        read("auto", path, images=str(tmp_path / "none"))


def test_names_without_a_suffix(tmp_path: Path) -> None:
    files(tmp_path, "images_train/0000/0000017")
    path = written(tmp_path / "annot.json", [["images_train/0000/0000017", "a"], ["0000017", "b"]])
    good, bad = read("auto", path, images=str(tmp_path))
    assert good == [("images_train/0000/0000017", ["a"]), ("images_train/0000/0000017", ["b"])]
    assert not bad


def test_pictures_of_visual_genome_are_known_by_their_contents(tmp_path: Path) -> None:
    path = written(tmp_path / "vg.json", [{"id": 7, "regions": [{"phrase": "a star"}]}])
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "VG_100K" / "7").write_bytes(encoded(picture(7)))
    written(tmp_path / "VG_100K" / "7.txt", "no picture")
    (item,) = read_pairs(PairInput("auto", (path,), str(tmp_path)))
    assert isinstance(item, CaptionedImage)
    assert (item.image.read(), item.captions) == (encoded(picture(7)), ("a star",))


def test_files_of_img2dataset(tmp_path: Path) -> None:
    root = tmp_path / "00000"
    files(tmp_path, "00000/000000000.jpg", "00000/000000001.jpg", "00000/000000002.jpg")
    written(root / "000000000.txt", "one")
    written(root / "000000000.json", {"caption": "not this", "status": "success"})
    written(root / "000000001.json", {"caption": "two", "status": "success"})
    written(root / "000000003.txt", "three")
    files(tmp_path, "00000/000000004.jpg", "00000/000000004.a.txt", "00000/000000004.b.txt")
    written(tmp_path / "00000_stats.json", {"count": 4})
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    good, bad = read("auto", str(tmp_path))
    assert good == [
        ("00000/000000000.jpg", ["one"]),
        ("00000/000000001.jpg", ["two"]),
        ("00000/000000002.jpg", []),  # has no caption, which is found with the other bad ones
    ]
    assert bad == [
        ("00000/000000003", "0 images in the sample, not 1"),
        ("00000/000000004", "00000/000000004.b.txt: a second .txt in the sample"),
    ]
    good, _ = read("files", str(tmp_path), caption_key="caption")
    assert good[0] == ("00000/000000000.jpg", ["not this"])
    with pytest.raises(DataError, match=r"no \.json has the key 'captoin'"):
        read("files", str(tmp_path), caption_key="captoin")
    assert list(read_pairs(PairInput("files", (), str(tmp_path))))


def test_folders_are_known_by_their_files(tmp_path: Path) -> None:
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="name the .parquet files in it"):
        read("auto", str(tmp_path))
    with tarfile.open(tmp_path / "00000.tar", "w") as archive:
        for name in ("0.jpg", "0.txt"):
            archive.addfile(tarfile.TarInfo(name))
    items = list(read_pairs(PairInput("auto", (), str(tmp_path))))
    assert [item.record for item in items if isinstance(item, CaptionedImage)] == ["0"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_tables_of_hugging_face(tmp_path: Path, kind: str) -> None:
    columns = {
        "image": [{"bytes": b"i1", "path": "1.jpg"}] * 2 + [{"bytes": b"i2", "path": "2.jpg"}],
        "caption": [["a", "b"], ["c"], ["d"]],
    }
    path = write_table(tmp_path / "list", kind, columns)
    assert read("auto", path) == ([("i1", ["a", "b", "c"]), ("i2", ["d"])], [])
    sentences = [[{"raw": "a", "sentid": 1}, {"raw": "b", "sentid": 2}]]
    columns = {"filepath": ["val2014"], "filename": ["1.jpg"], "sentences": sentences}
    files(tmp_path, "val2014/1.jpg")
    path = write_table(tmp_path / "list", kind, columns)
    assert read("auto", path, images=str(tmp_path)) == ([("val2014/1.jpg", ["a", "b"])], [])
    path = write_table(tmp_path / "list", kind, {"URL": ["http://h/1.jpg"], "TEXT": ["a"]})
    with pytest.raises(DataError, match=r"list lists URLs: download the images first"):
        read(kind, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("two words\n", "list: not recognised; give its --format.* It begins with 'two words'"),
        ("", "list: the file is empty"),
        ([{"question": "q", "image": "a"}], "list: not recognised"),
        ({"info": 1}, "list: not recognised"),
        ('{"a": ', r"list:1: invalid JSON"),
        ('"a cat\thttp://h/1.jpg\n', "list lists URLs: download the images first"),
    ],
)
def test_what_is_not_recognised_is_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read("auto", written(tmp_path / "list", content), images=str(tmp_path))


@pytest.mark.parametrize(
    ("format", "name", "content", "message"),
    [
        ("jsonl", "list", b'[{"image": "a.jpg", "caption": "x"}]', "list: is a JSON list"),
        ("csv", "list", b"PAR1", "list: is a table, which --format parquet or arrow reads"),
        ("coco", "list.tar", b"", "list.tar: is a tar, which --format webdataset reads"),
        ("parquet", ".", b"", ": is a folder; --format parquet reads files"),
        ("auto", ".", b"", ": has neither tars nor images with a .txt or .json of their name"),
    ],
)
def test_files_of_another_kind_are_named(
    tmp_path: Path, format: str, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    if name != ".":
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(format, str(path), images=str(tmp_path))


def test_pipes_are_read_once_or_refused(tmp_path: Path) -> None:
    files(tmp_path, "a.jpg")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    row = '{"image": "a.jpg", "caption": "x"}\n'
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_text, row)
        assert read("jsonl", str(pipe), images=str(tmp_path)) == ([("a.jpg", ["x"])], [])
    for format in ("auto", "sbu"):
        with pytest.raises(DataError, match="pipe: is no regular file"):
            read(format, str(pipe), images=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--format coco --annotations x --split train", "--split means nothing with --format coco"),
        ("--format webdataset --images x --split train", "--split means nothing with --format web"),
        (
            "--format karpathy --annotations x --split-key s",
            "--split-key means nothing with --form",
        ),
        (
            "--format sbu --annotations x --image-key i",
            "--image-key means nothing with --format sbu",
        ),
        (
            "--format coco --annotations x --caption-key c",
            "--caption-key means nothing with --format",
        ),
        (
            "--format jsonl --annotations x --separator ,",
            "--separator means nothing with --format js",
        ),
        ("--format csv --annotations x --separator ab", "--separator 'ab': is not one character"),
        ("--format sbu --images x", "--format sbu needs --annotations"),
        (
            "--format files --annotations x --images y",
            "--format files needs either --annotations or",
        ),
        ("", "neither --annotations nor --images is given"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    arguments: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    always = ["--output", "o", "--text-tokenizer", "m"]
    assert tool("preprocess_pairs")([*arguments.split(), *always]) == 2
    assert f"error: {message}" in capfd.readouterr().err


def test_counts_add_up(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("1", "2", "3"):
        (tmp_path / f"{name}.jpg").write_bytes(encoded(picture(int(name))))
    (tmp_path / "cut.jpg").write_bytes(encoded(picture(0))[:300])
    rows = [
        ("1.jpg", "a star"),
        ("1.jpg", " "),
        ("1.jpg", "two"),
        ("2.jpg", ""),  # one bad sample: one reject
        ("cut.jpg", "a star"),
        ("cut.jpg", " "),
        ("lost.jpg", "a circle"),
        ("3.jpg", "a square"),
    ]
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    lines += ["{", json.dumps({"image": "3.jpg", "caption": "left", "split": "test"})]
    out = tmp_path / "out"
    arguments = ["--annotations", written(tmp_path / "list", "\n".join(lines)), "--images"]
    arguments += [str(tmp_path), "--output", str(out), "--text-tokenizer", tiny_tokenizer]
    assert tool("preprocess_pairs")([*arguments, "--on-error", "skip"]) == 0
    shown = capfd.readouterr().err.splitlines()
    assert shown[0].startswith("pairs: 10 records in ")
    assert shown[1] == "pairs: read as --format jsonl"
    assert shown[2:] == [
        "pairs: 10 records: 3 kept, 6 rejected, 1 left out (1 of split test; choose with --split)",
        "pairs: 5 images: 2 kept, 3 rejected",
        "pairs: 8 captions: 3 kept, 1 rejected, 4 lost with their image",
        f"pairs: 5 lines in {out}.rejects.jsonl: 1 caption, 3 images, 1 record",
        "pairs: 0 of 7 tokens are unknown to the tokenizer (0.00%)",
    ]
    manifest = load_manifest(out)
    assert (manifest.documents, manifest.sequences, manifest.rejects) == (2, 3, 5)
    assert manifest.omitted == {"split test": 1}
    assert manifest.counts is not None
    for fates in manifest.counts.values():
        assert fates["read"] == sum(fates.values()) - fates["read"] > 0
    assert [record for record, _ in rejects_of(out)] == [
        "line 2",
        "line 4",
        "line 5 and 1 more",
        "line 7",
        "line 9",
    ]


def test_visual_genome_counts_phrases_as_captions(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    entries = []
    for i in range(5):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(picture(i)))
        regions = [
            {"region_id": 10 * i + k, "phrase": p} for k, p in enumerate(["a star", " ", ""])
        ]
        entries.append({"id": i if i else 9, "regions": regions})
    out = tmp_path / "out"
    arguments = ["--format", "visual-genome", "--annotations", written(tmp_path / "vg", entries)]
    arguments += ["--images", str(tmp_path), "--output", str(out), "--on-error", "skip"]
    assert tool("preprocess_pairs")([*arguments, "--text-tokenizer", tiny_tokenizer]) == 0
    assert capfd.readouterr().err.splitlines()[1:] == [
        "pairs: 5 records: 4 kept, 1 rejected",
        "pairs: 5 images: 4 kept, 1 rejected",
        "pairs: 15 captions: 4 kept, 8 rejected, 3 lost with their image",
        f"pairs: 9 lines in {out}.rejects.jsonl: 8 captions, 1 image",
        "pairs: 0 of 16 tokens are unknown to the tokenizer (0.00%)",
    ]
    assert rejects_of(out)[1] == ("image 1, region 11", "empty caption")
