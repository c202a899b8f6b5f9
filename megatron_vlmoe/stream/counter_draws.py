"""Random numbers as a function of a counter: all those of a micro-batch at once, each rank its own share.

The alternative to a generator for every draw (`stream/draws.py`), with `train.counter_draws`. Everything happens on the
device, in the same operations for every micro-batch, whose number is a tensor: it can be part of a CUDA graph.

Letters: n samples of a segment on this rank, L tokens of a sample, T tokens of a pool or of the stream, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.stream.block_plan import block_plan
from megatron_vlmoe.stream.draws import PURPOSES
from megatron_vlmoe.stream.layout import PAIR_SEGMENTS, SEGMENTS, SegmentName, StreamLayout
from megatron_vlmoe.stream.sizes import drop_path_rate, router_noise_std

# Of splitmix64, as int64 has them.
GAMMA, FACTOR_1, FACTOR_2 = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)
LOW_32 = 2**32 - 1
Draw = tuple[int, str]
"""Number of a block, and what it draws for, a name of `PURPOSES`."""


def splitmix64(state: Tensor, number: Tensor) -> Tensor:
    """Output `number`, counted from 0, of the generator splitmix64 that starts at `state`.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), with the constants of
    Vigna's splitmix64.c. Integer arithmetic modulo 2^64: the same bits on every device.

    Args:
        state: int64, whose bits are an unsigned number.
        number: int64; the two are broadcast.

    Returns:
        int64, whose bits are the output.
    """
    bits = state + (number + 1) * GAMMA
    for shift, factor in ((30, FACTOR_1), (27, FACTOR_2), (31, None)):
        # Shifting an int64 copies its sign; into an unsigned number come zeros.
        bits ^= (bits >> shift).bitwise_and_(2 ** (64 - shift) - 1)
        if factor is not None:
            bits *= factor
    return bits


def standard_normal(bits: Tensor) -> Tensor:
    """Two standard normal numbers of every 64 random bits (Box and Muller): int64 ``[..., n]`` to fp32 ``[..., 2 n]``.

    The two of one entry are neighbours; no number is beyond 6.77. Devices may differ in the last digit, as their
    logarithms and cosines do. The bits are spent.
    """
    # Of the upper half in (0, 1], so that the logarithm is finite; of the lower half from 0 to 2 pi.
    uniform = (bits >> 32).bitwise_and_(LOW_32).float().mul_(2.0**-32).add_(2.0**-33)
    radius = uniform.log_().mul_(-2.0).sqrt_()
    angle = bits.bitwise_and_(LOW_32).float().mul_(2.0 * math.pi * 2.0**-32)
    pairs = radius.new_empty(*radius.shape, 2)
    torch.mul(radius, angle.cos(), out=pairs[..., 0])
    torch.mul(radius, angle.sin_(), out=pairs[..., 1])
    return pairs.flatten(-2)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What the blocks of a model chunk draw for one micro-batch.

    Args:
        noise: standard normal, fp32 ``[T, E]`` for the tokens of a pool on this rank; absent where it has none.
        keep_scales: stochastic depth, ``[T, 1, 1]``: 0 for the tokens of dropped samples, 1 / (1 - rate) for others;
            absent where nothing is dropped.
    """

    noise: dict[Draw, Tensor]
    keep_scales: dict[Draw, Tensor]


@dataclass
class _Run:
    """Segments of a pool that follow each other and have samples of one length.

    Args:
        last: place of the last one among the segments of the pool that have samples.
        tokens: of all of them.
    """

    draw: Draw
    last: int
    tokens: int


class CounterDraws:
    """Draws for all blocks of a model chunk.

    The bits of a number come from a chain of `splitmix64`, in which every output is the next state: the seed is the
    first one, and the numbers are the purpose, the block, the segment, the sample, and the micro-batch; for noise also
    ``position * ceil(E / 2) + expert // 2``. Samples are counted within their segment over all tensor-parallel ranks.
    So a token has the same noise at every layout, and in a micro-batch of which only some segments are read. What does
    not depend on the micro-batch is computed once.

    Args:
        config: the run.
        layers: numbers of the chunk's blocks.
        layout: this rank's share of a micro-batch.
        tensor_rank: tensor-parallel rank; samples of rank r are the r-th part of each segment.
        dtype: of `Drawn.keep_scales`.
        device: where the numbers are drawn.
    """

    def __init__(
        self,
        config: RunConfig,
        layers: Iterable[int],
        layout: StreamLayout,
        tensor_rank: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        model, moe = config.model, config.moe

        def states(draw: Draw, segment: SegmentName) -> Tensor:
            """Of this rank's samples ``[n]``."""
            number, purpose = draw
            state = torch.tensor(config.train.seed)
            for code in (PURPOSES[purpose], number, SEGMENTS.index(segment)):
                state = splitmix64(state, torch.tensor(code))
            count = layout.count(segment)
            return splitmix64(state, torch.arange(count) + tensor_rank * count)

        # Samples that can be dropped; the two halves of a pair are one.
        samples = [name for name in SEGMENTS if name != PAIR_SEGMENTS[1] and layout.count(name)]
        self.drops: list[Draw] = []
        rates: list[float] = []
        parts: list[Tensor] = []
        # By length of a sample and experts of a pool: numbers in tensors of equal shape are drawn together.
        self.noises: dict[tuple[int, int], list[_Run]] = {}
        noise_parts: dict[tuple[int, int], list[Tensor]] = {}
        for number in layers:
            rate = drop_path_rate(model.drop_path, number, model.num_layers)
            for purpose in ("attention_drop_path", "ffn_drop_path") if rate > 0.0 else ():
                self.drops.append((number, purpose))
                rates.append(rate)
                parts += [states(self.drops[-1], segment) for segment in samples]
            for pool in block_plan(model, moe, number).pools if moe.train_experts else ():
                draw = number, f"{pool.name}_noise"
                has_noise = router_noise_std(moe, pool.num_experts) > 0.0
                present = [name for name in pool.segments if has_noise and layout.count(name)]
                for place, segment in enumerate(present):
                    shape = layout.length(segment), pool.num_experts
                    runs = self.noises.setdefault(shape, [])
                    if runs and (runs[-1].draw, runs[-1].last + 1) == (draw, place):
                        runs[-1].last = place
                        runs[-1].tokens += layout.size(segment)
                    else:
                        runs.append(_Run(draw, place, layout.size(segment)))
                    noise_parts.setdefault(shape, []).append(states(draw, segment))
        parts += [torch.cat(own) for own in noise_parts.values()]
        counts = [layout.count(name) for name in samples]
        self.sizes = [len(rates) * sum(counts), *map(len, parts[len(rates) * len(samples) :])]
        self.states = torch.cat(parts or [torch.zeros(0, dtype=torch.int64)]).to(device)
        # A sample is dropped if the upper half of its bits is below the threshold.
        thresholds = [[math.ceil(rate * 2**32)] for rate in rates]
        self.thresholds = torch.tensor(thresholds, dtype=torch.int64, device=device)
        self.kept = torch.tensor(
            [[1.0 / (1.0 - rate)] for rate in rates], dtype=dtype, device=device
        )
        first = dict(zip(samples, itertools.accumulate(counts, initial=0)))
        first[PAIR_SEGMENTS[1]] = first.get(PAIR_SEGMENTS[0], 0)
        of_tokens = [
            (first[name] + torch.arange(layout.count(name))).repeat_interleave(layout.length(name))
            for name in SEGMENTS
            if layout.count(name)
        ]
        self.sample_of_token = torch.cat(of_tokens).to(device)

    def draw(self, micro_batch: Tensor) -> Drawn:
        """The numbers of a micro-batch by its number, an int64 without dimensions on the device."""
        dropping, *noise_states = splitmix64(self.states, micro_batch).split(self.sizes)
        keep_scales: dict[Draw, Tensor] = {}
        if self.drops:
            upper = (dropping.view(len(self.drops), -1) >> 32).bitwise_and_(LOW_32)
            scales = torch.where(upper >= self.thresholds, self.kept, 0.0)
            of_tokens = scales.index_select(1, self.sample_of_token)
            keep_scales = dict(zip(self.drops, of_tokens.view(len(self.drops), -1, 1, 1)))
        found: dict[Draw, dict[int, Tensor]] = {}
        for ((length, experts), runs), states in zip(self.noises.items(), noise_states):
            width = experts + experts % 2
            places = torch.arange(length * width // 2, device=states.device)
            numbers = standard_normal(splitmix64(states.unsqueeze(1), places))
            by_token = numbers.view(-1, width)[:, :experts]
            for run, own in zip(runs, by_token.split([run.tokens for run in runs])):
                found.setdefault(run.draw, {})[run.last] = own
        noise = {}
        for draw, parts in found.items():
            in_order = [parts[place] for place in sorted(parts)]
            noise[draw] = in_order[0] if len(in_order) == 1 else torch.cat(in_order)
        return Drawn(noise, keep_scales)
