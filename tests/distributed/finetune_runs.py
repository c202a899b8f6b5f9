"""What the processes of a layout do in fine-tuning: a few steps on prepared tasks, and an evaluation."""

from __future__ import annotations

from typing import Any

from helpers import Layout
from training_runs import shards

# A model as small as the layouts allow; nothing is dropped, stochastic depth is on.
SMALL = """
--task.architecture tiny-8e --model.num_layers 4 --model.hidden_size 64 --model.num_attention_heads 4
--model.ffn_hidden_size 128 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8
--model.text_length 24 --model.pair_text_length 24 --model.drop_path 0.2 --moe.layers 2 4
--moe.num_vision_experts 8 --moe.num_text_experts 4 --moe.capacity_factor 8 --moe.eval_capacity_factor 0
--task.micro_batch_size 4 --task.global_batch_size 8 --task.eval_micro_batch_size 6 --task.eval_epochs 0
--optim.optimizer sgd --optim.lr 0.1 --optim.lr_warmup_steps 0 --optim.lr_decay_style constant --optim.clip_grad 1.0
--contrastive.matching_weight 1 --parallel.use_distributed_optimizer false --data.num_workers 0
--train.steps 3 --log.interval 1
""".split()


def task_config(task: str, prefix: str, tokenizer: str, where: Layout, *arguments: str) -> Any:
    """A fine-tuning run of the small model."""
    from megatron_vlmoe.finetune.options import parse_finetune

    words = ["--task", task, "--preset", f"sample-{task}", *SMALL, "--task.data", prefix]
    words += ["--data.text_tokenizer", tokenizer, *where.arguments, *arguments]
    return parse_finetune(words).config


def start(config: Any, where: Layout) -> tuple[Any, ...]:
    """Process groups, data, model and objective of a run."""
    from megatron_vlmoe.data.collate import BatchShare
    from megatron_vlmoe.finetune.data import TaskData
    from megatron_vlmoe.finetune.run import build_objective
    from megatron_vlmoe.runtime.distributed import initialize

    ranks = initialize(config.parallel, config.train.seed)
    from megatron_vlmoe.model.task_heads import build_task_heads
    from megatron_vlmoe.planning.validate import validate
    from megatron_vlmoe.train.setup import build_training
    from megatron_vlmoe.train.step import StepRunner

    data = TaskData.open(config, BatchShare.of(ranks))
    config = data.config
    validate(config, where.world)
    parts = build_training(config, "fp32", build_task_heads)
    objective = build_objective(config, ranks, data)
    return config, ranks, data, parts, objective, StepRunner(config, parts, ranks)


def finetune(
    where: Layout, task: str, prefix: str, tokenizer: str, arguments: tuple[str, ...], steps: int
) -> dict[str, Any]:
    """Trains; reports losses and norms of every step, the first step's gradients, the weights and an evaluation."""
    from megatron_vlmoe.stream.sizes import num_micro_batches

    config = task_config(task, prefix, tokenizer, where, *arguments)
    config, ranks, data, parts, objective, runner = start(config, where)
    count = num_micro_batches(config, ranks.data_size)
    batches = iter(data.loader("train", 0, None))
    report: dict[str, Any] = {"start": shards(parts), "steps": []}
    for step in range(steps):
        runner.start_step()
        results = runner.train(batches, count, objective)
        if step == 0:
            report["gradients"] = shards(parts, gradients=True)
        updated, norm, _ = parts.optimizer.step()
        assert updated
        parts.scheduler.step(increment=1)
        names = results[0] if results else ()
        sums = {name: sum(float(result[name]) for result in results) / count for name in names}
        report["steps"].append({"losses": sums, "grad_norm": float(norm)})
    metrics, found = objective.evaluate_split(runner, data.splits[0])
    report |= {"weights": shards(parts), "metrics": metrics, "found": found, "frozen": parts.frozen}
    return report


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of all ranks; losses are averaged over those that have them.

    Raises:
        AssertionError: if ranks disagree on a norm, a metric or a replica.
    """
    from helpers import assemble

    steps = []
    for parts in zip(*(result["steps"] for result in results)):
        known = [part["losses"] for part in parts if part["losses"]]
        losses = {name: sum(own[name] for own in known) / len(known) for name in known[0]}
        assert len({part["grad_norm"] for part in parts}) == 1, "ranks disagree on the norm"
        steps.append(losses | {"grad_norm": parts[0]["grad_norm"]})
    for result in results:
        assert result["metrics"] == results[0]["metrics"], "ranks disagree on the evaluation"
    names = ("start", "gradients", "weights")
    whole = {name: assemble([result[name] for result in results]) for name in names}
    return {"steps": steps, **whole, **{k: results[0][k] for k in ("metrics", "found", "frozen")}}
