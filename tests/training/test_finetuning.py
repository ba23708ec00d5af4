import json
import math
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from builders import make_llama, make_samples
from torch import nn
from transformers import Trainer, TrainerCallback, get_scheduler

from gradpruner.common.errors import ConfigError, DataError, NonFiniteError
from gradpruner.common.progress import set_mode
from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.training.adapters import attach_lora
from gradpruner.training.batching import LengthGroups
from gradpruner.training.callbacks import ProgressCallback
from gradpruner.training.finetuning import (
    check_liger,
    check_trackers,
    finetune,
    planned_steps,
    training_arguments,
)
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.resume import TALLY, latest_complete_checkpoint, tally_of
from gradpruner.training.trainer import CausalTrainer, answer_window

pytestmark = pytest.mark.usefixtures("quiet")


def tune(model=None, samples=None, **options):
    defaults = {
        "collator": Collator(),
        "batch_size": 4,
        "accumulation": 1,
        "max_steps": 5,
        "learning_rate": 1e-3,
        "device": "cpu",
        "seed": 3,
    }
    return finetune(model or make_llama(), samples or make_samples(16), **{**defaults, **options})


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# -- the loss ------------------------------------------------------------------------------------------

I = IGNORED  # noqa: E741
LAYOUTS = {
    "answer at the end": [[I, I, I, 7, 2], [I, I, 9, 2, I]],
    "answer in the middle": [[I, I, 8, I, I], [I, 5, I, I, I]],
    "two answers": [[I, 5, I, 7, 2], [I, I, I, I, 2]],
    "everything learned": [[1, 5, 6, 7, 2], [1, 5, 6, 7, 2]],
    "one token": [[I, I, I, I, I], [I, I, I, 6, I]],
    "only the first target": [[I, 6, I, I, I], [I, I, I, I, I]],
}


@pytest.mark.parametrize("labels", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_windowed_loss_and_its_gradients_are_the_trainers_own(labels, adapters):
    def build():
        model = make_llama()
        return attach_lora(model, rank=2, dropout=0.0) if adapters else model.requires_grad_(True)

    batch = {
        "input_ids": torch.tensor([[1, 5, 6, 7, 2], [1, 5, 9, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]),
        "labels": torch.tensor(labels),
    }
    results = []
    for cls, options in (
        (CausalTrainer, {"samples": [], "collator": Collator()}),
        (Trainer, {}),
    ):
        torch.manual_seed(0)
        model = build()
        trainer = cls(
            model=model,
            args=training_arguments(FinetuneOptions(accumulation=1, learning_rate=1e-5, device="cpu")),
            **options,
        )
        for count in (None, torch.tensor(3)):
            model.zero_grad()
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            results.append((cls, count, loss.detach(), gradients))
    half = len(results) // 2
    for (_, _, loss, gradients), (_, _, other, others) in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(loss, other, rtol=1e-6, atol=1e-7)
        assert len(gradients) == len(others) > 0
        for one, two in zip(gradients, others, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_the_window_is_as_small_as_the_labels_allow():
    window = answer_window(torch.tensor(LAYOUTS["answer in the middle"]))
    assert window["logits_to_keep"].tolist() == [0, 1, 2]
    assert window["labels"].tolist() == [[I, I, 8], [I, 5, I]]
    nothing = torch.full((2, 3), I)
    assert answer_window(nothing)["labels"] is nothing and "logits_to_keep" not in answer_window(nothing)


def test_only_answer_tokens_are_learned():
    samples = make_samples(8)
    other = [{**s, "input_ids": [*s["input_ids"][:-1], 3]} for s in samples]  # the last input is never used
    assert tune(samples=samples, max_steps=3)[1].losses == tune(samples=other, max_steps=3)[1].losses


# -- the loop ------------------------------------------------------------------------------------------


def test_five_steps_are_those_of_a_loop_by_hand():
    samples = make_samples(40)
    model, result = tune(samples=samples, accumulation=2, batch_size=4, max_steps=5)

    by_hand = make_llama().requires_grad_(True)
    decayed = [p for p in by_hand.parameters() if p.ndim > 1]  # norms are not decayed
    others = [p for p in by_hand.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    schedule = get_scheduler("linear", optimizer, math.ceil(5 * 0.03), 5)
    order = shuffled(samples)
    by_hand.train()
    for step in range(5):
        batch = Collator()([samples[i] for i in order[8 * step : 8 * step + 8]])
        logits = by_hand(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        logged = result.losses[step]
        assert logged["step"] == step + 1
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert logged["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert result.steps == 5 and result.resumed_from == 0
    assert result.trainable_parameters == sum(p.numel() for p in by_hand.parameters())
    assert result.tokens == sum(len(s["input_ids"]) for s in samples)


def shuffled(samples):
    """The order in which the Trainer takes samples with seed 3."""
    trainer = CausalTrainer(
        model=make_llama(),
        args=training_arguments(
            FinetuneOptions(batch_size=1, accumulation=1, seed=3, learning_rate=1e-5, device="cpu")
        ),
        samples=[{**s, "labels": [i] * len(s["labels"])} for i, s in enumerate(samples)],
        collator=Collator(),
    )
    return [int(batch["labels"][0, 0]) for batch in trainer.get_train_dataloader()]


def test_golden_losses():
    # Made with torch 2.13 and transformers 5.23 on a CPU; a change here is a change of every result.
    golden = [3.33873, 3.44591, 3.03989, 2.8936, 2.55849]
    assert [entry["loss"] for entry in tune()[1].losses] == pytest.approx(golden, rel=2e-3)


def test_the_same_seed_gives_the_same_run():
    (one, first), (other, second) = tune(max_steps=3), tune(max_steps=3)
    assert first.losses == second.losses and same_weights(one, other)
    assert tune(seed=4, max_steps=3)[1].losses != first.losses


def test_a_merged_lora_model_is_the_adapted_one():
    adapted, _ = tune(mode="lora", merge_adapter=False, rank=2, learning_rate=1e-2)
    merged, result = tune(mode="lora", rank=2, learning_rate=1e-2)
    assert hasattr(adapted, "peft_config") and not hasattr(merged, "peft_config")
    inputs = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        difference = (adapted.eval()(inputs).logits - merged.eval()(inputs).logits).abs().max()
        change = (make_llama()(inputs).logits - merged(inputs).logits).abs().max()
    assert difference < 1e-5 < 1e-2 < change
    assert result.trainable_parameters < 5000


def test_samples_of_similar_length_go_together_in_a_repeatable_order():
    lengths = [5, 90, 6, 91, 7, 92, 8, 93] * 4
    groups = LengthGroups(lengths, 4, seed=1)
    first, again = list(groups), list(groups)
    assert first == again and sorted(first) == list(range(32)) and len(groups) == 32
    groups.set_epoch(1)
    assert list(groups) != first
    batches = [sorted(lengths[i] for i in first[k : k + 4]) for k in range(0, 32, 4)]
    assert sum(batch[-1] - batch[0] > 10 for batch in batches) <= 2


# -- being interrupted -----------------------------------------------------------------------------------


class Stop(TrainerCallback):
    """Dies without warning at the end of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Slow(TrainerCallback):
    """Takes so many seconds for every step."""

    def __init__(self, seconds):
        self.seconds = seconds

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


@pytest.mark.parametrize(
    ("options", "batching"), [({}, "packed"), ({"mode": "lora", "rank": 2}, "grouped")], ids=["full", "lora"]
)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, options, batching):
    options = {**options, "max_steps": 9, "batching": batching}  # more than two epochs
    straight, expected = tune(**options)
    options |= {"checkpoints": tmp_path, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop(7)], **options)
    # As a kill in the middle of writing leaves it: the newest is cut short.
    newest = tmp_path / "checkpoint-6"
    weights = next(newest.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    earlier = tally_of(tmp_path / "checkpoint-4")
    resumed, result = tune(callbacks=[Slow(0.05)], **options)
    assert result.resumed_from == 4 and result.measured_from == 0
    assert result.losses == expected.losses
    # Time, tokens and padding are those of the whole training.
    assert result.padding_fraction == expected.padding_fraction and result.tokens == expected.tokens
    assert earlier.seconds > 0 and result.seconds >= earlier.seconds + 5 * 0.05
    assert same_weights(straight, resumed)


class Interrupt(TrainerCallback):
    """Presses Ctrl-C in the middle of a step, `times` times."""

    def __init__(self, step, times=1):
        self.step, self.times = step, times

    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(self.times * (state.global_step == self.step)):
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_keeps_the_steps_it_has_done(tmp_path):
    straight, expected = tune(max_steps=5)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Interrupt(1, times=2)], max_steps=5, checkpoints=tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Interrupt(2)], max_steps=5, checkpoints=tmp_path)
    assert signal.getsignal(signal.SIGINT) == handler
    resumed, result = tune(max_steps=5, checkpoints=tmp_path)
    assert result.resumed_from == 3 and result.losses == expected.losses
    assert same_weights(straight, resumed)


def test_a_checkpoint_that_does_not_say_what_was_counted(tmp_path, caplog):
    options = {"max_steps": 4, "checkpoints": tmp_path, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[Stop(3)], **options)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    for tally in ({"seconds": -1.0, "places": 1, "padding": 0}, {"seconds": "x"}, None):
        raw = json.loads(state.read_text())
        raw["stateful_callbacks"][TALLY] = {"args": {}, "attributes": tally}
        state.write_text(json.dumps(raw))
        assert tally_of(state.parent) is None
    result = tune(**options)[1]
    assert (result.resumed_from, result.measured_from) == (2, 2) and "steps 1 to 2" in caplog.text


def make_checkpoint(folder, step):
    model = tune(max_steps=1, checkpoints=folder / "made", save_steps=1)[0]
    assert model is not None
    shutil.move(folder / "made" / "checkpoint-1", folder / f"checkpoint-{step}")


def test_broken_checkpoints_are_passed_over(tmp_path, caplog):
    assert latest_complete_checkpoint(tmp_path) is None
    make_checkpoint(tmp_path, 2)
    faults = {
        4: lambda f: (f / "trainer_state.json").write_text('{"epoch": 1'),
        6: lambda f: (f / "optimizer.pt").unlink(),
        10: lambda f: (f / "scheduler.pt").write_bytes((f / "scheduler.pt").read_bytes()[:50]),
        12: lambda f: (f / "rng_state.pth").unlink(),
        14: lambda f: (f / "model.safetensors").unlink(),
        16: lambda f: (f / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model-2.safetensors"}})
        ),
    }
    for step, damage in faults.items():
        shutil.copytree(tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{step}")
        damage(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert len(caplog.messages) == len(faults)
    assert "model-2.safetensors is missing" in caplog.text and "optimizer.pt" in caplog.text


# -- what goes wrong -------------------------------------------------------------------------------------


class BadGradient(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == 4:
            weight = next(p for p in kwargs["model"].parameters() if p.requires_grad)
            weight.register_hook(lambda grad: grad * float("inf"))


def test_a_nan_gradient_stops_before_any_damage_is_saved(tmp_path):
    with pytest.raises(NonFiniteError, match="The gradient at step 4 is NaN or Inf") as caught:
        tune(callbacks=[BadGradient()], checkpoints=tmp_path, save_steps=1, max_steps=200)
    assert caught.value.exit_code == 5
    assert latest_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"


def test_a_nan_loss_stops():
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        tune(model)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="'full', 'lora' or 'qlora'"):
        tune(mode="adapters")
    with pytest.raises(ConfigError, match="'packed', 'grouped' or 'padded'"):
        tune(batching="bucketed")
    with pytest.raises(ConfigError, match="batchsize: Extra inputs") as caught:
        tune(batchsize=4)
    assert "batch_size" in caught.value.hint
    with pytest.raises(ConfigError, match=r"learning_rate: .*greater than 0 \(given: 0\)"):
        tune(learning_rate=0)
    with pytest.raises(ConfigError, match="needs a GPU"):
        tune(liger=True)
    with pytest.raises(DataError, match="empty"):
        finetune(make_llama(), [], collator=Collator())
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        check_trackers(["wandbb"])
    with pytest.raises(ConfigError, match="not installed"):
        check_trackers("clearml")
    check_trackers("none")
    check_trackers("all")
    with pytest.raises(ConfigError, match="float32 weights"):
        tune(make_llama().to(torch.float16), precision="fp16")


@pytest.mark.parametrize(
    ("samples", "batch", "accumulation", "epochs", "steps"),
    [(16, 4, 1, 1, 4), (17, 4, 1, 1, 5), (16, 4, 3, 2, 4), (3, 8, 8, 3, 3), (100, 8, 8, 0.1, 1)],
)
def test_planned_steps_are_the_trainers(samples, batch, accumulation, epochs, steps):
    options = {"batch_size": batch, "accumulation": accumulation, "epochs": epochs}
    assert planned_steps(samples, FinetuneOptions(**options)) == steps
    if samples <= 17:
        assert tune(samples=make_samples(samples), max_steps=None, **options)[1].steps == steps


def test_arguments_mean_what_they_say(recwarn):
    chosen = training_arguments(FinetuneOptions(learning_rate=1e-5, device="cpu"))
    assert chosen.gradient_checkpointing is False
    assert not [w for w in recwarn if "checkpointing" in str(w.message)]
    assert chosen.get_warmup_steps(1000) == 30
    assert (chosen.bf16, chosen.fp16, chosen.weight_decay) == (False, False, 0.1)
    options = FinetuneOptions(
        learning_rate=1e-5,
        gradient_checkpointing=True,
        warmup=5,
        precision="bf16",
        compile=True,
        device="cpu",
    )
    other = training_arguments(options)
    assert other.torch_compile and not chosen.torch_compile and not chosen.use_liger_kernel
    assert other.gradient_checkpointing and other.bf16 and other.get_warmup_steps(1000) == 5


def test_single_options_change_a_copy_of_the_object():
    options = FinetuneOptions(batch_size=4, accumulation=1, max_steps=2, device="cpu")
    losses = [
        finetune(make_llama(), make_samples(16), options, collator=Collator(), **changes)[1].losses
        for changes in ({}, {"seed": 5}, {})
    ]
    assert losses[0] == losses[2] != losses[1] and options.seed == 0


def test_liger_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ConfigError, match="needs a GPU"):
        check_liger("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gradpruner.training.checks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="liger-kernel is not installed") as caught:
        check_liger("auto")
    assert "gradpruner[gpu]" in str(caught.value.hint)
    monkeypatch.setattr("gradpruner.training.checks.find_spec", lambda name: object())
    check_liger("auto")


def test_progress_shows_steps_and_loss(capsys):
    set_mode("auto")
    tune(max_steps=3, description="finetune merged")
    shown = capsys.readouterr()
    assert shown.out == "" and "finetune merged 3/3 loss" in shown.err
    silent = ProgressCallback("x")
    silent.on_step_end(None, SimpleNamespace(global_step=1), None)  # an event before the start is harmless
