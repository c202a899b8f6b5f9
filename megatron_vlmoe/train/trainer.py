"""The training loop: steps, logging, evaluation, checkpoints, clean exits."""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Mapping, Optional, Sequence

import torch
import torch.distributed as dist

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import TrainingError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.planning.estimate import flops_per_step
from megatron_vlmoe.runtime.distributed import Ranks, device, is_rank_zero
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.train.checkpoint import CheckpointWriter
from megatron_vlmoe.train.checkpoint_files import TrainState, checkpoint_root, is_saved
from megatron_vlmoe.train.moe_report import collect, metrics_from_counters
from megatron_vlmoe.train.objective import BatchSource, Losses, Objective
from megatron_vlmoe.train.resume import resume
from megatron_vlmoe.train.run_log import begin_run_logs
from megatron_vlmoe.train.setup import TrainingParts
from megatron_vlmoe.train.signals import ExitWatch
from megatron_vlmoe.train.step import StepRunner
from megatron_vlmoe.train.throughput import DataClock, StepProfiler, Throughput
from megatron_vlmoe.train.writers import MetricsWriter, build_writers, progress_line

log = logging.getLogger("megatron_vlmoe")


class Trainer:
    """Trains one model on one source of batches.

    Args:
        config: the run, with vocabulary sizes and data-derived numbers.
        parts: model chunks, optimizer and schedule.
        ranks: where this process stands.
        data: source of batches.
        num_micro_batches: micro-batches of a step on each data-parallel rank.
        precision: resolved precision.
        objective: what is trained and how it is judged.
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
    ) -> None:
        self.config = config
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
        self.losses = torch.zeros(
            len(objective.loss_names) + 2, dtype=torch.float64, device=device()
        )
        self.throughput = Throughput(
            config,
            ranks.world_size,
            num_micro_batches,
            ranks.data_size,
            flops_per_step(config),
            precision,
        )

    def run(self) -> TrainState:
        """Trains to `train.steps` or to the first reason to stop; returns where it stopped."""
        self._resume()
        self._open_outputs()
        watch = ExitWatch(self.config.train)
        profiler = StepProfiler(self.config, self.ranks.rank)
        try:
            if self.state.step == 0:
                if self.config.train.eval_steps > 0 and self.objective.evaluates_at_start:
                    self._write(0, self._evaluate())
                if self.config.checkpoint.save_initial:
                    self._save()
            reason = self._loop(watch, profiler)
            self._save()
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

    def _loop(self, watch: ExitWatch, profiler: StepProfiler) -> str:
        config = self.config
        first = self.state.step * self.num_micro_batches
        clock = DataClock(self.data.loader("train", first, None))
        self.throughput.reset()
        reason = self._patience_is_over()
        if reason:
            return f"stopped after step {self.state.step}: {reason}"
        while self.state.step < config.train.steps:
            step = self.state.step + 1
            profiler.before(step)
            grad_norm = self._train_step(clock)
            profiler.after(step)
            metrics: dict[str, float] = {}
            if step % config.log.interval == 0 or step == config.train.steps:
                metrics = self._report(step, grad_norm, clock.take())
            if self._evaluates(step):
                evaluation = self._evaluate()
                metrics.update(evaluation)
                self._judge(evaluation)
            self._write(step, metrics)
            reason = watch.reason(step) or self._patience_is_over()
            if self.writer is not None:
                self.writer.poll()
            if reason:
                return f"stopped after step {step}: {reason}"
            if config.checkpoint.save_interval and step % config.checkpoint.save_interval == 0:
                self._save()
        return f"finished {config.train.steps} steps"

    def _train_step(self, clock: DataClock) -> float:
        self.runner.start_step()
        results = self.runner.train(iter(clock), self.num_micro_batches, self.objective)
        updated, grad_norm, _ = self.parts.optimizer.step()
        if updated:
            self.parts.scheduler.step(increment=1)
        elif self.config.train.stop_on_nan and self.parts.transformer_config.fp16 is False:
            raise TrainingError(f"step {self.state.step + 1}: gradients are not finite")
        grad_norm = float(grad_norm or 0.0)
        if updated and self.config.train.stop_on_nan and not math.isfinite(grad_norm):
            raise TrainingError(f"step {self.state.step + 1}: gradient norm is {grad_norm}")
        self.state = dataclasses.replace(
            self.state,
            step=self.state.step + 1,
            skipped_steps=self.state.skipped_steps + int(not updated),
        )
        self._add_losses(results)
        self.throughput.step()
        return grad_norm

    def _add_losses(self, results: Sequence[Losses]) -> None:
        """Sums losses on the last stage's first tensor rank; read at the next report."""
        if self.ranks.tensor != 0:
            return
        for result in results:
            for index, name in enumerate(("total", *self.objective.loss_names)):
                if name in result:
                    self.losses[index] += result[name].double()
            self.losses[-1] += 1.0

    def _report(self, step: int, grad_norm: float, data_wait: float) -> dict[str, float]:
        """Means over the interval and all ranks."""
        dist.all_reduce(self.losses)
        sums = self.losses.tolist()
        self.losses.zero_()
        count = max(sums[-1], 1.0)
        names = ("total", *self.objective.loss_names)
        means = {name: sums[index] / count for index, name in enumerate(names)}
        metrics = {"loss/total": means["total"], **self.objective.loss_metrics(means)}
        counters = collect(self.parts.chunks, self.config)
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
        metrics.update(self.throughput.report(data_wait))
        left = (self.config.train.steps - step) * metrics["step_seconds"]
        log.info(progress_line(step, self.config.train.steps, metrics, left))
        return metrics

    def _evaluates(self, step: int) -> bool:
        train = self.config.train
        if train.eval_steps == 0:
            return False
        return step == train.steps or bool(train.eval_interval and step % train.eval_interval == 0)

    def _evaluate(self) -> dict[str, float]:
        collect(self.parts.chunks, self.config)
        metrics = self.objective.evaluate(self.runner)
        log.info(self.objective.evaluation_line(metrics))
        counters = collect(self.parts.chunks, self.config)
        moe = metrics_from_counters(counters, per_layer=False)
        metrics.update(
            {f"eval/{key}": value for key, value in moe.items() if key.startswith("moe/")}
        )
        self.throughput.reset()
        return metrics

    def _judge(self, evaluation: Mapping[str, float]) -> None:
        """Keeps the weights of the best evaluation so far in SAVE/best."""
        name = self.objective.best_metric
        if not name:
            return
        value, best = evaluation[name], self.state.best_value
        if best is not None and value <= best:
            worse = self.state.worse_evaluations + 1
            self.state = dataclasses.replace(self.state, worse_evaluations=worse)
            return
        self.state = dataclasses.replace(
            self.state,
            best_value=value,
            best_step=self.state.step,
            worse_evaluations=0,
            best_metric=name,
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

    def _resume(self) -> None:
        """Continues the run in `--save`, or starts from `--load`; opens the writers of checkpoints."""
        objective, checkpoint = self.objective, self.config.checkpoint
        self.state = resume(
            self.config, self.parts, objective.resumes_others, objective.best_metric
        )
        # Which checkpoint was chosen is no option of the run: its configuration, read back, goes on from the last.
        checkpoint = dataclasses.replace(checkpoint, step="")
        self.config = dataclasses.replace(self.config, checkpoint=checkpoint)
        if checkpoint.save:
            self.writer = CheckpointWriter(
                checkpoint_root(checkpoint.save), checkpoint.keep_last, checkpoint.async_save
            )
            if objective.best_metric:
                self.best = CheckpointWriter(Path(checkpoint.save) / "best", 1, False)

    def _open_outputs(self) -> None:
        begin_run_logs()
        if not is_rank_zero():
            return
        resolved = dataclasses.asdict(self.config)
        if self.config.checkpoint.save:
            folder = Path(self.config.checkpoint.save)
            write_text_atomic(folder / "config.yaml", to_yaml(self.config))
        self.outputs = build_writers(self.config, resolved, self.state.step)

    def _save(self) -> None:
        if self.writer is None:
            return
        # It may be this step's. Whatever somebody has done to the tracker meanwhile, a run keeps what it has reached.
        self.writer.finish()
        if is_saved(self.writer.root, self.state.step):
            return
        target = self.writer.save(self.state, self.config, self.parts)
        in_background = self.config.checkpoint.async_save
        log.info("saving %s in the background" if in_background else "saved %s", target)
        self.throughput.reset()
