"""The name table: a checkpoint's tensors on the left, a Hugging Face export's on the right.

The one table drives export, import and `finetune --load HF_DIR`; a star stands for a block number or a branch name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.convert.parameters import Shape, checkpoint_shapes
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.convert.transforms import (
    FusedQkv,
    LeadingAxis,
    PatchConvolution,
    Same,
    Transform,
    VocabularyRows,
)


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    Args:
        ours: key in a checkpoint.
        theirs: names in an export.
        transform: how the values become each other.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = Same()


def _same(ours: str, theirs: str, *endings: str) -> tuple[Rule, ...]:
    return tuple(Rule(f"{ours}.{end}", (f"{theirs}.{end}",)) for end in endings)


_TEXT, _IMAGE = "vlmoe.text_embeddings", "vlmoe.image_embeddings"
_OURS, _THEIRS = "decoder.layers.*", "vlmoe.encoder.layer.*"
_QKV, _ATTENTION = f"{_OURS}.self_attention.linear_qkv", f"{_THEIRS}.attention"
_BRANCH = f"{_THEIRS}.feed_forward.*"
_LINEAR = ("weight", "bias")

RULES: tuple[Rule, ...] = (
    Rule(
        "embedding.text.word.weight",
        (f"{_TEXT}.word_embeddings.weight",),
        VocabularyRows("vocab_size"),
    ),
    Rule("embedding.text.position", (f"{_TEXT}.position_embeddings",), LeadingAxis()),
    Rule("embedding.text.token_type", (f"{_TEXT}.token_type_embedding",), LeadingAxis()),
    Rule(
        "embedding.image.weight",
        (f"{_IMAGE}.patch_embeddings.projection.weight",),
        PatchConvolution(),
    ),
    Rule("embedding.image.bias", (f"{_IMAGE}.patch_embeddings.projection.bias",)),
    Rule("embedding.image.cls_token", (f"{_IMAGE}.cls_token",), LeadingAxis()),
    Rule("embedding.image.mask_token", (f"{_IMAGE}.mask_token",), LeadingAxis()),
    Rule("embedding.image.position", (f"{_IMAGE}.position_embeddings",), LeadingAxis()),
    Rule("embedding.image.token_type", (f"{_IMAGE}.token_type_embedding",), LeadingAxis()),
    Rule(f"{_OURS}.gamma_1", (f"{_THEIRS}.lambda_1",)),
    Rule(f"{_OURS}.gamma_2", (f"{_THEIRS}.lambda_2",)),
    *_same(f"{_OURS}.input_layernorm", f"{_THEIRS}.layernorm_before", *_LINEAR),
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
    *_same(f"{_OURS}.self_attention.linear_proj", f"{_ATTENTION}.output", *_LINEAR),
    *_same(f"{_OURS}.mlp.*_norm", f"{_BRANCH}.layernorm", *_LINEAR),
    *_same(f"{_OURS}.mlp.*_ffn.linear_fc1", f"{_BRANCH}.fc1", *_LINEAR),
    *_same(f"{_OURS}.mlp.*_ffn.linear_fc2", f"{_BRANCH}.fc2", *_LINEAR),
    Rule(f"{_OURS}.mlp.moe.router.*.weight", (f"{_BRANCH}.router.weight",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.weight1", (f"{_BRANCH}.experts.fc1_weight",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.bias1", (f"{_BRANCH}.experts.fc1_bias",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.weight2", (f"{_BRANCH}.experts.fc2_weight",)),
    Rule(f"{_OURS}.mlp.moe.experts.*.bias2", (f"{_BRANCH}.experts.fc2_bias",)),
    *_same("decoder.final_layernorm", "vlmoe.layernorm", *_LINEAR),
    *(
        Rule(f"heads.{ours}.linear.{end}", (f"{theirs}.{end}",), VocabularyRows(vocabulary))
        for ours, theirs, vocabulary in (
            ("text", "mlm_head", "vocab_size"),
            ("image", "mim_head", "visual_vocab_size"),
        )
        for end in _LINEAR
    ),
    *_same("heads.pooler.dense", "pooler.dense", *_LINEAR),
    *_same("heads.classifier", "classifier", *_LINEAR),
    *_same("heads.classifier.dense", "classifier.dense", *_LINEAR),
    *_same("heads.classifier.norm", "classifier.norm", *_LINEAR),
    *_same("heads.classifier.output", "classifier.output", *_LINEAR),
    Rule("heads.text_projection.weight", ("text_projection.weight",)),
    Rule("heads.image_projection.weight", ("image_projection.weight",)),
    Rule("heads.logit_scale", ("logit_scale",)),
    *_same("heads.matching", "matching", *_LINEAR),
)

# Kept in fp32 whatever the rest is stored in (paper section 3.2: the router; the temperature moves in small steps).
FP32_KEYS = re.compile(r"\.router\.\w+\.weight$|^heads\.logit_scale$")


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and its counterparts.

    Args:
        ours: key in a checkpoint.
        shape: its shape there.
        theirs: names in an export.
        transform: how the values become each other.
    """

    ours: str
    shape: Shape
    theirs: tuple[str, ...]
    transform: Transform

    def their_shapes(self, model: ModelConfig) -> dict[str, Shape]:
        """Name and shape of every counterpart."""
        return dict(zip(self.theirs, self.transform.shapes(self.shape, model), strict=True))

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
    patterns = [(re.compile(_pattern(rule.ours)), rule) for rule in RULES]
    entries = []
    for key, shape in checkpoint_shapes(config).items():
        found = [(m, rule) for pattern, rule in patterns if (m := pattern.fullmatch(key))]
        if len(found) != 1:
            raise LookupError(f"{len(found)} rules for {key}")
        match, rule = found[0]
        theirs = tuple(_fill(name, match.groups()) for name in rule.theirs)
        entries.append(Entry(key, shape, theirs, rule.transform))
    return tuple(entries)


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*", "([a-z0-9]+)")


def _fill(name: str, values: tuple[str, ...]) -> str:
    """The name with its stars replaced in order."""
    parts = name.split("*")
    return "".join(part + value for part, value in zip(parts, (*values, "")))
