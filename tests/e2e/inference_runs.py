"""What processes of their own do in the tests of inference: real command lines, and a script with several models."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

# A model as small as the parallel layouts allow.
SMALL = """
--task.architecture tiny-8e --model.num_layers 4 --model.hidden_size 64 --model.num_attention_heads 4
--model.ffn_hidden_size 128 --model.num_vl_layers 1 --model.image_size 32 --model.patch_size 8
--model.text_length 24 --model.pair_text_length 24 --moe.layers 2 3 --moe.num_vision_experts 8
--moe.num_text_experts 4 --task.micro_batch_size 4 --task.global_batch_size 8 --task.eval_micro_batch_size 6
--model.layer_scale_init 1 --model.init_std 0.1 --model.init_sincos_std 0 --model.init_qk_correlation 0
--task.eval_epochs 0 --task.report_examples 0
--contrastive.matching_weight 1 --data.pixel_std 0.5 0.5 0.5 --data.num_workers 0 --train.steps 2 --optim.lr 0.01
""".split()
SPLITS = {
    "vqa": "val",
    "nlvr2": "dev",
    "retrieval": "val",
    "imagenet": "val",
    "mnli": "dev_matched",
}
# The arguments of each method, in the order in which a sample has its images, then its texts.
FIELDS = {
    "vqa": ("image", "question"),
    "nlvr2": ("left", "right", "sentence"),
    "retrieval": ("image", "text"),
    "imagenet": ("image",),
    "mnli": ("premise", "hypothesis"),
}


def alone() -> None:
    """Forgets the launcher: a process of a script that knows nothing of it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        os.environ.pop(name, None)


def command_lines(
    lines: Sequence[Sequence[str]], launched: bool = False
) -> list[tuple[int, str, str]]:
    """Runs command lines one after another; status, stdout and stderr of each."""
    from megatron_vlmoe.commands.main import main

    if not launched:
        alone()
    results = []
    for words in lines:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(words))
        results.append((code, out.getvalue(), err.getvalue()))
    return results


def samples(prefix: str, task: str) -> list[dict[str, Any]]:
    """What a prepared split asks about: encoded images and raw texts by the names of the arguments."""
    from megatron_vlmoe.data.task_dataset import TaskDataset

    dataset = TaskDataset.open(f"{prefix}_{SPLITS[task]}", task, None)
    rows = [dataset.row(number) for number in range(len(dataset))]
    values = [[*(bytes(dataset.image_bytes(i)) for i in row.images), *row.raw] for row in rows]
    return [dict(zip(FIELDS[task], own, strict=True)) for own in values]


def methods(model: Any) -> dict[str, Callable[..., Any]]:
    """What can be asked of a model, by name."""
    return {
        "vqa": {"answer": lambda **given: model.answer(**given, top_k=5)},
        "nlvr2": {"reason": model.reason},
        "retrieval": {"score": model.score, "match": model.match},
        "imagenet": {"classify": model.classify},
        "mnli": {"entail": model.entail},
    }[model.task]


def plain(value: Any) -> Any:
    """Results as tuples and dictionaries, which can be compared and sent."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [plain(item) for item in value] if isinstance(value, list) else value


def ask_all(runs: Mapping[str, str], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Loads a model of every task into this one process and asks each about its split.

    Returns:
        By task and method the results of all samples at once, of the first ones alone, and of the first ones in a
        batch with the paper's capacity.
    """
    from megatron_vlmoe.inference import VLMoE

    alone()
    models = {task: VLMoE.from_checkpoint(run, batch_size=7) for task, run in runs.items()}
    found: dict[str, Any] = {}
    for task, model in models.items():
        given = samples(prefixes[task], task)
        columns = {name: [own[name] for own in given] for name in FIELDS[task]}
        for name, method in methods(model).items():
            found[f"{task}.{name}"] = {
                "together": plain(method(**columns)),
                "alone": [plain(method(**own)) for own in given[:4]],
            }
    found["retrieval.features"] = features(models["retrieval"], prefixes["retrieval"])
    found["dropping"] = dropping(runs["vqa"], samples(prefixes["vqa"], "vqa")[:7])
    found["errors"] = errors(models)
    found["checkpoints"] = {task: str(model.checkpoint) for task, model in models.items()}
    return found


def features(model: Any, prefix: str) -> dict[str, Any]:
    """Vectors of the images in the order of their documents, and of all captions."""
    from megatron_vlmoe.data.task_dataset import TaskDataset

    dataset = TaskDataset.open(f"{prefix}_val", "retrieval", None)
    images = [bytes(dataset.image_bytes(number)) for number in range(dataset.num_images)]
    captions = [dataset.row(number).raw[0] for number in range(len(dataset))]
    texts = model.encode_text([f"  {caption}\n" for caption in captions])
    return {"images": model.encode_image(images), "texts": texts}


def dropping(run: str, given: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores of the same questions, together and alone, where experts have the paper's capacity."""
    from megatron_vlmoe.inference import VLMoE

    model = VLMoE.from_checkpoint(run, capacity_factor=1.0)
    together = model.answer(**{name: [own[name] for own in given] for name in FIELDS["vqa"]})
    return {
        "together": [answer.score for answer in together],
        "alone": [model.answer(**own).score for own in given],
    }


def errors(models: Mapping[str, Any]) -> dict[str, str]:
    """What is said about wrong requests."""
    vqa, retrieval = models["vqa"], models["retrieval"]
    requests: dict[str, Callable[[], Any]] = {
        "other task": lambda: vqa.classify(b""),
        "no projections": lambda: vqa.encode_text("a circle"),
        "no labels": lambda: retrieval.answer(b"", "what?"),
        "damaged": lambda: vqa.answer([b"GIF89a", b"GIF89a"], "what?"),
        "no file": lambda: retrieval.encode_image(Path("no") / "such.jpg"),
        "empty": lambda: retrieval.encode_text(["a", " "]),
        "lengths": lambda: retrieval.score(["a.jpg", "b.jpg"], ["a", "b", "c"]),
        "top_k": lambda: models["imagenet"].classify([], top_k=0),
    }
    return {name: refusal(request) for name, request in requests.items()}


def refusal(request: Callable[[], Any]) -> str:
    """Kind and text of the error that a request ends with."""
    try:
        request()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def loading_errors(cases: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, str]:
    """What is said about checkpoints that cannot be loaded."""
    from megatron_vlmoe.inference import VLMoE

    alone()
    return {
        name: refusal(lambda path=path, more=more: VLMoE.from_checkpoint(path, **more))
        for name, (path, more) in cases.items()
    }


def generators_and_groups(run: str) -> dict[str, Any]:
    """Loads a model in a process that has drawn numbers and started torch.distributed by itself."""
    import random

    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_vlmoe.inference import VLMoE

    alone()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    model = VLMoE.from_checkpoint(run)
    return {"expected": expected, "drawn": draw(), "labels": model.labels}


def in_a_group(run: str) -> str:
    """Loads a model in one of several processes."""
    from megatron_vlmoe.inference import VLMoE

    return refusal(lambda: VLMoE.from_checkpoint(run))
