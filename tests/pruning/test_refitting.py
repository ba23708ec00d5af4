"""Repair against numpy, against models that can be repaired exactly, and what is refused."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model, make_trace
from families import OPTIONS, SPECIAL_KEEP, make_family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from repairs import (
    SEED,
    collate,
    dropping,
    in_order,
    inputs_of,
    make_ids,
    relative_errors,
    states_behind,
    without_first,
)
from torch import nn

import gradpruner.pruning.repair.refitting as module
from gradpruner.common.errors import (
    ConfigError,
    DataError,
    IntegrityError,
    ModelError,
    NonFiniteError,
    PlanError,
    ShapeError,
)
from gradpruner.common.world import World
from gradpruner.gradients.trace import QUANTISED
from gradpruner.models.families import FAMILIES
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.options import RepairOptions
from gradpruner.plans.repair import (
    REPAIR_FILE,
    WEIGHTS_FILE,
    Repair,
    RepairedCut,
    places_of,
    unrepaired,
)
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.refitting import FEWEST_ROWS, enough_rows, fit_repair
from gradpruner.pruning.repair.ridge import ChannelSums, Sums, choose_update
from gradpruner.pruning.repair.tokens import HELD_OUT, Tokens

ROWS = 40
KINDS = ("linear", "least_squares", "layer_wise")
RIDGES = RepairOptions().ridges


def fit(model, plan, kind="least_squares", rows=None, count=512, **options):
    rows = make_ids(ROWS) if rows is None else rows
    options = {"answers": 0.0, "seed": SEED} | options  # all tokens count equally
    return fit_repair(model, plan, rows, collate, kind=kind, rows=count, **options)


def is_fitted(number):
    return number % HELD_OUT != 0


def is_held_out(number):
    return number % HELD_OUT == 0


# ----- the regressions -------------------------------------------------------------------------------------


def tokens(count, regressors=5, outputs=3, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, regressors)) * draw.uniform(0.1, 3, size=regressors)
    return x, draw.normal(size=(count, outputs)), draw.uniform(0.1, 2, size=count)


def summed(x, r, w, size=7):
    """Sums over tokens taken in some at a time."""
    sums = Sums.empty(x.shape[1], r.shape[1])
    for start in range(0, len(x), size):
        sums.add(*(torch.from_numpy(part[start : start + size]) for part in (x, r, w)))
    return sums


def test_sums_and_error_of_an_update():
    x, r, w = tokens(40)
    sums = summed(x, r, w)
    np.testing.assert_allclose(sums.gram, np.einsum("t,tp,tq->pq", w, x, x), rtol=1e-12)
    np.testing.assert_allclose(sums.cross, np.einsum("t,td,tp->dp", w, r, x), rtol=1e-12)
    assert sums.tokens == 40 and sums.is_finite
    assert sums.error(None) == pytest.approx((w[:, None] * r**2).sum() / 40)
    update = np.random.default_rng(1).normal(size=(3, 5))
    expected = (w[:, None] * (r - x @ update.T) ** 2).sum() / 40
    assert sums.error(torch.from_numpy(update)) == pytest.approx(expected)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_ridge_update_is_the_minimum(ridge):
    x, r, w = tokens(60)
    update = summed(x, r, w).solve(ridge).numpy()
    gram = (w[:, None] * x).T @ x
    rho = ridge * np.trace(gram) / 5
    expected = np.linalg.solve(gram + rho * np.eye(5), (w[:, None] * x).T @ r).T
    np.testing.assert_allclose(update, expected, rtol=1e-9)
    # the same as ordinary least squares with rho more rows
    root = np.sqrt(w)[:, None]
    wide = np.concatenate([root * x, np.sqrt(rho) * np.eye(5)])
    tall = np.concatenate([root * r, np.zeros((5, 3))])
    np.testing.assert_allclose(update, np.linalg.lstsq(wide, tall, rcond=None)[0].T, rtol=1e-7, atol=1e-12)


def test_channels_are_regressions_of_their_own():
    x, r, w = tokens(50, regressors=4, outputs=4)
    sums, other = ChannelSums.empty(4), ChannelSums.empty(4)
    sums.add(*(torch.from_numpy(part[:30]) for part in (x, r, w)))
    other.add(*(torch.from_numpy(part[30:]) for part in (x, r, w)))
    sums.take(other)
    gram = (w[:, None] * x * x).sum(0)
    expected = (w[:, None] * x * r).sum(0) / (gram + 0.3 * gram.mean())
    update = sums.solve(0.3)
    np.testing.assert_allclose(update, expected, rtol=1e-12)
    assert sums.tokens == 50
    assert sums.error(update) == pytest.approx((w[:, None] * (r - x * expected) ** 2).sum() / 50)
    assert sums.error(None) == pytest.approx((w[:, None] * r**2).sum() / 50)


def test_sums_of_parts_are_sums_of_all():
    x, r, w = tokens(40)
    one, other = summed(x[:15], r[:15], w[:15]), summed(x[15:], r[15:], w[15:])
    one.take(other)
    whole = summed(x, r, w)
    torch.testing.assert_close(one.gram, whole.gram)
    torch.testing.assert_close(one.cross, whole.cross)
    assert (one.tokens, one.energy) == (40, pytest.approx(whole.energy))


def test_the_ridge_is_the_best_one_on_tokens_that_were_not_fitted_on():
    x, r, w = tokens(12, seed=2)
    r = x @ np.random.default_rng(3).normal(size=(5, 3)) * 0.3 + r
    held_x, held_r, held_w = tokens(30, seed=4)
    held_r = held_x @ np.random.default_rng(3).normal(size=(5, 3)) * 0.3 + held_r
    fitted, held_out = summed(x, r, w), summed(held_x, held_r, held_w)
    ridges = (1e-3, 0.1, 1.0, 10.0, 100.0)
    errors = {}
    for ridge in ridges:
        gram = (w[:, None] * x).T @ x
        rho = ridge * np.trace(gram) / 5
        update = np.linalg.solve(gram + rho * np.eye(5), (w[:, None] * x).T @ r)
        errors[ridge] = (held_w[:, None] * (held_r - held_x @ update) ** 2).sum() / 30
    best = min(errors, key=errors.get)
    assert best not in (ridges[0], ridges[-1])
    found, error = choose_update(fitted, held_out, ridges)
    assert (found, error) == (best, pytest.approx(errors[best]))


def test_no_ridge_is_chosen_where_none_helps():
    x, _, w = tokens(30)
    fitted, held_out = summed(x, x[:, :3], w), summed(x, -x[:, :3], w)
    assert choose_update(fitted, held_out, RIDGES) == (None, held_out.error(None))
    nothing = Sums.empty(5, 3)
    assert choose_update(nothing, held_out, RIDGES) == (None, held_out.error(None))
    assert choose_update(fitted, nothing, RIDGES) == (None, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["regressors", "missing", "held out", "channels"])
def test_nan_is_not_taken_for_no_help(bad, where):
    x, r, w = tokens(30)
    fitted, held_out = summed(x, r, w), summed(x, r, w)
    spoilt_x, spoilt_r = x[:1].copy(), r[:1].copy()
    (spoilt_x if where == "regressors" else spoilt_r)[0, 0] = bad
    if where == "channels":
        fitted, held_out = ChannelSums.empty(3), ChannelSums.empty(3)
        spoilt_x = spoilt_x[:, :3]
    part = held_out if where == "held out" else fitted
    part.add(*(torch.from_numpy(a) for a in (spoilt_x, spoilt_r, w[:1])))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        choose_update(fitted, held_out, RIDGES)


def test_a_ridge_too_small_for_the_system_is_refused():
    x, r, w = tokens(3, regressors=40)  # three tokens say nothing about most of 40 regressors
    with pytest.raises(ConfigError, match="too small"):
        summed(x, r, w).solve(1e-30)
    assert bool(Sums.empty(5, 3).solve(0.1).eq(0).all())


# ----- one cut against numpy -------------------------------------------------------------------------------


def numpy_repair(dense, handed, given, weight, kind, ridge, factor, chosen):
    """The refitted linear as quality.md and ReplaceMe state it, from states measured sample by sample."""
    h, y, a = (without_first(part, chosen) for part in (dense, handed, given))
    o = 1 / (h**2).sum(1)
    if kind == "linear":  # T = (M'OM + rho I)^-1 (M'O (M + (h - y) / f) + rho I); the old linear is T = I
        m = a @ weight.T
        gram = (o[:, None] * m).T @ m
        rho = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
        t = np.linalg.solve(gram + rho, (o[:, None] * m).T @ (m + (h - y) / factor) + rho)
        return t.T @ weight
    gram = (o[:, None] * a).T @ a
    rho = ridge * np.trace(gram) / len(gram) * np.eye(len(gram))
    wanted = a @ weight.T + (h - y) / factor
    return np.linalg.solve(gram + rho, (o[:, None] * a).T @ wanted + rho @ weight.T).T


@pytest.mark.parametrize("kind", ["linear", "least_squares"])
@pytest.mark.parametrize(
    ("model_type", "options", "name", "factor"),
    [
        ("llama", {}, "mlp.down_proj", 1.0),
        ("gpt2", {}, "mlp.c_proj", 1.0),
        ("gpt_neox", {}, "mlp.dense_4h_to_h", 1.0),
        ("granite", {"residual_multiplier": 0.22}, "mlp.down_proj", 0.22),
    ],
)
def test_one_cut_is_what_numpy_gives(kind, model_type, options, name, factor):
    model = make_family_model(model_type, num_hidden_layers=5, **options)
    rows, plan = in_order(make_ids(ROWS), 25), dropping([2, 3], depth=5)
    repair = fit(model, plan, kind, count=25, ridges=(0.3,))
    (cut,) = repair.cuts
    assert (cut.layer, cut.linear, cut.gone, cut.ridge) == (1, name, (2, 3), 0.3)
    assert repair.rows == 25 and repair.tokens == sum(len(row["input_ids"]) - 1 for row in rows)
    dense, handed = (states_behind(model, layer, rows) for layer in (3, 1))
    weight = LayeredModel(model).weight(1, name)
    old = weight.detach().double().numpy().copy()
    measured = (dense, handed, inputs_of(model, 1, name, rows), old, kind, 0.3, factor)
    np.testing.assert_allclose(
        repair.weights[1], numpy_repair(*measured, lambda number: True), rtol=2e-3, atol=2e-4
    )
    assert cut.error_before == pytest.approx(relative_errors(dense, handed, is_held_out), rel=1e-4)
    with torch.no_grad():
        weight.copy_(torch.from_numpy(numpy_repair(*measured, is_fitted)))
    after = relative_errors(dense, states_behind(model, 1, rows), is_held_out)
    assert cut.error_after == pytest.approx(after, rel=1e-3)


def test_the_linear_form_is_replaceme_s_map_where_the_ridge_vanishes():
    model, rows = make_model(), in_order(make_ids(ROWS), ROWS)
    repair = fit(model, dropping([3]), "linear", ridges=(1e-9,))
    h, y = (without_first(states_behind(model, layer, rows)) for layer in (3, 2))
    weight = model.model.layers[2].mlp.down_proj.weight.detach().double().numpy()
    m = without_first(inputs_of(model, 2, "mlp.down_proj", rows)) @ weight.T
    o = (1 / (h**2).sum(1))[:, None]
    t = np.linalg.solve(m.T @ (o * m), m.T @ (o * (h - (y - m))))  # (M'M)^-1 M'(H_j - (H_i - M))
    np.testing.assert_allclose(repair.weights[2], t.T @ weight, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2"])
def test_a_norm_behind_the_last_linear_gets_another_scale(model_type):
    model, rows, name = (
        make_family_model(model_type),
        in_order(make_ids(ROWS), ROWS),
        "post_feedforward_layernorm",
    )
    repair = fit(model, dropping([4], 12), ridges=(0.2,))
    (cut,) = repair.cuts
    assert (cut.layer, cut.linear, repair.weights[3].shape) == (3, name, (32,))
    norm = model.model.layers[3].post_feedforward_layernorm
    h, y = (without_first(states_behind(model, layer, rows)) for layer in (4, 3))
    with torch.no_grad():
        given = inputs_of(model, 3, name, rows)
        n = without_first([norm(x.float()).double() for x in given])
    o = (1 / (h**2).sum(1))[:, None]
    gram = (o * n * n).sum(0)
    u = (o * n * (h - y)).sum(0) / (gram + 0.2 * gram.mean())
    old = norm.weight.detach().double().numpy()
    expected = (1 + old) * (1 + u) - 1 if model_type == "gemma2" else old * (1 + u)
    np.testing.assert_allclose(repair.weights[3], expected, rtol=1e-4, atol=1e-5)
    assert any("norm follows" in note for note in repair.notes)
    trial = copy.deepcopy(model)
    with torch.no_grad():
        trial.model.layers[3].post_feedforward_layernorm.weight.copy_(repair.weights[3])
        moved = without_first(states_behind(trial, 3, rows))
    np.testing.assert_allclose(moved, y + n * u, rtol=1e-3, atol=1e-3)


def test_a_growing_ridge_gives_back_the_old_weights():
    model = make_model()
    old = model.model.layers[2].mlp.down_proj.weight
    distances = []
    for ridge in (0.1, 10.0, 1e4, 1e12):
        repair = fit(model, dropping([3]), ridges=(ridge,))
        distances.append(float((repair.weights[2] - old.detach()).norm()))
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.1
    assert torch.allclose(repair.weights[2], old, rtol=0, atol=1e-9)


# ----- exact repairs ---------------------------------------------------------------------------------------


class LinearLayer(nn.Module):
    """A layer that adds a linear map of some dimensions of the state."""

    def __init__(self, matrix, dims):
        super().__init__()
        self.map, self.dims = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False), dims
        self.map.weight.data.copy_(matrix)

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self.map(hidden_states[..., self.dims])


def linearly_missed(seed=0, layers=(1,)):
    """A Llama whose layer 0 alone writes dimensions 26 to 31, of which the given layers are linear maps."""
    model, dims = make_model(seed=seed), slice(26, 32)
    torch.manual_seed(seed + 100)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, dims] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[dims] = 0
            layer.mlp.down_proj.weight[dims] = 0
        model.model.layers[0].mlp.down_proj.weight.copy_(torch.randn(32, 48) * 0.3)
        model.model.layers[0].mlp.down_proj.weight[:26] = 0
    for layer in layers:
        model.model.layers[layer] = LinearLayer(torch.randn(32, 6) * 0.3, dims)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gone", [(1,), (1, 2)])
def test_layers_that_are_linear_in_what_the_linear_writes_are_not_missed(kind, gone):
    model = linearly_missed(layers=gone)
    ids = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = model(ids).logits
        unrepaired_logits = prune_(copy.deepcopy(model), dropping(gone))(ids).logits
    repair = fit(model, dropping(gone), kind, ridges=(1e-10, 1e-8, 0.1))
    found = prune_(copy.deepcopy(model), dropping(gone), repair=repair)
    with torch.no_grad():
        logits = found(ids).logits
    assert found.config.num_hidden_layers == 6 - len(gone)
    assert float((unrepaired_logits - expected).abs().max()) > 0.1  # they would be missed
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert repair.cuts[0].error_after < 1e-10 < 1e-3 < repair.cuts[0].error_before


def test_what_cannot_be_explained_stays_as_it_was():
    """A layer that adds noise by position of the hash of its state: nothing the linear could add is it."""

    class Noise(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states + torch.sin(1e5 * hidden_states)

    model = make_model()
    model.model.layers[3] = Noise()
    repair = fit(model, dropping([3]), rows=make_ids(12), ridges=(1e-6,))
    (cut,) = repair.cuts
    assert cut.ridge is None and cut.error_after == cut.error_before > 0 and not repair.weights
    pruned = prune_(copy.deepcopy(model), dropping([3]), repair=repair)
    assert torch.equal(
        pruned.model.layers[2].mlp.down_proj.weight, model.model.layers[2].mlp.down_proj.weight
    )


# ----- several cuts ----------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    model_type=st.sampled_from(["llama", "gemma2", "qwen2"]),
    kind=st.sampled_from(KINDS),
    gone=st.sets(st.integers(0, 5), min_size=1, max_size=4),
    count=st.integers(2, 24),
)
def test_no_cut_is_worse_on_held_out_samples_than_before(seed, model_type, kind, gone, count):
    model = make_model(model_type, seed=seed)
    before = {name: p.clone() for name, p in model.named_parameters()}
    repair = fit(model, dropping(gone), kind, rows=make_ids(count, seed=seed))
    assert [(cut.layer, cut.gone) for cut in repair.cuts] == places_of(dropping(gone), kind)
    assert all(0 <= cut.error_after <= cut.error_before for cut in repair.cuts)
    assert all((cut.error_after < cut.error_before) == (cut.ridge is not None) for cut in repair.cuts)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not model.training


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_a_second_cut_is_fitted_on_what_the_repaired_model_computes(model_type):
    depth = 12 if model_type == "olmo2" else 6
    make = make_family_model if model_type == "olmo2" else make_model
    model, rows = make(model_type), in_order(make_ids(ROWS), ROWS)
    repair = fit(model, dropping([1, 4], depth))
    first, second = repair.cuts
    alone = replace(repair, pruned=(1,), cuts=(first,), weights={0: repair.weights[0]})
    assert fit(model, dropping([1], depth)).cuts == (first,)
    halfway = prune_(copy.deepcopy(model), dropping([1], depth), repair=alone)
    dense = states_behind(model, 4, rows)
    expected = relative_errors(dense, states_behind(halfway, 2, rows), is_held_out)  # layer 3, now the third
    unrepaired_one = prune_(copy.deepcopy(model), dropping([1], depth))
    assert second.error_before == pytest.approx(expected, rel=1e-4)
    assert second.error_before != pytest.approx(
        relative_errors(dense, states_behind(unrepaired_one, 2, rows), is_held_out), rel=1e-2
    )


def asking(batch_ids=((1, 5, 6, 7, 8), (1, 9, 4, 0, 0)), answer_from=(3, 5)):
    """Two samples: one whose answer begins at a token, and one without an answer, padded."""
    ids = torch.tensor(batch_ids)
    labels = ids.clone()
    for row, start in zip(labels, answer_from, strict=True):
        row[:start] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids > 0).long()}


def seen_by_autograd(model, batch, layer, seed):
    """The influence of each token, by a backward pass through the whole model."""
    caught = {}

    def keep(number):
        def hook(module, args, output):
            caught[number] = output[0] if isinstance(output, tuple) else output
            caught[number].retain_grad()

        return hook

    layers = LayeredModel(model).layers
    hooks = [layers[i].register_forward_hook(keep(i)) for i in (layer, len(layers) - 1)]
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    last = caught[len(layers) - 1]
    moved = torch.randn(last.shape, generator=torch.Generator().manual_seed(seed))
    for position in (2, 3):  # the tokens before the two of the first sample's answer
        ratio = (last[0, position] @ moved[0, position].to(last)) / last[0, position].norm().detach()
        ratio.backward(retain_graph=True)
    for hook in hooks:
        hook.remove()
    state = caught[layer]
    return (state.grad[0, 1:].norm(dim=-1) * state.detach()[0, 1:].norm(dim=-1)).square()


@pytest.mark.parametrize("model_type", ["llama", "olmo2"])
def test_tokens_weigh_what_the_answer_depends_on_them(model_type):
    model = make_model() if model_type == "llama" else make_family_model(model_type)
    model, batch, view = model.double(), asking(), LayeredModel(model)
    half, position = Tokens(view, [batch], 0.5, World(), first=1), torch.arange(1, 5)
    behind = view.num_layers - 1
    for layer in (1, behind - 1):
        expected = seen_by_autograd(model, batch, layer, seed=0)
        share = 4 * expected / expected.sum()
        found = half.weights(layer, 0, torch.zeros(4, dtype=torch.long), position)
        torch.testing.assert_close(found, 0.5 + 0.5 * share, rtol=1e-4, atol=1e-6)
        assert float(found.mean()) == pytest.approx(1)
    # After the last layer only the positions before answer tokens are left, and without an answer all count.
    last = half.weights(behind, 0, torch.zeros(4, dtype=torch.long), position)
    assert last[[0, 3]].tolist() == [0.5, 0.5] and float(last[1:3].sum()) == pytest.approx(3.0)
    assert half.weights(1, 0, torch.ones(2, dtype=torch.long), position[:2]).tolist() == [1.0, 1.0]
    equal = Tokens(view, [batch], 0.0, World())
    assert equal.weights(1, 0, torch.zeros(4, dtype=torch.long), position).tolist() == [1.0] * 4


def test_a_repair_may_be_fitted_in_inference_mode():
    model, plan = make_model(), dropping([2])
    expected = fit(model, plan, answers=0.5)
    with torch.inference_mode():
        found = fit(model, plan, answers=0.5)
    assert torch.equal(found.weights[1], expected.weights[1])


def test_a_share_of_all_weight_is_refused():
    with pytest.raises(ConfigError, match=r"answers: .*less than 1"):
        fit(make_model(), dropping([2]), answers=1.0)


def test_weighted_tokens_are_fitted_as_numpy_fits_them():
    model, rows, plan = make_model(), in_order(make_ids(ROWS), 25), dropping([2])
    repair = fit(model, plan, count=25, ridges=(1.0,), answers=0.9)
    view = LayeredModel(model)
    counted = Tokens(view, [collate(rows)], 0.9, World(), first=1)
    weights = [
        counted.weights(2, 0, torch.full((n,), number), torch.arange(1, n + 1))
        for number, n in ((i, len(row["input_ids"]) - 1) for i, row in enumerate(rows))
    ]
    c = torch.cat(weights).numpy()
    dense, y = (without_first(states_behind(model, layer, rows)) for layer in (2, 1))
    x = without_first(inputs_of(model, 1, "mlp.down_proj", rows))
    w = c / (dense**2).sum(1)
    gram = (x * w[:, None]).T @ x
    cross = ((dense - y) * w[:, None]).T @ x
    old = view.weight(1, "mlp.down_proj").detach().double().numpy()
    expected = old + cross @ np.linalg.inv(gram + np.diag(gram).mean() * np.eye(len(gram)))
    np.testing.assert_allclose(repair.weights[1], expected, rtol=2e-3, atol=2e-4)


def test_layer_wise_refits_every_layer_behind_the_first_cut_to_what_the_dense_one_hands_on():
    assert places_of(dropping([2, 4]), "layer_wise") == [(1, (2,)), (3, (4,)), (5, ())]
    assert places_of(dropping([0, 3]), "layer_wise") == [(1, ()), (2, (3,)), (4, ()), (5, ())]
    assert places_of(dropping([]), "layer_wise") == [] and places_of(dropping([5]), "layer_wise") == [
        (4, (5,))
    ]
    model, rows, plan = make_model(), in_order(make_ids(ROWS), 25), dropping([2], depth=6)
    repair = fit(model, plan, "layer_wise", count=25, ridges=(10.0,))
    first, second, *_ = repair.cuts
    cuts = fit(model, plan, count=25, ridges=(10.0,))
    assert first == cuts.cuts[0] and torch.equal(repair.weights[1], cuts.weights[1])
    # The layer behind is fitted on what the repaired model computes, to what the dense one has after it.
    pruned = prune_(copy.deepcopy(model), plan, repair=cuts)
    dense, handed = states_behind(model, 3, rows), states_behind(pruned, 2, rows)
    old = LayeredModel(model).weight(3, "mlp.down_proj").detach().double().numpy()
    given = inputs_of(pruned, 2, "mlp.down_proj", rows)
    wanted = numpy_repair(dense, handed, given, old, "least_squares", 10.0, 1.0, lambda number: True)
    assert (second.layer, second.gone) == (3, ())
    np.testing.assert_allclose(repair.weights[3], wanted, rtol=2e-3, atol=2e-4)
    unseen = make_ids(30, seed=99)
    errors = [
        relative_errors(
            states_behind(model, 5, unseen),
            states_behind(prune_(copy.deepcopy(model), plan, repair=fit(model, plan, kind)), 4, unseen),
        )
        for kind in ("least_squares", "layer_wise")
    ]
    assert errors[1] < errors[0]


def test_a_repaired_model_is_nearer_to_the_dense_one_on_samples_it_never_saw():
    model, rows = make_model(), make_ids(30, seed=99)
    plan = dropping([2, 4])
    repair = fit(model, plan, rows=make_ids(200))
    dense = states_behind(model, 5, rows)
    plain = relative_errors(dense, states_behind(prune_(copy.deepcopy(model), plan), 3, rows))
    repaired = relative_errors(
        dense, states_behind(prune_(copy.deepcopy(model), plan, repair=repair), 3, rows)
    )
    assert repaired < 0.7 * plain


def test_in_16_bits_the_next_cut_sees_the_rounded_weight():
    model = make_model().to(torch.bfloat16)
    repair = fit(model, dropping([1, 4]))
    rows = in_order(make_ids(ROWS), ROWS)
    first, second = repair.cuts
    alone = replace(repair, pruned=(1,), cuts=(first,), weights={0: repair.weights[0]})
    halfway = prune_(copy.deepcopy(model), dropping([1]), repair=alone)
    assert halfway.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    expected = relative_errors(states_behind(model, 4, rows), states_behind(halfway, 2, rows), is_held_out)
    assert second.error_before == pytest.approx(expected, rel=2e-2)
    assert all(w.dtype == torch.float32 for w in repair.weights.values())


def test_in_16_bits_influences_are_those_of_32_bits_up_to_rounding():
    batch, fine = collate(in_order(make_ids(ROWS), ROWS)), make_model()
    models = (fine, copy.deepcopy(fine).to(torch.bfloat16))
    wide, narrow = (Tokens(LayeredModel(model), [batch], 0.5, World()) for model in models)
    sample, token = wide.walk.counted[0].nonzero().unbind(1)
    for layer in (0, 3):
        weights = [tokens.weights(layer, 0, sample, token) for tokens in (wide, narrow)]
        assert float(torch.corrcoef(torch.stack(weights))[0, 1]) > 0.98


def test_layers_at_the_input_have_nothing_before_them():
    assert places_of(dropping([0, 1, 3, 4]), "linear") == [(2, (3, 4))]
    assert list(unrepaired(dropping([0, 1, 3, 4]))) == [0, 1]
    assert places_of(dropping([1, 2, 5]), "linear") == [(0, (1, 2)), (4, (5,))]
    model = make_model()
    repair = fit(model, dropping([0, 1, 4]))
    assert [cut.layer for cut in repair.cuts] == [3] and any(
        "0-1 are removed at the input" in n for n in repair.notes
    )
    rows = in_order(make_ids(ROWS), ROWS)
    shorter = prune_(copy.deepcopy(model), dropping([0, 1]))
    expected = relative_errors(states_behind(model, 4, rows), states_behind(shorter, 1, rows), is_held_out)
    assert repair.cuts[0].error_before == pytest.approx(expected, rel=1e-4)


def test_merging_comes_first():
    """Merged at layers 0 and 2, with one more cut behind: fitted on what the merged model computes."""
    merge = LayerAction("merge", 2)
    actions = (LayerAction("keep"), LayerAction("merge", 0), LayerAction("keep"), LayerAction("keep"), merge)
    plan = PruningPlan((*actions, LayerAction("keep")))
    model, rows = make_model(), in_order(make_ids(ROWS), ROWS)
    trace = make_trace(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    repair = fit(model, plan, trace=trace)
    assert [(cut.layer, cut.gone) for cut in repair.cuts] == [(0, (1,)), (3, (4,))]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    merged = prune_(copy.deepcopy(model), plan, trace)  # layers 0, 2, 3, 5
    expected = relative_errors(states_behind(model, 1, rows), states_behind(merged, 0, rows), is_held_out)
    assert repair.cuts[0].error_before == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        merged.model.layers[0].mlp.down_proj.weight.copy_(repair.weights[0])
    expected = relative_errors(states_behind(model, 4, rows), states_behind(merged, 2, rows), is_held_out)
    assert repair.cuts[1].error_before == pytest.approx(expected, rel=1e-4)
    whole = prune_(copy.deepcopy(model), plan, trace, repair=repair)
    assert torch.equal(whole.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(whole.model.layers[2].mlp.down_proj.weight, repair.weights[3])
    assert whole.model.layers[1].mlp.down_proj.weight.ne(model.model.layers[2].mlp.down_proj.weight).any()


def test_tied_embeddings_biases_and_everything_else_stay():
    model = make_family_model("gpt2")
    plan = dropping([4], 12)
    repaired = prune_(copy.deepcopy(model), plan, repair=fit(model, plan)).state_dict()
    plain = prune_(copy.deepcopy(model), plan).state_dict()
    changed = [name for name, tensor in repaired.items() if not torch.equal(tensor, plain[name])]
    assert changed == ["transformer.h.3.mlp.c_proj.weight"]


def test_more_regressors_than_allowed_get_the_linear_form(monkeypatch):
    model = make_model()
    linear = fit(model, dropping([3]), "linear")
    monkeypatch.setattr(module, "MAX_REGRESSORS", 47)
    repair = fit(model, dropping([3]), "least_squares")
    assert torch.equal(repair.weights[2], linear.weights[2])
    assert any("48 regressors are more than 47" in note for note in repair.notes)


def test_few_tokens_are_noted_and_progress_is_told():
    seen = []
    repair = fit(make_model(), dropping([3]), progress=seen.append)
    assert any("; 960 or more make the repair reliable" in note for note in repair.notes)
    assert sum(seen) == 4
    assert not fit(make_model(), dropping([3]), rows=make_ids(240)).notes
    weighed: list[int] = []
    fit(make_model(), dropping([3]), progress=weighed.append, answers=0.5)
    assert sum(weighed) == sum(seen) + 6  # all layers of the model, for the influences


# ----- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "none"}, "nothing to fit"),
        ({"kind": "least_square"}, "kind: .*'least_squares'"),
        ({"ridges": ()}, "ridges: "),
        ({"ridges": (0.1, 0.0)}, "greater than 0"),
        ({"ridges": (math.nan,)}, "ridges"),
        ({"row": 3}, "row: "),
    ],
)
def test_requests_that_make_no_sense(options, match):
    with pytest.raises(ConfigError, match=match):
        fit(make_model(), dropping([3]), **options)


def test_at_least_two_samples():
    model = make_model()
    with pytest.raises(ConfigError, match="rows"):
        fit_repair(model, dropping([3]), make_ids(9), collate, rows=1)
    for rows in (make_ids(1), []):
        with pytest.raises(DataError):
            fit_repair(model, dropping([3]), rows, collate)
    with pytest.raises(DataError, match="The samples hold prompt; input_ids and labels are needed"):
        fit_repair(model, dropping([3]), [{"prompt": "a"}] * 4, collate)


def test_models_that_cannot_be_refitted():
    with pytest.raises(PlanError, match="layers"):
        fit(make_model(), dropping([3], 12))
    adapted = make_model()
    adapted.model.layers[0].mlp.base_layer = nn.Linear(1, 1)
    with pytest.raises(PlanError, match="adapters"):
        fit(adapted, dropping([3]))
    with pytest.raises(ModelError, match="mixture of experts"):
        fit(make_family_model("mixtral"), dropping([3], 12))


def test_quantised_models(monkeypatch):
    monkeypatch.setattr(module, "fingerprint", lambda model: "llama-6x32" + QUANTISED)
    with pytest.raises(PlanError, match="quantised"):
        fit(make_model(), dropping([3]))


def test_nan_in_one_late_sample_ends_the_fitting():
    """The walk is proved on the longest samples; a token that gives NaN stands in the shortest."""
    model, rows = make_model(), [row for row in make_ids(ROWS) if 63 not in row["input_ids"]]
    rows.append({"input_ids": [1, 63], "labels": []})
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        fit(model, dropping([3]), rows=rows)
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)


def test_infinite_states_end_the_fitting():
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteError):
        fit(model, dropping([3]))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_failure_leaves_the_model_as_it_was(monkeypatch):
    model, calls = make_model().train(), []
    before = {name: p.clone() for name, p in model.named_parameters()}
    advance = module._Refitting._advance

    def fails(self, layers, states):
        calls.append(layers)
        if len(calls) == 6:  # inside the refitted layer
            raise KeyboardInterrupt
        advance(self, layers, states)

    monkeypatch.setattr(module._Refitting, "_advance", fails)
    with pytest.raises(KeyboardInterrupt):
        fit(model, dropping([1, 4]))
    assert model.training
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_repair_of_another_plan_model_or_shape(tmp_path):
    model = make_model()
    repair = fit(model, dropping([3]))
    for wrong in (dropping([4]), dropping([3, 4])):
        with pytest.raises(PlanError, match="fitted for a model without layers 3"):
            prune_(copy.deepcopy(model), wrong, repair=repair)
    with pytest.raises(PlanError, match="fitted on model"):
        prune_(make_model(seed=1), dropping([3]), repair=repair)
    for name, weight in (("mlp.down_proj", torch.zeros(32, 40)), ("mlp.left_proj", torch.zeros(32, 48))):
        other = replace(repair, cuts=(replace(repair.cuts[0], linear=name),), weights={2: weight}, model="")
        fresh = make_model()
        with pytest.raises(PlanError, match="holds a weight of shape"):
            prune_(fresh, dropping([3]), repair=other)
        assert fresh.config.num_hidden_layers == 6
    moved = replace(repair, cuts=(replace(repair.cuts[0], layer=1),), weights={1: repair.weights[2]})
    with pytest.raises(PlanError, match="same cuts"):
        prune_(copy.deepcopy(model), dropping([3]), repair=moved)


def test_cuts_and_weights_belong_together():
    cut = RepairedCut(2, "mlp.down_proj", (3,), 0.1, 1.0, 0.5)
    with pytest.raises(ShapeError, match="weights are for"):
        Repair("linear", (3,), (cut,), {})
    with pytest.raises(ShapeError):
        Repair("linear", (3,), (replace(cut, ridge=None),), {2: torch.zeros(2, 2)})


# ----- on disk ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    return fit(make_model(), dropping([1, 4]))


def test_what_is_saved_is_read_again(fitted, tmp_path):
    fitted.save(tmp_path / "new" / "repair")
    found = Repair.load(tmp_path / "new" / "repair")
    assert found.facts() == fitted.facts() and found.weights.keys() == fitted.weights.keys()
    assert all(torch.equal(found.weights[i], w) for i, w in fitted.weights.items())
    assert found.model == fingerprint(make_model())
    assert json.loads((tmp_path / "new" / "repair" / REPAIR_FILE).read_text())["format_version"] == 1


def edited(**changes):
    def change(folder):
        raw = json.loads((folder / REPAIR_FILE).read_text()) | changes
        (folder / REPAIR_FILE).write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))

    return change


def cut_short(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-8])


def spoilt_number(folder):
    raw = bytearray((folder / WEIGHTS_FILE).read_bytes())
    raw[-4:] = np.float32(math.nan).tobytes()
    (folder / WEIGHTS_FILE).write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        edited(format_version=2),
        edited(format_version=None),
        edited(cuts=[]),
        edited(cuts=[{"layer": 0}]),
        edited(cuts=3),
        edited(pruned=None),
        edited(pruned=7),
        edited(invented=1),
        cut_short,
        spoilt_number,
        lambda folder: (folder / WEIGHTS_FILE).unlink(),
        lambda folder: (folder / REPAIR_FILE).unlink(),
        lambda folder: (folder / REPAIR_FILE).write_text("[]"),
        lambda folder: (folder / REPAIR_FILE).write_text("{"),
    ],
)
def test_a_damaged_folder_is_refused(fitted, tmp_path, damage):
    fitted.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(IntegrityError):
        Repair.load(tmp_path)


# ----- every family ----------------------------------------------------------------------------------------

REFUSED = {  # as docs/repair.md lists them
    "mixture of experts": [
        "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "jamba", "llama4_text", "minimax", "mixtral",
        "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    ],
    "one by one": ["gemma3n_text", "gemma4_text"],
}  # fmt: skip
NORMS = {"exaone4", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3"}


@pytest.mark.parametrize("model_type", sorted(OPTIONS))
def test_every_family_is_repaired_or_refused(model_type):
    assert model_type in FAMILIES
    model = make_family_model(model_type)
    keep = SPECIAL_KEEP.get(model_type, tuple(i for i in range(12) if i not in (3, 6)))
    plan = PruningPlan.from_keep(12, keep)
    reason = next((why for why, names in REFUSED.items() if model_type in names), None)
    if reason is not None:
        with pytest.raises(ModelError, match=reason):
            fit(model, plan, rows=make_ids(16), answers=0.5)
        return
    repair = fit(model, plan, rows=make_ids(16), answers=0.5)
    assert len(repair.cuts) == 2
    assert all(0 < cut.error_after <= cut.error_before for cut in repair.cuts)
    assert all(weight.ndim == (1 if model_type in NORMS else 2) for weight in repair.weights.values())
    pruned = prune_(model, plan, repair=repair)
    with torch.no_grad():
        assert bool(torch.isfinite(pruned(torch.tensor([[1, 7, 8, 9]])).logits).all())


def test_the_document_names_the_families_that_are_refused_or_scaled():
    text = (Path(__file__).parents[2] / "docs" / "repair.md").read_text(encoding="utf-8")
    for names in (*REFUSED.values(), sorted(NORMS)):
        assert ", ".join(names) in text.replace("\n", " ")


def test_rows_that_determine_a_repair():
    view = LayeredModel(make_model())
    wide = max(int(weight.shape[1]) for weight in view.weights(0).values())
    full, linear = RepairOptions(), RepairOptions(kind="linear", tokens_per_unknown=5)
    samples = [{"input_ids": [1, 2, 3]}] * 4000  # the first token of each sample does not count
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FEWEST_ROWS", 8)
        assert enough_rows(view, samples, full) == full.tokens_per_unknown * wide / 2
        assert enough_rows(view, samples, linear) == 5 * view.config.hidden_size / 2
        assert enough_rows(view, samples[:20], full) == 20
        assert enough_rows(view, [{"input_ids": [1] * 5000}] * 9, full) == 8
    assert enough_rows(view, [{"input_ids": [1] * 5000}] * 4000, full) == FEWEST_ROWS
