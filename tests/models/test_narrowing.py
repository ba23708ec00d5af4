"""Width plans: what they allow, and models without some heads, channels and hidden dimensions."""

import dataclasses

import pytest
import torch
from builders import make_llama
from families import make_family_model
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gradpruner.common.errors import ModelError, PlanError
from gradpruner.models.engine_widths import _WIDTHS_READ
from gradpruner.models.narrowing import prune_width_, resized_class
from gradpruner.models.sizes import ModelSizes, count_parameters
from gradpruner.models.widths import WidthView
from gradpruner.plans.width_plan import LayerWidths, WidthPlan, WidthShape
from gradpruner.pruning.widths_on_disk import prune_width_checkpoint

IDS = torch.arange(3, 13)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def plan_of(model, heads, channels, hidden=None):
    """The same heads and channels in every layer, or a list of them per layer."""
    whole = WidthView(model).whole()
    count = whole.num_layers
    heads = heads if isinstance(heads, list) else [heads] * count
    channels = channels if isinstance(channels, list) else [channels] * count
    layers = tuple(LayerWidths(tuple(h), tuple(c)) for h, c in zip(heads, channels, strict=True))
    return dataclasses.replace(whole, layers=layers, hidden=tuple(hidden or whole.hidden), method="test")


def make_qwen3():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.2,
        tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def test_heads_that_go_are_whole_kv_groups_as_repeat_kv_ties_them():
    shape = WidthShape(2, 16, 8, 2, 4, 32)
    assert shape.group(1) == (4, 5, 6, 7)
    assert shape.heads_of([0]) == (0, 1, 2, 3)
    # The query heads of KV head 0, computed by transformers itself.
    from transformers.models.llama.modeling_llama import repeat_kv

    keys = torch.arange(2.0)[None, :, None, None]
    assert repeat_kv(keys, 4)[0, :, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("make", [make_llama, make_qwen3])
def test_uniform_pruning_computes_what_zeroed_parts_do(make, tmp_path):
    model = make()
    plan = plan_of(model, heads=(2, 3), channels=range(0, 32, 2))
    with WidthView(model).masked(plan):
        expected = logits(model)
    pruned = prune_width_(model, plan)
    assert torch.allclose(logits(pruned), expected, atol=1e-5)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 1)
    assert pruned.config.intermediate_size == 16
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(pruned))


def test_heads_within_groups_leave_smaller_groups(tmp_path):
    model = make_llama()
    pruned = prune_width_(model, plan_of(model, heads=(1, 2), channels=range(32)))
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 2)
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(pruned))


def test_hidden_dimensions_go_everywhere(tmp_path):
    model = make_qwen3()
    kept = [i for i in range(24) if i not in (3, 17, 20, 21)]
    reference = make_qwen3()
    pruned = prune_width_(model, plan_of(model, heads=range(4), channels=range(40), hidden=kept))
    layer, old = pruned.model.layers[1], reference.model.layers[1]
    assert torch.equal(layer.self_attn.q_proj.weight, old.self_attn.q_proj.weight[:, kept])
    assert torch.equal(layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight[kept])
    assert torch.equal(layer.mlp.down_proj.weight, old.mlp.down_proj.weight[kept])
    assert torch.equal(layer.input_layernorm.weight, old.input_layernorm.weight[kept])
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert pruned.config.hidden_size == 20 and pruned.config.head_dim == 8
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(pruned))


def test_layers_of_different_widths_load_again(tmp_path):
    model = make_llama()
    heads = [range(4), (0, 1), range(4), (2, 3)]
    channels = [range(32), range(5), range(3, 20), range(32)]
    plan = plan_of(model, heads, channels)
    assert not plan.uniform
    pruned = prune_width_(model, plan)
    expected = logits(pruned)
    pruned.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = resized_class(type(pruned), plan).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), expected)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 13)


@pytest.mark.parametrize("make", [make_llama, make_qwen3])
@pytest.mark.parametrize("unit", ["parameters", "decoder_parameters"])
def test_remaining_parameters_are_counted_without_building(make, unit):
    model = make()
    view = WidthView(model)
    dense = count_parameters(model)
    assert view.parameters(view.whole()) == dense
    plan = plan_of(model, heads=(0, 1), channels=range(7), hidden=range(2, 16))
    foretold = view.parameters(plan, unit)
    pruned = prune_width_(model, plan)
    layers = sum(map(count_parameters, pruned.model.layers))
    assert foretold == (count_parameters(pruned) if unit == "parameters" else layers)


@pytest.mark.parametrize("kind", _WIDTHS_READ.split())
def test_every_family_is_narrowed_and_loads_again(kind, tmp_path):
    model = make_family_model(kind, vocab_size=32)
    view = WidthView(model)
    shape = view.shape
    # As many heads as hidden dimensions, because some families take the size of a head from the two.
    heads, hidden = shape.heads_of(range(shape.num_kv_heads // 2)), shape.hidden_size // 2
    plan = plan_of(model, heads, range(shape.intermediate_size // 3), range(hidden))
    saved = view.savings(plan)
    pruned = prune_width_(model, plan)
    counted = ModelSizes(pruned).counts(range(shape.num_layers))
    assert {unit: change["after"] for unit, change in saved.items()} == counted
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(pruned))


def test_sizes_a_config_cannot_say_are_refused():
    model = make_family_model("stablelm", vocab_size=32)  # head size is always hidden size / heads
    plan = plan_of(model, range(model.config.num_attention_heads // 2), range(8))
    before = logits(model)
    with pytest.raises(PlanError, match=r"transformers would not build these widths .* from the config"):
        prune_width_(model, plan)
    assert torch.equal(logits(model), before)


def test_what_stands_beside_the_weights_is_carried_as_it_is(tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "source")
    beside = {
        "tokenizer.model": "no tokenizer that loads",
        "LICENSE": "mine",
        "chat_template.jinja": "{{ x }}",
    }
    for name, text in beside.items():
        (tmp_path / "source" / name).write_text(text)
    plan = plan_of(model, heads=(0, 1), channels=range(8))
    assert prune_width_checkpoint(tmp_path / "source", tmp_path / "new", plan).passed
    assert {name: (tmp_path / "new" / name).read_text() for name in beside} == beside


def test_unit_parameters_of_a_llama():
    units = WidthView(make_llama()).unit_parameters()
    # head_dim 4, hidden 16, two query heads a group.
    assert units == {"head": 128, "kv_head": 128, "group": 384, "channel": 48}


def test_savings_are_those_of_the_pruned_model():
    model = make_llama()
    plan = plan_of(model, heads=(0, 1), channels=range(16))
    found = WidthView(make_llama().to("meta")).savings(plan)
    pruned = prune_width_(model, plan)
    assert found["parameters"]["after"] == count_parameters(pruned)
    assert found["kv_bytes_per_token"] == {"before": 4 * 2 * 2 * 4 * 4, "after": 4 * 2 * 1 * 4 * 4}
    linears = sum(m.weight.numel() for m in pruned.modules() if isinstance(m, torch.nn.Linear))
    assert found["flops_per_token"]["after"] == 2 * linears


def test_plans_survive_the_disk_and_are_text(tmp_path):
    plan = plan_of(make_llama(), [range(4), (0, 1), (2, 3), (0, 1)], range(3, 20))
    path = plan.save(tmp_path / "plan.json")
    assert WidthPlan.load(path) == plan
    assert '"channels": "3-19"' in path.read_text()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"hidden": "0-16"}, "16 is not in 0 to 15"),
        ({"hidden": "1, 1"}, "ascending order"),
        ({"layers": []}, "0 layers"),
        ({"shape": {"num_layers": 4}}, "needs exactly"),
        ({"widths": 3}, "unknown field 'widths'"),
        ({"hidden": "a-b"}, "numbers and ranges"),
        ({"hidden": "0-99999999999"}, "more numbers than any model"),
        ({"kind": "depth"}, "not a width plan"),
        ({"format_version": 9}, "format_version 9"),
    ],
)
def test_a_faulty_plan_is_refused(change, fault):
    raw = plan_of(make_llama(), range(4), range(32)).to_dict() | change
    with pytest.raises(PlanError, match=fault):
        WidthPlan.from_dict(raw)


def test_uneven_groups_are_refused():
    with pytest.raises(PlanError, match="1 and 2 query heads"):
        plan_of(make_llama(), (0, 2, 3), range(32))


def test_widths_that_transformers_would_not_load_are_refused():
    model = make_llama()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(PlanError, match="can have these widths"):
        prune_width_(model, plan_of(model, range(4), range(32), hidden=range(14)))  # 4 heads
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before


def test_a_plan_for_another_model_is_refused():
    plan = plan_of(make_llama(), (0, 1), range(32))
    with pytest.raises(PlanError, match="was made from model"):
        prune_width_(make_llama(seed=1), plan)
    with pytest.raises(PlanError, match="is for a model with"):
        prune_width_(make_llama(intermediate_size=48), plan)


def test_a_model_without_these_linears_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(ModelError, match="c_attn"):
        WidthView(GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=20)))


def test_heads_with_a_common_norm_are_refused():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(ModelError, match="share their norm"):
        WidthView(Olmo2ForCausalLM(config))


def test_gemma_is_proved_too():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    plan = plan_of(model, (2, 3), range(8))
    with WidthView(model).masked(plan):
        expected = logits(model)
    assert torch.allclose(logits(prune_width_(model, plan)), expected, atol=1e-5)
