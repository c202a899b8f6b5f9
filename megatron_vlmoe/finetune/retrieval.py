"""Image-text retrieval: contrastive and matching losses with hard negatives (paper section 4.2, after VLMo).

A step runs the pipeline twice. A forward-only run of captions and images gives features, from which every row draws a
wrong image and a wrong caption among those of all data-parallel ranks; then one training run reads captions, images and
three pairs per row: the matching one, one with the wrong image, one with the wrong caption.

Letters: m rows of a micro-batch, B rows of a pool, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Iterator, Mapping, Optional

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.config.tasks import SampleShape
from megatron_vlmoe.finetune.data import SplitData, TaskData
from megatron_vlmoe.finetune.metrics import Found, recall_at_k, recall_at_k_of_features
from megatron_vlmoe.finetune.objective import (
    Array,
    Measured,
    Parts,
    TaskObjective,
    share_metrics,
    to_numpy,
)
from megatron_vlmoe.losses.contrastive import CachedGradients
from megatron_vlmoe.losses.tasks import hard_negatives, matching_loss
from megatron_vlmoe.runtime.distributed import Ranks, device
from megatron_vlmoe.runtime.machine import cores_of_rank
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.draws import keyed_generator
from megatron_vlmoe.train.contrastive import gather_rows, pool_loss
from megatron_vlmoe.train.step import Losses, StepRunner


@dataclass(frozen=True)
class Negatives:
    """What the rows of one micro-batch are paired with, ``[m]`` each.

    Args:
        image_rows: numbers (over the run) of the samples whose images are wrong.
        text_rows: those whose captions are wrong.
        valid: rows for which there was a wrong one to draw.
    """

    image_rows: Tensor
    text_rows: Tensor
    valid: Tensor


@dataclass(frozen=True)
class StepCache:
    """What the loss of every micro-batch of a step needs of the whole step."""

    gradients: CachedGradients
    numbers: Mapping[int, int]
    """Place of every micro-batch among those of this rank in the step, by `micro_batch`."""


class RetrievalObjective(TaskObjective):
    """Trains and judges dual encoding and matching."""

    def __init__(self, config: FinetuneConfig, ranks: Ranks, data: TaskData) -> None:
        self.matches = config.contrastive.matching_weight != 0.0
        losses = ("contrastive", "matching") if self.matches else ("contrastive",)
        super().__init__(config, ranks, data, losses)
        self._cache: Optional[StepCache] = None
        self.threads = min(16, cores_of_rank())

    def evaluate_split(self, runner: StepRunner, split: SplitData) -> Measured:
        """Recalls, also those after ranking the best candidates anew, where that is asked for."""
        metrics, found = super().evaluate_split(runner, split)
        if self.config.contrastive.rerank:
            recalls = self._rerank(runner, split, found)
            named = None if recalls is None else _named(f"{split.name}/reranked", recalls)
            metrics = metrics | share_metrics(named)
        return metrics, found

    def prepare_step(self, runner: StepRunner, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Adds pairs with hard negatives, and computes the gradients of the cache, from features of the whole step.

        These take a forward pass over captions and images without gradient.
        """
        batches = super().prepare_step(runner, batches)
        self._cache = None
        if not self.matches and not self.config.contrastive.cache:
            return batches
        step = list(batches)
        pools = self._features(runner, step)
        whole = _Pool.join(pools) if pools and self.config.contrastive.cache else None
        if whole is not None:
            gradients = CachedGradients.compute(whole.images, whole.texts, whole.logit_scale)
            numbers = {int(batch["micro_batch"]): number for number, batch in enumerate(step)}
            self._cache = StepCache(gradients, numbers)
        if not self.matches:
            return iter(step)
        # Drawn on the last stage, which tells the others.
        rows = self.config.task.micro_batch_size
        found = torch.zeros(len(step), 3, rows, dtype=torch.int64, device=device())
        for number, pool in enumerate(pools or ()):
            found[number] = self._draw(int(step[number]["micro_batch"]), pool, whole or pool)
        if self.ranks.pipeline_size > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            source = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(found, src=source, group=group)
        if self.ranks.tensor_size > 1:
            # Ranks whose products differ in a last bit would go on with different pairs.
            group = parallel_state.get_tensor_model_parallel_group()
            dist.broadcast(found, src=dist.get_process_group_ranks(group)[0], group=group)
        negatives = [Negatives(images, texts, valid.bool()) for images, texts, valid in found.cpu()]
        return (self._with_pairs(batch, own) for batch, own in zip(step, negatives))

    def _features(self, runner: StepRunner, step: list[Batch]) -> Optional[list[_Pool]]:
        """Pools of features, one per micro-batch, on the last stage; None elsewhere."""

        def measure(batch: Batch, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            names = ("image_features", "text_features", "logit_scale")
            return {name: outputs[name] for name in names} | {
                "image_documents": batch["image_documents"],
                "sample_numbers": batch["sample_numbers"],
            }

        layout = replace(runner.layout, pairs=0)
        results = runner.forward_no_grad(iter(step), len(step), measure, layout)
        if not self.ranks.is_last_stage:
            return None
        return [_Pool.gather(result, self.ranks) for result in results]

    @torch.no_grad()
    def _draw(self, micro_batch: int, own: _Pool, pool: _Pool) -> Tensor:
        """Numbers of wrong images and captions of the rows of a micro-batch, and validity: ``[3, m]``."""
        rows = own.local
        same = own.documents[rows, None] == pool.documents[None]
        scale = own.logit_scale.exp()
        drawn = []
        for purpose, mine, others in (
            ("negative image", own.texts[rows], pool.images),
            ("negative text", own.images[rows], pool.texts),
        ):
            seed = self.config.train.seed
            generator = keyed_generator(torch.device("cpu"), seed, micro_batch, purpose)
            index, valid = hard_negatives(scale * mine @ others.T, same, generator)
            drawn.append(pool.numbers[index.to(pool.numbers.device)])
        return torch.stack([*drawn, valid.to(drawn[0].device).long()])

    def _with_pairs(self, batch: Batch, negatives: Negatives) -> Batch:
        """Adds the three pairs of every row, row by row, so that a tensor-parallel share holds whole rows."""
        assert self.data.train is not None
        samples, dataset = self.data.train.samples, self.data.train.samples.dataset
        images = self.data.train.refs(negatives.image_rows.tolist())
        texts = self.data.train.refs(negatives.text_rows.tolist())
        ids, lengths = batch["texts"]["ids"], batch["texts"]["lengths"]
        wrong = samples.texts([dataset.row(ref.index).texts for ref in texts])
        wrong_ids, wrong_lengths = (torch.as_tensor(wrong[key]) for key in ("ids", "lengths"))
        completed = batch.copy()
        completed["pair_texts"] = {
            "ids": torch.stack([ids, ids, wrong_ids], dim=1).flatten(0, 1),
            "lengths": torch.stack([lengths, lengths, wrong_lengths], dim=1).flatten(),
        }
        completed["pair_images"] = {}
        if "pixels" in batch["images"]:
            # Of this rank's pairs; the wrong images are decoded again, as the same views that were compared.
            mine = images[self.data.share.slice(len(images))]
            documents = [dataset.row(ref.index).images[0] for ref in mine]
            own, drawn = batch["images"]["pixels"], samples.pixels(mine, documents, self.threads)
            pixels = torch.stack([own, torch.as_tensor(drawn), own], dim=1).flatten(0, 1)
            completed["pair_images"] = {"pixels": pixels}
        completed["negatives_valid"] = negatives.valid
        return completed

    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """The contrastive loss of the pool, of which the cache has the gradients, and that of matching."""
        weights, cache = self.config.contrastive, self._cache
        images, texts, scale = (
            outputs[name] for name in ("image_features", "text_features", "logit_scale")
        )
        if cache is None:
            contrastive = pool_loss(outputs, self.ranks)
            logged = contrastive
        else:
            rows = images.shape[0]
            # Pools of the micro-batches one after another, each with the rows of all data-parallel ranks.
            number = cache.numbers[int(batch["micro_batch"])]
            first = (number * self.ranks.data_size + self.ranks.data) * rows
            parts = len(cache.numbers) * self.ranks.data_size
            own = slice(first, first + rows)
            contrastive = cache.gradients.surrogate(images, texts, scale, own, parts)
            logged = cache.gradients.loss
        losses = {"contrastive": logged.detach()}
        total = weights.contrastive_weight * contrastive
        shown = weights.contrastive_weight * logged.detach()
        if self.matches:
            matching = matching_loss(outputs["match_logits"], batch["negatives_valid"])
            total = total + weights.matching_weight * matching
            shown = shown + weights.matching_weight * matching.detach()
            losses["matching"] = matching.detach()
        return total.reshape(()), {"total": shown.reshape(()), **losses}

    def _outputs(
        self, runner: StepRunner, name: str, count: int, shape: SampleShape, parts: Parts
    ) -> Optional[Array]:
        """One output of the heads for every item, on rank 0."""

        def reduce(batch: Batch, outputs: Mapping[str, Tensor]) -> Found:
            return {name: to_numpy(outputs[name])}

        found = self.evaluate_items(runner, count, shape, parts, reduce)
        return None if found is None else found[name]

    def _measure(self, runner: StepRunner, split: SplitData) -> Measured:
        """Recalls, and the features of all images and captions."""
        samples, dataset = split.samples, split.dataset
        count, shape = dataset.num_images, SampleShape(images=1)
        images = self._outputs(runner, "image_features", count, shape, samples.image_parts)
        count, shape = dataset.num_texts, SampleShape(texts=1)
        texts = self._outputs(runner, "text_features", count, shape, samples.text_parts)
        if images is None or texts is None:
            return share_metrics(None), None
        owner = dataset.image_of_text()
        metrics = _named(split.name, recall_at_k_of_features(images, texts, owner))
        metrics[f"{split.name}/samples"] = float(len(owner))
        return share_metrics(metrics), {"images": images, "texts": texts}

    def _rerank(
        self, runner: StepRunner, split: SplitData, found: Optional[Found]
    ) -> Optional[dict[str, float]]:
        """Recalls after the matching head has scored the best candidates of every query anew, on rank 0."""
        k = self.config.contrastive.rerank
        box: list[Any] = [None]
        if found is not None:
            scores = found["images"].astype(np.float64) @ found["texts"].astype(np.float64).T
            of_images, of_texts = best_of_rows(scores, k), best_of_rows(scores.T, k).T
            box = [np.argwhere(of_images | of_texts)]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(box, src=0)
        pairs = box[0]
        parts, shape = partial(split.samples.pair_parts, pairs), SampleShape(pairs=1)
        matches = self._outputs(runner, "match_logits", len(pairs), shape, parts)
        if found is None or matches is None:
            return None
        owner = split.dataset.image_of_text()
        logits = matches.astype(np.float64)
        matched = np.zeros_like(scores)
        matched[pairs[:, 0], pairs[:, 1]] = logits[:, 1] - logits[:, 0]
        # A pair may be a candidate of its image and none of its caption: each direction has scores of its own.
        ways = {
            "TR": reranked(scores, matched, of_images),
            "IR": reranked(scores, matched, of_texts),
        }
        recalls = {way: recall_at_k(values, owner) for way, values in ways.items()}
        return {name: recalls[name[:2]][name] for name in recalls["TR"]}


def best_of_rows(scores: Array, k: int) -> Array:
    """Which k entries of every row are the largest: bool ``[R, C]``; of equals the first."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, best, True, axis=1)
    return chosen


def reranked(scores: Array, matched: Array, candidates: Array) -> Array:
    """Scores in which candidates stand before all others, by dot product plus the logit of a match.

    Args:
        scores: dot products of unit vectors ``[I, C]``.
        matched: logit of a match minus that of none ``[I, C]``.
        candidates: which pairs were scored anew ``[I, C]``.
    """
    # Dot products of unit vectors are within 1 of each other's centre: nothing else reaches a candidate.
    shift = np.abs(matched).max(initial=0.0) + 3.0
    return np.where(candidates, scores + matched, scores - 2.0 * shift)


def _named(prefix: str, recalls: Mapping[str, float]) -> dict[str, float]:
    """Recalls by `PREFIX/NAME`, with their mean."""
    named = {f"{prefix}/{name}": value for name, value in recalls.items()}
    return named | {f"{prefix}/mean_recall": float(np.mean(list(recalls.values())))}


@dataclass(frozen=True)
class _Pool:
    """Features of the same micro-batch on all data-parallel ranks, in rank order.

    Args:
        images: ``[B, D]``.
        texts: ``[B, D]``.
        documents: image of every row ``[B]``.
        numbers: number of every row over the run ``[B]``.
        local: this rank's rows.
        logit_scale: log of the inverse temperature.
    """

    images: Tensor
    texts: Tensor
    documents: Tensor
    numbers: Tensor
    local: slice
    logit_scale: Tensor

    @classmethod
    def gather(cls, own: Mapping[str, Tensor], ranks: Ranks) -> _Pool:
        """From the outputs of one micro-batch on every rank."""
        rows = own["image_features"].shape[0]
        return cls(
            images=gather_rows(own["image_features"], ranks),
            texts=gather_rows(own["text_features"], ranks),
            documents=gather_rows(own["image_documents"], ranks),
            numbers=gather_rows(own["sample_numbers"], ranks),
            local=slice(ranks.data * rows, (ranks.data + 1) * rows),
            logit_scale=own["logit_scale"],
        )

    @classmethod
    def join(cls, pools: list[_Pool]) -> _Pool:
        """All micro-batches of a step as one pool."""

        def joined(name: str) -> Tensor:
            return torch.cat([getattr(pool, name) for pool in pools])

        images, texts, first = joined("images"), joined("texts"), pools[0]
        documents, numbers = joined("documents"), joined("numbers")
        return cls(images, texts, documents, numbers, first.local, first.logit_scale)
