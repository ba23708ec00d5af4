"""LaCo: its search on models in which the right run is known, and the result of a chain of merges."""

import math

import pytest
import torch
from builders import make_project
from conftest import make_model
from families import make_family_model

from gradpruner.common.errors import ConfigError, ModelError, NonFiniteError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.laco import LacoOptions, _replaced, _Runs, _Similarity
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.reports import html
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe

NAMES = ["laco", "laco_released"]
SAMPLES = [
    {"input_ids": list(range(3 + i, 8 + 2 * i)), "labels": [-100] * 3 + list(range(6 + i, 8 + 2 * i))}
    for i in range(5)
]


def make_context(model, **options):
    return MethodContext(
        num_layers=LayeredModel(model).num_layers,
        seed=0,
        trace=lambda: pytest.fail("no trace is needed"),
        model=lambda: model,
        **{"samples": SAMPLES, "collator": Collator(), **options},
    )


def plan(name, model, **options):
    return METHODS.find(name).plan(make_context(model, **options))


def with_run(model, first, last):
    """Makes the layers before `last` copies of it that do nothing: the run equals its last layer."""
    view = LayeredModel(model)
    with torch.no_grad():
        for layer in range(first, last):
            view.layers[layer].load_state_dict(view.layers[last].state_dict())
            for name, weight in view.weights(layer).items():
                if name.endswith(("o_proj", "down_proj")):
                    weight.zero_()
    return model


def states_of(model, samples=SAMPLES):
    """Returns the last states of samples run one by one, without padding."""
    with torch.no_grad():
        return [model.model(torch.tensor([s["input_ids"]])).last_hidden_state.flatten() for s in samples]


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [1, 2, 4])
def test_a_run_that_equals_its_last_layer_is_found(name, first):
    model = with_run(make_model(num_hidden_layers=10), first, first + 3)
    found = plan(name, model, num_keep=7)
    assert found.merged == {first: (first + 1, first + 2, first + 3)}
    assert found.evidence["merges"][0]["similarity"] == pytest.approx(1, abs=1e-6)
    assert found.evidence["threshold"] > 0.9
    expected = states_of(model)
    for state, wanted in zip(states_of(prune_(model, found)), expected, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_layers, options", [(6, {}), (9, {"merge_layers": 3, "interval": 1})])
def test_any_budget_is_met_exactly(name, num_layers, options):
    for num_keep in (2, 3, 4, 5, num_layers):
        model = make_model(num_hidden_layers=num_layers)
        found = plan(name, model, num_keep=num_keep, protected=(0,), options=LacoOptions(**options))
        assert len(found.keep) == num_keep and 0 in found.keep
        assert len(found.pruned) == sum(map(len, found.merged.values()))
        assert (found.rule, found.method, found.density) == (name, name, 1.0)
        assert found.evidence["num_layers"] == num_layers and found.evidence["model"] == fingerprint(model)
        assert PruningPlan.from_dict(found.to_dict()) == found
        pruned = prune_(model, found)
        assert all(bool(torch.isfinite(state).all()) for state in states_of(pruned))


@pytest.mark.parametrize("name", NAMES)
def test_plans_are_deterministic_and_the_model_is_unchanged_to_the_bit(name):
    model = make_model(num_hidden_layers=10)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert plan(name, model, num_keep=4) == plan(name, make_model(num_hidden_layers=10), num_keep=4)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    reference = make_model(num_hidden_layers=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers)
    assert all(p.requires_grad for p in model.parameters())


def test_linears_are_restored_after_an_error_too():
    model = make_model()
    view = LayeredModel(model)
    weights = {2: {name: torch.zeros_like(weight) for name, weight in view.weights(2).items()}}
    with pytest.raises(ValueError), _replaced(view, weights):
        assert not model.model.layers[2].mlp.up_proj.weight.any()
        raise ValueError
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), make_model().parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_similarities_equal_those_of_really_pruned_models(name):
    found = plan(name, make_model(num_hidden_layers=10), num_keep=4)
    original = states_of(make_model(num_hidden_layers=10))
    actions = [LayerAction("keep")] * 10
    for merge in found.evidence["merges"]:
        for layer in merge["layers"]:
            actions[layer] = LayerAction("merge", merge["into"])
        pruned = prune_(make_model(num_hidden_layers=10), PruningPlan(tuple(actions), name))
        cosines = [
            float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
            for a, b in zip(states_of(pruned), original, strict=True)
        ]
        assert merge["similarity"] == pytest.approx(math.fsum(cosines) / 5, abs=1e-5)
        assert merge["similarity"] > found.evidence["threshold"]
    assert tuple(actions) == found.actions


def test_a_higher_threshold_would_not_reach_the_budget():
    context = make_context(make_model(num_hidden_layers=10), num_keep=5)
    found = METHODS.find("laco").plan(context)
    view, threshold = LayeredModel(context.model()), found.evidence["threshold"]
    with torch.no_grad():
        similarity = _Similarity(view, "laco", context, 10)
        runs = _Runs(view, LacoOptions(), 5, set())
        for above, missing in ((threshold, False), (threshold + 0.002, True)):
            merges = runs.sweep(lambda merged, above=above: similarity.of(merged) > above)
            assert bool(runs.missing(merges)) == missing


def test_the_sweep_by_hand():
    # C = 4, I = 2 on 12 layers. If every candidate is accepted, targets begin at layer 12 - 1 - 4.
    runs = _Runs(LayeredModel(make_model(num_hidden_layers=12)), LacoOptions(), 10, set())
    assert runs.sweep(lambda _: True) == ((7, (8, 9, 10)), (5, (6, 7, 11)), (3, (4, 5)), (1, (2, 3)))
    tried = []
    assert runs.sweep(lambda merges: tried.append(merges[-1])) == ()
    assert tried == [(i, (i + 1, i + 2, i + 3)) for i in range(7, -1, -1)]
    # Protected layers take in others, but are never merged away; the last merge takes only what is missing.
    runs = _Runs(LayeredModel(make_model(num_hidden_layers=12)), LacoOptions(), 4, {7, 9, 11})
    assert runs.sweep(lambda _: True) == ((7, (8,)), (5, (6,)), (3, (4, 5)))


def test_an_interval_does_not_step_over_layer_0():
    options = LacoOptions(merge_layers=3, interval=5)
    runs = _Runs(LayeredModel(make_model(num_hidden_layers=6)), options, 4, set())
    assert runs.sweep(lambda _: True) == ((2, (3, 4)), (0, (1, 2)))


def test_only_num_samples_are_used_and_padding_is_ignored():
    found = plan("laco", make_model(), num_keep=5, options=LacoOptions(num_samples=2))
    assert found.evidence["samples"] == 2
    one_by_one = [
        plan("laco", make_model(), num_keep=5, samples=[sample]).evidence["merges"] for sample in SAMPLES[:2]
    ]
    if one_by_one[0][0]["into"] == one_by_one[1][0]["into"] == found.evidence["merges"][0]["into"]:
        mean = sum(merges[0]["similarity"] for merges in one_by_one) / 2
        assert found.evidence["merges"][0]["similarity"] == pytest.approx(mean, abs=1e-5)


# --- chains -------------------------------------------------------------------------------------------------


def test_a_chain_by_hand():
    model = make_model(num_hidden_layers=4)
    before = [
        {name: weight.detach().clone() for name, weight in LayeredModel(model).weights(i).items()}
        for i in range(4)
    ]
    norms = model.model.layers[0].input_layernorm.weight.detach().clone()
    merge = LayerAction("merge", 0), LayerAction("merge", 1)
    prune_(model, PruningPlan((LayerAction("keep"), *merge, LayerAction("keep")), "laco"))
    for name, found in LayeredModel(model).weights(0).items():
        w0, w1, w2, _ = (layer[name].double() for layer in before)
        collapsed = w1 + (w2 - w1)
        torch.testing.assert_close(found.double(), w0 + (collapsed - w0), rtol=1e-5, atol=1e-6)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, norms)


def test_biases_and_norms_of_the_target_layer_stay():
    model = make_model("qwen2", num_hidden_layers=6, use_sliding_window=False)
    found = plan("laco_released", model, num_keep=3)
    target = min(found.merged)
    layer = model.model.layers[target]
    kept = {n: p.detach().clone() for n, p in layer.named_parameters() if "norm" in n or "bias" in n}
    prune_(model, found)
    assert any("bias" in name for name in kept)
    now = dict(model.model.layers[found.keep.index(target)].named_parameters())
    assert all(torch.equal(now[name], value) for name, value in kept.items())


@pytest.mark.parametrize("name", NAMES)
def test_merging_on_disk_equals_merging_in_memory_and_verifies(name, tmp_path):
    model = make_model(num_hidden_layers=10)
    model.save_pretrained(tmp_path / "src")
    found = plan(name, model, num_keep=2)
    assert any(target in found.pruned for target in found.merged)  # a chain, the case worth testing
    report = prune_checkpoint(tmp_path / "src", tmp_path / "dst", found, verify="full")
    assert report.passed and report.level == "full"
    prune_(model, found)
    loaded = type(model).from_pretrained(tmp_path / "dst")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_transposed_linears_are_searched_too():
    model = make_family_model("gpt2", num_hidden_layers=6)
    before = [p.detach().clone() for p in model.parameters()]
    found = plan("laco", model, num_keep=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert found.evidence["merges"][-1]["similarity"] > 0 and len(prune_(model, found).transformer.h) == 4


# --- refusals -----------------------------------------------------------------------------------------------


def test_impossible_plans_are_refused():
    with pytest.raises(PlanError, match="asked to remove 3 layers and can remove 1"):
        plan("laco", make_model(), num_keep=3, protected=(1, 3, 4))
    with pytest.raises(ModelError, match="can only be dropped"):
        plan("laco", make_family_model("mixtral"), num_keep=8)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        model = make_model()
        with torch.no_grad():
            model.model.norm.weight.fill_(math.nan)
        plan("laco", model, num_keep=4)


def test_quantised_layers_are_not_merged_in_memory_either():
    model = make_model()
    linear = model.model.layers[2].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    actions = (*[LayerAction("keep")] * 4, LayerAction("merge", 3), LayerAction("keep"))
    with pytest.raises(PlanError, match="can be dropped but not merged"):
        prune_(model, PruningPlan(actions, "laco"))


def test_only_plans_whose_layers_fit_are_accepted():
    fits = lambda old, new, kept: old == new or old >= 4  # noqa: E731
    found = plan("laco", make_model(), num_keep=4, fits=fits)
    assert all(fits(old, new, 4) for new, old in enumerate(found.keep))
    with pytest.raises(PlanError, match="do not fit at their new positions"):
        plan("laco", make_model(), num_keep=4, fits=lambda *_: False)


def test_a_candidate_that_overflows_counts_as_least_similar():
    model = make_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(3e38)
        model.model.layers[3].mlp.up_proj.weight.zero_()
    found = plan("laco", model, num_keep=5)
    assert all(math.isfinite(merge["similarity"]) for merge in found.evidence["merges"])


@pytest.mark.parametrize("raw", [{"merge_layers": 1}, {"interval": 0}, {"num_samples": 0}, {"layers": 3}])
def test_options_are_checked(raw):
    method = METHODS.find("laco")
    with pytest.raises(ConfigError, match=f"methods.laco.{next(iter(raw))}"):
        method.read_options("laco", raw)
    assert method.read_options("laco", {"interval": 1}) == LacoOptions(interval=1)
    assert (method.label, METHODS.find("laco_released").label) == ("LaCo", "LaCo, as released")


# --- the whole run ------------------------------------------------------------------------------------------


@pytest.fixture
def unrendered(monkeypatch):
    """Skips the report, whose figures take longer than the run."""
    monkeypatch.setattr(html, "render_html", lambda record, path: path)


def test_a_row_of_the_comparison_needs_no_recording(unrendered, tmp_path):
    path, _ = make_project(
        tmp_path,
        variants=["laco"],
        methods={"laco": {"merge_layers": 3, "interval": 1}},
        plan={"num_prune": 2, "protect_first": 1},
    )
    record = run(load_recipe(path))
    row, planned = record["variants"]["laco"], record["plans"]["laco"]
    assert (row["label"], row["num_layers"], row["error"]) == ("LaCo", 2, None)
    assert row["pruning"]["verified"]["passed"] and row["pruning"]["verified"]["level"] == "full"
    assert row["evaluation"]["metrics"] and not (tmp_path / "run" / "trace").exists()
    assert [a["action"] for a in planned["actions"]].count("merge") == 2 and planned["rule"] == "laco"


def test_the_released_preset_as_a_row(unrendered, tmp_path):
    path, _ = make_project(
        tmp_path, variants=["gradpruner_released"], plan={"num_prune": 2, "num_merge": 1, "protect_first": 1}
    )
    record = run(load_recipe(path))
    row, planned = record["variants"]["gradpruner_released"], record["plans"]["gradpruner_released"]
    assert row["label"] == "GradPruner, released code" and row["error"] is None
    actions = [a["action"] for a in planned["actions"]]
    assert actions[0] == actions[3] == "keep" and sorted(actions[1:3]) == ["drop", "merge"]
    assert next(a["into"] for a in planned["actions"] if a["action"] == "merge") == 0
