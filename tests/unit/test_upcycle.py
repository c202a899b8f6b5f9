"""Upcycling: values, scales and errors, against hand arithmetic and without megatron-core."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import tool
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError, ConvertError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.convert.checkpoints import CheckpointReader, write_checkpoint
from megatron_vlmoe.convert.tensors import LazyTensor
from megatron_vlmoe.convert.upcycle.plan import UpcycleOptions, sparse_config
from megatron_vlmoe.convert.upcycle.run import (
    GrownPool,
    Upcycled,
    diversify,
    dropped_channels,
    grown_router,
    read_source,
    report_lines,
    sampled_gates,
    small_router,
    sparse_optimizer,
    upcycle_checkpoint,
    upcycled_tensors,
)
from megatron_vlmoe.planning.parameters import checkpoint_shapes
from megatron_vlmoe.train.checkpoint_files import TrainState

D, INNER = 16, 24
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=D,
    num_attention_heads=4,
    ffn_hidden_size=INNER,
    num_vl_layers=1,
    image_size=16,
    patch_size=8,
    text_length=8,
    pair_text_length=8,
    vocab_size=130,
    visual_vocab_size=20,
)
SECOND_BLOCK = "decoder.layers.1.mlp."


def group(wd_mult: float, router: bool = False, expert: bool = False) -> dict[str, Any]:
    return {
        **{"wd_mult": wd_mult, "lr_mult": 1.0, "betas": (0.9, 0.999), "step": 7, "lr": 0.5},
        **{"is_decoupled_lr": router, "is_expert_parallel": expert, "default_config": not router},
    }


DENSE_OPTIMIZER = {
    "optimizer": {
        "optimizer": {"param_groups": [group(1.0), group(0.0)]},
        "param_state_sharding_type": "fully_reshardable",
    },
    "scheduler": {"num_steps": 7, "max_lr": 0.5},
}


@dataclass(frozen=True)
class Source:
    """A checkpoint in memory: what upcycling asks of a reader."""

    config: RunConfig
    tensors: dict[str, LazyTensor]
    optimizer_tensors: dict[str, LazyTensor] = field(default_factory=dict)
    common: dict[str, Any] = field(default_factory=dict)
    train_state: TrainState = TrainState(step=7)
    path: Path = Path("memory")


def lazy(value: Tensor) -> LazyTensor:
    return LazyTensor(tuple(value.shape), value.dtype, lambda: value)


@pytest.fixture(scope="module")
def dense() -> Source:
    """A dense model of random values, with moments."""
    start = preset("tiny-dense")
    # Options of a run that names no folder that exists here.
    config = replace(start, model=MODEL, checkpoint=replace(start.checkpoint, save="gone"))
    generator = torch.Generator().manual_seed(0)
    source = Source(config, {}, {}, copy.deepcopy(DENSE_OPTIMIZER))
    for key, shape in checkpoint_shapes(config).items():
        value = torch.randn(shape, generator=generator)
        if "_norm." in key:
            value = (1.0 if key.endswith("weight") else 0.0) + 0.1 * value
        moment = torch.rand(shape, generator=generator)
        source.tensors[key] = lazy(value)
        for name, stored in (("param", value), ("exp_avg", moment), ("exp_avg_sq", moment**2)):
            source.optimizer_tensors[f"optimizer.state.{name}.{key}"] = lazy(stored)
    return source


@pytest.fixture(scope="module")
def dense_folder(dense: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on disk."""
    root = tmp_path_factory.mktemp("dense")
    (root / "text.model").write_text("a tokenizer")
    tensors = {**dense.tensors, **dense.optimizer_tensors}
    write_checkpoint(root, tensors, dense.config, dense.train_state, dense.common)
    return root


class Values(Mapping[str, Tensor]):
    """Tensors by key, read when they are looked at."""

    def __init__(self, stored: Mapping[str, LazyTensor], prefix: str = "") -> None:
        self.stored = {
            key.removeprefix(prefix): tensor
            for key, tensor in stored.items()
            if key.startswith(prefix) and (prefix or not key.startswith("optimizer."))
        }

    def __getitem__(self, key: str) -> Tensor:
        tensor = self.stored[key]
        value = tensor.read().to(tensor.dtype)
        assert tuple(value.shape) == tensor.shape
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.stored.items()}


def values(source: Source) -> Values:
    return Values(source.tensors)


def moments(source: Source, name: str) -> Values:
    return Values(source.optimizer_tensors, f"optimizer.state.{name}.")


@dataclass(frozen=True)
class Made:
    """What would be written."""

    source: Source
    pools: tuple[GrownPool, ...]
    report: str


def upcycle(source: Any, *words: str, num_experts: int = 0, name: str = "", **options: Any) -> Made:
    config = sparse_config(source.config, str(source.path), name, num_experts, words)
    how = UpcycleOptions(**options)
    pools, tensors = upcycled_tensors(source, config, how)
    state = {key: tensor for key, tensor in tensors.items() if key.startswith("optimizer.")}
    weights = {key: tensor for key, tensor in tensors.items() if key not in state}
    made = Upcycled(source.path, source.path, source.config, config, pools, 7)
    common = sparse_optimizer(source.common, "memory") if how.carry_optimizer else {}
    result = Source(config, weights, state, common)
    return Made(result, pools, "\n".join(report_lines(made, how)))


def inputs(weights: Mapping[str, Tensor], branch: str) -> Tensor:
    """Tokens as they come out of the branch's LayerNorm."""
    tokens = torch.randn((64, D), generator=torch.Generator().manual_seed(1))
    norm = [weights[f"{SECOND_BLOCK}{branch}_norm.{part}"] for part in ("weight", "bias")]
    return F.layer_norm(tokens, (D,), *norm)


def dense_output(weights: Mapping[str, Tensor], branch: str) -> Tensor:
    ffn = f"{SECOND_BLOCK}{branch}_ffn.linear_"
    layers = [(weights[f"{ffn}{n}.weight"], weights[f"{ffn}{n}.bias"]) for n in ("fc1", "fc2")]
    return F.linear(F.gelu(F.linear(inputs(weights, branch), *layers[0])), *layers[1])


def sparse_output(weights: Mapping[str, Tensor], pool: str, topk: int, normalize: bool) -> Tensor:
    """The formula of the paper, one token and one expert at a time."""
    tokens = inputs(weights, pool)
    router = weights[f"{SECOND_BLOCK}moe.router.{pool}.weight"]
    w1, b1, w2, b2 = (
        weights[f"{SECOND_BLOCK}moe.experts.{pool}.{part}"]
        for part in ("weight1", "bias1", "weight2", "bias2")
    )
    rows = []
    for token in tokens:
        gates, chosen = torch.softmax(router @ token, dim=0).topk(topk)
        gates = gates / gates.sum() if normalize else gates
        rows.append(
            sum(g * (w2[e] @ F.gelu(w1[e] @ token + b1[e]) + b2[e]) for g, e in zip(gates, chosen))
        )
    return torch.stack(rows)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


@pytest.mark.parametrize(
    ("router", "words", "topk", "normalize", "scale"),
    [
        ("auto", (), 1, False, 8.0),
        ("zero", (), 1, False, 8.0),
        ("auto", ("--moe.topk", "2"), 2, False, 4.0),
        ("auto", ("--moe.normalize_gate", "true"), 1, True, 1.0),
        ("fresh", ("--moe.normalize_gate", "true", "--moe.topk", "3"), 3, True, 1.0),
    ],
)
def test_experts_compute_what_the_ffn_did(
    dense: Source, router: str, words: tuple[str, ...], topk: int, normalize: bool, scale: float
) -> None:
    made = upcycle(dense, *words, num_experts=8, router=router)
    before, after = values(dense), values(made.source)
    assert after.shapes == checkpoint_shapes(made.source.config)
    for name in ("text", "vision"):
        ffn, pool = f"{SECOND_BLOCK}{name}_ffn.linear_", f"{SECOND_BLOCK}moe.experts.{name}."
        assert torch.equal(after[f"{pool}weight1"], before[f"{ffn}fc1.weight"].expand(8, -1, -1))
        assert torch.equal(after[f"{pool}bias2"], scale * before[f"{ffn}fc2.bias"].expand(8, -1))
        output = sparse_output(after, name, topk, normalize)
        assert close(output, dense_output(before, name))
    rest = after.keys() & before.keys()
    assert len(rest) == len(before) - 8
    assert all(torch.equal(after[key], before[key]) for key in rest)
    assert "function: that of the source" in made.report
    assert ("only auxiliary losses train the router" in made.report) == (normalize and topk == 1)


def test_a_bias_of_experts_starts_at_zero_and_copies_have_that_of_their_source(
    dense: Source,
) -> None:
    made = upcycle(dense, "--moe.balance_bias_rate", "0.001", num_experts=4).source
    after = values(made)
    assert after.shapes == checkpoint_shapes(made.config)
    biases = [key for key in after if key.endswith("balance_bias")]
    assert len(biases) >= 2 and not any(after[key].any() for key in biases)
    # What is a bias here was trained meanwhile.
    trained = torch.tensor([0.5, -0.25, 0.0, 1.0])
    made.tensors.update({key: lazy(trained) for key in biases})
    grown = values(upcycle(made, "--moe.num_vision_experts", "8").source)
    for key in biases:
        expected = trained.repeat_interleave(2) if ".vision." in key else trained
        assert torch.equal(grown[key], expected), key


def test_small_router_uses_all_experts_and_zero_router_one(dense: Source) -> None:
    used = {}
    for start in ("small", "zero"):
        weights = values(upcycle(dense, num_experts=8, router=start).source)
        router = weights[f"{SECOND_BLOCK}moe.router.text.weight"]
        gates = torch.softmax(inputs(weights, "text") @ router.T, dim=1)
        used[start] = len(gates.max(dim=1).indices.unique())
    assert used["zero"] == 1 and used["small"] >= 6


def test_fresh_router_keeps_the_mean(dense: Source) -> None:
    made = upcycle(dense, num_experts=8, router="fresh")
    for pool in made.pools:
        gates = sampled_gates(pool.router, pool.norm, 1, seed=5)
        assert gates.mean * pool.scale == pytest.approx(1.0, abs=0.02)
        assert gates.low < gates.mean < gates.high and 1.0 < pool.scale < 8.0
    assert "function: changed: fresh gates" in made.report


def test_expected_maximum_of_noise() -> None:
    """Two tied experts under noise of standard deviation s: the larger gate is sigmoid(s |z1 - z2|)."""
    norm = (torch.ones(D), torch.zeros(D))
    gates = sampled_gates(torch.zeros(2, D), norm, 1, noise_std=0.5)
    difference = torch.linspace(-6, 6, 2001)
    density = torch.exp(-(difference**2) / 2)
    expected = (torch.sigmoid(0.5 * 2**0.5 * difference.abs()) * density).sum() / density.sum()
    assert gates.mean == pytest.approx(float(expected), abs=0.005)


def test_only_listed_blocks_and_modality(dense: Source) -> None:
    words = "--moe.layers 3 4 --moe.modalities vision --moe.vl true"
    made = upcycle(dense, *words.split(), num_experts=2)
    pools = [(pool.plan.layer_number, pool.plan.name) for pool in made.pools]
    assert pools == [(3, "vision"), (4, "vl"), (4, "vision")]
    before, after = values(dense), values(made.source)
    key = "decoder.layers.3.mlp.{}"
    expected = before[key.format("vl_ffn.linear_fc2.weight")]
    assert torch.equal(after[key.format("moe.experts.vl.weight2")][1], 2.0 * expected)
    assert key.format("text_ffn.linear_fc1.weight") in after


@pytest.mark.parametrize("start", ["vision", "text", "mean"])
def test_shared_pool(dense: Source, start: str) -> None:
    made = upcycle(dense, "--moe.shared_router", "true", num_experts=4, shared_from=start)
    before, after = values(dense), values(made.source)

    def expected(key: str) -> Tensor:
        found = [before[SECOND_BLOCK + key.format(name)] for name in ("vision", "text")]
        return {"vision": found[0], "text": found[1], "mean": (found[0] + found[1]) / 2}[start]

    experts = after[f"{SECOND_BLOCK}moe.experts.shared.weight1"]
    assert torch.equal(experts[3], expected("{}_ffn.linear_fc1.weight"))
    assert torch.equal(after[f"{SECOND_BLOCK}shared_norm.bias"], expected("{}_norm.bias"))
    assert "function: changed: text and vision had FFNs of their own" in made.report


def test_noise_is_relative_and_a_function_of_seed_and_expert() -> None:
    source = 3.0 + 0.01 * torch.randn((1, 200, 300), generator=torch.Generator().manual_seed(2))
    experts = source.repeat(3, 1, 1)
    how = UpcycleOptions(noise=0.1, seed=1)
    made = diversify(experts, "weight1", "pool", how)
    added = made - experts
    assert float(added.std()) == pytest.approx(0.001, rel=0.02)
    assert not torch.equal(added[0], added[1])
    assert torch.equal(made, diversify(experts, "weight1", "pool", how))
    assert torch.equal(made[:2], diversify(experts[:2], "weight1", "pool", how))
    for other in (UpcycleOptions(noise=0.1, seed=2), UpcycleOptions(noise=0.2, seed=1)):
        assert not torch.equal(made, diversify(experts, "weight1", "pool", other))
    assert not torch.equal(made, diversify(experts, "weight1", "another", how))
    bias = torch.randn(3, 200)
    assert torch.equal(diversify(bias, "bias1", "pool", how), bias)
    assert torch.equal(experts[0], source[0])


def test_dropped_channels_are_drawn_from_their_own_statistics() -> None:
    how = UpcycleOptions(drop_fraction=0.25, seed=3)
    generator = torch.Generator().manual_seed(4)
    channels, width, experts = 400, 150, 2
    source = {
        "weight1": 1.0 + 0.2 * torch.randn((experts, channels, width), generator=generator),
        "bias1": -2.0 + 0.5 * torch.randn((experts, channels), generator=generator),
        "weight2": 0.1 * torch.randn((experts, width, channels), generator=generator),
        "bias2": torch.randn((experts, width), generator=generator),
    }
    made = {part: diversify(value, part, "pool", how) for part, value in source.items()}
    assert torch.equal(made["bias2"], source["bias2"])
    chosen = [dropped_channels("pool", expert, channels, how) for expert in range(experts)]
    assert not torch.equal(chosen[0], chosen[1])
    for expert in range(experts):
        assert len(chosen[expert].unique()) == 100
        changed = {
            "weight1": (made["weight1"] != source["weight1"])[expert].all(dim=1),
            "bias1": (made["bias1"] != source["bias1"])[expert],
            "weight2": (made["weight2"] != source["weight2"])[expert].all(dim=0),
        }
        for mask in changed.values():
            assert torch.equal(mask.nonzero()[:, 0], chosen[expert])
        new = made["weight1"][expert, chosen[expert]]
        assert float(new.mean()) == pytest.approx(1.0, abs=0.01)
        assert float(new.std()) == pytest.approx(0.2, rel=0.03)
        new = made["bias1"][expert, chosen[expert]]
        assert float(new.mean()) == pytest.approx(-2.0, abs=0.2)


def test_noise_and_drop_reach_the_checkpoint(dense: Source) -> None:
    options: dict[str, Any] = {"num_experts": 4, "noise": 0.1, "drop_fraction": 0.5}
    made = [upcycle(dense, **options, seed=seed) for seed in (9, 9, 10)]
    key = f"{SECOND_BLOCK}moe.experts.text.weight2"
    first, same, other = (values(each.source)[key] for each in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other) and not torch.equal(first[0], first[1])
    assert "changed: noise of 0.1; 50 % of the channels start anew" in made[0].report


@pytest.fixture(scope="module")
def sparse(dense: Source) -> dict[int, Source]:
    """Sparse models with different experts and large routers, by experts per token."""
    made = {}
    for topk in (1, 2):
        source = upcycle(dense, "--moe.topk", str(topk), num_experts=4, noise=0.5).source
        for key, tensor in source.tensors.items():
            if ".router." in key:
                generator = torch.Generator().manual_seed(6)
                source.tensors[key] = lazy(torch.randn(tensor.shape, generator=generator))
        made[topk] = source
    return made


@pytest.mark.parametrize(
    ("before", "after", "num_experts", "scale"), [(1, 1, 8, 2.0), (1, 3, 12, 1.0), (2, 4, 8, 1.0)]
)
def test_multiples_of_experts(
    sparse: dict[int, Source], before: int, after: int, num_experts: int, scale: float
) -> None:
    source = sparse[before]
    made = upcycle(source, "--moe.topk", str(after), num_experts=num_experts).source
    old, new = values(source), values(made)
    for name in ("text", "vision"):
        key = f"{SECOND_BLOCK}moe.experts.{name}.weight2"
        assert torch.equal(new[key][-1], scale * old[key][-1])
        expected = sparse_output(old, name, before, False)
        assert close(sparse_output(new, name, after, False), expected)
    router = new[f"{SECOND_BLOCK}moe.router.text.weight"]
    assert len(router.unique(dim=0)) == num_experts


def test_other_blocks_of_a_sparse_model_get_experts(sparse: dict[int, Source]) -> None:
    """Blocks with experts keep them; the others' experts make up for gates of their own."""
    made = upcycle(sparse[1], "--moe.layers", "2", "3")
    assert [pool.plan.layer_number for pool in made.pools] == [3, 3]
    old, new = values(sparse[1]), values(made.source)
    key = f"{SECOND_BLOCK}moe.experts.text.weight2"
    assert torch.equal(new[key], old[key])
    key = "decoder.layers.2.mlp.{}"
    expected = 4.0 * old[key.format("text_ffn.linear_fc2.weight")]
    assert torch.equal(new[key.format("moe.experts.text.weight2")][3], expected)


def test_copies_share_the_tokens_of_their_expert() -> None:
    norm = (torch.ones(D), torch.zeros(D))
    rows = torch.randn((4, D), generator=torch.Generator().manual_seed(7))
    tokens = F.layer_norm(torch.randn((4000, D), generator=torch.Generator().manual_seed(8)), (D,))
    expert = (tokens @ rows.T).argmax(dim=1)
    copies = torch.softmax(tokens @ grown_router(rows, 2, norm, 0, "key").T, dim=1).argmax(dim=1)
    assert torch.equal(copies // 2, expert)
    assert 0.3 < float((copies % 2).float().mean()) < 0.7


def test_small_router_has_the_logits_that_it_promises() -> None:
    norm = (torch.full((D,), 3.0), torch.ones(D))
    router = small_router(64, norm, 0, "key", logit_std=1e-3)
    tokens = F.layer_norm(torch.randn((500, D)), (D,), *norm)
    assert float((tokens @ router.T).std()) == pytest.approx(1e-3, rel=0.15)
    gates = sampled_gates(small_router(8, norm, 0, "key"), norm, 1)
    assert 8 * gates.low == pytest.approx(1.0, abs=1e-5)
    assert 8 * gates.high == pytest.approx(1.0, abs=1e-5)


def test_moments_are_carried(dense: Source) -> None:
    made = upcycle(dense, num_experts=8, carry_optimizer=True, drop_fraction=0.5).source
    pool, ffn = f"{SECOND_BLOCK}moe.experts.text.", f"{SECOND_BLOCK}text_ffn.linear_"
    for name, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        old, new = moments(dense, name), moments(made, name)
        assert new.shapes == checkpoint_shapes(made.config)
        bias = old[f"{ffn}fc2.bias"].expand(8, -1)
        assert torch.equal(new[f"{pool}bias2"], bias / 8.0**power)
        assert not new[f"{SECOND_BLOCK}moe.router.text.weight"].any()
        qkv = "decoder.layers.1.self_attention.linear_qkv.weight"
        assert torch.equal(new[qkv], old[qkv])
        expected = old[f"{ffn}fc2.weight"].repeat(8, 1, 1) / 8.0**power
        if name == "exp_avg":
            how = UpcycleOptions(drop_fraction=0.5, seed=UpcycleOptions().seed)
            for expert in range(8):
                channels = dropped_channels(f"{SECOND_BLOCK}text", expert, INNER, how)
                assert len(channels) == INNER // 2
                expected[expert][:, channels] = 0.0
        assert torch.equal(new[f"{pool}weight2"], expected)
    parameters, weights = moments(made, "param"), values(made)
    assert parameters.keys() == weights.keys()
    assert all(torch.equal(parameters[key], weights[key]) for key in weights)


def test_optimizer_of_a_sparse_run(dense: Source) -> None:
    made = upcycle(dense, num_experts=4, carry_optimizer=True).source
    inner = {"param_state_sharding_type": "fully_reshardable"}
    groups = [group(1.0), group(1.0, router=True), group(0.0)]
    experts = [group(1.0, expert=True), group(0.0, expert=True)]
    expected = {
        0: {"optimizer": {"param_groups": groups}, **inner},
        1: {"optimizer": {"param_groups": experts}, **inner},
    }
    assert made.common == {"optimizer": expected, "scheduler": DENSE_OPTIMIZER["scheduler"]}
    assert dense.common == DENSE_OPTIMIZER
    more = upcycle(made, num_experts=8, carry_optimizer=True).source
    assert more.common == made.common
    key = f"{SECOND_BLOCK}moe.experts.text.bias2"
    old, new = moments(made, "exp_avg"), moments(more, "exp_avg")
    assert torch.equal(new[key], old[key].repeat_interleave(2, dim=0) / 2.0)


def test_what_was_never_trained_has_no_moments(dense: Source) -> None:
    """What a run does not reach is frozen: neither the source nor the sparse run has state for it."""
    kept = {k: t for k, t in dense.optimizer_tensors.items() if "layers.1.mlp.text_ffn" not in k}
    source = replace(dense, optimizer_tensors=kept)
    made = upcycle(source, num_experts=4, carry_optimizer=True).source
    missing = checkpoint_shapes(made.config).keys() - moments(made, "exp_avg").keys()
    parts = ("weight1", "bias1", "weight2", "bias2")
    router = f"{SECOND_BLOCK}moe.router.text.weight"
    assert missing == {router, *(f"{SECOND_BLOCK}moe.experts.text.{part}" for part in parts)}


def test_sixteen_bit_weights_are_made_of_their_fp32_copies(dense: Source) -> None:
    half = {key: lazy(tensor.read().bfloat16()) for key, tensor in dense.tensors.items()}
    weights = values(upcycle(replace(dense, tensors=half), num_experts=3).source)
    made = weights[f"{SECOND_BLOCK}moe.experts.text.weight2"]
    expected = 3.0 * dense.tensors[f"{SECOND_BLOCK}text_ffn.linear_fc2.weight"].read()
    assert made.dtype == torch.bfloat16 and torch.equal(made[2], expected.bfloat16())
    assert weights[f"{SECOND_BLOCK}moe.router.text.weight"].dtype == torch.float32


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises((ConvertError, ConfigError)) as error:
        upcycle(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_the_dense_checkpoint(dense: Source) -> None:
    message = refused(dense, name="base-32e")
    assert message == "--preset base-32e is of another size than memory: num_layers 4, not 12"
    assert "--model.hidden_size: only --moe" in refused(dense, "--model.hidden_size", "32")
    with pytest.raises(ConfigError):  # a wrong command line, so exit status 2
        upcycle(dense, "--train.steps", "4", num_experts=2)
    assert "no experts" in refused(dense)
    assert "unknown" in refused(dense, name="base-33e")
    assert "moe.topk=3" in refused(dense, "--moe.topk", "3", num_experts=2)
    assert "block 9" in refused(dense, "--moe.layers", "9", num_experts=2)
    cut = {k: t for k, t in dense.tensors.items() if k != "heads.text.linear.weight"}
    message = refused(replace(dense, tensors=cut), num_experts=2)
    assert message == "memory: has no heads.text.linear.weight"


def test_optimizers_that_cannot_be_carried(dense: Source) -> None:
    def message(common: dict[str, Any]) -> str:
        source = replace(dense, common=common)
        return refused(source, num_experts=2, carry_optimizer=True)

    assert "weights only" in message({})
    other = {**DENSE_OPTIMIZER, "optimizer": {"state": {}, "param_groups": []}}
    assert "not megatron-core's distributed" in message(other)
    sgd = copy.deepcopy(DENSE_OPTIMIZER)
    del sgd["optimizer"]["optimizer"]["param_groups"][0]["betas"]
    assert "not Adam" in message(sgd)


@pytest.mark.parametrize(
    ("words", "num_experts", "part"),
    [
        ((), 6, "4 text experts, which cannot become 6"),
        ((), 4, "nothing to do"),
        (("--moe.modalities", "vision"), 8, "cannot become one FFN"),
        (("--moe.shared_router", "true"), 8, "cannot become a shared pool"),
        (("--moe.topk", "4"), 8, "only 1 or 2"),
        (("--moe.normalize_gate", "true"), 8, "normalize_gate is False in the checkpoint"),
    ],
)
def test_what_does_not_fit_the_sparse_checkpoint(
    sparse: dict[int, Source], words: tuple[str, ...], num_experts: int, part: str
) -> None:
    assert part in refused(sparse[1], *words, num_experts=num_experts)


def test_two_of_twice_as_many_experts_would_be_copies_of_one(sparse: dict[int, Source]) -> None:
    message = refused(sparse[2], num_experts=8)
    assert "moe.topk is 2 in the checkpoint and 2 here; only 4" in message


def test_written_whole_or_not_at_all(dense_folder: Path, tmp_path: Path) -> None:
    reader = read_source(dense_folder)
    config = sparse_config(reader.config, "dense", "", 2, ())
    options = UpcycleOptions(carry_optimizer=True)

    def read() -> Tensor:
        raise ConvertError("cut short")

    broken = f"optimizer.state.exp_avg.{SECOND_BLOCK}text_ffn.linear_fc2.weight"
    good = reader.optimizer_tensors[broken]
    reader.optimizer_tensors[broken] = replace(good, read=read)
    with pytest.raises(ConvertError, match="cut short"):
        upcycle_checkpoint(reader, config, tmp_path, options)
    assert not list(tmp_path.iterdir())
    reader.optimizer_tensors[broken] = good
    made = upcycle_checkpoint(reader, config, tmp_path, options)
    assert made.path == tmp_path / "iter_0000007"
    written = CheckpointReader(tmp_path)
    assert written.config == config and config.checkpoint.save == ""
    assert written.train_state == TrainState(step=7)
    assert (tmp_path / "text.model").read_text() == "a tokenizer"
    _, tensors = upcycled_tensors(reader, config, options)
    stored = {**written.tensors, **written.optimizer_tensors}
    assert stored.keys() == tensors.keys()
    key = f"{SECOND_BLOCK}moe.experts.text.weight2"
    for name in (key, f"optimizer.state.exp_avg_sq.{key}"):
        assert torch.equal(stored[name].read(), tensors[name].read())
    with pytest.raises(ConvertError, match="--overwrite"):
        upcycle_checkpoint(reader, config, tmp_path, options)


def test_options_and_task_checkpoints(tmp_path: Path) -> None:
    for options in ({"noise": -1.0}, {"drop_fraction": 1.5}, {"noise": float("nan")}):
        with pytest.raises(ConfigError):
            UpcycleOptions(**options)
    config = FinetuneConfig()
    config = replace(config, model=MODEL, task=replace(config.task, name="vqa", num_classes=3))
    write_checkpoint(tmp_path, {"heads.pooler.dense.bias": lazy(torch.zeros(D))}, config)
    with pytest.raises(ConvertError, match="is of the task vqa; upcycle the pretrained model"):
        read_source(tmp_path)


@pytest.mark.process
def test_command_line(dense_folder: Path, tmp_path: Path) -> None:
    words = f"--load {dense_folder} --num-experts 4 --moe.topk 2 --output {tmp_path}/made".split()
    done = tool("upcycle", *words).succeeded()
    assert "block 2: 4 text experts, copies of the T-FFN; output layer times 2" in done.stdout
    written = CheckpointReader(tmp_path / "made")
    assert written.config.moe.topk == 2 and written.config.moe.num_text_experts == 4
    assert written.path.name == "iter_0000000" and not written.optimizer_tensors
