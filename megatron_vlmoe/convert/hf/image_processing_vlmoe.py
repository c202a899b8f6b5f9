"""Images to the pixels that VL-MoE reads: resized as a whole to a square by Pillow, then normalised.

Letters in shapes: n samples, H and W sides of an image as given, S side of the square.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Optional, Sequence, Union
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

HALF = (0.5, 0.5, 0.5)


class VLMoEImageProcessor(BaseImageProcessor):
    """Image processor of VL-MoE; needs Pillow and numpy only.

    Args:
        do_convert_rgb: converts images of other modes to RGB; without that they are an error.
        do_resize: resizes the whole image, whatever its aspect ratio.
        size: ``{"height": S, "width": S}`` or S.
        resample: Pillow's filter; 3 is bicubic.
        do_rescale: brings pixels from 0..255 to 0..1.
        rescale_factor: factor of that.
        do_normalize: subtracts the mean and divides by the standard deviation.
        image_mean: of each channel.
        image_std: of each channel.
        **kwargs: see [`BaseImageProcessor`].
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: Union[int, dict[str, int], None] = None,
        resample: int = 3,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = HALF,
        image_std: Sequence[float] = HALF,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = _size(224 if size is None else size)
        self.resample = int(resample)
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    def preprocess(
        self,
        images: Any,
        do_convert_rgb: Optional[bool] = None,
        do_resize: Optional[bool] = None,
        size: Union[int, dict[str, int], None] = None,
        resample: Optional[int] = None,
        do_rescale: Optional[bool] = None,
        rescale_factor: Optional[float] = None,
        do_normalize: Optional[bool] = None,
        image_mean: Optional[Sequence[float]] = None,
        image_std: Optional[Sequence[float]] = None,
        return_tensors: Optional[str] = None,
    ) -> BatchFeature:
        """`pixel_values` in fp32, ``[n, 3, S, S]``; ``[n, 2, 3, S, S]`` for samples of two images.

        Args:
            images: an image or a list of them, or a list of lists: the images of each sample. An image is a Pillow
                image, a path, a URL, the bytes of a file, or a uint8 array or tensor ``[H, W, 3]`` or ``[3, H, W]``.
                The orientation in EXIF is not applied.
            do_convert_rgb: this and the others: None takes the processor's own.
            do_resize: see the class.
            size: see the class.
            resample: see the class.
            do_rescale: see the class.
            rescale_factor: see the class.
            do_normalize: see the class.
            image_mean: see the class.
            image_std: see the class.
            return_tensors: "pt" for torch, "np" for numpy; None gives a list of arrays.

        Raises:
            ValueError: something that is no image, or images that do not fit into one batch.
        """
        nested = [image if _is_list(image) else [image] for image in _as_list(images)]
        if len({len(sample) for sample in nested}) > 1:
            raise ValueError("all samples must have the same number of images")
        convert = self.do_convert_rgb if do_convert_rgb is None else do_convert_rgb
        resize = self.do_resize if do_resize is None else do_resize
        target = self.size if size is None else _size(size)
        method = self.resample if resample is None else int(resample)
        arrays = []
        for image in (image for sample in nested for image in sample):
            rgb = _rgb(open_image(image), convert)
            if resize:
                rgb = rgb.resize((target["width"], target["height"]), Image.Resampling(method))
            arrays.append(np.asarray(rgb).transpose(2, 0, 1).astype(np.float32))
        if do_rescale if do_rescale is not None else self.do_rescale:
            factor = self.rescale_factor if rescale_factor is None else rescale_factor
            # Training divides by 255, which is not always the same as to multiply by 1 / 255.
            arrays = [array / np.float32(1.0 / factor) for array in arrays]
        if do_normalize if do_normalize is not None else self.do_normalize:
            mean, std = (
                np.asarray(values, dtype=np.float32).reshape(3, 1, 1)
                for values in (
                    self.image_mean if image_mean is None else image_mean,
                    self.image_std if image_std is None else image_std,
                )
            )
            arrays = [(array - mean) / std for array in arrays]
        if return_tensors is not None and len({array.shape for array in arrays}) > 1:
            raise ValueError(
                "images of different sizes do not fit into one batch; do_resize makes them equal"
            )
        if _is_list(_first(images)):
            count = len(nested[0])
            pixels = [np.stack(arrays[n : n + count]) for n in range(0, len(arrays), count)]
        else:
            pixels = arrays
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)


def open_image(image: Any) -> Image.Image:
    """A Pillow image of any mode.

    Raises:
        ValueError: not an image, or a damaged one.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, Path, bytes, bytearray)):
        name = "bytes" if isinstance(image, (bytes, bytearray)) else image
        try:
            if isinstance(image, str) and image.startswith(("http://", "https://")):
                # The library's own `load_image` turns pictures by their EXIF and cuts 16-bit values off at 255.
                with urlopen(Request(image, headers={"User-Agent": "vlmoe"}), timeout=60) as answer:
                    image = answer.read()
            opened = Image.open(
                io.BytesIO(image) if isinstance(image, (bytes, bytearray)) else image
            )
            opened.load()
        except FileNotFoundError:
            raise ValueError(f"image {name} was not found") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"image {name} is not readable: {error}") from error
        return opened
    if hasattr(image, "detach"):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"expected an image, got {type(image).__name__}")
    return _of_array(image)


def _of_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.dtype != np.uint8:
        raise ValueError(f"an image of {array.dtype} {shape}; arrays must be uint8, 0 to 255")
    if array.ndim == 3 and array.shape[2] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"an array {shape} is not [height, width, 3] or [3, height, width]")
    return Image.fromarray(np.ascontiguousarray(array))


def _rgb(image: Image.Image, convert: bool) -> Image.Image:
    """The image in RGB; grey values of 16 bits and more are brought down to 8."""
    if not image.width or not image.height:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")
    if image.mode == "RGB":
        return image
    if not convert:
        raise ValueError(f"an image of mode {image.mode}, not RGB; do_convert_rgb converts it")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / 65535 if values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    try:
        return {"height": int(size["height"]), "width": int(size["width"])}
    except (KeyError, TypeError):
        raise ValueError(f"size={size!r} must be a number or have height and width") from None


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _as_list(images: Any) -> list[Any]:
    """A batch: of lists as they are, of arrays with one dimension more, or of the one image."""
    if _is_list(images):
        return list(images)
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _first(images: Any) -> Any:
    return images[0] if _is_list(images) and images else None


__all__ = ["VLMoEImageProcessor"]
