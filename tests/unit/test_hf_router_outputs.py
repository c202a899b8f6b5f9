"""What the Hugging Face model says of its routers, by the conventions of transformers."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import router_functions
import torch
from test_hf_model import EVERYWHERE, HEADS, KINDS, build, inputs, of, task_inputs

from megatron_vlmoe.config.schema import AuxLossConfig, MoEConfig, RunConfig
from megatron_vlmoe.convert.hf_config import export_config, import_config

transformers = pytest.importorskip("transformers")

# The text router's tokens, the vision router's, and those of pairs in the last block, of inputs().
TEXT, VISION, PAIRS = 3 * 8, 3 * 17, 3 * 25


@pytest.mark.parametrize(
    ("kind", "options", "shapes"),
    [
        ("texts", {}, [(TEXT, 3), (TEXT, 3)]),
        ("images", {}, [(VISION, 4), (VISION, 4)]),
        ("pairs", {}, [(TEXT, 3), (VISION, 4), (PAIRS, 4)]),
        ("pairs", {"shared_router": True}, [(PAIRS, 4), (PAIRS, 4)]),
        ("pairs", {"moe_modalities": "text"}, [(TEXT, 3), (PAIRS, 4)]),
        ("pairs", {"moe_layers": []}, []),
    ],
)
def test_outputs_have_every_router_that_the_inputs_met(kind, options, shapes):
    model = build(**{**EVERYWHERE, **options})
    batch = of(inputs(), *KINDS[kind])
    plain = model(**batch)
    output = model(**batch, output_router_logits=True)
    assert torch.equal(plain.last_hidden_state, output.last_hidden_state)
    assert (plain.aux_loss, plain.router_logits, plain.dropped_tokens) == (None, None, None)
    assert [tuple(logits.shape) for logits in output.router_logits] == shapes
    assert [count.item() for count in output.dropped_tokens] == [0] * len(shapes)
    assert (output.aux_loss > 0) == bool(shapes)
    # Asked for by the configuration, and not by one call.
    model.config.output_router_logits = True
    torch.testing.assert_close(model(**batch).aux_loss, output.aux_loss)
    assert model(**batch, output_router_logits=False).aux_loss is None
    values = model(**batch, return_dict=False)
    assert torch.equal(values[0], output.last_hidden_state) and len(values) == len(output)


def test_aux_loss_is_the_sum_over_routers_without_padding():
    weights = {"importance": 0.25, "gshard": 2.0}
    model = build(**EVERYWHERE, text_router_losses={"z": 0.5}, vision_router_losses=weights)
    batch = inputs()
    output = model(**batch, output_router_logits=True)
    text, vision, pairs = output.router_logits
    tokens = batch["attention_mask"].bool()
    pair_mask = torch.cat([tokens.flatten(), torch.ones(VISION, dtype=torch.bool)])
    expected = 0.5 * router_functions.z_loss(text, tokens.flatten())
    for logits, mask in ((vision, None), (pairs, pair_mask)):
        expected = expected + 0.25 * router_functions.importance_loss(logits, mask)
        expected = expected + 2.0 * router_functions.gshard_loss(logits, 2, mask)
    torch.testing.assert_close(output.aux_loss, expected)
    # transformers' own function has the choices of a token, not their share: twice as much for two.
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    found = load_balancing_loss_func((pairs,), 4, 2, pair_mask)
    torch.testing.assert_close(found, 2 * router_functions.gshard_loss(pairs, 2, pair_mask))


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_has_the_routers_part_with_its_coefficient(name):
    model = build(name, **EVERYWHERE, router_aux_loss_coef=0.3)
    batch = task_inputs(name)
    torch.manual_seed(5)
    plain = model(**batch)
    torch.manual_seed(5)
    output = model(**batch, output_router_logits=True)
    assert output.aux_loss > 0 and output.router_logits
    torch.testing.assert_close(output.loss, plain.loss + 0.3 * output.aux_loss)
    without = {key: value for key, value in batch.items() if "label" not in key}
    without.pop("return_loss", None)
    assert model(**without, output_router_logits=True).loss is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_gradient_of_the_routers_losses(reentrant):
    plain = build("VLMoEForMaskedLM", **EVERYWHERE, router_aux_loss_coef=1.0).train()
    frugal = copy.deepcopy(plain)
    frugal.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, frugal):
        model(**task_inputs("VLMoEForMaskedLM"), output_router_logits=True).aux_loss.backward()
    gradients = [
        {key: p.grad for key, p in model.named_parameters() if ".router." in key}
        for model in (plain, frugal)
    ]
    for key, gradient in gradients[0].items():
        if "image" not in key:
            assert gradient is None or torch.equal(gradient, gradients[1][key]), key
    assert sum(gradient is not None for gradient in gradients[0].values()) == 3


@pytest.mark.parametrize("name", ("VLMoEModel", *HEADS))
def test_an_unknown_argument_is_an_error(name):
    model = build(name)
    batch = inputs() if name == "VLMoEModel" else task_inputs(name)
    with pytest.raises(TypeError, match="token_types"):
        model(**batch, token_types=torch.zeros(3))


@pytest.mark.parametrize(
    ("name", "given", "argument"),
    [
        ("VLMoEForImageClassification", KINDS["images"], "input_ids"),
        ("VLMoEForImageClassification", KINDS["images"], "inputs_embeds"),
        ("VLMoEForSequenceClassification", KINDS["texts"], "pixel_values"),
        ("VLMoEForImageAndTextRetrieval", KINDS["images"], "inputs_embeds"),
    ],
)
def test_a_class_of_one_modality_takes_no_other(name, given, argument):
    other = inputs().get(argument, torch.zeros(3, 4, 16))
    with pytest.raises(TypeError, match=f"^VLMoEModel.forward.*'{argument}'"):
        build(name)(**of(inputs(), *given), **{argument: other})


def test_experts_implementations_agree_and_others_are_refused():
    batch = inputs()
    model = build(**EVERYWHERE)
    assert model.config._experts_implementation == "grouped_mm"
    expected = model(**batch).last_hidden_state
    for name in ("eager", "batched_mm"):
        model.set_experts_implementation(name)
        assert model.config._experts_implementation == name
        torch.testing.assert_close(model(**batch).last_hidden_state, expected)
        again = build(**EVERYWHERE, experts_implementation=name)
        torch.testing.assert_close(again(**batch).last_hidden_state, expected)
    with pytest.raises(ValueError, match="'sonicmoe' is none of eager, grouped_mm, batched_mm"):
        model.set_experts_implementation("sonicmoe")
    with pytest.raises(ValueError, match="experts_implementation='quick'"):
        build(experts_implementation="quick")
    model.config._experts_implementation = "quick"
    with pytest.raises(ValueError, match="'quick' is none of eager, grouped_mm, batched_mm"):
        model(**batch)


def test_what_transformers_records_is_what_forward_returns():
    from transformers.utils.output_capturing import capture_outputs

    model = build(**EVERYWHERE, attn_implementation="eager")

    def forward(self: Any, **kwargs: Any) -> Any:
        return type(model).forward(self, **kwargs)

    names = ("hidden_states", "attentions", "router_logits")
    recorded = capture_outputs(forward, tie_last_hidden_states=False)(
        model, **inputs(), **{f"output_{name}": True for name in names}
    )
    returned = model(**inputs(), **{f"output_{name}": True for name in names})
    for name in names:
        assert len(recorded[name]) == len(returned[name])
        for found, expected in zip(recorded[name], returned[name]):
            assert torch.equal(found, expected), name


def test_trainer_joins_predictions_without_what_routers_did(tmp_path):
    model = build("VLMoEForSequenceClassification", **EVERYWHERE, output_router_logits=True)
    batch = task_inputs("VLMoEForSequenceClassification")
    rows = [{key: value[n] for key, value in batch.items()} for n in range(3)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(tmp_path, per_device_eval_batch_size=2, report_to=[]),
    )
    assert trainer.predict(rows).predictions.shape == (3, 3)


def test_the_routers_options_of_a_run_travel_both_ways(tmp_path):
    moe = MoEConfig(
        num_vision_experts=4,
        num_text_experts=4,
        aux_loss_coefficient=0.02,
        noise_std=0.5,
        text_aux=AuxLossConfig(gshard=2.0, global_entropy=1.0, global_entropy_experts=3.0),
    )
    run = RunConfig(moe=moe)
    content = export_config(run)
    assert content["text_router_losses"] == {
        "gshard": 2.0,
        "global_entropy": 1.0,
        "global_entropy_experts": 3.0,
    }
    assert content["vision_router_losses"] == {"importance": 0.5, "load": 0.5}
    assert (content["router_aux_loss_coef"], content["router_noise_std"]) == (0.02, 0.5)
    content = json.loads(json.dumps(content))
    assert import_config(tmp_path, content).moe == moe
    # Earlier exports have them among the options of training, with all weights.
    options = json.loads(json.dumps(dataclasses.asdict(moe)))
    for ours, theirs in (
        ("aux_loss_coefficient", "router_aux_loss_coef"),
        ("noise_std", "router_noise_std"),
        ("text_aux", "text_router_losses"),
        ("vision_aux", "vision_router_losses"),
    ):
        del content[theirs]
        content["training"]["moe"][ours] = options[ours]
    assert import_config(tmp_path, content).moe == moe
