"""Verdicts per inference engine, on configs as transformers makes them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from gradpruner.common.errors import ConfigError, PlanError
from gradpruner.gradients.scores import LayerScores
from gradpruner.models.engines import (
    _ABSENT,
    _READ,
    ENGINES,
    RULES,
    VERSIONS,
    layer_facts,
    portability_of_layers,
    slots,
)
from gradpruner.plans.selection import plan_pruning

FULL, SLIDING, CHUNKED, LINEAR = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)
WINDOWED = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 8, "num_hidden_layers": 12}


def facts_of(model_type, **options):
    return layer_facts(AutoConfig.for_model(model_type, **options))


def without(facts, *dropped):
    return [i for i in range(facts.num_layers) if i not in dropped]


def statuses(facts, keep):
    return [verdict.status for verdict in portability_of_layers(facts, keep)]


def reasons(facts, keep):
    return {verdict.engine: verdict.reason for verdict in portability_of_layers(facts, keep)}


def plan_for(facts, engines, count, seed=1):
    values = tuple(float((i * 7 + seed * 5) % 11) for i in range(facts.num_layers))
    return plan_pruning(LayerScores("m", values), num_prune=count, num_merge=0, fits=slots(facts, engines))


# Model type, options of its config, layers to drop, statuses in the order of ENGINES afterwards.
CASES = [
    ("llama", {}, [3, 4, 9], ["ok", "ok", "ok"]),
    ("gemma2", {}, [4], ["ok", "wrong", "wrong"]),
    ("gemma2", {}, [4, 5], ["ok", "ok", "ok"]),
    ("gemma3_text", {}, [3, 4], ["ok", "ok", "wrong"]),
    ("gemma3_text", {}, range(6, 12), ["ok", "ok", "ok"]),
    ("gpt_oss", {}, [4], ["wrong", "ok", "wrong"]),
    ("gpt_oss", {}, [4, 7], ["wrong", "ok", "wrong"]),
    ("gpt_oss", {}, [4, 9], ["wrong", "ok", "wrong"]),
    ("gpt_oss", {}, [35], ["ok", "ok", "ok"]),
    ("cohere2", {}, [1], ["ok", "ok", "wrong"]),
    ("cohere2", {}, range(4, 8), ["ok", "ok", "ok"]),
    ("smollm3", {}, [1], ["ok", "ok", "wrong"]),
    ("smollm3", {}, [1, 2, 3, 4], ["ok", "ok", "ok"]),
    ("llama4_text", {}, [1], ["ok", "wrong", "wrong"]),
    ("llama4_text", {}, range(8, 12), ["ok", "ok", "ok"]),
    ("llama4_text", {"interleave_moe_layer_step": 2}, [1], ["refused", "wrong", "refused"]),
    ("llama4_text", {"interleave_moe_layer_step": 2}, range(8, 12), ["ok", "ok", "ok"]),
    ("qwen3_5_text", {}, [1], ["ok", "wrong", "ok"]),
    ("qwen3_next", {}, [1], ["ok", "wrong", "ok"]),
    ("qwen3_next", {}, [1, 2, 3, 4], ["ok", "ok", "ok"]),
    ("qwen3_moe", {"mlp_only_layers": [2]}, [4], ["ok", "wrong", "refused"]),
    ("qwen3_moe", {"mlp_only_layers": [2]}, [2], ["ok", "ok", "ok"]),
    ("gemma3n_text", {}, [2], ["ok", "ok", "wrong"]),
    ("gemma3n_text", {}, [20, 33], ["ok", "ok", "ok"]),
    ("deepseek_v3", {}, range(30, 61), ["ok", "ok", "ok"]),
    ("deepseek_v3", {}, range(26, 61), ["ok", "ok", "refused"]),
    ("mistral", {"sliding_window": None}, [3], ["ok", "ok", "ok"]),
    ("mistral", {"sliding_window": 64}, [3], ["ok", "wrong", "wrong"]),
    ("qwen2", {}, [3], ["ok", "ok", "ok"]),
    ("qwen2", WINDOWED, [3], ["refused", "wrong", "wrong"]),
    ("qwen2", WINDOWED, range(8, 12), ["ok", "ok", "ok"]),
    ("qwen2", WINDOWED, range(8), ["ok", "wrong", "wrong"]),
    ("qwen3", WINDOWED, [3], ["refused", "wrong", "wrong"]),
    ("qwen2_moe", WINDOWED, [3], ["wrong", "wrong", "wrong"]),
    ("olmo3", {}, [1], ["ok", "ok", "ok"]),
    ("lfm2", {}, [1], ["ok", "ok", "ok"]),
    ("gemma4_text", {}, [1], ["ok", "ok", "ok"]),
    ("minimax", {}, [1], ["unknown", "unknown", "unknown"]),
    ("jamba", {}, range(8), ["ok", "unknown", "ok"]),
    ("gptj", {}, [1], ["ok", "ok", "unknown"]),
]


@pytest.mark.parametrize("model_type, options, dropped, expected", CASES)
def test_what_engines_make_of_a_pruned_model(model_type, options, dropped, expected):
    facts = facts_of(model_type, **options)
    assert statuses(facts, without(facts, *dropped)) == expected


@pytest.mark.parametrize(
    "model_type",
    [
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "cohere2",
        "smollm3",
        "llama4_text",
        "qwen2",
        "qwen3_next",
        "gemma3n_text",
    ],
)
def test_unpruned_models_are_served_right(model_type):
    facts = facts_of(model_type)
    assert statuses(facts, without(facts)) == ["ok"] * 3


@pytest.mark.parametrize(
    "model_type, options",
    [
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("gpt_oss", {}),
        ("cohere2", {}),
        ("smollm3", {}),
        ("llama4_text", {}),
        ("llama4_text", {"interleave_moe_layer_step": 2}),
        ("qwen3_next", {}),
        ("gemma3n_text", {}),
        ("qwen2", {}),
        ("qwen2", WINDOWED),
        ("qwen3_moe", {"mlp_only_layers": [2]}),
    ],
)
@pytest.mark.parametrize("share", [0.34, 0.5])
def test_a_plan_made_to_be_portable_is(model_type, options, share):
    facts = facts_of(model_type, **options)
    for engines in [*([engine] for engine in ENGINES), list(ENGINES)]:
        plan = plan_for(facts, engines, int(share * facts.num_layers))
        status = {verdict.engine: verdict.status for verdict in portability_of_layers(facts, plan.keep)}
        assert [status[engine] for engine in engines] == ["ok"] * len(engines)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_slots_say_what_the_verdict_says(data):
    model_type = data.draw(st.sampled_from(["gemma2", "gemma3_text", "gpt_oss", "llama4_text", "qwen3_next"]))
    facts = facts_of(model_type, num_hidden_layers=data.draw(st.integers(4, 14)))
    keep = sorted(data.draw(st.sets(st.integers(0, facts.num_layers - 1), min_size=2)))
    for verdict in portability_of_layers(facts, keep):
        fits = slots(facts, [verdict.engine])
        placed = fits is None or all(fits(old, new, len(keep)) for new, old in enumerate(keep))
        assert placed == (verdict.status == "ok")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_oss", "cohere2", "olmo3"])
def test_the_pruned_config_read_again_gets_the_same_verdict(model_type):
    facts = facts_of(model_type, num_hidden_layers=12)
    for dropped in ([4], [2, 5], [11], range(6)):
        keep = without(facts, *dropped)
        kinds = [facts.attributes["layer_types"][i] for i in keep]
        again = facts_of(model_type, num_hidden_layers=len(keep), layer_types=kinds)
        assert statuses(again, range(len(keep))) == statuses(facts, keep)


def test_the_reason_says_which_layers_are_wrong_and_what_to_do():
    facts = facts_of("gemma3_text")
    assert reasons(facts, without(facts, 12))["llama.cpp"] == (
        "llama.cpp assumes that every 6th layer of gemma3_text has full attention and the others a window; "
        "kept layers 17-18, 23-24 break that. Use --portable-to llama.cpp when planning."
    )
    many = reasons(facts, without(facts, 0))["llama.cpp"]
    assert "kept layers 5-6, 11-12, 17-18 and 2 more break that." in many
    one = reasons(facts_of("qwen3_moe", mlp_only_layers=[2]), [0, 1, 2, 3])
    assert "all layers of qwen3_moe have experts; kept layer 2 breaks that, like" in one["sglang"]
    assert "breaks that and it does not load, like the unpruned model" in one["llama.cpp"]
    moe = facts_of("llama4_text", interleave_moe_layer_step=2)
    assert "assumes that every 2nd layer of llama4_text has experts" in reasons(moe, without(moe, 0))["vllm"]


def test_what_an_engine_gets_wrong_anyway_is_told_apart_from_what_pruning_breaks():
    windowed, gemma = facts_of("mistral", sliding_window=64), facts_of("gemma2")
    assert [v.also_unpruned for v in portability_of_layers(windowed, [0, 1, 2])] == [False, True, True]
    assert [v.also_unpruned for v in portability_of_layers(gemma, [0, 2, 3])] == [False, False, False]
    reason = reasons(windowed, [0, 1, 2])["sglang"]
    assert reason.endswith("all kept layers break that, like the unpruned model.")
    # No choice of layers helps, so none is asked for.
    assert slots(windowed, ENGINES) is None


def test_models_that_are_the_same_everywhere_have_no_slots():
    for facts in (facts_of("llama"), facts_of("qwen2"), facts_of("gemma2", sliding_window=None)):
        assert slots(facts, ENGINES) is None
        assert statuses(facts, without(facts, 3)) == ["ok"] * 3
    assert slots(facts_of("gemma2"), ["vllm"]) is None
    assert slots(facts_of("gemma2"), []) is None


def test_an_engine_that_tells_the_27b_by_its_depth():
    shape = {"hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128, "query_pre_attn_scalar": 144}
    facts = facts_of("gemma2", num_hidden_layers=46, **shape)
    assert statuses(facts, without(facts)) == ["ok"] * 3
    assert statuses(facts, without(facts, 4, 5)) == ["ok", "ok", "wrong"]
    assert "unless it has exactly 46 layers; all kept layers break" in reasons(facts, [0, 1])["llama.cpp"]
    with pytest.raises(PlanError, match="No other number of layers helps"):
        plan_for(facts, ["llama.cpp"], 10)


def test_exaone_is_known_by_64_layers_and_a_text():
    kinds = [SLIDING, SLIDING, SLIDING, FULL] * 16
    facts = facts_of("exaone4", num_hidden_layers=64, layer_types=kinds, sliding_window_pattern="LLLG")
    assert statuses(facts, without(facts)) == ["ok"] * 3
    assert statuses(facts, without(facts, *range(4))) == ["ok", "ok", "wrong"]
    assert statuses(facts, without(facts, 1)) == ["ok", "wrong", "wrong"]
    numbered = facts_of("exaone4")
    assert statuses(numbered, without(numbered, 1)) == ["ok", "refused", "wrong"]
    plain = facts_of("exaone4", sliding_window=None, layer_types=[FULL] * 32)
    assert statuses(plain, without(plain, 1)) == ["ok"] * 3


def test_deepseek_avoids_the_depths_of_its_small_sister():
    facts = facts_of("deepseek_v3")
    with pytest.raises(PlanError, match="Prune 33 or 36 layers"):
        plan_for(facts, ["llama.cpp"], 34)
    lite = facts_of("deepseek_v2", num_hidden_layers=27, q_lora_rank=None)
    assert statuses(lite, without(lite)) == ["ok"] * 3
    assert statuses(lite, without(lite, 3, 4)) == ["ok", "ok", "refused"]


def test_facts_are_materialised_from_what_the_config_leaves_out():
    assert facts_of("mistral", sliding_window=64).attributes["layer_types"] == (SLIDING,) * 32
    assert facts_of("llama").attributes["layer_types"] == (FULL,) * 32
    assert facts_of("smollm3").attributes["no_rope_layers"][:5] == (1, 1, 1, 0, 1)
    assert facts_of("llama4_text").attributes["layer_types"][2:5] == (CHUNKED, FULL, CHUNKED)
    assert facts_of("llama4_text", interleave_moe_layer_step=2).attributes["moe"][:3] == (False, True, False)
    assert facts_of("qwen3_moe", decoder_sparse_step=2).attributes["moe"][:3] == (False, True, False)
    # Listed as sliding, but without a window there is nothing to slide.
    unused = facts_of("qwen2", num_hidden_layers=2, layer_types=[FULL, SLIDING])
    assert unused.attributes["layer_types"] == (FULL, FULL)
    odd = facts_of("qwen3_5_text", num_hidden_layers=6, full_attention_interval=3)
    assert odd.settings["interval"] == 3 and statuses(odd, range(6)) == ["ok"] * 3


@pytest.mark.parametrize("model_type, text", [("gemma3", "gemma3_text"), ("llama4", "llama4_text")])
def test_of_a_vision_language_model_the_text_part_counts(model_type, text):
    facts = facts_of(model_type)
    assert facts.model_type == text
    assert statuses(facts, without(facts, 1))[2] == "wrong"


def test_unknown_model_types_and_engines():
    facts = facts_of("zamba")
    assert statuses(facts, [0, 1]) == ["unknown"] * 3
    assert reasons(facts, [0, 1])["vllm"] == "How vllm builds the layers of zamba models has not been read."
    assert "has no minimax models" in reasons(facts_of("minimax"), [0, 1])["sglang"]
    with pytest.raises(ConfigError, match=r"Unknown engine 'vlm'\. Did you mean 'vllm'\? .*llama\.cpp"):
        slots(facts, ["vlm"])


def test_ok_needs_no_reason():
    assert set(reasons(facts_of("llama"), [0, 1]).values()) == {""}


@pytest.mark.parametrize(
    "rule", RULES, ids=lambda rule: f"{rule.engine}-{rule.models.split()[0]}-{rule.attribute}"
)
def test_every_rule_is_about_a_type_that_was_read_and_an_attribute_it_has(rule):
    assert rule.engine in ENGINES and rule.engine in VERSIONS
    assert rule.outcome in ("wrong", "refused")
    for model_type in rule.models.split():
        assert model_type in _READ.split() and model_type not in _ABSENT[rule.engine].split()
        facts = facts_of(model_type)
        assert len(facts.attributes[rule.attribute]) == facts.num_layers
        assert model_type in rule.claim.format(model=model_type, **dict.fromkeys(facts.settings, "4th"))
        assert isinstance(rule.expects(facts), tuple)


@pytest.mark.parametrize("model_type", _READ.split())
def test_facts_can_be_had_of_every_type_that_was_read(model_type):
    facts = facts_of(model_type)
    assert facts.model_type == model_type
    assert all(len(values) == facts.num_layers for values in facts.attributes.values())
    assert len(portability_of_layers(facts, [0, 1])) == 3
