import numpy as np
import pytest

from gradpruner.errors import DataError, ShapeError
from gradpruner.metrics import (
    Interval,
    accuracy,
    bootstrap_interval,
    exact_match,
    majority_class,
    normalise_answer,
    paired_difference,
)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  Yes ", "yes"),
        ("two\n  words\t", "two words"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("B.", "b."),
        ("", ""),
    ],
)
def test_normalise_answer(text, normal):
    assert normalise_answer(text) == normal


def test_exact_match_ignores_case_and_space_only():
    assert exact_match(" Entailment\n", "entailment")
    assert not exact_match("entailment.", "entailment")
    assert not exact_match("", "entailment")


def test_accuracy_by_hand():
    assert accuracy([True, False, True, True]) == 0.75


def test_majority_class_by_hand():
    assert majority_class(["yes", "Yes ", "no", "maybe", "YES"]) == 0.6


@pytest.mark.parametrize("function", [accuracy, majority_class, bootstrap_interval])
def test_nothing_to_average(function):
    with pytest.raises(DataError):
        function([])


def test_interval_agrees_with_a_plain_loop():
    values = [True] * 7 + [False] * 3
    generator = np.random.default_rng(3)
    means = [np.mean(np.array(values)[generator.integers(10, size=10)]) for _ in range(2000)]
    interval = bootstrap_interval(values, seed=3)
    assert interval.value == pytest.approx(0.7)
    assert interval.n == 10
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_interval_near_the_normal_approximation():
    values = [1.0] * 300 + [0.0] * 100
    interval = bootstrap_interval(values)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert interval.low == pytest.approx(0.75 - half, abs=0.006)
    assert interval.high == pytest.approx(0.75 + half, abs=0.006)


def test_interval_narrows_with_a_lower_level_and_repeats_with_a_seed():
    values = [float(i * i) for i in range(100)]
    wide, narrow = bootstrap_interval(values), bootstrap_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.high < wide.high
    assert wide == bootstrap_interval(values)
    assert wide != bootstrap_interval(values, seed=1)


def test_interval_without_spread():
    assert bootstrap_interval([True] * 5) == Interval(1.0, 1.0, 1.0, 5)
    assert bootstrap_interval([0.25]) == Interval(0.25, 0.25, 0.25, 1)


def test_interval_in_blocks_covers_every_resample(monkeypatch):
    monkeypatch.setattr("gradpruner.metrics._BLOCK_ENTRIES", 64)
    interval = bootstrap_interval([float(i % 2) for i in range(40)], resamples=101)
    assert 0.3 < interval.low < 0.5 < interval.high < 0.7


def test_paired_difference_sees_what_two_intervals_hide():
    first = [True] * 60 + [False] * 40
    second = [True] * 50 + [False] * 50  # Wrong on the same examples, and on ten more.
    difference = paired_difference(first, second)
    assert difference.value == pytest.approx(0.1)
    assert difference.low > 0
    assert bootstrap_interval(first).low < bootstrap_interval(second).high


def test_paired_difference_needs_the_same_examples():
    with pytest.raises(ShapeError, match="3 values and 2"):
        paired_difference([1.0, 0.0, 1.0], [1.0, 0.0])


@pytest.mark.parametrize("wrong", [{"level": 0.0}, {"level": 1.0}, {"resamples": 0}])
def test_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bootstrap_interval([1.0], **wrong)


def test_two_dimensional_values_are_refused():
    with pytest.raises(ShapeError):
        bootstrap_interval([[1.0, 0.0]])


def test_as_dict():
    assert Interval(0.5, 0.4, 0.6, 10).as_dict() == {
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 10,
    }
