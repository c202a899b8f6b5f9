"""What a routing trace says: load, drops, co-activation and specialisation of experts; pure functions of numbers.

Letters: N tokens, K experts per token, E experts of a pool, C classes, P patch side.

Specialisation is the normalised mutual information of two labels of the same tokens, the expert and the content:

    NMI(e, c) = 2 I(e; c) / (H(e) + H(c))

0 where they are independent or one of them is the same everywhere, 1 where either tells the other. Of the ways to
normalise it, this is the arithmetic mean of the entropies (Vinh, Epps and Bailey, JMLR 2010). On few tokens it is above
0 by chance, the more so the more classes there are: so the experts are shuffled among the tokens and the same is
computed again, over and over. Shuffled among all tokens, what is left is chance. Shuffled among the tokens of each
picture or caption alone, what is left is also what whole pictures have in common, such as their background.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

COLOR_CLASSES = (
    *("black", "gray", "white", "pale", "red", "orange", "yellow", "green", "cyan", "blue"),
    "purple",
)
# First hue in degrees, and class, of colours that are neither grey nor pale.
_HUES = (
    *((0.0, "red"), (15.0, "orange"), (45.0, "yellow"), (70.0, "green"), (165.0, "cyan")),
    *((195.0, "blue"), (255.0, "purple"), (335.0, "red")),
)
EDGE_CLASSES = ("flat", "vertical", "falling", "horizontal", "rising", "texture")
WORD_CLASSES: Mapping[str, frozenset[str]] = {
    "color": frozenset(
        "red green blue yellow orange purple white gray grey black beige brown pink tan silver gold golden dark light"
        " bright color colors colored colour colours background".split()
    ),
    "shape": frozenset(
        "circle square triangle diamond star cross shape round rectangle line letter striped dotted solid".split()
    ),
    "number": frozenset(
        "no one two three four five six seven eight nine ten many several few some single pair both all total".split()
    ),
    "size": frozenset(
        "small little large big tiny huge tall short long wide larger smaller size same".split()
    ),
    "place": frozenset(
        "left right above below over under beneath top bottom upper lower middle center centre corner side row column"
        " near next beside behind front between inside outside on in at around through into from".split()
    ),
    "function": frozenset(
        "a an the this that these those his her its their my your of to and or but with by for as is are was were be"
        " been being am has have had do does did it he she they we you i there which who what where if so not can will"
        " would while very".split()
    ),
}
"""Words by class. A word that is in none is `other`; what has no letter or digit is `punctuation`."""


def words_of_pieces(pieces: Sequence[str]) -> tuple[list[str], list[int]]:
    """The words that pieces make up, from one space to the next, and the number of the word of every piece."""
    words: list[str] = []
    numbers = []
    for piece in pieces:
        if piece.startswith("▁") or not words:
            words.append("")
        words[-1] += piece.removeprefix("▁")
        numbers.append(len(words) - 1)
    return words, numbers


def word_label(piece: str, word: str) -> str:
    """What a piece is a part of: the word in lower case without the punctuation around it, or the punctuation itself.

    Args:
        piece: as the tokenizer writes it.
        word: from one space to the next.
    """
    own = piece.removeprefix("▁")
    # The mark of a beginning may be a piece of its own, and is of the word that begins there.
    if own and not any(map(str.isalnum, own)):
        return own
    spoken = [place for place, letter in enumerate(word) if letter.isalnum()]
    return word[spoken[0] : spoken[-1] + 1].lower() if spoken else word


def word_class(label: str) -> str:
    """Class of what a piece is a part of (`word_label`): that of the word in any number, or punctuation."""
    plain = "".join(filter(str.isalnum, label))
    if not plain:
        return "punctuation"
    singular = [plain, plain.removesuffix("s"), plain.removesuffix("es")]
    for name, words in WORD_CLASSES.items():
        if any(form in words for form in singular):
            return name
    return "other"


def color_classes(patches: Array) -> Array:
    """Class of the mean colour of every patch, as an index into `COLOR_CLASSES`: ``[N]``.

    By value V (the largest channel, 0 to 1) and saturation S (1 minus the smallest over the largest): black below
    V = 0.2; below S = 0.12 white from V = 0.85 on, else gray; below S = 0.3 pale; else by hue.

    Args:
        patches: uint8 ``[N, P, P, 3]``.
    """
    mean = patches.reshape(len(patches), -1, 3).mean(axis=1) / 255.0
    high, low = mean.max(axis=1), mean.min(axis=1)
    spread = high - low
    saturation = spread / np.maximum(high, 1e-9)
    red, green, blue = mean.T
    safe = np.where(spread > 0.0, spread, 1.0)
    hue = np.where(
        high == red,
        (green - blue) / safe,
        np.where(high == green, 2.0 + (blue - red) / safe, 4.0 + (red - green) / safe),
    )
    starts = [start for start, _ in _HUES]
    names = np.array([COLOR_CLASSES.index(name) for _, name in _HUES])
    colored = names[np.searchsorted(starts, (60.0 * hue) % 360.0, side="right") - 1]
    grey = np.where(high >= 0.85, COLOR_CLASSES.index("white"), COLOR_CLASSES.index("gray"))
    found: Array = np.select(
        [high < 0.2, saturation < 0.12, saturation < 0.3],
        [COLOR_CLASSES.index("black"), grey, COLOR_CLASSES.index("pale")],
        colored,
    )
    return found


def edge_classes(patches: Array) -> Array:
    """Class of the edges in every patch, as an index into `EDGE_CLASSES`: ``[N]``.

    Of the brightness (mean of the channels, 0 to 1): flat where its standard deviation is below 0.04; texture where
    its gradients have no common direction (coherence of their structure tensor below 0.5); else the direction of the
    edge, which is at right angles to them: vertical, horizontal, rising (as ``/``) or falling (as ``\\``).

    Args:
        patches: uint8 ``[N, P, P, 3]``, P at least 2.
    """
    brightness = patches.mean(axis=3) / 255.0
    down, across = np.gradient(brightness, axis=(1, 2))
    xx, yy, xy = (
        (a * b).sum(axis=(1, 2)) for a, b in ((across, across), (down, down), (across, down))
    )
    energy = xx + yy
    strength = np.hypot(xx - yy, 2.0 * xy)
    # Of the gradient, from 0 (across) by 45 degrees (towards the lower right) on.
    angle = np.degrees(0.5 * np.arctan2(2.0 * xy, xx - yy)) % 180.0
    sector = np.floor((angle + 22.5) / 45.0).astype(np.int64) % 4
    # An edge whose brightness grows to the lower right runs from the lower left to the upper right.
    names = ("vertical", "rising", "horizontal", "falling")
    directions = np.array([EDGE_CLASSES.index(name) for name in names])[sector]
    found: Array = np.select(
        [brightness.std(axis=(1, 2)) < 0.04, strength < 0.5 * np.maximum(energy, 1e-12)],
        [EDGE_CLASSES.index("flat"), EDGE_CLASSES.index("texture")],
        directions,
    )
    return found


def entropy(counts: Array) -> float:
    """Entropy in nats of counts of any shape; 0 for none."""
    total = counts.sum()
    if not total:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log(shares)).sum())


def joint_counts(first: Array, second: Array, sizes: tuple[int, int]) -> Array:
    """How often two labels ``[N]`` meet, as counts of the given sizes."""
    counts = np.bincount(first * sizes[1] + second, minlength=sizes[0] * sizes[1])
    return counts.reshape(sizes)


def normalized_mutual_information(counts: Array) -> float:
    """NMI of two labels of which the joint counts ``[E, C]`` are given; 0 where one of them never changes."""
    rows, columns = entropy(counts.sum(axis=1)), entropy(counts.sum(axis=0))
    if rows == 0.0 or columns == 0.0:
        return 0.0
    # Not below 0 by rounding.
    return max(0.0, 2.0 * (rows + columns - entropy(counts)) / (rows + columns))


@dataclass(frozen=True)
class Labels:
    """What the tokens of a router are about.

    Args:
        names: of the classes ``[C]``.
        codes: class of every token ``[N]``; -1 where it has none.
    """

    names: tuple[str, ...]
    codes: Array


@dataclass(frozen=True)
class Shuffled:
    """NMI after shuffling: `mean` and 95th percentile `p95` over the permutations."""

    mean: float
    p95: float


@dataclass(frozen=True)
class Specialisation:
    """How much experts and content tell of each other.

    Args:
        target: name of the content.
        tokens: tokens that have a class.
        classes: classes that occur.
        nmi: see the module.
        chance: shuffled among all tokens.
        within: shuffled among the tokens of each item alone.
        adjusted: ``(nmi - chance.mean) / (1 - chance.mean)``: 0 at chance, 1 at the most.
        p_value: share of permutations over all tokens that reach the NMI, itself counted as one of them.
    """

    target: str
    tokens: int
    classes: int
    nmi: float
    chance: Shuffled
    within: Shuffled
    adjusted: float
    p_value: float


def specialisation(
    experts: Array,
    num_experts: int,
    labels: Mapping[str, Labels],
    items: Array,
    permutations: int,
    rng: np.random.Generator,
) -> list[Specialisation]:
    """NMI of expert and each content, with its permutation baselines.

    Args:
        experts: of every token ``[N]``.
        num_experts: E.
        labels: contents by name.
        items: picture or caption of every token ``[N]``.
        permutations: how often the experts are shuffled, at least 1.
        rng: shuffles.
    """
    found = []
    for target, label in labels.items():
        known = label.codes >= 0
        if not known.any():
            continue
        own, codes, groups = experts[known], label.codes[known], items[known]
        sizes = (num_experts, len(label.names))
        nmi = normalized_mutual_information(joint_counts(own, codes, sizes))
        by_group = np.argsort(groups, kind="stable")
        baselines: dict[str, list[float]] = {"all": [], "within": []}
        for _ in range(permutations):
            within = np.empty_like(own)
            within[by_group] = own[np.lexsort((rng.random(len(own)), groups))]
            for name, shuffled in (("all", rng.permutation(own)), ("within", within)):
                counts = joint_counts(shuffled, codes, sizes)
                baselines[name].append(normalized_mutual_information(counts))
        chance, within_items = (
            Shuffled(float(np.mean(values)), float(np.quantile(values, 0.95)))
            for values in baselines.values()
        )
        reached = sum(value >= nmi for value in baselines["all"])
        found.append(
            Specialisation(
                target,
                len(own),
                len(np.unique(codes)),
                nmi,
                chance,
                within_items,
                (nmi - chance.mean) / (1.0 - chance.mean) if chance.mean < 1.0 else 0.0,
                (1 + reached) / (1 + permutations),
            )
        )
    return found


def load_of(expert: Array, kept: Array, num_experts: int) -> dict[str, Any]:
    """Counts over the choices of a router.

    Args:
        expert: chosen experts ``[N, K]``.
        kept: choices that found a place ``[N, K]``.

    Returns:
        `tokens`, `assignments` (choices), `kept`, `dropped`, `dropped_share`; `load` and `dropped_load`, the choices
        and the dropped ones by expert ``[E]``; `dead`, experts that nothing chose; `balance`, the entropy of the load
        over its largest value, log E: 1 where all experts are chosen equally often.
    """
    load = np.bincount(expert.ravel(), minlength=num_experts)
    dropped = np.bincount(expert[~kept], minlength=num_experts)
    total, lost = int(load.sum()), int(dropped.sum())
    return {
        "tokens": len(expert),
        "assignments": total,
        "kept": total - lost,
        "dropped": lost,
        "dropped_share": lost / total if total else 0.0,
        "load": load.tolist(),
        "dropped_load": dropped.tolist(),
        "dead": int((load == 0).sum()),
        "balance": entropy(load) / math.log(num_experts) if num_experts > 1 else 1.0,
    }


def together(expert: Array, num_experts: int) -> Array:
    """How often two experts are chosen for one token: symmetric counts ``[E, E]`` of choices ``[N, K]``, 0 inside."""
    counts = np.zeros((num_experts, num_experts), dtype=np.int64)
    k = expert.shape[1]
    for first in range(k):
        for second in range(k):
            if first != second:
                counts += joint_counts(
                    expert[:, first], expert[:, second], (num_experts, num_experts)
                )
    return counts


def consecutive(
    first: Mapping[str, Array], second: Mapping[str, Array], sizes: tuple[int, int]
) -> Array:
    """How often the first choice of one block and that of another meet in a token: counts ``[E, E']``.

    Args:
        first: of the earlier block `item`, `modality`, `place` ``[N]`` and `expert` ``[N, K]``.
        second: of the later block; tokens that are in one alone do not count.
        sizes: E and E'.
    """
    keys = [
        # Places begin at -3.
        (part["item"].astype(np.int64) * 2 + part["modality"]) * (1 << 20)
        + part["place"].astype(np.int64)
        + 4
        for part in (first, second)
    ]
    _, here, there = np.intersect1d(keys[0], keys[1], return_indices=True)
    return joint_counts(first["expert"][here, 0], second["expert"][there, 0], sizes)


def top_gates(
    expert: Array, gate: Array, item: Array, place: Array, number: int, count: int
) -> list[tuple[int, int, float]]:
    """The tokens that an expert is first choice of with the largest gates: (item, place, gate), best first.

    One of each item comes before a second one of any, so that they show more than one picture.

    Args:
        expert: first choices ``[N]``.
        gate: their gates ``[N]``.
        item: ``[N]``.
        place: ``[N]``.
        number: of the expert.
        count: at most so many.
    """
    own = np.flatnonzero(expert == number)
    own = own[np.argsort(-gate[own], kind="stable")]
    seen: dict[int, int] = {}
    turns = []
    for index in own.tolist():
        turn = seen.get(int(item[index]), 0)
        seen[int(item[index])] = turn + 1
        turns.append(turn)
    chosen = own[np.argsort(turns, kind="stable")][:count]
    return [(int(item[i]), int(place[i]), float(gate[i])) for i in chosen]


def class_counts(expert: Array, num_experts: int, label: Labels) -> list[list[int]]:
    """How many tokens of each class have each expert as first choice: ``[E][C]``."""
    known = label.codes >= 0
    counts = joint_counts(expert[known], label.codes[known], (num_experts, len(label.names)))
    listed: list[list[int]] = counts.tolist()
    return listed


def coded(values: Sequence[str]) -> Labels:
    """Labels given as words, an empty one where there is none; classes are in alphabetical order."""
    names = tuple(sorted(set(values) - {""}))
    numbers = {name: number for number, name in enumerate(names)}
    return Labels(names, np.array([numbers.get(value, -1) for value in values], dtype=np.int64))
