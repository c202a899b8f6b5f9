"""Checkpoints and Hugging Face folders of small random models, written without megatron-core."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_vlmoe.config.schema import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig, TaskConfig
from megatron_vlmoe.convert.checkpoints import write_checkpoint
from megatron_vlmoe.convert.hf_config import CONFIG_FILE, export_config
from megatron_vlmoe.convert.name_table import name_table
from megatron_vlmoe.convert.tensors import Group, LazyTensor, write_folder
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.runtime.sums import SUMS_FILE, file_sha256, write_sums
from megatron_vlmoe.train.checkpoint_files import (
    COMMON_FILE,
    TrainState,
    common_content,
    of_common,
)

MODEL = ModelConfig(
    num_layers=3,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=16,
    num_vl_layers=1,
    image_size=8,
    patch_size=4,
    text_length=6,
    pair_text_length=7,
    vocab_size=130,
    visual_vocab_size=20,
)
SPARSE = MoEConfig(num_vision_experts=4, num_text_experts=2, layers=(2, 3))
CLASSES = {"vqa": 5, "nlvr2": 2, "retrieval": 0, "imagenet": 3, "mnli": 3}


def _model(**changes: Any) -> RunConfig:
    return RunConfig(model=replace(MODEL, **changes), moe=SPARSE)


def _moe(**changes: Any) -> RunConfig:
    return RunConfig(model=MODEL, moe=replace(SPARSE, **changes))


def _task(name: Any) -> RunConfig:
    task = TaskConfig(name=name, num_classes=CLASSES[name])
    return FinetuneConfig(model=MODEL, moe=SPARSE, task=task)


CONFIGS: Mapping[str, RunConfig] = {
    "dense": RunConfig(model=MODEL),
    "8e": _moe(num_vision_experts=8, num_text_experts=8),
    "uneven-pools": _moe(),
    "vision-only": _moe(modalities="vision"),
    "text-only": _moe(modalities="text"),
    "shared-router": _moe(shared_router=True),
    "vl": _moe(vl=True, num_vl_experts=2),
    "balance-bias": _moe(balance_bias_rate=0.001, vl=True, num_vl_experts=2),
    "shared-and-vl": _moe(shared_router=True, vl=True, num_vl_experts=2, topk=2),
    "default-blocks": _moe(layers=()),
    "all-blocks-vl": _model(num_vl_layers=3),
    "no-vl-block": _model(num_vl_layers=0),
    "token-types": _model(token_type_embeddings=True),
    "no-layer-scale": _model(layer_scale_init=0.0),
    "no-text-vocabulary": _model(vocab_size=0, token_type_embeddings=True),
    "no-visual-vocabulary": _model(visual_vocab_size=0),
    **{name: _task(name) for name in CLASSES},
}


def random_tensors(
    config: RunConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Values for every parameter; what is zero by construction (padding rows, the key's bias) is zero."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for entry in name_table(config):
        value = torch.randn(entry.shape, generator=generator)
        value = entry.transform.join(entry.transform.split(value, config.model), config.model)
        found[entry.ours] = value.to(dtype)
    return found


def lazy(tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """The tensors as a reader would give them."""

    def one(value: Tensor) -> LazyTensor:
        return LazyTensor(tuple(value.shape), value.dtype, lambda: value)

    return {key: one(value) for key, value in tensors.items()}


def save(
    root: Path,
    config: RunConfig,
    tensors: Mapping[str, Tensor],
    state: Optional[TrainState] = None,
    moments: Optional[Mapping[str, Tensor]] = None,
) -> Path:
    """Writes a checkpoint; `moments` are optimizer tensors by their whole key."""
    optimizer = {"optimizer": {"param_groups": [{"step": 3}]}} if moments else None
    content = lazy({**tensors, **(moments or {})})
    return write_checkpoint(root, content, config, state, optimizer)


def adam_moments(config: RunConfig) -> dict[str, Tensor]:
    """The state of AdamW in fp32."""
    kinds = ("param", "exp_avg", "exp_avg_sq")
    shapes = checkpoint_shapes(config)
    return {
        f"optimizer.state.{kind}.{key}": torch.full(shape, 0.5)
        for kind in kinds
        for key, shape in shapes.items()
    }


def save_hugging_face(folder: Path, config: RunConfig, tensors: Mapping[str, Tensor]) -> Path:
    """Writes the weights and the configuration of an export; those of the tensors that are there."""
    folder.mkdir(parents=True)
    groups = []
    for entry in name_table(config):
        if entry.ours not in tensors:
            continue
        value, shapes = tensors[entry.ours], entry.their_shapes(config.model)
        parts = entry.transform.split(value, config.model)
        names = tuple(shapes)
        groups.append(Group(names, tuple(shapes.values()), value.dtype, lambda p=parts: p))
    for _ in write_folder(folder, groups, 20_000):
        pass
    content = export_config(config)
    (folder / CONFIG_FILE).write_text(json.dumps(content))
    return folder


def noted_layout(config: RunConfig, tensor: int, expert: int) -> RunConfig:
    """The configuration with a layout that it notes."""
    sizes = ParallelConfig(tensor_model_parallel_size=tensor, expert_model_parallel_size=expert)
    return replace(config, parallel=sizes)


@contextlib.contextmanager
def edited_common(path: Path) -> Iterator[dict[str, Any]]:
    """What an iteration folder holds besides tensors, for a test to change; it then has it in a file, which counts."""
    common = of_common(torch.load(io.BytesIO(common_content(path)), weights_only=True))
    yield common
    torch.save(common, path / COMMON_FILE)
    if (path / SUMS_FILE).exists():
        sum_again(path)


def store_as_later_version(path: Path) -> None:
    """Stores what an iteration folder holds besides tensors as megatron-core 0.19 does, among the tensors."""
    content = io.BytesIO()
    torch.save([torch.load(path / COMMON_FILE, weights_only=True)], content)
    metadata = FileSystemReader(path).read_metadata()
    key, data = "common_state/shard_0_1", next(path.glob("*.distcp"))
    place = _StorageInfo(data.name, data.stat().st_size, content.tell())
    metadata.state_dict_metadata[key] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex(key)] = place
    with data.open("ab") as file:
        file.write(content.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / COMMON_FILE).unlink()
    marker = path / "metadata.json"
    written = json.loads(marker.read_text())
    marker.write_text(json.dumps({k: v for k, v in written.items() if "common" not in k}))
    sum_again(path)


def sum_again(path: Path) -> None:
    """Writes the sums of a checkpoint whose files were changed on purpose."""
    (path / SUMS_FILE).unlink(missing_ok=True)
    write_sums(path, {file.name: file_sha256(file) for file in path.iterdir()})
