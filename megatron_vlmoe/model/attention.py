"""Core attention over the stream: each sample attends within itself, the two halves of a pair together.

Letters: T tokens of the gathered stream, H heads on this rank, K head width, n samples, L tokens.
"""

from __future__ import annotations

import contextlib
from typing import Any, ContextManager, Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vlmoe.stream.batch import StreamBatch


class StreamAttention(MegatronModule):
    """The `core_attention` spec of megatron-core's SelfAttention; the StreamBatch comes as attention_mask.

    Args:
        config: megatron-core configuration.
        layer_number: block number from 1.
        backend: `sdpa` lets torch choose the kernel, `math` forces the plain one.
        **unused: megatron-core's other constructor arguments.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        backend: str = "sdpa",
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.backend = backend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: StreamBatch,
        **unused: Any,
    ) -> Tensor:
        """Query, key and value ``[T, 1, H, K]`` to ``[T, 1, H * K]``."""
        stream = attention_mask
        layout, gathered = stream.layout, stream.tensor_size
        parts: dict[str, Tensor] = {}
        q, k, v = (layout.segments(x.squeeze(1), gathered) for x in (query, key, value))
        if layout.texts:
            parts["texts"] = self._attend(q["texts"], k["texts"], v["texts"], _text_mask(stream))
        if layout.pairs:
            pq, pk, pv = (torch.cat([x["pair_texts"], x["pair_images"]], dim=1) for x in (q, k, v))
            both = self._attend(pq, pk, pv, _pair_mask(stream))
            parts["pair_texts"], parts["pair_images"] = both.split(
                [layout.pair_text_length, layout.image_length], dim=1
            )
        if layout.images:
            parts["images"] = self._attend(q["images"], k["images"], v["images"], None)
        output = layout.assemble(parts, gathered)
        return output.reshape(output.shape[0], 1, -1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor]) -> Tensor:
        """``[n, L, H, K]`` within samples; the mask broadcasts to ``[n, H, L, L]``, True may be seen."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        with self._kernel():
            output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return output.transpose(1, 2)

    def _kernel(self) -> ContextManager[None]:
        if self.backend == "math":
            return sdpa_kernel(SDPBackend.MATH)
        return contextlib.nullcontext()


def _pair_mask(stream: StreamBatch) -> Tensor:
    """Keys that are not padding ``[n, 1, 1, L]`` of captions and images together."""
    captions = stream.sample_mask("pair_texts")
    assert captions is not None, "pairs need the lengths of their captions"
    images = captions.new_ones(captions.shape[0], stream.layout.image_length)
    return torch.cat([captions, images], dim=1)[:, None, None, :]


def _text_mask(stream: StreamBatch) -> Optional[Tensor]:
    """Tokens of the same document ``[n, 1, L, L]``, or keys that are not padding ``[n, 1, 1, L]``; None sees all."""
    if stream.text_documents is not None:
        documents = stream.text_documents
        return (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1)
    texts = stream.sample_mask("texts")
    return None if texts is None else texts[:, None, None, :]


class StreamSelfAttention(SelfAttention):
    """Shared self-attention whose key has no bias (BEiT, VLMo).

    The key's part of the fused bias starts at zero and its gradient, which is zero up to rounding, is
    removed: an adaptive optimizer would otherwise turn the rounding into steps.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        bias = self.linear_qkv.bias
        width = self.hidden_size_per_attention_head

        def without_key(grad: Tensor) -> Tensor:
            kept = grad.clone()
            # In place on the device: a mask held on the host would be copied there in every step.
            kept.view(-1, 3, width)[:, 1].zero_()
            return kept

        bias.register_hook(without_key)
