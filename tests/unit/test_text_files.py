"""What files of text are taken for, what of them becomes a document, and captions for a tokenizer."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.inference.records import read_records
from megatron_vlmoe.prepare.readers import files as lines_reader
from megatron_vlmoe.prepare.readers import text as text_reader
from megatron_vlmoe.prepare.readers.files import json_rows, load_json, numbered_lines
from megatron_vlmoe.prepare.readers.records import Reject
from megatron_vlmoe.prepare.readers.text import (
    TextInput,
    block_texts,
    read_text,
    read_training_texts,
)


def documents(path: Path, **options: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """The texts of a file, and record and reason of each reject."""
    texts: list[str] = []
    rejects: list[tuple[str, str]] = []
    for block in read_text(TextInput((str(path),), **options)):
        if isinstance(block, Reject):
            rejects.append((block.record, block.reason))
            continue
        good, bad = block_texts(block)
        texts += [document.text for document in good]
        rejects += [(f"{block.unit} {number}", reason) for number, reason in bad]
    return texts, rejects


def arrow_compress(kind: str) -> Callable[[bytes], bytes]:
    """zstd or lz4 as a file has it."""

    def compress(data: bytes) -> bytes:
        sink = io.BytesIO()
        with pyarrow.CompressedOutputStream(sink, kind) as stream:
            stream.write(data)
            stream.flush()
            return sink.getvalue() if stream.closed else _closed(stream, sink)

    return compress


def _closed(stream: Any, sink: io.BytesIO) -> bytes:
    copy = io.BytesIO()
    sink.close = lambda: copy.write(sink.getvalue())  # type: ignore[method-assign]
    stream.close()
    return copy.getvalue()


WIKI = b'{"id": "12", "revid": "1", "url": "https://x", "title": "A", "text": "Anarchism is"}\n'


@pytest.mark.parametrize(
    "compress",
    [
        bytes,
        gzip.compress,
        bz2.compress,
        lzma.compress,
        arrow_compress("zstd"),
        arrow_compress("lz4"),
    ],
    ids=["plain", "gz", "bz2", "xz", "zst", "lz4"],
)
@pytest.mark.parametrize("name", ["wiki_00", "a.txt", "a.txt.gz", "a.json"])
def test_a_first_line_that_is_an_object_makes_json_lines(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / name
    path.write_bytes(compress(b"\xef\xbb\xbf\n" + WIKI + b'{"text": "two"}\n'))
    assert documents(path) == (["Anarchism is", "two"], [])
    assert list(read_training_texts([str(path)])) == ["Anarchism is", "two"]


def test_a_long_or_damaged_first_line_is_still_one_of_json_lines(tmp_path: Path) -> None:
    long = json.dumps({"text": "x " * 100_000})
    (tmp_path / "wiki_00").write_text(f'{long}\n{{"text": "two"}}')
    assert [len(text) for text in documents(tmp_path / "wiki_00")[0]] == [200_000, 3]
    (tmp_path / "wiki_01").write_text('{"text": "one\n{"text": "two"}')
    texts, ((record, reason),) = documents(tmp_path / "wiki_01")
    assert texts == ["two"] and record == "line 1" and reason.startswith("invalid JSON")


@pytest.mark.parametrize(
    "content",
    [
        '"Yes," he said.',
        "[1] A note.",
        "[1]",
        "{\\bf bold}",
        "{a} set",
        "<s> one",
        "* list",
        "1, 2",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.md"])
def test_plain_text_stays_plain(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(f"{content}\nsecond\n")
    assert documents(tmp_path / name) == ([content, "second"], [])


def a_zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    return stream.getvalue()


def a_tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"one"))
    return stream.getvalue()


def a_database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table t (text)")
        return connection.serialize()


def an_array() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(3))
    return stream.getvalue()


def a_parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), sink)
    return sink.getvalue()


DUMP = b'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11">\n  <page>\n'
REFUSED = [
    ("a.docx", a_zip(), "a zip archive .*unpack it"),
    ("a", a_zip(), "a zip archive"),
    ("a.gz", gzip.compress(a_zip()), "a zip archive"),
    ("a.tar", a_tar(), "a tar archive"),
    ("a.tgz", gzip.compress(a_tar()), "a tar archive"),
    ("a.7z", b"7z\xbc\xaf\x27\x1c\0\4", "a 7z archive"),
    ("a.rar", b"Rar!\x1a\x07\x01\0", "a rar archive"),
    ("a.pdf", b"%PDF-1.7\n%\xe2\xe3", r"a PDF.*pdftotext"),
    ("a.doc", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0", "MS Office"),
    ("a.sqlite", a_database(), "SQLite"),
    ("a.pkl", pickle.dumps(["one"]), "pickle"),
    ("a.pkl", pickle.dumps({"a": 1}, protocol=2), "pickle"),
    ("a.npy", an_array(), "NumPy"),
    ("a.h5", b"\x89HDF\r\n\x1a\n\0", "HDF5"),
    ("a.jpg", b"\xff\xd8\xff\xe0\0", "a picture"),
    ("a.bin", b"one\0two", "binary content.*NUL"),
    ("a.txt", "one".encode("utf-16"), "UTF-16.*iconv"),
    ("a.jsonl", b"\xfe\xff\0{", "UTF-16"),
    ("a.txt", "one".encode("utf-32"), "UTF-32"),
    ("a.txt", "one".encode("utf-16-le"), "NUL"),
    ("a.parquet.gz", gzip.compress(a_parquet()), "a compressed table"),
    ("a.gz", gzip.compress(gzip.compress(b"one")), "compressed twice"),
    ("enwiki-pages-articles.xml.bz2", bz2.compress(DUMP), "MediaWiki.*WikiExtractor --json"),
    ("wiki_00", b'<doc id="12" url="x" title="A">\nA\n', "WikiExtractor's.*--json"),
    ("a.xml", b"<?xml version='1.0'?>\n<a/>", "XML"),
    ("a.xml", b"\n<a>one</a>", r"a \.xml file"),
    ("a.txt", b"<!DOCTYPE html>\n<html>", "a web page"),
    ("a.rtf", b"{\\rtf1\\ansi one}", "rich text"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
    ("a.sql.gz", gzip.compress(b"-- MySQL dump 10.13\n"), "SQL dump"),
    ("a.warc", b"WARC/1.0\r\n", "web archive"),
    ("a.txt", b"{'id': 12, 'text': 'one'}\n", "Python dictionaries"),
    ("a.csv", b"id,body\n1,one\n", r"columns \(id, body\) without text"),
    ("a.tsv", b"a cat\thttps://x/1.jpg\n", "columns"),
    ("results.token", b"1000092795.jpg#0\tTwo young guys .\n", "columns"),
    ("captions.txt", b"image,caption\n1.jpg,a cat\n", r"columns \(image, caption\)"),
    ("captions.txt", b"1.jpg,a cat\n", "columns"),
    ("snli_1.0_dev.txt", b"gold_label\tsentence1\tsentence2\nneutral\ta\tb\n", "columns"),
    (
        "a.json",
        b'{\n "info": 1,\n "data": []\n}',
        r"one JSON object without a key 'text'; it has info",
    ),
    ("a", b'{\n "id": 1\n}\n{\n "id": 2\n}', r":4: invalid JSON: Extra data .*--format text"),
    ("a.json", b"[\n 'one'\n]", "invalid JSON"),
    ("a.json", b"no JSON", "invalid JSON"),
]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    REFUSED,
    # Archives hold the time at which they were made: their bytes are no name.
    ids=[f"{name}: {message}" for name, _, message in REFUSED],
)
def test_what_is_not_read_is_refused_by_name(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        documents(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "read",
    [
        lambda path: list(json_rows(path)),
        lambda path: list(numbered_lines(path)),
        load_json,
        lambda path: read_records(Path(path)),
        lambda path: list(read_training_texts([path])),
    ],
    ids=["json lines", "lines", "json", "records", "training"],
)
def test_every_reader_refuses_and_decompresses_alike(
    tmp_path: Path, read: Callable[[str], Any]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n')
    expected = read(str(path))
    for compress in (gzip.compress, bz2.compress, lzma.compress, arrow_compress("zstd")):
        path.write_bytes(compress(b'{"text": "one"}\n'))
        assert read(str(path)) == expected
    refusals = {
        a_zip(): "a zip",
        "{}".encode("utf-16"): "UTF-16",
        a_tar(): "a tar",
        b"%PDF-1": "PDF",
    }
    for content, message in refusals.items():
        path.write_bytes(content)
        # A tar may be one of WebDataset, where captions are wanted.
        with pytest.raises(DataError, match=rf"a\.jsonl(: .*{message}| holds no text)"):
            read(str(path))


def test_folders_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(DataError, match=r"f: a folder: name the files in it \(it is empty\)"):
        documents(tmp_path / "f")
    (tmp_path / "f" / "data-00000.arrow").touch()
    with pytest.raises(DataError, match=r"a folder: .*, as .*f/data-00000\.arrow"):
        documents(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="no regular file: say with --format"):
        documents(tmp_path / "pipe")
    content = gzip.compress(WIKI)
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    assert documents(tmp_path / "pipe", format="jsonl") == (["Anarchism is"], [])
    writer.join()


def test_what_the_user_says_decides_between_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,body\n1,one\n")
    assert documents(path, format="text") == (["id,body", "1,one"], [])
    path.write_bytes(a_zip())
    with pytest.raises(DataError, match="a zip archive"):
        documents(path, format="text")


def test_json_of_one_value_and_tables_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, "two", {"body": "x"}, 3], indent=1))
    assert documents(path) == (
        ["one", "two"],
        [
            ("entry 2", "no key 'text'; it has body"),
            ("entry 3", "neither a string nor an object with 'text'"),
        ],
    )
    path.write_text('{\n "text": "one\\ntwo"\n}')
    assert documents(path) == (["one\ntwo"], [])
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'id,text\n1,"one, ""two""\nthree"\n2\n3,\xff\n4,"a"b\n\n5,five\n6,six, seven\n7,"open\n8,x\n'
    )
    texts, rejects = documents(path)
    assert texts == ['one, "two"\nthree', "five"]
    assert [record for record, _ in rejects] == [
        *("line 4", "line 5", "line 6", "line 9"),
        "line 10 to 11",
    ]
    assert rejects[3][1] == "3 columns, not the 2 of the first line"  # not "six" alone
    assert (
        "1 columns" in rejects[0][1] and "UTF-8" in rejects[1][1] and "not a row" in rejects[2][1]
    )


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_damaged_compression_is_said_where_it_is(
    tmp_path: Path, compress: Callable[[bytes], bytes], damage: str
) -> None:
    data = bytearray(compress(b"\n".join(b"%d" % (i * 7919) for i in range(20_000))))
    if damage == "cut":
        del data[len(data) // 2 :]
    else:
        data[40:200] = b"\xff" * 160
    path = tmp_path / "a.gz"
    path.write_bytes(data)
    try:
        rejects = documents(path)[1]
        assert len(rejects) == 1 and "unreadable from here on" in rejects[0][1]
    except DataError as error:  # nothing of it can be read
        assert damage == "overwritten" and str(error).startswith(f"{path}: ")
    with pytest.raises(DataError, match=r"a\.gz: "):
        load_json(str(path))


def write_arrow(path: Path, table: pyarrow.Table) -> None:
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=2)


@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "parquet", "arrow"])
def test_lines_and_rows_are_joined_to_documents(tmp_path: Path, kind: str) -> None:
    sentences = [f"sentence {i} ." for i in range(7)]
    table = pyarrow.table({"text": sentences})
    path = tmp_path / f"books_large_p1.{kind}"
    if kind == "text":
        path.write_text("\n\n".join(sentences))  # blank lines do not count
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in sentences))
    elif kind == "json":
        path.write_text(json.dumps(sentences))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    else:
        write_arrow(path, table)
    joined = ["\n".join(sentences[:3]), "\n".join(sentences[3:6]), sentences[6]]
    assert documents(path, documents="lines:3") == (joined, [])
    assert documents(path, documents="lines:9") == (["\n".join(sentences)], [])
    assert documents(path, documents="lines:1")[0] == documents(path)[0] == sentences


def test_blocks_and_limits_end_no_document_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{i:07d}\n" for i in range(5000)))
    monkeypatch.setattr(text_reader, "_BLOCK_BYTES", 100)
    texts, _ = documents(path, documents="lines:1500")
    assert [text.count("\n") + 1 for text in texts] == [1500, 1500, 1500, 500]
    # A document that would be too long ends before the line that is too much: nothing is lost.
    monkeypatch.setattr(text_reader, "MAX_DOCUMENT_BYTES", 70)
    texts, rejects = documents(path, documents="lines:1500")
    assert {text.count("\n") + 1 for text in texts} == {10} and len(texts) == 500 and not rejects
    path.write_text("one\nx" + "x" * 70 + "\ntwo\nthree\n")
    monkeypatch.setattr(lines_reader, "MAX_DOCUMENT_BYTES", 70)
    texts, rejects = documents(path, documents="lines:2")
    assert texts == ["one", "two\nthree"] and rejects == [("line 2", "longer than 70 bytes")]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"txt": 1}\n{"text": " "}\n{"text": "4"}')
    assert documents(tmp_path / "b.jsonl", documents="lines:3") == (
        ["one", "4"],
        [("line 2", "no key 'text'; it has txt"), ("line 3", "empty text")],
    )
    for value in ("lines:0", "lines:", "lines:x", "paragraph"):
        with pytest.raises(DataError, match=f"--documents {value}: give line, blank-line"):
            documents(path, documents=value)


def test_a_large_file_is_no_single_document_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "books_large_p1.txt"
    path.write_text("a sentence .\n" * 90_000)  # 1.1 MiB
    assert len(documents(path)[0]) == 90_000 and capsys.readouterr().err == ""
    assert len(documents(path, documents="blank-line")[0]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"warning: {path}: all of its 1.1 MiB are one document; see --documents"
    for module in (lines_reader, text_reader):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 1 << 20)
    texts, ((record, reason),) = documents(path, documents="blank-line")
    assert not texts and record == "line 1"
    assert "1048576 bytes" in reason and "no blank line" in reason and "lines:N" in reason


URL = "https://x.org/1.jpg"
VG = [{"id": 1, "regions": [{"phrase": "one"}, {"phrase": "two"}]}]
COCO = {
    "images": [{"id": 1}],
    "annotations": [{"image_id": 1, "caption": c} for c in ("one", "two")],
}
KARPATHY = {"images": [{"sentences": [{"raw": "one"}, {"raw": "two"}]}], "dataset": "coco"}
SBU = {"image_urls": [URL, URL], "captions": ["one", "two"], "user_ids": ["a", "b"]}
CAPTIONS: dict[str, tuple[str, object]] = {
    "coco": ("captions_train2014.json", COCO),
    "karpathy": ("dataset_coco.json", KARPATHY),
    "visual genome": ("region_descriptions.json", VG),
    "sbu": ("sbu-captions-all.json", SBU),
    "path, caption": ("annot.json", [["1.jpg", "one"], ["2.jpg", "two"]]),
    "objects": ("train.json", [{"image": "1.jpg", "caption": ["one", "two"]}]),
    "lines": ("a.jsonl", b'{"image": "1.jpg", "caption": "one"}\n{"captions": ["two"]}\n'),
    "cc3m": ("Train_GCC-training.tsv", f"one\t{URL}\ntwo\t{URL}\n".encode()),
    "cc3m, a quotation mark": ("a.tsv", f'"one\t{URL}\ntwo\t{URL}\n'.encode()),
    "cc12m": ("cc12m.tsv", f"{URL}\tone\n{URL}\ttwo\n".encode()),
    "quoted header": ("a.csv", b'"id","caption"\n"1","one"\n"2","two"\n'),
    "token": ("results.token", b"1.jpg#0\tone\n1.jpg#1\ttwo\n"),
    "flickr csv": (
        "results.csv",
        b"image_name| comment_number| comment\n1.jpg| 0| one\n1.jpg| 1| two",
    ),
    "flickr8k": ("captions.txt", b"image,caption\n1.jpg,one\n2.jpg,two\n"),
    "open_clip": ("a.csv", b'filepath\ttitle\n1.jpg\tone\n2.jpg\t"two"\n'),
    "text.gz": ("a.txt.gz", gzip.compress(b"one\ntwo\n")),
    "text.bz2": ("a.txt.bz2", bz2.compress(b"one\ntwo\n")),
    "text.xz": ("a.txt.xz", lzma.compress(b"one\ntwo\n")),
    "json.gz": ("captions.json.gz", gzip.compress(json.dumps(COCO).encode())),
}


@pytest.mark.parametrize("layout", CAPTIONS)
@pytest.mark.parametrize("indent", [None, 1])
def test_captions_train_a_tokenizer(tmp_path: Path, layout: str, indent: int | None) -> None:
    name, content = CAPTIONS[layout]
    if not isinstance(content, bytes):
        content = json.dumps(content, indent=indent).encode()
    (tmp_path / name).write_bytes(content)
    found = list(read_training_texts([str(tmp_path / name)]))
    assert (
        [text.strip(' "') for text in found if isinstance(text, str)]
        == ["one", "two"]
        == [str(item).strip(' "') for item in found]
    )


def test_captions_of_tables_and_tars_train_a_tokenizer(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"url": [URL] * 2, "caption": ["one", None]}), tmp_path / "00000.parquet"
    )
    write_arrow(tmp_path / "a.arrow", pyarrow.table({"raw": [["two", "three"], ["four"]]}))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for member, data in (("1.jpg", b"i"), ("1.txt", b"five"), ("1.json", b"{}")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    paths = [str(tmp_path / name) for name in ("00000.parquet", "0.tar")]
    assert list(read_training_texts(paths)) == ["one", "five"]
    arrow = str(tmp_path / "a.arrow")
    assert list(read_training_texts([arrow], "raw")) == ["two", "three", "four"]
    with pytest.raises(DataError, match=r"no column text or caption or captions; it has raw: name"):
        list(read_training_texts([arrow]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"a\.jsonl: line 2: not a string"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a\.jsonl: line 2: invalid JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl: line 1: invalid Unicode"),
        ("a.jsonl", b'{"id": "12", "url": "x"}', r"line 1: no key text or .*; it has id, url"),
        ("a.txt", b"fine\n\xff\xfe\n", r"a\.txt: line 2: invalid UTF-8"),
        ("a.txt", b" \n\n", r"a\.txt holds no text"),
        ("a.json", b'{"images": [{"id": 3}]}', r'a\.json: "images", entry 0: no caption'),
        ("a.json", b'{\n"images": 3}', r"a\.json: no captions of a known layout; it has images"),
        ("a.json", b"[1, 2]", r"a\.json: entry 0: neither \[path, caption\] nor"),
        ("a.json", b'{"annotations": [{"caption": 1}]}', r'"annotations", entry 0: not a string'),
        ("a.pdf", b"%PDF-1.7\n", "a PDF"),
        ("a.tsv", b"one\ttwo\tthree\n", "columns"),
    ],
)
def test_bad_training_texts_name_file_and_record(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        for item in read_training_texts([str(tmp_path / name)]):
            if isinstance(item, Reject):
                raise DataError(str(item))
