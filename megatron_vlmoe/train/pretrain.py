"""Pretraining: from a checked configuration to a trained model."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Callable, Mapping, Optional

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vlmoe.config.schema import Precision, RunConfig
from megatron_vlmoe.data.batches import PretrainData
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.losses.masked import (
    EVALUATED,
    LOSS_SEGMENTS,
    LOSSES,
    PAIR_LOSSES,
    evaluation_metrics,
    evaluation_sums,
    exchange_captions,
    total_loss,
)
from megatron_vlmoe.model.heads import Predicted
from megatron_vlmoe.planning.validate import validate
from megatron_vlmoe.runtime.distributed import (
    destroy,
    device,
    initialize,
    is_rank_zero,
    resolve_precision,
)
from megatron_vlmoe.runtime.helper_processes import lead_helpers
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import TEXT_SEGMENTS, VISION_SEGMENTS, SegmentName, StreamLayout
from megatron_vlmoe.stream.sizes import num_micro_batches
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.train.contrastive import ContrastiveObjective
from megatron_vlmoe.train.data_sums import verify_data
from megatron_vlmoe.train.failures import training_failures
from megatron_vlmoe.train.metrics import collect
from megatron_vlmoe.train.objective import BatchSource, PretrainingObjective
from megatron_vlmoe.train.run_files import TOKENIZER_FILE, keep_file
from megatron_vlmoe.train.setup import build_training
from megatron_vlmoe.train.startup import (
    check_same_on_all_ranks,
    locked_run_folder,
    log_layout,
    make_run_folder,
    report_packages,
    watch_ranks,
)
from megatron_vlmoe.train.step import Losses, StepRunner
from megatron_vlmoe.train.step_graph import check_cuda_graph
from megatron_vlmoe.train.trainer import Trainer

log = logging.getLogger("megatron_vlmoe")

OpenData = Callable[[RunConfig, BatchShare], PretrainData | RandomData]


def pretrain(config: RunConfig, open_data: OpenData = PretrainData.open) -> None:
    """Trains, to the end of the run or to a clean early exit.

    Args:
        config: the run, checked by `validate`.
        open_data: makes the source of batches, which knows the run's configuration with all sizes filled in.
    """
    lead_helpers(config.train.exit_signals)
    make_run_folder(config)
    report_packages()
    precision = resolve_precision(config.train)
    check_cuda_graph(config.train, precision)
    with training_failures(config):
        ranks = initialize(config.parallel, config.train.seed, config.train.deterministic)
        watch_ranks(config, ranks)
        with locked_run_folder(config.checkpoint.save):
            _pretrain(config, open_data, ranks, precision)
    # Not after an error: other ranks may still wait in a collective, and the launcher ends them.
    destroy()


def _pretrain(config: RunConfig, open_data: OpenData, ranks: Ranks, precision: Precision) -> None:
    data = open_data(config, BatchShare.of(ranks))
    config = data.config
    check_same_on_all_ranks(config)
    validate(config, ranks.world_size)
    if isinstance(data, PretrainData):
        verify_data(config)
    if config.checkpoint.save and is_rank_zero():
        keep_file(config.data.text_tokenizer, config.checkpoint.save, TOKENIZER_FILE)
    micro_batches = num_micro_batches(config, ranks.data_size)
    # Only the first rank logs it, and it reads the length of every caption.
    summary = data.summary() if is_rank_zero() else []
    log_layout(config, ranks, precision, micro_batches, summary)
    with training_failures(config, data.check_files):
        parts = build_training(config, precision)
    if parts.frozen:
        log.info("frozen, never reached by this run: %s", ", ".join(parts.frozen))
    if data.image_tokenizer is not None:
        data.image_tokenizer.to(device())
    objective = pretraining_objective(config, ranks, data, micro_batches, data.image_tokenizer)
    Trainer(config, parts, ranks, data, micro_batches, precision, objective).run()


def pretrain_random(config: RunConfig) -> None:
    """Trains on batches of random numbers, which need no files: the command `pretrain-random`.

    What tokenizers and captions decide is filled in where the options leave it open.
    """
    model, objectives = config.model, config.objectives
    slots = objectives.caption_mask_fraction * (model.pair_text_length - 2)
    model = replace(
        model,
        vocab_size=model.vocab_size or 1000,
        visual_vocab_size=model.visual_vocab_size or 512,
    )
    objectives = replace(
        objectives,
        num_masked_patches=objectives.num_masked_patches or int(0.4 * model.num_patches),
        caption_mask_slots=objectives.caption_mask_slots or max(1, int(slots)),
    )
    pretrain(replace(config, model=model, objectives=objectives), RandomData)


def pretraining_objective(
    config: RunConfig,
    ranks: Ranks,
    data: Optional[BatchSource] = None,
    num_micro_batches: int = 1,
    image_tokenizer: Optional[ImageTokenizer] = None,
) -> MaskedObjective | ContrastiveObjective:
    """What a run of `objectives.kind` trains on; see the two classes."""
    if config.objectives.kind == "contrastive":
        return ContrastiveObjective(config, ranks, data, num_micro_batches)
    return MaskedObjective(config, ranks, data, num_micro_batches, image_tokenizer)


class MaskedObjective(PretrainingObjective):
    """Masked data modelling (paper section 3.1).

    Args:
        data: see `PretrainingObjective`, as is `num_micro_batches`.
        image_tokenizer: computes visual tokens on the last stage; None if they are stored.
    """

    loss_names: tuple[str, ...] = LOSSES

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        data: Optional[BatchSource] = None,
        num_micro_batches: int = 1,
        image_tokenizer: Optional[ImageTokenizer] = None,
    ) -> None:
        super().__init__(config, ranks, data, num_micro_batches)
        self.image_tokenizer = image_tokenizer

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """`loss/mlm`, `loss/mim`, `loss/vlm_text`, `loss/vlm_image` of what the run has, and `loss/vlm`."""
        objectives = self.config.objectives
        layout = StreamLayout.of(self.config)
        metrics = {
            f"loss/{name}": means[name] for name in LOSSES if layout.count(LOSS_SEGMENTS[name])
        }
        if layout.pairs:
            metrics["loss/vlm"] = (
                objectives.vlm_text_weight * means["vlm_text"]
                + objectives.vlm_image_weight * means["vlm_image"]
            )
        return metrics

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Exact averages over `train.eval_steps` steps of held-out data; every rank must call it.

        Returns:
            What `evaluation_metrics` makes of it, on every rank.
        """
        model = self.config.model
        sizes = [
            model.vocab_size if LOSS_SEGMENTS[name] in TEXT_SEGMENTS else model.visual_vocab_size
            for name in LOSSES
        ]
        # Sums and label histograms of all losses lie in one tensor, for one all-reduce.
        shape = (len(EVALUATED), len(LOSSES), 3)
        flat = torch.zeros(math.prod(shape) + sum(sizes), dtype=torch.float64, device=device())
        table, *histograms = flat.split([math.prod(shape), *sizes])
        sums = dict(zip(EVALUATED, table.view(shape)))
        if runner.layout.pairs:
            for batch, result in self.evaluated(runner, evaluation_sums, exchange_captions):
                if batch.get("exchange_distance", 0):
                    for name in PAIR_LOSSES:
                        sums["exchanged"][LOSSES.index(name)] += result[name].counts
            # What the experts did with wrong pairs is not part of their statistics.
            collect(runner.parts.chunks, self.config)
        for batch, result in self.evaluated(runner, evaluation_sums):
            for name, (counts, labels, foreground) in result.items():
                row, labels = LOSSES.index(name), labels.reshape(-1)
                sums["all"][row] += counts
                if foreground is not None:
                    sums["foreground"][row] += foreground
                if name in PAIR_LOSSES and batch.get("exchange_distance", 0):
                    sums["paired"][row] += counts
                histograms[row].scatter_add_(0, labels.clamp(min=0), (labels >= 0).double())
        dist.all_reduce(flat)
        return evaluation_metrics(sums, histograms)

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """Loss, accuracy and the unigram entropy beside it, and what a pair's other half is worth."""
        parts = []
        for name in LOSSES:
            if f"eval/loss/{name}" in metrics:
                line = f"{name} {metrics[f'eval/loss/{name}']:.3f} (unigram {metrics[f'unigram/{name}']:.3f}"
                line += f", acc {100 * metrics[f'acc/{name}']:.1f} %"
                if f"acc/{name}_foreground" in metrics:
                    line += f", foreground {100 * metrics[f'acc/{name}_foreground']:.1f} %"
                if f"eval/grounding/{name}" in metrics:
                    line += f", grounding {metrics[f'eval/grounding/{name}']:.3f}"
                parts.append(f"{line})")
        return "evaluation | " + " | ".join(parts)

    def loss(self, batch: Batch, outputs: Mapping[SegmentName, Predicted]) -> tuple[Tensor, Losses]:
        """The weighted total of a micro-batch, and the single losses."""
        loss, single = total_loss(batch, outputs, self.config.objectives)
        return loss, {"total": loss.detach().clone(), **single}

    def prepare(self, batch: Batch) -> Batch:
        """Adds visual tokens that are not stored."""
        if not self.ranks.is_last_stage or self.image_tokenizer is None:
            return batch
        completed = batch.copy()
        for segment in VISION_SEGMENTS:
            if "tokenizer_pixels" in batch.get(segment, ()):
                images = batch[segment].copy()
                codes = self._codes(images.pop("tokenizer_pixels"))
                images["labels"] = codes.gather(1, images["positions"])
                completed[segment] = images
        return completed

    @torch.no_grad()
    def _codes(self, pixels: Tensor) -> Tensor:
        """Codes of all images of the micro-batch from this rank's share ``[n / TP, 3, S, S]`` of uint8."""
        assert self.image_tokenizer is not None
        codes = self.image_tokenizer.encode(pixels.float() / 255.0)
        if self.ranks.tensor_size == 1:
            return codes
        parts = [torch.empty_like(codes) for _ in range(self.ranks.tensor_size)]
        group = parallel_state.get_tensor_model_parallel_group()
        dist.all_gather(parts, codes.contiguous(), group=group)
        return torch.cat(parts)
