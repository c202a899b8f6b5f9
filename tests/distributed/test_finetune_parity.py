"""Fine-tuning computes at every parallel layout what one process computes, and freezes what it should."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from finetune_runs import finetune, merged
from helpers import Layout, Workers, assert_close, assert_identical, layout
from prepared_tasks import Prepared

TASKS = ("vqa", "nlvr2", "retrieval", "imagenet", "mnli")
ALONE = Layout(1)
LAYOUTS = {"tp2": layout(2, tp=2), "ep2": layout(2, ep=2), "pp2": layout(2, pp=2)}
# Gradients of the two pictures of a sentence nearly cancel in the lower blocks, and a bias that starts at zero is
# nothing but its gradients: relative to their largest entry, rounding is larger there than in pretraining.
ROUNDING = 2e-5
# One pool of pairs on every layout, and nothing that is drawn per micro-batch.
WHOLE_POOL = "--model.drop_path 0 --contrastive.matching_weight 0".split()


@pytest.fixture(scope="session")
def run(workers: Workers, prepared: Prepared) -> Any:
    """Runs of a task by layout and options, each made once."""
    known: dict[Any, Any] = {}

    def get(task: str, where: Layout = ALONE, *arguments: str, steps: int = 2) -> Any:
        key = (task, where, arguments, steps)
        if key not in known:
            prefix, tokenizer = prepared.prefix(task), prepared.tokenizer
            results = workers.run(where, finetune, where, task, prefix, tokenizer, arguments, steps)
            known[key] = merged(results)
        return known[key]

    return get


def compare(actual: Any, expected: Any, what: str) -> None:
    assert_identical(actual["start"], expected["start"], f"{what}: initial weights")
    for number, (mine, theirs) in enumerate(zip(actual["steps"], expected["steps"], strict=True)):
        assert_close(mine, theirs, f"{what}: step {number + 1}")
    for name in ("gradients", "weights"):
        assert_close(actual[name], expected[name], f"{what}: {name}", ROUNDING)
    assert_close(actual["found"], expected["found"], f"{what}: evaluation")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("task", TASKS)
def test_a_step_equals_one_process(task: str, name: str, run: Any) -> None:
    # With expert parallelism come two data-parallel ranks, and for retrieval a pool of both.
    alone = layout(2) if task == "retrieval" and name == "ep2" else ALONE
    compare(run(task, LAYOUTS[name]), run(task, alone), f"{task} at {name}")


@pytest.mark.parametrize("task", ["retrieval", "mnli"])
def test_interleaved_stages_equal_one_process(task: str, run: Any) -> None:
    compare(run(task, layout(2, pp=2, vpp=2)), run(task), f"{task} interleaved")


@pytest.mark.parametrize("task", ["vqa", "mnli"])
def test_trained_experts_equal_one_process(task: str, run: Any) -> None:
    options = ("--moe.train_experts", "true")
    where = layout(4, tp=2, ep=2)
    compare(run(task, where, *options), run(task, ALONE, *options), task)


def test_layer_decay_and_head_rate_are_the_same_on_every_stage(run: Any) -> None:
    options = ("--optim.layer_decay", "0.5", "--optim.head_lr_multiplier", "3")
    expected = run("vqa", ALONE, *options)
    compare(run("vqa", LAYOUTS["pp2"], *options), expected, "vqa")
    # The first SGD step goes along the gradient, each parameter at its own rate.
    first = run("vqa", ALONE, *options, steps=1)
    norm = first["steps"][0]["grad_norm"]
    rates = {
        "embedding.image.bias": 0.5**5,
        "decoder.layers.0.gamma_1": 0.5**4,
        "decoder.layers.3.gamma_1": 0.5,
        "decoder.final_layernorm.bias": 1.0,
        "heads.pooler.dense.bias": 1.0,
        "heads.classifier.output.bias": 3.0,
    }
    for key, factor in rates.items():
        moved = first["weights"][key] - first["start"][key]
        expected_move = -0.1 * factor * first["gradients"][key] / max(1.0, norm)
        np.testing.assert_allclose(moved, expected_move, rtol=2e-2, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("counter", ["false", "true"])
def test_the_pass_without_gradient_sees_the_draws_of_training(counter: str, run: Any) -> None:
    # One micro-batch is the whole pool: the same loss, cached or not, with stochastic depth and matching on.
    options = ("--task.micro_batch_size", "8", "--model.drop_path", "0.5")
    options += ("--train.counter_draws", counter)
    cached = run("retrieval", ALONE, *options, "--contrastive.cache", "true")
    compare(cached, run("retrieval", ALONE, *options), "cached gradients with stochastic depth")


def test_batches_in_the_tensors_of_a_graph_are_the_same(run: Any) -> None:
    # Three steps, as many as come before the graph.
    options = ("--train.counter_draws", "true", "--task.mixup", "0.8")
    graph = run("imagenet", ALONE, *options, "--train.cuda_graph", "true", steps=3)
    plain = run("imagenet", ALONE, *options, steps=3)
    assert graph["steps"] == plain["steps"] and plain["steps"][1] != plain["steps"][2]
    assert_identical(graph["weights"], plain["weights"], "weights")


@pytest.mark.parametrize("name", ["alone", "pp2"])
def test_the_pass_without_gradient_is_not_counted(
    name: str, workers: Workers, prepared: Prepared
) -> None:
    where = LAYOUTS.get(name, ALONE)
    prefix, tokenizer = prepared.prefix("retrieval"), prepared.tokenizer
    counted = workers.run(where, micro_batches_counted, where, prefix, tokenizer)[0]
    # Blocks 2 and 4, of which the last one routes no pairs; both pools of either see two micro-batches in two steps.
    assert len(counted) == 4 and set(counted.values()) == {4.0}


def micro_batches_counted(where: Layout, prefix: str, tokenizer: str) -> dict[str, float]:
    """Micro-batches that every pool of a block has counted in two training steps with hard negatives."""
    from finetune_runs import start, task_config

    config = task_config("retrieval", prefix, tokenizer, where)
    config, _, data, parts, objective, runner = start(config, where)
    from megatron_vlmoe.moe.router import HEADER
    from megatron_vlmoe.train.metrics import collect

    assert objective.matches
    batches = iter(data.loader("train", 0, None))
    for _ in range(2):
        runner.start_step()
        runner.train(batches, 2, objective)
    counters = collect(parts.chunks, config)
    place = HEADER.index("micro_batches")
    return {f"{block} {pool}": float(vector[place]) for (block, pool), vector in counters.items()}


def test_contrastive_loss_of_two_ranks_is_that_of_the_whole_batch(run: Any) -> None:
    whole = ("--task.micro_batch_size", "8", *WHOLE_POOL)
    alone = run("retrieval", ALONE, *whole)
    compare(run("retrieval", layout(2), *WHOLE_POOL), alone, "two ranks")
    cached = (*WHOLE_POOL, "--contrastive.cache", "true")
    compare(run("retrieval", ALONE, *cached), alone, "cached gradients")
    small = ("--task.micro_batch_size", "2", *cached)
    compare(run("retrieval", layout(2), *small), alone, "cached gradients on two ranks")
    # Without the cache the pool of a small micro-batch is another loss.
    apart = run("retrieval", ALONE, *WHOLE_POOL)
    assert apart["steps"][0]["contrastive"] < alone["steps"][0]["contrastive"] - 0.1


@pytest.mark.parametrize("task", ["vqa", "imagenet", "mnli"])
def test_experts_and_what_is_not_reached_keep_their_bits(task: str, run: Any) -> None:
    report = run(task)
    start, end = report["start"], report["weights"]
    still = {key for key in start if np.array_equal(start[key], end[key])}
    frozen = {key for key in start if ".experts." in key or ".router." in key}
    assert frozen and frozen <= still
    assert not any(key.startswith("heads.") for key in still)
    unreached = {
        "vqa": {"embedding.image.mask_token", "text_norm", "text_ffn", "vision_norm", "vision_ffn"},
        "imagenet": {"embedding.text", "embedding.image.mask_token", "text_", "vl_"},
        "mnli": {"embedding.image", "vision_", "vl_"},
    }[task]
    for key in still - frozen:
        assert any(part in key for part in unreached), f"{key} did not move"
    assert {key for key in report["gradients"]} == start.keys() - still


def test_only_trained_parameters_have_optimizer_state(workers: Workers, prepared: Prepared) -> None:
    arguments = ("--optim.optimizer", "adam", "--parallel.use_distributed_optimizer", "true")
    prefix, tokenizer = prepared.prefix("mnli"), prepared.tokenizer
    sizes = workers.run(1, optimizer_size, ALONE, "mnli", prefix, tokenizer, arguments)[0]
    assert sizes["state"] == 2 * sizes["trained"] < sizes["all"]


def optimizer_size(
    where: Layout, task: str, prefix: str, tokenizer: str, arguments: tuple[str, ...]
) -> dict[str, int]:
    from finetune_runs import start, task_config

    config = task_config(task, prefix, tokenizer, where, *arguments)
    config, _, data, parts, objective, runner = start(config, where)
    runner.start_step()
    runner.train(iter(data.loader("train", 0, None)), 2, objective)
    parts.optimizer.step()
    optimizers = getattr(parts.optimizer, "chained_optimizers", [parts.optimizer])
    state = sum(
        value.numel()
        for optimizer in optimizers
        if optimizer.optimizer is not None
        for own in optimizer.optimizer.state.values()
        for name, value in own.items()
        if name in ("exp_avg", "exp_avg_sq")
    )
    parameters = [p for chunk in parts.chunks for p in chunk.parameters()]
    return {
        "state": state,
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "all": sum(p.numel() for p in parameters),
    }
