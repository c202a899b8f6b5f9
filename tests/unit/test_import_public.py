"""Import of public checkpoints: published sizes, files, refusals, command line."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import os
import struct
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
    foreign_spm,
    planned,
    run,
    save,
    vlmo_shapes,
)

from megatron_vlmoe.commands.main import run as run_command
from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.public.planner import ImportOptions
from megatron_vlmoe.convert.public.torch_files import read_public_file
from megatron_vlmoe.train.checkpoint_files import TRACKER

main = functools.partial(run_command, "import-public")


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


class ReadOnlyDict(dict):
    """As configurations of VLMo's training are."""


class ReadOnlyList(list):
    """Likewise."""


def test_containers_of_other_classes_are_skipped(tmp_path):
    state = filled(beit2_shapes(SMALL))
    inner = ReadOnlyDict(losses=ReadOnlyDict(itm=1), sizes=ReadOnlyList([1, 2]))
    inner.note = "an attribute"
    counts = collections.defaultdict(list, {"a": [1]})
    queue = collections.deque([1, 2], maxlen=3)
    path = save(tmp_path / "a.pth", state, hyper_parameters=inner, counts=counts, queue=queue)
    source = read_public_file(path)
    assert source.tensors.keys() == state.keys()
    assert torch.equal(source.tensors["cls_token"].read(), state["cls_token"])
    skipped = " ".join(source.skipped)
    for name in ("ReadOnlyDict", "ReadOnlyList", "collections.defaultdict", "collections.deque"):
        assert name in skipped


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
    # The end of an archive that goes on in a second file.
    path.write_bytes(
        struct.pack("<4sLQL", b"PK\6\7", 0, 0, 2) + struct.pack("<4s4H2LH", b"PK\5\6", *[0] * 7)
    )
    expect("cannot be read", path, "beit2")
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


RELATIVE = "rel_pos_bias.relative_position_bias_table"
ABSOLUTE, TABLE = "transformer.pos_embed", "relative_position_bias_table"
BEIT3 = "beit3.encoder.embed_positions"


@pytest.mark.parametrize(
    ("family", "name", "shape"),
    [
        *[("beit2", "patch_embed.proj.weight", shape) for shape in [(), (64, 192)]],
        *[("beit2", "blocks.0.mlp.fc1.weight", shape) for shape in [(), (96,)]],
        *[
            ("beit2", RELATIVE, (3,)),
            ("beit2", "pos_embed", (64,)),
            ("beit2", "lm_head.weight", ()),
        ],
        *[("beit2", "pos_embed", (1, 0, 64)), ("vlmo", ABSOLUTE, (64,)), ("vlmo", TABLE, (4,))],
        *[("vlmo", "token_type_embeddings.weight", ()), ("beit3", f"{BEIT3}.A.weight", ())],
        *[("beit3", f"{BEIT3}.A.weight", (2, 64)), ("beit3", "mim_head.weight", ())],
        *[("beit3", f"{BEIT3}.B.weight", (64,)), ("beit3", "beit3.text_embed.weight", ())],
        *[("beit3", "mlm_head.bias", ()), ("vlmo", "text_embeddings.word_embeddings.weight", ())],
    ],
)
def test_wrong_shapes(tmp_path, text_model, vocab_txt, family, name, shape):
    """One line that names the tensor, however many axes it has."""
    shapes = {"beit2": beit2_shapes, "beit3": beit3_shapes, "vlmo": vlmo_shapes}[family](SMALL)
    path = save(tmp_path / "x.pth", filled({**shapes, name: shape}))
    foreign_spm(tmp_path / "other.spm", text_model)
    text = {
        "beit2": {},
        "beit3": {"source_spm": tmp_path / "other.spm"},
        "vlmo": {"source_vocab": vocab_txt},
    }
    expect(
        f"{name} ", path, family, num_attention_heads=4, text_tokenizer=text_model, **text[family]
    )


def test_a_number_of_heads_that_nothing_tells(tmp_path):
    """VLMo base_plus has heads of 34: a guess of 64 would mix up the rows of queries, keys and values."""
    shapes = vlmo_shapes(replace(SMALL, width=68), absolute=True)
    path = save(tmp_path / "plus.pt", filled(shapes))
    expect("a width of 68 is no multiple of 64 (--num-attention-heads)", path, "vlmo")
    _, _, config = run(path, "vlmo", num_attention_heads=2)
    assert config.model.num_attention_heads == 2


@pytest.mark.parametrize(
    "name", "image_size text_length visual_vocab_size num_attention_heads topk".split()
)
def test_sizes_must_be_positive(tmp_path, name):
    for value in (0, -1):
        with pytest.raises(ConvertError, match=f"--{name.replace('_', '-')} {value}: must be posi"):
            ImportOptions(family="vlmo", source=tmp_path, **{name: value})


def test_options_without_effect_are_refused(tmp_path, text_model):
    path = save(tmp_path / "vlmo.pt", filled(vlmo_shapes(SMALL)))
    expect("--topk 2: ", path, "vlmo", image_size=32, topk=2)
    path = save(tmp_path / "beit2.pth", filled(beit2_shapes(SMALL)))
    expect("model.num_vl_layers=9 is not in 0..3", path, "beit2", num_vl_layers=9)
    foreign_spm(tmp_path / "other.spm", text_model)
    path = save(tmp_path / "beit3.pth", filled(beit3_shapes(SMALL, text=False)))
    expect("has no tensor beit3.text_embed.weight", path, "beit3", text_tokenizer=text_model,
           source_spm=tmp_path / "other.spm", vl_ffn="vision")  # fmt: skip


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
    # A run has its checkpoints in a folder of its own; one beside that would hide them.
    (tmp_path / "out").rename(tmp_path / "run")
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / TRACKER).rename(tmp_path / "out" / "checkpoints" / TRACKER)
    assert main([*arguments, "--overwrite"]) == 1
    assert "is the folder of a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoints"]
    assert main([*arguments, "--attention", "text"]) == 2
    assert "--attention is no option of beit2" in capsys.readouterr().err
