"""The forward and backward passes of a training step as one CUDA graph, which the host starts with a single call.

megatron-core has such a graph, too (`megatron.core.full_cuda_graph`), which in 0.16.1 does not fit. It is an attribute
of its class, so that a second run in the process (a task with several seeds) would replay the graph of the first model.
It reads batches on a stream of its own without waiting for what makes them on the device. And it makes one graph of all
passes without gradients, of which there are several kinds here.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence, TypeVar, cast

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, TrainConfig
from megatron_vlmoe.stream.batch import Batch, map_values

Result = TypeVar("Result")
Work = Callable[[], Result]
Capture = Callable[[Work[Result]], Work[Result]]
"""From work on tensors that stay where they are to a function that repeats it, as it was, on what they hold then."""

WARM_UP_STEPS = 3
"""Steps before the graph: libraries choose kernels, communicators connect, counters and buffers are made."""


def check_cuda_graph(train: TrainConfig, precision: Precision) -> None:
    """Raises ConfigError where this machine cannot have the graph that `train.cuda_graph` asks for."""
    if not train.cuda_graph:
        return
    if not torch.cuda.is_available():
        raise ConfigError("train.cuda_graph=true needs a GPU: leave it off here")
    if precision == "fp16":
        raise ConfigError(
            "train.cuda_graph=true with train.precision=fp16: the graph would keep the first loss scale; use bf16"
        )


def capture_cuda_graph(work: Work[Result]) -> Work[Result]:
    """Records the kernels of some work, without running them, and returns a function that runs them.

    It returns the same tensors every time, whose content the next call replaces.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads, which pin batches and watch over NCCL, may go on calling CUDA.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = work()

    def replay() -> Result:
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def stream_of_hooks() -> Iterator[None]:
    """Makes what autograd keeps per parameter on a stream of its own: the default stream cannot be captured."""
    current, own = torch.cuda.current_stream(), torch.cuda.Stream()
    own.wait_stream(current)
    with torch.cuda.stream(own):
        yield
    current.wait_stream(own)


class StepGraph:
    """Runs the passes of a step on batches that always lie in the same tensors; from some step on as a graph.

    Args:
        capture: makes the graph.
    """

    def __init__(self, capture: Capture[Any] = capture_cuda_graph) -> None:
        self.capture = capture
        self.steps = 0
        self.batches: list[Batch] = []
        self.replay: Optional[Work[Any]] = None

    def run(self, batches: Iterable[Batch], passes: Callable[[Sequence[Batch]], Result]) -> Result:
        """What `passes` returns for the batches.

        Args:
            batches: of the step, on the device; their number, parts and sizes are the same in every step.
            passes: forward and backward, the same in every step. They see the batches without `micro_batch`, which the
                host could read once only.

        Returns:
            The same tensors as the last time, with new content, once there is a graph.

        Raises:
            ValueError: if a batch has other parts or sizes than in the first step.
        """
        for number, batch in enumerate(batches):
            if not self.steps:
                self.batches.append(map_values(_without_number(batch), torch.clone))
                continue
            targets, sources = _by_name(self.batches[number]), _by_name(batch)
            sizes, given = (
                {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
                for tensors in (targets, sources)
            )
            if given != sizes:
                other = dict(given.items() ^ sizes.items())
                raise ValueError(f"a step's batches differ from those of the graph in {other}")
            torch._foreach_copy_([targets[name] for name in sources], list(sources.values()))
        if self.replay is None and self.steps == WARM_UP_STEPS:
            self.replay = self.capture(lambda: passes(self.batches))
        self.steps += 1
        return passes(self.batches) if self.replay is None else self.replay()


def _without_number(batch: Batch) -> Batch:
    return cast(Batch, {name: part for name, part in batch.items() if name != "micro_batch"})


def _by_name(batch: Batch) -> dict[str, Tensor]:
    """Its tensors but the number, as `texts/ids`."""
    found: dict[str, Tensor] = {}
    for name, part in _without_number(batch).items():
        if isinstance(part, Mapping):
            found |= {f"{name}/{own}": value for own, value in part.items()}
        else:
            found[name] = cast(Tensor, part)
    return found
