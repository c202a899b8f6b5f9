"""One feed-forward layer of experts, forward and backward: ours beside a dense FFN and other implementations.

All layers have the same weights, get the same tokens and carry out the same assignments (`layer_problem.py`).

Letters: T tokens, D width, F = 4 D inner width, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import logging
import warnings
from dataclasses import asdict, replace
from typing import Any, Callable, Iterator, Literal, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vlmoe.benchmarks.compare import (
    Contender,
    NotRun,
    Row,
    Work,
    compare,
    memory_needed,
    now,
    say,
)
from megatron_vlmoe.benchmarks.gpu_layers import GPU_LAYERS
from megatron_vlmoe.benchmarks.layer_problem import Case, Layer, Problem, check, make_problem
from megatron_vlmoe.benchmarks.transformers_experts import (
    IMPLEMENTATIONS,
    batched_mm_needs,
    transformers_experts,
)
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import MoEConfig, ParallelConfig, RunConfig
from megatron_vlmoe.model.vlmoe import DTYPES, build_transformer_config
from megatron_vlmoe.moe.layer import ModalityMoELayer, moe_submodules
from megatron_vlmoe.runtime.distributed import destroy, device, initialize
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.block_plan import BlockPlan, Branch
from megatron_vlmoe.stream.layout import StreamLayout

TEXT_LENGTH = 128
DISPATCHERS = ("fixed_capacity", "alltoall", "dropless")


Builder = Callable[[Problem], Layer]


def dense(problem: Problem) -> Layer:
    """The FFN of which a token's share of compute is the same with K = 1: the first expert for all tokens."""
    inner, width = problem.fc1.shape[1:]
    layer = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
    layer = layer.to(problem.fc1)
    return Layer(layer, list(layer.parameters()))


def ours(dispatcher: str, problem: Problem) -> Layer:
    """The MoE layer of a T-MoE block."""
    case, (inner, width) = problem.case, problem.fc1.shape[1:]
    moe = MoEConfig(
        num_text_experts=case.experts,
        topk=case.topk,
        dispatcher=dispatcher,  # type: ignore[arg-type]
        # Half a slot above what is needed, so that rounding cannot take one away.
        capacity_factor=problem.capacity_factor + 0.5 * case.experts / (case.tokens * case.topk),
        noise_std=0.0,
        text_aux=replace(MoEConfig().text_aux, load=0.0),
        vision_aux=replace(MoEConfig().vision_aux, importance=0.0, load=0.0),
    )
    base: RunConfig = preset("tiny-8e")
    model = replace(
        base.model, hidden_size=width, num_attention_heads=width // 64, ffn_hidden_size=inner
    )
    config = build_transformer_config(
        replace(base, model=model, moe=moe),
        "fp32" if problem.fc1.dtype == torch.float32 else "bf16",
    )
    plan = BlockPlan(1, (Branch("text", ("texts",), case.experts),))
    layer = ModalityMoELayer(config, moe_submodules(plan, moe), plan, moe).to(device())
    pool = layer.experts.pool("text")
    with torch.no_grad():
        layer.router.get_submodule("text").weight.copy_(problem.router)
        pool.weight1.copy_(problem.fc1)
        pool.weight2.copy_(problem.fc2)
        pool.bias1.zero_()
        pool.bias2.zero_()
    layout = StreamLayout(case.tokens // TEXT_LENGTH, 0, 0, TEXT_LENGTH, 1, 1)
    stream = StreamBatch(layout)

    def forward(tokens: Tensor) -> Tensor:
        layer.router.recorder.take()
        return layer([tokens.unsqueeze(1)], stream)[0].squeeze(1)

    return Layer(forward, list(layer.parameters()))


def megatron(dispatcher: str, grouped: bool, problem: Problem) -> Layer:
    """megatron-core's own MoE layer: SequentialMLP, or TEGroupedMLP."""
    case, (inner, width) = problem.case, problem.fc1.shape[1:]
    if grouped and not importlib.util.find_spec("transformer_engine"):
        raise NotRun("needs transformer-engine")
    if grouped and not torch.cuda.is_available():
        raise NotRun("needs a GPU")
    config = TransformerConfig(
        num_layers=1,
        hidden_size=width,
        num_attention_heads=width // 64,
        ffn_hidden_size=inner,
        num_moe_experts=case.experts,
        moe_ffn_hidden_size=inner,
        moe_router_topk=case.topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        moe_grouped_gemm=grouped,
        add_bias_linear=False,
        activation_func=F.gelu,
        perform_initialization=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        params_dtype=problem.fc1.dtype,
        bf16=problem.fc1.dtype == torch.bfloat16,
    )
    # Its router asks for this name, which 0.16.1 only defines where transformer-engine is installed.
    vars(moe_utils).setdefault("te_general_gemm", None)
    spec: Any = get_moe_module_spec(
        use_te=grouped, num_experts=case.experts, moe_grouped_gemm=grouped
    )
    # A ModuleSpec in 0.16, in 0.19 a function that has them as an argument.
    submodules = getattr(spec, "submodules", None) or spec.keywords["submodules"]
    layer: Any = MoELayer(config, submodules, layer_number=1).to(device())
    with torch.no_grad():
        layer.router.weight.copy_(problem.router)
        for number in range(case.experts):
            if grouped:
                getattr(layer.experts.linear_fc1, f"weight{number}").copy_(problem.fc1[number])
                getattr(layer.experts.linear_fc2, f"weight{number}").copy_(problem.fc2[number])
            else:
                expert = layer.experts.local_experts[number]
                expert.linear_fc1.weight.copy_(problem.fc1[number])
                expert.linear_fc2.weight.copy_(problem.fc2[number])

    def forward(tokens: Tensor) -> Tensor:
        output, _ = layer(tokens.unsqueeze(1))
        return output.squeeze(1)

    return Layer(forward, list(layer.parameters()))


def transformers(implementation: str, problem: Problem) -> Layer:
    """The experts of transformers 5 behind a linear router."""
    case, (inner, width) = problem.case, problem.fc1.shape[1:]
    if implementation == "batched_mm":
        # It copies both weights of its expert for every choice, and autograd makes gradients as large.
        batched_mm_needs(case.tokens * case.topk, problem.fc1, copies=4)
    experts = transformers_experts(
        implementation,
        problem.fc1.clone(),
        problem.fc1.new_zeros(case.experts, inner),
        problem.fc2.clone(),
        problem.fc1.new_zeros(case.experts, width),
    )
    router = nn.Linear(width, case.experts, bias=False, device=device())
    with torch.no_grad():
        router.weight.copy_(problem.router)

    def forward(tokens: Tensor) -> Tensor:
        gates = torch.softmax(router(tokens.float()), dim=1)
        gate, expert = torch.topk(gates, case.topk, dim=1)
        output: Tensor = experts(tokens, expert, gate)
        return output

    return Layer(forward, [*router.parameters(), *experts.parameters()])


def deepspeed(problem: Problem) -> Layer:
    """DeepSpeed's MoE layer."""
    case, (inner, width) = problem.case, problem.fc1.shape[1:]
    if not importlib.util.find_spec("deepspeed"):
        raise NotRun("needs deepspeed")
    size = problem.fc1.element_size()
    slots = case.tokens * case.topk * problem.capacity_factor
    # Masks and combine weights [T, E, C] with their gradients; C is slots / E.
    memory_needed(5.0 * case.tokens * slots * size / 1e9)
    with contextlib.redirect_stdout(io.StringIO()):
        logging.disable(logging.INFO)
        moe = importlib.import_module("deepspeed.moe.layer")
        comm = importlib.import_module("deepspeed.comm")
        comm.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)

        expert = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        layer = moe.MoE(
            width,
            expert,
            num_experts=case.experts,
            k=case.topk,
            capacity_factor=problem.capacity_factor,
            min_capacity=1,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        ).to(device(), problem.fc1.dtype)
        layer.set_deepspeed_parallelism()
        logging.disable(logging.NOTSET)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.float().weight.copy_(problem.router)
        for number, own in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            own[0].weight.copy_(problem.fc1[number])
            own[2].weight.copy_(problem.fc2[number])
            own[0].bias.zero_()
            own[2].bias.zero_()

    def forward(tokens: Tensor) -> Tensor:
        return layer(tokens)[0]

    # Its gate divides two gates by their sum, and leaves a single one.
    return Layer(forward, list(layer.parameters()), gates_of_chosen=case.topk > 1)


def builders() -> dict[str, Builder]:
    """Every contender by name; the first is the reference."""
    return {
        "dense": dense,
        **{f"ours_{name}": functools.partial(ours, name) for name in DISPATCHERS},
        "megatron_sequential": functools.partial(megatron, "alltoall", False),
        "megatron_sequential_allgather": functools.partial(megatron, "allgather", False),
        "megatron_te_grouped": functools.partial(megatron, "alltoall", True),
        **{
            f"transformers_{name}": functools.partial(transformers, name)
            for name in IMPLEMENTATIONS
        },
        "deepspeed": deepspeed,
        **GPU_LAYERS,
    }


def contender(name: str, build: Builder, problem: Problem) -> Contender:
    """A contender whose repetition is one forward and one backward pass.

    With `main_grad` in the case, gradients are added up in buffers that stay, as megatron-core's DDP does it over the
    micro-batches of a step: by its hook, or by the layer itself. Else every pass makes new ones, as plain PyTorch does.
    """

    @contextlib.contextmanager
    def ready() -> Iterator[Work]:
        # Weights, their gradients, and three wide activations with gradients.
        size = problem.fc1.element_size()
        weights = 2 * problem.fc1.numel() * (1 if name == "dense" else 2) * size
        memory_needed((weights + 8 * problem.tokens.numel() * 4 * size * problem.case.topk) / 1e9)
        layer = build(problem)
        tokens = problem.tokens.detach().requires_grad_()
        if problem.case.gradients == "main_grad":
            for parameter in layer.parameters:
                parameter.main_grad = torch.zeros_like(parameter)  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(_add_to_main_grad)

        def work() -> dict[str, float]:
            tokens.grad = None
            for parameter in layer.parameters:
                parameter.grad = None
                parameter.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            start = now()
            output = layer.forward(tokens)
            middle = now()
            output.backward(problem.upstream)
            return {"forward": middle - start, "backward": now() - middle}

        yield work

    return Contender(name, ready)


def _add_to_main_grad(parameter: Tensor) -> None:
    if not parameter.grad_added_to_main_grad:  # type: ignore[attr-defined]
        parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None


def run(
    cases: Sequence[Case],
    names: Sequence[str],
    rounds: int,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Iterator[list[Row]]:
    """Measures contenders case by case, after a check that each computes what it should.

    One of `GPU_LAYERS` that fails or computes something else is not measured, and its row says why.

    Raises:
        RuntimeError: if another computes something else.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    initialize(ParallelConfig(), seed=1)
    known = builders()
    try:
        for case in cases:
            problem = make_problem(case, DTYPES[precision])
            say(str(case))
            failed: list[Row] = []
            ready = []
            for name in names:
                try:
                    if name != "dense":
                        check(problem, name, known[name](problem))
                    ready.append(contender(name, known[name], problem))
                except NotRun as reason:
                    failed.append(Row(asdict(case), name, note=f"not run: {reason}"))
                except Exception as error:
                    # Their versions and kernels are not ours to choose, and the others are to be measured all the same.
                    if name not in GPU_LAYERS:
                        raise
                    why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                    failed.append(Row(asdict(case), name, note=f"not run: {why}"))
            yield compare(asdict(case), ready, reference="dense", rounds=rounds) + failed
    finally:
        destroy()
