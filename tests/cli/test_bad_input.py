"""Bad inputs through the command line: exit code, a message with the cause and the fix, nothing left."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from builders import make_llama, make_project, make_rows, write_rows
from safetensors.torch import load_file, save_file

from gradpruner.cli import main as cli
from gradpruner.common.errors import IntegrityError, PlanError
from gradpruner.common.progress import set_mode
from gradpruner.gradients.scores import score_layers
from gradpruner.gradients.trace import GradientTrace
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.training import finetuning as training
from gradpruner.training import recording
from gradpruner.training.recording import record_gradients

USAGE, DATA, MODEL, RESOURCE, INTEGRITY = 2, 3, 4, 5, 6


@pytest.fixture(autouse=True)
def no_signals(monkeypatch):
    monkeypatch.setattr(cli.signal, "signal", lambda *a: None)


@pytest.fixture
def project(tmp_path):
    return make_project(tmp_path, variants=["merged"])[0]


@pytest.fixture
def show(call):
    """Calls the command line, which must succeed; returns standard output."""

    def run(*arguments):
        code, out, _ = call(*arguments)
        assert not code
        return out

    return run


@pytest.fixture
def refuse(call):
    """Calls the command line, which must refuse: `refuse(code, parts, *arguments)`."""

    def run(code, parts, *arguments):
        found, out, err = call(*arguments)
        assert found == code, err
        for part in parts:
            assert part in err
        assert out == "" and "Traceback" not in err
        return err

    return run


def nothing_left(path):
    return not (path.parent / "run").exists()


RECIPE_FAULTS = {
    "1 unknown key": ("plan.drop_layer=[1]", ["plan.drop_layer: unknown key. Did you mean 'plan.layers'?"]),
    "1 unknown section": (
        "prune.drop_layer=[1]",
        ["--set prune.drop_layer: unknown section. prune.drop_layer: did you mean 'plan.layers'?"],
    ),
    "2 too many": ("plan.num_prune=4", ["Pruning 4 of 4 layers is not possible; 0 to 2 are"]),
    "2 leaves one": ("plan.num_prune=3", ["at least 2 layers must stay"]),
    "3 listed and protected": (
        "plan={layers: [0], protect_first: 1}",
        ["both listed for pruning and protected"],
    ),
    "3 listed twice": ("plan={layers: [2, 2]}", ["lists a layer more than once"]),
    "4 density 0": ("plan.density=0", ["plan.density: Input should be greater than 0 (given: 0)"]),
    "4 density 1.5": ("plan.density=1.5", ["less than or equal to 1 (given: 1.5)"]),
    "4 density nan": ("plan.density=.nan", ["plan.density: Input should be a finite number"]),
    "5 one step": ("record.steps=1", ["record.steps: Input should be greater than or equal to 3"]),
    "5 warm-up only": ("record.steps=2", ["record.steps: Input should be greater than or equal to 3"]),
}


@pytest.mark.parametrize(("override", "parts"), RECIPE_FAULTS.values(), ids=RECIPE_FAULTS.keys())
def test_recipe(project, refuse, override, parts):
    refuse(USAGE, parts, "run", project, "--set", override)
    assert nothing_left(project)


ROW = '{"prompt": "the cat is red :", "completion": " red"}\n'
DATA_FAULTS = {
    "7 empty file": (b"", ["train.jsonl"]),
    "8 malformed line": ((ROW * 2 + '{"prompt": "x", \n').encode(), ["train.jsonl:3"]),
    "9 not UTF-8": (ROW.encode() + b'{"prompt": "\xe9", "completion": "x"}\n', ["train.jsonl", "byte"]),
    "10 unknown columns": (b'{"colour": "red", "size": 1}\n', ["colour", "size", "prompt", "messages"]),
    "11 null completion": (
        (ROW + '{"prompt": "a", "completion": null}\n{"prompt": "b", "completion": ""}\n').encode(),
        ["2", "train.jsonl:2", "--skip-bad"],
    ),
    "13 ends with the user": (
        b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}\n',
        ["train.jsonl:1", "user"],
    ),
    "13 unknown role": (b'{"messages": [{"role": "robot", "content": "a"}]}\n', ["train.jsonl:1", "robot"]),
}


@pytest.mark.parametrize(("content", "parts"), DATA_FAULTS.values(), ids=DATA_FAULTS.keys())
def test_data(project, refuse, content, parts):
    (project.parent / "train.jsonl").write_bytes(content)
    refuse(DATA, parts, "run", project)
    assert nothing_left(project)


def test_06_data_that_are_not_there(project, refuse):
    refuse(DATA, ["gone.jsonl"], "run", project, "--data", project.parent / "gone.jsonl")
    refuse(DATA, ["some/dataset"], "run", project, "--data", "some/dataset")
    assert nothing_left(project)


def test_12_nothing_left_to_learn(project, refuse):
    rows = [{"prompt": "red " * 20, "completion": " red" * 20}] * 2
    write_rows(project.parent / "train.jsonl", rows)
    parts = ["0 learned tokens in 2 of 2 samples", "train.jsonl:1", "Raise data.max_length"]
    refuse(DATA, parts, "run", project, "--set", "data.max_length=16")
    # The tokenizer knows no chat: conversations cannot be encoded either.
    message = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    write_rows(project.parent / "train.jsonl", [{"messages": message}])
    refuse(DATA, ["no chat template"], "run", project)
    assert nothing_left(project)


def test_14_and_15_few_samples_and_overlap_are_warnings(project, show):
    shutil.copy(project.parent / "train.jsonl", project.parent / "eval.jsonl")
    out = " ".join(show("run", project, "--dry-run", "--set", "record.steps=20").split())
    assert "24 training samples for 20 recording steps of 4" in out
    assert "evaluation prompts also occur in the training data" in out


def test_16_22_24_models(project, refuse):
    model = project.parent / "model"
    config = (model / "config.json").read_text()
    for content, parts in (
        ("{", ["config.json is not valid JSON"]),
        (json.dumps({**json.loads(config), "model_type": "lama"}), ["knows no model type 'lama'", "'llama'"]),
        (
            json.dumps({**json.loads(config), "auto_map": {"a": "b"}, "model_type": "newllm"}),
            ["--trust-remote-code"],
        ),
    ):
        (model / "config.json").write_text(content)
        refuse(MODEL, parts, "run", project)
    (model / "config.json").unlink()
    refuse(MODEL, ["has no config.json"], "run", project)
    (model / "config.json").write_text(config)
    for suffix in ("bin", "pt", "gguf"):
        weights = next(model.glob("model.*"))
        weights.rename(model / f"model.{suffix}")
        refuse(MODEL, [f"model.{suffix}", "save_pretrained"], "run", project)
    refuse(MODEL, ["no model folder at"], "run", project, "--model", project.parent / "nowhere")
    assert nothing_left(project)


def test_26_outputs(project, refuse):
    model = project.parent / "model"
    before = {p: p.read_bytes() for p in model.iterdir()}
    mine = project.parent / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    refuse(USAGE, ["is the input", "another output folder"], "run", project, "--out", model)
    refuse(USAGE, ["lies inside it"], "run", project, "--out", model / "run")
    refuse(USAGE, ["not made by gradpruner", "another output folder"], "run", project, "--out", mine)
    refuse(USAGE, ["is a file"], "run", project, "--out", mine / "thesis.tex")
    assert {p: p.read_bytes() for p in model.iterdir()} == before
    assert [p.name for p in mine.iterdir()] == ["thesis.tex"]


def test_27_a_small_disk(project, refuse, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000, total=1000, used=0))
        refuse(RESOURCE, ["This run needs", "are free", "--out"], "run", project)
    assert nothing_left(project)


def test_27_a_disk_that_fills_up(project, refuse, monkeypatch):
    from gradpruner.common import files

    make_durable = files.make_durable

    def full(path):
        if "step-00003" in str(path):
            raise OSError(28, "No space left on device")
        make_durable(path)

    monkeypatch.setattr(files, "make_durable", full)
    refuse(RESOURCE, ["No space left on device", "free some space"], "record", project)
    run = project.parent / "run"
    assert json.loads((run / "manifest.json").read_text())["stages"]["record"]["state"] == "failed"
    assert not list(run.rglob("*.part")) and not (run / "run.json").exists()
    assert not (run / "trace" / "trace.json").exists()  # half a trace does not pass for one


def test_28_a_nan_while_recording(project, refuse, monkeypatch):
    class Broken(training.CausalTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(recording, "CausalTrainer", Broken)
    refuse(RESOURCE, ["at step 3 is NaN or Inf", "2 good steps are kept"], "record", project)
    assert GradientTrace.load(project.parent / "run" / "trace").num_steps == 2
    refuse(RESOURCE, ["at step 3"], "run", project)  # half a trace is not taken for a whole one


# -- traces and plans of something else ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    set_mode("quiet")
    folder = tmp_path_factory.mktemp("trace") / "trace"
    samples = [{"input_ids": [1, 5, 6, 7], "labels": [-100, -100, 6, 7]}] * 4
    return record_gradients(make_llama(), samples, steps=3, rank=2, folder=folder, device="cpu")


def test_a_trace_of_another_model(recorded):
    plan = plan_pruning(score_layers(recorded), num_prune=1, num_merge=1, protect_first=1)
    for other, part in (
        (make_llama(seed=1), "this is llama-4x16"),
        (make_llama(num_hidden_layers=5), "4 layers"),
    ):
        before = {name: w.clone() for name, w in other.state_dict().items()}
        with pytest.raises(PlanError, match=part):
            prune_(other, plan, recorded)
        assert all(torch.equal(w, before[name]) for name, w in other.state_dict().items())


def test_a_trace_of_another_rank(recorded, tmp_path):
    shutil.copytree(recorded.folder, tmp_path / "trace")
    described = json.loads((tmp_path / "trace" / "trace.json").read_text())
    for linear in described["linears"]:
        linear["rank"] = 4
    (tmp_path / "trace" / "trace.json").write_text(json.dumps(described))
    plan = plan_pruning(score_layers(recorded), num_prune=1, num_merge=1, protect_first=1)
    model = make_llama()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises((IntegrityError, PlanError)):
        prune_(model, plan, GradientTrace.load(tmp_path / "trace"))
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_plan_for_another_depth_or_with_a_fault(project, refuse, tmp_path):
    plan = PruningPlan.from_keep(6, [0, 1, 2]).to_dict()
    path = tmp_path / "plan.json"
    four = PruningPlan.from_keep(4, [0, 1, 2]).to_dict()
    merged = {**four, "actions": [*four["actions"][:3], {"layer": 3, "action": "merge", "into": 9}]}
    for content, parts in (
        (plan, ["a model of 6 layers; this one has 4"]),
        ({**four, "densty": 0.1}, ["plan.json: unknown field 'densty'. Did you mean 'density'?"]),
        (merged, ["Layer 3 is to be merged into layer 9", "Kept layers: 0, 1, 2"]),
    ):
        path.write_text(json.dumps(content))
        refuse(USAGE, parts, "run", project, "--plan", path)
    path.write_text('{"actions": [')
    refuse(INTEGRITY, ["plan.json is not a readable pruning plan", "line 1"], "run", project, "--plan", path)
    path.unlink()
    refuse(
        USAGE, ["There is no pruning plan at", "plan.json", "gradpruner plan"], "run", project, "--plan", path
    )
    assert nothing_left(project)


def test_skip_bad_drops_and_counts(project, show):
    write_rows(project.parent / "train.jsonl", [*make_rows(10), {"prompt": "a", "completion": None}])
    facts = json.loads(show("run", project, "--dry-run", "--json", "--skip-bad"))
    assert facts["train_rows"] == 10
    assert any("training data" in warning and "1" in warning for warning in facts["warnings"])


# -- damaged, unsafe and quantised model folders -------------------------------------------------------------


def _config(**fields):
    def spoil(model):
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def _index(name):
    """Weights named by an index, as sharded checkpoints have them; `name` is what it says of one file."""

    def spoil(model):
        tensors = load_file(model / "model.safetensors")
        places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
        (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
        places[next(iter(places))] = name
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return spoil


def _bytes(change):
    def spoil(model):
        path = model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _tensors(change):
    def spoil(model):
        path = model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return spoil


def _nan(tensors):
    tensors["model.norm.weight"][3] = float("nan")


NORM = "model.norm.weight"
MODEL_FAULTS = {
    "17 relative": (INTEGRITY, _index("../secret/x.safetensors"), ["../secret/x.safetensors"]),
    "17 absolute": (INTEGRITY, _index("/etc/x.safetensors"), ["/etc/x.safetensors"]),
    "18 no such shard": (INTEGRITY, _index("model-00002-of-00002.safetensors"), ["model-00002-of-00002"]),
    "18 truncated": (INTEGRITY, _bytes(lambda b: b[:-100]), ["model.safetensors", "cut off"]),
    "18 zero bytes": (INTEGRITY, _bytes(lambda b: b""), ["model.safetensors", "0 bytes"]),
    "19 header of 2^62": (INTEGRITY, _bytes(lambda b: (2**62).to_bytes(8, "little") + b[8:]), ["header"]),
    "19 deep JSON": (
        INTEGRITY,
        _bytes(lambda b: (200_000).to_bytes(8, "little") + b"[" * 200_000),
        ["header"],
    ),
    "20 missing": (INTEGRITY, _tensors(lambda t: t.pop(NORM)), ["missing", NORM, "download complete"]),
    "20 extra": (INTEGRITY, _tensors(lambda t: t.update(odd=torch.ones(2))), ["unexpected", "odd"]),
    "20 shape": (INTEGRITY, _tensors(lambda t: t.update({NORM: torch.ones(3)})), [NORM, "belong"]),
    "21 NaN": (INTEGRITY, _tensors(_nan), [NORM, "NaN"]),
    "23 quantised": (
        MODEL,
        _config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["gptq", "unquantised"],
    ),
    "25 foreign kernel": (
        INTEGRITY,
        _config(_attn_implementation_internal="a/b"),
        ["_attn_implementation_internal"],
    ),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_model_folders(project, refuse, fault):
    code, spoil, parts = MODEL_FAULTS[fault]
    model, place = project.parent / "model", project.parent
    spoil(model)
    before = sorted(place.iterdir())
    if code == INTEGRITY:  # layers of a quantised model may be dropped; it cannot be trained
        refuse(code, parts, "prune", model, place / "new", "--drop", "1", "--verify", "structure", "--json")
    if fault != "21 NaN":  # a dry run reads no weights
        refuse(code, parts, "run", project, "--dry-run")
    assert sorted(place.iterdir()) == before


def test_faults_of_options_are_told_as_options_and_not_as_faults_of_the_file(project, refuse):
    run = project.parent / "run"
    run.mkdir()
    shutil.copy(project, run / "recipe.yaml")
    parts = ["What is given besides", "2 faults", "--num-prune: Input", "--set foo.bar: unknown"]
    refuse(USAGE, parts, "run", "--out", run, "--num-prune", -5, "--set", "foo.bar=3")
    shrink = ("shrink", project.parent / "model", "--data", project.parent / "train.jsonl", "--out", run)
    refuse(USAGE, ["--recover: Input", "--repair: Input"], *shrink, "--recover", -5, "--repair", "lin")
    recipe = json.loads((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"plan": {"num_prune": -1}}))
    refuse(
        USAGE, [f"error: {run / 'recipe.yaml'} has 1 fault", "  - plan.num_prune: Input"], "run", "--out", run
    )


def test_advice_names_options_where_the_command_has_them(project, refuse, call):
    rows = [{"question": "a", "choices": ["x", "y"], "answer": 0, "subject": "s"}]
    write_rows(project.parent / "train.jsonl", rows * 20)
    model, data = project.parent / "model", project.parent / "train.jsonl"
    assert "data.task" not in refuse(DATA, ["give --task instead"], "shrink", model, "--data", data)
    write_rows(data, make_rows(40))
    _, out, _ = call("shrink", model, "--data", data, "--dry-run", "--num-prune", 2)
    assert "has not seen as --eval-data" in " ".join(out.split())


def test_a_mistyped_model_folder_is_told_as_one(project, refuse):
    gone = project.parent / "gone"
    refuse(MODEL, [f"There is no model folder at {gone}"], "verify", gone)
    refuse(MODEL, [f"There is no model folder at {gone}"], "evaluate", gone, "--task", "arc_easy")
