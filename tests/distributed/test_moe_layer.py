"""The MoE layer against a plain loop over experts, with drops, padding and two experts per token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Layout, Workers, layout
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import start

from megatron_vlmoe.stream.layout import PAIR_SEGMENTS
from megatron_vlmoe.stream.sizes import expert_capacity

OPTIONS = (
    *("--moe.topk", "2", "--moe.aux_loss_coefficient", "0"),
    *("--moe.noise_std", "0", "--parallel.overlap_grad_reduce", "false"),
)

# With both, some tokens find no place.
FACTORS = {"token_choice": 0.8, "expert_choice": 0.4}
WITH_VL = ("--moe.vl", "true", "--moe.num_vl_experts", "4")


def plain_choice(gates: Tensor, mask: Tensor, capacity: int) -> list[tuple[int, int]]:
    """(token, expert) pairs of expert choice, read from its definition."""
    valid = [token for token in range(len(gates)) if mask[token]]
    return [
        (token, expert)
        for expert in range(gates.shape[1])
        for token in sorted(valid, key=lambda t: (-float(gates[t, expert]), t))[:capacity]
    ]


def plain_assignments(gates: Tensor, mask: Tensor, k: int, capacity: int) -> list[tuple[int, int]]:
    """Kept (token, expert) pairs of Batch Priority Routing, read from its definition."""
    order = sorted(range(len(gates)), key=lambda t: (-float(gates[t].max()), t))
    places = [0] * gates.shape[1]
    kept = []
    for choice in range(k):
        for token in order:
            if not mask[token]:
                continue
            ranked = sorted(range(gates.shape[1]), key=lambda e: (-float(gates[token, e]), e))
            expert = ranked[choice]
            if places[expert] < capacity:
                places[expert] += 1
                kept.append((token, expert))
    return kept


def plain_pool(
    tokens: Tensor, mask: Tensor, router: Tensor, weights: dict[str, Tensor], routing: str
) -> Any:
    """Output ``[T, D]`` of one pool, one token and one expert at a time; and the number of drops."""
    gates = torch.softmax(tokens @ router.T, dim=1)
    capacity = expert_capacity(len(tokens), len(router), 2, FACTORS[routing])
    if routing == "expert_choice":
        kept = plain_choice(gates.detach(), mask, capacity)
    else:
        kept = plain_assignments(gates.detach(), mask, 2, capacity)
    rows = list(torch.zeros_like(tokens))
    for token, expert in kept:
        inner = weights["weight1"][expert] @ tokens[token] + weights["bias1"][expert]
        result = weights["weight2"][expert] @ torch.nn.functional.gelu(inner)
        rows[token] = rows[token] + gates[token, expert] * (result + weights["bias2"][expert])
    lost = int(mask.sum()) - len({token for token, _ in kept})
    return torch.stack(rows), lost if routing == "expert_choice" else 2 * int(mask.sum()) - len(
        kept
    )


def gathered(value: Tensor) -> Tensor:
    """The experts of all ranks."""
    parts = [torch.empty_like(value) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts).requires_grad_()


def compare(where: Layout, routing: str, block: int) -> dict[str, Any]:
    """Largest differences of outputs and gradients of both dispatchers to the plain loop."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_vlmoe.train.step import StepRunner

    own = ("--moe.routing", routing, "--moe.capacity_factor", str(FACTORS[routing]))
    config, ranks, parts, data = start(where, *OPTIONS, *own, *WITH_VL)
    # What the schedule would do; the backward pass below runs without one.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    layer = parts.chunks[0].decoder.layers[block - 1].mlp.moe
    batch = data.batch(ranks.rank)
    stream = StepRunner(config, parts, ranks).stream(batch, draws=True)
    generator = torch.Generator().manual_seed(ranks.rank)

    def draw(segments: tuple[str, ...]) -> Tensor:
        size = (stream.layout.size(*segments), config.model.hidden_size)
        return torch.randn(size, generator=generator)

    pools = [pool.name for pool in layer.plan.pools]
    inputs = [draw(pool.segments).requires_grad_() for pool in layer.plan.pools]
    factors = [draw(pool.segments) for pool in layer.plan.pools]
    routers = [layer.router.get_submodule(pool).weight for pool in pools]
    experts = [dict(layer.experts.pool(pool).named_parameters()) for pool in pools]
    with torch.no_grad():
        for generator_, weights in zip((11, 12, 13), experts):
            # Biases that are not zero, so that their part is seen.
            noise = torch.Generator().manual_seed(100 * generator_ + ranks.rank)
            for name in ("bias1", "bias2"):
                weights[name].normal_(generator=noise)

    def outcome(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
        loss = sum((out * factor).sum() for out, factor in zip(outputs, factors))
        return [*outputs, *torch.autograd.grad(loss, leaves)]

    leaves = [*inputs, *routers, *(w for weights in experts for w in weights.values())]
    for leaf in leaves:
        # Where there is a gradient buffer, experts add to it and hand autograd a tensor without values.
        leaf.main_grad = None
    layer.train()
    found = {}
    for dispatcher in ("fixed_capacity", "alltoall"):
        layer.moe = replace(layer.moe, dispatcher=dispatcher)
        outputs = layer([tokens.unsqueeze(1) for tokens in inputs], stream)
        found[dispatcher] = outcome([output.squeeze(1) for output in outputs], leaves)

    whole = [{name: gathered(w) for name, w in weights.items()} for weights in experts]
    masks = [
        torch.ones(len(tokens), dtype=torch.bool) if mask is None else mask
        for pool, tokens in zip(layer.plan.pools, inputs)
        for mask in (stream.token_mask(pool.segments, tokens.device),)
    ]
    plain = [plain_pool(*args, routing) for args in zip(inputs, masks, routers, whole)]
    expected = outcome(
        [output for output, _ in plain],
        [*inputs, *routers, *(w for weights in whole for w in weights.values())],
    )
    world, first = ranks.expert_size, 2 * len(pools) + len(pools)
    for index in range(first, len(expected)):
        torch.distributed.all_reduce(expected[index])
        expected[index] = expected[index].chunk(world)[ranks.expert]
    differences = {
        name: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(values, expected))
        for name, values in found.items()
    }
    padded = sum(int((~mask).sum()) for mask in masks)
    return {"differences": differences, "drops": [n for _, n in plain], "padded": padded}


# In block 4 tokens of pairs have a pool of their own.
@pytest.mark.parametrize(
    ("where", "routing", "block"),
    [
        (Layout(1), "token_choice", 2),
        (layout(2, ep=2), "token_choice", 2),
        (layout(2, ep=2), "token_choice", 4),
        (layout(2, ep=2), "expert_choice", 2),
    ],
    ids=["one", "ep2", "vl-experts", "expert-choice"],
)
def test_dispatchers_equal_a_plain_loop(
    where: Layout, routing: str, block: int, workers: Workers
) -> None:
    for result in workers.run(where, compare, where, routing, block):
        assert all(drops > 0 for drops in result["drops"]) and result["padded"] > 0
        for name, difference in result["differences"].items():
            assert difference < 1e-5, name


class WideCopies(TorchDispatchMode):
    """Counts rows of a width that operations copy from one place to another as they are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("cat", "clone", "copy_", "index"):
            if result.dim() > 1 and result.shape[-1] == self.width:
                self.rows += result.numel() // self.width
        return result


class Handle:
    """A transfer that writes down when it is started and when it is waited for."""

    def __init__(self, events: list[str], work: Any) -> None:
        self.events, self.work = events, work
        self.number = sum(event.startswith("send") for event in events)
        events.append(f"send {self.number}")

    def wait(self) -> None:
        self.events.append(f"wait {self.number}")
        self.work.wait()


def in_chunks(where: Layout) -> None:
    """Outputs, gradients and copies of a layer that sends its slots in chunks of experts."""
    from megatron.core.transformer.moe.moe_utils import (
        MoEAuxLossAutoScaler,
        get_default_pg_collection,
    )

    from megatron_vlmoe.moe.dispatch import FixedCapacityDispatcher
    from megatron_vlmoe.train.step import StepRunner

    config, ranks, parts, data = start(where, *OPTIONS, *WITH_VL)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))
    layer, width = parts.chunks[0].decoder.layers[3].mlp.moe.train(), config.model.hidden_size
    pools, parameters = layer.plan.pools, dict(layer.named_parameters())
    assert [pool.num_experts for pool in pools] == [4, 4, 8]
    for routing, topk, left_out in (
        ("token_choice", 1, ()),
        ("token_choice", 2, ()),
        ("token_choice", 2, ("micro_pairs",)),
        ("token_choice", 1, ("micro_texts", "micro_images")),
        ("expert_choice", 2, ()),
    ):
        factor, case = FACTORS[routing], f"{routing}, {topk}, without {left_out}"
        layer.moe = replace(layer.moe, capacity_factor=factor)
        layer.router.moe = replace(layer.router.moe, routing=routing, topk=topk)
        own = replace(config, data=replace(config.data, **dict.fromkeys(left_out, 0)))
        stream = StepRunner(own, parts, ranks).stream(data.batch(ranks.rank), draws=True)
        generator = torch.Generator().manual_seed(ranks.rank)
        sizes = [stream.layout.size(*pool.segments) for pool in pools]
        slots = sum(
            pool.num_experts * expert_capacity(size, pool.num_experts, topk, factor)
            for pool, size in zip(pools, sizes)
            if size
        )
        experts = sum(pool.num_experts for pool, size in zip(pools, sizes) if size)
        tokens = [torch.randn(size, 1, width, generator=generator) for size in sizes]
        expected: dict[str, Tensor | None] = {}
        for chunks in (1, 2, 5, 100):
            layer.fixed_capacity = FixedCapacityDispatcher(get_default_pg_collection(), chunks)
            inputs = [value.clone().requires_grad_() for value in tokens]
            for parameter in parameters.values():
                parameter.grad, parameter.main_grad = None, torch.zeros_like(parameter)
            with WideCopies(width) as copies:
                outputs = layer(inputs, stream)
                sum(output.square().sum() for output in outputs).backward()
            results = {f"output {n}": value.detach() for n, value in enumerate(outputs)}
            results |= {f"gradient {n}": value.grad for n, value in enumerate(inputs)}
            # megatron-core's hooks have added up all gradients of parameters here.
            results |= {key: parameter.main_grad for key, parameter in parameters.items()}
            expected = expected or results
            for key, value in results.items():
                wanted = expected[key]
                assert value is not None and wanted is not None, f"{case}, {chunks}: {key}"
                assert torch.equal(value, wanted), f"{case}, {chunks} chunks: {key}"
            # Several experts in a chunk are copied once on each way; what arrives for a single one is what it needs.
            single = chunks == 100 or experts == ranks.expert_size
            if routing == "token_choice" and chunks in (1, 100):
                assert copies.rows == (0 if single else 4 * slots), f"{case}, {chunks} chunks"
        for key, value in expected.items():
            unused = any(not size and pool.name in key for pool, size in zip(pools, sizes))
            assert value is not None and (value.any() or not value.numel() or unused), key


@pytest.mark.parametrize(
    "where", [layout(2, ep=2), layout(4, ep=4), layout(4, tp=2, ep=2)], ids=["2", "4", "tp2-ep2"]
)
def test_chunks_of_experts_change_no_bit(where: Layout, workers: Workers) -> None:
    workers.run(where, in_chunks, where)


def transfers(where: Layout) -> list[str]:
    """What a block with a dense branch and two local experts does in turn."""
    import torch.distributed as dist

    from megatron_vlmoe.train.step import StepRunner

    options = ("--moe.modalities", "text", "--moe.num_vision_experts", "0")
    chunks = ("--moe.all_to_all_chunks", "2", "--parallel.overlap_grad_reduce", "false")
    config, ranks, parts, data = start(where, *options, *chunks)
    block = parts.chunks[0].decoder.layers[1].mlp.train()
    stream = StepRunner(config, parts, ranks).stream(data.batch(ranks.rank), draws=True)
    events: list[str] = []
    plain = dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **own: Handle(events, plain(*args, **own))
    block.moe.experts.text.register_forward_hook(lambda *_: events.append("experts"))
    block.vision_ffn.register_forward_hook(lambda *_: events.append("dense"))
    block.vision_ffn.register_full_backward_hook(lambda *_: events.append("dense backward"))
    shape = (stream.layout.num_tokens, 1, config.model.hidden_size)
    block(torch.randn(shape, requires_grad=True), stream).sum().backward()
    return events


def test_transfers_are_under_way_while_others_compute(workers: Workers) -> None:
    forward = ["send 0", "send 1", "dense"]
    forward += ["wait 0", "experts", "send 2", "wait 1", "experts", "send 3", "wait 2", "wait 3"]
    # Gradients of results, in the order of chunks; those of rows follow experts, the last first.
    backward = ["send 4", "send 5", "wait 5", "send 6", "wait 4", "send 7", "dense backward"]
    for events in workers.run(2, transfers, layout(2, ep=2)):
        assert events == [*forward, *backward, "wait 7", "wait 6"]


QUIET = (
    *("--moe.noise_std", "0", "--model.drop_path", "0", "--moe.aux_loss_coefficient", "0"),
    *("--parallel.overlap_grad_reduce", "false", "--parallel.use_distributed_optimizer", "false"),
)


def gradients(parts: Any) -> dict[str, Tensor]:
    return {n: p.main_grad.clone() for n, p in parts.chunks[0].named_parameters()}


def one_step(run: tuple[Any, Any, Any, Any], batch: Any, **counts: int) -> Any:
    """Losses and gradients of one micro-batch; counts replace those of the layout."""
    from megatron_vlmoe.train.pretrain import MaskedObjective
    from megatron_vlmoe.train.step import StepRunner

    config, ranks, parts, _ = run
    config = replace(config, data=replace(config.data, **counts))
    runner = StepRunner(config, parts, ranks)
    runner.start_step()
    losses = runner.train(iter([batch]), 1, MaskedObjective(config, ranks))[0]
    return {name: float(loss) for name, loss in losses.items()}, gradients(parts)


def objectives_apart(where: Layout) -> None:
    run = start(where, *QUIET)
    batch = run[3].batch(0)
    together, whole = one_step(run, batch)
    apart: dict[str, float] = {}
    total: dict[str, Tensor] = {}
    names = {"micro_texts", "micro_images", "micro_pairs"}
    for name in sorted(names):
        losses, grads = one_step(run, batch, **{other: 0 for other in names - {name}})
        apart["total"] = apart.get("total", 0.0) + losses.pop("total")
        apart.update(losses)
        total = {key: total.get(key, 0) + grad for key, grad in grads.items()}
    assert together.keys() == apart.keys() and len(apart) == 5
    for key, loss in together.items():
        assert loss == pytest.approx(apart[key], rel=1e-5), key
    for key, grad in whole.items():
        assert (grad - total[key]).abs().max() <= 1e-5 * grad.abs().max() + 1e-12, key


def one_expert(where: Layout) -> None:
    from megatron_vlmoe.runtime.distributed import destroy

    dense = start(where, *QUIET, "--moe.modalities", "none", "--moe.layers", "[]")
    state = {name: p.detach().clone() for name, p in dense[2].chunks[0].named_parameters()}
    batch = dense[3].batch(0)
    expected, dense_grads = one_step(dense, batch)
    destroy()
    single = ("--moe.num_vision_experts", "1", "--moe.num_text_experts", "1")
    sparse = start(where, *QUIET, *single)
    names = {"weight1": "linear_fc1.weight", "bias1": "linear_fc1.bias"}
    names |= {"weight2": "linear_fc2.weight", "bias2": "linear_fc2.bias"}

    def dense_name(name: str) -> str:
        if ".moe.experts." not in name:
            return name
        prefix, _, rest = name.partition("moe.experts.")
        pool, weight = rest.split(".")
        return f"{prefix}{pool}_ffn.{names[weight]}"

    parameters = dict(sparse[2].chunks[0].named_parameters())
    kept = [name for name in parameters if ".router." not in name]
    assert {dense_name(name) for name in kept} == state.keys()
    with torch.no_grad():
        for name in kept:
            parameters[name].copy_(state[dense_name(name)].view_as(parameters[name]))
    losses, grads = one_step(sparse, batch)
    assert losses == pytest.approx(expected, rel=1e-6)
    for name in kept:
        reference = dense_grads[dense_name(name)]
        error = (grads[name].view_as(reference) - reference).abs().max()
        assert error <= 1e-5 * reference.abs().max(), name


def permuted(where: Layout) -> None:
    from megatron_vlmoe.train.step import StepRunner

    counts = [
        f"--data.{scope}_{n}" for scope in ("micro", "global") for n in ("texts", "images", "pairs")
    ]
    options = [word for name in counts for word in (name, "4")]
    config, ranks, parts, data = start(where, *QUIET, *options)
    chunk, runner, batch = parts.chunks[0].eval(), StepRunner(config, parts, ranks), data.batch(0)
    for order in ([1, 2, 3, 0], [3, 1, 0, 2]):
        index = torch.tensor(order)
        for segments in (("texts",), ("images",), PAIR_SEGMENTS):
            own = {name: {k: v[index] for k, v in batch[name].items()} for name in segments}
            moved = batch | own
            with torch.no_grad():
                before = chunk(batch, runner.stream(batch, draws=False))
                after = chunk(moved, runner.stream(moved, draws=False))
            for name, (values, _) in before.items():
                rows = values.view(4, -1)
                wanted = rows[index] if name in segments else rows
                torch.testing.assert_close(after[name][0].view(4, -1), wanted, rtol=1e-5, atol=1e-5)
                assert not torch.allclose(rows[index], rows)


def experts_differ(where: Layout) -> None:
    _, _, parts, _ = start(where)
    seen = set()
    for name, value in parts.chunks[0].named_parameters():
        if name.endswith(("weight1", "weight2")) and ".experts." in name:
            for expert in value:
                seen.add(tuple(expert.flatten()[:8].tolist()))
    assert len(seen) == 2 * 2 * (8 + 4)


@pytest.mark.parametrize("check", [objectives_apart, one_expert, permuted, experts_differ])
def test_model_against_its_definition(check: Any, workers: Workers) -> None:
    workers.run(1, check, Layout(1))


ENTROPIES = """
--moe.shared_router true --moe.noise_std 0 --moe.aux_loss_coefficient 0.5 --moe.text_aux.local_entropy 2
--moe.text_aux.global_entropy 3 --moe.text_aux.global_entropy_experts 7.9 --moe.vision_aux.global_entropy 5
--moe.vision_aux.global_entropy_experts 6 --moe.vision_aux.load 0
""".split()


def entropies_by_modality(where: Layout) -> None:
    """A shared router's entropies are over the text tokens and over the image tokens, its importance over all."""
    import math

    from router_functions import global_entropy_loss, importance_loss, local_entropy_loss

    from megatron_vlmoe.moe.router import HEADER
    from megatron_vlmoe.train.step import StepRunner

    config, ranks, parts, data = start(where, *ENTROPIES)
    layer, batch = parts.chunks[0].decoder.layers[1].mlp.moe, data.batch(0)
    stream = StepRunner(config, parts, ranks).stream(batch, draws=True)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(stream.layout.num_tokens, config.model.hidden_size, generator=generator)
    with torch.no_grad():
        layer.router.shared.weight.mul_(20.0)
    layer.train()
    layer.router([tokens], stream, 8.0)
    found = layer.router.recorder.take()["shared"]
    logits = tokens @ layer.router.shared.weight.T
    mask = stream.token_mask(("texts", "pair_texts", "pair_images", "images"), tokens.device)
    texts = torch.arange(len(tokens)) < stream.layout.size("texts", "pair_texts")
    assert not mask.all() and mask[~texts].all()
    own, images = texts & mask, ~texts
    expected = 0.5 * (
        0.5 * importance_loss(logits, mask)
        + 2 * local_entropy_loss(logits, own)
        + 3 * global_entropy_loss(logits, math.log(7.9), own)
        + 5 * global_entropy_loss(logits, math.log(6), images)
    )
    assert global_entropy_loss(logits, math.log(7.9), own) > 0.0
    assert float(found[HEADER.index("aux_total")]) == pytest.approx(float(expected), rel=1e-5)
    local = float(local_entropy_loss(logits, own))
    assert float(found[HEADER.index("aux_local_entropy")]) == pytest.approx(local, rel=1e-5)


def test_entropies_of_a_shared_router_are_those_of_each_modality(workers: Workers) -> None:
    workers.run(1, entropies_by_modality, Layout(1))
