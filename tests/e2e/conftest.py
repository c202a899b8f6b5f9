"""A small corpus, made by the tools, and runs on it that several tests look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import Outcome
from small_corpus import ROOMY, Corpus, make_corpus, metrics


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Made once for all tests of a process."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what the command printed."""

    folder: Path
    outcome: Outcome

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All records, in order."""
        return metrics(self.folder)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [record for record in self.metrics if "loss/total" in record]


@pytest.fixture(scope="session")
def unbroken(corpus: Corpus) -> Run:
    """Six steps in one process with everything on that leaves files."""
    folder = corpus.folder / "runs" / "unbroken"
    outcome = corpus.pretrain(
        folder,
        6,
        *ROOMY,
        *"--train.eval_interval 3 --log.tensorboard true --profile.steps 2 3".split(),
        *"--save-interval 2 --checkpoint.keep_last 2".split(),
    )
    return Run(folder, outcome.succeeded())
