"""Verdicts on narrowed models, by what engines derive."""

import dataclasses
import json
from pathlib import Path

import pytest
from families import make_config
from transformers import AutoConfig

from gradpruner.models.engine_widths import _WIDTHS_READ, WIDTH_RULES, portability_of
from gradpruner.models.engines import _ABSENT, _READ, ENGINES, layer_facts
from gradpruner.plans.width_plan import LayerWidths, WidthPlan, WidthShape

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gguf_widths.json"
SHAPE = WidthShape(
    num_layers=4, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, intermediate_size=96
)


def facts_of(model_type, depth=4, **options):
    return layer_facts(AutoConfig.for_model(model_type, num_hidden_layers=depth, **options))


def plan_of(shape=SHAPE, heads=None, kv_heads=None, channels=None, hidden=None):
    """A plan that keeps so many of everything, the first ones."""
    kv_heads = kv_heads or shape.num_kv_heads
    within = (heads or shape.num_heads * kv_heads // shape.num_kv_heads) // kv_heads
    kept = tuple(head for group in range(kv_heads) for head in shape.group(group)[:within])
    layer = LayerWidths(kept, tuple(range(channels or shape.intermediate_size)))
    return WidthPlan(shape, (layer,) * shape.num_layers, tuple(range(hidden or shape.hidden_size)))


def uneven(**fewer):
    """Every second layer is left as it was."""
    layers = (plan_of(**fewer).layers[0], plan_of().layers[0]) * 2
    return dataclasses.replace(plan_of(), layers=layers)


def statuses(plan, facts):
    return [verdict.status for verdict in portability_of(plan, facts)]


def reason(engine, plan, facts):
    return next(verdict.reason for verdict in portability_of(plan, facts) if verdict.engine == engine)


PLANS = {
    "heads": plan_of(heads=2),
    "groups": plan_of(kv_heads=1),
    "channels": plan_of(channels=24),
    "hidden": plan_of(hidden=32),
    "in step": plan_of(kv_heads=1, hidden=32),  # hidden size / heads is the size of a head again
}
NO_WINDOW = {"sliding_window": None}
# Model type, options of its config, plan, statuses in the order of ENGINES.
CASES = [
    *[("llama", {}, name, ["ok", "ok", "ok"]) for name in PLANS],
    *[("gemma2", {}, name, ["ok", "ok", "ok"]) for name in PLANS],
    ("qwen2", {}, "heads", ["refused", "ok", "refused"]),
    ("qwen2", {}, "groups", ["refused", "ok", "refused"]),
    ("qwen2", {}, "hidden", ["wrong", "ok", "refused"]),
    ("qwen2", {}, "channels", ["ok", "ok", "ok"]),
    ("qwen2", {}, "in step", ["ok", "ok", "ok"]),
    ("cohere", {}, "groups", ["ok", "refused", "refused"]),
    ("cohere", {}, "hidden", ["ok", "wrong", "refused"]),
    ("cohere", {}, "in step", ["ok", "ok", "ok"]),
    ("granite", {}, "heads", ["ok", "ok", "refused"]),
    ("granite", {}, "channels", ["ok", "ok", "ok"]),
    ("mistral", NO_WINDOW, "groups", ["ok", "ok", "ok"]),
    ("ministral", NO_WINDOW, "groups", ["ok", "ok", "unknown"]),
    ("arcee", {}, "channels", ["unknown", "unknown", "unknown"]),
    ("helium", {}, "channels", ["unknown", "unknown", "unknown"]),
]


@pytest.mark.parametrize(("model_type", "options", "name", "expected"), CASES)
def test_verdicts(model_type, options, name, expected):
    assert statuses(PLANS[name], facts_of(model_type, **options)) == expected


def test_reasons_say_what_is_derived_and_what_is_right():
    qwen = facts_of("qwen2")
    assert reason("vllm", PLANS["groups"], qwen) == (
        "vllm assumes that heads of qwen2 have hidden size / heads = 32 entries; here it is 16 and it does "
        "not load."
    )
    assert reason("vllm", PLANS["hidden"], qwen) == (
        "vllm assumes that heads of qwen2 have hidden size / heads = 8 entries; here it is 16."
    )
    assert reason("vllm", PLANS["channels"], qwen) == ""
    assert reason("vllm", PLANS["channels"], facts_of("arcee")).startswith(
        "How vllm derives the widths of arcee models has not been read"
    )
    assert reason("llama.cpp", PLANS["channels"], facts_of("ministral")).endswith("has no ministral models.")


def test_a_gemma_of_27b_scales_attention_by_its_widths_in_llama_cpp():
    shape = dataclasses.replace(SHAPE, num_layers=46)
    facts = facts_of("gemma2", depth=46, hidden_size=64, num_attention_heads=4, query_pre_attn_scalar=16)
    channels, groups = plan_of(shape, channels=24), plan_of(shape, kv_heads=1)
    assert statuses(channels, facts) == ["ok", "ok", "ok"]
    assert statuses(groups, facts) == ["ok", "ok", "wrong"]
    assert "scales attention by hidden size / heads = 32; here it is 16." in reason(
        "llama.cpp", groups, facts
    )


def test_what_an_engine_gets_wrong_of_the_unpruned_model_it_gets_wrong_of_the_narrowed_one():
    windowed = facts_of("mistral", sliding_window=8)
    verdict = next(v for v in portability_of(PLANS["channels"], windowed) if v.engine == "sglang")
    assert verdict.status == "wrong" and verdict.also_unpruned and "no attention windows" in verdict.reason
    # with fewer KV heads than heads SGLang takes no OLMo, pruned or not
    verdict = next(v for v in portability_of(PLANS["channels"], facts_of("olmo")) if v.engine == "sglang")
    assert verdict.status == "refused" and verdict.also_unpruned and "as many KV heads" in verdict.reason


def test_layers_of_different_widths_are_refused_but_for_channels_that_sglang_pads():
    llama = facts_of("llama")
    assert statuses(uneven(kv_heads=1), llama) == ["refused", "refused", "refused"]
    assert statuses(uneven(channels=24), llama) == ["refused", "ok", "refused"]
    assert "none are saved" in reason("sglang", uneven(channels=24), llama)
    assert "layers have different widths; vllm reads one width for all" in reason(
        "vllm", uneven(channels=24), llama
    )
    assert statuses(uneven(channels=24), facts_of("smollm3"))[1] == "refused"
    narrower = dataclasses.replace(uneven(channels=24), hidden=tuple(range(32)))
    assert statuses(narrower, facts_of("cohere")) == ["refused", "wrong", "refused"]


def test_the_table_is_about_types_that_were_read_and_exist():
    read = set(_WIDTHS_READ.split())
    assert read <= set(_READ.split())
    for rule in WIDTH_RULES:
        assert rule.engine in ENGINES and set(rule.models.split()) <= read
        assert not set(rule.models.split()) & set(_ABSENT[rule.engine].split())


def test_what_is_said_of_llama_cpp_is_what_was_run():
    rows = [row for row in json.loads(RESULTS.read_text())["families"] if "verdict" in row]
    known = set(_WIDTHS_READ.split()) - set(_ABSENT["llama.cpp"].split())
    assert {
        row["model_type"] for row in rows if row["outcome"] == "same" and row["plan"] != "unpruned"
    } == known
    shapes = {(r["model_type"], r["layers"]): r["widths"] for r in rows if r["plan"] == "unpruned"}
    for row in rows:
        assert row["as_said"], row
        if not row["widths"]:
            continue
        shape = WidthShape(**shapes[row["model_type"], row["layers"]])
        after = WidthShape(**row["widths"])
        facts = layer_facts(make_config(row["model_type"], num_hidden_layers=shape.num_layers))
        scale = {name: facts.attributes[name] for name in ("query_scale",) if name in facts.attributes}
        plan = plan_of(shape, after.num_heads, after.num_kv_heads, after.intermediate_size, after.hidden_size)
        # attention windows were off where llama.cpp knows none
        verdict = portability_of(plan, dataclasses.replace(facts, attributes=scale))[
            ENGINES.index("llama.cpp")
        ]
        assert verdict.status == row["verdict"], row
