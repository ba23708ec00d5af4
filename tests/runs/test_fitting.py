"""Memory per device: weights, gradients and optimizer exactly, activations nearly; runs that do not fit."""

import gc
import json
import weakref

import pytest
import torch
from builders import make_project, tiny_config
from conftest import COMMON
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, TrainerCallback

from gradpruner.common.errors import ConfigError
from gradpruner.data.encoding import Collator
from gradpruner.evaluation.costing import rehearsal
from gradpruner.evaluation.costing.per_device import Held, Spread, Training, hold_training
from gradpruner.evaluation.costing.rehearsal import working_bytes
from gradpruner.evaluation.costing.scaling import strategies_for
from gradpruner.models.sizes import build_on_meta
from gradpruner.runs.before import fitting
from gradpruner.runs.before.fitting import deepspeed_spread
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.training.finetuning import _new_recompute, finetune

CONFIG = tiny_config(num_hidden_layers=3, vocab_size=200)
SAMPLES = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(8)]


class Holding(TrainerCallback):
    """Bytes of the tensors a Trainer holds after its last optimizer step."""

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        states = [value for one in optimizer.state.values() for value in one.values()]
        self.weights = sum(p.nbytes for p in model.parameters())
        self.gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        self.optimizer = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("mode", "optim", "dtype", "tied"),
    [
        ("full", "adamw_torch_fused", torch.float32, False),
        ("full", "adafactor", torch.float32, True),
        ("full", "sgd", torch.bfloat16, False),
        ("lora", "adamw_torch", torch.bfloat16, False),
        ("lora", "adafactor", torch.float32, False),
    ],
)
def test_weights_gradients_and_optimizer_are_what_a_trainer_holds(mode, optim, dtype, tied):
    config = LlamaConfig(**(CONFIG.to_dict() | {"tie_word_embeddings": tied}))
    real, holding = LlamaForCausalLM(config).to(dtype), Holding()
    options = {"mode": mode, "optim": optim, "max_steps": 2, "merge_adapter": False, "save_steps": None}
    finetune(real, SAMPLES, collator=Collator(), device="cpu", callbacks=[holding], **options)
    held = hold_training(build_on_meta(config), Training(mode=mode, optim=optim, dtype=dtype))
    found = (holding.weights, holding.gradients, holding.optimizer)
    assert (held.weights, held.gradients, held.optimizer) == found


def test_sharded_bytes_by_hand():
    """A weight of 10 x 6, trained in float32: 4 bytes of weight and gradient, 8 of moments."""
    linear = torch.nn.Linear(6, 10, bias=False, device="meta")

    def held(strategy, size, **changes):
        training = Training(spread=Spread(strategy, size, **changes))
        found = hold_training(linear, training)
        return found.weights, found.gradients, found.optimizer, found.exchange

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradpruner.evaluation.costing.per_device._gathered", lambda *_: 0)
        assert held("one", 1) == (240, 240, 484, 0)  # plus the step count
        assert held("ddp", 4) == (240, 240, 484, 240)  # buckets
        assert held("fsdp", 4) == (72, 72, 148, 0)  # 3 of 10 rows
        assert held("zero1", 4) == (240, 240, 12 * 15, 0)
        assert held("zero2", 4) == (240, 60, 12 * 15, 0)
        assert held("zero3", 4) == (60, 60, 12 * 15, 0)
        assert held("zero2", 4, offload=("optimizer",)) == (240, 60, 0, 0)


def test_peak_by_hand():
    parts = {"weights": 100, "gradients": 40, "optimizer": 50, "working": 70}
    assert Held(**parts).peak == 220 and Held(**parts, accumulates=True).peak == 260
    assert Held(**parts).certain == 190 and Held(**parts, paged=True).certain == 140


@pytest.mark.parametrize(
    "training",
    [
        Training(batch_size=2, tokens=64, head_tokens=16),
        Training(batch_size=2, tokens=64, head_tokens=16, checkpointing=True),
        Training(mode="lora", batch_size=2, tokens=64, head_tokens=16, precision="bf16"),
    ],
)
def test_deeper_models_are_rehearsed_by_two_layers(training):
    deep = LlamaConfig(**(CONFIG.to_dict() | {"num_hidden_layers": 7}))
    model = build_on_meta(deep)
    whole = max(rehearsal._rehearsed(build_on_meta(deep), training))
    assert working_bytes(model, training, 7) == pytest.approx(whole, rel=0.01)
    assert len(model.model.layers) == 7 and model.config.num_hidden_layers == 7
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_rehearsal_is_remembered_as_long_as_its_model(monkeypatch):
    model, training = build_on_meta(CONFIG), Training(batch_size=2, tokens=16, head_tokens=4)
    deep = working_bytes(model, training, 3)
    with monkeypatch.context() as patch:
        patch.setattr(rehearsal, "_rehearsed", lambda *_: pytest.fail("rehearsed twice"))
        assert working_bytes(model, training, 2) < deep
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_recomputing_and_offloading_save_memory_and_experts_are_unknown():
    model = build_on_meta(LlamaConfig(**(CONFIG.to_dict() | {"num_hidden_layers": 12})))
    kinds = (False, True, "offload")
    found = [
        working_bytes(model, Training(checkpointing=kind, batch_size=2, tokens=64, head_tokens=2), 12)
        for kind in kinds
    ]
    assert found[0] > 2 * found[1] and found[1] > found[2] > 0
    experts = build_on_meta(MixtralConfig(**COMMON, num_local_experts=4))
    assert working_bytes(experts, Training(batch_size=1, tokens=8, head_tokens=8), 6) is None


def test_the_peak_is_what_torchs_allocator_gives_out():
    config = LlamaConfig(**(CONFIG.to_dict() | {"hidden_size": 64, "intermediate_size": 160}))
    real = LlamaForCausalLM(config)
    weights = sum(p.nbytes for p in real.parameters())
    samples = [{"input_ids": [7] * 64, "labels": [7] * 64}] * 8
    options = {"batch_size": 2, "accumulation": 2, "max_steps": 2, "save_steps": None, "batching": "padded"}
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        finetune(real, samples, collator=Collator(), device="cpu", **options)
    events = found.profiler.kineto_results.events()
    now = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    training = Training(batch_size=2, tokens=64, head_tokens=64, accumulation=2)
    model = build_on_meta(config)
    held = hold_training(model, training)
    estimated = held.peak + working_bytes(model, training, 3)
    assert estimated == pytest.approx(weights + most, rel=0.08)


# -- a run that does not fit ---------------------------------------------------------------------------------


def test_a_dry_run_names_what_every_stage_holds(call, tmp_path):
    path, _ = make_project(tmp_path)
    code, out, _ = call("run", path, "--dry-run", "--json")
    found = json.loads(out)["memory"]
    assert code == 0 and found["device"] == "this machine" and found["strategy"] == "one"
    stages = found["stages"]
    assert list(stages) == ["recording", "fine-tuning dense", "fine-tuning pruned", "evaluation"]
    assert stages["fine-tuning dense"]["optimizer"] > stages["fine-tuning pruned"]["optimizer"] > 0
    assert all(held["working"] > 0 and held["peak"] > held["weights"] for held in stages.values())
    assert found["peak_bytes"] == max(held["peak"] for held in stages.values())


def test_teacher_and_repair_are_stages_of_their_own(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    monkeypatch.setattr(fitting, "working_bytes", lambda *_: None)
    keys = ("start=tuned", "plan.repair=least_squares", "recover.epochs=1", "distil.teacher=tuned")
    code, out, _ = call("run", path, "--dry-run", *(part for key in keys for part in ("--set", key)))
    assert (
        code == 0
        and "distillation pruned" in out
        and "repair" in out
        and "add them to the figures above" in out
    )


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(call, tmp_path, monkeypatch):
    path, values = make_project(tmp_path)
    held = fitting.memory_need(Job(load_recipe(path))).stages
    room = (held["fine-tuning dense"].certain + held["recording"].certain) // 2
    monkeypatch.setattr(fitting, "working_bytes", lambda *_: 1000)
    monkeypatch.setattr(fitting, "host_memory", lambda: room)
    for extra in (["--dry-run"], []):
        code, _, err = call("run", path, *extra)
        assert code == 5 and "Fine-tuning dense needs" in err, err
        assert "--set finetune.optim=adafactor" in err and "--set memory=warn" in err
    assert not (tmp_path / values.get("out", "run")).exists()
    assert call("record", path)[0] == 0  # recording alone has room
    code, out, _ = call("run", path, "--dry-run", "--json", "--set", "memory=warn")
    assert code == 0 and any("Fine-tuning dense needs" in text for text in json.loads(out)["warnings"])


def test_activations_wait_on_the_host_of_a_gpu_only(call, tmp_path):
    path, _ = make_project(tmp_path)
    code, _, err = call("run", path, "--dry-run", "--set", "finetune.gradient_checkpointing=offload")
    assert code == 2 and "from a GPU to the host" in err


@pytest.mark.skipif(not _new_recompute(), reason="transformers offloads from 5.23 on")
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_offloading_reaches_torch_for_every_layer_and_changes_no_loss(monkeypatch, mode):
    """The CPU stands in for the GPU: torch is asked to offload activations and copies them within the CPU."""
    asked = []

    def moves(pin_memory, device_type):
        asked.append(pin_memory)
        return torch.autograd.graph.save_on_cpu()

    def losses(kind):
        options = {"mode": mode, "max_steps": 2, "gradient_checkpointing": kind, "save_steps": None}
        model = LlamaForCausalLM(CONFIG)
        torch.manual_seed(0)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        _, found = finetune(
            model, SAMPLES, collator=Collator(), batch_size=4, accumulation=1, dropout=0.0, **options
        )
        return [entry["loss"] for entry in found.losses]

    plain = losses(True)
    monkeypatch.setattr("gradpruner.training.finetuning.check_checkpointing", lambda *_: None)
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", moves)
    assert losses("offload") == plain
    assert asked == [True] * (2 * CONFIG.num_hidden_layers)


def test_what_fits_without_activations_is_only_warned_of(call, tmp_path, monkeypatch):
    path, _ = make_project(tmp_path)
    room = max(held.certain for held in fitting.memory_need(Job(load_recipe(path))).stages.values())
    monkeypatch.setattr(fitting, "working_bytes", lambda *_: 10**6)
    monkeypatch.setattr(fitting, "host_memory", lambda: room)
    code, out, _ = call("run", path, "--dry-run", "--json")
    said = [text for text in json.loads(out)["warnings"] if "with its activations" in text]
    assert code == 0 and said and "gradient_checkpointing" in said[0]


# -- several devices -----------------------------------------------------------------------------------------


def test_what_each_of_several_devices_would_hold(call):
    asked = ("cost", "llama-3.2-1b", "--world-size", "4", "--tokens", "64", "--device-memory", "16GB")
    code, out, err = call(*asked, "--strategy", "ddp,fsdp", "--mode", "full,qlora", "--dry-run", "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = {(row["mode"], row["strategy"]): row for row in found["rows"]}
    assert list(rows) == [("full", "ddp"), ("full", "fsdp"), ("qlora", "ddp")]
    whole, sharded = rows["full", "ddp"], rows["full", "fsdp"]
    assert whole["weights"] == 4 * found["parameters"] == whole["exchange"]
    assert sharded["weights"] == pytest.approx(whole["weights"] / 4, rel=1e-3)
    assert sharded["working"] < whole["working"]  # which also holds bfloat16 copies of all weights
    assert not whole["fits"] and sharded["fits"] and rows["qlora", "ddp"]["fits"]
    assert found["stages"]["surgery_written"] < found["stages"]["surgery_read"]
    code, out, _ = call(*asked, "--strategy", "fsdp", "--mode", "lora", "--dry-run")
    assert code == 0 and "nothing was run" in out and "each of 4 devices" in out


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--world-size", "2"], "needs --dry-run"),
        (["--world-size", "0", "--dry-run"], "at least 1"),
        (["--world-size", "2", "--strategy", "fdsp", "--dry-run"], "Did you mean 'fsdp'"),
        (["--world-size", "1", "--strategy", "ddp", "--dry-run"], "does not work with 1 process."),
        (["--world-size", "2", "--mode", "inference", "--dry-run"], "Unknown mode 'inference'"),
        (["--world-size", "2", "--mode", "qlora", "--strategy", "zero3", "--dry-run"], "qlora with zero3"),
        (["--strategy", "ddp", "--num-prune", "3", "--dry-run"], "need --world-size"),
        (["--world-size", "2", "--device-memory", "much", "--dry-run"], "is not a size"),
    ],
)
def test_wrong_questions_about_several_devices(call, extra, part):
    code, _, err = call("cost", "llama-3.2-1b", *extra)
    assert code == 2 and part in err


def test_a_deepspeed_file_says_what_is_spread(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}), "utf-8"
    )
    assert deepspeed_spread(file, 4) == Spread("zero2", 4, ("optimizer",))
    file.write_text("{}", "utf-8")
    assert deepspeed_spread(file, 4) == Spread("ddp", 4)
    assert strategies_for(1, ()) == ("one",) and "zero3" in strategies_for(2, ())
    with pytest.raises(ConfigError, match="Unknown strategy"):
        strategies_for(2, ("zero4",))


def test_recording_is_data_parallel_where_deepspeed_tunes(tmp_path, monkeypatch):
    job = Job(load_recipe(make_project(tmp_path)[0]))
    monkeypatch.setattr(fitting, "spread_of", lambda _: Spread("zero3", 2))
    stages = fitting.memory_need(job).stages
    assert stages["recording"].exchange == stages["recording"].gradients > 0  # DDP's buckets
    assert stages["recording"].weights > 1.9 * stages["fine-tuning dense"].weights
