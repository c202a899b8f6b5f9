"""Tables of image-caption pairs: JSON lines and parquet.

A row names its image (a path below the image folder) under ``image``, ``image_path`` or
``file_name`` and its caption or list of captions under ``caption``, ``captions`` or ``text``. In
parquet the image may also be the encoded bytes, or Hugging Face's {bytes, path}.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from megatron_vlmoe.data.errors import DataError
from megatron_vlmoe.data.readers.pairs import CAPTION_KEYS, PairInput, as_captions, find_key
from megatron_vlmoe.data.readers.parquet import column_names, read_columns
from megatron_vlmoe.data.readers.records import CaptionedImage, ImageFile, Reject
from megatron_vlmoe.data.readers.text import json_rows

_IMAGE_KEYS = ("image", "image_path", "file_name")
_BATCH_ROWS = 32


def read_jsonl_pairs(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields the rows of JSON-lines files in order. Raises DataError."""
    source.image_folder()
    for path in source.annotations:
        for item in json_rows(path):
            if isinstance(item, Reject):
                yield item
            else:
                number, row = item
                yield _json_row(source, path, f"line {number}", row)


def _json_row(
    source: PairInput, path: str, record: str, row: dict[Any, Any]
) -> CaptionedImage | Reject:
    image_key = find_key(row, source.image_key, _IMAGE_KEYS)
    caption_key = find_key(row, source.caption_key, CAPTION_KEYS)
    for key, wanted in (
        (image_key, source.image_key or " or ".join(_IMAGE_KEYS)),
        (caption_key, source.caption_key or " or ".join(CAPTION_KEYS)),
    ):
        if key is None:
            return Reject(path, record, f"no key {wanted}")
    return _row(source, path, record, row[image_key], row[caption_key])


def read_parquet_pairs(source: PairInput) -> Iterator[CaptionedImage | Reject]:
    """Yields the rows of parquet files in order.

    Raises:
        DataError: no parquet file, or a column is missing.
    """
    for path in source.annotations:
        names = dict.fromkeys(column_names(path))
        image_key = find_key(names, source.image_key, _IMAGE_KEYS)
        caption_key = find_key(names, source.caption_key, CAPTION_KEYS)
        if image_key is None or caption_key is None:
            raise DataError(
                f"{path}: no column for the image or the caption among {', '.join(names)}: "
                "name them with --image-key and --caption-key"
            )
        columns = read_columns(path, {image_key: "any", caption_key: "any"}, _BATCH_ROWS)
        for first, batch in columns:
            if isinstance(batch, Reject):
                yield batch
                continue
            rows = zip(batch[image_key], batch[caption_key], strict=True)
            for number, (image, captions) in enumerate(rows, start=first):
                yield _row(source, path, f"row {number}", image, captions)


def _row(
    source: PairInput, path: str, record: str, image: Any, captions: object
) -> CaptionedImage | Reject:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        file = ImageFile(path, record, data=image)
    elif isinstance(image, str) and image:
        file = ImageFile(path, record, os.path.join(source.image_folder(), image))
    else:
        return Reject(path, record, "the image is neither a path nor bytes")
    return CaptionedImage(path, record, file, as_captions(captions))
