"""GradPruner's importance on widths, compared with whole IGIA matrices, and its budgets."""

import json
from dataclasses import replace

import pytest
import torch
from builders import make_llama
from conftest import make_trace
from transformers import AutoModelForCausalLM

from gradpruner.common.errors import ConfigError, PlanError, ShapeError
from gradpruner.data.encoding import Collator
from gradpruner.gradients.importance import column_energies, element_importance, row_energies
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.gradpruner_width import widths_of
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan

METHOD = METHODS.find("gradpruner_width")


def make_context(model, trace=None, num_remove=1000, norm="squared", unit="parameters", **options):
    return MethodContext(
        num_layers=4,
        seed=0,
        trace=lambda: trace or make_trace(model),
        model=lambda: model,
        samples=[],
        collator=Collator(),
        norm=norm,
        num_remove=num_remove,
        unit=unit,
        options=METHOD.read_options("gradpruner_width", options),
    )


# --- energies of rows and columns ---------------------------------------------------------------------------


def test_row_and_column_energies_by_hand():
    """gB = [[1], [2], [0]], gA = [[3, -1]]: G = [[3, -1], [6, -2], [0, 0]]; in the second step A has none."""
    b = torch.tensor([[[1.0], [2], [0]], [[1], [1], [1]]])
    a = torch.tensor([[[3.0, -1]], [[0, 0]]])
    assert row_energies(b, a).tolist() == [[10, 40, 0], [0, 0, 0]]
    assert column_energies(b, a).tolist() == [[45, 5], [0, 0]]


def test_mean_energies_equal_sums_of_the_igia_matrix():
    generator = torch.Generator().manual_seed(0)
    b = torch.randn(5, 30, 4, generator=generator)
    a = torch.randn(5, 4, 20, generator=generator)
    matrix = element_importance(b, a)
    assert torch.allclose(row_energies(b, a).mean(dim=0).float(), matrix.sum(dim=1), rtol=1e-5)
    assert torch.allclose(column_energies(b, a).mean(dim=0).float(), matrix.sum(dim=0), rtol=1e-5)
    with pytest.raises(ShapeError):
        row_energies(b, a[:, :3])
    with pytest.raises(ShapeError):
        column_energies(b[:4], a)


def test_energies_below_the_range_of_fp32_are_kept():
    b, a = torch.full((1, 3, 2), 1e-15), torch.full((1, 2, 5), 1e-12)
    assert row_energies(b, a).tolist() == [pytest.approx([5 * (2e-27) ** 2] * 3)]
    assert column_energies(b, a).tolist() == [pytest.approx([3 * (2e-27) ** 2] * 5)]


# --- scores -------------------------------------------------------------------------------------------------


def naive(model, trace, norm):
    """Returns hidden, KV head and channel scores from every step's whole matrix, summed by loops."""
    config = model.config
    hidden = torch.zeros(config.hidden_size, dtype=torch.float64)
    heads = torch.zeros(4, config.num_key_value_heads, dtype=torch.float64)
    channels = torch.zeros(4, config.intermediate_size, dtype=torch.float64)
    group = config.num_attention_heads // config.num_key_value_heads
    dim = config.hidden_size // config.num_attention_heads
    for ref in trace.info.linears:
        factors = trace.factors(ref.layer, ref.name)
        name = ref.name.rpartition(".")[2]
        rows, columns = 0, 0
        for b, a in zip(factors.grad_b_SOR.double(), factors.grad_a_SRI.double(), strict=True):
            squares = (b @ a) ** 2
            power, share = (1, 1 / trace.num_steps) if norm == "squared" else (0.5, 1)
            rows = rows + share * squares.sum(dim=1) ** power
            columns = columns + share * squares.sum(dim=0) ** power
        outer, inner = (columns, rows) if name not in ("o_proj", "down_proj") else (rows, columns)
        hidden += outer
        for entry, value in enumerate(inner):
            if name in ("gate_proj", "up_proj", "down_proj"):
                channels[ref.layer, entry] += value
            else:
                head = entry // dim
                heads[ref.layer, head if name in ("k_proj", "v_proj") else head // group] += value
    return hidden, heads, channels


def highest(values, count):
    return tuple(sorted(sorted(range(len(values)), key=lambda i: -float(values[i]))[:count]))


@pytest.mark.parametrize("norm", ["squared", "frobenius"])
@pytest.mark.parametrize("axis", ["hidden", "inner", "both"])
def test_the_units_with_the_most_energy_are_kept(norm, axis):
    model = make_llama()
    trace = make_trace(model)
    hidden, heads, channels = naive(model, trace, norm)
    plan = METHOD.plan(make_context(model, trace, 4600, norm, axis=axis))
    assert plan.hidden == highest(hidden, len(plan.hidden))
    for layer, widths in enumerate(plan.layers):
        assert plan.kv_heads(layer) == highest(heads[layer], len(plan.kv_heads(layer)))
        assert widths.channels == highest(channels[layer], len(widths.channels))
    if axis == "hidden":
        assert plan.evidence["hidden_scores"] == pytest.approx(hidden.tolist(), rel=1e-9)
    assert (len(plan.hidden) < 16) == (axis != "inner")
    assert (len(plan.kv_heads(0)) < 2) == (axis != "hidden")


def test_norms_can_choose_differently():
    model = make_llama()
    plans = [METHOD.plan(make_context(model, num_remove=2000, norm=n)) for n in ("squared", "frobenius")]
    assert plans[0].evidence["hidden_scores"] != plans[1].evidence["hidden_scores"]


# --- budget -------------------------------------------------------------------------------------------------


BOTH_UNITS = ("parameters", "decoder_parameters")
# Every share on every axis at most once, so that each pair of axis, unit and tied weights occurs.
BUDGETS = [
    *(("hidden", BOTH_UNITS[i % 2], share, i > 1) for i, share in enumerate((0.1, 0.4, 0.5, 0.6))),
    *(("inner", BOTH_UNITS[i % 2], share, i > 1) for i, share in enumerate((0, 0.5, 0.1, 0.4))),
    *(("both", BOTH_UNITS[i % 2], share, i > 1) for i, share in enumerate((0.6, 0, 0.4, 0.1))),
]


@pytest.mark.parametrize(("axis", "unit", "share", "tied"), BUDGETS)
def test_budget_is_met_to_half_a_unit_and_the_result_is_plain(axis, unit, share, tied, tmp_path):
    model = make_llama(tie_word_embeddings=tied)
    view, dense = WidthView(model), count_parameters(model)
    layers = sum(map(count_parameters, model.model.layers))
    num_remove = round(share * layers)
    plan = METHOD.plan(make_context(model, num_remove=num_remove, unit=unit, axis=axis))
    assert plan.uniform
    unit_size = 4 * view.unit_parameters(len(plan.hidden))["channel"]
    assert len(plan.hidden) % len(plan.layers[0].heads) == 0
    pruned = prune_width_(model, plan)
    removed = dense - count_parameters(pruned)
    if unit == "decoder_parameters":
        removed = layers - sum(map(count_parameters, pruned.model.layers))
    assert abs(removed - num_remove) <= unit_size / 2
    assert plan.evidence["removed"] == removed
    pruned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 13)[None]
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)


def test_both_prunes_equal_shares_of_hidden_dimensions_and_channels():
    model = make_llama(hidden_size=32, intermediate_size=96)
    view = WidthView(model)
    dense = count_parameters(model)
    _, channels, hidden = widths_of(view, "both", round(0.4 * dense))
    assert abs(channels / 96 - hidden / 32) < 0.05


# --- as a method --------------------------------------------------------------------------------------------


def test_plans_are_deterministic_and_survive_saving(tmp_path):
    plans = [METHOD.plan(make_context(make_llama(), axis="both")) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0].method == "gradpruner_width"
    assert json.loads(json.dumps(plans[0].evidence)) == plans[0].evidence
    assert plans[0].evidence["num_layers"] == 4
    assert WidthPlan.load(plans[0].save(tmp_path / "plan.json")) == plans[0]


def test_the_model_is_not_changed():
    model, other = make_llama(), make_llama()
    METHOD.plan(make_context(model))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def partial_trace(model, names):
    """Returns a trace of some of the linears."""
    whole = make_trace(model)
    refs = [ref for ref in whole.info.linears if ref.name.rpartition(".")[2] in names]
    info = replace(whole.info, linears=tuple(refs))
    factors = [{} for _ in range(whole.num_steps)]
    for g, members in enumerate(info.groups()):
        found = [whole.factors(refs[k].layer, refs[k].name) for k in members]
        for step in range(whole.num_steps):
            factors[step][f"grad_b.{g}"] = torch.stack([f.grad_b_SOR[step] for f in found])
            factors[step][f"grad_a.{g}"] = torch.stack([f.grad_a_SRI[step] for f in found])
    return GradientTrace(info, torch.ones(whole.num_steps, len(refs)), factors=factors)


def test_hidden_dimensions_need_not_have_all_linears_recorded():
    model = make_llama()
    trace = partial_trace(model, ("q_proj", "v_proj"))
    hidden, _, _ = naive(model, trace, "squared")
    plan = METHOD.plan(make_context(model, trace))
    assert plan.hidden == highest(hidden, len(plan.hidden))
    with pytest.raises(PlanError, match="gate_proj, up_proj, down_proj"):
        METHOD.plan(make_context(model, trace, axis="inner"))


def test_impossible_requests_are_refused():
    model = make_llama()
    with pytest.raises(ConfigError, match="Unknown norm"):
        METHOD.plan(make_context(model, norm="cubed"))
    for axis in ("hidden", "inner", "both"):
        with pytest.raises(PlanError, match="Cannot remove"):
            METHOD.plan(make_context(model, num_remove=20_000, axis=axis))
    with pytest.raises(PlanError, match="recorded on model"):
        METHOD.plan(make_context(model, make_trace(make_llama(seed=1))))
    with pytest.raises(PlanError, match="factor history"):
        METHOD.plan(make_context(model, make_trace(model, keep_factors=False)))
    with pytest.raises(ConfigError, match="zero gradient energy"):
        METHOD.plan(make_context(model, make_trace(model, scale=0.0)))
    with pytest.raises(ConfigError, match=r"gradpruner_width\.axis"):
        METHOD.read_options("gradpruner_width", {"axis": "depth"})
