"""The text tokenizer: a SentencePiece model with five special pieces, and its training.

``<s>`` is the paper's [T_CLS] and ``</s>`` its [T_SEP]; ``[MASK]`` is the input of a masked position.
It trains on a bounded, seeded sample of texts.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece

from megatron_vlmoe.config.errors import ConfigError, DataError
from megatron_vlmoe.runtime.files import write_bytes_atomic, write_text_atomic

BOS_PIECE = "<s>"
PAD_PIECE = "<pad>"
EOS_PIECE = "</s>"
UNK_PIECE = "<unk>"
MASK_PIECE = "[MASK]"
SPECIAL_PIECES = (BOS_PIECE, PAD_PIECE, EOS_PIECE, UNK_PIECE, MASK_PIECE)
"""Special pieces in the order of their ids in models that this package trains (0 to 4)."""


class TextTokenizer:
    """Text to piece ids and back; satisfies the ``vocab`` argument of ``data.masking.mask_tokens``.

    The object pickles as the model itself, so worker processes need no access to the file. Raises ValueError if the
    file cannot be read, is no SentencePiece model, lacks a special piece, or holds one that plain text could spell.
    """

    def __init__(self, model_path: str | Path) -> None:
        self.model_path = Path(model_path)
        try:
            self._model = self.model_path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot read text tokenizer {self.model_path}: {reason}") from error
        processor = self._processor
        ids = [int(processor.piece_to_id(piece)) for piece in SPECIAL_PIECES]
        self.bos_id, self.pad_id, self.eos_id, self.unk_id, self.mask_id = ids
        """Of the special pieces; ``<unk>`` stands for characters that the model does not know."""
        self.special_ids = frozenset(ids)
        # An absent piece maps to the unknown id.
        named = dict(zip(SPECIAL_PIECES, ids, strict=True))
        try:
            missing = [piece for piece, i in named.items() if processor.id_to_piece(i) != piece]
        except UnicodeDecodeError as error:
            raise DataError(f"text tokenizer {self.model_path}: a piece is no text") from error
        if missing:
            raise DataError(
                f"text tokenizer {self.model_path} has no piece {', '.join(missing)}: "
                "train it with vlmoe train-text-tokenizer"
            )
        if not processor.is_unknown(self.unk_id):
            raise DataError(
                f"text tokenizer {self.model_path}: {UNK_PIECE} is not its unknown piece"
            )
        # SentencePiece matches user-defined and normal pieces in raw text, control pieces never.
        spelled = [p for p, i in named.items() if p != UNK_PIECE and not processor.is_control(i)]
        if spelled:
            raise DataError(
                f"text tokenizer {self.model_path}: {', '.join(spelled)} must be control pieces, "
                "or plain text could spell special tokens"
            )

    def __getstate__(self) -> dict[str, object]:
        # What is loaded or found again when it is needed, and the processor does not pickle.
        later = ("_processor", "_words")
        return {name: value for name, value in vars(self).items() if name not in later}

    @cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        try:
            # An empty proto would be taken for "no model given" and fail only at first use.
            if not self._model:
                raise RuntimeError("empty file")
            return sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except RuntimeError as error:
            raise DataError(f"{self.model_path} is not a SentencePiece model") from error

    @property
    def size(self) -> int:
        """Number of pieces in the file, special ones included."""
        return int(self._processor.get_piece_size())

    @cached_property
    def _words(self) -> frozenset[int]:
        """Pieces with a letter or digit in them, special ones apart."""
        pieces = (i for i in range(self.size) if any(map(str.isalnum, self.piece(i))))
        return frozenset(pieces) - self.special_ids

    def is_unknown(self, ids: Sequence[int]) -> bool:
        """Whether a text has unknown characters and no known letter or digit beside them.

        SentencePiece gives the spaces and punctuation of such a text as known pieces.
        """
        return self.unk_id in ids and self._words.isdisjoint(ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hex: datasets record it, training compares it."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Piece ids of ``text``, no special pieces added.

        Text that spells a special piece ("[MASK]", "<s>") becomes ordinary pieces; only
        characters unknown to the model give a special id, that of ``<unk>``.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of every text, on ``num_threads`` threads. Raises ValueError if one holds an unpaired surrogate."""
        try:
            ids: list[list[int]] = self._processor.encode(
                list(texts), out_type=int, num_threads=num_threads
            )
        except (TypeError, UnicodeEncodeError):
            # The binding reports half of a surrogate pair as a wrong type, without saying where.
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"text must be str, got {type(text).__name__}") from None
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"text is not valid Unicode: {text!a:.80}") from error
            raise
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; control pieces give nothing, ``<unk>`` U+2047. Raises ValueError on ids not in 0..size-1."""
        checked = [int(i) for i in ids]
        if bad := [i for i in checked if not 0 <= i < self.size]:
            raise ValueError(f"token id {bad[0]} is not in 0..{self.size - 1} ({self.model_path})")
        return str(self._processor.decode(checked))

    def piece(self, index: int) -> str:
        """The piece with id ``index``, as it is written in the model ("▁" marks a word start)."""
        try:
            return str(self._processor.id_to_piece(int(index)))
        except UnicodeDecodeError as error:
            message = f"text tokenizer {self.model_path}: piece {int(index)} is no text"
            raise DataError(message) from error


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
    """Trains a unigram model on texts, which are read once, and writes PREFIX.model and PREFIX.vocab.

    Returns the vocabulary size, below ``vocab_size`` where the corpus cannot fill it. Raises ValueError for a bad
    option, no text, or a corpus that SentencePiece refuses.
    """
    training.validate()
    sentences = sample_sentences(iterate_sentences(texts), training.max_sentences, training.seed)
    if not sentences:
        raise DataError("no text to train on")
    sentences += whole_word_hints(sentences)
    sentences.reverse()
    writer = io.BytesIO()
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
        message = str(error)
        reason = f"SentencePiece cannot train on this corpus: {message.splitlines()[0]}"
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
            reason = (
                f"vocab_size {training.vocab_size} is too small: the characters of the corpus and the "
                f"special pieces alone need {found[1]} (or lower character_coverage)"
            )
        raise DataError(reason) from error
    model = writer.getvalue()
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
        for line in (" ".join(line.split()) for line in text.splitlines()):
            while len(line) > MAX_SENTENCE_CHARACTERS:
                end = line.rfind(" ", 0, MAX_SENTENCE_CHARACTERS + 1)
                end = end if end > 0 else MAX_SENTENCE_CHARACTERS
                yield line[:end]
                line = line[end:].lstrip()
            if line:
                yield line
