"""Progress is a bar on a terminal, and lines that stay readable in a log file."""

import io
import itertools
import re
import sys
import time

import pytest

from megatron_vlmoe.runtime.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=12.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Progress("encode", "images", total=40) as progress:
        for _ in range(4):
            progress.add(10)
        progress.finish(", 2 rejected")
    *lines, last = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.fullmatch(r"encode: \d+ of 40 images in \S+ s, \S+ images/s\.\.\.", lines[0])
    assert re.fullmatch(r"encode: 40 images in \S+ s, \S+ images/s, 2 rejected", last)


def test_a_terminal_has_a_bar_which_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(KeyboardInterrupt), Progress("text", total=4) as progress:
        progress.add(1)
        raise KeyboardInterrupt
    shown = terminal.getvalue()
    assert "text:   0%" in shown and "| 0/4 [" in shown
    # The line is blank again, so that an error message starts at its beginning.
    assert shown.endswith("\r") and not shown.rstrip("\r").rpartition("\r")[2].strip()
