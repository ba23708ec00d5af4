"""SAT-like training: the ladder, the draw of units, and that leaving out equals masking but costs less."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from builders import make_llama, make_qwen2, make_samples
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from gradpruner.common.errors import ConfigError, ModelError, NonFiniteError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.sat.sat import (
    OmissionCallback,
    SATOptions,
    ladder,
    matched_rate,
    mean_omitted,
    num_kept,
    sample_units,
)
from gradpruner.methods.sat.sliced import SlicedModel
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import LayerWidths
from gradpruner.training.adapters import attach_lora
from gradpruner.training.finetuning import finetune

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
DECODER = 4 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 32)


def tune(model=None, callbacks=(), **options):
    defaults = {
        "collator": Collator(),
        "batch_size": 4,
        "accumulation": 1,
        "max_steps": 10,
        "learning_rate": 1e-2,
        "device": "cpu",
    }
    return finetune(
        make_llama() if model is None else model,
        make_samples(16),
        **{**defaults, **options},
        callbacks=list(callbacks),
    )


def context(**changes):
    values = {
        "num_layers": 4,
        "seed": 0,
        "trace": lambda: pytest.fail("no trace is needed"),
        "model": lambda: pytest.fail("no model is loaded"),
        "samples": make_samples(16),
        "collator": Collator(),
        "num_remove": DECODER // 4,
    }
    return MethodContext(**values | changes)


def sat(**changes):
    (callback,) = METHODS.find("sat").callbacks(context(**changes))
    return callback


# -- the ladder ----------------------------------------------------------------------------------------------


def test_the_ladder_falls_in_equal_steps_to_a_dense_stage():
    rates = [ladder(step, 10, 0.8, 5) for step in range(10)]
    assert rates == pytest.approx([0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0, 0])
    assert rates[-2:] == [0.0, 0.0]
    assert [ladder(step, 7, 1.0, 3) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0, 0]
    for total in (5, 11, 64, 103):
        assert ladder(total - 1, total, 0.9, 5) == 0 and ladder(0, total, 0.9, 5) == 0.9


def test_the_kept_share_is_rounded_up():
    assert [num_kept(rate, 10) for rate in (0, 0.25, 0.3, 0.7, 0.95, 0.999)] == [10, 8, 7, 3, 1, 1]
    assert num_kept(0.5, 1) == 1


def test_the_average_omitted_share_matches_other_methods():
    # Rates 0.8, 0.6, 0.4, 0.2, 0 of 1000 units of 3 parameters: the mean is half of the first.
    assert mean_omitted(0.8, 10, 5, [(1000, 3)]) == pytest.approx(0.4 * 3000)
    assert mean_omitted(0.8, 10, 5, [(1000, 3), (2, 50)]) == pytest.approx(1200 + 50 * (2 + 2) / 10)
    for steps in (10, 13, 500):
        rate = matched_rate(0.4 * 3000, steps, 5, [(1000, 3)])
        assert mean_omitted(rate, steps, 5, [(1000, 3)]) == pytest.approx(1200, abs=3)
    assert matched_rate(1200, 10, 5, [(1000, 3)]) == pytest.approx(0.8, abs=1e-3)


def test_a_budget_beyond_the_largest_rate_is_refused():
    with pytest.raises(ConfigError, match=r"begin above 0\.95"):
        matched_rate(0.6 * 3000, 10, 5, [(1000, 3)])
    with pytest.raises(ConfigError, match="num_remove is None"):
        sat(num_remove=None)
    callback = sat(num_remove=int(0.7 * DECODER))
    with pytest.raises(ConfigError, match="omission rate"):
        tune(callbacks=[callback])


# -- the draw ------------------------------------------------------------------------------------------------


def test_units_are_drawn_without_replacement_in_proportion_to_weights():
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).repeat(40000, 1)
    drawn = sample_units(weights, 2, torch.Generator().manual_seed(0))
    assert drawn.shape == (40000, 2) and bool((drawn[:, 0] < drawn[:, 1]).all())
    # P(unit 3 among two) = w3 + sum_i w_i w3 / (1 - w_i), in tenths.
    shares = [0.1, 0.2, 0.3, 0.4]
    for unit in range(4):
        second = sum(s * shares[unit] / (1 - s) for i, s in enumerate(shares) if i != unit)
        found = float((drawn == unit).any(dim=1).double().mean())
        assert found == pytest.approx(shares[unit] + second, abs=0.01)


def test_units_of_weight_zero_are_drawn_last_and_draws_depend_on_the_seed():
    weights = torch.tensor([[0.0, 1.0, 0.0, 5.0]])
    draw = [sample_units(weights, 2, torch.Generator().manual_seed(seed)).tolist() for seed in (0, 1, 1)]
    assert draw == [[[1, 3]]] * 3
    weights = torch.ones(1, 50)
    one, two, again = (sample_units(weights, 5, torch.Generator().manual_seed(seed)) for seed in (1, 2, 1))
    assert torch.equal(one, again) and not torch.equal(one, two)
    assert sample_units(weights, 50, torch.Generator()).tolist() == [list(range(50))]


# -- leaving out ---------------------------------------------------------------------------------------------

GROUPS = torch.tensor([[0], [1], [1], [0]])
CHANNELS = torch.stack([torch.arange(i, 32, 3)[:10] for i in (0, 1, 2, 0)])


def plan_of(model):
    whole = WidthView(model).whole()
    layers = tuple(
        LayerWidths(whole.shape.heads_of(groups), tuple(channels))
        for groups, channels in zip(GROUPS.tolist(), CHANNELS.tolist(), strict=True)
    )
    return dataclasses.replace(whole, layers=layers)


@pytest.mark.parametrize("make", [make_llama, make_qwen2])
def test_slicing_equals_masking(make):
    model = make()
    with WidthView(model).masked(plan_of(model)):
        expected = model(input_ids=IDS, labels=IDS)
        expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sliced = SlicedModel(model.train())
    sliced.keep(GROUPS, CHANNELS)
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    sliced.restore()
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    mlp, attention = model.model.layers[1].mlp, model.model.layers[1].self_attn
    omitted = torch.tensor([i for i in range(32) if i not in CHANNELS[1].tolist()])
    assert not mlp.up_proj.weight.grad[omitted].any() and not mlp.gate_proj.weight.grad[omitted].any()
    assert not mlp.down_proj.weight.grad[:, omitted].any() and mlp.down_proj.weight.grad.any()
    assert not attention.q_proj.weight.grad[:8].any() and not attention.o_proj.weight.grad[:, :8].any()
    assert not attention.k_proj.weight.grad[:4].any() and not attention.v_proj.weight.grad[:4].any()
    assert attention.q_proj.weight.grad[8:].any() and attention.v_proj.weight.grad[4:].any()


def test_adapters_are_sliced_with_their_linears():
    model = attach_lora(make_llama(), rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    sliced = SlicedModel(model.train())
    sliced.keep(GROUPS, CHANNELS)
    found = model(input_ids=IDS, labels=IDS)
    found.loss.backward()
    sliced.restore()
    down = model.get_base_model().model.layers[1].mlp.down_proj
    omitted = torch.tensor([i for i in range(32) if i not in CHANNELS[1].tolist()])
    assert not down.lora_A["default"].weight.grad[:, omitted].any()
    assert down.lora_B["default"].weight.grad.any()
    up = model.get_base_model().model.layers[1].mlp.up_proj
    assert not up.lora_B["default"].weight.grad[omitted].any()
    merged = model.eval().merge_and_unload()
    with WidthView(merged).masked(plan_of(merged)):
        expected = merged(input_ids=IDS).logits
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_nothing_out_and_restore_removes_all_patches():
    model, dense = make_llama(), make_llama()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    state = list(model.state_dict())
    sliced = SlicedModel(model)
    sliced.keep(GROUPS, CHANNELS)
    assert torch.equal(model.eval()(IDS).logits, dense(IDS).logits)
    assert not torch.allclose(model.train()(IDS).logits, dense(IDS).logits, atol=1e-2)
    assert list(model.state_dict()) == state
    sliced.restore()
    sliced.restore()
    assert torch.equal(model(IDS).logits, dense(IDS).logits)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before


def test_half_the_units_cost_half_the_operations():
    def operations(groups, channels):
        # Wide enough to make head and attention scores negligible.
        model = make_llama(hidden_size=128, intermediate_size=512, num_key_value_heads=4).train()
        sliced = SlicedModel(model.requires_grad_(True))
        sliced.keep(groups, channels)
        with FlopCounterMode(display=False) as counter:
            model(input_ids=IDS, labels=IDS).loss.backward()
        sliced.restore()
        return sum(counter.get_flop_counts()["LlamaForCausalLM.model"].values())

    dense = operations(None, None)
    half = operations(torch.tensor([[0, 2]] * 4), torch.arange(256).repeat(4, 1))
    assert half / dense == pytest.approx(0.5, abs=0.01)


def test_importance_is_the_norm_of_a_column_times_the_mean_input():
    model = make_llama().train()
    sliced = SlicedModel(model)
    norms = sliced.column_norms()
    groups, channels = sliced.importance(norms)  # no inputs seen yet: norms only
    assert torch.allclose(channels[2].float(), model.model.layers[2].mlp.down_proj.weight.norm(dim=0))
    inputs = {}
    down, o_proj = model.model.layers[0].mlp.down_proj, model.model.layers[0].self_attn.o_proj
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m in (down, o_proj)]
    sliced.keep(GROUPS, CHANNELS)
    model(input_ids=IDS)
    groups, channels = sliced.importance(norms)
    for hook in hooks:
        hook.remove()
    sliced.restore()
    means = inputs[down][0].abs().mean(dim=0)  # of the kept channels
    expected = down.weight.norm(dim=0).detach() * means.mean().detach()
    expected[CHANNELS[0]] = (down.weight.norm(dim=0)[CHANNELS[0]] * means).detach()
    assert torch.allclose(channels[0].float(), expected, rtol=1e-5)
    of_group = (o_proj.weight.norm(dim=0)[:8] * inputs[o_proj][0].abs().mean(dim=0)).sum()
    assert float(groups[0, 0]) == pytest.approx(of_group.item(), rel=1e-5)


# -- training ------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Records in every step which channels of layer 0 have a gradient, and how much is computed."""

    def __init__(self):
        self.channels, self.losses = [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        module = next(m for n, m in kwargs["model"].named_modules() if n.endswith("layers.0.mlp.up_proj"))
        weight = module.lora_B["default"].weight if hasattr(module, "lora_B") else module.weight
        self.channels.append(weight.grad.abs().sum(dim=1) > 0)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [{"batching": "packed"}, {"batching": "padded", "accumulation": 2}, {"gradient_checkpointing": True}],
    ids=["packed", "accumulated", "checkpointed"],
)
def test_training_follows_the_ladder_and_ends_dense(mode, options):
    callback, watch = sat(), Watch()
    model, result = tune(callbacks=[callback, watch], mode=mode, rank=2, **options)
    expected = [num_kept(ladder(step, 10, callback.start_rate, 5), 32) for step in range(10)]
    assert expected[-2:] == [32, 32] and expected[0] < 20
    assert [int(step.sum()) for step in watch.channels] == expected
    assert not torch.equal(watch.channels[0], watch.channels[1])
    assert callback.rates[0] == callback.start_rate and callback.rates[-1] == 0
    # The budget is 25 % of the decoder; 14 channels or a group are less than a hundredth of it.
    assert callback.omitted_fraction == pytest.approx(0.25, abs=0.02)
    assert result.steps == 10
    assert list(model.state_dict()) == list(make_llama().state_dict())
    assert not any("forward" in vars(module) for module in model.modules() if module is not model)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_units_left_out_depend_on_the_seed(mode):
    options = {"mode": mode, "rank": 2, "max_steps": 6}
    losses = [tune(callbacks=[sat(seed=seed)], **options)[1].losses for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_gradient_checkpointing_recomputes_with_the_same_units():
    results = [tune(callbacks=[sat()], gradient_checkpointing=on)[1] for on in (False, True)]
    losses = [[entry["loss"] for entry in result.losses] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_explicit_rate_and_few_steps():
    callback = sat(options=SATOptions(stages=5, start_rate=0.5), num_remove=None)
    tune(callbacks=[callback], max_steps=3)
    assert callback.rates == [0.5, 0.25, 0.0]
    with pytest.raises(ConfigError, match="this training has 1"):
        tune(callbacks=[sat()], max_steps=1)


def test_a_failed_training_restores_the_model():
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        tune(model, callbacks=[sat()])
    assert not any("forward" in vars(module) for module in model.model.layers.modules())


def test_a_killed_training_resumes(tmp_path):
    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(callbacks=[sat(), Kill()], checkpoints=tmp_path, save_steps=2)
    callback = sat()
    _, result = tune(callbacks=[callback], checkpoints=tmp_path, save_steps=2)
    assert result.resumed_from == 4 and result.steps == 10
    assert callback.rates == [ladder(step, 10, callback.start_rate, 5) for step in range(4, 10)]


def test_models_and_settings_that_cannot_work_are_refused():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=21, n_positions=64))
    with pytest.raises(ModelError, match="cannot be told apart"):
        tune(gpt2, callbacks=[sat()])
    with pytest.raises(ConfigError, match="compile"):
        OmissionCallback(SATOptions(), 100, 0).on_train_begin(
            SimpleNamespace(torch_compile=True, n_gpu=1), SimpleNamespace(max_steps=9), None
        )
    quantised = make_llama()
    weight = quantised.model.layers[0].mlp.up_proj.weight
    quantised.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), False)
    with pytest.raises(ModelError, match="quantised"):
        SlicedModel(quantised)
    with pytest.raises(ConfigError, match=r"methods\.sat\.stages"):
        METHODS.find("sat").read_options("sat", {"stages": 1})
    dora = attach_lora(make_llama(), adapter="dora")
    with pytest.raises(ModelError, match="plain LoRA"):
        SlicedModel(dora)


def test_label_and_description():
    method = METHODS.find("sat")
    assert method.label == "SAT-like" and not method.removes
    assert len(method.description) < 100
