import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpruner.common.errors import ConfigError, IntegrityError, NonFiniteError
from gradpruner.gradients.scores import LayerScores, default_num_prune, rank_stability, score_layers
from gradpruner.gradients.trace import GradientTrace, LinearRef, TraceInfo


def trace_of(energies, linears_per_layer=1):
    energies = torch.tensor(energies, dtype=torch.float64)
    refs = tuple(LinearRef(k // linears_per_layer, f"w{k}", 2, 2, 1) for k in range(energies.shape[1]))
    return GradientTrace(TraceInfo(refs[-1].layer + 1, refs, model="m"), energies)


TRACE = trace_of([[0.0, 0, 0, 0], [4, 1, 9, 16], [16, 9, 1, 4]], linears_per_layer=2)


def test_squared_is_the_mean_over_steps_of_the_sum_over_linears():
    assert score_layers(TRACE, num_keep=1).values == (30 / 3, 30 / 3)


def test_frobenius_is_the_sum_of_norms():
    assert score_layers(TRACE, norm="frobenius", num_keep=1).values == (2 + 1 + 4 + 3, 3 + 4 + 1 + 2)


def test_interval_holds_the_value_and_is_the_same_every_time():
    trace = trace_of(torch.rand(20, 5, generator=torch.Generator().manual_seed(0)).tolist())
    one, two = score_layers(trace, seed=3), score_layers(trace, seed=3)
    assert one == two
    assert all(0 < low < value < high for low, value, high in zip(one.low, one.values, one.high, strict=True))
    assert score_layers(trace, seed=4).low != one.low


def test_equal_steps_leave_no_doubt():
    scores = score_layers(trace_of([[1.0, 2.0, 3.0]] * 10), num_keep=2)
    assert scores.low == pytest.approx(scores.values) and scores.high == pytest.approx(scores.values)


def test_evidence_says_what_the_scores_rest_on():
    evidence = score_layers(TRACE, num_keep=1).evidence
    assert evidence["norm"] == "squared"
    assert (evidence["num_steps"], evidence["effective_steps"]) == (3, 2)
    assert evidence["model"] == "m" and len(evidence["trace"]) == 64
    json.dumps(evidence)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"norm": "square"}, "Did you mean 'squared'"),
        ({"num_keep": 0}, "num_keep"),
        ({"num_keep": 3}, "num_keep"),
        ({"resamples": 0}, "resamples"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ConfigError, match=message):
        score_layers(TRACE, **options)


def test_a_trace_without_energy_tells_nothing():
    with pytest.raises(ConfigError, match="LoRA B is zero"):
        score_layers(trace_of([[0.0, 0.0]]))


def test_stability_by_hand():
    # Totals after each step: (0,0,0), (3,1,2), (3,5,2), (3,5,9). Finally kept with two: {1, 2}.
    energy = torch.tensor([[0.0, 0, 0], [3, 1, 2], [0, 4, 0], [0, 0, 7]], dtype=torch.float64)
    assert rank_stability(energy, 2) == ((2, 0.5), (3, 0.5), (4, 1.0))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(1, 4)
)
def test_stability_ends_at_one(energies, keep):
    curve = rank_stability(torch.tensor(energies, dtype=torch.float64), keep)
    assert all(0 <= overlap <= 1 for _, overlap in curve)
    assert not curve or curve[-1] == (len(energies), 1.0)


def test_of_equal_layers_the_lower_index_is_more_important():
    assert LayerScores("m", (1.0, 0.5, 1.0, 0.5)).ascending() == [3, 1, 2, 0]


@pytest.mark.parametrize("layers, pruned", [(32, 13), (40, 16), (16, 6), (28, 11)])
def test_default_number_of_layers(layers, pruned):
    assert default_num_prune(layers) == pruned


def test_round_trip(tmp_path):
    scores = score_layers(TRACE, num_keep=1)
    assert LayerScores.load(scores.save(tmp_path / "scores.json")) == scores


@pytest.mark.parametrize("values", [(), (1.0, float("nan")), (float("inf"),)])
def test_scores_must_be_finite(values):
    with pytest.raises(NonFiniteError, match="finite") as caught:
        LayerScores("m", values)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"method": "m", "values": []}',
        '{"method": "m", "values": ["x"]}',
        '{"method": "m", "values": [1], "colour": 2}',
    ],
)
def test_file_that_holds_no_scores(tmp_path, text):
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=r"scores\.json"):
        LayerScores.load(path)
