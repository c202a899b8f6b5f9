"""A fine-tuned model in a script of one's own, or behind the command `predict`; torch is loaded with `VLMoE`."""

from typing import TYPE_CHECKING, Any

from megatron_vlmoe.inference.answers import Answer, Decision, Scored
from megatron_vlmoe.inference.inputs import UnknownTextWarning
from megatron_vlmoe.runtime.lazy import load

if TYPE_CHECKING:
    from megatron_vlmoe.inference.model import VLMoE

__all__ = ["Answer", "Decision", "Scored", "UnknownTextWarning", "VLMoE"]


def __getattr__(name: str) -> Any:
    if name == "VLMoE":
        return load("megatron_vlmoe.inference.model").VLMoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
