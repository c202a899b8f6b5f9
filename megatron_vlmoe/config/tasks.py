"""The downstream tasks: one row each, here or in a plug-in.

A plug-in is an installed package with an entry point in the group `megatron_vlmoe.tasks` that is named as the task
and whose value is a `TaskSpec`, or a function that gives one. docs/architecture.md has an example.

Code is named as ``module:name`` and imported when it is used, so that reading a row needs neither torch nor
megatron-core.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import keyword
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import Any, Literal, get_args

from megatron_vlmoe.config.errors import ConfigError

GROUP = "megatron_vlmoe.tasks"
"""Group of the entry points of plug-ins."""
# Kinds of prepared datasets that are no task (data/manifest.py).
_OTHER_KINDS = ("text", "images", "pairs")

PREDICT_OPTIONS = (
    *("help", "load", "task", "input", "exif", "alpha", "json", "output", "top_k", "precision"),
    *("batch_size", "capacity_factor", "text_tokenizer", "tokenizer", "labels"),
)
"""The options of ``predict`` besides the inputs of the tasks, which therefore have other names."""
PREDICTION_KEYS = ("prediction", "prediction_name", "score", "most_likely", "match")
"""What ``predict`` writes beside the inputs of a record, which therefore have other names too."""
# Fields of rows that name code.
_CODE = ("reader", "objective", "scores", "guess", "submission", "build", "shapes")

Target = Literal["class", "answers", "match"]
"""What is to be found of a sample."""


def _check_fields(row: Head | TaskSpec) -> None:
    """Raises ValueError where a field has a wrong type: rows of plug-ins are code that nobody type-checks."""
    kinds: dict[object, type] = {"str": str, "bool": bool, "Head": Head, "tuple[str, ...]": tuple}
    for field in dataclasses.fields(row):
        name, value = field.name, getattr(row, field.name)
        if field.type == "Target":
            if value not in get_args(Target):
                raise ValueError(f"{name} {value!r}: must be one of {', '.join(get_args(Target))}")
        elif not isinstance(value, kinds[field.type]):
            raise ValueError(f"{name} {value!r}: must be of type {field.type}")
        elif isinstance(value, tuple):
            if not all(isinstance(item, str) and item for item in value):
                raise ValueError(f"{name} {value!r}: must hold names")
            if len(set(value)) != len(value):
                raise ValueError(f"{name} {value!r}: one name twice")
        elif name in _CODE and (value or name != "submission"):
            if not re.fullmatch(r"\w+(\.\w+)*:\w+", str(value)):
                raise ValueError(f"{name} {value!r}: must be module:name")


@dataclass(frozen=True)
class SampleShape:
    """What one sample of a task puts into the token stream: numbers of texts, images and pairs."""

    texts: int = 0
    images: int = 0
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class Head:
    """How a model ends: several tasks may end alike.

    Args:
        build: ``module:name`` of a class or function that takes megatron-core's TransformerConfig and the
            FinetuneConfig of the run, and gives the `Heads`.
        shapes: ``module:name`` of a function that takes the width D and the number of classes C, and gives the key
            and whole shape of every tensor that `build` makes, in its order.
        hf_class: class of convert/hf/modeling_vlmoe.py with the same head; empty: the task cannot be exported.
        hf_auto_class: Auto class of transformers that gives `hf_class` in an export.
        hf_tag: the pipeline tag of an export: what the Hub calls such a task.

    Raises:
        ValueError: a field of a wrong type.
    """

    build: str
    shapes: str
    hf_class: str = ""
    hf_auto_class: str = ""
    hf_tag: str = "feature-extraction"

    def __post_init__(self) -> None:
        _check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A downstream task.

    Args:
        name: of the task, as in ``--task``; also in prepared data and in checkpoints.
        images: names of a sample's images, as ``predict`` and `VLMoE` take them; one at most where there is no text.
            None may be one of `PREDICT_OPTIONS` or `PREDICTION_KEYS`.
        texts: names of a sample's texts, which become one: ``<s> A </s> B </s>``; named as `images` are.
        target: what is to be found of a sample: its ``class``, one of the ``answers`` that several annotators gave
            (each with a score), or which image and caption ``match``.
        shared_images: several samples may be about one image, which is then stored once.
        reader: ``module:name`` of what makes a `TaskSource` of a `TaskInput`.
        reader_options: which fields of `TaskInput` the reader knows, besides the folder.
        recipe: name of a recipe of config/presets.py, or ``module:name`` of a function that takes the RunConfig of
            the pretrained model and gives the FinetuneConfig; empty: as NLVR2, at the image size of pretraining.
        splits: evaluation splits unless others are named; the first chooses the best checkpoint.
        best_metric: the metric that chooses it, without the name of the split; larger is better.
        table_split: the split whose `best_metric` stands in a table of results; empty: the first of `splits`.
        head: the end of the model.
        objective: ``module:name`` of a `TaskObjective`.
        scores: ``module:name`` of a function that takes what was found of every sample, the split and the labels,
            and gives each metric's `Score` by name (the class `ClassificationObjective` asks for it).
        guess: ``module:name`` of a function that takes a split and the labels, and gives what guessing scores by
            `best_metric`, in percent.
        submission: ``module:name`` of a function that makes the content of an evaluation server's JSON file from
            `question_id` and `answer` of every sample; empty: there is no server.
        methods: methods of `VLMoE` that are for this task alone.
        decides: the classes are a few, and a prediction names all of them.

    Raises:
        ValueError: a field of a wrong type, or a row that contradicts itself.
    """

    name: str
    images: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    target: Target = "class"
    shared_images: bool = False
    reader: str
    reader_options: tuple[str, ...] = ()
    recipe: str = ""
    splits: tuple[str, ...]
    best_metric: str = "accuracy"
    table_split: str = ""
    head: Head
    objective: str = "megatron_vlmoe.finetune.objective:ClassificationObjective"
    scores: str = "megatron_vlmoe.finetune.metrics:accuracy"
    guess: str = "megatron_vlmoe.finetune.metrics:guess_class"
    submission: str = ""
    methods: tuple[str, ...] = ()
    decides: bool = False

    def __post_init__(self) -> None:
        name = str(self.name)
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in _OTHER_KINDS:
            raise ValueError(f"a task cannot be named {self.name!r}")
        try:
            _check_fields(self)
            self._check_names()
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error

    def _check_names(self) -> None:
        inputs = (*self.images, *self.texts)
        if not inputs or not self.splits:
            raise ValueError("needs images or texts, and splits")
        for name in inputs:
            if not name.isidentifier() or keyword.iskeyword(name) or name == "self":
                raise ValueError(f"{name!r} cannot be the name of an argument")
            if name in PREDICT_OPTIONS:
                raise ValueError(f"input {name!r} is named as an option of predict")
            if name in PREDICTION_KEYS:
                raise ValueError(f"input {name!r} is named as a part of a prediction")
            if inputs.count(name) > 1:
                raise ValueError(f"{name!r} is the name of an image and of a text")
        if len(self.images) > 1 and not self.texts:
            raise ValueError("several images need a text that they go with")
        if self.target == "match" and (len(self.images), len(self.texts)) != (1, 1):
            raise ValueError("target 'match' needs one image and one text")
        if self.table_split and self.table_split not in self.splits:
            raise ValueError(f"table_split {self.table_split!r}: none of its splits")

    @property
    def stream(self) -> SampleShape:
        """What a training sample puts into the token stream."""
        if self.target == "match":
            # Caption and image apart, and the matching pair, one with a wrong image, one with a wrong caption.
            return SampleShape(texts=1, images=1, pairs=3)
        if self.images and self.texts:
            # The text with each of the images.
            return SampleShape(pairs=len(self.images))
        return SampleShape(images=1) if self.images else SampleShape(texts=1)

    @property
    def has_labels(self) -> bool:
        """Whether there are classes with names; else image and caption are matched."""
        return self.target != "match"

    @property
    def has_answers(self) -> bool:
        """Whether a sample has answers of annotators, and labels with scores."""
        return self.target == "answers"

    @property
    def mixes_images(self) -> bool:
        """Whether mixup and cutmix make sense: a sample is one image and its class."""
        return self.stream == SampleShape(images=1) and self.target == "class"


_HEADS = "megatron_vlmoe.model.task_heads"
_SHAPES = "megatron_vlmoe.planning.parameters"
_READERS = "megatron_vlmoe.prepare.readers.tasks"
_METRICS = "megatron_vlmoe.finetune.metrics"

PAIR_HEAD = Head(
    build=f"{_HEADS}:PairClassifier",
    shapes=f"{_SHAPES}:pair_classifier",
    hf_class="VLMoEForVisualQuestionAnswering",
    hf_auto_class="AutoModelForVisualQuestionAnswering",
    hf_tag="visual-question-answering",
)
"""A text with an image, to classes."""
TWO_IMAGE_HEAD = Head(
    build=f"{_HEADS}:TwoImageClassifier",
    shapes=f"{_SHAPES}:two_image_classifier",
    hf_class="VLMoEForImagesAndTextClassification",
    # Transformers has no Auto class for two images and a text.
    hf_auto_class="AutoModelForSequenceClassification",
    hf_tag="visual-question-answering",
)
"""A text with each of two images, to classes."""
IMAGE_HEAD = Head(
    build=f"{_HEADS}:ImageClassifier",
    shapes=f"{_SHAPES}:image_classifier",
    hf_class="VLMoEForImageClassification",
    hf_auto_class="AutoModelForImageClassification",
    hf_tag="image-classification",
)
"""An image, to classes."""
TEXT_HEAD = Head(
    build=f"{_HEADS}:TextClassifier",
    shapes=f"{_SHAPES}:text_classifier",
    hf_class="VLMoEForSequenceClassification",
    hf_auto_class="AutoModelForSequenceClassification",
    hf_tag="text-classification",
)
"""A text, or several in one, to classes."""
RETRIEVAL_HEAD = Head(
    build=f"{_HEADS}:RetrievalHeads",
    shapes=f"{_SHAPES}:retrieval_heads",
    hf_class="VLMoEForImageAndTextRetrieval",
    hf_auto_class="AutoModelForZeroShotImageClassification",
    hf_tag="zero-shot-image-classification",
)
"""Features of captions and images, and whether a pair matches."""

_ROWS = (
    TaskSpec(
        name="vqa",
        images=("image",),
        texts=("question",),
        target="answers",
        shared_images=True,
        reader=f"{_READERS}.vqa:VqaSource",
        reader_options=("seed", "num_val_images", "min_answer_count"),
        recipe="vqa",
        splits=("val",),
        best_metric="vqa_official",
        head=PAIR_HEAD,
        scores=f"{_METRICS}:vqa_scores",
        guess=f"{_METRICS}:guess_answer",
        submission="megatron_vlmoe.finetune.predictions:vqa_submission",
        methods=("answer",),
    ),
    TaskSpec(
        name="nlvr2",
        images=("left", "right"),
        texts=("sentence",),
        shared_images=True,
        reader=f"{_READERS}.sentences:Nlvr2Source",
        reader_options=("class_names",),
        recipe="nlvr2",
        splits=("dev", "test"),
        table_split="test",
        head=TWO_IMAGE_HEAD,
        methods=("reason",),
        decides=True,
    ),
    TaskSpec(
        name="retrieval",
        images=("image",),
        texts=("text",),
        target="match",
        reader=f"{_READERS}.retrieval:RetrievalSource",
        reader_options=("annotations",),
        recipe="coco",
        splits=("val", "test"),
        best_metric="mean_recall",
        table_split="test",
        head=RETRIEVAL_HEAD,
        objective="megatron_vlmoe.finetune.retrieval:RetrievalObjective",
        guess=f"{_METRICS}:guess_match",
        methods=("encode_image", "encode_text", "score", "match"),
    ),
    TaskSpec(
        name="imagenet",
        images=("image",),
        reader=f"{_READERS}.imagenet:open_imagenet",
        reader_options=("seed", "val_fraction", "val_labels", "words", "class_names"),
        recipe="imagenet",
        splits=("val",),
        best_metric="top1",
        head=IMAGE_HEAD,
        scores=f"{_METRICS}:top1_and_top5",
        methods=("classify",),
    ),
    TaskSpec(
        name="mnli",
        texts=("premise", "hypothesis"),
        reader=f"{_READERS}.sentences:SentencePairSource",
        reader_options=("sentence1", "sentence2", "label", "class_names"),
        recipe="mnli",
        splits=("dev_matched", "dev_mismatched"),
        head=TEXT_HEAD,
        methods=("entail",),
        decides=True,
    ),
)

TASKS: Mapping[str, TaskSpec] = {spec.name: spec for spec in _ROWS}
"""The tasks of the paper, by name."""


def task_names() -> tuple[str, ...]:
    """Every task that ``--task`` takes: those of the paper, then those of plug-ins."""
    return (*TASKS, *sorted(set(_plug_ins()) - set(TASKS)))


def working_tasks() -> list[TaskSpec]:
    """The rows of all tasks but of plug-ins that do not load, which must not be in the way of the others."""
    found = []
    for name in task_names():
        with contextlib.suppress(ConfigError):
            found.append(find_task(name))
    return found


@functools.cache
def find_task(name: str) -> TaskSpec:
    """The row of a task.

    Raises:
        ConfigError: there is no such task, its plug-in does not load, or two have the name.
    """
    points = _plug_ins().get(name, ())
    if name in TASKS:
        if points:
            raise ConfigError(
                f"task {name}: {_origin(points[0])} takes the name of a built-in task"
            )
        return TASKS[name]
    if not points:
        raise ConfigError(f"task {name}: unknown; one of {', '.join(task_names())}")
    if len(points) > 1:
        both = " and ".join(map(_origin, points[:2]))
        raise ConfigError(f"task {name}: {both} have the same name; uninstall one of them")
    try:
        found = points[0].load()
        spec = found if isinstance(found, TaskSpec) else found()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"task {name}: {_origin(points[0])} does not load: {_reason(error)}"
        ) from error
    if not isinstance(spec, TaskSpec) or spec.name != name:
        what = f"task {spec.name}" if isinstance(spec, TaskSpec) else f"a {type(spec).__name__}"
        raise ConfigError(f"task {name}: {_origin(points[0])} gives {what}, not its TaskSpec")
    return spec


def load_code(path: str, task: str) -> Any:
    """What the row of a task names as ``module:name``.

    Raises:
        ConfigError: a plug-in names what is not there or does not load. What its code does later is its own.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        if task in TASKS:
            raise
        origin = _origin(_plug_ins()[task][0])
        raise ConfigError(
            f"task {task}: {origin} names {path}, which does not load: {_reason(error)}"
        ) from error


@functools.cache
def _plug_ins() -> Mapping[str, tuple[EntryPoint, ...]]:
    """Entry points by name; one that two packages repeat word for word counts once."""
    found: dict[str, dict[str, EntryPoint]] = {}
    for point in _points():
        found.setdefault(point.name, {}).setdefault(point.value, point)
    return {name: tuple(points.values()) for name, points in found.items()}


def _points() -> Iterable[EntryPoint]:
    try:
        return entry_points(group=GROUP)
    except Exception:
        # The list of some package is malformed, of whatever group; those of the others count.
        return list(_points_of_each_package())


def _points_of_each_package() -> Iterator[EntryPoint]:
    for package in distributions():
        try:
            yield from package.entry_points.select(group=GROUP)
        except Exception as error:
            if GROUP in (package.read_text("entry_points.txt") or ""):
                print(
                    f"warning: package {package.name}: its tasks are not known, because its "
                    f"entry_points.txt is malformed ({_reason(error)})",
                    file=sys.stderr,
                )


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _origin(point: EntryPoint) -> str:
    package = f" of package {point.dist.name}" if point.dist is not None else ""
    return f"plug-in {point.value}{package}"
