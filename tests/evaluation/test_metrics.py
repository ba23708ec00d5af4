import numpy as np
import pytest

from gradpruner.common.errors import DataError, ShapeError
from gradpruner.evaluation.metrics import (
    Interval,
    bootstrap_interval,
    exact_match,
    final_number,
    majority_class,
    normalise_answer,
    paired_difference,
    paper_score,
    rouge_l,
    same_number,
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


# Words in common, in order: (generated, answer, length of the subsequence, generated words, answer words).
@pytest.mark.parametrize(
    ("generated", "answer", "common", "said", "wanted"),
    [
        ("the cat sat", "the cat sat", 3, 3, 3),
        ("the cat", "the cat sat down", 2, 2, 4),
        ("sat cat the", "the cat sat", 1, 3, 3),  # one word in order, not three
        ("police killed the gunman", "police kill the gunman", 4, 4, 4),  # stemmed
        ("The CAT, sat!", "the cat sat", 3, 3, 3),
        ("a b c d", "a x b y d", 3, 4, 5),
        ("nothing", "in common", 0, 1, 2),
    ],
)
def test_rouge_l_by_hand(generated, answer, common, said, wanted):
    assert rouge_l(generated, answer) == pytest.approx(2 * common / (said + wanted))


def test_rouge_l_equals_the_library():
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    generated = "The trial was stopped early; patients tolerated the treatments.\nNo deaths."
    answer = "Patients tolerate treatment well, and the trial stopped early."
    expected = scorer.score(target=answer, prediction=generated)["rougeL"]
    assert 0 < expected.fmeasure < 1
    assert rouge_l(generated, answer) == expected.fmeasure
    assert rouge_l(answer, generated) == pytest.approx(expected.fmeasure)


@pytest.mark.parametrize("empty", ["", "  \n", "..."])
def test_rouge_l_of_no_words_is_zero(empty):
    assert rouge_l(empty, "an answer") == rouge_l("an answer", empty) == rouge_l(empty, empty) == 0.0


def test_rouge_l_counts_words_of_any_script():
    assert rouge_l("Мама мыла раму", "мама мыла  раму.") == 1.0
    assert rouge_l("Мама мыла окно", "Мама мыла раму") == pytest.approx(2 / 3)
    assert rouge_l("été long", "été court") == pytest.approx(1 / 2)  # not three pieces of words
    assert rouge_l("hindi में है", "hindi में था") == pytest.approx(2 / 3)
    assert rouge_l("猫很好", "猫 很大") == pytest.approx(2 / 3)  # each character is a word
    assert rouge_l("no idea", "Мама мыла раму") == 0.0
    plain, accented = (rouge_l("cats running", f"the cat runs in {place}") for place in ("Zurich", "Zürich"))
    assert plain == accented == pytest.approx(4 / 7)  # English words are stemmed in both


def test_paper_score_by_hand():
    assert paper_score(0.9, 0.4) == pytest.approx(0.65)
    assert paper_score(1.0, 1.0) == 1.0
    assert paper_score(0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 13 = 18\n#### 18", "18"),
        ("#### 18.", "18"),
        ("#### 18.00", "18"),
        ("#### 018", "18"),
        ("#### $1,234.50", "1234.5"),
        ("#### 1,234,567 dollars", "1234567"),
        ("#### -7", "-7"),
        ("#### \u22127", "-7"),
        ("#### -$7.10", "-7.1"),
        ("#### $-7", "-7"),
        ("#### -0.0", "0"),
        ("#### .5", "0.5"),
        ("#### 0.50", "0.5"),
        ("#### 100", "100"),
        ("#### 3 * 6 = 18", "18"),
        ("####18", "18"),
        ("#### **18**", "18"),
        ("#### 18\nQuestion: how many are 2 + 3?\n#### 5", "18"),
        ("There are 3 left.\n#### none", "3"),
        ("There are 3 left.\n####\n4", "4"),
        ("<<6*3=18>>18 eggs", "18"),
        ("It takes 10-15 days", "15"),
        ("ends with 2018.", "2018"),
        ("that leaves...18", "18"),
        ("50% of 30 is 15!", "15"),
        ("The answer is 1,2,3", "3"),
        ("1,2345", "2345"),
        ("version 3.14.15", "3.14"),
        ("x2 and B12", None),
        ("none", None),
        ("", None),
        ("####", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_same_number():
    assert same_number("so 9 * 2 = $18.00", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18")
    assert same_number("#### 70,000", "#### 70000")
    assert not same_number("#### 81", "#### 18")
    assert not same_number("#### -18", "#### 18")
    assert not same_number("no idea", "#### 18")
    assert not same_number("no idea", "none either")
    for one, other in (("3/4", "1/4"), ("3,5", "7,5"), ("1e5", "1e9"), ("5:30", "7:30"), ("1 234", "5 234")):
        assert same_number(f"#### {one}", f"so\n#### {one}") and not same_number(
            f"#### {one}", f"#### {other}"
        )
        assert not same_number(one, f"#### {one}")  # no line with the mark
    assert same_number("5 m", "#### 5 m2") and same_number("#### 10 m", "#### 10 meters (10 m)")
    assert same_number("so it is 4", "#### Solution\n2 + 2 = 4")
    assert not same_number("#### Solution\nno idea, 999", "#### Solution\n2 + 2 = 4")
    assert same_number("#### 4 dollars", "#### 4") and same_number("#### 3 + 4 = 7", "#### 7 eggs")


def test_majority_class_by_hand():
    assert majority_class(["yes", "Yes ", "no", "maybe", "YES"]) == 0.6
    assert majority_class(["a sentence", "another one"]) == 0  # no classes


@pytest.mark.parametrize("function", [majority_class, bootstrap_interval])
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


def test_the_same_seed_gives_the_same_interval():
    values = [float(i * i) for i in range(100)]
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_equal_values_give_an_interval_of_width_zero():
    assert bootstrap_interval([True] * 5) == Interval(1.0, 1.0, 1.0, 5)
    assert bootstrap_interval([0.25]) == Interval(0.25, 0.25, 0.25, 1)


def test_interval_in_blocks_covers_every_resample(monkeypatch):
    values = [float(i % 2) for i in range(40)]
    whole = bootstrap_interval(values)
    monkeypatch.setattr("gradpruner.evaluation.metrics._BLOCK_ENTRIES", 120)  # three resamples a block
    assert bootstrap_interval(values) == whole


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


def test_two_dimensional_values_are_refused():
    with pytest.raises(ShapeError):
        bootstrap_interval([[1.0, 0.0]])
