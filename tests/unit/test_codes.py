"""Stored visual codes, and the crops that the image tokenizer trains on."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import tool
from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.codes import CodesReader, check_codes
from megatron_vlmoe.data.indexed import IndexedWriter
from megatron_vlmoe.prepare.codes import (
    CodesOptions,
    CropOptions,
    TokenizerCrops,
    open_images,
    write_codes,
)
from megatron_vlmoe.tokenizers.image import ImageTokenizer

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(40, 30), (25, 61), (16, 16), (90, 20), (33, 47)]


def encoded_image(number: int) -> bytes:
    width, height = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def write_images(prefix: Path, images: list[bytes]) -> str:
    with IndexedWriter(f"{prefix}_image", np.uint8) as writer:
        for data in images:
            writer.add_document([np.frombuffer(data, np.uint8)])
    return str(prefix)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> ImageTokenizer:
    return ImageTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_images(tmp_path / "set", [encoded_image(i) for i in range(7)])


def read_all(prefix: str) -> list[tuple]:
    reader = CodesReader(prefix)
    views = itertools.product(range(reader.manifest.num_images), range(reader.manifest.num_views))
    stored = [reader.view(image, view) for image, view in views]
    return [(s.box, s.flip, s.resolution, s.codes.tolist()) for s in stored]


def test_codes_are_those_of_the_stored_geometry(prefix: str, tokenizer: ImageTokenizer) -> None:
    write_codes(prefix, tokenizer, CodesOptions(num_views=3, batch_size=8))
    reader = CodesReader(prefix)
    assert (reader.manifest.num_images, reader.manifest.num_views, reader.manifest.grid) == (
        7,
        3,
        4,
    )
    assert reader.manifest.tokenizer_fingerprint == tokenizer.fingerprint
    flips = set()
    for number, view in itertools.product(range(7), range(3)):
        stored = reader.view(number, view)
        box, image = stored.box, Image.open(io.BytesIO(encoded_image(number)))
        assert 0 <= box.left and box.left + box.width <= image.width
        assert 0 <= box.top and box.top + box.height <= image.height
        assert stored.resolution == 16
        crop = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        pixels = np.asarray(crop.resize((16, 16), Image.Resampling.BICUBIC), np.float32) / 255
        pixels = pixels[:, ::-1] if stored.flip else pixels
        expected = tokenizer.encode(torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None])
        assert stored.codes.dtype == np.int64
        assert stored.codes.tolist() == expected[0].tolist()
        flips.add(stored.flip)
    assert flips == {True, False}


@pytest.mark.process
def test_views_differ_and_do_not_depend_on_batches_or_workers(
    prefix: str, tokenizer: ImageTokenizer
) -> None:
    write_codes(prefix, tokenizer, CodesOptions(num_views=2, batch_size=1))
    first = read_all(prefix)
    assert len({view[0] for view in first}) > 10
    write_codes(prefix, tokenizer, CodesOptions(num_views=2, batch_size=5, workers=2))
    assert read_all(prefix) == first
    write_codes(prefix, tokenizer, CodesOptions(num_views=3))
    more = read_all(prefix)
    assert [more[0], more[1], more[3], more[4]] == first[:4]  # views 0 and 1 of images 0 and 1
    write_codes(prefix, tokenizer, CodesOptions(num_views=2, seed=1))
    assert read_all(prefix) != first


def test_crop_scale_and_flips_are_options(prefix: str, tokenizer: ImageTokenizer) -> None:
    options = CodesOptions(num_views=4, min_scale=0.9, flip_probability=0.0)
    write_codes(prefix, tokenizer, options)
    for (box, flip, *_), (width, height) in zip(read_all(prefix)[:4], 4 * SIZES[:1], strict=True):
        assert not flip
        assert box.width * box.height >= 0.85 * width * height


def test_reader_travels_to_workers_and_refuses_what_is_not_there(
    prefix: str, tokenizer: ImageTokenizer
) -> None:
    write_codes(prefix, tokenizer, CodesOptions(num_views=2))
    reader = CodesReader(prefix)
    copy = pickle.loads(pickle.dumps(reader))
    assert np.array_equal(copy.view(3, 1).codes, reader.view(3, 1).codes)
    for image, view in ((7, 0), (0, 2), (-1, 0), (0, -1)):
        with pytest.raises(IndexError):
            reader.view(image, view)


def test_check_codes_names_what_does_not_fit(prefix: str, tokenizer: ImageTokenizer) -> None:
    with pytest.raises(DataError, match="set_codes.json: not found"):
        check_codes(prefix, tokenizer.fingerprint, 7, 4)
    write_codes(prefix, tokenizer, CodesOptions(num_views=2))
    assert check_codes(prefix, tokenizer.fingerprint, 7, 4).manifest.num_views == 2

    def refused(message: str, fingerprint: str = tokenizer.fingerprint, n: int = 7, grid: int = 4):
        with pytest.raises(DataError, match=message) as caught:
            check_codes(prefix, fingerprint, n, grid)
        assert "set_codes" in str(caught.value) and "\n" not in str(caught.value)

    refused("another image tokenizer", fingerprint="0" * 64)
    refused("codes of 7 images, but the dataset has 8", n=8)
    refused("4 codes per side, but the run needs 14", grid=14)
    data = Path(f"{prefix}_codes.bin")
    whole = data.read_bytes()
    data.write_bytes(whole[:-4])
    refused(r"set_codes.bin: \d+ bytes")
    data.write_bytes(whole)
    write_images(Path(prefix), [encoded_image(i) for i in range(1, 8)])
    refused("made from other images")
    manifest = Path(f"{prefix}_codes.json")
    manifest.write_text(manifest.read_text()[:30])
    refused("set_codes.json: damaged")


def test_codes_of_other_shape_or_range_are_damaged(prefix: str, tokenizer: ImageTokenizer) -> None:
    write_codes(prefix, tokenizer, CodesOptions(num_views=1))
    manifest = Path(f"{prefix}_codes.json")
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"grid": 5}))
    with pytest.raises(DataError, match="not 25 codes in every view"):
        CodesReader(prefix)
    manifest.write_text(json.dumps(content | {"num_views": 2}))
    with pytest.raises(DataError, match="7 images with 7 views, but its manifest says 7 with 14"):
        CodesReader(prefix)
    manifest.write_text(json.dumps(content | {"num_codes": 2}))
    with pytest.raises(DataError, match=r"image 0 view 0 has a code outside 0\.\.1"):
        CodesReader(prefix).view(0, 0)


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_ends_it_and_leaves_the_old_codes(
    tmp_path: Path, tokenizer: ImageTokenizer, workers: int
) -> None:
    images = [encoded_image(i) for i in range(5)]
    prefix = write_images(tmp_path / "set", images)
    write_codes(prefix, tokenizer, CodesOptions(num_views=1))
    before = read_all(prefix)
    write_images(tmp_path / "set", [*images[:3], images[3][:200], images[4]])
    with pytest.raises(DataError, match=r"set_image.bin: image 3: ") as caught:
        write_codes(prefix, tokenizer, CodesOptions(num_views=1, workers=workers))
    assert "\n" not in str(caught.value)
    assert read_all(prefix) == before
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_an_old_manifest_never_vouches_for_new_codes(
    prefix: str, tokenizer: ImageTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_codes(prefix, tokenizer, CodesOptions(num_views=1))

    real = os.fsync

    def full_disk(handle: int) -> None:
        if "set_codes.json.tmp" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(DataError, match="set_codes.json: No space left on device"):
        write_codes(prefix, tokenizer, CodesOptions(num_views=1, seed=1))
    with pytest.raises(DataError, match="not found"):
        CodesReader(prefix)


def test_tool(prefix: str, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["encode_images.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "tools" / "encode_images.py"), run_name="__main__")
        return int(caught.value.code or 0)

    common = ("--images", prefix, "--views", "2", "--image-tokenizer")
    assert run(*common, str(tokenizer_folder)) == 0
    assert "2 views of 7 images, 4x4 codes each" in capsys.readouterr().out
    assert CodesReader(prefix).manifest.num_views == 2
    assert run(*common, f"{prefix}_nowhere") == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert run("--images", prefix) == 2


class TestTokenizerCrops:
    def crops(self, path: str, **options: float) -> TokenizerCrops:
        defaults = {"size": 8, "batch_size": 4, "min_scale": 0.3}
        return TokenizerCrops(open_images([path]), CropOptions(**{**defaults, **options}))  # type: ignore[arg-type]

    def first(
        self, crops: TokenizerCrops, count: int, step: int = 0, rank: int = 0, world: int = 1
    ):
        return list(itertools.islice(crops.training_batches(step, rank, world), count))

    @pytest.mark.process
    def test_a_step_is_the_same_for_any_ranks_workers_and_start(self, prefix: str) -> None:
        steps = self.first(self.crops(prefix), 4)
        assert steps[0].shape == (4, 3, 8, 8) and steps[0].dtype == torch.uint8
        halves = [self.first(self.crops(prefix, workers=1), 4, rank=r, world=2) for r in (0, 1)]
        for step, left, right in zip(steps, *halves, strict=True):
            assert torch.equal(step, torch.cat((left, right)))
        resumed = self.first(self.crops(prefix), 1, step=3)
        assert torch.equal(resumed[0], steps[3])
        assert not torch.equal(self.first(self.crops(prefix, seed=1), 1)[0], steps[0])

    def test_every_epoch_has_every_image_once(self, tmp_path: Path) -> None:
        images = []
        for value in range(6):
            buffer = io.BytesIO()
            Image.new("RGB", (9, 9), (40 * value, 0, 0)).save(buffer, "PNG")
            images.append(buffer.getvalue())
        prefix = write_images(tmp_path / "flat", images)
        batches = self.first(self.crops(prefix, batch_size=3), 4)
        reds = [int(image[0, 0, 0]) // 40 for batch in batches for image in batch]
        assert sorted(reds[:6]) == sorted(reds[6:]) == list(range(6))
        assert reds[:6] != reds[6:]

    def test_evaluation_sees_whole_images(self, prefix: str) -> None:
        (first, second) = self.crops(prefix).evaluation_batches()
        assert len(first) + len(second) == 7
        image = Image.open(io.BytesIO(encoded_image(0))).resize((8, 8), Image.Resampling.BICUBIC)
        assert np.array_equal(first[0].permute(1, 2, 0).numpy(), np.asarray(image))

    def test_folders_and_prefixes_can_be_mixed(self, prefix: str, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "a.png").write_bytes(encoded_image(20))
        source = open_images([prefix, str(folder)])
        assert len(source) == 8
        for place, number in ((6, 6), (7, 20)):
            expected = Image.open(io.BytesIO(encoded_image(number)))
            assert source[place].tobytes() == expected.tobytes()
        with pytest.raises(DataError, match="neither an image folder nor"):
            open_images([str(tmp_path / "nothing")])
        shutil.rmtree(folder / "deep")
        with pytest.raises(DataError, match="holds no images"):
            open_images([str(folder)])

    @pytest.mark.process
    def test_damaged_image_is_one_line_also_from_a_worker(self, tmp_path: Path) -> None:
        prefix = write_images(tmp_path / "bad", [encoded_image(0), b"no image at all"])
        for workers in (0, 1):
            with pytest.raises(DataError, match="bad_image.bin: image 1") as caught:
                self.first(self.crops(prefix, workers=workers), 2)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("count", [3, 9])
def test_shards_of_codes_become_one_file(
    count: int, prefix: str, tokenizer_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also with more shards than batches. Each view is that of the image's number in the whole dataset."""
    encode, merge = tool("encode_images"), tool("merge_datasets")
    words = ["--images", prefix, "--image-tokenizer", str(tokenizer_folder)]
    words += ["--views", "2", "--batch-size", "4"]
    folder = Path(prefix).parent
    assert encode([*words, "--output", f"{folder}/whole/p"]) == 0
    sharded = f"{folder}/merged/p"
    for number in range(count):
        assert encode([*words, "--output", sharded, "--shard", f"{number}/{count}"]) == 0
    assert merge(["--shards", f"{sharded}_codes"]) == 0
    assert encode([*words, "--output", f"{folder}/there/p", "--num-shards", "2"]) == 0
    for name in ("p_codes.bin", "p_codes.idx", "p_codes.json"):
        expected = (folder / "whole" / name).read_bytes()
        assert (folder / "merged" / name).read_bytes() == expected
        assert (folder / "there" / name).read_bytes() == expected
    assert len(list((folder / "there").iterdir())) == 3
    capfd.readouterr()
    assert encode([*words, "--output", sharded, "--shard", f"0/{count}", "--seed", "1"]) == 0
    assert merge(["--shards", f"{sharded}_codes"]) == 1
    assert f"shard 1/{count} is of another run" in capfd.readouterr().err
