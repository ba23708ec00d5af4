"""Whether inference engines correctly serve a model with heads, channels or hidden dimensions removed.

The pruned config states every width. It includes the head size, because hidden size / heads no longer gives
it. An engine that derives a size anyway loads the wrong part of a tensor, or does not load it. The table
`WIDTH_RULES` lists what engines derive, read in the sources of `engines.VERSIONS`; llama.cpp was also run
(`benchmarks/gguf_widths.py`). The table does not cover which sizes a kernel supports, nor into how many parts
tensor parallelism can split the heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gradpruner.models.engines import LayerFacts, Portability, portability_of_layers
from gradpruner.plans.reading import Plan
from gradpruner.plans.width_plan import WidthPlan, WidthShape

# Returns the size an engine derives and the model's actual size; None if the engine derives none.
Sizes = Callable[[LayerFacts, WidthShape], tuple[float, float] | None]


@dataclass(frozen=True)
class WidthRule:
    """A size that one engine derives from other sizes instead of reading it from the config.

    Attributes:
        engine: A name in `engines.ENGINES`.
        models: Model types, separated by spaces.
        sizes: Gives the derived size and the actual one.
        claim: The assumption in words; `{size}` is the derived size.
        below: Status of a model if the derived size is too small.
        above: Status of a model if the derived size is too large.
    """

    engine: str
    models: str
    sizes: Sizes
    claim: str
    below: str = "wrong"
    above: str = "wrong"


def _head_size(_: LayerFacts, widths: WidthShape) -> tuple[float, float]:
    return widths.hidden_size // widths.num_heads, widths.head_dim


def _exact_head_size(_: LayerFacts, widths: WidthShape) -> tuple[float, float]:
    """Like `_head_size`, for engines where the heads must divide the hidden size."""
    return widths.hidden_size / widths.num_heads, widths.head_dim


def _kv_heads(_: LayerFacts, widths: WidthShape) -> tuple[float, float]:
    return widths.num_heads, widths.num_kv_heads


def _query_scale(depth: int) -> Sizes:
    """Returns the sizes of a rule for the query scale, which the engine derives only at this depth."""

    def sizes(facts: LayerFacts, widths: WidthShape) -> tuple[float, float] | None:
        scale = facts.attributes.get("query_scale")
        return (*_head_size(facts, widths)[:1], scale[0]) if scale and facts.num_layers == depth else None

    return sizes


_HEADS = "heads of {model} have hidden size / heads = {size:g} entries"
_SCALE = "a {model} model of this depth scales attention by hidden size / heads = {size:g}"
_MULTI_HEAD = "{model} has as many KV heads as query heads, {size:g}"

WIDTH_RULES = (
    # vLLM 0.33.0, vllm/model_executor/models/qwen2.py, stablelm.py; layers/linear.py and parameter.py
    # (narrow) silently cut off a tensor that is larger than expected, and refuse a smaller one
    WidthRule("vllm", "qwen2", _head_size, _HEADS, "wrong", "refused"),
    WidthRule("vllm", "stablelm", _exact_head_size, _HEADS, "wrong", "refused"),
    # SGLang 0.5.23, python/sglang/srt/models/commandr.py, olmo.py, stablelm.py; layers/linear.py does the
    # same (its cache uses the head size of the config, so the first token may fail instead)
    WidthRule("sglang", "cohere cohere2", _head_size, _HEADS, "wrong", "refused"),
    WidthRule("sglang", "olmo stablelm", _exact_head_size, _HEADS, "wrong", "refused"),
    # models/olmo.py does not tell QKVParallelLinear the number of KV heads
    WidthRule("sglang", "olmo", _kv_heads, _MULTI_HEAD, "wrong", "refused"),
    # llama.cpp 0c1e570: conversion/granite.py drops head_dim, so src/llama-model.cpp derives it by division
    WidthRule("llama.cpp", "granite", _head_size, _HEADS, "refused", "refused"),
    # src/models/command-r.cpp, cohere2.cpp, olmo.cpp, qwen2.cpp, stablelm.cpp: queries are n_embd x n_embd
    WidthRule(
        "llama.cpp", "cohere cohere2 olmo qwen2 stablelm", _exact_head_size, _HEADS, "refused", "refused"
    ),
    # src/models/gemma2.cpp, gemma3.cpp: 27B, recognised by its depth, scales by n_embd / n_head
    WidthRule("llama.cpp", "gemma2", _query_scale(46), _SCALE),
    WidthRule("llama.cpp", "gemma3_text", _query_scale(62), _SCALE),
)

# Model types whose widths can be pruned. Their code was read in vLLM and SGLang and run in llama.cpp, where
# the engine has them. Without a rule above, every size comes from the config.
_WIDTHS_READ = """
    cohere cohere2 ernie4_5 gemma gemma2 gemma3_text granite hunyuan_v1_dense llama ministral ministral3
    mistral olmo qwen2 qwen3 seed_oss smollm3 stablelm
"""
# SGLang builds these from transformers' layers, whose loader does not pad.
_SGLANG_BY_TRANSFORMERS = "ministral seed_oss smollm3"


def portability_of(plan: Plan, facts: LayerFacts) -> tuple[Portability, ...]:
    """Returns how each engine serves the model that a plan leaves, in the order of `ENGINES`.

    `facts` describe the unpruned model. What an engine gets wrong there, it gets wrong in the pruned model.
    """
    before = portability_of_layers(facts, plan.keep)
    if plan.kind == "layers":
        return before
    return tuple(_on_engine(portability, plan, facts) for portability in before)


def _on_engine(before: Portability, plan: WidthPlan, facts: LayerFacts) -> Portability:
    engine, kind = before.engine, facts.model_type
    if before.status == "unknown":
        return before
    if kind not in _WIDTHS_READ.split():
        return Portability(
            engine, "unknown", f"How {engine} derives the widths of {kind} models has not been read."
        )
    found = [before, *_faults(engine, plan, facts)]
    if not plan.uniform:
        found.append(_uneven(engine, plan, kind))
    order = ("refused", "wrong", "ok")
    return min(found, key=lambda one: (order.index(one.status), one.also_unpruned, not one.reason))


def _faults(engine: str, plan: WidthPlan, facts: LayerFacts) -> list[Portability]:
    """Returns a portability for each rule that the pruned model breaks."""
    after = plan.widths if plan.uniform else replace(plan.shape, hidden_size=len(plan.hidden))
    faults = []
    for rule in WIDTH_RULES:
        if rule.engine != engine or facts.model_type not in rule.models.split():
            continue
        if (sizes := rule.sizes(facts, after)) is None or sizes[0] == sizes[1]:
            continue
        derived, right = sizes
        status = rule.below if derived < right else rule.above
        intact = rule.sizes(facts, plan.shape)
        before = intact is not None and intact[0] != intact[1]
        claim = rule.claim.format(model=facts.model_type, size=derived)
        reason = (
            f"{engine} assumes that {claim}; here it is {right:g}"
            + (" and it does not load" if status == "refused" else "")
            + (", like the unpruned model." if before else ".")
        )
        faults.append(Portability(engine, status, reason, before))
    return faults


def _uneven(engine: str, plan: WidthPlan, kind: str) -> Portability:
    """Returns the portability of layers of different widths, whose config states the unpruned ones."""
    whole_heads = all(len(widths.heads) == plan.shape.num_heads for widths in plan.layers)
    if engine == "sglang" and whole_heads and kind not in _SGLANG_BY_TRANSFORMERS.split():
        # layers/linear.py pads gate, up and down projections that are too small, but not those of attention
        return Portability(
            engine, "ok", "sglang pads channels with zeros to the unpruned width, so none are saved."
        )
    reason = (
        f"layers have different widths; {engine} reads one width for all layers from the config and does not "
        "load the model."
    )
    return Portability(engine, "refused", reason)
