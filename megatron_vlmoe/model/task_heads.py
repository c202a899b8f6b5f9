"""Heads of the downstream tasks (paper sections 4.2 and 4.3; shapes after VLMo where the paper is silent), and of
contrastive pretraining, which retrieval starts from.

Letters: n samples of a micro-batch, L tokens of a sample, D width, C classes.

Every tensor-parallel rank applies a head to its own samples; the outputs are gathered, so that all of them hold those
of the whole micro-batch and compute the same loss.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import load_code
from megatron_vlmoe.model.heads import Heads, MaskedHeads
from megatron_vlmoe.model.norm import LayerNorm, mark_sequence_parallel
from megatron_vlmoe.stream.batch import Batch, StreamBatch
from megatron_vlmoe.stream.layout import StreamLayout


class Linear(nn.Module):
    """``y = W x + b`` on this rank's samples, with the whole matrix on every tensor-parallel rank."""

    def __init__(
        self, config: TransformerConfig, inputs: int, outputs: int, bias: bool = True
    ) -> None:
        super().__init__()
        weight = torch.empty(outputs, inputs, dtype=config.params_dtype)
        self.weight = mark_sequence_parallel(nn.Parameter(weight), config)
        self.bias: nn.Parameter | None = None
        if bias:
            value = nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype))
            self.bias = mark_sequence_parallel(value, config)

    def forward(self, values: Tensor) -> Tensor:
        """``[n, inputs]`` to ``[n, outputs]``."""
        return F.linear(values, self.weight, self.bias)


class OutputLinear(Linear):
    """A `Linear` whose outputs are fp32, whatever its inputs and weights are.

    Rounded to bf16, neighbouring logits are often equal, and a tie counts against the model.
    """

    def forward(self, values: Tensor) -> Tensor:
        """``[n, inputs]`` to fp32 ``[n, outputs]``."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(values.float(), self.weight.float(), bias)


class Pooler(nn.Module):
    """``tanh(W [T_CLS] + b)`` (BERT, VLMo): ``[n, D]`` to ``[n, D]``."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.dense = Linear(config, config.hidden_size, config.hidden_size)

    def forward(self, cls_token: Tensor) -> Tensor:
        """Pooled ``[n, D]``."""
        return torch.tanh(self.dense(cls_token))


class TwoLayerClassifier(nn.Module):
    """Linear to 2 D, LayerNorm, GELU, linear to the classes (VLMo): ``[n, width]`` to ``[n, C]``."""

    def __init__(self, config: TransformerConfig, width: int, num_classes: int) -> None:
        super().__init__()
        inner = 2 * config.hidden_size
        self.dense = Linear(config, width, inner)
        self.norm = LayerNorm(config, inner, config.layernorm_epsilon)
        self.output = OutputLinear(config, inner, num_classes)

    def forward(self, values: Tensor) -> Tensor:
        """Logits ``[n, C]``."""
        return self.output(F.gelu(self.norm(self.dense(values))))


class TaskHeads(Heads):
    """Common to all tasks: takes vectors of samples out of the stream and gathers outputs over TP ranks."""

    def gathered(self, values: Tensor) -> Tensor:
        """``[n / TP, ...]`` of this rank to ``[n, ...]`` in fp32; each rank keeps the gradient of its own samples."""
        values = values.float()
        if not self.config.sequence_parallel:
            return values
        # The loss is computed alike on every rank: the gradient is split, not summed.
        return gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)

    @staticmethod
    def first_tokens(hidden: Tensor, stream: StreamBatch, segment: str) -> Tensor:
        """First token of every sample of a segment: ``[n / TP, D]``."""
        return stream.layout.take(hidden.squeeze(1), segment)[:, 0]


class PairClassifier(TaskHeads):
    """VQA and other pairs: the final vector of [T_CLS] of text and image, pooled, to the classes."""

    pairs = 1

    def __init__(self, config: TransformerConfig, run: FinetuneConfig) -> None:
        super().__init__(config)
        width = self.pairs * config.hidden_size
        self.pooler = Pooler(config)
        self.classifier = TwoLayerClassifier(config, width, run.task.num_classes)

    def forward(self, hidden: Tensor, batch: Batch, stream: StreamBatch) -> dict[str, Tensor]:
        """`logits` ``[n, C]`` of the n samples, whose pairs follow each other."""
        pooled = self.pooler(self.first_tokens(hidden, stream, "pair_texts"))
        together = pooled.reshape(-1, self.pairs * pooled.shape[1])
        return {"logits": self.gathered(self.classifier(together))}


class TwoImageClassifier(PairClassifier):
    """NLVR2: pooled [T_CLS] of (sentence, left) and (sentence, right), concatenated, to the two classes."""

    pairs = 2


class ImageClassifier(TaskHeads):
    """ImageNet: the final vectors of the patches, averaged, to the classes (paper section 4.3, BEiT)."""

    def __init__(self, config: TransformerConfig, run: FinetuneConfig) -> None:
        super().__init__(config)
        self.classifier = OutputLinear(config, config.hidden_size, run.task.num_classes)

    def forward(self, hidden: Tensor, batch: Batch, stream: StreamBatch) -> dict[str, Tensor]:
        """`logits` ``[n, C]``."""
        patches = stream.layout.take(hidden.squeeze(1), "images")[:, 1:]
        return {"logits": self.gathered(self.classifier(patches.mean(dim=1)))}


class TextClassifier(TaskHeads):
    """MNLI and other sentence pairs: pooled [T_CLS] to the classes."""

    def __init__(self, config: TransformerConfig, run: FinetuneConfig) -> None:
        super().__init__(config)
        self.pooler = Pooler(config)
        self.classifier = OutputLinear(config, config.hidden_size, run.task.num_classes)

    def forward(self, hidden: Tensor, batch: Batch, stream: StreamBatch) -> dict[str, Tensor]:
        """`logits` ``[n, C]``."""
        pooled = self.pooler(self.first_tokens(hidden, stream, "texts"))
        return {"logits": self.gathered(self.classifier(pooled))}


class ContrastiveHeads(TaskHeads):
    """Contrastive learning: projections of [T_CLS] and [I_CLS], and a learned temperature."""

    def __init__(self, config: TransformerConfig, temperature: float) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.text_projection = Linear(config, width, width, bias=False)
        self.image_projection = Linear(config, width, width, bias=False)
        # Part of the loss, which every tensor-parallel rank computes whole: its gradient is not summed over them.
        # fp32: in bf16 it would move in steps of 1/64.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1.0 / temperature)))

    def forward(self, hidden: Tensor, batch: Batch, stream: StreamBatch) -> dict[str, Tensor]:
        """Unit vectors `text_features` and `image_features` ``[n, D]`` of what the layout has, and `logit_scale`, the
        log of the inverse temperature."""
        outputs: dict[str, Tensor] = {"logit_scale": self.logit_scale.float()}
        for name, segment in (("text", "texts"), ("image", "images")):
            if stream.layout.count(segment):
                project = self.get_submodule(f"{name}_projection")
                features = project(self.first_tokens(hidden, stream, segment))
                outputs[f"{name}_features"] = F.normalize(self.gathered(features), dim=1)
        return outputs


class RetrievalHeads(ContrastiveHeads):
    """Retrieval: contrastive learning, and the matching head (VLMo)."""

    def __init__(self, config: TransformerConfig, run: FinetuneConfig) -> None:
        super().__init__(config, run.contrastive.temperature)
        self.pooler = Pooler(config)
        self.matching = OutputLinear(config, config.hidden_size, 2)

    def forward(self, hidden: Tensor, batch: Batch, stream: StreamBatch) -> dict[str, Tensor]:
        """See `ContrastiveHeads.forward`; and `match_logits` ``[pairs, 2]`` of a layout with pairs."""
        outputs = super().forward(hidden, batch, stream)
        if stream.layout.pairs:
            pooled = self.pooler(self.first_tokens(hidden, stream, "pair_texts"))
            outputs["match_logits"] = self.gathered(self.matching(pooled))
        return outputs

    def unreached(self, layout: StreamLayout) -> dict[str, nn.Module]:
        """The matching head of a run without pairs."""
        if layout.pairs:
            return {}
        return {"heads.pooler": self.pooler, "heads.matching": self.matching}


def build_pretraining_heads(transformer_config: TransformerConfig, config: RunConfig) -> Heads:
    """The heads of the objective of a pretraining run."""
    if config.objectives.kind == "contrastive":
        return ContrastiveHeads(transformer_config, config.objectives.contrastive_temperature)
    return MaskedHeads(transformer_config, config)


def build_task_heads(transformer_config: TransformerConfig, config: RunConfig) -> Heads:
    """The heads of the task of a run."""
    assert isinstance(config, FinetuneConfig)
    heads: Heads = load_code(config.task.spec.head.build, config.task.name)(
        transformer_config, config
    )
    return heads
