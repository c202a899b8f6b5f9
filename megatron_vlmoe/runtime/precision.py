"""Which number format a run computes in."""

from __future__ import annotations

import torch

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, TrainConfig


def resolve_precision(train: TrainConfig) -> Precision:
    """The precision of this machine.

    Raises:
        ConfigError: if the device cannot compute in the requested format.
    """
    if not torch.cuda.is_available():
        if train.precision == "fp16":
            raise ConfigError("train.precision=fp16 needs a GPU; use fp32 or bf16 on CPU")
        return "fp32" if train.precision == "auto" else train.precision
    bf16 = torch.cuda.get_device_capability()[0] >= 8
    if train.precision == "bf16" and not bf16:
        raise ConfigError(
            "train.precision=bf16 needs a GPU of compute capability 8.0; use fp16 here"
        )
    if train.precision == "auto":
        return "bf16" if bf16 else "fp16"
    return train.precision
