"""Which tensors a checkpoint of a configuration has: keys and whole shapes, without building the model."""

from __future__ import annotations

from collections.abc import Callable

from megatron_vlmoe.config.schema import ModelConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import load_code
from megatron_vlmoe.stream.block_plan import Branch, block_plans
from megatron_vlmoe.stream.sizes import padded_vocab_size

Shape = tuple[int, ...]


def checkpoint_shapes(config: RunConfig) -> dict[str, Shape]:
    """Key and whole shape of every parameter in the order of the model; rows of vocabularies are padded."""
    shapes = _embeddings(config.model)
    for plan in block_plans(config.model, config.moe):
        block = f"decoder.layers.{plan.layer_number - 1}."
        shapes |= {block + key: shape for key, shape in _attention(config.model).items()}
        for branch in plan.branches:
            found = _branch(config.model, branch)
            shapes |= {f"{block}mlp.{key}": shape for key, shape in found.items()}
    shapes |= _norm("decoder.final_layernorm", config.model.hidden_size)
    return shapes | {f"heads.{key}": shape for key, shape in _heads(config).items()}


def extra_state_keys(config: RunConfig) -> list[str]:
    """Keys of the empty extra states that megatron-core stores for its parallel linear layers."""
    layers = (
        "linear_qkv",
        "linear_proj",
        "linear_fc1",
        "linear_fc2",
        "text.linear",
        "image.linear",
    )
    weights = (key.removesuffix(".weight") for key in checkpoint_shapes(config))
    return [f"{key}._extra_state/shard_0_1" for key in weights if key.endswith(layers)]


def _embeddings(model: ModelConfig) -> dict[str, Shape]:
    width = model.hidden_size
    text: dict[str, Shape] = {}
    if model.vocab_size:
        text["word.weight"] = (padded_vocab_size(model.vocab_size), width)
        text["position"] = (max(model.text_length, model.pair_text_length), width)
    image: dict[str, Shape] = {
        "weight": (width, 3 * model.patch_size**2),
        "bias": (width,),
        "cls_token": (1, width),
        "mask_token": (1, width),
        "position": (model.image_length, width),
    }
    if model.token_type_embeddings:
        image["token_type"] = (1, width)
        if text:
            text["token_type"] = (1, width)
    shapes = {f"embedding.text.{key}": shape for key, shape in text.items()}
    return shapes | {f"embedding.image.{key}": shape for key, shape in image.items()}


def _attention(model: ModelConfig) -> dict[str, Shape]:
    width = model.hidden_size
    scales = ("gamma_1", "gamma_2") if model.layer_scale_init > 0.0 else ()
    return {
        **{name: (width,) for name in scales},
        **_norm("input_layernorm", width),
        **_linear("self_attention.linear_qkv", width, 3 * width),
        **_linear("self_attention.linear_proj", width, width),
    }


def _branch(model: ModelConfig, branch: Branch) -> dict[str, Shape]:
    width, inner, name, experts = (
        model.hidden_size,
        model.ffn_hidden_size,
        branch.name,
        branch.num_experts,
    )
    norm = _norm(f"{name}_norm", width)
    if not experts:
        fc1 = _linear(f"{name}_ffn.linear_fc1", width, inner)
        return norm | fc1 | _linear(f"{name}_ffn.linear_fc2", inner, width)
    pool = f"moe.experts.{name}"
    return norm | {
        f"moe.router.{name}.weight": (experts, width),
        f"{pool}.weight1": (experts, inner, width),
        f"{pool}.bias1": (experts, inner),
        f"{pool}.weight2": (experts, width, inner),
        f"{pool}.bias2": (experts, width),
    }


def _heads(config: RunConfig) -> dict[str, Shape]:
    model = config.model
    width = model.hidden_size
    if not isinstance(config, FinetuneConfig):
        sizes = {"text": model.vocab_size, "image": model.visual_vocab_size}
        heads: dict[str, Shape] = {}
        for name, size in sizes.items():
            if size:
                heads |= _linear(f"{name}.linear", width, padded_vocab_size(size))
        return heads
    shapes: Callable[[int, int], dict[str, Shape]] = load_code(config.task.spec.head.shapes)
    return shapes(width, config.task.num_classes)


def pair_classifier(width: int, classes: int) -> dict[str, Shape]:
    """Tensors of `PairClassifier`."""
    return _two_layer_classifier(width, width, classes)


def two_image_classifier(width: int, classes: int) -> dict[str, Shape]:
    """Tensors of `TwoImageClassifier`."""
    return _two_layer_classifier(width, 2 * width, classes)


def image_classifier(width: int, classes: int) -> dict[str, Shape]:
    """Tensors of `ImageClassifier`."""
    return _linear("classifier", width, classes)


def text_classifier(width: int, classes: int) -> dict[str, Shape]:
    """Tensors of `TextClassifier`."""
    return _linear("pooler.dense", width, width) | _linear("classifier", width, classes)


def retrieval_heads(width: int, classes: int) -> dict[str, Shape]:
    """Tensors of `RetrievalHeads`, which has no classes."""
    return {
        "text_projection.weight": (width, width),
        "image_projection.weight": (width, width),
        "logit_scale": (1,),
        **_linear("pooler.dense", width, width),
        **_linear("matching", width, 2),
    }


def _two_layer_classifier(width: int, inputs: int, classes: int) -> dict[str, Shape]:
    return {
        **_linear("pooler.dense", width, width),
        **_linear("classifier.dense", inputs, 2 * width),
        **_norm("classifier.norm", 2 * width),
        **_linear("classifier.output", 2 * width, classes),
    }


def _linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, Shape]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}
