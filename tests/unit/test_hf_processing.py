"""Tokenizer, image processor and processor of an export, against what the trainer reads."""

from __future__ import annotations

import base64
import functools
import io
import pickle
import random
import re
import struct
import threading
import zlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hf_folder import TINY, VOCAB, sentencepiece_model, write_processors
from PIL import Image, ImageOps

from megatron_vlmoe.config.schema import DataConfig
from megatron_vlmoe.data.samples import TextFormat
from megatron_vlmoe.inference.inputs import Item, pixels
from megatron_vlmoe.tokenizers.text import TextTokenizer

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf.image_processing_vlmoe import VLMoEImageProcessor
from megatron_vlmoe.convert.hf.processing_vlmoe import VLMoEProcessor
from megatron_vlmoe.convert.hf.tokenization_vlmoe import VLMoETokenizer

TEXTS = [
    "a red circle",
    "  two   blue squares \n",
    "\u3000the left\u00a0circle\t",
    "\x1cthere is a square",
    "naïve café ﬁne ½ Ⅷ",
    "日本語 красный κύκλος",
    "😀 a 👩‍👩‍👧 circle",
    "unknown ☃ runs ☃☃☃ and\u200bzero width",
    "UPPER case, punctuation! (really?)",
    "mask without brackets MASK",
    "▁ meta ▁space",
    "x" * 60,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf")
    write_processors(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> VLMoETokenizer:
    return VLMoETokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def trainers(folder: Path) -> TextTokenizer:
    return TextTokenizer(folder / "sentencepiece.model")


def random_texts(count: int) -> list[str]:
    generator = random.Random(1)
    letters = "abcdefghij redblue [](){}<>/_▁\t\n\u00a0éß漢字☃😀"
    return ["".join(generator.choices(letters, k=generator.randint(1, 40))) for _ in range(count)]


def test_plain_text_has_the_trainers_ids(tokenizer, trainers):
    texts = TEXTS + [text for text in random_texts(500) if text.strip()]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    for text, ids in zip(texts, found, strict=True):
        assert ids == trainers.encode(text.strip()), repr(text)
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids


def test_special_tokens_are_those_of_the_model(tokenizer, trainers):
    for name in ("bos", "eos", "pad", "unk", "mask"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(trainers, f"{name}_id")
    assert tokenizer.cls_token_id == trainers.bos_id
    assert tokenizer.sep_token_id == trainers.eos_id
    assert len(tokenizer) == tokenizer.vocab_size == trainers.size == VOCAB
    vocabulary = tokenizer.get_vocab()
    assert [trainers.piece(i) for i in range(VOCAB)] == sorted(vocabulary, key=vocabulary.get)
    assert tokenizer.model_max_length == max(TINY["text_length"], TINY["pair_text_length"])


def test_texts_are_framed_as_in_training(tokenizer, trainers):
    bos, eos, mask = trainers.bos_id, trainers.eos_id, trainers.mask_id
    red, circle = (trainers.encode(word) for word in ("a red", "circle"))
    assert tokenizer("a red circle")["input_ids"] == [bos, *trainers.encode("a red circle"), eos]
    assert tokenizer("a red", "circle")["input_ids"] == [bos, *red, eos, *circle, eos]
    for text in ("a red [MASK] circle", "a red[MASK]circle", " a red  [MASK]  circle "):
        assert tokenizer(text)["input_ids"] == [bos, *red, mask, *circle, eos]
    special = tokenizer("a red", "circle", return_special_tokens_mask=True)["special_tokens_mask"]
    assert special == [1, *([0] * len(red)), 1, *([0] * len(circle)), 1]


@pytest.mark.parametrize("length", [4, 5, 6, 9, 12])
def test_longer_texts_are_cut_and_padded_as_in_training(tokenizer, trainers, length):
    layout = TextFormat.of(trainers, length)
    generator = random.Random(2)
    words = ["a", "red", "circle", "the", "left", "two"]
    pairs = [
        [" ".join(generator.choices(words, k=generator.randint(1, 9))) for _ in range(2)]
        for _ in range(20)
    ]
    for columns in ([[a] for a, _ in pairs], pairs):
        parts = [[np.array(trainers.encode(text)) for text in texts] for texts in columns]
        ids, lengths = layout.rows(parts)
        found = tokenizer(
            *([*column] for column in zip(*columns)),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="np",
        )
        assert np.array_equal(found["input_ids"], ids)
        assert np.array_equal(found["attention_mask"].sum(axis=1), lengths)


def test_truncation_of_the_left_side_keeps_the_ends(folder, tokenizer):
    left = VLMoETokenizer.from_pretrained(folder, truncation_side="left")
    ids = tokenizer("a red circle", "the left")["input_ids"]
    first, second = ids[1:4], ids[5:7]
    bos, eos = ids[0], ids[-1]
    found = left("a red circle", "the left", truncation=True, max_length=len(ids) - 2)["input_ids"]
    assert found == [bos, *first[2:], eos, *second, eos]
    one = tokenizer("a red circle", "the left", truncation="only_second", max_length=len(ids) - 1)
    assert one["input_ids"] == [bos, *first, eos, second[0], eos]


def test_decoding_gives_the_text_back(tokenizer, trainers):
    ids = tokenizer("a red [MASK] circle")["input_ids"]
    assert tokenizer.decode(ids) == "<s> a red [MASK] circle </s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"
    plain = trainers.encode("a ☃ circle")
    assert tokenizer.decode(plain) == trainers.decode(plain)
    assert tokenizer.batch_decode([plain[:1], ids[1:3]]) == ["a", "a red"]


def test_tokenizer_can_be_saved_pickled_and_extended(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved, original = (path / "sentencepiece.model" for path in (tmp_path, folder))
    assert saved.read_bytes() == original.read_bytes()
    for again in (
        VLMoETokenizer.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert again("a [MASK]")["input_ids"] == tokenizer("a [MASK]")["input_ids"]
        assert again.model_max_length == tokenizer.model_max_length
    again.add_tokens(["dodecahedron"])
    assert again("a dodecahedron")["input_ids"][2] == VOCAB == len(again) - 1


def test_a_model_without_a_special_piece_is_refused(tmp_path):
    path = sentencepiece_model(tmp_path / "other.model", user_defined_symbols=["mask"])
    assert VLMoETokenizer(path).mask_token == "[MASK]"
    with pytest.raises(ValueError, match=r"mask_token='<mask>' is no piece"):
        VLMoETokenizer(path, mask_token="<mask>")


def picture(mode: str, width: int = 70, height: int = 45) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    return (
        Image.fromarray(noise, "RGBA").convert(mode) if mode != "RGBA" else Image.fromarray(noise)
    )


def encoded(image: Image.Image, name: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name)
    return buffer.getvalue()


def image_processor(**options) -> VLMoEImageProcessor:
    return VLMoEImageProcessor(
        size=32, image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.6, 0.7), **options
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "I;16", "RGBA", "LA", "P", "I", "F"])
@pytest.mark.parametrize("shape", [(70, 45), (9, 120), (32, 32), (1, 1)])
def test_pixels_are_those_of_evaluation(mode, shape):
    image = picture(mode, *shape)
    expected = pixels([Item("image", image)], 32)
    raw = image_processor()(image, do_rescale=False, do_normalize=False, return_tensors="np")
    assert np.array_equal(raw["pixel_values"], expected.astype(np.float32))
    # As model/embeddings.py does.
    data = DataConfig(pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.5, 0.6, 0.7))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.pixel_mean, data.pixel_std))
    normalised = (torch.as_tensor(expected).float() / 255.0 - mean) / std
    found = image_processor()(image, return_tensors="pt")["pixel_values"]
    assert found.dtype == torch.float32 and torch.equal(found, normalised)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_files_are_read_as_in_evaluation(name, tmp_path):
    data = encoded(picture("RGB"), name)
    path = tmp_path / "image"
    path.write_bytes(data)
    expected = pixels([Item("image", data)], 32).astype(np.float32)
    for image in (data, path, str(path)):
        found = image_processor()(image, do_rescale=False, do_normalize=False, return_tensors="np")
        assert np.array_equal(found["pixel_values"], expected)


def raw_pixels(image, **options) -> np.ndarray:
    """Pixels of one image as they are given, ``[H, W, 3]``."""
    options = {"do_resize": False, "do_rescale": False, "do_normalize": False} | options
    (found,) = image_processor()(image, **options)["pixel_values"]
    return found.transpose(1, 2, 0)


def every_way(image: Image.Image, path: Path, **options) -> list[np.ndarray]:
    """Raw pixels of an image saved to a file and handed over in every way."""
    image.save(path, **options)
    data = path.read_bytes()
    letters = base64.b64encode(data).decode()
    ways = (path, str(path), data, Image.open(path), letters, f"data:image/png;base64,{letters}")
    loaded = Image.open(path)
    loaded.load()
    fetched = image_processor().fetch_images([str(path)])
    return [raw_pixels(way) for way in (*ways, loaded, fetched)]


NOISE = np.random.default_rng(3).integers(0, 256, (7, 9, 4), dtype=np.uint8)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
        (9, lambda a: a),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_images_are_turned_upright(orientation, upright, name, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = NOISE[..., :3]
    for found in every_way(Image.fromarray(stored), tmp_path / name, exif=exif):
        assert np.array_equal(found, upright(stored))
    assert np.array_equal(raw_pixels(tmp_path / name, exif="keep"), stored)
    # Nothing is left that others would turn by.
    for rule, expected in (("turn", upright(stored)), ("keep", stored)):
        fetched = image_processor(exif=rule).fetch_images(tmp_path / name)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(fetched)), expected)


def on_ground(colours: np.ndarray, alpha: np.ndarray, ground: int = 255) -> np.ndarray:
    share = alpha[..., None].astype(np.float64) / 255
    return np.rint(colours * share + ground * (1 - share))


def grey(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, axis=-1)


PALETTE = np.arange(48, dtype=np.uint8).reshape(16, 3) * 5
COLOURS = Image.fromarray(NOISE[..., 0] % 16)
COLOURS.putpalette(PALETTE.tobytes())
KINDS = {
    "logo": (Image.fromarray(NOISE), {}, on_ground(NOISE[..., :3], NOISE[..., 3])),
    "grey with alpha": (
        *(Image.fromarray(NOISE[..., :2].copy(), "LA"), {}),
        on_ground(grey(NOISE[..., 0]), NOISE[..., 1]),
    ),
    "palette": (
        *(COLOURS, {"transparency": 3}),
        on_ground(PALETTE[NOISE[..., 0] % 16], np.where(NOISE[..., 0] % 16 == 3, 0, 255)),
    ),
    "one transparent colour": (
        *(Image.fromarray(NOISE[..., :3]), {"transparency": tuple(map(int, NOISE[2, 3, :3]))}),
        on_ground(
            NOISE[..., :3], np.where((NOISE[..., :3] == NOISE[2, 3, :3]).all(axis=2), 0, 255)
        ),
    ),
    "16 bits": (
        *(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 250), {}),
        grey(np.rint(NOISE[..., 0] * 250.0 * 255 / 65535)),
    ),
    "16 bits, dark": (
        *(Image.fromarray(NOISE[..., 0].astype(np.uint16)), {}),
        grey(np.where(NOISE[..., 0] > 128, 1, 0)),
    ),
    "16 bits with a transparent value": (
        Image.fromarray(NOISE[..., 0].astype(np.uint16) * 250),
        {"transparency": int(NOISE[0, 0, 0]) * 250},
        on_ground(
            grey(np.rint(NOISE[..., 0] * 250.0 * 255 / 65535)),
            np.where(NOISE[..., 0] == NOISE[0, 0, 0], 0, 255),
        ),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_modes_become_rgb_on_white(kind, tmp_path):
    image, options, expected = KINDS[kind]
    for found in every_way(image, tmp_path / "image.png", **options):
        assert np.array_equal(found, expected)


def test_the_ground_of_transparent_pixels_can_be_chosen():
    colours, alpha = NOISE[..., :3], NOISE[..., 3]
    image = Image.fromarray(NOISE)
    assert np.array_equal(raw_pixels(image, alpha="black"), on_ground(colours, alpha, 0))
    assert np.array_equal(raw_pixels(image, alpha="drop"), colours)
    # An array of four channels is an image with transparency, too.
    assert np.array_equal(raw_pixels(NOISE), on_ground(colours, alpha))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 0.5, 1], [0, 128, 255]), ([0, 0.5, 200.4], [0, 0, 200])],
)
def test_floating_point_files_count_to_1_or_255(values, expected, tmp_path):
    image = Image.fromarray(np.array([values], dtype=np.float32))
    for found in every_way(image, tmp_path / "image.tif"):
        assert np.array_equal(found, grey(np.array([expected])))


def test_tiff_of_whole_numbers_counts_to_65535(tmp_path):
    image = Image.fromarray(np.array([[0, 200, 65535]], dtype=np.int32))
    for found in every_way(image, tmp_path / "image.tif"):
        assert np.array_equal(found, grey(np.array([[0, 1, 255]])))


def test_transparent_grey_of_few_bits(tmp_path):
    # Four pixels of two bits, of which the value 1, grey 85, is transparent.
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 1, 2, 0, 0, 0, 0)), (b"tRNS", b"\0\1")]
    chunks += [(b"IDAT", zlib.compress(bytes([0, 0b00011011]))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content
        data += struct.pack(">I", zlib.crc32(name + content))
    opened = Image.open(io.BytesIO(data))
    # The second time its pixels are loaded.
    for image in (data, opened, opened):
        assert raw_pixels(image)[0, :, 0].tolist() == [0, 255, 170, 255]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [1000, 600])
def test_a_large_jpeg_is_decoded_at_half_its_size(limit, monkeypatch, tmp_path):
    data = encoded(picture("RGB", 48, 32), "JPEG")
    half = Image.open(io.BytesIO(data))
    half.draft(None, (24, 16))
    path = tmp_path / "large.jpg"
    path.write_bytes(data)
    # 600: Pillow itself takes up to twice as many pixels only.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for image in (data, path):
        found = raw_pixels(image)
        assert found.shape == (16, 24, 3) and np.array_equal(found, np.asarray(half))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for image in (data, encoded(picture("RGB", 48, 32), "PNG")):
        with pytest.raises(ValueError, match="exceeds limit of 1000 pixels"):
            raw_pixels(image)


def test_cmyk_and_animations(tmp_path):
    path = tmp_path / "print.jpg"
    for found in every_way(Image.fromarray(NOISE, "CMYK"), path):
        assert np.array_equal(found, np.asarray(Image.open(path).convert("RGB")))
    frames = [Image.new("RGB", (9, 7), colour) for colour in ("red", "blue")]
    for found in every_way(
        frames[0], tmp_path / "two.gif", save_all=True, append_images=frames[1:]
    ):
        assert np.array_equal(found, np.asarray(frames[0]))


def test_a_url_gives_what_the_file_gives(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture("RGB").save(tmp_path / "turned.jpg", exif=exif)
    picture("I;16").save(tmp_path / "deep.png")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            for name in ("turned.jpg", "deep.png"):
                url = f"http://127.0.0.1:{server.server_port}/{name}"
                found, expected = (
                    image_processor()(x)["pixel_values"] for x in (url, tmp_path / name)
                )
                assert np.array_equal(found, expected), name
            with pytest.raises(ValueError, match=f"{server.server_port}/none.png is not readable"):
                image_processor()(f"http://127.0.0.1:{server.server_port}/none.png")
        finally:
            server.shutdown()


def of_tensor(image, **options) -> torch.Tensor:
    return image_processor()(image, return_tensors="pt", **options)["pixel_values"]


ARRAY = np.asarray(picture("RGB"))
FIRST = ARRAY.transpose(2, 0, 1)


@pytest.mark.parametrize(
    "values",
    [
        ARRAY,
        FIRST,
        torch.tensor(ARRAY),
        ARRAY.astype(np.int64),
        ARRAY.astype(np.uint16) * 257,
        ARRAY.astype(np.float32),
        torch.tensor(FIRST).double(),
        torch.tensor(FIRST).bfloat16(),
        ARRAY / 255,
        (ARRAY / 255).astype(np.float32),
        torch.tensor(FIRST).float() / 255,
    ],
    ids=lambda values: f"{values.dtype}-{values.shape[-1]}",
)
def test_arrays_of_all_kinds_are_the_image_that_they_show(values):
    image = picture("RGB")
    expected = of_tensor(image)
    for given in (values, [values], values[None], [values[None]]):
        assert torch.equal(of_tensor(given), expected)
    stack = torch.stack if isinstance(values, torch.Tensor) else np.stack
    two = stack([values, values])
    assert torch.equal(of_tensor(two), torch.cat([expected, expected]))
    samples = torch.cat([expected] * 4).view(2, 2, 3, 32, 32)
    for given in (stack([two, two]), [[values, values]] * 2, [(image, values), [values, image]]):
        assert torch.equal(of_tensor(given), samples)


def test_grey_arrays_of_every_shape():
    grey = ARRAY[:, :, 0]
    expected = of_tensor(picture("RGB").getchannel(0))
    for values in (grey, grey[:, :, None], grey[None], torch.tensor(grey), grey / 255):
        assert torch.equal(of_tensor(values), expected)
    black_and_white = np.array([[True, False]])
    assert np.array_equal(raw_pixels(black_and_white), [[[255] * 3, [0] * 3]])


def test_the_layout_of_an_array_can_be_said():
    # Three rows of four pixels, or three channels of 4 x 3.
    array = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(raw_pixels(array, input_data_format="channels_last"), array)
    for options in ({"input_data_format": "channels_first"}, {}):
        assert np.array_equal(raw_pixels(array, **options), array.transpose(1, 2, 0))
    with pytest.raises(ValueError, match=r"\[45, 70, 3\] is not an image \[1, 3 or 4, H, W\]"):
        image_processor()(ARRAY, input_data_format="channels_first")
    image = picture("RGB")
    last = of_tensor(image, data_format="channels_last")
    assert torch.equal(last, of_tensor(image).permute(0, 2, 3, 1))


def test_floating_point_images_are_rescaled_once():
    fractions = FIRST.astype(np.float32) / 255
    plain = {"do_resize": False, "do_normalize": False, "return_tensors": "np"}
    for rescale in (True, False):
        (found,) = image_processor()(fractions, do_rescale=rescale, **plain)["pixel_values"]
        assert found.dtype == np.float32 and np.allclose(found, fractions, rtol=0, atol=1e-7)
    # Values between two bytes stay where nothing is resized.
    values = fractions * np.float32(254.7)
    (found,) = image_processor()(values, do_rescale=False, **plain)["pixel_values"]
    assert np.array_equal(found, values)
    (found,) = image_processor()(values, **plain)["pixel_values"]
    assert np.allclose(found, values / 255, rtol=0, atol=1e-7)
    resized = image_processor()(
        fractions, do_rescale=False, do_normalize=False, return_tensors="np"
    )
    expected = pixels([Item("image", picture("RGB"))], 32) / 255
    assert np.allclose(resized["pixel_values"], expected, rtol=0, atol=1e-7)


def test_tensors_can_be_put_on_a_device():
    image = picture("RGB")
    for device in ("meta", torch.device("meta")):
        assert of_tensor(image, device=device).device.type == "meta"
    assert torch.equal(of_tensor(image, device="cpu"), of_tensor(image))
    with pytest.raises(ValueError, match="device needs return_tensors='pt'"):
        image_processor()(image, device="cpu")


def test_samples_of_two_images_stay_together():
    first, second, third = (picture("RGB", 20 + n, 30) for n in range(3))
    found = image_processor()([[first, second], [third, first]], return_tensors="pt")
    flat = image_processor()([first, second, third, first], return_tensors="pt")["pixel_values"]
    assert torch.equal(found["pixel_values"], flat.view(2, 2, 3, 32, 32))
    with pytest.raises(ValueError, match="same number of images"):
        image_processor()([[first, second], [third]])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no image", "an image of bytes is not readable"),
        ("/nowhere/image.png", "/nowhere/image.png was not found"),
        (np.full((4, 4, 3), np.nan), "float64 with values of nan"),
        (np.array([[-0.5, 0.5]]), "values of -0.5 to 0.5"),
        (np.array([[0.0, 256.0]]), "values of 0 to 256"),
        (np.array([[0, 256]]), "int64 with values of 0 to 256"),
        (np.array([[1j]]), "complex128, not of numbers"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\[0, 4, 3\]"),
        (Image.fromarray(np.array([[0.0, np.inf]], dtype=np.float32)), "values of 0 to inf"),
        (Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "of 0 to 70000, not of 0 to 655"),
        (np.zeros((5, 4, 5), dtype=np.uint8), r"\[5, 4, 5\]"),
        (3, "got int"),
        (encoded(picture("RGB"), "PNG")[:-900], "an image of bytes is not readable"),
        (Image.new("RGB", (0, 3)), "has 0 x 3 pixels"),
        ([], "no images"),
        ([[], []], "no images"),
        ([[b"", b""], b""], "all in lists"),
    ],
)
def test_what_is_no_image_is_named(image, message):
    with pytest.raises(ValueError, match=message):
        image_processor()(image)


def test_images_of_other_sizes_are_kept_only_where_they_fit_together():
    images = [picture("RGB", 16, 24), picture("RGB", 16, 24)]
    kept = image_processor(do_resize=False)(images, return_tensors="pt")["pixel_values"]
    assert kept.shape == (2, 3, 24, 16)
    other = image_processor()(images, size={"height": 8, "width": 24}, return_tensors="pt")
    assert other["pixel_values"].shape == (2, 3, 8, 24)
    with pytest.raises(ValueError, match="different sizes"):
        image_processor(do_resize=False)([*images, picture("RGB")], return_tensors="pt")
    with pytest.raises(ValueError, match="mode L"):
        image_processor(do_convert_rgb=False)(picture("L"))


def test_image_processor_survives_its_file(folder, tmp_path):
    processor = VLMoEImageProcessor.from_pretrained(folder)
    assert processor.size == {"height": 32, "width": 32}
    processor.save_pretrained(tmp_path)
    again = VLMoEImageProcessor.from_pretrained(tmp_path)
    image = picture("RGB")
    first, second, third = (
        p(image, return_tensors="pt")["pixel_values"] for p in (processor, again, image_processor())
    )
    assert torch.equal(first, second) and torch.equal(first, third)
    larger = VLMoEImageProcessor.from_pretrained(folder, size=48)
    assert larger(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 48, 48)


@pytest.fixture(scope="module")
def processor(folder: Path, tokenizer: VLMoETokenizer) -> VLMoEProcessor:
    return VLMoEProcessor(
        VLMoEImageProcessor.from_pretrained(folder),
        tokenizer,
        text_length=TINY["text_length"],
        pair_text_length=TINY["pair_text_length"],
    )


# An option, a value that it may have, and the same value in the form that is kept.
IMAGE_VALUES = [
    ("do_resize", False, False),
    ("do_rescale", False, False),
    ("do_normalize", np.False_, False),
    ("size", 48, {"height": 48, "width": 48}),
    ("size", [16, 48], {"height": 16, "width": 48}),
    ("size", {"width": 48, "height": 16}, {"height": 16, "width": 48}),
    ("resample", Image.Resampling.NEAREST, 0),
    ("rescale_factor", -1, -1.0),
    ("image_mean", 0.25, [0.25] * 3),
    ("image_std", (1, 2, np.float32(4)), [1.0, 2.0, 4.0]),
    ("exif", "keep", "keep"),
    ("alpha", "black", "black"),
]


@pytest.mark.parametrize(("option", "value", "kept"), IMAGE_VALUES)
def test_image_options_are_kept_on_every_way(option, value, kept, folder, processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "image.png"
    picture("RGBA").save(path, exif=exif)
    given = {option: value, "return_tensors": "np"}
    usual, expected = (
        processor.image_processor(path, **options)["pixel_values"]
        for options in ({"return_tensors": "np"}, given)
    )
    assert usual.shape != expected.shape or not np.array_equal(usual, expected)
    ways = [
        processor(path, **given),
        processor(path, images_kwargs=given),
        processor(path, common_kwargs={"return_tensors": "np"}, images_kwargs={option: value}),
        processor(path, "a text", common_kwargs=given),
        processor(path, "a text", images_kwargs={option: value}, return_tensors="np"),
    ]
    changed = VLMoEImageProcessor.from_pretrained(folder, **{option: value})
    assert getattr(changed, option) == kept
    changed.save_pretrained(tmp_path / "saved")
    again = VLMoEImageProcessor.from_pretrained(tmp_path / "saved")
    ways += [found(path, return_tensors="np") for found in (changed, again)]
    for found in ways:
        assert np.array_equal(found["pixel_values"], expected)


def test_text_options_are_kept_on_every_way(processor):
    text, pair = "a red circle", "the left"
    for given in (
        {"max_length": 8},
        {"padding": True},
        {"padding": "do_not_pad", "add_special_tokens": False},
        {"padding_side": "left"},
        {"truncation": "only_first", "max_length": 7},
        {"return_special_tokens_mask": True, "return_attention_mask": False},
        {"pad_to_multiple_of": 4, "padding": "longest"},
        {"return_length": True, "return_token_type_ids": True},
    ):
        usual = {"padding": "max_length", "truncation": True, "max_length": TINY["text_length"]}
        expected = processor.tokenizer(text, pair, return_tensors="pt", **{**usual, **given})
        for found in (
            processor(text=text, text_pair=pair, return_tensors="pt", **given),
            processor(text=text, text_kwargs={"text_pair": pair, **given}, return_tensors="pt"),
            processor(text=text, text_kwargs={"text_pair": pair, **given, "return_tensors": "pt"}),
            processor(text=text, text_pair=pair, common_kwargs={**given, "return_tensors": "pt"}),
        ):
            assert set(found) == set(expected)
            assert all(torch.equal(found[key], expected[key]) for key in expected)
    # What stands alone goes before what is common; None and what is empty say nothing.
    found = processor(
        text=text,
        max_length=6,
        padding=None,
        videos=None,
        audio_kwargs={},
        common_kwargs={"max_length": 8, "return_tensors": "pt"},
    )
    assert found["input_ids"].shape == (1, 6)


def test_tensors_asked_for_texts_are_made_of_images_too(processor):
    found = processor(picture("RGB"), "a", text_kwargs={"return_tensors": "pt"})
    assert isinstance(found["pixel_values"], torch.Tensor)
    found = processor(picture("RGB"), "a", images_kwargs={"return_tensors": "pt"})
    assert isinstance(found["pixel_values"], torch.Tensor) and isinstance(found["input_ids"], list)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"foo": 1}, "VLMoEProcessor has no option foo;"),
        ({"do_center_crop": True, "bar": None, "zoo": 1}, "has no option do_center_crop, zoo;"),
        ({"text_kwargs": {"size": 3}}, "text_kwargs has no option size;"),
        ({"images_kwargs": {"max_length": 3}}, "images_kwargs has no option max_length;"),
        ({"common_kwargs": {"foo": 3}}, "common_kwargs has no option foo;"),
        ({"videos": [1]}, "has no option videos;"),
        ({"audio_kwargs": {"sampling_rate": 1}}, "has no option audio_kwargs;"),
        ({"text_target": "a"}, "has no option text_target;"),
    ],
)
def test_options_that_are_not_there_are_named(options, name, processor):
    with pytest.raises(TypeError, match=name):
        processor(picture("RGB"), "a text", **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("do_rescale", "no"),
        ("do_resize", 1),
        ("size", {"shortest_edge": 32}),
        ("size", {"height": 32}),
        ("size", 0),
        ("size", "32"),
        ("size", [1, 2, 3]),
        ("resample", 9),
        ("resample", "bicubic"),
        ("rescale_factor", 0),
        ("rescale_factor", "1/255"),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", "half"),
        ("image_std", [0.5, 0, 0.5]),
        ("image_std", float("nan")),
        ("exif", "off"),
        ("alpha", "grey"),
        ("return_tensors", "tf"),
        ("return_tensors", True),
        ("data_format", "last"),
        ("input_data_format", 3),
        ("device", "gpu"),
        ("padding", "longer"),
        ("padding", 1),
        ("truncation", "left"),
        ("max_length", 0),
        ("max_length", "8"),
        ("max_length", True),
        ("stride", -1),
        ("padding_side", "top"),
        ("text_kwargs", 3),
        ("images_kwargs", [1]),
    ],
)
def test_values_that_options_cannot_have_are_named(option, value, processor):
    with pytest.raises(ValueError, match=f"^{option}={re.escape(repr(value))} must be"):
        processor(picture("RGB"), "a text", **{option: value})


def test_an_option_given_twice_is_an_error(processor):
    with pytest.raises(ValueError, match="max_length: given twice, in text_kwargs and beside it"):
        processor(text="a", max_length=4, text_kwargs={"max_length": 8})
    with pytest.raises(ValueError, match="text_pair without text"):
        processor(picture("RGB"), text_pair="a")


def test_options_of_loading(folder, caplog):
    for make in (
        lambda **options: VLMoEImageProcessor(**options),
        lambda **options: VLMoEImageProcessor.from_dict({}, **options),
        lambda **options: VLMoEImageProcessor.from_dict(options),
        lambda **options: VLMoEImageProcessor.from_pretrained(folder, **options),
    ):
        with pytest.raises(TypeError, match="VLMoEImageProcessor has no option crop_size, do_pad;"):
            make(do_pad=True, crop_size=32)
        with pytest.raises(ValueError, match="^size='big' must be"):
            make(size="big")
    # Transformers hands options of its own to all that it loads; what nobody knows is named.
    kept = VLMoEImageProcessor.from_pretrained(
        folder, padding_side="left", pad_token="x", token="y"
    )
    assert not caplog.messages
    loaded = VLMoEImageProcessor.from_pretrained(folder, foo=1, size=48)
    assert caplog.messages == ["VLMoEImageProcessor has no option foo: ignored"]
    assert loaded.to_dict() == {**kept.to_dict(), "size": {"height": 48, "width": 48}}
    # An option of calls alone.
    VLMoEImageProcessor.from_pretrained(folder, max_length=3)
    assert caplog.messages[1:] == ["VLMoEImageProcessor has no option max_length: ignored"]
    _, unused = VLMoEImageProcessor.from_pretrained(folder, foo=1, return_unused_kwargs=True)
    assert unused == {"foo": 1}
    silent = VLMoEImageProcessor(size=None, exif=None, do_resize=None, do_pad=None)
    assert silent.to_dict() == VLMoEImageProcessor().to_dict()
    assert silent(picture("RGB"), do_rescale=None)["pixel_values"][0].shape == (3, 224, 224)


def test_texts_are_filled_up_to_the_length_of_training(processor):
    texts = ["a red circle", "two " * 30]
    images = [picture("RGB"), picture("L")]
    alone = processor(text=texts, return_tensors="pt")
    assert alone["input_ids"].shape == (2, TINY["text_length"])
    pairs = processor(images, texts, return_tensors="pt")
    assert set(pairs) == set(processor.model_input_names)
    assert pairs["input_ids"].shape == (2, TINY["pair_text_length"])
    assert pairs["pixel_values"].shape == (2, 3, 32, 32)
    assert set(processor(images=images, return_tensors="pt")) == {"pixel_values"}
    longest = processor(images, ["a", "a red circle"], padding=True, return_tensors="pt")
    assert longest["input_ids"].shape == (2, 5)
    cut = processor(text=texts, max_length=6, return_tensors="pt")
    assert cut["input_ids"].shape == (2, 6)
    two = processor(text="a red", text_pair="circle", padding=False)
    assert two["input_ids"] == processor.tokenizer("a red", "circle")["input_ids"]
    other = processor(images, images_kwargs={"size": 16}, return_tensors="pt")
    assert other["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="give text, images or both"):
        processor()


def test_processor_decodes(processor):
    ids = processor(text=["a red circle"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a red circle"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a red circle"
