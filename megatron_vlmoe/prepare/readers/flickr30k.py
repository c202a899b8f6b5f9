"""Flickr30K's own lists: ``results_20130124.token`` and the ``results.csv`` of copies.

A line of the one is ``1000092795.jpg#0``, a tab and the caption; the other is read as any CSV
(``image_name| comment_number| comment``). The captions of an image follow each other. Neither names
splits: the validation and test images are among them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from megatron_vlmoe.prepare.readers.lines import numbered_lines
from megatron_vlmoe.prepare.readers.pair_tables import read_csv_pairs
from megatron_vlmoe.prepare.readers.pairs import CaptionRow, PairInput, PairItems
from megatron_vlmoe.prepare.readers.records import PairItem, Reject

TOKEN_LINE = re.compile(r"(?P<image>[^\t]+)#\d+\t(?P<caption>.*)")
"""A line of the ``.token`` file."""


def read_flickr30k(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with its captions. Raises DataError."""
    for path in source.annotations:
        part = dataclasses.replace(source, annotations=(path,))
        first = next(numbered_lines(path, strip=False), (1, b""))
        if not isinstance(first, Reject) and TOKEN_LINE.fullmatch(
            first[1].decode("utf-8", "replace")
        ):
            yield from PairItems(part).grouped(_token_rows(path))
        else:
            yield from read_csv_pairs(part)


def _token_rows(path: str) -> Iterator[CaptionRow | Reject]:
    for item in numbered_lines(path, strip=False):
        if isinstance(item, Reject):
            yield item
            continue
        # A caption that is no UTF-8 is rejected with the other bad captions.
        line = item[1].decode("utf-8", "surrogateescape")
        match = TOKEN_LINE.fullmatch(line)
        if match is not None:
            record = f"line {item[0]} ({match['image']})"
            yield CaptionRow(path, record, match["image"], (match["caption"],))
        elif line.strip():
            yield Reject(path, f"line {item[0]}", "not NAME#NUMBER, tab, caption")
