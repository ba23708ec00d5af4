"""Fine-tuning adapters on weights in 4 bits, and putting them on the weights these were made of."""

import json

import pytest
import torch
from builders import make_llama, make_project, make_samples
from safetensors.torch import load_file
from transformers import TrainerCallback

from gradpruner.common.errors import ConfigError, DataError, ModelError
from gradpruner.data.encoding import Collator
from gradpruner.evaluation.costing.per_device import Training, hold_training
from gradpruner.models.loading import load_adapter, load_model
from gradpruner.models.sizes import build_on_meta
from gradpruner.pruning.verification import verify_checkpoint
from gradpruner.runs.job.job import Job
from gradpruner.runs.recipe.recipe import load_recipe
from gradpruner.training import checks
from gradpruner.training.adapters import Adapters
from gradpruner.training.finetuning import finetune

bitsandbytes = pytest.importorskip("bitsandbytes")

SIZES = {"hidden_size": 64, "intermediate_size": 128}
SAMPLES = make_samples(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_llama(**SIZES).save_pretrained(path)
    return path


def tune(model, mode="qlora", **changes):
    options = {"batch_size": 4, "accumulation": 1, "learning_rate": 1e-2, "dropout": 0.0, "rank": 4}
    options |= {"mode": mode, "max_steps": 4, "batching": "padded", "device": "cpu", "save_steps": None}
    return finetune(model, SAMPLES, collator=Collator(), **options | changes)


def dequantised(folder):
    """The model with the very weights that 4 bits stand for, as plain ones."""
    plain, quantised = load_model(folder), load_model(folder, quantise=True)
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            assert state.quant_type == "nf4" and state.nested and module.compute_dtype == torch.float32
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, state)
            plain.get_submodule(name).weight.data = weight.reshape(module.out_features, module.in_features)
    return plain, quantised


@pytest.mark.parametrize(("checkpointing", "batching"), [(False, "padded"), (True, "packed")])
def test_it_learns_what_lora_learns_on_the_weights_that_4_bits_stand_for(folder, checkpointing, batching):
    plain, quantised = dequantised(folder)
    _, alike = tune(plain, "lora", batching=batching)
    _, found = tune(quantised, batching=batching, gradient_checkpointing=checkpointing)
    losses, expected = ([entry["loss"] for entry in one.losses] for one in (found, alike))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0]
    _, other = tune(load_model(folder), "lora", batching=batching)
    assert abs(other.losses[0]["loss"] - losses[0]) > 1e-3  # 4 bits are not the weights
    assert found.mode == "qlora" and found.trainable_parameters == alike.trainable_parameters


def test_adapters_go_onto_the_weights_as_they_were(folder):
    trained, _ = tune(load_model(folder, quantise=True))
    adapters = Adapters.of(trained)
    merged = adapters.put_on(load_model(folder), merge=True)
    before = load_model(folder).state_dict()
    for name, weight in merged.state_dict().items():
        linear = name.removesuffix(".weight")
        key = f"base_model.model.{linear}.lora_A.weight"
        change = torch.zeros(())
        if key in adapters.weights:
            change = adapters.weights[key.replace("lora_A", "lora_B")] @ adapters.weights[key] * (32 / 4)
            assert change.abs().max() > 0
        torch.testing.assert_close(weight, before[name] + change, rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="The adapters do not fit the model"):
        adapters.put_on(make_llama(), merge=True)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise DataError("Enough.")


def test_a_tuning_that_ended_early_goes_on_to_the_very_adapters_of_one_that_did_not(folder, tmp_path):
    options = {"dropout": 0.1, "checkpoints": tmp_path, "save_steps": 2}
    whole, _ = tune(load_model(folder, quantise=True), dropout=0.1)
    with pytest.raises(DataError, match="Enough"):
        tune(load_model(folder, quantise=True), callbacks=[Stop()], **options)
    gone_on, found = tune(load_model(folder, quantise=True), **options)
    assert found.resumed_from == 2 and len(found.losses) == 4
    expected = Adapters.of(whole).weights
    assert all(torch.equal(weight, expected[key]) for key, weight in Adapters.of(gone_on).weights.items())


def test_what_a_device_holds_is_what_bitsandbytes_holds(tmp_path):
    model = make_llama(hidden_size=256, intermediate_size=512, vocab_size=64)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, quantise=True)
    held = 0
    for module in loaded.modules():
        for weight in module._parameters.values():
            held += 0 if weight is None else weight.nbytes
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    estimated = hold_training(build_on_meta(model.config), Training(mode="qlora", rank=1))
    adapters = hold_training(build_on_meta(model.config), Training(mode="lora", rank=1)).gradients
    assert estimated.weights - adapters == held


def test_modes_and_models_that_do_not_go_together_are_refused(folder):
    for quantise, mode in ((True, "full"), (True, "lora"), (False, "qlora")):
        with pytest.raises(ModelError, match="qlora"):
            tune(load_model(folder, quantise=quantise), mode)


def project(tmp_path, **recipe):
    path, values = make_project(
        tmp_path,
        **{
            "variants": ["dense", "dropped"],
            "plan": {"num_merge": 0, "repair": "least_squares"},
            "finetune": {"mode": "qlora", "learning_rate": 1e-2, "rank": 4},
        }
        | recipe,
    )
    make_llama(**SIZES).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return path, values


def test_a_whole_run_by_command_line(tmp_path, call):
    path, _ = project(tmp_path, record={"adapter": "qlora"})
    code, out, err = call("run", path)
    assert code == 0 and "report done" in out, err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    dropped = tmp_path / "run" / "variants" / "dropped"
    assert record["variants"]["dropped"]["finetune"]["mode"] == "qlora"
    plain, tuned = (load_file(dropped / name / "model.safetensors") for name in ("pruned", "model"))
    assert {t.dtype for t in tuned.values()} == {torch.bfloat16} and list(plain) == list(tuned)
    changed = {name for name in plain if not torch.equal(plain[name], tuned[name])}
    assert changed == {name for name in plain if name.endswith("_proj.weight")}
    assert "quantization_config" not in json.loads((dropped / "model" / "config.json").read_text())
    assert verify_checkpoint(dropped / "pruned", tmp_path / "model").passed
    # The same again, with adapters that stay beside the weights: the model measured is the same one.
    code, _, err = call("run", path, "--set", "finetune.merge_adapter=false", "--out", tmp_path / "beside")
    assert code == 0, err
    kept = tmp_path / "beside" / "variants" / "dropped"
    whole = load_adapter(load_model(kept / "pruned"), kept / "model").state_dict()
    for name, weight in tuned.items():
        torch.testing.assert_close(whole[name], weight.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"finetune": {"mode": "qlora", "fsdp": True}}, "finetune.mode is qlora, but FSDP is on"),
        ({"finetune": {"mode": "qlora", "deepspeed": "z.json"}}, "but DeepSpeed is on"),
        ({"variants": ["dense", "sat"]}, "The method sat .* 4-bit"),
        ({"finetune": {"optim": "adam_8"}}, "knows no 'adam_8'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, keys, said):
    monkeypatch.setattr("gradpruner.runs.job.early_checks.check_sharding", lambda *_: None)
    path, _ = project(tmp_path, **keys)
    with pytest.raises(ConfigError, match=said):
        Job(load_recipe(path))


def test_a_missing_package_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("gradpruner.models.loading.find_spec", lambda name: None)
    path, _ = project(tmp_path)
    for work in (
        lambda: Job(load_recipe(path)),
        lambda: load_model(folder, quantise=True),
        lambda: checks.check_optimizer("paged_adamw_8bit"),
    ):
        with pytest.raises(ConfigError, match=r"needs bitsandbytes, .*pip install 'gradpruner\[quant\]'"):
            work()
