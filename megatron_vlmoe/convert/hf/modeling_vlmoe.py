"""VL-MoE (arXiv 2303.07226): a transformer of modality experts that reads texts, images, and pairs of both.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, S image side, V pieces of the
text tokenizer, C codes of the image tokenizer or classes.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import can_return_tuple

from .configuration_vlmoe import VLMoEConfig
from .layers_vlmoe import (
    PRETRAINING_HEADS,
    TASK_HEADS,
    VLMoEClassifier,
    VLMoEEncoder,
    VLMoEImageEmbeddings,
    VLMoEOutputLinear,
    VLMoEPooler,
    VLMoEPreTrainedModel,
    VLMoETextEmbeddings,
    prediction_head,
)
from .moe_vlmoe import VLMoEExperts, VLMoERouter
from .outputs_vlmoe import (
    VLMoEFeaturesOutput,
    VLMoEForImageAndTextRetrievalOutput,
    VLMoEForPreTrainingOutput,
    VLMoEImageClassifierOutput,
    VLMoEMaskedImageModelingOutput,
    VLMoEMaskedLMOutput,
    VLMoEModelOutput,
    VLMoESequenceClassifierOutput,
    answer_loss,
    carried,
    classification_loss,
    contrastive_loss,
    first_text_tokens,
    hard_negative_pairs,
    masked_loss,
    needed,
    total_loss,
    unit_features,
)


class VLMoEModel(VLMoEPreTrainedModel):
    """The model without a head."""

    _keys_to_ignore_on_load_unexpected = [*PRETRAINING_HEADS, *TASK_HEADS]

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        config.check()
        self.text_embeddings = VLMoETextEmbeddings(config) if config.vocab_size else None
        self.image_embeddings = VLMoEImageEmbeddings(config)
        self.encoder = VLMoEEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings, or the patch projection of a model of images alone."""
        if self.text_embeddings is None:
            return self.image_embeddings.patch_embeddings
        return self.text_embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the word embeddings."""
        if self.text_embeddings is None:
            raise ValueError("a model with vocab_size=0 has no word embeddings")
        self.text_embeddings.word_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        bool_masked_pos: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        interpolate_pos_encoding: bool = False,
        output_hidden_states: Optional[bool] = None,
        output_attentions: Optional[bool] = None,
        output_router_logits: Optional[bool] = None,
    ) -> VLMoEModelOutput:
        """Hidden states of texts, of images, or of pairs: text i with image i.

        Args:
            input_ids: ``[n, Lt]``.
            attention_mask: 1 for tokens, 0 for padding ``[n, Lt]``; None: all are tokens (with a warning at a `<pad>`).
            pixel_values: normalised pixels ``[n, 3, S, S]``.
            bool_masked_pos: patches that are hidden ``[n, N]``.
            inputs_embeds: word embeddings ``[n, Lt, D]`` in place of `input_ids`.
            interpolate_pos_encoding: takes images of other sizes than the model's.
            output_hidden_states: returns those of all blocks.
            output_attentions: returns attention weights (`attn_implementation="eager"` only).
            output_router_logits: returns what the routers did; see [`VLMoERoutingOutput`].

        Raises:
            TypeError: an argument that is none of these nor `return_dict`.
            ValueError: inputs that do not go with each other or with the model.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError('output_attentions needs attn_implementation="eager"')
        text = self._embed_text(input_ids, inputs_embeds, attention_mask)
        image = None
        if pixel_values is not None:
            given = (pixel_values, bool_masked_pos, interpolate_pos_encoding)
            image = self.image_embeddings(*given)
        elif bool_masked_pos is not None:
            raise ValueError("bool_masked_pos needs pixel_values")
        parts = [part for part in (text, image) if part is not None]
        if not parts:
            raise ValueError("give input_ids, inputs_embeds or pixel_values")
        # Shapes, not `len`: it would make an exported or compiled graph one for this number of samples alone.
        if parts[0].shape[0] != parts[-1].shape[0]:
            texts, images = (part.shape[0] for part in parts)
            raise ValueError(f"{texts} texts and {images} images are no pairs")
        text_length = 0 if text is None else text.shape[1]
        # A `device_map` may have the two tables on different devices.
        hidden = torch.cat([part.to(parts[0].device) for part in parts], dim=1)
        token_mask = None
        if text is not None and attention_mask is not None:
            # No part of an image is padding.
            beyond = hidden.shape[1] - text_length
            token_mask = F.pad(attention_mask.bool(), (0, beyond), value=True)
        hidden, states, attentions, routers = self.encoder(
            hidden,
            None if token_mask is None else token_mask[:, None, None, :],
            token_mask,
            text_length,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_router_logits=output_router_logits,
        )
        hidden = self.layernorm(hidden)
        routed: dict[str, Any] = {}
        if routers is not None:
            routed = {
                "aux_loss": sum(
                    (r.loss.to(hidden.device) for r in routers),
                    torch.zeros((), device=hidden.device),
                ),
                "router_logits": tuple(router.logits for router in routers),
                "dropped_tokens": tuple(router.dropped for router in routers),
            }
        return VLMoEModelOutput(
            last_hidden_state=hidden,
            text_hidden_state=None if text is None else hidden[:, :text_length],
            image_hidden_state=None if image is None else hidden[:, text_length:],
            hidden_states=states,
            attentions=attentions,
            **routed,
        )

    def _embed_text(
        self,
        input_ids: Optional[Tensor],
        inputs_embeds: Optional[Tensor],
        attention_mask: Optional[Tensor],
    ) -> Optional[Tensor]:
        """Tokens of texts ``[n, Lt, D]``."""
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give input_ids or inputs_embeds, not both")
        name, dims = ("input_ids", 2) if inputs_embeds is None else ("inputs_embeds", 3)
        given = inputs_embeds if input_ids is None else input_ids
        if given is None and attention_mask is not None:
            raise ValueError("attention_mask needs input_ids or inputs_embeds")
        if given is None:
            return None
        if self.text_embeddings is None:
            raise ValueError("a model with vocab_size=0 reads no text")
        if given.dim() != dims:
            raise ValueError(f"{name} is {list(given.shape)}, not one row for every text")
        if attention_mask is not None and attention_mask.shape != given.shape[:2]:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, not {list(given.shape[:2])}: "
                "one value for every token of the text"
            )
        if input_ids is not None and input_ids.shape[1] > 0:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
        return self.text_embeddings(input_ids, inputs_embeds, attention_mask)


class VLMoEForPreTraining(VLMoEPreTrainedModel):
    """Masked data modelling: predicts the pieces of masked tokens and the codes of masked patches."""

    _keys_to_ignore_on_load_unexpected: list[str] = []

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.mlm_head = prediction_head(config, "vocab_size") if config.vocab_size else None
        self.mim_head = (
            prediction_head(config, "visual_vocab_size") if config.visual_vocab_size else None
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        bool_masked_pos: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        image_labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoEForPreTrainingOutput:
        """Predictions for all tokens and patches; see [`VLMoEModel.forward`] for the other arguments.

        Args:
            input_ids: ``[n, Lt]`` with masked tokens replaced by `[MASK]`.
            attention_mask: ``[n, Lt]``.
            pixel_values: ``[n, 3, S, S]``.
            bool_masked_pos: patches that are hidden ``[n, N]``.
            labels: pieces of masked tokens, -100 elsewhere ``[n, Lt]``.
            image_labels: codes of masked patches, -100 elsewhere ``[n, N]``.
            **kwargs: of the model.
        """
        outputs = self.vlmoe(
            input_ids, attention_mask, pixel_values, bool_masked_pos, **_nested(kwargs)
        )
        mlm_logits = mim_logits = None
        if outputs.text_hidden_state is not None and self.mlm_head is not None:
            mlm_logits = self.mlm_head(outputs.text_hidden_state)
        if outputs.image_hidden_state is not None and self.mim_head is not None:
            mim_logits = self.mim_head(outputs.image_hidden_state[:, 1:])
        mlm_loss, mim_loss = masked_loss(mlm_logits, labels), masked_loss(mim_logits, image_labels)
        return VLMoEForPreTrainingOutput(
            loss=self._with_aux_loss(total_loss(mlm_loss, mim_loss), outputs.aux_loss),
            mlm_loss=mlm_loss,
            mim_loss=mim_loss,
            mlm_logits=mlm_logits,
            mim_logits=mim_logits,
            **carried(outputs),
        )


class VLMoEForMaskedLM(VLMoEPreTrainedModel):
    """Predicts the pieces of masked tokens of texts, or of texts with an image."""

    input_kinds = ("texts", "pairs")

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.mlm_head: nn.Linear = prediction_head(config, "vocab_size")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoEMaskedLMOutput:
        """Logits ``[n, Lt, V]``; `labels` are pieces, -100 where none is predicted ``[n, Lt]``."""
        outputs = self.vlmoe(input_ids, attention_mask, pixel_values, **_nested(kwargs))
        logits = self.mlm_head(needed(outputs.text_hidden_state, "input_ids"))
        return _output(self, VLMoEMaskedLMOutput, masked_loss(logits, labels), logits, outputs)


class VLMoEForMaskedImageModeling(VLMoEPreTrainedModel):
    """Predicts the codes of masked patches of images, or of images with a text."""

    main_input_name = "pixel_values"
    input_kinds = ("images", "pairs")

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.mim_head = prediction_head(config, "visual_vocab_size")
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Optional[Tensor] = None,
        bool_masked_pos: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoEMaskedImageModelingOutput:
        """Logits ``[n, N, C]`` (as `reconstruction`); `labels` are codes, -100 where none is predicted ``[n, N]``."""
        outputs = self.vlmoe(
            input_ids, attention_mask, pixel_values, bool_masked_pos, **_nested(kwargs)
        )
        logits = self.mim_head(needed(outputs.image_hidden_state, "pixel_values")[:, 1:])
        loss = masked_loss(logits, labels)
        return _output(self, VLMoEMaskedImageModelingOutput, loss, logits, outputs)


class VLMoEForVisualQuestionAnswering(VLMoEPreTrainedModel):
    """Chooses the answer to a question about an image (VQAv2), or the class of an image with a text."""

    input_kinds = ("pairs",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.pooler = VLMoEPooler(config)
        self.classifier = VLMoEClassifier(config, config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoESequenceClassifierOutput:
        """Logits ``[n, C]``; `labels`: scores of all answers, 0 to 1 ``[n, C]``, or classes (see `answer_loss`)."""
        outputs = self.vlmoe(input_ids, attention_mask, pixel_values, **_nested(kwargs))
        needed(outputs.image_hidden_state, "pixel_values")
        pooled = self.pooler(first_text_tokens(outputs, attention_mask))
        logits = self.classifier(pooled)
        loss = answer_loss(logits, labels, self.config)
        return _output(self, VLMoESequenceClassifierOutput, loss, logits, outputs)


class VLMoEForImagesAndTextClassification(VLMoEPreTrainedModel):
    """Says whether a sentence is true of two images (NLVR2)."""

    input_kinds = ("pairs",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.pooler = VLMoEPooler(config)
        self.classifier = VLMoEClassifier(config, 2 * config.hidden_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        inputs_embeds: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoESequenceClassifierOutput:
        """Logits ``[n, C]``.

        The model reads 2 n pairs, those of a sample one after the other; hidden states are theirs.

        Args:
            input_ids: the sentences ``[n, Lt]``.
            attention_mask: ``[n, Lt]``.
            pixel_values: left and right images ``[n, 2, 3, S, S]``.
            labels: classes ``[n]``.
            inputs_embeds: word embeddings ``[n, Lt, D]`` in place of `input_ids`.
            **kwargs: of the model.

        Raises:
            ValueError: there are not two images for every sentence.
        """
        images = needed(pixel_values, "pixel_values")
        if images.dim() != 5 or images.shape[1] != 2:
            raise ValueError(
                f"pixel_values is {list(images.shape)}, not [samples, 2, channels, height, width]"
            )
        texts = (input_ids, attention_mask, inputs_embeds)
        ids, mask, embeds = (
            None if value is None else value.repeat_interleave(2, dim=0) for value in texts
        )
        kwargs = {**_nested(kwargs), "inputs_embeds": embeds}
        outputs = self.vlmoe(ids, mask, images.flatten(0, 1), **kwargs)
        pooled = self.pooler(first_text_tokens(outputs, mask))
        logits = self.classifier(pooled.view(images.shape[0], -1))
        loss = classification_loss(logits, labels, self.config)
        return _output(self, VLMoESequenceClassifierOutput, loss, logits, outputs)


class VLMoEForImageClassification(VLMoEPreTrainedModel):
    """Classifies images by the mean of their patches (ImageNet)."""

    main_input_name = "pixel_values"
    input_kinds = ("images",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.classifier = VLMoEOutputLinear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoEImageClassifierOutput:
        """Logits ``[n, C]``; `labels` are classes ``[n]``."""
        images = needed(pixel_values, "pixel_values")
        masked = kwargs.pop("bool_masked_pos", None)
        outputs = self.vlmoe(None, None, images, masked, None, **_nested(kwargs))
        logits = self.classifier(outputs.image_hidden_state[:, 1:].mean(dim=1))
        loss = classification_loss(logits, labels, self.config)
        return _output(self, VLMoEImageClassifierOutput, loss, logits, outputs)


class VLMoEForSequenceClassification(VLMoEPreTrainedModel):
    """Classifies texts, and pairs of texts (MNLI)."""

    input_kinds = ("texts",)

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        self.vlmoe = VLMoEModel(config)
        self.pooler = VLMoEPooler(config)
        self.classifier = VLMoEOutputLinear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoESequenceClassifierOutput:
        """Logits ``[n, C]``; `labels` are classes ``[n]``, or as `problem_type` says."""
        outputs = self.vlmoe(input_ids, attention_mask, None, **_nested(kwargs))
        pooled = self.pooler(first_text_tokens(outputs, attention_mask))
        logits = self.classifier(pooled)
        loss = classification_loss(logits, labels, self.config)
        return _output(self, VLMoESequenceClassifierOutput, loss, logits, outputs)


class VLMoEForImageAndTextRetrieval(VLMoEPreTrainedModel):
    """Finds images for texts and texts for images: unit vectors of either, and a judge of pairs (COCO, Flickr30K)."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.vlmoe = VLMoEModel(config)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image_projection = nn.Linear(width, width, bias=False)
        # fp32: in bf16 it would move in steps of 1/64.
        self.logit_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.pooler = VLMoEPooler(config)
        self.matching = VLMoEOutputLinear(width, 2)
        self.post_init()

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> VLMoEFeaturesOutput:
        """Texts ``[m, Lt]`` as unit vectors in fp32: `pooler_output` ``[m, D]``.

        `last_hidden_state` has all tokens ``[m, Lt, D]``. See [`VLMoEModel.forward`] for the other arguments.
        """
        outputs = self.vlmoe(input_ids, attention_mask, None, **_nested(kwargs))
        vectors = self.text_projection(first_text_tokens(outputs, attention_mask))
        return unit_features(outputs, vectors)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Optional[Tensor] = None, **kwargs: Any
    ) -> VLMoEFeaturesOutput:
        """Images ``[n, 3, S, S]`` as unit vectors in fp32: `pooler_output` ``[n, D]``.

        `last_hidden_state` has [I_CLS] and the patches ``[n, 1 + N, D]``. The rest is as with texts.
        """
        images = needed(pixel_values, "pixel_values")
        masked = kwargs.pop("bool_masked_pos", None)
        outputs = self.vlmoe(None, None, images, masked, None, **_nested(kwargs))
        return unit_features(outputs, self.image_projection(outputs.image_hidden_state[:, 0]))

    def match_logits(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        **kwargs: Any,
    ) -> Tensor:
        """No match, match ``[n, 2]`` in fp32 for text i with image i; the pair is read as a whole."""
        return self._match(input_ids, attention_mask, pixel_values, **kwargs)[1]

    def _match(self, ids: Any, mask: Any, pixels: Any, **kwargs: Any) -> tuple[Any, Tensor]:
        images = needed(pixels, "pixel_values")
        outputs = self.vlmoe(ids, mask, images, **_nested(kwargs))
        return outputs, self.matching(self.pooler(first_text_tokens(outputs, mask)))

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        pixel_values: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        return_loss: Optional[bool] = None,
        output_match_logits: bool = False,
        **kwargs: Any,
    ) -> VLMoEForImageAndTextRetrievalOutput:
        """Features and similarities of all texts with all images.

        Args:
            input_ids: ``[m, Lt]``.
            attention_mask: ``[m, Lt]``.
            pixel_values: ``[n, 3, S, S]``.
            labels: whether text i and image i belong together, 1 or 0 ``[n]``: gives the matching loss of these pairs.
            return_loss: text i and image i belong together, all others do not: gives the contrastive loss, and
                without `labels` the matching loss of these pairs and of hard negatives drawn from the batch.
            output_match_logits: judges text i with image i; `labels` do so too.
            **kwargs: of the model, which reads texts, images, pairs that are judged, and pairs that are drawn.

        Raises:
            ValueError: nothing was given, or pairs are asked for and texts and images are not as many.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("give input_ids or pixel_values")
        texts = images = pairs = drawn = per_text = match_logits = contrastive = matching = None
        if input_ids is not None:
            texts = self.get_text_features(input_ids, attention_mask, **_nested(kwargs))
        if pixel_values is not None:
            images = self.get_image_features(pixel_values, **_nested(kwargs))
        if texts is not None and images is not None:
            # Cosine over temperature [m, n], in fp32.
            vectors = texts.pooler_output
            with torch.autocast(vectors.device.type, enabled=False):
                scale = self.logit_scale.to(vectors.device, torch.float32).exp()
                per_text = scale * (vectors @ images.pooler_output.to(vectors.device).t())
        given = (input_ids, attention_mask, pixel_values)
        if output_match_logits or labels is not None:
            pairs, match_logits = self._match(*given, **kwargs)
            if labels is not None:
                matching = F.cross_entropy(match_logits, labels.to(match_logits.device))
        if return_loss:
            contrastive = contrastive_loss(per_text)
            if labels is None and per_text is not None:
                drawn, matching = self._matching_loss(per_text, *given, **kwargs)
        # Hidden states are those of pairs, or where only texts or only images were given theirs.
        only = images if texts is None else texts if images is None else None
        whole = only if pairs is None else pairs
        read: list[Any] = [x for x in (texts, images, pairs, drawn) if x is not None]
        routed = [x for x in read if x.aux_loss is not None]
        aux_loss = router_logits = dropped_tokens = None
        if routed:
            aux_loss = sum(x.aux_loss.to(routed[0].aux_loss.device) for x in routed)
            router_logits = sum((x.router_logits for x in routed), ())
            dropped_tokens = sum((x.dropped_tokens for x in routed), ())
        return VLMoEForImageAndTextRetrievalOutput(
            loss=self._with_aux_loss(total_loss(contrastive, matching), aux_loss),
            contrastive_loss=contrastive,
            matching_loss=matching,
            logits_per_image=None if per_text is None else per_text.t(),
            logits_per_text=per_text,
            match_logits=match_logits,
            text_features=None if texts is None else texts.pooler_output,
            image_features=None if images is None else images.pooler_output,
            hidden_states=None if whole is None else whole.hidden_states,
            attentions=None if whole is None else whole.attentions,
            aux_loss=aux_loss,
            router_logits=router_logits,
            dropped_tokens=dropped_tokens,
            text_model_output=texts,
            vision_model_output=images,
        )

    def _matching_loss(
        self,
        similarity: Tensor,
        ids: Optional[Tensor],
        mask: Optional[Tensor],
        pixels: Optional[Tensor],
        **kwargs: Any,
    ) -> tuple[VLMoEModelOutput, Tensor]:
        """Loss of every pair, of its text with a wrong image, and of its image with a wrong text (VLMo)."""
        ids, pixels = needed(ids, "input_ids"), needed(pixels, "pixel_values")
        texts, images, target = (x.to(ids.device) for x in hard_negative_pairs(similarity))
        mask = None if mask is None else mask[texts]
        outputs, logits = self._match(ids[texts], mask, pixels[images], **kwargs)
        return outputs, F.cross_entropy(logits, target.to(logits.device))


def _output(
    model: VLMoEPreTrainedModel,
    kind: Any,
    loss: Optional[Tensor],
    logits: Tensor,
    outputs: VLMoEModelOutput,
) -> Any:
    """Output of a head, whose loss is without that of the routers."""
    return kind(model._with_aux_loss(loss, outputs.aux_loss), logits, **carried(outputs))


def _nested(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a head for the model inside, which always returns its outputs by name."""
    return {**kwargs, "return_dict": True}


# The experts stand here because transformers 4 copies no modules but those that this one names itself.
__all__ = [
    "VLMoEExperts",
    "VLMoEForImageAndTextRetrieval",
    "VLMoEForImageClassification",
    "VLMoEForImagesAndTextClassification",
    "VLMoEForMaskedImageModeling",
    "VLMoEForMaskedLM",
    "VLMoEForPreTraining",
    "VLMoEForSequenceClassification",
    "VLMoEForVisualQuestionAnswering",
    "VLMoEModel",
    "VLMoEPreTrainedModel",
    "VLMoERouter",
]
