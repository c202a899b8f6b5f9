"""Estimates against hand arithmetic, the built model, torch's FLOP counter and saved tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset, preset_names
from megatron_vlmoe.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig
from megatron_vlmoe.planning.dry_run import block_ranges, dry_run_text, nodes_crossed
from megatron_vlmoe.planning.estimate import (
    flops_per_step,
    hardware_flops_per_step,
    memory_per_rank,
)
from megatron_vlmoe.planning.parameters import (
    parameter_counts,
    parameters_per_rank,
    stage_blocks,
    with_assumed_vocabularies,
)
from megatron_vlmoe.stream.layout import StreamLayout

ROOT = Path(__file__).resolve().parents[2]

# One FFN of BASE: two matrices 768 x 3072 and their biases.
BASE_FFN = 2 * 768 * 3072 + 3072 + 768


def change(config, **sections):
    """A configuration with some options of some sections replaced."""
    changed = {name: replace(getattr(config, name), **o) for name, o in sections.items()}
    return replace(config, **changed)


@pytest.fixture(scope="module")
def runtime():
    from megatron_vlmoe.runtime import distributed

    distributed.initialize(ParallelConfig(), seed=1)
    yield
    distributed.destroy()


def build(config, precision="fp32"):
    """The real model; inside FakeTensorMode its parameters have shapes but no memory."""
    from megatron_vlmoe.model.vlmoe import VLMoEModel, build_transformer_config

    return VLMoEModel(config, build_transformer_config(config, precision))


def fake_mode():
    return FakeTensorMode(allow_non_fake_inputs=True)


def by_branch(counts, kind):
    """Parameters of the FFNs (`ffn`) or experts (`experts`) of every branch."""
    return {part.split()[0]: n for part, n in counts.parts.items() if part.endswith(f" {kind}")}


ABLATIONS = {
    "vl experts": {"moe": {"vl": True, "num_vl_experts": 4, "layers": (1, 3, 4)}},
    "shared router": {"moe": {"shared_router": True, "layers": (1, 4)}},
    "text only": {"moe": {"modalities": "text"}},
    "unequal pools": {"moe": {"num_text_experts": 2}},
    "no VL-FFN": {"model": {"num_vl_layers": 0}},
    "token types": {"model": {"token_type_embeddings": True}},
    "no LayerScale": {"model": {"layer_scale_init": 0.0}},
    "odd vocabulary": {"model": {"vocab_size": 1001, "visual_vocab_size": 77}},
    "long captions": {"model": {"pair_text_length": 80}},
}


def cases():
    for name in preset_names():
        yield pytest.param(preset(name), id=name)
    for name, sections in ABLATIONS.items():
        yield pytest.param(change(preset("tiny-8e"), **sections), id=name)


@pytest.mark.parametrize("config", cases())
def test_counts_equal_the_built_model(config, runtime):
    with fake_mode():
        model = build(with_assumed_vocabularies(config))
    built = {name: p.numel() for name, p in model.named_parameters()}

    def named(pattern):
        return sum(size for name, size in built.items() if re.search(pattern, name))

    counts = parameter_counts(config)
    assert counts.total == sum(built.values())
    assert counts.parts["text head"] == named(r"^heads\.text")
    assert counts.parts["image head"] == named(r"^heads\.image")
    assert counts.parts["routers"] == named(r"\.router\.")
    assert counts.parts["attention"] == named(r"\.self_attention\.")
    for branch, size in by_branch(counts, "ffn").items():
        assert size == named(rf"\.{branch}_ffn\.")
    for pool, size in by_branch(counts, "experts").items():
        assert size == named(rf"\.experts\.{pool}\.")
    assert counts.parts["norms"] == named(r"norm|gamma")


def test_base_dense_by_hand():
    """The arithmetic of docs/fidelity.md."""
    counts = parameter_counts(preset("base-dense"))
    assert counts.parts["text embedding"] == 64_000 * 768 == 49_152_000
    assert counts.parts["image embedding"] == 3 * 16 * 16 * 768 + 768 == 590_592
    assert counts.parts["positions"] == (128 + 197 + 1 + 1) * 768 == 251_136
    assert counts.parts["attention"] == 12 * (768 * 2304 + 2304 + 768 * 768 + 768) == 28_348_416
    # Nine blocks with text and vision, three with text, vision and VL.
    assert sum(by_branch(counts, "ffn").values()) == (9 * 2 + 3 * 3) * BASE_FFN == 127_505_664
    # LayerNorm before attention and LayerScale in every block, a LayerNorm per branch, the last one.
    norm = 2 * 768
    assert counts.parts["norms"] == 12 * (norm + norm) + (9 * 2 + 3 * 3) * norm + norm == 79_872
    assert counts.without_heads == 205_927_680
    assert counts.parts["text head"] == 64_000 * (768 + 1)
    assert counts.parts["image head"] == 8_192 * (768 + 1)
    assert counts.total == 261_443_328


def test_base_32e_by_hand():
    dense, sparse = (parameter_counts(preset(f"base-{e}")) for e in ("dense", "32e"))
    # Blocks 2, 4, 6 and 8: 32 experts instead of one FFN, twice.
    added = 4 * 2 * 31 * BASE_FFN
    assert sparse.parts["routers"] == 4 * 2 * 32 * 768 == 196_608
    assert (
        sparse.without_heads
        == dense.without_heads + added + sparse.parts["routers"]
        == 1_377_287_424
    )
    assert sparse.total == 1_432_803_072


def test_six_moe_blocks_give_the_papers_two_billion():
    config = change(preset("base-32e"), moe={"layers": (2, 4, 6, 8, 10, 12)})
    counts = parameter_counts(config)
    assert counts.without_heads == 205_927_680 + 6 * 2 * 31 * BASE_FFN + 6 * 2 * 32 * 768
    assert counts.without_heads == 1_962_967_296
    assert counts.total == 2_018_482_944
    assert counts.parts["routers"] == 294_912


def test_parameters_per_token_by_hand():
    """A pair reads T- and V-FFN in nine blocks and the VL-FFN in three: 180 M in the paper."""
    embeddings = 64_000 * 768 + (768 + 1) * 768 + 327 * 768
    norms = 12 * 2 * 1536 + (9 * 2 + 3) * 1536 + 1536
    dense = embeddings + 28_348_416 + norms + 21 * BASE_FFN
    assert parameter_counts(preset("base-dense")).per_token == dense == 177_583_872
    assert parameter_counts(preset("base-32e")).per_token == dense + 196_608
    two = change(preset("base-32e"), moe={"topk": 2})
    assert parameter_counts(two).per_token == dense + 196_608 + 8 * BASE_FFN


def test_a_pair_uses_at_most_two_experts_of_a_shared_pool():
    config = change(preset("base-8e"), moe={"shared_router": True})
    dense = parameter_counts(preset("base-dense")).per_token
    # One LayerNorm fewer in each of the four blocks.
    assert parameter_counts(config).per_token == dense + 4 * 8 * 768 - 4 * 1536


LAYOUTS = [
    (1, 1, 1, 1, 4),
    (2, 1, 1, 1, 2),
    (1, 2, 1, 4, 8),
    (2, 2, 3, 2, 8),
    (4, 3, 2, 8, 24),
]


@pytest.mark.parametrize(("tensor", "pipeline", "virtual", "expert", "world"), LAYOUTS)
def test_ranks_together_hold_the_model(tensor, pipeline, virtual, expert, world):
    config = change(
        preset("base-8e"),
        parallel={
            "tensor_model_parallel_size": tensor,
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": virtual,
            "expert_model_parallel_size": expert,
        },
    )
    stages = parameters_per_rank(config, world)
    assert len(stages) == pipeline
    whole = sum(s.replicated + tensor * s.tensor + expert * s.experts for s in stages)
    assert whole == parameter_counts(config).total
    assert sorted(n for s in stages for n in s.blocks) == list(range(1, 13))


def test_first_stage_embeds_and_last_stage_has_the_heads():
    config = change(preset("base-dense"), parallel={"pipeline_model_parallel_size": 2})
    counts = parameter_counts(config)
    first, last = parameters_per_rank(config, 2)
    blocks = (
        counts.parts["attention"] + sum(by_branch(counts, "ffn").values()) + counts.parts["norms"]
    )
    embeddings = (
        counts.parts["text embedding"] + counts.parts["image embedding"] + counts.parts["positions"]
    )
    # Blocks 10 to 12 have a third branch: FFN and LayerNorm.
    third = 3 * (BASE_FFN + 1536)
    assert first.total == embeddings + (blocks - 1536 - third) // 2
    assert last.total == (blocks - 1536 - third) // 2 + third + 1536 + 64_000 * 769 + 8_192 * 769


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (4, 1), (2, 3), (3, 2)])
def test_stages_have_the_blocks_that_megatron_core_gives_them(pipeline, virtual, runtime):
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    from megatron_vlmoe.model.vlmoe import build_transformer_config

    config = change(
        preset("base-8e"),
        parallel={
            "pipeline_model_parallel_size": pipeline,
            "virtual_pipeline_model_parallel_size": virtual,
        },
    )
    built = build_transformer_config(config, "fp32")
    for stage in range(pipeline):
        numbers: list[int] = []
        for chunk in range(virtual):
            vp_stage = chunk if virtual > 1 else None
            count = get_num_layers_to_build(built, vp_stage=vp_stage, pp_rank=stage)
            offset = get_transformer_layer_offset(built, vp_stage, stage)
            numbers += range(offset + 1, offset + count + 1)
        assert stage_blocks(config, stage) == tuple(numbers)


# ---- FLOPs ----


def hand_config(**sections):
    """One block, 8 wide; a step of two micro-batches of 2 texts, 3 pairs and 1 image."""
    config = RunConfig(
        model=ModelConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            ffn_hidden_size=16,
            num_vl_layers=0,
            image_size=4,
            patch_size=2,
            text_length=6,
            pair_text_length=4,
            vocab_size=10,
            visual_vocab_size=7,
        ),
        data=DataConfig(
            micro_texts=2,
            micro_pairs=3,
            micro_images=1,
            global_texts=4,
            global_pairs=6,
            global_images=2,
        ),
    )
    return change(config, **sections)


# Tokens: 2 * 6 + 3 * 4 of text, (3 + 1) * 5 of images, 44 together.
QKV_AND_OUTPUT = 2 * 44 * (8 * 24 + 8 * 8)
# Twice (scores, weighted values) over the head width: 2 texts of 6, 3 pairs of 9, 1 image of 5.
SCORES = 2 * 2 * 8 * (2 * 36 + 3 * 81 + 25)
FFN_ROW = 2 * 2 * 8 * 16
PATCHES = 2 * 4 * 4 * 12 * 8
# One slot for each of 2 texts and 3 captions; one patch (floor 0.4 * 4) of each of 4 images.
HEADS = 2 * 8 * (5 * 10 + 4 * 7)


def test_model_flops_by_hand():
    forward = QKV_AND_OUTPUT + SCORES + 44 * FFN_ROW + PATCHES + HEADS
    assert forward == 60_256
    assert flops_per_step(hand_config()) == 2 * 3 * forward


MOE = {"num_text_experts": 2, "num_vision_experts": 4, "layers": (1,)}
ROUTERS = 2 * 8 * (24 * 2 + 20 * 4)


@pytest.mark.parametrize("topk", [1, 2])
def test_model_flops_count_activated_experts(topk):
    config = hand_config(moe={**MOE, "topk": topk})
    forward = QKV_AND_OUTPUT + SCORES + topk * 44 * FFN_ROW + ROUTERS + PATCHES + HEADS
    assert flops_per_step(config) == 2 * 3 * forward


def test_hardware_flops_by_hand():
    # Capacities ceil(24 * 1.05 / 2) = 13 and ceil(20 * 1.05 / 4) = 6; heads padded to 128 rows.
    blocks = QKV_AND_OUTPUT + SCORES + (2 * 13 + 4 * 6) * FFN_ROW + ROUTERS
    ends = PATCHES + 2 * 8 * 128 * (5 + 4)
    config = hand_config(moe=MOE)
    assert hardware_flops_per_step(config) == 2 * 3 * (blocks + ends)
    recompute = change(config, train={"recompute": "full"})
    assert hardware_flops_per_step(recompute) == 2 * (4 * blocks + 3 * ends)
    chunks = change(config, train={"head_chunk_rows": 2})
    assert hardware_flops_per_step(chunks) == 2 * (3 * blocks + 3 * PATCHES + 4 * (ends - PATCHES))
    dropless = change(config, moe={"dispatcher": "dropless"})
    rows = 44 * FFN_ROW - (2 * 13 + 4 * 6) * FFN_ROW
    assert hardware_flops_per_step(dropless) == 2 * 3 * (blocks + rows + ends)


def test_hardware_flops_round_the_capacity_on_every_tensor_rank():
    config = hand_config(
        moe=MOE,
        data={"micro_pairs": 4, "micro_images": 2, "global_pairs": 4, "global_images": 2},
    )
    config = change(config, data={"micro_texts": 2, "global_texts": 2})
    one = hardware_flops_per_step(config)
    two = hardware_flops_per_step(change(config, parallel={"tensor_model_parallel_size": 2}))
    # Text: ceil(28 * 1.05 / 2) = 15 slots, against 2 ranks of ceil(14 * 1.05 / 2) = 8.
    # Vision: ceil(30 * 1.05 / 4) = 8, against 2 ranks of ceil(15 * 1.05 / 4) = 4.
    assert two - one == 3 * FFN_ROW * 2 * (2 * 8 - 15)


def test_experts_that_choose_compute_as_many_rows_as_they_take():
    """Twice as many as tokens, whatever the dispatcher; each of two experts at most all of them."""
    moe = {**MOE, "routing": "expert_choice", "capacity_factor": 2.0}
    rows = 2 * 24 + 4 * 10
    blocks = QKV_AND_OUTPUT + SCORES + rows * FFN_ROW + ROUTERS
    for dispatcher in ("fixed_capacity", "alltoall"):
        config = hand_config(moe={**moe, "dispatcher": dispatcher})
        assert flops_per_step(config) == 2 * 3 * (blocks + PATCHES + HEADS)
        assert hardware_flops_per_step(config) == 2 * 3 * (blocks + PATCHES + 2 * 8 * 128 * 9)
    # One expert more for each of the two tokens of a pair.
    counts = [parameter_counts(hand_config(moe=own)).per_token for own in (MOE, moe)]
    assert counts[1] - counts[0] == 2 * (2 * 8 * 16 + 16 + 8)


def test_experts_without_tokens_compute_nothing():
    images = {"micro_texts": 0, "micro_pairs": 0}
    both = hand_config(moe=MOE, data=images)
    vision = hand_config(moe={**MOE, "modalities": "vision"}, data=images)
    assert hardware_flops_per_step(both) == hardware_flops_per_step(vision)


def test_an_objective_that_is_off_costs_nothing():
    config = hand_config(data={"micro_texts": 0, "micro_pairs": 0})
    attention = 2 * 5 * (8 * 24 + 8 * 8) + 2 * 2 * 8 * 25
    forward = attention + 5 * FFN_ROW + 2 * 4 * 12 * 8 + 2 * 8 * 7
    assert flops_per_step(config) == 2 * 3 * forward


def real_batch(config):
    """Zeros of the shapes that a micro-batch has, and its stream."""
    from megatron_vlmoe.stream.batch import StreamBatch

    model, layout = config.model, StreamLayout.of(config)
    texts, pairs, images = layout.texts, layout.pairs, layout.images
    caption, patches = config.objectives.caption_mask_slots, config.objectives.num_masked_patches
    text = round(0.15 * (model.text_length - 2))
    side = model.image_size

    def ids(*shape):
        return torch.zeros(shape, dtype=torch.long)

    def texts_segment(count, length, predicted):
        return {
            "ids": ids(count, length),
            "positions": ids(count, predicted),
            "labels": ids(count, predicted),
        }

    def images_segment(count):
        return {
            "pixels": ids(count, 3, side, side).byte(),
            "mask": ids(count, model.num_patches).bool(),
            "positions": ids(count, patches),
            "labels": ids(count, patches),
        }

    batch = {
        "texts": texts_segment(texts, model.text_length, text),
        "pair_texts": texts_segment(pairs, model.pair_text_length, caption),
        "pair_images": images_segment(pairs),
        "images": images_segment(images),
    }
    lengths = torch.full((pairs,), model.pair_text_length)
    return batch, StreamBatch(layout, pair_lengths=lengths)


def measured_config(name):
    return change(
        preset(name),
        model={"vocab_size": 1024, "visual_vocab_size": 512},
        objectives={"caption_mask_slots": 10, "num_masked_patches": 20},
        data={
            "micro_texts": 4,
            "micro_images": 3,
            "micro_pairs": 2,
            "global_texts": 4,
            "global_images": 3,
            "global_pairs": 2,
        },
    )


@pytest.fixture
def every_slot_filled(runtime, monkeypatch):
    """Fake tensors do not say which slots are filled; a plan counts all of them, as a GPU computes them."""
    from megatron_vlmoe.moe import dispatch

    monkeypatch.setattr(dispatch, "slots_in_use", lambda routing: None)


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-8e", "small-8e"])
def test_flops_equal_torchs_counter(name, every_slot_filled):
    """torch's counter knows the plain attention kernel, but not the fused one of a CPU."""
    config = change(measured_config(name), model={"attention_backend": "math"})
    with fake_mode():
        model = build(config)
        batch, stream = real_batch(config)
        with FlopCounterMode(display=False) as counter:
            model(batch, stream)
    counted = counter.get_total_flops()
    assert hardware_flops_per_step(config) / 3 == pytest.approx(counted, rel=0.02)
    if name.endswith("dense"):
        assert flops_per_step(config) / 3 == pytest.approx(counted, rel=0.02)


# ---- memory ----


def bytes_per_parameter(config, world_size, precision):
    """Weights, gradients and optimizer state, divided by the parameters of a rank."""
    memory = memory_per_rank(config, world_size, precision)[0]
    held = parameters_per_rank(config, world_size)[0].total
    return (memory.weights + memory.gradients + memory.optimizer) / held


@pytest.mark.parametrize(
    ("precision", "plain", "fixed", "sharded"),
    [("bf16", 18, 6, 12), ("fp16", 18, 6, 12), ("fp32", 16, 8, 8)],
)
def test_bytes_per_parameter_as_megatron_core_says(precision, plain, fixed, sharded):
    """The table of megatron-core's distributed-optimizer guide, with fp32 gradients."""
    config = preset("base-dense")
    for ranks in (1, 4):
        expected = fixed + sharded / ranks
        assert bytes_per_parameter(config, ranks, precision) == pytest.approx(expected, rel=1e-6)
    off = change(config, parallel={"use_distributed_optimizer": False})
    assert bytes_per_parameter(off, 4, precision) == plain


def test_experts_shard_their_state_over_expert_data_parallel_ranks():
    """8 ranks, EP 4: dense state over 8 ranks, expert state over 2; routers stay in fp32."""
    config = change(preset("base-8e"), parallel={"expert_model_parallel_size": 4})
    counts = parameter_counts(config)
    experts = sum(by_branch(counts, "experts").values()) // 4
    dense = counts.total - sum(by_branch(counts, "experts").values()) - counts.parts["routers"]
    memory = memory_per_rank(config, 8, "bf16")[0]
    assert memory.weights == 2 * (dense + experts) + 4 * counts.parts["routers"]
    assert memory.gradients == 4 * (dense + experts + counts.parts["routers"])
    state = 12 * dense / 8 + 12 * experts / 2 + 8 * counts.parts["routers"] / 8
    assert memory.optimizer == pytest.approx(state, rel=1e-6)


def test_what_does_not_train_has_no_gradient_and_no_state():
    config = preset("base-8e")
    frozen = change(config, moe={"train_experts": False})
    counts = parameter_counts(config)
    fixed = sum(by_branch(counts, "experts").values()) + counts.parts["routers"]
    before, after = (memory_per_rank(c, 1, "fp32")[0] for c in (config, frozen))
    assert after.weights == before.weights
    assert before.gradients - after.gradients == 4 * fixed
    assert before.optimizer - after.optimizer == 8 * fixed

    images = change(preset("base-dense"), data={"micro_texts": 0, "micro_pairs": 0})
    dense = parameter_counts(images)
    unreached = dense.parts["text embedding"] + 128 * 768 + dense.parts["text head"]
    # Text FFNs and their LayerNorms in all blocks, VL in the last three.
    unreached += (12 + 3) * (BASE_FFN + 1536)
    assert memory_per_rank(images, 1, "fp32")[0].gradients == 4 * (dense.total - unreached)


def test_sgd_keeps_no_moments():
    config = change(preset("tiny-dense"), optim={"optimizer": "sgd"})
    assert memory_per_rank(config, 1, "fp32")[0].optimizer == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "layer_scale", "backend"),
    [
        ("tiny-dense", 0.1, "sdpa"),
        ("small-dense", 0.0, "varlen"),
        ("small-8e", 0.1, "sdpa"),
        ("small-32e", 0.1, "sdpa"),
    ],
)
def test_activations_are_what_autograd_saves(
    name, precision, layer_scale, backend, every_slot_filled
):
    from megatron_vlmoe.planning.estimate import block_activation_parts
    from megatron_vlmoe.stream.block_plan import block_plans

    model = {"layer_scale_init": layer_scale, "attention_backend": backend}
    config = change(measured_config(name), model=model)
    saved: dict[int, torch.UntypedStorage] = {}
    with fake_mode():
        model = build(config, precision)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        batch, stream = real_batch(config)

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.decoder(model.embedding(batch, stream), stream)
        kept = sum(storage.nbytes() for storage in saved.values())
    layout = StreamLayout.of(config)
    blocks = [
        sum(block_activation_parts(config, plan, layout, precision).values())
        for plan in block_plans(config.model, config.moe)
    ]
    size = 2 if precision == "bf16" else 4
    patches = 5 * config.model.num_patches * 3 * config.model.patch_size**2 * size
    last_norm = layout.num_tokens * config.model.hidden_size * size
    assert sum(blocks) + patches + last_norm == pytest.approx(kept, rel=0.02)


def activations(config, world_size):
    return [m.activations for m in memory_per_rank(config, world_size, "bf16")]


def test_earlier_stages_hold_more_micro_batches():
    config = change(preset("base-dense"), model={"num_vl_layers": 0})
    config = change(config, parallel={"pipeline_model_parallel_size": 4})
    stages = activations(config, 4)
    # 32 micro-batches: four, three and two in flight; stage 0 holds patches as well.
    assert stages[1] == pytest.approx(stages[2] * 3 / 2)
    assert stages[0] > stages[2] * 2
    one = change(config, data={"global_texts": 64, "global_images": 64, "global_pairs": 64})
    assert activations(one, 4)[1] == pytest.approx(stages[1] / 3)


def test_interleaving_holds_more():
    config = change(preset("base-dense"), parallel={"pipeline_model_parallel_size": 2})
    config = change(config, model={"num_vl_layers": 0})
    inter = change(config, parallel={"virtual_pipeline_model_parallel_size": 3})
    # Stage 0 of two: 2 micro-batches with 1F1B; 2 * 1 + 2 * 2 + 1 = 7 chunks of a third with three.
    # Each of them also holds what it sent.
    ratio = activations(inter, 2)[0] / activations(config, 2)[0]
    assert ratio == pytest.approx(7 / 3 / 2, rel=0.03)


def test_recompute_and_tensor_parallelism_shrink_activations():
    config = preset("base-8e")
    whole = activations(config, 1)[0]
    assert activations(change(config, train={"recompute": "full"}), 1)[0] < 0.45 * whole
    halved = activations(change(config, parallel={"tensor_model_parallel_size": 2}), 2)[0]
    assert halved == pytest.approx(whole / 2, rel=0.01)


def test_compiled_cross_entropy_keeps_logits_in_16_bits():
    config = change(preset("base-dense"), model={"vocab_size": 64_000, "visual_vocab_size": 8192})
    compiled = change(config, train={"compile": True})
    # 19 of a text's tokens and 63 of a caption's; the larger head decides.
    logits = (64 * 19 + 64 * 63) * 64_000

    def saved(precision, tensor):
        both = (
            change(own, parallel={"tensor_model_parallel_size": tensor})
            for own in (config, compiled)
        )
        plain, fused = (memory_per_rank(own, tensor, precision)[0].temporary for own in both)
        return plain - fused

    # fp32 in place and the copy from 16 bits, against 16 bits and their gradient.
    assert saved("bf16", 1) == (4 + 2) * logits - (2 + 2) * logits
    assert saved("fp32", 1) == saved("bf16", 2) == 0


# ---- capacity and the printed report ----


def test_dry_run_reports_base_32e_on_four_nodes():
    config = change(preset("base-32e"), parallel={"expert_model_parallel_size": 32})
    text = dry_run_text(config, 32)
    assert "vocabulary 64,000 (assumed; the tokenizer decides)" in text
    assert "experts: 32 text, 32 vision in blocks 2, 4, 6, 8; top 1" in text
    assert "TP 1 x PP 1 x DP 32; EP 32, expert DP 1" in text
    assert "2,048 texts + 2,048 images + 2,048 pairs" in text
    assert "= 41,600 token slots; 1 micro-batch(es)" in text
    for label, number in (
        ("total", "1,432,803,072"),
        ("without heads", "1,377,287,424"),
        ("per token of a pair", "177,780,480"),
    ):
        assert re.search(rf"{label} +{number}$", text, re.MULTILINE)
    # 64 * 256 text and 64 * 394 vision slots: ceil(. * 1.05 / 32) and ceil(. / 32).
    assert re.search(r"text +2, 4, 6, 8 +32 +16,384 +538 +512$", text, re.MULTILINE)
    assert re.search(r"vision +2, 4, 6, 8 +32 +25,216 +828 +788$", text, re.MULTILINE)
    assert "WARNING: parallel.expert_model_parallel_size=32" in text


def test_dry_run_of_a_dense_model_on_one_rank_has_no_warning_and_no_capacity():
    text = dry_run_text(preset("tiny-dense"), 1)
    assert "WARNING" not in text and "capacity per" not in text and "no experts" in text


def test_dry_run_shows_every_stage_and_every_kind_of_pool():
    config = change(
        preset("base-8e"),
        model={"vocab_size": 32_000},
        moe={"layers": (2, 12)},
        parallel={"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 4},
    )
    text = dry_run_text(config, 8)
    assert "vocabulary 32,000\n" in text
    assert re.search(r"^  0 +1-6 ", text, re.MULTILINE)
    assert re.search(r"^  1 +7-12 ", text, re.MULTILINE)
    assert re.search(r"^  text +2 +8 +16,384 ", text, re.MULTILINE)
    assert re.search(r"^  text +12 +8 +8,192 ", text, re.MULTILINE)


def test_dry_run_refuses_what_does_not_fit():
    with pytest.raises(ConfigError, match="data.global_texts=2048 is not a multiple of"):
        dry_run_text(preset("base-8e"), 33)


@pytest.mark.parametrize(
    ("group", "world", "stages", "gpus", "crossed"),
    [
        (8, 32, 1, 8, False),
        (32, 32, 1, 8, True),
        (4, 32, 2, 8, False),
        (6, 24, 1, 8, True),
        (4, 12, 3, 6, True),
        (1, 64, 1, 8, False),
        (8, 8, 1, 4, True),
    ],
)
def test_groups_that_leave_a_node(group, world, stages, gpus, crossed):
    assert nodes_crossed(group, world, stages, gpus) is crossed


def test_block_ranges():
    assert block_ranges((1, 2, 3, 6, 8, 9)) == "1-3, 6, 8-9"
    assert block_ranges(()) == "none"


@pytest.mark.process
def test_estimates_need_no_torch():
    code = "import sys, megatron_vlmoe.planning.dry_run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- docs/fidelity.md ----


def test_fidelity_page_has_the_counts():
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    rows = {row.split("|")[1].strip(): row for row in page.splitlines() if row.startswith("| ")}
    for name in ("small-dense", "small-8e", "small-16e", "small-32e", "base-dense", "base-8e"):
        counts = parameter_counts(preset(name))
        numbers = (counts.total, counts.without_heads, counts.per_token)
        assert rows[name].endswith("| " + " | ".join(f"{n:,}" for n in numbers) + " |")
    for blocks in ((2, 4, 6, 8), (2, 4, 6, 8, 10), (2, 4, 6, 8, 10, 12)):
        counts = parameter_counts(change(preset("base-32e"), moe={"layers": blocks}))
        numbers = (counts.without_heads, counts.total, counts.parts["routers"])
        row = rows[", ".join(map(str, blocks))]
        assert row.endswith("| " + " | ".join(f"{n:,}" for n in numbers) + " |")


def test_fidelity_page_names_options_that_exist():
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    config = RunConfig()
    named = re.findall(r"`(?:--)?(model|moe|objectives|data|optim|train)\.(\w+)", page)
    assert len(set(named)) > 30
    for section, option in named:
        assert hasattr(getattr(config, section), option), f"{section}.{option}"


@pytest.mark.parametrize(("recompute", "kept"), [("none", False), ("full", True)])
def test_noise_of_all_blocks_is_in_memory_at_once(recompute, kept):
    """24 tokens and 2 experts, 20 tokens and 4: kept where blocks are computed again, else beside the logits."""
    plain = hand_config(moe=MOE, train={"recompute": recompute})
    counted = change(plain, train={"counter_draws": True})
    (before,), (after,) = (memory_per_rank(own, 1, "bf16") for own in (plain, counted))
    noise = 4 * (24 * 2 + 20 * 4)
    assert after.kept.get("router noise", 0) == (noise if kept else 0)
    assert after.total - before.total == noise
    silent = change(counted, moe={"noise_std": 0.0})
    assert memory_per_rank(silent, 1, "bf16")[0].total == before.total


def test_a_graph_holds_all_batches_of_a_step():
    """Pixels, one byte each, and tokens, eight, of both micro-batches."""
    plain = hand_config(moe=MOE, train={"counter_draws": True})
    config = change(plain, train={"cuda_graph": True})
    model, data = config.model, config.data
    images = (data.micro_images + data.micro_pairs) * 3 * model.image_size**2
    tokens = data.micro_texts * model.text_length + data.micro_pairs * model.pair_text_length
    (before,), (after,) = (memory_per_rank(own, 1, "bf16") for own in (plain, config))
    assert after.total - before.total == after.kept["batches"] == 2 * (images + 8 * tokens)
