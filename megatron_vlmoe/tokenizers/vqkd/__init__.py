"""The VQ-KD image tokenizer of BEiT v2: architecture, quantiser, teachers, training, files."""
