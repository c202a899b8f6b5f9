"""The MoE layer and small functions of a block: dispatchers, other implementations, torch.compile, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from checks.report import Report, difference, identical, milliseconds
from checks.steps import graph_times
from megatron_vlmoe.benchmarks import moe_layer as benchmark
from megatron_vlmoe.benchmarks.compare import NotRun as NotMeasured
from megatron_vlmoe.config.schema import ParallelConfig
from megatron_vlmoe.model.block import add_branch
from megatron_vlmoe.model.heads import cross_entropy
from megatron_vlmoe.model.vlmoe import DTYPES
from megatron_vlmoe.moe.aux_losses import compute_router_statistics, losses_from_statistics
from megatron_vlmoe.moe.experts import batched, bias_gelu
from megatron_vlmoe.moe.routing_ops import route_slots, top_k_experts
from megatron_vlmoe.runtime.distributed import destroy, initialize

# Tokens of every expert: none, one, odd numbers, and more than one tile of a matmul.
COUNTS = (0, 1, 7, 129, 255, 301, 128, 203)
# Of the layer, in their order.
PARAMETERS = ("router", "weight1", "bias1", "weight2", "bias2")
TERMS = ("importance", "load", "z", "gshard")


@contextmanager
def _groups() -> Iterator[None]:
    initialize(ParallelConfig(), 1)
    try:
        yield
    finally:
        destroy()


def _uneven(width: int, topk: int, dtype: torch.dtype) -> benchmark.Problem:
    """A problem whose experts have COUNTS tokens as first choices, and the first none at all."""
    case = benchmark.Case(sum(COUNTS), width, len(COUNTS), topk, "balanced")
    base = benchmark.make_problem(case, dtype)
    generator = torch.Generator().manual_seed(2)
    first = torch.repeat_interleave(torch.arange(len(COUNTS)), torch.tensor(COUNTS))
    first = first[torch.randperm(len(first), generator=generator)]
    # The second choice is the next one of the experts from 1 on.
    chosen = torch.stack([first, first % (len(COUNTS) - 1) + 1], dim=1)[:, :topk]
    logits = torch.zeros(len(first), len(COUNTS))
    logits.scatter_(1, chosen, torch.tensor(benchmark.CHOSEN_LOGITS[:topk]).expand_as(chosen))
    router = base.router.cpu().float()
    tokens = torch.randn(len(first), width, generator=generator)
    tokens += (logits - tokens @ router.T) @ router
    load = torch.bincount(chosen.flatten(), minlength=len(COUNTS))
    assert int(load[0]) == 0 and (topk > 1 or tuple(load.tolist()) == COUNTS)
    place = base.tokens.device
    return base._replace(
        tokens=tokens.to(place, dtype),
        expert=chosen.to(place),
        gate=torch.softmax(logits, dim=1).gather(1, chosen).to(place),
        capacity_factor=float(load.max()) * len(COUNTS) / (len(first) * topk),
    )


def dispatchers(report: Report) -> None:
    """Output and gradient of the tokens against a plain loop over experts, gradients of the weights against fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with _groups():
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
            for topk in (1, 2):
                _dispatch(report, _uneven(report.size(768, 128), topk, dtype), tolerance)


def _gradients(name: str, problem: benchmark.Problem) -> dict[str, Tensor]:
    """Output and gradients of the layer's parameters."""
    layer = benchmark.ours(name, problem)
    output = layer.forward(problem.tokens)
    gradients = torch.autograd.grad(output, layer.parameters, problem.upstream)
    return {"output": output.detach(), **dict(zip(PARAMETERS, gradients, strict=True))}


def _dispatch(report: Report, problem: benchmark.Problem, tolerance: float) -> None:
    case = f"{str(problem.tokens.dtype).removeprefix('torch.')}, k = {problem.case.topk}"
    # The same numbers with exact sums.
    wide = {key: getattr(problem, key).float() for key in ("fc1", "fc2", "tokens", "upstream")}
    expected = _gradients("fixed_capacity", problem._replace(**wide))
    for name in benchmark.DISPATCHERS:
        try:
            benchmark.check(problem, name, benchmark.ours(name, problem))
        except RuntimeError as error:
            report.expect(False, f"{name}, {case}: {error}")
            continue
        actual = _gradients(name, problem)
        off = {key: difference(actual[key], expected[key]) for key in actual}
        report.note(**{f"{name}, {case}": off})
        for key, value in off.items():
            good = value < tolerance
            report.expect(good, f"{name}, {case}: {key} is off by {value:.2g} from fp32")
        # No token goes to the first expert; its router is trained all the same.
        idle = not any(bool(actual[key][0].any()) for key in PARAMETERS[1:])
        report.expect(idle, f"{name}, {case}: the expert without tokens has a gradient")


def moe_layer(report: Report) -> None:
    """The benchmark of one layer of experts; every contender is checked against a plain loop first."""
    cases = report.size(
        (
            benchmark.Case(4_096, 768, 8, 1, "balanced"),
            benchmark.Case(25_216, 768, 32, 1, "skewed"),
        ),
        (benchmark.Case(512, 128, 8, 1, "skewed"),),
    )
    # It copies an expert for every token, which takes longer than all others together.
    builders = {n: b for n, b in benchmark.builders().items() if n != "transformers_batched_mm"}
    precision = report.size("bf16", "fp32")
    for case in cases:
        with _groups():
            names = _agreeing(report, builders, benchmark.make_problem(case, DTYPES[precision]))
        (rows,) = benchmark.run([case], names, report.size(2, 1), precision)
        taken = {row.contender: row.record() for row in rows}
        kept = ("median_ms", "min_ms", "ratio_to_dense", "peak_mb", "phases_ms", "note")
        table = {name: {key: own[key] for key in kept} for name, own in taken.items()}
        label = f"{case.tokens} tokens, {case.experts} experts, {case.load}"
        report.note(**{label: table})
        for name in ("dense", *(f"ours_{own}" for own in benchmark.DISPATCHERS)):
            measured = bool(table.get(name, {}).get("median_ms"))
            report.expect(measured, f"{label}: {name} was not measured")


def _agreeing(
    report: Report, builders: dict[str, benchmark.Builder], problem: benchmark.Problem
) -> list[str]:
    """Contenders that can be built and compute what they should; those that cannot be built are reported by the run."""
    names = ["dense"]
    for name, build in builders.items():
        if name == "dense":
            continue
        try:
            benchmark.check(problem, name, build(problem))
        except NotMeasured:
            pass
        except Exception as error:
            report.expect(False, f"{name}: {str(error).splitlines()[0][:200]}")
            continue
        names.append(name)
    return names


def router_losses(clean: Tensor, noise: Tensor) -> Tensor:
    """Sum of the auxiliary losses of a router with noise."""
    experts = clean.shape[1]
    sigma = 1.0 / experts
    sums = compute_router_statistics(clean, clean + sigma * noise, 1, sigma, TERMS)
    losses = losses_from_statistics(sums, TERMS, experts, 1)
    return torch.stack(list(losses.values())).sum()


def slots(gates: Tensor, capacity: int) -> list[Tensor]:
    """Where the tokens go; no gradient."""
    gate, expert = top_k_experts(gates, 1)
    found = route_slots(gate, expert, gates.shape[1], capacity)
    return [found.slot_token, found.slot_filled, found.token_slot, found.token_kept, found.load]


def compile(report: Report) -> None:
    """The functions of `train.compile` compiled against eager: values, gradients and times; the FFNs of experts with
    one of them; the MoE layer in a CUDA graph; times of a step with and without one."""
    rows, width, experts = report.size((25_216, 768, 32), (256, 64, 8))
    vocabulary = report.size(64_000, 128)
    dtype = report.size(torch.bfloat16, torch.float32)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        value = torch.randn(shape, generator=generator)
        return value.to(report.device, dtype).requires_grad_()

    scale = draw(rows, 1, dtype=torch.float32).detach()
    ends = (draw(rows, width), draw(rows, width), draw(width), draw(width), scale)
    labels = torch.randint(-1, vocabulary, (rows // 8,), generator=generator).to(report.device)
    logits = draw(rows, experts, dtype=torch.float32)
    noise = draw(rows, experts, dtype=torch.float32).detach()
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Any, ...]]] = {
        "bias_gelu": (bias_gelu, (draw(rows, 4 * width), draw(4 * width))),
        "add_branch": (add_branch, ends),
        "router_losses": (router_losses, (logits, noise)),
        "cross_entropy": (cross_entropy, (draw(rows // 8, vocabulary), labels, vocabulary)),
    }
    for name, (function, arguments) in functions.items():
        try:
            report.note(**{name: _compiled(report, name, function, arguments)})
        except Exception as error:
            report.expect(False, f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
    try:
        report.note(slots=_compiled_slots(report, torch.softmax(logits.detach(), dim=1)))
    except Exception as error:
        report.expect(False, f"slots: {type(error).__name__}: {str(error).strip()[:300]}")
    if report.on_gpu:
        _experts(report, draw)
        with _groups():
            _graph(report)
        try:
            graph_times(report)
        except RuntimeError as error:
            report.expect(False, f"no graph of a step: {str(error).splitlines()[0]}")
    else:
        report.left_out(
            "the MoE layer and a step in CUDA graphs; inductor: functions were traced, not compiled"
        )


def _backend(report: Report) -> str:
    """Compilers of the host are slow and may be missing; tracing, which fails for the same reasons, is rehearsed."""
    return report.size("inductor", "aot_eager")


def _compiled(
    report: Report, name: str, function: Callable[..., Tensor], arguments: Sequence[Any]
) -> dict[str, float]:
    leaves = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    upstream = torch.randn_like(function(*arguments).detach())

    def outcome(call: Callable[..., Tensor]) -> list[Tensor]:
        output = call(*arguments)
        return [output.detach(), *torch.autograd.grad(output, leaves, upstream)]

    backend = _backend(report)
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    expected, actual = outcome(function), outcome(compiled)
    off = max(map(difference, actual, expected))
    report.expect(off < 2e-2, f"{name}: compiled is off by {off:.2g}")
    repetitions = report.size(20, 2)
    return {
        "off_by": off,
        "eager_ms": milliseconds(lambda: outcome(function), repetitions),
        "compiled_ms": milliseconds(lambda: outcome(compiled), repetitions),
    }


def _experts(report: Report, draw: Callable[..., Tensor]) -> None:
    """The FFNs of 32 experts: a product with a bias and GELU, against a product and one compiled function of both."""
    shapes = ((32, 828, 768), (32, 3_072, 768), (32, 3_072), (32, 768, 3_072), (32, 768))
    arguments = [draw(*shape) for shape in shapes]
    upstream = torch.randn_like(arguments[0].detach())

    def work(compile: bool) -> list[Tensor]:
        output = batched(*arguments, compile=compile)
        return [output.detach(), *torch.autograd.grad(output, arguments, upstream)]

    off = max(map(difference, work(True), work(False)))
    report.expect(off < 2e-2, f"experts: compiled is off by {off:.2g}")
    report.note(
        experts={
            "off_by": off,
            "eager_ms": milliseconds(lambda: work(False), 20),
            "compiled_ms": milliseconds(lambda: work(True), 20),
        }
    )


def _compiled_slots(report: Report, gates: Tensor) -> dict[str, float]:
    capacity = int(1.05 * len(gates) / gates.shape[1])
    compiled = torch.compile(slots, backend=_backend(report), fullgraph=True, dynamic=False)
    same = identical(compiled(gates, capacity), slots(gates, capacity))
    report.expect(same, "slots: compiled routes other tokens")
    repetitions = report.size(20, 2)
    return {
        "eager_ms": milliseconds(lambda: slots(gates, capacity), repetitions),
        "compiled_ms": milliseconds(lambda: compiled(gates, capacity), repetitions),
    }


def _graph(report: Report) -> None:
    """Forward and backward of the layer without noise, captured, and replayed on other tokens."""
    case = benchmark.Case(4_096, 768, 32, 1, "skewed")
    problem = benchmark.make_problem(case, torch.bfloat16)
    layer: Any = benchmark.ours("fixed_capacity", problem)
    tokens = problem.tokens.clone().requires_grad_()

    def work() -> list[Tensor]:
        output = layer.forward(tokens)
        leaves = [tokens, *layer.parameters]
        return [output, *torch.autograd.grad(output, leaves, problem.upstream)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            captured = work()
    except RuntimeError as error:
        report.expect(False, f"the MoE layer cannot be captured: {str(error).splitlines()[0]}")
        return
    with torch.no_grad():
        tokens.copy_(problem.tokens.flip(0))
    graph.replay()
    replayed = [value.detach().clone() for value in captured]
    expected = [value.detach() for value in work()]
    off = max(map(difference, replayed, expected))
    report.expect(off < 2e-2, f"a replayed graph is off by {off:.2g}")
    # Rows stand in reverse, so that a graph that kept the first routing would be wrong.
    report.note(
        graph_off_by=off,
        layer_eager_ms=milliseconds(work, 20),
        layer_graph_ms=milliseconds(graph.replay, 20),
    )
