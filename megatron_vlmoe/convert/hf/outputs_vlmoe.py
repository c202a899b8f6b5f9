"""What the models of VL-MoE return.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, V pieces, C codes of patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from transformers.utils import ModelOutput


@dataclass
class VLMoEModelOutput(ModelOutput):
    """Hidden states of texts, images or pairs.

    Args:
        last_hidden_state: text tokens, then image tokens, after the last LayerNorm ``[n, L, D]``.
        text_hidden_state: those of the text ``[n, Lt, D]``; None without text.
        image_hidden_state: those of [I_CLS] and the patches ``[n, 1 + N, D]``; None without image.
        hidden_states: before the first and after every block, without the last LayerNorm, ``[n, L, D]`` each.
        attentions: weights of every block, ``[n, heads, L, L]`` each (`attn_implementation="eager"` only).
    """

    last_hidden_state: Optional[torch.Tensor] = None
    text_hidden_state: Optional[torch.Tensor] = None
    image_hidden_state: Optional[torch.Tensor] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class VLMoEForPreTrainingOutput(ModelOutput):
    """Predictions of masked tokens and patches.

    Args:
        loss: sum of the losses of those labels that were given.
        mlm_loss: cross entropy of masked tokens.
        mim_loss: cross entropy of masked patches.
        mlm_logits: ``[n, Lt, V]``; None without text.
        mim_logits: ``[n, N, C]``; None without image.
        hidden_states: see [`VLMoEModelOutput`].
        attentions: see [`VLMoEModelOutput`].
    """

    loss: Optional[torch.Tensor] = None
    mlm_loss: Optional[torch.Tensor] = None
    mim_loss: Optional[torch.Tensor] = None
    mlm_logits: Optional[torch.Tensor] = None
    mim_logits: Optional[torch.Tensor] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class VLMoEForImageAndTextRetrievalOutput(ModelOutput):
    """Similarities of m texts and n images.

    Args:
        loss: sum of the losses that were asked for.
        contrastive_loss: cross entropy of the partner of every text and image, averaged over both directions.
        matching_loss: cross entropy of match or not.
        logits_per_image: cosine similarity over temperature ``[n, m]``; None without texts or images.
        logits_per_text: the same ``[m, n]``.
        text_features: unit vectors ``[m, D]``.
        image_features: unit vectors ``[n, D]``.
        match_logits: no match, match: ``[n, 2]``, of text i with image i.
    """

    loss: Optional[torch.Tensor] = None
    contrastive_loss: Optional[torch.Tensor] = None
    matching_loss: Optional[torch.Tensor] = None
    logits_per_image: Optional[torch.Tensor] = None
    logits_per_text: Optional[torch.Tensor] = None
    text_features: Optional[torch.Tensor] = None
    image_features: Optional[torch.Tensor] = None
    match_logits: Optional[torch.Tensor] = None
