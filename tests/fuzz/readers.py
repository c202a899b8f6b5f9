"""What reads files that come from outside: how valid ones are made, and what is called with damaged ones.

Every reader is called as the command calls it that a user gives the file to. It may read the file, or raise a
`UserError`; see `engine.outcome_of`.
"""

from __future__ import annotations

import argparse
import bz2
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_files
import numpy as np
import yaml
from data_files import encoded, picture
from raw_tasks import put_table

from megatron_vlmoe.config.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """One reader.

    Args:
        name: of the reader.
        make: writes valid files into a folder, each kind in a folder of its own below it.
        read: reads the files of one of these folders.
        modules: names of the modules whose lines are counted.
        damaged: patterns of the files that are damaged; the others stay.
        tells_reason_alone: its errors do not name the file: who calls it does.
        few: cases in the tests of every day.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], None]
    modules: tuple[str, ...]
    damaged: tuple[str, ...] = ("*",)
    tells_reason_alone: bool = False
    few: int = 60


def write(folder: Path, **files: bytes | str) -> None:
    """Writes files; in the name of a keyword `__` stands for a point."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def only_file(folder: Path) -> Path:
    """The file of a folder with one."""
    return next(path for path in sorted(folder.iterdir()) if path.is_file())


def shared(folder: Path) -> Path:
    """A folder for what several readers need, given the one that the folders of valid files are in."""
    path = folder.parents[1] / "shared"
    path.mkdir(exist_ok=True)
    return path


def tokenizer_of(folder: Path) -> str:
    """A text tokenizer, made once."""
    path = shared(folder) / "text.model"
    if not path.is_file():
        data_files.write_tokenizer(path)
    return str(path)


# ---- indexed files


def make_index(root: Path) -> None:
    from megatron_vlmoe.data.indexed import IndexedWriter

    for kind in (np.uint8, np.uint16, np.int32):
        folder = root / np.dtype(kind).name
        folder.mkdir()
        with IndexedWriter(str(folder / "x"), kind) as writer:
            for size in (3, 1, 7):
                writer.add_document([np.arange(size, dtype=kind), np.arange(2, dtype=kind)])


def read_index(folder: Path) -> None:
    from megatron_vlmoe.data.indexed import IndexedReader

    reader = IndexedReader(str(folder / "x"))
    for index in range(min(reader.num_sequences, 40)):
        _ = int(reader.sequence(index).sum(dtype=np.int64)) + reader.items_before(index)
    for index in range(min(reader.num_documents, 40)):
        reader.document(index)
    reader.count_longer(3, range(reader.num_sequences))


def make_dataset(root: Path) -> None:
    from megatron_vlmoe.prepare.corpora import PairOptions, preprocess_pairs, preprocess_text
    from megatron_vlmoe.prepare.readers.pairs import PairInput
    from megatron_vlmoe.prepare.readers.text import TextInput
    from megatron_vlmoe.prepare.tool import Run

    source, tokenizer = root.parent / "source", tokenizer_of(root)
    write(source, a__txt="a red circle\na blue star\n")
    write(source / "images", a__jpg=encoded(picture(1)))
    write(source, p__jsonl=json.dumps({"image": "a.jpg", "caption": ["a star", "a red star"]}))
    told = {"command": "", "inputs": []}
    for name in ("text", "pairs"):
        (root / name).mkdir()
    text = Run(str(root / "text" / "x"), 1, "stop", told)
    preprocess_text(TextInput((str(source / "a.txt"),)), tokenizer, text)
    pairs = PairInput("jsonl", (str(source / "p.jsonl"),), str(source / "images"))
    preprocess_pairs(
        pairs, tokenizer, Run(str(root / "pairs" / "x"), 1, "stop", told), PairOptions()
    )


def read_dataset(folder: Path) -> None:
    from megatron_vlmoe.data.augment import decode_image
    from megatron_vlmoe.data.indexed import IndexedReader
    from megatron_vlmoe.data.manifest import (
        check_dataset,
        dataset_parts,
        load_manifest,
        part_prefix,
        unknown_line,
    )

    prefix = str(folder / "x")
    manifest = load_manifest(prefix)
    unknown_line(manifest)
    check_dataset(prefix, manifest.kind)
    for part in dataset_parts(manifest.kind):
        reader = IndexedReader(part_prefix(prefix, part))
        for index in range(min(reader.num_documents, 10)):
            for items in reader.document(index):
                if part == "image":
                    decode_image(items, f"{prefix}: image {index}")


def make_codes(root: Path) -> None:
    from megatron_vlmoe.data.codes import CodesManifest
    from megatron_vlmoe.data.indexed import IndexedWriter

    folder = root / "a"
    folder.mkdir()
    with IndexedWriter(str(folder / "x_codes"), np.int32) as writer:
        for flip in (0, 1):
            views = [np.array([0, 1, 20, 30, flip, 8, 1, 2, 3, 4], np.int32)] * 2
            writer.add_document(views)
        records = writer.finish()
    manifest = CodesManifest(2, 2, 8, 2, 5, "f" * 64, 99, 0, 0.2, 0.5, records)
    (folder / "x_codes.json").write_text(json.dumps(dataclasses.asdict(manifest)))


def read_codes(folder: Path) -> None:
    from megatron_vlmoe.data.codes import check_codes

    reader = check_codes(folder / "x", "f" * 64, 2, 2)
    for image, view in itertools.product(range(2), range(min(reader.manifest.num_views, 4))):
        reader.view(image, view)


def make_samples(root: Path) -> None:
    from megatron_vlmoe.prepare.readers.tasks.records import TaskInput
    from megatron_vlmoe.prepare.tasks import TaskOptions, prepare_task
    from megatron_vlmoe.prepare.tool import Run

    tokenizer = tokenizer_of(root)
    for task, place in (("mnli", "mnli"), ("vqa", "vqa")):
        raw = corpus_of(root) / "tasks" / place
        (root / task).mkdir()
        run = Run(str(root / task / "x"), 1, "stop", {"command": "", "inputs": []})
        given = TaskInput(task, str(raw), num_val_images=1, min_answer_count=1)
        prepare_task(given, run, TaskOptions(tokenizer))


def read_samples(folder: Path) -> None:
    from megatron_vlmoe.data.task_dataset import SamplesReader, TaskDataset, load_labels

    task = folder.name
    labels = load_labels(folder / "x")
    _ = labels.sha256
    (name, *_) = sorted(path.name.removesuffix("_samples.arrow") for path in folder.glob("*.arrow"))
    prefix = str(folder / name)
    # The table's checksum is in its manifest: without that look it must be refused or read as well.
    samples = SamplesReader(prefix, task)
    samples.check(10**6, 10**6)
    for index in range(min(samples.num_rows, 10)):
        samples.row(index)
    dataset = TaskDataset.open(prefix, task, None)
    for row in itertools.islice(dataset.rows(), 10):
        for text in row.texts:
            dataset.tokens(text)


# ---- raw text

SENTENCES = ("a red circle", "two stars under a square", "naïve “text” with 数字", "")


def table_of(columns: dict[str, list[Any]], kind: str) -> bytes:
    """A table as parquet, or as an Arrow file or stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, sink = pa.table(columns), io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=2)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue()


def json_lines(rows: Iterable[Any]) -> str:
    """Each as a line of JSON."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def make_text_lines(root: Path) -> None:
    write(root / "txt", a__txt="\n".join([*SENTENCES, "after a blank line"]))
    write(root / "jsonl", a__jsonl=json_lines({"text": s, "n": 1} for s in SENTENCES))
    write(root / "csv", a__csv='id,text\n1,a star\n2,"two, or ""three"""\n')
    write(root / "tsv", a__tsv="id\ttext\n1\ta star\n2\ttwo\n")
    lines = json_lines({"text": s} for s in SENTENCES).encode()
    write(root / "gz", a__jsonl__gz=gzip.compress(lines))
    write(root / "bz2", a__jsonl__bz2=bz2.compress(lines))


def make_text_json(root: Path) -> None:
    write(root / "list", a__json=json.dumps([{"text": s} for s in SENTENCES]))
    write(root / "strings", a__json=json.dumps(SENTENCES))
    write(root / "object", a__json=json.dumps({"text": "a star"}, indent=1))
    captions = {"images": COCO["images"], "annotations": COCO["annotations"], "text": "a"}
    write(root / "coco", a__json=json.dumps(captions, indent=1))


def make_text_tables(root: Path) -> None:
    columns = {"id": [1, 2, 3, 4], "text": list(SENTENCES)}
    for kind, suffix in (("parquet", "parquet"), ("file", "arrow"), ("stream", "arrow")):
        write(root / kind, **{f"a__{suffix}": table_of(columns, kind)})


def read_text_file(folder: Path) -> None:
    from megatron_vlmoe.prepare.readers.records import Reject
    from megatron_vlmoe.prepare.readers.text import (
        TextInput,
        block_texts,
        read_text,
        read_training_texts,
    )

    path = str(only_file(folder))
    first: DataError | None = None
    for documents in ("line", "blank-line", "lines:2"):
        try:
            for block in read_text(TextInput((path,), documents=documents)):
                _ = str(block) if isinstance(block, Reject) else block_texts(block)
        except DataError as error:
            first = first or error
    with contextlib.suppress(DataError):
        if first is None:
            for text in read_training_texts((path,)):
                str(text)
    for _ in read_training_texts((path,)):
        pass
    if first is not None:
        raise first


# ---- captioned images

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "id": 7, "caption": "a star"}, {"image_id": 2, "caption": "b"}],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filename": name,
            "split": split,
            "imgid": number,
            "sentences": [{"raw": "a star", "imgid": number, "tokens": ["a"]}],
        }
        for number, (name, split) in enumerate((("a.jpg", "train"), ("b.png", "restval")))
    ],
}
GENOME = [
    {"id": 1, "regions": [{"image_id": 1, "region_id": 4, "phrase": "a star", "x": 0, "y": 1}]},
    {"id": 2, "regions": []},
]
RECORDS = [
    {"image": "a.jpg", "caption": "a star", "split": "train"},
    {"image": "b.png", "caption": ["a", "b"], "split": "restval"},
]
LISTED = {
    "coco": ("a__json", json.dumps(COCO)),
    "karpathy": ("a__json", json.dumps(KARPATHY)),
    "visual-genome": ("a__json", json.dumps(GENOME)),
    "sbu": ("a__json", json.dumps([["a.jpg", "a star"], ["b.png", "two"]])),
    "sbu-urls": (
        "a__json",
        json.dumps({"image_urls": ["http://x/a.jpg", "http://x/b.png"], "captions": ["a", "b"]}),
    ),
    "cc3m": ("a__tsv", "a star\thttp://x/a.jpg\ntwo\thttps://x/b.png\n"),
    "flickr30k": ("a__token", "a.jpg#0\ta star\na.jpg#1\tred\nb.png#0\ttwo\n"),
    "albef": ("a__json", json.dumps(RECORDS)),
    "jsonl": ("a__jsonl", json_lines(RECORDS)),
    "csv": ("a__csv", 'image,caption\na.jpg,a star\nb.png,"two, or three"\n'),
}


def make_listed(*names: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        tokenizer_of(root)
        for name in names:
            key, content = LISTED[name]
            write(root / name, **{key: content})
            jpg, png = encoded(picture(1, 16, 8)), encoded(picture(2, 8, 8), "PNG")
            write(root / name / "images", a__jpg=jpg, b__png=png, **{"1__jpg": jpg, "2__png": png})

    return make


def make_pair_tables(root: Path) -> None:
    tokenizer_of(root)
    picture_bytes = {"bytes": encoded(picture(3, 8, 8)), "path": "x.jpg"}
    columns = {"image": [picture_bytes] * 2, "caption": [["a star"], ["b", "c"]]}
    for kind, suffix in (("parquet", "parquet"), ("file", "arrow"), ("stream", "arrow")):
        write(root / kind, **{f"a__{suffix}": table_of({**columns, "split": ["train"] * 2}, kind)})
        (root / kind / "images").mkdir()


def tar_of(members: dict[str, bytes]) -> bytes:
    """A tar."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def make_shards(root: Path) -> None:
    tokenizer_of(root)
    jpg = encoded(picture(1, 16, 8))
    described = json.dumps({"caption": "two", "url": "http://x"}).encode()
    shard = tar_of({"0.jpg": jpg, "0.txt": b"a star", "1.png": jpg, "1.json": described})
    write(root / "tar", a__tar=shard)
    write(root / "gz", a__tar__gz=gzip.compress(shard))


def read_listed(folder: Path) -> None:
    from megatron_vlmoe.prepare.corpora import CheckPairs, PairOptions
    from megatron_vlmoe.prepare.readers.pair_formats import read_pairs
    from megatron_vlmoe.prepare.readers.pairs import PairInput
    from megatron_vlmoe.prepare.readers.records import PassedOver

    images, path = folder / "images", str(only_file(folder))
    check = CheckPairs(tokenizer_of(folder.parent), PairOptions(resize_short=4))
    given = PairInput("auto", (path,), str(images) if images.is_dir() else None)
    errors: list[DataError] = []
    forms = ["auto"] + [folder.name] * (folder.name in LISTED)
    for form in forms:
        try:
            items = read_pairs(dataclasses.replace(given, format=form))
            kept = [item for item in items if not isinstance(item, PassedOver)]
            for reject in check(kept).rejects:
                _ = str(reject)
        except DataError as error:
            errors.append(error)
    if len(errors) == len(forms):
        raise errors[0]


# ---- images


def make_image_tars(root: Path) -> None:
    jpg, png = encoded(picture(1, 16, 8)), encoded(picture(2, 8, 8), "PNG")
    inner = tar_of({"n01/a.JPEG": jpg, "n01/b.png": png, "c.gif": png})
    write(root / "tar", a__tar=inner)
    write(root / "nested", a__tar=tar_of({"n01.tar": inner, "x.jpg": jpg}))
    write(root / "gz", a__tar__gz=gzip.compress(inner))


def read_image_inputs(folder: Path) -> None:
    from megatron_vlmoe.data.image_files import DEFAULT_RULES
    from megatron_vlmoe.prepare.corpora import CheckImages
    from megatron_vlmoe.prepare.readers.images import read_images
    from megatron_vlmoe.prepare.readers.records import PassedOver

    items = read_images((str(only_file(folder)),))
    kept = [item for item in itertools.islice(items, 1000) if not isinstance(item, PassedOver)]
    for item in CheckImages(4, DEFAULT_RULES)(kept):
        _ = item if isinstance(item, bytes) else str(item)


def make_pictures(root: Path) -> None:
    image = picture(4, 24, 16)
    grey, alpha = image.convert("L"), image.convert("RGBA")
    exif = image.getexif()
    exif[274] = 6
    for name, content in {
        "a__jpg": encoded(image, exif=exif.tobytes()),
        "progressive__jpg": encoded(image, progressive=True),
        "cmyk__jpg": encoded(image.convert("CMYK")),
        "a__png": encoded(alpha, "PNG"),
        "palette__png": encoded(image.convert("P"), "PNG"),
        "deep__png": encoded(grey.convert("I;16"), "PNG"),
        "a__webp": encoded(alpha, "WEBP"),
        "lossless__webp": encoded(image, "WEBP", lossless=True),
        "a__gif": encoded(image, "GIF"),
        "a__bmp": encoded(image, "BMP"),
        "a__tif": encoded(image, "TIFF"),
        "deflate__tif": encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        "float__tif": encoded(grey.convert("F"), "TIFF"),
        "a__ppm": encoded(image, "PPM"),
        "a__jp2": encoded(image, "JPEG2000"),
        "a__ico": encoded(image, "ICO"),
        "a__pcx": encoded(image, "PCX"),
        "a__tga": encoded(image, "TGA"),
        "a__sgi": encoded(image, "SGI"),
        "a__avif": encoded(image, "AVIF"),
    }.items():
        write(root / name.replace("__", "-"), **{name: content})


def read_picture(folder: Path) -> None:
    """As indexing does, as a model's inputs, and as training reads what it finds stored."""
    from megatron_vlmoe.data.augment import decode_image
    from megatron_vlmoe.data.image_files import (
        ImageRules,
        begins_like_image,
        quiet_pillow,
        read_image_file,
    )
    from megatron_vlmoe.prepare.corpora import checked_image

    data = only_file(folder).read_bytes()
    begins_like_image(data[:32])
    first: DataError | None = None
    with quiet_pillow():
        for short, rules in (
            (None, ImageRules()),
            (4, ImageRules()),
            (None, ImageRules("keep", "drop")),
        ):
            try:
                stored = checked_image(data, short, rules)
            except DataError as error:
                first = first or error
            else:
                # What indexing has taken, training must be able to read.
                decode_image(stored, "stored")
    with contextlib.suppress(DataError):
        decode_image(data, "where")
    read_image_file(data)
    if first is not None:
        raise first


# ---- raw data of tasks


def corpus_of(root: Path) -> Path:
    """A sample corpus, made once, with few records in every file and small pictures: each is read in every case."""
    from megatron_vlmoe.sample_corpus.writer import SampleCorpus, make_sample_corpus

    output = shared(root) / "corpus"
    if not output.is_dir():
        make_sample_corpus(SampleCorpus(output=output, num_images=4, seed=3))
        for path in sorted((output / "tasks").rglob("*.*")):
            _shorten(path)
    return output


def _shorten(path: Path, records: int = 3) -> None:
    """Leaves a few records of a file of a task, one of each split where records name one; makes a picture small."""
    if path.suffix in (".jpg", ".jpeg", ".JPEG", ".png"):
        path.write_bytes(encoded(picture(1, 8, 8), "PNG" if path.suffix == ".png" else "JPEG"))
    elif path.suffix == ".tsv" or path.parent.parent.name == "nlvr2":
        path.write_text("".join(path.read_text().splitlines(keepends=True)[: records + 1]))
    elif path.suffix == ".json" and isinstance(content := json.loads(path.read_bytes()), dict):
        for name, rows in content.items():
            if isinstance(rows, list) and path.name.startswith("dataset_"):
                splits = {row["split"]: row for row in rows}
                content[name] = list(splits.values())
            elif isinstance(rows, list):
                content[name] = rows[:: max(1, len(rows) // records)][:records]
        path.write_text(json.dumps(content))


def make_task(task: str, place: str) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        tokenizer_of(root)
        shutil.copytree(corpus_of(root) / "tasks" / place, root / task)

    return make


def make_task_tables(root: Path) -> None:
    tokenizer_of(root)
    image = {"bytes": encoded(picture(3, 8, 8)), "path": "x.jpg"}
    answers = [[{"answer": "yes", "answer_confidence": "yes", "answer_id": 1}] * 10] * 2
    columns: dict[str, dict[str, list[Any]]] = {
        "mnli": {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 2]},
        "vqa": {
            "question_id": [1, 2],
            "image_id": [1, 1],
            "question": ["a?", "b?"],
            "multiple_choice_answer": ["yes", "yes"],
            "answers": answers,
            "image": [image, image],
        },
        "nlvr2": {
            "identifier": ["train-1-0-0", "train-1-0-1"],
            "sentence": ["a", "b"],
            "left_image": [image, image],
            "right_image": [image, image],
            "label": ["True", "False"],
        },
        "imagenet": {"image": [image, image], "label": [0, 1]},
        "retrieval": {
            "image": [image, image],
            "caption": [["a"], ["b"]],
            "split": ["train", "test"],
        },
    }
    for task, values in columns.items():
        classes = {"label": ["n01", "n02"]} if task == "imagenet" else None
        for split in ("train", "validation", "test"):
            path = root / task / "data" / f"{split}-00000-of-00001.parquet"
            put_table(path, values, classes)


def read_task(folder: Path) -> None:
    from megatron_vlmoe.config.tasks import find_task, load_code
    from megatron_vlmoe.prepare.readers.records import LeftOut
    from megatron_vlmoe.prepare.readers.tasks.records import TaskInput
    from megatron_vlmoe.prepare.tasks import CheckSamples, TaskOptions, sample_chunks

    task = folder.name
    spec = find_task(task)
    given = TaskInput(task, str(folder), num_val_images=1, min_answer_count=1)
    source = load_code(spec.reader, task)(given)
    splits = source.splits()
    streams = [source.read(split) for split in splits]
    labels = source.labels
    model = tokenizer_of(folder.parent) if spec.texts else None
    check = CheckSamples(task, TaskOptions(model, 4), len(labels.labels) if labels else 0)
    for stream in streams:
        items = (item for item in itertools.islice(stream, 8) if not isinstance(item, LeftOut))
        for chunk in sample_chunks(items, 16, spec.shared_images):
            for item in check(chunk).items:
                _ = str(item)
    _ = source.fallback_answer


# ---- models


def make_hugging_face(root: Path) -> None:
    import small_checkpoints as small

    from megatron_vlmoe.convert.hf_config import export_config
    from megatron_vlmoe.data.task_labels import Labels
    from megatron_vlmoe.tokenizers.text import TextTokenizer

    tokenizer = TextTokenizer(tokenizer_of(root))
    for name in ("uneven-pools", "imagenet", "vqa"):
        config = small.CONFIGS[name]
        model = dataclasses.replace(config.model, vocab_size=tokenizer.size)
        config = dataclasses.replace(config, model=model)
        folder = small.save_hugging_face(root / name, config, small.random_tensors(config))
        classes = small.CLASSES.get(name, 0)
        labels = Labels(name, tuple(f"n{i}" for i in range(classes))) if classes else None
        (folder / "config.json").write_text(json.dumps(export_config(config, tokenizer, labels)))
        (folder / "SHA256SUMS").write_text("")
        shutil.copy(tokenizer.model_path, folder / "sentencepiece.model")


def read_hugging_face(folder: Path) -> None:
    from megatron_vlmoe.convert.importing import HuggingFaceModel

    model = HuggingFaceModel(folder)
    for tensor in model.tensors.values():
        tensor.read()


def make_checkpoint(root: Path) -> None:
    import small_checkpoints as small

    for name in ("dense", "mnli"):
        config = small.CONFIGS[name]
        small.save(root / name, config, small.random_tensors(config))


def read_checkpoint(folder: Path) -> None:
    from megatron_vlmoe.convert.checkpoints import CheckpointReader

    reader = CheckpointReader(folder)
    _ = reader.train_state
    for tensor in reader.tensors.values():
        tensor.read()


def make_public(root: Path) -> None:
    import public_states as public
    import torch

    sizes = dataclasses.replace(public.SMALL, depth=2, width=16, inner=24)
    for family, shapes in (
        ("vlmo", public.vlmo_shapes(sizes)),
        ("beit2", public.beit2_shapes(sizes)),
        ("beit3", public.beit3_shapes(sizes)),
    ):
        folder = root / family
        folder.mkdir()
        state = public.filled(shapes)
        arguments = argparse.Namespace(model="x", lr=1.0)
        public.save(folder / "x.pt", state, args=arguments, counts=OrderedDict(a=1))
    # As torch wrote before 1.6.
    (root / "legacy").mkdir()
    torch.save(state, root / "legacy" / "x.pt", _use_new_zipfile_serialization=False)


def read_public(folder: Path) -> None:
    from megatron_vlmoe.convert.public.command import import_public
    from megatron_vlmoe.convert.public.planner import ImportOptions

    family = "beit3" if folder.name == "legacy" else folder.name
    given: Any = {
        "family": family,
        "source": folder / "x.pt",
        "text_length": 10,
        "pair_text_length": 8,
        # What is known of public models does not hold for small ones.
        "num_vl_layers": 1,
        "num_attention_heads": 4 if family == "beit3" else None,
    }
    import_public(ImportOptions(**given), folder / "out", strict=False, write=False)


def make_deepspeed(root: Path) -> None:
    import public_states as public

    sizes = dataclasses.replace(public.SMALL, depth=2, width=16, inner=24)
    state = public.with_experts(public.filled(public.vlmo_shapes(sizes)), {1: 2}, "text imag")
    public.write_deepspeed(root / "vlmo" / "global_step2", state)
    (root / "vlmo" / "latest").write_text("global_step2")


def read_deepspeed_folder(folder: Path) -> None:
    from megatron_vlmoe.convert.public.torch_files import read_deepspeed

    for tensor in read_deepspeed(folder).tensors.values():
        tensor.read()


def make_image_tokenizer(root: Path) -> None:
    import torch

    from megatron_vlmoe.tokenizers.vqkd.config import build_preset
    from megatron_vlmoe.tokenizers.vqkd.model import build_model, save_vqkd

    config = build_preset("tiny", image_size=16, patch_size=8, width=8, num_heads=2, num_codes=6)
    model = build_model(dataclasses.replace(config, code_dim=4), 0)
    with torch.no_grad():
        model.quantizer.codebook.copy_(torch.eye(6)[:, :4] + 1)
    (root / "folder").mkdir()
    save_vqkd(root / "folder", model, {})
    import test_vqkd_official as official

    shapes = {**official.SMALL, "width": 64, "depth": 1, "decoder_depth": 1}
    weights = {
        name: 0.2 * torch.ones(shape) for name, shape in official.published_shapes(**shapes).items()
    }
    key = "quantize.embedding.weight"
    weights[key] = torch.nn.functional.normalize(weights[key], dim=1)
    (root / "official").mkdir()
    official.write(root / "official" / "x.pth", weights, process_type="default")


def read_image_tokenizer(folder: Path) -> None:
    import torch

    from megatron_vlmoe.tokenizers.image import ImageTokenizer

    path = folder if folder.name == "folder" else folder / "x.pth"
    tokenizer = ImageTokenizer.from_pretrained(path)
    size = tokenizer.image_size
    if size <= 64:
        tokenizer.encode(torch.zeros(1, 3, size, size))


def make_text_tokenizer(root: Path) -> None:
    for name in ("ours", "fairseq"):
        (root / name).mkdir()
        shutil.copy(tokenizer_of(root), root / name / "x.model")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "##s", "star"]
    write(root / "wordpiece", vocab__txt="\n".join(pieces) + "\n")


def read_text_tokenizer(folder: Path) -> None:
    from megatron_vlmoe.convert.public.vocabulary import fairseq_rows, wordpiece_rows
    from megatron_vlmoe.tokenizers.text import TextTokenizer

    if folder.name == "ours":
        tokenizer = TextTokenizer(folder / "x.model")
        ids = tokenizer.encode("a red star [MASK] 数 ﷺ")
        _ = tokenizer.decode(ids), tokenizer.fingerprint, tokenizer.is_unknown(ids)
        return
    ours = TextTokenizer(tokenizer_of(folder.parent))
    if folder.name == "fairseq":
        fairseq_rows(ours, folder / "x.model")
    else:
        wordpiece_rows(ours, folder / "vocab.txt")


# ---- settings and results


def make_configs(root: Path) -> None:
    from megatron_vlmoe.config.presets import preset

    # Every option, a section in each file: YAML is read slowly.
    for section, options in dataclasses.asdict(preset("base-32e")).items():
        write(root / section, x__yaml=plain_yaml({section: options}))
    for name in ("vmoe", "contrastive", "limoe"):
        write(root / name, x__yaml=(ROOT / f"examples/configs/{name}.yaml").read_text())


def plain_yaml(value: Any) -> str:
    """YAML without tuples."""
    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False)


def read_config_file(folder: Path) -> None:
    from megatron_vlmoe.config.command_line import merge_file, parse_run
    from megatron_vlmoe.config.task_schema import FinetuneConfig

    path = folder / "x.yaml"
    with contextlib.suppress(ConfigError):
        merge_file(FinetuneConfig(), path)
    parse_run("pretrain", ["--config", str(path)])


STUDY = """
title: First come, first served
runs:
  - {label: paper, experts: 8e}
  - {label: other, experts: 16e, options: {moe.batch_priority: false}, tasks: [nlvr2], finetune: {train.steps: 2}}
scores: [nlvr2/dev/accuracy]
columns: [mlm, mim, vlm, dropped, load_max]
panels:
  - {kind: curve, metrics: [mim], x: flops}
  - {kind: values, metrics: [dropped_vision]}
claims:
  - text: Priority lowers the MIM loss
    source: this file
    parts: [{below: [mim, paper, other]}]
"""


def make_studies(root: Path) -> None:
    write(root / "small", x__yaml=STUDY)


def read_study_file(folder: Path) -> None:
    from megatron_vlmoe.analysis.studies.study import read_study

    read_study(folder / "x.yaml", ("small", "base"), ("mnli", "nlvr2"))


def make_runs(root: Path) -> None:
    from megatron_vlmoe.config.presets import preset

    rows = [{"step": s, "loss/total": 3.0 / s, "lr": 1e-3, "eval/mlm": 2.0} for s in (1, 2, 3)]
    scores = {"task": "mnli", "metrics": {"dev/accuracy": 81.5, "dev/samples": 100}}
    scores |= {"settings": {"checkpoint": ""}, "left_out": {"dev": 0}}
    whole = dataclasses.asdict(preset("base-32e"))
    config = plain_yaml({name: whole[name] for name in ("model", "moe", "train")})
    write(root / "run", metrics__jsonl=json_lines(rows), config__yaml=config)
    write(root / "task", metrics__json=json.dumps(scores), config__yaml=config)


def read_run(folder: Path) -> None:
    from megatron_vlmoe.analysis.report import make_report, open_runs
    from megatron_vlmoe.finetune.metrics import guessing_rate

    make_report(open_runs([str(folder)]), guessing_rate)


def make_records(root: Path) -> None:
    write(
        root / "jsonl", x__jsonl=json_lines([{"text": "a", "id": 1}, {"text": "b", "image": "c"}])
    )
    write(root / "gz", x__jsonl__gz=gzip.compress(json_lines([{"text": "a"}]).encode()))


def read_prediction_records(folder: Path) -> None:
    from megatron_vlmoe.inference.records import read_records

    for record in read_records(only_file(folder)):
        with contextlib.suppress(DataError):
            record.check("mnli")


def make_captions(root: Path) -> None:
    jpg = encoded(picture(1, 16, 8))
    write(root / "lines", a__txt="a star\ntwo stars\n")
    write(root / "named", a__txt="a.jpg\ta star\nb.jpg\ttwo\n")
    write(root / "jsonl", a__jsonl=json_lines([{"caption": "a star"}, {"caption": "two"}]))
    for folder in list(root.iterdir()):
        write(folder / "images", a__jpg=jpg, b__jpg=jpg)


def read_captions(folder: Path) -> None:
    from megatron_vlmoe.analysis.routing_inputs import find_sources

    path, images = str(only_file(folder)), str(folder / "images")
    errors = []
    for given in (images, None):
        try:
            find_sources(given, path).choose(5, 0)
        except DataError as error:
            errors.append(error)
    if len(errors) == 2:
        raise errors[0]


def _listed_readers() -> Iterator[Reader]:
    modules = (
        "megatron_vlmoe.prepare.readers.pair_formats",
        "megatron_vlmoe.prepare.readers.pairs",
        "megatron_vlmoe.prepare.readers.files",
    )
    annotations = ("a.*",)
    for name in ("coco", "karpathy", "visual-genome", "cc3m", "flickr30k", "albef", "jsonl", "csv"):
        yield Reader(f"pairs-{name}", make_listed(name), read_listed, modules, annotations)
    yield Reader("pairs-sbu", make_listed("sbu", "sbu-urls"), read_listed, modules, annotations)
    tables = (*modules, "megatron_vlmoe.prepare.readers.tables")
    yield Reader("pairs-tables", make_pair_tables, read_listed, tables)
    archives = (*modules, "megatron_vlmoe.prepare.readers.images")
    yield Reader("pairs-webdataset", make_shards, read_listed, archives)


def _task_readers() -> Iterator[Reader]:
    where = "megatron_vlmoe.prepare.readers.tasks"
    lists = ("*.json", "*.tsv", "*.txt", "*.jsonl")
    for task, place, module in (
        ("vqa", "vqa", "vqa"),
        ("nlvr2", "nlvr2", "sentences"),
        ("mnli", "mnli", "sentences"),
        ("retrieval", "flickr30k", "retrieval"),
        ("imagenet", "imagenet", "imagenet"),
    ):
        make = make_task(task, place)
        yield Reader(f"task-{task}", make, read_task, (f"{where}.{module}",), lists, few=10)
    modules = tuple(f"{where}.{name}" for name in ("vqa", "sentences", "retrieval", "imagenet"))
    yield Reader("task-tables", make_task_tables, read_task, modules)


_TEXT_MODULES = ("megatron_vlmoe.prepare.readers.text", "megatron_vlmoe.prepare.readers.files")
_PUBLIC = "megatron_vlmoe.convert.public"

READERS: tuple[Reader, ...] = (
    Reader("index", make_index, read_index, ("megatron_vlmoe.data.indexed",)),
    Reader(
        "dataset",
        make_dataset,
        read_dataset,
        ("megatron_vlmoe.data.manifest", "megatron_vlmoe.data.indexed"),
    ),
    Reader("codes", make_codes, read_codes, ("megatron_vlmoe.data.codes",)),
    Reader(
        "samples",
        make_samples,
        read_samples,
        ("megatron_vlmoe.data.task_dataset", "megatron_vlmoe.data.task_labels"),
        few=30,
    ),
    Reader("text-lines", make_text_lines, read_text_file, _TEXT_MODULES),
    Reader("text-json", make_text_json, read_text_file, _TEXT_MODULES),
    Reader(
        "text-tables",
        make_text_tables,
        read_text_file,
        (*_TEXT_MODULES, "megatron_vlmoe.prepare.readers.tables"),
    ),
    *_listed_readers(),
    Reader(
        "image-tars", make_image_tars, read_image_inputs, ("megatron_vlmoe.prepare.readers.images",)
    ),
    Reader(
        "pictures",
        make_pictures,
        read_picture,
        (
            "megatron_vlmoe.data.image_files",
            "megatron_vlmoe.convert.hf.images_vlmoe",
            "megatron_vlmoe.prepare.corpora",
        ),
        tells_reason_alone=True,
    ),
    *_task_readers(),
    Reader(
        "hf-folder",
        make_hugging_face,
        read_hugging_face,
        ("megatron_vlmoe.convert.hf_config", "megatron_vlmoe.convert.tensors"),
        few=4,
    ),
    Reader(
        "checkpoint",
        make_checkpoint,
        read_checkpoint,
        (
            "megatron_vlmoe.convert.checkpoints",
            "megatron_vlmoe.train.checkpoint_files",
            "megatron_vlmoe.runtime.torch_files",
        ),
        few=10,
    ),
    Reader(
        "public-weights",
        make_public,
        read_public,
        (f"{_PUBLIC}.torch_files", f"{_PUBLIC}.planner"),
        few=20,
    ),
    Reader("deepspeed", make_deepspeed, read_deepspeed_folder, (f"{_PUBLIC}.torch_files",), few=10),
    Reader(
        "image-tokenizer",
        make_image_tokenizer,
        read_image_tokenizer,
        ("megatron_vlmoe.tokenizers.image", "megatron_vlmoe.tokenizers.vqkd.model"),
    ),
    Reader(
        "text-tokenizer",
        make_text_tokenizer,
        read_text_tokenizer,
        ("megatron_vlmoe.tokenizers.text", f"{_PUBLIC}.vocabulary"),
    ),
    Reader(
        "config", make_configs, read_config_file, ("megatron_vlmoe.config.command_line",), few=5
    ),
    Reader("study", make_studies, read_study_file, ("megatron_vlmoe.analysis.studies.study",)),
    Reader(
        "run-folder",
        make_runs,
        read_run,
        ("megatron_vlmoe.analysis.report", "megatron_vlmoe.analysis.plots"),
        few=5,
    ),
    Reader("records", make_records, read_prediction_records, ("megatron_vlmoe.inference.records",)),
    Reader("captions", make_captions, read_captions, ("megatron_vlmoe.analysis.routing_inputs",)),
)
