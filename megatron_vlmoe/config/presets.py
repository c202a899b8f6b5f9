"""What ``--preset`` names: sizes for pretraining, and recipes for fine-tuning.

A preset is a size times a number of experts. Ablations are options on top, never copies.

A recipe is what a task changes of a pretrained model's configuration (paper sections 4.2, 4.3, A.2): it keeps the
architecture and replaces the rest. Where the paper is silent, VLMo's values are taken (for VQA and NLVR2 its batch
sizes, epochs and learning rates are the paper's), for ImageNet BEiT's; docs/fidelity.md has the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from megatron_vlmoe.config.errors import ConfigError, unknown_name
from megatron_vlmoe.config.schema import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    ObjectivesConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megatron_vlmoe.config.task_schema import ContrastiveConfig, FinetuneConfig, TaskConfig
from megatron_vlmoe.config.tasks import TASKS, find_task, load_code, task_names

EXPERTS = {"dense": 0, "8e": 8, "16e": 16, "32e": 32}

SIZES = {
    # A model for the quick start and tests: minutes on two CPU cores.
    "tiny": RunConfig(
        model=ModelConfig(
            num_layers=4,
            hidden_size=128,
            num_attention_heads=4,
            ffn_hidden_size=512,
            num_vl_layers=1,
            # Two by two patches for each of the nine places where the sample corpus puts shapes.
            image_size=96,
            patch_size=16,
            text_length=64,
            pair_text_length=40,
            # BEiT's values are made for long runs; with these a model attends by position within 200 steps.
            layer_scale_init=1.0,
            drop_path=0.0,
            init_std=0.2,
            # Attention that starts near a token's own place leaves the plateau of the losses in half as many steps.
            init_sincos_std=0.15,
            init_qk_correlation=0.8,
        ),
        # Every second block below the VL block would be a single one.
        moe=MoEConfig(layers=(2, 3)),
        objectives=ObjectivesConfig(min_mask_block=4),
        data=DataConfig(
            # Small batches: a short run learns by its number of steps.
            micro_texts=2,
            micro_images=8,
            micro_pairs=12,
            global_texts=4,
            global_images=16,
            global_pairs=24,
            eval_fraction=0.1,
            num_workers=1,
            pair_unit="image",
            # A crop or a flip would make "at the top left" false.
            crop_scale_min=1.0,
            color_jitter=0.0,
            flip_probability=0.0,
            pair_flip_probability=0.0,
            # Plain ground is the same in all of a patch's pixels: at BEiT's 0.5 its projection would be many times
            # as large as the positions, and attention could not tell one patch of it from another.
            pixel_std=(8.0, 8.0, 8.0),
        ),
        optim=OptimConfig(lr=2e-3, lr_warmup_steps=50, min_lr=1e-5, adam_beta2=0.98),
        train=TrainConfig(steps=2000, eval_interval=500, eval_steps=16),
        checkpoint=CheckpointConfig(save_interval=500),
        log=LogConfig(interval=20),
    ),
    # SMALL of the paper: 8 blocks, 384 wide, VL-FFN in block 8.
    "small": RunConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=384,
            num_attention_heads=6,
            ffn_hidden_size=1536,
            num_vl_layers=1,
        )
    ),
    # BASE of the paper: 12 blocks, 768 wide, VL-FFN from block 10.
    "base": RunConfig(),
    # ViT-L widths with VLMo's three VL blocks and BEiT's LayerScale for large models.
    "large": RunConfig(
        model=ModelConfig(
            num_layers=24,
            hidden_size=1024,
            num_attention_heads=16,
            ffn_hidden_size=4096,
            num_vl_layers=3,
            layer_scale_init=1e-5,
        ),
        data=DataConfig(micro_texts=32, micro_images=32, micro_pairs=32),
    ),
}


def preset_names() -> tuple[str, ...]:
    """Every preset, as `SIZE-EXPERTS`."""
    return tuple(f"{size}-{experts}" for size in SIZES for experts in EXPERTS)


def preset(name: str, option: str = "--preset") -> RunConfig:
    """The run configuration of a preset. Raises ConfigError, naming `option`, if there is no such preset."""
    size, _, experts = name.partition("-")
    if size not in SIZES or experts not in EXPERTS:
        raise ConfigError(f"{option} {name}: {unknown_name(name, preset_names())}")
    config, count = SIZES[size], EXPERTS[experts]
    if count == 0:
        return replace(config, moe=MoEConfig())
    own = replace(config.moe, num_vision_experts=count, num_text_experts=count)
    return replace(config, moe=own)


def finetune_recipe(
    base: RunConfig,
    task: TaskConfig,
    *,
    lr: float,
    image_size: int = 384,
    text_length: int = 40,
    drop_path: float = 0.1,
    layer_decay: float = 1.0,
    head_lr_multiplier: float = 1.0,
    weight_decay: float = 0.01,
    crop_scale_min: float = 0.5,
    cache: bool = False,
) -> FinetuneConfig:
    """A recipe on an architecture: `model` and `moe` with changes; every other section starts anew.

    An `image_size` or `text_length` of 0 is that of pretraining; 40 tokens are VLMo's questions and captions.
    """
    model = replace(
        base.model,
        image_size=image_size or base.model.image_size,
        text_length=text_length or base.model.text_length,
        pair_text_length=text_length or base.model.text_length,
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
        data=data,
        optim=optim,
        train=TrainConfig(steps=0, eval_interval=0, eval_steps=1, precision=base.train.precision),
        checkpoint=CheckpointConfig(save_interval=0, keep_last=1),
        task=task,
        contrastive=ContrastiveConfig(cache=cache),
    )


def _retrieval(epochs: float, batch: int) -> TaskConfig:
    return TaskConfig(
        name="retrieval",
        epochs=epochs,
        global_batch_size=batch,
        eval_micro_batch_size=64,
        rand_augment="vl",
    )


_IMAGENET = partial(
    finetune_recipe,
    task=TaskConfig(
        name="imagenet",
        epochs=15.0,
        global_batch_size=2048,
        micro_batch_size=64,
        label_smoothing=0.1,
        rand_augment="imagenet",
        random_erase=0.25,
    ),
    lr=3e-5,
    layer_decay=0.85,
    weight_decay=0.05,
    crop_scale_min=0.08,
)


def _sample(
    base: RunConfig,
    *,
    name: str,
    batch: int,
    epochs: float,
    lr: float,
    text_length: int = 0,
    micro: int = 16,
    matching: bool = True,
) -> FinetuneConfig:
    """A task of the sample corpus: a minute or two on one CPU core, from a tiny model; evaluates at the end alone.

    A `text_length` holds nearly all of the task's texts, longer ones are cut; 0 is the pretraining's. Without
    `matching`, retrieval trains without pairs.
    """
    task = TaskConfig(
        name=name,
        micro_batch_size=min(micro, batch),
        global_batch_size=batch,
        eval_micro_batch_size=32,
        epochs=epochs,
        eval_epochs=0.0,
    )
    # Most patches of such a picture are plain background and go to the same expert: a capacity would drop them.
    moe = replace(base.moe, capacity_factor=0.0, eval_capacity_factor=0.0)
    if base.moe.routing == "expert_choice":
        # There a capacity says how many tokens an expert takes.
        moe = base.moe
    config = finetune_recipe(
        replace(base, moe=moe),
        task,
        lr=lr,
        image_size=0,
        drop_path=0.0,
        text_length=text_length or max(base.model.text_length, base.model.pair_text_length),
        # A crop or a flip would make "at the top left" false.
        crop_scale_min=1.0,
    )
    return replace(
        config,
        data=replace(config.data, flip_probability=0.0, pair_flip_probability=0.0),
        optim=replace(config.optim, clip_grad=3.0, adam_beta2=0.999),
        contrastive=replace(config.contrastive, matching_weight=float(matching)),
    )


# Image sizes, epochs, batches and learning rates are those of paper A.2, of ImageNet-22K BEiT's.
RECIPES: dict[str, Callable[[RunConfig], FinetuneConfig]] = {
    "vqa": partial(
        finetune_recipe,
        task=TaskConfig(name="vqa", rand_augment="vl"),
        lr=3e-5,
        image_size=480,
        drop_path=0.15,
        head_lr_multiplier=20.0,
    ),
    "nlvr2": partial(finetune_recipe, task=TaskConfig(name="nlvr2", rand_augment="vl"), lr=5e-5),
    # Retrieval takes negatives from the whole batch on any number of GPUs.
    "coco": partial(
        finetune_recipe, task=_retrieval(20.0, 2048), lr=2e-5, drop_path=0.2, cache=True
    ),
    # From the model that was fine-tuned on COCO.
    "flickr30k": partial(
        finetune_recipe, task=_retrieval(40.0, 2048), lr=1e-5, drop_path=0.15, cache=True
    ),
    "imagenet": _IMAGENET,
    # Intermediate step before ImageNet-1K (paper 4.3).
    "imagenet22k": partial(
        finetune_recipe,
        task=TaskConfig(
            name="imagenet",
            epochs=90.0,
            global_batch_size=4096,
            micro_batch_size=128,
            label_smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            rand_augment="imagenet",
            random_erase=0.25,
        ),
        lr=3e-3,
        image_size=224,
        drop_path=0.2,
        layer_decay=0.65,
        weight_decay=0.05,
        crop_scale_min=0.08,
    ),
    # Texts of the pretraining length.
    "mnli": partial(
        finetune_recipe,
        task=TaskConfig(name="mnli", global_batch_size=32),
        lr=3e-5,
        image_size=0,
        text_length=0,
    ),
    # Table 3: at 224 pixels; for NLVR2 lr 5e-5 or 1e-4, and the mean of three runs.
    "nlvr2-ablation": partial(
        finetune_recipe,
        task=TaskConfig(name="nlvr2", rand_augment="vl", seeds=(1, 2, 3)),
        lr=1e-4,
        image_size=224,
    ),
    "flickr30k-ablation": partial(
        finetune_recipe,
        task=_retrieval(10.0, 1024),
        lr=5e-5,
        image_size=224,
        drop_path=0.15,
        cache=True,
    ),
    "imagenet-ablation": partial(_IMAGENET, image_size=224),
    "sample-vqa": partial(_sample, name="vqa", batch=8, epochs=1.2, lr=5e-4, text_length=16),
    "sample-nlvr2": partial(_sample, name="nlvr2", batch=16, epochs=1.4, lr=5e-4, text_length=20),
    # Pairs would take five times as long; recall without re-ranking comes from the dot products alone.
    "sample-retrieval": partial(
        _sample,
        name="retrieval",
        batch=32,
        micro=32,
        epochs=1.2,
        lr=1e-3,
        text_length=32,
        matching=False,
    ),
    "sample-imagenet": partial(_sample, name="imagenet", batch=32, epochs=12.0, lr=1e-3),
    "sample-mnli": partial(_sample, name="mnli", batch=32, epochs=1.5, lr=5e-4, text_length=44),
}


def recipe_names() -> tuple[str, ...]:
    """Every fine-tuning recipe; that of a plug-in's task is named as the task."""
    return (*RECIPES, *(name for name in task_names() if name not in TASKS))


def default_recipe(task: str) -> str:
    """The name of a task's recipe. Raises ConfigError if there is no such task, or a recipe of another has its name."""
    spec = find_task(task)
    if task in TASKS:
        return spec.recipe
    if task in RECIPES:
        raise ConfigError(f"task {task}: its plug-in has the name of a built-in recipe")
    return task


def apply_recipe(name: str, base: RunConfig) -> FinetuneConfig:
    """The fine-tuning configuration of a recipe for the architecture of a pretraining run or preset.

    Raises:
        ConfigError: if there is no such recipe, or it does not load.
    """
    if name in RECIPES:
        return RECIPES[name](base)
    if name not in recipe_names():
        raise ConfigError(f"--preset {name}: {unknown_name(name, recipe_names())}")
    recipe = find_task(name).recipe
    if not recipe:
        # As NLVR2's, at the image size of pretraining.
        return finetune_recipe(base, TaskConfig(name=name), lr=5e-5, image_size=0)
    make = RECIPES[recipe] if recipe in RECIPES else load_code(recipe, name)
    config = make(base)
    if not isinstance(config, FinetuneConfig):
        given = type(config).__name__
        raise ConfigError(f"task {name}: its recipe {recipe} gives a {given}, not a FinetuneConfig")
    return replace(config, task=replace(config.task, name=name))
