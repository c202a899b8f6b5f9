"""Text corpora to ``PREFIX_text_document``: one document of one sequence per text."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from megatron_vlmoe.data.indexed import token_dtype
from megatron_vlmoe.data.manifest import DatasetManifest
from megatron_vlmoe.prepare.readers.records import Reject, TextBlock
from megatron_vlmoe.prepare.readers.text import TextInput, block_texts, read_text
from megatron_vlmoe.prepare.tool import (
    DatasetOutput,
    Run,
    encode_all,
    ordered_map,
    record_counts,
    rejected_words,
    report_unknown,
)
from megatron_vlmoe.runtime.progress import Progress
from megatron_vlmoe.tokenizers.text import TextTokenizer


@dataclass
class TokenizedText:
    """The result of one block."""

    tokens: np.ndarray
    """``[sum(lengths)]``."""
    lengths: np.ndarray
    """Tokens per document, ``[N]``."""
    rejects: list[Reject] = field(default_factory=list)
    kept: int = 0
    """Lines, rows or entries in the documents."""
    rejected: int = 0
    """Those that are not."""


@dataclass(frozen=True)
class TokenizeText:
    """The work on one block: decode, parse, tokenize."""

    tokenizer_model: str

    def build(self) -> Callable[[TextBlock | Reject], TokenizedText]:
        """Loads the tokenizer."""
        tokenizer = TextTokenizer(self.tokenizer_model)
        dtype = token_dtype(tokenizer.size)
        return lambda block: _tokenize(tokenizer, dtype, block)


def _tokenize(
    tokenizer: TextTokenizer, dtype: np.dtype, block: TextBlock | Reject
) -> TokenizedText:
    if isinstance(block, Reject):
        return TokenizedText(np.empty(0, dtype), np.empty(0, np.int64), [block], rejected=1)
    documents, bad = block_texts(block)
    rejects = [(n, Reject(block.source, f"{block.unit} {n}", reason)) for n, reason in bad]
    tokens, lengths = array("I"), array("q")
    kept = 0
    encoded = encode_all(tokenizer, [document.text for document in documents])
    for document, ids in zip(documents, encoded, strict=True):
        if isinstance(ids, str):
            more = f" and {document.parts - 1} more" if document.parts > 1 else ""
            record = f"{block.unit} {document.number}{more}"
            reject = Reject(block.source, record, ids, records=document.parts)
            rejects.append((document.number, reject))
        else:
            tokens.fromlist(ids)  # with "I" several times faster than extend, or than NumPy
            lengths.append(len(ids))
            kept += document.parts
    return TokenizedText(
        np.array(tokens, dtype),
        np.array(lengths, np.int64),
        [reject for _, reject in sorted(rejects, key=lambda one: one[0])],
        kept,
        sum(reject.records for _, reject in rejects),
    )


def preprocess_text(
    source: TextInput,
    tokenizer_model: str,
    run: Run,
) -> DatasetManifest:
    """Tokenizes text files into an indexed dataset; returns its manifest.

    The result does not depend on ``run.workers``.

    Raises:
        DataError: bad input (with ``on_error`` "stop"), no usable record, or a full disk; nothing
            is left behind.
        ValueError: the tokenizer cannot be loaded.
    """
    tokenizer = TextTokenizer(tokenizer_model)
    dtype, kept, rejected = token_dtype(tokenizer.size), 0, 0
    with (
        Progress("text") as progress,
        DatasetOutput(run.output_prefix, "text", [dtype], run.on_error) as output,
    ):
        writer = output.writers["text_document"]
        work = TokenizeText(tokenizer_model)
        for result in ordered_map(work, read_text(source), run.workers):
            output.rejects.add(result.rejects)
            output.count_unknown(result.tokens, tokenizer)
            writer.add_documents(result.tokens, result.lengths, np.ones_like(result.lengths))
            kept, rejected = kept + result.kept, rejected + result.rejected
            progress.add(result.kept + result.rejected)
        counts = record_counts(kept, rejected)
        manifest = output.manifest(run.source, tokenizer, counts=counts)
        output.commit(manifest)
    progress.finish(rejected_words(rejected, kept))
    if kept != manifest.documents:
        print(f"text: {kept} records in {manifest.documents} documents", file=sys.stderr)
    report_unknown("text", manifest)
    return manifest
