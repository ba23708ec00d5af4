"""Logit distillation: the loss against references, and a student that learns what its teacher predicts."""

import math

import pytest
import torch
from builders import make_llama, make_samples
from torch.nn import functional

from gradpruner.common.errors import ConfigError, DataError, ModelError, NonFiniteError, ShapeError
from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.training import teacher as teaching
from gradpruner.training.distillation import distil
from gradpruner.training.finetuning import training_arguments
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.teacher import DistillationTrainer, distillation_loss

COUNTED = torch.tensor([[True, True, False, True], [False, True, False, False]])


def random_logits(seed, dtype=torch.float32, vocabulary=7):
    return torch.randn(2, 4, vocabulary, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(student, teacher, counted, temperature):
    """Gathered tokens, through torch's own divergence."""
    return temperature**2 * functional.kl_div(
        functional.log_softmax(student[counted] / temperature, dim=-1),
        functional.softmax(teacher[counted] / temperature, dim=-1),
        reduction="batchmean",
    )


# --- the loss -----------------------------------------------------------------------------------------------


def test_two_classes_by_hand():
    teacher = torch.tensor([[math.log(3.0), 0.0]])  # p = 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]], requires_grad=True)  # q = 1/2, 1/2
    loss = distillation_loss(student, teacher, torch.tensor([True]))
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    loss.backward()
    assert student.grad.tolist() == [pytest.approx([-0.25, 0.25])]  # q - p


def test_two_classes_at_temperature_two_by_hand():
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])  # halved: p = 3/4, 1/4
    student = torch.zeros(1, 2, requires_grad=True)
    loss = distillation_loss(student, teacher, torch.tensor([True]), temperature=2.0)
    assert loss.item() == pytest.approx(4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5)))
    loss.backward()
    assert student.grad.tolist() == [pytest.approx([-0.5, 0.5])]  # T (q - p)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk", [1, 14, 2**24])
def test_loss_and_gradient_are_those_of_torch(temperature, chunk, monkeypatch):
    monkeypatch.setattr(teaching, "_CHUNK", chunk)  # one, two and all positions at a time
    ours, theirs = (random_logits(0).requires_grad_() for _ in range(2))
    teacher = random_logits(1)
    loss = distillation_loss(ours, teacher, COUNTED, temperature)
    expected = reference(theirs, teacher, COUNTED, temperature)
    (3 * loss).backward()
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert not ours.grad[~COUNTED].any()


def test_gradient_by_differences():
    student = random_logits(0, torch.float64).requires_grad_()
    teacher = random_logits(1, torch.float64)
    assert torch.autograd.gradcheck(lambda x: distillation_loss(x, teacher, COUNTED, 2.0), student)


def test_16_bit_logits_are_compared_in_32():
    student, teacher = random_logits(0, torch.bfloat16).requires_grad_(), random_logits(1, torch.bfloat16)
    loss = distillation_loss(student, teacher, COUNTED)
    assert loss.dtype == torch.float32
    expected = reference(student.detach().float(), teacher.float(), COUNTED, 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert student.grad.dtype == torch.bfloat16


def test_the_same_logits_diverge_by_nothing_and_nothing_counted_is_zero():
    logits = random_logits(0)
    assert float(distillation_loss(logits, logits, COUNTED)) == pytest.approx(0, abs=1e-7)
    assert float(distillation_loss(logits, random_logits(1), torch.zeros_like(COUNTED))) == 0


def test_other_shapes_and_temperatures_are_refused():
    with pytest.raises(ShapeError, match="the teacher's vocabulary"):
        distillation_loss(random_logits(0), random_logits(0, vocabulary=8), COUNTED)
    with pytest.raises(ShapeError, match="positions are marked"):
        distillation_loss(random_logits(0), random_logits(0), COUNTED[:, 1:])
    with pytest.raises(ConfigError, match="temperature is 0"):
        distillation_loss(random_logits(0), random_logits(0), COUNTED, 0)


# --- the training -------------------------------------------------------------------------------------------

OPTIONS = {"collator": Collator(), "batch_size": 4, "device": "cpu", "precision": "fp32"}


def student_and_teacher(**changes):
    return make_llama(seed=1, num_hidden_layers=2, **changes), make_llama(seed=0)


def divergence(student, teacher, samples, learned="all"):
    """Mean over tokens, one sample at a time."""
    total, count = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        counted = torch.tensor([sample["labels"][1:]]) != IGNORED if learned == "answers" else ids[:, 1:] >= 0
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[:, :-1][counted] for model in (student, teacher)]
        log_q, log_p = (functional.log_softmax(x.double(), dim=-1) for x in logits)
        total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
        count += len(log_q)
    return total / count


@pytest.mark.parametrize(
    ("batching", "tokens"),
    [("padded", "all"), ("grouped", "answers"), ("packed", "all"), ("packed", "answers")],
)
def test_the_first_loss_is_the_divergence_whatever_the_layout(batching, tokens):
    student, teacher = student_and_teacher()
    samples = make_samples(8)
    expected = divergence(student, teacher, samples, tokens)
    # Two forward passes a step: their tokens together make the mean.
    found = distil(
        student, teacher, samples, **OPTIONS, accumulation=2, max_steps=1, tokens=tokens, batching=batching
    )
    assert found["losses"][0]["loss"] == pytest.approx(expected, rel=1e-4)
    assert found["batching"] == batching and found["steps"] == 1


def test_the_student_learns_and_the_teacher_does_not():
    student, teacher = student_and_teacher()
    samples = make_samples(8)
    before = divergence(student, teacher, samples)
    found = distil(student, teacher, samples, **OPTIONS, epochs=15, learning_rate=1e-2)
    assert found["steps"] == 30
    assert divergence(student, teacher, samples) < 0.3 * before
    dense = make_llama(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), dense.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert not student.training and not teacher.training


def test_the_same_for_the_same_seed():
    weights = []
    for _ in range(2):
        student, teacher = student_and_teacher()
        found = distil(student, teacher, make_samples(8), **OPTIONS, max_steps=3, seed=5)
        weights.append((list(student.parameters()), found["losses"]))
    (one, losses), (other, other_losses) = weights
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_rate_rises_and_falls_to_a_tenth():
    student, teacher = student_and_teacher()
    found = distil(student, teacher, make_samples(8), **OPTIONS, max_steps=20, learning_rate=1e-3)
    rates = [entry["learning_rate"] for entry in found["losses"]]
    assert rates[0] == pytest.approx(0) and max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 2  # a tenth of the steps
    assert rates[-1] == pytest.approx(1e-4, rel=0.1) and rates[2:] == sorted(rates[2:], reverse=True)


def test_a_student_in_16_bits_is_trained_in_32():
    student, teacher = student_and_teacher()
    student.to(torch.bfloat16)
    student.model.rotary_emb.inv_freq = student.model.rotary_emb.inv_freq.float() + 1e-4
    angles = student.model.rotary_emb.inv_freq.clone()
    seen = []
    student.model.embed_tokens.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    before = student.model.layers[0].mlp.up_proj.weight.clone()
    distil(student, teacher, make_samples(8), **OPTIONS, max_steps=2, warmup=0, learning_rate=1e-2)
    assert torch.float32 in seen
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert torch.equal(student.model.rotary_emb.inv_freq, angles)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, before)


class EndsEarly(Collator):
    """Interrupts a run at its fourth batch."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def __call__(self, features):
        self.batches += 1
        if self.batches > 3:
            raise KeyboardInterrupt
        return super().__call__(features)


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    def train(**changes):
        student, teacher = student_and_teacher()
        options = {"max_steps": 4, "learning_rate": 1e-3, "batching": "padded"}
        return student, distil(student, teacher, make_samples(8), **(OPTIONS | options | changes))

    kept = {"checkpoints": tmp_path, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(collator=EndsEarly(), **kept)
    resumed, found = train(**kept)
    whole, _ = train()
    assert found["resumed_from"] == 2
    assert all(torch.allclose(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_teacher_too_makes_logits_only_where_something_is_learned():
    student, teacher = student_and_teacher()
    shapes = []
    teacher.lm_head.register_forward_hook(lambda _module, _args, out: shapes.append(tuple(out.shape)))
    sample = {"input_ids": [1, 4, 5, 6, 7, 2], "labels": [IGNORED] * 4 + [7, 2]}
    trainer = DistillationTrainer(
        teacher=teacher,
        model=student,
        args=training_arguments(
            FinetuneOptions(batch_size=2, accumulation=1, max_steps=1, learning_rate=1e-5, device="cpu")
        ),
        samples=[sample, sample],
        collator=Collator(),
    )
    trainer.train()
    assert shapes == [
        (2, 3, student.config.vocab_size)
    ]  # before 7, before 2, and at 2, which nothing follows


def test_a_teacher_that_cannot_be_packed_decides_the_layout(monkeypatch):
    student, teacher = student_and_teacher()
    monkeypatch.setattr(teaching, "packing_fault", lambda model, *_: "x" if model is teacher else "")
    found = distil(student, teacher, make_samples(4), **OPTIONS, max_steps=1)
    assert found["batching"] == "grouped (the teacher: x)"


@pytest.mark.parametrize(
    ("change", "error", "fault"),
    [
        ({"batching": "none"}, ConfigError, "batching: .*'none'"),
        ({"temperature": -1.0}, ConfigError, "temperature: .*-1.0"),
    ],
)
def test_options_that_are_not_allowed(change, error, fault):
    with pytest.raises(error, match=fault):
        distil(*student_and_teacher(), make_samples(4), **OPTIONS, **change)


def test_without_anything_to_learn_from():
    unlearned = [{"input_ids": [1, 4, 5], "labels": [IGNORED] * 3}]
    with pytest.raises(DataError, match="no samples to distil on"):
        distil(*student_and_teacher(), [], **OPTIONS)
    with pytest.raises(DataError, match="No token of the samples"):
        distil(*student_and_teacher(), unlearned, **OPTIONS, tokens="answers")
    assert distil(*student_and_teacher(), unlearned, **OPTIONS, max_steps=1)["steps"] == 1


def test_models_that_cannot_be_trained():
    student, teacher = student_and_teacher()
    with torch.no_grad():
        teacher.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        distil(student, teacher, make_samples(4), **OPTIONS, max_steps=1)
    linear = student.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        distil(student, make_llama(), make_samples(4), **OPTIONS, max_steps=1)
    with pytest.raises(ShapeError, match="the teacher's vocabulary"):
        distil(make_llama(vocab_size=30), make_llama(), make_samples(4), **OPTIONS, max_steps=1)
