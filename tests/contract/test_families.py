"""What every row of the table of families promises, shown on a model of that type."""

import copy
import json
import shutil

import pytest
import torch
from conftest import make_trace
from families import (
    COMMON,
    KEEP,
    OPTIONS,
    SEEING,
    SPECIAL_KEEP,
    make_config,
    make_family_model,
    make_seeing_model,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradpruner.common.errors import IntegrityError, ModelError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.models.config_patch import check_keep, family_slots, required_layers, text_config
from gradpruner.models.families import FAMILIES
from gradpruner.models.layers import LayeredModel, fingerprint
from gradpruner.models.proof import relative_error
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.on_disk import prune_checkpoint

LAYERS = COMMON["num_hidden_layers"]
IDS = torch.arange(8, 32).reshape(2, 12)  # longer than the sliding window of 4
VARIED = ("qwen2", "gemma3_text", "gpt2")


@pytest.fixture(params=sorted(FAMILIES))
def model_type(request):
    return request.param


def merging_plan(view, keep):
    """Every pruned layer goes into the kept layer before it where the two have the same linears."""
    shapes = [{name: weight.shape for name, weight in view.weights(i).items()} for i in range(LAYERS)]
    actions = []
    for layer in range(LAYERS):
        before = [i for i in keep if i < layer]
        mergeable = not view.family.no_merge and before and shapes[before[-1]] == shapes[layer]
        pruned = LayerAction("merge", before[-1]) if mergeable else LayerAction("drop")
        actions.append(LayerAction("keep") if layer in keep else pruned)
    return PruningPlan(tuple(actions))


def states_equal(one, other):
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def fields(config):
    """What a config says, but for dtypes: loading fills them in."""
    kept = {name: value for name, value in config.items() if name != "dtype"}
    return {name: fields(value) if isinstance(value, dict) else value for name, value in kept.items()}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def test_every_row_has_a_test_model():
    assert set(FAMILIES) == set(OPTIONS)
    assert len(FAMILIES) >= 35


def test_the_layers_of_a_row_differ_where_they_can():
    for model_type in sorted(set(FAMILIES) - {"ministral", "mixtral", "phimoe"}):
        config = text_config(make_config(model_type))
        if getattr(config, "layer_types", None) is not None and getattr(config, "sliding_window", None):
            assert len(set(config.layer_types)) > 1, (
                f"{model_type}: a model of equal layers cannot show that they are told apart"
            )


def test_memory_and_disk_agree_to_the_bit_and_with_the_source(model_type, tmp_path):
    model = make_family_model(model_type)
    view = LayeredModel(model)
    keep = SPECIAL_KEEP.get(model_type, KEEP)
    check_dropping(copy.deepcopy(model), PruningPlan.from_keep(LAYERS, keep))
    plan = merging_plan(view, keep)
    trace = make_trace(model) if plan.merged else None
    model.save_pretrained(tmp_path / "source", max_shard_size="60KB")
    # A linear that is stored under another name cannot be sampled; there is no fingerprint then.
    expected = "" if model_type == "phimoe" else fingerprint(model)
    assert Blueprint(tmp_path / "source", plan, trace).fingerprint == expected
    report = prune_checkpoint(
        tmp_path / "source", tmp_path / "pruned", plan, trace, verify="full", max_shard_bytes=50_000
    )
    assert report.passed and report.level == "full"
    assert {check.name for check in report.checks if check.passed} >= {"tensors", "logits", "generation"}

    prune_(model, plan, trace)
    loaded = type(model).from_pretrained(tmp_path / "pruned", dtype=torch.float32)
    assert states_equal(loaded, model)
    assert fields(loaded.config.to_diff_dict()) == fields(model.config.to_diff_dict())
    assert relative_error(logits(loaded), logits(model)) < 1e-6  # experts are batched in no fixed order


def check_dropping(model, plan):
    """Layers that are dropped in memory are layers passed through, with and without a cache."""
    view = LayeredModel(model)
    dense = logits(model)
    with view.passed_through(plan.pruned):
        expected = logits(model)
    assert torch.equal(logits(model), dense)
    assert torch.equal(logits(prune_(model, plan)), expected)
    assert not torch.allclose(expected, dense, rtol=0.02)
    ones = torch.ones_like(IDS)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "attention_mask": ones}
    cached = model.generate(IDS, use_cache=True, **options)
    assert torch.equal(cached, model.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("model_type", [name for name, row in sorted(FAMILIES.items()) if row.no_merge])
def test_merging_experts_is_refused_before_anything_changes(model_type):
    model = make_family_model(model_type)
    keep = SPECIAL_KEEP.get(model_type, KEEP)
    actions = [LayerAction("keep" if i in keep else "drop") for i in range(LAYERS)]
    actions[next(i for i in range(LAYERS) if i not in keep)] = LayerAction("merge", keep[0])
    with pytest.raises(PlanError, match="can only be dropped"):
        prune_(model, PruningPlan(tuple(actions)))
    assert len(LayeredModel(model).layers) == LAYERS


@pytest.mark.parametrize("model_type", VARIED)
@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_layers_may_go(model_type, tmp_path_factory, data):
    keep = sorted(data.draw(st.sets(st.integers(0, LAYERS - 1), min_size=2, max_size=LAYERS - 1)))
    model = make_family_model(model_type, seed=data.draw(st.integers(0, 3)))
    plan = merging_plan(LayeredModel(model), keep)
    trace = make_trace(model) if plan.merged else None
    folder = tmp_path_factory.mktemp("any")
    model.save_pretrained(folder / "source")
    assert prune_checkpoint(folder / "source", folder / "pruned", plan, trace, verify="full").passed
    prune_(model, plan, trace)
    assert states_equal(type(model).from_pretrained(folder / "pruned", dtype=torch.float32), model)
    shutil.rmtree(folder)


@pytest.mark.parametrize("model_type", sorted(SEEING))
def test_the_decoder_of_a_model_that_sees(model_type, tmp_path):
    model = make_seeing_model(model_type)
    view = LayeredModel(model)
    assert view.family.nested == "text_config" and view.num_layers == LAYERS
    plan = merging_plan(view, KEEP)
    trace = make_trace(model)
    model.save_pretrained(tmp_path / "source")
    report = prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan, trace, verify="full")
    assert report.passed and plan.merged
    before = json.loads((tmp_path / "source" / "config.json").read_text())
    after = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert after["vision_config"] == before["vision_config"]
    assert after["text_config"]["num_hidden_layers"] == len(KEEP)
    prune_(model, plan, trace)
    assert states_equal(type(model).from_pretrained(tmp_path / "pruned", dtype=torch.float32), model)


# -- what some rows cannot ---------------------------------------------------------------------------------


def plan_of(keep):
    return PruningPlan.from_keep(LAYERS, keep)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_whose_keys_are_reused_must_stay(model_type):
    config = text_config(make_config(model_type))
    assert required_layers(config, FAMILIES[model_type]) == (6, 7)
    with pytest.raises(PlanError, match="Layers 7 must stay"):
        check_keep(config, FAMILIES[model_type], plan_of((0, 1, 6, 9, 11)))
    check_keep(config, FAMILIES[model_type], plan_of((0, 1, 2, 3)))  # nobody is left to reuse them
    scores = LayerScores("m", tuple(float(abs(i - 7)) for i in range(LAYERS)))
    plan = plan_pruning(
        scores,
        num_prune=4,
        num_merge=0,
        protect=required_layers(config, FAMILIES[model_type]),
        fits=family_slots(config, FAMILIES[model_type]),
    )
    assert {6, 7} <= set(plan.keep)
    check_keep(config, FAMILIES[model_type], plan)


def test_gemma4_must_end_with_full_attention():
    config = text_config(make_config("gemma4_text"))
    with pytest.raises(PlanError, match=r"Layer 10 would be the last.*full_attention"):
        check_keep(config, FAMILIES["gemma4_text"], plan_of((0, 1, 6, 7, 10)))


def test_a_rhythm_without_a_list_is_kept_by_whole_periods():
    config = text_config(make_config("jamba"))
    with pytest.raises(PlanError, match="whole periods: attn_layer_period = 4, expert_layer_period = 2"):
        check_keep(config, FAMILIES["jamba"], plan_of(KEEP))
    scores = LayerScores("m", tuple(map(float, range(LAYERS))))
    plan = plan_pruning(
        scores, num_prune=4, num_merge=0, protect_first=0, fits=family_slots(config, FAMILIES["jamba"])
    )
    assert plan.pruned == (0, 1, 2, 3)
    check_keep(config, FAMILIES["jamba"], plan)


def test_attention_scaled_by_the_layers_number_is_refused(tmp_path):
    model = make_family_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="divided by the layer's number"):
        prune_(model, plan_of(KEEP))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match="divided by the layer's number"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP))
    assert not (tmp_path / "pruned").exists()


def test_a_layer_type_that_vanishes_is_said():
    config = text_config(make_config("qwen3_next"))
    warnings = check_keep(config, FAMILIES["qwen3_next"], plan_of((0, 1, 2, 4)))
    assert any("No layer of type 'full_attention' is left (there were 3)" in text for text in warnings)
    assert not check_keep(config, FAMILIES["qwen3_next"], plan_of(KEEP))


def test_layers_stored_behind_the_last_one_stay_behind(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make_family_model("deepseek_v3", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.12.eh_proj.weight"] = torch.zeros(32, 64)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP), verify="full").passed
    written = load_file(tmp_path / "pruned" / "model.safetensors")
    assert not any(".12." in name or "eh_proj" in name for name in written)
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0 and config["first_k_dense_replace"] == 3


def test_modulo_rules_become_lists(tmp_path):
    model = make_family_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP), verify="full")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["decoder_sparse_step"] == 1
    # Of the kept layers 0 1 2 4 5 7 8 10, only 1, 5 and 7 have experts (3 is listed as dense).
    assert config["mlp_only_layers"] == [0, 2, 3, 6, 7]


# -- model types without a row -----------------------------------------------------------------------------


@pytest.fixture
def unknown(monkeypatch):
    """Forgets a row, as if the model type had appeared after this release."""

    def forget(model_type):
        monkeypatch.delitem(FAMILIES, model_type)
        return make_family_model(model_type)

    return forget


@pytest.mark.parametrize("model_type", ["olmo3", "smollm3", "gpt_neox", "granite"])
def test_an_unknown_type_is_tried_and_proved(unknown, model_type, tmp_path):
    model = unknown(model_type)
    model.save_pretrained(tmp_path / "source")
    report = prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP))
    assert report.passed and report.level == "full"
    prune_(model, plan_of(KEEP))
    assert states_equal(type(model).from_pretrained(tmp_path / "pruned", dtype=torch.float32), model)


def test_an_unknown_type_is_not_trusted_without_proof(unknown, tmp_path):
    unknown("granite").save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"no row in the table.*families\.py"):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP), verify="structure")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "llama4_text", "gemma3n_text", "jamba"])
def test_an_unknown_type_that_needs_a_row_is_refused(unknown, model_type, tmp_path):
    model = unknown(model_type)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises((ModelError, IntegrityError)):
        prune_checkpoint(tmp_path / "source", tmp_path / "pruned", plan_of(KEEP))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    with pytest.raises(ModelError):
        prune_(copy.deepcopy(model), plan_of(KEEP))


def test_recording_works_on_transposed_and_fused_linears(tmp_path):
    """GPT-2 keeps its weights transposed; Phi-3 fuses query, key and value."""
    from gradpruner.data.encoding import Encoded, EncodedDataset
    from gradpruner.gradients.scores import score_layers
    from gradpruner.training.recording import record_gradients

    rows = [Encoded(list(range(3, 15)), list(range(3, 15))) for _ in range(8)]
    for model_type in ("gpt2", "phi3"):
        model = make_family_model(model_type)
        dense = copy.deepcopy(model)
        trace = record_gradients(model, EncodedDataset(rows), steps=3, rank=2, batch_size=2)
        plan = plan_pruning(score_layers(trace), num_prune=4, num_merge=2, protect_first=1)
        dense.save_pretrained(tmp_path / model_type)
        report = prune_checkpoint(tmp_path / model_type, tmp_path / f"{model_type}-new", plan, trace)
        assert report.passed and plan.merged
