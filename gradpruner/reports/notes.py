"""What limits the finding of a run or a study: what a careful reader would object to."""

from __future__ import annotations

from typing import Any

from gradpruner.common.printing import number, percent, ratio, whole
from gradpruner.reports.fields import FEW_EXAMPLES, Measured
from gradpruner.reports.tables import headline_of
from gradpruner.reports.view import FAR_FROM_BUDGET, Row, View

FEW_SEEDS = 3
"""With fewer seeds the range over seeds says little."""
PROBE_TASKS = ("gsm8k",)
"""Tasks that take several steps of reasoning; a test keeps this in step with `Task.probe`."""
PROBE_LOSS = 0.1
"""Relative loss on a probe from which the report warns."""
_PROBE_FLOOR = 0.02
"""A dense model that solves no more than this has nothing to lose."""


def not_learned(view: View, tuned: bool = True) -> str:
    """Says why nothing can be compared and what to change, '' where the task was learned.

    Only where no dense model of any point is above the most frequent answer: a sweep may hold settings that
    learn nothing beside others that do.
    """
    found = [(row, (row.after if tuned else row.before).get(view.metric)) for row in view.rows]
    measured = [(row, m.value) for row, m in found if m is not None]
    dense = max((value for row, value in measured if row.is_dense), default=None)
    if measured and not any(value for _, value in measured):
        why = "No row gives a single right answer: there is nothing to compare."
    elif dense is not None and view.majority is not None and dense <= view.majority:
        why = (
            f"The dense model ({percent(dense)}) is no better than always giving the most frequent answer "
            f"({percent(view.majority)}): there is nothing to compare."
        )
    else:
        return ""
    steps = view.dense.recorded.finetune.steps if view.dense and tuned else None
    return f"{why} {_what_to_change(view.record.recipe, steps)}"


def _what_to_change(recipe: dict[str, Any], steps: float | None) -> str:
    """What to do about a task that was not learned, with the values it was trained with."""
    if recipe.get("start") == "given":
        return "Nothing is tuned in this run: give a model that was tuned for the task, or set start: tuned."
    found = recipe.get("finetune")
    options = found if isinstance(found, dict) else {}
    epochs, rate = number(options.get("epochs")), number(options.get("learning_rate"))
    length = f"{whole(steps)} steps" if steps is not None else f"{epochs:g} epochs" if epochs else ""
    longer = f"finetune.epochs, now {length}" if length else "finetune.epochs"
    higher = "finetune.learning_rate" + (f", now {rate:g}" if rate is not None else "")
    return (
        f"Train longer ({longer}) or with a higher learning rate ({higher}), look at the answers in "
        "examples.jsonl, and run again."
    )


def _recovery_note(row: Row) -> str:
    """Says where training a pruned model further did not help."""
    kept = row.recorded.finetune.kept
    if kept is None or kept.model != "pruned" or kept.before is None or kept.rows is None:
        return ""
    after = "no number" if kept.after is None else f"{kept.after:.3f}"
    return (
        f"Training {row.label} further took its loss on {whole(kept.rows)} validation rows from "
        f"{kept.before:.3f} to {after}: the model before it was kept."
    )


def run_notes(view: View, dense: Measured, pruned: Measured, tuned: bool) -> list[str]:
    """What a careful reader of a run would object to."""
    main, reference = view.main, view.dense
    assert main is not None and reference is not None
    notes = []
    if dense.is_small or pruned.is_small:
        notes.append(_few_words(min(m.n for m in (dense, pruned) if m.n is not None)))
    notes += [_majority_note(view.majority, dense, pruned, main), _rival_note(view)]
    if not tuned:
        notes.append("Both models were compared as they are, before fine-tuning.")
    own, others = main.recorded.finetune, reference.recorded.finetune
    if tuned and bool(own.model_fields_set) != bool(others.model_fields_set):
        tuned_label = reference.label if others.model_fields_set else main.label
        notes.append(f"Only {tuned_label} was fine-tuned: the comparison is not like for like.")
    if None not in (own.steps, others.steps) and own.steps != others.steps:
        notes.append(
            f"Fine-tuning took {whole(others.steps)} steps for dense and {whole(own.steps)} for "
            f"{main.label}: the times and the accuracies are not like for like."
        )
    notes += [_recovery_note(row) for row in view.rows]
    for row in view.rows:
        tuning = row.recorded.finetune
        if tuning.measured_from:
            notes.append(
                f"Fine-tuning of {row.label} was interrupted: its time and memory are those of the steps "
                f"after {whole(tuning.measured_from)} of {whole(tuning.steps)}."
            )
    if (ratio(own.seconds, others.seconds) or 0) >= 1:
        notes.append("Fine-tuning the pruned model was not faster in this run.")
    return [note for note in notes if note]


def _few_words(examples: int | None) -> str:
    return (
        f"Only {whole(examples)} examples were evaluated; below {FEW_EXAMPLES} the intervals are wide and "
        "small losses stay invisible. Evaluate more rows before deciding."
    )


def _majority_note(majority: float | None, dense: Measured, pruned: Measured, main: Row) -> str:
    """Warns when a model is not clearly above the most frequent answer; one below it is the headline."""
    if majority is None or dense.value <= majority:
        return ""
    always = f"always giving the most frequent answer ({percent(majority)})"
    if (dense.value if dense.low is None else dense.low) <= majority:
        return (
            f"Even the dense model is not clearly above {always}: it has not learned the task, so "
            "this run says little about pruning."
        )
    if (pruned.value if pruned.low is None else pruned.low) <= majority:
        return f"{main.label} is not clearly above {always}."
    return ""


def _rival_note(view: View) -> str:
    """Names the other pruned rows that did at least as well."""
    main, metric = view.main, view.metric
    if main is None or metric not in main.after:
        return ""
    rivals = [
        f"{row.label} ({percent(row.after[metric].value)})"
        for row in view.first.rows
        if not row.is_dense
        and row is not main
        and row.error is None
        and metric in row.after
        and row.after[metric].value >= main.after[metric].value
    ]
    return f"Scored at least as high as {main.label}: {', '.join(rivals)}." if rivals else ""


def probe_notes(view: View) -> list[str]:
    """Warnings about reasoning that was lost, or could not be probed."""
    notes = []
    for name in PROBE_TASKS:
        found = [headline_of(row, name) for row in (view.dense, view.main) if row]
        values = [entry[1].value for entry in found if entry is not None]
        if len(values) < 2:
            continue
        before, after = values
        if before <= _PROBE_FLOOR:
            notes.append(
                f"The reasoning probe ({name}) says nothing here: the dense model itself solves only "
                f"{percent(before)}."
            )
        elif (before - after) / before > PROBE_LOSS:
            notes.append(
                f"Reasoning in several steps suffered: {name} falls from {percent(before)} to "
                f"{percent(after)}. Depth pruning keeps classification and short answers well and loses "
                "such reasoning far more, and fine-tuning does not bring it all back."
            )
    return notes


def comparison_notes(view: View) -> list[str]:
    """What a careful reader of a comparison would object to."""
    notes = [_rival_note(view)]
    share = view.record.budget.share
    off = [
        f"{row.label} ({percent(row.removed_share)})"
        for row in view.first.rows
        if not row.is_dense
        and share is not None
        and row.removed_share is not None
        and abs(row.removed_share - share) > FAR_FROM_BUDGET
    ]
    if off:
        notes.append(f"Not at the budget of {percent(share)} removed: {', '.join(off)}.")
    rows = sum(1 for row in view.first.rows if not row.is_dense and view.metric in row.after)
    if rows >= 10:
        notes.append(
            f"{rows} rows are compared at 95%: about one interval in twenty excludes zero by chance."
        )
    return [note for note in notes if note]


def size_notes(view: View) -> list[str]:
    """Warns of few seeds, few examples, and seeds that failed."""
    notes = []
    planned, done = view.record.planned, view.record.done
    if planned is not None and done is not None and done < planned:
        notes.append(f"Not complete: {whole(done)} of {whole(planned)} runs are finished.")
    worked = (sum(1 for seed in row.seeds if not seed.error) for row in view.rows)
    seeds = len(view.seeds) or max(worked, default=0)
    if seeds == 1:
        notes.append("One seed: how much another one would change is not known. Run at least three.")
    elif 1 < seeds < FEW_SEEDS:
        notes.append(f"{seeds} seeds: the ranges say little about how much another seed would change.")
    if view.num_examples is not None and view.num_examples < FEW_EXAMPLES:
        notes.append(_few_words(view.num_examples))
    for label, failed in {row.label: row.missing_seeds for row in view.rows if row.missing_seeds}.items():
        notes.append(f"{label}: seed{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} failed.")
    return notes
