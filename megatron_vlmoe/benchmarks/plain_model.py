"""The dense model as one would write it in plain PyTorch: what megatron-core's machinery is measured against.

Multiway blocks (BEiT-3): attention shared by the modalities, an FFN of its own for each, and one for pairs in the last
blocks. Texts, images and pairs go through it one kind after the other, each as a batch ``[n, L, D]``.
"""

from __future__ import annotations

from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.model.attention import allowed_kernels
from megatron_vlmoe.stream.batch import Batch, ImageSegment, TextSegment


class Attention(nn.Module):
    """Self-attention of all heads in one call of torch's kernel."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        width = model.hidden_size
        self.heads = model.num_attention_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden: Tensor, mask: Optional[Tensor]) -> Tensor:
        """``[n, L, D]`` to ``[n, L, D]``; `mask` ``[n, 1, 1, L]`` is true where a token may be seen."""
        samples, length, width = hidden.shape
        qkv = self.qkv(hidden).view(samples, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        with allowed_kernels(mask):
            attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.projection(attended.transpose(1, 2).reshape(samples, length, width))


def feed_forward(model: ModelConfig) -> nn.Module:
    """An FFN with GELU."""
    width, inner = model.hidden_size, model.ffn_hidden_size
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class Layers(NamedTuple):
    """What makes the two layers of a block that hold nearly all of its work.

    Args:
        attention: makes a module of tokens ``[n, L, D]`` and a mask, as `Attention`.
        feed_forward: makes a module of tokens ``[n, L, D]``.
    """

    attention: Callable[[ModelConfig], nn.Module]
    feed_forward: Callable[[ModelConfig], nn.Module]


PLAIN_LAYERS = Layers(Attention, feed_forward)


class Block(nn.Module):
    """Pre-norm attention and an FFN per branch, as residuals with LayerScale and stochastic depth per sample."""

    def __init__(self, config: RunConfig, number: int, layers: Layers) -> None:
        super().__init__()
        model = config.model
        width = model.hidden_size
        self.drop_rate = model.drop_path * (number - 1) / max(model.num_layers - 1, 1)
        self.norm = nn.LayerNorm(width, eps=model.layernorm_epsilon)
        self.attention = layers.attention(model)
        self.scales = nn.ParameterList()
        if model.layer_scale_init > 0.0:
            for _ in range(2):
                self.scales.append(torch.full((width,), model.layer_scale_init))
        in_vl_layers = number > model.num_layers - model.num_vl_layers
        names = ("text", "vision", "vl") if in_vl_layers else ("text", "vision")
        self.branches = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width, eps=model.layernorm_epsilon), layers.feed_forward(model)
                )
                for name in names
            }
        )

    def forward(self, hidden: Tensor, mask: Optional[Tensor], text_length: int) -> Tensor:
        """``[n, L, D]`` to ``[n, L, D]``; the first `text_length` tokens are text."""
        length = hidden.shape[1]
        hidden = self._residual(hidden, self.attention(self.norm(hidden), mask), 0)
        if "vl" in self.branches and 0 < text_length < length:
            output = self.branches["vl"](hidden)
        else:
            text, vision = hidden.split([text_length, length - text_length], dim=1)
            parts = [
                self.branches[name](part)
                for name, part in (("text", text), ("vision", vision))
                if part.shape[1]
            ]
            output = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self._residual(hidden, output, 1)

    def _residual(self, hidden: Tensor, branch: Tensor, index: int) -> Tensor:
        if len(self.scales):
            branch = branch * self.scales[index]
        if self.training and self.drop_rate > 0.0:
            keep = torch.rand(len(branch), 1, 1, device=branch.device) >= self.drop_rate
            branch = branch * (keep / (1.0 - self.drop_rate))
        return hidden + branch


class PlainModel(nn.Module):
    """Embeddings, blocks and the two heads of masked data modelling; its `forward` is the sum of the losses."""

    def __init__(self, config: RunConfig, layers: Layers = PLAIN_LAYERS) -> None:
        super().__init__()
        model, width = config.model, config.model.hidden_size
        self.config = config
        self.words = nn.Embedding(model.vocab_size, width)
        length = max(model.text_length, model.pair_text_length)
        self.text_position = nn.Parameter(0.02 * torch.randn(length, width))
        self.patches = nn.Conv2d(3, width, model.patch_size, model.patch_size)
        self.image_position = nn.Parameter(0.02 * torch.randn(model.image_length, width))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(config, n + 1, layers) for n in range(model.num_layers))
        self.norm = nn.LayerNorm(width, eps=model.layernorm_epsilon)
        self.text_head = nn.Linear(width, model.vocab_size)
        self.image_head = nn.Linear(width, model.visual_vocab_size)

    def forward(self, batch: Batch) -> Tensor:
        """The total loss of a micro-batch."""
        losses = []
        if "texts" in batch:
            texts = batch["texts"]
            hidden = self._blocks(self._text(texts), None, texts["ids"].shape[1])
            losses.append(self._loss(self.text_head, hidden, texts["positions"], texts["labels"]))
        if "images" in batch:
            images = batch["images"]
            hidden = self._blocks(self._image(images), None, 0)
            positions = images["positions"] + 1
            losses.append(self._loss(self.image_head, hidden, positions, images["labels"]))
        if "pair_texts" in batch:
            texts, images = batch["pair_texts"], batch["pair_images"]
            length = texts["ids"].shape[1]
            caption, image = self._text(texts), self._image(images)
            seen = torch.arange(length, device=caption.device) < texts["lengths"].unsqueeze(1)
            mask = torch.cat([seen, seen.new_ones(len(seen), image.shape[1])], dim=1)
            hidden = self._blocks(torch.cat([caption, image], dim=1), mask[:, None, None], length)
            losses.append(self._loss(self.text_head, hidden, texts["positions"], texts["labels"]))
            positions = images["positions"] + 1 + length
            losses.append(self._loss(self.image_head, hidden, positions, images["labels"]))
        return torch.stack(losses).sum()

    def _text(self, texts: TextSegment) -> Tensor:
        ids = texts["ids"]
        return self.words(ids) + self.text_position[: ids.shape[1]]

    def _image(self, images: ImageSegment) -> Tensor:
        data, pixels = self.config.data, images["pixels"]
        mean, std = (
            torch.tensor(values, device=pixels.device).view(3, 1, 1)
            for values in (data.pixel_mean, data.pixel_std)
        )
        values = ((pixels.float() / 255.0 - mean) / std).to(self.patches.weight.dtype)
        patches = self.patches(values).flatten(2).transpose(1, 2)
        patches = torch.where(images["mask"].unsqueeze(2), self.mask_token, patches)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + self.image_position

    def _blocks(self, hidden: Tensor, mask: Optional[Tensor], text_length: int) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, mask, text_length)
        return self.norm(hidden)

    @staticmethod
    def _loss(head: nn.Linear, hidden: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        index = positions.unsqueeze(2).expand(-1, -1, hidden.shape[2])
        logits = head(hidden.gather(1, index)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
