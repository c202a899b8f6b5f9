"""From a checkpoint to a Hugging Face folder, tensor by tensor, whole or not at all, with a model card of the run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import yaml

from megatron_vlmoe import __version__
from megatron_vlmoe.config.errors import ConfigError, ConvertError, DataError, conversion_errors
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task
from megatron_vlmoe.convert.checkpoints import CheckpointReader
from megatron_vlmoe.convert.hf_config import (
    CONFIG_FILE,
    SPM_FILE,
    architecture,
    export_config,
    hf_source_files,
    processor_files,
)
from megatron_vlmoe.convert.name_table import FP32_KEYS, name_table
from megatron_vlmoe.convert.tensors import (
    Group,
    check_tensors,
    with_progress,
    write_folder,
)
from megatron_vlmoe.data.manifest import load_manifest
from megatron_vlmoe.data.order import parse_blend
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.planning.parameters import parameter_counts
from megatron_vlmoe.runtime.files import folder_atomic
from megatron_vlmoe.runtime.json_files import parse_json
from megatron_vlmoe.stream.block_plan import block_plan
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import (
    LABELS_FILE,
    TOKENIZER_FILE,
    is_hugging_face,
    open_labels,
    open_text_tokenizer,
    run_file,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def export_checkpoint(
    location: str | Path,
    output: Path,
    dtype: Optional[torch.dtype] = None,
    max_shard_bytes: int = 5_000_000_000,
    text_tokenizer: str = "",
    overwrite: bool = False,
    card: Optional[CardOptions] = None,
) -> Path:
    """Writes a folder that transformers loads with ``trust_remote_code=True`` and that imports back; returns it.

    Args:
        location: run, checkpoint or iteration folder; of pretraining or of a task, of any layout.
        output: the folder to make.
        dtype: of the weights; None keeps that of the checkpoint. Routers are fp32 always.
        max_shard_bytes: size of a safetensors file, unless a single tensor is larger.
        text_tokenizer: SentencePiece model; empty takes that of the run.
        overwrite: replaces a folder that is there.
        card: what only the author knows for the model card.

    Raises:
        ConvertError: a tensor is missing, unknown or of another shape, the tokenizer or the labels do not go with the
            checkpoint, or the folder exists; nothing is left behind.
    """
    if output.exists() and not overwrite:
        raise ConvertError(f"{output}: exists (--overwrite replaces it)")
    if output.exists() and not _may_be_replaced(output):
        raise ConvertError(
            f"{output}: --overwrite replaces exported models alone, and this holds something else"
        )
    reader = CheckpointReader(location)
    config = reader.config
    if config.objectives.kind == "contrastive":
        raise ConvertError(
            f"{reader.path}: is of contrastive pretraining, for whose heads an export has no class; fine-tune it on a "
            "task (`vlmoe finetune --task retrieval --load ...` starts from its heads), and export that"
        )
    table = name_table(config)
    shapes = {entry.ours: entry.shape for entry in table}
    check_tensors(reader.path, reader.tensors, shapes, "its configuration", "an export")
    tokenizer = _tokenizer_of(reader, text_tokenizer) if config.model.vocab_size else None
    labels: Optional[Labels] = None
    labels_file = None
    if isinstance(config, FinetuneConfig) and config.task.num_classes:
        labels_file = run_file(reader.path, LABELS_FILE)
        if labels_file is None:
            raise ConvertError(f"{reader.path}: no {LABELS_FILE} beside it")
        with conversion_errors():
            labels = open_labels(labels_file, config, reader.path)
    groups = []
    for entry in table:
        tensor, theirs = reader.tensors[entry.ours], entry.their_shapes(config.model)
        stored = torch.float32 if FP32_KEYS.search(entry.ours) else dtype or tensor.dtype
        read = partial(entry.parted, tensor, config.model)
        groups.append(Group(tuple(theirs), tuple(theirs.values()), stored, read))
    try:
        with folder_atomic(output) as temporary:
            written = write_folder(temporary, groups, max_shard_bytes)
            for _ in with_progress(written, len(groups), "export"):
                pass
            content = export_config(config, tokenizer, labels)
            files = {CONFIG_FILE: content, **processor_files(config)}
            for name, values in files.items():
                text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
                (temporary / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                shutil.copyfile(tokenizer.model_path, temporary / SPM_FILE)
            if labels_file is not None:
                shutil.copyfile(labels_file, temporary / LABELS_FILE)
            for source in hf_source_files():
                shutil.copyfile(source, temporary / source.name)
            text = model_card(reader, content, card or CardOptions())
            (temporary / "README.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConvertError(f"{output}: {error.strerror or error}") from None
    return output


def _tokenizer_of(reader: CheckpointReader, given: str) -> TextTokenizer:
    """The given text tokenizer, or else that of the run, checked against the checkpoint.

    Raises:
        ConvertError: there is none, or it is another.
    """
    config = reader.config
    path = given or run_file(reader.path, TOKENIZER_FILE) or config.data.text_tokenizer
    if not path or not Path(path).is_file():
        raise ConvertError(
            f"{reader.path}: no {TOKENIZER_FILE} beside it and no {path or 'text tokenizer'}; "
            "name it with --text-tokenizer"
        )
    with conversion_errors():
        return open_text_tokenizer(path, config, reader.path)


def _may_be_replaced(output: Path) -> bool:
    """Whether a folder is empty or an exported model. With folders in it there is more than that: a run, or `.git`."""
    if not output.is_dir():
        return False
    inside = list(output.iterdir())
    return not inside or (is_hugging_face(output) and not any(path.is_dir() for path in inside))


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

_CODE = """

`trust_remote_code=True` runs the Python files of this folder, which hold the model: load it if you trust who published
it, and give a `revision` that you have read."""

_IMAGES = """

Images are turned upright by their EXIF (`exif="keep"` leaves them), put on white where they are transparent
(`alpha="black"` or `"drop"`), and resized as a whole. `pipeline(TASK, model=..., trust_remote_code=True)` reads files
in the same way."""


def model_card(reader: CheckpointReader, config_json: Mapping[str, Any], card: CardOptions) -> str:
    """The card, in Markdown with the Hub's metadata in front; metrics are those in the run folder of the checkpoint."""
    config, state = reader.config, reader.train_state
    model, moe = config.model, config.moe
    optim, train, parallel, data = config.optim, config.train, config.parallel, config.data
    task = config.task.name if isinstance(config, FinetuneConfig) else ""
    metrics = run_metrics(reader)
    kind = task or ("" if model.vocab_size else "images")
    front = yaml.safe_dump(_metadata(kind, config, card, metrics), sort_keys=False)
    pretrained = {"": "masked texts, images and pairs", "images": "masked images"}
    trained = f"pretrained on {pretrained[kind]}" if kind in pretrained else f"fine-tuned on {kind}"
    counts = parameter_counts(config)
    batch = f"{data.global_texts} texts, {data.global_images} images, {data.global_pairs} pairs"
    if isinstance(config, FinetuneConfig):
        batch = f"{config.task.global_batch_size} samples"
    architecture_lines = [
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
        architecture_lines += [
            f"- experts in blocks {', '.join(map(str, numbers))}: {pools}; {moe.topk} per token",
            "- experts choose their tokens among all of a batch (expert choice), so that a result depends on what "
            f"else is in the batch; capacity factor {moe.capacity_factor} in training, "
            f"{moe.eval_capacity_factor} in evaluation and in `config.json`"
            if moe.routing == "expert_choice"
            else "- inference drops no token (`capacity_factor` 0); trained with capacity factor "
            f"{moe.capacity_factor}, evaluated by the trainer with {moe.eval_capacity_factor}. "
            "`capacity_factor` 1.0 with the same batches gives the paper's evaluation",
        ]
    results = ["Not recorded."]
    if metrics:
        rows = [f"| {name} | {value:.4g} |" for name, value in metrics.items()]
        results = ["| metric | value |", "|---|---|", *rows]
    unwritten = "The author of this model has not written this section."
    sections = {
        "": [
            f"# {card.name}\n\nA VL-MoE vision-language model ([paper]({PAPER})) {trained}: "
            f"{counts.without_heads / 1e6:.1f} M parameters without heads, of which a pair of tokens uses "
            f"{counts.per_token / 1e6:.1f} M. Trained with megatron_vlmoe {__version__}."
        ],
        "Use": [
            f"```python\n{usage(kind, card.name)}\n```{_CODE}"
            + (_IMAGES if not task or find_task(task).images else "")
        ],
        "Architecture": architecture_lines,
        "Training data": training_data(config),
        "Training": [
            f"- {state.step} of {train.steps} steps of {batch}; seed {train.seed}, "
            f"precision {train.precision}",
            f"- {optim.optimizer}, learning rate {optim.lr:g} ({optim.lr_decay_style}), weight decay "
            f"{optim.weight_decay:g}, gradient norm at most {optim.clip_grad:g}",
            f"- layout: TP {parallel.tensor_model_parallel_size}, "
            f"PP {parallel.pipeline_model_parallel_size}, EP {parallel.expert_model_parallel_size}",
        ],
        "Results": results,
        "Intended use": [card.intended_use or unwritten],
        "Limitations and bias": [card.limitations or unwritten],
    }
    texts = [
        (f"## {title}\n\n" if title else "") + "\n".join(lines) for title, lines in sections.items()
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(texts) + "\n"


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


def usage(kind: str, name: str) -> str:
    """Python code that loads an export, by name or folder, and computes something.

    Its kind is its task, or "" for pretraining, or "images" for pretraining on images alone.
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


def training_data(config: RunConfig) -> list[str]:
    """A line for each dataset: its name, and what its manifest says where it is still there."""
    if isinstance(config, FinetuneConfig):
        parts: list[tuple[str, Sequence[str]]] = [
            (config.task.name, (f"{config.task.data}_{config.task.train_split}",))
        ]
    else:
        data = config.data
        parts = [("texts", data.text), ("images", data.images), ("pairs", data.pairs)]
    lines = []
    for kind, values in parts:
        prefixes, weights = tuple(values), None
        if values:
            with contextlib.suppress(ConfigError):
                blend = parse_blend(values, kind)
                prefixes, weights = blend.prefixes, blend.weights
        for prefix, weight in zip(prefixes, weights or (None,) * len(prefixes)):
            line = f"- {kind}: `{Path(prefix).name}`"
            if weight is not None:
                line += f", weight {float(weight):g}"
            with contextlib.suppress(DataError):
                manifest = load_manifest(prefix)
                line += f", {manifest.documents:,} documents"
                if manifest.tokens:
                    line += f", {manifest.tokens:,} tokens"
            lines.append(line)
    return lines or ["Not recorded."]


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
    """An object; an empty one where a killed run left the text half-written."""
    with contextlib.suppress(DataError):
        content = parse_json(text)
        if isinstance(content, dict):
            return content
    return {}
