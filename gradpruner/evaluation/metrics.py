"""Metrics of answers, and their bootstrap intervals.

All functions are pure functions of numbers and strings. Scores are fractions from 0 to 1. BERTScore, which
needs a model, is in bertscore.py.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpruner.common.errors import DataError, ShapeError
from gradpruner.data.numbers import final_number, is_composed, marked_answer

# Most indices drawn at a time: 2000 resamples of 100 000 examples take 61 MiB this way instead of 1.5 GiB.
_BLOCK_ENTRIES = 8_000_000
_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)
# Thai and Lao, Burmese, Khmer, kana, Chinese characters: scripts without spaces between words.
_UNSEPARATED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Interval:
    """The mean over `n` examples with its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def normalise_answer(text: str) -> str:
    """Returns an answer in the form used for comparison.

    Leading and trailing white space is removed, inner white space becomes one space, and case is folded.
    Punctuation, articles and accents stay: "B." is not "b".
    """
    return " ".join(text.split()).casefold()


def exact_match(generated: str, answer: str) -> bool:
    """Returns whether the two texts are equal after `normalise_answer`."""
    return normalise_answer(generated) == normalise_answer(answer)


def rouge_l(generated: str, answer: str) -> float:
    """Returns the F1 of the longest common subsequence of words, 0 to 1, with Porter stemming.

    The score is 0 if either text is empty. `rouge-score` computes it. A word is a run of letters a-z and
    digits; if the answer has other letters, a run of letters and digits of any script, or a single character
    where words are not separated (Chinese, Japanese, Thai, Lao, Khmer, Burmese).

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004.
    """
    foreign = any(c.isalpha() and not c.isascii() for c in answer)
    return float(_rouge_scorer(foreign).score(answer, generated)["rougeL"].fmeasure)


def paper_score(bert_f1: float, rouge_f1: float) -> float:
    """Returns the paper's score of a free-form answer, 0 to 1: the mean of BERTScore F1 and ROUGE-L F1.

    Source: GradPruner, section 4.1.
    """
    return (bert_f1 + rouge_f1) / 2.0


def same_number(generated: str, answer: str) -> bool:
    """Returns whether both texts end with the same number (`final_number`); False if either has none.

    If the number behind "####" in the right answer is written with more than digits, a point and commas
    between thousands (3/4, 1e5, 5:30), the generated answer must have the same text there.
    """
    marked = marked_answer(answer)
    if is_composed(marked):
        return exact_match(marked_answer(generated), marked)
    number = final_number(generated)
    return number is not None and number == final_number(answer)


@lru_cache(maxsize=2)
def _rouge_scorer(foreign: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # imports NLTK, so only when needed

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=_AnyScript() if foreign else None)


class _AnyScript:
    """Words of any script, as `RougeScorer` takes them; its own tokenizer drops all letters but a to z."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]

        self.stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """Returns the words: letters, digits and marks, case folded; single characters in some scripts."""
        folded = unicodedata.normalize("NFKC", text).casefold()
        words = "".join(c if unicodedata.category(c)[0] in "LNM" else " " for c in folded)
        found = _UNSEPARATED.sub(r" \g<0> ", words).split()
        # As rouge-score does for English: words of up to three letters stay.
        return [self.stem(word) if len(word) > 3 and word.isascii() else word for word in found]


def majority_class(answers: Sequence[str]) -> float:
    """Returns the accuracy of always giving the most frequent answer, 0 to 1: the score to beat.

    It is 0 if no answer occurs twice: then there are no classes.

    Raises:
        DataError: If there are no answers.
    """
    if not answers:
        raise DataError("The majority class of zero answers is undefined.")
    counts = Counter(normalise_answer(answer) for answer in answers)
    most = counts.most_common(1)[0][1]
    return most / len(answers) if most > 1 else 0.0


def bootstrap_interval(values: Sequence[float] | Sequence[bool], *, seed: int = 0) -> Interval:
    """Returns the mean of `values` with its 95 % percentile-bootstrap interval.

    Resamples the examples 2000 times with replacement and takes the 2.5 % and 97.5 % quantiles of the
    resampled means. The interval covers the uncertainty from the choice of evaluation examples only, not from
    the training seed. If all values are equal its width is 0, which flatters a small evaluation set.

    Args:
        values: One number per example; booleans count as 0 and 1.
        seed: Seed of the resampling; the same seed gives the same interval.

    Raises:
        DataError: If `values` is empty.

    Source: Efron, "Bootstrap methods: another look at the jackknife", 1979.
    """
    sample = _values(values)
    low, high = np.quantile(_resampled_means(sample, np.random.default_rng(seed)), _QUANTILES)
    return Interval(value=float(sample.mean()), low=float(low), high=float(high), n=sample.size)


def paired_difference(
    first: Sequence[float] | Sequence[bool], second: Sequence[float] | Sequence[bool], *, seed: int = 0
) -> Interval:
    """Returns the mean of `first - second` over the examples, with an interval as by `bootstrap_interval`.

    For two models scored on the same examples this is a much sharper comparison than checking whether their
    intervals overlap. If the interval contains 0, the evaluation does not show a difference.

    Args:
        first: One number per example.
        second: The same for the other model, in the same order.
        seed: Seed of the resampling.

    Raises:
        ShapeError: If `first` and `second` differ in length.
        DataError: If they are empty.
    """
    if len(first) != len(second):
        raise ShapeError(
            f"A paired difference needs the same examples on both sides; got {len(first)} values"
            f" and {len(second)}."
        )
    return bootstrap_interval((_values(first) - _values(second)).tolist(), seed=seed)


def clearly_worse(before: Sequence[float], after: Sequence[float]) -> bool:
    """Whether losses have risen by more than chance: the 95 % interval of the paired change is above 0.

    Training further mostly helps (docs/quality.md), and a few hundred rows measure the change of a loss only
    roughly. So a loss that seems a little higher is no reason to throw the training away.
    """
    return paired_difference(after, before).low > 0


def _values(values: Sequence[float] | Sequence[bool]) -> NDArray[np.float64]:
    """Returns the values as a one-dimensional, non-empty float array."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"Expected one number per example, got an array of shape {array.shape}.")
    if array.size == 0:
        raise DataError("There are no examples to average over.")
    return array


def _resampled_means(sample: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """Returns the means of `_RESAMPLES` resamples drawn with replacement, shape (_RESAMPLES,)."""
    rows = max(1, _BLOCK_ENTRIES // sample.size)
    means = np.empty(_RESAMPLES, dtype=np.float64)
    for start in range(0, _RESAMPLES, rows):
        stop = min(start + rows, _RESAMPLES)
        drawn = generator.integers(sample.size, size=(stop - start, sample.size))
        means[start:stop] = sample[drawn].mean(axis=1)
    return means
