"""The conclusion of a run or a study in one sentence, and the notes that limit it."""

from __future__ import annotations

from dataclasses import dataclass

from gradpruner.common.printing import counted, interval, percent, points, ratio, text, whole
from gradpruner.reports.fields import Measured
from gradpruner.reports.notes import comparison_notes, not_learned, probe_notes, run_notes, size_notes
from gradpruner.reports.view import LONGEST_ERROR, Point, Row, View, metric_words

_SMALL_LOSS = 0.02
"""A relative loss that may be chance is 'No clear difference' up to this size, and 'Cannot tell' above it."""
NOT_LEARNED = "Not learned"


@dataclass(frozen=True)
class Verdict:
    """A conclusion.

    Attributes:
        level: 'even' (no clear difference), 'unclear' (a difference that may be chance), 'better',
            'worse' or 'unknown'.
        word: The conclusion in two or three words.
        sentence: The conclusion with its numbers.
        notes: What limits the conclusion, most serious first.
    """

    level: str
    word: str
    sentence: str
    notes: list[str]


def judge(view: View) -> Verdict:
    """Judges a run (pruned against dense), a comparison (GradPruner against last layers) or a sweep."""
    return {"run": _judge_run, "compare": _judge_comparison, "ablation": _judge_sweep}[view.kind](view)


def _concluded(
    view: View, lead: str, finding: tuple[str, str, str], notes: list[str], tuned: bool = True
) -> Verdict:
    """Returns the verdict for a finding (level, word, sentence), or 'Not learned' if the task was not."""
    learned = not_learned(view, tuned)
    level, word, sentence = ("unclear", NOT_LEARNED, learned) if learned else finding
    return Verdict(level, word, f"{lead} {sentence}".rstrip(), notes)


def _failures(view: View) -> list[str]:
    return [
        f"{row.label}{f' at {point.label}' if view.kind == 'ablation' else ''} failed: "
        f"{text(row.error, LONGEST_ERROR)}"
        for point in view.points
        for row in point.rows
        if row.error
    ]


def compared(view: View) -> tuple[Measured | None, Measured | None, bool]:
    """Returns the main metric of the dense and of the main row, and whether both are finished models.

    A fine-tuned model is never compared with one that is not: unless both are finished, the two values from
    before fine-tuning are returned.
    """
    rows = (view.dense, view.main)
    dense, main = (row.after.get(view.metric) if row else None for row in rows)
    early, pruned = (row.before.get(view.metric) if row else None for row in rows)
    if (dense is None or main is None) and early is not None and pruned is not None:
        return early, pruned, False
    return dense, main, True


def _judge_run(view: View) -> Verdict:
    dense, main, failures = view.dense, view.main, _failures(view)
    if main is None:
        return Verdict("unknown", "No result", "This run has no pruned model.", failures)
    before, after, tuned = compared(view)
    if dense is None or before is None or after is None:
        measured = {"the dense model": before, main.label: after}
        lacking = " and ".join(name for name, value in measured.items() if value is None)
        sentence = f"Nothing to compare: no {metric_words(view.metric)} was measured for {lacking}."
        return Verdict("unknown", "No result", sentence, failures)
    finding = _finding(before, after, main.paired.get(view.metric) if tuned else None)
    lead = (
        f"{main.label} keeps {whole(main.num_layers)} of {whole(dense.num_layers)} layers and scores "
        f"{percent(after.value)}; the dense model scores {percent(before.value)}."
    )
    notes = [*failures, *probe_notes(view), *run_notes(view, before, after, tuned)]
    return _concluded(view, lead, finding, notes, tuned)


def _judge_comparison(view: View) -> Verdict:
    """Compares GradPruner with dropping the last layers and counts wins, ties and losses."""
    point, main = view.first, view.main
    notes = [*_failures(view), *size_notes(view), *comparison_notes(view)]
    if main is None or view.metric not in main.after:
        return Verdict("unknown", "No result", "No pruned model was measured.", notes)
    paired = main.paired.get(view.metric)
    dense = view.dense.after.get(view.metric) if view.dense else None
    of_dense = f"; the dense model scores {percent(dense.value)}" if dense else ""
    of_dense += f" ({_paired_words(paired)})" if dense and paired else ""
    lead = f"{main.label} scores {percent(main.after[view.metric].value)}{of_dense}."
    last = point.row("last")
    level, word, against = "unknown", "Nothing to compare", ""
    if last is not None and last is not main and view.metric in last.after:
        level, word, against = _against_last(main, last, view.metric)
    elif paired is not None:
        level = _level(paired)
        word = {"better": "Better than dense", "even": "No clear difference", "worse": "Below dense"}[level]
    words = (against, _tally_words(view, point), _merging(point, view.metric))
    return _concluded(view, lead, (level, word, " ".join(filter(None, words))), notes)


def _judge_sweep(view: View) -> Verdict:
    """Names the best and the worst setting of the main row, and whether they can be told apart."""
    main = view.main_name
    rows = [(point.label, point.row(main)) for point in view.points]
    found = [(label, row.after[view.metric]) for label, row in rows if row and view.metric in row.after]
    notes = [*_failures(view), *size_notes(view)]
    if not found or main is None:
        return Verdict("unknown", "No result", "No setting was measured.", notes)
    (best, high), (worst, low) = (pick(found, key=lambda entry: entry[1].value) for pick in (max, min))
    name = f"{view.names[main]}, {view.sweep_label}"
    if len(found) == 1:
        sentence = f"{name}: only {best} was measured, {percent(high.value)}."
        return Verdict("unknown", "One setting", sentence, notes)
    lead = (
        f"{name}: best at {best} ({percent(high.value)}), worst at {worst} "
        f"({percent(low.value)}), {points(high.value - low.value).lstrip('+')} points apart."
    )
    seeds = min(len(high.per_seed), len(low.per_seed))
    finding = (
        "even",
        "No clear difference",
        f"The seeds of the best and the worst setting overlap ({seeds} each): no clear difference.",
    )
    if seeds < 2:
        finding = ("unclear", "Cannot tell", "Only one seed each: this may be chance.")
    elif low.high is not None and high.low is not None and low.high < high.low:
        above = f"Every seed of the best setting is above every seed of the worst one ({seeds} each)."
        finding = ("better", "It makes a difference", above)
    return _concluded(view, lead, finding, notes)


def _finding(dense: Measured, pruned: Measured, difference: Measured | None) -> tuple[str, str, str]:
    """Returns level, word and sentence, from the paired difference or else from the two intervals."""
    small = dense.is_small or pruned.is_small
    if difference is not None and difference.ends:
        how = f"On the same examples, the difference is {_paired_words(difference)}"
        level, loss, gain = _level(difference), difference.value, False
    elif dense.ends and pruned.ends:
        apart = (pruned.low or 0) - (dense.high or 0), (pruned.high or 0) - (dense.low or 0)
        level = _level(Measured(low=apart[0], high=apart[1]))
        how = f"The 95% intervals {'overlap' if level == 'even' else 'do not overlap'}"
        loss = pruned.value - dense.value
        gain = loss > 0
    else:
        return "unknown", "No interval", "No intervals were recorded, so this may be chance."
    if level != "even":
        what = "gain" if level == "better" else "loss"
        return level, f"Clearly {level}", f"{how}: the {what} is more than evaluation noise."
    if gain:
        word = ("unclear", "Cannot tell") if small else ("even", "No clear difference")
        return (*word, f"{how}: this is not a clear improvement.")
    if (ratio(-(loss or 0), dense.value) or 0.0) > _SMALL_LOSS or small:
        examples = "" if pruned.n is None else f" on {whole(pruned.n)} examples"
        return "unclear", "Cannot tell", f"{how}: this evaluation{examples} cannot tell it from chance."
    return (
        "even",
        "No clear difference",
        f"{how}: no clear difference, which is not proof that there is none.",
    )


def _tally_words(view: View, point: Point) -> str:
    """Counts GradPruner's wins, ties and losses by paired intervals; '' if there are none."""
    rivals = [
        row.rival[view.metric].turned()
        for row in point.rows
        if row.is_pruned and row.name not in ("dropped", view.main_name) and view.metric in row.rival
    ]
    levels = [_level(rival) for rival in rivals if rival.ends]
    if not levels:
        return ""
    wins, losses = levels.count("better"), levels.count("worse")
    ties = len(levels) - wins - losses
    return (
        f"Against {counted(len(levels), 'other method')} (by paired 95% intervals): "
        f"{counted(wins, 'win')}, {counted(ties, 'tie')}, "
        f"{losses} loss{'' if losses == 1 else 'es'}."
    )


def _against_last(main: Row, last: Row, metric: str) -> tuple[str, str, str]:
    """Returns level, word and sentence on the simplest rival: dropping the last layers."""
    mine, theirs = main.after[metric].value, last.after[metric].value
    rival = last.rival.get(metric)
    if rival is None or not rival.ends:
        ahead = "better" if mine > theirs else "no better"
        words = f"That is {ahead} than just dropping the last layers ({percent(theirs)}), without an interval"
        return "unclear", "Cannot tell", f"{words}: it may be chance."
    gain = rival.turned()
    level, than = _level(gain), "dropping the last layers"
    word, verb = {
        "better": ("Better than", "beats"),
        "even": ("No clear gain over", "does not clearly differ from"),
        "worse": ("Worse than", "loses to"),
    }[level]
    return level, f"{word} {than}", f"It {verb} just {than} ({percent(theirs)}): {_paired_words(gain)}."


def _merging(point: Point, metric: str) -> str:
    """Says what merging adds to dropping the same layers; '' if that was not measured."""
    dropped = point.row("dropped")
    rival = dropped.rival.get(metric) if dropped is not None else None
    if rival is None or not rival.ends:
        return ""
    gain = rival.turned()
    level = _level(gain)
    if level == "even":
        return f"Merging makes no clear difference ({_paired_words(gain)})."
    size = points(abs(gain.value)).lstrip("+")
    ends = sorted(map(abs, gain.ends or ()))
    return f"Merging {'adds' if level == 'better' else 'costs'} {size} points, 95% {interval(*ends)}."


def _level(gain: Measured) -> str:
    """Returns 'better', 'even' or 'worse': whether the interval lies above, around or below zero."""
    if gain.low is not None and gain.low > 0:
        return "better"
    return "worse" if gain.high is not None and gain.high < 0 else "even"


def _paired_words(paired: Measured) -> str:
    shown = interval(paired.low, paired.high)
    return f"{points(paired.value)} points" + (f", 95% {shown}" if shown else "")
