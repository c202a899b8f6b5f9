"""What an export holds besides weights: its `config.json`, which an import reads, and other JSON and Python files.

What the architecture, inference and training of routers need stands in `config.json` under the names of the Hugging
Face files. What only our own training needs (objectives, the task's options) travels in one entry, `training`, so that
an import goes on as the run was. Paths of datasets and of the machine do not travel.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from megatron_vlmoe.config.command_line import from_dict
from megatron_vlmoe.config.errors import ConfigError, ConvertError, conversion_errors
from megatron_vlmoe.config.schema import AuxLossConfig, RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import find_task, task_names
from megatron_vlmoe.data.task_labels import Labels, read_labels
from megatron_vlmoe.planning.validate import check_architecture
from megatron_vlmoe.runtime.json_files import read_json
from megatron_vlmoe.stream.block_plan import moe_layer_numbers
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import HUGGING_FACE_FILE, LABELS_FILE

CONFIG_FILE = HUGGING_FACE_FILE
SPM_FILE = "sentencepiece.model"
MODEL_TYPE = "vlmoe"
# Option here, name there.
MODEL_FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "num_vl_layers": "num_vl_layers",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "text_length": "text_length",
    "pair_text_length": "pair_text_length",
    "vocab_size": "vocab_size",
    "visual_vocab_size": "visual_vocab_size",
    "layernorm_epsilon": "layer_norm_eps",
    "layer_scale_init": "layer_scale_init_value",
    "drop_path": "drop_path_rate",
    "init_std": "initializer_range",
    "token_type_embeddings": "use_token_type_embeddings",
}
MOE_FIELDS = {
    "num_vision_experts": "num_vision_experts",
    "num_text_experts": "num_text_experts",
    "num_vl_experts": "num_vl_experts",
    "layers": "moe_layers",
    "modalities": "moe_modalities",
    "vl": "moe_vl",
    "shared_router": "shared_router",
    "topk": "num_experts_per_tok",
    "normalize_gate": "normalize_gate",
    "batch_priority": "batch_priority",
    "route_padding": "route_padding",
    "capacity_multiple_of": "capacity_multiple_of",
    "aux_loss_coefficient": "router_aux_loss_coef",
    "text_aux": "text_router_losses",
    "vision_aux": "vision_router_losses",
    "noise_std": "router_noise_std",
    "routing": "moe_routing",
    "balance_bias_rate": "router_balance_bias_rate",
}
# Exports of earlier versions lack them, and have the defaults.
ADDED_MOE_FIELDS = ("routing", "balance_bias_rate")
_NO_LOSSES = {field.name: 0.0 for field in dataclasses.fields(AuxLossConfig)}
SPECIAL_TOKENS = ("bos", "pad", "eos", "mask")


def export_config(
    config: RunConfig,
    tokenizer: Optional[TextTokenizer] = None,
    labels: Optional[Labels] = None,
) -> dict[str, Any]:
    """The content of `config.json`: the tokenizer gives the ids of special tokens, the labels the classes of a task.

    Raises:
        ConvertError: no class of transformers has the head of the task.
    """
    task = config.task.name if isinstance(config, FinetuneConfig) else ""
    model = {theirs: getattr(config.model, ours) for ours, theirs in MODEL_FIELDS.items()}
    options = dataclasses.asdict(config.moe)
    for pool in ("text_aux", "vision_aux"):
        options[pool] = {loss: weight for loss, weight in options[pool].items() if weight}
    moe = {theirs: options[ours] for ours, theirs in MOE_FIELDS.items()}
    # The numbers themselves: the default rule need not be known to read a config.json.
    moe["moe_layers"] = list(moe_layer_numbers(config.model, config.moe))
    content: dict[str, Any] = {
        "model_type": MODEL_TYPE,
        "architectures": [architecture(task)],
        "auto_map": auto_map(task),
        **model,
        "num_channels": 3,
        "hidden_act": "gelu",
        **moe,
        # Inference drops nothing; 1.0 with the same batches is the paper's evaluation. Experts that choose tokens need
        # to know how many.
        "capacity_factor": (
            config.moe.eval_capacity_factor if config.moe.routing == "expert_choice" else 0.0
        ),
        "tie_word_embeddings": False,
        "training": _training_options(config),
    }
    if tokenizer is not None:
        content |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL_TOKENS}
    if isinstance(config, FinetuneConfig):
        content["task"] = task
        if labels is not None:
            shown = labels.names or labels.labels
            # Words for classes, with the class's id where two share a word (ImageNet has two cranes).
            names = {
                str(index): word if shown.count(word) == 1 else f"{word} ({key})"
                for index, (word, key) in enumerate(zip(shown, labels.labels))
            }
            content["id2label"] = names
            content["label2id"] = {name: int(index) for index, name in names.items()}
        kinds = {"answers": "multi_label_classification", "class": "single_label_classification"}
        if config.task.spec.has_labels:
            content["problem_type"] = kinds[config.task.spec.target]
    content["custom_pipelines"] = CUSTOM_PIPELINES
    return content


def _training_options(config: RunConfig) -> dict[str, Any]:
    """Options that an import needs besides the architecture, as sections of the configuration."""
    content = dataclasses.asdict(config)
    moe = {name: value for name, value in content["moe"].items() if name not in MOE_FIELDS}
    # An empty list is the default rule, and compares as such with presets.
    moe["layers"] = content["moe"]["layers"]
    sections = {
        # New positions of longer texts start as the others did.
        "model": {n: content["model"][n] for n in ("init_sincos_std", "init_qk_correlation")},
        "moe": moe,
        "objectives": content["objectives"],
        "data": {name: content["data"][name] for name in ("pixel_mean", "pixel_std")},
    }
    if isinstance(config, FinetuneConfig):
        task = content["task"]
        names = ("name", "num_classes", "labels_sha256", "label_smoothing", "mixup", "cutmix")
        sections["task"] = {name: task[name] for name in (*names, "rand_augment", "random_erase")}
        sections["contrastive"] = content["contrastive"]
    plain: dict[str, Any] = json.loads(json.dumps(sections))
    return plain


def read_config(folder: Path) -> dict[str, Any]:
    """Reads `config.json`.

    Raises:
        ConvertError: it is missing, damaged, or of another architecture.
    """
    file = folder / CONFIG_FILE
    with conversion_errors():
        content: Any = read_json(file)
    found = content.get("model_type") if isinstance(content, dict) else None
    if found != MODEL_TYPE:
        raise ConvertError(f"{file}: model_type is {found!r}, not {MODEL_TYPE!r}")
    return content


def import_config(folder: Path, content: Mapping[str, Any]) -> RunConfig:
    """The configuration of the run that an import makes: a `FinetuneConfig` where the folder is of a task.

    Raises:
        ConvertError: naming the field that is missing, unknown or wrong.
    """
    file = folder / CONFIG_FILE
    task = content.get("task") or ""
    if task and task not in task_names():
        raise ConvertError(f"{file}: task is {task!r}; one of {', '.join(task_names())}")
    root: RunConfig = FinetuneConfig() if task else RunConfig()
    sections: dict[str, Any] = {}
    training = content.get("training") or {}
    if not isinstance(training, Mapping):
        raise ConvertError(f"{file}: training is no object")
    for section, values in training.items():
        if not isinstance(values, Mapping):
            raise ConvertError(f"{file}: training.{section} is no object")
        sections[section] = dict(values)
    listed = (sections.get("moe") or {}).get("layers")
    for section, fields in (("model", MODEL_FIELDS), ("moe", MOE_FIELDS)):
        sections.setdefault(section, {})
        for ours, theirs in fields.items():
            # Exports of earlier versions have the routers' losses and noise among the options of training.
            if theirs in content:
                sections[section][ours] = content[theirs]
                if ours.endswith("_aux") and isinstance(content[theirs], Mapping):
                    # A loss that is not named has no weight there, where ours have defaults.
                    sections[section][ours] = {**_NO_LOSSES, **content[theirs]}
            elif ours not in sections[section] and ours not in ADDED_MOE_FIELDS:
                raise ConvertError(f"{file}: has no {theirs}")
    if task:
        sections.setdefault("task", {})["name"] = task
        if find_task(task).has_labels and isinstance(classes := content.get("id2label"), Mapping):
            sections["task"]["num_classes"] = len(classes)
    try:
        config = from_dict(sections, root, str(file))
    except ConfigError as error:
        raise ConvertError(str(error)) from None
    try:
        check_architecture(config)
        return _with_listed_layers(config, listed)
    except (ConfigError, TypeError) as error:
        raise ConvertError(f"{file}: {error}") from None


def _with_listed_layers(config: RunConfig, listed: Any) -> RunConfig:
    """With the sparse blocks as the run listed them, where they are the same: none are those of the default rule.

    Raises:
        ConfigError, TypeError: they are no blocks of the model.
    """
    rule = replace(config.moe, layers=tuple(listed or ()))
    same = tuple(moe_layer_numbers(config.model, rule)) == tuple(config.moe.layers)
    return replace(config, moe=rule) if listed is not None and same else config


AUTO_MODELS = {
    "AutoModel": "VLMoEModel",
    "AutoModelForPreTraining": "VLMoEForPreTraining",
    "AutoModelForMaskedLM": "VLMoEForMaskedLM",
    "AutoModelForMaskedImageModeling": "VLMoEForMaskedImageModeling",
    "AutoModelForVisualQuestionAnswering": "VLMoEForVisualQuestionAnswering",
    "AutoModelForImageClassification": "VLMoEForImageClassification",
    "AutoModelForSequenceClassification": "VLMoEForSequenceClassification",
    "AutoModelForZeroShotImageClassification": "VLMoEForImageAndTextRetrieval",
}

# Task of `transformers.pipeline` to the class that reads images as the processor does, and the Auto class it loads.
# They stand in every export: fine-tuning in transformers may give it another task.
CUSTOM_PIPELINES = {
    task: {"impl": f"pipelines_vlmoe.VLMoE{task.title().replace('-', '')}Pipeline", "pt": [auto]}
    for task, auto in (
        ("image-classification", "AutoModelForImageClassification"),
        ("image-feature-extraction", "AutoModel"),
        ("visual-question-answering", "AutoModelForVisualQuestionAnswering"),
        ("zero-shot-image-classification", "AutoModelForZeroShotImageClassification"),
    )
}


def open_export(folder: Path) -> tuple[RunConfig, Optional[Path], Optional[Labels]]:
    """What a Hugging Face folder holds besides weights.

    Returns:
        The configuration of the run that an import makes, the file of the text tokenizer (None for a model without
        text), and the classes of a task.

    Raises:
        ConvertError: another architecture, or a file that is missing, damaged or does not go with the others.
    """
    content = read_config(folder)
    config = import_config(folder, content)
    labels = _labels(folder, content, config)
    if isinstance(config, FinetuneConfig) and labels is not None:
        config = replace(config, task=replace(config.task, labels_sha256=labels.sha256))
    vocab_size = config.model.vocab_size
    if not vocab_size:
        return config, None, labels
    tokenizer = folder / SPM_FILE
    with conversion_errors():
        size = TextTokenizer(tokenizer).size
    if size != vocab_size:
        raise ConvertError(
            f"{tokenizer}: has {size} pieces, but {CONFIG_FILE} says vocab_size {vocab_size}"
        )
    data = replace(config.data, text_tokenizer=str(tokenizer))
    return replace(config, data=data), tokenizer, labels


def _labels(folder: Path, content: Mapping[str, Any], config: RunConfig) -> Optional[Labels]:
    """Of `labels.json`, or where a library wrote the folder, of `id2label`."""
    if not isinstance(config, FinetuneConfig) or not config.task.spec.has_labels:
        return None
    given = content.get("id2label")
    if not isinstance(given, Mapping) or set(given) != {str(i) for i in range(len(given))}:
        raise ConvertError(f"{folder / CONFIG_FILE}: id2label does not number the classes from 0")
    names = tuple(str(given[str(index)]) for index in range(len(given)))
    path = folder / LABELS_FILE
    if path.is_file():
        with conversion_errors():
            labels = read_labels(path)
        if len(labels.labels) == len(names):
            return labels
    if len(set(names)) != len(names):
        raise ConvertError(f"{folder / CONFIG_FILE}: id2label names a class twice")
    return Labels(config.task.name, names)


def hf_source_files() -> list[Path]:
    """The Python files that an export needs, which are copied into one folder."""
    folder = Path(__file__).with_name("hf")
    return sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")


def architecture(task: str = "") -> str:
    """Class of the model of a task; of pretraining without one.

    Raises:
        ConvertError: its head has no class here.
        ConfigError: there is no such task.
    """
    if not task:
        return "VLMoEForPreTraining"
    found = find_task(task).head.hf_class
    if not found:
        raise ConvertError(f"task {task}: its head names no class of transformers (Head.hf_class)")
    return found


def auto_map(task: str = "") -> dict[str, str]:
    """The entry `auto_map` of `config.json`: Auto classes to ``module.Class``.

    In an export of a task the Auto class that its head names gives its model.
    """
    models = dict(AUTO_MODELS)
    if task and (auto := find_task(task).head.hf_auto_class):
        models[auto] = architecture(task)
    return {
        "AutoConfig": "configuration_vlmoe.VLMoEConfig",
        **{auto: f"modeling_vlmoe.{model}" for auto, model in models.items()},
    }


def processor_files(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files of tokenizer and processors of a run's model, by file name.

    The tokenizer's `sentencepiece.model` goes beside them. The image processor has a file of its own, which both
    transformers 4 and 5 read. A model of images alone has no other.
    """
    model = config.model
    processor = {"AutoProcessor": "processing_vlmoe.VLMoEProcessor"}
    own_map = {"AutoImageProcessor": "image_processing_vlmoe.VLMoEImageProcessor"}
    image_processor: dict[str, Any] = {
        "image_processor_type": "VLMoEImageProcessor",
        "auto_map": own_map,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": model.image_size, "width": model.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.data.pixel_mean),
        "image_std": list(config.data.pixel_std),
        "exif": "turn",
        "alpha": "white",
    }
    if not model.vocab_size:
        return {"preprocessor_config.json": image_processor}
    image_processor["processor_class"] = "VLMoEProcessor"
    image_processor["auto_map"] = own_map | processor
    return {
        "preprocessor_config.json": image_processor,
        "processor_config.json": {
            "processor_class": "VLMoEProcessor",
            "auto_map": processor,
            "text_length": model.text_length,
            "pair_text_length": model.pair_text_length,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "VLMoETokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_vlmoe.VLMoETokenizer", None]},
            "model_max_length": max(model.text_length, model.pair_text_length),
            "padding_side": "right",
        },
    }
