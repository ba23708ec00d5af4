"""Our own files, changed at random: each is read as something valid, or refused in one line. Nothing else."""

import contextlib
import copy
import io
import json
import random
import re
from typing import Any

import pytest
import torch
import yaml
from builders import make_llama
from conftest import make_trace
from rich.console import Console

from gradpruner.common.errors import ConfigError, GradPrunerError, IntegrityError, PlanError
from gradpruner.common.json_files import read_object
from gradpruner.evaluation.outputs import Output, output_line, read_examples
from gradpruner.gradients.scores import LayerScores, score_layers
from gradpruner.gradients.trace import GradientTrace
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.plans.reading import load_plan
from gradpruner.plans.repair import Repair, RepairedCut
from gradpruner.plans.width_plan import LayerWidths, WidthPlan, WidthShape
from gradpruner.reports.html import render_html
from gradpruner.reports.markdown import markdown_table
from gradpruner.reports.terminal import print_summary
from gradpruner.runs.folder.directory import MANIFEST, RunDirectory, Stage
from gradpruner.runs.recipe.recipe import check_recipe, load_recipe, recipe_yaml

SCRIPT = "<script>alert(1)</script>"
ODD = [
    None, True, -1, 0, 10**15, 2**64 - 1, -(2**63), 0.5, -1e308, 1e-320, "", "x", SCRIPT,
    "a\nb\0c\x1b[31m", "\u202e",
    "[red]x[/red]", "| a | [b](javascript:alert(1))", "../../x", "x" * 5000, [], {}, [[]], [None], {"": None},
    {"layer": 0}, [1, "2", 3.0], [[[[[[[[1]]]]]]]],
]  # fmt: skip
# What JSON can be made to say and nobody can go on with; put in as text.
RAW = [
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    '"\\ud800"',
    "[" * 500 + "]" * 500,
    '{"a": 1, "a": 2}',
    "tru",
    "",
]


def places(value, path=()):
    """The path of every value inside a JSON value, its own included."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from places(item, (*path, key))


def changed(value, draw):
    """A copy in which one to three values were replaced, removed, doubled or given another key; as text."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        *parents, last = draw.choice(list(places(value))) or (None,)
        if last is None:
            value = copy.deepcopy(draw.choice(ODD))
            continue
        holder = value
        for key in parents:
            holder = holder[key]
        kind = draw.randrange(4)
        if kind == 0:
            del holder[last]
        elif kind == 1 and isinstance(holder, dict):
            holder[draw.choice(("x", "layer", "", SCRIPT))] = holder.pop(last)
        elif kind == 2 and isinstance(holder, list):
            holder.insert(last, copy.deepcopy(holder[last]))
        else:
            holder[last] = copy.deepcopy(draw.choice(ODD))
    if draw.random() < 0.15:
        holes = [m.span() for m in re.finditer(r'(?<=: )[^,{}\[\]"]+|"[^"]*"', json.dumps(value))] or [(0, 0)]
        start, end = draw.choice(holes)
        text = json.dumps(value)
        return text[:start] + draw.choice(RAW) + text[end:]
    return json.dumps(value)


def attack(path, value, read, count, seed=0):
    """Reads `count` changed files; returns how many were refused."""
    draw = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    read(path)
    refused = 0
    for _ in range(count):
        text = changed(value, draw)
        path.write_text(text, encoding="utf-8")
        try:
            read(path)
        except GradPrunerError as error:
            assert len(error.message) < 3000 and "\n" not in error.message, text[:500]
            refused += 1
        except Exception as error:  # what is looked for
            raise AssertionError(f"{type(error).__name__}: {error} for {text[:2000]}") from error
    return refused


def plan():
    keep, drop, merge = LayerAction("keep"), LayerAction("drop"), LayerAction("merge", 0)
    return PruningPlan((keep, merge, drop, keep), evidence={"model": "llama-4-16-ab", "trace": {"steps": 4}})


def width_plan():
    layer = LayerWidths((0, 1), (0, 1, 5))
    return WidthPlan(WidthShape(2, 8, 4, 2, 2, 6), (layer, layer), (0, 1, 2), "x", {"a": 1})


def saved_plan(path):
    found = load_plan(path)
    found.save(path.with_name("again.json"))  # what was accepted can be written, and read again
    assert load_plan(path.with_name("again.json")) == found
    return found


def test_plans(tmp_path, seed=0):
    assert attack(tmp_path / "plan.json", plan().to_dict(), saved_plan, 2400, seed) > 1000
    assert attack(tmp_path / "width.json", width_plan().to_dict(), saved_plan, 1500, seed) > 700


def test_scores(tmp_path, seed=0):
    trace = make_trace(make_llama())
    value = json.loads(score_layers(trace, resamples=10).save(tmp_path / "scores.json").read_text())

    def read(path):
        LayerScores.load(path).save(path.with_name("again.json"))

    assert attack(tmp_path / "scores.json", value, read, 1500, seed) > 700


def test_traces(tmp_path, seed=0):
    make_trace(make_llama()).save(tmp_path)
    value = json.loads((tmp_path / "trace.json").read_text())
    assert (
        attack(tmp_path / "trace.json", value, lambda path: GradientTrace.load(path.parent), 700, seed) > 300
    )


def test_repairs(tmp_path, seed=0):
    cuts = (
        RepairedCut(0, "mlp.down_proj", (1,), 0.1, 0.5, 0.25),
        RepairedCut(2, "mlp.down_proj", (3,), None, 0.5, 0.5),
    )
    path = Repair("linear", (1, 3), cuts, {0: torch.ones(2, 2)}, "llama", 8, 64, 1.5, ("a",)).save(tmp_path)
    assert attack(path, json.loads(path.read_text()), lambda p: Repair.load(p.parent), 700, seed) > 300


def test_manifests(tmp_path, seed=0):
    with RunDirectory(tmp_path) as directory:
        directory.describe({"seed": 1}, {"model": "ab"})
        directory.ensure(Stage("work", 1, lambda: {"a": (tmp_path / "a.txt").write_text("x")}, ["a.txt"]))
    value = json.loads((tmp_path / MANIFEST).read_text())

    def read(path):
        with RunDirectory(path.parent) as directory:
            directory.ensure(Stage("work", 1, lambda: {"a": (tmp_path / "a.txt").write_text("x")}, ["a.txt"]))

    assert attack(tmp_path / MANIFEST, value, read, 800, seed) > 200


def test_evaluated_examples(tmp_path, seed=0):
    rows = [Output("a", "the", " cat", " cat", True, True, choices=(" a", " b"), choice_scores=(-1.0, -2.5))]
    row = json.loads(output_line(rows[0]))
    assert attack(tmp_path / "examples.jsonl", row, read_examples, 1500, seed) > 500
    (tmp_path / "examples.jsonl").write_text(output_line(rows[0]))
    assert read_examples(tmp_path / "examples.jsonl") == rows


def record():
    measured = {"exact_match": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}}
    actions = [{"layer": 0, "action": "keep"}, {"layer": 1, "action": "merge", "into": 0}]
    return {
        "title": "A run",
        "variants": {
            "dense": {
                "label": "dense", "num_layers": 2, "finetune": {"seconds": 3},
                "evaluation": {"metrics": measured},
            },
            "merged": {
                "label": "merged", "plan": "merged", "num_layers": 1, "error": None,
                "evaluation": {"metrics": measured},
                "paired": {"task": {"exact_match": {"value": 0.0, "low": 0.0}}},
            },
        },
        "plans": {
            "merged": {
                "actions": actions, "num_kept": 1, "savings": {"bytes": {"before": 2, "after": 1}},
            },
        },
        "scores": {"gradpruner": {"values": [1.0, 2.0], "low": [0.5, 1.0], "high": [2, 3]}},
        "trace": {"num_steps": 4, "effective_steps": 3},
        "recipe": {"evaluate": {"metrics": ["exact_match"]}},
        "warnings": ["mind the gap"],
    }  # fmt: skip


def shown_in_text(path):
    found = read_object(path, "run record", dict[str, Any])
    print_summary(found, Console(file=io.StringIO(), width=100))
    # Commands are code: nothing in them is markup.
    lines = [line for line in markdown_table(found).splitlines() if not line.startswith("    ")]
    assert "<script" not in "\n".join(lines).replace("\\<", "")
    table = lines[: lines.index("")]
    assert all(line.startswith("| ") for line in table)


def test_run_records_in_text(tmp_path, seed=0):
    attack(tmp_path / "run.json", record(), shown_in_text, 400, seed)


ATTACKS = (
    test_plans,
    test_scores,
    test_traces,
    test_repairs,
    test_manifests,
    test_evaluated_examples,
    test_run_records_in_text,
)


def test_run_records_as_a_page(tmp_path):
    def read(path):
        page = render_html(read_object(path, "run record", dict[str, Any]), path.with_name("report.html"))
        assert SCRIPT not in page.read_text()

    attack(tmp_path / "run.json", record(), read, 5)


@pytest.mark.parametrize(
    "text",
    [
        "? [a, b]\n: 1\n", "a: " + "[" * 3000 + "]" * 3000, "seed: " + "9" * 5000, "title: 2020-99-99\n",
        "title: 2020-01-01\n", 'title: "\\ud800"\n', 'title: "a\\0b"\n', "a: &a [*a]\n", "a: \x01\n",
        "- " * 3000,
        "a: !!binary aGVsbG8=\n", "a: !!set {b}\n", "a: !!timestamp x\n", "a: !!bool x\n", "a: !!int x\n",
        "seed: 0x" + "f" * 40, "<<: 5\n", "a: *b\n", "a: {\n", "5: 1\n",
        "!!python/object/apply:os.system [ls]",
        "a: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        + "".join(f"{k}: &{k} [{', '.join(['*' + chr(ord(k) - 1)] * 9)}]\n" for k in "cdefgh"),
    ],
)  # fmt: skip
def test_recipes_that_nobody_could_load(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "item",
    ["seed=" + "9" * 5000, "seed=" + "[" * 3000, "title=2020-99-99", "a.b=\ud800", "seed=&a [*a]", "seed='",
     "x", "seed=!!int x", "model.path=\0", "=1", "a..b=1", ".=1"],
)  # fmt: skip
def test_overrides_that_nobody_could_load(item):
    with pytest.raises(ConfigError):
        load_recipe(None, (item,))


def test_recipe_values_of_any_kind(tmp_path):
    value = {
        "model": {"path": "x"},
        "data": {"train": "a", "eval": "b"},
        "record": {"steps": 4},
        "plan": {"density": 0.2},
    }
    draw = random.Random(0)
    for _ in range(500):
        (tmp_path / "r.yaml").write_text(changed(value, draw))
        with contextlib.suppress(ConfigError):
            recipe = load_recipe(tmp_path / "r.yaml")
            assert check_recipe(yaml.safe_load(recipe_yaml(recipe))) == recipe


@pytest.mark.parametrize("method", ["x\n# Title", "x" * 300, 5, None, ["x"], "\x1b[31m"])
def test_a_method_is_one_line_of_text(method):
    with pytest.raises(PlanError, match="a name is needed"):
        PruningPlan.from_dict(plan().to_dict() | {"method": method})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "\ud800", ["\udfff"], {"\ud800": 1}])
def test_evidence_that_no_file_can_hold(value):
    with pytest.raises(PlanError, match="evidence"):
        PruningPlan.from_dict(plan().to_dict() | {"evidence": {"a": value}})


def test_a_run_record_that_is_a_list(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(IntegrityError, match="should be an object"):
        read_object(tmp_path / "run.json", "run record", dict[str, Any])


@pytest.mark.parametrize(
    "arguments",
    [("run", "--out", "OUT", "--set", "x"), ("report", "OUT"), ("run", "OUT"), ("verify", "OUT")],
    ids=["run --out", "report", "recipe", "verify"],
)
def test_names_longer_than_a_file_system_allows(tmp_path, call, monkeypatch, arguments):
    from gradpruner.cli import main as cli

    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)
    long = str(tmp_path / ("x" * 300))
    code, _, err = call(*(long if given == "OUT" else given for given in arguments))
    assert code in (2, 4, 6) and "Traceback" not in err and err.startswith("error:")
