"""Checkpoints with DeepSpeed-MoE layers: the files, and VLMo-style models in them."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Workers, free_port
from public_states import (
    SMALL,
    filled,
    vlmo_shapes,
    with_experts,
    write_deepspeed,
)
from torch import Tensor
from vlmo_reference import VLMoReference, encode_with_checkpoint

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.public.command import import_public, open_source, plan_import
from megatron_vlmoe.convert.public.planner import ImportOptions
from megatron_vlmoe.convert.public.torch_files import read_deepspeed

# Blocks from 0, and experts of their MoE layers: a pool of each modality.
BLOCKS = {0: 2, 1: 2}
EXPERT = "layer_{}_expert_{}_mp_rank_00_model_states.pt"
DENSE = "mp_rank_00_model_states.pt"


def sparse_state(kinds: str = "text imag", blocks: dict[int, int] | None = None) -> dict:
    return with_experts(filled(vlmo_shapes(SMALL)), blocks or BLOCKS, kinds)


def expect(message: str, location: Path) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)) as caught:
        read_deepspeed(location)
    assert "\n" not in str(caught.value)


def assert_same(found: Any, state: dict[str, Tensor]) -> None:
    assert found.tensors.keys() == state.keys()
    for name, value in state.items():
        lazy = found.tensors[name]
        assert lazy.shape == tuple(value.shape) and torch.equal(lazy.read(), value), name


def test_files_are_merged(tmp_path):
    state = sparse_state()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    arguments = argparse.Namespace(lr=1e-3)
    folder = write_deepspeed(tmp_path / "run" / "global_step2", wrapped, args=arguments)
    assert len(list(folder.glob("layer_*"))) == 8
    # Optimizer files lie beside and are not looked at.
    (folder / "expp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"not read")
    # Whatever other packages have told torch to trust.
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = read_deepspeed(folder)
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    assert_same(found, state)
    assert found.skipped == ("argparse.Namespace",)
    assert read_deepspeed(tmp_path / "run").path == folder


def test_latest_names_the_folder(tmp_path):
    for step in (1, 2):
        write_deepspeed(tmp_path / f"global_step{step}", sparse_state())
    expect("name one of them", tmp_path)
    (tmp_path / "latest").write_text("global_step1\n")
    assert read_deepspeed(tmp_path).path == tmp_path / "global_step1"
    for content in (b"global_step9", b"\xff\xfe", b"x" * 300):
        (tmp_path / "latest").write_bytes(content)
        expect("`latest` names it", tmp_path)
    (tmp_path / "latest").write_bytes(b"x" * 5000)
    expect(f"{'x' * 300}...: no such folder", tmp_path)


def test_missing_experts_are_named(tmp_path):
    folder = write_deepspeed(tmp_path / "x", sparse_state())
    for place in ((1, 0), (3, 1)):
        (folder / EXPERT.format(*place)).unlink()
    expect(
        "2 of 8 expert files are missing (each expert-parallel rank writes its own): "
        f"{EXPERT.format(1, 0)}, {EXPERT.format(3, 1)}",
        folder,
    )


def test_experts_in_wrong_places(tmp_path):
    folder = write_deepspeed(tmp_path / "x", sparse_state())
    first, other = folder / EXPERT.format(0, 0), folder / EXPERT.format(2, 0)
    other.write_bytes(first.read_bytes())
    expect("expected expert 0 of transformer.blocks.1.mlp_text", folder)
    first.rename(folder / EXPERT.format(9, 0))
    first.write_bytes(other.read_bytes())
    expect("1 expert files belong to no gate", folder)


def test_damaged_expert(tmp_path):
    folder = write_deepspeed(tmp_path / "x", sparse_state())
    path = folder / EXPERT.format(2, 1)
    path.write_bytes(path.read_bytes()[:500])
    expect(f"{path}: ", folder)
    path.unlink()
    key = "transformer.blocks.1.mlp_text.deepspeed_moe.experts.deepspeed_experts.1.fc1.bias"
    torch.save({key: torch.zeros(96)}, path)
    expect("has ['fc1.bias'], other experts ['fc1.bias', 'fc1.weight'", folder)


@pytest.mark.parametrize(
    ("remove", "add", "message"),
    [
        ("", "mp_rank_01_model_states.pt", "several tensor-parallel ranks"),
        (DENSE, "zero_pp_rank_0_mp_rank_00_model_states.pt", "ZeRO stage 3"),
        (DENSE, "layer_00-model_states.pt", "pipeline engine"),
        (DENSE, "", f"has no {DENSE}"),
    ],
)
def test_other_kinds_are_refused(tmp_path, remove, add, message):
    folder = write_deepspeed(tmp_path / "x", sparse_state())
    if remove:
        (folder / remove).unlink()
    if add:
        (folder / add).write_bytes(b"")
    expect(message, folder)


def test_gate_that_is_no_matrix(tmp_path):
    gate = "transformer.blocks.0.mlp_text.deepspeed_moe.gate.wg.weight"
    folder = write_deepspeed(tmp_path / "x", sparse_state() | {gate: torch.zeros(())})
    expect(f"{gate} [] has not 2 axes", folder)


def test_residual_moe_is_refused(tmp_path):
    state = sparse_state() | {"transformer.blocks.0.mlp_text.coefficient.weight": torch.zeros(2, 3)}
    expect("residual MoE", write_deepspeed(tmp_path / "x", state))


# ---- into a sparse checkpoint


def options(folder: Path, **more: Any) -> ImportOptions:
    given = {"image_size": 32, "text_length": 10, "pair_text_length": 8}
    return ImportOptions(family="vlmo", source=folder, **{**given, **more})


def test_experts_are_stacked_and_gates_are_routers(tmp_path):
    state = sparse_state()
    given = options(write_deepspeed(tmp_path / "x", state), topk=2)
    plan, what = plan_import(given, open_source(given))
    moe = plan.config.moe
    assert "experts in blocks [1, 2]" in what
    assert (moe.layers, moe.modalities, moe.vl) == ((1, 2), "both", False)
    assert (moe.num_vision_experts, moe.num_text_experts) == (2, 2)
    # Of two experts DeepSpeed divides the gates by their sum.
    assert moe.topk == 2 and moe.normalize_gate
    ours = {key: tensor.read() for key, tensor in plan.tensors().items()}
    theirs, block = "transformer.blocks.1.mlp_imag.deepspeed_moe", "decoder.layers.1.mlp.moe"
    assert torch.equal(ours[f"{block}.router.vision.weight"], state[f"{theirs}.gate.wg.weight"])
    for name, end in {"weight1": "fc1.weight", "bias2": "fc2.bias"}.items():
        for e in range(2):
            expert = state[f"{theirs}.experts.deepspeed_experts.{e}.{end}"]
            assert torch.equal(ours[f"{block}.experts.vision.{name}"][e], expert)
    assert not plan.report(what).unknown


@pytest.mark.parametrize(
    ("kinds", "blocks", "expected"),
    [
        ("imag", {1: 4}, ("vision", 4, 0, 0)),
        ("text", {0: 4, 2: 4}, ("text", 0, 4, 0)),
        ("text imag vl", {2: 4}, ("both", 4, 4, 4)),
    ],
)
def test_pools_of_some_kinds(tmp_path, kinds, blocks, expected):
    given = options(write_deepspeed(tmp_path / "x", sparse_state(kinds, blocks)))
    moe = plan_import(given, open_source(given))[0].config.moe
    counts = (moe.num_vision_experts, moe.num_text_experts, moe.num_vl_experts)
    assert (moe.modalities, *counts) == expected
    assert moe.layers == tuple(block + 1 for block in blocks)


def test_pools_that_have_no_place_here(tmp_path):
    state = with_experts(sparse_state("imag", {0: 2}), {1: 2}, "text imag")
    given = options(write_deepspeed(tmp_path / "x", state))
    with pytest.raises(ConvertError, match="block 1 has experts {'vision': 2}"):
        plan_import(given, open_source(given))


def test_sparse_model_computes_the_same(tmp_path: Path, workers: Workers) -> None:
    state = sparse_state("text imag", {1: 4})
    given = options(write_deepspeed(tmp_path / "x", state))
    import_public(given, tmp_path / "out", strict=True)
    assert CheckpointReader(tmp_path / "out").config.moe.layers == (2,)
    generator = np.random.default_rng(5)
    no_ids = np.zeros((0, 10), dtype=np.int64)
    pixels = generator.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    batch = {
        "texts": {"ids": no_ids},
        "pair_texts": {"ids": no_ids},
        "pair_images": {"pixels": pixels[:0]},
        "images": {"pixels": pixels},
    }
    (found,) = workers.run(1, encode_with_checkpoint, str(tmp_path / "out"), batch)
    model = VLMoReference(state, SMALL)
    tokens = model.embed_image(torch.from_numpy(pixels) / 127.5 - 1)
    expected = model.encode(tokens, "imag").numpy()
    assert np.abs(found["images"] - expected).max() < 2e-5


# ---- files that DeepSpeed itself wrote

TRAINING = """
import argparse, os, sys
import deepspeed, deepspeed.comm.torch, torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

folder = sys.argv[1]
# Gloo does without the extension for shared memory, which would be compiled now.
deepspeed.comm.torch.build_shm_op = lambda: None
deepspeed.init_distributed("gloo")
torch.manual_seed(0)


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(16, 24), torch.nn.Linear(24, 16)

    def forward(self, x):
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm2_text = torch.nn.LayerNorm(16)
        self.mlp_text = MoE(16, Mlp(), num_experts=4, ep_size=2, k=1)
        self.mlp_imag = MoE(16, Mlp(), num_experts=2, ep_size=2, k=1)

    def forward(self, x):
        x = self.norm2_text(x)
        return self.mlp_text(x)[0] + self.mlp_imag(x)[0]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.transformer.blocks = torch.nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.transformer.blocks:
            x = x + block(x)
        return x


model = Model()
groups = split([{"params": list(model.parameters()), "name": "all"}])
optimizer = torch.optim.Adam(groups, lr=1e-2)
engine, *_ = deepspeed.initialize(
    model=model, optimizer=optimizer, config={"train_micro_batch_size_per_gpu": 2}
)
loss = engine(torch.randn(2, 5, 16)).square().mean()
engine.backward(loss)
engine.step()
rank = torch.distributed.get_rank()
engine.save_checkpoint(folder, client_state={"args": argparse.Namespace(lr=1e-2)})
# Its own experts, by their numbers over all ranks.
state = {}
for name, value in model.state_dict().items():
    head, marker, tail = name.partition(".deepspeed_experts.")
    if marker:
        local, rest = tail.split(".", 1)
        count = 2 if "mlp_text" in head else 1
        name = f"{head}{marker}{rank * count + int(local)}.{rest}"
    state[name] = value
torch.save(state, os.path.join(folder, f"expected_{rank}.pt"))
torch.distributed.barrier()
"""


def train_with_deepspeed(script: Path, folder: Path, seconds: float) -> None:
    """Runs the script on two ranks; none outlives the call."""
    variables = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    ranks = []
    for rank in ("0", "1"):
        log = (folder / f"log_{rank}.txt").open("w")
        own = {**variables, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, str(script), str(folder)]
        ranks.append(subprocess.Popen(command, env=own, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + seconds
    try:
        for rank, process in enumerate(ranks):
            code = process.wait(timeout=max(end - time.monotonic(), 0.1))
            assert code == 0, (folder / f"log_{rank}.txt").read_text()[-3000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.process
def test_files_of_deepspeed(tmp_path):
    pytest.importorskip("deepspeed")
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(TRAINING)
    folder.mkdir()
    train_with_deepspeed(script, folder, seconds=240)
    expected = {}
    for rank in (0, 1):
        expected |= torch.load(folder / f"expected_{rank}.pt", weights_only=True)
    found = read_deepspeed(folder)
    assert sum(".deepspeed_experts." in name for name in expected) == 2 * (4 + 2) * 4
    assert_same(found, expected)
    assert "argparse.Namespace" in found.skipped
    gate = "transformer.blocks.0.mlp_text.deepspeed_moe.gate.wg.weight"
    assert found.shape(gate) == (4, 16)
