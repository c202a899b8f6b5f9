"""Sparse models from trained ones: every expert starts as a copy of a dense FFN, or of an expert (arXiv 2212.05055)."""
