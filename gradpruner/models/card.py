"""The model card: the README.md in every model folder we write, which the hub shows for a pushed model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradpruner.common.printing import runs_of
from gradpruner.common.ranking import method_and_choice
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import Plan
from gradpruner.plans.width_plan import WidthPlan

CARD_FILE = "README.md"
UNKNOWN_LICENCE = "unknown"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_IN_CACHE = re.compile(r"models--(.+?)--(.+?)/snapshots/")
# What a model inherits from the model it was made from.
_INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Base:
    """The model that was pruned or tuned.

    Attributes:
        name: The folder or hub id that the user gave.
        hub_id: Its hub id, or the hub id of the model it was made from; None if neither is known.
        metadata: Licence and languages from its own card.
    """

    name: str
    hub_id: str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Figure:
    """One measured metric as fractions: its value, the ends of its 95 % interval, the dense model's value."""

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    dense: float | None = None


@dataclass(frozen=True)
class Results:
    """How the model was trained and measured.

    Attributes:
        rows: Source of the test rows.
        trained_on: Source of the training rows.
        figures: The metrics, headline first.
        versions: Package name -> version the model was made with.
        prompt: An example prompt, formatted as in the measurement.
        repo: The repository the model is pushed to.
    """

    task: str
    rows: str
    num_rows: int | None
    trained_on: str
    figures: tuple[Figure, ...]
    versions: Mapping[str, str]
    prompt: str | None = None
    repo: str | None = None


def base_of(source: str, folder: Path | None = None) -> Base:
    """Returns what is known about the base model `source`; the card in `folder` gives its licence."""
    known = card_metadata(folder) if folder is not None else {}
    cached = _IN_CACHE.search(str(folder or source))
    if cached:
        hub_id: str | None = f"{cached[1]}/{cached[2]}"
    elif _HUB_ID.fullmatch(source) and not Path(source).exists():
        hub_id = source
    else:
        named = known.get("base_model")
        named = named[0] if isinstance(named, list) and len(named) == 1 else named
        hub_id = named if isinstance(named, str) and _HUB_ID.fullmatch(named) else None
    kept = {key: known[key] for key in _INHERITED if key in known}
    if kept.get("license") == UNKNOWN_LICENCE:
        del kept["license"]
    return Base(source, hub_id, kept)


def untuned(facts: Mapping[str, Any]) -> str | None:
    """Returns the source in a `pruning.json`; if that was only fine-tuned, the model that was; or None."""
    before = _section(facts, "previous")
    source = (None if before.get("plan") else before.get("source")) or facts.get("source")
    return source if isinstance(source, str) else None


def _section(facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = facts.get(key)
    return found if isinstance(found, Mapping) else {}


def card_metadata(folder: Path) -> dict[str, Any]:
    """Returns the metadata of a folder's card; {} if there is no card or it cannot be read."""
    from huggingface_hub import metadata_load

    path = folder / CARD_FILE
    try:
        found = metadata_load(path) if path.is_file() and path.stat().st_size < 2**22 else None
    except Exception:  # somebody else's YAML raises errors of many types
        return {}
    return {str(key): value for key, value in (found or {}).items() if _plain_value(value)}


def _plain_value(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def model_card(
    base: Base, plan: Plan | None, facts: Mapping[str, Any], results: Results | None = None
) -> str:
    """Returns the whole card as text.

    Args:
        base: The model it was made from.
        plan: None for a dense model.
        facts: `portability`, `repair`, `previous` and `finetune` of `pruning.json`.
        results: None if nothing has been measured yet.
    """
    kind = {None: "fine-tuned", "width": "pruned", "layers": "depth-pruned"}[plan.kind if plan else None]
    name = base.hub_id or base.name
    lines = [
        "---",
        _metadata(base, results),
        "---",
        "",
        f"# {plain(Path(name).name)}, {kind} with GradPruner",
        "",
    ]
    lines += _origin(base)
    lines += [""] + (_results(results) if results else [])
    lines += ["## How it was made", ""] if results else []
    if plan is None:
        lines += ["All layers are kept."]
    else:
        lines += _width_lines(plan) if plan.kind == "width" else _depth_lines(plan, facts)
    if results and results.versions:
        made_with = ", ".join(f"{plain(name)} {plain(version)}" for name, version in results.versions.items())
        lines += ["", f"With {made_with}."]
    lines += ["", "## Use", "", *_use(plan, results)]
    engines = [
        f"- {entry['engine']}: {entry['status']}. {entry['reason'].replace('<', '&lt;')}".rstrip()
        for entry in facts.get("portability", ())
    ]
    lines += ["", "Where it can be served:", "", *engines] if engines else []
    return "\n".join([*lines, ""])


def plain(value: Any) -> str:
    """Returns a value as one line of Markdown that shows it literally: no tags, links or headings."""
    line = "".join(c if c.isprintable() else " " for c in str(value))
    return re.sub(r"([\\`*\[\]|~#!])", r"\\\1", line.replace("&", "&amp;").replace("<", "&lt;"))


def _metadata(base: Base, results: Results | None) -> str:
    """Returns the front matter, written by the hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData

    measured = []
    if results is not None:
        kind = re.sub(r"[^A-Za-z0-9._/-]+", "-", results.task) or "custom"
        rows = {"rows": results.num_rows, "source": results.rows}
        measured = [
            EvalResult(
                task_type="text-generation",
                dataset_type=kind,
                dataset_name=results.task,
                dataset_split="test",
                dataset_args=rows,
                metric_type=figure.metric,
                metric_name=figure.metric.replace("_", " "),
                metric_value=round(figure.value, 6),
            )
            for figure in results.figures
        ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gradpruner", "pruning"],
        base_model=base.hub_id,
        model_name=(results and results.repo) or base.name if measured else None,
        eval_results=measured or None,
        **{"license": UNKNOWN_LICENCE, **(base.metadata or {})},
    )
    return str(data.to_yaml(line_break="\n"))


def _origin(base: Base) -> list[str]:
    local = plain(Path(base.name).name)
    if not base.hub_id:
        made = f"Made from {local}, whose name on the hub is not known."
    elif base.hub_id == base.name or _IN_CACHE.search(base.name):
        made = f"Made from {plain(base.hub_id)}."
    else:
        made = f"Made from {local}, which was made from {plain(base.hub_id)}."
    if (base.metadata or {}).get("license"):
        return [f"{made} The licence is that of the base model."]
    return [f"{made} Its licence is not known: look it up before you share this model."]


def _results(results: Results) -> list[str]:
    rows = f"{results.num_rows:,} test rows" if results.num_rows else "test rows"
    lines = [
        "## Results",
        "",
        f"Task: {plain(results.task)}. Trained on {plain(results.trained_on)}, measured on {rows} "
        f"({plain(results.rows)}) with greedy decoding.",
        "",
        "| metric | this model | 95 % interval | before pruning |",
        "|---|---|---|---|",
    ]
    for figure in results.figures:
        known = figure.low is not None and figure.high is not None
        between = f"{figure.low:.1%} to {figure.high:.1%}" if known else "not measured"
        dense = "not measured" if figure.dense is None else f"{figure.dense:.1%}"
        metric = plain(figure.metric.replace("_", " "))
        lines.append(f"| {metric} | {figure.value:.1%} | {between} | {dense} |")
    return [*lines, ""]


def _use(plan: Plan | None, results: Results | None) -> list[str]:
    """Returns a snippet that loads the model and, if an example prompt is known, asks it."""
    where = repr(results.repo if results and results.repo else "this folder")
    uneven = plan is not None and not plan.uniform
    if uneven:
        loads = ["from gradpruner import load_model", "", f"model = load_model({where})"]
        note = [
            "A config cannot describe layers of different widths. Load the model with GradPruner, which runs",
            "no code from this folder; plain transformers refuses the shapes of its tensors:",
        ]
    else:
        loads = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({where})",
        ]
        note = ["It loads with `AutoModelForCausalLM.from_pretrained`, without custom code."]
    if results and results.prompt and not uneven:
        loads += [
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
            f"prompt = {results.prompt!r}".replace("```", "` ` `"),
            'inputs = tokenizer(prompt, return_tensors="pt")',
            "answer = model.generate(**inputs, max_new_tokens=32, do_sample=False)",
            'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    return [*note, "", "```python", *loads, "```"]


def _depth_lines(plan: PruningPlan, facts: Mapping[str, Any]) -> list[str]:
    repair, before, tuning = (_section(facts, key) for key in ("repair", "previous", "finetune"))
    lines = ["The model was fine-tuned before it was pruned."] if before.get("finetune") else []
    lines += [
        f"{len(plan.pruned)} of {plan.num_layers} decoder layers were removed: {runs_of(plan.pruned)}.",
        f"Method: {plain(method_and_choice(plan.method, plan.evidence))}. Kept: {runs_of(plan.keep)}.",
    ]
    for target, layers in plan.merged.items():
        lines.append(
            f"Layers {runs_of(layers)} were merged into layer {target} "
            f"(rule {plan.rule}, density {plan.density:g})."
        )
    refitted = [cut["layer"] for cut in repair.get("cuts", ()) if cut["ridge"] is not None]
    if refitted:
        how = plain(repair["kind"]).replace("_", " ")
        lines.append(
            f"Repaired ({how}, {plain(repair['rows'])} rows of the task): the last weights of layers "
            f"{runs_of(refitted)} were refitted to make up for the removed layers."
        )
    if tuning and _section(tuning, "kept").get("model") != "pruned":
        lines.append("Then it was fine-tuned.")
    return [
        *lines,
        "",
        "`pruning.json` holds the complete plan. Depth pruning keeps classification and short answers well;",
        "multi-step reasoning suffers far more, and fine-tuning does not bring all of it back.",
    ]


def _width_lines(plan: WidthPlan) -> list[str]:
    def kept(what: str, numbers: Sequence[int], total: int) -> str:
        low, high = min(numbers), max(numbers)
        return f"- {what}: {low if low == high else f'{low} to {high}'} of {total}"

    shape, layers = plan.shape, range(plan.num_layers)
    return [
        f"All {plan.num_layers} decoder layers are kept but narrower. Method: {plain(plan.method)}. "
        "Per layer:",
        "",
        kept("query heads", [len(w.heads) for w in plan.layers], shape.num_heads),
        kept("key/value heads", [len(plan.kv_heads(i)) for i in layers], shape.num_kv_heads),
        kept("MLP channels", [len(w.channels) for w in plan.layers], shape.intermediate_size),
        kept("hidden dimensions (the same in all layers)", [len(plan.hidden)], shape.hidden_size),
        "",
        "`pruning.json` holds the complete plan.",
    ]
