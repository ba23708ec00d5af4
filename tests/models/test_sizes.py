import json
import mmap
import time

import pytest
import torch
from builders import tiny_config
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3Config,
    Qwen3NextConfig,
)

from gradpruner.common import memory
from gradpruner.common.errors import ModelError, PlanError
from gradpruner.models import sizes as cost

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    dtype="bfloat16",
)


# By hand, one tiny layer: q and o 32x32, k and v 16x32, three 32x64 in the MLP; two norms of 32.
LINEAR = 2 * 1024 + 2 * 512 + 3 * 2048
LAYER = LINEAR + 64


def test_parameters_by_hand():
    assert (LINEAR, LAYER) == (9216, 9280)
    model = cost.build_on_meta(tiny_config())
    assert cost.count_parameters(model) == 4 * LAYER + 2 * 3200 + 32
    assert cost.ModelSizes(model).layer_parameters == [LAYER] * 4
    assert cost.ModelSizes(tiny_config()).decoder_parameters == 4 * LAYER


def test_tied_embeddings_count_once():
    assert cost.count_parameters(cost.build_on_meta(tiny_config(tie_word_embeddings=True))) == (
        4 * LAYER + 3200 + 32
    )
    assert cost.ModelSizes(tiny_config(tie_word_embeddings=True, dtype="float16")).disk_bytes == 2 * (
        4 * LAYER + 3200 + 32
    )


def test_real_and_meta_models_agree_and_meta_holds_no_numbers():
    real, meta = LlamaForCausalLM(tiny_config()), cost.build_on_meta(tiny_config())
    assert cost.count_parameters(real) == cost.count_parameters(meta)
    counted = [cost.ModelSizes(one).layer_macs for one in (real, meta, tiny_config())]
    assert counted[0] == counted[1] == counted[2]
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_known_answers_of_the_paper():
    """GradPruner, Table 11, and the parameter counts of Llama-3.1-8B."""
    assert round(128 * sum(cost.ModelSizes(LLAMA_8B).layer_macs) / 1e9, 3) == 893.353
    saved = cost.ModelSizes(LLAMA_8B).savings([*range(18), 31])
    shorter = LlamaConfig(**(LLAMA_8B.to_dict() | {"num_hidden_layers": 19}))
    assert round(128 * sum(cost.ModelSizes(shorter).layer_macs) / 1e9, 3) == 530.428
    assert saved["layers"] == {"before": 32, "after": 19}
    assert saved["parameters"]["before"] == 8_030_261_248
    assert round(saved["parameters"]["after"] / 1e9, 3) == 5.195
    assert saved["parameters"]["after"] == cost.count_parameters(cost.build_on_meta(shorter))
    # 2 (key, value) x 8 heads x 128 numbers x 2 bytes = 4096 bytes a layer.
    assert saved["kv_bytes_per_token"] == {"before": 32 * 4096, "after": 19 * 4096}
    assert saved["disk_bytes"]["after"] == 2 * saved["parameters"]["after"]
    assert saved["flops_per_token"]["after"] == cost.ModelSizes(shorter).counts(range(19))["flops_per_token"]


def test_operations_of_layers_and_head():
    assert cost.ModelSizes(tiny_config()).head_macs == 3200
    assert sum(cost.ModelSizes(tiny_config()).layer_macs) == 4 * LINEAR


def test_savings_by_hand():
    saved = cost.ModelSizes(tiny_config()).savings([0, 3])
    assert json.loads(json.dumps(saved)) == {
        "layers": {"before": 4, "after": 2},
        "decoder_parameters": {"before": 4 * LAYER, "after": 2 * LAYER},
        "parameters": {"before": 4 * LAYER + 6432, "after": 2 * LAYER + 6432},
        "kv_bytes_per_token": {"before": 4 * 2 * 2 * 8 * 4, "after": 2 * 2 * 2 * 8 * 4},
        "flops_per_token": {"before": 2 * (4 * LINEAR + 3200), "after": 2 * (2 * LINEAR + 3200)},
        "disk_bytes": {"before": 4 * (4 * LAYER + 6432), "after": 4 * (2 * LAYER + 6432)},
    }


@pytest.mark.parametrize("keep", [[], [1, 0], [0, 0], [0, 4], [-1, 0]])
def test_savings_refuses_a_bad_keep_set(keep):
    with pytest.raises(PlanError, match="4 layers"):
        cost.ModelSizes(tiny_config()).savings(keep)


def test_savings_does_not_touch_the_config():
    config = tiny_config()
    before = config.to_dict()
    cost.ModelSizes(config).savings([0])
    assert config.to_dict() == before


def test_layers_of_different_size():
    # Every other layer of this family caches nothing and is of another size.
    config = Qwen3NextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        layer_types=["linear_attention", "full_attention"] * 2,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    )
    sizes = cost.ModelSizes(config).layer_parameters
    assert sizes[0] == sizes[2] != sizes[1] == sizes[3]
    saved = cost.ModelSizes(config).savings([0, 1, 2])
    assert saved["decoder_parameters"] == {"before": sum(sizes), "after": sum(sizes[:3])}
    assert saved["kv_bytes_per_token"] == {"before": 2 * 128, "after": 128}


def test_gpt2_conv1d():
    config = GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=100)
    # c_attn 32x96, c_proj 32x32, c_fc 32x128, c_proj 128x32.
    assert sum(cost.ModelSizes(config).layer_macs) == 3 * (3072 + 1024 + 4096 + 4096)
    assert cost.kv_bytes_per_token(config, torch.float16) == 3 * 2 * 32 * 2


def test_head_dim_apart_from_hidden_size():
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=100,
    )
    assert cost.kv_bytes_per_token(config, torch.bfloat16) == 2 * 2 * 16 * 2
    assert cost.kv_bytes_per_token(config, torch.bfloat16, keep=[1]) == 2 * 16 * 2


def test_gpt_neox_layers_are_found():
    config = GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=100,
    )
    assert len(cost.ModelSizes(config).layer_parameters) == 3


def test_only_the_experts_a_token_uses_are_operations():
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=100,
    )
    attention, expert, router = 4 * 1024, 3 * 2048, 8 * 32
    assert sum(cost.ModelSizes(config).layer_macs) == 2 * (attention + 2 * expert + router)
    assert cost.ModelSizes(config).layer_parameters == [attention + 8 * expert + router + 64] * 2


def test_adapters_are_not_operations_of_the_model():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        LlamaForCausalLM(tiny_config()), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    assert sum(cost.ModelSizes(model).layer_macs) + cost.ModelSizes(model).head_macs == 4 * LINEAR + 3200
    assert len(cost.ModelSizes(model).layers) == 4


def test_no_language_model():
    from transformers import ViTConfig

    with pytest.raises(ModelError, match="vit"):
        cost.build_on_meta(ViTConfig())


def test_peak_memory_sees_a_block_that_is_gone_at_the_end():
    # 128 MiB from the system, not from what earlier tests freed; written, so that they are resident.
    with memory.PeakMemory() as peak, mmap.mmap(-1, 2**27) as block:
        block[:: mmap.PAGESIZE] = b"x" * (2**27 // mmap.PAGESIZE)
        time.sleep(0.1)
    assert peak.kind == "rss"
    assert 110e6 < peak.rise_bytes < 400e6
    assert peak.peak_bytes >= peak.rise_bytes


def test_peak_memory_stops_sampling_after_an_error():
    with pytest.raises(KeyError), memory.PeakMemory("cpu") as peak:
        raise KeyError("x")
    assert not peak._sampler.is_alive()
    assert peak.peak_bytes > 0


def test_nested_cuda_peaks(monkeypatch):
    """The outer block must see a peak from before the inner one reset torch's counter."""
    readings = {"now": 10, "peak": 10}

    def use(amount):
        readings["now"] = amount
        readings["peak"] = max(readings["peak"], amount)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda index: readings["peak"])
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda index: readings.update(peak=readings["now"])
    )
    with memory.PeakMemory("cuda:0") as outer:
        use(100)
        use(20)
        with memory.PeakMemory(torch.device("cuda")) as inner:
            use(50)
        use(30)
    assert (inner.peak_bytes, inner.rise_bytes) == (50, 30)
    assert (outer.peak_bytes, outer.rise_bytes) == (100, 90)
