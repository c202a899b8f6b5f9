"""`VLMoE`: a fine-tuned model that answers, classifies and encodes.

Letters: n items, D width, C classes.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.tasks import SampleShape, TaskSpec, working_tasks
from megatron_vlmoe.data.collate import to_tensors
from megatron_vlmoe.data.image_files import DEFAULT_RULES, ImageRules
from megatron_vlmoe.data.samples import TextFormat
from megatron_vlmoe.finetune.evaluation import eval_layout
from megatron_vlmoe.finetune.predictions import class_probabilities
from megatron_vlmoe.inference.answers import Answer, Scored, decisions, ranked
from megatron_vlmoe.inference.inputs import (
    Images,
    Item,
    Texts,
    UnknownTextWarning,
    aligned,
    pixels,
    tokens,
    unknown_share,
)
from megatron_vlmoe.inference.loading import LoadedModel, load_model
from megatron_vlmoe.stream.batch import Batch

Array = npt.NDArray[Any]


class VLMoE:
    """A fine-tuned model; made by `from_checkpoint`.

    `answer`, `reason`, `classify`, `entail` and those of retrieval are each for one task; `rank` and `decide` are for
    every task with classes, those of plug-ins too.

    Every method takes single items and returns one result, or takes lists (or tuples) of one length and returns a
    list. A single item beside lists goes with each of theirs. An image is a Pillow image, a path, the bytes of a
    file, or a uint8 array ``[H, W, 3]``; it is resized as a whole, as in evaluation.

    Methods raise DataError, naming the item, for images and texts that cannot be used, and ConfigError if the
    checkpoint is of another task.

    Args:
        loaded: the model.
        batch_size: most items in a forward pass.
        rules: about orientation and transparency of images.
    """

    def __init__(
        self, loaded: LoadedModel, batch_size: int = 32, rules: ImageRules = DEFAULT_RULES
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self._rules = rules
        self._loaded = loaded
        self.batch_size = batch_size

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        device: Optional[str] = None,
        precision: str = "auto",
        tokenizer: str | Path | None = None,
        labels: str | Path | None = None,
        batch_size: int = 32,
        capacity_factor: float = 0.0,
        exif: str = DEFAULT_RULES.exif,
        alpha: str = DEFAULT_RULES.alpha,
    ) -> VLMoE:
        """Loads what `finetune` wrote, at whatever layout, into this process.

        Neither torchrun nor an initialized torch.distributed is needed. Several models may be loaded.

        Args:
            path: run folder (its best checkpoint where there is one, else its last), `best`, `checkpoints`, or one
                iteration in them.
            device: None takes the first visible GPU, else the CPU; "cpu" or "cuda" insists on it.
            precision: auto (bf16 on GPUs that have it, else fp16; fp32 on CPU), fp32, bf16 or fp16.
            tokenizer: text tokenizer; None takes `text.model` of the run folder.
            labels: class names; None takes `labels.json` of the run folder.
            batch_size: most items in a forward pass.
            capacity_factor: expert capacity; 0 or less drops no token, so that a result does not depend on what
                else is in the batch. The paper evaluates with 1.0.
            exif: "turn" turns images upright by the orientation in their EXIF, "keep" leaves them.
            alpha: ground of transparent pixels, "white" or "black"; "drop" takes the colours under them.

        Raises:
            ConfigError: no such checkpoint, one of pretraining, or an argument or file that does not go with it.
            CheckpointError: a damaged checkpoint.
        """
        try:
            rules = ImageRules(exif, alpha)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        loaded = load_model(
            path,
            device=device,
            precision=precision,
            tokenizer=tokenizer,
            labels=labels,
            capacity_factor=capacity_factor,
        )
        return cls(loaded, batch_size, rules)

    @property
    def task(self) -> str:
        """Name of the task that the checkpoint was fine-tuned on."""
        return self._loaded.config.task.name

    @property
    def spec(self) -> TaskSpec:
        """The row of that task."""
        return self._loaded.config.task.spec

    @property
    def checkpoint(self) -> Path:
        """The checkpoint."""
        return self._loaded.checkpoint

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes ``[C]``; none for retrieval."""
        known = self._loaded.labels
        return known.labels if known is not None else ()

    @property
    def has_matching(self) -> bool:
        """Whether the model was trained to tell matching pairs from others (retrieval)."""
        weight = self._loaded.config.contrastive.matching_weight
        return self.spec.target == "match" and weight != 0.0

    def rank(self, top_k: int = 5, **inputs: Any) -> Any:
        """The `top_k` most likely classes as `Scored`, best first; a list of such lists for lists.

        Args:
            top_k: most classes to name.
            **inputs: what a sample of the task has, by the names that its row gives (`TaskSpec.images`, `texts`).

        Raises:
            ConfigError: the task has no classes, or reads something else.
        """
        single, found = self._ranked("rank", inputs, top_k)
        return found[0] if single else found

    def decide(self, **inputs: Any) -> Any:
        """`Decision`, or a list of them: one of the classes, with the probabilities of all.

        Args:
            **inputs: as for `rank`.

        Raises:
            ConfigError: as for `rank`.
        """
        single, logits = self._logits("decide", inputs)
        assert self._loaded.labels is not None
        found = decisions(self.task, logits, self._loaded.labels)
        return found[0] if single else found

    def answer(self, image: Images, question: Texts, top_k: int = 1) -> Any:
        """vqa: `Answer`, or a list of them, with the `top_k` most likely answers."""
        self._needs("answer")
        single, rows = self._ranked("answer", {"image": image, "question": question}, top_k)
        found = [Answer(best[0].label, best[0].score, tuple(best)) for best in rows]
        return found[0] if single else found

    def reason(self, left: Images, right: Images, sentence: Texts) -> Any:
        """nlvr2: `Decision`, or a list of them, whether the sentence is true of the two images."""
        self._needs("reason")
        return self.decide(left=left, right=right, sentence=sentence)

    def classify(self, image: Images, top_k: int = 5) -> Any:
        """imagenet: the `top_k` most likely classes as `Scored`, best first; a list of such lists for a list."""
        self._needs("classify")
        return self.rank(top_k, image=image)

    def entail(self, premise: Texts, hypothesis: Texts) -> Any:
        """mnli: `Decision`, or a list of them, how the hypothesis relates to the premise."""
        self._needs("entail")
        return self.decide(premise=premise, hypothesis=hypothesis)

    def encode_image(self, image: Images) -> Array:
        """retrieval: unit vector ``[D]`` of an image, ``[n, D]`` of a list, float32."""
        self._needs("encode_image")
        single, (images,) = aligned(image=image)
        features = self._run("image_features", images=images, shape=SampleShape(images=1))
        return features[0] if single else features

    def encode_text(self, text: Texts) -> Array:
        """retrieval: unit vector ``[D]`` of a text, ``[n, D]`` of a list, float32."""
        self._needs("encode_text")
        single, columns = aligned(text=text)
        features = self._run("text_features", texts=columns, shape=SampleShape(texts=1))
        return features[0] if single else features

    def score(self, image: Images, text: Texts) -> Any:
        """retrieval: cosine similarity of image and text, -1 to 1, or a list of them."""
        self._needs("score")
        single, _ = aligned(image=image, text=text)
        products = (self.encode_image(image) * self.encode_text(text)).sum(axis=-1)
        return float(products) if single else products.tolist()

    def match(self, image: Images, text: Texts) -> Any:
        """retrieval: probability that image and text belong together, of the matching head, or a list of them.

        Raises:
            ConfigError: the model was trained without the matching head.
        """
        self._needs("match")
        if not self.has_matching:
            raise ConfigError(
                f"match: {self.checkpoint} was trained without the matching head "
                "(contrastive.matching_weight 0)"
            )
        single, (images, texts) = aligned(image=image, text=text)
        logits = self._run("match_logits", images, [texts], shape=SampleShape(pairs=1))
        found = class_probabilities(self.task, logits)[:, 1].tolist()
        return found[0] if single else found

    def unknown_share(self, text: Texts) -> Any:
        """Share of the tokens of a text, or of each of a list, that the tokenizer does not know, 0 to 1.

        Raises:
            ConfigError: the task has no texts.
        """
        tokenizer = self._loaded.tokenizer
        if tokenizer is None:
            raise ConfigError(f"unknown_share: {self.checkpoint} is of {self.task}, without texts")
        single, (texts,) = aligned(text=text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownTextWarning)
            shares = [unknown_share(ids, tokenizer) for ids in tokens(texts, tokenizer)]
        return shares[0] if single else shares

    def _needs(self, method: str) -> None:
        if method not in self.spec.methods:
            others = (spec.name for spec in working_tasks() if method in spec.methods)
            raise ConfigError(
                f"{method} needs a checkpoint of {' or '.join(others)}; "
                f"{self.checkpoint} is of {self.task}"
            )

    def _ranked(
        self, method: str, inputs: Mapping[str, Any], top_k: int
    ) -> tuple[bool, list[list[Scored]]]:
        """Whether single items were given, and the most likely classes of each, best first."""
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} must be at least 1")
        single, logits = self._logits(method, inputs)
        assert self._loaded.labels is not None
        return single, ranked(self.task, logits, self._loaded.labels, top_k)

    def _logits(self, method: str, inputs: Mapping[str, Any]) -> tuple[bool, Array]:
        """Whether single items were given, and the logits ``[n, C]``."""
        spec = self.spec
        names = (*spec.images, *spec.texts)
        if not spec.has_labels:
            raise ConfigError(
                f"{method}: {self.checkpoint} is of {self.task}, which has no classes"
            )
        if set(inputs) != set(names):
            given = ", ".join(inputs) or "nothing"
            raise ConfigError(f"{method}: {self.task} reads {', '.join(names)}; given {given}")
        single, columns = aligned(**{name: inputs[name] for name in names})
        count = len(spec.images)
        # The images of a sample follow each other, each with the sample's texts.
        images = [image for row in zip(*columns[:count]) for image in row] if count else None
        texts = [
            [text for text in column for _ in range(max(count, 1))] for column in columns[count:]
        ]
        return single, self._run("logits", images, texts or None)

    def _run(
        self,
        output: str,
        images: Optional[Sequence[Item]] = None,
        texts: Optional[Sequence[Sequence[Item]]] = None,
        shape: Optional[SampleShape] = None,
    ) -> Array:
        """An output of the heads for every sample, in forward passes of at most `batch_size` samples.

        Args:
            output: its name.
            images: of all samples, one after another.
            texts: the first text of all samples, and the second ones of a task that has two.
            shape: what a sample puts into the stream; None: what the task says.

        Returns:
            ``[n, ...]``, float32.
        """
        shape = shape or self.spec.stream
        text_segment, image_segment = "texts", "images"
        if shape.pairs:
            text_segment, image_segment = "pair_texts", "pair_images"
        per_sample = max(shape.pairs, 1)
        config = self._loaded.config
        ids, lengths = (None, None) if texts is None else self._laid_out(texts, shape)
        inputs = images if images is not None else lengths
        assert inputs is not None
        found = []
        for first in range(0, len(inputs), self.batch_size * per_sample):
            part = slice(first, first + self.batch_size * per_sample)
            batch: dict[str, dict[str, Array]] = {}
            if ids is not None and lengths is not None:
                batch[text_segment] = {"ids": ids[part], "lengths": lengths[part]}
            if images is not None:
                batch[image_segment] = {
                    "pixels": pixels(images[part], config.model.image_size, self._rules)
                }
            found.append(self._forward(batch, len(inputs[part]) // per_sample, shape, output))
        if found:
            return np.concatenate(found)
        widths = {"logits": config.task.num_classes, "match_logits": 2}
        return np.zeros((0, widths.get(output, config.model.hidden_size)), dtype=np.float32)

    def _laid_out(self, texts: Sequence[Sequence[Item]], shape: SampleShape) -> tuple[Array, Array]:
        """Ids ``[n, L]`` and lengths ``[n]`` of n texts, each of one or two parts."""
        tokenizer, model = self._loaded.tokenizer, self._loaded.config.model
        assert tokenizer is not None
        length = model.pair_text_length if shape.pairs else model.text_length
        parts = [tokens(column, tokenizer) for column in texts]
        if not parts[0]:
            return np.zeros((0, length), dtype=np.int64), np.zeros(0, dtype=np.int64)
        return TextFormat.of(tokenizer, length).rows(list(zip(*parts, strict=True)))

    def _forward(
        self, batch: dict[str, dict[str, Array]], count: int, shape: SampleShape, output: str
    ) -> Array:
        """An output of the heads ``[count, ...]`` for one batch of so many samples."""
        config = self._loaded.config
        config = replace(config, task=replace(config.task, eval_micro_batch_size=count))
        layout = eval_layout(config, shape)

        def measure(_: Batch, outputs: Mapping[str, Tensor]) -> Array:
            return outputs[output].float().cpu().numpy()

        tensors = to_tensors(batch)
        (result,) = self._loaded.runner.evaluate(iter([tensors]), 1, measure, layout=layout)
        return result
