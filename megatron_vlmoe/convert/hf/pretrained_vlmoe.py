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
from .moe_vlmoe import EXPERTS_IMPLEMENTATIONS, VLMoEExperts, VLMoERouter
from .outputs_vlmoe import VLMoEModelOutput

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
FP32_MODULES = frozenset({"router", "logit_scale"})
# Their own parameters and those of the modules inside are used together, so that they stay on one device.
NO_SPLIT_MODULES = frozenset({"VLMoETextEmbeddings", "VLMoEImageEmbeddings", "VLMoELayer"})


class VLMoEPreTrainedModel(PreTrainedModel):
    """Base of the models."""

    config_class = VLMoEConfig
    base_model_prefix = "vlmoe"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
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

    def _with_aux_loss(self, loss: Optional[Tensor], outputs: VLMoEModelOutput) -> Optional[Tensor]:
        """The loss of a head and that of the routers, where there are both."""
        if loss is None or outputs.aux_loss is None:
            return loss
        return loss + self.config.router_aux_loss_coef * outputs.aux_loss.to(loss.device)

    def get_output_embeddings(self) -> Optional[nn.Module]:
        """The head that predicts pieces of text; None in a model without."""
        return getattr(self, "mlm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head that predicts pieces of text."""
        self.mlm_head = new_embeddings

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
