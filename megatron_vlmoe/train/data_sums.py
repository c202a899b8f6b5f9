"""Reads the datasets of a run in full before it trains: `data.verify` full."""

from __future__ import annotations

import logging

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.sums import data_files
from megatron_vlmoe.runtime.distributed import from_rank_zero
from megatron_vlmoe.runtime.sums import flaw_words
from megatron_vlmoe.train.rank_sums import differing_on_ranks

log = logging.getLogger("megatron_vlmoe")


def verify_data(config: RunConfig, training: bool = True) -> None:
    """Compares the files of all datasets with the sums in their manifests, if `data.verify` asks for it.

    Every rank must call it: each reads a share of the files.

    Raises:
        DataError: on every rank, naming the first file that differs.
    """
    if config.data.verify != "full":
        return
    files = from_rank_zero(lambda: data_files(config, training))
    sizes = {path: record.size for path, record in files.items()}
    flaws = differing_on_ranks({path: record.sha256 for path, record in files.items()}, sizes)
    if flaws:
        path, reason = flaws[0]
        raise DataError(f"{path}: {flaw_words(reason, 'its manifest', len(flaws) - 1)}")
    log.info("verified %d files of data, %.2f GB", len(files), sum(sizes.values()) / 1e9)
