"""Experts of the Hugging Face model, against plain loops and against the trainer's rules."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import pytest
import router_functions
import torch
import torch.nn.functional as F
from hf_folder import TINY

from megatron_vlmoe.config.schema import AuxLossConfig, ModelConfig, MoEConfig
from megatron_vlmoe.moe import aux_losses, routing_ops
from megatron_vlmoe.stream import sizes
from megatron_vlmoe.stream.block_plan import block_plan, moe_layer_numbers

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf import moe_vlmoe as moe
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig
from megatron_vlmoe.convert.hf.modeling_vlmoe import VLMoEModel


def config(**options: Any) -> VLMoEConfig:
    return VLMoEConfig(**{**TINY, **options})


def plans() -> list[tuple[ModelConfig, MoEConfig]]:
    found = []
    for vl_layers, modalities, vision, text, vl_experts, vl, shared, layers in itertools.product(
        (0, 1, 4),
        ("both", "text", "vision", "none"),
        (0, 4),
        (0, 3),
        (0, 2),
        (False, True),
        (False, True),
        ((), (1, 4), (2, 3)),
    ):
        model = ModelConfig(num_layers=4, num_vl_layers=vl_layers)
        found.append(
            (
                model,
                MoEConfig(
                    num_vision_experts=vision,
                    num_text_experts=text,
                    num_vl_experts=vl_experts,
                    modalities=modalities,
                    vl=vl,
                    shared_router=shared,
                    layers=layers,
                ),
            )
        )
    return found


def hf_config(model: ModelConfig, options: MoEConfig) -> VLMoEConfig:
    return config(
        num_hidden_layers=model.num_layers,
        num_vl_layers=model.num_vl_layers,
        moe_layers=moe_layer_numbers(model, options),
        moe_modalities=options.modalities,
        num_vision_experts=options.num_vision_experts,
        num_text_experts=options.num_text_experts,
        num_vl_experts=options.num_vl_experts,
        moe_vl=options.vl,
        shared_router=options.shared_router,
    )


def test_blocks_have_the_branches_of_the_trainer():
    for model, options in plans():
        converted = hf_config(model, options)
        for number in range(1, model.num_layers + 1):
            planned = block_plan(model, options, number).branches
            expected = {(branch.name, branch.num_experts) for branch in planned}
            assert set(converted.branches(number)) == expected, (options, number)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("vl", [False, True])
def test_tokens_go_through_the_branches_of_the_trainer(shared, vl):
    model = ModelConfig(num_layers=4, num_vl_layers=2)
    options = MoEConfig(
        num_vision_experts=2,
        num_text_experts=2,
        num_vl_experts=2,
        layers=(2, 3),
        vl=vl,
        shared_router=shared,
    )
    network = VLMoEModel(hf_config(model, options)).eval()
    called: set[tuple[int, str]] = set()
    for number, layer in enumerate(network.encoder.layer, start=1):
        for name, branch in layer.feed_forward.named_children():
            branch.register_forward_hook(lambda *_, key=(number, name): called.add(key))
    ids, pixels = torch.full((1, 3), 5), torch.zeros(1, 3, 32, 32)
    for segments, inputs in (
        (("texts",), {"input_ids": ids}),
        (("images",), {"pixel_values": pixels}),
        (("pair_texts", "pair_images"), {"input_ids": ids, "pixel_values": pixels}),
    ):
        called.clear()
        network(**inputs)
        expected = {
            (number, branch.name)
            for number in range(1, 5)
            for branch in block_plan(model, options, number).branches
            if set(branch.segments) & set(segments)
        }
        assert called == expected


def reference(
    branch: moe.VLMoESparseBranch, tokens: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Every token by itself; where places are limited, by the trainer's routing."""
    options = branch.config
    k, num_experts = options.num_experts_per_tok, branch.num_experts
    gates = torch.softmax(tokens @ branch.router.weight.T, dim=1)
    gate, expert = routing_ops.top_k_experts(gates, k)
    capacity = sizes.expert_capacity(
        len(tokens), num_experts, k, options.capacity_factor, options.capacity_multiple_of
    )
    kept = routing_ops.route_slots(
        gate, expert, num_experts, capacity, mask, options.batch_priority
    ).token_kept
    weights = gate / gate.sum(dim=1, keepdim=True) if options.normalize_gate else gate
    pool = branch.experts
    outputs = torch.zeros_like(tokens)
    for token, choice in itertools.product(range(len(tokens)), range(k)):
        if kept[token, choice]:
            e = int(expert[token, choice])
            inner = F.gelu(pool.fc1_weight[e] @ tokens[token] + pool.fc1_bias[e])
            row = pool.fc2_weight[e] @ inner + pool.fc2_bias[e]
            outputs[token] = outputs[token] + weights[token, choice] * row
    return outputs


def sparse_branch(seed: int = 0, **options: Any) -> moe.VLMoESparseBranch:
    torch.manual_seed(seed)
    branch = moe.VLMoESparseBranch(config(**options), num_experts=5, layer_number=2)
    for parameter in branch.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return branch


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_gate": True},
        {"capacity_factor": 0.7},
        {"capacity_factor": 0.7, "batch_priority": False, "normalize_gate": True},
        {"capacity_factor": 1.0, "capacity_multiple_of": 3},
        {"capacity_factor": 0.5, "route_padding": True},
    ],
)
def test_sparse_branch_is_a_loop_over_tokens(options, k, masked):
    branch = sparse_branch(num_experts_per_tok=k, **options)
    hidden = torch.randn(2, 9, 16)
    # Four text tokens, then five image tokens; the second text has two tokens.
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:4] = False
    output, router = branch(hidden, 4, mask if masked else None)
    assert router is None
    texts_then_images = [(n, t) for n in range(2) for t in range(4)]
    texts_then_images += [(n, t) for n in range(2) for t in range(4, 9)]
    rows = tuple(torch.tensor(index) for index in zip(*texts_then_images))
    slots = mask[rows] if masked and not branch.config.route_padding else None
    expected = reference(branch, branch.layernorm(hidden)[rows], slots)
    torch.testing.assert_close(output[rows], expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(output.square().sum(), list(branch.parameters()))
    wanted = torch.autograd.grad(expected.square().sum(), list(branch.parameters()))
    for gradient, want in zip(gradients, wanted):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-4)


def test_choices_with_place_are_those_of_the_trainer():
    generator = torch.Generator().manual_seed(0)
    for trial in range(200):
        tokens, experts = (int(torch.randint(1, 40, (1,), generator=generator)) for _ in range(2))
        k = 1 + trial % min(experts, 3)
        gates = torch.rand(tokens, experts, generator=generator)
        if trial % 2:
            # Many equal gates.
            gates = (gates * 4).round() / 4
        mask = torch.rand(tokens, generator=generator) < 0.7 if trial % 3 else None
        capacity = int(torch.randint(0, tokens + 1, (1,), generator=generator))
        priority = trial % 5 != 0
        gate, expert = moe.top_k_experts(gates, k)
        want_gate, want_expert = routing_ops.top_k_experts(gates, k)
        assert torch.equal(gate, want_gate) and torch.equal(expert, want_expert)
        if trial % 7 == 0:
            gate[0] = torch.nan
        kept = moe.choices_with_place(gate, expert, experts, capacity, mask, priority)
        slots = routing_ops.route_slots(gate, expert, experts, capacity, mask, priority)
        assert torch.equal(kept, slots.token_kept), trial


def test_capacity_is_that_of_the_trainer():
    for tokens, experts, factor, multiple in itertools.product(
        (0, 1, 7, 128, 1000), (2, 3, 32), (0.3, 1.0, 1.05, 2.5), (1, 8)
    ):
        for k in (1, 2):
            expected = sizes.expert_capacity(tokens, experts, k, factor, multiple)
            assert moe.expert_capacity(tokens, experts, k, factor, multiple) == expected


# Rows of five experts, of which two have none; the last two rows are not carried out.
SORTED = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 4, 4, 5, 5])


def product_with_nan(rows, weight, ends):
    """A kernel that leaves what was in memory in the rows of no expert, here NaN."""
    found = moe._opaque_grouped_mm(rows, weight, ends)
    absent = torch.arange(len(rows)).unsqueeze(1) >= ends[-1]
    return torch.where(absent, float("nan"), found)


@pytest.mark.parametrize("way", ["kernel", "opaque", "nan", "batched"])
def test_ways_to_run_experts_give_what_one_after_the_other_gives(way):
    # The kernel of torch takes bf16 only.
    dtype = torch.bfloat16 if way == "kernel" else torch.float32
    experts = sparse_branch().experts.to(dtype)
    run = {
        "kernel": lambda *args: experts.grouped(*args, moe._torch_grouped_mm),
        "opaque": lambda *args: experts.grouped(*args, moe._opaque_grouped_mm),
        "nan": lambda *args: experts.grouped(*args, product_with_nan),
        "batched": experts.batched,
    }[way]
    found = []
    for function in (run, experts.one_by_one):
        rows = torch.randn(12, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
        rows.requires_grad_()
        outputs = function(rows, SORTED)
        assert torch.equal(outputs[10:], torch.zeros(2, 16, dtype=dtype))
        # The gradient of a sum is expanded from one number.
        inputs = [rows, *experts.parameters()]
        found.append([outputs, *torch.autograd.grad(outputs.sum(), inputs)])
    tolerance = 0.01 if way == "kernel" else 1e-5
    for other, plain in zip(*found):
        difference = torch.linalg.vector_norm(other - plain)
        assert difference <= tolerance * torch.linalg.vector_norm(plain)


@pytest.mark.parametrize(
    ("shared", "pool_rows"),
    [(False, 0), (True, 0), (True, 99)],
    ids=["each thread its experts", "one product", "a product for each expert"],
)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_experts_give_what_they_give_with_them(
    dtype, k, threads, shared, pool_rows, monkeypatch
):
    experts = sparse_branch().experts.to(dtype)
    monkeypatch.setattr(moe, "LARGEST_SHARE", 9.0)
    monkeypatch.setattr(moe, "LARGEST_PADDING", 9.0)
    monkeypatch.setattr(moe, "POOL_ROWS", pool_rows)
    monkeypatch.setattr(moe, "_threads_share_few_rows", lambda: shared)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for most in range(10):
        # One row of expert 0, up to nine of expert 3, and a choice that is not carried out; with K = 2 every token also
        # goes to expert 4.
        chosen = torch.tensor([3] * most + [5, 0]).unsqueeze(1)
        chosen = torch.cat([chosen, torch.full_like(chosen, 4)], dim=1)[:, :k]
        tokens, gates = torch.randn(most + 2, 16).to(dtype), torch.rand(most + 2, k)
        expected = experts(tokens, chosen, gates)
        for without_gradients in (torch.no_grad, torch.inference_mode):
            with without_gradients():
                found = experts(tokens, chosen, gates)
            torch.testing.assert_close(found, expected.detach())
    assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_only_experts_with_tokens_are_visited(monkeypatch):
    experts = sparse_branch().experts
    calls = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: calls.append(len(args[0])) or linear(*args))
    experts.one_by_one(torch.randn(12, 16), SORTED)
    assert calls == [3, 3, 5, 5, 2, 2]


@pytest.mark.parametrize("implementation", moe.EXPERTS_IMPLEMENTATIONS)
def test_a_pool_without_a_routed_token_gives_zeros_and_has_a_gradient(implementation):
    branch = sparse_branch(experts_implementation=implementation)
    output, _ = branch(torch.randn(1, 4, 16), 4, torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(output, torch.zeros_like(output))
    # Processes that train together wait for the gradient of every parameter.
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in branch.parameters())


def pool_loss(logits, noisy, k, sigma, options, mask):
    """The trainer's sum of the weighted losses of one pool."""
    terms = options.active_terms()
    statistics = aux_losses.compute_router_statistics(logits, noisy, k, sigma, terms, mask)
    experts = options.global_entropy_experts
    threshold = math.log(experts) if experts else None
    losses = aux_losses.losses_from_statistics(statistics, terms, logits.shape[1], k, threshold)
    return sum(getattr(options, name) * loss for name, loss in losses.items())


LOSSES = {
    "the text router's": {"load": 1.0},
    "the vision router's": {"importance": 0.5, "load": 0.5},
    "others": {
        "z": 0.3,
        "gshard": 2.0,
        "local_entropy": 0.5,
        "global_entropy": 0.7,
        "global_entropy_experts": 4.5,
    },
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("name", LOSSES)
def test_router_losses_are_those_of_the_trainer(name, k, masked):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(30, 5, generator=generator, requires_grad=True)
    noisy = logits + 0.2 * torch.randn(30, 5, generator=generator)
    mask = torch.rand(30, generator=generator) < 0.6 if masked else None
    expert = moe.top_k_experts(torch.softmax(noisy, dim=1), k)[1]
    found = moe.router_loss(logits, noisy, expert, 0.2, LOSSES[name], mask)
    expected = pool_loss(logits, noisy, k, 0.2, AuxLossConfig(**LOSSES[name]), mask)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    nobody = torch.zeros(30, dtype=torch.bool)
    assert moe.router_loss(logits, noisy, expert, 0.2, LOSSES[name], nobody) == 0.0


def test_noise_chooses_while_a_router_is_trained(monkeypatch):
    branch = sparse_branch(router_noise_std=-1.0, vision_router_losses={"load": 1.0})
    drawn = torch.randn(9, 5)
    monkeypatch.setattr(torch, "randn_like", lambda like: drawn)
    hidden = torch.randn(1, 9, 16)
    _, router = branch(hidden, 0, None, True)
    logits = branch.router(branch.layernorm(hidden)[0])
    assert torch.equal(router.logits, logits)
    # Negative: one over the number of experts.
    noisy = logits + drawn / 5
    expert = noisy.argmax(dim=1)
    assert not torch.equal(expert, logits.argmax(dim=1))
    torch.testing.assert_close(router.loss, router_functions.load_loss(logits, noisy, 1, 1 / 5))
    routing = branch.route(branch._with_noise(logits), None)
    assert torch.equal(routing.expert[:, 0], expert)
    # Neither in evaluation nor where the router is frozen; the load is of the same sigma.
    branch.router.weight.requires_grad_(False)
    for module in (branch, branch.eval()):
        assert module._with_noise(logits) is logits
        torch.testing.assert_close(
            module(hidden, 0, None, True)[1].loss,
            router_functions.load_loss(logits, logits, 1, 1 / 5),
        )
        branch.router.weight.requires_grad_(True)


def test_dropped_tokens_are_choices_without_a_place():
    branch = sparse_branch(num_experts_per_tok=2, capacity_factor=0.5)
    branch.eval()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:4] = False
    hidden = torch.randn(2, 9, 16)
    _, router = branch(hidden, 4, mask, True)
    # ceil(18 * 2 * 0.5 / 5) places at each of five experts, for two choices of 16 tokens.
    load = torch.zeros(5, dtype=torch.long)
    kept = moe.to_stream(mask.unsqueeze(2), 4).squeeze(1)
    chosen = router.logits.topk(2, dim=1).indices[kept].flatten()
    load.scatter_add_(0, chosen, torch.ones_like(chosen))
    assert router.dropped == (load - 4).clamp(min=0).sum() and router.dropped > 0
    branch.config.capacity_factor = 0.0
    assert branch(hidden, 4, mask, True)[1].dropped == 0


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"patch_size": 7}, "patch_size=7"),
        ({"num_vl_layers": 4}, "num_vl_layers=4"),
        ({"moe_layers": [4]}, "moe_layers has block 4"),
        ({"moe_layers": [2, 2]}, "moe_layers"),
        ({"moe_modalities": "audio"}, "moe_modalities='audio'"),
        ({"num_experts_per_tok": 4}, "num_experts_per_tok=4"),
        ({"capacity_factor": float("inf")}, "capacity_factor=inf"),
        ({"moe_routing": "random"}, "moe_routing='random'"),
        ({"moe_routing": "expert_choice"}, "capacity_factor=0.0"),
        ({"router_balance_bias_rate": float("nan")}, "router_balance_bias_rate=nan"),
        ({"router_aux_loss_coef": float("nan")}, "router_aux_loss_coef=nan"),
        ({"text_router_losses": {"balance": 1.0}}, "text_router_losses has 'balance'"),
        ({"vision_router_losses": {"load": float("inf")}}, "vision_router_losses['load']=inf"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 1.5}, "hidden_size=1.5"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"mask_token_id": 500}, "mask_token_id=500"),
        ({"task": "poetry"}, "task='poetry'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_configuration_names_the_wrong_field(options, field):
    with pytest.raises(ValueError, match=re.escape(field)):
        config(**options)


def test_experts_choose_the_tokens_that_the_trainers_choose():
    branch = sparse_branch(
        moe_routing="expert_choice", capacity_factor=0.3, num_experts_per_tok=2
    ).eval()
    hidden = torch.randn(2, 9, 16)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 1:4] = False
    for padding in (None, mask):
        output, router = branch(hidden, 4, padding, True)
        tokens = moe.to_stream(branch.layernorm(hidden), 4)
        valid = None if padding is None else moe.to_stream(mask.unsqueeze(2), 4).squeeze(1)
        gates = torch.softmax(tokens @ branch.router.weight.T, dim=1)
        capacity = sizes.expert_capacity(18, 5, 2, 0.3)
        slots = routing_ops.expert_choice_slots(gates, capacity, valid)
        expected = torch.zeros_like(tokens)
        pool = branch.experts
        for token, e in slots.token_kept.nonzero().tolist():
            inner = F.gelu(pool.fc1_weight[e] @ tokens[token] + pool.fc1_bias[e])
            row = pool.fc2_weight[e] @ inner + pool.fc2_bias[e]
            expected[token] = expected[token] + gates[token, e] * row
        torch.testing.assert_close(moe.to_stream(output, 4), expected, rtol=1e-5, atol=1e-5)
        lost = ~slots.token_kept.any(dim=1)
        assert router.dropped == (lost if valid is None else lost & valid).sum() > 0
        # Losses of balance have nothing to ask for.
        assert router.loss == 0.0


def test_a_bias_chooses_and_does_not_weigh():
    branch = sparse_branch(router_balance_bias_rate=0.001, num_experts_per_tok=2).eval()
    logits = torch.randn(30, 5)
    gates = torch.softmax(logits, dim=1)
    plain = branch.route(logits, None)
    branch.router.balance_bias.copy_(torch.tensor([0.5, -0.3, 0.0, 0.1, -0.5]))
    found = branch.route(logits, None)
    expert = (gates + branch.router.balance_bias).topk(2, dim=1).indices
    assert torch.equal(found.expert, expert) and not torch.equal(expert, plain.expert)
    assert torch.equal(found.gate, gates.gather(1, expert))


def test_entropies_of_a_shared_router_are_those_of_each_modality():
    torch.manual_seed(0)
    options = {
        "text_router_losses": {"load": 1.0, "local_entropy": 2.0},
        "vision_router_losses": {"importance": 0.5, "global_entropy": 3.0},
    }
    branch = moe.VLMoESparseBranch(config(**options), 5, 2, "shared")
    torch.nn.init.normal_(branch.router.weight)
    hidden = torch.randn(2, 9, 16)
    _, router = branch.eval()(hidden, 4, None, True)
    logits = moe.to_stream(branch.layernorm(hidden), 4) @ branch.router.weight.T
    expected = 0.5 * router_functions.importance_loss(logits)
    expected = expected + 2.0 * router_functions.local_entropy_loss(logits[:8])
    expected = expected + 3.0 * router_functions.global_entropy_loss(logits[8:])
    torch.testing.assert_close(router.loss, expected)


def test_configuration_is_checked_again_before_a_model_is_built():
    changed = config()
    changed.moe_layers = [9]
    with pytest.raises(ValueError, match="moe_layers has block 9"):
        VLMoEModel(changed)


def test_configuration_survives_its_file(tmp_path):
    written = config(
        training={"moe": {"noise_std": -1.0}}, id2label={0: "no", 1: "yes"}, task="vqa"
    )
    written.save_pretrained(tmp_path)
    read = VLMoEConfig.from_pretrained(tmp_path)
    assert read.to_dict() == written.to_dict()
    assert (read.num_labels, read.training) == (2, {"moe": {"noise_std": -1.0}})
    assert read.tie_word_embeddings is False


def test_a_model_of_images_alone_has_no_special_tokens():
    assert config(vocab_size=0).mask_token_id is None
