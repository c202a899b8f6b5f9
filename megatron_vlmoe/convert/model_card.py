"""The model card (README.md) of an export, filled in from the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlmoe import __version__
from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.hf_config import architecture
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.data.order import parse_blend
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.stream.block_plan import block_plan
from megatron_vlmoe.train.run_files import run_file

PAPER = "https://arxiv.org/abs/2303.07226"
# Of pretraining, by what it reads: everything, or images alone.
_PRETRAINING_TAGS = {"": "feature-extraction", "images": "image-feature-extraction"}
# By the class of the model: Auto class, that of the inputs, code. Names of a task's images and texts are put in.
_USES = {
    "VLMoEForPreTraining": (
        *("AutoModelForPreTraining", "AutoProcessor"),
        'outputs = model(**processor(text="a [MASK] circle", images=image, return_tensors="pt"))',
    ),
    "VLMoEModel": (
        *("AutoModel", "AutoImageProcessor"),
        'hidden = model(**processor(image, return_tensors="pt")).image_hidden_state',
    ),
    "VLMoEForVisualQuestionAnswering": (
        *("AutoModelForVisualQuestionAnswering", "AutoProcessor"),
        'logits = model(**processor(text={texts}, images={images}, return_tensors="pt")).logits\n'
        "answer = model.config.id2label[int(logits[0].argmax())]",
    ),
    "VLMoEForImagesAndTextClassification": (
        *("AutoModelForSequenceClassification", "AutoProcessor"),
        'logits = model(**processor(text={texts}, images=[[{images}]], return_tensors="pt")).logits',
    ),
    "VLMoEForImageAndTextRetrieval": (
        *("AutoModelForZeroShotImageClassification", "AutoProcessor"),
        'texts = model.get_text_features(**processor(text=captions, return_tensors="pt")).pooler_output\n'
        'images = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output\n'
        "similarity = texts @ images.T",
    ),
    "VLMoEForImageClassification": (
        *("AutoModelForImageClassification", "AutoImageProcessor"),
        'logits = model(**processor({images}, return_tensors="pt")).logits',
    ),
    "VLMoEForSequenceClassification": (
        *("AutoModelForSequenceClassification", "AutoTokenizer"),
        'logits = model(**tokenizer({texts}, truncation=True, return_tensors="pt")).logits',
    ),
}

_IMAGES = """

Images are turned upright by their EXIF (`exif="keep"` leaves them), put on white where they are transparent
(`alpha="black"` or `"drop"`), and resized as a whole. `pipeline(TASK, model=..., trust_remote_code=True)` reads files
in the same way."""


@dataclass(frozen=True)
class CardOptions:
    """What a run does not know of itself.

    Args:
        name: of the model; empty takes that of the output folder.
        license: an identifier of the Hub, as `apache-2.0`; empty leaves it out.
        language: of the texts, as `en`.
        intended_use: a sentence or two; empty says that nobody wrote it.
        limitations: likewise.
    """

    name: str = ""
    license: str = ""
    language: str = "en"
    intended_use: str = ""
    limitations: str = ""


def model_card(reader: CheckpointReader, config_json: Mapping[str, Any], card: CardOptions) -> str:
    """The card, in Markdown with the Hub's metadata in front.

    Args:
        reader: the checkpoint; its run folder has the metrics.
        config_json: the export's `config.json`.
        card: what only the author knows.
    """
    config = reader.config
    task = config.task.name if isinstance(config, FinetuneConfig) else ""
    metrics = run_metrics(reader)
    reads_images = not task or bool(find_task(task).images)
    kind = task or ("" if config.model.vocab_size else "images")
    front = yaml.safe_dump(_metadata(kind, config, card, metrics), sort_keys=False)
    sections = (
        _introduction(config, kind, card),
        f"## Use\n\n```python\n{usage(kind, card.name)}\n```" + (_IMAGES if reads_images else ""),
        _architecture(config, config_json),
        "\n".join(["## Training data", "", *training_data(config)]),
        _training(reader),
        _results(metrics),
        _words("Intended use", card.intended_use),
        _words("Limitations and bias", card.limitations),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(
    kind: str, config: RunConfig, card: CardOptions, metrics: Mapping[str, float]
) -> dict[str, Any]:
    tag = _PRETRAINING_TAGS.get(kind) or find_task(kind).head.hf_tag
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": tag,
        "tags": ["vlmoe", "vision-language", "mixture-of-experts", "arxiv:2303.07226"],
        "language": card.language,
    }
    if card.license:
        content["license"] = card.license
    if metrics and isinstance(config, FinetuneConfig):
        data = {"name": Path(config.task.data).name, "type": kind}
        results = [
            {"type": name, "name": name, "value": round(value, 4)}
            for name, value in metrics.items()
        ]
        task = {"name": kind, "type": tag}
        entry = {
            "name": card.name,
            "results": [{"task": task, "dataset": data, "metrics": results}],
        }
        content["model-index"] = [entry]
    return content


def _introduction(config: RunConfig, kind: str, card: CardOptions) -> str:
    pretrained = {"": "masked texts, images and pairs", "images": "masked images"}
    trained = f"pretrained on {pretrained[kind]}" if kind in pretrained else f"fine-tuned on {kind}"
    counts = parameter_counts(config)
    return (
        f"# {card.name}\n\nA VL-MoE vision-language model ([paper]({PAPER})) {trained}: "
        f"{counts.without_heads / 1e6:.1f} M parameters without heads, of which a pair of tokens uses "
        f"{counts.per_token / 1e6:.1f} M. Trained with megatron_vlmoe {__version__}."
    )


def usage(kind: str, name: str) -> str:
    """Python code that loads an export and computes something.

    Args:
        kind: its task, or "" for pretraining, or "images" for pretraining on images alone.
        name: of the model, or its folder.
    """
    model, inputs, code = _USES["VLMoEModel" if kind == "images" else architecture(kind)]
    reader = "tokenizer" if inputs == "AutoTokenizer" else "processor"
    if kind not in _PRETRAINING_TAGS:
        spec = find_task(kind)
        code = code.replace("{images}", ", ".join(spec.images))
        code = code.replace("{texts}", ", ".join(spec.texts))
    load = f'from_pretrained("{name}", trust_remote_code=True)'
    return (
        f"from transformers import {', '.join(sorted((model, inputs)))}\n\n"
        f"model = {model}.{load}.eval()\n{reader} = {inputs}.{load}\n{code}"
    )


def _architecture(config: RunConfig, config_json: Mapping[str, Any]) -> str:
    model, moe = config.model, config.moe
    lines = [
        f"- {model.num_layers} blocks, width {model.hidden_size}, {model.num_attention_heads} heads, "
        f"inner width {model.ffn_hidden_size}; the last {model.num_vl_layers} blocks have a feed-forward "
        "branch for pairs",
        f"- images of {model.image_size} pixels in patches of {model.patch_size}; texts of "
        f"{model.text_length} tokens, captions of {model.pair_text_length}; vocabulary {model.vocab_size}",
    ]
    if numbers := config_json["moe_layers"]:
        found = [pool for number in numbers for pool in block_plan(model, moe, number).pools]
        sizes = {pool.name: pool.num_experts for pool in found}
        pools = ", ".join(f"{size} {name}" for name, size in sizes.items())
        lines += [
            f"- experts in blocks {', '.join(map(str, numbers))}: {pools}; {moe.topk} per token",
            "- inference drops no token (`capacity_factor` 0); trained with capacity factor "
            f"{moe.capacity_factor}, evaluated by the trainer with {moe.eval_capacity_factor}. "
            "`capacity_factor` 1.0 with the same batches gives the paper's evaluation",
        ]
    return "\n".join(["## Architecture", "", *lines])


def training_data(config: RunConfig) -> list[str]:
    """A line for each dataset: its name, and what its manifest says where it is still there."""
    if isinstance(config, FinetuneConfig):
        parts: list[tuple[str, Sequence[str]]] = [
            (config.task.name, (f"{config.task.data}_{config.task.train_split}",))
        ]
    else:
        data = config.data
        parts = [("texts", data.text), ("images", data.images), ("pairs", data.pairs)]
    lines = [line for kind, values in parts for line in _datasets(kind, values)]
    return lines or ["Not recorded."]


def _datasets(kind: str, values: Sequence[str]) -> Iterator[str]:
    if not values:
        return
    try:
        blend = parse_blend(values, kind)
        weighted = list(zip(blend.prefixes, blend.weights or (None,) * len(blend.prefixes)))
    except ConfigError:
        weighted = [(value, None) for value in values]
    for prefix, weight in weighted:
        line = f"- {kind}: `{Path(prefix).name}`"
        if weight is not None:
            line += f", weight {float(weight):g}"
        try:
            manifest = load_manifest(prefix)
        except DataError:
            yield line
            continue
        yield (
            line
            + f", {manifest.documents:,} documents"
            + (f", {manifest.tokens:,} tokens" if manifest.tokens else "")
        )


def _training(reader: CheckpointReader) -> str:
    config, state = reader.config, reader.train_state
    optim, train, parallel = config.optim, config.train, config.parallel
    if isinstance(config, FinetuneConfig):
        batch = f"{config.task.global_batch_size} samples"
    else:
        data = config.data
        batch = f"{data.global_texts} texts, {data.global_images} images, {data.global_pairs} pairs"
    return "\n".join(
        [
            "## Training",
            "",
            f"- {state.step} of {train.steps} steps of {batch}; seed {train.seed}, "
            f"precision {train.precision}",
            f"- {optim.optimizer}, learning rate {optim.lr:g} ({optim.lr_decay_style}), weight decay "
            f"{optim.weight_decay:g}, gradient norm at most {optim.clip_grad:g}",
            f"- layout: TP {parallel.tensor_model_parallel_size}, "
            f"PP {parallel.pipeline_model_parallel_size}, EP {parallel.expert_model_parallel_size}",
        ]
    )


def run_metrics(reader: CheckpointReader) -> dict[str, float]:
    """Results of the run that wrote a checkpoint: of `metrics.json` (a task), or the last held-out losses before it."""
    if isinstance(reader.config, FinetuneConfig):
        path = run_file(reader.path, "metrics.json")
        if path is None:
            return {}
        content = _json(path.read_text())
        return {
            name: float(value)
            for name, value in content.get("metrics", {}).items()
            if isinstance(value, (int, float)) and not name.endswith(("samples", "unlabelled"))
        }
    path = run_file(reader.path, "metrics.jsonl")
    found: dict[str, float] = {}
    for line in path.read_text().splitlines() if path is not None else ():
        row = _json(line)
        if row.get("step", 0) <= reader.train_state.step:
            new = {k: v for k, v in row.items() if k.startswith(("eval/loss/", "acc/"))}
            found = new or found
    return found


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _results(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "## Results\n\nNot recorded."
    rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
    return "\n".join(["## Results", "", "| metric | value |", "|---|---|", *rows])


def _words(title: str, text: str) -> str:
    return f"## {title}\n\n{text or 'The author of this model has not written this section.'}"
