"""Augmentation: boxes inside the image, Pillow's own colours, and aligned views."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import (
    NO_JITTER,
    CropBox,
    ImageDraw,
    apply_crop,
    apply_jitter,
    decode_image,
    draw_crop,
    draw_jitter,
    open_image,
    views,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(width: int = 90, height: int = 60, seed: int = 0) -> Image.Image:
    """A smooth random picture."""
    small = rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def test_crops_lie_inside_and_follow_scale_and_ratio() -> None:
    areas, aspects, lefts = [], [], []
    for seed in range(500):
        box = draw_crop(400, 300, rng(seed), scale=(0.2, 1.0))
        assert box.left >= 0 and box.top >= 0
        assert box.left + box.width <= 400 and box.top + box.height <= 300
        areas.append(box.width * box.height / 120_000)
        aspects.append(box.width / box.height)
        lefts.append(box.left / max(1, 400 - box.width))
    assert 0.19 < min(areas) < 0.25 and max(areas) > 0.9
    assert 0.74 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.35
    assert np.mean(lefts) == pytest.approx(0.5, abs=0.07)


def test_impossible_crops_fall_back_to_the_centre() -> None:
    assert draw_crop(300, 30, rng(), scale=(1.0, 1.0)) == CropBox(130, 0, 40, 30)
    assert draw_crop(30, 300, rng(), scale=(1.0, 1.0)) == CropBox(0, 130, 30, 40)
    assert draw_crop(1, 1, rng()) == CropBox(0, 0, 1, 1)


def test_apply_crop_is_crop_resize_flip() -> None:
    image = picture()
    box = CropBox(10, 5, 40, 30)
    plain = image.crop((10, 5, 50, 35)).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(apply_crop(image, box, 16), plain)
    assert np.array_equal(apply_crop(image, box, 16, flip=True), np.asarray(plain)[:, ::-1])


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, 0, 91, 5), (0, 56, 5, 5)])
def test_apply_crop_refuses_a_box_outside(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="90x60"):
        apply_crop(picture(), CropBox(*box), 8)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.6, 1.0, 1.37, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_pillows_image_enhance(name: str, factor: float) -> None:
    kinds = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "saturation": ImageEnhance.Color,
    }
    noise = Image.fromarray(rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for image in (noise, picture()):
        expected = kinds[name](image).enhance(factor)
        assert np.array_equal(apply_jitter(image, ((name, factor),)), expected)


def test_jitter_steps_apply_in_order() -> None:
    image = picture()
    one, other = ("brightness", 1.4), ("contrast", 0.6)
    first = apply_jitter(apply_jitter(image, (one,)), (other,))
    assert np.array_equal(apply_jitter(image, (one, other)), first)
    assert not np.array_equal(apply_jitter(image, (other, one)), first)


def test_drawn_jitter_has_every_order_and_the_wanted_range() -> None:
    drawn = [draw_jitter(rng(seed), 0.4) for seed in range(200)]
    assert len({tuple(name for name, _ in jitter) for jitter in drawn}) == 6
    factors = [factor for jitter in drawn for _, factor in jitter]
    assert 0.6 <= min(factors) < 0.62 and 1.38 < max(factors) <= 1.4
    assert draw_jitter(rng(), 0.0) == NO_JITTER


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    image = decode_image(encoded(picture().convert(mode), form), "x")
    assert image.mode == "RGB" and image.size == (90, 60)


def test_damaged_images_are_named() -> None:
    data = encoded(picture(), "JPEG")
    without_item = encoded(picture(), "AVIF").replace(b"av01", b"av02")
    for bad in (b"", b"no image", data[: len(data) // 2], without_item):
        with pytest.raises(DataError, match=r"^set_image.bin: image 7: ") as caught:
            decode_image(bad, "set_image.bin: image 7")
        assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture())
    for limit in (90 * 60 - 1, 90 * 30 - 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings(), pytest.raises(DataError, match="here"):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            open_image(data, "here")


def test_opening_reads_the_header_only() -> None:
    data = encoded(picture(), "JPEG")
    assert open_image(data[: len(data) // 2], "x").size == (90, 60)


@pytest.mark.parametrize("flip", [False, True])
def test_two_views_are_aligned_patch_by_patch(flip: bool) -> None:
    jitter = (("contrast", 1.3), ("saturation", 0.7), ("brightness", 0.8))
    draw = ImageDraw(CropBox(60, 20, 180, 150), flip, jitter)
    model, tokenizer = views(picture(360, 240), draw, (64, 32))
    assert model.shape == (3, 64, 64) and tokenizer.shape == (3, 32, 32)
    assert model.dtype == tokenizer.dtype == np.uint8
    means = [
        view.reshape(3, 8, size // 8, 8, size // 8).mean((2, 4))
        for view, size in ((model, 64), (tokenizer, 32))
    ]
    assert means[0].std() > 15
    assert np.abs(means[0] - means[1]).max() < 3
    assert np.abs(means[0] - means[1][:, :, ::-1]).max() > 10


def test_views_of_equal_size_are_equal() -> None:
    draw = ImageDraw(CropBox(0, 0, 50, 50), True, draw_jitter(rng(), 0.4))
    first, second = views(picture(), draw, (32, 32))
    assert np.array_equal(first, second)
