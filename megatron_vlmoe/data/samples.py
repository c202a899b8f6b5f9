"""Samples of the three objectives: masked texts, masked images and masked image-text pairs.

Letters: L tokens of a sample, g patches along a side, S pixels along a side.

A sample is named by its `SampleRef` and made from nothing else but the seed. Masks and views have
generators of their own: a mask never depends on the size of an image, and a process that needs no
pixels touches no image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.data.augment import (
    NO_JITTER,
    CropBox,
    ImageDraw,
    decode_pixels,
    draw_crop,
    draw_jitter,
    open_image,
    views,
)
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.masking import (
    Vocabulary,
    blockwise_mask,
    mask_tokens,
    maskable_positions,
    natural_mask_count,
)
from megatron_vlmoe.data.order import Purpose, SampleRef, keyed_rng
from megatron_vlmoe.data.packing import PackedTexts
from megatron_vlmoe.data.rand_augment import (
    Operation,
    apply_erase,
    apply_rand_augment,
    draw_erase,
    draw_rand_augment,
)

if TYPE_CHECKING:
    from megatron_vlmoe.data.codes import CodesReader, StoredView
    from megatron_vlmoe.tokenizers.text import TextTokenizer

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SampleRngs:
    """Makes the generators of all random numbers of one objective in one split.

    Args:
        seed: seed of the run.
        stream: number of the objective and split, so that no two of them share a number.
        train: false makes every draw the same in each epoch and leaves images unaugmented.
    """

    seed: int
    stream: int
    train: bool

    def dataset_key(self, dataset: int) -> int:
        """Number of a dataset of the blend among those of all objectives."""
        return (self.stream << 32) + dataset

    def rng(self, purpose: Purpose, ref: SampleRef) -> np.random.Generator:
        """The generator of one sample for one purpose."""
        epoch = ref.epoch if self.train else 0
        return keyed_rng(self.seed, purpose, self.dataset_key(ref.dataset), epoch, ref.index)


@dataclass(frozen=True)
class TextSample:
    """A masked packed text; all ``[L]``.

    Args:
        ids: inputs.
        labels: -100 where not predicted.
        documents: number of the document within the sample, from 0.
    """

    ids: Tokens
    labels: Tokens
    documents: Tokens


class TextSamples:
    """Masked packed texts.

    Args:
        texts: one per dataset of the blend.
        vocab: the vocabulary that masks are drawn in.
        slots: tokens to predict in each text.
        fraction: the same as a share.
        rngs: source of randomness.
    """

    def __init__(
        self,
        texts: Sequence[PackedTexts],
        vocab: Vocabulary,
        slots: int,
        fraction: float,
        rngs: SampleRngs,
    ) -> None:
        self.texts = tuple(texts)
        self.vocab, self.slots, self.fraction, self.rngs = vocab, slots, fraction, rngs

    def sample(self, ref: SampleRef) -> TextSample:
        """A packed text, masked."""
        ids, documents = self.texts[ref.dataset].sample(ref.epoch, ref.index)
        rng = self.rngs.rng(Purpose.TEXT_MASK, ref)
        inputs, labels = mask_tokens(ids, self.fraction, self.vocab, rng, self.slots)
        return TextSample(inputs, labels, documents)


@dataclass(frozen=True)
class PatchMasks:
    """How patches are masked: grid side g, number of masked patches, smallest block."""

    grid: int
    num_masked: int
    min_block: int

    def draw(self, rngs: SampleRngs, ref: SampleRef) -> npt.NDArray[np.bool_]:
        """The mask of an image, ``[g * g]``, row by row."""
        rng = rngs.rng(Purpose.IMAGE_MASK, ref)
        mask = blockwise_mask(self.grid, self.grid, self.num_masked, rng, min_block=self.min_block)
        return mask.reshape(-1)


@dataclass(frozen=True)
class Augmentation:
    """How views are drawn in training.

    Args:
        crop_scale_min: smallest share of the image that a crop keeps; 1 keeps the whole image.
        color_jitter: strength of colour jitter.
        flip_probability: share of flips.
        rand_augment: recipe of `rand_augment`, or `none`.
        random_erase: probability of overwriting a rectangle with noise.
        pixel_mean: of the model's normalization, per channel: what noise is.
        pixel_std: the same.
    """

    crop_scale_min: float
    color_jitter: float
    flip_probability: float
    rand_augment: str = "none"
    random_erase: float = 0.0
    pixel_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    pixel_std: tuple[float, float, float] = (0.5, 0.5, 0.5)


class ImageViews:
    """Augmented pixels, and stored codes, of the images of one objective.

    Args:
        readers: encoded images, one reader per dataset of the blend.
        codes: stored codes of the same images; None where codes are computed from pixels.
        augmentation: applied in training; in evaluation the whole image is resized to a square.
        rngs: source of randomness.
    """

    def __init__(
        self,
        readers: Sequence[IndexedReader],
        codes: Sequence[CodesReader] | None,
        augmentation: Augmentation,
        rngs: SampleRngs,
    ) -> None:
        self.readers = tuple(readers)
        self.codes = None if codes is None else tuple(codes)
        self.augmentation, self.rngs = augmentation, rngs

    def stored_view(self, ref: SampleRef, image: int) -> StoredView:
        """The stored view that this sample uses: any in training, the first in evaluation."""
        if self.codes is None:
            raise ValueError("no stored codes")
        reader = self.codes[ref.dataset]
        view = 0
        if self.rngs.train:
            rng = self.rngs.rng(Purpose.STORED_VIEW, ref)
            view = int(rng.integers(reader.manifest.num_views))
        return reader.view(image, view)

    def draw(self, ref: SampleRef, image: int, width: int, height: int) -> ImageDraw:
        """Box, flip and jitter of a sample whose image has this size in pixels."""
        rng = self.rngs.rng(Purpose.AUGMENTATION, ref)
        wanted = self.augmentation
        jitter = draw_jitter(rng, wanted.color_jitter) if self.rngs.train else NO_JITTER
        if self.codes is not None:
            stored = self.stored_view(ref, image)
            return ImageDraw(stored.box, stored.flip, jitter)
        if not self.rngs.train:
            return ImageDraw(CropBox.whole(width, height))
        flip = bool(rng.random() < wanted.flip_probability)
        if wanted.crop_scale_min >= 1.0:
            return ImageDraw(CropBox.whole(width, height), flip, jitter)
        box = draw_crop(width, height, rng, (wanted.crop_scale_min, 1.0))
        return ImageDraw(box, flip, jitter)

    def _operations(self, ref: SampleRef, size: int) -> tuple[Operation, ...]:
        recipe = self.augmentation.rand_augment
        if not self.rngs.train or recipe == "none":
            return ()
        return draw_rand_augment(self.rngs.rng(Purpose.RAND_AUGMENT, ref), recipe, size)

    def _erase(self, ref: SampleRef, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        wanted = self.augmentation
        if not self.rngs.train or wanted.random_erase <= 0.0:
            return pixels
        rng = self.rngs.rng(Purpose.ERASE, ref)
        erase = draw_erase(rng, pixels.shape[1], wanted.random_erase)
        return apply_erase(pixels, erase, wanted.pixel_mean, wanted.pixel_std)

    def pixels(
        self, ref: SampleRef, image: int, sizes: Sequence[int]
    ) -> list[npt.NDArray[np.uint8]]:
        """Aligned views of one image, uint8 ``[3, size, size]`` for each size.

        Raises:
            DataError: the image is damaged, or is not the one that its stored codes are of.
        """
        reader = self.readers[ref.dataset]
        where = f"{reader.path_prefix}.bin: image {image}"
        opened = open_image(reader.sequence(image), where)
        draw = self.draw(ref, image, opened.width, opened.height)
        operations = self._operations(ref, sizes[0])
        try:
            made = views(
                decode_pixels(opened, where),
                draw,
                sizes,
                then=lambda view: apply_rand_augment(view, operations),
            )
            return [self._erase(ref, pixels) for pixels in made]
        except DataError:
            raise
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error


@dataclass(frozen=True)
class CaptionSample:
    """A masked caption.

    Args:
        ids: ``[L]`` inputs: ``<s>``, tokens, ``</s>``, padding.
        labels: ``[L]``, -100 where not predicted.
        length: tokens up to ``</s>``.
        image: image document of the pair.
        truncated: whether the caption was too long.
        dropped_masks: tokens that were not masked for want of slots.
    """

    ids: Tokens
    labels: Tokens
    length: int
    image: int
    truncated: bool
    dropped_masks: int


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


class CaptionSamples:
    """Masked captions.

    Args:
        readers: captions, one reader per dataset of the blend; a document's sequences are the
            captions of the image with the same number.
        documents: of each dataset, the documents that samples come from.
        unit: ``caption``: a sample index counts captions; ``image``: it counts images, and one
            caption is drawn.
        vocab: the vocabulary that masks are drawn in.
        text: how a caption is laid out.
        fraction: share of its tokens to predict.
        slots: how many of them at most.
        rngs: source of randomness.
    """

    def __init__(
        self,
        readers: Sequence[IndexedReader],
        documents: Sequence[range],
        unit: str,
        vocab: Vocabulary,
        text: TextFormat,
        fraction: float,
        slots: int,
        rngs: SampleRngs,
    ) -> None:
        self.readers, self.documents = tuple(readers), tuple(documents)
        self.unit, self.vocab, self.text, self.rngs = unit, vocab, text, rngs
        self.fraction, self.slots = fraction, slots

    def num_samples(self, dataset: int) -> int:
        """Samples of an epoch of one dataset."""
        documents = self.documents[dataset]
        if self.unit == "image":
            return len(documents)
        first = self.readers[dataset].document_indices
        return int(first[documents.stop] - first[documents.start])

    def locate(self, ref: SampleRef) -> tuple[int, int]:
        """Image document and caption sequence of a sample."""
        reader, documents = self.readers[ref.dataset], self.documents[ref.dataset]
        first = reader.document_indices
        if self.unit == "caption":
            sequence = int(first[documents.start]) + ref.index
            return int(np.searchsorted(first, sequence, side="right")) - 1, sequence
        image = documents.start + ref.index
        begin, end = int(first[image]), int(first[image + 1])
        if begin == end:
            raise DataError(f"{reader.path_prefix}.bin: document {image} has no caption")
        rng = self.rngs.rng(Purpose.CAPTION_CHOICE, ref)
        return image, int(rng.integers(begin, end))

    def sample(self, ref: SampleRef) -> CaptionSample:
        """A caption, masked."""
        image, sequence = self.locate(ref)
        tokens = self.readers[ref.dataset].sequence(sequence)
        ids, length = self.text.lay_out([tokens[: self.text.length - 2]])
        natural = natural_mask_count(len(maskable_positions(ids, self.vocab)), self.fraction)
        rng = self.rngs.rng(Purpose.CAPTION_MASK, ref)
        count = min(natural, self.slots)
        inputs, labels = mask_tokens(ids, self.fraction, self.vocab, rng, count)
        return CaptionSample(
            inputs, labels, length, image, len(tokens) > length - 2, natural - count
        )
