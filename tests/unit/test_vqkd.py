"""The VQ-KD image tokenizer: quantiser, transformer, teachers, files, trainer."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.tokenizers.image import ImageTokenizer
from megatron_vlmoe.tokenizers.vqkd.config import VQKDConfig, build_preset
from megatron_vlmoe.tokenizers.vqkd.model import (
    VQKD,
    Attention,
    PatchEmbedding,
    Quantizer,
    compute_fingerprint,
    draw_far_vectors,
    load_vqkd,
    nearest_codes,
    read_torch_file,
    save_vqkd,
    spherical_kmeans,
)
from megatron_vlmoe.tokenizers.vqkd.training import (
    CodeStatistics,
    PixelTeacher,
    Trainer,
    TrainingOptions,
    build_model,
    build_optimizer,
    build_teacher,
    learning_rate,
)

CPU = torch.device("cpu")


def small_config(**overrides: object) -> VQKDConfig:
    values = {"image_size": 16, "patch_size": 4, "width": 16, "num_heads": 2, "num_codes": 12}
    return build_preset("tiny", **{**values, "depth": 2, "code_dim": 4, **overrides})


def placed_model(seed: int = 0, **overrides: object) -> VQKD:
    """A model with a random codebook and layers large enough that codes depend on the image."""
    model = build_model(small_config(**overrides), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        codebook = torch.randn(model.quantizer.codebook.shape, generator=generator)
        model.quantizer.codebook.copy_(F.normalize(codebook, dim=1))
        model.quantizer.updates.fill_(1)
    return model


def random_pixels(count: int, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class TestQuantizer:
    def quantizer(self, codebook: list[list[float]], **options: float) -> Quantizer:
        quantizer = Quantizer(len(codebook), len(codebook[0]), **options)
        quantizer.codebook.copy_(torch.tensor(codebook))
        quantizer.updates.fill_(1)
        return quantizer

    def test_nearest_is_the_largest_cosine_with_ties_to_the_lower_number(self) -> None:
        codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
        vectors = F.normalize(torch.tensor([[2.0, 0.1], [0.1, 9.0], [-3.0, 1.0]]), dim=1)
        assert nearest_codes(vectors, codebook).tolist() == [0, 1, 3]

    def test_many_rows_are_searched_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("megatron_vlmoe.tokenizers.vqkd.model.SEARCH_ROWS", 3)
        vectors = F.normalize(torch.randn(10, 4), dim=1)
        codebook = F.normalize(torch.randn(5, 4), dim=1)
        expected = torch.cdist(vectors.double(), codebook.double()).argmin(dim=1)
        assert torch.equal(nearest_codes(vectors, codebook), expected)

    def test_moving_average_by_hand(self) -> None:
        """Code 0 gets (3, 4)/5 and (0, 1): mean direction (0.6, 1.8)/|.|; code 1 gets none."""
        quantizer = self.quantizer([[0.0, 1.0], [-1.0, 0.0]], decay=0.9).train()
        quantizer(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        norm = math.hypot(0.6, 1.8)
        moved = (0.1 * 0.6 / norm, 0.9 + 0.1 * 1.8 / norm)
        length = math.hypot(*moved)
        expected = torch.tensor([[moved[0] / length, moved[1] / length], [-1.0, 0.0]])
        assert torch.allclose(quantizer.codebook, expected, atol=1e-6)
        assert torch.allclose(quantizer.usage, torch.tensor([0.2, 0.0]))

    def test_evaluation_changes_nothing(self) -> None:
        quantizer = self.quantizer([[0.0, 1.0], [-1.0, 0.0]]).eval()
        before = {name: value.clone() for name, value in quantizer.state_dict().items()}
        quantizer(torch.tensor([[3.0, 4.0]]))
        assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())

    def test_commitment_and_straight_through_gradient(self) -> None:
        """z = (0.6, 0.8) against (0, 1): mean of 0.36 and 0.04 is 0.2; beta doubles it."""
        quantizer = self.quantizer([[0.0, 1.0], [-1.0, 0.0]], commitment=2.0).eval()
        z = torch.tensor([[3.0, 4.0]], requires_grad=True)
        result = quantizer(z)
        assert torch.allclose(result.vectors, torch.tensor([[0.0, 1.0]]))
        assert result.commitment.item() == pytest.approx(0.4)
        (gradient,) = torch.autograd.grad(result.vectors[0, 0], z, retain_graph=True)
        # d(z/|z|)_0 / dz at (3, 4): (1/5) * (1 - 0.36, -0.48)
        assert torch.allclose(gradient, torch.tensor([[0.128, -0.096]]), atol=1e-6)
        (pull,) = torch.autograd.grad(result.commitment, z)
        assert pull[0, 0] > 0 > pull[0, 1]  # descent moves z towards (0, 1)

    def test_kmeans_finds_separated_directions(self) -> None:
        directions = F.normalize(torch.eye(4) + 0.01, dim=1)
        noise = 0.05 * torch.randn(400, 4, generator=torch.Generator().manual_seed(1))
        vectors = F.normalize(directions.repeat(100, 1) + noise, dim=1)
        # Some starts put two centres into one cluster; with 16 centres every direction has one.
        centres, counts = spherical_kmeans(vectors, 16, torch.Generator().manual_seed(0))
        assert torch.allclose(centres.norm(dim=1), torch.ones(16), atol=1e-5)
        assert int(counts.sum()) == 400
        assert ((centres @ directions.t()).max(dim=0).values > 0.98).all()

    def test_codes_are_placed_far_from_each_other(self) -> None:
        """97 equal vectors and three others, as patches of plain ground and three of a shape."""
        vectors = torch.cat([torch.eye(4)[:1].repeat(97, 1), torch.eye(4)[1:]])
        centres, counts = spherical_kmeans(vectors, 4, torch.Generator().manual_seed(0))
        assert sorted(counts.tolist()) == [1, 1, 1, 97]
        assert torch.equal(centres.sum(dim=0), torch.ones(4))

    def test_vectors_are_drawn_in_proportion_to_their_distance(self) -> None:
        vectors, distance = torch.eye(3), torch.tensor([0.0, 0.25, 0.75])
        generator = torch.Generator().manual_seed(0)
        drawn = [draw_far_vectors(vectors, distance, 1, generator)[0] for _ in range(400)]
        shares = torch.stack(drawn).mean(dim=0)
        assert shares[0] == 0.0
        assert shares[2] == pytest.approx(0.75, abs=0.07)
        # Once a vector is drawn, its distance is zero: all three come, the one at no distance last.
        assert torch.equal(
            draw_far_vectors(vectors, distance, 3, generator)[:2].sum(dim=0),
            torch.tensor([0.0, 1.0, 1.0]),
        )

    def test_first_training_batch_places_the_codes_near_its_vectors(self) -> None:
        quantizer = Quantizer(6, 3).train()
        vectors = F.normalize(torch.randn(6, 3), dim=1)
        result = quantizer(vectors)
        # As many vectors as codes: every vector is its own centre.
        assert sorted(result.codes.tolist()) == list(range(6))
        assert result.commitment.item() < 1e-10

    def test_codes_are_placed_once(self) -> None:
        quantizer = Quantizer(2, 2).train()
        quantizer(torch.eye(2))
        placed = quantizer.codebook.clone()
        quantizer(-torch.eye(2))  # a second placement would turn both codes round
        assert (quantizer.codebook * placed).sum(1).min() > 0.99
        assert int(quantizer.updates) == 3  # the placement and two moving-average steps

    def test_dead_codes_restart_on_vectors_of_the_batch(self) -> None:
        codebook = [[0.0, 1.0], [0.0, -1.0]]
        published = self.quantizer(codebook).train()
        restarting = self.quantizer(codebook, restart_threshold=0.5).train()
        batch = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
        for quantizer in (published, restarting):
            quantizer.usage.copy_(torch.tensor([1.0, 0.1]))
            quantizer(batch)
        assert torch.allclose(published.codebook[1], torch.tensor([0.0, -1.0]))
        assert torch.allclose(restarting.codebook[1], torch.full((2,), 0.5**0.5))
        assert restarting.usage[1] == 1.0  # the uniform share: 2 vectors over 2 codes
        assert torch.allclose(restarting.codebook[0], published.codebook[0])


class TestTransformer:
    def test_attention_equals_torch_with_a_zero_key_bias(self) -> None:
        attention = Attention(8, 2)
        reference = nn.MultiheadAttention(8, 2, batch_first=True)
        with torch.no_grad():
            attention.q_bias.normal_()
            attention.v_bias.normal_()
            reference.in_proj_weight.copy_(attention.qkv.weight)
            biases = (attention.q_bias, torch.zeros(8), attention.v_bias)
            reference.in_proj_bias.copy_(torch.cat(biases))
            reference.out_proj.load_state_dict(attention.proj.state_dict())
        x = torch.randn(2, 5, 8)
        expected = reference(x, x, x, need_weights=False)[0]
        assert torch.allclose(attention(x), expected, atol=1e-6)

    def test_layer_norms_have_the_published_epsilon(self) -> None:
        norms = [m for m in build_model(small_config(), 0).modules() if isinstance(m, nn.LayerNorm)]
        assert {norm.eps for norm in norms} == {1e-6} and len(norms) == 2 * 3 + 2

    def test_without_blocks_a_code_tells_of_its_own_patch_alone(self) -> None:
        model = placed_model(depth=0).eval()
        pixels = random_pixels(2)
        changed = pixels.clone()
        changed[:, :, :4, :4] = 1.0 - changed[:, :, :4, :4]
        assert torch.equal(model.project(pixels)[:, 1:], model.project(changed)[:, 1:])
        assert not torch.equal(model.project(pixels)[:, 0], model.project(changed)[:, 0])

    def test_patches_are_row_major(self) -> None:
        embedding = PatchEmbedding(4, 3, 1)
        nn.init.ones_(embedding.proj.weight)
        nn.init.zeros_(embedding.proj.bias)
        image = torch.zeros(1, 3, 8, 8)
        image[:, :, 0:4, 4:8] = 1.0  # first row, second column
        image[:, :, 4:8, 0:4] = 2.0
        assert embedding(image)[0, :, 0].tolist() == [0.0, 48.0, 96.0, 0.0]

    def test_published_base_has_its_parameter_counts(self) -> None:
        with torch.device("meta"):
            model = VQKD(VQKDConfig())
        width, hidden = 768, 3072
        block = 4 * width + 3 * width**2 + 2 * width + width**2 + width
        block += 2 * width * hidden + hidden + width
        ends = width + 197 * width + 2 * width  # cls, positions, final norm
        encoder = 12 * block + ends + 3 * 16**2 * width + width
        decoder = 3 * block + ends + 32 * width + width
        count = {
            name: sum(p.numel() for p in module.parameters())
            for name, module in model.named_children()
        }
        assert count["encoder"] == encoder
        assert count["decoder"] == decoder
        assert count["code_head"] == width**2 + width + width * 32 + 32
        assert count["feature_head"] == width**2 + width + width * 512 + 512
        assert model.quantizer.codebook.shape == (8192, 32)

    def test_output_projections_start_smaller_with_depth(self) -> None:
        model = build_model(small_config(width=64, depth=8), seed=0)
        for number, block in enumerate(model.encoder.blocks, start=1):
            for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
                assert weight.std().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.06)


class TestLosses:
    def test_cosine_loss_and_total(self) -> None:
        model = placed_model().eval()
        pixels, target = random_pixels(2), torch.randn(2, 16, 49)
        losses = model(pixels, target)
        codes = model.encode(pixels)
        prediction = model.decode(model.quantizer.codebook[codes])
        dot = (prediction * target).sum(-1) / (prediction.norm(dim=-1) * target.norm(dim=-1))
        assert losses.cosine.item() == pytest.approx(1 - dot.mean().item(), abs=1e-5)
        assert torch.equal(losses.codes, codes)
        assert losses.total.item() == pytest.approx(
            losses.cosine.item() + losses.commitment.item(), abs=1e-6
        )

    def test_every_parameter_learns(self) -> None:
        model = placed_model().train()
        model(random_pixels(2), torch.randn(2, 16, 49)).total.backward()
        idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert idle == []

    def test_pixel_target_by_hand(self) -> None:
        """A 2x2 patch: channel by channel, rows first, in [-1, 1]; then half of sqrt(12)."""
        image = torch.zeros(1, 3, 2, 4)
        image[0, 0, :, 2:] = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
        target = PixelTeacher(2)(image)
        assert target.shape == (1, 2, 13)
        expected = [-1.0, -0.5, 0.0, 1.0] + 8 * [-1.0] + [0.5 * 12**0.5]
        assert target[0, 1].tolist() == pytest.approx(expected)

    def test_code_statistics(self) -> None:
        statistics = CodeStatistics(8)
        statistics.add(torch.tensor([[0, 1], [2, 3]]))
        statistics.add(torch.tensor([0, 1, 2, 3]))
        values = statistics.values()
        assert values["codebook/usage"] == 0.5
        assert values["codebook/perplexity"] == pytest.approx(4.0)


class TestImageTokenizer:
    def saved(self, folder: Path, **overrides: object) -> Path:
        save_vqkd(folder, placed_model(**overrides), training={})
        return folder

    def test_round_trip_shapes_and_freezing(self, tmp_path: Path) -> None:
        tokenizer = ImageTokenizer.from_pretrained(self.saved(tmp_path / "t"))
        assert (tokenizer.image_size, tokenizer.patch_size, tokenizer.grid) == (16, 4, 4)
        assert tokenizer.num_codes == 12
        codes = tokenizer.encode(random_pixels(3))
        assert codes.shape == (3, 16) and codes.dtype == torch.int64
        assert torch.equal(codes, placed_model().eval().encode(random_pixels(3)))
        assert codes.unique().numel() > 3  # not a constant
        assert not any(p.requires_grad for p in tokenizer.model.parameters())
        assert not tokenizer.model.training and not codes.requires_grad

    def test_codes_can_be_labels_of_a_loss(self, tmp_path: Path) -> None:
        tokenizer = ImageTokenizer.from_pretrained(self.saved(tmp_path / "t"))
        logits = torch.zeros(16, 12, requires_grad=True)
        F.cross_entropy(logits, tokenizer.encode(random_pixels(1))[0]).backward()
        assert logits.grad is not None

    def test_codes_do_not_depend_on_the_batch(self, tmp_path: Path) -> None:
        tokenizer = ImageTokenizer.from_pretrained(self.saved(tmp_path / "t"))
        pixels = random_pixels(9)
        together = tokenizer.encode(pixels)
        alone = torch.cat([tokenizer.encode(image[None]) for image in pixels])
        reversed_batch = tokenizer.encode(pixels.flip(0)).flip(0)
        assert torch.equal(together, alone) and torch.equal(together, reversed_batch)

    def test_bfloat16_agrees_for_nearly_all_patches(self, tmp_path: Path) -> None:
        folder = self.saved(tmp_path / "t")
        exact = ImageTokenizer.from_pretrained(folder)
        reduced = ImageTokenizer.from_pretrained(folder, dtype=torch.bfloat16)
        pixels = random_pixels(16)
        share = (exact.encode(pixels) == reduced.encode(pixels)).float().mean()
        assert share > 0.9
        assert exact.fingerprint == reduced.fingerprint

    def test_fingerprint_covers_what_decides_codes_and_nothing_else(self, tmp_path: Path) -> None:
        model = placed_model()
        first = compute_fingerprint(model)
        assert len(first) == 64
        assert first == compute_fingerprint(placed_model())
        folder = self.saved(tmp_path / "t")
        assert ImageTokenizer.from_pretrained(folder).fingerprint == first
        with torch.no_grad():
            model.feature_head[0].weight.add_(1.0)
            model.quantizer.usage.add_(1.0)
        assert compute_fingerprint(model) == first
        with torch.no_grad():
            model.quantizer.codebook[3].neg_()
        assert compute_fingerprint(model) != first
        other = VQKD(dataclasses.replace(model.config, pixel_mean=(0.4, 0.5, 0.5)))
        other.load_state_dict(placed_model().state_dict())
        assert compute_fingerprint(other) != first

    def test_bad_pixels_are_refused(self, tmp_path: Path) -> None:
        tokenizer = ImageTokenizer.from_pretrained(self.saved(tmp_path / "t"))
        with pytest.raises(ValueError, match=r"expected pixels .*16, 16.* got \[2, 3, 8, 8\]"):
            tokenizer.encode(torch.rand(2, 3, 8, 8))
        with pytest.raises(ValueError, match="uint8"):
            tokenizer.encode(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))

    def test_damaged_folders_give_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="nowhere: no such"):
            ImageTokenizer.from_pretrained(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="not an image tokenizer folder"):
            ImageTokenizer.from_pretrained(tmp_path)
        folder = self.saved(tmp_path / "t")
        weights, config = folder / "model.safetensors", folder / "config.json"
        whole, text = weights.read_bytes(), config.read_text()
        weights.write_bytes(whole[: len(whole) // 2])
        self.refused(folder, "model.safetensors: cannot be read")
        weights.write_bytes(whole)
        config.write_text(text.replace('"num_codes": 12', '"num_codes": 13'))
        self.refused(folder, r"quantizer.codebook has shape \[12, 4\], expected \[13, 4\]")
        config.write_text(text.replace('"num_codes"', '"codes"'))
        self.refused(folder, "config.json: .*unknown keys .'codes'.*missing keys .'num_codes'")
        config.write_text(text.replace('"format_version": 1', '"format_version": 2'))
        self.refused(folder, "version 2, expected vqkd 1")
        config.write_text(text.replace('"num_codes": 12', f'"num_codes": {2**24}'))
        self.refused(folder, r"quantizer.codebook has shape \[12, 4\], expected \[16777216, 4\]")
        config.write_text(text.replace('"num_codes": 12', f'"num_codes": {2**63}'))
        self.refused(folder, "num_codes must be at most 16777216, not 9223372036854775808")
        for damaged in (text[:40], "[" * 20_000):
            config.write_text(damaged)
            self.refused(folder, "config.json: not an image tokenizer config")

    def test_a_storage_without_a_name_is_no_checkpoint(self, tmp_path: Path) -> None:
        # What torch.save writes, but for a pickle that asks for the storage 5.
        with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02K\x05Q.")
            archive.writestr("x/version", "3\n")
        self.refused(tmp_path / "x.pth", "x.pth: cannot be read as a checkpoint")

    def refused(self, folder: Path, pattern: str) -> None:
        with pytest.raises(ValueError, match=pattern) as caught:
            ImageTokenizer.from_pretrained(folder)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("patch_size", 5, "not a multiple of patch_size 5"),
            ("num_heads", 3, "not a multiple of num_heads 3"),
            ("depth", -1, "depth must not be negative"),
            ("ema_decay", 1.0, "ema_decay"),
        ],
    )
    def test_impossible_configs_are_refused(self, field: str, value: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            small_config(**{field: value})


class FixedCrops:
    """A `CropStream` of noise over a few colours, a pure function of (step, slot)."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.num_images = 64

    def image(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randint(0, 256, (3, 4, 4), generator=generator)
        return coarse.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)

    def training_batches(self, first_step: int, rank: int, world_size: int) -> Iterator[Tensor]:
        share = self.batch_size // world_size
        step = first_step
        while True:
            start = step * self.batch_size + rank * share
            yield torch.stack([self.image((start + i) % 64) for i in range(share)])
            step += 1

    def evaluation_batches(self) -> Iterator[Tensor]:
        yield torch.stack([self.image(number) for number in range(16)])


def make_trainer(folder: Path, **overrides: float) -> Trainer:
    defaults = {"steps": 8, "batch_size": 8, "lr": 2e-3, "log_interval": 2, "save_interval": 4}
    options = TrainingOptions(**{**defaults, **overrides})  # type: ignore[arg-type]
    crops = FixedCrops(options.batch_size)
    return Trainer(
        small_config(), options, teacher=PixelTeacher(4), crops=crops, folder=folder, device=CPU
    )


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_rank(rank: int, folder: str) -> None:
    """One of two processes of `test_two_processes_equal_one`."""
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer = make_trainer(Path(folder) / "two")
    trainer.run()
    torch.save(trainer.model.state_dict(), f"{folder}/rank{rank}.pt")
    distributed.destroy_process_group()


class TestTraining:
    def test_learns_and_writes_a_tokenizer(self, tmp_path: Path) -> None:
        fingerprint = make_trainer(tmp_path / "t", steps=80, lr=1e-2).run()
        metrics = read_metrics(tmp_path / "t")
        first, last = metrics[0], metrics[-1]
        assert (first["step"], last["step"]) == (0, 80)
        assert last["eval/loss/cosine"] < 0.75 * first["eval/loss/cosine"]
        assert last["eval/codebook/usage"] > 0.5
        assert ImageTokenizer.from_pretrained(tmp_path / "t").fingerprint == fingerprint
        assert {p.name for p in (tmp_path / "t").iterdir()} == {
            "config.json",
            "model.safetensors",
            "metrics.jsonl",
            "training_state.pt",
        }

    def test_codes_are_placed_after_the_unquantized_steps(self, tmp_path: Path) -> None:
        folder = tmp_path / "t"
        trainer = make_trainer(folder, unquantized_steps=5)
        trainer.save = interrupt_after(trainer, 4)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        with pytest.raises(ValueError, match="its codes are not placed yet") as caught:
            ImageTokenizer.from_pretrained(folder)
        assert "\n" not in str(caught.value)
        make_trainer(folder, unquantized_steps=5).run()
        assert int(load_vqkd(folder).quantizer.updates) == 1 + 3
        before, placed = (
            [m for m in read_metrics(folder) if m["step"] <= 4],
            [m for m in read_metrics(folder) if m["step"] > 4],
        )
        assert [m["loss/commitment"] for m in before] == [0.0, 0.0]
        assert not any("codebook/usage" in m for m in before)
        assert [m["step"] for m in placed] == [5, 6, 8, 8]
        assert all("codebook/usage" in m or "eval/codebook/usage" in m for m in placed)

    def test_same_seed_same_tokenizer(self, tmp_path: Path) -> None:
        torch.manual_seed(1)
        first = make_trainer(tmp_path / "a").run()
        torch.manual_seed(2)
        assert make_trainer(tmp_path / "b").run() == first
        assert make_trainer(tmp_path / "c", seed=5).run() != first

    def test_resumed_run_equals_an_unbroken_one(self, tmp_path: Path) -> None:
        whole = make_trainer(tmp_path / "whole")
        whole.run()
        broken = make_trainer(tmp_path / "broken")
        broken.save = interrupt_after(broken, 4)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            broken.run()
        resumed = make_trainer(tmp_path / "broken")
        resumed.run()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name

        def without_speed(folder: str) -> list[dict[str, float]]:
            kept = read_metrics(tmp_path / folder)
            return [{k: v for k, v in m.items() if k != "images_per_second"} for m in kept]

        assert without_speed("broken") == without_speed("whole")

    def test_resumed_run_has_the_options_of_the_command(self, tmp_path: Path) -> None:
        make_trainer(tmp_path / "t", steps=4).run()
        resumed = make_trainer(tmp_path / "t", steps=5, weight_decay=0.3, lr=1e-3)
        resumed.run()
        decayed, free = resumed.optimizer.param_groups
        assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
        # The last step of the cosine.
        assert decayed["lr"] == free["lr"] == 1e-5

    def test_finished_run_is_left_alone_and_another_is_refused(self, tmp_path: Path) -> None:
        first = make_trainer(tmp_path / "t").run()
        written = (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns
        assert make_trainer(tmp_path / "t").run() == first
        assert (tmp_path / "t" / "model.safetensors").stat().st_mtime_ns == written
        with pytest.raises(ValueError, match="another run|another seed"):
            make_trainer(tmp_path / "t", seed=1).run()
        (tmp_path / "t" / "training_state.pt").write_bytes(b"PK\x03\x04 cut")
        with pytest.raises(ValueError, match="training_state.pt: cannot be read"):
            make_trainer(tmp_path / "t").run()

    def test_a_length_that_is_no_file_s_is_damage(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def load(*_: Any, **__: Any) -> None:
            raise MemoryError

        (tmp_path / "x.pt").write_bytes(b"")
        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(DataError, match="x.pt: cannot be read"):
            read_torch_file(tmp_path / "x.pt", "cpu")

    @pytest.mark.process
    def test_two_processes_equal_one(self, tmp_path: Path) -> None:
        torch.multiprocessing.spawn(run_rank, (str(tmp_path),), nprocs=2)
        one = make_trainer(tmp_path / "one")
        one.run()
        ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2)]
        for name, value in one.model.state_dict().items():
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            assert torch.allclose(ranks[0][name], value, atol=1e-4), name
        losses = [
            [m["loss/total"] for m in read_metrics(tmp_path / f) if "loss/total" in m]
            for f in ("one", "two")
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4)

    def test_teacher_of_other_dimensions_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="gives 28 dimensions, the decoder predicts 49"):
            Trainer(
                small_config(),
                TrainingOptions(steps=1, batch_size=2, lr=1e-3),
                teacher=PixelTeacher(3),
                crops=FixedCrops(2),
                folder=tmp_path,
                device=CPU,
            )

    def test_learning_rate(self) -> None:
        options = TrainingOptions(steps=103, batch_size=1, lr=1.0, min_lr=0.2, warmup_steps=2)
        assert [learning_rate(step, options) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
        assert learning_rate(52, options) == pytest.approx(0.6)  # half way: the middle
        assert learning_rate(102, options) == pytest.approx(0.2)

    def test_weight_decay_only_on_matrices(self) -> None:
        model = build_model(small_config(), 0)
        options = TrainingOptions(steps=1, batch_size=1, lr=1e-3)
        decayed, free = build_optimizer(model, options).param_groups
        names = {id(p): n for n, p in model.named_parameters()}
        assert all(names[id(p)].endswith("weight") and p.dim() >= 2 for p in decayed["params"])
        assert {"encoder.cls_token", "encoder.pos_embed"} <= {names[id(p)] for p in free["params"]}
        assert len(decayed["params"]) + len(free["params"]) == len(names)


def interrupt_after(trainer: Trainer, step: int):
    """Save as usual, then stop as a signal would, one logged step after the save."""
    original = trainer.save

    def save() -> None:
        original()
        if trainer.step == step:
            with (trainer.folder / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 6, "loss/total": 9.0}\n{"step": 8, "lo')
            raise KeyboardInterrupt

    return save


class TestTeachers:
    def test_unknown_and_missing(self, tmp_path: Path) -> None:
        for spec, message in (("clip", "unknown teacher 'clip'"), ("hf:/no/where", "no such")):
            with pytest.raises(ValueError, match=message):
                build_teacher(spec, patch_size=4, grid=4, device=CPU)

    def test_transformers_is_asked_for_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = {"model_type": "clip_vision_model", "patch_size": 4, "image_size": 16}
        (tmp_path / "config.json").write_text(json.dumps(config))
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ValueError, match="pip install transformers"):
            build_teacher(f"hf:{tmp_path}", patch_size=4, grid=4, device=CPU)

    def test_clip_features(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            projection_dim=6,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        model = transformers.CLIPVisionModelWithProjection(config).eval()
        model.save_pretrained(tmp_path / "clip")
        teacher = build_teacher(f"hf:{tmp_path / 'clip'}", patch_size=4, grid=4, device=CPU)
        pixels = random_pixels(2)
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        with torch.no_grad():
            hidden = model.vision_model((pixels - mean) / std).last_hidden_state
            expected = model.visual_projection(model.vision_model.post_layernorm(hidden))[:, 1:]
        assert teacher.dim == 6
        assert torch.allclose(teacher(pixels), expected, atol=1e-5)
        resized = build_teacher(f"hf:{tmp_path / 'clip'}", patch_size=8, grid=2, device=CPU)
        assert resized(pixels).shape == (2, 4, 6)

    def test_vit_features(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        model = transformers.ViTModel(config, add_pooling_layer=False).eval()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="no preprocessor_config.json"):
            build_teacher(f"hf:{tmp_path}", patch_size=4, grid=4, device=CPU)
        constants = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(constants))
        teacher = build_teacher(f"hf:{tmp_path}", patch_size=4, grid=4, device=CPU)
        pixels = random_pixels(2)
        mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        std = torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
        with torch.no_grad():
            expected = model((pixels - mean) / std).last_hidden_state[:, 1:]
        assert torch.allclose(teacher(pixels), expected, atol=1e-5)


def test_load_gives_back_the_decoder(tmp_path: Path) -> None:
    model = placed_model()
    save_vqkd(tmp_path, model, training={"steps": 3})
    loaded = load_vqkd(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_the_learning_rate_is_a_positive_number(rate: float) -> None:
    with pytest.raises(ConfigError, match="^lr must be positive, not "):
        TrainingOptions(steps=1, batch_size=1, lr=rate)
