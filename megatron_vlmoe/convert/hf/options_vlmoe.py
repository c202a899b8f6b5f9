"""Which options the processors of VL-MoE know, and what values each may have."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image
from transformers.processing_utils import ImagesKwargs

Reader = Callable[[Any], Any]


def checked(
    options: Mapping[str, Any], readers: Mapping[str, Reader], owner: str
) -> dict[str, Any]:
    """Options in one form each, which the reader of each makes of its value; those that are None are left out.

    Raises:
        TypeError: unknown options, by name.
        ValueError: an option that cannot have its value.
    """
    if unknown := sorted(set(options) - set(readers)):
        raise TypeError(f"{owner} has no option {', '.join(unknown)}; it has {', '.join(readers)}")
    found = {}
    for name, value in options.items():
        if value is None:
            continue
        try:
            found[name] = readers[name](value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} must be {error}") from None
    return found


def _boolean(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError("True or False")
    return bool(value)


def _whole(least: int) -> Reader:
    def read(value: Any) -> int:
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
            raise ValueError(f"a whole number of at least {least}")
        return int(value)

    return read


def _number(value: Any) -> float:
    # Not zero: images are divided by the inverse of it.
    if not _is_number(value) or value == 0:
        raise ValueError("a number other than 0")
    return float(value)


def _is_number(value: Any) -> bool:
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(*known: Any) -> Reader:
    def read(value: Any) -> Any:
        plain = getattr(value, "value", value)
        # By type too: 1 equals True.
        for choice in known:
            if type(plain) is type(choice) and plain == choice:
                return choice
        raise ValueError("one of " + ", ".join(map(repr, known)))

    return read


def _size(value: Any) -> dict[str, int]:
    side = _whole(1)
    try:
        if isinstance(value, (list, tuple)):
            height, width = value
            return {"height": side(height), "width": side(width)}
        if not isinstance(value, (int, np.integer)):
            # A dictionary, or the class that transformers 5 makes of one.
            sides = {name: number for name, number in dict(value).items() if number is not None}
            if sorted(sides) == ["height", "width"]:
                return {name: side(sides[name]) for name in ("height", "width")}
            raise ValueError
        return {"height": side(value), "width": side(value)}
    except (TypeError, ValueError):
        raise ValueError(
            "a number of pixels, [height, width], or {'height': ..., 'width': ...}: images are resized as a whole"
        ) from None


def _filter(value: Any) -> int:
    if isinstance(value, bool) or value not in list(Image.Resampling):
        raise ValueError("a filter of Pillow, 0 to 5")
    return int(value)


def _channels(positive: bool) -> Reader:
    def read(value: Any) -> list[float]:
        values = [value] * 3 if _is_number(value) else value
        if isinstance(values, Iterable) and not isinstance(values, str):
            numbers = list(values)
            if len(numbers) == 3 and all(
                _is_number(x) and (x > 0 or not positive) for x in numbers
            ):
                return [float(x) for x in numbers]
        raise ValueError("a number or three of them" + (", above 0" if positive else ""))

    return read


def _device(value: Any) -> Any:
    import torch

    try:
        return torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError("a device of torch, as 'cpu' or 'cuda:0'") from None


_TENSORS = _one_of("pt", "np")
_LAYOUT = _one_of("channels_first", "channels_last")

# Options that the image processor keeps.
IMAGE_OPTIONS: dict[str, Reader] = {
    "do_convert_rgb": _boolean,
    "do_resize": _boolean,
    "size": _size,
    "resample": _filter,
    "do_rescale": _boolean,
    "rescale_factor": _number,
    "do_normalize": _boolean,
    "image_mean": _channels(positive=False),
    "image_std": _channels(positive=True),
    "exif": _one_of("turn", "keep"),
    "alpha": _one_of("white", "black", "drop"),
}
# Options of one call.
IMAGE_CALL_OPTIONS: dict[str, Reader] = {
    **IMAGE_OPTIONS,
    "return_tensors": _TENSORS,
    "data_format": _LAYOUT,
    "input_data_format": _LAYOUT,
    "device": _device,
}
# All that loading takes for options of images: other image processors have some that are refused here.
OPTION_NAMES = frozenset(IMAGE_OPTIONS) | frozenset(ImagesKwargs.__annotations__)
TEXT_CALL_OPTIONS: dict[str, Reader] = {
    "text_pair": lambda value: value,
    "add_special_tokens": _boolean,
    "padding": _one_of(True, False, "longest", "max_length", "do_not_pad"),
    "truncation": _one_of(
        *(True, False, "longest_first", "only_first", "only_second", "do_not_truncate")
    ),
    "max_length": _whole(1),
    "stride": _whole(0),
    "is_split_into_words": _boolean,
    "pad_to_multiple_of": _whole(1),
    "padding_side": _one_of("left", "right"),
    "return_tensors": _TENSORS,
    "return_token_type_ids": _boolean,
    "return_attention_mask": _boolean,
    "return_overflowing_tokens": _boolean,
    "return_special_tokens_mask": _boolean,
    "return_offsets_mapping": _boolean,
    "return_length": _boolean,
    "verbose": _boolean,
}
# Options of the processor itself.
LENGTH_OPTIONS: dict[str, Reader] = {"text_length": _whole(1), "pair_text_length": _whole(1)}
