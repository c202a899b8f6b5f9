"""What SECURITY.md says of files that nobody has checked, and of packages."""

from __future__ import annotations

import ast
import gzip
import io
import os
import pickle
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_checkpoints as small
import torch
from packaging.requirements import Requirement

from megatron_vlmoe.config.command_line import merge_file
from megatron_vlmoe.config.errors import CheckpointError, ConfigError, ConvertError, DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.yaml_files import parse_yaml
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.data.codes import CodesReader
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.inference.records import read_records
from megatron_vlmoe.prepare.readers.files import load_json
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.pair_formats import read_pairs
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.records import ImageFile, Reject
from megatron_vlmoe.prepare.readers.tables import read_columns
from megatron_vlmoe.prepare.readers.text import read_training_texts
from megatron_vlmoe.tokenizers.vqkd.config import VQKDConfig, build_preset
from megatron_vlmoe.train.checkpoint_files import check_harmless, find_checkpoint

ROOT = Path(__file__).resolve().parents[2]


class Runs:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


# ---- checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = small.CONFIGS["dense"]
    return small.save(tmp_path / "run", config, small.random_tensors(config))


def poison_contents(checkpoint: Path, made: Path) -> None:
    """Puts it into the table of contents."""
    file = checkpoint / ".metadata"
    table = pickle.loads(file.read_bytes())
    table.planner_data = Runs(made)
    file.write_bytes(pickle.dumps(table))


def poison_state(checkpoint: Path, made: Path) -> None:
    """Puts it among what is stored besides tensors."""
    file = checkpoint / ".metadata"
    table = pickle.loads(file.read_bytes())
    index, place = next((i, p) for i, p in table.storage_data.items() if "_extra_state" in i.fqn)
    stream = io.BytesIO()
    torch.save(Runs(made), stream)
    with open(checkpoint / place.relative_path, "ab") as data:
        place.offset, place.length = data.tell(), data.write(stream.getvalue())
    file.write_bytes(pickle.dumps(table))


@pytest.mark.parametrize("poison", [poison_contents, poison_state])
def test_a_checkpoint_that_would_run_something_is_refused_first(
    checkpoint: Path, tmp_path: Path, poison: Any
) -> None:
    made = tmp_path / "made"
    check_harmless(checkpoint)
    poison(checkpoint, made)
    # Who means harm writes the sums as well.
    small.sum_again(checkpoint)
    with pytest.raises(ConvertError, match="names posix.mkdir, which no checkpoint needs"):
        CheckpointReader(checkpoint)
    # What training reads comes through these two.
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_vlmoe.train.checkpoint import load_sharded
    from megatron_vlmoe.train.resume import CheckpointWeights

    with pytest.raises(CheckpointError, match="names posix.mkdir"):
        load_sharded({}, checkpoint, StrictHandling.RAISE_UNEXPECTED, in_parallel=False)
    with pytest.raises(CheckpointError, match="names posix.mkdir"):
        CheckpointWeights(checkpoint, verify=False)
    assert not made.exists()


def test_a_marker_that_is_nested_too_deeply_is_damaged(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").write_text("[" * 20_000)
    with pytest.raises(CheckpointError, match="metadata.json is damaged"):
        find_checkpoint(checkpoint.parent)


# ---- settings


@pytest.mark.parametrize(
    "text, reason",
    [
        ("moe: !!python/object/apply:os.abort []", "could not determine a constructor"),
        ("moe: " + "[" * 200_000, "nested too deeply"),
        ("\n".join(" " * i + "a:" for i in range(1000)), "nested too deeply"),
        ("moe: 2001-99-99", "month must be in 1..12"),
        ("\n".join(["a: &a0 [x, x]", *(f"b{i}: &a{i + 1} [{f'*a{i}, ' * 9}]" for i in range(9))]),
         "aliases stand for more than 1000000 values"),
        ("train: {steps: 0x" + "f" * 5000 + "}", "Exceeds the limit"),
        ("optim: {clip_grad: 1" + "0" * 400 + "}", "expected a number"),
        ("a: &a [*a]", "aliases stand for more than 1000000 values"),
        ("moe: {layers: '[!!bool x, 2]'}", "as a list"),
    ],
)  # fmt: skip
def test_yaml_that_is_more_than_values_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        merge_file(RunConfig(), file)


@pytest.mark.parametrize(
    "value",
    [
        *["!!timestamp x", "!!int ''", "!!float ''", "!!bool x", "!!set [a, {b: c}]", "!!set [[]]"],
        *["'!!timestamp x'", "'!!bool x'", "'[!!int x]'", "!!omap [a]", "!!binary \u00e9"],
    ],
)
def test_a_value_that_is_not_what_its_tag_says_is_refused(tmp_path: Path, value: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"train: {{steps: {value}}}", encoding="utf-8")
    with pytest.raises(ConfigError, match="not valid YAML|expected a whole number"):
        merge_file(RunConfig(), file)


def test_aliases_are_read() -> None:
    assert parse_yaml("a: &a [1, 2]\nb: [*a, *a]") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize("name, value", [("pixel_std", [0.5]), ("commitment", "1"), ("depth", 1.5)])
def test_an_image_tokenizer_of_other_types_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} is "):
        VQKDConfig.from_dict({**build_preset("tiny").to_dict(), name: value})


def test_errors_are_one_line_without_signs_that_terminals_obey() -> None:
    assert str(DataError("a\nb\x1b[2J")) == "a b\\x1b[2J"
    assert len(str(DataError("a" * 10**6))) < 2100


# ---- data


def damage_index(prefix: Path, place: int, value: bytes) -> IndexedReader:
    """An index of two documents of one sequence each, of 3 bytes, with some bytes of its .idx replaced."""
    with IndexedWriter(str(prefix), np.uint8) as writer:
        for _ in range(2):
            writer.add_document([np.arange(3, dtype=np.uint8)])
    file = Path(f"{prefix}.idx")
    content = bytearray(file.read_bytes())
    content[place : place + len(value)] = value
    file.write_bytes(content)
    return IndexedReader(str(prefix))


@pytest.mark.parametrize("length", [-1, -7, 2**30])
def test_a_length_that_its_file_has_not_is_named(tmp_path: Path, length: int) -> None:
    reader = damage_index(tmp_path / "x", 34, length.to_bytes(4, "little", signed=True))
    with pytest.raises(DataError, match=r"x\.idx: damaged: sequence 0 is said to be"):
        reader.sequence(0)


def test_an_offset_that_its_file_has_not_is_named(tmp_path: Path) -> None:
    reader = damage_index(tmp_path / "x", 42, (2**40).to_bytes(8, "little"))
    with pytest.raises(DataError, match=r"x\.idx: damaged: sequence 0"):
        reader.sequence_slice(0, 1, 1)


def test_a_document_of_no_sequences_of_its_file_is_named(tmp_path: Path) -> None:
    reader = damage_index(tmp_path / "x", 66, (-5).to_bytes(8, "little", signed=True))
    with pytest.raises(DataError, match=r"x\.idx: damaged: document 0"):
        reader.document(0)


@pytest.mark.parametrize("field", ['"grid": [2]', '"num_codes": "5"', '"files": {"/x": {}}'])
def test_a_manifest_of_codes_of_other_types_is_damaged(tmp_path: Path, field: str) -> None:
    numbers = {"num_images": 1, "num_views": 1, "resolution": 8, "grid": 2, "num_codes": 5}
    parts = [f'"{name}": {number}' for name, number in numbers.items()]
    parts += ['"image_bytes": 1', '"seed": 0', '"min_scale": 1', '"flip_probability": 1']
    parts += ['"tokenizer_fingerprint": "f"', '"files": {}', field]
    (tmp_path / "x_codes.json").write_text("{" + ", ".join(parts) + "}")
    with pytest.raises(DataError, match="x_codes.json: damaged: not a manifest of codes"):
        CodesReader(tmp_path / "x")


def arrow_file(path: Path, columns: dict[str, Any]) -> bytes:
    """Writes an Arrow stream; its content."""
    import pyarrow as pa

    table = pa.table(list(columns.values()), names=[name.strip("2") for name in columns])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return path.read_bytes()


def test_lists_of_an_arrow_file_that_reach_beyond_it_end_no_process(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    content = arrow_file(path, {"captions": [["one", "two"], ["three"]]})
    offsets = np.array([0, 2, 3], "<i4").tobytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.array([0, 2, 70_000], "<i4").tobytes()))
    ((row, reject),) = read_columns(str(path), {"captions": "any"}, 8)
    assert isinstance(reject, Reject) and "unreadable from here on" in reject.reason and row == 0


def test_a_column_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    content = arrow_file(tmp_path / "x.arrow", {"caption": ["a"]})
    (tmp_path / "x.arrow").write_bytes(content.replace(b"caption", b"\xff" * 7))
    with pytest.raises(DataError, match="x.arrow: the name of a column is not UTF-8"):
        list(read_columns(str(tmp_path / "x.arrow"), {"caption": "text"}, 8))


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    arrow_file(tmp_path / "x.arrow", {"text": ["a"], "text2": ["b"]})
    with pytest.raises(DataError, match="x.arrow: has several columns 'text'"):
        list(read_columns(str(tmp_path / "x.arrow"), {"text": "text"}, 8))


def test_a_table_with_a_line_end_in_its_first_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tsv").write_bytes(b"id\rx\ttext\n1\ta\n")
    with pytest.raises(DataError, match="x.tsv"):
        list(read_training_texts([str(tmp_path / "x.tsv")], "caption"))


def test_an_address_that_is_none_was_not_downloaded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "b.png").write_bytes(b"")
    (tmp_path / "x.tsv").write_text("one\thttp://[x/a.jpg\ntwo\thttp://x/b.png\n")
    source = PairInput("cc3m", (str(tmp_path / "x.tsv"),), str(tmp_path / "images"))
    _, reject = read_pairs(source)
    assert isinstance(reject, Reject) and "not downloaded: http://[x/a.jpg" in reject.reason


def test_a_file_of_json_that_is_one_number_has_no_texts(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text("7")
    with pytest.raises(DataError, match="x.json: neither a JSON list nor a JSON object"):
        list(read_training_texts([str(file)]))


# ---- archives


def test_compressed_json_that_is_very_much_longer_is_a_bomb(tmp_path: Path) -> None:
    for name in ("x.json.gz", "x.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"[" + b" " * (70 << 20), 1))
    with pytest.raises(DataError, match="x.json.gz: decompression bomb: more than 200 times"):
        load_json(str(tmp_path / "x.json.gz"))
    with pytest.raises(DataError, match="x.jsonl.gz: decompression bomb"):
        read_records(tmp_path / "x.jsonl.gz")


def tar_with(path: Path, info: tarfile.TarInfo, content: bytes = b"") -> list[Any]:
    """What is found in a tar of one member, whose header is as given."""
    path.write_bytes(info.tobuf() + content + bytes(1024))
    return list(read_images((str(path),)))


def test_a_member_that_is_longer_than_its_tar_takes_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    for found in tar_with(tmp_path / "x.tar", info):
        if isinstance(found, ImageFile):
            with pytest.raises(DataError, match="x.tar ends inside it"):
                found.read()


def test_a_sparse_member_of_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(1 << 40)}
    header = info.tobuf(format=tarfile.PAX_FORMAT)
    path = tmp_path / "x.tar"
    path.write_bytes(header + bytes(1024))
    (found,) = read_images((str(path),))
    assert isinstance(found, Reject) and "longer than 1073741824 bytes" in found.reason


def test_a_header_of_gzip_that_ends_is_a_damaged_tar(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b\x08")
    (found,) = read_images((str(tmp_path / "x.tar.gz"),))
    assert isinstance(found, Reject) and "damaged tar" in found.reason


def test_a_header_of_pax_without_a_number_is_a_damaged_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.size": "x"}
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(format=tarfile.PAX_FORMAT) + bytes(1024))
    (found,) = read_images((str(path),))
    assert isinstance(found, Reject) and "damaged tar" in found.reason


def test_a_record_of_pax_of_endless_length_is_a_damaged_tar(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"comment": "x" * 40}
    content = info.tobuf(format=tarfile.PAX_FORMAT)
    number = b"52 comment=" + b"x" * 15
    assert number in content
    path = tmp_path / "x.tar"
    path.write_bytes(content.replace(number, b"9" * 20 + b" a=xxx") + bytes(1024))
    (found,) = read_images((str(path),))
    assert isinstance(found, Reject) and "damaged tar" in found.reason


@pytest.mark.parametrize("packed", [bytes, gzip.compress])
@pytest.mark.parametrize("size", [2**50, 2**63])
def test_a_member_that_ends_far_behind_its_tar_is_damaged_at_once(
    tmp_path: Path, size: int, packed: Callable[[bytes], bytes]
) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    (tmp_path / "x.tar").write_bytes(packed(info.tobuf(format=tarfile.GNU_FORMAT) + bytes(1024)))
    *_, found = read_images((str(tmp_path / "x.tar"),))
    assert isinstance(found, Reject) and "damaged tar" in found.reason


def test_tars_in_tars_without_end_are_a_damaged_tar(tmp_path: Path) -> None:
    content = b""
    for _ in range(1500):
        info = tarfile.TarInfo("a.tar")
        info.size = len(content)
        content = info.tobuf() + content + bytes(-len(content) % 512)
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    (found,) = read_images((str(tmp_path / "x.tar"),))
    assert isinstance(found, Reject) and "damaged tar" in found.reason


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_of_a_tar_lead_to_nothing_outside(tmp_path: Path, kind: bytes) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    info = tarfile.TarInfo("../a.jpg")
    info.type, info.linkname = kind, str(tmp_path / "secret.jpg")
    (found,) = tar_with(tmp_path / "x.tar", info)
    assert isinstance(found, Reject) and "which is no file of the tar" in found.reason
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.jpg", "x.tar"]


# ---- programs


DANGEROUS_OPTIONS = {"shell": "False", "weights_only": "True", "allow_pickle": "False"}


def calls_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What is called in a Python file, and the options that matter."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            options = {
                k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in DANGEROUS_OPTIONS
            }
            yield ast.unparse(node.func), options


RUNNING = re.compile(
    r"eval|exec|os\.(system|popen)|pickle\.loads?|marshal\.loads?|.*\.unsafe_load|yaml\.(load|full_load)"
)
ALLOWED = {
    ("convert/public/torch_files.py", "load"),  # where a user gives --allow-pickle
    ("runtime/results_queue.py", "pickle.loads"),  # of another process of the same run
    ("config/yaml_files.py", "yaml.load"),  # with a loader that makes plain values
}


def test_no_text_of_others_is_run() -> None:
    for path in sorted((ROOT / "megatron_vlmoe").rglob("*.py")):
        name = str(path.relative_to(ROOT / "megatron_vlmoe"))
        for called, options in calls_of(path):
            if (name, called) not in ALLOWED:
                assert not RUNNING.fullmatch(called), f"{name}: {called}"
                for option, value in options.items():
                    # What a caller is handed it has from an option of a user.
                    safe = value in (DANGEROUS_OPTIONS[option], option) or "." in value
                    assert safe, f"{name}: {called}({option}={value})"


def test_scripts_run_no_value_of_a_variable() -> None:
    for path in sorted((ROOT / "examples").rglob("*.sh")):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            words = line.partition("#")[0]
            # A program between single quotes is always the same.
            assert not re.search(r"(^|[;&|]\s*)\s*eval\b|\b(ba)?sh -c (?!')", words), (
                f"{path}:{number}"
            )


# ---- packages


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_has_what_the_requirements_allow(python: str) -> None:
    text = (ROOT / "requirements.lock").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    assert "://" not in text and not re.search(r"(?i)index-url|find-links|file:", text)
    entries = re.split(r"(?m)^(?=[a-z0-9-]+==)", body)[1:]
    assert all("--hash=sha256:" in entry for entry in entries)
    environment = {"python_version": python, "python_full_version": f"{python}.0"}

    def meant(line: str) -> Requirement | None:
        wanted = Requirement(line)
        return wanted if not wanted.marker or wanted.marker.evaluate(environment) else None

    locked = [one for entry in entries if (one := meant(entry.split(" \\\n")[0]))]
    pinned = {one.name: str(one.specifier).removeprefix("==") for one in locked}
    assert len(pinned) == len(locked)
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    for line in (line for line in lines if line and not line.startswith("#")):
        if wanted := meant(line):
            if wanted.name == "torch":
                assert "torch" not in pinned
            else:
                assert wanted.specifier.contains(pinned[wanted.name]), line
