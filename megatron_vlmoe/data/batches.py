"""Pretraining data: opens what a run reads, derives the sizes that its configuration leaves to the data, and makes
every micro-batch from its number alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import DataConfig, RunConfig
from megatron_vlmoe.data.codes import CodesReader, check_codes, codes_prefix
from megatron_vlmoe.data.collate import (
    BatchShare,
    Loader,
    MicroBatchNumber,
    batch_bytes,
    batch_numbers,
    to_tensors,
)
from megatron_vlmoe.data.manifest import check_dataset
from megatron_vlmoe.data.order import SampleRngs
from megatron_vlmoe.data.samples import (
    ImagePart,
    ImageViews,
    PairOrder,
    PairPart,
    PixelPart,
    TextPart,
    TowerPart,
)
from megatron_vlmoe.data.sources import (
    OBJECTIVES,
    SPLITS,
    Sources,
    Split,
    enabled_objectives,
    open_sources,
)
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import num_micro_batches, text_mask_slots
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.tokenizers.text import TextTokenizer

Part = TextPart | ImagePart | PairPart | TowerPart


def open_text_tokenizer(data: DataConfig) -> TextTokenizer | None:
    """The text tokenizer; None if the run has neither texts nor pairs.

    Raises:
        ConfigError: it is needed and not set, or cannot be read.
    """
    users = [name for name in ("texts", "pairs") if getattr(data, f"micro_{name}") > 0]
    if not users:
        return None
    if not data.text_tokenizer:
        count = getattr(data, f"micro_{users[0]}")
        raise ConfigError(f"data.text_tokenizer is not set: data.micro_{users[0]}={count} needs it")
    try:
        return TextTokenizer(data.text_tokenizer)
    except ValueError as error:
        raise ConfigError(f"data.text_tokenizer: {error}") from error


@dataclass(frozen=True)
class VisualTargets:
    """Where visual codes come from.

    Args:
        num_codes: size of the visual vocabulary.
        tokenizer_size: side in pixels of the image tokenizer's view; None with stored codes.
        codes: for each objective and split, one reader per dataset; empty if computed from pixels.
        tokenizer: what computes codes from pixels; None with stored codes.
    """

    num_codes: int
    tokenizer_size: int | None
    codes: dict[tuple[str, Split], tuple[CodesReader, ...]]
    tokenizer: ImageTokenizer | None = None


def open_targets(
    config: RunConfig,
    sources: dict[tuple[str, Split], Sources],
    tokenizer: ImageTokenizer | None = None,
) -> VisualTargets | None:
    """Checks the image tokenizer and any stored codes; None if the run predicts no patches.

    Stored codes need no tokenizer; if one is given, they must be its own. One that is in memory already is not read
    again.

    Raises:
        ConfigError: no tokenizer, one of another grid, or `codes: stored` without codes.
        DataError: codes of another tokenizer.
    """
    data, grid = config.data, config.model.patch_grid
    visual = {key: value for key, value in sources.items() if key[0] != "texts"}
    if not visual or config.objectives.kind == "contrastive":
        return None
    prefixes = [item.prefix for value in visual.values() for item in value.items]
    # The manifest is written last: without it the codes were never finished.
    without = [p for p in prefixes if not Path(f"{codes_prefix(p)}.json").is_file()]
    if data.codes == "stored" and without:
        raise ConfigError(f"data.codes is stored, but {codes_prefix(without[0])}.json is missing")
    if tokenizer is None and data.image_tokenizer:
        try:
            tokenizer = ImageTokenizer.from_pretrained(
                data.image_tokenizer,
                dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[
                    data.image_tokenizer_precision
                ],
            )
        except ValueError as error:
            raise ConfigError(f"data.image_tokenizer: {error}") from error
    if tokenizer is not None and tokenizer.grid != grid:
        raise ConfigError(
            f"data.image_tokenizer {data.image_tokenizer}: {tokenizer.grid}x{tokenizer.grid} "
            f"codes, but model.image_size / model.patch_size gives {grid}x{grid} patches"
        )
    if data.codes == "compute" or without:
        if tokenizer is None:
            name = "images" if data.micro_images else "pairs"
            count = getattr(data, f"micro_{name}")
            raise ConfigError(
                f"data.image_tokenizer is not set: data.micro_{name}={count} needs it"
            )
        return VisualTargets(tokenizer.num_codes, tokenizer.image_size, {}, tokenizer)
    # Without a tokenizer the codes of all datasets must at least share one.
    fingerprint = tokenizer.fingerprint if tokenizer else None
    codes: dict[tuple[str, Split], tuple[CodesReader, ...]] = {}
    for key, value in visual.items():
        option = "flip_probability" if key[0] == "images" else "pair_flip_probability"
        readers = []
        for item in value.items:
            fingerprint = fingerprint or CodesReader(item.prefix).manifest.tokenizer_fingerprint
            reader = check_codes(item.prefix, fingerprint, item.manifest.documents, grid)
            if reader.manifest.flip_probability > 0 and getattr(data, option) == 0:
                raise ConfigError(
                    f"data.{option} is 0, but {codes_prefix(item.prefix)} has mirrored views "
                    f"(probability {reader.manifest.flip_probability}): encode them with "
                    "--flip-probability 0, or use data.codes compute"
                )
            readers.append(reader)
        codes[key] = tuple(readers)
    return VisualTargets(readers[0].manifest.num_codes, None, codes)


def resolve_sizes(
    config: RunConfig,
    vocab_size: int | None,
    num_codes: int | None,
    pair_sources: Sources | None,
) -> RunConfig:
    """Fills in the vocabulary sizes, the masked patches and, from the captions to train on, their slots.

    The sizes of tokenizers that the run does not have are None.

    Raises:
        ConfigError: a given size contradicts a tokenizer or the number of patches.
    """
    model, objectives = config.model, config.objectives
    for name, given, found in (
        ("vocab_size", model.vocab_size, vocab_size),
        ("visual_vocab_size", model.visual_vocab_size, num_codes),
    ):
        if given and found and given != found:
            raise ConfigError(f"model.{name}={given}, but the tokenizer has {found}")
    # 40 % of the patches, rounded down (paper section 3.1), in integers.
    masked = objectives.num_masked_patches or model.num_patches * 2 // 5
    if not 0 < masked <= model.num_patches:
        raise ConfigError(
            f"objectives.num_masked_patches={masked} is not in 1..{model.num_patches} patches"
        )
    slots = objectives.caption_mask_slots
    if slots == 0 and pair_sources is not None:
        # The share of the blend's largest 99th percentile length.
        known = [item.manifest.caption_lengths or {} for item in pair_sources.items]
        longest = max(lengths.get("p99", model.pair_text_length) for lengths in known)
        longest = min(longest, model.pair_text_length - 2)
        slots = max(1, math.ceil(objectives.caption_mask_fraction * longest))
    return replace(
        config,
        model=replace(
            model,
            vocab_size=model.vocab_size or vocab_size or 0,
            visual_vocab_size=model.visual_vocab_size or num_codes or 0,
        ),
        objectives=replace(objectives, num_masked_patches=masked, caption_mask_slots=slots),
    )


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

        An image tokenizer that is in memory already is not read again.

        Raises:
            ConfigError: options that are missing or contradict each other or the data.
            DataError: a dataset that is missing, damaged, or made with another tokenizer.
            ValueError: a tokenizer that cannot be read.
        """
        enabled = enabled_objectives(config.data)
        num_micro_batches(config, share.data_size)
        StreamLayout.of(config).shard(share.tensor_size)
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
        numbers, data = batch_numbers(first_micro_batch, num_micro_batches), self.config.data
        bytes_asked = batch_bytes(self.config, self._share) if split == "train" else 0
        dataset = self._dataset(split)
        return Loader(dataset, numbers, data.num_workers, data.prefetch, bytes_asked)

    def places(self, name: str, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Dataset, epoch, and sample or document of training samples that a segment holds, by their numbers."""
        parts = self._dataset("train").parts
        objective = name if name in parts else "pairs"
        part, items = parts[objective], self._sources[objective, "train"].items
        found = []
        for number in numbers:
            ref = part.order.locate(number)
            place = {"dataset": items[ref.dataset].prefix, "epoch": ref.epoch, "sample": ref.index}
            if isinstance(part, PairOrder):
                place["image"], place["caption"] = part.locate(ref)
            elif isinstance(part, ImagePart):
                place["image"] = part.first_documents[ref.dataset] + ref.index
            found.append(place)
        return found

    def check_files(self) -> None:
        """Compares the sizes of all files with their manifests. Raises DataError, naming one that has changed."""
        for sources in self._sources.values():
            for item in sources.items:
                check_dataset(item.prefix, item.manifest.kind)

    def summary(self) -> list[str]:
        """Lines for the log: documents, samples and epochs of every dataset, and derived sizes."""
        data, model, objectives = self.config.data, self.config.model, self.config.objectives
        lines = []
        towers = objectives.kind == "contrastive"
        if towers:
            negatives = data.micro_pairs * self._share.data_size
            lines.append(
                f"contrastive: captions of up to {model.pair_text_length - 2} tokens and their images are told from "
                f"the others of {negatives} pairs, vocabulary {model.vocab_size}"
            )
        if data.micro_texts:
            lines.append(
                f"texts: {text_mask_slots(self.config)} of {model.text_length - 2} tokens are "
                f"predicted, vocabulary {model.vocab_size}"
            )
        if data.micro_pairs and not towers:
            lines.append(
                f"captions: at most {objectives.caption_mask_slots} of up to "
                f"{model.pair_text_length - 2} tokens are predicted, vocabulary {model.vocab_size}"
            )
        if (data.micro_images or data.micro_pairs) and not towers:
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
                cut = reader.count_longer(config.model.pair_text_length - 2, range(begin, end))
                line += f", {cut / (end - begin):.2%} of the captions are cut"
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
        data, is_pairs = config.data, objective == "pairs"
        flip = data.pair_flip_probability if is_pairs else data.flip_probability
        readers = [item.reader("image") for item in sources.items]
        if targets is None:
            assert tokenizer is not None
            views = ImageViews(readers, None, data, flip, rngs)
            return TowerPart(config, sources, tokenizer, views, self._share)
        codes = targets.codes.get((objective, split))
        views = ImageViews(readers, codes, data, flip, rngs)
        pixels = PixelPart(config, views, targets.tokenizer_size, self._share)
        if not is_pairs:
            return ImagePart(sources, pixels)
        assert tokenizer is not None
        return PairPart(config, sources, tokenizer, pixels)
