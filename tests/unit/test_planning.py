"""The planner: collectives, step time and search against hand arithmetic, and the command line."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vlmoe.commands.main import run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.planning.collectives import Collective, collectives_per_step
from megatron_vlmoe.planning.devices import DEVICES, find_device, named_device
from megatron_vlmoe.planning.layout_search import Layout, losers, search
from megatron_vlmoe.planning.step_time import (
    Cluster,
    collective_seconds,
    ranks_on_a_node,
    rates,
    step_time,
)

H100 = Cluster(find_device("h100"), 8, 50e9)
BASE = preset("base-32e")
# BASE/32E: two pools in four blocks, 32 experts of 768 x 3072 x 2 with biases each; all else, routers included.
EXPERT = 2 * 768 * 3072 + 3072 + 768
EXPERTS, ROUTERS = 4 * 2 * 32 * EXPERT, 4 * 2 * 32 * 768
DENSE = 1_432_803_072 - EXPERTS


@pytest.fixture(scope="module")
def found() -> dict[int, list[Layout]]:
    """Every layout of 8 GPUs; of 32 and 256 those without recomputation, which is never the best there."""
    fixed = frozenset({"recompute"})
    larger = {gpus: search(BASE, gpus, "bf16", H100, fixed) for gpus in (32, 256)}
    return {8: search(BASE, 8, "bf16", H100), **larger}


def parts_by_hand(gpus: int, n: int, expert: int) -> dict[str, float]:
    """Seconds of a step of BASE/32E with n texts, images and pairs in a micro-batch, without TP and PP."""
    width, inner, micro_batches = 768, 3072, 2048 // n // gpus
    texts, images = n * 256, n * 394
    tokens = texts + images
    rows = 32 * math.ceil(texts * 1.05 / 32) + 32 * math.ceil(images * 1.05 / 32)
    products = 12 * (8 * tokens * width**2 + 4 * width * n * (128**2 + 325**2 + 197**2))
    products += 4 * width * inner * (8 * tokens + 4 * rows) + 4 * 2 * tokens * width * 32
    # Predicted: 19 of 128 tokens, at most 63 of a caption, 78 patches; 196 patches of 768 values.
    text_logits, image_logits = n * (19 + 63) * 64_000, 2 * n * 78 * 8_192
    products += 2 * width * (text_logits + image_logits + 2 * n * 196 * 768)
    values = 12 * 79 * tokens * width + 8 * inner * (8 * tokens + 4 * rows) + 4 * 17 * rows * width
    memory = 2 * values + 4 * 16 * (text_logits + image_logits)
    parts = {
        "matrix products": micro_batches * 3 * products / (0.70 * 989e12),
        "other arithmetic": micro_batches * memory / (0.85 * 3350e9),
    }
    # Two all-to-alls forwards and two backwards in each of four blocks, inside a node.
    bytes_sent = (expert - 1) / expert * 2 * rows * width
    exchange = bytes_sent / (0.80 * 450e9) + 10e-6 * math.log2(expert)
    parts["all-to-all of experts"] = micro_batches * 4 * 4 * exchange
    # 4 bytes set to zero; on its share: norm 4, update 32 read and written, weights 2, clipping 8.
    state = DENSE * (4 + 42 / gpus) + EXPERTS / expert * (4 + 42 * expert / gpus)
    # The norm and the flag of signals are two small collectives of all ranks.
    parts["optimizer"] = state / (0.85 * 3350e9) + 2 * 10e-6 * math.log2(gpus)
    return parts


@pytest.mark.parametrize(("gpus", "n", "nodes"), [(8, 128, 1), (32, 64, 4)])
def test_the_best_layout_by_hand(
    gpus: int, n: int, nodes: int, found: dict[int, list[Layout]]
) -> None:
    best = found[gpus][0]
    assert best.choice == {
        **{"TP": "1", "PP": "1", "EP": "8", "DP": str(gpus)},
        **{"micro-batch": f"{n}+{n}+{n}", "recompute": "none"},
    }
    (memory,) = best.memory
    held = DENSE - ROUTERS + EXPERTS // 8
    assert memory.weights == 2 * held + 4 * ROUTERS
    assert memory.gradients == 4 * (held + ROUTERS)
    # Moments and master weights over all ranks, those of experts over the ranks with the same ones; fp32 routers.
    state = (12 * (DENSE - ROUTERS) + 8 * ROUTERS) / gpus + 12 * EXPERTS / 8 / nodes
    assert memory.optimizer == pytest.approx(state, rel=1e-6)
    assert best.time is not None
    for part, seconds in parts_by_hand(gpus, n, 8).items():
        assert best.time.parts[part] == pytest.approx(seconds, rel=1e-4), part
    # The weights of 16 bits come back twice, dense ones from all ranks and experts' from those of other nodes. A ring
    # of dense weights uses the network of all eight GPUs of a node, one of experts' that of one GPU.
    gathered = 2 * 2 * (DENSE + ROUTERS) * (gpus - 1) / gpus
    dense = gathered / (min(0.80 * 450e9, 8 * 0.85 * 50e9) if nodes > 1 else 0.80 * 450e9)
    experts = 2 * 2 * EXPERTS / 8 * (nodes - 1) / nodes / (0.85 * 50e9)
    # Twice four buckets of at least 40 M values and one of fp32 routers; experts have four buckets.
    waiting = 2 * 5 * 10e-6 * math.log2(gpus) + 2 * 4 * 10e-6 * math.log2(nodes)
    weights = best.time.parts["weights from data-parallel ranks"]
    assert weights == pytest.approx(dense + experts + waiting, rel=0.01)


def test_the_best_layout_of_256_by_hand(found: dict[int, list[Layout]]) -> None:
    """Little work for each GPU: starting operators takes longer than they do, and half of the blocks halve it."""
    best = found[256][0]
    assert best.choice == {
        **{"TP": "1", "PP": "2", "EP": "32", "DP": "128"},
        **{"micro-batch": "16+16+16", "recompute": "none"},
    }
    assert best.time is not None
    parts = best.time.parts
    started = 6 * 270 + 3 * 2 * 250
    busy = ("matrix products", "other arithmetic", "starting operators")
    assert sum(parts[name] for name in busy) == pytest.approx(started * 6e-6, rel=1e-9)
    # Capacities ceil(16 * 256 * 1.05 / 32) and ceil(16 * 394 * 1.05 / 32); 24 of 32 ranks are on other nodes.
    rows = 32 * (135 + 207)
    far = 24 / 32 * 2 * rows * 768 / (0.85 * 50e9)
    exchange = 3 * 4 * (far + 5 * 10e-6)
    assert parts["all-to-all of experts"] == pytest.approx(exchange, rel=1e-9)
    transfer = 2 * 16 * 650 * 768 / (0.85 * 50e9) + 10e-6
    assert parts["pipeline transfers"] == pytest.approx(transfer, rel=1e-9)
    first, last = best.memory
    text_embedding = 64_000 * 768
    # Of the 96 tensors of experts on a rank (three blocks, two pools, one expert), the last stage has a third.
    assert first.weights - 4 * 3 * 2 * 32 * 768 > 2 * (text_embedding + 6 * EXPERT)
    assert last.kept["experts"] * 3 == first.kept["experts"] == 3 * 2 * 2 * rows * 3072
    assert best.most_memory == last.total < 5 * 2**30


def test_bounds_are_a_factor_of_two_apart_and_parts_add_up(found: dict[int, list[Layout]]) -> None:
    for layouts in found.values():
        for layout in layouts:
            if layout.time is not None:
                assert layout.time.upper == pytest.approx(2 * layout.time.lower)
                assert sum(layout.time.parts.values()) == pytest.approx(layout.time.lower)


def test_layouts_are_in_order_and_every_other_value_has_a_reason(
    found: dict[int, list[Layout]],
) -> None:
    layouts = found[8]
    seconds = [layout.seconds for layout in layouts]
    assert seconds == sorted(seconds) and math.isinf(seconds[-1])
    reasons = {(loser.name, loser.value): loser.reason for loser in losers(layouts)}
    assert set(reasons) == {
        *(("TP", value) for value in "2346"),
        *(("PP", value) for value in ("2", "3", "4", "6", "12")),
        *(("EP", value) for value in "124"),
        *(("micro-batch", f"{2**p}+{2**p}+{2**p}") for p in range(12) if p != 7),
        ("recompute", "full"),
    }
    assert "3 does not divide the 64000 rows" in reasons["TP", "3"]
    assert "8 processes cannot hold" in reasons["PP", "3"]
    assert "tensor-parallel collectives" in reasons["TP", "2"]
    assert "matrix products" in reasons["recompute", "full"]


def test_what_does_not_fit_into_memory_says_by_how_much() -> None:
    cluster = replace(H100, device=replace(H100.device, memory=30e9))
    fixed = frozenset({"TP", "PP", "EP", "recompute"})
    config = replace(BASE, parallel=replace(BASE.parallel, expert_model_parallel_size=8))
    layouts = search(config, 8, "bf16", cluster, fixed)
    assert layouts[0].choice["micro-batch"] == "64+64+64"
    (reason,) = [x.reason for x in losers(layouts) if x.value == "128+128+128"]
    assert reason == "needs 39.3 GiB of 25.1 GiB"


# ---- collectives ----


def collective(operation: Any, size: int, stride: int = 1, calls: int = 1) -> Collective:
    return Collective("x", operation, "data", size, stride, calls, 1_000_000)


def test_bytes_that_a_rank_sends() -> None:
    assert collective("all-reduce", 4).sent == 1_500_000
    assert collective("all-gather", 4).sent == collective("reduce-scatter", 4).sent == 750_000
    assert collective("all-to-all", 4).sent == 750_000
    assert (collective("send", 4).sent, collective("receive", 4).sent) == (1_000_000, 0)


@pytest.mark.parametrize(
    ("found", "seconds"),
    [
        (collective("all-gather", 8), 0.875e6 / 4e11),
        # Two nodes: by the network of eight GPUs, then of one.
        (collective("all-gather", 16), 15 / 16 * 1e6 / 4e11),
        (collective("all-gather", 2, stride=8), 0.5e6 / 5e10),
        (collective("all-gather", 4, stride=4), 0.75e6 / 1e11),
        (collective("all-to-all", 16), 8 / 16 * 1e6 / 5e10),
        (collective("send", 2, stride=4), 1e6 / 4e11),
        (collective("send", 2, stride=8), 1e6 / 5e10),
        (collective("receive", 2), 0.0),
    ],
)
def test_seconds_of_a_collective(found: Collective, seconds: float) -> None:
    speed = replace(
        rates(H100.device, "bf16", 1.0, slow=False), link=4e11, network=5e10, latency=1e-6
    )
    latency = 0.0 if found.operation == "receive" else 1e-6 * math.log2(found.size)
    assert collective_seconds(found, 32, H100, speed) == pytest.approx(seconds + latency)


def test_groups_that_straddle_nodes_use_the_network() -> None:
    speed = replace(
        rates(H100.device, "bf16", 1.0, slow=False), link=4e11, network=5e10, latency=0.0
    )
    sixes = replace(H100, per_node=6)
    # Ranks 4 to 7 of nodes of six: half of what each sends goes to the other node.
    exchanged = collective_seconds(collective("all-to-all", 4), 12, sixes, speed)
    assert exchanged == pytest.approx(2 / 4 * 1e6 / 5e10)
    # Stages of four ranks on nodes of eight: the second sends to another node.
    sent = collective_seconds(collective("send", 4, stride=4), 16, H100, speed)
    assert sent == pytest.approx(1e6 / 5e10)
    # Links inside a node are nothing to a group that has one rank on each.
    apart = collective("all-gather", 2, stride=8)
    seconds = collective_seconds(apart, 16, H100, replace(speed, link=1.0))
    assert seconds == pytest.approx(0.5e6 / 5e10)


@pytest.mark.parametrize(
    ("size", "stride", "world_size", "per_node"),
    [
        (8, 2, 16, 6),  # nodes of 6, 6 and 4: three, three and two of every group
        *((4, 1, 16, 6), (2, 8, 16, 6), (3, 2, 18, 5), (2, 1, 24, 7), (6, 5, 60, 8), (7, 1, 7, 3)),
        *((5, 4, 40, 8), (2, 3, 12, 12), (16, 1, 16, 16), (2, 2, 20, 3), (12, 1, 48, 5)),
    ],
)
def test_ranks_of_a_group_on_a_node(size: int, stride: int, world_size: int, per_node: int) -> None:
    expected = set()
    for first in range(world_size):
        if first // stride % size == 0:
            nodes = Counter((first + n * stride) // per_node for n in range(size))
            expected |= set(nodes.values())
    assert ranks_on_a_node(size, stride, world_size, per_node) == expected


def test_a_node_that_is_partly_filled_by_hand() -> None:
    """16 GPUs in nodes of 6, 6 and 4: the last one has two of eight ranks with the same experts, as nodes of 4 have."""
    config = replace(BASE, parallel=replace(BASE.parallel, expert_model_parallel_size=2))
    sixes, fours = (step_time(config, 16, "bf16", replace(H100, per_node=n)).parts for n in (6, 4))
    name = "weights from data-parallel ranks"
    # Weights of 16 bits, twice: dense ones by the network of four GPUs, those of 16 experts of a pool by that of two.
    network = 0.85 * 50e9
    dense = 2 * 2 * (DENSE + ROUTERS) * 15 / 16 / (4 * network)
    experts = 2 * 2 * EXPERTS / 2 * 7 / 8 / (2 * network)
    waiting = 2 * 5 * 10e-6 * 4 + 2 * 16 * 10e-6 * 3
    assert sixes[name] == pytest.approx(dense + experts + waiting, rel=0.02)
    assert sixes[name] == fours[name]


def test_tensor_parallel_groups_stay_within_a_node_unless_they_are_given() -> None:
    fixed = frozenset({"PP", "EP", "micro-batch", "recompute"})
    sixes = replace(H100, per_node=6)
    layouts = {x.choice["TP"]: x for x in search(BASE, 16, "bf16", sixes, fixed)}
    assert layouts["2"].time and not layouts["4"].time
    assert layouts["4"].refused.startswith("TP 4 does not divide nodes of 6")
    four = replace(BASE, parallel=replace(BASE.parallel, tensor_model_parallel_size=4))
    (given,) = search(four, 16, "bf16", sixes, fixed | {"TP"})
    assert given.time


def test_large_global_batches_are_searched_at_once() -> None:
    fixed = frozenset({"TP", "PP", "EP", "recompute"})
    sizes = {f"global_{kind}": 10**9 for kind in ("texts", "images", "pairs")}
    huge = replace(BASE, data=replace(BASE.data, **sizes))
    # 10^9 over 8 ranks is 2^6 x 5^9.
    assert len(search(huge, 8, "bf16", H100, fixed)) == 7 * 10


def test_expert_gradients_go_to_expert_data_parallel_ranks() -> None:
    config = replace(BASE, parallel=replace(BASE.parallel, expert_model_parallel_size=8))
    sums: Counter[str] = Counter()
    groups = {}
    for one in collectives_per_step(config, 32, "bf16", 0):
        sums[one.what] += one.bytes
        groups[one.what] = (one.size, one.stride)
    assert groups["dense gradients"] == (32, 1) and groups["expert gradients"] == (4, 8)
    assert sums["expert gradients"] == pytest.approx(4 * EXPERTS / 8, rel=1e-4)
    assert sums["dense gradients"] == pytest.approx(4 * DENSE, rel=1e-4)
    # megatron-core gathers all weights once for each of its two optimizers.
    assert sums["expert weights"] == sums["expert gradients"]


def test_recomputation_sends_the_forward_pass_twice() -> None:
    def rows(recompute: Any) -> int:
        config = replace(
            BASE,
            parallel=replace(BASE.parallel, expert_model_parallel_size=8),
            train=replace(BASE.train, recompute=recompute),
        )
        found = collectives_per_step(config, 8, "bf16", 0)
        return sum(one.bytes for one in found if one.operation == "all-to-all")

    assert rows("full") * 2 == rows("none") * 3


# ---- devices ----


def test_devices_are_found_by_the_names_that_torch_gives() -> None:
    for name, device in (
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L40", "l40"),
        ("Tesla V100-SXM2-32GB", "v100"),
    ):
        assert named_device(name) is DEVICES[device]
    for name in ("NVIDIA GeForce GTX 750", "NVIDIA RTX A4000", "NVIDIA GH200 480GB"):
        assert named_device(name) is None
    with pytest.raises(ConfigError, match="v100|V100|computes in fp16"):
        find_device("v100").peak("bf16")


def test_a_slower_network_never_helps() -> None:
    config = replace(BASE, parallel=replace(BASE.parallel, expert_model_parallel_size=32))
    fast = step_time(config, 32, "bf16", H100)
    slow = step_time(config, 32, "bf16", replace(H100, network=5e9))
    assert slow.parts["all-to-all of experts"] > 5 * fast.parts["all-to-all of experts"]
    assert slow.lower > fast.lower


# ---- the command ----


def planned(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = run("plan", words.split())
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_agrees_with_the_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    words = "--preset base-8e --parallel.expert_model_parallel_size 4 --data.micro_texts 64 --data.micro_images 64"
    words += (
        " --data.micro_pairs 64 --parallel.pipeline_model_parallel_size 2 --train.recompute none"
    )
    words += " --parallel.tensor_model_parallel_size 1"
    status, out, _ = planned(f"--gpus 8 --gpu a100-80 --price 2 --json {file} {words}", capsys)
    assert status == 0 and "Every choice is given" in out
    plan = json.loads(file.read_text())
    assert plan["counts"]["layouts"] == 1 == plan["counts"]["can run"]
    assert run("pretrain", ["--dry-run", "--dry-run-world-size", "8", *words.split()]) == 0
    dry = capsys.readouterr().out
    for stage in plan["best"]["memory"]:
        row = [f"{stage[name] / 2**30:.2f}" for name in ("weights", "gradients", "optimizer")]
        row.append(f"{sum(stage['activations'].values()) / 2**30:.2f}")
        row += [f"{stage[name] / 2**30:.2f}" for name in ("temporary", "total")]
        assert [f"{stage['stage']}", *row] in [line.split() for line in dry.splitlines()]
    collectives = [line for line in out.splitlines() if "pipeline" in line and "hidden" in line]
    assert len(collectives) == 2 and all(line in dry for line in collectives)
    assert f"model    {plan['flops_per_step']['model']:.4g}" in dry
    # All steps: 200,000 of them.
    low, high = plan["best"]["seconds"]
    assert plan["whole_run"]["days"] == pytest.approx([low * 200e3 / 86400, high * 200e3 / 86400])
    assert plan["whole_run"]["device hours"][0] == pytest.approx(8 * low * 200e3 / 3600)
    assert plan["whole_run"]["kWh"][0] == pytest.approx(8 * low * 200e3 / 3600 * 0.4)
    assert plan["whole_run"]["cost"][0] == pytest.approx(2 * 8 * low * 200e3 / 3600)


def test_an_objective_that_is_left_out_chooses_no_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    words = f"--preset tiny-8e --gpus 4 --json {file} --objectives.kind contrastive"
    left_out = "--data.micro_texts 0 --data.micro_images 0"
    status, out, _ = planned(f"{words} {left_out}", capsys)
    assert status == 0
    sizes = {f"0+0+{n}" for n in (1, 2, 3, 4, 6, 12)}
    plan = json.loads(file.read_text())
    found = {lost["value"] for lost in plan["lost"] if lost["choice"] == "micro-batch"}
    assert sizes <= found | {plan["best"]["micro-batch"]}
    pairs = int(plan["best"]["micro-batch"].split("+")[2]) * int(plan["best"]["DP"])
    assert f"every pair is told from the others of {pairs}" in out
    planned(f"{words} {left_out} --data.micro_pairs 6", capsys)
    plan = json.loads(file.read_text())
    assert plan["best"]["micro-batch"] == "0+0+6"
    assert not [lost for lost in plan["lost"] if lost["choice"] == "micro-batch"]


def test_one_device_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = planned("--preset tiny-8e --gpus 1", capsys)
    assert status == 0
    assert "Collectives" not in out and "\n\n\n" not in out


def test_a_device_of_its_own_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = "--gpu custom --tflops 0.05 --memory-gb 16 --memory-bandwidth 10"
    status, out, _ = planned(f"--preset tiny-8e --gpus 2 {numbers} --train.precision fp32", capsys)
    assert status == 0
    assert "0.05 TFLOP/s in fp32, 16 GB at 10 GB/s" in out and "kWh" not in out
    counts = out.split("The best of ")[1].split(")")[0]
    number, kinds = counts.split(" layouts (")
    assert int(number) == sum(int(kind.split()[0]) for kind in kinds.split(", "))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset base-32e", "required: --gpus"),
        ("--gpus 0", "--gpus 0: expected a whole number of at least 1"),
        ("--gpus 8 --gpu h1000", "--gpu h1000: unknown"),
        (
            "--gpus 8 --gpu custom --tflops 3",
            "--gpu custom needs --memory-gb and --memory-bandwidth",
        ),
        ("--gpus 8 --price -1", "--price -1: expected a number above 0"),
        ("--gpus 8 --watts nan", "--watts nan: expected a number above 0"),
        ("--gpus 8 --tflops fast", "--tflops fast: expected a number above 0"),
        (
            "--gpus 8 --gpu v100 --train.precision bf16",
            "train.precision=bf16: this device computes",
        ),
        ("--gpus 8 --preset base-32", "--preset base-32: unknown"),
        ("--gpus 8 --model.num_layer 3", "unknown option --model.num_layer; did you mean"),
        ("--gpus 8 --dry-run", "--dry-run is for pretrain"),
        ("--gpus 7", "no layout runs on 7 x h100"),
        ("--gpus 8 --memory-gb 1", "no layout runs on 8 x h100: TP"),
        ("--gpus 8 --json /", "--json /: is a folder"),
        (
            "--gpus 8 --preset base-32e --parallel.expert_model_parallel_size 64",
            "block 2 has 32 text experts, not divisible by parallel.expert_model_parallel_size=64",
        ),
        (
            "--gpus 8 --preset base-32e --parallel.expert_model_parallel_size 32",
            "parallel.expert_model_parallel_size=32 does not divide 8 processes",
        ),
        (
            "--gpus 16 --preset base-32e --parallel.expert_model_parallel_size 64",
            "parallel.expert_model_parallel_size=64: 16 fits",
        ),
        (
            "--gpus 8 --preset tiny-8e --train.steps 1000000000 --price 1e308",
            "error: whole_run/cost/0 is not finite: --price,",
        ),
        (
            "--gpus 64 --data.global_texts 735134400 --data.global_images 735134400 --data.global_pairs 735134400",
            "error: more than 10,000 layouts to compare",
        ),
        (
            "--gpus 1 --data.global_texts 2000000000000",
            "error: data.global_texts=2e+12: micro-batches are looked for in",
        ),
        # What no layout mends is no matter of layouts.
        ("--gpus 8 --preset tiny-8e --moe.topk 0", "error: moe.topk=0 must be at least 1"),
        ("--gpus 8 --model.num_attention_heads 0", "error: model.num_attention_heads=0 must be"),
        (
            "--gpus 8 --parallel.tensor_model_parallel_size 0",
            "error: parallel.tensor_model_parallel_size=0 must be at least 1",
        ),
        ("--gpus 8 --data.global_texts 0", "error: data.global_texts=0 is not a multiple of"),
    ],
)
def test_wrong_options_are_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = planned(words, capsys)
    assert status and not out
    assert message in err and len(err.splitlines()) == 1
