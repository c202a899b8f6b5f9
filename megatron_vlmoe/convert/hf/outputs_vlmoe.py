"""What the models of VL-MoE return, and the losses of their heads.

Labels may be on another device than the logits: with a `device_map` the inputs are on the first, the heads on the last.
Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, V pieces, C codes of patches,
T tokens of a router in the batch, E experts. Of losses: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.utils import ModelOutput

from .configuration_vlmoe import VLMoEConfig
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

    aux_loss: Optional[Tensor] = None
    router_logits: Optional[tuple[Tensor, ...]] = None
    dropped_tokens: Optional[tuple[Tensor, ...]] = None


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

    last_hidden_state: Optional[Tensor] = None
    text_hidden_state: Optional[Tensor] = None
    image_hidden_state: Optional[Tensor] = None
    hidden_states: Optional[tuple[Tensor, ...]] = None
    attentions: Optional[tuple[Tensor, ...]] = None
    aux_loss: Optional[Tensor] = None
    router_logits: Optional[tuple[Tensor, ...]] = None
    dropped_tokens: Optional[tuple[Tensor, ...]] = None


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

    loss: Optional[Tensor] = None
    mlm_loss: Optional[Tensor] = None
    mim_loss: Optional[Tensor] = None
    mlm_logits: Optional[Tensor] = None
    mim_logits: Optional[Tensor] = None
    hidden_states: Optional[tuple[Tensor, ...]] = None
    attentions: Optional[tuple[Tensor, ...]] = None
    aux_loss: Optional[Tensor] = None
    router_logits: Optional[tuple[Tensor, ...]] = None
    dropped_tokens: Optional[tuple[Tensor, ...]] = None


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

    loss: Optional[Tensor] = None
    contrastive_loss: Optional[Tensor] = None
    matching_loss: Optional[Tensor] = None
    logits_per_image: Optional[Tensor] = None
    logits_per_text: Optional[Tensor] = None
    text_features: Optional[Tensor] = None
    image_features: Optional[Tensor] = None
    match_logits: Optional[Tensor] = None
    hidden_states: Optional[tuple[Tensor, ...]] = None
    attentions: Optional[tuple[Tensor, ...]] = None
    aux_loss: Optional[Tensor] = None
    router_logits: Optional[tuple[Tensor, ...]] = None
    dropped_tokens: Optional[tuple[Tensor, ...]] = None
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


def unit_features(outputs: VLMoEModelOutput, vectors: Tensor) -> VLMoEFeaturesOutput:
    """Outputs of texts or images, with projected vectors ``[n, D]`` in unit length and fp32."""
    return VLMoEFeaturesOutput(
        last_hidden_state=outputs.last_hidden_state,
        pooler_output=F.normalize(vectors.float(), dim=-1),
        **carried(outputs),
    )


def first_text_tokens(outputs: VLMoEModelOutput, attention_mask: Optional[Tensor]) -> Tensor:
    """The first token of every text that is no padding ``[n, D]``; of the mask ``[n, Lt]``, None without padding.

    Raises:
        ValueError: there are no texts.
    """
    hidden = needed(outputs.text_hidden_state, "input_ids")
    if attention_mask is None:
        return hidden[:, 0]
    place = first_places(attention_mask).to(hidden.device)
    return hidden.gather(1, place[:, None, None].expand(-1, 1, hidden.shape[2])).squeeze(1)


def needed(value: Optional[Tensor], name: str) -> Tensor:
    """The value.

    Raises:
        ValueError: there is none.
    """
    if value is None:
        raise ValueError(f"this model needs {name}")
    return value


def masked_loss(logits: Optional[Tensor], labels: Optional[Tensor]) -> Optional[Tensor]:
    """Cross entropy over the positions with a label, of logits ``[n, L, C]`` and labels ``[n, L]`` (-100: none).

    Raises:
        ValueError: there are labels and nothing was predicted, or they are not as many as the predictions.
    """
    if labels is None:
        return None
    if logits is None:
        raise ValueError("labels for an input that is missing, or that the model has no head for")
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels are {list(labels.shape)}, not {list(logits.shape[:2])}")
    labels = labels.to(logits.device)
    kept = labels != -100
    count = kept.sum().clamp(min=1)
    if torch.compiler.is_compiling():
        # A graph has no shape that depends on how many labels there are.
        logits, labels = logits.flatten(0, 1), labels.flatten()
    else:
        # Rows without a label would only be turned into fp32 for nothing.
        logits, labels = logits[kept], labels[kept]
    # A sum over none is 0 and has a gradient.
    return F.cross_entropy(logits.float(), labels, reduction="sum") / count


def answer_loss(logits: Tensor, labels: Optional[Tensor], config: VLMoEConfig) -> Optional[Tensor]:
    """Binary cross entropy of logits ``[n, C]`` against scores ``[n, C]``, summed over the answers (VQA).

    Where `config.problem_type` is `single_label_classification`, cross entropy against classes ``[n]``.
    """
    if labels is None:
        return None
    if config.problem_type == "single_label_classification":
        return classification_loss(logits, labels, config)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels are {list(labels.shape)}, not {list(logits.shape)}: a score for every answer"
        )
    labels = labels.to(logits.device, torch.float32)
    losses = F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum")
    return losses / logits.shape[0]


def classification_loss(
    logits: Tensor, labels: Optional[Tensor], config: VLMoEConfig
) -> Optional[Tensor]:
    """The loss of logits ``[n, C]`` that `config.problem_type` names; by number and type of labels where it names none.

    Labels are ``[n]``, or ``[n, C]`` for several labels or values.
    """
    if labels is None:
        return None
    logits, labels = logits.float(), labels.to(logits.device)
    kind = config.problem_type
    if kind is None:
        several = "multi_label" if labels.is_floating_point() else "single_label"
        kind = "regression" if logits.shape[1] == 1 else f"{several}_classification"
    if kind == "regression":
        return F.mse_loss(logits.flatten(), labels.float().flatten())
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels)


def contrastive_loss(similarity: Optional[Tensor]) -> Tensor:
    """Mean of text-to-image and image-to-text cross entropy of similarities ``[n, n]``.

    Raises:
        ValueError: there are not as many texts as images.
    """
    if similarity is None or similarity.shape[0] != similarity.shape[1]:
        raise ValueError("return_loss needs as many texts as images")
    target = torch.arange(similarity.shape[0], device=similarity.device)
    to_image, to_text = (F.cross_entropy(rows, target) for rows in (similarity, similarity.t()))
    return 0.5 * (to_image + to_text)


@torch.no_grad()
def hard_negative_pairs(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs to judge: of every row the right one, its text with a wrong image, its image with a wrong text (VLMo).

    Wrong partners are drawn, the more similar ``[n, n]`` the likelier (ALBEF). A single row has none. Returned are the
    numbers of texts and of images, and 1 for a match, else 0: ``[3 n]`` each.
    """
    samples = similarity.shape[0]
    own = torch.arange(samples, device=similarity.device)
    if samples == 1:
        return own, own, torch.ones_like(own)
    wrong_images, wrong_texts = (
        torch.multinomial(torch.softmax(rows.float().fill_diagonal_(float("-inf")), dim=1), 1)[:, 0]
        for rows in (similarity.clone(), similarity.t().clone())
    )
    texts = torch.stack([own, own, wrong_texts], dim=1).flatten()
    images = torch.stack([own, wrong_images, own], dim=1).flatten()
    return texts, images, torch.tensor([1, 0, 0], device=own.device).repeat(samples)


def total_loss(*losses: Optional[Tensor]) -> Optional[Tensor]:
    """Sum of the losses that there are; None if there is none."""
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None
