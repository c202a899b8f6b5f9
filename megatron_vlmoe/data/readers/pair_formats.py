"""The table of pair layouts."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_vlmoe.data.readers.coco import read_coco
from megatron_vlmoe.data.readers.karpathy import read_karpathy
from megatron_vlmoe.data.readers.pair_tables import read_jsonl_pairs, read_parquet_pairs
from megatron_vlmoe.data.readers.pairs import PairReader
from megatron_vlmoe.data.readers.path_captions import read_path_captions
from megatron_vlmoe.data.readers.visual_genome import read_visual_genome
from megatron_vlmoe.data.readers.webdataset import read_webdataset

PAIR_READERS: Mapping[str, PairReader] = {
    "coco": read_coco,
    "karpathy": read_karpathy,
    "visual-genome": read_visual_genome,
    "sbu": read_path_captions,
    "cc3m": read_path_captions,
    "webdataset": read_webdataset,
    "jsonl": read_jsonl_pairs,
    "parquet": read_parquet_pairs,
}
"""Readers by the value of ``--format``."""
