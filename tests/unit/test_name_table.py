"""The name table and its transforms, and checkpoints that are written and read without megatron-core."""

from __future__ import annotations

import fnmatch
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_checkpoints import (
    CONFIGS,
    MODEL,
    adam_moments,
    lazy,
    random_tensors,
    save,
    store_as_later_version,
)

from megatron_vlmoe.config.errors import CheckpointError, ConvertError
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, write_checkpoint
from megatron_vlmoe.convert.hf_config import architecture, export_config
from megatron_vlmoe.convert.name_table import (
    FP32_KEYS,
    RULES,
    FusedQkv,
    LeadingAxis,
    PatchConvolution,
    Transform,
    VocabularyRows,
    name_table,
)
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.train.checkpoint_files import TRACKER, TrainState, saved_config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_one_rule_and_every_name_is_used_once(name: str) -> None:
    config = CONFIGS[name]
    # Itself refuses a parameter without a rule or with two.
    table = name_table(config)
    assert [entry.ours for entry in table] == list(checkpoint_shapes(config))
    theirs = [name for entry in table for name in entry.theirs]
    assert len(set(theirs)) == len(theirs)
    assert not any("*" in name for name in theirs)
    # A module holds parameters or other modules under a name, never a parameter that is a prefix.
    assert not any(other.startswith(f"{name}.") for name in theirs for other in theirs)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_the_exported_model_is_in_the_table(name: str) -> None:
    pytest.importorskip("transformers")
    from megatron_vlmoe.convert.hf import modeling_vlmoe
    from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig

    config = CONFIGS[name]
    task = config.task.name if isinstance(config, FinetuneConfig) else ""
    labels = {"num_labels": config.task.num_classes} if task and task != "retrieval" else {}
    content = export_config(config)
    with torch.device("meta"):
        kind = getattr(modeling_vlmoe, architecture(task))
        model = kind(VLMoEConfig(**{**content, **labels}))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    expected = {name: tuple(value.shape) for name, value in tensors}
    assert bool(list(model.buffers())) == (config.moe.balance_bias_rate > 0.0)
    table = name_table(config)
    shapes = {name: shape for e in table for name, shape in e.their_shapes(config.model).items()}
    assert shapes == expected


def test_every_rule_is_used() -> None:
    keys = {key for config in CONFIGS.values() for key in checkpoint_shapes(config)}
    for rule in RULES:
        assert fnmatch.filter(keys, rule.ours), rule.ours


def test_unknown_parameter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "megatron_vlmoe.convert.name_table.checkpoint_shapes"
    monkeypatch.setattr(module, lambda config: {"decoder.layers.0.mlp.strange": (1,)})
    with pytest.raises(LookupError, match="0 rules for decoder.layers.0.mlp.strange"):
        name_table(CONFIGS["dense"])


def test_names_of_one_sparse_block() -> None:
    names = {entry.ours: entry.theirs for entry in name_table(CONFIGS["vl"])}
    block, there = "decoder.layers.2.", "vlmoe.encoder.layer.2."
    assert names[f"{block}mlp.moe.experts.vl.weight1"] == (
        f"{there}feed_forward.vl.experts.fc1_weight",
    )
    assert names[f"{block}mlp.moe.router.text.weight"] == (
        f"{there}feed_forward.text.router.weight",
    )
    assert names[f"{block}mlp.vision_norm.bias"] == (f"{there}feed_forward.vision.layernorm.bias",)
    assert names["decoder.layers.0.mlp.vision_ffn.linear_fc2.weight"] == (
        "vlmoe.encoder.layer.0.feed_forward.vision.fc2.weight",
    )
    assert names[f"{block}self_attention.linear_qkv.bias"] == (
        f"{there}attention.query.bias",
        f"{there}attention.value.bias",
    )


def test_fp32_keys_are_the_routers_and_the_temperature() -> None:
    keys = {key for config in CONFIGS.values() for key in checkpoint_shapes(config)}
    chosen = {key for key in keys if FP32_KEYS.search(key)}
    assert chosen == {key for key in keys if ".router." in key or key == "heads.logit_scale"}
    assert len(chosen) > 1


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_are_those_of_split_and_round_trip_is_exact(name: str) -> None:
    config = CONFIGS[name]
    for index, entry in enumerate(name_table(config)):
        value = torch.randn(entry.shape, generator=torch.Generator().manual_seed(index))
        if isinstance(entry.transform, VocabularyRows):
            value[getattr(config.model, entry.transform.field) :] = 0.0
        if isinstance(entry.transform, FusedQkv) and value.dim() == 1:
            # The key's bias, the second of three in every head.
            value.view(config.model.num_attention_heads, 3, -1)[:, 1] = 0.0
        parts = entry.transform.split(value, config.model)
        shapes = entry.their_shapes(config.model)
        assert tuple(shapes) == entry.theirs
        assert [tuple(part.shape) for part in parts] == list(shapes.values()), entry.ours
        assert torch.equal(entry.transform.join(parts, config.model), value), entry.ours


def test_qkv_rows_by_hand() -> None:
    # Two heads of two rows; the value of a row is head * 100 + part * 10 + row.
    model = replace(MODEL, num_attention_heads=2, hidden_size=4)
    rows = [h * 100 + p * 10 + r for h in (0, 1) for p in (0, 1, 2) for r in (0, 1)]
    ours = torch.tensor(rows, dtype=torch.float32).unsqueeze(1).expand(12, 4)
    query, key, value = FusedQkv().split(ours, model)
    assert query[:, 0].tolist() == [0, 1, 100, 101]
    assert key[:, 3].tolist() == [10, 11, 110, 111]
    assert value[:, 1].tolist() == [20, 21, 120, 121]
    bias = FusedQkv(("q", "v")).join(
        [torch.tensor([1.0, 2, 3, 4]), torch.tensor([5.0, 6, 7, 8])], model
    )
    assert bias.tolist() == [1, 2, 0, 0, 5, 6, 3, 4, 0, 0, 7, 8]


def test_patch_kernel_by_hand() -> None:
    model = replace(MODEL, patch_size=2)
    ours = torch.arange(12.0).unsqueeze(0)
    (kernel,) = PatchConvolution().split(ours, model)
    # Channel, row, column.
    assert kernel[0, 0].tolist() == [[0, 1], [2, 3]]
    assert kernel[0, 2].tolist() == [[8, 9], [10, 11]]


def test_padding_rows_by_hand() -> None:
    model = replace(MODEL, vocab_size=3)
    ours = torch.zeros(128, 2)
    ours[:3] = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
    rows = VocabularyRows("vocab_size")
    (theirs,) = rows.split(ours, model)
    assert theirs.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert torch.equal(rows.join([theirs], model), ours)
    (bias,) = rows.split(torch.arange(128.0), model)
    assert bias.tolist() == [0, 1, 2]
    assert rows.join([bias], model)[:4].tolist() == [0, 1, 2, 0]
    whole = replace(MODEL, vocab_size=128)
    assert rows.shapes((128, 2), whole) == ((128, 2),)


def test_other_transforms_by_hand() -> None:
    table = torch.arange(6.0).reshape(3, 2)
    assert LeadingAxis().split(table, MODEL)[0].tolist() == [[[0, 1], [2, 3], [4, 5]]]
    assert Transform().join(Transform().split(table, MODEL), MODEL) is table


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("vl", torch.bfloat16), ("retrieval", torch.float32), ("no-text-vocabulary", torch.float32)],
)
def test_written_checkpoint_reads_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    tensors = random_tensors(config, dtype=dtype)
    moments = adam_moments(config) if name == "vl" else {}
    path = save(tmp_path / "run", config, tensors, TrainState(step=3), moments)
    assert path.name == "iter_0000003"
    assert (tmp_path / "run" / TRACKER).read_text() == "3\n"
    reader = CheckpointReader(tmp_path / "run")
    assert reader.path == path and reader.config == config
    assert reader.train_state == TrainState(step=3)
    assert reader.tensors.keys() == tensors.keys()
    assert reader.optimizer_tensors.keys() == moments.keys()
    for key, value in {**tensors, **moments}.items():
        found = {**reader.tensors, **reader.optimizer_tensors}[key]
        assert found.shape == value.shape and found.dtype == value.dtype
        assert torch.equal(found.read(), value), key


def failing(config_name: str, error: Exception) -> dict[str, LazyTensor]:
    """Tensors of which the last cannot be read."""
    tensors = lazy(random_tensors(CONFIGS[config_name]))

    def fail() -> torch.Tensor:
        raise error

    key = list(tensors)[-1]
    return tensors | {key: replace(tensors[key], read=fail)}


@pytest.mark.parametrize("error", [ConvertError("part 7: damaged"), OSError(28, "No space left")])
def test_failed_write_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    message = "part 7: damaged" if isinstance(error, ConvertError) else "No space left"
    with pytest.raises(ConvertError, match=message) as caught:
        write_checkpoint(tmp_path, failing("dense", error), config)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    tensors = random_tensors(config)
    path = save(tmp_path, config, tensors)
    bad = failing("dense", ConvertError("no"))
    with pytest.raises(ConvertError, match="has a checkpoint already"):
        write_checkpoint(tmp_path, lazy(tensors), config)
    with pytest.raises(ConvertError, match="no"):
        write_checkpoint(tmp_path, bad, config, overwrite=True)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name, TRACKER]
    key = "decoder.layers.0.gamma_1"
    assert torch.equal(CheckpointReader(tmp_path).tensors[key].read(), tensors[key])
    other = random_tensors(config, seed=1)
    write_checkpoint(tmp_path, lazy(other), config, overwrite=True)
    assert torch.equal(CheckpointReader(tmp_path).tensors[key].read(), other[key])


def test_value_of_another_shape_is_refused(tmp_path: Path) -> None:
    config = CONFIGS["dense"]
    tensors = lazy(random_tensors(config))
    key = "decoder.layers.0.gamma_1"
    tensors[key] = replace(tensors[key], read=lambda: torch.zeros(3))
    with pytest.raises(ConvertError, match=r"gamma_1: has shape \[3\], not \[8\]"):
        write_checkpoint(tmp_path, tensors, config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint."""
    root = tmp_path_factory.mktemp("whole")
    save(root, CONFIGS["dense"], random_tensors(CONFIGS["dense"]))
    return root


def read_all(root: Path) -> None:
    for tensor in CheckpointReader(root).tensors.values():
        tensor.read()


@pytest.mark.parametrize(
    "damage", ["truncated", "no-data", "common", "no-common", "metadata", "marker"]
)
def test_damage_is_one_clear_line(damage: str, whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(whole, root)
    folder = root / "iter_0000000"
    (data,) = folder.glob("*.distcp")
    expected = "iter_0000000"
    if damage == "truncated":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif damage == "no-data":
        data.unlink()
    elif damage == "common":
        (folder / "common.pt").write_bytes(b"nothing")
        expected = "common.pt: damaged"
    elif damage == "no-common":
        (folder / "common.pt").unlink()
        expected = "incomplete: no common.pt"
    elif damage == "metadata":
        (folder / ".metadata").write_bytes(b"")
        expected = "incomplete: .metadata is damaged"
    else:
        (folder / "metadata.json").unlink()
        expected = "incomplete: no metadata.json"
    with pytest.raises(ConvertError, match=expected) as caught:
        read_all(root)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_checkpoint_of_a_later_megatron_core_is_read_alike(tmp_path: Path) -> None:
    """It has no `common.pt`; the finetuning command reads its options without torch."""
    config = CONFIGS["8e"]
    expected = random_tensors(config)
    path = save(tmp_path, config, expected, TrainState(step=7), adam_moments(config))
    before = CheckpointReader(tmp_path)
    store_as_later_version(path)
    found = CheckpointReader(tmp_path)
    assert found.common == before.common and found.train_state.step == 7
    assert found.optimizer_tensors.keys() == before.optimizer_tensors.keys()
    assert found.tensors.keys() == expected.keys()
    for key, tensor in found.tensors.items():
        assert torch.equal(tensor.read(), expected[key])
    assert saved_config(path) == found.common["config"]


@pytest.mark.parametrize("reads_both", [True, False])
def test_a_megatron_core_that_is_too_old_for_a_checkpoint_is_one_clear_line(
    reads_both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vlmoe.train import checkpoint

    path = save(tmp_path, CONFIGS["dense"], random_tensors(CONFIGS["dense"]), TrainState(step=7))
    known = SimpleNamespace() if reads_both else SimpleNamespace(common_backend="torch")
    monkeypatch.setattr(checkpoint, "CheckpointingConfig", known)
    assert checkpoint.load_common(path)["train_state"]["step"] == 7
    store_as_later_version(path)
    if reads_both:
        assert checkpoint.load_common(path)["train_state"]["step"] == 7
        return
    with pytest.raises(CheckpointError, match="a later megatron-core wrote it than the") as caught:
        checkpoint.load_common(path)
    assert str(path) in str(caught.value) and "Python 3.12 or later" in str(caught.value)


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no checkpoint there"):
        CheckpointReader(tmp_path)
    (tmp_path / TRACKER).write_text("last\n")
    with pytest.raises(ConvertError, match="expected a step number, found 'last'"):
        CheckpointReader(tmp_path)
