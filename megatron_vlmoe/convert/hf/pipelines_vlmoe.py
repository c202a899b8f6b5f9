"""Pipelines of transformers that read images as the processor does.

Those of transformers itself cut grey values of 16 bits off at 255 and make transparent pixels black before the
processor sees an image. `config.json` names these in their place.
"""

from __future__ import annotations

from typing import Any, Optional

from transformers import (
    ImageClassificationPipeline,
    ImageFeatureExtractionPipeline,
    Pipeline,
    ZeroShotImageClassificationPipeline,
)


class OwnImages:
    """Opens an image by the image processor before transformers' own pipeline goes on."""

    image_processor: Any
    task: str

    def preprocess(self, image: Any, timeout: Optional[float] = None, **kwargs: Any) -> Any:
        """Inputs of the model; see the pipeline."""
        opened = self.image_processor.fetch_images(image, timeout=timeout)
        return super().preprocess(opened, **kwargs)  # type: ignore[misc]

    def check_model_type(self, supported_models: Any) -> None:
        """Nothing to check: `config.json` names the pipeline, and transformers knows only its own models."""


class VLMoEImageClassificationPipeline(OwnImages, ImageClassificationPipeline):
    """See [`ImageClassificationPipeline`]."""


class VLMoEImageFeatureExtractionPipeline(OwnImages, ImageFeatureExtractionPipeline):
    """See [`ImageFeatureExtractionPipeline`]."""


class VLMoEZeroShotImageClassificationPipeline(OwnImages, ZeroShotImageClassificationPipeline):
    """See [`ZeroShotImageClassificationPipeline`]."""


class VLMoEVisualQuestionAnsweringPipeline(Pipeline):
    """Answers to a question about an image, the likeliest first.

    Transformers 5 has no pipeline for this; that of transformers 4 does not cut long questions.
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, image: Any, question: Any = None, **kwargs: Any) -> Any:
        """A list of ``{"answer": ..., "score": ...}``, or a list of these lists.

        Args:
            image: what the processor takes as an image, or a list of them; or a dictionary ``{"image": ...,
                "question": ...}``, or a list of them.
            question: a text, or a list of texts: each of them is asked about each image.
            **kwargs: `top_k` (most answers, 5), `timeout` (seconds to wait for a URL), and those of every pipeline.
        """
        if question is None:
            return super().__call__(image, **kwargs)
        many = isinstance(image, (list, tuple)), isinstance(question, (list, tuple))
        images, questions = (v if m else [v] for v, m in zip((image, question), many))
        pairs = [{"image": i, "question": q} for q in questions for i in images]
        return super().__call__(pairs if any(many) else pairs[0], **kwargs)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model and the processor, which other pipelines leave out."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(
        self, top_k: Optional[int] = None, timeout: Optional[float] = None, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(sorted(options))}")
        return (
            {} if timeout is None else {"timeout": timeout},
            {},
            {} if top_k is None else {"top_k": top_k},
        )

    def preprocess(self, inputs: dict[str, Any], timeout: Optional[float] = None) -> Any:
        """Inputs of the model."""
        image = self.processor.image_processor.fetch_images(inputs["image"], timeout=timeout)
        found = self.processor(images=image, text=inputs["question"], return_tensors="pt")
        # Pixels become what the weights are; ids stay.
        return found.to(self.dtype)

    def _forward(self, inputs: Any) -> Any:
        return self.model(**inputs)

    def postprocess(self, outputs: Any, top_k: int = 5) -> list[dict[str, Any]]:
        """The likeliest answers."""
        logits, config = outputs.logits[0].float(), self.model.config
        # Of classes one is right; of answers several may be.
        one = config.problem_type == "single_label_classification"
        scores = logits.softmax(dim=-1) if one else logits.sigmoid()
        found = scores.topk(min(top_k, len(scores)))
        names = config.id2label
        return [
            {"score": score, "answer": names[index]}
            for score, index in zip(found.values.tolist(), found.indices.tolist())
        ]
