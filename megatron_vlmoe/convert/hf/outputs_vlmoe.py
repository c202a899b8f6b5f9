"""What the models of VL-MoE return.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, V pieces, C codes of patches,
T tokens of a router in the batch, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import ModelOutput

from .layers_vlmoe import first_places


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
        match_logits: no match, match: ``[n, 2]``, of text i with image i, in fp32.
        hidden_states: see [`VLMoEModelOutput`]; those of the pairs where they are judged, or of texts or images
            where only these were given. Else every text and image was read alone: see the two last fields.
        attentions: the same of attention weights.
        text_model_output: of `get_text_features`; None without texts.
        vision_model_output: of `get_image_features`; None without images.
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
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    aux_loss: Optional[torch.Tensor] = None
    router_logits: Optional[tuple[torch.Tensor, ...]] = None
    dropped_tokens: Optional[tuple[torch.Tensor, ...]] = None
    text_model_output: Optional[VLMoEFeaturesOutput] = None
    vision_model_output: Optional[VLMoEFeaturesOutput] = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that there are, in order; outputs among them as tuples too."""
        return tuple(x.to_tuple() if isinstance(x, ModelOutput) else x for x in self.values())


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


@dataclass
class VLMoEFeaturesOutput(VLMoERoutingOutput, BaseModelOutputWithPooling):
    """[`BaseModelOutputWithPooling`] and what the routers did; `pooler_output` has unit vectors ``[n, D]`` in fp32."""


def carried(outputs: VLMoEModelOutput) -> dict[str, Any]:
    """What the output of a head takes over from the model inside."""
    names = ("hidden_states", "attentions", "aux_loss", "router_logits", "dropped_tokens")
    return {name: getattr(outputs, name) for name in names}


def unit_features(outputs: VLMoEModelOutput, vectors: torch.Tensor) -> VLMoEFeaturesOutput:
    """Outputs of texts or images, with projected vectors ``[n, D]`` in unit length and fp32."""
    return VLMoEFeaturesOutput(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=F.normalize(vectors.float(), dim=-1),
        **carried(outputs),
    )


def retrieval_fields(
    texts: Optional[VLMoEFeaturesOutput],
    images: Optional[VLMoEFeaturesOutput],
    pairs: Optional[VLMoEModelOutput],
    drawn: Optional[VLMoEModelOutput],
) -> dict[str, Any]:
    """The fields of [`VLMoEForImageAndTextRetrievalOutput`] that come from what the model has read.

    Args:
        texts: of texts alone.
        images: of images alone.
        pairs: of text i with image i.
        drawn: of these and of hard negatives.
    """
    only = images if texts is None else texts if images is None else None
    whole = only if pairs is None else pairs
    routed: list[Any] = [
        x for x in (texts, images, pairs, drawn) if x is not None and x.aux_loss is not None
    ]
    device = routed[0].aux_loss.device if routed else None
    return {
        "text_features": None if texts is None else texts.pooler_output,
        "image_features": None if images is None else images.pooler_output,
        "hidden_states": None if whole is None else whole.hidden_states,
        "attentions": None if whole is None else whole.attentions,
        "aux_loss": sum(x.aux_loss.to(device) for x in routed) if routed else None,
        "router_logits": sum((x.router_logits for x in routed), ()) if routed else None,
        "dropped_tokens": sum((x.dropped_tokens for x in routed), ()) if routed else None,
        "text_model_output": texts,
        "vision_model_output": images,
    }


def first_text_tokens(
    outputs: VLMoEModelOutput, attention_mask: Optional[torch.Tensor]
) -> torch.Tensor:
    """The first token of every text that is no padding ``[n, D]``; of the mask ``[n, Lt]``, None without padding.

    Raises:
        ValueError: there are no texts.
    """
    hidden = needed(outputs.text_hidden_state, "input_ids")
    if attention_mask is None:
        return hidden[:, 0]
    place = first_places(attention_mask).to(hidden.device)
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


def needed(value: Optional[torch.Tensor], name: str) -> torch.Tensor:
    """The value.

    Raises:
        ValueError: there is none.
    """
    if value is None:
        raise ValueError(f"this model needs {name}")
    return value
