"""Which row of another model's vocabulary belongs to a piece of ours."""

from __future__ import annotations

import pytest
from public_states import (
    foreign_spm,
)

from megatron_vlmoe.config.errors import ConvertError
from megatron_vlmoe.convert.public.vocabulary import fairseq_rows, wordpiece_rows
from megatron_vlmoe.tokenizers.text import TextTokenizer


def test_wordpiece_rows(text_model, vocab_txt):
    tokenizer = TextTokenizer(text_model)
    lines = vocab_txt.read_text(encoding="utf-8").split("\n")
    found = wordpiece_rows(tokenizer, vocab_txt)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    theirs = {piece: lines[row] if row >= 0 else None for piece, row in zip(pieces, found.rows)}
    expected = {
        "<s>": "[CLS]", "</s>": "[SEP]", "<pad>": "[PAD]", "<unk>": "[UNK]", "[MASK]": "[MASK]",
        "▁the": "the", "▁red": "red", "▁circle": "circle", ",": ",", "e": "##e", "s": "##s",
        "▁blue": None, "▁": None, "b": None,
    }  # fmt: skip
    assert {piece: theirs[piece] for piece in expected} == expected
    # An uncased vocabulary has neither capitals nor accents.
    assert theirs["▁Paris"] == "paris"
    assert theirs["é"] == "##e"
    assert found.without == tuple(piece for piece in pieces if theirs[piece] is None)
    share = found.num_found / len(pieces)
    assert f"{found.num_found} of {len(pieces)} text pieces ({share:.1%})" in found.summary()


def test_cased_wordpiece_keeps_capitals(text_model, tmp_path, vocab_txt):
    path = tmp_path / "cased.txt"
    path.write_text(vocab_txt.read_text().replace("[unused0]", "Paris"))
    tokenizer = TextTokenizer(text_model)
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    rows = wordpiece_rows(tokenizer, path).rows
    lines = path.read_text().split("\n")
    assert lines[rows[pieces.index("▁Paris")]] == "Paris"
    assert rows[pieces.index("é")] == -1


def test_fairseq_rows(text_model, tmp_path):
    other = foreign_spm(tmp_path / "other.spm", text_model)
    assert [other.id_to_piece(i) for i in range(3)] == ["<unk>", "<s>", "</s>"]
    tokenizer = TextTokenizer(text_model)
    found = fairseq_rows(tokenizer, tmp_path / "other.spm")
    rows = {tokenizer.piece(i): row for i, row in enumerate(found.rows)}
    # XLM-R: <s> 0, <pad> 1, </s> 2, <unk> 3, piece i at i + 1, the mask after the last.
    special = ("<s>", "<pad>", "</s>", "<unk>", "[MASK]")
    assert [rows[piece] for piece in special] == [0, 1, 2, 3, 37]
    shared = [p for p in rows if p not in special and other.piece_to_id(p) > 2]
    assert len(shared) > 15
    assert all(rows[piece] == other.piece_to_id(piece) + 1 for piece in shared)
    assert set(found.without) == rows.keys() - set(shared) - set(special)
    path, piece = tmp_path / "other.spm", shared[0].encode()
    path.write_bytes(path.read_bytes().replace(piece, b"\xff" * len(piece)))
    with pytest.raises(ConvertError, match="other.spm: not a SentencePiece model"):
        fairseq_rows(tokenizer, path)
