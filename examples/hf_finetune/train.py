"""Fine-tunes an exported model with the Hugging Face Trainer, alone or with DeepSpeed; see README.md.

Needs torch, transformers, accelerate, pillow and sentencepiece, and for ZeRO deepspeed; neither megatron-core nor
megatron_vlmoe: the export brings its model, tokenizer and image processor along.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import (
    AutoConfig,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

AUTO_MODELS = {
    "vqa": "AutoModelForVisualQuestionAnswering",
    "imagenet": "AutoModelForImageClassification",
}
METRICS = {"vqa": "vqa_soft_score", "imagenet": "top1"}
# Of one, two, three and more annotators who gave the same answer.
SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)
IMAGE_ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
SIDE_FOLDERS = {
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "lost+found",
}  # of archives and operating systems


class InputError(Exception):
    """Data or options that cannot be used; the message is the one line that the user sees."""


@dataclass
class Options:
    """What is trained on what; all other options are those of `transformers.TrainingArguments`.

    Args:
        model: folder of the export.
        data: raw folder of the task.
        task: vqa or imagenet (images in folders named by their class).
        labels: `labels.json` of an export or `P_labels.json` of `vlmoe index-task`: the classes in order.
        min_answer_count: vqa: answers that so many questions have become classes (if `labels` gives none).
        train_experts: trains experts and routers too, which the paper keeps as pretraining left them.
        head_lr_multiplier: factor of the learning rate of the classifier.
        layer_decay: factor of the learning rate from one block to the one below it.
        max_train_samples: takes the first so many samples to train on; 0 takes all.
        max_eval_samples: likewise for evaluation.
    """

    model: str
    data: str
    task: str = field(default="vqa", metadata={"choices": list(AUTO_MODELS)})
    labels: Optional[str] = None
    min_answer_count: int = 9
    train_experts: bool = False
    head_lr_multiplier: float = 20.0
    layer_decay: float = 1.0
    max_train_samples: int = 0
    max_eval_samples: int = 0


@dataclass
class Arguments(TrainingArguments):
    """Trainer's arguments with the VQA recipe as defaults (arXiv 2303.07226, A.2; where it is silent, VLMo's).

    Args:
        warmup_fraction: share of the steps with linear warm-up; `warmup_steps` above 0 takes its place.
    """

    output_dir: str = "hf_finetuned"
    do_train: bool = True
    num_train_epochs: float = 10.0
    per_device_train_batch_size: int = 16
    per_device_eval_batch_size: int = 32
    learning_rate: float = 3e-5
    weight_decay: float = 0.01
    adam_beta2: float = 0.98
    max_grad_norm: float = 0.0
    warmup_fraction: float = 0.1
    report_to: Union[None, str, list[str]] = "none"

    def __post_init__(self) -> None:
        if self.deepspeed and (self.bf16 or self.fp16):
            raise InputError(
                "--bf16 and --fp16 do not go with --deepspeed: torch_autocast in its file says the "
                "precision, and leaves the routers in fp32"
            )
        super().__post_init__()
        # The collator needs columns that are no inputs of the model.
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        # Logits of all samples and thousands of answers need not be held at once.
        self.batch_eval_metrics = True

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of the warm-up."""
        return int(self.warmup_steps) or math.ceil(num_training_steps * self.warmup_fraction)


class Samples(Dataset):
    """The samples of a split.

    Args:
        rows: objects with `image` (a path) and `target`; vqa: `question`, and a score for every label.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def read_json(path: Path, key: str) -> list[Any]:
    """The list under a key of a JSON file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: not found") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error})") from None
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, list) or not value:
        raise InputError(f"{path}: has no list {key!r}")
    return value


def find(root: Path, *names: str) -> Path:
    """The first of some places under a folder that exists."""
    for name in names:
        if (root / name).exists():
            return root / name
    raise InputError(f"{root / names[0]}: not found")


def read_annotations(root: Path, part: str) -> list[dict[str, Any]]:
    """The annotations of a part of VQAv2, train2014 or val2014."""
    name = f"v2_mscoco_{part}_annotations.json"
    path = find(root, name, f"annotations/{name}")
    rows, seen = read_json(path, "annotations"), set()
    for number, row in enumerate(rows):
        try:
            row["multiple_choice_answer"], [answer["answer"] for answer in row["answers"]]
            key = row["question_id"]
        except (KeyError, TypeError):
            raise InputError(f"{path}: annotation entry {number} is incomplete") from None
        if key in seen:
            raise InputError(f"{path}: annotation entry {number}: question {key} has one already")
        seen.add(key)
    return rows


def answer_vocabulary(root: Path, min_count: int) -> list[str]:
    """Main answers that are frequent enough in train2014 and val2014, in the order of their first appearance."""
    rows = [row for part in ("train2014", "val2014") for row in read_annotations(root, part)]
    counts = Counter(row["multiple_choice_answer"] for row in rows)
    return [answer for answer, count in counts.items() if count >= min_count]


def vqa_samples(root: Path, part: str, labels: Sequence[str], drop_unanswerable: bool) -> Samples:
    """Questions of train2014 or val2014 with the score of every answer of the vocabulary."""
    name = f"v2_OpenEnded_mscoco_{part}_questions.json"
    path = find(root, name, f"questions/{name}")
    folder = find(root, part, f"images/{part}")
    images = {file.name for file in folder.iterdir()}
    answers = {
        row["question_id"]: Counter(answer["answer"] for answer in row["answers"])
        for row in read_annotations(root, part)
    }
    label_of = {answer: label for label, answer in enumerate(labels)}
    rows = []
    for number, row in enumerate(read_json(path, "questions")):
        try:
            key, question, image = row["question_id"], row["question"], int(row["image_id"])
            # Each is taken once.
            said = answers.pop(key)
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}: question entry {number} is incomplete, came before or has no annotation"
            ) from None
        file = f"COCO_{part}_{image:012d}.jpg"
        if file not in images:
            raise InputError(f"{path}: question {key}: no image {folder / file}")
        target = {label_of[a]: SOFT_SCORES[min(n, 4)] for a, n in said.items() if a in label_of}
        if target or not drop_unanswerable:
            rows.append({"image": str(folder / file), "question": question, "target": target})
    return Samples(rows)


def class_folders(root: Path) -> list[str]:
    """Names of the folders with images to train on."""
    names = [path.name for path in data_folders(find(root, "train"))]
    if not names:
        raise InputError(f"{root / 'train'}: no class folder in it")
    return names


def data_folders(root: Path) -> list[Path]:
    """The folders in a folder, without hidden ones and those beside the data, in sorted order."""
    folders = (path for path in root.iterdir() if path.is_dir())
    return sorted(path for path in folders if path.name[0] != "." and path.name not in SIDE_FOLDERS)


def class_samples(root: Path, split: str, labels: Sequence[str]) -> Samples:
    """Images of `SPLIT/CLASS/`."""
    rows, others = [], Counter[str]()
    for folder in data_folders(find(root, split)):
        if folder.name not in labels:
            raise InputError(f"{folder}: is no class of the model or of train")
        for file in sorted(path for path in folder.iterdir() if path.name[0] != "."):
            if file.suffix.lower() in IMAGE_ENDINGS:
                rows.append({"image": str(file), "target": labels.index(folder.name)})
            else:
                others[file.suffix.lower() or "files without suffix"] += 1
    if others:
        found = ", ".join(f"{kind} {count}" for kind, count in sorted(others.items()))
        print(f"{root / split}: passed over: {found}", file=sys.stderr)
    return Samples(rows)


def choose_labels(options: Options, config: Any) -> list[str]:
    """The classes: those of `--labels`, or else of a model of the same task, or else those of the data."""
    root, folder = Path(options.data), Path(options.model)
    if options.labels:
        return [str(label) for label in read_json(Path(options.labels), "labels")]
    own = []
    if config.task == options.task:
        own = [config.id2label[index] for index in range(config.num_labels)]
        if (folder / "labels.json").is_file():
            # Class ids, where id2label has words for people.
            own = read_json(folder / "labels.json", "labels")
    if options.task == "vqa":
        labels = own or answer_vocabulary(root, options.min_answer_count)
    else:
        found = class_folders(root)
        labels = own if set(found) <= set(own) else found
    if not labels:
        raise InputError(f"{root}: no answer occurs {options.min_answer_count} times")
    return labels


def load_datasets(options: Options, labels: Sequence[str]) -> tuple[Dataset, Dataset]:
    """Samples to train on and to evaluate on."""
    root = Path(options.data)
    pair: tuple[Dataset, Dataset]
    if options.task == "vqa":
        # A question that no class answers teaches nothing, but counts as wrong in an evaluation.
        pair = (
            vqa_samples(root, "train2014", labels, drop_unanswerable=True),
            vqa_samples(root, "val2014", labels, drop_unanswerable=False),
        )
    else:
        pair = (class_samples(root, "train", labels), class_samples(root, "val", labels))
    limits = (options.max_train_samples, options.max_eval_samples)
    cut = [
        Subset(samples, range(min(limit, len(samples)))) if limit else samples
        for samples, limit in zip(pair, limits)
    ]
    if not all(len(samples) for samples in cut):
        raise InputError(f"{root}: no sample to train or to evaluate on")
    return cut[0], cut[1]


@dataclass
class Collator:
    """Rows to the inputs of a model.

    Args:
        processor: of the export; reads image files and cuts questions to the length of training.
        num_labels: C.
        task: vqa gives labels as scores ``[n, C]``, imagenet as classes ``[n]``.
    """

    processor: Any
    num_labels: int
    task: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Inputs and labels of a batch."""
        inputs: dict[str, Any] = {"images": [row["image"] for row in rows]}
        if self.task == "vqa":
            inputs["text"] = [row["question"] for row in rows]
        try:
            batch = dict(self.processor(**inputs, return_tensors="pt"))
        except ValueError as error:
            raise InputError(str(error)) from error
        if self.task == "imagenet":
            return {**batch, "labels": torch.tensor([row["target"] for row in rows])}
        scores = torch.zeros(len(rows), self.num_labels)
        for number, row in enumerate(rows):
            for label, score in row["target"].items():
                scores[number, label] = score
        return {**batch, "labels": scores}


class MeanScore:
    """Mean score of the chosen classes in percent, over the batches of an evaluation.

    Args:
        name: of the metric.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.total = 0.0
        self.count = 0

    def __call__(self, prediction: Any, compute_result: bool = False) -> dict[str, float]:
        """Adds a batch of classes ``[n]`` and labels; with `compute_result` the mean since the last one."""
        chosen, labels = (torch.as_tensor(x) for x in prediction)
        if labels.dim() == 2:
            scores = labels.float().gather(1, chosen.unsqueeze(1)).squeeze(1)
        else:
            scores = (chosen == labels).float()
        self.total += scores.double().sum().item()
        self.count += len(scores)
        if not compute_result:
            return {}
        result = {self.name: 100.0 * self.total / max(1, self.count)}
        self.total, self.count = 0.0, 0
        return result


def chosen_classes(logits: Any, labels: Tensor) -> Tensor:
    """Classes ``[n]`` of logits ``[n, C]``."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=1)


def is_expert(name: str) -> bool:
    """Whether a parameter is of an expert or a router."""
    return ".experts." in name or ".router." in name


def freeze(model: PreTrainedModel, options: Options) -> None:
    """Leaves what the task does not reach as it is, and routers and experts unless they are to be trained."""
    model.freeze_unreached()
    for name, parameter in model.named_parameters():
        if is_expert(name) and not options.train_experts:
            parameter.requires_grad_(False)


def rate_scale(name: str, options: Options, config: Any) -> float:
    """Factor of the learning rate of a parameter."""
    if name.startswith("pooler."):
        return 1.0
    if not name.startswith("vlmoe."):
        return options.head_lr_multiplier
    if "embeddings." in name:
        return options.layer_decay ** (config.num_hidden_layers + 1)
    _, inside, rest = name.partition("encoder.layer.")
    if not inside:
        return 1.0
    return options.layer_decay ** (config.num_hidden_layers - int(rest.split(".")[0]))


def has_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for a parameter: matrices, but no positions, biases or factors."""
    if name.endswith(("_bias", "position_embeddings", "cls_token", "mask_token")):
        return False
    # With ZeRO-3 the parameter itself is only a piece.
    return len(getattr(parameter, "ds_shape", parameter.shape)) > 1


class VLMoETrainer(Trainer):
    """Trainer with AdamW whose rates differ between head, blocks and embeddings.

    Args:
        options: the rates.
        **kwargs: of Trainer.
    """

    def __init__(self, options: Options, **kwargs: Any) -> None:
        self.options = options
        super().__init__(**kwargs)
        # The model's loss is a mean of the batch: Trainer has to divide it by the accumulated batches.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """The model's loss; in training of experts with the auxiliary losses of their routers."""
        if self.options.train_experts and model.training:
            inputs = {**inputs, "output_router_logits": True}
        return super().compute_loss(model, inputs, **kwargs)

    def create_optimizer(self, *unused: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW; also with DeepSpeed, which takes it as it is."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decay = self.args.weight_decay if has_decay(name, parameter) else 0.0
                scale = rate_scale(name, self.options, self.model.config)
                groups.setdefault((scale, decay), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "lr": self.args.learning_rate * scale,
                    "weight_decay": decay,
                }
                for (scale, decay), parameters in groups.items()
            ],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer


def load_model(options: Options, config: Any, labels: Sequence[str]) -> PreTrainedModel:
    """The model of the task, with a new head where the export has none for these labels."""
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.task = options.task
    kind = "multi" if options.task == "vqa" else "single"
    config.problem_type = f"{kind}_label_classification"
    # Read when the model is imported again: it goes on as it was trained here.
    sections = {name: dict(section) for name, section in config.training.items()}
    sections.setdefault("moe", {})["train_experts"] = options.train_experts
    config.training = sections
    return getattr(transformers, AUTO_MODELS[options.task]).from_pretrained(
        options.model,
        config=config,
        trust_remote_code=True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
    )


def start_deepspeed(arguments: Arguments) -> None:
    """Starts DeepSpeed's communication on CPUs before ZeRO-3 cuts the model; on GPUs Trainer has done so."""
    if arguments.deepspeed and arguments.use_cpu:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def run(options: Options, arguments: Arguments) -> None:
    """Trains, evaluates and saves."""
    start_deepspeed(arguments)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(options.model, trust_remote_code=True)
    labels = choose_labels(options, config)
    train, evaluation = load_datasets(options, labels)
    transformers.set_seed(arguments.seed)
    model = load_model(options, config, labels)
    freeze(model, options)
    trainer = VLMoETrainer(
        options=options,
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=Collator(processor, len(labels), options.task),
        processing_class=processor,
        compute_metrics=MeanScore(METRICS[options.task]),
        preprocess_logits_for_metrics=chosen_classes,
    )
    if arguments.do_train:
        result = trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


def main() -> int:
    """Reads the command line; the exit status."""
    try:
        options, arguments = HfArgumentParser((Options, Arguments)).parse_args_into_dataclasses()
        if not (Path(options.model) / "config.json").is_file():
            raise InputError(f"--model {options.model}: no exported model (config.json) there")
        run(options, arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
