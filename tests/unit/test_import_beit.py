"""Import of BEiT-3 and BEiT v2."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from public_states import (
    SMALL,
    assert_complete,
    beit2_shapes,
    beit3_shapes,
    expect,
    filled,
    foreign_spm,
    heads_first,
    reason,
    run,
    save,
)
from torch import Tensor

from megatron_vlmoe.convert.public.beit2 import IMAGENET_MEAN, IMAGENET_STD
from megatron_vlmoe.convert.public.beit3 import folded_layer
from megatron_vlmoe.convert.public.vocabulary import fairseq_rows
from megatron_vlmoe.model.initial_values import full_initial_value
from megatron_vlmoe.tokenizers.text import TextTokenizer


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
