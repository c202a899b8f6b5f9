"""Samples of a downstream task as the parts of a micro-batch.

Letters: n samples, L token slots, S pixels along a side, A answers of a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import part_prefix
from megatron_vlmoe.data.order import Place, Purpose
from megatron_vlmoe.data.samples import Augmentation, Draws, ImageViews
from megatron_vlmoe.data.task_dataset import TaskDataset, TaskRow
from megatron_vlmoe.finetune.mixing import draw_mix, mix_pixels
from megatron_vlmoe.prepare.vqa_answers import NUM_ANNOTATORS
from megatron_vlmoe.tokenizers.text import TextTokenizer

Array = npt.NDArray[Any]
NO_LABEL = -1


@dataclass(frozen=True)
class TextFormat:
    """How texts become token slots: ``<s> A </s>`` or, of two, ``<s> A </s> B </s>``, then padding.

    Documents follow each other in the same way in packed texts of pretraining.

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

    def lay_out(self, parts: Sequence[Array]) -> tuple[Array, int]:
        """Slots ``[L]`` and number of tokens; the longest part is shortened first."""
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

    def rows(self, texts: Sequence[Sequence[Array]]) -> tuple[Array, Array]:
        """Slots ``[n, L]`` and lengths ``[n]`` of n texts, each of one or more parts."""
        made = [self.lay_out(parts) for parts in texts]
        ids = np.stack([ids for ids, _ in made])
        return ids, np.array([length for _, length in made], dtype=np.int64)


class TaskSamples:
    """The samples of one split; pure functions of their place and the seed.

    Args:
        dataset: the split.
        config: sizes and augmentation.
        text: format of texts; None for a task without.
        draws: source of randomness; in evaluation images are resized as a whole.
        share: whose pixels are decoded.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        config: FinetuneConfig,
        text: TextFormat | None,
        draws: Draws,
        share: BatchShare,
    ) -> None:
        self.dataset, self.text, self.draws, self.share = dataset, text, draws, share
        self.spec, self.options = config.task.spec, config.task
        self.size = config.model.image_size
        self.views: ImageViews | None = None
        if dataset.num_images:
            flip = config.data.flip_probability
            if self.spec.texts:
                flip = config.data.pair_flip_probability
            augmentation = Augmentation(
                config.data.crop_scale_min,
                config.data.color_jitter,
                flip,
                config.task.rand_augment,
                config.task.random_erase,
                config.data.pixel_mean,
                config.data.pixel_std,
            )
            reader = IndexedReader(part_prefix(dataset.prefix, "image"))
            self.views = ImageViews([reader], None, augmentation, draws)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, places: Sequence[Place]) -> dict[str, Array]:
        """What the task reads of the samples at these places.

        - pairs (vqa, nlvr2): ``pair_ids [pairs, L]``, ``pair_lengths``, ``pair_pixels [pairs / TP, 3, S, S]``;
        - texts (retrieval, mnli): ``text_ids``, ``text_lengths``;
        - images (retrieval, imagenet): ``image_pixels``; of retrieval ``image_documents [n]``; in training with mixup
          or cutmix ``partner_labels [n]`` and ``own_share [n]``;
        - ``labels [n]`` (-1 where unknown), for vqa ``answers [n, A]`` and ``scores [n, A]``; ``samples [n]``.
        """
        rows = [self.dataset.row(place.index) for place in places]
        batch = {"samples": np.array([place.index for place in places], dtype=np.int64)}
        batch |= _answers(rows) if self.spec.has_answers else _labels(rows)
        if self.spec.stream.texts:
            batch |= self.texts([row.texts for row in rows])
        if self.spec.stream.images:
            documents = [row.images[0] for row in rows]
            batch |= self.images("image", places, documents)
            if self.spec.mixes_images and self.draws.train:
                batch |= self._mixed(places, documents, batch)
            if self.spec.target == "match":
                # Pairs are made of the texts and images that are here, once it is known which are alike.
                return batch | {"image_documents": np.array(documents, dtype=np.int64)}
        if self.spec.stream.pairs:
            batch |= self._pairs(places, rows)
        return batch

    def _mixed(
        self, places: Sequence[Place], documents: Sequence[int], batch: Mapping[str, Array]
    ) -> dict[str, Array]:
        """What mixup and cutmix change: every image is mixed with that of the micro-batch in reverse."""
        if max(self.options.mixup, self.options.cutmix) <= 0.0:
            return {}
        changed: dict[str, Array] = {}
        rng = self.draws.rng(Purpose.MIX, places[0])
        mix = draw_mix(rng, self.size, self.options.mixup, self.options.cutmix)
        if "image_pixels" in batch:
            own = batch["image_pixels"]
            partners = own[::-1]
            if self.share.tensor_size > 1:
                # They belong to other ranks.
                partners = self.images("image", places[::-1], documents[::-1])["image_pixels"]
            changed["image_pixels"] = mix_pixels(own, partners, mix)
        changed["partner_labels"] = batch["labels"][::-1].copy()
        changed["own_share"] = np.full(len(places), mix.lam, dtype=np.float32)
        return changed

    def texts(self, sequences: Sequence[Sequence[int]], prefix: str = "text") -> dict[str, Array]:
        """``{prefix}_ids`` and ``{prefix}_lengths`` of texts, given by the sequences of each."""
        assert self.text is not None
        parts = [[self.dataset.tokens(s) for s in own] for own in sequences]
        ids, lengths = self.text.rows(parts)
        return {f"{prefix}_ids": ids, f"{prefix}_lengths": lengths}

    def images(
        self, prefix: str, places: Sequence[Place], documents: Sequence[int]
    ) -> dict[str, Array]:
        """``{prefix}_pixels`` of this rank's share of the documents; nothing beyond the first stage."""
        if not self.share.first_stage:
            return {}
        own = self.share.slice(len(documents))
        return {f"{prefix}_pixels": self.pixels(places[own], documents[own])}

    def repeated_images(self, prefix: str, documents: Sequence[int]) -> dict[str, Array]:
        """As `images`, for evaluation alone: a document that comes several times is decoded once."""
        if not self.share.first_stage:
            return {}
        own = np.asarray(documents)[self.share.slice(len(documents))]
        distinct, which = np.unique(own, return_inverse=True)
        once = distinct.tolist()
        pixels = self.pixels([Place(0, 0, document) for document in once], once)
        return {f"{prefix}_pixels": pixels[which]}

    def pixels(self, places: Sequence[Place], documents: Sequence[int], threads: int = 1) -> Array:
        """Views of images, uint8 ``[n, 3, S, S]``, decoded by so many threads."""
        assert self.views is not None
        out = np.empty((len(documents), 3, self.size, self.size), dtype=np.uint8)

        def decode(number: int) -> None:
            assert self.views is not None
            out[number] = self.views.pixels(places[number], documents[number], [self.size])[0]

        if threads == 1:
            for number in range(len(documents)):
                decode(number)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, range(len(documents))))
        return out

    def _pairs(self, places: Sequence[Place], rows: Sequence[TaskRow]) -> dict[str, Array]:
        """Every image of a sample with its text; the pairs of a sample follow each other."""
        per_sample = len(rows[0].images)
        documents = [document for row in rows for document in row.images]
        texts = [row.texts for row in rows for _ in row.images]
        # Draws of their own for each picture of a sample.
        own = [
            Place(place.dataset, place.epoch, place.index * per_sample + number)
            for place in places
            for number in range(per_sample)
        ]
        return self.texts(texts, "pair") | self.images("pair", own, documents)


def _labels(rows: Sequence[TaskRow]) -> dict[str, Array]:
    labels = [row.labels[0] if row.labels else NO_LABEL for row in rows]
    return {"labels": np.array(labels, dtype=np.int64)}


def _answers(rows: Sequence[TaskRow]) -> dict[str, Array]:
    answers = np.full((len(rows), NUM_ANNOTATORS), NO_LABEL, dtype=np.int64)
    scores = np.zeros((len(rows), NUM_ANNOTATORS), dtype=np.float32)
    for number, row in enumerate(rows):
        answers[number, : len(row.labels)] = row.labels
        scores[number, : len(row.labels)] = row.scores
    return {"answers": answers, "scores": scores}
