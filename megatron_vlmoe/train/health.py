"""What a run does about a step whose gradients are not finite or far larger than usual: `HealthConfig`.

The decision falls between megatron-core's gradient norm, which is on the host already, and its update, so that it costs
no wait for the device. The batch of such a step is written down, for `vlmoe replay`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_vlmoe.config.schema import HealthConfig, TrainConfig
from megatron_vlmoe.moe.router import balance_biases
from megatron_vlmoe.runtime.distributed import agree
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.checkpoint_files import TrainState
from megatron_vlmoe.train.objective import BatchSource
from megatron_vlmoe.train.step import Losses

log = logging.getLogger("megatron_vlmoe")

HEALTH_FOLDER = "health"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Finding:
    """What is wrong with a step.

    Args:
        action: `stop`, `skip` or `rewind`.
        reason: with the gradient norm.
    """

    action: str
    reason: str


class HealthPolicy:
    """Judges gradient norms, and counts what has been done about them.

    Args:
        options: what is to be done.
        train: whether gradients that are not finite matter at all.
    """

    def __init__(self, options: HealthConfig, train: TrainConfig) -> None:
        self.options = options
        self.stop_on_nan = train.stop_on_nan
        self.rewinds: dict[int, int] = {}

    def judge(self, norm: float, state: TrainState) -> Optional[Finding]:
        """What is wrong with the next step of a run that stands at `state`; None if nothing is."""
        options, recent = self.options, state.recent_norms
        if not math.isfinite(norm):
            if not self.stop_on_nan:
                return None
            finding = Finding(options.on_nonfinite, f"the gradient norm is {norm}")
        else:
            if options.on_spike == "none" or len(recent) < options.spike_window:
                return None
            median = statistics.median(recent)
            if norm <= options.spike_factor * median:
                return None
            reason = (
                f"the gradient norm is {norm:.4g}, {norm / median:.3g} times the median of "
                f"{len(recent)} updates"
                if median > 0.0
                else f"the gradient norm is {norm:.4g} after {len(recent)} updates of 0"
            )
            finding = Finding(options.on_spike, reason)
        return self.bounded(finding, state)

    def bounded(self, finding: Finding, state: TrainState) -> Finding:
        """The finding, or one that ends the run after as many skipped steps as there may be."""
        most = self.options.max_skips
        if finding.action != "skip" or state.skips_in_a_row < most:
            return finding
        return Finding("stop", f"{finding.reason} after health.max_skips={most} skipped step(s)")

    def updated(self, norm: float, state: TrainState) -> TrainState:
        """The state with the norm of an update that was made."""
        state = dataclasses.replace(state, skips_in_a_row=0)
        if self.options.on_spike == "none" or not math.isfinite(norm):
            return state
        recent = (*state.recent_norms, norm)[-self.options.spike_window :]
        return dataclasses.replace(state, recent_norms=recent)

    def may_rewind(self, step: int) -> bool:
        """Counts going back to the checkpoint of a step; false once that has been done too often."""
        self.rewinds[step] = self.rewinds.get(step, 0) + 1
        return self.rewinds[step] <= self.options.max_rewinds


class GuardedOptimizer:
    """megatron-core's optimizer with a decision between the gradient norm and the update.

    An update that is refused leaves weights, moments, step counts and the bias of experts as they were.

    Args:
        optimizer: of this rank; its two methods are wrapped.
        options: biases are kept where they may have to be put back.
        modules: of this rank's model, among them gates with a bias.
    """

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        options: HealthConfig,
        modules: Sequence[torch.nn.Module],
    ) -> None:
        self.optimizer = optimizer
        skips = "skip" in (options.on_nonfinite, options.on_spike)
        self.biases = balance_biases(modules) if skips else []
        self.kept = [bias.clone() for bias in self.biases]
        self.norm: Optional[float] = None
        self._allows: Callable[[float], bool] = lambda norm: True
        self._measure, self._update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
        optimizer.get_grad_norm = self._measured
        optimizer.step_with_ready_grads = self._if_allowed

    def keep_biases(self) -> None:
        """Before the backward pass, at the end of which they change."""
        if self.biases:
            torch._foreach_copy_(self.kept, self.biases)

    def step(self, allows: Callable[[float], bool]) -> tuple[bool, Optional[float]]:
        """Whether the update was made, and the gradient norm; None where fp16 has overflowed.

        Args:
            allows: whether an update with this gradient norm is wanted; must be the same on all ranks.
        """
        self.norm, self._allows = None, allows
        updated, _, _ = self.optimizer.step()
        if self.norm is not None and not updated and self.biases:
            torch._foreach_copy_(self.biases, self.kept)
        return bool(updated), self.norm

    def _measured(self) -> float:
        self.norm = float(self._measure() or 0.0)
        return self.norm

    def _if_allowed(self) -> bool:
        assert self.norm is not None, "megatron-core updates without a gradient norm"
        return self._allows(self.norm) and bool(self._update())


def agreed(is_refused: bool, looks_for_spikes: bool) -> bool:
    """Whether a step is refused, on all ranks the same.

    A norm that is not finite is so on every rank. Without a distributed optimizer ranks may differ in its last digit,
    which may decide about a spike, so that they agree on it: on the host, which has just waited for the norm.
    """
    return agree(is_refused) if looks_for_spikes else is_refused


@dataclass
class StepBatch:
    """The micro-batches of the step in progress on this rank, by their numbers alone, and images that are missing.

    Args:
        replaced: segment and number of every sample whose image could not be decoded, of those that this rank decodes.
    """

    batches: list[Batch] = dataclasses.field(default_factory=list)
    replaced: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    def noted(self, batches: Iterator[Batch], ranks: Ranks) -> Iterator[Batch]:
        """Passes batches on, without what is only for the host."""
        for batch in batches:
            for name, segment in batch.items():
                if isinstance(segment, dict) and "replaced" in segment:
                    rows = segment.pop("replaced")
                    first = ranks.tensor * len(rows)
                    numbers = segment["sample_numbers"][first : first + len(rows)][rows]
                    self.replaced += [(name, number) for number in numbers.tolist()]
            self.batches.append(_numbers(batch))
            yield batch

    def record(self, losses: Sequence[Losses], ranks: Ranks, data: BatchSource) -> dict[str, Any]:
        """What this rank knows of the step: samples of every micro-batch, and the losses on the last stage."""
        values = [{name: float(loss) for name, loss in own.items()} for own in losses]
        found = []
        for number, batch in enumerate(self.batches):
            samples = {
                name: {"numbers": numbers.tolist(), "places": data.places(name, numbers.tolist())}
                for name, numbers in _samples(batch).items()
            }
            found.append(
                {
                    "micro_batch": int(batch.get("micro_batch", torch.tensor(-1))),
                    "samples": samples,
                    "losses": values[number] if number < len(values) else {},
                }
            )
        place = ("rank", "data", "tensor", "pipeline", "expert")
        return {**{name: getattr(ranks, name) for name in place}, "micro_batches": found}


def _numbers(batch: Batch) -> Batch:
    """A batch without anything that is large."""
    small: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            if "sample_numbers" in value:
                small[name] = {"sample_numbers": value["sample_numbers"]}
        elif name in ("micro_batch", "samples", "sample_numbers"):
            small[name] = value
    return small  # type: ignore[return-value]


def _samples(batch: Batch) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, Mapping):
            found[name] = value["sample_numbers"]
        elif name == "samples":
            found[name] = value  # type: ignore[assignment]
    return found


def gather_records(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all ranks; every rank must call it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, record)
    return gathered


def not_finite(records: Sequence[Mapping[str, Any]]) -> str:
    """Which losses are not finite, on which ranks and in which micro-batches; in words."""
    found = []
    for record in records:
        for batch in record["micro_batches"]:
            names = [name for name, value in batch["losses"].items() if not math.isfinite(value)]
            # The total follows from them.
            names = [name for name in names if name != "total"] or names
            if names:
                where = f"micro-batch {batch['micro_batch']} of rank {record['rank']}"
                found.append(f"{', '.join(names)} in {where}")
    listed = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    return f"not finite: {listed}" if found else "all losses are finite"


def write_event(
    folder: Path, step: int, finding: Finding, about: Mapping[str, Any], records: Sequence[Any]
) -> Path:
    """Writes RUN/health/step_N.json, which `vlmoe replay` reads.

    Args:
        folder: RUN.
        step: that was to be finished.
        about: what else is known of it.
        records: of all ranks.
    """
    target = folder / HEALTH_FOLDER / f"step_{step}.json"
    content = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "action": finding.action,
        "reason": finding.reason,
        **about,
        "ranks": records,
    }
    try:
        target.parent.mkdir(exist_ok=True)
        write_text_atomic(target, json.dumps(_as_json(content), indent=1) + "\n")
    except OSError as error:  # the step is what the run is about, not its record
        log.warning("%s: cannot be written (%s)", target, error.strerror)
    return target


def _as_json(value: Any) -> Any:
    """Numbers that are not finite, which JSON does not have, as words."""
    if isinstance(value, Mapping):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
