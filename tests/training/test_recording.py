import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import make_llama, make_samples
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gradpruner.common.errors import ConfigError, DataError, ModelError, NonFiniteError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.gradients.trace import GradientTrace
from gradpruner.models.layers import fingerprint
from gradpruner.models.loading import load_model
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning.in_memory import prune_
from gradpruner.training import finetuning as training
from gradpruner.training import recording
from gradpruner.training.adapters import attach_lora, find_lora_linears
from gradpruner.training.recording import (
    MAX_OVERFLOWS,
    GradientRecorder,
    default_steps,
    record_gradients,
)

pytestmark = pytest.mark.usefixtures("quiet")


def arguments(**changes):
    options = {
        "output_dir": "unused",
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**options, **changes})


def lora(model, **options):
    """LoRA whose B does not start at zero, so that every step has energy."""
    torch.manual_seed(1)
    config = LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False, **options
    )
    return get_peft_model(model, config)


def record(samples=None, callbacks=(), recorder=None, model=None, **changes):
    """Records in a plain Trainer that knows nothing of us."""
    recorder = recorder or GradientRecorder(4)
    trainer = Trainer(
        model=model if model is not None else lora(make_llama()),
        args=arguments(**changes),
        train_dataset=samples or make_samples(16),
        data_collator=Collator(),
        callbacks=[*callbacks, recorder],
    )
    trainer.train()
    return recorder.trace


def manual(batches, clip=None, **options):
    """The same steps by hand: energies of `grad_B @ grad_A`, formed in full, float64."""
    model = lora(make_llama(), **options)
    pairs, _ = find_lora_linears(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.0)
    out, norms = [], []
    for batch in batches:
        inputs = Collator()(batch)
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        labels = inputs["labels"][:, 1:]
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
        norms.append(float(torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in weights]))))
        if clip is not None:
            nn.utils.clip_grad_norm_(weights, clip)
        out.append([float((b.grad.double() @ a.grad.double()).square().sum()) for a, b in pairs])
        optimizer.step()
        optimizer.zero_grad()
    return torch.tensor(out, dtype=torch.float64), norms


def batches_of(samples, size):
    return [samples[i : i + size] for i in range(0, len(samples), size)]


# -- what is recorded ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_energies_in_a_plain_trainer_are_those_of_a_loop_by_hand(kind):
    samples = make_samples(16)
    trace = record(samples, model=lora(make_llama(), **kind))
    expected, _ = manual(batches_of(samples, 4), **kind)
    torch.testing.assert_close(trace.energies_SK, expected, rtol=1e-4, atol=0)
    assert trace.info.clip is None
    assert trace.info.adapter == next(iter(kind), "use_lora").removeprefix("use_")
    assert trace.info.alpha == 4 and trace.info.rank == 2
    assert trace.info.learning_rates == (1e-3,) * 4
    assert trace.info.notes == ()


def test_accumulated_batches_are_one_batch_of_their_size():
    samples = make_samples(32)
    accumulated = record(samples, gradient_accumulation_steps=2)
    whole = record(samples, per_device_train_batch_size=8)
    torch.testing.assert_close(accumulated.energies_SK, whole.energies_SK, rtol=1e-4, atol=0)
    torch.testing.assert_close(whole.energies_SK, manual(batches_of(samples, 8))[0], rtol=1e-4, atol=0)


def test_clipping_by_c_scales_the_energy_by_c_to_the_fourth():
    samples, clip = make_samples(16), 0.5
    raw, norms = manual(batches_of(samples, 4))
    trace = record(samples, max_grad_norm=clip)
    assert norms[0] > clip
    torch.testing.assert_close(trace.energies_SK[0], raw[0] * (clip / norms[0]) ** 4, rtol=1e-4, atol=0)
    torch.testing.assert_close(trace.energies_SK, manual(batches_of(samples, 4), clip)[0], rtol=1e-4, atol=0)
    assert trace.info.clip == clip


def test_bf16_autocast_records_float32_factors_near_the_float32_ones():
    samples = make_samples(16)
    trace = record(samples, bf16=True)
    expected, _ = manual(batches_of(samples, 4))
    factors = trace.factors(0, "mlp.up_proj")
    assert factors.grad_b_SOR.dtype == torch.float32
    assert torch.isfinite(trace.energies_SK).all()
    torch.testing.assert_close(trace.energies_SK[0].sum(), expected[0].sum(), rtol=0.1, atol=0)


def test_training_is_not_disturbed():
    samples = make_samples(16)
    plain, watched = lora(make_llama()), lora(make_llama())
    Trainer(model=plain, args=arguments(), train_dataset=samples, data_collator=Collator()).train()
    trace = record(samples, recorder=GradientRecorder(2), model=watched)
    assert trace.num_steps == len(trace.info.losses) == 2  # and the training went on
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_training_of_a_model_is_not_recorded_one_of_another_model_is(tmp_path, caplog):
    recorder = GradientRecorder(3)
    model = lora(make_llama())
    first = record(recorder=recorder, model=model)
    assert record(recorder=recorder, model=model) is first and "Not recorded" in caplog.text
    other = record(recorder=recorder, model=lora(make_llama(seed=5)))
    assert (
        other.info == record(recorder=GradientRecorder(3), model=lora(make_llama(seed=5))).info != first.info
    )
    on_disk = GradientRecorder(3, tmp_path / "trace")
    kept = record(recorder=on_disk)
    with pytest.raises(ConfigError, match="never overwritten"):
        record(recorder=on_disk)
    assert on_disk.trace is kept


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"modules_to_save": ["norm"]}], ids=str)
def test_what_unload_takes_away_is_no_parameter_of_the_model(kind, caplog):
    trace = record(recorder=GradientRecorder(2), model=lora(make_llama(), **kind))
    assert "unload()" not in caplog.text and not any("own parameters" in note for note in trace.info.notes)


def test_parameters_that_unload_leaves_changed_are_named(caplog):
    model = lora(make_llama())
    norm = model.base_model.model.model.norm.weight
    before = norm.requires_grad_(True).detach().clone()
    trace = record(recorder=GradientRecorder(2), model=model)
    assert not torch.equal(model.unload().model.norm.weight, before)
    assert "model.norm.weight" in caplog.text
    assert any(note.startswith("1 of the model's own parameters") for note in trace.info.notes)


def test_factors_on_disk_and_in_memory_are_the_same(tmp_path):
    in_memory = record(recorder=GradientRecorder(3))
    on_disk = record(recorder=GradientRecorder(3, tmp_path / "trace", stop_training=True))
    loaded = GradientTrace.load(tmp_path / "trace")
    assert torch.equal(in_memory.energies_SK, loaded.energies_SK)
    for trace in (on_disk, loaded):
        one, other = in_memory.factors(2, "mlp.down_proj"), trace.factors(2, "mlp.down_proj")
        assert torch.equal(one.grad_b_SOR, other.grad_b_SOR) and torch.equal(one.grad_a_SRI, other.grad_a_SRI)
    assert len(list((tmp_path / "trace" / "factors").iterdir())) == 3
    assert len(on_disk.info.losses) == 3
    assert on_disk.bytes_on_disk() > 0


def test_energies_alone_are_kilobytes(tmp_path):
    trace = record(recorder=GradientRecorder(3, tmp_path / "trace", keep_factors=False))
    assert not trace.has_factors
    assert trace.bytes_on_disk() < 20_000


# -- the fp16 scaler -----------------------------------------------------------------------------------


class ScaledOptimizer:
    """What accelerate wraps an optimizer in."""

    def __init__(self, weights, scale=1024.0):
        self.optimizer = torch.optim.AdamW(weights, lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.param_groups = self.optimizer.param_groups

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


class Loop:
    """A few Trainer events by hand, around a recorder."""

    def __init__(self, recorder):
        self.recorder = recorder
        self.model = lora(make_llama())
        self.weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = ScaledOptimizer(self.weights)
        self.args = SimpleNamespace(max_grad_norm=0.0, seed=0)
        self.state = SimpleNamespace(global_step=0, is_world_process_zero=True)
        self.control = SimpleNamespace(should_training_stop=False)
        recorder.on_train_begin(self.args, self.state, self.control, model=self.model)

    def step(self, gradients, clipped):
        scaler = self.optimizer.scaler
        scaler.scale(torch.ones(()))  # makes the scale, as the loss would
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient * scaler.get_scale()
        if clipped:
            scaler.unscale_(self.optimizer.optimizer)
        self.recorder.on_pre_optimizer_step(
            self.args, self.state, self.control, model=self.model, optimizer=self.optimizer
        )
        self.optimizer.step()
        self.state.global_step += 1


def random_gradients(weights, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(w.shape, generator=generator) * 1e-3 for w in weights]


@pytest.mark.parametrize("clipped", [False, True])
def test_scaled_gradients_are_unscaled_exactly_once(clipped):
    recorder = GradientRecorder(4)
    loop = Loop(recorder)
    before = [w.detach().clone() for w in loop.weights]
    gradients = [random_gradients(loop.weights, seed) for seed in range(3)]
    overflow = [g.clone() for g in gradients[1]]
    overflow[0][0, 0] = float("inf")
    for step in (gradients[0], overflow, gradients[1], gradients[2]):
        loop.step(step, clipped)
    recorder.on_train_end(loop.args, loop.state, loop.control)
    trace = recorder.trace
    assert trace.num_steps == 3
    assert trace.info.notes == (
        "step 2 left out: fp16 overflow",
        "3 of 4 steps were recorded",
        "no gates: no backward pass went through the layers",
    )

    position = {id(w): i for i, w in enumerate(loop.weights)}
    pairs, _ = find_lora_linears(loop.model)
    for step, grads in enumerate(gradients):
        expected = [
            float((grads[position[id(b)]].double() @ grads[position[id(a)]].double()).square().sum())
            for a, b in pairs
        ]
        torch.testing.assert_close(trace.energies_SK[step].tolist(), expected, rtol=1e-5, atol=0)

    # The optimizer, too, saw them un-scaled once.
    plain = [nn.Parameter(w) for w in before]
    optimizer = torch.optim.AdamW(plain, lr=1e-3)
    for grads in gradients:
        for weight, gradient in zip(plain, grads, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for weight, other in zip(loop.weights, plain, strict=True):
        torch.testing.assert_close(weight.detach(), other.detach(), rtol=1e-5, atol=1e-7)


def test_overflow_that_never_ends_is_not_taken_for_the_scaler_at_work():
    loop = Loop(GradientRecorder(4))
    loop.optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    bad = [torch.full_like(w, float("nan")) for w in loop.weights]
    for _ in range(MAX_OVERFLOWS):
        loop.step(bad, clipped=False)
    with pytest.raises(NonFiniteError, match="in a row"):
        loop.step(bad, clipped=False)


# -- what goes wrong -----------------------------------------------------------------------------------


class Poison(TrainerCallback):
    """Puts a NaN into one gradient at one step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            pairs, _ = find_lora_linears(kwargs["model"])
            pairs[9][0].grad[0, 0] = float("nan")


def test_a_nan_stops_the_run_and_keeps_the_good_steps(tmp_path):
    recorder = GradientRecorder(4, tmp_path / "trace")
    with pytest.raises(NonFiniteError, match=r"layer 1 .* at step 3 is NaN .* 2 good steps") as caught:
        record(callbacks=[Poison(3)], recorder=recorder)
    assert caught.value.exit_code == 5
    trace = GradientTrace.load(tmp_path / "trace")
    assert trace.num_steps == 2 and trace.info.notes[-1] == "2 of 4 steps were recorded"
    expected = record(recorder=GradientRecorder(2))
    assert torch.equal(trace.energies_SK, expected.energies_SK)


def test_a_training_after_one_that_crashed_is_recorded_from_its_start():
    class Crash(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise RuntimeError

    recorder = GradientRecorder(4)
    with pytest.raises(RuntimeError):
        record(callbacks=[Crash()], recorder=recorder)
    assert record(recorder=recorder).info == record().info


def test_a_nan_can_be_left_out():
    trace = record(callbacks=[Poison(2)], recorder=GradientRecorder(3, on_non_finite="skip"))
    assert trace.num_steps < 4  # the Trainer goes on with damaged weights; nothing after is finite either
    assert "step 2 left out" in trace.info.notes[0]


def test_a_non_finite_loss_stops_record_gradients_and_the_model_is_put_back(tmp_path, monkeypatch):
    class Broken(training.CausalTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 2 else loss

    monkeypatch.setattr(recording, "CausalTrainer", Broken)
    model = make_llama()
    before = {name: w.clone() for name, w in model.state_dict().items()}
    with pytest.raises(NonFiniteError, match="step 3"):
        record_gradients(model, make_samples(8), steps=4, folder=tmp_path / "trace", device="cpu")
    assert GradientTrace.load(tmp_path / "trace").num_steps == 2
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


@pytest.mark.parametrize("steps", [-1, 0, 1])
def test_one_step_tells_nothing(steps):
    with pytest.raises(ConfigError, match="LoRA B is zero at the first step"):
        GradientRecorder(steps)


def test_two_steps_with_warm_up_tell_nothing_either():
    with pytest.raises(ConfigError, match=r"steps: .*3"):
        record_gradients(make_llama(), make_samples(4), steps=2)


def test_unusable_models_folders_and_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no trainable LoRA"):
        record(model=make_llama())
    only_q = get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[0, 2]))
    with pytest.raises(ConfigError, match=r"Layers \[1, 3\] have"):
        find_lora_linears(only_q)
    with pytest.raises(ConfigError, match="'stop' or 'skip'"):
        GradientRecorder(4, on_non_finite="ignore")
    with pytest.raises(ConfigError, match="Nothing has been recorded"):
        _ = GradientRecorder(4).trace
    with pytest.raises(DataError, match="empty"):
        record_gradients(make_llama(), [], steps=4)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        GradientRecorder(4, tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        GradientRecorder(4, tmp_path / "mine.txt")
    frozen = lora(make_llama())
    for weight in (w for name, w in frozen.named_parameters() if ".layers.3." in name and "lora_B" in name):
        weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"Layers \[3\] have no trainable LoRA"):
        record(model=frozen)
    with pytest.raises(ConfigError, match=r"'pissa'.* Allowed: True"):
        record(model=get_peft_model(make_llama(), LoraConfig(r=2, init_lora_weights="pissa")))
    with pytest.raises(DataError, match="hold prompt, completion; input_ids and labels are needed"):
        record_gradients(make_llama(), [{"prompt": "a", "completion": "b"}], steps=4)
    with pytest.raises(DataError, match="None of the 4 samples has a learned token"):
        record_gradients(make_llama(), [{"input_ids": [3, 4], "labels": [3, -100]}] * 4, steps=4)
    loop = Loop(GradientRecorder(4))
    with pytest.raises(ModelError, match="has no gradient"):
        loop.recorder.on_pre_optimizer_step(loop.args, loop.state, loop.control, optimizer=None)


# -- record_gradients ----------------------------------------------------------------------------------


def test_the_model_is_the_same_afterwards_and_the_trace_repeats():
    model = make_llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    before = {name: (w.clone(), w.requires_grad) for name, w in model.named_parameters()}
    runs = [
        record_gradients(model, make_samples(8), steps=4, rank=2, seed=seed, device="cpu")
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0].energies_SK, runs[1].energies_SK)
    assert not torch.equal(runs[0].energies_SK, runs[2].energies_SK)
    assert not model.training
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (weight, trained) in before.items():
        assert torch.equal(after[name], weight) and after[name].requires_grad == trained
    trace = runs[0]
    assert trace.info.model == fingerprint(model)
    assert (trace.num_steps, trace.effective_steps) == (4, 2)  # B is zero, then the learning rate is
    assert trace.info.clip == 1.0
    prune_(model, PruningPlan.from_keep(4, [0, 1, 3]), trace)  # it no longer counts as an adapted model


def test_a_model_with_adapters_is_refused_and_keeps_them():
    model = lora(make_llama())
    before = {name: (w.clone(), w.requires_grad) for name, w in model.named_parameters()}
    for refused in (
        lambda: record_gradients(model, make_samples(8), steps=3, device="cpu"),
        lambda: training.finetune(model, make_samples(8), mode="lora", max_steps=1, device="cpu"),
    ):
        with pytest.raises(PlanError, match="carries adapters"):
            refused()
        assert all(torch.equal(w, before[name][0]) for name, w in model.named_parameters())
        assert {name: w.requires_grad for name, w in model.named_parameters()} == {
            name: trained for name, (_, trained) in before.items()
        }


def test_recomputed_activations_change_nothing():
    model = make_llama()
    options = {"steps": 3, "rank": 2, "dropout": 0.0, "device": "cpu"}
    plain = record_gradients(model, make_samples(8), **options)
    recomputed = record_gradients(model, make_samples(8), gradient_checkpointing=True, **options)
    torch.testing.assert_close(plain.energies_SK, recomputed.energies_SK, rtol=1e-5, atol=0)
    assert model.config.use_cache
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_nothing_is_printed(capfd):
    record_gradients(make_llama(), make_samples(8), steps=3, rank=2, device="cpu")
    assert capfd.readouterr().out == ""


def test_lora_sits_on_every_linear_of_every_layer_and_nowhere_else():
    peft_model = attach_lora(make_llama(), rank=2)
    _, linears = find_lora_linears(peft_model)
    assert len(linears) == 4 * 7
    adapted = [name for name, m in peft_model.named_modules() if getattr(m, "lora_A", None)]
    assert len(adapted) == 4 * 7 and not any("lm_head" in name or "embed" in name for name in adapted)


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes")
    make_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    model = load_model(tmp_path, quantise=True)
    trace = record_gradients(model, make_samples(8), steps=4, rank=2, adapter="qlora")
    assert trace.info.adapter == "qlora" and trace.info.model == ""
    assert trace.effective_steps == 2


def test_default_steps():
    assert [default_steps(n) for n in (1, 4000, 4001)] == [40, 40, 41]


# -- other people's trainers ---------------------------------------------------------------------------


def _worker(rank, port, folder):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    record(
        make_samples(16),
        recorder=GradientRecorder(4, Path(folder) / "trace"),
        per_device_train_batch_size=2,
        ddp_backend="gloo",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_record_the_global_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(rank, port, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        if worker.is_alive():
            worker.kill()
    assert [worker.exitcode for worker in workers] == [0, 0]
    one, two = record(make_samples(16)), GradientTrace.load(tmp_path / "trace")
    torch.testing.assert_close(two.energies_SK, one.energies_SK, rtol=1e-4, atol=0)
    # Processes take batches in turn, so in the order of the processes rows are in the order of the data.
    assert two.gates.per_step == one.gates.per_step == (4, 4, 4, 4)
    torch.testing.assert_close(two.gate_rows(), one.gate_rows(), rtol=1e-3, atol=1e-5)
