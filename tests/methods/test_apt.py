"""APT-like pruning: schedule, salience, pruning by density, growing adapters, and the resulting model."""

import math
from functools import cache

import pytest
import torch
from builders import make_llama, make_samples
from transformers import Qwen3Config, Qwen3ForCausalLM

from gradpruner.common.errors import ConfigError, DataError, ModelError
from gradpruner.data.encoding import Collator
from gradpruner.methods import METHODS, MethodContext
from gradpruner.methods.apt.apt import (
    ADAPTED,
    AdaptivePruning,
    APTOptions,
    SelfDistillationTrainer,
    kept_share,
    lightest,
    pruning_steps,
    shrink,
)
from gradpruner.methods.apt.growing_ranks import GrowingRanks
from gradpruner.methods.apt.salience import UnitMasks, outlier_term
from gradpruner.models.layers import fingerprint
from gradpruner.models.narrowing import resized_class
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import WidthPlan
from gradpruner.training.adapters import attach_lora
from gradpruner.training.finetuning import training_arguments
from gradpruner.training.options import FinetuneOptions

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2]])
GROUP, CHANNEL = 384, 48  # of the tiny Llama: see test_width.py


def context(model=make_llama, **changes):
    values = {
        "num_layers": 4,
        "seed": 0,
        "trace": lambda: pytest.fail("no trace is needed"),
        "model": model,
        "samples": make_samples(16),
        "collator": Collator(),
        "num_remove": 3500,
        "finetune": FinetuneOptions(batch_size=4, accumulation=1, device="cpu", learning_rate=1, epochs=9),
        "options": APTOptions(steps=12),
    }
    return MethodContext(**values | changes)


# -- the schedule --------------------------------------------------------------------------------------------


@cache
def shrunk():
    """Returns model and plan of the context above; tests must not change them."""
    return shrink(context())


def test_the_kept_share_falls_with_the_third_power():
    assert [kept_share(t, 2, 6) for t in (0, 2, 4, 5, 6, 9)] == [1, 1, 1 / 8, 1 / 64, 0, 0]


def test_prunings_are_evenly_spread_and_leave_time_for_masks():
    assert pruning_steps(1000, 4, 0.1) == ([300, 500, 700, 900], 100, 0.01)  # 100 steps of 0.01
    steps, begin, mask_step = pruning_steps(40, 3, 0.25)  # a quarter for the masks: 10 steps of 0.1
    assert (steps, begin, mask_step) == ([17, 24, 30], 10, 0.1)
    steps, begin, mask_step = pruning_steps(10, 16, 0.1)
    assert steps == [2, 3, 4, 5, 6, 7] and begin == 1 and mask_step == 0.4
    for total in range(1, 60):
        steps, begin, mask_step = pruning_steps(total, 16, 0.1)
        assert 0 <= begin < steps[0] and steps[-1] <= total
        assert total == 1 or (total - steps[-1]) * mask_step >= 1 - 1e-9


# -- salience ------------------------------------------------------------------------------------------------


def test_the_outlier_term_by_hand():
    weight = torch.tensor([[1.0, 4.0, 2.0], [-1.0, 0.0, 2.0], [1.0, 0.0, 2.0], [-1.0, 0.0, 2.0]] * 2)
    # Column 0: fourth moment = square of the second, 1 - 3 < 0. Column 2: no spread. Column 1: mean 1,
    # deviations 3, -1, -1, -1: second moment 3, fourth (81 + 3) / 4 = 21, 21 / 9 - 3 < 0.
    assert outlier_term(weight).tolist() == [0, 0, 0]
    one_large = torch.zeros(10, 2)
    one_large[0, 0] = 10.0
    # Mean 1, deviations 9 and nine times -1: (81 + 9) / 10 = 9, (6561 + 9) / 10 = 657; 657 / 81 - 3.
    assert outlier_term(one_large)[0].item() == pytest.approx(math.sqrt(657 / 81 - 3), rel=1e-6)
    assert outlier_term(-7 * one_large)[0].item() == pytest.approx(math.sqrt(657 / 81 - 3), rel=1e-6)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_salience_equals_a_naive_loop(checkpointed):
    model = make_llama().train()
    view = WidthView(model)
    linears = {view.parts(1).o_proj: 2, view.parts(2).down_proj: 32}
    masks = {linear: UnitMasks(linear, units) for linear, units in linears.items()}
    expected = {linear: torch.zeros(units, dtype=torch.float64) for linear, units in linears.items()}
    if checkpointed:
        model.gradient_checkpointing_enable()
    batches = [(IDS, IDS.flip(1)), (IDS + 3,)]
    for step, passes in enumerate(batches):  # two forward passes make the first step
        for batch in passes:
            model(input_ids=batch, labels=batch).loss.backward()
        for mask in masks.values():
            mask.end_step()
        for linear, units in linears.items():
            found = naive(linear, units, passes)
            expected[linear] = found if step == 0 else 0.85 * expected[linear] + 0.15 * found
    for linear, mask in masks.items():
        assert torch.allclose(mask.salience, expected[linear], rtol=1e-4)
        outliers = outlier_term(linear.weight).double().unflatten(0, (linears[linear], -1)).sum(1)
        assert torch.allclose(mask.scores(), mask.salience + outliers)
        mask.close()
    assert not any(module._forward_pre_hooks for module in model.modules())


def naive(like, units, passes):
    """Sums of |H| and |dL/dH|, kept as whole tensors."""
    model = make_llama().train()
    place = 1 if units == 2 else 2
    layer = model.model.layers[place]
    linear = layer.self_attn.o_proj if units == 2 else layer.mlp.down_proj
    assert torch.equal(linear.weight, like.weight)
    seen = []

    def keep(_, args):
        args[0].retain_grad()
        seen.append(args[0])

    hook = linear.register_forward_pre_hook(keep)
    for batch in passes:
        model(input_ids=batch, labels=batch).loss.backward()
    hook.remove()
    states, gradients = torch.cat([h[0] for h in seen]), torch.cat([h.grad[0] for h in seen])
    entries = states.double().abs().sum(0) * gradients.double().abs().sum(0)
    return entries.unflatten(0, (units, -1)).sum(1).detach()


def test_masks_move_towards_their_targets_and_scale_the_input():
    model = make_llama().train()
    linear = model.model.layers[0].mlp.down_proj
    mask = UnitMasks(linear, 32)
    mask.targets[3] = 0
    for expected in (0.6, 0.2, 0.0, 0.0):
        mask.move(0.4)
        assert mask.masks[3].item() == pytest.approx(expected, abs=1e-6) and mask.masks.sum() > 30.9
        if expected == 0.2:
            inputs = torch.randn(1, 5, 32)
            scaled = inputs.clone()
            scaled[..., 3] *= 0.2
            assert torch.allclose(linear(inputs), torch.nn.functional.linear(scaled, linear.weight))
    assert mask.scores()[3] == 0
    mask.targets[3] = 1
    mask.move(0.4)
    assert mask.masks[3].item() == pytest.approx(0.4)
    mask.close()


# -- the cut -------------------------------------------------------------------------------------------------


def test_the_least_dense_units_are_chosen_and_too_large_ones_are_skipped():
    densities = torch.tensor([5.0, 1.0, 3.0, 2.0, 4.0, 2.5])
    sizes = torch.tensor([10, 10, 10, 100, 10, 10])
    assert lightest(densities, sizes, 0).tolist() == []
    assert lightest(densities, sizes, 9).tolist() == []
    assert lightest(densities, sizes, 25).tolist() == [1, 5]
    assert lightest(densities, sizes, 119).tolist() == [1, 3]
    assert lightest(densities, sizes, 120).tolist() == [1, 3, 5]
    assert lightest(densities, sizes, 10**6).tolist() == [1, 3, 5, 2, 4, 0]
    assert lightest(torch.zeros(3), torch.ones(3, dtype=torch.int64), 2).tolist() == [0, 1]


# -- growing adapters ----------------------------------------------------------------------------------------


def grown(times, seed=0):
    torch.manual_seed(0)
    model = attach_lora(make_llama(), rank=2, alpha=4, dropout=0.0, only=ADAPTED).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    ranks = GrowingRanks(model, seed)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        ranks.end_step()
        optimizer.step()
        optimizer.zero_grad()
    before = model(input_ids=IDS).logits.detach()
    ranks.grow(times, optimizer)
    return model, optimizer, ranks, before


def test_adapters_grow_without_changing_the_model():
    model, optimizer, ranks, before = grown(2.0)
    first = 4 * 2 * (16 + 16 + 16 + 8 + 2 * (16 + 32))  # q, v, gate and up of four layers
    assert sorted(set(ranks.ranks().values()))[0] == 2 and max(ranks.ranks().values()) > 2
    assert sum(rank > 2 for rank in ranks.ranks().values()) == 8  # half of 16
    # Ranks are rounded down: each of the eight may fall short by less than one.
    assert 0 <= 2 * first - ranks.parameters() < 8 * (16 + 32)
    assert ranks.parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for group in optimizer.param_groups for p in group["params"]}
    name = next(name for name, rank in ranks.ranks().items() if rank > 2)
    lora_a, lora_b = ranks._parts(name)
    assert optimizer.state[lora_a.weight]["exp_avg"].shape == lora_a.weight.shape
    assert optimizer.state[lora_b.weight]["exp_avg"][:, :2].any()
    assert not optimizer.state[lora_b.weight]["exp_avg"][:, 2:].any() and not lora_b.weight[:, 2:].any()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert lora_b.weight[:, 2:].any()
    adapted = model.eval()(input_ids=IDS).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=IDS).logits, adapted, rtol=1e-4, atol=1e-5)


def test_adapters_grow_to_at_most_eight_times_their_rank():
    ranks = grown(100.0)[2].ranks()
    assert sorted(set(ranks.values())) == [2, 16]
    assert set(grown(1.0)[2].ranks().values()) == {2}


def test_the_more_salient_half_of_adapters_grows():
    model, _, ranks, _ = grown(1.0)
    ranks._salience = {name: float(i) for i, name in enumerate(ranks.ranks())}
    ranks.grow(3.0, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0))
    assert {name for name, rank in ranks.ranks().items() if rank > 2} == set(list(ranks.ranks())[8:])


# -- the whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_remove", "unit"), [(1, "decoder_parameters"), (3500, "parameters"), (5000, "decoder_parameters")]
)
def test_the_budget_is_met_and_the_model_matches_its_plan(num_remove, unit):
    dense = make_llama()
    model, plan = METHODS.find("apt").shrink(context(num_remove=num_remove, unit=unit))
    removed = count_parameters(dense) - count_parameters(model)
    assert 0 <= num_remove - removed < CHANNEL
    assert (
        WidthView(dense).parameters(plan, unit)
        == WidthView(dense).parameters(WidthView(dense).whole(), unit) - removed
    )
    for layer, widths in zip(model.model.layers, plan.layers, strict=True):
        assert layer.self_attn.q_proj.out_features == 4 * len(widths.heads) > 0
        assert layer.mlp.down_proj.in_features == len(widths.channels) > 0
        assert widths.heads in ((0, 1), (2, 3), (0, 1, 2, 3))  # groups are whole
    assert plan.method == "apt" and plan.evidence["model"] == fingerprint(dense)
    assert plan.evidence["num_layers"] == 4
    assert WidthPlan.from_dict(plan.to_dict()) == plan
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("lora" in name for name, _ in model.named_modules())


def test_the_model_was_trained_and_loads_again(tmp_path):
    model, plan = shrink(context(options=APTOptions(steps=12, learning_rate=1e-2)))
    assert not plan.uniform
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    loaded = resized_class(type(model), plan).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    # q of a kept group has changed; its o has not, because it has no adapter.
    heads = plan.layers[0].heads
    rows = [4 * head + i for head in heads for i in range(4)]
    before, after = make_llama().model.layers[0].self_attn, model.model.layers[0].self_attn
    assert not torch.equal(before.q_proj.weight[rows], after.q_proj.weight)
    assert torch.equal(before.o_proj.weight[:, rows], after.o_proj.weight)


def test_the_evidence_records_prunings_and_ranks():
    evidence = shrunk()[1].evidence
    steps, begin, _ = pruning_steps(12, 16, 0.1)
    assert [cut["step"] for cut in evidence["cuts"]] == steps
    for cut in evidence["cuts"]:
        wanted = 3500 * (1 - kept_share(cut["step"], begin, steps[-1]))
        assert 0 <= wanted + 0.5 - cut["removed"] <= CHANNEL
    first, last = evidence["adapter_parameters"]
    assert 1.5 * first < last <= 4 * first
    assert evidence["ranks"].keys() == {
        f"{layer}.{block}.{name}"
        for layer in range(4)
        for block, names in (("self_attn", ADAPTED[:2]), ("mlp", ADAPTED[2:]))
        for name in names
    }


def test_results_depend_on_the_seed_only():
    (one, plan), (two, again), (_, other) = shrunk(), shrink(context()), shrink(context(seed=1))
    assert plan == again
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert other.evidence["cuts"] != [] and other != plan


@pytest.mark.parametrize(
    "shared", [{"batching": "padded", "accumulation": 2}, {"gradient_checkpointing": True}]
)
def test_other_ways_to_train(shared):
    plain = shrunk()[1]
    options = {"batch_size": 4, "accumulation": 1, "device": "cpu"} | shared
    plan = shrink(context(finetune=FinetuneOptions(**options)))[1]
    if "gradient_checkpointing" in shared:
        assert plan.layers == plain.layers
    model, plan = shrink(
        context(options=None, finetune=FinetuneOptions(device="cpu"))
    )  # one epoch is one step
    assert [cut["step"] for cut in plan.evidence["cuts"]] == [1]
    assert 0 <= 3500 - (count_parameters(make_llama()) - count_parameters(model)) < CHANNEL


def test_units_without_effect_are_pruned_first():
    def model():
        dense = make_llama()
        with torch.no_grad():
            dense.model.layers[1].mlp.down_proj.weight[:, 5:25] = 0
            dense.model.layers[2].self_attn.o_proj.weight[:, :8] = 0
        return dense

    plan = shrink(context(model, num_remove=20 * CHANNEL + GROUP))[1]
    assert plan.layers[1].channels == (*range(5), *range(25, 32))
    assert plan.layers[2].heads == (2, 3)
    assert [len(widths.channels) for widths in plan.layers] == [32, 12, 32, 32]


def test_protected_layers_stay_whole():
    plan = shrink(context(protected=(0, 3), num_remove=3000))[1]
    whole = WidthView(make_llama()).whole()
    assert plan.layers[0] == whole.layers[0] and plan.layers[3] == whole.layers[3]
    assert plan.layers[1] != whole.layers[1] and plan.layers[2] != whole.layers[2]


def test_another_family():
    def model():
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
            attention_bias=True,
        )  # fmt: skip
        return Qwen3ForCausalLM(config).eval()

    pruned, plan = shrink(context(model, num_layers=3, num_remove=6000))
    assert 0 <= 6000 - (count_parameters(model()) - count_parameters(pruned)) < 72
    assert WidthView(model()).parameters(plan) == count_parameters(pruned)


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="num_remove is None"):
        shrink(context(num_remove=None))
    with pytest.raises(DataError, match="there are none"):
        shrink(context(samples=[]))
    with pytest.raises(ConfigError, match="can lose 7488 if each keeps") as caught:
        shrink(context(num_remove=7489))
    assert "fewer" in caught.value.hint
    with pytest.raises(ConfigError, match="fp16"):
        shrink(context(finetune=FinetuneOptions(precision="fp16")))
    with pytest.raises(ConfigError, match=r"methods\.apt\.growth"):
        METHODS.find("apt").read_options("apt", {"growth": 0.5})
    quantised = make_llama()
    linear = quantised.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), False)
    with pytest.raises(ModelError, match="quantised"):
        shrink(context(lambda: quantised))
    assert METHODS.find("apt").label == "APT-like" and len(METHODS.find("apt").description) < 90


# -- self-distillation ---------------------------------------------------------------------------------------


def test_self_distillation_learns_from_the_model_without_masks():
    model, samples = make_llama(), make_samples(8)
    view = WidthView(model)
    pruning = AdaptivePruning(view, APTOptions(), 3500, (), seed=0)
    adapted = attach_lora(model, rank=2, alpha=4, dropout=0.0, only=ADAPTED)
    trainer = SelfDistillationTrainer(
        pruning=pruning,
        model=adapted,
        args=training_arguments(
            FinetuneOptions(learning_rate=1e-3, batch_size=8, accumulation=1, max_steps=4, device="cpu")
        ),
        samples=samples,
        collator=Collator(),
        batching="padded",
    )
    pruning._begin, pruning._steps = 0, [4]
    batch = Collator()(samples)
    with torch.no_grad():
        whole = adapted(**batch).logits
        for masks in pruning._masks:
            masks.targets[0] = 0
            masks.move(1.0)
        masked = adapted(**batch)
    learned = batch["labels"][:, 1:] != -100
    p, log_q = whole[:, :-1][learned].softmax(-1), masked.logits[:, :-1][learned].log_softmax(-1)
    divergence = float((p * (p.log() - log_q)).sum(-1).mean())
    assert divergence > 1e-4
    adapted.train()
    for step, mu in ((0, 0.0), (1, 0.25), (4, 1.0)):
        trainer.state.global_step = step
        loss = trainer.compute_loss(adapted, dict(batch), num_items_in_batch=int(learned.sum()))
        assert loss.item() == pytest.approx(mu * divergence + (1 - mu) * float(masked.loss), rel=1e-4)
        assert adapted.training and not any(masks.paused for masks in pruning._masks)
    pruning.close()


def test_shrinking_with_self_distillation_meets_the_budget_too():
    model, plan = shrink(context(options=APTOptions(steps=8, distil=True)))
    plain, _ = shrink(context(options=APTOptions(steps=8)))
    assert [layer.mlp.down_proj.in_features for layer in model.model.layers] == [
        len(widths.channels) for widths in plan.layers
    ]
    assert any(
        a.shape != b.shape or not torch.equal(a, b)
        for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )
