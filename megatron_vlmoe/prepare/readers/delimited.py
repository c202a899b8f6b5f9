"""One column of a .csv, .tsv or the like: comma, tab or bar between the cells.

With a header quoted cells are read as csv writes them; a file without one has no quotes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from megatron_vlmoe.prepare.readers.file_kinds import MAX_DOCUMENT_BYTES, refused
from megatron_vlmoe.prepare.readers.lines import numbered_lines
from megatron_vlmoe.prepare.readers.records import Reject

SEPARATORS = ("\t", ",", "|", ";")
"""What may separate columns, in the order in which the first line is searched for it."""


def columns_of(line: str, separator: str | None = None) -> tuple[str, list[str]]:
    """The separator of a first line, if it is not given, and the cells of the line."""
    separator = separator or next((one for one in SEPARATORS if one in line), SEPARATORS[0])
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
    cells = next(csv.reader([line], delimiter=separator), [])
    return separator, [cell.strip() for cell in cells]


def wrong_number_of(cells: Sequence[str], columns: Sequence[str]) -> str:
    """What is wrong with a row that has more or fewer cells than the first line; empty: nothing."""
    if len(cells) == len(columns):
        return ""
    return f"{len(cells)} columns, not the {len(columns)} of the first line"


class _Lines(Iterator[str]):
    """Decoded lines; ``first`` is the number of the first one since it was set to 0, ``last`` of the last."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._items = numbered_lines(path, strip=False)
        self.first = self.last = 0
        self.rejects: list[Reject] = []

    def __next__(self) -> str:
        for item in self._items:
            if isinstance(item, Reject):
                self.rejects.append(item)
                continue
            try:
                line = item[1].decode("utf-8") + "\n"
                self.first, self.last = self.first or item[0], item[0]
                return line
            except UnicodeDecodeError as error:
                reason = f"invalid UTF-8 at byte {error.start}"
                self.rejects.append(Reject(self._path, f"line {item[0]}", reason))
        raise StopIteration


def read_column(
    path: str, names: Sequence[str], captions: bool = False
) -> Iterator[tuple[int, str] | Reject]:
    """Yields (number of the first line, cell) of one column, row by row.

    Args:
        path: the file.
        names: what the column may be called in the header, the best first.
        captions: also read the captions of files without a header, where they stand beside an
            address or behind the name of an image.

    Raises:
        DataError: there is no such column.
    """
    lines = _Lines(path)
    first = next(lines, None)
    if first is None:
        yield from lines.rejects
        return
    delimiter, header = columns_of(first)
    place = next((header.index(name) for name in names if name in header), None)
    headless = place is None and captions
    if headless:
        header = first.strip().split(delimiter)
        place = _place_of_caption(header)
    if place is None:
        yield from lines.rejects
        what = f"a table of columns ({', '.join(header[:8])}) without {' or '.join(names)}"
        advice = "name the column with --text-key, or write it as JSON lines"
        raise refused(
            path, what, f"{advice}; plain text: --format text" if not captions else advice
        )
    if headless:
        strings = chain([first], lines)
        rows = csv.reader(strings, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    else:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
    cells: list[str] | None = []
    while cells is not None:
        bad, lines.first = "", 0
        try:
            cells = next(rows, None)
        except csv.Error as error:
            bad = f"not a row of the table: {error}"
        yield from lines.rejects
        lines.rejects.clear()
        if cells and not bad:
            bad = wrong_number_of(cells, header)
        if bad:
            begin = lines.first or 1
            more = f" to {lines.last}" if lines.last > begin else ""
            yield Reject(path, f"line {begin}{more}", bad)
        elif cells:
            yield lines.first or 1, cells[place]  # 1: that of ``first``, which is no header


def _place_of_caption(cells: Sequence[str]) -> int | None:
    """Which of two cells is a caption: that beside an address, or behind the name of an image."""
    if len(cells) != 2:
        return None
    if re.match(r"https?://", cells[1]):
        return 0
    named = re.fullmatch(r"https?://\S+|\S+\.(?i:jpe?g|png|webp)(?:#\d)?", cells[0])
    return 1 if named else None
