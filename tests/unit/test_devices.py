"""A whole training step on a stand-in for a GPU: nothing mixes devices, and nothing but the norm stops the host."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import Layout, Workers, layout, small_config
from prepared_tasks import Prepared

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

# The batch goes to the device, and the update waits for the gradient norm.
BATCH = "copy: megatron_vlmoe/train/step.py move"
NORM = "read: megatron/core/optimizer/clip_grads.py get_grad_norm_fp32"
SIMILARITY = "copy: megatron_vlmoe/losses/tasks.py hard_negatives"
DRAWN = "copy: megatron_vlmoe/finetune/retrieval.py _draw"
# What the draws of every micro-batch have in common, once in a run.
STATES = "copy: megatron_vlmoe/stream/counter_draws.py __init__"
OVERFLOW = "read: megatron/core/optimizer/optimizer.py _unscale_main_grads_and_check_for_nan"


def _check(parts: Any, results: list[dict[str, Any]], waits: dict[str, int]) -> dict[str, int]:
    """Losses and gradients are on the device, in single precision; what stopped the host."""
    import torch
    from device_stand_in import DEVICE

    gradients = [p.main_grad for p in parts.chunks[0].parameters() if p.requires_grad]
    values = [value for result in results for value in result.values()]
    assert values and gradients
    for value in (*values, *gradients):
        assert value.device == DEVICE and value.dtype == torch.float32
    return dict(waits)


def _pretrain(where: Layout, precision: Any, *arguments: str) -> dict[str, int]:
    """One step of pretraining; what stopped the host."""
    from device_stand_in import StandIn

    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.data.random_batches import RandomData
    from megatron_vlmoe.train.pretrain import pretraining_objective
    from megatron_vlmoe.train.step import StepRunner

    stand_in, config = StandIn(where), small_config(*arguments, where=where)
    ranks = stand_in.ranks(config)
    batches = list(RandomData(config, BatchShare.of(ranks)).loader("train", 0, 2))
    parts = stand_in.training(config, precision)
    runner: Any = StepRunner(config, parts, ranks)
    objective: Any = pretraining_objective(config, ranks)
    with stand_in.mode, stand_in.watch:
        stand_in.watch.waits.clear()
        runner.start_step()
        results = runner.train(stand_in.batches(batches), 2, objective)
        parts.optimizer.step()
        return _check(parts, results, stand_in.watch.waits)


def _finetune(task: str, prefix: str, tokenizer: str, *arguments: str) -> dict[str, int]:
    """One step of a task; what stopped the host."""
    import torch
    from device_stand_in import StandIn
    from finetune_runs import task_config

    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.finetune.data import TaskData
    from megatron_vlmoe.finetune.retrieval import CachedGradients, Negatives, StepCache, _Pool
    from megatron_vlmoe.finetune.run import build_objective
    from megatron_vlmoe.model.task_heads import build_task_heads
    from megatron_vlmoe.train.step import StepRunner

    where = Layout(1)
    stand_in, config = StandIn(where), task_config(task, prefix, tokenizer, where, *arguments)
    ranks = stand_in.ranks(config)
    data = TaskData.open(config, BatchShare.of(ranks))
    loader = iter(data.loader("train", 0, None))
    batches = [next(loader) for _ in range(2)]
    config = data.config
    parts = stand_in.training(config, "bf16", build_task_heads)
    runner: Any = StepRunner(config, parts, ranks)
    objective: Any = build_objective(config, ranks, data)
    paired = batches
    if task == "retrieval":
        rows = torch.arange(config.task.micro_batch_size)
        negatives = Negatives(rows, rows, rows >= 0)
        paired = [objective._with_pairs(batch, negatives) for batch in batches]
    with stand_in.mode, stand_in.watch:
        stand_in.watch.waits.clear()
        runner.start_step()
        if task != "retrieval":
            results = runner.train(stand_in.batches(paired), 2, objective)
        else:
            # The step itself, without the decoding of what was drawn.
            pools = objective._features(runner, list(stand_in.batches(batches)))
            whole = _Pool.join(pools)
            cache = CachedGradients.compute(whole.images, whole.texts, whole.logit_scale)
            for pool in pools:
                objective._draw(0, pool, whole)

            objective._cache = StepCache(cache, {0: 0, 1: 1})
            step: Any = SimpleNamespace(
                prepare_step=lambda runner, batches: batches,
                prepare=objective.prepare,
                loss=objective.loss,
            )
            results = runner.train(stand_in.batches(paired), 2, step)
        parts.optimizer.step()
        return _check(parts, results, stand_in.watch.waits)


@pytest.mark.process
@pytest.mark.parametrize(
    ("where", "precision", "arguments", "reads"),
    [
        (Layout(1), "bf16", (), {NORM: 1}),
        (
            layout(2, tp=2),
            "fp16",
            (
                *("--train.recompute", "full", "--moe.capacity_factor", "1"),
                *("--moe.balance_bias_rate", "0.01"),
            ),
            # Dense parameters and experts have an optimizer each.
            {NORM: 1, OVERFLOW: 2},
        ),
        (
            layout(2),
            "bf16",
            (
                *("--objectives.kind", "contrastive", "--data.micro_texts", "0"),
                *("--data.micro_images", "0", "--moe.routing", "expert_choice"),
            ),
            {NORM: 1},
        ),
        (
            layout(2, tp=2),
            "bf16",
            ("--model.attention_backend", "varlen", "--data.reset_attention", "true"),
            {NORM: 1},
        ),
        (layout(2, tp=2), "bf16", ("--train.counter_draws", "true"), {NORM: 1, STATES: 4}),
        # A chunk of both pools, and one of a single pool.
        (layout(2, ep=2), "bf16", ("--moe.topk", "2", "--moe.all_to_all_chunks", "2"), {NORM: 1}),
    ],
    ids=[
        *("bf16", "fp16-recompute-tp2-bias", "contrastive-expert-choice-dp2"),
        *("varlen-packed-tp2", "counter-draws", "chunks-ep2"),
    ],
)
def test_a_step_of_pretraining_waits_for_the_norm_alone(
    where: Layout, precision: str, arguments: tuple[str, ...], reads: dict[str, int]
) -> None:
    (waits,) = Workers(1).run(1, _pretrain, where, precision, *arguments)
    assert waits.pop(BATCH) > 0
    assert waits == reads


@pytest.mark.process
@pytest.mark.parametrize("task", ["vqa", "nlvr2", "imagenet", "mnli", "retrieval"])
def test_a_step_of_a_task_waits_for_the_norm_alone(task: str, prepared: Prepared) -> None:
    """Hard negatives of retrieval are drawn on the host, twice for each of the two micro-batches."""
    options = ("--optim.optimizer", "adam", "--optim.layer_decay", "0.9")
    arguments = (task, prepared.prefix(task), prepared.tokenizer, *options)
    (waits,) = Workers(1).run(1, _finetune, *arguments)
    assert waits.pop(BATCH) > 0
    # Similarities and which images are the same go to the host; what was drawn, and whether, comes back.
    draws = {SIMILARITY: 4 * 2, DRAWN: 2 * 3} if task == "retrieval" else {}
    assert waits == {NORM: 1, **draws}


def _capture(where: Layout, *arguments: str) -> tuple[int, dict[str, int]]:
    """Four steps of pretraining with a graph: operations that would be recorded, and what would stop the host there."""
    from device_stand_in import StandIn

    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.data.random_batches import RandomData
    from megatron_vlmoe.train.pretrain import pretraining_objective
    from megatron_vlmoe.train.step import StepRunner

    stand_in, config = StandIn(where), small_config(*arguments, where=where)
    ranks = stand_in.ranks(config)
    batches = list(RandomData(config, BatchShare.of(ranks)).loader("train", 0, 2))
    parts = stand_in.training(config, "bf16")
    found: list[Any] = []

    def capture(work: Any) -> Any:
        watch = stand_in.watch
        waits, operations = watch.waits.copy(), watch.operations
        results = work()
        found.append((watch.operations - operations, dict(watch.waits - waits)))
        return lambda: results

    runner: Any = StepRunner(config, parts, ranks, capture)
    objective: Any = pretraining_objective(config, ranks)
    with stand_in.mode, stand_in.watch:
        for _ in range(4):
            runner.start_step()
            runner.train(stand_in.batches(batches), 2, objective)
            parts.optimizer.step()
    ((operations, waits),) = found
    return operations, waits


@pytest.mark.process
@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        (layout(2, ep=2), ("--moe.topk", "2", "--moe.balance_bias_rate", "0.01")),
        (
            layout(2, tp=2),
            (
                *("--objectives.kind", "contrastive", "--data.micro_texts", "0"),
                *("--data.micro_images", "0", "--moe.routing", "expert_choice"),
            ),
        ),
    ],
    ids=["masked-ep2", "contrastive-tp2"],
)
def test_nothing_in_a_graph_waits_or_copies(where: Layout, arguments: tuple[str, ...]) -> None:
    graph = ("--train.counter_draws", "true", "--train.cuda_graph", "true")
    ((operations, waits),) = Workers(1).run(1, _capture, where, *graph, *arguments)
    assert operations > 1000 and not waits


def _dispatched() -> dict[str, int]:
    """Two pools, to whose experts a transport has brought rows, and counts of them on the host; what stopped it."""
    import torch
    from device_stand_in import DEVICE, StandIn
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_vlmoe.moe.dispatch import TokenAllToAllDispatcher
    from megatron_vlmoe.moe.experts import PooledExperts
    from megatron_vlmoe.moe.router import PoolRouting
    from megatron_vlmoe.stream.block_plan import Branch

    stand_in, pools = StandIn(Layout(1)), (Branch("text", (), 4), Branch("vision", (), 4))
    two: Any = SimpleNamespace(size=lambda: 2, rank=lambda: 0)
    groups: Any = SimpleNamespace(ep=two, expt_dp=two)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=8,
        moe_ffn_hidden_size=32,
        params_dtype=torch.bfloat16,
    )

    def same(*values: Any) -> Any:
        return values[0] if len(values) == 1 else (values[0], values[-1])

    with torch.device(DEVICE), stand_in.mode:
        experts = PooledExperts(4, config, groups, pools)
        inputs = [torch.empty(6, 16, dtype=torch.bfloat16, requires_grad=True) for _ in pools]
        expert, gate = torch.empty(6, 1, dtype=torch.int64), torch.empty(6, 1)
        gates, kept = torch.empty(12), torch.empty(6, 1, dtype=torch.bool)
        counts: Any = torch.empty(4, dtype=torch.int64, device="cpu")
        # The host knows what they hold; tensors of the stand-in hold nothing.
        counts.tolist = lambda: [3, 0, 4, 5]
        transport: Any = SimpleNamespace(
            dispatch_preprocess=lambda rows, chosen, probs: (rows.squeeze(1), gates),
            token_dispatch=same,
            dispatch_postprocess=lambda rows, probs: (rows, counts, probs),
            combine_preprocess=same,
            token_combine=same,
            combine_postprocess=lambda rows: rows.unsqueeze(1),
        )
        dispatch = TokenAllToAllDispatcher(transport, pools, 2)
        routings = [PoolRouting(pool, gate, expert, kept, 0, None) for pool in pools]
        with stand_in.watch:
            outputs = dispatch(inputs, routings, experts)
            torch.cat(outputs).sum().backward()
        assert all(value.grad is not None and value.grad.device == DEVICE for value in inputs)
    return dict(stand_in.watch.waits)


@pytest.mark.process
def test_counts_of_rows_go_to_the_device_once_for_all_pools() -> None:
    (waits,) = Workers(1).run(1, _dispatched)
    assert waits == {"copy: megatron_vlmoe/moe/dispatch.py __call__": 1}


def test_the_norm_is_that_of_all_gradients_together() -> None:
    torch = pytest.importorskip("torch")
    from megatron_vlmoe.runtime.optimizer import l2_norm

    gradients = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0], [84.0]])]
    norm, _ = l2_norm(0, torch.zeros(1), [gradients], False)
    assert norm.tolist() == [85.0]


def test_clipping_scales_gradients_in_place() -> None:
    torch = pytest.importorskip("torch")
    from megatron_vlmoe.runtime.optimizer import scale

    gradients = [torch.tensor([3.0, -4.0]), torch.tensor([[12.0], [84.0]])]
    memory = [gradient.data_ptr() for gradient in gradients]
    scale(0, torch.zeros(1), [gradients, gradients], 0.5)
    assert [gradient.flatten().tolist() for gradient in gradients] == [[1.5, -2.0], [6.0, 42.0]]
    assert [gradient.data_ptr() for gradient in gradients] == memory
    copies = [torch.zeros(2), torch.zeros(2, 1)]
    scale(0, torch.zeros(1), [gradients, copies], 2.0)
    assert copies[1].tolist() == [[12.0], [84.0]] and gradients[0].tolist() == [1.5, -2.0]
