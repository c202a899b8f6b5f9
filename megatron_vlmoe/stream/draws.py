"""Random numbers as pure functions of a key, so that no generator state needs to travel or be saved.

Router noise and stochastic depth are drawn for a whole micro-batch from (seed, step, micro-batch, layer,
purpose). Recomputed blocks, resumed runs and every parallel layout therefore see the same draws. With
`train.counter_draws` they come from `stream/counter_draws.py` instead, which has the same purposes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

# Fixed numbers: changing one changes every run.
PURPOSES = {
    "text_noise": 1,
    "vision_noise": 2,
    "vl_noise": 3,
    "shared_noise": 4,
    "attention_drop_path": 5,
    "ffn_drop_path": 6,
}


@dataclass(frozen=True)
class DrawKey:
    """Names one micro-batch of one step of a run.

    Args:
        micro_batch: number of the micro-batch counted over all steps and data-parallel ranks.
    """

    seed: int
    micro_batch: int

    def generator(self, layer_number: int, purpose: str, device: torch.device) -> torch.Generator:
        """A generator for one purpose in one block."""
        return keyed_generator(device, self.seed, self.micro_batch, layer_number, PURPOSES[purpose])


def keyed_generator(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator whose seed is a hash of the key: equal keys, equal numbers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)
    return generator
