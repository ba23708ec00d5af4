"""The paper, line by line: one test per equation and per pseudo-code line, with numbers worked out by hand.

docs/paper.md lists which function and which test belong to which line, and every decision where the paper is
silent or differs from the released code.
"""

import copy
import importlib
import math
import re
from pathlib import Path

import pytest
import torch

from gradpruner.gradients.importance import Factors, element_importance, gram_energies
from gradpruner.gradients.scores import LayerScores, rank_stability, score_layers
from gradpruner.gradients.trace import GradientTrace, LinearRef, TraceInfo
from gradpruner.gradients.trace_writer import TraceWriter
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.merging import Source, mark_top_, merge_linear, signs_agree
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.training.adapters import attach_lora, find_lora_linears
from gradpruner.training.recording import default_steps, record_gradients

# One linear of shape (2, 2), rank 1, two recorded steps.
GRAD_B = torch.tensor([[[1.0], [2.0]], [[1.0], [0.0]]])  # (steps, out, rank)
GRAD_A = torch.tensor([[[3.0, -1.0]], [[2.0, 0.0]]])  # (steps, rank, in)
SIMULATED = [[[3.0, -1.0], [6.0, -2.0]], [[2.0, 0.0], [0.0, 0.0]]]
IGIA = [[6.5, 0.5], [18.0, 2.0]]  # (9 + 4) / 2, 1 / 2, 36 / 2, 4 / 2


def row(*values):
    """A weight of one row."""
    return torch.tensor([values], dtype=torch.float32)


def ranked(*importance_roots):
    """LoRA gradients of one row at one step whose IGIA entries are the squares of the numbers given."""
    return Factors(torch.ones(1, 1, 1), torch.tensor([[importance_roots]], dtype=torch.float32))


def two_linear_trace():
    """Layer 0 has the linear above twice; layer 1 has it once at half the gradient of B."""
    refs = [LinearRef(0, "up", 2, 2, 1), LinearRef(0, "down", 2, 2, 1), LinearRef(1, "up", 2, 2, 1)]
    writer = TraceWriter(refs, None)
    for b, a in zip(GRAD_B, GRAD_A, strict=True):
        writer.add_step([b, b, b / 2], [a, a, a])
    return writer.finish(TraceInfo(2, tuple(refs)))


# --- 3.1 and Algorithm 1 ------------------------------------------------------------------------------------


def test_equation_2_simulated_gradient():
    for b, a, expected in zip(GRAD_B, GRAD_A, SIMULATED, strict=True):
        squared = torch.tensor(expected) ** 2  # at one step the matrix of Eq. 3 is its square
        assert torch.equal(element_importance(b[None], a[None]), squared)


def test_equation_3_igia_matrix():
    assert element_importance(GRAD_B, GRAD_A).tolist() == IGIA


def test_equation_4_layer_score():
    # The matrix sums to 27; layer 0 has it twice, layer 1 once at a quarter (half the gradient, squared).
    assert score_layers(two_linear_trace(), num_keep=1).values == (54.0, 6.75)


def test_equation_4_with_the_released_codes_norm():
    norms = math.sqrt(9 + 1 + 36 + 4) + 2.0  # sum over steps, no square, no 1/t
    expected = (2 * norms, norms / 2)
    assert score_layers(two_linear_trace(), norm="frobenius", num_keep=1).values == pytest.approx(expected)


def test_equation_4_needs_no_dense_matrix():
    b, a = torch.randn(6, 50, 8), torch.randn(6, 8, 70)
    dense = (b @ a).double()
    torch.testing.assert_close(gram_energies(b, a), dense.square().sum((1, 2)), rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def recorded():
    from conftest import make_model

    samples = [
        {"input_ids": list(range(3 + i, 15 + i)), "labels": list(range(3 + i, 15 + i))} for i in range(8)
    ]
    model = make_model()
    before = copy.deepcopy(model)
    trace = record_gradients(
        model,
        samples,
        steps=4,
        rank=2,
        batch_size=2,
        learning_rate=1e-3,
        dropout=0.0,
        clip=None,
        device="cpu",
    )
    return model, before, trace


def test_line_1_lora_starts_at_zero_on_every_linear(tiny_llama):
    pairs, linears = find_lora_linears(attach_lora(tiny_llama(), rank=2))
    assert len(linears) == 6 * 7
    assert all(a.abs().sum() > 0 and b.abs().sum() == 0 for a, b in pairs)


def test_lines_3_and_6_training_stops_after_t_steps_and_leaves_the_model(recorded):
    model, before, trace = recorded
    assert trace.num_steps == 4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_line_4_gradients_are_those_of_the_chain_rule(tiny_llama):
    # y = (W + s B A) x, so dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with s = alpha / r.
    model = attach_lora(tiny_llama(), rank=2, alpha=8, dropout=0.0)
    pairs, _ = find_lora_linears(model)
    with torch.no_grad():
        for _, weight_b in pairs:
            weight_b.normal_(std=0.1)
    linear = model.get_base_model().model.layers[3].mlp.up_proj
    linear.base_layer.weight.requires_grad_(True)
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    dense, a, b = (
        linear.base_layer.weight.grad,
        linear.lora_A["default"].weight,
        linear.lora_B["default"].weight,
    )
    torch.testing.assert_close(b.grad, 4 * dense @ a.T, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(a.grad, 4 * b.T @ dense, rtol=1e-4, atol=1e-7)


def test_line_4_the_first_step_contributes_exactly_nothing(recorded):
    trace = recorded[2]
    history = trace.factors(2, "mlp.down_proj")
    assert bool((trace.energies_SK[0] == 0).all())
    assert bool((history.grad_a_SRI[0] == 0).all())  # because B is zero ...
    assert bool((history.grad_b_SOR[0] != 0).any())  # ... while B itself is about to move
    assert bool((trace.energies_SK[-1] > 0).all())
    assert 0 < trace.effective_steps < trace.num_steps


def test_lines_5_and_8_on_a_recorded_trace(recorded):
    trace = recorded[2]
    history = trace.factors(1, "self_attn.k_proj")
    mean_square = torch.zeros(history.shape, dtype=torch.float64)
    for b, a in zip(history.grad_b_SOR, history.grad_a_SRI, strict=True):
        mean_square += (b.double() @ a.double()) ** 2 / trace.num_steps
    found = element_importance(history.grad_b_SOR, history.grad_a_SRI).double()
    torch.testing.assert_close(found, mean_square, rtol=1e-3, atol=float(mean_square.max()) * 1e-6)


def test_lines_10_to_12_on_a_recorded_trace(recorded):
    trace = recorded[2]
    for layer, value in enumerate(score_layers(trace).values):
        dense = sum(
            float(element_importance(h.grad_b_SOR, h.grad_a_SRI).double().sum())
            for h in (trace.factors(layer, name) for name in trace.linear_names(layer))
        )
        assert value == pytest.approx(dense, rel=1e-4)


def test_line_14_the_n_lowest_scores_go(tiny_llama):
    scores = LayerScores("m", (5.0, 1.0, 4.0, 2.0, 3.0, 6.0))
    plan = plan_pruning(scores, num_prune=3, num_merge=0)
    assert plan.pruned == (1, 3, 4)
    model = tiny_llama()
    kept = [model.model.layers[i] for i in (0, 2, 5)]
    assert list(prune_(model, plan).model.layers) == kept


def test_line_14_of_equal_scores_the_lower_index_is_kept():
    assert plan_pruning(LayerScores("m", (1.0, 2.0, 1.0, 1.0)), num_prune=2, num_merge=0).pruned == (2, 3)


def test_section_2_3_overlap_with_the_final_kept_set():
    energy = torch.tensor([[5.0, 1.0, 2.0], [0.0, 3.0, 0.0], [0.0, 9.0, 0.0]])
    assert rank_stability(energy, 1) == ((1, 0.0), (2, 0.0), (3, 1.0))


def test_section_2_3_t_is_one_percent_of_the_steps_but_at_least_forty():
    assert [default_steps(planned) for planned in (100, 4000, 4001, 60_000)] == [40, 40, 41, 600]


# --- 3.2 ----------------------------------------------------------------------------------------------------


def test_sparsification_keeps_exactly_the_floor_of_p_percent():
    importance = torch.arange(49.0).reshape(7, 7)
    survived = torch.zeros(7, 7, dtype=torch.uint8)
    mark_top_(importance, 0.2, survived, bit=0)
    mask = survived.bool()
    assert int(mask.sum()) == 9  # 9.8
    assert bool(mask[importance >= 40].all())


def test_sparsification_of_equal_entries_keeps_the_first():
    survived = torch.zeros(1, 5, dtype=torch.uint8)
    mark_top_(row(1, 7, 1, 1, 1), 0.6, survived, bit=0)
    assert survived.tolist() == [[1, 1, 1, 0, 0]]


def test_sparsification_leaves_the_retained_layer_whole():
    # Nothing is kept of W_2 (density below one entry), so W_1 is what it was, unimportant entries too.
    assert merge_linear(row(1, -1), [Source(row(5, -5), ranked(2, 1))], density=0.4).tolist() == [[1, -1]]


def test_symbols_zero_matches_no_sign():
    assert signs_agree(row(1, -1, 0, 0, 2), row(2, -2, 0, 3, 0)).tolist() == [
        [True, True, False, False, False]
    ]


W1, W2, W3 = row(1, -1, 0, 2), row(0.5, 0.5, 0.5, -1), row(-1, -2, 1, 1)
SECOND, THIRD = Source(W2, ranked(4, 3, 2, 1)), Source(W3, ranked(1, 2, 3, 4))


def test_equation_5_two_layers():
    # Entries 0 and 1 of W_2 survive; only entry 0 has the sign of W_1.
    assert merge_linear(W1, [SECOND], density=0.5).tolist() == [[1.5, -1, 0, 2]]


def test_equation_5_more_layers_are_compared_with_the_retained_one_each():
    # Of W_3 entries 2 and 3 survive; W_1 is zero at 2, so only 3 is added.
    assert merge_linear(W1, [SECOND, THIRD], density=0.5).tolist() == [[1.5, -1, 0, 3]]


def test_equation_5_signs_are_those_of_w1_before_any_merge():
    # Entry 1: W_1 = -1 and 0.5 disagrees, whatever was added before it.
    group = [Source(row(1, -2), ranked(1, 1)), Source(row(-3, 0.5), ranked(1, 1))]
    for sources in (group, group[::-1]):
        assert merge_linear(row(1, -1), sources, density=1.0).tolist() == [[2, -3]]


def test_equation_6_half_and_half():
    assert merge_linear(W1, [SECOND], rule="mean", density=0.5).tolist() == [[0.75, -1, 0, 2]]


def test_equation_6_for_more_layers_is_the_mean_of_the_agreeing_terms():
    group = [Source(row(3, -1), ranked(1, 1)), Source(row(5, 1), ranked(1, 1))]
    assert merge_linear(row(1, -3), group, rule="mean", density=1.0).tolist() == [[3, -2]]


def test_appendix_b2_fisher():
    # Entry 0: F_r = 2^2, F_m = 4^2, so (4 * 1 + 16 * 0.5) / 20 = 0.6; elsewhere (1, 0).
    found = merge_linear(W1, [SECOND], rule="fisher", density=0.5, target_factors=ranked(2, 1, 1, 1))
    torch.testing.assert_close(found, row(0.6, -1, 0, 2))


def test_figure_7_weighted_average_has_no_sign_rule():
    assert merge_linear(W1, [SECOND], rule="weighted_average", density=0.5).tolist() == [[0.75, -0.25, 0, 2]]


def test_norm_preserving_is_the_sum_at_the_old_norm():
    found = merge_linear(row(3, 4), [Source(row(3, 4), ranked(1, 1))], rule="norm_preserving", density=1.0)
    torch.testing.assert_close(found, row(3, 4))


def test_section_3_2_target_is_the_preceding_retained_layer():
    scores = LayerScores("m", (9.0, 1.0, 8.0, 2.0, 3.0, 7.0))
    plan = plan_pruning(scores, num_prune=3, num_merge=3)
    assert plan.merged == {0: (1,), 2: (3, 4)}


def test_appendix_c2_the_merged_are_the_best_scored_of_the_pruned():
    # Thirteen of 32, layers 18 to 30 as in the released code; importance falls with depth but for the last.
    scores = LayerScores("m", (*map(float, range(32, 1, -1)), 40.0))
    plan = plan_pruning(scores, num_prune=13, num_merge=3)
    assert plan.pruned == tuple(range(18, 31))
    assert plan.merged == {17: (18, 19, 20)}
    assert plan.density == 0.2 and plan.rule == "sum"


def test_the_released_codes_choice_is_a_plan_one_can_write(tiny_llama):
    # It merges 18, 19 and 30 into 17; here 2, 3 and 4 of six layers into 1, typed by hand.
    merge = {"action": "merge", "into": 1}
    actions = [{"action": "keep"}, {"action": "keep"}, merge, merge, merge, {"action": "keep"}]
    assert PruningPlan.from_dict({"actions": actions}).merged == {1: (2, 3, 4)}


def test_without_merging_the_same_layers_are_dropped():
    plan = plan_pruning(LayerScores("m", (9.0, 1.0, 8.0, 2.0)), num_prune=2, num_merge=2)
    assert plan.without_merging().keep == plan.keep
    assert plan.without_merging().merged == {}


def test_layer_norms_and_biases_are_not_merged(tiny_model, tiny_trace):
    model = tiny_model("qwen2")  # has biases on q, k and v
    target = copy.deepcopy(model.model.layers[1])
    actions = [{"action": a} for a in ("keep", "keep", "drop", "keep", "keep", "keep")]
    actions[2] = {"action": "merge", "into": 1}
    prune_(model, PruningPlan.from_dict({"actions": actions}), tiny_trace(model))
    after = model.model.layers[1]
    assert torch.equal(after.input_layernorm.weight, target.input_layernorm.weight)
    assert torch.equal(after.post_attention_layernorm.weight, target.post_attention_layernorm.weight)
    assert torch.equal(after.self_attn.q_proj.bias, target.self_attn.q_proj.bias)
    assert not torch.equal(after.self_attn.q_proj.weight, target.self_attn.q_proj.weight)


# --- how it is recorded where the paper is silent -----------------------------------------------------------


def test_the_learning_rate_is_constant_after_warm_up(recorded):
    rates = recorded[2].info.learning_rates
    assert len(rates) == 4 and rates[-1] == max(rates) == pytest.approx(1e-3)


def test_clipping_by_c_scales_the_energy_of_a_step_by_the_fourth_power():
    refs = [LinearRef(0, "up", 2, 2, 1)]
    writer = TraceWriter(refs, None)
    for c in (1.0, 0.5):
        writer.add_step([GRAD_B[0] * c], [GRAD_A[0] * c])
    raw, clipped = writer.finish(TraceInfo(1, tuple(refs))).energies_SK[:, 0].tolist()
    assert clipped == raw * 0.5**4


def test_the_order_of_layers_does_not_depend_on_the_lora_scale():
    # alpha enters both gradients, so every energy scales by the same number.
    trace = two_linear_trace()
    scaled = GradientTrace(trace.info, trace.energies_SK * 4.0**4)
    assert score_layers(scaled, num_keep=1).ascending() == score_layers(trace, num_keep=1).ascending()


# --- docs/paper.md ------------------------------------------------------------------------------------------


def test_everything_named_in_the_documentation_exists():
    root = Path(__file__).parents[1]
    text = (root.parent / "docs" / "paper.md").read_text(encoding="utf-8")
    tests = set(re.findall(r"`(test_\w+)`(?! in)", text))
    assert len(tests) > 30
    assert tests <= set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(encoding="utf-8"), re.M))
    for name, file in re.findall(r"`(test_\w+)` in tests/(\w+/\w+\.py)", text):
        assert f"def {name}(" in (root / file).read_text(encoding="utf-8"), name
    named = re.findall(r"`((?:gradients|plans|pruning|training)\.\w+)\.([\w.]+)`", text)
    assert len(named) > 20
    for module, path in named:
        found = importlib.import_module(f"gradpruner.{module}")
        for part in path.split("."):
            found = getattr(found, part)


def test_every_equation_and_pseudo_code_line_is_documented():
    text = (Path(__file__).parents[2] / "docs" / "paper.md").read_text(encoding="utf-8")
    tests = re.findall(
        r"^def (test_(?:equation|line|lines|section|appendix)_\w+)", Path(__file__).read_text(), re.M
    )
    assert [name for name in tests if f"`{name}`" not in text] == []
