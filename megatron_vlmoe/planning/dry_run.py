"""What `--dry-run` prints, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.planning.collectives import collectives_per_step
from megatron_vlmoe.planning.estimate import (
    checkpoint_bytes,
    flops_per_step,
    hardware_flops_per_step,
    memory_per_rank,
)
from megatron_vlmoe.planning.parameters import (
    ParameterCounts,
    parameter_counts,
    parameters_per_rank,
    part_order,
    with_assumed_vocabularies,
)
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.block_plan import Branch, block_plans, moe_layer_numbers
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import data_parallel_size, expert_capacity, num_micro_batches

GIB = 2**30
MEMORY = ("weights", "gradients", "optimizer", "activations", "temporary", "total")
"""Columns of the table of memory: what they are is at `MemoryEstimate`."""


def dry_run_text(config: RunConfig, world_size: int, gpus_per_node: int = 8) -> str:
    """The report of a run that is not started; consecutive ranks share a node.

    Raises:
        ConfigError: if the configuration contradicts itself or does not fit the ranks.
    """
    validate(config, world_size)
    model, hardware = flops_per_step(config), hardware_flops_per_step(config)
    flops = [
        "FLOPs per step (forward and backward, matrix multiplications)",
        f"  model    {model:.4g}, {model / world_size:.4g} per rank (k experts per token, for MFU)",
        f"  hardware {hardware:.4g}, {hardware / model:.3f} x (expert capacity, recomputation)",
    ]
    precision, note = config.train.precision, ""
    if precision == "auto":
        # It depends on the device.
        precision, note = "bf16", "; auto counts as bf16"
    rows = []
    for stage in memory_per_rank(config, world_size, precision):
        values = [getattr(stage, name) for name in MEMORY]
        rows.append((f"{stage.stage}", *(f"{value / GIB:.2f}" for value in values)))
    header = ("stage", *MEMORY)
    memory = [
        f"Memory per rank in GiB, {precision}{note}, recompute {config.train.recompute}",
        *table(header, rows),
        "  without the CUDA context, communication buffers, the image tokenizer and fragmentation",
        checkpoint_line(config, precision),
    ]
    parallel = config.parallel
    kinds = (
        ("expert", parallel.expert_model_parallel_size, "the all-to-all of every MoE block"),
        ("tensor", parallel.tensor_model_parallel_size, "every collective of a block"),
    )
    warnings = [
        f"WARNING: parallel.{kind}_model_parallel_size={size} puts ranks of one group on several "
        f"nodes of {gpus_per_node} GPUs: {what} crosses the network"
        for kind, size, what in kinds
        if nodes_crossed(size, world_size, parallel.pipeline_model_parallel_size, gpus_per_node)
    ]
    sections = (
        _model_lines(config),
        layout_lines(config, world_size),
        _parameter_lines(config, world_size),
        flops,
        memory,
        _capacity_lines(config),
        # Of pretraining: a task has heads and batches of its own.
        []
        if isinstance(config, FinetuneConfig)
        else collective_lines(config, world_size, precision),
        warnings,
    )
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def checkpoint_line(config: RunConfig, precision: Precision) -> str:
    """Size of a checkpoint, and what writing it takes of a host's memory."""
    size = checkpoint_bytes(config, precision)
    line = f"  a checkpoint has {size.stored / GIB:.2f} GiB"
    if not size.gathered:
        return f"{line}, and every rank writes its share"
    last = "the last one" if config.checkpoint.optimizer_format == "auto" else "it"
    return (
        f"{line}; for {last}, every rank gathers up to {size.gathered / GIB:.2f} GiB in host memory"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        return ("  " + "  ".join(cells)).rstrip()

    return [line(row) for row in (header, *rows)]


def block_ranges(numbers: Sequence[int]) -> str:
    """Ascending block numbers in short: `1-3, 6`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) or "none"


def _model_lines(config: RunConfig) -> list[str]:
    known, full = config.model, with_assumed_vocabularies(config).model
    first_vl = full.num_layers - full.num_vl_layers + 1
    vl = block_ranges(range(first_vl, full.num_layers + 1))

    def size(given: int, used: int) -> str:
        return f"{used:,}" if given else f"{used:,} (assumed; the tokenizer decides)"

    lines = [
        "Model",
        f"  {full.num_layers} blocks, hidden size {full.hidden_size}, "
        f"{full.num_attention_heads} heads, FFN {full.ffn_hidden_size}, VL-FFN in blocks {vl}",
        f"  tokens: text {full.text_length}, caption {full.pair_text_length}, "
        f"image {full.image_length} ({full.image_size} px, patches of {full.patch_size} px)",
        f"  vocabulary {size(known.vocab_size, full.vocab_size)}",
        f"  visual vocabulary {size(known.visual_vocab_size, full.visual_vocab_size)}",
    ]
    lines += implementation_lines(config)
    moe = config.moe
    numbers = moe_layer_numbers(full, moe)
    if numbers:
        pools = {p.name: p.num_experts for plan in block_plans(full, moe) for p in plan.pools}
        counts = ", ".join(f"{count} {name}" for name, count in pools.items())
        lines.append(f"  experts: {counts} in blocks {block_ranges(numbers)}; top {moe.topk}")
    else:
        lines.append("  no experts")
    return lines


def implementation_lines(config: RunConfig) -> list[str]:
    """Whose layers the blocks have, if not megatron-core's and torch's."""
    if config.model.transformer_impl == "local":
        return []
    where = " where installed, with a GPU" if config.model.transformer_impl == "auto" else ""
    in_fp8 = "" if config.train.fp8 == "none" else f", products in fp8 ({config.train.fp8})"
    return [f"  layers of transformer_engine{where}{in_fp8}; the parameters of local ones"]


def layout_lines(config: RunConfig, world_size: int) -> list[str]:
    """A heading, then sizes of the groups, of the step and of a micro-batch."""
    parallel, data = config.parallel, config.data
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    expert = parallel.expert_model_parallel_size
    data_size = data_parallel_size(config.parallel, world_size)
    count = num_micro_batches(config, data_size)
    stream = StreamLayout.of(config)
    virtual = parallel.virtual_pipeline_model_parallel_size
    interleaved = f" ({virtual} virtual stages each)" if virtual > 1 else ""
    names = ("texts", "images", "pairs")
    whole = " + ".join(
        f"{getattr(data, f'global_{n}') if getattr(data, f'micro_{n}') else 0:,} {n}" for n in names
    )
    micro = " + ".join(f"{getattr(data, f'micro_{n}')} {n}" for n in names)
    lines = [
        f"Layout of {world_size} rank(s), order tp-cp-ep-dp-pp",
        f"  TP {tensor} x PP {pipeline}{interleaved} x DP {data_size}; "
        f"EP {expert}, expert DP {world_size // (pipeline * expert)}",
        f"  step: {whole}",
        f"  micro-batch: {micro} = {stream.num_tokens:,} token slots; "
        f"{count} micro-batch(es) per step and rank",
        f"  tokens per step: {stream.num_tokens * count * data_size:,}",
    ]
    if config.objectives.kind == "contrastive":
        lines.append(f"  every pair is told from the others of {data.micro_pairs * data_size:,}")
    return lines


def parameter_summary(counts: ParameterCounts) -> list[str]:
    """All parameters, and those of one token."""
    return [
        "Parameters",
        f"  total {counts.total:,}, per token of a pair {counts.per_token:,}",
    ]


def collective_lines(config: RunConfig, world_size: int, precision: Precision) -> list[str]:
    """What a rank of every stage sends in a step, as a table; empty for one rank."""
    rows = []
    for stage in range(config.parallel.pipeline_model_parallel_size):
        for found in collectives_per_step(config, world_size, precision, stage):
            rows.append(
                (
                    f"{found.what}: {found.operation}",
                    f"{stage}",
                    f"{found.size} {found.group}",
                    f"{found.calls:,}",
                    f"{found.bytes / 1e6:,.3f}",
                    f"{found.sent / 1e6:,.3f}",
                )
            )
    if not rows:
        return []
    return [
        "Collectives of a rank in one step, in MB: the tensors, and what it sends of them",
        *table(("collective", "stage", "ranks", "calls", "tensors", "sent"), rows),
    ]


def _parameter_lines(config: RunConfig, world_size: int) -> list[str]:
    counts = parameter_counts(config)
    shown = {"positions": "positions, special", "norms": "LayerNorm, LayerScale"}
    listed = [
        (shown.get(part, part.replace(" ffn", " FFN")), f"{number:,}")
        for part, number in sorted(counts.parts.items(), key=lambda entry: part_order(entry[0]))
    ]
    listed += [
        ("total", f"{counts.total:,}"),
        ("without heads", f"{counts.without_heads:,}"),
        ("per token of a pair", f"{counts.per_token:,}"),
    ]
    lines = ["Parameters", *table(("part", "number"), listed)]
    rows = [
        (
            f"{stage.stage}",
            block_ranges(stage.blocks),
            f"{stage.replicated + stage.tensor:,}",
            f"{stage.experts:,}",
            f"{stage.total:,}",
        )
        for stage in parameters_per_rank(config, world_size)
    ]
    header = ("stage", "blocks", "dense", "experts", "total")
    return [*lines, "", "Parameters per rank", *table(header, rows)]


def _capacity_lines(config: RunConfig) -> list[str]:
    moe, tensor = config.moe, config.parallel.tensor_model_parallel_size
    layout = StreamLayout.of(config).shard(tensor)
    blocks: dict[tuple[Branch, int], list[int]] = {}
    for plan in block_plans(config.model, moe):
        for pool in plan.pools:
            blocks.setdefault((pool, pool.num_tokens(layout)), []).append(plan.layer_number)
    if not blocks:
        return []

    def slots(pool: Branch, tokens: int, factor: float) -> str:
        if moe.dispatcher == "dropless" or factor <= 0.0:
            return "no limit"
        multiple_of = moe.capacity_multiple_of
        return f"{expert_capacity(tokens, pool.num_experts, moe.topk, factor, multiple_of):,}"

    rows = [
        (
            pool.name,
            block_ranges(numbers),
            f"{pool.num_experts}",
            f"{tokens:,}",
            slots(pool, tokens, moe.capacity_factor),
            slots(pool, tokens, moe.eval_capacity_factor),
        )
        for (pool, tokens), numbers in blocks.items()
    ]
    header = ("pool", "blocks", "experts", "token slots", "train", "eval")
    padding = "padding is routed" if moe.route_padding else "padding has slots, but is not routed"
    return [f"Expert capacity per TP rank and micro-batch; {padding}", *table(header, rows)]


def nodes_crossed(group_size: int, world_size: int, stages: int, gpus_per_node: int) -> bool:
    """Whether any group of consecutive ranks of a pipeline stage has ranks on two nodes.

    Ranks are in megatron-core's order tp-cp-ep-dp-pp. As expert tensor parallel size is 1, EP
    groups are consecutive ranks of a stage, like TP groups: the two overlap, they do not multiply.

    Raises:
        ConfigError: if a node has no GPU.
    """
    if gpus_per_node < 1:
        raise ConfigError(f"{gpus_per_node} GPUs per node: must be at least 1")
    per_stage = world_size // stages
    for first_of_stage in range(0, world_size, per_stage):
        for first in range(first_of_stage, first_of_stage + per_stage, group_size):
            if first // gpus_per_node != (first + group_size - 1) // gpus_per_node:
                return True
    return False
