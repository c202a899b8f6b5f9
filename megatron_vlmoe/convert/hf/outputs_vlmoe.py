"""What the models of VL-MoE return.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, V pieces, C codes of patches,
T tokens of a router in the batch, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import torch
from transformers.modeling_outputs import (
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import ModelOutput


@dataclass
class VLMoERoutingOutput(ModelOutput):
    """What the routers did, where `output_router_logits` asks for it; the last fields of every output.

    Args:
        aux_loss: sum of the auxiliary losses of all routers, weighted as the configuration says, without
            `router_aux_loss_coef`; 0 where the inputs meet no router.
        router_logits: of every router that the inputs met, without noise ``[T, E]`` each: block by block, in a block
            that of the text before that of the image. Rows are samples one after the other; of a router that reads
            pairs, the tokens of all texts come before those of all images.
        dropped_tokens: how many choices of tokens found no place at their expert, of every such router: a scalar
            each, 0 where the capacity is not limited.
    """

    aux_loss: Optional[torch.Tensor] = None
    router_logits: Optional[tuple[torch.Tensor, ...]] = None
    dropped_tokens: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class VLMoEModelOutput(ModelOutput):
    """Hidden states of texts, images or pairs.

    Args:
        last_hidden_state: text tokens, then image tokens, after the last LayerNorm ``[n, L, D]``.
        text_hidden_state: those of the text ``[n, Lt, D]``; None without text.
        image_hidden_state: those of [I_CLS] and the patches ``[n, 1 + N, D]``; None without image.
        hidden_states: before the first and after every block, without the last LayerNorm, ``[n, L, D]`` each.
        attentions: weights of every block, ``[n, heads, L, L]`` each (`attn_implementation="eager"` only).
        aux_loss: see [`VLMoERoutingOutput`], as for `router_logits` and `dropped_tokens`.
    """

    last_hidden_state: Optional[torch.Tensor] = None
    text_hidden_state: Optional[torch.Tensor] = None
    image_hidden_state: Optional[torch.Tensor] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    aux_loss: Optional[torch.Tensor] = None
    router_logits: Optional[tuple[torch.Tensor, ...]] = None
    dropped_tokens: Optional[tuple[torch.Tensor, ...]] = None


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
        aux_loss: see [`VLMoERoutingOutput`], as for `router_logits` and `dropped_tokens`.
    """

    loss: Optional[torch.Tensor] = None
    mlm_loss: Optional[torch.Tensor] = None
    mim_loss: Optional[torch.Tensor] = None
    mlm_logits: Optional[torch.Tensor] = None
    mim_logits: Optional[torch.Tensor] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    aux_loss: Optional[torch.Tensor] = None
    router_logits: Optional[tuple[torch.Tensor, ...]] = None
    dropped_tokens: Optional[tuple[torch.Tensor, ...]] = None


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
        aux_loss: see [`VLMoERoutingOutput`], as for `router_logits` and `dropped_tokens`.
    """

    loss: Optional[torch.Tensor] = None
    contrastive_loss: Optional[torch.Tensor] = None
    matching_loss: Optional[torch.Tensor] = None
    logits_per_image: Optional[torch.Tensor] = None
    logits_per_text: Optional[torch.Tensor] = None
    text_features: Optional[torch.Tensor] = None
    image_features: Optional[torch.Tensor] = None
    match_logits: Optional[torch.Tensor] = None
    aux_loss: Optional[torch.Tensor] = None
    router_logits: Optional[tuple[torch.Tensor, ...]] = None
    dropped_tokens: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class VLMoEMaskedLMOutput(VLMoERoutingOutput, MaskedLMOutput):
    """[`MaskedLMOutput`] and what the routers did."""


@dataclass
class VLMoEMaskedImageModelingOutput(VLMoERoutingOutput, MaskedImageModelingOutput):
    """[`MaskedImageModelingOutput`] and what the routers did."""


@dataclass
class VLMoESequenceClassifierOutput(VLMoERoutingOutput, SequenceClassifierOutput):
    """[`SequenceClassifierOutput`] and what the routers did."""


@dataclass
class VLMoEImageClassifierOutput(VLMoERoutingOutput, ImageClassifierOutput):
    """[`ImageClassifierOutput`] and what the routers did."""
