"""The search over plans of many methods: its pool, constraints, losses and rounds."""

import json
from dataclasses import replace

import pytest
from builders import make_llama, make_samples, nll
from conftest import make_trace

from gradpruner.common.errors import DataError, ModelError, NonFiniteError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext, auto
from gradpruner.methods.auto import AutoOptions, settled
from gradpruner.methods.calibration import put_aside
from gradpruner.methods.candidates import PROPOSERS, Candidate, make_pool
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.training.options import FinetuneOptions

L = 6
SAMPLES = make_samples(24)
UNTRAINED = AutoOptions(rounds=0, repair="linear", families=["gate", "last", "random", "window"], pool=6)


def six_layers():
    return make_llama(num_hidden_layers=L)


def context_of(samples=SAMPLES, **changes):
    fields = {
        "trace": lambda: make_trace(six_layers()),
        "model": six_layers,
        "num_keep": 4,
        "finetune": FinetuneOptions(
            batch_size=6, accumulation=1, epochs=2.0, precision="fp32", device="cpu", learning_rate=1e-2
        ),
    } | changes
    return MethodContext(num_layers=L, seed=0, samples=samples, collator=Collator(), **fields)


def choose(options=UNTRAINED, **changes):
    return METHODS.find("auto").plan(context_of(options=options, **changes))


def dropping(layers, total=L):
    return PruningPlan.from_keep(total, [i for i in range(total) if i not in layers])


# --- the pool -----------------------------------------------------------------------------------------------


def named(pool):
    return {name: each.plan.pruned for each in pool for name in each.names}


def test_every_family_gives_the_plan_of_its_method_and_windows_fill_the_pool():
    context = context_of()
    pool, failures = make_pool(context, 2, 12)
    assert failures == {}
    plans = named(pool)
    assert {name.split()[0] for name in plans} == set(PROPOSERS)
    methods = {"gate_pairwise": ("gate", {"pairwise": True}), "task_loss": ("task_loss", {"num_samples": 32})}
    for family in set(PROPOSERS) - {"window"}:
        name, options = methods.get(family, (family, {}))
        method = METHODS.find(name)
        scores = method.score(replace(context, options=method.read_options(name, options)))
        assert plans[family] == plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0).pruned
    assert {f"window {start}" for start in range(5)} <= set(plans)
    assert all(plans[f"window {start}"] == (start, start + 1) for start in range(5))
    sets = [each.plan.pruned for each in pool]
    assert len(sets) == len(set(sets)) < len(plans)  # a plan that two families propose is there once
    assert all(not each.plan.merged for each in pool)


def test_windows_that_turn_the_state_least_come_first_and_not_side_by_side():
    context = context_of(num_keep=2)
    scores = METHODS.find("angular").score(context)
    distances = scores.evidence["distances"]
    best = min(range(3), key=lambda start: (distances[start], -start))
    pool, _ = make_pool(context, 4, 2, ["window"])
    assert pool[0].names == [f"window {best}"] and pool[0].plan.pruned == tuple(range(best, best + 4))
    twelve = make_llama(num_hidden_layers=12)
    wide = replace(context_of(model=lambda: twelve, num_keep=4), num_layers=12)
    starts = [int(each.names[0].split()[1]) for each in make_pool(wide, 8, 12, ["window"])[0]]
    assert len(starts) >= 2 and all(abs(a - b) >= 2 for a in starts for b in starts if a != b)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_small_pool_uses_the_first_families_and_reserves_a_place_for_windows(size):
    pool, _ = make_pool(context_of(), 2, size, ["last", "random", "window"])
    assert len(pool) == min(size, 5)
    expected = {1: {"last"}, 2: {"last", "window"}}.get(size, {"last", "random", "window"})
    assert {name.split()[0] for name in named(pool)} == expected


def test_all_candidates_keep_protected_layers_and_their_layers_fit():
    def fits(old, new, kept):
        return old % 2 == new % 2

    context = context_of(protected=(0,), fits=fits)
    pool, failures = make_pool(context, 2, 12)
    assert failures == {} and len(pool) > 2
    for each in pool:
        keep = each.plan.keep
        assert 0 in keep and len(keep) == 4
        assert all(fits(old, new, 4) for new, old in enumerate(keep))
    plan = choose(protected=(0,), fits=fits)
    assert 0 in plan.keep and all(fits(old, new, 4) for new, old in enumerate(plan.keep))


# --- what is judged by, and what is not ---------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(3, 3), (128, 6)])
def test_at_most_a_quarter_of_the_samples_is_held_out(count, expected):
    aside, rest = put_aside(SAMPLES, count, 0)
    assert len(aside) == expected
    ids = [id(sample) for sample in (*aside, *rest)]
    assert sorted(ids) == sorted(map(id, SAMPLES)) and len(set(ids)) == len(SAMPLES)
    assert put_aside(SAMPLES, count, 0) == (aside, rest) != put_aside(SAMPLES, count, 1)


def test_nothing_is_fitted_scored_or_trained_on_held_out_samples(monkeypatch):
    aside, rest = put_aside(SAMPLES, 128, 0)
    seen = {"pool": [], "repair": [], "train": []}

    def pool(context, *args, **options):
        seen["pool"].append(context.samples)
        return make_pool(context, *args, **options)

    def repair(model, plan, samples, *args, **options):
        seen["repair"].append(samples)
        return fit_repair(model, plan, samples, *args, **options)

    def train(model, samples, *args, **options):
        seen["train"].append(samples)
        return model, None

    judged = []
    real = auto.held_out_loss

    def measure(model, plan, samples, context):
        judged.append(len(samples))
        return real(model, plan, samples, context)

    for name, spy in {
        "make_pool": pool,
        "fit_repair": repair,
        "finetune": train,
        "held_out_loss": measure,
    }.items():
        monkeypatch.setattr(auto, name, spy)
    plan = choose(replace_options(UNTRAINED, rounds=1))
    hidden = set(map(id, aside))
    for part in ("pool", "repair", "train"):
        assert seen[part]
        for samples in seen[part]:
            assert not hidden & set(map(id, samples)) and len(samples) == len(rest)
    assert set(judged) == {len(aside)}
    assert plan.evidence["validation_samples"] == 6 and plan.evidence["training_samples"] == 18


def replace_options(options, **changes):
    return options.model_copy(update=changes)


@pytest.mark.parametrize("kind", ["none", "linear"])
def test_without_training_the_lowest_loss_of_the_repaired_models_wins(kind):
    aside, rest = put_aside(SAMPLES, 128, 0)
    plan = choose(replace_options(UNTRAINED, repair=kind))
    table = plan.evidence["candidates"]
    assert len(table) >= 4
    for row in table:
        dropped, fitted = dropping(row["pruned"]), None
        if kind != "none":
            fitted = fit_repair(six_layers(), dropped, rest, Collator(), kind=kind, rows=384, seed=0)
        expected = nll(prune_(six_layers(), dropped, repair=fitted), aside)
        assert row["losses"] == pytest.approx([expected], rel=1e-5) and row["steps"] == [0]
    best = min(table, key=lambda row: row["losses"][0])
    assert list(plan.pruned) == best["pruned"] and plan.evidence["winner"] == best["names"]
    assert plan.method == "auto" and plan.evidence["rounds"] == []


def test_what_is_left_open_follows_from_the_run():
    options = AutoOptions()
    run = context_of([], options=options, num_keep=4)
    found = settled(options, run)
    assert (found.rounds, found.families, found.repair) == (2, list(PROPOSERS), run.repair.kind)
    shrunk = replace(run, trained=False, repair=RepairOptions(kind="layer_wise", rows=7))
    found = settled(options, shrunk)
    assert found.rounds == 0
    assert (found.repair, found.repair_rows) == ("layer_wise", 7)
    unrepaired = replace(run, repair=RepairOptions(kind="none"))
    assert settled(options, unrepaired).repair == "none"
    asked = AutoOptions(rounds=1, families=["last"], repair="none", repair_rows=3)
    assert settled(asked, shrunk) == asked


# --- rounds -------------------------------------------------------------------------------------------------


def searched(monkeypatch, loss, count=12, **options):
    """Returns a search over `count` windows, with losses from a table instead of models."""
    total = count + 1
    plans = [Candidate([f"window {i}"], dropping([i, i + 1], total + 1)) for i in range(count)]
    monkeypatch.setattr(auto, "make_pool", lambda *_, **__: (plans, {}))
    trained = []

    def measured(self, candidate, steps):
        number = candidate.plan.pruned[0]
        if steps:
            trained.append((number, steps))
        return loss(number, steps)

    monkeypatch.setattr(auto._Search, "_loss", measured)
    samples = make_samples(200)
    context = replace(
        context_of(samples, options=AutoOptions(**options), num_keep=total - 1),
        num_layers=total + 1,
        finetune=FinetuneOptions(batch_size=2, accumulation=1, epochs=1.0),  # 100 steps
    )
    return METHODS.find("auto").plan(context), trained


def test_twelve_become_six_become_three(monkeypatch):
    """Untrained, the first ones are best; 5 steps swap the halves, and 15 steps swap them again."""
    order = {0: lambda i: i, 5: lambda i: -i, 15: lambda i: abs(i - 4)}
    plan, trained = searched(monkeypatch, lambda i, steps: float(order[steps](i)))
    assert trained == [(i, 5) for i in range(6)] + [(5, 15), (4, 15), (3, 15)]
    assert plan.pruned == (4, 5) and plan.evidence["winner"] == ["window 4"]
    assert plan.evidence["finetune_steps"] == 100
    assert plan.evidence["rounds"] == [{"candidates": 6, "steps": 5}, {"candidates": 3, "steps": 15}]
    table = plan.evidence["candidates"]
    assert [row["steps"] for row in table] == [
        [0, 5, 15] if i in (3, 4, 5) else [0, 5] if i < 6 else [0] for i in range(12)
    ]
    assert table[4]["losses"] == [4.0, -4.0, 0.0]
    assert all(row["seconds"] >= 0 for row in table)


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (12, {"rounds": 0}, []),
        (12, {"rounds": 1}, [(6, 5)]),
        (12, {"rounds": 3}, [(6, 5), (3, 15), (2, 45)]),
        (5, {}, [(3, 5), (2, 15)]),
        (2, {}, []),
        (3, {"share": 0.5}, [(2, 50)]),
        (12, {"share": 0.001, "rounds": 1}, [(6, 1)]),
        (12, {"share": 0.5, "rounds": 3}, [(6, 50), (3, 100), (2, 100)]),
    ],
)
def test_candidates_and_steps_of_every_round(monkeypatch, count, options, expected):
    plan, trained = searched(monkeypatch, lambda i, steps: float(i), count, **options)
    assert [(r["candidates"], r["steps"]) for r in plan.evidence["rounds"]] == expected
    assert len(trained) == sum(candidates for candidates, _ in expected)
    assert plan.pruned == (0, 1)


def test_ties_go_to_the_first_candidate(monkeypatch):
    plan, trained = searched(monkeypatch, lambda i, steps: 1.0)
    assert plan.pruned == (0, 1) and [i for i, _ in trained] == [0, 1, 2, 3, 4, 5, 0, 1, 2]


def test_a_candidate_that_fails_in_training_drops_out(monkeypatch):
    def loss(number, steps):
        if (number, steps) in ((0, 5), (1, 15)):
            raise NonFiniteError("The loss is NaN.")
        return float(number)

    plan, trained = searched(monkeypatch, loss)
    assert trained[6:] == [(1, 15), (2, 15), (3, 15)]
    assert plan.pruned == (2, 3)
    assert [row.get("error") for row in plan.evidence["candidates"][:3]] == ["The loss is NaN."] * 2 + [None]
    last, _ = searched(monkeypatch, lambda i, steps: float(i) if steps < 15 else loss(1, 15))
    assert last.pruned == (3, 4)  # the best of the round before: all three of the last round failed
    with pytest.raises(PlanError, match="Training failed for all 6 candidates of round 1: The loss is NaN"):
        searched(monkeypatch, lambda i, steps: float(i) if steps == 0 else loss(0, 5))


def test_steps_follow_the_recipe(monkeypatch):
    context = context_of(options=UNTRAINED)
    assert auto._Search(context, UNTRAINED, []).steps == 8  # 24 samples twice, 6 per step
    context = context_of(finetune=FinetuneOptions(max_steps=40))
    assert auto._Search(context, UNTRAINED, []).steps == 40


def test_candidates_are_trained_with_the_options_of_the_fine_tuning():
    options = AutoOptions(families=["last", "random", "window"], pool=4, rounds=1, repair="linear", share=0.5)
    plan = choose(options)
    json.dumps(plan.evidence)
    assert plan.evidence["rounds"] == [{"candidates": 2, "steps": 4}]
    trained = [row for row in plan.evidence["candidates"] if len(row["losses"]) == 2]
    assert len(trained) == 2 and all(after < before - 0.1 for before, after in (r["losses"] for r in trained))
    assert list(plan.pruned) == min(trained, key=lambda row: row["losses"][1])["pruned"]

    aside, rest = put_aside(SAMPLES, 128, 0)
    row = trained[0]
    dropped = dropping(row["pruned"])
    fitted = fit_repair(six_layers(), dropped, rest, Collator(), kind="linear", rows=384, seed=0)
    model = prune_(six_layers(), dropped, repair=fitted)
    auto.finetune(
        model, rest, collator=Collator(), max_steps=4, batch_size=6, accumulation=1, learning_rate=1e-2,
        warmup=0, precision="fp32", device="cpu", seed=0,
    )  # fmt: skip
    assert row["losses"][1] == pytest.approx(nll(model, aside), rel=1e-4)


# --- what goes wrong ----------------------------------------------------------------------------------------


def test_a_failing_candidate_or_family_is_noted_but_not_fatal(monkeypatch):
    lost = choose().pruned

    def repair(model, plan, *args, **options):
        if plan.pruned == lost:
            raise ModelError("This one cannot be repaired.")
        return fit_repair(model, plan, *args, **options)

    def no_trace():
        raise PlanError("The trace holds no gates.")

    monkeypatch.setattr(auto, "fit_repair", repair)
    plan = choose(trace=no_trace)
    table = plan.evidence["candidates"]
    failed = [row for row in table if "error" in row]
    assert plan.evidence["failed"] == [{"names": ["gate"], "error": "The trace holds no gates."}]
    if lost in [tuple(row["pruned"]) for row in table]:
        assert [row["error"] for row in failed] == ["This one cannot be repaired."]
        assert failed[0]["losses"] == []
    assert plan.pruned != lost


def test_if_all_candidates_fail_the_error_says_why(monkeypatch):
    def repair(*args, **options):
        raise ModelError("It is a mixture of experts.")

    monkeypatch.setattr(auto, "fit_repair", repair)
    with pytest.raises(PlanError, match=r"No candidate.*last.*: It is a mixture of experts") as error:
        choose()
    assert error.value.hint is not None and "repair to none" in error.value.hint
    assert choose(replace_options(UNTRAINED, repair="none")).keep


def test_too_few_or_unlearned_samples_are_refused():
    with pytest.raises(DataError, match="number of training samples is 1"):
        choose(samples=SAMPLES[:1])
    unlearned = [{**sample, "labels": [-100] * len(sample["labels"])} for sample in SAMPLES]
    with pytest.raises(DataError, match="None of the 6 samples held out"):
        choose(samples=unlearned)


def test_with_nothing_to_prune_all_layers_stay():
    plan = choose(num_keep=L)
    assert plan.keep == tuple(range(L)) and plan.evidence["winner"] == ["whole"]
