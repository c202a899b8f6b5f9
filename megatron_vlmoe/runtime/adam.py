"""AdamW whose step count lives in the parameter group, for machines without TransformerEngine and apex.

megatron-core 0.16.1 falls back to torch's AdamW there, which keeps `step` per parameter; its distributed
checkpoints then fail to load (KeyError 'step'). TransformerEngine's and apex's FusedAdam keep the step in the
group, and so does this one. The update is torch's fused kernel, which runs on CPU and CUDA.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

import torch
from megatron.core import optimizer as chooser
from megatron.core.optimizer import distrib_optimizer


class GroupStepAdamW(torch.optim.Optimizer):
    """Decoupled-weight-decay Adam with FusedAdam's state layout (`exp_avg`, `exp_avg_sq`, group `step`).

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: denominator term.
        weight_decay: decoupled weight decay.
        **unused: options of FusedAdam without meaning here (`capturable`, `master_weights`, ...).
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
            device = parameters[0].device
            # The kernel reads each tensor's own step count and expects it not yet advanced twice.
            # Filled on the device: a number copied there would wait for all work before it.
            step = torch.full((), float(group["step"]), dtype=torch.float32, device=device)
            steps = [step] * len(parameters)
            torch._fused_adamw_(
                parameters,
                [p.grad for p in parameters],
                [self.state[p]["exp_avg"] for p in parameters],
                [self.state[p]["exp_avg_sq"] for p in parameters],
                [],
                steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def install_adam() -> str:
    """Makes megatron-core use :class:`GroupStepAdamW` where it would fall back to torch's AdamW.

    Returns:
        The name of the Adam that megatron-core uses afterwards.

    Raises:
        RuntimeError: if megatron-core's optimizer modules do not have the expected names.
    """
    for module, name in (
        (chooser, "Adam"),
        (chooser, "USING_PYTORCH_OPTIMIZER"),
        (distrib_optimizer, "HAVE_APEX_OR_TE"),
        (distrib_optimizer, "USING_TE_OPTIMIZER"),
    ):
        if not hasattr(module, name):
            raise RuntimeError(f"megatron-core's {module.__name__} has no {name}; 0.16.1 is needed")
    if not chooser.USING_PYTORCH_OPTIMIZER:
        return f"{chooser.Adam.__module__}.{chooser.Adam.__name__}"
    chooser.Adam = GroupStepAdamW
    chooser.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_TE_OPTIMIZER = True
    return "torch._fused_adamw_ (no transformer-engine, no apex)"
