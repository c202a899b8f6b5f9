"""What the processes of the upcycling tests do: evaluate a checkpoint and keep what leaves the last block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers import Layout
from training_runs import Recorder, start


def evaluate_checkpoint(where: Layout, arguments: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Loads weights; the held-out losses, and the hidden states ``[T, 1, D]`` of every evaluated micro-batch."""
    from megatron_vlmoe.train.checkpoint import load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import find_checkpoint

    recorder = Recorder(start(where, *arguments))
    path = find_checkpoint(folder)
    assert path is not None
    load_checkpoint(path, recorder.config, recorder.parts, with_optimizer=False)
    hidden: list[torch.Tensor] = []
    norm = recorder.parts.chunks[0].decoder.final_layernorm
    norm.register_forward_hook(lambda module, inputs, output: hidden.append(output.detach()))
    return {
        "evaluation": recorder.evaluate(),
        "hidden": np.stack([part.float().numpy() for part in hidden]),
    }
