"""GPU layers of other projects in the benchmark of layers: on stand-ins with their published signatures and shapes."""

from __future__ import annotations

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_vlmoe.benchmarks import gpu_layers, moe_layer
from megatron_vlmoe.benchmarks.layer_problem import Case, check, make_problem

WIDTH, EXPERTS = 64, 4


def routed(
    tokens: Tensor, gates: Tensor, expert: Tensor, fc1: Tensor, fc2: Tensor, activation: Any
) -> Tensor:
    """Every token through its experts; fc1 ``[E, F, D]``, fc2 ``[E, D, F]``."""
    inner = activation(torch.einsum("td,tkfd->tkf", tokens, fc1[expert]))
    output = torch.einsum("tkf,tkdf->tkd", inner, fc2[expert])
    return (gates.to(tokens.dtype)[..., None] * output).sum(1)


class Tutel(nn.Module):
    def __init__(self, gate_type: Any, model_dim: int, experts: Any, normalize_gate: bool) -> None:
        super().__init__()
        assert (gate_type["type"], experts["type"], normalize_gate) == ("top", "ffn", False)
        number, inner = experts["count_per_node"], experts["hidden_size_per_expert"]
        self.k, self.factor = gate_type["k"], gate_type["capacity_factor"]
        self.activation = experts["activation_fn"]
        gate = nn.Module()
        gate.wg = nn.Linear(model_dim, number, bias=False)
        self.gates = nn.ModuleList([gate])
        self.experts = nn.Module()
        for name, shape in (
            ("batched_fc1_w", (number, inner, model_dim)),
            ("batched_fc2_w", (number, inner, model_dim)),
            ("batched_fc1_bias", (number, inner)),
            ("batched_fc2_bias", (number, model_dim)),
        ):
            self.experts.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, tokens: Tensor) -> Tensor:
        gates = torch.softmax(self.gates[0].wg(tokens.float()), 1)
        gate, expert = torch.topk(gates, self.k, dim=1)
        slots = self.k * int(self.factor * ((len(tokens) + EXPERTS - 1) // EXPERTS))
        assert int(torch.bincount(expert.flatten()).max()) <= slots, "tokens would be dropped"
        own = self.experts
        assert not own.batched_fc1_bias.any() and not own.batched_fc2_bias.any()
        fc2 = own.batched_fc2_w.transpose(1, 2)
        return routed(tokens, gate, expert, own.batched_fc1_w, fc2, self.activation)


class MegaBlocks(nn.Module):
    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options
        shape = (options.moe_num_experts * options.ffn_hidden_size, options.hidden_size)
        self.router, self.experts = nn.Module(), nn.Module()
        self.router.layer = nn.Linear(options.hidden_size, EXPERTS, bias=False)
        self.experts.mlp = nn.Module()
        for name in ("w1", "w2"):
            self.experts.mlp.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, tokens: Tensor) -> Tensor:
        length, batch, width = tokens.shape
        flat = tokens.view(-1, width)
        gates = torch.softmax(self.router.layer(flat.float()), 1)
        gate, expert = torch.topk(gates, self.options.moe_top_k, dim=1)
        w1, w2 = (w.view(EXPERTS, -1, width) for w in self.experts.mlp.parameters())
        activation = self.options.activation_fn
        flat = routed(flat, gate, expert, w1.to(flat), w2.to(flat).transpose(1, 2), activation)
        return flat.view(length, batch, width)


class ParallelExperts(nn.Module):
    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs, inputs))


class ScatterMLP(nn.Module):
    def __init__(
        self,
        width: int,
        inner: int,
        experts: int,
        top_k: int,
        bias: Any = False,
        activation: Any = None,
    ) -> None:
        super().__init__()
        self.experts = ParallelExperts(experts, width, inner)
        self.output_experts = ParallelExperts(experts, inner, width)
        self.activation = activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        assert expert_p.dtype == x.dtype
        fc1, fc2 = self.experts.weight, self.output_experts.weight
        return routed(x, expert_p, expert_idxs, fc1, fc2, self.activation)


class Activation(enum.Enum):
    GELU = "gelu_tanh_approx"


class Sonic(nn.Module):
    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: Activation,
        add_bias: bool,
        std: float,
    ) -> None:
        super().__init__()
        assert not add_bias
        self.top_k = num_experts_per_tok
        self.router = nn.Linear(hidden_size, num_experts, bias=False)
        self.c_fc = ParallelExperts(num_experts, hidden_size, intermediate_size)
        self.c_proj = ParallelExperts(num_experts, intermediate_size, hidden_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        logits, expert = torch.topk(self.router(tokens), self.top_k, dim=1)
        gates = torch.softmax(logits.float(), 1)

        def gelu(inner: Tensor) -> Tensor:
            return F.gelu(inner, approximate="tanh")

        return routed(tokens, gates, expert, self.c_fc.weight, self.c_proj.weight, gelu), None


INSTALLED: dict[str, dict[str, dict[str, Any]]] = {
    "tutel": {"tutel": {}, "tutel.moe": {"moe_layer": Tutel}},
    "megablocks": {
        "megablocks": {},
        "megablocks.layers": {},
        "megablocks.layers.arguments": {"Arguments": lambda **own: SimpleNamespace(**own)},
        "megablocks.layers.dmoe": {"dMoE": MegaBlocks},
    },
    "scattermoe": {"scattermoe": {}, "scattermoe.mlp": {"MLP": ScatterMLP}},
    "sonicmoe": {"sonicmoe": {"MoE": Sonic}, "sonicmoe.enums": {"ActivationType": Activation}},
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that installs a stand-in, and makes the benchmark believe in a GPU."""

    def install(name: str, **instead: Any) -> None:
        for module, content in INSTALLED[name].items():
            own = ModuleType(module)
            own.__spec__ = ModuleSpec(module, None)
            vars(own).update({key: instead.get(key, value) for key, value in content.items()})
            monkeypatch.setitem(sys.modules, module, own)
        monkeypatch.setattr(gpu_layers.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_layers, "device", lambda: torch.device("cpu"))

    return install


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("load", ["balanced", "skewed"])
@pytest.mark.parametrize("name", list(INSTALLED))
def test_an_installed_layer_computes_what_all_others_do(
    name: str, load: Any, topk: int, install: Any
) -> None:
    dtype = torch.float32 if name == "tutel" else torch.bfloat16
    problem = make_problem(Case(128, WIDTH, EXPERTS, topk, load), dtype)
    install(name)
    layer = gpu_layers.GPU_LAYERS[name](problem)
    check(problem, name, layer)
    parameters = sum(own.numel() for own in layer.parameters)
    assert parameters >= problem.router.numel() + problem.fc1.numel() + problem.fc2.numel()


def test_what_cannot_run_says_why_and_the_others_are_measured(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(128, WIDTH, EXPERTS, 1, "balanced")
    names = ["dense", "ours_dropless", *gpu_layers.GPU_LAYERS]

    def notes(precision: Any) -> dict[str, str]:
        (rows,) = moe_layer.run([case], names, 1, precision)
        assert list(row.contender for row in rows[:2]) == names[:2]
        assert all(row.rounds_ms for row in rows[:2])
        return {row.contender: row.note for row in rows[2:]}

    expected = {name: f"not run: needs {name}" for name in gpu_layers.GPU_LAYERS}
    assert notes("fp32") == expected

    def other_version(width: int, inner: int, experts: int, top_k: int) -> None:
        raise AssertionError

    install("scattermoe", MLP=other_version)
    install(
        "tutel",
        moe_layer=lambda **own: Tutel(
            **{**own, "experts": {**own["experts"], "activation_fn": F.relu}}
        ),
    )
    monkeypatch.setattr(gpu_layers.torch.cuda, "is_available", lambda: False)
    assert notes("bf16")["tutel"] == "not run: needs a GPU"
    # The clock of a GPU is not there to wait for.
    monkeypatch.setattr(
        gpu_layers,
        "torch",
        SimpleNamespace(**{**vars(torch), "cuda": SimpleNamespace(is_available=lambda: True)}),
    )
    found = notes("bf16")
    assert (
        found["scattermoe"].startswith("not run: TypeError: ")
        and "'activation'" in found["scattermoe"]
    )
    assert found["tutel"].startswith("not run: RuntimeError: ") and "off by" in found["tutel"]
    assert notes("fp32")["scattermoe"] == "not run: needs --precision bf16"
