"""Training of the SentencePiece text tokenizer: a bounded, seeded sample of texts."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.runtime.files import write_bytes_atomic, write_text_atomic
from megatron_vlmoe.tokenizers.text import (
    BOS_PIECE,
    EOS_PIECE,
    MASK_PIECE,
    PAD_PIECE,
    SPECIAL_PIECES,
    UNK_PIECE,
)

MAX_SENTENCE_CHARACTERS = 1000
"""Longer lines are cut at white space: SentencePiece silently drops lines beyond 4192 bytes."""

SMALL_LEXICON = 20_000
"""Number of distinct words up to which `whole_word_hints` are added to the sample."""


@dataclass(frozen=True, kw_only=True)
class TextTokenizerTraining:
    """How to train; the same values and texts give the same model, byte for byte."""

    vocab_size: int
    """Number of pieces, the five special ones included."""
    output_prefix: Path
    """Writes PREFIX.model and PREFIX.vocab."""
    character_coverage: float = 0.9995
    """Fraction of the characters seen that get a piece; the others are unknown."""
    byte_fallback: bool = False
    """Spell unknown characters as UTF-8 bytes (256 more pieces) instead of ``<unk>``."""
    max_sentences: int = 2_000_000
    """Sample size; what bounds the memory (at most 1,000 characters each)."""
    seed: int = 0
    """Of the sample."""
    num_threads: int = 1
    """The model depends on it: sums are formed in another order."""

    def validate(self) -> None:
        """Raises ValueError on values that cannot work."""
        if self.vocab_size <= len(SPECIAL_PIECES):
            raise ConfigError(
                f"vocab_size must be above {len(SPECIAL_PIECES)} (the special pieces), "
                f"got {self.vocab_size}"
            )
        if not 0.0 < self.character_coverage <= 1.0:
            raise ConfigError(
                f"character_coverage must be in (0, 1], got {self.character_coverage}"
            )
        for name in ("max_sentences", "num_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


def train_text_tokenizer(training: TextTokenizerTraining, texts: Iterable[str]) -> int:
    """Trains a unigram model and writes PREFIX.model and PREFIX.vocab.

    Args:
        training: how.
        texts: what on; read once.

    Returns:
        The vocabulary size, below ``vocab_size`` where the corpus cannot fill it.

    Raises:
        ValueError: bad option, no text, or a corpus that SentencePiece refuses.
    """
    training.validate()
    sentences = sample_sentences(iterate_sentences(texts), training.max_sentences, training.seed)
    if not sentences:
        raise DataError("no text to train on")
    model = _fit(sentences + whole_word_hints(sentences), training)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = int(processor.get_piece_size())
    vocab = "".join(
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(size)
    )
    prefix = str(training.output_prefix)
    # The model last: where it exists, its vocabulary listing does too.
    write_text_atomic(prefix + ".vocab", vocab)
    write_bytes_atomic(prefix + ".model", model)
    return size


def _fit(sentences: list[str], training: TextTokenizerTraining) -> bytes:
    writer = io.BytesIO()
    sentences.reverse()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # Handing the sample over and letting it go keeps one copy in memory instead of two.
            sentence_iterator=(sentences.pop() for _ in range(len(sentences))),
            model_writer=writer,
            model_type="unigram",
            vocab_size=training.vocab_size,
            # Soft: a corpus too small for vocab_size gives a smaller model, not an error.
            hard_vocab_limit=False,
            character_coverage=training.character_coverage,
            byte_fallback=training.byte_fallback,
            num_threads=training.num_threads,
            bos_id=0,
            pad_id=1,
            eos_id=2,
            unk_id=3,
            bos_piece=BOS_PIECE,
            pad_piece=PAD_PIECE,
            eos_piece=EOS_PIECE,
            unk_piece=UNK_PIECE,
            # Control, not user-defined: raw text can never spell it.
            control_symbols=[MASK_PIECE],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(error, training)) from error
    return writer.getvalue()


def _explain(error: RuntimeError, training: TextTokenizerTraining) -> str:
    message = str(error)
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {training.vocab_size} is too small: the characters of the corpus and the "
            f"special pieces alone need {found[1]} (or lower character_coverage)"
        )
    return f"SentencePiece cannot train on this corpus: {message.splitlines()[0]}"


def sample_sentences(sentences: Iterable[str], max_sentences: int, seed: int) -> list[str]:
    """A uniform sample of at most ``max_sentences`` (reservoir); all, in order, where they fit."""
    generator = random.Random(seed)
    sample: list[str] = []
    for count, sentence in enumerate(sentences):
        if count < max_sentences:
            sample.append(sentence)
        elif (place := generator.randrange(count + 1)) < max_sentences:
            sample[place] = sentence
    return sample


def whole_word_hints(sentences: Sequence[str]) -> list[str]:
    """Lines that make SentencePiece consider each word of a small lexicon as a piece.

    Its candidates are the strings that occur in at least two different words, however often one
    word occurs; in a small world a frequent word may occur in no other and would end in fragments.
    With its last character doubled, a word begins a second one, at the cost of one count.
    Large lexicons hold enough variants by themselves: no hints.
    """
    words: set[str] = set()
    for sentence in sentences:
        words.update(re.findall(r"\w+", sentence))
        if len(words) > SMALL_LEXICON:
            return []
    return [word + word[-1] for word in sorted(words)]


def iterate_sentences(texts: Iterable[str]) -> Iterator[str]:
    """Non-empty lines of all texts, longer ones cut into at most 1,000 characters."""
    for text in texts:
        for line in text.splitlines():
            yield from _cut(" ".join(line.split()))


def _cut(line: str) -> Iterator[str]:
    while len(line) > MAX_SENTENCE_CHARACTERS:
        end = line.rfind(" ", 0, MAX_SENTENCE_CHARACTERS + 1)
        end = end if end > 0 else MAX_SENTENCE_CHARACTERS
        yield line[:end]
        line = line[end:].lstrip()
    if line:
        yield line
