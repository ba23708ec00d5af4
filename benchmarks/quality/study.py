"""Is the smaller model as good? Layers chosen, repaired and trained further, on a real pre-trained LLM.

    python benchmarks/quality/study.py tune   --model M --data D --scratch S  the dense model, rates swept
    ...                                shrink                                 pruned after tuning, not trained
    ...                                depth                                  the same, 3 to 18 layers
    ... --task trec banking77 --seed 0 1 2                                    restricts it

Every cell is one line in `benchmarks/results/quality/<task>.jsonl`; cells that are there are skipped, so an
interrupted study goes on where it was. Several processes may share the folders as long as they work on
different tasks or seeds. Models tuned on a task are kept in the scratch folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from choices import CHOICES, choose
from tasks import TASKS
from work import Work, with_plain_memory

RESULTS = Path(__file__).parent.parent / "results" / "quality"
RATES = (1e-4, 2e-4)
NUM_GONE = 12
DEPTHS = (3, 6, 9, 15, 18)
REPAIR_ROWS = 384


def tuned(work: Work, rate: float) -> tuple[dict[str, Any], Path]:
    """The dense model tuned at a rate: what the cell says, and where the model is."""
    folder = work.scratch / f"{work.task}-{work.seed}-{rate:g}"

    def make() -> dict[str, Any]:
        model = work.load()
        result = work.tune(model, rate)
        model.save_pretrained(folder)
        return {"training": result, **work.measure(model)}

    entry = work.cell(f"dense/{rate:g}", make)
    if not (folder / "model.safetensors").exists():  # measured on another machine
        model = work.load()
        work.tune(model, rate)
        model.save_pretrained(folder)
    return entry, folder


def best_rate(work: Work) -> float:
    """The rate at which the dense model has the lowest loss on validation rows of seed 0.

    Rates are doubled or halved until the best one has a worse one on either side.
    """
    first = Work(work.model, work.data, work.scratch, work.results, work.task, 0) if work.seed else work
    losses = {rate: tuned(first, rate)[0]["validation"]["nll"] for rate in RATES}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        further = best * 2 if best == max(losses) else best / 2 if best == min(losses) else None
        if further is None or further > 1e-3:
            return best
        losses[further] = tuned(first, further)[0]["validation"]["nll"]


def tune(work: Work) -> Path:
    """The dense model before tuning, and tuned at the best rate."""
    work.cell("dense/untrained", lambda: work.measure(work.load()))
    return tuned(work, best_rate(work))[1]


def pruned(work: Work, folder: Path, choice: str, gone: int, repair: str) -> None:
    """One way of shrinking a tuned model, without training it."""

    def make() -> dict[str, Any]:
        from gradpruner.refitting import fit_repair
        from gradpruner.surgery import prune_

        plan, evidence = choose(work, folder, choice, gone)
        model, fitted = work.load(folder), None
        if repair != "none":
            rows = work.encoded["train"]
            fitted = fit_repair(
                model, plan, rows, work.collator, kind=repair, rows=REPAIR_ROWS, seed=work.seed
            )
        prune_(model, plan, repair=fitted)
        facts = fitted.facts() if fitted else None
        return {"gone": list(plan.pruned), "evidence": evidence, "repair": facts, **work.measure(model)}

    work.cell(f"shrink/{choice}/{gone}/{repair}", make)


def shrink(work: Work) -> None:
    """Every choice of layers, with and without repair."""
    folder = tune(work)
    for repair in ("least_squares", "none"):
        for choice in CHOICES:
            pruned(work, folder, choice, NUM_GONE, repair)
    for choice in ("gate", "igia", "last"):
        pruned(work, folder, choice, NUM_GONE, "linear")


def depth(work: Work) -> None:
    """How many layers can go."""
    folder = tune(work)
    for gone in DEPTHS:
        for choice in ("gate", "igia"):
            pruned(work, folder, choice, gone, "least_squares")


def main() -> None:
    parts = {"tune": tune, "shrink": shrink, "depth": depth}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=list(parts))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for what in args.what:
        for seed in args.seed:
            for task in args.task:
                parts[what](Work(args.model, args.data, args.scratch, args.results, task, seed))


if __name__ == "__main__":
    with_plain_memory()
    main()
