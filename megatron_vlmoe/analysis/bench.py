"""Step times of presets against each other: full training steps on random data.

The presets take turns within one run (A B C A B C ...), so that a busy machine slows all of them alike, and
every ratio is taken within a round. A preset is built for its turn and given up after it, so that the run needs
the memory of its largest preset and not of all together. The optimizer is timed apart: its work grows with the
parameters, the forward and backward pass should not.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Callable, Iterator, Literal, Mapping, Optional, Sequence

import torch
from torch import Tensor

from megatron_vlmoe.config.command_line import parse_run
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.distributed import (
    Ranks,
    barrier,
    destroy,
    initialize,
    is_rank_zero,
    resolve_precision,
)
from megatron_vlmoe.runtime.files import write_text_atomic
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.train.pretrain import pretraining_objective
from megatron_vlmoe.train.setup import build_training
from megatron_vlmoe.train.step import StepRunner


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure; `vlmoe bench --help` explains the numbers. Ratios refer to the first of the presets."""

    presets: Sequence[str]
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


@dataclass
class PresetTimes:
    """Measurements of one preset, one entry per round.

    Args:
        parameters: parameters of this rank.
        resident_bytes: parameters, gradient buffers and optimizer state of this rank.
        forward_backward: wall seconds.
        optimizer: wall seconds.
        processor: processor seconds of forward and backward (all threads; meaningful on CPU only).
        activation_bytes: rise of memory within one forward and backward pass after the timed rounds: of the
            allocator's peak on GPU, of the process's resident set on CPU (0 where the system does not tell).
    """

    parameters: int
    resident_bytes: int = 0
    activation_bytes: int = 0
    forward_backward: list[float] = field(default_factory=list)
    optimizer: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def bench_config(
    options: BenchOptions, name: str, extra: Sequence[str], data_size: int
) -> RunConfig:
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
    masked = config.objectives.num_masked_patches or int(0.4 * config.model.num_patches)
    slots = min(options.caption_mask_slots, config.model.pair_text_length - 2)
    objectives = replace(config.objectives, num_masked_patches=masked, caption_mask_slots=slots)
    return replace(config, objectives=objectives)


def bench(
    options: BenchOptions, extra: Sequence[str], threads: int = 0, output: Optional[Path] = None
) -> None:
    """Gives every preset its turn, round after round; prints the table, writes the JSON after every round.

    A run that is cut off leaves its finished rounds. `extra` are command line options for every preset; 0 CPU threads
    leave torch's number.
    """
    if threads:
        torch.set_num_threads(threads)
    first = bench_config(options, options.presets[0], extra, 1)
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    ranks = initialize(first.parallel, first.train.seed)
    configs = {n: bench_config(options, n, extra, ranks.data_size) for n in options.presets}
    for config in configs.values():
        validate(config, ranks.world_size)
    # The same batches for every preset and turn, made outside the clock.
    data = RandomData(configs[options.presets[0]], BatchShare.of(ranks))
    batches = list(data.loader("train", 0, options.warmup + options.steps))
    times: dict[str, PresetTimes] = {}
    for number in range(options.rounds):
        for name, config in configs.items():
            own = _turn(options, config, ranks, batches, times.get(name))
            times[name] = own
            if is_rank_zero():
                print(
                    f"round {number + 1}/{options.rounds}: {name} ({own.parameters / 1e6:.1f} M parameters per "
                    f"rank) {own.forward_backward[-1]:.2f} s ({own.processor[-1]:.2f} s CPU), "
                    f"optimizer {own.optimizer[-1]:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
        if is_rank_zero() and output:
            write_text_atomic(output, json.dumps(summarize(options, times, first), indent=2))
    if is_rank_zero():
        print("\n".join(table(summarize(options, times, first))))
    destroy()


def _turn(
    options: BenchOptions,
    config: RunConfig,
    ranks: Ranks,
    batches: Sequence[Batch],
    times: Optional[PresetTimes],
) -> PresetTimes:
    """Builds a preset, measures its steps, each of which every rank starts at the same time, and frees its memory."""
    objective = pretraining_objective(config, ranks)
    parts = build_training(config, resolve_precision(config.train))
    runner = StepRunner(config, parts, ranks)

    def forward_backward(batch: Batch) -> None:
        runner.start_step()
        runner.train(iter([batch]), 1, objective)

    def discard_statistics() -> None:
        for chunk in parts.chunks:
            for module in chunk.modules():
                recorder = getattr(module, "recorder", None)
                if recorder is not None:
                    recorder.take()

    seconds = []
    for batch in batches:
        barrier()
        processor = time.process_time()
        start = _now()
        forward_backward(batch)
        middle = _now()
        processor = time.process_time() - processor
        parts.optimizer.step()
        seconds.append((middle - start, _now() - middle, processor))
        discard_statistics()
    first = times is None
    times = times or PresetTimes(
        sum(p.numel() for chunk in parts.chunks for p in chunk.parameters())
    )
    columns = (times.forward_backward, times.optimizer, times.processor)
    for column, values in zip(columns, zip(*seconds[options.warmup :])):
        column.append(statistics.median(values))
    if first:
        # One more pass, apart from the clock: handing memory back slows it down.
        barrier()
        times.activation_bytes = _memory_rise(lambda: forward_backward(batches[-1]))
        # Storage that several tensors share counts once.
        storages = [tensor.untyped_storage() for tensor in _state_tensors(parts)]
        times.resident_bytes = sum({own.data_ptr(): own.nbytes() for own in storages}.values())
        discard_statistics()
    # Dropping the objects is not enough: megatron-core's gradient hooks hold them from inside autograd's graph, where
    # the garbage collector does not see the cycle.
    for tensor in _state_tensors(parts):
        tensor.untyped_storage().resize_(0)
    _give_memory_back()
    return times


def summarize(options: BenchOptions, times: Mapping[str, PresetTimes], config: RunConfig) -> dict:
    """Medians and ratios to the first preset, as JSON types."""
    tokens = StreamLayout.of(config).num_tokens
    first, cuda = times[options.presets[0]], torch.cuda.is_available()
    presets = {}
    for name, own in times.items():
        forward_backward = statistics.median(own.forward_backward)
        optimizer = statistics.median(own.optimizer)
        presets[name] = {
            **asdict(own),
            "forward_backward_seconds": forward_backward,
            "optimizer_seconds": optimizer,
            "tokens_per_second_per_data_rank": tokens / (forward_backward + optimizer),
            "peak_bytes": own.resident_bytes + own.activation_bytes,
            "ratio_of_rounds": _ratio(own.forward_backward, first.forward_backward),
            "ratio_of_medians": forward_backward / statistics.median(first.forward_backward),
            "processor_ratio_of_rounds": _ratio(own.processor, first.processor),
        }
    return {
        "options": asdict(options),
        "precision": resolve_precision(config.train),
        "tokens": tokens,
        # Device and versions, to be kept with every figure.
        "environment": {
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": version("megatron-core"),
        },
        "presets": presets,
    }


def table(summary: Mapping[str, Any]) -> Iterator[str]:
    """The summary for people, line by line."""
    about = summary["environment"]
    options = summary["options"]
    rounds = len(next(iter(summary["presets"].values()))["forward_backward"])
    yield (
        f"{about['device']}, {about['threads']} thread(s), torch {about['torch']}, "
        f"megatron-core {about['megatron_core']}, load average {about['load_average']:.1f}"
    )
    yield (
        f"{options['texts']} texts + {options['images']} images + {options['pairs']} pairs "
        f"({summary['tokens']} tokens), {summary['precision']}, median of {rounds} round(s)"
    )
    columns = ("params", "fwd+bwd", "optimizer", "tokens/s", "state", "activations")
    ratios = ("ratio", "of medians", "CPU time")
    header = "".join(f"{name:>12}" for name in columns + ratios)
    yield f"{'preset':<14}{header}"
    for name, row in summary["presets"].items():
        cells = (
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['forward_backward_seconds']:.3f} s",
            f"{row['optimizer_seconds']:.3f} s",
            f"{row['tokens_per_second_per_data_rank']:.0f}",
            f"{row['resident_bytes'] / 1e9:.2f} GB",
            f"{row['activation_bytes'] / 1e9:.2f} GB",
            f"{row['ratio_of_rounds']:.3f}",
            f"{row['ratio_of_medians']:.3f}",
            f"{row['processor_ratio_of_rounds']:.3f}",
        )
        yield f"{name:<14}" + "".join(f"{cell:>12}" for cell in cells)
    yield (
        f"ratios are of forward + backward to {options['presets'][0]}: median over rounds, of wall medians, "
        "and of processor time (CPU runs)"
    )


def _memory_rise(work: Callable[[], None]) -> int:
    """Peak memory during some work above the level before it; 0 where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - start
    # Else the resident set would hide what the work allocates.
    _give_memory_back()
    try:
        # Linux: sets the peak of the resident set back to its present size.
        Path("/proc/self/clear_refs").write_text("5")
        start = _peak_resident()
    except OSError:
        work()
        return 0
    work()
    return _peak_resident() - start


def _give_memory_back() -> None:
    """Returns what is no longer in use to the system: allocators keep freed memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return
    # Another C library than glibc has no malloc_trim, and needs none.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _ratio(own: Sequence[float], first: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(own, first, strict=True))


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
