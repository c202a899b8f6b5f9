"""MoE layers made for GPUs, with the weights of a benchmark's problem: Tutel, MegaBlocks, ScatterMoE, SonicMoE.

None of them is a requirement; each is measured where it is installed. They were written against the published sources
(microsoft/tutel, databricks/megablocks, shawntan/scattermoe, Dao-AILab/sonic-moe) and have not run on a GPU yet.

Letters: T tokens, D width, F = 4 D inner width, E experts, K experts per token.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from typing import Any, Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlmoe.benchmarks.compare import NotRun
from megatron_vlmoe.benchmarks.layer_problem import Layer, Problem
from megatron_vlmoe.runtime.distributed import device


def _modules(package: str, *names: str, only_bf16: bool = True) -> Callable[[Problem], list[Any]]:
    """A function that imports modules of a package for a problem.

    Raises:
        NotRun: without the package, without a GPU, or in a precision that its kernels do not have.
    """

    def load(problem: Problem) -> list[Any]:
        if not importlib.util.find_spec(package):
            raise NotRun(f"needs {package}")
        if not torch.cuda.is_available():
            raise NotRun("needs a GPU")
        if only_bf16 and problem.fc1.dtype != torch.bfloat16:
            raise NotRun("needs --precision bf16")
        return [importlib.import_module(name) for name in (names or (package,))]

    return load


def tutel(problem: Problem) -> Layer:
    """Tutel's MoE layer, with the slots that the fullest expert needs."""
    (moe,) = _modules("tutel", "tutel.moe", only_bf16=False)(problem)
    case = problem.case
    # It makes K * floor(factor * ceil(T / E)) slots.
    slots = math.ceil(problem.capacity_factor * case.tokens / case.experts) + 1
    layer = moe.moe_layer(
        gate_type={
            "type": "top",
            "k": case.topk,
            "fp32_gate": True,
            "capacity_factor": slots / math.ceil(case.tokens / case.experts),
        },
        model_dim=case.width,
        experts={
            "type": "ffn",
            "count_per_node": case.experts,
            "hidden_size_per_expert": problem.fc1.shape[1],
            "activation_fn": F.gelu,
        },
        normalize_gate=False,
    )
    layer = layer.to(device(), problem.fc1.dtype)
    experts = layer.experts
    with torch.no_grad():
        layer.gates[0].wg.float().weight.copy_(problem.router)
        experts.batched_fc1_w.copy_(problem.fc1)
        experts.batched_fc2_w.copy_(problem.fc2.transpose(1, 2))
        experts.batched_fc1_bias.zero_()
        experts.batched_fc2_bias.zero_()
    return Layer(layer, list(layer.parameters()))


def megablocks(problem: Problem) -> Layer:
    """MegaBlocks' dropless MoE: grouped products where grouped_gemm is installed, else block-sparse ones."""
    arguments, dmoe = _modules(
        "megablocks", "megablocks.layers.arguments", "megablocks.layers.dmoe"
    )(problem)
    case = problem.case
    grouped = importlib.util.find_spec("grouped_gemm")
    options = arguments.Arguments(
        hidden_size=case.width,
        ffn_hidden_size=problem.fc1.shape[1],
        bias=False,
        return_bias=False,
        activation_fn=F.gelu,
        moe_num_experts=case.experts,
        moe_top_k=case.topk,
        moe_loss_weight=0.0,
        mlp_impl="grouped" if grouped else "sparse",
        fp16=False,
        bf16=True,
        device=device(),
    )
    layer = dmoe.dMoE(options)
    with torch.no_grad():
        layer.router.layer.weight.copy_(problem.router)
        layer.experts.mlp.w1.copy_(problem.fc1.flatten(0, 1))
        layer.experts.mlp.w2.copy_(problem.fc2.transpose(1, 2).flatten(0, 1))

    def forward(tokens: Tensor) -> Tensor:
        return layer(tokens.unsqueeze(1)).squeeze(1)

    return Layer(forward, list(layer.parameters()))


def scattermoe(problem: Problem) -> Layer:
    """ScatterMoE's MLP behind a linear router."""
    (mlp,) = _modules("scattermoe", "scattermoe.mlp")(problem)
    case = problem.case
    experts = mlp.MLP(
        case.width, problem.fc1.shape[1], case.experts, case.topk, activation=nn.GELU()
    ).to(device(), problem.fc1.dtype)
    router = nn.Linear(case.width, case.experts, bias=False, device=device())
    with torch.no_grad():
        router.weight.copy_(problem.router)
        experts.experts.weight.copy_(problem.fc1)
        experts.output_experts.weight.copy_(problem.fc2)

    def forward(tokens: Tensor) -> Tensor:
        gates = torch.softmax(router(tokens.float()), dim=1)
        gate, expert = torch.topk(gates, case.topk, dim=1)
        output: Tensor = experts(tokens, gate.to(tokens.dtype), expert)
        return output

    return Layer(forward, [*router.parameters(), *experts.parameters()])


def sonicmoe(problem: Problem) -> Layer:
    """SonicMoE's layer: its gates are a softmax over the chosen experts, its GELU the tanh approximation."""
    package, enums = _modules("sonicmoe", "sonicmoe", "sonicmoe.enums")(problem)
    case = problem.case
    layer = package.MoE(
        num_experts=case.experts,
        num_experts_per_tok=case.topk,
        hidden_size=case.width,
        intermediate_size=problem.fc1.shape[1],
        activation_function=enums.ActivationType.GELU,
        add_bias=False,
        std=0.02,
    ).to(device(), problem.fc1.dtype)
    with torch.no_grad():
        layer.router.weight.copy_(problem.router)
        layer.c_fc.weight.copy_(problem.fc1)
        layer.c_proj.weight.copy_(problem.fc2)

    def forward(tokens: Tensor) -> Tensor:
        output: Tensor = layer(tokens)[0]
        return output

    return Layer(forward, list(layer.parameters()), gates_of_chosen=True, gelu_approximation="tanh")


GPU_LAYERS: Mapping[str, Callable[[Problem], Layer]] = {
    "tutel": tutel,
    "megablocks": megablocks,
    "scattermoe": scattermoe,
    "sonicmoe": sonicmoe,
}
"""Contenders by name."""
