"""All methods at the same budget on real tasks: full fine-tuning and LoRA, three seeds.

    python benchmarks/comparison.py run --model M --data D --work W       one study per task and mode
    python benchmarks/comparison.py run ... --only trec/lora              some of them
    python benchmarks/comparison.py table                                 Markdown from the committed JSON

D holds one folder per task in its hub schema. Every study is a run of `gradpruner compare`, so an interrupted
one resumes; studies whose result is committed are skipped. Several processes may share W if they work on
different studies. The number of rows, the same for all methods, is what two slow cores can do in an hour.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from real_tasks import MODES, RESULTS, SEEDS, short_prompt, write, write_rows

from gradpruner.common.printing import readable_bytes

FOLDER = RESULTS / "comparison"
# Rows, epochs and rates (full, LoRA) with which the dense model learns in the time available, chosen on
# held-out parts of the training rows (docs/comparison.md lists exceptions). They differ by task, but not by
# method. The tasks: types of questions, sentiment with two sets of answers, and free-form summaries.
TASKS: dict[str, dict[str, Any]] = {
    "trec": {
        "rows": 600, "epochs": 2, "eval_rows": 200, "max_length": 192, "metric": "exact_match",
        "batch_size": {"full": 8, "lora": 8}, "rate": {"full": 1e-3, "lora": 3e-3},
    },
    "fingpt_sentiment": {
        "rows": 192, "epochs": 1, "eval_rows": 200, "max_length": 192, "metric": "exact_match",
        "batch_size": {"full": 4, "lora": 2}, "rate": {"full": 1e-3, "lora": 2e-3},
    },
    "scitldr": {
        "rows": 192, "epochs": 1, "eval_rows": 100, "max_length": 128, "metric": "rouge_l",
        "batch_size": {"full": 4, "lora": 4}, "rate": {"full": 1e-3, "lora": 3e-3},
    },
}  # fmt: skip
METRIC_NAMES = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}


def method_options(rates: dict[str, float]) -> dict[str, dict[str, Any]]:
    """Returns options that replace defaults unsuitable for this model or the time available."""
    return {
        # SLEB evaluates its samples about eighty times; with the default 128 it would outlast all the others.
        "sleb": {"num_samples": 16},
        # Learning rates for billions of parameters have no effect on a model with millions.
        "minitron_depth": {"distil_learning_rate": rates["full"]},
        "minitron_width": {"distil_learning_rate": rates["full"]},
        "apt": {"learning_rate": rates["lora"]},
    }


def recipe_values(args: argparse.Namespace, task: str, mode: str) -> dict[str, Any]:
    shape = TASKS[task]
    return {
        "title": f"{task}, {mode}",
        "model": {"path": str(Path(args.model).resolve())},
        "data": {
            "train": str(Path(args.work).resolve() / "data" / task / "train.jsonl"),
            "eval": str(Path(args.work).resolve() / "data" / task / "test.jsonl"),
            "train_limit": shape["rows"],
            "eval_limit": shape["eval_rows"],
            "max_length": shape["max_length"],
        },
        "plan": {"layer_fraction": 0.4},
        "methods": method_options(shape["rate"]),
        "finetune": {
            "mode": mode,
            "learning_rate": shape["rate"][mode],
            "batch_size": shape["batch_size"][mode],
            "accumulation": 1,
            "epochs": shape["epochs"],
            "save_steps": None,
        },
        "evaluate": {"metrics": [shape["metric"]], "before_finetuning": False},
        "verify": "structure",
        "keep_models": "none",
    }


def shorten(task: str, prompt: str) -> str:
    """Shortens a prompt; FinGPT's instruction, which names one of two answer sets, becomes its first word."""
    if task != "fingpt_sentiment":
        return short_prompt(task, prompt)
    instruction, _, text = prompt.partition("\nInput: ")
    return f"{'Degree' if 'strong' in instruction else 'Sentiment'} of: {text}"


def run(args: argparse.Namespace) -> None:
    from gradpruner.runs.recipe.recipe import check_recipe
    from gradpruner.runs.study.carrying_out import run_study
    from gradpruner.runs.study.design import make_study

    write_rows(args, TASKS, shorten)
    for task in TASKS:
        for mode in MODES:
            name = f"{task}/{mode}"
            target = FOLDER / f"{task}-{mode}.json"
            if (args.only and name not in args.only) or (target.exists() and not args.again):
                continue
            study = make_study(
                check_recipe(recipe_values(args, task, mode)),
                out=str(Path(args.work) / f"{task}-{mode}"),
                methods=["all"],
                seeds=SEEDS,
                title=f"{task}, {mode}",
            )
            found = run_study(study, command="benchmarks/comparison.py").study
            write(f"comparison/{target.name}", condensed(found, task))


def condensed(study: dict[str, Any], task: str) -> dict[str, Any]:
    """Returns the study without plans and scores, and with names in place of the paths of model and data."""
    study = json.loads(json.dumps(study))
    for point in study["points"]:
        for row in point["rows"]:
            for part in ("plans", "scores"):
                row.pop(part, None)
    name = Path(study["model"]["path"]).name
    study["model"]["path"] = study["recipe"]["model"]["path"] = name
    for part in ("train", "eval"):
        study["recipe"]["data"][part] = f"{task}/{Path(study['recipe']['data'][part]).name}"
    study["recipe"]["out"] = Path(study["recipe"]["out"]).name
    study["task"] = task
    return study


def load_studies() -> list[dict[str, Any]]:
    """Returns the committed studies in the order of tasks and modes."""
    found = []
    for task in TASKS:
        for mode in MODES:
            path = FOLDER / f"{task}-{mode}.json"
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
    return found


def metric_of(study: dict[str, Any]) -> str:
    metric: str = TASKS[study["task"]]["metric"]
    return metric


def rows_of(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in study["points"][0]["rows"]}


def markdown(studies: list[dict[str, Any]]) -> str:
    """Returns a table of mean and range of seeds: a row per method, a column per study."""
    names = [f"{study['task']}, {study['mode']} ({METRIC_NAMES[metric_of(study)]})" for study in studies]
    lines = [f"| % | {' | '.join(names)} |", "|---" * (len(studies) + 1) + "|"]
    for name, first in rows_of(studies[0]).items():
        cells = [measured(rows_of(study).get(name), metric_of(study)) for study in studies]
        lines.append(f"| {first['label']} | {' | '.join(cells)} |")
    majority = [
        f"{100 * study['reference']['majority_class']:.1f}" if metric_of(study) == "exact_match" else "-"
        for study in studies
    ]
    return "\n".join([*lines, f"| always the most frequent answer | {' | '.join(majority)} |"])


def measured(row: dict[str, Any] | None, metric: str) -> str:
    if row is None or metric not in row["metrics"]:
        return "failed" if row and row["error"] else "-"
    found = row["metrics"][metric]
    return f"{100 * found['mean']:.1f} ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def balance(studies: list[dict[str, Any]]) -> str:
    """Returns a table that compares each method with dense, last layers and GradPruner, seed by seed."""
    columns = (("dense", "dense"), ("last", "last layers"), ("merged", "GradPruner"))
    head = " | ".join(
        f"mean difference to {label}, of its value | better / equal / worse" for _, label in columns
    )
    lines = [f"| method | {head} |", "|---" * (1 + 2 * len(columns)) + "|"]
    for name, first in rows_of(studies[0]).items():
        cells = []
        for other, _ in columns:
            pairs = [pair for study in studies for pair in by_seed(study, name, other)]
            if name == other or not pairs:
                cells += ["", ""]
                continue
            # Relative differences, because points of exact match and of ROUGE are not comparable.
            differences = [100 * (a - b) / b for a, b in pairs]
            better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
            mean = statistics.mean(differences)
            cells += [f"{mean:+.1f} %", f"{better} / {len(pairs) - better - worse} / {worse}"]
        lines.append(f"| {first['label']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def by_seed(study: dict[str, Any], name: str, other: str) -> list[tuple[float, float]]:
    """Returns the values of two rows of a study, paired by seed."""
    rows = rows_of(study)
    found = [
        rows.get(row, {}).get("metrics", {}).get(metric_of(study), {}).get("per_seed", [])
        for row in (name, other)
    ]
    return [(a, b) for a, b in zip(*found, strict=False) if a is not None and b is not None]


def costs(studies: list[dict[str, Any]]) -> str:
    """Returns a table of each method's time and memory to prune, and of the pruned model's costs."""
    lines = [
        "| method | parameters removed | layers | seconds | peak memory | fine-tuning, of dense "
        "| evaluation, of dense | plain Hugging Face model |",
        "|---" * 8 + "|",
    ]
    for name, first in rows_of(studies[0]).items():
        rows = [rows_of(study)[name] for study in studies if name in rows_of(study)]
        rows = [row for row in rows if not row["error"]]
        if not rows:
            lines.append(f"| {first['label']} | failed |" + " |" * 6)
            continue
        spent = [row["costs"] for row in rows]
        cells = (
            first["label"],
            f"{100 * rows[0]['removed_share']:.1f} %",
            f"{rows[0]['num_layers']:g}",
            mid(spent, "method_seconds", "{:.1f}".format),
            mid(spent, "method_peak_memory_bytes", readable_bytes),
            mid(spent, "training_ratio", "{:.2f}x".format),
            mid(spent, "inference_ratio", "{:.2f}x".format),
            "no" if rows[0]["uniform"] is False else "yes",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mid(spent: list[dict[str, Any]], key: str, form: Callable[[float], str]) -> str:
    values = [entry[key] for entry in spent if entry.get(key) is not None]
    return form(statistics.median(values)) if values else "-"


def table(_: argparse.Namespace) -> None:
    studies = load_studies()
    print("\n\n".join(make(studies) for make in (markdown, balance, costs)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--work", default="runs/comparison")
    parser.add_argument("--again", action="store_true", help="also redo studies whose result is committed")
    parser.add_argument("--only", nargs="*", help="studies such as trec/full")
    args = parser.parse_args()
    if args.what == "run" and not (args.model and args.data):
        parser.error("--model and --data are needed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
