"""Steps with TransformerEngine's layers beside steps with local ones, on the same weights and batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from checks.report import NotRun, Report, difference
from checks.training import Training, training
from megatron_vlmoe.model.implementation import FP8_CAPABILITY, transformer_engine_problem
from megatron_vlmoe.train.setup import checkpoint_metadata

ENGINE = ("--model.transformer_impl", "transformer_engine")
# Both have their loss within this of fp32, of its own size, and their gradients within this of the largest entry.
TOLERANCE = 5e-2
VARIANTS: dict[str, tuple[str, ...]] = {
    "documents and pairs": ("--data.reset_attention", "true"),
    "torch's attention": ("--model.attention_backend", "sdpa"),
    "recompute": ("--train.recompute", "full"),
}
FITTING = """
--model.text_length 32 --model.pair_text_length 32 --moe.capacity_multiple_of 32 --data.micro_texts 32
--data.micro_images 32 --data.micro_pairs 32 --data.global_texts 32 --data.global_images 32 --data.global_pairs 32
""".split()


def transformer_engine(report: Report) -> None:
    """Losses and gradients of a step against local layers in fp32, the first weights, and FP8 beside bf16."""
    if problem := transformer_engine_problem():
        raise NotRun(problem)
    for name, words in VARIANTS.items():
        with training(*words, precision="fp32") as run:
            exact, start, gradients = _step(run)
        found: dict[str, Any] = {}
        for kind, more in (("local", ()), ("transformer_engine", ENGINE)):
            with training(*words, *more) as run:
                loss, weights, own = _step(run)
                moved = run.train(3)
            off = max(difference(own[key], value) for key, value in gradients.items())
            found[kind] = {"loss": loss, "gradients_off_by": off, "later": moved}
            where = f"{name}, {kind}"
            report.expect(own.keys() == gradients.keys(), f"{where}: other parameters")
            report.expect(abs(loss - exact) < TOLERANCE * exact, f"{where}: loss {loss}, {exact}")
            report.expect(off < TOLERANCE, f"{where}: gradients are off by {off:.2g}")
            report.expect(all(map(math.isfinite, moved)), f"{where}: losses {moved}")
            same = all(torch.equal(weights[key], start[key].to(weights[key])) for key in start)
            report.expect(same, f"{where}: other first weights")
        report.note(**{name: found})
    _fp8(report)


def _fp8(report: Report) -> None:
    """Three steps by every recipe that this GPU has."""
    with training(*FITTING) as run:
        expected = run.train(3)
    losses: dict[str, list[float]] = {"bf16": expected}
    for recipe, least in FP8_CAPABILITY.items():
        if torch.cuda.get_device_capability() < least:
            report.left_out(f"{recipe}: needs compute capability {least}")
            continue
        with training(*FITTING, *ENGINE, "--train.fp8", recipe) as run:
            losses[recipe] = run.train(3)
        close = all(abs(a - b) < TOLERANCE * b for a, b in zip(losses[recipe], expected))
        report.expect(close, f"{recipe}: losses {losses[recipe]}, in bf16 {expected}")
    report.note(fp8=losses)


def _step(run: Training) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """Mean loss of forward and backward, weights before, and gradients, both by checkpoint key."""
    entries = [
        entry
        for chunk in run.parts.chunks
        for entry in chunk.sharded_state_dict(metadata=checkpoint_metadata()).values()
        if isinstance(entry, ShardedTensor) and entry.data.requires_grad
    ]
    weights = {entry.key: entry.data.detach().clone() for entry in entries}
    results = run.forward_backward(run.batches())
    parameters = {p.data_ptr(): p for chunk in run.parts.chunks for p in chunk.parameters()}
    gradients = {
        entry.key: parameters[entry.data.data_ptr()].main_grad.clone() for entry in entries
    }
    return sum(float(own["total"]) for own in results) / len(results), weights, gradients
