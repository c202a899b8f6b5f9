"""Common tests that fail on our classes, with the reason why that is right."""

from __future__ import annotations

# Reason: patterns of "Class::test".
NOT_APPLICABLE: dict[str, list[str]] = {
    "the heads that predict tokens have weights of their own, and the configuration refuses to tie them": [
        "*::test_tied_weights_keys",
    ],
    "asks transformers' own experts, which know no such FFN; tests/unit/test_hf_tracing.py compares ours": [
        "*::test_eager_matches_batched_and_grouped_inference_*",
    ],
    "attention weights are refused with SDPA, which has none": [
        "VLMoEModel*::test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
    ],
    "hidden states come of all blocks; to choose some of them is an option of transformers' own hooks": [
        "*::test_can_capture_specific_layers_hidden_states",
    ],
    "asks for the part of the configuration that is of texts, and ours has no parts": [
        "VLMoEForImageAndTextRetrieval*::test_get_text_features_output_0",
        "VLMoEForImageAndTextRetrieval*::test_get_text_features_output_2",
    ],
    "the first output is of texts and images that were read alone, hidden states are those of pairs": [
        "VLMoEForImageAndTextRetrieval*::test_retain_grad_hidden_states_attentions",
    ],
    "special tokens have to be pieces of the model: their ids are those of training": [
        "VLMoETokenizerTest::test_added_tokens_serialization",
        "VLMoETokenizerTest::test_bos_token_with_add_bos_token_*",
        "VLMoETokenizerTest::test_pad_token_initialization",
    ],
    "the model reads images of three channels": [
        "VLMoEImageProcessorTest::test_call_numpy_4_channels",
    ],
    "images are resized by Pillow alone, as in training": [
        "VLMoEImageProcessorTest::test_new_models_require_torchvision_backend",
    ],
    "an option that the image processor does not know is refused; the test makes one up": [
        "VLMoEProcessorTest::test_args_overlap_kwargs",
    ],
    "looks for the class of the image options by a name that it does not have": [
        "VLMoEImageProcessorTest::test_valid_kwargs_set",
    ],
    "text_pair is a text, and transformers counts it among the options": [
        "VLMoEProcessorTest::test_call_arguments_not_in_processor_kwargs",
    ],
    "texts are padded and cut to the lengths of training, whatever the tokenizer alone would do": [
        "VLMoEProcessorTest::test_subprocessor_defaults_0_text",
        "VLMoEProcessorTest::test_subprocessor_defaults_preserved_by_kwargs_0_images",
    ],
    "all samples of a batch have the same number of images": [
        "VLMoEProcessorTest::test_processor_text_has_no_visual",
    ],
}
