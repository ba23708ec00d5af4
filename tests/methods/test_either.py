"""Either: of IGIA's layers and the gate's, those without which the repaired model loses less."""

import copy
import logging

import pytest
import torch
from builders import make_llama, make_samples, nll
from conftest import make_trace

from gradpruner.common.errors import ConfigError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext, either
from gradpruner.methods.calibration import put_aside
from gradpruner.methods.either import EitherOptions
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.refitting import fit_repair

L = 6
SAMPLES = make_samples(24)
MODEL = make_llama(num_hidden_layers=L)
TRACE = make_trace(MODEL)
METHOD = METHODS.find("either")


def context_of(**changes):
    fields = {"trace": lambda: TRACE, "model": lambda: MODEL, "samples": SAMPLES, "num_keep": 4} | changes
    return MethodContext(num_layers=L, seed=0, collator=Collator(), **fields)


def alone(name, **changes):
    """The scores of one method, and its plan."""
    method = METHODS.find(name)
    scores = method.score(context_of(options=method.options(), **changes))
    return scores, plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0)


def said(scores):
    return scores.evidence["comparison"]


@pytest.mark.parametrize("kind", ["linear", "layer_wise"])
def test_the_lower_loss_of_the_repaired_models_on_held_out_samples_wins(kind):
    options, expected = RepairOptions(kind=kind, rows=18), {}
    aside, rest = put_aside(SAMPLES, 256, 0)
    assert len(aside) == 6
    for name in ("gradpruner", "gate"):
        plan = alone(name)[1]
        repair = fit_repair(MODEL, plan, rest, Collator(), options)
        expected[name] = nll(prune_(copy.deepcopy(MODEL), plan, repair=repair), aside)
    before = copy.deepcopy(MODEL.state_dict())
    found = METHOD.score(context_of(repair=options))
    assert said(found)["losses"] == pytest.approx(expected, rel=1e-5)
    best = min(expected, key=expected.get)
    scores = alone(best)[0]
    assert (found.method, said(found)["chosen"], found.values) == (
        "either",
        best,
        scores.values,
    )
    assert (found.low, found.high, found.stability) == (scores.low, scores.high, scores.stability)
    assert said(found)["held_out"] == 6 and said(found)["skipped"] == ""
    assert said(found)["pruned"] == {name: list(alone(name)[1].pruned) for name in expected}
    assert all(torch.equal(value, before[name]) for name, value in MODEL.state_dict().items())


@pytest.mark.parametrize("losses", [(0.2, 0.1), (0.1, 0.2), (0.1, 0.1)])
def test_the_gate_must_be_ahead(monkeypatch, losses):
    waiting = list(losses)
    monkeypatch.setattr(either, "held_out_loss", lambda *_: waiting.pop(0))
    found = METHOD.score(context_of(options=EitherOptions(validation_samples=2)))
    chosen = "gate" if losses[1] < losses[0] else "gradpruner"
    assert (said(found)["chosen"], said(found)["held_out"]) == (chosen, 2)
    assert found.values == alone(chosen)[0].values


def unused():
    raise AssertionError("nothing needs this model")


UNREPAIRED = RepairOptions(kind="none")


@pytest.mark.parametrize(
    ("changes", "why", "warned"),
    [
        ({"num_keep": 6}, "both would remove the same layers", False),
        ({"repair": UNREPAIRED}, "losses of unrepaired models would say little", False),
        ({"samples": SAMPLES[:2]}, "there are too few training samples", True),
    ],
)
def test_where_nothing_is_compared_igia_decides_and_the_evidence_says_why(changes, why, warned, caplog):
    with caplog.at_level(logging.WARNING):
        found = METHOD.score(context_of(model=unused, **changes))
    assert (said(found)["chosen"], said(found)["skipped"]) == (
        "gradpruner",
        why,
    )
    assert said(found)["losses"] == {} and (why in caplog.text) is warned


def test_the_plans_of_the_run_are_compared():
    same = PruningPlan.from_keep(L, (0, 2, 3, 5))
    seen = []

    def make_plan(scores):
        seen.append(scores.method)
        return same

    found = METHOD.score(context_of(model=unused, make_plan=make_plan))
    assert seen == ["gradpruner", "gate"] and said(found)["held_out"] == 0


def test_validation_samples_decide_where_there_are_any():
    own = make_samples(9, seed=5)
    options = RepairOptions(kind="linear", rows=18)
    found = METHOD.score(context_of(repair=options, validation=own))
    expected = {}
    for name in ("gradpruner", "gate"):
        plan = alone(name)[1]
        repair = fit_repair(MODEL, plan, SAMPLES, Collator(), options)
        expected[name] = nll(prune_(copy.deepcopy(MODEL), plan, repair=repair), own)
    assert said(found)["losses"] == pytest.approx(expected, rel=1e-5)
    assert (said(found)["held_out"], said(found)["rows"]) == (
        9,
        "validation rows",
    )


def test_a_method_that_cannot_score_leaves_the_choice_to_the_other(caplog):
    still = copy.copy(TRACE)
    still.gates = None
    with caplog.at_level(logging.WARNING):
        found = METHOD.score(context_of(trace=lambda: still, model=unused))
    assert said(found)["chosen"] == "gradpruner" and "only one" in said(found)["skipped"]
    assert "chosen by IGIA, without a comparison: only one of them" in caplog.text
    silent = make_trace(MODEL, scale=0.0)
    silent.gates = None
    with pytest.raises(ConfigError, match="zero gradient energy"):
        METHOD.score(context_of(trace=lambda: silent))


def test_a_model_that_cannot_be_repaired_is_not_taken(monkeypatch):
    first = alone("gradpruner")[1].pruned

    def fails(model, plan, *args, **options):
        if plan.pruned == first:
            raise PlanError("No.")
        return fit_repair(model, plan, *args, **options)

    monkeypatch.setattr(either, "fit_repair", fails)
    found = METHOD.score(context_of(repair=RepairOptions(kind="linear", rows=18)))
    assert said(found)["chosen"] == "gate" and said(found)["skipped"] == "IGIA's choice fails: No."
    monkeypatch.setattr(either, "fit_repair", lambda *_, **__: fails(MODEL, alone("gradpruner")[1]))
    found = METHOD.score(context_of(repair=RepairOptions(kind="linear", rows=18)))
    assert said(found)["chosen"] == "gradpruner" and said(found)["losses"] == {}
    assert said(found)["skipped"] == "IGIA's choice fails: No.; the gate's choice fails: No."
