"""Candidate pairs of retrieval: the same pixels as one by one, and every image of a micro-batch decoded once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data_files import encoded, picture
from raw_tasks import Desk, put

from megatron_vlmoe.config.task_schema import FinetuneConfig, TaskConfig
from megatron_vlmoe.data.collate import BatchShare
from megatron_vlmoe.data.order import SampleRef, SampleRngs
from megatron_vlmoe.data.samples import ImageViews, TextFormat
from megatron_vlmoe.finetune.data import TaskSamples

# Image and caption; in order of the images, as re-ranking makes them.
PAIRS = np.array([[0, 0], [0, 2], [0, 3], [1, 0], [1, 1], [2, 0], [2, 2], [2, 5]])


@pytest.fixture
def samples(desk: Desk) -> TaskSamples:
    """Three images with two captions each."""
    sentences = [[{"raw": "a star"}, {"raw": f"{n} red circle"}] for n in ("one", "two", "no")]
    images = [
        {"filename": f"{n}.jpg", "split": "test", "sentences": own}
        for n, own in enumerate(sentences)
    ]
    put(desk.raw / "dataset_flickr30k.json", {"images": images})
    for number in range(3):
        put(desk.raw / "flickr30k-images" / f"{number}.jpg", encoded(picture(number)))
    assert desk.prepare("retrieval", "--splits", "test") == 0
    task = TaskConfig(name="retrieval", rand_augment="vl")
    config = FinetuneConfig(task=task)
    config = replace(config, model=replace(config.model, image_size=16))
    text = TextFormat(0, 2, 1, 8)
    rngs = SampleRngs(1, 1, False)
    return TaskSamples(desk.opened("test", "retrieval"), config, text, rngs, BatchShare())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images in the order in which they are decoded."""
    numbers: list[int] = []
    pixels = ImageViews.pixels

    def noting(self: ImageViews, ref: SampleRef, image: int, sizes: list[int]) -> list[np.ndarray]:
        numbers.append(image)
        return pixels(self, ref, image, sizes)

    monkeypatch.setattr(ImageViews, "pixels", noting)
    return numbers


def test_an_image_is_decoded_once_in_a_micro_batch(
    samples: TaskSamples, decoded: list[int]
) -> None:
    batch = samples.pair_parts(PAIRS, [0, 1, 2, 3, 4])
    assert decoded == [0, 1]
    assert batch["pair_images"]["pixels"].shape == (5, 3, 16, 16)
    assert len(batch["pair_texts"]["ids"]) == 5
    samples.pair_parts(PAIRS, [5, 6, 7, 0])  # a copy of the first item fills it up
    assert sorted(decoded[2:]) == [0, 2]


def test_pairs_are_what_they_are_alone(samples: TaskSamples) -> None:
    batch = samples.pair_parts(PAIRS, range(len(PAIRS)))
    refs = [SampleRef(0, 0, int(image)) for image, _ in PAIRS]
    alone = samples.pixels(refs, PAIRS[:, 0].tolist())
    assert np.array_equal(batch["pair_images"]["pixels"], alone)
    assert np.array_equal(
        batch["pair_texts"]["ids"], samples.texts([(int(text),) for _, text in PAIRS])["ids"]
    )
    assert len({pixels.tobytes() for pixels in alone}) == 3


def test_a_rank_decodes_its_own_share(samples: TaskSamples, decoded: list[int]) -> None:
    """Of two tensor-parallel ranks the second one has the last four pairs."""
    whole = samples.pair_parts(PAIRS, range(8))["pair_images"]["pixels"]
    decoded.clear()
    samples.share = BatchShare(tensor_rank=1, tensor_size=2)
    batch = samples.pair_parts(PAIRS, range(8))
    assert np.array_equal(batch["pair_images"]["pixels"], whole[4:]) and decoded == [1, 2]
    samples.share = replace(samples.share, first_stage=False)
    assert "pixels" not in samples.pair_parts(PAIRS, [0])["pair_images"]
