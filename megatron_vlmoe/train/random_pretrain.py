"""Pretraining on batches of random numbers, which needs no files: the command `pretrain-random`."""

from __future__ import annotations

import dataclasses
import runpy
import sys

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.train.pretrain import pretrain

# Stand in for what tokenizers and captions decide, where the options leave it open.
TEXT_VOCABULARY, VISUAL_VOCABULARY = 1000, 512


def open_random(config: RunConfig, share: BatchShare) -> RandomData:
    """Random data for a run, with vocabularies and numbers of masked slots filled in."""
    model, objectives = config.model, config.objectives
    slots = objectives.caption_mask_fraction * (model.pair_text_length - 2)
    model = dataclasses.replace(
        model,
        vocab_size=model.vocab_size or TEXT_VOCABULARY,
        visual_vocab_size=model.visual_vocab_size or VISUAL_VOCABULARY,
    )
    objectives = dataclasses.replace(
        objectives,
        num_masked_patches=objectives.num_masked_patches or int(0.4 * model.num_patches),
        caption_mask_slots=objectives.caption_mask_slots or max(1, int(slots)),
    )
    return RandomData(dataclasses.replace(config, model=model, objectives=objectives), share)


def pretrain_random(config: RunConfig) -> None:
    """Trains; `config` is checked by `validate`."""
    pretrain(config, open_random)


if __name__ == "__main__":
    # The former spelling of `vlmoe pretrain-random`.
    sys.argv.insert(1, "pretrain-random")
    runpy.run_module("megatron_vlmoe", run_name="__main__", alter_sys=True)
