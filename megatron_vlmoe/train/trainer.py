"""The training loop: steps, logging, evaluation, checkpoints, clean exits."""

from __future__ import annotations

import dataclasses
import logging
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, Iterator, Mapping, Optional, Sequence

from megatron_vlmoe.config.command_line import to_yaml
from megatron_vlmoe.config.errors import TrainingError
from megatron_vlmoe.config.schema import Precision, RunConfig, TrainConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    agree,
    from_rank_zero,
    is_rank_zero,
)
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.runtime.memory import settled_objects
from megatron_vlmoe.runtime.watchdog import watchdog
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.checkpoint import CheckpointWriter
from megatron_vlmoe.train.checkpoint_files import (
    TrainState,
    checkpoint_root,
    find_checkpoint,
    has_checkpoints,
    is_complete,
    is_tracked,
    iteration_name,
)
from megatron_vlmoe.train.failures import training_failures
from megatron_vlmoe.train.health import (
    Finding,
    GuardedOptimizer,
    HealthPolicy,
    StepBatch,
    agreed,
    gather_records,
    not_finite,
    write_event,
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
from megatron_vlmoe.train.step import Losses, StepRunner
from megatron_vlmoe.train.stragglers import StragglerWatch

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
        self.policy = HealthPolicy(config.health, config.train)
        modules = [module for chunk in parts.chunks for module in chunk.modules()]
        self.optimizer = GuardedOptimizer(parts.optimizer, config.health, modules)
        self.batch = StepBatch()
        self.watchdog = watchdog()
        self.stragglers = StragglerWatch(config.health.straggler_factor, ranks)
        self.finding: Optional[Finding] = None
        self.throughput = Throughput(config, ranks, num_micro_batches, precision)

    def run(self) -> TrainState:
        """Trains to `train.steps` or to the first reason to stop; returns where it stopped."""
        with training_failures(self.config, self.data.check_files):
            return self._run()

    def _run(self) -> TrainState:
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
                self.watchdog.end_steps()
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
        self._load(self.own)
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

    def _load(self, own: Optional[Path] = None) -> None:
        """Takes model, optimizer and state from the checkpoint that the run goes on from, if there is one.

        Args:
            own: that checkpoint, where it is known already.
        """
        objective = self.objective
        state = resume(
            self.config, self.parts, objective.resumes_others, objective.best_metric, own
        )
        self.sums.restore(state.interval)
        self.state = dataclasses.replace(state, interval={})

    def _loop(self, watch: ExitWatch, profiler: StepProfiler) -> str:
        config, train = self.config, self.config.train
        first = self.state.data_step * self.num_micro_batches
        batches = self.throughput.timed(self.data.loader("train", first, None))
        batches = self.batch.noted(batches, self.ranks)
        self.throughput.reset()
        self.watchdog.begin_steps()
        reason = self._patience_is_over()
        if reason:
            return f"stopped after step {self.state.step}: {reason}"
        while self.state.step < train.steps:
            step = self.state.step + 1
            profiler.before(step)
            grad_norm = self._train_step(batches)
            profiler.after(step)
            self.watchdog.finished(step)
            if self.finding is not None and self.finding.action == "rewind":
                self._rewind(self.finding.reason)
                continue
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
        """One step, and its update if the policy of `health` allows it; returns the gradient norm.

        Afterwards `finding` says why there was no update and what is to be done; None with fp16's own overflows.

        Raises:
            TrainingError: the run is to end.
        """
        self.finding = None
        self.batch.batches.clear()
        self.batch.replaced.clear()
        self.optimizer.keep_biases()
        self.runner.start_step()
        results = self.runner.train(batches, self.num_micro_batches, self.objective)
        updated, grad_norm = self.optimizer.step(self._allows)
        norm = grad_norm or 0.0
        if self.finding is not None:
            self._tell(self.finding, results)
            if self.finding.action == "rewind":
                return norm
            skips = self.state.skips_in_a_row + 1
            self.state = dataclasses.replace(self.state, skips_in_a_row=skips)
            results = []
        elif updated:
            self.parts.scheduler.step(increment=1)
            self.state = self.policy.updated(norm, self.state)
        skipped = self.state.skipped_steps + int(not updated)
        self.state = dataclasses.replace(
            self.state, step=self.state.step + 1, skipped_steps=skipped
        )
        # All tensor-parallel ranks of the last stage have the same.
        self.sums.add(results if self.ranks.tensor == 0 else (), self._bad_images())
        self.throughput.steps += 1
        return norm

    def _bad_images(self) -> int:
        """Names images of the step that were replaced; returns how many this rank speaks for."""
        replaced = self.batch.replaced if self.ranks.is_first_stage else []
        for name, number in replaced:
            place = self.data.places(name, [number])[0]
            log.warning(
                "image %d of %s (sample %d of %s) cannot be decoded: a grey one takes its place",
                place["image"],
                place["dataset"],
                number,
                name,
            )
        return len(replaced)

    def _allows(self, grad_norm: float) -> bool:
        """Whether the step in progress may change the model."""
        self.finding = self.policy.judge(grad_norm, self.state)
        spikes = self.config.health.on_spike != "none"
        if not agreed(self.finding is not None, spikes):
            self.finding = None
        elif self.finding is None:
            elsewhere = Finding(self.config.health.on_spike, "another rank has found a spike")
            self.finding = self.policy.bounded(elsewhere, self.state)
        return self.finding is None

    def _tell(self, finding: Finding, results: Sequence[Losses]) -> None:
        """Writes down the batch of a step that went wrong, and says so; ends the run if that is what is to be done."""
        step, save = self.state.step + 1, self.config.checkpoint.save
        records = gather_records(self.batch.record(results, self.ranks, self.data))
        last = self._last_checkpoint()
        about = {
            "data_step": self.state.data_step + 1,
            "checkpoint": str(last) if last else "",
            "random_data": isinstance(self.data, RandomData),
        }
        line = f"step {step}: {finding.reason}; {not_finite(records)}; "
        line += f"last good checkpoint: {last or 'none'}"
        if save:
            path = from_rank_zero(lambda: write_event(Path(save), step, finding, about, records))
            is_task = isinstance(self.config, FinetuneConfig)
            line += (
                f"; its batch: {path}"
                if is_task
                else f"; to look for the cause: vlmoe replay {path}"
            )
        if finding.action == "stop":
            raise TrainingError(line)
        log.warning("%s; %s", line, "no update" if finding.action == "skip" else "going back")

    def _last_checkpoint(self) -> Optional[Path]:
        """The checkpoint that the run would go on from, once what is being written is published."""
        if self.writer is None:
            return None
        self.writer.finish()
        root = self.writer.root
        return from_rank_zero(lambda: find_checkpoint(root) if has_checkpoints(root) else None)

    def _rewind(self, reason: str) -> None:
        """Goes back to the last checkpoint, and on with the data behind the step that went wrong.

        Raises:
            TrainingError: there is no checkpoint with a state of the optimizer, or it has been tried often enough.
        """
        step, data_step = self.state.step + 1, self.state.data_step + 1
        last = self._last_checkpoint()
        if last is None or last.name == iteration_name(0):
            raise TrainingError(f"step {step}: {reason}; there is no checkpoint to go back to")
        self.sums.clear()
        with self.watchdog.pause("going back"):
            self._load()
        if not self.policy.may_rewind(self.state.step):
            raise TrainingError(
                f"step {step}: {reason}; the run went back to {last} health.max_rewinds="
                f"{self.config.health.max_rewinds} time(s) already"
            )
        passed = data_step - self.state.step
        log.warning(
            "back at step %d: the data of step(s) %d to %d is passed over",
            self.state.step,
            self.state.data_step + 1,
            data_step,
        )
        self.state = dataclasses.replace(self.state, passed_steps=passed)
        for output in self.outputs:
            if isinstance(output, JsonlWriter):
                output.rewind(self.state.step)
        self.throughput.reset()

    def _report(self, step: int, grad_norm: float) -> dict[str, float]:
        """Means over the interval and all ranks."""
        timer = self.runner.timer
        means, counters, bad_images, seconds = self.sums.take(timer.take() if timer else 0.0)
        metrics = {"loss/total": means["total"], **self.objective.loss_metrics(means)}
        moe = metrics_from_counters(counters, self.config.log.moe_per_layer)
        metrics["loss/total"] += sum(v for k, v in moe.items() if k.startswith("loss/aux/"))
        metrics.update(moe)
        metrics["grad_norm"] = grad_norm
        # Of the parameters without a factor of their own, as the optimizer has it for the next step.
        groups = self.parts.optimizer.param_groups
        metrics["lr"] = float(next(group["lr"] for group in groups if group["default_config"]))
        metrics["skipped_steps"] = float(self.state.skipped_steps)
        if self.state.passed_steps:
            metrics["passed_steps"] = float(self.state.passed_steps)
        if self.config.data.on_bad_image == "replace":
            total, most = self.state.bad_images + bad_images, self.config.data.max_bad_images
            self.state = dataclasses.replace(self.state, bad_images=total)
            metrics["bad_images"] = float(total)
            if total > most:
                raise TrainingError(
                    f"step {step}: {total} images could not be decoded, more than data.max_bad_images={most}; "
                    "the log names them"
                )
        if self.parts.transformer_config.fp16:
            metrics["loss_scale"] = float(self.parts.optimizer.get_loss_scale())
        if timer and len(seconds) > 1:
            metrics["forward_seconds_fastest"] = min(seconds)
            metrics["forward_seconds_slowest"] = max(seconds)
            if slow := self.stragglers.report(seconds):
                log.warning("the other ranks wait: %s", slow)
        metrics.update(self.throughput.report())
        left = (self.config.train.steps - step) * metrics["step_seconds"]
        log.info(progress_line(step, self.config.train.steps, metrics, left))
        return metrics

    def _evaluate(self) -> dict[str, float]:
        # It may come between two logged steps, and counts by itself.
        self.sums.count()
        with self.watchdog.pause("evaluating"):
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
            with self.watchdog.pause("saving"):
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
        if self.writer is not None:
            with self.watchdog.pause("saving"):
                self._save_with(self.writer, is_last)

    def _save_with(self, writer: CheckpointWriter, is_last: bool) -> None:
        # It may be this step's. Whatever somebody has done to the tracker meanwhile, a run keeps what it has reached.
        writer.finish()
        root, step = writer.root, self.state.step
        if from_rank_zero(
            lambda: is_tracked(root, step) and is_complete(root / iteration_name(step))
        ):
            return
        state = dataclasses.replace(self.state, interval=self.sums.saved())
        target = writer.save(state, self.config, self.parts, is_last=is_last)
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
