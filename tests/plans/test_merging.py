import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpruner.common.errors import ConfigError, ShapeError
from gradpruner.gradients import importance
from gradpruner.gradients.importance import Factors, element_importance
from gradpruner.plans import merging
from gradpruner.plans.merging import (
    MAX_SOURCES,
    MERGE_RULES,
    Source,
    kth_largest,
    mark_top_,
    merge_linear,
    needs_importance,
    signs_agree,
)

LACO_RULES = [rule for rule in MERGE_RULES.names() if not needs_importance(rule)]
RULES = [rule for rule in MERGE_RULES.names() if needs_importance(rule)]


def factors(shape=(9, 12), steps=5, rank=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(steps, shape[0], rank, generator=generator) * scale
    a = torch.randn(steps, rank, shape[1], generator=generator) * scale
    return Factors(b, a)


def weight(shape=(9, 12), seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sources(count, shape=(9, 12), dtype=torch.float32, **options):
    return [
        Source(weight(shape, 10 + q, dtype), factors(shape, seed=20 + q, **options)) for q in range(count)
    ]


def dense_importance(history):
    gradients = history.grad_b_SOR.double() @ history.grad_a_SRI.double()
    return gradients.square().mean(0)


def dense_merge(target, group, rule, density, target_factors):
    """The definition, entry by entry, in Python floats (double precision)."""
    flat = target.double().reshape(-1).tolist()
    size, norm = len(flat), float(target.double().norm())
    histories = [dense_importance(s.factors).reshape(-1).tolist() for s in group]
    own = dense_importance(target_factors).reshape(-1).tolist()
    weights = [s.weight.double().reshape(-1).tolist() for s in group]
    kept = [
        set(sorted(range(size), key=lambda i, h=h: (-h[i], i))[: math.floor(density * size)])
        for h in histories
    ]
    out = []
    for i, w1 in enumerate(flat):
        agreeing = [q for q in range(len(group)) if i in kept[q] and weights[q][i] * w1 > 0]
        terms = [weights[q][i] for q in agreeing]
        if rule in ("sum", "norm_preserving"):
            out.append(w1 + sum(terms))
        elif rule == "mean":
            out.append((w1 + sum(terms)) / (1 + len(terms)))
        elif rule == "weighted_average":
            every = [weights[q][i] for q in range(len(group)) if i in kept[q]]
            out.append((w1 + sum(every)) / (1 + len(every)))
        elif rule == "fisher":
            top = own[i] * w1 + sum(histories[q][i] * weights[q][i] for q in agreeing)
            out.append(top / (own[i] + sum(histories[q][i] for q in agreeing)))
    merged = torch.tensor(out, dtype=torch.float64).reshape(target.shape)
    return merged * (norm / merged.norm()) if rule == "norm_preserving" else merged


# --- importance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 40])
@pytest.mark.parametrize("steps", [1, 7])
def test_importance_is_the_dense_mean_square(rank, steps):
    history = factors(steps=steps, rank=rank)
    found = element_importance(history.grad_b_SOR, history.grad_a_SRI)
    torch.testing.assert_close(found.double(), dense_importance(history), rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32


def test_importance_of_half_precision_factors():
    history = factors()
    found = element_importance(history.grad_b_SOR.bfloat16(), history.grad_a_SRI.bfloat16())
    rounded = Factors(history.grad_b_SOR.bfloat16(), history.grad_a_SRI.bfloat16())
    torch.testing.assert_close(found.double(), dense_importance(rounded), rtol=1e-4, atol=1e-5)


def test_no_gradient_is_no_importance():
    assert element_importance(torch.zeros(2, 3, 1), torch.ones(2, 1, 4)).eq(0).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1e4])
def test_merging_does_not_depend_on_the_scale_of_the_gradients(rule, scale):
    # Squares of products of 1e-20 are 1e-80, far outside fp32; selection and Fisher ratios must not change.
    reference = merge_linear(weight(), sources(2), rule=rule, target_factors=factors())
    scaled = merge_linear(weight(), sources(2, scale=scale), rule=rule, target_factors=factors(scale=scale))
    torch.testing.assert_close(scaled, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b, a", [((2, 5, 3), (2, 4, 6)), ((2, 5, 3), (1, 3, 6)), ((5, 3), (3, 6))])
def test_factors_that_do_not_belong_together(b, a):
    with pytest.raises(ShapeError, match="do not match"):
        element_importance(torch.zeros(b), torch.zeros(a))


# --- selection ----------------------------------------------------------------------------------------------


def top_density_mask(importance, density):
    survived = torch.zeros(importance.shape, dtype=torch.uint8)
    mark_top_(importance, density, survived, bit=0)
    return survived.bool()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_kth_largest_against_sort(data):
    values = data.draw(st.lists(st.sampled_from([0.0, 1.0, 1.5, -2.0, 3e-39, 7e30]), min_size=1, max_size=40))
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(torch.tensor(values).tolist(), reverse=True)[k - 1]
    assert kth_largest(torch.tensor(values), k)[0] == expected


BIG = 150_001  # above the size from which a sample brackets the answer
STRIDE = BIG // 65_536


@pytest.mark.parametrize(
    "values",
    [
        torch.full((BIG,), 0.25),
        torch.zeros(BIG).index_fill(0, torch.arange(5), 1.0),
        torch.rand(BIG, generator=torch.Generator().manual_seed(0)).pow(40),
        torch.arange(BIG, dtype=torch.float32),
        torch.arange(BIG, 0, -1, dtype=torch.float32),
        # The sample consists of the smallest (largest) entries only here.
        (torch.arange(BIG) % STRIDE != 0) * torch.rand(BIG, generator=torch.Generator().manual_seed(1)),
        (torch.arange(BIG) % STRIDE == 0) * torch.rand(BIG, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["constant", "few", "skewed", "rising", "falling", "sample too low", "sample too high"],
)
def test_kth_largest_of_many(values):
    descending = values.sort(descending=True).values
    for k in (1, 2, 6, BIG // 5, BIG // 2, BIG - 1, BIG):
        assert kth_largest(values, k)[0] == float(descending[k - 1])


@pytest.mark.parametrize("k", [0, 4, -1])
def test_kth_largest_out_of_range(k):
    with pytest.raises(ShapeError, match="1 to 3"):
        kth_largest(torch.zeros(3), k)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=48),
    st.floats(0.01, 1.0).map(lambda x: round(x, 2)),
)
def test_top_density_mask_against_a_stable_sort(values, density):
    importance = torch.tensor(values, dtype=torch.float32)
    count = len(values) * round(density * 100) // 100
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[torch.argsort(importance, descending=True, stable=True)[:count]] = True
    assert torch.equal(top_density_mask(importance, density), expected)


def test_density_is_taken_as_the_decimal_it_was_written_as():
    assert 0.29 * 100 < 29
    assert int(top_density_mask(torch.rand(10, 10), 0.29).sum()) == 29


def test_mask_of_a_transposed_matrix_breaks_ties_by_its_own_order():
    importance = torch.zeros(3, 2).T  # not contiguous
    assert top_density_mask(importance, 0.5).tolist() == [[True, True, True], [False, False, False]]


def test_mask_smaller_than_one_entry_is_empty():
    assert not top_density_mask(torch.rand(2, 2), 0.2).any()


@pytest.mark.parametrize("density", [0, -0.1, 1.0001, math.nan])
def test_density_out_of_range(density):
    with pytest.raises(ConfigError, match="density"):
        merge_linear(weight(), sources(1), density=density)


def test_zero_agrees_with_nothing():
    w = torch.tensor([1.0, -1.0, 0.0, 1.0, 0.0, -0.0])
    t = torch.tensor([2.0, -3.0, 0.0, -1.0, 1.0, -1.0])
    assert signs_agree(w, t).tolist() == [True, True, False, False, False, False]


# --- merge_linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("density", [0.2, 1.0])
def test_every_rule_against_the_definition(rule, count, density):
    target, group, own = weight(), sources(count), factors(seed=5)
    target[0, :3] = 0  # the sign rule leaves zeros unchanged
    found = merge_linear(target, group, rule=rule, density=density, target_factors=own)
    torch.testing.assert_close(
        found.double(), dense_merge(target, group, rule, density, own), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_merged_in_fp32_and_cast_back(rule, dtype):
    target, group, own = weight(dtype=dtype), sources(2, dtype=dtype), factors(seed=5)
    found = merge_linear(target, group, rule=rule, target_factors=own)
    exact = dense_merge(target, group, rule, 0.2, own)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [3, 4])
def test_order_of_sources_does_not_matter_to_the_bit(rule, count):
    group, own = sources(count), factors(seed=5)
    results = [
        merge_linear(weight(), list(order), rule=rule, density=0.9, target_factors=own)
        for order in permutations(group)
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("entries", [1, 30])  # a row at a time; two
def test_row_blocks_make_no_difference(rule, entries, monkeypatch):
    own = factors(seed=5)
    whole = merge_linear(weight(), sources(3), rule=rule, target_factors=own)
    for module in (importance, merging):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", entries)
    blocks = merge_linear(weight(), sources(3), rule=rule, target_factors=own)
    if rule in ("fisher", "norm_preserving"):  # sums of rounded numbers, grouped differently
        torch.testing.assert_close(blocks, whole, rtol=1e-5, atol=1e-7)
    else:
        assert torch.equal(blocks, whole)


def test_more_sources_than_bits_of_a_byte():
    group, own = sources(11), factors(seed=5)
    found = merge_linear(weight(), group, density=0.7)
    torch.testing.assert_close(
        found.double(), dense_merge(weight(), group, "sum", 0.7, own), rtol=1e-5, atol=1e-5
    )


def test_norm_preserving_keeps_the_norm_of_the_whole_matrix(monkeypatch):
    for module in (importance, merging):
        monkeypatch.setattr(module, "BLOCK_ENTRIES", 30)
    found = merge_linear(weight(), sources(3), rule="norm_preserving")
    assert float(found.norm()) == pytest.approx(float(weight().norm()), rel=1e-6)
    assert float(merge_linear(weight(), sources(3)).norm()) > 1.1 * float(weight().norm())


def test_norm_preserving_of_an_all_zero_target():
    assert merge_linear(torch.zeros(9, 12), sources(1), rule="norm_preserving").eq(0).all()


def test_fisher_without_evidence_leaves_the_target():
    nothing = Factors(torch.zeros(2, 9, 1), torch.zeros(2, 1, 12))
    found = merge_linear(weight(), [Source(weight(seed=1), nothing)], rule="fisher", target_factors=nothing)
    assert torch.equal(found, weight())


def test_fisher_beside_a_source_without_evidence():
    # The unit of all-zero gradients must not drown out 1e-20 next to it.
    tiny, own = sources(1, scale=1e-20), factors(seed=5, scale=1e-20)
    nothing = Source(weight(seed=1), Factors(torch.zeros(2, 9, 1), torch.ones(2, 1, 12)))
    alone = merge_linear(weight(), tiny, rule="fisher", target_factors=own)
    assert torch.equal(merge_linear(weight(), [*tiny, nothing], rule="fisher", target_factors=own), alone)
    assert not torch.equal(alone, weight())


@pytest.mark.parametrize("rule", RULES)
def test_entries_left_out_cannot_poison_the_result(rule):
    target, source, own = weight(), sources(1)[0], factors(seed=5)
    mask = top_density_mask(element_importance(source.factors.grad_b_SOR, source.factors.grad_a_SRI), 0.2)
    poisoned = Source(torch.where(mask, source.weight, torch.inf), source.factors)
    clean = merge_linear(target, [source], rule=rule, target_factors=own)
    assert torch.equal(merge_linear(target, [poisoned], rule=rule, target_factors=own), clean)


def test_nothing_given_is_changed_and_no_graph_is_built():
    target, group = torch.nn.Parameter(weight()), sources(2)
    merged = merge_linear(target, group)
    assert not merged.requires_grad
    assert torch.equal(target.data, weight())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(group, sources(2), strict=True))


def test_shapes_must_match():
    with pytest.raises(ShapeError, match=r"\(8, 12\)"):
        merge_linear(weight((8, 12)), sources(1))
    with pytest.raises(ShapeError, match="gradients for"):
        merge_linear(weight(), [Source(weight(), factors((9, 11)))])
    with pytest.raises(ShapeError, match="do not fit"):
        merge_linear(weight(), sources(1), rule="fisher", target_factors=factors((8, 12)))
    with pytest.raises(ShapeError, match="at most"):
        merge_linear(weight(), sources(1) * (MAX_SOURCES + 1))


def test_unknown_rule_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'fisher'"):
        merge_linear(weight(), sources(1), rule="fischer")


def test_fisher_needs_the_targets_own_gradients():
    with pytest.raises(ConfigError, match="kept layer"):
        merge_linear(weight(), sources(1), rule="fisher")
    with pytest.raises(ConfigError, match="importance"):
        MERGE_RULES.find("fisher")(weight(), [], [], None)


@pytest.mark.parametrize("rule", RULES + LACO_RULES)
def test_every_rule_says_what_it_is(rule):
    assert len((MERGE_RULES.find(rule).__doc__ or "").splitlines()[0]) > 20


# --- LaCo's rules: no gradients, no sparsification ----------------------------------------------------------


def test_reserving_differences_by_hand():
    base = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    first = torch.tensor([[3.0, -1.0], [5.0, 4.0]])  # differences 2, 1, 5, 0
    second = torch.tensor([[-1.0, 2.0], [1.0, 0.5]])  # differences -2, 4, 1, -3.5
    found = merge_linear(base, [Source(first), Source(second)], rule="laco")
    assert found.tolist() == [[1.0, 3.0], [6.0, 0.5]]
    assert torch.equal(merge_linear(base, [Source(first)], rule="laco"), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_released_sum_telescopes_to_the_last_source_and_the_papers_does_not(dtype):
    base = weight(dtype=dtype)
    group = [Source(weight(seed=10 + q, dtype=dtype)) for q in range(3)]
    released = merge_linear(base, group, rule="laco_released")
    assert float((released - group[-1].weight).abs().max()) == 0.0
    paper = merge_linear(base, group, rule="laco")
    assert float((paper - group[-1].weight).abs().max()) > 1
    expected = base.double() + sum(source.weight.double() - base.double() for source in group)
    torch.testing.assert_close(paper.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_the_norm_of_four_unlike_layers_grows_as_the_formula_says():
    base, group = weight((300, 300)), [Source(weight((300, 300), seed=10 + q)) for q in range(3)]
    grown = float(merge_linear(base, group, rule="laco").norm() / base.norm())
    assert grown == pytest.approx((3 + 2**2) ** 0.5, rel=0.02)  # m + (m - 1)^2 for m = 3


def test_the_papers_rule_knows_no_order_and_the_released_one_does():
    base, group = weight(), [Source(weight(seed=10 + q)) for q in range(3)]
    paper = [merge_linear(base, list(order), rule="laco") for order in permutations(group)]
    assert all(torch.equal(paper[0], other) for other in paper[1:])
    released = [merge_linear(base, list(order), rule="laco_released") for order in permutations(group)]
    assert not torch.equal(released[0], released[1])


@pytest.mark.parametrize("rule", LACO_RULES)
def test_laco_looks_at_neither_gradients_nor_density_nor_blocks(rule, monkeypatch):
    plain = merge_linear(weight(), [Source(s.weight) for s in sources(2)], rule=rule, density=0.01)
    assert torch.equal(merge_linear(weight(), sources(2), rule=rule, density=1.0), plain)
    monkeypatch.setattr(importance, "BLOCK_ENTRIES", 1)
    assert torch.equal(merge_linear(weight(), sources(2), rule=rule), plain)
    assert torch.equal(merge_linear(weight(), [], rule=rule), weight())


def test_other_rules_refuse_sources_without_gradients():
    with pytest.raises(ConfigError, match="sum rule needs the recorded gradients"):
        merge_linear(weight(), [Source(weight(seed=1))])
    with pytest.raises(ShapeError, match="cannot be merged"):
        merge_linear(weight(), [Source(weight((8, 12)))], rule="laco")
