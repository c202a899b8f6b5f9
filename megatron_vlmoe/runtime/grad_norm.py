"""The gradient norm without a wait for the device per parameter, where TransformerEngine and apex are missing.

megatron-core 0.16.1 falls back there to `torch.tensor` over the norms of all gradients, which copies every one of them
to the host by itself: hundreds of synchronizations in every step.
"""

from __future__ import annotations

from typing import Any, Sequence

import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from torch import Tensor


def l2_norm(
    chunk_size: int, no_op: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *unused: Any
) -> tuple[Tensor, None]:
    """Norm ``[1]`` of all tensors together, on their device (megatron-core's signature, after apex).

    Args:
        chunk_size: without meaning here, as is `no_op`.
        no_op: flag of apex.
        tensor_lists: at least one tensor; all of one dtype on one device.
        *unused: further options of apex.
    """
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float32).reshape(1), None


def install_grad_norm() -> None:
    """Puts :func:`l2_norm` where megatron-core fell back to its own; TransformerEngine's and apex's stay.

    Raises:
        RuntimeError: if megatron-core has no such fallback.
    """
    for module, name in ((utils, "local_multi_tensor_l2_norm"), (clip_grads, "l2_norm_impl")):
        if not hasattr(module, name):
            raise RuntimeError(f"megatron-core's {module.__name__} has no {name}; 0.16.1 is needed")
    if clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
