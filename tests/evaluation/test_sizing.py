"""Sizes, operations and floors: the paper's Table 11, and small configs by hand."""

import pytest
import torch
from builders import tiny_config
from conftest import COMMON
from transformers import AutoConfig, MixtralConfig

from gradpruner.common.errors import ConfigError
from gradpruner.evaluation.costing.per_device import adapter_parameters, held_bytes
from gradpruner.evaluation.costing.shapes import describe_shape, shape_folder, shape_names
from gradpruner.evaluation.costing.sizing import depth_alone, size_facts, time_floor
from gradpruner.evaluation.costing.subject import find_subject, plan_by_count, shorten
from gradpruner.evaluation.costing.workload import Workload, checked_modes
from gradpruner.models.sizes import ModelSizes, build_on_meta

# One layer by hand: q and o 32x32, k and v 16x32, three 32x64 in the MLP; two norms of 32. Head 100x32.
LINEAR = 2 * 1024 + 2 * 512 + 3 * 2048
LAYER, HEAD = LINEAR + 64, 3200


def test_table_11_of_the_paper():
    """GradPruner, Table 11: 1.79 and 1.06 TFLOPs, 893.35 and 530.43 GMACs, 7.5 and 4.67 B parameters."""
    dense = find_subject("llama-3.1-8b")
    pruned = shorten(dense, plan_by_count(32, 13))
    sizes = ModelSizes(dense.config), ModelSizes(pruned.config)
    before, after = map(size_facts, sizes)
    assert (before["layers"], after["layers"]) == (32, 19)
    assert [round(128 * one["layer_macs"] / 1e9, 3) for one in (before, after)] == [893.353, 530.428]
    # torch also counts the products inside attention: 2 x 2 x 128 x 128 x 4096 per layer.
    assert before["flops"] == 2 * 128 * before["layer_macs"] + 32 * 4 * 128 * 128 * 4096
    assert [round(one["flops"] / 1e12, 4) for one in (before, after)] == [1.7953, 1.066]
    assert [round(one["parameters_without_head"] / 1e9, 2) for one in (before, after)] == [7.5, 4.67]
    assert time_floor(*sizes, tokens=128, head_tokens=128) == pytest.approx(0.622, abs=5e-4)
    held = [
        held_bytes(build_on_meta(one.config), "full", Workload(), torch.bfloat16) for one in (dense, pruned)
    ]
    assert held[1] / held[0] == pytest.approx(0.647, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "num_prune", "billions", "removed"),
    [
        ("llama-3.1-8b", 13, 8.030, 0.353),
        ("mistral-7b-v0.3", 13, 7.248, 0.391),
        ("llama-2-13b", 16, 13.016, 0.390),
        ("llama-3.2-1b", 6, 1.236, 0.295),
    ],
)
def test_shapes_have_the_known_sizes(name, num_prune, billions, removed):
    dense = find_subject(name)
    pruned = shorten(dense, plan_by_count(dense.depth, num_prune))
    before = ModelSizes(dense.config).parameters
    assert before / 1e9 == pytest.approx(billions, abs=5e-4)
    assert 1 - ModelSizes(pruned.config).parameters / before == pytest.approx(removed, abs=5e-4)
    assert dense.folder is None and name in shape_names()
    assert describe_shape(name).startswith(f"{dense.depth} layers, hidden {dense.config.hidden_size}")


def test_sizes_by_hand():
    assert size_facts(ModelSizes(tiny_config()), tokens=8, rank=2) == {
        "model_type": "llama",
        "layers": 4,
        "parameters": 4 * LAYER + 2 * HEAD + 32,
        "parameters_without_head": 4 * LAYER + HEAD + 32,
        "decoder_parameters": 4 * LAYER,
        "layer_kinds": [LAYER],
        # r (in + out) of q, o (64), k, v (48) and three of the MLP (96).
        "adapter_parameters": 4 * 2 * (2 * 64 + 2 * 48 + 3 * 96),
        "layer_macs": 4 * LINEAR,
        "head_macs": HEAD,
        "flops": 2 * 8 * 4 * LINEAR + 4 * 4 * 8 * 8 * 32,
        "kv_entries_per_token": 4 * 2 * 2 * 8,
        "kv_bytes_per_token": 4 * 4 * 32,
        "disk_bytes": 4 * (4 * LAYER + 2 * HEAD + 32),
    }


def test_floors_by_hand():
    dense, pruned = ModelSizes(tiny_config()), ModelSizes(tiny_config(num_hidden_layers=2))
    assert time_floor(dense, pruned, tokens=10, head_tokens=1) == (20 * LINEAR + HEAD) / (40 * LINEAR + HEAD)
    assert time_floor(dense, pruned, tokens=1, head_tokens=1) == (2 * LINEAR + HEAD) / (4 * LINEAR + HEAD)
    assert depth_alone(dense, pruned) == ""


def test_held_bytes_by_hand():
    model, work = build_on_meta(tiny_config()), Workload(batch_size=3, tokens=10, new_tokens=5)
    parameters, tensors = 4 * LAYER + 2 * HEAD + 32, 4 * 9 + 3
    # torch's AdamW counts the steps of every tensor in float32.
    assert held_bytes(model, "full", work, torch.float32) == 16 * parameters + 4 * tensors
    assert held_bytes(model, "full", work, torch.bfloat16) == 8 * parameters + 4 * tensors
    # The adapters train in float32 with a gradient and two moments; the last new token is never cached.
    adapters = adapter_parameters(model, 8)
    assert adapters == 4 * 8 * (2 * 64 + 2 * 48 + 3 * 96)
    lora = held_bytes(model, "lora", work, torch.bfloat16)
    assert lora == 2 * parameters + 16 * adapters + 4 * 4 * 7 * 2
    cache = 3 * 14 * 4 * 32
    assert held_bytes(model, "inference", work, torch.float32) == 4 * (parameters + cache)


def test_differences_other_than_depth():
    dense = ModelSizes(tiny_config())
    assert "size" in depth_alone(dense, ModelSizes(tiny_config(intermediate_size=32)))
    assert "vocabulary" in depth_alone(dense, ModelSizes(tiny_config(vocab_size=50)))
    other = AutoConfig.for_model("qwen2", **COMMON)
    assert depth_alone(dense, ModelSizes(other)) == "qwen2 instead of llama"


def test_experts_are_sized_even_where_torch_cannot_count_them():
    facts = size_facts(ModelSizes(MixtralConfig(**COMMON, num_local_experts=4, dtype="bfloat16")))
    assert facts["layer_macs"] > 0 and facts["flops"] is None


def test_a_config_of_several_kinds_of_layers_is_cut_like_a_checkpoint():
    config = AutoConfig.for_model(
        "gemma3_text", **COMMON, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 3
    )
    from gradpruner.evaluation.costing.subject import Subject
    from gradpruner.plans.layer_plan import PruningPlan

    pruned = shorten(Subject("g", config), PruningPlan.from_keep(6, [0, 2, 5]))
    assert pruned.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert pruned.depth == 3 and pruned.name == "g without 1, 3-4"
    assert size_facts(ModelSizes(pruned.config))["flops"] > 0


def test_workload_by_hand_and_its_limits():
    assert Workload(tokens=10).head_tokens == 10
    assert Workload(tokens=10, learned_tokens=3).head_tokens == 4
    assert Workload(tokens=10, learned_tokens=10).head_tokens == 10
    assert Workload(repeats=3, warmup=1).steps == 4
    for wrong in ({"batch_size": 0}, {"new_tokens": 1}, {"learned_tokens": 200}, {"dtype": "bfloat"}):
        with pytest.raises(ConfigError):
            Workload(**wrong)
    assert checked_modes(["inference", "full"]) == ("full", "inference")
    with pytest.raises(ConfigError, match="Did you mean 'lora'"):
        checked_modes(["loar"])


def test_shape_names_ignore_case():
    assert shape_folder("Llama-3.1-8B") == shape_folder("llama-3.1-8b")
    assert shape_folder("nothing") is None
    with pytest.raises(ConfigError, match=r"Did you mean 'llama-3\.1-8b'"):
        find_subject("lama-3.1-8b")
