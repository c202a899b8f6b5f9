"""Tiny random Hugging Face models of every class, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from hf_folder import TINY, VOCAB

from megatron_vlmoe.convert.hf import modeling_vlmoe
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig

LABELS = 3
PATCHES = 16
# Experts on text, images and pairs, chosen twice.
EVERYWHERE = {"moe_layers": [1, 3], "moe_vl": True, "num_vl_experts": 4, "num_experts_per_tok": 2}


def config(**options: Any) -> VLMoEConfig:
    return VLMoEConfig(**{**TINY, "num_labels": LABELS, "drop_path_rate": 0.0, **options})


def build(name: str = "VLMoEModel", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return getattr(modeling_vlmoe, name)(config(**options)).eval()


def inputs(samples: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Texts of 3 tokens and more up to 8, and images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (samples, 8), generator=generator)
    lengths = torch.randint(3, 9, (samples,), generator=generator)
    lengths[0] = 8
    mask = (torch.arange(8) < lengths[:, None]).long()
    return {
        "input_ids": torch.where(mask.bool(), ids, 1),
        "attention_mask": mask,
        "pixel_values": torch.randn(samples, 3, 32, 32, generator=generator),
    }


def of(batch: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in names}


KINDS = {
    "texts": ("input_ids", "attention_mask"),
    "images": ("pixel_values",),
    "pairs": ("input_ids", "attention_mask", "pixel_values"),
}

HEADS = [name for name in modeling_vlmoe.__all__ if name.startswith("VLMoEFor")]


def task_inputs(name: str, seed: int = 1) -> dict[str, Any]:
    """Inputs and labels of a head."""
    batch: dict[str, Any] = inputs(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    pieces = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    codes = torch.randint(0, 20, (3, PATCHES), generator=generator)
    hidden = torch.rand(3, PATCHES, generator=generator) < 0.4
    classes = torch.tensor([0, 2, 1])
    if name == "VLMoEForPreTraining":
        return batch | {"labels": pieces, "image_labels": codes, "bool_masked_pos": hidden}
    if name == "VLMoEForMaskedLM":
        return batch | {"labels": pieces}
    if name == "VLMoEForMaskedImageModeling":
        return batch | {"labels": codes, "bool_masked_pos": hidden}
    if name == "VLMoEForVisualQuestionAnswering":
        return batch | {"labels": torch.rand(3, LABELS, generator=generator)}
    if name == "VLMoEForImagesAndTextClassification":
        both = torch.stack([batch["pixel_values"], batch["pixel_values"].flip(0)], dim=1)
        return batch | {"pixel_values": both, "labels": classes}
    if name == "VLMoEForImageClassification":
        return {"pixel_values": batch["pixel_values"], "labels": classes}
    if name == "VLMoEForSequenceClassification":
        return of(batch, "input_ids", "attention_mask") | {"labels": classes}
    return batch | {"return_loss": True}
