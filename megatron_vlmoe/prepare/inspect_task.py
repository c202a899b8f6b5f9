"""Showing what a prepared split of a task holds."""

from __future__ import annotations

from collections.abc import Iterator

from PIL import Image

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import decode_pixels, open_image
from megatron_vlmoe.data.manifest import (
    check_dataset,
    is_task,
    length_percentiles,
    load_manifest,
    unknown_line,
)
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, TaskRow, load_labels
from megatron_vlmoe.prepare.contact_sheet import Cell, draw_sheet
from megatron_vlmoe.prepare.inspect import (
    DatasetView,
    View,
    image_place,
    image_rules,
    shortened,
    spread,
)
from megatron_vlmoe.tokenizers.text import TextTokenizer


def open_view(prefix: str, tokenizer_model: str | None, checksums: bool) -> View:
    """The view that fits the kind of a dataset; the arguments are those of `DatasetView`."""
    if is_task(load_manifest(prefix).kind):
        return TaskView(prefix, tokenizer_model, checksums)
    return DatasetView(prefix, tokenizer_model, checksums)


class TaskView:
    """A checked split of a task, opened for looking at.

    Args:
        prefix: ``P_{split}``.
        tokenizer_model: SentencePiece model that must be the one that made the tokens; None: any.
        checksums: also compare the SHA-256 of every file.

    Raises:
        DataError: the split is damaged or was made with another tokenizer.
    """

    def __init__(
        self, prefix: str, tokenizer_model: str | None = None, checksums: bool = False
    ) -> None:
        task = load_manifest(prefix).kind
        fingerprint = TextTokenizer(tokenizer_model).fingerprint if tokenizer_model else None
        self.dataset = TaskDataset.open(prefix, task, fingerprint)
        check_dataset(prefix, task, checksums=checksums)
        self.labels = self._find_labels()

    def _find_labels(self) -> Labels | None:
        """The class names, if they lie where the tool wrote them and are still the same."""
        split = self.dataset.manifest.source.get("split")
        try:
            labels = load_labels(self.dataset.prefix.removesuffix(f"_{split}"))
        except DataError:
            return None
        return labels if labels.sha256 == self.dataset.labels_sha256 else None

    def summary(self) -> Iterator[str]:
        """Lines of counts and percentiles."""
        data, manifest = self.dataset, self.dataset.manifest
        yield f"{data.prefix}: {data.task}"
        counts = {"samples": len(data), "images": data.num_images, "texts": data.num_texts}
        counts |= {"tokens": manifest.tokens, "bytes": manifest.bytes, "rejects": manifest.rejects}
        yield "  " + ", ".join(f"{count} {name}" for name, count in counts.items())
        yield from image_rules(manifest)
        for reason, count in sorted((manifest.omitted or {}).items()):
            yield f"  {count} samples left out: {reason}"
        if self.labels is not None:
            yield f"  {len(self.labels.labels)} classes"
        elif manifest.labels_sha256 is not None:
            yield "  class names: not found beside it"
        if manifest.tokenizer_fingerprint:
            yield f"  tokenizer {manifest.tokenizer_fingerprint} ({manifest.vocab_size} pieces)"
            yield f"  {unknown_line(manifest)}"
        if data.num_texts:
            shown = length_percentiles(data.text_lengths())
            yield "  tokens per text: " + ", ".join(f"{n} {v}" for n, v in shown.items())

    def samples(self, count: int) -> Iterator[str]:
        """One line for each of ``count`` samples, spread evenly over the split."""
        for index in spread(len(self.dataset), count):
            row = self.dataset.row(index)
            images = [self._image(document) for document in row.images]
            shown = [f"{one.format} {one.width}x{one.height} {one.mode}" for one in images]
            yield f"[{index}] {row.id} | " + " | ".join([*shown, *self._words(row)])

    def contact_sheet(self, count: int) -> Image.Image:
        """Draws the images of ``count`` samples, spread evenly, with their texts and classes.

        Raises:
            DataError: the task has no images.
        """
        if not self.dataset.num_images:
            raise DataError(f"{self.dataset.prefix}: task {self.dataset.task} has no images")
        return draw_sheet(map(self._cell, spread(len(self.dataset), count)))

    def _cell(self, index: int) -> Cell:
        row = self.dataset.row(index)
        images = [
            decode_pixels(self._image(document), image_place(self.dataset.prefix, document))
            for document in row.images
        ]
        return Cell(images, f"[{index}] {row.id}", row.raw, self._targets(row))

    def _image(self, document: int) -> Image.Image:
        data = self.dataset.image_bytes(document)
        return open_image(data, image_place(self.dataset.prefix, document))

    def _words(self, row: TaskRow) -> list[str]:
        """Texts and targets of a sample."""
        targets = self._targets(row)
        return [*map(shortened, row.raw), *([targets] if targets else [])]

    def _targets(self, row: TaskRow) -> str:
        """Names of the classes of a sample, with their scores where these are not 1; empty if unknown."""
        targets = []
        for label, score in zip(row.labels, row.scores, strict=True):
            name = str(label)
            if self.labels is not None and label < len(self.labels.labels):
                name = (self.labels.names or self.labels.labels)[label]
            targets.append(name if score == 1.0 else f"{name} ({score:.1f})")
        return ", ".join(targets)
