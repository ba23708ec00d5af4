"""Dense and pruned variants on real tasks: full fine-tuning and LoRA, three seeds.

    python benchmarks/real_tasks.py sweep --model M --data D --work W     learning rates, dense model only
    python benchmarks/real_tasks.py run   --model M --data D --work W     the comparison
    python benchmarks/real_tasks.py table                                 Markdown from the committed JSON

D holds one folder per task in its hub schema. Every cell is an ordinary `gradpruner.run`, so an interrupted
benchmark resumes; cells whose result is committed are skipped. `--only trec/full/0` selects cells. Several
processes may share W if they work on different cells. The sweep chooses learning rates on a held-out part of
the training split and never reads the test split.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VARIANTS = ["dense", "merged", "dropped", "random", "last", "shortgpt"]
LABELS = {
    "dense": "dense (16 layers)",
    "merged": "GradPruner, pruned + merged",
    "dropped": "GradPruner, no merging",
    "random": "random layers",
    "last": "last layers",
    "shortgpt": "ShortGPT",
}
# Committed cells use the name that this row had before it was named after its method.
FORMER_NAMES = {"block_influence": "shortgpt"}
MODES = ("full", "lora")
SEEDS = (0, 1, 2)
# Rows and epochs are what two slow cores can do in a few hours, and the same for every variant.
TASKS: dict[str, dict[str, Any]] = {
    "trec": {"train_limit": 1000, "eval_limit": 500, "epochs": 3},
    "financial_phrasebank": {"train_limit": 1000, "eval_limit": 400, "epochs": 3},
    "fingpt_sentiment": {"train_limit": 600, "eval_limit": 300, "epochs": 3},
}
# The tasks' own prompts list the answers. That instructs a large model, but only slows down a tiny one.
SHORT_PROMPT = {"trec": "Question: ", "financial_phrasebank": "Sentence: "}
SWEEP = {"full": (3e-4, 1e-3, 2e-3, 4e-3), "lora": (1e-3, 3e-3, 1e-2)}
SWEEP_TASK = "trec"


def recipe_values(args: argparse.Namespace, task: str, mode: str, seed: int, rate: float) -> dict[str, Any]:
    shape = TASKS[task]
    return {
        "title": f"{task}, {mode}, seed {seed}",
        "seed": seed,
        "model": {"path": args.model},
        "data": {
            "train": str(Path(args.work) / "data" / task / "train.jsonl"),
            "eval": str(Path(args.work) / "data" / task / "test.jsonl"),
            "train_limit": shape["train_limit"],
            "eval_limit": shape["eval_limit"],
            "max_length": 192,
        },
        "finetune": {
            "mode": mode,
            "learning_rate": rate,
            "batch_size": 16,
            "accumulation": 1,
            "epochs": shape["epochs"],
            "save_steps": None,
        },
        "evaluate": {"metrics": ["exact_match"], "before_finetuning": False},
        "variants": VARIANTS,
        "keep_models": "none",
    }


def carry_out(values: dict[str, Any]) -> dict[str, Any]:
    from gradpruner.runs.pipeline import run
    from gradpruner.runs.recipe.recipe import check_recipe

    return run(check_recipe(values), command="benchmarks/real_tasks.py")


def sweep(args: argparse.Namespace) -> None:
    held_out = split_training_rows(Path(args.work) / "data" / SWEEP_TASK)
    rows = []
    for mode in MODES:
        for rate in SWEEP[mode]:
            values = recipe_values(args, SWEEP_TASK, mode, 0, rate)
            values["data"]["train"] = str(held_out / "train.jsonl")
            values["data"]["eval"] = str(held_out / "test.jsonl")
            values["variants"] = ["dense"]
            values["out"] = str(Path(args.work) / f"sweep-{mode}-{rate:g}")
            record = carry_out(values)
            accuracy = record["variants"]["dense"]["evaluation"]["metrics"]["exact_match"]["value"]
            rows.append({"mode": mode, "learning_rate": rate, "exact_match": accuracy})
            print(rows[-1], flush=True)
    best = {
        mode: max((r for r in rows if r["mode"] == mode), key=lambda r: r["exact_match"])["learning_rate"]
        for mode in MODES
    }
    write(
        "learning_rates.json",
        {
            "what": f"dense model, {SWEEP_TASK}, seed 0, trained and measured on parts of the training split",
            "task": TASKS[SWEEP_TASK],
            "rows": rows,
            "best": best,
            "provenance": record["provenance"],
        },
    )


def short_prompt(task: str, prompt: str) -> str:
    """Returns the prompt without the list of answers."""
    marker = SHORT_PROMPT.get(task, "")
    return marker + prompt.rpartition(marker)[2] if marker else prompt


def write_rows(
    args: argparse.Namespace, tasks: Iterable[str], shorten: Callable[[str, str], str] = short_prompt
) -> None:
    """Writes the tasks' rows as prompt/completion files, with shortened prompts."""
    from gradpruner.data.tasks import TASKS as KNOWN
    from gradpruner.data.tasks import load_task

    for task in tasks:
        splits = {"train": KNOWN.find(task).train_split, "test": KNOWN.find(task).eval_split}
        for name, split in splits.items():
            path = Path(args.work) / "data" / task / f"{name}.jsonl"
            if path.exists():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = []
            for example in load_task(task, Path(args.data) / task, split).examples:
                prompt = shorten(task, example.prompt)
                rows.append({"prompt": prompt, "completion": example.answer, "choices": example.choices})
            staged = path.with_suffix(f".{os.getpid()}")
            staged.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            staged.replace(path)


def split_training_rows(folder: Path) -> Path:
    """Splits the training split in two, so that the choice of a learning rate never sees the test split."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(lines) * 4 // 5
    target = folder / "sweep"
    target.mkdir(exist_ok=True)
    (target / "train.jsonl").write_text("".join(lines[:cut]), encoding="utf-8")
    (target / "test.jsonl").write_text("".join(lines[cut:]), encoding="utf-8")
    return target


def compare(args: argparse.Namespace) -> None:
    rates = json.loads((RESULTS / "learning_rates.json").read_text(encoding="utf-8"))["best"]
    for task in TASKS:
        for seed in SEEDS:
            for mode in MODES:
                cell = f"{task}/{mode}/{seed}"
                if args.only and not any(cell.startswith(only) for only in args.only):
                    continue
                if (RESULTS / "real_tasks" / f"{cell.replace('/', '-')}.json").exists() and not args.again:
                    continue
                values = recipe_values(args, task, mode, seed, rates[mode])
                values["out"] = str(Path(args.work) / cell.replace("/", "-"))
                record = carry_out(values)
                write(f"real_tasks/{cell.replace('/', '-')}.json", condensed(record))
                print(cell, {v: round(score_of(r), 3) for v, r in record["variants"].items()}, flush=True)


def condensed(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the run record without loss curves, and with names in place of paths."""
    record = json.loads(json.dumps(record))
    for row in record["variants"].values():
        if row["finetune"]:
            row["finetune"].pop("losses")
    name = Path(record["model"]["path"]).name
    record["model"]["path"] = record["recipe"]["model"]["path"] = name
    task = Path(record["recipe"]["data"]["train"]).parent.name
    record["recipe"]["out"] = Path(record["recipe"]["out"]).name
    for part in ("train", "eval"):
        name = f"{task}/{Path(record['recipe']['data'][part]).name}"
        record["recipe"]["data"][part] = record["data"][part]["source"] = name
    return record


def task_of(cell: dict[str, Any]) -> str:
    return str(cell["recipe"]["data"]["train"]).partition("/")[0]


def score_of(row: dict[str, Any]) -> float:
    return float(row["evaluation"]["metrics"]["exact_match"]["value"])


def write(name: str, value: dict[str, Any]) -> None:
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def load_cells() -> list[dict[str, Any]]:
    cells = [
        json.loads(p.read_text(encoding="utf-8")) for p in sorted((RESULTS / "real_tasks").glob("*.json"))
    ]
    for cell in cells:
        cell["variants"] = {FORMER_NAMES.get(name, name): row for name, row in cell["variants"].items()}
    return cells


def table(_: argparse.Namespace) -> None:
    print(markdown(load_cells()))


def markdown(cells: list[dict[str, Any]]) -> str:
    """Returns a table of mean and range of seeds: a row per variant, a column per task and mode measured."""
    columns = [
        (task, mode, chosen)
        for task in TASKS
        for mode in MODES
        if (
            chosen := [
                cell for cell in cells if task_of(cell) == task and cell["recipe"]["finetune"]["mode"] == mode
            ]
        )
    ]
    names = [f"{task}, {mode} ({len(chosen)} seed{'s'[: len(chosen) > 1]})" for task, mode, chosen in columns]
    lines = [f"| exact match, % | {' | '.join(names)} |", "|---" * (len(columns) + 1) + "|"]
    for variant in VARIANTS:
        entries = [
            mean_and_range([100 * score_of(c["variants"][variant]) for c in chosen])
            for _, _, chosen in columns
        ]
        lines.append(f"| {LABELS[variant]} | {' | '.join(entries)} |")
    majority = [
        mean_and_range([100 * cell["reference"]["majority_class"] for cell in chosen])
        for _, _, chosen in columns
    ]
    lines.append(f"| always the most frequent answer | {' | '.join(majority)} |")
    return "\n".join(lines)


def mean_and_range(values: list[float]) -> str:
    mean, low, high = statistics.mean(values), min(values), max(values)
    return f"{mean:.1f}" if low == high else f"{mean:.1f} ({low:.1f} to {high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sweep", "run", "table"))
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--work", default="runs/real_tasks")
    parser.add_argument("--again", action="store_true", help="also redo cells whose result is committed")
    parser.add_argument("--only", nargs="*", help="cells such as trec/full/0, or a prefix")
    args = parser.parse_args()
    if args.what != "table" and not (args.model and args.data):
        parser.error("--model and --data are needed")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.what != "table":
        write_rows(args, TASKS)
    {"sweep": sweep, "run": compare, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
