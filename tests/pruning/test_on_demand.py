"""Models that read each weight when it is used, and the export gate that runs on them."""

import json
import re
from functools import partial

import pytest
import torch
from builders import make_llama
from families import COMMON, KEEP, make_family_model
from safetensors.torch import load_file, save_file

from gradpruner.common.errors import IntegrityError
from gradpruner.models.layers import LayeredModel
from gradpruner.models.loading import load_config, load_model
from gradpruner.models.shards import open_shards
from gradpruner.plans.layer_plan import PruningPlan
from gradpruner.pruning import on_demand as module
from gradpruner.pruning import verification
from gradpruner.pruning.behaviour import behaviour
from gradpruner.pruning.blueprint import Blueprint
from gradpruner.pruning.on_demand import Reader, Unmatched, on_demand
from gradpruner.pruning.on_disk import prune_checkpoint
from gradpruner.pruning.verification import verify_checkpoint

PLAN = PruningPlan.from_keep(COMMON["num_hidden_layers"], KEEP)
PREFIXES = {"gpt2": "transformer.h"}  # for the rest: model.layers


def opened(folder, passed=(), prefix="model.layers", reader=None):
    reader = reader or Reader(torch.float32)
    return on_demand(load_config(folder, native=True), open_shards(folder).tensors, prefix, reader, passed)


def saved(folder, model_type="llama"):
    model = make_family_model(model_type)
    model.save_pretrained(folder)
    return model


# One plain, one with Conv1D, one that ties its embeddings and scales them, one with a recurrent state.
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "qwen3_5_text"])
def test_it_computes_what_the_loaded_model_does(tmp_path, monkeypatch, model_type):
    saved(tmp_path, model_type)
    whole = load_model(tmp_path, dtype="float32", device="cpu")
    with LayeredModel(whole).passed_through((0, 3)):
        expected = behaviour(whole, 2)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 10)  # the head in many blocks
    found = behaviour(opened(tmp_path, passed=(0, 3), prefix=PREFIXES.get(model_type, "model.layers")), 2)
    assert found["tokens"].tolist() == expected["tokens"].tolist()
    for name in ("logits", "cached"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_16_bits_are_computed_in_float32(tmp_path):
    make_llama().bfloat16().save_pretrained(tmp_path)
    found, expected = behaviour(opened(tmp_path)), behaviour(load_model(tmp_path, dtype="float32"))
    assert torch.equal(found["logits"], expected["logits"])


def test_memory_is_that_of_a_block_and_of_what_may_be_remembered(tmp_path, monkeypatch):
    make_llama(vocab_size=4096).bfloat16().save_pretrained(tmp_path)
    expected = behaviour(opened(tmp_path), 2)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(module, "_PRODUCT_BYTES", 1 << 14)
    reader = Reader(torch.float32)
    found = behaviour(opened(tmp_path, reader=reader), 2)
    assert reader._block.nbytes == 1 << 12
    products = [product for products in reader._products.values() for _, product in products]
    assert 0 < sum(product.nbytes for product in products) <= 1 << 14
    torch.testing.assert_close(found, expected)


def test_a_product_is_computed_once_for_all_models_of_a_reader(tmp_path, monkeypatch):
    make_llama().save_pretrained(tmp_path)
    reader = Reader(torch.float32)
    expected = behaviour(opened(tmp_path, reader=reader), 2)
    monkeypatch.setattr(reader, "row", Reader(torch.float32).row)  # embeddings are looked up again
    monkeypatch.setattr(reader, "_blocks", lambda *_: 1 / 0)
    found = behaviour(opened(tmp_path, reader=reader), 2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_stored_in_another_form_is_not_guessed(tmp_path):
    saved(tmp_path, "mixtral")
    with pytest.raises(Unmatched, match="stored under another name"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.input_layernorm.weight"])
def test_a_missing_tensor_is_never_filled(tmp_path, name):
    saved(tmp_path)
    tensors = {n: ref for n, ref in open_shards(tmp_path).tensors.items() if n != name}
    with pytest.raises(Unmatched):
        on_demand(load_config(tmp_path, native=True), tensors, "model.layers", Reader(torch.float32))


# -- the gate ------------------------------------------------------------------------------------------------


def test_models_that_need_it_are_loaded_whole_and_the_report_says_so(tmp_path):
    for model_type, how in (
        ("qwen2", "weights read as they are used"),
        ("mixtral", "loaded whole (Unmatched"),
    ):
        saved(tmp_path / model_type, model_type)
        report = prune_checkpoint(tmp_path / model_type, tmp_path / f"{model_type}-out", PLAN)
        details = {check.name: check.detail for check in report.checks}
        assert report.passed and report.level == "full" and details["weights"].startswith(how)


def test_what_fits_neither_way_is_checked_by_its_structure(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "_fits", lambda blueprint: False)
    saved(tmp_path / "mixtral", "mixtral")
    saved(tmp_path / "llama")
    assert prune_checkpoint(tmp_path / "mixtral", tmp_path / "a", PLAN).level == "structure"
    assert prune_checkpoint(tmp_path / "llama", tmp_path / "b", PLAN).level == "full"
    monkeypatch.setattr(verification, "run_on_demand", lambda *_, **__: 1 / 0)  # seen only when it runs
    report = prune_checkpoint(tmp_path / "llama", tmp_path / "c", PLAN)
    assert report.level == "structure" and "ZeroDivisionError" in report.checks[-1].detail
    assert report.checks[-1].passed is None


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma2")
    saved(folder / "source", "gemma2")
    prune_checkpoint(folder / "source", folder / "pruned", PLAN)
    return folder


def changed(name, change):
    def spoil(tensors, config):
        tensors[name] = change(tensors[name].clone())

    return spoil


def one_bit(tensor):
    flat = tensor.view(-1).view(torch.uint8)
    flat[3] ^= 0x01  # the exponent of the first entry
    return tensor


def swapped(first, second):
    def spoil(tensors, config):
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    return spoil


def layers_swapped(tensors, config):
    for name in [n for n in tensors if ".layers.2." in n]:
        swapped(name, name.replace(".2.", ".3."))(tensors, config)


def setting(**fields):
    return lambda tensors, config: config.update(fields)


def kinds_reversed(tensors, config):
    config["layer_types"] = config["layer_types"][::-1]


def other_rope(tensors, config):
    config["rope_parameters"] = {**config["rope_parameters"], "rope_theta": 9_000.0}


FAULTS = {
    "a bit of a weight": changed("model.layers.3.mlp.up_proj.weight", one_bit),
    "a bit of the embeddings": changed("model.embed_tokens.weight", lambda t: t.roll(1, 0)),
    "a norm": changed("model.norm.weight", lambda t: t * 1.001),
    "two tensors": swapped("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"),
    "the order of layers": layers_swapped,
    "kinds of layers": kinds_reversed,
    "rope": other_rope,
    "a constant": setting(rms_norm_eps=1e-3),
    "activation": setting(hidden_activation="relu"),
    "window": setting(sliding_window=3),
    "soft cap": setting(final_logit_softcapping=1.0),
    "depth": setting(num_hidden_layers=7),
    "head": setting(tie_word_embeddings=False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(pruned, tmp_path, fault):
    for path in (pruned / "pruned").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    FAULTS[fault](tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify_checkpoint(tmp_path, pruned / "source", level="full")
    assert not report.passed
    late = [check for check in report.checks if check.name == "weights"]
    assert all(check.detail.startswith("weights read as they are used") for check in late)


def test_without_a_fault_it_passes(pruned):
    assert verify_checkpoint(pruned / "pruned").passed


def test_layers_that_were_copied_to_the_wrong_places_are_found(pruned, tmp_path, monkeypatch):
    rename = Blueprint.rename
    wrong = {".4.": ".5.", ".5.": ".4."}  # both are kept, and of both kinds
    swap = partial(re.compile(r"\.[45]\.").sub, lambda found: wrong[found[0]])
    monkeypatch.setattr(Blueprint, "rename", lambda self, name: rename(self, swap(name)))
    with pytest.raises(IntegrityError, match="failed verification: logits: relative error"):
        prune_checkpoint(pruned / "source", tmp_path / "out", PLAN)


def test_a_bit_that_changes_nothing_that_is_computed_is_found(tmp_path):
    saved(tmp_path / "source")  # embeddings and head are two tensors
    prune_checkpoint(tmp_path / "source", tmp_path / "pruned", PLAN)
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    one_bit(tensors["model.embed_tokens.weight"][0])  # the prompt does not begin with token 0
    save_file(tensors, tmp_path / "pruned" / "model.safetensors", metadata={"format": "pt"})
    failed = verify_checkpoint(tmp_path / "pruned").checks[-1]
    assert failed.name == "source" and "'model.embed_tokens.weight' does not hold the bytes" in failed.detail
