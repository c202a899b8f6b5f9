"""Fine-tuning and evaluation: from a checked configuration to a fine-tuned model and its results."""

from __future__ import annotations

import gc
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Mapping

from megatron_vlmoe.config.errors import ConfigError
from megatron_vlmoe.config.schema import Precision
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import load_code
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.finetune.data import TaskData
from megatron_vlmoe.finetune.metrics import mean_and_std
from megatron_vlmoe.finetune.objective import TaskObjective
from megatron_vlmoe.finetune.options import checkpoint_of, saved_run
from megatron_vlmoe.finetune.predictions import write_json
from megatron_vlmoe.finetune.results import evaluate_all, evaluation_settings
from megatron_vlmoe.finetune.saved import load_weights, weight_source
from megatron_vlmoe.model.task_heads import build_task_heads
from megatron_vlmoe.planning.validate import validate, validate_task
from megatron_vlmoe.runtime.distributed import (
    destroy,
    from_rank_zero,
    initialize,
    is_rank_zero,
    resolve_precision,
    seed_everything,
)
from megatron_vlmoe.runtime.helper_processes import lead_helpers
from megatron_vlmoe.runtime.ranks import Ranks, environment_world_size
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.train.checkpoint_files import find_checkpoint
from megatron_vlmoe.train.data_sums import verify_data
from megatron_vlmoe.train.failures import training_failures
from megatron_vlmoe.train.own_checkpoint import own_checkpoint
from megatron_vlmoe.train.resume import warm_start
from megatron_vlmoe.train.run_files import LABELS_FILE, TOKENIZER_FILE, keep_file
from megatron_vlmoe.train.run_log import begin_run_logs
from megatron_vlmoe.train.setup import TrainingParts, build_forward_only, build_training
from megatron_vlmoe.train.startup import (
    check_same_on_all_ranks,
    locked_run_folder,
    log_layout,
    make_run_folder,
    report_packages,
    watch_ranks,
)
from megatron_vlmoe.train.step_graph import check_cuda_graph
from megatron_vlmoe.train.trainer import Trainer

log = logging.getLogger("megatron_vlmoe")


def run_finetune(config: FinetuneConfig) -> None:
    """Trains on a task, keeps the best weights, evaluates them on every split; once per seed of `task.seeds`."""
    validate_task(config, environment_world_size())
    run = _several_seeds if config.task.seeds else finetune
    with training_failures(config):
        ranks, precision = _start(config)
        with locked_run_folder(config.checkpoint.save):
            run(config, ranks, precision)
    destroy()


def finetune(config: FinetuneConfig, ranks: Ranks, precision: Precision) -> dict[str, float]:
    """One run of a configuration that is checked by `validate_task`.

    Returns:
        Metrics of all splits by `SPLIT/NAME`, from the best weights.
    """
    check_cuda_graph(config.train, precision)
    make_run_folder(config)
    own = own_checkpoint(config.checkpoint)
    begun = None if own is None else _begun(config, own)
    data = TaskData.open(config, BatchShare.of(ranks))
    config = data.config
    check_same_on_all_ranks(config)
    validate(config, ranks.world_size)
    verify_data(config)
    if begun is not None and begun.task.labels_sha256 != config.task.labels_sha256:
        raise ConfigError(
            f"task.data={config.task.data}: its labels are not those that the run in --save "
            f"{config.checkpoint.save} is trained on"
        )
    micro_batches = num_micro_batches(config, ranks.data_size)
    log_layout(config, ranks, precision, micro_batches, data.summary())
    with training_failures(config, data.check_files):
        parts = build_training(config, precision, build_task_heads)
    if parts.frozen:
        log.info("frozen: %s", ", ".join(parts.frozen))
    if begun is None:
        _start_weights(config, parts)
    objective = build_objective(config, ranks, data)
    if config.checkpoint.save and is_rank_zero():
        # A checkpoint can be used alone with its class names and text tokenizer beside it.
        keep_file(f"{config.task.data}_labels.json", config.checkpoint.save, LABELS_FILE)
        keep_file(config.data.text_tokenizer, config.checkpoint.save, TOKENIZER_FILE)
    trainer = Trainer(config, parts, ranks, data, micro_batches, precision, objective, own)
    state = trainer.run()
    out_of_patience = objective.patience and state.worse_evaluations >= objective.patience
    if trainer.is_interrupted or (state.step < config.train.steps and not out_of_patience):
        # Interrupted: the next run goes on from here.
        return {}
    best = _load_best(config, parts, trainer, objective)
    return evaluate_all(config, parts, ranks, data, objective, best, precision)


def _begun(config: FinetuneConfig, own: Path) -> FinetuneConfig:
    """The run in `--save` that this one goes on with, from its checkpoint `own`.

    Raises:
        ConfigError: if it is one of something else.
    """
    save = config.checkpoint.save
    run = from_rank_zero(lambda: saved_run(str(own)))
    if isinstance(run, FinetuneConfig) and run.task.name == config.task.name:
        return run
    name = run.task.name if isinstance(run, FinetuneConfig) else "pretraining"
    raise ConfigError(f"--save {save}: holds a run of {name}, not of {config.task.name}")


def _start_weights(config: FinetuneConfig, parts: TrainingParts) -> None:
    """Takes the weights of `--load` and says what became of every tensor."""
    if not config.checkpoint.load:
        log.info("starting from initial weights: no --load")
        return
    path = from_rank_zero(lambda: checkpoint_of(config.checkpoint.load, config.checkpoint.step))
    source = from_rank_zero(lambda: saved_run(str(path)))
    # A head for other classes is no start for this one.
    same_head = (
        isinstance(source, FinetuneConfig)
        and source.task.name == config.task.name
        and source.task.labels_sha256 == config.task.labels_sha256
    ) or (source.objectives.kind == "contrastive" and config.task.spec.target == "match")
    log.info("starting from %s", path)
    weights = weight_source(path, config.checkpoint.parallel_load, config.checkpoint.verify)
    report = warm_start(weights, config, parts, with_heads=same_head)
    for line in report.lines():
        log.info(line)
    if config.checkpoint.save and is_rank_zero():
        content = {"checkpoint": str(path), **asdict(report)}
        write_json(Path(config.checkpoint.save) / "start.json", content)


def run_evaluate(config: FinetuneConfig) -> None:
    """Runs a fine-tuned checkpoint on the splits of its task."""
    validate_task(config, environment_world_size(), training=False)
    with training_failures(config):
        _evaluate(config)
    destroy()


def _evaluate(config: FinetuneConfig) -> None:
    ranks, precision = _start(config)
    make_run_folder(config)
    data = TaskData.open(config, BatchShare.of(ranks), training=False)
    config = data.config
    check_same_on_all_ranks(config)
    verify_data(config, training=False)
    # The length of training is of no account here.
    config = replace(config, train=replace(config.train, steps=max(1, config.train.steps)))
    validate(config, ranks.world_size)
    log_layout(config, ranks, precision, 0, data.summary())
    parts = build_forward_only(config, precision, build_task_heads)
    path = from_rank_zero(lambda: checkpoint_of(config.checkpoint.load, config.checkpoint.step))
    load_weights(path, config, parts)
    log.info("loaded %s", path)
    begin_run_logs()
    objective = build_objective(config, ranks, data)
    evaluate_all(config, parts, ranks, data, objective, str(path), precision)


def _start(config: FinetuneConfig) -> tuple[Ranks, Precision]:
    lead_helpers(config.train.exit_signals)
    if config.checkpoint.save:
        # Also the folder of several seeds, whose log has all of them.
        make_run_folder(config)
    report_packages()
    precision = resolve_precision(config.train)
    ranks = initialize(config.parallel, config.train.seed, config.train.deterministic)
    watch_ranks(config, ranks)
    return ranks, precision


def build_objective(config: FinetuneConfig, ranks: Ranks, data: TaskData) -> TaskObjective:
    """The objective of a run's task."""
    make = load_code(config.task.spec.objective, config.task.name)
    objective: TaskObjective = make(config, ranks, data)
    return objective


def _load_best(
    config: FinetuneConfig, parts: TrainingParts, trainer: Trainer, objective: TaskObjective
) -> str:
    """Loads the weights of the best evaluation, where there is one; returns the folder of what is in the model."""
    save, state = config.checkpoint.save, trainer.state
    keeps_best = save and config.task.save_best
    best = from_rank_zero(lambda: find_checkpoint(Path(save) / "best")) if keeps_best else None
    if best is None:
        root = trainer.writer.root if trainer.writer is not None else None
        return str(from_rank_zero(lambda: find_checkpoint(root))) if root is not None else ""
    if state.best_step == state.step:
        log.info("the last weights are the best, %s", best)
    else:
        load_weights(best, config, parts)
        objective.forget()
        log.info("loaded the best weights, %s", best)
    return str(best)


def _several_seeds(config: FinetuneConfig, ranks: Ranks, precision: Precision) -> None:
    """One run per seed in SAVE/seed_N; mean and standard deviation in SAVE/metrics.json."""
    save = config.checkpoint.save
    results: dict[int, Mapping[str, float]] = {}
    for seed in config.task.seeds:
        folder = str(Path(save) / f"seed_{seed}") if save else ""
        own = replace(
            config,
            train=replace(config.train, seed=seed),
            checkpoint=replace(config.checkpoint, save=folder),
            task=replace(config.task, seeds=()),
        )
        log.info("seed %d", seed)
        seed_everything(seed)
        with locked_run_folder(folder):
            results[seed] = finetune(own, ranks, precision)
        gc.collect()
        if not results[seed]:
            return
    names = results[config.task.seeds[0]]
    summary = {}
    for name in names:
        if name.endswith(("/samples", "/unlabelled")):
            continue
        mean, deviation = mean_and_std([results[seed][name] for seed in config.task.seeds])
        summary[name] = {"mean": mean, "std": deviation}
        log.info("%s: %.2f +- %.2f over %d seeds", name, mean, deviation, len(results))
    if save and is_rank_zero():
        by_seed = {str(seed): metrics for seed, metrics in results.items()}
        settings = evaluation_settings(config, ranks, save, precision)
        content = {"task": config.task.name, "seeds": by_seed, "summary": summary}
        write_json(Path(save) / "metrics.json", content | {"settings": settings})
