"""Inference of the Hugging Face model with experts, beside the dense model of its size and the experts of transformers.

The models are those of `convert/hf` without a head, with random weights and gradients off. The contenders with experts
are one model: another implementation is chosen by `set_experts_implementation`, and experts of transformers stand in
for ours, with the same weights, for as long as a turn takes.

Letters: n samples, L tokens of a sample, D width, E experts, K experts per token.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch import Tensor

from megatron_vlmoe.analysis.device import DTYPES
from megatron_vlmoe.benchmarks.compare import (
    CLOCKS,
    Contender,
    NotRun,
    Row,
    Work,
    compare,
    require_close,
    say,
)
from megatron_vlmoe.benchmarks.options import ExportOptions
from megatron_vlmoe.benchmarks.transformers_experts import (
    IMPLEMENTATIONS,
    batched_mm_needs,
    transformers_experts,
)
from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig
from megatron_vlmoe.convert.hf.modeling_vlmoe import VLMoEModel
from megatron_vlmoe.convert.hf.moe_vlmoe import (
    VLMoEDenseBranch,
    VLMoEExperts,
    VLMoERouter,
    VLMoESparseBranch,
)
from megatron_vlmoe.convert.hf_config import export_config

PIECES = 1000
"""Of the text tokenizer, whose number an embedding does not feel."""


class Batch(NamedTuple):
    """What a model reads.

    Args:
        kind: "texts", "images" or "pairs".
        samples: n.
        length: L.
        inputs: of the model's `forward`.
    """

    kind: str
    samples: int
    length: int
    inputs: dict[str, Tensor]


def run(options: ExportOptions) -> Iterator[list[Row]]:
    """Measures case by case, after a check that all contenders compute the same.

    Raises:
        ConfigError: a text that is longer than the model's.
        RuntimeError: a contender computes something else.
    """
    warnings.filterwarnings("ignore")
    longest = preset(f"{options.size}-dense", "--size").model.text_length
    if options.short_text > longest:
        raise ConfigError(
            f"--short-text {options.short_text}: texts of {options.size} have up to {longest} tokens"
        )
    dense = build(options, 0, 1)
    for experts in options.experts:
        for topk in options.topk:
            sparse = build(options, experts, topk)
            check_against_dense(dense, sparse)
            draw_experts(sparse)
            for batch in batches(dense, options):
                case = {
                    "size": options.size,
                    "precision": options.precision,
                    "experts": experts,
                    "topk": topk,
                    "inputs": batch.kind,
                    "batch": batch.samples,
                    "length": batch.length,
                }
                say(f"{case}")
                spread_tokens(sparse, batch)
                yield measure(case, dense, sparse, batch, options)


def build(options: ExportOptions, experts: int, topk: int) -> VLMoEModel:
    """The model that an export of a preset has; dense without experts. Equal seeds, so that equal parts are equal."""
    base = preset(f"{options.size}-{'8e' if experts else 'dense'}", "--size")
    model = replace(base.model, vocab_size=PIECES)
    moe = replace(base.moe, num_vision_experts=experts, num_text_experts=experts, topk=topk)
    content = export_config(replace(base, model=model, moe=moe))
    built = VLMoEModel(VLMoEConfig(**content)).eval().to(_device(), DTYPES[options.precision])
    for branch in sparse_branches(built).values():
        # As transformers loads it.
        branch.router.float()
    return built


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def sparse_branches(model: VLMoEModel) -> dict[str, VLMoESparseBranch]:
    """Feed-forward branches with experts, by the names of their modules."""
    found = model.named_modules()
    return {name: module for name, module in found if isinstance(module, VLMoESparseBranch)}


def batches(model: VLMoEModel, options: ExportOptions) -> Iterator[Batch]:
    """Random inputs of every case."""
    for kind in options.inputs:
        for samples in options.batch:
            length = model.config.pair_text_length if kind == "pairs" else model.config.text_length
            yield random_batch(model, kind, samples, length)
    if options.short_text:
        yield random_batch(model, "texts", 1, options.short_text)


def random_batch(model: VLMoEModel, kind: str, samples: int, text_length: int) -> Batch:
    """Texts of so many random pieces and images of noise, from a fixed seed; no sample is padded."""
    generator = torch.Generator().manual_seed(1)
    config, length = model.config, 0
    inputs: dict[str, Tensor] = {}
    if kind != "images":
        # Behind the special tokens, of which padding would ask for a mask.
        shape: tuple[int, ...] = (samples, text_length)
        inputs["input_ids"] = torch.randint(10, PIECES, shape, generator=generator)
        length += text_length
    if kind != "texts":
        shape = (samples, config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(shape, generator=generator)
        inputs["pixel_values"] = pixels.to(next(model.parameters()).dtype)
        length += 1 + config.num_patches
    placed = {name: value.to(_device()) for name, value in inputs.items()}
    return Batch(kind, samples, length, placed)


@torch.no_grad()
def check_against_dense(dense: VLMoEModel, sparse: VLMoEModel) -> None:
    """Gives a model with experts the weights of a dense one, its FFN to every expert.

    Raises:
        RuntimeError: it computes something else then, with gates that add up to 1.
    """
    sparse.load_state_dict(dense.state_dict(), strict=False)
    for name, branch in sparse_branches(sparse).items():
        single = dense.get_submodule(name)
        assert isinstance(single, VLMoEDenseBranch)
        branch.experts.fc1_weight.copy_(single.fc1.weight.expand_as(branch.experts.fc1_weight))
        branch.experts.fc1_bias.copy_(single.fc1.bias.expand_as(branch.experts.fc1_bias))
        branch.experts.fc2_weight.copy_(single.fc2.weight.expand_as(branch.experts.fc2_weight))
        branch.experts.fc2_bias.copy_(single.fc2.bias.expand_as(branch.experts.fc2_bias))
    for kind, length in (("texts", 16), ("pairs", 8)):
        batch = random_batch(dense, kind, 1, length)
        sparse.config.normalize_gate = True
        found = sparse(**batch.inputs).last_hidden_state
        sparse.config.normalize_gate = False
        expected = dense(**batch.inputs).last_hidden_state
        require_close(f"the model with equal experts, {kind}:", found, expected)


@torch.no_grad()
def draw_experts(model: VLMoEModel) -> None:
    """Gives every expert weights of its own, of a scale at which a wrong expert shows, and routers that are decided."""
    torch.manual_seed(2)
    for branch in sparse_branches(model).values():
        pool = branch.experts
        for parameter in (branch.router.weight, pool.fc1_weight, pool.fc2_weight):
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        for bias in (pool.fc1_bias, pool.fc2_bias):
            bias.normal_(std=0.1)


@torch.no_grad()
def spread_tokens(model: VLMoEModel, batch: Batch) -> None:
    """Takes what all tokens of a batch have in common out of the routers' weights.

    Else most tokens would go to a few experts, which training prevents by its losses of load.
    """

    def without_mean(router: VLMoERouter, given: tuple[Tensor]) -> None:
        mean = given[0].float().mean(dim=0)
        router.weight.sub_(torch.outer(router.weight @ mean, mean) / mean.dot(mean))

    routers = [branch.router for branch in sparse_branches(model).values()]
    hooks = [router.register_forward_pre_hook(without_mean) for router in routers]
    model(**batch.inputs)
    for hook in hooks:
        hook.remove()


def measure(
    case: dict[str, Any],
    dense: VLMoEModel,
    sparse: VLMoEModel,
    batch: Batch,
    options: ExportOptions,
) -> list[Row]:
    """The rows of one case."""
    known = experts_of_contenders(sparse, batch)
    calls = pool_calls(sparse, batch)
    ready = [contender("dense", dense, batch, contextlib.nullcontext, options)]
    failed = []
    for name in options.contenders:
        try:
            with known[name]():
                check_pools(name, sparse, calls)
            ready.append(contender(name, sparse, batch, known[name], options))
        except NotRun as reason:
            failed.append(Row(case, name, note=f"not run: {reason}"))
    say(load_of(calls, sparse))
    rows = compare(
        case,
        ready,
        reference="dense",
        rounds=options.rounds,
        turn_seconds=options.turn_seconds,
        items=batch.samples * batch.length,
    )
    return rows + failed


Experts = Callable[[], AbstractContextManager[None]]
"""Puts a contender's experts into the model for as long as the context lasts."""


def experts_of_contenders(model: VLMoEModel, batch: Batch) -> dict[str, Experts]:
    """Contenders with experts by name."""
    rows = batch.samples * batch.length * model.config.num_experts_per_tok
    return {
        "ours": contextlib.nullcontext,
        "ours_eager": functools.partial(implementation, model, "eager", rows),
        "ours_batched_mm": functools.partial(implementation, model, "batched_mm", rows),
        **{
            f"transformers_{name}": functools.partial(experts_of_transformers, model, name, rows)
            for name in IMPLEMENTATIONS
        },
    }


@contextlib.contextmanager
def implementation(model: VLMoEModel, name: str, rows: int) -> Iterator[None]:
    """Our experts by another of their implementations, chosen as users do it."""
    if not hasattr(model, "set_experts_implementation"):
        raise NotRun("needs transformers 5")
    check_memory(model, name, rows)
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextlib.contextmanager
def experts_of_transformers(model: VLMoEModel, name: str, rows: int) -> Iterator[None]:
    """Experts of transformers in the place of ours."""
    check_memory(model, name, rows)
    branches = list(sparse_branches(model).values())
    ours = [branch.experts for branch in branches]
    try:
        for branch, pool in zip(branches, ours):
            weights = (pool.fc1_weight, pool.fc1_bias, pool.fc2_weight, pool.fc2_bias)
            branch.experts = transformers_experts(name, *weights)  # type: ignore[assignment]
        yield
    finally:
        for branch, pool in zip(branches, ours):
            branch.experts = pool


def check_memory(model: VLMoEModel, name: str, rows: int) -> None:
    """Raises NotRun if there is none for an implementation that copies weights."""
    if name == "batched_mm":
        for branch in sparse_branches(model).values():
            assert isinstance(branch.experts, VLMoEExperts)
            batched_mm_needs(rows, branch.experts.fc1_weight)


class PoolCall(NamedTuple):
    """What one pool got and gave in a pass: tokens ``[T, D]``, experts and gates ``[T, K]``, outputs ``[T, D]``."""

    tokens: Tensor
    expert: Tensor
    gate: Tensor
    output: Tensor


@torch.inference_mode()
def pool_calls(model: VLMoEModel, batch: Batch) -> dict[str, PoolCall]:
    """The calls of all pools that a batch reaches, by branch, with the outputs of a plain loop over the experts."""
    calls: dict[str, PoolCall] = {}

    def keep(name: str, pool: VLMoEExperts, given: tuple[Tensor, Tensor, Tensor]) -> None:
        weights = (pool.fc1_weight, pool.fc1_bias, pool.fc2_weight, pool.fc2_bias)
        calls[name] = PoolCall(*given, loop(*given, *weights))

    hooks = [
        branch.experts.register_forward_pre_hook(
            lambda pool, given, name=name: keep(name, pool, given)
        )
        for name, branch in sparse_branches(model).items()
    ]
    model(**batch.inputs)
    for hook in hooks:
        hook.remove()
    return calls


def loop(
    tokens: Tensor,
    expert: Tensor,
    gate: Tensor,
    fc1: Tensor,
    fc1_bias: Tensor,
    fc2: Tensor,
    fc2_bias: Tensor,
) -> Tensor:
    """What experts compute, in fp32 and one after the other."""
    result = torch.zeros_like(tokens, dtype=torch.float32)
    for number in range(len(fc1)):
        token, choice = torch.where(expert == number)
        inner = tokens[token].float() @ fc1[number].float().T + fc1_bias[number].float()
        output = torch.nn.functional.gelu(inner) @ fc2[number].float().T + fc2_bias[number].float()
        result.index_add_(0, token, gate[token, choice, None].float() * output)
    return result


@torch.inference_mode()
def check_pools(name: str, model: VLMoEModel, calls: dict[str, PoolCall]) -> None:
    """Raises RuntimeError unless the experts that are in the model give what the loop gives.

    Pool by pool, for the same choices: of two models that differ by rounding, a token may choose differently.
    """
    branches = sparse_branches(model)
    for branch, call in calls.items():
        found = branches[branch].experts(call.tokens, call.expert, call.gate)
        require_close(f"{name}, {branch}:", found, call.output)


def load_of(calls: dict[str, PoolCall], model: VLMoEModel) -> str:
    """How the tokens of a batch spread: the mean over its pools, in words."""
    counts = [
        torch.bincount(call.expert.flatten(), minlength=sparse_branches(model)[name].num_experts)
        for name, call in calls.items()
    ]
    busy = sum(float((own > 0).sum()) for own in counts) / len(counts)
    fullest = sum(float(own.max() / own.float().mean()) for own in counts) / len(counts)
    return f"{busy:.1f} of {len(counts[0])} experts have tokens, the fullest {fullest:.1f} times its share"


def contender(
    name: str, model: VLMoEModel, batch: Batch, experts: Experts, options: ExportOptions
) -> Contender:
    """A contender whose repetition is one pass."""
    clock = CLOCKS[options.clock]

    @contextlib.contextmanager
    def ready() -> Iterator[Work]:
        def work() -> dict[str, float]:
            start = clock()
            model(**batch.inputs)
            return {"forward": clock() - start}

        with experts(), torch.inference_mode():
            yield work

    return Contender(name, ready)
