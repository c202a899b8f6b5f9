"""The heads of the Hugging Face model: padding, precision, what retrieval returns, and what training reaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hf_folder import write_folder, write_processors
from hf_models import EVERYWHERE, HEADS, build, inputs, task_inputs

pytest.importorskip("transformers")

from megatron_vlmoe.convert.hf import modeling_vlmoe
from megatron_vlmoe.convert.hf.tokenization_vlmoe import VLMoETokenizer

CLASSIFIERS = {
    "VLMoEForVisualQuestionAnswering": "classifier.output",
    "VLMoEForImagesAndTextClassification": "classifier.output",
    "VLMoEForImageClassification": "classifier",
    "VLMoEForSequenceClassification": "classifier",
    "VLMoEForImageAndTextRetrieval": "matching",
}
RETRIEVAL = "VLMoEForImageAndTextRetrieval"
POOLED = {
    "VLMoEForVisualQuestionAnswering": ["logits", "loss"],
    "VLMoEForImagesAndTextClassification": ["logits", "loss"],
    "VLMoEForSequenceClassification": ["logits", "loss"],
    RETRIEVAL: ["logits_per_text", "text_features", "match_logits"],
}


def to_the_left(batch: dict[str, Any]) -> dict[str, Any]:
    """The same texts (and their labels) with the padding before them."""
    length = batch["input_ids"].shape[1]
    found = dict(batch)
    for name in ("input_ids", "attention_mask", "labels"):
        rows = batch.get(name)
        if rows is not None and rows.dim() == 2 and rows.shape[1] == length:
            shifts = length - batch["attention_mask"].sum(dim=1)
            found[name] = torch.stack([row.roll(int(n)) for row, n in zip(rows, shifts)])
    return found


@pytest.mark.parametrize("name", POOLED)
@pytest.mark.parametrize("capacity_factor", [0.0, 0.5])
def test_padding_on_the_left_gives_the_same_as_on_the_right(name, capacity_factor):
    model = build(name, capacity_factor=capacity_factor, **EVERYWHERE)
    batch = task_inputs(name)
    if name == RETRIEVAL:
        batch["output_match_logits"] = True
        del batch["return_loss"]
    assert not torch.equal(to_the_left(batch)["input_ids"], batch["input_ids"])
    with torch.no_grad():
        right, left = model(**batch), model(**to_the_left(batch))
    for field in POOLED[name]:
        torch.testing.assert_close(left[field], right[field])


def test_padding_without_a_mask_is_warned_of(monkeypatch):
    from transformers import modeling_utils

    model = build()
    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", said.append)
    pad = model.config.pad_token_id
    for ids, warned in (([5, 6, 7], 0), ([pad, 6, 7], 1), ([5, 6, pad], 2)):
        model(input_ids=torch.tensor([ids]))
        assert len(said) == warned
    model(input_ids=torch.tensor([[5, pad]]), attention_mask=torch.tensor([[1, 0]]))
    assert len(said) == 2 and all("attention_mask" in text for text in said)


def test_tokens_know_their_place_behind_padding():
    model = build("VLMoEForPreTraining", **EVERYWHERE)
    batch = task_inputs("VLMoEForPreTraining")
    with torch.no_grad():
        right, left = model(**batch), model(**to_the_left(batch))
    torch.testing.assert_close(left.loss, right.loss)
    torch.testing.assert_close(left.mim_logits, right.mim_logits)
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    for n, length in enumerate(lengths):
        torch.testing.assert_close(left.mlm_logits[n, -length:], right.mlm_logits[n, :length])


def test_the_tokenizer_may_pad_on_either_side_and_a_text_may_be_empty(tmp_path: Path):
    write_processors(tmp_path)
    tokenizer = VLMoETokenizer.from_pretrained(tmp_path)
    model = build("VLMoEForSequenceClassification", **EVERYWHERE)
    texts = ["a red circle", "", "the left"]
    with torch.no_grad():
        right, left = (
            model(**tokenizer(texts, padding=True, padding_side=side, return_tensors="pt")).logits
            for side in ("right", "left")
        )
        alone = model(**tokenizer("", return_tensors="pt")).logits
    torch.testing.assert_close(left, right)
    torch.testing.assert_close(right[1], alone[0])


@pytest.mark.parametrize("with_image", [False, True])
def test_a_text_without_tokens_is_refused(with_image):
    batch = {"pixel_values": inputs()["pixel_values"][:1]} if with_image else {}
    with pytest.raises(ValueError, match="a text of 0 tokens"):
        build()(input_ids=torch.ones(1, 0, dtype=torch.long), **batch)


@pytest.mark.parametrize("number", [0, 4, 9])
def test_more_experts_per_token_than_there_are_is_refused(number, tmp_path):
    model = build()
    # The smallest pool has three.
    model.config.num_experts_per_tok = number
    with pytest.raises(ValueError, match=f"num_experts_per_tok={number} .* 3 experts"):
        model(input_ids=inputs()["input_ids"])
    folder = write_folder(tmp_path, "mnli")
    name = "VLMoEForSequenceClassification"
    with pytest.raises(ValueError, match=f"num_experts_per_tok={number} "):
        getattr(modeling_vlmoe, name).from_pretrained(folder, num_experts_per_tok=number)


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_task_logits_are_computed_in_fp32(name, autocast):
    model = build(name, **EVERYWHERE)
    if not autocast:
        model = model.bfloat16()
    layer = model.get_submodule(CLASSIFIERS[name])
    read: list[torch.Tensor] = []
    layer.register_forward_hook(lambda layer, args, output: read.append(args[0]))
    batch = task_inputs(name) | ({"output_match_logits": True} if name == RETRIEVAL else {})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch)
    logits = output.match_logits if name == RETRIEVAL else output.logits
    assert read[0].dtype == torch.bfloat16 or name == "VLMoEForImageClassification"
    expected = F.linear(read[0].float(), layer.weight.float(), layer.bias.float())
    assert logits.dtype == torch.float32 and torch.equal(logits, expected)


def test_features_are_outputs_with_everything_that_was_read():
    model = build(RETRIEVAL, attn_implementation="eager", **EVERYWHERE)
    batch = inputs()
    shown = {"output_hidden_states": True, "output_attentions": True}
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids, attention_mask=mask, **shown)
        images = model.get_image_features(pixel_values=pixels, **shown)
        hidden = model.vlmoe(ids, mask, **shown)
        values = model.get_text_features(ids, mask, return_dict=False)
    expected = F.normalize(model.text_projection(hidden.last_hidden_state[:, 0]), dim=1)
    torch.testing.assert_close(texts.pooler_output, expected)
    torch.testing.assert_close(texts.last_hidden_state, hidden.last_hidden_state)
    assert isinstance(values, tuple) and torch.equal(values[1], texts.pooler_output)
    for output, length in ((texts, 8), (images, 17)):
        assert [state.shape for state in output.hidden_states] == 4 * [(3, length, 16)]
        assert [weights.shape for weights in output.attentions] == 3 * [(3, 2, length, length)]


@pytest.mark.parametrize(
    ("given", "length"), [("texts", 8), ("images", 17), ("pairs", 25), ("both", None)]
)
def test_retrieval_shows_hidden_states_and_attentions(given, length):
    model = build(RETRIEVAL, attn_implementation="eager", **EVERYWHERE)
    batch: dict[str, Any] = dict(inputs())
    if given == "texts":
        del batch["pixel_values"]
    elif given == "images":
        batch = {"pixel_values": batch["pixel_values"]}
    elif given == "pairs":
        batch["output_match_logits"] = True
    with torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        values = model(**batch, output_hidden_states=True, return_dict=False)
    if length is None:
        # Nothing has read the two together.
        assert output.hidden_states is None and output.attentions is None
    else:
        assert [state.shape for state in output.hidden_states] == 4 * [(3, length, 16)]
        assert [weights.shape for weights in output.attentions] == 3 * [(3, 2, length, length)]
    for part, size, there in (
        (output.text_model_output, 8, given != "images"),
        (output.vision_model_output, 17, given != "texts"),
    ):
        assert (part is not None) == there
        if part is not None:
            assert part.hidden_states[-1].shape == (3, size, 16)
            assert part.attentions[-1].shape == (3, 2, size, size)
    assert isinstance(values[-1], tuple) and torch.is_tensor(values[-1][0])


def test_features_of_one_modality_take_no_other():
    model = build(RETRIEVAL)
    batch = inputs()
    with pytest.raises(TypeError, match="pixel_values"):
        model.get_text_features(**batch)
    with pytest.raises(TypeError, match="input_ids"):
        model.get_image_features(**batch)


def reached(model: torch.nn.Module, batch: dict[str, Any]) -> set[str]:
    """Names of the parameters that a step gives a gradient."""
    output = model.train()(**batch)
    loss = output.loss if "loss" in output else output.last_hidden_state.sum()
    loss.backward()
    return {name for name, value in model.named_parameters() if value.grad is not None}


KINDS = {
    "texts": ["input_ids", "attention_mask", "labels"],
    "images": ["pixel_values", "bool_masked_pos", "image_labels"],
}
SETS = {
    "dense": {"moe_layers": []},
    "experts": EVERYWHERE,
    "shared": {"shared_router": True, "moe_layers": [1, 3], "use_token_type_embeddings": True},
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("options", SETS)
def test_what_training_does_not_reach_is_frozen(name, options):
    model = build(name, **SETS[options])
    read = {
        "VLMoEForPreTraining": ["pairs"],
        "VLMoEForMaskedLM": ["pairs"],
        "VLMoEForMaskedImageModeling": ["pairs"],
    }.get(name, [])
    expected = reached(model, task_inputs(name))
    frozen = model.freeze_unreached(*read)
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained == expected
    assert {*frozen} == {key for key, _ in model.named_parameters()} - expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["VLMoEForPreTraining", "VLMoEForMaskedLM", "VLMoEModel"])
def test_what_is_reached_depends_on_what_is_read(name, kind):
    if name == "VLMoEForMaskedLM" and kind == "images":
        with pytest.raises(ValueError, match="trained on texts, pairs, not on 'images'"):
            build(name).freeze_unreached("images")
        return
    batch = {k: v for k, v in task_inputs("VLMoEForPreTraining").items() if k in KINDS[kind]}
    if name == "VLMoEModel":
        batch = {k: v for k, v in batch.items() if k in inputs()}
    model = build(name, **EVERYWHERE)
    expected = reached(model, batch)
    model.freeze_unreached(kind)
    assert {key for key, value in model.named_parameters() if value.requires_grad} == expected


def test_training_on_all_kinds_freezes_only_what_none_reaches():
    assert build("VLMoEForPreTraining", **EVERYWHERE).freeze_unreached() == []
    frozen = build("VLMoEForMaskedLM", **EVERYWHERE).freeze_unreached()
    # Images without a text are not read: the vision branch of the last block is not.
    assert "vlmoe.image_embeddings.mask_token" in frozen
    assert "vlmoe.encoder.layer.2.feed_forward.vision.layernorm.weight" in frozen
    assert not any(".text" in name or ".layer.0." in name for name in frozen)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("chosen", "busy"), [(1, [False, True, False]), (3, [False] * 3)])
def test_experts_without_tokens_have_a_gradient_of_zero(implementation, chosen, busy):
    model = build(**EVERYWHERE)
    pool = model.encoder.layer[0].feed_forward.text.experts
    pool.config._experts_implementation = implementation
    # Expert 3 of three: no choice is carried out, as with padding.
    choices = torch.full((2, 1), chosen)
    pool(torch.randn(2, 16), choices, torch.ones(2, 1)).sum().backward()
    for parameter in pool.parameters():
        found = parameter.grad.flatten(1).abs().sum(dim=1) > 0
        assert found.tolist() == busy


def test_retrieval_adds_up_what_the_routers_of_all_passes_do():
    options = {"text_router_losses": {"gshard": 1.0}, "vision_router_losses": {"importance": 1.0}}
    model = build(RETRIEVAL, **EVERYWHERE, **options, router_aux_loss_coef=0.5)
    batch = task_inputs(RETRIEVAL)
    ids, mask, pixels = batch["input_ids"], batch["attention_mask"], batch["pixel_values"]
    asked = {"output_router_logits": True}
    with torch.no_grad():
        texts = model.get_text_features(ids, mask, **asked)
        images = model.get_image_features(pixels, **asked)
        pairs = model.vlmoe(ids, mask, pixels, **asked)
        output = model(ids, mask, pixels, labels=torch.tensor([1, 0, 1]), **asked)
        trained = model(**batch, **asked)
        plain = model(**batch)
    passes = (texts, images, pairs)
    # One router in block 1 and one in block 3 for texts and for images; of pairs two in block 1, one in block 3.
    assert [len(part.router_logits) for part in passes] == [2, 2, 3]
    expected = [logits for part in passes for logits in part.router_logits]
    assert all(map(torch.equal, output.router_logits, expected))
    assert len(output.dropped_tokens) == len(output.router_logits) == len(expected)
    torch.testing.assert_close(output.aux_loss, sum(part.aux_loss for part in passes))
    torch.testing.assert_close(output.loss, output.matching_loss + 0.5 * output.aux_loss)
    assert len(trained.router_logits) == 7 and output.aux_loss > 0
    assert plain.aux_loss is None and plain.router_logits is None
    with pytest.raises(TypeError, match="pixel_value"):
        model(input_ids=ids, pixel_value=pixels)
