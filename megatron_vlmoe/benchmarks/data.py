"""The loader beside a bare Pillow loop that makes the same pixels, and a worker's memory by the size of the dataset.

Letters: n images of a micro-batch, S pixels along a side.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance
from torch.utils.data import Dataset

from megatron_vlmoe.benchmarks.compare import (
    CLOCKS,
    Build,
    Contender,
    NotRun,
    Row,
    Work,
    compare,
    memory_needed,
    ready,
    say,
)
from megatron_vlmoe.benchmarks.options import DataOptions
from megatron_vlmoe.benchmarks.photographs import photographs
from megatron_vlmoe.config.presets import preset
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.data.augment import ImageDraw
from megatron_vlmoe.data.batches import MicroBatches
from megatron_vlmoe.data.collate import BatchShare, Loader, to_tensors
from megatron_vlmoe.data.indexed import IndexedReader, IndexedWriter
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.data.order import (
    MAX_TABLE,
    Blend,
    BlendedOrder,
    SampleOrder,
    SampleRngs,
)
from megatron_vlmoe.data.samples import ImagePart, ImageViews, PackedTexts, PixelPart
from megatron_vlmoe.data.sources import Source, Sources
from megatron_vlmoe.data.tables import SharedTables

_ENHANCERS: dict[str, Any] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}
_NO_TABLES_SHARED = 1 << 62
_PATTERN = 1024  # documents after which generated lengths repeat


def run(options: DataOptions) -> Iterator[list[Row]]:
    """Measures the speed of the loader, jitter by jitter, then the memory of its workers, size by size."""
    with tempfile.TemporaryDirectory() as folder:
        if options.color_jitter:
            write_images(Path(folder) / "images", options)
        for jitter in options.color_jitter:
            yield compare_speed(Path(folder) / "images", jitter, options)
    for documents in options.documents:
        yield worker_memory(documents, options)


# Speed


def write_images(prefix: Path, options: DataOptions) -> None:
    """Indexed JPEGs."""
    with IndexedWriter(f"{prefix}_image", np.uint8) as writer:
        for data in photographs(options.images, options.width, options.height, seed=1):
            writer.add_document([np.frombuffer(data, np.uint8)])


def images_dataset(prefix: Path, jitter: float, options: DataOptions) -> MicroBatches:
    """Micro-batches of images as a first pipeline stage has them: masks and pixels, no codes."""
    config: RunConfig = preset("small-dense")
    model = replace(config.model, image_size=options.size)
    config = replace(
        config,
        model=model,
        objectives=replace(config.objectives, num_masked_patches=model.num_patches * 2 // 5),
        data=replace(
            config.data,
            micro_texts=0,
            micro_pairs=0,
            micro_images=options.batch,
            global_images=options.batch,
            color_jitter=jitter,
        ),
    )
    share = BatchShare(last_stage=False)
    manifest = DatasetManifest("images", options.images, options.images, 0, 0, {}, {})
    sources = Sources((Source(str(prefix), manifest, range(options.images)),), None)
    rngs = SampleRngs(config.train.seed, 3, True)
    readers = [source.reader("image") for source in sources.items]
    views = ImageViews(readers, None, config.data, config.data.flip_probability, rngs)
    part = ImagePart(sources, PixelPart(config, views, None, share))
    return MicroBatches({"images": part}, config, share)


class Drawn(NamedTuple):
    """What the bare loop is told of one image: its file, and what was drawn for it."""

    data: bytes
    draw: ImageDraw


def drawn_images(dataset: MicroBatches, number: int, options: DataOptions) -> list[Drawn]:
    """Files and draws of a micro-batch."""
    part = cast(ImagePart, dataset.parts["images"])
    views = part.pixels.views
    drawn = []
    for sample in range(number * options.batch, (number + 1) * options.batch):
        ref = part.order.locate(sample)
        draw = views.draw(ref, ref.index, options.width, options.height)
        drawn.append(Drawn(views.readers[0].sequence(ref.index).tobytes(), draw))
    return drawn


def bare_pixels(drawn: list[Drawn], size: int) -> npt.NDArray[np.uint8]:
    """The pixels of a micro-batch, uint8 ``[n, 3, S, S]``, by Pillow and nothing else."""
    pixels = np.empty((len(drawn), 3, size, size), np.uint8)
    for row, (data, draw) in enumerate(drawn):
        box = draw.box
        image = Image.open(io.BytesIO(data)).convert("RGB")
        image = image.crop((box.left, box.top, box.left + box.width, box.top + box.height))
        image = image.resize((size, size), Image.Resampling.BICUBIC)
        if draw.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, factor in draw.jitter:
            image = _ENHANCERS[name](image).enhance(factor)
        pixels[row] = np.asarray(image).transpose(2, 0, 1)
    return pixels


@dataclass(frozen=True)
class _BarePixels(Dataset[Any]):
    """The bare loop as a dataset, for a plain DataLoader."""

    batches: list[list[Drawn]]
    size: int

    def __getitem__(self, number: int) -> Any:
        return to_tensors(
            {"pixels": bare_pixels(self.batches[number % len(self.batches)], self.size)}
        )


def compare_speed(prefix: Path, jitter: float, options: DataOptions) -> list[Row]:
    """Milliseconds of a micro-batch.

    The bare loop is told crops, flips and factors, and has the files in memory. Ours draws them, draws masks, and reads
    the files through the index. The contenders ``..._worker`` are the same behind a loader with one worker, and need
    the wall clock.

    Raises:
        RuntimeError: pixels differ.
    """
    case = {"images": options.batch, "size": options.size, "color_jitter": jitter}
    say(f"{case}")
    dataset = images_dataset(prefix, jitter, options)
    batches = [drawn_images(dataset, number, options) for number in range(4)]
    for number, drawn in enumerate(batches):
        ours = dataset[number]["images"]["pixels"].numpy()
        if not np.array_equal(ours, bare_pixels(drawn, options.size)):
            raise RuntimeError(f"the pixels of micro-batch {number} differ in {case}")
    clock = CLOCKS[options.clock]

    def timed(make: Callable[[], object]) -> Work:
        def work() -> dict[str, float]:
            start = clock()
            make()
            return {"micro_batch": clock() - start}

        return work

    def in_process(make: Callable[[int], object]) -> Build:
        numbers = itertools.cycle(range(len(batches)))
        return ready(timed(lambda: make(next(numbers))))

    def behind_worker(source: Dataset[Any]) -> Build:
        @contextlib.contextmanager
        def build() -> Iterator[Work]:
            if options.clock == "cpu":
                raise NotRun("needs the wall clock")
            stream = iter(Loader(source, range(1 << 40), workers=1))
            yield timed(lambda: next(stream))

        return build

    contenders = [
        Contender("pillow", in_process(lambda number: bare_pixels(batches[number], options.size))),
        Contender("ours", in_process(dataset.__getitem__)),
        Contender("pillow_worker", behind_worker(_BarePixels(batches, options.size))),
        Contender("ours_worker", behind_worker(dataset)),
    ]
    return compare(
        case,
        contenders,
        reference="pillow",
        rounds=options.rounds,
        turn_seconds=options.turn_seconds,
        items=options.batch,
    )


# Memory


@dataclass(frozen=True)
class GeneratedTexts:
    """Stands for the index of any number of documents, and takes no memory: their lengths, 16 to 600, repeat.

    It has what `PackedTexts` reads of an `IndexedReader`.
    """

    num_sequences: int

    @cached_property
    def _pattern(self) -> npt.NDArray[np.int32]:
        return np.random.default_rng(2).integers(16, 601, _PATTERN, np.int32)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self._pattern, dtype=np.int64)])

    @property
    def sequence_lengths(self) -> GeneratedTexts:
        """Lengths by number, as an array would have them."""
        return self

    def __getitem__(self, sequences: Any) -> Any:
        return self._pattern[sequences % _PATTERN]

    def items_before(self, index: int) -> int:
        """As of `IndexedReader`."""
        whole, rest = divmod(index, _PATTERN)
        return whole * int(self._ends[-1]) + int(self._ends[rest])

    def sequence_slice(self, index: int, offset: int, length: int) -> npt.NDArray[np.uint16]:
        """As of `IndexedReader`; the tokens say which document and where in it."""
        if offset < 0 or offset + length > self[index]:
            raise IndexError(f"items {offset}..{offset + length} of sequence {index}")
        return ((index + np.arange(offset, offset + length)) % 60_000 + 5).astype(np.uint16)


class _Texts(Dataset[Any]):
    """Micro-batches of packed texts with the memory of the process that made them."""

    def __init__(self, documents: int, tables: SharedTables, max_table: int, batch: int) -> None:
        self.batch, self.before = batch, 0
        self.texts = PackedTexts(
            cast(IndexedReader, GeneratedTexts(documents)),
            range(documents),
            128,
            bos_id=0,
            eos_id=1,
            seed=1,
            dataset=7,
            tables=tables,
            identity="generated",
            max_table=max_table,
        )
        samples = self.texts.num_samples
        order = SampleOrder(samples, 1, dataset=7, tables=tables, max_table=max_table)
        self.order = BlendedOrder(Blend([Fraction(1)], 1), [order])

    def __getitem__(self, number: int) -> dict[str, Any]:
        # Of a worker: only now is it a process of its own.
        self.before = self.before or private_bytes()
        refs = [self.order.locate(n) for n in range(number * self.batch, (number + 1) * self.batch)]
        ids = np.stack([self.texts.sample(ref.epoch, ref.index)[0] for ref in refs])
        return {"ids": ids, "private": private_bytes() - self.before}


def private_bytes() -> int:
    """Memory of this process that no file backs, in bytes; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0


def worker_memory(documents: int, options: DataOptions) -> list[Row]:
    """Milliseconds until workers have started and made the first micro-batch, and how far a worker's memory has grown.

    Up to the limit of tables: each worker with its own (``tables_per_worker``), a run that makes the shared ones
    (``ours``), and one that finds them (``ours_again``). The index is generated, and the memory is what no file backs.

    Raises:
        RuntimeError: the contenders' tokens differ, where they have the same order.
    """
    case = {"documents": documents, "workers": options.workers}
    say(f"{case}")
    rows = []
    made: dict[str, list[npt.NDArray[Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        own = SharedTables(folder, _NO_TABLES_SHARED)
        shared = SharedTables(folder, smallest=1)
        for name, tables, limit in (
            ("tables_per_worker", own, _NO_TABLES_SHARED),
            ("ours", shared, MAX_TABLE),
            ("ours_again", shared, MAX_TABLE),
        ):
            row = Row(case, name)
            rows.append(row)
            try:
                if limit != MAX_TABLE:
                    # Both tables of the documents with what making them takes, and that of the samples.
                    memory_needed(options.workers * documents * (24 + 4 * 308 / 126) / 1e9)
                start = time.perf_counter()
                dataset = _Texts(documents, tables, limit, options.texts)
                keys = range(options.micro_batches * options.workers)
                private: list[int] = []
                made[name] = []
                for batch in Loader(dataset, keys, options.workers):
                    if not private:
                        row.rounds_ms.append(1e3 * (time.perf_counter() - start))
                    private.append(batch["private"])
                    made[name].append(batch["ids"])
                row.phases_ms["first_micro_batch"] = row.rounds_ms
                row.peak_mb = max(private) / 1e6
            except NotRun as reason:
                row.note = f"not run: {reason}"
    same = [made[row.contender] for row in rows if row.rounds_ms]
    if not np.array_equal(same[-1], same[-2]):
        raise RuntimeError(f"the order is not the same when a run starts again in {case}")
    if documents * 308 // 126 <= MAX_TABLE and not np.array_equal(same[0], same[-1]):
        raise RuntimeError(f"shared tables change the order in {case}")
    return rows
