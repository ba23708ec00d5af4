"""How good answers are, and how sure one can be of it.

Everything here is a pure function of numbers and strings. Scores are fractions from 0 to 1. The one that
needs a model, BERTScore, is in bertscore.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradpruner.common.errors import DataError, ShapeError
from gradpruner.data.numbers import final_number

# Resamples are drawn in blocks of at most this many indices, so that 2000 resamples of 100 000
# examples need 64 MB and not 1.6 GB.
_BLOCK_ENTRIES = 8_000_000
_RESAMPLES = 2000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A mean over `n` examples, with the ends of its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def normalise_answer(text: str) -> str:
    """Brings an answer into the form in which answers are compared.

    Leading and trailing white space goes, inner runs of white space become one space, case is
    folded. Punctuation, articles and accents stay: "B." is not "b".
    """
    return " ".join(text.split()).casefold()


def exact_match(generated: str, answer: str) -> bool:
    """Tells whether the two are the same text after `normalise_answer`."""
    return normalise_answer(generated) == normalise_answer(answer)


def rouge_l(generated: str, answer: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1, with Porter stemming; 0 if either is empty.

    Source: Lin, "ROUGE: a package for automatic evaluation of summaries", 2004; computed by `rouge-score`,
    which reads a word as a run of letters a-z and digits.
    """
    return float(_rouge_scorer().score(answer, generated)["rougeL"].fmeasure)


def paper_score(bert_f1: float, rouge_f1: float) -> float:
    """The paper's measure of a free answer, 0 to 1: the mean of BERTScore F1 and ROUGE-L F1.

    Source: GradPruner, section 4.1.
    """
    return (bert_f1 + rouge_f1) / 2.0


def same_number(generated: str, answer: str) -> bool:
    """Tells whether both end with the same number, see `final_number`; no number equals nothing."""
    number = final_number(generated)
    return number is not None and number == final_number(answer)


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # brings NLTK: only for those who score texts

    return RougeScorer(["rougeL"], use_stemmer=True)


def majority_class(answers: Sequence[str]) -> float:
    """Accuracy of always giving the most frequent answer, 0 to 1: the score to beat.

    Raises:
        DataError: If there are no answers.
    """
    if not answers:
        raise DataError("The majority class of zero answers is undefined.")
    counts = Counter(normalise_answer(answer) for answer in answers)
    return counts.most_common(1)[0][1] / len(answers)


def bootstrap_interval(values: Sequence[float] | Sequence[bool], *, seed: int = 0) -> Interval:
    """Mean of `values` with its 95 % percentile-bootstrap interval.

    Resamples the examples 2000 times with replacement and takes the 2.5 % and 97.5 % quantiles of the
    resampled means. It measures the uncertainty from the choice of evaluation examples only, not from the
    training seed. When all values are equal it has width 0, which flatters a small evaluation set.

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
    """Mean of `first - second`, example by example, with its interval as by `bootstrap_interval`.

    Two models scored on the same examples are compared far more sharply this way than by looking
    whether their two intervals overlap. The difference is not shown to be real when the interval
    contains 0.

    Args:
        first: One number per example.
        second: The same for the other model, in the same order.
        seed: Seed of the resampling.

    Raises:
        ShapeError: If the two differ in length.
        DataError: If they are empty.
    """
    if len(first) != len(second):
        raise ShapeError(
            f"A paired difference needs the same examples on both sides; got {len(first)} values"
            f" and {len(second)}."
        )
    return bootstrap_interval((_values(first) - _values(second)).tolist(), seed=seed)


def _values(values: Sequence[float] | Sequence[bool]) -> NDArray[np.float64]:
    """Returns the values as a one-dimensional float array that is not empty."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ShapeError(f"Expected one number per example, got an array of shape {array.shape}.")
    if array.size == 0:
        raise DataError("There are no examples to average over.")
    return array


def _resampled_means(sample: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """The mean of each of `_RESAMPLES` draws with replacement, shape (_RESAMPLES,)."""
    rows = max(1, _BLOCK_ENTRIES // sample.size)
    means = np.empty(_RESAMPLES, dtype=np.float64)
    for start in range(0, _RESAMPLES, rows):
        stop = min(start + rows, _RESAMPLES)
        drawn = generator.integers(sample.size, size=(stop - start, sample.size))
        means[start:stop] = sample[drawn].mean(axis=1)
    return means
