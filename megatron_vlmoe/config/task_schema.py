"""Options of fine-tuning and evaluation on a downstream task, on top of those of pretraining.

Fields that the paper (arXiv 2303.07226, sections 4.2, 4.3 and A.2) leaves open are explained in docs/fidelity.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.tasks import TASKS, SampleShape, TaskSpec, find_task, task_names


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A downstream task (paper sections 4.2 and 4.3).

    Args:
        name: vqa, nlvr2, retrieval, imagenet, mnli, or the task of an installed plug-in.
        data: prefix P of a dataset that `vlmoe index-task` wrote.
        train_split: split to train on.
        eval_splits: splits to evaluate on, the first of which chooses the best checkpoint; empty takes the task's own.
        architecture: preset of the model where `--load` names no checkpoint (training from scratch).
        micro_batch_size: samples in a micro-batch of one data-parallel rank.
        global_batch_size: samples in a step over all ranks and micro-batches.
        eval_micro_batch_size: samples in a micro-batch of an evaluation; 0 means micro_batch_size.
        epochs: length of the run; `train.steps` > 0 takes its place.
        warmup_fraction: share of the steps with linear warm-up; `optim.lr_warmup_steps` >= 0 takes its place.
        eval_epochs: epochs between evaluations; 0 leaves it to `train.eval_interval`.
        early_stopping: evaluations without a better result after which the run ends; 0 never.
        save_best: keeps the checkpoint with the best result of the first evaluation split in SAVE/best.
        num_classes: classes of the head; 0 takes them from the prepared labels.
        labels_sha256: fingerprint of the class names; filled in from the prepared labels.
        label_smoothing: share of the target spread over all classes (tasks whose samples have one class each).
        mixup: alpha of mixup (imagenet); 0 turns it off.
        cutmix: alpha of cutmix (imagenet); 0 turns it off.
        rand_augment: RandAugment recipe of training images.
        random_erase: probability of erasing a rectangle of a training image.
        seeds: runs one training per seed into SAVE/seed_N and reports mean and standard deviation.
        report_examples: examples in the HTML report; 0 writes none.
    """

    name: str = "vqa"
    data: str = ""
    train_split: str = "train"
    eval_splits: tuple[str, ...] = ()
    architecture: str = ""
    micro_batch_size: int = 16
    global_batch_size: int = 128
    eval_micro_batch_size: int = 0
    epochs: float = 10.0
    warmup_fraction: float = 0.1
    eval_epochs: float = 1.0
    early_stopping: int = 0
    save_best: bool = True
    num_classes: int = 0
    labels_sha256: str = ""
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    rand_augment: Literal["none", "vl", "imagenet"] = "none"
    random_erase: float = 0.0
    seeds: tuple[int, ...] = ()
    report_examples: int = 24

    def __post_init__(self) -> None:
        # Packages are looked through only for a name that is none of ours: recipes are made at import.
        if self.name not in TASKS and self.name not in task_names():
            known = ", ".join(task_names())
            raise ConfigError(
                f"task.name={self.name}: unknown; choose one of {known}, or install its plug-in"
            )

    @property
    def spec(self) -> TaskSpec:
        """The row of the task. Raises ConfigError if its plug-in does not load."""
        return find_task(self.name)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits to evaluate on."""
        return self.eval_splits or self.spec.splits

    @property
    def eval_batch(self) -> int:
        """Samples in a micro-batch of an evaluation."""
        return self.eval_micro_batch_size or self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Image-text retrieval: contrastive and matching losses (paper section 4.2, after VLMo).

    Args:
        contrastive_weight: weight of the image-text contrastive loss.
        matching_weight: weight of the image-text matching loss with hard negatives; 0 trains without pairs.
        temperature: initial temperature of the contrastive softmax; it is learned.
        cache: computes the contrastive loss over all micro-batches of a step at once, from features of a forward
            pass without gradient (gradient caching, arXiv 2101.06983).
        rerank: candidates per query that the matching head ranks anew in evaluation; 0 ranks by dot product alone.
    """

    contrastive_weight: float = 1.0
    matching_weight: float = 1.0
    temperature: float = 0.07
    cache: bool = False
    rerank: int = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """A fine-tuning or evaluation run.

    Args:
        task: Downstream task
        contrastive: Losses of image-text retrieval
    """

    task: TaskConfig = field(default_factory=TaskConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)

    @property
    def sample_shape(self) -> SampleShape:
        """What a training sample puts into the stream."""
        spec = self.task.spec
        if spec.target == "match" and self.contrastive.matching_weight == 0.0:
            return replace(spec.stream, pairs=0)
        return spec.stream
