"""Contradictions among the options of a task, each refused with a line that names the option."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import OptimConfig, TrainConfig
from megatron_vlmoe.config.task_schema import ContrastiveConfig, FinetuneConfig, TaskConfig
from megatron_vlmoe.planning.validate import validate_task

CONFIG = FinetuneConfig(task=TaskConfig(micro_batch_size=2, global_batch_size=8))


def test_a_sound_configuration_passes() -> None:
    validate_task(CONFIG, world_size=4)


@pytest.mark.parametrize(
    "options",
    [
        {"global_batch_size": 7},
        {"global_batch_size": 2},
        {"eval_splits": ("val", "val")},
        {"seeds": (1, 1)},
        {"warmup_fraction": 1.5},
        {"early_stopping": 1, "save_best": False},
        {"label_smoothing": 0.1},
        {"mixup": 0.8},
    ],
    ids=str,
)
def test_an_option_of_the_task_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"task.{next(iter(options))}="):
        validate_task(replace(CONFIG, task=replace(CONFIG.task, **options)), world_size=2)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"optim": OptimConfig(layer_decay=0.0)}, "optim.layer_decay=0.0"),
        ({"optim": OptimConfig(head_lr_multiplier=0.0)}, "optim.head_lr_multiplier=0.0"),
        ({"train": TrainConfig(steps=-1)}, "train.steps=-1"),
        ({"train": TrainConfig(exit_signals=("SIGUSR2", "SIG_IGN"))}, "exit_signals has SIG_IGN,"),
        ({"train": TrainConfig(exit_signals=("SIGKILL",))}, "exit_signals has SIGKILL,"),
        (
            {"train": TrainConfig(steps=0), "task": replace(CONFIG.task, epochs=0.0)},
            "task.epochs=0.0",
        ),
        ({"contrastive": ContrastiveConfig(cache=True)}, "contrastive.cache=true"),
        ({"contrastive": ContrastiveConfig(temperature=0.0)}, "contrastive.temperature=0.0"),
    ],
    ids=str,
)
def test_an_option_of_another_section_is_named(section: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate_task(replace(CONFIG, **section), world_size=1)


def test_a_graph_is_not_for_retrieval() -> None:
    train = TrainConfig(cuda_graph=True, counter_draws=True)
    validate_task(replace(CONFIG, train=train), 1)
    retrieval = replace(CONFIG, train=train, task=replace(CONFIG.task, name="retrieval"))
    with pytest.raises(ConfigError, match="train.cuda_graph=true is not for retrieval"):
        validate_task(retrieval, 1)
    validate_task(retrieval, 1, training=False)


def test_evaluation_needs_no_training_options() -> None:
    options = {"epochs": 0.0, "global_batch_size": 7}
    validate_task(replace(CONFIG, task=replace(CONFIG.task, **options)), 2, training=False)
    with pytest.raises(ConfigError, match="task.eval_splits"):
        twice = replace(CONFIG, task=replace(CONFIG.task, eval_splits=("val", "val")))
        validate_task(twice, 1, training=False)
