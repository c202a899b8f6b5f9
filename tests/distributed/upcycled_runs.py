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


def start_from(where: Layout, arguments: tuple[str, ...], folder: str) -> list[str]:
    """Takes weights for another run, as fine-tuning does; what is warned of."""
    import logging
    from unittest import mock

    from megatron_vlmoe.train.checkpoint_files import find_checkpoint
    from megatron_vlmoe.train.resume import CheckpointWeights, warm_start

    config, _, parts, _ = start(where, *arguments)
    path = find_checkpoint(folder)
    assert path is not None
    with mock.patch.object(logging.getLogger("megatron_vlmoe"), "warning") as warning:
        warm_start(CheckpointWeights(path), config, parts, with_heads=True)
    return [call.args[0] % call.args[1:] for call in warning.call_args_list]
