"""Published BEiT v2 checkpoints, by generated files with their parameter names and shapes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_vlmoe.tokenizers.image import ImageTokenizer, load_official
from megatron_vlmoe.tokenizers.vqkd.model import save_vqkd


def vit_shapes(prefix: str, width: int, depth: int, chans: int, patch: int, tokens: int) -> dict:
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.cls_token": (1, 1, width),
        f"{prefix}.pos_embed": (1, tokens + 1, width),
        f"{prefix}.patch_embed.proj.weight": (width, chans, patch, patch),
        f"{prefix}.patch_embed.proj.bias": (width,),
        f"{prefix}.fc_norm.weight": (width,),
        f"{prefix}.fc_norm.bias": (width,),
    }
    for i in range(depth):
        block = f"{prefix}.blocks.{i}"
        shapes |= {
            f"{block}.norm1.weight": (width,),
            f"{block}.norm1.bias": (width,),
            f"{block}.attn.q_bias": (width,),
            f"{block}.attn.v_bias": (width,),
            f"{block}.attn.qkv.weight": (3 * width, width),
            f"{block}.attn.proj.weight": (width, width),
            f"{block}.attn.proj.bias": (width,),
            f"{block}.norm2.weight": (width,),
            f"{block}.norm2.bias": (width,),
            f"{block}.mlp.fc1.weight": (4 * width, width),
            f"{block}.mlp.fc1.bias": (4 * width,),
            f"{block}.mlp.fc2.weight": (width, 4 * width),
            f"{block}.mlp.fc2.bias": (width,),
        }
    return shapes


def published_shapes(
    *,
    width: int,
    depth: int,
    decoder_depth: int,
    grid: int,
    patch: int,
    codes: int,
    dim: int,
    features: int,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a `vqkd_encoder_*_decoder_*_clip` state dict."""
    shapes = vit_shapes("encoder", width, depth, 3, patch, grid**2)
    shapes |= vit_shapes("decoder", width, decoder_depth, dim, 1, grid**2)
    for layer, out in (("encode_task_layer", dim), ("decode_task_layer", features)):
        shapes |= {
            f"{layer}.0.weight": (width, width),
            f"{layer}.0.bias": (width,),
            f"{layer}.2.weight": (out, width),
            f"{layer}.2.bias": (out,),
        }
    return shapes | {
        "quantize.cluster_size": (codes,),
        "quantize.embedding.weight": (codes, dim),
        "quantize.embedding.cluster_size": (codes,),
        "quantize.embedding.embed_avg": (codes, dim),
        "quantize.embedding.initted": (1,),
        "scaling_layer.shift": (1, 3, 1, 1),
        "scaling_layer.scale": (1, 3, 1, 1),
        "teacher_model.visual.proj": (width, features),
    }


SMALL = {
    "width": 128, "depth": 2, "decoder_depth": 1, "grid": 3, "patch": 4, "codes": 20, "dim": 8,
    "features": 10,
}  # fmt: skip
LEFT = (
    "quantize.embedding.cluster_size",
    "quantize.embedding.embed_avg",
    "quantize.embedding.initted",
    "scaling_layer.scale",
    "scaling_layer.shift",
    "teacher_model.visual.proj",
)


def small_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = {
        name: 0.2 * torch.randn(shape, generator=generator)
        for name, shape in published_shapes(**SMALL).items()
    }
    weights["encoder.patch_embed.proj.weight"] *= 10  # so that codes follow the image
    weights["quantize.embedding.weight"] = F.normalize(weights["quantize.embedding.weight"], dim=1)
    return weights


def write(path: Path, weights: dict[str, Tensor], **arguments: object) -> Path:
    torch.save({"model": weights, "args": argparse.Namespace(**arguments), "epoch": 99}, path)
    return path


def reference_codes(w: dict[str, Tensor], pixels: Tensor, norm: str = "fc_norm") -> Tensor:
    """The published encoder in plain formulas; heads of 64 dimensions."""
    width = w["encoder.cls_token"].shape[-1]
    patch = w["encoder.patch_embed.proj.weight"].shape[-1]
    x = F.conv2d(
        pixels * 255 / 127.5 - 1, w["encoder.patch_embed.proj.weight"],
        w["encoder.patch_embed.proj.bias"], stride=patch,
    ).flatten(2).mT  # fmt: skip
    x = torch.cat([w["encoder.cls_token"].expand(len(x), 1, width), x], 1) + w["encoder.pos_embed"]

    def layer_norm(name: str, values: Tensor) -> Tensor:
        return F.layer_norm(values, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    depth = sum(name.startswith("encoder.") and "qkv" in name for name in w)
    for i in range(depth):
        block = f"encoder.blocks.{i}"
        q, k, v = (layer_norm(f"{block}.norm1", x) @ w[f"{block}.attn.qkv.weight"].T).chunk(3, -1)
        q, v = q + w[f"{block}.attn.q_bias"], v + w[f"{block}.attn.v_bias"]
        heads = []
        for h in range(width // 64):
            cut = slice(64 * h, 64 * h + 64)
            scores = q[..., cut] @ k[..., cut].mT / math.sqrt(64)
            heads.append(scores.softmax(-1) @ v[..., cut])
        x = x + linear(f"{block}.attn.proj", torch.cat(heads, -1))
        inner = linear(f"{block}.mlp.fc1", layer_norm(f"{block}.norm2", x))
        x = x + linear(f"{block}.mlp.fc2", F.gelu(inner))
    z = layer_norm(f"encoder.{norm}", x)[:, 1:]
    z = linear("encode_task_layer.2", linear("encode_task_layer.0", z).tanh())
    distance = (
        (F.normalize(z, dim=-1)[:, :, None] - w["quantize.embedding.weight"]).square().sum(-1)
    )
    return distance.argmin(-1)


@pytest.fixture
def pixels() -> Tensor:
    return torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def test_codes_equal_the_published_formulas(tmp_path: Path, pixels: Tensor) -> None:
    weights = small_weights()
    tokenizer = ImageTokenizer.from_pretrained(write(tmp_path / "vqkd.pth", weights))
    expected = reference_codes(weights, pixels)
    assert expected.unique().numel() > 4
    assert torch.equal(tokenizer.encode(pixels), expected)
    assert (tokenizer.image_size, tokenizer.patch_size, tokenizer.num_codes) == (12, 4, 20)
    report = tokenizer.import_report
    assert report is not None and report.left == LEFT
    assert set(report.taken) == set(weights) - set(LEFT)
    assert "took 61 tensors" in report.summary() and "scaling_layer.scale" in report.summary()


def test_the_other_name_of_the_final_norm(tmp_path: Path, pixels: Tensor) -> None:
    weights = {k.replace("encoder.fc_norm", "encoder.norm"): v for k, v in small_weights().items()}
    tokenizer = ImageTokenizer.from_pretrained(write(tmp_path / "vqkd.pth", weights))
    assert torch.equal(tokenizer.encode(pixels), reference_codes(weights, pixels, "norm"))


def test_imagenet_normalisation_is_taken_from_the_arguments(tmp_path: Path, pixels: Tensor) -> None:
    weights = small_weights()
    path = write(tmp_path / "vqkd.pth", weights, process_type="imagenet_norm")
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    # The reference maps x to 2x - 1; give it the x that lands on the normalised value.
    expected = reference_codes(weights, ((pixels - mean) / std + 1) / 2)
    assert torch.equal(ImageTokenizer.from_pretrained(path).encode(pixels), expected)
    with pytest.raises(ValueError, match="unknown process_type 'dall-e'"):
        load_official(write(tmp_path / "other.pth", weights, process_type="dall-e"))


def test_saved_as_a_folder_it_is_the_same_tokenizer(tmp_path: Path, pixels: Tensor) -> None:
    path = write(tmp_path / "vqkd.pth", small_weights())
    model, _ = load_official(path)
    assert model.decoder is not None and model.config.teacher_dim == 10
    save_vqkd(tmp_path / "folder", model, training={})
    folder = ImageTokenizer.from_pretrained(tmp_path / "folder")
    official = ImageTokenizer.from_pretrained(path)
    assert folder.fingerprint == official.fingerprint
    assert torch.equal(folder.encode(pixels), official.encode(pixels))


def test_encoder_alone_is_enough(tmp_path: Path, pixels: Tensor) -> None:
    weights = {
        name: value
        for name, value in small_weights().items()
        if not name.startswith(("decode", "teacher", "scaling")) and "cluster_size" not in name
    }
    tokenizer = ImageTokenizer.from_pretrained(write(tmp_path / "vqkd.pth", weights))
    assert torch.equal(tokenizer.encode(pixels), reference_codes(weights, pixels))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.blocks.1.attn.v_bias": None}, "missing encoder.blocks.1.attn.v_bias"),
        ({"encoder.fc_norm.weight": None}, "missing encoder.fc_norm.weight"),
        ({"quantize.embedding.weight": None}, "no tensor 'quantize.embedding.weight'"),
        (
            {"encode_task_layer.2.weight": (7, 128)},
            r"encode_task_layer.2.weight has shape \[7, 128\], expected \[8, 128\]",
        ),
        ({"encoder.pos_embed": (1, 9, 128)}, "8 patches: not a square"),
        ({"decoder.blocks.0.mlp.fc2.bias": None}, "missing decoder.blocks.0.mlp.fc2.bias"),
        ({"quantize.embedding.weight": (20, 8)}, "rows that are not of unit length"),
    ],
)
def test_missing_or_misshapen_tensors_give_one_line(
    tmp_path: Path, change: dict[str, tuple[int, ...] | None], message: str
) -> None:
    weights = small_weights()
    for name, shape in change.items():
        del weights[name]
        if shape is not None:
            weights[name] = torch.ones(shape)
    path = write(tmp_path / "vqkd.pth", weights)
    with pytest.raises(ValueError, match=message) as caught:
        ImageTokenizer.from_pretrained(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


class Payload:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit('code from a checkpoint was run')",))


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    text, evil, listing = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    text.write_text("hello")
    torch.save({"model": Payload()}, evil)
    torch.save([1, 2], listing)
    cut = write(tmp_path / "cut.pth", small_weights())
    cut.write_bytes(cut.read_bytes()[:5000])
    for path in (text, evil, listing, cut):
        with pytest.raises(ValueError, match=path.name) as caught:
            ImageTokenizer.from_pretrained(path)
        assert "\n" not in str(caught.value)
        # No advice of torch to read it unchecked.
        assert "weights_only" not in str(caught.value) and "Weights only" not in str(caught.value)


def test_published_base_shapes_are_taken_whole(tmp_path: Path) -> None:
    """The three-layer-decoder CLIP model, every tensor at its real shape (a stride-0 zero)."""
    shapes = published_shapes(
        width=768, depth=12, decoder_depth=3, grid=14, patch=16, codes=8192, dim=32, features=512
    )
    weights = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    unit = torch.zeros(8192, 32)
    unit[:, 0] = 1.0
    path = write(tmp_path / "base.pth", weights | {"quantize.embedding.weight": unit})
    model, report = load_official(path)
    config = model.config
    assert (config.image_size, config.depth, config.num_heads, config.decoder_depth) == (
        224, 12, 12, 3,
    )  # fmt: skip
    assert (config.num_codes, config.code_dim, config.teacher_dim) == (8192, 32, 512)
    assert report.left == LEFT
    taken = sum(math.prod(shapes[name]) for name in report.taken)
    assert taken == sum(v.numel() for k, v in model.state_dict().items() if "updates" not in k)
