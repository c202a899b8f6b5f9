"""RandAugment and random erasing: draws as the recipes say, operations as Pillow and hand arithmetic say."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from megatron_vlmoe.data.augment import (
    FILL,
    CropBox,
    Erase,
    apply_erase,
    apply_rand_augment,
    draw_erase,
    draw_rand_augment,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture(size: int = 48) -> Image.Image:
    small = rng(4).integers(20, 220, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BILINEAR)


def draws(recipe: str, size: int = 200, count: int = 3000) -> list[tuple[tuple[str, float], ...]]:
    generator = rng(1)
    return [draw_rand_augment(generator, recipe, size) for _ in range(count)]


def magnitudes(drawn: list[tuple[tuple[str, float], ...]]) -> dict[str, list[float]]:
    values = defaultdict(list)
    for name, magnitude in (op for ops in drawn for op in ops):
        values[name].append(magnitude)
    return values


@pytest.mark.parametrize(("recipe", "kinds"), [("vl", 10), ("imagenet", 15)])
def test_two_draws_with_replacement_each_applied_half_the_time(recipe: str, kinds: int) -> None:
    drawn = draws(recipe)
    lengths = Counter(map(len, drawn))
    assert set(lengths) == {0, 1, 2}
    assert lengths[0] / 3000 == pytest.approx(0.25, abs=0.03)
    assert lengths[2] / 3000 == pytest.approx(0.25, abs=0.03)
    counts = Counter(name for ops in drawn for name, _ in ops)
    assert len(counts) == kinds
    assert all(n * kinds / 3000 == pytest.approx(1.0, abs=0.3) for n in counts.values())
    twice = sum(len(ops) == 2 and ops[0][0] == ops[1][0] for ops in drawn)
    assert twice / lengths[2] == pytest.approx(1 / kinds, abs=0.04)


def test_vl_magnitudes() -> None:
    values = magnitudes(draws("vl"))
    expected = {
        **dict.fromkeys(("identity", "auto_contrast", "equalize"), {0.0}),
        **dict.fromkeys(("brightness", "sharpness"), {1.36}),
        **dict.fromkeys(("shear_x", "shear_y"), {0.21, -0.21}),
        **dict.fromkeys(("translate_x", "translate_y"), {7.0, -7.0}),
        "rotate": {21.0, -21.0},
    }
    assert {name: {round(v, 9) for v in own} for name, own in values.items()} == expected
    for name in ("shear_x", "translate_y", "rotate"):
        assert np.mean(np.sign(values[name])) == pytest.approx(0.0, abs=0.2)
    # Pixels, whatever the size.
    assert {abs(v) for v in magnitudes(draws("vl", size=480))["translate_x"]} == {7.0}


def test_imagenet_magnitudes() -> None:
    values = magnitudes(draws("imagenet", size=200))
    rotations = np.abs(values["rotate"])
    # Levels 9 +- 0.5 times three degrees, never more than 30.
    assert rotations.mean() == pytest.approx(27.0, abs=0.5)
    assert rotations.std() == pytest.approx(1.5, abs=0.3) and rotations.max() <= 30.0
    shifts = np.abs(values["translate_x"])
    assert shifts.mean() == pytest.approx(0.405 * 200, abs=2) and shifts.max() <= 90.0
    half = np.abs(magnitudes(draws("imagenet", size=100))["translate_x"])
    assert half == pytest.approx(shifts / 2)
    for name in ("color", "contrast", "brightness", "sharpness"):
        weak, strong = (np.asarray([v for v in values[name] if (v > 1) == up]) for up in (0, 1))
        assert weak.mean() == pytest.approx(0.19, abs=0.03) and weak.min() >= 0.1
        assert strong.mean() == pytest.approx(1.81, abs=0.03) and strong.max() <= 1.9
    assert set(values["posterize"]) == {1}
    assert {type(v) for v in values["solarize"]} == {int}
    assert np.mean(values["solarize"]) == pytest.approx(26, abs=2) and min(values["solarize"]) >= 0
    assert np.mean(values["solarize_add"]) == pytest.approx(98.5, abs=2)
    assert set(values["invert"]) == {0.0}


def test_draws_are_functions_of_the_generator_and_recipes_have_names() -> None:
    seeds = range(40)
    for recipe in ("vl", "imagenet"):
        first = [draw_rand_augment(rng(seed), recipe, 64) for seed in seeds]
        assert first == [draw_rand_augment(rng(seed), recipe, 64) for seed in seeds]
        assert len(set(first)) > 10
    with pytest.raises(ValueError, match="'VL' is none of vl, imagenet"):
        draw_rand_augment(rng(), "VL", 64)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (("identity", 0.0), lambda im: im),
        (("auto_contrast", 0.0), ImageOps.autocontrast),
        (("equalize", 0.0), ImageOps.equalize),
        (("invert", 0.0), ImageOps.invert),
        (("posterize", 1), lambda im: Image.fromarray(np.asarray(im) & 128)),
        (("posterize", 2), lambda im: Image.fromarray(np.asarray(im) & 192)),
        (("brightness", 1.36), lambda im: ImageEnhance.Brightness(im).enhance(1.36)),
        (("contrast", 0.19), lambda im: ImageEnhance.Contrast(im).enhance(0.19)),
        (("color", 1.81), lambda im: ImageEnhance.Color(im).enhance(1.81)),
        (("sharpness", 1.36), lambda im: ImageEnhance.Sharpness(im).enhance(1.36)),
    ],
)
def test_colour_operations_are_pillows(op: tuple[str, float], expected) -> None:
    assert np.array_equal(apply_rand_augment(picture(), (op,)), expected(picture()))


def test_solarize_by_hand() -> None:
    values = np.asarray([0, 25, 26, 127, 128, 255], dtype=np.uint8)
    image = Image.fromarray(np.repeat(values[None, :, None], 3, axis=2))
    solarized = np.asarray(apply_rand_augment(image, (("solarize", 26),)))
    assert solarized[0, :, 1].tolist() == [0, 25, 229, 128, 127, 0]
    added = np.asarray(apply_rand_augment(image, (("solarize_add", 99),)))
    assert added[0, :, 2].tolist() == [99, 124, 125, 226, 128, 255]
    assert np.asarray(apply_rand_augment(image, (("solarize_add", 200),)))[0, 3, 0] == 255


def test_translation_by_hand() -> None:
    pixels = np.asarray(picture())
    moved = np.asarray(apply_rand_augment(picture(), (("translate_x", 7.0),)))
    assert np.array_equal(moved[:, :-7], pixels[:, 7:]) and (moved[:, -7:] == FILL).all()
    moved = np.asarray(apply_rand_augment(picture(), (("translate_y", -7.0),)))
    assert np.array_equal(moved[7:], pixels[:-7]) and (moved[:7] == FILL).all()


def test_shear_and_rotation_turn_what_they_should() -> None:
    # A vertical white line through the middle of a black square.
    square = np.zeros((64, 64, 3), dtype=np.uint8)
    square[:, 31:33] = 255
    image = Image.fromarray(square)

    def centre(name: str, magnitude: float, row: int) -> float:
        line = np.asarray(apply_rand_augment(image, ((name, magnitude),)))[row, 12:52, 0]
        return float(line @ np.arange(12, 52) / line.sum())

    # Column x of row y comes from x + 0.21 y: the line moves left by 0.21 pixels per row.
    assert centre("shear_x", 0.21, 40) - centre("shear_x", 0.21, 20) == pytest.approx(-4.2, abs=0.1)
    assert centre("shear_y", 0.21, 40) == pytest.approx(31.5, abs=0.1)
    slope = (centre("rotate", 21.0, 42) - centre("rotate", 21.0, 22)) / 20
    assert slope == pytest.approx(np.tan(np.radians(21)), abs=0.02)
    corner = np.asarray(apply_rand_augment(image, (("rotate", 21.0),)))[0, 0]
    assert tuple(corner) == FILL


def test_operations_are_applied_in_order() -> None:
    image = picture()
    both = apply_rand_augment(image, (("translate_x", 7.0), ("invert", 0.0)))
    first = apply_rand_augment(image, (("translate_x", 7.0),))
    assert np.array_equal(both, ImageOps.invert(first))
    assert not np.array_equal(
        both, apply_rand_augment(ImageOps.invert(image), (("translate_x", 7.0),))
    )
    assert apply_rand_augment(image, ()) is image
    with pytest.raises(ValueError, match="unknown RandAugment operation 'blur'"):
        apply_rand_augment(image, (("blur", 1.0),))


def test_every_drawn_operation_can_be_applied() -> None:
    image = picture(32)
    names = set()
    for recipe in ("vl", "imagenet"):
        for ops in draws(recipe, size=32, count=150):
            assert apply_rand_augment(image, ops).size == (32, 32)
            names |= {name for name, _ in ops}
    assert len(names) == 16


def test_erased_boxes_follow_the_recipe() -> None:
    drawn = [draw_erase(rng(seed), 100, 0.4) for seed in range(2000)]
    kept = [erase for erase in drawn if erase is not None]
    assert len(kept) / 2000 == pytest.approx(0.4, abs=0.03)
    areas = np.asarray([e.box.width * e.box.height / 10_000 for e in kept])
    aspects = np.log([e.box.height / e.box.width for e in kept])
    assert 0.015 < areas.min() < 0.03 and 0.31 < areas.max() < 0.35
    assert areas.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.01)
    assert aspects.mean() == pytest.approx(0.0, abs=0.1) and np.abs(aspects).max() < 1.35
    for erase in kept:
        assert 0 <= erase.box.left <= 100 - erase.box.width
        assert 0 <= erase.box.top <= 100 - erase.box.height
    assert min(e.box.top for e in kept) == 0 and len({e.seed for e in kept}) == len(kept)
    assert draw_erase(rng(), 100, 0.0) is None and draw_erase(rng(), 100, 1.0) is not None
    assert draw_erase(rng(), 1, 1.0) is None


def test_erased_pixels_are_normalised_noise() -> None:
    pixels = np.full((3, 80, 80), 7, dtype=np.uint8)
    erase = Erase(CropBox(left=10, top=20, width=60, height=50), seed=3)
    erased = apply_erase(pixels, erase, MEAN, STD)
    outside = erased.copy()
    outside[:, 20:70, 10:70] = 7
    assert (outside == 7).all() and (pixels == 7).all()
    noise = erased[:, 20:70, 10:70] / 255.0
    for channel in range(3):
        # Clipping at black, two deviations away, takes a little.
        assert noise[channel].mean() == pytest.approx(MEAN[channel], abs=0.02)
        assert noise[channel].std() == pytest.approx(STD[channel], abs=0.02)
    assert np.array_equal(erased, apply_erase(pixels, erase, MEAN, STD))
    assert not np.array_equal(erased, apply_erase(pixels, Erase(erase.box, 4), MEAN, STD))
    assert apply_erase(pixels, None, MEAN, STD) is pixels
    with pytest.raises(ValueError, match="80x80"):
        apply_erase(pixels, Erase(CropBox(30, 0, 60, 5), 0), MEAN, STD)
