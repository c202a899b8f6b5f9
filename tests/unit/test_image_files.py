"""What image files mean: orientation, depth, transparency, formats and size, in whatever tool reads them."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_files import encoded, picture, tool
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.image_files import ImageRules, quiet_pillow, read_image_file
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.inference.inputs import Item, pixels, read_image
from megatron_vlmoe.prepare.codes import open_images
from megatron_vlmoe.prepare.corpora import checked_image

Array = npt.NDArray[Any]
KEEP = ImageRules(exif="keep")
DROP = ImageRules(alpha="drop")

UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
"""By EXIF's tables of orientations: what is seen of rows and columns as they are stored."""


def exif(orientation: object) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def stored(data: bytes, short: int | None = None, rules: ImageRules | None = None) -> Image.Image:
    """What is read of what is stored for a file."""
    with quiet_pillow():
        return Image.open(io.BytesIO(checked_image(data, short, rules or ImageRules())))


def ramps(width: int, height: int) -> Image.Image:
    """Red rises to the right and green downwards, so that neither JPEG nor a filter changes much."""
    rows, columns = np.mgrid[:height, :width]
    planes = (
        (columns + 0.5) * 255 / width,
        (rows + 0.5) * 255 / height,
        np.full((height, width), 60),
    )
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def distance(image: Image.Image, expected: Array) -> float:
    """Mean difference of all values; the sizes must be the same."""
    assert image.size == expected.shape[1::-1]
    return float(np.abs(values(image).astype(int) - expected).mean())


def values(image: Image.Image) -> Array:
    return np.asarray(image.convert("RGB"))


def png(depth: int, color: int, row: bytes, width: int, key: bytes | None = None) -> bytes:
    """A PNG of one row, its samples as they are in the file; `color` 0 is grey, 2 RGB, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + crc

    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    transparent = b"" if key is None else chunk(b"tRNS", key)
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + data + chunk(b"IEND", b"")


def tiff(row: bytes, width: int, **tags: int) -> bytes:
    """A little-endian TIFF of one grey row; tags by the names below."""
    numbers = {"bits": 258, "photometric": 262, "orientation": 274, "format": 339}
    found = {256: width, 257: 1, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(row)}
    found |= {numbers[name]: value for name, value in tags.items()}
    row += b"\0" * (len(row) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, found[tag]) for tag in sorted(found))
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(row))
        + row
        + struct.pack("<H", len(found))
        + entries
        + b"\0" * 4
    )


@pytest.mark.parametrize("way", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_without_loss(kind: str, way: int) -> None:
    array = np.asarray(picture(way, 5, 3))
    data = encoded(
        Image.fromarray(array),
        kind,
        exif=exif(way),
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert np.array_equal(read_image_file(data), UPRIGHT[way](array))
    # Pillow itself turns a TIFF.
    assert np.array_equal(read_image_file(data, KEEP), array)
    upright = stored(data)
    assert upright.size == UPRIGHT[way](array).shape[1::-1]
    assert upright.getexif().get(0x0112, 1) == 1
    if kind != "TIFF":
        assert upright.format == kind and np.array_equal(values(upright), UPRIGHT[way](array))
        with quiet_pillow():
            assert checked_image(data, None, KEEP) == data
            assert (checked_image(data) == data) == (way == 1)


@pytest.mark.parametrize("way", range(1, 9))
@pytest.mark.parametrize("short", [None, 24])
def test_a_jpeg_is_turned_and_an_upright_one_kept(short: int | None, way: int) -> None:
    data = encoded(ramps(80, 48), quality=95, subsampling=0, exif=exif(way))
    found = stored(data, short)
    width, height = (80, 48) if short is None else (40, 24)
    seen = UPRIGHT[way](np.asarray(ramps(width, height)))
    assert found.format == "JPEG" and distance(found, seen) < 3
    with quiet_pillow():
        once = checked_image(data, short)
        assert checked_image(once, short) == once
        assert (once == data) == (way == 1 and short is None)
        assert short or checked_image(data, None, KEEP) == data


def test_a_turned_jpeg_keeps_the_resolution_of_its_colours() -> None:
    for sampling, expected in ((0, (1, 1)), (1, (1, 1)), (2, (2, 2))):
        found: Any = stored(encoded(picture(0), subsampling=sampling, exif=exif(6)))
        assert found.layer[0][1:3] == expected
    grey = stored(encoded(picture(0).convert("L"), exif=exif(6)))
    assert (grey.mode, grey.size) == ("L", (32, 48))


BROKEN = {
    "no orientation": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 9, 0) + bytes(4),
    "a word": b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHI4s", 0x0112, 2, 2, b"6") + bytes(4),
    "points nowhere": b"MM\0*\xff\xff\xff\xff",
    "junk": b"junk",
    "empty": b"",
}


@pytest.mark.parametrize("bad", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_loses_no_image(kind: str, bad: bytes) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(picture(0), kind, exif=b"Exif\0\0" + bad, **options)
    with quiet_pillow():
        assert checked_image(data) == data
    assert read_image_file(data).size == (48, 32)


@pytest.mark.parametrize("bad", [0, 9, 1 << 20])
def test_a_broken_orientation_loses_no_tiff(bad: int) -> None:
    assert values(read_image_file(tiff(bytes([5, 9]), 2, orientation=bad)))[0].tolist() == [
        [5] * 3,
        [9] * 3,
    ]


def test_the_orientation_in_xmp_counts_too_and_is_not_stored_again() -> None:
    xmp = PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>')
    once = stored(encoded(picture(0), "PNG", pnginfo=xmp))
    assert once.size == (32, 48) and once.getexif().get(0x0112, 1) == 1


WORDS = struct.Struct("<HH")
GREY = [
    (
        "16-bit PNG",
        png(16, 0, struct.pack(">HHHH", 200, 32767, 32896, 65535), 4),
        [1, 127, 128, 255],
    ),
    ("16-bit PNG, all dark", png(16, 0, struct.pack(">HH", 200, 0), 2), [1, 0]),
    ("16-bit PGM", b"P5 2 1 65535\n" + struct.pack(">HH", 200, 65535), [1, 255]),
    ("12-bit PGM", b"P5 2 1 4095\n" + struct.pack(">HH", 200, 4095), [12, 255]),
    ("16-bit TIFF", tiff(WORDS.pack(200, 65535), 2, bits=16), [1, 255]),
    ("16-bit TIFF, white is 0", tiff(WORDS.pack(200, 65535), 2, bits=16, photometric=0), [254, 0]),
    ("12-bit TIFF", tiff(bytes([0x0C, 0x8F, 0xFF]), 2, bits=12), [12, 255]),
    ("32-bit TIFF", tiff(struct.pack("<II", 200, 65535), 2, bits=32), [1, 255]),
    ("float TIFF", tiff(struct.pack("<ff", 0.25, 1.0), 2, bits=32, format=3), [64, 255]),
    ("float TIFF, dark", tiff(struct.pack("<ff", 0.1, 0.0), 2, bits=32, format=3), [26, 0]),
    ("float TIFF to 255", tiff(struct.pack("<ff", 0.25, 100.0), 2, bits=32, format=3), [0, 100]),
]


@pytest.mark.parametrize(
    ("data", "expected"), [row[1:] for row in GREY], ids=[row[0] for row in GREY]
)
def test_grey_of_many_bits_means_what_its_depth_says(data: bytes, expected: list[int]) -> None:
    assert values(read_image_file(data))[0].tolist() == [[value] * 3 for value in expected]
    # Stored as a JPEG, of which a flat picture is exact.
    assert stored(data).format == "JPEG"


def test_a_dark_picture_of_16_bits_is_stored_dark(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((16, 16), 200, np.uint16))
    assert values(stored(encoded(deep, "PNG"))).max() == 1
    assert values(stored(encoded(deep, "PNG"), 8)).max() == 1
    # The same of a Pillow image, in the mode of either version of Pillow.
    for image in (deep, deep.convert("I"), Image.open(io.BytesIO(encoded(deep, "PNG")))):
        assert np.asarray(read_image(Item("image", image))).max() == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            tiff(struct.pack("<ff", float("nan"), 1.0), 2, bits=32, format=3),
            "corrupt image: floats that are not finite",
        ),
        (
            tiff(struct.pack("<ff", float("inf"), 1.0), 2, bits=32, format=3),
            "corrupt image: floats that are not finite",
        ),
        (
            tiff(struct.pack("<ff", -0.5, 1.0), 2, bits=32, format=3),
            "grey values from -0.5 to 1, not within 0 to 1 or 0 to 255",
        ),
        (
            tiff(struct.pack("<ff", 0.0, 300.0), 2, bits=32, format=3),
            "grey values from 0 to 300, not within",
        ),
        (
            tiff(struct.pack("<ii", 0, 70000), 2, bits=32, format=2),
            "grey values from 0 to 70000, not within 0 to 65535",
        ),
        (
            tiff(struct.pack("<hh", -5, 7), 2, bits=16, format=2),
            "grey values from -5 to 7, not within 0 to 65535",
        ),
    ],
)
def test_values_that_mean_nothing_known_are_named(data: bytes, message: str) -> None:
    for read in (read_image_file, stored):
        with pytest.raises(DataError, match=f"^{message}"):
            read(data)


def cut_out(mode: str) -> Image.Image:
    """A transparent, a half transparent and an opaque pixel, all black."""
    image = Image.new("LA", (3, 1))
    for place, alpha in enumerate((0, 128, 255)):
        image.putpixel((place, 0), (0, alpha))
    return image.convert(mode)


def paletted() -> Image.Image:
    """Black three times, with the same transparencies."""
    image = Image.frombytes("P", (3, 1), bytes((0, 1, 2)))
    image.putpalette([0] * 9)
    return image


GROUNDS = {"white": [255, 127, 0], "black": [0, 0, 0]}


@pytest.mark.parametrize(
    "data",
    [
        encoded(cut_out("RGBA"), "PNG"),
        encoded(cut_out("LA"), "PNG"),
        encoded(paletted(), "PNG", transparency=bytes((0, 128, 255))),
        encoded(cut_out("RGBA"), "WEBP", lossless=True, exact=True),
        encoded(cut_out("RGBA"), "TIFF"),
        encoded(cut_out("RGBA"), "TGA"),
    ],
    ids=["RGBA", "LA", "P", "WebP", "TIFF", "TGA"],
)
@pytest.mark.parametrize("ground", GROUNDS)
def test_transparent_pixels_are_put_on_a_ground(ground: str, data: bytes) -> None:
    expected = [[value] * 3 for value in GROUNDS[ground]]
    rules = ImageRules(alpha=ground)
    assert values(read_image_file(data, rules))[0].tolist() == expected
    found = stored(data, None, rules)
    if found.format in ("PNG", "WEBP"):
        assert found.mode == "RGB" and values(found)[0].tolist() == expected
        with quiet_pillow():
            assert checked_image(data, None, DROP) == data
    assert values(read_image_file(data, DROP)).max() == 0
    premultiplied = cut_out("LA").convert("La")  # as Pillow opens such a TIFF
    assert values(read_image(Item("image", premultiplied), rules))[0].tolist() == expected
    # On white while it is shrunk too, not after.
    large = encoded(
        Image.open(io.BytesIO(data)).convert("RGBA").resize((48, 16), Image.Resampling.NEAREST),
        "PNG",
    )
    assert values(stored(large, 8, rules))[4, 2].tolist() == pytest.approx(expected[0], abs=3)


KEYS = [
    ("grey, 1 bit", png(1, 0, bytes([0b10000000]), 2, b"\0\0"), [255, 255]),
    ("grey, 1 bit, white", png(1, 0, bytes([0b10000000]), 2, b"\0\1"), [255, 0]),
    ("grey, 2 bits", png(2, 0, bytes([0b00011011]), 4, b"\0\1"), [0, 255, 170, 255]),
    ("grey, 4 bits", png(4, 0, bytes([0x1F]), 2, b"\0\1"), [255, 255]),
    ("grey, 8 bits", png(8, 0, bytes([5, 9]), 2, b"\0\5"), [255, 9]),
    ("grey, 16 bits", png(16, 0, struct.pack(">HH", 200, 257 * 9), 2, b"\0\xc8"), [255, 9]),
    ("RGB", png(8, 2, bytes([5, 5, 5, 9, 9, 9]), 2, b"\0\5" * 3), [255, 9]),
    (
        "RGB, 16 bits",
        png(
            16,
            2,
            struct.pack(">6H", *[5000] * 3, *[256 * 9] * 3),
            2,
            struct.pack(">3H", *[5000] * 3),
        ),
        [255, 9],
    ),
]


@pytest.mark.parametrize(
    ("data", "expected"), [row[1:] for row in KEYS], ids=[row[0] for row in KEYS]
)
def test_one_colour_may_be_transparent(data: bytes, expected: list[int]) -> None:
    wanted = [[value] * 3 for value in expected]
    assert values(read_image_file(data))[0].tolist() == wanted
    assert values(read_image(Item("image", Image.open(io.BytesIO(data)))))[0].tolist() == wanted
    found = stored(data)
    assert found.format == "JPEG" or values(found)[0].tolist() == wanted


def test_opaque_images_keep_their_bytes_whatever_their_mode() -> None:
    image = picture(0)
    opaque = Image.new("P", (4, 4))
    for data in (
        encoded(image.convert("RGBA"), "PNG"),
        encoded(image.convert("LA"), "PNG"),
        encoded(image.convert("RGBA"), "WEBP"),
        encoded(opaque, "PNG", transparency=bytes([255])),
        png(8, 0, bytes([5, 9]), 2, b"\0\7"),
    ):
        with quiet_pillow():
            assert checked_image(data) is data


def test_turned_and_transparent_at_once() -> None:
    image = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    data = encoded(image, "PNG", exif=exif(6))
    found = stored(data)
    assert values(found).tolist() == [[[255] * 3, [200, 100, 50]], *[[[255] * 3] * 2] * 2]
    dropped = stored(data, None, DROP)
    assert dropped.mode == "RGBA" and values(dropped)[0].tolist() == [[9, 9, 9], [200, 100, 50]]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    for image in (read_image_file(data), stored(data)):
        assert np.abs(values(image)[8, 8] - np.array([255, 0, 0])).max() < 4


@pytest.mark.parametrize(
    "kind", ["BMP", "GIF", "ICO", "JPEG2000", "PCX", "PPM", "SGI", "TGA", "TIFF"]
)
def test_other_formats_become_jpeg(kind: str) -> None:
    found = stored(encoded(ramps(32, 32), kind))
    # A GIF has 256 colours.
    assert found.format == "JPEG" and distance(found, np.asarray(ramps(32, 32))) < 6


def test_formats_that_are_not_read_here_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(DataError, match="^HEIC, which is read where pillow-heif is installed"):
        read_image_file(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    if features.check("avif"):
        assert stored(encoded(picture(0), "AVIF", exif=exif(6))).size == (32, 48)
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    with pytest.raises(DataError, match="^a damaged AVIF, or one that this Pillow does not read$"):
        read_image_file(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(100))


class TestLargeImages:
    """With a limit of 2,000 pixels in place of 89 million."""

    @pytest.fixture(autouse=True)
    def limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)

    def test_a_large_photograph_is_shrunk_from_a_part_of_its_size(self) -> None:
        data = encoded(ramps(72, 48), quality=95, exif=exif(6))
        for short in (8, 24):
            seen = UPRIGHT[6](np.asarray(ramps(short * 3 // 2, short)))
            assert distance(stored(data, short), seen) < 8
        assert Image.MAX_IMAGE_PIXELS == 2000

    def test_without_shrinking_it_says_what_to_do(self) -> None:
        data = encoded(picture(1, 72, 48))
        for short in (None, 25, 48):
            with pytest.raises(
                DataError,
                match="^72x48 pixels, more than the 2000 that .* --resize-short, to 24 at most$",
            ):
                stored(data, short)

    def test_a_model_reads_it_at_half_its_size(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(encoded(ramps(72, 48), quality=95))
        half = read_image(Item("image", tmp_path / "a.jpg"))
        assert distance(half, np.asarray(ramps(36, 24))) < 4
        assert pixels([Item("image", tmp_path / "a.jpg")], 8).shape == (1, 3, 8, 8)
        assert open_images([str(tmp_path)])[0].size == (36, 24)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
    def test_bombs_are_refused(self, kind: str) -> None:
        # A JPEG of more than three times the limit, others of more than the limit.
        data = encoded(picture(1, 100, 70 if kind == "JPEG" else 21), kind)
        for read in (read_image_file, lambda data: stored(data, 8)):
            with pytest.raises(DataError, match="^decompression bomb: "):
                read(data)


def turned_cut_out() -> bytes:
    """A PNG of 3 x 2 pixels, transparent but for one, to be turned."""
    image = Image.new("RGBA", (3, 2), (9, 9, 9, 0))
    image.putpixel((0, 0), (200, 100, 50, 255))
    return encoded(image, "PNG", exif=exif(6))


@pytest.mark.parametrize(
    "options", [[], ["--exif", "keep"], ["--alpha", "black"], ["--alpha", "drop"]]
)
@pytest.mark.parametrize("name", ["preprocess_images", "preprocess_pairs", "prepare_task"])
def test_every_tool_applies_and_records_it(
    name: str, options: list[str], tmp_path: Path, tiny_tokenizer: str
) -> None:
    for split in ("train", "val"):
        (tmp_path / "raw" / split / "n01").mkdir(parents=True)
        (tmp_path / "raw" / split / "n01" / "a.png").write_bytes(turned_cut_out())
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"image": "train/n01/a.png", "caption": "a red star"})
    )
    out = tmp_path / "out" / "p"
    raw = str(tmp_path / "raw")
    arguments = {
        "preprocess_images": ["--input", f"{raw}/train"],
        "preprocess_pairs": [
            "--format",
            "jsonl",
            "--annotations",
            str(tmp_path / "pairs.jsonl"),
            "--images",
            raw,
        ]
        + ["--image-key", "image", "--caption-key", "caption", "--text-tokenizer", tiny_tokenizer],
        "prepare_task": ["--task", "imagenet", "--raw", raw, "--splits", "train"],
    }[name]
    assert tool(name)([*arguments, "--output", str(out), *options]) == 0
    prefix = f"{out}_train" if name == "prepare_task" else str(out)
    rules = ImageRules(**{key[2:]: value for key, value in zip(options[::2], options[1::2])})
    manifest = load_manifest(prefix)
    assert (manifest.exif, manifest.alpha) == (rules.exif, rules.alpha)
    image = Image.open(io.BytesIO(bytes(IndexedReader(f"{prefix}_image").sequence(0))))
    assert image.size == ((3, 2) if rules.exif == "keep" else (2, 3))
    ground = {"white": 255, "black": 0, "drop": 9}[rules.alpha]
    corner = (0, 0) if rules.exif == "keep" else (1, 0)
    assert image.convert("RGB").getpixel(corner) == (200, 100, 50)
    assert image.convert("RGB").getpixel((0, 1)) == (ground,) * 3


def test_merging_says_where_records_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(turned_cut_out())
    prefixes = [str(tmp_path / name) for name in "ab"]
    for prefix, exif_option in zip(prefixes, ("turn", "keep")):
        options = [
            "--input",
            str(tmp_path / "in"),
            "--output",
            prefix,
            "--exif",
            exif_option,
        ]
        assert tool("preprocess_images")(options) == 0
    # A dataset made before the options were: without a record.
    old = json.loads((tmp_path / "b.json").read_text())
    del old["exif"], old["alpha"]
    (tmp_path / "b.json").write_text(json.dumps(old))
    capsys.readouterr()
    merged = str(tmp_path / "m")
    assert tool("merge_datasets")(["--input", *prefixes, "--output", merged]) == 0
    notes = capsys.readouterr().err.splitlines()
    assert (
        f"note: images indexed with different --exif ({prefixes[0]}: turn, {prefixes[1]}: none)"
        in notes
    )
    assert (load_manifest(merged).exif, load_manifest(merged).alpha) == ("mixed", "mixed")
    assert tool("merge_datasets")(["--input", prefixes[0], prefixes[0], "--output", merged]) == 0
    assert (load_manifest(merged).exif, load_manifest(merged).alpha) == ("turn", "white")
    assert tool("inspect_dataset")([merged]) == 0
    out = capsys.readouterr()
    assert "note" not in out.err and "images: exif turn, alpha white" in out.out


def test_a_model_and_a_folder_of_images_read_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(turned_cut_out())
    upright = [[[255] * 3, [200, 100, 50]], *[[[255] * 3] * 2] * 2]
    for value in (path, str(path), path.read_bytes(), Image.open(path)):
        assert np.asarray(read_image(Item("image", value))).tolist() == upright
    assert np.asarray(open_images([str(tmp_path)])[0]).tolist() == upright
    rules = ImageRules("keep", "drop")
    kept = [[[200, 100, 50], [9] * 3, [9] * 3], [[9] * 3] * 3]
    for value in (path, Image.open(path)):
        assert np.asarray(read_image(Item("image", value), rules)).tolist() == kept
        assert pixels([Item("image", value)], 3, rules).shape == (1, 3, 3, 3)
    assert np.asarray(open_images([str(tmp_path)], rules)[0]).tolist() == kept


def test_a_contact_sheet_names_a_damaged_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(picture(0), "PNG"))
    prefix, sheet = str(tmp_path / "p"), str(tmp_path / "sheet.png")
    arguments = ["--input", str(tmp_path / "in"), "--output", prefix]
    assert tool("preprocess_images")(arguments) == 0
    stored_bytes = Path(f"{prefix}_image.bin")
    content = stored_bytes.read_bytes()
    stored_bytes.write_bytes(content[:200] + bytes(len(content) - 200))
    assert tool("inspect_dataset")([prefix, "--png", sheet]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {prefix}_image.bin: image 0: damaged image")
