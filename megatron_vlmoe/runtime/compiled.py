"""Pure functions of tensors that torch.compile makes into few kernels, where a run asks for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

log = logging.getLogger(__name__)

RECOMPILE_LIMIT = 64
"""Versions of one function: pools differ in their experts, branches in their tokens, and evaluation has no gradient."""

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")


class _Process:
    """Whether a function could not be compiled in this process: then none is."""

    failed = False


def compiled(function: Callable[Arguments, Value], wanted: bool) -> Callable[Arguments, Value]:
    """The function, compiled for the arguments of its calls if that is wanted.

    Where it cannot be compiled, for want of a compiler or for any other reason, one line says so, and this and all
    other functions run as they are for the rest of the process.
    """
    return _compiled(function) if wanted else function


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # The backward pass is compiled beside the forward one, where a failure is caught.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    # For all modules that call the function, since dynamo counts them together.
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )
    fast = torch.compile(function, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not _Process.failed:
            try:
                return fast(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # An error of the function itself comes again below. torch wraps what a compiler says.
                cause = getattr(error, "inner_exception", error)
                reason = next(iter(str(cause).strip().splitlines()), "")[:200]
                log.warning(
                    "train.compile: %s cannot be compiled (%s: %s); from here on nothing is compiled",
                    function.__name__,
                    type(cause).__name__,
                    reason,
                )
                _Process.failed = True
        return function(*args, **kwargs)

    return call
