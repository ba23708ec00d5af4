"""Dense and pruned models on every task with local data: full fine-tuning, one seed, few rows.

    python benchmarks/all_tasks.py --model M --data D --encoder E --work W     writes results/all_tasks/*.json
    python benchmarks/all_tasks.py --only arc_easy piqa ...                    some of them

D holds one folder per task in its hub schema; E is the folder of the encoder for BERTScore. Prompts are those
of the registered tasks. Models trained on medmcqa are also measured on MMLU's clinical knowledge (the paper's
Table 12) and on GSM8K, the reasoning probe. The number of rows is what two slow cores can do in half an hour,
so intervals are wide: the benchmark shows that every task runs end to end with its metric, and which scores a
model of this size reaches.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
RESULTS = Path(__file__).parent / "results"
FOLDER = RESULTS / "all_tasks"
VARIANTS = {"dense": "dense", "merged": "pruned + merged", "dropped": "pruned, no merging"}
TRAIN, EVAL, EPOCHS, MAX_LENGTH, NEW_TOKENS = 256, 150, 2, 192, 64
TASKS = (
    "arc_challenge", "arc_easy", "financial_phrasebank", "fingpt_sentiment", "gsm8k", "hellaswag", "medmcqa",
    "piqa", "pubmedqa", "scitldr", "sst2", "trec", "winogrande",
)  # fmt: skip
LONGER = {"gsm8k": 384}  # tokens of a question with its worked answer
ALSO = {"medmcqa": {"mmlu_clinical_knowledge": 150, "gsm8k": 100}}


def recipe_values(args: argparse.Namespace, task: str, rate: float) -> dict[str, Any]:
    return {
        "title": f"{task}, full fine-tuning",
        "out": str(args.work / task),
        "model": {"path": str(args.model)},
        "data": {
            "task": task,
            "folder": str(args.data / task),
            "train_limit": TRAIN,
            "eval_limit": EVAL,
            "max_length": LONGER.get(task, MAX_LENGTH),
        },
        "finetune": {
            "learning_rate": rate,
            "batch_size": 16,
            "accumulation": 1,
            "epochs": EPOCHS,
            "save_steps": None,
        },
        "evaluate": {
            "before_finetuning": False,
            "max_new_tokens": NEW_TOKENS,
            "encoder": str(args.encoder),
            "also": [
                {"task": name, "folder": str(args.data / name), "limit": limit}
                for name, limit in ALSO.get(task, {}).items()
            ],
        },
        "variants": list(VARIANTS),
        "keep_models": "none",
    }


def condensed(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the run record without loss curves, and with names in place of paths."""
    record = json.loads(json.dumps(record))
    for row in record["variants"].values():
        if row["finetune"]:
            row["finetune"].pop("losses")
        for part in (row["evaluation"], *row["also"].values()):
            part["source"] = str(part["source"]).rpartition("/")[2]
    recipe = record["recipe"]
    record["model"]["path"] = recipe["model"]["path"] = Path(recipe["model"]["path"]).name
    recipe["out"] = Path(recipe["out"]).name
    recipe["data"]["folder"] = recipe["data"]["task"]
    recipe["evaluate"]["encoder"] = "/".join(Path(recipe["evaluate"]["encoder"]).parts[-2:])
    for entry in recipe["evaluate"]["also"]:
        entry["folder"] = entry["task"]
    for part in ("train", "eval"):
        record["data"][part]["source"] = Path(record["data"][part]["source"]).name
    return record


def load_cells() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def shown(entry: dict[str, Any]) -> str:
    return f"{100 * entry['value']:.1f} [{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]"


def markdown(cells: list[dict[str, Any]]) -> str:
    """Returns a table with a row per task and evaluation data: scores, and paired differences to dense."""
    names = list(VARIANTS.values())
    head = ["task", "metric", *names, "merged - dense, points", "dropped - dense, points"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for cell in cells:
        rows = cell["variants"]
        task = cell["recipe"]["data"]["task"]
        measured = {"task": {v: rows[v]["evaluation"] for v in VARIANTS}}
        for also in rows["dense"]["also"]:
            measured[also] = {v: rows[v]["also"][also] for v in VARIANTS}
        for name, found in measured.items():
            where = task if name == "task" else f"{task} -> {name}"
            headline = next(iter(found["dense"]["metrics"]))
            # A model this small seldom writes out an option, but may still find the right one most likely.
            for metric in (headline, "choice_accuracy"):
                if metric not in found["dense"]["metrics"]:
                    continue
                values = [shown(found[v]["metrics"][metric]) for v in VARIANTS]
                paired = [shown(rows[v]["paired"][name][metric]) for v in ("merged", "dropped")]
                lines.append(f"| {' | '.join([where, metric.replace('_', ' '), *values, *paired])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/all_tasks"))
    parser.add_argument("--only", nargs="*", default=list(TASKS), choices=TASKS)
    args = parser.parse_args()
    from gradpruner.runs.pipeline import run
    from gradpruner.runs.recipe.recipe import check_recipe

    rate = json.loads((RESULTS / "learning_rates.json").read_text(encoding="utf-8"))["best"]["full"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    for task in args.only:
        path = FOLDER / f"{task}.json"
        if path.exists():
            continue
        record = run(check_recipe(recipe_values(args, task, rate)), command="benchmarks/all_tasks.py")
        path.write_text(json.dumps(condensed(record), indent=1) + "\n", encoding="utf-8")
        print(task, {v: row["evaluation"]["metrics"] for v, row in record["variants"].items()}, flush=True)


if __name__ == "__main__":
    main()
