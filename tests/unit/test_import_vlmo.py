"""Import of VLMo: tensors, forward pass, text embedding."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Workers
from public_states import (
    LENGTHS,
    SMALL,
    assert_complete,
    filled,
    heads_first,
    reason,
    run,
    save,
    vlmo_shapes,
    write,
)
from vlmo_reference import VLMoReference, encode_with_checkpoint

from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.public.vlmo import additive_tables
from megatron_vlmoe.convert.public.vocabulary import wordpiece_rows
from megatron_vlmoe.model.initial_values import full_initial_value, resize_image_positions
from megatron_vlmoe.stream.layout import VISION_SEGMENTS
from megatron_vlmoe.tokenizers.text import TextTokenizer


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


def batch_for(tokenizer: TextTokenizer, known: list[int]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    return {
        "texts": {"ids": generator.choice(known, (2, LENGTHS["text_length"]))},
        "pair_texts": {"ids": generator.choice(known, (2, LENGTHS["pair_text_length"]))},
        "pair_images": {"pixels": generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)},
        "images": {"pixels": generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)},
    }


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
    pixels = {
        segment: torch.from_numpy(batch[segment]["pixels"]) / 127.5 - 1
        for segment in VISION_SEGMENTS
    }
    text = model.embed_text(theirs[torch.from_numpy(batch["texts"]["ids"])])
    pair_text = model.embed_text(theirs[torch.from_numpy(batch["pair_texts"]["ids"])])
    pair = torch.cat([pair_text, model.embed_image(pixels["pair_images"])], dim=1)
    length = LENGTHS["pair_text_length"]
    pairs = model.encode(pair, "vl", length)
    expected = {
        "texts": model.encode(text, "text"),
        "pair_texts": pairs[:, :length],
        "pair_images": pairs[:, length:],
        "images": model.encode(model.embed_image(pixels["images"]), "imag"),
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
