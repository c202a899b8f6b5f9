"""Feed-forward branches of VL-MoE: dense FFNs, and pools of experts with their routers.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, T tokens of a pool in the batch, D width, F inner
width, E experts, K experts per token, R rows: one for every choice of a token, T * K. Blocks are numbered from 1.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vlmoe import VLMoEConfig

BALANCE_LOSSES = ("importance", "load", "gshard")
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Numbers of rows of an expert that are columns of a product on a CPU (`_linear`): measured with torch 2.13 on one core
# of an AMD EPYC at D = 384 and 768. The second layer has long rows and few results, where only two are faster.
COLUMNS_FC1 = range(1, 7)
COLUMNS_FC2 = range(2, 3)
# Rows below which the time of an expert is that of reading its weights.
FEW_ROWS = 8
# Rows of the busiest expert from which one product of a whole pool takes less time than one for each expert, and
# how many times the number of rows the places may be that it computes (`_with_all_threads`).
POOL_ROWS = 16
LARGEST_PADDING = 1.5
# How much more than an equal share of all work one thread may get before threads share every product instead.
LARGEST_SHARE = 1.25


class VLMoEBranchOutput(nn.Linear):
    """The last linear layer of a residual branch, whose initial weights shrink with the depth of its block."""

    def __init__(self, inputs: int, outputs: int, layer_number: int) -> None:
        super().__init__(inputs, outputs)
        self.init_scale = output_init_scale(layer_number)


class VLMoEDenseBranch(nn.Module):
    """LayerNorm and one FFN: ``W2 gelu(W1 x + b1) + b2``."""

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = VLMoEBranchOutput(config.intermediate_size, config.hidden_size, layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        text_length: int,
        mask: Optional[Tensor],
        output_router_logits: bool = False,
    ) -> tuple[Tensor, None]:
        """``[n, L, D]`` to ``[n, L, D]``, and nothing of a router; the arguments are those of a sparse branch."""
        return self.fc2(F.gelu(self.fc1(self.layernorm(hidden_states)))), None


class VLMoERouter(nn.Module):
    """Linear router without bias, in fp32 whatever the precision of the model."""

    def __init__(self, config: VLMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, dtype=torch.float32)
        )
        # Added to the gates for the choice of experts alone (loss-free balancing, arXiv 2408.15664).
        self.balance_bias: Optional[Tensor]
        bias = torch.zeros(num_experts) if config.router_balance_bias_rate > 0.0 else None
        self.register_buffer("balance_bias", bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits in fp32: ``[T, D]`` to ``[T, E]``."""
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.weight.float())


class VLMoEExperts(nn.Module):
    """The FFNs of one pool as batched weights ``[E, ...]``.

    With transformers 5 `config._experts_implementation` chooses how they run: "eager" one expert after the other,
    "grouped_mm" (the default) all of them in one product, "batched_mm" with the weights of every choice gathered.
    """

    def __init__(self, config: VLMoEConfig, num_experts: int, layer_number: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.num_experts = num_experts
        self.init_scale = output_init_scale(layer_number)
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, inner, width))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, inner))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, inner))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Gated sum ``[T, D]`` of the outputs of every token's experts.

        Args:
            hidden_states: tokens ``[T, D]``.
            top_k_index: chosen experts ``[T, K]``; E is a choice that is not carried out, whose share is 0.
            top_k_weights: gates ``[T, K]``.
        """
        num_tokens, k = top_k_index.shape
        if self._may_run_in_place(hidden_states):
            return self.in_place(hidden_states, top_k_index, top_k_weights)
        # Shapes that no value decides: choices that are not carried out come last and stay.
        expert, choice = torch.sort(top_k_index.flatten(), stable=True)
        outputs = self.run(hidden_states[choice if k == 1 else choice // k], expert)
        outputs = outputs * top_k_weights.flatten()[choice].to(outputs.dtype).unsqueeze(1)
        # Every choice has a row of its own, so that the sum has a fixed order; each is written, so that nothing needs
        # to be there before.
        by_choice = torch.empty_like(outputs).index_copy_(0, choice, outputs)
        return by_choice if k == 1 else by_choice.view(num_tokens, k, -1).sum(dim=1)

    def forward_chosen(self, hidden_states: Tensor, token: Tensor, weight: Tensor) -> Tensor:
        """Gated sum ``[T, D]`` of experts that have chosen their tokens.

        Args:
            hidden_states: tokens ``[T, D]``.
            token: tokens that every expert takes ``[E, C]``.
            weight: their gates ``[E, C]``; 0 for a place that stays empty.
        """
        chosen = token.flatten()
        expert = torch.arange(self.num_experts, device=token.device)
        expert = expert.unsqueeze(1).expand_as(token).flatten()
        outputs = self.run(hidden_states[chosen], expert)
        outputs = outputs * weight.flatten().to(outputs.dtype).unsqueeze(1)
        empty = outputs.new_zeros(hidden_states.shape[0], outputs.shape[1])
        return empty.index_add(0, chosen, outputs)

    def run(self, rows: Tensor, expert: Tensor) -> Tensor:
        """Every row ``[R, D]`` through its expert ``[R]``, by which they are sorted; rows of E give 0.

        The configuration names the implementation.
        """
        implementation = self._implementation()
        if implementation == "batched_mm":
            return self.batched(rows, expert)
        if implementation == "grouped_mm":
            dtype = rows.dtype
            if torch.is_autocast_enabled(rows.device.type):
                dtype = torch.get_autocast_dtype(rows.device.type)
            if can_group(rows, self.fc1_weight, dtype):
                return self.grouped(rows.to(dtype), expert, _torch_grouped_mm)
            # A graph has no loop over as many rows as an expert happens to have.
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                if hasattr(torch.ops.transformers, "grouped_mm_fallback"):
                    return self.grouped(rows.to(dtype), expert, _opaque_grouped_mm)
                return self.batched(rows, expert)
        return self.one_by_one(rows, expert)

    def grouped(
        self, rows: Tensor, expert: Tensor, product: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """`run` with one product of all groups for either layer; the host need not know their sizes.

        The product is that of rows ``[R, D]``, of which those up to ``ends[e]`` are of expert e, and weights
        ``[E, F, D]``: ``[R, F]``; rows of no expert may come out as anything.
        """
        dtype = rows.dtype
        ends = self._ends(expert).to(torch.int32)
        absent = (expert == self.num_experts).unsqueeze(1)
        own = expert.clamp(max=self.num_experts - 1)
        # Before either product too: the gradient of its input may be anything there as well.
        rows = rows.masked_fill(absent, 0.0)
        inner = product(rows, self.fc1_weight.to(dtype), ends)
        # After it too: what is there may be NaN, and so would the gradient of the bias be, through gelu.
        inner = inner.masked_fill(absent, 0.0) + self.fc1_bias.to(dtype)[own]
        inner = F.gelu(inner).masked_fill(absent, 0.0)
        outputs = product(inner, self.fc2_weight.to(dtype), ends) + self.fc2_bias.to(dtype)[own]
        return outputs.masked_fill(absent, 0.0)

    def batched(self, rows: Tensor, expert: Tensor) -> Tensor:
        """`run` with a copy of its expert's weights for every row: for few rows."""
        own = expert.clamp(max=self.num_experts - 1)
        inner = torch.bmm(self.fc1_weight[own], rows.unsqueeze(2)).squeeze(2)
        inner = F.gelu(inner + self.fc1_bias[own])
        outputs = torch.bmm(self.fc2_weight[own], inner.unsqueeze(2)).squeeze(2)
        outputs = outputs + self.fc2_bias[own]
        return outputs.masked_fill((expert == self.num_experts).unsqueeze(1), 0.0)

    def one_by_one(self, rows: Tensor, expert: Tensor) -> Tensor:
        """`run` with two matmuls for every expert that has rows; without any, for the first on none of them.

        A pool without rows has a gradient of zero then, for which processes that train together wait.
        """
        # Unbound at once: the gradient of a slice would be as large as the whole pool, for every expert.
        pool = [
            parameter.unbind(0)
            for parameter in (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        ]
        ends = self._ends(expert).tolist()
        parts = list(zip([0, *ends], ends))
        busy = [number for number, (start, end) in enumerate(parts) if start < end] or [0]
        outputs = []
        for number in busy:
            fc1_weight, fc1_bias, fc2_weight, fc2_bias = (values[number] for values in pool)
            inner = F.gelu(F.linear(rows[slice(*parts[number])], fc1_weight, fc1_bias))
            outputs.append(F.linear(inner, fc2_weight, fc2_bias))
        absent = torch.zeros_like(rows[ends[-1] :], dtype=outputs[0].dtype)
        return torch.cat([*outputs, absent])

    def in_place(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`forward` one expert after the other, for inference on a CPU: with few copies, and nothing is kept."""
        num_tokens, k = top_k_index.shape
        expert, choice = torch.sort(top_k_index.flatten(), stable=True)
        ends = [*self._ends(expert).tolist(), expert.shape[0]]
        sizes = [end - start for start, end in zip([0, *ends], ends)]
        rows = hidden_states.index_select(0, choice if k == 1 else choice // k)
        outputs = hidden_states.new_empty(choice.shape[0], hidden_states.shape[1])
        if absent := sizes.pop():
            outputs.index_fill_(0, choice[-absent:], 0.0)
            rows, choice = rows[:-absent], choice[:-absent]
        if _threads_share_few_rows():
            if rows.shape[0]:
                outputs.index_copy_(0, choice, self._with_all_threads(rows, expert, sizes))
        else:
            self._with_own_threads(rows, choice, sizes, outputs)
        outputs.mul_(top_k_weights.reshape(-1, 1).to(outputs.dtype))
        return outputs if k == 1 else outputs.view(num_tokens, k, -1).sum(dim=1)

    def _with_own_threads(
        self, rows: Tensor, choice: Tensor, sizes: list[int], outputs: Tensor
    ) -> None:
        """Outputs of sorted rows ``[R, D]`` at their places in ``outputs``, each thread with experts of its own."""
        pool = zip(
            rows.split(sizes),
            choice.split(sizes),
            self.fc1_weight.unbind(0),
            self.fc1_bias.unbind(0),
            self.fc2_weight.unbind(0),
            self.fc2_bias.unbind(0),
        )
        used = [one for one in pool if one[0].shape[0]]

        def compute(numbers: Iterator[int]) -> None:
            for number in numbers:
                own, place, fc1_weight, fc1_bias, fc2_weight, fc2_bias = used[number]
                inner = torch.ops.aten.gelu_(_linear(own, fc1_weight, fc1_bias, COLUMNS_FC1))
                outputs.index_copy_(0, place, _linear(inner, fc2_weight, fc2_bias, COLUMNS_FC2))

        _side_by_side(compute, [max(own.shape[0], FEW_ROWS) for own, *_ in used])

    def _with_all_threads(self, rows: Tensor, expert: Tensor, sizes: list[int]) -> Tensor:
        """Outputs ``[R, D]`` of sorted rows, all threads on every product.

        One product of the whole pool where experts have many rows and about equally many, which then fill places that
        are as many for each; else one for every expert that has rows.
        """
        most = max(sizes)
        if most >= POOL_ROWS and self.num_experts * most <= LARGEST_PADDING * rows.shape[0]:
            firsts = rows.new_tensor([0, *sizes[:-1]], dtype=torch.long).cumsum(0)
            own = expert[: rows.shape[0]]
            place = torch.arange(rows.shape[0], device=own.device) - firsts[own] + most * own
            places = rows.new_zeros(self.num_experts * most, rows.shape[1])
            places.index_copy_(0, place, rows)
            inner = torch.baddbmm(
                self.fc1_bias.unsqueeze(1),
                places.view(self.num_experts, most, -1),
                self.fc1_weight.transpose(1, 2),
            )
            outputs = torch.baddbmm(
                self.fc2_bias.unsqueeze(1),
                torch.ops.aten.gelu_(inner),
                self.fc2_weight.transpose(1, 2),
            )
            return outputs.flatten(0, 1).index_select(0, place)
        inner = _linear_by_expert(rows, sizes, self.fc1_weight, self.fc1_bias)
        inner = torch.ops.aten.gelu_(inner)
        return _linear_by_expert(inner, sizes, self.fc2_weight, self.fc2_bias)

    def _implementation(self) -> str:
        """The implementation that the configuration names."""
        implementation = getattr(self.config, "_experts_implementation", None) or "grouped_mm"
        if implementation not in EXPERTS_IMPLEMENTATIONS:
            known = ", ".join(EXPERTS_IMPLEMENTATIONS)
            raise ValueError(f"experts_implementation={implementation!r} is none of {known}")
        return implementation

    def _may_run_in_place(self, hidden_states: Tensor) -> bool:
        """Whether `in_place` can stand in for `run`, which would go through the experts one after the other.

        Not in training: reentrant gradient checkpointing has its first pass without gradients, and its second one,
        which is to give the same, with them.
        """
        return (
            not self.training
            and self._implementation() != "batched_mm"
            and hidden_states.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _ends(self, expert: Tensor) -> Tensor:
        """Numbers of rows up to the last one of every expert ``[E]``."""
        numbers = torch.arange(self.num_experts, device=expert.device)
        return torch.searchsorted(expert, numbers, right=True)


class Routing(NamedTuple):
    """Where the tokens of a pool go: gates in fp32, chosen experts, and choices that are carried out, None: all.

    Each is ``[T, K]``.
    """

    gate: Tensor
    expert: Tensor
    kept: Optional[Tensor]


class RouterOutput(NamedTuple):
    """What one router did with its tokens.

    Args:
        logits: as the router gave them, without noise, in fp32 ``[T, E]``.
        loss: sum of its auxiliary losses, weighted as the configuration says: a scalar.
        dropped: choices of tokens that found no place where capacity is limited, or with expert choice tokens that no
            expert has taken: a scalar.
    """

    logits: Tensor
    loss: Tensor
    dropped: Tensor


class VLMoESparseBranch(nn.Module):
    """LayerNorm, a router and a pool of experts.

    Options of capacity, padding, noise and losses may change between calls. The branch named "text" has the losses of
    `config.text_router_losses`, others those of `config.vision_router_losses`.
    """

    def __init__(
        self, config: VLMoEConfig, num_experts: int, layer_number: int, name: str = "vision"
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.name = name
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.router = VLMoERouter(config, num_experts)
        self.experts = VLMoEExperts(config, num_experts, layer_number)

    def forward(
        self,
        hidden_states: Tensor,
        text_length: int,
        mask: Optional[Tensor],
        output_router_logits: bool = False,
    ) -> tuple[Tensor, Optional[RouterOutput]]:
        """Gated sum of the experts' outputs ``[n, L, D]``, and the router's output where asked for.

        Zero for choices that found no place and for padding, where the mask ``[n, L]`` is False; None if there is none.
        The text's tokens come before the image's.
        """
        samples, length, _ = hidden_states.shape
        tokens = to_stream(self.layernorm(hidden_states), text_length)
        if mask is None or self.config.route_padding:
            slots = None
        else:
            slots = to_stream(mask.unsqueeze(2), text_length).squeeze(1)
        logits = self.router(tokens)
        noisy = self._with_noise(logits)
        if self.config.moe_routing == "expert_choice":
            token, weight = self.choose_tokens(noisy, slots)
            outputs = from_stream(
                self.experts.forward_chosen(tokens, token, weight), samples, length, text_length
            )
            if not output_router_logits:
                return outputs, None
            taken = torch.zeros(tokens.shape[0], 1, dtype=torch.bool, device=token.device)
            taken[token.flatten()] = True
            expert = logits.argmax(dim=1, keepdim=True)
            routing = Routing(torch.ones_like(logits[:, :1]), expert, taken)
            return outputs, self._router_output(
                logits, noisy, routing, slots, samples * text_length
            )
        routing = self.route(noisy, slots)
        expert = routing.expert
        if routing.kept is not None:
            expert = expert.masked_fill(~routing.kept, self.num_experts)
        outputs = from_stream(
            self.experts(tokens, expert, routing.gate), samples, length, text_length
        )
        if not output_router_logits:
            return outputs, None
        return outputs, self._router_output(logits, noisy, routing, slots, samples * text_length)

    def route(self, logits: Tensor, mask: Optional[Tensor]) -> Routing:
        """Chooses experts by logits ``[T, E]`` for tokens, of which those with a False in mask ``[T]`` are left out."""
        config = self.config
        if not 1 <= config.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok={config.num_experts_per_tok} does not fit a pool of {self.num_experts} experts"
            )
        gates = torch.softmax(logits, dim=1)
        if self.router.balance_bias is None:
            gate, expert = top_k_experts(gates, config.num_experts_per_tok)
        else:
            biased = gates.detach() + self.router.balance_bias.to(gates)
            expert = top_k_experts(biased, config.num_experts_per_tok)[1]
            gate = gates.gather(1, expert)
        if config.capacity_factor > 0.0:
            capacity = expert_capacity(
                logits.shape[0],
                self.num_experts,
                config.num_experts_per_tok,
                config.capacity_factor,
                config.capacity_multiple_of,
            )
            kept: Optional[Tensor] = choices_with_place(
                gate, expert, self.num_experts, capacity, mask, config.batch_priority
            )
        else:
            kept = None if mask is None else mask.unsqueeze(1).expand_as(expert)
        # Only now: priority goes by the gate as the router gave it.
        if config.normalize_gate:
            gate = gate / gate.sum(dim=1, keepdim=True)
        return Routing(gate, expert, kept)

    def choose_tokens(self, logits: Tensor, mask: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """Expert choice by logits ``[T, E]``: tokens ``[E, C]`` of every expert, and their gates ``[E, C]``.

        The best ones come first, equal ones in their order. Tokens with a False in mask ``[T]`` fill up what is left,
        with a gate of 0.
        """
        config, gates = self.config, torch.softmax(logits, dim=1)
        capacity = expert_capacity(
            logits.shape[0],
            self.num_experts,
            config.num_experts_per_tok,
            config.capacity_factor,
            config.capacity_multiple_of,
        )
        score = torch.nan_to_num(gates.detach(), nan=-1.0)
        if mask is not None:
            score = score.masked_fill(~mask.unsqueeze(1), -math.inf)
        order = torch.argsort(score, dim=0, descending=True, stable=True)
        token = order[:capacity].t()
        weight = gates.t().gather(1, token)
        return token, weight if mask is None else weight * mask[token]

    def _noise_std(self) -> float:
        """Standard deviation of the router noise: 1 / E for a negative option."""
        std = self.config.router_noise_std
        return 1.0 / self.num_experts if std < 0.0 else std

    def _with_noise(self, logits: Tensor) -> Tensor:
        """The logits that choose: with noise where the router is trained (V-MoE)."""
        std = self._noise_std()
        if std == 0.0 or not self.training or not self.router.weight.requires_grad:
            return logits
        return logits + std * torch.randn_like(logits)

    def _router_output(
        self,
        logits: Tensor,
        noisy: Tensor,
        routing: Routing,
        mask: Optional[Tensor],
        num_text_tokens: int,
    ) -> RouterOutput:
        config = self.config
        weights = config.text_router_losses if self.name == "text" else config.vision_router_losses
        if config.moe_routing == "expert_choice":
            # Experts have equal load by construction.
            weights = {name: w for name, w in weights.items() if name not in BALANCE_LOSSES}
        groups = [(weights, slice(None))]
        if self.name == "shared":
            # Entropies are those of each modality (LIMoE).
            groups = [({n: w for n, w in weights.items() if "entropy" not in n}, slice(None))]
            for own, rows in (
                (config.text_router_losses, slice(num_text_tokens)),
                (config.vision_router_losses, slice(num_text_tokens, None)),
            ):
                groups.append(({n: w for n, w in own.items() if "entropy" in n}, rows))
        loss = logits.new_zeros(())
        for own, rows in groups:
            loss = loss + router_loss(
                logits[rows],
                noisy[rows],
                routing.expert[rows],
                # Where there is no noise, the load is that of the noise that there would be.
                self._noise_std() or 1.0 / self.num_experts,
                own,
                None if mask is None else mask[rows],
            )
        lost = torch.zeros_like(routing.expert, dtype=torch.bool)
        if routing.kept is not None:
            lost = ~routing.kept if mask is None else ~routing.kept & mask.unsqueeze(1)
        return RouterOutput(logits, loss, lost.sum())


class VLMoEFeedForward(nn.Module):
    """The feed-forward half of a block: every token goes through the branch of its modality."""

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.names = tuple(branch.name for branch in config.branches(layer_number))
        for name, num_experts in config.branches(layer_number):
            branch: nn.Module
            if num_experts:
                branch = VLMoESparseBranch(config, num_experts, layer_number, name)
            else:
                branch = VLMoEDenseBranch(config, layer_number)
            self.add_module(name, branch)

    def branches_of(self, kind: str) -> tuple[str, ...]:
        """Names of the branches that samples of a kind go through, which is "texts", "images" or "pairs"."""
        if kind == "pairs" and "vl" in self.names:
            return ("vl",)
        if "shared" in self.names:
            return ("shared",)
        return {"texts": ("text",), "images": ("vision",), "pairs": ("text", "vision")}[kind]

    def forward(
        self,
        hidden_states: Tensor,
        text_length: int,
        mask: Optional[Tensor],
        output_router_logits: bool = False,
    ) -> tuple[Tensor, list[RouterOutput]]:
        """``[n, L, D]`` to ``[n, L, D]``, and what every router did, that of the text before that of the image.

        See `VLMoESparseBranch.forward` for the arguments.
        """
        length = hidden_states.shape[1]
        kind = "texts" if text_length == length else "pairs" if text_length else "images"
        branch = self.branches_of(kind)[0]
        if branch in ("vl", "shared"):
            parts = [(branch, hidden_states, text_length, mask)]
        else:
            parts = []
            if text_length:
                text_mask = None if mask is None else mask[:, :text_length]
                parts.append(("text", hidden_states[:, :text_length], text_length, text_mask))
            if text_length < length:
                # No part of an image is padding.
                parts.append(("vision", hidden_states[:, text_length:], 0, None))
        found = [
            self.get_submodule(name)(tokens, texts, valid, output_router_logits)
            for name, tokens, texts, valid in parts
        ]
        outputs = found[0][0] if len(found) == 1 else torch.cat([out for out, _ in found], dim=1)
        return outputs, [router for _, router in found if router is not None]


def output_init_scale(layer_number: int) -> float:
    """Factor of the initial output matrices of a block: a sum over blocks keeps its size (BEiT)."""
    return 1.0 / math.sqrt(2.0 * layer_number)


def to_stream(samples: Tensor, text_length: int) -> Tensor:
    """``[n, L, D]`` to ``[n * L, D]``: all texts of the batch, then all images.

    Tokens that are equally urgent get their places at an expert in this order.
    """
    if not 0 < text_length < samples.shape[1]:
        return samples.flatten(0, 1)
    texts, images = samples[:, :text_length], samples[:, text_length:]
    return torch.cat([texts.flatten(0, 1), images.flatten(0, 1)])


def from_stream(stream: Tensor, samples: int, length: int, text_length: int) -> Tensor:
    """Inverse of `to_stream`: ``[n * L, D]`` to ``[n, L, D]``."""
    if not 0 < text_length < length:
        return stream.view(samples, length, -1)
    texts, images = stream[: samples * text_length], stream[samples * text_length :]
    return torch.cat(
        [texts.view(samples, text_length, -1), images.view(samples, length - text_length, -1)],
        dim=1,
    )


def top_k_experts(gates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest gates ``[T, k]`` of ``[T, E]`` in falling order and their experts; ties go to the lower number."""
    # torch.topk promises no order of ties.
    remaining = gates.detach()
    experts = []
    for _ in range(k):
        expert = remaining.argmax(dim=1, keepdim=True)
        experts.append(expert)
        if len(experts) < k:
            remaining = remaining.scatter(1, expert, -math.inf)
    chosen = torch.cat(experts, dim=1)
    return gates.gather(1, chosen), chosen


def expert_capacity(
    num_tokens: int, num_experts: int, k: int, capacity_factor: float, multiple_of: int = 1
) -> int:
    """Places at every expert: ``max(1, min(T, ceil(T * k * capacity_factor / E)))``.

    The ceiling is rounded up to a multiple of `multiple_of`.
    """
    capacity = math.ceil(num_tokens * k * capacity_factor / num_experts)
    capacity = math.ceil(capacity / multiple_of) * multiple_of
    # In a graph for any batch size the number of tokens is a symbol, which `min` and `max` would fix.
    return torch.sym_max(1, torch.sym_min(num_tokens, capacity))


@torch.no_grad()
def choices_with_place(
    gate: Tensor,
    expert: Tensor,
    num_experts: int,
    capacity: int,
    mask: Optional[Tensor],
    batch_priority: bool,
) -> Tensor:
    """Which choices ``[T, K]`` find a place at their expert, by Batch Priority Routing (V-MoE, arXiv 2106.05974).

    Tokens are served in falling order of their largest gate, equal ones by their position; all first choices come
    before all second ones.

    Args:
        gate: gates of the choices ``[T, K]``, the largest first.
        expert: chosen experts ``[T, K]``.
        num_experts: E.
        capacity: places at every expert.
        mask: tokens with False take no place ``[T]``; None: there are none.
        batch_priority: False serves the tokens by position.
    """
    num_tokens, k = expert.shape
    served = torch.arange(num_tokens, device=expert.device)
    if batch_priority:
        # A sample that has gone NaN takes no place from others.
        priority = torch.nan_to_num(gate[:, 0], nan=-math.inf)
        served = torch.argsort(priority, descending=True, stable=True)
    if mask is not None:
        # Behind the experts there is one more, for tokens that take no place.
        expert = expert.masked_fill(~mask.unsqueeze(1), num_experts)
    queue = expert[served].t().flatten()
    by_expert, order = torch.sort(queue, stable=True)
    first = torch.searchsorted(by_expert, torch.arange(num_experts + 1, device=expert.device))
    place = torch.arange(queue.shape[0], device=expert.device) - first[by_expert]
    in_queue = torch.zeros_like(queue, dtype=torch.bool)
    in_queue[order] = (place < capacity) & (by_expert < num_experts)
    kept = torch.empty(num_tokens, k, dtype=torch.bool, device=expert.device)
    kept[served] = in_queue.view(k, num_tokens).t()
    return kept


def router_loss(
    logits: Tensor,
    noisy_logits: Tensor,
    expert: Tensor,
    noise_std: float,
    weights: Mapping[str, float],
    mask: Optional[Tensor],
) -> Tensor:
    """Weighted sum, a scalar in fp32, of the losses of one router over the tokens that count; 0 if none does.

    Args:
        logits: without noise, in fp32 ``[T, E]``.
        noisy_logits: the logits that chose the experts ``[T, E]``.
        expert: chosen experts, the best first ``[T, K]``.
        noise_std: sigma of the expected load.
        weights: of the losses, by name. `importance` and `load`: squared coefficient of variation of the experts'
            summed gates, and of their summed probability to be among the first K if only their own noise is drawn
            again (V-MoE, arXiv 2106.05974; VL-MoE A.3). `z`: mean squared log-sum-exp (ST-MoE, arXiv 2202.08906).
            `gshard`: E times the sum over experts of their share of the choices times their mean gate (Switch
            Transformer, arXiv 2101.03961). `local_entropy` and `global_entropy`: mean entropy of a token's gates,
            and minus the entropy of the mean gates, with `global_entropy_experts` S above 0 as
            ``max(0, log S - entropy)`` (LIMoE, arXiv 2206.02770).
        mask: tokens that count ``[T]``; None: all.
    """
    counted = logits.new_ones(logits.shape[0], 1)
    if mask is not None:
        counted = mask.unsqueeze(1).to(logits.dtype)
        # Also so that no NaN of padding spreads.
        logits = logits.masked_fill(~mask.unsqueeze(1), 0.0)
        noisy_logits = noisy_logits.masked_fill(~mask.unsqueeze(1), 0.0)
    tokens = counted.sum()

    def mean(values: Tensor) -> Tensor:
        return (counted * values).sum(dim=0) / tokens.clamp(min=1.0)

    log_gates = torch.log_softmax(logits, dim=1)
    total = logits.new_zeros(())
    for name, weight in weights.items():
        if name == "importance":
            loss = _squared_variation(mean(log_gates.exp()))
        elif name == "load":
            distance = noisy_logits.gather(1, expert[:, -1:]) - logits
            loss = _squared_variation(
                mean(0.5 * torch.erfc(distance / (noise_std * math.sqrt(2.0))))
            )
        elif name == "z":
            loss = mean(torch.logsumexp(logits, dim=1, keepdim=True).square()).sum()
        elif name == "gshard":
            share = mean(torch.zeros_like(logits).scatter(1, expert, 1.0 / expert.shape[1]))
            loss = logits.shape[1] * (share * mean(torch.softmax(noisy_logits, dim=1))).sum()
        elif name == "local_entropy":
            loss = -mean(log_gates.exp() * log_gates).sum()
        elif name == "global_entropy":
            gates = mean(log_gates.exp())
            loss = (gates * gates.clamp(min=torch.finfo(gates.dtype).tiny).log()).sum()
            if experts := weights.get("global_entropy_experts", 0.0):
                loss = torch.relu(math.log(experts) + loss)
        else:
            continue
        total = total + weight * loss
    return total * (tokens > 0)


def _squared_variation(values: Tensor) -> Tensor:
    """Variance of non-negative values ``[E]`` over their squared mean; 0 where the mean vanishes."""
    mean = values.mean()
    vanishes = mean <= torch.finfo(values.dtype).tiny ** 0.5
    return ((values - mean) / mean.masked_fill(vanishes, 1.0)).square().mean()


def can_group(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's grouped kernel can multiply rows ``[R, D]`` with weights ``[E, F, D]`` in `dtype`."""
    if rows.device.type != "cuda" or dtype != torch.bfloat16 or not rows.shape[0]:
        return False
    # Rows of 16 bytes; and the private function of older versions of torch is for Hopper alone.
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    capability = torch.cuda.get_device_capability(rows.device)
    if hasattr(F, "grouped_mm"):
        return aligned and capability >= (8, 0)
    return aligned and capability == (9, 0) and hasattr(torch, "_grouped_mm")


@functools.lru_cache(maxsize=1)
def _threads_share_few_rows() -> bool:
    """Whether all threads on one product of few rows are faster than each on products of its own.

    So it is where MKL has its best kernels, on Intel's processors (measured on a Xeon with AMX); on others products of
    few rows wait for each other.
    """
    if not torch.backends.mkl.is_available():
        return False
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "GenuineIntel" in file.read()
    except OSError:
        return False


def _linear_by_expert(rows: Tensor, sizes: list[int], weight: Tensor, bias: Tensor) -> Tensor:
    """`F.linear` of sorted rows ``[R, D]``, an expert at a time, by weights ``[E, F, D]``: ``[R, F]``."""
    outputs = rows.new_empty(rows.shape[0], weight.shape[1])
    pool = zip(rows.split(sizes), weight.unbind(0), bias.unbind(0), outputs.split(sizes))
    for own_rows, own_weight, own_bias, own_outputs in pool:
        if own_rows.shape[0]:
            torch.addmm(own_bias, own_rows, own_weight.t(), out=own_outputs)
    return outputs


def _linear(rows: Tensor, weight: Tensor, bias: Tensor, as_columns: range) -> Tensor:
    """`F.linear` of rows ``[R, D]`` on a CPU, in fp32 in less time if `as_columns` has their number.

    As columns of the right-hand factor, whose left-hand one is the weight, few rows take little longer than the weight
    takes to be read; as rows of the left-hand factor two to three times as long.
    """
    count = rows.shape[0]
    if count not in as_columns or rows.dtype != torch.float32:
        return F.linear(rows, weight, bias)
    # A matrix times one vector takes longer than times two.
    columns = (torch.cat([rows, rows]) if count == 1 else rows).t()
    # Contiguous, since the next product is slow on transposed rows.
    return torch.addmm(bias.unsqueeze(1), weight, columns).t()[:count].contiguous()


def _side_by_side(work: Callable[[Iterator[int]], None], costs: list[int]) -> None:
    """Does pieces ``0 .. len(costs) - 1`` on a CPU, on as many threads as torch uses, each of which has torch alone.

    Several threads share a product of few rows badly. Where one piece costs much more than what a thread should get,
    this thread does them in order, each with all threads.

    Args:
        work: is called by every thread with one common iterator of pieces; they write to different memory.
        costs: of the pieces, in any unit.
    """
    threads = torch.get_num_threads()
    if threads == 1 or not costs or max(costs) * threads > LARGEST_SHARE * sum(costs):
        work(iter(range(len(costs))))
        return
    pieces = iter(sorted(range(len(costs)), key=lambda piece: -costs[piece]))
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    running: list[Future[None]] = []
    try:
        pool = _host_threads(os.getpid(), threads)
        for _ in range(threads):
            running.append(pool.submit(mode()(work), pieces))
    except RuntimeError:
        # A program whose main thread has ended starts no work in others: this one does what is left.
        work(pieces)
    wait(running)
    for done in running:
        done.result()


@functools.lru_cache(maxsize=1)
def _host_threads(process: int, number: int) -> ThreadPoolExecutor:
    """Threads in which torch uses one; made anew in a forked process, which has none."""

    def begin() -> None:
        # Asking comes first: torch sets a thread's number by the process's when the thread first needs it.
        torch.get_num_threads()
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(number, "experts", initializer=begin)
    together = threading.Barrier(number)
    wait([pool.submit(together.wait) for _ in range(number)])
    # It is also what later threads of torch begin with.
    torch.set_num_threads(number)
    return pool


def _torch_grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product of `VLMoEExperts.grouped` by torch's kernel."""
    function = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return function(rows, weight.transpose(1, 2), offs=ends)


def _opaque_grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The product of `VLMoEExperts.grouped` as one node of a graph, a loop inside, for every device and precision."""
    return torch.ops.transformers.grouped_mm_fallback(rows, weight.transpose(1, 2), ends)
