"""Damaged files, a fixed few for every reader of files from outside; many more: bash tests/fuzz/run.sh."""

import random
from pathlib import Path

import pytest
from engine import Finding, Workshop
from readers import READERS, Reader


@pytest.fixture(scope="module")
def workshops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_damaged_files_are_read_or_refused_in_a_line_that_names_them(
    reader: Reader, workshops: Path
) -> None:
    workshop = Workshop(reader, workshops / reader.name)
    for start in workshop.starts:
        assert workshop.run(start) == "read", start.start
    rng = random.Random(1)
    for number in range(reader.few):
        case = workshop.damage(rng, rng.choice(workshop.starts))
        try:
            workshop.run(case)
        except Finding as finding:
            pytest.fail(f"case {number} of {case.start}, {sorted(case.files)} damaged: {finding}")
