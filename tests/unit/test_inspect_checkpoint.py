"""Inspection and comparison of checkpoints, on small ones with random values."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import (
    CONFIGS,
    adam_moments,
    noted_layout,
    random_tensors,
    save,
    save_hugging_face,
)
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.compare import Comparison, compare_checkpoints, comparison_lines
from megatron_vlmoe.convert.inspect import Inspection, inspect_checkpoint, inspection_lines
from megatron_vlmoe.planning.parameters import (
    TASK_HEADS,
    checkpoint_shapes,
    parameter_counts,
    parameters,
    part_of,
)
from megatron_vlmoe.train.checkpoint_files import TrainState

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "inspect_checkpoint.py"
SPARSE = CONFIGS["uneven-pools"]
WEIGHT1 = "decoder.layers.1.mlp.moe.experts.vision.weight1"
QKV = "decoder.layers.0.self_attention.linear_qkv"


def part_sizes(config: RunConfig) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for key, shape in checkpoint_shapes(config).items():
        sizes[part_of(key)] = sizes.get(part_of(key), 0) + math.prod(shape)
    return sizes


def activated_by_part(config: RunConfig) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for parameter in parameters(config):
        sizes[parameter.part] = sizes.get(parameter.part, 0) + parameter.activated
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_are_those_of_the_estimate(name: str) -> None:
    config = CONFIGS[name]
    model, sizes, activated = config.model, part_sizes(config), activated_by_part(config)
    counts = parameter_counts(config)
    assert not sizes.keys() - activated.keys() - {TASK_HEADS}, "a key of no part"
    expected = dict(counts.parts)
    per_token = counts.per_token
    is_task = TASK_HEADS in sizes
    if not model.vocab_size:
        # The estimate assumes the paper's vocabulary where none is known.
        rows = max(model.text_length, model.pair_text_length) + 1
        absent = counts.parts["text embedding"] + rows * model.hidden_size
        expected |= {"text embedding": 0, "text head": 0}
        expected["positions"] -= rows * model.hidden_size
        per_token -= absent
    if is_task or not model.visual_vocab_size:
        expected["image head"] = 0
    if is_task:
        expected["text head"] = 0
        expected[TASK_HEADS] = sizes[TASK_HEADS]
    # A bias of experts is saved, but no parameter.
    biases = sizes.pop("balance biases", 0)
    assert (biases > 0) == (config.moe.balance_bias_rate > 0.0)
    assert sizes == {part: size for part, size in expected.items() if size}
    assert sum(activated.values()) == per_token
    assert all(activated.get(part, 0) <= size for part, size in sizes.items())


def test_task_heads_by_hand() -> None:
    width = SPARSE.model.hidden_size
    pooler, matching = width * width + width, 2 * width + 2
    assert part_sizes(CONFIGS["retrieval"])[TASK_HEADS] == 2 * width**2 + 1 + pooler + matching
    assert part_sizes(CONFIGS["imagenet"])[TASK_HEADS] == 3 * width + 3


def test_names_of_no_part() -> None:
    assert part_of("decoder.layers.0.something.weight") == "unknown"
    assert part_of("vlmoe.layernorm.weight") == "unknown"


Change = Callable[[dict[str, Tensor]], Any]


def saved(
    folder: Path, config: RunConfig = SPARSE, change: Change = lambda tensors: None, **kw: Any
) -> Path:
    tensors = random_tensors(config)
    change(tensors)
    save(folder, config, tensors, **kw)
    return folder


def problems(inspection: Inspection) -> list[tuple[str, str]]:
    return [(problem.kind, problem.name) for problem in inspection.problems]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound sparse checkpoint with optimizer state."""
    folder = tmp_path_factory.mktemp("sound")
    config = noted_layout(SPARSE, 1, 1)
    return saved(folder, config, state=TrainState(step=3), moments=adam_moments(config))


@pytest.fixture(scope="module")
def inspected(sound: Path) -> Inspection:
    return inspect_checkpoint(sound)


def test_sound_checkpoint(inspected: Inspection) -> None:
    found = inspected
    tensors = random_tensors(SPARSE)
    assert not found.problems
    assert found.total == sum(value.numel() for value in tensors.values())
    assert found.weight_bytes == 4 * found.total and found.types == {"float32": len(tensors)}
    assert found.activated == parameter_counts(SPARSE).per_token
    assert {part.part: part.total for part in found.parts} == part_sizes(SPARSE)
    heads = next(part for part in found.parts if part.part == "image head")
    both = torch.cat([v.flatten() for key, v in tensors.items() if key.startswith("heads.image")])
    assert heads.rms == pytest.approx(float(both.square().mean().sqrt()))
    assert heads.largest == pytest.approx(float(both.abs().max()))
    assert found.optimizer is not None and found.optimizer.steps == 3
    assert found.optimizer.kinds == dict.fromkeys(("param", "exp_avg", "exp_avg_sq"), len(tensors))
    assert found.optimizer.nbytes == 12 * found.total
    assert found.optimizer.parts["exp_avg"] == (0.5, 0.5)
    lines = inspection_lines(found)
    assert lines[1] == "  step 3 of 200000, seed 1234"
    assert "  experts: 2 text, 4 vision in blocks 2-3; top 1" in lines
    assert "  pieces: attention in 1 (TP), experts in 1 (EP)" in lines
    assert "  layout of the run: TP 1 x PP 1 x VPP 1 x EP 1" in lines
    assert lines[-1] == "No problem: every tensor is there and finite."


def test_pools_by_hand(inspected: Inspection) -> None:
    found = inspected
    tensors = random_tensors(SPARSE)
    assert [(pool.block, pool.pool) for pool in found.pools] == [
        (2, "text"),
        (2, "vision"),
        (3, "text"),
        (3, "vision"),
    ]
    vision = found.pools[1]
    assert vision.fc1_norms == pytest.approx([float(e.norm()) for e in tensors[WEIGHT1]])
    router = tensors["decoder.layers.1.mlp.moe.router.vision.weight"]
    assert vision.router_norms == pytest.approx([float(row.norm()) for row in router])
    weight2 = tensors[WEIGHT1.replace("weight1", "weight2")]
    assert vision.fc2_norms == pytest.approx([float(e.norm()) for e in weight2])
    first, second = (e.flatten() for e in tensors[WEIGHT1.replace("vision", "text")])
    expected = torch.nn.functional.cosine_similarity(first, second, dim=0)
    assert found.pools[0].fc1_cosine == pytest.approx(float(expected))
    assert vision.identical == []


def test_layout_that_a_converter_did_not_write(tmp_path: Path) -> None:
    lines = inspection_lines(inspect_checkpoint(saved(tmp_path, noted_layout(SPARSE, 2, 2))))
    assert "  layout of the run: TP 2 x PP 1 x VPP 1 x EP 2" in lines
    assert "  the pieces are not those of that layout: a converter wrote them" in lines
    assert "  optimizer state: none" in lines


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT1][2, 1, 3] = float("nan")
        tensors[WEIGHT1][3, 0, 0] = float("inf")
        tensors["heads.image.linear.bias"][5] = float("-inf")

    moments = adam_moments(SPARSE)
    name = "optimizer.state.exp_avg_sq.heads.image.linear.bias"
    moments[name][0] = float("nan")
    found = inspect_checkpoint(saved(tmp_path, change=spoil, moments=moments))
    assert {p.name: (p.kind, p.detail) for p in found.problems} == {
        WEIGHT1: ("not finite", "1 NaN and 1 Inf of 512 values, first at [2, 1, 3]"),
        "heads.image.linear.bias": ("not finite", "1 Inf of 128 values, first at [5]"),
        name: ("not finite", "1 NaN of 128 values, first at [0]"),
    }
    assert all(math.isfinite(part.rms) for part in found.parts)


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{QKV}.bias"]
        tensors["decoder.layers.9.gamma_1"] = torch.ones(8)
        tensors["decoder.layers.0.gamma_1"] = torch.ones(9)

    moments = adam_moments(SPARSE)
    del moments["optimizer.state.exp_avg.heads.image.linear.bias"]
    # What is stored in fp32 needs no copy in fp32.
    del moments["optimizer.state.param.heads.image.linear.weight"]
    # A frozen parameter has no state at all.
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        del moments[f"optimizer.state.{kind}.heads.text.linear.bias"]
    moments["optimizer.state.exp_avg.decoder.layers.9.gamma_1"] = torch.ones(8)
    found = inspect_checkpoint(saved(tmp_path, change=change, moments=moments))
    assert sorted(problems(found)) == [
        ("missing", f"{QKV}.bias"),
        ("missing", "optimizer.state.exp_avg.heads.image.linear.bias"),
        ("shape", "decoder.layers.0.gamma_1"),
        ("unexpected", "decoder.layers.9.gamma_1"),
        ("unexpected", "optimizer.state.exp_avg.decoder.layers.9.gamma_1"),
    ]
    details = {problem.name: problem.detail for problem in found.problems}
    assert details["decoder.layers.0.gamma_1"] == "[9], but the configuration says [8]"


def test_identical_experts_and_zero_router(tmp_path: Path) -> None:
    def upcycle(tensors: dict[str, Tensor]) -> None:
        for name in ("weight1", "bias1", "weight2", "bias2"):
            pool = tensors[WEIGHT1.replace("weight1", name)]
            pool[2] = pool[0]
            pool[3] = pool[1]
        # Equal but for one bias: not identical.
        text = tensors[WEIGHT1.replace("vision", "text")]
        text[1] = text[0]
        tensors["decoder.layers.1.mlp.moe.router.vision.weight"].zero_()

    found = inspect_checkpoint(saved(tmp_path, change=upcycle))
    assert [pool.identical for pool in found.pools] == [[], [[0, 2], [1, 3]], [], []]
    lines = inspection_lines(found)
    assert not found.problems
    assert any("block 2, vision: experts 0, 2; 1, 3 are identical" in line for line in lines)
    assert "  block 2, vision: the router is zero, every gate is 1/E" in lines
    assert found.pools[0].fc1_cosine == pytest.approx(1.0)


def test_hugging_face_folder_is_inspected_alike(tmp_path: Path) -> None:
    config = CONFIGS["vqa"]
    folder = save_hugging_face(tmp_path / "export", config, random_tensors(config))
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = inspect_checkpoint(folder)
    here = inspect_checkpoint(saved(tmp_path / "run", config))
    assert not found.problems
    assert found.parts == here.parts and found.pools == here.pools
    assert found.optimizer is None and found.written.writers == 0


def test_damaged_hugging_face_folder(tmp_path: Path) -> None:
    tensors = random_tensors(SPARSE)
    # The second head's first value row: row 4 of the value matrix there.
    tensors[f"{QKV}.weight"].view(2, 3, 4, 8)[1, 2, 0, 5] = float("nan")
    del tensors[f"{QKV}.bias"], tensors["decoder.layers.1.gamma_2"]
    folder = save_hugging_face(tmp_path / "export", SPARSE, tensors)
    attention = "vlmoe.encoder.layer.0.attention"
    found = inspect_checkpoint(folder)
    assert problems(found) == [
        ("missing", f"{attention}.query.bias"),
        ("missing", f"{attention}.value.bias"),
        ("missing", "vlmoe.encoder.layer.1.lambda_2"),
        ("not finite", f"{attention}.value.weight"),
    ]
    assert found.problems[-1].detail == "1 NaN of 64 values, first at [4, 5]"
    file = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert ("checksum", file.name) in problems(inspect_checkpoint(folder))


def compared(comparison: Comparison) -> dict[str, tuple[float, ...]]:
    """Numbers of the tensors that differ, in their order."""
    return {
        pair.name: (pair.distance.different, pair.distance.largest, pair.distance.relative)
        for pair in comparison.pairs
        if not pair.equal
    }


def test_difference_by_hand(sound: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.layers.0.gamma_1"] *= 1.5
        tensors["decoder.layers.0.gamma_2"] *= -1.0
        tensors[WEIGHT1][0, 0, 0] += 0.25

    other = saved(tmp_path, noted_layout(SPARSE, 2, 1), change)
    found = compare_checkpoints(sound, other)
    gamma = random_tensors(SPARSE)["decoder.layers.0.gamma_1"]
    numbers = compared(found)
    assert list(numbers) == ["decoder.layers.0.gamma_2", "decoder.layers.0.gamma_1", WEIGHT1]
    assert numbers["decoder.layers.0.gamma_2"][2] == pytest.approx(2.0)
    assert numbers["decoder.layers.0.gamma_1"] == pytest.approx(
        (8, float(gamma.abs().max()) / 2, 1.0 / 3.0)
    )
    assert numbers[WEIGHT1][:2] == pytest.approx((1, 0.25))
    parts = {part.part: part for part in found.parts}
    assert (parts["norms"].equal, parts["attention"].equal) == (
        parts["norms"].tensors - 2,
        parts["attention"].tensors,
    )
    assert parts["vision experts"].distance.largest == pytest.approx(0.25)
    assert not found.equal and not found.only_left and not found.only_right
    assert [o.name for o in found.options] == ["parallel.tensor_model_parallel_size"]
    lines = comparison_lines(found, 1)
    title = f"Tensors that differ: 3 of {len(found.pairs)}; the 1 that differ most"
    assert lines[lines.index(title) + 2].split()[0] == "decoder.layers.0.gamma_2"
    assert "  parallel.tensor_model_parallel_size: 1 | 2" in lines
    assert lines[-1].startswith(f"Different: 3 of {len(found.pairs)} tensors, 0 shapes")


def test_difference_of_architectures(sound: Path, tmp_path: Path) -> None:
    model = replace(SPARSE.model, text_length=9)
    dense = replace(CONFIGS["dense"], model=model)
    found = compare_checkpoints(sound, saved(tmp_path, dense))
    assert found.shapes == {"embedding.text.position": ((7, 8), (9, 8))}
    assert WEIGHT1 in found.only_left and len(found.only_left) == 4 * 5
    assert "decoder.layers.1.mlp.vision_ffn.linear_fc1.weight" in found.only_right
    names = [option.name for option in found.options]
    assert names[0] == "model.text_length" and "moe.num_vision_experts" in names
    lines = comparison_lines(found, 2)
    assert "  and 18 more" in lines and "  embedding.text.position: [7, 8] | [9, 8]" in lines


def test_types_that_differ_are_a_difference(tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.layers.0.gamma_1"] = torch.ones(8).bfloat16()

    def ones(tensors: dict[str, Tensor]) -> None:
        tensors["decoder.layers.0.gamma_1"] = torch.ones(8)

    found = compare_checkpoints(
        saved(tmp_path / "a", change=change), saved(tmp_path / "b", change=ones)
    )
    assert compared(found) == {"decoder.layers.0.gamma_1": (0, 0.0, 0.0)}
    assert not found.equal
    assert any("bfloat16 | float32" in line for line in comparison_lines(found, 0))


def test_optimizer_on_request(sound: Path, tmp_path: Path) -> None:
    moments = adam_moments(SPARSE)
    name = "optimizer.state.exp_avg.decoder.layers.0.gamma_1"
    moments[name] = moments[name] * 2.0
    config = noted_layout(SPARSE, 1, 1)
    other = saved(tmp_path, config, state=TrainState(step=3), moments=moments)
    assert compare_checkpoints(sound, other).equal
    found = compare_checkpoints(sound, other, with_optimizer=True)
    assert compared(found) == {name: (8, 0.5, 0.5)}
    assert {p.part: p.equal for p in found.parts}["norms, exp_avg"] == sum(
        part_of(key) == "norms" for key in checkpoint_shapes(SPARSE)
    ) - 1


@pytest.mark.parametrize("name", ["vl", "retrieval"])
def test_export_equals_its_checkpoint(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    folder = save_hugging_face(tmp_path / "export", config, random_tensors(config))
    # Rows that only fill the vocabulary up are in a checkpoint and not in an export.
    word = "embedding.text.word.weight"
    run = saved(tmp_path / "run", config, lambda tensors: tensors[word][130:].fill_(1.0))
    found = compare_checkpoints(run, folder)
    assert found.equal and len(found.pairs) == len(checkpoint_shapes(config))
    assert not found.options
    # What differs because it is damaged, is no difference between the two.
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ConvertError, match=rf"{file.name}: damaged: differs from what was exported"
    ):
        compare_checkpoints(run, folder)


def test_one_tensor_is_read_at_a_time(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was read before is freed when the next tensor is read (the next pair, in a comparison)."""
    import weakref

    from megatron_vlmoe.convert.checkpoints import CheckpointReader

    alive: list[Any] = []
    most: list[int] = []
    original = CheckpointReader._read

    def read(self: CheckpointReader, key: str) -> Tensor:
        value = original(self, key)
        alive.append(weakref.ref(value))
        most.append(sum(reference() is not None for reference in alive))
        return value

    monkeypatch.setattr(CheckpointReader, "_read", read)
    inspect_checkpoint(sound)
    assert max(most) == 1
    alive.clear()
    most.clear()
    compare_checkpoints(sound, sound)
    assert max(most) == 2


def load_tool() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("inspect_checkpoint_tool", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tool() -> Iterator[Callable[..., int]]:
    yield lambda *arguments: int(load_tool().main([str(word) for word in arguments]))


def test_exit_status_and_output(
    tool: Callable[..., int], sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool(sound, "--config", "--json", tmp_path / "report.json") == 0
    printed = capsys.readouterr().out
    assert "No problem: every tensor is there and finite." in printed
    assert "  layer_scale_init: 0.1" in printed
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["train_state"]["step"] == 3 and content["problems"] == []
    assert content["parameters"]["total"] == sum(part["total"] for part in content["parts"])
    assert content["config"]["moe"]["layers"] == [2, 3]

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT1].fill_(float("nan"))

    bad = saved(tmp_path / "bad", change=spoil)
    assert tool(bad, "--json", tmp_path / "bad.json") == 1
    printed = capsys.readouterr().out
    assert f"  not finite: {WEIGHT1}: 512 NaN of 512 values, first at [0, 0, 0]" in printed
    assert "1 problem(s)" in printed
    # Strict JSON, with null for what is no number.
    content = json.loads((tmp_path / "bad.json").read_text(), parse_constant=pytest.fail)
    assert content["problems"][0]["name"] == WEIGHT1
    assert tool("diff", sound, bad, "--top", "1") == 1
    printed = capsys.readouterr().out
    assert f"1 of {len(checkpoint_shapes(SPARSE))} tensors" in printed
    assert "512 (512 not finite)" in printed
    assert tool("diff", sound, sound, "--json", "-") == 0
    content = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert content["equal"] and len(content["tensors"]) == len(checkpoint_shapes(SPARSE))


@pytest.mark.process
def test_trouble_is_one_line_and_status_2_without_megatron_core(tmp_path: Path) -> None:
    script = (
        "import runpy, sys; sys.modules['megatron'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    missing = tmp_path / "nowhere"
    command = [sys.executable, "-c", script, str(TOOL), "diff", str(missing), str(missing)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=200)
    expected = (2, "", f"error: {missing}: no such folder\n")
    assert (result.returncode, result.stdout, result.stderr) == expected


def test_neither_checkpoint_nor_export(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="no checkpoint there"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConvertError, match="model_type is 'bert', not 'vlmoe'"):
        inspect_checkpoint(tmp_path)
