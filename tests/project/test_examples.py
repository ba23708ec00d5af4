"""The examples: what needs no other tool is run; of the rest, what can be checked without it."""

import ast
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import VOCABULARY, make_llama, make_rows, make_tokenizer, write_rows

import gradpruner
from gradpruner.demo import MODEL_DIR
from gradpruner.plans.layer_plan import PruningPlan

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.rglob("*.py"))
NOTEBOOK = EXAMPLES / "shrink.ipynb"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as the examples expect it: a model and train.jsonl."""
    make_llama(vocab_size=len(VOCABULARY)).save_pretrained(tmp_path / "my-model")
    make_tokenizer().save_pretrained(tmp_path / "my-model")
    write_rows(tmp_path / "train.jsonl", make_rows(8))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run_script(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def code_of(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_scripts_import_what_gradpruner_has(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "gradpruner":
            assert node.module == "gradpruner" and {name.name for name in node.names} <= set(
                gradpruner.__all__
            )


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_are_shell(path):
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_axolotl_records_with_the_config_it_tunes_with():
    tune = yaml.safe_load((EXAMPLES / "axolotl" / "tune.yaml").read_text(encoding="utf-8"))
    record = yaml.safe_load((EXAMPLES / "axolotl" / "record.yaml").read_text(encoding="utf-8"))
    (plugin,) = record.pop("plugins")
    module, _, name = plugin.rpartition(".")
    tree = ast.parse((EXAMPLES / "axolotl" / f"{module}.py").read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert record.pop("base_model") != tune.pop("base_model")
    assert record == tune


def test_the_llamafactory_data_set_is_described():
    tune = yaml.safe_load((EXAMPLES / "llamafactory" / "tune.yaml").read_text(encoding="utf-8"))
    known = json.loads((EXAMPLES / "llamafactory" / "dataset_info.json").read_text(encoding="utf-8"))
    assert known[tune["dataset"]]["file_name"] == "train.jsonl"


def test_trl_records_tunes_and_the_trace_prunes(place, monkeypatch):
    pytest.importorskip("trl")
    run_script(
        monkeypatch,
        "trl/sft.py",
        "my-model",
        "train.jsonl",
        "tuned",
        "--record",
        "trace",
        "--max-steps",
        "40",
    )
    run_script(monkeypatch, "plan_trace.py", "trace", "plan.json", "--num-prune", "2")
    plan = PruningPlan.load("plan.json")
    assert len(plan.pruned) == 2 and plan.merged
    gradpruner.prune_checkpoint("my-model", "pruned", plan, gradpruner.GradientTrace.load("trace"))
    run_script(monkeypatch, "trl/sft.py", "pruned", "train.jsonl", "again", "--max-steps", "1")
    assert gradpruner.load_model("again").config.num_hidden_layers == plan.num_layers - 2


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Cells in order, as a reader would run them."""
    script = tmp_path / "notebook.py"
    script.write_text("\n\n".join(code_of(NOTEBOOK)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))
    dense, pruned = (gradpruner.load_model(folder).config for folder in (MODEL_DIR, tmp_path / "pruned"))
    assert pruned.num_hidden_layers == dense.num_hidden_layers - 4
