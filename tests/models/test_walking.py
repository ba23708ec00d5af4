"""Layers run one by one must be the model, and models for which they are not must be refused."""

import copy

import pytest
import torch
from conftest import make_model
from families import make_family_model
from repairs import collate, dropping, make_ids
from torch import nn

from gradpruner.common.errors import DataError, ModelError, NonFiniteError
from gradpruner.models.layers import LayeredModel
from gradpruner.models.walking import Walk, drawn, sample_batches
from gradpruner.pruning.in_memory import prune_
from gradpruner.pruning.repair.target import target_of

CPU = torch.device("cpu")


def make_walk(model, rows=None, size=8):
    batches = list(sample_batches(rows or make_ids(), collate, CPU, size))
    return Walk(LayeredModel(model), batches)


def walked(model, walk, layers):
    """Logits of every batch after the given layers, norm and head as the model has them."""
    states = list(walk.start)
    for layer in layers:
        states = walk.layer(layer, states)
    with torch.no_grad():
        return [model.lm_head(model.model.norm(state)) for state in states]


def logits_of(model, batches):
    with torch.no_grad():
        return [
            model(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False).logits
            for b in batches
        ]


def assert_equal_where_real(found, expected, batches):
    for one, other, batch in zip(found, expected, batches, strict=True):
        mask = batch["attention_mask"].bool()
        torch.testing.assert_close(one[mask], other[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_walking_every_layer_is_the_model(model_type):
    model = make_model(model_type)
    walk = make_walk(model)
    assert len(walk.batches) == 5
    assert_equal_where_real(walked(model, walk, range(6)), logits_of(model, walk.batches), walk.batches)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "gemma3_text"])
def test_skipping_equals_deleting(model_type):
    model = make_model(model_type)
    walk = make_walk(model)
    found = walked(model, walk, (0, 2, 5))
    pruned = prune_(copy.deepcopy(model), dropping([1, 3, 4]))
    assert_equal_where_real(found, logits_of(pruned, walk.batches), walk.batches)


def test_the_longest_samples_come_first_and_none_is_lost():
    rows = make_ids(19)
    batches = list(sample_batches(rows, collate, CPU, 4))
    lengths = [int(n) for b in batches for n in b["attention_mask"].sum(1)]
    assert lengths == sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 4, 4, 3]


def test_padding_and_first_tokens_do_not_count():
    rows = [
        {"input_ids": [1, 5, 6, 7], "labels": []},
        {"input_ids": [1, 5], "labels": []},
        {"input_ids": [1]},
    ]
    walk = make_walk(make_model(), rows)
    assert walk.counted[0].tolist() == [
        [False, True, True, True],
        [False, True, False, False],
        [False, False, False, False],
    ]


def test_a_batch_of_single_tokens_is_no_fault_unless_there_is_nothing_else():
    rows = [{"input_ids": [1, 5, 6]}, {"input_ids": [1]}, {"input_ids": [2]}]
    assert [bool(counted.any()) for counted in make_walk(make_model(), rows, size=1).counted] == [
        True,
        False,
        False,
    ]
    with pytest.raises(DataError, match="single token"):
        make_walk(make_model(), rows[1:])
    with pytest.raises(DataError, match="no training samples"):
        Walk(LayeredModel(make_model()), [])


def test_drawing_repeats_nothing_and_depends_on_the_seed():
    rows = make_ids(30)
    found = drawn(rows, 12, 1)
    assert len({id(row) for row in found}) == 12 and found == drawn(rows, 12, 1) != drawn(rows, 12, 2)
    assert len(drawn(rows, 100, 1)) == 30
    with pytest.raises(DataError):
        drawn([], 3, 0)


class KeepsForLater(nn.Module):
    """A layer that adds what another layer was given last, wherever that came from."""

    def __init__(self, layer, shared, writes):
        super().__init__()
        self.layer, self.shared, self.writes = layer, shared, writes

    def forward(self, hidden_states, **kwargs):
        output = self.layer(hidden_states, **kwargs)
        if self.writes:
            self.shared["state"] = hidden_states
            return output
        return output + self.shared["state"]


class Overwrites(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        output = self.layer(hidden_states, **kwargs)
        hidden_states.mul_(0.5)
        return output


def test_a_layer_that_reads_what_an_earlier_one_left_is_refused():
    model, shared = make_model(), {}
    for layer in (1, 4):
        model.model.layers[layer] = KeepsForLater(model.model.layers[layer], shared, writes=layer == 1)
    with pytest.raises(ModelError, match="one by one"):
        make_walk(model)


def test_a_layer_that_overwrites_what_it_is_given_is_refused():
    model = make_model()
    model.model.layers[2] = Overwrites(model.model.layers[2])
    with pytest.raises(ModelError, match="one by one"):
        make_walk(model)


class Between(nn.ModuleList):
    """Layers with something between the third and the fourth that belongs to neither."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if not isinstance(index, slice):
            return found
        layers = list(found)
        fourth = layers[3]
        layers[3] = lambda state, *args, **kwargs: fourth(state * 1.01, *args, **kwargs)
        return layers


def test_a_model_that_does_something_between_its_layers_is_refused():
    model = make_model()
    model.model.layers = Between(model.model.layers)
    with pytest.raises(ModelError, match="one by one"):
        make_walk(model)


def test_shared_keys_and_values_are_refused():
    with pytest.raises(ModelError, match="one by one"):
        make_walk(make_family_model("gemma4_text"))


def test_forwards_that_others_have_replaced_are_put_back():
    model = make_model()
    layer, calls = model.model.layers[2], []
    original = layer.forward

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    layer.forward = counting
    walk = make_walk(model)
    assert layer.__dict__["forward"] is counting and calls
    assert all("forward" not in m.__dict__ for i, m in enumerate(model.model.layers) if i != 2)
    assert len(walk.start) == 5


def test_nan_is_told_apart_from_a_model_that_cannot_be_walked():
    model = make_model()
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.mul_(float("inf"))
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        make_walk(model)


def found_output(model, layer=2):
    walk = make_walk(model)
    state = walk.start
    for index in range(layer):
        state = walk.layer(index, state)
    return target_of(LayeredModel(model), walk, layer, state[0]), walk, state


def test_the_last_linear_is_found_and_its_factor():
    output, _, _ = found_output(make_model())
    assert (output.name, output.factor, output.offset) == ("mlp.down_proj", 1.0, None)
    assert output.weight.shape == (32, 48)
    granite = make_family_model("granite", residual_multiplier=0.22)
    output, _, _ = found_output(granite)
    assert output.name == "mlp.down_proj"
    assert output.factor == pytest.approx(0.22, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "name", "offset"),
    [
        ("gemma2", "post_feedforward_layernorm", 1.0),
        ("olmo2", "post_feedforward_layernorm", 0.0),
        ("glm4", "post_mlp_layernorm", 0.0),
    ],
)
def test_a_norm_behind_the_last_linear_is_found_and_what_it_adds_to_its_weight(model_type, name, offset):
    model = make_family_model(model_type)
    before = {n: p.clone() for n, p in model.named_parameters()}
    output, _, _ = found_output(model)
    assert (output.name, output.factor, output.offset) == (name, 1.0, offset)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_massive_activations_in_16_bits_do_not_hide_the_output():
    model = make_model()
    with torch.no_grad():  # every token carries 3000 in one channel; bf16 rounds that to steps of 16
        model.model.embed_tokens.weight[:, 5] = 3000.0
    output, _, _ = found_output(model.to(torch.bfloat16))
    assert (output.name, output.factor) == ("mlp.down_proj", 1.0)


class Squares(nn.Module):
    """A layer that squares what it adds."""

    def __init__(self, layer):
        super().__init__()
        self.mlp = layer.mlp

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.mlp(hidden_states).square()


def test_a_layer_whose_last_linear_is_not_added_as_it_is_is_refused():
    model = make_model()
    model.model.layers[2] = Squares(model.model.layers[2])
    with pytest.raises(ModelError, match="not the output of a single linear or norm"):
        found_output(model)


def test_experts_are_refused():
    with pytest.raises(ModelError, match="mixture of experts"):
        found_output(make_family_model("mixtral"))
