"""Images to the pixels that VL-MoE reads: resized as a whole to a square by Pillow, then normalised.

Letters in shapes: n samples, H and W sides of an image as given, S side of the square.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional, TypedDict

import numpy as np
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.utils import logging

from .images_vlmoe import channels_last, read_image, to_bytes
from .options_vlmoe import IMAGE_CALL_OPTIONS, IMAGE_OPTIONS, OPTION_NAMES, checked

if TYPE_CHECKING:
    # Transformers saves the files that a class's own file names: the pipelines travel with this one.
    from .pipelines_vlmoe import OwnImages  # noqa: F401

DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": 224,
    "resample": Image.Resampling.BICUBIC,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": 0.5,
    "image_std": 0.5,
    "exif": "turn",
    "alpha": "white",
}
# Entries that transformers itself adds to the file.
FILE_ENTRIES = ("image_processor_type", "feature_extractor_type", "processor_class", "auto_map")
# What loading takes besides options of images: where files lie, and options of the tokenizer beside.
LOADING_OPTIONS = {
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision"),
    *("proxies", "subfolder", "image_processor_filename", "trust_remote_code", "use_fast"),
    *("backend", "model_max_length", "truncation_side", "padding_side", "chat_template"),
    *("extra_special_tokens", "add_special_tokens"),
}

logger = logging.get_logger(__name__)


class VLMoEImageProcessor(BaseImageProcessor):
    """Image processor of VL-MoE; needs Pillow and numpy only.

    Args:
        do_convert_rgb: converts images of other modes and transparent ones to RGB; without that they are an error.
        do_resize: resizes the whole image, whatever its aspect ratio.
        size: ``{"height": S, "width": S}``, ``[S, S]`` or S.
        resample: Pillow's filter; 3 is bicubic.
        do_rescale: brings pixels from 0..255 to 0..1.
        rescale_factor: factor of that.
        do_normalize: subtracts the mean and divides by the standard deviation.
        image_mean: of each channel, or of all.
        image_std: of each channel, or of all.
        exif: "turn" turns images upright by the orientation in their EXIF, "keep" leaves them.
        alpha: ground of transparent pixels, "white" or "black"; "drop" takes the colours under them.
        **kwargs: what transformers adds to the file of an image processor. None takes the default of an option.

    Raises:
        TypeError: an option that is not there.
        ValueError: an option that cannot have its value.
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = TypedDict(  # type: ignore[misc, assignment]
        "VLMoEImagesKwargs", {name: Any for name in IMAGE_CALL_OPTIONS}, total=False
    )

    def __init__(self, **kwargs: Any) -> None:
        entries = {k: v for k, v in kwargs.items() if k in FILE_ENTRIES or k.startswith("_")}
        super().__init__(**entries)
        given = {k: v for k, v in kwargs.items() if k not in entries and v is not None}
        options = checked({**DEFAULTS, **given}, IMAGE_OPTIONS, type(self).__name__)
        for name, value in options.items():
            setattr(self, name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads one; options of images take the place of those in the file.

        Args:
            pretrained_model_name_or_path: folder, file or repository.
            **kwargs: options of the class, and of loading as every image processor has. Others are named in a warning;
                `return_unused_kwargs` returns them.

        Raises:
            TypeError: an option of other image processors that this one does not have.
            ValueError: an option that cannot have its value.
        """
        unused = [
            name
            for name in kwargs
            if name not in OPTION_NAMES | LOADING_OPTIONS
            and not name.startswith("_")
            and not name.endswith("_token")
        ]
        # A pipeline hands the options of its model to all.
        if unused and not {"return_unused_kwargs", "_from_pipeline"} & set(kwargs):
            logger.warning(f"{cls.__name__} has no option {', '.join(unused)}: ignored")
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """One of the entries of a file and of options that take their place; see `from_pretrained`."""
        given = {name: kwargs.pop(name) for name in OPTION_NAMES if name in kwargs}
        return super().from_dict({**image_processor_dict, **given}, **kwargs)

    def fetch_images(self, image_url_or_urls: Any, timeout: Optional[float] = None) -> Any:
        """Images as `preprocess` reads them: of Pillow, upright, in RGB; in lists as they were given.

        Args:
            image_url_or_urls: see `preprocess`; arrays and tensors are returned as they are.
            timeout: seconds to wait for a URL; None waits for 60.

        Raises:
            ValueError: something that is no image.
        """
        if _is_list(image_url_or_urls):
            return [self.fetch_images(image, timeout) for image in image_url_or_urls]
        if _is_array(image_url_or_urls):
            return image_url_or_urls
        return read_image(image_url_or_urls, self.exif, self.alpha, timeout=timeout)

    def preprocess(self, images: Any, **options: Any) -> BatchFeature:
        """`pixel_values` in fp32, ``[n, 3, S, S]``; ``[n, 2, 3, S, S]`` for samples of two images.

        Files and Pillow images are turned by their EXIF, put on white where they are transparent, and brought to
        8 bits: grey of 16 bits is divided by 257, floating-point grey multiplied by 255 if no value is above 1.

        Arrays are taken as they are. They may hold bytes, other whole numbers of 0..255, uint16 of 0..65535, or
        floating-point numbers of 0..255 or of 0..1. Where all are of 0..1 they count as rescaled already: with or
        without `do_rescale` they stay of 0..1. Floating-point numbers are rounded to 8 bits for resizing.

        Args:
            images: an image or a list of them, or a list of lists: the images of each sample. An image is a Pillow
                image, a path, a URL, the bytes of a file, base64, or an array or tensor ``[3, H, W]``, ``[H, W, 3]``
                (also of 1 channel or 4) or ``[H, W]``. An array with one dimension more is a list of images, with two
                more a list of samples.
            **options: those of the class, for this call, and

                - `return_tensors`: "pt" for torch, "np" for numpy; without it there is a list of arrays.
                - `data_format`: "channels_first", which the model reads, or "channels_last".
                - `input_data_format`: the same of arrays; without it their shapes tell, first where they may be both.
                - `device`: where to put tensors of torch. They are computed on the CPU.

        Raises:
            TypeError: an option that is not there.
            ValueError: an option that cannot have its value, something that is no image, or images that do not fit into
                one batch.
        """
        owner = type(self).__name__
        own = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        chosen = own | checked(options, IMAGE_CALL_OPTIONS, owner)
        tensors = chosen.get("return_tensors")
        if "device" in chosen and tensors != "pt":
            raise ValueError("device needs return_tensors='pt'")
        samples, nested = _samples(images)
        arrays = [self._normalised(image, chosen) for sample in samples for image in sample]
        if (tensors or nested) and len({array.shape for array in arrays}) > 1:
            raise ValueError(
                "images of different sizes do not fit into one batch; do_resize makes them equal"
            )
        if nested:
            count = len(samples[0])
            arrays = [np.stack(arrays[n : n + count]) for n in range(0, len(arrays), count)]
        batch = BatchFeature({"pixel_values": arrays}, tensor_type=tensors)
        return batch.to(chosen["device"]) if "device" in chosen else batch

    def _normalised(self, image: Any, options: dict[str, Any]) -> np.ndarray:
        """One image in fp32, ``[3, H, W]`` or as `data_format` says."""
        pixels, scale = _pixels(image, options)
        if options["do_rescale"]:
            # Training divides by 255, which is not always the same as to multiply by 1 / 255.
            pixels = pixels.astype(np.float32) / np.float32(1.0 / options["rescale_factor"])
        else:
            pixels = (pixels / scale).astype(np.float32)
        if options["do_normalize"]:
            mean, std = (np.float32(options[name]) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / std
        last = options.get("data_format") == "channels_last"
        return np.ascontiguousarray(pixels if last else pixels.transpose(2, 0, 1))


def _pixels(image: Any, options: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Values of 0..255, ``[H, W, 3]``, and what they were multiplied by to be so."""
    scale = 1.0
    if _is_array(image):
        values, scale = channels_last(image, options.get("input_data_format"))
        if values.dtype != np.uint8 and values.ndim == 3 and values.shape[2] == 3:
            if not options["do_resize"]:
                return values, scale
        image = Image.fromarray(np.ascontiguousarray(to_bytes(values)))
    rgb = read_image(image, options["exif"], options["alpha"], options["do_convert_rgb"])
    if options["do_resize"]:
        size = options["size"]["width"], options["size"]["height"]
        rgb = rgb.resize(size, Image.Resampling(options["resample"]))
    return np.asarray(rgb), scale


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "detach")


def _samples(images: Any) -> tuple[list[list[Any]], bool]:
    """The images of every sample, and whether they were given so."""
    if _is_array(images) and images.ndim == 5:
        images = [list(sample) for sample in images]
    elif not _is_list(images):
        images = [images]
    flat: list[Any] = []
    for image in images:
        # A batch.
        flat += list(image) if _is_array(image) and image.ndim == 4 else [image]
    kinds = {_is_list(image) for image in flat}
    if len(kinds) > 1:
        raise ValueError("images are either all in lists, those of a sample, or none is")
    samples = [list(image) if _is_list(image) else [image] for image in flat]
    if len({len(sample) for sample in samples}) > 1:
        raise ValueError("all samples must have the same number of images")
    if not samples or not samples[0]:
        raise ValueError("there are no images in the list")
    return samples, kinds == {True}


__all__ = ["VLMoEImageProcessor"]
