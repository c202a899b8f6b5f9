"""Which files and classes an export has: the code that travels with it stands in `hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.config.tasks import find_task

SOURCE_FOLDER = Path(__file__).with_name("hf")

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
PIPELINES = {
    "image-classification": (
        "VLMoEImageClassificationPipeline",
        "AutoModelForImageClassification",
    ),
    "image-feature-extraction": ("VLMoEImageFeatureExtractionPipeline", "AutoModel"),
    "visual-question-answering": (
        "VLMoEVisualQuestionAnsweringPipeline",
        "AutoModelForVisualQuestionAnswering",
    ),
    "zero-shot-image-classification": (
        "VLMoEZeroShotImageClassificationPipeline",
        "AutoModelForZeroShotImageClassification",
    ),
}


def hf_source_files() -> list[Path]:
    """The Python files that an export needs, which are copied into one folder."""
    return sorted(path for path in SOURCE_FOLDER.glob("*.py") if path.name != "__init__.py")


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


def custom_pipelines() -> dict[str, dict[str, Any]]:
    """The entry `custom_pipelines` of `config.json`, for every task: fine-tuning may give an export another one."""
    return {
        task: {"impl": f"pipelines_vlmoe.{pipeline}", "pt": [auto]}
        for task, (pipeline, auto) in PIPELINES.items()
    }


def processor_files(
    image_size: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    text_length: int,
    pair_text_length: int,
    with_text: bool = True,
) -> dict[str, dict[str, Any]]:
    """Contents of the JSON files of tokenizer and processors, by file name.

    The tokenizer's `sentencepiece.model` goes beside them. The image processor has a file of its own, which both
    transformers 4 and 5 read.

    Args:
        image_size: side of the square in pixels.
        image_mean: mean of every channel, of pixels between 0 and 1.
        image_std: standard deviation.
        text_length: tokens of a text without image.
        pair_text_length: tokens of the text of a pair.
        with_text: False for a model of images alone.
    """
    processor = {"AutoProcessor": "processing_vlmoe.VLMoEProcessor"}
    own_map = {"AutoImageProcessor": "image_processing_vlmoe.VLMoEImageProcessor"}
    image_processor: dict[str, Any] = {
        "image_processor_type": "VLMoEImageProcessor",
        "auto_map": own_map,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        "exif": "turn",
        "alpha": "white",
    }
    if not with_text:
        return {"preprocessor_config.json": image_processor}
    image_processor["processor_class"] = "VLMoEProcessor"
    image_processor["auto_map"] = own_map | processor
    return {
        "preprocessor_config.json": image_processor,
        "processor_config.json": {
            "processor_class": "VLMoEProcessor",
            "auto_map": processor,
            "text_length": text_length,
            "pair_text_length": pair_text_length,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "VLMoETokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_vlmoe.VLMoETokenizer", None]},
            "model_max_length": max(text_length, pair_text_length),
            "padding_side": "right",
        },
    }
