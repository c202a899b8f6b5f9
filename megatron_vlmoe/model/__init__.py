"""The MoME Transformer with sparse experts: embed, blocks, heads."""
