"""The text tokenizer: a SentencePiece model with five special pieces.

``<s>`` is the paper's [T_CLS] and ``</s>`` its [T_SEP]; ``[MASK]`` is the input of a masked position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from megatron_vlmoe.config.errors import DataError

BOS_PIECE = "<s>"
PAD_PIECE = "<pad>"
EOS_PIECE = "</s>"
UNK_PIECE = "<unk>"
MASK_PIECE = "[MASK]"
SPECIAL_PIECES = (BOS_PIECE, PAD_PIECE, EOS_PIECE, UNK_PIECE, MASK_PIECE)
"""Special pieces in the order of their ids in models that this package trains (0 to 4)."""


class TextTokenizer:
    """Text to piece ids and back; satisfies the ``vocab`` argument of ``data.masking.mask_tokens``.

    The object pickles as the model itself, so worker processes need no access to the file.

    Raises:
        ValueError: the file cannot be read, is no SentencePiece model, lacks a special piece, or
            holds one that plain text could spell.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = Path(model_path)
        try:
            self._model = self.model_path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot read text tokenizer {self.model_path}: {reason}") from error
        self._check_special_pieces()

    def __getstate__(self) -> dict[str, object]:
        return {"model_path": self.model_path, "_model": self._model}

    def __repr__(self) -> str:
        return f"TextTokenizer({str(self.model_path)!r}, size={self.size})"

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            # An empty proto would be taken for "no model given" and fail only at first use.
            if not self._model:
                raise RuntimeError("empty file")
            return sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise DataError(f"{self.model_path} is not a SentencePiece model") from error

    def _check_special_pieces(self) -> None:
        processor = self._processor
        missing = [p for p in SPECIAL_PIECES if self._find(p) is None]
        if missing:
            raise DataError(
                f"text tokenizer {self.model_path} has no piece {', '.join(missing)}: "
                "train it with tools/train_text_tokenizer.py"
            )
        if not processor.is_unknown(self.unk_id):
            raise DataError(
                f"text tokenizer {self.model_path}: {UNK_PIECE} is not its unknown piece"
            )
        # SentencePiece matches user-defined and normal pieces in raw text, control pieces never.
        spelled = [
            p for p in SPECIAL_PIECES if p != UNK_PIECE and not processor.is_control(self._id(p))
        ]
        if spelled:
            raise DataError(
                f"text tokenizer {self.model_path}: {', '.join(spelled)} must be control pieces, "
                "or plain text could spell special tokens"
            )

    def _find(self, piece: str) -> int | None:
        index = int(self._processor.piece_to_id(piece))
        # An absent piece maps to the unknown id.
        return index if self._processor.id_to_piece(index) == piece else None

    def _id(self, piece: str) -> int:
        index = self._find(piece)
        assert index is not None, piece
        return index

    @property
    def size(self) -> int:
        """Number of pieces in the file, special ones included."""
        return int(self._processor.get_piece_size())

    @cached_property
    def bos_id(self) -> int:
        """``<s>``, the paper's [T_CLS]."""
        return self._id(BOS_PIECE)

    @cached_property
    def pad_id(self) -> int:
        """``<pad>``."""
        return self._id(PAD_PIECE)

    @cached_property
    def eos_id(self) -> int:
        """``</s>``, the paper's [T_SEP]."""
        return self._id(EOS_PIECE)

    @cached_property
    def unk_id(self) -> int:
        """``<unk>``: stands for characters that the model does not know."""
        return self._id(UNK_PIECE)

    @cached_property
    def mask_id(self) -> int:
        """``[MASK]``."""
        return self._id(MASK_PIECE)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of the five special pieces."""
        return frozenset(self._id(piece) for piece in SPECIAL_PIECES)

    @cached_property
    def _words(self) -> frozenset[int]:
        """Pieces with a letter or digit in them, special ones apart."""
        pieces = (i for i in range(self.size) if any(map(str.isalnum, self.piece(i))))
        return frozenset(pieces) - self.special_ids

    def is_unknown(self, ids: Sequence[int]) -> bool:
        """Whether a text has unknown characters and no known letter or digit beside them.

        SentencePiece gives the spaces and punctuation of such a text as known pieces.
        """
        return self.unk_id in ids and self._words.isdisjoint(ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hex: datasets record it, training compares it."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Piece ids of ``text``, no special pieces added.

        Text that spells a special piece ("[MASK]", "<s>") becomes ordinary pieces; only
        characters unknown to the model give a special id, that of ``<unk>``.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of every text, on ``num_threads`` threads.

        Raises:
            ValueError: a text holds an unpaired surrogate.
        """
        try:
            ids: list[list[int]] = self._processor.encode(
                list(texts), out_type=int, num_threads=num_threads
            )
        except (TypeError, UnicodeEncodeError):
            # The binding reports half of a surrogate pair as a wrong type, without saying where.
            for text in texts:
                _check_unicode(text)
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control pieces give nothing, ``<unk>`` gives U+2047.

        Raises:
            ValueError: an id is not in 0..size-1.
        """
        checked = [int(i) for i in ids]
        if bad := [i for i in checked if not 0 <= i < self.size]:
            raise ValueError(f"token id {bad[0]} is not in 0..{self.size - 1} ({self.model_path})")
        return str(self._processor.decode(checked))

    def piece(self, index: int) -> str:
        """The piece with id ``index``, as it is written in the model ("▁" marks a word start)."""
        return str(self._processor.id_to_piece(int(index)))


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text is not valid Unicode: {text!a:.80}") from error
    except AttributeError as error:
        raise TypeError(f"text must be str, got {type(text).__name__}") from error
