"""Captions as their publishers list them: COCO, Karpathy's splits, Visual Genome, SBU and Conceptual Captions.

All are read whole, but for a list of lines, which is read twice if it lists URLs.

- COCO, ``captions_train2014.json`` and its like: ``images`` ({id, file_name}) and ``annotations`` ({image_id,
  caption}). Images lie in the given folder or in the folder of the split below it (``train2014/``).
- Karpathy, ``dataset_coco.json``, ``dataset_flickr30k.json``: ``images`` holds {filename, split, sentences: [{raw}]},
  for COCO also ``filepath`` ("train2014"), the folder below the image folder. All sentences of an image are kept.
- Visual Genome, ``region_descriptions.json``: a list of {id, regions: [{image_id, phrase, x, y, width, height}]}. Every
  phrase is a caption of the whole image, as VLMo takes it. Images are found by the stem of their name, which is the
  image id, in ``VG_100K`` and ``VG_100K_2`` below the image folder (or anywhere below it).
- SBU and CC3M in VLMo's and ViLT's layout: a JSON list of [path, caption]. ``annot.json`` goes with
  ``images_train/*/*`` (SBU), ``{train,val}_annot.json`` with ``images_{train,val}/*/*`` (CC3M); names of images may
  have no suffix.
- SBU's {image_urls, captions} and CC3M's lines of caption, tab and URL, whose images must be downloaded first; see
  `DownloadedImages`.
"""

from __future__ import annotations

import itertools
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import (
    filled_lines,
    json_list,
    json_object,
    load_json,
    numbered_lines,
)
from megatron_vlmoe.prepare.readers.images import NoImageError, as_image
from megatron_vlmoe.prepare.readers.pairs import (
    DOWNLOAD_FIRST,
    CaptionRow,
    PairInput,
    PairItems,
    SplitChoice,
)
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    PairItem,
    Reject,
    walk_files,
)

_OTHER_DOWNLOADS = (
    "; a list of --format sbu or cc3m also finds files that are named as the last part of "
    "their URL, or NUMBER_CRC32 by the number of the entry and the CRC-32 of its URL"
)


@dataclass
class _Entries:
    """What a file says about one image id."""

    images: list[int] = field(default_factory=list)
    """Places in ``images``; more than one is an error, since the captions belong to either."""
    notes: list[int] = field(default_factory=list)
    """Places of its captions in ``annotations``."""
    captions: list[object] = field(default_factory=list)


def read_coco(source: PairInput) -> Iterator[PairItem]:
    """Yields each image of ``images`` with all its captions. Raises DataError."""
    folder, items = source.image_folder(), PairItems(source)
    for path in source.annotations:
        content = json_object(path)
        images = json_list(path, content.get("images"), '"images"')
        found: dict[str, _Entries] = {}
        for number, image in enumerate(images):
            own = _id_of(image, "id")
            if own is not None:
                found.setdefault(own, _Entries()).images.append(number)
        notes = json_list(path, content.get("annotations"), '"annotations"')
        for number, note in enumerate(notes):
            of = _id_of(note, "image_id")
            if of is None or "caption" not in note or of not in found:
                incomplete = of is None or "caption" not in note
                reason = "no image_id or no caption" if incomplete else f"no image with id {of}"
                yield Reject(path, f"annotation {number}", reason, unit="caption", records=0)
                continue
            found[of].notes.append(number)
            found[of].captions.append(note["caption"])
        for number, image in enumerate(images):
            entries = found.get(_id_of(image, "id") or "", _Entries())
            if (problem := _problem_of(images, image, entries)) is not None:
                # The captions of an id that comes twice are counted once.
                lost = len(entries.captions) if number in entries.images[:1] else 0
                yield Reject(path, f"image {number}", problem, unit="image", captions=lost)
                continue
            name = image["file_name"]
            listed = os.path.join(_split(folder, path, name), name)
            row = CaptionRow(path, f"image {image['id']} ({name})", listed, tuple(entries.captions))
            yield items.item([row], tuple(f"annotation {note}" for note in entries.notes))


def _id_of(entry: Any, key: str) -> str | None:
    """An id as text; None if there is none."""
    value = entry.get(key) if isinstance(entry, dict) else None
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _problem_of(images: list[Any], image: Any, entries: _Entries) -> str | None:
    """What is wrong with an entry of ``images``."""
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        return "no file_name"
    if not entries.images:
        return f"{image['file_name']} has no id"
    if len(entries.images) > 1:
        named = [f"image {n} ({images[n].get('file_name')})" for n in entries.images[:3]]
        more = ", ..." if len(entries.images) > 3 else ""
        return (
            f"id {image['id']} comes {len(entries.images)} times, so its captions may be of any: "
            f"{', '.join(named)}{more}"
        )
    return None


def _split(folder: str, annotations: str, name: str) -> str:
    """Subfolder of an image: from its own name (2014) or the annotations' (2017), if it exists."""
    for text in (name, os.path.basename(annotations)):
        match = re.search(r"(?:train|val|test)\d{4}", text)
        if match and "/" not in name and os.path.isdir(os.path.join(folder, match.group())):
            return match.group()
    return ""


def read_karpathy(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of the wanted splits with their sentences.

    Raises:
        DataError: another layout, or a wanted split that no image of any file has.
    """
    items, splits = PairItems(source), SplitChoice(source)
    source.image_folder()
    for path in source.annotations:
        images = json_list(path, json_object(path).get("images"), '"images"')
        first: dict[str, int] = {}
        for number, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
                yield Reject(path, f"image {number}", "no filename")
                continue
            name = os.path.join(str(image.get("filepath") or ""), image["filename"])
            record = f"image {number} ({name})"
            earlier = first.setdefault(name, number)
            refusal = splits.refusal(path, record, image.get("split"))
            if refusal is not None:
                yield refusal
                continue
            sentences = image.get("sentences")
            sentences = sentences if isinstance(sentences, list) else []
            if earlier != number:
                split = images[earlier].get("split")
                reason = f"the same file as image {earlier} (split {split})"
                yield Reject(path, record, reason, unit="image", captions=len(sentences))
                continue
            captions, names = list[object](), list[str]()
            for place, sentence in enumerate(sentences):
                name_of_caption = f"{record}, caption {place}"
                if _belongs(sentence, image):
                    captions.append(sentence.get("raw") if isinstance(sentence, dict) else None)
                    names.append(name_of_caption)
                else:
                    reason = (
                        f"of image {sentence['imgid']}, in the entry of {image['imgid']} (imgid)"
                    )
                    yield Reject(path, name_of_caption, reason, unit="caption", records=0)
            yield items.item([CaptionRow(path, record, name, tuple(captions))], tuple(names))
    splits.finish(source.annotations[0])


def _belongs(sentence: Any, image: dict[str, Any]) -> bool:
    """Whether a sentence is of the image in whose entry it stands, as far as both say so."""
    if not isinstance(sentence, dict) or "imgid" not in sentence or "imgid" not in image:
        return True
    return bool(sentence["imgid"] == image["imgid"])


def read_visual_genome(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with the phrases of its regions. Raises DataError."""
    files = _images_by_stem(source.image_folder())
    for path in source.annotations:
        entries = json_list(path, load_json(path))
        times = Counter(str(_image_id(entry)) for entry in entries)
        for number, entry in enumerate(entries):
            regions = entry.get("regions") if isinstance(entry, dict) else None
            if not isinstance(regions, list):
                yield Reject(path, f"entry {number}", 'no list "regions"')
                continue
            image_id = str(_image_id(entry))
            record = f"image {image_id}"
            found = files.get(image_id, [])
            reason = ""
            if times[image_id] > 1:
                reason = f"this image id comes {times[image_id]} times (here in entry {number})"
            elif len(found) != 1:
                reason = (
                    f"several image files: {' and '.join(found)}" if found else "no such image file"
                )
                reason += f" (stem {image_id} below {source.images})"
            if reason:
                yield Reject(path, record, reason, unit="image", captions=len(regions))
                continue
            phrases, names = list[object](), list[str]()
            for place, region in enumerate(regions):
                name = f"{record}, region {region.get('region_id', place) if isinstance(region, dict) else place}"
                other = region.get("image_id") if isinstance(region, dict) else None
                if other is not None and str(other) != image_id:
                    yield Reject(
                        path, name, f"a region of image {other}", unit="caption", records=0
                    )
                    continue
                phrases.append(region.get("phrase") if isinstance(region, dict) else None)
                names.append(name)
            image = ImageFile(path, record, found[0])
            yield CaptionedImage(path, record, image, tuple(phrases), tuple(names))


def _images_by_stem(folder: str) -> dict[str, list[str]]:
    """Paths of all images under a folder by their name without suffix; holds every path in memory."""
    found: dict[str, list[str]] = {}
    for path in walk_files(folder):
        if isinstance(as_image(ImageFile(folder, path, path), path), ImageFile):
            found.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    return found


def _image_id(entry: Any) -> object:
    """The id of an entry, or of the first region of one that gives none itself."""
    if not isinstance(entry, dict):
        return None
    regions = entry.get("regions")
    first = regions[0] if isinstance(regions, list) and regions else None
    return entry.get("id", first.get("image_id") if isinstance(first, dict) else None)


def read_path_captions(source: PairInput) -> Iterator[PairItem]:
    """Yields each pair as an image with one caption. Raises DataError."""
    items = PairItems(source)
    for file in source.annotations:
        yield from items.grouped(_url_rows(source, file))


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


def _url_rows(source: PairInput, file: str) -> Iterator[CaptionRow | Reject]:
    """The pairs of a file, with the paths of their images."""
    read = (
        partial(_json_pairs, file, load_json(file))
        if first_character(file) in (b"[", b"{")
        else partial(_tsv_lines, file)
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
    first = next(filled_lines(file), None)
    return b"" if first is None or isinstance(first, Reject) else first[1][:1]


def _json_pairs(file: str, content: Any) -> Iterator[CaptionRow | Reject]:
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


def _tsv_lines(file: str) -> Iterator[CaptionRow | Reject]:
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
