"""Pruned checkpoints in llama.cpp: converted to GGUF, run, and compared with transformers.

    python benchmarks/gguf.py --converter llama.cpp --python engine/bin/python --model MODEL --json FILE
    python benchmarks/gguf.py --converter llama.cpp --python engine/bin/python --only gemma2 cohere2

`--converter` is a source tree of llama.cpp, whose convert_hf_to_gguf.py converts the models. `--python` is an
interpreter with xllamacpp (llama.cpp, compiled) and the converter's dependencies: torch, transformers,
sentencepiece, PyYAML. The benchmark itself runs where gradpruner is installed. It has two parts:

1. A trained model (`--model`; skipped without): unpruned, with dropped layers, and with merged layers, in
   several file types. The converter refuses tokenizers whose hash it does not know. This is tried first and
   recorded; then the converter is told to use the pre-tokenizer named by `--pre`.
2. A tiny random model of every family in the table of `gradpruner.models.engines`: unpruned, with layers
   chosen freely, with layers chosen for llama.cpp, and the last of these after transformers has loaded and
   saved it, as in fine-tuning. Each result is compared with the verdict of the table: "ok" must compute the
   same as transformers, "wrong" must differ, "refused" must not load. The tokenizers are GPT-2's, from the
   converter's own models/ggml-vocab-gpt-2.gguf, or a SentencePiece model trained on the spot; the converter
   accepts both. Sliding windows are 4 tokens wide, and prompts have 24 to 27 tokens.

The figure is the relative error of the log-probabilities of the whole vocabulary that llama.cpp's server
returns: the norm of the difference to transformers in float32, over the norm of transformers' values. Both
are centred, because softmax ignores a constant. In part 1 llama.cpp generates greedily; in part 2 it
continues random tokens by one token.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llama_engine import (
    AGREES,
    NEW_TOKENS,
    SEED,
    SPM_VOCAB,
    Engine,
    compare,
    engine_options,
    expected_outcomes,
    running,
    show_family,
    updated,
    verdict_of,
    versions_of,
)

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parent.parent
PROMPT_TOKENS = range(24, 28)
BPE_VOCAB = 50304
ROPE_THETA = 500.0
PRUNED = 4  # layers of 12


# -- a trained model ---------------------------------------------------------------------------------------

TEXTS = [
    "The city of Paris is",
    "In 1969 the first men to land on the Moon",
    'She said: "It\'s a long way, 1,234 miles..."\nHe did not answer, and',
]
FILE_TYPES = (("f32", True), ("f32", False), ("f16", False), ("bf16", False), ("q8_0", False))


def trained(engine: Engine, model: Path, pre: str, folder: Path) -> dict[str, Any]:
    """Compares a trained model unpruned, with dropped and with merged layers, in several file types."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import make_trace
    from transformers import AutoModelForCausalLM

    from gradpruner.plans.layer_plan import LayerAction, PruningPlan
    from gradpruner.pruning.on_disk import prune_checkpoint

    loaded = AutoModelForCausalLM.from_pretrained(model)
    depth = loaded.config.num_hidden_layers
    gone = range(depth // 2, depth // 2 + 3 * depth // 8)  # 8-13 of 16
    dropped = PruningPlan.from_keep(depth, [i for i in range(depth) if i not in gone])
    actions = list(dropped.actions)
    for layer in gone[:3]:
        actions[layer] = LayerAction("merge", gone[0] - 1)
    merged = PruningPlan(tuple(actions))
    prune_checkpoint(model, folder / "dropped", dropped, verify="full")
    prune_checkpoint(model, folder / "merged", merged, make_trace(loaded), verify="full")
    rows = []
    plain = compare(engine, folder / "dropped", TEXTS)
    for name, path in (("unpruned", model), ("dropped", folder / "dropped"), ("merged", folder / "merged")):
        for outtype, exact in FILE_TYPES:
            row = {"model": name, "file_type": outtype, "cache": "f32" if exact else "default"}
            row |= compare(engine, path, TEXTS, outtype, pre, exact)
            if "relative_error" in row:
                del row["outcome"]  # quantised weights are meant to differ
            print("  ".join(map(str, row.values())), flush=True)
            rows.append(row)
    return {
        "layers": depth,
        "dropped_layers": list(gone),
        "merged_layers": list(gone[:3]),
        "prompts": TEXTS,
        "new_tokens": NEW_TOKENS,
        "converter_without_pre": plain.get("error", plain["outcome"]),
        "pre": pre,
        "rows": rows,
    }


# -- families ----------------------------------------------------------------------------------------------

NO_WINDOW = {"sliding_window": None, "use_sliding_window": False}
EVERY_FOURTH = ["sliding_attention"] * 3 + ["full_attention"]
EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
GEMMA3N = {
    "num_hidden_layers": 26,
    "num_kv_shared_layers": 6,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 5 + ["sliding_attention"],
    "intermediate_size": [4096] * 26,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 16,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
}
# Config fields beyond those of tests/families.py that a model needs for llama.cpp; one entry per model.
# fmt: off
SUBJECTS: dict[str, list[dict[str, Any]]] = {
    "deepseek_v2": [{}, {"num_hidden_layers": 30}, {"num_hidden_layers": 27, "q_lora_rank": None}],
    "deepseek_v3": [{}, {"num_hidden_layers": 30}],
    "exaone4": [
        {"sliding_window": None, "layer_types": ["full_attention"] * 12},
        {"num_hidden_layers": 64, "layer_types": EVERY_FOURTH * 16},
        {"num_hidden_layers": 68, "layer_types": EVERY_FOURTH * 17},
    ],
    "falcon": [{"ffn_hidden_size": 128}],
    "gemma2": [
        {},
        {"num_hidden_layers": 46, "head_dim": 16},
        {"num_hidden_layers": 50, "head_dim": 16, "query_pre_attn_scalar": 16},
    ],
    "gemma3_text": [
        {"num_hidden_layers": 24, "PRUNED": 6},
        {"num_hidden_layers": 62, "head_dim": 16, "PRUNED": 6},
        {"num_hidden_layers": 68, "head_dim": 16, "query_pre_attn_scalar": 16, "PRUNED": 6},
    ],
    # The second model drops a whole period of layers, so that the windows stay where llama.cpp expects them.
    "gemma3n_text": [GEMMA3N | {"PRUNED": 2}, GEMMA3N | {"DROP": range(10, 15)}],
    # llama.cpp rounds the range of dimensions in YaRN and this model does not; with 8 dimensions it matters.
    "gpt_oss": [{"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA}}],
    "llama4_text": [
        {"attention_chunk_size": 8192, "interleave_moe_layer_step": 1}, {"attention_chunk_size": 8192},
    ],
    "ministral3": [{}, {"sliding_window": 4}],
    "mixtral": [{}, {"sliding_window": 4}],
    "olmoe": [{"num_key_value_heads": 4}],
    "phi": [{"num_key_value_heads": 4, "intermediate_size": 128}],
    "qwen2_moe": [{**NO_WINDOW, "mlp_only_layers": []}, NO_WINDOW, {"mlp_only_layers": []}],
    "qwen3_moe": [
        EXPERTS, {"norm_topk_prob": True},
        {**EXPERTS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5},
    ],
    "qwen3_5_text": [{"head_dim": 256}],  # the rotary sections add up to 32 dimensions
    "qwen3_next": [{"decoder_sparse_step": 1}, {}],
    "smollm3": [{**NO_WINDOW, "no_rope_layer_interval": 4}, {"no_rope_layer_interval": 4}],
    **{kind: [NO_WINDOW, {}] for kind in ("mistral", "phi3", "qwen2", "qwen3", "starcoder2")},
}
# fmt: on
SENTENCEPIECE = (  # families for which the converter requires SentencePiece
    *("ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma3n_text", "jamba", "nemotron", "phi3", "qwen2"),
)
# Fields of published configs that the converter reads but transformers 5 does not write.
RAW_FIELDS = {
    "cohere2": {"rotary_pct": 1.0},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "gpt2": {"n_ctx": 64},
    "gpt_neox": {"rotary_pct": 0.25},
}
# The converter does not write rope theta for these types, because all published models have the default.
DEFAULT_THETA = ("falcon", "gemma", "gemma2", "glm", "phi")
# Published checkpoints have a block for speculative decoding, which transformers ignores; ours do not.
OPTIONS = {"qwen3_5_text": ("--no-mtp",), "qwen3_next": ("--no-mtp",)}


def subjects(only: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    from gradpruner.models.engines import _READ

    unknown = set(only) - set(_READ.split())
    if unknown:
        sys.exit(f"Not in the table of portability.py: {', '.join(sorted(unknown))}.")
    for model_type in _READ.split():
        if not only or model_type in only:
            for options in SUBJECTS.get(model_type, [{}]):
                yield model_type, options


def plans(config: Any, count: int, dropped: Sequence[int]) -> dict[str, Any]:
    """Returns the kept layers: all; chosen freely, with a bad verdict if possible; chosen for llama.cpp."""
    from gradpruner.common.errors import PlanError
    from gradpruner.gradients.scores import LayerScores
    from gradpruner.models.config_patch import family_slots, required_layers, text_config
    from gradpruner.models.engines import layer_facts, slots
    from gradpruner.models.families import FAMILIES
    from gradpruner.plans.selection import plan_pruning

    text = text_config(config)
    family, depth = FAMILIES[text.model_type], text.num_hidden_layers
    own, engine = family_slots(text, family), slots(layer_facts(config), ["llama.cpp"])
    both = [fits for fits in (own, engine) if fits is not None]
    found = {"unpruned": tuple(range(depth))}
    if dropped:
        return found | {"free": tuple(i for i in range(depth) if i not in dropped)}

    def choose(seed: int, rules: list[Any], more: int = 0) -> tuple[int, ...]:
        scores = LayerScores("m", tuple(float((i * 7 + seed * 5) % 11) for i in range(depth)))
        fits = (lambda old, new, kept: all(rule(old, new, kept) for rule in rules)) if rules else None
        required = required_layers(text, family)
        return plan_pruning(
            scores, num_prune=count + more, num_merge=0, protect_first=0, protect=required, fits=fits
        ).keep

    for seed in range(11):
        found["free"] = choose(seed, [own] if own else [])
        if verdict_of(config, found["free"]).status != "ok":
            break
    if engine is not None:
        for more in range(count + 1):
            with contextlib.suppress(PlanError):
                found["portable"] = choose(0, both, more)
                break
    return found


class Source:
    """A tiny random model of one type, saved in the form of published models.

    Args:
        engine: The running engine.
        model_type: A type of tests/families.py.
        options: Config fields in addition to those of tests/families.py.
        folder: Where to save the model.

    Attributes:
        model: The model.
        folder: Folder of the checkpoint.
        vocabulary: Files of the tokenizer.
        prompts: Random token ids.
    """

    def __init__(self, engine: Engine, model_type: str, options: dict[str, Any], folder: Path) -> None:
        sys.path.insert(0, str(ROOT / "tests"))
        import torch
        from families import make_config, make_family_model

        options = dict(options)
        kind = "spm" if model_type in SENTENCEPIECE else "pieces" if model_type == "gemma4_text" else "bpe"
        vocab = BPE_VOCAB if kind == "bpe" else SPM_VOCAB
        if model_type in ("gemma3n_text", "gemma4_text"):
            options["vocab_size_per_layer_input"] = vocab
        rope = getattr(make_config(model_type, **options), "rope_parameters", None) or {}
        # Not the default theta, which a reader could assume without reading the config.
        if "rope_theta" in rope and model_type not in DEFAULT_THETA:
            options["rope_parameters"] = rope | {"rope_theta": ROPE_THETA}
        self.model = make_family_model(model_type, seed=SEED, vocab_size=vocab, **options)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if re.search(r"[qk]_proj\.weight$", name):
                    parameter.mul_(4)  # makes attention less uniform
        self.folder = folder
        self.model.save_pretrained(folder)
        as_published(folder, model_type)
        self.vocabulary = list((engine.folder / kind).iterdir())
        self.add_tokenizer(folder)
        generator = torch.Generator().manual_seed(SEED)
        tokens = torch.randint(300, 500, (PROMPT_TOKENS[-1],), generator=generator).tolist()
        self.prompts = [tokens[:length] for length in PROMPT_TOKENS]

    def add_tokenizer(self, folder: Path) -> None:
        """Copies the tokenizer into another folder."""
        for path in self.vocabulary:
            (folder / path.name).write_bytes(path.read_bytes())


def one_family(
    engine: Engine, model_type: str, options: dict[str, Any], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yields one record per plan."""
    from transformers import AutoModelForCausalLM

    from gradpruner.plans.layer_plan import PruningPlan
    from gradpruner.pruning.on_disk import prune_checkpoint

    options = dict(options)
    count, dropped = options.pop("PRUNED", PRUNED), options.pop("DROP", ())
    source = Source(engine, model_type, options, folder / "source")
    target, again = folder / "pruned", folder / "again"
    config, depth = source.model.config, source.model.config.num_hidden_layers

    def row(name: str, keep: tuple[int, ...], model_folder: Path) -> dict[str, Any]:
        verdict = verdict_of(config, keep)
        found = compare(engine, model_folder, source.prompts, options=OPTIONS.get(model_type, ()))
        return {
            "model_type": model_type,
            "layers": depth,
            "plan": name,
            "pruned": sorted(set(range(depth)) - set(keep)),
            "verdict": verdict.status,
            "also_unpruned": verdict.also_unpruned,
            "reason": verdict.reason,
            **found,
            "as_said": found["outcome"] in expected_outcomes(verdict.status),
        }

    for name, keep in plans(config, count, dropped).items():
        if name != "unpruned":
            prune_checkpoint(source.folder, target, PruningPlan.from_keep(depth, keep), verify="structure")
        yield row(name, keep, source.folder if name == "unpruned" else target)
    if verdict_of(config, keep).status == "ok":
        AutoModelForCausalLM.from_pretrained(target, dtype="float32").save_pretrained(again)
        source.add_tokenizer(again)
        yield row("saved again", keep, again)


def as_published(folder: Path, model_type: str) -> None:
    """Adds what published models of this type have and transformers does not write."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= RAW_FIELDS.get(model_type, {})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if model_type == "gemma3n_text":  # layers that share keys and values still have unused weights for them
        tensors = load_file(folder / "model.safetensors")
        last = config["num_hidden_layers"] - config["num_kv_shared_layers"] - 1
        for layer in range(last + 1, config["num_hidden_layers"]):
            for part in ("k_proj", "v_proj", "k_norm"):
                name = f"self_attn.{part}.weight"
                tensors[f"model.layers.{layer}.{name}"] = tensors[f"model.layers.{last}.{name}"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def families(engine: Engine, only: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model_type, options in subjects(only):
        with tempfile.TemporaryDirectory(dir=engine.folder) as folder:
            try:
                for row in one_family(engine, model_type, options, Path(folder)):
                    rows.append(row)
                    show_family(row)
            except Exception:
                print(model_type, options, traceback.format_exc(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine_options(parser)
    parser.add_argument("--model", type=Path, help="a trained model of 16 layers or so")
    parser.add_argument("--pre", default="gpt-2", help="pre-tokenizer of --model, as llama.cpp calls it")
    parser.add_argument("--only", nargs="*", default=[], help="these families; 'none' for no family")
    parser.add_argument("--update", action="store_true", help="replace only what was run in that file")
    args = parser.parse_args()
    # Drop this folder from the path: `import gguf` must find the library and not this file.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if not args.converter or not args.python:
        parser.error("--converter and --python are needed")
    from gradpruner.common.provenance import provenance

    with running(args) as engine:
        result: dict[str, Any] = {
            "what": "pruned checkpoints converted to GGUF and run by llama.cpp, against transformers",
            "versions": versions_of(engine, args.converter_name),
            "config": {"prompt_tokens": list(PROMPT_TOKENS), "same_up_to": AGREES},
        }
        if args.model:
            result["trained"] = trained(engine, args.model, args.pre, engine.folder)
        result["families"] = [] if args.only == ["none"] else families(engine, args.only)
    result["provenance"] = provenance(SEED)
    if args.json and args.update:
        result = updated(json.loads(args.json.read_text(encoding="utf-8")), result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
