"""The datasets that an objective of pretraining reads, verified, and which of their documents each split has."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import DataConfig
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import DatasetManifest, check_dataset, part_prefix
from megatron_vlmoe.data.order import (
    Blend,
    BlendedOrder,
    BlendSpec,
    SampleOrder,
    SampleRngs,
    parse_blend,
)
from megatron_vlmoe.data.tables import SharedTables

log = logging.getLogger("megatron_vlmoe")

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")
OBJECTIVES = ("texts", "images", "pairs")

_KINDS = {"texts": "text", "images": "images", "pairs": "pairs"}
"""Name of each objective's option in `DataConfig`, and of its kind of dataset."""


@dataclass(frozen=True)
class Source:
    """One verified dataset, and the documents of it that a split uses."""

    prefix: str
    manifest: DatasetManifest
    documents: range

    def reader(self, part: str) -> IndexedReader:
        """The indexed file ``PREFIX_PART``."""
        return IndexedReader(part_prefix(self.prefix, part))


@dataclass(frozen=True)
class Sources:
    """The datasets of one objective in one split."""

    items: tuple[Source, ...]
    weights: tuple[Fraction, ...] | None
    """Share of the samples from each; None: in proportion to their samples."""

    def shares(self, num_samples: Sequence[int]) -> list[Fraction]:
        """Share of each dataset in the blend, given its samples per epoch."""
        weights = self.weights or [Fraction(n) for n in num_samples]
        total = sum(weights, Fraction(0))
        return [weight / total for weight in weights]

    def order(
        self, num_samples: Sequence[int], rngs: SampleRngs, tables: SharedTables
    ) -> BlendedOrder:
        """The order of samples over all datasets, given the samples per epoch of each."""
        orders = [
            SampleOrder(n, rngs.seed, rngs.train, rngs.dataset_key(number), tables)
            for number, n in enumerate(num_samples)
        ]
        return BlendedOrder(Blend(self.shares(num_samples), rngs.seed), orders)


def enabled_objectives(data: DataConfig) -> list[str]:
    """The objectives with a positive micro-batch count.

    Raises:
        ConfigError: there is none.
    """
    enabled = [name for name in OBJECTIVES if getattr(data, f"micro_{name}") > 0]
    if not enabled:
        raise ConfigError("data.micro_texts, data.micro_images and data.micro_pairs are all 0")
    return enabled


def open_sources(data: DataConfig, objective: str, fingerprint: str | None) -> dict[Split, Sources]:
    """Verifies the datasets of one objective and splits off what is held out, if anything is.

    Raises:
        ConfigError: no dataset is given, or one is too small to hold anything out.
        DataError: a dataset is not what it should be.
    """
    option = _KINDS[objective]
    values = getattr(data, option)
    if not values:
        count = getattr(data, f"micro_{objective}")
        raise ConfigError(f"data.{option} is empty: data.micro_{objective}={count} needs a dataset")
    held_out = getattr(data, f"eval_{option}")
    fraction = 0.0 if held_out else data.eval_fraction

    def verified(values: Sequence[str], name: str) -> tuple[list[Source], BlendSpec]:
        spec = parse_blend(values, name)
        manifests = [check_dataset(prefix, option, fingerprint) for prefix in spec.prefixes]
        _name_missing_shards(name, spec.prefixes, manifests)
        found = zip(spec.prefixes, manifests, strict=True)
        return [Source(prefix, m, range(m.documents)) for prefix, m in found], spec

    whole, spec = verified(values, f"data.{option}")
    train, rest = [], []
    for item in whole:
        kept, left = split_documents(item.manifest.documents, fraction, item.prefix, option)
        train.append(replace(item, documents=kept))
        rest.append(replace(item, documents=left))
    result: dict[Split, Sources] = {"train": Sources(tuple(train), spec.weights)}
    if held_out:
        items, spec = verified(held_out, f"data.eval_{option}")
        result["eval"] = Sources(tuple(items), spec.weights)
    elif fraction > 0:
        result["eval"] = Sources(tuple(rest), spec.weights)
    return result


def _name_missing_shards(
    option: str, prefixes: Sequence[str], manifests: Sequence[DatasetManifest]
) -> None:
    """A line for each preprocessing run of which some shards are given, and others are not."""
    given: dict[tuple[str, int], dict[int, str]] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if shard := manifest.shard:
            given.setdefault((shard.work, shard.count), {})[shard.index] = prefix
    for (_, count), shards in given.items():
        if len(shards) < count:
            log.warning(
                "%s: %s is one of %d shards, of which %d are given: the others are not trained on; "
                "merge-data makes one dataset of all",
                option,
                next(iter(shards.values())),
                count,
                len(shards),
            )


def split_documents(
    num_documents: int, fraction: float, prefix: str, option: str
) -> tuple[range, range]:
    """Documents for training, and the last ``fraction`` of them (at least one) for evaluation.

    Raises:
        ConfigError: ``fraction`` is not in 0..1, or nothing would be left to train on.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"data.eval_fraction={fraction} is not in [0, 1)")
    held_out = max(1, math.floor(num_documents * fraction)) if fraction > 0 else 0
    if held_out >= num_documents:
        raise ConfigError(
            f"{prefix}: {num_documents} document(s) cannot be split by data.eval_fraction="
            f"{fraction}: give data.eval_{option}, or data.eval_fraction 0"
        )
    return range(num_documents - held_out), range(num_documents - held_out, num_documents)
