"""Options of benchmarks, apart from what needs torch."""

from __future__ import annotations

import os
import typing
from dataclasses import dataclass
from typing import Any, Literal

from megatron_vlmoe.config.errors import ConfigError

ExportContender = Literal[
    "ours",
    "ours_eager",
    "ours_batched_mm",
    "transformers_eager",
    "transformers_grouped_mm",
    "transformers_batched_mm",
]
"""Experts of the Hugging Face model: ours as a user gets them, the others by `experts_implementation`, and those that
models of transformers have."""


_MOST = 10**12
_LONGEST_SIDE = 65_500
"""Pixels of a JPEG."""


def _require(options: Any, **least: int) -> None:
    """Raises ConfigError for a number below what its option allows, or without reason, one of several too."""
    for name, number in least.items():
        values = getattr(options, name)
        most = _LONGEST_SIDE if name in ("width", "height") else _MOST
        for value in values if isinstance(values, tuple) else (values,):
            option = name.replace("_", "-")
            # Not a number is no number of seconds either.
            if not value >= number:
                raise ConfigError(f"--{option} {value}: must be at least {number}")
            if value > most:
                raise ConfigError(f"--{option} {value}: must be at most {most}")


@dataclass(frozen=True)
class DataOptions:
    """What is measured.

    Args:
        images: distinct JPEGs.
        width: of each, in pixels.
        height: of each, in pixels.
        size: side of the pixels that a model gets.
        batch: images of a micro-batch.
        color_jitter: strengths, one case each; none leaves out the speed.
        documents: sizes of the generated text datasets, one case each; none leaves out the memory.
        workers: loader processes where memory is measured.
        texts: packed texts of a micro-batch there.
        micro_batches: how many each worker makes there.
        rounds: turns of each contender.
        turn_seconds: length of a turn.
        clock: `wall`, or `cpu`: processor seconds, for a machine that others use too.

    Raises:
        ConfigError: numbers that are no work, named as options of `vlmoe bench data`.
    """

    images: int = 256
    width: int = 500
    height: int = 375
    size: int = 224
    batch: int = 64
    color_jitter: tuple[float, ...] = (0.0, 0.4)
    documents: tuple[int, ...] = (10_000_000, 1_000_000_000)
    workers: int = 2
    texts: int = 64
    micro_batches: int = 4
    rounds: int = 5
    turn_seconds: float = 2.0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        sizes = dict(images=1, width=1, height=1, size=1, batch=1, texts=1, micro_batches=1)
        _require(self, **sizes, color_jitter=0, documents=1, workers=1, rounds=1, turn_seconds=0)
        if not self.color_jitter and not self.documents:
            raise ConfigError("nothing to measure: --color-jitter and --documents are both empty")


@dataclass(frozen=True)
class PreprocessOptions:
    """What is measured.

    Args:
        texts: lines of JSON; 0 leaves out texts.
        words: mean words of each.
        vocab_size: pieces of the tokenizer, which is trained on the texts.
        images: JPEG files; 0 leaves out images and pairs.
        width: of each, in pixels.
        height: of each, in pixels.
        captions: of each image of the pairs.
        resize_short: shorter sides that images are shrunk to, one case each; 0 keeps them.
        rounds: turns of each contender.
        turn_seconds: length of a turn.
        clock: `wall`, or `cpu`: processor seconds, for a machine that others use too.

    Raises:
        ConfigError: numbers that are no work, named as options of `vlmoe bench preprocess`.
    """

    texts: int = 20_000
    words: int = 150
    vocab_size: int = 8000
    images: int = 1000
    width: int = 500
    height: int = 375
    captions: int = 5
    resize_short: tuple[int, ...] = (0, 256)
    rounds: int = 5
    turn_seconds: float = 2.0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        sizes = dict(texts=0, words=1, vocab_size=6, images=0, width=1, height=1, captions=1)
        _require(self, **sizes, resize_short=0, rounds=1, turn_seconds=0)
        if not self.texts and not self.images:
            raise ConfigError("nothing to measure: --texts and --images are both 0")


@dataclass(frozen=True)
class CheckpointOptions:
    """What is measured.

    Args:
        preset: models, one case each.
        words: more options of `pretrain` for each; on the command line they stand as they are.
        vocab_size: rows of the text head.
        visual_vocab_size: rows of the image head.
        folder: where checkpoints are written; empty for the system's folder for temporary files.
        step_seconds: arithmetic between a background save and the next update, as a forward and backward pass is.
        rounds: turns of each contender.
        turn_seconds: length of a turn.

    Raises:
        ConfigError: numbers that are no work, named as options of `vlmoe bench checkpoint`.
    """

    preset: tuple[str, ...] = ("small-8e",)
    words: tuple[str, ...] = ()
    vocab_size: int = 64_000
    visual_vocab_size: int = 8_192
    folder: str = ""
    step_seconds: float = 4.0
    rounds: int = 5
    turn_seconds: float = 2.0

    def __post_init__(self) -> None:
        _require(self, vocab_size=1, visual_vocab_size=1)
        _require(self, step_seconds=0, rounds=1, turn_seconds=0)
        if not self.preset:
            raise ConfigError("nothing to measure: --preset names none")
        if self.folder and not os.path.isdir(self.folder):
            raise ConfigError(f"--folder {self.folder}: no such folder")


@dataclass(frozen=True)
class ScalingOptions:
    """What is measured.

    Args:
        axis: what is varied, one after the other; the rest stays as it is. Of a layer, experts and tokens.
        work: a training step, or one layer of experts forward and backward.
        size: of the presets.
        experts: of each modality, one case each.
        samples: texts, images and pairs of a step, of every rank, one case each; of a layer texts of 128 tokens.
        lengths: tokens of a text, one case each: texts alone, in all as many tokens as `base_samples` of the longest.
        ranks: processes, one case each, which torchrun starts.
        base_experts: where experts are not varied.
        base_samples: where tokens are not varied.
        layout: `data` gives every rank all experts, `expert` spreads them over the ranks.
        dispatcher: of tokens to experts.
        precision: of the arithmetic.
        vocab_size: rows of the text head.
        visual_vocab_size: rows of the image head.
        rounds: turns of each contender.
        steps: measured steps of a turn, after one to warm up.

    Raises:
        ConfigError: a number below 1.
    """

    axis: tuple[Literal["experts", "tokens", "sequence", "ranks"], ...] = (
        "experts",
        "tokens",
        "sequence",
        "ranks",
    )
    work: Literal["step", "layer"] = "step"
    size: Literal["tiny", "small", "base", "large"] = "small"
    experts: tuple[int, ...] = (4, 8, 16, 32)
    samples: tuple[int, ...] = (4, 8, 16, 32)
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    ranks: tuple[int, ...] = (1, 2)
    base_experts: int = 8
    base_samples: int = 8
    layout: Literal["data", "expert"] = "data"
    dispatcher: Literal["fixed_capacity", "alltoall", "dropless"] = "fixed_capacity"
    precision: Literal["fp32", "bf16"] = "fp32"
    vocab_size: int = 64_000
    visual_vocab_size: int = 8_192
    rounds: int = 3
    steps: int = 1

    def __post_init__(self) -> None:
        if self.work == "layer" and self.axis == ScalingOptions.axis:
            object.__setattr__(self, "axis", ("experts", "tokens"))
        _require(self, experts=1, samples=1, lengths=1, ranks=1, base_experts=1, base_samples=1)
        _require(self, vocab_size=1, visual_vocab_size=1, rounds=1, steps=1)


@dataclass(frozen=True)
class ExportOptions:
    """What is measured.

    Args:
        size: of the presets, whose model it is.
        experts: of every pool, one case each.
        topk: experts per token, one case each.
        inputs: what the model reads, one case each; none leaves out the batches.
        batch: samples at once, one case each.
        short_text: tokens of a single text, one more case; 0 leaves it out.
        contenders: with experts; dense is always there.
        precision: of the weights.
        rounds: turns of each contender.
        turn_seconds: length of a turn.
        clock: `wall`, or `cpu`: processor seconds, for a machine that others use too.

    Raises:
        ConfigError: numbers that fit no model or are no work, named as options of `vlmoe bench export`.
    """

    size: Literal["tiny", "small", "base", "large"] = "small"
    experts: tuple[int, ...] = (8,)
    topk: tuple[int, ...] = (1, 2)
    inputs: tuple[Literal["texts", "images", "pairs"], ...] = ("images",)
    batch: tuple[int, ...] = (1, 8, 64)
    short_text: int = 16
    contenders: tuple[ExportContender, ...] = typing.get_args(ExportContender)
    precision: Literal["fp32", "bf16"] = "fp32"
    rounds: int = 5
    turn_seconds: float = 1.0
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        _require(self, experts=2, topk=1, batch=1, short_text=0, rounds=1, turn_seconds=0)
        if self.experts and max(self.topk, default=1) > min(self.experts):
            raise ConfigError(f"--topk {max(self.topk)} is more than --experts {min(self.experts)}")
