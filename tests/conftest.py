"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from typing import Iterator

import pytest
from helpers import Workers
from prepared_tasks import Prepared, prepare_all

# Before torch is imported anywhere: several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Four processes that tests run layouts on."""
    pool = Workers(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The downstream tasks of a very small sample corpus."""
    return prepare_all(tmp_path_factory.mktemp("tasks"))
