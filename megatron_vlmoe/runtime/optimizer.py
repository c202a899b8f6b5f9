"""AdamW and the gradient norm for machines without TransformerEngine and apex, where megatron-core falls short.

It falls back to torch's AdamW, which keeps `step` per parameter; its distributed checkpoints then fail to load
(KeyError 'step'). TransformerEngine's and apex's FusedAdam keep the step in the group, and so does this one. The
update is torch's fused kernel, which runs on CPU and CUDA.

For the norm it falls back to `torch.tensor` over the norms of all gradients, which copies every one of them to the host
by itself: hundreds of synchronizations in every step. For clipping it falls back to a product and a copy per tensor,
which pass twice over all gradients and allocate them anew: with 32 experts, half of the optimizer's time on a CPU.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional, Sequence

import torch
from megatron.core import optimizer as chooser
from megatron.core import utils
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from torch import Tensor


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam with FusedAdam's state layout (`exp_avg`, `exp_avg_sq`, group `step`).

    Of FusedAdam's options, some are without meaning here (`capturable`, `master_weights`, ...).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **unused: Any,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], float]] = None) -> None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
            # The kernel reads each tensor's own step count and expects it not yet advanced twice.
            # Filled on the device: a number copied there would wait for all work before it.
            device = parameters[0].device
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=device)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                [step] * len(parameters),
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def l2_norm(
    chunk_size: int, no_op: Tensor, tensor_lists: Sequence[Sequence[Tensor]], *unused: Any
) -> tuple[Tensor, None]:
    """Norm ``[1]`` of all tensors together, which are of one dtype, on their device.

    The signature is megatron-core's, after apex; only `tensor_lists` has a meaning here.
    """
    norms = torch._foreach_norm([tensor for tensors in tensor_lists for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float32).reshape(1), None


def scale(
    chunk_size: int, no_op: Tensor, tensor_lists: Sequence[Sequence[Tensor]], factor: float
) -> None:
    """Multiplies tensors in place; the two lists, sources and targets, are the same where megatron-core clips.

    The signature is megatron-core's, after apex.
    """
    sources, targets = (list(tensors) for tensors in tensor_lists)
    if any(source is not target for source, target in zip(sources, targets, strict=True)):
        torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, factor)


def install_fallbacks(on_cpu: bool = False) -> None:
    """Puts `GroupStepAdamW`, `l2_norm` and `scale` where megatron-core fell back; TransformerEngine's and apex's stay.

    Args:
        on_cpu: whether the run computes on the CPU: then they are put there in any case, and torch's SGD, since what
            installed packages have needs a GPU.

    Raises:
        RuntimeError: if megatron-core's modules do not have the expected names.
    """
    for module, name in (
        (chooser, "Adam"),
        (chooser, "SGD"),
        (chooser, "USING_PYTORCH_OPTIMIZER"),
        (distrib_optimizer, "HAVE_APEX_OR_TE"),
        (distrib_optimizer, "USING_TE_OPTIMIZER"),
        (utils, "local_multi_tensor_l2_norm"),
        (utils, "local_multi_tensor_scale"),
        (clip_grads, "l2_norm_impl"),
        (clip_grads, "multi_tensor_scale_impl"),
        (mixed_precision, "multi_tensor_scale_impl"),
    ):
        if not hasattr(module, name):
            raise RuntimeError(
                f"megatron-core's {module.__name__} has no {name}; 0.16.1 or 0.19.2 is needed"
            )
    if on_cpu or chooser.USING_PYTORCH_OPTIMIZER:
        chooser.Adam = distrib_optimizer.Adam = GroupStepAdamW
        chooser.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_TE_OPTIMIZER = True
    if on_cpu:
        chooser.SGD = torch.optim.SGD
        # It multiplies by 1 to copy weights in fp32 to those of the model and back.
        mixed_precision.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    if on_cpu or clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm
    if on_cpu or clip_grads.multi_tensor_scale_impl is utils.local_multi_tensor_scale:
        clip_grads.multi_tensor_scale_impl = scale
