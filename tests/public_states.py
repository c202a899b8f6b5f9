"""State dicts with the parameter names and shapes of public models, and VLMo's forward pass in plain formulas.

Names and shapes: microsoft/unilm (vlmo, beit2, beit3) and microsoft/torchscale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a public model.

    Args:
        width: D.
        depth: blocks.
        heads: attention heads.
        inner: FFN.
        patch: patch side.
        grid: patches along a side.
        vocab: text pieces.
        text: text positions.
        vl: last blocks with VL-FFN.
        codes: classes of the image head.
    """

    width: int = 64
    depth: int = 3
    heads: int = 4
    inner: int = 96
    patch: int = 8
    grid: int = 4
    vocab: int = 60
    text: int = 12
    vl: int = 1
    codes: int = 200


BASE = Sizes(768, 12, 12, 3072, 16, 14, 30522, 40, 2, 8192)


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def mlp(name: str, s: Sizes) -> Shapes:
    return linear(f"{name}.fc1", s.width, s.inner) | linear(f"{name}.fc2", s.inner, s.width)


def beit_attention(block: str, s: Sizes, layer_scale: bool = True) -> Shapes:
    d = s.width
    shapes = norm(f"{block}.norm1", d) | linear(f"{block}.attn.proj", d, d)
    shapes |= {
        f"{block}.attn.qkv.weight": (3 * d, d),
        f"{block}.attn.q_bias": (d,),
        f"{block}.attn.v_bias": (d,),
    }
    scales = {f"{block}.gamma_1": (d,), f"{block}.gamma_2": (d,)} if layer_scale else {}
    return shapes | scales


def vlmo_shapes(s: Sizes, absolute: bool = False) -> Shapes:
    """VLMo after vision-language pretraining; `absolute` has the kinds of parameters of base_plus."""
    d = s.width
    shapes: Shapes = {
        "transformer.cls_token": (1, 1, d),
        "transformer.patch_embed.proj.weight": (d, 3, s.patch, s.patch),
        "transformer.patch_embed.proj.bias": (d,),
        "text_embeddings.position_ids": (1, s.text),
        "text_embeddings.word_embeddings.weight": (s.vocab, d),
        "text_embeddings.position_embeddings.weight": (s.text, d),
        "text_embeddings.token_type_embeddings.weight": (2, d),
        "token_type_embeddings.weight": (2, d),
        "mlm_score.bias": (s.vocab,),
        "mlm_score.decoder.weight": (s.vocab, d),
        "logit_scale": (),
        "logit_vl_scale": (),
        **norm("text_embeddings.LayerNorm", d),
        **norm("transformer.norm", d),
        **linear("pooler.dense", d, d),
        **linear("mlm_score.transform.dense", d, d),
        **norm("mlm_score.transform.LayerNorm", d),
        **linear("itm_score.fc", d, 2),
    }
    for head in ("text", "image", "vl_text", "vl_image"):
        shapes[f"itc_{head}_proj.fc.weight"] = (d, d)
    if absolute:
        shapes["transformer.pos_embed"] = (1, s.grid**2 + 1, d)
    else:
        distances = (2 * s.grid - 1) ** 2 + 3 + 2 * 196 + 2
        shapes["relative_position_bias_table"] = (distances, s.heads * s.depth)
    for i in range(s.depth):
        block = f"transformer.blocks.{i}"
        shapes |= beit_attention(block, s, layer_scale=not absolute)
        for kind in ("text", "imag", *(("vl",) if i >= s.depth - s.vl else ())):
            shapes |= norm(f"{block}.norm2_{kind}", d) | mlp(f"{block}.mlp_{kind}", s)
    return shapes


def beit2_shapes(s: Sizes, absolute: bool = False, finetuned: bool = False) -> Shapes:
    """BEiT v2 with its [CLS] pretraining, or fine-tuned on classes."""
    d, distances = s.width, (2 * s.grid - 1) ** 2 + 3
    shapes: Shapes = {
        "cls_token": (1, 1, d),
        "patch_embed.proj.weight": (d, 3, s.patch, s.patch),
        "patch_embed.proj.bias": (d,),
    }
    index = (s.grid**2 + 1, s.grid**2 + 1)
    if absolute:
        shapes["pos_embed"] = (1, s.grid**2 + 1, d)
    elif not finetuned:
        shapes["rel_pos_bias.relative_position_bias_table"] = (distances, s.heads)
        shapes["rel_pos_bias.relative_position_index"] = index
    blocks = [f"blocks.{i}" for i in range(s.depth)]
    for block in blocks if finetuned else [*blocks, "cls_pt_layers.0", "cls_pt_layers.1"]:
        shapes |= beit_attention(block, s) | norm(f"{block}.norm2", d) | mlp(f"{block}.mlp", s)
        if finetuned:
            shapes[f"{block}.attn.relative_position_bias_table"] = (distances, s.heads)
            shapes[f"{block}.attn.relative_position_index"] = index
    if finetuned:
        return shapes | norm("fc_norm", d) | linear("head", d, 10)
    head = {"mask_token": (1, 1, d), **linear("lm_head", d, s.codes)}
    return shapes | head | norm("norm", d)


def beit3_shapes(s: Sizes, text: bool = True) -> Shapes:
    """BEiT-3 after pretraining, or without its text side."""
    d = s.width
    letters = "AB" if text else "A"
    shapes: Shapes = {
        "beit3.vision_embed.cls_token": (1, 1, d),
        "beit3.vision_embed.mask_token": (1, 1, d),
        "beit3.vision_embed.proj.weight": (d, 3, s.patch, s.patch),
        "beit3.vision_embed.proj.bias": (d,),
        "beit3.encoder.embed_positions.A.weight": (s.grid**2 + 3, d),
        **linear("mim_head", d, s.codes),
    }
    if text:
        shapes["beit3.text_embed.weight"] = (s.vocab, d)
        shapes["beit3.encoder.embed_positions.B.weight"] = (s.text, d)
        shapes |= linear("mlm_head", d, s.vocab)
    for letter in letters:
        shapes |= norm(f"beit3.encoder.layer_norm.{letter}", d)
        for i in range(s.depth):
            layer = f"beit3.encoder.layers.{i}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= linear(f"{layer}.self_attn.{part}.{letter}", d, d)
            for part in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                shapes |= norm(f"{layer}.{part}.{letter}", d)
            shapes |= mlp(f"{layer}.ffn.{letter}", s)
            shapes |= norm(f"{layer}.ffn.{letter}.ffn_layernorm", s.inner)
    return shapes


def filled(shapes: Shapes, seed: int = 3) -> dict[str, Tensor]:
    """Random values, norms near one and LayerScale large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if "relative_position_index" in name or name.endswith("position_ids"):
            state[name] = torch.arange(math.prod(shape)).reshape(shape)
            continue
        value = 0.2 * torch.randn(shape, generator=generator)
        is_norm = any(word in name for word in ("norm", "LayerNorm", "_ln")) and "weight" in name
        state[name] = value + 1.0 if is_norm or "gamma" in name else value
    return state


def count(shapes: Mapping[str, tuple[int, ...]], *starts: str) -> int:
    """Parameters whose names begin so (all of them without a start); indexes do not count."""
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if name.startswith(starts or ("",)) and not name.endswith(("_ids", "position_index"))
    )


def with_experts(state: Mapping[str, Tensor], blocks: Mapping[int, int], kinds: str) -> dict:
    """Turns the FFNs of some blocks (from 0) into DeepSpeed MoE layers of so many different experts."""
    result = dict(state)
    generator = torch.Generator().manual_seed(11)
    for block, experts in blocks.items():
        for kind in kinds.split():
            name = f"transformer.blocks.{block}.mlp_{kind}"
            width = state[f"{name}.fc1.weight"].shape[1]
            result[f"{name}.deepspeed_moe.gate.wg.weight"] = torch.randn(
                experts, width, generator=generator
            )
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                dense = result.pop(f"{name}.{part}")
                for e in range(experts):
                    noise = 0.1 * torch.randn(dense.shape, generator=generator)
                    key = f"{name}.deepspeed_moe.experts.deepspeed_experts.{e}.{part}"
                    result[key] = dense + noise
    return result


def write_deepspeed(folder: Path, state: Mapping[str, Tensor], **extra: Any) -> Path:
    """The files that DeepSpeed writes for such a state dict."""
    folder.mkdir(parents=True)
    marker = ".deepspeed_moe.experts.deepspeed_experts."
    dense = {k: v for k, v in state.items() if marker not in k}
    torch.save({"module": dense, "global_steps": 2, **extra}, folder / "mp_rank_00_model_states.pt")
    layers = [key.partition(".deepspeed_moe.")[0] for key in dense if "gate.wg.weight" in key]
    for number, layer in enumerate(layers):
        experts: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith(layer + marker):
                experts.setdefault(key.removeprefix(layer + marker).split(".")[0], {})[key] = value
        for expert, tensors in experts.items():
            torch.save(
                tensors, folder / f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            )
    return folder


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
        batch: `text_ids`, `pair_ids`, `pair_pixels`, `image_pixels` as arrays.
    """
    from megatron_vlmoe.config.stream import StreamLayout
    from megatron_vlmoe.convert.checkpoint_reader import CheckpointReader
    from megatron_vlmoe.model.heads import MaskedHeads
    from megatron_vlmoe.moe.stream_batch import StreamBatch
    from megatron_vlmoe.runtime.distributed import initialize
    from megatron_vlmoe.train.setup import build_forward_only
    from megatron_vlmoe.train.warm_start import CheckpointWeights, warm_start

    reader = CheckpointReader(path)
    config = reader.config
    counts = {
        "micro_texts": len(batch["text_ids"]),
        "micro_pairs": len(batch["pair_ids"]),
        "micro_images": len(batch["image_pixels"]),
    }
    moe = replace(config.moe, eval_capacity_factor=0.0)
    config = replace(config, data=replace(config.data, **counts), moe=moe)
    initialize(config.parallel, config.train.seed)
    parts = build_forward_only(config, "fp32", MaskedHeads)
    warm_start(CheckpointWeights(reader.path), config, parts, with_heads=True)
    layout = StreamLayout.from_config(config.model, config.data)
    lengths = torch.full((len(batch["pair_ids"]),), config.model.pair_text_length)
    stream = StreamBatch(layout, pair_lengths=lengths)
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in batch.items()}
    with torch.no_grad():
        hidden = parts.chunks[0].encode(tensors, stream)
    return {name: x.squeeze(2).numpy() for name, x in layout.segments(hidden).items()}
