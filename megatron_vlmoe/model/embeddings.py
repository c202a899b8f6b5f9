"""Input representations of texts, images and pairs (paper section 3.2).

Letters: n samples, L tokens, N patches, P patch side, D width, S image side.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.schema import DataConfig, ModelConfig
from megatron_vlmoe.model.linear import WordEmbedding
from megatron_vlmoe.model.norm import mark_sequence_parallel
from megatron_vlmoe.stream.batch import Batch, StreamBatch
from megatron_vlmoe.stream.layout import TEXT_SEGMENTS, VISION_SEGMENTS
from megatron_vlmoe.stream.sizes import padded_vocab_size


class TextEmbedding(MegatronModule):
    """``H^w = word embeddings + T_pos``; special tokens are part of the ids."""

    def __init__(self, config: TransformerConfig, model: ModelConfig) -> None:
        super().__init__(config=config)
        self.word = WordEmbedding(
            padded_vocab_size(model.vocab_size),
            model.hidden_size,
            init_method=lambda tensor: None,
            # Every rank looks up all ids and keeps the samples of its share.
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
        )
        length = max(model.text_length, model.pair_text_length)
        self.position = _table(length, config)
        self.token_type = _table(1, config) if model.token_type_embeddings else None

    def forward(self, ids: Tensor, local_samples: int) -> Tensor:
        """Ids ``[n, L]`` of the whole micro-batch to this rank's ``[n / TP * L, 1, D]``."""
        length = ids.shape[1]
        words = self.word(ids.reshape(1, -1))
        if not self.config.sequence_parallel:
            words = words.transpose(0, 1)
        tokens = words.reshape(local_samples, length, -1) + self.position[:length]
        if self.token_type is not None:
            tokens = tokens + self.token_type
        return tokens.reshape(local_samples * length, 1, -1)


class ImageEmbedding(MegatronModule):
    """``H^v = [I_CLS, V v_1, ..., V v_N] + V_pos``; masked patches are replaced before positions (BEiT)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, data: DataConfig) -> None:
        super().__init__(config=config)
        self.patch_size = model.patch_size
        pixels = 3 * model.patch_size**2
        weight = torch.empty(model.hidden_size, pixels, dtype=config.params_dtype)
        bias = torch.zeros(model.hidden_size, dtype=config.params_dtype)
        self.weight = mark_sequence_parallel(nn.Parameter(weight), config)
        self.bias = mark_sequence_parallel(nn.Parameter(bias), config)
        self.cls_token = _table(1, config)
        self.mask_token = _table(1, config)
        self.position = _table(model.image_length, config)
        self.token_type = _table(1, config) if model.token_type_embeddings else None
        # Not part of a checkpoint; on the device, so that a micro-batch copies nothing.
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.pixel_mean, data.pixel_std))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, pixels: Tensor, mask: Optional[Tensor]) -> Tensor:
        """uint8 pixels ``[n, 3, S, S]`` and mask ``[n, N]`` (True is hidden) to ``[n * (N + 1), 1, D]``.

        Without a mask nothing is hidden.
        """
        values = ((pixels.float() / 255.0 - self.mean) / self.std).to(self.weight.dtype)
        # Rows of patches, row-major, channel first within a patch.
        n, size, side = len(values), self.patch_size, values.shape[2] // self.patch_size
        grid = values.view(n, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5)
        patches = F.linear(grid.reshape(n, side * side, -1), self.weight, self.bias)
        if mask is not None:
            patches = torch.where(mask.unsqueeze(2), self.mask_token, patches)
        cls_token = self.cls_token.expand(len(patches), 1, -1)
        tokens = torch.cat([cls_token, patches], dim=1) + self.position
        if self.token_type is not None:
            tokens = tokens + self.token_type
        return tokens.reshape(-1, 1, tokens.shape[2])


class StreamEmbedding(MegatronModule):
    """Builds the local stream from a batch (first pipeline stage)."""

    def __init__(self, config: TransformerConfig, model: ModelConfig, data: DataConfig) -> None:
        super().__init__(config=config)
        # A run without any text has no tokenizer, hence no vocabulary.
        self.text = TextEmbedding(config, model) if model.vocab_size else None
        self.image = ImageEmbedding(config, model, data)

    def forward(self, batch: Batch, stream: StreamBatch) -> Tensor:
        """The stream ``[T, 1, D]`` of this rank."""
        layout = stream.layout
        parts: list[Tensor] = []
        for text_segment in TEXT_SEGMENTS:
            if count := layout.count(text_segment):
                assert self.text is not None, "texts and pairs need model.vocab_size"
                parts.append(self.text(batch[text_segment]["ids"], count))
        for image_segment in VISION_SEGMENTS:
            if layout.count(image_segment):
                images = batch[image_segment]
                mask = stream.share(images["mask"]) if "mask" in images else None
                parts.append(self.image(images["pixels"], mask))
        return torch.cat(parts)


def _table(rows: int, config: TransformerConfig) -> nn.Parameter:
    """A learned table ``[rows, D]`` that every TP rank applies to its own samples."""
    value = torch.empty(rows, config.hidden_size, dtype=config.params_dtype)
    return mark_sequence_parallel(nn.Parameter(value), config)
