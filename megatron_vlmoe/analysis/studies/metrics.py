"""The metrics of studies: how tables show them, and which names a study may ask for."""

from __future__ import annotations

import re
from collections.abc import Mapping

METRICS: Mapping[str, tuple[str, float, int]] = {
    "mlm": ("MLM loss, nats", 1.0, 3),
    "mim": ("MIM loss, nats", 1.0, 3),
    "vlm": ("VLM loss, nats", 1.0, 3),
    "vlm_text": ("VLM text loss, nats", 1.0, 3),
    "vlm_image": ("VLM image loss, nats", 1.0, 3),
    "contrastive": ("contrastive loss, nats", 1.0, 3),
    "total": ("held-out loss, nats", 1.0, 3),
    "train": ("training loss, nats", 1.0, 3),
    "overfit": ("held-out minus training loss, nats", 1.0, 3),
    "roughness": ("roughness of the training loss, nats", 1.0, 4),
    "spikes": ("spikes", 1.0, 1),
    "gradient_peak": ("gradient norm, 95th percentile / median", 1.0, 2),
    "dropped": ("dropped, %", 100.0, 1),
    "dropped/mlm": ("texts", 100.0, 1),
    "dropped/mim": ("images", 100.0, 1),
    "dropped/vlm_text": ("texts of pairs", 100.0, 1),
    "dropped/vlm_image": ("images of pairs", 100.0, 1),
    "dropped_vision": ("dropped of images, %", 100.0, 1),
    "dropped_text": ("dropped of texts, %", 100.0, 1),
    "dropped_shared": ("dropped of the shared pool, %", 100.0, 1),
    "dropped_vl": ("dropped of the VL pool, %", 100.0, 1),
    "eval_dropped/mlm": ("texts, held out", 100.0, 1),
    "eval_dropped/mim": ("images, held out", 100.0, 1),
    "eval_dropped/vlm_text": ("texts of pairs, held out", 100.0, 1),
    "eval_dropped/vlm_image": ("images of pairs, held out", 100.0, 1),
    "load_max": ("load of the fullest expert, mean = 1", 1.0, 2),
    "dead_experts": ("experts without a token", 1.0, 1),
    "flops": ("training FLOPs", 1.0, -3),
    "seconds": ("training seconds", 1.0, 0),
    "seconds_per_step": ("seconds per step", 1.0, 3),
    "parameters": ("parameters, millions", 1e-6, 2),
    "parameters_per_token": ("parameters per token, millions", 1e-6, 2),
    "average": ("average, %", 1.0, 1),
    "vqa/val/vqa_official": ("VQA val, %", 1.0, 1),
    "vqa/test-dev": ("VQA test-dev, %", 1.0, 2),
    "vqa/test-std": ("VQA test-std, %", 1.0, 2),
    "nlvr2/dev/accuracy": ("NLVR2 dev, %", 1.0, 1),
    "nlvr2/test/accuracy": ("NLVR2 test-P, %", 1.0, 1),
    "coco/test/TR@1": ("COCO TR@1, %", 1.0, 1),
    "coco/test/IR@1": ("COCO IR@1, %", 1.0, 1),
    "retrieval/test/TR@1": ("Flickr30K TR@1, %", 1.0, 1),
    "retrieval/test/IR@1": ("Flickr30K IR@1, %", 1.0, 1),
    "imagenet/val/top1": ("ImageNet top-1, %", 1.0, 1),
    "mnli/dev_matched/accuracy": ("MNLI-m, %", 1.0, 1),
}
"""Metrics with what stands above their column, the factor that is shown, and digits (-3: three significant ones)."""

HELD_OUT = ("mlm", "mim", "vlm", "vlm_text", "vlm_image", "contrastive", "total")
"""Held-out losses, which have a curve over training too."""
TRAINING = ("train",)
"""Metrics of the logged steps of training, which have a curve over training."""
SEGMENTS = ("mlm", "mim", "vlm_text", "vlm_image")
"""Objectives by which dropped tokens are told apart."""
DROPPED = tuple(f"dropped/{segment}" for segment in SEGMENTS)
"""Dropped tokens in training; `dropped/mlm/block_2` are those of one block."""
POOLS = ("text", "vision", "shared", "vl")
_PARTS = ("", "_foreground", "_background")
LAST = (
    *HELD_OUT,
    *TRAINING,
    *("overfit", "roughness", "spikes", "gradient_peak"),
    *("dropped", "load_max", "dead_experts"),
    *(
        f"{name}_{pool}"
        for name in ("dropped", "load_max", "dead_experts", "router_entropy")
        for pool in POOLS
    ),
    *DROPPED,
    *(f"eval_{name}" for name in DROPPED),
    *("acc/mlm", "acc/vlm_text", *(f"acc/{n}{p}" for n in ("mim", "vlm_image") for p in _PARTS)),
    *("grounding/vlm_text", "grounding/vlm_image"),
    *("recall_at_1/image_to_text", "recall_at_1/text_to_image"),
    *("steps", "flops", "seconds", "seconds_per_step", "memory_gb"),
    *("parameters", "parameters_per_token"),
)
"""What a pretraining has at its end."""
SCORES = (
    *("accuracy", "top1", "top5", "vqa_official"),
    *(f"{way}@{k}" for way in ("TR", "IR") for k in (1, 5, 10)),
    "mean_recall",
)
"""The last part of TASK/SPLIT/METRIC; `vqa_official/number` is that of one type of answer."""


def without_block(metric: str) -> str:
    """The metric of all blocks of which `dropped/mlm/block_2` is a part."""
    return re.sub(r"/block_\d+$", "", metric)
