"""The training loop: steps, logging, evaluation, checkpoints, clean exits."""

from __future__ import annotations

import dataclasses
import logging
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Mapping, Optional

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import TrainingError
from megatron_vlmoe.config.schema import Precision, RunConfig, TrainConfig
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    agree,
    from_rank_zero,
    is_rank_zero,
)
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.memory import settled_objects
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.checkpoint import CheckpointWriter
from megatron_vlmoe.train.checkpoint_files import (
    TrainState,
    checkpoint_root,
    is_complete,
    is_tracked,
    iteration_name,
)
from megatron_vlmoe.train.interval import IntervalSums
from megatron_vlmoe.train.metrics import (
    JsonlWriter,
    MetricsWriter,
    StepProfiler,
    TensorBoardWriter,
    Throughput,
    WandbWriter,
    collect,
    metrics_from_counters,
    progress_line,
)
from megatron_vlmoe.train.objective import BatchSource, Objective
from megatron_vlmoe.train.resume import resume
from megatron_vlmoe.train.run_log import begin_run_logs
from megatron_vlmoe.train.setup import TrainingParts
from megatron_vlmoe.train.step import StepRunner

log = logging.getLogger("megatron_vlmoe")


class Trainer:
    """Trains one model on one source of batches.

    Args:
        config: the run, with vocabulary sizes and data-derived numbers.
        parts: model chunks, optimizer and schedule.
        num_micro_batches: micro-batches of a step on each data-parallel rank.
        objective: what is trained and how it is judged.
        own: the checkpoint to go on from, where it is known already (`own_checkpoint`).
    """

    def __init__(
        self,
        config: RunConfig,
        parts: TrainingParts,
        ranks: Ranks,
        data: BatchSource,
        num_micro_batches: int,
        precision: Precision,
        objective: Objective,
        own: Optional[Path] = None,
    ) -> None:
        self.config = config
        self.own = own
        self.parts = parts
        self.ranks = ranks
        self.data = data
        self.num_micro_batches = num_micro_batches
        self.objective = objective
        self.runner = StepRunner(config, parts, ranks)
        self.state = TrainState()
        self.is_interrupted = False
        self.writer: Optional[CheckpointWriter] = None
        self.best: Optional[CheckpointWriter] = None
        self.outputs: list[MetricsWriter] = []
        self.sums = IntervalSums(config, parts.chunks, ("total", *objective.loss_names))
        self.throughput = Throughput(config, ranks, num_micro_batches, precision)

    def run(self) -> TrainState:
        """Trains to `train.steps` or to the first reason to stop; returns where it stopped."""
        self._start()
        watch = ExitWatch(self.config.train)
        profiler = StepProfiler(self.config, self.ranks.rank)
        try:
            with settled_objects():
                if self.state.step == 0:
                    if self.config.train.eval_steps > 0 and self.objective.evaluates_at_start:
                        self._write(0, self._evaluate())
                    if self.config.checkpoint.save_initial:
                        self._save()
                reason = self._loop(watch, profiler)
                self._save(is_last=True)
                if self.writer is not None:
                    self.writer.close()
            # Also by a signal that came while the last checkpoint was written.
            self.is_interrupted = watch.is_asked()
        finally:
            watch.close()
            profiler.close()
            for output in self.outputs:
                output.close()
        log.info(reason)
        return self.state

    def _start(self) -> None:
        """Continues the run in `--save`, or starts from `--load`; opens what the run writes to."""
        objective, checkpoint = self.objective, self.config.checkpoint
        self.state = resume(
            self.config, self.parts, objective.resumes_others, objective.best_metric, self.own
        )
        self.sums.restore(self.state.interval)
        self.state = dataclasses.replace(self.state, interval={})
        # Which checkpoint was chosen is no option of the run: its configuration, read back, goes on from the last.
        checkpoint = dataclasses.replace(checkpoint, step="")
        self.config = dataclasses.replace(self.config, checkpoint=checkpoint)
        folder = Path(checkpoint.save)
        if checkpoint.save:
            self.writer = CheckpointWriter(
                checkpoint_root(folder), checkpoint.keep_last, checkpoint.async_save
            )
            if objective.best_metric:
                self.best = CheckpointWriter(folder / "best", 1, False)
        begin_run_logs()
        if not is_rank_zero():
            return
        # Without --save, metrics only go to the screen.
        if checkpoint.save:
            write_text_atomic(folder / "config.yaml", to_yaml(self.config))
            self.outputs.append(JsonlWriter(folder / "metrics.jsonl", self.state.step))
            if self.config.log.tensorboard:
                self.outputs.append(TensorBoardWriter(folder / "tensorboard"))
        if self.config.log.wandb_project:
            self.outputs.append(WandbWriter(self.config))

    def _loop(self, watch: ExitWatch, profiler: StepProfiler) -> str:
        config, train = self.config, self.config.train
        first = self.state.step * self.num_micro_batches
        batches = self.throughput.timed(self.data.loader("train", first, None))
        self.throughput.reset()
        reason = self._patience_is_over()
        if reason:
            return f"stopped after step {self.state.step}: {reason}"
        while self.state.step < train.steps:
            step = self.state.step + 1
            profiler.before(step)
            grad_norm = self._train_step(batches)
            profiler.after(step)
            metrics: dict[str, float] = {}
            if step % config.log.interval == 0 or step == train.steps:
                metrics = self._report(step, grad_norm)
            is_due = train.eval_interval and step % train.eval_interval == 0
            if train.eval_steps and (is_due or step == train.steps):
                evaluation = self._evaluate()
                metrics.update(evaluation)
                self._judge(evaluation)
            self._write(step, metrics)
            reason = watch.reason(step) or self._patience_is_over()
            if self.writer is not None:
                self.writer.finish(blocking=False)
            if reason:
                return f"stopped after step {step}: {reason}"
            if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
                self._save(is_last=step == train.steps)
        return f"finished {train.steps} steps"

    def _train_step(self, batches: Iterator[Batch]) -> float:
        """One update, if its gradients are finite; returns their norm."""
        self.runner.start_step()
        results = self.runner.train(batches, self.num_micro_batches, self.objective)
        updated, grad_norm, _ = self.parts.optimizer.step()
        step, stop_on_nan = self.state.step + 1, self.config.train.stop_on_nan
        grad_norm = float(grad_norm or 0.0)
        if updated:
            self.parts.scheduler.step(increment=1)
            if stop_on_nan and not math.isfinite(grad_norm):
                raise TrainingError(f"step {step}: gradient norm is {grad_norm}")
        elif stop_on_nan and self.parts.transformer_config.fp16 is False:
            raise TrainingError(f"step {step}: gradients are not finite")
        skipped = self.state.skipped_steps + int(not updated)
        self.state = dataclasses.replace(self.state, step=step, skipped_steps=skipped)
        # All tensor-parallel ranks of the last stage have the same.
        self.sums.add(results if self.ranks.tensor == 0 else ())
        self.throughput.steps += 1
        return grad_norm

    def _report(self, step: int, grad_norm: float) -> dict[str, float]:
        """Means over the interval and all ranks."""
        means, counters = self.sums.take()
        metrics = {"loss/total": means["total"], **self.objective.loss_metrics(means)}
        moe = metrics_from_counters(counters, self.config.log.moe_per_layer)
        metrics["loss/total"] += sum(v for k, v in moe.items() if k.startswith("loss/aux/"))
        metrics.update(moe)
        metrics["grad_norm"] = grad_norm
        # Of the parameters without a factor of their own, as the optimizer has it for the next step.
        groups = self.parts.optimizer.param_groups
        metrics["lr"] = float(next(group["lr"] for group in groups if group["default_config"]))
        metrics["skipped_steps"] = float(self.state.skipped_steps)
        if self.parts.transformer_config.fp16:
            metrics["loss_scale"] = float(self.parts.optimizer.get_loss_scale())
        metrics.update(self.throughput.report())
        left = (self.config.train.steps - step) * metrics["step_seconds"]
        log.info(progress_line(step, self.config.train.steps, metrics, left))
        return metrics

    def _evaluate(self) -> dict[str, float]:
        # It may come between two logged steps, and counts by itself.
        self.sums.count()
        metrics = self.objective.evaluate(self.runner)
        log.info(self.objective.evaluation_line(metrics))
        counters = collect(self.parts.chunks, self.config)
        moe = metrics_from_counters(counters, per_layer=False)
        metrics |= {f"eval/{key}": value for key, value in moe.items() if key.startswith("moe/")}
        self.throughput.reset()
        return metrics

    def _judge(self, evaluation: Mapping[str, float]) -> None:
        """Keeps the weights of the best evaluation so far in SAVE/best."""
        name = self.objective.best_metric
        if not name:
            return
        state, value = self.state, evaluation[name]
        if state.best_value is not None and value <= state.best_value:
            worse = state.worse_evaluations + 1
            self.state = dataclasses.replace(state, worse_evaluations=worse)
            return
        self.state = dataclasses.replace(
            state, best_value=value, best_step=state.step, worse_evaluations=0, best_metric=name
        )
        if self.best is not None:
            self.best.save(self.state, self.config, self.parts, with_optimizer=False)
            log.info("best %s so far: %.3f, kept in %s", name, value, self.best.root)
            self.throughput.reset()

    def _patience_is_over(self) -> str:
        patience, worse = self.objective.patience, self.state.worse_evaluations
        if not patience or worse < patience:
            return ""
        return f"{worse} evaluations without a better {self.objective.best_metric}"

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if metrics:
            for output in self.outputs:
                output.write(step, metrics)

    def _save(self, is_last: bool = False) -> None:
        if self.writer is None:
            return
        # It may be this step's. Whatever somebody has done to the tracker meanwhile, a run keeps what it has reached.
        self.writer.finish()
        root, step = self.writer.root, self.state.step
        if from_rank_zero(
            lambda: is_tracked(root, step) and is_complete(root / iteration_name(step))
        ):
            return
        state = dataclasses.replace(self.state, interval=self.sums.saved())
        target = self.writer.save(state, self.config, self.parts, is_last=is_last)
        in_background = self.config.checkpoint.async_save
        log.info("saving %s in the background" if in_background else "saved %s", target)
        self.throughput.reset()


class ExitWatch:
    """Collects reasons to save and leave: a signal, an interval, a time limit; all ranks agree once per step."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.started = time.monotonic()
        self.received: Optional[str] = None
        self.is_leaving = False
        self.previous: dict[signal.Signals, Any] = {}
        for name in config.exit_signals:
            number = signal.Signals[name]
            self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: Optional[FrameType]) -> None:
        self.received = signal.Signals(number).name

    def reason(self, step: int) -> str:
        """Why to stop after this step, on every rank the same; empty to go on."""
        interval = self.config.exit_interval
        if interval > 0 and step % interval == 0:
            return f"--exit-interval {interval}"
        if self.is_asked():
            return self.received or (
                "train.exit_duration_minutes" if self._is_overdue() else "another rank"
            )
        return ""

    def is_asked(self) -> bool:
        """Whether any rank has got a signal or has run out of time; every rank must call it."""
        self.is_leaving = agree(self.received is not None or self._is_overdue())
        return self.is_leaving

    def close(self) -> None:
        """Puts the former handlers back, unless the process leaves now: a second signal must not end it sooner."""
        if not self.is_leaving:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _is_overdue(self) -> bool:
        minutes = self.config.exit_duration_minutes
        return minutes > 0 and time.monotonic() - self.started > 60.0 * minutes
