"""What an import is told, and what it reads off the shapes of the source."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import (
    DataConfig,
    ModelConfig,
    MoEConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vlmoe.convert.public import FamilyName
from megatron_vlmoe.convert.public.torch_files import PublicState
from megatron_vlmoe.convert.public.vocabulary import RowMap
from megatron_vlmoe.planning.validate import validate

HEAD_WIDTH = 64
DEFAULT_IMAGE_SIZE = 224
DEFAULT_VISUAL_VOCABULARY = 8192
SIZE_OPTIONS = (
    *("image_size", "text_length", "pair_text_length"),
    *("visual_vocab_size", "num_attention_heads", "topk"),
)


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """An import.

    Args:
        family: whose layout the source has.
        source: file, or folder of a DeepSpeed checkpoint.
        text_tokenizer: our SentencePiece model; None makes a model without text embedding and text head.
        source_vocab: the source's WordPiece `vocab.txt` (vlmo).
        source_spm: the source's SentencePiece model (beit3).
        same_vocabulary: rows of the source belong to the pieces of the tokenizer as they stand.
        image_size: of the new model; None keeps the source's where its positions tell it, else 224.
        text_length: of the new model.
        pair_text_length: of the new model.
        visual_vocab_size: image tokens of the new model; None is what the source's image head tells, else 8192.
        num_attention_heads: None is what the source tells, else heads of 64.
        num_vl_layers: blocks with a VL-FFN, where the source has none.
        attention: which attention of a model with one per modality is taken (beit3).
        text_ffn: T-FFN where the source has none: initial values, or a copy of its V-FFN (beit2).
        vl_ffn: VL-FFN where the source has none: initial values, or a copy of another FFN.
        source_pixels: which pixel mean and deviation the source was trained with (beit2).
        topk: experts per token of a model with experts.
        seed: of initial values.
        allow_pickle: see `read_torch`.
    """

    family: FamilyName
    source: Path
    text_tokenizer: Optional[Path] = None
    source_vocab: Optional[Path] = None
    source_spm: Optional[Path] = None
    same_vocabulary: bool = False
    image_size: Optional[int] = None
    text_length: int = 128
    pair_text_length: int = 128
    visual_vocab_size: Optional[int] = None
    num_attention_heads: Optional[int] = None
    num_vl_layers: int = 3
    attention: Literal["vision", "text", "mean"] = "vision"
    text_ffn: Literal["vision", "fresh"] = "fresh"
    vl_ffn: Literal["vision", "text", "fresh"] = "fresh"
    source_pixels: Literal["imagenet", "half"] = "imagenet"
    topk: int = 1
    seed: int = 1234
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        for name in SIZE_OPTIONS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConvertError(f"--{name.replace('_', '-')} {value}: must be positive")


@dataclass(frozen=True)
class Vocabulary:
    """The text vocabulary of the new model.

    Args:
        size: pieces; 0 for a model without text.
        rows: rows of the source for them; None where nothing says which belong to which.
    """

    size: int = 0
    rows: Optional[RowMap] = None


def run_config(options: ImportOptions, model: ModelConfig, moe: MoEConfig) -> RunConfig:
    """The configuration of a checkpoint with such a model.

    Raises:
        ConfigError: it cannot be.
    """
    config = RunConfig(
        model=model, moe=moe, data=DataConfig(), train=TrainConfig(seed=options.seed)
    )
    validate(config)
    return config


def common_sizes(
    options: ImportOptions,
    vocabulary: Vocabulary,
    source: PublicState,
    patch_weight: tuple[int, ...],
    source_size: int,
    heads: int = 0,
    image_head: str = "",
) -> ModelConfig:
    """What every family decides alike; the rest is filled in by the family.

    Args:
        options: of the import.
        vocabulary: of the new model.
        source: for messages.
        patch_weight: shape of the source's patch projection, ``[D, 3, P, P]``.
        source_size: image size of the source; 0 where it does not tell.
        heads: attention heads of the source; 0 where it does not tell.
        image_head: weight of the source's image head, ``[codes, D]``; it may be missing there.

    Raises:
        ConvertError: nothing tells the number of heads.
    """
    codes = DEFAULT_VISUAL_VOCABULARY
    if image_head in source.tensors:
        codes = source.shape(image_head, 2)[0]
    width, patch = patch_weight[0], patch_weight[-1]
    heads = options.num_attention_heads or heads
    if not heads and width % HEAD_WIDTH:
        raise ConvertError(
            f"{source.path}: does not tell its number of attention heads, and a width of {width} is no multiple of "
            f"{HEAD_WIDTH} (--num-attention-heads)"
        )
    return ModelConfig(
        hidden_size=width,
        num_attention_heads=heads or width // HEAD_WIDTH,
        patch_size=patch,
        image_size=options.image_size or source_size or DEFAULT_IMAGE_SIZE,
        text_length=options.text_length,
        pair_text_length=options.pair_text_length,
        vocab_size=vocabulary.size,
        visual_vocab_size=options.visual_vocab_size or codes,
    )


def count_blocks(source: PublicState, prefix: str) -> int:
    """Blocks of the source: names ``{prefix}{number}.*``.

    Raises:
        ConvertError: there is none.
    """
    pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
    numbers = {int(m[1]) for name in source.tensors if (m := pattern.match(name))}
    if not numbers:
        raise ConvertError(f"{source.path}: has no tensor {prefix}0.*")
    return max(numbers) + 1


def image_size_of_positions(num_rows: int, patch_size: int) -> int:
    """Image size of a table of [I_CLS] and square patches; 0 if they are not square."""
    side = math.isqrt(max(num_rows - 1, 0))
    return side * patch_size if side * side == num_rows - 1 else 0
