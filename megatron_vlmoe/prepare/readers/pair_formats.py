"""The layouts of image-caption pairs: captions as their publishers list them, the table of all layouts, and which of
them a file has.

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

import dataclasses
import itertools
import json
import os
import posixpath
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.files import (
    columns_of,
    filled_lines,
    json_list,
    json_lists,
    json_rows,
    load_json,
    text_lines,
)
from megatron_vlmoe.prepare.readers.images import NoImageError, as_image
from megatron_vlmoe.prepare.readers.pairs import (
    DOWNLOAD_FIRST,
    SPLIT_KEY,
    TOKEN_LINE,
    CaptionRow,
    PairInput,
    PairItems,
    PairReader,
    RowReader,
    column_rows,
    csv_rows,
    find_keys,
    json_list_rows,
    read_flickr30k,
    read_records,
    read_sample_files,
    read_webdataset,
    tars_of,
)
from megatron_vlmoe.prepare.readers.records import (
    CaptionedImage,
    ImageFile,
    PairItem,
    PassedOver,
    Reject,
    check_inputs,
    files_by_name,
    is_image,
    is_tar,
    walk_files,
)
from megatron_vlmoe.prepare.readers.tables import table_format
from megatron_vlmoe.prepare.remote import Mirror, is_remote_folder, remote_files
from megatron_vlmoe.prepare.shards import Part
from megatron_vlmoe.runtime.files import is_remote

_OTHER_DOWNLOADS = (
    "; a list of --format sbu or cc3m also finds files that are named as the last part of "
    "their URL, or NUMBER_CRC32 by the number of the entry and the CRC-32 of its URL"
)


def read_coco(source: PairInput) -> Iterator[PairItem]:
    """Yields each image of ``images`` with all its captions. Raises DataError."""
    folder, items = source.image_folder(), PairItems(source)
    for path in source.annotations:
        images, notes = json_lists(path, "images", "annotations")
        places: dict[str, list[int]] = {}
        for number, image in enumerate(images):
            if (own := _id_of(image, "id")) is not None:
                places.setdefault(own, []).append(number)
        captions: dict[str, list[tuple[int, object]]] = {own: [] for own in places}
        for number, note in enumerate(notes):
            of = _id_of(note, "image_id")
            if of is None or "caption" not in note or of not in places:
                incomplete = of is None or "caption" not in note
                reason = "no image_id or no caption" if incomplete else f"no image with id {of}"
                yield Reject(path, f"annotation {number}", reason, unit="caption", records=0)
            else:
                captions[of].append((number, note["caption"]))
        for number, image in enumerate(images):
            own = _id_of(image, "id") or ""
            same, said = places.get(own, []), captions.get(own, [])
            if (problem := _problem_of(images, image, same)) is not None:
                # The captions of an id that comes twice are counted once.
                lost = len(said) if number in same[:1] else 0
                yield Reject(path, f"image {number}", problem, unit="image", captions=lost)
                continue
            name = image["file_name"]
            listed = os.path.join(_split(folder, path, name), name)
            record, texts = f"image {image['id']} ({name})", tuple(text for _, text in said)
            row = CaptionRow(path, record, listed, texts)
            yield items.item([row], tuple(f"annotation {note}" for note, _ in said))


def _id_of(entry: Any, key: str) -> str | None:
    """An id as text; None if there is none."""
    value = _as_object(entry).get(key)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) else None


def _problem_of(images: list[Any], image: Any, same: list[int]) -> str | None:
    """What is wrong with an entry of ``images``, of which those at some places have the same id."""
    if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
        return "no file_name"
    if not same:
        return f"{image['file_name']} has no id"
    if len(same) == 1:
        return None
    named = ", ".join(f"image {n} ({images[n].get('file_name')})" for n in same[:3])
    more = ", ..." if len(same) > 3 else ""
    return f"id {image['id']} comes {len(same)} times, so its captions may be of any: {named}{more}"


def _split(folder: str, annotations: str, name: str) -> str:
    """Subfolder of an image: from its own name (2014) or the annotations' (2017), if it exists."""
    for text in (name, os.path.basename(annotations)):
        match = re.search(r"(?:train|val|test)\d{4}", text)
        if match and "/" not in name and os.path.isdir(os.path.join(folder, match.group())):
            return match.group()
    return ""


def read_karpathy(source: PairInput) -> Iterator[PairItem]:
    """Yields the images of the wanted splits with their sentences.

    Raises DataError for another layout, or a wanted split that no image of any file has.
    """
    items = PairItems(source)
    source.image_folder()
    for path in source.annotations:
        (images,) = json_lists(path, "images")
        first: dict[str, int] = {}
        for number, image in enumerate(images):
            if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
                yield Reject(path, f"image {number}", "no filename")
                continue
            name = os.path.join(str(image.get("filepath") or ""), image["filename"])
            record = f"image {number} ({name})"
            earlier = first.setdefault(name, number)
            refusal = items.refusal(path, record, image.get("split"))
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
                caption, given = f"{record}, caption {place}", _as_object(sentence)
                of = given.get("imgid", image.get("imgid"))
                if "imgid" in image and of != image["imgid"]:
                    reason = f"of image {of}, in the entry of {image['imgid']} (imgid)"
                    yield Reject(path, caption, reason, unit="caption", records=0)
                    continue
                captions.append(given.get("raw"))
                names.append(caption)
            yield items.item([CaptionRow(path, record, name, tuple(captions))], tuple(names))
    items.check_splits()


def _as_object(value: Any) -> dict[str, Any]:
    """A value that should be an object; an empty one in the place of another."""
    return value if isinstance(value, dict) else {}


def read_visual_genome(source: PairInput) -> Iterator[PairItem]:
    """Yields each image with the phrases of its regions. Raises DataError."""
    # All images by their name without suffix; holds every path in memory.
    files: dict[str, list[str]] = {}
    for path in walk_files(folder := source.image_folder()):
        if isinstance(as_image(ImageFile(folder, path, path), path), ImageFile):
            files.setdefault(os.path.splitext(os.path.basename(path))[0], []).append(path)
    for path in source.annotations:
        entries = json_list(path, load_json(path))
        times = Counter(str(_image_id(entry)) for entry in entries)
        for number, entry in enumerate(entries):
            regions = _as_object(entry).get("regions")
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
                given = _as_object(region)
                name, other = (
                    f"{record}, region {given.get('region_id', place)}",
                    given.get("image_id"),
                )
                if other is not None and str(other) != image_id:
                    reason = f"a region of image {other}"
                    yield Reject(path, name, reason, unit="caption", records=0)
                    continue
                phrases.append(given.get("phrase"))
                names.append(name)
            image = ImageFile(path, record, found[0])
            yield CaptionedImage(path, record, image, tuple(phrases), tuple(names))


def _image_id(entry: Any) -> object:
    """The id of an entry, or of the first region of one that gives none itself."""
    regions = _as_object(entry).get("regions")
    first = regions[0] if isinstance(regions, list) and regions else None
    return _as_object(entry).get("id", _as_object(first).get("image_id"))


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
    """

    def __init__(self, file: str, folder: str, urls: Iterable[str]) -> None:
        self._folder = folder
        self._files = files_by_name(folder)
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
    try:
        path = urlsplit(url).path
    except ValueError:  # of brackets without an address of IPv6
        path = url
    return unquote(posixpath.basename(path))


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
    for item in text_lines(file, "surrogateescape"):
        if isinstance(item, Reject):
            yield item
            continue
        number, line = item
        columns = line.split("\t")
        if not line.strip() or (number == 1 and {"caption", "url"} <= {*map(str.lower, columns)}):
            continue
        urls = [place for place, column in enumerate(columns) if is_url(column.strip())]
        if len(columns) != 2 or not urls:
            yield Reject(file, f"line {number}", "not a caption and a URL with a tab between")
            continue
        url = columns[urls[-1]].strip()
        caption = columns[1 - urls[-1]]
        yield CaptionRow(file, f"line {number} ({url})", url, (caption,))


@dataclasses.dataclass(frozen=True)
class PairFormat:
    """How a layout is read, and what its files have.

    Attributes:
        read: the reader.
        keys: the records have keys or columns.
        splits: the records may name their split.
        lists: there are annotation files; else the images lie beside their captions.
        pipe: an annotation file is read once, so that it may be a pipe.
    """

    read: PairReader
    keys: bool = False
    splits: bool = False
    lists: bool = True
    pipe: bool = False


def _records(read_rows: RowReader, pipe: bool = False) -> PairFormat:
    return PairFormat(partial(read_records, read_rows), keys=True, splits=True, pipe=pipe)


PAIR_FORMATS: Mapping[str, PairFormat] = {
    "coco": PairFormat(read_coco, pipe=True),
    "karpathy": PairFormat(read_karpathy, splits=True, pipe=True),
    "visual-genome": PairFormat(read_visual_genome, pipe=True),
    "sbu": PairFormat(read_path_captions),
    "cc3m": PairFormat(read_path_captions),
    "flickr30k": PairFormat(read_flickr30k),
    "albef": _records(json_list_rows, pipe=True),
    "webdataset": PairFormat(read_webdataset, lists=False),
    "files": PairFormat(read_sample_files, lists=False),
    "jsonl": _records(lambda source, path: json_rows(path), pipe=True),
    "csv": _records(csv_rows, pipe=True),
    "parquet": _records(column_rows),
    "arrow": _records(column_rows),
}
"""Layouts by the value of ``--format``."""

FORMATS_WITH_KEYS = tuple(name for name, one in PAIR_FORMATS.items() if one.keys)
FORMATS_WITH_SPLITS = tuple(name for name, one in PAIR_FORMATS.items() if one.splits)


def with_format(source: PairInput) -> PairInput:
    """The options with a format that is known.

    Raises DataError for a missing file, an unknown format, files of several, of none, or options that mean nothing in
    it.
    """
    check_inputs(source.annotations)
    if source.format == "auto":
        found = {path: _format_of(source, path) for path in source.inputs}
        if len(set(found.values())) != 1:
            names = ", ".join(f"{path} is {kind}" for path, kind in found.items())
            raise DataError(f"files of one format at a time: {names or 'none is given'}")
        source = dataclasses.replace(source, format=next(iter(found.values())))
    check_options(source)
    for path in source.annotations:
        _check_container(source.format, path)
    return source


def check_options(source: PairInput) -> None:
    """Raises DataError for an unknown format, and for options that mean nothing in a known one."""
    format = source.format
    if format not in PAIR_FORMATS:
        raise DataError(f"unknown format {format!r}: one of auto, {', '.join(PAIR_FORMATS)}")
    without_lists = tuple(name for name, one in PAIR_FORMATS.items() if not one.lists)
    for option, value, formats in (
        ("--split", source.splits, FORMATS_WITH_SPLITS),
        ("--split-key", source.split_key != SPLIT_KEY, FORMATS_WITH_KEYS),
        ("--image-key", source.image_key, FORMATS_WITH_KEYS),
        ("--caption-key", source.caption_key, (*FORMATS_WITH_KEYS, *without_lists)),
        ("--separator", source.separator, ("csv", "flickr30k")),
    ):
        if value and format not in formats:
            raise DataError(
                f"{option} means nothing with --format {format}, only with {', '.join(formats)}"
            )
    if source.separator is not None and len(source.separator) != 1:
        raise DataError(f"--separator {source.separator!r}: is not one character")
    if format not in without_lists and not source.annotations:
        raise DataError(f"--format {format} needs --annotations")
    if format in without_lists and bool(source.annotations) == (source.images is not None):
        raise DataError(
            f"--format {format} needs either --annotations or --images, the files or folders"
        )


def _check_container(format: str, path: str) -> None:
    """Raises DataError if a file is of a kind that the format never is."""
    if not os.path.isfile(path) and not os.path.isdir(path):
        if not PAIR_FORMATS[format].pipe:
            raise DataError(f"{path}: is no regular file, which --format {format} needs")
    elif os.path.isdir(path):
        if PAIR_FORMATS[format].lists:
            raise DataError(f"{path}: is a folder; --format {format} reads files: name those in it")
    elif is_tar(path) and format != "webdataset":
        raise DataError(f"{path}: is a tar, which --format webdataset reads, not {format}")
    elif table_format(path) is not None and format not in ("parquet", "arrow"):
        raise DataError(f"{path}: is a table, which --format parquet or arrow reads, not {format}")
    elif format == "jsonl" and first_character(path) == b"[":
        raise DataError(f"{path}: is a JSON list, which --format albef reads, not lines of JSON")


def _format_of(source: PairInput, path: str) -> str:
    """The format of an input by what it holds. Raises DataError naming that if none is known."""
    if os.path.isdir(path):
        return _format_of_folder(path)
    if not os.path.isfile(path):
        raise DataError(f"{path}: is no regular file: give its --format")
    if is_tar(path):
        return "webdataset"
    table = table_format(path)
    if table is not None:
        return "parquet" if table == "parquet" else "arrow"
    first = next(filled_lines(path), None)
    if first is None:
        raise DataError(f"{path}: the file is empty")
    if isinstance(first, Reject) or first[1][:1] in (b"[", b"{"):
        found = _format_of_json(source, path, b"{}" if isinstance(first, Reject) else first[1])
    else:
        found = _format_of_line(source, first[1].decode("utf-8", "replace"))
    if found is None:
        begin = str(first) if isinstance(first, Reject) else repr(first[1][:80])[1:]
        raise DataError(
            f"{path}: not recognised; give its --format, for albef, jsonl and csv with --image-key "
            f"and --caption-key. It begins with {begin}"
        )
    return found


def _format_of_line(source: PairInput, line: str) -> str | None:
    """The format of a text file by its first line."""
    if TOKEN_LINE.fullmatch(line):
        return "flickr30k"
    pair = [
        column.strip() for column in line.split("\t")
    ]  # a caption may begin with a quotation mark
    if len(pair) == 2 and (any(map(is_url, pair)) or {"caption", "url"} == {*map(str.lower, pair)}):
        return "cc3m"
    _, names = columns_of(line, source.separator)
    return "csv" if all(find_keys(source, dict.fromkeys(names))) else None


def _format_of_json(source: PairInput, path: str, line: bytes) -> str | None:
    """The format of a file of JSON, of which ``line`` is the first one with anything in it."""
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        first = None  # one value on many lines
    if isinstance(first, dict) and _kind_of_object(first) is None and find_keys(source, first)[1]:
        return "jsonl"
    content = load_json(path) if first is None or first == {} else first
    if isinstance(content, dict):
        return _kind_of_object(content)
    entry = content[0] if isinstance(content, list) and content else None
    if isinstance(entry, list):
        return "sbu"
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("regions"), list):
        return "visual-genome"
    return "albef" if find_keys(source, entry)[1] else None


def _format_of_folder(folder: str) -> str:
    captions, images, tables = set[str](), set[str](), ""
    for file in walk_files(folder):
        stem, suffix = os.path.splitext(file)
        if is_tar(file):
            return "webdataset"
        # Beside its samples img2dataset leaves tables of them.
        tables = tables or (suffix if suffix in (".parquet", ".arrow") else "")
        images |= {stem} if is_image(file) else set()
        captions |= {stem} if suffix in (".txt", ".json") else set()
        if images & captions:
            return "files"
    if tables:
        raise DataError(f"{folder}: name the {tables} files in it that are to be read")
    raise DataError(f"{folder}: has neither tars nor images with a .txt or .json of their name")


def _kind_of_object(content: dict[str, Any]) -> str | None:
    """The format of a whole file that is this object."""
    images = content.get("images")
    if isinstance(images, list):
        first = images[0] if images else None
        karpathy = isinstance(first, dict) and "sentences" in first
        return "karpathy" if karpathy else "coco"
    return "sbu" if "image_urls" in content else None


def remote_format(source: PairInput, mirror: Mirror) -> PairInput:
    """`with_format` of inputs that may be remote, of which the first is looked at. Raises DataError."""
    remote = [path for path in (*source.annotations, source.images or "") if is_remote(path)]
    if not remote:
        return with_format(source)
    if source.format == "auto":
        first = source.inputs[0]
        if is_remote(first) and is_remote_folder(first):
            raise DataError(f"{first}: a remote folder: give its --format, webdataset or files")
        looked_at = dataclasses.replace(source, annotations=(mirror.local(first),))
        with mirror.naming():
            source = dataclasses.replace(source, format=with_format(looked_at).format)
    check_options(source)
    if source.images in remote and PAIR_FORMATS[source.format].lists:
        raise DataError(
            f"{source.images}: --format {source.format} reads images from a local folder: fetch it, or make "
            "tars (webdataset) or tables (parquet) that hold the images"
        )
    return source


def pair_parts(source: PairInput, mirror: Mirror) -> Iterator[Part[PairItem | PassedOver]]:
    """What `read_pairs` reads of a known format, as parts: tars, folders of samples or annotation files. Raises
    DataError.
    """
    for path in tars_of(source) if source.format == "webdataset" else source.inputs:
        unmet: dict[str, str] = {}
        images = source.images if PAIR_FORMATS[source.format].lists else None

        def read(
            span: tuple[int, int] | None,
            path: str = path,
            images: str | None = images,
            unmet: dict[str, str] = unmet,
        ) -> Iterator[PairItem | PassedOver]:
            own = (mirror.local(path),)
            return read_pairs(
                dataclasses.replace(source, annotations=own, images=images, unmet=unmet)
            )

        if source.format == "files":
            weight = _folder_weight(path)
        else:
            weight = mirror.weight_of(path)
        yield Part(path, weight, read, unmet=unmet)


def _folder_weight(folder: str) -> int:
    if is_remote(folder):
        return max(sum(size for _, size in remote_files(folder)), 1)
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: not a folder; --format files reads folders of samples")
    return max(sum(1 for _ in walk_files(folder)), 1)


def read_pairs(source: PairInput) -> Iterator[PairItem | PassedOver]:
    """Yields the images of a corpus with their captions, in the order of the annotations. Raises DataError."""
    source = with_format(source)
    return PAIR_FORMATS[source.format].read(source)
