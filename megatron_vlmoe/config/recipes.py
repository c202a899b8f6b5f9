"""Fine-tuning recipes: what a task changes of a pretrained model's configuration (paper sections 4.2, 4.3, A.2).

A recipe keeps the architecture and replaces the rest. Where the paper is silent, VLMo's values are taken (for VQA and
NLVR2 its batch sizes, epochs and learning rates are the paper's), for ImageNet BEiT's; docs/fidelity.md has the table.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Callable

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.hints import unknown_name
from megatron_vlmoe.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vlmoe.config.task_schema import (
    ContrastiveConfig,
    FinetuneConfig,
    TaskConfig,
)
from megatron_vlmoe.config.tasks import TASKS, find_task, load_code, task_names

# Tokens of a question, sentence or caption (VLMo).
TEXT_LENGTH = 40


def finetune_recipe(
    base: RunConfig,
    task: TaskConfig,
    *,
    lr: float,
    image_size: int = 384,
    text_length: int = TEXT_LENGTH,
    drop_path: float = 0.1,
    layer_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    weight_decay: float = 0.01,
    crop_scale_min: float = 0.5,
) -> FinetuneConfig:
    """A recipe on an architecture: `model` and `moe` with changes; every other section starts anew."""
    model = replace(
        base.model,
        image_size=image_size,
        text_length=text_length,
        pair_text_length=text_length,
        drop_path=drop_path,
    )
    optim = OptimConfig(
        lr=lr,
        min_lr=0.0,
        lr_warmup_steps=-1,
        lr_decay_style="linear",
        layer_decay=layer_decay,
        head_lr_multiplier=head_lr_multiplier,
        weight_decay=weight_decay,
        adam_beta2=0.98,
        clip_grad=0.0,
    )
    data = DataConfig(
        text_tokenizer=base.data.text_tokenizer,
        crop_scale_min=crop_scale_min,
        color_jitter=0.0,
        pixel_mean=base.data.pixel_mean,
        pixel_std=base.data.pixel_std,
        num_workers=base.data.num_workers,
    )
    return FinetuneConfig(
        model=model,
        # Routers and experts stay as pretraining left them (paper section 4.1, after ST-MoE).
        moe=replace(base.moe, train_experts=False),
        objectives=ObjectivesConfig(),
        data=data,
        optim=optim,
        train=TrainConfig(steps=0, eval_interval=0, eval_steps=1, precision=base.train.precision),
        checkpoint=CheckpointConfig(save_interval=0, keep_last=1),
        log=LogConfig(),
        task=task,
    )


def _vqa(base: RunConfig) -> FinetuneConfig:
    """VQA v2: 480 pixels, 10 epochs of 128, lr 3e-5 (paper A.2); the rest as VLMo."""
    task = TaskConfig(name="vqa", rand_augment="vl")
    return finetune_recipe(
        base, task, lr=3e-5, image_size=480, drop_path=0.15, head_lr_multiplier=20.0
    )


def _nlvr2(base: RunConfig) -> FinetuneConfig:
    """NLVR2: 384 pixels, 10 epochs of 128, lr 5e-5 (paper A.2)."""
    return finetune_recipe(base, TaskConfig(name="nlvr2", rand_augment="vl"), lr=5e-5)


def _nlvr2_ablation(base: RunConfig) -> FinetuneConfig:
    """NLVR2 of Table 3: 224 pixels, lr 5e-5 or 1e-4, mean of three runs (paper A.2)."""
    task = TaskConfig(name="nlvr2", rand_augment="vl", seeds=(1, 2, 3))
    return finetune_recipe(base, task, lr=1e-4, image_size=224)


def _retrieval(epochs: float, batch: int) -> TaskConfig:
    return TaskConfig(
        name="retrieval",
        epochs=epochs,
        global_batch_size=batch,
        eval_micro_batch_size=64,
        rand_augment="vl",
    )


def _with_cache(config: FinetuneConfig) -> FinetuneConfig:
    """Negatives from the whole batch on any number of GPUs."""
    return replace(config, contrastive=ContrastiveConfig(cache=True))


def _coco(base: RunConfig) -> FinetuneConfig:
    """COCO retrieval: 384 pixels, 20 epochs of 2,048, lr 2e-5 (paper A.2)."""
    return _with_cache(finetune_recipe(base, _retrieval(20.0, 2048), lr=2e-5, drop_path=0.2))


def _flickr30k(base: RunConfig) -> FinetuneConfig:
    """Flickr30K retrieval from the COCO-fine-tuned model: 384 pixels, 40 epochs of 2,048, lr 1e-5 (paper A.2)."""
    return _with_cache(finetune_recipe(base, _retrieval(40.0, 2048), lr=1e-5, drop_path=0.15))


def _flickr30k_ablation(base: RunConfig) -> FinetuneConfig:
    """Flickr30K of Table 3: 224 pixels, 10 epochs of 1,024, lr 5e-5 (paper A.2)."""
    return _with_cache(
        finetune_recipe(base, _retrieval(10.0, 1024), lr=5e-5, image_size=224, drop_path=0.15)
    )


def _imagenet(base: RunConfig) -> FinetuneConfig:
    """ImageNet-1K: 384 pixels, 15 epochs of 2,048, lr 3e-5 (paper A.2)."""
    task = TaskConfig(
        name="imagenet",
        epochs=15.0,
        global_batch_size=2048,
        micro_batch_size=64,
        label_smoothing=0.1,
        rand_augment="imagenet",
        random_erase=0.25,
    )
    return finetune_recipe(
        base, task, lr=3e-5, layer_decay=0.85, weight_decay=0.05, crop_scale_min=0.08
    )


def _imagenet22k(base: RunConfig) -> FinetuneConfig:
    """Intermediate step on ImageNet-22K before ImageNet-1K (paper 4.3; BEiT's values)."""
    task = TaskConfig(
        name="imagenet",
        epochs=90.0,
        global_batch_size=4096,
        micro_batch_size=128,
        label_smoothing=0.1,
        mixup=0.8,
        cutmix=1.0,
        rand_augment="imagenet",
        random_erase=0.25,
    )
    return finetune_recipe(
        base,
        task,
        lr=3e-3,
        image_size=224,
        drop_path=0.2,
        layer_decay=0.65,
        weight_decay=0.05,
        crop_scale_min=0.08,
    )


def _imagenet_ablation(base: RunConfig) -> FinetuneConfig:
    """ImageNet-1K of Table 3: the recipe at 224 pixels."""
    config = _imagenet(base)
    return replace(config, model=replace(config.model, image_size=224))


def _mnli(base: RunConfig) -> FinetuneConfig:
    """MNLI: 10 epochs of 32, lr 3e-5 (paper A.2); texts of the pretraining length."""
    task = TaskConfig(name="mnli", global_batch_size=32)
    return finetune_recipe(
        base, task, lr=3e-5, image_size=base.model.image_size, text_length=base.model.text_length
    )


def _sample(
    task: TaskConfig, *, lr: float, text_length: int = 0, matching: bool = True
) -> Callable[[RunConfig], FinetuneConfig]:
    """A task of the sample corpus: a minute or two on one CPU core, from a tiny model.

    Args:
        task: batch and epochs.
        lr: peak learning rate.
        text_length: tokens of nearly all of the task's texts, longer ones are cut; 0 is the pretraining's.
        matching: whether retrieval trains with pairs.
    """

    def recipe(base: RunConfig) -> FinetuneConfig:
        config = finetune_recipe(
            base,
            task,
            lr=lr,
            image_size=base.model.image_size,
            drop_path=0.0,
            text_length=text_length or max(base.model.text_length, base.model.pair_text_length),
            # A crop or a flip would make "at the top left" false.
            crop_scale_min=1.0,
        )
        return replace(
            config,
            data=replace(config.data, flip_probability=0.0, pair_flip_probability=0.0),
            optim=replace(config.optim, clip_grad=3.0, adam_beta2=0.999),
            # Most patches of such a picture are plain background and go to the same expert: a capacity would drop them.
            moe=replace(config.moe, capacity_factor=0.0, eval_capacity_factor=0.0),
            contrastive=replace(config.contrastive, matching_weight=float(matching)),
        )

    return recipe


def _sample_task(name: str, batch: int, epochs: float, micro: int = 16) -> TaskConfig:
    """Evaluates at the end alone."""
    return TaskConfig(
        name=name,
        micro_batch_size=min(micro, batch),
        global_batch_size=batch,
        eval_micro_batch_size=32,
        epochs=epochs,
        eval_epochs=0.0,
    )


RECIPES: dict[str, Callable[[RunConfig], FinetuneConfig]] = {
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "coco": _coco,
    "flickr30k": _flickr30k,
    "imagenet": _imagenet,
    "imagenet22k": _imagenet22k,
    "mnli": _mnli,
    "nlvr2-ablation": _nlvr2_ablation,
    "flickr30k-ablation": _flickr30k_ablation,
    "imagenet-ablation": _imagenet_ablation,
    "sample-vqa": _sample(_sample_task("vqa", 8, 1.2), lr=5e-4, text_length=16),
    "sample-nlvr2": _sample(_sample_task("nlvr2", 16, 1.4), lr=5e-4, text_length=20),
    # Pairs would take five times as long; recall without re-ranking comes from the dot products alone.
    "sample-retrieval": _sample(
        _sample_task("retrieval", 32, 1.2, micro=32), lr=1e-3, text_length=32, matching=False
    ),
    "sample-imagenet": _sample(_sample_task("imagenet", 32, 12.0), lr=1e-3),
    "sample-mnli": _sample(_sample_task("mnli", 32, 1.5), lr=5e-4, text_length=44),
}


def plain(base: RunConfig, name: str) -> FinetuneConfig:
    """The recipe of a task that has none of its own: as NLVR2's, at the image size of pretraining."""
    return finetune_recipe(base, TaskConfig(name=name), lr=5e-5, image_size=base.model.image_size)


def recipe_names() -> tuple[str, ...]:
    """Every fine-tuning recipe; that of a plug-in's task is named as the task."""
    return (*RECIPES, *(name for name in task_names() if name not in TASKS))


def default_recipe(task: str) -> str:
    """The name of a task's recipe. Raises ConfigError if there is no such task."""
    spec = find_task(task)
    return spec.recipe if task in TASKS else task


def apply_recipe(name: str, base: RunConfig) -> FinetuneConfig:
    """The fine-tuning configuration of a recipe for a model.

    Args:
        name: recipe.
        base: the pretraining run, or a preset, whose architecture is fine-tuned.

    Raises:
        ConfigError: if there is no such recipe, or it does not load.
    """
    if name in RECIPES:
        return RECIPES[name](base)
    if name not in recipe_names():
        raise ConfigError(f"--preset {name}: {unknown_name(name, recipe_names())}")
    recipe = find_task(name).recipe
    if not recipe:
        return plain(base, name)
    config: FinetuneConfig = (RECIPES[recipe] if recipe in RECIPES else load_code(recipe))(base)
    return replace(config, task=replace(config.task, name=name))
