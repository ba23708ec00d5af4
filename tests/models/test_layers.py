import copy
import re

import pytest
import torch
from torch import nn

from gradpruner.common.errors import ModelError
from gradpruner.models.config_patch import depth_fields
from gradpruner.models.families import FAMILIES
from gradpruner.models.layers import LayeredModel, fingerprint, unwrap
from gradpruner.plans.layer_plan import PruningPlan

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


class Wrapper(nn.Module):
    """What DDP does: the model is `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


class Compiled(nn.Module):
    """What torch.compile does: the model is `_orig_mod`."""

    def __init__(self, module):
        super().__init__()
        self._orig_mod = module


def with_lora(model):
    from gradpruner.training.adapters import attach_lora

    return attach_lora(model, rank=2)


def test_linears_of_every_family(tiny_model, family_name):
    view = LayeredModel(tiny_model(family_name))
    assert view.num_layers == 6
    for layer in range(6):
        assert set(view.linears(layer)) == ATTENTION | MLP
    assert view.linears(2)["self_attn.q_proj"] is view.layers[2].self_attn.q_proj


def test_lora_goes_to_every_linear_of_every_layer_and_nowhere_else(tiny_model, family_name):
    model = tiny_model(family_name)
    pattern = re.compile(LayeredModel(model).lora_target_pattern())
    matched = {name for name, _ in model.named_modules() if pattern.fullmatch(name)}
    assert len(matched) == 6 * 7
    assert not any("lm_head" in name or "embed" in name for name in matched)
    view = LayeredModel(with_lora(model))
    assert set(view.linears(0)) == ATTENTION | MLP


def test_wrappers_are_seen_through(tiny_llama):
    model = tiny_llama()
    assert unwrap(Wrapper(model)) is model
    assert unwrap(Compiled(Wrapper(model))) is model
    assert unwrap(Wrapper(with_lora(model))) is model


def test_a_model_without_head_has_its_layers_elsewhere(tiny_llama):
    with pytest.raises(ModelError, match="AutoModelForCausalLM"):
        LayeredModel(tiny_llama().model)


def test_layers_and_config_must_agree(tiny_llama):
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="6 layers but its config says 5"):
        LayeredModel(model)


@pytest.mark.parametrize(
    "window_layers, keep, recounted",
    [(3, (0, 1, 4, 5), 2), (3, (3, 4, 5), 0), (28, (0, 5), 2), (0, (0, 5), 0)],
)
def test_leading_layers_are_recounted(tiny_model, window_layers, keep, recounted):
    config = tiny_model("qwen2", max_window_layers=window_layers).config
    updates = depth_fields(config, FAMILIES["qwen2"], keep)
    assert updates["max_window_layers"] == recounted
    assert updates["layer_types"] == [config.layer_types[i] for i in keep]
    # What the recounted config says of itself is what was sliced.
    same = ["full_attention"] * recounted + ["sliding_attention"] * (len(keep) - recounted)
    assert updates["layer_types"] == same


def test_config_stays_valid(tiny_model, family_name):
    view = LayeredModel(tiny_model(family_name))
    types = getattr(view.config, "layer_types", None)
    view.keep_layers(PruningPlan.from_keep(6, (0, 3, 5)))
    view.config.validate()
    assert view.config.num_hidden_layers == 3 == view.config.to_dict()["num_hidden_layers"]
    assert getattr(view.config, "layer_types", None) == (types and [types[0], types[3], types[5]])


def test_fingerprint_does_not_depend_on_dtype(tiny_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_llama().bfloat16().save_pretrained(tmp_path)
    prints = {
        fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert len(prints) == 1
    # Stored in float32 and loaded in bfloat16 is the same checkpoint, too.
    model = tiny_llama(seed=2)
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).bfloat16())


def test_fingerprint_does_not_depend_on_adapters(tiny_llama):
    model = tiny_llama()
    before = fingerprint(model)
    wrapped = with_lora(model)
    assert fingerprint(wrapped) == before
    wrapped.unload()
    assert fingerprint(model) == before


def test_fingerprint_tells_models_apart(tiny_model, tiny_llama):
    changed = tiny_llama()
    with torch.no_grad():
        changed.model.layers[4].mlp.up_proj.weight[0, 0] += 0.5
    others = [tiny_llama(seed=1), tiny_llama(num_hidden_layers=5), tiny_model("mistral"), changed]
    assert len({fingerprint(model) for model in [tiny_llama(), *others]}) == 5
    assert fingerprint(tiny_llama()) == fingerprint(tiny_llama())
    assert re.fullmatch(r"llama-6x32-[0-9a-f]{12}", fingerprint(tiny_llama()))


def test_fingerprint_of_quantised_weights_makes_no_claim(tiny_llama):
    model = tiny_llama()
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    assert fingerprint(model) == "llama-6x32-quantised"
