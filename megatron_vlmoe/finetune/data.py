"""The data of a fine-tuning run: samples of prepared splits as parts of a micro-batch, and the micro-batches of a run.

Letters: n samples, L tokens with padding, S pixels along a side, A answers of a question.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.collate import (
    BatchShare,
    Loader,
    MicroBatchNumber,
    batch_bytes,
    batch_numbers,
    to_tensors,
)
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import check_dataset, part_prefix
from megatron_vlmoe.data.order import Purpose, SampleOrder, SampleRef, SampleRngs
from megatron_vlmoe.data.samples import ImageViews, TextFormat
from megatron_vlmoe.data.tables import SharedTables
from megatron_vlmoe.data.task_dataset import TaskDataset, TaskRow
from megatron_vlmoe.finetune.prepared import PreparedTask
from megatron_vlmoe.prepare.vqa_answers import NUM_ANNOTATORS
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.sizes import num_micro_batches

Array = npt.NDArray[Any]
NO_LABEL = -1
# Streams of random numbers; those of pretraining are below.
TRAIN_STREAM, EVAL_STREAM = 101, 102


class MixBox(NamedTuple):
    """The rectangle that CutMix takes from the partner: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int


class Mix(NamedTuple):
    """How a micro-batch is blended with itself in reverse: mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    One draw holds for a whole micro-batch of n images ("batch mode"); image i is blended with image n - 1 - i. What is
    random is drawn apart from where it is applied: processes that hold slices of the same micro-batch take the same
    draw, each with the partners of its own slice.

    Args:
        lam: weight of the own image and target, 0 to 1; the partner has the rest. With a box it is the share of the
            pixels that are left of the own image.
        box: CutMix with this box; None: Mixup.
    """

    lam: float = 1.0
    box: Optional[MixBox] = None


NO_MIX = Mix()


def draw_mix(
    rng: np.random.Generator,
    size: int,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
    prob: float = 1.0,
) -> Mix:
    """Draws how one micro-batch is blended.

    Args:
        rng: source of randomness.
        size: height and width of the images, S.
        mixup_alpha: the weight is drawn from Beta(alpha, alpha); 0 switches Mixup off.
        cutmix_alpha: the same for CutMix.
        switch_prob: how often it is CutMix, if both are on.
        prob: how often there is blending at all.

    Returns:
        ``NO_MIX`` if there is none. The box of CutMix is square, of area 1 - lambda, around a point anywhere in the
        image; it is cut off at the borders, and lambda corrected for what is left.
    """
    chance, switch = rng.random(2).tolist()
    if chance >= prob or (mixup_alpha <= 0.0 and cutmix_alpha <= 0.0):
        return NO_MIX
    cut = cutmix_alpha > 0.0 and (mixup_alpha <= 0.0 or switch < switch_prob)
    alpha = cutmix_alpha if cut else mixup_alpha
    lam = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(lam)
    row, column = rng.integers(0, size, 2).tolist()
    return mix_of_box(mix_box(size, lam, row, column), size)


def mix_box(size: int, lam: float, row: int, column: int) -> MixBox:
    """The square of area (1 - lambda) S^2 around a pixel, in whole pixels, cut off at the borders.

    Its half side is rounded down (so an odd side becomes even), as in the reference implementations.
    """
    half = int(size * math.sqrt(1.0 - lam)) // 2
    return MixBox(
        max(row - half, 0), min(row + half, size), max(column - half, 0), min(column + half, size)
    )


def mix_of_box(box: MixBox, size: int) -> Mix:
    """CutMix with a box: lambda is the share of the S x S pixels outside it."""
    area = (box.bottom - box.top) * (box.right - box.left)
    return Mix(1.0 - area / (size * size), box)


def mix_pixels(
    pixels: npt.NDArray[np.uint8], partners: npt.NDArray[np.uint8], mix: Mix
) -> npt.NDArray[np.uint8]:
    """Images blended with their partners': uint8 ``[n, 3, S, S]``; the inputs stay as they are.

    Mixup is rounded to the nearest value; CutMix takes the box from the partner.
    """
    if mix == NO_MIX:
        return pixels
    if mix.box is None:
        blend = mix.lam * pixels.astype(np.float32) + (1.0 - mix.lam) * partners.astype(np.float32)
        return np.rint(blend).astype(np.uint8)
    box = mix.box
    mixed = pixels.copy()
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    mixed[inside] = partners[inside]
    return mixed


class TaskSamples:
    """The samples of one split; pure functions of their reference and the seed.

    In evaluation images are resized as a whole. A process decodes the images of its share alone.
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
            data, task = config.data, config.task
            flip = data.pair_flip_probability if self.spec.texts else data.flip_probability
            readers = [IndexedReader(part_prefix(dataset.prefix, "image"))]
            augmentation = (task.rand_augment, task.random_erase)
            self.views = ImageViews(readers, None, data, flip, rngs, *augmentation)

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
        if self.spec.has_answers:
            answers = np.full((len(rows), NUM_ANNOTATORS), NO_LABEL, dtype=np.int64)
            scores = np.zeros((len(rows), NUM_ANNOTATORS), dtype=np.float32)
            for number, row in enumerate(rows):
                answers[number, : len(row.labels)] = row.labels
                scores[number, : len(row.labels)] = row.scores
            batch |= {"answers": answers, "scores": scores}
        else:
            labels = [row.labels[0] if row.labels else NO_LABEL for row in rows]
            batch["labels"] = np.array(labels, dtype=np.int64)
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
        chosen = pairs[list(numbers)]
        images: dict[str, Array] = {}
        if self.share.first_stage:
            own = chosen[self.share.slice(len(chosen)), 0]
            distinct, which = np.unique(own, return_inverse=True)
            once = distinct.tolist()
            pixels = self.pixels([SampleRef(0, 0, document) for document in once], once)
            images["pixels"] = pixels[which]
        texts = self.texts([(text,) for text in chosen[:, 1].tolist()])
        return {"pair_texts": texts, "pair_images": images}

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

    def pixels(
        self, refs: Sequence[SampleRef], documents: Sequence[int], threads: int = 1
    ) -> Array:
        """Views of images, uint8 ``[n, 3, S, S]``, decoded by so many threads."""
        assert self.views is not None
        out = np.empty((len(documents), 3, self.size, self.size), dtype=np.uint8)

        def decode(number: int) -> None:
            assert self.views is not None
            out[number] = self.views.pixels(refs[number], documents[number], [self.size])[0]

        with ThreadPoolExecutor(threads) if threads > 1 else contextlib.nullcontext() as pool:
            # The results are None; an error in one of them is raised.
            list((pool.map if pool else map)(decode, range(len(documents))))
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


class TrainingMicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch, in a shuffled order that changes with every epoch."""

    def __init__(self, samples: TaskSamples, config: FinetuneConfig, share: BatchShare) -> None:
        self.samples, self.share = samples, share
        self.micro, self.whole = config.task.micro_batch_size, config.task.global_batch_size
        self.per_step = num_micro_batches(config, share.data_size)
        key = samples.rngs.dataset_key(0)
        tables = SharedTables(config.data.cache_dir)
        self.order = SampleOrder(len(samples), config.train.seed, True, key, tables)

    def refs(self, numbers: Sequence[int]) -> list[SampleRef]:
        """The samples with these numbers, counted over the run."""
        return [SampleRef(0, *self.order.locate(number)) for number in numbers]

    def __getitem__(self, local: int) -> Batch:
        """The batch. Raises DataError."""
        number = MicroBatchNumber.locate(local, self.per_step, self.share)
        numbers = number.samples(self.micro, self.whole)
        batch = self.samples.batch(self.refs(numbers))
        batch |= {
            "micro_batch": np.array(number.in_run),
            "sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
        return to_tensors(batch)


@dataclass(frozen=True)
class SplitData:
    """One evaluation split."""

    name: str
    dataset: TaskDataset
    samples: TaskSamples


class TaskData:
    """The splits of a task as micro-batches, with the run's configuration completed from them."""

    def __init__(self, prepared: PreparedTask, share: BatchShare) -> None:
        self.prepared, self.share = prepared, share
        self.config, self.labels = prepared.config, prepared.labels
        self.splits = [
            SplitData(name, dataset, self._samples(dataset, EVAL_STREAM))
            for name, dataset in zip(self.config.task.splits, prepared.splits)
        ]
        self.train: TrainingMicroBatches | None = None
        if prepared.train is not None:
            samples = self._samples(prepared.train, TRAIN_STREAM)
            self.train = TrainingMicroBatches(samples, self.config, share)

    @classmethod
    def open(cls, config: FinetuneConfig, share: BatchShare, training: bool = True) -> TaskData:
        """Opens and verifies the splits of a run; see `PreparedTask.open`."""
        return cls(PreparedTask.open(config, training), share)

    def _samples(self, dataset: TaskDataset, stream: int) -> TaskSamples:
        model, tokenizer = self.config.model, self.prepared.tokenizer
        alone = self.config.task.spec.stream.texts
        length = model.text_length if alone else model.pair_text_length
        text = TextFormat.of(tokenizer, length) if tokenizer else None
        rngs = SampleRngs(self.config.train.seed, stream, stream == TRAIN_STREAM)
        return TaskSamples(dataset, self.config, text, rngs, self.share)

    def loader(self, split: str, first_micro_batch: int, num_micro_batches: int | None) -> Loader:
        """Training micro-batches of this process in order, as `Trainer` asks for them."""
        assert split == "train" and self.train is not None
        keys, data = batch_numbers(first_micro_batch, num_micro_batches), self.config.data
        size = batch_bytes(self.config, self.share)
        return Loader(self.train, keys, data.num_workers, data.prefetch, size)

    def places(self, name: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Samples of the training split are numbered as they are stored."""
        assert self.train is not None
        prefix = self.train.samples.dataset.prefix
        return [{"dataset": prefix, "sample": number} for number in numbers]

    def check_files(self) -> None:
        """Compares the sizes of the training split's files with its manifest. Raises DataError."""
        assert self.train is not None
        check_dataset(self.train.samples.dataset.prefix, self.config.task.name)

    def summary(self) -> list[str]:
        """Lines for the log."""
        return self.prepared.summary(self.share.data_size)
