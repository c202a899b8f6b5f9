"""Checks of a resolved configuration, each refused with one line that names the option and the reason."""

from __future__ import annotations

import math
import operator
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_vlmoe.config.errors import ConfigError, did_you_mean, near_divisors, near_multiples
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.runtime.files import is_remote
from megatron_vlmoe.stream.block_plan import block_plans, has_experts, moe_layer_numbers
from megatron_vlmoe.stream.layout import StreamLayout
from megatron_vlmoe.stream.sizes import (
    VOCAB_MULTIPLE,
    attention_packs,
    batch_sizes_that_fit,
    check_parallel_sizes,
    data_parallel_size,
    num_micro_batches,
    padded_vocab_size,
)

_BOUNDS: Mapping[str, Callable[[float], bool]] = {
    "must be positive": lambda value: value > 0,
    "must not be negative": lambda value: value >= 0,
    "must not be below -1": lambda value: value >= -1,
    "must be at least 1": lambda value: value >= 1,
    "must be below 2**31": lambda value: value < 2**31,
    "must not be above a year, 525600": lambda value: value <= 525_600,
    "is not in [0, 1]": lambda value: 0 <= value <= 1,
    "is not in [0, 1)": lambda value: 0 <= value < 1,
    "is not in (0, 1]": lambda value: 0 < value <= 1,
}
"""What may be wrong with a number, and when it is not."""
SEEDS = range(-(2**63), 2**63)
"""The seeds that every generator takes."""
_ANY_RUN = {
    "must be positive": (
        *("parallel.startup_timeout_minutes", "parallel.distributed_timeout_minutes"),
    ),
    "must not be above a year, 525600": (
        *("parallel.startup_timeout_minutes", "parallel.distributed_timeout_minutes"),
    ),
    "must not be negative": (
        *("data.color_jitter", "objectives.caption_mask_slots"),
        *("optim.weight_decay", "optim.clip_grad", "optim.lr_decay_steps", "optim.sgd_momentum"),
        *("train.eval_interval", "train.exit_interval", "train.exit_duration_minutes"),
        "train.head_chunk_rows",
        *("checkpoint.save_interval", "checkpoint.keep_last", "moe.aux_loss_coefficient"),
        *("health.max_skips", "health.max_rewinds", "health.hang_factor", "health.hang_seconds"),
        *("health.straggler_factor", "data.max_bad_images"),
        *(f"moe.{kind}_aux.global_entropy_experts" for kind in ("text", "vision")),
    ),
    "must not be below -1": ("data.num_workers",),
    # Gates are in [0, 1] too.
    "is not in [0, 1]": (
        *("data.flip_probability", "data.pair_flip_probability", "moe.balance_bias_rate"),
    ),
    "is not in [0, 1)": ("data.eval_fraction", "optim.adam_beta1", "optim.adam_beta2"),
    "is not in (0, 1]": ("data.crop_scale_min",),
}
_POSITIVE_SIZES = (
    *("model.num_layers", "model.hidden_size", "model.num_attention_heads"),
    *("model.ffn_hidden_size", "model.patch_size"),
)
_OTHER_SIZES = (
    *("moe.num_vision_experts", "moe.num_text_experts", "moe.num_vl_experts"),
    *("model.text_length", "model.pair_text_length", "model.image_size"),
    *("model.vocab_size", "model.visual_vocab_size"),
)
_ARCHITECTURE = {
    "must be positive": _POSITIVE_SIZES,
    "must not be negative": _OTHER_SIZES,
    "must be below 2**31": (*_POSITIVE_SIZES, *_OTHER_SIZES),
}
_PRETRAINING = {
    "must be positive": ("objectives.contrastive_temperature", "optim.lr"),
    "must not be negative": (
        *("data.micro_texts", "data.micro_images", "data.micro_pairs"),
        *("data.global_texts", "data.global_images", "data.global_pairs"),
        *("train.eval_steps", "optim.lr_warmup_steps", "model.init_sincos_std"),
    ),
    "must be at least 1": ("train.steps", "log.interval"),
    "is not in [0, 1]": ("model.init_qk_correlation",),
    "is not in [0, 1)": ("model.drop_path",),
    "is not in (0, 1]": ("objectives.text_mask_fraction", "objectives.caption_mask_fraction"),
}
_TASK = {
    "must be positive": ("contrastive.temperature",),
    "must not be negative": ("contrastive.matching_weight", "contrastive.rerank"),
}
_TASK_TRAINING = {
    "must be positive": ("optim.head_lr_multiplier",),
    "must not be negative": (
        *("train.steps", "task.eval_epochs", "task.early_stopping", "task.mixup", "task.cutmix"),
    ),
    "is not in [0, 1]": ("task.warmup_fraction", "task.random_erase"),
    "is not in [0, 1)": ("task.label_smoothing",),
    "is not in (0, 1]": ("optim.layer_decay",),
}
# What follows a prefix in the names of a dataset's files.
_PART = re.compile(
    r"(_(text_document|image|text|codes|samples))?\.(bin|idx|arrow|json)$|_text_document$"
)


def validate(config: RunConfig, world_size: int = 1) -> None:
    """Checks everything that does not need the data. Raises ConfigError on the first contradiction."""
    check_parallel_sizes(config.parallel)
    _check_any_run(config)
    _check_bounds(config, _PRETRAINING)
    check_architecture(config)
    _check_model(config)
    _check_varlen(config)
    _check_moe(config, world_size)
    _check_parallel(config)
    _check_cuda_graph(config)
    _check_fp8(config)
    for name in ("text", "images", "pairs", "eval_text", "eval_images", "eval_pairs"):
        _check_dataset_prefixes(f"data.{name}", getattr(config.data, name))
    data_size = data_parallel_size(config.parallel, world_size)
    num_micro_batches(config, data_size)
    pairs = config.data.micro_pairs
    _require(
        config.objectives.kind == "masked" or pairs * data_size > 1,
        f"objectives.kind=contrastive with data.micro_pairs={pairs} on {data_size} data-parallel rank(s): "
        "one pair has no other to be told from",
    )


def validate_task(config: FinetuneConfig, world_size: int, training: bool = True) -> None:
    """The same of a run on a task."""
    task, options, model = config.task, config.contrastive, config.model
    _check_any_run(config)
    _check_varlen(config)
    _require(
        config.objectives.kind == "masked",
        "objectives.kind=contrastive is for pretraining; the task decides what fine-tuning minimises",
    )
    _check_dataset_prefixes("task.data", [task.data])
    data_size = data_parallel_size(config.parallel, world_size)
    _check_task_batches(config, data_size, training)
    for name in ("seeds", "eval_splits"):
        values = list(getattr(task, name))
        _require(len(set(values)) == len(values), f"task.{name}={values} lists one twice")
    if training:
        _check_bounds(config, _TASK_TRAINING)
        _require(
            config.train.steps > 0 or task.epochs > 0.0,
            f"task.epochs={task.epochs} and train.steps=0: no length",
        )
        _require(
            not task.early_stopping or task.save_best,
            f"task.early_stopping={task.early_stopping} needs task.save_best=true",
        )
        _require(
            task.label_smoothing == 0.0 or task.spec.target == "class",
            f"task.label_smoothing={task.label_smoothing}: {task.name} has no classes to smooth over",
        )
        for name in ("mixup", "cutmix"):
            alpha = getattr(task, name)
            _require(
                alpha == 0.0 or task.spec.mixes_images,
                f"task.{name}={alpha}: {task.name} does not mix images, only tasks of one image and its class do",
            )
    matches = task.spec.target == "match"
    _require(
        not (training and matches and config.train.cuda_graph),
        f"train.cuda_graph=true is not for {task.name}, whose hard negatives are drawn on the host",
    )
    _check_bounds(config, _TASK)
    _require(
        not matches or model.text_length == model.pair_text_length,
        f"model.text_length={model.text_length} and model.pair_text_length={model.pair_text_length}: "
        f"{task.name} reads the same captions alone and in pairs",
    )
    _require(
        options.contrastive_weight > 0.0,
        f"contrastive.contrastive_weight={options.contrastive_weight} must be positive: "
        "without it nothing trains the encodings",
    )
    _require(
        not options.cache or matches,
        f"contrastive.cache=true is for retrieval, not for {task.name}",
    )
    _require(
        not options.rerank or options.matching_weight > 0.0,
        f"contrastive.rerank={options.rerank} needs the matching head: contrastive.matching_weight is 0",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_bounds(config: RunConfig, bounds: Mapping[str, Sequence[str]], form: str = "") -> None:
    for wrong, names in bounds.items():
        for name in names:
            value = operator.attrgetter(name)(config)
            _require(_BOUNDS[wrong](value), f"{name}={value:{form}} {wrong}")


def _check_any_run(config: RunConfig) -> None:
    """What pretraining and tasks have in common."""
    possible = [name for name in signal.Signals.__members__ if name not in ("SIGKILL", "SIGSTOP")]
    for name in config.train.exit_signals:
        # A look for what was meant takes time, which a search through thousands of layouts would spend for each.
        if name not in possible:
            raise ConfigError(
                f"train.exit_signals has {name}, which is no signal that a process can answer (SIGTERM, SIGUSR1, ...)"
                f"{did_you_mean(name, possible)}"
            )
    _check_bounds(config, _ANY_RUN, "g")
    seeds = [("train.seed", config.train.seed)]
    if isinstance(config, FinetuneConfig):
        seeds += [("task.seeds", seed) for seed in config.task.seeds]
    for name, seed in seeds:
        _require(seed in SEEDS, f"{name}={seed} is not a whole number of 64 bits with its sign")
    _require(
        not is_remote(config.checkpoint.save),
        f"--save {config.checkpoint.save}: must be a local path: a run folder lies on a disk that all nodes see",
    )
    _check_health(config)


def _check_health(config: RunConfig) -> None:
    health, stop_on_nan = config.health, config.train.stop_on_nan
    _require(
        stop_on_nan or health.on_nonfinite == "stop",
        f"health.on_nonfinite={health.on_nonfinite} has no effect with train.stop_on_nan=false",
    )
    for name in ("on_nonfinite", "on_spike"):
        _require(
            getattr(health, name) != "rewind" or bool(config.checkpoint.save),
            f"health.{name}=rewind needs --save: it goes back to the last checkpoint of the run",
        )
    _require(
        config.data.on_bad_image == "stop" or not isinstance(config, FinetuneConfig),
        f"data.on_bad_image={config.data.on_bad_image} is for pretraining: a task has no sample to spare",
    )
    _require(
        health.spike_factor > 1.0, f"health.spike_factor={health.spike_factor:g} must be above 1"
    )
    _require(
        health.spike_window >= 1, f"health.spike_window={health.spike_window} must be at least 1"
    )
    for name in ("hang_factor", "straggler_factor"):
        value = getattr(health, name)
        _require(value == 0 or value > 1, f"health.{name}={value:g} must be 0 or above 1")


def _check_dataset_prefixes(option: str, values: Sequence[str]) -> None:
    """Checks that values are prefixes of datasets, or weights and prefixes in turn, and not one of their files."""
    for value in values:
        if prefix := prefix_of_file(value):
            raise ConfigError(
                f"--{option} {value}: is one file of a dataset; give the prefix of all its files: --{option} {prefix}"
            )


def prefix_of_file(value: str) -> str:
    """The prefix of the dataset of which a value names a single file; empty if it names none."""
    prefix = _PART.sub("", value)
    # A prefix may end like a part; then its manifest says so.
    return "" if prefix == value or Path(f"{value}.json").is_file() else prefix


def check_architecture(config: RunConfig) -> None:
    """Checks that there can be a model of these sizes. Raises ConfigError on the first contradiction."""
    model = config.model
    _check_bounds(config, _ARCHITECTURE)
    _require(
        model.hidden_size % model.num_attention_heads == 0,
        f"model.hidden_size={model.hidden_size} is not divisible by "
        f"model.num_attention_heads={model.num_attention_heads}: "
        f"{near_divisors(model.num_attention_heads, model.hidden_size)} heads fit",
    )
    _require(
        model.image_size % model.patch_size == 0 and model.image_size > 0,
        f"model.image_size={model.image_size} is not a multiple of model.patch_size={model.patch_size}: "
        f"--model.image_size {near_multiples(model.image_size, model.patch_size)} fits",
    )
    _require(
        0 <= model.num_vl_layers <= model.num_layers,
        f"model.num_vl_layers={model.num_vl_layers} is not in 0..{model.num_layers}",
    )
    moe_layer_numbers(model, config.moe)


def _check_model(config: RunConfig) -> None:
    """Losses and batch, and what stands alone."""
    model, data, objectives = config.model, config.data, config.objectives
    optim, steps = config.optim, list(config.profile.steps)
    for name in ("text_length", "pair_text_length"):
        value = getattr(model, name)
        _require(value >= 3, f"model.{name}={value} leaves no room between [T_CLS] and [T_SEP]")
    _require(
        0.0 <= optim.min_lr <= optim.lr,
        f"optim.min_lr={optim.min_lr} is not between 0 and optim.lr={optim.lr}",
    )
    _require(len(steps) in (0, 2), f"profile.steps={steps} must be `FIRST LAST`")
    _require(
        not steps or 1 <= steps[0] <= steps[1],
        f"profile.steps={steps}: FIRST must be in 1..LAST",
    )
    _require(
        data.micro_texts + data.micro_images + data.micro_pairs > 0,
        "data.micro_texts, data.micro_images and data.micro_pairs are all 0",
    )
    if objectives.kind == "contrastive":
        _require(data.micro_pairs > 0, "objectives.kind=contrastive needs data.micro_pairs")
        others = [name for name in ("texts", "images") if getattr(data, f"micro_{name}")]
        zeros = " ".join(f"--data.micro_{name} 0" for name in others)
        _require(
            not others,
            f"objectives.kind=contrastive reads pairs alone: leave the rest out with {zeros}",
        )
        tensor = config.parallel.tensor_model_parallel_size
        _require(
            data.micro_pairs % tensor == 0,
            f"data.micro_pairs={data.micro_pairs} is not divisible by parallel.tensor_model_parallel_size={tensor}: "
            f"--data.micro_pairs {near_multiples(data.micro_pairs, tensor)} fits",
        )
        return
    pairs_count = objectives.vlm_text_weight != 0.0 or objectives.vlm_image_weight != 0.0
    for name, weights, count in (
        ("texts", "mlm_weight=0", objectives.mlm_weight != 0.0),
        ("images", "mim_weight=0", objectives.mim_weight != 0.0),
        ("pairs", "vlm_text_weight and vlm_image_weight are 0", pairs_count),
    ):
        _require(
            count or not getattr(data, f"micro_{name}"),
            f"objectives.{weights} with data.micro_{name} > 0: set data.micro_{name}=0 to leave {name} out",
        )
    _require(
        0 <= objectives.num_masked_patches <= model.num_patches,
        f"objectives.num_masked_patches={objectives.num_masked_patches} is not in "
        f"0..{model.num_patches} (0 means floor(0.4 N))",
    )


def _check_varlen(config: RunConfig) -> None:
    """What attention without masks cannot do, whatever the machine."""
    model = config.model
    if model.attention_backend != "varlen":
        return
    width = model.hidden_size // model.num_attention_heads
    _require(
        width % 8 == 0 and width <= 256,
        f"model.attention_backend=varlen with heads of width {width}: its kernel takes multiples of 8 up to 256",
    )
    _require(
        config.train.precision != "fp32",
        "model.attention_backend=varlen with train.precision=fp32: its kernel takes bf16 and fp16",
    )
    _require(
        not config.moe.route_padding,
        "model.attention_backend=varlen with moe.route_padding=true: padding attends to padding alone there, "
        "and its experts would be others",
    )


def _check_moe(config: RunConfig, world_size: int) -> None:
    model, moe = config.model, config.moe
    if not has_experts(moe):
        _require(
            not moe.layers,
            f"moe.layers={list(moe.layers)} is set, but the model has no experts "
            "(see moe.num_vision_experts, moe.num_text_experts and moe.modalities)",
        )
        _require(not moe.vl, "moe.vl=true needs moe.num_vl_experts")
        _require(not moe.shared_router, "moe.shared_router=true needs moe.num_vision_experts")
        return
    numbers = moe_layer_numbers(model, moe)
    _require(
        bool(numbers),
        f"moe.layers is empty: no even block among the first {model.num_layers - model.num_vl_layers}",
    )
    if moe.vl:
        _require(moe.num_vl_experts > 0, "moe.vl=true needs moe.num_vl_experts")
    else:
        _require(
            moe.num_vl_experts == 0, f"moe.num_vl_experts={moe.num_vl_experts} needs moe.vl=true"
        )
    if moe.modalities in ("text", "vision"):
        name = f"num_{moe.modalities}_experts"
        _require(getattr(moe, name) > 0, f"moe.modalities={moe.modalities} needs moe.{name}")
    if moe.shared_router:
        _require(
            moe.modalities == "both",
            f"moe.shared_router=true serves both modalities, but moe.modalities={moe.modalities}",
        )
        _require(
            moe.num_vision_experts > 0,
            "moe.shared_router=true needs moe.num_vision_experts, the size of the shared pool",
        )
    _check_bounds(
        config,
        {"must be at least 1": ("moe.topk", "moe.capacity_multiple_of", "moe.all_to_all_chunks")},
    )
    _require(
        moe.all_to_all_chunks == 1 or moe.dispatcher == "fixed_capacity",
        f"moe.all_to_all_chunks={moe.all_to_all_chunks} with moe.dispatcher={moe.dispatcher}: only "
        "fixed_capacity sends the tokens of single experts",
    )
    for name in ("capacity_factor", "eval_capacity_factor"):
        factor = getattr(moe, name)
        _require(math.isfinite(factor), f"moe.{name}={factor:g} must be finite")
    if moe.routing == "expert_choice":
        _require(
            moe.dispatcher != "dropless",
            "moe.routing=expert_choice with moe.dispatcher=dropless: experts take as many tokens as they have slots",
        )
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(moe, name)
            _require(
                factor > 0.0,
                f"moe.{name}={factor:g} with moe.routing=expert_choice: it is how many tokens an expert takes, "
                "and must be positive",
            )
        _require(
            not moe.normalize_gate,
            "moe.normalize_gate=true with moe.routing=expert_choice: a token may have no expert to share its gates",
        )
        _require(
            moe.balance_bias_rate == 0.0,
            f"moe.balance_bias_rate={moe.balance_bias_rate:g} with moe.routing=expert_choice: its experts have equal "
            "load already",
        )
    expert_parallel = config.parallel.expert_model_parallel_size
    plans = block_plans(model, moe)
    # What fits every pool, and the ranks of a pipeline stage; with one process it is not known yet how many come.
    shared = math.gcd(*(pool.num_experts for plan in plans for pool in plan.pools))
    if world_size > 1:
        ranks, rest = divmod(world_size, config.parallel.pipeline_model_parallel_size)
        shared = math.gcd(shared, world_size if rest else ranks)
    for plan in plans:
        for pool in plan.pools:
            where = f"block {plan.layer_number} has {pool.num_experts} {pool.name} experts"
            _require(moe.topk <= pool.num_experts, f"moe.topk={moe.topk}, but {where}")
            _require(
                pool.num_experts % expert_parallel == 0,
                f"{where}, not divisible by parallel.expert_model_parallel_size={expert_parallel}: "
                f"{near_divisors(expert_parallel, shared)} fits",
            )


def _check_parallel(config: RunConfig) -> None:
    parallel, model = config.parallel, config.model
    tensor = parallel.tensor_model_parallel_size
    pipeline = parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    _require(
        parallel.context_parallel_size == 1,
        f"parallel.context_parallel_size={parallel.context_parallel_size} is not supported: "
        "the longest sample, a pair, has a few hundred tokens",
    )
    _require(
        parallel.expert_tensor_parallel_size == 1,
        f"parallel.expert_tensor_parallel_size={parallel.expert_tensor_parallel_size} is not supported: "
        "an expert is one FFN; use expert_model_parallel_size",
    )
    _require(
        model.num_attention_heads % tensor == 0,
        f"parallel.tensor_model_parallel_size={tensor} does not divide "
        f"model.num_attention_heads={model.num_attention_heads}: "
        f"{near_divisors(tensor, model.num_attention_heads)} fits",
    )
    for name in ("vocab_size", "visual_vocab_size"):
        # Rows are padded to a multiple of 128, whatever the layout; an unknown size could be any of them.
        rows = padded_vocab_size(getattr(model, name)) or VOCAB_MULTIPLE
        _require(
            rows % tensor == 0,
            f"parallel.tensor_model_parallel_size={tensor} does not divide the {rows} rows to which "
            f"model.{name} is padded",
        )
    StreamLayout.of(config).shard(tensor)
    _require(
        parallel.expert_model_parallel_size == 1 or has_experts(config.moe),
        f"parallel.expert_model_parallel_size={parallel.expert_model_parallel_size}, "
        "but the model has no experts",
    )
    _require(
        virtual == 1 or pipeline > 1,
        f"parallel.virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size > 1",
    )
    _require(
        virtual == 1 or not parallel.batch_p2p_comm,
        "parallel.batch_p2p_comm=true with virtual pipeline stages: megatron-core 0.16.1 computes wrong values",
    )
    _require(
        model.num_layers % (pipeline * virtual) == 0,
        f"model.num_layers={model.num_layers} is not divisible by "
        f"parallel.pipeline_model_parallel_size={pipeline} x virtual_pipeline_model_parallel_size={virtual}: "
        f"a product of {near_divisors(pipeline * virtual, model.num_layers)} fits",
    )
    _require(
        not parallel.overlap_param_gather or parallel.use_distributed_optimizer,
        "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true",
    )
    form = config.checkpoint.optimizer_format
    _require(
        form == "fully_reshardable" or parallel.use_distributed_optimizer,
        f"checkpoint.optimizer_format={form} needs parallel.use_distributed_optimizer=true: "
        "without it no rank has a share of its own to write",
    )


def _check_cuda_graph(config: RunConfig) -> None:
    """What a graph of a whole step cannot hold: other numbers of the host, other shapes, other tensors every time."""
    train, moe, parallel = config.train, config.moe, config.parallel
    if not train.cuda_graph:
        return
    where = "train.cuda_graph=true"
    _require(
        train.counter_draws,
        f"{where} needs train.counter_draws=true: a generator's seed comes from the host",
    )
    _require(
        parallel.pipeline_model_parallel_size == 1,
        f"{where} with parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size}: "
        "a graph has one stage",
    )
    _require(
        not parallel.overlap_param_gather,
        f"{where} with parallel.overlap_param_gather=true: the forward pass waits for what began before the graph",
    )
    _require(
        train.recompute == "none",
        f"{where} with train.recompute={train.recompute}: megatron-core reads the state of a generator in every block",
    )
    _require(
        train.precision != "fp16",
        f"{where} with train.precision=fp16: the graph would keep the first loss scale; use bf16",
    )
    _require(
        not config.data.reset_attention
        or not attention_packs(
            config, config.model.transformer_impl != "local", train.precision == "fp32"
        ),
        f"{where} with model.attention_backend={config.model.attention_backend} and data.reset_attention=true: "
        "the number of documents decides shapes; use sdpa",
    )
    if has_experts(moe):
        _require(
            moe.dispatcher == "fixed_capacity",
            f"{where} with moe.dispatcher={moe.dispatcher}: only fixed_capacity has shapes that do not depend on "
            "the routing",
        )
        _require(
            moe.capacity_factor > 0.0,
            f"{where} with moe.capacity_factor={moe.capacity_factor:g}: without a capacity shapes depend on the "
            "routing",
        )


def _check_fp8(config: RunConfig) -> None:
    """What products in 8 bits need: TransformerEngine's layers, and sizes that are multiples of 16 or 32."""
    train, model, moe = config.train, config.model, config.moe
    if train.fp8 == "none":
        return
    where, multiple = f"train.fp8={train.fp8}", 32 if train.fp8 == "mxfp8" else 16
    tensor = config.parallel.tensor_model_parallel_size
    _require(
        model.transformer_impl != "local",
        f"{where} needs model.transformer_impl=transformer_engine: local layers have no 8 bits",
    )
    _require(
        train.precision in ("auto", "bf16"),
        f"{where} with train.precision={train.precision}: it needs bf16",
    )
    _require(
        not train.cuda_graph,
        f"{where} with train.cuda_graph=true: the graph would keep the weights of its first step in 8 bits",
    )
    for name in ("hidden_size", "ffn_hidden_size"):
        size = getattr(model, name)
        _require(
            size % (multiple * tensor) == 0,
            f"{where} with model.{name}={size}: the share of each of {tensor} tensor-parallel rank(s) must be a "
            f"multiple of {multiple}: --model.{name} {near_multiples(size, multiple * tensor)} fits",
        )
    layout = StreamLayout.of(config).shard(tensor)
    # Of a block's attention, and of every dense FFN. What ranks exchange in blocks of 128 values has whole ones.
    rows_of = 128 if train.fp8 == "blockwise" and tensor > 1 else multiple
    plans = block_plans(model, moe)
    inputs = {"of a micro-batch": layout.num_tokens}
    inputs |= {f"of its {b.name} FFN": b.num_tokens(layout) for plan in plans for b in plan.dense}
    for what, rows in inputs.items():
        _require(
            rows % rows_of == 0,
            f"{where} with {rows:,} tokens {what} on a tensor-parallel rank: must be a multiple of {rows_of}, as with "
            f"--data.micro_texts, --data.micro_images and --data.micro_pairs that are multiples of {rows_of * tensor}",
        )
    if not has_experts(moe):
        return
    _require(
        moe.dispatcher == "fixed_capacity" and moe.capacity_factor > 0.0,
        f"{where} with moe.dispatcher={moe.dispatcher} and moe.capacity_factor={moe.capacity_factor:g}: only "
        "fixed_capacity with a capacity gives every expert a fixed number of rows",
    )
    _require(
        moe.all_to_all_chunks == 1,
        f"{where} with moe.all_to_all_chunks={moe.all_to_all_chunks}: all experts of a pool compute together",
    )
    _require(
        moe.capacity_multiple_of % multiple == 0,
        f"{where} with moe.capacity_multiple_of={moe.capacity_multiple_of}: must be a multiple of {multiple}: "
        f"--moe.capacity_multiple_of {multiple} fits",
    )
    for plan in plans:
        for pool in plan.pools:
            tokens = pool.num_tokens(layout)
            _require(
                tokens % multiple == 0,
                f"{where} with {tokens:,} tokens of the {pool.name} experts on a tensor-parallel rank: an expert's "
                f"capacity is at most that, and must be a multiple of {multiple}",
            )


def _check_task_batches(config: FinetuneConfig, data_size: int, training: bool) -> None:
    task, tensor = config.task, config.parallel.tensor_model_parallel_size
    sizes = {
        "eval_micro_batch_size"
        if task.eval_micro_batch_size
        else "micro_batch_size": task.eval_batch
    }
    if training:
        sizes["micro_batch_size"] = task.micro_batch_size
    for name, size in sizes.items():
        _require(size >= 1, f"task.{name}={size} must be at least 1")
        _require(
            size % tensor == 0,
            f"task.{name}={size} is not divisible by parallel.tensor_model_parallel_size={tensor}: "
            f"--task.{name} {near_multiples(size, tensor)} fits",
        )
    if not training:
        return
    micro, total = task.micro_batch_size, task.global_batch_size
    if total < 1 or total % (micro * data_size):
        options = {("task.micro_batch_size", "task.global_batch_size"): (micro, total)}
        raise ConfigError(
            f"task.global_batch_size={total} is not a multiple of task.micro_batch_size={micro} x "
            f"{data_size} data-parallel rank(s){batch_sizes_that_fit(options, data_size, tensor)}"
        )
