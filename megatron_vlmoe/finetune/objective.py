"""What trains a downstream task and judges it: evaluation of every item, the base of all objectives, that of classes.

An evaluation runs over every item once, in order, on all ranks, and brings what it found together on rank 0. Items
come in micro-batches of one size. The last ones are filled up with copies of the first item, which are marked and left
out of every result, so that all ranks run the same number of forward passes.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ModelConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape, load_code
from megatron_vlmoe.data.collate import BatchShare, Loader, to_tensors
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.metrics import Found, Score, label_ranks
from megatron_vlmoe.finetune.predictions import MOST_LIKELY, best_classes, class_probabilities
from megatron_vlmoe.losses.tasks import class_loss, soft_target_loss
from megatron_vlmoe.runtime.distributed import Ranks, is_rank_zero
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.step import Losses, StepRunner

Array = np.ndarray[Any, Any]
Parts = Callable[[Sequence[int]], dict[str, Any]]
Reduce = Callable[[Batch, Mapping[str, Tensor]], Found]
# Micro-batches of one call of the schedule, between which a rank that runs ahead waits for the others.
MOST_MICRO_BATCHES = 64


class EvalMicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch, for `Loader`; every data-parallel rank has `count` of them."""

    def __init__(self, total: int, parts: Parts, config: FinetuneConfig, share: BatchShare) -> None:
        self.total, self.parts, self.share = total, parts, share
        self.size = config.task.eval_batch
        self.count = max(1, -(-total // (self.size * share.data_size)))
        pipeline = config.parallel.pipeline_model_parallel_size
        if config.parallel.virtual_pipeline_model_parallel_size > 1:
            # Interleaving takes micro-batches in multiples of the stages.
            self.count = -(-self.count // pipeline) * pipeline

    def __getitem__(self, local: int) -> Batch:
        """The batch with ``samples [n]``, numbers of items, and ``valid [n]``, False for copies. Raises DataError."""
        first = (local * self.share.data_size + self.share.data_rank) * self.size
        numbers = np.arange(first, first + self.size, dtype=np.int64)
        valid = numbers < self.total
        items = np.where(valid, numbers, 0)
        marks = {"samples": items, "valid": valid, "micro_batch": np.array(local)}
        return to_tensors(self.parts(items.tolist()) | marks)


def eval_layout(model: ModelConfig, shape: SampleShape, count: int) -> StreamLayout:
    """The stream of an evaluation micro-batch of so many items."""
    return StreamLayout(
        texts=shape.texts * count,
        pairs=shape.pairs * count,
        images=shape.images * count,
        text_length=model.text_length,
        pair_text_length=model.pair_text_length,
        image_length=model.image_length,
    )


class CoverageError(RuntimeError):
    """An evaluation that did not see every item exactly once."""


def to_numpy(value: Tensor) -> Array:
    """In single precision on the host."""
    return value.float().cpu().numpy()


def share_metrics(metrics: Optional[Mapping[str, float]]) -> dict[str, float]:
    """Rank 0's metrics on every rank."""
    box: list[Any] = [metrics]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return dict(box[0])


Measured = tuple[dict[str, float], Optional[Found]]
"""Metrics by `SPLIT/NAME` on every rank, and on rank 0 what the predictions of all samples are made from."""


class TaskObjective(ABC):
    """Trains a task and judges it by the first evaluation split."""

    resumes_others = False
    evaluates_at_start = False

    def __init__(
        self, config: FinetuneConfig, ranks: Ranks, data: TaskData, loss_names: tuple[str, ...]
    ) -> None:
        self.config, self.ranks, self.data = config, ranks, data
        self.loss_names = loss_names
        best = f"{config.task.splits[0]}/{config.task.spec.best_metric}"
        self.best_metric = best if config.task.save_best else ""
        self.patience = config.task.early_stopping
        self._measured: Optional[Measured] = None

    def prepare_step(self, runner: StepRunner, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The micro-batches as they are; what was measured before the step is forgotten."""
        self.forget()
        return batches

    def prepare(self, batch: Batch) -> Batch:
        """The micro-batch as it is."""
        return batch

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """`loss/NAME` of every single loss."""
        return {f"loss/{name}": means[name] for name in self.loss_names}

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Metrics of the split that chooses the best checkpoint."""
        metrics, found = self._measure(runner, self.data.splits[0])
        # The caller adds to what it gets.
        self._measured = dict(metrics), found
        return metrics

    def evaluate_split(self, runner: StepRunner, split: SplitData) -> Measured:
        """The full evaluation of a split, at the end of a run or without one.

        What `evaluate` found is taken over if the weights are still the same.
        """
        if self._measured is not None and split is self.data.splits[0]:
            return self._measured
        return self._measure(runner, split)

    def forget(self) -> None:
        """To be called when the weights become others."""
        self._measured = None

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """Percentages of an evaluation in one line."""
        parts = [
            f"{name} {value:.2f}"
            for name, value in metrics.items()
            if not name.endswith(("/samples", "/unlabelled"))
        ]
        return "evaluation | " + " | ".join(parts)

    def evaluate_items(
        self, runner: StepRunner, count: int, shape: SampleShape, parts: Parts, reduce: Reduce
    ) -> Optional[Found]:
        """What the model says of every evaluation item; every rank must call it.

        Args:
            runner: the model.
            count: how many items there are.
            shape: what an item puts into the stream.
            parts: from the numbers of items to the parts of a micro-batch; pickles.
            reduce: from a micro-batch and the heads' outputs to what is wanted of every item, ``[n, ...]`` each;
                little enough for rank 0 to hold for all items.

        Returns:
            On rank 0 what `reduce` gave ``[items, ...]`` in the order of the items; None elsewhere.

        Raises:
            CoverageError: on rank 0, if an item is missing or came twice.
        """
        config, options = self.data.config, self.data.config.data
        dataset = EvalMicroBatches(count, parts, config, self.data.share)
        layout = eval_layout(config.model, shape, config.task.eval_batch)
        batches = iter(Loader(dataset, range(dataset.count), options.num_workers, options.prefetch))

        def measure(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
            valid = batch["valid"].cpu().numpy()
            kept = {name: value[valid] for name, value in reduce(batch, outputs).items()}
            kept["samples"] = batch["samples"].cpu().numpy()[valid]
            return kept

        results: list[Found] = []
        pipeline = config.parallel.pipeline_model_parallel_size
        most = max(1, MOST_MICRO_BATCHES // pipeline) * pipeline
        for first in range(0, dataset.count, most):
            some = min(dataset.count - first, most)
            results += runner.evaluate(
                itertools.islice(batches, some), some, measure, layout=layout
            )
        # All tensor-parallel ranks of the last stage hold the same; the first one speaks for them.
        found = results if self.ranks.is_last_stage and self.ranks.tensor == 0 else []
        if dist.get_world_size() > 1:
            places: Optional[list[Any]] = [None] * dist.get_world_size() if is_rank_zero() else None
            dist.gather_object(found, places, dst=0)
            if places is None:
                return None
            found = [part for own in places for part in own]
        numbers = np.concatenate([part["samples"] for part in found])
        order = np.argsort(numbers, kind="stable")
        if not np.array_equal(numbers[order], np.arange(count)):
            seen = np.bincount(numbers, minlength=count)
            raise CoverageError(
                f"evaluation of {count} items: {int((seen == 0).sum())} missing, "
                f"{int((seen > 1).sum())} more than once"
            )
        names = [name for name in found[0] if name != "samples"]
        return {name: np.concatenate([part[name] for part in found])[order] for name in names}

    @abstractmethod
    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """The loss of a micro-batch with its graph, and the losses to log."""

    @abstractmethod
    def _measure(self, runner: StepRunner, split: SplitData) -> Measured:
        """The model's outputs for all samples of a split, and their metrics."""


class ClassificationObjective(TaskObjective):
    """Trains and judges a task with classes, whose heads give `logits`: one label a sample, or scores over answers."""

    def __init__(self, config: FinetuneConfig, ranks: Ranks, data: TaskData) -> None:
        super().__init__(config, ranks, data, (config.task.name,))

    def _measure(self, runner: StepRunner, split: SplitData) -> Measured:
        """Metrics in percent, and of every sample `classes` and `probabilities` ``[n, k]``, best first, and `ranks`.

        All logits of 3,129 answers would not fit. `ranks` ``[n]`` are those of the labels; answers of VQA have none.
        Where no sample is labelled there are no scores.
        """
        samples, task = split.samples, self.config.task

        def reduce(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
            logits = to_numpy(outputs["logits"])
            classes = best_classes(logits, MOST_LIKELY)
            chosen = np.take_along_axis(class_probabilities(task.name, logits), classes, axis=1)
            found = {"classes": classes, "probabilities": chosen}
            if "labels" in batch:
                found["ranks"] = label_ranks(logits, batch["labels"].cpu().numpy())
            return found

        shape, parts = samples.spec.stream, samples.sample_parts
        found = self.evaluate_items(runner, len(samples), shape, parts, reduce)
        if found is None:
            return share_metrics(None), None
        score = load_code(task.spec.scores, task.name)
        scores: Mapping[str, Score] = score(found, split, self.data.labels)
        if task.spec.best_metric not in scores:
            given = ", ".join(scores) or "nothing"
            best = task.spec.best_metric
            raise ConfigError(
                f"task {task.name}: {task.spec.scores} gives {given}, and not its best_metric {best}"
            )
        first = next(iter(scores.values()))
        metrics = {"unlabelled": float(first.unlabelled)}
        if first.count:
            metrics = {name: score.percent for name, score in scores.items()}
            metrics |= {"samples": float(first.count), "unlabelled": float(first.unlabelled)}
        return share_metrics({f"{split.name}/{name}": v for name, v in metrics.items()}), found

    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """Of the classes, or of soft scores over answers."""
        logits, task = outputs["logits"], self.config.task
        if task.spec.has_answers:
            loss = soft_target_loss(logits, batch["answers"], batch["scores"])
        else:
            partners, shares = batch.get("partner_labels"), batch.get("own_share")
            loss = class_loss(logits, batch["labels"], task.label_smoothing, partners, shares)
        # The schedule divides the loss in place.
        shown = loss.detach().clone()
        return loss, {"total": shown, task.name: shown}
