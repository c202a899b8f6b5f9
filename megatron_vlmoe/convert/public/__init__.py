"""Import of public checkpoints: VLMo, BEiT-3, BEiT v2, and VLMo-style models with DeepSpeed-MoE layers."""
