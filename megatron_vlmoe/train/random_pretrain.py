"""The `pretrain` command on batches of random numbers: `python -m megatron_vlmoe.train.random_pretrain ...`.

Takes the options of `python -m megatron_vlmoe pretrain` and needs no files; for comparing layouts and for
trying a cluster out before the data is there.
"""

from __future__ import annotations

import dataclasses
import sys

from megatron_vlmoe.cli import configure_logging, run_guarded
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.train.pretrain import main

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


if __name__ == "__main__":
    configure_logging()
    sys.exit(run_guarded(lambda: main(sys.argv[1:], open_random)))
