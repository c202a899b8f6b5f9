"""The VQ-KD model (BEiT v2, arXiv 2208.06366, section 2.1) and its folder on disk.

A folder holds `config.json` (format version, architecture, how it was trained) and
`model.safetensors` (encoder, quantiser and, where there is one, decoder). Encoder and decoder are plain pre-norm
vision transformers.

The quantiser is a codebook on the unit sphere, learned by moving averages: the formulas of section 2.1 and the EMA
quantiser of BEiT v2's repository.

Letters: N images, C input channels or code dimensions, S input side, P patch side, L = (S/P)^2 patches, D width,
H heads; T vectors to quantise, K codes.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.runtime.files import write_bytes_atomic, write_text_atomic
from megatron_vlmoe.runtime.json_files import is_version, parse_json
from megatron_vlmoe.tokenizers.vqkd.config import FORMAT_VERSION, VQKDConfig

KMEANS_ITERATIONS = 10
# Rows per block of the [T, K] similarity matrix: 8192 codes x 8192 rows of fp32 are 256 MiB.
SEARCH_ROWS = 8192


class Quantized(NamedTuple):
    """Result of one quantisation of `[..., C]` vectors."""

    vectors: Tensor
    """`[..., C]` codes of unit length, with the gradient passed straight to the input."""
    codes: Tensor
    """`[...]` int64 code numbers."""
    commitment: Tensor
    """beta * mean((code - z)^2) over all elements, a scalar."""


def nearest_codes(unit_TC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Number `[T]` of the code with the largest cosine; ties go to the lower number."""
    blocks = [torch.argmax(rows @ codebook_KC.t(), dim=1) for rows in unit_TC.split(SEARCH_ROWS)]
    return torch.cat(blocks) if blocks else unit_TC.new_zeros(0, dtype=torch.int64)


def sum_by_code(unit_TC: Tensor, codes_T: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Counts `[K]` and sums `[K, C]` of the vectors of each code, as fp32."""
    counts = torch.bincount(codes_T, minlength=num_codes).to(unit_TC.dtype)
    sums = unit_TC.new_zeros(num_codes, unit_TC.shape[1]).index_add_(0, codes_T, unit_TC)
    return counts, sums


def draw_far_vectors(
    unit_TC: Tensor, distance_T: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """Draws `[count, C]` vectors one after another, each in proportion to its distance from what is there (k-means++).

    Most patches of a picture are alike; drawn evenly, nearly all codes would be placed on those.

    Args:
        distance_T: 1 - cosine of every vector to the nearest centre that is already there.
        generator: a CPU generator.
    """
    drawn = unit_TC.new_zeros(count, unit_TC.shape[1])
    for number in range(count):
        # Vectors that have a centre at their very place are drawn only where all have one.
        weights = distance_T.double().clamp(min=1e-12).cpu()
        place = torch.searchsorted(
            weights.cumsum(0), weights.sum() * torch.rand(1, generator=generator).double()
        )
        drawn[number] = unit_TC[int(place.clamp(max=len(unit_TC) - 1))]
        distance_T = torch.minimum(distance_T, 1.0 - unit_TC @ drawn[number])
    return drawn


def spherical_kmeans(
    unit_TC: Tensor, num_codes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cosine k-means: centres `[K, C]` (unit length), counts `[K]`.

    It starts from vectors that are far from each other (`draw_far_vectors`); an empty cluster keeps its centre.
    """
    everywhere = unit_TC.new_ones(unit_TC.shape[0])
    centres = draw_far_vectors(unit_TC, everywhere, num_codes, generator)
    counts = unit_TC.new_zeros(num_codes)
    for _ in range(KMEANS_ITERATIONS):
        counts, sums = sum_by_code(unit_TC, nearest_codes(unit_TC, centres), num_codes)
        centres = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), centres)
    return centres, counts


def is_distributed() -> bool:
    """Whether statistics have to be shared with other processes."""
    return distributed.is_available() and distributed.is_initialized()


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Rows of all ranks in rank order; every rank must hold the same number."""
    if not is_distributed():
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class Quantizer(nn.Module):
    """Nearest code by cosine with a straight-through gradient; the codebook is not trained by SGD.

    In training mode each call moves the codebook: the codes' batch means (over all ranks) are
    l2-normalised, averaged into the codebook with `decay` and normalised again; codes without a
    vector keep their place. The first training call places the codes by spherical k-means. With
    `restart_threshold` > 0, codes whose average use falls below that share of T/K are moved onto
    vectors of the batch that are far from all codes.
    """

    codebook: Tensor
    usage: Tensor
    updates: Tensor

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment: float = 1.0,
        decay: float = 0.99,
        restart_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        self.commitment = commitment
        self.decay = decay
        self.restart_threshold = restart_threshold
        self.register_buffer("codebook", torch.zeros(num_codes, code_dim))
        # Moving average of the vectors that a code receives per training batch.
        self.register_buffer("usage", torch.zeros(num_codes))
        # Training calls so far, the k-means placement counted as the first.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @property
    def num_codes(self) -> int:
        """Codebook entries K."""
        return self.codebook.shape[0]

    def forward(self, z: Tensor) -> Quantized:
        """Quantise `[..., C]` (any length; normalised here). Computed in fp32."""
        unit = F.normalize(z.float(), dim=-1)
        rows = unit.detach().reshape(-1, unit.shape[-1])
        if self.training:
            self.initialize(rows)
        codes = nearest_codes(rows, self.codebook)
        vectors = self.codebook[codes].view_as(unit)
        if self.training:
            self.update(rows, codes)
        loss = self.commitment * F.mse_loss(unit, vectors)
        straight_through = unit + (vectors - unit).detach()
        return Quantized(straight_through, codes.view(unit.shape[:-1]), loss)

    @torch.no_grad()
    def initialize(self, unit_TC: Tensor) -> None:
        """Place the codes by k-means over the vectors of all ranks; later calls do nothing."""
        if self.updates > 0:
            return
        centres, counts = spherical_kmeans(
            rows_of_all_ranks(unit_TC), self.num_codes, self._generator()
        )
        if is_distributed():  # all ranks computed the same; this makes it bit-equal
            distributed.broadcast(centres, 0)
            distributed.broadcast(counts, 0)
        self.codebook.copy_(centres)
        self.usage.copy_(counts)
        self.updates += 1

    @torch.no_grad()
    def update(self, unit_TC: Tensor, codes_T: Tensor) -> None:
        """One moving-average step of codebook and usage from the vectors of all ranks."""
        counts, sums = sum_by_code(unit_TC, codes_T, self.num_codes)
        if is_distributed():
            distributed.all_reduce(counts)
            distributed.all_reduce(sums)
        means = torch.where(counts[:, None] > 0, F.normalize(sums, dim=1), self.codebook)
        self.codebook.lerp_(means, 1.0 - self.decay)
        self.codebook.copy_(F.normalize(self.codebook, dim=1))
        self.usage.lerp_(counts, 1.0 - self.decay)
        if self.restart_threshold > 0:
            uniform_share = counts.sum() / self.num_codes
            dead = torch.nonzero(self.usage < self.restart_threshold * uniform_share).flatten()
            if count := dead.numel():
                vectors = rows_of_all_ranks(unit_TC)
                far = 1.0 - (vectors @ self.codebook.t()).amax(dim=1)
                self.codebook[dead] = draw_far_vectors(vectors, far, count, self._generator())
                # A moved code starts as an average one: it has time to find vectors before it is judged.
                self.usage[dead] = uniform_share
        self.updates += 1

    def _generator(self) -> torch.Generator:
        """Equal on every rank and after a resume: seeded by the number of the training call."""
        return torch.Generator().manual_seed(1 + int(self.updates))


LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention; q and v have biases, k has none (its gradient would be zero)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        batch, length, width = x_NLD.shape
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x_NLD, self.qkv.weight, bias)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """x + attention(LN(x)), then x + fc2(gelu(fc1(LN(x)))); no LayerScale, no dropout."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attn = Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        hidden = int(width * mlp_ratio)
        layers = {"fc1": nn.Linear(width, hidden), "gelu": nn.GELU()}
        self.mlp = nn.Sequential(OrderedDict(layers, fc2=nn.Linear(hidden, width)))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, L, D]` -> `[N, L, D]`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nn.Module):
    """Linear map of non-overlapping patches, written as a convolution with stride P."""

    def __init__(self, patch_size: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_NCSS: Tensor) -> Tensor:
        """`[N, C, S, S]` -> `[N, L, D]`, row-major."""
        return self.proj(x_NCSS).flatten(2).transpose(1, 2)


class PatchTransformer(nn.Module):
    """ViT with a cls token and learned absolute positions that returns its patch tokens.

    The encoder reads pixels with P = the patch size; the decoder reads the `[N, code_dim, S/P,
    S/P]` code map with P = 1.
    """

    def __init__(
        self, config: VQKDConfig, *, image_size: int, patch_size: int, in_channels: int, depth: int
    ) -> None:
        super().__init__()
        width, num_patches = config.width, (image_size // patch_size) ** 2
        self.patch_embed = PatchEmbedding(patch_size, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + 1, width))
        self.blocks = nn.ModuleList(
            Block(width, config.num_heads, config.mlp_ratio) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        # BEiT's initialisation: normal 0.02, then the output projections of block l / sqrt(2l).
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.02)
        self.apply(initialize_linear)
        for number, block in enumerate(self.blocks, start=1):
            assert isinstance(block, Block)
            with torch.no_grad():
                block.attn.proj.weight.div_(math.sqrt(2.0 * number))
                block.mlp.get_parameter("fc2.weight").div_(math.sqrt(2.0 * number))

    def forward(self, x_NCSS: Tensor) -> Tensor:
        """`[N, C, S, S]` -> layer-normalised patch tokens `[N, L, D]`, row-major."""
        x = self.patch_embed(x_NCSS)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 1:])


def initialize_linear(module: nn.Module) -> None:
    """Normal(0, 0.02) weights and zero biases for a Linear; anything else is left alone."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# What torch's unpickler raises for bytes that are cut off or were never a checkpoint.
UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, AttributeError, TypeError),
    AssertionError,  # for a tensor's storage that is called by no name
    MemoryError,  # for the length of a text, which the file says
)


def read_torch_file(path: Path, device: torch.device | str, allowed: Sequence[type] = ()) -> Any:
    """`torch.load` that builds tensors and plain containers only, and the `allowed` classes.

    Raises ValueError (one line) naming the path if it is missing, damaged or holds anything else.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location=device, weights_only=True)
    except UNREADABLE as error:
        # Of what the unpickler refuses torch says how to read it without that check, which is no advice for users.
        reason = "it is no file of torch.save, damaged, or holds more than tensors"
        if isinstance(error, RuntimeError | OSError):
            reason = str(error).strip().partition("\n")[0] or reason
        raise DataError(f"{path}: cannot be read as a checkpoint: {reason}") from error


CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
# Fields of the config that change the codes of an image; the others only matter in training.
INFERENCE_FIELDS = (
    *("image_size", "patch_size", "width", "depth", "num_heads", "mlp_ratio"),
    *("num_codes", "code_dim", "pixel_mean", "pixel_std"),
)
INFERENCE_WEIGHTS = ("encoder.", "code_head.", "quantizer.codebook")


class VQKDLosses(NamedTuple):
    """Losses of one batch (scalars) and its codes `[N, L]`."""

    total: Tensor
    """cosine + commitment."""
    cosine: Tensor
    """mean(1 - cos(prediction, target)) over patches."""
    commitment: Tensor
    """Pull of the encoder's vectors to their codes; 0 without quantisation."""
    codes: Tensor | None
    """int64, row-major; None without quantisation."""


class VQKD(nn.Module):
    """Encoder -> quantiser -> decoder; the decoder regresses a teacher's patch features.

    Letters: N images, S side in pixels, L patches, D width, C code dimensions.
    """

    def __init__(self, config: VQKDConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = PatchTransformer(
            config,
            image_size=config.image_size,
            patch_size=config.patch_size,
            in_channels=3,
            depth=config.depth,
        )
        self.code_head = tanh_head(config.width, config.code_dim)
        self.quantizer = Quantizer(
            config.num_codes,
            config.code_dim,
            commitment=config.commitment,
            decay=config.ema_decay,
            restart_threshold=config.restart_threshold,
        )
        self.decoder: PatchTransformer | None = None
        self.feature_head: nn.Sequential | None = None
        if config.decoder_depth > 0:
            self.decoder = PatchTransformer(
                config,
                image_size=config.grid,
                patch_size=1,
                in_channels=config.code_dim,
                depth=config.decoder_depth,
            )
            self.feature_head = tanh_head(config.width, config.teacher_dim)
        self.register_buffer("pixel_mean", pixel_constant(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", pixel_constant(config.pixel_std), persistent=False)

    pixel_mean: Tensor
    pixel_std: Tensor

    def project(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in [0, 1] -> vectors `[N, L, C]` before normalisation, fp32."""
        features = self.encoder((pixels - self.pixel_mean) / self.pixel_std)
        with torch.autocast(features.device.type, enabled=False):
            return self.code_head(features.float())

    def quantize(self, vectors: Tensor) -> Quantized:
        """Quantise `[N, L, C]` in fp32, also under autocast."""
        with torch.autocast(vectors.device.type, enabled=False):
            return self.quantizer(vectors)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels `[N, 3, S, S]` in [0, 1] -> codes `[N, L]` int64, row-major."""
        return self.quantize(self.project(pixels)).codes

    def decode(self, vectors: Tensor) -> Tensor:
        """Code vectors `[N, L, C]` -> predicted features `[N, L, teacher_dim]`."""
        if self.decoder is None or self.feature_head is None:
            raise ValueError("this image tokenizer was built without a decoder")
        grid = self.config.grid
        code_map = vectors.transpose(1, 2).reshape(-1, self.config.code_dim, grid, grid)
        return self.feature_head(self.decoder(code_map.contiguous()))

    def forward(self, pixels: Tensor, target: Tensor, quantize: bool = True) -> VQKDLosses:
        """Losses for pixels `[N, 3, S, S]` in [0, 1] and features `[N, L, teacher_dim]`.

        Without `quantize` the decoder gets the encoder's own vectors, at unit length.
        """
        vectors, commitment, codes = self.project(pixels), target.new_zeros(()), None
        if quantize:
            vectors, codes, commitment = self.quantize(vectors)
        else:
            vectors = F.normalize(vectors, dim=-1)
        prediction = self.decode(vectors)
        cosine = 1.0 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()
        return VQKDLosses(cosine + commitment, cosine, commitment, codes)


def tanh_head(width: int, out_features: int) -> nn.Sequential:
    """Linear D -> D, tanh, Linear D -> out."""
    head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out_features))
    return head.apply(initialize_linear)


def pixel_constant(values: Sequence[float]) -> Tensor:
    """Per-channel constant, shaped `[1, 3, 1, 1]`."""
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1)


def compute_fingerprint(model: VQKD) -> str:
    """sha256 (hex) over the config fields and weights that decide an image's codes.

    Equal for the same function wherever it was loaded from and whatever device it is on.
    """
    fields = {name: model.config.to_dict()[name] for name in INFERENCE_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(INFERENCE_WEIGHTS):
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(name.encode() + struct.pack(f"<{values.dim()}q", *values.shape))
            digest.update(values.numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def save_vqkd(folder: Path, model: VQKD, training: dict[str, Any]) -> None:
    """Write `model.safetensors`, then `config.json`, each under a temporary name first.

    `training` is kept in the config for the reader's information only.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_bytes_atomic(folder / WEIGHTS_FILE, save(weights))
    config = {
        "format_version": FORMAT_VERSION,
        "kind": "vqkd",
        "model": model.config.to_dict(),
        "fingerprint": compute_fingerprint(model),
        "training": training,
    }
    write_text_atomic(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def load_vqkd(folder: Path) -> VQKD:
    """Build the saved model, in fp32 on the CPU.

    Raises ValueError (one line) for a folder without a tokenizer, another format, a truncated file, tensors
    that do not fit the config, or one whose training has not come to its codes.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {CONFIG_FILE}: not an image tokenizer folder")
    try:
        content = parse_json(path.read_bytes())
        kind, version = content.get("kind"), content.get("format_version")
        if kind != "vqkd" or not is_version(version) or version != FORMAT_VERSION:
            raise ValueError(f"kind {kind!r} version {version!r}, expected vqkd {FORMAT_VERSION}")
        config = VQKDConfig.from_dict(content["model"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not an image tokenizer config: {error}") from error
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise DataError(f"{folder}: no {WEIGHTS_FILE}: the image tokenizer is incomplete")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    with torch.device("meta"):  # whatever sizes the config says, they take no memory yet
        expected = VQKD(config).state_dict()
    problems = describe_mismatch(weights, expected)
    if problems:
        raise DataError(f"{path}: does not fit {CONFIG_FILE}: {problems}")
    model = build_model(config)
    model.load_state_dict(weights)
    if not model.quantizer.codebook.any():
        raise DataError(f"{folder}: its codes are not placed yet: finish its training first")
    return model


def noted_fingerprint(folder: Path, default: str) -> str:
    """The fingerprint that was noted when a tokenizer was saved; `default` where none was."""
    return str(json.loads((folder / CONFIG_FILE).read_bytes()).get("fingerprint", default))


def build_model(config: VQKDConfig, seed: int | None = None) -> VQKD:
    """A model whose initial weights depend on the seed only.

    Without a seed its weights are about to be loaded, and it draws nothing that the caller could notice.
    """
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)  # also of every GPU
        return VQKD(config)


def describe_mismatch(given: dict[str, Tensor], expected: dict[str, Tensor], limit: int = 4) -> str:
    """Missing, unexpected and wrongly shaped tensors in one line; empty if there are none."""
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in expected]
    problems += [
        f"{name} has shape {list(given[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in given and given[name].shape != tensor.shape
    ]
    rest = f" and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + rest
