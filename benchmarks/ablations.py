"""The paper's ablations on the embedded miniature: those that `gradpruner ls ablations` lists, unchanged.

    python benchmarks/ablations.py run --work W                     all of them
    python benchmarks/ablations.py run --work W --only table3_merged_layers
    python benchmarks/ablations.py table                            Markdown from the committed JSON

Each ablation runs as `gradpruner ablate NAME` in its own process in folder W, so an interrupted one resumes.
Studies whose result is committed are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from real_tasks import RESULTS, write

FOLDER = RESULTS / "ablations"
METRIC = "exact_match"


def run(args: argparse.Namespace) -> None:
    from gradpruner.cli.studies import ablation_names

    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    for name in args.only or ablation_names():
        if (FOLDER / f"{name}.json").exists() and not args.again:
            continue
        print(name, flush=True)
        # No check of the exit code: it is not 0 if a row failed, and failed rows are part of the result.
        subprocess.run([sys.executable, "-m", "gradpruner", "ablate", name], cwd=work, check=False)
        found = work / "runs" / name / "study.json"
        write(f"ablations/{name}.json", condensed(json.loads(found.read_text(encoding="utf-8"))))


def condensed(study: dict[str, Any]) -> dict[str, Any]:
    """Returns the study without scores, and with names in place of the paths of model and data."""
    for point in study["points"]:
        for row in point["rows"]:
            row.pop("scores", None)
            row["kept"] = [
                [action["layer"] for action in plan["actions"] if action["action"] == "keep"]
                for plan in row.pop("plans", None) or []
                if plan and "actions" in plan
            ]
    study["model"]["path"] = study["recipe"]["model"]["path"] = "the embedded miniature"
    for part in ("train", "eval"):
        study["recipe"]["data"][part] = Path(study["recipe"]["data"][part]).name
    study["recipe"]["out"] = Path(study["recipe"]["out"]).name
    return study


def load_studies() -> dict[str, dict[str, Any]]:
    """Returns the committed studies by name."""
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.json"))}


def quality(row: dict[str, Any]) -> dict[str, Any] | None:
    """Returns mean, lowest, highest and per-seed values of the main metric; None for a failed row."""
    found: dict[str, Any] | None = row["metrics"].get(METRIC)
    return found


def agreement(study: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Share of the last setting's kept layers that each setting keeps: mean and range of seeds."""
    rows = [next(row for row in point["rows"] if row["kept"]) for point in study["points"]]
    final = [set(kept) for kept in rows[-1]["kept"]]
    shares = [
        [len(set(kept) & last) / len(last) for kept, last in zip(row["kept"], final, strict=True)]
        for row in rows
    ]
    return [(statistics.mean(values), min(values), max(values)) for values in shares]


def markdown(study: dict[str, Any]) -> str:
    """Returns a table with a line per setting and a column per row: mean and range of seeds, in percent."""
    names = [(row["name"], row["label"]) for row in study["points"][0]["rows"]]
    settles = (study["plot"] or {}).get("kind") == "stability"
    head = [study["sweep"]["label"] if study.get("sweep") else "setting", *(label for _, label in names)]
    head += ["kept layers as at the last setting"] * settles
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, point in enumerate(study["points"]):
        rows = {row["name"]: row for row in point["rows"]}
        cells = [setting(study, point), *(shown(rows.get(name)) for name, _ in names)]
        if settles:
            cells.append(span(*agreement(study)[number]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def setting(study: dict[str, Any], point: dict[str, Any]) -> str:
    """Returns a point's label for a table whose head names the sweep."""
    return str(point["value"] if study.get("sweep") else point["label"] or "-")


def shown(row: dict[str, Any] | None) -> str:
    if row is None or quality(row) is None:
        return "failed" if row and row["error"] else "-"
    found = quality(row) or {}
    return span(found["mean"], found["low"], found["high"])


def span(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def table(_: argparse.Namespace) -> None:
    for name, study in load_studies().items():
        print(f"{name}\n\n{markdown(study)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--work", default="runs/ablations")
    parser.add_argument("--again", action="store_true", help="also redo studies whose result is committed")
    parser.add_argument("--only", nargs="*", help="studies such as table3_merged_layers")
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    {"run": run, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
