"""Configuration of VL-MoE: sizes of the model, and which feed-forward branches every block has."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Sequence

from transformers import PretrainedConfig

MODALITIES = ("both", "text", "vision", "none")
ROUTINGS = ("token_choice", "expert_choice")
ROUTER_LOSSES = (
    *("importance", "load", "z", "gshard", "local_entropy", "global_entropy"),
    "global_entropy_experts",
)
# By the least that they may be.
SIZES = {
    1: (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("image_size", "patch_size", "num_channels", "text_length", "pair_text_length"),
        *("num_experts_per_tok", "capacity_multiple_of"),
    ),
    0: (
        *("num_vl_layers", "vocab_size", "visual_vocab_size"),
        *("num_vision_experts", "num_text_experts", "num_vl_experts"),
    ),
}
TASKS = ("", "vqa", "nlvr2", "retrieval", "imagenet", "mnli")


class Branch(NamedTuple):
    """One feed-forward branch of a block.

    Args:
        name: `text` and `vision` read the tokens of their modality, `shared` those of both; `vl` reads all tokens
            of image-text pairs, and in a block that has it the others read texts and images without a partner.
        num_experts: experts of the pool; 0 for one dense FFN.
    """

    name: str
    num_experts: int = 0


class VLMoEConfig(PretrainedConfig):
    """Configuration of a VL-MoE model (arXiv 2303.07226).

    Args:
        hidden_size: width of the hidden states.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of the self-attention that text and image share.
        intermediate_size: inner width of every FFN and every expert.
        num_vl_layers: last blocks, in which the tokens of image-text pairs go through a branch of their own.
        image_size: side of the square input image in pixels.
        patch_size: side of a patch in pixels.
        num_channels: channels of an image.
        text_length: tokens of a text without image in training, special tokens included.
        pair_text_length: the same for the text of an image-text pair.
        vocab_size: pieces of the text tokenizer; 0 for a model of images alone, which has no text embeddings.
        visual_vocab_size: codes of the image tokenizer that masked patches are predicted in; 0 without that head.
        layer_norm_eps: epsilon of every LayerNorm.
        layer_scale_init_value: initial factor of both residual branches (LayerScale); 0 leaves it out.
        drop_path_rate: stochastic depth of the last block in training; it grows linearly from 0 in the first.
        initializer_range: standard deviation of new weights, a normal distribution cut at one standard deviation.
        use_token_type_embeddings: adds a learned vector to all text tokens and another to all image tokens.
        hidden_act: activation of FFNs and experts; only "gelu" (exact).
        bos_token_id: id of `<s>`, the first token of every text. All four are None in a model of images alone.
        pad_token_id: id of `<pad>`.
        eos_token_id: id of `</s>`, which ends every part of a text.
        mask_token_id: id of `[MASK]`.
        moe_layers: numbers (from 1) of the blocks with experts.
        moe_modalities: which tokens have experts: "both", "text", "vision" or "none".
        num_vision_experts: experts of every vision pool, and of every shared one; 0 for a dense FFN.
        num_text_experts: experts of every text pool; 0 for a dense FFN.
        num_vl_experts: experts of every pool of pair tokens (with `moe_vl`).
        moe_vl: whether the pair branch of the listed blocks has experts.
        shared_router: one pool for the tokens of both modalities in the listed blocks.
        moe_routing: "token_choice": a token goes to its best experts; "expert_choice": every expert takes the tokens of
            the batch that it scores highest, as many as `capacity_factor` says, so that a token has none to all
            experts, and a result depends on what else is in the batch (Zhou et al., arXiv 2202.09368).
        num_experts_per_tok: experts that a token goes to.
        normalize_gate: divides the gates of a token's experts by their sum.
        batch_priority: where capacity is limited, tokens with a larger gate are served first, not those at the front.
        route_padding: whether padding takes places at experts.
        capacity_multiple_of: an expert's capacity is rounded up to a multiple of this.
        capacity_factor: places of all experts of a pool as a multiple of the choices of its tokens; tokens without a
            place get nothing from the pool. 0 or less limits nothing, so that a result does not depend on what else
            is in the batch; 1.0 is the paper's evaluation.
        output_router_logits: every output has what the routers did, and every loss their auxiliary losses.
        router_aux_loss_coef: weight of the routers' auxiliary losses in a loss (with `output_router_logits`).
        text_router_losses: weights of the auxiliary losses of the routers of text tokens, by name: "importance",
            "load", "z", "gshard", "local_entropy", "global_entropy"; and "global_entropy_experts", the number of
            experts that shall at least be in use. By default the paper's (A.3).
        vision_router_losses: the same of all other routers. A shared router has the entropies of each modality apart:
            those of `text_router_losses` over text tokens, those of `vision_router_losses` over image tokens.
        router_balance_bias_rate: above 0 every router has a bias of each expert, `balance_bias`, which is added to the
            gates for the choice of experts alone. It comes from training by loss-free balancing (arXiv 2408.15664),
            and stays as it is here.
        router_noise_std: standard deviation of the normal noise on the logits of routers while they are trained:
            in training mode, unless their weights are frozen. Negative means 1 / experts, as in the paper.
        logit_scale_init_value: initial logarithm of the inverse temperature of contrastive retrieval.
        task: what the model was fine-tuned on: "", "vqa", "nlvr2", "retrieval", "imagenet", "mnli",
            or a task of the program's own that `training` names too.
        training: options of the training program, kept as they are.
        **kwargs: see [`PretrainedConfig`], for instance `id2label`.

    Raises:
        ValueError: a value that fits no model; the message names the field.
    """

    model_type = "vlmoe"
    # Trainer joins the outputs of batches but for these, which are no predictions.
    keys_to_ignore_at_inference = ["aux_loss", "router_logits", "dropped_tokens"]

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        num_vl_layers: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        text_length: int = 128,
        pair_text_length: int = 128,
        vocab_size: int = 64000,
        visual_vocab_size: int = 8192,
        layer_norm_eps: float = 1e-6,
        layer_scale_init_value: float = 0.1,
        drop_path_rate: float = 0.1,
        initializer_range: float = 0.02,
        use_token_type_embeddings: bool = False,
        hidden_act: str = "gelu",
        bos_token_id: Optional[int] = 0,
        pad_token_id: Optional[int] = 1,
        eos_token_id: Optional[int] = 2,
        mask_token_id: Optional[int] = 4,
        moe_layers: Sequence[int] = (),
        moe_modalities: str = "both",
        num_vision_experts: int = 0,
        num_text_experts: int = 0,
        num_vl_experts: int = 0,
        moe_vl: bool = False,
        shared_router: bool = False,
        moe_routing: str = "token_choice",
        num_experts_per_tok: int = 1,
        normalize_gate: bool = False,
        batch_priority: bool = True,
        route_padding: bool = False,
        capacity_multiple_of: int = 1,
        capacity_factor: float = 0.0,
        output_router_logits: bool = False,
        router_aux_loss_coef: float = 0.01,
        text_router_losses: Optional[dict[str, float]] = None,
        vision_router_losses: Optional[dict[str, float]] = None,
        router_noise_std: float = 0.0,
        router_balance_bias_rate: float = 0.0,
        logit_scale_init_value: float = 2.6592,
        task: str = "",
        training: Optional[dict[str, Any]] = None,
        **kwargs: Any,
    ) -> None:
        # Every option becomes the attribute of its name; ids of tokens are those of the base class.
        given = dict(locals())
        for name, value in given.items():
            if name not in ("self", "kwargs", "__class__") and not name.endswith("_token_id"):
                setattr(self, name, value)
        self.moe_layers = list(moe_layers)
        if text_router_losses is None:
            text_router_losses = {"load": 1.0}
        if vision_router_losses is None:
            vision_router_losses = {"importance": 0.5, "load": 0.5}
        self.text_router_losses = dict(text_router_losses)
        self.vision_router_losses = dict(vision_router_losses)
        self.training = dict(training or {})
        has_text = vocab_size != 0
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(
            bos_token_id=bos_token_id if has_text else None,
            pad_token_id=pad_token_id if has_text else None,
            eos_token_id=eos_token_id if has_text else None,
            mask_token_id=mask_token_id if has_text else None,
            **kwargs,
        )
        self.check()

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def has_experts(self) -> bool:
        """Whether the options ask for any pool of experts."""
        if self.moe_modalities == "none":
            return False
        vision = self.moe_modalities in ("both", "vision") and self.num_vision_experts > 0
        text = self.moe_modalities in ("both", "text") and self.num_text_experts > 0
        return vision or text or (self.moe_vl and self.num_vl_experts > 0)

    def branches(self, layer_number: int) -> tuple[Branch, ...]:
        """The feed-forward branches of block `layer_number`, counted from 1."""
        sparse = self.has_experts and layer_number in self.moe_layers
        vision = self.num_vision_experts if self.moe_modalities in ("both", "vision") else 0
        text = self.num_text_experts if self.moe_modalities in ("both", "text") else 0
        if sparse and self.shared_router:
            own: tuple[Branch, ...] = (Branch("shared", self.num_vision_experts),)
        elif sparse:
            own = (Branch("text", text), Branch("vision", vision))
        else:
            own = (Branch("text"), Branch("vision"))
        if layer_number <= self.num_hidden_layers - self.num_vl_layers:
            return own
        return (*own, Branch("vl", self.num_vl_experts if sparse and self.moe_vl else 0))

    def check(self) -> None:
        """Checks all fields, also those that were set after construction.

        Raises:
            ValueError: naming the first field that does not fit.
        """
        self._check_sizes()
        for name in ("bos_token_id", "pad_token_id", "eos_token_id", "mask_token_id"):
            value = getattr(self, name)
            _require(
                value is None or 0 <= value < self.vocab_size,
                f"{name}={value} is not below vocab_size={self.vocab_size}",
            )
        self._check_experts()
        _require(isinstance(self.training, dict), "training must be a dictionary")
        # An export of a task that a plug-in added names it there too.
        trained = self.training.get("task") or {}
        _require(
            self.task in TASKS or (isinstance(trained, dict) and trained.get("name") == self.task),
            f"task={self.task!r} is not one of {TASKS}",
        )
        _require(
            not self.tie_word_embeddings, "tie_word_embeddings must be false: the heads are untied"
        )

    def _check_sizes(self) -> None:
        for least, names in SIZES.items():
            for name in names:
                value = getattr(self, name)
                whole = isinstance(value, int) and not isinstance(value, bool)
                _require(
                    whole and value >= least,
                    f"{name}={value!r} must be an integer of at least {least}",
                )
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}",
        )
        _require(
            self.image_size % self.patch_size == 0,
            f"patch_size={self.patch_size} does not divide image_size={self.image_size}",
        )
        _require(
            self.num_vl_layers <= self.num_hidden_layers,
            f"num_vl_layers={self.num_vl_layers} is more than num_hidden_layers={self.num_hidden_layers}",
        )
        _require(self.hidden_act == "gelu", f'hidden_act={self.hidden_act!r} must be "gelu"')
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(0.0 < value < math.inf, f"{name}={value} must be above 0")
        value = self.layer_scale_init_value
        _require(0.0 <= value < math.inf, f"layer_scale_init_value={value} must be at least 0")
        value = self.drop_path_rate
        _require(0.0 <= value < 1.0, f"drop_path_rate={value} must be at least 0 and below 1")

    def _check_experts(self) -> None:
        _require(
            self.moe_modalities in MODALITIES,
            f"moe_modalities={self.moe_modalities!r} is not one of {MODALITIES}",
        )
        _require(
            self.moe_routing in ROUTINGS,
            f"moe_routing={self.moe_routing!r} is not one of {ROUTINGS}",
        )
        if self.moe_routing == "expert_choice" and self.has_experts:
            _require(
                self.capacity_factor > 0.0,
                f"capacity_factor={self.capacity_factor} must be above 0 with moe_routing='expert_choice': "
                "it is how many tokens an expert takes",
            )
        for name in (
            *("capacity_factor", "router_aux_loss_coef", "router_noise_std"),
            "router_balance_bias_rate",
        ):
            value = getattr(self, name)
            _require(math.isfinite(value), f"{name}={value} must be finite")
        for name in ("text_router_losses", "vision_router_losses"):
            weights = getattr(self, name)
            _require(isinstance(weights, dict), f"{name} must be a dictionary of weights")
            for loss, weight in weights.items():
                _require(loss in ROUTER_LOSSES, f"{name} has {loss!r}, not one of {ROUTER_LOSSES}")
                _require(math.isfinite(weight), f"{name}[{loss!r}]={weight} must be finite")
        _require(
            len(set(self.moe_layers)) == len(self.moe_layers),
            f"moe_layers={self.moe_layers} lists a block twice",
        )
        for number in self.moe_layers:
            _require(
                number in range(1, self.num_hidden_layers + 1),
                f"moe_layers has block {number}, but the blocks are 1 to {self.num_hidden_layers}",
            )
            for branch in self.branches(number):
                _require(
                    not branch.num_experts or self.num_experts_per_tok <= branch.num_experts,
                    f"num_experts_per_tok={self.num_experts_per_tok} is more than the {branch.num_experts} experts "
                    f"of branch {branch.name} in block {number}",
                )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


__all__ = ["Branch", "VLMoEConfig"]
