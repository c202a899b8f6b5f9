"""Makes our classes known to transformers, and marks the tests that do not apply to them."""

from __future__ import annotations

import contextlib
import fnmatch
import unittest
from pathlib import Path

import pytest
from not_applicable import NOT_APPLICABLE
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto import modeling_auto

from megatron_vlmoe.convert.hf import modeling_vlmoe
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig
from megatron_vlmoe.convert.hf.image_processing_vlmoe import VLMoEImageProcessor
from megatron_vlmoe.convert.hf.processing_vlmoe import VLMoEProcessor
from megatron_vlmoe.convert.hf.tokenization_vlmoe import VLMoETokenizer
from megatron_vlmoe.convert.hf_config import AUTO_MODELS

# Where the common tests look up what kind of head a class is.
MAPPINGS = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "AutoModelForMaskedImageModeling": modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}


def pytest_configure(config: pytest.Config) -> None:
    """What `trust_remote_code=True` does for an export; and a test counts once, also where it has parts."""
    unittest.TestCase.subTest = lambda *args, **kwargs: contextlib.nullcontext()
    AutoConfig.register("vlmoe", VLMoEConfig)
    AutoModel.register(VLMoEConfig, modeling_vlmoe.VLMoEModel)
    # A common test loads its classifier by the name of the task.
    AutoModelForSequenceClassification.register(
        VLMoEConfig, modeling_vlmoe.VLMoEForSequenceClassification
    )
    AutoTokenizer.register(VLMoEConfig, VLMoETokenizer)
    AutoImageProcessor.register(VLMoEConfig, image_processor_classes={"pil": VLMoEImageProcessor})
    AutoProcessor.register(VLMoEConfig, VLMoEProcessor)
    for auto, mapping in MAPPINGS.items():
        mapping["vlmoe"] = AUTO_MODELS[auto]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Listed tests have to fail: one that passes is reported as a failure, like one that fails and is not listed."""
    unused = {pattern for patterns in NOT_APPLICABLE.values() for pattern in patterns}
    for item in items:
        name = item.nodeid.partition("::")[2]
        for reason, patterns in NOT_APPLICABLE.items():
            found = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, pattern)}
            if found:
                unused -= found
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
    chosen = config.option.keyword or config.option.markexpr
    if unused and not chosen and [Path(name) for name in config.args] == [Path(__file__).parent]:
        raise pytest.UsageError(f"not_applicable.py lists no test of the suite: {sorted(unused)}")
