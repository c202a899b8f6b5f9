"""The data of a fine-tuning run: opens prepared splits, derives the sizes that options leave, makes micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.schema import DataConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.collate import BatchShare, Loader, MicroBatchNumber, Numbers, to_tensors
from megatron_vlmoe.data.order import SampleOrder, SampleRef
from megatron_vlmoe.data.samples import SampleRngs, TextFormat
from megatron_vlmoe.data.sources import open_text_tokenizer
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, load_labels
from megatron_vlmoe.finetune.samples import TaskSamples
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.block_plan import has_experts
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.tokenizers.text import TextTokenizer

# Streams of random numbers; those of pretraining are below.
TRAIN_STREAM, EVAL_STREAM = 101, 102


class TrainingMicroBatches(Dataset[Batch]):
    """Local micro-batch number to batch, in a shuffled order that changes with every epoch.

    Args:
        samples: the training split.
        config: batch sizes and seed.
        share: which part this process needs.
    """

    def __init__(self, samples: TaskSamples, config: FinetuneConfig, share: BatchShare) -> None:
        self.samples, self.share = samples, share
        self.micro, self.whole = config.task.micro_batch_size, config.task.global_batch_size
        self.per_step = num_micro_batches(config, share.data_size)
        key = samples.rngs.dataset_key(0)
        self.order = SampleOrder(len(samples), config.train.seed, True, key)

    def refs(self, numbers: Sequence[int]) -> list[SampleRef]:
        """The samples with these numbers, counted over the run."""
        return [SampleRef(0, *self.order.locate(number)) for number in numbers]

    def __getitem__(self, local: int) -> Batch:
        """The batch. Raises DataError."""
        number = MicroBatchNumber.locate(local, self.per_step, self.share)
        numbers = number.samples(self.micro, self.whole)
        batch = self.samples.batch(self.refs(numbers))
        batch |= {
            "micro_batch": np.array(number.in_run),
            "sample_numbers": np.asarray(numbers, dtype=np.int64),
        }
        return to_tensors(batch)


@dataclass(frozen=True)
class SplitData:
    """One evaluation split.

    Args:
        name: of the split.
        dataset: its samples.
        samples: the same as parts of micro-batches.
    """

    name: str
    dataset: TaskDataset
    samples: TaskSamples


class TaskData:
    """Prepared splits of a task, verified, with the run's configuration completed from them.

    Args:
        config: the run with all sizes filled in.
        share: which part of the batches this process needs.
        labels: the classes; None for retrieval.
        tokenizer: None for a task without text.
        train: the training split; None to evaluate only.
        splits: the evaluation splits.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        share: BatchShare,
        labels: Labels | None,
        tokenizer: TextTokenizer | None,
        train: TaskDataset | None,
        splits: Sequence[TaskDataset],
    ) -> None:
        self.config, self.share, self.labels = config, share, labels
        self.tokenizer = tokenizer
        self.splits = [
            SplitData(name, dataset, self._samples(dataset, EVAL_STREAM))
            for name, dataset in zip(config.task.splits, splits)
        ]
        self.train: TrainingMicroBatches | None = None
        if train is not None:
            samples = self._samples(train, TRAIN_STREAM)
            self.train = TrainingMicroBatches(samples, config, share)

    @classmethod
    def open(cls, config: FinetuneConfig, share: BatchShare, training: bool = True) -> TaskData:
        """Opens and verifies the splits of a run.

        Args:
            config: the run.
            share: which part of the batches this process needs.
            training: whether the training split is needed.

        Raises:
            ConfigError: options that are missing or contradict each other or the data.
            DataError: a split that is missing, damaged, or made with another tokenizer.
            ValueError: a tokenizer that cannot be read.
        """
        task = config.task
        if not task.data:
            raise ConfigError("--task.data is missing: the --output of tools/prepare_task.py")
        tokenizer = None
        if task.spec.texts:
            if not config.data.text_tokenizer:
                raise ConfigError(
                    f"--data.text_tokenizer is missing: --task {task.name} reads text"
                )
            tokenizer = open_text_tokenizer(config.data)
        labels = load_labels(task.data) if task.spec.has_labels else None
        fingerprint = tokenizer.fingerprint if tokenizer else None

        def open_split(name: str) -> TaskDataset:
            dataset = TaskDataset.open(f"{task.data}_{name}", task.name, fingerprint)
            if labels is not None and dataset.labels_sha256 != labels.sha256:
                raise DataError(
                    f"{dataset.prefix}.json: made with other labels than {task.data}_labels.json"
                )
            return dataset

        train = open_split(task.train_split) if training else None
        splits = [open_split(name) for name in task.splits]
        if training and labels is not None:
            assert train is not None
            _require_labels(train, "cannot train")
            if task.save_best:
                _require_labels(splits[0], "cannot choose the best checkpoint")
        config = _complete(config, tokenizer, labels, train)
        return cls(config, share, labels, tokenizer, train, splits)

    def _samples(self, dataset: TaskDataset, stream: int) -> TaskSamples:
        model = self.config.model
        alone = self.config.task.spec.stream.texts
        length = model.text_length if alone else model.pair_text_length
        text = TextFormat.of(self.tokenizer, length) if self.tokenizer else None
        rngs = SampleRngs(self.config.train.seed, stream, stream == TRAIN_STREAM)
        return TaskSamples(dataset, self.config, text, rngs, self.share)

    def loader(self, split: str, first_micro_batch: int, num_micro_batches: int | None) -> Loader:
        """Training micro-batches of this process in order, as `Trainer` asks for them."""
        assert split == "train" and self.train is not None
        keys, data = Numbers(first_micro_batch, num_micro_batches), self.config.data
        return Loader(self.train, keys, data.num_workers, data.prefetch)

    def summary(self) -> list[str]:
        """Lines for the log."""
        task, train = self.config.task, self.config.train
        lines = []
        if self.train is not None:
            count = len(self.train.samples)
            epochs = train.steps * task.global_batch_size / count
            lines.append(
                f"{task.name}: {count:,} training samples, {train.steps:,} steps of "
                f"{task.global_batch_size:,} = {epochs:.2f} epochs"
            )
        lines += [f"{task.name} {s.name}: {len(s.dataset):,} samples" for s in self.splits]
        if self.labels is not None:
            lines.append(f"{task.name}: {len(self.labels.labels):,} classes")
        if task.spec.target == "match" and self.train is not None:
            lines.append(self._pool_line())
        return lines

    def _pool_line(self) -> str:
        """How many negatives the contrastive loss sees."""
        task = self.config.task
        pool = task.micro_batch_size * self.share.data_size
        if self.config.contrastive.cache:
            line = f"{task.name}: negatives from all {task.global_batch_size:,} pairs of a step (cached gradients)"
            if self.config.moe.capacity_factor > 0.0 and has_experts(self.config.moe):
                line += (
                    "; with moe.capacity_factor > 0 the two passes may drop different tokens, and the gradients are "
                    "an approximation"
                )
            return line
        line = (
            f"{task.name}: negatives from {pool:,} pairs (a micro-batch on all data-parallel ranks)"
        )
        if pool < task.global_batch_size:
            line += (
                f", fewer than the {task.global_batch_size:,} of a step: --contrastive.cache sees all, "
                "a larger task.micro_batch_size more"
            )
        return line


def _complete(
    config: FinetuneConfig,
    tokenizer: TextTokenizer | None,
    labels: Labels | None,
    train: TaskDataset | None,
) -> FinetuneConfig:
    """Fills in vocabulary, classes, batch sizes and lengths."""
    model, task = config.model, config.task
    if tokenizer is not None:
        if model.vocab_size not in (0, tokenizer.size):
            raise ConfigError(
                f"data.text_tokenizer {config.data.text_tokenizer} has {tokenizer.size} pieces, "
                f"but the model has model.vocab_size={model.vocab_size}"
            )
        model = replace(model, vocab_size=tokenizer.size)
    if labels is not None:
        if task.num_classes not in (0, len(labels.labels)):
            raise ConfigError(
                f"task.num_classes={task.num_classes}, but {task.data}_labels.json has "
                f"{len(labels.labels)}"
            )
        if train is None and task.labels_sha256 not in ("", labels.sha256):
            raise ConfigError(
                f"--task.data {task.data}: its labels are not those that the checkpoint was trained on"
            )
        task = replace(task, num_classes=len(labels.labels), labels_sha256=labels.sha256)
    config = replace(config, model=model, task=task)
    config = replace(config, data=with_batch_sizes(config))
    return config if train is None else _with_schedule(config, len(train))


def _require_labels(split: TaskDataset, reason: str) -> None:
    """The splits to train on and to choose the best checkpoint by must say what is right."""
    if not any(split.row(number).labels for number in range(len(split))):
        raise ConfigError(f"{split.prefix}: has no labels and {reason}; name another split")


def with_batch_sizes(config: FinetuneConfig) -> DataConfig:
    """The data section with the numbers of texts, images and pairs of the task's samples."""
    shape, task = config.sample_shape, config.task
    sizes: dict[str, Any] = {}
    for name in ("texts", "images", "pairs"):
        sizes[f"micro_{name}"] = getattr(shape, name) * task.micro_batch_size
        sizes[f"global_{name}"] = getattr(shape, name) * task.global_batch_size
    return replace(config.data, **sizes)


def _with_schedule(config: FinetuneConfig, num_samples: int) -> FinetuneConfig:
    """Steps, warm-up and evaluation interval from epochs."""
    task, train, optim = config.task, config.train, config.optim
    per_epoch = num_samples / task.global_batch_size
    steps = train.steps or max(1, math.ceil(task.epochs * per_epoch))
    warmup = optim.lr_warmup_steps
    if warmup < 0:
        warmup = int(task.warmup_fraction * steps)
    interval, save_interval = train.eval_interval, config.checkpoint.save_interval
    if task.eval_epochs > 0.0:
        interval = max(1, round(task.eval_epochs * per_epoch))
        # A run that is killed goes on from its last evaluation.
        save_interval = save_interval or interval
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save_interval=save_interval),
        train=replace(train, steps=steps, eval_interval=interval),
        optim=replace(optim, lr_warmup_steps=warmup),
    )
