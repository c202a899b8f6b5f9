"""The weights of a checkpoint of any layout, or of a Hugging Face folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import CheckpointError, ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.importing import HuggingFaceModel
from megatron_vlmoe.train.checkpoint import load_checkpoint, load_common
from megatron_vlmoe.train.rank_sums import verify_checkpoint
from megatron_vlmoe.train.resume import CheckpointWeights, WeightSource, warm_start
from megatron_vlmoe.train.run_files import is_hugging_face


def weight_source(path: Path, in_parallel: bool = False, verify: bool = True) -> WeightSource:
    """The weights of an iteration folder, see `CheckpointWeights`, or of a Hugging Face folder.

    Raises:
        CheckpointError: a damaged checkpoint, or a Hugging Face folder that is damaged, tampered with, or of another
            architecture.
    """
    if not is_hugging_face(path):
        return CheckpointWeights(path, in_parallel, verify)
    try:
        # Checksums cost a whole reading: once per node.
        return HuggingFaceModel(path, verify and int(os.environ.get("LOCAL_RANK", 0)) == 0)
    except ConvertError as error:
        raise CheckpointError(str(error)) from None


def load_weights(path: Path, config: RunConfig, parts: Any) -> None:
    """Loads the whole model of a run, heads included.

    Raises:
        CheckpointError: it is of another model, incomplete or damaged.
    """
    verify = config.checkpoint.verify
    if not is_hugging_face(path):
        if verify:
            verify_checkpoint(path, lambda: load_common(path))
        load_checkpoint(path, config, parts, with_optimizer=False)
        return
    report = warm_start(weight_source(path, verify=verify), config, parts, with_heads=True)
    if missing := (*report.new, *report.resized):
        raise CheckpointError(f"{path}: {missing[0]} does not fit the model of this run")
