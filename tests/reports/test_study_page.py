"""A study's page, markdown and terminal: numbers equal to study.json, escaping, honesty, plots."""

from __future__ import annotations

import copy
import io
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from pages import Page
from rich.console import Console

from gradpruner.reports.html import render_html
from gradpruner.reports.markdown import markdown_table
from gradpruner.reports.shipping import advice
from gradpruner.reports.tables import results_table
from gradpruner.reports.terminal import print_summary
from gradpruner.reports.verdict import judge
from gradpruner.reports.view import read

NUM_LAYERS = 16
METHODS = {
    "dense": ("Dense", 0.861, 0.0),
    "merged": ("GradPruner", 0.842, 31.0),
    "dropped": ("GradPruner, no merging", 0.835, 30.5),
    "llm_pruner_first": ("LLM-Pruner, first order", 0.812, 44.0),
    "llm_pruner_mix": ("LLM-Pruner, mixed", 0.815, 71.0),
    "laco": ("LaCo", 0.808, 18.0),
    "laco_released": ("LaCo, released code", 0.772, 19.5),
    "minitron_depth": ("Minitron depth", 0.829, 240.0),
    "minitron_width": ("Minitron width", 0.804, 260.0),
    "sat": ("SAT-like", 0.836, 310.0),
    "apt": ("APT-like", 0.817, 505.0),
    "shortgpt": ("ShortGPT", 0.826, 6.1),
    "angular": ("Angular distance", 0.827, 6.4),
    "sleb": ("SLEB", 0.831, 88.0),
    "gradpruner_width": ("GradPruner, hidden size", 0.758, 33.0),
    "magnitude": ("Magnitude", 0.781, 0.4),
    "last": ("Last layers", 0.818, 0.02),
    "random": ("Random layers", 0.769, 0.01),
}
SEEDS = (0, 1, 2)
NASTY = "<script>alert(1)</script>\"&'{{ 7*7 }}$x_1$ ]]> 日本|"


def difference(value: float, half: float = 0.012, n: int = 480) -> dict[str, Any]:
    return {"mean": value, "low": value - half, "high": value + half, "n": n, "wins": 2}


def layer_plan(num_prune: int, num_merge: int, seed: int) -> dict[str, Any]:
    pruned = sorted(random.Random(seed).sample(range(1, NUM_LAYERS), num_prune))
    merged = pruned[:num_merge]
    actions = [
        {
            "layer": layer,
            "action": "merge" if layer in merged else "drop" if layer in pruned else "keep",
            "into": max(i for i in range(layer) if i not in pruned) if layer in merged else None,
        }
        for layer in range(NUM_LAYERS)
    ]
    return {"num_layers": NUM_LAYERS, "actions": actions, "num_kept": NUM_LAYERS - num_prune}


def make_row(name: str, seeds: tuple[int, ...] = SEEDS, value: float | None = None) -> dict[str, Any]:
    label, usual, seconds = METHODS[name]
    mean = usual if value is None else value
    spread = [0.0] if len(seeds) == 1 else [-0.008, 0.001, 0.007]
    dense, merged = METHODS["dense"][1], METHODS["merged"][1]
    is_dense = name == "dense"
    removed = 0 if is_dense else 3_240_000
    return {
        "name": name,
        "label": label,
        "description": f"what {label} does",
        "error": None,
        "num_parameters": 8_100_000 - removed,
        "removed_parameters": removed,
        "removed_share": removed / 8_100_000,
        "num_layers": NUM_LAYERS if is_dense else 10,
        "uniform": name not in ("llm_pruner_first", "llm_pruner_mix", "apt"),
        "metrics": {
            "exact_match": {
                "mean": mean,
                "low": mean + spread[0],
                "high": mean + spread[-1],
                "per_seed": [mean + s for s in spread[: len(seeds)]],
                "before": 0.42 if is_dense else 0.17,
                "recovery": mean / dense,
                "paired": None if is_dense else difference(mean - dense),
                "paired_gradpruner": None if name == "merged" else difference(mean - merged),
            },
            "choice_accuracy": {"mean": mean + 0.01, "low": mean, "high": mean + 0.02, "per_seed": [mean]},
        },
        "costs": {
            "method_seconds": seconds,
            "method_peak_memory_bytes": 3 << 30,
            "training_seconds": 100.0 if is_dense else 63.0,
            "training_ratio": 1.0 if is_dense else 0.63,
            "training_peak_memory_bytes": 9 << 30,
            "inference_seconds": 10.0,
            "inference_ratio": 1.0 if is_dense else 0.61,
        },
        "per_seed": [{"seed": s, "run": f"seed-{s}", "error": None} for s in seeds],
        "plans": []
        if is_dense or name in ("minitron_width", "gradpruner_width", "apt", "llm_pruner_mix")
        else [layer_plan(6, 3 if name == "merged" else 0, s) for s in seeds],
    }


def make_study(names: tuple[str, ...] = tuple(METHODS), seeds: tuple[int, ...] = SEEDS) -> dict[str, Any]:
    """Builds a record such as a finished comparison leaves; deterministic."""
    return {
        "schema_version": 1,
        "kind": "compare",
        "title": "Miniature on stories",
        "figure": "",
        "what": "",
        "command": "gradpruner compare demo --methods all",
        "gradpruner_version": "0.5.0",
        "created": "2026-03-01T10:00:00+00:00",
        "finished": "2026-03-01T13:21:07+00:00",
        "provenance": {
            "commit": "0a1b2c3d4e5f",
            "dirty": False,
            "python": "3.11.9",
            "packages": {"torch": "2.10.0"},
            "machine": {"cpu": "AMD EPYC 9354", "cores": 16, "devices": []},
            "seed": 0,
        },
        "recipe": {"model": {"path": "demo"}, "plan": {"num_merge": 3}},
        "seeds": list(seeds),
        "mode": "full",
        "sweep": None,
        "plot": {},
        "task": "stories",
        "model": {"path": "demo", "num_layers": NUM_LAYERS, "num_parameters": 8_100_000},
        "budget": {"unit": "parameters", "removed": 3_240_000, "share": 0.4, "layers": 6},
        "metrics": ["exact_match", "choice_accuracy"],
        "points": [{"value": None, "label": "", "rows": [make_row(n, seeds) for n in names]}],
        "reference": {"majority_class": 0.31},
        "warnings": ["7 evaluation rows also occur in the training data."],
    }


def make_sweep(
    values: tuple[Any, ...] = (0, 1, 2, 3, 4, 5), names: tuple[str, ...] = ("dense", "merged", "dropped")
) -> dict[str, Any]:
    study = make_study(("dense",))
    points = []
    for i, value in enumerate(values):
        rows = [
            make_row(n, value=None if n == "dense" else METHODS[n][1] + 0.006 * i * (n == "merged"))
            for n in names
        ]
        rows[0]["metrics"]["exact_match"]["paired_gradpruner"] = difference(0.02 - 0.006 * i)
        points.append({"value": value, "label": f"merged layers {value}", "rows": rows})
    return study | {
        "kind": "ablation",
        "title": "Merged layers",
        "figure": "Table 3",
        "what": "How many of the pruned layers are merged.",
        "sweep": {"key": "plan.num_merge", "label": "merged layers", "values": list(values), "log": False},
        "plot": {"kind": "line", "y": "quality"},
        "points": points,
    }


def fail(study: dict[str, Any], name: str, error: str) -> None:
    for row in study["points"][0]["rows"]:
        if row["name"] == name:
            row.update(error=error, metrics={}, costs={}, plans=[], num_parameters=None, removed_share=None)


def row_of(study: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in study["points"][0]["rows"] if row["name"] == name)


def render(study: dict[str, Any], folder: Path) -> str:
    return render_html(study, folder / "out" / "report.html").read_text(encoding="utf-8")


def printed(study: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_summary(study, Console(file=stream, width=100))
    return stream.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render(make_study(), tmp_path_factory.mktemp("study"))


def test_the_page_has_every_part_in_order(source: str) -> None:
    page = Page(source)
    wanted = ["headline", "warnings", "results", "further", "layers", "methods", "recipe"]
    assert [i for i in page.ids if i in (*wanted, "provenance")] == [*wanted, "provenance"]
    assert [i for i in page.ids if i.startswith("figure-")] == [
        "figure-quality", "figure-difference", "figure-cost",
    ]  # fmt: skip
    assert len(page.ids) == len(set(page.ids))


def test_the_page_needs_nothing_else(source: str) -> None:
    page = Page(source)
    assert "http://" not in source and "https://" not in source
    assert {r for r in page.references if not r.startswith("#")} == {"data:,"}
    assert not {"iframe", "object", "embed", "img"} & set(page.tags)
    assert source.count("<!DOCTYPE html>") == 1


def test_numbers_equal_the_record(source: str) -> None:
    words = Page(source).words
    study = make_study()
    for row in study["points"][0]["rows"]:
        entry = row["metrics"]["exact_match"]
        assert f"{100 * entry['mean']:.1f}%" in words
        assert f"[{100 * entry['low']:.1f}, {100 * entry['high']:.1f}]" in words
        for key in ("paired", "paired_gradpruner"):
            if entry[key] is not None:
                low, high = (f"{100 * entry[key][end]:.1f}" for end in ("low", "high"))
                assert f"[{low}, {high}]".replace("-", "−") in words
    for shown in ("8.10M", "4.86M", "−40.0%", "0.63×", "0.61×", "3.00\u00a0GiB", "8\u00a0min\u00a025\u00a0s"):
        assert shown in words
    assert (
        "3,240,000 parameters, 40.0% of all parameters, as many as 6 of the 16 decoder layers hold" in words
    )
    assert "AMD EPYC 9354" in words and "0a1b2c3d4e5f" in words


def test_every_cell_of_the_main_row() -> None:
    view = read(make_study())
    table = results_table(view, view.choice[0])
    assert table.columns == (
        "Method", "Parameters", "Exact match [seeds]", "Difference to dense [95%]",
        "Difference to GradPruner [95%]", "Before tuning", "Method time", "Method memory", "Training",
        "Evaluation",
    )  # fmt: skip
    merged = next(row for row in table.lines if row.kind == "main")
    assert [(c.text, c.detail) for c in merged.cells] == [
        ("GradPruner", "to ship"), ("4.86M", "−40.0%"), ("84.2%", "[83.4, 84.9]"), ("−1.9", "[−3.1, −0.7]"),
        ("–", ""), ("17.0%", ""), ("31.0\u00a0s", ""), ("3.00\u00a0GiB", ""), ("0.63×", ""), ("0.61×", ""),
    ]  # fmt: skip


def test_the_verdict_is_that_of_the_paired_interval_to_the_last_layers() -> None:
    for value, level in ((-0.024, "better"), (0.003, "even"), (0.03, "worse")):
        study = make_study()
        row_of(study, "last")["metrics"]["exact_match"]["paired_gradpruner"] = difference(value)
        found = judge(read(study))
        assert found.level == level
    assert "loses to just dropping the last layers (81.8%): −3.0 points, 95% [−4.2, −1.8]." in found.sentence


def test_the_notes_say_how_often_each_of_two_scores_chose_the_layers() -> None:
    study = make_study()
    for plan, chosen in zip(row_of(study, "sleb")["plans"], ("gate", "gradpruner", "gate"), strict=True):
        plan["comparison"] = {"chosen": chosen}
    notes = judge(read(study)).notes
    assert "The layers of SLEB were chosen by IGIA in 1 and by the gate in 2 of 3 seeds." in notes
    assert sum("were chosen by" in note for note in notes) == 1


def test_a_dense_model_that_is_better_for_longer_training_was_tuned_too_little() -> None:
    def said(change: float, ratio: float) -> str:
        study = make_study(("dense", "merged", "last"))
        longer = make_row("last") | {"name": "longer", "label": "dense, same work"}
        longer["metrics"]["exact_match"]["paired"] = difference(change)
        longer["costs"]["training_ratio"] = ratio
        study["points"][0]["rows"].append(longer)
        return " ".join(judge(read(study)).notes)

    assert "dense, same work scores clearly more than dense: training was too short." in said(0.02, 2.5)
    for nothing in (said(0.005, 2.5), said(-0.02, 2.5), said(0.02, 0.7)):
        assert "too short" not in nothing


@pytest.mark.parametrize("name", ["longer", "sat"])
def test_a_row_from_which_nothing_is_removed_is_no_method_that_is_judged(name: str) -> None:
    study = make_study(("dense", "last", "sleb"))
    control = make_row("last") | {"name": name, "label": "a control", "removed_share": 0.0}
    study["points"][0]["rows"].insert(1, control)
    found = judge(read(study))
    assert read(study).main_name == "last" and found.sentence.startswith("Last layers scores")
    assert ("budget" in " ".join(found.notes)) == (name == "sat")


def test_wins_ties_and_losses_leave_out_dense_and_gradpruners_own_rows() -> None:
    study = make_study(("dense", "merged", "dropped", "last", "random", "sleb"))
    for name, value in (("last", -0.05), ("random", 0.05), ("sleb", 0.001)):
        row_of(study, name)["metrics"]["exact_match"]["paired_gradpruner"] = difference(value)
    row_of(study, "dropped")["metrics"]["exact_match"]["paired_gradpruner"] = difference(-0.02)
    sentence = judge(read(study)).sentence
    assert "Against 3 other methods (by paired 95% intervals): 1 win, 1 tie, 1 loss." in sentence
    assert "Merging adds 2.0 points, 95% [0.8, 3.2]." in sentence


def test_without_paired_intervals_nothing_is_claimed() -> None:
    study = make_study(("dense", "merged", "last"))
    for row in study["points"][0]["rows"]:
        row["metrics"]["exact_match"].update(paired=None, paired_gradpruner=None)
    found = judge(read(study))
    assert found.level == "unclear" and "without an interval" in found.sentence
    assert "Difference to GradPruner [95%]" not in results_table(read(study)).columns


def test_a_failed_method_is_a_row_with_its_error(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "sleb", "last"))
    fail(study, "sleb", "CUDA out of memory")
    source = render(study, tmp_path)
    assert source.count('<tr role="row" class="error">') == 1
    assert "CUDA out of memory" in Page(source).words
    assert "failed" in printed(study) and "SLEB failed: CUDA out of memory" in " ".join(
        printed(study).split()
    )
    line = next(line for line in markdown_table(study).splitlines() if line.startswith("| SLEB"))
    assert line.split(" | ")[2] == "failed: CUDA out of memory"


def test_a_seed_that_failed_is_named() -> None:
    study = make_study(("dense", "merged", "last"))
    row = row_of(study, "last")
    row["per_seed"][1]["error"] = "killed"
    row["metrics"]["exact_match"]["per_seed"] = [0.82]
    assert "Last layers: seed 1 failed." in judge(read(study)).notes
    assert "1 of 3 seeds" in markdown_table(study)


def test_what_has_not_run_yet_did_not_fail(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "last"))
    fail(study, "last", "not run yet")
    study["runs"] = {"planned": 3, "finished": 2, "failed": 0}
    row_of(study, "merged")["per_seed"][2]["error"] = "not finished"
    row_of(study, "merged")["metrics"]["exact_match"]["per_seed"][2] = None
    source = render(study, tmp_path)
    assert 'class="error"' not in source
    notes = judge(read(study)).notes
    assert "Incomplete: 2 of 3 runs are finished." in notes
    assert not any("failed" in note for note in notes)


def test_an_ablation_without_settings_is_shown_as_a_comparison(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "dropped", "gradpruner_width")) | {"kind": "ablation"}
    source = render(study | {"figure": "Figure 9"}, tmp_path)
    assert 'id="figure-quality"' in source and "Figure 9" in Page(source).words
    assert judge(read(study)).word == "Below dense"


def test_one_seed_and_few_examples_are_said(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "last"), seeds=(0,))
    for row in study["points"][0]["rows"]:
        for key in ("paired", "paired_gradpruner"):
            if row["metrics"]["exact_match"][key]:
                row["metrics"]["exact_match"][key]["n"] = 60
    words = Page(render(study, tmp_path)).words
    assert "Only one seed: how much the result varies from seed to seed is not known" in words
    assert "Only 60 examples were evaluated" in words
    assert "over 1 seeds" not in words


def test_rows_off_the_budget_and_of_unequal_width_are_named() -> None:
    study = make_study(("dense", "merged", "sat", "apt", "last"))
    row_of(study, "sat").update(removed_share=0.0, removed_parameters=0)
    notes = judge(read(study)).notes
    assert "SAT-like (0.0%) misses the budget of 40.0% removed." in notes
    assert "APT-like has layers of unequal width" in markdown_table(study)
    assert "vLLM, SGLang and llama.cpp refuse it" in " ".join(printed(study).split())


def test_markdown_is_rectangular_and_escapes() -> None:
    study = make_study(("dense", "merged", "last"))
    row_of(study, "last")["label"] = "a|b <i> *c*"
    lines = [line for line in markdown_table(study).splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert lines[4].startswith("| a\\|b \\<i> \\*c\\* |")
    assert "84.2% [83.4, 84.9]" in lines[3]


def test_nasty_strings_are_text(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "last"))
    study["title"] = study["what"] = study["command"] = study["figure"] = NASTY
    study["warnings"], study["task"] = [NASTY], NASTY
    for row in study["points"][0]["rows"]:
        row["label"] = row["description"] = NASTY
    fail(study, "last", NASTY)
    source = render(study, tmp_path)
    assert source.count("<script") == 1 and "49" not in re.findall(r"<h1>(.*?)</h1>", source)[0]
    assert "<script>alert(1)</script>" in Page(source).words
    assert printed(study)


@pytest.mark.parametrize("missing", sorted(make_study(("dense",))))
@pytest.mark.parametrize("kind", ["compare", "ablation"])
def test_any_part_may_be_missing(
    missing: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing is slow and tested elsewhere; here only that nothing is looked up in vain.
    saved = "gradpruner.reports.svg.Figure.savefig"
    monkeypatch.setattr(saved, lambda _, file, **__: file.write('<svg viewBox="">'))
    study = make_study(("dense", "merged", "last")) if kind == "compare" else make_sweep((1, 2, 3))
    for replacement in (None, [], "odd", [{}]):
        changed = {**study, missing: replacement}
        page = Page(render(changed, tmp_path))
        assert "headline" in page.ids and "provenance" in page.ids
        assert printed(changed) and markdown_table(changed)


def test_nothing_is_nan(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "last", "random"))
    row_of(study, "last")["metrics"]["exact_match"].update(mean=math.nan, low=math.inf)
    row_of(study, "random")["metrics"]["exact_match"].update(low=None, high=None, before=None, paired=None)
    row_of(study, "random")["costs"] = {"method_seconds": math.nan, "training_ratio": None}
    row_of(study, "merged").update(removed_share=math.nan, num_parameters=None, plans=[None, {}])
    for words in (Page(render(study, tmp_path)).words, printed(study), markdown_table(study)):
        assert not re.search(r"\b(nan|inf|None)\b", words, re.IGNORECASE)


def test_same_record_same_bytes(tmp_path: Path) -> None:
    study = make_study(("dense", "merged", "last"))
    untouched = copy.deepcopy(study)
    first = render_html(study, tmp_path / "a.html").read_bytes()
    assert study == untouched
    assert render_html(json.loads(json.dumps(study)), tmp_path / "b.html").read_bytes() == first


def count_marks(source: str, name: str, colour: str) -> int:
    """Filled dots of a colour in the drawing of a figure."""
    figure = source[source.index(f'id="figure-{name}"') :]
    svg = figure[figure.index('class="drawing"') : figure.index("</figure>")]
    # The ticks of single seeds are thinner, bands have no edge.
    style = rf'style="fill: var\(--{colour}\); stroke: var\(--{colour}\)(; stroke-width: 1.6)?"'
    return len(re.findall(rf"<use [^>]*{style}", svg))


def test_plots_hold_one_dot_per_method(source: str) -> None:
    assert count_marks(source, "quality", "keep") == 15
    assert count_marks(source, "quality", "series-2") == 1  # GradPruner; without merging it is a ring
    assert count_marks(source, "quality", "series-0") == 1
    assert count_marks(source, "difference", "keep") == 15
    assert count_marks(source, "cost", "keep") == 15
    labels = Page(source).labels
    assert any("SAT-like: 83.6%" in label for label in labels)
    assert any("LaCo −5.3 [−6.5, −4.1] points" in label for label in labels)


def test_a_sweep_shows_every_setting_and_its_dense_row_once(tmp_path: Path) -> None:
    study = make_sweep()
    table = results_table(read(study))
    assert table.columns[:4] == ("Merged layers", "Method", "Layers", "Parameters")
    assert [tuple(c.text for c in row.cells[:2]) for row in table.lines][:3] == [
        ("any", "Dense"), ("0", "GradPruner"), ("0", "GradPruner, no merging"),
    ]  # fmt: skip
    assert len(table.lines) == 13
    source = render(study, tmp_path)
    assert count_marks(source, "sweep", "series-2") == 6
    assert count_marks(source, "sweep", "series-1") == 6
    assert count_marks(source, "sweep", "series-0") == 0  # one dashed line
    assert "dense (86.1%)" in Page(source).words
    assert "Table 3" in Page(source).words


def test_a_sweep_says_whether_it_makes_a_difference() -> None:
    found = judge(read(make_sweep()))
    assert (
        found.level == "better"
        and "best at 5 (87.2%), worst at 0 (84.2%), 3.0 points apart" in found.sentence
    )
    assert judge(read(make_sweep((0, 1)))).level == "even"
    lone = make_sweep()
    for point in lone["points"]:
        for row in point["rows"]:
            row["metrics"]["exact_match"]["per_seed"] = [0.8]
    assert judge(read(lone)).level == "unclear"


def test_names_are_bars_with_their_values(tmp_path: Path) -> None:
    study = make_sweep(("sum", "mean", "fisher"), ("dense", "merged"))
    source = render(study, tmp_path)
    svg = source[source.index('id="figure-sweep"') :]
    svg = svg[: svg.index("</figure>")]
    assert len(re.findall(r'<path [^>]*style="fill: var\(--series-2\)', svg)) == 3
    assert all(f">{value}</text>" in svg for value in ("84.2%", "84.8%", "85.4%", "sum", "mean", "fisher"))


def test_a_sweep_over_names_can_be_looked_at_when_only_dense_is_measured(tmp_path: Path) -> None:
    study = make_sweep(("sum", "mean"), ("dense", "merged"))
    for point in study["points"]:
        point["rows"][1].update(error="not run yet", metrics={}, costs={}, plans=[])
    assert "dense (86.1%)" in Page(render(study, tmp_path)).words


def test_stability_is_the_share_of_the_finally_kept_layers(tmp_path: Path) -> None:
    study = make_sweep((4, 10, 40), ("dense", "merged"))
    study["plot"] = {"kind": "stability"}
    kept = ([0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 4, 5])
    for point, layers in zip(study["points"], kept, strict=True):
        actions = [{"layer": i, "action": "keep" if i in layers else "drop", "into": None} for i in range(6)]
        point["rows"][1]["plans"] = [{"num_layers": 6, "actions": actions, "num_kept": 4}]
    labels = Page(render(study, tmp_path)).labels
    said = next(label for label in labels if label.startswith("How early"))
    assert said.endswith("4 50.0%, 10 75.0%, 40 100.0%.")


def test_costs_can_be_what_a_sweep_draws(tmp_path: Path) -> None:
    study = make_sweep()
    study["plot"] = {"kind": "line", "y": "training_seconds"}
    labels = Page(render(study, tmp_path)).labels
    assert any("Training time over merged layers" in label and "0 63.0\u00a0s" in label for label in labels)


@pytest.mark.parametrize("zero", [False, True], ids=["majority", "zero everywhere"])
@pytest.mark.parametrize("make", [make_study, make_sweep])
def test_what_was_not_learned_decides_nothing_and_says_what_to_change(make: Any, zero: bool) -> None:
    study = make()
    assert judge(read(study)).word != "Not learned"
    study["recipe"] = {"finetune": {"epochs": 0.5, "learning_rate": 1e-5}}
    study["reference"]["majority_class"] = 0.1 if zero else METHODS["dense"][1]
    for point in study["points"] if zero else ():
        for row in point["rows"]:
            row["metrics"]["exact_match"].update(mean=0.0, low=0.0, high=0.0)
    found = judge(read(study))
    assert (found.level, found.word) == ("unclear", "Not learned")
    assert "finetune.epochs, now 0.5 epochs" in found.sentence and "now 1e-05" in found.sentence
    assert "clear difference" not in found.sentence and "overlap" not in found.sentence


def test_validation_rows_choose_what_to_ship_and_test_rows_do_not() -> None:
    study = make_study(("dense", "merged", "sleb", "last"))
    found = advice(read(study))
    assert found is not None and found.title == "GradPruner" and "test rows must not decide" in found.reason
    for name, value in (("dense", 0.9), ("merged", 0.8), ("sleb", 0.85), ("last", 0.7)):
        row_of(study, name)["validation"] = {"exact_match": {"mean": value, "n": 240}}
    found = advice(read(study), Path("here"))
    assert found is not None and found.path == "here/seed-0/variants/sleb/model"
    assert "85.0%; the dense model has 90.0%" in found.reason
    row_of(study, "sleb")["removed_share"] = 0.3  # not at the budget
    assert (advice(read(study)) or pytest.fail()).title == "GradPruner"
    study["recipe"]["keep_models"] = "none"
    found = advice(read(study), Path("a b"))
    assert found is not None and not found.path
    command = "gradpruner run 'a b/seed-0/recipe.yaml' --set keep_models=all "
    assert found.commands[0].command.startswith(command)
