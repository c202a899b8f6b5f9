"""Rows of another model's vocabulary for the pieces of our SentencePiece model.

BERT's WordPiece writes the beginning of a word plain and its continuation with "##"; SentencePiece marks the beginning
with "▁" and leaves the continuation plain. fairseq (XLM-R, BEiT-3) numbers SentencePiece's pieces from 4 after four
special ones of its own and puts the mask behind the last.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import sentencepiece
import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.tokenizers.text import (
    BOS_PIECE,
    EOS_PIECE,
    MASK_PIECE,
    PAD_PIECE,
    UNK_PIECE,
    TextTokenizer,
)

WORD_START = "▁"
NO_ROW = -1
BERT_SPECIAL = MappingProxyType(
    {
        BOS_PIECE: "[CLS]",
        EOS_PIECE: "[SEP]",
        PAD_PIECE: "[PAD]",
        UNK_PIECE: "[UNK]",
        MASK_PIECE: "[MASK]",
    }
)
# SentencePiece's own <unk>, <s>, </s> come first; what follows has one id more in fairseq.
FAIRSEQ_OFFSET = 1
FAIRSEQ_SPECIAL = MappingProxyType({BOS_PIECE: 0, PAD_PIECE: 1, EOS_PIECE: 2, UNK_PIECE: 3})


@dataclass(frozen=True)
class RowMap:
    """Which row of the source belongs to each of our pieces: NO_ROW for those `without` one."""

    rows: tuple[int, ...]
    without: tuple[str, ...] = ()

    @property
    def num_found(self) -> int:
        """Pieces that have a row."""
        return len(self.rows) - len(self.without)

    def check(self, num_rows: int, where: str) -> None:
        """Raises ConvertError if the source has fewer rows than the vocabulary file speaks of."""
        if max(self.rows, default=NO_ROW) >= num_rows:
            raise ConvertError(
                f"{where}: has {num_rows} rows, too few for the vocabulary that was given with it"
            )

    def place(self, table: Tensor, fresh: Tensor) -> Tensor:
        """Our table: rows of the source's ``[R, ...]`` where there are, else of a fresh one ``[V', ...]``.

        Rows beyond the vocabulary are included.
        """
        rows = torch.tensor(self.rows)
        found = rows >= 0
        result = fresh.clone()
        result[: len(rows)][found] = table[rows[found]]
        return result

    def summary(self) -> str:
        """Coverage in one line."""
        total = len(self.rows)
        line = f"{self.num_found} of {total} text pieces ({self.num_found / total:.1%}) have a row in the source"
        if not self.without:
            return line
        more = ", ..." if len(self.without) > 10 else ""
        return f"{line}; without one, at initial values: {' '.join(self.without[:10])}{more}"


def wordpiece_rows(tokenizer: TextTokenizer, vocabulary: Path) -> RowMap:
    """Rows of a WordPiece vocabulary, BERT's `vocab.txt` with a piece a line, for our pieces.

    A vocabulary without capital letters is of a tokenizer that lowers and strips accents: so are our pieces, to find
    their row. Punctuation never continues a word there.

    Raises:
        ConvertError: the file cannot be read or is no WordPiece vocabulary.
    """
    try:
        lines = vocabulary.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError):
        raise ConvertError(f"{vocabulary}: not a readable text file") from None
    pieces = lines[:-1] if lines[-1] == "" else lines
    numbers = {piece.rstrip("\r"): number for number, piece in enumerate(pieces)}
    missing = [piece for piece in BERT_SPECIAL.values() if piece not in numbers]
    if missing:
        raise ConvertError(
            f"{vocabulary}: has no line {', '.join(missing)}: not a WordPiece vocab.txt with a piece a line"
        )
    uncased = not any(p != p.lower() for p in numbers if not p.startswith("["))
    return _row_map(tokenizer, numbers, lambda p: BERT_SPECIAL.get(p) or _wordpiece(p, uncased))


def fairseq_rows(tokenizer: TextTokenizer, model: Path) -> RowMap:
    """Rows of a vocabulary in fairseq's order over another SentencePiece model (`beit3.spm`), for our pieces.

    Raises:
        ConvertError: the file is no SentencePiece model.
    """
    try:
        other = sentencepiece.SentencePieceProcessor(model_proto=model.read_bytes())
        size = int(other.get_piece_size())
        numbers: dict[str, int] = {
            other.id_to_piece(i): i + FAIRSEQ_OFFSET
            for i in range(size)
            if not (other.is_control(i) or other.is_unknown(i))
        }
    except (OSError, RuntimeError, UnicodeDecodeError):
        raise ConvertError(f"{model}: not a SentencePiece model") from None
    numbers |= {**FAIRSEQ_SPECIAL, MASK_PIECE: size + FAIRSEQ_OFFSET}
    return _row_map(tokenizer, numbers, lambda piece: piece)


def _wordpiece(piece: str, uncased: bool) -> str:
    """How WordPiece writes the piece; empty for the bare mark of a word's beginning."""
    start = piece.startswith(WORD_START)
    text = piece.removeprefix(WORD_START)
    if uncased:
        apart = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in apart if unicodedata.category(c) != "Mn")
    if not text:
        return ""
    alone = not any(c.isalnum() for c in text)
    return text if start or alone else f"##{text}"


def _row_map(
    tokenizer: TextTokenizer, numbers: Mapping[str, int], theirs: Callable[[str], str]
) -> RowMap:
    pieces = [tokenizer.piece(index) for index in range(tokenizer.size)]
    rows = tuple(numbers.get(theirs(piece), NO_ROW) for piece in pieces)
    return RowMap(rows, tuple(piece for piece, row in zip(pieces, rows) if row == NO_ROW))
