"""The scales of a study: data, sizes, length, fine-tuning and processes of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megatron_vlmoe.config.presets import SIZES


@dataclass(frozen=True)
class TaskRecipe:
    """A fine-tuning that studies ask for by its name.

    Args:
        name: as in a study; the prepared data are FOLDER/NAME unless `data` says otherwise.
        task: as in `finetune --task`.
        recipe: as in `finetune --preset`.
        options: on top of the recipe.
        data: last part of the prefix of the prepared data.
        start: name of the fine-tuning that it starts from; empty: the pretrained model.
    """

    name: str
    task: str
    recipe: str
    options: tuple[str, ...] = ()
    data: str = ""
    start: str = ""


@dataclass(frozen=True)
class Scale:
    """How large the runs of a study are.

    Args:
        about: for the help.
        sizes: model sizes by name: size of the preset, and options.
        main: the size of studies that have one.
        pool: the experts of studies that compare other things.
        pools: experts of the studies that compare them, fewest first.
        short: size of studies with so many runs that each has to be short; empty: the main one.
        options: of every pretraining.
        tasks: the fine-tunings there are.
        seeds: unless others are asked for.
        processes: of a run.
        rate: FLOP/s of a process, for the estimate before any run has been timed.
        contrastive: options that give contrastive pretraining its batch, of which the micro-batches are to be all.
        one_micro_batch: a process takes its share of a step at once, unless options say otherwise.
        vocabularies: text and visual tokens, for the same; 0: as many as the paper's.
        data: options that name the data; empty: they are asked for.
        folder: of the prepared tasks; empty: it is asked for.
    """

    about: str
    sizes: Mapping[str, tuple[str, tuple[str, ...]]]
    main: str
    pool: str
    options: tuple[str, ...]
    tasks: tuple[TaskRecipe, ...]
    seeds: tuple[int, ...]
    processes: int
    rate: float
    contrastive: tuple[str, ...]
    pools: tuple[str, ...] = ("dense", "8e", "16e", "32e")
    short: str = ""
    one_micro_batch: bool = False
    data: tuple[str, ...] = ()
    folder: str = ""
    vocabularies: tuple[int, int] = (0, 0)
    num_experts: int = field(init=False)
    blocks_with_vl: tuple[str, ...] = field(init=False)

    @property
    def compared(self) -> tuple[str, ...]:
        """The sizes of the study that compares sizes."""
        return tuple(size for size in self.sizes if size != self.short)

    def __post_init__(self) -> None:
        config = SIZES[self.sizes[self.main][0]]
        layers, own = config.model.num_layers, config.moe.layers
        # Every second block, also of those with a VL-FFN; or those that the preset names, and all with a VL-FFN.
        blocks: Iterable[int] = range(2, layers + 1, 2)
        if own:
            blocks = (*own, *range(layers - config.model.num_vl_layers + 1, layers + 1))
        object.__setattr__(self, "num_experts", int(self.pool.removesuffix("e")))
        object.__setattr__(self, "blocks_with_vl", tuple(map(str, blocks)))


# What examples/sample_data.sh makes, and the quick start trains on.
INDEXED, TASKS = "corpora/indexed-2000", "corpora/tasks-2000"

_SAMPLE_DATA = (
    *("--data.text", f"{INDEXED}/text_train", "--data.eval_text", f"{INDEXED}/text_val"),
    *("--data.images", f"{INDEXED}/images_train", "--data.eval_images", f"{INDEXED}/images_val"),
    *("--data.pairs", f"{INDEXED}/pairs_train", "--data.eval_pairs", f"{INDEXED}/pairs_val"),
    *("--data.text_tokenizer", f"{INDEXED}/text.model"),
    *("--data.image_tokenizer", f"{INDEXED}/image_tokenizer"),
)

_ABLATION_TASKS = (
    TaskRecipe("nlvr2", "nlvr2", "nlvr2-ablation"),
    TaskRecipe("retrieval", "retrieval", "flickr30k-ablation", data="flickr30k"),
    TaskRecipe("imagenet", "imagenet", "imagenet-ablation"),
    TaskRecipe("mnli", "mnli", "mnli"),
    TaskRecipe("vqa", "vqa", "vqa"),
)

_NARROW = (
    *("--model.hidden_size", "64", "--model.ffn_hidden_size", "256"),
    *("--optim.lr", "3e-3", "--optim.lr_decay_steps", "1350"),
)

SCALES: Mapping[str, Scale] = {
    "tiny": Scale(
        about="the quick start's data and model, minutes a run on one CPU core",
        sizes={
            # Half as wide, it needs more steps for its losses to leave their plateau too.
            "narrow": ("tiny", (*_NARROW, "--train.steps", "450")),
            "tiny": ("tiny", ()),
            "short": ("tiny", (*_NARROW, "--train.steps", "280", "--train.eval_interval", "280")),
        },
        main="tiny",
        pool="8e",
        short="short",
        options=(
            # A rate that has hardly decayed: the beginning of a run of three times as many steps.
            *("--train.steps", "350", "--optim.lr_decay_steps", "1050"),
            *("--train.eval_interval", "100", "--train.eval_steps", "10"),
            *("--checkpoint.save_interval", "280", "--checkpoint.keep_last", "1"),
            # Spikes last a step or two.
            *("--log.interval", "2"),
        ),
        tasks=(
            TaskRecipe("vqa", "vqa", "sample-vqa", ("--train.steps", "800")),
            # Two pictures side by side are new to the experts: frozen, they learn it twice as slowly.
            TaskRecipe(
                *("nlvr2", "nlvr2", "sample-nlvr2"),
                ("--train.steps", "350", "--moe.train_experts", "true"),
            ),
            TaskRecipe("retrieval", "retrieval", "sample-retrieval", ("--train.steps", "200")),
            TaskRecipe(
                *("imagenet", "imagenet", "sample-imagenet"),
                ("--train.steps", "400", "--optim.lr", "2e-3", "--optim.layer_decay", "0.7"),
            ),
            TaskRecipe(
                *("mnli", "mnli", "sample-mnli"), ("--train.steps", "500", "--optim.lr", "7e-4")
            ),
        ),
        seeds=(1, 2, 3),
        processes=1,
        rate=3e10,
        # At the rate of masked pretraining, 2e-3, features are alike from step 10 on and the loss stays at log 32.
        contrastive=("--data.global_pairs", "32", "--optim.lr", "1e-4"),
        one_micro_batch=True,
        data=_SAMPLE_DATA,
        folder=TASKS,
        vocabularies=(320, 96),
    ),
    "small": Scale(
        about="the paper's ablations: SMALL models on its data, 200k steps on 8 GPUs",
        sizes={"small": ("small", ())},
        main="small",
        pool="32e",
        options=("--checkpoint.keep_last", "1"),
        tasks=_ABLATION_TASKS,
        seeds=(1,),
        processes=8,
        rate=5e13,
        contrastive=("--data.micro_pairs", "256"),
    ),
    "base": Scale(
        about="the paper's models: SMALL and BASE, 200k steps on 32 GPUs",
        sizes={"small": ("small", ()), "base": ("base", ())},
        main="base",
        pool="32e",
        options=("--checkpoint.keep_last", "1"),
        tasks=(
            TaskRecipe("vqa", "vqa", "vqa"),
            TaskRecipe("nlvr2", "nlvr2", "nlvr2"),
            TaskRecipe("coco", "retrieval", "coco"),
            TaskRecipe("retrieval", "retrieval", "flickr30k", data="flickr30k", start="coco"),
            TaskRecipe("imagenet", "imagenet", "imagenet"),
            TaskRecipe("mnli", "mnli", "mnli"),
        ),
        seeds=(1,),
        processes=32,
        rate=5e13,
        contrastive=("--data.micro_pairs", "64"),
    ),
}
