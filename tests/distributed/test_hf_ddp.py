"""Exported models train under DistributedDataParallel, which waits for the gradient of every parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Workers
from hf_models import EVERYWHERE, HEADS, build, task_inputs

pytest.importorskip("transformers")


SETS: dict[str, dict[str, Any]] = {
    "dense": {"moe_layers": []},
    "experts": EVERYWHERE,
    "one expert": {"moe_layers": [1, 3], "moe_vl": True, "num_vl_experts": 4},
}
# What the batches of `task_inputs` are for the classes that read several kinds.
READ = {name: ("pairs",) for name in HEADS if "Masked" in name or "PreTraining" in name}


def train() -> dict[tuple[str, str], tuple[list[str], float, float]]:
    """Two steps of every class, without a search for unused parameters.

    Returns:
        Parameters without a gradient, the sum of all gradients, and that of the experts which no token went to.
    """
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    found = {}
    for kind, options in SETS.items():
        for name in HEADS if kind != "one expert" else ["VLMoEForPreTraining"]:
            model = build(name, **options).train()
            model.freeze_unreached(*READ.get(name, ()))
            if kind == "one expert":
                # All gates are equal: every token goes to the first.
                for key, value in model.named_parameters():
                    if ".router." in key:
                        value.data.zero_()
            ddp = torch.nn.parallel.DistributedDataParallel(model)
            batch = task_inputs(name, seed=rank)
            for _ in range(2):
                # Before the second, DDP looks whether the first has come to an end.
                model.zero_grad()
                ddp(**batch).loss.backward()
            trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
            missing = [key for key, value in trained.items() if value.grad is None]
            idle = [value.grad[1:] for key, value in trained.items() if ".experts." in key]
            found[kind, name] = (
                missing,
                sum(float(value.grad.abs().sum()) for value in trained.values()),
                sum(float(gradient.abs().sum()) for gradient in idle),
            )
    return found


def test_every_parameter_that_is_not_frozen_gets_a_gradient(workers: Workers) -> None:
    first, second = workers.run(2, train)
    assert first == second and len(first) == 2 * len(HEADS) + 1
    for (kind, _), (missing, total, idle) in first.items():
        assert not missing and total > 0.0
        assert (idle > 0.0) == (kind == "experts")
