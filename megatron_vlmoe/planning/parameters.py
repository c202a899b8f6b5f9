"""Every parameter of the model: the one table of what a checkpoint holds, and the numbers that follow from it."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import load_code
from megatron_vlmoe.stream.block_plan import Branch, block_plans
from megatron_vlmoe.stream.layout import (
    PAIR_SEGMENTS,
    SEGMENTS,
    TEXT_SEGMENTS,
    VISION_SEGMENTS,
    SegmentName,
)
from megatron_vlmoe.stream.sizes import (
    data_parallel_size,
    experts_per_token,
    padded_vocab_size,
)

ASSUMED_VOCAB_SIZE = 64_000
ASSUMED_VISUAL_VOCAB_SIZE = 8_192

Sharding = Literal["replicated", "tensor", "expert"]
Shape = tuple[int, ...]
Shapes = dict[str, Shape]

TASK_HEADS = "task heads"
OTHER_PART = "unknown"
# Parts of the model by their keys, in the order in which they are listed; the first that matches decides.
_PARTS = {
    "text embedding": r"embedding\.text\.word\.",
    "image embedding": r"embedding\.image\.(weight|bias)$",
    "positions": r"embedding\.(text|image)\.",
    "attention": r"decoder\.layers\.\d+\.self_attention\.",
    "norms": r"decoder\..*(norm\.|gamma_)",
    **{f"{name} ffn": rf"decoder\..*\.{name}_ffn\." for name in ("text", "vision", "vl")},
    **{
        f"{name} experts": rf"decoder\..*\.experts\.{name}\."
        for name in ("text", "vision", "vl", "shared")
    },
    "balance biases": r"decoder\..*\.router\.\w+\.balance_bias$",
    "routers": r"decoder\..*\.moe\.router\.",
    "text head": r"heads\.text\.",
    "image head": r"heads\.image\.",
    TASK_HEADS: r"heads\.",
}
# Of a layer whose outputs are sharded the bias is too; where its inputs are, the bias is added once.
_TENSOR_PARALLEL = re.compile(
    r"(\.word|linear_(qkv|fc1|proj|fc2)|heads\.(text|image)\.linear)\.weight$"
    r"|(linear_(qkv|fc1)|heads\.(text|image)\.linear)\.bias$"
)


def part_of(key: str) -> str:
    """The part of a checkpoint key, such as `attention` or `text experts`; `unknown` for a name of no part."""
    return next((part for part, keys in _PARTS.items() if re.match(keys, key)), OTHER_PART)


def sharding_of(key: str) -> Sharding:
    """How the ranks of a stage divide the parameter of a checkpoint key."""
    if ".moe.experts." in key:
        return "expert"
    return "tensor" if _TENSOR_PARALLEL.search(key) else "replicated"


def part_order(part: str) -> int:
    """Place of a part in a listing, in the order of the model."""
    return [*_PARTS, OTHER_PART].index(part)


@dataclass(frozen=True)
class Parameter:
    """A tensor of the model.

    Args:
        key: its key in a checkpoint.
        shape: of the whole tensor; rows of vocabularies are padded.
        block: block number from 1; 0 is the embedding, L + 1 the last LayerNorm and the heads.
        segments: stream segments whose tokens reach it.
        activated: how many of its values one image-text pair applies.
    """

    key: str
    shape: Shape
    block: int
    segments: tuple[str, ...]
    activated: int

    # A plan asks for these once for every layout.
    @functools.cached_property
    def size(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @functools.cached_property
    def part(self) -> str:
        """What it belongs to; see `part_of`."""
        return part_of(self.key)

    @property
    def trained(self) -> bool:
        """Whether the optimizer may train it: the bias of loss-free balancing has a rule of its own."""
        return not self.key.endswith(".balance_bias")

    @property
    def fp32(self) -> bool:
        """Whether it is kept in fp32 whatever the compute precision (routers, the temperature)."""
        return ".moe.router." in self.key or self.key.endswith(".logit_scale")

    @functools.cached_property
    def sharding(self) -> Sharding:
        """`tensor` splits it over TP ranks, `expert` over EP ranks."""
        return sharding_of(self.key)

    def local_size(self, tensor_size: int, expert_size: int) -> int:
        """How many of its values one rank holds."""
        shards = {"replicated": 1, "tensor": tensor_size, "expert": expert_size}[self.sharding]
        return self.size // shards


def parameters(config: RunConfig) -> list[Parameter]:
    """Every tensor of a checkpoint of a configuration, in the order of the model."""
    model, width = config.model, config.model.hidden_size
    types: Shapes = {"token_type": (1, width)} if model.token_type_embeddings else {}
    found: list[Parameter] = []
    if model.vocab_size:
        text: Shapes = {
            "word.weight": (padded_vocab_size(model.vocab_size), width),
            "position": (max(model.text_length, model.pair_text_length), width),
            **types,
        }
        found += _rows("embedding.text.", text, 0, TEXT_SEGMENTS)
    image: Shapes = {
        "weight": (width, 3 * model.patch_size**2),
        "bias": (width,),
        "cls_token": (1, width),
        "mask_token": (1, width),
        "position": (model.image_length, width),
        **types,
    }
    found += _rows("embedding.image.", image, 0, VISION_SEGMENTS)
    scales = ("gamma_1", "gamma_2") if model.layer_scale_init > 0.0 else ()
    attention: Shapes = {
        **{name: (width,) for name in scales},
        **_norm("input_layernorm", width),
        **_linear("self_attention.linear_qkv", width, 3 * width),
        **_linear("self_attention.linear_proj", width, width),
    }
    for plan in block_plans(model, config.moe):
        block = f"decoder.layers.{plan.layer_number - 1}."
        found += _rows(block, attention, plan.layer_number, SEGMENTS)
        for branch in plan.branches:
            found += _branch(config, branch, f"{block}mlp.", plan.layer_number)
    last = model.num_layers + 1
    found += _rows("decoder.", _norm("final_layernorm", width), last, SEGMENTS)
    if not isinstance(config, FinetuneConfig):
        return found + _pretraining_heads(config)
    task = config.task
    shapes: Callable[[int, int], Shapes] = load_code(task.spec.head.shapes, task.name)
    heads = shapes(width, task.num_classes)
    return found + _rows("heads.", heads, last, SEGMENTS, applied=0)


def checkpoint_shapes(config: RunConfig) -> Shapes:
    """Key and whole shape of every parameter in the order of the model."""
    return {parameter.key: parameter.shape for parameter in parameters(config)}


def estimated_parameters(config: RunConfig) -> tuple[Parameter, ...]:
    """What an estimate counts before tokenizers and tasks are known.

    Those are the trained tensors of pretraining, with the paper's vocabularies where none are given. They do not depend
    on the parallel layout: who compares layouts makes them once and hands them on.
    """
    config = with_assumed_vocabularies(config)
    pretraining = RunConfig(model=config.model, moe=config.moe, objectives=config.objectives)
    return tuple(parameter for parameter in parameters(pretraining) if parameter.trained)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of the whole model.

    Args:
        parts: how many each part has: `text embedding` and `text head` (padding rows of the vocabulary included),
            `image embedding` (patch projection), `positions` (T_pos, V_pos, [I_CLS], the mask embedding and token
            types), `attention` (the key's bias, held at zero, is counted: it is stored), `norms` (LayerNorms and
            LayerScale), `BRANCH ffn`, `POOL experts`, `routers`, `image head`.
        per_token: what one image-text pair of tokens applies (the paper's "parameters per token",
            after LIMoE): embeddings, attention, norms, and of every block the FFNs that the two
            tokens of a pair read, k experts per token (where experts choose, as many as take it on average) and the
            router where there is a pool; no heads. A pool that both tokens read counts at most 2 k experts.
    """

    parts: Counter[str]
    per_token: int

    @property
    def without_heads(self) -> int:
        """Everything but the heads of pretraining."""
        heads = ("text head", "image head", TASK_HEADS)
        return self.total - sum(self.parts[name] for name in heads)

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return self.parts.total()


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of a pipeline stage (from 0, over all its virtual ones); every rank has as many.

    They are the same on every TP rank, or its TP shards, or its experts.
    """

    stage: int
    blocks: tuple[int, ...]
    replicated: int
    tensor: int
    experts: int

    @property
    def total(self) -> int:
        """Parameters of the rank."""
        return self.replicated + self.tensor + self.experts


def with_assumed_vocabularies(config: RunConfig) -> RunConfig:
    """The configuration with the paper's 64,000 tokens and 8,192 codes where none are given."""
    model = config.model
    return replace(
        config,
        model=replace(
            model,
            vocab_size=model.vocab_size or ASSUMED_VOCAB_SIZE,
            visual_vocab_size=model.visual_vocab_size or ASSUMED_VISUAL_VOCAB_SIZE,
        ),
    )


def parameter_counts(config: RunConfig) -> ParameterCounts:
    """Parameters of the whole model; unknown vocabularies count as the paper's."""
    found = estimated_parameters(config)
    parts: Counter[str] = Counter()
    for parameter in found:
        parts[parameter.part] += parameter.size
    return ParameterCounts(parts, sum(parameter.activated for parameter in found))


def parameters_per_rank(config: RunConfig, world_size: int) -> list[StageParameters]:
    """Parameters of a rank of every pipeline stage.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    data_parallel_size(config.parallel, world_size)
    parallel = config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    found = estimated_parameters(config)
    stages = []
    for stage in range(parallel.pipeline_model_parallel_size):
        sizes: Counter[str] = Counter()
        for parameter in parameters_of_stage(found, config, stage):
            sizes[parameter.sharding] += parameter.local_size(tensor, expert)
        stages.append(
            StageParameters(
                stage,
                stage_blocks(config, stage),
                replicated=sizes["replicated"],
                tensor=sizes["tensor"],
                experts=sizes["expert"],
            )
        )
    return stages


def stage_blocks(config: RunConfig, stage: int) -> tuple[int, ...]:
    """Block numbers of a pipeline stage; virtual stages are dealt out in turn (megatron-core)."""
    layers, parallel = config.model.num_layers, config.parallel
    pipeline = parallel.pipeline_model_parallel_size
    chunk = layers // (pipeline * parallel.virtual_pipeline_model_parallel_size)
    return tuple(n for n in range(1, layers + 1) if (n - 1) // chunk % pipeline == stage)


def parameters_of_stage(
    found: Iterable[Parameter], config: RunConfig, stage: int
) -> list[Parameter]:
    """The parameters that a pipeline stage holds."""
    blocks = set(stage_blocks(config, stage))
    if stage == 0:
        blocks.add(0)
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        blocks.add(config.model.num_layers + 1)
    return [parameter for parameter in found if parameter.block in blocks]


def _rows(
    prefix: str,
    shapes: Mapping[str, Shape],
    block: int,
    segments: tuple[str, ...],
    applied: float = 1,
    of: int = 1,
) -> list[Parameter]:
    """Tensors of which an image-text pair applies so many parts of so many."""
    return [
        Parameter(prefix + key, shape, block, segments, int(math.prod(shape) * applied // of))
        for key, shape in shapes.items()
    ]


def _linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _branch(config: RunConfig, branch: Branch, prefix: str, block: int) -> list[Parameter]:
    width, inner = config.model.hidden_size, config.model.ffn_hidden_size
    name, where, experts = branch.name, branch.segments, branch.num_experts
    # How many of the two tokens of a pair read the branch: one, both (VL, shared), or none.
    readers = sum(segment in where for segment in PAIR_SEGMENTS)
    used = min(readers, 1)
    found = _rows(prefix, _norm(f"{name}_norm", width), block, where, used)
    if not experts:
        fc1 = _linear(f"{name}_ffn.linear_fc1", width, inner)
        fc2 = _linear(f"{name}_ffn.linear_fc2", inner, width)
        return found + _rows(prefix, fc1 | fc2, block, where, used)
    router = f"{prefix}moe.router.{name}."
    found += _rows(router, {"weight": (experts, width)}, block, where, used)
    if config.moe.balance_bias_rate > 0.0:
        found += _rows(router, {"balance_bias": (experts,)}, block, where, applied=0)
    pool: Shapes = {
        "weight1": (experts, inner, width),
        "bias1": (experts, inner),
        "weight2": (experts, width, inner),
        "bias2": (experts, width),
    }
    active = min(experts, experts_per_token(config.moe, experts) * readers)
    return found + _rows(f"{prefix}moe.experts.{name}.", pool, block, where, active, experts)


def _pretraining_heads(config: RunConfig) -> list[Parameter]:
    model, objectives = config.model, config.objectives
    if objectives.kind == "contrastive":
        shapes = contrastive_heads(model.hidden_size)
        read: tuple[SegmentName, ...] = ("texts", "images")
        return _rows("heads.", shapes, model.num_layers + 1, read, applied=0)
    weights = {
        "texts": objectives.mlm_weight,
        "pair_texts": objectives.vlm_text_weight,
        "pair_images": objectives.vlm_image_weight,
        "images": objectives.mim_weight,
    }
    found = []
    for name, size, where in (
        ("text", model.vocab_size, TEXT_SEGMENTS),
        ("image", model.visual_vocab_size, VISION_SEGMENTS),
    ):
        if size:
            shapes = _linear(f"{name}.linear", model.hidden_size, padded_vocab_size(size))
            read = tuple(segment for segment in where if weights[segment])
            found += _rows("heads.", shapes, model.num_layers + 1, read, applied=0)
    return found


def pair_classifier(width: int, classes: int, inputs: int = 0) -> Shapes:
    """Tensors of `PairClassifier`, which reads one feature unless `inputs` are more."""
    return {
        **_linear("pooler.dense", width, width),
        **_linear("classifier.dense", inputs or width, 2 * width),
        **_norm("classifier.norm", 2 * width),
        **_linear("classifier.output", 2 * width, classes),
    }


def two_image_classifier(width: int, classes: int) -> Shapes:
    """Tensors of `TwoImageClassifier`."""
    return pair_classifier(width, classes, 2 * width)


def image_classifier(width: int, classes: int) -> Shapes:
    """Tensors of `ImageClassifier`."""
    return _linear("classifier", width, classes)


def text_classifier(width: int, classes: int) -> Shapes:
    """Tensors of `TextClassifier`."""
    return _linear("pooler.dense", width, width) | _linear("classifier", width, classes)


def contrastive_heads(width: int) -> Shapes:
    """Tensors of `ContrastiveHeads`."""
    return {
        "text_projection.weight": (width, width),
        "image_projection.weight": (width, width),
        "logit_scale": (1,),
    }


def retrieval_heads(width: int, classes: int) -> Shapes:
    """Tensors of `RetrievalHeads`, which has no classes."""
    return {
        **contrastive_heads(width),
        **_linear("pooler.dense", width, width),
        **_linear("matching", width, 2),
    }
