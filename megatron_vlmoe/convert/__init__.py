"""Checkpoints to other formats and from them; no GPU, no process group, one tensor in memory at a time."""
