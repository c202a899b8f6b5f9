"""Graphs of the Hugging Face model: `torch.export` and `torch.compile` of every class, for any batch size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_hf_model import EVERYWHERE, HEADS, build, inputs, task_inputs
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("transformers")

# Experts for texts, images and pairs, two for every token, in one block.
SMALL = {**EVERYWHERE, "num_hidden_layers": 1, "moe_layers": [1]}
# What else a graph may have in it, one thing for a class each.
OPTIONS: dict[str, dict[str, Any]] = {
    "VLMoEModel": {"num_vl_layers": 0},
    "VLMoEForImageClassification": {"experts_implementation": "batched_mm"},
    "VLMoEForMaskedImageModeling": {"moe_layers": []},
    "VLMoEForMaskedLM": {"shared_router": True, "num_vl_layers": 0},
    "VLMoEForSequenceClassification": {
        "capacity_factor": 0.7,
        "normalize_gate": True,
        "output_router_logits": True,
    },
    "VLMoEForVisualQuestionAnswering": {"capacity_factor": 0.7, "batch_priority": False},
}
LABELS = ("labels", "image_labels", "return_loss")


def batch_of(name: str, samples: int, with_labels: bool) -> dict[str, Any]:
    """Inputs of a class, of as many samples."""
    given = inputs() if name == "VLMoEModel" else task_inputs(name)
    rows = torch.arange(samples) % 3
    return {
        key: value[rows] if isinstance(value, torch.Tensor) else value
        for key, value in given.items()
        if with_labels or key not in LABELS
    }


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", ("VLMoEModel", *HEADS))
def test_an_exported_program_takes_batches_of_any_size(name):
    model = build(name, **{**SMALL, **OPTIONS.get(name, {})})
    batch = batch_of(name, 3, with_labels=False)
    size = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (), batch, dynamic_shapes={key: {0: size} for key in batch}
    )
    with torch.no_grad():
        for samples in (1, 5):
            batch = batch_of(name, samples, with_labels=False)
            assert_equal(program.module()(**batch), model(**batch))


@pytest.mark.parametrize(
    "name",
    ["VLMoEModel", "VLMoEForSequenceClassification", "VLMoEForImagesAndTextClassification"],
)
def test_a_second_compiled_graph_is_for_all_further_batch_sizes(name):
    model = build(name, **{**SMALL, **OPTIONS.get(name, {})})
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for samples in (3, 2, 5):
            batch = batch_of(name, samples, with_labels=False)
            assert_equal(compiled(**batch), model(**batch))
    # The first is for its size alone: that sizes differ shows with the second batch.
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["VLMoEForPreTraining", "VLMoEForImageAndTextRetrieval"])
def test_training_compiles_with_losses_and_noise(name):
    model = build(name, **SMALL, router_noise_std=-1.0).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    batch = batch_of(name, 3, with_labels=True)
    found = []
    for function in (compiled, model):
        torch.manual_seed(4)
        loss = function(**batch, output_router_logits=True).loss
        model.zero_grad()
        loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found.append({"loss": loss, **gradients})
    assert_equal(*found)
