"""Micro-batches: contents, purity, shares of ranks, resumption, stored codes, start-up errors."""

from __future__ import annotations

import io
import json
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from megatron_vlmoe.config.errors import ConfigError, DataError, StartupError
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data import collate
from megatron_vlmoe.data.batches import BatchShare, PretrainData
from megatron_vlmoe.data.codes import CodesReader
from megatron_vlmoe.data.collate import Loader
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.data.manifest import DatasetManifest, length_percentiles, stage_manifest
from megatron_vlmoe.data.random_batches import RandomData
from megatron_vlmoe.data.samples import foreground
from megatron_vlmoe.data.sources import split_documents
from megatron_vlmoe.prepare.codes import CodesOptions, write_codes
from megatron_vlmoe.stream.batch import Batch
from megatron_vlmoe.stream.layout import SEGMENTS, TEXT_SEGMENTS, VISION_SEGMENTS
from megatron_vlmoe.stream.sizes import text_mask_slots
from megatron_vlmoe.tokenizers.text import (
    TextTokenizer,
    TextTokenizerTraining,
    train_text_tokenizer,
)

NUM_IMAGES, NUM_PAIRS, NUM_TEXTS = 23, 20, 40
MICRO = 4


@dataclass(frozen=True)
class BrightnessTokenizer:
    """Stands for the image tokenizer: the code of a patch is its mean brightness in 0..255."""

    image_size: int = 32
    patch_size: int = 4
    num_codes: int = 256
    fingerprint: str = "brightness"
    device: torch.device = torch.device("cpu")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        means = torch.nn.functional.avg_pool2d(pixels.mean(1), self.patch_size)
        return (means * 255).round().long().flatten(1)


def jpeg(seed: int) -> np.ndarray:
    """A smooth picture of its own size, encoded."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    size = (int(rng.integers(70, 120)), int(rng.integers(60, 100)))
    stream = io.BytesIO()
    Image.fromarray(small).resize(size, Image.Resampling.BILINEAR).save(stream, "JPEG", quality=95)
    return np.frombuffer(stream.getvalue(), dtype=np.uint8)


def write_dataset(
    prefix: Path, kind: str, parts: dict[str, list[list[np.ndarray]]], tokenizer: TextTokenizer
) -> None:
    """Writes documents (lists of sequences) of each part, and the manifest."""
    files, lengths = {}, np.empty(0, np.int64)
    for part, documents in parts.items():
        with IndexedWriter(f"{prefix}_{part}", np.uint8 if part == "image" else np.uint16) as out:
            for document in documents:
                out.add_document(document)
            files |= {f"_{part}{suffix}": record for suffix, record in out.finish().items()}
        if part != "image":
            lengths = np.array([len(s) for document in documents for s in document])
    textual = kind != "images"
    manifest = DatasetManifest(
        kind=kind,
        documents=len(next(iter(parts.values()))),
        sequences=len(lengths) or len(parts["image"]),
        tokens=int(lengths.sum()),
        bytes=sum(record.size for name, record in files.items() if name.endswith("bin")),
        files=files,
        source={},
        tokenizer_fingerprint=tokenizer.fingerprint if textual else None,
        vocab_size=tokenizer.size if textual else None,
        caption_lengths=length_percentiles(lengths) if kind == "pairs" else None,
    )
    stage_manifest(prefix, manifest).publish()


@dataclass(frozen=True)
class Corpus:
    root: Path
    tokenizer: TextTokenizer

    def config(self, **data: object) -> RunConfig:
        base = preset("tiny-dense")
        fields = {
            "text": (str(self.root / "text"),),
            "images": (str(self.root / "images"),),
            "pairs": (str(self.root / "pairs"),),
            "text_tokenizer": str(self.tokenizer.model_path),
            "num_workers": 0,
            **{f"micro_{name}": MICRO for name in ("texts", "images", "pairs")},
            **{f"global_{name}": 2 * MICRO for name in ("texts", "images", "pairs")},
            "pair_unit": "caption",
            "crop_scale_min": 0.5,
            "flip_probability": 0.5,
            "pixel_std": (0.5, 0.5, 0.5),
        }
        model = replace(base.model, image_size=64, patch_size=8, pair_text_length=32)
        return replace(base, model=model, data=replace(base.data, **{**fields, **data}))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    root = tmp_path_factory.mktemp("corpus")
    words = [f"{a}{b}" for a in ("red", "blue", "small", "big") for b in ("cat", "dog", "sun", "")]
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 12)) for _ in range(200)]
    train_text_tokenizer(TextTokenizerTraining(vocab_size=60, output_prefix=root / "spm"), lines)
    tokenizer = TextTokenizer(root / "spm.model")

    def tokens(length: int) -> np.ndarray:
        return rng.integers(5, tokenizer.size, length)

    images = [[jpeg(i)] for i in range(NUM_IMAGES)]
    write_dataset(root / "images", "images", {"image": images}, tokenizer)
    captions = [
        [tokens(int(rng.integers(3, 20))) for _ in range(1 + i % 3)] for i in range(NUM_PAIRS)
    ]
    captions[0][0] = tokens(50)
    pictures = [[jpeg(100 + i)] for i in range(NUM_PAIRS)]
    write_dataset(root / "pairs", "pairs", {"image": pictures, "text": captions}, tokenizer)
    texts = [[tokens(int(rng.integers(1, 90)))] for _ in range(NUM_TEXTS)]
    write_dataset(root / "text", "text", {"text_document": texts}, tokenizer)
    return Corpus(root, tokenizer)


def open_data(config: RunConfig, **share: int | bool) -> PretrainData:
    return PretrainData.open(config, BatchShare(**share), image_tokenizer=BrightnessTokenizer())


def batches(data: PretrainData, count: int, first: int = 0, split: str = "train") -> list[Batch]:
    return list(data.loader(split, first, count))


def flat(batch: Batch) -> dict[str, torch.Tensor]:
    """All tensors of a batch by `SEGMENT/KEY`."""
    values: dict[str, torch.Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, dict):
            values |= {f"{name}/{key}": tensor for key, tensor in value.items()}
        else:
            values[name] = value
    return values


def assert_equal(left: Batch, right: Batch) -> None:
    ours, theirs = flat(left), flat(right)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_shapes_and_types(corpus: Corpus) -> None:
    data = open_data(corpus.config(reset_attention=True))
    batch = batches(data, 1)[0]
    objectives = data.config.objectives
    captions, masked = objectives.caption_mask_slots, objectives.num_masked_patches
    slots = text_mask_slots(data.config)
    assert (slots, masked) == (9, 25)  # floor(0.15 * 62 + 0.5), floor(0.4 * 64)
    expected = {
        **dict.fromkeys(("texts/ids", "texts/documents"), (MICRO, 64)),
        "texts/document_count": (),
        **dict.fromkeys(("texts/positions", "texts/labels"), (MICRO, slots)),
        "pair_texts/ids": (MICRO, 32),
        "pair_texts/lengths": (MICRO,),
        **dict.fromkeys(("pair_texts/positions", "pair_texts/labels"), (MICRO, captions)),
        **dict.fromkeys(("images/mask", "pair_images/mask"), (MICRO, 64)),
        **dict.fromkeys(("images/positions", "pair_images/positions"), (MICRO, masked)),
        **dict.fromkeys(("images/pixels", "pair_images/pixels"), (MICRO, 3, 64, 64)),
        **dict.fromkeys(
            ("images/tokenizer_pixels", "pair_images/tokenizer_pixels"), (MICRO, 3, 32, 32)
        ),
        **{f"{segment}/sample_numbers": (MICRO,) for segment in SEGMENTS},
        **dict.fromkeys(("micro_batch", "step", "truncated_captions", "dropped_caption_masks"), ()),
    }
    assert {name: tuple(value.shape) for name, value in flat(batch).items()} == expected
    for name, value in flat(batch).items():
        wanted = torch.uint8 if "pixels" in name else torch.int64
        assert value.dtype == (torch.bool if name.endswith("mask") else wanted), name
    numbers = [len(documents.unique()) for documents in batch["texts"]["documents"]]
    assert int(batch["texts"]["document_count"]) == sum(numbers) > MICRO
    assert data.config.model.vocab_size == corpus.tokenizer.size
    assert data.config.model.visual_vocab_size == 256
    assert data.config.objectives.num_masked_patches == masked
    assert data.config.objectives.caption_mask_slots == captions


def test_masks_agree_with_positions_and_labels(corpus: Corpus) -> None:
    tokenizer, data = corpus.tokenizer, open_data(corpus.config())
    for batch in batches(data, 6):
        for segment in VISION_SEGMENTS:
            mask = batch[segment]["mask"]
            assert (mask.sum(1) == 25).all()
            rows = [torch.nonzero(row)[:, 0] for row in mask]
            assert torch.equal(torch.stack(rows), batch[segment]["positions"])
        for text_segment in TEXT_SEGMENTS:
            texts = batch[text_segment]
            ids, positions, labels = texts["ids"], texts["positions"], texts["labels"]
            used = labels != -100
            assert (positions[~used] == 0).all() and (positions[used] > 0).all()
            assert not torch.isin(labels[used], torch.tensor(list(tokenizer.special_ids))).any()
            shown = ids.gather(1, positions)[used]
            assert 0.5 < (shown == tokenizer.mask_id).float().mean() <= 1
            total = sum(int((row == tokenizer.mask_id).sum()) for row in ids)
            assert total == int((shown == tokenizer.mask_id).sum())


def test_captions_are_framed_padded_and_cut(corpus: Corpus) -> None:
    tokenizer, data = corpus.tokenizer, open_data(corpus.config(eval_fraction=0.0))
    reader = IndexedReader(str(corpus.root / "pairs_text"))
    seen, truncated = [], 0
    num_captions = reader.num_sequences
    for batch in batches(data, -(-num_captions // MICRO)):
        truncated += int(batch["truncated_captions"])
        captions = batch["pair_texts"]
        ids, labels = captions["ids"].clone(), captions["labels"]
        for row in range(MICRO):
            used = labels[row] != -100
            ids[row, captions["positions"][row][used]] = labels[row][used]
            length = int(captions["lengths"][row])
            assert ids[row, 0] == tokenizer.bos_id and ids[row, length - 1] == tokenizer.eos_id
            assert (ids[row, length:] == tokenizer.pad_id).all()
            seen.append(tuple(ids[row, 1 : length - 1].tolist()))
    stored = [tuple(reader.sequence(i)[:30].tolist()) for i in range(num_captions)]
    assert sorted(seen[:num_captions]) == sorted(stored)
    assert truncated == 1 + seen[num_captions:].count(stored[0])


def test_caption_masks_beyond_the_slots_are_counted(corpus: Corpus) -> None:
    base = corpus.config()
    config = replace(base, objectives=replace(base.objectives, caption_mask_slots=3))
    for batch in batches(open_data(config), 3):
        taken = (batch["pair_texts"]["labels"] != -100).sum(1)
        natural = ((batch["pair_texts"]["lengths"] - 2) * 0.5 + 0.5).floor().clamp(min=1)
        assert torch.equal(taken, natural.clamp(max=3).long())
        assert int(batch["dropped_caption_masks"]) == int((natural - taken).sum())


def test_caption_slots_come_from_the_99th_percentile(corpus: Corpus) -> None:
    lengths = IndexedReader(str(corpus.root / "pairs_text")).sequence_lengths
    longest = np.sort(lengths)[int(np.ceil(0.99 * len(lengths))) - 1]
    assert open_data(corpus.config()).config.objectives.caption_mask_slots == int(
        np.ceil(0.5 * min(longest, 30))
    )


def test_a_batch_depends_on_its_number_alone(corpus: Corpus) -> None:
    data = open_data(corpus.config())
    expected = batches(data, 8)
    dataset = open_data(corpus.config())._dataset("train")
    for number in (7, 0, 5, 5, 2):
        assert_equal(dataset[number], expected[number])
    for first in (3, 6):
        for batch, wanted in zip(batches(data, 2, first), expected[first:], strict=False):
            assert_equal(batch, wanted)
    assert not torch.equal(expected[0]["texts"]["ids"], expected[1]["texts"]["ids"])
    other = replace(corpus.config(), train=replace(corpus.config().train, seed=99))
    masks = [batch["images"]["mask"] for batch in (batches(open_data(other), 1)[0], expected[0])]
    assert not torch.equal(*masks)


@pytest.mark.process
def test_workers_change_nothing_and_leave_the_global_generator_alone(corpus: Corpus) -> None:
    expected = batches(open_data(corpus.config()), 5)
    loader = open_data(corpus.config(num_workers=2)).loader("train", 1, 4)
    state = torch.get_rng_state()
    for _ in range(2):
        for batch, wanted in zip(loader, expected[1:], strict=True):
            assert_equal(batch, wanted)
    assert torch.equal(state, torch.get_rng_state())


def test_an_endless_loader_goes_on(corpus: Corpus) -> None:
    stream = iter(open_data(corpus.config()).loader("train", 4))
    assert [int(next(stream)["micro_batch"]) for _ in range(30)] == list(range(4, 34))


def test_two_ranks_see_what_one_process_sees(corpus: Corpus) -> None:
    whole = batches(open_data(corpus.config()), 6)
    ranks = [batches(open_data(corpus.config(), data_rank=r, data_size=2), 3) for r in range(2)]
    merged = [batch for step in zip(*ranks, strict=True) for batch in step]
    for left, right in zip(merged, whole, strict=True):
        assert_equal(left, right)
    assert [int(batch["micro_batch"]) for batch in whole] == list(range(6))
    assert [int(batch["step"]) for batch in whole] == [0, 0, 1, 1, 2, 2]
    numbers = torch.cat([batch["texts"]["sample_numbers"] for batch in whole])
    assert torch.equal(numbers, torch.arange(6 * MICRO))


def test_tensor_shares_concatenate_to_the_whole(corpus: Corpus) -> None:
    whole = batches(open_data(corpus.config()), 2)
    shares = [
        batches(open_data(corpus.config(), tensor_rank=r, tensor_size=2), 2) for r in range(2)
    ]
    for number, wanted in enumerate(whole):
        for name, value in flat(wanted).items():
            parts = [flat(share[number])[name] for share in shares]
            if "pixels" in name:
                assert parts[0].shape[0] == MICRO // 2
                assert torch.equal(torch.cat(parts), value)
            else:
                assert torch.equal(parts[0], value) and torch.equal(parts[1], value)


def test_stages_read_only_what_they_need(corpus: Corpus, tmp_path: Path) -> None:
    whole = flat(batches(open_data(corpus.config()), 1)[0])
    common = {name for name in whole if "pixels" not in name}
    for first, last in ((True, False), (False, False), (False, True)):
        data = open_data(corpus.config(), first_stage=first, last_stage=last)
        batch = flat(batches(data, 1)[0])
        own = {name for name in whole if name.endswith("pixels")}
        own = {name for name in own if (last if "tokenizer" in name else first)}
        assert batch.keys() == common | own
        for name in batch:
            assert torch.equal(batch[name], whole[name])


def damaged_copy(corpus: Corpus, target: Path) -> str:
    """A copy of the image dataset whose pictures are all noise, with the same sizes."""
    for suffix in (".json", "_image.idx"):
        (target / f"images{suffix}").write_bytes((corpus.root / f"images{suffix}").read_bytes())
    size = (corpus.root / "images_image.bin").stat().st_size
    (target / "images_image.bin").write_bytes(bytes(size))
    return str(target / "images")


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_and_middle_stages_never_see_it(
    corpus: Corpus, tmp_path: Path, workers: int
) -> None:
    prefix = damaged_copy(corpus, tmp_path)
    config = corpus.config(images=(prefix,), num_workers=workers)
    with pytest.raises(DataError, match=r"images_image.bin: image \d+: not a read") as caught:
        batches(open_data(config), 1)
    assert "\n" not in str(caught.value)
    assert batches(open_data(config, first_stage=False, last_stage=False), 1)


@pytest.mark.parametrize(
    ("cores", "processes", "workers", "of_task"),
    [
        *((2, None, 1, ""), (6, None, 5, ""), (1, None, 1, "")),
        *((128, 8, 8, ""), (16, 8, 1, ""), (32, 8, 3, ""), (8, 16, 1, "")),
        *((128, None, 7, "8"), (4, None, 3, "8"), (128, 8, 8, "8")),
        # Of a launcher that binds nothing: the 48 cores of the machine are for 8 processes.
        *((48, None, 5, ""), (48, None, 7, "8")),
    ],
)
def test_loader_workers_are_the_cores_of_a_rank_but_one(
    cores: int,
    processes: int | None,
    workers: int,
    of_task: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torchrun's processes share the cores that they see; one started by srun has those of its task, else what it
    sees, if that is not the whole machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 48)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", of_task)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    if processes:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    started: list[int] = []
    monkeypatch.setattr(
        collate, "DataLoader", lambda *_, **words: started.append(words["num_workers"])
    )
    for asked in (-1, 0, 3):
        Loader(TensorDataset(), range(1), asked)
    assert started == [workers, 0, 3]


def test_shared_memory_that_is_too_small_is_told_before_a_worker_dies_of_it(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(corpus.config(num_workers=2, prefetch=3))
    # Images and those of pairs, in 7 batches of each of 4 ranks.
    needed = 4 * 7 * 2 * MICRO * 3 * data.config.model.image_size**2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(collate, "DataLoader", lambda *_, **words: None)
    for size in (needed - 1, needed):
        shared = SimpleNamespace(f_blocks=size, f_frsize=1)
        monkeypatch.setattr(os, "statvfs", lambda path, shared=shared: shared)
        data.loader("eval")
        if size == needed:
            data.loader("train")
            continue
        with pytest.raises(StartupError, match=r"/dev/shm has .* 4 rank\(s\) with 7 .*--ipc=host"):
            data.loader("train")
    open_data(corpus.config(num_workers=0)).loader("train")


@pytest.mark.parametrize("unit,epoch", [("caption", 39), ("image", NUM_PAIRS)])
def test_an_epoch_of_pairs_has_every_sample_once(corpus: Corpus, unit: str, epoch: int) -> None:
    data = open_data(corpus.config(pair_unit=unit, eval_fraction=0.0), last_stage=False)
    part = data._dataset("train").parts["pairs"]
    reader = IndexedReader(str(corpus.root / "pairs_text"))
    assert part.order.orders[0].num_samples == epoch
    found = [part.locate(part.order.locate(number)) for number in range(epoch)]
    documents = reader.document_indices
    for image, sequence in found:
        assert documents[image] <= sequence < documents[image + 1]
    if unit == "caption":
        assert sorted(sequence for _, sequence in found) == list(range(reader.num_sequences))
    else:
        assert sorted(image for image, _ in found) == list(range(NUM_PAIRS))
        later = [part.locate(part.order.locate(n)) for n in range(epoch, 4 * epoch)]
        assert len(set(found + later)) > epoch + 5


def test_held_out_documents_are_not_trained_on(corpus: Corpus) -> None:
    data = open_data(corpus.config(eval_fraction=0.25))
    train, held_out = data._dataset("train").parts, data._dataset("eval").parts
    assert held_out["texts"].texts[0].documents == range(30, 40)
    assert train["texts"].texts[0].documents == range(30)
    assert train["images"].order.orders[0].num_samples == 18
    assert held_out["images"].first_documents == [18]
    images = {
        part.locate(part.order.locate(n))[0]
        for part in (held_out["pairs"],)
        for n in range(part.order.orders[0].num_samples)
    }
    assert images == set(range(15, 20))


def test_evaluation_is_fixed_and_unaugmented(corpus: Corpus) -> None:
    data = open_data(corpus.config(eval_fraction=0.25, color_jitter=0.4))
    first = batches(data, 4, split="eval")
    for left, right in zip(first, batches(data, 4, split="eval"), strict=True):
        assert_equal(left, right)
    # Five images are held out: sample 5 is sample 0 again, with the same masks.
    masks = torch.cat([batch["images"]["mask"] for batch in first])
    pixels = torch.cat([batch["images"]["pixels"] for batch in first])
    assert torch.equal(masks[0], masks[5]) and torch.equal(pixels[0], pixels[5])
    assert not torch.equal(masks[0], masks[1])
    stored = IndexedReader(str(corpus.root / "images_image")).sequence(18).tobytes()
    whole = Image.open(io.BytesIO(stored)).resize((64, 64), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels[0].permute(1, 2, 0).numpy(), whole)


def test_evaluation_tells_what_was_hidden_and_which_captions_can_move(corpus: Corpus) -> None:
    config = corpus.config(eval_fraction=0.5)
    (whole,) = batches(open_data(config), 1, split="eval")
    for segment in VISION_SEGMENTS:
        images = whole[segment]
        for row, pixels in enumerate(images["pixels"].numpy()):
            expected = foreground(pixels, config.model.patch_grid)[images["positions"][row]]
            assert images["foreground"][row].tolist() == expected.tolist()
        assert images["foreground"].any()
    # A tensor-parallel rank has pixels of its samples alone, but judges all of them.
    (share,) = batches(open_data(config, tensor_rank=1, tensor_size=2), 1, split="eval")
    assert torch.equal(share["images"]["foreground"], whole["images"]["foreground"])
    assert torch.equal(share["images"]["pixels"], whole["images"]["pixels"][MICRO // 2 :])
    (first_stage,) = batches(open_data(config, last_stage=False), 1, split="eval")
    assert "foreground" not in first_stage["images"]
    # Captions of one image follow each other.
    assert int(whole["exchange_distance"]) > 1
    for batch in batches(open_data(config), 2):
        assert "exchange_distance" not in batch and "foreground" not in batch["images"]


def test_eval_datasets_replace_the_held_out_part(corpus: Corpus) -> None:
    prefix = str(corpus.root / "images")
    data = open_data(corpus.config(eval_images=(prefix,)))
    assert data._dataset("train").parts["images"].order.orders[0].num_samples == NUM_IMAGES
    assert data._dataset("eval").parts["images"].order.orders[0].num_samples == NUM_IMAGES


def test_without_held_out_data_only_the_evaluation_fails(corpus: Corpus) -> None:
    data = open_data(corpus.config(eval_fraction=0.0))
    assert data.summary()
    with pytest.raises(ConfigError, match="no texts to evaluate on"):
        data.loader("eval", 0, 1)


def test_the_two_views_show_the_same_thing(corpus: Corpus) -> None:
    data = open_data(corpus.config(color_jitter=0.4, pair_flip_probability=0.5))
    for batch in batches(data, 3):
        for segment in VISION_SEGMENTS:
            model = batch[segment]["pixels"].float().unflatten(3, (8, 8)).unflatten(2, (8, 8))
            view = batch[segment]["tokenizer_pixels"].float()
            means = view.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
            difference = (model.mean((3, 5)) - means).abs()
            assert difference.max() < 6 and difference.mean() < 1
            assert (model.mean((3, 5)).flip(3) - means).abs().mean() > 5


def test_views_of_equal_size_are_one_tensor(corpus: Corpus) -> None:
    data = PretrainData.open(corpus.config(), image_tokenizer=BrightnessTokenizer(64, 8))
    batch = batches(data, 1)[0]
    for segment in VISION_SEGMENTS:
        images = batch[segment]
        assert images["pixels"].data_ptr() == images["tokenizer_pixels"].data_ptr()


def test_flips_and_jitter_follow_their_options(corpus: Corpus) -> None:
    def pixels(**options: float) -> torch.Tensor:
        config = corpus.config(crop_scale_min=0.5, color_jitter=0.0, **options)
        return torch.cat([batch["images"]["pixels"] for batch in batches(open_data(config), 4)])

    straight, mirrored = pixels(flip_probability=0.0), pixels(flip_probability=1.0)
    assert torch.equal(straight, mirrored.flip(3))
    half = pixels(flip_probability=0.5)
    flipped = [torch.equal(a, b) for a, b in zip(half, mirrored, strict=True)]
    assert 2 <= sum(flipped) <= 14
    assert all(torch.equal(a, c) for a, c, f in zip(half, straight, flipped, strict=True) if not f)


@pytest.fixture(scope="session")
def coded(corpus: Corpus) -> Corpus:
    """The same corpus with three stored views per image."""
    root = corpus.root / "coded"
    root.mkdir()
    for file in corpus.root.iterdir():
        if file.is_file():
            (root / file.name).write_bytes(file.read_bytes())
    for name, flips in (("images", 0.5), ("pairs", 0.0)):
        options = CodesOptions(num_views=3, flip_probability=flips, min_scale=0.3)
        tokenizer = BrightnessTokenizer()
        write_codes(str(root / name), tokenizer, options)  # type: ignore[arg-type]
    return Corpus(root, corpus.tokenizer)


def test_stored_codes_are_those_of_the_pixels(coded: Corpus) -> None:
    data = open_data(coded.config(color_jitter=0.0))
    assert data.stored_codes
    for split in ("train", "eval"):
        for batch in batches(data, 4, split=split):
            for segment in VISION_SEGMENTS:
                images = batch[segment]
                assert "tokenizer_pixels" not in images
                seen = BrightnessTokenizer(64, 8).encode(images["pixels"].float() / 255)
                wanted = seen.gather(1, images["positions"])
                difference = (images["labels"] - wanted).abs()
                assert difference.max() <= 4 and wanted.float().std() > 10


def test_training_uses_every_stored_view_and_evaluation_the_first(coded: Corpus) -> None:
    data = open_data(coded.config())
    train = data._dataset("train").parts["images"]
    stored = CodesReader(str(coded.root / "images"))
    used = set()
    for number in range(120):
        ref = train.order.locate(number)
        view = train.pixels.views.stored_view(ref, ref.index)
        used.add(next(v for v in range(3) if stored.view(ref.index, v).box == view.box))
    assert used == {0, 1, 2}
    held_out = data._dataset("eval").parts["images"]
    ref = held_out.order.locate(1)
    image = held_out.first_documents[0] + 1
    assert held_out.pixels.views.stored_view(ref, image).box == stored.view(image, 0).box


def test_which_codes_are_used(coded: Corpus, corpus: Corpus) -> None:
    assert not open_data(coded.config(codes="compute")).stored_codes
    assert open_data(coded.config(codes="stored")).stored_codes
    mixed = coded.config(pairs=(str(corpus.root / "pairs"),))
    assert not open_data(mixed).stored_codes
    with pytest.raises(ConfigError, match=r"corpus\d*/pairs_codes.json"):
        open_data(replace(mixed, data=replace(mixed.data, codes="stored")))
    # Stored codes know the visual vocabulary, so no tokenizer is needed.
    assert PretrainData.open(coded.config()).config.model.visual_vocab_size == 256


def test_mirrored_codes_are_refused_where_flips_are_off(coded: Corpus) -> None:
    with pytest.raises(ConfigError, match=r"data.flip_probability is 0.*images_codes"):
        open_data(coded.config(flip_probability=0.0))


def test_codes_of_another_tokenizer_are_refused(coded: Corpus) -> None:
    with pytest.raises(DataError, match="another image tokenizer"):
        PretrainData.open(coded.config(), image_tokenizer=BrightnessTokenizer(fingerprint="other"))


def test_blends_of_datasets(corpus: Corpus, coded: Corpus) -> None:
    one, two = str(corpus.root / "images"), str(coded.root / "images")
    data = open_data(corpus.config(images=("0.75", one, "0.25", two), codes="compute"))
    order = data._dataset("train").parts["images"].order
    counts = np.bincount([order.locate(n).dataset for n in range(1024)])
    assert counts.tolist() == [768, 256]
    assert sum("75.0% of the blend" in line for line in data.summary()) == 2


def test_summary_names_datasets_epochs_and_cut_captions(corpus: Corpus) -> None:
    config = corpus.config(eval_fraction=0.25)
    config = replace(config, train=replace(config.train, steps=9))
    text = "\n".join(open_data(config).summary())
    assert "train images" in text and "18 documents, 18 samples per epoch" in text
    assert "4.00 epochs in 9 steps" in text  # 9 * 8 / 18
    captions = sum(1 + i % 3 for i in range(15))
    assert f"{1 / captions:.2%} of the captions are cut" in text
    assert "25 of 64 patches" in text and "9 of 62 tokens" in text


def test_objectives_that_are_off_need_no_data(corpus: Corpus) -> None:
    off = corpus.config(
        micro_texts=0, micro_pairs=0, text=("nowhere",), pairs=(), text_tokenizer=""
    )
    data = open_data(off)
    assert data.text_tokenizer is None
    assert {"images/mask", "images/pixels"} <= flat(batches(data, 1)[0]).keys()
    assert not any(name.startswith(("text", "pair")) for name in batches(data, 1)[0])
    text_only = corpus.config(micro_images=0, micro_pairs=0, images=(), pairs=())
    assert PretrainData.open(text_only).config.model.visual_vocab_size == 0


@pytest.mark.parametrize(
    "change,message",
    [
        ({"text": ()}, "data.text is empty: data.micro_texts=4"),
        ({"images": ()}, "data.images is empty: data.micro_images=4"),
        ({"text_tokenizer": ""}, "data.text_tokenizer is not set: data.micro_texts=4"),
        ({"global_texts": 9}, "data.global_texts=9 is not a multiple of data.micro_texts=4"),
        ({"global_texts": 4}, "different numbers of micro-batches"),
        ({"micro_texts": 0, "micro_images": 0, "micro_pairs": 0}, "are all 0"),
        ({"eval_fraction": 1.0}, "data.eval_fraction=1.0"),
    ],
)
def test_contradictory_options_are_named(
    corpus: Corpus, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_data(corpus.config(**change))
    assert "\n" not in str(caught.value)


def test_other_start_errors(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone.json: not found"):
        open_data(corpus.config(images=(str(tmp_path / "gone"),)))
    with pytest.raises(DataError, match="a dataset of images, but one of text"):
        open_data(corpus.config(text=(str(corpus.root / "images"),)))
    with pytest.raises(ConfigError, match="data.micro_texts=4 is not divisible"):
        open_data(corpus.config(), tensor_size=3)
    with pytest.raises(ConfigError, match="data.image_tokenizer is not set: data.micro_images=4"):
        PretrainData.open(corpus.config())
    with pytest.raises(ConfigError, match="4x4 codes, but .* 8x8 patches"):
        PretrainData.open(corpus.config(), image_tokenizer=BrightnessTokenizer(32, 8))
    base = corpus.config()
    with pytest.raises(ConfigError, match="model.vocab_size=7, but the tokenizer has"):
        open_data(replace(base, model=replace(base.model, vocab_size=7)))
    masks = replace(base, objectives=replace(base.objectives, num_masked_patches=65))
    with pytest.raises(ConfigError, match="num_masked_patches=65 is not in 1..64"):
        open_data(masks)
    manifest = json.loads((corpus.root / "text.json").read_text())
    manifest["tokenizer_fingerprint"] = "f" * 64
    for suffix in ("_text_document.bin", "_text_document.idx"):
        (tmp_path / f"text{suffix}").write_bytes((corpus.root / f"text{suffix}").read_bytes())
    (tmp_path / "text.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="made with another tokenizer"):
        open_data(corpus.config(text=(str(tmp_path / "text"),)))


def test_held_out_split_by_hand() -> None:
    assert split_documents(100, 0.02, "p", "text") == (range(98), range(98, 100))
    assert split_documents(10, 0.02, "p", "text") == (range(9), range(9, 10))
    assert split_documents(10, 0.0, "p", "text") == (range(10), range(10, 10))
    with pytest.raises(ConfigError, match="p: 1 document.*data.eval_text"):
        split_documents(1, 0.02, "p", "text")


def test_a_dataset_pickles_for_workers_started_by_spawn(coded: Corpus) -> None:
    for config in (coded.config(), coded.config(codes="compute")):
        dataset = open_data(config)._dataset("train")
        expected = dataset[3]
        data = pickle.dumps(dataset)
        assert len(data) < 20_000
        assert_equal(pickle.loads(data)[3], expected)


def test_random_batches_of_every_seed_and_their_least_vocabulary() -> None:
    config = preset("tiny-8e")
    config = replace(config, model=replace(config.model, vocab_size=6))
    negative = replace(config, train=replace(config.train, seed=-1))
    (batch,) = RandomData(negative, BatchShare()).loader("train", 0, 1)
    assert batch["texts"]["ids"].shape == (config.data.micro_texts, config.model.text_length)
    small = replace(config, model=replace(config.model, vocab_size=5))
    with pytest.raises(ConfigError, match="^model.vocab_size=5: random texts need at least 6$"):
        RandomData(small, BatchShare())


def test_contrastive_batches_are_captions_and_their_images_apart(corpus: Corpus) -> None:
    config = corpus.config(micro_texts=0, micro_images=0)
    config = replace(config, objectives=replace(config.objectives, kind="contrastive"))
    data = PretrainData.open(config)
    assert data.image_tokenizer is None and data.config.model.visual_vocab_size == 0
    assert any("told from the others of 4 pairs" in line for line in data.summary())
    masked = PretrainData.open(
        corpus.config(micro_texts=0, micro_images=0), image_tokenizer=BrightnessTokenizer()
    )
    batches = list(data.loader("train", 0, 4))
    captions, pictures = (
        IndexedReader(corpus.root / f"pairs_{part}") for part in ("text", "image")
    )
    for batch, other in zip(batches, masked.loader("train", 0, 4), strict=True):
        texts, images = batch["texts"], batch["images"]
        assert set(texts) == {"ids", "lengths", "sample_numbers"}
        assert set(images) == {"pixels", "sample_numbers"}
        # The same samples and views as of masked pairs, with nothing hidden.
        assert torch.equal(images["pixels"], other["pair_images"]["pixels"])
        assert torch.equal(texts["lengths"], other["pair_texts"]["lengths"])
        assert batch["truncated_captions"] == other["truncated_captions"]
        for ids, length, document in zip(
            texts["ids"], texts["lengths"].tolist(), batch["image_documents"].tolist()
        ):
            own = captions.document_indices
            known = [
                captions.sequence(number)[: length - 2].tolist()
                for number in range(int(own[document]), int(own[document + 1]))
            ]
            assert ids[1 : length - 1].tolist() in known
            assert (ids[0], ids[length - 1]) == (corpus.tokenizer.bos_id, corpus.tokenizer.eos_id)
            assert (ids[length:] == corpus.tokenizer.pad_id).all()
    assert pictures.num_documents == NUM_PAIRS
    # Tensor-parallel ranks decode their own images; a later stage decodes none.
    second = PretrainData.open(config, BatchShare(tensor_rank=1, tensor_size=2, last_stage=False))
    (batch,) = second.loader("train", 0, 1)
    assert torch.equal(batch["images"]["pixels"], batches[0]["images"]["pixels"][MICRO // 2 :])
    assert torch.equal(batch["texts"]["ids"], batches[0]["texts"]["ids"])
    last = PretrainData.open(config, BatchShare(first_stage=False))
    (batch,) = last.loader("train", 0, 1)
    assert "pixels" not in batch["images"]
    assert torch.equal(batch["image_documents"], batches[0]["image_documents"])


def damage_image(prefix: Path, image: int) -> None:
    """Zeros over an encoded image; the files keep their sizes."""
    reader = IndexedReader(f"{prefix}_image")
    start = reader.items_before(image)
    with open(f"{prefix}_image.bin", "r+b") as file:
        file.seek(start)
        file.write(bytes(int(reader.sequence_lengths[image])))


def test_a_damaged_image_ends_the_run_or_is_grey(corpus: Corpus, tmp_path: Path) -> None:
    for path in corpus.root.glob("images*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage_image(tmp_path / "images", 7)
    config = corpus.config(images=(str(tmp_path / "images"),), on_bad_image="replace")
    data, sound = open_data(config), open_data(corpus.config())
    found, per_epoch = [], -(-NUM_IMAGES // MICRO)
    for ours, theirs in zip(batches(data, per_epoch), batches(sound, per_epoch), strict=True):
        replaced = ours["images"].pop("replaced")  # type: ignore[typeddict-item]
        ours["pair_images"].pop("replaced")  # type: ignore[typeddict-item]
        found += ours["images"]["sample_numbers"][replaced].tolist()
        for key in ("pixels", "tokenizer_pixels"):
            grey, whole = ours["images"][key], theirs["images"][key]  # type: ignore[literal-required]
            assert (grey[replaced] == 128).all() and torch.equal(grey[~replaced], whole[~replaced])
            ours["images"][key] = whole  # type: ignore[literal-required]
        assert_equal(ours, theirs)
    (place,) = data.places("images", found)
    assert (place["image"], place["dataset"]) == (7, str(tmp_path / "images"))
    with pytest.raises(DataError, match="image 7"):
        batches(open_data(corpus.config(images=(str(tmp_path / "images"),))), per_epoch)


def test_samples_are_named_by_where_they_are_stored(corpus: Corpus) -> None:
    data = open_data(corpus.config())
    batch = batches(data, 1)[0]
    for segment in SEGMENTS:
        numbers = batch[segment]["sample_numbers"].tolist()  # type: ignore[literal-required]
        places = data.places(segment, numbers)
        kind = {"texts": "text", "images": "images"}.get(segment, "pairs")
        assert {place["dataset"] for place in places} == {str(corpus.root / kind)}
    first, second = (data.places(name, [3]) for name in ("pair_texts", "pair_images"))
    assert first == second and {"image", "caption"} <= set(first[0])
