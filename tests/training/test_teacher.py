"""Fine-tuning with a teacher: loss and gradients against a loop over samples with torch's own functions."""

import math

import pytest
import torch
from builders import make_llama, make_samples
from pydantic import ValidationError
from torch.nn import functional
from transformers import TrainerCallback

from gradpruner.common.errors import ConfigError, DataError, ModelError, NonFiniteError, ShapeError
from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.training import teacher as teaching
from gradpruner.training.finetuning import finetune, training_arguments
from gradpruner.training.options import DistillationOptions, FinetuneOptions
from gradpruner.training.teacher import DistillationTrainer

I = IGNORED  # noqa: E741


pytestmark = pytest.mark.usefixtures("quiet")


# Answers of 1 to 3 tokens, at the end and elsewhere; the padding token among prompts; nothing learned.
SAMPLES = [
    {"input_ids": [1, 5, 0, 6, 7, 2], "labels": [I, I, I, I, 7, 2]},
    {"input_ids": [1, 9, 8], "labels": [I, I, 8]},
    {"input_ids": [1, 4, 5, 6, 7, 8, 9, 10, 2], "labels": [I, I, I, I, I, 8, 9, 10, I]},
    {"input_ids": [0, 0, 11, 2], "labels": [I, I, 11, 2]},
    {"input_ids": [1, 6, 12, 13], "labels": [I, 6, I, 13]},
    {"input_ids": [1, 7, 7, 7, 7], "labels": [I, I, I, I, I]},
    {"input_ids": [9, 8, 7, 6], "labels": [9, 8, 7, 6]},
    {"input_ids": [1, 14, 15, 16, 17, 18, 2], "labels": [I, I, I, I, I, 18, 2]},
]
DEFAULTS = DistillationOptions()
WEIGHTS = {
    "defaults": DEFAULTS,
    "labels": DistillationOptions(ce=2, answers=0, prompts=0),
    "answers": DistillationOptions(ce=0, answers=1.5, prompts=0),
    "prompts": DistillationOptions(ce=0, answers=0, prompts=0.5),
    "warm": DistillationOptions(ce=0.2, answers=0.5, prompts=0.3, temperature=2.5),
}


def make_pair(**changes):
    return make_llama(seed=1, num_hidden_layers=2, **changes), make_llama(seed=0)


class Gradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            self.found = {
                name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None
            }


def tune(student, teacher=None, options=None, samples=SAMPLES, **changes):
    settings = {"batch_size": 4, "accumulation": 2, "max_steps": 1, "learning_rate": 1e-3, "device": "cpu"}
    settings |= {"collator": Collator(), "max_grad_norm": 0.0, "seed": 3, "precision": "fp32"}
    return finetune(student, samples, teacher=teacher, distillation=options, **(settings | changes))


def reference(student, teacher, options, samples=SAMPLES):
    """The loss and its cross entropy, from one sample at a time; every mean is over all its tokens."""
    t = options.temperature
    sums, counts = torch.zeros(3), torch.zeros(3)
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        learned = torch.tensor(sample["labels"][1:]) != IGNORED
        with torch.no_grad():
            p = (teacher(input_ids=ids).logits[0, :-1] / t).softmax(-1)
        z = student(input_ids=ids).logits[0, :-1]
        kl = functional.kl_div((z / t).log_softmax(-1), p, reduction="none").sum(-1)
        nll = functional.cross_entropy(z, ids[0, 1:], reduction="none")
        sums = sums + torch.stack([nll[learned].sum(), kl[learned].sum(), kl[~learned].sum()])
        counts += torch.tensor([learned.sum(), learned.sum(), (~learned).sum()])
    means = sums / counts
    weights = torch.tensor([options.ce, t**2 * options.answers, t**2 * options.prompts])
    return (weights * means).sum(), float(means[0].detach())


# --- the loss -----------------------------------------------------------------------------------------------


def check_against_reference(options, **changes):
    student, teacher = make_pair()
    plain = make_pair()[0].requires_grad_(True)
    expected, ce = reference(plain, teacher, options)
    expected.backward()
    gradients = Gradients()
    _, result = tune(student, teacher, options, callbacks=[gradients], **changes)
    (entry,) = result.losses
    assert entry["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert ("ce" in entry) == (options.ce > 0)
    if options.ce:
        assert entry["ce"] == pytest.approx(ce, rel=1e-4)
    assert result.batching == changes.get("batching", "packed")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients.found[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "batching"),
    [
        ("defaults", "padded"),
        ("defaults", "packed"),
        ("labels", "grouped"),
        ("answers", "packed"),
        ("prompts", "padded"),
        ("prompts", "packed"),
        ("warm", "grouped"),
    ],
)
def test_loss_and_gradients_are_those_of_a_loop_over_samples(options, batching):
    check_against_reference(WEIGHTS[options], batching=batching)


@pytest.mark.parametrize(
    "changes", [{"batch_size": 8, "accumulation": 1}, {"batch_size": 1, "accumulation": 8}]
)
def test_how_a_step_is_cut_into_passes_does_not_matter(changes):
    check_against_reference(WEIGHTS["warm"], **changes)


def test_a_loss_a_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(teaching, "_CHUNK", 50)  # two positions
    check_against_reference(WEIGHTS["warm"])


def test_nothing_to_distil_in_a_pass_is_no_fault():
    # The only answer of a step is in one of its passes; in the next step there is none at all.
    samples = [{"input_ids": [1, 5, 6], "labels": [I, I, 6]}, *([{"input_ids": [1], "labels": [I]}] * 3)]
    student, teacher = make_pair()
    _, result = tune(student, teacher, DEFAULTS, samples, batch_size=1, max_steps=2)
    losses = sorted(entry["loss"] for entry in result.losses)
    assert losses[0] == 0 and losses[1] > 0


def test_a_teacher_that_agrees_leaves_the_gradient_of_the_labels():
    alone, taught = Gradients(), Gradients()
    tune(make_pair()[0], callbacks=[alone])
    options = DistillationOptions(ce=0.5, answers=3, prompts=2)
    _, result = tune(make_pair()[0], make_pair()[0], options, callbacks=[taught])
    (entry,) = result.losses
    assert entry["loss"] == pytest.approx(0.5 * entry["ce"], abs=1e-6)
    for name, gradient in alone.found.items():
        torch.testing.assert_close(taught.found[name], 0.5 * gradient, rtol=1e-4, atol=1e-6)


def test_without_a_weight_on_prompts_no_logits_are_made_there():
    shapes = []
    for options in (WEIGHTS["answers"], DEFAULTS):
        student, teacher = make_pair()
        for model in (student, teacher):
            model.lm_head.register_forward_hook(lambda _module, _args, out: shapes.append(out.shape[1]))
        tune(student, teacher, options, [SAMPLES[0]] * 8, batching="padded", accumulation=1)
    # Two answer tokens; five tokens that are predicted; and a last place, which the window ends with.
    assert shapes == [3, 3, 6, 6]


def test_16_bit_autocast_gives_about_the_same_loss():
    student, teacher = make_pair()
    _, result = tune(student, teacher, DEFAULTS, precision="bf16")
    expected, _ = reference(*make_pair(), DEFAULTS)
    assert result.losses[0]["loss"] == pytest.approx(expected.item(), rel=0.02)


def test_the_logged_cross_entropy_is_the_mean_since_the_last_entry():
    def losses(interval):
        student, teacher = make_pair()
        settings = {"learning_rate": 1e-2, "batch_size": 4, "accumulation": 1, "max_steps": 5}
        arguments = training_arguments(FinetuneOptions(**settings, device="cpu"), logging_steps=interval)
        trainer = DistillationTrainer(
            teacher=teacher,
            options=DEFAULTS,
            model=student,
            args=arguments,
            samples=SAMPLES,
            collator=Collator(),
        )
        trainer.train()
        return {entry["step"]: entry["ce"] for entry in trainer.state.log_history if "ce" in entry}

    each, some = losses(1), losses(2)
    assert list(some) == [1, 2, 4]  # the first is always logged
    assert some[4] == pytest.approx((each[3] + each[4]) / 2) and some[4] != pytest.approx(each[4])


# --- the training -------------------------------------------------------------------------------------------


def test_adapters_learn_from_a_teacher_and_the_teacher_stays_what_it_is():
    student, teacher = make_pair()
    teacher.train()
    before = reference(student, teacher.eval(), WEIGHTS["answers"])[0]
    options = {"mode": "lora", "rank": 4, "max_steps": 30, "learning_rate": 2e-2}
    trained, result = tune(student, teacher.train(), WEIGHTS["answers"], **options)
    assert reference(trained.eval(), teacher, WEIGHTS["answers"])[0] < 0.5 * before
    assert result.mode == "lora" and result.trainable_parameters < 8000 and not teacher.training
    dense = make_llama(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), dense.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())


class Stop(TrainerCallback):
    """Dies without warning at the end of the fifth step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, mode):
    def run(**changes):
        student, teacher = make_pair()
        settings = {"mode": mode, "rank": 2, "max_steps": 7, "accumulation": 1, "learning_rate": 1e-3}
        return tune(student, teacher, DEFAULTS, make_samples(12), **(settings | changes))

    straight, expected = run()
    kept = {"checkpoints": tmp_path, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        run(callbacks=[Stop()], **kept)
    resumed, result = run(**kept)
    assert result.resumed_from == 4 and result.losses == expected.losses and "ce" in result.losses[-1]
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))


# --- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"ce": -0.1}, "ce"),
        ({"answers": math.nan}, "answers"),
        ({"prompts": math.inf}, "prompts"),
        ({"ce": 0, "answers": 0, "prompts": 0}, "all 0"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
    ],
)
def test_weights_that_mean_nothing_are_refused(values, fault):
    with pytest.raises(ValidationError, match=fault):
        DistillationOptions(**values)


def test_pairs_that_cannot_work_are_refused_before_anything_changes():
    student, teacher = make_pair()
    with pytest.raises(ConfigError, match="no teacher"):
        tune(student, options=DEFAULTS)
    with pytest.raises(ShapeError, match="predicts 21 tokens and its teacher 30"):
        tune(student, make_llama(vocab_size=30), mode="lora")
    with pytest.raises(ConfigError, match="shares weights"):
        tune(student, student, mode="lora")
    assert not any("lora" in name for name, _ in student.named_parameters())
    with pytest.raises(DataError, match="empty"):
        tune(student, teacher, samples=[])
    linear = student.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    for taught in (teacher, None):
        with pytest.raises(ModelError, match="quantised"):
            tune(student, taught)


def test_a_teacher_of_nan_stops_the_training():
    student, teacher = make_pair()
    with torch.no_grad():
        teacher.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        tune(student, teacher)
