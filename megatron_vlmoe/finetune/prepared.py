"""The prepared splits of a task, verified, and the run with the sizes that options leave to them; needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.task_dataset import Labels, TaskDataset, load_labels
from megatron_vlmoe.stream.block_plan import has_experts
from megatron_vlmoe.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class PreparedTask:
    """What a fine-tuning run or an evaluation reads; made by `open`.

    Args:
        config: the run with all sizes filled in.
        labels: the classes; None for retrieval.
        tokenizer: None for a task without text.
        train: the training split; None to evaluate only.
        splits: the evaluation splits, as `task.splits` names them.
    """

    config: FinetuneConfig
    labels: Labels | None
    tokenizer: TextTokenizer | None
    train: TaskDataset | None
    splits: tuple[TaskDataset, ...]

    @classmethod
    def open(cls, config: FinetuneConfig, training: bool = True) -> PreparedTask:
        """Opens and verifies the splits of a run.

        Raises:
            ConfigError: options that are missing or contradict each other or the data.
            DataError: a split that is missing, damaged, or made with another tokenizer.
        """
        task = config.task
        if not task.data:
            raise ConfigError("--task.data is missing: the --output of vlmoe index-task")
        tokenizer = None
        if task.spec.texts:
            if not config.data.text_tokenizer:
                raise ConfigError(
                    f"--data.text_tokenizer is missing: --task {task.name} reads text"
                )
            try:
                tokenizer = TextTokenizer(config.data.text_tokenizer)
            except ValueError as error:
                raise ConfigError(f"data.text_tokenizer: {error}") from error
        labels = load_labels(task.data) if task.spec.has_labels else None
        fingerprint = tokenizer.fingerprint if tokenizer else None

        def open_split(name: str) -> TaskDataset:
            dataset = TaskDataset.open(f"{task.data}_{name}", task.name, fingerprint)
            if labels is not None and dataset.manifest.labels_sha256 != labels.sha256:
                raise DataError(
                    f"{dataset.prefix}.json: made with other labels than {task.data}_labels.json"
                )
            return dataset

        train = open_split(task.train_split) if training else None
        splits = tuple(open_split(name) for name in task.splits)
        if training and labels is not None:
            assert train is not None
            _require_labels(train, "cannot train")
            if task.save_best:
                _require_labels(splits[0], "cannot choose the best checkpoint")
        config = _complete(config, tokenizer, labels, train)
        return cls(config, labels, tokenizer, train, splits)

    def summary(self, data_size: int) -> list[str]:
        """Lines for the log, of a run on so many data-parallel ranks."""
        task, train = self.config.task, self.config.train
        lines = []
        if self.train is not None:
            count = len(self.train)
            epochs = train.steps * task.global_batch_size / count
            lines.append(
                f"{task.name}: {count:,} training samples, {train.steps:,} steps of "
                f"{task.global_batch_size:,} = {epochs:.2f} epochs"
            )
        for name, split in zip(task.splits, self.splits):
            lines.append(f"{task.name} {name}: {len(split):,} samples")
        if self.labels is not None:
            lines.append(f"{task.name}: {len(self.labels.labels):,} classes")
        if task.spec.target != "match" or self.train is None:
            return lines
        # How many negatives the contrastive loss sees.
        pool, step = task.micro_batch_size * data_size, task.global_batch_size
        if self.config.contrastive.cache:
            line = f"negatives from all {step:,} pairs of a step (cached gradients)"
            if self.config.moe.capacity_factor > 0.0 and has_experts(self.config.moe):
                line += (
                    "; with moe.capacity_factor > 0 the two passes may drop different tokens, and the gradients are "
                    "an approximation"
                )
        else:
            line = f"negatives from {pool:,} pairs (a micro-batch on all data-parallel ranks)"
            if pool < step:
                line += (
                    f", fewer than the {step:,} of a step: --contrastive.cache sees all, "
                    "a larger task.micro_batch_size more"
                )
        return [*lines, f"{task.name}: {line}"]


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
    shape = config.sample_shape
    sizes: dict[str, Any] = {}
    for name in ("texts", "images", "pairs"):
        sizes[f"micro_{name}"] = getattr(shape, name) * task.micro_batch_size
        sizes[f"global_{name}"] = getattr(shape, name) * task.global_batch_size
    config = replace(config, model=model, task=task, data=replace(config.data, **sizes))
    if train is None:
        return config
    # Steps, warm-up and evaluation interval from epochs.
    run, optim = config.train, config.optim
    per_epoch = len(train) / task.global_batch_size
    steps = run.steps or max(1, math.ceil(task.epochs * per_epoch))
    warmup = optim.lr_warmup_steps
    if warmup < 0:
        warmup = int(task.warmup_fraction * steps)
    interval, save_interval = run.eval_interval, config.checkpoint.save_interval
    if task.eval_epochs > 0.0:
        interval = max(1, round(task.eval_epochs * per_epoch))
        # A run that is killed goes on from its last evaluation.
        save_interval = save_interval or interval
    return replace(
        config,
        checkpoint=replace(config.checkpoint, save_interval=save_interval),
        train=replace(run, steps=steps, eval_interval=interval),
        optim=replace(optim, lr_warmup_steps=warmup),
    )


def _require_labels(split: TaskDataset, reason: str) -> None:
    """The splits to train on and to choose the best checkpoint by must say what is right."""
    if not any(split.row(number).labels for number in range(len(split))):
        raise ConfigError(f"{split.prefix}: has no labels and {reason}; name another split")
