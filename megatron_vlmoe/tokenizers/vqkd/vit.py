"""Plain pre-norm vision transformer: encoder and decoder of the VQ-KD tokenizer.

Letters: N images, C input channels, S input side, P patch side, L = (S/P)^2 patches, D width,
H heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention; q and v have biases, k has none (its gradient would be zero)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        batch, length, width = x_NLD.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x_NLD, self.qkv.weight, bias)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class FeedForward(nn.Module):
    """fc2(gelu(fc1(x)))."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` -> `[..., D]`."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN(x)), then x + FFN(LN(x)); no LayerScale, no dropout."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(width, int(width * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Linear map of non-overlapping patches, written as a convolution with stride P."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_NCSS: Tensor) -> Tensor:
        """`[N, C, S, S]` -> `[N, L, D]`, row-major."""
        return self.proj(x_NCSS).flatten(2).transpose(1, 2)


class PatchTransformer(nn.Module):
    """ViT with a cls token and learned absolute positions that returns its patch tokens.

    The encoder reads pixels with P = the patch size; the decoder reads the `[N, code_dim, S/P,
    S/P]` code map with P = 1.
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        width: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
    ) -> None:
        super().__init__()
        num_patches = (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbedding(patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, width))
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """BEiT's initialisation: normal 0.02, then the output projections of block l / sqrt(2l)."""
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        self.apply(initialize_linear)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            with torch.no_grad():
                block.attn.proj.weight.div_(math.sqrt(2.0 * number))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * number))

    def forward(self, x_NCSS: Tensor) -> Tensor:
        """`[N, C, S, S]` -> layer-normalised patch tokens `[N, L, D]`, row-major."""
        x = self.patch_embed(x_NCSS)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])


def initialize_linear(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases for a Linear; anything else is left alone."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
