"""Is the smaller model as good? Layers chosen, repaired and trained further, on a real pre-trained LLM.

    python benchmarks/quality/study.py rates  --model M --data D --scratch S     learning rates of the dense model
    ... --task trec banking77 --seed 0 1 2                                         restricts it

Every cell is one line in `benchmarks/results/quality/<task>.jsonl`; cells that are there are skipped, so an
interrupted study goes on where it was. Models tuned on a task are kept in the scratch folder.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from tasks import TASKS
from work import Work, with_plain_memory

RESULTS = Path(__file__).parent.parent / "results" / "quality"
RATES = (5e-5, 1e-4, 2e-4)


def tuned(work: Work, rate: float) -> tuple[dict[str, Any], Path]:
    """The dense model tuned at a rate: what the cell says, and where the model is."""
    folder = work.scratch / f"{work.task}-{work.seed}-{rate:g}"

    def make() -> dict[str, Any]:
        model = work.load()
        result = work.tune(model, rate)
        model.save_pretrained(folder)
        return {"training": result, **work.measure(model)}

    entry = work.cell(f"dense/{rate:g}", make)
    if not (folder / "model.safetensors").exists():  # another machine measured it
        model = work.load()
        work.tune(model, rate)
        model.save_pretrained(folder)
    return entry, folder


def rates(work: Work) -> None:
    """The dense model before tuning, and tuned at every rate."""
    work.cell("dense/untrained", lambda: work.measure(work.load()))
    for rate in RATES:
        tuned(work, rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("rates",))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for seed in args.seed:
        for task in args.task:
            work = Work(args.model, args.data, args.scratch, args.results, task, seed)
            {"rates": rates}[args.what](work)


if __name__ == "__main__":
    with_plain_memory()
    main()
