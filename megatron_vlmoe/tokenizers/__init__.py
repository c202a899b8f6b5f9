"""Tokenizers: SentencePiece for text, VQ-KD for images."""
