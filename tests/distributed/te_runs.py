"""What the processes of a layout do with TransformerEngine's layers, in plain torch (te_stand_in.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import te_stand_in
from helpers import Layout
from training_runs import Recorder, shards, start

IMPLEMENTATION = "--model.transformer_impl"


def begin(where: Layout, *arguments: str, packed: bool = False) -> tuple[Any, Any, Any, Any]:
    """A run on the stand-in.

    Args:
        packed: takes TransformerEngine's attention in fp32 too, which has no kernel for it.
    """
    from megatron_vlmoe.model import implementation

    te_stand_in.install()
    if packed:
        implementation.attention_packs = lambda *unused: True
    return start(where, *arguments)


def marks(parts: Any) -> dict[str, dict[str, Any]]:
    """What megatron-core's gradients and norms look at, by checkpoint key.

    Without tensor parallelism nothing asks whether a weight of a dense layer is a shard, and local ones do not say.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_vlmoe.train.setup import checkpoint_metadata

    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
    found = {}
    for chunk in parts.chunks:
        for entry in chunk.sharded_state_dict(metadata=checkpoint_metadata()).values():
            if isinstance(entry, ShardedTensor):
                own = {name: getattr(entry.data, name, False) for name in names}
                if chunk.config.tensor_model_parallel_size == 1 and ".experts." not in entry.key:
                    own["tensor_model_parallel"] = False
                if not own["tensor_model_parallel"]:
                    own["partition_dim"] = own["partition_stride"] = None
                own["allreduce"] = getattr(entry.data, "allreduce", True)
                found[entry.key] = own
    return found


def trained(
    where: Layout, arguments: tuple[str, ...], packed: bool = False, steps: int = 2
) -> dict[str, Any]:
    """Initial weights, their marks, steps with the first one's gradients, an evaluation, and what was called."""
    recorder = Recorder(begin(where, *arguments, packed=packed))
    first = shards(recorder.parts)
    reports = [recorder.step(gradients=step == 0) for step in range(steps)]
    calls = list(te_stand_in.Calls.seen)
    return {
        "start": first,
        "marks": marks(recorder.parts),
        "modules": sorted(
            {type(m).__name__ for c in recorder.parts.chunks for m in c.decoder.modules()}
        ),
        "steps": reports,
        "calls": calls,
        "checkpointed": te_stand_in.Calls.checkpointed,
        "evaluation": recorder.evaluate(),
        "evaluation_in_fp8": any(in_fp8 for _, in_fp8, _ in te_stand_in.Calls.seen[len(calls) :]),
    }


def saved(
    where: Layout, arguments: tuple[str, ...], target: str, source: str = "", step: int = 1
) -> None:
    """Loads a checkpoint if there is one, else takes a step, and writes what there is then."""
    from megatron_vlmoe.train.checkpoint import CheckpointWriter, load_checkpoint
    from megatron_vlmoe.train.checkpoint_files import TrainState, find_checkpoint

    recorder = Recorder(begin(where, *arguments))
    if source:
        path = find_checkpoint(source)
        assert path is not None
        load_checkpoint(path, recorder.config, recorder.parts)
    elif step:
        recorder.step()
    # Where it was written must not tell the two apart.
    config = replace(recorder.config, checkpoint=replace(recorder.config.checkpoint, load=""))
    writer = CheckpointWriter(Path(target) / "checkpoints", 0, False)
    writer.save(TrainState(step=step), config, recorder.parts)
