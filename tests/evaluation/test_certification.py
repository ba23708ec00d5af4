"""Bounds on the loss of quality, and the search for the largest pruning that keeps within a limit."""

import json
import math

import numpy as np
import pytest

from gradpruner.common.errors import ConfigError, DataError, ShapeError
from gradpruner.evaluation.certification import (
    _limits,
    _margin,
    certify,
    largest_certified,
    relative_loss_bound,
)


def rows_of(both: int, lost: int, won: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 0 and 1, with these numbers of rows that both, dense only, pruned only, or none get right."""
    dense = np.repeat([1.0, 1.0, 0.0, 0.0], [both, lost, won, neither])
    pruned = np.repeat([1.0, 0.0, 1.0, 0.0], [both, lost, won, neither])
    return dense, pruned


def poisson(count: int, mean: float) -> float:
    return math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))


# The limits of counts


@pytest.mark.parametrize("error", [0.2, 0.1, 0.025, 0.003])
def test_limits_of_counts_solve_their_equations(error):
    upper, lower = _limits(60, error)
    assert upper[0] == pytest.approx(-math.log(error))
    assert lower[0] == 0.0
    assert lower[1] == pytest.approx(-math.log1p(-error))
    for count in (1, 2, 7, 30, 60):
        below = math.fsum(poisson(j, upper[count]) for j in range(count + 1))
        above = 1.0 - math.fsum(poisson(j, lower[count]) for j in range(count))
        assert below == pytest.approx(error, rel=1e-9)
        assert above == pytest.approx(error, rel=1e-9)


def test_limits_are_those_of_published_tables():
    # Garwood 1936, the 95 % interval of a count: 2.5 % at either end.
    upper, lower = _limits(10, 0.025)
    assert (lower[5], upper[5]) == (pytest.approx(1.6235, abs=1e-4), pytest.approx(11.6683, abs=1e-4))
    assert (lower[10], upper[10]) == (pytest.approx(4.7954, abs=1e-4), pytest.approx(18.3904, abs=1e-4))


# The bound


def test_no_row_differing_still_has_a_bound():
    bound = relative_loss_bound(*rows_of(450, 0, 0, 50), confidence=0.9)
    assert bound.loss == 0.0
    assert bound.upper == pytest.approx(math.log(10) / 450)


def test_losses_alone_have_the_exact_limit_of_their_count():
    bound = relative_loss_bound(*rows_of(395, 5, 0, 100), confidence=0.975)
    assert bound.loss == pytest.approx(5 / 400)
    assert bound.upper == pytest.approx(11.6683 / 400, abs=1e-6)


def test_losses_and_wins_put_their_margins_together_as_a_root_of_squares():
    bound = relative_loss_bound(*rows_of(390, 10, 5, 95), confidence=0.975)
    margin = math.hypot(18.3904 - 10, 5 - 1.6235)
    assert bound.loss == pytest.approx(5 / 400)
    assert bound.upper == pytest.approx((5 + margin) / 400, abs=1e-6)
    assert bound.confidence == 0.975


def test_scores_between_are_bounded_by_growing_limits_largest_difference_first():
    # Stringer's bound by hand: two losses, .5 and .2, among ten rows; one gain of .4.
    dense = [0.9, 0.8, 0.5] + [0.7] * 7
    pruned = [0.4, 0.6, 0.9] + [0.7] * 7
    upper, lower = _limits(2, 0.1)
    above = upper[0] + 0.5 * (upper[1] - upper[0]) + 0.2 * (upper[2] - upper[1]) - 0.7
    below = 0.4 - 0.4 * lower[1]
    expected = (0.7 - 0.4 + math.hypot(above, below)) / sum(dense)
    assert relative_loss_bound(dense, pruned, 0.9).upper == pytest.approx(expected)
    assert relative_loss_bound(dense, pruned, 0.9).loss == pytest.approx(0.3 / sum(dense))


def test_a_score_of_zero_and_one_is_the_special_case_of_one_between():
    dense, pruned = rows_of(300, 12, 4, 84)
    exact = relative_loss_bound(dense, pruned)
    near = relative_loss_bound(dense * (1 - 1e-9), pruned * (1 - 1e-9))
    assert near.upper == pytest.approx(exact.upper, rel=1e-6)


def test_a_model_that_is_ahead_has_a_negative_loss_and_truth_values_count():
    dense, pruned = rows_of(400, 0, 60, 40)
    bound = relative_loss_bound(dense.astype(bool).tolist(), pruned.astype(bool).tolist())
    assert bound.loss == pytest.approx(-60 / 400)
    assert bound.loss < bound.upper < 0


def test_the_bound_is_never_above_one():
    assert relative_loss_bound([1.0, 1.0], [0.0, 0.0]).upper == 1.0


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
def test_coverage_of_counts_is_exact_or_more(confidence):
    """Coverage computed, not sampled, for Poisson counts of lost and gained rows (the limit of many rows)."""
    most = 160
    counts = np.arange(most)
    upper, lower = _limits(most, 1 - confidence)
    b, c = np.meshgrid(counts, counts, indexing="ij")
    bound = b - c + np.hypot(upper[b] - b, c - lower[c])
    # The formula above equals the function.
    assert bound[7, 3] == pytest.approx(4 + _margin(np.ones(7), np.ones(3), 1 - confidence))
    chances = {
        mean: np.array([poisson(j, mean) for j in counts]) for mean in (1e-9, 0.3, 1, 2.3, 4, 9, 20, 60)
    }
    for losses, chance in chances.items():
        for wins, other in chances.items():
            if wins <= losses:
                covered = chance @ ((bound >= losses - wins - 1e-9) @ other)
                assert covered >= confidence - 1e-6


@pytest.mark.parametrize(
    ("rows", "dense", "loss", "differing"),
    [(200, 0.6, 0.0, 0.005), (200, 0.9, 0.02, 0.03), (500, 0.75, 0.01, 0.02), (2000, 0.6, 0.003, 0.1)],
)
def test_coverage_with_the_dense_mean_measured_too(rows, dense, loss, differing):
    lost, won = (differing + loss * dense) / 2, (differing - loss * dense) / 2
    generator = np.random.default_rng(5)
    cells = [dense - lost, lost, won, 1 - dense - won]
    held = [
        relative_loss_bound(*rows_of(*generator.multinomial(rows, cells)), confidence=0.9).upper >= loss
        for _ in range(1000)
    ]
    assert np.mean(held) >= 0.9 - 2.5 * math.sqrt(0.9 * 0.1 / 1000)


def test_coverage_of_scores_between_where_a_t_interval_falls_short():
    """Rare total losses: 1 % of the rows lose everything; a t interval at 90 % covers 79 % here."""
    generator = np.random.default_rng(6)
    held, t_held = [], []
    for _ in range(600):
        dense = generator.beta(8, 2, size=200)
        pruned = np.where(generator.random(200) < 0.01, 0.0, dense)
        held.append(relative_loss_bound(dense, pruned, 0.9).upper >= 0.01)
        change = dense - pruned
        t_held.append(change.mean() + 1.286 * change.std(ddof=1) / math.sqrt(200) >= 0.01 * dense.mean())
    assert np.mean(held) >= 0.89
    assert np.mean(t_held) < 0.85


@pytest.mark.parametrize(
    ("dense", "pruned", "confidence", "error", "words"),
    [
        ([1.0], [1.0, 0.0], 0.9, ShapeError, "one score per row"),
        ([], [], 0.9, DataError, "no validation rows"),
        ([1.0, 2.0], [1.0, 1.0], 0.9, DataError, "dense model's scores run from 1 to 2"),
        ([1.0, 1.0], [1.0, math.nan], 0.9, DataError, "pruned model's scores"),
        ([0.0, 0.0], [1.0, 1.0], 0.9, DataError, "scores 0 on every"),
        ([1.0], [1.0], 0.5, ConfigError, "confidence is 0.5"),
        ([1.0], [1.0], 1.0, ConfigError, "confidence is 1.0"),
    ],
)
def test_what_cannot_be_bounded_is_refused(dense, pruned, confidence, error, words):
    with pytest.raises(error, match=words):
        relative_loss_bound(dense, pruned, confidence)


# Certificates


def test_verdicts():
    good = certify(*rows_of(900, 2, 6, 92), limit=0.01)
    assert (good.verdict, good.rows_needed, good.passed) == ("certified", 1000, True)
    assert (good.dense, good.pruned, good.rows) == (0.902, 0.906, 1000)
    few = certify(*rows_of(180, 0, 0, 20), limit=0.01)
    assert few.verdict == "too few rows"  # log(10) / 180 is 1.3 %
    assert few.rows_needed == math.ceil(200 * math.log(10) / 1.8)
    worse = certify(*rows_of(1800, 40, 10, 150), limit=0.01)
    assert (worse.verdict, worse.rows_needed, worse.passed) == ("not certified", None, False)
    assert json.loads(json.dumps(good.as_dict()))["verdict"] == "certified"


def test_too_few_rows_means_that_not_even_equality_would_pass():
    # 30 rows of 500 differ, half of them gained: the bound still exceeds 1 %.
    assert relative_loss_bound(*rows_of(435, 15, 15, 35)).upper > 0.01
    assert certify(*rows_of(433, 17, 13, 37), limit=0.01).verdict == "too few rows"
    assert relative_loss_bound(*rows_of(435, 15, 15, 35)).upper < 0.03
    assert certify(*rows_of(430, 23, 7, 40), limit=0.03).verdict == "not certified"


def test_a_loss_that_is_plain_is_not_called_too_few_rows():
    assert certify(*rows_of(350, 100, 10, 40), limit=0.01).verdict == "not certified"


@pytest.mark.parametrize("counts", [(450, 4, 4, 42), (440, 6, 4, 50), (470, 4, 0, 26)])
def test_that_many_rows_suffice(counts):
    found = certify(*rows_of(*counts), limit=0.01)
    assert found.rows_needed is not None
    assert found.rows_needed > 500
    both, lost, won, neither = counts
    if found.verdict == "too few rows":
        lost = won = (lost + won) / 2
    for factor, enough in ((1.1, True), (0.85, False)):
        times = factor * found.rows_needed / 500
        many = [round(times * count) for count in (both, lost, won, neither)]
        assert (relative_loss_bound(*rows_of(*many)).upper <= 0.01) == enough


@pytest.mark.parametrize("limit", [0.0, 1.0, -0.1])
def test_a_limit_is_a_fraction(limit):
    with pytest.raises(ConfigError, match="largest allowed loss is"):
        certify([1.0], [1.0], limit)


# The search


def exactly(losses: dict[int, int]):
    """Returns a `measure` with these numbers of lost rows of 1,000, and the list of its calls."""
    asked: list[int] = []

    def measure(layers: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(layers)
        return rows_of(1000 - losses[layers], losses[layers], 0, 0)

    return measure, asked


def test_the_search_bisects_and_reports_all_it_measured():
    # 1,000 rows: at 1 %, four losses pass at any share used here, twenty never do.
    measure, asked = exactly({n: 0 if n <= 5 else 20 for n in range(1, 13)})
    found = largest_certified(measure, range(1, 13), limit=0.01)
    assert found.best == 5
    assert asked == [7, 4, 6, 5]
    assert [n for n, _ in found.measured] == asked
    assert [n for n, _ in found.curve] == [4, 5, 6, 7]
    assert [certificate.passed for _, certificate in found.curve] == [True, True, False, False]
    # 10 % over four tests; a test that fails spends its share, one that passes gives it back.
    shares = [1 - certificate.confidence for _, certificate in found.measured]
    assert shares == pytest.approx([0.1 / 4, 0.075 / 3, 0.075 / 2, 0.0375])
    assert found.confidence == 0.9


def test_looks_that_pass_spend_nothing():
    measure, asked = exactly(dict.fromkeys(range(1, 8), 0))
    found = largest_certified(measure, range(1, 8), limit=0.01)
    assert (found.best, asked) == (7, [4, 6, 7])
    shares = [1 - certificate.confidence for _, certificate in found.measured]
    assert shares == pytest.approx([0.1 / 3, 0.1 / 2, 0.1])


def test_nothing_certified():
    measure, asked = exactly(dict.fromkeys(range(1, 8), 50))
    assert largest_certified(measure, range(1, 8), limit=0.01).best is None
    assert asked == [4, 2, 1]


def test_a_first_guess_is_looked_at_first():
    measure, asked = exactly({n: 0 if n <= 11 else 20 for n in range(1, 13)})
    found = largest_certified(measure, range(1, 13), limit=0.01, first=11)
    assert (found.best, asked) == (11, [11, 12])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": []}, "give at least one, in ascending order"),
        ({"candidates": [3, 2]}, "give at least one, in ascending order"),
        ({"first": 9}, "allowed: 1, 2, 3"),
        ({"limit": 2.0}, "largest allowed loss"),
        ({"confidence": 0.2}, "confidence"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_measuring(options, words):
    options = {"candidates": [1, 2, 3], "limit": 0.01} | options
    with pytest.raises(ConfigError, match=words):
        largest_certified(lambda _: pytest.fail("measured"), **options)


CURVES = {
    "all just beyond": [0.0101] * 12,
    "a plateau from the third on": [0.0, 0.004] + [0.0101] * 10,
    "rising slowly": [0.0, 0.002, 0.004, 0.007, 0.0099, 0.0102, 0.0105, 0.011, 0.012, 0.014, 0.017, 0.02],
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
@pytest.mark.parametrize("shared", [False, True], ids=["independent rows", "the same rows"])
def test_the_search_keeps_its_error_rate(curve, shared):
    """How often the search certifies a number of layers with a true loss above 1 %, on 600 rows."""
    generator, limit, runs, dense = np.random.default_rng(7), 0.01, 400, 0.9
    wrong = certified = 0
    for _ in range(runs):
        draws = generator.random(600)

        def measure(layers: int, draws: np.ndarray = draws) -> tuple[np.ndarray, np.ndarray]:
            drawn = draws if shared else generator.random(600)
            lost = curve[layers - 1] * dense + 0.001  # and 0.1 % of the rows gained
            first = drawn < dense
            second = (drawn >= lost) & first | (drawn > 0.999)
            return first, second

        found = largest_certified(measure, range(1, 13), limit)
        wrong += found.best is not None and curve[found.best - 1] > limit
        certified += found.best is not None
    assert wrong / runs <= 0.1 + 2 * math.sqrt(0.1 * 0.9 / runs)
    assert certified > 0 or curve[0] > limit


def test_a_search_without_a_budget_would_not_keep_its_error_rate():
    """If every test spends the full error, the same search errs clearly more often than allowed."""
    generator, runs, wrong = np.random.default_rng(8), 400, 0
    for _ in range(runs):
        low, high = 0, 12
        while low < high:
            middle = (low + high) // 2
            lost = generator.binomial(600, 0.0101)
            if certify(*rows_of(600 - lost, lost, 0, 0), limit=0.01).passed:
                wrong += 1
                break
            high = middle
    assert wrong / runs > 0.14
