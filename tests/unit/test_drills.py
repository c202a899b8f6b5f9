"""The record of drills, and when what they found counts as mended."""

from __future__ import annotations

import pytest
from drills.__main__ import DRILLS, RECORD, read, report
from drills.desk import Verdict


def results(*verdicts: Verdict) -> list[dict[str, object]]:
    same = {"kind": "kill step", "seed": 1, "detail": "", "lost_steps": 0, "training_kills": 1}
    return [{**same, "verdict": verdict.value} for verdict in verdicts]


def test_a_finding_is_mended_after_five_good_drills_of_its_kind(
    capsys: pytest.CaptureFixture[str],
) -> None:
    good, other = [Verdict.RECOVERED] * 4, Verdict.NOT_RUN
    assert report(results(Verdict.HANG, *good, other)) == 1
    assert "0 of 1 findings mended" in capsys.readouterr().out
    assert report(results(Verdict.HANG, *good, other, Verdict.CLEAR)) == 0
    said = capsys.readouterr().out
    assert "mended: kill step (seed 1): hang" in said
    assert "6 drills of 1 kinds (6 kills of training on several processes; 1 not run)" in said


def test_steps_that_were_lost_are_a_finding() -> None:
    (found,) = results(Verdict.RECOVERED)
    assert report([found]) == 0 and report([{**found, "lost_steps": 2}]) == 1


def test_the_record_is_of_known_kinds_and_no_machine() -> None:
    found = read(RECORD)
    assert {record["kind"] for record in found} <= DRILLS.keys()
    assert len({(record["kind"], record["seed"]) for record in found}) == len(found)
    assert not [record for record in found if str(RECORD.parents[2]) in record["detail"]]
    assert RECORD.stat().st_size < 200_000
