"""Import of public checkpoints: published sizes, files, refusals, command line."""

from __future__ import annotations

import argparse
import enum
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from public_states import (
    BASE,
    SMALL,
    beit2_shapes,
    beit3_shapes,
    count,
    expect,
    filled,
    planned,
    run,
    save,
    vlmo_shapes,
)

from megatron_vlmoe.convert.public.torch_files import read_public_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.import_public import main


@pytest.mark.parametrize("attention", ["vision", "text", "mean"])
def test_published_sizes_of_beit3(attention):
    shapes = beit3_shapes(replace(BASE, vocab=64010, text=1024))
    # 276 M in its README, heads included.
    assert count(shapes) == 276_510_730
    report = planned(shapes, "beit3", attention=attention, vl_ffn="vision")
    assert not report.unknown
    # Without a text tokenizer nothing is left to be new.
    assert [new.ours for new in report.new] == []
    assert all("sub-LN" in entry.how or "VL-FFN" in entry.how or "mean" in entry.how
               for entry in report.adapted)  # fmt: skip


def test_published_sizes_of_vlmo():
    shapes = vlmo_shapes(BASE)
    # 175 M in its README: the model without heads.
    assert round(count(shapes, "transformer.", "text_embeddings") / 1e6) == 175
    report = planned(shapes, "vlmo")
    assert report.what.startswith("VLMo, 12 blocks of width 768, 12 heads, VL-FFN in the last 2")
    assert not report.unknown and not report.adapted
    blocks = [name for name in shapes if name.startswith("transformer.blocks.")]
    assert {source for entry in report.taken for source in entry.sources} >= set(blocks)
    plus = planned(vlmo_shapes(replace(BASE, width=544, depth=24, vl=3), absolute=True), "vlmo",
                   num_attention_heads=16)  # fmt: skip
    assert "24 blocks of width 544, 16 heads, VL-FFN in the last 3" in plus.what
    assert not plus.unknown


@pytest.mark.parametrize("finetuned", [False, True])
def test_published_sizes_of_beit2(finetuned):
    shapes = beit2_shapes(BASE, finetuned=finetuned)
    assert round(count(shapes, "blocks", "patch_embed", "cls_token") / 1e6) == 86
    report = planned(shapes, "beit2", text_ffn="vision", vl_ffn="vision")
    assert not report.unknown
    new = {entry.ours for entry in report.new}
    assert new - {"embedding.image.mask_token"} <= {
        "embedding.image.position",
        "heads.image.linear.weight",
        "heads.image.linear.bias",
    }


class Stage(enum.Enum):
    ONE = 1


def test_objects_besides_tensors_are_skipped(tmp_path):
    state = filled(beit2_shapes(SMALL))
    arguments = argparse.Namespace(model="beit", stage=Stage.ONE, where=Path("x"))
    path = save(tmp_path / "beit2.pth", state, args=arguments, epoch=5)
    source = read_public_file(path)
    assert source.tensors.keys() == state.keys()
    assert "argparse.Namespace" in source.skipped
    report, _, _ = run(path, "beit2")
    assert any("argparse.Namespace" in remark for remark in report.remarks)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_code_in_a_file_does_not_run(tmp_path):
    state, ran = filled(beit2_shapes(SMALL)), tmp_path / "ran"
    path = save(tmp_path / "beit2.pth", state, args=Command(f"touch {ran}"))
    expect("--allow-pickle", path, "beit2")
    assert not ran.exists()
    # With it pickle does what pickle does.
    run(path, "beit2", allow_pickle=True)
    assert ran.exists()


@pytest.mark.parametrize("container", ["model", "module", "state_dict", ""])
def test_containers_and_wrappers(tmp_path, container):
    state = {"module." + k: v for k, v in filled(beit2_shapes(SMALL)).items()}
    path = tmp_path / "beit2.pth"
    torch.save({container: state, "epoch": 1} if container else state, path)
    assert read_public_file(path).tensors.keys() == beit2_shapes(SMALL).keys()


def test_damaged_files(tmp_path):
    path = save(tmp_path / "beit2.pth", filled(beit2_shapes(SMALL)))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    expect("cut off", path, "beit2")
    path.write_text("not a checkpoint")
    expect("not a file that torch.save wrote", path, "beit2")
    torch.save({"epoch": 3}, path)
    expect("no tensors under", path, "beit2")
    expect("no such file", tmp_path / "missing.pth", "beit2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.q_bias"), "has no tensor blocks.1.attn.q_bias"),
        (
            lambda s: s.update({"blocks.1.mlp.fc2.weight": torch.zeros(64, 95)}),
            "blocks.1.mlp.fc2.weight [64, 95] cannot become",
        ),
        (lambda s: s.update({"blocks.0.attn.extra": torch.zeros(1)}), "1 tensors are unknown"),
    ],
)
def test_wrong_tensors(tmp_path, change, message):
    state = filled(beit2_shapes(SMALL))
    change(state)
    path = save(tmp_path / "beit2.pth", state)
    expect(message, path, "beit2")


def test_unknown_tensors_are_told_without_strict(tmp_path):
    state = filled(beit2_shapes(SMALL)) | {"blocks.0.attn.extra": torch.zeros(1)}
    report, _, _ = run(save(tmp_path / "beit2.pth", state), "beit2", strict=False)
    assert [left.name for left in report.unknown] == ["blocks.0.attn.extra"]


def test_other_family_and_short_vocabulary(tmp_path, text_model, vocab_txt):
    path = save(tmp_path / "vlmo.pt", filled(vlmo_shapes(replace(SMALL, vocab=9))))
    expect("has no tensor blocks.0.*", path, "beit2")
    expect("too few for the vocabulary", path, "vlmo", image_size=32, text_tokenizer=text_model,
           source_vocab=vocab_txt)  # fmt: skip
    expect("not a WordPiece vocab.txt", path, "vlmo", image_size=32, text_tokenizer=text_model,
           source_vocab=text_model.parent / "corpus.txt")  # fmt: skip


def test_command_line(tmp_path, capsys):
    path = save(tmp_path / "beit2.pth", filled(beit2_shapes(SMALL)))
    arguments = ["beit2", "--source", str(path), "--output", str(tmp_path / "out"), "--strict"]
    assert main([*arguments, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert "BEiT v2's [CLS] pretraining" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "has a checkpoint already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--attention", "text"])
    assert "--attention is no option of beit2" in capsys.readouterr().err
