"""What an upcycling makes of its source: the sparse configuration, which pools, and how the new experts start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from megatron_vlmoe.config.command_line import normalize_arguments, parse_options
from megatron_vlmoe.config.errors import ConfigError, ConvertError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import MoEConfig, ParallelConfig, RunConfig
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.stream.block_plan import Branch, block_plans, has_experts

RouterStart = Literal["auto", "small", "fresh", "zero"]
SharedFrom = Literal["vision", "text", "mean"]

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_vl_layers")


@dataclass(frozen=True)
class UpcycleOptions:
    """How new experts and routers start.

    Args:
        router: `small` rows leave every gate at 1 / E; `fresh` rows are those of a new run; `zero` rows tie;
            `auto` is `fresh` where the gates are normalised, else `small`.
        shared_from: which FFN and LayerNorm the experts of a shared pool start from.
        noise: standard deviation of the noise on every expert's matrices, relative to that of the matrix.
        drop_fraction: share of the inner channels of every expert that start anew (Drop-Upcycling, arXiv 2502.19261).
        seed: of routers, noise and dropped channels.
        carry_optimizer: takes moments, schedule and step along; otherwise weights alone, at step 0.
    """

    router: RouterStart = "auto"
    shared_from: SharedFrom = "vision"
    noise: float = 0.0
    drop_fraction: float = 0.0
    seed: int = 1234
    carry_optimizer: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.noise < float("inf"):
            raise ConfigError(f"--noise {self.noise:g}: must be 0 or more")
        if not 0.0 <= self.drop_fraction <= 1.0:
            raise ConfigError(f"--drop-fraction {self.drop_fraction:g}: must be in 0..1")


def sparse_config(
    source: RunConfig, where: str, preset_name: str, num_experts: int, words: Sequence[str]
) -> RunConfig:
    """The source's configuration with the MoE section of a preset and options.

    Args:
        source: configuration of the checkpoint.
        where: the checkpoint, for messages.
        preset_name: gives the MoE section; empty keeps that of a sparse source, or the defaults.
        num_experts: experts of every pool; 0 leaves them to preset and options.
        words: options `--moe.NAME VALUE`.

    Raises:
        ConvertError: a preset of another size, or no experts.
        ConfigError: an option of another section, or options that contradict each other.
    """
    normalized = normalize_arguments(words)
    for name in (word for word in normalized if word.startswith("--")):
        if not name.startswith("--moe."):
            raise ConfigError(
                f"{name}: only --moe options; everything else comes from the checkpoint"
            )
    moe = source.moe if has_experts(source.moe) else MoEConfig()
    if preset_name:
        chosen = preset(preset_name)
        for field in SIZES:
            here, there = getattr(source.model, field), getattr(chosen.model, field)
            if here != there:
                raise ConvertError(
                    f"--preset {preset_name} is of another size than {where}: {field} {here}, not {there}"
                )
        moe = chosen.moe
    start = replace(source, moe=moe)
    moe = parse_options("upcycle", normalized, start).config.moe
    if num_experts:
        vl = num_experts if moe.vl else 0
        moe = replace(
            moe,
            num_vision_experts=num_experts,
            num_text_experts=num_experts,
            num_vl_experts=vl,
        )
    if not has_experts(moe):
        raise ConvertError("no experts: give --preset, --num-experts or --moe options")
    made = replace(
        source, moe=moe, checkpoint=replace(source.checkpoint, save="", load="", require=False)
    )
    # The layout is that of the run that loads it.
    validate(replace(made, parallel=ParallelConfig()))
    return made


# Parameters of an expert pool, and of the dense FFN that they are stacked from.
DENSE_PARTS = {
    "weight1": "linear_fc1.weight",
    "bias1": "linear_fc1.bias",
    "weight2": "linear_fc2.weight",
    "bias2": "linear_fc2.bias",
}
OUTPUT_PARTS = ("weight2", "bias2")


@dataclass(frozen=True)
class PoolPlan:
    """A pool that is new or grows.

    Args:
        layer_number: block, from 1.
        name: of the pool: `text`, `vision`, `vl` or `shared`.
        num_experts: experts that it will have.
        sources: branches of the source whose mean the experts start from (nearly always one).
        source_experts: experts of the source's pool; 0 if it is one FFN.
    """

    layer_number: int
    name: str
    num_experts: int
    sources: tuple[str, ...]
    source_experts: int = 0

    @property
    def copies(self) -> int:
        """New experts per source expert (or per FFN); new expert e is copy e % copies of e // copies."""
        return self.num_experts // max(self.source_experts, 1)

    @property
    def block(self) -> str:
        """Prefix of the block's feed-forward half."""
        return f"decoder.layers.{self.layer_number - 1}.mlp."

    @property
    def router_key(self) -> str:
        """Key of the router's rows."""
        return f"{self.block}moe.router.{self.name}.weight"

    def expert_key(self, part: str) -> str:
        """Key of one of the pool's parameters."""
        return f"{self.block}moe.experts.{self.name}.{part}"

    def source_keys(self, part: str) -> tuple[str, ...]:
        """Keys in the source of what one of the pool's parameters is copied from."""
        if self.source_experts:
            return (self.expert_key(part),)
        return tuple(f"{self.block}{name}_ffn.{DENSE_PARTS[part]}" for name in self.sources)

    def norm_keys(self, part: str) -> tuple[str, ...]:
        """Keys in the source of `weight` or `bias` of the pool's LayerNorm."""
        return tuple(f"{self.block}{name}_norm.{part}" for name in self.sources)

    def scale(self, moe: MoEConfig) -> float:
        """Factor of the experts' output layer that makes up for the gates of tied experts.

        Unless they are normalised, a token's k gates sum to k / E of what one FFN counts, or to 1 / copies of what
        they summed to.
        """
        if moe.normalize_gate:
            return 1.0
        if not self.source_experts:
            return self.num_experts / moe.topk
        return self.copies if moe.topk == 1 else 1.0


def grown_pools(source: RunConfig, target: RunConfig, shared_from: SharedFrom) -> list[PoolPlan]:
    """The pools of the target that the source does not have as they are.

    Raises:
        ConvertError: the target lacks experts of the source, has a number that is no multiple of the source's, or
            would choose among copies so that the function changes.
    """
    found = []
    pairs = zip(block_plans(source.model, source.moe), block_plans(target.model, target.moe))
    for before, after in pairs:
        old = {branch.name: branch.num_experts for branch in before.branches}
        for branch in after.branches:
            plan = _grown(after.layer_number, old, branch, shared_from)
            if plan.source_experts:
                _check_choice(plan, source.moe, target.moe)
            if branch.num_experts != plan.source_experts:
                found.append(plan)
    if not found:
        raise ConvertError("nothing to do: the checkpoint has these experts already")
    return found


def _grown(number: int, old: dict[str, int], branch: Branch, shared_from: SharedFrom) -> PoolPlan:
    name, count = branch.name, branch.num_experts
    if name in old:
        before = old[name]
        if before and (not count or count % before):
            wanted = f"{count}: the number must be a multiple" if count else "one FFN"
            raise ConvertError(
                f"block {number} has {before} {name} experts, which cannot become {wanted}"
            )
        return PoolPlan(number, name, count, (name,), before)
    if name != "shared":
        raise ConvertError(f"block {number} has a shared pool, which cannot be split by modality")
    for pool in ("text", "vision"):
        if old[pool]:
            raise ConvertError(
                f"block {number} has {pool} experts, which cannot become a shared pool"
            )
    sources = ("vision", "text") if shared_from == "mean" else (shared_from,)
    return PoolPlan(number, "shared", count, sources)


def _check_choice(plan: PoolPlan, before: MoEConfig, after: MoEConfig) -> None:
    """Copies of one expert tie: a token must get one copy of its one expert, or all copies of its k experts."""
    where = f"block {plan.layer_number}: {plan.source_experts} {plan.name} experts to {plan.num_experts}"
    if before.normalize_gate != after.normalize_gate:
        raise ConvertError(
            f"{where}: moe.normalize_gate is {before.normalize_gate} in the checkpoint, {after.normalize_gate} here"
        )
    wanted = sorted({before.topk * plan.copies, *((1,) if before.topk == 1 else ())})
    if after.topk not in wanted:
        numbers = " or ".join(map(str, wanted))
        raise ConvertError(
            f"{where}: moe.topk is {before.topk} in the checkpoint and {after.topk} here; "
            f"only {numbers} keeps what the model computes"
        )
