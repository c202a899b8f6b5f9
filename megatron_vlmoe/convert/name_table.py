"""The name table: a checkpoint's tensors on the left, a Hugging Face export's on the right, and what lies between.

The one table drives export, import and `finetune --load HF_DIR`; a star stands for a block number or a branch name.
Every transform only moves values (and drops or restores rows and biases that are zero by construction), so going there
and back is equal bit for bit. Letters: D width, H heads, K head width, V vocabulary, P patch side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.planning.parameters import Shape, checkpoint_shapes
from megatron_vlmoe.stream.sizes import padded_vocab_size


class Transform:
    """From one tensor here (ours) to one or more there (theirs), and back; this one is the same on both sides."""

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """The tensors there."""
        return (ours,)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """The tensor here."""
        return theirs[0]

    def shapes(self, ours: Shape, model: ModelConfig) -> tuple[Shape, ...]:
        """Shapes there of a tensor that has the shape `ours` here."""
        parts = self.split(torch.empty(ours, device="meta"), model)
        return tuple(tuple(part.shape) for part in parts)


class LeadingAxis(Transform):
    """A table ``[R, D]`` here is ``[1, R, D]`` there, where models hold it for broadcasting over a batch."""

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Adds the axis."""
        return (ours.unsqueeze(0),)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Removes the axis."""
        return theirs[0].squeeze(0)


class PatchConvolution(Transform):
    """The patch projection ``[D, 3 P P]`` here is the kernel ``[D, 3, P, P]`` of a convolution there."""

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """Unfolds the pixels of a patch, channel first."""
        return (ours.reshape(ours.shape[0], 3, model.patch_size, model.patch_size),)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Folds them."""
        return theirs[0].flatten(1)


@dataclass(frozen=True)
class VocabularyRows(Transform):
    """Rows beyond a vocabulary, which only fill it up to a multiple of 128, do not travel; they come back as zero.

    The field is that of its size, `vocab_size` or `visual_vocab_size`.
    """

    field: str

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """``[padded V, ...]`` to ``[V, ...]``."""
        return (ours[: getattr(model, self.field)],)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Pads with zeros."""
        (rows,) = theirs
        missing = padded_vocab_size(len(rows)) - len(rows)
        # `pad` counts axes from the last.
        return F.pad(rows, [0, 0] * (rows.dim() - 1) + [0, missing])


@dataclass(frozen=True)
class FusedQkv(Transform):
    """megatron-core's fused projection, rows ``[H, (q, k, v), K]``, is three matrices there.

    Parts travel in the order of the names there. The key's bias is zero by construction and does not.
    """

    parts: tuple[str, ...] = ("q", "k", "v")

    def split(self, ours: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """``[3 D, ...]`` to ``[D, ...]`` each: takes the heads of each part together."""
        heads = model.num_attention_heads
        by_head = ours.reshape(heads, 3, ours.shape[0] // (3 * heads), *ours.shape[1:])
        return tuple(by_head[:, "qkv".index(part)].flatten(0, 1) for part in self.parts)

    def join(self, theirs: Sequence[Tensor], model: ModelConfig) -> Tensor:
        """Interleaves them by head; a part that did not travel is zero."""
        given = dict(zip(self.parts, theirs))
        parts = [given.get(part, torch.zeros_like(theirs[0])) for part in "qkv"]
        heads = model.num_attention_heads
        by_head = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
        return torch.stack(by_head, dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Rule:
    """One line of the table: a key in a checkpoint, its names in an export, and how the values become each other."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = Transform()


_LINEAR = ("weight", "bias")


def _same(ours: str, theirs: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{end}", (f"{theirs}.{end}",)) for end in _LINEAR)


_TEXT, _IMAGE = "vlmoe.text_embeddings", "vlmoe.image_embeddings"
_WORDS, _PATCHES = f"{_TEXT}.word_embeddings", f"{_IMAGE}.patch_embeddings.projection"
_OURS, _THEIRS = "decoder.layers.*", "vlmoe.encoder.layer.*"
_QKV, _ATTENTION = f"{_OURS}.self_attention.linear_qkv", f"{_THEIRS}.attention"
_BRANCH = f"{_THEIRS}.feed_forward.*"

RULES: tuple[Rule, ...] = (
    Rule("embedding.text.word.weight", (f"{_WORDS}.weight",), VocabularyRows("vocab_size")),
    Rule("embedding.text.position", (f"{_TEXT}.position_embeddings",), LeadingAxis()),
    Rule("embedding.text.token_type", (f"{_TEXT}.token_type_embedding",), LeadingAxis()),
    Rule("embedding.image.weight", (f"{_PATCHES}.weight",), PatchConvolution()),
    Rule("embedding.image.bias", (f"{_PATCHES}.bias",)),
    Rule("embedding.image.cls_token", (f"{_IMAGE}.cls_token",), LeadingAxis()),
    Rule("embedding.image.mask_token", (f"{_IMAGE}.mask_token",), LeadingAxis()),
    Rule("embedding.image.position", (f"{_IMAGE}.position_embeddings",), LeadingAxis()),
    Rule("embedding.image.token_type", (f"{_IMAGE}.token_type_embedding",), LeadingAxis()),
    Rule(f"{_OURS}.gamma_1", (f"{_THEIRS}.lambda_1",)),
    Rule(f"{_OURS}.gamma_2", (f"{_THEIRS}.lambda_2",)),
    *_same(f"{_OURS}.input_layernorm", f"{_THEIRS}.layernorm_before"),
    Rule(
        f"{_QKV}.weight",
        tuple(f"{_ATTENTION}.{part}.weight" for part in ("query", "key", "value")),
        FusedQkv(),
    ),
    Rule(
        f"{_QKV}.bias",
        tuple(f"{_ATTENTION}.{part}.bias" for part in ("query", "value")),
        FusedQkv(("q", "v")),
    ),
    *_same(f"{_OURS}.self_attention.linear_proj", f"{_ATTENTION}.output"),
    *_same(f"{_OURS}.mlp.*_norm", f"{_BRANCH}.layernorm"),
    *_same(f"{_OURS}.mlp.*_ffn.linear_fc1", f"{_BRANCH}.fc1"),
    *_same(f"{_OURS}.mlp.*_ffn.linear_fc2", f"{_BRANCH}.fc2"),
    Rule(f"{_OURS}.mlp.moe.router.*.weight", (f"{_BRANCH}.router.weight",)),
    Rule(f"{_OURS}.mlp.moe.router.*.balance_bias", (f"{_BRANCH}.router.balance_bias",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.weight1", (f"{_BRANCH}.experts.fc1_weight",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.bias1", (f"{_BRANCH}.experts.fc1_bias",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.weight2", (f"{_BRANCH}.experts.fc2_weight",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.bias2", (f"{_BRANCH}.experts.fc2_bias",)),
    *_same("decoder.final_layernorm", "vlmoe.layernorm"),
    *(
        Rule(f"heads.{ours}.linear.{end}", (f"{theirs}.{end}",), VocabularyRows(vocabulary))
        for ours, theirs, vocabulary in (
            ("text", "mlm_head", "vocab_size"),
            ("image", "mim_head", "visual_vocab_size"),
        )
        for end in _LINEAR
    ),
    *_same("heads.pooler.dense", "pooler.dense"),
    *_same("heads.classifier", "classifier"),
    *_same("heads.classifier.dense", "classifier.dense"),
    *_same("heads.classifier.norm", "classifier.norm"),
    *_same("heads.classifier.output", "classifier.output"),
    Rule("heads.text_projection.weight", ("text_projection.weight",)),
    Rule("heads.image_projection.weight", ("image_projection.weight",)),
    Rule("heads.logit_scale", ("logit_scale",)),
    *_same("heads.matching", "matching"),
)

# Kept in fp32 whatever the rest is stored in (paper section 3.2: the router; the temperature moves in small steps).
FP32_KEYS = re.compile(r"\.router\.\w+\.(weight|balance_bias)$|^heads\.logit_scale$")


@dataclass(frozen=True)
class Entry(Rule):
    """One tensor of a checkpoint, its `shape` there, and its counterparts."""

    shape: Shape = field(kw_only=True)

    def their_shapes(self, model: ModelConfig) -> dict[str, Shape]:
        """Name and shape of every counterpart."""
        return dict(zip(self.theirs, self.transform.shapes(self.shape, model), strict=True))

    def parted(self, tensor: LazyTensor, model: ModelConfig) -> tuple[Tensor, ...]:
        """The counterparts in an export of the tensor of a checkpoint, which is read now."""
        return self.transform.split(tensor.read(), model)

    def joined(self, theirs: Mapping[str, LazyTensor], model: ModelConfig) -> LazyTensor:
        """The tensor of a checkpoint, made of the counterparts in an export when it is read."""
        parts = [theirs[name] for name in self.theirs]

        def read() -> Tensor:
            return self.transform.join([part.read() for part in parts], model)

        return LazyTensor(self.shape, parts[0].dtype, read)


def name_table(config: RunConfig) -> tuple[Entry, ...]:
    """The table of a configuration, in the order of the model.

    Raises:
        LookupError: a tensor that no rule, or more than one, speaks of (a mistake in the rules).
    """
    patterns = [
        (re.compile(re.escape(rule.ours).replace(r"\*", "([a-z0-9]+)")), rule) for rule in RULES
    ]
    entries = []
    for key, shape in checkpoint_shapes(config).items():
        found = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(key))]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rules for {key}")
        match, rule = found[0]
        theirs = tuple(name.replace("*", "{}").format(*match.groups()) for name in rule.theirs)
        entries.append(Entry(key, theirs, rule.transform, shape=shape))
    return tuple(entries)
