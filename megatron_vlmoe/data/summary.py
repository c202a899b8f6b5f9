"""What a pretraining run will read, in lines for the log."""

from __future__ import annotations

import numpy as np

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.order import BlendedOrder
from megatron_vlmoe.data.sources import Source, Sources, Split


def text_mask_slots(config: RunConfig) -> int:
    """Predicted tokens of a packed text: the rounded share of its length - 2 words."""
    words = config.model.text_length - 2
    return int(config.objectives.text_mask_fraction * words + 0.5)


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
            length = config.model.pair_text_length
            line += f", {truncated_share(item, length - 2):.2%} of the captions are cut"
        lines.append(line)
    return lines


def truncated_share(pairs: Source, longest: int) -> float:
    """Share of the captions that have more than ``longest`` tokens."""
    reader = pairs.reader("text")
    first = reader.document_indices
    begin, end = int(first[pairs.documents.start]), int(first[pairs.documents.stop])
    return float(np.mean(reader.sequence_lengths[begin:end] > longest))
