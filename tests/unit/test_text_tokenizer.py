"""The SentencePiece tokenizer and its trainer."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import random
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import commands
import pytest
import sentencepiece
from data_files import files_of, rejects_of, tool

from megatron_vlmoe.tokenizers.text import (
    TextTokenizer,
    TextTokenizerTraining,
    iterate_sentences,
    sample_sentences,
    train_text_tokenizer,
    whole_word_hints,
)

SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "[MASK]"]


def corpus(num_lines: int = 400) -> list[str]:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgsp<>[]MASK/", k=4)) for _ in range(300)]
    words += ["red", "circle", "<s>", "[MASK]", "<pad>", "</s>", "mask"]
    return [" ".join(generator.choices(words, k=9)) for _ in range(num_lines)]


def train(directory: Path, texts: Iterable[str] | None = None, **options: Any) -> TextTokenizer:
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "vocab_size": 100,
        "output_prefix": directory / "m",
        "character_coverage": 1.0,
    }
    texts = corpus() if texts is None else texts
    train_text_tokenizer(TextTokenizerTraining(**(values | options)), texts)
    return TextTokenizer(directory / "m.model")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train(tmp_path_factory.mktemp("tokenizer"))


def raw_model(path: Path, **options: Any) -> Path:
    """A SentencePiece model as other people train them."""
    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=writer,
        vocab_size=80,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    path.write_bytes(writer.getvalue())
    return path


def test_ids_of_special_pieces(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.piece(i) for i in range(5)] == SPECIALS
    ids = [tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.mask_id == 4
    assert tokenizer.special_ids == frozenset(range(5))
    assert tokenizer.size == 100
    vocab = tokenizer.model_path.with_suffix(".vocab").read_text().splitlines()
    assert len(vocab) == 100
    assert [line.split("\t")[0] for line in vocab[:5]] == SPECIALS


def test_round_trip_without_specials(tokenizer: TextTokenizer) -> None:
    for line in corpus(20):
        ids = tokenizer.encode(line)
        assert not tokenizer.special_ids & set(ids)
        assert all(0 <= i < tokenizer.size for i in ids)
        assert tokenizer.decode(ids) == line
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("text", [*SPECIALS, "<s> red [MASK] circle </s>", "red<pad>[MASK][MASK]"])
def test_text_cannot_spell_special_pieces(tokenizer: TextTokenizer, text: str) -> None:
    # Every character is in the corpus, so not even <unk> may appear.
    assert "[MASK]" in " ".join(corpus())
    known = text.replace("<unk>", "<s>")
    ids = tokenizer.encode(known)
    assert not tokenizer.special_ids & set(ids)
    assert tokenizer.decode(ids) == known
    assert not {0, 1, 2, 4} & set(tokenizer.encode(text))


def test_decode_drops_control_pieces(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("red circle")
    wrapped = [tokenizer.bos_id, *ids, tokenizer.mask_id, tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(wrapped) == "red circle"
    with pytest.raises(ValueError, match=r"token id 100 is not in 0\.\.99"):
        tokenizer.decode([100])


def test_unknown_characters_and_byte_fallback(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    assert tokenizer.unk_id in tokenizer.encode("日")
    spelled = train(tmp_path, byte_fallback=True, vocab_size=400)
    assert spelled.unk_id not in spelled.encode("日")
    assert spelled.decode(spelled.encode("日 red")) == "日 red"


@pytest.mark.parametrize(
    "text", ["½ of it", "ﬁne … ①", "ＲＥＤ\u3000circle", "cafe\u0301", "  a\t\nred\u00a0 x ", "Red"]
)
def test_text_is_normalised_by_nfkc_and_its_spaces(tmp_path: Path, text: str) -> None:
    lines = ["1⁄2 of it fine ... 1 RED circle café a red x Red"] * 20
    tokenizer = train(tmp_path, lines, vocab_size=60)
    normal = " ".join(unicodedata.normalize("NFKC", text).split())
    assert tokenizer.encode(text) == tokenizer.encode(normal)
    assert tokenizer.decode(tokenizer.encode(text)) == normal  # nothing is unknown, no case is lost


def test_batch_equals_single(tokenizer: TextTokenizer) -> None:
    lines = corpus(30)
    single = [tokenizer.encode(line) for line in lines]
    assert tokenizer.encode_batch(lines) == single
    assert tokenizer.encode_batch(lines, num_threads=2) == single
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(TypeError):
        tokenizer.encode_batch([7])  # type: ignore[list-item]


def test_pickle_does_not_need_the_file(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "copy.model"
    path.write_bytes(tokenizer.model_path.read_bytes())
    pickled = pickle.dumps(TextTokenizer(path))
    path.unlink()
    copy = pickle.loads(pickled)
    assert copy.encode("red circle") == tokenizer.encode("red circle")
    assert copy.fingerprint == tokenizer.fingerprint
    assert tokenizer.fingerprint == hashlib.sha256(tokenizer.model_path.read_bytes()).hexdigest()


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plain\.model has no piece <pad>, \[MASK\]"):
        TextTokenizer(raw_model(tmp_path / "plain.model"))
    user_defined = raw_model(tmp_path / "user.model", pad_id=3, user_defined_symbols=["[MASK]"])
    with pytest.raises(ValueError, match=r"user\.model: \[MASK\] must be control"):
        TextTokenizer(user_defined)
    for content in (b"", b"hello, I am no model"):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
            TextTokenizer(tmp_path / "bad.model")
    with pytest.raises(ValueError, match=r"cannot read text tokenizer .*gone\.model: No such"):
        TextTokenizer(tmp_path / "gone.model")


def test_a_piece_that_is_no_text(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(tokenizer.model_path.read_bytes().replace(b"<unk>", b"\xff\xfe<\xfd>"))
    with pytest.raises(ValueError, match=r"damaged\.model: a piece is no text"):
        TextTokenizer(damaged)
    # A long one behind the special ones: its bytes stand nowhere else in the file.
    longest = max(range(5, tokenizer.size), key=lambda index: len(tokenizer.piece(index)))
    piece = tokenizer.piece(longest).encode()
    damaged.write_bytes(tokenizer.model_path.read_bytes().replace(piece, b"\xff" * len(piece)))
    with pytest.raises(ValueError, match=rf"damaged\.model: piece {longest} is no text"):
        TextTokenizer(damaged).piece(longest)


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    options = {"max_sentences": 150}
    first = train(tmp_path / "a", **options)
    again = train(tmp_path / "b", **options)
    other = train(tmp_path / "c", seed=1, **options)
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert not list(tmp_path.rglob("*.tmp"))


def test_sample_is_uniform_and_bounded() -> None:
    assert sample_sentences(["a", "b", "c"], 3, seed=5) == ["a", "b", "c"]
    counts = [0] * 10
    for seed in range(2000):
        sample = sample_sentences((str(i) for i in range(10)), 3, seed)
        assert len(set(sample)) == 3
        for item in sample:
            counts[int(item)] += 1
    # Binomial(2000, 0.3): mean 600, standard deviation 20.5.
    assert all(abs(count - 600) < 100 for count in counts)


def test_frequent_words_of_a_small_world_are_single_pieces(tmp_path: Path) -> None:
    # None of these words shares a beginning with another one.
    words = "the little horse jumped over that wooden fence yesterday because somebody opened it"
    generator = random.Random(1)
    lines = [" ".join(generator.choices(words.split(), k=8)) for _ in range(300)]
    tokenizer = train(tmp_path, lines)
    ids = tokenizer.encode(words)
    assert [tokenizer.piece(i) for i in ids] == ["▁" + word for word in words.split()]
    assert whole_word_hints([str(i) for i in range(20_001)]) == []


def test_long_lines_are_cut_not_dropped() -> None:
    sentences = list(iterate_sentences(["word " * 3000 + "x" * 2500]))
    assert max(map(len, sentences)) <= 1000
    assert " ".join(sentences).split()[:3000] == ["word"] * 3000
    assert "".join(sentences).replace(" ", "").count("x") == 2500


def test_bad_options(tmp_path: Path) -> None:
    for options, message in (
        ({"vocab_size": 5}, "vocab_size must be above 5"),
        ({"vocab_size": 12}, r"vocab_size 12 is too small: .* need \d+"),
        ({"character_coverage": 1.5}, "character_coverage"),
        ({"max_sentences": 0}, "max_sentences"),
        ({"texts": []}, "no text to train on"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, **options)
    assert not list(tmp_path.glob("m*"))


@pytest.mark.process
def test_tool_lowers_vocab_size_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n".join(corpus()))
    result = commands.tool(
        "train_text_tokenizer",
        "--input",
        tmp_path / "c.txt",
        "--vocab-size",
        "64000",
        "--output",
        tmp_path / "p",
    )
    assert result.code == 0, result.text
    size = TextTokenizer(tmp_path / "p.model").size
    assert 5 < size < 1000
    assert f"warning: the corpus fills only {size} of the 64000 pieces" in result.stderr
    assert f"({size} pieces)" in result.stdout


@pytest.mark.process
def test_tool_prints_one_line_of_error(tmp_path: Path) -> None:
    result = commands.tool(
        "train_text_tokenizer",
        "--input",
        tmp_path / "gone.txt",
        "--vocab-size",
        "99",
        "--output",
        tmp_path / "p",
    )
    assert result.code == 1
    assert result.stderr == f"error: {tmp_path}/gone.txt: not found\n"


def test_tool_stops_at_bad_records_or_lists_them(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, prefix = tmp_path / "c.jsonl", tmp_path / "p"
    lines = [json.dumps({"body": line}) for line in corpus(50)]
    path.write_text("\n".join([lines[0], '{"body": 3}', "{", *lines[1:]]))
    arguments = ["--input", str(path), "--text-key", "body", "--vocab-size", "90"]
    arguments += ["--output", str(prefix)]
    assert tool("train_text_tokenizer")(arguments) == 1
    assert capfd.readouterr().err == f"error: {path}: line 2: not a string\n"
    assert files_of(tmp_path) == ["c.jsonl"]
    assert tool("train_text_tokenizer")([*arguments, "--on-error", "skip"]) == 0
    assert f"2 records left out; the first: {path}: line 2: not a string" in capfd.readouterr().err
    assert [record for record, _ in rejects_of(prefix)] == ["line 2", "line 3"]
    # The same texts as plain lines give the same model.
    (tmp_path / "c.txt").write_text("\n".join(corpus(50)))
    plain = ["--input", str(tmp_path / "c.txt"), *arguments[2:-1], str(tmp_path / "q")]
    assert tool("train_text_tokenizer")(plain) == 0
    assert (tmp_path / "p.model").read_bytes() == (tmp_path / "q.model").read_bytes()
