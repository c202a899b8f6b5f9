"""Checks of the options of a downstream task, each refused with one line that names the option and the reason."""

from __future__ import annotations

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.hints import near_multiples
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.validate import (
    check_dataset_prefixes,
    check_exit_signals,
    check_ranges,
)
from megatron_vlmoe.stream.sizes import batch_sizes_that_fit, data_parallel_size


def validate_task(config: FinetuneConfig, world_size: int, training: bool = True) -> None:
    """Checks everything that does not need the data.

    Args:
        config: the run.
        world_size: processes of the run.
        training: whether it trains.

    Raises:
        ConfigError: on the first contradiction.
    """
    check_exit_signals(config.train.exit_signals)
    check_ranges(config)
    check_dataset_prefixes("task.data", [config.task.data])
    data_size = data_parallel_size(config.parallel, world_size)
    _check_batches(config, data_size, training)
    for name in ("seeds", "eval_splits"):
        values = list(getattr(config.task, name))
        _require(len(set(values)) == len(values), f"task.{name}={values} lists one twice")
    if training:
        _check_training(config)
    _check_retrieval(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_batches(config: FinetuneConfig, data_size: int, training: bool) -> None:
    task, tensor = config.task, config.parallel.tensor_model_parallel_size
    sizes = {
        "eval_micro_batch_size"
        if task.eval_micro_batch_size
        else "micro_batch_size": task.eval_batch
    }
    if training:
        sizes["micro_batch_size"] = task.micro_batch_size
    for name, size in sizes.items():
        _require(size >= 1, f"task.{name}={size} must be at least 1")
        _require(
            size % tensor == 0,
            f"task.{name}={size} is not divisible by parallel.tensor_model_parallel_size={tensor}: "
            f"--task.{name} {near_multiples(size, tensor)} fits",
        )
    if not training:
        return
    micro, total = task.micro_batch_size, task.global_batch_size
    if total < 1 or total % (micro * data_size):
        options = {("task.micro_batch_size", "task.global_batch_size"): (micro, total)}
        raise ConfigError(
            f"task.global_batch_size={total} is not a multiple of task.micro_batch_size={micro} x "
            f"{data_size} data-parallel rank(s){batch_sizes_that_fit(options, data_size, tensor)}"
        )


def _check_training(config: FinetuneConfig) -> None:
    task, optim, steps = config.task, config.optim, config.train.steps
    _require(steps >= 0, f"train.steps={steps} must not be negative")
    _require(
        steps > 0 or task.epochs > 0.0, f"task.epochs={task.epochs} and train.steps=0: no length"
    )
    _require(
        0.0 <= task.warmup_fraction <= 1.0,
        f"task.warmup_fraction={task.warmup_fraction} is not in [0, 1]",
    )
    _require(task.eval_epochs >= 0.0, f"task.eval_epochs={task.eval_epochs} must not be negative")
    _require(
        0.0 < optim.layer_decay <= 1.0, f"optim.layer_decay={optim.layer_decay} is not in (0, 1]"
    )
    _require(
        optim.head_lr_multiplier > 0.0,
        f"optim.head_lr_multiplier={optim.head_lr_multiplier} must be positive",
    )
    _require(
        task.early_stopping >= 0, f"task.early_stopping={task.early_stopping} must not be negative"
    )
    _require(
        not task.early_stopping or task.save_best,
        f"task.early_stopping={task.early_stopping} needs task.save_best=true",
    )
    _require(
        0.0 <= task.label_smoothing < 1.0,
        f"task.label_smoothing={task.label_smoothing} is not in [0, 1)",
    )
    _require(
        task.label_smoothing == 0.0 or task.spec.target == "class",
        f"task.label_smoothing={task.label_smoothing}: {task.name} has no classes to smooth over",
    )
    for name in ("mixup", "cutmix"):
        alpha = getattr(task, name)
        _require(alpha >= 0.0, f"task.{name}={alpha} must not be negative")
        _require(
            alpha == 0.0 or task.spec.mixes_images,
            f"task.{name}={alpha}: {task.name} does not mix images, only tasks of one image and its class do",
        )
    _require(
        0.0 <= task.random_erase <= 1.0, f"task.random_erase={task.random_erase} is not in [0, 1]"
    )


def _check_retrieval(config: FinetuneConfig) -> None:
    options, model = config.contrastive, config.model
    matches = config.task.spec.target == "match"
    _require(
        not matches or model.text_length == model.pair_text_length,
        f"model.text_length={model.text_length} and model.pair_text_length={model.pair_text_length}: "
        f"{config.task.name} reads the same captions alone and in pairs",
    )
    _require(
        options.contrastive_weight > 0.0,
        f"contrastive.contrastive_weight={options.contrastive_weight} must be positive: "
        "without it nothing trains the encodings",
    )
    for name in ("matching_weight", "rerank"):
        value = getattr(options, name)
        _require(value >= 0, f"contrastive.{name}={value} must not be negative")
    _require(
        options.temperature > 0.0, f"contrastive.temperature={options.temperature} must be positive"
    )
    _require(
        not options.cache or matches,
        f"contrastive.cache=true is for retrieval, not for {config.task.name}",
    )
    _require(
        not options.rerank or options.matching_weight > 0.0,
        f"contrastive.rerank={options.rerank} needs the matching head: contrastive.matching_weight is 0",
    )
