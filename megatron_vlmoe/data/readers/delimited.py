"""One column of a .csv, .tsv or the like: comma, tab or bar between the cells.

With a header quoted cells are read as csv writes them; a file without one has no quotes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from itertools import chain

from megatron_vlmoe.data.readers.file_kinds import MAX_DOCUMENT_BYTES, refused
from megatron_vlmoe.data.readers.lines import numbered_lines
from megatron_vlmoe.data.readers.records import Reject

_DELIMITERS = "\t|,"


class _Lines(Iterator[str]):
    """Decoded lines; ``first`` is the number of the first one since it was set to 0."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._items = numbered_lines(path, strip=False)
        self.first = 0
        self.rejects: list[Reject] = []

    def __next__(self) -> str:
        for item in self._items:
            if isinstance(item, Reject):
                self.rejects.append(item)
                continue
            try:
                line = item[1].decode("utf-8") + "\n"
                self.first = self.first or item[0]
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
    delimiter = next((one for one in _DELIMITERS if one in first), ",")
    header = [cell.strip().strip('"') for cell in first.split(delimiter)]
    place = next((header.index(name) for name in names if name in header), None)
    headless = place is None and captions
    if headless:
        place = _place_of_caption(header)
    if place is None:
        yield from lines.rejects
        what = f"a table of columns ({', '.join(header[:8])}) without {' or '.join(names)}"
        raise refused(path, what, "name the column with --text-key, or write it as JSON lines")
    csv.field_size_limit(MAX_DOCUMENT_BYTES)
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
        if cells and not bad and len(cells) <= place:
            bad = f"{len(cells)} columns, but the text is in column {place + 1}"
        if bad:
            yield Reject(path, f"line {lines.first or 1}", bad)
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
