"""What every registered method must do."""

import dataclasses
import math

import pytest
import torch
from conftest import make_model

from gradpruner.common.errors import ConfigError, DataError, ModelError, PlanError
from gradpruner.data.encoding import Collator
from gradpruner.gradients.scores import LayerScores
from gradpruner.methods import METHODS, MethodContext
from gradpruner.models.narrowing import prune_width_
from gradpruner.models.sizes import count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.plans.reading import load_plan
from gradpruner.plans.selection import plan_pruning
from gradpruner.pruning.in_memory import prune_
from gradpruner.training.finetuning import finetune
from gradpruner.training.options import FinetuneOptions

SAMPLES = [
    {"input_ids": list(range(3 + i, 8 + 2 * i)), "labels": [-100] * 3 + list(range(6 + i, 8 + 2 * i))}
    for i in range(5)
]
ALL = METHODS.names()


def of_kind(kind):
    return [name for name in ALL if getattr(METHODS.find(name), kind) is not None]


SCORING, PLANNING, SHRINKING, TRAINING = map(of_kind, ("score", "plan", "shrink", "callbacks"))
LAYER_PARAMETERS = count_parameters(make_model().model.layers[0])


@pytest.fixture
def make_context(tiny_llama, tiny_trace, tmp_path):
    def make(**options):
        defaults = {
            "seed": 0,
            "trace": lambda: tiny_trace(tiny_llama()),
            "model": tiny_llama,
            "samples": SAMPLES,
            "num_keep": 4,
            "num_remove": 2 * LAYER_PARAMETERS,
            "finetune": FinetuneOptions(batch_size=2, accumulation=1, precision="fp32", device="cpu"),
            "folder": tmp_path / "method",
        }
        return MethodContext(num_layers=6, collator=Collator(), **defaults | options)

    return make


def check_unchanged(model, like):
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), like.parameters(), strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())
    assert model.config.to_dict() == like.config.to_dict()


@pytest.mark.parametrize("name", SCORING)
def test_scores_are_finite_and_repeat_and_survive_saving_and_leave_the_model(
    name, make_context, tiny_llama, tmp_path
):
    method, model = METHODS.find(name), tiny_llama()
    scores = method.score(make_context(seed=3, model=lambda: model))
    assert scores.method == name
    assert scores.num_layers == 6 and all(map(math.isfinite, scores.values))
    assert len(set(scores.values)) > 1
    assert scores.evidence["num_layers"] == 6
    check_unchanged(model, tiny_llama())
    assert method.score(make_context(seed=3)) == scores
    assert LayerScores.load(scores.save(tmp_path / "scores.json")) == scores


@pytest.mark.parametrize(
    ("name", "num_prune"),
    [pair for i, name in enumerate(SCORING) for pair in ((name, (0, 1)[i % 2]), (name, (4, 2)[i % 2]))],
)
def test_plan_at_any_budget_and_the_pruned_model_runs(name, num_prune, make_context, tiny_llama):
    method, context = METHODS.find(name), make_context(num_keep=6 - num_prune)
    num_merge = 1 if method.needs_trace else 0
    plan = plan_pruning(method.score(context), num_prune=num_prune, num_merge=num_merge, protect_first=1)
    model = prune_(tiny_llama(), plan, context.trace() if plan.merged else None)
    assert len(plan.pruned) == num_prune
    assert sum(map(len, plan.merged.values())) == min(num_merge, num_prune)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 13)[None]).logits
    assert logits.shape == (1, 10, 64) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", ALL)
def test_description_is_one_line(name):
    assert 10 < len(METHODS.find(name).description) < 100
    assert "\n" not in METHODS.find(name).description


@pytest.mark.parametrize("name", ALL)
def test_options_survive_the_recipe(name):
    method = METHODS.find(name)
    options = method.options()
    assert method.read_options(name, options.model_dump(mode="json")) == options
    assert all(field.description for field in method.options.model_fields.values())
    with pytest.raises(ConfigError, match=f"methods.{name}.no_such_option"):
        method.read_options(name, {"no_such_option": 1})


# --- methods that plan by themselves ------------------------------------------------------------------------


# Options that take less work than the defaults; each method's own tests use the defaults.
QUICK = {"auto": {"families": ["gate", "task_loss", "last", "window"], "pool": 4, "rounds": 1}}


def plan_by(name, context):
    method = METHODS.find(name)
    return method.plan(dataclasses.replace(context, options=method.read_options(name, QUICK.get(name, {}))))


def timeless(plan):
    """Returns a plan without the seconds in its evidence."""

    def without(value):
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if key != "seconds"}
        return [without(part) for part in value] if isinstance(value, list) else value

    return dataclasses.replace(plan, evidence=without(plan.evidence))


def check_budget(plan, context):
    """Checks the budget: exactly for whole layers, else to a hidden dimension or a channel of every layer."""
    if isinstance(plan, PruningPlan):
        assert len(plan.keep) == context.num_keep
        return
    view = WidthView(make_model())
    fewer = view.parameters_of([(4, 2, 48)] * 6, view.shape.hidden_size - 1, context.unit)
    unit = max(view.parameters(view.whole(), context.unit) - fewer, 6 * view.unit_parameters()["channel"])
    removed = view.parameters(view.whole(), context.unit) - view.parameters(plan, context.unit)
    assert abs(removed - context.num_remove) <= unit


@pytest.mark.parametrize(
    ("name", "num_prune", "unit"),
    [pair for name in PLANNING for pair in ((name, 1, "decoder_parameters"), (name, 2, "parameters"))],
)
def test_a_plan_meets_the_budget_and_its_model_runs(name, num_prune, unit, make_context, tiny_llama):
    context = make_context(num_keep=6 - num_prune, num_remove=num_prune * LAYER_PARAMETERS, unit=unit)
    plan = plan_by(name, context)
    assert plan.method == name and plan.evidence["num_layers"] == 6
    assert isinstance(plan, PruningPlan) or plan.uniform or not METHODS.find(name).uniform
    check_budget(plan, context)
    model = tiny_llama()
    trace = context.trace() if METHODS.find(name).needs_trace else None
    (prune_(model, plan, trace) if isinstance(plan, PruningPlan) else prune_width_(model, plan))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 13)[None]).logits
    assert logits.shape == (1, 10, 64) and bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", PLANNING)
def test_plans_repeat_and_survive_saving_and_leave_the_model(name, make_context, tiny_llama, tmp_path):
    model = tiny_llama()
    plan = plan_by(name, make_context(seed=3, model=lambda: model))
    check_unchanged(model, tiny_llama())
    assert timeless(plan_by(name, make_context(seed=3))) == timeless(plan)
    assert load_plan(plan.save(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("name", PLANNING)
def test_planning_without_a_budget_is_refused(name, make_context):
    with pytest.raises(ConfigError, match=r"num_keep|num_remove"):
        plan_by(name, make_context(num_keep=None, num_remove=None))


def test_a_context_refuses_unknown_or_impossible_budgets(make_context):
    with pytest.raises(PlanError, match="num_remove is -1"):
        make_context(num_remove=-1).budget()
    for wrong in (1, 7):
        with pytest.raises(ConfigError, match=f"num_keep is {wrong}; 2 to 6"):
            make_context(num_keep=wrong).checked_num_prune()
    with pytest.raises(ConfigError, match="num_keep is None") as caught:
        make_context(num_keep=None).checked_num_prune()
    assert "num_keep" in caught.value.hint
    assert make_context(num_keep=None).num_prune == 2 and make_context().num_prune == 2


SEEING = [
    "angular", "apt", "auto", "laco", "laco_released", "llm_pruner", "minitron_depth", "minitron_width",
    "shortgpt", "sleb", "task_loss",
]  # fmt: skip


@pytest.mark.parametrize("name", SEEING)
def test_methods_that_need_samples_refuse_none(name, make_context):
    method = METHODS.find(name)
    with pytest.raises(DataError, match=r"there are none|no training samples|training samples is 0"):
        (method.score or method.plan or method.shrink)(make_context(samples=[]))


@pytest.mark.parametrize("name", ["laco", "llm_pruner", "magnitude", "minitron_width"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_methods_that_compute_with_weights_refuse_quantised_models(name, dtype, make_context, tiny_llama):
    method, model = METHODS.find(name), tiny_llama()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(dtype), requires_grad=False)
    with pytest.raises(ModelError, match=rf"layers\.1\.mlp.*{dtype}: the model is quantised"):
        (method.score or method.plan)(make_context(model=lambda: model))


# --- methods that prune while they train --------------------------------------------------------------------


@pytest.mark.parametrize("name", SHRINKING)
def test_shrinking_meets_the_budget_and_the_model_matches_its_plan(name, make_context, tiny_llama):
    method, context = METHODS.find(name), make_context()
    context = dataclasses.replace(context, options=method.options())
    model, plan = method.shrink(context)
    assert plan.method == name and plan.evidence["num_layers"] == 6
    check_budget(plan, context)
    whole = prune_width_(tiny_llama(), plan)
    shapes = {key: tuple(p.shape) for key, p in whole.named_parameters()}
    assert {key: tuple(p.shape) for key, p in model.named_parameters()} == shapes
    with torch.no_grad():
        assert bool(torch.isfinite(model(input_ids=torch.arange(3, 13)[None]).logits).all())
    again, same = method.shrink(context)
    assert same == plan
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


# --- methods that change fine-tuning ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_training_with_callbacks_leaves_a_plain_model_of_the_same_size(name, mode, make_context, tiny_llama):
    method, context = METHODS.find(name), make_context()
    context = dataclasses.replace(context, options=method.options())
    model, result = finetune(
        tiny_llama(), SAMPLES, collator=Collator(), mode=mode, batch_size=2, accumulation=1, epochs=4,
        callbacks=method.callbacks(context), learning_rate=1e-3,
    )  # fmt: skip
    assert result.steps == 12
    plain = tiny_llama()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    assert not any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(plain(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


# --- what sets each apart -----------------------------------------------------------------------------------


def test_random_depends_on_the_seed(make_context):
    score = METHODS.find("random").score
    assert score(make_context(seed=0)).values != score(make_context(seed=1)).values


def test_last_prunes_from_the_end_but_keeps_the_final_layer(make_context):
    assert METHODS.find("last").score(make_context()).ascending() == [4, 3, 2, 1, 0, 5]


def test_gradpruner_follows_norm_and_num_keep(make_context):
    score = METHODS.find("gradpruner").score
    assert score(make_context(norm="frobenius")).values != score(make_context()).values
    assert score(make_context(num_keep=2)).evidence["num_keep"] == 2


def test_shortgpt_against_hidden_states(make_context, tiny_llama):
    model = tiny_llama()
    sums, tokens = torch.zeros(5, dtype=torch.float64), 0
    for sample in SAMPLES:  # one by one: no padding that could leak in
        with torch.no_grad():
            states = model(
                input_ids=torch.tensor([sample["input_ids"]]), output_hidden_states=True
            ).hidden_states
        for layer in range(5):  # the last of hidden_states is after the final norm
            cosine = torch.nn.functional.cosine_similarity(states[layer], states[layer + 1], dim=-1)
            sums[layer] += (1 - cosine).double().sum()
        tokens += len(sample["input_ids"])
    scores = METHODS.find("shortgpt").score(make_context())
    assert scores.values[:5] == pytest.approx((sums / tokens).tolist(), rel=1e-4)
    assert scores.evidence["tokens"] == tokens
