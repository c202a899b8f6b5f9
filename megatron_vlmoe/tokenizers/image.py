"""The image tokenizer as pretraining sees it: frozen, pixels in, visual codes out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.tokenizers.vqkd.model import VQKD, compute_fingerprint, load_vqkd
from megatron_vlmoe.tokenizers.vqkd.official import ImportReport, load_official


class ImageTokenizer:
    """A frozen VQ-KD encoder and codebook.

    The codes of an image do not depend on the images beside it in a batch (up to the rounding of
    the device's matrix products, which can decide only between codes that are equally near).
    """

    def __init__(
        self, model: VQKD, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the image tokenizer runs in float32 or bfloat16, not {dtype}")
        self.fingerprint: str = compute_fingerprint(model)
        """sha256 (hex) of all that decides an image's codes."""
        self.device = torch.device(device)
        self.dtype = dtype
        self.import_report: ImportReport | None = None
        """For a published checkpoint: which of its tensors were taken and which left."""
        model.decoder = None
        model.feature_head = None
        self.model = model.requires_grad_(False).eval().to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ImageTokenizer:
        """Load a folder made by `tools/train_image_tokenizer.py` or a published BEiT v2 `.pth`.

        Weights stay in fp32; with `dtype` bfloat16 the encoder runs under autocast, the code
        projection and the search in fp32. Raises ValueError (one line) naming the path.
        """
        path = Path(path)
        if path.is_dir():
            return cls(load_vqkd(path), device=device, dtype=dtype)
        if not path.is_file():
            raise DataError(f"{path}: no such image tokenizer folder or file")
        model, report = load_official(path)
        tokenizer = cls(model, device=device, dtype=dtype)
        tokenizer.import_report = report
        return tokenizer

    def to(self, device: torch.device | str) -> None:
        """Moves it."""
        self.device = torch.device(device)
        self.model.to(self.device)

    @property
    def image_size(self) -> int:
        """Side S of the square input in pixels."""
        return self.model.config.image_size

    @property
    def patch_size(self) -> int:
        """Side P of a patch in pixels."""
        return self.model.config.patch_size

    @property
    def grid(self) -> int:
        """Patches per side, S / P; an image has grid^2 codes."""
        return self.model.config.grid

    @property
    def num_codes(self) -> int:
        """Size of the visual vocabulary."""
        return self.model.config.num_codes

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """RGB `[N, 3, S, S]` float in [0, 1] -> codes `[N, (S/P)^2]` int64, row-major.

        Raises ValueError for another shape or an integer type.
        """
        expected = (3, self.image_size, self.image_size)
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != expected:
            raise ValueError(f"expected pixels [N, {expected}], got {list(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"expected float pixels in [0, 1], got {pixels.dtype}")
        pixels = pixels.to(self.device, torch.float32)
        reduced = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=reduced):
            return self.model.encode(pixels)
