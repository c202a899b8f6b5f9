"""Hand-made raw data of downstream tasks, and `tools/prepare_task.py` on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
import sentencepiece
from data_files import encoded, picture, tool

from megatron_vlmoe.data.manifest import check_dataset
from megatron_vlmoe.data.task_dataset import TaskDataset, TaskRow
from megatron_vlmoe.tokenizers.text import TextTokenizer


@dataclass(frozen=True)
class Desk:
    """A folder of raw data and what is made from it.

    Args:
        raw: the folder.
        out: prefix of what the tool writes.
        model: a tokenizer.
        capfd: catches what is printed.
    """

    raw: Path
    out: Path
    model: str
    capfd: pytest.CaptureFixture[str]

    def prepare(self, task: str, *options: str) -> int:
        """Runs the tool; its exit status."""
        words = ["--task", task, "--raw", str(self.raw), "--output", str(self.out)]
        words += [] if task == "imagenet" else ["--text-tokenizer", self.model]
        return tool("prepare_task")([*words, *options])

    def opened(self, split: str, task: str) -> TaskDataset:
        """The split, with all checksums verified and all tokens compared with the raw texts."""
        prefix, fingerprint = f"{self.out}_{split}", None
        check_dataset(prefix, task, checksums=True)
        if task != "imagenet":
            fingerprint = TextTokenizer(self.model).fingerprint
        data = TaskDataset.open(prefix, task, fingerprint)
        encode = sentencepiece.SentencePieceProcessor(model_file=self.model).encode
        texts = {text: raw for row in rows(data) for text, raw in zip(row.texts, row.raw)}
        assert sorted(texts) == list(range(data.num_texts))
        for text, words in texts.items():
            assert data.tokens(text).tolist() == encode(words)
        used = list(dict.fromkeys(image for row in rows(data) for image in row.images))
        assert used == list(range(data.num_images))  # each once, in order of first use
        return data

    def messages(self) -> str:
        """What was printed on stderr since the last call."""
        return self.capfd.readouterr().err

    def error(self) -> str:
        """The one error line of a run that failed."""
        (line,) = (e for e in self.messages().splitlines() if not e.endswith(" classes"))
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def put(path: Path, content: object) -> None:
    """Writes a file: bytes, text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def put_table(
    path: Path, columns: dict[str, list[Any]], classes: dict[str, list[str]] | None = None
) -> None:
    """Writes a table of Hugging Face: parquet, or for a name ending in .arrow an IPC stream.

    Args:
        path: the file.
        columns: values by column.
        classes: for columns of whole numbers the names that its schema tells.
    """
    table = pyarrow.table(columns)
    features = {
        name: {"names": names, "_type": "ClassLabel"} for name, names in (classes or {}).items()
    }
    if features:
        written = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": written})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table)


def rows(data: TaskDataset) -> list[TaskRow]:
    """All rows of a split."""
    return [data.row(i) for i in range(len(data))]


def ids(data: TaskDataset) -> list[str]:
    """Names of its samples."""
    return [row.id for row in rows(data)]


def stored_images(data: TaskDataset) -> list[bytes]:
    """Its image files."""
    return [data.image_bytes(i).tobytes() for i in range(data.num_images)]


def nlvr2_sentence(identifier: str, label: object, **more: Any) -> str:
    """A line of NLVR2's files."""
    row = {"sentence": "two stars", "label": label, "identifier": identifier, **more}
    return json.dumps(row) + "\n"


def write_nlvr2_images(folder: Path, stem: str) -> list[bytes]:
    """The two pictures of a pair."""
    found = [encoded(picture(len(stem) + side), "PNG") for side in (0, 1)]
    for side, data in enumerate(found):
        put(folder / f"{stem}-img{side}.png", data)
    return found


def write_nlvr2(raw: Path) -> list[bytes]:
    """Raw NLVR2 with three samples to train on; the two images of the pair that train and dev share in name."""
    train = [
        nlvr2_sentence("train-1-0-0", "True", directory=7),
        nlvr2_sentence("train-1-0-1", "False", directory=7),
        nlvr2_sentence("train-22-3-1", "True", directory=7, query="q"),
    ]
    put(raw / "data" / "train.json", "".join(train))
    put(raw / "data" / "dev.json", nlvr2_sentence("dev-1-0-0", "False"))
    put(raw / "data" / "test1.json", nlvr2_sentence("test1-1-0-0", "True") + "\n")
    found = write_nlvr2_images(raw / "images" / "train" / "7", "train-1-0")
    write_nlvr2_images(raw / "images" / "train" / "7", "train-22-3")
    write_nlvr2_images(raw / "images" / "dev", "dev-1-0")
    write_nlvr2_images(raw / "images" / "test1", "test1-1-0")
    return found
