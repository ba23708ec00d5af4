"""Two processes do what one does: the same scores, losses, weights and answers for the same global batch."""

import json
from pathlib import Path

import pytest
import torch
from builders import make_llama, make_project, make_samples, make_tokenizer
from processes import together
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.common.errors import ConfigError, DataError
from gradpruner.common.progress import set_mode
from gradpruner.common.world import World, this_world
from gradpruner.data.encoding import Collator
from gradpruner.gradients.scores import LayerScores, score_layers
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning.repair.refitting import fit_repair
from gradpruner.pruning.verification import verify_checkpoint
from gradpruner.runs.job.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.training.finetuning import finetune
from gradpruner.training.options import DistillationOptions
from gradpruner.training.recording import record_gradients
from gradpruner.training.sharding import check_sharding

pytestmark = pytest.mark.slow

FSDP_ON_CPU = """
# accelerate turns FSDP on for GPUs only; it is told that there are some. Tensors stay on the CPU.
from accelerate import PartialState
from accelerate.utils import DistributedType

begin = PartialState.__init__


def pretend(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = pretend
for module in (early_checks, sharding, finetuning):
    module.check_sharding = lambda *_: None
"""

SCRIPT = f"""
import json, sys
import torch
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
from gradpruner.cli.main import main
from gradpruner.runs.job import early_checks
from gradpruner.training import finetuning, sharding
from gradpruner.common.world import this_world
import test_together

world = this_world()
found = {{"record": test_together.recorded(2), "ddp": test_together.tuned(4)}}
found["lora"] = test_together.tuned(4, "lora")
found["teacher"] = test_together.taught(4)
found["repair"] = test_together.repaired()
{FSDP_ON_CPU}
found["fsdp record"] = test_together.recorded(2, fsdp=True)
for mode in ("full", "lora"):
    found["fsdp " + mode] = test_together.tuned(4, mode, fsdp=True)
found["fsdp teacher"] = test_together.taught(4, fsdp=True)
found["fsdp resumed"] = test_together.resumed(4, sys.argv[1], fsdp=True)
print(json.dumps(found), flush=True)
sys.argv[1:] = ["run", sys.argv[2], "--set", "finetune.fsdp=true"]
main()
"""


def recorded(batch_size, **options):
    """Scores, losses and gates of a recording of four samples a step."""
    set_mode("quiet")
    trace = record_gradients(
        make_llama(), make_samples(32), steps=4, batch_size=batch_size, dropout=0.0, device="cpu", **options
    )
    return {
        "scores": list(score_layers(trace).values),
        "losses": list(trace.info.losses),
        "gates": trace.gates.values_EL.tolist() if trace.gates else None,
    }


def tuned(batch_size, mode="full", **options):
    """Losses and weights of a fine-tuning with eight samples a step."""
    set_mode("quiet")
    model, result = finetune(
        make_llama(),
        make_samples(32),
        collator=Collator(make_tokenizer()),
        mode=mode,
        epochs=1,
        batch_size=batch_size,
        accumulation=1,
        learning_rate=1e-3,
        dropout=0.0,
        device="cpu",
        **options,
    )
    here = {name: weight for name, weight in model.state_dict().items() if weight.device.type != "meta"}
    return {
        "kind": type(model).__name__,
        "steps": result.steps,
        "from": result.resumed_from,
        "trained": result.trainable_parameters,
        "losses": [entry["loss"] for entry in result.losses],
        "ce": [entry.get("ce") for entry in result.losses],
        "weights": {name: weight.double().norm().item() for name, weight in here.items()},
    }


def taught(batch_size, **options):
    """The same with a teacher, of whom prompts are learned too."""
    weights = DistillationOptions(ce=0.5, answers=1.0, prompts=0.1)
    return tuned(batch_size, teacher=make_llama(seed=1), distillation=weights, **options)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise DataError("Enough.")


def resumed(batch_size, folder, **options):
    """What `tuned` finds, of a training that ended behind its third step and went on from the second."""
    with pytest.raises(DataError, match="Enough"):
        tuned(batch_size, checkpoints=folder, save_steps=2, callbacks=[Stop()], **options)
    return tuned(batch_size, checkpoints=folder, save_steps=2, **options)


def repaired():
    """Refitted weights and errors of a repair of every layer behind a cut, on three batches of samples."""
    model, plan = make_llama(), PruningPlan.from_keep(4, [0, 2, 3])
    samples, collator = make_samples(80), Collator(make_tokenizer())
    found = fit_repair(model, plan, samples, collator, kind="layer_wise", world=this_world())
    weights = {str(layer): weight.double().norm().item() for layer, weight in found.weights.items()}
    cuts = [[cut.layer, cut.ridge, cut.error_before, cut.error_after] for cut in found.cuts]
    return {"weights": weights, "cuts": cuts, "tokens": found.tokens}


def project(folder, size, name="", **recipe):
    """A recipe for so many processes, with the same rows in every step whatever their number."""
    return make_project(
        folder / (name or str(size)),
        record={"steps": 4, "batch_size": 4 // size, "dropout": 0.0},
        finetune={"batch_size": 4 // size, "accumulation": 1, "epochs": 1, "save_steps": 2},
        plan={"repair": "linear"},
        evaluate={"batch_size": 5},
        **recipe,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def pair(folder):
    """What two processes find; they also leave a run, sharded, in `folder`/fsdp."""
    sharded, _ = project(folder, 2, "fsdp", variants=["dense", "merged"])
    said = together(SCRIPT, folder / "checkpoints", sharded)
    return [json.loads(output.splitlines()[0]) for output in said]


@pytest.fixture(scope="module")
def alone():
    tunings = {"full": tuned(8), "lora": tuned(8, "lora"), "teacher": taught(8)}
    return tunings | {"record": recorded(4), "repair": repaired()}


@pytest.mark.parametrize("how", ["record", "fsdp record"])
def test_recording_scores_layers_like_one_process(pair, alone, how):
    for found in pair:
        torch.testing.assert_close(found[how]["scores"], alone["record"]["scores"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[how]["losses"], alone["record"]["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[how]["gates"], alone["record"]["gates"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how, mode",
    [
        ("ddp", "full"),
        ("lora", "lora"),
        ("teacher", "teacher"),
        ("fsdp full", "full"),
        ("fsdp lora", "lora"),
        ("fsdp teacher", "teacher"),
        ("fsdp resumed", "full"),
    ],
)
def test_fine_tuning_learns_like_one_process(pair, alone, how, mode):
    first, second = pair[0][how], pair[1][how]
    for found in (first, second):
        torch.testing.assert_close(found["losses"], alone[mode]["losses"], rtol=1e-4, atol=0)
        if mode == "teacher":
            torch.testing.assert_close(found["ce"], alone[mode]["ce"], rtol=1e-4, atol=0)
        for fact in ("kind", "steps", "trained"):
            assert found[fact] == alone[mode][fact], fact
    assert first["from"] == (2 if "resumed" in how else 0)
    torch.testing.assert_close(first["weights"], alone[mode]["weights"], rtol=1e-5, atol=0)
    # Sharded, the second process holds nothing at the end; otherwise the same.
    assert second["weights"] == ({} if "fsdp" in how else first["weights"])


def test_a_repair_is_fitted_as_by_one_process(pair, alone):
    for found in pair:
        assert found["repair"]["tokens"] == alone["repair"]["tokens"]
        assert len(found["repair"]["weights"]) == 3
        for part in ("weights", "cuts"):
            torch.testing.assert_close(found["repair"][part], alone["repair"][part], rtol=1e-6, atol=0)


def test_sharding_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"finetune.fsdp needs several processes"):
        tuned(4, fsdp=True)
    with pytest.raises(ConfigError, match="both given"):
        tuned(4, fsdp=True, deepspeed="zero.json")


COMMAND = """
import sys
from gradpruner.cli.main import main
from gradpruner.training.trainer import CausalTrainer
from gradpruner.common.world import this_world

whole = CausalTrainer.compute_loss


def spoilt(self, *args, **kwargs):
    loss = whole(self, *args, **kwargs)
    tunes = self.args.save_strategy != "no"
    return loss * float("nan") if tunes and self.state.global_step == 3 and this_world().rank == 1 else loss


if sys.argv[1] == "NaN":
    CausalTrainer.compute_loss = spoilt
for command in sys.argv[2:]:
    sys.argv[1:] = command.split()
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def shrinking(folder, size):
    """The command that shrinks the model of a project, repaired layer by layer."""
    rows = f"--data {folder / 'train.jsonl'} --eval-data {folder / 'eval.jsonl'} --num-prune 2"
    keys = {"record.steps": 4, "record.dropout": 0, "record.batch_size": 4 // size, "evaluate.batch_size": 5}
    settings = " ".join(f"--set {key}={value}" for key, value in keys.items())
    return f"shrink {folder / 'model'} {rows} {settings} --out {folder / 'shrunk'}"


@pytest.fixture(scope="module")
def runs(folder):
    """The same job by one process and by two, with the same number of rows in every step.

    Two processes run it with NaN on one, then from there on, and at last on data that is not there.
    """
    alone, both = (project(folder, size) for size in (1, 2))
    run(load_recipe(alone[0]))
    CliRunner().invoke(app, shrinking(alone[0].parent, 1).split(), catch_exceptions=False)
    out = Path(both[1]["out"])
    failed = together(COMMAND, "NaN", f"run {both[0]}", expect=5)
    rows = f"--eval-data {both[0].parent / 'eval.jsonl'} --set evaluate.batch_size=5"
    measure = f"evaluate {out / 'variants/merged/model'} {rows} --out {out.parent / 'measured'}"
    bad, _ = make_project(folder / "bad", data={"train": "./nowhere.jsonl"})
    commands = f"run {both[0]}", measure, shrinking(both[0].parent, 2), f"run {bad}"
    said = together(COMMAND, "well", *commands, expect=3)
    return Path(alone[1]["out"]), out, failed, said


def alike(one, two, row, model):
    """Whether a row of two run directories has the same answers, and nearly the same weights."""
    answers, weights = [], []
    for out in (one, two):
        lines = (out / f"variants/{row}/examples.jsonl").read_text().splitlines()
        answers.append([json.loads(line)["generated"] for line in lines])
        weights.append(load_file(out / f"variants/{row}/{model}/model.safetensors"))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    return answers[0] == answers[1] and len(answers[0]) == 12


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_run_by_two_processes_is_a_run_by_one(runs, pair, folder, how):
    one, two = runs[0], runs[1] if how == "ddp" else folder / "fsdp/run"
    scores = [LayerScores.load(out / "scores" / "gradpruner.json").values for out in (one, two)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=0)
    plans = [PruningPlan.load(out / "plans" / "merged.json") for out in (one, two)]
    assert plans[0].pruned == plans[1].pruned
    assert all(alike(one, two, row, "model") for row in ("dense", "merged"))
    assert verify_checkpoint(two / "variants/merged/pruned").passed


def test_other_commands_of_two_processes_do_what_one_does(runs):
    one, two, _, said = runs
    assert said[0].count("report done") == 2 and "done" not in said[1]
    measured = two.parent / "measured"
    assert (measured / "examples.jsonl").read_text() == (two / "variants/merged/examples.jsonl").read_text()
    assert not [*two.parent.rglob("*.part*")]
    assert alike(one, two, "dropped", "model")
    assert alike(one.parent / "shrunk", two.parent / "shrunk", "either", "pruned")


def test_nan_in_one_process_ends_both_with_one_message_and_the_run_resumes(runs):
    _, two, (first, second), _ = runs
    assert first.count("error:") == 1 and "is NaN or Inf; training stopped" in first.split("error:")[1]
    assert "error:" not in second and "Traceback" not in first + second
    rows = json.loads((two / "run.json").read_text())["variants"].values()
    assert {row["finetune"]["resumed_from"] for row in rows} == {2}


def test_bad_input_is_reported_once_and_ends_all_processes(runs):
    first, second = runs[3]
    assert first.count("error:") == 1 and "nowhere.jsonl" in first.split("error:")[1]
    assert "error:" not in second and "Traceback" not in first + second


def test_options_that_need_one_process_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    path, _ = make_project(tmp_path, variants=["dense", "apt"])
    for module in ("runs.job.inputs", "runs.job.early_checks", "training.sharding"):
        monkeypatch.setattr(f"gradpruner.{module}.this_world", lambda: World(0, 7))
    with pytest.raises(ConfigError, match="apt trains by itself, in one process; this job has 7"):
        Job(load_recipe(path))
    path, _ = make_project(tmp_path)
    with pytest.raises(ConfigError, match=r"7 processes with record.batch_size 4 read 28 .*24.* to 3 or"):
        Job(load_recipe(path))
    with pytest.raises(ConfigError, match="there is no file"):
        check_sharding(False, "zero.json", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate's FSDP needs GPUs"):
        check_sharding(False, None, "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(ConfigError, match="accelerate was told to use DeepSpeed"):
        check_sharding(False, None, "cpu")
