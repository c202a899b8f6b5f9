"""`VLMoE`: a fine-tuned checkpoint, of any parallel layout, loaded whole into this process, that answers and encodes.

Letters: n items, D width, C classes.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional, TypeVar, Union, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import ParallelConfig, Precision
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape, TaskSpec, working_tasks
from megatron_vlmoe.convert.hf_config import open_export
from megatron_vlmoe.data.collate import to_tensors
from megatron_vlmoe.data.image_files import DEFAULT_RULES, ImageRules
from megatron_vlmoe.data.samples import TextFormat
from megatron_vlmoe.data.task_labels import Labels
from megatron_vlmoe.finetune.objective import eval_layout, to_numpy
from megatron_vlmoe.finetune.options import checkpoint_of, saved_run
from megatron_vlmoe.finetune.predictions import class_probabilities
from megatron_vlmoe.finetune.saved import load_weights
from megatron_vlmoe.inference.answers import Answer, Decision, Scored, decisions, ranked
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
from megatron_vlmoe.model.task_heads import build_task_heads
from megatron_vlmoe.runtime import distributed
from megatron_vlmoe.runtime.distributed import resolve_precision
from megatron_vlmoe.runtime.ranks import environment_world_size
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.tokenizers.text import TextTokenizer
from megatron_vlmoe.train.run_files import (
    LABELS_FILE,
    TOKENIZER_FILE,
    is_hugging_face,
    open_labels,
    open_text_tokenizer,
    run_file,
)
from megatron_vlmoe.train.setup import build_forward_only
from megatron_vlmoe.train.step import StepRunner

Array = npt.NDArray[Any]
Found = TypeVar("Found")
Inputs = Union[Images, Texts]
PRECISIONS = ("auto", *get_args(Precision))


class VLMoE:
    """A fine-tuned model; made by `from_checkpoint`.

    `answer`, `reason`, `classify`, `entail` and those of retrieval are each for one task; `rank` and `decide` are for
    every task with classes, those of plug-ins too.

    Every method takes single items and returns one result, or takes lists (or tuples) of one length and returns a
    list. A single item beside lists goes with each of theirs. An image is a Pillow image, a path, the bytes of a
    file, or a uint8 array ``[H, W, 3]``; it is resized as a whole, as in evaluation.

    Methods raise DataError, naming the item, for images and texts that cannot be used, and ConfigError if the
    checkpoint is of another task.
    """

    def __init__(
        self,
        checkpoint: Path,
        config: FinetuneConfig,
        runner: StepRunner,
        tokenizer: Optional[TextTokenizer],
        labels: Optional[Labels],
        batch_size: int = 32,
        rules: ImageRules = DEFAULT_RULES,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size} must be at least 1")
        self.checkpoint = checkpoint
        """Where it came from."""
        self.batch_size = batch_size
        self._config, self._runner, self._rules = config, runner, rules
        self._tokenizer, self._labels = tokenizer, labels

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

        Neither torchrun nor an initialized torch.distributed is needed. Several models may be loaded. The global random
        generators are left as they were.

        Args:
            path: run folder (its best checkpoint where there is one, else its last), `best`, `checkpoints`, or one
                iteration in them.
            device: None takes the first visible GPU, else the CPU; "cpu" or "cuda" insists on it.
            precision: auto (bf16 on GPUs that have it, else fp16; fp32 on CPU), fp32, bf16 or fp16.
            tokenizer: text tokenizer; None takes `text.model` of the run folder.
            labels: class names; None takes `labels.json` of the run folder.
            batch_size: most items in a forward pass.
            capacity_factor: expert capacity; 0 or less drops no token, so that a result does not depend on what
                else is in the batch. The paper evaluates with 1.0. With expert choice a result always does, and 0 takes
                the factor of the run's evaluation.
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
        if not math.isfinite(capacity_factor):
            raise ConfigError(f"capacity_factor={capacity_factor}: not a finite number")
        checkpoint, config = read_run(path)
        if precision not in PRECISIONS:
            raise ConfigError(f"precision={precision}: choose one of {', '.join(PRECISIONS)}")
        if capacity_factor <= 0.0 and config.moe.routing == "expert_choice":
            # There it says how many tokens an expert takes: as many as in the evaluation of the run.
            capacity_factor = config.moe.eval_capacity_factor
        moe = replace(config.moe, eval_capacity_factor=capacity_factor)
        if capacity_factor > 0.0 and moe.dispatcher == "dropless":
            moe = replace(moe, dispatcher="fixed_capacity")
        model = config.model
        # Kernels of the run's machine, not of every one.
        model = replace(model, transformer_impl="local")
        if model.attention_backend == "varlen":
            model = replace(model, attention_backend="sdpa")
        config = replace(config, parallel=ParallelConfig(), model=model, moe=moe)
        text_tokenizer = _open_tokenizer(checkpoint, config, tokenizer)
        classes = _open_labels(checkpoint, config, labels)
        if device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device={device}: cpu or cuda; CUDA_VISIBLE_DEVICES chooses the GPU")
        here = distributed.device().type
        if device not in (None, here):
            # megatron-core takes the GPU wherever it sees one.
            hint = "; hide its GPUs with CUDA_VISIBLE_DEVICES=''" if here == "cuda" else ""
            raise ConfigError(f"device={device}, but this process runs on {here}{hint}")
        # Compiling takes longer than what most callers ask for.
        train = replace(config.train, precision=precision, compile=False, fp8="none")  # type: ignore[arg-type]
        config = replace(config, train=train)
        with _unchanged_generators():
            world = dist.get_world_size() if dist.is_initialized() else environment_world_size()
            if world > 1:
                raise ConfigError(f"a model is loaded by one process alone, not by {world}")
            if parallel_state.model_parallel_is_initialized():
                ranks = distributed.current_ranks()
            else:
                # Nothing is drawn: any seed will do.
                ranks = distributed.initialize(ParallelConfig(), seed=0)
            parts = build_forward_only(config, resolve_precision(config.train), build_task_heads)
            load_weights(checkpoint, config, parts)
        runner = StepRunner(config, parts, ranks)
        return cls(checkpoint, config, runner, text_tokenizer, classes, batch_size, rules)

    @property
    def task(self) -> str:
        """Name of the task that the checkpoint was fine-tuned on."""
        return self._config.task.name

    @property
    def spec(self) -> TaskSpec:
        """The row of that task."""
        return self._config.task.spec

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes ``[C]``; none for retrieval."""
        return self._labels.labels if self._labels is not None else ()

    @property
    def has_matching(self) -> bool:
        """Whether the model was trained to tell matching pairs from others (retrieval)."""
        return self.spec.target == "match" and self._config.contrastive.matching_weight != 0.0

    def rank(self, top_k: int = 5, **inputs: Inputs) -> list[Scored] | list[list[Scored]]:
        """The `top_k` most likely classes as `Scored`, best first; a list of such lists for lists.

        Args:
            top_k: most classes to name.
            **inputs: what a sample of the task has, by the names that its row gives (`TaskSpec.images`, `texts`).

        Raises:
            ConfigError: the task has no classes, or reads something else.
        """
        return _one_or_all(*self._ranked("rank", inputs, top_k))

    def decide(self, **inputs: Inputs) -> Decision | list[Decision]:
        """`Decision`, or a list of them: one of the classes, with the probabilities of all.

        Args:
            **inputs: as for `rank`.

        Raises:
            ConfigError: as for `rank`.
        """
        single, logits = self._logits("decide", inputs)
        assert self._labels is not None
        return _one_or_all(single, decisions(self.task, logits, self._labels))

    def answer(self, image: Images, question: Texts, top_k: int = 1) -> Answer | list[Answer]:
        """vqa: `Answer`, or a list of them, with the `top_k` most likely answers."""
        self._needs("answer")
        single, rows = self._ranked("answer", {"image": image, "question": question}, top_k)
        answers = [Answer(best[0].label, best[0].score, tuple(best)) for best in rows]
        return _one_or_all(single, answers)

    def reason(self, left: Images, right: Images, sentence: Texts) -> Decision | list[Decision]:
        """nlvr2: `Decision`, or a list of them, whether the sentence is true of the two images."""
        self._needs("reason")
        return self.decide(left=left, right=right, sentence=sentence)

    def classify(self, image: Images, top_k: int = 5) -> list[Scored] | list[list[Scored]]:
        """imagenet: the `top_k` most likely classes as `Scored`, best first; a list of such lists for a list."""
        self._needs("classify")
        return self.rank(top_k, image=image)

    def entail(self, premise: Texts, hypothesis: Texts) -> Decision | list[Decision]:
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

    def score(self, image: Images, text: Texts) -> float | list[float]:
        """retrieval: cosine similarity of image and text, -1 to 1, or a list of them."""
        self._needs("score")
        aligned(image=image, text=text)
        products = (self.encode_image(image) * self.encode_text(text)).sum(axis=-1)
        found: float | list[float] = products.tolist()
        return found

    def match(self, image: Images, text: Texts) -> float | list[float]:
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
        return _one_or_all(single, class_probabilities(self.task, logits)[:, 1].tolist())

    def unknown_share(self, text: Texts) -> float | list[float]:
        """Share of the tokens of a text, or of each of a list, that the tokenizer does not know, 0 to 1.

        Raises:
            ConfigError: the task has no texts.
        """
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise ConfigError(f"unknown_share: {self.checkpoint} is of {self.task}, without texts")
        single, (texts,) = aligned(text=text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnknownTextWarning)
            shares = [unknown_share(ids, tokenizer) for ids in tokens(texts, tokenizer)]
        return _one_or_all(single, shares)

    def _needs(self, method: str) -> None:
        if method not in self.spec.methods:
            others = (spec.name for spec in working_tasks() if method in spec.methods)
            raise ConfigError(
                f"{method} needs a checkpoint of {' or '.join(others)}; "
                f"{self.checkpoint} is of {self.task}"
            )

    def _ranked(
        self, method: str, inputs: Mapping[str, Inputs], top_k: int
    ) -> tuple[bool, list[list[Scored]]]:
        """Whether single items were given, and the most likely classes of each, best first."""
        if top_k < 1:
            raise ConfigError(f"top_k={top_k} must be at least 1")
        single, logits = self._logits(method, inputs)
        assert self._labels is not None
        return single, ranked(self.task, logits, self._labels, top_k)

    def _logits(self, method: str, inputs: Mapping[str, Inputs]) -> tuple[bool, Array]:
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

        Images are those of all samples, one after another; texts the first ones of all samples, then, of a task that
        has two, the second ones; None as shape: what the task says.

        Returns:
            ``[n, ...]``, float32.
        """
        shape = shape or self.spec.stream
        text_segment, image_segment = "texts", "images"
        if shape.pairs:
            text_segment, image_segment = "pair_texts", "pair_images"
        per_sample, model = max(shape.pairs, 1), self._config.model
        ids, lengths = np.zeros((0, 1), dtype=np.int64), np.zeros(0, dtype=np.int64)
        if texts is not None:
            assert self._tokenizer is not None
            parts = [tokens(column, self._tokenizer) for column in texts]
            length = model.pair_text_length if shape.pairs else model.text_length
            if parts[0]:
                rows = list(zip(*parts, strict=True))
                ids, lengths = TextFormat.of(self._tokenizer, length).rows(rows)

        def measure(_: Batch, outputs: Mapping[str, Tensor]) -> Array:
            return to_numpy(outputs[output])

        found = []
        count = len(lengths) if images is None else len(images)
        for first in range(0, count, self.batch_size * per_sample):
            part = slice(first, min(first + self.batch_size * per_sample, count))
            batch: dict[str, dict[str, Array]] = {}
            if texts is not None:
                batch[text_segment] = {"ids": ids[part], "lengths": lengths[part]}
            if images is not None:
                own = pixels(images[part], model.image_size, self._rules)
                batch[image_segment] = {"pixels": own}
            layout = eval_layout(model, shape, (part.stop - first) // per_sample)
            batches = iter([to_tensors(batch)])
            found += self._runner.evaluate(batches, 1, measure, layout=layout)
        if found:
            return np.concatenate(found)
        widths = {"logits": self._config.task.num_classes, "match_logits": 2}
        return np.zeros((0, widths.get(output, model.hidden_size)), dtype=np.float32)


def _one_or_all(single: bool, found: list[Found]) -> Found | list[Found]:
    return found[0] if single else found


def read_run(location: str | Path) -> tuple[Path, FinetuneConfig]:
    """The checkpoint that a run, checkpoint or iteration folder names, and the run that wrote it.

    Of a run folder that is the best checkpoint where there is one, else the last.

    Raises:
        ConfigError: there is none, or it is not of a task.
        CheckpointError: it is damaged.
    """
    checkpoint = checkpoint_of(str(location))
    config = saved_run(str(checkpoint))
    if not isinstance(config, FinetuneConfig):
        raise ConfigError(f"{checkpoint}: is a pretraining checkpoint, not one of a task")
    return checkpoint, config


def _open_tokenizer(
    checkpoint: Path, config: FinetuneConfig, given: str | Path | None
) -> Optional[TextTokenizer]:
    if not config.task.spec.texts:
        return None
    path = given or run_file(checkpoint, TOKENIZER_FILE)
    if path is None and is_hugging_face(checkpoint):
        path = config.data.text_tokenizer
    if path is None:
        raise ConfigError(f"{checkpoint}: no {TOKENIZER_FILE} beside it; name the text tokenizer")
    return open_text_tokenizer(path, config, checkpoint)


def _open_labels(
    checkpoint: Path, config: FinetuneConfig, given: str | Path | None
) -> Optional[Labels]:
    if not config.task.spec.has_labels:
        return None
    path = given or run_file(checkpoint, LABELS_FILE)
    if path is None and is_hugging_face(checkpoint):
        # A library wrote the folder: the classes are in its config.json.
        return open_export(checkpoint)[2]
    if path is None:
        raise ConfigError(f"{checkpoint}: no {LABELS_FILE} beside it; name the file of its labels")
    return open_labels(path, config, checkpoint)


@contextlib.contextmanager
def _unchanged_generators() -> Iterator[None]:
    """Puts the global random generators back: a script that loads a model goes on drawing as without it."""
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
