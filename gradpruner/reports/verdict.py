"""What the run shows, in one honest sentence, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradpruner.reports.formats import (
    MISSING,
    duration,
    interval,
    number,
    percent,
    ratio,
    short,
    signed_percent,
    text,
    times,
    whole,
)
from gradpruner.reports.other_tasks import probe_notes
from gradpruner.reports.reading import Measured, RunView, Variant, mapping, metric_label

_SMALL_LOSS = 0.02
"""Largest relative loss reported as 'no clear difference' when the intervals overlap."""


NOT_LEARNED = "Not learned"


@dataclass(frozen=True)
class Verdict:
    """The conclusion.

    Attributes:
        level: 'even' (no clear difference), 'unclear' (a difference that may be chance), 'better',
            'worse' or 'unknown'.
        word: The level as two or three words.
        sentence: What was found.
        notes: What limits the finding, most serious first.
    """

    level: str
    word: str
    sentence: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Tile:
    """One headline number: what it is, its change, from what to what, and a remark."""

    name: str
    change: str
    before: str
    after: str
    remark: str = ""


def compared(view: RunView) -> tuple[Measured | None, Measured | None, bool]:
    """Returns the headline metric of dense and of main, and whether both are fine-tuned.

    A fine-tuned model is never compared with one that is not: without both, the two measurements
    before fine-tuning are taken.
    """
    dense, main = view.dense, view.main
    if dense is None or main is None:
        return (dense.after.get(view.metric) if dense else None), None, True
    after = dense.after.get(view.metric), main.after.get(view.metric)
    before = dense.before.get(view.metric), main.before.get(view.metric)
    if None in after and None not in before:
        return before[0], before[1], False
    return after[0], after[1], True


def tiles(view: RunView) -> tuple[Tile, ...]:
    """Returns the headline numbers that are known: layers, parameters, accuracy, time."""
    dense, main = view.dense, view.main
    model = mapping(view.run, "model")
    layers = (dense.num_layers if dense else None) or model.get("num_layers")
    parameters = (dense.num_parameters if dense else None) or model.get("num_parameters")
    layers_left = main.num_layers if main else None
    parameters_left = main.num_parameters if main else None
    found = [
        Tile("Layers", _change(layers_left, layers), whole(layers), whole(layers_left)),
        Tile("Parameters", _change(parameters_left, parameters), short(parameters),
             short(parameters_left)),
    ]  # fmt: skip
    before, after, tuned = compared(view)
    found.append(
        Tile(
            _quality_label(view.metric) + ("" if tuned else ", not fine-tuned"),
            _change(after.value if after else None, before.value if before else None),
            percent(before.value if before else None),
            percent(after.value if after else None),
            _interval_remark(before, after),
        )
    )
    seconds = number(dense.finetune.get("seconds")) if dense else None
    seconds_left = number(main.finetune.get("seconds")) if main else None
    recording = number(mapping(view.run, "trace").get("seconds"))
    with_recording = ratio((seconds_left or 0) + (recording or 0), seconds)
    found.append(
        Tile(
            "Fine-tuning time",
            times(ratio(seconds_left, seconds)),
            duration(seconds),
            duration(seconds_left),
            f"{times(with_recording)} with the recording"
            if recording is not None and seconds_left is not None and with_recording is not None
            else "",
        )
    )
    return tuple(tile for tile in found if {tile.before, tile.after} != {MISSING})


def judge(view: RunView) -> Verdict:
    """Compares the main pruned variant with dense and says what may be concluded."""
    dense, main = view.dense, view.main
    failed = [v for v in view.variants if v.error is not None]
    failures = tuple(f"{v.label} failed: {text(v.error, 300)}" for v in failed)
    if main is None:
        return Verdict("unknown", "No result", "This run holds no pruned model.", failures)
    before, after, tuned = compared(view)
    if dense is None or before is None or after is None:
        lacking = " and ".join(
            name for name, value in (("the dense model", before), (main.label, after)) if value is None
        )
        sentence = f"Nothing to compare: {lacking} has no {metric_label(view.metric).lower()}."
        return Verdict("unknown", "No result", sentence, failures)
    difference = main.paired.get(view.metric) if tuned else None
    level, word, finding = _finding(before, after, difference)
    measured = [m.value for v in view.variants if (m := (v.after if tuned else v.before).get(view.metric))]
    learned = not_learned(before.value, measured, view.majority)
    if learned:
        level, word = "unclear", NOT_LEARNED
        steps = dense.finetune.get("steps") if tuned else None
        finding = f"{learned} {what_to_change(mapping(view.run, 'recipe'), steps)}"
    kept = f"{whole(main.num_layers)} of {whole(dense.num_layers)} layers"
    sentence = (
        f"{main.label} keeps {kept} and scores {percent(after.value)} where the dense model scores "
        f"{percent(before.value)} ({_relative(before, after)}). {finding}"
    )
    notes = (*failures, *probe_notes(view), *_notes(view, before, after, tuned))
    return Verdict(level, word, sentence, notes)


def not_learned(dense: float | None, measured: Sequence[float], majority: float | None) -> str:
    """Says why nothing can be compared, '' where the task was learned.

    Args:
        dense: The headline metric of the dense model, 0-1.
        measured: That of every row, the dense one included.
        majority: Share of the most frequent answer; None where the metric is no accuracy.
    """
    if measured and not any(measured):
        return "No row gives a single right answer: there is nothing to compare."
    if dense is not None and majority is not None and dense <= majority:
        return (
            f"The dense model ({percent(dense)}) is no better than always giving the most frequent answer "
            f"({percent(majority)}): there is nothing to compare."
        )
    return ""


def what_to_change(recipe: dict[str, Any], steps: Any = None) -> str:
    """Returns what to do about a task that was not learned, with the values it was trained with.

    Args:
        recipe: The resolved recipe.
        steps: Optimizer steps of the dense model; None where that is not known.
    """
    if recipe.get("start") == "given":
        return "Nothing is tuned in this run: give a model that was tuned for the task, or set start: tuned."
    options = mapping(recipe, "finetune")
    epochs, rate = number(options.get("epochs")), number(options.get("learning_rate"))
    length = f"{whole(steps)} steps" if number(steps) is not None else f"{epochs:g} epochs" if epochs else ""
    longer = f"finetune.epochs, now {length}" if length else "finetune.epochs"
    higher = "finetune.learning_rate" + (f", now {rate:g}" if rate is not None else "")
    return (
        f"Train longer ({longer}) or with a higher learning rate ({higher}), look at the answers in "
        "examples.jsonl, and run again."
    )


def _finding(dense: Measured, pruned: Measured, difference: Measured | None) -> tuple[str, str, str]:
    """Returns the level, its words and the sentence for two measurements and their paired difference."""
    if difference is not None and difference.low is not None and difference.high is not None:
        return _paired_finding(dense, pruned, difference)
    if dense.low is None or dense.high is None or pruned.low is None or pruned.high is None:
        return "unknown", "No interval", "No intervals were recorded, so this may be chance."
    if pruned.high < dense.low:
        finding = "The 95% intervals do not overlap: the loss is more than evaluation noise."
        return "worse", "Clearly worse", finding
    if pruned.low > dense.high:
        finding = "The 95% intervals do not overlap: the gain is more than evaluation noise."
        return "better", "Clearly better", finding
    relative_loss = ratio(dense.value - pruned.value, dense.value) or 0.0
    if pruned.value <= dense.value and (relative_loss > _SMALL_LOSS or dense.is_small or pruned.is_small):
        examples = "" if pruned.n is None else f" on {whole(pruned.n)} examples"
        finding = (
            f"The 95% intervals overlap: this evaluation{examples} cannot tell such a difference from chance."
        )
        return "unclear", "Cannot tell", finding
    finding = (
        "The 95% intervals overlap: this evaluation shows no clear difference, which is not proof "
        "that there is none."
    )
    if pruned.value > dense.value:
        finding = "The 95% intervals overlap: do not read this as an improvement."
        if dense.is_small or pruned.is_small:
            return "unclear", "Cannot tell", finding
    return "even", "No clear difference", finding


def _paired_finding(dense: Measured, pruned: Measured, difference: Measured) -> tuple[str, str, str]:
    """The same from the difference on each example, which tells more than two intervals that overlap."""
    assert difference.low is not None and difference.high is not None
    shown = f"{signed_percent(difference.value)[:-1]} points, 95% {interval(difference.low, difference.high)}"
    paired = f"The difference on the same examples is {shown}"
    if difference.high < 0:
        return "worse", "Clearly worse", f"{paired}: the loss is more than evaluation noise."
    if difference.low > 0:
        return "better", "Clearly better", f"{paired}: the gain is more than evaluation noise."
    relative_loss = ratio(-difference.value, dense.value) or 0.0
    if relative_loss > _SMALL_LOSS or dense.is_small or pruned.is_small:
        return "unclear", "Cannot tell", f"{paired}: it cannot be told from chance."
    finding = f"{paired}: no clear difference, which is not proof that there is none."
    return "even", "No clear difference", finding


def _notes(view: RunView, dense: Measured, pruned: Measured, tuned: bool) -> tuple[str, ...]:
    """Returns what a careful reader would object."""
    main = view.main
    assert main is not None and view.dense is not None
    notes = []
    smallest = min((m.n for m in (dense, pruned) if m.n is not None), default=None)
    if dense.is_small or pruned.is_small:
        notes.append(
            f"Only {whole(smallest)} examples were evaluated; below 100 the intervals are wide and "
            "small losses stay invisible. Evaluate more rows before deciding."
        )
    notes.extend(_majority_notes(view.majority, dense, pruned, main))
    notes.extend(_rival_notes(view, pruned, tuned))
    if not tuned:
        notes.append("Both models were compared as they are, before fine-tuning.")
    elif bool(view.dense.finetune) != bool(main.finetune):
        tuned_label = view.dense.label if view.dense.finetune else main.label
        notes.append(f"Only {tuned_label} was fine-tuned: the comparison is not like for like.")
    dense_steps, steps = (v.finetune.get("steps") for v in (view.dense, main))
    if dense_steps is not None and steps is not None and dense_steps != steps:
        notes.append(
            f"Fine-tuning took {whole(dense_steps)} steps for dense and {whole(steps)} for "
            f"{main.label}: the times and the accuracies are not like for like."
        )
    notes.extend(_interrupted(view))
    time_ratio = ratio(main.finetune.get("seconds"), view.dense.finetune.get("seconds"))
    if time_ratio is not None and time_ratio >= 1:
        notes.append("Fine-tuning the pruned model was not faster in this run.")
    return tuple(notes)


def _interrupted(view: RunView) -> list[str]:
    """Names the rows whose time leaves out what was done before their training was interrupted."""
    notes = []
    for variant in view.variants:
        behind = number(variant.finetune.get("measured_from"))
        if behind:
            notes.append(
                f"Fine-tuning of {variant.label} was interrupted: its time and memory are those of the steps "
                f"after {whole(behind)} of {whole(variant.finetune.get('steps'))}."
            )
    return notes


def _majority_notes(majority: float | None, dense: Measured, pruned: Measured, main: Variant) -> list[str]:
    """Warns when a model is not clearly above the most frequent answer; one below it is the headline."""
    if majority is None or dense.value <= majority:
        return []
    always = f"always giving the most frequent answer ({percent(majority)})"
    if (dense.low if dense.low is not None else dense.value) <= majority:
        return [
            f"Even the dense model is not clearly above {always}: it has not learned the task, so "
            "this run says little about pruning."
        ]
    if (pruned.low if pruned.low is not None else pruned.value) <= majority:
        return [f"{main.label} is not clearly above {always}."]
    return []


def _rival_notes(view: RunView, pruned: Measured, tuned: bool) -> list[str]:
    """Names the other pruned variants that did at least as well with no more layers."""
    rivals = []
    for variant in view.variants:
        if variant.is_dense or variant is view.main or variant.error is not None:
            continue
        other = (variant.after if tuned else variant.before).get(view.metric)
        if other is not None and other.value >= pruned.value:
            rivals.append(f"{variant.label} ({percent(other.value)})")
    if not rivals or view.main is None:
        return []
    return [f"Scored at least as high as {view.main.label} in this run: {', '.join(rivals)}."]


def _relative(dense: Measured, pruned: Measured) -> str:
    """Returns the relative loss or gain in words."""
    change = ratio(pruned.value - dense.value, dense.value)
    if change is None:
        return "no relative loss: dense scores 0"
    return f"{percent(abs(change))} relative {'gain' if change > 0 else 'loss'}"


def _change(after: object, before: object) -> str:
    """Returns the relative change, with its sign."""
    fraction = ratio(after, before)
    return signed_percent(None if fraction is None else fraction - 1)


def _interval_remark(before: Measured | None, after: Measured | None) -> str:
    """Returns the change in points, and both intervals when both are known."""
    if before is None or after is None:
        return ""
    points = f"relative; {signed_percent(after.value - before.value)[:-1]} points"
    if not (before.has_interval and after.has_interval):
        return points
    shown = [interval(m.low, m.high).replace(" ", "\u00a0") for m in (before, after)]
    return f"{points}. 95%: {shown[0]} → {shown[1]}"


def _quality_label(metric: str) -> str:
    """Names the metric as people look for it."""
    name = metric_label(metric)
    return f"Accuracy ({name.lower()})" if metric == "exact_match" else name
