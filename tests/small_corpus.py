"""A small corpus, made by the command lines of the contract, and runs on it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import Outcome, run, tool

SMALL_MODEL = """
--preset tiny-8e --model.num_layers 4 --model.hidden_size 32 --model.num_attention_heads 4
--model.ffn_hidden_size 64 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8
--model.text_length 16 --model.pair_text_length 24 --model.drop_path 0.2
--moe.layers 2 3 --moe.num_vision_experts 4 --moe.num_text_experts 2
--data.micro_texts 2 --data.micro_images 2 --data.micro_pairs 2
--data.global_texts 4 --data.global_images 4 --data.global_pairs 4
--model.init_std 0.05 --model.layer_scale_init 0.1 --data.pixel_std 0.5 0.5 0.5
--data.crop_scale_min 0.5 --data.flip_probability 0.5 --data.pair_unit image --data.num_workers 0
--optim.lr_warmup_steps 1 --log.interval 1
--train.eval_steps 1 --train.seed 5
""".split()
# Nothing is dropped: every layout computes the same.
ROOMY = "--moe.capacity_factor 8 --moe.eval_capacity_factor 8".split()


@dataclass(frozen=True)
class Corpus:
    """Folder with the raw files under `raw/`, and the indexed datasets and tokenizers beside it."""

    folder: Path

    @property
    def data(self) -> list[str]:
        """The data options of the contract, relative to the folder."""
        return (
            "--data.text text_train --data.images images_train --data.pairs pairs_train"
            " --data.text_tokenizer text.model --data.image_tokenizer image_tokenizer"
        ).split()

    def words(self, save: Path | str, steps: int, *more: str) -> list[str]:
        """A pretraining of the small model, to be run in the folder."""
        steps_and_save = ["--train.steps", str(steps), "--save", str(save)]
        return ["pretrain", *SMALL_MODEL, *self.data, *steps_and_save, *more]

    def pretrain(self, save: Path | str, steps: int, *more: str, ranks: int = 0) -> Outcome:
        """Runs it in a process of its own, or in several that are one run."""
        words = self.words(save, steps, *more)
        return run("-m", "megatron_vlmoe", *words, cwd=self.folder, timeout=300, ranks=ranks)

    def torchrun(self, save: Path | str, steps: int, *more: str) -> Outcome:
        """Runs it in two processes, which torchrun starts."""
        words = self.words(save, steps, *more)
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m".split()
        return run(*launcher, "megatron_vlmoe", *words, cwd=self.folder, timeout=300)


def make_corpus(folder: Path) -> Corpus:
    """Makes it with relative paths, from a folder that is not the repository."""
    model = "text.model"
    coco = "raw/coco/annotations/captions_train2014.json"
    lines = [
        "make_sample_corpus --output raw --num-images 60 --seed 3",
        f"train_text_tokenizer --input raw/text/train.jsonl {coco} --vocab-size 200 --output-prefix text",
        "preprocess_text --input raw/text/train.jsonl --output-prefix text_train"
        f" --tokenizer-model {model} --workers 1",
        "preprocess_images --input raw/images/train --output-prefix images_train --workers 2",
        f"preprocess_pairs --format coco --annotations {coco} --images raw/coco/train2014"
        f" --output-prefix pairs_train --tokenizer-model {model} --workers 1",
        "train_image_tokenizer --images images_train pairs_train --output image_tokenizer --preset tiny"
        " --image-size 32 --patch-size 8 --num-codes 64 --steps 6 --batch-size 16 --seed 1",
    ]
    for line in lines:
        name, *words = line.split()
        tool(name, *words, cwd=folder).succeeded()
    return Corpus(folder)


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl; NaN is no JSON and fails."""

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} in {run_folder}/metrics.jsonl")

    text = (run_folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def assert_same_metrics(
    actual: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float = 0.0
) -> None:
    """Steps, losses, accuracies, MoE statistics and gradient norms; times may differ."""
    measured = ("second", "data_wait", "memory", "mfu", "flops")
    assert [record["step"] for record in actual] == [record["step"] for record in expected]
    for left, right in zip(actual, expected):
        for key in left.keys() | right.keys():
            if any(word in key for word in measured):
                continue
            assert key in left and key in right, f"step {right['step']}: {key} is in one run only"
            assert math.isclose(left[key], right[key], rel_tol=tolerance, abs_tol=tolerance), (
                f"step {right['step']}: {key}: {left[key]} and {right[key]}"
            )
