"""Images to ``PREFIX_image``: one document of one uint8 sequence, the encoded file, per image."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.data.preprocess import (
    DatasetOutput,
    Progress,
    Run,
    chunked,
    ordered_map,
    record_counts,
)
from megatron_vlmoe.data.readers.images import read_images
from megatron_vlmoe.data.readers.records import ImageFile, Reject

# Not every format that Pillow knows: its EPS reader, for one, starts Ghostscript.
_READ_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Pillow calls a JPEG with a second picture behind it MPO.
_KEPT_FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP"})
_KEPT_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA"})
_JPEG_QUALITY = 95
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
                    result.images.append(checked_image(item.read(), self.resize_short))
                except DataError as error:
                    result.rejects.append(Reject(item.source, item.record, str(error)))
        return result


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Inside, Pillow's decompression bomb warning is an error and its others are silent."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def checked_image(data: bytes, resize_short: int | None = None) -> bytes:
    """Decodes an encoded image to the end and returns the bytes to store.

    These are the given bytes, unless the image is to be resized or is of a format or mode that
    training does not read (CMYK, 16 bits, GIF, TIFF, ...): then it becomes a JPEG of quality 95.
    The orientation in EXIF is neither applied nor relied on. Call it inside `quiet_pillow`.

    Args:
        data: the encoded image.
        resize_short: shorter side in pixels after shrinking; images are never enlarged.

    Raises:
        DataError: not an image, truncated or corrupt, or a decompression bomb (the reason alone).
    """
    try:
        with Image.open(io.BytesIO(data), formats=_READ_FORMATS) as image:
            if resize_short is not None and min(image.size) > resize_short:
                return _shrunk(image, resize_short)
            if image.format in _KEPT_FORMATS and image.mode in _KEPT_MODES:
                # JPEG: at an eighth of the size all data is still parsed, in half the time.
                image.draft(None, (1, 1))
                image.load()
                return data
            return _jpeg(to_rgb(image))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise DataError(f"decompression bomb: {error}") from error
    except UnidentifiedImageError as error:
        reason = "not an image of a known format" if data else "empty file"
        raise DataError(reason) from error
    except MemoryError as error:
        raise DataError("corrupt image: does not fit into memory") from error
    except Exception as error:
        # Pillow's decoders raise many types on damaged files: OSError, SyntaxError, struct.error,
        # ValueError, IndexError, ...; no code of ours but the conversions runs in this block.
        raise DataError(f"corrupt image: {error}") from error


def _shrunk(image: Image.Image, short: int) -> bytes:
    factor = short / min(image.size)
    width, height = (max(short, round(side * factor)) for side in image.size)
    # Decode JPEG at no less than twice the wanted size, then filter.
    image.draft(None, (2 * width, 2 * height))
    resized = to_rgb(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return _jpeg(resized)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB; grey values of 16 bits and more are brought down to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        return Image.fromarray((values * scale).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def add_images(output: DatasetOutput, images: Sequence[bytes]) -> None:
    """Adds each encoded image as a document of the part ``image``."""
    for data in images:
        output.writers["image"].add_document([np.frombuffer(data, np.uint8)])


def preprocess_images(
    inputs: tuple[str, ...], run: Run, resize_short: int | None = None
) -> DatasetManifest:
    """Checks and indexes the images of folders, tars and files; returns the manifest.

    The result does not depend on ``run.workers``.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable image, or a full disk; nothing
            is left behind.
    """
    progress = Progress("images")
    with DatasetOutput(run.output_prefix, "images", [np.uint8], run.on_error) as output:
        chunks = chunked(read_images(inputs), _CHUNK)
        for result in ordered_map(CheckImages(resize_short), chunks, run.workers):
            output.rejects.add(result.rejects)
            add_images(output, result.images)
            progress.add(result.records)
        files = output.finish(run.source.get("inputs", "the input"))
        writer = output.writers["image"]
        manifest = DatasetManifest(
            kind="images",
            documents=writer.num_documents,
            sequences=writer.num_sequences,
            tokens=0,
            bytes=files["_image.bin"].size,
            files=files,
            source=run.source,
            rejects=output.rejects.count,
            counts=record_counts(writer.num_documents, output.rejects.count),
        )
        output.commit(manifest)
    progress.finish(manifest.rejects, manifest.documents)
    return manifest
