"""VL-MoE: embed, blocks, heads, in pipeline stages."""

from __future__ import annotations

from typing import Callable, Mapping, Optional, Union

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.model.block import build_block
from megatron_vlmoe.model.embeddings import StreamEmbedding
from megatron_vlmoe.model.heads import Heads, MaskedHeads, Predicted
from megatron_vlmoe.stream.batch import Batch, StreamBatch
from megatron_vlmoe.stream.layout import SegmentName

BuildHeads = Callable[[TransformerConfig, RunConfig], Heads]
"""Makes what the last stage ends with: the heads of pretraining, or of a downstream task."""


class VLMoEModel(MegatronModule):
    """One pipeline stage of the model (paper section 3.2).

    Args:
        config: the run; vocabulary sizes must be known.
        transformer_config: megatron-core's configuration.
        pre_process: whether this stage embeds.
        post_process: whether this stage has the final LayerNorm and the heads.
        vp_stage: virtual pipeline stage.
        build_heads: makes the heads of the last stage.
    """

    def __init__(
        self,
        config: RunConfig,
        transformer_config: TransformerConfig,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: Optional[int] = None,
        build_heads: BuildHeads = MaskedHeads,
    ) -> None:
        super().__init__(config=transformer_config)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = False
        if pre_process:
            self.embedding = StreamEmbedding(transformer_config, config.model, config.data)
        self.decoder = build_block(config, transformer_config, pre_process, post_process, vp_stage)
        if post_process:
            self.heads = build_heads(transformer_config, config)

    def set_input_tensor(self, input_tensor: Union[Tensor, list[Tensor]]) -> None:
        """Takes the previous stage's output from the pipeline schedule."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def encode(self, batch: Batch, stream: StreamBatch) -> Tensor:
        """Hidden states ``[T, 1, D]`` of the local stream after this stage's blocks."""
        hidden = self.embedding(batch, stream) if self.pre_process else None
        return self.decoder(hidden, stream)

    def forward(
        self, batch: Batch, stream: StreamBatch
    ) -> Union[Tensor, Mapping[str, Tensor], Mapping[SegmentName, Predicted]]:
        """Hidden states for the next stage; on the last stage what the heads return."""
        hidden = self.encode(batch, stream)
        if not self.post_process:
            return hidden
        return self.heads(hidden, batch, stream)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Optional[dict] = None
    ) -> ShardedStateDict:
        """Shards of this stage; blocks are keyed by their number in the whole model."""
        metadata = {**(metadata or {}), "non_homogeneous_layers": True}
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)
