"""The report: structure, escaping, honesty, determinism, and numbers equal to the record's."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from pages import Page
from rich.console import Console

from gradpruner.common.printing import (
    duration,
    interval,
    num_bytes,
    percent,
    short,
    signed_percent,
    text,
    times,
)
from gradpruner.reports import comparing, figures, html, svg, tables
from gradpruner.reports.answers import sample_answers
from gradpruner.reports.details import served_summary, serving_table
from gradpruner.reports.headline import tiles
from gradpruner.reports.html import render_html
from gradpruner.reports.markdown import markdown_table
from gradpruner.reports.shipping import advice
from gradpruner.reports.terminal import print_summary
from gradpruner.reports.verdict import judge
from gradpruner.reports.view import read

SECTIONS = [
    "headline", "results", "further", "layers", "losses", "recording",
    "savings", "cost", "data", "recipe", "provenance",
]  # fmt: skip
LABELS = {
    "dense": "Dense",
    "merged": "Pruned and merged",
    "dropped": "Pruned, dropped only",
    "random": "Random layers",
    "last": "Last layers",
    "shortgpt": "ShortGPT",
}
LAYER_PARAMETERS = 218_112_000
OTHER_PARAMETERS = 1_050_939_392


def metric(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {"value": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def make_plan(num_layers: int, name: str, rng: random.Random) -> dict[str, Any]:
    num_prune = round(0.4 * num_layers)
    if name == "random":
        pruned = set(rng.sample(range(num_layers), num_prune))
    elif name == "last":
        pruned = set(range(num_layers - num_prune, num_layers))
    else:
        start = round(0.55 * num_layers)
        pruned = {*range(start, start + num_prune - 1), num_layers - 2}
    merged = [*sorted(pruned)[:2], max(pruned)] if name == "merged" else []
    actions: list[dict[str, Any]] = []
    for layer in range(num_layers):
        action = "merge" if layer in merged else "drop" if layer in pruned else "keep"
        into = max(i for i in range(layer) if i not in pruned) if action == "merge" else None
        actions.append({"layer": layer, "action": action, "into": into})
    kept = num_layers - len(pruned)
    before, after = num_layers * LAYER_PARAMETERS, kept * LAYER_PARAMETERS
    return {
        "num_layers": num_layers,
        "actions": actions,
        "num_kept": kept,
        "savings": {
            "layers": {"before": num_layers, "after": kept},
            "decoder_parameters": {"before": before, "after": after},
            "parameters": {
                "before": before + OTHER_PARAMETERS,
                "after": after + OTHER_PARAMETERS,
            },
            "kv_bytes_per_token": {"before": 4096 * num_layers, "after": 4096 * kept},
            "flops_per_token": {"before": 2 * before, "after": 2 * after},
            "disk_bytes": {
                "before": 2 * (before + OTHER_PARAMETERS),
                "after": 2 * (after + OTHER_PARAMETERS),
            },
        },
    }


def make_run(
    num_layers: int = 32,
    names: tuple[str, ...] = ("dense", "merged", "dropped", "random"),
    n: int = 500,
    num_losses: int = 300,
    values: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Builds a record such as a finished run leaves; deterministic."""
    rng = random.Random(num_layers)
    accuracy = {"dense": 0.842, "merged": 0.836, "dropped": 0.821, "random": 0.655, "last": 0.702,
                "shortgpt": 0.794, **(values or {})}  # fmt: skip
    plans = {name: make_plan(num_layers, name, rng) for name in names if name != "dense"}
    variants = {}
    for name in names:
        plan = plans.get(name)
        layers = plan["num_kept"] if plan else num_layers
        parameters = layers * LAYER_PARAMETERS + OTHER_PARAMETERS
        start = 1.9 if name == "dense" else 3.4
        losses = [
            {
                "step": 10 * i,
                "loss": 0.35 + start * math.exp(-i / 40) + rng.gauss(0, 0.05),
                "learning_rate": 1e-5,
            }
            for i in range(1, num_losses + 1)
        ]
        value = accuracy[name]
        variants[name] = {
            "label": LABELS[name],
            "plan": name if plan else None,
            "num_parameters": parameters,
            "num_layers": layers,
            "before": {"metrics": {"exact_match": metric(0.31 if plan else 0.58, n)}},
            "finetune": {
                "mode": "lora", "steps": 10 * num_losses, "losses": losses,
                "seconds": 5400.0 * layers / num_layers, "peak_memory_bytes": 2 * parameters,
                "trainable_parameters": 655_360 * layers, "tokens": 11_500_000,
                "output": f"variants/{name}/model",
            },
            "evaluation": {
                "metrics": {
                    "exact_match": metric(value, n),
                    "choice_accuracy": metric(value + 0.01, n),
                },
                "seconds": 212.0 * layers / num_layers,
                "tokens_per_second": 310.5 * num_layers / layers,
                "peak_memory_bytes": 2 * parameters,
                "per_example": f"variants/{name}/examples.jsonl",
            },
            "error": None,
        }  # fmt: skip
    scores = [
        10 ** (-12 - 2.2 * math.sin(math.pi * min(1, i / (0.8 * num_layers)) / 2)
               + rng.gauss(0, 0.12))
        for i in range(num_layers)
    ]  # fmt: skip
    influence = [0.02 + 0.3 * math.exp(-i / 4) + 0.02 * rng.random() for i in range(num_layers)]
    part = {"format": "jsonl", "dropped_rows": 3, "sha256": "ab12" * 16}
    return {
        "schema_version": 1,
        "gradpruner_version": "0.1.0",
        "created": "2026-03-01T10:00:00+00:00",
        "finished": "2026-03-01T13:21:07+00:00",
        "command": "gradpruner run recipe.yaml",
        "title": "Llama-3.1-8B on HellaSwag",
        "provenance": {
            "commit": "0a1b2c3d4e5f", "dirty": True, "python": "3.11.9", "seed": 42,
            "packages": {"torch": "2.10.0", "transformers": "5.3.0", "peft": "0.18.1"},
            "machine": {"cpu": "AMD EPYC 9354", "cores": 16, "memory_bytes": 137438953472,
                        "devices": ["NVIDIA H100 80GB"], "platform": "Linux-6.8-x86_64"},
        },
        "recipe": {"model": "meta-llama/Llama-3.1-8B", "method": "gradient",
                   "prune": {"num_prune": 13, "num_merge": 3, "density": 0.2},
                   "finetune": {"learning_rate": 1e-05, "epochs": 3}},
        "model": {"path": "meta-llama/Llama-3.1-8B", "model_type": "llama",
                  "num_layers": num_layers, "dtype": "bfloat16", "sha256": "cd34" * 16,
                  "num_parameters": num_layers * LAYER_PARAMETERS + OTHER_PARAMETERS,
                  "decoder_parameters": num_layers * LAYER_PARAMETERS},
        "data": {
            "train": {**part, "source": "train.jsonl", "rows": 39902,
                      "supervised_tokens": 119706},
            "eval": {**part, "source": "validation.jsonl", "rows": n, "supervised_tokens": 3 * n},
            "overlap_rows": 7,
        },
        "trace": {
            "num_steps": 40, "effective_steps": 38, "rank": 8, "adapter": "lora", "clip": 1.0,
            "losses": [2.4 * math.exp(-i / 15) + 0.5 + rng.gauss(0, 0.04) for i in range(40)],
            "learning_rates": [1e-4] * 40, "seconds": 190.2, "peak_memory_bytes": 21 << 30,
            "bytes_on_disk": 314572800,
        },
        "scores": {
            "gradient": {
                "method": "gradient", "norm": "squared", "values": scores,
                "low": [s * 0.75 for s in scores], "high": [s * 1.3 for s in scores],
                "stability": [{"step": i, "overlap": min(1.0, 0.6 + 0.4 * i / 22)}
                              for i in range(2, 41)],
            },
            "shortgpt": {"method": "shortgpt", "norm": None, "values": influence,
                                "low": [], "high": [], "stability": []},
        },
        "plans": plans,
        "variants": variants,
        "reference": {"majority_class": 0.252},
        "stages": [
            {"name": "record", "state": "done", "seconds": 190.2, "peak_memory_bytes": 21 << 30},
            {"name": "score", "state": "done", "seconds": 0.41, "peak_memory_bytes": 1 << 28},
            {"name": "prune", "state": "done", "seconds": 61.0, "peak_memory_bytes": 3 << 30},
            {"name": "finetune", "state": "done", "seconds": 9200.0, "peak_memory_bytes": 41 << 30},
            {"name": "evaluate", "state": "skipped", "seconds": None, "peak_memory_bytes": None},
        ],
        "warnings": ["Depth pruning loses multi-step reasoning; this task does not measure it."],
    }  # fmt: skip


HEAVY_NAMES = tuple(LABELS)
NASTY = "<script>alert(1)</script>\"&'{{ 7*7 }}$x_1$ ]]> 日本"


def render(run: dict[str, Any], folder: Path) -> str:
    return render_html(run, folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(make_run(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def printed(run: dict[str, Any], **options: Any) -> str:
    stream = io.StringIO()
    print_summary(run, Console(file=stream, width=100, **options))
    return stream.getvalue()


def test_every_section_is_there_in_order(page: Page) -> None:
    found = [name for name in page.ids if name in [*SECTIONS, "warnings"]]
    assert found == ["headline", "warnings", *SECTIONS[1:]]


def test_figures_say_what_they_show(page: Page, source: str) -> None:
    names = ["quality", "scores-0", "scores-1", "losses", "stability", "recording"]
    assert [i for i in page.ids if i in {f"figure-{n}" for n in names}] == [f"figure-{n}" for n in names]
    assert source.count('class="drawing" role="img"') == 6
    assert any("Pruned and merged: 83.6%" in label for label in page.labels)
    assert any("merged into another: 18, 19, 30" in label for label in page.labels)


def test_ids_are_unique_and_local_references_resolve(page: Page, source: str) -> None:
    assert len(page.ids) == len(set(page.ids))
    used = {r[1:] for r in page.references if r.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", source))
    assert used <= set(page.ids)


def test_the_page_needs_nothing_else(page: Page, source: str) -> None:
    assert "http://" not in source
    assert "https://" not in source
    assert {r for r in page.references if not r.startswith("#")} == {"data:,"}
    assert not {"iframe", "object", "embed", "img"} & set(page.tags)
    assert "@import" not in source
    assert "default-src 'none'" in source
    script = source[source.index("<script>") + 8 : source.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in source and page.tags.count("script") == 1


def test_same_record_same_bytes(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"))
    untouched = copy.deepcopy(run)
    first = render_html(run, tmp_path / "a.html").read_bytes()
    assert run == untouched
    read_back = json.loads(json.dumps(run))
    assert render_html(read_back, tmp_path / "b.html").read_bytes() == first


def test_matplotlibrc_does_not_change_the_figures() -> None:
    view = read(make_run(16, ("dense", "merged"), num_losses=3))
    with svg.house_style():
        expected = figures.loss_plot(view)
    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path"}), svg.house_style():
        assert figures.loss_plot(view) == expected


def test_numbers_equal_the_record(page: Page) -> None:
    run = make_run()
    for variant in run["variants"].values():
        for stage in ("before", "evaluation"):
            for entry in variant[stage]["metrics"].values():
                assert f"{100 * entry['value']:.1f}%" in page.words
                assert f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]" in page.words
    for saving in run["plans"]["merged"]["savings"].items():
        unit, pair = saving
        assert f"{pair['after'] / pair['before']:.2f}×" in page.words
        if unit.endswith("parameters"):
            assert f"{pair['before']:,}" in page.words
            assert f"{pair['after']:,}" in page.words
    for value in ("32 → 19", "−40.6%", "−35.3%", "0.59×", "39,902", "119,706", "25.2%"):
        assert value in page.words
    for value in ("0a1b2c3d4e5f with uncommitted changes", "NVIDIA H100 80GB", "3.11.9", "2.10.0"):
        assert value in page.words
    assert "learning_rate: 1.0e-05" in page.words
    assert "7 evaluation rows also occur in the training data" in page.words
    assert "2026-03-01 13:21 UTC" in page.words


def test_nothing_is_nan(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=20)
    bad = (math.nan, math.inf, -math.inf, None)
    merged = run["variants"]["merged"]
    for i, value in enumerate(bad):
        merged["finetune"]["losses"][i]["loss"] = value
        run["scores"]["gradient"]["values"][i] = value
        run["scores"]["gradient"]["low"][i + 4] = value
        run["trace"]["losses"][i] = value
    merged["evaluation"]["metrics"]["exact_match"].update(value=math.nan, low=math.inf)
    merged["finetune"].update(seconds=math.nan, peak_memory_bytes=math.inf)
    run["plans"]["merged"]["savings"]["layers"]["before"] = 0
    run["recipe"]["prune"]["density"] = math.nan
    source = render(run, tmp_path)
    for words in (Page(source).words, printed(run), markdown_table(run)):
        assert not re.search(r"\b(nan|inf|None)\b", words, re.IGNORECASE)
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', source)


def test_nasty_strings_are_text(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged", "dropped"), num_losses=3)
    run["title"] = run["command"] = run["model"]["path"] = NASTY
    run["data"]["train"]["source"] = run["recipe"]["model"] = NASTY
    run["warnings"] = [NASTY]
    run["scores"] = {NASTY: run["scores"]["gradient"], "two": run["scores"]["gradient"]}
    run["provenance"]["packages"] = {NASTY: NASTY}
    run["stages"][0]["name"] = NASTY
    run["plans"][NASTY] = run["plans"].pop("merged")
    run["variants"]["merged"].update(label=NASTY, plan=NASTY)
    run["variants"]["dropped"].update(label="_#0072b2", error=NASTY)
    source = render(run, tmp_path)
    assert source.count("<script") == 1
    page = Page(source)
    assert page.tags.count("script") == 1
    assert "49" not in re.findall(r"alert\(1\)</script>\"&'(.{9})", page.words)
    assert NASTY in page.words
    assert "_#0072b2" in page.words


def test_terminal_shows_control_characters_and_markup_as_text() -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["variants"]["merged"].update(label="[red]x[/]\x1b[2J\u202e", error="boom [/bold] \x07")
    shown = printed(run)
    assert "[red]x[/][2J" in shown
    assert "boom [/bold]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_a_failed_variant_is_a_row_with_its_error(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged", "dropped"), num_losses=3)
    run["variants"]["merged"].update(error="CUDA out of memory", finetune=None, evaluation=None, before=None)
    source = render(run, tmp_path)
    assert '<tr role="row" class="failed">' in source
    assert source.count('<tr role="row" class="error">') == 1
    assert "CUDA out of memory" in Page(source).words
    assert "Pruned and merged failed: CUDA out of memory" in printed(run)
    assert "failed: CUDA out of memory" in markdown_table(run)
    view = read(run)
    assert view.main is not None
    assert view.main.name == "dropped"


@pytest.mark.parametrize("missing", ["", *make_run(16, ("dense", "merged"))])
def test_any_part_may_be_missing(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing is slow and tested above and below; here only that nothing is looked up in vain.
    monkeypatch.setattr(svg.Figure, "savefig", lambda _, file, **__: file.write('<svg viewBox="">'))
    run = make_run(16, ("dense", "merged"), num_losses=3)
    for replacement in (None, [], "odd"):
        changed = {**run, missing: replacement} if missing else {}
        page = render(changed, tmp_path)
        assert {"headline", "recipe", "provenance"} <= set(Page(page).ids)
        assert printed(changed)
        assert markdown_table(changed).startswith("| Variant |")
    if missing:
        del run[missing]
        html.page_of(read(run), tmp_path)


def test_empty_parts_inside_variants(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["variants"]["merged"] = {"label": None, "plan": "lost", "error": None}
    run["variants"]["dense"].update(before=None, finetune=None)
    run["scores"]["gradient"].update(low=[], high=[], stability=[])
    run["scores"]["shortgpt"] = {"values": []}
    page = Page(render(run, tmp_path))
    assert "Nothing to compare: no exact match was measured for merged." in page.words
    assert "figure-scores-0" in page.ids
    assert "figure-stability" not in page.ids


def test_eighty_layers_and_six_variants(tmp_path: Path) -> None:
    run = make_run(80, HEAVY_NAMES, num_losses=2000)
    path = render_html(run, tmp_path / "report.html")
    assert path.stat().st_size < 1_000_000
    words = Page(path.read_text(encoding="utf-8")).words
    assert all(label in words for label in LABELS.values())


@pytest.mark.parametrize(
    ("values", "n", "level", "says"),
    [
        ({"dense": 0.84, "merged": 0.835}, 1000, "even", "no clear difference"),
        ({"dense": 0.84, "merged": 0.70}, 1000, "worse", "do not overlap"),
        ({"dense": 0.60, "merged": 0.80}, 1000, "better", "do not overlap"),
        ({"dense": 0.80, "merged": 0.70}, 60, "unclear", "cannot tell"),
        ({"dense": 0.80, "merged": 0.75}, 300, "unclear", "cannot tell"),
        ({"dense": 0.80, "merged": 0.81}, 1000, "even", "this is not a clear improvement"),
    ],
)
def test_verdict(values: dict[str, float], n: int, level: str, says: str) -> None:
    verdict = judge(read(make_run(16, ("dense", "merged"), n, 3, values)))
    assert verdict.level == level
    assert says in verdict.sentence
    assert any("Only 60 examples" in note for note in verdict.notes) == (n == 60)


@pytest.mark.parametrize(
    ("values", "majority", "says"),
    [
        ({"dense": 0.0, "merged": 0.0}, None, "No model gives a single right answer"),
        ({"dense": 0.25, "merged": 0.25}, 0.25, "no better than always giving the most frequent answer"),
        ({"dense": 0.20, "merged": 0.05}, 0.25, "no better than always giving the most frequent answer"),
    ],
)
def test_a_task_that_was_not_learned_is_the_headline(
    values: dict[str, float], majority: float | None, says: str
) -> None:
    run = make_run(16, ("dense", "merged"), 1000, 3, values)
    run["reference"]["majority_class"] = majority
    verdict = judge(read(run))
    assert (verdict.level, verdict.word) == ("unclear", "Not learned") and says in verdict.sentence
    assert "now 30 steps" in verdict.sentence and "finetune.learning_rate, now 1e-05" in verdict.sentence
    assert "clear difference" not in verdict.sentence and "Not learned" in printed(run)
    run["recipe"]["start"] = "given"
    assert "give one that was tuned" in judge(read(run)).sentence


def test_figures_of_an_interrupted_training_say_so(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["variants"]["dense"]["finetune"].update(resumed_from=20, measured_from=0)
    run["variants"]["merged"]["finetune"].update(resumed_from=20, measured_from=20)
    run["stages"][3]["resumed"] = True
    words = Page(render(run, tmp_path)).words
    assert "resumed at 20" in words and "timed from 20" in words and "done resumed" in words
    notes = judge(read(run)).notes
    assert any(
        "Fine-tuning of Pruned and merged was interrupted" in n and "after 20 of 30" in n for n in notes
    )
    assert not any("Dense was interrupted" in n for n in notes)


def test_a_line_holds_percentages_of_one_kind_with_one_minus(page: Page) -> None:
    run = make_run(16, ("dense", "merged"), 1000, 3, {"dense": 0.8, "merged": 0.7})
    run["variants"]["merged"]["paired"] = {"task": {"exact_match": metric(0.1, 1000)}}
    run["variants"]["merged"]["paired"]["task"]["exact_match"].update(value=-0.1, low=-0.13, high=-0.07)
    said = judge(read(run)).sentence
    assert "scores 70.0%; the dense model scores 80.0%. On the same examples" in said
    assert "−10.0 points, 95% [−13.0, −7.0]" in said and "relative" not in said
    assert not re.search(r"(?<![\w-])-\d", page.words.replace("Linux-6.8", "").replace("1.0e-05", ""))


def test_verdict_notes_what_speaks_against_it() -> None:
    run = make_run(16, ("dense", "merged", "random"), 1000, 3, {"random": 0.9})
    run["reference"]["majority_class"] = 0.83
    run["variants"]["merged"]["finetune"].update(seconds=6000.0, steps=10)
    notes = " ".join(judge(read(run)).notes)
    assert "has not learned the task" in notes
    assert "Random layers (90.0%)" in notes
    assert "was not faster" in notes
    assert "not like for like" in notes


COMPARED = {"losses": {"gradpruner": 4.0957, "gate": 3.3333}, "held_out": 256, "num_prune": 6, "skipped": "",
            "rows": "validation rows"}  # fmt: skip


def test_the_notes_say_by_which_of_two_scores_the_layers_were_chosen() -> None:
    run = make_run(16, ("dense", "merged"), 1000, 3)

    def notes(**found: Any) -> str:
        run["plans"]["merged"]["comparison"] = found
        return " ".join(judge(read(run)).notes)

    for chosen, one, two in (("gate", "the gate", "IGIA"), ("gradpruner", "IGIA", "the gate")):
        said = notes(chosen=chosen, same=True, **COMPARED)
        first, then = ("3.33", "4.10") if chosen == "gate" else ("4.10", "3.33")
        assert f"were chosen by {one}: with them removed and the cuts repaired" in said
        assert f"256 validation rows is {first}; with the choice of {two} it is {then}." in said
    unlike = COMPARED | {"losses": {}, "skipped": "both would remove the same layers"}
    said = notes(chosen="gradpruner", same=True, **unlike)
    assert "were chosen by IGIA: both would remove the same layers." in said
    # Without layers of the comparison nothing is said, unless a search went on from it.
    for nothing in ({}, {"chosen": None, "same": True}, {"chosen": "gate", "same": False, **COMPARED}):
        assert "were chosen by" not in notes(**nothing)
    run["plans"]["merged"]["search"] = {
        "best": 5, "limit": 0.1, "rows": 80,
        "curve": [{"num_prune": 5, "loss": 0.0, "upper": 0.1, "rows": 80, "verdict": "certified"}],
    }  # fmt: skip
    assert "by the gate: with 6 layers removed" in notes(chosen="gate", same=False, **COMPARED)


def test_verdict_without_intervals_or_fine_tuning() -> None:
    run = make_run(16, ("dense", "merged"), 1000, 3)
    for variant in run["variants"].values():
        variant.update(evaluation=None, finetune=None)
        variant["before"]["metrics"]["exact_match"].update(low=None, high=None)
    verdict = judge(read(run))
    assert verdict.level == "unknown"
    assert "may be chance" in verdict.sentence
    assert any("before fine-tuning" in note for note in verdict.notes)


def test_a_fine_tuned_model_is_not_compared_with_one_that_is_not() -> None:
    run = make_run(16, ("dense", "merged"), 1000, 3)
    run["variants"]["dense"]["evaluation"] = None
    assert "scores 31.0%; the dense model scores 58.0%" in judge(read(run)).sentence


def test_small_samples_are_marked() -> None:
    run = make_run(16, ("dense", "merged"), 60, 3)
    table = tables.results_table(read(run))
    assert [line.cells[3].text for line in table.lines] == ["84.2%*", "83.6%*"]
    assert "83.6%*" in printed(run)
    assert "83.6%\\*" in markdown_table(run)


def test_terminal_fits_a_hundred_columns_and_is_plain() -> None:
    shown = printed(make_run(80, HEAVY_NAMES, num_losses=3))
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "83.6% [80.4, 86.8]" in shown
    assert "merged 44, 45 into 43; 78 into 77" in shown
    strip = next(line for line in shown.splitlines() if "▼" in line and line.startswith("   0"))
    assert (strip.count("█"), strip.count("▼"), strip.count("·")) == (48, 3, 29)


def test_terminal_before_anything_is_measured_shows_scores_plans_and_savings() -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["variants"] = {}
    scores = next(iter(run["scores"].values()))["values"]
    scores[3] = scores[9] = 0.5 * min(scores)
    shown = printed(run)
    start = next(i for i, line in enumerate(shown.splitlines()) if line.startswith("Scores (gradient)"))
    below = map(str.split, shown.splitlines()[start:])
    listed = [words for words in below if words and words[0].isdigit()]
    # On a tie the later layer is pruned first, as in a plan.
    assert [words[0] for words in listed[:2]] == ["9", "3"]
    assert float(listed[0][1]) == pytest.approx(scores[9], rel=1e-3)
    assert "▼" in shown and "Savings: merged" in shown and "FLOPs per token" in shown
    assert "No result" not in shown
    run["plans"] = {}
    assert f"{run['trace']['num_steps']} steps recorded" in printed(run)


def test_terminal_without_unicode() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(make_run(16, ("dense", "merged"), num_losses=3), Console(file=stream, width=100))
    stream.flush()
    shown = stream.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "-0.6" in shown and "-> Pruned" in shown
    assert "#########mm...m#" in shown


def test_markdown_table_is_rectangular() -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["variants"]["merged"]["label"] = "a|b <i> *c*"
    lines = [line for line in markdown_table(run).splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "a\\|b \\<i> \\*c\\*" in lines[3]
    assert "83.6% [80.4, 86.8]" in lines[3]


def test_plans_with_equal_savings_share_a_table(page: Page, source: str) -> None:
    assert "Pruned and merged · Pruned, dropped only · Random layers" in page.words
    assert source.count("Decoder parameters</th>") == 1


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (short(8_030_261_248), "8.03B"),
        (short(999_999), "1.00M"),
        (short(12), "12"),
        (short(True), "–"),
        (short(10**400), "–"),
        (num_bytes(16 * 1024**3), "16.0\u00a0GiB"),
        (num_bytes(0), "0\u00a0B"),
        (duration(0.41), "0.41\u00a0s"),
        (duration(192), "3\u00a0min\u00a012\u00a0s"),
        (duration(7500), "2\u00a0h\u00a005\u00a0min"),
        (duration(3599.7), "1\u00a0h\u00a000\u00a0min"),
        (percent(0.0), "0.0%"),
        (percent(math.nan), "–"),
        (times(0.594), "0.59×"),
        (times(0.004), "0.004×"),
        (signed_percent(-0.0001), "0.0%"),
        (signed_percent(0.02), "+2.0%"),
        (text("a\x00\u202eb\nc"), "ab c"),
        (text("abcdef", 4), "abc…"),
        (interval(-0.0001, 0.1), "[0.0, 10.0]"),
    ],
)
def test_formats(shown: str, expected: str) -> None:
    assert shown == expected


def test_the_most_frequent_answer_is_compared_with_accuracies_only():
    run = make_run()
    assert read(run).majority is not None
    for variant in run["variants"].values():
        for part in ("before", "evaluation"):
            if variant[part]:
                metrics = variant[part]["metrics"]
                variant[part]["metrics"] = {"similarity": metrics["exact_match"], **metrics}
    assert read(run).metric == "similarity" and read(run).majority is None


def probed(dense: float, merged: float) -> dict[str, Any]:
    run = make_run()
    for name, value in (("dense", dense), ("merged", merged)):
        run["variants"][name]["also"] = {"gsm8k": {"metrics": {"final_number": metric(value, 200)}}}
    return run


@pytest.mark.parametrize(
    ("dense", "merged", "said"),
    [
        (0.40, 0.20, "Multi-step reasoning suffered: gsm8k falls from 40.0% to 20.0%"),
        (0.40, 0.355, "Multi-step reasoning suffered"),
        (0.40, 0.365, None),  # less than a tenth
        (0.40, 0.45, None),
        (0.015, 0.0, "says nothing here: the dense model itself scores only 1.5%"),
    ],
)
def test_a_reasoning_probe_that_falls_is_warned_of(dense: float, merged: float, said: str | None) -> None:
    notes = [note for note in judge(read(probed(dense, merged))).notes if "eason" in note]
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


def test_the_verdict_goes_by_pairs_where_there_are_any() -> None:
    run = make_run()
    for low, high, level in ((-0.05, -0.01, "worse"), (0.01, 0.05, "better"), (-0.02, 0.02, "even")):
        value = (low + high) / 2
        run["variants"]["merged"]["paired"] = {
            "task": {"exact_match": {"value": value, "low": low, "high": high, "n": 480}}
        }
        found = judge(read(run))
        assert found.level == level and "On the same examples" in found.sentence


def test_time_counts_everything_or_says_what_it_leaves_out() -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    assert "without recording, choosing and pruning" in tiles(read(run))[-1].remark
    merged = {"recording": 20.0, "pruning": 50.0, "training": 60.0, "total": 130.0}
    for name, parts in (("dense", {"training": 100.0, "total": 100.0}), ("merged", merged)):
        run["variants"][name]["cost"] = {"seconds": parts, "tokens": 7, "resumed": []}
    tile = tiles(read(run))[-1]
    assert (tile.name, tile.change) == ("Total time", "1.30×") and "all but evaluation" in tile.remark


def test_flat_losses_are_logarithmic_and_sizes_are_drawn_where_there_are_several() -> None:
    run = make_run(16, ("dense", "merged", "last"), num_losses=3)
    with svg.house_style():
        assert "logarithmic" not in str(figures.loss_plot(read(run)))
        assert comparing.size_plot(read(run)) is None
        run["variants"]["merged"]["finetune"]["losses"][2]["loss"] = 0.001
        run["variants"]["last"]["num_parameters"] //= 2
        found = figures.loss_plot(read(run)), comparing.size_plot(read(run))
    assert found[0] is not None and "logarithmic" in found[0].caption
    assert found[1] is not None and [key.label for key in found[1].legend] == [
        "1 Pruned and merged",
        "2 Last layers",
    ]


def test_engines_are_one_line_when_all_is_well(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    engines = [{"engine": e, "status": "ok", "reason": ""} for e in ("vllm", "sglang", "llama.cpp")]
    run["plans"]["merged"]["portability"] = engines
    view = read(run)
    expected = "vllm, sglang and llama.cpp can serve the pruned model as is, judging by their source code."
    assert served_summary(view) == expected
    assert not serving_table(view).lines
    engines[0].update(status="wrong", reason="it counts layers")
    assert served_summary(read(run)).startswith("sglang and llama.cpp can serve")
    assert [line.cells[3].text for line in serving_table(read(run)).lines] == ["it counts layers"]
    assert any("it counts layers" in step.note for step in (advice(read(run)) or pytest.fail()).commands)


def test_answers_are_counted_in_the_whole_file_and_shown_without_special_tokens(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    run["data"]["train"]["notes"] = ["20 rows held out for validation"]
    run["variants"]["merged"]["error"] = "it is too long " * 40 + "so do this"
    line = {"prompt_tail": "<s>p", "answer": "a", "generated": "a", "correct": True}
    for name in ("dense", "merged"):
        path = tmp_path / f"variants/{name}/examples.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({**line, "id": str(i)}) + "\n" for i in range(40)))
    found = sample_answers(read(run), tmp_path)
    assert found is not None and (found.total, len(found.answers)) == (40, 15)
    assert found.answers[0].prompt == "p"
    shown = render(run, tmp_path)
    assert "All (40)" in shown and "the first 15 of each kind are listed" in shown
    assert "Training rows: 20 rows held out for validation." in shown
    assert shown.count("so do this") >= 2 and "so do this" in " ".join(printed(run).split())


def test_tick_labels_are_the_values_of_their_ticks() -> None:
    axes = Figure().subplots()
    for low, high, labels in (
        (0.57, 0.68, ["57.5%", "60.0%", "62.5%", "65.0%", "67.5%"]),
        (0.0, 0.6, ["0%", "10%", "20%", "30%", "40%", "50%", "60%"]),
    ):
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(FixedLocator([float(label.strip("%")) / 100 for label in labels]))
        svg.percent_ticks(axes, "x")
        assert [label.get_text() for label in axes.get_xticklabels()] == labels


def test_answers_are_read_from_inside_the_run_only(tmp_path: Path) -> None:
    run = make_run(16, ("dense", "merged"), num_losses=3)
    line = {"id": "1", "prompt_tail": "p", "answer": "a", "generated": "a", "correct": True}
    (tmp_path / "outside.jsonl").write_text(json.dumps(line) + "\n")
    folder = tmp_path / "run"
    for name in ("dense", "merged"):
        path = folder / f"variants/{name}/examples.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(line) + "\n")
    found = sample_answers(read(run), folder)
    assert found is not None and found.counts["right"] == 1
    for content in ("", "[1]\n", "{}\n", json.dumps({**line, "id": "2"}) + "\n", "\x00\n"):
        path.write_text(content)
        assert sample_answers(read(run), folder) is None
    for odd in ("../outside.jsonl", str(tmp_path / "outside.jsonl"), "/dev/zero", "a\0b", 7, None):
        run["variants"]["merged"]["evaluation"]["per_example"] = odd
        assert sample_answers(read(run), folder) is None
    path.unlink()
    path.symlink_to(tmp_path / "outside.jsonl")
    run["variants"]["merged"]["evaluation"]["per_example"] = "variants/merged/examples.jsonl"
    assert sample_answers(read(run), folder) is None
