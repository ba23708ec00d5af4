"""`gradpruner cost`: dense and pruned side by side, in this process and as users run it."""

import json
from dataclasses import replace

import pytest
from conftest import COMMON, make_model
from stand_ins import FakeProcess
from transformers import LlamaConfig
from typer.testing import CliRunner

from gradpruner.cli.main import app
from gradpruner.common import progress
from gradpruner.common.errors import ConfigError, PlanError
from gradpruner.data.encoding import IGNORED
from gradpruner.evaluation.costing import turns as turns_module
from gradpruner.evaluation.costing import worker
from gradpruner.evaluation.costing.comparison import measure_cost
from gradpruner.evaluation.costing.figures import Figure, time_floors, with_unit
from gradpruner.evaluation.costing.subject import Subject, find_subject, shorten
from gradpruner.evaluation.costing.turns import worker_environment
from gradpruner.evaluation.costing.workload import RECORDING, Workload
from gradpruner.models.sizes import ModelSizes
from gradpruner.plans.layer_plan import PruningPlan

SMALL = Workload(batch_size=2, tokens=8, new_tokens=4, repeats=2, warmup=1, device="cpu")
OPTIONS = ["--batch-size", "2", "--tokens", "8", "--new-tokens", "4", "--repeats", "2", "--warmup", "0"]


def write_config(folder, model_type="llama", **changes):
    folder.mkdir()
    fields = {**COMMON, "model_type": model_type, **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture
def shape(tmp_path):
    """A folder that holds only the config of a model with six layers."""
    return write_config(tmp_path / "dense")


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeProcess, "order", [])
    monkeypatch.setattr(FakeProcess, "failing", "")
    monkeypatch.setattr(turns_module, "Popen", FakeProcess)
    return FakeProcess


def test_ratios_floors_and_order(fake, shape):
    found = measure_cost(shape, PruningPlan.from_keep(6, [0, 1, 5]), SMALL)
    # One warm-up and two measured steps; the model that goes first alternates.
    assert fake.order[:6] == ["6", "3", "3", "6", "6", "3"]
    step = found.find("full_step_seconds")
    assert step.medians == (2.0, 1.0) and step.ratio == 0.5 and step.pairs == [0.5, 0.5]
    # One layer: q, o 32x32, k, v 16x32, three 32x48; head 64x32.
    linear, head = 2 * 1024 + 2 * 512 + 3 * 1536, 2048
    assert step.floor == (3 * linear + head) / (6 * linear + head)
    assert step.above_floor == pytest.approx(0.5 / step.floor)
    rise = found.find("full_rise_bytes")
    assert rise.medians == (400, 200) and found.find("full_peak_bytes").floor is None
    assert rise.floor == found.find("full_held_bytes").ratio
    assert rise.floor == pytest.approx(found.find("parameters").ratio, rel=1e-3)
    assert found.find("inference_rate").medians == (1.0, 2.0)
    assert found.measured and found.random_weights and not found.errors and not found.warnings
    assert found.dtypes == dict.fromkeys(("full", "lora", "inference"), "float32")
    with pytest.raises(ConfigError, match="No figure 'speed'"):
        found.find("speed")
    facts = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    row = next(f for f in facts["figures"] if f["name"] == "full_step_seconds")
    assert row["pair_ratios"] == {"lowest": 0.5, "quartiles": [0.5, 0.5, 0.5], "highest": 0.5}
    assert facts["provenance"]["packages"]


def test_a_failed_measurement_is_a_row_with_its_error(fake, shape):
    fake.failing = "6"
    found = measure_cost(shape, PruningPlan.from_keep(6, [0, 5]), SMALL, modes=["lora"])
    assert found.errors == {"dense, LoRA fine-tuning": "out of memory"}
    step = found.find("lora_step_seconds")
    assert step.medians == (None, 1.0) and step.ratio is None and step.above_floor is None


def test_a_median_and_its_pairs_by_hand():
    figure = Figure("x", "g", "x", "seconds", (1.0, 4.0, 2.0), (1.0, 1.0, 1.0), 0.25)
    assert figure.medians == (2.0, 1.0) and figure.pairs == [0.25, 0.5, 1.0]
    assert figure.ratio == 0.5 and figure.above_floor == 2.0


def test_floors_count_the_head_where_it_is_computed(shape):
    dense = find_subject(shape)
    sizes = ModelSizes(dense.config), ModelSizes(shorten(dense, PruningPlan.from_keep(6, [0, 1, 5])).config)
    linear, head = 2 * 1024 + 2 * 512 + 3 * 1536, 2048

    def floor(tokens, heads):
        return pytest.approx((tokens * 3 * linear + heads * head) / (tokens * 6 * linear + heads * head))

    floors = time_floors("inference", sizes, SMALL)
    assert floors == {
        "prefill_seconds": floor(8, 1),
        "decode_seconds": floor(1, 1),
        "generation_seconds": floor(11, 4),
    }
    answers = Workload(tokens=8, learned_tokens=1)
    assert time_floors("lora", sizes, answers) == {"step_seconds": floor(8, 2)}


def test_bad_pairs(shape, tmp_path):
    shallow = write_config(tmp_path / "shallow", num_hidden_layers=4)
    with pytest.raises(ConfigError, match="has 6 layers, the dense one only 4"):
        measure_cost(shallow, shape, SMALL, dry_run=True)
    with pytest.raises(PlanError, match="4 layers; this one has 6"):
        measure_cost(shape, PruningPlan.from_keep(4, [0, 1]), SMALL, dry_run=True)
    with pytest.raises(ConfigError, match="more than the 64 positions"):
        measure_cost(shape, shallow, Workload(device="cpu"), dry_run=True)
    narrow = write_config(tmp_path / "narrow", num_hidden_layers=4, intermediate_size=24)
    found = measure_cost(shape, narrow, SMALL, dry_run=True)
    assert "differ in more than depth" in found.warnings[0]
    assert all(figure.floor is None for figure in found.figures)


def test_stored_weights_are_used_for_both_models_or_neither(tmp_path, shape, fake):
    for name, layers in (("six", 6), ("three", 3)):
        make_model(num_hidden_layers=layers).save_pretrained(tmp_path / name)
    found = measure_cost(tmp_path / "six", tmp_path / "three", SMALL, modes=["inference"])
    assert not found.random_weights and found.names == ("six", "three")
    stored = (tmp_path / "six" / "model.safetensors").stat().st_size
    assert 0 < stored - found.find("disk_bytes").medians[0] < 20_000  # the header
    assert find_subject(tmp_path / "six", random=True).folder is None
    assert measure_cost(shape, tmp_path / "three", SMALL, modes=["inference"]).random_weights


def test_a_worker_sees_one_gpu_and_finds_the_package(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert worker_environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "7"
    assert worker_environment("auto")["CUDA_VISIBLE_DEVICES"] == "4"
    assert worker_environment("cpu")["CUDA_VISIBLE_DEVICES"] == "4,7"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker_environment("auto")["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert worker_environment("cuda:2")["CUDA_VISIBLE_DEVICES"] == "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No pruned model is given"),
        (["--keep", "0-1", "--num-prune", "1"], "--keep and --num-prune given"),
        (["--keep", "0-9"], "'0-9' is not a layer"),
        (["--num-prune", "5"], "Cannot prune 5 of 6"),
        (["--num-prune", "1", "--mode", "fulll"], "Did you mean 'full'"),
        (["--num-prune", "1", "--tokens", "8", "--device", "tpu"], "Unknown device"),
    ],
)
def test_bad_options(shape, arguments, message):
    done = CliRunner().invoke(app, ["cost", str(shape), *arguments, "--quiet"])
    assert isinstance(done.exception, ConfigError) and message in str(done.exception)


def test_a_dry_run_prints_sizes_and_floors(shape, tmp_path):
    arguments = ["cost", str(shape), "--drop", "2-4", *OPTIONS, "--dry-run", "--quiet"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "cost.json")], catch_exceptions=False)
    assert done.exit_code == 0 and "parameters of layers" in done.output and "floor" in done.output
    facts = json.loads((tmp_path / "cost.json").read_text())
    assert facts["pruned"]["layers"] == 3 and facts["pruned"]["name"] == "dense without 2-4"
    assert str(tmp_path) not in json.dumps(facts)


class Parent:
    """The other end of a worker's pipe, in this process: sends one order, then a request per step."""

    def __init__(self, subject, mode, goes=SMALL.steps, workload=SMALL):
        self.messages = [(subject, mode, workload), *["go"] * goes]
        self.received = []

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)

    def send(self, message):
        self.received.append(message)


LLAMA = Subject("llama", LlamaConfig(**COMMON))


@pytest.mark.parametrize("mode", ["full", "lora", "inference"])
def test_a_worker_runs_what_users_run(mode, monkeypatch):
    monkeypatch.setattr(progress, "_mode", "quiet")
    parent = Parent(LLAMA, mode)
    worker.work(parent)
    assert parent.received[0] == {"ready": True} and len(parent.received) == 2 + SMALL.steps
    for times in parent.received[1:-1]:
        assert all(seconds > 0 for seconds in times.values())
        if mode == "inference":  # the first of four tokens comes from the prompt's pass
            parts = times["prefill_seconds"] + 3 * times["decode_seconds"]
            assert parts <= times["generation_seconds"]
    assert parent.received[-1]["kind"] == "rss"
    assert parent.received[-1]["peak_bytes"] >= parent.received[-1]["empty_bytes"] > 10**8


def test_a_worker_loads_stored_weights_and_reports_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_exercise", lambda *_: None)
    monkeypatch.setattr(progress, "_mode", "quiet")
    make_model(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    parent = Parent(find_subject(tmp_path / "model"), "inference")
    worker.work(parent)
    assert "peak_bytes" in parent.received[-1]
    (tmp_path / "model" / "model.safetensors").unlink()
    parent = Parent(Subject("gone", LLAMA.config, tmp_path / "model"), "inference")
    worker.work(parent)
    assert len(parent.received) == 1 and "no *.safetensors" in parent.received[0]["error"]
    with pytest.raises(SystemExit):  # the parent process is gone
        worker.work(Parent(LLAMA, "inference", goes=1))


def test_values_as_text():
    assert with_unit(0.25, "seconds") == "250 ms" and with_unit(0.9999, "seconds").startswith("1.00")
    assert with_unit(893_353_263_104, "MAC") == "893.353 GMACs" and with_unit(None, "bytes") == "–"
    assert with_unit(75.52, "tokens/s") == "75.5/s" and with_unit(8_030_261_248, "") == "8.03B"


def test_shapes_are_listed():
    done = CliRunner().invoke(app, ["ls", "shapes"])
    assert done.exit_code == 0 and "llama-3.1-8b     32 layers, hidden 4096" in done.output


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "ended with code 1: no message"),
        ("echo No room; exit 3", "ended with code 3: No room"),
        ("kill -9 $$", "killed, most likely because memory ran out: measure one mode"),
    ],
)
def test_a_process_that_dies_is_an_error(shape, tmp_path, monkeypatch, script, message):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(turns_module.sys, "executable", str(tmp_path / "python"))
    found = measure_cost(shape, PruningPlan.from_keep(6, [0, 5]), SMALL, modes=["lora"])
    assert len(found.errors) == 2
    assert message in found.errors["dense, LoRA fine-tuning"]


@pytest.mark.slow
def test_a_real_run_as_a_user_calls_it(shape, tmp_path):
    """Dense and pruned run in their own processes."""
    arguments = ["cost", str(shape), "--drop", "2-4", *OPTIONS, "--mode", "inference", "--device", "cpu"]
    out = tmp_path / "cost.json"
    done = CliRunner().invoke(app, [*arguments, "--out", str(out), "--json"], catch_exceptions=False)
    assert done.exit_code == 0
    facts = json.loads(out.read_text())
    assert json.loads(done.stdout)["figures"] == facts["figures"]
    figures = {figure["name"]: figure for figure in facts["figures"]}
    for name in ("inference_prefill_seconds", "inference_decode_seconds", "inference_generation_seconds"):
        assert len(figures[name]["dense_values"]) == len(figures[name]["pruned_values"]) == 2
        assert all(value > 0 for value in figures[name]["dense_values"])
        assert 0 < figures[name]["floor"] < 1
    assert figures["inference_peak_bytes"]["dense"] > figures["inference_rise_bytes"]["dense"] >= 0
    assert not facts["errors"] and facts["device"] == "cpu"


def test_a_recorded_step_and_samples_of_many_lengths(monkeypatch):
    monkeypatch.setattr(progress, "_mode", "quiet")
    varied = replace(SMALL, shortest=3, learned_tokens=2, batching="padded")
    samples = worker.random_samples(make_model(), replace(varied, batch_size=50))
    lengths = [len(sample["input_ids"]) for sample in samples]
    assert min(lengths) == 3 and max(lengths) == 8
    assert all(sample["labels"].count(IGNORED) == len(sample["labels"]) - 2 for sample in samples)
    parent = Parent(LLAMA, RECORDING, workload=varied)
    worker.work(parent)
    assert len(parent.received) == 2 + SMALL.steps and "peak_bytes" in parent.received[-1]
    with pytest.raises(ConfigError, match="shortest is 9; it must be 2 to 8"):
        replace(SMALL, shortest=9)
