"""What a shard of a task leaves: checked samples as they came from workers, for the run that numbers and writes them.

Samples share images, which are numbered by their first use in the whole split, so that a shard cannot be a dataset of
its own. ``PREFIX-00000-of-00004.results`` is a row of pickles; the JSON file beside it, written last, says what they
are.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vlmoe.config.errors import DataError
from megatron_vlmoe.runtime.files import StagedFile, write_text_atomic
from megatron_vlmoe.runtime.json_files import read_versioned
from megatron_vlmoe.runtime.sums import file_sha256

FORMAT_VERSION = 1
KIND = "shard of a task"
RESULTS = ".results"

# Nothing else is loaded, so that a file from elsewhere cannot run code. NumPy's are of labels of a plug-in's reader.
_KNOWN = {
    "megatron_vlmoe.prepare.tasks": {"CheckedChunk", "CheckedSample"},
    "megatron_vlmoe.prepare.readers.tasks.records": {"TaskSample"},
    "megatron_vlmoe.prepare.readers.records": {"ImageFile", "Reject"},
    "megatron_vlmoe.prepare.readers.images": {"BrokenTar"},
    "numpy": {"dtype"},
    "numpy._core.multiarray": {"scalar"},
    "numpy.core.multiarray": {"scalar"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"holds {module}.{name}")
        return super().find_class(module, name)


class ResultsWriter:
    """Writes ``PREFIX.results`` and ``PREFIX.json``. A context: without `publish` nothing is left."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._staged = StagedFile(f"{prefix}{RESULTS}")

    def add(self, result: Any) -> None:
        """Appends the result of one chunk."""
        self._staged.write(pickle.dumps(result, pickle.HIGHEST_PROTOCOL))

    def publish(self, content: dict[str, Any]) -> None:
        """Gives the files their names; ``content`` goes into the JSON file."""
        self._staged.finish()
        temporary = self._staged.temporary
        record = {"size": os.path.getsize(temporary), "sha256": file_sha256(temporary)}
        Path(f"{self._prefix}.json").unlink(missing_ok=True)
        self._staged.publish()
        about = {"format_version": FORMAT_VERSION, "kind": KIND, "files": {RESULTS: record}}
        text = json.dumps(about | content, indent=2, sort_keys=True) + "\n"
        write_text_atomic(f"{self._prefix}.json", text)

    def __enter__(self) -> ResultsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._staged.abort()


def read_about(prefix: str) -> dict[str, Any]:
    """The JSON file of a shard. Raises DataError: it is missing or damaged, or the results are of another size."""

    def make(raw: Any) -> dict[str, Any]:
        if raw["kind"] != KIND:
            raise ValueError(f"kind {raw['kind']!r}")
        record = raw["files"][RESULTS]
        path = f"{prefix}{RESULTS}"
        size = os.path.getsize(path) if os.path.exists(path) else 0
        if size != record["size"]:
            raise DataError(f"{path}: {size} bytes, but its manifest says {record['size']}")
        return dict(raw)

    return read_versioned(Path(f"{prefix}.json"), FORMAT_VERSION, KIND, "not found", make)


def read_results(prefix: str) -> Iterator[Any]:
    """The results of the chunks of one shard, in order. Raises DataError if the file is damaged."""
    path = f"{prefix}{RESULTS}"
    with open(path, "rb") as file:
        end = os.path.getsize(path)
        while file.tell() < end:
            try:
                result = _Unpickler(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
                raise DataError(f"{path}: damaged: {error}") from error
            yield result
