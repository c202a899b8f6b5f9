"""Images to ``PREFIX_image``: one document of one uint8 sequence, the encoded file, per image."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile, get_sampling

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.convert.hf.images_vlmoe import load_pixels, orientation, turned
from megatron_vlmoe.data.image_files import (
    DEFAULT_RULES,
    ImageRules,
    decoding_errors,
    is_large,
    is_transparent,
    open_image_file,
    quiet_pillow,
    rgb_pixels,
    to_rgb,
)
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.prepare.readers.images import read_images
from megatron_vlmoe.prepare.readers.records import (
    ImageFile,
    PassedOver,
    Reject,
    kinds_of,
    passed_over_line,
)
from megatron_vlmoe.prepare.tool import (
    DatasetOutput,
    Run,
    chunked,
    ordered_map,
    record_counts,
    rejected_words,
    without,
)
from megatron_vlmoe.runtime.progress import Progress

_KEPT_FORMATS = frozenset({"JPEG", "PNG", "WEBP"})
_KEPT_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_JPEG_QUALITY = 95
# Pillow's number of 4:2:0: colours at half the resolution both ways.
_HALVED_COLOURS = 2
_CHUNK = 16


@dataclass
class CheckedImages:
    """The result of one chunk."""

    images: list[bytes] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    records: int = 0


@dataclass(frozen=True)
class CheckImages:
    """The work on one chunk of images."""

    resize_short: int | None
    rules: ImageRules = DEFAULT_RULES

    def build(self) -> Callable[[list[ImageFile | Reject]], CheckedImages]:
        """Returns the function of a chunk."""
        return self._check

    def _check(self, chunk: list[ImageFile | Reject]) -> CheckedImages:
        result = CheckedImages(records=len(chunk))
        with quiet_pillow():
            for item in chunk:
                if isinstance(item, Reject):
                    result.rejects.append(item)
                    continue
                try:
                    data = checked_image(item.read(), self.resize_short, self.rules)
                    result.images.append(data)
                except DataError as error:
                    result.rejects.append(Reject(item.source, item.record, str(error)))
        return result


def checked_image(
    data: bytes, resize_short: int | None = None, rules: ImageRules = DEFAULT_RULES
) -> bytes:
    """Decodes an encoded image to the end and returns the bytes to store.

    These are the given bytes, unless the image is to be resized, turned upright or put on a ground, or is of a format
    or mode that training does not read (CMYK, 16 bits, GIF, TIFF, ...). Then it becomes a JPEG of quality 95; but
    what is only turned or put on a ground stays a PNG or lossless WebP if it was one. Call it inside `quiet_pillow`.

    Args:
        data: the encoded image.
        resize_short: shorter side in pixels after shrinking; images are never enlarged.
        rules: about orientation and transparency.

    Raises:
        DataError: not an image, truncated or corrupt, too large, or a decompression bomb (the reason alone).
    """
    with decoding_errors(), open_image_file(data) as image:
        if resize_short is not None and min(image.size) > resize_short:
            return _shrunk(image, resize_short, rules)
        if is_large(image):
            raise _too_large(image)
        if image.format not in _KEPT_FORMATS or image.mode not in _KEPT_MODES:
            return _jpeg(rgb_pixels(image, rules))
        if isinstance(image, JpegImageFile):
            if rules.exif == "keep" or orientation(image) == 1:
                # At an eighth of the size all data is still parsed, in half the time.
                image.draft(None, (1, 1))
                image.load()
                return data
            # Not with the file's own quality: where a side is no multiple of 8 pixels, blocks fall
            # elsewhere, and all that it lost once it would lose again.
            halved = get_sampling(image) == _HALVED_COLOURS
            return _jpeg(turned(image, load_pixels(image, rules.exif)), None if halved else 0)
        way = load_pixels(image, rules.exif)
        transparent = rules.alpha != "drop" and is_transparent(image)
        if way == 1 and not transparent:
            return data
        upright = turned(to_rgb(image, rules.alpha) if transparent else image, way)
        return _like(data, upright)


def _shrunk(image: Image.Image, short: int, rules: ImageRules) -> bytes:
    size = image.size
    if isinstance(image, JpegImageFile):
        # Decode at no less than twice the wanted size, then filter.
        wanted = [2 * side for side in _fitted(size, short)]
        if is_large(image):
            if 2 * short > min(size):
                raise _too_large(image)
            wanted = [min(pair) for pair in zip(wanted, (side // 2 for side in size))]
        image.draft(None, (wanted[0], wanted[1]))
    way = load_pixels(image, rules.exif)
    if not isinstance(image, JpegImageFile):
        # Some formats know their size only now: a TIFF has been turned.
        size = image.size
    rgb = to_rgb(image, rules.alpha)
    resized = rgb.resize(_fitted(size, short), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return _jpeg(turned(resized, way))


def _fitted(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height with the shorter side made ``short``."""
    factor = short / min(size)
    return max(short, round(size[0] * factor)), max(short, round(size[1] * factor))


def _too_large(image: Image.Image) -> DataError:
    return DataError(
        f"{image.width}x{image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS} that are stored whole: "
        f"shrink it by --resize-short, to {min(image.size) // 2} at most"
    )


def _jpeg(image: Image.Image, subsampling: int | None = None) -> bytes:
    buffer = io.BytesIO()
    options = {} if subsampling is None else {"subsampling": subsampling}
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY, **options)
    return buffer.getvalue()


def _like(data: bytes, image: Image.Image) -> bytes:
    """Pixels in the format of the PNG or WebP file ``data``; in JPEG if that was a lossy WebP."""
    # The transparent colour alone: a writer might take over the orientation, in XMP for one.
    image.info = {k: v for k, v in image.info.items() if k == "transparency"}
    buffer = io.BytesIO()
    if data.startswith(b"\x89PNG"):
        image.save(buffer, "PNG")
    elif _is_lossless_webp(data):
        image.save(buffer, "WEBP", lossless=True, exact=True)
    else:
        return _jpeg(image.convert("RGB"))
    return buffer.getvalue()


def _is_lossless_webp(data: bytes) -> bool:
    """Whether the first chunk of pixels is lossless; of an animation, of its first frame."""
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        # A frame's own chunks come after 16 bytes of its place and time.
        place += 24 if name == b"ANMF" else 8 + size + size % 2
    return False


def add_images(output: DatasetOutput, images: Sequence[bytes]) -> None:
    """Adds each encoded image as a document of the part ``image``."""
    for data in images:
        output.writers["image"].add_document([np.frombuffer(data, np.uint8)])


def preprocess_images(
    inputs: tuple[str, ...],
    run: Run,
    resize_short: int | None = None,
    rules: ImageRules = DEFAULT_RULES,
) -> DatasetManifest:
    """Checks and indexes the images of folders, tars and files; returns the manifest.

    The result does not depend on ``run.workers``.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable image, or a full disk; nothing
            is left behind.
    """
    with (
        Progress("images") as progress,
        DatasetOutput(run.output_prefix, "images", [np.uint8], run.on_error) as output,
    ):
        passed_over = output.rejects.passed_over
        found: Iterator[ImageFile | Reject] = without(read_images(inputs), PassedOver, passed_over)
        chunks = chunked(found, _CHUNK)
        for result in ordered_map(CheckImages(resize_short, rules), chunks, run.workers):
            output.rejects.add(result.rejects)
            add_images(output, result.images)
            progress.add(result.records)
        manifest = output.manifest(
            run.source,
            rules=rules,
            counts=record_counts(output.writers["image"].num_documents, output.rejects.count),
            passed_over=kinds_of(passed_over),
        )
        output.commit(manifest)
    progress.finish(rejected_words(manifest.rejects, manifest.documents))
    if manifest.passed_over:
        print(f"images: {passed_over_line(manifest.passed_over)}", file=sys.stderr)
    return manifest
