"""Fills a masked word and masked patches of a captioned picture with an exported model, and draws the result.

Letters: S image side, P patch side, L patches, C visual codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from megatron_vlmoe.analysis import routing_measures as measures
from megatron_vlmoe.analysis.plots import plain, save_figure
from megatron_vlmoe.config.errors import FillingError
from megatron_vlmoe.data.augment import decode_image
from megatron_vlmoe.data.indexed import IndexedReader
from megatron_vlmoe.data.manifest import part_prefix
from megatron_vlmoe.data.masking import blockwise_mask
from megatron_vlmoe.data.samples import foreground
from megatron_vlmoe.tokenizers.image import ImageTokenizer

Array = npt.NDArray[Any]
BEST = 3
LOOKED_AT = 1000
"""Pictures from which the looks of codes are taken."""
BATCH = 16
HIDDEN_WORDS = 0.5
"""Share of a caption's pieces that are hidden at once, as in pretraining on pairs."""


@dataclass(frozen=True)
class Filled:
    """What a model makes of a captioned picture of which it sees a part.

    Args:
        text: the caption with the hidden word as `[MASK]`.
        truth: the hidden word.
        guesses: the most likely words with their probabilities, best first.
        pixels: the picture ``[S, S, 3]``, 0 to 1.
        hidden: hidden patches ``[L]``.
        drawn: the picture with the hidden patches as the model fills them ``[S, S, 3]``.
        rendered: the picture drawn from its true codes ``[S, S, 3]``: the best that can be drawn.
        right: hidden patches whose code is the most likely one ``[L]``.
        shown: patches that show more than the picture's ground ``[L]``.
    """

    text: str
    truth: str
    guesses: tuple[tuple[str, float], ...]
    pixels: Array
    hidden: Array
    drawn: Array
    rendered: Array
    right: Array
    shown: Array

    def counts(self) -> str:
        """How many hidden patches have the right code, and how many of those of shapes."""
        hidden = self.hidden & self.shown
        return (
            f"{int(self.right.sum())} of {int(self.hidden.sum())} codes right, "
            f"of the foreground {int((self.right & hidden).sum())} of {int(hidden.sum())}"
        )


@dataclass(frozen=True)
class HiddenWords:
    """How well a model reads the hidden pieces of one class of words, with the picture of the caption and with another.

    Args:
        name: of the class, as in `WORD_CLASSES`.
        count: pieces.
        right: of them, whose most likely piece is the true one.
        loss: mean cross-entropy of the true piece, nats.
        right_beside_another: as `right`, the caption beside another picture.
        loss_beside_another: as `loss`, the same.
    """

    name: str
    count: int
    right: int
    loss: float
    right_beside_another: int
    loss_beside_another: float

    def line(self) -> str:
        """As printed."""
        own, other = self.right / self.count, self.right_beside_another / self.count
        return (
            f"{self.name}: {self.count:,} hidden, right {own:.1%} (with another picture {other:.1%}), "
            f"loss {self.loss:.3f} (with another picture {self.loss_beside_another - self.loss:+.3f})"
        )


def choose_documents(prefix: str, count: int, seed: int) -> list[int]:
    """Documents of an indexed dataset of pairs, at random; all of them if there are fewer."""
    number = IndexedReader(part_prefix(prefix, "image")).num_documents
    chosen = np.random.default_rng(seed).permutation(number)[:count]
    return [int(document) for document in chosen]


def hide_a_shape(shown: Array, count: int, rng: np.random.Generator) -> Array:
    """A mask of at most `count` patches that hides one connected part of the foreground whole.

    Args:
        shown: patches of the foreground, bool ``[g, g]``.
        count: patches to hide; the rest of them lies in blocks, as in training.
        rng: chooses the part and the blocks. A part with more patches than that is hidden as far as it goes.

    Returns:
        bool ``[g, g]``.
    """
    mask = np.zeros_like(shown)
    if shown.any():
        places = np.argwhere(shown)
        reached = [tuple(places[rng.integers(len(places))])]
        for row, column in reached:
            if mask.sum() == count:
                break
            mask[row, column] = True
            for other in (
                (row - 1, column),
                (row + 1, column),
                (row, column - 1),
                (row, column + 1),
            ):
                inside = all(0 <= at < size for at, size in zip(other, shown.shape))
                if inside and shown[other] and other not in reached:
                    reached.append(other)
    rows, columns = shown.shape
    blocks = blockwise_mask(rows, columns, count - int(mask.sum()), rng, min_block=4)
    hidden: Array = mask | blocks
    return hidden


def read_pair(prefix: str, number: int) -> tuple[Image.Image, list[int]]:
    """Picture and piece ids of the first caption of a document of an indexed dataset of pairs.

    Raises:
        FillingError: there is no such document.
        DataError: its picture is damaged.
    """
    images = IndexedReader(part_prefix(prefix, "image"))
    texts = IndexedReader(part_prefix(prefix, "text"))
    if not 0 <= number < images.num_documents:
        raise FillingError(f"{prefix}: no document {number}, only {images.num_documents}")
    (data,) = images.document(number)
    ids = [int(i) for i in texts.document(number)[0]]
    return decode_image(data, f"{prefix}_image.bin: image {number}"), ids


def looks_of_codes(tokenizer: ImageTokenizer, prefix: str, leave_out: Collection[int]) -> Tensor:
    """What the patches of every code look like: their mean over the first pictures of a dataset.

    This shows what a code stands for without the tokenizer's decoder, which knows only codes that stand side by side in
    real pictures, and which a published tokenizer does not have.

    Args:
        leave_out: documents that are not looked at, because they are to be drawn.

    Returns:
        ``[C, 3 P P]``, 0 to 1; the mid-grey 0.5 for codes that none of the pictures has.
    """
    reader = IndexedReader(part_prefix(prefix, "image"))
    patch = tokenizer.patch_size
    sums = torch.zeros(tokenizer.num_codes, 3 * patch**2)
    counts = torch.zeros(tokenizer.num_codes)
    numbers = [n for n in range(reader.num_documents) if n not in leave_out][:LOOKED_AT]
    for number in numbers:
        (data,) = reader.document(number)
        image = decode_image(data, f"{prefix}_image.bin: image {number}")
        pixels = _pixels(image, tokenizer)
        codes = tokenizer.encode(pixels)[0]
        sums.index_add_(0, codes, F.unfold(pixels, patch, stride=patch)[0].t())
        counts += codes.bincount(minlength=tokenizer.num_codes)
    means = sums / counts.clamp(min=1.0)[:, None]
    return torch.where(counts[:, None] > 0, means, 0.5)


@torch.no_grad()
def fill(
    model: Any,
    processor: Any,
    tokenizer: ImageTokenizer,
    looks: Tensor,
    image: Image.Image,
    ids: list[int],
    rng: np.random.Generator,
) -> Filled:
    """Hides the longest word that is one piece, and 40 % of the patches with a shape among them, and asks for them.

    Args:
        model: `AutoModelForPreTraining` of an export.
        processor: its `AutoProcessor`.
        tokenizer: image tokenizer that the model was trained with.
        looks: what its codes look like (`looks_of_codes`).
        image: the picture.
        ids: pieces of the caption, without special ones.
        rng: chooses the hidden patches.

    Raises:
        FillingError: the tokenizer is not that of the model.
    """
    grid = model.config.image_size // model.config.patch_size
    side, size = tokenizer.grid, tokenizer.num_codes
    if (side, size) != (grid, model.config.visual_vocab_size):
        raise FillingError(
            f"the image tokenizer has {side}x{side} patches and {size} codes, the model {grid}x{grid} "
            f"and {model.config.visual_vocab_size}"
        )
    text = processor.tokenizer
    # As much of a caption as the model reads.
    ids = ids[: model.config.pair_text_length - 2]
    pieces = [*text.convert_ids_to_tokens(ids), "▁"]
    starts = [n for n in range(len(ids)) if pieces[n].startswith("▁")]
    whole = [n for n in starts if pieces[n + 1].startswith("▁")] or range(len(ids))
    hidden_piece = max(whole, key=lambda number: len(pieces[number]))
    masked = [text.mask_token_id if n == hidden_piece else i for n, i in enumerate(ids)]
    sequence = text.build_inputs_with_special_tokens(masked)
    pixels = processor.image_processor(image, return_tensors="pt")["pixel_values"]
    raw = _pixels(image, tokenizer)
    shown = foreground((255.0 * raw[0]).round().to(torch.uint8).numpy(), grid)
    mask = hide_a_shape(shown.reshape(grid, grid), int(0.4 * grid * grid), rng).reshape(1, -1)
    outputs = model(
        input_ids=torch.tensor([sequence]), pixel_values=pixels, bool_masked_pos=torch.tensor(mask)
    )
    chances = outputs.mlm_logits[0, hidden_piece + 1].softmax(dim=0)
    best = chances.topk(BEST)
    words = [text.decode([index]).strip() for index in best.indices.tolist()]
    codes = tokenizer.encode(raw)
    guessed = outputs.mim_logits[0].argmax(dim=1)[None]
    where = torch.tensor(mask)
    patches = F.unfold(raw, tokenizer.patch_size, stride=tokenizer.patch_size).transpose(1, 2)
    return Filled(
        text=text.decode(masked),
        truth=text.decode([ids[hidden_piece]]).strip(),
        guesses=tuple(zip(words, best.values.tolist())),
        pixels=_picture(patches, tokenizer),
        hidden=mask[0],
        drawn=_picture(torch.where(where[..., None], looks[guessed], patches), tokenizer),
        rendered=_picture(looks[codes], tokenizer),
        right=((guessed == codes) & where)[0].numpy(),
        shown=shown,
    )


@torch.no_grad()
def read_hidden_words(
    model: Any, processor: Any, prefix: str, count: int, seed: int
) -> list[HiddenWords]:
    """Hides half of the pieces of captions and asks for them, beside their own picture and beside another one.

    Args:
        model: `AutoModelForPreTraining` of an export.
        processor: its `AutoProcessor`.
        prefix: indexed dataset of pairs.
        count: captions, of as many documents; all documents if there are fewer.
        seed: of documents and hidden pieces.

    Returns:
        One line per class of words that occurs, in the order of `WORD_CLASSES`, and `all` of them last; empty for fewer
        than two documents.
    """
    text = processor.tokenizer
    rng = np.random.default_rng(seed)
    documents = choose_documents(prefix, count, seed)
    # A last batch of one would have no other picture.
    starts = range(0, len(documents) - 1, BATCH)
    found: list[tuple[str, float, bool, float, bool]] = []
    for start in starts:
        stop = len(documents) if start == starts[-1] else start + BATCH
        pairs = [read_pair(prefix, document) for document in documents[start:stop]]
        pairs = [(image, ids[: model.config.pair_text_length - 2]) for image, ids in pairs]
        classes: list[list[str]] = []
        sequences, labels = [], []
        for _, ids in pairs:
            number = max(1, round(HIDDEN_WORDS * len(ids)))
            hidden = set(rng.permutation(len(ids))[:number].tolist()) if ids else set()
            masked = [text.mask_token_id if n in hidden else i for n, i in enumerate(ids)]
            sequences.append(text.build_inputs_with_special_tokens(masked))
            labels.append([i if n in hidden else -100 for n, i in enumerate(ids)])
            pieces = text.convert_ids_to_tokens(ids)
            words, numbers = measures.words_of_pieces(pieces)
            said = [measures.word_label(piece, words[n]) for piece, n in zip(pieces, numbers)]
            classes.append([measures.word_class(label) for label in said])
        padded = text.pad({"input_ids": sequences}, return_tensors="pt")
        pictures = [image for image, _ in pairs]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        answers = [
            model(
                input_ids=padded["input_ids"],
                attention_mask=padded["attention_mask"],
                pixel_values=values,
            ).mlm_logits.log_softmax(dim=-1)
            for values in (pixels, pixels.roll(1, dims=0))
        ]
        for row, own in enumerate(labels):
            for n, label in enumerate(own):
                if label >= 0:
                    # One piece later, after the opening one.
                    each = [answer[row, n + 1] for answer in answers]
                    (loss, right), (other_loss, other_right) = (
                        (-float(one[label]), int(one.argmax()) == label) for one in each
                    )
                    found.append((classes[row][n], loss, right, other_loss, other_right))
    result = []
    for name in (*measures.WORD_CLASSES, "other", "punctuation", "all"):
        chosen = [one for one in found if name in ("all", one[0])]
        if chosen:
            values = np.array([one[1:] for one in chosen], dtype=np.float64)
            loss, right, other_loss, other_right = values.sum(axis=0)
            size = len(chosen)
            result.append(
                HiddenWords(
                    name, size, int(right), loss / size, int(other_right), other_loss / size
                )
            )
    return result


def _pixels(image: Image.Image, tokenizer: ImageTokenizer) -> Tensor:
    """A picture as the tokenizer reads it: ``[1, 3, S, S]``, 0 to 1."""
    square = np.array(image.resize((tokenizer.image_size,) * 2, Image.Resampling.BICUBIC))
    return torch.tensor(square).permute(2, 0, 1)[None].float() / 255.0


def _picture(patches: Tensor, tokenizer: ImageTokenizer) -> Array:
    side, size = tokenizer.patch_size, tokenizer.image_size
    whole = F.fold(patches.transpose(1, 2), size, side, stride=side)[0]
    picture: Array = whole.permute(1, 2, 0).numpy()
    return picture


def draw_filled(filled: Sequence[Filled], output: Path) -> Path:
    """For each, side by side: the whole picture, what the model sees, what it fills in, what its true codes draw.

    Returns the file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(filled)
    figure = plt.figure(figsize=(12, 3.9 * rows), constrained_layout=True)
    for part, one in zip(figure.subfigures(rows, 1, squeeze=False)[:, 0], filled):
        size = one.pixels.shape[0]
        grid = int(len(one.hidden) ** 0.5)
        shown = np.kron(one.hidden.reshape(grid, grid), np.ones((size // grid, size // grid)))
        # A fine chequer, so that hidden is not taken for grey.
        chequer = 0.35 + 0.3 * (np.indices((size, size)).sum(axis=0) % 2)
        panels = (
            ("picture", one.pixels),
            ("what the model sees", np.where(shown[..., None] > 0, chequer[..., None], one.pixels)),
            (one.counts().replace(", ", "\n"), one.drawn),
            ("drawn from the true codes", one.rendered),
        )
        for axis, (title, picture) in zip(part.subplots(1, len(panels)), panels):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=10)
            axis.axis("off")
        guesses = ", ".join(f"{word} {chance:.0%}" for word, chance in one.guesses)
        title = plain(f"{one.text}\n{guesses}   (truth: {one.truth})")
        part.suptitle(title, fontsize=11)
    return save_figure(figure, output)
