"""How many parameters a model has: in total, per token and per rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch, block_plans
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, SEGMENTS, TEXT_SEGMENTS, VISION_SEGMENTS
from megatron_vlmoe.stream.sizes import data_parallel_size, padded_vocab_size

ASSUMED_VOCAB_SIZE = 64_000
ASSUMED_VISUAL_VOCAB_SIZE = 8_192

Sharding = Literal["replicated", "tensor", "expert"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that live, shard and train together.

    Args:
        part: what they are, such as `attention` or `text experts`.
        block: block number from 1; 0 is the embedding, L + 1 the last LayerNorm and the heads.
        size: how many there are in the whole model.
        sharding: `tensor` splits them over TP ranks, `expert` over EP ranks.
        segments: stream segments whose tokens reach them.
        activated: how many of them one image-text pair applies.
        fp32: kept in fp32 whatever the compute precision (routers).
    """

    part: str
    block: int
    size: int
    sharding: Sharding
    segments: tuple[str, ...]
    activated: int
    fp32: bool = False

    def local_size(self, tensor_size: int, expert_size: int) -> int:
        """How many of them one rank holds."""
        shards = {"replicated": 1, "tensor": tensor_size, "expert": expert_size}[self.sharding]
        return self.size // shards


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
            tokens of a pair read, k experts per token and the router where there is a pool; no
            heads. A pool that both tokens read counts at most 2 k experts.
    """

    parts: Counter[str]
    per_token: int

    @property
    def without_heads(self) -> int:
        """Everything but the two pretraining heads."""
        return self.total - self.parts["text head"] - self.parts["image head"]

    @property
    def total(self) -> int:
        """Every parameter of the model."""
        return self.parts.total()


@dataclass(frozen=True)
class StageParameters:
    """Parameters of one rank of a pipeline stage; every rank of the stage has as many.

    Args:
        stage: pipeline stage from 0.
        blocks: its block numbers, over all its virtual stages.
        replicated: the same on every TP rank.
        tensor: this rank's TP shards.
        experts: this rank's experts.
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
    groups = parameter_groups(config)
    parts: Counter[str] = Counter()
    for group in groups:
        parts[group.part] += group.size
    return ParameterCounts(parts, sum(group.activated for group in groups))


def parameters_per_rank(config: RunConfig, world_size: int) -> list[StageParameters]:
    """Parameters of a rank of every pipeline stage.

    Raises:
        ConfigError: if the layout does not fit the number of processes.
    """
    data_parallel_size(config.parallel, world_size)
    parallel = config.parallel
    tensor, expert = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    groups = parameter_groups(config)
    stages = []
    for stage in range(parallel.pipeline_model_parallel_size):
        sizes: Counter[str] = Counter()
        for group in groups_of_stage(groups, config, stage):
            sizes[group.sharding] += group.local_size(tensor, expert)
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


def parameter_groups(config: RunConfig) -> list[ParameterGroup]:
    """Every parameter of the model, in groups."""
    config = with_assumed_vocabularies(config)
    groups = _embedding_groups(config)
    for plan in block_plans(config.model, config.moe):
        groups += _block_groups(config, plan)
    return groups + _head_groups(config)


def groups_of_stage(
    groups: Iterable[ParameterGroup], config: RunConfig, stage: int
) -> list[ParameterGroup]:
    """The groups that a pipeline stage holds."""
    blocks = set(stage_blocks(config, stage))
    if stage == 0:
        blocks.add(0)
    if stage == config.parallel.pipeline_model_parallel_size - 1:
        blocks.add(config.model.num_layers + 1)
    return [group for group in groups if group.block in blocks]


def _embedding_groups(config: RunConfig) -> list[ParameterGroup]:
    model = config.model
    width, types = model.hidden_size, int(model.token_type_embeddings)
    words = padded_vocab_size(model.vocab_size) * width
    patches = (3 * model.patch_size**2 + 1) * width
    text_rows = max(model.text_length, model.pair_text_length) + types
    # [I_CLS] and the mask embedding besides V_pos.
    image_rows = model.image_length + 2 + types
    sizes: tuple[tuple[str, int, Sharding, tuple[str, ...]], ...] = (
        ("text embedding", words, "tensor", TEXT_SEGMENTS),
        ("positions", text_rows * width, "replicated", TEXT_SEGMENTS),
        ("image embedding", patches, "replicated", VISION_SEGMENTS),
        ("positions", image_rows * width, "replicated", VISION_SEGMENTS),
    )
    return [ParameterGroup(part, 0, n, how, where, n) for part, n, how, where in sizes]


def _block_groups(config: RunConfig, plan: BlockPlan) -> list[ParameterGroup]:
    model, block = config.model, plan.layer_number
    width = model.hidden_size
    sharded = 4 * width**2 + 3 * width
    vectors = 2 * width * (2 if model.layer_scale_init > 0.0 else 1)
    groups = [
        ParameterGroup("attention", block, sharded, "tensor", SEGMENTS, sharded),
        ParameterGroup("attention", block, width, "replicated", SEGMENTS, width),
        ParameterGroup("norms", block, vectors, "replicated", SEGMENTS, vectors),
    ]
    for branch in plan.branches:
        groups += _branch_groups(config, block, branch)
    return groups


def _branch_groups(config: RunConfig, block: int, branch: Branch) -> list[ParameterGroup]:
    width, inner = config.model.hidden_size, config.model.ffn_hidden_size
    name, where, experts = branch.name, branch.segments, branch.num_experts
    # How many of the two tokens of a pair read the branch: one, both (VL, shared), or none.
    readers = sum(segment in where for segment in PAIR_SEGMENTS)
    used = min(readers, 1)
    norm = 2 * width
    groups = [ParameterGroup("norms", block, norm, "replicated", where, norm * used)]
    # Both matrices and the inner bias are sharded over TP; the outer bias is added once.
    sharded, outer = 2 * width * inner + inner, width
    if not experts:
        part = f"{name} ffn"
        return groups + [
            ParameterGroup(part, block, sharded, "tensor", where, sharded * used),
            ParameterGroup(part, block, outer, "replicated", where, outer * used),
        ]
    size, router = sharded + outer, experts * width
    active = min(experts, config.moe.topk * readers) * size
    return groups + [
        ParameterGroup(f"{name} experts", block, experts * size, "expert", where, active),
        ParameterGroup("routers", block, router, "replicated", where, router * used, fp32=True),
    ]


def _head_groups(config: RunConfig) -> list[ParameterGroup]:
    model, objectives = config.model, config.objectives
    width, block = model.hidden_size, model.num_layers + 1
    weights = {
        "texts": objectives.mlm_weight,
        "pair_texts": objectives.vlm_text_weight,
        "pair_images": objectives.vlm_image_weight,
        "images": objectives.mim_weight,
    }
    groups = [ParameterGroup("norms", block, 2 * width, "replicated", SEGMENTS, 2 * width)]
    for part, rows, where in (
        ("text head", padded_vocab_size(model.vocab_size), TEXT_SEGMENTS),
        ("image head", padded_vocab_size(model.visual_vocab_size), VISION_SEGMENTS),
    ):
        read = tuple(segment for segment in where if weights[segment])
        groups.append(ParameterGroup(part, block, rows * (width + 1), "tensor", read, 0))
    return groups
