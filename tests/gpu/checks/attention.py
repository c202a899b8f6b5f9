"""Attention kernels of torch, as the model calls them."""

from __future__ import annotations

import itertools
from typing import Any, Optional

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from checks.report import Report, difference, milliseconds
from megatron_vlmoe.model.attention import StreamAttention, allowed_kernels, attend
from megatron_vlmoe.stream.batch import StreamBatch
from megatron_vlmoe.stream.layout import StreamLayout

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
    """Which kernel torch takes for the model's calls, output and gradients against fp32 math, and times of all kernels.

    "low" inputs have very negative logits throughout: with a mask and such lengths cuDNN has returned NaN
    (pytorch#196678), which is noted, but not expected to be right: the model does not let it. Then varlen attention, by
    samples of one kind and over a whole micro-batch.
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
                query, key, value = (x.transpose(1, 2) for x in tensors[:3])
                with allowed_kernels(mask):
                    choice = torch._fused_sdp_choice(query, key, value, attn_mask=mask)
                own["kernel"] = SDPBackend(choice).name
                own["ms"] = _times(report, tensors, mask)
                if kind != "document":
                    own |= _varlen(report, case, tensors, mask, lengths)
            elif mask is not None and report.on_gpu:
                own["cudnn_is_finite"] = _is_finite_with_cudnn(tensors, mask)
        found[case] = own
        report.note(cases=found)
    if report.on_gpu:
        report.note(stream=_stream(report))
    else:
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


def _leaves(tensors: Inputs) -> list[Tensor]:
    """Query, key and value ``[n, L, H, D]``, with gradients."""
    return [x.detach().requires_grad_() for x in tensors[:3]]


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


def _outcome(
    tensors: list[Tensor], mask: Optional[Tensor], upstream: Tensor, plain: bool = False
) -> list[Tensor]:
    query, key, value = tensors
    output = attend(query, key, value, mask, plain)
    gradients = torch.autograd.grad(output, tensors, upstream.to(output.dtype))
    return [output.detach(), *gradients]


def _errors(
    report: Report, case: str, inputs: str, tensors: Inputs, mask: Optional[Tensor]
) -> dict[str, float]:
    """Differences of output and gradients to those of fp32 with the plain kernel."""
    actual = _outcome(_leaves(tensors), mask, tensors[3])
    exact = [x.detach().float().requires_grad_() for x in tensors[:3]]
    expected = _outcome(exact, mask, tensors[3], plain=True)
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


def _by_kernel(tensors: Inputs, mask: Optional[Tensor], kernel: SDPBackend) -> list[Tensor]:
    """Output and gradients by one kernel. Raises RuntimeError where it does not take these."""
    inputs = _leaves(tensors)
    with sdpa_kernel(kernel):
        # Not `attend`, which has kernels of its own.
        query, key, value = (x.transpose(1, 2) for x in inputs)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return [output, *torch.autograd.grad(output, inputs, tensors[3].transpose(1, 2))]


def _is_finite_with_cudnn(tensors: Inputs, mask: Tensor) -> Optional[bool]:
    try:
        found = _by_kernel(tensors, mask, SDPBackend.CUDNN_ATTENTION)
    except RuntimeError:
        return None
    return all(bool(torch.isfinite(x).all()) for x in found)


def _times(report: Report, tensors: Inputs, mask: Optional[Tensor]) -> dict[str, Optional[float]]:
    """Milliseconds of forward and backward as the model calls it and by each kernel; None where it does not take
    these."""
    upstream, repetitions = tensors[3], report.size(10, 1)
    inputs = _leaves(tensors)
    work = lambda: _outcome(inputs, mask, upstream)  # noqa: E731
    taken: dict[str, Optional[float]] = {"model": milliseconds(work, repetitions, 1)}
    for name in KERNELS if report.on_gpu else ():
        kernel = getattr(SDPBackend, name)
        try:
            taken[name] = milliseconds(
                lambda kernel=kernel: _by_kernel(tensors, mask, kernel), repetitions, 1
            )
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
    expected = _outcome(_leaves(tensors), mask, upstream * seen[..., None, None])
    places = seen.flatten()
    off = max(difference(a[places], b.flatten(0, 1)[places]) for a, b in zip(actual, expected))
    report.expect(off < TOLERANCE, f"{case}: varlen_attn is off by {off:.3g}")
    return {"varlen_off_by": off, "varlen_ms": milliseconds(work, 10, 1)}


def _stream(report: Report) -> dict[str, Any]:
    """The model's attention over a micro-batch of base, by masks and by sequences; with texts of several documents."""
    layout = StreamLayout(64, 64, 64, text_length=128, pair_text_length=128, image_length=197)
    generator = torch.Generator().manual_seed(3)
    shape = (layout.num_tokens, 1, 12, 64)
    query, key, value, upstream = (
        torch.randn(shape, generator=generator).to(report.device, torch.bfloat16) for _ in range(4)
    )
    lengths = torch.randint(8, 129, (64,), generator=generator).to(report.device)
    captions = (torch.arange(128, device=report.device) < lengths.unsqueeze(1)).flatten()
    rest = captions.new_ones(layout.size("texts")), captions.new_ones(2 * 64 * 197)
    seen = torch.cat([rest[0], captions, rest[1]])
    starts = torch.rand(64, 128, generator=generator) < 0.02
    numbers = (starts.cumsum(dim=1) - starts[:, :1].long()).to(report.device)
    config = TransformerConfig(num_layers=1, hidden_size=768, num_attention_heads=12)
    found: dict[str, Any] = {}
    for name, documents in (("whole texts", None), ("documents", numbers)):
        count = 0 if documents is None else int((documents[:, -1] + 1).sum())
        outcomes: dict[str, list[Tensor]] = {}
        times: dict[str, float] = {}
        for backend in ("sdpa", "varlen"):
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            stream = StreamBatch(
                layout,
                pair_lengths=lengths,
                text_documents=documents,
                document_count=count,
            )
            attention = StreamAttention(config, 1, backend)
            wanted = upstream.flatten(2) * seen[:, None, None]

            def work(
                attention: StreamAttention = attention,
                leaves: list[Tensor] = leaves,
                stream: StreamBatch = stream,
                wanted: Tensor = wanted,
            ) -> list[Tensor]:
                output = attention(*leaves, stream)
                return [output.detach()[seen], *torch.autograd.grad(output, leaves, wanted)]

            outcomes[backend] = work()
            times[f"{backend}_ms"] = milliseconds(work, 10, 2)
        off = max(map(difference, outcomes["varlen"], outcomes["sdpa"]))
        report.expect(off < TOLERANCE, f"{name}: sequences are off by {off:.3g} from masks")
        found[name] = {"off_by": off, **times}
    return found
