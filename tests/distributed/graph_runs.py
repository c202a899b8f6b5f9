"""Steps whose passes are called again where a GPU would replay a graph of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from helpers import Layout
from training_runs import Recorder, shards, start


class CalledAgain:
    """Stands for a CUDA graph: what it returns lies in the tensors of its first call, as what a graph computes.

    A graph would also find at the same places what it reads and adds to beside the batches: `places` are their
    addresses when it was made.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.calls = 0
        self.places: list[int] = []

    def capture(self, work: Any) -> Any:
        """As `capture_cuda_graph`: nothing is computed before the first replay."""
        self.places = self.addresses()
        results: list[dict[str, torch.Tensor]] = []

        def replay() -> list[dict[str, torch.Tensor]]:
            assert self.places == self.addresses(), (
                "a tensor that a graph reads or adds to has moved"
            )
            found = work()
            if not results:
                results.extend({k: v.clone() for k, v in own.items()} for own in found)
            for own, new in zip(results, found, strict=True):
                for name, value in new.items():
                    own[name].copy_(value)
            self.calls += 1
            return results

        return replay

    def addresses(self) -> list[int]:
        """Of the batches, the counters of routers, weights, buffers, and gradients."""
        runner, chunks = self.recorder.runner, self.recorder.parts.chunks
        found = [
            part
            for batch in runner.graph.batches
            for own in batch.values()
            for part in (own.values() if isinstance(own, dict) else [own])
        ]
        for chunk in chunks:
            for module in chunk.modules():
                totals = getattr(getattr(module, "recorder", None), "totals", {})
                found += totals.values()
            found += [*chunk.parameters(), *chunk.buffers()]
            found += [p.main_grad for p in chunk.parameters() if p.requires_grad]
        return [tensor.data_ptr() for tensor in found]


def steps_with_evaluations(
    where: Layout, arguments: tuple[str, ...], graph: bool
) -> dict[str, Any]:
    """Six steps, after the second and the fifth an evaluation: what they report, and how many were replayed."""
    from megatron_vlmoe.train.step import StepRunner

    config, ranks, parts, data = start(where, *arguments)
    recorder = Recorder((config, ranks, parts, data))
    again = CalledAgain(recorder)
    if graph:
        config = replace(config, train=replace(config.train, cuda_graph=True))
        recorder.runner = StepRunner(config, parts, ranks, again.capture)
    steps, evaluations = [], []
    for step in range(1, 7):
        steps.append(recorder.step())
        if step in (2, 5):
            evaluations.append(recorder.evaluate())
    return {
        "steps": steps,
        "evaluations": evaluations,
        "weights": shards(parts),
        "replays": again.calls,
    }
