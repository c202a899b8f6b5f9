"""Checkpoints: written whole or not at all, loadable at any TP/PP/EP/DP.

``iter_0000100/`` is written as ``iter_0000100.tmp``, synced, agreed on by all ranks and renamed; then the
tracker file ``latest_checkpointed_iteration.txt`` is replaced. Format: megatron-core dist_checkpointing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint import CheckpointException

from megatron_vlmoe.config.command_line import flat_options
from megatron_vlmoe.config.errors import CheckpointError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.runtime.distributed import (
    agree,
    barrier,
    device,
    from_rank_zero,
    is_rank_zero,
    union_over_ranks,
)
from megatron_vlmoe.runtime.files import publish_folder, write_text_atomic
from megatron_vlmoe.runtime.optimizer_state import install_state_views
from megatron_vlmoe.runtime.results_queue import install_results_queue
from megatron_vlmoe.runtime.sums import SUMS_FILE, reading_threads
from megatron_vlmoe.stream.block_plan import has_experts
from megatron_vlmoe.train.checkpoint_files import (
    COMMON_FILE,
    DP_RESHARDABLE,
    FULLY_RESHARDABLE,
    TRACKER,
    TrainState,
    check_harmless,
    common_content,
    content_metadata,
    is_optimizer_key,
    iteration_name,
    iterations,
    of_common,
    one_line,
    stored_format,
)
from megatron_vlmoe.train.checkpoint_sums import NOTE
from megatron_vlmoe.train.checkpoint_writing import ContentSaver, is_forked
from megatron_vlmoe.train.finite import check_finite
from megatron_vlmoe.train.rank_sums import RankSums
from megatron_vlmoe.train.setup import ModelParts, TrainingParts, checkpoint_metadata

log = logging.getLogger("megatron_vlmoe")

# Weights under these options must fit the model that loads them.
ARCHITECTURE = (
    *("model.num_layers", "model.hidden_size", "model.num_attention_heads"),
    *("model.ffn_hidden_size", "model.num_vl_layers", "model.image_size", "model.patch_size"),
    *("model.text_length", "model.pair_text_length", "model.vocab_size"),
    *("model.visual_vocab_size", "model.token_type_embeddings", "moe.num_vision_experts"),
    *("moe.num_text_experts", "moe.num_vl_experts", "moe.layers", "moe.modalities", "moe.vl"),
    "moe.shared_router",
)

# What the buckets of the distributed optimizer depend on besides: `dp_reshardable` stores them as they are.
BUCKET_OPTIONS = (
    *("parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    *("parallel.virtual_pipeline_model_parallel_size", "parallel.expert_model_parallel_size"),
    *("parallel.overlap_grad_reduce", "model.transformer_impl", "train.fp8"),
)
# Which parameters have optimizer state, and of what kind, is decided by these; of the batch sizes by which are 0.
STATE_OPTIONS = (
    *("optim.optimizer", "optim.sgd_momentum", "parallel.use_distributed_optimizer"),
    *("train.precision", "moe.train_experts"),
)
USED_OPTIONS = (
    *("data.micro_texts", "data.micro_images", "data.micro_pairs", "contrastive.matching_weight"),
    *(f"objectives.{name}_weight" for name in ("mlm", "mim", "vlm_text", "vlm_image")),
)


class CheckpointWriter:
    """Writes checkpoints of a run, in the background on request.

    Args:
        root: folder of the checkpoints.
        keep_last: checkpoints that are kept; 0 keeps all.
        async_save: returns before the files are written.
    """

    def __init__(self, root: Path, keep_last: int, async_save: bool) -> None:
        install_results_queue()
        install_state_views()
        self.root = root
        self.keep_last = keep_last
        self.queue = AsyncCallsQueue() if async_save else None
        self.saver = ContentSaver()
        self.pending = 0  # step of the last background save
        self.size = 0.0  # bytes of the last save
        self.sums: RankSums | None = None  # of a background save that is written and not published

    def save(
        self,
        state: TrainState,
        config: RunConfig,
        parts: ModelParts,
        with_optimizer: bool = True,
        is_last: bool = False,
    ) -> Path:
        """Writes a checkpoint, with `with_optimizer` one that training can go on from.

        Args:
            is_last: whether the run ends with it, which decides the format where `checkpoint.optimizer_format` is auto.

        Raises:
            CheckpointError: on every rank, if the disk is too full or writing fails on any.
            TrainingError: on every rank, if weights or optimizer state are not finite. In the background on a CPU the
                process that writes finds out, and `finish` raises CheckpointError.
        """
        self.finish()
        target = self.root / iteration_name(state.step)
        temporary = target.with_name(target.name + ".tmp")
        if config.parallel.overlap_param_gather and isinstance(parts, TrainingParts):
            # The parameters that the next forward pass would still have gathered.
            for chunk in parts.wrapped:
                chunk.disable_forward_pre_hook(param_sync=True)
                chunk.enable_forward_pre_hook()
        # Before the first step an optimizer has no state yet; weights are all that a seed is for.
        with_optimizer = with_optimizer and state.step > 0
        wanted, optimizer_format = config.checkpoint.optimizer_format, FULLY_RESHARDABLE
        if with_optimizer and (wanted == DP_RESHARDABLE or (wanted == "auto" and not is_last)):
            optimizer_format = DP_RESHARDABLE
        content = sharded_content(parts, False, with_optimizer, optimizer_format)
        if optimizer_format == DP_RESHARDABLE:
            assert isinstance(parts, TrainingParts)
            content["optimizer_buckets"] = bucket_digest(parts.optimizer)
        if not is_forked(self.queue is not None):
            check_finite(content, state.step)
        content |= {
            "train_state": dataclasses.asdict(state),
            "config": dataclasses.asdict(config),
            NOTE: SUMS_FILE,
        }

        # At most what this rank writes, then all of them.
        size = 0
        for value in nested_values(content):
            if isinstance(value, ShardedTensor):
                value = value.data if is_main_replica(value.replica_id) else None
            if torch.is_tensor(value):
                size += value.numel() * value.element_size()
        needed = torch.tensor([size], dtype=torch.float64, device=device())
        dist.all_reduce(needed)
        self.size = needed.item()
        problem = ""
        if is_rank_zero():
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if room := self._room(temporary):
                    problem = f"needs {self.size / 1e9:.2f} GB{room}"
            except OSError as error:
                problem = f"{error.strerror or error}"
        _raise_together(problem, temporary)

        request: Any = None
        try:
            request = self.saver.save(
                content,
                temporary,
                content_metadata(optimizer_format),
                in_background=self.queue is not None,
                not_written=_gradients(parts),
            )
        except (Exception, CheckpointException) as error:
            problem = one_line(error) + self._room(temporary)
        _raise_together(problem, temporary)
        if request is None:
            barrier()
            self._publish(RankSums(temporary, reading_threads()), target, state.step)
        else:
            assert self.queue is not None
            request.add_finalize_fn(lambda: self._make_sums(temporary))
            self.queue.schedule_async_request(request)
            self.pending = state.step
        return target

    def finish(self, blocking: bool = True) -> None:
        """Publishes a background save: waits for it, or looks whether it has finished. Every rank must call it.

        Raises:
            CheckpointError: on every rank, if writing failed on any.
        """
        if self.queue is None:
            return
        temporary = self.root / f"{iteration_name(self.pending)}.tmp"
        try:
            self.queue.maybe_finalize_async_calls(blocking=blocking)
        except CheckpointException as error:
            # megatron-core raises it on all ranks together, and says on the first one why.
            why = f" ({one_line(error)})" if error.failures else ""
            problem = f"a background process failed to write it{why}{self._room(temporary)}"
            _raise_together(problem, temporary)
        except OSError as error:
            # Of the table of contents, which rank 0 writes alone: the others hear of it as of every error of one rank.
            problem = f"{one_line(error)}{self._room(temporary)}"
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"{temporary}: {problem}") from error
        sums = self.sums
        if sums is not None and (blocking or not agree(not sums.is_ready())):
            self.sums = None
            self._publish(sums, self.root / iteration_name(self.pending), self.pending)

    def close(self) -> None:
        """Waits for a background save and ends its helper."""
        self.finish()
        if self.queue is not None:
            self.queue.close()

    def _room(self, temporary: Path) -> str:
        """What is free where that is too little; torch says of a full disk only that a file has another length."""
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(temporary).free
            return f", {free / 1e9:.2f} GB are free" if free < self.size else ""
        return ""

    def _make_sums(self, temporary: Path) -> None:
        # Rank 0 has written the table of contents just before, in the same round of finalizing.
        self.sums = RankSums(temporary)

    def _publish(self, sums: RankSums, target: Path, step: int) -> None:
        problem = ""
        try:
            sums.write()
        except (CheckpointError, OSError) as error:
            problem = str(error)
        _raise_together(problem, sums.folder)

        def publish() -> None:
            publish_folder(sums.folder, target)
            write_text_atomic(self.root / TRACKER, f"{step}\n")
            if self.keep_last > 0:
                # The seed checkpoint, of step 0, is what other layouts start from.
                own = [path for number, path in iterations(self.root) if 0 < number <= step]
                for path in own[: -self.keep_last]:
                    shutil.rmtree(path, ignore_errors=True)

        from_rank_zero(publish)


def load_checkpoint(
    path: Path, config: RunConfig, parts: ModelParts, with_optimizer: bool = True
) -> TrainState:
    """Loads weights, and with `with_optimizer` also the optimizer's state and the step.

    Everything that is an option is this run's: rates, bounds, betas, epsilon and weight decay of every parameter group,
    and the schedule, which goes on at the loaded number of updates.

    Raises:
        CheckpointError: if the checkpoint is of another model, has other optimizer state, or is damaged.
    """
    common = from_rank_zero(lambda: load_common(path))
    saved = common.get("config", {})
    # Earlier versions had masks alone.
    kinds = saved.get("objectives", {}).get("kind", "masked"), config.objectives.kind
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"{path}: is of {kinds[0]} pretraining, whose heads this run of objectives.kind={kinds[1]} does not have"
        )
    check_architecture(path, saved, config)
    # A seed checkpoint, and that of the best step, have weights only.
    with_optimizer = with_optimizer and "optimizer" in common
    optimizer_format = stored_format(common) if with_optimizer else FULLY_RESHARDABLE
    in_buckets = optimizer_format == DP_RESHARDABLE
    if in_buckets:
        assert isinstance(parts, TrainingParts)
        if common.get("optimizer_buckets") != bucket_digest(parts.optimizer):
            raise CheckpointError(_other_buckets(path, saved, config))
    content = sharded_content(parts, True, with_optimizer, optimizer_format)
    if with_optimizer and not in_buckets:
        for member in _members(content["optimizer"]):
            member.pop("param_groups", None)
        _check_optimizer_state(path, content["optimizer"], saved, config)
    strict = StrictHandling.RAISE_ALL if with_optimizer else StrictHandling.RAISE_UNEXPECTED
    loaded = load_sharded(content, path, strict, config.checkpoint.parallel_load)
    for index, chunk in enumerate(parts.chunks):
        chunk.load_state_dict(loaded[f"model{index}"], strict=True)
    if not with_optimizer:
        if isinstance(parts, TrainingParts):
            parts.optimizer.reload_model_params()
        return TrainState()
    assert isinstance(parts, TrainingParts)
    # In buckets, groups are stored with the share of every rank.
    groups = loaded if in_buckets else common
    _adopt_groups(parts.optimizer, loaded["optimizer"], groups["optimizer"])
    # From buckets megatron-core copies into parameters that require gradients.
    with torch.no_grad():
        parts.optimizer.load_state_dict(loaded["optimizer"])
    first_scale = saved.get("optim", {}).get("initial_loss_scale", config.optim.initial_loss_scale)
    bound_loss_scale(parts.optimizer, first_scale != config.optim.initial_loss_scale)
    parts.scheduler.load_state_dict(loaded["scheduler"])
    try:
        return TrainState(**common["train_state"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: common.pt is damaged: no state of training ({error})"
        ) from None


def load_sharded(
    content: dict[str, Any], path: Path, strict: StrictHandling, in_parallel: bool
) -> dict[str, Any]:
    """Fills a sharded state dict from a checkpoint; every rank must call it.

    Args:
        in_parallel: of what data-parallel ranks have in common each reads a share, and broadcasts it to the others.

    Raises:
        CheckpointError: on every rank, if any cannot read.
    """
    from_rank_zero(lambda: check_harmless(path))
    with naming_checkpoint(path):
        strategy = None
        if in_parallel:
            # Of megatron-core's other exchanges, gather_rounds needs NCCL, and gather_object pickles whole states.
            strategy = FullyParallelLoadStrategyWrapper(
                get_default_load_sharded_strategy(str(path)),
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                exchange_algo="broadcast",
            )
        return dist_checkpointing.load(content, str(path), strategy, strict=strict)  # type: ignore[no-any-return]


def bucket_digest(optimizer: MegatronOptimizer) -> str:
    """Which element of which parameter lies where in the buckets of all ranks, as SHA-256; every rank must call it.

    It does not depend on the number of data-parallel ranks as long as the sizes of buckets do not: up to 40 such ranks.
    """
    digests = []
    for index, part in enumerate(_optimizers(optimizer)):
        names = {
            parameter: f"{number} {name}"
            for number, chunk in enumerate(getattr(part, "model_chunks", ()))
            for name, parameter in chunk.named_parameters()
        }
        lines = [f"{index} {getattr(part, 'data_parallel_group_idx', None)}"]
        for buffer in getattr(part, "buffers", ()):
            lines.append(f"{buffer.param_dtype} {buffer.grad_dtype}")
            for parameter, (start, end, bucket) in buffer.param_index_map.items():
                first = buffer.bucket_indices[bucket][0]
                lines.append(f"{bucket} {start - first} {end - first} {names[parameter]}")
        digests.append(hashlib.sha256("\n".join(lines).encode()).hexdigest())
    return hashlib.sha256("\n".join(sorted(union_over_ranks(digests))).encode()).hexdigest()


def _other_buckets(path: Path, saved: Mapping[str, Any], config: RunConfig) -> str:
    """The error of optimizer state in buckets that this run does not have."""
    changed = _changed_state_options(saved, config, (*BUCKET_OPTIONS, *STATE_OPTIONS))
    return (
        f"{path}: its optimizer state is {DP_RESHARDABLE}, which loads only into the buckets that it was written from "
        f"({', '.join(changed) or 'another number of ranks changes their size'}); go on with it there for one step, "
        f"--checkpoint.optimizer_format {FULLY_RESHARDABLE} --exit-interval 1, and that checkpoint loads here; or take "
        f"the weights alone into a new run with --load {path} --checkpoint.load_optimizer false"
    )


def _check_optimizer_state(
    path: Path, requested: Mapping[Any, Any], saved: Mapping[str, Any], config: RunConfig
) -> None:
    """Refuses optimizer state of other parameters or of another kind, naming the options that make it so.

    Raises:
        CheckpointError: on every rank.
    """

    def stored_keys() -> set[str]:
        check_harmless(path)
        with naming_checkpoint(path):
            stored = dist_checkpointing.load_tensors_metadata(str(path))
        return {key for key in stored if is_optimizer_key(key)}

    theirs = from_rank_zero(stored_keys)
    wanted = (value for value in nested_values(requested) if isinstance(value, ShardedTensor))
    ours = union_over_ranks(value.key for value in wanted)
    if theirs == ours:
        return
    listed = ", ".join(_changed_state_options(saved, config, STATE_OPTIONS))
    raise CheckpointError(
        f"{path}: its optimizer state is not of what this run trains ({len(ours - theirs)} tensors are missing, "
        f"{len(theirs - ours)} have no use{f'; {listed}' if listed else ''}); to take the weights alone, start a new "
        f"run with --load {path} --checkpoint.load_optimizer false"
    )


def _changed_state_options(
    saved: Mapping[str, Any], config: RunConfig, names: Sequence[str]
) -> list[str]:
    """Which of these options differ from a checkpoint's, and which of `USED_OPTIONS` are 0 on one side alone."""
    before, now = flat_options(saved), flat_options(dataclasses.asdict(config))
    # Earlier versions had nothing else.
    before = {"model.transformer_impl": "local", "train.fp8": "none", **before}
    changed = [name for name in names if before.get(name) != now[name]]
    changed += [
        name
        for name in USED_OPTIONS
        if name in before and name in now and bool(before[name]) != bool(now[name])
    ]
    return [f"{name}: {before.get(name)} -> {now[name]}" for name in changed]


def _adopt_groups(
    optimizer: MegatronOptimizer, loaded: dict[str, Any], common: Mapping[str, Any]
) -> None:
    """Puts the optimizer's own groups, with the saved step count, into the state dict that it is to load.

    Of a saved parameter group only Adam's step count is state. Rates, bounds, betas, epsilon and weight decay are
    options, and so is which parameters share a group (`optim.layer_decay`, `optim.head_lr_multiplier`): all of that is
    the loading run's own. megatron-core looks saved groups up instead: 0.16.1 without their rates, so that it takes one
    group for another, 0.19 with them, so that it finds none when a rate has changed.

    `common` is where the checkpoint's groups are: the optimizer's part of what it holds besides tensors, or in buckets
    of what was loaded.
    """
    steps = {g["step"] for m in _members(common) for g in m.get("param_groups", ()) if "step" in g}
    # All groups take every step together; where they differ, a group without parameters was left behind.
    step = {"step": max(steps)} if steps else {}
    for own, member in zip(_optimizers(optimizer), _members(loaded), strict=True):
        groups = own.optimizer.state_dict()["param_groups"]
        member["param_groups"] = [{**group, **step} for group in groups]
        # A stage without parameters of this kind has asked for no state, and megatron-core has dropped the empty place.
        member.setdefault("state", {})


def bound_loss_scale(optimizer: MegatronOptimizer, starts_anew: bool) -> None:
    """Brings a loaded loss scale of fp16 within the bounds of this run; without fp16 there is none.

    megatron-core doubles the scale when its count of good steps *equals* the window: a saved count above a smaller
    window would never double it again.

    Where `optim.initial_loss_scale` is another than the saved run's, the scale starts there again.
    """
    for part in _optimizers(optimizer):
        scaler = getattr(part, "grad_scaler", None)
        if scaler is None or not hasattr(scaler, "growth_interval"):
            continue
        if starts_anew:
            scaler._scale.fill_(part.config.initial_loss_scale)
            scaler._growth_tracker, scaler._hysteresis_tracker = 0, scaler.hysteresis
        scaler._scale = torch.maximum(scaler._scale, scaler.min_scale)
        scaler._growth_tracker = min(scaler._growth_tracker, scaler.growth_interval - 1)
        scaler._hysteresis_tracker = min(scaler._hysteresis_tracker, scaler.hysteresis)


def _optimizers(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _members(state: Mapping[Any, Any]) -> list[Any]:
    """The parts of a state dict, one, or one per chained optimizer under 0, 1, ...: where the groups lie.

    Mixed-precision and distributed optimizers wrap the state of the inner one.
    """
    chained = sorted(key for key in state if isinstance(key, int))
    members: list[Any] = [state[key] for key in chained] if chained else [state]
    return [member.get("optimizer", member) for member in members]


@contextlib.contextmanager
def naming_checkpoint(path: Path) -> Iterator[None]:
    """Whatever fails while a checkpoint is read becomes a CheckpointError that names it."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def load_common(path: Path) -> dict[str, Any]:
    """What a checkpoint that is about to be loaded holds besides tensors: `config`, `train_state`, optimizer settings.

    Raises:
        CheckpointError: if the folder is no readable checkpoint, or one of a megatron-core that is too new.
    """
    try:
        stored = io.BytesIO(common_content(path))
        common = of_common(torch.load(stored, map_location="cpu", weights_only=True))
    except Exception as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({type(error).__name__})"
        ) from None
    # Where megatron-core can note a backend for it, it reads what is common from a file only.
    if hasattr(CheckpointingConfig, "common_backend") and not (path / COMMON_FILE).is_file():
        raise CheckpointError(
            f"{path}: a later megatron-core wrote it than the {megatron.core.__version__} here, which cannot load it; "
            "go on with Python 3.12 or later, whose megatron-core loads the checkpoints of both"
        )
    return common


def check_architecture(
    path: Path, saved: Mapping[str, Any], config: RunConfig, free: Sequence[str] = ()
) -> None:
    """Refuses a checkpoint, of which this is the saved configuration, if it is of another model.

    Options named in `free` may differ.

    Raises:
        CheckpointError: naming the first option that differs.
    """
    theirs, ours = flat_options(saved), flat_options(dataclasses.asdict(config))
    for name in (name for name in ARCHITECTURE if name not in free):
        if theirs.get(name) is None:
            raise CheckpointError(f"{path}: holds no {name}; not a checkpoint of this project")
        if theirs[name] != ours[name]:
            raise CheckpointError(
                f"{path}: is of another model: {name} is {theirs[name]} there, {ours[name]} here"
            )
    # Earlier versions had no such bias.
    rates = [options.get("moe.balance_bias_rate", 0.0) for options in (theirs, ours)]
    if (rates[0] > 0.0) != (rates[1] > 0.0):
        raise CheckpointError(
            f"{path}: is of another model: moe.balance_bias_rate is {rates[0]:g} there, {rates[1]:g} here, "
            "and only above 0 a model has a bias of experts"
        )


def changed_options(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Options that differ from a checkpoint's, as `section.option: THERE -> HERE`."""
    theirs, ours = flat_options(saved), flat_options(dataclasses.asdict(config))
    return [
        f"{name}: {theirs[name]} -> {value}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]


def warn_of_other_gates(path: Path, saved: Mapping[str, Any], config: RunConfig) -> None:
    """One line if the experts of another run come under gates that they were not made for.

    The gates' sum, which their number and normalisation decide, is a factor of the experts' output; upcycling even
    scales weights to make up for it.
    """
    names = ("moe.topk: ", "moe.normalize_gate: ", "moe.routing: ")
    changed = [line for line in changed_options(saved, config) if line.startswith(names)]
    if changed and has_experts(config.moe):
        log.warning(
            "the experts of %s were trained or scaled for other gates, so what they add changes: %s",
            path,
            ", ".join(changed),
        )


def sharded_content(
    parts: ModelParts,
    is_loading: bool,
    with_optimizer: bool,
    optimizer_format: str = FULLY_RESHARDABLE,
) -> dict[str, Any]:
    """What a checkpoint has of model, optimizer and schedule, as megatron-core saves it or loads into it."""
    metadata = checkpoint_metadata(optimizer_format)
    content: dict[str, Any] = {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(parts.chunks)
    }
    if with_optimizer:
        assert isinstance(parts, TrainingParts)
        models = dict(content) if len(content) > 1 else {"model": content["model0"]}
        content["optimizer"] = parts.optimizer.sharded_state_dict(
            models, is_loading=is_loading, metadata=metadata
        )
        if optimizer_format == DP_RESHARDABLE:
            _clear_gaps(content["optimizer"])
        content["scheduler"] = parts.scheduler.state_dict()
    return content


def _gradients(parts: ModelParts) -> list[torch.Tensor]:
    """The buffers of all gradients of this rank."""
    if not isinstance(parts, TrainingParts):
        return []
    buffers = [b for c in parts.wrapped for b in (*c.buffers, *c.expert_parallel_buffers)]
    return [buffer.grad_data for buffer in buffers if buffer.grad_data is not None]


def _clear_gaps(state: Mapping[Any, Any]) -> None:
    """Writes zeros between the parameters of a bucket, where megatron-core stores what was in memory."""
    chained = [state[key] for key in state if isinstance(key, int)]
    for member in chained or [state]:
        buffers = [value for value in member["param_state"].values() if isinstance(value, dict)]
        pieces = [
            p for buffer in buffers for buckets in buffer.values() for b in buckets for p in b
        ]
        for piece in pieces:
            if piece["padding"].unwrap():
                for value in piece.values():
                    if isinstance(value, ShardedTensor):
                        value.data.zero_()


def _raise_together(problem: str, path: Path) -> None:
    """Raises the same on every rank if any rank has a problem, and removes the unfinished folder."""
    if agree(bool(problem)):
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        if is_rank_zero():
            shutil.rmtree(path, ignore_errors=True)
        # megatron-core tells the first rank why another one failed to write, and the others nothing.
        raise CheckpointError(f"{path}: {next(filter(None, problems))}")
