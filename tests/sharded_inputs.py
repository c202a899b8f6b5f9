"""Raw data of each kind, with damage, as the tests of shards index them, and the comparison of what they become."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
from data_files import encoded, files_of, picture, sentence, tool

Arguments = list[str]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def text_lines(count: int, first: int = 0) -> list[str]:
    return [sentence(first + number) for number in range(count)]


def raw_text(folder: Path, model: str) -> Arguments:
    """Files of all kinds: lines with and without damage, compressed, a table, and an empty file."""
    lines = [json.dumps({"text": text}).encode() for text in text_lines(4000)]
    for place in (0, 700, 1999, 2000, 3999):
        lines.insert(place, b'{"no": "text"}')
    lines.insert(2500, b"")
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    (folder / "b.txt").write_text("\r\n".join(text_lines(900, 50)) + "\n \n\n")
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n".join(text_lines(1500, 90)).encode()))
    table = pa.table({"text": [*text_lines(700, 7), None]})
    pyarrow.parquet.write_table(table, folder / "d.parquet")
    (folder / "e.jsonl").write_bytes(b"")
    names = ("a.jsonl", "e.jsonl", "b.txt", "c.txt.gz", "d.parquet")
    inputs = [str(folder / name) for name in names]
    return ["--input", *inputs, "--text-tokenizer", model, "--on-error", "skip"]


def raw_joined_text(folder: Path, model: str) -> Arguments:
    """Documents of several lines, which have no offsets of their own."""
    return [*raw_text(folder, model), "--documents", "lines:7"]


def raw_images(folder: Path, model: str) -> Arguments:
    """A folder with files that are none and a broken one, and two tars."""
    (folder / "f" / "sub").mkdir(parents=True)
    for number in range(9):
        (folder / "f" / "sub" / f"{number}.png").write_bytes(encoded(picture(number), "PNG"))
    (folder / "f" / "sub" / "5.jpg").write_bytes(encoded(picture(5))[:300])
    for name in ("f/a.heif", "f/b.heif", "f/sub/z.heif", "f/sub/notes"):
        (folder / name).write_bytes(b"text")
    members = {f"{number}.jpg": encoded(picture(number)) for number in range(7)}
    write_tar(folder / "f" / "t.tar", members | {"x.heif": b"text", "y.heif": b"text"})
    write_tar(folder / "u.tar", members | {"bad.jpg": b"\xff\xd8\xff"})
    return ["--input", str(folder / "f"), str(folder / "u.tar"), "--on-error", "skip"]


def pair_rows(folder: Path, count: int) -> list[dict[str, object]]:
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(encoded(picture(number)))
    rows: list[dict[str, object]] = []
    for number in range(count):
        split = "test" if number >= count - 3 else "train"
        rows.append({"image": f"{number}.jpg", "caption": sentence(number), "split": split})
        rows.append({"image": f"{number}.jpg", "caption": sentence(number + 1), "split": split})
    return rows


def raw_lists(folder: Path, model: str) -> Arguments:
    """Lines of captions in two files, the second of which has no wanted split."""
    rows = pair_rows(folder, 20)
    rows[5:5] = [
        {"image": "none.jpg", "caption": "a star", "split": "train"},
        {"image": "1.jpg", "caption": " ", "split": "train"},
    ]
    for name, part in (("a.jsonl", rows[:-6]), ("b.jsonl", rows[-6:])):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    words = ["--annotations", str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    return [*words, "--images", str(folder), "--text-tokenizer", model, "--on-error", "skip"]


def raw_tars(folder: Path, model: str) -> Arguments:
    """WebDataset, whose second tar alone has the key of the captions; the first breaks off."""
    for tar in range(3):
        members: dict[str, bytes] = {}
        for number in range(8):
            image = encoded(picture(10 * tar + number))
            members |= {f"{number}.jpg": image, f"{number}.txt": sentence(number).encode()}
            if tar == 1:
                members[f"{number}.json"] = json.dumps({"said": sentence(number + 9)}).encode()
        write_tar(folder / f"{tar}.tar", members | {"alone.cls": b"1"})
    broken = (folder / "0.tar").read_bytes()[:-9000]
    (folder / "0.tar").write_bytes(broken)
    words = ["--format", "webdataset", "--annotations", str(folder), "--caption-key", "said"]
    return [*words, "--text-tokenizer", model, "--on-error", "skip"]


def raw_sample_files(folder: Path, model: str) -> Arguments:
    """Images in folders with their captions beside them, and what belongs to none."""
    for number in range(14):
        sample = folder / f"{number % 3}" / f"{number:05d}"
        sample.parent.mkdir(exist_ok=True)
        sample.with_suffix(".jpg").write_bytes(encoded(picture(number)))
        sample.with_suffix(".txt").write_text(sentence(number) if number != 4 else " ")
    (folder / "1" / "notes.md").write_text("text")
    words = ["--format", "files", "--images", str(folder)]
    return [*words, "--text-tokenizer", model, "--on-error", "skip"]


def raw_tables(folder: Path, model: str) -> Arguments:
    """Tables that hold the images."""
    rows = pair_rows(folder, 24)
    for number in range(2):
        part = rows[number * 24 : (number + 1) * 24]
        columns = {name: [row[name] for row in part] for name in ("caption", "split")}
        images = [(folder / str(row["image"])).read_bytes() for row in part]
        pyarrow.parquet.write_table(
            pa.table({**columns, "image": images}), folder / f"{number}.parquet"
        )
    words = ["--annotations", str(folder / "0.parquet"), str(folder / "1.parquet")]
    return [*words, "--text-tokenizer", model]


def raw_task(folder: Path, model: str) -> Arguments:
    """NLVR2 whose statements share pictures, over several chunks, with one picture that is broken."""
    (folder / "images").mkdir()
    for number in range(8):
        (folder / "images" / f"{number}.jpg").write_bytes(encoded(picture(number)))
    (folder / "images" / "5.jpg").write_bytes(b"")
    for split, count in (("train", 70), ("dev", 20)):
        rows = [
            {
                "sentence": sentence(number) if number != 33 else "",
                "label": str(number % 3 == 0),
                "images": [f"{number % 7}.jpg", f"{(number * 5 + 1) % 8}.jpg"],
            }
            for number in range(count)
        ]
        (folder / f"nlvr_{split}.json").write_text(json.dumps(rows))
    words = ["--task", "nlvr2", "--raw", str(folder), "--splits", "train", "dev"]
    return [*words, "--text-tokenizer", model, "--on-error", "skip"]


KINDS: dict[str, tuple[str, Callable[[Path, str], Arguments]]] = {
    "text": ("preprocess_text", raw_text),
    "joined text": ("preprocess_text", raw_joined_text),
    "images": ("preprocess_images", raw_images),
    "lists": ("preprocess_pairs", raw_lists),
    "tars": ("preprocess_pairs", raw_tars),
    "files": ("preprocess_pairs", raw_sample_files),
    "tables": ("preprocess_pairs", raw_tables),
    "task": ("prepare_task", raw_task),
}


def prepared(
    kind: str, folder: Path, model: str
) -> tuple[Callable[[Sequence[str]], int], Arguments]:
    """The command of a kind of data, and its arguments without the output."""
    name, write = KINDS[kind]
    (folder / "raw").mkdir()
    return tool(name), write(folder / "raw", model)


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and bytes; the manifests' commands name the same output."""
    assert files_of(one) == files_of(other)
    for name in files_of(one):
        a, b = (folder.joinpath(name).read_bytes() for folder in (one, other))
        if name.endswith(".json"):
            b = b.replace(f"{other}/".encode(), f"{one}/".encode())
        assert a == b, name
    return True
