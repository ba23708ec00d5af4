"""The greedy choice by the task's loss, compared with really pruned models and maps solved by numpy."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import make_llama, make_samples, pass_through
from conftest import make_model
from families import make_family_model
from torch.nn.functional import cross_entropy

from gradpruner.common.errors import DataError, ModelError, NonFiniteError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.task_loss import TaskLossOptions, _Pruned
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import Walk, drawn, sample_batches
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.repair import Repair, RepairedCut, places_of
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.target import RefitTarget

SAMPLES = make_samples(40)
NONE = TaskLossOptions(repair="none", num_samples=12)
LINEAR = TaskLossOptions(num_samples=12, repair_samples=20)
L = 6


def six_layers(model_type="llama", seed=0):
    if model_type == "llama":
        return make_llama(seed, num_hidden_layers=L)
    return make_model(model_type, seed, initializer_range=0.2)


def context_of(model, samples=SAMPLES, **changes):
    fields = {"num_keep": 3, "options": NONE, **changes}
    return MethodContext(
        num_layers=LayeredModel(model).num_layers,
        seed=0,
        trace=lambda: pytest.fail("no trace is needed"),
        model=lambda: model,
        samples=samples,
        collator=Collator(),
        **fields,
    )


def score(model, samples=SAMPLES, **changes):
    return METHODS.find("task_loss").score(context_of(model, samples, **changes))


def nll(model, samples):
    """Nats per learned token, one sample at a time."""
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sample["input_ids"]])).logits[0]
        labels = torch.tensor(sample["labels"])[1:]
        learned = labels != -100
        total += float(cross_entropy(logits[:-1][learned], labels[learned], reduction="sum"))
        count += int(learned.sum())
    return total / count


def without(layers, model_type="llama", repair=None):
    plan = PruningPlan.from_keep(L, [i for i in range(L) if i not in layers])
    return prune_(six_layers(model_type), plan, repair=repair(plan) if repair else None)


def greedy(cost, rounds, free=range(L)):
    """Returns layers in the order of their removal, their costs, and the others' costs in the last round."""
    removed, history, costs = [], [], {}
    for _ in range(rounds):
        costs = {i: cost(removed, i) for i in free if i not in removed}
        removed.append(min(costs, key=lambda i: (costs[i], -i)))
        history.append(costs.pop(removed[-1]))
    return removed, history, costs


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_without_repair_it_equals_greedy_removal_with_really_pruned_models(model_type):
    measured = drawn(SAMPLES, 12, 0)
    removed, history, others = greedy(
        lambda gone, layer: nll(without([*gone, layer], model_type), measured), 2
    )
    scores = score(six_layers(model_type), num_keep=4)
    assert scores.evidence["removed"] == removed
    dense = nll(six_layers(model_type), measured)
    assert scores.evidence["nll"] == pytest.approx([dense, *history], rel=1e-5)
    costs = {int(layer): value for layer, value in scores.evidence["next_nll"].items()}
    assert costs == pytest.approx(others, rel=1e-5)
    assert scores.ascending() == [*removed, *sorted(others, key=lambda i: (others[i], -i))]
    assert plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0).pruned == tuple(sorted(removed))


# --- repair -------------------------------------------------------------------------------------------------


def caught(model, samples, place, last="mlp.down_proj"):
    """Returns outputs of a layer and of its last module without first tokens, (tokens, hidden) each, fp64."""
    layer, states, given = model.model.layers[place], [], []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: states.append(out)),
        layer.get_submodule(last).register_forward_hook(lambda _, __, out: given.append(out)),
    ]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=torch.tensor([sample["input_ids"]]))
    for hook in hooks:
        hook.remove()
    return [torch.cat([one[0, 1:] for one in part]).double().numpy() for part in (states, given)]


def map_by_numpy(h, y, x, ridge):
    """Solves the weighted ridge regression for U by stacked least squares instead of normal equations."""
    root = 1 / np.linalg.norm(h, axis=1, keepdims=True)
    rho = ridge * np.mean(np.sum((x * root) ** 2, axis=0))
    rows = np.vstack([x * root, math.sqrt(rho) * np.eye(x.shape[1])])
    wanted = np.vstack([(h - y) * root, np.zeros((x.shape[1], h.shape[1]))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def repaired(gone, fitted, given=None, ridge=0.1):
    """Returns the maps of all cuts, fitted from input to output; those in `given` are kept."""
    maps = {}
    plan = PruningPlan.from_keep(L, [i for i in range(L) if i not in gone])

    def repair(plan):
        dense = six_layers()
        weights = {
            layer: ((torch.eye(16, dtype=torch.float64) + torch.from_numpy(u)) @ w.double()).float()
            for layer, u in maps.items()
            for w in [dense.model.layers[layer].mlp.down_proj.weight.detach()]
        }
        cuts = tuple(
            RepairedCut(layer, "mlp.down_proj", run, 0.1 if layer in weights else None, 1.0, 1.0)
            for layer, run in places_of(plan, "linear")
        )
        return Repair("linear", plan.pruned, cuts, weights)

    for layer, run in places_of(plan, "linear"):
        if given and layer in given:
            maps[layer] = given[layer]
            continue
        h, _ = caught(six_layers(), fitted, run[-1])
        y, x = caught(without(gone, repair=repair), fitted, plan.keep.index(layer))
        maps[layer] = map_by_numpy(h, y, x, ridge)
    return maps, without(gone, repair=repair)


def test_with_repair_it_equals_greedy_removal_with_pruned_and_repaired_models():
    chosen = drawn(SAMPLES, 14, 0)
    measured, fitted = chosen[:6], chosen[6:]

    def cost(removed, layer):
        """The new cut gets a new map; later cuts keep theirs."""
        before = repaired(removed, fitted)[0] if removed else {}
        given = {k: u for k, u in before.items() if k > layer}
        return nll(repaired([*removed, layer], fitted, given)[1], measured)

    removed, history, others = greedy(cost, 2, free=range(1, 5))
    options = TaskLossOptions(num_samples=6, repair_samples=8)
    scores = score(six_layers(), options=options, num_keep=4, protected=(0, 5))
    assert scores.evidence["removed"] == removed
    assert scores.evidence["nll"][1:] == pytest.approx(history, rel=1e-4)
    costs = {int(layer): value for layer, value in scores.evidence["next_nll"].items()}
    assert costs == pytest.approx(others, rel=1e-4)
    plain = score(six_layers(), options=replace_options(options, repair="none"), num_keep=4, protected=(0, 5))
    assert scores.evidence["nll"] != pytest.approx(plain.evidence["nll"], rel=1e-3)


def replace_options(options, **changes):
    return options.model_copy(update=changes)


def test_a_huge_ridge_is_no_repair():
    loose = score(six_layers(), options=replace_options(LINEAR, ridge=1e12))
    plain = score(six_layers(), options=NONE)
    assert loose.evidence["removed"] == plain.evidence["removed"]
    assert loose.evidence["nll"] == pytest.approx(plain.evidence["nll"], rel=1e-6)


@pytest.mark.parametrize("options", [NONE, LINEAR], ids=["none", "linear"])
@pytest.mark.parametrize("gone", [(2, 4, 3), (5, 1), (0, 3), (4, 2), (1, 0, 2)])
def test_stored_states_and_maps_equal_recomputed_ones(gone, options):
    model = six_layers()
    pruned = _Pruned(LayeredModel(model), context_of(model), options)
    for layer in gone:
        pruned.remove(layer)
    walked = [pruned._measured.start]
    for layer in pruned.kept:
        walked.append(pruned._run(pruned._measured, layer, walked[-1]))
    for held, anew in zip(pruned._states, walked, strict=True):
        torch.testing.assert_close(held, anew, rtol=1e-4, atol=1e-5)
    other = _Pruned(LayeredModel(model), context_of(model), options)
    for layer in sorted(gone):  # the order of removal does not matter
        other.remove(layer)
    assert set(other.updates) == set(pruned.updates)
    if options.repair == "none":
        assert not pruned.updates
        return
    chosen = drawn(SAMPLES, 32, 0)
    maps, _ = repaired(list(gone), chosen[12:])
    assert set(pruned.updates) == set(maps)
    for layer, update in maps.items():
        for found in (pruned.updates[layer], other.updates[layer]):
            torch.testing.assert_close(found, torch.from_numpy(update), rtol=1e-3, atol=1e-4)


def test_maps_and_loss_use_different_samples():
    evidence = score(six_layers(), options=LINEAR).evidence
    others = drawn(SAMPLES, 32, 0)[12:]
    assert evidence["samples"] == 12 and evidence["repair_samples"] == 20
    assert evidence["repair_tokens"] == sum(len(sample["input_ids"]) - 1 for sample in others)
    few = score(six_layers(), SAMPLES[:13], options=LINEAR).evidence  # one sample is left, maps need two
    assert few["samples"] == few["repair_samples"] == 12


# --- work ---------------------------------------------------------------------------------------------------


def counted(model):
    """Records how many samples the layers of a model are run on, one entry per run."""
    runs = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, __: runs.append(args[0].shape[0]))
    return runs


def applications(options, num_keep=3):
    """Returns removed layers, and runs of layers beyond those that prepare the walks: samples -> runs."""
    model, chosen = six_layers(), drawn(SAMPLES, 32, 0)
    runs = counted(model)
    for samples in (chosen[:12], chosen[12:])[: 1 + (options.repair != "none")]:
        Walk(LayeredModel(model), list(sample_batches(samples, Collator(), "cpu", 32)))
    preparing = Counter(runs)
    again = six_layers()
    runs = counted(again)
    scores = score(again, options=options, num_keep=num_keep)
    return scores.evidence["removed"], Counter(runs) - preparing


def place(removed, number):
    """Returns the position of a round's layer among the layers then left."""
    return removed[number] - sum(1 for gone in removed[:number] if gone < removed[number])


@pytest.mark.parametrize("num_keep", [2, 3, 5])
def test_layers_run_as_often_as_documented_without_repair(num_keep):
    removed, runs = applications(NONE, num_keep)
    rounds = [L - done for done in range(len(removed))]
    after = sum(m - 1 - place(removed, r) for r, m in enumerate(rounds[:-1]))
    assert runs == {12: L + sum(m * (m - 1) // 2 for m in rounds) + after}


@pytest.mark.parametrize("num_keep", [2, 3, 5])
def test_layers_run_as_often_as_documented_with_repair(num_keep, monkeypatch):
    # The module to refit is found by trial, once per layer; these runs are not counted.
    def found(view, walk, layer, state):
        linear = view.linears(layer)["mlp.down_proj"]
        return RefitTarget("mlp.down_proj", linear, linear.weight, 1.0)

    monkeypatch.setattr("gradpruner.methods.task_loss.target_of", found)
    removed, runs = applications(LINEAR, num_keep)
    rounds = [L - done for done in range(len(removed))]
    tried = sum(m - 1 for m in rounds)
    repaired_again = sum(place(removed, r) > 0 for r in range(len(rounds) - 1))
    after = sum(m - 1 - place(removed, r) for r, m in enumerate(rounds[:-1]))
    measured = L + sum(m * (m - 1) // 2 for m in rounds) + after + tried + repaired_again
    fitted = L + tried + after + repaired_again
    assert runs == {12: measured, 20: fitted}


def test_a_shortlist_tries_fewer_layers_from_the_second_round_on():
    free = score(six_layers(), options=NONE)
    short = replace_options(NONE, shortlist=2)
    removed, runs = applications(short)
    assert runs[12] < applications(NONE)[1][12]
    assert removed[0] == free.evidence["removed"][0]
    first = score(six_layers(), options=NONE, num_keep=5)
    left = [i for i in first.ascending() if i != removed[0]]
    assert removed[1] in left[:2]
    assert sorted(score(six_layers(), options=short).values) == list(range(L))


# --- constraints --------------------------------------------------------------------------------------------


def test_of_equal_layers_the_later_is_removed():
    scores = score(pass_through(six_layers(), 0, 1, 2, 3, 4, 5), options=NONE)
    assert scores.evidence["removed"] == [5, 4, 3]
    assert len(set(scores.evidence["nll"])) == 1


@pytest.mark.parametrize("options", [NONE, LINEAR], ids=["none", "linear"])
def test_protected_layers_are_never_tried_and_rank_above_all(options):
    scores = score(pass_through(six_layers(), 1, 3), options=options, protected=(1, 3), num_keep=4)
    assert not {1, 3} & set(scores.evidence["removed"])
    assert not {"1", "3"} & set(scores.evidence["next_nll"])
    assert scores.ascending()[-2:] == [3, 1]
    all_but_one = score(six_layers(), options=options, protected=(0, 1, 2, 3, 4), num_keep=3)
    assert all_but_one.evidence["removed"] == [5]


def test_kept_layers_fit_at_their_new_positions():
    def fits(old, new, kept):  # as if every second layer were of another kind
        return old % 2 == new % 2

    free = score(six_layers(), num_keep=4).evidence["removed"]
    scores = score(six_layers(), num_keep=4, fits=fits)
    removed = sorted(scores.evidence["removed"])
    assert removed != sorted(free)
    keep = [i for i in range(L) if i not in removed]
    assert len(keep) == 4 and all(fits(old, new, 4) for new, old in enumerate(keep))
    assert list(plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0, fits=fits).pruned) == removed

    # The first layer is the cheapest of those that leave a choice that fits.
    measured = drawn(SAMPLES, 12, 0)
    pairs = [
        pair
        for pair in [(a, b) for a in range(L) for b in range(a + 1, L)]
        if all(fits(old, new, 4) for new, old in enumerate(i for i in range(L) if i not in pair))
    ]
    first = min({i for pair in pairs for i in pair}, key=lambda i: nll(without([i]), measured))
    assert scores.evidence["removed"][0] == first
    nothing = score(six_layers(), num_keep=4, fits=lambda old, new, kept: False)
    assert nothing.evidence["removed"] == [] and sorted(nothing.values) == list(range(L))


def test_40_percent_are_removed_by_default_and_two_layers_always_stay():
    assert len(score(six_layers(), num_keep=None).evidence["removed"]) == 2
    assert len(score(six_layers(), num_keep=0).evidence["removed"]) == 4
    assert len(score(six_layers(), num_keep=6).evidence["removed"]) == 1


def test_scores_are_deterministic_and_samples_depend_on_the_seed():
    one, other = (score(six_layers(), options=LINEAR) for _ in range(2))
    assert one == other
    context = replace(context_of(six_layers(), options=LINEAR), seed=1)
    assert METHODS.find("task_loss").score(context).evidence["nll"] != one.evidence["nll"]


def test_samples_and_models_that_cannot_be_used_are_refused():
    unlearned = [{**sample, "labels": [-100] * len(sample["labels"])} for sample in SAMPLES]
    with pytest.raises(DataError, match="the samples have none"):
        score(six_layers(), unlearned)
    with pytest.raises(DataError, match="no training samples"):
        score(six_layers(), [])
    with pytest.raises(ModelError, match="mixture of experts") as refused:
        score(experts(), options=LINEAR)
    assert refused.value.hint == "Set methods.task_loss.repair to none."
    assert len(score(experts(), options=NONE, num_keep=10).evidence["removed"]) == 2
    broken = six_layers()
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="with all layers is NaN or infinite"):
        score(broken)


def experts():
    return make_family_model("qwen3_moe")


def test_a_refused_model_is_not_changed():
    model = experts()
    with pytest.raises(ModelError):
        score(model, options=LINEAR)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_if_a_norm_ends_the_layer_its_scale_is_fitted():
    chosen = drawn(SAMPLES, 32, 0)
    model = six_layers("gemma2")
    pruned = _Pruned(LayeredModel(model), context_of(model, options=LINEAR), LINEAR)
    pruned.remove(2)
    h, _ = caught(model, chosen[12:], 2, "post_feedforward_layernorm")
    y, x = caught(model, chosen[12:], 1, "post_feedforward_layernorm")
    weight = 1 / np.sum(h**2, axis=1, keepdims=True)
    gram = np.sum(weight * x**2, axis=0)
    expected = np.sum(weight * x * (h - y), axis=0) / (gram + 0.1 * gram.mean())
    torch.testing.assert_close(pruned.updates[1], torch.from_numpy(expected), rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # Gemma's norm multiplies by 1 + weight
        norm = model.model.layers[1].post_feedforward_layernorm.weight
        norm.copy_((1 + torch.from_numpy(expected)) * (1 + norm.double()) - 1)
    prune_(model, PruningPlan.from_keep(L, [0, 1, 3, 4, 5]))
    assert pruned._loss(pruned._states[-1], "") == pytest.approx(nll(model, chosen[:12]), rel=1e-5)


def test_linears_with_bias_are_repaired_without_it():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=64, initializer_range=0.3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    pruned = _Pruned(LayeredModel(model.eval()), context_of(model, options=LINEAR), LINEAR)
    pruned.remove(2)
    block = LayeredModel(model)
    with torch.no_grad():
        weight = block.weights(1)["mlp.c_proj"]
        weight.copy_(weight + pruned.updates[1].float() @ weight)
    plan = PruningPlan.from_keep(4, [0, 1, 3])
    measured = drawn(SAMPLES, 32, 0)[:12]
    assert pruned._loss(pruned._states[-1], "") == pytest.approx(nll(prune_(model, plan), measured), rel=1e-5)
