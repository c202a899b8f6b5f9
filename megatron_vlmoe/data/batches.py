"""Pretraining data: opens a run's datasets and makes every micro-batch from its number alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import (
    BatchShare,
    ImageBatches,
    MicroBatchNumber,
    PairBatches,
    PixelBatches,
    TextBatches,
    to_tensors,
)
from megatron_vlmoe.data.loading import Loader, Numbers
from megatron_vlmoe.data.masking import Vocabulary
from megatron_vlmoe.data.order import BlendedOrder
from megatron_vlmoe.data.packing import PackedTexts
from megatron_vlmoe.data.samples import (
    Augmentation,
    CaptionSamples,
    ImageViews,
    PatchMasks,
    SampleRngs,
    TextFormat,
    TextSamples,
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
from megatron_vlmoe.tokenizers.text import TextTokenizer

if TYPE_CHECKING:
    from megatron_vlmoe.tokenizers.image import ImageTokenizer

__all__ = ["BatchShare", "Loader", "MicroBatches", "PretrainData"]

Part = TextBatches | ImageBatches | PairBatches


class MicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch: a pure function, whatever process or order it runs in.

    Args:
        parts: for each objective that is on (``texts``, ``images``, ``pairs``), its batches.
        config: batch sizes.
        share: which part this process needs.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        config: RunConfig,
        share: BatchShare,
    ) -> None:
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
        self.stored_codes = targets is not None and targets.stored
        """Whether visual codes are read from disk."""
        self.image_tokenizer = targets.tokenizer if targets else None
        """Computes the visual codes, on the CPU; None where they are stored, and on all stages but the last."""
        self._share, self._sources, self._targets = share, sources, targets
        self._datasets = {"train": MicroBatches(self._parts("train"), config, share)}

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
                if found is not None:
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
        lines = describe_config(self.config, self.stored_codes)
        for split in SPLITS:
            if all((name, split) in self._sources for name in self._dataset("train").parts):
                for name, part in self._dataset(split).parts.items():
                    sources = self._sources[name, split]
                    lines += describe_sources(self.config, name, split, sources, part.order)
        return lines

    def _dataset(self, split: Split) -> MicroBatches:
        if split not in self._datasets:
            self._datasets[split] = MicroBatches(self._parts(split), self.config, self._share)
        return self._datasets[split]

    def _rngs(self, objective: str, split: Split) -> SampleRngs:
        """The randomness of an objective in a split; stream 0 is left to tools."""
        stream = 1 + 2 * OBJECTIVES.index(objective) + SPLITS.index(split)
        return SampleRngs(self.config.train.seed, stream, split == "train")

    def _parts(self, split: Split) -> dict[str, Part]:
        """The batch parts of every objective that is on.

        Raises:
            ConfigError: an objective has nothing held out.
        """
        builders: dict[str, Callable[[Split], Part]] = {
            "texts": self._texts,
            "images": self._images,
            "pairs": self._pairs,
        }
        parts: dict[str, Part] = {}
        for name in enabled_objectives(self.config.data):
            if (name, split) not in self._sources:
                raise ConfigError(
                    f"no {name} to evaluate on: data.eval_fraction is 0 and no eval dataset is set"
                )
            parts[name] = builders[name](split)
        return parts

    @property
    def _tokenizer(self) -> TextTokenizer:
        assert self.text_tokenizer is not None
        return self.text_tokenizer

    @property
    def _vocabulary(self) -> Vocabulary:
        tokenizer = self._tokenizer
        return Vocabulary(tokenizer.size, tokenizer.mask_id, tokenizer.special_ids)

    def _texts(self, split: Split) -> TextBatches:
        data, objectives = self.config.data, self.config.objectives
        sources, rngs = self._sources["texts", split], self._rngs("texts", split)
        texts = [
            PackedTexts(
                item.reader("text_document"),
                item.documents,
                self.config.model.text_length,
                bos_id=self._tokenizer.bos_id,
                eos_id=self._tokenizer.eos_id,
                seed=rngs.seed,
                shuffle=rngs.train,
                dataset=rngs.dataset_key(number),
                cache_dir=data.cache_dir or None,
                identity=item.manifest.files["_text_document.idx"].sha256,
            )
            for number, item in enumerate(sources.items)
        ]
        samples = TextSamples(
            texts,
            self._vocabulary,
            text_mask_slots(self.config),
            objectives.text_mask_fraction,
            rngs,
        )
        sizes = [text.num_samples for text in texts]
        order = sources.order(sizes, rngs.seed, rngs.train, rngs.dataset_key)
        return TextBatches(order, samples, data.reset_attention)

    def _pixels(self, objective: str, split: Split) -> PixelBatches:
        config, targets = self.config, self._targets
        assert targets is not None
        flips = {
            "images": config.data.flip_probability,
            "pairs": config.data.pair_flip_probability,
        }
        rngs = self._rngs(objective, split)
        views = ImageViews(
            [item.reader("image") for item in self._sources[objective, split].items],
            targets.codes[objective, split] if targets.stored else None,
            Augmentation(config.data.crop_scale_min, config.data.color_jitter, flips[objective]),
            rngs,
        )
        masks = PatchMasks(
            config.model.patch_grid,
            config.objectives.num_masked_patches,
            config.objectives.min_mask_block,
        )
        sizes = (config.model.image_size, targets.tokenizer_size)
        return PixelBatches(views, masks, rngs, sizes, self._share)

    def _images(self, split: Split) -> ImageBatches:
        sources, rngs = self._sources["images", split], self._rngs("images", split)
        sizes = [len(item.documents) for item in sources.items]
        order = sources.order(sizes, rngs.seed, rngs.train, rngs.dataset_key)
        first = [item.documents.start for item in sources.items]
        return ImageBatches(order, first, self._pixels("images", split))

    def _pairs(self, split: Split) -> PairBatches:
        config = self.config
        sources, rngs = self._sources["pairs", split], self._rngs("pairs", split)
        captions = CaptionSamples(
            [item.reader("text") for item in sources.items],
            [item.documents for item in sources.items],
            config.data.pair_unit,
            self._vocabulary,
            TextFormat.of(self._tokenizer, config.model.pair_text_length),
            config.objectives.caption_mask_fraction,
            config.objectives.caption_mask_slots,
            rngs,
        )
        sizes = [captions.num_samples(number) for number in range(len(sources.items))]
        order = sources.order(sizes, rngs.seed, rngs.train, rngs.dataset_key)
        return PairBatches(order, captions, self._pixels("pairs", split))


def describe_config(config: RunConfig, stored_codes: bool) -> list[str]:
    """The derived sizes of the objectives that are on."""
    data, model, objectives = config.data, config.model, config.objectives
    lines = []
    if data.micro_texts:
        lines.append(
            f"texts: {text_mask_slots(config)} of {model.text_length - 2} tokens are predicted, "
            f"vocabulary {model.vocab_size}"
        )
    if data.micro_pairs:
        lines.append(
            f"captions: at most {objectives.caption_mask_slots} of up to "
            f"{model.pair_text_length - 2} tokens are predicted, vocabulary {model.vocab_size}"
        )
    if data.micro_images or data.micro_pairs:
        origin = "stored" if stored_codes else "computed on the fly"
        lines.append(
            f"images: {objectives.num_masked_patches} of {model.num_patches} patches are "
            f"predicted, {model.visual_vocab_size} visual codes, {origin}"
        )
    return lines


def describe_sources(
    config: RunConfig, objective: str, split: Split, sources: Sources, order: BlendedOrder
) -> list[str]:
    """One line for each dataset of an objective."""
    steps = config.train.steps if split == "train" else config.train.eval_steps
    wanted = steps * getattr(config.data, f"global_{objective}")
    sizes = [one.num_samples for one in order.orders]
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
