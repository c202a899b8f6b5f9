"""`model.transformer_impl`: with TransformerEngine's layers, in plain torch, everything is as with local ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import Layout, Workers, assemble, assert_close, assert_identical, layout
from te_runs import IMPLEMENTATION, saved, trained

from megatron_vlmoe.convert.compare import compare_checkpoints

TRANSFORMER_ENGINE = (IMPLEMENTATION, "transformer_engine")
PADDED = "--data.reset_attention true"
RUNS: dict[str, tuple[Layout, str, bool]] = {
    "all-samples": (layout(1), PADDED, True),
    "torch-attention": (layout(1), "--model.attention_backend math --train.recompute full", False),
    # The distributed optimizer would leave every rank with gradients of its own share.
    "tensor-parallel": (
        layout(2, tp=2),
        f"{PADDED} --parallel.use_distributed_optimizer false",
        True,
    ),
    "experts-and-pipeline": (layout(2, pp=2), "--moe.vl true --moe.num_vl_experts 2", True),
}


@pytest.mark.parametrize("name", RUNS)
def test_it_trains_as_local_layers_do(workers: Workers, name: str) -> None:
    where, options, packed = RUNS[name]
    local = workers.run(where, trained, where, tuple(options.split()))
    engine = workers.run(where, trained, where, (*options.split(), *TRANSFORMER_ENGINE), packed)
    for ours, theirs in zip(local, engine, strict=True):
        assert theirs["marks"] == ours["marks"]
        assert "TELayerNormColumnParallelLinear" in theirs["modules"]
        assert not {"ColumnLinear", "RowLinear"} & set(theirs["modules"])
        assert ("TransformerEngineAttention" in theirs["modules"]) == packed
        assert not any(module.startswith("TE") for module in ours["modules"])
    starts = [assemble([rank["start"] for rank in run]) for run in (local, engine)]
    assert_identical(starts[1], starts[0], "initial values")
    for index, (ours, theirs) in enumerate(zip(local[-1]["steps"], engine[-1]["steps"])):
        assert_close(theirs["losses"], ours["losses"], f"losses of step {index}")
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-5)
    gradients = [assemble([rank["steps"][0]["gradients"] for rank in r]) for r in (local, engine)]
    assert_close(gradients[1], gradients[0], "gradients", 2e-5)
    assert engine[-1]["evaluation"] == pytest.approx(local[-1]["evaluation"], rel=1e-4, abs=1e-6)


def test_checkpoints_are_the_same(workers: Workers, tmp_path: Path) -> None:
    """Their names, initial values, and what becomes of one that the other implementation loads and writes."""
    where, split = layout(1), layout(2, tp=2)
    paths = {name: str(tmp_path / name) for name in ("local", "engine", "again", "seed", "other")}
    workers.run(where, saved, where, (), paths["seed"], "", 0)
    workers.run(where, saved, where, TRANSFORMER_ENGINE, paths["other"], "", 0)
    assert compare_checkpoints(Path(paths["seed"]), Path(paths["other"])).equal
    workers.run(where, saved, where, (), paths["local"])
    workers.run(split, saved, split, TRANSFORMER_ENGINE, paths["engine"], paths["local"])
    workers.run(where, saved, where, (), paths["again"], paths["engine"])
    for name in ("engine", "again"):
        found = compare_checkpoints(Path(paths["local"]), Path(paths[name]), with_optimizer=True)
        assert found.equal and len(found.pairs) > 100, name


FP8 = """
--train.precision bf16 --train.fp8 {recipe} --model.text_length 32 --model.pair_text_length 32
--data.micro_texts 32 --data.micro_images 32 --data.micro_pairs 32
--data.global_texts 64 --data.global_images 64 --data.global_pairs 64
--moe.capacity_factor 2 --moe.capacity_multiple_of 32 --moe.num_vision_experts 4 --moe.num_text_experts 2
"""


def fp8(recipe: str) -> tuple[str, ...]:
    return tuple(FP8.format(recipe=recipe).split())


def test_only_training_is_in_fp8(workers: Workers) -> None:
    """Linear layers and experts of blocks are; numbers are those of the same run in bf16."""
    where = layout(2, ep=2)
    plain = workers.run(where, trained, where, fp8("none"))
    results = workers.run(where, trained, where, (*fp8("delayed"), *TRANSFORMER_ENGINE))
    starts = [
        {key: [part for rank in run for part in shards_of(rank["start"], key)] for key in keys(run)}
        for run in (plain, results)
    ]
    assert starts[0].keys() == starts[1].keys()
    for result in results:
        names = {name for name, in_fp8, _ in result["calls"] if in_fp8}
        assert names == {
            *("TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"),
            *("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"),
        }
        assert all(in_fp8 for _, in_fp8, _ in result["calls"])
        assert not result["evaluation_in_fp8"] and not result["checkpointed"]
        assert "ExpertPool" not in result["modules"]
        rows = {sizes[:-1] for name, _, sizes in result["calls"] if "Linear" in name}
        assert all(size[0] % 16 == 0 for size in rows)
    marks = [own for key, own in results[0]["marks"].items() if ".experts." in key]
    assert marks and all(own["tensor_model_parallel"] and not own["allreduce"] for own in marks)
    losses = [run[0]["steps"][0]["losses"] for run in (plain, results)]
    assert_close(losses[1], losses[0], "losses", 2e-2)


def keys(run: list[dict[str, Any]]) -> list[str]:
    return sorted({key for rank in run for key in rank["start"]})


def shards_of(found: dict[str, Any], key: str) -> list[Any]:
    return found.get(key, [])


def test_experts_in_fp8_have_the_same_checkpoints(workers: Workers, tmp_path: Path) -> None:
    where, split = layout(1), layout(2, ep=2)
    paths = {name: str(tmp_path / name) for name in ("local", "engine", "seed", "other")}
    recompute = ("--train.recompute", "full")
    workers.run(where, saved, where, fp8("none"), paths["seed"], "", 0)
    eight = (*fp8("mxfp8"), *TRANSFORMER_ENGINE, *recompute)
    workers.run(split, saved, split, eight, paths["other"], "", 0)
    assert compare_checkpoints(Path(paths["seed"]), Path(paths["other"])).equal
    workers.run(split, saved, split, eight, paths["engine"])
    workers.run(where, saved, where, fp8("none"), paths["local"], paths["engine"])
    found = compare_checkpoints(Path(paths["engine"]), Path(paths["local"]), with_optimizer=True)
    assert found.equal and len(found.pairs) > 100
