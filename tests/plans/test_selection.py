import itertools
import json
import math
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradpruner.common.errors import ConfigError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.plans.layer_plan import MIN_KEPT, LayerAction, PruningPlan
from gradpruner.plans.merging import MAX_SOURCES, MERGE_RULES
from gradpruner.plans.options import PlanOptions
from gradpruner.plans.selection import plan_pruning
from gradpruner.runs.recipe.sections import PlanSection

SCORES = LayerScores("m", (9.0, 8.0, 1.0, 2.0, 7.0, 3.0, 6.0, 10.0), evidence={"model": "x", "num_layers": 8})


def actions_of(plan):
    return "".join(entry.action[0] for entry in plan.actions)


def test_least_important_go_and_the_best_of_them_are_merged():
    plan = plan_pruning(SCORES, num_prune=4, num_merge=2)
    assert plan.pruned == (2, 3, 5, 6)
    assert plan.merged == {4: (5, 6)}
    assert actions_of(plan) == "kkddkmmk"
    assert (plan.method, plan.evidence) == ("m", SCORES.evidence)


def test_default_budget_is_forty_percent_of_the_layers_and_three_merged():
    plan = plan_pruning(LayerScores("m", (*map(float, range(32, 1, -1)), 99.0)))
    assert plan.pruned == tuple(range(18, 31))
    assert plan.merged == {17: (18, 19, 20)}


def test_ties_keep_the_lower_index():
    level = LayerScores("m", (1.0,) * 6)
    assert plan_pruning(level, num_prune=3, num_merge=1).pruned == (3, 4, 5)
    assert plan_pruning(level, num_prune=3, num_merge=1).merged == {2: (3,)}
    assert plan_pruning(level, num_prune=2, num_merge=0, contiguous=True).pruned == (4, 5)


def test_contiguous_block_has_the_lowest_total():
    assert plan_pruning(SCORES, num_prune=3, num_merge=0, contiguous=True).pruned == (2, 3, 4)


@pytest.mark.parametrize(
    "options, pruned",
    [
        ({"protect_first": 3}, (3, 5)),
        ({"protect_last": 4}, (2, 3)),
        ({"protect_first": 3, "protect_last": 2, "contiguous": True}, (3, 4)),
        ({"protect_first": 3, "protect_last": 3}, (3, 4)),
    ],
)
def test_protected_layers_stay(options, pruned):
    assert plan_pruning(SCORES, num_prune=2, num_merge=0, **options).pruned == pruned


def test_explicit_layers():
    plan = plan_pruning(SCORES, layers=[6, 1], num_merge=1)
    assert plan.merged == {0: (1,)} and plan.pruned == (1, 6)


@pytest.mark.parametrize("target, into", [("preceding", 2), ("nearest", 5)])
def test_target_of_a_merge(target, into):
    plan = plan_pruning(SCORES, layers=[3, 4], num_merge=1, target=target)
    assert plan.actions[4] == LayerAction("merge", into)


def test_nearest_breaks_ties_towards_the_input():
    assert plan_pruning(SCORES, layers=[3], num_merge=1, target="nearest").actions[3].into == 2


def test_nearest_serves_a_layer_with_none_before_it():
    assert (
        plan_pruning(SCORES, layers=[0], num_merge=1, protect_first=0, target="nearest").actions[0].into == 1
    )


@pytest.mark.parametrize("fraction, count", [(0.0, 0), (0.39, 3), (0.4, 3), (0.5, 4), (0.74, 6)])
def test_layer_fraction(fraction, count):
    assert len(plan_pruning(SCORES, layer_fraction=fraction, num_merge=0).pruned) == count


def test_parameter_fraction_takes_the_nearest_number_of_layers():
    # Llama-3.1-8B: 32 layers of 218,112,000 in 8,030,261,248 parameters; 13 layers are 35.3 %.
    scores = LayerScores("m", tuple(float(32 - i) for i in range(32)))
    plan = plan_pruning(
        scores,
        parameter_fraction=0.353,
        layer_parameters=[218_112_000] * 32,
        total_parameters=8_030_261_248,
        num_merge=0,
    )
    assert len(plan.pruned) == 13


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_prune": 7}, "at least 2 layers must stay"),
        ({"num_prune": -1}, "num_prune: .* greater than or equal to 0 .given: -1."),
        ({"layer_fraction": 1.0}, "layer_fraction: .* less than 1 .given: 1.0."),
        ({"layer_fraction": math.nan}, "layer_fraction: .* .given: nan."),
        ({"parameter_fraction": 0.3}, "needs layer_parameters and total_parameters"),
        (
            {"parameter_fraction": 0.3, "layer_parameters": [10] * 3, "total_parameters": 200},
            "layer_parameters has 3 numbers; there are scores of 8 layers",
        ),
        (
            {"num_prune": 1, "layer_fraction": 0.1},
            "^num_prune and layer_fraction are both budgets; give one. ",
        ),
        ({"num_prune": 1, "layers": [1]}, "num_prune and layers are both budgets"),
        ({"layers": [8]}, "0 to 7"),
        ({"layers": [-1]}, "layers.0: .* greater than or equal to 0"),
        ({"layers": [1, 1]}, "more than once"),
        ({"layers": list(range(8)), "target": "nearest"}, "at least 2 layers must stay"),
        ({"layers": [0]}, "protected"),
        ({"num_prune": 3, "protect_first": 4, "protect_last": 2}, "only 2 of 8"),
        ({"num_prune": 1, "protect_first": 9}, "protect_first is 9"),
        ({"num_prune": 1, "protect_last": -1}, "protect_last: .* greater than or equal to 0"),
        ({"num_prune": 1, "num_merge": -1}, "num_merge: .* greater than or equal to 0"),
        ({"layers": [0], "num_merge": 1, "protect_first": 0}, "no kept layer of the same kind precedes"),
        ({"num_prune": 1, "target": "precedes"}, "target: .* 'preceding' or 'nearest'"),
    ],
)
def test_budgets_that_cannot_be_met(options, message):
    with pytest.raises(ConfigError, match=message):
        plan_pruning(SCORES, **options)


@pytest.mark.parametrize("options", [{"rule": "summ"}, {"density": 0}, {"density": 1.5}])
def test_rule_and_density_are_checked(options):
    with pytest.raises(ConfigError):
        plan_pruning(SCORES, num_prune=2, **options)


def alternating(old, new, kept):
    """Even layers stay even, odd ones odd, and the last is odd."""
    return old % 2 == new % 2 and (old % 2 == 1 or new < kept - 1)


def test_the_best_layers_that_fit_are_chosen():
    assert plan_pruning(SCORES, num_prune=2, num_merge=0, protect_first=3).pruned == (3, 5)
    assert plan_pruning(SCORES, num_prune=4, num_merge=0, fits=alternating).pruned == (2, 3, 5, 6)
    assert plan_pruning(SCORES, num_prune=2, num_merge=0, fits=alternating, protect_first=3).pruned == (5, 6)


def test_a_fitting_plan_merges_like_any_other():
    plan = plan_pruning(SCORES, num_prune=4, num_merge=2, fits=alternating)
    assert plan.merged == {4: (5, 6)} and plan.keep == (0, 1, 4, 7)


def test_fits_is_asked_with_the_number_of_kept_layers():
    last_is_five = plan_pruning(
        SCORES, num_prune=3, num_merge=0, fits=lambda old, new, kept: new < kept - 1 or old == 5
    )
    assert last_is_five.keep == (0, 1, 3, 4, 5)


def test_a_block_that_fits():
    def fits(old, new, kept):
        return old == new or old > 5

    assert plan_pruning(SCORES, num_prune=2, num_merge=0, contiguous=True).pruned == (2, 3)
    assert plan_pruning(SCORES, num_prune=2, num_merge=0, contiguous=True, fits=fits).pruned == (5, 6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_prune": 3}, r"no way to prune 3 layers of 8 .* fit .* Prune 2 or 4 layers\. You can"),
        (
            {"num_prune": 3, "contiguous": True},
            r"no way to prune 3 adjacent layers of 8 .* Prune 2 or 4 layers",
        ),
        ({"num_prune": 1, "protect_first": 6}, r"no way to prune 1 layers .* Prune 2 layers\."),
        ({"num_prune": 2, "protect_first": 6, "fits": lambda *_: False}, "No other number of layers helps"),
        ({"layers": [2, 3, 5]}, r"Without layers 2-3, 5, layers 6-7 do not fit at their new positions"),
    ],
)
def test_restrictions_that_cannot_be_met(options, message):
    with pytest.raises(PlanError, match=message):
        plan_pruning(SCORES, num_merge=0, **{"fits": alternating, **options})


def test_listed_layers_that_fit():
    assert plan_pruning(SCORES, layers=[4, 1, 5, 2], num_merge=0, fits=alternating).pruned == (1, 2, 4, 5)


def best_by_trying_all(values, count, free, fits):
    """The choice with the lowest total score and, on a tie, the lowest kept layers; None if none fits."""
    found = []
    for pruned in itertools.combinations(free, count):
        keep = [i for i in range(len(values)) if i not in pruned]
        if all(fits(old, new, len(keep)) for new, old in enumerate(keep)):
            found.append((sum(values[i] for i in pruned), sum(keep)))
    return min(found, default=None)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_the_restricted_choice_is_the_best_there_is(data):
    total = data.draw(st.integers(3, 10))
    values = data.draw(st.lists(st.integers(-3, 3).map(float), min_size=total, max_size=total))
    first = data.draw(st.integers(0, 2))
    count = data.draw(st.integers(0, total - max(MIN_KEPT, first)))
    table = data.draw(st.integers(0, 2 ** (total * total) - 1)) | data.draw(
        st.integers(0, 2 ** (total * total) - 1)
    )

    def fits(old, new, kept):
        return bool(table >> (old * total + (new + kept) % total) & 1)

    best = best_by_trying_all(values, count, range(first, total), fits)
    options = {"num_prune": count, "num_merge": 0, "protect_first": first, "fits": fits}
    if best is None:
        with pytest.raises(PlanError, match=f"no way to prune {count} layers"):
            plan_pruning(LayerScores("m", tuple(values)), **options)
        return
    plan = plan_pruning(LayerScores("m", tuple(values)), **options)
    assert all(fits(old, new, len(plan.keep)) for new, old in enumerate(plan.keep))
    assert (sum(values[i] for i in plan.pruned), sum(plan.keep)) == best


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_a_restriction_that_restricts_nothing_changes_nothing(data):
    total = data.draw(st.integers(3, 40))
    number = st.floats(-1e12, 1e12) | st.sampled_from([0.0, 0.1, 0.2, 0.1 + 0.2, 0.3, 1e-300])
    scores = LayerScores("m", tuple(data.draw(st.lists(number, min_size=total, max_size=total))))
    count = data.draw(st.integers(0, total - MIN_KEPT))
    options = {"num_prune": count, "num_merge": 0, "contiguous": data.draw(st.booleans())}
    assert plan_pruning(scores, **options, fits=lambda *_: True) == plan_pruning(scores, **options)


def test_a_restricted_plan_for_a_deep_model_takes_no_time():
    scores = LayerScores("m", tuple(math.sin(i) * 10.0 ** (i % 30) for i in range(200)))
    started = time.perf_counter()
    plan = plan_pruning(scores, num_prune=80, num_merge=0, fits=lambda old, new, kept: old % 6 == new % 6)
    assert len(plan.keep) == 120 and time.perf_counter() - started < 5


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_every_plan_honours_its_budget_and_survives_json(data):
    total = data.draw(st.integers(3, 40))
    values = data.draw(st.lists(st.integers(0, 6).map(float), min_size=total, max_size=total))
    first = data.draw(st.integers(0, total - 1))
    last = data.draw(st.integers(0, total - first))
    count = data.draw(st.integers(0, total - MIN_KEPT))
    num_merge = data.draw(st.integers(0, total))
    assume(count <= total - first - last)
    plan = plan_pruning(
        LayerScores("m", tuple(values)),
        num_prune=count,
        num_merge=num_merge,
        protect_first=first,
        protect_last=last,
        contiguous=data.draw(st.booleans()),
        target="nearest",
        rule=data.draw(st.sampled_from(MERGE_RULES.names())),
        density=data.draw(st.floats(0.01, 1)),
    )
    assert len(plan.pruned) == count and len(plan.keep) == total - count
    assert sorted(plan.pruned + plan.keep) == list(range(total))
    assert all(first <= layer < total - last for layer in plan.pruned)
    merged = [layer for layers in plan.merged.values() for layer in layers]
    assert len(merged) == min(num_merge, count)
    assert set(plan.merged) <= set(plan.keep)
    dropped = set(plan.pruned) - set(merged)
    assert all(values[d] <= values[m] for d in dropped for m in merged)
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.without_merging().keep == plan.keep and not plan.without_merging().merged


def test_file_round_trip(tmp_path):
    plan = plan_pruning(SCORES, num_prune=4, num_merge=2)
    assert PruningPlan.load(plan.save(tmp_path / "plan.json")) == plan


def test_a_short_plan_written_by_hand():
    plan = PruningPlan.from_dict(
        {
            "actions": [
                {"action": "keep"},
                {"action": "merge", "into": 0},
                {"action": "drop"},
                {"action": "keep"},
            ]
        }
    )
    assert (plan.merged, plan.keep, plan.rule, plan.density) == ({0: (1,)}, (0, 3), "sum", 0.2)


def chained(rule, *into):
    actions = [{"action": "keep"} if i is None else {"action": "merge", "into": i} for i in into]
    return PruningPlan.from_dict({"actions": actions, "rule": rule}, "my.json")


def test_a_chain_is_carried_out_from_its_last_target_on():
    plan = chained("laco", None, 0, 1, 1, 3, None)
    assert plan.merged == {0: (1,), 1: (2, 3), 3: (4,)}
    assert plan.keep == (0, 5) and plan.pruned == (1, 2, 3, 4) and not plan.needs_trace
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_merge_by_gradients_needs_the_trace():
    assert (
        chained("sum", None, 0, None).needs_trace and not chained("laco_released", None, 0, None).needs_trace
    )
    assert not chained("sum", None, None).needs_trace


@pytest.mark.parametrize(
    "rule, into, message",
    [
        ("sum", (None, 0, 1, None), "Layer 2 is to be merged into layer 1"),  # no gradients of layer 1
        ("laco", (None, 2, 1, None), "Layer 1 is to be merged into layer 2|Layer 2 is to be merged into"),
        ("laco", (None, 3, 1, None), "Layer 2 is to be merged into layer 1"),  # 1 goes into a later layer
        ("laco", (None, 1, None), "Layer 1 is to be merged into layer 1"),
    ],
)
def test_chains_that_cannot_be(rule, into, message):
    with pytest.raises(PlanError, match=message) as caught:
        chained(rule, *into)
    assert "an earlier one" in str(caught.value)


def test_a_chain_does_not_go_through_a_dropped_layer():
    actions = [{"action": "keep"}, {"action": "drop"}, {"action": "merge", "into": 1}, {"action": "keep"}]
    with pytest.raises(PlanError, match="Layer 2 is to be merged into layer 1"):
        PruningPlan.from_dict({"actions": actions, "rule": "laco"})


def edited(**changes):
    raw = plan_pruning(SCORES, num_prune=4, num_merge=2).to_dict()
    raw.update(changes)
    return raw


def with_action(layer, **entry):
    raw = edited()
    raw["actions"][layer] = {"layer": layer, **entry}
    return raw


@pytest.mark.parametrize(
    "raw, message",
    [
        ([], "JSON object"),
        (edited(densty=0.2), "unknown field 'densty'. Did you mean 'density'"),
        (edited(format_version=7), "format_version 7"),
        (edited(num_layers=9), "num_layers is 9 but 8 actions"),
        (edited(actions=[]), "'actions' must list every layer"),
        (edited(actions="keep"), "'actions' must list every layer"),
        (edited(actions=edited()["actions"][::-1]), "entry 0 of 'actions'"),
        (edited(density="0.2"), "density is '0.2'"),
        (edited(density=2), "density is 2"),
        (edited(rule="sums"), "merge rule 'sums'. Did you mean 'sum'"),
        (edited(evidence="none"), "evidence is 'none'"),
        (with_action(3, action="kep"), "Layer 3: unknown action 'kep'. Did you mean 'keep'"),
        (with_action(3), "Layer 3: unknown action 'None'"),
        (with_action(3, action="merge"), "Layer 3: action is 'merge' and into is None"),
        (with_action(3, action="drop", into=1), "Layer 3: action is 'drop' and into is 1"),
        (with_action(3, action="merge", into=2), "Layer 3 is to be merged into layer 2, which is not a kept"),
        (with_action(3, action="merge", into=99), "into layer 99"),
        (with_action(3, action="merge", into=-1), "into layer -1"),
        (with_action(3, action="merge", into="1"), "layer 3: into is '1'"),
        (with_action(3, action="merge", into=True), "layer 3: into is True"),
        (with_action(3, action="merge", inot=1), "layer 3: unknown field 'inot'. Did you mean 'into'"),
        (with_action(4, action="drop"), "Layer 5 is to be merged into layer 4"),
    ],
)
def test_errors_of_an_edited_plan_name_file_and_field(raw, message):
    with pytest.raises(PlanError, match=r"my\.json") as caught:
        PruningPlan.from_dict(raw, "my.json")
    assert message in str(caught.value)


def test_two_layers_must_stay():
    with pytest.raises(PlanError, match="leaves 1 of 3"):
        PruningPlan((LayerAction("keep"), LayerAction("drop"), LayerAction("drop")))


def test_too_many_into_one():
    actions = (LayerAction("keep"), *[LayerAction("merge", 0)] * (MAX_SOURCES + 1), LayerAction("keep"))
    with pytest.raises(PlanError, match=f"at most {MAX_SOURCES}"):
        PruningPlan(actions)


def test_plan_for_another_model():
    plan = plan_pruning(SCORES, num_prune=2)
    plan.check_model(8, "x")
    plan.check_model(8)
    with pytest.raises(PlanError, match=r"8 layers; this one has 9"):
        plan.check_model(9)
    with pytest.raises(PlanError, match=r"model x; this is y"):
        plan.check_model(8, "y")


def test_from_keep():
    assert PruningPlan.from_keep(4, [3, 0]).pruned == (1, 2)
    with pytest.raises(PlanError, match="keep"):
        PruningPlan.from_keep(4, [0, 4])


def test_the_function_and_the_recipe_protect_merge_and_keep_alike():
    first_lowest = LayerScores("m", (0.0, 8.0, 1.0, 2.0, 7.0, 3.0))
    plan = plan_pruning(first_lowest, num_prune=3)
    assert plan == plan_pruning(first_lowest, PlanSection(num_prune=3)) and 0 not in plan.pruned
    assert plan == plan_pruning(first_lowest, PlanOptions(num_prune=2), num_prune=3)
