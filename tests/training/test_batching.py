import math

import pytest
import torch
from builders import make_llama, make_samples
from families import make_family_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import Trainer

from gradpruner.data.encoding import IGNORED, Collator
from gradpruner.training.adapters import attach_lora
from gradpruner.training.batching import (
    PackedCollator,
    attention_tokens,
    choose_rows,
    fill_rows,
    lay_out,
    packing_fault,
)
from gradpruner.training.finetuning import finetune, training_arguments
from gradpruner.training.options import FinetuneOptions
from gradpruner.training.trainer import CausalTrainer

I = IGNORED  # noqa: E741
SAMPLES = [
    {"input_ids": [1, 5, 6, 2], "labels": [I, I, 6, 2]},
    {"input_ids": [1, 7, 8, 9, 10, 2], "labels": [1, I, I, 9, 10, 2]},
    {"input_ids": [1, 2], "labels": [I, 2]},
]


pytestmark = pytest.mark.usefixtures("quiet")


def long_samples(count, vocabulary, seed=0):
    """Samples of 3 to 21 tokens; a few at the end are learned, and in every third also one in the middle."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = 3 + int(torch.randint(0, 19, (), generator=generator))
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        labels = [I] * (length - 2) + ids[-2:]
        if index % 3 == 0:
            labels[length // 2] = ids[length // 2]
        samples.append({"input_ids": ids, "labels": labels})
    return samples


# -- rows ------------------------------------------------------------------------------------------------


def test_the_next_longest_goes_to_the_emptiest_row():
    assert fill_rows([4, 6, 2, 5, 6], 2) == [[1, 3], [4, 0, 2]]  # 6 5 and 6 4 2
    assert fill_rows([3, 3, 3], 3) == [[0], [1], [2]]
    assert fill_rows([3, 3, 3], 1) == [[0, 1, 2]]


def test_the_number_of_rows_is_the_cheapest():
    # One row of 24: 24 (1 + 24 / 8) = 96. Two of 12: 24 (1 + 12 / 8) = 60. Three of 8 or more: 8 + 8 + 8.
    assert choose_rows([8, 6, 6, 2, 2], 8) == [[0], [1, 3], [2, 4]]
    # Two rows of 9 have 18 places for 10 tokens, one of 10 wastes none.
    assert choose_rows([9, 1], 100) == [[0, 1]]
    assert choose_rows([9, 1], 1) == [[0, 1]]
    assert choose_rows([9, 8], 1) == [[0], [1]]
    # Where masked places cost nothing there is one row.
    assert choose_rows([9, 9, 9]) == [[0, 1, 2]]


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=24)


@given(LENGTHS, st.sampled_from([1.0, 20.0, 400.0, math.inf]))
@settings(max_examples=150, deadline=None)
def test_every_token_stands_in_the_rows_once(lengths, tokens):
    samples, count = [], 10
    for length in lengths:
        ids = list(range(count, count + length))  # no token twice
        samples.append({"input_ids": ids, "labels": ids})
        count += length
    rows = choose_rows(lengths, tokens)
    assert rows == choose_rows(lengths, tokens)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    batch, places = lay_out(samples, rows, pad_token_id=3)
    assert sorted(batch["input_ids"][batch["input_ids"] != 3].tolist()) == list(range(10, count))
    for sample, (row, start) in zip(samples, places, strict=True):
        here = (row, slice(start, start + len(sample["input_ids"])))
        assert batch["input_ids"][here].tolist() == sample["input_ids"]
        assert batch["labels"][here].tolist() == [I, *sample["labels"][1:]]
        assert batch["position_ids"][here].tolist() == list(range(len(sample["input_ids"])))
    number, width = batch["input_ids"].shape
    assert int(batch["padding"]) == number * width - sum(lengths)
    if math.isinf(tokens):
        assert number == 1
    else:  # never more than padding costs, in places and in attention
        longest = max(lengths)
        padded = len(lengths) * longest * (1 + longest / tokens)
        assert number * width * (1 + width / tokens) <= padded * (1 + 1e-9)
    for row in rows:  # equal lengths in the order they came
        assert [(-lengths[i], i) for i in row] == sorted((-lengths[i], i) for i in row)


def test_a_batch_end_to_end():
    batch, places = lay_out(SAMPLES, [[1], [0, 2]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 7, 8, 9, 10, 2], [1, 5, 6, 2, 1, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 1]]
    assert batch["labels"].tolist() == [[I, I, I, 9, 10, 2], [I, I, 6, 2, I, 2]]
    assert int(batch["padding"]) == 0 and places == [(1, 0), (0, 0), (1, 4)]
    batch, places = lay_out(SAMPLES[:2], [[0], [1]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[0, 0, 1, 5, 6, 2], [1, 7, 8, 9, 10, 2]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert int(batch["padding"]) == 2 and places == [(0, 2), (1, 0)]


def test_rows_are_as_long_as_attention_allows():
    model = make_llama()
    assert attention_tokens(model.config) == 2 * 16
    model.config._attn_implementation = "flash_attention_2"
    assert math.isinf(attention_tokens(model.config))
    assert PackedCollator(math.inf)(SAMPLES)["input_ids"].shape == (1, 12)
    assert PackedCollator(1)(SAMPLES)["input_ids"].shape == (2, 6)


# -- the same training -------------------------------------------------------------------------------------


def train(build, samples, *, packed, adapters, accumulation, steps=3):
    """Losses and trained weights of our packed path, or of the plain Trainer with padding and all logits."""
    model = build()
    torch.manual_seed(1)
    if adapters:
        model = attach_lora(model, rank=2, dropout=0.0)
    else:
        model.requires_grad_(True)
    settings = {"learning_rate": 1e-3, "batch_size": 4, "accumulation": accumulation, "max_steps": steps}
    arguments = training_arguments(FinetuneOptions(**settings, seed=5, device="cpu"))
    if packed:
        trainer = CausalTrainer(
            model=model, args=arguments, samples=samples, collator=Collator(), batching="packed"
        )
        assert trainer.batching == "packed"
    else:
        trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=Collator())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("family", "adapters", "accumulation"),
    [
        ("llama", False, 3),
        ("llama", True, 1),
        ("gemma2", False, 1),
        ("gemma2", True, 3),
        ("qwen2", True, 1),
        ("gpt2", False, 3),
    ],
)
def test_packed_training_is_padded_training(family, adapters, accumulation):
    def build():
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
        options = {"max_window_layers": 1} if family == "qwen2" else {}
        return make_family_model(family, num_hidden_layers=2, **quiet, **options)

    samples = long_samples(30, 64)
    options = {"adapters": adapters, "accumulation": accumulation}
    losses, weights = train(build, samples, packed=True, **options)
    expected, others = train(build, samples, packed=False, **options)
    assert losses == pytest.approx(expected, rel=1e-5) and len(losses) == 3
    assert weights.keys() == others.keys() and weights
    for name, weight in weights.items():
        if name.endswith("c_attn.bias"):  # the gradient of a key bias is 0, and AdamW enlarges its rounding
            weight[32:64] = others[name][32:64] = 0
        torch.testing.assert_close(weight, others[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt2"])
def test_attention_stays_inside_a_sample(family):
    model = make_family_model(family)
    first, other, second, third = long_samples(4, 64, seed=2)
    other = {"input_ids": [3] * len(first["input_ids"]), "labels": first["labels"]}

    def losses(*samples):
        batch, places = lay_out(samples, [[0, 1, 2]])
        with torch.no_grad():
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits
        parts = []
        for sample, (row, start) in zip(samples, places, strict=True):
            end = start + len(sample["input_ids"])
            labels = batch["labels"][row, start + 1 : end]
            parts.append(float(nn.functional.cross_entropy(logits[row, start : end - 1], labels)))
        return parts

    before, after = losses(first, second, third), losses(other, second, third)
    assert before[1:] == after[1:] and before[0] != after[0]


# -- models that cannot be packed ----------------------------------------------------------------------------

CHANGED = "packing changes what this model computes"


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        *((family, "") for family in ("llama", "gemma3_text", "cohere2", "granitemoe", "qwen3_moe", "olmo3")),
        ("deepseek_v3", ""),
        ("bloom", CHANGED),  # ALiBi
        ("mpt", CHANGED),  # ALiBi, and no positions at all
        ("opt", CHANGED),  # counts positions from the mask
        ("jamba", CHANGED),  # a state runs along the row
        ("lfm2", CHANGED),  # a convolution of three tokens
        ("qwen3_next", CHANGED),  # linear attention
        ("gpt_oss", CHANGED),  # its masks are not told positions
    ],
)
def test_a_trial_finds_the_models_that_must_not_be_packed(family, fault):
    model = make_family_model(family).train()
    assert packing_fault(model, long_samples(6, 64)) == fault
    assert model.training


@pytest.mark.parametrize(("family", "fault"), [("llama", ""), ("granitemoe", ""), ("lfm2", CHANGED)])
def test_the_trial_sees_through_the_rounding_of_16_bits(family, fault):
    assert packing_fault(make_family_model(family).to(torch.bfloat16), long_samples(6, 64)) == fault


def test_a_trial_that_ends_in_an_error_says_so():
    class Refusing(nn.Linear):
        def forward(self, x):
            if x.shape[:2] == (2, 19):  # the packed rows
                raise ValueError("no")
            return super().forward(x)

    model = make_llama()
    model.lm_head.__class__ = Refusing
    assert packing_fault(model, make_samples(3)) == "this model does not take packed rows: ValueError"


def tune(model, samples, **options):
    defaults = {"batch_size": 4, "accumulation": 2, "learning_rate": 1e-3, "device": "cpu", "max_steps": 3}
    return finetune(model, samples, collator=Collator(), **{**defaults, **options})[1]


def test_what_cannot_be_packed_is_grouped_and_says_so():
    samples = long_samples(16, 64)
    model = make_family_model("bloom")
    grouped = tune(model, samples, batching="grouped")
    fallback = tune(make_family_model("bloom"), samples, batching="packed")
    assert grouped.batching == "grouped" and fallback.batching == f"grouped ({CHANGED})"
    assert fallback.losses == grouped.losses
    assert fallback.padding_fraction == grouped.padding_fraction > 0


def test_the_share_of_padding_is_measured():
    samples = [{"input_ids": [1] * n, "labels": [I] * (n - 1) + [1]} for n in (4, 8, 12, 6)]
    options = {"max_steps": None, "epochs": 1.0, "accumulation": 1}
    padded = tune(make_llama(), samples, batching="padded", **options)
    assert padded.batching == "padded" and padded.padding_fraction == 18 / 48
    # 12 + 4 and 8 + 6 in two rows of 16 cost 32 (1 + 16 / 32), three rows of 12 would 36 (1 + 12 / 32).
    packed = tune(make_llama(), samples, batching="packed", **options)
    assert packed.batching == "packed" and packed.padding_fraction == 2 / 32
    assert packed.losses[0]["loss"] == pytest.approx(padded.losses[0]["loss"], rel=1e-5)
    assert packed.tokens == padded.tokens == 30
