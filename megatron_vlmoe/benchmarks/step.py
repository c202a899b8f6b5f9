"""Training steps of presets against each other, plain PyTorch and transformers, on random data, and where time goes.

The optimizer is timed apart: its work grows with the parameters, the forward and backward pass should not.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal, NamedTuple, Optional, Sequence

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from torch import Tensor, nn
from torch.profiler import profile, record_function

from megatron_vlmoe.benchmarks.compare import (
    Contender,
    NotRun,
    Row,
    Work,
    compare,
    device_name,
    now,
)
from megatron_vlmoe.benchmarks.plain_model import PLAIN_LAYERS, Layers, PlainModel
from megatron_vlmoe.benchmarks.transformers_model import check, transformers_layers
from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.model.embeddings import StreamEmbedding
from megatron_vlmoe.model.heads import Heads
from megatron_vlmoe.model.norm import LayerNorm
from megatron_vlmoe.model.vlmoe import DTYPES
from megatron_vlmoe.moe.experts import ExpertPool
from megatron_vlmoe.moe.layer import ModalityMoELayer
from megatron_vlmoe.moe.router import ModalityRouter
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    barrier,
    destroy,
    device,
    initialize,
    is_rank_zero,
    resolve_precision,
)
from megatron_vlmoe.stream.batch import Batch, map_values
from megatron_vlmoe.stream.block_plan import has_experts
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.pretrain import pretraining_objective
from megatron_vlmoe.train.setup import TrainingParts, build_training
from megatron_vlmoe.train.step import StepRunner

PLAIN, TRANSFORMERS = "plain_pytorch", "transformers_layers"
# Whose time is whose, of modules that hold each other the innermost.
PARTS: tuple[tuple[type[nn.Module], str], ...] = (
    (SelfAttention, "attention"),
    (LayerNorm, "norms"),
    (MLP, "dense FFN"),
    (ModalityMoELayer, "dispatch"),
    (ModalityRouter, "router"),
    (ExpertPool, "experts"),
    (StreamEmbedding, "embeddings"),
    (Heads, "heads"),
)
REST = "residuals and the rest"


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What to measure; `vlmoe bench step --help` explains the numbers. Ratios refer to the first of the presets."""

    presets: Sequence[str]
    plain: bool
    texts: int
    images: int
    pairs: int
    rounds: int
    steps: int
    warmup: int
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    vocab_size: int
    visual_vocab_size: int
    caption_mask_slots: int
    transformers: bool = False
    experts: int = 0


class Held(NamedTuple):
    """What a contender holds between steps, on this rank.

    Args:
        parameters: their number.
        state: bytes of parameters, gradients and optimizer state.
    """

    parameters: int
    state: int

    @classmethod
    def of(cls, parameters: Iterable[Tensor], state: Iterable[Tensor]) -> Held:
        """Counts; storage that several tensors share counts once."""
        storages = [tensor.untyped_storage() for tensor in state]
        nbytes = {own.data_ptr(): own.nbytes() for own in storages}
        return cls(sum(own.numel() for own in parameters), sum(nbytes.values()))


def step_config(options: StepOptions, name: str, extra: Sequence[str], data_size: int) -> RunConfig:
    """The run of a preset, with `extra` options on top and one micro-batch per step and data-parallel rank.

    Raises:
        ConfigError: if the preset or an option is unknown.
    """
    sizes = {
        "train.precision": options.precision,
        "model.vocab_size": options.vocab_size,
        "model.visual_vocab_size": options.visual_vocab_size,
    }
    for kind in ("texts", "images", "pairs"):
        sizes[f"data.micro_{kind}"] = getattr(options, kind)
        sizes[f"data.global_{kind}"] = getattr(options, kind) * data_size
    words = [word for option, size in sizes.items() for word in (f"--{option}", str(size))]
    config = parse_run("pretrain", ["--preset", name, *extra, *words]).config
    if not has_experts(config.moe):
        # Beside a sparse model whose experts are spread over ranks, each of these has the whole dense one.
        parallel = replace(config.parallel, expert_model_parallel_size=1)
        config = replace(config, parallel=parallel)
    elif number := options.experts:
        moe = replace(config.moe, num_vision_experts=number, num_text_experts=number)
        config = replace(config, moe=moe)
    masked = config.objectives.num_masked_patches or int(0.4 * config.model.num_patches)
    slots = min(options.caption_mask_slots, config.model.pair_text_length - 2)
    objectives = replace(config.objectives, num_masked_patches=masked, caption_mask_slots=slots)
    return replace(config, objectives=objectives)


def run(options: StepOptions, extra: Sequence[str]) -> Iterator[list[Row]]:
    """Gives every preset its turn, round after round; rows come on the first rank.

    `extra` are command line options for every preset.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with _started(options, extra) as (ranks, configs):
        rows = _measure(options, extra, ranks, configs)
        reports = is_rank_zero()
    if reports:
        yield rows


def _batch_shape(config: RunConfig) -> tuple[StreamLayout, int, int]:
    """What batches must have in common, so that two presets read the same."""
    objectives = config.objectives
    return StreamLayout.of(config), objectives.num_masked_patches, objectives.caption_mask_slots


def _measure(
    options: StepOptions, extra: Sequence[str], ranks: Ranks, configs: dict[str, RunConfig]
) -> list[Row]:
    first = configs[options.presets[0]]
    for name, config in configs.items():
        validate(config, ranks.world_size)
        if _batch_shape(config) != _batch_shape(first):
            raise ConfigError(
                f"--preset {name}: reads batches of other shapes than {options.presets[0]}: measure it apart"
            )
    # The same batches for every preset and turn, made outside the clock.
    data = RandomData(first, BatchShare.of(ranks))
    batches = list(data.loader("train", 0, options.warmup + options.steps))
    held: dict[str, Held] = {}
    contenders = [
        Contender(name, functools.partial(_preset_steps, name, config, ranks, batches, held))
        for name, config in configs.items()
    ]
    makers: dict[str, Callable[[], Layers]] = {}
    if options.plain:
        makers[PLAIN] = lambda: PLAIN_LAYERS
    if options.transformers:
        makers[TRANSFORMERS] = transformers_layers
        # Where it is not installed, its row says so.
        with contextlib.suppress(NotRun):
            check(first, batches[0])
    contenders += [
        Contender(name, functools.partial(_plain_steps, name, first, make, batches, held))
        for name, make in makers.items()
    ]
    case = {
        "preset": options.presets[0].split("-")[0],
        "texts": options.texts,
        "images": options.images,
        "pairs": options.pairs,
        "precision": resolve_precision(first.train),
        **({"experts": options.experts} if options.experts else {}),
        **({"options": " ".join(extra)} if extra else {}),
    }
    rows = compare(
        case,
        contenders,
        reference=options.presets[0],
        rounds=options.rounds,
        turn_seconds=0.0,
        repetitions=options.steps,
        warmup=options.warmup,
        items=StreamLayout.of(first).num_tokens * ranks.data_size,
    )
    for row in rows:
        if own := held.get(row.contender):
            row.parameters, row.state_mb = own.parameters, own.state / 1e6
    return rows


@contextlib.contextmanager
def _started(
    options: StepOptions, extra: Sequence[str]
) -> Iterator[tuple[Ranks, dict[str, RunConfig]]]:
    """Process groups for all presets, which end with the context; the ranks and the run of every preset."""
    alone = [step_config(options, name, extra, 1) for name in options.presets]
    # That of a sparse preset, where there is one.
    widest = max(alone, key=lambda config: config.parallel.expert_model_parallel_size)
    ranks = initialize(widest.parallel, widest.train.seed)
    try:
        size = ranks.data_size
        yield ranks, {name: step_config(options, name, extra, size) for name in options.presets}
    finally:
        destroy()


@contextlib.contextmanager
def _training(config: RunConfig, ranks: Ranks) -> Iterator[tuple[TrainingParts, StepRunner, Any]]:
    """The model of a run, its runner and its objective; their memory is given back at the end."""
    objective = pretraining_objective(config, ranks)
    parts = build_training(config, resolve_precision(config.train))
    try:
        yield parts, StepRunner(config, parts, ranks), objective
    finally:
        # Dropping the objects is not enough: megatron-core's gradient hooks hold them from inside autograd's graph,
        # where the garbage collector does not see the cycle.
        for tensor in _state_tensors(parts):
            tensor.untyped_storage().resize_(0)


@contextlib.contextmanager
def _preset_steps(
    name: str,
    config: RunConfig,
    ranks: Ranks,
    batches: Sequence[Batch],
    held: dict[str, Held],
) -> Iterator[Work]:
    """Steps of a preset, which every rank starts at the same time; notes what it holds by its name."""
    with _training(config, ranks) as (parts, runner, objective):
        upcoming = _endless(batches)

        def step() -> dict[str, float]:
            barrier()
            start = now()
            runner.start_step()
            runner.train(upcoming, 1, objective)
            middle = now()
            parts.optimizer.step()
            end = now()
            for chunk in parts.chunks:
                for module in chunk.modules():
                    if isinstance(module, ModalityRouter):
                        module.recorder.take()
            return {"forward + backward": middle - start, "optimizer": end - middle}

        yield step
        parameters = (own for chunk in parts.chunks for own in chunk.parameters())
        held[name] = Held.of(parameters, _state_tensors(parts))


@contextlib.contextmanager
def _plain_steps(
    name: str,
    config: RunConfig,
    layers: Callable[[], Layers],
    batches: Sequence[Batch],
    held: dict[str, Held],
) -> Iterator[Work]:
    """Steps of the same dense model in plain PyTorch, with layers of that or another library."""
    precision = resolve_precision(config.train)
    dtype = DTYPES[precision] if precision != "fp16" else torch.float32
    torch.manual_seed(1)
    with torch.device(device()):
        model = PlainModel(config, layers()).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    upcoming = _endless(batches)

    def step() -> dict[str, float]:
        batch = map_values(next(upcoming), lambda value: value.to(device()))
        start = now()
        optimizer.zero_grad()
        model(batch).backward()
        middle = now()
        nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_grad)
        optimizer.step()
        return {"forward + backward": middle - start, "optimizer": now() - middle}

    yield step
    state = [*model.parameters(), *(own.grad for own in model.parameters() if own.grad is not None)]
    for own in optimizer.state.values():
        state += [value for value in own.values() if torch.is_tensor(value)]
    held[name] = Held.of(model.parameters(), state)


def _endless(batches: Sequence[Batch]) -> Iterator[Batch]:
    while True:
        yield from batches


def where_time_goes(options: StepOptions, config: RunConfig, ranks: Ranks) -> dict[str, float]:
    """Milliseconds of a step by part of the model, forward and backward together.

    From torch's profiler: an operation belongs to the innermost module of `PARTS` around it, and what the backward pass
    computes to the operation of the forward pass that it differentiates. On a GPU these are the times of kernels.
    """
    data = RandomData(config, BatchShare.of(ranks))
    batches = list(data.loader("train", 0, options.warmup + 1))
    with _training(config, ranks) as (parts, runner, objective):
        handles = [
            handle
            for chunk in parts.chunks
            for module in chunk.modules()
            for kind, part in PARTS
            if isinstance(module, kind)
            for handle in _mark(module, part)
        ]

        def step(batch: Batch) -> None:
            with record_function("part:zero gradients"):
                runner.start_step()
            runner.train(iter([batch]), 1, objective)
            with record_function("part:optimizer"):
                parts.optimizer.step()

        for batch in batches[:-1]:
            step(batch)
        with profile() as found:
            step(batches[-1])
        for handle in handles:
            handle.remove()
        return _by_part(found.events())


def _mark(module: nn.Module, part: str) -> Iterator[Any]:
    """Names the module's forward pass in the profile."""
    open_ranges: list[Any] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(f"part:{part}"))
        open_ranges[-1].__enter__()

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave)


def _by_part(events: Any) -> dict[str, float]:
    cuda = torch.cuda.is_available()
    part_of_sequence: dict[int, str] = {}
    times: Counter[str] = Counter()

    def part_of(event: Any) -> Optional[str]:
        while event is not None:
            if event.name.startswith("part:"):
                return str(event.name[5:])
            event = event.cpu_parent
        return None

    def sequence_of(event: Any) -> int:
        while event is not None:
            if event.name.startswith("autograd::engine::evaluate_function"):
                return int(event.sequence_nr)
            event = event.cpu_parent
        return -1

    backward = []
    for event in events:
        if event.name.startswith("part:"):
            continue
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        part = part_of(event)
        if part is None and (sequence := sequence_of(event)) >= 0:
            backward.append((sequence, own))
            continue
        if event.sequence_nr >= 0 and part is not None:
            part_of_sequence.setdefault(event.sequence_nr, part)
        times[part or REST] += own / 1e3
    for sequence, own in backward:
        times[part_of_sequence.get(sequence, REST)] += own / 1e3
    return dict(times)


def _state_tensors(parts: Any) -> Iterator[Tensor]:
    for chunk in parts.chunks:
        yield from chunk.parameters()
        yield from chunk.buffers()
    for chunk in parts.wrapped:
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            yield from (t for t in (buffer.param_data, buffer.grad_data) if t is not None)
    for optimizer in getattr(parts.optimizer, "chained_optimizers", [parts.optimizer]):
        if optimizer.optimizer is None:
            continue
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


def draw_parts(options: StepOptions, extra: Sequence[str], path: Path) -> None:
    """A picture of where a step's time goes on the first rank: a bar for each preset, stacked by part."""
    with _started(options, extra) as (ranks, configs):
        times = {name: where_time_goes(options, own, ranks) for name, own in configs.items()}
        draws = is_rank_zero()
    if not draws:
        return
    parts = list(dict.fromkeys(part for own in times.values() for part in own))
    parts.sort(key=lambda part: -sum(own.get(part, 0.0) for own in times.values()))
    figure = Figure(figsize=(9, 1.2 + 0.6 * len(times)), layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab20"]
    starts = dict.fromkeys(times, 0.0)
    for number, part in enumerate(parts):
        widths = [own.get(part, 0.0) for own in times.values()]
        left = list(starts.values())
        axes.barh(list(times), widths, left=left, label=part, color=colours(number % 20))
        for name, width in zip(times, widths):
            starts[name] += width
    axes.invert_yaxis()
    axes.set_xlabel(f"milliseconds of a step, {device_name()}")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
