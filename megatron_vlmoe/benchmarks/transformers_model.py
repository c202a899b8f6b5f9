"""The plain dense model with attention and FFNs of transformers: what a user of that library would train.

They are SigLIP's, whose one kind of layer reads texts and images: pre-norm, biases everywhere and torch's attention
kernel, as here. Its layer has a single FFN, so that those of the modalities, LayerScale and stochastic depth are around
its parts as in the plain model.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Optional

import torch
from torch import Tensor

from megatron_vlmoe.benchmarks.compare import NotRun, require_close
from megatron_vlmoe.benchmarks.plain_model import Layers, PlainModel
from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.model.attention import allowed_kernels
from megatron_vlmoe.runtime.distributed import device
from megatron_vlmoe.stream.batch import Batch, map_values


def transformers_layers() -> Layers:
    """Attention and FFN of transformers. Raises `NotRun` where it is not installed."""
    if not importlib.util.find_spec("transformers"):
        raise NotRun("needs transformers")
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipAttention, SiglipMLP

    def settings(model: ModelConfig) -> Any:
        return SiglipVisionConfig(
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            hidden_act="gelu",
            attn_implementation="sdpa",
        )

    class Attention(SiglipAttention):
        def forward(self, hidden: Tensor, mask: Optional[Tensor]) -> Tensor:
            """Without the attention weights, which this kernel does not give."""
            with allowed_kernels(mask):
                output: Tensor = super().forward(hidden, mask)[0]
            return output

    return Layers(
        lambda model: Attention(settings(model)), lambda model: SiglipMLP(settings(model))
    )


def check(config: RunConfig, batch: Batch) -> None:
    """Raises RuntimeError unless both models have the same loss and gradient, from the same weights in fp32.

    Args:
        batch: of which the first sample of each kind is taken.
    """
    torch.manual_seed(1)
    with torch.device(device()):
        # Without stochastic depth.
        plain, other = PlainModel(config).eval(), PlainModel(config, transformers_layers()).eval()
    weights = {}
    for name, value in plain.state_dict().items():
        own = name.replace("projection", "out_proj")
        own = own.replace(".1.0.", ".1.fc1.").replace(".1.2.", ".1.fc2.")
        if ".qkv." in own:
            for letter, part in zip("qkv", value.chunk(3)):
                weights[own.replace("qkv", f"{letter}_proj")] = part
        else:
            weights[own] = value
    # Strict: neither has a parameter that the other lacks.
    other.load_state_dict(weights)
    one = map_values(batch, lambda value: value[:1].to(device()) if value.dim() else value)
    found = []
    for model in (plain, other):
        loss = model(one)
        # The first norm, behind which every layer is.
        (gradient,) = torch.autograd.grad(loss, model.get_parameter("blocks.0.norm.weight"))
        found.append((loss.detach(), gradient))
    for what, expected, own in zip(("loss", "gradient"), *found):
        require_close(f"the {what} of transformers' layers is", own, expected)
