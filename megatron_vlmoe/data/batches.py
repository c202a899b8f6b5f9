"""Pretraining data: opens a run's datasets and makes every micro-batch from its number alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare, Loader, MicroBatchNumber, Numbers, to_tensors
from megatron_vlmoe.data.samples import (
    Augmentation,
    ImagePart,
    ImageViews,
    PairPart,
    PixelPart,
    SampleRngs,
    TextPart,
)
from megatron_vlmoe.data.sources import (
    OBJECTIVES,
    SPLITS,
    Sources,
    Split,
    VisualTargets,
    enabled_objectives,
    open_sources,
    open_targets,
    open_text_tokenizer,
    resolve_sizes,
)
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import num_micro_batches, text_mask_slots
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.tokenizers.text import TextTokenizer

Part = TextPart | ImagePart | PairPart


class MicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch: a pure function, whatever process or order it runs in."""

    def __init__(self, parts: Mapping[str, Part], config: RunConfig, share: BatchShare) -> None:
        self.parts, self.share = dict(parts), share
        self.per_step = num_micro_batches(config, share.data_size)
        self.sizes = {
            name: (getattr(config.data, f"micro_{name}"), getattr(config.data, f"global_{name}"))
            for name in parts
        }

    def __getitem__(self, local: int) -> Batch:
        """The batch. Raises DataError."""
        number = MicroBatchNumber.locate(local, self.per_step, self.share)
        batch: dict[str, Any] = {
            "micro_batch": np.int64(number.in_run),
            "step": np.int64(number.step),
        }
        for name, part in self.parts.items():
            batch |= part.make(number.samples(*self.sizes[name]))
        return to_tensors(batch)


class PretrainData:
    """The datasets of a pretraining run, verified, as micro-batches.

    What is in one is documented at :class:`megatron_vlmoe.stream.batch.Batch`.
    """

    def __init__(
        self,
        config: RunConfig,
        share: BatchShare,
        sources: Mapping[tuple[str, Split], Sources],
        text_tokenizer: TextTokenizer | None,
        targets: VisualTargets | None,
    ) -> None:
        self.config = config
        """The run's configuration with all sizes filled in."""
        self.text_tokenizer = text_tokenizer
        """None if the run has neither texts nor pairs."""
        self.stored_codes = targets is not None and targets.tokenizer_size is None
        """Whether visual codes are read from disk."""
        self.image_tokenizer = targets.tokenizer if targets else None
        """Computes the visual codes, on the CPU; None where they are stored, and on all stages but the last."""
        self._share, self._sources, self._targets = share, sources, targets
        self._datasets: dict[str, MicroBatches] = {}
        self._dataset("train")

    @classmethod
    def open(
        cls,
        config: RunConfig,
        share: BatchShare = BatchShare(),  # noqa: B008 (frozen)
        image_tokenizer: ImageTokenizer | None = None,
    ) -> PretrainData:
        """Opens and verifies every dataset, tokenizer and stored code of a run.

        Args:
            config: of the run.
            share: which part of the batches this process needs.
            image_tokenizer: `config.data.image_tokenizer`, if it is in memory already.

        Raises:
            ConfigError: options that are missing or contradict each other or the data.
            DataError: a dataset that is missing, damaged, or made with another tokenizer.
            ValueError: a tokenizer that cannot be read.
        """
        enabled = enabled_objectives(config.data)
        num_micro_batches(config, share.data_size)
        StreamLayout.from_config(config.model, config.data).shard(share.tensor_size)
        tokenizer = open_text_tokenizer(config.data)
        fingerprint = tokenizer.fingerprint if tokenizer else None
        sources: dict[tuple[str, Split], Sources] = {}
        for name in enabled:
            wanted = None if name == "images" else fingerprint
            for split, found in open_sources(config.data, name, wanted).items():
                sources[name, split] = found
        targets = open_targets(config, sources, image_tokenizer)
        if targets and not share.last_stage:
            targets = replace(targets, tokenizer=None)
        config = resolve_sizes(
            config,
            tokenizer.size if tokenizer else None,
            targets.num_codes if targets else None,
            sources.get(("pairs", "train")),
        )
        return cls(config, share, sources, tokenizer, targets)

    def loader(
        self, split: Split, first_micro_batch: int = 0, num_micro_batches: int | None = None
    ) -> Loader:
        """Micro-batches of this process in order; may be iterated over again.

        Args:
            split: ``train``, or ``eval``: held-out data in stored order, unaugmented, with masks
                that do not change; its steps count from 0.
            first_micro_batch: number of the first among this process's own micro-batches.
            num_micro_batches: how many; None: endless.
        """
        numbers, data = Numbers(first_micro_batch, num_micro_batches), self.config.data
        return Loader(self._dataset(split), numbers, data.num_workers, data.prefetch)

    def summary(self) -> list[str]:
        """Lines for the log: documents, samples and epochs of every dataset, and derived sizes."""
        data, model, objectives = self.config.data, self.config.model, self.config.objectives
        lines = []
        if data.micro_texts:
            lines.append(
                f"texts: {text_mask_slots(self.config)} of {model.text_length - 2} tokens are "
                f"predicted, vocabulary {model.vocab_size}"
            )
        if data.micro_pairs:
            lines.append(
                f"captions: at most {objectives.caption_mask_slots} of up to "
                f"{model.pair_text_length - 2} tokens are predicted, vocabulary {model.vocab_size}"
            )
        if data.micro_images or data.micro_pairs:
            origin = "stored" if self.stored_codes else "computed on the fly"
            lines.append(
                f"images: {objectives.num_masked_patches} of {model.num_patches} patches are "
                f"predicted, {model.visual_vocab_size} visual codes, {origin}"
            )
        for split in SPLITS:
            if all((name, split) in self._sources for name in enabled_objectives(data)):
                for name in enabled_objectives(data):
                    lines += self._source_lines(name, split)
        return lines

    def _source_lines(self, objective: str, split: Split) -> list[str]:
        """One line for each dataset of an objective."""
        config, sources = self.config, self._sources[objective, split]
        steps = config.train.steps if split == "train" else config.train.eval_steps
        wanted = steps * getattr(config.data, f"global_{objective}")
        orders = self._dataset(split).parts[objective].order.orders
        sizes = [order.num_samples for order in orders]
        lines = []
        for item, size, share in zip(sources.items, sizes, sources.shares(sizes), strict=True):
            line = (
                f"{split} {objective} {item.prefix}: {len(item.documents):,} documents, "
                f"{size:,} samples per epoch"
            )
            if len(sources.items) > 1:
                line += f", {float(share):.1%} of the blend"
            line += f", {wanted * float(share) / size:.2f} epochs in {steps:,} steps"
            if objective == "pairs":
                reader = item.reader("text")
                first = reader.document_indices
                begin, end = int(first[item.documents.start]), int(first[item.documents.stop])
                lengths = reader.sequence_lengths[begin:end]
                cut = float(np.mean(lengths > config.model.pair_text_length - 2))
                line += f", {cut:.2%} of the captions are cut"
            lines.append(line)
        return lines

    def _dataset(self, split: Split) -> MicroBatches:
        """Micro-batches of a split.

        Raises:
            ConfigError: an objective has nothing held out.
        """
        if split not in self._datasets:
            parts = {name: self._part(name, split) for name in enabled_objectives(self.config.data)}
            self._datasets[split] = MicroBatches(parts, self.config, self._share)
        return self._datasets[split]

    def _part(self, objective: str, split: Split) -> Part:
        config, tokenizer, targets = self.config, self.text_tokenizer, self._targets
        if (objective, split) not in self._sources:
            raise ConfigError(
                f"no {objective} to evaluate on: data.eval_fraction is 0 and no eval dataset is set"
            )
        sources = self._sources[objective, split]
        # Stream 0 is left to tools.
        stream = 1 + 2 * OBJECTIVES.index(objective) + SPLITS.index(split)
        rngs = SampleRngs(config.train.seed, stream, split == "train")
        if objective == "texts":
            assert tokenizer is not None
            return TextPart(config, sources, rngs, tokenizer)
        assert targets is not None
        data, is_pairs = config.data, objective == "pairs"
        flip = data.pair_flip_probability if is_pairs else data.flip_probability
        views = ImageViews(
            [item.reader("image") for item in sources.items],
            targets.codes.get((objective, split)),
            Augmentation(data.crop_scale_min, data.color_jitter, flip),
            rngs,
        )
        pixels = PixelPart(config, views, targets.tokenizer_size, self._share)
        if not is_pairs:
            return ImagePart(sources, pixels)
        assert tokenizer is not None
        return PairPart(config, sources, tokenizer, pixels)
