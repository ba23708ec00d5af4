import copy
from dataclasses import replace

import pytest
import torch
from builders import make_samples
from transformers import AutoModelForCausalLM

from gradpruner.common.errors import IntegrityError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.gradients.trace import GradientTrace, factor_file
from gradpruner.models.layers import LayeredModel
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.merging import Source, merge_linear
from gradpruner.plans.options import RepairOptions
from gradpruner.pruning.in_memory import as_pruned, prune_
from gradpruner.pruning.repair.refitting import fit_repair

IDS = torch.arange(3, 27).reshape(2, 12)  # longer than the sliding window of 4
KEEP, DROP = LayerAction("keep"), LayerAction("drop")
DROPPING = PruningPlan((KEEP, DROP, KEEP, KEEP, DROP, KEEP))
MERGING = PruningPlan((KEEP, DROP, KEEP, LayerAction("merge", 2), LayerAction("merge", 2), KEEP))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def make_identity(model, layers):
    """Makes layers pass their input on, without removing them."""
    for layer in layers:
        module = model.model.layers[layer]
        module.forward = lambda hidden_states, *args, **kwargs: hidden_states


# --- every family -------------------------------------------------------------------------------------------


def test_dropping_is_making_the_layers_identity(tiny_model, family_name):
    model = tiny_model(family_name)
    reference = copy.deepcopy(model)
    make_identity(reference, DROPPING.pruned)
    assert prune_(model, DROPPING) is model
    assert torch.equal(logits(model), logits(reference))


def test_everything_that_numbers_layers_is_rewritten(tiny_model, family_name):
    model = tiny_model(family_name)
    types = getattr(model.config, "layer_types", None)
    if family_name not in ("llama", "mistral"):
        assert len(set(types)) == 2  # the case that can go wrong
    prune_(model, DROPPING)
    numbered = [
        (index, module.layer_idx)
        for index, layer in enumerate(model.model.layers)
        for module in layer.modules()
        if hasattr(module, "layer_idx")
    ]
    assert len(numbered) >= 4 and all(index == own for index, own in numbered)
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    assert getattr(model.config, "layer_types", None) == (types and [types[i] for i in DROPPING.keep])


def test_as_pruned_computes_what_the_pruned_model_does_and_leaves_the_model(tiny_model, family_name):
    model, pruned = tiny_model(family_name), prune_(tiny_model(family_name), DROPPING)
    before, whole = state(model), logits(model)
    with as_pruned(model, DROPPING):
        torch.testing.assert_close(logits(model), logits(pruned))
    assert same_state(model, before) and torch.equal(logits(model), whole)


def test_as_pruned_leaves_a_layers_own_forward_and_its_mode(tiny_llama):
    model = tiny_llama().train()
    layer = model.model.layers[DROPPING.pruned[0]].eval()
    layer.forward = own = layer.forward  # as accelerate's hooks do
    with as_pruned(model, DROPPING):
        assert layer.forward is not own
    assert layer.forward is own
    fit_repair(model, DROPPING, make_samples(12), Collator())
    assert layer.forward is own and model.training and not layer.training


def test_as_pruned_sets_and_takes_back_repaired_weights(tiny_llama):
    repair = fit_repair(tiny_llama(), DROPPING, make_samples(12), Collator(), RepairOptions(kind="linear"))
    model, pruned = tiny_llama(), prune_(tiny_llama(), DROPPING, repair=repair)
    before, whole = state(model), logits(model)
    with pytest.raises(ZeroDivisionError), as_pruned(model, DROPPING, repair):
        torch.testing.assert_close(logits(model), logits(pruned))
        raise ZeroDivisionError
    assert same_state(model, before) and torch.equal(logits(model), whole)
    with pytest.raises(PlanError, match="merged"), as_pruned(model, MERGING):
        pass
    other = PruningPlan.from_keep(6, (0, 1, 2, 3))
    with pytest.raises(PlanError, match="fitted for"), as_pruned(model, other, repair):
        pass
    assert same_state(model, before)


def test_generating_with_a_cache_is_generating_without(tiny_model, family_name):
    model = prune_(tiny_model(family_name), DROPPING)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    with_cache = model.generate(IDS, use_cache=True, **options)
    assert with_cache.shape[1] > IDS.shape[1]
    assert torch.equal(with_cache, model.generate(IDS, use_cache=False, **options))


def test_saved_and_loaded_gives_the_same_logits(tiny_model, tiny_trace, family_name, tmp_path):
    model = tiny_model(family_name)
    prune_(model, MERGING, tiny_trace(model))
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.num_hidden_layers == len(MERGING.keep) == 3
    assert getattr(loaded.config, "layer_types", None) == getattr(model.config, "layer_types", None)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tiny_model, model_type, tied, tmp_path):
    model = prune_(tiny_model(model_type, tie_word_embeddings=tied), DROPPING)
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (one.lm_head.weight is one.model.embed_tokens.weight) is tied


def test_max_window_layers_is_recounted(tiny_model):
    model = prune_(tiny_model("qwen2"), DROPPING)  # layers 0, 1, 2 of 6 have full attention
    assert model.config.max_window_layers == 2
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


# --- merging ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["sum", "fisher"])
def test_merged_linears_are_what_merge_linear_says(tiny_llama, tiny_trace, rule):
    model = tiny_llama()
    dense, trace = copy.deepcopy(model), tiny_trace(model)
    prune_(model, replace(MERGING, rule=rule, density=0.3), trace)
    before, after = LayeredModel(dense), LayeredModel(model)
    for name, module in after.linears(1).items():  # the kept layer 2
        expected = merge_linear(
            before.linears(2)[name].weight,
            [Source(before.linears(layer)[name].weight, trace.factors(layer, name)) for layer in (3, 4)],
            rule=rule,
            density=0.3,
            target_factors=trace.factors(2, name),
        )
        assert torch.equal(module.weight, expected)
        assert not torch.equal(module.weight, before.linears(2)[name].weight)


def test_everything_but_the_targets_linears_stays(tiny_model, tiny_trace):
    model = tiny_model("qwen3", attention_bias=True)
    dense = copy.deepcopy(model)
    prune_(model, MERGING, tiny_trace(model))
    for new, old in enumerate(MERGING.keep):
        linears = {f"{name}.weight" for name in LayeredModel(model).linears(new)} if old == 2 else set()
        kept = dense.model.layers[old].state_dict()
        for name, value in model.model.layers[new].state_dict().items():
            assert torch.equal(value, kept[name]) is (name not in linears), name
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype(tiny_llama, tiny_trace, dtype):
    model = tiny_llama().to(dtype)
    prune_(model, MERGING, tiny_trace(model))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_progress_names_every_linear(tiny_llama, tiny_trace):
    model, seen = tiny_llama(), []
    prune_(model, MERGING, tiny_trace(model), seen.append)
    assert len(seen) == 7 and seen[0] == "layer 2 self_attn.q_proj"


def test_a_trace_on_disk_serves_as_well(tiny_llama, tiny_trace, tmp_path):
    one, two = tiny_llama(), tiny_llama()
    prune_(one, MERGING, tiny_trace(one))
    tiny_trace(two, folder=tmp_path)
    prune_(two, MERGING, GradientTrace.load(tmp_path))
    assert same_state(one, state(two))


def test_the_recorded_model_itself_can_be_pruned(tiny_llama):
    from gradpruner.training.adapters import attach_lora

    model = tiny_llama()
    attach_lora(model, rank=2).unload()
    assert prune_(model, DROPPING).config.num_hidden_layers == 4


# --- refusals leave the model as it was ---------------------------------------------------------------------


def refused(model, plan, trace, message, error=PlanError):
    before = state(model)
    with pytest.raises(error, match=message):
        prune_(model, plan, trace)
    assert same_state(model, before)
    assert len(LayeredModel(model).layers) == 6


def test_model_with_adapters(tiny_llama):
    from gradpruner.training.adapters import attach_lora

    model = tiny_llama()
    wrapped = attach_lora(model, rank=2)
    for carrier in (wrapped, model):
        refused(
            carrier, DROPPING, None, "carries adapters.*unload\\(\\) first.*merge_and_unload\\(\\) changes"
        )


def test_plan_for_another_depth(tiny_llama):
    refused(tiny_llama(), PruningPlan((KEEP, DROP, KEEP)), None, "3 layers; this one has 6")


def test_plan_from_another_model(tiny_llama):
    refused(
        tiny_llama(),
        replace(DROPPING, evidence={"model": "llama-6x32-abc"}),
        None,
        "was made from.* merging adapters",
    )


def test_merging_needs_a_trace(tiny_llama):
    refused(tiny_llama(), MERGING, None, "merges 2 layers, which needs the recorded gradients")


def test_energies_only_trace(tiny_llama, tiny_trace):
    model = tiny_llama()
    trace = tiny_trace(model, keep_factors=False)
    refused(model, MERGING, trace, "layer energies only")
    prune_(model, DROPPING, trace)  # enough for dropping


def test_trace_of_another_model(tiny_llama, tiny_trace):
    refused(tiny_llama(), MERGING, tiny_trace(tiny_llama(seed=1)), "was recorded on model")


def test_trace_of_another_depth(tiny_llama, tiny_trace):
    refused(tiny_llama(), MERGING, tiny_trace(tiny_llama(num_hidden_layers=5)), "5 layers; this model has 6")


def anonymous(trace):
    return GradientTrace(replace(trace.info, model=""), trace.energies_SK, None, trace._factors)


def test_trace_of_other_shapes(tiny_llama, tiny_trace):
    trace = anonymous(tiny_trace(tiny_llama(intermediate_size=64)))
    refused(tiny_llama(), MERGING, trace, r"'mlp.gate_proj' of layer 3 has shape \(48, 32\).*\(64, 32\)")


def test_trace_of_some_linears_only(tiny_llama, tiny_trace):
    trace = tiny_trace(tiny_llama())
    kept = [k for k, ref in enumerate(trace.info.linears) if ref.name.startswith("self_attn")]
    info = replace(trace.info, linears=tuple(trace.info.linears[k] for k in kept))
    partial = GradientTrace(info, trace.energies_SK[:, kept], None, trace._factors)
    refused(tiny_llama(), MERGING, partial, "no such linear.*or plan with num_merge=0")


def test_any_lora_rank_will_do(tiny_llama, tiny_trace):
    for rank in (1, 20):
        model = tiny_llama()
        before = model.model.layers[2].mlp.up_proj.weight.clone()
        prune_(model, MERGING, tiny_trace(model, rank=rank))
        assert len(LayeredModel(model).layers) == len(MERGING.keep)
        assert not torch.equal(model.model.layers[MERGING.keep.index(2)].mlp.up_proj.weight, before)


def test_trace_whose_files_are_of_another_rank(tiny_llama, tiny_trace, tmp_path):
    model = tiny_llama()
    tiny_trace(model, rank=3, folder=tmp_path / "other")
    tiny_trace(model, rank=2, folder=tmp_path / "trace")
    factor_file(tmp_path / "other", 3).rename(factor_file(tmp_path / "trace", 3))
    refused(model, MERGING, GradientTrace.load(tmp_path / "trace"), "step-00004", IntegrityError)


def test_damaged_trace_is_found_before_the_first_weight_changes(tiny_llama, tiny_trace, tmp_path):
    model = tiny_llama()
    trace = tiny_trace(model, folder=tmp_path)
    path = factor_file(tmp_path, 3)
    path.write_bytes(path.read_bytes()[:-50])
    refused(model, MERGING, trace, "step-00004", IntegrityError)


def test_layers_of_different_linears_are_not_merged(tiny_llama, tiny_trace):
    model = tiny_llama()
    trace = tiny_trace(model)
    model.model.layers[3].mlp.extra = torch.nn.Linear(2, 2)
    trace = anonymous(trace)
    refused(model, MERGING, trace, "Layers 3 and 2 do not have the same linears")
