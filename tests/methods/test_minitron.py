"""Minitron: measurements, choice of widths, and the recovery that both methods share."""

import dataclasses
import json
import math
from itertools import islice

import pytest
import torch
from builders import make_llama, make_samples
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from gradpruner.common.errors import ConfigError, DataError, ModelError, NonFiniteError, PlanError
from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.calibration import calibration_batches
from gradpruner.methods.minitron_depth import MinitronOptions
from gradpruner.methods.minitron_width import (
    ChannelStatistics,
    MinitronWidthOptions,
    _grid,
    _plan_of,
    candidates,
    channel_statistics,
)
from gradpruner.models.layers import skeleton
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.selection import plan_pruning
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.pruning.in_memory import prune_
from gradpruner.training.answer_loss import mean_nll
from gradpruner.training.options import FinetuneOptions

SAMPLES = make_samples(6)
WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "head_dim": 4}
DENSE = {"ffn": 64, "hidden": 32, "heads": 4}
DEPTH, WIDTH = METHODS.find("minitron_depth"), METHODS.find("minitron_width")


def make_gemma(seed=0):
    """Returns a model with four norms in every layer, and one for the heads."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return Gemma3ForCausalLM(config).eval()


def context_of(model, samples=SAMPLES, **changes):
    return MethodContext(
        num_layers=WidthView(model).shape.num_layers,
        seed=0,
        trace=lambda: pytest.fail("no trace is needed"),
        model=lambda: model,
        samples=samples,
        collator=Collator(),
        **{"finetune": FinetuneOptions(batch_size=4, accumulation=1, device="cpu")} | changes,
    )


def width_plan(model, num_remove, samples=SAMPLES, unit="parameters", **options):
    chosen = WIDTH.read_options("minitron_width", options)
    return WIDTH.plan(context_of(model, samples, num_remove=num_remove, unit=unit, options=chosen))


def measured(model, samples=SAMPLES):
    view = WidthView(model)
    context = context_of(model, samples)
    return channel_statistics(view, calibration_batches(context, model))


# --- statistics ---------------------------------------------------------------------------------------------


def naive_activations(model, sample):
    """Returns a sample's outputs of norms and inputs of o_proj and down_proj, (tokens, entries) each."""
    seen = {}

    def remember(name, place):
        def hook(_module, args, out):
            seen[name] = (args[0], out)[place][0]

        return hook

    named = [(name, m) for name, m in model.named_modules() if ".layers." in name]
    hooks = [m.register_forward_hook(remember(n, 0)) for n, m in named if n.endswith("o_proj")]
    hooks += [m.register_forward_hook(remember(n, 1)) for n, m in named if n.endswith("layernorm")]
    with torch.no_grad():
        model(input_ids=torch.tensor([sample["input_ids"]]))
        for number, layer in enumerate(model.model.layers):
            gemma = hasattr(layer, "pre_feedforward_layernorm")
            norm = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
            x = seen[f"model.layers.{number}.{norm}"]
            seen[f"channels.{number}"] = layer.mlp.act_fn(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    for hook in hooks:
        hook.remove()
    return seen


def naive_statistics(model, samples):
    """Computes the statistics sample by sample, number by number."""
    shape, squares = WidthView(model).shape, {}
    for sample in samples:
        for name, state in naive_activations(model, sample).items():
            tokens = state.tolist()
            sums = squares.setdefault(name, [0.0] * len(tokens[0]))
            for j in range(len(sums)):
                sums[j] += (sum(abs(token[j]) for token in tokens) / len(tokens)) ** 2
    sizes = {name: [math.sqrt(x) for x in sums] for name, sums in squares.items()}
    heads = []
    for layer in range(shape.num_layers):
        entries = iter(sizes[f"model.layers.{layer}.self_attn.o_proj"])
        heads.append([math.hypot(*islice(entries, shape.head_dim)) for _ in range(shape.num_heads)])
    channels = [sizes[f"channels.{layer}"] for layer in range(shape.num_layers)]
    norms = [values for name, values in sizes.items() if name.endswith("layernorm")]
    return channels, heads, [sum(column) for column in zip(*norms, strict=True)], len(norms)


@pytest.mark.parametrize(("make", "num_norms"), [(make_llama, 4 * 2), (make_gemma, 2 * 4)])
def test_statistics_equal_a_naive_loop(make, num_norms):
    model = make()
    channels, heads, hidden, counted = naive_statistics(model, SAMPLES)
    assert counted == num_norms
    found = measured(model)
    assert torch.allclose(found.channels_LF, torch.tensor(channels), rtol=1e-4)
    assert torch.allclose(found.heads_LQ, torch.tensor(heads), rtol=1e-4)
    assert torch.allclose(found.hidden_H, torch.tensor(hidden), rtol=1e-4)
    assert found.samples == len(SAMPLES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_padding_does_not_matter():
    model = make_llama()
    long = {"input_ids": [1, *range(4, 18)], "labels": [IGNORED] * 13 + [16, 17]}
    alone, beside = measured(model, SAMPLES[:1]), measured(model, [SAMPLES[0], long])
    other = measured(model, [long])
    for name in ("channels_LF", "heads_LQ"):
        together = (getattr(alone, name) ** 2 + getattr(other, name) ** 2).sqrt()
        assert torch.allclose(getattr(beside, name), together, rtol=1e-5)


def test_activations_of_16_bits_are_summed_in_32():
    found = measured(make_llama().to(torch.bfloat16))
    assert found.channels_LF.dtype == found.heads_LQ.dtype == found.hidden_H.dtype == torch.float32
    assert torch.allclose(found.channels_LF, measured(make_llama()).channels_LF, rtol=0.05, atol=0.01)


def test_the_largest_units_stay_and_heads_are_ranked_in_their_group():
    view = WidthView(make_llama())
    heads = torch.tensor([[9.0, 8.0, 1.0, 2.0]] * 3 + [[1.0, 1.0, 5.0, 4.0]])
    channels = torch.arange(32.0).repeat(4, 1)
    channels[2] = -channels[2]
    hidden = torch.tensor([3.0, 0.0] * 8)
    found = ChannelStatistics(channels, heads, hidden, 1)
    plan = _plan_of(view, found, {"ffn": 3, "heads": 1, "hidden": 8})
    assert [widths.heads for widths in plan.layers] == [(0, 3), (0, 3), (0, 3), (0, 2)]
    assert [widths.channels for widths in plan.layers] == [(29, 30, 31)] * 2 + [(0, 1, 2), (29, 30, 31)]
    assert plan.hidden == tuple(range(0, 16, 2)) and plan.uniform


# --- budget -------------------------------------------------------------------------------------------------


def test_grids_of_a_model_of_8_billion_and_of_a_small_one():
    assert _grid("hidden", 4096, 0.4) == [2560, 2816, 3072, 3328, 3584, 3840, 4096]
    assert _grid("ffn", 14336, 0.4) == [*range(8704, 14336, 512), 14336]
    assert _grid("heads", 4, 0.4) == [3, 4]
    assert _grid("heads", 1, 0.4) == [1]
    assert _grid("hidden", 64, 0.4) == [40, 44, 48, 52, 56, 60, 64]  # a sixteenth
    assert _grid("ffn", 172, 0.4) == [*range(104, 172, 8), 172]
    assert _grid("ffn", 10, 0.4) == [6, 7, 8, 9, 10]


@pytest.mark.parametrize(
    # apart: distance of allowed widths on the axis that meets the budget
    ("axes", "apart", "unit", "share"),
    [
        (["ffn"], 1, "parameters", 0.03),
        (["ffn"], 1, "decoder_parameters", 0.08),
        (["hidden"], 8, "parameters", 0.08),
        (["hidden"], 8, "decoder_parameters", 0.0),
        (["ffn", "heads"], 1, "parameters", 0.0),
        (["ffn", "heads"], 1, "decoder_parameters", 0.03),
        (["hidden", "heads", "ffn"], 1, "parameters", 0.08),
        (["hidden", "heads", "ffn"], 1, "decoder_parameters", 0.03),
    ],
)
def test_every_candidate_meets_the_budget_within_one_unit(axes, apart, unit, share):
    view = WidthView(make_llama(**WIDE))
    dense = view.parameters(view.whole(), unit)
    wanted = round(share * dense)
    found = candidates(view, MinitronWidthOptions(axes=axes, top_k=50), wanted, unit)
    fine = "ffn" if "ffn" in axes else "hidden"
    assert found
    for size in found:
        removed = dense - parameters(view, size, unit)
        one_unit = parameters(view, size, unit) - parameters(view, {**size, fine: size[fine] - 1}, unit)
        assert abs(removed - wanted) <= one_unit * apart / 2
        assert size["heads"] >= 3 and size["ffn"] >= 39 and size["hidden"] >= 20
        assert size["hidden"] % (2 * size["heads"]) == 0  # or transformers could not load it
        assert {axis for axis in size if size[axis] < DENSE[axis]} <= set(axes)
    if share == 0:
        assert found[0] == DENSE


def parameters(view, size, unit="parameters"):
    return view.parameters_of([(2 * size["heads"], 2, size["ffn"])] * 4, size["hidden"], unit)


def test_only_widths_that_a_config_allows_are_used():
    llama, gemma = WidthView(make_llama(**WIDE)), WidthView(make_gemma())
    for view in (llama, gemma):
        assert view.config_takes(24, 6, 2) and not view.config_takes(32, 6, 2)
    config = llama.layered.config
    assert (config.hidden_size, config.num_attention_heads) == (32, 8)
    qwen = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "qwen3", hidden_size=32, intermediate_size=8, num_hidden_layers=1, num_attention_heads=8,
            num_key_value_heads=2, head_dim=4, vocab_size=23,
        )
    )  # fmt: skip
    assert WidthView(qwen).config_takes(32, 6, 2)


def test_heads_alone_meet_a_budget_if_the_config_allows_it():
    model = make_llama(**WIDE | {"hidden_size": 24})  # a multiple of 8 heads and of 6
    view = WidthView(model)
    one_head = 4 * 2 * view.unit_parameters()["head"]
    options = MinitronWidthOptions(axes=["heads"])
    three, four = ({"ffn": 64, "hidden": 24, "heads": n} for n in (3, 4))
    assert candidates(view, options, one_head, "parameters") == [three]
    assert candidates(view, options, int(0.6 * one_head), "parameters") == [three]
    assert candidates(view, options, int(0.4 * one_head), "parameters") == [four]
    with pytest.raises(PlanError, match=rf"40% of heads removes 0 to {one_head:,}"):
        candidates(view, options, 2 * one_head, "parameters")


def test_candidates_near_the_budget_on_the_grid_come_first():
    view = WidthView(make_llama(**WIDE))
    # Exactly the parameters that the grid removes with a fourth of the hidden dimensions.
    num_remove = parameters(view, DENSE) - parameters(view, DENSE | {"hidden": 24})
    found = candidates(view, MinitronWidthOptions(top_k=3), num_remove, "parameters")
    assert found[0] == DENSE | {"hidden": 24} and len(found) == 3


def test_a_budget_out_of_reach_is_refused_with_what_can_be_removed():
    view = WidthView(make_llama(**WIDE))
    dense = view.parameters(view.whole())
    least = {"ffn": 39, "heads": 3, "hidden": 24}  # 20 is in reach too, but not a multiple of 6 or 8 heads
    most = dense - parameters(view, least)
    assert candidates(view, MinitronWidthOptions(), most, "parameters") == [least]
    wanted = int(0.6 * dense)
    with pytest.raises(PlanError, match=f"at most 40% of ffn, heads, hidden removes 0 to {most:,}") as error:
        candidates(view, MinitronWidthOptions(), wanted, "parameters")
    share = float(str(error.value).partition("max_prune to ")[2].partition(",")[0])
    assert candidates(view, MinitronWidthOptions(max_prune=share), wanted, "parameters")
    with pytest.raises(PlanError, match="Prune more axes"):
        candidates(view, MinitronWidthOptions(axes=["heads"]), wanted, "parameters")


# --- the plan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: make_llama(**WIDE), make_gemma])
def test_the_pruned_model_is_plain_and_has_the_size_asked_for(make, tmp_path):
    model = make()
    dense = count_parameters(model)
    num_remove = dense // 4
    plan = width_plan(model, num_remove)
    assert plan.uniform and plan.method == "minitron_width"
    assert WidthPlan.load(plan.save(tmp_path / "plan.json")) == plan
    pruned = prune_width_(model, plan)
    removed = dense - count_parameters(pruned)
    shape = plan.shape
    assert plan.evidence["removed"] == removed
    assert abs(removed - num_remove) <= shape.num_layers * 3 * shape.hidden_size // 2
    assert plan.widths.num_kv_heads == shape.num_kv_heads
    assert WidthView(skeleton(type(model), make().config)).savings(plan)["parameters"] == {
        "before": dense,
        "after": dense - removed,
    }
    pruned.save_pretrained(tmp_path / "model")
    ids = torch.tensor([SAMPLES[0]["input_ids"]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, pruned(input_ids=ids).logits)


def test_the_candidate_with_the_likeliest_answers_wins():
    model = make_llama(**WIDE)
    num_remove = count_parameters(model) // 5
    plan = width_plan(model, num_remove, top_k=4)
    tried = plan.evidence["candidates"]
    assert len(tried) == 2  # all combinations: 30 hidden dimensions with 3 heads per group, or 32 with 4
    found, context = measured(model), context_of(model)
    for entry in tried:  # each really pruned, on another copy of the model
        copy = make_llama(**WIDE)
        size = {axis: entry[axis] for axis in ("ffn", "heads", "hidden")}
        pruned = prune_width_(copy, _plan_of(WidthView(copy), found, size))
        batches = calibration_batches(context, copy)
        assert entry["nll"] == pytest.approx(mean_nll(pruned, batches, ""), rel=1e-5)
    best = min(tried, key=lambda entry: entry["nll"])
    assert len(plan.layers[0].channels) == best["ffn"] and len(plan.hidden) == best["hidden"]
    assert len(plan.layers[0].heads) == 2 * best["heads"]
    first = width_plan(model, num_remove, top_k=1)
    assert first.evidence["candidates"] == [{**tried[0], "nll": None}]


def test_plans_are_deterministic_and_the_model_is_not_changed():
    model = make_llama(**WIDE)
    config = model.config.to_dict()
    one, other = (width_plan(model, count_parameters(model) // 5) for _ in range(2))
    assert one == other and json.loads(json.dumps(one.evidence)) == one.evidence
    assert one.evidence["num_layers"] == 4 and one.evidence["model"].startswith("llama-4x32-")
    same = make_llama(**WIDE)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert model.config.to_dict() == config and model.model.layers[0].mlp.down_proj.in_features == 64
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_impossible_plans_are_refused():
    model = make_llama(**WIDE)
    unlearned = [{**sample, "labels": [IGNORED] * len(sample["labels"])} for sample in SAMPLES]
    with pytest.raises(DataError, match="the samples have none"):
        width_plan(model, 5000, samples=unlearned)
    broken = make_llama(**WIDE)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="Activations"):
        width_plan(broken, 5000)
    linear = model.model.layers[2].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"stored as torch\.uint8"):
        width_plan(model, 5000)


def test_norms_without_weights_are_refused_if_hidden_dimensions_are_pruned():
    from transformers import OlmoConfig, OlmoForCausalLM

    config = OlmoConfig(
        vocab_size=23, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = OlmoForCausalLM(config).eval()
    with pytest.raises(ModelError, match=r"norms of a 'olmo' model have no weights.*\[ffn, heads\]"):
        width_plan(model, 500)
    assert width_plan(model, 500, axes=["ffn", "heads"]).hidden == tuple(range(16))


@pytest.mark.parametrize(
    "raw",
    [{"axes": []}, {"axes": ["depth"]}, {"max_prune": 1.0}, {"top_k": 0}, {"distil_steps": 0}, {"steps": 3}],
)
def test_options_are_checked(raw):
    with pytest.raises(ConfigError, match=rf"methods\.minitron_width\.{next(iter(raw))}"):
        WIDTH.read_options("minitron_width", raw)


# --- depth and recovery -------------------------------------------------------------------------------------


def test_depth_scores_equal_those_of_shortgpt():
    context = context_of(make_llama(), options=MinitronOptions(calibration_samples=3))
    few = context_of(make_llama(), SAMPLES[:3])
    scores = DEPTH.score(context)
    assert scores.method == "minitron_depth" and scores.evidence["samples"] == 3
    assert scores.values == METHODS.find("shortgpt").score(few).values


@pytest.mark.parametrize("method", [DEPTH, WIDTH])
def test_a_pruned_model_is_recovered_by_distillation(method):
    dense = make_llama(**WIDE)
    options = method.options(distil_steps=6, distil_learning_rate=3e-3)
    finetune = FinetuneOptions(
        batch_size=4, accumulation=1, device="cpu", learning_rate=1.0, mode="lora", epochs=9
    )
    context = context_of(dense, options=options, num_remove=5000, finetune=finetune)
    context = dataclasses.replace(context, model=lambda: make_llama(**WIDE))
    if method is DEPTH:
        pruned = prune_(dense, plan_pruning(method.score(context), num_prune=1, num_merge=0))
    else:
        pruned = prune_width_(dense, method.plan(context))
    found = method.recover(context, pruned)
    losses = [entry["loss"] for entry in found["losses"]]
    assert found["steps"] == 6 and losses[-1] < losses[0]
    assert json.loads(json.dumps(found)) == found
    assert max(entry["learning_rate"] for entry in found["losses"]) <= 3e-3


def test_recovery_can_be_left_out_and_takes_one_pass_by_default():
    model, context = make_llama(num_hidden_layers=2), context_of(make_llama())
    before = [p.clone() for p in model.parameters()]
    assert DEPTH.recover(dataclasses.replace(context, options=MinitronOptions(distil=False)), model) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert DEPTH.recover(context, model)["steps"] == 2  # six samples, four per step
