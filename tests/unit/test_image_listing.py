"""What counts as an image in folders and tars: its name or contents; no side files; links and inner tars."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from data_files import encoded, picture, rejects_of, tool
from raw_tasks import Desk, put

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.records import ImageFile, PassedOver, Reject


def jpeg(number: int) -> bytes:
    return encoded(picture(number))


def tar_of(path: Path, members: dict[str, bytes | tuple[bytes, str]], mode: str = "w") -> Path:
    """A tar; instead of contents a member may be (`tarfile.SYMTYPE` or `LNKTYPE`, target)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                member.type, member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def found(path: Path) -> dict[str, bytes | str]:
    """Contents of every image by its record, and the reason of every reject."""
    items = [item for item in read_images((str(path),)) if not isinstance(item, PassedOver)]
    return {x.record: x.read() if isinstance(x, ImageFile) else x.reason for x in items}


def passed_over(path: Path) -> list[str]:
    return [item.kind for item in read_images((str(path),)) if isinstance(item, PassedOver)]


def test_contents_make_an_image_whatever_it_is_called(tmp_path: Path) -> None:
    names = ("a.jpg", "b.jpe", "c.jfif", "d", "e.jpg?size=large", "f.txt", "g.JPG.download", "h.")
    for number, name in enumerate(names):
        put(tmp_path / name, jpeg(number))
    put(tmp_path / "P3 is text.md", b"P3 is how a PPM begins, and this is none")
    put(tmp_path / "x.heic", b"\0\0\0\x18ftypheic" + bytes(40))
    put(tmp_path / "y.HEIC", b"no picture")
    put(tmp_path / "empty", b"")
    assert found(tmp_path) == {name: jpeg(number) for number, name in enumerate(names)}
    assert sorted(passed_over(tmp_path)) == [".heic", ".heic", ".md", "no suffix"]
    tar = tar_of(tmp_path.parent / f"{tmp_path.name}.tar", {n: jpeg(0) for n in names})
    assert list(found(tar)) == list(names)


SIDE_FILES = (
    *("__MACOSX/._a.jpg", "__MACOSX/b.jpg", "x/.ipynb_checkpoints/b-checkpoint.jpg", ".hidden.jpg"),
    *("@eaDir/b.jpg/thumb.jpg", "Thumbs.db", "x/desktop.ini", ".cache/b.jpg", "lost+found/b.jpg"),
    *("$RECYCLE.BIN/b.jpg", "System Volume Information/b.jpg", "x/.DS_Store"),
)


def test_side_files_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / ".data"  # the folder that is given may be hidden itself
    for name in ("x/a.jpg", *SIDE_FILES):
        put(folder / name, jpeg(1))
    assert list(found(folder)) == ["x/a.jpg"] and not passed_over(folder)
    tar = tar_of(tmp_path / "t.tar", {f"./{name}": jpeg(1) for name in ("x/a.jpg", *SIDE_FILES)})
    assert list(found(tar)) == ["./x/a.jpg"] and not passed_over(tar)


def test_links_in_a_tar_are_followed(tmp_path: Path) -> None:
    members: dict[str, bytes | tuple[bytes, str]] = {
        "d/early.jpg": (tarfile.SYMTYPE, "../late.jpg"),
        "first.jpg": jpeg(0),
        "hard.jpg": (tarfile.LNKTYPE, "first.jpg"),
        "d/soft.jpg": (tarfile.SYMTYPE, "../first.jpg"),
        "twice.jpg": (tarfile.SYMTYPE, "d/soft.jpg"),
        "late.jpg": jpeg(1),
        "lost.jpg": (tarfile.SYMTYPE, "/data/elsewhere.jpg"),
        "round.jpg": (tarfile.SYMTYPE, "round.jpg"),
    }
    links = found(tar_of(tmp_path / "links.tar", members))
    assert list(links) == list(members)
    assert links["d/early.jpg"] == links["late.jpg"] == jpeg(1)
    for name in ("hard.jpg", "d/soft.jpg", "twice.jpg"):
        assert links[name] == jpeg(0)
    assert links["lost.jpg"] == "a link to /data/elsewhere.jpg, which is no file of the tar"
    assert links["round.jpg"] == "a link to round.jpg, which leads to no file"
    packed = found(tar_of(tmp_path / "links.tar.gz", members, "w:gz"))
    assert packed["first.jpg"] == jpeg(0)
    assert packed["hard.jpg"] == "a link in a compressed tar: unpack it"


def test_tars_in_a_tar(tmp_path: Path) -> None:
    inner = [
        tar_of(tmp_path / "inner" / f"n{i}.tar", {"a.jpg": jpeg(i), "b.jpg": jpeg(7)})
        for i in (1, 2)
    ]
    contents = {path.name: path.read_bytes() for path in inner}
    packed = {"n3.tar.gz": gzip.compress(contents["n1.tar"])}
    expected: dict[str, bytes | str] = {
        f"{name}/{image}": data
        for name, first in (("n1.tar", 1), ("n2.tar", 2))
        for image, data in (("a.jpg", jpeg(first)), ("b.jpg", jpeg(7)))
    }
    assert found(tar_of(tmp_path / "all.tar", contents)) == expected
    assert found(tar_of(tmp_path / "all.tar.gz", contents, "w:gz")) == expected
    assert found(tar_of(tmp_path / "packed.tar", packed)) == {
        "n3.tar.gz/a.jpg": jpeg(1),
        "n3.tar.gz/b.jpg": jpeg(7),
    }
    put(tmp_path / "z" / "all.tar.zst", b"\x28\xb5\x2f\xfd...")
    assert "zstd or lz4, which is not read: decompress it" in str(found(tmp_path / "z")[""])
    # A compressed tar is known by its contents; the damage of an inner one is named, and what follows is read.
    misnamed = tmp_path / "misnamed.tar"
    misnamed.write_bytes(gzip.compress((tmp_path / "all.tar").read_bytes()))
    assert found(misnamed) == expected
    broken = found(
        tar_of(tmp_path / "broken.tar", {"n1.tar": contents["n1.tar"][:700], "z.jpg": jpeg(3)})
    )
    assert broken["z.jpg"] == jpeg(3)
    assert broken["n1.tar/a.jpg"] == "damaged tar: n1.tar ends inside it"


def test_what_is_passed_over_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "n/b.jpg"):
        put(tmp_path / "in" / name, jpeg(1))
    for name in ("x.heic", "y.heic", "n/z.avi"):
        put(tmp_path / "in" / name, b"none")
    out = tmp_path / "out"
    run = tool("preprocess_images")
    assert run(["--input", str(tmp_path / "in"), "--output", str(out)]) == 0
    assert "images: passed over: .avi 1, .heic 2\n" in capfd.readouterr().err
    manifest = load_manifest(str(out))
    assert (manifest.documents, manifest.rejects) == (2, 0)
    assert manifest.passed_over == {".avi": 1, ".heic": 2}
    assert [reason for _, reason in rejects_of(out)] == [
        "passed over: .avi 1",
        "passed over: .heic 2",
    ]
    assert IndexedReader(f"{out}_image").num_documents == 2
    put(tmp_path / "none" / "x.heic", b"none")
    assert run(["--input", str(tmp_path / "none"), "--output", str(out)]) == 1
    assert "no usable record" in (text := capfd.readouterr().err) and "passed over: .heic 1" in text


def test_one_bad_member_spoils_its_sample_alone(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    inner = tar_of(tmp_path / "n.tar", {"7.jpg": jpeg(7), "7.txt": b"a star"}).read_bytes()
    tar = tar_of(
        tmp_path / "in" / "a.tar",
        {
            "0.jpg": jpeg(0),
            "0.txt": b"a circle",
            "1.jpg": (tarfile.SYMTYPE, "gone.jpg"),
            "1.txt": b"a star",
            "2.jpg": (tarfile.SYMTYPE, "0.jpg"),
            "2.txt": b"\xef\xbb\xbfa square",
            "3": jpeg(3),  # an image by its contents
            "3.txt": b"two",
            "n.tar": inner[:900],  # breaks off in 7.jpg
            "4.jpg": jpeg(4),
            "4.cls": b"5",
            "4.txt": b"two",
            "README": b"no sample",
            "pipe": (tarfile.FIFOTYPE, ""),
            "5.avif": encoded(picture(5), "AVIF"),
            "5.json": b'{"caption": "small"}',
            "last.tar": inner,
            "6.heic": b"....ftypheic",
            "6.txt": b"two",
        },
    )
    out = tmp_path / "out"
    arguments = ["--images", str(tar.parent), "--text-tokenizer", tiny_tokenizer]
    arguments += ["--output", str(out), "--on-error", "skip"]
    assert tool("preprocess_pairs")(arguments) == 0
    assert capfd.readouterr().err.splitlines()[2:7] == [
        "pairs: 10 records: 6 kept, 4 rejected",
        "pairs: 6 images: 6 kept, 0 rejected",
        "pairs: 8 captions: 6 kept, 0 rejected, 2 lost with their image",
        "pairs: passed over: no suffix 1",
        f"pairs: 5 lines in {out}.rejects.jsonl: 4 records, 1 of what is passed over",
    ]
    assert rejects_of(out) == [
        ("1", "1.jpg: a link to gone.jpg, which is no file of the tar"),
        ("n.tar/after 7.jpg", "damaged tar: unexpected end of data"),
        ("pipe", "pipe: neither a file nor a link"),
        ("6", "0 images in the sample, not 1 (passed over: .heic 1)"),
        ("", "passed over: no suffix 1"),
    ]
    # A merge lists, counts and shows it all.
    merge = ["--input", str(out), str(out), "--output", f"{out}2"]
    assert tool("merge_datasets")(merge) == 0
    capfd.readouterr()
    assert rejects_of(f"{out}2") == 2 * rejects_of(out)
    assert tool("inspect_dataset")([f"{out}2"]) == 0
    assert capfd.readouterr().out.splitlines()[2:6] == [
        "  20 records read: 12 kept, 8 rejected, 0 left out",
        "  12 images read: 12 kept, 0 rejected",
        "  16 captions read: 12 kept, 0 rejected, 4 lost",
        "  passed over: no suffix 2",
    ]


def test_a_pipe_or_device_among_images_is_named_and_holds_up_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in str(found(tmp_path)["pipe"])
    # It has no end, and its size is 0.
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="no regular file: .*endless.jpg"):
        found(tmp_path)


def test_side_folders_are_no_classes(desk: Desk, capfd: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        for folder in ("__MACOSX", "n01", ".ipynb_checkpoints", "n02"):
            put(desk.raw / split / folder / "a.JPEG", jpeg(1))
    put(desk.raw / "train" / "n01" / "b.heic", b"none")
    put(desk.raw / "train" / "n02" / "c", jpeg(2))
    assert desk.prepare("imagenet") == 0
    assert json.loads(Path(f"{desk.out}_labels.json").read_text())["labels"] == ["n01", "n02"]
    train = desk.opened("train", "imagenet")
    assert [row.labels for row in train.rows()] == [(0,), (1,), (1,)]
    assert train.manifest.omitted == {"passed over: .heic": 1}


def test_a_flat_val_is_counted_without_other_files(desk: Desk) -> None:
    for name in ("n01", "n02"):
        put(desk.raw / "train" / name / "a.JPEG", jpeg(1))
    for name in ("v1.JPEG", "v2", "notes.txt", "__MACOSX/v0.JPEG", ".v0.JPEG"):
        put(desk.raw / "val" / name, b"text" if name == "notes.txt" else jpeg(1))
    put(desk.raw / "labels.txt", "n02\nn01\n")
    assert desk.prepare("imagenet", "--val-labels", str(desk.raw / "labels.txt")) == 0
    val = desk.opened("val", "imagenet")
    assert [(row.id, row.labels) for row in val.rows()] == [("v1.JPEG", (1,)), ("v2", (0,))]
    assert val.manifest.omitted == {"passed over: .txt": 1}


def test_one_tar_of_all_classes_is_not_a_class(
    desk: Desk, capfd: pytest.CaptureFixture[str]
) -> None:
    inner = tar_of(desk.raw.parent / "n01.tar", {"a.JPEG": jpeg(1)}).read_bytes()
    tar_of(desk.raw / "train" / "ILSVRC2012_img_train.tar", {"n01.tar": inner, "n02.tar": inner})
    assert desk.prepare("imagenet", "--splits", "train") == 1
    assert "a tar of tars: unpack it into" in capfd.readouterr().err


def test_a_reject_names_the_member(tmp_path: Path) -> None:
    tar = tar_of(tmp_path / "t.tar", {"pipe.jpg": (tarfile.FIFOTYPE, ""), "a.jpg": jpeg(1)})
    reject, image = read_images((str(tar),))
    assert (
        isinstance(reject, Reject) and str(reject) == f"{tar}: pipe.jpg: neither a file nor a link"
    )
    assert isinstance(image, ImageFile)
