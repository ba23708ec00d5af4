"""Two processes do what one does: the same scores, losses, weights and answers for the same global batch."""

import json
from pathlib import Path

import pytest
import torch
from builders import make_llama, make_project, make_samples, make_tokenizer
from safetensors.torch import load_file
from together import together

from gradpruner.data.encoding import Collator
from gradpruner.errors import ConfigError
from gradpruner.gradients.scores import LayerScores, score_layers
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.progress import set_mode
from gradpruner.pruning.verification import verify_checkpoint
from gradpruner.runs.job import Job
from gradpruner.runs.pipeline import run
from gradpruner.runs.recipe import load_recipe
from gradpruner.training.finetuning import finetune
from gradpruner.training.recording import record_gradients
from gradpruner.world import World

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
sharding.check_sharding = finetuning.check_sharding = lambda *_: None
"""

SCRIPT = f"""
import json, sys
import torch
sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
from gradpruner.training import finetuning, sharding
from gradpruner.world import this_world
import test_together

world = this_world()
found = {{"record": test_together.recorded(2), "ddp": test_together.tuned(4)}}
found["lora"] = test_together.tuned(4, "lora")
{FSDP_ON_CPU}
found["fsdp record"] = test_together.recorded(2, fsdp=True)
for mode in ("full", "lora"):
    found["fsdp " + mode] = test_together.tuned(4, mode, fsdp=True)
print(json.dumps(found))
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
        "trained": result.trainable_parameters,
        "losses": [entry["loss"] for entry in result.losses],
        "weights": {name: weight.double().norm().item() for name, weight in here.items()},
    }


@pytest.fixture(scope="module")
def pair():
    return [json.loads(output) for output in together(SCRIPT, timeout=240)]


@pytest.fixture(scope="module")
def alone():
    return {"record": recorded(4), "full": tuned(8), "lora": tuned(8, "lora")}


@pytest.mark.parametrize("how", ["record", "fsdp record"])
def test_recording_scores_layers_like_one_process(pair, alone, how):
    for found in pair:
        torch.testing.assert_close(found[how]["scores"], alone["record"]["scores"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[how]["losses"], alone["record"]["losses"], rtol=1e-5, atol=0)
        torch.testing.assert_close(found[how]["gates"], alone["record"]["gates"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how, mode", [("ddp", "full"), ("lora", "lora"), ("fsdp full", "full"), ("fsdp lora", "lora")]
)
def test_fine_tuning_learns_like_one_process(pair, alone, how, mode):
    first, second = pair[0][how], pair[1][how]
    for found in (first, second):
        torch.testing.assert_close(found["losses"], alone[mode]["losses"], rtol=1e-4, atol=0)
        for fact in ("kind", "steps", "trained"):
            assert found[fact] == alone[mode][fact], fact
    torch.testing.assert_close(first["weights"], alone[mode]["weights"], rtol=1e-5, atol=0)
    # Sharded, the second process holds nothing at the end; otherwise the same.
    assert second["weights"] == ({} if "fsdp" in how else first["weights"])


def test_sharding_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match=r"finetune.fsdp needs several processes"):
        tuned(4, fsdp=True)
    with pytest.raises(ConfigError, match="both given"):
        tuned(4, fsdp=True, deepspeed="zero.json")


COMMAND = """
import sys
from gradpruner.cli.main import main
sys.argv[1:] = ["run", sys.argv[1]]
main()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same job by one process and by two, with the same number of rows in every step."""
    folder = tmp_path_factory.mktemp("runs")
    alone, both = (
        make_project(
            folder / str(size),
            record={"steps": 4, "batch_size": 4 // size, "dropout": 0.0},
            finetune={"batch_size": 4 // size, "accumulation": 1, "epochs": 1},
            evaluate={"batch_size": 5},
        )
        for size in (1, 2)
    )
    run(load_recipe(alone[0]))
    said = together(COMMAND, both[0], timeout=240)
    return Path(alone[1]["out"]), Path(both[1]["out"]), said


def test_a_run_by_two_processes_is_a_run_by_one(runs):
    one, two, said = runs
    assert "report done" in said[0] and said[1] == ""
    scores = [LayerScores.load(out / "scores" / "gradpruner.json").values for out in (one, two)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=0)
    plans = [PruningPlan.load(out / "plans" / "merged.json") for out in (one, two)]
    assert plans[0].pruned == plans[1].pruned
    for row in ("dense", "merged", "dropped"):
        answers = [
            [json.loads(line)["generated"] for line in (out / f"variants/{row}/examples.jsonl").open()]
            for out in (one, two)
        ]
        assert answers[0] == answers[1] and len(answers[0]) == 12
        weights = [load_file(out / f"variants/{row}/model/model.safetensors") for out in (one, two)]
        torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)
    assert not list(two.rglob("*.part*"))
    assert verify_checkpoint(two / "variants/merged/pruned").passed


def test_bad_input_is_said_once_and_ends_all(tmp_path):
    path, _ = make_project(tmp_path, data={"train": "./nowhere.jsonl"})
    said = together(COMMAND, path, expect=3)
    assert said[1] == ""


def test_methods_that_train_by_themselves_are_refused(tmp_path, monkeypatch):
    path, _ = make_project(tmp_path, variants=["dense", "apt"])
    monkeypatch.setattr("gradpruner.runs.job.this_world", lambda: World(0, 2))
    with pytest.raises(ConfigError, match="apt trains by itself, in one process; this job has 2"):
        Job(load_recipe(path))
