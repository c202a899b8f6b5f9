"""Attention kernels of torch, as the model calls them."""

from __future__ import annotations

import itertools
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checks.report import Report, difference, milliseconds

LENGTHS = (64, 128, 192, 197, 320, 325)
WIDTHS = (32, 64)
MASKS = ("none", "key", "document")
# Relative to the largest entry; bf16 has 8 bits.
TOLERANCE = 3e-2
KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
# Logits of "low" inputs lie around it: below -88.7 exp() of a log-sum is zero in fp32.
LOW_LOGIT = -128.0
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def sdpa(report: Report) -> None:
    """Which kernel torch takes, output and gradients against fp32 math, times of all kernels, and varlen attention.

    "low" inputs have very negative logits throughout: with a mask and such lengths cuDNN has returned NaN
    (pytorch#196678).
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    samples, heads = report.size((32, 12), (2, 2))
    found: dict[str, Any] = {}
    for length, width, kind in itertools.product(LENGTHS, WIDTHS, MASKS):
        case = f"L={length} D={width} {kind}"
        own: dict[str, Any] = {}
        for inputs in ("plain", "low"):
            tensors = _inputs(samples, length, heads, width, report.device, inputs == "low")
            mask, lengths = _mask(kind, samples, length, report.device)
            own |= _errors(report, f"{case} {inputs}", inputs, tensors, mask)
            if inputs == "plain":
                query, key, value = _heads(tensors)
                choice = torch._fused_sdp_choice(query, key, value, attn_mask=mask)
                own["kernel"] = SDPBackend(choice).name
                own["ms"] = _times(report, tensors, mask)
                if kind != "document":
                    own |= _varlen(report, case, tensors, mask, lengths)
        found[case] = own
        report.note(cases=found)
    if not report.on_gpu:
        report.left_out("varlen attention, the kernels of CUDA")
    kernels = {own["kernel"] for own in found.values()}
    report.note(kernels=sorted(kernels))
    report.expect(kernels != {"MATH"}, "torch takes the plain kernel everywhere")


def _inputs(samples: int, length: int, heads: int, width: int, device: str, is_low: bool) -> Inputs:
    """Query, key and value as views of one tensor, as the model's projection gives them, and an upstream gradient."""
    generator = torch.Generator().manual_seed(length * width)
    shape = (samples, length, heads, 3 * width)
    fused = torch.randn(shape, generator=generator)
    if is_low:
        # One dimension adds the same number to all logits, powers of two up to the root of D.
        fused[..., 0] = LOW_LOGIT / 16 * width**0.5
        fused[..., width] = 16.0
    upstream = torch.randn(samples, length, heads, width, generator=generator)
    fused = fused.to(device, torch.bfloat16)
    query, key, value = fused.split(width, dim=-1)
    return query, key, value, upstream.to(device, torch.bfloat16)


def _heads(tensors: Inputs) -> list[Tensor]:
    """``[n, L, H, D]`` to ``[n, H, L, D]`` of query, key and value, with gradients."""
    return [x.detach().transpose(1, 2).requires_grad_() for x in tensors[:3]]


def _mask(
    kind: str, samples: int, length: int, device: str
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """True may be seen; and for a key mask the tokens of every sample."""
    generator = torch.Generator().manual_seed(length)
    if kind == "none":
        return None, None
    if kind == "key":
        lengths = torch.randint(1, length + 1, (samples,), generator=generator).to(device)
        mask = torch.arange(length, device=device) < lengths.unsqueeze(1)
        return mask[:, None, None, :], lengths
    starts = torch.rand(samples, length, generator=generator) < 0.05
    documents = starts.cumsum(dim=1).to(device)
    return (documents.unsqueeze(2) == documents.unsqueeze(1)).unsqueeze(1), None


def _outcome(tensors: list[Tensor], mask: Optional[Tensor], upstream: Tensor) -> list[Tensor]:
    output = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    gradients = torch.autograd.grad(output, tensors, upstream.transpose(1, 2).to(output.dtype))
    return [output.detach(), *gradients]


def _errors(
    report: Report, case: str, inputs: str, tensors: Inputs, mask: Optional[Tensor]
) -> dict[str, float]:
    """Differences of output and gradients to those of fp32 with the plain kernel."""
    actual = _outcome(_heads(tensors), mask, tensors[3])
    exact = [x.detach().float().requires_grad_() for x in _heads(tensors)]
    with sdpa_kernel(SDPBackend.MATH):
        expected = _outcome(exact, mask, tensors[3])
    names = ("output", "query", "key", "value")
    if inputs == "low":
        finite = all(bool(torch.isfinite(x).all()) for x in actual)
        report.expect(finite, f"{case}: not finite")
        # The gradients of the constant dimension are sums that cancel.
        actual, expected = ([x[..., 1:] for x in values] for values in (actual, expected))
    off = {
        f"{inputs}_{name}": round(difference(a, b), 5)
        for name, a, b in zip(names, actual, expected)
    }
    for name, value in off.items():
        report.expect(value < TOLERANCE, f"{case}: {name} is off by {value:.3g}")
    return {f"{inputs}_off_by": max(off.values())}


def _times(report: Report, tensors: Inputs, mask: Optional[Tensor]) -> dict[str, Optional[float]]:
    """Milliseconds of forward and backward by default and by each kernel; None where it does not take these."""
    upstream, repetitions = tensors[3], report.size(10, 1)
    inputs = _heads(tensors)
    work = lambda: _outcome(inputs, mask, upstream)  # noqa: E731
    taken: dict[str, Optional[float]] = {"default": milliseconds(work, repetitions, 1)}
    for name in KERNELS if report.on_gpu else ():
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                taken[name] = milliseconds(work, repetitions, 1)
        except RuntimeError:
            taken[name] = None
    return taken


def _varlen(
    report: Report,
    case: str,
    tensors: Inputs,
    mask: Optional[Tensor],
    lengths: Optional[Tensor],
) -> dict[str, float]:
    """`varlen_attn` with every sample's padding as a sequence of its own, against the masked kernel."""
    if not report.on_gpu:
        return {}
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        report.left_out(f"{case}: this torch has no varlen attention")
        return {}
    query, key, value, upstream = tensors
    samples, length = query.shape[:2]
    starts = torch.arange(samples, device=query.device) * length
    if lengths is None:
        cuts = starts
        seen = torch.ones(samples, length, dtype=torch.bool, device=query.device)
    else:
        # A full sample is followed by an empty sequence.
        cuts = torch.stack([starts, starts + lengths], dim=1).flatten()
        seen = torch.arange(length, device=query.device) < lengths.unsqueeze(1)
    ends = torch.full((1,), samples * length, device=query.device)
    sequences = torch.cat([cuts, ends]).to(torch.int32)
    flat = [x.detach().flatten(0, 1).contiguous().requires_grad_() for x in (query, key, value)]
    # Padding has no part in the loss.
    wanted = (upstream * seen[..., None, None]).flatten(0, 1)

    def work() -> list[Tensor]:
        output = varlen_attn(*flat, sequences, sequences, length, length)
        assert isinstance(output, Tensor)
        return [output.detach(), *torch.autograd.grad(output, flat, wanted)]

    try:
        actual = work()
    except Exception as error:
        report.expect(False, f"{case}: varlen_attn: {str(error).splitlines()[0]}")
        return {}
    expected = _outcome(_heads(tensors), mask, upstream * seen[..., None, None])
    places = seen.flatten()
    off = max(
        difference(a[places], b.transpose(1, 2).flatten(0, 1)[places])
        for a, b in zip(actual, expected)
    )
    report.expect(off < TOLERANCE, f"{case}: varlen_attn is off by {off:.3g}")
    return {"varlen_off_by": off, "varlen_ms": milliseconds(work, 10, 1)}
