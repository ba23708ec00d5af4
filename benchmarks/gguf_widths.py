"""Width-pruned checkpoints in llama.cpp: converted to GGUF, run, and compared with transformers.

    python benchmarks/gguf_widths.py --converter llama.cpp --python engine/bin/python --json FILE
    python benchmarks/gguf_widths.py --converter llama.cpp --python engine/bin/python --only granite olmo

`--converter` and `--python` are as for `gguf.py`. A tiny random model of every family in the table of
`gradpruner.models.engines` whose heads and channels can be pruned runs unpruned and with each of `PLANS`. The
results are compared with the verdicts of `models.engine_widths`: "ok" must compute the same as transformers,
"wrong" must differ, "refused" must not load. In the unpruned model and with "heads and hidden", the head size
equals hidden size / heads; the other plans show which readers derive it that way. Families that llama.cpp
computes wrongly even unpruned (attention windows) are left to `gguf.py`. A trained Llama (`--model`; skipped
without) is narrowed in the same ways.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_engine import (
    AGREES,
    SEED,
    compare,
    engine_options,
    expected_outcomes,
    running,
    verdict_of,
    versions_of,
)

HERE = Path(__file__).resolve().parent
# Import gguf.py of this folder under another name, because `import gguf` means the library.
_SPEC = importlib.util.spec_from_file_location("gguf_benchmark", HERE / "gguf.py")
assert _SPEC is not None and _SPEC.loader is not None
base = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(base)

UNEVEN = ("channels differ", "heads differ")
PLANS = ("kv groups", "query heads", "channels", "hidden", "heads and hidden", *UNEVEN)


def make_plan(whole: Any, name: str) -> Any:
    """Returns a plan that keeps half the units (not just the first half) of every, or every second, layer.

    Raises:
        PlanError: If there is only one KV head, or only one query head per KV head.
    """
    from gradpruner.common.errors import PlanError
    from gradpruner.plans.width_plan import LayerWidths

    shape, full = whole.shape, whole.layers[0]
    groups = shape.heads_of(range(shape.num_kv_heads // 2, shape.num_kv_heads))
    within = tuple(h for g in range(shape.num_kv_heads) for h in shape.group(g)[shape.group_size // 2 :])
    chosen = {"query heads": within, "kv groups": groups, "heads and hidden": groups, "heads differ": groups}
    heads = chosen.get(name, full.heads)
    if name in chosen and len(heads) == shape.num_heads:
        raise PlanError(f"{shape.num_heads} heads and {shape.num_kv_heads} KV heads are too few.")
    channels = tuple(range(1, shape.intermediate_size, 2)) if "channels" in name else full.channels
    half = LayerWidths(heads, channels)
    layers = [full if name in UNEVEN and layer % 2 else half for layer in range(shape.num_layers)]
    hidden = whole.hidden
    if name == "hidden":
        hidden = hidden[1::2]
    elif name == "heads and hidden":
        hidden = hidden[-len(heads) * shape.head_dim :]
    return dataclasses.replace(whole, layers=tuple(layers), hidden=hidden, method="explicit")


def narrowed(
    engine: Any,
    source: Path,
    bare: Path,
    vocabulary: list[Path],
    config: Any,
    whole: Any,
    folder: Path,
    prompts: list[Any],
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Yields one record for the unpruned model and for every plan.

    Args:
        engine: The running engine.
        source: Folder of the unpruned checkpoint.
        bare: Folder of the same checkpoint, to prune; without a tokenizer that transformers cannot load.
        vocabulary: Files of that tokenizer, to add after pruning.
        config: Config of the unpruned model.
        whole: The plan that keeps everything.
        folder: Folder for pruned checkpoints.
        prompts: As for `compare`.
        how: Further options of `compare`.
    """
    from gradpruner.common.errors import GradPrunerError
    from gradpruner.models.engine_widths import portability_of
    from gradpruner.models.engines import layer_facts
    from gradpruner.pruning.widths_on_disk import prune_width_checkpoint

    for name in ("unpruned", *PLANS):
        target = source if name == "unpruned" else folder / name.replace(" ", "-")
        try:
            plan = whole if name == "unpruned" else make_plan(whole, name)
            if name != "unpruned":
                prune_width_checkpoint(bare, target, plan, name="source")
                for path in vocabulary:
                    shutil.copy(path, target)
        except GradPrunerError as error:
            fault = f"{type(error).__name__}: {error}".replace(f"{folder}/", "")[:160]
            yield {"plan": name, "outcome": "not pruned", "error": fault}
            continue
        if not plan.uniform:  # transformers cannot load it, so only check whether llama.cpp does
            found = loads(engine, target, prompts, **how)
        else:
            found = compare(engine, target, prompts, **how)
        verdict = next(v for v in portability_of(plan, layer_facts(config)) if v.engine == "llama.cpp")
        widths = dataclasses.asdict(plan.widths) if plan.uniform else None
        yield {
            "plan": name,
            "widths": widths,
            "verdict": verdict.status,
            "reason": verdict.reason,
            **found,
            "as_said": found["outcome"] in expected_outcomes(verdict.status),
        }


def loads(engine: Any, model: Path, prompts: list[Any], **how: Any) -> dict[str, Any]:
    """Checks whether llama.cpp loads a checkpoint that plain transformers cannot load."""
    file, arrays, answer = (str(engine.folder / name) for name in ("model.gguf", "out.npz", "answer.json"))
    Path(file).unlink(missing_ok=True)
    how = {"outtype": "f32", "pre": "", "options": [], **how}
    if fault := engine.do("convert", model=str(model), gguf=file, **how):
        return {"outcome": "not converted", "error": fault}
    vocab = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    job = {"vocab": vocab, "new": 1, "exact": True, "prompts": prompts, "arrays": arrays, "answer": answer}
    fault = engine.do("generate", gguf=file, **job)
    return {"outcome": "not loaded", "error": fault} if fault else {"outcome": "loaded"}


def one_family(
    engine: Any, model_type: str, options: dict[str, Any], folder: Path
) -> Iterator[dict[str, Any]]:
    """Yields the records of a family, or one that says why there are none."""
    from gradpruner.common.errors import GradPrunerError
    from gradpruner.models.widths import WidthView

    options = {key: value for key, value in options.items() if key not in ("PRUNED", "DROP")}
    source = base.Source(engine, model_type, options, folder / "source")
    depth = source.model.config.num_hidden_layers
    head = {"model_type": model_type, "layers": depth}
    try:
        whole = WidthView(source.model).whole()
    except GradPrunerError as error:
        yield head | {"plan": "none", "outcome": "not pruned", "error": str(error)[:160]}
        return
    verdict = verdict_of(source.model.config, tuple(range(depth)))
    if verdict.status == "wrong":
        yield head | {"plan": "none", "outcome": "wrong unpruned", "error": verdict.reason}
        return
    how = {"options": list(base.OPTIONS.get(model_type, ()))}
    config = source.model.config
    names = [path.name for path in source.vocabulary]
    bare = shutil.copytree(source.folder, folder / "bare", ignore=lambda *_: names)
    places = (source.folder, bare, source.vocabulary)
    for row in narrowed(engine, *places, config, whole, folder, source.prompts[-1:], **how):
        yield head | row


def families(engine: Any, only: list[str]) -> list[dict[str, Any]]:
    rows = []
    for model_type, options in base.subjects(only):
        if options.get("query_pre_attn_scalar"):
            continue  # deep Gemmas whose depth is none of those that llama.cpp recognises
        with tempfile.TemporaryDirectory(dir=engine.folder) as folder:
            try:
                for row in one_family(engine, model_type, options, Path(folder)):
                    rows.append(row)
                    show(row)
            except Exception:
                print(model_type, options, traceback.format_exc(), flush=True)
    return rows


def trained(engine: Any, model: Path, pre: str, folder: Path) -> list[dict[str, Any]]:
    """Returns the records of a trained model, in float32."""
    from gradpruner.models.loading import load_model
    from gradpruner.models.widths import WidthView

    loaded = load_model(model)
    config, whole, rows = loaded.config, WidthView(loaded).whole(), []
    for row in narrowed(engine, model, model, [], config, whole, folder, base.TEXTS, pre=pre):
        rows.append({"model_type": config.model_type, "layers": config.num_hidden_layers, **row})
        show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    measured = f"{row['relative_error']:.1e}" if "relative_error" in row else row.get("error", "")
    mark = "" if row.get("as_said", True) else "  <-- NOT AS SAID"
    print(
        f"{row['model_type']:17} {row['layers']:3} layers  {row['plan']:21} {row.get('verdict', '-'):8} "
        f"{row['outcome']:14} {measured}{mark}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engine_options(parser)
    parser.add_argument("--model", type=Path, help="a trained Llama")
    parser.add_argument("--pre", default="gpt-2", help="pre-tokenizer of --model, as llama.cpp calls it")
    parser.add_argument("--only", nargs="*", default=[], help="these families; 'none' for no family")
    args = parser.parse_args()
    if not args.converter or not args.python:
        parser.error("--converter and --python are needed")
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from gradpruner.common.provenance import provenance

    with running(args) as engine:
        result: dict[str, Any] = {
            "what": "width-pruned checkpoints converted to GGUF and run by llama.cpp, against transformers",
            "versions": versions_of(engine, args.converter_name),
            "config": {"prompt_tokens": base.PROMPT_TOKENS[-1], "same_up_to": AGREES, "plans": PLANS},
        }
        if args.model:
            result["trained"] = trained(engine, args.model, args.pre, engine.folder)
        result["families"] = [] if args.only == ["none"] else families(engine, args.only)
    result["provenance"] = provenance(SEED)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
