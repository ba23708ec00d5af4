"""Methods that the paper compares with, on models in which the right answer is known."""

import math
import random

import pytest
import torch
from builders import pass_through

from gradpruner.common.errors import ConfigError, DataError, NonFiniteError
from gradpruner.data.encoding import Collator
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.angular import layer_values
from gradpruner.models.layers import LayeredModel
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_

SAMPLES = [
    {"input_ids": list(range(3 + i, 8 + 2 * i)), "labels": [-100] * 3 + list(range(6 + i, 8 + 2 * i))}
    for i in range(5)
]


def score(name, model, samples=SAMPLES, **options):
    context = MethodContext(
        num_layers=LayeredModel(model).num_layers,
        seed=0,
        trace=lambda: pytest.fail("no trace is needed"),
        model=lambda: model,
        samples=samples,
        collator=Collator(),
        **options,
    )
    return METHODS.find(name).score(context)


# --- angular distance ---------------------------------------------------------------------------------------


def turning(model, degrees):
    """Makes every layer turn every state by a known angle, so that angles of neighbours add up."""
    for layer, angle in zip(model.model.layers, degrees, strict=True):
        cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))

        def forward(hidden_states, cos=cos, sin=sin, **_):
            x, y = hidden_states.double().chunk(2, dim=-1)
            return torch.cat([cos * x - sin * y, sin * x + cos * y], dim=-1)

        layer.forward = forward
    return model.double()


@pytest.mark.parametrize(
    ("num_keep", "distances", "values", "pruned"),
    [
        (5, [30, 10, 20, 5, 15, 40], [30, 10, 20, 5, 15, 40], [3]),
        (4, [40, 30, 25, 20, 55], [40, 30, 25, 20, 20, 55], [3, 4]),
        (3, [60, 35, 40, 60], [60, 35, 35, 35, 40, 60], [1, 2, 3]),
    ],
)
def test_the_block_with_the_smallest_angle_is_pruned(tiny_llama, num_keep, distances, values, pruned):
    scores = score("angular", turning(tiny_llama(), [30, 10, 20, 5, 15, 40]), num_keep=num_keep)
    as_turns = [angle / 180 for angle in distances]
    assert scores.evidence["distances"] == pytest.approx(as_turns, abs=1e-7)
    assert scores.values == pytest.approx([angle / 180 for angle in values], abs=1e-7)
    assert plan_pruning(scores, num_prune=6 - num_keep, num_merge=0, protect_first=0).pruned == tuple(pruned)
    assert scores.evidence["block_size"] == 6 - num_keep and scores.evidence["samples"] == 5


def test_a_block_that_turns_back_is_found_where_no_single_layer_is_small(tiny_llama):
    scores = score("angular", turning(tiny_llama(), [20, 10, 70, -70, 10, 20]), num_keep=4)
    assert plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0).pruned == (2, 3)
    assert scores.values[2] == pytest.approx(0, abs=1e-7)


def test_of_blocks_that_turn_nothing_the_last_is_pruned(tiny_llama):
    scores = score("angular", pass_through(tiny_llama(), *range(6)), num_keep=3)
    assert max(scores.values) < 1e-7
    assert plan_pruning(scores, num_prune=3, num_merge=0, protect_first=0).pruned == (3, 4, 5)


def test_layers_that_pass_on_their_input_are_pruned(tiny_llama):
    scores = score("angular", pass_through(tiny_llama(), 2, 3), num_keep=4)
    assert plan_pruning(scores, num_prune=2, num_merge=0, protect_first=1).pruned == (2, 3)


def test_the_plan_takes_one_whole_block_however_many_are_equal():
    draw = random.Random(0)
    for _ in range(500):
        size, blocks = draw.randint(1, 6), draw.randint(3, 12)
        distances = [float(draw.randint(0, 3)) for _ in range(blocks)]
        best = max(range(blocks), key=lambda i: (-distances[i], i))
        scores = LayerScores("angular", tuple(layer_values(distances, size)))
        for contiguous in (False, True):
            plan = plan_pruning(scores, num_prune=size, num_merge=0, protect_first=0, contiguous=contiguous)
            assert plan.pruned == tuple(range(best, best + size))


def test_a_protected_layer_in_the_best_block_is_replaced_by_one_of_the_next_best():
    scores = LayerScores("angular", tuple(layer_values([0.1, 0.2, 0.5, 0.4], 3)))
    assert plan_pruning(scores, num_prune=3, num_merge=0, protect_first=0).pruned == (0, 1, 2)
    assert plan_pruning(scores, num_prune=3, num_merge=0, protect_first=1).pruned == (1, 2, 3)


def test_a_block_with_a_protected_layer_is_not_a_candidate():
    distances = [0.1, 0.2, 0.5, 0.4]  # blocks of 3 of 6 layers
    values = layer_values(distances, 3, protected=(0,))
    assert values == [2.1, 0.2, 0.2, 0.2, 0.4, 0.4]
    # Of the blocks 0-2, 1-3, 2-4 and 3-5 only the last is left; layer 0 is in none, 1 and 2 are protected.
    values = layer_values(distances, 3, protected=(1, 2))
    assert values == [1.1, 2.1, 2.1, 0.4, 0.4, 0.4]
    # No block is left: layers are ranked by the best block they belong to, protected layers last.
    assert layer_values(distances, 3, protected=(2, 3)) == [1.1, 1.1, 2.1, 2.2, 1.4, 1.4]


def test_angular_distance_prunes_the_best_block_without_protected_layers(tiny_llama):
    model = turning(tiny_llama(), [1, 2, 30, 10, 5, 3])
    for protected, block in [((), (0, 1)), ((0,), (4, 5)), ((0, 5), (3, 4)), ((1, 4), (2, 3))]:
        scores = score("angular", model, num_keep=4, protected=protected)
        assert (
            plan_pruning(scores, num_prune=2, num_merge=0, protect_first=0, protect=protected).pruned == block
        )
        assert all(map(math.isfinite, scores.values))
        assert set(scores.ascending()[6 - len(protected) :]) == set(protected)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_angles_are_those_of_the_last_token_between_raw_states(tiny_llama, padding_side):
    model, expected = tiny_llama(), torch.zeros(5, dtype=torch.float64)
    raw = []
    hook = model.model.layers[5].register_forward_hook(lambda _module, _args, out: raw.append(out))
    for sample in SAMPLES:  # one by one: no padding that could leak in
        with torch.no_grad():
            states = model(torch.tensor([sample["input_ids"]]), output_hidden_states=True).hidden_states
        states = [state[0, -1].double() for state in [*states[:6], raw[-1]]]
        for layer in range(5):
            cosine = torch.nn.functional.cosine_similarity(states[layer], states[layer + 2], dim=-1)
            expected[layer] += math.acos(cosine) / math.pi / 5
    hook.remove()

    class Left(Collator):
        def __call__(self, features):
            batch = super().__call__(features)
            shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
            return {
                name: torch.stack([row.roll(shift) for row, shift in zip(rows, shifts, strict=True)])
                for name, rows in batch.items()
            }

    collator = Left() if padding_side == "left" else Collator()
    context = MethodContext(6, 0, None, lambda: model, SAMPLES, collator, num_keep=4)
    found = METHODS.find("angular").score(context)
    assert found.evidence["distances"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_streams_of_a_state_are_measured_together():
    from families import make_family_model

    model, states = make_family_model("gemma3n_text"), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(torch.tensor([SAMPLES[4]["input_ids"]]))
    for hook in hooks:
        hook.remove()
    first, third = (states[i][:, 0, -1].flatten().double() for i in (0, 2))
    expected = math.acos(torch.nn.functional.cosine_similarity(first, third, dim=0)) / math.pi
    found = score("angular", model, samples=SAMPLES[4:], num_keep=len(states) - 2)
    assert found.evidence["distances"][0] == pytest.approx(expected, rel=1e-5)


def test_shortgpt_of_a_layer_that_does_nothing_is_zero(tiny_llama):
    found = score("shortgpt", pass_through(tiny_llama(), 3))
    assert found.values[3] == pytest.approx(0, abs=1e-6) and found.ascending()[0] == 3


def test_shortgpt_takes_a_state_in_several_streams():
    from families import make_family_model

    model, pairs = make_family_model("gemma3n_text"), []
    hook = model.model.layers[1].register_forward_hook(lambda _, args, out: pairs.append((args[0], out)))
    with torch.no_grad():
        model(torch.tensor([SAMPLES[4]["input_ids"]]))
    hook.remove()
    before, after = (x[0] if isinstance(x, tuple) else x for x in pairs[0])
    cosines = [
        torch.nn.functional.cosine_similarity(before[:, 0, t].flatten(), after[:, 0, t].flatten(), dim=0)
        for t in range(before.shape[2])
    ]
    found = score("shortgpt", model, samples=SAMPLES[4:])
    assert found.values[1] == pytest.approx(float(1 - torch.stack(cosines).mean()), abs=1e-5)


def test_angular_distance_needs_to_know_how_many_layers_stay(tiny_llama):
    with pytest.raises(ConfigError, match="num_keep is None"):
        score("angular", tiny_llama())


# --- SLEB ---------------------------------------------------------------------------------------------------


def nll_without(model, pruned):
    """Mean loss per learned token of a model that was really pruned, by transformers' own loss."""
    plan = plan_pruning(LayerScores("any", (0.0,) * 6), layers=pruned, num_merge=0, protect_first=0)
    model = prune_(model, plan)
    total, tokens = 0.0, 0
    for sample in SAMPLES:
        count = sum(label != -100 for label in sample["labels"])
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([sample["input_ids"]]), labels=torch.tensor([sample["labels"]])
            ).loss
        total, tokens = total + float(loss) * count, tokens + count
    return total / tokens


def test_sleb_equals_greedy_removal_with_really_pruned_models(tiny_llama):
    first = {layer: nll_without(tiny_llama(), [layer]) for layer in (1, 2, 3, 4)}
    gone = min(first, key=first.get)
    second = {layer: nll_without(tiny_llama(), [gone, layer]) for layer in (1, 2, 3, 4) if layer != gone}
    then, *others = sorted(second, key=second.get)

    scores = score("sleb", tiny_llama(), num_keep=4)
    assert scores.ascending() == [gone, then, *others, 5, 0]
    assert scores.evidence["removed"] == [gone, then]
    found = scores.evidence["nll"]
    assert found == pytest.approx([nll_without(tiny_llama(), []), first[gone], second[then]], rel=1e-5)
    costs = scores.evidence["next_nll"]
    assert costs == pytest.approx({str(layer): second[layer] for layer in others}, rel=1e-5)


def answered_by(model):
    """Samples whose answers the model itself finds likeliest, so that it can only get worse."""
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
        likeliest = [model(torch.tensor([s["input_ids"]])).logits[0].argmax(-1).tolist() for s in SAMPLES]
    return [
        {**sample, "labels": [-100, *found[:-1]]} for sample, found in zip(SAMPLES, likeliest, strict=True)
    ]


def test_sleb_removes_layers_that_do_nothing_first_and_the_later_of_equal_ones(tiny_llama):
    model = pass_through(tiny_llama(), 2, 4)
    scores = score("sleb", model, samples=answered_by(model), num_keep=4)
    assert scores.evidence["removed"] == [4, 2]
    dense, *after = scores.evidence["nll"]
    assert after == [dense, dense] and min(scores.evidence["next_nll"].values()) > dense
    assert plan_pruning(scores, num_prune=2, num_merge=0, protect_first=1).pruned == (2, 4)


def test_sleb_keeps_first_and_last_layer_though_they_do_nothing(tiny_llama):
    scores = score("sleb", pass_through(tiny_llama(), 0, 5), num_keep=2)
    assert scores.ascending()[4:] == [5, 0] and sorted(scores.evidence["removed"]) == [1, 2, 3, 4]


def test_sleb_never_tries_protected_layers(tiny_llama):
    model, passes = pass_through(tiny_llama(), 1, 3), []
    model.register_forward_hook(lambda *_: passes.append(1))
    scores = score("sleb", model, samples=answered_by(model), num_keep=4, protected=(0, 3))
    assert len(passes) - len(SAMPLES) == 1 + 3 + 2
    assert scores.evidence["removed"][0] == 1 and 3 not in scores.evidence["removed"]
    assert "3" not in scores.evidence["next_nll"]
    assert scores.ascending()[3:] == [5, 3, 0] and sorted(scores.values) == [0, 1, 2, 3, 4, 5]


def test_sleb_with_no_layers_between_the_ends(tiny_llama):
    scores = score("sleb", tiny_llama(), num_keep=4, protected=(1, 2, 3, 4))
    assert scores.ascending() == [5, 0, 4, 3, 2, 1] and scores.evidence["removed"] == []


def test_sleb_removes_40_percent_by_default(tiny_llama):
    assert len(score("sleb", tiny_llama()).evidence["removed"]) == 2


def test_sleb_evaluates_as_often_as_documented(tiny_llama):
    model, passes = tiny_llama(), []
    model.register_forward_hook(lambda *_: passes.append(1))
    score("sleb", model, num_keep=3)
    assert len(passes) == 1 + 4 + 3 + 2  # one batch; the dense model and three rounds


def test_sleb_switches_every_layer_on_again(tiny_llama):
    model = tiny_llama()
    score("sleb", model, num_keep=4)
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_sleb_needs_learned_tokens_and_finite_likelihoods(tiny_llama):
    unlearned = [{**sample, "labels": [-100] * len(sample["labels"])} for sample in SAMPLES]
    with pytest.raises(DataError, match="the samples have none"):
        score("sleb", tiny_llama(), samples=unlearned, num_keep=4)
    broken = tiny_llama()
    with torch.no_grad():
        broken.lm_head.weight[0] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        score("sleb", broken, num_keep=4)


# --- magnitude ----------------------------------------------------------------------------------------------


def test_magnitude_of_known_weights(tiny_llama):
    model = tiny_llama()
    view = LayeredModel(model)
    with torch.no_grad():
        for layer, size in enumerate([0.5, 3.0, 2.0, 0.25, 1.0, 4.0]):
            for weight in view.weights(layer).values():
                weight.fill_(size)
                weight[0] = -size
        view.weights(3)["self_attn.q_proj"].fill_(10.25)
    # Layer 3 has 7680 entries (q and o 32 x 32, k and v 16 x 32, three of 48 x 32), of q 1024.
    scores = score("magnitude", model, samples=[])
    assert scores.evidence["entries"] == [7680] * 6
    assert scores.values == pytest.approx([0.5, 3.0, 2.0, 0.25 + 10 * 1024 / 7680, 1.0, 4.0], rel=1e-6)
    assert scores.ascending() == [0, 4, 3, 2, 1, 5]


def test_magnitude_does_not_depend_on_the_width_of_a_layer():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=8, n_head=2, n_inner=12, vocab_size=16))
    with torch.no_grad():
        for layer in range(3):
            for weight in LayeredModel(model).weights(layer).values():
                weight.fill_(-1.0 - layer)
    assert score("magnitude", model, samples=[]).values == (1.0, 2.0, 3.0)


# --- names and presets --------------------------------------------------------------------------------------


def test_the_former_name_of_shortgpt_is_suggested():
    with pytest.raises(ConfigError, match=r"Unknown method 'block_influence'\. Did you mean 'shortgpt'"):
        METHODS.find("block_influence")


def test_shortgpt_is_block_influence(tiny_llama):
    model = pass_through(tiny_llama(), 3)
    context = MethodContext(6, 0, None, lambda: model, SAMPLES, Collator())
    found = METHODS.find("shortgpt").score(context)
    assert found.method == "shortgpt" and found.evidence["samples"] == 5
    assert found.values[3] == pytest.approx(0, abs=1e-6) and min(found.values[:3] + found.values[4:]) > 0.01
    assert METHODS.find("shortgpt").score(context, 2).evidence["samples"] == 2


def test_the_released_preset_prunes_one_block_by_frobenius_norms(tiny_llama, tiny_trace):
    method, trace = METHODS.find("gradpruner_released"), tiny_trace(tiny_llama())
    context = MethodContext(6, 0, lambda: trace, tiny_llama, SAMPLES, Collator(), num_keep=3)
    scores = method.score(context)
    norms = [0.0] * 6
    for ref in trace.info.linears:
        factors = trace.factors(ref.layer, ref.name)
        norms[ref.layer] += float((factors.grad_b_SOR @ factors.grad_a_SRI).flatten(1).norm(dim=1).sum())
    assert scores.values == pytest.approx(norms, rel=1e-5) and scores.method == "gradpruner_released"
    assert method.needs_trace and method.merges
    plan = plan_pruning(scores, num_prune=3, num_merge=2, protect_first=1, **method.plan_options)
    first = plan.pruned[0]
    assert plan.pruned == (first, first + 1, first + 2) and 5 in plan.keep
    best = sorted(plan.pruned, key=lambda layer: scores.values[layer])[1:]
    assert plan.merged == {first - 1: tuple(sorted(best))}
