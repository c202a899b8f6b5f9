"""Tables 1 and 2 of the paper (arXiv 2303.07226): their columns, and what they report of other models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Column:
    """A column of scores.

    Args:
        title: as the paper has it.
        task: the task of this project that it is about.
        metric: `SPLIT/NAME` in the `metrics.json` of a run.
        samples: how many samples the official split has, captions for retrieval; 0: of a column that is not the
            paper's. This is what the official data are recognised by.
    """

    title: str
    task: str
    metric: str
    samples: int = 0


@dataclass(frozen=True)
class PaperRow:
    """A model: pretraining images, pretraining steps, parameters per token, and a score for every column in percent."""

    model: str
    images: str
    steps: str
    parameters: str
    scores: tuple[Optional[float], ...]


@dataclass(frozen=True)
class PaperTable:
    """A table of downstream results."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[PaperRow, ...]


TABLE_1 = PaperTable(
    "Table 1: vision and language",
    (
        Column("VQA test-dev", "vqa", "test-dev/vqa_official", 107_394),
        Column("VQA test-std", "vqa", "test/vqa_official", 447_793),
        Column("NLVR2 dev", "nlvr2", "dev/accuracy", 6_982),
        Column("NLVR2 test-P", "nlvr2", "test/accuracy", 6_967),
        Column("COCO TR", "retrieval", "test/TR@1", 25_010),
        Column("COCO IR", "retrieval", "test/IR@1", 25_010),
        Column("Flickr30K TR", "retrieval", "test/TR@1", 5_000),
        Column("Flickr30K IR", "retrieval", "test/IR@1", 5_000),
    ),
    (
        PaperRow(
            *("UNITER_BASE", "4M", "200k", "86M"),
            (72.70, 72.91, 77.18, 77.85, 64.4, 50.3, 85.9, 72.5),
        ),
        PaperRow(
            *("VILLA_BASE", "4M", "200k", "86M"),
            (73.59, 73.67, 78.39, 79.30, None, None, 86.6, 74.7),
        ),
        PaperRow(
            *("UNIMO_BASE", "4M", "500K", "120M"),
            (73.79, 74.02, None, None, None, None, 89.7, 74.7),
        ),
        PaperRow(
            *("ViLT", "4M", "200k", "120M"),
            (71.26, None, 75.70, 76.13, 61.5, 42.7, 83.5, 64.4),
        ),
        PaperRow(
            *("ALBEF_BASE", "4M", "240k", "210M"),
            (74.54, 74.70, 80.24, 80.50, 73.1, 56.8, 94.3, 82.8),
        ),
        PaperRow(
            *("VLMo_BASE", "4M", "200k", "180M"),
            (76.64, 76.89, 82.77, 83.34, 74.8, 57.2, 92.3, 79.3),
        ),
        PaperRow(
            *("BEiT-3_BASE*", "4M", "200k", "180M"),
            (76.21, 76.75, 84.93, 85.76, 78.7, 60.3, 95.3, 83.8),
        ),
        PaperRow(
            *("VL-MoE_BASE/32E", "4M", "200k", "180M"),
            (78.23, 78.65, 85.54, 86.77, 79.4, 61.2, 96.1, 84.9),
        ),
        PaperRow(
            *("VLMo_LARGE", "4M", "200k", "560M"),
            (79.94, 79.98, 85.64, 86.86, 78.2, 60.6, 95.3, 84.5),
        ),
        PaperRow(
            *("ALBEF_BASE", "14M", "800k", "210M"),
            (75.84, 76.04, 82.55, 83.14, 77.6, 60.7, 95.9, 85.6),
        ),
        PaperRow(
            *("BLIP_LARGE", "129M", "1.26M", "427M"),
            (78.24, 78.17, 82.48, 83.08, 81.9, 64.3, 97.3, 87.3),
        ),
        PaperRow(
            *("SimVLM_BASE", "1.8B", "1M", "230M"),
            (77.87, 78.14, 81.72, 81.77, None, None, None, None),
        ),
        PaperRow(
            *("SimVLM_HUGE", "1.8B", "1M", "1.7B"),
            (80.03, 80.34, 84.53, 85.15, None, None, None, None),
        ),
        PaperRow(
            *("BEiT-3_HUGE", "21M", "1M", "1.9B"),
            (84.19, 84.03, 91.51, 92.58, 84.8, 67.2, 98.0, 90.3),
        ),
        PaperRow(
            *("PaLI_HUGE", "1.6B", "1M", "17B"),
            (84.30, 84.30, None, None, None, None, None, None),
        ),
    ),
)

TABLE_2 = PaperTable(
    "Table 2: images alone, texts alone",
    (
        Column("ImageNet", "imagenet", "val/top1", 50_000),
        Column("MNLI-m", "mnli", "dev_matched/accuracy", 9_815),
    ),
    (
        PaperRow("ViT_B/16", "300M", "500k", "", (83.6, None)),
        PaperRow("BEiT_B/16", "1.2M", "500k", "", (85.2, None)),
        PaperRow("V-MoE_B/16-32E", "300M", "500k", "", (85.3, None)),
        PaperRow("SimVLM_BASE", "1.8B", "1M", "", (80.6, 64.4)),
        PaperRow("BEiT-3_BASE*", "4M", "200k", "", (83.2, 67.0)),
        PaperRow("VL-MoE_BASE/32E", "4M", "200k", "", (84.5, 68.1)),
    ),
)
