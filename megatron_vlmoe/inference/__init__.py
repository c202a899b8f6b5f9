"""A fine-tuned model in a script of one's own, or behind the command `predict`; importing it loads no torch."""

from megatron_vlmoe.inference.answers import Answer, Decision, Scored
from megatron_vlmoe.inference.inputs import UnknownTextWarning
from megatron_vlmoe.inference.model import VLMoE

__all__ = ["Answer", "Decision", "Scored", "UnknownTextWarning", "VLMoE"]
