"""The Hugging Face model as a model of transformers: inputs, losses, precision, saving and loading."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_folder import TINY, VOCAB
from hf_models import (
    EVERYWHERE,
    HEADS,
    KINDS,
    PATCHES,
    build,
    config,
    inputs,
    of,
    task_inputs,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_map_only

from megatron_vlmoe.losses import tasks as task_losses
from megatron_vlmoe.losses.contrastive import contrastive_loss
from megatron_vlmoe.losses.tasks import soft_target_loss
from megatron_vlmoe.model.initial_values import resize_image_positions

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf import modeling_vlmoe, outputs_vlmoe
from megatron_vlmoe.convert.hf.modeling_vlmoe import VLMoEModel


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_single_samples_give(kind):
    model = build(**EVERYWHERE)
    batch = of(inputs(), *KINDS[kind])
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for n in range(3):
            alone = model(**{name: value[n : n + 1] for name, value in batch.items()})
            torch.testing.assert_close(alone.last_hidden_state[0], together[n])


@pytest.mark.parametrize("route_padding", [False, True])
def test_padding_changes_nothing(route_padding):
    model = build(**EVERYWHERE, route_padding=route_padding)
    batch = inputs()
    with torch.no_grad():
        padded = model(**batch)
        for n, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            short = model(
                input_ids=batch["input_ids"][n : n + 1, :length],
                pixel_values=batch["pixel_values"][n : n + 1],
            )
            for part in ("text_hidden_state", "image_hidden_state"):
                found = padded[part][n]
                found = found[:length] if part == "text_hidden_state" else found
                torch.testing.assert_close(short[part][0], found)


def test_with_limited_capacity_padding_counts_as_slots():
    model = build(**EVERYWHERE)
    batch = of(inputs(), *KINDS["texts"])
    model.config.capacity_factor = 0.5
    longer = {name: F.pad(value, (0, 4)) for name, value in batch.items()}
    with torch.no_grad():
        limited = model(**batch).last_hidden_state
        more_slots = model(**longer).last_hidden_state[:, :8]
    assert not torch.allclose(limited, more_slots)


def test_two_image_samples_are_pairs_one_after_the_other():
    model = build("VLMoEForImagesAndTextClassification", capacity_factor=0.5, **EVERYWHERE)
    batch = task_inputs("VLMoEForImagesAndTextClassification")
    with torch.no_grad():
        logits = model(**batch).logits
        order = [0, 0, 1, 1, 2, 2]
        hidden = model.vlmoe(
            batch["input_ids"][order],
            batch["attention_mask"][order],
            torch.stack([batch["pixel_values"][n // 2, n % 2] for n in range(6)]),
        ).last_hidden_state
        pooled = torch.tanh(model.pooler.dense(hidden[:, 0]))
        expected = model.classifier(torch.cat([pooled[0::2], pooled[1::2]], dim=1))
    torch.testing.assert_close(logits, expected)


def test_eager_attention_is_scaled_dot_product_attention():
    batch = inputs()
    sdpa = build(**EVERYWHERE)
    assert sdpa.config._attn_implementation == "sdpa"
    eager = build(**EVERYWHERE, attn_implementation="eager")
    with torch.no_grad():
        first, second = sdpa(**batch), eager(**batch, output_attentions=True)
    torch.testing.assert_close(first.last_hidden_state, second.last_hidden_state)
    weights = second.attentions[0]
    assert weights.shape == (3, 2, 8 + 1 + PATCHES, 8 + 1 + PATCHES)
    length = int(batch["attention_mask"][1].sum())
    assert length < 8 and torch.all(weights[1, :, :, length:8] == 0)
    with pytest.raises(ValueError, match="eager"):
        sdpa(**batch, output_attentions=True)


def test_hidden_states_are_those_between_the_blocks():
    model = build()
    batch = inputs()
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True)
        values = model(**batch, output_hidden_states=True, return_dict=False)
    assert len(output.hidden_states) == 1 + TINY["num_hidden_layers"]
    torch.testing.assert_close(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert torch.equal(values[0], output.last_hidden_state)
    joined = torch.cat([output.text_hidden_state, output.image_hidden_state], dim=1)
    assert torch.equal(joined, output.last_hidden_state)


def test_inputs_embeds_take_the_place_of_ids():
    model = build()
    batch = inputs()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        embeds = model.get_input_embeddings()(batch.pop("input_ids"))
        assert torch.equal(model(**batch, inputs_embeds=embeds).last_hidden_state, expected)


def test_masked_patches_are_not_seen():
    model = build()
    images = inputs()["pixel_values"]
    hidden = torch.zeros(3, PATCHES, dtype=torch.bool)
    hidden[:, 0] = True
    changed = images.clone()
    changed[:, :, :8, :8] += 1.0
    with torch.no_grad():
        masked = [model(pixel_values=x, bool_masked_pos=hidden)[0] for x in (images, changed)]
        assert torch.equal(*masked)
        assert not torch.allclose(model(pixel_values=changed)[0], masked[0])


def test_positions_are_interpolated_as_the_trainer_does():
    model = build()
    table = model.image_embeddings.position_embeddings[0]
    found = model.image_embeddings._positions(48, 48)[0]
    torch.testing.assert_close(found, resize_image_positions(table, 36))
    with torch.no_grad():
        wide = model(pixel_values=torch.zeros(1, 3, 32, 48), interpolate_pos_encoding=True)
    assert wide.last_hidden_state.shape == (1, 1 + 24, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give input_ids"),
        ({"input_ids": torch.ones(1, 17, dtype=torch.long)}, "17 tokens.*16"),
        ({"pixel_values": torch.zeros(1, 3, 32, 40)}, "32 x 40.*32 x 32"),
        ({"pixel_values": torch.zeros(1, 1, 32, 32)}, "pixel_values"),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 36), "interpolate_pos_encoding": True},
            "patches of 8",
        ),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.long),
                "pixel_values": torch.zeros(3, 3, 32, 32),
            },
            "2 texts and 3 images",
        ),
        (
            {
                "input_ids": torch.ones(2, 3, dtype=torch.long),
                "attention_mask": torch.ones(2, 4),
            },
            "attention_mask",
        ),
        ({"input_ids": torch.ones(3, dtype=torch.long)}, "input_ids"),
        (
            {
                "input_ids": torch.ones(1, 3, dtype=torch.long),
                "inputs_embeds": torch.ones(1, 3, 16),
            },
            "not both",
        ),
        ({"bool_masked_pos": torch.ones(1, 16)}, "bool_masked_pos needs pixel_values"),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "attention_mask": torch.ones(1, 3)},
            "attention_mask needs input_ids",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32), "bool_masked_pos": torch.ones(1, 9)},
            "bool_masked_pos",
        ),
    ],
)
def test_wrong_inputs_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


def test_a_model_of_images_alone_reads_no_text():
    model = build(vocab_size=0)
    assert not any("text_embeddings" in name for name, _ in model.named_parameters())
    assert model(pixel_values=torch.zeros(1, 3, 32, 32))[0].shape == (1, 17, 16)
    with pytest.raises(ValueError, match="vocab_size=0"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="vocab_size=0"):
        build("VLMoEForMaskedLM", vocab_size=0)


@pytest.mark.parametrize("name", HEADS)
def test_gradient_checkpointing_changes_no_gradient(name):
    batch = task_inputs(name)
    plain = build(name, **EVERYWHERE).train()
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing_enable()
    gradients = []
    for model in (plain, frugal):
        torch.manual_seed(3)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key
    routed = [key for key in gradients[0] if ".router." in key or ".experts." in key]
    assert routed and all(gradients[0][key].abs().sum() > 0 for key in routed if "router" in key)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_goes_with_frozen_embeddings(kind, reentrant):
    batch = of(inputs(), *KINDS[kind])
    plain = build().train()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("attention.query" in name)
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing_enable({"use_reentrant": reentrant})
    frugal.enable_input_require_grads()
    for model in (plain, frugal):
        model(**batch).last_hidden_state.square().sum().backward()
    for (name, expected), found in zip(plain.named_parameters(), frugal.parameters()):
        if expected.requires_grad:
            assert found.grad is not None and torch.equal(found.grad, expected.grad), name


def test_heads_read_the_vectors_that_the_trainers_read():
    batch = inputs()
    text, image = of(batch, *KINDS["texts"]), of(batch, *KINDS["images"])
    with torch.no_grad():
        model = build("VLMoEForImageClassification")
        patches = model.vlmoe(**image).last_hidden_state[:, 1:]
        torch.testing.assert_close(model(**image).logits, model.classifier(patches.mean(dim=1)))
        model = build("VLMoEForSequenceClassification")
        first = model.vlmoe(**text).last_hidden_state[:, 0]
        pooled = torch.tanh(model.pooler.dense(first))
        torch.testing.assert_close(model(**text).logits, model.classifier(pooled))
        model = build("VLMoEForVisualQuestionAnswering")
        first = model.vlmoe(**batch).last_hidden_state[:, 0]
        layers = model.classifier
        hidden = F.gelu(layers.norm(layers.dense(torch.tanh(model.pooler.dense(first)))))
        torch.testing.assert_close(model(**batch).logits, layers.output(hidden))


def test_masked_losses_count_labelled_positions_only():
    model = build("VLMoEForPreTraining")
    batch = task_inputs("VLMoEForPreTraining")
    with torch.no_grad():
        output = model(**batch)
    for name, labels in (("mlm", "labels"), ("mim", "image_labels")):
        logits = output[f"{name}_logits"]
        expected = F.cross_entropy(logits.flatten(0, 1), batch[labels].flatten())
        torch.testing.assert_close(output[f"{name}_loss"], expected)
    torch.testing.assert_close(output.loss, output.mlm_loss + output.mim_loss)
    nothing = torch.full_like(batch["labels"], -100)
    loss = model(batch["input_ids"], labels=nothing).loss
    assert loss == 0.0 and loss.requires_grad


def test_loss_of_answers_is_the_trainers():
    logits = torch.randn(4, 5)
    answers = torch.tensor([[0, 2], [4, -1], [-1, -1], [1, 3]])
    scores = torch.tensor([[1.0, 0.3], [0.6, 0.0], [0.0, 0.0], [0.9, 1.0]])
    target = torch.zeros(4, 5)
    for row, answer in (answers >= 0).nonzero().tolist():
        target[row, answers[row, answer]] = scores[row, answer]
    found = outputs_vlmoe.answer_loss(logits, target, config())
    torch.testing.assert_close(found, soft_target_loss(logits, answers, scores))


@pytest.mark.parametrize(
    ("problem", "labels", "expected"),
    [
        (None, torch.tensor([0, 2]), F.cross_entropy),
        ("single_label_classification", torch.tensor([0, 2]), F.cross_entropy),
        (None, torch.tensor([[0.0, 1.0, 1.0]] * 2), F.binary_cross_entropy_with_logits),
        (
            "multi_label_classification",
            torch.tensor([[0.0, 1.0, 1.0]] * 2),
            F.binary_cross_entropy_with_logits,
        ),
        ("regression", torch.tensor([[0.5, 1.0, -1.0]] * 2), F.mse_loss),
    ],
)
def test_loss_of_classes_follows_the_problem_type(problem, labels, expected):
    logits = torch.randn(2, 3)
    found = outputs_vlmoe.classification_loss(logits, labels, config(problem_type=problem))
    torch.testing.assert_close(found, expected(logits, labels))


def test_regression_takes_labels_of_one_dimension():
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
    found = outputs_vlmoe.classification_loss(logits, labels, config(num_labels=1))
    assert found == (1.0 + 4.0) / 2


def test_retrieval_compares_all_texts_with_all_images():
    model = build("VLMoEForImageAndTextRetrieval", **EVERYWHERE)
    batch = inputs()
    with torch.no_grad():
        texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        images = model.get_image_features(batch["pixel_values"]).pooler_output
        output = model(
            batch["input_ids"][:2],
            batch["attention_mask"][:2],
            batch["pixel_values"],
        )
        judged = model(**batch, output_match_logits=True).match_logits
        assert torch.equal(judged, model.match_logits(**batch))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3))
    expected = torch.exp(torch.tensor(2.6592)) * images @ texts[:2].T
    torch.testing.assert_close(output.logits_per_image, expected)
    torch.testing.assert_close(output.logits_per_text, expected.T)
    assert output.match_logits is None and judged.shape == (3, 2)


def test_retrieval_losses_are_the_trainers(monkeypatch):
    model = build("VLMoEForImageAndTextRetrieval", **EVERYWHERE)
    batch = inputs()
    wrong = torch.tensor([1, 2, 0])
    own = torch.arange(3)
    drawn: list[torch.Tensor] = []

    def draw(weights: torch.Tensor, count: int) -> torch.Tensor:
        drawn.append(weights)
        return wrong[:, None]

    monkeypatch.setattr(torch, "multinomial", draw)
    with torch.no_grad():
        output = model(**batch, return_loss=True)
        similarity = output.logits_per_text
        texts, images = output.text_features, output.image_features
        expected = contrastive_loss(images, texts, images, texts, model.logit_scale, 0)
        triples = [
            model.match_logits(batch["input_ids"][t], batch["attention_mask"][t], x)
            for t, x in (
                (own, batch["pixel_values"]),
                (own, batch["pixel_values"][wrong]),
                (wrong, batch["pixel_values"]),
            )
        ]
    torch.testing.assert_close(output.contrastive_loss, expected)
    rows = torch.stack(triples, dim=1).flatten(0, 1)
    matching = task_losses.matching_loss(rows, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(output.matching_loss, matching)
    torch.testing.assert_close(output.loss, expected + matching)
    for weights, rows in zip(drawn, (similarity, similarity.T), strict=True):
        others = rows.masked_fill(torch.eye(3, dtype=torch.bool), -math.inf)
        torch.testing.assert_close(weights, torch.softmax(others, dim=1))


def test_given_pairs_can_be_judged_with_labels():
    model = build("VLMoEForImageAndTextRetrieval")
    labels = torch.tensor([1, 0, 0])
    with torch.no_grad():
        output = model(**inputs(), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.match_logits, labels))
    assert output.contrastive_loss is None


@pytest.mark.parametrize("name", HEADS)
def test_saved_weights_come_back_bit_by_bit(name, tmp_path):
    model = build(name, **EVERYWHERE)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    base, report = VLMoEModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(base.layernorm.weight, model.vlmoe.layernorm.weight)


def test_one_masked_head_loads_without_the_other(tmp_path):
    whole = build("VLMoEForPreTraining")
    whole.save_pretrained(tmp_path)
    for name, head in (
        ("VLMoEForMaskedLM", "mlm_head"),
        ("VLMoEForMaskedImageModeling", "mim_head"),
    ):
        loaded, report = getattr(modeling_vlmoe, name).from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert torch.equal(getattr(loaded, head).weight, getattr(whole, head).weight)


def test_a_task_starts_from_pretraining_with_a_fresh_head(tmp_path):
    whole = build("VLMoEForPreTraining", **EVERYWHERE)
    whole.save_pretrained(tmp_path)
    loaded, report = modeling_vlmoe.VLMoEForVisualQuestionAnswering.from_pretrained(
        tmp_path, num_labels=7, output_loading_info=True
    )
    assert not report["unexpected_keys"]
    assert all(key.startswith(("pooler.", "classifier.")) for key in report["missing_keys"])
    state = loaded.vlmoe.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in whole.vlmoe.state_dict().items())
    assert loaded.classifier.output.weight.shape == (7, 32)
    # trunc_normal of standard deviation 0.3, cut at it.
    assert (
        0.1 < loaded.classifier.dense.weight.std()
        and loaded.classifier.dense.weight.abs().max() <= 0.3
    )
    assert torch.equal(loaded.classifier.norm.weight, torch.ones(32))
    assert not loaded.classifier.output.bias.any()


def test_routers_and_temperature_stay_in_fp32(tmp_path):
    model = build("VLMoEForImageAndTextRetrieval", **EVERYWHERE)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for key, value in loaded.state_dict().items():
        kept = ".router." in key or key == "logit_scale"
        assert value.dtype == (torch.float32 if kept else torch.bfloat16), key
        if kept:
            assert torch.equal(value, model.state_dict()[key])
    with torch.no_grad():
        batch = inputs()
        output = loaded(**batch, output_match_logits=True)
        exact = model(**batch)
    assert output.logits_per_text.dtype == torch.float32
    torch.testing.assert_close(output.text_features, exact.text_features, atol=0.1, rtol=0.1)


def test_routers_compute_in_fp32_under_autocast():
    model = build(**EVERYWHERE)
    router = model.encoder.layer[0].feed_forward.text.router
    tokens = torch.randn(5, 16)
    expected = router(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(tokens), expected)
        output = model(**inputs()).last_hidden_state
    exact = model(**inputs()).last_hidden_state
    torch.testing.assert_close(output.float(), exact, atol=0.3, rtol=0.1)


@pytest.mark.parametrize("name", HEADS)
def test_building_needs_no_memory_on_the_meta_device(name):
    with torch.device("meta"):
        model = build(name, **EVERYWHERE)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_new_weights_follow_the_trainers_rule():
    model = build(hidden_size=64, num_hidden_layers=8, moe_layers=[8], num_vl_layers=0)
    last = model.encoder.layer[7]
    pool = last.feed_forward.text.experts
    for weight, scale in (
        (last.attention.query.weight, 1.0),
        (last.attention.output.weight, 0.25),
        (pool.fc1_weight, 1.0),
        (pool.fc2_weight, 0.25),
        (model.text_embeddings.position_embeddings, 1.0),
        (model.image_embeddings.patch_embeddings.projection.weight, 1.0),
    ):
        # A normal distribution cut at one standard deviation has 0.54 of it.
        assert weight.abs().max() <= 0.3 * scale
        assert weight.detach().std().item() == pytest.approx(0.54 * 0.3 * scale, rel=0.1)
    assert not torch.equal(pool.fc1_weight[0], pool.fc1_weight[1])
    assert torch.equal(last.lambda_1, torch.full((64,), 0.1))
    assert build(layer_scale_init_value=0.0).encoder.layer[0].lambda_1 is None


def test_stochastic_depth_drops_whole_samples_in_training():
    model = build(drop_path_rate=0.5)
    assert [layer.drop_path.rate for layer in model.encoder.layer] == [0.0, 0.25, 0.5]
    drop = model.encoder.layer[2].drop_path.train()
    branch = torch.ones(64, 3, 2)
    dropped = drop(branch)
    first = dropped[:, :1, :1]
    assert torch.equal(dropped, first.expand_as(dropped))
    assert set(first.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(drop.eval()(branch), branch)


def test_vocabulary_can_be_enlarged():
    model = build("VLMoEForMaskedLM")
    before = model.mlm_head.weight.clone()
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.vocab_size == VOCAB + 5
    assert model.mlm_head.weight.shape[0] == model.mlm_head.bias.shape[0] == VOCAB + 5
    assert torch.equal(model.mlm_head.weight[:VOCAB], before)
    logits = model(torch.tensor([[1, VOCAB + 4, 2]])).logits
    assert logits.shape == (1, 3, VOCAB + 5)


def distribute(model: torch.nn.Module, device_of: Callable[[str], str]) -> torch.nn.Module:
    """Puts every parameter somewhere; inputs follow it, as accelerate's hooks do for the modules of a device map."""
    for name, module in model.named_modules():
        device = device_of(name)
        for key, parameter in module.named_parameters(recurse=False):
            place = device_of(f"{name}.{key}".strip("."))
            moved = torch.empty(parameter.shape, dtype=parameter.dtype, device=place)
            setattr(module, key, torch.nn.Parameter(moved, requires_grad=False))
        if name not in ("", "vlmoe"):
            move = functools.partial(_moved, device=device)
            module.register_forward_pre_hook(move, with_kwargs=True)
    return model


def _moved(module: Any, args: Any, kwargs: Any, device: str) -> Any:
    return tree_map_only(torch.Tensor, lambda value: value.to(device), (args, kwargs))


@pytest.mark.parametrize("name", HEADS)
def test_parts_of_a_model_may_be_on_several_devices(name):
    # Shapes and devices without values: "meta" stands for a second GPU.
    model = build(name, moe_layers=[])
    batch, first, second = task_inputs(name), "cpu", "meta"
    beginning = ("vlmoe.text_embeddings", "image_projection", "logit_scale")
    if "Masked" not in name and "PreTraining" not in name:
        # The other way round: there is no autocast for "meta", which similarities and logits of tasks are computed
        # without.
        first, second = "meta", "cpu"

    def device_of(part: str) -> str:
        return first if part.startswith(beginning) else second

    with FakeTensorMode(shape_env=ShapeEnv()), torch.no_grad():
        fake = {
            key: torch.empty(value.shape, dtype=value.dtype, device=first)
            for key, value in batch.items()
            if isinstance(value, torch.Tensor)
        }
        output = distribute(model, device_of)(**{**batch, **fake})
    assert output.loss.device.type == second


def test_modules_whose_parameters_are_used_together_are_not_split():
    accelerate = pytest.importorskip("accelerate")
    model = build("VLMoEForPreTraining", **EVERYWHERE)
    for size in range(1000, 60_000, 500):
        places = accelerate.infer_auto_device_map(
            model,
            max_memory={"cpu": size, "disk": 10**9},
            no_split_module_classes=list(model._no_split_modules),
        )
        assert not [part for part in places if "embeddings." in part or ".layer.0." in part]
    # FSDP looks for every class that is named.
    assert "VLMoETextEmbeddings" not in build(vocab_size=0)._no_split_modules
