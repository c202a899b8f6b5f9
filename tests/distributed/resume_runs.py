"""What a process does to compare a run that was stopped and resumed with one that was not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Iterator, Mapping

import torch
from helpers import Layout
from training_runs import groups, optimizer_shards, shards

# A recipe keeps its optimizer, schedule, layer decay and head factor; the model is small.
SMALL = """
--task.architecture tiny-8e --model.num_layers 2 --model.hidden_size 32 --model.num_attention_heads 2
--model.ffn_hidden_size 32 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 16
--model.text_length 24 --model.pair_text_length 24 --moe.layers 2 --moe.num_vision_experts 2
--moe.num_text_experts 2 --moe.capacity_factor 8 --task.micro_batch_size 4 --task.global_batch_size 4
--task.rand_augment none --data.num_workers 0 --optim.lr 1e-3 --optim.lr_warmup_steps 1 --train.steps 3
--contrastive.matching_weight 0 --model.drop_path 0.1 --log.interval 1 --moe.train_experts true
""".split()
PRETRAIN = ("pretrain", "")


class Run:
    """A run that takes steps in this process.

    Args:
        config: the run.
        ranks: where this process stands.
    """

    def __init__(self, config: Any, ranks: Any) -> None:
        from megatron_vlmoe.data.collate import BatchShare
        from megatron_vlmoe.data.random_batches import RandomData
        from megatron_vlmoe.finetune.data import TaskData
        from megatron_vlmoe.finetune.run import build_objective
        from megatron_vlmoe.model.heads import MaskedHeads
        from megatron_vlmoe.model.task_heads import build_task_heads
        from megatron_vlmoe.planning.validate import validate
        from megatron_vlmoe.stream.sizes import num_micro_batches
        from megatron_vlmoe.train.pretrain import MaskedObjective
        from megatron_vlmoe.train.setup import build_training
        from megatron_vlmoe.train.step import StepRunner

        is_task = hasattr(config, "task")
        data = (TaskData.open if is_task else RandomData)(config, BatchShare.of(ranks))
        self.config = data.config
        validate(self.config, ranks.world_size)
        self.count = num_micro_batches(self.config, ranks.data_size)
        self.parts = build_training(
            self.config, "fp32", build_task_heads if is_task else MaskedHeads
        )
        self.objective: Any = (
            build_objective(self.config, ranks, data)
            if is_task
            else MaskedObjective(self.config, ranks, data, self.count)
        )
        self.data = data
        self.runner = StepRunner(self.config, self.parts, ranks)
        self.batches: Iterator[Any] = iter(data.loader("train", 0, None))

    def steps(self, number: int) -> None:
        """Takes some steps."""
        for _ in range(number):
            self.runner.start_step()
            self.runner.train(self.batches, self.count, self.objective)
            updated, _, _ = self.parts.optimizer.step()
            assert updated
            self.parts.scheduler.step(increment=1)

    def save(self, folder: Path, step: int) -> None:
        """Writes a checkpoint."""
        from megatron_vlmoe.train.checkpoint import CheckpointWriter
        from megatron_vlmoe.train.checkpoint_files import TrainState

        writer = CheckpointWriter(folder, 0, False)
        writer.save(TrainState(step=step), self.config, self.parts)

    def load(self, folder: Path) -> None:
        """Loads it."""
        from megatron_vlmoe.train.checkpoint import load_checkpoint
        from megatron_vlmoe.train.checkpoint_files import find_checkpoint

        path = find_checkpoint(folder)
        assert path is not None
        state = load_checkpoint(path, self.config, self.parts)
        self.batches = iter(self.data.loader("train", state.step * self.count, None))

    def report(self) -> dict[str, Any]:
        """Weights, optimizer state and parameter groups."""
        return {
            "weights": shards(self.parts),
            "optimizer": optimizer_shards(self.parts),
            "groups": groups(self.parts),
        }


def recipe_config(
    recipe: tuple[str, str], prefixes: Mapping[str, str], tokenizer: str, where: Layout, *more: str
) -> Any:
    """The run of a recipe (name, task) with a small model; of pretraining for `PRETRAIN`."""
    from helpers import small_config

    from megatron_vlmoe.finetune.options import parse_finetune

    if recipe == PRETRAIN:
        few = "--model.num_layers 2 --moe.layers 2 --train.steps 3".split()
        few += "--data.global_texts 2 --data.global_images 2 --data.global_pairs 2".split()
        return small_config(*few, *more, where=where)
    name, task = recipe
    words = ["--task", task, "--preset", name, *SMALL, "--task.data", prefixes[task]]
    words += ["--data.text_tokenizer", tokenizer, *where.arguments, *more]
    return parse_finetune(words).config


def stopped_and_resumed(
    where: Layout,
    recipe: tuple[str, str],
    prefixes: Mapping[str, str],
    tokenizer: str,
    arguments: tuple[str, ...],
    folder: str,
    resume_only: bool = False,
) -> dict[str, Any]:
    """Two steps, a checkpoint and a third, and in a new model the third from the checkpoint."""
    from megatron_vlmoe.runtime.distributed import initialize

    config = recipe_config(recipe, prefixes, tokenizer, where, *arguments)
    ranks = initialize(config.parallel, config.train.seed)
    found: dict[str, Any] = {"lr": config.optim.lr}
    if not resume_only:
        run = Run(config, ranks)
        run.steps(2)
        run.save(Path(folder), 2)
        found["stopped"] = run.report()
        run.steps(1)
        found["unbroken"] = run.report()
    run = Run(config, ranks)
    run.load(Path(folder))
    found["loaded"] = run.report()
    run.steps(1)
    found["resumed"] = run.report()
    return found


def adam_step_by_hand(
    where: Layout, before: tuple[str, ...], after: tuple[str, ...], folder: str
) -> dict[str, Any]:
    """Two steps, a checkpoint, and with other options a third step, of which every parameter is computed by hand.

    Returns:
        The largest deviation of a parameter from AdamW's formula, relative to the update, and the groups at that step.
    """
    from megatron_vlmoe.runtime.distributed import initialize

    first = recipe_config(PRETRAIN, {}, "", where, *before)
    ranks = initialize(first.parallel, first.train.seed)
    run = Run(first, ranks)
    run.steps(2)
    run.save(Path(folder), 2)
    run = Run(recipe_config(PRETRAIN, {}, "", where, *after), ranks)
    run.load(Path(folder))
    inner = run.parts.optimizer.chained_optimizers
    at_step = groups(run.parts)
    parameters = [p for part in inner for group in part.param_groups for p in group["params"]]
    states = {id(p): state for part in inner for p, state in part.optimizer.state.items()}
    old = [
        [
            value.double().clone()
            for value in (p, states[id(p)]["exp_avg"], states[id(p)]["exp_avg_sq"])
        ]
        for p in parameters
    ]
    run.runner.start_step()
    run.runner.train(run.batches, run.count, run.objective)
    updated, norm, _ = run.parts.optimizer.step()
    assert updated
    worst = 0.0
    options = run.config.optim
    for p, (value, mean, square) in zip(parameters, old, strict=True):
        # megatron-core has clipped it in place.
        gradient = p.main_grad.double()
        rate, decay = expected_options(run.config, run.parts, p)
        mean = options.adam_beta1 * mean + (1 - options.adam_beta1) * gradient
        square = options.adam_beta2 * square + (1 - options.adam_beta2) * gradient**2
        step = (mean / (1 - options.adam_beta1**3)) / (
            (square / (1 - options.adam_beta2**3)).sqrt() + options.adam_eps
        )
        expected = value * (1 - rate * decay) - rate * step
        error = (p.double() - expected).abs().max() / (expected - value).abs().max()
        assert bool(error.isfinite()), "a parameter has no update"
        worst = max(worst, float(error))
    return {"worst": worst, "norm": float(norm), "groups": at_step, "parameters": len(parameters)}


def expected_options(config: Any, parts: Any, parameter: torch.Tensor) -> tuple[float, float]:
    """Rate and weight decay of a parameter at the third step of a linear decay without warm-up."""
    from megatron_vlmoe.train.setup import has_weight_decay, learning_rate_factor

    (chunk,) = parts.chunks
    name = next(n for n, p in chunk.named_parameters() if p is parameter)
    number = int(name.split(".")[2]) + 1 if name.startswith("decoder.layers.") else 0
    optim = config.optim
    rate = optim.min_lr + (optim.lr - optim.min_lr) * (1 - 2 / config.train.steps)
    decays = has_weight_decay(name, parameter.shape)
    return rate * learning_rate_factor(name, number, config), optim.weight_decay * decays


def loss_scale_after_loading(
    saved: Mapping[str, float], options: tuple[str, ...], anew: bool
) -> Any:
    """A loss scale of fp16 that was loaded into a run with other bounds: scale, good steps, overflows left."""
    from types import SimpleNamespace

    from megatron_vlmoe.config.schema import OptimConfig
    from megatron_vlmoe.runtime.cpu import install_cpu_runtime

    install_cpu_runtime()
    from megatron.core.optimizer.grad_scaler import DynamicGradScaler

    from megatron_vlmoe.train.checkpoint import bound_loss_scale

    optim = OptimConfig(**dict(zip(options[::2], map(int, options[1::2]))))  # type: ignore[arg-type]
    scaler = DynamicGradScaler(
        initial_scale=optim.initial_loss_scale,
        min_scale=optim.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=optim.loss_scale_window,
        hysteresis=optim.hysteresis,
    )
    scaler.load_state_dict({**saved, "scale": torch.tensor([saved["scale"]])})
    bound_loss_scale(SimpleNamespace(grad_scaler=scaler, config=optim), anew)
    loaded = (float(scaler.scale), scaler._growth_tracker, scaler._hysteresis_tracker)
    scaler.update(False)
    return loaded, float(scaler.scale)


def command(name: str, words: tuple[str, ...]) -> str:
    """Runs `finetune` or `evaluate` in this process; what it logged, or the line with which it refused."""
    from megatron_vlmoe.commands.finetune import evaluate_main, main
    from megatron_vlmoe.config.errors import CheckpointError, ConfigError

    lines: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_vlmoe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        (main if name == "finetune" else evaluate_main)(words)
    except (CheckpointError, ConfigError) as error:
        return f"error: {error}"
    return "\n".join(lines)
