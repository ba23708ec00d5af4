import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gradpruner.common.errors import ConfigError
from gradpruner.runs.recipe import effects
from gradpruner.runs.recipe.recipe import (
    Recipe,
    check_recipe,
    key_names,
    load_recipe,
    recipe_schema,
    recipe_yaml,
)

GOOD = {"model": {"path": "m"}, "data": {"train": "a.jsonl", "eval": "b.jsonl"}}
FOLDER = Path(__file__).parents[2] / "gradpruner" / "recipes"
# What is in ablations/ are studies of recipes; see tests/runs/test_ablations.py.
RECIPES = sorted(path for path in FOLDER.rglob("*.yaml") if path.parent != FOLDER / "ablations")


def faults(values):
    with pytest.raises(ConfigError) as caught:
        check_recipe({**GOOD, **values}, "r.yaml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_are_the_papers():
    recipe = check_recipe({**GOOD, "effort": "paper"})
    assert recipe.record.model_dump() | {"steps": None} == recipe.record.model_dump()
    assert (recipe.record.rank, recipe.record.alpha, recipe.record.dropout) == (8, 32, 0.05)
    assert (recipe.record.learning_rate, recipe.record.clip) == (1e-4, 1.0)
    tune = recipe.finetune
    assert (tune.batch_size * tune.accumulation, tune.epochs) == (64, 3)  # the rate: test_rates.py
    assert (tune.weight_decay, tune.warmup_ratio, recipe.data.max_length) == (0.1, 0.03, 2048)
    assert (recipe.plan.density, recipe.plan.num_merge, recipe.plan.rule) == (0.2, 3, "sum")
    assert (recipe.variants, recipe.plan.repair) == (["dense", "merged", "dropped"], "none")
    assert check_recipe({**GOOD, "effort": None}).variants == recipe.variants


def test_by_default_the_dense_model_is_tuned_pruned_repaired_and_teaches():
    recipe = check_recipe(GOOD)
    assert (recipe.effort, recipe.variants, recipe.plan.repair) == ("best", ["dense", "either"], "auto")
    assert recipe.start == "tuned" and recipe.distils and recipe.recover.epochs == 1
    assert check_recipe(recipe.model_dump(mode="json")) == recipe
    own = check_recipe({**GOOD, "variants": ["dense", "last"], "plan": {"repair": "none"}})
    assert (own.effort, own.start, own.variants, own.plan.repair) == (
        "fast",
        "base",
        ["dense", "last"],
        "none",
    )
    assert check_recipe({**GOOD, "finetune": {"mode": "lora", "merge_adapter": False}}).effort == "fast"
    fast = check_recipe({**GOOD, "effort": "fast"})
    assert (fast.start, fast.variants, fast.plan.repair) == ("base", ["dense", "last"], "auto")
    given = check_recipe({**GOOD, "start": "given"})
    assert not given.recover.trains and not given.distils


def test_all_faults_are_told_at_once():
    text = faults(
        {
            "model": {"path": ""},
            "plan": {"num_prun": 3, "density": 1.5},
            "record": {"steps": 1},
            "finetune": {"mode": "fast"},
            "modle": {},
        }
    )
    assert "r.yaml has 6 faults" in text
    for part in (
        "plan.num_prun: unknown key. Did you mean 'plan.num_prune'?",
        "plan.density: Input should be less than or equal to 1 (given: 1.5)",
        "record.steps: Input should be greater than or equal to 3 (given: 1)",
        "finetune.mode: Input should be 'full', 'lora' or 'qlora' (given: 'fast')",
        "modle: unknown key. Did you mean 'model'?",
        "model.path:",
        "gradpruner schema",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (
            {"prune": {"drop_layer": [1]}},
            "prune: unknown section. prune.drop_layer: did you mean 'plan.layers'?",
        ),
        ({"pruning_x": {"drop_layer": [1]}}, "pruning_x.drop_layer: did you mean 'plan.layers'?"),
        ({"plan": {"drop_layers": [1]}}, "plan.drop_layers: unknown key. Did you mean 'plan.layers'?"),
        ({"record": {"density": 0.2}}, "record.density: unknown key. Did you mean 'plan.density'?"),
        ({"learning_rate": 1e-4}, "learning_rate: unknown key. Did you mean 'finetune.learning_rate'?"),
        ({"finetune": {"lr": 1e-4}}, "finetune.lr: unknown key. Did you mean 'finetune.learning_rate'?"),
        ({"record": {"lr": 1e-4}}, "record.lr: unknown key. Did you mean 'record.learning_rate'?"),
        ({"epochs": 2}, "epochs: unknown key. Did you mean 'finetune.epochs'?"),
        ({"batch": 2}, "batch: unknown key. Did you mean 'finetune.batch_size'?"),
        ({"finetune": {"max_length": 9}}, "Did you mean 'data.max_length'?"),
        ({"finetune": {"seed": 9}}, "finetune.seed: unknown key. Did you mean 'seed'?"),
        ({"training": {"num_train_epochs": 1}}, "training.num_train_epochs: did you mean 'finetune.epochs'?"),
        ({"plan": {"num_prnue": 1}}, "plan.num_prnue: unknown key. Did you mean 'plan.num_prune'?"),
        ({"plan": {"num_prune": 3, "layers": [1]}}, "num_prune and layers are both budgets; give one"),
        ({"plan": {"layers": [1, 1]}}, "lists a layer more than once"),
        ({"plan": {"layers": [-1]}}, "plan.layers.0:"),
        ({"plan": {"density": 0}}, "plan.density:"),
        ({"plan": {"density": float("nan")}}, "plan.density: Input should be a finite number"),
        ({"variants": ["dense", "dense"]}, "lists a row more than once"),
        ({"variants": []}, "variants:"),
        ({"evaluate": {"metrics": []}}, "evaluate.metrics:"),
        ({"finetune": {"schedule": "linaer"}}, "finetune.schedule:"),
        ({"data": {"eval": "a"}}, "give data.train, or data.task"),
        ({"data": {"task": "trec", "train": "a"}}, "exclude each other"),
        ({"data": None}, "data: Input should be a valid dictionary"),
        ({"seed": -1}, "seed:"),
    ],
)
def test_a_fault_is_named_with_what_is_allowed(values, part):
    assert part in faults(values)


def test_missing_sections_are_named():
    with pytest.raises(ConfigError, match=r"model: missing; give model\.path.*\n.*data: missing; give"):
        check_recipe({})


def test_file_then_values_then_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "model: {path: ./m}\ndata: {train: ../a.jsonl#5, eval: b.jsonl}\nfinetune:\n  learning_rate: 1e-4\n"
    )
    recipe = load_recipe(
        path, ("plan.num_prune=3", "seed = 7", "finetune.epochs=2", "plan.layers=null"), {"out": "x"}
    )
    assert recipe.model.path == str(tmp_path / "m")
    assert recipe.data.train == str(tmp_path.parent / "a.jsonl#5") and recipe.data.eval == "b.jsonl"
    assert recipe.finetune.learning_rate == 1e-4 and recipe.finetune.epochs == 2
    assert (recipe.plan.num_prune, recipe.out) == (3, "x")


def test_typed_paths_are_relative_to_where_they_were_typed(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    path = tmp_path / "recipes" / "r.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, ("data.eval=./e.jsonl",), {"model.path": "./m"})
    assert recipe.model.path == str(tmp_path / "m") and recipe.data.eval == str(tmp_path / "e.jsonl")
    # Stored in a run directory it means the same.
    stored = tmp_path / "run" / "recipe.yaml"
    stored.parent.mkdir()
    stored.write_text(recipe_yaml(recipe))
    assert load_recipe(stored) == recipe


def test_the_stored_recipe_is_the_recipe(tmp_path):
    recipe = check_recipe({**GOOD, "title": "ä: #1", "finetune": {"report_to": ["wandb"]}})
    (tmp_path / "r.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"model: {path: m\ndata: x", "line 2, column"),
        (b"- a\n- b\n", "a mapping of sections is needed, not list"),
        (b"\xff\xfe", "r.yaml"),
        (b"seed: 1\nmodel: {path: m}\nseed: 2\n", "line 3, column 1: not valid YAML: 'seed' is given twice"),
        (b"", "not NoneType"),
    ],
)
def test_unreadable_recipes_name_file_and_line(tmp_path, content, part):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert part in str(caught.value) and "r.yaml" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("plan.num_prune", "not of the form section.key=value"),
        ("=3", "not of the form"),
        ("plan.layers=[1,", "not valid YAML"),
        ("seed.x=1", "'seed' is a value, not a section"),
        ("plan.num_prune=three", "plan.num_prune: Input should be a valid integer"),
    ],
)
def test_bad_overrides(override, part):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, ("seed=1", override), {"model.path": "m", "data.task": "trec"})
    assert part in str(caught.value)


def test_no_such_recipe():
    with pytest.raises(ConfigError, match="ls recipes"):
        load_recipe("nowhere.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_that_come_along_are_valid_and_say_what_they_are(path):
    recipe = load_recipe(path)
    assert recipe.title
    assert path.read_text(encoding="utf-8").startswith("# ")


def nested(schema, found):
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        nested(value, found)
    if isinstance(schema, dict) and "$ref" in schema:
        found.append(schema["$ref"])
    return found


def test_the_schema_is_json_schema_and_documents_every_key():
    schema = json.loads(json.dumps(recipe_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["type"] == "object" and schema["additionalProperties"] is False
    assert set(schema["required"]) == {"model", "data"}
    for reference in nested(schema, []):
        assert reference.removeprefix("#/$defs/") in schema["$defs"]
    for section in (schema, *schema["$defs"].values()):
        assert section["type"] == "object" and section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert field.get("description") or "$ref" in field, name
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(schema)
    validator(schema).validate(json.loads(Recipe.model_validate(GOOD).model_dump_json()))


def test_every_key_has_an_effect_and_fingerprints_leave_out_what_they_always_did():
    known = set(key_names(Recipe))
    assert known >= {*effects._EFFECTS, *effects.SETTLED}
    assert all(map(effects.effect_of, known)) and effects.effect_of("unknown") is None
    # With other keys, the stages of runs that are there already would be done again.
    assert effects.keys_of("finetune", "execution") == {"report_to", "save_steps", "fsdp", "deepspeed"}
    repair = {"repair", "repair_rows", "repair_answers", "max_loss", "confidence"}
    assert effects.keys_of("plan", "choice", "depth", "repair") == {"name", *repair}


def test_reading_a_recipe_imports_no_torch():
    code = "import sys, gradpruner.runs.recipe.recipe, gradpruner.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
