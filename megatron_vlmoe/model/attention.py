"""Attention within the samples of a stream, by torch's kernels or by TransformerEngine's.

Letters: T tokens of the stream of all tensor-parallel ranks, n samples, L tokens of a sample, H heads on this rank, K
head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ModelConfig, Precision
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.sequences import Sequences

MASKED_KERNELS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
"""What torch may choose from for a call that has a mask, all but cuDNN's kernel: with a mask, with a last tile of 128
keys that is half full, and with log-sums of the logits below -88.7, that one gives NaN as gradient of the query
(pytorch/pytorch#196678). torch tries the fastest of these first by itself."""


def allowed_kernels(mask: Optional[Tensor]) -> AbstractContextManager[Any]:
    """In it, torch chooses from `MASKED_KERNELS` where there is a mask.

    Without a mask it may take cuDNN's too, which the error does not concern and which is the fastest on Hopper.
    """
    return nullcontext() if mask is None else sdpa_kernel(list(MASKED_KERNELS))


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], plain: bool = False
) -> Tensor:
    """Attention within samples: ``[n, L, H, K]`` to ``[n, L, H, K]``.

    Args:
        mask: broadcasts to ``[n, H, L, L]``, True may be seen; None: all.
        plain: takes torch's plain kernel.
    """
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.MATH) if plain else allowed_kernels(mask):
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return output.transpose(1, 2)


def check_attention_backend(model: ModelConfig, precision: Precision, device: torch.device) -> None:
    """Raises ConfigError if this machine cannot compute what `model.attention_backend` asks for."""
    if model.attention_backend != "varlen":
        return
    reason = ""
    if device.type == "cpu":
        reason = "needs a GPU"
    elif torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] < 8:
        reason = "needs a GPU of compute capability 8.0"
    elif torch.cuda.is_available() and not torch.backends.cuda.is_flash_attention_available():
        reason = "needs a torch that was built with flash attention"
    elif precision == "fp32":
        reason = "needs train.precision bf16 or fp16"
    if reason:
        raise ConfigError(
            f"model.attention_backend=varlen {reason}; --model.attention_backend sdpa works here"
        )


class StreamAttention(MegatronModule):
    """The `core_attention` of megatron-core's SelfAttention; the StreamBatch comes as attention_mask.

    Each sample attends within itself, the two halves of a pair together. Backends:

    - `sdpa`: torch chooses the kernel, of those that are right with a mask; one call for each kind of sample.
    - `math`: torch's plain kernel.
    - `varlen`: torch's flash attention over sequences of different lengths, one call for all samples. It takes no mask
      and does not compute padding against tokens. The output at padding, which nobody reads, is another.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, backend: str, **unused: Any
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
        inputs = [x.squeeze(1) for x in (query, key, value)]
        own = self._sequences if self.backend == "varlen" else self._samples
        return own(inputs, attention_mask).reshape(len(query), 1, -1)

    def _samples(self, inputs: list[Tensor], stream: StreamBatch) -> Tensor:
        """``[T, H, K]`` to ``[T, H, K]``, by samples of one length each."""
        layout, gathered = stream.layout, stream.tensor_size
        plain = self.backend == "math"
        parts: dict[str, Tensor] = {}
        q, k, v = (layout.segments(x, gathered) for x in inputs)
        if layout.texts:
            mask = stream.attention_mask("texts")
            parts["texts"] = attend(q["texts"], k["texts"], v["texts"], mask, plain)
        if layout.pairs:
            mask = stream.attention_mask("pairs")
            pq, pk, pv = (torch.cat([x["pair_texts"], x["pair_images"]], dim=1) for x in (q, k, v))
            parts["pair_texts"], parts["pair_images"] = attend(pq, pk, pv, mask, plain).split(
                [layout.pair_text_length, layout.image_length], dim=1
            )
        if layout.images:
            parts["images"] = attend(q["images"], k["images"], v["images"], None, plain)
        return layout.assemble(parts, gathered)

    def _sequences(self, inputs: list[Tensor], stream: StreamBatch) -> Tensor:
        """``[T, H, K]`` to ``[T, H, K]``, all sequences in one call."""
        found = stream.sequences(inputs[0].device)
        query, key, value = in_order_of_sequences(inputs, found)
        ends, longest = found.boundaries, found.longest
        output = varlen.varlen_attn(query, key, value, ends, ends, longest, longest)
        assert isinstance(output, Tensor)
        return in_order_of_stream(output, found)


class TransformerEngineAttention(MegatronModule):
    """The same by TransformerEngine, which chooses a kernel for sequences of different lengths.

    As with `varlen` there is one call for all samples and no mask, padding is not computed against tokens, and its
    output is another.

    Args:
        **options: megatron-core's own arguments of a `core_attention`.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, **options: Any) -> None:
        super().__init__(config=config)
        # Kernels for sequences take the kinds of masks that allow for padding alone.
        options["attn_mask_type"] = AttnMaskType.padding
        self.kernel = te_layers.TEDotProductAttention(
            config=config, layer_number=layer_number, **options
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: StreamBatch,
        **unused: Any,
    ) -> Tensor:
        """Query, key and value ``[T, 1, H, K]`` to ``[T, 1, H * K]``."""
        found = attention_mask.sequences(query.device)
        inputs = in_order_of_sequences([x.squeeze(1) for x in (query, key, value)], found)
        sequences = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=found.boundaries,
            cu_seqlens_kv=found.boundaries,
            max_seqlen_q=found.longest,
            max_seqlen_kv=found.longest,
        )
        output = self.kernel(
            *inputs,
            attention_mask=None,
            attn_mask_type=AttnMaskType.padding,
            packed_seq_params=sequences,
        )
        return in_order_of_stream(output, found).reshape(len(query), 1, -1)


def in_order_of_sequences(tensors: Sequence[Tensor], sequences: Sequences) -> Sequence[Tensor]:
    """Tokens ``[T, ...]`` of a gathered stream as its sequences have them."""
    if sequences.order is None:
        return tensors
    return [_Reorder.apply(x, sequences.order, sequences.places) for x in tensors]


def in_order_of_stream(tokens: Tensor, sequences: Sequences) -> Tensor:
    """The inverse for one tensor."""
    if sequences.order is None:
        return tokens
    reordered: Tensor = _Reorder.apply(tokens, sequences.places, sequences.order)
    return reordered


class _Reorder(torch.autograd.Function):
    """Tokens in another order ``[T, ...]``, which has each of them once.

    The gradient is gathered too; that of an index would be added up, for which a GPU has no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(places)
        return tokens.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None
