"""Texts to train a tokenizer on: corpora of text, and captions in their publishers' files.

Captions come without their images, so that no picture need be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.prepare.readers.delimited import read_column
from megatron_vlmoe.prepare.readers.file_kinds import file_kind
from megatron_vlmoe.prepare.readers.pairs import PairInput, as_captions, find_key
from megatron_vlmoe.prepare.readers.parquet import column_names, read_columns
from megatron_vlmoe.prepare.readers.records import CaptionedImage, Reject, check_inputs
from megatron_vlmoe.prepare.readers.text import (
    TextInput,
    block_texts,
    has_keys,
    json_rows,
    read_json,
    read_text,
)
from megatron_vlmoe.prepare.readers.webdataset import read_webdataset

_KEYS = ("text", "caption", "captions")
_COLUMNS = (*_KEYS, "title", "comment")
"""The same for .csv and .tsv: open_clip says title, Flickr30k comment."""

_BATCH_ROWS = 256

Found = Iterator[tuple[str, object] | Reject]
"""Name of a record and its text or texts as parsed."""


def read_training_texts(
    paths: Sequence[str], text_key: str | None = None
) -> Iterator[str | Reject]:
    """Yields the texts of all files in order; empty ones are passed over.

    Reads what `read_text` does, and captions: COCO, Karpathy, Visual Genome, lists of [path,
    caption] (CC3M, SBU), SBU's own file, JSON lines, lists and tables with a key or column of
    captions, CC3M's .tsv and Flickr30k's .token, tars of WebDataset.

    Args:
        paths: files of any of these kinds.
        text_key: JSON key or column of the text or texts; None: the usual ones.

    Raises:
        DataError: a file is missing, unreadable, of another kind, or without any text.
    """
    check_inputs(tuple(paths))
    keys = (text_key,) if text_key else _KEYS
    for path in paths:
        some = False
        for item in _found(path, keys, text_key):
            if isinstance(item, Reject):
                yield item
                continue
            record, value = item
            for text in as_captions(value):
                checked = _checked(path, record, text)
                if checked:
                    some = some or isinstance(checked, str)
                    yield checked
        if not some:
            raise DataError(f"{path} holds no text")


def _checked(path: str, record: str, value: object) -> str | Reject:
    """A text, or what is wrong with it; an empty string for none."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")
            return value
    except UnicodeDecodeError as error:
        return Reject(path, record, f"invalid UTF-8 at byte {error.start}")
    except UnicodeEncodeError:
        return Reject(path, record, "invalid Unicode")
    return "" if value is None else Reject(path, record, "not a string")


def _found(path: str, keys: tuple[str, ...], text_key: str | None) -> Found:
    kind = file_kind(path)
    if kind == "table":
        yield from _table_texts(path, keys)
    elif kind == "json":
        yield from json_texts(path, read_json(path), keys)
    elif kind == "jsonl":
        yield from _line_texts(path, keys)
    elif kind == "delimited":
        columns = (text_key,) if text_key else _COLUMNS
        for cell in read_column(path, columns, captions=True):
            yield cell if isinstance(cell, Reject) else (f"line {cell[0]}", cell[1])
    elif kind == "tar":
        for pair in read_webdataset(PairInput("webdataset", (path,), caption_key=text_key)):
            if isinstance(pair, CaptionedImage):
                yield pair.record, pair.captions
            elif isinstance(pair, Reject):
                yield pair
    else:
        for block in read_text(TextInput((path,), "text")):
            if isinstance(block, Reject):
                yield block
                continue
            texts, bad = block_texts(block)
            yield from ((f"line {one.number}", one.text) for one in texts)
            yield from (Reject(path, f"line {number}", reason) for number, reason in bad)


def _table_texts(path: str, keys: tuple[str, ...]) -> Found:
    names = column_names(path)
    key = find_key(dict.fromkeys(names), None, keys)
    if key is None:
        raise DataError(
            f"{path}: no column {' or '.join(keys)}{has_keys(names)}: name it with --text-key"
        )
    for first, batch in read_columns(path, {key: "any"}, _BATCH_ROWS):
        if isinstance(batch, Reject):
            yield batch
        else:
            yield from ((f"row {row}", value) for row, value in enumerate(batch[key], first))


def _line_texts(path: str, keys: tuple[str, ...]) -> Found:
    """An object per line; a file of captions may be one object on one line."""
    for item in json_rows(path):
        if isinstance(item, Reject):
            yield item
            continue
        number, row = item
        key = find_key(row, None, keys)
        if key is not None:
            yield f"line {number}", row[key]
        elif isinstance(row.get("annotations") or row.get("images"), list):
            yield from json_texts(path, row, keys)
        else:
            yield Reject(path, f"line {number}", f"no key {' or '.join(keys)}{has_keys(row)}")


def json_texts(path: str, value: object, keys: tuple[str, ...]) -> Found:
    """The texts of a file that is one JSON value.

    Raises:
        DataError: an object of no known layout.
    """
    if isinstance(value, list):
        for number, entry in enumerate(value):
            texts = _texts_of_entry(entry, keys)
            if texts is None:
                reason = f"neither [path, caption] nor an object with {' or '.join(keys)}"
                yield Reject(path, f"entry {number}", reason)
            else:
                yield f"entry {number}", texts
        return
    assert isinstance(value, dict)
    for name in ("annotations", "images"):  # COCO has both, Karpathy's splits the second alone
        if isinstance(value.get(name), list):
            for item in json_texts(path, value[name], keys):
                if isinstance(item, Reject):
                    yield Reject(path, f'"{name}", {item.record}', "no caption")
                else:
                    yield f'"{name}", {item[0]}', item[1]
            return
    key = find_key(value, None, keys)  # SBU's own file has all captions in one list
    if key is None:
        raise DataError(f"{path}: no captions of a known layout{has_keys(value)}")
    yield f'"{key}"', value[key]


def _texts_of_entry(entry: object, keys: tuple[str, ...]) -> object:
    """The text or texts of one entry of a list; None if there are none."""
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        return entry[1] if len(entry) == 2 and isinstance(entry[0], str) else None
    if not isinstance(entry, dict):
        return None
    # Visual Genome's regions and Karpathy's sentences are lists of objects.
    for name, inner in (("regions", "phrase"), ("sentences", "raw")):
        if isinstance(entry.get(name), list):
            return tuple(e.get(inner) if isinstance(e, dict) else e for e in entry[name])
    key = find_key(entry, None, keys)
    return None if key is None else entry[key]
