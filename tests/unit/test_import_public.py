"""Import of public checkpoints, by generated files with their parameter names and shapes."""

from __future__ import annotations

import argparse
import enum
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from helpers import Workers
from public_states import (
    BASE,
    Shapes,
    Sizes,
    VLMoReference,
    beit2_shapes,
    beit3_shapes,
    count,
    encode_with_checkpoint,
    filled,
    vlmo_shapes,
)
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.convert.checkpoint_reader import CheckpointReader
from megatron_vlmoe.convert.public.beit2 import IMAGENET_MEAN, IMAGENET_STD
from megatron_vlmoe.convert.public.beit3 import folded_layer
from megatron_vlmoe.convert.public.command import import_public, open_source, plan_import
from megatron_vlmoe.convert.public.options import ImportOptions
from megatron_vlmoe.convert.public.report import ImportReport
from megatron_vlmoe.convert.public.text_tables import additive_tables
from megatron_vlmoe.convert.public.torch_files import PublicState, read_public_file
from megatron_vlmoe.convert.public.vocabulary import fairseq_rows, wordpiece_rows
from megatron_vlmoe.convert.tensors import ConvertError, LazyTensor
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.model.positions import resize_image_positions
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.tokenizers.text_training import TextTokenizerTraining, train_text_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.import_public import main

SMALL = Sizes()
WORDS = "a the red blue circle square is above below Paris café, and; of".split()
LENGTHS = {"text_length": 10, "pair_text_length": 8}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model of ours with some sixty pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(200)]
    (folder / "corpus.txt").write_text("\n".join(lines))
    inputs = [folder / "corpus.txt"]
    training = TextTokenizerTraining(
        inputs=inputs, vocab_size=60, output_prefix=folder / "m", character_coverage=1.0
    )
    train_text_tokenizer(training)
    return folder / "m.model"


@pytest.fixture(scope="module")
def vocab_txt(text_model: Path) -> Path:
    """A WordPiece vocabulary that has half of the words."""
    lines = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "circle", "is", "paris"]
    lines += [",", "cafe", "a", "##a", "##e", "##s", "##le"]
    lines += [f"[unused{i}]" for i in range(SMALL.vocab - len(lines))]
    path = text_model.with_name("vocab.txt")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save(path: Path, state: dict[str, Tensor], container: str = "model", **more: Any) -> Path:
    torch.save({container: state, **more}, path)
    return path


def options_for(path: Path, family: str, **options: Any) -> ImportOptions:
    return ImportOptions(family=family, source=path, **{**LENGTHS, **options})  # type: ignore[arg-type]


def write(path: Path, family: str, **options: Any) -> tuple[ImportReport, Path]:
    """Imports into a folder beside the file."""
    output = path.with_suffix(".out")
    return import_public(options_for(path, family, **options), output, strict=True), output


def run(
    path: Path, family: str, strict: bool = True, **options: Any
) -> tuple[ImportReport, dict[str, Tensor], RunConfig]:
    """What an import would write: report, tensors and configuration."""
    given = options_for(path, family, **options)
    report = import_public(given, path.with_suffix(".out"), strict=strict, write=False)
    plan, _ = plan_import(given, open_source(given))
    tensors = {key: tensor.read() for key, tensor in plan.tensors().items()}
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == plan.shapes
    return report, tensors, plan.config


def expect(message: str, path: Path, family: str, **options: Any) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)) as caught:
        write(path, family, **options)
    assert "\n" not in str(caught.value)
    assert not path.with_suffix(".out").exists()


def heads_first(*parts: Tensor, heads: int = SMALL.heads) -> Tensor:
    """megatron-core's rows [H, (q, k, v), K], written as loops."""
    size = len(parts[0]) // heads
    return torch.cat([part[h * size : (h + 1) * size] for h in range(heads) for part in parts])


# ---- published sizes


def planned(shapes: Shapes, family: str, **options: Any) -> ImportReport:
    """A plan by names and shapes alone: reading a value would fail."""

    def unread() -> Tensor:
        raise AssertionError("read")

    tensors = {name: LazyTensor(shape, torch.float32, unread) for name, shape in shapes.items()}
    source = PublicState(Path("published"), tensors)
    given = ImportOptions(family=family, source=source.path, **options)  # type: ignore[arg-type]
    plan, what = plan_import(given, source)
    return plan.report(what)


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


# ---- VLMo


def test_vlmo_tensors_and_report(tmp_path, text_model, vocab_txt):
    state = filled(vlmo_shapes(SMALL))
    path = save(tmp_path / "vlmo.pt", state, "state_dict", epoch=3)
    report, output = write(
        path, "vlmo", image_size=32, text_tokenizer=text_model, source_vocab=vocab_txt
    )
    ours = {key: tensor.read() for key, tensor in CheckpointReader(output).tensors.items()}
    block, theirs = "decoder.layers.1", "transformer.blocks.1"
    q, k, v = state[f"{theirs}.attn.qkv.weight"].chunk(3)
    attention = f"{block}.self_attention.linear_qkv"
    assert torch.equal(ours[f"{attention}.weight"], heads_first(q, k, v))
    q, v = state[f"{theirs}.attn.q_bias"], state[f"{theirs}.attn.v_bias"]
    assert torch.equal(ours[f"{attention}.bias"], heads_first(q, torch.zeros_like(q), v))
    same = {
        f"{block}.gamma_2": f"{theirs}.gamma_2",
        f"{block}.mlp.vision_ffn.linear_fc2.weight": f"{theirs}.mlp_imag.fc2.weight",
        f"{block}.mlp.text_norm.bias": f"{theirs}.norm2_text.bias",
        "decoder.layers.2.mlp.vl_ffn.linear_fc1.bias": "transformer.blocks.2.mlp_vl.fc1.bias",
        "decoder.final_layernorm.weight": "transformer.norm.weight",
    }
    for key, name in same.items():
        assert torch.equal(ours[key], state[name]), key
    types = state["token_type_embeddings.weight"]
    assert torch.equal(ours["embedding.text.token_type"], types[:1])
    assert torch.equal(ours["embedding.image.token_type"], types[1:])
    for key in ("embedding.text.position", "embedding.image.position"):
        assert not ours[key].any()
    assert_complete(report, ours, state)
    assert "relative position bias" in reason(report, "relative_position_bias_table")
    written = json.loads((output / "import_report.json").read_text())
    assert [entry["ours"] for entry in written["taken"]] == [e.ours for e in report.taken]
    assert (output / "text.model").read_bytes() == text_model.read_bytes()


def assert_complete(report: ImportReport, ours: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Every tensor of either side is spoken of once."""
    told = [entry.ours for entry in (*report.taken, *report.adapted, *report.new)]
    assert sorted(told) == sorted(ours)
    used = {name for entry in (*report.taken, *report.adapted) for name in entry.sources}
    assert sorted([*used, *(left.name for left in report.left)]) == sorted(state)


def reason(report: ImportReport, name: str) -> str:
    return next(left.why for left in report.left if left.name == name)


def batch_for(tokenizer: TextTokenizer, known: list[int]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {
        "text_ids": generator.choice(known, (2, LENGTHS["text_length"])),
        "pair_ids": generator.choice(known, (2, LENGTHS["pair_text_length"])),
        "pair_pixels": generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
        "image_pixels": generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8),
    }


@pytest.mark.dist
def test_vlmo_computes_the_same_without_relative_bias(
    tmp_path: Path, text_model: Path, vocab_txt: Path, workers: Workers
) -> None:
    state = filled(vlmo_shapes(SMALL))
    path = save(tmp_path / "vlmo.pt", state, "module")
    given = {"text_tokenizer": text_model, "source_vocab": vocab_txt}
    _, output = write(path, "vlmo", image_size=32, **given)
    tokenizer = TextTokenizer(text_model)
    rows = wordpiece_rows(tokenizer, vocab_txt).rows
    batch = batch_for(tokenizer, [i for i, row in enumerate(rows) if row >= 0])
    (found,) = workers.run(1, encode_with_checkpoint, str(output), batch)

    model, theirs = VLMoReference(state, SMALL), torch.tensor(rows)
    pixels = {k: torch.from_numpy(v) / 127.5 - 1 for k, v in batch.items() if "pixels" in k}
    text = model.embed_text(theirs[torch.from_numpy(batch["text_ids"])])
    pair_text = model.embed_text(theirs[torch.from_numpy(batch["pair_ids"])])
    pair = torch.cat([pair_text, model.embed_image(pixels["pair_pixels"])], dim=1)
    length = LENGTHS["pair_text_length"]
    pairs = model.encode(pair, "vl", length)
    expected = {
        "texts": model.encode(text, "text"),
        "pair_texts": pairs[:, :length],
        "pair_images": pairs[:, length:],
        "images": model.encode(model.embed_image(pixels["image_pixels"]), "imag"),
    }
    for segment, value in expected.items():
        assert np.abs(found[segment] - value.numpy()).max() < 2e-5, segment


def test_vlmo_with_absolute_positions_is_resized(tmp_path):
    state = filled(vlmo_shapes(SMALL, absolute=True))
    path = save(tmp_path / "plus.pt", state)
    report, ours, config = run(path, "vlmo", num_attention_heads=4, image_size=48)
    table = state["transformer.pos_embed"][0]
    assert torch.equal(ours["embedding.image.position"], resize_image_positions(table, 36))
    assert not any(key.endswith("gamma_1") for key in ours)
    (entry,) = report.adapted
    assert "17 positions resized bicubically to 37" in entry.how


def test_vlmo_before_the_vision_language_stage(tmp_path):
    state = filled(vlmo_shapes(replace(SMALL, vl=0)))
    path = save(tmp_path / "text.pt", state)
    report, ours, config = run(path, "vlmo", image_size=32, num_vl_layers=2, vl_ffn="text")
    for end in ("weight", "bias"):
        theirs = state[f"transformer.blocks.1.mlp_text.fc1.{end}"]
        assert torch.equal(ours[f"decoder.layers.1.mlp.vl_ffn.linear_fc1.{end}"], theirs)
    assert "decoder.layers.0.mlp.vl_norm.weight" not in ours
    assert {entry.how for entry in report.adapted} == {"VL-FFN from the text FFN"}


def test_text_without_a_vocabulary_stays_new(tmp_path, text_model):
    state = filled(vlmo_shapes(SMALL))
    path = save(tmp_path / "vlmo.pt", state)
    report, ours, config = run(path, "vlmo", image_size=32, text_tokenizer=text_model, seed=9)
    name = "text_embeddings.word_embeddings.weight"
    assert "--source-vocab" in reason(report, name)
    key = "embedding.text.word.weight"
    assert torch.equal(ours[key], full_initial_value(key, ours[key].shape, config.model, 9))


def test_text_with_absolute_positions_is_approximated(tmp_path, text_model, vocab_txt):
    state = filled(vlmo_shapes(SMALL, absolute=True))
    path = save(tmp_path / "plus.pt", state)
    report, ours, _ = run(
        path, "vlmo", num_attention_heads=4, text_tokenizer=text_model, source_vocab=vocab_txt
    )
    rows = wordpiece_rows(TextTokenizer(text_model), vocab_txt).rows
    pieces = torch.tensor([i for i, row in enumerate(rows) if row >= 0])
    name = "text_embeddings.{}_embeddings.weight"
    word, place, kind = (state[name.format(k)] for k in ("word", "position", "token_type"))
    true = F.layer_norm(
        word[torch.tensor(rows)[pieces], None] + place + kind[0], (64,),
        state["text_embeddings.LayerNorm.weight"], state["text_embeddings.LayerNorm.bias"], 1e-12,
    )[:, :10]  # fmt: skip
    found = ours["embedding.text.word.weight"][pieces, None] + ours["embedding.text.position"]
    # With positions as large as words, as here, it is coarse; the report says how coarse.
    (remark,) = [remark for remark in report.remarks if "misses" in remark]
    told = float(re.search(r"misses ([\d.]+)%", remark)[1]) / 100  # type: ignore[index]
    assert told == pytest.approx(float((found - true).norm() / true.norm()), rel=0.1)
    assert any("approximation" in entry.how for entry in report.adapted)


def test_tables_of_an_embedding_with_positions():
    generator = torch.Generator().manual_seed(2)
    words, positions = (torch.randn(n, 16, generator=generator) for n in (300, 7))
    kind, weight, bias = (torch.randn(16, generator=generator) for _ in range(3))
    tables = additive_tables(words, kind, 0.1 * positions, weight, bias)
    true = F.layer_norm(
        words[:, None] + kind + 0.1 * positions, (16,), weight, bias, 1e-12
    ).double()  # fmt: skip
    assert tables.positions is not None
    error = true - (tables.words[:, None] + tables.positions)
    measured = float(error.square().mean().sqrt() / true.square().mean().sqrt())
    assert tables.residual == pytest.approx(measured, rel=1e-3)
    assert 0.0 < measured < 0.1
    # No other word table is nearer: the error has no mean over positions, nor over tokens.
    assert error.mean(dim=1).abs().max() < 1e-5 and error.mean(dim=0).abs().max() < 1e-5
    exact = additive_tables(words, kind, None, weight, bias)
    assert torch.equal(exact.words, F.layer_norm(words + kind, (16,), weight, bias, 1e-12))
    assert exact.residual == 0.0


# ---- vocabularies


def test_wordpiece_rows(text_model, vocab_txt):
    tokenizer = TextTokenizer(text_model)
    lines = vocab_txt.read_text(encoding="utf-8").split("\n")
    found = wordpiece_rows(tokenizer, vocab_txt)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    theirs = {piece: lines[row] if row >= 0 else None for piece, row in zip(pieces, found.rows)}
    expected = {
        "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "<unk>": "[UNK]", "[MASK]": "[MASK]",
        "▁the": "the", "▁red": "red", "▁circle": "circle", ",": ",", "e": "##e", "s": "##s",
        "▁blue": None, "▁": None, "b": None,
    }  # fmt: skip
    assert {piece: theirs[piece] for piece in expected} == expected
    # An uncased vocabulary has neither capitals nor accents.
    assert theirs["▁Paris"] == "paris"
    assert theirs["é"] == "##e"
    assert found.without == tuple(piece for piece in pieces if theirs[piece] is None)
    share = found.num_found / len(pieces)
    assert f"{found.num_found} of {len(pieces)} text pieces ({share:.1%})" in found.summary()


def test_cased_wordpiece_keeps_capitals(text_model, tmp_path, vocab_txt):
    path = tmp_path / "cased.txt"
    path.write_text(vocab_txt.read_text().replace("[unused0]", "Paris"))
    tokenizer = TextTokenizer(text_model)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    rows = wordpiece_rows(tokenizer, path).rows
    lines = path.read_text().split("\n")
    assert lines[rows[pieces.index("▁Paris")]] == "Paris"
    assert rows[pieces.index("é")] == -1


def foreign_spm(path: Path, text_model: Path) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model with its own order of special pieces, like `beit3.spm`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter((text_model.parent / "corpus.txt").read_text().split("\n")),
            model_writer=file, vocab_size=36, character_coverage=1.0, minloglevel=2,
        )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_fairseq_rows(text_model, tmp_path):
    other = foreign_spm(tmp_path / "other.spm", text_model)
    assert [other.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    tokenizer = TextTokenizer(text_model)
    found = fairseq_rows(tokenizer, tmp_path / "other.spm")
    rows = {tokenizer.piece(i): row for i, row in enumerate(found.rows)}
    # XLM-R: <s> 0, <pad> 1, </s> 2, <unk> 3, piece i at i + 1, the mask after the last.
    special = ("<s>", "<pad>", "</s>", "<unk>", "[MASK]")
    assert [rows[piece] for piece in special] == [0, 1, 2, 3, 37]
    shared = [p for p in rows if p not in special and other.piece_to_id(p) > 2]
    assert len(shared) > 15
    assert all(rows[piece] == other.piece_to_id(piece) + 1 for piece in shared)
    assert set(found.without) == rows.keys() - set(shared) - set(special)


# ---- BEiT-3


def test_sub_ln_keeps_what_is_linear():
    generator = torch.Generator().manual_seed(4)
    weight, x = (torch.randn(n, 12, generator=generator) for n in (5, 30))
    bias = torch.randn(5, generator=generator)
    g, h = (torch.randn(12, generator=generator) for _ in range(2))
    theirs = F.layer_norm(x, (12,), g, h, 1e-5) @ weight.T + bias
    w, b = folded_layer(weight, bias, g, h)
    deviation = (x.var(dim=1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(x @ w.T / deviation + b, theirs, atol=1e-5)


@pytest.mark.parametrize("attention", ["vision", "text", "mean"])
def test_beit3_attention(tmp_path, attention):
    state = filled(beit3_shapes(SMALL))
    path = save(tmp_path / "beit3.pth", state)
    report, ours, config = run(path, "beit3", attention=attention, vl_ffn="text", num_vl_layers=1,
                       num_attention_heads=4)  # fmt: skip
    layer = "beit3.encoder.layers.1"

    def chosen(name: str) -> Tensor:
        a, b = (state[f"{layer}.{name.format(letter)}"] for letter in "AB")
        return {"vision": a, "text": b, "mean": (a + b) / 2}[attention]

    q, k, v = (chosen(f"self_attn.{p}_proj.{{}}.weight") for p in "qkv")
    qkv = ours["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.allclose(qkv, heads_first(q, k, v), atol=1e-7)
    q, v = (chosen(f"self_attn.{p}_proj.{{}}.bias") for p in "qv")
    bias = ours["decoder.layers.1.self_attention.linear_qkv.bias"]
    assert torch.allclose(bias, heads_first(q, torch.zeros_like(q), v), atol=1e-7)
    projections = [
        folded_layer(*(state[f"{layer}.self_attn.{m}.{letter}.{end}"]
                       for m in ("out_proj", "inner_attn_ln") for end in ("weight", "bias")))
        for letter in {"vision": "A", "text": "B", "mean": "AB"}[attention]
    ]  # fmt: skip
    expected = torch.stack([w for w, _ in projections]).mean(0)
    weight = ours["decoder.layers.1.self_attention.linear_proj.weight"]
    assert torch.allclose(weight, expected, atol=1e-6)
    assert "softmax does not see" in reason(
        report, f"{layer}.self_attn.k_proj.{'B' if attention == 'text' else 'A'}.bias"
    )
    if attention == "vision":
        assert "other modality" in reason(report, f"{layer}.self_attn.q_proj.B.weight")
    assert torch.equal(
        ours["decoder.layers.2.mlp.vl_ffn.linear_fc1.weight"],
        state["beit3.encoder.layers.2.ffn.B.fc1.weight"],
    )
    assert torch.equal(
        ours["decoder.layers.0.mlp.vision_norm.weight"],
        state["beit3.encoder.layers.0.final_layer_norm.A.weight"],
    )
    assert_complete(report, ours, state)
    assert config.model.layernorm_epsilon == 1e-5


def test_beit3_positions_text_and_heads(tmp_path, text_model):
    foreign_spm(tmp_path / "other.spm", text_model)
    state = filled(beit3_shapes(SMALL))
    path = save(tmp_path / "beit3.pth", state)
    report, ours, config = run(path, "beit3", num_vl_layers=0, num_attention_heads=4,
                       text_tokenizer=text_model, source_spm=tmp_path / "other.spm",
                       pair_text_length=14)  # fmt: skip
    positions = state["beit3.encoder.embed_positions.A.weight"]
    assert torch.equal(ours["embedding.image.position"], positions[2:])
    text = state["beit3.encoder.embed_positions.B.weight"]
    assert torch.equal(ours["embedding.text.position"][:10], text[2:])
    assert ours["embedding.text.position"][10:].abs().max() <= 0.02
    rows = fairseq_rows(TextTokenizer(text_model), tmp_path / "other.spm").rows
    for piece, row in enumerate(rows):
        word = ours["embedding.text.word.weight"][piece]
        bias = ours["heads.text.linear.bias"][piece]
        if row < 0:
            assert word.abs().max() <= 0.02 and bias == 0
        else:
            assert torch.equal(word, state["beit3.text_embed.weight"][row])
            assert bias == state["mlm_head.bias"][row]
    assert torch.equal(ours["heads.image.linear.weight"][:200], state["mim_head.weight"])
    assert not ours["heads.image.linear.weight"][200:].any()
    assert any("text pieces" in remark for remark in report.remarks)


def test_beit3_rows_one_to_one(tmp_path, text_model):
    size = TextTokenizer(text_model).size
    state = filled(beit3_shapes(replace(SMALL, vocab=size)))
    path = save(tmp_path / "beit3.pth", state)
    given = {"num_attention_heads": 4, "text_tokenizer": text_model, "same_vocabulary": True}
    _, ours, _ = run(path, "beit3", **given)
    assert torch.equal(ours["embedding.text.word.weight"][:size], state["beit3.text_embed.weight"])
    other = save(tmp_path / "o.pth", filled(beit3_shapes(replace(SMALL, vocab=size + 8))))
    expect(f"has {size + 8} rows", other, "beit3", **given)


def test_beit3_without_text(tmp_path):
    path = save(tmp_path / "beit3.pth", filled(beit3_shapes(SMALL, text=False)))
    report, ours, config = run(path, "beit3", num_attention_heads=4, vl_ffn="vision")
    assert {e.ours.split(".")[4] for e in report.new if "layers" in e.ours} == {
        "text_norm",
        "text_ffn",
    }
    expect("has no text side", path, "beit3", num_attention_heads=4, attention="text")


# ---- BEiT v2


def test_beit2_takes_up_pixel_statistics(tmp_path):
    state = filled(beit2_shapes(SMALL))
    path = save(tmp_path / "beit2.pth", state)
    _, ours, _ = run(path, "beit2")
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    projection = "patch_embed.proj"
    theirs = F.conv2d(
        (pixels - mean) / std, state[f"{projection}.weight"], state[f"{projection}.bias"]
    )
    weight, bias = ours["embedding.image.weight"], ours["embedding.image.bias"]
    found = ((pixels - 0.5) / 0.5).flatten(1) @ weight.T + bias
    assert torch.allclose(found, theirs.flatten(1), atol=1e-4)
    _, ours, _ = run(path, "beit2", source_pixels="half")
    kernel = state[f"{projection}.weight"].flatten(1)
    assert torch.equal(ours["embedding.image.weight"], kernel)


def test_beit2_vision_side(tmp_path):
    state = filled(beit2_shapes(SMALL))
    path = save(tmp_path / "beit2.pth", state)
    report, ours, config = run(path, "beit2", text_ffn="vision", num_vl_layers=2)
    # Heads and image size are read off the relative table.
    assert (config.model.num_attention_heads, config.model.image_size) == (4, 32)
    fc2 = state["blocks.1.mlp.fc2.weight"]
    for branch in ("vision", "text"):
        assert torch.equal(ours[f"decoder.layers.1.mlp.{branch}_ffn.linear_fc2.weight"], fc2)
    key = "decoder.layers.1.mlp.vl_ffn.linear_fc2.weight"
    fresh = full_initial_value(key, ours[key].shape, config.model, config.train.seed)
    assert torch.equal(ours[key], fresh)
    assert torch.equal(ours["embedding.image.mask_token"], state["mask_token"][0])
    assert torch.equal(ours["heads.image.linear.bias"][:200], state["lm_head.bias"])
    assert not ours["embedding.image.position"].any()
    assert_complete(report, ours, state)
    expect("has no text FFN", path, "beit2", vl_ffn="text")


def test_image_head_of_another_tokenizer_is_left(tmp_path):
    path = save(tmp_path / "beit2.pth", filled(beit2_shapes(SMALL)))
    report, ours, _ = run(path, "beit2", visual_vocab_size=130)
    assert ours["heads.image.linear.weight"].shape == (256, 64)
    assert reason(report, "lm_head.bias") == "predicts 200 image tokens, the new model has 130"


def test_beit2_absolute_positions(tmp_path):
    state = filled(beit2_shapes(SMALL, absolute=True))
    path = save(tmp_path / "beit2.pth", state)
    _, ours, _ = run(path, "beit2", num_attention_heads=4)
    assert torch.equal(ours["embedding.image.position"], state["pos_embed"][0])


# ---- files and refusals


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
