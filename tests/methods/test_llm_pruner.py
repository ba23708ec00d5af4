"""LLM-Pruner: Taylor salience by hand and against whole gradients, aligned groups, budget, bounded memory."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import make_llama, make_qwen2, make_samples
from transformers import GPT2Config, GPT2LMHeadModel

from gradpruner.common.errors import ConfigError, DataError, ModelError, NonFiniteError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.llm_pruner import LLMPrunerOptions, layers_to_prune
from gradpruner.methods.taylor import TaylorSalience
from gradpruner.methods.width_choice import descending, most_important, share_out, unit_scores
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan, WidthShape

SAMPLES = make_samples(6)
METHOD = METHODS.find("llm_pruner")


# Three query heads per group.
make_grouped_qwen2 = partial(
    make_qwen2, vocab_size=32, hidden_size=24, intermediate_size=40, num_attention_heads=6
)


def make_context(model, num_remove=1000, samples=SAMPLES, protected=(), unit="parameters", **options):
    return MethodContext(
        num_layers=model.config.num_hidden_layers,
        seed=0,
        trace=lambda: pytest.fail("LLM-Pruner reads no trace"),
        model=lambda: model,
        samples=samples,
        collator=Collator(),
        num_remove=num_remove,
        protected=protected,
        unit=unit,
        options=METHOD.read_options("llm_pruner", options),
    )


def batches(samples=SAMPLES, max_tokens=64):
    some = [
        {"input_ids": s["input_ids"][:max_tokens], "labels": s["input_ids"][:max_tokens]} for s in samples
    ]
    return Collator()(some), [Collator()([one]) for one in some]


# --- salience -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "taylor, expected",
    [("param_first", [14, 34]), ("param_second", [65, 1145]), ("param_mix", [34.5, 546.5])],
)
def test_two_channels_by_hand(taylor, expected):
    """loss = scale * (<gate, G> + <down, D>); the samples have scale 1 and 3, all together 2.

    gate: g = 2G = [[4, 2], [0, -8]], w g = [[4, -4], [0, -4]]; a = 5 G^2 = [[20, 5], [0, 80]],
    w a w = [[20, 20], [0, 20]]; channels are rows. down: w g = [[2, 0], [-4, 30]], w a w =
    [[5, 0], [20, 1125]]; channels are columns.
    """
    model = make_llama(
        hidden_size=2, intermediate_size=2, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1
    )
    view = WidthView(model)
    gate, down = view.parts(0).gate_proj.weight, view.parts(0).down_proj.weight
    with torch.no_grad():
        gate.copy_(torch.tensor([[1.0, -2], [3, 0.5]]))
        down.copy_(torch.tensor([[1.0, 2], [-1, 3]]))
    gate_grad, down_grad = torch.tensor([[2.0, 1], [0, -4]]), torch.tensor([[1.0, 0], [2, 5]])

    class Loss:
        parameters = staticmethod(model.parameters)

        def __call__(self, scale, use_cache):
            return SimpleNamespace(loss=scale * ((gate * gate_grad).sum() + (down * down_grad).sum()))

    view.model = Loss()
    (found,) = TaylorSalience(view, taylor).measure([0], {"scale": 2.0}, [{"scale": 1.0}, {"scale": 3.0}])
    assert found.channels_C.tolist() == expected
    assert found.kv_heads_K.tolist() == [0]


def naive_scores(model, taylor):
    """Computes salience from whole gradients and squared gradients, with plain loops over units."""
    model.requires_grad_(True)
    batch, singles = batches()
    squares = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for single in singles:
        model.zero_grad()
        model(**single).loss.backward()
        for name, p in model.named_parameters():
            squares[name] += p.grad**2 / len(singles)
    model.zero_grad()
    model(**batch).loss.backward()
    salience = {}
    for name, p in model.named_parameters():
        w, g, a = p.detach(), p.grad, squares[name]
        salience[name] = {
            "param_first": w * g,
            "param_second": w * a * w,
            "param_mix": w * g - w * a * w / 2,
        }[taylor].abs()
    model.zero_grad()
    config, result = model.config, []
    dim = config.hidden_size // config.num_attention_heads
    size = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        at, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        heads, channels = [], []
        for kv in range(config.num_key_value_heads):
            total = 0.0
            for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
                if at + name in salience:
                    total += float(salience[at + name][kv * dim : (kv + 1) * dim].sum())
            for head in range(kv * size, (kv + 1) * size):
                rows = slice(head * dim, (head + 1) * dim)
                total += float(salience[at + "q_proj.weight"][rows].sum())
                total += float(salience[at + "o_proj.weight"][:, rows].sum())
                if at + "q_proj.bias" in salience:
                    total += float(salience[at + "q_proj.bias"][rows].sum())
            heads.append(total)
        for j in range(config.intermediate_size):
            rows = [salience[mlp + f"{name}.weight"][j].sum() for name in ("gate_proj", "up_proj")]
            channels.append(float(sum(rows) + salience[mlp + "down_proj.weight"][:, j].sum()))
        result.append((heads, channels))
    return result


@pytest.mark.parametrize(
    ("make", "taylor", "layers_at_once"),
    [
        (make_llama, "param_first", 1),
        (make_grouped_qwen2, "param_first", 3),
        (make_grouped_qwen2, "param_second", 1),
        (make_llama, "param_mix", 3),
        (make_grouped_qwen2, "param_mix", 1),
    ],
)
def test_salience_equals_that_from_whole_gradients(make, taylor, layers_at_once, monkeypatch):
    monkeypatch.setattr(
        "gradpruner.gradients.importance.BLOCK_ENTRIES", 100
    )  # several blocks of rows per weight
    expected = naive_scores(make(), taylor)
    salience = TaylorSalience(WidthView(make()), taylor, layers_at_once)
    found = salience.measure([0, 1, 2, 3], *batches())
    for one, (heads, channels) in zip(found, expected, strict=True):
        assert one.kv_heads_K.tolist() == pytest.approx(heads, rel=1e-4)
        assert one.channels_C.tolist() == pytest.approx(channels, rel=1e-4)


def test_salience_does_not_depend_on_the_other_layers_measured():
    every = TaylorSalience(WidthView(make_llama()), "param_mix").measure([0, 1, 2, 3], *batches())
    some = TaylorSalience(WidthView(make_llama()), "param_mix").measure([1, 3], *batches())
    assert [s.channels_C.tolist() for s in some] == [
        pytest.approx(every[i].channels_C.tolist(), rel=1e-5) for i in (1, 3)
    ]


def test_rows_and_columns_go_to_the_kv_head_that_shares_them():
    shape = WidthShape(1, 8, 4, 2, 2, 3)
    vectors = {
        "q_proj": torch.tensor([1.0, 1, 2, 2, 4, 4, 8, 8]),
        "k_proj": torch.tensor([0.5, 0, 0, 0.25]),
        "o_proj": torch.tensor([0, 0, 100.0, 0, 0, 0, 0, 0]),
        "up_proj": torch.tensor([1.0, 2, 3]),
        "down_proj": torch.tensor([0.0, 0, 5]),
    }
    found = unit_scores(shape, vectors)
    assert found.kv_heads_K.tolist() == [2 + 4 + 0.5 + 100, 8 + 16 + 0.25]
    assert found.channels_C.tolist() == [1, 2, 8]


@pytest.mark.parametrize(
    ("head", "group", "taylor"),
    [(0, 0, "param_first"), (1, 0, "param_mix"), (2, 1, "param_second"), (3, 1, "param_first")],
)
def test_the_group_of_the_query_head_that_matters_is_kept(head, group, taylor):
    """The released code assigns heads 0 and 2 to KV head 0, and heads 1 and 3 to KV head 1."""
    model = make_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            for other in set(range(4)) - {head}:
                layer.self_attn.q_proj.weight[4 * other : 4 * other + 4] *= 0.01
                layer.self_attn.o_proj.weight[:, 4 * other : 4 * other + 4] *= 0.01
            layer.self_attn.k_proj.weight *= 0.1  # in both groups, so that it does not decide
    view = WidthView(model)
    # Half of layers 1 to 3.
    plan = METHOD.plan(make_context(model, 3 * (384 + 16 * 48), taylor=taylor))
    assert [plan.kv_heads(i) for i in (1, 2, 3)] == [(group,)] * 3
    assert all(head in plan.layers[i].heads for i in (1, 2, 3))
    assert view.shape.group(group) == plan.layers[1].heads


# --- budget and selection -----------------------------------------------------------------------------------


def test_the_share_of_heads_is_floored_and_channels_make_up_the_rest():
    # Llama-3.1-8B, half of 26 layers: 4 of 8 KV heads and half of the channels of each.
    shape = WidthShape(32, 4096, 32, 8, 128, 14336)
    group, channel = 128 * 4096 * (2 + 2 * 4), 3 * 4096
    units = {"group": group, "channel": channel}
    assert share_out(shape, units, 26, 13 * 218_103_808) == (4, 26 * 7168)
    # Exactly as many parameters as 13 layers with their norms: some channels more.
    assert share_out(shape, units, 26, 13 * 218_112_000) == (4, 26 * 7168 + round(13 * 8192 / channel))
    kv_heads, channels = share_out(shape, units, 26, 3_000_000_000)
    assert kv_heads == 4 and abs(26 * 4 * group + channels * channel - 3_000_000_000) <= channel / 2
    assert share_out(shape, units, 26, 0) == (0, 0)


def test_more_heads_are_removed_if_channels_do_not_suffice():
    shape = WidthShape(1, 8, 4, 4, 2, 2)  # one channel can be removed
    assert share_out(shape, {"group": 10, "channel": 4}, 1, 9) == (1, 0)
    assert share_out(shape, {"group": 10, "channel": 4}, 1, 14) == (1, 1)
    with pytest.raises(PlanError, match="can lose at most 34"):
        share_out(shape, {"group": 10, "channel": 4}, 1, 40)


def test_of_equal_units_the_lower_index_is_kept():
    assert most_important([1.0, 2.0, 1.0, 1.0], 3) == (0, 1, 2)
    assert descending([1.0, 2.0, 1.0]) == [1, 0, 2]


@pytest.mark.parametrize(
    ("make", "share", "unit"),
    [
        (make_llama, 0.0, "parameters"),
        (make_grouped_qwen2, 0.07, "decoder_parameters"),
        (make_llama, 0.25, "decoder_parameters"),
        (make_grouped_qwen2, 0.4, "parameters"),
        (make_llama, 0.4, "decoder_parameters"),
        (make_llama, 0.5, "parameters"),
        (make_grouped_qwen2, 0.57, "decoder_parameters"),
        (make_llama, 0.57, "parameters"),
    ],
)
def test_budget_is_met_within_half_a_channel_by_whole_groups(make, share, unit):
    model = make()
    view = WidthView(model)
    dense = count_parameters(model)
    num_remove = round(share * sum(map(count_parameters, model.model.layers)))
    plan = METHOD.plan(make_context(model, num_remove, unit=unit, protected=(3,), first_layer=0))
    whole = view.whole()
    for layer in range(4):
        widths, kv_heads = plan.layers[layer], plan.kv_heads(layer)
        assert widths.heads == view.shape.heads_of(kv_heads)
        assert (widths == whole.layers[layer]) == (layer == 3 or num_remove == 0)
    assert len({len(plan.kv_heads(i)) for i in (0, 1, 2)}) == 1
    counts = [len(plan.layers[i].channels) for i in (0, 1, 2)]
    assert max(counts) - min(counts) <= 1
    removed = dense - count_parameters(prune_width_(model, plan))
    assert abs(removed - num_remove) <= view.unit_parameters()["channel"] / 2
    assert plan.evidence["removed"] == removed


def test_remaining_channels_are_taken_where_the_next_is_least_salient():
    model = make_llama()
    scores = TaylorSalience(WidthView(model), "param_first").measure([1, 2, 3], *batches())
    # 10 channels of layers 1 to 3: three each, and one more; the next channel is the fourth lowest.
    plan = METHOD.plan(make_context(model, 480))
    fourth = [sorted(one.channels_C.tolist())[3] for one in scores]
    assert plan.evidence["removed_channels"] == [3 + (x == min(fourth)) for x in fourth]
    for layer, one in zip((1, 2, 3), scores, strict=True):
        gone = set(range(32)) - set(plan.layers[layer].channels)
        assert max(one.channels_C[list(gone)]) < min(one.channels_C[list(plan.layers[layer].channels)])


@pytest.mark.parametrize(
    "num_layers, first, last",
    [(32, 4, 29), (40, 5, 36), (16, 2, 14), (8, 1, 6), (6, 1, 5), (4, 1, 3), (2, 0, 1)],
)
def test_the_first_eighth_and_last_sixteenth_are_not_pruned(num_layers, first, last):
    assert layers_to_prune(num_layers, LLMPrunerOptions()) == list(range(first, last + 1))


def test_range_and_protected_layers():
    assert layers_to_prune(8, LLMPrunerOptions(first_layer=0, last_layer=7), (0, 5)) == [1, 2, 3, 4, 6, 7]
    with pytest.raises(PlanError, match="0 to 7"):
        layers_to_prune(8, LLMPrunerOptions(last_layer=8))
    with pytest.raises(PlanError, match="first_layer"):
        layers_to_prune(8, LLMPrunerOptions(first_layer=5, last_layer=4))
    with pytest.raises(PlanError, match="first_layer"):
        layers_to_prune(4, LLMPrunerOptions(), (1, 2, 3))


# --- as a method --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taylor", ["param_first", "param_second", "param_mix"])
def test_plans_are_deterministic_and_survive_saving(taylor, tmp_path):
    plans = [METHOD.plan(make_context(make_llama(), taylor=taylor)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert json.loads(json.dumps(plans[0].evidence)) == plans[0].evidence
    assert plans[0].evidence["num_layers"] == 4 and plans[0].method == "llm_pruner"
    assert WidthPlan.load(plans[0].save(tmp_path / "plan.json")) == plans[0]


def test_options_limit_samples_and_tokens():
    model = make_llama()
    few = METHOD.plan(make_context(model, num_samples=2, max_tokens=3))
    assert (few.evidence["samples"], few.evidence["tokens"]) == (2, 6)
    changed = [{**s, "labels": [-100] * len(s["labels"])} for s in SAMPLES[:2]]
    changed[0]["input_ids"] = [*SAMPLES[0]["input_ids"][:3], 5, 5]
    assert METHOD.plan(make_context(model, samples=changed, max_tokens=3)).layers == few.layers
    assert METHOD.plan(make_context(model, num_samples=50)).evidence["samples"] == 6


@pytest.mark.parametrize(
    ("taylor", "layers_at_once"),
    [("param_first", 1), ("param_second", 2), ("param_mix", 1), ("param_mix", 2)],
)
def test_no_more_than_one_gradient_is_ever_held(taylor, layers_at_once, monkeypatch):
    model = make_llama()
    held, squares, seen = [], [], set()
    add, add_squares = TaylorSalience._add, TaylorSalience._add_squares

    def note(weight, layer):
        held.append(sum(p.grad is not None for p in model.parameters()))
        seen.add((layer, id(weight)))

    def watched_add(self, weight, layer, *args, **kwargs):
        note(weight, layer)
        add(self, weight, layer, *args, **kwargs)

    def watched_squares(self, weight, layer, *args, **kwargs):
        note(weight, layer)
        add_squares(self, weight, layer, *args, **kwargs)
        squares.append(len(self._squares))

    monkeypatch.setattr(TaylorSalience, "_add", watched_add)
    monkeypatch.setattr(TaylorSalience, "_add_squares", watched_squares)
    METHOD.plan(make_context(model, taylor=taylor, layers_at_once=layers_at_once))
    assert set(held) == {1} and len(seen) == 3 * 7
    assert max(squares, default=0) == (7 * layers_at_once if taylor == "param_mix" else 0)


@pytest.mark.parametrize(
    ("taylor", "breaks"),
    [("param_first", True), ("param_second", False), ("param_mix", False), ("param_mix", True)],
)
def test_the_model_is_not_changed(taylor, breaks, monkeypatch):
    model, other = make_llama(), make_llama()
    model.requires_grad_(False)
    norm, down = model.model.norm.weight, model.model.layers[2].mlp.down_proj.weight
    norm.requires_grad_(True)
    down.requires_grad_(True)
    down.grad = torch.ones_like(down)
    context = make_context(model, taylor=taylor)
    if breaks:
        monkeypatch.setattr("gradpruner.methods.taylor.row_blocks", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            METHOD.plan(context)
    else:
        METHOD.plan(context)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert [p is norm or p is down for p in model.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert [p is down for p in model.parameters()] == [p.grad is not None for p in model.parameters()]
    assert torch.equal(down.grad, torch.ones_like(down))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not model.training


def test_half_precision_weights_choose_almost_the_same_units():
    full = METHOD.plan(make_context(make_llama(), 3000))
    half = METHOD.plan(make_context(make_llama().bfloat16(), 3000))
    assert full.layers[1].heads == half.layers[1].heads
    assert (
        len(set(full.layers[1].channels) & set(half.layers[1].channels)) >= len(full.layers[1].channels) - 1
    )


@pytest.mark.parametrize(
    "error, message, changes",
    [
        (ConfigError, "num_remove", {"num_remove": None}),
        (PlanError, "num_remove is -1", {"num_remove": -1}),
        (PlanError, "can lose at most", {"num_remove": 7000}),
        (PlanError, "last_layer", {"protected": (1, 2, 3)}),
        (DataError, "there are none", {"samples": []}),
        (DataError, "two tokens", {"samples": [{"input_ids": [5], "labels": [5]}]}),
    ],
)
def test_impossible_requests_are_refused(error, message, changes):
    with pytest.raises(error, match=message):
        METHOD.plan(make_context(make_llama(), **changes))


@pytest.mark.parametrize(
    "options", [{"taylor": "third"}, {"num_samples": 0}, {"max_tokens": 1}, {"tayler": 1}]
)
def test_options_are_checked(options):
    with pytest.raises(ConfigError, match=r"methods\.llm_pruner\."):
        METHOD.read_options("llm_pruner", options)


def test_models_without_heads_and_channels_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    with pytest.raises(ModelError, match="cannot be told apart"):
        METHOD.plan(make_context(gpt2))


def test_nan_gradients_are_refused():
    model = make_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        METHOD.plan(make_context(model))
