"""Checkpoints: exact resume, any layout to any other, and nothing half-written is ever taken for whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import Layout, Workers, assemble, assert_close, assert_identical, layout, small_config
from training_runs import (
    check_data_of_ranks,
    load_and_go_on,
    load_every_way,
    merge,
    overwrite_behind_saves,
    save_and_go_on,
    save_in_both_formats,
    state_both_ways,
    trainer_run,
)

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.compare import compare_checkpoints
from megatron_vlmoe.convert.inspect import inspect_checkpoint, inspection_lines
from megatron_vlmoe.convert.upcycle.plan import UpcycleOptions
from megatron_vlmoe.convert.upcycle.run import upcycle_checkpoint
from megatron_vlmoe.planning.estimate import checkpoint_bytes

ONE = Layout(1)
FEW = ("--data.global_texts", "4", "--data.global_images", "4", "--data.global_pairs", "4")
# What differs between two runs of the same steps.
TIMES = ("second", "tflop", "mfu", "memory", "data_wait")


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if not any(t in key.lower() for t in TIMES)}
        for line in lines
    ]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


RESUMED = {
    "one-process": (ONE, ()),
    "tp2-ep2": (layout(4, tp=2, ep=2), FEW),
    "interleaved": (layout(2, pp=2, vpp=2), FEW),
    "overlapped-gather": (layout(2), (*FEW, "--parallel.overlap_param_gather", "true")),
    "bf16": (ONE, ("--train.precision", "bf16")),
    "bf16-tp2-ep2": (layout(2, tp=2, ep=2), (*FEW, "--train.precision", "bf16")),
    "balance-bias": (
        layout(2, ep=2),
        (*FEW, "--moe.capacity_factor", "1.05", "--moe.balance_bias_rate", "0.01"),
    ),
    "expert-choice": (layout(2, tp=2), (*FEW, "--moe.routing", "expert_choice")),
    "contrastive": (
        layout(2),
        (
            *("--objectives.kind", "contrastive", "--data.micro_texts", "0"),
            *("--data.micro_images", "0", "--data.global_pairs", "8"),
        ),
    ),
    "counter-draws": (layout(2, tp=2), (*FEW, "--train.counter_draws", "true")),
    "bf16-buckets": (
        layout(4, tp=2, ep=2),
        (
            *(*FEW, "--train.precision", "bf16", "--checkpoint.parallel_load", "true"),
            *("--checkpoint.optimizer_format", "dp_reshardable"),
        ),
    ),
    "dropping": (layout(2, ep=2), (*FEW, "--moe.capacity_factor", "1.05", "--moe.topk", "2")),
}


def test_an_evaluation_between_logged_steps_takes_nothing_from_the_next_line(
    workers: Workers, tmp_path: Path
) -> None:
    options = (*FEW, "--train.steps", "3", "--log.interval", "3")
    lines = []
    for interval in ("0", "2"):
        folder = tmp_path / interval
        more = ("--train.eval_interval", interval, "--moe.capacity_factor", "1.05")
        workers.run(ONE, trainer_run, ONE, (*options, *more), str(folder))
        lines.append(metrics(folder))
    assert [line["step"] for line in lines[1]] == [0, 2, 3]
    # Sums of counters in another order.
    assert lines[1][-1] == pytest.approx(lines[0][-1], rel=1e-5)
    assert lines[0][-1]["moe/vision/dropped_fraction"] > 0.0


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_is_bit_identical(name: str, workers: Workers, tmp_path: Path) -> None:
    where, options = RESUMED[name]
    options = (*options, "--train.steps", "4")

    def train(folder: str, *more: str) -> list[Any]:
        return workers.run(where, trainer_run, where, (*options, *more), str(tmp_path / folder))

    unbroken = train("unbroken")
    stopped = train("resumed", "--exit-interval", "2")
    assert stopped[0]["step"] == 2 and unbroken[0]["step"] == 4
    assert checkpoints(tmp_path / "resumed") == ["iter_0000002"]
    resumed = train("resumed")
    assert resumed[0]["step"] == 4
    expected = metrics(tmp_path / "unbroken")
    assert [line["step"] for line in expected] == [0, 1, 2, 3, 4]
    assert expected[1]["loss/total"] != expected[4]["loss/total"]
    assert metrics(tmp_path / "resumed") == expected
    if "bf16" in name:
        assert resumed[0]["dtypes"] == ["torch.bfloat16", "torch.float32"]
    for mine, theirs, old in zip(resumed, unbroken, stopped):
        assert_identical(mine["optimizer"], theirs["optimizer"], "optimizer state")
        assert mine["optimizer"].keys() == old["optimizer"].keys()
    whole = [assemble([rank["weights"] for rank in run]) for run in (resumed, unbroken, stopped)]
    assert_identical(whole[0], whole[1], "weights")
    assert any((whole[1][key] != whole[2][key]).any() for key in whole[1])


@pytest.mark.parametrize("where", [ONE, layout(2, pp=2)], ids=["one-process", "pp2"])
def test_no_step_is_missing_in_the_log_of_a_run_that_stopped_between_its_lines(
    where: Layout, workers: Workers, tmp_path: Path
) -> None:
    options = (*FEW, "--train.steps", "6", "--log.interval", "5", "--train.eval_interval", "2")
    options = (*options, "--moe.capacity_factor", "1.05", "--moe.topk", "2")

    def train(folder: str, *more: str) -> Any:
        arguments = (where, (*options, *more), str(tmp_path / folder))
        return workers.run(where, trainer_run, *arguments)[0]

    train("unbroken")
    expected = metrics(tmp_path / "unbroken")
    assert [line["step"] for line in expected] == [0, 2, 4, 5, 6]
    assert expected[3]["moe/vision/dropped_fraction"] > 0.0
    # Stopped in order at step 3; then at step 6, the end.
    assert train("stopped", "--exit-interval", "3")["step"] == 3
    assert train("stopped")["step"] == 6
    # Ended after the line of step 5; what is left of it is the checkpoint of step 3.
    train("lost", "--save-interval", "3", "--exit-interval", "5")
    train("lost", "--checkpoint.step", "3")
    for folder in ("stopped", "lost"):
        for mine, theirs in zip(metrics(tmp_path / folder), expected, strict=True):
            # Routers add up in fp32, here in two parts.
            assert mine == pytest.approx(theirs, rel=1e-6), (folder, theirs["step"])


MOVES = {
    "tp2-ep2": (layout(4, tp=2, ep=2), ()),
    "interleaved": (layout(2, pp=2, vpp=2), ()),
    "dense": (layout(2, tp=2), ("--moe.modalities", "none", "--moe.layers", "[]")),
    "balance-bias": (layout(4, tp=2, ep=2), ("--moe.balance_bias_rate", "0.01")),
}
TARGETS = {
    "tp2-ep2": (layout(2, pp=2), layout(4, ep=4), ONE),
    "interleaved": (ONE, layout(2, tp=2, ep=2)),
    "dense": (layout(4, tp=2, pp=2), ONE),
    "balance-bias": (layout(2, pp=2, vpp=2),),
}


@pytest.mark.parametrize("name", MOVES)
def test_loaded_at_other_layouts(name: str, workers: Workers, tmp_path: Path) -> None:
    source, options = MOVES[name]
    options = (*options, "--train.steps", "8")
    folder = str(tmp_path)
    expected = merge(workers.run(source, save_and_go_on, source, options, folder))
    for target in TARGETS[name]:
        actual = merge(workers.run(target, load_and_go_on, target, options, folder))
        what = f"{name} loaded at {target.sizes or 'one process'}"
        assert_identical(actual["start"], expected["start"], what)
        assert_close(actual["evaluation"], expected["evaluation"], what)
        for mine, theirs in zip(actual["steps"], expected["steps"], strict=True):
            assert_close(mine["losses"], theirs["losses"], what)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        # Adam's division magnifies rounding where a gradient is nearly zero.
        assert_close(actual["weights"], expected["weights"], what, 1e-3)


def test_formats_of_optimizer_state_and_ways_to_read_it_give_the_same_bits(
    workers: Workers, tmp_path: Path
) -> None:
    options = ("--train.steps", "16")
    source = layout(2, ep=2)
    written = workers.run(source, save_in_both_formats, source, options, str(tmp_path))
    saved = assemble([weights for weights, _ in written])
    planned = checkpoint_bytes(small_config(*options, where=source), "fp32")
    assert planned.gathered == max(gathered for _, gathered in written)
    reader = CheckpointReader(tmp_path / "fully_reshardable")
    tensors = [*reader.tensors.values(), *reader.optimizer_tensors.values()]
    assert planned.stored == sum(tensor.nbytes for tensor in tensors)
    for where in (source, layout(4, ep=2)):
        ranks = workers.run(where, load_every_way, where, options, str(tmp_path))
        for way in ranks[0]:
            for rank in ranks:
                assert not rank[way]["refused"]
                first = rank["fully_reshardable", False]["optimizer"]
                assert_identical(rank[way]["optimizer"], first, f"{way} at {where}")
            assert_identical(assemble([rank[way]["weights"] for rank in ranks]), saved, str(way))
        alone, shared = (
            [rank["fully_reshardable", in_parallel]["read"] for rank in ranks]
            for in_parallel in (False, True)
        )
        # Besides its experts every rank reads everything, or together they read everything once.
        files = (tmp_path / "fully_reshardable/iter_0000002").glob("*.distcp")
        stored = sum(path.stat().st_size for path in files)
        assert min(alone) > 0.6 * stored
        assert sum(shared) == pytest.approx(stored, rel=0.02)
        assert max(shared) < 1.1 * stored / len(ranks)
        # Nobody reads the buckets of another rank; weights are a quarter of all.
        buckets = [rank["dp_reshardable", False]["read"] for rank in ranks]
        assert max(buckets) < (0.25 + 0.75 / len(ranks) + 0.05) * stored

    target = layout(2, tp=2)
    ranks = workers.run(target, load_every_way, target, options, str(tmp_path))
    for way in ranks[0]:
        for rank in ranks:
            message = rank[way]["refused"]
            assert bool(message) == (way[0] == "dp_reshardable")
            if message:
                assert "parallel.tensor_model_parallel_size: 1 -> 2" in message
                assert "--checkpoint.optimizer_format fully_reshardable" in message
                assert "\n" not in message
        # The weights load alone, and with either state.
        assert_identical(assemble([rank[way]["weights"] for rank in ranks]), saved, str(way))


def test_the_last_checkpoint_of_a_run_loads_anywhere_and_tools_read_all(
    workers: Workers, tmp_path: Path
) -> None:
    options = (*FEW, "--train.steps", "3", "--save-interval", "1", "--keep-last", "0")
    options = (*options, "--moe.modalities", "none", "--moe.layers", "[]")
    options = (*options, "--checkpoint.optimizer_format", "auto")
    workers.run(ONE, trainer_run, ONE, (*options, "--exit-interval", "2"), str(tmp_path / "left"))
    workers.run(ONE, trainer_run, ONE, options, str(tmp_path / "ended"))

    def formats(run: str) -> list[str]:
        folders = sorted((tmp_path / run / "checkpoints").glob("iter_*"))
        return [CheckpointReader(folder).optimizer_format for folder in folders]

    assert formats("left") == ["dp_reshardable", "fully_reshardable"]
    assert formats("ended") == ["dp_reshardable", "dp_reshardable", "fully_reshardable"]
    whole, buckets = (tmp_path / run / "checkpoints/iter_0000002" for run in ("left", "ended"))
    assert compare_checkpoints(whole, buckets).equal
    with pytest.raises(ConvertError, match="fully_reshardable in .* and dp_reshardable in"):
        compare_checkpoints(whole, buckets, with_optimizer=True)
    assert compare_checkpoints(buckets, buckets, with_optimizer=True).equal
    first, second = (inspect_checkpoint(path) for path in (whole, buckets))
    assert not first.problems and not second.problems
    assert first.optimizer is not None and second.optimizer is not None
    assert first.optimizer.steps == second.optimizer.steps == 2
    # Root mean squares are of the gaps too, which are zero.
    largest = [
        {kind: values[1] for kind, values in found.optimizer.parts.items()}  # type: ignore[union-attr]
        for found in (first, second)
    ]
    assert largest[0] == largest[1] and largest[0].keys() == {"param", "exp_avg", "exp_avg_sq"}
    assert first.optimizer.nbytes <= second.optimizer.nbytes < 1.05 * first.optimizer.nbytes
    assert any("buckets (dp_reshardable)" in line for line in inspection_lines(second))
    reader = CheckpointReader(buckets)
    with pytest.raises(ConvertError, match="cannot be carried"):
        carried = UpcycleOptions(carry_optimizer=True)
        upcycle_checkpoint(reader, reader.config, tmp_path / "grown", carried)


def test_ranks_that_see_other_files_follow_rank_zero(workers: Workers, tmp_path: Path) -> None:
    """Where a client of a network file system is behind, its rank takes part in what the others do all the same."""
    where = layout(2)
    options = (*FEW, "--save-interval", "1", "--keep-last", "0")
    run = str(tmp_path)
    for steps in ("2", "3"):
        more = (*options, "--train.steps", steps)
        results = workers.run(where, trainer_run, where, more, run, "stale", timeout=100.0)
        assert [result.get("step") for result in results] == [int(steps)] * 2, results
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000002", "iter_0000003"]
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]


def test_ranks_that_have_read_other_data_are_refused_together(workers: Workers) -> None:
    where = layout(2)
    for message in workers.run(where, check_data_of_ranks, where):
        assert "the ranks have read different data: train.steps differs between them" in message


def test_a_share_without_parameters_is_refused_before_training(
    workers: Workers, tmp_path: Path
) -> None:
    options = (*RESUMED["contrastive"][1], "--train.precision", "bf16", "--moe.modalities", "none")
    options = (*options, "--moe.layers", "[]", "--checkpoint.optimizer_format", "auto")
    # The temperature is fp32, alone in its bucket.
    message = refused(workers, layout(2), options, tmp_path)
    assert "checkpoint.optimizer_format=auto: a data-parallel rank has no parameters" in message


def test_seed_checkpoint_starts_other_layouts(workers: Workers, tmp_path: Path) -> None:
    options = (*FEW, "--train.steps", "2")
    where = layout(2, ep=2)
    first = workers.run(
        where, trainer_run, where, (*options, "--save-initial"), str(tmp_path / "ep2")
    )
    assert first[0]["step"] == 2
    assert checkpoints(tmp_path / "ep2") == ["iter_0000000", "iter_0000002"]
    seed = str(tmp_path / "ep2/checkpoints/iter_0000000")
    # Another seed would start from other weights, were they not loaded.
    other = workers.run(ONE, trainer_run, ONE, (*options, "--load", seed), str(tmp_path / "one"))
    assert other[0]["step"] == 2
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "ep2"), strict=True):
        names = [key for key in theirs if "loss/" in key or key == "grad_norm"]
        assert_close({key: mine[key] for key in names}, {key: theirs[key] for key in names}, "")


@pytest.fixture(scope="module")
def saved(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps with checkpoints of both and of the start."""
    folder = tmp_path_factory.mktemp("saved")
    options = (*FEW, "--train.steps", "3", "--exit-interval", "2", "--save-interval", "1")
    workers.run(ONE, trainer_run, ONE, options, str(folder))
    assert checkpoints(folder) == ["iter_0000001", "iter_0000002"]
    return folder


def refused(
    workers: Workers, where: Layout, options: tuple[str, ...], folder: Path, **kw: Any
) -> str:
    """The one-line message with which every rank refuses."""
    results = workers.run(where, trainer_run, where, options, str(folder), *kw.values())
    for result in results:
        assert result.get("error") in ("CheckpointError", "ConfigError"), result
        assert "\n" not in result["message"]
    return str(results[0]["message"])


@pytest.mark.parametrize(
    "options",
    [
        ("--model.ffn_hidden_size", "64"),
        ("--moe.num_text_experts", "8"),
        ("--moe.layers", "2"),
        ("--model.text_length", "12"),
    ],
)
def test_checkpoint_of_another_model(
    options: tuple[str, str], workers: Workers, saved: Path, tmp_path: Path
) -> None:
    message = refused(workers, ONE, (*FEW, *options, "--load", str(saved)), tmp_path)
    assert options[0].removeprefix("--") in message and str(saved) in message


@pytest.mark.parametrize("damage", ["truncated", "missing", "common", "metadata", "tracker"])
def test_damaged_checkpoint(damage: str, workers: Workers, saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    target = folder / "checkpoints/iter_0000002"
    largest = max(target.glob("*.distcp"), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    elif damage == "missing":
        largest.unlink()
    elif damage == "common":
        (target / "common.pt").write_bytes(b"not a checkpoint")
    elif damage == "metadata":
        (target / ".metadata").write_bytes(b"")
    else:
        (folder / "checkpoints/latest_checkpointed_iteration.txt").write_text("9\n")
    # What rank 0 reads for all, it tells the others.
    where = layout(2) if damage in ("tracker", "common") else ONE
    message = refused(workers, where, FEW, folder)
    assert str(folder) in message


def test_missing_checkpoint_is_named(workers: Workers, tmp_path: Path) -> None:
    message = refused(workers, ONE, (*FEW, "--load", str(tmp_path / "nowhere")), tmp_path / "run")
    assert "nowhere" in message


def test_kill_between_write_and_rename_keeps_the_previous(
    workers: Workers, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    options = (*FEW, "--train.steps", "3")
    killed = workers.run(ONE, trainer_run, ONE, options, str(folder), "kill")[0]
    assert killed["error"] == "Killed"
    assert checkpoints(folder) == ["iter_0000001", "iter_0000002", "iter_0000003.tmp"]
    assert metrics(folder)[-1]["step"] == 3
    again = workers.run(ONE, trainer_run, ONE, options, str(folder))[0]
    # Step 3 was trained again from step 2.
    assert again["step"] == 3
    assert [line["step"] for line in metrics(folder)] == [0, 1, 2, 3]
    assert checkpoints(folder) == ["iter_0000001", "iter_0000002", "iter_0000003"]


def test_full_disk_is_refused_and_the_previous_kept(
    workers: Workers, saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    where = layout(2)
    message = refused(workers, where, (*FEW, "--train.steps", "3"), folder, fault="disk")
    assert "GB are free" in message and "iter_0000003" in message
    assert checkpoints(folder) == ["iter_0000001", "iter_0000002"]
    tracker = folder / "checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "2"


@pytest.mark.parametrize("fault", ["writer", "manager"])
def test_a_background_writer_that_dies_is_one_line_and_the_previous_kept(
    workers: Workers, saved: Path, tmp_path: Path, fault: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    options = (*FEW, "--train.steps", "3", "--checkpoint.async_save", "true")
    message = refused(workers, layout(2), options, folder, fault=fault)
    assert "iter_0000003.tmp: a background process failed to write it" in message
    assert checkpoints(folder) == ["iter_0000001", "iter_0000002"]


def test_a_tracker_that_is_lost_meanwhile_does_not_end_the_run(
    workers: Workers, tmp_path: Path
) -> None:
    options = (*FEW, "--train.steps", "2", "--save-interval", "1")
    (result,) = workers.run(ONE, trainer_run, ONE, options, str(tmp_path), "tracker")
    assert result.get("step") == 2, result
    assert checkpoints(tmp_path) == ["iter_0000001", "iter_0000002"]


def test_old_checkpoints_go_and_the_seed_stays(workers: Workers, tmp_path: Path) -> None:
    options = ("--save-initial", "--save-interval", "1", "--keep-last", "2", "--train.steps", "4")
    workers.run(ONE, trainer_run, ONE, (*FEW, *options), str(tmp_path))
    assert checkpoints(tmp_path) == ["iter_0000000", "iter_0000003", "iter_0000004"]


def test_background_save_resumes_equal(workers: Workers, tmp_path: Path) -> None:
    where = layout(2, ep=2)
    options = (*FEW, "--train.steps", "4", "--save-interval", "1")

    def train(folder: str, *more: str) -> list[Any]:
        return workers.run(where, trainer_run, where, (*options, *more), str(tmp_path / folder))

    plain = train("plain")
    train("background", "--checkpoint.async_save", "true", "--exit-interval", "2")
    assert checkpoints(tmp_path / "background") == ["iter_0000001", "iter_0000002"]
    resumed = train("background", "--checkpoint.async_save", "true")
    for mine, theirs in zip(resumed, plain):
        assert_identical(mine["optimizer"], theirs["optimizer"], "optimizer state")
    assert metrics(tmp_path / "background") == metrics(tmp_path / "plain")
    names = ["iter_0000002", "iter_0000003", "iter_0000004"]
    assert checkpoints(tmp_path / "background") == names


@pytest.mark.parametrize("where", [ONE, layout(4, tp=2, ep=2)], ids=["one-process", "tp2-ep2"])
def test_a_background_save_has_the_bits_of_its_moment(
    where: Layout, workers: Workers, tmp_path: Path
) -> None:
    options = FEW if where.world > 1 else ("--train.precision", "bf16")
    # Threads that the forked process waited for would hold it up for ever.
    for saves in workers.run(where, overwrite_behind_saves, where, options, str(tmp_path)):
        for number, (saved, loaded) in enumerate(saves):
            assert_identical(loaded, saved, f"state of save {number}")


@pytest.mark.parametrize(
    "where, options, is_own",
    [
        (ONE, ("--parallel.overlap_grad_reduce", "true"), True),
        (ONE, ("--train.precision", "bf16"), True),
        # Of the experts, each rank has those that no other one has.
        (layout(2, ep=2), FEW, True),
        (layout(2), FEW, False),
    ],
    ids=["one-process", "bf16", "ep2", "dp2"],
)
def test_state_that_is_not_gathered_is_what_would_be_gathered(
    where: Layout, options: tuple[str, ...], is_own: bool, workers: Workers
) -> None:
    for gathered, views, number in workers.run(where, state_both_ways, where, options):
        assert views.keys() == gathered.keys()
        assert not [key for key in gathered if views[key] != gathered[key]]
        assert (number > 0) == is_own
