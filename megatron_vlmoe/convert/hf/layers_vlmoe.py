"""Layers of VL-MoE: embeddings, attention, blocks, what heads are made of, and what all models have in common.

Letters in shapes: n samples, L tokens of a sample, Lt of them text, D width, N patches, S image side, H heads,
C classes. Masks are bool, None means all: that of attention has the keys that may be seen ``[n, 1, 1, L]``, that of
tokens those that are no padding ``[n, L]``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_vlmoe import VLMoEConfig
from .moe_vlmoe import (
    EXPERTS_IMPLEMENTATIONS,
    RouterOutput,
    VLMoEBranchOutput,
    VLMoEExperts,
    VLMoEFeedForward,
    VLMoERouter,
)

try:
    # It leaves alone what a checkpoint has filled (transformers 5).
    from transformers import initialization as init
except ImportError:
    from torch.nn import init  # type: ignore[no-redef]

PRETRAINING_HEADS = (r"^mlm_head\.", r"^mim_head\.")
TASK_HEADS = (
    *(r"^pooler\.", r"^classifier\.", r"^matching\.", r"^text_projection\."),
    *(r"^image_projection\.", r"^logit_scale$"),
)
# What a sample may be: a text alone, an image alone, or a text with an image.
KINDS = ("texts", "images", "pairs")
# Parameters outside the blocks that not all kinds of samples reach, by a part of their name.
READERS = {
    "text_embeddings": ("texts", "pairs"),
    "image_embeddings": ("images", "pairs"),
    "mlm_head": ("texts", "pairs"),
    "mim_head": ("images", "pairs"),
    "text_projection": ("texts",),
    "image_projection": ("images",),
    "logit_scale": ("texts",),
}
FP32_MODULES = frozenset({"router", "logit_scale"})
# Their own parameters and those of the modules inside are used together, so that they stay on one device.
NO_SPLIT_MODULES = frozenset({"VLMoETextEmbeddings", "VLMoEImageEmbeddings", "VLMoELayer"})


class VLMoETextEmbeddings(nn.Module):
    """Word embeddings plus positions; special tokens are part of the ids."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        most = max(config.text_length, config.pair_text_length)
        self.position_embeddings = nn.Parameter(torch.zeros(1, most, width))
        self.token_type_embedding = (
            nn.Parameter(torch.zeros(1, 1, width)) if config.use_token_type_embeddings else None
        )

    def forward(
        self,
        input_ids: Optional[Tensor],
        inputs_embeds: Optional[Tensor],
        attention_mask: Optional[Tensor] = None,
    ) -> Tensor:
        """Ids ``[n, Lt]``, or their embeddings ``[n, Lt, D]``, to ``[n, Lt, D]``.

        With an attention mask ``[n, Lt]`` positions count from the first token that is no padding, so that padding on
        the left changes nothing.

        Raises:
            ValueError: more tokens than positions, or none.
        """
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        length, most = words.shape[1], self.position_embeddings.shape[1]
        if length > most:
            raise ValueError(f"a text of {length} tokens; the model has positions for {most}")
        if length == 0:
            raise ValueError(
                "a text of 0 tokens; the tokenizer gives an empty text two, its beginning and its end"
            )
        positions = self.position_embeddings[:, :length]
        if attention_mask is not None:
            places = torch.arange(length, device=attention_mask.device)
            places = (places - first_places(attention_mask).unsqueeze(1)).clamp(min=0)
            positions = F.embedding(places.to(positions.device), positions[0])
        tokens = words + positions
        if self.token_type_embedding is not None:
            tokens = tokens + self.token_type_embedding
        return tokens


class VLMoEPatchEmbeddings(nn.Module):
    """Linear projection of patches: pixels ``[n, channels, S, S]`` to ``[n, N, D]``, row by row."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__()
        side = config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, side, stride=side)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See the class."""
        return self.projection(pixel_values).flatten(2).transpose(1, 2)


class VLMoEImageEmbeddings(nn.Module):
    """[I_CLS] and patches plus positions; masked patches are replaced before positions are added (BEiT)."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.patch_embeddings = VLMoEPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + config.num_patches, width))
        self.token_type_embedding = (
            nn.Parameter(torch.zeros(1, 1, width)) if config.use_token_type_embeddings else None
        )

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Optional[Tensor] = None,
        interpolate_pos_encoding: bool = False,
    ) -> Tensor:
        """Tokens ``[n, 1 + N, D]`` of images.

        Args:
            pixel_values: normalised pixels ``[n, channels, S, S]``.
            bool_masked_pos: patches that are hidden ``[n, N]``.
            interpolate_pos_encoding: takes images of other sizes, which the patch size must divide.

        Raises:
            ValueError: pixels or mask of the wrong shape.
        """
        self._check(pixel_values, interpolate_pos_encoding)
        dtype = self.patch_embeddings.projection.weight.dtype
        patches = self.patch_embeddings(pixel_values.to(dtype))
        if bool_masked_pos is not None:
            if bool_masked_pos.shape != patches.shape[:2]:
                raise ValueError(
                    f"bool_masked_pos is {list(bool_masked_pos.shape)}, not {list(patches.shape[:2])}: "
                    "one value for every patch"
                )
            patches = torch.where(bool_masked_pos.bool().unsqueeze(2), self.mask_token, patches)
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        tokens = tokens + self._positions(*pixel_values.shape[2:])
        if self.token_type_embedding is not None:
            tokens = tokens + self.token_type_embedding
        return tokens

    def _check(self, pixel_values: Tensor, any_size: bool) -> None:
        config = self.config
        if pixel_values.dim() != 4 or pixel_values.shape[1] != config.num_channels:
            raise ValueError(
                f"pixel_values is {list(pixel_values.shape)}, not [images, {config.num_channels}, height, width]"
            )
        height, width = pixel_values.shape[2:]
        if any_size:
            if height % config.patch_size or width % config.patch_size:
                raise ValueError(
                    f"an image of {height} x {width} pixels does not divide into patches of {config.patch_size}"
                )
        elif (height, width) != (config.image_size, config.image_size):
            raise ValueError(
                f"an image of {height} x {width} pixels; the model takes {config.image_size} x {config.image_size}, "
                "and other sizes with interpolate_pos_encoding=True"
            )

    def _positions(self, height: int, width: int) -> Tensor:
        """Positions ``[1, 1 + N, D]`` of an image of any size; [I_CLS] keeps its own."""
        table, config = self.position_embeddings, self.config
        old = config.image_size // config.patch_size
        rows, columns = height // config.patch_size, width // config.patch_size
        if (rows, columns) == (old, old):
            return table
        grid = table[:, 1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        patches = grid.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([table[:, :1], patches.to(table.dtype)], dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Optional[Tensor],
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, which gives the weights ``[n, H, L, L]`` too."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class VLMoEAttention(nn.Module):
    """Self-attention over all tokens of a sample, whatever their modality; the key has no bias (BEiT)."""

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.output = VLMoEBranchOutput(width, width, layer_number)

    def forward(
        self, hidden_states: Tensor, attention_mask: Optional[Tensor]
    ) -> tuple[Tensor, Optional[Tensor]]:
        """``[n, L, D]`` to ``[n, L, D]``, and the weights where the implementation has them."""
        samples, length, width = hidden_states.shape
        query, key, value = (
            project(hidden_states).view(samples, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attend = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        kernels: Any = nullcontext()
        if attention_mask is not None and query.requires_grad:
            # Not cuDNN's, whose gradients may be NaN where there is a mask (pytorch/pytorch#196678).
            kernels = sdpa_kernel(
                [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            )
        with kernels:
            context, weights = attend(
                self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling
            )
        return self.output(context.reshape(samples, length, width)), weights


class VLMoEDropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out with some probability, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """``[n, L, D]`` to ``[n, L, D]``."""
        if self.rate == 0.0 or not self.training:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1.0 - self.rate)).to(branch.dtype)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:.3f}"


class VLMoELayer(GradientCheckpointingLayer):
    """A block, by its number from 1: ``x += lambda_1 * attention(LN(x))``, then ``x += lambda_2 * feed_forward(x)``."""

    def __init__(self, config: VLMoEConfig, layer_number: int) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = VLMoEAttention(config, layer_number)
        self.feed_forward = VLMoEFeedForward(config, layer_number)
        # Linear from 0 in the first block to the full rate in the last.
        share = (layer_number - 1) / max(config.num_hidden_layers - 1, 1)
        self.drop_path = VLMoEDropPath(config.drop_path_rate * share)
        self.lambda_1: Optional[nn.Parameter] = None
        self.lambda_2: Optional[nn.Parameter] = None
        if config.layer_scale_init_value > 0.0:
            self.lambda_1 = nn.Parameter(torch.ones(config.hidden_size))
            self.lambda_2 = nn.Parameter(torch.ones(config.hidden_size))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor],
        token_mask: Optional[Tensor],
        text_length: int,
        output_router_logits: bool = False,
    ) -> tuple[Optional[Tensor], ...]:
        """``[n, L, D]`` to ``[n, L, D]``, attention weights where the implementation has them, and what routers did.

        The latter one after the other, the three fields of a `RouterOutput` each: a checkpoint of the layer hands
        gradients on to tensors that it returns, not to those inside of tuples. Tokens of the text come first.
        """
        branch, weights = self.attention(self.layernorm_before(hidden_states), attention_mask)
        hidden_states = self._add(hidden_states, branch, self.lambda_1)
        branch, routers = self.feed_forward(
            hidden_states, text_length, token_mask, output_router_logits
        )
        hidden_states = self._add(hidden_states, branch, self.lambda_2)
        return (hidden_states, weights, *(value for router in routers for value in router))

    def _add(self, hidden_states: Tensor, branch: Tensor, scale: Optional[nn.Parameter]) -> Tensor:
        if scale is not None:
            branch = branch * scale
        return hidden_states + self.drop_path(branch)


class VLMoEEncoder(nn.Module):
    """The blocks, first to last."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__()
        numbers = range(1, config.num_hidden_layers + 1)
        self.layer = nn.ModuleList([VLMoELayer(config, number) for number in numbers])
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Optional[Tensor],
        token_mask: Optional[Tensor],
        text_length: int,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_router_logits: bool = False,
    ) -> tuple[
        Tensor,
        Optional[tuple[Tensor, ...]],
        Optional[tuple[Tensor, ...]],
        Optional[tuple[RouterOutput, ...]],
    ]:
        """Hidden states ``[n, L, D]`` after the last block; those before the first and after every block, the
        attention weights of every block, and what every router did, where asked for. See `VLMoELayer.forward` for
        the other arguments."""
        if self.gradient_checkpointing and self.training and not hidden_states.requires_grad:
            # Where embeddings are frozen: from such an input reentrant checkpoints give no gradient to anything.
            hidden_states.requires_grad_()
        states: list[Tensor] = [hidden_states]
        weights: list[Tensor] = []
        routers: list[RouterOutput] = []
        for layer in self.layer:
            hidden_states, attention, *routed = layer(
                hidden_states, attention_mask, token_mask, text_length, output_router_logits
            )
            routers += [RouterOutput(*routed[at : at + 3]) for at in range(0, len(routed), 3)]
            if output_hidden_states:
                states.append(hidden_states)
            if output_attentions:
                weights.append(attention)
        return (
            hidden_states,
            tuple(states) if output_hidden_states else None,
            tuple(weights) if output_attentions else None,
            tuple(routers) if output_router_logits else None,
        )


def first_places(attention_mask: Tensor) -> Tensor:
    """Where the first token of every text stands that is no padding, of ``[n, Lt]``: ``[n]``; 0 if all is padding."""
    return attention_mask.bool().long().argmax(dim=1)


class VLMoEPooler(nn.Module):
    """``tanh(W x + b)`` of the first token of a text: ``[n, D]`` to ``[n, D]`` (BERT)."""

    def __init__(self, config: VLMoEConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_token: Tensor) -> Tensor:
        """See the class."""
        return torch.tanh(self.dense(first_token))


class VLMoEOutputLinear(nn.Linear):
    """A linear layer that computes in fp32, whatever its inputs and weights are and under autocast too.

    Rounded to bf16, logits that are close to each other are often equal.
    """

    def forward(self, features: Tensor) -> Tensor:
        """``[..., inputs]`` to fp32 ``[..., C]``."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.weight.float(), self.bias.float())


class VLMoEClassifier(nn.Module):
    """Linear to 2 D, LayerNorm, GELU, linear to the classes (VLMo): ``[n, inputs]`` to fp32 ``[n, C]``."""

    def __init__(self, config: VLMoEConfig, inputs: int) -> None:
        super().__init__()
        inner = 2 * config.hidden_size
        self.dense = nn.Linear(inputs, inner)
        self.norm = nn.LayerNorm(inner, eps=config.layer_norm_eps)
        self.output = VLMoEOutputLinear(inner, config.num_labels)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return self.output(F.gelu(self.norm(self.dense(features))))


def prediction_head(config: VLMoEConfig, field: str) -> nn.Linear:
    """The head that predicts one of as many pieces or codes as a field of the configuration says.

    Raises:
        ValueError: that is 0.
    """
    classes = getattr(config, field)
    if not classes:
        raise ValueError(f"a model with {field}=0 has no such head")
    return nn.Linear(config.hidden_size, classes)


class VLMoEPreTrainedModel(PreTrainedModel):
    """Base of the models."""

    config_class = VLMoEConfig
    base_model_prefix = "vlmoe"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    # Only the models that predict pieces of text have it.
    mlm_head: Optional[nn.Linear]
    # What training may read of `KINDS`.
    input_kinds: tuple[str, ...] = KINDS
    supports_gradient_checkpointing = True
    # `**kwargs` of forward are no loss arguments: Trainer divides by its accumulation steps as usual.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _can_compile_fullgraph = True
    # What transformers 5 may record by hooks, as its executorch export and other tools do; `forward` itself returns
    # the same where it is asked for.
    _can_record_outputs = {
        "hidden_states": VLMoELayer,
        "attentions": VLMoEAttention,
        "router_logits": VLMoERouter,
    }
    # Every task starts from a pretraining export, whose heads are not missed there.
    _keys_to_ignore_on_load_unexpected = list(PRETRAINING_HEADS)

    def post_init(self) -> None:
        """Keeps routers and the temperature in fp32 whatever the precision of the rest, and says what stays whole."""
        # Named only where the model has them, which transformers 4 (precision) and FSDP (modules) check.
        found = {part for name, _ in self.named_parameters() for part in name.split(".")}
        self._keep_in_fp32_modules_strict = sorted(found & FP32_MODULES)
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(kinds & NO_SPLIT_MODULES)
        super().post_init()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Transformers 5 looks for its own decorator in the module of the model; the experts stand in another."""
        return True

    def get_correct_experts_implementation(self, requested_experts: Optional[str]) -> str:
        """The implementation of experts that is meant (transformers 5): the grouped one by default.

        Raises:
            ValueError: one that these experts, which have biases and no gate of their own, do not have.
        """
        found = requested_experts or "grouped_mm"
        if found not in EXPERTS_IMPLEMENTATIONS:
            raise ValueError(
                f"experts_implementation={found!r} is none of {', '.join(EXPERTS_IMPLEMENTATIONS)}"
            )
        return found

    def _with_aux_loss(
        self, loss: Optional[Tensor], aux_loss: Optional[Tensor]
    ) -> Optional[Tensor]:
        """The loss of a head and that of the routers, where there are both."""
        if loss is None or aux_loss is None:
            return loss
        return loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)

    def get_output_embeddings(self) -> Optional[nn.Linear]:
        """The head that predicts pieces of text; None in a model without."""
        return getattr(self, "mlm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replaces the head that predicts pieces of text."""
        self.mlm_head = new_embeddings

    def freeze_unreached(self, *kinds: str) -> list[str]:
        """Takes parameters that training never reaches out of it (`requires_grad=False`).

        They get no gradient, for which DistributedDataParallel would wait, and an optimizer has nothing to do with
        them. To be called after loading and before the model is wrapped or given to a `Trainer`.

        Args:
            *kinds: what a step reads, "texts", "images", "pairs" or several; without any, all that the class can read.

        Returns:
            Names of the parameters that are frozen now.

        Raises:
            ValueError: the class does not read that.
        """
        for kind in kinds:
            if kind not in self.input_kinds:
                known = ", ".join(self.input_kinds)
                raise ValueError(f"{type(self).__name__} is trained on {known}, not on {kind!r}")
        read = set(kinds or self.input_kinds)
        reached = {
            f"{prefix}.{branch}."
            for prefix, module in self.named_modules()
            if isinstance(module, VLMoEFeedForward)
            for branch in {name for kind in read for name in module.branches_of(kind)}
        }
        masks_patches = any(name.startswith("mim_head.") for name, _ in self.named_parameters())
        frozen = []
        for name, parameter in self.named_parameters():
            parts = name.split(".")
            kept = all(read & set(READERS[part]) for part in parts if part in READERS)
            if "feed_forward" in parts:
                kept = any(name.startswith(prefix) for prefix in reached)
            if parts[-1] == "mask_token":
                kept = kept and masks_patches
            if not kept:
                parameter.requires_grad_(False)
                frozen.append(name)
        return frozen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """BEiT's: a normal distribution cut at one standard deviation, smaller in deeper output matrices."""
        scale = getattr(module, "init_scale", 1.0)
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._draw(module.weight, scale)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, (nn.Embedding, VLMoERouter)):
            self._draw(module.weight)
        elif isinstance(module, VLMoEExperts):
            self._draw(module.fc1_weight)
            self._draw(module.fc2_weight, scale)
            init.zeros_(module.fc1_bias)
            init.zeros_(module.fc2_bias)
        elif isinstance(module, (VLMoETextEmbeddings, VLMoEImageEmbeddings)):
            for parameter in module.parameters(recurse=False):
                self._draw(parameter)
        elif isinstance(module, VLMoELayer):
            for parameter in module.parameters(recurse=False):
                init.constant_(parameter, self.config.layer_scale_init_value)
        elif isinstance(getattr(module, "logit_scale", None), nn.Parameter):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def _draw(self, parameter: Tensor, scale: float = 1.0) -> None:
        std = self.config.initializer_range * scale
        init.trunc_normal_(parameter, mean=0.0, std=std, a=-std, b=std)
