"""Samples of the three objectives, and the segments of a micro-batch that they make: texts, images, image-text pairs.

Letters: n samples of an objective, L tokens of a sample, N patches, S pixels along a side.

A sample is named by its `SampleRef` and made from nothing else but the seed. Masks and views have
generators of their own: a mask never depends on the size of an image, and a process that needs no
pixels touches no image.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.schema import DataConfig, RunConfig
from megatron_vlmoe.data.augment import (
    NO_JITTER,
    CropBox,
    ImageDraw,
    apply_erase,
    apply_rand_augment,
    decode_pixels,
    draw_crop,
    draw_erase,
    draw_jitter,
    draw_rand_augment,
    open_image,
    views,
)
from megatron_vlmoe.data.codes import CodesReader, StoredView
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.masking import (
    IGNORED_LABEL,
    Vocabulary,
    blockwise_mask,
    mask_tokens,
    maskable_positions,
    natural_mask_count,
)
from megatron_vlmoe.data.order import (
    MAX_TABLE,
    Purpose,
    RecentCache,
    SampleRef,
    SampleRngs,
    epoch_permutation,
    keyed_rng,
    table_name,
)
from megatron_vlmoe.data.sources import Sources
from megatron_vlmoe.data.tables import SharedTables, Tables
from megatron_vlmoe.stream.sizes import text_mask_slots
from megatron_vlmoe.tokenizers.text import TextTokenizer

Array = npt.NDArray[Any]
Tokens = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

_BLOCK_DOCUMENTS = 1 << 20
GREY = 128
"""What stands in for an image that cannot be decoded."""


@dataclass(frozen=True)
class TextFormat:
    """How texts are laid out: ``<s> A </s>`` or, of two, ``<s> A </s> B </s>``, then padding.

    Documents follow each other in the same way in packed texts of pretraining. A caption is one text.

    Args:
        bos_id: ``<s>``, the paper's [T_CLS].
        eos_id: ``</s>``.
        pad_id: ``<pad>``.
        length: L.
    """

    bos_id: int
    eos_id: int
    pad_id: int
    length: int

    @classmethod
    def of(cls, tokenizer: TextTokenizer, length: int) -> TextFormat:
        """The format of a tokenizer."""
        return cls(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, length)

    def lay_out(self, parts: Sequence[Tokens]) -> tuple[Tokens, int]:
        """Ids ``[L]`` and number of tokens; the longest part is shortened first."""
        lengths = [len(part) for part in parts]
        while sum(lengths) > self.length - 1 - len(parts):
            lengths[int(np.argmax(lengths))] -= 1
        ids = np.full(self.length, self.pad_id, dtype=np.int64)
        ids[0] = self.bos_id
        place = 1
        for part, length in zip(parts, lengths):
            ids[place : place + length] = part[:length]
            ids[place + length] = self.eos_id
            place += length + 1
        return ids, place

    def rows(self, texts: Sequence[Sequence[Tokens]]) -> tuple[Tokens, Tokens]:
        """Ids ``[n, L]`` and lengths ``[n]`` of n texts, each of one or more parts."""
        made = [self.lay_out(parts) for parts in texts]
        ids = np.stack([ids for ids, _ in made])
        return ids, np.array([length for _, length in made], dtype=np.int64)


class ImageViews:
    """Pixels, augmented in training, and stored codes, of the images of one objective.

    Args:
        readers: encoded images, one reader per dataset of the blend.
        codes: stored codes of the same images; None where codes are computed from pixels.
        data: crops, colour jitter, and the normalization that decides what noise is.
        flip: share of mirrored views.
        rngs: source of randomness; in evaluation the whole image is resized to a square.
        rand_augment: recipe of `draw_rand_augment`, or `none`.
        random_erase: probability of overwriting a rectangle with noise.
    """

    def __init__(
        self,
        readers: Sequence[IndexedReader],
        codes: Sequence[CodesReader] | None,
        data: DataConfig,
        flip: float,
        rngs: SampleRngs,
        rand_augment: str = "none",
        random_erase: float = 0.0,
    ) -> None:
        self.readers, self.codes = tuple(readers), codes
        self.data, self.flip, self.rngs = data, flip, rngs
        self.rand_augment, self.random_erase = rand_augment, random_erase

    def stored_view(self, ref: SampleRef, image: int) -> StoredView:
        """The stored view that this sample uses: any in training, the first in evaluation."""
        assert self.codes is not None
        reader = self.codes[ref.dataset]
        view = 0
        if self.rngs.train:
            rng = self.rngs.rng(Purpose.STORED_VIEW, ref)
            view = int(rng.integers(reader.manifest.num_views))
        return reader.view(image, view)

    def draw(self, ref: SampleRef, image: int, width: int, height: int) -> ImageDraw:
        """Box, flip and jitter of a sample whose image has this size in pixels."""
        rng = self.rngs.rng(Purpose.AUGMENTATION, ref)
        jitter = draw_jitter(rng, self.data.color_jitter) if self.rngs.train else NO_JITTER
        if self.codes is not None:
            stored = self.stored_view(ref, image)
            return ImageDraw(stored.box, stored.flip, jitter)
        box, flip = CropBox.whole(width, height), False
        if self.rngs.train:
            flip = bool(rng.random() < self.flip)
            if self.data.crop_scale_min < 1.0:
                box = draw_crop(width, height, rng, (self.data.crop_scale_min, 1.0))
        return ImageDraw(box, flip, jitter)

    @property
    def replaces(self) -> bool:
        """Whether images that cannot be decoded are replaced."""
        return self.rngs.train and self.data.on_bad_image == "replace"

    def pixels_or_grey(
        self, ref: SampleRef, image: int, sizes: Sequence[int]
    ) -> tuple[list[Pixels], bool]:
        """As `pixels`, and false; or with `data.on_bad_image`, of a damaged image, grey views and true.

        A grey view depends on nothing: every process that decodes the image has the same.
        """
        # A damaged index is no damaged image.
        self.readers[ref.dataset].sequence(image)
        try:
            return self.pixels(ref, image, sizes), False
        except DataError:
            if not self.replaces:
                raise
        return [np.full((3, size, size), GREY, dtype=np.uint8) for size in sizes], True

    def pixels(self, ref: SampleRef, image: int, sizes: Sequence[int]) -> list[Pixels]:
        """Aligned views of one image, uint8 ``[3, size, size]`` for each size.

        Raises:
            DataError: the image is damaged, or is not the one that its stored codes are of.
        """
        reader = self.readers[ref.dataset]
        where = f"{reader.path_prefix}.bin: image {image}"
        opened = open_image(reader.sequence(image), where)
        draw = self.draw(ref, image, opened.width, opened.height)
        operations: tuple[tuple[str, float], ...] = ()
        if self.rngs.train and self.rand_augment != "none":
            rng = self.rngs.rng(Purpose.RAND_AUGMENT, ref)
            operations = draw_rand_augment(rng, self.rand_augment, sizes[0])
        decoded = decode_pixels(opened, where)
        try:
            made = views(decoded, draw, sizes, lambda view: apply_rand_augment(view, operations))
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        if self.rngs.train and self.random_erase > 0.0:
            for place, view in enumerate(made):
                rng = self.rngs.rng(Purpose.ERASE, ref)
                erase = draw_erase(rng, view.shape[1], self.random_erase)
                made[place] = apply_erase(view, erase, self.data.pixel_mean, self.data.pixel_std)
        return made


def slot_positions(labels: Array, slots: int) -> dict[str, Array]:
    """Predicted `positions` and their `labels`, in a fixed number of slots.

    Args:
        labels: int64 ``[n, L]``, -100 where not predicted.
        slots: columns of the result, at least as many as any row has labels.

    Returns:
        int64 ``[n, slots]`` each: ascending, unused slots 0 and -100.
    """
    positions = np.zeros((len(labels), slots), dtype=np.int64)
    values = np.full((len(labels), slots), IGNORED_LABEL, dtype=np.int64)
    for row, line in enumerate(labels):
        found = np.flatnonzero(line != IGNORED_LABEL)
        positions[row, : len(found)] = found
        values[row, : len(found)] = line[found]
    return {"positions": positions, "labels": values}


def exchange_distance(images: Sequence[object]) -> int:
    """The smallest number of places by which captions can be moved around so that each meets another image.

    Args:
        images: that of every caption of a micro-batch, equal where it is the same.

    Returns:
        1 to n - 1; 0 if there is none.
    """
    for distance in range(1, len(images)):
        moved = [*images[-distance:], *images[:-distance]]
        if all(a != b for a, b in zip(images, moved)):
            return distance
    return 0


@dataclass(frozen=True)
class StoredStarts:
    """First token of each document in the stored order, and the length of the whole, read from the indexed file."""

    reader: IndexedReader
    documents: range

    def __len__(self) -> int:
        return len(self.documents) + 1

    def __getitem__(self, place: int) -> int:
        first = self.documents.start
        return self.reader.items_before(first + place) - self.reader.items_before(first) + place


class PackingIndex(NamedTuple):
    """Where each document of an epoch begins in the concatenation of all.

    Args:
        order: ``[D]`` document at each place.
        starts: ``[D + 1]`` first token of each place, and the length of the whole.
        begin: token with which the first sample begins.
    """

    order: npt.NDArray[np.int32] | range
    starts: npt.NDArray[np.int64] | StoredStarts
    begin: int = 0


class PackedTexts:
    """Texts of exactly ``length`` tokens: ``<s>``, ``length - 2`` tokens, ``</s>``.

    The tokens of an epoch are all documents, each followed by ``</s>``, in an order that is
    shuffled anew in every epoch. Sample k has tokens k*(length-2) .. (k+1)*(length-2) of them;
    the last sample is filled up from the beginning.

    More than ``max_table`` documents keep their stored order, because a shuffled one takes a table that is minutes to
    make. Then what changes with the epoch is the token with which sample 0 begins.

    Args:
        reader: one sequence per document.
        documents: those that are used.
        length: tokens of a packed text.
        seed: seed of the document shuffles.
        shuffle: false keeps the stored order, from the first token on.
        dataset: number of the dataset within its blend.
        tables: where the processes of a machine share an epoch's index.
        identity: names the dataset there, and must change when the dataset does; empty: nothing is shared.
        max_table: most documents that are shuffled.
    """

    def __init__(
        self,
        reader: IndexedReader,
        documents: range,
        length: int,
        *,
        bos_id: int,
        eos_id: int,
        seed: int,
        shuffle: bool = True,
        dataset: int = 0,
        tables: SharedTables = SharedTables(),  # noqa: B008 (frozen)
        identity: str = "",
        max_table: int = MAX_TABLE,
    ) -> None:
        if length < 3:
            raise ValueError(f"a packed text of {length} tokens has no place for text")
        self.reader = reader
        self.documents = documents
        self.length = length
        self.bos_id, self.eos_id = bos_id, eos_id
        self.seed, self.shuffle, self.dataset = seed, shuffle, dataset
        self.tables, self.identity, self.max_table = tables, identity, max_table
        self.num_tokens = StoredStarts(reader, documents)[len(documents)]
        """Tokens of an epoch, with one ``</s>`` per document."""
        self.num_samples = -(-self.num_tokens // (length - 2))
        """Samples of an epoch."""
        self._recent: RecentCache[PackingIndex] = RecentCache()

    def index(self, epoch: int) -> PackingIndex:
        """Order and boundaries of the documents in an epoch (the same in all if not shuffled)."""
        return self._recent.get(epoch if self.shuffle else 0, self._make_index)

    def _make_index(self, epoch: int) -> PackingIndex:
        size = len(self.documents)
        if not self.shuffle or size > self.max_table:
            begin = 0
            if self.shuffle:
                rng = keyed_rng(self.seed, Purpose.DOCUMENT_ORDER, self.dataset, epoch)
                begin = int(rng.integers(self.num_tokens))
            return PackingIndex(range(size), StoredStarts(self.reader, self.documents), begin)

        if self.identity:
            used = self.documents.start, self.documents.stop
            name = table_name("packing", self.identity, *used, self.seed, self.dataset)
            sizes = {"order": size, "starts": size + 1}
            tables = self.tables.get(name, epoch, sizes, lambda: self._build_tables(epoch))
        else:
            tables = self._build_tables(epoch)
        return PackingIndex(tables["order"], tables["starts"])

    def _build_tables(self, epoch: int) -> Tables:
        """`order` and `starts` of a shuffled epoch; besides them it needs no memory to speak of."""
        size, lengths = len(self.documents), self.reader.sequence_lengths
        order = epoch_permutation(size, self.seed, epoch, self.dataset, Purpose.DOCUMENT_ORDER)
        starts = np.zeros(size + 1, dtype=np.int64)
        for first in range(0, size, _BLOCK_DOCUMENTS):
            documents = order[first : first + _BLOCK_DOCUMENTS] + np.int64(self.documents.start)
            ends = np.cumsum(lengths[documents] + np.int64(1))
            starts[first + 1 : first + 1 + len(ends)] = starts[first] + ends
        if starts[-1] != self.num_tokens or (np.diff(starts) < 1).any():
            raise DataError(
                f"{self.reader.path_prefix}.idx: damaged: the lengths of its documents do not add up to its .bin"
            )
        return {"order": order, "starts": starts}

    def sample(self, epoch: int, k: int) -> tuple[Tokens, Tokens]:
        """Sample k of an epoch.

        Returns:
            ids int64 ``[length]``, and the number of the document within the sample that each
            token belongs to, int64 ``[length]``: 0, 0, ..., 1, 1, ... (``</s>`` ends its document).
        """
        if not 0 <= k < self.num_samples:
            raise IndexError(f"sample {k} of {self.num_samples}")
        index = self.index(epoch)
        ids = np.full(self.length, self.eos_id, dtype=np.int64)
        documents = np.zeros(self.length, dtype=np.int64)
        ids[0] = self.bos_id
        begin = (index.begin + k * (self.length - 2)) % self.num_tokens
        filled, end, number = 1, self.length - 1, 0
        place = bisect.bisect_right(index.starts, begin) - 1
        offset = begin - int(index.starts[place])
        while filled < end:
            span = int(index.starts[place + 1] - index.starts[place])
            taken = min(span - offset, end - filled)
            # The last token of a document's span is its </s>, which is in place already.
            words = min(taken, span - 1 - offset)
            document = self.documents.start + int(index.order[place])
            ids[filled : filled + words] = self.reader.sequence_slice(document, offset, words)
            documents[filled : filled + taken] = number
            filled += taken
            offset = 0
            number += 1
            place = (place + 1) % len(self.documents)
        documents[-1] = number - 1
        return ids, documents


class TextPart:
    """The segment `texts` of pretraining: packed texts, masked."""

    def __init__(
        self, config: RunConfig, sources: Sources, rngs: SampleRngs, tokenizer: TextTokenizer
    ) -> None:
        # Workers have a copy of this object: of the tokenizer it keeps what masking needs, without its model.
        self.vocab = Vocabulary.of(tokenizer)
        self.slots, self.fraction = text_mask_slots(config), config.objectives.text_mask_fraction
        self.rngs, self.with_documents = rngs, config.data.reset_attention
        tables = SharedTables(config.data.cache_dir)
        self.texts = [
            PackedTexts(
                item.reader("text_document"),
                item.documents,
                config.model.text_length,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                seed=rngs.seed,
                shuffle=rngs.train,
                dataset=rngs.dataset_key(number),
                tables=tables,
                identity=item.manifest.files["_text_document.idx"].sha256,
            )
            for number, item in enumerate(sources.items)
        ]
        sizes = [text.num_samples for text in self.texts]
        self.order = sources.order(sizes, rngs, tables)

    def make(self, numbers: range) -> dict[str, Any]:
        """The segment of the samples with these numbers."""
        inputs, labels, documents = [], [], []
        for ref in map(self.order.locate, numbers):
            ids, own_documents = self.texts[ref.dataset].sample(ref.epoch, ref.index)
            rng = self.rngs.rng(Purpose.TEXT_MASK, ref)
            masked, predicted = mask_tokens(ids, self.fraction, self.vocab, rng, self.slots)
            inputs.append(masked)
            labels.append(predicted)
            documents.append(own_documents)
        texts = {
            "ids": np.stack(inputs),
            **slot_positions(np.stack(labels), self.slots),
            "sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
        if self.with_documents:
            texts["documents"] = np.stack(documents)
            texts["document_count"] = np.sum(texts["documents"][:, -1] + 1)
        return {"texts": texts}


FOREGROUND_DISTANCE, FOREGROUND_SHARE = 0.1, 0.1


def foreground(pixels: Pixels, grid: int) -> npt.NDArray[np.bool_]:
    """Patches that show more than the image's ground.

    A pixel belongs to the foreground if a colour channel differs by more than 0.1 (of 0..1) from the image's median in
    that channel, a patch if more than a tenth of its pixels do.

    Args:
        pixels: ``[3, S, S]`` of uint8.
        grid: patches along a side.

    Returns:
        bool ``[grid * grid]``, row by row.
    """
    median = np.median(pixels, axis=(1, 2), keepdims=True)
    differs = (np.abs(pixels - median) > 255 * FOREGROUND_DISTANCE).any(axis=0)
    side = pixels.shape[1] // grid
    shares = differs.reshape(grid, side, grid, side).mean(axis=(1, 3))
    return (shares > FOREGROUND_SHARE).reshape(-1)


class PixelPart:
    """Masks, pixels and codes of the images of one objective."""

    def __init__(
        self, config: RunConfig, views: ImageViews, tokenizer_size: int | None, share: BatchShare
    ) -> None:
        self.grid, self.num_masked = config.model.patch_grid, config.objectives.num_masked_patches
        self.min_block = config.objectives.min_mask_block
        self.views, self.share = views, share
        self.sizes: dict[str, int] = {}
        if share.first_stage:
            self.sizes["pixels"] = config.model.image_size
        if share.last_stage and tokenizer_size is not None:
            self.sizes["tokenizer_pixels"] = tokenizer_size
        self.wants_codes = share.last_stage and tokenizer_size is None
        # Evaluation, on the last stage, tells apart what was hidden.
        self.foreground_size = config.model.image_size
        self.wants_foreground = share.last_stage and not views.rngs.train

    def make(self, refs: list[SampleRef], images: list[int]) -> dict[str, Array]:
        """An image segment: masks and codes of all samples, pixels of this tensor-parallel rank's share."""
        masks = np.stack([self._mask(ref) for ref in refs])
        # Every mask has as many patches.
        positions = np.nonzero(masks)[1].reshape(len(masks), -1).astype(np.int64)
        segment = {"mask": masks, "positions": positions}
        if self.wants_codes:
            segment["labels"] = np.stack(
                [
                    self.views.stored_view(ref, image).codes[mask]
                    for ref, image, mask in zip(refs, images, masks, strict=True)
                ]
            )
        # Views of equal size are equal: one array serves both keys.
        sizes = set(self.sizes.values())
        share = self.share.slice(len(refs))
        rows = own = range(share.start, share.stop)
        out = {size: np.empty((len(own), 3, size, size), dtype=np.uint8) for size in sizes}
        if self.wants_foreground:
            rows = range(len(refs))
            sizes.add(self.foreground_size)
            segment["foreground"] = np.zeros(positions.shape, dtype=np.bool_)
        if not sizes:
            return segment
        order = sorted(sizes)
        replaced = np.zeros(len(own), dtype=np.bool_)
        for row in rows:
            views, is_grey = self.views.pixels_or_grey(refs[row], images[row], order)
            made = dict(zip(order, views, strict=True))
            if self.wants_foreground:
                shown = foreground(made[self.foreground_size], self.grid)
                segment["foreground"][row] = shown[positions[row]]
            if row in own:
                for size in out:
                    out[size][row - own.start] = made[size]
                replaced[row - own.start] = is_grey
        if self.views.replaces:
            segment["replaced"] = replaced
        return segment | {name: out[size] for name, size in self.sizes.items()}

    def _mask(self, ref: SampleRef) -> npt.NDArray[np.bool_]:
        """The hidden patches of an image, bool ``[N]``, row by row."""
        rng = self.views.rngs.rng(Purpose.IMAGE_MASK, ref)
        mask = blockwise_mask(self.grid, self.grid, self.num_masked, rng, min_block=self.min_block)
        return mask.reshape(-1)


class ImagePart:
    """The segment `images` of pretraining."""

    def __init__(self, sources: Sources, pixels: PixelPart) -> None:
        sizes = [len(item.documents) for item in sources.items]
        tables = SharedTables(pixels.views.data.cache_dir)
        self.order = sources.order(sizes, pixels.views.rngs, tables)
        self.first_documents = [item.documents.start for item in sources.items]
        self.pixels = pixels

    def make(self, numbers: range) -> dict[str, Any]:
        """The segment of the samples with these numbers."""
        refs = [self.order.locate(number) for number in numbers]
        images = [self.first_documents[ref.dataset] + ref.index for ref in refs]
        segment = self.pixels.make(refs, images)
        return {"images": segment | {"sample_numbers": np.asarray(numbers, dtype=np.int64)}}


class PairOrder:
    """Images with captions, and which of them is which sample.

    A document's sequences are the captions of the image with the same number. A sample is a caption, or an image of
    which one caption is drawn (`data.pair_unit`).
    """

    def __init__(self, config: RunConfig, sources: Sources, rngs: SampleRngs) -> None:
        self.rngs = rngs
        self.by_image = config.data.pair_unit == "image"
        self.readers = [item.reader("text") for item in sources.items]
        self.documents = [item.documents for item in sources.items]
        sizes = []
        for reader, documents in zip(self.readers, self.documents):
            first = reader.document_indices
            captions = int(first[documents.stop] - first[documents.start])
            sizes.append(len(documents) if self.by_image else captions)
        self.order = sources.order(sizes, self.rngs, SharedTables(config.data.cache_dir))

    def locate(self, ref: SampleRef) -> tuple[int, int]:
        """Image document and caption sequence of a sample."""
        reader, documents = self.readers[ref.dataset], self.documents[ref.dataset]
        first = reader.document_indices
        if not self.by_image:
            sequence = int(first[documents.start]) + ref.index
            # Not np.searchsorted: the file's numbers are not aligned, and it would copy all of them first.
            return bisect.bisect_right(first, sequence) - 1, sequence
        image = documents.start + ref.index
        captions = reader.sequences_of(image)
        if not captions:
            raise DataError(f"{reader.path_prefix}.bin: document {image} has no caption")
        rng = self.rngs.rng(Purpose.CAPTION_CHOICE, ref)
        return image, int(rng.integers(captions.start, captions.stop))


class PairPart(PairOrder):
    """The segments `pair_texts` and `pair_images` of pretraining: masked captions with their images."""

    def __init__(
        self, config: RunConfig, sources: Sources, tokenizer: TextTokenizer, pixels: PixelPart
    ) -> None:
        super().__init__(config, sources, pixels.views.rngs)
        self.pixels = pixels
        self.vocab = Vocabulary.of(tokenizer)
        self.text = TextFormat.of(tokenizer, config.model.pair_text_length)
        self.fraction = config.objectives.caption_mask_fraction
        self.slots = config.objectives.caption_mask_slots

    def make(self, numbers: range) -> dict[str, Any]:
        """The segments of the samples with these numbers, and how many captions and masks did not fit."""
        refs = [self.order.locate(number) for number in numbers]
        inputs, labels, lengths, images = [], [], [], []
        truncated = dropped = 0
        for ref in refs:
            image, sequence = self.locate(ref)
            tokens = self.readers[ref.dataset].sequence(sequence)
            ids, length = self.text.lay_out([tokens[: self.text.length - 2]])
            natural = natural_mask_count(len(maskable_positions(ids, self.vocab)), self.fraction)
            count = min(natural, self.slots)
            rng = self.rngs.rng(Purpose.CAPTION_MASK, ref)
            masked, predicted = mask_tokens(ids, self.fraction, self.vocab, rng, count)
            inputs.append(masked)
            labels.append(predicted)
            lengths.append(length)
            images.append(image)
            truncated += len(tokens) > length - 2
            dropped += natural - count
        sample_numbers = np.asarray(numbers, dtype=np.int64)
        made = {
            "pair_texts": {
                "ids": np.stack(inputs),
                "lengths": np.array(lengths, dtype=np.int64),
                **slot_positions(np.stack(labels), self.slots),
                "sample_numbers": sample_numbers,
            },
            "pair_images": self.pixels.make(refs, images) | {"sample_numbers": sample_numbers},
            "truncated_captions": np.array(truncated),
            "dropped_caption_masks": np.array(dropped),
        }
        if not self.rngs.train:
            of = [(ref.dataset, image) for ref, image in zip(refs, images)]
            made["exchange_distance"] = np.array(exchange_distance(of))
        return made


class TowerPart(PairOrder):
    """The segments `texts` and `images` of contrastive pretraining: captions, and apart from them their images."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sources,
        tokenizer: TextTokenizer,
        views: ImageViews,
        share: BatchShare,
    ) -> None:
        super().__init__(config, sources, views.rngs)
        self.text = TextFormat.of(tokenizer, config.model.pair_text_length)
        self.views, self.share, self.size = views, share, config.model.image_size
        # Images are numbered over all datasets of the blend.
        ends = np.cumsum([reader.num_documents for reader in self.readers])
        self.first_numbers = [0, *ends.tolist()]

    def make(self, numbers: range) -> dict[str, Any]:
        """The segments of the samples with these numbers, and which image each caption is of."""
        refs = [self.order.locate(number) for number in numbers]
        places = [self.locate(ref) for ref in refs]
        tokens = [self.readers[ref.dataset].sequence(place[1]) for ref, place in zip(refs, places)]
        most = self.text.length - 2
        ids, lengths = self.text.rows([[own[:most]] for own in tokens])
        sample_numbers = np.asarray(numbers, dtype=np.int64)
        images: dict[str, Any] = {"sample_numbers": sample_numbers}
        if self.share.first_stage:
            mine = self.share.slice(len(refs))
            made = [
                self.views.pixels_or_grey(ref, image, [self.size])
                for ref, (image, _) in zip(refs[mine], places[mine])
            ]
            images["pixels"] = np.stack([views[0] for views, _ in made])
            if self.views.replaces:
                images["replaced"] = np.array([is_grey for _, is_grey in made])
        documents = [self.first_numbers[r.dataset] + image for r, (image, _) in zip(refs, places)]
        return {
            "texts": {"ids": ids, "lengths": lengths, "sample_numbers": sample_numbers},
            "images": images,
            "image_documents": np.asarray(documents, dtype=np.int64),
            "truncated_captions": np.array(sum(len(own) > most for own in tokens)),
        }
