"""Text tokenizer and class names of a run, checked against the model that they are for."""

from __future__ import annotations

from pathlib import Path

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.config.schema import RunConfig
from megatron_vlmoe.config.task_schema import FinetuneConfig
from megatron_vlmoe.data.task_labels import Labels, read_labels
from megatron_vlmoe.tokenizers.text import TextTokenizer


def open_text_tokenizer(path: str | Path, config: RunConfig, where: Path) -> TextTokenizer:
    """The text tokenizer of a model.

    Args:
        path: SentencePiece model.
        config: of the model's run.
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
