"""Batches of random numbers in the shape of real ones, for benchmarks and layout comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Iterator, Optional

import numpy as np
import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare, MicroBatchNumber
from megatron_vlmoe.stream.batch import Batch, ImageSegment
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import num_micro_batches, text_mask_slots

FIRST_PIECE = 5
"""The first id of a text: those before it are of special pieces."""


class RandomData:
    """A source of batches like `PretrainData`; every micro-batch is a pure function of its number.

    Raises:
        ConfigError: the vocabulary has special pieces alone.
    """

    image_tokenizer = None

    def __init__(self, config: RunConfig, share: BatchShare) -> None:
        self.config = config
        self.share = share
        self.layout = StreamLayout.of(config)
        self.per_step = num_micro_batches(config, share.data_size)
        size, has_texts = config.model.vocab_size, self.layout.texts or self.layout.pairs
        if has_texts and size <= FIRST_PIECE:
            raise ConfigError(
                f"model.vocab_size={size}: random texts need at least {FIRST_PIECE + 1}"
            )

    def summary(self) -> list[str]:
        """One line for the log."""
        return ["data: random numbers"]

    def loader(
        self, split: str, first_micro_batch: int, num_micro_batches: Optional[int]
    ) -> Iterator[Batch]:
        """Batches from a local micro-batch number on."""
        local = first_micro_batch
        while num_micro_batches is None or local < first_micro_batch + num_micro_batches:
            number = MicroBatchNumber.locate(local, self.per_step, self.share).in_run
            yield self.batch(number, split)
            local += 1

    def places(self, name: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Random numbers are stored nowhere."""
        return []

    def check_files(self) -> None:
        """There are none."""

    def batch(self, number: int, split: str = "train") -> Batch:
        """The micro-batch with a global number."""
        # As everywhere, a negative seed is another one: numpy takes none.
        seed = self.config.train.seed % 2**64
        rng = np.random.default_rng((seed, number, int(split == "eval")))
        batch: Batch = {"micro_batch": torch.tensor(number)}
        if self.config.objectives.kind == "contrastive":
            return batch | self._towers(
                range(number * self.layout.texts, (number + 1) * self.layout.texts), split
            )
        if self.layout.texts:
            count, length = self.layout.texts, self.layout.text_length
            slots = text_mask_slots(self.config)
            positions = _choose(rng, count, length - 2, slots) + 1
            ids = self._ids(rng, (count, length))
            labels = self._ids(rng, (count, slots))
            batch["texts"] = {"ids": ids, "positions": positions, "labels": labels}
            if self.config.data.reset_attention:
                # Of their own generator, so that everything else is as without them.
                own = np.random.default_rng((seed, number, 2 + int(split == "eval")))
                documents = torch.from_numpy((own.random((count, length)) < 0.1).cumsum(axis=1))
                documents -= documents[:, :1].clone()
                batch["texts"]["documents"] = documents
                batch["texts"]["document_count"] = (documents[:, -1] + 1).sum()
        if self.layout.pairs:
            count, length = self.layout.pairs, self.layout.pair_text_length
            slots = self.config.objectives.caption_mask_slots
            lengths = torch.from_numpy(rng.integers(min(slots + 2, length), length + 1, count))
            labels = self._ids(rng, (count, slots))
            # Some slots stay unused, as in captions that are shorter than the budget.
            labels[torch.from_numpy(rng.random((count, slots)) < 0.1)] = -100
            ids = self._ids(rng, (count, length))
            positions = _choose(rng, count, min(slots, length - 2), slots) + 1
            batch["pair_texts"] = {
                "ids": ids,
                "lengths": lengths,
                "positions": positions,
                "labels": labels,
            }
            batch["pair_images"] = self._images(rng, count)
        if self.layout.images:
            batch["images"] = self._images(rng, self.layout.images)
        return batch

    def _towers(self, pairs: range, split: str) -> Batch:
        """Captions and their images, each pair a function of its number: the same in micro-batches of any size."""
        model, seed = self.config.model, self.config.train.seed % 2**64
        length, size = model.pair_text_length, model.image_size
        rngs = [np.random.default_rng((seed, pair, int(split == "eval"))) for pair in pairs]
        lengths = torch.tensor([int(rng.integers(3, length + 1)) for rng in rngs])
        ids = torch.cat([self._ids(rng, (1, length)) for rng in rngs])
        pixels = np.stack([rng.integers(0, 256, (3, size, size), dtype=np.uint8) for rng in rngs])
        own = torch.from_numpy(pixels).chunk(self.share.tensor_size)[self.share.tensor_rank]
        return {
            "texts": {"ids": ids, "lengths": lengths},
            "images": {"pixels": own},
            "image_documents": torch.tensor(list(pairs)),
        }

    def _images(self, rng: np.random.Generator, count: int) -> ImageSegment:
        model = self.config.model
        masked = self.config.objectives.num_masked_patches
        positions = _choose(rng, count, model.num_patches, masked)
        mask = torch.zeros(count, model.num_patches, dtype=torch.bool).scatter_(1, positions, True)
        shape = (count, 3, model.image_size, model.image_size)
        values = torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))
        local = values.chunk(self.share.tensor_size)[self.share.tensor_rank]
        codes = rng.integers(0, model.visual_vocab_size, (count, masked))
        return {
            "pixels": local,
            "mask": mask,
            "positions": positions,
            "labels": torch.from_numpy(codes),
        }

    def _ids(self, rng: np.random.Generator, shape: tuple[int, int]) -> Tensor:
        return torch.from_numpy(rng.integers(FIRST_PIECE, self.config.model.vocab_size, shape))


def _choose(rng: np.random.Generator, rows: int, width: int, count: int) -> Tensor:
    """`count` different ascending numbers below `width` in each row ``[rows, count]``."""
    order = rng.random((rows, width)).argsort(axis=1)[:, :count]
    return torch.from_numpy(np.sort(order, axis=1))
