"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from typing import Iterator

import pytest
from helpers import Workers

# Before torch is imported anywhere: several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four processes that tests run layouts on."""
    pool = Workers(4)
    yield pool
    pool.close()
