import json
import shutil
import traceback
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from builders import make_project, make_tokenizer, write_rows
from families import make_family_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from gradpruner.common.errors import ConfigError, ModelError, NonFiniteError, PlanError, ResourceError
from gradpruner.common.progress import set_mode
from gradpruner.gradients.scores import LayerScores
from gradpruner.gradients.trace import GradientTrace
from gradpruner.methods import METHODS, Method
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.reports import html
from gradpruner.reports.terminal import print_summary
from gradpruner.runs.before.disk import bytes_to_write
from gradpruner.runs.before.preview import preview_run
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.runs.row import work


@pytest.fixture(autouse=True)
def quick_and_quiet(project, process_as_usual, monkeypatch):
    """The report and the clearing of memory, seconds each, are left to the first run."""
    set_mode("quiet")
    monkeypatch.setattr(html, "render_html", lambda record, path: path)
    monkeypatch.setattr(Job, "release", lambda *a: None)


def figures(record):
    """What a run found, without when and how fast."""
    text = json.dumps(
        {key: record[key] for key in ("recipe", "model", "data", "scores", "plans", "reference", "warnings")}
    )
    rows = {}
    for name, row in record["variants"].items():
        row = json.loads(json.dumps(row))
        for part in ("before", "evaluation", "finetune"):
            for key in ("seconds", "peak_memory_bytes", "tokens_per_second", "resumed_from"):
                (row[part] or {}).pop(key, None)
        rows[name] = row
    return json.loads(text), rows


def states(record):
    return {stage["name"]: stage["state"] for stage in record["stages"]}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A finished run."""
    set_mode("quiet")
    path, values = make_project(
        tmp_path_factory.mktemp("project"), variants=["dense", "merged", "dropped", "random"]
    )
    return path, values, run(load_recipe(path), command="gradpruner run recipe.yaml")


@pytest.fixture
def copy(project, tmp_path):
    """A copy of it, to go on with."""
    path, _, record = project
    shutil.copytree(path.parent, tmp_path / "project")
    return tmp_path / "project" / "recipe.yaml", {"out": str(tmp_path / "project" / "run")}, record


def test_a_run_writes_all_its_results(project):
    path, _, record = project
    out = path.parent / "run"
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(record))
    assert list(record["variants"]) == ["dense", "merged", "dropped", "random"]
    assert set(states(record).values()) == {"done"}
    for name, row in record["variants"].items():
        assert row["error"] is None
        assert 0 <= row["evaluation"]["metrics"]["exact_match"]["value"] <= 1
        assert row["num_layers"] == (4 if name == "dense" else 2)
        assert row["finetune"]["steps"] == 6 and len(row["finetune"]["losses"]) == 6
        model = AutoModelForCausalLM.from_pretrained(out / row["finetune"]["output"])
        assert model.config.num_hidden_layers == row["num_layers"]
        assert sum(p.numel() for p in model.parameters()) == row["num_parameters"]
        assert (out / row["evaluation"]["per_example"]).exists()
    merged, dropped = (PruningPlan.load(out / f"plans/{name}.json") for name in ("merged", "dropped"))
    assert merged.keep == dropped.keep and sum(map(len, merged.merged.values())) == 1 and not dropped.merged
    assert GradientTrace.load(out / "trace").num_steps == 4
    assert LayerScores.load(out / "scores/gradpruner.json").values == tuple(
        record["scores"]["gradpruner"]["values"]
    )
    assert "<html" in (out / "report.html").read_text()
    assert not list(out.rglob("checkpoint-*")) and not list(out.rglob("*.part"))


def test_evaluation_rows_are_tokenised_once_for_all_models(project, tmp_path, monkeypatch):
    path, _, record = project
    job, out = Job(load_recipe(path)), path.parent / "run"
    monkeypatch.setattr("gradpruner.evaluation.questions.prompt_ids", None)
    for name in ("dense", "dropped"):
        plan = None if name == "dense" else PruningPlan.load(out / f"plans/{name}.json").to_dict()
        asked = str(out / record["variants"][name]["finetune"]["output"]), "eval", job.metrics
        found = work.on_variant(job, str(out), name, plan, work.answer, *asked, str(tmp_path / name))
        found.write_examples(tmp_path / "examples.jsonl")
        recorded = out / record["variants"][name]["evaluation"]["per_example"]
        assert (tmp_path / "examples.jsonl").read_text() == recorded.read_text()


def test_the_manifest_holds_hashes_configuration_versions_and_states(project):
    manifest = json.loads((project[0].parent / "run" / "manifest.json").read_text())
    assert manifest["config"]["plan"]["num_prune"] == 2
    assert {len(value) for value in manifest["inputs"].values()} == {64}
    assert set(manifest["inputs"]) == {"model", "train", "eval"}
    for stage in manifest["stages"].values():
        assert stage["state"] == "done" and {"gradpruner", "torch", "transformers"} <= set(stage["versions"])


def test_a_second_start_skips_every_stage_and_has_the_same_results(copy, monkeypatch):
    path, given, record = copy
    first = run(load_recipe(path, (), given))  # the copy's paths are new, its content is not
    assert set(states(first).values()) == {"skipped"}
    monkeypatch.setattr(Job, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    second = run(load_recipe(path, (), given))
    assert figures(second) == figures(first) and second["created"] == record["created"]
    assert figures(first)[1] == figures(record)[1]


def test_another_budget_uses_the_same_trace(copy):
    path, given, _ = copy
    plan = run(load_recipe(path, ("plan.num_prune=1", "plan.num_merge=0"), given), until="plan")
    name = "merged@num_prune=1+num_merge=0"
    assert states(plan)["record"] == "skipped" and states(plan)[f"plan {name}"] == "done"
    assert plan["plans"][name]["num_kept"] == 3 and plan["plans"]["merged"]["num_kept"] == 2
    assert plan["rows"]["merged"] == name and name not in plan["variants"]


def test_an_edited_plan_is_carried_out(copy, tmp_path):
    path, given, _ = copy
    plan = json.loads((path.parent / "run/plans/merged.json").read_text())
    plan["actions"] = [
        {"layer": 0, "action": "keep"}, {"layer": 1, "action": "merge", "into": 0},
        {"layer": 2, "action": "keep"}, {"layer": 3, "action": "keep"},
    ]  # fmt: skip
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    given |= {"plan.file": str(tmp_path / "edited.json"), "variants": ["merged", "dropped"]}
    done = run(load_recipe(path, (), given), until="prune")
    assert states(done)["record"] == "skipped"
    merged = AutoModelForCausalLM.from_pretrained(path.parent / "run/variants/merged@edited/pruned")
    dropped = AutoModelForCausalLM.from_pretrained(path.parent / "run/variants/dropped@edited/pruned")
    dense = AutoModelForCausalLM.from_pretrained(path.parent / "model")
    same = [
        torch.equal(model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight)
        for model in (merged, dropped)
    ]
    assert same == [False, True]
    assert merged.config.num_hidden_layers == dropped.config.num_hidden_layers == 3


def found_in(record):
    """Plans and figures of every finished row."""
    rows = {name: row | {"cost": None} for name, row in figures(record)[1].items() if row["evaluation"]}
    return {name: (row, record["plans"].get(name)) for name, row in rows.items()}


@pytest.mark.parametrize("until", ["record", "plan", "prune", "report"])
def test_another_plan_keeps_all_finished_results(copy, until):
    path, given, _ = copy
    run(load_recipe(path, (), given))
    out = path.parent / "run"
    # As the command line does it: the recipe is that of the folder.
    before = json.loads((out / "run.json").read_text())
    weights = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    run(load_recipe(out / "recipe.yaml", ("plan.num_prune=1", "plan.num_merge=0")), until=until)
    after = json.loads((out / "run.json").read_text())
    assert states(after)["record"] == "skipped"
    kept = found_in(after)
    assert {name: kept[name] for name in found_in(before)} == found_in(before)
    assert all(path.read_bytes() == content for path, content in weights.items())
    for name in ("merged", "dropped", "merged@num_prune=1+num_merge=0"):
        own = out / f"variants/{name}/plan.json"
        assert own.exists() == (after["variants"].get(name, {}).get("pruning") is not None)
        if own.exists():
            assert PruningPlan.load(own) == PruningPlan.load(out / f"plans/{name}.json")
            layers = AutoModelForCausalLM.from_pretrained(own.parent / "pruned").config.num_hidden_layers
            assert layers == len(PruningPlan.load(own).keep)
    if until == "plan":  # what was asked for is shown too
        with StringIO() as screen:
            print_summary(after, Console(file=screen, width=110))
            assert "planned: merged@num_prune=1+num_merge=0: 3 of 4 kept" in screen.getvalue()
        with StringIO() as screen:  # as the command `plan` prints it
            print_summary(after, Console(file=screen, width=110), decisions=True)
            said = screen.getvalue()
            assert "merged@num_prune=1+num_merge=0: 3 of 4 kept" in said and "vs dense" not in said
    # And back: the first plan is still that of the folder, and nothing is done twice.
    again = run(load_recipe(out / "recipe.yaml"))
    done = {name for name, state in states(again).items() if state == "done"}
    assert done <= {"score gradpruner", "score random"} and again["rows"]["merged"] == "merged"
    assert list(again["variants"])[:4] == ["dense", "merged", "dropped", "random"]


def test_a_recipe_read_back_needs_no_stage_again(copy):
    path, given, _ = copy
    values = json.loads(path.read_text())
    del values["record"]["alpha"]
    path.write_text(json.dumps(values | {"variants": ["merged"]}))
    out = path.parent / "other"
    run(load_recipe(path, (), given | {"out": str(out)}), until="score")
    again = run(load_recipe(out / "recipe.yaml"), until="score")
    assert set(states(again).values()) == {"skipped"}


def test_a_name_belongs_to_one_plan(copy):
    path, given, _ = copy
    named = given | {"variants": ["merged"], "plan.name": "small", "plan.num_merge": 0}
    done = run(load_recipe(path, (), named), until="prune")
    assert done["rows"] == {"merged": "merged@small"} and "merged" in done["variants"]
    assert done["variants"]["merged@small"]["label"] == "pruned + merged (small)"
    again = run(load_recipe(path, (), named | {"plan.name": None}), until="prune")
    assert again["rows"] == {"merged": "merged@small"} and set(states(again).values()) == {"skipped"}
    with pytest.raises(ConfigError, match="already has another plan called 'small'"):
        run(load_recipe(path, ("plan.num_prune=1",), named), until="prune")
    with pytest.raises(ConfigError, match=r"plan\.name"):
        load_recipe(path, (), named | {"plan.name": "../up"})


def test_a_plan_file_of_a_finished_row_is_that_row(copy):
    path, given, _ = copy
    file = path.parent / "run/plans/merged.json"
    done = run(load_recipe(path, (), given | {"variants": ["merged"], "plan.file": str(file)}))
    assert done["rows"] == {"merged": "merged"}
    assert {name for name, state in states(done).items() if state == "done"} <= {"plan merged"}
    # Edited in place it is another one, and the model that was made by the first keeps its own.
    plan = json.loads(file.read_text())
    plan["actions"] = [{"layer": i, "action": "drop" if i == 2 else "keep"} for i in range(4)]
    file.write_text(json.dumps(plan))
    done = run(load_recipe(path, (), given | {"variants": ["merged"], "plan.file": str(file)}), until="prune")
    assert done["rows"] == {"merged": "merged@edited"} and json.loads(file.read_text()) == plan
    assert done["variants"]["merged"]["num_layers"] == 2
    assert done["variants"]["merged@edited"]["num_layers"] == 3


def test_rows_made_with_other_settings_are_shown_with_a_warning(copy):
    path, given, record = copy
    tuned = run(load_recipe(path, ("finetune.learning_rate=2e-3",), given | {"variants": ["merged"]}))
    assert list(tuned["variants"]) == ["merged", "dense", "dropped", "random"]
    assert tuned["variants"]["dropped"]["evaluation"] == record["variants"]["dropped"]["evaluation"]
    said = [warning for warning in tuned["warnings"] if "made by an earlier start" in warning]
    assert len(said) == 3 and all("finetune.learning_rate=0.001" in warning for warning in said)
    half = run(load_recipe(path, ("finetune.learning_rate=3e-3",), given), until="finetune")
    assert half["variants"]["merged"]["evaluation"] is None  # that of a model which is there no longer


def test_lora_without_merging_the_adapters(tmp_path):
    options = {"mode": "lora", "merge_adapter": False, "rank": 2}
    path, _ = make_project(tmp_path, variants=["merged"], finetune=options)
    record = run(load_recipe(path))
    out = tmp_path / "run" / "variants" / "merged"
    assert (out / "model" / "adapter_config.json").exists()
    assert record["variants"]["merged"]["evaluation"]["metrics"]["exact_match"]["n"] == 12
    assert record["warnings"]


def test_keep_models_none_deletes_every_model(tmp_path):
    path, _ = make_project(tmp_path, variants=["dropped"], keep_models="none")
    first = run(load_recipe(path))
    assert not list((tmp_path / "run" / "variants").rglob("*.safetensors"))
    again = run(load_recipe(path))
    assert figures(first)[1] == figures(again)[1] and "done" not in states(again).values()


def test_other_rows_go_on_when_one_row_fails(copy, monkeypatch):
    path, given, _ = copy
    shutil.rmtree(path.parent / "run")
    finetune = work.finetune

    def failing(model, *args, **options):
        if options["description"] == "finetune merged":
            raise NonFiniteError("The loss at step 3 is NaN or Inf; training stopped.")
        return finetune(model, *args, **options)

    monkeypatch.setattr(work, "finetune", failing)
    given |= {"variants": ["merged", "dropped"]}
    with pytest.raises(NonFiniteError, match="step 3"):
        run(load_recipe(path, (), given))
    record = json.loads((path.parent / "run" / "run.json").read_text())
    assert "step 3" in record["variants"]["merged"]["error"]
    assert record["variants"]["dropped"]["evaluation"] is not None
    assert states(record)["finetune merged"] == "failed"
    monkeypatch.setattr(work, "finetune", finetune)
    repaired = run(load_recipe(path, (), given))
    assert repaired["variants"]["merged"]["error"] is None
    assert states(repaired)["finetune dropped"] == "skipped"


def broken(context):
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("score", "error", "said"),
    [
        (
            lambda context: LayerScores("own", (1.0, 2.0)),
            ConfigError,
            "own returned 2 scores; .* has 4 layers",
        ),
        (lambda context: [1.0] * 4, ConfigError, "own returned list; LayerScores are needed"),
        (broken, ModelError, r"^ValueError: a bug \(test_pipeline\.py:\d+\)$"),
    ],
)
def test_a_fault_of_a_method_is_told_as_that(score, error, said, copy, monkeypatch):
    path, given, _ = copy
    monkeypatch.setitem(METHODS._entries, "own", Method("a method from elsewhere", score))
    with pytest.raises(error, match=said) as caught:
        run(load_recipe(path, (), given | {"variants": ["own"]}), until="plan")
    if score is broken:
        frames = [frame for frame, _ in traceback.walk_tb(caught.value.__cause__.__traceback__)]
        assert frames[-1].f_code is broken.__code__ and not frames[-1].f_locals


# -- before anything is written --------------------------------------------------------------------------


def test_impossible_runs_are_refused_before_anything_is_written(copy, tmp_path, monkeypatch):
    path, given, _ = copy
    shutil.rmtree(path.parent / "run")
    six = {"actions": [{"layer": i, "action": "keep"} for i in range(6)]}
    (tmp_path / "six.json").write_text(json.dumps(six))
    usage = SimpleNamespace(free=10_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"This run needs .*iB in .*; .*B are free"):
            run(load_recipe(path, (), given))
    for override, error, part in (
        ("plan.num_prune=3", PlanError, "at least 2 layers must stay"),
        ("plan.num_prune=9", PlanError, "0 to 2"),
        ("plan.protect_last=3", PlanError, "not protected"),
        ("plan={layers: [0], protect_first: 1}", PlanError, "both listed for pruning and protected"),
        ("plan={layers: [9]}", PlanError, "layers 0 to 3"),
        (f"plan={{file: {tmp_path / 'six.json'}}}", PlanError, "a model of 6 layers; this one has 4"),
        ("variants=[merged, randon]", ConfigError, "Did you mean 'random'"),
        ("model.device=gpu", ConfigError, "Unknown device"),
        ("finetune.report_to=wandbb", ConfigError, "Did you mean 'wandb'"),
        (f"out={path.parent / 'model'}", ConfigError, "is the input"),
        (f"out={path.parent / 'model' / 'run'}", ConfigError, "lies inside it"),
        (f"out={path.parent}", ConfigError, "not made by gradpruner"),
    ):
        with pytest.raises(error, match=part):
            run(load_recipe(path, (override,), given if not override.startswith("out") else {}))
    with pytest.raises(ConfigError, match="Unknown stage"):
        run(load_recipe(path, (), given), until="everything")
    assert not (path.parent / "run").exists()
    assert not (path.parent / "model" / "run").exists()


def test_the_estimated_bytes_are_the_bytes_written(project):
    path, _, _ = project
    job = Job(load_recipe(path))
    needs = bytes_to_write(job)
    out = path.parent / "run"
    factors = sum(p.stat().st_size for p in (out / "trace" / "factors").iterdir())
    models = sum(p.stat().st_size for p in out.rglob("*.safetensors") if "trace" not in p.parts)
    assert needs["trace"] == pytest.approx(factors, rel=0.2)
    assert needs["models"] == pytest.approx(models, rel=0.2)
    facts = preview_run(load_recipe(path, (f"out={path.parent / 'new'}",)))
    assert facts["written_bytes"] == needs["trace"] + needs["models"]
    learned = "".join(text for text, supervised in facts["samples"][0] if supervised)
    assert learned.split()[0] in ("red", "blue", "green") and len(facts["samples"]) == 2


def test_few_samples_and_overlap_are_warned_about(tmp_path):
    path, _ = make_project(tmp_path, record={"steps": 8})
    rows = [{"prompt": "the cat is red :", "completion": " red"}] * 2
    write_rows(tmp_path / "train.jsonl", rows)
    write_rows(tmp_path / "eval.jsonl", rows)
    warnings = "\n".join(Job(load_recipe(path)).warnings)
    assert "2 training samples for 8 recording steps of 4" in warnings
    assert "2 of 2 evaluation prompts also occur in the training data" in warnings
    write_rows(tmp_path / "train.jsonl", rows * 10)
    held_out = ("start=given", "recover.epochs=1", "variants=[dense, last]")
    warnings = "\n".join(Job(load_recipe(path, held_out)).warnings)
    assert "2 of 2 validation prompts also occur in the training data" in warnings


def test_a_model_that_is_served_otherwise_than_measured_is_warned_about(tmp_path):
    path, _ = make_project(tmp_path)
    config = tmp_path / "model/generation_config.json"

    def warned(**given):
        config.write_text(json.dumps({"eos_token_id": 2, **given}))
        return [line for line in Job(load_recipe(path)).warnings if "greedy" in line]

    assert warned() == warned(do_sample=False, temperature=0.6, repetition_penalty=1.0) == []
    (said,) = warned(do_sample=True, temperature=0.6, repetition_penalty=1.1)
    assert "do_sample: true, repetition_penalty: 1.1, temperature: 0.6" in said
    assert "--generation-config vllm" in said
    config.write_text("{")
    assert not any("greedy" in line for line in Job(load_recipe(path)).warnings)


def other_family(tmp_path, model_type, **recipe):
    """A project whose model is of another type, with six layers."""
    path, _ = make_project(tmp_path, **recipe)
    vocabulary = len(make_tokenizer())
    model = make_family_model(model_type, num_hidden_layers=6, vocab_size=vocabulary)
    for old in (tmp_path / "model").glob("model*.safetensors"):
        old.unlink()
    model.save_pretrained(tmp_path / "model")
    return path


def test_layers_are_chosen_for_the_engines_asked_for(tmp_path):
    path = other_family(tmp_path, "gemma2", variants=["dropped", "merged"])
    free = run(load_recipe(path, ("plan.num_prune=2", "plan.num_merge=1")), until="plan")
    engines = {v["engine"]: v["status"] for v in free["plans"]["dropped"]["portability"]}
    assert set(engines) == {"vllm", "sglang", "llama.cpp"} and engines["vllm"] == "ok"
    wanted = ("plan.num_prune=2", "plan.num_merge=1", "plan.portable_to=[sglang, llama.cpp]")
    bound = run(load_recipe(path, wanted), until="plan")
    for name in ("dropped", "merged"):
        assert {v["status"] for v in bound["plans"][name]["portability"]} == {"ok"}
    kept = [a["layer"] for a in bound["plans"]["dropped"]["actions"] if a["action"] == "keep"]
    assert [layer % 2 for layer in kept] == [0, 1, 0, 1]  # sliding and full attention in turns
    assert not [warning for warning in bound["warnings"] if "served by" in warning]
    with pytest.raises(PlanError, match="so that all others fit"):
        run(load_recipe(path, ("plan.num_prune=4", "plan.protect=[0, 2]", *wanted[1:])), until="plan")


def test_a_method_that_plans_by_itself_plans_again_for_other_engines(tmp_path):
    laco = {"merge_layers": 2, "interval": 1}
    path = other_family(tmp_path, "gemma2", variants=["laco"], methods={"laco": laco})
    for engines in ([], ["sglang", "llama.cpp"], []):
        recipe = load_recipe(path, ("plan.num_prune=2", f"plan.portable_to={engines}"))
        stages = {s["name"]: s["state"] for s in run(recipe, until="plan")["stages"]}
        assert stages["plan laco"] == "done"


def test_experts_are_dropped_and_never_merged(tmp_path):
    path = other_family(tmp_path, "mixtral", variants=["dropped"])
    with pytest.raises(PlanError, match="can only be dropped"):
        run(load_recipe(path, ("variants=[merged]",)))
    record = run(load_recipe(path, ("plan.num_prune=2",)), until="prune")
    row = record["variants"]["dropped"]
    assert row["error"] is None and row["pruning"]["verified"]["passed"]
    job = Job(load_recipe(path, ("plan.num_prune=2", "plan.repair=auto")))
    assert job.recipe.plan.repair == "none"
    assert any("not repaired: its layers hold experts" in text for text in job.warnings)
