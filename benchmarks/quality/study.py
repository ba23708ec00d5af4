"""Is the smaller model as good? Choosing layers, repair and further training, on a real pre-trained LLM.

    python benchmarks/quality/study.py tune   --model M --data D --scratch S  the dense model, rates swept
    ...                                shrink                                 pruned after tuning, not trained
    ...                                depth                                  the same, 3 to 18 layers
    ...                                train                                  pruned models that are trained
    ...                                vary                                   rows of the repair, LoRA
    ... --task trec banking77 --seed 0 1 2 --only least_squares               only some cells

Every cell is one line in `benchmarks/results/quality/<task>.jsonl`. Finished cells are skipped, so an
interrupted study resumes. Several processes may share the folders if they work on different tasks or seeds.
Models tuned on a task are kept in the scratch folder.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from choices import CHOICES, choose, trace_of
from rows import BRIEF, FULL_ROWS, LONGER, TRAINED, Row
from tasks import TASKS
from work import Work, with_plain_memory

from gradpruner.runs.row.rate_search import best_rate as best_of

RESULTS = Path(__file__).parent.parent / "results" / "quality"
RATES = (1e-4, 2e-4)
LARGEST_RATE = 4e-4
NUM_GONE = 12
DEPTHS = (3, 6, 9, 15, 18)
REPAIR_ROWS = 384
LAYER_WISE_ROWS = 1200
"""The number of rows that determines a repair: the product's default for these tasks."""
WEIGHTS = (0.0, 0.5, 0.95)
"""Other shares of a repair's weight that go by influence."""


def saved(work: Work, folder: Path, rate: float, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Tunes the dense model and keeps it in a folder; returns it and figures of the training."""
    model, result = work.tuned(work.load(), rate, **options)
    model.save_pretrained(folder)
    return model, result


def measured(work: Work, name: str, folder: Path, rate: float, **options: Any) -> dict[str, Any]:
    """Returns the cell of a tuned dense model, which it keeps in a folder."""

    def make() -> dict[str, Any]:
        model, result = saved(work, folder, rate, **options)
        return {"training": result, **work.measure(model)}

    return work.cell(name, make)


def kept(work: Work, folder: Path, rate: float, **options: Any) -> Path:
    """Returns the folder of a tuned dense model; tunes again if it was measured on another machine."""
    if not (folder / "model.safetensors").exists():
        saved(work, folder, rate, **options)
    return folder


def dense(work: Work, rate: float) -> dict[str, Any]:
    """Returns the cell of the dense model tuned at a learning rate."""
    return measured(work, f"dense/{rate:g}", work.folder(f"{rate:g}"), rate)


def tuned(work: Work, rate: float) -> Path:
    """Measures the dense model tuned at a rate, and returns its folder."""
    dense(work, rate)
    return kept(work, work.folder(f"{rate:g}"), rate)


def best_rate(work: Work) -> float:
    """Returns the rate at which the dense model has the lowest loss on validation rows, with seed 0."""
    first = work.of_seed(0)

    def loss_at(rate: float) -> float:
        return float(dense(first, rate)["validation"]["nll"])

    return best_of({rate: loss_at(rate) for rate in RATES}, within(loss_at))


def within(loss_at: Callable[[float], float]) -> Callable[[float], float]:
    """Returns the same function with an infinite loss, and no training, above the largest rate."""
    return lambda rate: loss_at(rate) if rate <= LARGEST_RATE else math.inf


def tune(work: Work) -> Path:
    """Measures the dense model before tuning and tuned at the best rate; returns the folder of the latter."""
    work.cell("dense/untrained", lambda: work.measure(work.load()))
    return tuned(work, best_rate(work))


def repaired(
    work: Work,
    model: Any,
    plan: Any,
    kind: str,
    count: int | None = None,
    source: Work | None = None,
    answers: float | None = None,
) -> Any:
    """Returns a repair fitted on training rows of the task, or of `source` if given.

    "influence" is the product's layer-wise repair. Cells called "layer_wise" are of commits where four fifths
    of its weight were of all positions before answer tokens instead.
    """
    from gradpruner.pruning.repair.refitting import fit_repair

    rows = (source or work).encoded["train"]
    layer_wise = kind == "influence"
    if answers is None:
        answers = 0.8 if layer_wise else 0.0  # cells of the other kinds weigh all tokens equally
    count = count or (LAYER_WISE_ROWS if layer_wise else REPAIR_ROWS)
    options: dict[str, Any] = {"rows": count, "answers": answers, "seed": work.seed}
    options["kind"] = "layer_wise" if layer_wise else kind
    return fit_repair(model, plan, rows, work.collator, **options)


FITTED: dict[Any, Any] = {}
"""The last repair, for the next learning rate of its row, or for training what has just been measured."""


def repaired_once(
    work: Work, model: Any, plan: Any, cut: tuple[Path, str, int], kind: str, count: int | None = None
) -> Any:
    """Returns the repair of a cut, fitted unless it is the last one that was; None for the kind "none"."""
    if kind == "none":
        return None
    key = (work.task, work.seed, *cut, kind, count)
    if key not in FITTED:
        FITTED.clear()
        FITTED[key] = repaired(work, model, plan, kind, count)
    return FITTED[key]


def pruned(
    work: Work, folder: Path, choice: str, gone: int, repair: str, tuned_by: str = ""
) -> dict[str, Any] | None:
    """Measures one way of shrinking a tuned model without further training."""

    def make() -> dict[str, Any]:
        from gradpruner.pruning.in_memory import prune_

        plan, evidence = choose(work, folder, choice, gone)
        model = work.load(folder)
        fitted = repaired_once(work, model, plan, (folder, choice, gone), repair)
        prune_(model, plan, repair=fitted)
        facts = fitted.facts() if fitted else None
        return {"gone": list(plan.pruned), "evidence": evidence, "repair": facts, **work.measure(model)}

    name = f"shrink/{tuned_by}{choice}/{gone}/{repair}"
    return work.cell(name, make) if work.wants(name) else None


def shrink(work: Work) -> None:
    """Measures every choice of layers, with and without repair."""
    folder = tune(work)
    for repair in ("least_squares", "none"):
        for choice in CHOICES:
            pruned(work, folder, choice, NUM_GONE, repair)
    for choice in ("igia", "gate", "last", "shortgpt", "random"):
        pruned(work, folder, choice, NUM_GONE, "influence")
    for choice in ("gate", "igia", "last"):
        pruned(work, folder, choice, NUM_GONE, "linear")
    for choice in ("task_loss", "auto"):
        pruned(work, folder, choice, NUM_GONE, "least_squares")


def depth(work: Work) -> None:
    """Measures how many layers can go, without training and trained.

    Pruned before tuning, the rate is the one that is best for twelve layers; recovered, half of dense's.
    """
    folder = tune(work)
    for gone in DEPTHS:
        for choice in ("gate", "igia"):
            pruned(work, folder, choice, gone, "least_squares")
        for choice in ("gate", "shortgpt", "igia"):
            pruned(work, folder, choice, gone, "influence")
        for row in FULL_ROWS:
            if work.wants(f"train/{row.name}/{gone}/"):
                rate = best_rate(work) / 2 if row.start == "tuned" else rate_of(work, row)
                trained(work, row, rate, gone)


def vary(work: Work) -> None:
    """Measures what a repair depends on: the number of rows, their task, and how the model was tuned."""
    folder = tune(work)
    for count in (64, 128, 1200, 3200):
        if count <= work.facts.train_rows:
            varied(work, folder, f"rows-{count}", count)
    for choice in ("igia", "gate"):
        for count in (192, 384, 600, 3200):
            if count <= work.facts.train_rows:
                varied(work, folder, f"influence-rows-{count}", count, "influence", choice)
    for name in ("sst2", "banking77"):
        if name != work.task:
            other = replace(work, task=name, only=())
            varied(work, folder, f"rows-of-{name}", source=other)
    for choice in ("igia", "gate", "shortgpt"):
        for answers in WEIGHTS:
            name = f"influence-answers-{answers:g}"
            varied(work, folder, name, LAYER_WISE_ROWS, "influence", choice, answers=answers)
    if not work.wants("shrink/lora/"):
        return
    adapted = lora_tuned(work)
    for repair in ("least_squares", "none"):
        pruned(work, adapted, "igia", NUM_GONE, repair, tuned_by="lora/")


def varied(
    work: Work,
    folder: Path,
    name: str,
    count: int | None = None,
    kind: str = "least_squares",
    choice: str = "igia",
    **options: Any,
) -> None:
    """Measures one variation of the repair."""

    def make() -> dict[str, Any]:
        from gradpruner.pruning.in_memory import prune_

        plan, _ = choose(work, folder, choice, NUM_GONE)
        model = work.load(folder)
        fitted = repaired(work, model, plan, kind, count, **options)
        prune_(model, plan, repair=fitted)
        return {"gone": list(plan.pruned), "repair": fitted.facts(), **work.measure(model)}

    key = f"vary/{choice}/{NUM_GONE}/{name}"
    if work.wants(key):
        work.cell(key, make)


def lora_tuned(work: Work) -> Path:
    """Measures the model tuned with LoRA at ten times the rate, and returns its folder, adapters merged."""
    folder, rate = work.folder("lora"), 10 * best_rate(work)
    measured(work, "dense/lora", folder, rate, mode="lora")
    return kept(work, folder, rate, mode="lora")


QUARTER = 0.25
EARLY = 0.6
"""Share of the rows on which the dense model is tuned if the pruned model is not trained: as much work as
tuning a pruned model on all rows."""


def begun(work: Work, share: float = QUARTER) -> Path:
    """Returns the folder of the dense model tuned on the first rows only: a quarter, or another share."""
    folder = work.folder("quarter" if share == QUARTER else f"{share:g}")
    return kept(work, folder, best_rate(work), rows=work.part(0, share))


def start_of(work: Work, row: Row) -> Path:
    """Returns the folder of the model that a row prunes."""
    starts = {
        "base": lambda: work.model,
        "tuned": lambda: tune(work),
        "twice": lambda: twice(work),
        "quarter": lambda: begun(work),
    }
    return starts[row.start]()


def trained(work: Work, row: Row, rate: float, gone: int = NUM_GONE) -> dict[str, Any]:
    """Measures one row trained at one rate, with the rows and steps of the dense model's tuning."""

    def make() -> dict[str, Any]:
        from gradpruner.pruning.in_memory import prune_
        from gradpruner.training.options import DistillationOptions

        folder = start_of(work, row)
        plan, evidence = choose(work, folder, row.choice, gone)
        trace = trace_of(work, folder) if plan.needs_trace else None
        model = work.load(folder)
        fitted = repaired_once(work, model, plan, (folder, row.choice, gone), row.repair, row.rows)
        prune_(model, plan, trace, repair=fitted)
        before = work.measure(model, "validation")["validation"]
        learns: dict[str, Any] = {"rows": work.part(QUARTER, 1)} if row.start == "quarter" else {}
        if row.distil:
            options = DistillationOptions(prompts=row.prompts)
            teacher = folder if row.start == "twice" else tune(work)
            learns = {"teacher": work.load(teacher), "distillation": options}
        result = work.tune(model, rate, passes=row.passes, **learns)
        facts: dict[str, Any] = {"gone": list(plan.pruned), "evidence": evidence, "training": result}
        facts["repair_seconds"] = round(fitted.seconds, 1) if fitted else 0.0
        facts["before"] = {k: before[k] for k in ("score", "nll", "losses") if k in before}
        return {**facts, **work.measure(model)}

    return work.cell(f"train/{row.name}/{gone}/{rate:g}", make)


def rate_of(work: Work, row: Row) -> float:
    """Returns the rate with the lowest loss on validation rows, with seed 0, searched as for dense."""
    best, first = best_rate(work), work.of_seed(0)

    def loss_at(rate: float) -> float:
        return float(trained(first, row, rate)["validation"]["nll"])

    if row.prompts or row.passes > 1:
        found = rate_of(work, replace(row, prompts=0.0, passes=1))
        rates = (found, found * 2)
    elif row.start == "tuned":
        rates = (best / 4, best / 2)
    else:
        rates = (best / 2, best) if best * 2 > LARGEST_RATE else (best, best * 2)
    return best_of({rate: loss_at(rate) for rate in rates}, within(loss_at))


def train(work: Work) -> None:
    """Measures every row at its best rate."""
    best = best_rate(work)
    for row in TRAINED:
        if work.wants(f"train/{row.name}/"):
            trained(work, row, rate_of(work, row))
    for row in BRIEF:
        if work.wants(f"train/{row.name}/"):
            trained(work, row, best / 2)
    if work.wants("early/"):
        pruned(work, begun(work, EARLY), "igia", NUM_GONE, "influence", tuned_by=f"early/{EARLY:g}/")
    if work.wants("dense-twice/"):
        longer(work)
    if work.wants("twice/"):
        from_there(work, best)


def from_there(work: Work, best: float) -> None:
    """Measures what is pruned from the dense model tuned for twice the epochs, as `run` does by default.

    The choice of layers whose repaired model has the lower loss on validation rows is recovered.
    """
    losses = {}
    for row in LONGER:
        cell = pruned(work, twice(work), row.choice, NUM_GONE, row.repair, tuned_by="twice/")
        losses[row] = cell["validation"]["nll"] if cell else math.inf
    chosen = min(losses, key=lambda row: losses[row])
    for rate in (best / 2, best / 4):
        trained(work, chosen, rate)


def longer(work: Work) -> dict[str, Any]:
    """Returns the cell of the dense model tuned for twice the epochs: the work of teacher and recovery."""
    rate = best_rate(work)
    return measured(work, f"dense-twice/{rate:g}", work.folder("twice"), rate, passes=2)


def twice(work: Work) -> Path:
    """Measures the dense model tuned for twice the epochs, and returns its folder."""
    longer(work)
    return kept(work, work.folder("twice"), best_rate(work), passes=2)


PARTS = {"tune": tune, "shrink": shrink, "depth": depth, "train": train, "vary": vary}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", choices=list(PARTS))
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--task", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seed", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", default=[], help="only cells whose name contains one of these")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "auto"), help="auto: a GPU if there is one"
    )
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for what in args.what:
        for seed in args.seed:
            for task in args.task:
                folders = (args.model, args.data, args.scratch, args.results)
                PARTS[what](Work(*folders, task, seed, tuple(args.only), args.device))


if __name__ == "__main__":
    with_plain_memory()
    main()
