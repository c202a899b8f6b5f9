"""Samples of a downstream task as the parts of a micro-batch.

Letters: n samples, L tokens with padding, S pixels along a side, A answers of a question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import part_prefix
from megatron_vlmoe.data.order import Purpose, SampleRef
from megatron_vlmoe.data.samples import Augmentation, ImageViews, SampleRngs, TextFormat
from megatron_vlmoe.data.task_dataset import TaskDataset, TaskRow
from megatron_vlmoe.finetune.mixing import draw_mix, mix_pixels
from megatron_vlmoe.prepare.vqa_answers import NUM_ANNOTATORS

Array = npt.NDArray[Any]
NO_LABEL = -1


class TaskSamples:
    """The samples of one split; pure functions of their reference and the seed.

    Args:
        dataset: the split.
        config: sizes and augmentation.
        text: format of texts; None for a task without.
        rngs: source of randomness; in evaluation images are resized as a whole.
        share: whose pixels are decoded.
    """

    def __init__(
        self,
        dataset: TaskDataset,
        config: FinetuneConfig,
        text: TextFormat | None,
        rngs: SampleRngs,
        share: BatchShare,
    ) -> None:
        self.dataset, self.text, self.rngs, self.share = dataset, text, rngs, share
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
            self.views = ImageViews([reader], None, augmentation, rngs)

    def __len__(self) -> int:
        return len(self.dataset)

    def batch(self, refs: Sequence[SampleRef]) -> dict[str, Any]:
        """What the task reads of these samples.

        - pairs (vqa, nlvr2): the segments `pair_texts` and `pair_images`;
        - texts (retrieval, mnli): the segment `texts`;
        - images (retrieval, imagenet): the segment `images`; of retrieval ``image_documents [n]``; in training with
          mixup or cutmix ``partner_labels [n]`` and ``own_share [n]``;
        - ``labels [n]`` (-1 where unknown), for vqa ``answers [n, A]`` and ``scores [n, A]``; ``samples [n]``.
        """
        rows = [self.dataset.row(ref.index) for ref in refs]
        batch: dict[str, Any] = {"samples": np.array([ref.index for ref in refs], dtype=np.int64)}
        batch |= _answers(rows) if self.spec.has_answers else _labels(rows)
        if self.spec.stream.texts:
            batch["texts"] = self.texts([row.texts for row in rows])
        if self.spec.stream.images:
            documents = [row.images[0] for row in rows]
            batch["images"] = self.images(refs, documents)
            if self.spec.mixes_images and self.rngs.train:
                batch |= self._mixed(refs, documents, batch)
            if self.spec.target == "match":
                # Pairs are made of the texts and images that are here, once it is known which are alike.
                return batch | {"image_documents": np.array(documents, dtype=np.int64)}
        if self.spec.stream.pairs:
            batch |= self._pairs(refs, rows)
        return batch

    def sample_parts(self, numbers: Sequence[int]) -> dict[str, Any]:
        """`batch` of the samples with these numbers, for evaluation."""
        return self.batch([SampleRef(0, 0, number) for number in numbers])

    def image_parts(self, documents: Sequence[int]) -> dict[str, Any]:
        """The segment `images` of these images, for evaluation."""
        return {"images": self.images([SampleRef(0, 0, n) for n in documents], documents)}

    def text_parts(self, sequences: Sequence[int]) -> dict[str, Any]:
        """The segment `texts` of these texts."""
        return {"texts": self.texts([(sequence,) for sequence in sequences])}

    def pair_parts(self, pairs: Array, numbers: Sequence[int]) -> dict[str, Any]:
        """The segments `pair_texts` and `pair_images` of candidates, for the matching head.

        Args:
            pairs: ``[n, 2]`` of (image document, caption sequence), in order of the images: an image is decoded once
                for all its pairs in a micro-batch.
            numbers: rows of them.
        """
        chosen = pairs[list(numbers)].tolist()
        return {
            "pair_texts": self.texts([(text,) for _, text in chosen]),
            "pair_images": self.repeated_images([image for image, _ in chosen]),
        }

    def _mixed(
        self, refs: Sequence[SampleRef], documents: Sequence[int], batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """What mixup and cutmix change: every image is mixed with that of the micro-batch in reverse."""
        if max(self.options.mixup, self.options.cutmix) <= 0.0:
            return {}
        images = batch["images"]
        rng = self.rngs.rng(Purpose.MIX, refs[0])
        mix = draw_mix(rng, self.size, self.options.mixup, self.options.cutmix)
        if "pixels" in images:
            own = images["pixels"]
            partners = own[::-1]
            if self.share.tensor_size > 1:
                # They belong to other ranks.
                partners = self.images(refs[::-1], documents[::-1])["pixels"]
            images = images | {"pixels": mix_pixels(own, partners, mix)}
        return {
            "images": images,
            "partner_labels": batch["labels"][::-1].copy(),
            "own_share": np.full(len(refs), mix.lam, dtype=np.float32),
        }

    def texts(self, sequences: Sequence[Sequence[int]]) -> dict[str, Array]:
        """A text segment of texts that are given by the sequences of each: `ids` and `lengths`."""
        assert self.text is not None
        parts = [[self.dataset.tokens(s) for s in own] for own in sequences]
        ids, lengths = self.text.rows(parts)
        return {"ids": ids, "lengths": lengths}

    def images(self, refs: Sequence[SampleRef], documents: Sequence[int]) -> dict[str, Array]:
        """An image segment: `pixels` of this rank's share of the documents; nothing beyond the first stage."""
        if not self.share.first_stage:
            return {}
        own = self.share.slice(len(documents))
        return {"pixels": self.pixels(refs[own], documents[own])}

    def repeated_images(self, documents: Sequence[int]) -> dict[str, Array]:
        """As `images`, for evaluation alone: a document that comes several times is decoded once."""
        if not self.share.first_stage:
            return {}
        own = np.asarray(documents)[self.share.slice(len(documents))]
        distinct, which = np.unique(own, return_inverse=True)
        once = distinct.tolist()
        pixels = self.pixels([SampleRef(0, 0, document) for document in once], once)
        return {"pixels": pixels[which]}

    def pixels(
        self, refs: Sequence[SampleRef], documents: Sequence[int], threads: int = 1
    ) -> Array:
        """Views of images, uint8 ``[n, 3, S, S]``, decoded by so many threads."""
        assert self.views is not None
        out = np.empty((len(documents), 3, self.size, self.size), dtype=np.uint8)

        def decode(number: int) -> None:
            assert self.views is not None
            out[number] = self.views.pixels(refs[number], documents[number], [self.size])[0]

        if threads == 1:
            for number in range(len(documents)):
                decode(number)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, range(len(documents))))
        return out

    def _pairs(
        self, refs: Sequence[SampleRef], rows: Sequence[TaskRow]
    ) -> dict[str, dict[str, Array]]:
        """Every image of a sample with its text; the pairs of a sample follow each other."""
        per_sample = len(rows[0].images)
        documents = [document for row in rows for document in row.images]
        texts = [row.texts for row in rows for _ in row.images]
        # Every picture of a sample has random numbers of its own.
        own = [
            SampleRef(ref.dataset, ref.epoch, ref.index * per_sample + number)
            for ref in refs
            for number in range(per_sample)
        ]
        return {"pair_texts": self.texts(texts), "pair_images": self.images(own, documents)}


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
