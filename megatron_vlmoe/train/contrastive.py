"""Contrastive pretraining: captions and images of pairs are read apart and found by each other (paper A.1, LIMoE).

Letters: m rows of this rank, B rows of the pool (all data-parallel ranks), D width. A row is an image and its caption.
"""

from __future__ import annotations

from typing import Mapping

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_vlmoe.losses.contrastive import contrastive_loss, first_is_right
from megatron_vlmoe.runtime.distributed import device
from megatron_vlmoe.runtime.ranks import Ranks
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.train.objective import PretrainingObjective
from megatron_vlmoe.train.step import Losses, StepRunner


def gather_rows(value: Tensor, ranks: Ranks) -> Tensor:
    """``[m, ...]`` of every data-parallel rank: ``[B, ...]``; the gradient of a row is summed over all ranks."""
    if ranks.data_size == 1:
        return value
    # megatron-core's gather along the first dimension, over the data-parallel instead of the tensor-parallel ranks.
    group = parallel_state.get_data_parallel_group()
    return gather_from_sequence_parallel_region(value.contiguous(), group=group)


def pool_loss(outputs: Mapping[str, Tensor], ranks: Ranks) -> Tensor:
    """The contrastive loss of this rank's rows among those of all data-parallel ranks in the same micro-batch.

    Args:
        outputs: `image_features`, `text_features` and `logit_scale` of the heads.
    """
    images, texts = outputs["image_features"], outputs["text_features"]
    return contrastive_loss(
        images,
        texts,
        gather_rows(images, ranks),
        gather_rows(texts, ranks),
        outputs["logit_scale"],
        ranks.data * images.shape[0],
    )


class ContrastiveObjective(PretrainingObjective):
    """Tells the caption of every image, and the image of every caption, from the others of a pool.

    The pool is one micro-batch on all data-parallel ranks.
    """

    loss_names: tuple[str, ...] = ("contrastive",)

    def loss(self, batch: Batch, outputs: Mapping[str, Tensor]) -> tuple[Tensor, Losses]:
        """The mean of image-to-text and text-to-image cross entropy over this rank's rows."""
        loss = pool_loss(outputs, self.ranks).reshape(())
        # The schedule divides the loss in place.
        shown = loss.detach().clone()
        return loss, {"total": shown, "contrastive": shown}

    def loss_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """`loss/contrastive`."""
        return {"loss/contrastive": means["contrastive"]}

    def evaluate(self, runner: StepRunner) -> dict[str, float]:
        """Averages over `train.eval_steps` steps of held-out pairs; every rank must call it.

        Returns:
            `eval/loss/contrastive` in nats, and `eval/recall_at_1/image_to_text` and `.../text_to_image`: shares of
            images whose nearest caption in the pool is one of theirs, and of captions whose nearest image is theirs.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=device())
        for _, found in self.evaluated(runner, self._sums):
            sums += found
        dist.all_reduce(sums)
        rows, loss, texts, images = sums.tolist()
        return {
            "eval/loss/contrastive": loss / rows,
            "eval/recall_at_1/image_to_text": texts / rows,
            "eval/recall_at_1/text_to_image": images / rows,
        }

    @torch.no_grad()
    def _sums(self, batch: Batch, outputs: Mapping[str, Tensor]) -> Tensor:
        """Rows of this rank, their loss, and how many find their caption and their image ``[4]``."""
        images, texts = outputs["image_features"], outputs["text_features"]
        documents, rows = batch["image_documents"], len(images)
        pool = gather_rows(documents, self.ranks)
        # A collective of its own each: every data-parallel rank runs the same micro-batches.
        found = [
            first_is_right(mine, gather_rows(others, self.ranks), documents, pool).sum()
            for mine, others in ((images, texts), (texts, images))
        ]
        loss = rows * pool_loss(outputs, self.ranks).reshape(())
        return torch.stack([torch.full_like(loss, rows), loss, *found]).double()

    def evaluation_line(self, metrics: Mapping[str, float]) -> str:
        """Loss and recall, and what guessing would reach."""
        to_text, to_image = (
            100 * metrics[f"eval/recall_at_1/{way}"] for way in ("image_to_text", "text_to_image")
        )
        pairs = self.config.data.micro_pairs * self.ranks.data_size
        return (
            f"evaluation | contrastive {metrics['eval/loss/contrastive']:.3f} | recall at 1 among {pairs} pairs: "
            f"image to text {to_text:.1f} %, text to image {to_image:.1f} % (guessing: {100 / pairs:.1f} %)"
        )
