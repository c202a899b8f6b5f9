"""Texts and images to the inputs of VL-MoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional, Union

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .options_vlmoe import (
    IMAGE_CALL_OPTIONS,
    LENGTH_OPTIONS,
    OPTION_NAMES,
    TEXT_CALL_OPTIONS,
    checked,
)

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Loads one, with options of the class, of the image processor or of the tokenizer in place of those saved.

        Args:
            pretrained_model_name_or_path: folder or repository.
            **kwargs: these options, and those of loading as every processor has.

        Raises:
            TypeError: an option of other image processors that this one does not have.
            ValueError: an option that cannot have its value.
        """
        images = {k: kwargs.pop(k) for k in OPTION_NAMES if k in kwargs}
        lengths = {k: kwargs.pop(k) for k in LENGTH_OPTIONS if k in kwargs}
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if images:
            own = processor.image_processor
            processor.image_processor = type(own).from_dict(own.to_dict(), **images)
        for name, value in checked(lengths, LENGTH_OPTIONS, cls.__name__).items():
            setattr(processor, name, value)
        return processor

    def __call__(
        self,
        images: Any = None,
        text: Optional[Texts] = None,
        text_pair: Optional[Texts] = None,
        **options: Any,
    ) -> BatchFeature:
        """Inputs of a model, by name: `input_ids`, `attention_mask`, `pixel_values`.

        Args:
            images: see [`VLMoEImageProcessor.preprocess`]; for two images of every text a list of lists.
            text: a text or a list of texts.
            text_pair: the second text of every sample (sentence pairs).
            **options: of the tokenizer and of [`VLMoEImageProcessor.preprocess`], all of them here or in dictionaries
                `text_kwargs`, `images_kwargs` and `common_kwargs`. What is here goes before what is in `common_kwargs`.

                - `padding`: "max_length", as is the default, fills every text up to the length of training: with
                  limited expert capacity the number of tokens counts. True fills up to the longest text.
                - `truncation`: True, as is the default, shortens longer texts.
                - `max_length`: most tokens; without it those of training, of pairs where there are images.
                - `return_tensors`: "pt" for torch, "np" for numpy.

        Raises:
            TypeError: an option that is not there.
            ValueError: neither texts nor images, an option that cannot have its value or that is given twice, and what
                the image processor and the tokenizer refuse.
        """
        if text_pair is not None:
            options["text_pair"] = text_pair
        for_text, for_images = self._routed(options)
        if text is None and images is None:
            raise ValueError("give text, images or both")
        if text is None and "text_pair" in for_text:
            raise ValueError("text_pair without text")
        data: dict[str, Any] = {}
        if text is not None:
            length = self.text_length if images is None else self.pair_text_length
            chosen = {"padding": "max_length", "truncation": True, "max_length": length} | for_text
            data.update(self.tokenizer(text, **chosen))
            for_images = {"return_tensors": chosen.get("return_tensors")} | for_images
        if images is not None:
            data.update(self.image_processor(images, **for_images))
        return BatchFeature(data)

    def _routed(self, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Options of the tokenizer and of the image processor."""
        owner = type(self).__name__
        empty = ("videos", "audio", "videos_kwargs", "audio_kwargs")
        # Every processor of transformers takes those four; here they may only be empty.
        options = {
            name: value
            for name, value in options.items()
            if value is not None and not (name in empty and not value)
        }
        groups = {"text_kwargs": TEXT_CALL_OPTIONS, "images_kwargs": IMAGE_CALL_OPTIONS}
        nested = {name: options.pop(name, None) or {} for name in (*groups, "common_kwargs")}
        for name, values in nested.items():
            if not isinstance(values, Mapping):
                raise ValueError(f"{name}={values!r} must be a dictionary of options")
        common = nested.pop("common_kwargs")
        every = {name: reader for readers in groups.values() for name, reader in readers.items()}
        checked(common, every, f"{owner}: common_kwargs")
        checked(options, every, owner)
        found = []
        for group, readers in groups.items():
            if twice := sorted(set(nested[group]) & set(options)):
                raise ValueError(f"{', '.join(twice)}: given twice, in {group} and beside it")
            chosen = checked(nested[group], readers, f"{owner}: {group}")
            for values in (options, common):
                known = {k: v for k, v in values.items() if k in readers and k not in chosen}
                chosen |= checked(known, readers, owner)
            found.append(chosen)
        return found[0], found[1]

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
