"""The notes below a verdict: what a careful reader would object to."""

from __future__ import annotations

from typing import Any

from gradpruner.common.printing import number, percent, ratio, text, whole
from gradpruner.reports.fields import FEW_EXAMPLES, Measured
from gradpruner.reports.record import CHOICES, PlanRecord
from gradpruner.reports.tables import headline_of
from gradpruner.reports.view import FAR_FROM_BUDGET, Row, View

_UNITS = {"parameters": "all parameters", "decoder_parameters": "the decoder's parameters"}
LONGER = "longer"
"""The row of the dense model that is tuned for longer: a control, not a method that must meet the budget."""
FEW_SEEDS = 3
"""With fewer seeds, the range over seeds says little."""
PROBE_TASKS = ("gsm8k",)
"""Tasks that need several steps of reasoning; a test keeps them equal to those with `Task.probe`."""
PROBE_LOSS = 0.1
"""The report warns if a probe's score falls by more than this fraction."""
_PROBE_FLOOR = 0.02
"""If the dense model scores no more than this on a probe, the probe says nothing."""


def not_learned(view: View, tuned: bool = True) -> str:
    """Says why nothing can be compared and what to change; '' if the task was learned.

    The task counts as learned if the dense model of any setting beats the most frequent answer: in a sweep,
    some settings may learn nothing while others do.
    """
    found = [(row, (row.after if tuned else row.before).get(view.metric)) for row in view.rows]
    measured = [(row, m.value) for row, m in found if m is not None]
    dense = max((value for row, value in measured if row.is_dense), default=None)
    if measured and not any(value for _, value in measured):
        why = "No model gives a single right answer, so there is nothing to compare."
    elif dense is not None and view.majority is not None and dense <= view.majority:
        why = (
            f"The dense model ({percent(dense)}) is no better than always giving the most frequent answer "
            f"({percent(view.majority)}), so there is nothing to compare."
        )
    elif dense is not None and view.floor is not None and dense <= view.floor:
        why = (
            f"The dense model ({percent(dense)}) is no better than before it was tuned "
            f"({percent(view.floor)}), so there is nothing to compare."
        )
    else:
        return ""
    steps = view.dense.recorded.finetune.steps if view.dense and tuned else None
    return f"{why} {_what_to_change(view.record.recipe, steps)}"


def _what_to_change(recipe: dict[str, Any], steps: float | None) -> str:
    """Says what to change if the task was not learned, with the current values."""
    if recipe.get("start") == "given":
        return "This run does not tune the model: give one that was tuned for the task (`gradpruner run`)."
    found = recipe.get("finetune")
    options = found if isinstance(found, dict) else {}
    epochs, rate = number(options.get("epochs")), number(options.get("learning_rate"))
    length = f"{whole(steps)} steps" if steps is not None else f"{epochs:g} epochs" if epochs else ""
    longer = f"finetune.epochs, now {length}" if length else "finetune.epochs"
    higher = "finetune.learning_rate" + (f", now {rate:g}" if rate is not None else "")
    return (
        f"Look at the answers in examples.jsonl; then train longer ({longer}) or with a higher learning rate "
        f"({higher}), and run again."
    )


def _choice_note(row: Row) -> str:
    """Says by which of two scores the layers were chosen, or why these were not compared."""
    plan = row.plans[0] if row.plans else PlanRecord()
    found = plan.comparison
    if found.chosen not in CHOICES or not (found.same or plan.search.curve):
        return ""
    igia, gate = (number(found.losses.get(name)) for name in CHOICES)
    if igia is None or gate is None:
        return f"The layers of {row.label} were chosen by {CHOICES[found.chosen]}: {text(found.skipped)}."
    (mine, name), (theirs, other) = (igia, CHOICES["gradpruner"]), (gate, CHOICES["gate"])
    if found.chosen == "gate":
        mine, name, theirs, other = theirs, other, mine, name
    removed = "them" if found.same else f"{whole(found.num_prune)} layers"
    return (
        f"The layers of {row.label} were chosen by {name}: with {removed} removed and the cuts repaired, the "
        f"loss on {whole(found.held_out)} {text(found.rows)} is {mine:#.3g}; with the choice of {other} "
        f"it is {theirs:#.3g}."
    )


def _choices_note(row: Row) -> str:
    """Says how often each of two scores chose the layers of a row with several seeds."""
    chosen = [plan.comparison.chosen for plan in row.plans if plan.comparison.chosen in CHOICES]
    times = [f"{CHOICES[name]} in {chosen.count(name)}" for name in CHOICES if name in chosen]
    if not times:
        return ""
    return f"The layers of {row.label} were chosen by {' and by '.join(times)} of {len(chosen)} seeds."


def _recovery_note(row: Row) -> str:
    """Says that training the pruned model further made it no better, if so."""
    kept = row.recorded.finetune.kept
    if kept is None or kept.model != "pruned" or kept.before is None or kept.rows is None:
        return ""
    after = "no finite value" if kept.after is None else f"{kept.after:.3f}"
    return (
        f"Training {row.label} further made it no better: its loss on {whole(kept.rows)} validation rows "
        f"went from {kept.before:.3f} to {after}, so the model from before that training was kept."
    )


def run_notes(view: View, dense: Measured, pruned: Measured, tuned: bool) -> list[str]:
    """Returns what a careful reader of a run would object to."""
    main, reference = view.main, view.dense
    assert main is not None and reference is not None
    notes = []
    if dense.is_small or pruned.is_small:
        notes.append(_few_words(min(m.n for m in (dense, pruned) if m.n is not None)))
    notes += [_majority_note(view.majority, dense, pruned, main), _rival_note(view), _longer_note(view)]
    if not tuned:
        notes.append("Both models are compared before fine-tuning.")
    own, others = main.recorded.finetune, reference.recorded.finetune
    if tuned and bool(own.model_fields_set) != bool(others.model_fields_set):
        tuned_label = reference.label if others.model_fields_set else main.label
        notes.append(f"Only {tuned_label} was fine-tuned: the comparison is not like for like.")
    if None not in (own.steps, others.steps) and own.steps != others.steps:
        notes.append(
            f"Fine-tuning took {whole(others.steps)} steps for dense and {whole(own.steps)} for "
            f"{main.label}: times and scores are not like for like."
        )
    notes += [_choice_note(row) for row in view.rows]
    notes += [_recovery_note(row) for row in view.rows]
    for row in view.rows:
        tuning = row.recorded.finetune
        if tuning.measured_from:
            notes.append(
                f"Fine-tuning of {row.label} was interrupted: its time and memory cover only the steps after "
                f"{whole(tuning.measured_from)} of {whole(tuning.steps)}."
            )
    if (ratio(own.seconds, others.seconds) or 0) >= 1:
        notes.append("Fine-tuning the pruned model was not faster in this run.")
    return [note for note in notes if note]


def _few_words(examples: int | None) -> str:
    return (
        f"Only {whole(examples)} examples were evaluated. With fewer than {FEW_EXAMPLES}, intervals are wide "
        "and small losses cannot be seen. Evaluate more rows before you decide."
    )


def _majority_note(majority: float | None, dense: Measured, pruned: Measured, main: Row) -> str:
    """Warns if a model is not clearly above the most frequent answer; `not_learned` handles one below it."""
    if majority is None or dense.value <= majority:
        return ""
    always = f"always giving the most frequent answer ({percent(majority)})"
    if (dense.value if dense.low is None else dense.low) <= majority:
        return (
            f"Even the dense model is not clearly better than {always}: it has not learned the task, so "
            "this run says little about pruning."
        )
    if (pruned.value if pruned.low is None else pruned.low) <= majority:
        return f"{main.label} is not clearly better than {always}."
    return ""


def _rival_note(view: View) -> str:
    """Names the other rows, but dense, that score at least as high."""
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
    return f"Scores at least as high as {main.label}: {', '.join(rivals)}." if rivals else ""


def _longer_note(view: View) -> str:
    """Advises to tune for longer if the dense model is clearly better for it; '' if not, or not measured."""
    row = view.first.row(LONGER)
    paired = row.paired.get(view.metric) if row else None
    if row is None or paired is None or (number(row.costs.get("training_ratio")) or 0) <= 1:
        return ""
    if paired.ends is None or paired.ends[0] <= 0:
        return ""
    return (
        f"{row.label} scores clearly more than dense: training was too short. Tune for longer "
        "(finetune.epochs) and prune from there."
    )


def probe_notes(view: View) -> list[str]:
    """Warns if reasoning was lost, or could not be probed."""
    notes = []
    for name in PROBE_TASKS:
        found = [headline_of(row, name) for row in (view.dense, view.main) if row]
        values = [entry[1].value for entry in found if entry is not None]
        if len(values) < 2:
            continue
        before, after = values
        if before <= _PROBE_FLOOR:
            notes.append(
                f"The reasoning probe ({name}) says nothing here: the dense model itself scores only "
                f"{percent(before)}."
            )
        elif (before - after) / before > PROBE_LOSS:
            notes.append(
                f"Multi-step reasoning suffered: {name} falls from {percent(before)} to {percent(after)}. "
                "Removing layers keeps classification and short answers well, but loses such reasoning much "
                "more, and fine-tuning does not bring all of it back."
            )
    return notes


def comparison_notes(view: View) -> list[str]:
    """Returns what a careful reader of a comparison would object to."""
    notes = [_rival_note(view), _longer_note(view)]
    share = view.record.budget.share
    off = [
        f"{row.label} ({percent(row.removed_share)})"
        for row in view.first.rows
        if row.name not in ("dense", LONGER)
        and share is not None
        and row.removed_share is not None
        and abs(row.removed_share - share) > FAR_FROM_BUDGET
    ]
    if off:
        miss = "misses" if len(off) == 1 else "miss"
        notes.append(f"{', '.join(off)} {miss} the budget of {percent(share)} removed.")
    rows = sum(1 for row in view.first.rows if not row.is_dense and view.metric in row.after)
    if rows >= 10:
        notes.append(
            f"{rows} rows are compared at 95% confidence: about one interval in twenty excludes zero by "
            "chance."
        )
    return [note for note in (*notes, *map(_choices_note, view.first.rows)) if note]


def size_notes(view: View) -> list[str]:
    """Warns of unfinished runs, few seeds, few examples and failed seeds."""
    notes = []
    planned, done = view.record.planned, view.record.done
    if planned is not None and done is not None and done < planned:
        notes.append(f"Incomplete: {whole(done)} of {whole(planned)} runs are finished.")
    worked = (sum(1 for seed in row.seeds if not seed.error) for row in view.rows)
    seeds = len(view.seeds) or max(worked, default=0)
    if seeds == 1:
        notes.append(
            "Only one seed: how much the result varies from seed to seed is not known. Run at least three."
        )
    elif 1 < seeds < FEW_SEEDS:
        notes.append(f"Only {seeds} seeds: the ranges say little about how much the result varies by seed.")
    if view.num_examples is not None and view.num_examples < FEW_EXAMPLES:
        notes.append(_few_words(view.num_examples))
    for label, failed in {row.label: row.missing_seeds for row in view.rows if row.missing_seeds}.items():
        notes.append(f"{label}: seed{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} failed.")
    return notes


def budget_words(view: View) -> str:
    """Returns a sentence on the budget of a comparison, '' if it is not known."""
    budget = view.record.budget
    if view.kind != "compare" or (budget.removed is None and budget.share is None):
        return ""
    unit = _UNITS.get(str(budget.unit), text(budget.unit or "the parameters"))
    total = view.record.model.num_layers
    of = f" of the {whole(total)}" if total else ""
    worth = f", as many as {whole(budget.layers)}{of} decoder layers hold" if budget.layers else ""
    return (
        f"Every method has the same budget: it removes {whole(budget.removed)} parameters, "
        f"{percent(budget.share)} of {unit}{worth}. Methods that cannot meet it exactly stay within one of "
        "their units."
    )


def serving_note(view: View) -> str:
    """Names the rows whose layers differ in width, and says what that means; '' if there are none."""
    labels = list(dict.fromkeys(row.label for row in view.rows if row.uniform is False))
    if not labels:
        return ""
    verb = "has" if len(labels) == 1 else "have"
    return (
        f"{'; '.join(labels)} {verb} layers of unequal width. Only gradpruner loads such a model; vLLM, "
        "SGLang and llama.cpp refuse it."
    )
