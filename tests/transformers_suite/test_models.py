"""The common tests of models and of the configuration, on every class, dense and with experts."""

from __future__ import annotations

import copy
import unittest
from typing import Any

import torch
from hf_folder import TINY
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers.testing_utils import torch_device

from megatron_vlmoe.convert.hf import modeling_vlmoe
from megatron_vlmoe.convert.hf.configuration_vlmoe import VLMoEConfig

SIZES = {**TINY, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
# Among the first four pieces: a test cuts the vocabulary to them.
SPECIAL_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}
DENSE = {"moe_layers": []}
EXPERTS = {"moe_layers": [1, 2], "moe_vl": True, "num_vl_experts": 3, "num_experts_per_tok": 2}
CLASSES = ["VLMoEModel", *(name for name in modeling_vlmoe.__all__ if name.startswith("VLMoEFor"))]
TEXT_ONLY = ["VLMoEForSequenceClassification"]
IMAGE_ONLY = ["VLMoEForImageClassification"]


class ModelTester:
    """Small configurations and inputs of one class, as the common tests ask for them.

    Args:
        name: the class.
        options: of the configuration.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        self.name = name
        self.options = options
        self.is_training = True
        self.batch_size = 3
        self.num_labels = 3
        self.text_length = 0 if name in IMAGE_ONLY else 7
        self.image_size, self.patch_size = TINY["image_size"], TINY["patch_size"]
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.num_masks, self.mask_length = 3, self.num_patches
        self.image_length = 0 if name in TEXT_ONLY else 1 + self.num_patches
        self.seq_length = self.text_length + self.image_length
        self.hidden_size = SIZES["hidden_size"]
        self.num_hidden_layers = SIZES["num_hidden_layers"]
        self.num_attention_heads = SIZES["num_attention_heads"]

    def get_config(self) -> VLMoEConfig:
        """A configuration."""
        return VLMoEConfig(
            **{**SIZES, **SPECIAL_IDS, **self.options, "num_labels": self.num_labels}
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[VLMoEConfig, dict[str, Any]]:
        """A configuration and inputs without labels."""
        config = self.get_config()
        inputs: dict[str, Any] = {}
        if self.text_length:
            shape = [self.batch_size, self.text_length]
            special = len(SPECIAL_IDS)
            inputs["input_ids"] = ids_tensor(shape, config.vocab_size - special) + special
            inputs["attention_mask"] = random_attention_mask(shape)
        if self.image_length:
            images = [2] if self.name == "VLMoEForImagesAndTextClassification" else []
            shape = [self.batch_size, *images, 3, self.image_size, self.image_size]
            inputs["pixel_values"] = torch.rand(shape, device=torch_device)
        return config, inputs


class VLMoETest(ModelTesterMixin):
    """What is the same for all classes."""

    name: str
    options: dict[str, Any]
    # A batch does not reach all of them; tests/unit/test_hf_heads.py tests which.
    test_all_params_have_gradient = False

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.name, self.options)
        self.config_tester = ConfigTester(
            self,
            config_class=VLMoEConfig,
            has_text_modality=True,
            hidden_size=32,
            num_attention_heads=4,
        )
        # The test of a model that reads no text looks for its ids.
        self.test_resize_embeddings = self.name not in IMAGE_ONLY
        # Where a model reads more than its main input: a mask of a text is refused without the text.
        more = {"VLMoEForMaskedImageModeling": ["input_ids"]} | dict.fromkeys(IMAGE_ONLY, [])
        self.additional_model_inputs = more.get(self.name, ["pixel_values"])

    @property
    def all_model_classes(self) -> tuple[type, ...]:
        """The class that is tested."""
        return (getattr(modeling_vlmoe, self.name),)

    def _prepare_for_class(
        self, inputs_dict: dict[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = copy.deepcopy(inputs_dict)
        if self.name == "VLMoEForImageAndTextRetrieval":
            # Only then it reads pairs, and has their hidden states.
            inputs["output_match_logits"] = True
        if not return_labels or self.name == "VLMoEModel":
            return inputs
        tester = self.model_tester
        pieces = torch.zeros(
            tester.batch_size, tester.text_length, dtype=torch.long, device=torch_device
        )
        codes = torch.zeros(
            tester.batch_size, tester.num_patches, dtype=torch.long, device=torch_device
        )
        if self.name == "VLMoEForPreTraining":
            return {**inputs, "labels": pieces, "image_labels": codes, "bool_masked_pos": codes + 1}
        if self.name == "VLMoEForMaskedLM":
            return {**inputs, "labels": pieces}
        if self.name == "VLMoEForMaskedImageModeling":
            return {**inputs, "labels": codes, "bool_masked_pos": codes + 1}
        if self.name == "VLMoEForVisualQuestionAnswering":
            shape = (tester.batch_size, tester.num_labels)
            return {**inputs, "labels": torch.zeros(shape, device=torch_device)}
        return {**inputs, "labels": pieces.new_zeros(tester.batch_size)}

    def use_eager_attention(self) -> None:
        """For tests that ask for attention weights without it: they are refused with SDPA, which has none."""
        self.model_tester.options = {**self.options, "attn_implementation": "eager"}

    def test_model_outputs_equivalence(self) -> None:
        self.use_eager_attention()
        super().test_model_outputs_equivalence()

    def test_capture_outputs_decorator(self) -> None:
        self.use_eager_attention()
        super().test_capture_outputs_decorator()

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


for kind, options in (("Dense", DENSE), ("Experts", EXPERTS)):
    for name in CLASSES:
        members = {"name": name, "options": options}
        globals()[f"{name}{kind}Test"] = type(
            f"{name}{kind}Test", (VLMoETest, unittest.TestCase), members
        )
