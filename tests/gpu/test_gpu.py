"""What only a GPU can show: one step equals the CPU's, and 16-bit training learns."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import Layout, Workers, small_config

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _losses(steps: int, *arguments: str, repeat_batch: bool = False) -> list[float]:
    """Total loss of every step of one process."""
    import os

    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.data.random_batches import RandomData
    from megatron_vlmoe.runtime.distributed import destroy, initialize, resolve_precision
    from megatron_vlmoe.train.pretrain import MaskedObjective
    from megatron_vlmoe.train.step import StepRunner

    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    config = small_config(*arguments, where=Layout(1))
    ranks = initialize(config.parallel, config.train.seed)
    from megatron_vlmoe.train.setup import build_training

    try:
        parts = build_training(config, resolve_precision(config.train))
        runner, objective = StepRunner(config, parts, ranks), MaskedObjective(config, ranks)
        data = RandomData(config, BatchShare())
        losses = []
        for step in range(steps):
            batches: Any = data.loader("train", 0 if repeat_batch else 4 * step, None)
            runner.start_step()
            results = runner.train(iter(batches), 4, objective)
            losses.append(sum(float(result["total"]) for result in results) / len(results))
            updated, _, _ = parts.optimizer.step()
            if updated:
                parts.scheduler.step(increment=1)
        return losses
    finally:
        destroy()


@pytest.mark.process
def test_first_loss_equals_the_cpu() -> None:
    """Without noise and stochastic depth, whose generators differ between devices."""
    options = ("--moe.noise_std", "0", "--model.drop_path", "0", "--train.precision", "fp32")
    torch.backends.cuda.matmul.allow_tf32 = False
    # The processes of this pool see no GPU.
    workers = Workers(1)
    try:
        expected = workers.run(1, _losses, 2, *options)[0]
    finally:
        workers.close()
    assert _losses(2, *options) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_training_falls(precision: str) -> None:
    options = ("--train.precision", precision, "--train.steps", "40")
    losses = _losses(40, *options, repeat_batch=True)
    assert losses[-1] < 0.8 * losses[0]
