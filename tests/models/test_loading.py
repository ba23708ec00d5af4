import errno
import json
import stat

import pytest
import torch
from builders import make_llama, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers.utils import logging as theirs

from gradpruner.common.errors import ConfigError, IntegrityError, ModelError, ResourceError
from gradpruner.models import dtypes
from gradpruner.models import folder as folder_module
from gradpruner.models.checking import check_model_folder
from gradpruner.models.dtypes import is_finite, stored_dtype
from gradpruner.models.folder import locate_model
from gradpruner.models.loading import (
    load_adapter,
    load_config,
    load_model,
    load_structure,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from gradpruner.models.saving import save_model
from gradpruner.plans.layer_plan import LayerAction, PruningPlan
from gradpruner.pruning.in_memory import prune_
from gradpruner.training.adapters import attach_lora

INPUTS = torch.tensor([[1, 5, 6, 7]])


@pytest.fixture
def folder(tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def save(model, folder, **options):
    options = {"dtype": torch.float32, "plan": None, "source": "org/base", **options}
    return save_model(model, make_tokenizer(), folder, **options)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- saving ----------------------------------------------------------------------------------------------


def test_a_saved_model_loads_as_it_was(tmp_path):
    plan = PruningPlan(tuple(LayerAction(*a) for a in (("keep",), ("drop",), ("keep",), ("keep",))))
    model = prune_(make_llama(), plan)
    save(model, tmp_path / "out", plan=plan, facts={"steps": 3})
    loaded = load_model(tmp_path / "out", device="cpu")
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS).logits, model(INPUTS).logits)
    facts = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert PruningPlan.from_dict(facts["plan"]) == plan
    assert (facts["source"], facts["kind"], facts["steps"]) == ("org/base", "model", 3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "1 of 4 decoder layers were removed: 1." in card and "base_model: org/base" in card
    assert load_tokenizer(tmp_path / "out").encode("red") == make_tokenizer().encode("red")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert {stat.S_IMODE(p.stat().st_mode) & 0o077 for p in (tmp_path / "out").iterdir()} == {0o044}


def test_weights_are_stored_in_the_dtype_of_the_source(tmp_path):
    save(make_llama(), tmp_path / "half", dtype=torch.bfloat16)
    assert stored_dtype(tmp_path / "half") == torch.bfloat16
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert next(load_model(tmp_path / "half", device="cpu").parameters()).dtype == torch.float32


def test_our_own_folder_is_replaced_and_a_foreign_one_is_not(tmp_path):
    save(make_llama(0), tmp_path / "out")
    (tmp_path / "out" / "model-00002-of-00002.safetensors").write_bytes(b"old shard")
    save(make_llama(1), tmp_path / "out")
    assert not (tmp_path / "out" / "model-00002-of-00002.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not made by gradpruner"):
        save(make_llama(), tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize("when", ["weights", "end"])
@pytest.mark.parametrize("interrupt", [False, True])
def test_a_failed_save_leaves_the_old_model_and_nothing_else(tmp_path, monkeypatch, when, interrupt):
    save(make_llama(0), tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    error = KeyboardInterrupt() if interrupt else OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise error

    model = make_llama(1)
    if when == "weights":
        monkeypatch.setattr(type(model), "save_pretrained", fail)
    else:
        monkeypatch.setattr(folder_module, "make_durable", fail)
    with pytest.raises(KeyboardInterrupt if interrupt else ResourceError) as caught:
        save(model, tmp_path / "out")
    if not interrupt:
        assert "free some space" in str(caught.value)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_adapters_are_saved_as_such_and_load_onto_their_model(tmp_path, folder):
    torch.manual_seed(0)
    adapted = attach_lora(load_model(folder, device="cpu"), rank=2)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save(adapted, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "pruning.json").read_text())["kind"] == "adapter"
    merged = load_adapter(load_model(folder, device="cpu"), tmp_path / "adapter")
    with torch.no_grad():
        difference = (merged(INPUTS).logits - adapted.eval()(INPUTS).logits).abs().max()
    assert difference < 1e-4
    with pytest.raises(ModelError, match="do not fit"):
        load_adapter(make_llama(hidden_size=32), tmp_path / "adapter")


# -- what may be loaded ------------------------------------------------------------------------------------


def test_places_without_a_model(tmp_path, folder):
    assert locate_model(folder) == folder
    with pytest.raises(ModelError, match="is a GGUF file"):
        locate_model("model.gguf")
    with pytest.raises(ModelError, match="no model folder at"):
        locate_model(tmp_path / "none")
    with pytest.raises(ModelError, match=r"'some/model' is neither a folder .* nor a model that the hub"):
        locate_model("some/model")
    with pytest.raises(ModelError, match=r"no config\.json"):
        check_model_folder(tmp_path)


@pytest.mark.parametrize("content", ['{"model_type": ', "[1]", "\xff"])
def test_invalid_config(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=r"config\.json is not valid JSON"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.gguf"])
def test_weights_that_are_not_safetensors(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"holds its weights as {name}.*save_pretrained"):
        load_model(folder)


@pytest.mark.parametrize("shard", ["../secret/x.safetensors", "/etc/x.safetensors", "gone.safetensors"])
def test_shards_outside_the_folder_or_missing(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(IntegrityError, match="missing" if shard == "gone.safetensors" else "outside"):
        load_model(folder)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="Is the download complete"):
        load_model(folder)


def test_configs_that_are_not_loaded(folder):
    for changes, error, part in (
        ({"model_type": "lama"}, ModelError, "Did you mean 'llama'"),
        ({"model_type": None}, ModelError, "knows no model type None"),
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "y"}, ModelError, "--trust-remote-code"),
        ({"_attn_implementation_internal": "evil/kernel"}, IntegrityError, "fetch and run code"),
        ({"_experts_implementation_internal": "evil/kernel"}, IntegrityError, "fetch and run code"),
        ({"quantization_config": {"quant_method": "gptq"}}, ModelError, r"quantised \(gptq\)"),
        ({"quantization_config": []}, ModelError, "quantised"),
        ({"num_attention_heads": "many"}, ModelError, "transformers rejects"),
    ):
        original = (folder / "config.json").read_text()
        edit_config(folder, **changes)
        with pytest.raises(error, match=part):
            load_config(folder)
        (folder / "config.json").write_text(original)
    assert load_config(folder).num_hidden_layers == 4


def test_weights_that_do_not_belong_to_the_config(folder):
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    short = {k: v for k, v in tensors.items() if k != name}
    for changed in (short, {**tensors, "extra.weight": torch.zeros(1)}, {**tensors, name: torch.zeros(3, 3)}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((IntegrityError, ModelError)) as caught:
            load_model(folder)
        assert "mlp.up_proj" in str(caught.value) or "extra.weight" in str(caught.value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(IntegrityError, match="unexpected"):
        load_model(folder)


def test_tied_weights_that_are_stored_twice_must_be_equal(tmp_path):
    make_llama(tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    assert "lm_head.weight" not in tensors
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    assert load_structure(tmp_path)
    head[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": head}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="different values") as caught:
        load_structure(tmp_path)
    assert f'"tie_word_embeddings": false in {tmp_path / "config.json"}' in caught.value.hint
    edit_config(tmp_path, tie_word_embeddings=False)
    assert load_structure(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), "float32"), (1e5, "float16")])
def test_weights_that_are_not_finite_are_refused_before_anything_is_trained(folder, value, dtype):
    """In a row of the embedding that no example may ever use; 1e5 is too large for float16 alone."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][3, 0] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        IntegrityError, match=rf"embed_tokens\.weight' holds NaN or Inf as torch\.{dtype}"
    ) as caught:
        load_model(folder, dtype=dtype)
    assert "model.dtype" in caught.value.hint
    if value == 1e5:
        assert load_model(folder, dtype="float32").get_input_embeddings().weight[3, 0] == value


def test_large_finite_weights_whose_sum_overflows_are_finite(monkeypatch):
    assert (
        is_finite(torch.full((8,), 3e38)) and is_finite(torch.tensor([2**31])) and is_finite(torch.zeros(0))
    )
    assert is_finite(torch.full((70_000,), 1.0, dtype=torch.float16))
    assert is_finite(torch.tensor([1e300, 1e300], dtype=torch.float64))
    monkeypatch.setattr(dtypes, "_AT_ONCE", 2)  # the odd one is in the second part
    for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2):
        assert is_finite(torch.ones(3, dtype=kind))
        assert not is_finite(torch.tensor([1.0, 2.0, float("inf")]).to(kind))
        assert not is_finite(torch.tensor([1.0, 2.0, float("nan")]).to(kind))


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"No usable tokenizer in .*tokenizer\.json"):
        load_tokenizer(folder)


def test_loading_is_quiet_and_leaves_the_settings_of_transformers(folder, capfd):
    theirs.enable_progress_bar()
    level = theirs.get_verbosity()
    load_structure(folder)
    load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert theirs.is_progress_bar_enabled() and theirs.get_verbosity() == level


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match="Unknown device 'gpu'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            resolve_device("cuda")
        assert resolve_device("auto") == torch.device("cpu")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ConfigError, match="Unknown dtype 'int9'"):
        resolve_dtype("int9", torch.device("cpu"))
