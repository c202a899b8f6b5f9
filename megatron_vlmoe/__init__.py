"""Training of sparse vision-language models (VL-MoE, arXiv 2303.07226) on megatron-core."""

__version__ = "0.1.0"
