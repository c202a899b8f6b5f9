"""Indexed files and manifests: the format, damage, and interruption."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data import indexed
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter, token_dtype
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    FileRecord,
    check_dataset,
    length_percentiles,
    load_manifest,
    stage_manifest,
)

DOCUMENTS = [
    [np.array([5, 6, 7]), np.array([8])],
    [np.array([9, 10])],
    [np.array([1]), np.array([2, 3, 4, 5]), np.array([60000])],
]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    path = str(tmp_path / "a_text")
    with IndexedWriter(path, np.uint16) as writer:
        for document in DOCUMENTS:
            writer.add_document(document)
    return path


def assert_documents(reader: IndexedReader, documents: list[list[np.ndarray]]) -> None:
    assert reader.num_documents == len(documents)
    for i, document in enumerate(documents):
        read = reader.document(i)
        assert [s.tolist() for s in read] == [s.tolist() for s in document]


def test_reads_what_was_written(prefix: str) -> None:
    reader = IndexedReader(prefix)
    assert_documents(reader, DOCUMENTS)
    assert reader.sequence_lengths.tolist() == [3, 1, 2, 1, 4, 1]
    assert reader.document_indices.tolist() == [0, 2, 3, 6]
    assert (reader.num_sequences, reader.num_items) == (6, 12)
    assert [reader.items_before(i) for i in range(7)] == [0, 3, 4, 6, 7, 11, 12]
    assert [reader.count_longer(n, range(1, 6)) for n in (0, 1, 2, 4)] == [5, 2, 1, 0]
    assert reader.sequence(4).dtype == np.uint16
    assert reader.sequence_slice(4, 1, 2).tolist() == [3, 4]
    with pytest.raises(IndexError):
        reader.sequence_slice(4, 3, 2)
    with pytest.raises(IndexError):
        reader.document(3)


def test_bytes_are_the_documented_format(prefix: str) -> None:
    expected = (
        b"MMIDIDX\x00\x00"
        + (1).to_bytes(8, "little")
        + bytes([8])
        + (6).to_bytes(8, "little")
        + (4).to_bytes(8, "little")
        + np.array([3, 1, 2, 1, 4, 1], "<i4").tobytes()
        + np.array([0, 6, 8, 12, 14, 22], "<i8").tobytes()
        + np.array([0, 2, 3, 6], "<i8").tobytes()
    )
    assert Path(f"{prefix}.idx").read_bytes() == expected
    flat = np.array([5, 6, 7, 8, 9, 10, 1, 2, 3, 4, 5, 60000], "<u2")
    assert Path(f"{prefix}.bin").read_bytes() == flat.tobytes()


def test_stock_megatron_reads_it_and_we_read_stock(prefix: str, tmp_path: Path) -> None:
    stock = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    dataset = stock.IndexedDataset(prefix)
    flat = [sequence for document in DOCUMENTS for sequence in document]
    assert [dataset[i].tolist() for i in range(len(dataset))] == [s.tolist() for s in flat]
    assert dataset.document_indices.tolist() == [0, 2, 3, 6]
    theirs = str(tmp_path / "stock")
    builder = stock.IndexedDatasetBuilder(f"{theirs}.bin", dtype=np.uint16)
    for document in DOCUMENTS:
        builder.add_document(np.concatenate(document), [len(s) for s in document])
    builder.finalize(f"{theirs}.idx")
    assert_documents(IndexedReader(theirs), DOCUMENTS)
    for suffix in (".bin", ".idx"):
        assert Path(theirs + suffix).read_bytes() == Path(prefix + suffix).read_bytes()
    for size in (100, 65499, 65500, 65535, 65536, 250000):
        assert token_dtype(size) == np.dtype(stock.DType.optimal_dtype(size))


def test_bulk_blocks_equal_single_documents(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_BLOCK_ITEMS", 2)
    bulk, copy = str(tmp_path / "bulk"), str(tmp_path / "copy")
    flat = [sequence for document in DOCUMENTS for sequence in document]
    with IndexedWriter(bulk, np.uint16) as writer:
        lengths = np.array([len(s) for s in flat])
        writer.add_documents(np.concatenate(flat), lengths, np.array([2, 1, 3]))
    with IndexedWriter(copy, np.uint16) as writer:
        writer.add_dataset(IndexedReader(prefix))
        writer.add_dataset(IndexedReader(bulk))
    for suffix in (".bin", ".idx"):
        assert Path(bulk + suffix).read_bytes() == Path(prefix + suffix).read_bytes()
    assert_documents(IndexedReader(copy), DOCUMENTS + DOCUMENTS)


def test_checksums_of_finish_are_of_the_files(tmp_path: Path) -> None:
    writer = IndexedWriter(str(tmp_path / "a"), np.int32)
    writer.add_document([np.array([1, 2, 3])])
    records = writer.finish()
    assert not (tmp_path / "a.bin").exists()
    writer.publish()
    for suffix, record in records.items():
        data = (tmp_path / f"a{suffix}").read_bytes()
        assert record == FileRecord(len(data), hashlib.sha256(data).hexdigest())


def test_items_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for bad in (65536, -1):
        with (
            pytest.raises(DataError, match="does not fit uint16"),
            IndexedWriter(str(tmp_path / "a"), np.uint16) as writer,
        ):
            writer.add_document([np.array([1, bad])])
    assert not list(tmp_path.iterdir())


def test_interrupted_or_empty_writer_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        IndexedWriter(str(tmp_path / "a"), np.uint8) as writer,
    ):
        writer.add_document([np.array([1])])
        assert [p.suffix for p in tmp_path.iterdir() if p.suffix in (".bin", ".idx")] == []
        raise KeyboardInterrupt
    with (
        pytest.raises(DataError, match="nothing to write"),
        IndexedWriter(str(tmp_path / "a"), "u1"),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("change", ["truncate", "grow", "remove", "empty"])
def test_damaged_files_are_named(prefix: str, suffix: str, change: str) -> None:
    path = Path(prefix + suffix)
    data = path.read_bytes()
    if change == "remove":
        path.unlink()
    else:
        path.write_bytes({"truncate": data[:-1], "grow": data + b"12345678", "empty": b""}[change])
    with pytest.raises(DataError, match=f"a_text{suffix}"):
        IndexedReader(prefix)


def test_index_of_another_file_is_refused(prefix: str) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[-8:] = (5).to_bytes(8, "little")  # documents end before the last sequence
    Path(f"{prefix}.idx").write_bytes(bytes(data))
    with pytest.raises(DataError, match="do not cover"):
        IndexedReader(prefix)
    Path(f"{prefix}.idx").write_bytes(b"x" * len(data))
    with pytest.raises(DataError, match="not an index"):
        IndexedReader(prefix)


def test_pickles_without_its_maps(prefix: str) -> None:
    reader = IndexedReader(prefix)
    reader.sequence(0)
    data = pickle.dumps(reader)
    assert len(data) < 1000
    assert_documents(pickle.loads(data), DOCUMENTS)


def test_length_percentiles_by_hand() -> None:
    lengths = np.array([7] * 50 + [9] * 40 + [11] * 9 + [40])
    assert length_percentiles(lengths) == {"p50": 7, "p90": 9, "p99": 11, "max": 40}
    assert length_percentiles(np.array([3])) == {"p50": 3, "p90": 3, "p99": 3, "max": 3}
    assert length_percentiles(np.array([1, 2, 3])) == {"p50": 2, "p90": 3, "p99": 3, "max": 3}


@pytest.fixture
def manifest(prefix: str, tmp_path: Path) -> tuple[str, DatasetManifest]:
    for suffix in (".bin", ".idx"):
        os.replace(prefix + suffix, tmp_path / f"a_text_document{suffix}")
    files = {}
    for suffix in (".bin", ".idx"):
        data = (tmp_path / f"a_text_document{suffix}").read_bytes()
        record = FileRecord(len(data), hashlib.sha256(data).hexdigest())
        files[f"_text_document{suffix}"] = record
    result = DatasetManifest("text", 3, 6, 12, 24, files, {"command": "c"}, 0, "f00d", 1000)
    stage_manifest(tmp_path / "a", result).publish()
    return str(tmp_path / "a"), result


def test_manifest_round_trip_and_checks(manifest: tuple[str, DatasetManifest]) -> None:
    prefix, written = manifest
    assert load_manifest(prefix) == written
    assert check_dataset(prefix, "text", "f00d", checksums=True) == written
    with pytest.raises(DataError, match=r"a\.json.*of text"):
        check_dataset(prefix, "pairs")
    with pytest.raises(DataError, match=r"a\.json.*another tokenizer"):
        check_dataset(prefix, "text", "beef")
    path = Path(f"{prefix}_text_document.bin")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    check_dataset(prefix, "text")
    with pytest.raises(DataError, match=r"a_text_document\.bin.*checksum"):
        check_dataset(prefix, "text", checksums=True)
    path.write_bytes(bytes(data[:-2]))
    with pytest.raises(DataError, match=r"a_text_document\.bin: 22 bytes.*24"):
        check_dataset(prefix, "text")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: {**raw, "format_version": 3}, "newer"),
        *(
            (
                lambda raw, bad=bad: {**raw, "format_version": bad},
                f"damaged: format_version is {bad!r}",
            )
            for bad in (0, -1, True, 1.5, "2", None)
        ),
        # It may be of a plug-in that is not installed here.
        (lambda raw: {**raw, "kind": "sounds"}, ": a dataset of 'sounds', .* install its plug-in"),
        (lambda raw: {**raw, "documents": "3"}, "damaged"),
        (lambda raw: {**raw, "files": {}}, "damaged"),
        (lambda raw: {**raw, "surprise": 1}, "damaged"),
        (lambda raw: [raw], "damaged"),
    ],
)
def test_bad_manifests_are_named(
    manifest: tuple[str, DatasetManifest], change: object, message: str
) -> None:
    path = Path(f"{manifest[0]}.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"a\.json.*{message}"):
        load_manifest(manifest[0])


def test_cut_or_missing_manifest_is_named(manifest: tuple[str, DatasetManifest]) -> None:
    path = Path(f"{manifest[0]}.json")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.json: damaged"):
        load_manifest(manifest[0])
    path.unlink()
    with pytest.raises(DataError, match=r"a\.json: not found"):
        load_manifest(manifest[0])


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (4 * 1, b"\x09"),
        (4 * 2 + 3, b"\x80"),
        (4 * 6 + 8 * 3, b"\x40"),
        (4 * 6 + 8 * 4 + 7, b"\x80"),
    ],
    ids=["length", "negative length", "offset", "negative offset"],
)
def test_a_damaged_body_of_the_index_is_named(prefix: str, place: int, value: bytes) -> None:
    path, header = Path(f"{prefix}.idx"), 9 + 8 + 1 + 8 + 8
    content = bytearray(path.read_bytes())
    content[header + place : header + place + 1] = value
    path.write_bytes(content)
    reader = IndexedReader(prefix)
    with pytest.raises(DataError, match=r"\.idx: damaged: sequence"):
        for index in range(reader.num_sequences):
            reader.sequence(index)


def test_documents_of_sequences_that_are_not_there_are_named(prefix: str) -> None:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[-16:-8] = (99).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"\.idx: damaged: document 1"):
        IndexedReader(prefix).document(1)
