"""Indexing of texts, images and pairs beside bare loops that write the same files.

A bare loop reads, parses, tokenizes and decodes what ours does, and writes the same bytes, in one process. It looks for
no other errors than those that Pillow and SentencePiece raise, and has no checksums, list of rejects, progress,
manifest, syncs, or names that a file gets only when it is complete.
"""

from __future__ import annotations

import contextlib
import filecmp
import io
import itertools
import json
import os
import struct
import tempfile
from pathlib import Path
from typing import IO, Any, Callable, Iterator, Mapping, Sequence

import numpy as np
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from PIL import Image

from megatron_vlmoe.benchmarks.compare import CLOCKS, Contender, Row, Work, compare, ready, say
from megatron_vlmoe.benchmarks.options import PreprocessOptions
from megatron_vlmoe.benchmarks.photographs import photographs
from megatron_vlmoe.data.image_files import DEFAULT_RULES
from megatron_vlmoe.prepare.corpora import (
    PairOptions,
    preprocess_images,
    preprocess_pairs,
    preprocess_text,
)
from megatron_vlmoe.prepare.readers.pairs import PairInput
from megatron_vlmoe.prepare.readers.text import TextInput
from megatron_vlmoe.prepare.tool import Run
from megatron_vlmoe.tokenizers.text import TextTokenizerTraining, train_text_tokenizer

Index = Callable[[str], object]
"""Indexes the case's raw files into a path prefix."""

_TEXTS_AT_ONCE = 1024
_IMAGES_AT_ONCE = 16
_SYLLABLES = tuple(a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en"))


def run(options: PreprocessOptions) -> Iterator[list[Row]]:
    """Measures texts, images at each size, then pairs; a repetition indexes all records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer(folder, options)
        if options.texts:
            yield texts(folder, tokenizer, options)
        if options.images:
            write_images(folder / "images", options)
            for short in options.resize_short:
                yield images(folder, short, options)
            yield pairs(folder, tokenizer, options)


# Raw files


def sentences(count: int, words: int, seed: int) -> Iterator[str]:
    """Texts whose words are as unevenly frequent as those of a language."""
    rng = np.random.default_rng(seed)
    lexicon = ["".join(rng.choice(_SYLLABLES, rng.integers(1, 5))) for _ in range(5000)]
    for _ in range(count):
        chosen = np.minimum(rng.zipf(1.3, rng.integers(words // 2, 2 * words)), len(lexicon)) - 1
        yield " ".join(lexicon[number] for number in chosen) + "."


def make_tokenizer(folder: Path, options: PreprocessOptions) -> str:
    """Trains the tokenizer; returns its file."""
    training = TextTokenizerTraining(vocab_size=options.vocab_size, output_prefix=folder / "text")
    count = min(2000, max(100, options.texts))
    train_text_tokenizer(training, sentences(count, 50, seed=1))
    return str(folder / "text.model")


def write_images(folder: Path, options: PreprocessOptions) -> None:
    """A folder of JPEG files."""
    folder.mkdir()
    made = photographs(options.images, options.width, options.height, seed=2)
    for number, data in enumerate(made):
        (folder / f"{number:08d}.jpg").write_bytes(data)


# What is measured


def texts(folder: Path, tokenizer: str, options: PreprocessOptions) -> list[Row]:
    """Lines of JSON. ``megatron`` is the loop of Megatron-LM: a call of the tokenizer and a tensor for each text."""
    source = folder / "texts.jsonl"
    with open(source, "w") as file:
        for text in sentences(options.texts, options.words, seed=3):
            file.write(json.dumps({"text": text}) + "\n")
    case = {"kind": "text", "records": options.texts, "words": options.words}

    def bare(prefix: str) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        with bare_writer(f"{prefix}_text_document", np.uint16) as write, open(source) as lines:
            while some := list(itertools.islice(lines, _TEXTS_AT_ONCE)):
                encoded = processor.encode([json.loads(line)["text"].strip() for line in some])
                flat = list(itertools.chain.from_iterable(encoded))
                write(np.array(flat, np.uint16), [len(ids) for ids in encoded], [1] * len(encoded))

    def megatron(prefix: str) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        name = f"{prefix}_text_document"
        builder: Any = IndexedDatasetBuilder(f"{name}.bin", dtype=np.uint16)
        with open(source) as lines:
            for line in lines:
                ids = processor.encode(json.loads(line)["text"].strip())
                builder.add_document(torch.tensor(ids), [len(ids)])
        builder.finalize(f"{name}.idx")

    def ours(prefix: str) -> None:
        preprocess_text(TextInput((str(source),)), tokenizer, Run(prefix, 1, "stop", {}))

    contenders = {"bare": bare, "ours": ours, "megatron": megatron}
    return measured(case, contenders, ["text_document"], options.texts, options)


def images(folder: Path, short: int, options: PreprocessOptions) -> list[Row]:
    """A folder of JPEG files, decoded to see that they are whole; shrunk to a shorter side unless that is 0."""
    source = folder / "images"
    case = {"kind": "images", "records": options.images, "resize_short": short}

    def bare(prefix: str) -> None:
        with bare_writer(f"{prefix}_image", np.uint8) as write:
            for name in sorted(os.listdir(source)):
                data = bare_image((source / name).read_bytes(), short)
                write(np.frombuffer(data, np.uint8), [len(data)], [1])

    def ours(prefix: str) -> None:
        run = Run(prefix, 1, "stop", {})
        preprocess_images((str(source),), run, short or None, DEFAULT_RULES)

    contenders = {"bare": bare, "ours": ours}
    return measured(case, contenders, ["image"], options.images, options)


def pairs(folder: Path, tokenizer: str, options: PreprocessOptions) -> list[Row]:
    """A JSON list of captions and the files of their images, which are decoded to see that they are whole."""
    source, annotations = folder / "images", folder / "pairs.json"
    captions = sentences(options.images * options.captions, 10, seed=4)
    names = [name for name in sorted(os.listdir(source)) for _ in range(options.captions)]
    listed = [{"image": name, "caption": text} for name, text in zip(names, captions)]
    annotations.write_text(json.dumps(listed))
    case = {"kind": "pairs", "records": options.images, "captions": options.captions}

    def bare(prefix: str) -> None:
        processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        entries = json.loads(annotations.read_text())
        groups = itertools.groupby(entries, lambda entry: entry["image"])
        with (
            bare_writer(f"{prefix}_image", np.uint8) as write_image,
            bare_writer(f"{prefix}_text", np.uint16) as write_text,
        ):
            by_image = ((name, [e["caption"] for e in own]) for name, own in groups)
            while some := list(itertools.islice(by_image, _IMAGES_AT_ONCE)):
                encoded = processor.encode([text.strip() for _, own in some for text in own])
                for name, _ in some:
                    data = bare_image((source / name).read_bytes(), 0)
                    write_image(np.frombuffer(data, np.uint8), [len(data)], [1])
                flat = list(itertools.chain.from_iterable(encoded))
                counts = [len(own) for _, own in some]
                write_text(np.array(flat, np.uint16), [len(ids) for ids in encoded], counts)

    def ours(prefix: str) -> None:
        pair_input = PairInput("albef", (str(annotations),), str(source))
        preprocess_pairs(pair_input, tokenizer, Run(prefix, 1, "stop", {}), PairOptions())

    contenders = {"bare": bare, "ours": ours}
    return measured(case, contenders, ["image", "text"], options.images, options)


def bare_image(data: bytes, short: int) -> bytes:
    """The bytes to store of a JPEG file, which is decoded at an eighth of its size, or at what shrinking needs."""
    image = Image.open(io.BytesIO(data))
    if not short or min(image.size) <= short:
        image.draft(None, (1, 1))  # type: ignore[arg-type]
        image.load()
        return data
    factor = short / min(image.size)
    size = max(short, round(image.width * factor)), max(short, round(image.height * factor))
    image.draft(None, (2 * size[0], 2 * size[1]))  # type: ignore[arg-type]
    shrunk = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0)
    stream = io.BytesIO()
    shrunk.save(stream, "JPEG", quality=95)
    return stream.getvalue()


@contextlib.contextmanager
def bare_writer(name: str, dtype: Any) -> Iterator[Callable[..., None]]:
    """A function that appends documents: items, lengths of sequences, sequences per document.

    Lengths are kept in memory, and ``NAME.idx`` is written at the end.
    """
    lengths: list[int] = []
    counts: list[int] = [0]
    file: IO[bytes]
    with open(f"{name}.bin", "wb") as file:

        def write(items: Any, of_sequences: Sequence[int], of_documents: Sequence[int]) -> None:
            file.write(items.tobytes())
            lengths.extend(of_sequences)
            counts.extend(of_documents)

        yield write
    sizes = np.array(lengths, np.int64) * np.dtype(dtype).itemsize
    with open(f"{name}.idx", "wb") as file:
        code = {np.uint8: 1, np.uint16: 8}[dtype]
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(counts)))
        file.write(np.array(lengths, np.int32).tobytes())
        file.write((np.cumsum(sizes) - sizes).tobytes())
        file.write(np.cumsum(counts, dtype=np.int64).tobytes())


def measured(
    case: dict[str, Any],
    contenders: Mapping[str, Index],
    parts: Sequence[str],
    records: int,
    options: PreprocessOptions,
) -> list[Row]:
    """The rows of a case, of which ``bare`` is the reference.

    Raises:
        RuntimeError: a contender writes other files than the bare loop.
    """
    say(f"{case}")
    clock = CLOCKS[options.clock]
    with tempfile.TemporaryDirectory() as folder:

        def repetition(name: str) -> Work:
            def work() -> dict[str, float]:
                with contextlib.redirect_stderr(io.StringIO()):
                    start = clock()
                    contenders[name](f"{folder}/{name}")
                    return {"all": clock() - start}

            return work

        for name in contenders:
            repetition(name)()
        for name, part, suffix in itertools.product(contenders, parts, (".bin", ".idx")):
            expected, written = (f"{folder}/{one}_{part}{suffix}" for one in ("bare", name))
            if not filecmp.cmp(expected, written, shallow=False):
                raise RuntimeError(f"{name} writes another {part}{suffix} than bare in {case}")
        return compare(
            case,
            [Contender(name, ready(repetition(name))) for name in contenders],
            reference="bare",
            rounds=options.rounds,
            turn_seconds=options.turn_seconds,
            items=records,
        )
