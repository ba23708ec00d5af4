"""Whether inference engines serve a depth-pruned model as transformers does.

A pruned config says what kind each layer is: sliding or full attention, rotary or not, experts or not.
transformers reads these lists. Engines derive some of them from a layer's number instead, and then silently
serve a correct checkpoint wrongly. The table `RULES` lists what they derive, read in the sources of
`VERSIONS`. This module assumes that the plan suits transformers itself (`config_patch.check_keep`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradpruner.common.printing import runs_of
from gradpruner.common.registry import check_known

ENGINES = ("vllm", "sglang", "llama.cpp")
# llama.cpp is the commit inside llama-cpp-python 0.3.36, with its convert_hf_to_gguf.py.
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23", "llama.cpp": "0c1e570 (2026-10-01)"}
FULL, SLIDING, CHUNKED, LINEAR = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "linear_attention",
)


@dataclass(frozen=True)
class Portability:
    """How one engine serves a pruned model.

    Attributes:
        engine: A name in `ENGINES`.
        status: "ok"; "wrong" (loads, but computes something else than transformers); "refused" (does not
            load); "unknown" (its code was not read, or the engine does not know the architecture).
        reason: An explanation for people; may be "" if the status is "ok".
        also_unpruned: Whether the same holds for the model before pruning.
    """

    engine: str
    status: str
    reason: str
    also_unpruned: bool = False


@dataclass(frozen=True)
class LayerFacts:
    """What the config of an unpruned model says about each layer.

    Attributes:
        model_type: The model type of the decoder's config.
        attributes: Name -> one value per layer (`layer_types`, `no_rope_layers`, `moe` ...).
        settings: Numbers of the config that the rules use; pruning does not change them.
    """

    model_type: str
    num_layers: int
    attributes: dict[str, tuple[Any, ...]]
    settings: dict[str, Any] = field(default_factory=dict)


# expected(new, kept): the kind an engine assumes for layer `new` of `kept`; None if it reads the config.
Expected = Callable[[int, int], Any]
Answers = Callable[[LayerFacts], tuple[Expected, ...]]


@dataclass(frozen=True)
class Rule:
    """What one engine assumes about some model types.

    Attributes:
        engine: A name in `ENGINES`.
        models: Model types, separated by spaces.
        attribute: The entry of `LayerFacts.attributes` that the engine does not read from the config.
        expects: What the engine assumes instead. One of the answers must hold; () if the rule does not apply.
        claim: The assumption in words; names in braces are `settings`.
        outcome: Status of a model that breaks the rule.
    """

    engine: str
    models: str
    attribute: str
    expects: Answers
    claim: str
    outcome: str = "wrong"


def _every(period: int | str, last: Any, others: Any, given: str = "") -> Answers:
    """The last layer of each period is `last`, the rest are `others`.

    `period` may name a setting; 0 means that the rule does not apply. `given` names a setting that must not
    be 0 for the rule to apply.
    """

    def expects(facts: LayerFacts) -> tuple[Expected, ...]:
        step = facts.settings[period] if isinstance(period, str) else period
        if not step or (given and not facts.settings[given]):
            return ()
        return (lambda new, kept: others if (new + 1) % step else last,)

    return expects


def _by_depth(depths: tuple[int, ...], inside: Any, outside: Any, given: str = "") -> Answers:
    """All layers are `inside` in models of these depths, else `outside`; both may name settings."""

    def expects(facts: LayerFacts) -> tuple[Expected, ...]:
        these, others = facts.settings.get(inside, inside), facts.settings.get(outside, outside)
        if given and not facts.settings[given]:
            return ()
        return (lambda new, kept: these if kept in depths else others,)

    return expects


def _same(value: Any, given: str = "") -> Answers:
    return _every(1, value, value, given)


def _one_kind(facts: LayerFacts) -> tuple[Expected, ...]:
    return tuple(_same(kind)(facts)[0] for kind in sorted(set(facts.attributes["layer_types"])))


_EVERY = "every {} layer of {{model}} has full attention and the others a window"
_NO_ROPE = "every 4th layer of {model} has no rotary positions"
_NO_WINDOWS = "{model} has no attention windows (which matters only for texts longer than one)"
_ONE_KIND = "all layers of {model} have the same kind of attention"
_EXPERTS = "all layers of {model} have experts"
_STEP = "every {moe_step} layer of {model} has experts"
_SCALE = "{{model}} scales attention by the head size, unless it has exactly {} layers"
_SCALES = ("per_head", "head_dim")
_INTERVAL = "every {interval} layer of {model} has full attention"
_PATTERN = "sliding_window_pattern of {model} is text (LLLG)"
_LITE = "{model} has compressed queries, unless it has 26 or 27 layers"
_OWN_KEYS = "exactly the first 20 layers of {model} have keys and values of their own"
_DEEP = "only {model} models of 64 layers have windows"
_DEEPSEEK = "deepseek_v2 deepseek_v3"
_WINDOWED = "ministral3 mistral mixtral phi3 qwen2 qwen2_moe qwen3 qwen3_moe starcoder2"
_QWEN_MOE = "qwen2_moe qwen3_moe qwen3_next"
_TWO, _FOUR, _SIX = (_every(n, FULL, SLIDING, "window") for n in (2, 4, 6))
_CHUNKS = _every(4, FULL, CHUNKED, "chunked")
_EXPERT_STEP = _every("moe_step", True, False)

RULES = (
    # vLLM 0.33.0, vllm/model_executor/models/
    # gpt_oss.py: a window where layer_idx % 2 == 0
    Rule("vllm", "gpt_oss", "layer_types", _TWO, _EVERY.format("2nd")),
    # llama4.py: experts where (layer_idx + 1) % interleave_moe_layer_step == 0; moe_layers is not read
    Rule("vllm", "llama4_text", "moe", _EXPERT_STEP, _STEP, "refused"),
    # qwen2.py, inherited by qwen3.py: asserts max_window_layers == num_hidden_layers if layer_types are mixed
    Rule("vllm", "qwen2 qwen3", "layer_types", _one_kind, _ONE_KIND, "refused"),
    # qwen2_moe.py does not read layer_types; engine/arg_utils.py sets a window only if all layers have one
    Rule("vllm", "qwen2_moe", "layer_types", _one_kind, _ONE_KIND),
    # SGLang 0.5.23, python/sglang/srt/
    # models/gemma2.py: a window where layer_id % 2 == 0
    Rule("sglang", "gemma2", "layer_types", _TWO, _EVERY.format("2nd")),
    # models/llama4.py: rotary positions and chunks where (layer_id + 1) % 4 != 0; experts by step
    Rule("sglang", "llama4_text", "no_rope_layers", _every(4, 0, 1), _NO_ROPE),
    Rule("sglang", "llama4_text", "layer_types", _CHUNKS, _EVERY.format("4th")),
    Rule("sglang", "llama4_text", "moe", _EXPERT_STEP, _STEP),
    # models/exaone4.py: window and rotary positions where (layer_id + 1) % len(sliding_window_pattern) != 0
    Rule("sglang", "exaone4", "layer_types", _same("none", "pattern_number"), _PATTERN, "refused"),
    Rule("sglang", "exaone4", "layer_types", _every("pattern", FULL, SLIDING), _EVERY.format("{pattern}")),
    # configs/qwen3_next.py, inherited by qwen3_5.py: by full_attention_interval; layer_types is not read
    Rule("sglang", "qwen3_next qwen3_5_text", "layer_types", _every("interval", FULL, LINEAR), _INTERVAL),
    # models/qwen2_moe.py, qwen3_moe.py, qwen3_next.py: every layer is sparse; other weights are skipped
    Rule("sglang", _QWEN_MOE, "moe", _same(True), _EXPERTS),
    # models/llama.py, ministral3.py, mixtral.py, qwen*.py, starcoder2.py give no layer a window
    Rule("sglang", _WINDOWED, "layer_types", _same(FULL), _NO_WINDOWS),
    # llama.cpp 0c1e570, src/models/: load_swa_pattern(n) makes il % n == n - 1 the full ones, unless the GGUF
    # holds a list; the converter writes one for gemma3n, gemma4, olmo3 and exaone4, but not for these
    Rule("llama.cpp", "gemma2 gpt_oss", "layer_types", _TWO, _EVERY.format("2nd")),
    Rule("llama.cpp", "cohere2", "layer_types", _FOUR, _EVERY.format("4th")),
    Rule("llama.cpp", "gemma3_text", "layer_types", _SIX, _EVERY.format("6th")),
    Rule("llama.cpp", "llama4_text", "layer_types", _CHUNKS, _EVERY.format("4th")),
    # llama4.cpp (if any layer is chunked), smollm3.cpp: rotary positions where (il + 1) % 4 != 0
    Rule("llama.cpp", "llama4_text", "no_rope_layers", _every(4, 0, 1, "chunked"), _NO_ROPE),
    Rule("llama.cpp", "smollm3", "no_rope_layers", _every(4, 0, 1), _NO_ROPE),
    # llama4.cpp: experts where (i + 1) % n_moe_layer_step == 0, and all their tensors must exist
    Rule("llama.cpp", "llama4_text", "moe", _EXPERT_STEP, _STEP, "refused"),
    # qwen2moe.cpp, qwen3moe.cpp, qwen3next.cpp: expert tensors must exist in every layer
    Rule("llama.cpp", _QWEN_MOE, "moe", _same(True), _EXPERTS, "refused"),
    # exaone4.cpp: windows, by the list, only if n_layer == 64; otherwise rotary positions in all layers
    Rule("llama.cpp", "exaone4", "layer_types", _by_depth((64,), None, "neither", "window"), _DEEP),
    # gemma3n.cpp: n_layer_kv_from_start = 20, regardless of num_kv_shared_layers
    Rule("llama.cpp", "gemma3n_text", "kv_shared", lambda _: (lambda new, kept: new >= 20,), _OWN_KEYS),
    # gemma2.cpp, gemma3.cpp: 27B, recognised by its depth, scales attention by hidden size / heads, not by
    # the head size
    Rule("llama.cpp", "gemma2", "query_scale", _by_depth((46,), *_SCALES), _SCALE.format(46)),
    Rule("llama.cpp", "gemma3_text", "query_scale", _by_depth((62,), *_SCALES), _SCALE.format(62)),
    # deepseek2.cpp takes a model of 26 or 27 layers for V2-Lite, whose queries are not compressed
    Rule("llama.cpp", _DEEPSEEK, "low_rank_queries", _by_depth((26, 27), False, True), _LITE, "refused"),
    # the code for these types does not set n_swa; phi3.cpp switches windows off with a warning
    Rule("llama.cpp", f"{_WINDOWED} smollm3", "layer_types", _same(FULL), _NO_WINDOWS),
)

# Model types whose code was read in all three engines. Without a rule above, the engine follows the config.
_READ = """
    arcee bloom cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 falcon gemma gemma2 gemma3_text
    gemma3n_text gemma4_text glm glm4 gpt2 gpt_neox gpt_oss gptj granite granitemoe hunyuan_v1_dense jamba
    lfm2 llama llama4_text minimax ministral ministral3 mistral mixtral mpt nemotron olmo olmo2 olmo3
    olmoe opt phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next seed_oss smollm3 stablelm
    starcoder2
"""
# Types that an engine has no code for and cannot run with transformers' code either. vLLM had minimax until
# 0.23 and mpt until 0.28. The converter of llama.cpp knows MiniMaxText01ForCausalLM and MPTForCausalLM, but
# not the architecture names that transformers writes.
_ABSENT = {
    "vllm": "minimax mpt",
    "sglang": "bloom falcon jamba minimax mpt",
    "llama.cpp": "gptj ministral minimax mpt opt",
}


def layer_facts(config: Any) -> LayerFacts:
    """Returns what a transformers config says about each layer; uses the text part of a larger config."""
    text = config.get_text_config(decoder=True)
    depth: int = text.num_hidden_layers
    kinds = _attention_kinds(text, depth)
    attributes: dict[str, tuple[Any, ...]] = {"layer_types": kinds}
    if getattr(text, "no_rope_layers", None):
        attributes["no_rope_layers"] = tuple(text.no_rope_layers)
    if getattr(text, "moe_layers", None) is not None:
        attributes["moe"] = tuple(i in text.moe_layers for i in range(depth))
    step = getattr(text, "decoder_sparse_step", None)
    if step and getattr(text, "num_experts", 0):
        dense = set(getattr(text, "mlp_only_layers", None) or ())
        attributes["moe"] = tuple(i not in dense and (i + 1) % step == 0 for i in range(depth))
    if getattr(text, "num_kv_shared_layers", None) is not None:
        attributes["kv_shared"] = tuple(i >= depth - text.num_kv_shared_layers for i in range(depth))
    if getattr(text, "query_pre_attn_scalar", None):
        attributes["query_scale"] = (text.query_pre_attn_scalar,) * depth
    if hasattr(text, "q_lora_rank"):
        attributes["low_rank_queries"] = (text.q_lora_rank is not None,) * depth
    return LayerFacts(text.model_type, depth, attributes, _settings(text, kinds))


def _settings(text: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Returns the numbers that the rules use; 0 if the config does not have one."""
    pattern = getattr(text, "sliding_window_pattern", None) or 0
    scaled = hasattr(text, "query_pre_attn_scalar")  # only then do all layers surely have heads of one size
    return {
        "window": getattr(text, "sliding_window", None) or 0,
        "chunked": int(CHUNKED in kinds),
        "pattern": len(pattern) if isinstance(pattern, str) else 0,
        "pattern_number": pattern if isinstance(pattern, int) else 0,
        "moe_step": getattr(text, "interleave_moe_layer_step", None) or 0,
        # transformers drops the interval once it has derived layer_types from it
        "interval": getattr(text, "full_attention_interval", None) or (*kinds, FULL).index(FULL) + 1,
        "head_dim": text.head_dim if scaled else 0,
        "per_head": text.hidden_size // text.num_attention_heads if scaled else 0,
    }


def _attention_kinds(text: Any, depth: int) -> tuple[str, ...]:
    """Returns the kind of attention that each layer really has, whether or not the config lists it."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        return (SLIDING if window else FULL,) * depth
    if any(isinstance(value, dict) for value in (getattr(text, "rope_parameters", None) or {}).values()):
        return tuple(kinds)  # the kinds differ in more than the window
    unused = {SLIDING: not window, CHUNKED: not getattr(text, "attention_chunk_size", None)}
    return tuple(FULL if unused.get(kind) else kind for kind in kinds)


def portability_of_layers(facts: LayerFacts, keep: Sequence[int]) -> tuple[Portability, ...]:
    """Returns how each engine serves the model that keeps these layers, in the order of `ENGINES`."""
    return tuple(_on_engine(engine, facts, tuple(keep)) for engine in ENGINES)


def _on_engine(engine: str, facts: LayerFacts, keep: tuple[int, ...]) -> Portability:
    kind = facts.model_type
    if kind not in _READ.split():
        return Portability(
            engine, "unknown", f"How {engine} builds the layers of {kind} models has not been read."
        )
    if kind in _ABSENT[engine].split():
        return Portability(engine, "unknown", f"{engine} {VERSIONS[engine]} has no {kind} models.", True)
    faults = [fault for rule in _rules(facts, [engine]) if (fault := _fault(rule, facts, keep))]
    if not faults:
        return Portability(engine, "ok", "")
    return min(faults, key=lambda fault: (fault.status != "refused", fault.also_unpruned))


def _rules(facts: LayerFacts, engines: Sequence[str]) -> list[Rule]:
    """Returns the rules of these engines that apply to this model."""
    mine = [rule for rule in RULES if rule.engine in engines and facts.model_type in rule.models.split()]
    return [rule for rule in mine if rule.attribute in facts.attributes and rule.expects(facts)]


def _fault(rule: Rule, facts: LayerFacts, keep: tuple[int, ...]) -> Portability | None:
    wrong = _misplaced(rule, facts, keep)
    if not wrong:
        return None
    before = bool(_misplaced(rule, facts, range(facts.num_layers)))
    numbers = {name: _ordinal(value) for name, value in facts.settings.items()}
    claim = rule.claim.format(model=facts.model_type, **numbers)
    reason = (
        f"{rule.engine} assumes that {claim}; {_named(wrong, len(keep))} that"
        + (" and it does not load" if rule.outcome == "refused" else "")
        + (", like the unpruned model." if before else ".")
        + (f" Use --portable-to {rule.engine} when planning." if _can_be_obeyed(rule, facts) else "")
    )
    return Portability(rule.engine, rule.outcome, reason, before)


def _named(wrong: list[int], kept: int) -> str:
    if len(wrong) == kept:
        return "all kept layers break"
    if len(wrong) == 1:
        return f"kept layer {wrong[0]} breaks"
    rest = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    return f"kept layers {runs_of(wrong[:6])}{rest} break"


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number, 'th') }"


def _misplaced(rule: Rule, facts: LayerFacts, keep: Sequence[int]) -> list[int]:
    """Returns the kept layers that the engine takes for another kind, by the answer that fits most layers."""
    values = facts.attributes[rule.attribute]
    answers = [
        [old for new, old in enumerate(keep) if expected(new, len(keep)) not in (None, values[old])]
        for expected in rule.expects(facts)
    ]
    return min(answers, key=len)


def slots(facts: LayerFacts, engines: Sequence[str]) -> Callable[[int, int, int], bool] | None:
    """Returns a function that says at which positions a layer may stand for the engines to serve it right.

    A rule is left out if the unpruned model breaks it and no choice of layers would obey it: the engine is
    then wrong about the model itself.

    Returns:
        `fits(old, new, kept)`: whether layer `old` may become layer `new` of `kept`; None if every layer may
        stand anywhere.

    Raises:
        ConfigError: If an engine is unknown.
    """
    for engine in engines:
        check_known("engine", engine, ENGINES)
    demands = [
        (facts.attributes[rule.attribute], _best_answer(rule, facts))
        for rule in _rules(facts, engines)
        if _binds(rule, facts)
    ]
    if not demands:
        return None

    def fits(old: int, new: int, kept: int) -> bool:
        return all(expected(new, kept) in (None, values[old]) for values, expected in demands)

    return fits


def _best_answer(rule: Rule, facts: LayerFacts) -> Expected:
    """Returns the answer of a rule that holds for most layers of the unpruned model."""
    values, depth = facts.attributes[rule.attribute], facts.num_layers
    return max(rule.expects(facts), key=lambda e: sum(e(i, depth) in (None, values[i]) for i in range(depth)))


def _binds(rule: Rule, facts: LayerFacts) -> bool:
    """Whether the rule excludes some choice of layers and can be obeyed at all."""
    values, expected = facts.attributes[rule.attribute], _best_answer(rule, facts)
    depths = range(1, facts.num_layers + 1)
    if len(set(values)) == 1 and all(
        expected(new, kept) in (None, values[0]) for kept in depths for new in range(kept)
    ):
        return False
    return not _misplaced(rule, facts, range(facts.num_layers)) or _can_be_obeyed(rule, facts)


def _can_be_obeyed(rule: Rule, facts: LayerFacts) -> bool:
    """Whether some two layers would obey the rule if only they were kept."""
    values, expected = facts.attributes[rule.attribute], _best_answer(rule, facts)
    first, second = (
        [old for old, value in enumerate(values) if expected(new, 2) in (None, value)] for new in range(2)
    )
    return bool(first and second) and first[0] < second[-1]
