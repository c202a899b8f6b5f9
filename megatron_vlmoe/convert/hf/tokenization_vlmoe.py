"""Tokenizer of VL-MoE: the ids of a SentencePiece model as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import sentencepiece
from transformers import AddedToken, PreTrainedTokenizer

VOCAB_FILES_NAMES = {"vocab_file": "sentencepiece.model"}


class VLMoETokenizer(PreTrainedTokenizer):
    """SentencePiece tokenizer with the five special pieces of the model file.

    A text becomes ``<s> A </s>``, two become ``<s> A </s> B </s>``. Text that spells a special token, for instance
    "[MASK]", is that token. Space around a text does not count.

    Args:
        vocab_file: SentencePiece model.
        bos_token: first token of every text; this and the other special tokens must be pieces of the model.
        eos_token: ends every text.
        unk_token: stands for characters that the model does not know.
        pad_token: fills up shorter texts.
        mask_token: stands for a token that is to be predicted.
        **kwargs: see [`PreTrainedTokenizer`], for instance `model_max_length`.

    Raises:
        ValueError: the model lacks a special token.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        bos_token: Union[str, AddedToken] = "<s>",
        eos_token: Union[str, AddedToken] = "</s>",
        unk_token: Union[str, AddedToken] = "<unk>",
        pad_token: Union[str, AddedToken] = "<pad>",
        mask_token: Union[str, AddedToken] = "[MASK]",
        **kwargs: Any,
    ) -> None:
        self.vocab_file = str(vocab_file)
        self.sp_model = sentencepiece.SentencePieceProcessor(model_file=self.vocab_file)
        special = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            "unk_token": unk_token,
            "pad_token": pad_token,
            "mask_token": mask_token,
        }
        for name, token in special.items():
            piece = str(token)
            if self.sp_model.id_to_piece(self.sp_model.piece_to_id(piece)) != piece:
                raise ValueError(f"{name}={piece!r} is no piece of {self.vocab_file}")
        kwargs.setdefault("cls_token", bos_token)
        kwargs.setdefault("sep_token", eos_token)
        super().__init__(**special, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Pieces of the model."""
        return int(self.sp_model.get_piece_size())

    def get_vocab(self) -> dict[str, int]:
        """Ids of all pieces and added tokens."""
        vocab = {self.sp_model.id_to_piece(index): index for index in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # Space around a text does not count in training; around a special token it is implied.
        # By way of ids: what is unknown is so, even if its characters spell a piece.
        return [self.sp_model.id_to_piece(index) for index in self.sp_model.encode(text.strip())]

    def _convert_token_to_id(self, token: str) -> int:
        return int(self.sp_model.piece_to_id(token))

    def _convert_id_to_token(self, index: int) -> str:
        return str(self.sp_model.id_to_piece(index))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; special tokens stand apart, and unknown characters are U+2047."""
        known = {*self.all_special_tokens, *self.get_added_vocab()} - {str(self.unk_token)}
        parts: list[str] = []
        pieces: list[str] = []
        for token in tokens:
            if token in known:
                parts += [self.sp_model.decode_pieces(pieces), token]
                pieces = []
            else:
                pieces.append(token)
        parts.append(self.sp_model.decode_pieces(pieces))
        return " ".join(part for part in parts if part)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None
    ) -> list[int]:
        """``<s> A </s>``, or ``<s> A </s> B </s>``."""
        ids = [self.bos_token_id, *token_ids_0, self.eos_token_id]
        return ids if token_ids_1 is None else [*ids, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: Optional[list[int]] = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for tokens that `build_inputs_with_special_tokens` adds, 0 for those of the text."""
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        mask = [1, *([0] * len(token_ids_0)), 1]
        return mask if token_ids_1 is None else [*mask, *([0] * len(token_ids_1)), 1]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None
    ) -> list[int]:
        """Zeros: the model does not tell the two texts apart but by ``</s>``."""
        return [0] * len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: Optional[list[int]] = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: Any = "longest_first",
        stride: int = 0,
    ) -> tuple[list[int], Optional[list[int]], list[int]]:
        """Shortens texts; of two, the longer one first and the first one where they are equal, as in training."""
        strategy = getattr(truncation_strategy, "value", truncation_strategy)
        if pair_ids is None or strategy != "longest_first":
            return super().truncate_sequences(
                ids, pair_ids, num_tokens_to_remove, truncation_strategy, stride
            )
        lengths = [len(ids), len(pair_ids)]
        for _ in range(min(num_tokens_to_remove, sum(lengths))):
            lengths[lengths.index(max(lengths))] -= 1
        if self.truncation_side == "left":
            return ids[len(ids) - lengths[0] :], pair_ids[len(pair_ids) - lengths[1] :], []
        return ids[: lengths[0]], pair_ids[: lengths[1]], []

    def save_vocabulary(
        self, save_directory: str, filename_prefix: Optional[str] = None
    ) -> tuple[str]:
        """Writes the SentencePiece model into a folder."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / f"{prefix}{VOCAB_FILES_NAMES['vocab_file']}"
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)


__all__ = ["VLMoETokenizer"]
