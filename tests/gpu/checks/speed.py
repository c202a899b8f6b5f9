"""Steps of presets against each other, and the image tokenizer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from checks.report import Report, milliseconds, wait
from checks.tokenizer import pictures, placed_tokenizer
from megatron_vlmoe.benchmarks import step as benchmark
from megatron_vlmoe.benchmarks.step import StepOptions, step_config
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.planning.estimate import memory_per_rank
from megatron_vlmoe.runtime.distributed import destroy, device, initialize, resolve_precision
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.tokenizers.vqkd.config import build_preset
from megatron_vlmoe.tokenizers.vqkd.model import build_model
from megatron_vlmoe.train import setup
from megatron_vlmoe.train.pretrain import pretraining_objective
from megatron_vlmoe.train.step import StepRunner

TOP_KERNELS = 15
# What the estimate of a plan may be off by. State is arithmetic; activations depend on the kernels.
STATE_TOLERANCE, TOTAL_TOLERANCE = 0.02, 0.3


def bench(report: Report) -> None:
    """Steps of two pairs of presets, memory beside the estimate of `--dry-run`, and a profile of one step."""
    rounds = report.size({"small": 2, "base": 1}, {"tiny": 1})
    with mock.patch.object(setup, "initialize_parameters", _draw_weights):
        for size, number in rounds.items():
            _pair(report, size, number)
        # That of small-32e, whose kernels are small: launches count.
        _profile(report, report.size("small-32e", "tiny-8e"))
    if not report.on_gpu:
        report.left_out("kernels, times and memory of a GPU")


@torch.no_grad()
def _draw_weights(chunks: Sequence[Any], *unused: Any) -> None:
    """Stands for the keyed draws of a run, which take minutes for 10^9 weights: any will do where time is measured."""
    for chunk in chunks:
        chunk.to(device())
        for name, parameter in chunk.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _options(report: Report, presets: Sequence[str], rounds: int) -> StepOptions:
    samples = report.size(64, 4)
    return StepOptions(
        presets=list(presets),
        plain=False,
        texts=samples,
        images=samples,
        pairs=samples,
        rounds=rounds,
        steps=report.size(4, 1),
        warmup=report.size(2, 0),
        precision="bf16",
        vocab_size=report.size(64_000, 1_000),
        visual_vocab_size=report.size(8_192, 512),
        caption_mask_slots=16,
    )


def _pair(report: Report, size: str, rounds: int) -> None:
    """Times and memory of the dense preset of a size and of its sparse one."""
    presets = [f"{size}-dense", f"{size}-{report.size('32e', '8e')}"]
    options = _options(report, presets, rounds)
    (rows,) = benchmark.run(options, [])
    for row in rows:
        name = row.contender
        estimate = memory_per_rank(step_config(options, name, [], 1), 1, "bf16")[0]
        state = estimate.weights + estimate.gradients + estimate.optimizer
        held, rise = 1e6 * (row.state_mb or 0.0), 1e6 * (row.peak_mb or 0.0)
        total = held + rise
        report.note(
            **{
                name: {
                    **row.record(),
                    "estimated_state_mb": state / 1e6,
                    "estimated_activations_mb": (estimate.total - state) / 1e6,
                }
            }
        )
        off = held / state - 1.0
        report.expect(
            abs(off) < STATE_TOLERANCE, f"{name}: state is {100 * off:+.1f} % of the estimate"
        )
        off = total / estimate.total - 1.0
        # The resident set of a process says little at the sizes of a rehearsal.
        good = not report.on_gpu or abs(off) < TOTAL_TOLERANCE
        report.expect(good, f"{name}: memory is {100 * off:+.1f} % of the estimate")


def _profile(report: Report, preset: str) -> None:
    """Kernels of one whole step after some others, and how much of the step the GPU works."""
    options = _options(report, [preset], 1)
    config = step_config(options, preset, [], 1)
    ranks = initialize(config.parallel, config.train.seed)
    try:
        parts = setup.build_training(config, resolve_precision(config.train))
        runner: Any = StepRunner(config, parts, ranks)
        objective: Any = pretraining_objective(config, ranks)
        batch: Any = next(RandomData(config, BatchShare.of(ranks)).loader("train", 0, 1))

        def step() -> None:
            runner.start_step()
            runner.train(iter([batch]), 1, objective)
            parts.optimizer.step()

        for _ in range(report.size(3, 1)):
            step()
        wait()
        start = time.perf_counter()
        step()
        wait()
        seconds = time.perf_counter() - start
        activities = [torch.profiler.ProfilerActivity.CPU]
        if report.on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiler:
            step()
            wait()
    finally:
        destroy()
    profiler.export_chrome_trace(str(report.path.with_name("bench_trace.json.gz")))
    events: list[Any] = list(profiler.key_averages())
    if report.on_gpu:
        # Kernels alone: operators have their kernels' time, too.
        events = [own for own in events if own.device_type == torch.autograd.DeviceType.CUDA]
    time_of = "self_device_time_total" if report.on_gpu else "self_cpu_time_total"
    events.sort(key=lambda own: -getattr(own, time_of))
    busy = sum(getattr(own, time_of) for own in events) / 1e6
    report.note(
        profile={
            "preset": preset,
            "step_ms": 1e3 * seconds,
            "kernels": sum(own.count for own in events),
            "busy_ms": 1e3 * busy,
            "busy_share": busy / seconds,
            "top": [
                [own.key[:90], own.count, round(getattr(own, time_of) / 1e3, 3)]
                for own in events[:TOP_KERNELS]
            ],
        }
    )
    report.expect(len(events) > 10 and busy > 0.0, "the profile is empty")


def image_tokenizer(report: Report) -> None:
    """The base tokenizer with random weights in fp32, TF32 and bf16: time of a batch, and how many codes agree."""
    preset, samples = report.size(("base", 128), ("tiny", 8))
    config = build_preset(preset)
    pixels = pictures(samples, config.image_size, config.grid).to(report.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    weights = placed_tokenizer(preset, pixels).state_dict()

    def tokenizer(place: str, dtype: torch.dtype = torch.float32) -> ImageTokenizer:
        model = build_model(config)
        model.load_state_dict(weights)
        return ImageTokenizer(model, device=place, dtype=dtype)

    codes: dict[str, Tensor] = {}
    times = {}
    for name, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
        model = tokenizer(report.device, dtype)
        codes[name] = model.encode(pixels).cpu()
        times[name] = milliseconds(lambda model=model: model.encode(pixels), 3, 1)
    few = 4
    on_cpu = tokenizer("cpu").encode(pixels[:few].cpu())
    agreement = {name: _share(own, codes["fp32"]) for name, own in codes.items()}
    agreement["fp32 on CPU"] = _share(codes["fp32"][:few], on_cpu)
    # A batch of another size.
    model = tokenizer(report.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    agreement["fp32 in small batches"] = _share(
        codes["fp32"][:few], model.encode(pixels[:few]).cpu()
    )
    different = len(codes["fp32"].unique())
    report.note(images=samples, ms=times, agreement=agreement, codes_in_use=different)
    # Codes drawn from the patches themselves are often almost equally near, more than those of a trained tokenizer.
    least = {"tf32": 0.9, "bf16": 0.7, "fp32 on CPU": 0.99, "fp32 in small batches": 0.99}
    for name, share in least.items():
        report.expect(agreement[name] >= share, f"{name}: {agreement[name]:.3f} of the codes agree")
    report.expect(different >= 16, f"only {different} codes are used: agreement means nothing")
    if not report.on_gpu:
        report.left_out("TF32, times of a GPU")


def _share(codes: Tensor, expected: Tensor) -> float:
    """Share of equal codes."""
    return float((codes == expected).double().mean())
