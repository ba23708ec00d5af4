"""What a study shows, in plain words, and what limits it."""

from __future__ import annotations

from collections.abc import Sequence

from gradpruner.reports.formats import interval, number, percent, short, signed_percent, text, times, whole
from gradpruner.reports.reading import FEW_EXAMPLES, Measured, mapping, metric_label
from gradpruner.reports.study_reading import Quality, StudyPoint, StudyRow, StudyView
from gradpruner.reports.verdict import NOT_LEARNED, Tile, Verdict, not_learned, what_to_change

FEW_SEEDS = 3
"""With fewer seeds the range over seeds says little."""
_FAR_FROM_BUDGET = 0.03
"""Removed shares further than this from the budget are named."""
_UNITS = {"parameters": "all parameters", "decoder_parameters": "the decoder's parameters"}


def judge_study(view: StudyView) -> Verdict:
    """Says whether GradPruner beats dropping the last layers, or what a sweep changes."""
    return judge_sweep(view) if view.kind == "ablation" else judge_comparison(view)


def judge_comparison(view: StudyView) -> Verdict:
    """Compares GradPruner with dropping the last layers and counts wins, ties and losses."""
    point = view.points[0] if view.points else StudyPoint(None, "", ())
    main = _measured_row(point, view.main_name, view.metric)
    failed = tuple(f"{r.label} failed: {text(r.error, 300)}" for r in point.rows if r.error is not None)
    notes = (*failed, *_comparison_notes(view, point, main))
    if main is None:
        return Verdict("unknown", "No result", "No pruned model was measured.", notes)
    quality = main.quality[view.metric]
    parts = [f"{main.label} scores {percent(quality.mean.value)}{_of_dense(view, point, quality)}."]
    last = _measured_row(point, "last", view.metric)
    level, word, against = "unknown", "Nothing to compare", ""
    if last is not None and last is not main:
        level, word, against = _against_last(main, last, view.metric)
    elif quality.paired is not None:
        level, word = _level(quality.paired, ("Better than dense", "No clear difference", "Below dense"))
    learned = _not_learned(view, (point,))
    if learned:
        return Verdict("unclear", NOT_LEARNED, f"{parts[0]} {learned}", notes)
    merging = _merging(point, view.metric)
    tally = tally_words(view, point)
    parts += [words for words in (against, tally, merging) if words]
    return Verdict(level, word, " ".join(parts), notes)


def judge_sweep(view: StudyView) -> Verdict:
    """Names the best and the worst setting of the main row, and whether they can be told apart."""
    main = view.main_name
    found = [
        (point, row.quality[view.metric])
        for point in view.points
        if (row := _measured_row(point, main, view.metric)) is not None
    ]
    failed = tuple(
        f"{row.label} at {point.label} failed: {text(row.error, 200)}"
        for point in view.points
        for row in point.rows
        if row.error is not None
    )
    notes = (*failed, *_size_notes(view))
    if not found or main is None:
        return Verdict("unknown", "No result", "No setting was measured.", notes)
    (best, high), (worst, low) = (
        max(found, key=lambda entry: entry[1].mean.value),
        min(found, key=lambda entry: entry[1].mean.value),
    )
    name = f"{view.names[main]}, {view.sweep_label}"
    if len(found) == 1:
        sentence = f"{name}: only {best.label} was measured, {percent(high.mean.value)}."
        return Verdict("unknown", "One setting", sentence, notes)
    sentence = (
        f"{name}: highest at {best.label} ({percent(high.mean.value)}), lowest at {worst.label} "
        f"({percent(low.mean.value)}), {_points(high.mean.value - low.mean.value).lstrip('+')} points apart."
    )
    learned = _not_learned(view, view.points)
    if learned:
        return Verdict("unclear", NOT_LEARNED, f"{sentence} {learned}", notes)
    seeds = min(len(high.per_seed), len(low.per_seed))
    if seeds < 2:
        return Verdict("unclear", "Cannot tell", f"{sentence} One seed each: this may be chance.", notes)
    if low.mean.high is not None and high.mean.low is not None and low.mean.high < high.mean.low:
        sentence += f" Every seed of the first is above every seed of the second ({seeds} each)."
        return Verdict("better", "It makes a difference", sentence, notes)
    sentence += f" The seeds of the two overlap ({seeds} each): no clear difference."
    return Verdict("even", "No clear difference", sentence, notes)


def study_tiles(view: StudyView) -> tuple[Tile, ...]:
    """Returns a comparison's headline numbers: size, against dense, against the last layers, time."""
    if view.kind == "ablation" or not view.points:
        return ()
    point = view.points[0]
    dense = _measured_row(point, "dense", view.metric)
    main = _measured_row(point, view.main_name, view.metric)
    last = _measured_row(point, "last", view.metric)
    if main is None:
        return ()
    tiles = []
    quality = main.quality[view.metric]
    if dense is not None:
        removed = None if main.removed_share is None else -main.removed_share
        tiles.append(
            Tile(
                "Parameters",
                signed_percent(removed),
                short(dense.num_parameters),
                short(main.num_parameters),
                main.label,
            )
        )
        tiles.append(_difference_tile("Against dense", dense, quality, quality.paired, view.metric))
    if last is not None and last is not main:
        rival = last.quality[view.metric].rival
        turned = None if rival is None else _turned(rival)
        tiles.append(_difference_tile("Against the last layers", last, quality, turned, view.metric))
    costs, whole_model = main.costs, dense.costs if dense is not None else {}
    tiles.append(
        Tile(
            "Training time",
            times(costs.get("training_ratio")),
            times(whole_model.get("training_ratio")),
            times(costs.get("training_ratio")),
            f"inference {times(costs.get('inference_ratio'))} of dense",
        )
    )
    return tuple(tile for tile in tiles if tile.change != "–")


def budget_words(view: StudyView) -> str:
    """Returns the budget in a sentence, '' when it is not known."""
    budget = mapping(view.study, "budget")
    unit = _UNITS.get(str(budget.get("unit")), text(budget.get("unit") or "the parameters"))
    share, removed, layers = budget.get("share"), budget.get("removed"), budget.get("layers")
    if view.kind == "ablation" or (removed is None and share is None):
        return ""
    total = mapping(view.study, "model").get("num_layers")
    of = f" of its {whole(total)}" if total else ""
    worth = f", what {whole(layers)}{of} decoder layers hold" if layers else ""
    return (
        f"One budget for every method: {whole(removed)} parameters, {percent(share)} of {unit}{worth}. "
        "Methods that cannot meet it exactly stay within one of their units."
    )


def tally_words(view: StudyView, point: StudyPoint) -> str:
    """Returns wins, ties and losses of GradPruner by paired intervals, '' without any."""
    rivals = [
        row.quality[view.metric].rival
        for row in point.rows
        if row.name not in ("dense", "dropped", view.main_name)
        and not row.is_smaller
        and view.metric in row.quality
    ]
    known = [r for r in rivals if r is not None and r.low is not None and r.high is not None]
    if not known:
        return ""
    wins = sum(1 for r in known if r.high is not None and r.high < 0)
    losses = sum(1 for r in known if r.low is not None and r.low > 0)
    ties = len(known) - wins - losses
    return (
        f"Against {len(known)} other method{'s' if len(known) > 1 else ''}, by paired 95% intervals: "
        f"{wins} win{'' if wins == 1 else 's'}, {ties} tie{'' if ties == 1 else 's'}, "
        f"{losses} loss{'' if losses == 1 else 'es'}."
    )


def serving_note(view: StudyView) -> str:
    """Names the rows whose layers differ in width and what that means; '' when there are none."""
    labels = list(dict.fromkeys(row.label for row in view.rows if row.uniform is False))
    if not labels:
        return ""
    verb = "has" if len(labels) == 1 else "have"
    return (
        f"{'; '.join(labels)} {verb} layers of unequal width: such a model loads through gradpruner only; "
        "vLLM, SGLang and llama.cpp refuse it."
    )


def _measured_row(point: StudyPoint, name: str | None, metric: str) -> StudyRow | None:
    row = point.row(name) if name is not None else None
    return row if row is not None and metric in row.quality else None


def _of_dense(view: StudyView, point: StudyPoint, quality: Quality) -> str:
    dense = _measured_row(point, "dense", view.metric)
    if dense is None:
        return ""
    shown = f" where the dense model scores {percent(dense.quality[view.metric].mean.value)}"
    return shown + (f" ({_paired_words(quality.paired)})" if quality.paired is not None else "")


def _against_last(main: StudyRow, last: StudyRow, metric: str) -> tuple[str, str, str]:
    """Returns level, its words and the sentence on the simplest rival there is."""
    mine, theirs = main.quality[metric], last.quality[metric]
    value = percent(theirs.mean.value)
    if theirs.rival is None or theirs.rival.low is None or theirs.rival.high is None:
        ahead = "above" if mine.mean.value > theirs.mean.value else "not above"
        sentence = (
            f"That is {ahead} just dropping the last layers ({value}), without an interval: it may be chance."
        )
        return "unclear", "Cannot tell", sentence
    gain = _turned(theirs.rival)
    level, word = _level(
        gain,
        (
            "Better than dropping the last layers",
            "No clear gain over dropping the last layers",
            "Worse than dropping the last layers",
        ),
    )
    verbs = {"better": "beats", "even": "cannot be told from", "worse": "loses to"}
    sentence = f"It {verbs[level]} just dropping the last layers ({value}): {_paired_words(gain)}."
    return level, word, sentence


def _merging(point: StudyPoint, metric: str) -> str:
    """Says what merging adds over dropping the same layers."""
    dropped = _measured_row(point, "dropped", metric)
    rival = dropped.quality[metric].rival if dropped is not None else None
    if rival is None or rival.low is None or rival.high is None:
        return ""
    gain = _turned(rival)
    level, _ = _level(gain, ("", "", ""))
    words = {"better": "adds", "even": "adds nothing that can be told from chance", "worse": "costs"}
    if level == "even":
        return f"Merging {words[level]} ({_paired_words(gain)})."
    return f"Merging {words[level]} {_paired_words(gain).lstrip('+−')}."


def _level(gain: Measured, words: tuple[str, str, str]) -> tuple[str, str]:
    if gain.low is not None and gain.low > 0:
        return "better", words[0]
    if gain.high is not None and gain.high < 0:
        return "worse", words[2]
    return "even", words[1]


def _comparison_notes(view: StudyView, point: StudyPoint, main: StudyRow | None) -> tuple[str, ...]:
    """Returns what a careful reader would object."""
    notes = _size_notes(view)
    if main is not None:
        mine = main.quality[view.metric].mean.value
        better = [
            f"{row.label} ({percent(row.quality[view.metric].mean.value)})"
            for row in point.rows
            if not row.is_dense
            and row is not main
            and view.metric in row.quality
            and row.quality[view.metric].mean.value >= mine
        ]
        if better:
            notes.append(f"Scored at least as high as {main.label}: {', '.join(better)}.")
    share = mapping(view.study, "budget").get("share")
    off = [
        f"{row.label} ({percent(row.removed_share)})"
        for row in point.rows
        if not row.is_dense
        and isinstance(share, int | float)
        and row.removed_share is not None
        and abs(row.removed_share - share) > _FAR_FROM_BUDGET
    ]
    if off:
        notes.append(f"Not at the budget of {percent(share)} removed: {', '.join(off)}.")
    compared = sum(1 for row in point.rows if not row.is_dense and view.metric in row.quality)
    if compared >= 10:
        notes.append(
            f"{compared} rows are compared at 95%: about one interval in twenty excludes zero by chance."
        )
    return tuple(notes)


def _not_learned(view: StudyView, points: Sequence[StudyPoint]) -> str:
    """Says why nothing can be compared and what to change, '' where the task was learned.

    Only where no dense model of any point is above the most frequent answer: a sweep may hold settings that
    learn nothing beside others that do.
    """
    rows = [row for point in points for row in point.rows if view.metric in row.quality]
    dense = [row.quality[view.metric].mean.value for row in rows if row.is_dense]
    measured = [row.quality[view.metric].mean.value for row in rows]
    why = not_learned(max(dense, default=None), measured, view.majority)
    return f"{why} {what_to_change(mapping(view.study, 'recipe'))}" if why else ""


def _size_notes(view: StudyView) -> list[str]:
    """Warns of few seeds, few examples, and seeds that failed."""
    notes = []
    runs = mapping(view.study, "runs")
    planned, finished = number(runs.get("planned")), number(runs.get("finished"))
    if planned is not None and finished is not None and finished < planned:
        notes.append(f"Not complete: {whole(finished)} of {whole(planned)} runs are finished.")
    seeds = len(view.seeds) or max((row.num_seeds for row in view.rows), default=0)
    if seeds == 1:
        notes.append("One seed: how much another one would change is not known. Run at least three.")
    elif 1 < seeds < FEW_SEEDS:
        notes.append(f"{seeds} seeds: the ranges say little about how much another seed would change.")
    few = view.num_examples
    if few is not None and few < FEW_EXAMPLES:
        notes.append(
            f"Only {whole(few)} examples were evaluated: the intervals are wide, small losses invisible."
        )
    missing = {row.label: row.missing_seeds for row in view.rows if row.missing_seeds}
    for label, failed in missing.items():
        notes.append(f"{label}: seed{'s' if len(failed) > 1 else ''} {', '.join(map(str, failed))} failed.")
    return notes


def _difference_tile(name: str, other: StudyRow, mine: Quality, paired: Measured | None, metric: str) -> Tile:
    theirs = other.quality[metric].mean.value
    change = paired.value if paired is not None else mine.mean.value - theirs
    remark = interval(paired.low, paired.high) if paired is not None else ""
    return Tile(
        name,
        f"{_points(change)} points",
        percent(theirs),
        percent(mine.mean.value),
        f"95%: {remark}" if remark else metric_label(metric),
    )


def _paired_words(paired: Measured) -> str:
    shown = interval(paired.low, paired.high)
    return f"{_points(paired.value)} points" + (f", 95% {shown}" if shown else "")


def _points(difference: float) -> str:
    """Formats a difference of fractions in percentage points, with its sign."""
    return signed_percent(difference)[:-1]


def _turned(paired: Measured) -> Measured:
    """The same difference, seen from the other side."""
    low = None if paired.high is None else -paired.high
    high = None if paired.low is None else -paired.low
    return Measured(-paired.value, low, high, paired.n)
