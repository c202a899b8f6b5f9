"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_files import write_tokenizer
from helpers import Workers
from prepared_tasks import Prepared, prepare_all
from raw_tasks import Desk

# It has a command of its own, which fetches what it needs: bash tests/transformers_suite.sh.
collect_ignore = ["transformers_suite"]

# Before torch is imported anywhere: several processes share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def workers() -> Workers:
    """Four processes that tests run layouts on."""
    return Workers(4)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The downstream tasks of a very small sample corpus."""
    return prepare_all(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer of a few words."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "t.model")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of ours for imports of public checkpoints."""
    from public_states import write_text_model

    return write_text_model(tmp_path_factory.mktemp("text_model"))


@pytest.fixture(scope="session")
def vocab_txt(text_model: Path) -> Path:
    """A WordPiece vocabulary beside it."""
    from public_states import write_wordpiece

    return write_wordpiece(text_model.with_name("vocab.txt"))


@pytest.fixture
def desk(tmp_path: Path, tiny_tokenizer: str, capfd: pytest.CaptureFixture[str]) -> Desk:
    """An empty folder for the raw data of a task."""
    (tmp_path / "raw").mkdir()
    return Desk(tmp_path / "raw", tmp_path / "out" / "p", tiny_tokenizer, capfd)
