"""Training steps in this process: what stops the host, equal bits, recomputed blocks, loss scale."""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from checks.report import Report, difference, identical, milliseconds
from checks.training import Training, training
from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_checkpoint
from megatron_vlmoe.train.checkpoint_files import TrainState, find_checkpoint
from megatron_vlmoe.train.step_graph import capture_cuda_graph

# Options under which a step takes other kernels.
VARIANTS = {
    "fixed_capacity": (),
    "k = 2, routed padding": ("--moe.topk", "2", "--moe.route_padding", "true"),
    "alltoall": ("--moe.dispatcher", "alltoall"),
    "dropless": ("--moe.dispatcher", "dropless"),
    "expert choice": ("--moe.routing", "expert_choice", "--moe.capacity_factor", "1"),
    "recompute": ("--train.recompute", "full"),
}
# Steps that a CUDA graph may hold.
GRAPHED = {
    "fixed_capacity": ("--moe.capacity_factor", "1.05", "--moe.topk", "2"),
    "balance bias": ("--moe.balance_bias_rate", "0.01"),
    "expert choice": ("--moe.routing", "expert_choice", "--moe.capacity_factor", "1"),
    "dense": ("--moe.modalities", "none", "--moe.layers", "[]"),
}
# A model whose host takes longer to start its operations than a GPU to carry them out.
LAUNCH_BOUND = """
--model.num_layers 12 --model.num_vl_layers 3 --model.hidden_size 384 --model.num_attention_heads 6
--model.ffn_hidden_size 1536 --moe.layers 2 4 6 8 --moe.capacity_factor 1.05 --moe.num_vision_experts 32
--moe.num_text_experts 32 --data.micro_texts 8 --data.micro_images 8 --data.micro_pairs 8
""".split()
# Of one step: the gradient norm. fp16 also reads whether anything overflowed, for dense parameters and for experts.
EXPECTED_WAITS = {"bf16": 1, "fp16": 3}


def _waits(work: Callable[[], object]) -> Counter[str]:
    """What stops the host for the GPU during some work, by the line that asked for it."""
    found: Counter[str] = Counter()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for warning in told:
        if "called a synchronizing" in str(warning.message):
            file = "/".join(warning.filename.split("/")[-3:])
            found[f"{file}:{warning.lineno}"] += 1
    return found


def syncs(report: Report) -> None:
    """`torch.cuda.set_sync_debug_mode` around the parts of a step after the first."""
    if report.on_gpu:
        # Whether waits are seen at all.
        seen = _waits(lambda: torch.ones(1, device="cuda").item())
        report.expect(sum(seen.values()) > 0, f"a read on the host counts as {dict(seen)}")
    else:
        report.left_out("set_sync_debug_mode: the steps ran, nothing was watched")
    for precision in EXPECTED_WAITS:
        # A step that overflows would end before the norm.
        words = ("--moe.capacity_factor", "1", "--optim.initial_loss_scale", "1")
        with training(*words, precision=precision) as run:
            run.train(report.size(2, 1))
            _watch_step(report, precision, run)


def _watch_step(report: Report, precision: str, run: Training) -> None:
    batches = run.batches()
    if not report.on_gpu:
        run.forward_backward(batches)
        report.expect(run.update()[0], f"{precision}: the step overflows")
        return
    found = _waits(lambda: run.forward_backward(batches))
    report.note(**{f"forward_backward_{precision}": dict(found)})
    report.expect(not found, f"{precision}: forward and backward wait: {dict(found)}")
    # The proof: above, a wait is only a warning, so that all of them are found.
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.forward_backward(batches)
    except RuntimeError as error:
        report.expect(False, f"{precision}: {str(error).splitlines()[0]}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    found = _waits(run.update)
    report.note(**{f"optimizer_{precision}": dict(found)})
    total, wanted = sum(found.values()), EXPECTED_WAITS[precision]
    report.expect(total == wanted, f"{precision}: the optimizer waits {total} times, not {wanted}")


def deterministic(report: Report) -> None:
    """The same bits twice, by every variant of the step; and across a resume."""
    steps, found = 3, {}
    for name, words in VARIANTS.items():
        results = []
        for _ in range(2):
            with training(*words, deterministic=True) as run:
                results.append((run.train(steps), run.weights()))
        (losses, weights), (others, other_weights) = results
        found[name] = losses
        report.expect(losses == others, f"{name}: losses {losses} and then {others}")
        same = identical(weights, other_weights)
        report.expect(same, f"{name}: weights differ after {steps} steps")
    report.note(losses=found)
    # As many runs as there are ways to compute must not all have done the same.
    report.expect(len({tuple(losses) for losses in found.values()}) > 2, f"all alike: {found}")
    _resume(report)
    if report.on_gpu:
        _cost(report)
    else:
        report.left_out("what deterministic kernels cost")


def _resume(report: Report) -> None:
    with training(deterministic=True) as run:
        run.train(2)
        writer = CheckpointWriter(report.folder / "checkpoints", 0, False)
        writer.save(TrainState(step=2), run.config, run.parts)
        losses, weights = run.train(2), run.weights()
    with training(deterministic=True) as run:
        path = find_checkpoint(report.folder)
        assert path is not None
        run.step = load_checkpoint(path, run.config, run.parts).step
        again, others = run.train(2), run.weights()
    report.note(resumed=again)
    report.expect(losses == again, f"unbroken {losses}, resumed {again}")
    report.expect(identical(weights, others), "weights differ after a resume")


def _cost(report: Report) -> None:
    """Milliseconds of forward and backward with and without deterministic kernels."""
    for name, wanted in (("deterministic_ms", True), ("default_ms", False)):
        with training("--moe.capacity_factor", "1", deterministic=wanted) as run:
            work = functools.partial(run.forward_backward, run.batches())
            report.note(**{name: milliseconds(work, 10)})


def step_graph(report: Report) -> None:
    """Steps as a CUDA graph and ordinary ones: the same bits, with an evaluation in between."""
    if not report.on_gpu:
        report.left_out(
            "the graph: its steps ran as functions, in the tensors that a graph would have"
        )
    for name in report.size(tuple(GRAPHED), ("fixed_capacity",)):
        words, results = GRAPHED[name], []
        for graph in (False, True):
            with _graphed(report, graph, *words, deterministic=True) as run:
                losses = run.train(5)
                run.runner.evaluate(iter(run.batches()), run.count, lambda batch, outputs: None)
                losses += run.train(report.size(3, 1))
                results.append((losses, run.weights()))
        (losses, weights), (others, other_weights) = results
        report.note(**{f"{name}_losses": losses})
        report.expect(losses == others, f"{name}: losses {losses} and of a graph {others}")
        same = identical(weights, other_weights)
        report.expect(same, f"{name}: weights differ after {len(losses)} steps")
        report.expect(len(set(losses)) == len(losses), f"{name}: steps repeat, {losses}")


def graph_times(report: Report) -> None:
    """Milliseconds of forward and backward with and without a graph, and the memory that torch took for them."""
    found = {}
    for graph in (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        with _graphed(report, graph, *LAUNCH_BOUND) as run:
            work = functools.partial(run.forward_backward, run.batches())
            # The graph is made in the fourth call.
            taken = milliseconds(work, repetitions=20, warmup=5)
            reserved = torch.cuda.max_memory_reserved() / 1e6
        found["graph" if graph else "ordinary"] = {"ms": taken, "reserved_mb": reserved}
    report.note(step_graph=found)


def _graphed(
    report: Report, graph: bool, *words: str, deterministic: bool = False
) -> AbstractContextManager[Training]:
    options = ("--train.counter_draws", "true", "--train.cuda_graph", str(graph).lower(), *words)
    capture = report.size(capture_cuda_graph, lambda work: work)
    return training(*options, deterministic=deterministic, capture=capture)


def recompute(report: Report) -> None:
    """Losses and gradients with and without `train.recompute`, in fp32 and bf16; and how fp16 finds its loss scale."""
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 1e-2)):
        results = {}
        for name in ("none", "full"):
            words = ("--train.recompute", name, "--moe.capacity_factor", "1")
            with training(*words, precision=precision, deterministic=True) as run:
                losses = run.forward_backward(run.batches())
                results[name] = ([own["total"] for own in losses], run.gradients())
        (losses, gradients), (others, other_gradients) = results["none"], results["full"]
        off = max(map(difference, other_gradients, gradients))
        same = identical([*losses, *gradients], [*others, *other_gradients])
        report.note(**{f"{precision}_same_bits": same, f"{precision}_off_by": off})
        loss_off = max(map(difference, others, losses))
        report.expect(
            loss_off <= tolerance, f"{precision}: recomputed losses are off by {loss_off:.2g}"
        )
        report.expect(off <= tolerance, f"{precision}: recomputed gradients are off by {off:.2g}")
        moved = any(bool(gradient.any()) for gradient in gradients)
        report.expect(moved, f"{precision}: all gradients are zero")
    _loss_scale(report)


def _loss_scale(report: Report) -> None:
    """A scale that is too large at first: it must fall until updates are taken, and then double again."""
    first, window = 2.0**34, 4
    words = [
        *("--optim.initial_loss_scale", str(first), "--optim.loss_scale_window", str(window)),
        *("--optim.hysteresis", "1", "--data.global_texts", "2"),
        *("--data.global_images", "2", "--data.global_pairs", "2"),
    ]
    scales, updates, losses = [], [], []
    with training(*words, precision="fp16") as run:
        for _ in range(report.size(48, 36)):
            results = run.forward_backward(run.batches())
            losses.append(sum(float(own["total"]) for own in results) / len(results))
            scales.append(float(run.parts.optimizer.get_loss_scale()))
            updates.append(run.update()[0])
    trace = [math.log2(scale) for scale in scales]
    report.note(log2_of_scale=trace, updates=[int(own) for own in updates], fp16_losses=losses)
    report.expect(all(map(math.isfinite, losses)), f"fp16 losses {losses}")
    report.expect(not updates[0], f"nothing overflows at a scale of 2^{trace[0]:.0f}")
    report.expect(any(updates), f"no update is taken, the scale ends at 2^{trace[-1]:.0f}")
    steps: Any = list(zip(trace, trace[1:], updates))
    halved = all(after == before - 1 for before, after, updated in steps if not updated)
    report.expect(halved, f"the scale does not halve after an overflow: {trace}")
    grown = any(after == before + 1 for before, after, _ in steps)
    report.expect(grown, f"the scale never doubles after {window} updates: {trace}")
