"""Files of a run folder that travel with its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from megatron_vlmoe.runtime.files import write_bytes_atomic

TOKENIZER_FILE, LABELS_FILE = "text.model", "labels.json"
HUGGING_FACE_FILE = "config.json"


def run_file(checkpoint: Path, name: str) -> Optional[Path]:
    """A file of the run folder that a checkpoint lies in (RUN/iter_N, RUN/checkpoints/iter_N or RUN/best/iter_N)."""
    for folder in (checkpoint, *checkpoint.parents[:2]):
        if (folder / name).is_file():
            return folder / name
    return None


def keep_file(source: str | Path, run: str | Path, name: str) -> None:
    """Copies a file into a run folder; a source that is empty, missing or the copy itself leaves all as it is."""
    target = Path(run) / name
    if str(source) and Path(source).is_file() and Path(source).resolve() != target.resolve():
        write_bytes_atomic(target, Path(source).read_bytes())


def is_hugging_face(location: str | Path) -> bool:
    """Whether a folder is a Hugging Face folder (and no checkpoint)."""
    return (Path(location) / HUGGING_FACE_FILE).is_file()
