"""Every parallel layout computes what one process computes, from the same seed and the same micro-batches.

Nothing is dropped (the capacity is the number of tokens); auxiliary losses, router noise and stochastic
depth are on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers import Layout, Workers, assert_close, assert_identical, layout
from training_runs import merge, run, train_uncompiled

from megatron_vlmoe.moe.router import HEADER

SGD = (
    *("--optim.optimizer", "sgd", "--optim.lr", "0.3", "--optim.clip_grad", "1.0"),
    *("--parallel.use_distributed_optimizer", "false"),
)
LAYOUTS = {
    "dp2": layout(2),
    "tp2": layout(2, tp=2),
    "pp2": layout(2, pp=2),
    "pp2-interleaved": layout(2, pp=2, vpp=2),
    "ep2": layout(2, ep=2),
    "ep4": layout(4, ep=4),
    "tp2-ep2": layout(4, tp=2, ep=2),
    "tp2-ep2-on-2": layout(2, tp=2, ep=2),
    "pp2-ep2": layout(4, pp=2, ep=2),
    "tp2-pp2": layout(4, tp=2, pp=2),
}


@pytest.fixture(scope="session")
def alone(workers: Workers) -> Any:
    """Runs of one process by their options, each made once."""
    known: dict[tuple[str, ...], Any] = {}

    def get(*arguments: str) -> Any:
        if arguments not in known:
            known[arguments] = run(workers, Layout(1), *arguments)
        return known[arguments]

    return get


def compare(actual: Any, expected: Any, weights: bool = True, skip_slots: bool = False) -> None:
    for number, (mine, theirs) in enumerate(
        zip(actual["steps"], expected["steps"], strict=True), 1
    ):
        assert_close(mine["losses"], theirs["losses"], f"losses of step {number}")
        counters = [dict(part["counters"]) for part in (mine, theirs)]
        for part in counters if skip_slots else ():
            for key, vector in part.items():
                part[key] = np.delete(vector, HEADER.index("slots"))
        assert_close(*counters, f"MoE counters of step {number}")
        norms = {"grad_norm": mine["grad_norm"]}, {"grad_norm": theirs["grad_norm"]}
        assert_close(*norms, f"step {number}")
        if "gradients" in mine and weights:
            assert_close(mine["gradients"], theirs["gradients"], f"gradients of step {number}")
    if weights:
        assert_close(actual["weights"], expected["weights"], "weights")
    assert_close(actual["evaluation"], expected["evaluation"], "evaluation")


@pytest.mark.parametrize("name", LAYOUTS)
def test_sgd_equals_one_process(name: str, workers: Workers, alone: Any) -> None:
    compare(run(workers, LAYOUTS[name], *SGD), alone(*SGD))


@pytest.mark.parametrize("name", LAYOUTS)
def test_adamw_with_distributed_optimizer_equals_one_process(
    name: str, workers: Workers, alone: Any
) -> None:
    compare(run(workers, LAYOUTS[name], gradients=False), alone(), weights=False)


def test_the_comparison_sees_everything(alone: Any) -> None:
    report = alone(*SGD)
    first, last = report["steps"][0], report["steps"][-1]
    assert len(first["losses"]) == 4 * 5 and len(first["counters"]) == 2 * 2
    assert first["gradients"].keys() == report["weights"].keys()
    for key, gradient in first["gradients"].items():
        assert np.abs(gradient).max() > 1e-7, key
    assert last["losses"].keys().isdisjoint(first["losses"].keys())


VARIANTS = {
    "top-2": ("tp2-ep2", "--moe.topk 2 --moe.normalize_gate true"),
    "experts-on-vl": ("tp2-ep2", "--moe.vl true --moe.num_vl_experts 4"),
    "shared-router": (
        "tp2-ep2",
        "--moe.shared_router true --moe.text_aux.local_entropy 1 --moe.vision_aux.global_entropy 1 "
        "--moe.vision_aux.global_entropy_experts 7.9 --moe.aux_loss_coefficient 0.1",
    ),
    "text-experts": ("pp2-ep2", "--moe.modalities text"),
    "vision-experts": ("ep2", "--moe.modalities vision"),
    "dense": ("tp2-pp2", "--moe.modalities none --moe.layers []"),
    "all-auxiliary-losses": (
        "tp2",
        "--moe.aux_loss_coefficient 0.1 --moe.text_aux.z 1 --moe.text_aux.local_entropy 1 "
        "--moe.text_aux.global_entropy 1 --moe.vision_aux.gshard 1 --moe.vision_aux.z 1",
    ),
    "route-padding": ("ep2", "--moe.route_padding true"),
    "expert-choice": ("pp2-ep2", "--moe.routing expert_choice --moe.capacity_factor 1.5"),
    # As a capacity is one rank's, so is what an expert chooses from: equal where it takes all.
    "expert-choice-of-all": ("tp2", "--moe.routing expert_choice"),
    "balance-bias": ("tp2-ep2", "--moe.balance_bias_rate 0.01 --moe.topk 2"),
    "balance-bias-interleaved": ("pp2-interleaved", "--moe.balance_bias_rate 0.01"),
    "packed-documents": ("tp2-pp2", "--data.reset_attention true"),
    "texts-only": ("tp2", "--data.micro_images 0 --data.micro_pairs 0"),
    "pairs-only": ("pp2", "--data.micro_images 0 --data.micro_texts 0"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_model_variants_equal_one_process(name: str, workers: Workers, alone: Any) -> None:
    where, options = VARIANTS[name]
    arguments = (*SGD, *options.split())
    compare(run(workers, LAYOUTS[where], *arguments), alone(*arguments))


def test_a_bias_has_moved_every_expert_by_whole_steps(alone: Any) -> None:
    _, options = VARIANTS["balance-bias"]
    report = alone(*SGD, *options.split())
    plain = alone(*SGD, "--moe.topk", "2")
    biases = {k: v for k, v in report["weights"].items() if k.endswith("balance_bias")}
    assert len(biases) == 4 and not any(k.endswith("balance_bias") for k in plain["weights"])
    for key, bias in biases.items():
        steps = bias / 0.01
        # Three steps, up or down or not at all.
        assert np.abs(steps - steps.round()).max() < 1e-4 and np.abs(steps).max() <= 3.01, key
        assert np.abs(steps).max() > 0.5, key
    first = [run["steps"][0]["losses"] for run in (report, plain)]
    last = [run["steps"][-1]["losses"] for run in (report, plain)]
    assert first[0] == first[1] and last[0] != last[1]


def test_recomputed_blocks_count_once(workers: Workers, alone: Any) -> None:
    options = (*SGD, *VARIANTS["balance-bias"][1].split())
    actual = run(workers, LAYOUTS["pp2"], *options, "--train.recompute", "full")
    compare(actual, alone(*options))


COUNTER = ("--train.counter_draws", "true")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tp2-ep2", ()),
        ("pp2-interleaved", ("--train.recompute", "full")),
        ("ep2", ("--moe.dispatcher", "alltoall")),
    ],
)
def test_draws_of_a_counter_equal_one_process(
    name: str, options: tuple[str, ...], workers: Workers, alone: Any
) -> None:
    expected = alone(*SGD, *COUNTER)
    compare(
        run(workers, LAYOUTS[name], *SGD, *COUNTER, *options), expected, skip_slots=name == "ep2"
    )
    # Other numbers than those of generators, of which there are no more in evaluation.
    plain = alone(*SGD)
    first = [report["steps"][0]["losses"] for report in (expected, plain)]
    assert first[0] != first[1]


CONTRASTIVE = (
    *("--objectives.kind", "contrastive", "--data.micro_texts", "0", "--data.micro_images", "0"),
    *("--optim.lr", "0.1"),
)


# With expert parallelism come two data-parallel ranks, and a pool of negatives of both.
@pytest.mark.parametrize(
    ("name", "alone_at"), [("tp2", "one"), ("pp2-interleaved", "one"), ("ep2", "dp2")]
)
def test_contrastive_pretraining_equals_one_process(
    name: str, alone_at: str, workers: Workers
) -> None:
    where = LAYOUTS.get(alone_at, Layout(1))
    options = (*SGD, *CONTRASTIVE, "--moe.shared_router", "true")
    expected = run(workers, where, *options)
    compare(run(workers, LAYOUTS[name], *options), expected)
    first = expected["steps"][0]
    assert first["gradients"].keys() == expected["weights"].keys() - {
        key for key in expected["weights"] if ".vl_" in key or key == "embedding.image.mask_token"
    }
    assert first["losses"]["0/contrastive"] == first["losses"]["0/total"]
    assert 0.0 <= expected["evaluation"]["eval/recall_at_1/text_to_image"] <= 1.0


def test_negatives_come_from_all_data_parallel_ranks(workers: Workers) -> None:
    # Nothing is drawn per micro-batch, and no loss of a router depends on its size.
    options = (*SGD, *CONTRASTIVE, "--moe.modalities", "none", "--moe.layers", "[]")
    options = (*options, "--model.drop_path", "0")
    spread = run(workers, LAYOUTS["dp2"], *options)
    whole = run(workers, Layout(1), *options, "--data.micro_pairs", "4")
    for mine, theirs in zip(spread["steps"], whole["steps"], strict=True):
        losses = [
            np.mean([v for k, v in part["losses"].items() if k.endswith("/contrastive")])
            for part in (mine, theirs)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    assert_close(spread["weights"], whole["weights"], "weights")
    assert_close(spread["evaluation"], whole["evaluation"], "evaluation")
    apart = run(workers, Layout(1), *options)
    assert apart["evaluation"]["eval/loss/contrastive"] < (
        whole["evaluation"]["eval/loss/contrastive"] - 0.3
    )


SAME_RESULT = {
    "alltoall": ("tp2-ep2", "--moe.dispatcher alltoall"),
    "dropless": ("ep2", "--moe.dispatcher dropless"),
    "chunks-recompute": ("pp2-ep2", "--moe.all_to_all_chunks 100 --train.recompute full"),
    "recompute-1f1b": ("pp2", "--train.recompute full"),
    "recompute-tp-ep": ("tp2-ep2-on-2", "--train.recompute full"),
    "recompute-interleaved": ("pp2-interleaved", "--train.recompute full"),
    "head-chunks": ("pp2", "--train.head_chunk_rows 3"),
    "head-chunks-tp": ("tp2-ep2", "--train.head_chunk_rows 4"),
    "no-overlap": ("dp2", "--parallel.overlap_grad_reduce false"),
    "math-attention": ("dp2", "--model.attention_backend math"),
}


@pytest.mark.parametrize("name", SAME_RESULT)
def test_options_that_change_no_result(name: str, workers: Workers, alone: Any) -> None:
    where, options = SAME_RESULT[name]
    actual = run(workers, LAYOUTS[where], *SGD, *options.split())
    compare(actual, alone(*SGD), skip_slots=name in ("alltoall", "dropless"))


def test_functions_that_can_be_compiled_change_no_result(workers: Workers, alone: Any) -> None:
    """Those of the model are in their places; what compiling does to them: tests/unit/test_compiled.py."""
    results = workers.run(LAYOUTS["ep2"], train_uncompiled, LAYOUTS["ep2"], SGD, 3)
    compare(merge(results), alone(*SGD))
    # Cross entropy only in 16 bits: another sum of the same logits.
    options = ("--train.precision", "bf16")
    (mine,) = workers.run(Layout(1), train_uncompiled, Layout(1), options, 1)
    theirs = alone(*options)
    for key, loss in mine["steps"][0]["losses"].items():
        assert loss == pytest.approx(theirs["steps"][0]["losses"][key], rel=1e-6), key
    norms = [run["steps"][0]["grad_norm"] for run in (mine, theirs)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_overlapped_parameter_gather_changes_no_bit(workers: Workers) -> None:
    plain = run(workers, LAYOUTS["dp2"], gradients=False)
    actual = run(
        workers, LAYOUTS["dp2"], "--parallel.overlap_param_gather", "true", gradients=False
    )
    assert_identical(actual["weights"], plain["weights"], "weights")
    compare(actual, plain, weights=False)


def test_last_of_four_stages_without_experts(workers: Workers, alone: Any) -> None:
    options = (*SGD, "--model.num_layers", "8", "--moe.layers", "2", "4", "6")
    report = run(workers, layout(4, pp=4), *options)
    assert {key.split("/")[0] for key in report["steps"][0]["counters"]} == {"2", "4", "6"}
    compare(report, alone(*options))
