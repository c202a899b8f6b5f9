"""What an import is told, what it reads off the shapes of the source, and which tensors of it make which of ours.

All is planned by names and shapes before a value is read; a report says what became of every tensor of either side.

Letters: D width, P patch side, N patches, F inner width of an FFN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.schema import DataConfig, ModelConfig, MoEConfig, RunConfig, TrainConfig
from megatron_vlmoe.convert.name_table import FusedQkv, VocabularyRows
from megatron_vlmoe.convert.public import FamilyName
from megatron_vlmoe.convert.public.torch_files import PublicState, some
from megatron_vlmoe.convert.public.vocabulary import RowMap
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.model.initial_values import (
    IMAGE_POSITIONS,
    TEXT_POSITIONS,
    full_initial_value,
    resize_image_positions,
    resize_text_positions,
)
from megatron_vlmoe.planning.parameters import Shape, checkpoint_shapes
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


def run_config(
    source: PublicState,
    options: ImportOptions,
    vocab_size: int,
    patch_weight: str,
    image_size: int,
    heads: int = 0,
    image_head: str = "",
    moe: Optional[MoEConfig] = None,
    **sizes: Any,
) -> RunConfig:
    """The configuration of a checkpoint with the model of a source.

    Args:
        source: its tensors.
        options: of the import.
        vocab_size: pieces of the new model's text tokenizer.
        patch_weight: the source's patch projection, ``[D, 3, P, P]``.
        image_size: of the source; 0 where it does not tell.
        heads: attention heads of the source; 0 where it does not tell.
        image_head: weight of the source's image head, ``[codes, D]``; it may be missing there.
        moe: routing of its experts.
        **sizes: what only the family knows.

    Raises:
        ConvertError: nothing tells the number of heads.
        ConfigError: there is no such model.
    """
    codes = DEFAULT_VISUAL_VOCABULARY
    if image_head in source.tensors:
        codes = source.shape(image_head, 2)[0]
    width, _, _, patch = source.shape(patch_weight, 4)
    heads = options.num_attention_heads or heads
    if not heads and width % HEAD_WIDTH:
        raise ConvertError(
            f"{source.path}: does not tell its number of attention heads, and a width of {width} is no multiple of "
            f"{HEAD_WIDTH} (--num-attention-heads)"
        )
    model = ModelConfig(
        hidden_size=width,
        num_attention_heads=heads or width // HEAD_WIDTH,
        patch_size=patch,
        image_size=options.image_size or image_size or DEFAULT_IMAGE_SIZE,
        text_length=options.text_length,
        pair_text_length=options.pair_text_length,
        vocab_size=vocab_size,
        visual_vocab_size=options.visual_vocab_size or codes,
        **sizes,
    )
    train = TrainConfig(seed=options.seed)
    config = RunConfig(model=model, moe=moe or MoEConfig(), data=DataConfig(), train=train)
    validate(config)
    return config


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


@dataclass(frozen=True)
class Taken:
    """A tensor of the new checkpoint, the ones of the source that it is made of, and how; empty if values only move."""

    ours: str
    sources: tuple[str, ...]
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A tensor of the source that is not used, and what that means; `known` if the importer expects it."""

    name: str
    shape: Shape
    why: str
    known: bool = True


@dataclass(frozen=True)
class New:
    """A tensor of the new checkpoint without a counterpart in the source: its key, its shape, and its values."""

    ours: str
    shape: Shape
    how: str


@dataclass(frozen=True)
class ImportReport:
    """The fate of every tensor on both sides.

    Args:
        source: file or folder.
        what: which model it is, in a few words.
        taken: used as they are (rows may be reordered, axes added).
        adapted: used after a change of values.
        remarks: what a reader must know besides.
    """

    source: str
    what: str
    taken: tuple[Taken, ...]
    adapted: tuple[Taken, ...]
    left: tuple[Left, ...]
    new: tuple[New, ...]
    remarks: tuple[str, ...] = ()

    @property
    def unknown(self) -> tuple[Left, ...]:
        """Tensors of the source that the importer does not know."""
        return tuple(left for left in self.left if not left.known)

    def lines(self) -> list[str]:
        """For people: counts, and one line per kind of change, loss or addition."""
        lines = [f"{self.source}: {self.what}", f"taken as they are: {len(self.taken)} tensors"]
        for title, told in (
            ("adapted", [(entry.how, entry.ours) for entry in self.adapted]),
            ("left", [(entry.why, entry.name) for entry in self.left]),
            ("new", [(entry.how, entry.ours) for entry in self.new]),
        ):
            lines.append(f"{title}: {len(told)} tensors")
            # By what is said, in the order in which it is said first.
            order = {text: index for index, (text, _) in reversed(list(enumerate(told)))}
            ordered = sorted(told, key=lambda entry: order[entry[0]])
            for text, group in groupby(ordered, key=lambda entry: entry[0]):
                lines.append(f"  {some([name for _, name in group], 3)}: {text}")
        return lines + [f"note: {remark}" for remark in self.remarks]

    def to_json(self) -> str:
        """Everything, as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


Make = Callable[[Sequence[Tensor]], Tensor]
LINEAR = ("weight", "bias")
NO_ABSOLUTE = "the source has no absolute positions"


class Planner:
    """Decides what every tensor of a checkpoint is made of; `tensors` and `report` are its result.

    What nothing was decided for has initial values here, and is left there.

    Args:
        source: what is imported.
        config: of the checkpoint that is made.
        options: of the import.
        rows: rows of the source for our text pieces; None where nothing says which belong to which.
    """

    def __init__(
        self,
        source: PublicState,
        config: RunConfig,
        options: ImportOptions,
        rows: Optional[RowMap] = None,
    ) -> None:
        self.source = source
        self.config = config
        self.model = config.model
        self.options = options
        self.rows = rows
        self.shapes = checkpoint_shapes(config)
        self.remarks: list[str] = []
        self.measures: list[Callable[[], str]] = []
        """Remarks that need the values of tensors, made when the report is."""
        self._made: dict[str, tuple[Taken, Make]] = {}
        self._known: list[tuple[re.Pattern[str], str]] = []

    def wants(self, ours: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return ours in self.shapes

    def has(self, *names: str) -> bool:
        """Whether the source has all these tensors."""
        return all(name in self.source.tensors for name in names)

    def initial(self, ours: str) -> Tensor:
        """Initial values of a tensor."""
        return full_initial_value(ours, self.shapes[ours], self.model, self.config.train.seed)

    def take(
        self,
        ours: str,
        *names: str,
        make: Make = lambda tensors: tensors[0],
        how: str = "",
        planned: Optional[Shape] = None,
    ) -> None:
        """Makes a tensor from tensors of the source.

        Args:
            ours: key of the tensor.
            *names: tensors of the source.
            make: makes it from them, in fp32.
            how: what changes besides the place of values; empty if nothing does.
            planned: shape of the result, where `make` cannot be tried on shapes alone.

        Raises:
            ConvertError: a tensor is missing there, or the result does not fit.
        """
        shapes = [self.source.shape(name) for name in names]
        if planned is None:
            try:
                planned = tuple(make([torch.empty(s, device="meta") for s in shapes]).shape)
            except (RuntimeError, ValueError, IndexError):
                # They do not go together.
                planned = ()
        if planned != self.shapes[ours]:
            listed = ", ".join(f"{name} {list(shape)}" for name, shape in zip(names, shapes))
            raise ConvertError(
                f"{self.source.path}: {listed} cannot become {ours} {list(self.shapes[ours])}"
            )
        self._made[ours] = Taken(ours, names, how), make

    def zero(self, ours: str, why: str) -> None:
        """Starts a tensor at zero instead of at initial values."""
        shape = self.shapes[ours]
        self._made[ours] = Taken(ours, (), f"zero: {why}"), lambda _: torch.zeros(shape)

    def leave(self, why: str, *patterns: str) -> None:
        """Says what it means that tensors of the source are left, if they are; patterns are of whole names."""
        self._known += [(re.compile(pattern), why) for pattern in patterns]

    def take_pair(self, ours: str, theirs: str, how: str = "") -> None:
        """Weight and bias of a linear layer or a LayerNorm."""
        for end in LINEAR:
            self.take(f"{ours}.{end}", f"{theirs}.{end}", how=how)

    def take_row(self, ours: str, theirs: str, row: int = 0, how: str = "") -> None:
        """One row ``[1, D]`` of a table ``[..., R, D]``."""
        self.take(ours, theirs, make=lambda t: t[0].flatten(0, -2)[row : row + 1], how=how)

    def take_patches(
        self, theirs: str, mean: Sequence[float] = (), std: Sequence[float] = ()
    ) -> None:
        """The patch projection of a convolution ``[D, 3, P, P]``.

        With the pixel mean and deviation of its training, where they are not ours: ``(p - m) / s`` is a linear function
        of ``(p - 0.5) / 0.5``, so weight and bias take it up exactly.
        """
        data = self.config.data
        scale = torch.tensor([ours / their for ours, their in zip(data.pixel_std, std)])
        changes = [(o - m) / s for o, m, s in zip(data.pixel_mean, mean, std)]
        shift = torch.tensor(changes)

        def weight(tensors: Sequence[Tensor]) -> Tensor:
            kernel = tensors[0]
            if kernel.dim() != 4 or kernel.shape[1] != 3:
                raise ValueError("not a convolution of three channels")
            if changes:
                kernel = kernel * scale.to(kernel.device)[:, None, None]
            return kernel.flatten(1)

        def bias(tensors: Sequence[Tensor]) -> Tensor:
            kernel, start = tensors
            return start + kernel.sum(dim=(2, 3)) @ shift.to(kernel.device)

        names = (f"{theirs}.weight", f"{theirs}.bias")
        if not changes:
            self.take("embedding.image.weight", names[0], make=weight)
            self.take("embedding.image.bias", names[1])
            return
        how = f"takes up the pixel mean {list(mean)} and deviation {list(std)} of its training (exact)"
        self.take("embedding.image.weight", names[0], make=weight, how=how)
        self.take("embedding.image.bias", *names, make=bias, how=how)

    def take_image_positions(self, theirs: str, first: int = 0) -> None:
        """Positions ``[..., first + 1 + N, D]`` of [I_CLS] and patches, fitted to the image size; zero without."""
        if not self.has(theirs):
            self.zero(IMAGE_POSITIONS, NO_ABSOLUTE)
            return
        wanted = self.model.num_patches
        rows = self.source.shape(theirs)[-2] - first

        def make(tensors: Sequence[Tensor]) -> Tensor:
            return resize_image_positions(tensors[0].flatten(0, -2)[first:], wanted)

        how = "" if rows == wanted + 1 else f"{rows} positions resized bicubically to {wanted + 1}"
        self.take(IMAGE_POSITIONS, theirs, make=make, how=how)

    def take_text_positions(self, theirs: str, first: int = 0) -> None:
        """Positions ``[first + R, D]`` of text, cut off or continued with initial values."""
        count, width = self.source.shape(theirs, 2)

        def make(tensors: Sequence[Tensor]) -> Tensor:
            return resize_text_positions(tensors[0][first:], self.initial(TEXT_POSITIONS))

        planned = (self.shapes[TEXT_POSITIONS][0], width)
        how = self.text_position_change(count - first)
        self.take(TEXT_POSITIONS, theirs, make=make, how=how, planned=planned)

    def text_position_change(self, rows: int) -> str:
        """What fitting a table of so many text positions does; empty if nothing."""
        wanted = self.shapes[TEXT_POSITIONS][0]
        if rows == wanted:
            return ""
        if rows > wanted:
            return f"the first {wanted} of {rows} positions"
        return f"{rows} positions, the others up to {wanted} at initial values"

    def take_attention(self, number: int, theirs: str) -> None:
        """LayerNorm, attention and LayerScale of block `number` (from 0) in BEiT's layout."""
        ours, attention = f"decoder.layers.{number}", f"{theirs}.attn"
        qkv, bias = f"{ours}.self_attention.linear_qkv", FusedQkv(("q", "v"))
        self.take_pair(f"{ours}.input_layernorm", f"{theirs}.norm1")
        self.take(
            f"{qkv}.weight",
            f"{attention}.qkv.weight",
            make=lambda tensors: FusedQkv().join(tensors[0].chunk(3), self.model),
        )
        self.take(
            f"{qkv}.bias",
            *(f"{attention}.q_bias", f"{attention}.v_bias"),
            make=lambda tensors: bias.join(tensors, self.model),
        )
        self.take_pair(f"{ours}.self_attention.linear_proj", f"{attention}.proj")
        for name in ("gamma_1", "gamma_2"):
            if self.wants(f"{ours}.{name}"):
                self.take(f"{ours}.{name}", f"{theirs}.{name}")

    def take_branch(self, number: int, branch: str, norm: str, mlp: str, how: str = "") -> None:
        """LayerNorm and dense FFN of a branch of block `number` (from 0)."""
        ours = f"decoder.layers.{number}.mlp.{branch}"
        self.take_pair(f"{ours}_norm", norm, how)
        for name in ("fc1", "fc2"):
            self.take_pair(f"{ours}_ffn.linear_{name}", f"{mlp}.{name}", how)

    def take_vocabulary(self, ours: str, theirs: str, rows: RowMap) -> None:
        """A table ``[R, ...]`` of the source as ours, piece by piece; pieces without a row have initial values."""
        shape = self.source.shape(theirs, len(self.shapes[ours]))
        rows.check(shape[0], f"{self.source.path}: {theirs}")

        def make(tensors: Sequence[Tensor]) -> Tensor:
            return rows.place(tensors[0], self.initial(ours))

        how = f"{rows.num_found} of {len(rows.rows)} rows, the others new" if rows.without else ""
        self.take(ours, theirs, make=make, how=how, planned=(self.shapes[ours][0], *shape[1:]))

    def take_image_head(self, theirs: str) -> None:
        """The image head ``[V, D]``, if any, filled up to whole multiples of 128 rows; left if its codes are others."""
        if not self.has(f"{theirs}.weight"):
            return
        codes = self.source.shape(f"{theirs}.weight")[0]
        if codes != self.model.visual_vocab_size:
            why = f"predicts {codes} image tokens, the new model has {self.model.visual_vocab_size}"
            self.leave(why, rf"{theirs}\.(weight|bias)")
            return
        rows = VocabularyRows("visual_vocab_size")
        for end in LINEAR:
            ours = f"heads.image.linear.{end}"
            self.take(ours, f"{theirs}.{end}", make=lambda tensors: rows.join(tensors, self.model))

    def tensors(self) -> dict[str, LazyTensor]:
        """The whole checkpoint in fp32, made tensor by tensor when it is written."""

        def read(key: str) -> Tensor:
            if key not in self._made:
                return self.initial(key)
            taken, make = self._made[key]
            return make([self.source.tensors[name].read().float() for name in taken.sources])

        return {
            key: LazyTensor(shape, torch.float32, partial(read, key))
            for key, shape in self.shapes.items()
        }

    def left(self) -> tuple[Left, ...]:
        """Tensors of the source that nothing is made of."""
        used = {name for taken, _ in self._made.values() for name in taken.sources}
        found = []
        for name, tensor in self.source.tensors.items():
            if name not in used:
                why = next((why for keys, why in self._known if keys.fullmatch(name)), None)
                unknown = "unknown to this importer"
                found.append(Left(name, tensor.shape, why or unknown, known=why is not None))
        return tuple(found)

    def report(self, what: str) -> ImportReport:
        """The fate of every tensor; `what` says which model the source is."""
        initial = Taken("", (), "initial values")
        fates = {key: self._made[key][0] if key in self._made else initial for key in self.shapes}
        taken = [fate for fate in fates.values() if fate.sources]
        remarks = [*self.remarks, *(measure() for measure in self.measures)]
        if self.source.skipped:
            remarks.append(
                f"objects that are not tensors were skipped: {', '.join(self.source.skipped)}"
            )
        return ImportReport(
            source=str(self.source.path),
            what=what,
            taken=tuple(entry for entry in taken if not entry.how),
            adapted=tuple(entry for entry in taken if entry.how),
            left=self.left(),
            new=tuple(
                New(key, self.shapes[key], fate.how)
                for key, fate in fates.items()
                if not fate.sources
            ),
            remarks=tuple(remarks),
        )
