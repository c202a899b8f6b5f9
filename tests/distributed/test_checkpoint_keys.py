"""What is computed of a checkpoint without building the model is what the model says and what a run writes."""

from __future__ import annotations

from pathlib import Path

from helpers import Layout, Workers, layout
from small_checkpoints import CONFIGS
from training_runs import Recorder, save_and_go_on, start

from megatron_vlmoe.convert.checkpoints import extra_state_keys
from megatron_vlmoe.convert.compare import compare_checkpoints
from megatron_vlmoe.convert.inspect import inspect_checkpoint, inspection_lines
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.train.checkpoint_files import TrainState


def sharded_keys(names: tuple[str, ...]) -> dict[str, tuple[dict[str, tuple[int, ...]], set[str]]]:
    """Whole shapes and keys of other state in the sharded state dict of every model."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_vlmoe.config.schema import ParallelConfig
    from megatron_vlmoe.config.task_schema import FinetuneConfig
    from megatron_vlmoe.model.heads import MaskedHeads
    from megatron_vlmoe.model.task_heads import build_task_heads
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.train.setup import (
        build_chunks,
        build_transformer_config,
        checkpoint_metadata,
    )

    initialize(ParallelConfig(), 1)
    found = {}
    for name in names:
        config = CONFIGS[name]
        heads = build_task_heads if isinstance(config, FinetuneConfig) else MaskedHeads
        (chunk,) = build_chunks(config, build_transformer_config(config, "fp32"), heads)
        entries = list(chunk.sharded_state_dict(metadata=checkpoint_metadata()).values())
        shapes = {
            entry.key: tuple(int(n) for n in entry.global_shape[entry.prepend_axis_num :])
            for entry in entries
            if isinstance(entry, ShardedTensor)
        }
        others = {entry.unique_key for entry in entries if isinstance(entry, ShardedObject)}
        assert len(shapes) + len(others) == len(entries)
        found[name] = (shapes, others)
    return found


def test_keys_and_shapes_are_those_of_the_model(workers: Workers) -> None:
    (found,) = workers.run(1, sharded_keys, tuple(CONFIGS))
    for name, (shapes, others) in found.items():
        assert shapes == checkpoint_shapes(CONFIGS[name]), name
        assert others == set(extra_state_keys(CONFIGS[name])), name


def loaded_and_saved(where: Layout, arguments: tuple[str, ...], folder: str, target: str) -> None:
    """Loads a checkpoint at this layout and writes it again, without a step."""
    from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import find_checkpoint

    recorder = Recorder(start(where, *arguments))
    path = find_checkpoint(folder)
    assert path is not None
    state = load_checkpoint(path, recorder.config, recorder.parts)
    writer = CheckpointWriter(Path(target) / "checkpoints", 0, False)
    writer.save(TrainState(step=state.step), recorder.config, recorder.parts)


def test_checkpoint_of_a_run_is_sound_and_equal_after_another_layout(
    workers: Workers, tmp_path: Path
) -> None:
    source, target = layout(4, tp=2, ep=2), layout(2, pp=2)
    options = ("--train.precision", "bf16")
    first, second = tmp_path / "first", tmp_path / "second"
    workers.run(source, save_and_go_on, source, options, str(first))
    workers.run(target, loaded_and_saved, target, options, str(first), str(second))
    found = inspect_checkpoint(first)
    assert not found.problems
    assert found.written.writers == 4 and found.optimizer is not None
    assert (found.written.attention_pieces, found.written.expert_pieces) == (2, 2)
    assert found.types == {"bfloat16": found.types["bfloat16"], "float32": 4}
    lines = inspection_lines(found)
    assert "  layout of the run: TP 2 x PP 1 x VPP 1 x EP 2" in lines
    assert not any("a converter wrote them" in line for line in lines)
    other = inspect_checkpoint(second)
    assert (other.written.attention_pieces, other.written.expert_pieces) == (1, 1)
    comparison = compare_checkpoints(first, second, with_optimizer=True)
    assert comparison.equal and len(comparison.pairs) > 3 * len(
        checkpoint_shapes(found.source.config)
    )
    assert {option.name for option in comparison.options} >= {
        "parallel.tensor_model_parallel_size",
        "parallel.expert_model_parallel_size",
    }
