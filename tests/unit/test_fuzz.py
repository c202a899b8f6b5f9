"""Damaged files, a fixed few for every reader of files from outside; many more: bash tests/fuzz/run.sh."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import record
from engine import Case, Finding, Tally, Workshop, code_lines
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


CODES = next(reader for reader in READERS if reader.name == "codes")


def tally(folder: Path, lines: int, **found: int) -> Tally:
    """What came of two cases or more, of which the first ran so many of the reader's lines."""
    made = Tally(Counter(read=1, refused=1, finding=sum(found.values())))
    ((file, possible),) = code_lines(*CODES.modules).items()
    made.lines = {(file, number) for number in sorted(possible)[:lines]}
    for told, number in found.items():
        (folder / told).mkdir()
        (folder / told / "case.bin").write_bytes(Case("a", {"x": b"damage"}).packed())
        made.findings[told], made.found[told] = str(folder / told), number
    return made


def test_counts_add_up_and_a_finding_is_open_until_its_case_is_read(tmp_path: Path) -> None:
    path, lock = tmp_path / "counts.json", tmp_path / "lock"
    with record.changed(path, lock) as counts:
        record.add(counts, CODES, tally(tmp_path, 5, crash=2), ())
    again = record.open_cases(record.load(path), CODES)
    assert again == {"crash": Case("a", {"x": b"damage"})}
    # Another process has counted meanwhile.
    with record.changed(path, lock) as counts:
        record.add(counts, CODES, tally(tmp_path, 3, hang=1), ())
    with record.changed(path, lock) as counts:
        record.add(counts, CODES, tally(tmp_path, 0), again)
    one = record.load(path)["codes"]
    assert one["cases"] == {"read": 3, "refused": 3, "finding": 3}
    assert [*one["open"]] == ["hang"] and one["mended"] == {"crash": 2}
    (possible,) = code_lines(*CODES.modules).values()
    assert record.unpacked(one["missed"]["codes.py"], possible) == {*sorted(possible)[5:]}
    assert " 9 | 3 | 3 | 1 | 1 | " in record.row("codes", one)
    assert "open findings: 1" in record.total(record.load(path))
    # Lines of another text are counted anew, cases are not.
    with record.changed(path, lock) as counts:
        counts["codes"]["text"] = "another"
        record.add(counts, CODES, tally(tmp_path, 1), ())
    one = record.load(path)["codes"]
    assert len(record.unpacked(one["missed"]["codes.py"], possible)) == len(possible) - 1
    assert sum(one["cases"].values()) == 11 and len(json.dumps(one)) < 1500
