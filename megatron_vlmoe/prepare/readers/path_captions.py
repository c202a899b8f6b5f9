"""SBU and Conceptual Captions 3M: pairs of a path or a URL and a caption.

- VLMo's and ViLT's layout: a JSON list of [path, caption]. ``annot.json`` goes with
  ``images_train/*/*`` (SBU), ``{train,val}_annot.json`` with ``images_{train,val}/*/*`` (CC3M);
  names of images may have no suffix.
- The publishers' lists: SBU's {image_urls, captions}, CC3M's lines of caption, tab and URL. Their
  images must be downloaded first; see `DownloadedImages`.

A JSON file is read whole; one of lines twice, if it lists URLs.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.image_paths import NoImageError
from megatron_vlmoe.prepare.readers.lines import numbered_lines
from megatron_vlmoe.prepare.readers.pairs import (
    CaptionRow,
    PairInput,
    PairItems,
    json_list,
    load_json,
)
from megatron_vlmoe.prepare.readers.records import PairItem, Reject, walk_files

DOWNLOAD_FIRST = (
    "lists URLs: download the images first, for example with img2dataset, whose output is read "
    "with --format webdataset, files or parquet"
)
_OTHER_DOWNLOADS = (
    "; a list of --format sbu or cc3m also finds files that are named as the last part of "
    "their URL, or NUMBER_CRC32 by the number of the entry and the CRC-32 of its URL"
)


def read_path_captions(source: PairInput) -> Iterator[PairItem]:
    """Yields each pair as an image with one caption. Raises DataError."""
    items = PairItems(source)
    for file in source.annotations:
        yield from items.grouped(_rows(source, file))


def is_url(value: object) -> bool:
    """Whether a value is an address on the web."""
    return isinstance(value, str) and re.match(r"https?://", value, re.IGNORECASE) is not None


class DownloadedImages:
    """Files of a folder that the common downloaders made of a list of URLs.

    A file is named as the last part of its URL, where only one URL of the list and only one file
    has that name, or NUMBER_CRC32 (with any suffix or none): the number of the entry from 0 and
    the CRC-32 of the URL. A number alone is not trusted: downloaders count differently.

    Args:
        file: the list.
        folder: where the images are.
        urls: all URLs of the list.
    """

    def __init__(self, file: str, folder: str, urls: Iterable[str]) -> None:
        self._folder = folder
        self._files: dict[str, list[str]] = {}
        for path in walk_files(folder):
            self._files.setdefault(os.path.basename(path), []).append(path)
        self._numbered = {
            os.path.splitext(name)[0]: name for name in self._files if re.match(r"\d+_\d", name)
        }
        self._url_of: dict[str, str] = {}
        self._shared: set[str] = set()
        for url in urls:
            name = _name_in(url)
            if name in self._files and self._url_of.setdefault(name, url) != url:
                self._shared.add(name)
        if not self._url_of and not self._numbered:
            raise DataError(f"{file} {DOWNLOAD_FIRST}{_OTHER_DOWNLOADS}: {folder} has none")

    def find(self, number: int, url: str) -> str:
        """The file of entry ``number``. Raises NoImageError."""
        key = f"{number}_{zlib.crc32(url.encode('utf-8', 'replace'))}"
        name = self._numbered.get(key, _name_in(url))
        found = self._files.get(name, [])
        if not found:
            raise NoImageError(f"not downloaded: {url} (no file {name} below {self._folder})")
        if key not in self._numbered and name in self._shared:
            raise NoImageError(f"{found[0]} may be of several URLs, of which {url} is one")
        if len(found) > 1:
            raise NoImageError(f"several image files: {' and '.join(found)}")
        return found[0]


def _name_in(url: str) -> str:
    return unquote(posixpath.basename(urlsplit(url).path))


def _rows(source: PairInput, file: str) -> Iterator[CaptionRow | Reject]:
    """The pairs of a file, with the paths of their images."""
    read = (
        partial(_pairs, file, load_json(file))
        if first_character(file) in (b"[", b"{")
        else partial(_lines, file)
    )
    urls = (str(e.image) for e in read() if isinstance(e, CaptionRow) and is_url(e.image))
    first = next(urls, None)
    downloaded = None
    if first is not None:
        if source.images is None:
            raise DataError(f"{file} {DOWNLOAD_FIRST}{_OTHER_DOWNLOADS} (--images)")
        downloaded = DownloadedImages(file, source.image_folder(), itertools.chain([first], urls))
    for number, entry in enumerate(read()):
        if isinstance(entry, Reject) or downloaded is None or not is_url(entry.image):
            yield entry
            continue
        try:
            found = downloaded.find(number, str(entry.image))
        except NoImageError as error:
            yield Reject(file, entry.record, str(error), unit="image", captions=1)
        else:
            yield CaptionRow(file, entry.record, found, entry.captions)


def first_character(file: str) -> bytes:
    """The first character of a file that is no white space; empty: it is not to be had."""
    for item in numbered_lines(file):
        if isinstance(item, Reject) or item[1]:
            return b"" if isinstance(item, Reject) else item[1][:1]
    return b""


def _pairs(file: str, content: Any) -> Iterator[CaptionRow | Reject]:
    """Those of a JSON file."""
    pairs: list[Any]
    if isinstance(content, dict):
        urls = json_list(file, content.get("image_urls"), '"image_urls"')
        captions = json_list(file, content.get("captions"), '"captions"')
        if len(urls) != len(captions):
            raise DataError(f"{file}: {len(urls)} image_urls, but {len(captions)} captions")
        pairs = [[url, caption] for url, caption in zip(urls, captions, strict=True)]
    else:
        pairs = json_list(file, content)
    for number, pair in enumerate(pairs):
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
            yield CaptionRow(file, f"entry {number} ({pair[0]})", pair[0], (pair[1],))
        else:
            yield Reject(file, f"entry {number}", "not [path, caption]")


def _lines(file: str) -> Iterator[CaptionRow | Reject]:
    """CC3M's lines, and CC12M's, which have the URL first; a line of column names may stand before."""
    for item in numbered_lines(file, strip=False):
        if isinstance(item, Reject):
            yield item
            continue
        number, line = item
        # A caption that is no UTF-8 is rejected with the other bad captions.
        columns = line.decode("utf-8", "surrogateescape").split("\t")
        if not line.strip() or (number == 1 and {"caption", "url"} <= {*map(str.lower, columns)}):
            continue
        urls = [place for place, column in enumerate(columns) if is_url(column.strip())]
        if len(columns) != 2 or not urls:
            yield Reject(file, f"line {number}", "not a caption and a URL with a tab between")
            continue
        url = columns[urls[-1]].strip()
        caption = columns[1 - urls[-1]]
        yield CaptionRow(file, f"line {number} ({url})", url, (caption,))
