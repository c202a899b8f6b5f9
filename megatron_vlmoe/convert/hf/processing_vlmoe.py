"""Texts and images to the inputs of VL-MoE."""

from __future__ import annotations

from typing import Any, Optional, Union

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

Texts = Union[str, list[str]]


class VLMoEProcessor(ProcessorMixin):
    """The image processor and the tokenizer in one.

    Args:
        image_processor: [`VLMoEImageProcessor`].
        tokenizer: [`VLMoETokenizer`].
        text_length: tokens of a text without image in training.
        pair_text_length: tokens of the text of a pair in training.
        **kwargs: see [`ProcessorMixin`].
    """

    if not hasattr(ProcessorMixin, "get_attributes"):
        # Transformers 4 learns from these what 5 reads from the constructor.
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_length: int = 128,
        pair_text_length: int = 128,
        **kwargs: Any,
    ) -> None:
        self.text_length = text_length
        self.pair_text_length = pair_text_length
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: Optional[Texts] = None,
        text_pair: Optional[Texts] = None,
        padding: Union[bool, str] = "max_length",
        truncation: Union[bool, str] = True,
        max_length: Optional[int] = None,
        return_tensors: Optional[str] = None,
        images_kwargs: Optional[dict[str, Any]] = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Inputs of a model, by name: `input_ids`, `attention_mask`, `pixel_values`.

        Args:
            images: see [`VLMoEImageProcessor.preprocess`]; for two images of every text a list of lists.
            text: a text or a list of texts.
            text_pair: the second text of every sample (sentence pairs).
            padding: "max_length" fills every text up to the length of training: with limited expert capacity the
                number of tokens counts. True fills up to the longest text.
            truncation: shortens longer texts.
            max_length: most tokens; None takes those of training, of pairs where there are images.
            return_tensors: "pt" for torch, "np" for numpy.
            images_kwargs: options of the image processor.
            **kwargs: options of the tokenizer.

        Raises:
            ValueError: neither texts nor images.
        """
        if text is None and images is None:
            raise ValueError("give text, images or both")
        data: dict[str, Any] = {}
        if text is not None:
            if max_length is None:
                max_length = self.text_length if images is None else self.pair_text_length
            data.update(
                self.tokenizer(
                    text,
                    text_pair,
                    padding=padding,
                    truncation=truncation,
                    max_length=max_length,
                    return_tensors=return_tensors,
                    **kwargs,
                )
            )
        if images is not None:
            data.update(
                self.image_processor(images, return_tensors=return_tensors, **(images_kwargs or {}))
            )
        return BatchFeature(data)

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Texts of ids; see [`VLMoETokenizer.batch_decode`]."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Text of ids; see [`VLMoETokenizer.decode`]."""
        return self.tokenizer.decode(*args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the inputs."""
        names = [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]
        return list(dict.fromkeys(names))


__all__ = ["VLMoEProcessor"]
