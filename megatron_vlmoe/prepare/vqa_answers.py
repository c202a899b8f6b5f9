"""VQA answers: normalised spelling, the answer vocabulary, and soft scores of what ten people said.

The normaliser is that of the public VQA evaluator (Antol et al., arXiv 1505.00468) as ViLT, VLMo and BEiT-3
call it, so that VQAv2 gives the same 3,129 answers in the same order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD_OUTSIDE_NUMBER = re.compile(r"\.(?!\d)")
# The evaluator hands a flag to re.sub in the place of the number of replacements, and the flag's value is 32.
_MAX_PERIODS = 32
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = MappingProxyType(
    {"none": "0"}
    | {
        word: str(value)
        for value, word in enumerate(
            "zero one two three four five six seven eight nine ten".split()
        )
    }
)

# Contractions of the evaluator's table as ending -> beginnings. It has neither "she'd" (shed) nor "we'll" (well).
_CONTRACTIONS_BY_ENDING = (
    ("n't", "ai are ca could did do does had has have is might must need ought sha should"),
    ("n't", "was were wo would"),
    ("n't've", "could had might should would"),
    ("'ve", "could might must not should they we what where who would you"),
    ("'d", "he how it someone something there they where who you"),
    ("'d've", "he it she somebody someone something there they we who you y'all"),
    ("'ll", "how it somebody someone something they what who why you y'all"),
    ("'s", "he how somebody someone that there what when where who why"),
    ("'re", "there they what why you"),
    ("", "ma'am o'clock 'ow's'at 'twas y'all"),
)

NUM_ANNOTATORS = 10
"""People who answered a question of VQAv2."""

_SOFT_SCORES = (0.0, 0.3, 0.6, 0.9, 1.0)


# Every contraction with one of its apostrophes left out -> the contraction.
_CONTRACTIONS = MappingProxyType(
    {
        word[:place] + word[place + 1 :]: word
        for ending, beginnings in _CONTRACTIONS_BY_ENDING
        for word in (beginning + ending for beginning in beginnings.split())
        for place, letter in enumerate(word)
        if letter == "'"
    }
    # The evaluator has this one pair the wrong way round, and scores depend on it.
    | {"somebody'd": "somebodyd"}
)


def normalize_answer(text: str) -> str:
    """The spelling under which the VQA evaluator compares answers: words joined by single spaces, maybe none.

    1. Each of 21 punctuation marks vanishes if, anywhere in the text, it stands beside a space or a comma stands
       between digits; otherwise it becomes a space. Commas are among the marks, so none is left.
    2. A period vanishes unless a digit follows (the first 32 of them, as there).
    3. Lower case; none and zero to ten become digits; a, an and the go; contractions get their apostrophe back.
    """
    numeric = _DIGIT_COMMA_DIGIT.search(text) is not None
    spaced = text
    for mark in _PUNCTUATION:
        vanishes = numeric or f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if vanishes else " ")
    words = _PERIOD_OUTSIDE_NUMBER.sub("", spaced, count=_MAX_PERIODS).lower().split()
    numbered = (_NUMBER_WORDS.get(word, word) for word in words)
    return " ".join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def build_answer_vocabulary(answers: Iterable[str], min_count: int) -> list[str]:
    """Answers that are frequent enough, in the order of their first appearance: label i is answer i.

    The answers are one per question (``multiple_choice_answer``), not normalised, train before val; 9 as ``min_count``,
    of normalised answers, gives the 3,129 of VQAv2.
    """
    counts = Counter(map(normalize_answer, answers))
    return [answer for answer, count in counts.items() if count >= min_count]


def soft_scores(answers: Sequence[str], vocabulary: Mapping[str, int]) -> dict[int, float]:
    """Target of one question: label -> score, in the order of first appearance.

    The annotators' answers (ten in VQAv2) are counted as they are written, without normalisation (as ViLT, VLMo and
    BEiT-3 do); those outside the vocabulary (answer -> label) are left out. The scores are 0.3, 0.6, 0.9 and 1.0 for
    one, two, three and more equal answers: of ten annotators, exactly the ``leave_one_out_score``.
    """
    return {
        vocabulary[answer]: _SOFT_SCORES[min(count, 4)]
        for answer, count in Counter(answers).items()
        if answer in vocabulary
    }


def compared_answers(answers: Sequence[str]) -> tuple[list[str], bool]:
    """The annotators' answers as the official evaluator compares them, and whether it normalises the prediction too.

    Line ends and tabs become spaces and the ends are stripped. Only if the answers then differ from each other are
    they normalised, and the prediction with them (GT-Vision-Lab/VQA, vqaEval.py at a013f00).
    """
    stripped = [_stripped(answer) for answer in answers]
    differ = len(set(stripped)) > 1
    return ([normalize_answer(answer) for answer in stripped] if differ else stripped), differ


def official_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official VQA accuracy of a prediction, 0 to 1 (GT-Vision-Lab/VQA, vqaEval.py at a013f00).

    Raises ValueError if nobody answered. The answers are what the annotators said, as published.
    """
    compared, normalised = compared_answers(answers)
    own = _stripped(prediction)
    return leave_one_out_score(normalize_answer(own) if normalised else own, compared)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def leave_one_out_score(answer: str, answers: Sequence[str]) -> float:
    """The VQA accuracy of an answer, 0 to 1, by the texts as they are; see `official_accuracy`.

    Mean over every annotator left out of min(1, equal answers among the others / 3). Raises ValueError if nobody
    answered.
    """
    if not answers:
        raise ValueError("no annotator answers to score against")
    matches = answers.count(answer)
    others = (matches - (left_out == answer) for left_out in answers)
    return sum(min(1.0, count / 3) for count in others) / len(answers)
