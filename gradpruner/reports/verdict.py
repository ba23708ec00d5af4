"""What a run or a study shows, in plain words, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.printing import (
    interval,
    percent,
    points,
    ratio,
    text,
    whole,
)
from gradpruner.reports.notes import comparison_notes, not_learned, probe_notes, run_notes, size_notes
from gradpruner.reports.record import Measured
from gradpruner.reports.view import Point, Row, View, metric_label

_SMALL_LOSS = 0.02
"""Largest relative loss reported as 'no clear difference' when nothing can be told from chance."""
NOT_LEARNED = "Not learned"
_UNITS = {"parameters": "all parameters", "decoder_parameters": "the decoder's parameters"}


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


def judge(view: View) -> Verdict:
    """Says whether the headline's row is as good as dense, beats the last layers, or what settings change."""
    return {"run": _judge_run, "compare": _judge_comparison, "ablation": _judge_sweep}[view.kind](view)


def compared(view: View) -> tuple[Measured | None, Measured | None, bool]:
    """The main metric of dense and of the headline's row, and whether both are finished.

    A fine-tuned model is never compared with one that is not: without both, the two measurements
    before fine-tuning are taken.
    """
    dense, main, metric = view.dense, view.main, view.metric
    after = (dense.after(metric) if dense else None, main.after(metric) if main else None)
    before = (dense.before(metric) if dense else None, main.before(metric) if main else None)
    if None in after and None not in before:
        return (*before, False)
    return (*after, True)


def _judge_run(view: View) -> Verdict:
    dense, main = view.dense, view.main
    failures = tuple(f"{row.label} failed: {text(row.error, 300)}" for row in view.rows if row.error)
    if main is None:
        return Verdict("unknown", "No result", "This run holds no pruned model.", failures)
    before, after, tuned = compared(view)
    if dense is None or before is None or after is None:
        lacking = " and ".join(
            name for name, value in (("the dense model", before), (main.label, after)) if value is None
        )
        sentence = f"Nothing to compare: {lacking} has no {metric_label(view.metric).lower()}."
        return Verdict("unknown", "No result", sentence, failures)
    level, word, finding = _finding(before, after, main.paired(view.metric) if tuned else None)
    learned = not_learned(view, tuned)
    if learned:
        level, word, finding = "unclear", NOT_LEARNED, learned
    sentence = (
        f"{main.label} keeps {whole(main.num_layers)} of {whole(dense.num_layers)} layers and scores "
        f"{percent(after.value)} where the dense model scores {percent(before.value)}. {finding}"
    )
    notes = (*failures, *probe_notes(view), *run_notes(view, before, after, tuned))
    return Verdict(level, word, sentence, notes)


def _judge_comparison(view: View) -> Verdict:
    """Compares GradPruner with dropping the last layers and counts wins, ties and losses."""
    point, main = view.first, view.main
    failed = tuple(f"{r.label} failed: {text(r.error, 300)}" for r in point.rows if r.error is not None)
    notes = (*failed, *size_notes(view), *comparison_notes(view))
    mine = main.after(view.metric) if main else None
    if main is None or mine is None:
        return Verdict("unknown", "No result", "No pruned model was measured.", notes)
    paired, dense = main.paired(view.metric), point.row("dense")
    whole_model = dense.after(view.metric) if dense else None
    of_dense = f" where the dense model scores {percent(whole_model.value)}" if whole_model else ""
    of_dense += f" ({_paired_words(paired)})" if whole_model and paired else ""
    parts = [f"{main.label} scores {percent(mine.value)}{of_dense}."]
    last = point.row("last")
    level, word, against = "unknown", "Nothing to compare", ""
    if last is not None and last is not main and last.after(view.metric) is not None:
        level, word, against = _against_last(main, last, view.metric)
    elif paired is not None:
        level, word = _level(paired, ("Better than dense", "No clear difference", "Below dense"))
    learned = not_learned(view)
    if learned:
        return Verdict("unclear", NOT_LEARNED, f"{parts[0]} {learned}", notes)
    parts += [words for words in (against, tally_words(view, point), _merging(point, view.metric)) if words]
    return Verdict(level, word, " ".join(parts), notes)


def _judge_sweep(view: View) -> Verdict:
    """Names the best and the worst setting of the main row, and whether they can be told apart."""
    main = view.main_name
    found = []
    for point in view.points:
        row = point.row(main)
        if row is not None and (after := row.after(view.metric)) is not None and after.value is not None:
            found.append((after.value, point, after, len(row.quality[view.metric].per_seed)))
    failed = tuple(
        f"{row.label} at {point.label} failed: {text(row.error, 200)}"
        for point in view.points
        for row in point.rows
        if row.error is not None
    )
    notes = (*failed, *size_notes(view))
    if not found or main is None:
        return Verdict("unknown", "No result", "No setting was measured.", notes)
    high, low = max(found, key=lambda entry: entry[0]), min(found, key=lambda entry: entry[0])
    name = f"{view.names[main]}, {view.sweep_label}"
    if len(found) == 1:
        sentence = f"{name}: only {high[1].label} was measured, {percent(high[0])}."
        return Verdict("unknown", "One setting", sentence, notes)
    sentence = (
        f"{name}: highest at {high[1].label} ({percent(high[0])}), lowest at {low[1].label} "
        f"({percent(low[0])}), {points(high[0] - low[0]).lstrip('+')} points apart."
    )
    learned = not_learned(view)
    if learned:
        return Verdict("unclear", NOT_LEARNED, f"{sentence} {learned}", notes)
    seeds = min(high[3], low[3])
    if seeds < 2:
        return Verdict("unclear", "Cannot tell", f"{sentence} One seed each: this may be chance.", notes)
    if low[2].high is not None and high[2].low is not None and low[2].high < high[2].low:
        sentence += f" Every seed of the first is above every seed of the second ({seeds} each)."
        return Verdict("better", "It makes a difference", sentence, notes)
    sentence += f" The seeds of the two overlap ({seeds} each): no clear difference."
    return Verdict("even", "No clear difference", sentence, notes)


def _finding(dense: Measured, pruned: Measured, difference: Measured | None) -> tuple[str, str, str]:
    """The level, its words and the sentence, from the paired difference or else from two intervals."""
    small = dense.is_small or pruned.is_small
    if difference is not None and difference.has_interval:
        how = f"The difference on the same examples is {_paired_words(difference)}"
        level, _ = _level(difference, ("", "", ""))
        loss, gain = difference.value, False
    elif dense.has_interval and pruned.has_interval:
        apart = (pruned.low or 0) - (dense.high or 0), (pruned.high or 0) - (dense.low or 0)
        level, _ = _level(Measured(value=0, low=apart[0], high=apart[1]), ("", "", ""))
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
        return (*word, f"{how}: do not read this as an improvement.")
    if (ratio(-(loss or 0), dense.value) or 0.0) > _SMALL_LOSS or small:
        examples = "" if pruned.n is None else f" on {whole(pruned.n)} examples"
        return "unclear", "Cannot tell", f"{how}: this evaluation{examples} cannot tell it from chance."
    return (
        "even",
        "No clear difference",
        f"{how}: no clear difference, which is not proof that there is none.",
    )


def budget_words(view: View) -> str:
    """The budget of a comparison in a sentence, '' when it is not known."""
    budget = view.record.budget
    if view.kind != "compare" or (budget.removed is None and budget.share is None):
        return ""
    unit = _UNITS.get(str(budget.unit), text(budget.unit or "the parameters"))
    total = view.record.model.num_layers
    of = f" of its {whole(total)}" if total else ""
    worth = f", what {whole(budget.layers)}{of} decoder layers hold" if budget.layers else ""
    return (
        f"One budget for every method: {whole(budget.removed)} parameters, {percent(budget.share)} of "
        f"{unit}{worth}. Methods that cannot meet it exactly stay within one of their units."
    )


def tally_words(view: View, point: Point) -> str:
    """Wins, ties and losses of GradPruner by paired intervals, '' without any."""
    rivals = [
        row.quality[view.metric].rival
        for row in point.rows
        if row.name not in ("dense", "dropped", view.main_name)
        and not row.is_smaller
        and view.metric in row.quality
    ]
    levels = [_level(r.turned(), ("", "", ""))[0] for r in rivals if r is not None and r.has_interval]
    if not levels:
        return ""
    wins, losses = levels.count("better"), levels.count("worse")
    ties = len(levels) - wins - losses
    return (
        f"Against {len(levels)} other method{'s' if len(levels) > 1 else ''}, by paired 95% intervals: "
        f"{wins} win{'' if wins == 1 else 's'}, {ties} tie{'' if ties == 1 else 's'}, "
        f"{losses} loss{'' if losses == 1 else 'es'}."
    )


def serving_note(view: View) -> str:
    """Names the rows whose layers differ in width and what that means; '' when there are none."""
    labels = list(dict.fromkeys(row.label for row in view.rows if row.uniform is False))
    if not labels:
        return ""
    verb = "has" if len(labels) == 1 else "have"
    return (
        f"{'; '.join(labels)} {verb} layers of unequal width: such a model loads through gradpruner only; "
        "vLLM, SGLang and llama.cpp refuse it."
    )


def _against_last(main: Row, last: Row, metric: str) -> tuple[str, str, str]:
    """Returns level, its words and the sentence on the simplest rival there is."""
    mine, theirs = main.after(metric), last.quality[metric]
    value = percent(theirs.after.value if theirs.after else None)
    if theirs.rival is None or not theirs.rival.has_interval:
        other = theirs.after.value if theirs.after else None
        ahead = "above" if mine and other is not None and mine.value > other else "not above"
        sentence = (
            f"That is {ahead} just dropping the last layers ({value}), without an interval: it may be chance."
        )
        return "unclear", "Cannot tell", sentence
    gain = theirs.rival.turned()
    than = "dropping the last layers"
    level, word = _level(gain, (f"Better than {than}", f"No clear gain over {than}", f"Worse than {than}"))
    verbs = {"better": "beats", "even": "cannot be told from", "worse": "loses to"}
    return level, word, f"It {verbs[level]} just {than} ({value}): {_paired_words(gain)}."


def _merging(point: Point, metric: str) -> str:
    """Says what merging adds over dropping the same layers."""
    dropped = point.row("dropped")
    rival = dropped.quality[metric].rival if dropped is not None and metric in dropped.quality else None
    if rival is None or not rival.has_interval:
        return ""
    gain = rival.turned()
    level, verb = _level(gain, ("adds", "adds nothing that can be told from chance", "costs"))
    if level == "even":
        return f"Merging {verb} ({_paired_words(gain)})."
    size = points(abs(gain.value)).lstrip("+")
    ends = sorted(abs(end) for end in (gain.low or 0, gain.high or 0))
    return f"Merging {verb} {size} points, 95% {interval(*ends)}."


def _level(gain: Measured, words: Sequence[str]) -> tuple[str, str]:
    """Better, even or worse, by where the interval of a difference lies."""
    if gain.low is not None and gain.low > 0:
        return "better", words[0]
    if gain.high is not None and gain.high < 0:
        return "worse", words[2]
    return "even", words[1]


def _paired_words(paired: Measured) -> str:
    shown = interval(paired.low, paired.high)
    return f"{points(paired.value)} points" + (f", 95% {shown}" if shown else "")


def reading_words(view: View) -> str:
    """How the numbers of the main table are to be read."""
    words = []
    if view.kind == "run":
        words.append("Brackets are 95% bootstrap intervals, in percent.")
    elif len(view.seeds) > 1:
        words.append(
            f"{metric_label(view.metric)} is the mean over {len(view.seeds)} seeds, in brackets the lowest "
            "and the highest."
        )
    if any(q.paired is not None for row in view.rows for q in row.quality.values()):
        words.append(
            "Differences are in points, example by example, with 95% bootstrap intervals over examples."
        )
    if any(row.costs.get("training_ratio") is not None for row in view.rows):
        words.append(
            "Training, inference and all there is are times against the dense model of the same seed."
        )
    if any(m.is_small for row in view.rows for q in row.quality.values() for m in (q.after, q.before) if m):
        words.append("* Fewer than 100 examples: read the interval, not the value.")
    return " ".join(words)
