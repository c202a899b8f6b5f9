"""Preprocessing tools through their command lines: results, bad input, merging, inspecting."""

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from data_files import ROOT, encoded, files_of, picture, rejects_of, sentence, tool
from PIL import Image

from megatron_vlmoe.data import indexed
from megatron_vlmoe.data.image_files import quiet_pillow
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import check_dataset, load_manifest
from megatron_vlmoe.prepare import tool as preprocess
from megatron_vlmoe.prepare.corpora import checked_image
from megatron_vlmoe.tokenizers.text import TextTokenizer


@pytest.fixture
def model(tiny_tokenizer: str) -> str:
    """A tiny tokenizer file."""
    return tiny_tokenizer


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "p"


def text_arguments(out: Path, model: str, *inputs: Path) -> list[str]:
    names = [str(path) for path in inputs]
    return ["--input", *names, "--output", str(out), "--text-tokenizer", model]


def write_texts(path: Path, count: int) -> list[str]:
    texts = [" ".join(sentence(i + k) for k in range(1 + i % 4)) for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def test_text_is_what_the_tokenizer_says(tmp_path: Path, out: Path, model: str) -> None:
    texts = write_texts(tmp_path / "a.jsonl", 40)
    (tmp_path / "b.txt").write_text("two of the star\n\na red circle\n")
    arguments = text_arguments(out, model, tmp_path / "a.jsonl", tmp_path / "b.txt")
    # Of a process that was killed, Linux numbers none as high; of one that runs, and of another dataset.
    kept = [f"p_text_document.bin.tmp-{os.getppid()}", "p2_text_document.bin.tmp-4194305"]
    for name in (*kept, "p_text_document.bin.tmp-4194305", "p.json.tmp-4194305"):
        (out.parent / name).touch()
    assert tool("preprocess_text")(arguments) == 0
    for name in kept:
        (out.parent / name).unlink()
    reference = sentencepiece.SentencePieceProcessor(model_file=model)
    expected = [reference.encode(t) for t in [*texts, "two of the star", "a red circle"]]
    reader = IndexedReader(f"{out}_text_document")
    assert [[s.tolist() for s in reader.document(i)] for i in range(42)] == [[e] for e in expected]
    assert reader.dtype == np.uint16
    manifest = check_dataset(out, "text", TextTokenizer(model).fingerprint, checksums=True)
    assert (manifest.documents, manifest.sequences) == (42, 42)
    assert manifest.tokens == sum(map(len, expected)) == manifest.bytes // 2
    assert manifest.vocab_size == reference.get_piece_size()
    assert manifest.source["inputs"] == arguments[1:3]
    assert files_of(out.parent) == ["p.json", "p_text_document.bin", "p_text_document.idx"]


@pytest.mark.process
def test_workers_do_not_change_the_bytes(
    tmp_path: Path, out: Path, model: str, corpus: Path
) -> None:
    write_texts(tmp_path / "a.jsonl", 3000)  # several blocks
    many = Path(f"{out}_many")
    for path, workers in ((out, "1"), (many, "2")):
        arguments = text_arguments(path, model, tmp_path / "a.jsonl")
        assert tool("preprocess_text")([*arguments, "--workers", workers]) == 0
        assert tool("preprocess_pairs")([*pair_arguments(path, model, corpus), "--workers", workers,
                                         "--on-error", "skip"]) == 0  # fmt: skip
    for part in ("text_document", "image", "text"):
        for suffix in (".bin", ".idx"):
            one, two = (Path(f"{prefix}_{part}{suffix}") for prefix in (out, many))
            assert one.read_bytes() == two.read_bytes()
    assert rejects_of(out) == rejects_of(many)


BAD_LINES = [
    (b"\xff\xfe", "invalid UTF-8 at byte 0"),
    (b'{"text": ', "invalid JSON"),
    (b'{"txet": "a"}', "no key 'text'"),
    (b"[1]", "not a JSON object"),
    (b'{"text": 5}', "not a string"),
    (b'{"text": " "}', "empty text"),
    (b'{"text": "\\ud800"}', "invalid Unicode"),
    (b"[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_bad_text_stops_with_one_line_and_leaves_nothing(
    tmp_path: Path,
    out: Path,
    model: str,
    line: bytes,
    reason: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a star"}\n' + line + b'\n{"text": "two"}\n')
    assert tool("preprocess_text")(text_arguments(out, model, tmp_path / "a.jsonl")) == 1
    (message,) = capfd.readouterr().err.splitlines()
    assert message.startswith(f"error: {tmp_path / 'a.jsonl'}: line 2: ") and reason in message
    assert files_of(out.parent) == []


def test_bad_text_is_skipped_and_listed(
    tmp_path: Path, out: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([b'{"text": "a star"}', *(line for line, _ in BAD_LINES)]))
    main = tool("preprocess_text")
    assert main([*text_arguments(out, model, path), "--on-error", "skip"]) == 0
    assert "records/s, 1 kept, 8 rejected" in capfd.readouterr().err
    found = rejects_of(out)
    assert [record for record, _ in found] == [f"line {i}" for i in range(2, 10)]
    for (_, reason), (_, expected) in zip(found, BAD_LINES, strict=True):
        assert expected in reason
    assert load_manifest(out).rejects == 8 and load_manifest(out).documents == 1
    assert load_manifest(out).counts == {"records": {"read": 9, "kept": 1, "rejected": 8}}
    write_texts(path, 2)
    assert main([*text_arguments(out, model, path), "--on-error", "skip"]) == 0
    assert not Path(f"{out}.rejects.jsonl").exists()  # that of the earlier run
    path.write_text("x\ny\n")
    assert main([*text_arguments(out, model, path), "--on-error", "skip"]) == 1
    assert "(2 rejected; the first: " in capfd.readouterr().err
    assert load_manifest(out).documents == 2  # the failed run replaced nothing


def test_missing_inputs_and_usage(
    tmp_path: Path, out: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    main = tool("preprocess_text")
    path = tmp_path / "a.txt"
    path.write_text("star\n")
    no_name = ["--input", str(path), "--output", f"{out}/", "--text-tokenizer", model]
    for arguments, status, message in (
        (text_arguments(out, model, tmp_path / "no.txt"), 1, "no.txt: not found"),
        (text_arguments(out, str(path), path), 1, "a.txt is not a SentencePiece model"),
        (text_arguments(Path(f"{path}/p"), model, path), 1, "a.txt: File exists"),
        (no_name, 2, "name"),
    ):
        assert main(arguments) == status
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    assert main([*text_arguments(out, model, path), "--workers", "0"]) == 2
    assert files_of(out.parent) == []


@pytest.mark.parametrize("place", ["bin", "idx", "json", "rejects.jsonl"])
def test_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    out: Path,
    model: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    real = os.fsync

    def full(handle: int) -> None:
        if f".{place}.tmp" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "a.jsonl").write_text('{"text": "star"}\nx\n')
    arguments = [*text_arguments(out, model, tmp_path / "a.jsonl"), "--on-error", "skip"]
    assert tool("preprocess_text")(arguments) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}") and line.endswith("No space left on device")
    assert files_of(out.parent) == []


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.process
def test_failing_writes_of_the_system_are_one_line(tmp_path: Path, out: Path, model: str) -> None:
    (tmp_path / "a.txt").write_text("two of the star\n" * 5000)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_text.py")]
    command += text_arguments(out, model, tmp_path / "a.txt")
    done = subprocess.run(
        command,
        preexec_fn=limit_file_size,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {out}") and "File too large" in line
    assert files_of(out.parent) == []


def open_when_read(fifo: Path) -> int:
    """Opens a pipe for writing once its reader has opened it."""
    deadline = time.monotonic() + 120
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            assert time.monotonic() < deadline, "nobody reads the pipe"
            time.sleep(0.02)


@pytest.mark.process
def test_terminated_tool_leaves_nothing(tmp_path: Path, out: Path, model: str) -> None:
    fifo = tmp_path / "a.txt"
    os.mkfifo(fifo)
    command = [sys.executable, str(ROOT / "tools" / "preprocess_text.py")]
    command += text_arguments(out, model, fifo)
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        try:
            # A signal just before it blocks in opening its input would only be seen when that opens.
            writer = open_when_read(fifo)
            deadline = time.monotonic() + 120
            while not files_of(out.parent) and time.monotonic() < deadline:
                time.sleep(0.02)
            assert files_of(out.parent) and all(".tmp-" in name for name in files_of(out.parent))
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
            os.close(writer)
        finally:
            process.kill()
    assert files_of(out.parent) == []


STARTING = """
import os, pathlib, signal, time
from megatron_vlmoe.prepare.tool import ordered_map

def chunks():
    yield 1
    while not pathlib.Path("starts").exists():
        time.sleep(0.01)
    os.killpg(0, signal.SIGINT)
    yield 2

if __name__ == "__mp_main__":  # a worker
    pathlib.Path("starts").touch()
    time.sleep(1)
if __name__ == "__main__":
    # A shell that starts this in the background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        list(ordered_map(abs, chunks(), 2))
    except KeyboardInterrupt:
        print("interrupted")
"""


@pytest.mark.process
def test_workers_that_start_leave_ctrl_c_to_their_parent(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(STARTING)
    command = [sys.executable, "script.py"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        start_new_session=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


KILLED = """
import os, signal, time
from megatron_vlmoe.prepare.tool import ordered_map

def worker(chunk):
    time.sleep(0.05)
    return os.getpid()

if __name__ == "__main__":
    seen = set()
    for number in ordered_map(worker, range(1000), 2):
        seen.add(number)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.process
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(KILLED)
    command = [sys.executable, "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A worker that lives holds the output open.
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.process
def test_dead_worker_is_an_error() -> None:
    with pytest.raises(ValueError, match="worker process died"):
        list(preprocess.ordered_map(Dying(), iter(range(10)), 2))


class Dying:
    """Work that ends its process."""

    def __call__(self, chunk: int) -> None:
        os._exit(9)

    def __hash__(self) -> int:
        return 1


@pytest.mark.process
def test_chunks_are_read_only_a_little_ahead() -> None:
    read: list[int] = []
    results = preprocess.ordered_map(Doubling(), (read.append(i) or i for i in range(1000)), 2)  # type: ignore[func-returns-value]
    assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
    assert len(read) <= 5 + 2 * 4
    results.close()  # type: ignore[attr-defined]


class Doubling:
    """Work that doubles a number."""

    def __call__(self, chunk: int) -> int:
        return double(chunk)

    def __hash__(self) -> int:
        return 2


def double(value: int) -> int:
    return 2 * value


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("keep", [0.99, 0.6, 0.2])
def test_truncated_images_are_found(kind: str, keep: float) -> None:
    data = encoded(picture(0, 200, 100), kind)
    with quiet_pillow():
        assert checked_image(data) is data
        with pytest.raises(ValueError, match="corrupt image"):
            checked_image(data[: int(len(data) * keep)])


def test_progressive_jpeg_cut_between_scans_is_found() -> None:
    data = encoded(picture(0, 200, 100), progressive=True)
    with quiet_pillow(), pytest.raises(ValueError, match="truncated"):
        checked_image(data[: data.rindex(b"\xff\xda")])


def test_which_images_are_kept_and_which_become_jpeg() -> None:
    rgb = picture(1)
    gray16 = Image.fromarray(np.linspace(0, 65535, 48 * 32).reshape(32, 48).astype(np.uint16))
    palette = rgb.convert("P")
    with quiet_pillow():
        for data in (
            encoded(palette, "PNG"),
            encoded(rgb.convert("L")),
            encoded(rgb.convert("RGBA"), "PNG"),
            encoded(rgb, "WEBP"),
            encoded(rgb, "MPO", save_all=True, append_images=[rgb]),  # a JPEG of some cameras
        ):
            assert checked_image(data) == data
        for data in (
            encoded(rgb.convert("CMYK"), quality=95),
            encoded(gray16, "PNG"),
            encoded(palette, "GIF"),
            encoded(rgb, "TIFF"),
        ):
            stored = Image.open(io.BytesIO(checked_image(data)))
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (48, 32))
        ramp = np.asarray(Image.open(io.BytesIO(checked_image(encoded(gray16, "PNG")))))
    wanted = np.asarray(gray16)[..., None] / 257.0
    assert np.abs(ramp - wanted).max() < 6


def test_resizing_shrinks_the_shorter_side_only() -> None:
    gradient = np.repeat(np.linspace(0, 255, 300).astype(np.uint8)[None], 100, axis=0)
    tall = Image.fromarray(np.stack([gradient] * 3, -1)).rotate(90, expand=True)  # 100 x 300
    with quiet_pillow():
        stored = Image.open(io.BytesIO(checked_image(encoded(tall, quality=95), 40)))
        assert (stored.format, stored.size) == ("JPEG", (40, 120))
        smaller = tall.resize((40, 120), Image.Resampling.BOX)
        difference = np.abs(np.asarray(stored, float) - np.asarray(smaller, float))
        assert difference.max() < 8
        small = encoded(tall)
        assert checked_image(small, 100) is small


def bomb() -> bytes:
    """A PNG that claims 20000 x 20000 pixels."""
    data = bytearray(encoded(picture(0), "PNG"))
    data[16:24] = (20000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD_IMAGES = [
    (b"", "empty file"),
    (b"not an image", "not an image of a known format"),
    (encoded(picture(0))[:-200], "corrupt image: image file is truncated"),
    (bomb(), "decompression bomb"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
]


@pytest.mark.process
def test_images_tool(tmp_path: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    (folder / "n1").mkdir(parents=True)
    data = [encoded(picture(i)) for i in range(3)]
    (folder / "n1" / "b.JPEG").write_bytes(data[1])
    (folder / "n1" / "a.JPEG").write_bytes(data[0])
    with tarfile.open(folder / "n2.tar", "w") as archive:
        info = tarfile.TarInfo("c.JPEG")
        info.size = len(data[2])
        archive.addfile(info, io.BytesIO(data[2]))
    main = tool("preprocess_images")
    arguments = ["--input", str(folder), "--output", str(out)]
    assert main(arguments) == 0
    reader = IndexedReader(f"{out}_image")
    assert [reader.document(i)[0].tobytes() for i in range(3)] == data
    manifest = check_dataset(out, "images", checksums=True)
    assert (manifest.documents, manifest.tokens) == (3, 0)
    assert manifest.bytes == sum(map(len, data))
    assert "3 records" in capfd.readouterr().err
    for place, (bad, _) in enumerate(BAD_IMAGES):
        (folder / "n1" / f"c{place}.jpg").write_bytes(bad)
    assert main([*arguments, "--on-error", "skip", "--workers", "2"]) == 0
    assert [record for record, _ in rejects_of(out)] == [f"n1/c{i}.jpg" for i in range(5)]
    for (_, reason), (_, expected) in zip(rejects_of(out), BAD_IMAGES, strict=True):
        assert reason.startswith(expected)
    assert load_manifest(out).counts == {"records": {"read": 8, "kept": 3, "rejected": 5}}
    assert load_manifest(out).rejects == 5 and load_manifest(out).files == manifest.files
    capfd.readouterr()
    other = out.with_name("other")
    assert main(["--input", str(folder), "--output", str(other)]) == 1
    assert capfd.readouterr().err == f"error: {folder}: n1/c0.jpg: empty file\n"
    assert not list(out.parent.glob("other*"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good pairs as JSON lines, and after the fifth one of each kind of bad record."""
    folder = tmp_path_factory.mktemp("pairs")
    rows: list[dict[str, Any]] = []
    for i in range(40):
        (folder / f"{i}.jpg").write_bytes(encoded(picture(i)))
        captions = [sentence(i + k) for k in range(1 + i % 3)]
        rows.append({"image": f"{i}.jpg", "captions": captions})
    (folder / "cut.jpg").write_bytes(encoded(picture(0))[:300])
    (folder / "bomb.png").write_bytes(bomb())
    rows[5:5] = [
        {"image": "missing.jpg", "caption": "a star"},
        {"image": "cut.jpg", "caption": "a star"},
        {"image": "bomb.png", "caption": "a star"},
        {"image": "1.jpg", "caption": " "},
        {"image": "2.jpg", "captions": []},
        {"image": "1.jpg", "caption": "star " * 600},
        {"image": "2.jpg", "caption": "star " * 100_000},
        {"image": "1.jpg", "caption": ["a star", 5]},
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pair_arguments(out: Path, model: str, corpus: Path) -> list[str]:
    arguments = ["--format", "jsonl", "--annotations", str(corpus / "pairs.jsonl")]
    arguments += ["--images", str(corpus), "--output", str(out)]
    return [*arguments, "--text-tokenizer", model]


def test_pairs_tool(out: Path, model: str, corpus: Path) -> None:
    main = tool("preprocess_pairs")
    assert main([*pair_arguments(out, model, corpus), "--on-error", "skip"]) == 0
    encode = sentencepiece.SentencePieceProcessor(model_file=model).encode
    expected = [
        ((corpus / f"{i}.jpg").read_bytes(), [encode(sentence(i + k)) for k in range(1 + i % 3)])
        for i in range(40)
    ]
    expected.insert(5, ((corpus / "1.jpg").read_bytes(), [encode("a star")]))
    images, texts = IndexedReader(f"{out}_image"), IndexedReader(f"{out}_text")
    assert images.num_documents == texts.num_documents == 41
    for i, (data, captions) in enumerate(expected):
        assert [image.tobytes() for image in images.document(i)] == [data]
        assert [caption.tolist() for caption in texts.document(i)] == captions
    manifest = check_dataset(out, "pairs", TextTokenizer(model).fingerprint, checksums=True)
    lengths = sorted(len(c) for _, captions in expected for c in captions)
    assert (manifest.documents, manifest.sequences) == (41, len(lengths))
    assert manifest.tokens == sum(lengths)
    assert manifest.caption_lengths == {
        "p50": lengths[-(-len(lengths) * 50 // 100) - 1],
        "p90": lengths[-(-len(lengths) * 90 // 100) - 1],
        "p99": lengths[-(-len(lengths) * 99 // 100) - 1],
        "max": lengths[-1],
    }
    stock = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    ids = [c for _, captions in expected for c in captions]
    dataset = stock.IndexedDataset(f"{out}_text")
    assert [dataset[i].tolist() for i in range(len(dataset))] == ids
    stock_images = stock.IndexedDataset(f"{out}_image")  # its arrays die with it
    assert stock_images[7].tobytes() == expected[7][0]


def test_bad_pairs_are_listed_with_their_reason(out: Path, model: str, corpus: Path) -> None:
    arguments = [*pair_arguments(out, model, corpus), "--on-error", "skip"]
    assert tool("preprocess_pairs")(arguments) == 0
    found = rejects_of(out)
    assert [record for record, _ in found] == [
        "line 6",
        "line 7",
        "line 8",
        "line 9",
        "line 10",
        "line 11",
        "line 12",
        "line 13, caption 1",
    ]
    starts = [
        f"no such image file: missing.jpg (nowhere below {corpus})",
        "corrupt image",
        "decompression bomb",
        "no usable caption: empty caption",
        "no usable caption",
        "no usable caption: caption of ",
        "no usable caption: caption of 499999 characters",
        "caption is not a string",
    ]
    for (_, reason), start in zip(found, starts, strict=True):
        assert reason.startswith(start)
    assert found[5][1].endswith("tokens, more than 512")


@pytest.mark.process
def test_bad_pair_stops(
    out: Path, model: str, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main = tool("preprocess_pairs")
    for workers in ("1", "2"):
        assert main([*pair_arguments(out, model, corpus), "--workers", workers]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {corpus / 'pairs.jsonl'}: line 6: no such image file")
        assert files_of(out.parent) == []
    assert main(["--format", "coco", "--output", str(out), "--text-tokenizer", model]) == 2


def test_merge_is_concatenation(
    tmp_path: Path,
    out: Path,
    model: str,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    first, second, merged = (str(out.with_name(name)) for name in ("a", "b", "ab"))
    pairs, merge = tool("preprocess_pairs"), tool("merge_datasets")
    assert pairs([*pair_arguments(Path(first), model, corpus), "--on-error", "skip"]) == 0
    resized = [*pair_arguments(Path(second), model, corpus), "--on-error", "skip"]
    assert pairs([*resized, "--resize-short", "16", "--max-caption-tokens", "8"]) == 0
    monkeypatch.setattr(indexed, "_BLOCK_BYTES", 1000)
    assert merge(["--input", first, second, first, "--output", merged]) == 0
    for part in ("image", "text"):
        a, b, ab = (IndexedReader(f"{prefix}_{part}") for prefix in (first, second, merged))
        documents = [r.document(i) for r in (a, b, a) for i in range(r.num_documents)]
        assert ab.num_documents == len(documents)
        for i, document in enumerate(documents):
            assert [s.tobytes() for s in ab.document(i)] == [s.tobytes() for s in document]
    one, two = load_manifest(first), load_manifest(second)
    whole = check_dataset(merged, "pairs", one.tokenizer_fingerprint, checksums=True)
    assert two.caption_lengths and whole.caption_lengths and one.caption_lengths
    assert two.caption_lengths["max"] <= 8 < one.caption_lengths["max"]
    assert whole.caption_lengths["max"] == one.caption_lengths["max"]
    for name in ("documents", "sequences", "tokens", "bytes", "rejects"):
        assert getattr(whole, name) == 2 * getattr(one, name) + getattr(two, name)
    assert whole.counts and one.counts and two.counts
    for name, count in whole.counts["captions"].items():
        assert count == 2 * one.counts["captions"][name] + two.counts["captions"][name]
    capfd.readouterr()
    assert merge(["--input", first, merged, "--output", merged]) == 1
    write_texts(tmp_path / "a.jsonl", 3)
    assert tool("preprocess_text")(text_arguments(out, model, tmp_path / "a.jsonl")) == 0
    assert merge(["--input", first, str(out), "--output", f"{out}2"]) == 1
    path = Path(f"{second}.json")
    path.write_text(path.read_text().replace(str(two.tokenizer_fingerprint), "other"))
    assert merge(["--input", first, second, "--output", f"{out}2"]) == 1
    lines = [e for e in capfd.readouterr().err.splitlines() if e.startswith("error")]
    wanted = ["both an input and the output", "of text, but one of pairs", "another tokenizer"]
    assert len(lines) == 3
    for line, message in zip(lines, wanted, strict=True):
        assert message in line
    assert not list(out.parent.glob("p2*"))


def test_raw_files_are_not_overwritten(
    tmp_path: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "wiki.json"
    raw.write_text('[{"text": "a star"}]')
    assert tool("preprocess_text")(text_arguments(tmp_path / "wiki", model, raw)) == 1
    assert f"error: {raw}: is no manifest of a dataset" in capfd.readouterr().err
    assert raw.read_text() == '[{"text": "a star"}]' and files_of(tmp_path) == ["wiki.json"]
    # A dataset is.
    for _ in range(2):
        assert tool("preprocess_text")(text_arguments(tmp_path / "other", model, raw)) == 0


def test_joined_lines_are_counted_as_lines(
    tmp_path: Path, out: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    lines = [b"a star", b"two", b"\xff", *[b"\xe7\x8c\xab"] * 3, b"small", b"", b"large"]
    path.write_bytes(b"\n".join(lines))
    arguments = [*text_arguments(out, model, path), "--documents", "lines:3"]
    assert tool("preprocess_text")([*arguments, "--on-error", "skip"]) == 0
    shown = capfd.readouterr().err.splitlines()
    assert shown[0].startswith("text: 8 records in") and shown[0].endswith(", 4 kept, 4 rejected")
    assert shown[1] == "text: 4 records in 2 documents"
    manifest = load_manifest(out)
    assert manifest.counts == {"records": {"read": 8, "kept": 4, "rejected": 4}}
    assert (manifest.documents, manifest.rejects) == (2, 2)
    assert [record for record, _ in rejects_of(out)] == ["line 3", "line 4 and 2 more"]


def test_unknown_tokens_are_counted_reported_and_add_up(
    tmp_path: Path, out: Path, model: str, capfd: pytest.CaptureFixture[str]
) -> None:
    # SentencePiece gives a known space and one <unk> for each word in a script that it never saw.
    lines = ["red star", "red 星", "赤い 星!", "a red blue star", " ", "星"]
    path, merged = tmp_path / "a.txt", f"{out}_merged"
    path.write_text("\n".join(lines))
    main = tool("preprocess_text")
    assert main(text_arguments(out, model, path)) == 1
    reason = "text without a word that the tokenizer knows"
    assert capfd.readouterr().err == f"error: {path}: line 3: {reason}\n"
    assert main([*text_arguments(out, model, path), "--on-error", "skip"]) == 0
    assert rejects_of(out) == [("line 3", reason), ("line 6", reason)]
    encode = sentencepiece.SentencePieceProcessor(model_file=model).encode
    tokens = sum(len(encode(lines[i])) for i in (0, 1, 3))
    manifest = load_manifest(out)
    assert (manifest.documents, manifest.tokens, manifest.unknown_tokens) == (3, tokens, 1)
    said = f"1 of {tokens} tokens are unknown to the tokenizer ({1 / tokens:.2%})"
    report = capfd.readouterr().err.splitlines()
    assert f"text: {said}" in report
    assert any(line.startswith("warning: text: more than 1% of the tokens") for line in report)
    (tmp_path / "b.txt").write_text("a star\n" * 200 + "a red 星\n")
    assert main(text_arguments(Path(f"{out}_b"), model, tmp_path / "b.txt")) == 0
    report = capfd.readouterr().err.splitlines()
    assert any("text: 1 of " in line for line in report)
    assert not any(line.startswith("warning") for line in report)
    merge = tool("merge_datasets")
    assert merge(["--input", str(out), f"{out}_b", "--output", merged]) == 0
    assert load_manifest(merged).unknown_tokens == 2
    counts = [load_manifest(prefix).documents for prefix in (str(out), f"{out}_b", merged)]
    said_of_merging = "{}: text, {} + {} = {} documents, ".format(merged, *counts)
    assert capfd.readouterr().err.startswith(said_of_merging) and counts[0] + counts[1] == counts[2]
    assert tool("inspect_dataset")([str(out)]) == 0
    assert f"  {said}" in capfd.readouterr().out.splitlines()
    # A dataset made before they were counted stays readable, and makes no count of others wrong.
    content = json.loads(Path(f"{out}.json").read_text())
    del content["unknown_tokens"]
    Path(f"{out}.json").write_text(json.dumps(content))
    assert merge(["--input", str(out), f"{out}_b", "--output", merged]) == 0
    assert load_manifest(merged).unknown_tokens is None
    assert tool("inspect_dataset")([str(out)]) == 0
    assert "unknown tokens were not counted" in capfd.readouterr().out


def test_unknown_captions_go_alone(tmp_path: Path, out: Path, model: str) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1)))
    (tmp_path / "b.jpg").write_bytes(encoded(picture(2)))
    rows = [{"image": "a.jpg", "captions": ["星", "a 星"]}, {"image": "b.jpg", "caption": "星。"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        tool("preprocess_pairs")([*pair_arguments(out, model, tmp_path), "--on-error", "skip"]) == 0
    )
    manifest = load_manifest(out)
    assert (manifest.documents, manifest.sequences, manifest.unknown_tokens) == (1, 1, 1)
    assert rejects_of(out) == [
        ("line 1, caption 0", "caption without a word that the tokenizer knows"),
        ("line 2", "no usable caption: caption without a word that the tokenizer knows"),
    ]


def test_inspect(
    tmp_path: Path, out: Path, model: str, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [*pair_arguments(out, model, corpus), "--on-error", "skip"]
    assert tool("preprocess_pairs")(arguments) == 0
    main, png = tool("inspect_dataset"), tmp_path / "sheet.png"
    shown = [str(out), "--text-tokenizer", model, "--num-samples", "2", "--png", str(png)]
    assert main([*shown, "--checksums"]) == 0
    text = capfd.readouterr().out
    assert "41 documents, 80 captions" in text and "8 rejects" in text
    assert "87 captions read: 80 kept, 1 rejected, 6 lost" in text
    assert f"[0] JPEG 48x32 RGB | {sentence(0)}" in text
    assert f"[40] JPEG 48x32 RGB | {sentence(39)}" in text
    sheet = np.asarray(Image.open(png).convert("L"), float)
    assert sheet[10:100, 10:150].std() > 10  # the first picture, which is noise
    assert (sheet[168:183, :150] < 128).any()  # its caption, below its number
    assert main([str(out), "--num-samples", "1"]) == 0
    ids = sentencepiece.SentencePieceProcessor(model_file=model).encode(sentence(0))
    assert str(ids) in capfd.readouterr().out
    path = Path(f"{out}_image.bin")
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(out)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: ")
