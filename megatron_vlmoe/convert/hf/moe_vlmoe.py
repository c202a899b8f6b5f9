"""Feed-forward branches of VL-MoE: dense FFNs, and pools of experts with their routers.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, T tokens of a pool in the batch, D width, F inner
width, E experts, K experts per token, R rows: choices of tokens that are carried out.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vlmoe import VLMoEConfig


class VLMoEDenseBranch(nn.Module):
    """LayerNorm and one FFN: ``W2 gelu(W1 x + b1) + b2``.

    Args:
        config: sizes.
        layer_number: number of the block, from 1.
    """

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.fc2.init_scale = output_init_scale(layer_number)

    def forward(self, hidden_states: Tensor, text_length: int, mask: Optional[Tensor]) -> Tensor:
        """``[n, L, D]`` to ``[n, L, D]``; the other arguments are those of a sparse branch."""
        return self.fc2(F.gelu(self.fc1(self.layernorm(hidden_states))))


class VLMoERouter(nn.Module):
    """Linear router without bias, in fp32 whatever the precision of the model."""

    def __init__(self, config: VLMoEConfig, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(num_experts, config.hidden_size, dtype=torch.float32)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Gates in fp32: ``[T, D]`` to ``[T, E]``, each row with sum 1."""
        with torch.autocast(tokens.device.type, enabled=False):
            return torch.softmax(F.linear(tokens.float(), self.weight.float()), dim=1)


class VLMoEExperts(nn.Module):
    """The FFNs of one pool as batched weights ``[E, ...]``."""

    def __init__(self, config: VLMoEConfig, num_experts: int, layer_number: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.num_experts = num_experts
        self.init_scale = output_init_scale(layer_number)
        self.fc1_weight = nn.Parameter(torch.empty(num_experts, inner, width))
        self.fc1_bias = nn.Parameter(torch.zeros(num_experts, inner))
        self.fc2_weight = nn.Parameter(torch.empty(num_experts, width, inner))
        self.fc2_bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Every expert's FFN on its own rows.

        Args:
            rows: ``[R, D]``, sorted by expert.
            counts: rows of every expert ``[E]``.

        Returns:
            ``[R, D]``.
        """
        dtype = rows.dtype
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
        if can_group(rows, self.fc1_weight, dtype):
            return self.grouped(rows.to(dtype), counts)
        return self.one_by_one(rows, counts)

    def grouped(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`forward` in two matmuls of torch's grouped kernel; the host need not know the counts."""
        ends = counts.cumsum(0).to(torch.int32)
        expert = torch.repeat_interleave(
            torch.arange(self.num_experts, device=rows.device), counts, output_size=rows.shape[0]
        )
        dtype = rows.dtype
        inner = _grouped_mm(rows, self.fc1_weight.to(dtype).transpose(1, 2), ends)
        inner = F.gelu(inner + self.fc1_bias.to(dtype)[expert])
        outputs = _grouped_mm(inner, self.fc2_weight.to(dtype).transpose(1, 2), ends)
        return outputs + self.fc2_bias.to(dtype)[expert]

    def one_by_one(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`forward` with two matmuls for every expert that has rows."""
        if not len(rows):
            return rows
        busy = counts.nonzero().squeeze(1)
        # Unbound at once: the gradient of a slice would be as large as the whole pool, for every expert.
        pool = [
            parameter.unbind(0)
            for parameter in (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        ]
        outputs = []
        for expert, part in zip(busy.tolist(), rows.split(counts[busy].tolist())):
            fc1_weight, fc1_bias, fc2_weight, fc2_bias = (values[expert] for values in pool)
            inner = F.gelu(F.linear(part, fc1_weight, fc1_bias))
            outputs.append(F.linear(inner, fc2_weight, fc2_bias))
        return torch.cat(outputs)


class Routing(NamedTuple):
    """Where the tokens of a pool go.

    Args:
        gate: combine weights ``[T, K]`` in fp32.
        expert: chosen experts ``[T, K]``.
        kept: choices that are carried out ``[T, K]``; None means all.
    """

    gate: Tensor
    expert: Tensor
    kept: Optional[Tensor]


class VLMoESparseBranch(nn.Module):
    """LayerNorm, a router and a pool of experts.

    Args:
        config: sizes and routing options, of which `capacity_factor` and `route_padding` may change between calls.
        num_experts: E.
        layer_number: number of the block, from 1.
    """

    def __init__(self, config: VLMoEConfig, num_experts: int, layer_number: int) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.router = VLMoERouter(config, num_experts)
        self.experts = VLMoEExperts(config, num_experts, layer_number)

    def forward(self, hidden_states: Tensor, text_length: int, mask: Optional[Tensor]) -> Tensor:
        """Gated sum of the experts' outputs; zero for choices that found no place and for padding.

        Args:
            hidden_states: ``[n, L, D]``.
            text_length: Lt, which come before the image's tokens.
            mask: True for tokens that are no padding ``[n, L]``; None if none is.

        Returns:
            ``[n, L, D]``.
        """
        samples, length, width = hidden_states.shape
        tokens = to_stream(self.layernorm(hidden_states), text_length)
        if mask is None or self.config.route_padding:
            slots = None
        else:
            slots = to_stream(mask.unsqueeze(2), text_length).squeeze(1)
        routing = self.route(tokens, slots)
        return from_stream(self.combine(tokens, routing), samples, length, text_length)

    def route(self, tokens: Tensor, mask: Optional[Tensor]) -> Routing:
        """Chooses experts for tokens ``[T, D]``, of which those with a False in mask ``[T]`` are left out."""
        config = self.config
        gate, expert = top_k_experts(self.router(tokens), config.num_experts_per_tok)
        if config.capacity_factor > 0.0:
            capacity = expert_capacity(
                len(tokens),
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

    def combine(self, tokens: Tensor, routing: Routing) -> Tensor:
        """Runs the experts on tokens ``[T, D]`` and adds up their gated outputs: ``[T, D]``."""
        num_tokens, k = routing.expert.shape
        if routing.kept is None:
            choice = torch.arange(num_tokens * k, device=tokens.device)
        else:
            choice = routing.kept.flatten().nonzero().squeeze(1)
        expert = routing.expert.flatten()[choice]
        order = torch.argsort(expert, stable=True)
        choice = choice[order]
        counts = torch.bincount(expert, minlength=self.num_experts)
        outputs = self.experts(tokens[choice // k], counts)
        outputs = outputs * routing.gate.flatten()[choice].to(outputs.dtype).unsqueeze(1)
        # Every choice has a row of its own, so that the sum has a fixed order.
        by_choice = outputs.new_zeros(num_tokens * k, outputs.shape[1])
        by_choice = by_choice.index_copy(0, choice, outputs)
        return by_choice if k == 1 else by_choice.view(num_tokens, k, -1).sum(dim=1)


class VLMoEFeedForward(nn.Module):
    """The feed-forward half of a block: every token goes through the branch of its modality.

    Args:
        config: says which branches the block has.
        layer_number: number of the block, from 1.
    """

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.names = tuple(branch.name for branch in config.branches(layer_number))
        for name, num_experts in config.branches(layer_number):
            branch: nn.Module
            if num_experts:
                branch = VLMoESparseBranch(config, num_experts, layer_number)
            else:
                branch = VLMoEDenseBranch(config, layer_number)
            self.add_module(name, branch)

    def forward(self, hidden_states: Tensor, text_length: int, mask: Optional[Tensor]) -> Tensor:
        """``[n, L, D]`` to ``[n, L, D]``; see `VLMoESparseBranch.forward` for the arguments."""
        length = hidden_states.shape[1]
        if 0 < text_length < length and "vl" in self.names:
            return self.get_submodule("vl")(hidden_states, text_length, mask)
        if "shared" in self.names:
            return self.get_submodule("shared")(hidden_states, text_length, mask)
        outputs = []
        if text_length:
            text_mask = None if mask is None else mask[:, :text_length]
            text = self.get_submodule("text")
            outputs.append(text(hidden_states[:, :text_length], text_length, text_mask))
        if text_length < length:
            # No part of an image is padding.
            outputs.append(self.get_submodule("vision")(hidden_states[:, text_length:], 0, None))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


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
    texts, images = stream.split([samples * text_length, samples * (length - text_length)])
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
    return max(1, min(num_tokens, capacity))


@torch.no_grad()
def choices_with_place(
    gate: Tensor,
    expert: Tensor,
    num_experts: int,
    capacity: int,
    mask: Optional[Tensor],
    batch_priority: bool,
) -> Tensor:
    """Which choices find a place at their expert, by Batch Priority Routing (V-MoE, arXiv 2106.05974).

    Tokens are served in falling order of their largest gate, equal ones by their position; all first choices come
    before all second ones.

    Args:
        gate: gates of the choices ``[T, K]``, the largest first.
        expert: chosen experts ``[T, K]``.
        num_experts: E.
        capacity: places at every expert.
        mask: tokens with False take no place ``[T]``; None: there are none.
        batch_priority: False serves the tokens by position.

    Returns:
        ``[T, K]`` bool.
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
    place = torch.arange(len(queue), device=expert.device) - first[by_expert]
    in_queue = torch.zeros_like(queue, dtype=torch.bool)
    in_queue[order] = (place < capacity) & (by_expert < num_experts)
    kept = torch.empty(num_tokens, k, dtype=torch.bool, device=expert.device)
    kept[served] = in_queue.view(k, num_tokens).t()
    return kept


def can_group(rows: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's grouped kernel can multiply rows ``[R, D]`` with weights ``[E, F, D]`` in `dtype`."""
    if rows.device.type != "cuda" or dtype != torch.bfloat16 or not len(rows):
        return False
    # Rows of 16 bytes; and the private function of older versions of torch is for Hopper alone.
    aligned = all(size % 8 == 0 for size in weight.shape[1:])
    capability = torch.cuda.get_device_capability(rows.device)
    if hasattr(F, "grouped_mm"):
        return aligned and capability >= (8, 0)
    return aligned and capability == (9, 0) and hasattr(torch, "_grouped_mm")


def _grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows ``[R, D]`` of group e, up to ``ends[e]``, times ``weight[e]`` of ``[E, D, F]``: ``[R, F]``."""
    function = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    product = function(rows, weight, offs=ends)
    if product.requires_grad:
        # The kernel's backward refuses gradients that are expanded from fewer numbers.
        product.register_hook(Tensor.contiguous)
    return product
