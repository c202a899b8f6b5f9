"""Files of a run folder that travel with its checkpoints: text tokenizer, class names, Hugging Face files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.task_labels import Labels, read_labels
from megatron_vlmoe.runtime.files import write_bytes_atomic
from megatron_vlmoe.tokenizers.text import TextTokenizer

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
    return os.path.isfile(os.path.join(location, HUGGING_FACE_FILE))


def open_text_tokenizer(path: str | Path, config: RunConfig, where: Path) -> TextTokenizer:
    """The text tokenizer of a model.

    Args:
        path: SentencePiece model.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: it is damaged, or has another number of pieces than the model.
    """
    try:
        tokenizer = TextTokenizer(path)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if tokenizer.size != config.model.vocab_size:
        raise ConfigError(
            f"text tokenizer {path} has {tokenizer.size} pieces, but the model of {where} has "
            f"{config.model.vocab_size}"
        )
    return tokenizer


def open_labels(path: str | Path, config: FinetuneConfig, where: Path) -> Labels:
    """The class names of a model; arguments as above.

    Raises:
        ConfigError: they are damaged, or not those that the model was trained on.
    """
    try:
        labels = read_labels(Path(path))
    except DataError as error:
        raise ConfigError(str(error)) from error
    same = config.task.labels_sha256 in ("", labels.sha256)
    if not same or len(labels.labels) != config.task.num_classes:
        raise ConfigError(f"{path}: its labels are not those that {where} was trained on")
    return labels
