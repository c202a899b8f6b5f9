"""Indexing in shards and at addresses: what is merged is what one run writes, to the byte."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import fsspec
import pytest
from data_files import files_of, tool
from sharded_inputs import KINDS, Arguments, prepared, same_files, text_lines

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.schema import DataConfig
from megatron_vlmoe.data.manifest import check_dataset, load_manifest
from megatron_vlmoe.data.sources import open_sources

merge = tool("merge_datasets")


@pytest.mark.parametrize("count", [3, 24])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_shards_are_one_run(
    kind: str, count: int, tmp_path: Path, tiny_tokenizer: str
) -> None:
    """Also with more shards than there are parts, some of which get nothing."""
    index, words = prepared(kind, tmp_path, tiny_tokenizer)
    whole, merged = tmp_path / "whole", tmp_path / "merged"
    assert index([*words, "--output", str(whole / "p")]) == 0
    shards = tmp_path / "shards"
    for number in reversed(range(count)):
        assert index([*words, "--output", f"{shards}/p", "--shard", f"{number}/{count}"]) == 0
    assert merge(["--shards", f"{shards}/p", "--output", f"{merged}/p"]) == 0
    for path in merged.glob("*.json"):
        path.write_text(path.read_text().replace(f"{shards}/", f"{merged}/"))
    assert same_files(whole, merged)


def test_work_is_shared_evenly(tmp_path: Path, tiny_tokenizer: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{text}\n" for text in text_lines(4000)))
    words = ["--input", str(path), "--text-tokenizer", tiny_tokenizer, "--output", f"{tmp_path}/p"]
    for number in range(4):
        assert tool("preprocess_text")([*words, "--shard", f"{number}/4"]) == 0
    documents = [load_manifest(f"{tmp_path}/p-0000{n}-of-00004").documents for n in range(4)]
    assert sum(documents) == 4000
    assert min(documents) > 900


def test_training_on_some_shards_names_what_is_not_given(
    tmp_path: Path, tiny_tokenizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    index, words = prepared("text", tmp_path, tiny_tokenizer)
    words += ["--output", f"{tmp_path}/p"]
    for number in range(3):
        assert index([*words, "--shard", f"{number}/3"]) == 0
    shards = [f"{tmp_path}/p-0000{number}-of-00003" for number in range(3)]

    def lines(*text: str) -> list[str]:
        caplog.clear()
        sources = open_sources(DataConfig(text=list(text)), "texts", None)
        assert [item.prefix for item in sources["train"].items] == list(text)
        return caplog.messages

    (line,) = lines(shards[2], shards[0])
    assert line.startswith(f"data.text: {shards[2]} is one of 3 shards, of which 2 are given")
    assert not lines(*shards)


@pytest.mark.parametrize("kind", ["text", "task"])
def test_a_restart_does_the_shards_that_are_not_there(
    kind: str, tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    index, words = prepared(kind, tmp_path, tiny_tokenizer)
    assert index([*words, "--output", f"{tmp_path}/whole/p"]) == 0
    words += ["--output", f"{tmp_path}/sharded/p"]
    for number in (0, 2):
        assert index([*words, "--shard", f"{number}/4"]) == 0
    # What a killed worker of another machine leaves.
    left = tmp_path / "sharded" / "p-00001-of-00004_text.bin.tmp-99999999"
    left.write_bytes(b"")
    made = (tmp_path / "sharded" / "p-00002-of-00004.json").stat().st_mtime_ns
    capfd.readouterr()
    assert index([*words, "--shard", "2/4"]) == 0
    assert "shard 2/4 is complete, nothing to do" in capfd.readouterr().err
    assert (tmp_path / "sharded" / "p-00002-of-00004.json").stat().st_mtime_ns == made
    assert index([*words, "--num-shards", "4"]) == 0
    assert capfd.readouterr().err.count("is complete, nothing to do") == 2
    assert same_files(tmp_path / "whole", tmp_path / "sharded")


def test_missing_and_foreign_shards_are_named(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    index, words = prepared("lists", tmp_path, tiny_tokenizer)
    output = f"{tmp_path}/out/p"
    words += ["--output", output]

    def error_of(arguments: Arguments) -> str:
        capfd.readouterr()
        assert merge(arguments) == 1
        (line,) = capfd.readouterr().err.splitlines()
        return line

    assert "no shards (" in error_of(["--shards", output])
    for number in (0, 2):
        assert index([*words, "--shard", f"{number}/3"]) == 0
    assert "p-00001-of-00003.json: shard 1/3 is missing" in error_of(["--shards", output])
    parts = [f"{output}-0000{number}-of-00003" for number in range(3)]
    given = ["--input", parts[0], parts[2], "--output", output]
    assert "p-00002-of-00003: is shard 2/3, where shard 1/3 is due" in error_of(given)
    assert index([*words, "--shard", "1/3", "--resize-short", "16"]) == 0
    foreign = "p-00001-of-00003: shard 1/3 is of another run than "
    assert foreign in error_of(["--shards", output])
    assert index([*words, "--shard", "1/3"]) == 0
    given = ["--input", *parts[:2], "--output", output]
    assert "shard 2/3 is missing after " in error_of(given)
    assert index([*words, "--shard", "0/2"]) == 0
    assert "there are shards of 2 and of 3: " in error_of(["--shards", output])
    Path(f"{output}-00000-of-00002.json").unlink()
    path = Path(f"{parts[1]}_text.bin")
    path.write_bytes(path.read_bytes()[:-1])
    assert "its manifest says" in error_of(["--shards", output])
    assert not Path(f"{output}.json").exists()


def test_what_no_shard_has_is_an_error_of_the_merge(
    tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    index, words = prepared("lists", tmp_path, tiny_tokenizer)
    words += ["--output", f"{tmp_path}/p", "--split", "train", "vall"]
    assert index(words) == 1
    for number in range(2):
        assert index([*words, "--shard", f"{number}/2"]) == 0
    capfd.readouterr()
    assert merge(["--shards", f"{tmp_path}/p"]) == 1
    assert "no image of split vall" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "3/3"], "--shard 3/3: of 3 shards there is no 3, only 0 to 2"),
        (["--shard", "0/0"], "--shard 0/0: of 0 shards there is no 0, only none"),
        (["--shard", "1"], "--shard 1: expected I/N, as 0/16 for the first of 16 shards"),
        (["--shard", "-1/3"], "--shard"),
        (["--shard", "0/3", "--num-shards", "3"], "leave out --num-shards, or --shard"),
        (["--shard", "0/3", "--executor", "ray"], "leave out --executor ray, or --shard"),
        (["--ray-address", "auto"], "--ray-address is for --executor ray"),
    ],
)
def test_wrong_options(
    options: Arguments,
    message: str,
    tmp_path: Path,
    tiny_tokenizer: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.txt").write_text("a star\n")
    words = ["--input", str(tmp_path / "a.txt"), "--text-tokenizer", tiny_tokenizer]
    assert tool("preprocess_text")([*words, "--output", f"{tmp_path}/p", *options]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line


def test_missing_ray_is_one_line(
    tmp_path: Path,
    tiny_tokenizer: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.txt").write_text("a star\n")
    words = ["--input", str(tmp_path / "a.txt"), "--text-tokenizer", tiny_tokenizer]
    words += ["--output", f"{tmp_path}/p", "--executor", "ray"]
    assert tool("preprocess_text")(words) == 1
    needed = 'error: --executor ray needs Ray: pip install "megatron-vlmoe[ray]"\n'
    assert capfd.readouterr().err == needed


@pytest.fixture
def bucket() -> str:
    """An address in this process's memory, empty."""
    return f"memory://{uuid.uuid4().hex}"


def upload(folder: Path, address: str) -> None:
    system, path = fsspec.core.url_to_fs(address)
    system.put(str(folder), path, recursive=True)


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("kind", ["text", "images", "tars", "files", "tables"])
def test_remote_files_are_read_and_written(
    kind: str, scheme: str, tmp_path: Path, tiny_tokenizer: str, bucket: str
) -> None:
    """In one run and in shards; what is said of inputs has their addresses."""
    index, words = prepared(kind, tmp_path, tiny_tokenizer)
    if scheme == "file":
        bucket = f"file://{tmp_path}/bucket"
    upload(tmp_path / "raw", f"{bucket}/raw")
    raw = str(tmp_path / "raw")
    assert index([*words, "--output", f"{tmp_path}/whole/p"]) == 0
    remote = [word.replace(raw, f"{bucket}/raw") for word in words]
    assert index([*remote, "--output", f"{bucket}/one/p"]) == 0
    for number in range(2):
        assert index([*remote, "--output", f"{bucket}/two/p", "--shard", f"{number}/2"]) == 0
    assert merge(["--shards", f"{bucket}/two/p"]) == 0
    assert index([*remote, "--output", f"{bucket}/all/p", "--num-shards", "2"]) == 0
    assert merge(["--input", f"{bucket}/one/p", "--output", f"{tmp_path}/fetched/p"]) == 0
    whole = load_manifest(tmp_path / "whole" / "p")
    check_dataset(tmp_path / "fetched" / "p", whole.kind, checksums=True)
    system, path = fsspec.core.url_to_fs(bucket)
    names = files_of(tmp_path / "whole")
    assert sorted(Path(one).name for one in system.ls(f"{path}/all", detail=False)) == names
    for name in names:
        expected = (tmp_path / "whole" / name).read_bytes()
        for place in ("one", "two", "all"):
            stored = system.cat_file(f"{path}/{place}/{name}")
            for here, there in ((f"{bucket}/raw", raw), (f"{bucket}/{place}", f"{tmp_path}/whole")):
                stored = stored.replace(here.encode(), there.encode())
            assert stored == expected, (place, name)


def test_what_reads_no_address_names_it_as_it_was_given() -> None:
    with pytest.raises(DataError, match=r"^s3://a/b: must be a local path; "):
        load_manifest("s3://a/b")


def test_a_manifest_is_uploaded_last(
    tmp_path: Path, tiny_tokenizer: str, bucket: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where an upload fails, no manifest vouches for what is there, not even an earlier one."""
    index, words = prepared("text", tmp_path, tiny_tokenizer)
    words += ["--output", f"{bucket}/p"]
    assert index(words) == 0
    system, path = fsspec.core.url_to_fs(bucket)

    def full(local: str, place: str, **_: object) -> None:
        if place.endswith(".idx"):
            raise OSError("no space")
        assert not system.exists(f"{path}/p.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(system), "put_file", lambda self, *names, **more: full(*names, **more))
        capfd.readouterr()
        assert index(words) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == f"error: {bucket}/p_text_document.idx: no space"
    assert not system.exists(f"{path}/p.json")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("preprocess_text", ["--input", "memory://none/a.txt"], "memory://none/a.txt: not found"),
        ("preprocess_text", ["--input", "nosuch://a"], "nosuch://a: "),
        ("preprocess_text", ["--input", "reference://a"], "reference://a: "),
        (
            "preprocess_text",
            ["--input", "zip://a::memory://none.zip"],
            "zip://a::memory://none.zip: ",
        ),
        ("preprocess_text", ["--input", "s3://a/b"], "pip install s3fs"),
        ("preprocess_text", ["--input", "gs://a/b"], "pip install gcsfs"),
        (
            "preprocess_pairs",
            ["--annotations", "memory://a/f", "--images", "memory://a/i", "--format", "jsonl"],
            "memory://a/i: --format jsonl reads images from a local folder",
        ),
        (
            "prepare_task",
            ["--task", "nlvr2", "--raw", "memory://a"],
            "memory://a: --raw must be a local path",
        ),
    ],
)
def test_addresses_that_are_not_read(
    command: str,
    options: Arguments,
    message: str,
    tmp_path: Path,
    tiny_tokenizer: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    words = [*options, "--text-tokenizer", tiny_tokenizer, "--output", f"{tmp_path}/p"]
    assert tool(command)(words) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
