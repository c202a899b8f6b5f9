"""Attention: sequences in place of masks by hand and against masks, and the kernels that torch may take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import small_config
from megatron.core.transformer.transformer_config import TransformerConfig
from test_hf_model import EVERYWHERE, build, inputs

from megatron_vlmoe.benchmarks.plain_model import PLAIN_LAYERS, PlainModel
from megatron_vlmoe.benchmarks.transformers_model import transformers_layers
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.model.attention import StreamAttention, check_attention_backend
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sequences import attention_sequences

CPU = torch.device("cpu")


def test_sequences_by_hand() -> None:
    # Texts 0 1 2 3 and 4 5 6 7; captions 8 9 10 and 11 12 13; their images 14 15 and 16 17; image 18 19.
    layout = StreamLayout(2, 2, 1, text_length=4, pair_text_length=3, image_length=2)
    documents = torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]])
    found = attention_sequences(
        layout,
        1,
        CPU,
        text_documents=documents,
        num_documents=6,
        pair_lengths=torch.tensor([2, 3]),
    )
    assert found.order is not None and found.places is not None
    pairs = [8, 9, 14, 15, 10, 11, 12, 13, 16, 17]
    assert found.order.tolist() == [*range(8), *pairs, 18, 19]
    assert found.order[found.places].tolist() == list(range(20))
    # Five documents and room for a sixth; a pair and its padding, of which the second has none.
    assert found.boundaries.tolist() == [0, 2, 4, 5, 6, 8, 8, 12, 13, 18, 18, 20]
    assert found.boundaries.dtype == torch.int32 and found.longest == 5

    lengths = attention_sequences(
        replace(layout, pairs=0), 1, CPU, text_lengths=torch.tensor([3, 4])
    )
    assert lengths.boundaries.tolist() == [0, 3, 4, 8, 8, 10]
    assert lengths.order is None and lengths.longest == 4
    images = attention_sequences(replace(layout, texts=0, pairs=0, images=3), 1, CPU)
    assert images.boundaries.tolist() == [0, 2, 4, 6] and images.longest == 2


def by_sequence(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    starts_of_keys: torch.Tensor,
    longest: int,
    longest_keys: int,
) -> torch.Tensor:
    """What `varlen_attn` computes, one sequence after the other."""
    assert starts is starts_of_keys and starts.dtype == torch.int32 and longest == longest_keys
    ends = starts.tolist()
    assert ends[0] == 0 and ends[-1] == len(query)
    parts = []
    for begin, end in zip(ends, ends[1:]):
        assert 0 <= end - begin <= longest
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts)


PACKED = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
STREAMS = {
    "packed-and-pairs": StreamBatch(
        StreamLayout(2, 3, 2, text_length=7, pair_text_length=4, image_length=5),
        pair_lengths=torch.tensor([2, 4, 3]),
        text_documents=PACKED,
    ),
    "tensor-parallel": StreamBatch(
        StreamLayout(1, 2, 1, text_length=7, pair_text_length=4, image_length=5),
        tensor_size=2,
        pair_lengths=torch.tensor([2, 4, 3, 2]),
        text_documents=PACKED,
        document_count=6,
    ),
    "padded-texts": StreamBatch(
        StreamLayout(3, 0, 2, text_length=7, pair_text_length=4, image_length=5),
        text_lengths=torch.tensor([7, 2, 5]),
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_sequences_attend_as_masks_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients of all tokens that are no padding."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_sequence)
    given = STREAMS[name]
    layout, ranks = given.layout, given.tensor_size
    kept = torch.cat(
        [
            torch.ones(layout.count(segment) * layout.length(segment), dtype=torch.bool)
            if (mask := given.sample_mask(segment)) is None
            else mask.chunk(ranks)[rank].flatten()
            for rank in range(ranks)
            for segment in ("texts", "pair_texts", "pair_images", "images")
        ]
    )
    generator = torch.Generator().manual_seed(1)
    shape = (len(kept), 1, 3, 8)
    base = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)]
    upstream = base[3].flatten(2) * kept[:, None, None]
    config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=3)
    outcomes: list[list[torch.Tensor]] = []
    for backend in ("sdpa", "varlen"):
        tensors = [x.clone().requires_grad_() for x in base[:3]]
        stream = replace(given)
        attention = StreamAttention(config, 1, backend)
        output = attention(*tensors, stream)
        # Every block of a micro-batch has the same masks and sequences.
        again = attention(*tensors, stream)
        assert torch.equal(output, again)
        gradients = torch.autograd.grad(output, tensors, upstream)
        outcomes.append([output.detach()[kept], *gradients])
    for masked, ragged in zip(*outcomes):
        assert masked.abs().max() > 0.1
        torch.testing.assert_close(ragged, masked, rtol=1e-9, atol=1e-9)


def kernels_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Fills a list with whether a call has a mask, and whether cuDNN may serve it."""
    calls: list[tuple[bool, bool]] = []
    original = F.scaled_dot_product_attention

    def watched(*args: Any, attn_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        calls.append((attn_mask is not None, torch.backends.cuda.cudnn_sdp_enabled()))
        return original(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    return calls


def test_cudnn_serves_no_call_with_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mask its gradients may be NaN (pytorch#196678)."""
    calls = kernels_of(monkeypatch)
    stream = STREAMS["packed-and-pairs"]
    config = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=3)
    tokens = torch.randn(stream.layout.num_tokens, 1, 3, 8)
    StreamAttention(config, 1, "sdpa")(tokens, tokens, tokens, stream)
    assert calls == [(True, False), (True, False), (False, True)]
    calls.clear()
    build(**EVERYWHERE).train()(**inputs())
    assert calls and set(calls) == {(True, False)}
    run = small_config("--moe.modalities", "none", "--moe.layers", "[]")
    batch = RandomData(run, BatchShare()).batch(0)
    for layers in (PLAIN_LAYERS, transformers_layers()):
        calls.clear()
        PlainModel(run, layers)(batch)
        assert set(calls) == {(True, False), (False, True)}


@pytest.mark.parametrize(
    ("device", "precision", "reason"),
    [("cpu", "bf16", "needs a GPU"), ("meta", "fp32", "bf16 or fp16")],
)
def test_varlen_is_refused_where_it_cannot_run(device: str, precision: Any, reason: str) -> None:
    model = replace(preset("tiny-8e").model, attention_backend="varlen")
    with pytest.raises(ConfigError, match=f"^model.attention_backend=varlen .*{reason}[^\n]*$"):
        check_attention_backend(model, precision, torch.device(device))
    check_attention_backend(model, "bf16", torch.device("meta"))
    check_attention_backend(preset("tiny-8e").model, "fp32", CPU)


@pytest.mark.parametrize(
    ("section", "options"),
    [
        ("moe", {"route_padding": True}),
        ("train", {"precision": "fp32"}),
        ("model", {"hidden_size": 12 * 12, "num_attention_heads": 12}),
    ],
)
def test_varlen_with_what_it_cannot_do_is_one_line(section: str, options: dict[str, Any]) -> None:
    config = preset("tiny-8e")
    config = replace(config, model=replace(config.model, attention_backend="varlen"))
    validate(config)
    config = replace(config, **{section: replace(getattr(config, section), **options)})
    with pytest.raises(ConfigError, match="^model.attention_backend=varlen with [^\n]*$"):
        validate(config)
