"""VLMo's forward pass in plain formulas, and the same of a checkpoint's model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from public_states import Sizes
from torch import Tensor


class VLMoReference:
    """VLMo without its relative position bias: x += g1 attention(LN(x)); x += g2 FFN_m(LN_m(x)).

    Args:
        state: parameters.
        sizes: of the model.
    """

    def __init__(self, state: Mapping[str, Tensor], sizes: Sizes) -> None:
        self.state = state
        self.sizes = sizes

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def embed_text(self, ids: Tensor) -> Tensor:
        """``[n, L]`` to ``[n, L, D]``; relative positions: none are added."""
        words = self.state["text_embeddings.word_embeddings.weight"][ids]
        words = words + self.state["text_embeddings.token_type_embeddings.weight"][0]
        words = self.norm("text_embeddings.LayerNorm", words, 1e-12)
        return words + self.state["token_type_embeddings.weight"][0]

    def embed_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels ``[n, 3, S, S]`` to ``[n, 1 + N, D]``."""
        projection = "transformer.patch_embed.proj"
        patches = F.conv2d(
            pixels,
            self.state[f"{projection}.weight"],
            self.state[f"{projection}.bias"],
            stride=self.sizes.patch,
        )
        patches = patches.flatten(2).transpose(1, 2)
        cls_token = self.state["transformer.cls_token"].expand(len(pixels), 1, -1)
        tokens = torch.cat([cls_token, patches], dim=1)
        return tokens + self.state["token_type_embeddings.weight"][1]

    def encode(self, x: Tensor, kind: str, num_text: int = 0) -> Tensor:
        """Final hidden states of texts, images (`imag`) or pairs (`vl`, text first)."""
        for i in range(self.sizes.depth):
            block = f"transformer.blocks.{i}"
            attention = self.attention(block, self.norm(f"{block}.norm1", x))
            x = x + self.state[f"{block}.gamma_1"] * attention
            if kind == "vl" and i < self.sizes.depth - self.sizes.vl:
                parts = (("text", x[:, :num_text]), ("imag", x[:, num_text:]))
            else:
                parts = ((kind, x),)
            ffn = [
                self.ffn(f"{block}.mlp_{m}", self.norm(f"{block}.norm2_{m}", y)) for m, y in parts
            ]
            x = x + self.state[f"{block}.gamma_2"] * torch.cat(ffn, dim=1)
        return self.norm("transformer.norm", x)

    def attention(self, block: str, x: Tensor) -> Tensor:
        n, length, width = x.shape
        zeros = torch.zeros(width)
        bias = torch.cat(
            [self.state[f"{block}.attn.q_bias"], zeros, self.state[f"{block}.attn.v_bias"]]
        )
        qkv = x @ self.state[f"{block}.attn.qkv.weight"].T + bias
        q, k, v = qkv.view(n, length, 3, self.sizes.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT) / math.sqrt(q.shape[-1])
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width)
        return self.linear(f"{block}.attn.proj", mixed)

    def ffn(self, name: str, x: Tensor) -> Tensor:
        gate = self.state.get(f"{name}.deepspeed_moe.gate.wg.weight")
        if gate is None:
            return self.linear(f"{name}.fc2", F.gelu(self.linear(f"{name}.fc1", x)))
        # The best expert of each token, times its gate; nothing is dropped.
        best, chosen = (x @ gate.T).softmax(-1).max(-1)
        experts = f"{name}.deepspeed_moe.experts.deepspeed_experts"
        outputs = torch.stack(
            [
                self.linear(f"{experts}.{e}.fc2", F.gelu(self.linear(f"{experts}.{e}.fc1", x)))
                for e in range(len(gate))
            ],
            dim=2,
        )
        index = chosen[:, :, None, None].expand(-1, -1, 1, x.shape[-1])
        return best.unsqueeze(-1) * outputs.gather(2, index).squeeze(2)


def encode_with_checkpoint(path: str, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Final hidden states of a checkpoint's model, by segment (runs in a process of its own).

    Args:
        path: checkpoint.
        batch: ids and pixels of all segments, as arrays.
    """
    from megatron_vlmoe.convert.checkpoints import CheckpointReader
    from megatron_vlmoe.data.collate import to_tensors
    from megatron_vlmoe.model.heads import MaskedHeads
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.stream.batch import StreamBatch
    from megatron_vlmoe.stream.layout import StreamLayout
    from megatron_vlmoe.train.resume import CheckpointWeights, warm_start
    from megatron_vlmoe.train.setup import build_forward_only

    reader = CheckpointReader(path)
    config = reader.config
    counts = {
        "micro_texts": len(batch["texts"]["ids"]),
        "micro_pairs": len(batch["pair_texts"]["ids"]),
        "micro_images": len(batch["images"]["pixels"]),
    }
    moe = replace(config.moe, eval_capacity_factor=0.0)
    config = replace(config, data=replace(config.data, **counts), moe=moe)
    initialize(config.parallel, config.train.seed)
    parts = build_forward_only(config, "fp32", MaskedHeads)
    warm_start(CheckpointWeights(reader.path), config, parts, with_heads=True)
    layout = StreamLayout.of(config)
    lengths = torch.full((len(batch["pair_texts"]["ids"]),), config.model.pair_text_length)
    stream = StreamBatch(layout, pair_lengths=lengths)
    tensors = to_tensors(batch)
    with torch.no_grad():
        (model,) = parts.chunks
        hidden = model.decoder(model.embedding(tensors, stream), stream)
    return {name: x.squeeze(2).numpy() for name, x in layout.segments(hidden).items()}
