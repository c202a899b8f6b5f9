"""What all models of VL-MoE have in common: how weights start, and how they are loaded."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_vlmoe import VLMoEConfig
from .layers_vlmoe import (
    VLMoEAttention,
    VLMoEImageEmbeddings,
    VLMoELayer,
    VLMoETextEmbeddings,
)
from .moe_vlmoe import (
    EXPERTS_IMPLEMENTATIONS,
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
