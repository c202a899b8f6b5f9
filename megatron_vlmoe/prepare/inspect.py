"""Showing what a dataset or a prepared split of a task holds: counts, samples, and a contact sheet."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import decode_pixels, open_image
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import (
    DatasetManifest,
    check_dataset,
    dataset_parts,
    is_task,
    length_percentiles,
    load_manifest,
    part_prefix,
    unknown_line,
)
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels
from megatron_vlmoe.prepare.readers.records import passed_over_line
from megatron_vlmoe.runtime.files import open_atomic
from megatron_vlmoe.tokenizers.text import TextTokenizer

_COLUMNS = 6
_CELL = 208
_MARGIN = 10
_GAP = 4
_TEXT_LINES = 4
_FONT_SIZE = 12
_LINE = 15
_FRAME, _SOFT, _INK, _LABEL = "#9aa4af", "#57606a", "#1b1f24", "#1f5fa8"


@dataclass(frozen=True)
class Cell:
    """One sample: RGB pictures, drawn side by side, and below them a line of heading, texts and a label.

    Each text begins a line of its own; what does not fit into four lines is cut. The label, an answer or a class, has
    lines of its own and may be empty.
    """

    images: Sequence[Image.Image]
    heading: str
    texts: Sequence[str] = ()
    label: str = ""


def draw_sheet(cells: Iterable[Cell]) -> Image.Image:
    """Draws cells in rows of six; a row is as high as its pictures and texts need."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    # DejaVu Sans comes with matplotlib and has most alphabets.
    path = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    font, known = ImageFont.truetype(path, _FONT_SIZE), FT2Font(path).get_charmap()
    drawn: list[tuple[list[Image.Image], list[tuple[str, str]]]] = []
    for cell in cells:
        lines = [(line, _SOFT) for line in _wrapped(cell.heading, font, known, 1)]
        share = max(1, _TEXT_LINES // max(1, len(cell.texts)))
        for text in cell.texts:
            lines += [(line, _INK) for line in _wrapped(text, font, known, share)]
        lines += [(line, _LABEL) for line in _wrapped(cell.label, font, known, 2)]
        # Pictures fill a cell side by side, small ones enlarged.
        width = (_CELL - _GAP * (len(cell.images) - 1)) // len(cell.images)
        pictures = []
        for image in cell.images:
            factor = min(width / image.width, _CELL / image.height)
            size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
            pictures.append(image.resize(size, Image.Resampling.BICUBIC))
        drawn.append((pictures, lines))
    rows = [drawn[start : start + _COLUMNS] for start in range(0, len(drawn), _COLUMNS)]
    above = [max(one.height for pictures, _ in row for one in pictures) + 4 for row in rows]
    below = [max(len(lines) for _, lines in row) * _LINE for row in rows]
    width = _MARGIN + min(_COLUMNS, len(drawn)) * (_CELL + _MARGIN)
    height = _MARGIN + sum(above) + sum(below) + len(rows) * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for row, picture_space, text_space in zip(rows, above, below):
        for column, (pictures, lines) in enumerate(row):
            left = x = _MARGIN + column * (_CELL + _MARGIN)
            for picture in pictures:
                sheet.paste(picture, (x, top))
                box = (x - 1, top - 1, x + picture.width, top + picture.height)
                draw.rectangle(box, outline=_FRAME)
                x += picture.width + _GAP
            for number, (line, color) in enumerate(lines):
                draw.text((left, top + picture_space + number * _LINE), line, color, font)
        top += picture_space + text_space + _MARGIN
    return sheet


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont, known: Container[int], most: int
) -> list[str]:
    """Lines of whole words that fit a cell; only a word that is longer than a line is divided.

    Characters that the font does not have are shown by their numbers, as in ``<U+661F>``.
    """
    shown = "".join(x if ord(x) in known or x.isspace() else f"<U+{ord(x):04X}>" for x in text)
    lines = [""]
    for word in shown.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= _CELL:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > _CELL:
                lines.append("")
            lines[-1] += letter
    if len(lines) > most:
        last = lines[most - 1]
        while font.getlength(f"{last}\N{HORIZONTAL ELLIPSIS}") > _CELL:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}\N{HORIZONTAL ELLIPSIS}"]
    return lines if lines != [""] else []


_COUNTED = ("records", "images", "captions")
_FATES = ("kept", "rejected", "lost", "left_out")
_MAX_SHOWN = 200


class View(ABC):
    """A checked dataset, opened for looking at: ``size`` documents or samples at the path prefix ``prefix``."""

    prefix: str
    size: int
    manifest: DatasetManifest
    _counts: Mapping[str, int]
    _lengths: Mapping[str, np.ndarray]
    _image_bytes: Callable[[int], npt.NDArray[np.uint8]]

    @abstractmethod
    def _fates(self) -> Iterator[str]:
        """Lines about what was indexed and what was not."""

    @abstractmethod
    def _described(self, index: int) -> Iterator[str]:
        """What a line about a document or sample says."""

    @abstractmethod
    def _cell(self, index: int) -> Cell:
        """A document or sample on the contact sheet. Raises DataError if there are no images."""

    def summary(self) -> Iterator[str]:
        """Lines of counts and percentiles."""
        manifest = self.manifest
        yield f"{self.prefix}: {manifest.kind}"
        counts = {**self._counts, "bytes": manifest.bytes, "rejects": manifest.rejects}
        yield "  " + ", ".join(f"{count} {name}" for name, count in counts.items())
        yield from self._fates()
        if manifest.tokenizer_fingerprint:
            yield f"  tokenizer {manifest.tokenizer_fingerprint} ({manifest.vocab_size} pieces)"
            yield f"  {unknown_line(manifest)}"
        for unit, lengths in self._lengths.items():
            shown = length_percentiles(lengths)
            yield f"  {unit}: " + ", ".join(f"{name} {value}" for name, value in shown.items())

    def _rules(self) -> Iterator[str]:
        """A line about what was done with the images when they were indexed, if that is recorded."""
        if self.manifest.exif or self.manifest.alpha:
            yield f"  images: exif {self.manifest.exif}, alpha {self.manifest.alpha}"

    def samples(self, count: int) -> Iterator[str]:
        """One line for each of ``count`` documents or samples, spread evenly."""
        for index in spread(self.size, count):
            yield f"[{index}] " + " | ".join(self._described(index))

    def contact_sheet(self, count: int) -> Image.Image:
        """Draws the images of ``count`` documents or samples, spread evenly, with what belongs to them.

        Raises DataError if there are no images.
        """
        return draw_sheet(map(self._cell, spread(self.size, count)))

    def _image(self, document: int) -> Image.Image:
        return open_image(self._image_bytes(document), self._place(document))

    def _place(self, document: int) -> str:
        """Name of an image in errors."""
        return f"{self.prefix}_image.bin: image {document}"


class DatasetView(View):
    """A dataset for pretraining. Raises DataError if it is damaged or was made with another tokenizer.

    ``tokenizer_model`` decodes texts; without one token ids are shown. ``checksums`` compares the SHA-256 of every
    file.
    """

    def __init__(self, prefix: str, tokenizer_model: str | None, checksums: bool) -> None:
        kind = load_manifest(prefix).kind
        self.tokenizer: TextTokenizer | None = None
        fingerprint = None
        if tokenizer_model is not None and kind != "images":
            self.tokenizer = TextTokenizer(tokenizer_model)
            fingerprint = self.tokenizer.fingerprint
        self.prefix = prefix
        self.manifest = manifest = check_dataset(prefix, kind, fingerprint, checksums=checksums)
        self.size = manifest.documents
        self._counts = {"documents": manifest.documents}
        if kind == "pairs":
            self._counts["captions"] = manifest.sequences
        if kind != "images":
            self._counts["tokens"] = manifest.tokens
        self.readers = {
            part: IndexedReader(part_prefix(prefix, part)) for part in dataset_parts(kind)
        }
        self._image_bytes = lambda document: self.readers["image"].document(document)[0]
        self._lengths = {
            "bytes per image" if part == "image" else "tokens per sequence": reader.sequence_lengths
            for part, reader in self.readers.items()
        }

    def _fates(self) -> Iterator[str]:
        manifest = self.manifest
        known = manifest.counts or {}
        for kind in filter(known.__contains__, _COUNTED):
            fates = known[kind]
            parts = [f"{fates[fate]} {fate.replace('_', ' ')}" for fate in _FATES if fate in fates]
            yield f"  {fates['read']} {kind} read: {', '.join(parts)}"
        for reason, count in sorted((manifest.omitted or {}).items()):
            yield f"  {count} records left out: {reason}"
        if manifest.passed_over:
            yield f"  {passed_over_line(manifest.passed_over)}"
        yield from self._rules()

    def _cell(self, index: int) -> Cell:
        if "image" not in self.readers:
            raise DataError(f"{self.prefix}: a dataset of text has no images to draw")
        captions = self._captions(index)[:1] if "text" in self.readers else ()
        image = decode_pixels(self._image(index), self._place(index))
        return Cell([image], f"[{index}]", captions)

    def _described(self, index: int) -> Iterator[str]:
        if "image" in self.readers:
            image = self._image(index)
            yield f"{image.format} {image.width}x{image.height} {image.mode}"
        if self.manifest.kind != "images":
            yield from map(shortened, self._captions(index))

    def _captions(self, index: int) -> list[str]:
        reader = self.readers["text" if "text" in self.readers else "text_document"]
        heads = [ids[:_MAX_SHOWN].tolist() for ids in reader.document(index)]
        return [self.tokenizer.decode(head) if self.tokenizer else str(head) for head in heads]


class TaskView(View):
    """A split of a task; the arguments and errors are those of `DatasetView`. The tokenizer is compared alone."""

    def __init__(self, prefix: str, tokenizer_model: str | None, checksums: bool) -> None:
        task = load_manifest(prefix).kind
        fingerprint = TextTokenizer(tokenizer_model).fingerprint if tokenizer_model else None
        self.dataset = TaskDataset.open(prefix, task, fingerprint)
        check_dataset(prefix, task, checksums=checksums)
        self.prefix, self.size = self.dataset.prefix, len(self.dataset)
        self._image_bytes, self.manifest = self.dataset.image_bytes, self.dataset.manifest
        data = self.dataset
        self._counts = {"samples": self.size, "images": data.num_images, "texts": data.num_texts}
        self._counts["tokens"] = self.manifest.tokens
        self._lengths = {"tokens per text": data.text_lengths()} if data.num_texts else {}
        # The class names, if they lie where the tool wrote them and are still the same.
        self.labels: Labels | None = None
        split = self.manifest.source.get("split")
        with contextlib.suppress(DataError):
            labels = load_labels(self.prefix.removesuffix(f"_{split}"))
            self.labels = labels if labels.sha256 == self.manifest.labels_sha256 else None

    def _fates(self) -> Iterator[str]:
        yield from self._rules()
        for reason, count in sorted((self.manifest.omitted or {}).items()):
            yield f"  {count} samples left out: {reason}"
        if self.labels is not None:
            yield f"  {len(self.labels.labels)} classes"
        elif self.manifest.labels_sha256 is not None:
            yield "  class names: not found beside it"

    def _cell(self, index: int) -> Cell:
        if not self.dataset.num_images:
            raise DataError(f"{self.prefix}: task {self.dataset.task} has no images")
        row = self.dataset.row(index)
        images = [decode_pixels(self._image(image), self._place(image)) for image in row.images]
        return Cell(images, f"[{index}] {row.id}", row.raw, self._targets(row))

    def _described(self, index: int) -> Iterator[str]:
        row = self.dataset.row(index)
        yield row.id
        for image in map(self._image, row.images):
            yield f"{image.format} {image.width}x{image.height} {image.mode}"
        yield from map(shortened, row.raw)
        if targets := self._targets(row):
            yield targets

    def _targets(self, row: TaskRow) -> str:
        """Names of the classes of a sample, with their scores where these are not 1; empty if unknown."""
        targets = []
        for label, score in zip(row.labels, row.scores, strict=True):
            name = str(label)
            if self.labels is not None and label < len(self.labels.labels):
                name = (self.labels.names or self.labels.labels)[label]
            targets.append(name if score == 1.0 else f"{name} ({score:.1f})")
        return ", ".join(targets)


def spread(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total`` (all if there are fewer), evenly apart."""
    count = min(count, total)
    return [place * (total - 1) // max(count - 1, 1) for place in range(count)]


def shortened(text: str) -> str:
    """The text on one line, cut where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[: _MAX_SHOWN - 3]}..."


def open_view(prefix: str, tokenizer_model: str | None, checksums: bool) -> View:
    """The view that fits the kind of a dataset; the arguments are those of `DatasetView`."""
    kind = TaskView if is_task(load_manifest(prefix).kind) else DatasetView
    return kind(prefix, tokenizer_model, checksums)


def save_contact_sheet(view: View, path: Path, count: int) -> None:
    """Writes the contact sheet of a view as PNG. Raises FileError."""
    sheet = view.contact_sheet(count)
    with open_atomic(path) as file:
        sheet.save(file, "PNG")
